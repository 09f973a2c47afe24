"""Attention over 1, 2 and 4-bit codes by table look-up, on the CPU.

For the formats whose scales are constant along the sums: keys quantized per token and cached as the queries are to meet
them (after RoPE), values per channel (`modules/formats/qlutattn.py`). Then `q·k = step_t Σ_c q_c code_tc + zero_t Σ_c
q_c`, and `Σ_t p_t v_tc = step_c Σ_t p_t code_tc + zero_c Σ_t p_t`: sums of codes times the query, or the weights, in
integers. `lookup.cpp` computes them by two methods, "lookup" and "dot" (int8 dot products), which round the query and
the weights of a block: "dot" to 15 bits, "lookup" at widths 1, 2 and 4 to 13, 12 and 11 with AVX-512, to one bit less
with AVX2. The error of "lookup" is up to six tenths of that of plain bfloat16, that of "dot" a fiftieth and below that
of plain float16.

No model takes this way by itself: a factored model caches its keys before RoPE, and a drop-in cache must hand dense
states to the library's own attention. `lookup_attention` is called by hand, on the packed cache.
"""

import ctypes

import torch

from configuration_alrd_llama import check_choice
from modules.kernels.cpu import structures
from modules.kernels.cpu.library import library
from modules.kernels.cpu.structures import TYPES, Part, address, ints, structure
from modules.kernels.packed import PackedCache, PackedSide, Rope
from modules.svd_linear import ALinear

METHODS = ("lookup", "dot")

#: The faster method by bits, with AVX-512 as with AVX2 (`scripts/benchmark_lookup.py`).
FASTER = {1: "lookup", 2: "lookup", 4: "dot"}

# lookup.cpp says what the fields mean.
_Arguments = structure(
    """
    pointer query positions table group_widths exact output
    Part keys values
    int32 batch query_heads heads length size value_size blocks block_length n_groups n_exact
    int32 state_type key_lookup value_lookup threads
    float scaling
    """,
    Part=Part,
)


def instructions() -> str:
    """Instructions that the kernel was compiled for: "avx512" (VBMI and VNNI) or "avx2"."""
    return {1: "avx2", 2: "avx512"}[library().alrd_lookup_instructions()]


def _check_side(side: str, stored: PackedSide, block_length: int, heads: int) -> None:
    """Refuse a side in a format that the kernel does not read."""
    parts = stored.parts or ()
    if len(parts) != 1 or stored.channels is not None or parts[0].bits not in FASTER:
        raise ValueError(f"{side}: must be stored at one width of 1, 2 or 4 bits")
    # Scales that all blocks share stand in one slot; the kernel looks for those of a block in its own.
    (part,) = parts
    if part.scale.shape[0] != part.packed.shape[0]:
        raise ValueError(f"{side}: must have scales of its own in every block, not calibrated ones")
    if side == "values":
        if part.groups is not None or part.run != block_length:
            raise ValueError(f"{side}: must be quantized per channel, a scale for each {block_length} tokens")
        return
    if part.groups is None:
        raise ValueError(f"{side}: must be quantized per token")
    size, start = sum(part.widths) // heads, 0
    for width in part.groups:
        # The first and the last channel of a scale group must be of one head.
        if start // size != (start + width - 1) // size:
            raise ValueError(f"{side}: must have groups of channels within heads of {size} channels")
        start += width


def _check(query: torch.Tensor, cache: PackedCache, expand_keys, value_widths: tuple[int, ...], rope) -> None:
    """Refuse what the kernel does not read."""
    size = query.shape[3]
    if query.dtype not in TYPES or query.device.type != "cpu":
        raise ValueError(f"query: must be float32, bfloat16 or float16 on the CPU, not {query.dtype} on {query.device}")
    if expand_keys is not None or rope is not None:
        raise ValueError("expand_keys, rope: must be None: the keys must be cached as the queries meet them")
    if len(set(value_widths)) > 1:
        raise ValueError(f"value_widths={value_widths!r}: must be equal")
    channels = cache.key_channels
    if channels != size * len(value_widths):
        raise ValueError(
            f"value_widths={value_widths!r}: must be one for each head of {channels} key channels of {size}"
        )
    if cache.keys is not None:
        _check_side("keys", cache.keys, cache.block_length, len(value_widths))
        _check_side("values", cache.values, cache.block_length, len(value_widths))


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
    """As `latent_attention` without `weights_length`, for `expand_keys=None` and `rope=None`.

    Args:
        query: `[B, H_q, L, d]` on the CPU, float32, bfloat16 or float16.
        positions, cache, expand_keys, value_widths, rope, scaling: As for `latent_attention`.
        method: "lookup" or "dot"; `None`: for bfloat16 queries the faster one at the width of each side (`FASTER`), for
            others "dot".

    Returns:
        `[B, H_q, L, max(value_widths)]` float32.

    Raises:
        ValueError: The cache, or another argument, is not one that the kernel reads.
        RuntimeError: The kernel cannot be built (`modules/kernels/cpu/library.py`).
    """
    check_choice("method", method, (*METHODS, None))
    _check(query, cache, expand_keys, value_widths, rope)
    # The error of "lookup" is below that of plain bfloat16, but not below that of finer types.
    methods = dict.fromkeys(FASTER, method or "dot")
    if method is None and query.dtype == torch.bfloat16:
        methods = FASTER

    batch, query_heads, length, size = query.shape
    output = torch.empty((batch, query_heads, length, value_widths[0]), dtype=torch.float32, device="cpu")
    query, positions = query.float().contiguous(), positions.to(torch.int64).contiguous()
    # Everything that the arguments point to has a name here, and so lives until the kernel is done.
    exact = (*cache.before, *cache.after)
    exact_tiles, _kept = structures.exact_structures(exact)
    arguments = _Arguments(
        query=address(query), positions=address(positions), exact=ctypes.addressof(exact_tiles), output=address(output),
        batch=batch, query_heads=query_heads, heads=len(value_widths), length=length, size=size,
        value_size=value_widths[0], n_exact=len(exact), threads=torch.get_num_threads(), scaling=scaling,
    )  # fmt: skip
    if exact:
        arguments.state_type = TYPES[exact[0].keys.dtype]
    # Sides without blocks have no words, at any width.
    arguments.keys.bits = arguments.values.bits = 1
    if cache.keys is not None:
        (keys,), (values,) = cache.keys.parts, cache.values.parts
        table, group_widths = cache.table.contiguous(), ints(keys.groups)
        arguments.keys = structures.part_structure(keys, cache.block_length)
        arguments.values = structures.part_structure(values, cache.block_length)
        arguments.key_lookup, arguments.value_lookup = methods[keys.bits] == "lookup", methods[values.bits] == "lookup"
        arguments.table, arguments.group_widths = address(table), ctypes.addressof(group_widths)
        arguments.blocks, arguments.block_length = table.shape[2], cache.block_length
        arguments.n_groups = len(group_widths)
    library().alrd_lookup_attention(ctypes.byref(arguments))
    return output
