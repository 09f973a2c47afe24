r"""Quantization as pure functions: ranges, codes, packed words. The reference of the kernels in `modules/kernels`.

A group of elements is stored as codes on a uniform grid of L levels (KIVI, arXiv:2402.02750, eq. 1):

    code = round((x - zero_point) / step),    x̂ = code * step + zero_point,    0 <= code <= L - 1

    bits        L     step          zero_point, if symmetric      x̂, if symmetric
    1           2     2 * scale     -scale                        ±scale                 (VidKV, arXiv:2503.16257)
    1.58        3     scale         -scale                        -scale, 0, +scale      always symmetric
    b = 2 … 8   2^b   scale         -scale * 2^(b-1)              signed b-bit integers times scale

A symmetric zero point is not stored. All arithmetic is float32; scale and zero point are stored in two bytes, and the
codes are computed from the stored values.

Two ways to choose the range:

* `minmax`: the zero point is the group's minimum, rounded down, and the scale its range over L - 1 steps, rounded up.
  Then |x - x̂| is at most 0.501 stored steps, whatever the group's offset and range (x̂ before it is rounded to the type
  of the states).
* `mse`: the range of least measured squared error: the best of 16 shrunk ranges, then three rounds of least squares
  of x on its codes (Lloyd's algorithm on a uniform grid). Kept only if it beats `minmax`, so the sum of squared errors
  of a group is at most that of `minmax`; for 1 symmetric bit and ternary, which have no `minmax`, at most that of
  storing zeros. For 1 symmetric bit the result is scale = mean|x|. Sums are taken over integers (x as a multiple of
  2^-20 of the range), so that every back end gets the same bits in whatever order it adds.

A group of one value has scale 0: its codes are 0 and its zero point comes back.

Packed layout
-------------
Codes are packed along the tokens of a block. The block `[T, C]` (tokens, channels) becomes `[W, C]` int32 words: word
`w` of a channel holds the codes of `32 // b` consecutive tokens, element `i` of the word at bits `i·b … i·b + b - 1`,
bit 0 the least significant. A decode kernel that walks the channels reads consecutive addresses. The last word of a
plane is filled with zeros when the tokens do not fill it; with T a multiple of 32 nothing is lost at any whole width.

Widths 3, 5 and 6 cost exactly 3.0, 5.0 and 6.0 bits: a plane of the codes' low bits, two of 3 and four of 5 and 6, as
for `b = 2` and `b = 4`, is followed by a plane of the one or two above, as for `b = 1` and `b = 2`.

Ternary codes (0, 1, 2) stand five to a byte, 20 to a word: 1.6 bits, 1.75 for the 7 words of 128 tokens. Element
`i = 5j + k` of a word is digit `k`, the most significant first, of byte `j` (byte 0 the least significant of the
word). A byte is `ceil(v * 256 / 243)` of its digits' value `v = c_0·81 + c_1·27 + c_2·9 + c_3·3 + c_4`, so that digit
`k` is read without a division: `((byte * 3^k mod 256) * 3) >> 8`.

Worked example, one channel, `b = 2`, tokens with codes 3, 0, 2, 1:
    3 << 0 | 0 << 2 | 2 << 4 | 1 << 6  =  0b01_10_00_11  =  0x63        one word (of 16 tokens' room)
and `b = 3`, codes 5 (101), 2 (010), 7 (111), 4 (100):
    low plane   1 << 0 | 2 << 2 | 3 << 4 | 0 << 6  =  0x39
    high plane  1 << 0 | 0 << 1 | 1 << 2 | 1 << 3  =  0x0D              the words [0x39, 0x0D]
and ternary, codes 2, 0, 1, 1, 2:
    v = 162 + 0 + 9 + 3 + 2 = 176,  byte 0 = ceil(176 * 256 / 243) = 186 = 0xBA
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch

from configuration_alrd_llama import QuantScheme, check_bits, check_count

#: Tokens of a block when `group_size=0` puts no bound on the scale's reach.
DEFAULT_BLOCK_LENGTH = 128


def require(condition: torch.Tensor, message: str) -> None:
    """Raise `ValueError(message)` unless the boolean scalar `condition` holds.

    On an accelerator the check runs asynchronously on the device (a failure surfaces there at a later call), so that
    no step waits for it. In a compiled graph it is part of the graph, and a failure a `RuntimeError`.
    """
    # Reading the condition costs nothing on the CPU; elsewhere it would wait for the device.
    if condition.device.type == "cpu" and not torch.compiler.is_compiling():
        if not condition:
            raise ValueError(message)
    else:
        torch._assert_async(condition, message)


def parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type in which scales and zero points of states of type `dtype` are stored: two bytes either way."""
    if dtype == torch.bfloat16:
        return torch.bfloat16
    return torch.float16


