"""Attention over keys quantized per token and values per channel: by table look-up, against two other ways.

One decode step of one layer of Llama-3-8B (32 query, 8 key/value heads of 128) over a `KIVILatentLayer` in QLUTATTN's
formats, the same packed cache for all, on the CPU:

    lookup      tables of the sums of a few codes' products (`modules/kernels/cpu/lookup.py`)
    dot         the same kernel with int8 dot products of the codes, two digits of the query and of the weights
    dequantize  everything dequantized by the C++ kernel of the cpu back end, then PyTorch's matrix products

Each round times all of them in turn, each with the cache out of the processor's caches as after the other layers of a
model, and a ratio is of times of one round. First comes a correctness gate: the error of
each against float64 arithmetic on the stored codes must be at most twice that of attention in plain bfloat16; otherwise
nothing is reported.

    python scripts/benchmark_lookup.py --output build/benchmark_lookup.json
"""

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from tqdm import tqdm

from configuration_alrd_llama import check_positive
from modules import quant_utils
from modules.files import write_json
from modules.formats.qlutattn import QLUTATTN
from modules.kernels.attention import latent_attention
from modules.kernels.cpu import quantize as quantize_cpu
from modules.kernels.cpu.lookup import FASTER, instructions, lookup_attention
from modules.kernels.packed import LatentQuery, PackedCache, PackedSide
from modules.kivi_cache import CacheScheme, KIVILatentLayer
from scripts.common import environment, parse_config
from scripts.timing import in_turns, percentiles, ratios

#: Bound on the error, in units of that of plain bfloat16.
ERROR_LIMIT = 2

#: Bytes that are read between two calls.
OTHERS = 2**26

CONTENDERS = ("lookup", "dot", "dequantize")


@dataclass
class LookupBenchmarkConfig:
    """Options of the benchmark."""

    lengths: list[int] = field(default_factory=lambda: [4096, 32768], metadata={"help": "Packed tokens."})
    bits: list[int] = field(default_factory=lambda: [1, 2, 4], metadata={"help": "Widths of keys and values."})
    heads: int = field(default=32, metadata={"help": "Query heads."})
    kv_heads: int = field(default=8, metadata={"help": "Key/value heads."})
    head_dim: int = field(default=128, metadata={"help": "Channels of a head."})
    rounds: int = field(default=30, metadata={"help": "Rounds that are timed."})
    seed: int = field(default=0, metadata={"help": "Seed of the states."})
    threads: int = field(default=2, metadata={"help": "CPU threads."})
    quick: bool = field(default=False, metadata={"help": "256 tokens, two heads, to try the script out."})
    output: str | None = field(default=None, metadata={"help": "JSON file to write."})

    def __post_init__(self):
        if self.quick:
            self.lengths, self.heads, self.kv_heads, self.head_dim, self.rounds = [256], 4, 2, 32, 3
        check_positive("lengths", *self.lengths)
        check_positive("heads", self.heads)
        check_positive("kv_heads", self.kv_heads)
        check_positive("head_dim", self.head_dim)
        check_positive("rounds", self.rounds - 1)
        check_positive("threads", self.threads)
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads}: must be a multiple of kv_heads={self.kv_heads}")
        for bits in self.bits:
            if bits not in (1, 2, 4):
                raise ValueError(f"bits={bits!r}: must be 1, 2 or 4")
        for length in self.lengths:
            if length % 128:
                raise ValueError(f"lengths={self.lengths!r}: must be multiples of 128, a block")


def dequantizing(cache: PackedCache, unpack: Callable, dtype: torch.dtype) -> PackedCache:
    """The cache with both sides read by `unpack`, a back end's `unpack_and_dequantize`, into `dtype`."""

    def side(stored: PackedSide) -> PackedSide:
        (part,) = stored.parts

        def read(slots: torch.Tensor) -> torch.Tensor:
            parameters = [None if p is None else p[slots].flatten(0, -3) for p in (part.scale, part.zero_point)]
            if part.groups is None:
                parameters = [None if p is None else p.squeeze(1) for p in parameters]
            packed = part.packed[slots].flatten(0, -3)
            states = unpack(packed, *parameters, part.bits, cache.block_length, dtype, part.groups)
            return states.reshape(*slots.shape, *states.shape[1:])

        return PackedSide(read, stored.parts)

    return replace(cache, keys=side(cache.keys), values=side(cache.values))


def unpack_exactly(packed, scale, zero_point, n_bits, length, dtype, widths=None) -> torch.Tensor:
    """As `unpack_and_dequantize`, in float64, which rounds nothing."""
    _, spacing, offset = quant_utils.grid(n_bits)
    scale, zero_point = (None if p is None else p.double() for p in (scale, zero_point))
    step, zero = scale * spacing, scale * -offset if zero_point is None else zero_point
    if widths is None:
        step, zero = step[:, None], zero[:, None]
    else:
        step, zero = (quant_utils.expand_groups(p, widths) for p in (step, zero))
    return quant_utils.unpack_codes(packed, n_bits, length) * step + zero


