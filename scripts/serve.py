"""Serve a latent model by an OpenAI-compatible endpoint: `transformers serve` with our model and our cache.

\b
    python scripts/calibrate_svd_ranks.py --budget 0.0625 --output build/served
    python scripts/serve.py build/served --port 8000
    curl localhost:8000/v1/completions -H "Content-Type: application/json" -d '{"prompt": "def ", "max_tokens": 64}'

MODEL is a checkpoint folder that is split already; its config.json says what the cache stores. Every request gets a
KIVILatentCache of its own, for prompt and answer; requests to one model wait for each other. Many at once, over pages
of packed latents, are served by vLLM (`make vllm`). With --continuous-batching they run together here, over the
library's pages: keys and values made of the same latents, not quantized, and as large as the dense model's (Ctrl-C
twice then, the library's thread outlives the first). The options of `transformers serve`:
"""

import sys
import time

import transformers
import typer
from transformers.cli.serve import Serve
from transformers.cli.serving import model_manager

from modeling_alrd_llama import ALRDLlamaForCausalLM


class LatentModelManager(model_manager.ModelManager):
    """The library's, for latent models only; lists the one that it is pinned to."""

    def load_model_and_processor(self, model_id_and_revision: str, *args, **kwargs):
        """As the library's.

        Raises:
            ValueError: The model is of another class, which the library would serve with a cache of its own.
        """
        model, processor = super().load_model_and_processor(model_id_and_revision, *args, **kwargs)
        if not isinstance(model, ALRDLlamaForCausalLM):
            raise ValueError(
                f"model={model_id_and_revision!r}: a {type(model).__name__}, must be a split checkpoint; make one with "
                "scripts/calibrate_svd_ranks.py, or serve this one with `transformers serve`"
            )
        return model, processor

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict]:
        """The model that the server is pinned to, which the library's list leaves out; else that list."""
        if self.force_model is None:
            return super().get_gen_models(cache_dir)
        return [{"id": self.force_model, "object": "model", "created": int(time.time()), "owned_by": ""}]


def main(arguments: list[str]) -> None:
    """Serve until interrupted; `arguments` as of `transformers serve`."""
    if "--compile" in arguments:
        raise SystemExit("serve.py: --compile: must not be given, it makes the library's static cache of dense keys")
    if "--continuous-batching" not in arguments:
        print("serve.py: one request at a time; many at once are served by vLLM, see `make vllm`", file=sys.stderr)
    # The server knows its classes by these names alone.
    transformers.ALRDLlamaForCausalLM = ALRDLlamaForCausalLM
    model_manager.ModelManager = LatentModelManager
    app = typer.Typer(add_completion=False)
    app.command(help=__doc__ + Serve.__doc__)(Serve)
    app(arguments, prog_name="serve.py")


if __name__ == "__main__":
    main(sys.argv[1:])
