"""The C++ attention of `attention.cpp`: its arguments from tensors."""

import ctypes
import itertools
from dataclasses import dataclass
from functools import lru_cache
from weakref import WeakKeyDictionary

import torch

from modules.kernels.attention import Attended
from modules.kernels.cpu import structures
from modules.kernels.cpu.library import library
from modules.kernels.cpu.structures import TYPES, address, ints, starts, structure
from modules.kernels.packed import LatentQuery, PackedCache, PackedSide, Tile
from modules.svd_linear import ALinear

#: By the type of the queries: bound of the relative error of a frequency's share in a score where scores are
#: interpolated (0: they are not), and bytes of a rounded expansion row (0: nothing is rounded).
_PRECISION = {torch.float32: (0.0, 0), torch.float16: (1e-4, 2), torch.bfloat16: (3e-3, 1)}

#: A window that no text fills.
_NO_WINDOW = 1 << 62

# arguments.h says what the fields mean.
_Segment = structure("int32 part channel count column position")
_Side = structure("""
    pointer parts segments first_segment integers columns token_scale
    int64 token_scale_stride
    int32 groups width run by_block
""")
_Arguments = structure(
    """
    pointer query positions frequency order weight bias key_channel table exact plain
    pointer key_start key_count value_start value_count value_channel value_weight value_bias output log_sum
    int64 window
    Side keys values
    int32 batch query_heads heads length half blocks block_length exact_width output_width n_exact
    int32 n_plain head_width
    int32 hidden
    int32 state_type weight_type weight_stride value_type value_stride planes threads
    float scaling tolerance
    """,
    Side=_Side,
)


@dataclass(frozen=True, eq=False)
class _Columns:
    """One side as the kernel takes it.

    Attributes:
        side: The structure; its pointers stay valid as long as `kept` lives.
        channels: `[groups, width]` the channel of each column in its head group, -1: none.
    """

    side: ctypes.Structure
    channels: ctypes.Array
    kept: tuple


def _segments_of(side: PackedSide, group: int, as_codes: frozenset) -> tuple[list, list]:
    """Segments of a head group as (part, first channel in it, channels, scale group per token or -1).

    Returns:
        The segments of widths in `as_codes`, and the others.
    """
    codes, numbers = [], []
    for p, part in enumerate(side.parts):
        found = codes if (8 if part.trellis else part.bits) in as_codes else numbers
        start = sum(part.widths[:group])
        stop = start + part.widths[group]
        if part.groups is None and start < stop:
            found.append((p, start, stop - start, -1))
        # Of each scale group per token, what lies in the head group.
        for column, (low, high) in enumerate(itertools.pairwise(starts(part.groups or ()))):
            low, high = max(low, start), min(high, stop)
            if low < high:
                found.append((p, low, high - low, column))
    return codes, numbers


def _make_columns(side: PackedSide, block_length: int, as_codes: frozenset, align_codes: int, align: int) -> _Columns:
    """Order the channels of a side into the columns of their head groups: codes first, then numbers.

    Args:
        side: The side.
        block_length: Tokens of a block.
        as_codes: Widths whose codes are multiplied as such.
        align_codes, align: Columns at multiples of which a segment of codes, or of numbers, starts.
    """
    part_starts = starts([sum(part.widths) for part in side.parts])
    stored = range(part_starts[-1])
    if side.channels is not None:
        stored = side.channels.tolist()
    segments, first_segment, integers, columns, channels = [], [0], [], [], []
    group_start = 0
    for group in range(len(side.parts[0].widths)):
        codes, numbers = _segments_of(side, group, as_codes)
        channel_of, next_start = [], group_start
        for i, (p, first, count, column) in enumerate((*codes, *numbers)):
            if i >= len(codes):
                channel_of += [-1] * (-len(channel_of) % align)
            segments.append(_Segment(p, first, count, column, len(channel_of)))
            place = part_starts[p] + first
            channel_of += [channel - group_start for channel in stored[place : place + count]]
            next_start += count
            # Codes fill whole columns of their own, so that no product mixes two scales.
            if i < len(codes):
                channel_of += [-1] * (-len(channel_of) % align_codes)
        group_start = next_start
        first_segment.append(len(segments))
        integers.append(len(codes))
        columns.append(len(channel_of))
        channels.append(channel_of)
    width = max(columns)
    flat = []
    for channel_of in channels:
        flat += channel_of + [-1] * (width - len(channel_of))
    # The kernel rounds anew for each run of tokens whose scales per channel are their own.
    runs = []
    for part in side.parts:
        if part.bits != 16 and part.groups is None and not structures.is_shared(part):
            runs.append(part.run)
    parts = map(structures.part_structure, side.parts, itertools.repeat(block_length))
    kept = (
        (structures.Part * len(side.parts))(*parts),
        (_Segment * len(segments))(*segments),
        *map(ints, (first_segment, integers, columns)),
    )
    # Pointers to the storage in the order of the first fields.
    made = _Side(
        *map(ctypes.addressof, kept),
        token_scale=address(side.token_scale),
        groups=len(columns),
        width=width,
        run=min(runs, default=block_length),
        by_block=bool(runs),
    )
    if side.token_scale is not None:
        made.token_scale_stride = side.token_scale.stride(0)
    return _Columns(made, ints(flat), (*kept, side.parts, side.token_scale))


_made: WeakKeyDictionary = WeakKeyDictionary()


