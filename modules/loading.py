"""Loading and saving of weights: from dense ones to factors and back, checks, parts of tensor-parallel ranks.

`from_pretrained` splits a dense checkpoint weight by weight, by conversions that the library applies
(`register_dense_conversion`); `from_dense` splits a model in memory (`factored_state`).
"""

import os
import threading
from contextlib import suppress

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from configuration_alrd_llama import ALRDLlamaConfig, check_tiers, check_width_beside_tiers
from modules.svd_linear import SVDLinear, factor_groups, join_factors

#: Held while a model is loaded: the library keeps conversions per model type, ours differ per configuration.
lock = threading.Lock()

#: What a person finds who opens a saved folder without the project.
_FOLDER_README = """# A model with low-rank keys and values (alrd_llama)

The key and value projections are stored as factors, which the classes of transformers do not know: `LlamaForCausalLM`
refuses this folder, and the auto classes know it only after the project is imported. From a checkout of the project:

    from modeling_alrd_llama import ALRDLlamaForCausalLM

    model = ALRDLlamaForCausalLM.from_pretrained("path of this folder")

`model.save_pretrained(folder, save_original_format=True)` writes the plain dense model for any other program;
`python scripts/export_hub.py --model FOLDER --output OTHER` writes a folder that loads without the project, by
`trust_remote_code=True`.
"""

#: Arguments of `from_pretrained` that say where a checkpoint is.
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "gguf_file")


# ---- from dense weights to factors, and back


class SplitProjection(ConversionOps):
    """Factor one dense weight while it is loaded: plain SVD per head group, the rotation folded in."""

    def __init__(self, ranks: tuple[int, ...], rotate: bool, tiers: list | None = None):
        self.ranks, self.rotate, self.tiers = ranks, rotate, tiers

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        tensors = input_dict[source_patterns[0]]
        weight = tensors[0] if isinstance(tensors, list) else tensors
        a, b = join_factors(factor_groups(weight, self.ranks), self.rotate, weight.dtype, self.tiers)
        return {target_patterns[0]: b, target_patterns[1]: a}


def register_dense_conversion(config: ALRDLlamaConfig) -> None:
    """Tell the library how the dense weights of a checkpoint become those of a model with this configuration."""
    conversions = []
    for i in range(config.num_hidden_layers):
        for projection, rotate in (("k_proj", config.k_hadamard), ("v_proj", config.v_hadamard)):
            ranks = config.group_ranks(i, projection)
            if ranks is not None:
                name = f"layers.{i}.self_attn.{projection}"
                factors = [f"{name}.BLinear.weight", f"{name}.ALinear.weight"]
                tiers = config.width_tiers.get(f"model.{name}")
                conversions.append(WeightConverter(f"{name}.weight", factors, [SplitProjection(ranks, rotate, tiers)]))
                conversions.append(WeightRenaming(f"{name}.bias", f"{name}.ALinear.bias"))
    register_checkpoint_conversion_mapping(config.model_type, conversions, overwrite=True)


def factored_state(
    dense: PreTrainedModel,
    config: ALRDLlamaConfig,
    splits: list[dict[str, dict]] | None,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """The `state_dict` of a split model, which shares no weight with the dense one.

    Args:
        dense, config, splits: As for `ALRDLlamaForCausalLM.from_dense`.
        dtype, device: Of the weights that are not factored.
    """
    state = {name: t.detach().to(device, dtype, copy=True) for name, t in dense.state_dict().items()}
    for i, layer in enumerate(dense.model.layers):
        for projection, rotate in (("k_proj", config.k_hadamard), ("v_proj", config.v_hadamard)):
            ranks = config.group_ranks(i, projection)
            if ranks is None:
                continue
            name, linear = f"model.layers.{i}.self_attn.{projection}", getattr(layer.self_attn, projection)
            how = splits[i][projection] if splits else {}
            tiers = config.width_tiers.get(name)
            if tiers is None and getattr(config, f"{projection[0]}_mean_split"):
                # A rotation must not spread the mean over the other channels.
                tiers = [[(n, 16) for n in (1, rank - 1) if n] for rank in ranks]
            split = SVDLinear.from_linear(linear, ranks, config.num_key_value_heads, rotate, tiers, **how)
            state = {key: tensor for key, tensor in state.items() if not key.startswith(f"{name}.")}
            state.update({f"{name}.{key}": tensor for key, tensor in split.state_dict().items()})
    return state


@torch.no_grad()
def dense_model(model: PreTrainedModel) -> PreTrainedModel:
    """A plain model of the config's `dense_model_type` with the products of a split model's factors.

    Raises:
        ValueError: The model is distributed.
    """
    check_all_layers(model, "to_dense")
    if (model.tp_size or 1) > 1:
        raise ValueError(f"to_dense: a rank of {model.tp_size} has some of the heads only; load the model on one")
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, SVDLinear):
            bias = state.get(f"{name}.ALinear.bias")
            state = {key: tensor for key, tensor in state.items() if not key.startswith(f"{name}.")}
            state[f"{name}.weight"] = module.dense_weight()
            if bias is not None:
                state[f"{name}.bias"] = bias
    dense = AutoModelForCausalLM.from_config(model.config.to_dense()).to(model.dtype)
    dense.load_state_dict(state)
    dense.generation_config = model.generation_config
    return dense.to(model.device).eval()


