"""The C++ attention of `attention.cpp`: its arguments from tensors."""

import ctypes
from dataclasses import dataclass, replace
from functools import lru_cache
from weakref import WeakKeyDictionary

import torch

from modules.kernels.cpu.library import library
from modules.kernels.cpu.lookup import latent_attention as lookup_attention
from modules.kernels.cpu.lookup import why_not
from modules.kernels.packed import LatentQuery, PackedCache, PackedPart, PackedSide
from modules.quant_utils import grid

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

#: By the type of the queries: bound of the relative error of a frequency's share in a score where scores are
#: interpolated (0: they are not), and bytes of a rounded row (0: nothing is rounded).
_PRECISION = {torch.float32: (0.0, 0), torch.float16: (1e-4, 2), torch.bfloat16: (3e-3, 1)}

_i32, _i64, _f32, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


def _structure(name: str, **fields) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


_Part = _structure(
    "Part",
    bits=_i32,
    run=_i32,
    rows=_i32,
    packed=_pointer,
    slot_stride=_i64,
    token_stride=_i64,
    scale=_pointer,
    zero_point=_pointer,
    scale_slot_stride=_i64,
    scale_row_stride=_i64,
    scale_type=_i32,
    spacing=_i32,
    offset=_i32,
    levels=_i32,
)
_Segment = _structure("Segment", part=_i32, channel=_i32, count=_i32, column=_i32, position=_i32)
_Side = _structure(
    "Side",
    parts=_pointer,
    segments=_pointer,
    first_segment=_pointer,
    integers=_pointer,
    columns=_pointer,
    groups=_i32,
    width=_i32,
    run=_i32,
    by_block=_i32,
)
_Exact = _structure(
    "Exact",
    keys=_pointer,
    values=_pointer,
    key_row=_i64,
    key_token=_i64,
    value_row=_i64,
    value_token=_i64,
    start=_pointer,
    count=_pointer,
)
_Arguments = _structure(
    "Arguments",
    query=_pointer,
    positions=_pointer,
    frequency=_pointer,
    order=_pointer,
    weight=_pointer,
    bias=_pointer,
    key_channel=_pointer,
    table=_pointer,
    exact=_pointer,
    key_start=_pointer,
    key_count=_pointer,
    value_start=_pointer,
    value_count=_pointer,
    value_channel=_pointer,
    output=_pointer,
    keys=_Side,
    values=_Side,
    batch=_i32,
    query_heads=_i32,
    heads=_i32,
    length=_i32,
    half=_i32,
    blocks=_i32,
    block_length=_i32,
    exact_width=_i32,
    output_width=_i32,
    n_exact=_i32,
    state_type=_i32,
    weight_type=_i32,
    weight_stride=_i32,
    planes=_i32,
    threads=_i32,
    scaling=_f32,
    tolerance=_f32,
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


def _part(part: PackedPart, run: int) -> ctypes.Structure:
    made = _Part(
        bits=158 if part.bits == 1.58 else int(part.bits),
        run=part.run or run,
        rows=part.packed.shape[1],
        packed=part.packed.data_ptr(),
        slot_stride=part.packed.stride(0),
        token_stride=part.packed.stride(1),
    )
    if part.bits != 16:
        levels = grid(part.bits)
        made.levels, made.spacing, made.offset = levels.levels, levels.spacing, levels.offset
        made.scale, made.scale_type = part.scale.data_ptr(), _TYPES[part.scale.dtype]
        made.zero_point = None if part.zero_point is None else part.zero_point.data_ptr()
        if not _is_shared(part):
            made.scale_slot_stride, made.scale_row_stride = part.scale.stride(0), part.scale.stride(1)
    return made


def _is_shared(part: PackedPart) -> bool:
    """Whether all blocks have the same scales per channel."""
    return part.groups is None and tuple(part.scale.shape[:2]) == (1, 1)


def _make_columns(side: PackedSide, block_length: int, as_codes: frozenset, align_codes: int, align: int) -> _Columns:
    """Where the channels of a side stand among the columns of their head groups: codes first, then numbers.

    Args:
        side: The side.
        block_length: Tokens of a block.
        as_codes: Widths whose codes are multiplied as such.
        align_codes, align: Columns at multiples of which a segment of codes, or of numbers, starts.
    """
    groups = len(side.parts[0].widths)
    widths = [sum(part.widths[g] for part in side.parts) for g in range(groups)]
    stored, offsets = side.channels.tolist() if side.channels is not None else range(sum(widths)), [0]
    for part in side.parts:
        offsets.append(offsets[-1] + sum(part.widths))
    segments, first_segment, integers, columns, channels = [], [0], [], [], []
    for g in range(groups):
        found = []
        for p, part in enumerate(side.parts):
            start = sum(part.widths[:g])
            stop, position = start + part.widths[g], 0
            for column, width in enumerate(part.groups or (sum(part.widths),)):
                low, high = max(position, start), min(position + width, stop)
                if low < high:
                    found.append((part.bits not in as_codes, p, low, high - low, column if part.groups else -1))
                position += width
        found.sort(key=lambda segment: segment[0])
        channel_of, group_start = [], sum(widths[:g])
        for is_number, p, channel, count, column in found:
            channel_of += [-1] * (-len(channel_of) % (align if is_number else align_codes))
            segments.append(_Segment(p, channel, count, column, len(channel_of)))
            channel_of += [stored[offsets[p] + c] - group_start for c in range(channel, channel + count)]
            if not is_number:
                channel_of += [-1] * (-len(channel_of) % align_codes)
        first_segment.append(len(segments))
        integers.append(sum(not is_number for is_number, *_ in found))
        columns.append(len(channel_of))
        channels.append(channel_of)
    width = max(columns)
    runs = {part.run for part in side.parts if part.bits != 16 and part.groups is None and not _is_shared(part)}
    kept = (
        (_Part * len(side.parts))(*(_part(part, block_length) for part in side.parts)),
        (_Segment * len(segments))(*segments),
        *((_i32 * len(x))(*x) for x in (first_segment, integers, columns)),
    )
    made = _Side(
        *map(ctypes.addressof, kept),
        groups=groups,
        width=width,
        run=min(runs, default=block_length),
        by_block=bool(runs),
    )
    flat = [channel for c in channels for channel in c + [-1] * (width - len(c))]
    return _Columns(made, (_i32 * len(flat))(*flat), (*kept, side.parts))


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
def _starts(widths: tuple[int, ...]) -> ctypes.Array:
    starts = [sum(widths[:g]) for g in range(len(widths))]
    return (_i32 * (2 * len(widths)))(*starts, *widths)


def _dense(x: torch.Tensor) -> torch.Tensor:
    """`x`, with channels side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


@lru_cache(maxsize=1)
def _as_codes() -> frozenset:
    """Widths whose codes the kernel multiplies as such; AVX2 sums up products of 8-bit codes in too few bits."""
    return frozenset((1, 1.58, 2, 3, 4, 8) if library().alrd_takes_bytes() else (1, 1.58, 2, 3, 4))


def latent_attention(query: LatentQuery, cache: PackedCache) -> torch.Tensor:
    """`modules.kernels.attention.latent_attention`, the sums only: `[B, H_q, L, max(value_widths)]` float32."""
    expand_keys, value_widths, rope = query.expand_keys, query.value_widths, query.rope
    batch, query_heads, length, size = query.states.shape
    rounded = query.states.dtype != torch.float32  # which look-up would be too coarse for
    if rounded and cache.keys is not None and why_not(query, cache) is None:
        return lookup_attention(query, cache)
    tolerance, planes = _PRECISION[query.states.dtype]
    frequency, order = _pairs((0.0,) * (size // 2) if rope is None else tuple(rope.inv_freq.tolist()))
    scaling = query.scaling if rope is None else query.scaling * rope.attention_scaling**2
    heads, key_widths = query.key_layout(cache)
    states, positions = query.states.detach().float().contiguous(), query.positions.to(torch.int64).contiguous()
    output = torch.empty((batch, query_heads, length, max(value_widths)), dtype=torch.float32, device="cpu")
    exact = tuple(replace(t, keys=_dense(t.keys), values=_dense(t.values)) for t in (*cache.before, *cache.after))
    tiles = (_Exact * max(1, len(exact)))()
    for made, tile in zip(tiles, exact):
        made.keys, made.values = tile.keys.data_ptr(), tile.values.data_ptr()
        made.key_row, made.key_token = tile.keys.stride(0), tile.keys.stride(2)
        made.value_row, made.value_token = tile.values.stride(0), tile.values.stride(2)
        made.start, made.count = tile.start.data_ptr(), tile.count.data_ptr()
    key_starts, value_starts = _starts(key_widths), _starts(value_widths)
    arguments = _Arguments(
        query=states.data_ptr(),
        positions=positions.data_ptr(),
        frequency=frequency.data_ptr(),
        order=order.data_ptr(),
        exact=ctypes.addressof(tiles),
        key_start=ctypes.addressof(key_starts),
        key_count=ctypes.addressof(key_starts) + 4 * len(key_widths),
        value_start=ctypes.addressof(value_starts),
        value_count=ctypes.addressof(value_starts) + 4 * len(value_widths),
        output=output.data_ptr(),
        batch=batch,
        query_heads=query_heads,
        heads=heads,
        length=length,
        half=len(order),
        exact_width=max(key_widths),
        output_width=max(value_widths),
        n_exact=len(exact),
        planes=max(1, planes),
        threads=torch.get_num_threads(),
        scaling=scaling,
        tolerance=tolerance,
    )
    if expand_keys is not None:
        weight, bias = _dense(expand_keys.weight), expand_keys.bias
        arguments.weight, arguments.bias = weight.data_ptr(), None if bias is None else bias.data_ptr()
        arguments.weight_type, arguments.weight_stride = _TYPES[weight.dtype], weight.stride(0)
    if exact:
        arguments.state_type = _TYPES[exact[0].keys.dtype]
    arguments.keys.groups, arguments.values.groups = len(key_widths), len(value_widths)
    if cache.keys is not None:
        as_codes = _as_codes() if planes else frozenset()
        keys = _columns(cache.keys, cache.block_length, as_codes, 4, 1)
        values = _columns(cache.values, cache.block_length, as_codes, 16, 16)
        table = cache.table.contiguous()
        arguments.keys, arguments.values, arguments.table = keys.side, values.side, table.data_ptr()
        arguments.key_channel = ctypes.addressof(keys.channels)
        arguments.value_channel = ctypes.addressof(values.channels)
        arguments.blocks, arguments.block_length = table.shape[2], cache.block_length
        for part in cache.keys.parts + cache.values.parts:
            if part.bits == 16:
                arguments.state_type = _TYPES[part.packed.dtype]
    library().alrd_attention(ctypes.byref(arguments))
    return output


__all__ = ["latent_attention"]
