"""Latent models served by vLLM, their packed latents in its pages: a plug-in, which vLLM calls by its entry point."""

#: Releases of vLLM whose interfaces the plug-in was tested with: from the first on, before the second.
SUPPORTED = ((0, 31), (0, 33))


def register() -> None:
    """Make the configuration and the model known to this process, perhaps for the second time.

    Raises:
        ValueError: Another release of vLLM.
    """
    # Neither is needed by whoever reads this package without vLLM.
    import vllm
    from vllm import ModelRegistry

    import configuration_alrd_llama  # noqa: F401, which tells the library of its model type

    release = tuple(map(int, vllm.__version__.split("+")[0].split(".")[:2]))
    if not SUPPORTED[0] <= release < SUPPORTED[1]:
        first, last = (".".join(map(str, bound)) for bound in SUPPORTED)
        raise ValueError(
            f"vllm={vllm.__version__}: must be at least {first} and below {last} for latent models; VLLM_PLUGINS='' "
            "serves others without this plug-in"
        )
    ModelRegistry.register_model("ALRDLlamaForCausalLM", "modules.vllm.model:ALRDLlamaForCausalLM")
