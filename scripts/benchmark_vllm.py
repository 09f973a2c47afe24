r"""Tokens that fit in a GiB of vLLM's pages, and its speed: the dense model by stock vLLM, and latents.

    make vllm    # once, for the engine and a checkpoint; Ctrl-C when it serves
    .venv-vllm/bin/python scripts/benchmark_vllm.py --latent build/served --output build/vllm.json

One engine after the other, each started for itself. A run is so many requests at once of so many random tokens each,
without prefix caching. `prefill_s` is the time until all have their first new token, `step_ms` that of each further
step of all of them: the difference of two runs, one with a new token and one with `--new_tokens`, over the steps.
"""

import gc
import time
from dataclasses import asdict, dataclass, field

import torch

from modules.files import write_json
from scripts.common import BUNDLED_MODEL, environment, find_model, format_table, parse_config


@dataclass
class VllmBenchmarkConfig:
    """Options of the benchmark."""

    latent: str = field(metadata={"help": "Checkpoint of the budget command."})
    dense: str = field(default=BUNDLED_MODEL, metadata={"help": "The dense model that it was made of."})
    requests: list[int] = field(default_factory=lambda: [1, 8, 32], metadata={"help": "Requests at once."})
    contexts: list[int] = field(default_factory=lambda: [256, 1024], metadata={"help": "Tokens of each prompt."})
    new_tokens: int = field(default=33, metadata={"help": "New tokens of each request, the first one included."})
    rounds: int = field(default=3, metadata={"help": "Runs of each kind, of which the least counts."})
    block_size: int = field(default=128, metadata={"help": "Tokens of a page."})
    dtype: str = field(default="bfloat16", metadata={"help": "Type of weights and states."})
    eager: bool = field(default=True, metadata={"help": "Whether nothing is compiled."})
    output: str = field(default="build/vllm.json", metadata={"help": "Results."})


def measure(model: str, config: VllmBenchmarkConfig) -> dict:
    """Tokens in a GiB and the times of all runs of one engine."""
    from vllm import LLM, SamplingParams

    longest = max(config.contexts) + config.new_tokens
    llm = LLM(
        model=model,
        dtype=config.dtype,
        enforce_eager=config.eager,
        block_size=config.block_size,
        max_model_len=longest,
        max_num_seqs=max(config.requests),
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()

    def seconds(prompts: list[dict], tokens: int) -> float:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start

    runs, generator = [], torch.Generator().manual_seed(0)
    for context in config.contexts:
        for requests in config.requests:
            ids = torch.randint(5, vocabulary, (requests, context), generator=generator).tolist()
            prompts = [{"prompt_token_ids": row} for row in ids]
            seconds(prompts[:1], 2)  # what is made on the first call is no part of the time
            first = min(seconds(prompts, 1) for _ in range(config.rounds))
            whole = min(seconds(prompts, config.new_tokens) for _ in range(config.rounds))
            step = (whole - first) / (config.new_tokens - 1)
            runs.append({"context": context, "requests": requests, "prefill_s": first, "step_ms": 1000 * step})
    tokens = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks * config.block_size
    llm.llm_engine.engine_core.shutdown()
    return {"tokens_per_gib": tokens, "runs": runs}


def main(config: VllmBenchmarkConfig) -> dict:
    results = {"config": asdict(config), "environment": environment()}
    for name, model in (("stock", find_model(config.dense)), ("latent", config.latent)):
        results[name] = measure(model, config)
        gc.collect()
        write_json(config.output, results)
    rows = []
    for stock, latent in zip(results["stock"]["runs"], results["latent"]["runs"], strict=True):
        times = [f"{run[key]:.3g}" for key in ("prefill_s", "step_ms") for run in (stock, latent)]
        rows.append([str(stock["context"]), str(stock["requests"]), *times])
    header = ["context", "requests", "prefill s, stock", "latent", "step ms, stock", "latent"]
    print(format_table(header, rows))
    print(f"tokens in 1 GiB: {results['stock']['tokens_per_gib']:,} and {results['latent']['tokens_per_gib']:,}")
    return results


if __name__ == "__main__":
    main(parse_config(VllmBenchmarkConfig, __doc__))