def _round_directed(x: torch.Tensor, dtype: torch.dtype, up: bool) -> torch.Tensor:
    """Cast float32 `x` to a two-byte `dtype`, rounding towards +inf (`up`) or -inf."""
    y = x.to(dtype)
    wrong = y.float() > x
    if up:
        wrong = y.float() < x
    # One step in the wanted direction: the bit patterns of floats of one sign are ordered like their magnitudes.
    bits = y.view(torch.int16)
    away_from_zero = (bits >= 0) == up
    stepped = torch.where(away_from_zero, bits + 1, bits - 1).view(dtype)
    return torch.where(wrong, stepped, y)


def to_finite(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Float32 `x` in `dtype`, values beyond its range at the end of it."""
    limit = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    return x.clamp(-limit, limit).to(dtype)


def group_widths(length: int, group_size: int) -> tuple[int, ...]:
    """Cut `length` elements into groups of `group_size` (0: one group); the last one may be shorter."""
    size = group_size or max(length, 1)
    widths = (size,) * (length // size)
    if length % size:
        widths += (length % size,)
    return widths


def group_starts(widths: tuple[int, ...]) -> tuple[int, ...]:
    """First element of each of the groups, which lie side by side."""
    return tuple(accumulate(widths, initial=0))[:-1]


def expand_groups(parameter: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
    """Repeat the `[..., n]` values of n groups over their elements: `[..., sum(widths)]`."""
    if len(widths) == 1:
        return parameter.expand(*parameter.shape[:-1], widths[0])
    if len(set(widths)) == 1:
        return parameter.unsqueeze(-1).expand(*parameter.shape, widths[0]).flatten(-2)
    # Groups of different widths; those of one width need no index.
    repeats = torch.tensor(widths, dtype=torch.int64, device=parameter.device)
    return parameter.repeat_interleave(repeats, dim=-1, output_size=sum(widths))


class Grid(NamedTuple):
    """Levels of a width: `L`, the step in units of the scale, and minus the symmetric zero point in the same units."""

    levels: int
    spacing: int
    offset: int


def grid(n_bits: float) -> Grid:
    """The levels of codes of `n_bits`: see the table above."""
    if n_bits == 1:
        return Grid(2, 2, 1)
    if n_bits == 1.58:
        return Grid(3, 1, 1)
    return Grid(2**n_bits, 1, 2 ** (n_bits - 1))


#: Step of least squared error for a Gaussian of unit spread, by width (Max, IRE Trans. Inf. Theory 6, 1960): a
#: calibrated step over it is about the spread of a channel.
GAUSSIAN_STEPS = {1: 1.5958, 2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 8: 0.0308}

#: A token's scale is 2^((byte - 128) / 16): from 2^-8 to 2^7.94 in steps of 4.4%.
TOKEN_SCALE_ONE, TOKEN_SCALES_PER_OCTAVE = 128, 16


def encode_token_scale(scale: torch.Tensor) -> torch.Tensor:
    """Nearest bytes of positive float64 scales; those beyond the range get its ends, NaN any byte."""
    steps = torch.log2(scale) * TOKEN_SCALES_PER_OCTAVE + (TOKEN_SCALE_ONE + 0.5)
    return steps.floor().nan_to_num().clamp(0, 255).to(torch.uint8)


def decode_token_scale(codes: torch.Tensor) -> torch.Tensor:
    """Float32 scales of bytes."""
    return torch.exp2((codes.float() - TOKEN_SCALE_ONE) / TOKEN_SCALES_PER_OCTAVE)


def _by_group(reduce, x: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
    """`reduce(group, dim=-1)` `[...]` of each group along the last dimension: `[..., len(widths)]`."""
    return torch.stack([reduce(group, dim=-1) for group in x.split(widths, dim=-1)], dim=-1)


def _codes(x: torch.Tensor, step: torch.Tensor, zero_point: torch.Tensor, levels: int) -> torch.Tensor:
    """Nearest levels of `x`, halves rounded up, as float32 integers; 0 where the step is 0."""
    # A half is added and the sum rounded down: `round` would take halves to even.
    codes = torch.where(step > 0, (x - zero_point) / step, 0)
    return (codes.clamp_(0, levels - 1) + 0.5).floor_()


#: Shares of a group's range that `mse` tries.
RATIOS = tuple(2 ** (-i / 6) for i in range(16))
#: Rounds of least squares after the best of them, and units of the integer sums.
REFITS, UNIT, ERROR_UNIT, ERROR_LIMIT = 3, 2.0**20, 2.0**30, 2.0**20


def search_candidates(n_bits: float, symmetric: bool) -> list[tuple[float, float]]:
    """Step and zero point of each grid that `mse` tries, in units of a group's range."""
    levels, spacing, offset = grid(n_bits)
    middle, candidates = offset / spacing, []
    for ratio in RATIOS:
        if symmetric:
            step = ratio * (1 / (levels - 1 - middle))
            candidates.append((step, step * -middle))
        else:
            candidates.append((ratio * (1 / (levels - 1)), (1 - ratio) / 2))
    return candidates


def _reconstruction(x: torch.Tensor, step: torch.Tensor, zero_point: torch.Tensor, levels: int) -> torch.Tensor:
    """`x` rounded to the nearest level."""
    return _codes(x, step, zero_point, levels) * step + zero_point


def _squared_error(difference: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
    """Sum of squares by group, int64, of differences in units of the range."""
    squares = difference.square().clamp_(max=ERROR_LIMIT) * ERROR_UNIT
    return _by_group(torch.sum, squares.long(), widths)


def _least_error_range(u: torch.Tensor, n_bits: float, widths: tuple[int, ...], symmetric: bool):
    """Step and zero point, float32 by group, of least squared error of `u`, whose groups lie in [0, 1] or [-1, 1]."""
    levels, spacing, offset = grid(n_bits)
    # The codes of one symmetric bit are signs, whatever the step: one round of least squares gives mean|x|.
    tries, refits = len(RATIOS), REFITS
    if n_bits == 1 and symmetric:
        tries, refits = 1, 1

    # The best of the shrunk ranges …
    shape, best_error = (*u.shape[:-1], len(widths)), None
    for new_step, new_zero in search_candidates(n_bits, symmetric)[:tries]:
        new_step, new_zero = u.new_full(shape, new_step), u.new_full(shape, new_zero)
        levels_of_u = _reconstruction(u, expand_groups(new_step, widths), expand_groups(new_zero, widths), levels)
        error = _squared_error(u - levels_of_u, widths)
        if best_error is None:
            best_error, step, zero = error, new_step, new_zero
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        step, zero = torch.where(better, new_step, step), torch.where(better, new_zero, zero)

    # … then rounds of least squares of u on its codes, in integers.
    fixed = (u * UNIT + 0.5).floor_().long()
    counts = torch.tensor(widths, dtype=torch.int64, device=u.device)
    for _ in range(refits):
        codes = _codes(u, expand_groups(step, widths), expand_groups(zero, widths), levels).long()
        if symmetric:
            # Twice the signed code, so that one bit is an integer too.
            codes = 2 * codes - round(2 * offset / spacing)
            square = _by_group(torch.sum, codes * codes, widths)
            product = 2 * _by_group(torch.sum, codes * fixed, widths)
        else:
            c, cc = _by_group(torch.sum, codes, widths), _by_group(torch.sum, codes * codes, widths)
            x, cx = _by_group(torch.sum, fixed, widths), _by_group(torch.sum, codes * fixed, widths)
            square, product = counts * cc - c * c, counts * cx - c * x
        new_step = product.float() / square.clamp(min=1).float() / UNIT
        if symmetric:
            new_zero = new_step * -(offset / spacing)
        else:
            new_zero = (x.float() / UNIT - new_step * c.float()) / counts.float()
        # A group whose values all have one code keeps its grid.
        better = (square > 0) & (new_step > 0)
        step, zero = torch.where(better, new_step, step), torch.where(better, new_zero, zero)
    return step, zero


def quantize(
    x: torch.Tensor,
    n_bits: float,
    widths: tuple[int, ...],
    symmetric: bool = False,
    range_method: str = "minmax",
    scale_dtype: torch.dtype | None = None,
):
    """Quantize groups along the last dimension.

    Args:
        x: `[..., sum(widths)]`, any floating type.
        n_bits: 1, 1.58, 2, 3, 4, 5, 6 or 8.
        widths: Elements of each group, in order.
        symmetric: Levels around 0; always so for 1.58 bits.
        range_method: "minmax" or "mse"; symmetric codes below two bits have only "mse".
        scale_dtype: Two-byte type of the stored scales; default: `parameter_dtype(x.dtype)`.

    Returns:
        `codes` uint8, shape of `x`; `scale` `[..., len(widths)]` in `scale_dtype`; `zero_point` likewise, or `None` if
        symmetric. A group that contains NaN or Inf, or values or a range beyond `scale_dtype`, has scale NaN:
        `check_scale` makes an error of it.
    """
    dtype, x = scale_dtype or parameter_dtype(x.dtype), x.float()
    levels, spacing, offset = grid(n_bits)
    limit = torch.finfo(dtype).max
    low, high = _by_group(torch.amin, x, widths), _by_group(torch.amax, x, widths)
    fits = (low >= -limit) & (high <= limit)

    # The range of minmax: zero point rounded down and scale rounded up, so that the levels span the group.
    zero_point, has_minmax = None, n_bits >= 2 or not symmetric
    if has_minmax:
        if symmetric:
            span = x.new_full((), levels - 1 - offset)  # a tensor: by a number, CUDA multiplies with the reciprocal
            needed = torch.maximum(-low / offset, high / span)
        else:
            span = x.new_full((), (levels - 1) * spacing)
            zero_point = _round_directed(low, dtype, up=False)
            needed = (high - zero_point.float()) / span
        scale = _round_directed(needed, dtype, up=True)
        fits &= torch.isfinite(scale)

    if range_method == "mse" or not has_minmax:
        # The search goes on in units of the groups' ranges.
        if symmetric:
            base, extent = torch.zeros_like(low), torch.maximum(-low, high)
        else:
            base, extent = low, high - low
        unit = torch.where(fits & (extent > 0), extent, 1)
        units, fitting = expand_groups(unit, widths), expand_groups(fits, widths)
        u = torch.where(fitting, (x - expand_groups(base, widths)) / units, 0)
        step, zero = _least_error_range(u, n_bits, widths, symmetric)
        found_scale, found_zero = (step / spacing * unit).clamp(max=limit).to(dtype), None
        # A group of one value has scale 0.
        found_scale = torch.where(extent > 0, found_scale, 0)
        if not symmetric:
            found_zero = (base + zero * unit).clamp(-limit, limit).to(dtype)
        if has_minmax:
            # The range found is kept where, as stored, it beats that of minmax.
            error = _stored_error(x, scale, zero_point, n_bits, widths, units, fitting)
            better = _stored_error(x, found_scale, found_zero, n_bits, widths, units, fitting) < error
            found_scale = torch.where(better, found_scale, scale)
            if not symmetric:
                found_zero = torch.where(better, found_zero, zero_point)
        scale, zero_point = found_scale, found_zero

    step, zero = _step_and_zero(scale, zero_point, n_bits)
    fits &= torch.isfinite(step * (levels - 1)) & torch.isfinite(zero)
    scale = torch.where(fits, scale, torch.nan)
    # The codes follow from the parameters as they are stored.
    step, zero = _step_and_zero(scale, zero_point, n_bits)
    codes = _codes(x, expand_groups(step, widths), expand_groups(zero, widths), levels)
    return codes.to(torch.uint8), scale, zero_point


def _stored_error(x: torch.Tensor, scale, zero_point, n_bits: float, widths: tuple[int, ...], units, fitting):
    """`_squared_error` of `x` on the grids of stored parameters; groups that do not fit have none."""
    step, zero = _step_and_zero(scale, zero_point, n_bits)
    levels_of_x = _reconstruction(x, expand_groups(step, widths), expand_groups(zero, widths), grid(n_bits).levels)
    return _squared_error(torch.where(fitting, (x - levels_of_x) / units, 0), widths)


def _step_and_zero(scale: torch.Tensor, zero_point: torch.Tensor | None, n_bits: float):
    """Step and zero point in float32 of stored parameters."""
    scale, (_, spacing, offset) = scale.float(), grid(n_bits)
    if zero_point is None:
        return scale * spacing, scale * -offset
    return scale * spacing, zero_point.float()


def check_scale(scale: torch.Tensor) -> None:
    """Raise a `ValueError` if a group could not be quantized (see `quantize`)."""
    require(
        torch.isfinite(scale).all(),
        f"x: values to quantize must be finite, and they and their range must fit {scale.dtype} (the type of the "
        "stored scales); NaN, Inf or larger values were found (a bfloat16 model has bfloat16 scales)",
    )


def dequantize(
    codes, scale, zero_point, widths: tuple[int, ...], dtype: torch.dtype, n_bits: float = 8
) -> torch.Tensor:
    """Inverse of `quantize`: `[..., sum(widths)]` in `dtype`, kept inside its finite range.

    `n_bits` matters to symmetric codes (`zero_point=None`) and to one bit.
    """
    step, zero = _step_and_zero(scale, zero_point, n_bits)
    x = codes * expand_groups(step, widths) + expand_groups(zero, widths)
    return to_finite(x, dtype)


class Plane(NamedTuple):
    """One plane of packed codes: which bits of the code it holds, and how many codes stand in a word."""

    bits: float
    position: int
    per_word: int


def low_bits(n_bits: int) -> int:
    """Bits of a code in its low plane: the greatest power of two, so that no word ends within a code; of 0 none."""
    return 1 << n_bits.bit_length() >> 1


def _planes(n_bits: float) -> tuple[Plane, ...]:
    """The bit planes that a width is stored as."""
    if n_bits == 1.58:
        return (Plane(n_bits, 0, 20),)
    low = low_bits(int(n_bits))
    if low < n_bits:
        return (Plane(low, 0, 32 // low), Plane(n_bits - low, low, 32 // (n_bits - low)))
    return (Plane(n_bits, 0, 32 // n_bits),)


def packed_words(length: int, n_bits: float) -> int:
    """int32 words per channel for a block of `length` tokens."""
    return sum(-(-length // plane.per_word) for plane in _planes(n_bits))


def _pack_ternary(codes: torch.Tensor) -> torch.Tensor:
    """Words `[..., C]` of `[..., 20, C]` ternary codes."""
    powers = torch.tensor([81, 27, 9, 3, 1], dtype=torch.int32, device=codes.device)[:, None]
    # Five digits in base three, and the byte from which they are read without a division; four bytes make a word.
    values = (codes.unflatten(-2, (4, 5)) * powers).sum(-2, dtype=torch.int32)
    shifts = torch.arange(0, 32, 8, dtype=torch.int32, device=codes.device)[:, None]
    return (((values * 256 + 242) // 243) << shifts).sum(-2, dtype=torch.int32)


def _unpack_ternary(words: torch.Tensor) -> torch.Tensor:
    """Ternary codes `[..., 20, C]` of words `[..., C]`."""
    shifts = torch.arange(0, 32, 8, dtype=torch.int32, device=words.device)[:, None, None]
    powers = torch.tensor([1, 3, 9, 27, 81], dtype=torch.int32, device=words.device)[:, None]
    # Times 3^k, the digits before digit k leave the byte at its upper end.
    digits = (words[..., None, None, :] >> shifts & 255) * powers & 255
    return (digits * 3 >> 8).flatten(-3, -2)


def pack_codes(codes: torch.Tensor, n_bits: float) -> torch.Tensor:
    """Pack `[..., T, C]` integer codes into `[..., W, C]` int32 words (layout: module docstring)."""
    planes = []
    for bits, position, per_word in _planes(n_bits):
        plane = codes.to(torch.int32)
        # Zeros fill the last word.
        plane = torch.nn.functional.pad(plane, (0, 0, 0, -plane.shape[-2] % per_word)).unflatten(-2, (-1, per_word))
        if n_bits == 1.58:
            planes.append(_pack_ternary(plane))
        else:
            shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=codes.device)[:, None]
            # The codes of a word have no bit in common, so that their sum is their union.
            planes.append((((plane >> position) & (2**bits - 1)) << shifts).sum(-2, dtype=torch.int32))
    return torch.cat(planes, dim=-2)


def unpack_codes(packed: torch.Tensor, n_bits: float, length: int) -> torch.Tensor:
    """Inverse of `pack_codes`: `[..., W, C]` int32 words to `[..., length, C]` int32 codes."""
    codes, start = 0, 0
    for bits, position, per_word in _planes(n_bits):
        # A plane begins where the one before it ends.
        words = packed[..., start : start + -(-length // per_word), :]
        start += words.shape[-2]
        if n_bits == 1.58:
            plane = _unpack_ternary(words)
        else:
            shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)[:, None]
            plane = (words.unsqueeze(-2) >> shifts) & (2**bits - 1)
        codes = codes | plane.flatten(-3, -2)[..., :length, :] << position
    return codes


def quantize_and_pack(
    x: torch.Tensor,
    n_bits: float,
    widths: tuple[int, ...] | None = None,
    symmetric: bool = False,
    range_method: str = "minmax",
    scale_dtype: torch.dtype | None = None,
    static: tuple[torch.Tensor, torch.Tensor] | None = None,
):
    """Quantize and pack blocks of states.

    Args:
        x: `[N, T, C]`, any floating type.
        n_bits, symmetric, range_method, scale_dtype: As for `quantize`.
        widths: Channels that share a scale of a token, in order; `None`: one scale per channel and block.
        static: Float32 scale and zero point `[C]` of every block, by which values are clipped; `None`: measured.

    Returns:
        `packed` `[N, W, C]` int32; `scale` `[N, C]`, or `[N, T, len(widths)]`, or the given ones; `zero_point`
        likewise, `None` if symmetric.

    Raises:
        ValueError: See `check_scale`; static: `x` is not finite.
    """
    if static is not None:
        require(torch.isfinite(x).all(), "x: values to quantize must be finite; NaN or Inf were found")
        # Values beyond the given range get the outermost codes.
        step, zero = _step_and_zero(*static, n_bits)
        codes, (scale, zero_point) = _codes(x.float(), step, zero, grid(n_bits).levels), static
    elif widths is None:
        # Per channel a group is all tokens: the last dimension of the transposed block.
        whole = (x.shape[1],)
        codes, scale, zero_point = quantize(x.transpose(1, 2), n_bits, whole, symmetric, range_method, scale_dtype)
        codes, scale = codes.transpose(1, 2), scale.squeeze(-1)
        if zero_point is not None:
            zero_point = zero_point.squeeze(-1)
    else:
        codes, scale, zero_point = quantize(x, n_bits, widths, symmetric, range_method, scale_dtype)
    check_scale(scale)
    return pack_codes(codes, n_bits), scale, zero_point


def unpack_and_dequantize(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    n_bits: float,
    length: int,
    dtype: torch.dtype,
    widths: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """States `[N, length, C]` in `dtype` of what `quantize_and_pack` returns (static scales: `[1, C]` or `[N, C]`)."""
    codes = unpack_codes(packed, n_bits, length)
    if widths is not None:
        return dequantize(codes, scale, zero_point, widths, dtype, n_bits)
    if zero_point is not None:
        zero_point = zero_point.unsqueeze(-1)
    return dequantize(codes.transpose(1, 2), scale.unsqueeze(-1), zero_point, (length,), dtype, n_bits).transpose(1, 2)


def _round_trip(x: torch.Tensor, n_bits: float, group_size: int, symmetric: bool | None, range_method: str | None):
    """Quantize along the last dimension and back; returns (states, scale, zero_point)."""
    n_bits, symmetric, range_method = _check_quantizer(n_bits, group_size, symmetric, range_method)
    widths = group_widths(x.shape[-1], group_size)
    # No group has a minimum then.
    if x.numel() == 0:
        scale = zero_point = x.new_empty((*x.shape[:-1], len(widths)), dtype=parameter_dtype(x.dtype))
        if symmetric:
            zero_point = None
        return x, scale, zero_point
    codes, scale, zero_point = quantize(x, n_bits, widths, symmetric, range_method)
    check_scale(scale)
    return dequantize(codes, scale, zero_point, widths, x.dtype, n_bits), scale, zero_point


def _check_quantizer(n_bits, group_size: int, symmetric: bool | None, range_method: str | None):
    """The checked width, and `symmetric` and `range_method` with `None` resolved, as `QuantScheme` does it."""
    check_bits("n_bits", n_bits)
    check_count("group_size", group_size)
    if n_bits == 16:
        raise ValueError("n_bits=16: 16 bits is the untouched state and has no scale and zero point")
    if n_bits == 1.5:
        raise ValueError("n_bits=1.5: mixes two widths by channel, which only the cache stores; use 1, 1.58 or 2")
    scheme = QuantScheme(n_bits, group_size=group_size, symmetric=symmetric, range_method=range_method)
    if n_bits != 1.58:
        n_bits = int(n_bits)
    return n_bits, scheme.symmetric, scheme.range_method


def kivi_quantize_per_channel(
    x: torch.Tensor,
    n_bits: float,
    group_size: int = 128,
    symmetric: bool | None = None,
    range_method: str | None = None,
):
    """Round trip of key latents with one scale per channel and group of tokens (KIVI, section 3.2).

    Args:
        x: `[B, L, r]` states.
        n_bits: 1, 1.58, 2, 3, 4, 5, 6 or 8.
        group_size: Tokens per group; the last group may be shorter. 0: all tokens in one.
        symmetric, range_method: As for `QuantScheme`.

    Returns:
        states `[B, L, r]` in the type of `x`; `scale` and `zero_point` `[B, ceil(L / group_size), r]`, the latter
        `None` if symmetric.

    Raises:
        ValueError: A bad width or group size, or values that are not finite or do not fit the stored type.
    """
    transposed = _round_trip(x.transpose(-1, -2), n_bits, group_size, symmetric, range_method)
    states, scale, zero_point = transposed
    if zero_point is not None:
        zero_point = zero_point.transpose(-1, -2)
    return states.transpose(-1, -2), scale.transpose(-1, -2), zero_point


def kivi_quantize_per_token(
    x: torch.Tensor,
    n_bits: float,
    group_size: int = 128,
    symmetric: bool | None = None,
    range_method: str | None = None,
):
    """Round trip of value latents with one scale per token and group of channels (KIVI, section 3.2).

    Args, errors: as `kivi_quantize_per_channel`, with groups of channels (0: the whole rank).

    Returns:
        states `[B, L, r]` in the type of `x`; `scale` and `zero_point` `[B, L, ceil(r / group_size)]`, the latter
        `None` if symmetric.
    """
    return _round_trip(x, n_bits, group_size, symmetric, range_method)


@dataclass(frozen=True)
class KIVIQuantizer:
    """Round trip of `[B, L, r]` states of any length, as a callable: same shape and type out; 16 bits: untouched."""

    n_bits: float = 2
    group_size: int = 128
    per_channel: bool = True
    symmetric: bool | None = None
    range_method: str | None = None

    def __post_init__(self):
        if self.n_bits != 16:
            _check_quantizer(self.n_bits, self.group_size, self.symmetric, self.range_method)
        check_bits("n_bits", self.n_bits)
        check_count("group_size", self.group_size)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.n_bits == 16:
            return x
        settings = (self.n_bits, self.group_size, self.symmetric, self.range_method)
        if self.per_channel:
            return kivi_quantize_per_channel(x, *settings)[0]
        return kivi_quantize_per_token(x, *settings)[0]


@dataclass(frozen=True)
class KIVIMixedQuantizer:
    """`KIVIQuantizer` on all but the last `residual_length` tokens of `[B, L, r]`, which come back untouched."""

    n_bits: float = 2
    group_size: int = 128
    residual_length: int = 32
    per_channel: bool = True

    def __post_init__(self):
        check_count("residual_length", self.residual_length)
        KIVIQuantizer(self.n_bits, self.group_size, self.per_channel)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        old, recent = x.tensor_split([max(x.shape[-2] - self.residual_length, 0)], dim=-2)
        return torch.cat([KIVIQuantizer(self.n_bits, self.group_size, self.per_channel)(old), recent], dim=-2)


def quantize_latent(x: torch.Tensor, n_bits: float, group_size: int = 0) -> torch.Tensor:
    """The simple scheme (`use_kivi=False`): round every token of `[..., L, r]` latents by itself, at once."""
    return KIVIQuantizer(n_bits, group_size, per_channel=False)(x)


def quantize_latent_mixed(x: torch.Tensor, n_bits: float, residual_length: int, group_size: int = 0) -> torch.Tensor:
    """`quantize_latent` on all but the last `residual_length` tokens."""
    return KIVIMixedQuantizer(n_bits, group_size, residual_length, per_channel=False)(x)
