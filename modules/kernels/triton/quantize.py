"""Triton kernels of `modules/quant_utils.py`: ranges, quantize-and-pack, unpack-and-dequantize; the same bits come out.

Format, formulas and errors are those of the reference, whose functions have the same names here. What makes the bits
equal on every device: float32 throughout, divisions rounded as IEEE 754 asks (`tl.div_rn`), no contraction of a product
and a sum (`enable_fp_fusion=False`), and sums over integers, whose order does not matter.

A program quantizes a tile of slots x channels. A slot is a token, but for ternary codes, where a byte of five tokens
takes eight slots so that the tile is a power of two. Per channel a group runs along the tile's slots, per token along
its channels. A group that fits the tile is read from memory once and stays in registers (`HELD`); a longer one is read
again, in chunks, by every pass over it: one for the range, one for the codes, and 20 for the search of "mse".

bfloat16 goes in and out as the int16 of its bits: the interpreter's own conversions truncate.
"""

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl

from modules.quant_utils import (
    ERROR_LIMIT,
    ERROR_UNIT,
    RATIOS,
    REFITS,
    UNIT,
    check_scale,
    grid,
    packed_words,
    parameter_dtype,
    require,
)

#: Whether the kernels run in Triton's interpreter, on the CPU: TRITON_INTERPRET=1 when this module was imported.
INTERPRETED = triton.knobs.runtime.interpret

# Globals of kernels are integers: a launch compares them with what was compiled, and NaN is never equal to itself.
_RATIOS = tl.constexpr(len(RATIOS))
_REFITS = tl.constexpr(REFITS)
_UNIT = tl.constexpr(int(UNIT))
_ERROR_UNIT = tl.constexpr(int(ERROR_UNIT))
_ERROR_LIMIT = tl.constexpr(int(ERROR_LIMIT))
#: Beyond any length, and still an int32 when a length is added.
_NO_TOKEN = tl.constexpr(2**30)
_NO_ERROR_YET = tl.constexpr(2**63 - 1)

# ---- numbers


@triton.jit
def _widen(value):
    """Float32 of floats, or of the int16 bits of bfloat16."""
    if value.dtype == tl.int16:
        return (value.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return value.to(tl.float32)


@triton.jit
def _narrow(x, DTYPE: tl.constexpr):
    """Float32 `x` as a float type, or as the int16 bits of bfloat16; halves to even."""
    if DTYPE.is_int16():
        bits = x.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)
    else:
        return x.to(DTYPE)


@triton.jit
def _round_directed(x, DTYPE: tl.constexpr, UP: tl.constexpr):
    """Round float32 `x` to a two-byte type, towards +inf (`UP`) or -inf."""
    y = _narrow(x, DTYPE)
    bits = y.to(tl.int16, bitcast=True)
    # One step in the wanted direction: the bit patterns of floats of one sign are ordered like their magnitudes.
    # A zero has the sign of the `x` that was rounded to it.
    stepped = tl.where((bits >= 0) == UP, bits + 1, bits - 1).to(DTYPE, bitcast=True)
    wrong = _widen(y) < x if UP else _widen(y) > x
    return tl.where(wrong, _widen(stepped), _widen(y))


@triton.jit
def _codes(x, step, zero, LEVELS: tl.constexpr):
    """Nearest levels, halves rounded up, as float32 integers; 0 where the step is 0."""
    codes = tl.where(step > 0, tl.div_rn(x - zero, step), 0)
    return tl.floor(tl.minimum(tl.maximum(codes, 0), LEVELS - 1) + 0.5)


@triton.jit
def _step_and_zero(scale, zero_point, SYMMETRIC: tl.constexpr, SPACING: tl.constexpr, OFFSET: tl.constexpr):
    """Step and zero point of parameters, float32."""
    if SYMMETRIC:
        return scale * SPACING, scale * -OFFSET
    else:
        return scale * SPACING, zero_point


# ---- tiles


