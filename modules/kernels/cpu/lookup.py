"""Attention over 1, 2 and 4-bit codes by table look-up, on the CPU.

For the formats whose scales are constant along the sums: keys quantized per token and cached as the queries are to meet
them (after RoPE), values per channel (`modules/formats/qlutattn.py`). Then `q·k = step_t Σ_c q_c code_tc + zero_t Σ_c
q_c`, and `Σ_t p_t v_tc = step_c Σ_t p_t code_tc + zero_c Σ_t p_t`: sums of codes times the query, or the weights, in
integers. `lookup.cpp` computes them by two methods, "lookup" and "dot" (int8 dot products), which round the query and
the weights of a block: "dot" to 15 bits, "lookup" at widths 1, 2 and 4 to 13, 12 and 11 with AVX-512, to one bit less
with AVX2. The error of "lookup" is up to six tenths of that of plain bfloat16, that of "dot" a fiftieth and below that
of plain float16."""

import torch

from configuration_alrd_llama import check_choice
from modules.kernels.cpu import library as cpp_library
from modules.kernels.packed import LatentQuery, PackedCache, PackedPart, PackedSide, Rope
from modules.svd_linear import ALinear

METHODS = ("lookup", "dot")

#: The faster method by bits, with AVX-512 and with AVX2 (`scripts/benchmark_lookup.py`).
FASTER = {
    "avx512": {1: "lookup", 2: "lookup", 4: "dot"},
    "avx2": {1: "lookup", 2: "lookup", 4: "dot"},
}

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def instructions() -> str:
    """What the kernel was compiled for: "avx512" (VBMI and VNNI) or "avx2"."""
    return {1: "avx2", 2: "avx512"}[cpp_library.call("lookup_instructions")]


def _why_not(side: str, stored: PackedSide, block_length: int, heads: int) -> str | None:
    """What keeps the kernel from reading a side; `None`: nothing."""
    part = stored.parts[0] if stored.parts is not None and len(stored.parts) == 1 else None
    if part is None or stored.channels is not None or part.bits not in FASTER["avx2"]:
        return "must be stored at one width of 1, 2 or 4 bits"
    if part.scale.shape[0] != part.packed.shape[0]:
        return "must have scales of its own in every block, not calibrated ones"
    if side == "keys":
        if part.groups is None:
            return "must be quantized per token"
        size, edge = sum(part.widths) // heads, 0
        for width in part.groups:
            if edge // size != (edge + width - 1) // size:
                return f"must have groups of channels within heads of {size} channels"
            edge += width
    elif part.groups is not None or part.run != block_length:
        return f"must be quantized per channel, a scale for each {block_length} tokens"
    return None


def why_not(query: LatentQuery, cache: PackedCache) -> str | None:
    """What keeps `latent_attention` from attending to a cache, as text; `None`: nothing."""
    size, value_widths = query.states.shape[3], query.value_widths
    if query.expand_keys is not None or query.rope is not None:
        return "expand_keys, rope: must be None: the keys must be cached as the queries meet them"
    if len(set(value_widths)) > 1:
        return f"value_widths={value_widths!r}: must be equal"
    channels = cache.key_channels
    if channels != size * len(value_widths):
        return f"value_widths={value_widths!r}: must be one for each head of {channels} key channels of {size}"
    if cache.keys is not None:
        for side, stored in (("keys", cache.keys), ("values", cache.values)):
            reason = _why_not(side, stored, cache.block_length, len(value_widths))
            if reason is not None:
                return f"{side}: {reason}"
    return None


