"""Time of one append, and temporary memory of one decode step, of the packed cache in one layer.

Part 1 appends tokens one by one to a `KIVILatentCache`, all the way to the longest length, and times --appends
consecutive ones at each length, packing of blocks included; `DynamicCache.update` beside it, in the same run.
Part 2 runs decode steps of a layer at the longest length and adds up what torch's CPU allocator hands out: an ordinary
step, and the dearest one, which also packs a block and makes the pool grow. The temporary memory is the peak, less what
the step leaves allocated; it has to stay under a twentieth of the layer's dense keys and values.

Shapes: one layer of Llama-3-8B with random weights and latents. First comes a correctness gate: what is packed must
be, bit for bit, the simulated round trip of its blocks; otherwise nothing is reported.

    python scripts/benchmark_cache.py --output build/benchmark_cache.json
"""

import itertools
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler reports its starts and stops on stderr otherwise

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from transformers import DynamicCache

from configuration_alrd_llama import ALRDLlamaConfig, check_positive
from modeling_alrd_llama import ALRDLlamaModel
from modules.files import write_json
from modules.fit.budget import dense_nbytes
from modules.kivi_cache import CacheScheme, KIVILatentCache, config_widths
from modules.quant_utils import KIVIQuantizer
from scripts.common import DTYPES, CacheOptions, environment, format_table, human_bytes, parse_config, set_ranks
from scripts.timing import percentiles, timed

LLAMA_3_8B = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
SMALL = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}

#: The bound on the temporary memory of a decode step, as a share of the layer's dense keys and values.
TEMPORARY_SHARE = 1 / 20


