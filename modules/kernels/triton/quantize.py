"""Triton kernels of `modules/quant_utils.py`: quantize-and-pack, unpack-and-dequantize; the same bits come out.

Format, formulas and errors are those of the reference, whose functions have the same names here. Bits are equal on
every device because of float32 throughout, divisions rounded as IEEE 754 asks (`tl.div_rn`), no contraction of a
product and a sum (`enable_fp_fusion=False`), and sums over integers, whose order does not matter.

A program quantizes a tile of slots x channels. A slot is a token, but for ternary codes, where a byte of five tokens
takes eight slots so that the tile is a power of two. Per channel a group runs along the tile's slots, per token along
its channels. A group that fits the tile is read from memory once and stays in registers (`HELD`); a longer one is read
again, in chunks, by every pass over it: one for the range, one for the codes, and 20 for the search of "mse".
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from modules.kernels.triton.common import as_bits, bits_of, low_bits, power_of_three, power_of_two, stand_in, widen
from modules.quant_utils import (
    ERROR_LIMIT,
    ERROR_UNIT,
    RATIOS,
    REFITS,
    UNIT,
    check_scale,
    grid,
    group_starts,
    packed_words,
    parameter_dtype,
    require,
    search_candidates,
)

# Globals of kernels are integers: a launch compares them with what was compiled, and NaN is never equal to itself.
_RATIOS = tl.constexpr(len(RATIOS))
_REFITS = tl.constexpr(REFITS)
_UNIT = tl.constexpr(int(UNIT))
_ERROR_UNIT = tl.constexpr(int(ERROR_UNIT))
_ERROR_LIMIT = tl.constexpr(int(ERROR_LIMIT))
#: Beyond any length, and still an int32 when a length is added.
_NO_TOKEN = tl.constexpr(2**30)
_NO_ERROR_YET = tl.constexpr(2**63 - 1)


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
    wrong = widen(y) > x
    if UP:
        wrong = widen(y) < x
    return tl.where(wrong, widen(stepped), widen(y))


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
    """Offsets of the elements of a tile in a matrix whose stride `ALIGN` divides."""
    return tl.multiple_of(rows.to(tl.int64) * stride, ALIGN)[:, None] + columns[None, :]


@triton.jit
def _load_chunk(source, chunk, AXIS: tl.constexpr, STEP: tl.constexpr, ALIGN: tl.constexpr):
    """Float32 tile `chunk` steps along `AXIS` from the first one of `source`, 0 where it overruns; and its mask.

    `source` is a matrix: its pointer, the rows and columns of the first tile, their ends, and the stride.
    """
    x, rows, columns, row_end, column_end, stride = source
    if AXIS == 0:
        rows += chunk * STEP
    else:
        columns += chunk * STEP
    mask = (rows < row_end)[:, None] & (columns < column_end)[None, :]
    return widen(tl.load(x + _offsets(rows, columns, stride, ALIGN), mask, 0)), mask


@triton.jit
def _extend_range(low, high, bad, x, mask, AXIS: tl.constexpr):
    """Minimum and maximum with the values of a tile counted in, and whether there was a NaN, which the two ignore."""
    bad |= tl.max((x != x).to(tl.int32), AXIS)
    number = mask & (x == x)
    low = tl.minimum(low, tl.min(tl.where(number, x, float("inf")), AXIS))
    high = tl.maximum(high, tl.max(tl.where(number, x, float("-inf")), AXIS))
    return low, high, bad


@triton.jit
def _squared_error(difference, mask, AXIS: tl.constexpr):
    """Sum of squares by group, int64, of differences in units of the range."""
    square = tl.minimum(difference * difference, _ERROR_LIMIT) * _ERROR_UNIT
    return tl.sum(tl.where(mask, square, 0).to(tl.int64), AXIS)


@triton.jit
def _in_units(x, base, unit, fits, AXIS: tl.constexpr):
    """A tile in units of the ranges of its groups."""
    base, unit, fits = tl.expand_dims(base, AXIS), tl.expand_dims(unit, AXIS), tl.expand_dims(fits, AXIS)
    return tl.where(fits, tl.div_rn(x - base, unit), 0)


@triton.jit
def _least_error_range(
    source,
    chunks,
    u,
    mask,
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
    # The codes of one symmetric bit are signs, whatever the step: one round of least squares gives mean|x|.
    SIGNS: tl.constexpr = LEVELS == 2 and SYMMETRIC
    if SIGNS:
        TRIES: tl.constexpr = 1
        ROUNDS: tl.constexpr = 1
    else:
        TRIES: tl.constexpr = _RATIOS
        ROUNDS: tl.constexpr = _REFITS

    # The best of the shrunk ranges …
    for i in range(TRIES):
        new_step, new_zero = tl.load(candidates + i), tl.load(candidates + _RATIOS + i)
        error = none
        for chunk in range(chunks):
            if not HELD:
                x, mask = _load_chunk(source, chunk, AXIS, STEP, ALIGN)
                u = _in_units(x, base, unit, fits, AXIS)
            error += _squared_error(u - (_codes(u, new_step, new_zero, LEVELS) * new_step + new_zero), mask, AXIS)
        better = error < best_error
        best_error = tl.where(better, error, best_error)
        step, zero = tl.where(better, new_step, step), tl.where(better, new_zero, zero)

    # … then rounds of least squares of x on its codes.
    for _ in range(ROUNDS):
        sum_c, sum_cc, sum_x, sum_cx = none, none, none, none
        for chunk in range(chunks):
            if not HELD:
                x, mask = _load_chunk(source, chunk, AXIS, STEP, ALIGN)
                u = _in_units(x, base, unit, fits, AXIS)
            codes = _codes(u, tl.expand_dims(step, AXIS), tl.expand_dims(zero, AXIS), LEVELS)
            if SYMMETRIC:  # twice the signed code, so that one bit is an integer too
                codes = 2 * codes - 2 * MIDDLE
            codes = tl.where(mask, codes, 0).to(tl.int32)
            fixed = tl.where(mask, tl.floor(u * _UNIT + 0.5), 0).to(tl.int32)
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
        # A group whose values all have one code keeps its grid.
        better = (square > 0) & (new_step > 0)
        step, zero = tl.where(better, new_step, step), tl.where(better, new_zero, zero)
    return step, zero


@triton.jit
def _stored_error(x, step, zero, unit, mask, LEVELS: tl.constexpr, AXIS: tl.constexpr):
    """`_squared_error` of a tile on given grids."""
    step, zero, unit = tl.expand_dims(step, AXIS), tl.expand_dims(zero, AXIS), tl.expand_dims(unit, AXIS)
    return _squared_error(tl.div_rn(x - (_codes(x, step, zero, LEVELS) * step + zero), unit), mask, AXIS)


@triton.jit
def _store_plane(packed, codes, first, length, columns, column_end, channels, BITS: tl.constexpr, ALIGN: tl.constexpr):
    """Pack a tile of codes, `32 // BITS` to a word; `first` is the number of its first row among `length` codes."""
    PER_WORD: tl.constexpr = 32 // BITS
    BLOCK_W: tl.constexpr = codes.shape[0] // PER_WORD
    shifts = tl.arange(0, codes.shape[0]) % PER_WORD * BITS
    # The codes of a word have no bit in common, so that their sum is their union.
    words = tl.sum(tl.reshape(codes << shifts[:, None], (BLOCK_W, PER_WORD, codes.shape[1])), 1)
    word = first // PER_WORD + tl.arange(0, BLOCK_W)
    mask = (word < tl.cdiv(length, PER_WORD))[:, None] & (columns < column_end)[None, :]
    tl.store(packed + _offsets(word, columns, channels, ALIGN), words, mask)


@triton.jit
def _ternary_bytes(codes):
    """Bytes `[slots / 8, channels]` of a tile of ternary codes."""
    BYTES: tl.constexpr = codes.shape[0] // 8
    weights = power_of_three(4 - tl.arange(0, codes.shape[0]) % 8)
    values = tl.sum(tl.reshape(codes * weights[:, None], (BYTES, 8, codes.shape[1])), 1)
    return (values * 256 + 242) // 243


@triton.jit
def _load_words(packed, word, columns, column_end, stride, length, PER_WORD: tl.constexpr, ALIGN: tl.constexpr):
    """Words `[words, 1, channels]` of a plane of `length` codes."""
    mask = (word < tl.cdiv(length, PER_WORD))[:, None] & (columns < column_end)[None, :]
    return tl.expand_dims(tl.load(packed + _offsets(word, columns, stride, ALIGN), mask, 0), 1)


@triton.jit
def _program(
    table, channels, groups, blocks, token_blocks, PER_CHANNEL: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Row, token block, group, columns and their end of this program.

    The grid of a kernel is rows x token blocks x groups x channel blocks, in one dimension.
    """
    pid = tl.program_id(0)
    group = pid // blocks % groups
    n = (pid // blocks // groups // token_blocks).to(tl.int64)
    start, end = _channels(table, group, groups, channels, PER_CHANNEL, ALIGN)
    columns = start + pid % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return n, pid // blocks // groups % token_blocks, group, columns, end


@triton.jit
def quantize_kernel(
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
    LOW: tl.constexpr = low_bits(BITS)
    MINMAX: tl.constexpr = LEVELS > 3 or not SYMMETRIC
    n, token_block, group, columns, end = _program(
        table, channels, groups, blocks, token_blocks, PER_CHANNEL, ALIGN, BLOCK_C
    )
    # A group runs along an axis of the tile, in chunks of so many tokens or channels, and has a lane of the other axis.
    if PER_CHANNEL:
        AXIS: tl.constexpr = 0
        LANES: tl.constexpr = BLOCK_C
        if TERNARY:
            STEP: tl.constexpr = BLOCK_T // 8 * 5
        else:
            STEP: tl.constexpr = BLOCK_T
    else:
        AXIS: tl.constexpr = 1
        LANES: tl.constexpr = BLOCK_T
        STEP: tl.constexpr = BLOCK_C
    first = token_block * BLOCK_T
    rows = _tokens(first + tl.arange(0, BLOCK_T), TERNARY)
    source = (x + tl.multiple_of(n * stride_n, ALIGN), rows, columns, length, end, stride_t)
    count = length
    if not PER_CHANNEL:
        count = tl.load(table + groups + group)
    chunks = 1
    if not HELD:
        chunks = tl.cdiv(count, STEP)
    tile, mask = _load_chunk(source, 0, AXIS, STEP, ALIGN)

    if STATIC:
        best_scale = tl.load(scale + columns, columns < end, 0)
        best_zero = tl.load(zero_point + columns, columns < end, 0)
        is_finite = tl.min(tl.min((tl.abs(tile) < float("inf")).to(tl.int32), 0), 0)
        tl.store(finite, 0, is_finite == 0)
    else:
        # The range of each group, in as many passes as its chunks.
        nothing = tl.zeros((LANES,), tl.float32)
        low, high, bad = nothing + float("inf"), nothing - float("inf"), nothing.to(tl.int32)
        for chunk in range(chunks):
            if not HELD:
                tile, mask = _load_chunk(source, chunk, AXIS, STEP, ALIGN)
            low, high, bad = _extend_range(low, high, bad, tile, mask, AXIS)
        fits = (bad == 0) & (low >= -LIMIT) & (high <= LIMIT)

        DTYPE: tl.constexpr = scale.dtype.element_ty
        best_scale, best_zero = nothing, nothing
        if MINMAX:
            # Zero point rounded down and scale rounded up, so that the levels span the range.
            if SYMMETRIC:
                needed = tl.maximum(low * (-1 / OFFSET), tl.div_rn(high, LEVELS - 1.0 - OFFSET))
            else:
                best_zero = _round_directed(low, DTYPE, False)
                needed = tl.div_rn(high - best_zero, (LEVELS - 1.0) * SPACING)
            best_scale = _round_directed(needed, DTYPE, True)
            fits &= best_scale < float("inf")

        if MSE:
            if SYMMETRIC:
                base, unit = nothing, tl.maximum(-low, high)
            else:
                base, unit = low, high - low
            # Groups that have no range, or none that fits, are searched in units of 1.
            unit = tl.where(fits & (unit > 0), unit, 1)
            new_scale, new_zero = _least_error_range(
                source,
                chunks,
                _in_units(tile, base, unit, fits, AXIS),
                mask,
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
            # A group of one value has scale 0.
            if SYMMETRIC:
                new_scale = tl.where(tl.maximum(-low, high) > 0, new_scale, 0)
            else:
                new_scale = tl.where(high > low, new_scale, 0)
            new_scale, new_zero = widen(_narrow(new_scale, DTYPE)), widen(_narrow(new_zero, DTYPE))
            # Without minmax the alternative is to store zeros.
            better = fits
            if MINMAX:
                # The range found is kept where, as stored, it beats that of minmax.
                step, zero = _step_and_zero(best_scale, best_zero, SYMMETRIC, SPACING, OFFSET)
                new_step, low_level = _step_and_zero(new_scale, new_zero, SYMMETRIC, SPACING, OFFSET)
                error = tl.zeros(low.shape, tl.int64)
                new_error = error
                for chunk in range(chunks):
                    if not HELD:
                        tile, mask = _load_chunk(source, chunk, AXIS, STEP, ALIGN)
                    counted = mask & tl.expand_dims(fits, AXIS)
                    error += _stored_error(tile, step, zero, unit, counted, LEVELS, AXIS)
                    new_error += _stored_error(tile, new_step, low_level, unit, counted, LEVELS, AXIS)
                better = new_error < error
            best_scale, best_zero = tl.where(better, new_scale, best_scale), tl.where(better, new_zero, best_zero)

        step, zero = _step_and_zero(best_scale, best_zero, SYMMETRIC, SPACING, OFFSET)
        fits &= (step * (LEVELS - 1) < float("inf")) & (tl.abs(zero) < float("inf"))
        # A group that cannot be stored has scale NaN, of which the host makes an error.
        best_scale = tl.where(fits, best_scale, float("nan"))
        if PER_CHANNEL:
            offs, exists = n * channels + columns, columns < end
        else:
            offs, exists = (n * length + rows) * groups + group, rows < length
        tl.store(finite, 0, tl.max((exists & (fits == 0)).to(tl.int32), 0) > 0)
        tl.store(scale + offs, _narrow(best_scale, DTYPE), exists)
        if not SYMMETRIC:
            tl.store(zero_point + offs, _narrow(best_zero, DTYPE), exists)

    # The codes follow from the parameters as they are stored.
    step, zero = _step_and_zero(best_scale, best_zero, SYMMETRIC, SPACING, OFFSET)
    step, zero = tl.expand_dims(step, AXIS), tl.expand_dims(zero, AXIS)
    packed += tl.multiple_of(n * words * channels, ALIGN)
    for chunk in range(chunks):
        if not HELD:
            tile, mask = _load_chunk(source, chunk, AXIS, STEP, ALIGN)
        codes = tl.where(mask, _codes(tile, step, zero, LEVELS), 0).to(tl.int32)
        if PER_CHANNEL:
            slot, column = first + chunk * BLOCK_T, columns
        else:
            slot, column = first, columns + chunk * BLOCK_C
        if TERNARY:
            _store_plane(packed, _ternary_bytes(codes), slot // 8, tl.cdiv(length, 5), column, end, channels, 8, ALIGN)
        elif BITS > LOW:
            _store_plane(packed, codes & ((1 << LOW) - 1), slot, length, column, end, channels, LOW, ALIGN)
            high_plane = packed + tl.multiple_of(tl.cdiv(length, 32 // LOW).to(tl.int64) * channels, ALIGN)
            _store_plane(high_plane, codes >> LOW, slot, length, column, end, channels, BITS - LOW, ALIGN)
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
    """Unpack and dequantize; `BLOCK_T` counts slots."""
    TERNARY: tl.constexpr = BITS == 0
    LOW: tl.constexpr = low_bits(BITS)
    # Slots of a word of the low plane.
    if TERNARY:
        SLOTS: tl.constexpr = 32
    else:
        SLOTS: tl.constexpr = 32 // LOW
    BLOCK_W: tl.constexpr = BLOCK_T // SLOTS
    n, token_block, group, columns, end = _program(
        table, channels, groups, blocks, token_blocks, PER_CHANNEL, ALIGN, BLOCK_C
    )
    word = token_block * BLOCK_W + tl.arange(0, BLOCK_W)
    slot = tl.arange(0, SLOTS)
    rows = _tokens(word[:, None] * SLOTS + slot[None, :], TERNARY)
    packed += tl.multiple_of(n * stride_n, ALIGN)

    if TERNARY:
        # Digits of a byte without a division: see `modules/quant_utils.py`.
        words = _load_words(packed, word, columns, end, stride_w, length, 20, ALIGN)
        digits = ((words >> (slot // 8 * 8)[None, :, None]) & 255) * power_of_three(slot % 8)[None, :, None]
        codes = ((digits & 255) * 3) >> 8
    else:
        words = _load_words(packed, word, columns, end, stride_w, length, SLOTS, ALIGN)
        codes = (words >> (slot * LOW)[None, :, None]) & ((1 << LOW) - 1)
        if BITS > LOW:
            # A word of the high plane serves several of the low one.
            HIGH: tl.constexpr = BITS - LOW
            SERVED: tl.constexpr = LOW // HIGH
            high_plane = packed + tl.multiple_of(tl.cdiv(length, SLOTS).to(tl.int64) * stride_w, ALIGN)
            high = _load_words(high_plane, word // SERVED, columns, end, stride_w, length, 32 // HIGH, ALIGN)
            high_bit = ((word % SERVED * SLOTS)[:, None, None] + slot[None, :, None]) * HIGH
            codes |= ((high >> high_bit) & ((1 << HIGH) - 1)) << LOW

    if PER_CHANNEL:
        offs, exists = n * stride_scale + columns, columns < end
    else:
        offs, exists = (n * length + rows) * groups + group, rows < length
    zero = widen(tl.load(zero_point + offs, exists, 0))
    step, zero = _step_and_zero(widen(tl.load(scale + offs, exists, 0)), zero, SYMMETRIC, SPACING, OFFSET)
    if PER_CHANNEL:
        step, zero = step[None, None, :], zero[None, None, :]
    else:
        step, zero = step[:, :, None], zero[:, :, None]
    # Values beyond the type of the states go to the end of its range.
    x = tl.minimum(tl.maximum(codes.to(tl.float32) * step + zero, -LIMIT), LIMIT)
    mask = (rows < length)[:, :, None] & (columns < end)[None, None, :]
    offs = tl.multiple_of((n * length + rows) * channels, (ALIGN, ALIGN))[:, :, None] + columns[None, None, :]
    tl.store(states + offs, _narrow(x, states.dtype.element_ty), mask)


#: Types that kernels read and write; others pass through float32.
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _slots(length: int, n_bits: float) -> int:
    """Slots of `length` tokens: a word of 20 ternary codes has 32."""
    if n_bits == 1.58:
        return -(-length // 20) * 32
    return length


def readable_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` in a type that kernels read, its last dimension without gaps."""
    # Other types, float64 say, are quantized in float32 by the reference too.
    if x.dtype not in (*_DTYPES, torch.int32):
        x = x.float()
    x = as_bits(x)
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x


@lru_cache
def group_table(widths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """First channel and width of each group, `[2, len(widths)]` int32."""
    return torch.tensor([group_starts(widths), widths], dtype=torch.int32, device=device)


@lru_cache
def _candidates(n_bits: float, symmetric: bool, device: torch.device) -> torch.Tensor:
    """Steps and zero points that the search tries first, `[2, len(RATIOS)]` float32."""
    candidates = torch.tensor(search_candidates(n_bits, symmetric), dtype=torch.float32, device=device)
    return candidates.T.contiguous()


def _tile(slots: int, channels: int, per_channel: bool, align: int, search: bool = False) -> tuple[int, int, int]:
    """Slots, channels and warps of a tile, for groups along slots or channels, such that no register spills."""
    per_thread = 32  # elements
    if search:
        per_thread = 16
    if per_channel:
        block_t = power_of_two(slots, 32, 256)
        block_c = power_of_two(channels, 16, max(4096 // block_t, per_thread))
    else:
        # A thread reads at most `align` channels in a row. With few of those it has many tokens, each with a range.
        per_thread = min(per_thread, 8 * align)
        block_c = power_of_two(channels, 16, min(32 * align, 8 * per_thread))
        block_t = power_of_two(slots, 32, max(128 * per_thread // block_c, 32))
    return block_t, block_c, max(block_t * block_c // (32 * per_thread), 1)


class Format(NamedTuple):
    """How states are quantized: the arguments of `quantize_and_pack`, resolved.

    Attributes:
        n_bits, widths, symmetric, range_method: As for `quantize_and_pack`.
        dtype: Type of scales and zero points.
        static: Whether these are given.
    """

    n_bits: float
    widths: tuple[int, ...] | None
    symmetric: bool
    range_method: str
    dtype: torch.dtype
    static: bool


def _alignment(x: torch.Tensor, widths: tuple[int, ...]) -> int:
    """The largest divisor up to 16 of all offsets of rows and groups: loads may be that wide."""
    return math.gcd(16, x.shape[-1], x.stride(0), x.stride(1), *widths)


def _cut(n: int, token_blocks: int, blocks: int, widths, align: int, tile, device) -> tuple[tuple[int], dict]:
    """Grid of a launch on `n` rows, and the arguments that follow from how the work is cut."""
    groups = widths or (1,)
    block_t, block_c, num_warps = tile
    arguments = {
        "table": group_table(groups, device),
        "groups": len(groups),
        "blocks": blocks,
        "token_blocks": token_blocks,
        "PER_CHANNEL": widths is None,
        "ALIGN": align,
        "BLOCK_T": block_t,
        "BLOCK_C": block_c,
        "num_warps": num_warps,
        # The most there is: left alone, the assembler spills a few for one more program on a multiprocessor.
        "maxnreg": 255,
        "enable_fp_fusion": False,
    }
    return (n * token_blocks * len(groups) * blocks,), arguments


def quantize_launch(
    x: torch.Tensor, n: int, length: int, form: Format, device: torch.device, crowded: bool = False
) -> tuple[tuple[int], dict]:
    """Grid of `quantize_kernel`, and those of its arguments that follow from shapes and format.

    Args:
        x: States, of which only the strides and the channels matter, `[…, …, C]`.
        n: Rows to quantize.
        length: Tokens of a row.
        form: The format.
        device: Of the tensors.
        crowded: Whether the kernel is part of a larger one, which takes registers too.
    """
    n_bits, widths, symmetric, range_method, dtype, static = form
    levels, spacing, offset = grid(n_bits)
    slots, channels = _slots(length, n_bits), x.shape[-1]
    # Ternary and symmetric one-bit codes have no minmax.
    search = not static and (range_method == "mse" or (symmetric and n_bits < 2))
    align = _alignment(x, widths or ())
    block_t, block_c, num_warps = _tile(slots, max(widths or (channels,)), widths is None, align, search)
    if widths is None:
        if crowded and search:
            block_c = max(block_c // 2, 16)
        # A program walks along the tokens of its channels.
        held, token_blocks, blocks = slots <= block_t, 1, -(-channels // block_c)
    else:
        # A program walks along the channels of a group.
        held, token_blocks, blocks = max(widths) <= block_c, -(-slots // block_t), 1
    if static:
        # No range to find: every tile is a program's.
        held, token_blocks = True, -(-slots // block_t)
    tile = (block_t, block_c, num_warps)
    launch_grid, arguments = _cut(n, token_blocks, blocks, widths, align, tile, device)
    arguments |= {
        "candidates": _candidates(n_bits, symmetric, device),
        "length": length,
        "words": packed_words(length, n_bits),
        "channels": channels,
        "stride_t": x.stride(1),
        "BITS": bits_of(n_bits),
        "LEVELS": levels,
        "SPACING": spacing,
        "OFFSET": offset,
        "LIMIT": torch.finfo(dtype).max,
        "SYMMETRIC": symmetric,
        "MSE": search,
        "STATIC": static,
        "HELD": held,
    }
    return launch_grid, arguments


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
    dtype, x = scale_dtype or parameter_dtype(x.dtype), readable_rows(x)
    packed = torch.empty((n, packed_words(length, n_bits), channels), dtype=torch.int32, device=x.device)
    finite = torch.ones((), dtype=torch.int32, device=x.device)
    zero_point = None
    if static is not None:
        widths, (scale, zero_point) = None, static
        symmetric = zero_point is None
    else:
        shape = (n, channels)
        if widths is not None:
            shape = (n, length, len(widths))
        scale = torch.empty(shape, dtype=dtype, device=x.device)
        if not symmetric:
            zero_point = torch.empty(shape, dtype=dtype, device=x.device)

    # A tensor stands in where the kernel has no zero points to write.
    form = Format(n_bits, widths, symmetric, range_method, dtype, static is not None)
    launch_grid, arguments = quantize_launch(x, n, length, form, x.device)
    with torch.cuda.device_of(x):
        quantize_kernel[launch_grid](
            x=x,
            packed=packed,
            scale=as_bits(scale),
            zero_point=as_bits(stand_in(zero_point, scale)),
            finite=finite,
            stride_n=x.stride(0),
            **arguments,
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
    packed, scale = readable_rows(packed), scale.contiguous()
    zero_points, scale_stride = stand_in(zero_point, scale).contiguous(), channels
    if scale.shape[0] == 1:  # one scale for all blocks
        scale_stride = 0
    written = dtype
    if dtype not in _DTYPES:
        written = torch.float32
    states = torch.empty((n, length, channels), dtype=written, device=packed.device)
    # There is no range to find, so that tiles are cut per token in either orientation.
    slots, widest = _slots(length, n_bits), max(widths or (channels,))
    align = _alignment(packed, widths or ())
    tile = block_t, block_c, _ = _tile(slots, widest, False, align)
    launch_grid, arguments = _cut(n, -(-slots // block_t), -(-widest // block_c), widths, align, tile, packed.device)
    with torch.cuda.device_of(packed):
        _dequantize_kernel[launch_grid](
            packed=packed,
            scale=as_bits(scale),
            zero_point=as_bits(zero_points),
            states=as_bits(states),
            length=length,
            channels=channels,
            stride_n=packed.stride(0),
            stride_w=packed.stride(1),
            stride_scale=scale_stride,
            BITS=bits_of(n_bits),
            SPACING=spacing,
            OFFSET=offset,
            LIMIT=min(torch.finfo(dtype).max, torch.finfo(torch.float32).max),
            SYMMETRIC=zero_point is None,
            **arguments,
        )
    return states.to(dtype)
