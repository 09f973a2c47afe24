r"""A stored prefix: time to the first token against computing the prefix, and the memory of many continuations.

For each model, in turns, after a gate: a cache that was saved and loaded, and a fork of it, must give the logits of the
cache that never left the process, bit for bit.

    computed      prefill of the prefix by the same model, then the first new token
    dense         the same by the dense model with its `DynamicCache`
    loaded        `KIVILatentCache.load` of the file, with all checks and the fingerprint of the model, then the token
    forked        `fork()` of a cache that is in memory, then the token

    memory        bytes of the storages of the prefix with --continuations forks, each of which has gone on by --steps
                  tokens, against as many caches that share nothing, and against dense ones; and how much the process
                  grew

    python scripts/benchmark_prefix.py --checkpoints build/sweep/0.125 --output scripts/results/benchmark_prefix.json
"""

import ctypes
import gc
import statistics
import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from transformers import DynamicCache, PreTrainedModel

from configuration_alrd_llama import check_positive
from modeling_alrd_llama import ALRDLlamaForCausalLM
from modules.cache.layer import storage_nbytes
from modules.files import write_json
from modules.kivi_cache import KIVILatentCache
from scripts.common import (
    BUNDLED_MODEL,
    DTYPES,
    environment,
    find_model,
    folder_sha256,
    format_table,
    human_bytes,
    latent_config,
    load_model,
    parse_config,
)
from scripts.timing import in_turns, milliseconds, percentiles


@dataclass
class PrefixBenchmarkConfig:
    """Options of the benchmark."""

    model: str = field(default=BUNDLED_MODEL, metadata={"help": "Dense model."})
    rank: float = field(default=0.5, metadata={"help": "Rank of its plain split, a share of the full rank."})
    bits: float = field(default=2, metadata={"help": "Bits of the plain split's keys and values."})
    checkpoints: list[str] = field(
        default_factory=list, metadata={"help": "Split checkpoints of the model, measured as they are stored."}
    )
    length: int = field(default=4096, metadata={"help": "Tokens of the prefix."})
    continuations: int = field(default=8, metadata={"help": "Caches that go on from it."})
    steps: int = field(default=32, metadata={"help": "Tokens by which each goes on, all different."})
    rounds: int = field(default=7, metadata={"help": "How often each way is timed, in turns."})
    dtype: Literal[DTYPES] = field(default="bfloat16", metadata={"help": "Type of the models."})
    threads: int = field(default=2, metadata={"help": "CPU threads."})
    seed: int = field(default=0, metadata={"help": "Seed of the tokens."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})

    def __post_init__(self):
        for name in ("length", "continuations", "steps", "rounds", "threads"):
            check_positive(name, getattr(self, name))
        for path in (self.model, *self.checkpoints):
            find_model(path)


