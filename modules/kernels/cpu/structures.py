"""Arguments of the C++ functions: structures, codes of types and widths, and the storage that attention reads."""

import ctypes
import itertools

import torch

from modules import trellis
from modules.kernels.packed import PackedPart, Tile
from modules.quant_utils import grid

#: Types that the kernels read and write, and their codes (`Type` in numbers.h).
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_SCALARS = {"int32": ctypes.c_int32, "int64": ctypes.c_int64, "float": ctypes.c_float, "pointer": ctypes.c_void_p}


def structure(fields: str, **nested: type[ctypes.Structure]) -> type[ctypes.Structure]:
    """A C structure.

    Args:
        fields: Lines of a type and the names of the fields that have it, in the order of the C++ structure.
        nested: Structures that `fields` has as types.
    """
    types = _SCALARS | nested
    declared = []
    for line in fields.strip().splitlines():
        type_name, *names = line.split()
        for name in names:
            declared.append((name, types[type_name]))
    return type("Structure", (ctypes.Structure,), {"_fields_": declared})


# Of `Part` and `Exact` packed_codes.h says what the fields mean.
Part = structure("""
    int32 bits run words
    pointer packed
    int64 slot_stride token_stride
    pointer scale zero_point
    int64 scale_slot_stride scale_row_stride
    int32 scale_type spacing offset levels
    pointer points
""")
Exact = structure("""
    pointer keys values
    int64 key_row key_token value_row value_token
    pointer start count
""")


def width_code(n_bits: float) -> int:
    """`bits` as the kernels have it: a whole width itself, ternary codes `TERNARY` of numbers.h."""
    if n_bits == 1.58:
        return 158
    return int(n_bits)


def ints(values) -> ctypes.Array:
    """An array of int32."""
    return (ctypes.c_int32 * len(values))(*values)


def starts(widths) -> list[int]:
    """Where groups of these widths, side by side, start; then where the last one ends."""
    return [0, *itertools.accumulate(widths)]


def address(x: torch.Tensor | None) -> int | None:
    """Address of the first element; `None`: a null pointer."""
    if x is None:
        return None
    return x.data_ptr()


def is_shared(part: PackedPart) -> bool:
    """Whether all blocks have the same scales per channel."""
    return part.groups is None and tuple(part.scale.shape[:2]) == (1, 1)


def part_structure(part: PackedPart, block_length: int) -> ctypes.Structure:
    """The storage of channels that are packed alike, whose tensors must outlive the structure."""
    made = Part(width_code(part.bits), part.run or block_length, part.packed.shape[1], part.packed.data_ptr())
    made.slot_stride, made.token_stride = part.packed.stride()[:2]
    if part.bits != 16:
        made.levels, made.spacing, made.offset = grid(part.bits)
        if part.trellis:
            # To what multiplies them points are codes of 8 bits.
            made.levels, made.spacing = trellis.LEVELS, 1
            made.points = trellis.points_of(int(part.bits), part.packed.device).data_ptr()
        made.scale, made.scale_type = part.scale.data_ptr(), TYPES[part.scale.dtype]
        made.zero_point = address(part.zero_point)
        # The strides of calibrated scales stay 0, so that every block has the same.
        if not is_shared(part):
            made.scale_slot_stride, made.scale_row_stride = part.scale.stride()[:2]
    return made


def dense(x: torch.Tensor) -> torch.Tensor:
    """`x`, with channels side by side."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x


def exact_structures(tiles: tuple[Tile, ...]) -> tuple[ctypes.Array, list[torch.Tensor]]:
    """Tokens in full precision, tiles of one run per row, and the tensors that must outlive the structures."""
    # ctypes has no array of length 0 with an address.
    structures = (Exact * max(1, len(tiles)))()
    # A copy of a tile whose channels are apart would be freed on return.
    kept = []
    for made, tile in zip(structures, tiles):
        keys, values = dense(tile.keys), dense(tile.values)
        kept += [keys, values]
        made.keys, made.values = keys.data_ptr(), values.data_ptr()
        made.key_row, made.key_token = keys.stride(0), keys.stride(2)
        made.value_row, made.value_token = values.stride(0), values.stride(2)
        made.start, made.count = tile.start.data_ptr(), tile.count.data_ptr()
    return structures, kept