@dataclass
class CacheBenchmarkConfig(CacheOptions):
    """Options of the benchmark."""

    lengths: list[int] = field(
        default_factory=lambda: [1024, 2048, 4096, 8192, 16384, 32768],
        metadata={"help": "Cached tokens at which appends are timed, in rising order; steps are measured at the last."},
    )
    appends: int = field(
        default=256, metadata={"help": "Consecutive appends to time at each length; at least two blocks."}
    )
    dtype: Literal[DTYPES] = field(
        default="bfloat16", metadata={"help": "Type of the layer; half types are the stricter case for the memory."}
    )
    rank: float = field(
        default=0.5, metadata={"help": "Rank of keys and values: up to 1 a share, above 1 the total rank itself."}
    )
    head_group_size: int | None = field(
        default=None, metadata={"help": "Key/value heads that share a latent. None: all."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of weights and latents."})
    threads: int = field(
        default=1, metadata={"help": "CPU threads of PyTorch; one keeps the times steady beside other work."}
    )
    quick: bool = field(
        default=False, metadata={"help": "A small layer and lengths 256 and 512, to try the script out."}
    )
    output: str | None = field(default=None, metadata={"help": "JSON file to write."})

    def __post_init__(self):
        super().__post_init__()
        scheme = CacheScheme(**self.cache_settings())
        for name, s in (("k_scheme", scheme.keys), ("v_scheme", scheme.values)):
            if (
                s.bits == 1.5
                or s.rotation
                or s.protected
                or s.static
                or s.quantizer
                or (s.per_channel and s.group_size and scheme.block_length % s.group_size)
            ):
                raise ValueError(f"{name}: the correctness gate compares with KIVIQuantizer, which does not know {s}")
        if self.quick:
            self.lengths, self.appends = [256, 512], 256
        check_positive("lengths", *self.lengths)
        check_positive("threads", self.threads)
        for short, long in zip(self.lengths, self.lengths[1:]):
            if long < short + self.appends:
                raise ValueError(f"lengths={self.lengths!r}: must rise by at least appends={self.appends} tokens")

    def layer_config(self) -> ALRDLlamaConfig:
        """A model of one layer, the rest of which is as small as it goes."""
        shape = SMALL if self.quick else LLAMA_3_8B
        config = ALRDLlamaConfig(
            **shape,
            **self.cache_settings(),
            num_hidden_layers=1,
            intermediate_size=8,
            vocab_size=8,
            max_position_embeddings=2 * self.lengths[-1],
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        )
        set_ranks(config, self.rank, self.head_group_size)
        return config


class Latents:
    """An endless stream of random latents of one layer, `[1, L, C_k]` and `[1, L, C_v]`."""

    def __init__(self, config: ALRDLlamaConfig, dtype: torch.dtype):
        self.channels = [sum(widths) for widths in config.layer_widths(0)]
        self.dtype = dtype

    def __call__(self, length: int) -> list[torch.Tensor]:
        return [torch.randn(1, length, channels).to(self.dtype) for channels in self.channels]


def new_cache(config: ALRDLlamaConfig) -> KIVILatentCache:
    return KIVILatentCache(CacheScheme.from_config(config), config_widths(config))


def check_cache(config: ALRDLlamaConfig, latents: Latents) -> int:
    """The correctness gate; returns the number of packed tokens compared.

    Raises:
        RuntimeError: What the cache gives back is not what the quantizer's round trip of its blocks gives.
    """
    cache = new_cache(config)
    layer, scheme = cache.layers[0], cache.scheme
    block = scheme.block_length
    stop = scheme.sink_length + 3 * block
    states = latents(stop + scheme.residual_length + block // 2)
    layer.append(*(x[:, : -block // 2] for x in states))
    for token in zip(*(x[:, -block // 2 :].split(1, dim=1) for x in states)):
        layer.append(*token)

    widths, quantizers = config.layer_widths(0), []
    for s in (scheme.keys, scheme.values):
        group_size = s.group_size
        # Per channel a group never reaches beyond its block; `KIVIQuantizer` knows no block.
        if s.per_channel and not group_size:
            group_size = block
        quantizers.append(KIVIQuantizer(s.bits, group_size, s.per_channel, s.symmetric, s.range_method))
    for side, x, held, groups, quantizer in zip(("keys", "values"), states, layer.states(), widths, quantizers):
        expected = x.clone()
        packed = x[:, scheme.sink_length : stop]
        expected[:, scheme.sink_length : stop] = torch.cat([quantizer(g) for g in packed.split(groups, dim=-1)], -1)
        if not torch.equal(held, expected):
            raise RuntimeError(f"correctness gate: the packed {side} are not the simulated round trip; no figures")
    return stop - scheme.sink_length


def microseconds(seconds: list[float]) -> dict[str, float]:
    """Microseconds: median, 20th and 80th percentile, mean, largest."""
    figures = percentiles(seconds) | {"mean": statistics.fmean(seconds), "max": max(seconds)}
    return {name: round(1e6 * value, 2) for name, value in figures.items()}


def append_seconds(append: Callable[..., Any], tokens: list) -> list[float]:
    """Seconds that each call of `append(*token)` takes."""
    return [timed(partial(append, *token))[0] for token in tokens]


def time_appends(config: ALRDLlamaConfig, options: CacheBenchmarkConfig, latents: Latents) -> list[dict[str, Any]]:
    """Appends of one token at each length, packed and dense."""
    dtype = getattr(torch, options.dtype)
    heads, size = config.num_key_value_heads, config.head_dim
    layer = new_cache(config).layers[0]
    packed_tokens = list(zip(*(x.split(1, dim=1) for x in latents(options.appends))))
    dense_tokens = [(*torch.randn(2, 1, heads, 1, size).to(dtype), 0) for _ in range(options.appends)]
    append_seconds(layer.append, packed_tokens[:1])

    results = []
    for length in tqdm(options.lengths, desc="appends", unit="length"):
        # One by one on the way, too, so that every growth of the pool is in the running mean.
        missing = length - layer.get_seq_length()
        way = append_seconds(layer.append, [packed_tokens[i % options.appends] for i in range(missing)])
        packed = append_seconds(layer.append, packed_tokens)
        dense_cache = DynamicCache()
        dense_cache.update(*torch.randn(2, 1, heads, length, size).to(dtype), 0)
        dense = append_seconds(dense_cache.update, dense_tokens)
        results.append(
            {
                "length": length,
                "packed_us": microseconds(packed),
                "dense_us": microseconds(dense),
                "dense_over_packed": statistics.median(dense) / statistics.median(packed),
                "packed_us_mean_since_last_length": round(1e6 * statistics.fmean(way + packed), 2),
            }
        )
    return results


def growth(results: list[dict[str, Any]]) -> dict[str, float]:
    """Time at the last length over time at the first."""
    first, last = results[0], results[-1]
    grown = {}
    for cache, name in itertools.product(("packed", "dense"), ("p50", "mean")):
        grown[f"{cache}_{name}"] = last[f"{cache}_us"][name] / first[f"{cache}_us"][name]
    return grown


def allocated_bytes(step: Callable[[], Any]) -> tuple[int, int]:
    """Peak and end of torch's CPU allocations during `step`, above what was allocated before.

    A tensor that is older and freed by the step counts as freed if it was allocated under a memory profile.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, live


@torch.no_grad()
def measure_steps(config: ALRDLlamaConfig, options: CacheBenchmarkConfig, latents: Latents) -> dict[str, Any]:
    """Temporary memory of decode steps at the longest length."""
    dtype, target = getattr(torch, options.dtype), options.lengths[-1]
    model = ALRDLlamaModel(config).to(dtype).eval()
    cache = new_cache(config)
    layer = cache.layers[0]
    block = cache.scheme.block_length
    token = torch.zeros((1, 1), dtype=torch.long)

    def step() -> None:
        model(input_ids=token, past_key_values=cache)

    def measured(name: str) -> dict[str, Any]:
        tokens, pool, blocks = layer.get_seq_length(), layer.pool.nbytes, len(layer.rows[0].blocks)
        peak, kept = allocated_bytes(step)
        temporary, dense = peak - max(kept, 0), dense_nbytes(config, tokens, dtype)
        return {
            "step": name,
            "cached_tokens": tokens,
            "peak_bytes": peak,
            "kept_bytes": kept,
            "temporary_bytes": temporary,
            "dense_layer_bytes": dense,
            "peak_share": peak / dense,
            "temporary_share": temporary / dense,
            "under_a_twentieth": temporary < TEMPORARY_SHARE * dense,
            "packed_blocks": len(layer.rows[0].blocks) - blocks,
            "pool_growth_bytes": layer.pool.nbytes - pool,
        }

    def fill() -> None:
        # Most in one piece, which leaves an eighth of slack in the pool; the rest block by block.
        layer.append(*latents(target * 4 // 5))
        while (missing := target - layer.get_seq_length()) > 0:
            layer.append(*latents(min(block, missing)))

    def fill_pool() -> None:
        while layer.pool.free:
            layer.append(*latents(block))
        window = cache.scheme.residual_length + block - 1
        for _ in range(window - layer.rows[0].window):
            layer.append(*latents(1))

    with tqdm(total=4, desc="decode steps", unit="stage") as progress:
        allocated_bytes(fill)  # profiled so that what the pool frees later is known
        progress.update()
        allocated_bytes(step)
        ordinary = measured("ordinary")
        progress.update()
        allocated_bytes(fill_pool)
        progress.update()
        dearest = measured("packs a block and grows the pool")
        progress.update()
    return {"limit": TEMPORARY_SHARE, "steps": [ordinary, dearest]}


def main(options: CacheBenchmarkConfig) -> dict[str, Any]:
    """Check, measure and report; returns the record."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    config = options.layer_config()
    block = config.group_size or 128
    if options.appends < 2 * block:
        raise ValueError(f"appends={options.appends}: must be at least two blocks, {2 * block}, to include packing")
    latents = Latents(config, getattr(torch, options.dtype))

    compared = check_cache(config, latents)
    print(f"gate: {compared} packed tokens equal the simulated round trip")
    appends = time_appends(config, options, latents)
    grown = growth(appends)
    memory = measure_steps(config, options, latents)

    header = ["tokens", "packed p20/p50/p80 µs", "mean", "dense p20/p50/p80 µs", "mean", "dense/packed"]
    rows = []
    for r in appends:
        row = [f"{r['length']:,}"]
        for figures in (r["packed_us"], r["dense_us"]):
            row += ["/".join(f"{figures[p]:.0f}" for p in ("p20", "p50", "p80")), f"{figures['mean']:.0f}"]
        rows.append([*row, f"{r['dense_over_packed']:.1f}"])
    print(f"\nOne append to one layer, {options.dtype}, {options.appends} at each length\n{format_table(header, rows)}")
    first, last = (f"{appends[i]['length']:,}" for i in (0, -1))
    print(f"growth from {first} to {last}: " + ", ".join(f"{name} {value:.2f}" for name, value in grown.items()))

    print("\nTemporary memory of one decode step of one layer")
    for m in memory["steps"]:
        verdict = "under" if m["under_a_twentieth"] else "NOT under"
        print(
            f"  {m['step']}: {human_bytes(m['temporary_bytes'])} at {m['cached_tokens']:,} tokens, "
            f"{m['temporary_share']:.4f} of the dense {human_bytes(m['dense_layer_bytes'])}, {verdict} a twentieth "
            f"(peak {human_bytes(m['peak_bytes'])}, of which {human_bytes(m['kept_bytes'])} stay)"
        )

    result = {
        "config": asdict(options),
        "layer": {name: getattr(config, name) for name in (*LLAMA_3_8B, "truncation_ranks", "head_group_size")},
        "cache": asdict(new_cache(config).scheme),
        "gate": {"passed": True, "packed_tokens_compared": compared},
        "appends": appends,
        "append_growth": grown,
        "decode_step_memory": memory,
        "environment": environment(),
    }
    if options.output:
        write_json(options.output, result)
    return result


if __name__ == "__main__":
    main(parse_config(CacheBenchmarkConfig, __doc__))