def resident_bytes() -> int | None:
    """Memory that the process occupies, after all that is free was given back; `None` where it is not known."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmRSS"))


def dense_nbytes_of(cache: DynamicCache) -> int:
    keys, values = ([getattr(layer, side) for layer in cache.layers] for side in ("keys", "values"))
    return storage_nbytes(keys + values)


@torch.no_grad()
def measure(model: ALRDLlamaForCausalLM, dense: PreTrainedModel, config: PrefixBenchmarkConfig, folder: Path) -> dict:
    """All figures of one model."""
    generator = torch.Generator().manual_seed(config.seed)
    vocabulary = model.config.vocab_size
    prefix = torch.randint(vocabulary, (1, config.length), generator=generator)
    tokens = torch.randint(vocabulary, (config.continuations, 1 + config.steps), generator=generator)
    path, first = folder / "prefix.safetensors", tokens[:1, :1]

    cache = model.create_kivi_cache()
    model(prefix, past_key_values=cache, logits_to_keep=1)
    cache.save(path)

    def token(any_model: PreTrainedModel, any_cache) -> torch.Tensor:
        return any_model(first, past_key_values=any_cache).logits

    def computed(any_model: PreTrainedModel, any_cache) -> torch.Tensor:
        any_model(prefix, past_key_values=any_cache, logits_to_keep=1)
        return token(any_model, any_cache)

    def loaded() -> torch.Tensor:
        return token(model, KIVILatentCache.load(path, model=model))

    ways: dict[str, Callable[[], torch.Tensor]] = {
        "computed": lambda: computed(model, model.create_kivi_cache()),
        "dense": lambda: computed(dense, DynamicCache()),
        "loaded": loaded,
        "forked": lambda: token(model, cache.fork()),
    }
    expected = token(model, deepcopy(cache))
    for name in ("computed", "loaded", "forked"):
        if not torch.equal(ways[name](), expected):
            raise RuntimeError(f"correctness gate: {name} gives other logits than the cache that was not stored")
    seconds = in_turns(ways, config.rounds, warm_up=0)  # the gate has run them, and a long prefix takes minutes

    def go_on(caches: list) -> list:
        """Each by its own tokens, one at a time."""
        for row, one in zip(tokens, caches, strict=True):
            for piece in row[None].split(1, dim=1):
                model(piece, past_key_values=one)
        return caches

    def grown(make: Callable[[], list], nbytes: Callable[[list], int]) -> dict:
        before = resident_bytes()
        caches = make()
        after = resident_bytes()
        return {"bytes": nbytes(caches), "process_grew": None if before is None else after - before}

    def whole() -> list:
        return [KIVILatentCache.load(path, model=model) for _ in tokens]

    def dense_caches() -> list:
        caches = [DynamicCache() for _ in tokens]
        for one in caches:
            dense(prefix, past_key_values=one, logits_to_keep=1)
        return caches

    memory = {
        "forks": grown(
            lambda: go_on([cache.fork() for _ in tokens]), lambda forks: KIVILatentCache.nbytes_together(cache, *forks)
        ),
        "caches": grown(lambda: go_on(whole()), lambda caches: KIVILatentCache.nbytes_together(*caches)),
        "dense": grown(dense_caches, lambda caches: sum(map(dense_nbytes_of, caches))),
    }
    return {
        "seconds": {name: percentiles(times) for name, times in seconds.items()},
        "times_faster": {
            name: statistics.median(seconds[name]) / statistics.median(seconds["loaded"]) for name in seconds
        },
        "file_bytes": path.stat().st_size,
        "prefix_bytes": cache.nbytes,
        "memory": memory,
    }


def main(config: PrefixBenchmarkConfig) -> dict:
    """Measure every model; returns the record."""
    torch.set_num_threads(config.threads)
    dtype = getattr(torch, config.dtype)
    dense, _ = load_model(config.model, dtype)
    plain, _ = latent_config(config.model, config.rank)
    plain.k_bits = plain.v_bits = config.bits
    models = {f"{config.rank:.0%} of ranks, {config.bits:g} bit": (config.model, plain)}
    models |= {Path(path).name: (path, None) for path in config.checkpoints}
    record = {"config": asdict(config), "environment": environment(), "models": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, (path, split) in models.items():
            model = ALRDLlamaForCausalLM.from_pretrained(path, config=split, dtype=dtype).eval()
            record["models"][name] = measure(model, dense, config, Path(folder)) | {"sha256": folder_sha256(path)}
            if config.output:
                write_json(config.output, record)
    print(format_table(*prefix_cells(record)))
    return record


def prefix_cells(record: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the results."""
    n = record["config"]["continuations"]
    header = [
        "model",
        "computed, ms",
        "dense, ms",
        "loaded, ms",
        "forked, ms",
        "loaded, times faster than computed / dense",
        "file",
        f"prefix and {n} forks",
        f"{n} caches",
        f"{n} dense caches",
        "process grew by",
    ]
    rows = []
    for name, r in record["models"].items():
        times = [milliseconds(r["seconds"][way]) for way in ("computed", "dense", "loaded", "forked")]
        faster = " / ".join(f"{r['times_faster'][way]:.0f}×" for way in ("computed", "dense"))
        sizes = [human_bytes(r["memory"][kind]["bytes"]) for kind in ("forks", "caches", "dense")]
        grew = [r["memory"][kind]["process_grew"] for kind in ("forks", "caches", "dense")]
        grew = "?" if None in grew else " / ".join(map(human_bytes, grew))
        rows.append([name, *times, faster, human_bytes(r["file_bytes"]), *sizes, grew])
    return header, rows


if __name__ == "__main__":
    main(parse_config(PrefixBenchmarkConfig, __doc__))