def write_folder_readme(folder: str | os.PathLike) -> None:
    """Say in the `README.md` of a folder with factors how it is loaded, unless there is one."""
    with suppress(FileExistsError), open(os.path.join(folder, "README.md"), "x") as readme:
        readme.write(_FOLDER_README)


# ---- what cannot be split or loaded


def check_same_model_type(stored: ALRDLlamaConfig, config: ALRDLlamaConfig) -> None:
    """Refuse a configuration of another kind of model than the weights are of: it would leave out their biases."""
    if stored.dense_model_type != config.dense_model_type:
        raise ValueError(
            f"dense_model_type={config.dense_model_type!r}: must be {stored.dense_model_type!r}, as the weights are; "
            "make the config from that of the checkpoint"
        )


def check_plain(dense: nn.Module) -> None:
    """Refuse a model whose weights are not its own: with adapters, wrapped, compiled or quantized."""
    kind = type(dense).__name__
    adapted = [name for name, module in dense.named_modules() if hasattr(module, "base_layer")]
    if adapted:
        raise ValueError(
            f"dense: {kind} has PEFT adapters, of {adapted[0]} and {len(adapted) - 1} more: must be merged first, by "
            "PEFT's merge_and_unload()"
        )
    if hasattr(dense, "peft_config"):
        raise ValueError(f"dense: {kind} has PEFT prompts: must be without them, as dense.get_base_model() is")
    weights = dense.state_dict()
    for i in range(dense.config.num_hidden_layers):
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            name = f"model.layers.{i}.self_attn.{projection}.weight"
            weight = weights.get(name)
            if weight is None or not weight.is_floating_point() or weight.itemsize == 1:
                found = "no such weight" if weight is None else f"a weight in {weight.dtype}"
                raise ValueError(f"dense: {kind} must be a plain model, not wrapped, not quantized; {name}: {found}")


def check_stored_model(path, config: PreTrainedConfig | str | None, arguments: dict) -> None:
    """Refuse a configuration whose model type or factors differ from those that a checkpoint stores.

    Args:
        path: The checkpoint.
        config: The configuration asked for, or where it is; `None`: the checkpoint's own.
        arguments: The other keyword arguments of `from_pretrained`, among them fields of the configuration.

    Raises:
        ValueError: They differ; the message names the field.
    """
    hub_arguments = {name: arguments[name] for name in _HUB_ARGUMENTS if name in arguments}
    if not isinstance(config, PreTrainedConfig):
        # As the library will: fields by keyword take the place of those in the folder.
        own = {name: arguments[name] for name in ALRDLlamaConfig.__dataclass_fields__ if name in arguments}
        config = ALRDLlamaConfig.from_pretrained(path if config is None else config, **hub_arguments, **own)
    stored = ALRDLlamaConfig.from_pretrained(path, **hub_arguments)
    check_same_model_type(stored, config)
    if not stored.truncation_ranks:
        for field in ("k_mean_split", "v_mean_split"):
            if getattr(config, field):
                raise ValueError(f"{field}=True: the mean is known to calibrated factors only; {path!r} is dense")
        return
    for projection in ("k_proj", "v_proj"):
        for i in range(config.num_hidden_layers):
            _check_stored_ranks(stored, config, i, projection)
            _check_stored_tiers(stored, config, i, projection)