def lookup_attention(
    query: torch.Tensor,
    positions: torch.Tensor,
    cache: PackedCache,
    expand_keys: ALinear | None,
    value_widths: tuple[int, ...],
    rope: Rope | None,
    scaling: float,
    method: str | None = None,
) -> torch.Tensor:
    """`latent_attention` of this module, with the fields of a `LatentQuery` one by one.

    Args:
        query: `[B, H_q, L, d]` after RoPE, on the CPU, float32, bfloat16 or float16.
        positions, expand_keys, value_widths, rope, scaling: As in `LatentQuery`.
        cache, method: As for `latent_attention`.

    Returns:
        `[B, H_q, L, max(value_widths)]` float32.

    Raises:
        ValueError, RuntimeError: As by `latent_attention`.
    """
    query = LatentQuery(query, positions, expand_keys, value_widths, rope, scaling)
    return latent_attention(query, cache, method)


def latent_attention(query: LatentQuery, cache: PackedCache, method: str | None = None) -> torch.Tensor:
    """As `modules.kernels.attention.latent_attention`, the sums only, for `expand_keys=None` and `rope=None`.

    Args:
        query: The queries on the CPU, float32, bfloat16 or float16.
        cache: The cache and the new tokens.
        method: "lookup" or "dot"; `None`: for bfloat16 queries the faster one at the width of each side (`FASTER`), for
            others "dot".

    Returns:
        `[B, H_q, L, max(value_widths)]` float32.

    Raises:
        ValueError: The cache, or another argument, is not one that the kernel reads (`why_not`).
        RuntimeError: The kernel cannot be built (`modules/kernels/cpu/library.py`).
    """
    check_choice("method", method, (*METHODS, None))
    dtype, device = query.states.dtype, query.states.device
    if dtype not in _TYPES or device.type != "cpu":
        raise ValueError(f"query: must be float32, bfloat16 or float16 on the CPU, not {dtype} on {device}")
    reason = why_not(query, cache)
    if reason is not None:
        raise ValueError(reason)

    value_widths, (batch, heads, length, size) = query.value_widths, query.states.shape
    out = torch.empty((batch, heads, length, value_widths[0]), dtype=torch.float32, device="cpu")
    states, positions = query.states.float().contiguous(), query.positions.contiguous()
    runs, kept = [], []
    for tile in (*cache.before, *cache.after):
        for run in range(tile.keys.shape[1]):
            keys, values = (
                x[:, run] if x.stride(-1) == 1 else x[:, run].contiguous() for x in (tile.keys, tile.values)
            )
            start, count = (x[:, run].contiguous() for x in (tile.start, tile.count))
            kept += [keys, values, start, count]
            strides = (*keys.stride()[:2], *values.stride()[:2])
            pointers = [x.data_ptr() for x in kept[-4:]]
            runs.append([*pointers[:2], _TYPES[keys.dtype], keys.shape[1], *strides, *pointers[2:]])

    if cache.keys is None:
        table, packed = torch.zeros((3, batch, 0), dtype=torch.int32, device="cpu"), [_side(None)] * 2
        block, widths = 0, []
    else:
        table, block = cache.table.contiguous(), cache.block_length
        faster = FASTER[instructions()] if dtype == torch.bfloat16 else dict.fromkeys((1, 2, 4), "dot")
        packed = [_side(s.parts[0], method or faster[s.parts[0].bits]) for s in (cache.keys, cache.values)]
        widths = cache.keys.parts[0].groups
    shape = (batch, heads, length, len(value_widths), size, value_widths[0], float(query.scaling))
    groups, exact = (torch.tensor(numbers, dtype=torch.int64, device="cpu") for numbers in (widths, runs))
    keys, values = packed
    cpp_library.call(
        "lookup_attention", out, states, positions, *shape, table, table.shape[2], block, *keys, groups, len(widths),
        *values, exact, len(runs), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _side(part: PackedPart | None, method: str | None = None) -> tuple:
    """The kernel's arguments for a side; no part: it has no blocks."""
    if part is None:
        return 1, False, None, None, None, 0
    return part.bits, method == "lookup", part.packed, part.scale, part.zero_point, _TYPES[part.scale.dtype]


__all__ = ["FASTER", "METHODS", "instructions", "lookup_attention", "why_not"]