def multiply(query, positions, cache: PackedCache, value_widths, scaling: float, **_) -> torch.Tensor:
    """Attention to all tokens of a cache, all blocks dequantized at once, as PyTorch does it in the query's type.

    Products of the query heads that share a head are one product; weights are rounded to the type of the query. Heads
    are copied apart first, which costs less than a product of interleaved ones.
    """
    tiles = list(cache.tiles(cache.table.shape[2] * cache.block_length))
    heads = len(value_widths)
    shared = query.unflatten(1, (heads, -1)).flatten(2, 3)
    keys, values = (
        [getattr(t, side).flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2).contiguous() for t in tiles]
        for side in ("keys", "values")
    )
    scores = torch.cat([shared @ k.transpose(2, 3) for k in keys], dim=-1) * scaling
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    result = sum(w @ v for w, v in zip(weights.split([k.shape[2] for k in keys], dim=-1), values))
    return result.reshape(*query.shape[:3], -1)


def calls(query: torch.Tensor, cache: PackedCache, how: dict) -> dict[str, Callable[[], torch.Tensor]]:
    """The contenders by name, as calls."""
    fast = dequantizing(cache, quantize_cpu.unpack_and_dequantize, query.dtype)
    return {
        "lookup": lambda: lookup_attention(query, cache=cache, **how, method="lookup"),
        "dot": lambda: lookup_attention(query, cache=cache, **how, method="dot"),
        "dequantize": lambda: multiply(query, cache=fast, **how),
    }


def error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Root of the mean squared difference."""
    return (result - exact).square().mean().sqrt().item()


def check(contenders: dict[str, Callable], query: torch.Tensor, cache: PackedCache, how: dict) -> dict[str, float]:
    """The correctness gate; returns the errors in units of that of plain bfloat16.

    Raises:
        RuntimeError: One of them is above the limit.
    """
    unrounded = dequantizing(cache, unpack_exactly, torch.float64)
    exact = latent_attention(LatentQuery(query.double(), **how), unrounded)[0]
    plain = error(
        multiply(query, cache=dequantizing(cache, quant_utils.unpack_and_dequantize, query.dtype), **how), exact
    )
    errors = {name: error(call(), exact) / plain for name, call in contenders.items()}
    for name, value in errors.items():
        if not value <= ERROR_LIMIT:
            raise RuntimeError(
                f"correctness gate: {name}: {value:.2f} times plain bfloat16's error, above {ERROR_LIMIT}; no figures"
            )
    return errors


def measure(options: LookupBenchmarkConfig, bits: int, length: int) -> dict[str, Any]:
    """All contenders on one cache."""
    heads, size = options.kv_heads, options.head_dim
    layer = KIVILatentLayer(CacheScheme.of(QLUTATTN[f"K{bits}"], QLUTATTN[f"V{bits}"]), ((size,) * heads,) * 2)
    scheme = layer.scheme
    held = length + scheme.sink_length + scheme.residual_length
    for piece in torch.arange(held).split(4096):
        layer.append(*torch.randn(2, 1, len(piece), heads * size).bfloat16())
    query, cache = torch.randn(1, options.heads, 1, size).bfloat16(), layer.packed()
    how = {
        "positions": torch.tensor([[held]]), "expand_keys": None, "value_widths": (size,) * heads, "rope": None,
        "scaling": size**-0.5,
    }  # fmt: skip
    contenders = calls(query, cache, how)
    errors = check(contenders, query, cache, how)

    others = torch.ones(OTHERS // 4)
    seconds = in_turns(contenders, options.rounds, before=lambda name: others.sum())
    return {
        "bits": bits,
        "length": length,
        "error_over_bfloat16": errors,
        "ms": {name: percentiles([1e3 * s for s in seconds[name]]) for name in CONTENDERS},
        "over_lookup": {name: percentiles(ratios(seconds[name], seconds["lookup"])) for name in CONTENDERS[1:]},
        "packed_bytes": layer.nbytes_used,
        "dense_bytes": 2 * 2 * heads * size * held,
    }


def lookup_table(record: dict[str, Any]) -> str:
    """Markdown table of a record."""
    lines = [
        "| tokens | bits | look-up | dot products | dequantize, multiply | dot ÷ look-up | dequantize ÷ look-up "
        "| default |",
        "|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for r in record["results"]:
        cells = [f"{r['length']:,}", str(r["bits"]), *(f"{r['ms'][name]['p50']:.3g} ms" for name in CONTENDERS)]
        for name in CONTENDERS[1:]:
            ratio = r["over_lookup"][name]
            cells.append(f"{ratio['p50']:.2f} ({ratio['p20']:.2f} to {ratio['p80']:.2f})")
        cells.append({"lookup": "look-up", "dot": "dot products"}[FASTER[r["bits"]]])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@torch.no_grad()
def main(options: LookupBenchmarkConfig) -> dict[str, Any]:
    """Check, measure and report; returns the record."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    sizes = list(itertools.product(options.lengths, options.bits))
    results = [measure(options, bits, length) for length, bits in tqdm(sizes, unit="case")]
    record = {
        "config": asdict(options),
        "instructions": instructions(),
        "gate": {"passed": True, "limit": ERROR_LIMIT},
        "results": results,
        "environment": environment(),
    }
    print(f"{lookup_table(record)}\n\nErrors in units of plain bfloat16's:")
    for r in results:
        errors = ", ".join(f"{name} {value:.2f}" for name, value in r["error_over_bfloat16"].items())
        print(f"  {r['length']:,} tokens, {r['bits']} bits: {errors}")
    if options.output:
        write_json(options.output, record)
    return record


if __name__ == "__main__":
    main(parse_config(LookupBenchmarkConfig, __doc__))