def _check_stored_ranks(stored: ALRDLlamaConfig, config: ALRDLlamaConfig, layer_idx: int, projection: str) -> None:
    ranks, asked = (c.group_ranks(layer_idx, projection) for c in (stored, config))
    if ranks != asked:
        raise ValueError(
            f"truncation_ranks: {projection} of layer {layer_idx} is stored with group ranks {ranks}, the given config "
            f"asks for {asked}; split the dense checkpoint again to change them"
        )
    rotation = f"{projection[0]}_hadamard"
    if ranks is not None and getattr(stored, rotation) != getattr(config, rotation):
        raise ValueError(
            f"{rotation}={getattr(config, rotation)}: the checkpoint's factors are stored with "
            f"{rotation}={getattr(stored, rotation)}; split the dense checkpoint again to change it"
        )


def _check_stored_tiers(stored: ALRDLlamaConfig, config: ALRDLlamaConfig, layer_idx: int, projection: str) -> None:
    """Refuse other width tiers than the factors are calibrated for, or none where calibrated scales need them."""
    name, side = f"model.layers.{layer_idx}.self_attn.{projection}", projection[0]
    tiers, asked = stored.width_tiers.get(name), config.width_tiers.get(name)
    if tiers is None:
        return
    if asked is not None:
        check_width_beside_tiers(side, getattr(config, f"{side}_bits"), getattr(stored, f"{side}_bits"))
    static = (getattr(config, f"{side}_scheme") or {}).get("static", False)
    if static if asked is None else check_tiers(asked) != check_tiers(tiers):
        raise ValueError(
            f"width_tiers[{name!r}]={asked}: the checkpoint is calibrated for {tiers}; for one width give "
            f"create_kivi_cache() {side}_bits, or calibrate the dense checkpoint again"
        )


def check_all_loaded(path, info: dict) -> None:
    """Refuse a model of which a weight stayed at its random initialisation, by the library's `loading_info`."""
    unloaded = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if unloaded:
        raise ValueError(
            f"{path}: the checkpoint has no fitting weights for {', '.join(unloaded)}; they would be random"
        )


# ---- several devices


def check_tensor_parallel(config: ALRDLlamaConfig, size: int, other_sizes: int) -> None:
    """Refuse a number of ranks over which the heads, or their groups, cannot be dealt out whole."""
    counts = {"num_key_value_heads": config.num_key_value_heads}
    if config.num_head_groups > 1 and config.truncation_ranks:
        counts[f"the head groups of head_group_size={config.head_group_size}"] = config.num_head_groups
        if not config.use_kivi:
            raise ValueError(
                f"tp_size={size}: the simple scheme (use_kivi=False) rounds the latents of all head groups together, "
                "so they cannot be on several ranks; head_group_size must be None"
            )
    for name, count in counts.items():
        if count % size:
            raise ValueError(f"tp_size={size}: must divide {name}, {count}: a rank caches whole ones")
    if other_sizes > 1:
        raise ValueError(f"tp_size={size}: cannot be combined with FSDP (over {other_sizes} ranks)")


def check_tensor_parallel_plan(plan: dict[str, str]) -> None:
    """Refuse a plan of the library's, style by name of a layer, that does not split the projections by heads."""
    for projection in ("q_proj", "k_proj", "v_proj"):
        styles = {style for name, style in plan.items() if name.endswith(f"self_attn.{projection}")}
        if styles != {"colwise"}:
            raise ValueError(
                f"tp_plan: {projection} must be 'colwise', as the cache is split with its heads; got {styles or None}"
            )


def check_all_layers(model: PreTrainedModel, what: str) -> None:
    """Refuse to do `what` with a stage of a pipeline."""
    if getattr(model, "_pp_stage", None) is not None:
        raise ValueError(f"{what}: a stage of a pipeline has some of the layers only; load the model without it")


def gathered_factors(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole factors, on the CPU, for those entries of `state` that ranks hold parts of; every rank must call it."""
    whole = {}
    for module_name, module in model.named_modules():
        if isinstance(module, SVDLinear) and module.BLinear.process_group is not None:
            for name, tensor in module.gathered_state().items():
                if f"{module_name}.{name}" in state:
                    whole[f"{module_name}.{name}"] = tensor.cpu()
    return whole
