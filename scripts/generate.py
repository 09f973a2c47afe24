"""Generate text through the packed latent cache, and say what the cache took.

A dense model is split on the way in (plain SVD of every key and value projection, to --rank); a
checkpoint that is split already, such as one of scripts/calibrate_svd_ranks.py, is used as it is.

    python scripts/generate.py --prompt "def read_lines(path):" --rank 0.5 --k_bits 4 --v_bits 4
    python scripts/generate.py --model meta-llama/Llama-2-7b-hf --prompt_file notes.txt --compare_dense
"""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import DynamicCache, TextStreamer, set_seed

from configuration_alrd_llama import check_positive
from modules.files import write_json
from modules.fit.budget import dense_nbytes
from scripts.common import (
    BUNDLED_MODEL,
    DTYPES,
    CacheOptions,
    environment,
    human_bytes,
    latent_config,
    load_model,
    parse_config,
)

DEFAULT_PROMPT = 'def read_lines(path):\n    """Return the lines of a text file."""\n'


@dataclass
class GenerateConfig(CacheOptions):
    """Options of the generation."""

    model: str = field(
        default=BUNDLED_MODEL, metadata={"help": "Folder, GGUF file or hub name of a model, dense or split."}
    )
    prompt: str | None = field(default=None, metadata={"help": "Text to go on from. None: a line of Python."})
    prompt_file: str | None = field(default=None, metadata={"help": "UTF-8 file with the prompt, in place of it."})
    max_new_tokens: int = field(default=128, metadata={"help": "Tokens to generate at most."})
    do_sample: bool = field(default=False, metadata={"help": "Sample; otherwise the likeliest token is taken."})
    temperature: float = field(default=0.8, metadata={"help": "Temperature of --do_sample."})
    seed: int = field(default=0, metadata={"help": "Seed of --do_sample."})
    rank: float = field(
        default=0.5,
        metadata={
            "help": "Rank of every key and value projection of a dense checkpoint: up to 1 a share of the full rank, "
            "above 1 the total rank itself. A checkpoint that is split already keeps its ranks."
        },
    )
    head_group_size: int | None = field(
        default=None, metadata={"help": "Key/value heads that share a latent. None: all, or the split checkpoint's."}
    )
    dtype: Literal[("auto", *DTYPES)] = field(
        default="auto", metadata={"help": "Type of the model; auto: the checkpoint's."}
    )
    device_map: str | None = field(
        default=None, metadata={"help": "Where the model goes: auto, cuda, cpu, …. None: the CPU."}
    )
    compare_dense: bool = field(
        default=False, metadata={"help": "Generate with the dense model and a DynamicCache, too."}
    )
    output: str | None = field(default=None, metadata={"help": "JSON file to write."})

    def __post_init__(self):
        super().__post_init__()
        check_positive("max_new_tokens", self.max_new_tokens)
        check_positive("temperature", self.temperature)
        if self.prompt is not None and self.prompt_file is not None:
            raise ValueError(f"prompt_file={self.prompt_file!r}: must not be given together with prompt")
        if self.prompt_file is not None and not Path(self.prompt_file).is_file():
            raise ValueError(f"prompt_file={self.prompt_file!r}: must be an existing file")

    def read_prompt(self) -> str:
        if self.prompt_file is not None:
            return Path(self.prompt_file).read_text(encoding="utf-8")
        return DEFAULT_PROMPT if self.prompt is None else self.prompt


def generate(model, tokenizer, cache, config: GenerateConfig) -> dict[str, Any]:
    """Generate with `cache`, streaming to stdout; returns tokens, text and time."""
    inputs = tokenizer(config.read_prompt(), return_tensors="pt", return_token_type_ids=False).to(model.device)
    prompt_tokens = inputs.input_ids.shape[1]
    if prompt_tokens == 0:
        raise ValueError("prompt: must hold at least one token")
    sampling = {"do_sample": True, "temperature": config.temperature} if config.do_sample else {"do_sample": False}
    set_seed(config.seed)
    streamer = TextStreamer(tokenizer)
    started = time.perf_counter()
    tokens = model.generate(
        **inputs, past_key_values=cache, max_new_tokens=config.max_new_tokens, streamer=streamer, **sampling
    )[0].tolist()
    seconds = time.perf_counter() - started
    new_tokens = len(tokens) - prompt_tokens
    return {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "text": tokenizer.decode(tokens),
        "token_ids": tokens,
        "seconds": seconds,
        "tokens_per_second": new_tokens / seconds,
    }


def main(config: GenerateConfig) -> dict[str, Any]:
    """Generate and report; returns the record."""
    latent, is_split = latent_config(config.model, config.rank, config.head_group_size)
    if is_split and config.compare_dense:
        raise ValueError(
            "compare_dense=True: must be False for a checkpoint that is split already; it has no dense one"
        )
    model, tokenizer = load_model(config.model, config.dtype, config.device_map, latent)
    how = "split already, --rank is not used" if is_split else f"split on loading, --rank {config.rank:g}"
    print(f"{config.model}: {how}; {model.dtype} on {model.device}\n")

    cache = model.create_kivi_cache(**config.cache_settings())
    packed = generate(model, tokenizer, cache, config)
    length = cache.get_seq_length()
    dense_size = dense_nbytes(model.config, length, model.dtype)
    print(f"\n{packed['new_tokens']} tokens, {packed['tokens_per_second']:.1f} tokens/s (prompt included)\n{cache}")
    print(
        f"{length} tokens: {human_bytes(cache.nbytes_used)} used, {human_bytes(cache.nbytes)} allocated; dense keys "
        f"and values {human_bytes(dense_size)}, {dense_size / cache.nbytes_used:.2f} times as much"
    )
    result = {
        "config": asdict(config),
        "packed": packed,
        "cache": {
            "description": repr(cache),
            "length": length,
            "nbytes_used": cache.nbytes_used,
            "nbytes": cache.nbytes,
            "dense_nbytes": dense_size,
            "ratio": dense_size / cache.nbytes_used,
        },
        "environment": environment(model.device),
    }

    if config.compare_dense:
        print("\nThe dense model with a DynamicCache:\n")
        model, tokenizer = load_model(config.model, config.dtype, config.device_map)
        dense = generate(model, tokenizer, DynamicCache(config=model.config), config)
        start = dense["prompt_tokens"]
        pairs = list(zip(packed["token_ids"][start:], dense["token_ids"][start:]))
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        print(f"\n{dense['new_tokens']} tokens, {dense['tokens_per_second']:.1f} tokens/s (prompt included)")
        print(f"The first {same} of {len(pairs)} new tokens are the same")
        result |= {"dense": dense, "same_tokens": same}
    if config.output:
        write_json(config.output, result)
    return result


if __name__ == "__main__":
    main(parse_config(GenerateConfig, __doc__))
