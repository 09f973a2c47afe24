"""Parts that the Triton kernels share: bits of bfloat16, powers, sizes of tiles.

bfloat16 goes in and out as the int16 of its bits: the conversions of Triton's interpreter truncate.
"""

import torch
import triton
import triton.language as tl

from modules import quant_utils

#: `quant_utils.low_bits` in kernels, of `bits_of` a width.
low_bits = triton.constexpr_function(quant_utils.low_bits)

#: Whether the kernels run in Triton's interpreter, on the CPU: TRITON_INTERPRET=1 when this module was imported.
INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def widen(value):
    """Float32 of floats, or of the int16 bits of bfloat16."""
    if value.dtype == tl.int16:
        return (value.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return value.to(tl.float32)


@triton.jit
def power_of_three(k):
    """3^k for k = 0 … 4, of a tensor of exponents."""
    return tl.where(k == 0, 1, tl.where(k == 1, 3, tl.where(k == 2, 9, tl.where(k == 3, 27, 81))))


def power_of_two(n: int, least: int, most: int) -> int:
    """The first power of two from `n` on, within the bounds."""
    return min(max(1 << (n - 1).bit_length(), least), most)


def bits_of(n_bits: float) -> int:
    """A width as a constant of kernels: ternary is 0."""
    if n_bits == 1.58:
        return 0
    return int(n_bits)


def as_bits(x: torch.Tensor) -> torch.Tensor:
    """Floats as the kernels take them: bfloat16 as int16."""
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16)
    return x


def stand_in(x: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """`x`, or where there is none another tensor, for an argument that a kernel then does not read."""
    if x is None:
        return other
    return x