@triton.jit
def _tokens(slots, TERNARY: tl.constexpr):
    """Tokens that stand in slots; a slot without one gets a number beyond any length."""
    if TERNARY:
        return tl.where(slots % 8 < 5, slots // 8 * 5 + slots % 8, _NO_TOKEN)
    else:
        return slots


@triton.jit
def _channels(table, group, groups, channels, PER_CHANNEL: tl.constexpr, ALIGN: tl.constexpr):
    """First channel of a group of a token, and the channel after its last; per channel, all of them."""
    if PER_CHANNEL:
        return group * 0, tl.multiple_of(group * 0 + channels, ALIGN)
    else:
        start = tl.multiple_of(tl.load(table + group), ALIGN)
        return start, start + tl.multiple_of(tl.load(table + groups + group), ALIGN)


@triton.jit
def _offsets(rows, columns, stride, ALIGN: tl.constexpr):
    """Where the elements of a tile stand from the start of a matrix whose stride `ALIGN` divides."""
    return tl.multiple_of(rows.to(tl.int64) * stride, ALIGN)[:, None] + columns[None, :]


@triton.jit
def _load_chunk(place, chunk, AXIS: tl.constexpr, STEP: tl.constexpr, ALIGN: tl.constexpr):
    """Float32 tile that stands `chunk` steps along `AXIS` from `place`, 0 where it overruns; and where it does not."""
    x, rows, columns, row_end, column_end, stride = place
    if AXIS == 0:
        rows += chunk * STEP
    else:
        columns += chunk * STEP
    valid = (rows < row_end)[:, None] & (columns < column_end)[None, :]
    return _widen(tl.load(x + _offsets(rows, columns, stride, ALIGN), valid, 0)), valid


# ---- ranges


@triton.jit
def _extend_range(low, high, bad, x, valid, AXIS: tl.constexpr):
    """Minimum and maximum with the values of a tile counted in, and whether there was a NaN, which the two ignore."""
    bad |= tl.max((x != x).to(tl.int32), AXIS)
    number = valid & (x == x)
    low = tl.minimum(low, tl.min(tl.where(number, x, float("inf")), AXIS))
    high = tl.maximum(high, tl.max(tl.where(number, x, float("-inf")), AXIS))
    return low, high, bad


@triton.jit
def _squared_error(difference, valid, AXIS: tl.constexpr):
    """Sum of squares by group, int64, of differences in units of the range."""
    square = tl.minimum(difference * difference, _ERROR_LIMIT) * _ERROR_UNIT
    return tl.sum(tl.where(valid, square, 0).to(tl.int64), AXIS)


@triton.jit
def _in_units(x, base, unit, fits, AXIS: tl.constexpr):
    """A tile in units of the ranges of its groups."""
    base, unit, fits = tl.expand_dims(base, AXIS), tl.expand_dims(unit, AXIS), tl.expand_dims(fits, AXIS)
    return tl.where(fits, tl.div_rn(x - base, unit), 0)


@triton.jit
def _least_error_range(
    place,
    chunks,
    u,
    valid,
    base,
    unit,
    fits,
    count,
    candidates,
    LEVELS: tl.constexpr,
    MIDDLE: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    AXIS: tl.constexpr,
    STEP: tl.constexpr,
    ALIGN: tl.constexpr,
    HELD: tl.constexpr,
):
    """Step and zero point of least squared error of each group, in units of its range; `u` is the group if `HELD`."""
    none = tl.zeros(base.shape, tl.int64)
    step, zero, best_error = none.to(tl.float32), none.to(tl.float32), none + _NO_ERROR_YET
    SIGNS: tl.constexpr = LEVELS == 2 and SYMMETRIC  # one round of least squares gives mean|x|
    for i in range(1 if SIGNS else _RATIOS):
        new_step, new_zero = tl.load(candidates + i), tl.load(candidates + _RATIOS + i)
        error = none
        for chunk in range(chunks):
            if not HELD:
                x, valid = _load_chunk(place, chunk, AXIS, STEP, ALIGN)
                u = _in_units(x, base, unit, fits, AXIS)
            error += _squared_error(u - (_codes(u, new_step, new_zero, LEVELS) * new_step + new_zero), valid, AXIS)
        better = error < best_error
        best_error = tl.where(better, error, best_error)
        step, zero = tl.where(better, new_step, step), tl.where(better, new_zero, zero)

    for _ in range(1 if SIGNS else _REFITS):
        sum_c, sum_cc, sum_x, sum_cx = none, none, none, none
        for chunk in range(chunks):
            if not HELD:
                x, valid = _load_chunk(place, chunk, AXIS, STEP, ALIGN)
                u = _in_units(x, base, unit, fits, AXIS)
            codes = _codes(u, tl.expand_dims(step, AXIS), tl.expand_dims(zero, AXIS), LEVELS)
            if SYMMETRIC:  # twice the signed code, so that one bit is an integer too
                codes = 2 * codes - 2 * MIDDLE
            codes = tl.where(valid, codes, 0).to(tl.int32)
            fixed = tl.where(valid, tl.floor(u * _UNIT + 0.5), 0).to(tl.int32)
            sum_cc += tl.sum((codes * codes).to(tl.int64), AXIS)
            sum_cx += tl.sum((codes * fixed).to(tl.int64), AXIS)
            if not SYMMETRIC:
                sum_c += tl.sum(codes.to(tl.int64), AXIS)
                sum_x += tl.sum(fixed.to(tl.int64), AXIS)
        if SYMMETRIC:
            square, product = sum_cc, 2 * sum_cx
        else:
            square, product = count * sum_cc - sum_c * sum_c, count * sum_cx - sum_c * sum_x
        new_step = tl.div_rn(product.to(tl.float32), tl.maximum(square, 1).to(tl.float32)) * (1 / _UNIT)
        if SYMMETRIC:
            new_zero = new_step * -MIDDLE
        else:
            offset = sum_x.to(tl.float32) * (1 / _UNIT) - new_step * sum_c.to(tl.float32)
            new_zero = tl.div_rn(offset, offset * 0 + count)
        better = (square > 0) & (new_step > 0)
        step, zero = tl.where(better, new_step, step), tl.where(better, new_zero, zero)
    return step, zero


@triton.jit
def _stored_error(x, step, zero, unit, valid, LEVELS: tl.constexpr, AXIS: tl.constexpr):
    """`_squared_error` of a tile on given grids."""
    step, zero, unit = tl.expand_dims(step, AXIS), tl.expand_dims(zero, AXIS), tl.expand_dims(unit, AXIS)
    return _squared_error(tl.div_rn(x - (_codes(x, step, zero, LEVELS) * step + zero), unit), valid, AXIS)


# ---- packing


@triton.jit
def _power_of_three(k):
    return tl.where(k == 0, 1, tl.where(k == 1, 3, tl.where(k == 2, 9, tl.where(k == 3, 27, 81))))


@triton.jit
def _store_plane(packed, codes, first, length, columns, column_end, channels, BITS: tl.constexpr, ALIGN: tl.constexpr):
    """Pack a tile of codes, `32 // BITS` to a word; `first` is the place of its first row among `length` codes."""
    PER_WORD: tl.constexpr = 32 // BITS
    BLOCK_W: tl.constexpr = codes.shape[0] // PER_WORD
    shifts = tl.arange(0, codes.shape[0]) % PER_WORD * BITS
    words = tl.sum(tl.reshape(codes << shifts[:, None], (BLOCK_W, PER_WORD, codes.shape[1])), 1)
    word = first // PER_WORD + tl.arange(0, BLOCK_W)
    valid = (word < tl.cdiv(length, PER_WORD))[:, None] & (columns < column_end)[None, :]
    tl.store(packed + _offsets(word, columns, channels, ALIGN), words, valid)


@triton.jit
def _ternary_bytes(codes):
    """Bytes `[slots / 8, channels]` of a tile of ternary codes."""
    BYTES: tl.constexpr = codes.shape[0] // 8
    weights = _power_of_three(4 - tl.arange(0, codes.shape[0]) % 8)
    values = tl.sum(tl.reshape(codes * weights[:, None], (BYTES, 8, codes.shape[1])), 1)
    return (values * 256 + 242) // 243


@triton.jit
def _load_words(packed, word, columns, column_end, stride, length, PER_WORD: tl.constexpr, ALIGN: tl.constexpr):
    """Words `[words, 1, channels]` of a plane of `length` codes."""
    valid = (word < tl.cdiv(length, PER_WORD))[:, None] & (columns < column_end)[None, :]
    return tl.expand_dims(tl.load(packed + _offsets(word, columns, stride, ALIGN), valid, 0), 1)


# ---- kernels: the grid is rows x token blocks x groups x channel blocks


@triton.jit
def _program(
    table, channels, groups, blocks, token_blocks, PER_CHANNEL: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Row, token block, group, columns and their end of this program."""
    pid = tl.program_id(0)
    group = pid // blocks % groups
    n = (pid // blocks // groups // token_blocks).to(tl.int64)
    start, end = _channels(table, group, groups, channels, PER_CHANNEL, ALIGN)
    columns = start + pid % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return n, pid // blocks // groups % token_blocks, group, columns, end


@triton.jit
def _quantize_kernel(
    x,
    packed,
    scale,
    zero_point,
    finite,
    table,
    candidates,
    length,
    words,
    channels,
    groups,
    blocks,
    token_blocks,
    stride_n,
    stride_t,
    BITS: tl.constexpr,  # 0: ternary
    LEVELS: tl.constexpr,
    SPACING: tl.constexpr,
    OFFSET: tl.constexpr,
    LIMIT: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    MSE: tl.constexpr,
    STATIC: tl.constexpr,  # scale and zero point are given, float32 [channels]
    PER_CHANNEL: tl.constexpr,
    ALIGN: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Quantize and pack; 0 goes to `finite` if x is not, or does not fit its scales."""
    TERNARY: tl.constexpr = BITS == 0
    AXIS: tl.constexpr = 0 if PER_CHANNEL else 1
    TOKENS: tl.constexpr = BLOCK_T // 8 * 5 if TERNARY else BLOCK_T
    STEP: tl.constexpr = TOKENS if PER_CHANNEL else BLOCK_C
    MINMAX: tl.constexpr = LEVELS > 3 or not SYMMETRIC
    n, token_block, group, columns, end = _program(
        table, channels, groups, blocks, token_blocks, PER_CHANNEL, ALIGN, BLOCK_C
    )
    first = token_block * BLOCK_T
    rows = _tokens(first + tl.arange(0, BLOCK_T), TERNARY)
    place = (x + tl.multiple_of(n * stride_n, ALIGN), rows, columns, length, end, stride_t)
    count = length if PER_CHANNEL else tl.load(table + groups + group)
    chunks = 1 if HELD else tl.cdiv(count, STEP)
    tile, valid = _load_chunk(place, 0, AXIS, STEP, ALIGN)

    if STATIC:
        best_scale = tl.load(scale + columns, columns < end, 0)
        best_zero = tl.load(zero_point + columns, columns < end, 0)
        is_finite = tl.min(tl.min((tl.abs(tile) < float("inf")).to(tl.int32), 0), 0)
        tl.store(finite, 0, is_finite == 0)
    else:
        nothing = tl.zeros((BLOCK_C if PER_CHANNEL else BLOCK_T,), tl.float32)
        low, high, bad = nothing + float("inf"), nothing - float("inf"), nothing.to(tl.int32)
        for chunk in range(chunks):
            if not HELD:
                tile, valid = _load_chunk(place, chunk, AXIS, STEP, ALIGN)
            low, high, bad = _extend_range(low, high, bad, tile, valid, AXIS)
        fits = (bad == 0) & (low >= -LIMIT) & (high <= LIMIT)

        DTYPE: tl.constexpr = scale.dtype.element_ty
        best_scale, best_zero = nothing, nothing
        if MINMAX:
            if SYMMETRIC:
                needed = tl.maximum(low * (-1 / OFFSET), tl.div_rn(high, LEVELS - 1.0 - OFFSET))
            else:
                best_zero = _round_directed(low, DTYPE, False)
                needed = tl.div_rn(high - best_zero, (LEVELS - 1.0) * SPACING)
            best_scale = _round_directed(needed, DTYPE, True)
            fits &= best_scale < float("inf")

        if MSE:
            base = nothing if SYMMETRIC else low
            unit = tl.maximum(-low, high) if SYMMETRIC else high - low
            unit = tl.where(fits & (unit > 0), unit, 1)
            new_scale, new_zero = _least_error_range(
                place,
                chunks,
                _in_units(tile, base, unit, fits, AXIS),
                valid,
                base,
                unit,
                fits,
                count,
                candidates,
                LEVELS,
                OFFSET / SPACING,
                SYMMETRIC,
                AXIS,
                STEP,
                ALIGN,
                HELD,
            )
            new_scale = tl.minimum(new_scale * (1 / SPACING) * unit, LIMIT)
            new_zero = tl.minimum(tl.maximum(base + new_zero * unit, -LIMIT), LIMIT)
            new_scale = tl.where(tl.maximum(-low, high) > 0 if SYMMETRIC else high > low, new_scale, 0)
            new_scale, new_zero = _widen(_narrow(new_scale, DTYPE)), _widen(_narrow(new_zero, DTYPE))
            better = fits
            if MINMAX:
                step, zero = _step_and_zero(best_scale, best_zero, SYMMETRIC, SPACING, OFFSET)
                new_step, low_level = _step_and_zero(new_scale, new_zero, SYMMETRIC, SPACING, OFFSET)
                error = tl.zeros(low.shape, tl.int64)
                new_error = error
                for chunk in range(chunks):
                    if not HELD:
                        tile, valid = _load_chunk(place, chunk, AXIS, STEP, ALIGN)
                    counted = valid & tl.expand_dims(fits, AXIS)
                    error += _stored_error(tile, step, zero, unit, counted, LEVELS, AXIS)
                    new_error += _stored_error(tile, new_step, low_level, unit, counted, LEVELS, AXIS)
                better = new_error < error
            best_scale, best_zero = tl.where(better, new_scale, best_scale), tl.where(better, new_zero, best_zero)

        step, zero = _step_and_zero(best_scale, best_zero, SYMMETRIC, SPACING, OFFSET)
        fits &= (step * (LEVELS - 1) < float("inf")) & (tl.abs(zero) < float("inf"))
        best_scale = tl.where(fits, best_scale, float("nan"))
        if PER_CHANNEL:
            at, exists = n * channels + columns, columns < end
        else:
            at, exists = (n * length + rows) * groups + group, rows < length
        tl.store(finite, 0, tl.max((exists & (fits == 0)).to(tl.int32), 0) > 0)
        tl.store(scale + at, _narrow(best_scale, DTYPE), exists)
        if not SYMMETRIC:
            tl.store(zero_point + at, _narrow(best_zero, DTYPE), exists)

    step, zero = _step_and_zero(best_scale, best_zero, SYMMETRIC, SPACING, OFFSET)
    step, zero = tl.expand_dims(step, AXIS), tl.expand_dims(zero, AXIS)
    packed += tl.multiple_of(n * words * channels, ALIGN)
    for chunk in range(chunks):
        if not HELD:
            tile, valid = _load_chunk(place, chunk, AXIS, STEP, ALIGN)
        codes = tl.where(valid, _codes(tile, step, zero, LEVELS), 0).to(tl.int32)
        slot = first + (chunk * BLOCK_T if PER_CHANNEL else 0)
        column = columns + (0 if PER_CHANNEL else chunk * BLOCK_C)
        if TERNARY:
            _store_plane(packed, _ternary_bytes(codes), slot // 8, tl.cdiv(length, 5), column, end, channels, 8, ALIGN)
        elif BITS == 3:
            _store_plane(packed, codes & 3, slot, length, column, end, channels, 2, ALIGN)
            high_plane = packed + tl.multiple_of(tl.cdiv(length, 16).to(tl.int64) * channels, ALIGN)
            _store_plane(high_plane, codes >> 2, slot, length, column, end, channels, 1, ALIGN)
        else:
            _store_plane(packed, codes, slot, length, column, end, channels, BITS, ALIGN)


@triton.jit
def _dequantize_kernel(
    packed,
    scale,
    zero_point,
    states,
    table,
    length,
    channels,
    groups,
    blocks,
    token_blocks,
    stride_n,
    stride_w,
    stride_scale,
    BITS: tl.constexpr,  # 0: ternary
    SPACING: tl.constexpr,
    OFFSET: tl.constexpr,
    LIMIT: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    TERNARY: tl.constexpr = BITS == 0
    SLOTS: tl.constexpr = 32 if TERNARY else 16 if BITS == 3 else 32 // BITS
    BLOCK_W: tl.constexpr = BLOCK_T // SLOTS
    n, token_block, group, columns, end = _program(
        table, channels, groups, blocks, token_blocks, PER_CHANNEL, ALIGN, BLOCK_C
    )
    word = token_block * BLOCK_W + tl.arange(0, BLOCK_W)
    slot = tl.arange(0, SLOTS)
    rows = _tokens(word[:, None] * SLOTS + slot[None, :], TERNARY)
    packed += tl.multiple_of(n * stride_n, ALIGN)

    if TERNARY:
        words = _load_words(packed, word, columns, end, stride_w, length, 20, ALIGN)
        digits = ((words >> (slot // 8 * 8)[None, :, None]) & 255) * _power_of_three(slot % 8)[None, :, None]
        codes = ((digits & 255) * 3) >> 8
    elif BITS == 3:
        low = _load_words(packed, word, columns, end, stride_w, length, 16, ALIGN)
        high_plane = packed + tl.multiple_of(tl.cdiv(length, 16).to(tl.int64) * stride_w, ALIGN)
        high = _load_words(high_plane, word // 2, columns, end, stride_w, length, 32, ALIGN)
        high_bit = (word % 2 * 16)[:, None, None] + slot[None, :, None]
        codes = ((low >> (slot * 2)[None, :, None]) & 3) | (((high >> high_bit) & 1) << 2)
    else:
        words = _load_words(packed, word, columns, end, stride_w, length, SLOTS, ALIGN)
        codes = (words >> (slot * BITS)[None, :, None]) & ((1 << BITS) - 1)

    if PER_CHANNEL:
        at, exists = n * stride_scale + columns, columns < end
    else:
        at, exists = (n * length + rows) * groups + group, rows < length
    zero = _widen(tl.load(zero_point + at, exists, 0))
    step, zero = _step_and_zero(_widen(tl.load(scale + at, exists, 0)), zero, SYMMETRIC, SPACING, OFFSET)
    if PER_CHANNEL:
        step, zero = step[None, None, :], zero[None, None, :]
    else:
        step, zero = step[:, :, None], zero[:, :, None]
    x = tl.minimum(tl.maximum(codes.to(tl.float32) * step + zero, -LIMIT), LIMIT)
    valid = (rows < length)[:, :, None] & (columns < end)[None, None, :]
    at = tl.multiple_of((n * length + rows) * channels, (ALIGN, ALIGN))[:, :, None] + columns[None, None, :]
    tl.store(states + at, _narrow(x, states.dtype.element_ty), valid)


# ---- launches

#: Types that kernels read and write; others pass through float32.
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _power_of_two(n: int, least: int, most: int) -> int:
    """The first power of two from `n` on, within the bounds."""
    return min(max(1 << (n - 1).bit_length(), least), most)


def _bits(n_bits: float) -> int:
    """The kernels' `BITS`."""
    return 0 if n_bits == 1.58 else int(n_bits)


def _as_bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


def _rows(x: torch.Tensor) -> torch.Tensor:
    """`x` in a type that kernels read, its last dimension without gaps."""
    x = _as_bits(x if x.dtype in (*_DTYPES, torch.int32) else x.float())
    return x if x.stride(-1) == 1 else x.contiguous()


@lru_cache
def _group_table(widths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """First channel and width of each group, `[2, len(widths)]` int32."""
    starts = [sum(widths[:i]) for i in range(len(widths))]
    return torch.tensor([starts, widths], dtype=torch.int32, device=device)


@lru_cache
def _candidates(n_bits: float, symmetric: bool, device: torch.device) -> torch.Tensor:
    """Steps and zero points that the search tries first, in units of the range, `[2, len(RATIOS)]` float32."""
    levels, spacing, offset = grid(n_bits)
    middle = offset / spacing
    full = 1 / (levels - 1 - middle) if symmetric else 1 / (levels - 1)
    float32 = {"dtype": torch.float32, "device": "cpu"}
    steps = torch.tensor([ratio * full for ratio in RATIOS], **float32)
    zeros = steps * -middle if symmetric else torch.tensor([(1 - ratio) / 2 for ratio in RATIOS], **float32)
    return torch.stack([steps, zeros]).to(device)


def _tile(slots: int, channels: int, per_channel: bool, align: int, search: bool = False) -> tuple[int, int, int]:
    """Slots, channels and warps of a tile, for groups along slots or channels, such that no register spills."""
    per_thread = 16 if search else 32  # elements
    if per_channel:
        block_t = _power_of_two(slots, 32, 256)
        block_c = _power_of_two(channels, 16, max(4096 // block_t, per_thread))
    else:
        # A thread reads at most `align` channels in a row. With few of those it has many tokens, each with a range.
        per_thread = min(per_thread, 8 * align)
        block_c = _power_of_two(channels, 16, min(32 * align, 8 * per_thread))
        block_t = _power_of_two(slots, 32, max(128 * per_thread // block_c, 32))
    return block_t, block_c, max(block_t * block_c // (32 * per_thread), 1)


def _prepared(n: int, blocks: int, token_blocks: int, widths, align: int, tile, device) -> tuple[tuple[int], dict]:
    """Grid of a launch on `n` rows, and the arguments that follow from how the work is cut."""
    groups = widths or (1,)
    arguments = {
        "table": _group_table(groups, device),
        "groups": len(groups),
        "blocks": blocks,
        "token_blocks": token_blocks,
        "PER_CHANNEL": widths is None,
        "ALIGN": align,
        "BLOCK_T": tile[0],
        "BLOCK_C": tile[1],
        "num_warps": tile[2],
        # The most there is: left alone, the assembler spills a few for one more program on a multiprocessor.
        "maxnreg": 255,
        "enable_fp_fusion": False,
    }
    return (n * token_blocks * len(groups) * blocks,), arguments


def _launch(kernel, arguments: dict, *cut) -> None:
    """Start `kernel` on the arguments and those that `_prepared` adds to them."""
    device = arguments["packed" if "packed" in arguments else "x"].device
    grid, further = _prepared(*cut, device)
    with torch.cuda.device_of(further["table"]):
        kernel[grid](**arguments, **further)


def quantize_and_pack(
    x: torch.Tensor,
    n_bits: float,
    widths: tuple[int, ...] | None = None,
    symmetric: bool = False,
    range_method: str = "minmax",
    scale_dtype: torch.dtype | None = None,
    static: tuple[torch.Tensor, torch.Tensor] | None = None,
):
    """As `quantize_and_pack` in `modules/quant_utils.py`."""
    n, length, channels = x.shape
    levels, spacing, offset = grid(n_bits)
    dtype, x = scale_dtype or parameter_dtype(x.dtype), _rows(x)
    packed = torch.empty((n, packed_words(length, n_bits), channels), dtype=torch.int32, device=x.device)
    finite = torch.ones((), dtype=torch.int32, device=x.device)
    if static is not None:
        widths, (scale, zero_point) = None, static
        symmetric = zero_point is None
    else:
        shape = (n, channels) if widths is None else (n, length, len(widths))
        scale = torch.empty(shape, dtype=dtype, device=x.device)
        zero_point = None if symmetric else torch.empty(shape, dtype=dtype, device=x.device)

    slots = -(-length // 20) * 32 if n_bits == 1.58 else length
    search = static is None and (range_method == "mse" or (symmetric and n_bits < 2))
    align = math.gcd(16, channels, x.stride(0), x.stride(1), *(widths or ()))
    tile = _tile(slots, max(widths or (channels,)), widths is None, align, search)
    token_blocks = 1 if widths is None and static is None else -(-slots // tile[0])
    _launch(
        _quantize_kernel,
        {
            "x": x,
            "packed": packed,
            "scale": _as_bits(scale),
            "zero_point": _as_bits(scale if zero_point is None else zero_point),
            "finite": finite,
            "candidates": _candidates(n_bits, symmetric, x.device),
            "length": length,
            "words": packed.shape[1],
            "channels": channels,
            "stride_n": x.stride(0),
            "stride_t": x.stride(1),
            "BITS": _bits(n_bits),
            "LEVELS": levels,
            "SPACING": spacing,
            "OFFSET": offset,
            "LIMIT": torch.finfo(dtype).max,
            "SYMMETRIC": symmetric,
            "MSE": search,
            "STATIC": static is not None,
            "HELD": static is not None or (slots <= tile[0] if widths is None else max(widths) <= tile[1]),
        },
        n,
        -(-channels // tile[1]) if widths is None else 1,
        token_blocks,
        widths,
        align,
        tile,
    )
    if static is not None:
        require(finite.bool(), "x: values to quantize must be finite; NaN or Inf were found")
    check_scale(scale)
    return packed, scale, zero_point


def unpack_and_dequantize(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    n_bits: float,
    length: int,
    dtype: torch.dtype,
    widths: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """As `unpack_and_dequantize` in `modules/quant_utils.py`."""
    n, _, channels = packed.shape
    _, spacing, offset = grid(n_bits)
    packed, scale = _rows(packed), _as_bits(scale.contiguous())
    states = torch.empty(
        (n, length, channels), dtype=dtype if dtype in _DTYPES else torch.float32, device=packed.device
    )
    slots = -(-length // 20) * 32 if n_bits == 1.58 else length
    align = math.gcd(16, channels, packed.stride(0), packed.stride(1), *(widths or ()))
    tile = _tile(slots, max(widths or (channels,)), False, align)
    _launch(
        _dequantize_kernel,
        {
            "packed": packed,
            "scale": scale,
            "zero_point": scale if zero_point is None else _as_bits(zero_point.contiguous()),
            "states": _as_bits(states),
            "length": length,
            "channels": channels,
            "stride_n": packed.stride(0),
            "stride_w": packed.stride(1),
            "stride_scale": 0 if scale.shape[0] == 1 else channels,
            "BITS": _bits(n_bits),
            "SPACING": spacing,
            "OFFSET": offset,
            "LIMIT": min(torch.finfo(dtype).max, torch.finfo(torch.float32).max),
            "SYMMETRIC": zero_point is None,
        },
        n,
        -(-max(widths or (channels,)) // tile[1]),
        -(-slots // tile[0]),
        widths,
        align,
        tile,
    )
    return states.to(dtype)
