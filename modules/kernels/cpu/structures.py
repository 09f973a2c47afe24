"""Arguments of the C++ functions: structures, codes of types and widths, and the storage that attention reads."""

import ctypes
import itertools

import torch

from modules.kernels.packed import PackedCache, PackedPart, Tile
from modules.quant_utils import grid

#: Types that the kernels read and write, and their codes (`Type` in numbers.h).
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

i32, i64, f32, pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


def structure(name: str, **fields) -> type[ctypes.Structure]:
    """A C structure with the types of its fields in order."""
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


Part = structure(
    "Part",
    bits=i32,
    run=i32,
    words=i32,
    packed=pointer,
    slot_stride=i64,
    token_stride=i64,
    scale=pointer,
    zero_point=pointer,
    scale_slot_stride=i64,
    scale_row_stride=i64,
    scale_type=i32,
    spacing=i32,
    offset=i32,
    levels=i32,
)
Exact = structure(
    "Exact",
    keys=pointer,
    values=pointer,
    key_row=i64,
    key_token=i64,
    value_row=i64,
    value_token=i64,
    start=pointer,
    count=pointer,
)


def width_code(n_bits: float) -> int:
    """`bits` as the kernels have it: a whole width itself, ternary codes `TERNARY` of numbers.h."""
    return 158 if n_bits == 1.58 else int(n_bits)


def ints(values) -> ctypes.Array:
    """An array of int32."""
    return (i32 * len(values))(*values)


def starts(widths) -> list[int]:
    """Where groups of these widths, side by side, start; then where the last one ends."""
    return [0, *itertools.accumulate(widths)]


def address(x: torch.Tensor | None) -> int | None:
    """Address of the first element; `None`: a null pointer."""
    return None if x is None else x.data_ptr()


def is_shared(part: PackedPart) -> bool:
    """Whether all blocks have the same scales per channel."""
    return part.groups is None and tuple(part.scale.shape[:2]) == (1, 1)


def part_structure(part: PackedPart, block_length: int) -> ctypes.Structure:
    """The storage of channels that are packed alike, whose tensors must outlive the structure."""
    made = Part(
        bits=width_code(part.bits),
        run=part.run or block_length,
        words=part.packed.shape[1],
        packed=part.packed.data_ptr(),
        slot_stride=part.packed.stride(0),
        token_stride=part.packed.stride(1),
    )
    if part.bits != 16:
        made.levels, made.spacing, made.offset = grid(part.bits)
        made.scale, made.scale_type = part.scale.data_ptr(), TYPES[part.scale.dtype]
        made.zero_point = address(part.zero_point)
        # A stride of 0 leads every block to the same scales.
        if not is_shared(part):
            made.scale_slot_stride, made.scale_row_stride = part.scale.stride(0), part.scale.stride(1)
    return made


def dense(x: torch.Tensor) -> torch.Tensor:
    """`x`, with channels side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def exact_structures(tiles: tuple[Tile, ...]) -> tuple[ctypes.Array, list[torch.Tensor]]:
    """Tokens in full precision, tiles of one run per row, and the tensors that must outlive the structures."""
    structures = (Exact * max(1, len(tiles)))()
    kept = []
    for made, tile in zip(structures, tiles):
        keys, values = dense(tile.keys), dense(tile.values)
        kept += [keys, values]
        made.keys, made.values = keys.data_ptr(), values.data_ptr()
        made.key_row, made.key_token = keys.stride(0), keys.stride(2)
        made.value_row, made.value_token = values.stride(0), values.stride(2)
        made.start, made.count = tile.start.data_ptr(), tile.count.data_ptr()
    return structures, kept


def key_channels(cache: PackedCache) -> int:
    """Channels of a cached key, of all heads."""
    for tile in (*cache.before, *cache.after):
        return tile.keys.shape[-1]
    return sum([sum(part.widths) for part in cache.keys.parts or ()])