def _columns(side: PackedSide, *arguments) -> _Columns:
    """`_make_columns`, once for each side of a pool."""
    made = _made.setdefault(side, {})
    if arguments not in made:
        made[arguments] = _make_columns(side, *arguments)
    return made[arguments]


@lru_cache(maxsize=64)
def _pairs(frequencies: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The frequencies in falling order, and which they are, int32."""
    frequency = torch.tensor(frequencies, dtype=torch.float64, device="cpu")
    frequency, order = frequency.sort(descending=True, stable=True)
    return frequency, order.to(torch.int32)


@lru_cache(maxsize=64)
def _head_groups(widths: tuple[int, ...]) -> ctypes.Array:
    """First channel of each head group, then the widths."""
    return ints([*starts(widths)[:-1], *widths])


@lru_cache(maxsize=1)
def _as_codes() -> frozenset:
    """Widths whose codes the kernel multiplies as such; AVX2 sums up products of 8-bit codes in too few bits."""
    widths = {1, 1.58, 2, 3, 4, 5, 6}
    if library().alrd_takes_bytes():
        widths.add(8)
    return frozenset(widths)


def latent_attention(
    query: LatentQuery, cache: PackedCache, expand_values: ALinear | None = None, plain: tuple[Tile, ...] = ()
) -> Attended:
    """`modules.kernels.attention.latent_attention`, all in float32, without weights.

    Args:
        query, cache: As there.
        expand_values: Expands the sums to the outputs of the heads `[B, H_q, L, d]`.
        plain: With `expand_values`, tokens beside the latents, as for `Backend.attend_block`.
    """
    expand_keys, value_widths, rope = query.expand_keys, query.value_widths, query.rope
    batch, query_heads, length, size = query.states.shape
    tolerance, planes = _PRECISION[query.states.dtype]
    # Without RoPE every pair stands still.
    frequencies, scaling = (0.0,) * (size // 2), query.scaling
    if rope is not None:
        frequencies, scaling = rope.frequencies, scaling * rope.attention_scaling**2
    frequency, order = _pairs(frequencies)
    states, positions = query.states.detach().float().contiguous(), query.positions.to(torch.int64).contiguous()
    output_width = head_width = max(value_widths)
    if expand_values is not None:
        head_width = expand_values.weight.shape[0] // expand_values.num_heads
    output = torch.empty((batch, query_heads, length, head_width), dtype=torch.float32, device="cpu")
    log_sum = torch.empty(output.shape[:3], dtype=torch.float32, device="cpu")
    heads, key_widths = query.key_layout(cache)
    # Everything that the arguments point to has a name here, and so lives until the kernel is done.
    exact = (*cache.before, *cache.after)
    exact_tiles, _kept = structures.exact_structures(exact)
    plain_tiles, _kept_plain = structures.exact_structures(plain)
    key_groups, value_groups = _head_groups(key_widths), _head_groups(value_widths)
    key_start, value_start = ctypes.addressof(key_groups), ctypes.addressof(value_groups)
    arguments = _Arguments(
        query=address(states), positions=address(positions), frequency=address(frequency), order=address(order),
        exact=ctypes.addressof(exact_tiles), plain=ctypes.addressof(plain_tiles),
        key_start=key_start, key_count=key_start + 4 * len(key_widths),
        value_start=value_start, value_count=value_start + 4 * len(value_widths), output=address(output),
        log_sum=address(log_sum), window=query.sliding_window or _NO_WINDOW, batch=batch, query_heads=query_heads,
        heads=heads, length=length, half=len(order),
        exact_width=max(key_widths), output_width=output_width, n_exact=len(exact), n_plain=len(plain),
        head_width=head_width, planes=max(1, planes),
        threads=torch.get_num_threads(), scaling=scaling, tolerance=tolerance,
    )  # fmt: skip
    if expand_keys is not None:
        weight, bias = structures.dense(expand_keys.weight), expand_keys.bias
        arguments.weight, arguments.bias = weight.data_ptr(), address(bias)
        arguments.weight_type, arguments.weight_stride = TYPES[weight.dtype], weight.stride(0)
    if expand_values is not None:
        value_weight, value_bias = structures.dense(expand_values.weight), expand_values.bias
        arguments.value_weight, arguments.value_bias = value_weight.data_ptr(), address(value_bias)
        arguments.value_type, arguments.value_stride = TYPES[value_weight.dtype], value_weight.stride(0)
    if exact or plain:
        arguments.state_type = TYPES[(*exact, *plain)[0].keys.dtype]
    arguments.keys.groups, arguments.values.groups = len(key_widths), len(value_widths)
    if cache.keys is not None:
        as_codes = frozenset()
        if planes:
            as_codes = _as_codes()
        # Four channels of a key make one product; 16 channels of values are summed up side by side.
        keys = _columns(cache.keys, cache.block_length, as_codes, 4, 1)
        values = _columns(cache.values, cache.block_length, as_codes, 16, 16)
        table = cache.table.contiguous()
        arguments.keys, arguments.values, arguments.table = keys.side, values.side, table.data_ptr()
        arguments.key_channel = ctypes.addressof(keys.channels)
        arguments.value_channel = ctypes.addressof(values.channels)
        arguments.blocks, arguments.block_length = table.shape[2], cache.block_length
        arguments.hidden = cache.hidden
        for part in cache.keys.parts + cache.values.parts:
            if part.bits == 16:
                arguments.state_type = TYPES[part.packed.dtype]
    library().alrd_attention(ctypes.byref(arguments))
    return Attended(output, log_sum)
