"""Attention over the packed latent in Triton: what `modules/kernels/attention.py` computes, on the packed bits.

A program takes a key/value head of a row, the query heads that share it, and a share of the row's blocks (split over
the sequence as in flash decoding); a second kernel merges the shares. It walks tiles of `BLOCK_T` tokens, transposed:
tokens and channels, which are many, are rows of the matrix products, and queries, which are few, the columns.

    latents   [t, r]   unpacked and scaled in registers (`latents.py`)
    keys      [t, d]   latents · A_headᵀ in two halves, rotated by their offset in the tile, a constant table
    scores    [t, M]   keys · qᵀ, with q rotated back by the position of the tile's first token
    values    [r, M]   latentsᵀ · weights, summed up in float32; never rebuilt

Keys in bfloat16 are rotated in pairs, each product rounded: what plain PyTorch does in that type. Scales of tokens go
into the weights of their values, so that codes stay whole numbers there.

Tokens in full precision are blocks of 16 bits to it; each `Tile` of them is a share of its own.

Angles are integers in units of 2^-32 turns: a product with a position wraps around, and its error, that of the
frequency, is a hundredth of what float32 makes of large angles.
"""

import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import lru_cache
from itertools import chain, repeat, zip_longest
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch.utils.weak import WeakIdKeyDictionary
from triton.language.extra import libdevice

from modules import trellis
from modules.kernels.attention import Attended
from modules.kernels.packed import LatentQuery, PackedCache, PackedPart, PackedSide, Tile
from modules.kernels.triton.common import INTERPRETED, as_bits, bits_of, power_of_two, stand_in, widen
from modules.kernels.triton.latents import (
    Spec,
    as_operand,
    known,
    latent_tile,
    parameters,
    read_ahead,
    rounded,
    stored_of_tokens,
)
from modules.kernels.triton.launch import Launcher
from modules.quant_utils import grid, group_starts, packed_words

_INTERPRETED = tl.constexpr(INTERPRETED)
_LOG2_E = math.log2(math.e)


@triton.jit
def _dot(a, b, accumulator):
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def _radians(angle):
    """Float32 radians of int32 angles in units of 2^-32 turns."""
    return angle.to(tl.float32) * 1.4629180792671596e-09  # 2 pi / 2^32


@triton.jit
def _cos_sin(angle, DTYPE: tl.constexpr):
    """Cosine and sine, float32, of int32 angles in units of 2^-32 turns.

    For operands of two bytes by the approximations of the hardware, whose error is below 2^-20 within half a turn; else
    by polynomials around the nearest quarter.
    """
    if not _INTERPRETED and not DTYPE.is_fp32():
        x = _radians(angle)
        return libdevice.fast_cosf(x), libdevice.fast_sinf(x)
    else:
        # The nearest quarter turn, Taylor's polynomials of the rest, and what the quarter makes of them.
        quarter = (angle + (1 << 29)) >> 30
        x = _radians(angle - (quarter << 30))
        square = x * x
        sin = x * (1 + square * (-1 / 6 + square * (1 / 120 + square * (-1 / 5040 + square * (1 / 362880)))))
        cos = 1 + square * (-1 / 2 + square * (1 / 24 + square * (-1 / 720 + square * (1 / 40320))))
        swapped, cos_sign, sin_sign = (quarter & 1) != 0, ((quarter + 1) & 2) != 0, (quarter & 2) != 0
        cos, sin = tl.where(swapped, sin, cos), tl.where(swapped, cos, sin)
        return tl.where(cos_sign, -cos, cos), tl.where(sin_sign, -sin, sin)


@triton.jit
def _rotated(low, high, cos, sin, DTYPE: tl.constexpr):
    """Both halves of keys, operands in `DTYPE`, rotated; bfloat16 two at a time, each product rounded."""
    if DTYPE.is_bf16() and not _INTERPRETED:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 zero, a, b;
            mov.b32 zero, 0x80008000;
            fma.rn.bf16x2 a, $3, $5, zero;
            fma.rn.bf16x2 b, $2, $5, zero;
            neg.bf16x2 a, a;
            fma.rn.bf16x2 $0, $2, $4, a;
            fma.rn.bf16x2 $1, $3, $4, b;
            }""",
            "=&r,=&r,r,r,r,r",
            (low, high, cos, sin),
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        a, b = rounded(high * sin, DTYPE), rounded(low * sin, DTYPE)
        return as_operand(low * cos - a, DTYPE), as_operand(high * cos + b, DTYPE)


@triton.jit
def _spans(parts, group, SPECS: tl.constexpr):
    """First stored channel, width and first column in its group of every piece, and the group."""
    spans = ()
    for i in tl.static_range(len(SPECS)):
        spans += (_span(parts[i][3], group, known(SPECS[i].align)),)
    return spans


@triton.jit
def _span(ptr, group, ALIGN: tl.constexpr):
    ptr += 3 * group
    start, width, column = tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2)
    return tl.multiple_of(start, ALIGN), tl.multiple_of(width, ALIGN), tl.multiple_of(column, ALIGN), group


@triton.constexpr_function
def _chunks(specs):
    return sum(spec.chunks for spec in specs)


@triton.jit
def _nothing(turn, LISTED: tl.constexpr, SPECS: tl.constexpr):
    """0, of pieces of many chunks as what may change with every turn of a loop: what it is added to, is computed anew.

    Else the compiler keeps the addresses of all chunks from turn to turn, in more registers than there are.
    """
    if _INTERPRETED or not LISTED or _chunks(SPECS) <= 2:
        return 0
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, 0;", "=r,r", (turn,), dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _moved(spans, by, SPECS: tl.constexpr):
    """Spans that start as many channels later."""
    result = ()
    for i in tl.static_range(len(SPECS)):
        start, width, column, group = spans[i]
        result += ((tl.multiple_of(start + by, known(SPECS[i].align)), width, column, group),)
    return result


@triton.jit
def _expander(weight, stride, span, chunk, rows, exist, DTYPE: tl.constexpr, SPEC: tl.constexpr):
    """The weight of channels of a chunk for `rows`, zero where those do not `exist`: `[SPEC.block, len(rows)]`."""
    _, width, column, _ = span
    channel = chunk * SPEC.block + tl.arange(0, SPEC.block)
    if SPEC.identity:
        mask = (channel < width)[:, None] & exist[None, :]
        return as_operand(tl.where(mask & ((column + channel)[:, None] == rows[None, :]), 1.0, 0.0), DTYPE)
    elif SPEC.aligned:
        # Columns that no piece has are zeros.
        offs = rows.to(tl.int64)[None, :] * stride + (SPEC.column + channel)[:, None]
        return as_operand(tl.load(weight + offs), DTYPE)
    else:
        mask = (channel < width)[:, None] & exist[None, :]
        offs = rows.to(tl.int64)[None, :] * stride + (column + channel)[:, None]
        return as_operand(tl.load(weight + offs, mask, 0), DTYPE)


@triton.jit
def _both_halves(low, high):
    """Two vectors as one."""
    return tl.reshape(tl.permute(tl.join(low, high), (1, 0)), (2 * low.shape[0],))


@triton.jit
def _constants(query, offsets, inv_freq, bias, spans, expand, DTYPE: tl.constexpr, SPECS: tl.constexpr):
    """Constants of every tile, to rebuild and rotate keys at the frequencies of `query`.

    Returns:
        Weights of the pieces that hold theirs, cosines and sines of the offsets (0 without RoPE), halves of the bias (0
        without one).
    """
    _, _, f, frequency = query
    weight, stride, row, half, size = expand
    held = ()
    for i in tl.static_range(len(SPECS)):
        # A weight that fits stays in registers for all tiles.
        if SPECS[i].held:
            rows, exist = _both_halves(row + f, row + half + f), _both_halves(f < half, f < half)
            held += (_expander(weight, stride, spans[i], 0, rows, exist, DTYPE, known(SPECS[i])),)
        else:
            held += (0,)
    turn, biases = (0, 0), (0, 0)
    if inv_freq is not None:
        turn = _cos_sin(offsets[:, None] * frequency[None, :], DTYPE)
        if DTYPE.is_bf16():
            turn = (as_operand(turn[0], DTYPE), as_operand(turn[1], DTYPE))
    if bias is not None:
        mask = f < size
        biases = (widen(tl.load(bias + f, mask, 0)), widen(tl.load(bias + size + f, mask, 0)))
    return held, turn, biases


@triton.jit
def _add_keys(keys, latents, part, span, held, f, expand, tile, DTYPE: tl.constexpr, SPEC: tl.constexpr):
    """Keys `[t, 2 len(f)]`, of the lower half of the head and of the upper one, with those of a piece added."""
    BLOCK_T: tl.constexpr = keys.shape[0]
    weight, stride, row, half, _ = expand
    rows, exist = _both_halves(row + f, row + half + f), _both_halves(f < half, f < half)
    if SPEC.held:
        return _dot(latents, held, keys)
    elif SPEC.chunks == 1:
        return _dot(latents, _expander(weight, stride, span, 0, rows, exist, DTYPE, SPEC), keys)
    else:
        for chunk in range(tl.cdiv(span[1], SPEC.block)):
            states = latent_tile(part, span, chunk, tile, 0, DTYPE, SPEC, BLOCK_T)
            keys = _dot(states, _expander(weight, stride, span, chunk, rows, exist, DTYPE, SPEC), keys)
        return keys


@triton.jit
def _add_scores(
    scores,
    query,
    constants,
    latents,
    parts,
    spans,
    expand,
    inv_freq,
    bias,
    tile,
    start,
    DTYPE: tl.constexpr,
    SPECS: tl.constexpr,
):
    """Scores `[t, M]` with those of some frequencies added; `query`: its two halves, their numbers and frequencies."""
    q_low, q_high, f, frequency = query
    held, turn, biases = constants
    both = tl.zeros((scores.shape[0], 2 * f.shape[0]), tl.float32)
    for i in tl.static_range(len(SPECS)):
        both = _add_keys(both, latents[i], parts[i], spans[i], held[i], f, expand, tile, DTYPE, known(SPECS[i]))
    low, high = tl.split(tl.permute(tl.reshape(both, (scores.shape[0], 2, f.shape[0])), (0, 2, 1)))
    if bias is not None:
        low, high = low + biases[0][None, :], high + biases[1][None, :]
    # Keys turn by their offset in the tile, queries back by the position of its first token.
    if inv_freq is not None:
        if DTYPE.is_bf16():
            low, high = as_operand(low, DTYPE), as_operand(high, DTYPE)
        low, high = _rotated(low, high, turn[0], turn[1], DTYPE)
        cos, sin = _cos_sin(start * frequency, DTYPE)
        cos, sin = cos[:, None], sin[:, None]
        q_low, q_high = q_low * cos + q_high * sin, q_high * cos - q_low * sin
    scores = _dot(as_operand(low, DTYPE), as_operand(q_low, DTYPE), scores)
    return _dot(as_operand(high, DTYPE), as_operand(q_high, DTYPE), scores)


@triton.jit
def _query_tile(ptr, stride, inv_freq, positions, f, half, visible, scaling, DTYPE: tl.constexpr):
    """Both halves `[len(f), M]` of the queries at frequencies `f`, scaled and rotated; `f`, and its turns."""
    mask = (f < half)[:, None] & visible[None, :]
    low = widen(tl.load(ptr[None, :] + (f * stride)[:, None], mask, 0)) * scaling
    high = widen(tl.load(ptr[None, :] + ((half + f) * stride)[:, None], mask, 0)) * scaling
    if inv_freq is None:
        return low, high, f, f
    else:
        # Radians to units of 2^-32 turns, rounded.
        frequency = tl.load(inv_freq + f, f < half, 0).to(tl.float64) * 683565275.5764316  # 2^32 / 2 pi
        frequency = (frequency + 0.5).to(tl.int64).to(tl.int32)
        cos, sin = _cos_sin(positions[None, :] * frequency[:, None], DTYPE)
        return low * cos - high * sin, high * cos + low * sin, f, frequency


@triton.jit
def _no_values(SPEC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr):
    """Zeros for the sums of a piece's values: for each chunk `[SPEC.block, BLOCK_M]`, and of the middles."""
    CHUNKS: tl.constexpr = SPEC.chunks
    BLOCK_R: tl.constexpr = SPEC.block
    sums = ()
    for _ in tl.static_range(CHUNKS):
        middles = 0
        if SPEC.weighted:
            middles = tl.zeros((BLOCK_T, BLOCK_M), tl.float32)
        sums += ((tl.zeros((BLOCK_R, BLOCK_M), tl.float32), middles),)
    return sums


@triton.jit
def _add_values(
    sums,
    part,
    span,
    weights,
    decay,
    tile,
    ahead,
    stored,
    DTYPE: tl.constexpr,
    SPEC: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The sums of a piece's values, scaled by `decay`, with those of a tile added."""
    CHUNKS: tl.constexpr = SPEC.chunks
    added = ()
    for i in tl.static_range(CHUNKS):
        latents = latent_tile(part, span, SPEC.first + i, tile, ahead, DTYPE, SPEC, BLOCK_T)
        operand, middles = weights, sums[i][1]
        if SPEC.weighted:
            # The steps of the tokens go into their weights, the middles of their ranges are summed up by themselves.
            if not SPEC.ahead:
                stored = stored_of_tokens(part, span, SPEC.first + i, tile, SPEC, BLOCK_T)
            step, middle = parameters(stored, DTYPE, SPEC)
            operand, middles = weights * step[:, None], middles * decay[None, :] + weights * middle[:, None]
        added += ((_dot(tl.trans(latents), as_operand(operand, DTYPE), sums[i][0] * decay[None, :]), middles),)
    return added


@triton.jit
def _store_values(sums, ptr, visible, span, SPEC: tl.constexpr):
    CHUNKS: tl.constexpr = SPEC.chunks
    _, width, column, _ = span
    for i in tl.static_range(CHUNKS):
        channel = (SPEC.first + i) * SPEC.block + tl.arange(0, SPEC.block)
        mask = (channel < width)[:, None] & visible[None, :]
        summed = sums[i][0]
        if SPEC.weighted:
            summed += tl.sum(sums[i][1], 0)[None, :]
        tl.store(ptr[None, :] + (column + channel)[:, None], summed, mask)


@triton.jit
def _attend(
    query,
    query_stride,
    positions,
    left,
    expand,
    inv_freq,
    bias,
    keys,
    values,
    groups,
    blocks,
    target,
    scaling,
    sliding_window,
    DTYPE: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    TILES: tl.constexpr,  # of a block; 0: as many as its valid tokens fill
    LISTED: tl.constexpr,  # whether `slots` names the slot of each block; else block j stands in slot j
    SHARED: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Attention of a tile of queries to every `step`-th block; writes its sums, highest score and total.

    `query` and `positions` are pointers `[BLOCK_M]`, one for each query of the tile, `left` as many as there are from
    the first one on. `target`: the sums of all shares, how many there are, rows of each, tokens, and by how many shares
    those of this one stand behind the program's number.
    """
    visible = tl.arange(0, BLOCK_M) < left
    # The queries stay in registers, rotated to their positions, by pieces of frequencies.
    query_positions = tl.load(positions, visible, 0).to(tl.int32)
    queries = ()
    for i in tl.static_range(HALF // BLOCK_F):
        f = i * BLOCK_F + tl.arange(0, BLOCK_F)
        part = _query_tile(query, query_stride, inv_freq, query_positions, f, expand[4], visible, scaling, DTYPE)
        queries += (part,)
    slots, starts, counts, block, end, step = blocks
    key_spans, value_spans = _spans(keys, groups[0], KEYS), _spans(values, groups[1], VALUES)
    offsets = tl.arange(0, BLOCK_T)
    # As do the weights, the table of the offsets' angles and the bias.
    constants = ()
    for i in tl.static_range(len(queries)):
        constants += (_constants(queries[i], offsets, inv_freq, bias, key_spans, expand, DTYPE, KEYS),)
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_T, BLOCK_M), tl.float32)
    summed = ()
    for i in tl.static_range(len(VALUES)):
        summed += (_no_values(known(VALUES[i]), BLOCK_T, BLOCK_M),)

    # Blocks without valid tokens are at the end of a row: the number of those with some, by bisection.
    number = tl.maximum(tl.cdiv(end - block, step), 0)
    last = tl.load(counts + block + (number - 1) * step, number > 0, 0)
    least = tl.where(last > 0, number, 0)
    while least < number:
        middle = (least + number) // 2
        some = tl.load(counts + block + middle * step) > 0
        least, number = tl.where(some, middle + 1, least), tl.where(some, number, middle)
    # So is the number of blocks before all that the queries of the tile see.
    unseen = 0
    if sliding_window is not None:
        oldest = tl.min(tl.where(visible, query_positions, 2147483647), 0) - sliding_window + 1
        unseen, most = tl.zeros((), tl.int32), number
        while unseen < most:
            middle = (unseen + most) // 2
            j = block + middle * step
            is_unseen = tl.load(starts + j) + tl.load(counts + j) <= oldest
            unseen, most = tl.where(is_unseen, middle + 1, unseen), tl.where(is_unseen, most, middle)
    tiles = TILES
    if TILES == 0:
        tiles = tl.cdiv(last, BLOCK_T)

    next_slot = _slot(slots, block + unseen * step, number > unseen, LISTED)
    sides = (keys, values, key_spans, value_spans)
    next_ahead = _read_all(sides, next_slot.to(tl.int64), 0, KEYS, VALUES, BLOCK_T)
    for i in range(unseen, number):
        j = block + i * step
        block_start, count = tl.load(starts + j), tl.load(counts + j)
        slot, next_slot = next_slot, _slot(slots, j + step, i + 1 < number, LISTED)
        for t in range(tiles):
            first = t * BLOCK_T
            start = block_start + first
            tile = (slot.to(tl.int64), first, count)
            # What is stored of the next tile, of the last one's nothing that is used, is on its way meanwhile.
            ahead, here = next_ahead, t + 1 < tiles
            at = tl.where(here, slot, next_slot).to(tl.int64)
            next_ahead = _read_all(sides, at, tl.where(here, first + BLOCK_T, 0), KEYS, VALUES, BLOCK_T)
            zero = _nothing(t, LISTED, KEYS)
            keys_at, values_at = _moved(key_spans, zero, KEYS), _moved(value_spans, _nothing(t, LISTED, VALUES), VALUES)
            expand_at = (expand[0], expand[1], expand[2] + zero, expand[3], expand[4])
            latents = ()
            for p in tl.static_range(len(KEYS)):
                latents += (_held_latents(keys[p], keys_at[p], tile, ahead[0][p], DTYPE, known(KEYS[p]), BLOCK_T),)
            # What the tokens of the values need is on its way while keys are rebuilt.
            of_tokens = ()
            for p in tl.static_range(len(VALUES)):
                of_tokens += (_stored_of_tokens(values[p], values_at[p], tile, known(VALUES[p]), BLOCK_T),)
            # Keys are rebuilt, rotated and scored by pieces of frequencies, whose scores add up.
            scores = tl.zeros((BLOCK_T, BLOCK_M), tl.float32)
            for p in tl.static_range(len(queries)):
                scores = _add_scores(
                    scores,
                    queries[p],
                    constants[p],
                    latents,
                    keys,
                    keys_at,
                    expand_at,
                    inv_freq,
                    bias,
                    tile,
                    start,
                    DTYPE,
                    KEYS,
                )
            # A query sees the valid tokens up to its own position, and no more than fit its window.
            distance = query_positions - start
            seen = offsets[:, None] <= tl.minimum(distance, count - first - 1)[None, :]
            if sliding_window is not None:
                seen = seen & (offsets[:, None] > (distance - sliding_window)[None, :])
            scores = tl.where(seen, scores, float("-inf"))

            # The sums so far go to the scale of the new highest score; with none yet, any scale will do.
            higher = tl.maximum(highest, tl.max(scores, 0))
            reference = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp2(scores - reference[None, :])
            decay = tl.exp2(highest - reference)
            total = total * decay[None, :] + weights
            highest = higher
            # Values are summed up in the latent, weighted.
            gained = ()
            for p in tl.static_range(len(VALUES)):
                gained += (
                    _add_values(
                        summed[p],
                        values[p],
                        values_at[p],
                        weights,
                        decay,
                        tile,
                        ahead[1][p],
                        of_tokens[p],
                        DTYPE,
                        known(VALUES[p]),
                        BLOCK_T,
                    ),
                )
            summed = gained

    # Where the results go is computed now: kept during the loop, it would take registers.
    sums, total_shares, rows, length, further = target
    zero = _nothing(further, True, KEYS)
    first = (tl.program_id(2) + zero) * BLOCK_M
    row = (tl.program_id(0) + zero) * SHARED * length + first + tl.arange(0, BLOCK_M)
    row = (tl.program_id(1) + zero + further).to(tl.int64) * rows + row
    visible = first + tl.arange(0, BLOCK_M) < SHARED * length
    stats = sums + total_shares.to(tl.int64) * rows * WIDTH + row * 2
    sums += row * WIDTH
    for p in tl.static_range(len(VALUES)):
        _store_values(summed[p], sums, visible, value_spans[p], known(VALUES[p]))
    tl.store(stats, highest, visible)
    tl.store(stats + 1, tl.sum(total, 0), visible)


@triton.jit
def _stored_of_tokens(part, span, tile, SPEC: tl.constexpr, BLOCK_T: tl.constexpr):
    """`stored_of_tokens` of a piece of one chunk, which is read ahead, for its weights."""
    if SPEC.ahead and SPEC.weighted:
        return stored_of_tokens(part, span, 0, tile, SPEC, BLOCK_T)
    else:
        return 0


@triton.jit
def _slot(slots, block, exists, LISTED: tl.constexpr):
    """Slot of a block, some slot where there is none."""
    slot = block
    if LISTED:
        slot = tl.load(slots + block, exists, 0)
    return slot


@triton.jit
def _read_all(sides, slot, first, KEYS: tl.constexpr, VALUES: tl.constexpr, BLOCK_T: tl.constexpr):
    """`read_ahead` of all pieces of both sides."""
    keys, values, key_spans, value_spans = sides
    of_keys, of_values = (), ()
    for i in tl.static_range(len(KEYS)):
        of_keys += (read_ahead(keys[i], key_spans[i], slot, first, known(KEYS[i]), BLOCK_T),)
    for i in tl.static_range(len(VALUES)):
        of_values += (read_ahead(values[i], value_spans[i], slot, first, known(VALUES[i]), BLOCK_T),)
    return of_keys, of_values


@triton.jit
def _held_latents(part, span, tile, ahead, DTYPE: tl.constexpr, SPEC: tl.constexpr, BLOCK_T: tl.constexpr):
    """`latent_tile` of a piece of one chunk; longer ones are read chunk by chunk."""
    if SPEC.chunks == 1:
        return latent_tile(part, span, 0, tile, ahead, DTYPE, SPEC, BLOCK_T)
    else:
        return 0


@triton.jit(do_not_specialize=["total", "shares", "blocks", "length", "rows"])
def _attention_kernel(
    query,
    positions,
    inv_freq,
    weight,
    aligned,  # `_aligned` of it, for the packed blocks
    bias,
    sums,
    total,  # shares and tiles; behind the sums of all of them are the statistics
    keys,  # for each piece: packed, scale, zero point, spans, scale groups, four strides, scales of tokens, strides
    values,
    table,
    exact,  # for each tile: keys, values, start, count
    exact_spans,
    scaling,
    sliding_window,  # positions that a query sees at most; None: all up to its own
    shares,  # of the packed blocks; the sums of the tiles come after theirs
    blocks,
    length,
    rows,
    query_strides,
    position_stride,
    weight_stride,
    aligned_stride,
    table_strides,
    exact_strides,  # for each tile: of rows and tokens of keys, and of values, and of rows of start and count
    heads,
    size,
    DTYPE: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    EXACT_KEYS: tl.constexpr,
    EXACT_VALUES: tl.constexpr,
    SHARED: tl.constexpr,  # query heads of a key head
    KEY_HEADS: tl.constexpr,  # of a head group
    VALUE_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,  # of the sums
    ALIGNED: tl.constexpr,  # else the packed blocks take the weight itself
    KEYS_ARE_CACHED: tl.constexpr,  # not their latents: there is no weight
    TILES: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    EXACT_T: tl.constexpr,
):
    share, half = tl.program_id(1), size // 2
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    # The queries of a tile are heads that share a key head, and of each of them its tokens.
    first_query = tl.program_id(2) * BLOCK_M
    offs, left = first_query + tl.arange(0, BLOCK_M), SHARED * length - first_query
    query += batch.to(tl.int64) * query_strides[0]
    query += (head * SHARED + offs // length) * query_strides[1] + offs % length * query_strides[2]
    positions += batch * position_stride + offs % length
    # Without a weight every head is a group of its own.
    first_row = head * size
    if KEYS_ARE_CACHED:
        first_row = 0
    expand, expand_packed = (
        (weight, weight_stride, first_row, half, half),
        (weight, weight_stride, first_row, half, half),
    )
    if ALIGNED:
        expand_packed = (aligned, aligned_stride, head * 2 * HALF, HALF, half)
    if bias is not None:
        bias += first_row
    groups = (head // KEY_HEADS, head // VALUE_HEADS)
    # The last programs, which have no block more than the others, take the tokens in full precision: a tile of them is
    # a block of 16 bits whose slot is the row.
    if len(exact) > 0:
        # Number, from the last program on, of the tile that this program takes.
        nth = tl.num_programs(1) - 1 - share
        if nth < len(exact):
            tile, strides = exact[0], exact_strides[0]
            for i in tl.static_range(1, len(exact)):
                tile, strides = _choose(nth == i, exact[i], tile), _choose(nth == i, exact_strides[i], strides)
            key, value, start, count = tile
            key_row, key_stride, value_row, value_stride, start_row, count_row = strides
            key_spans, value_spans = exact_spans
            key_part = ((key, key, key, key_spans, key_spans, key_row, key_stride, 0, 0, key, (0, 0)),)
            value_part = ((value, value, value, value_spans, value_spans, value_row, value_stride, 0, 0, key, (0, 0)),)
            start += batch * start_row - batch
            count += batch * count_row - batch
            # Its sums stand behind those of the packed blocks' shares.
            _attend(
                query,
                query_strides[3],
                positions,
                left,
                expand,
                inv_freq,
                bias,
                key_part,
                value_part,
                groups,
                (start, start, count, batch, batch + 1, 1),
                (sums, total, rows, length, shares - share + nth),
                scaling,
                sliding_window,
                DTYPE,
                EXACT_KEYS,
                EXACT_VALUES,
                0,
                False,
                SHARED,
                WIDTH,
                HALF,
                BLOCK_F,
                BLOCK_M,
                EXACT_T,
            )
    if len(KEYS) > 0:  # noqa: SIM102 (what is known when compiling, then what is not)
        if share < shares:
            table += batch * table_strides[1]
            listed = (table, table + table_strides[0], table + 2 * table_strides[0], share, blocks, shares)
            _attend(
                query,
                query_strides[3],
                positions,
                left,
                expand_packed,
                inv_freq,
                bias,
                keys,
                values,
                groups,
                listed,
                (sums, total, rows, length, 0),
                scaling,
                sliding_window,
                DTYPE,
                KEYS,
                VALUES,
                TILES,
                True,
                SHARED,
                WIDTH,
                HALF,
                BLOCK_F,
                BLOCK_M,
                BLOCK_T,
            )


@triton.jit
def _choose(condition, chosen, other):
    """One of two tuples."""
    result = ()
    for i in tl.static_range(len(other)):
        result += (tl.where(condition, chosen[i], other[i]),)
    return result


@triton.jit
def _merged(sums, stats, row, column, width, shares, rows, WIDTH: tl.constexpr, BLOCK_S: tl.constexpr):
    """Columns of the sums of all shares of a row of queries on one scale, their highest score and their total."""
    highest, total = tl.full((), float("-inf"), tl.float32), tl.zeros((), tl.float32)
    summed = tl.zeros((column.shape[0],), tl.float32)
    # Shares are brought to one scale, a few at a time, as tiles are in `_attend`.
    for first in range(0, shares, BLOCK_S):
        share = first + tl.arange(0, BLOCK_S)
        offs = share.to(tl.int64) * rows + row
        peak = tl.load(stats + offs * 2, share < shares, float("-inf"))
        # Shares that saw no token do not count, nor lanes beyond the last share.
        mask = peak > float("-inf")
        higher = tl.maximum(highest, tl.max(peak, 0))
        reference = tl.where(higher == float("-inf"), 0.0, higher)
        factor, decay = tl.exp2(peak - reference), tl.exp2(highest - reference)
        total = total * decay + tl.sum(tl.load(stats + offs * 2 + 1, mask, 0) * factor, 0)
        tile = tl.load(sums + offs[:, None] * WIDTH + column[None, :], mask[:, None] & (column < width)[None, :], 0)
        summed = summed * decay + tl.sum(tile * factor[:, None], 0)
        highest = higher
    return summed, highest, tl.where(total == 0, 1.0, total)


@triton.jit(do_not_specialize=["shares", "rows", "length"])
def _merge_kernel(
    sums,
    output,
    log_sum,
    spans,
    weight,
    bias,
    weight_stride,
    size,  # rows of the weight for a head
    shares,
    rows,
    length,
    heads,
    DTYPE: tl.constexpr,
    WIDTH: tl.constexpr,
    SHARED_HEADS: tl.constexpr,  # query heads of a value head group
    SHARED: tl.constexpr,  # and of a value head, whose rows of the weight expand the sums; 0: they are not expanded
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The sums of all shares of a row over their total, or what they expand to, and the total's logarithm."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    head = row // length % heads
    width = tl.load(spans + head // SHARED_HEADS * 3 + 1)
    stats = sums + shares.to(tl.int64) * rows * WIDTH
    if SHARED == 0:
        summed, highest, total = _merged(sums, stats, row, at, width, shares, rows, WIDTH, BLOCK_S)
        tl.store(output + row * WIDTH + at, summed / total, at < WIDTH)
    else:
        # Rows of the weight `[BLOCK_N]` times the sums, whose columns are merged a few at a time.
        which, exists = head // SHARED * size + at, at < size
        expanded = tl.zeros((BLOCK_N,), tl.float32)
        highest, total = tl.full((), float("-inf"), tl.float32), tl.full((), 1.0, tl.float32)
        for first in range(0, width, BLOCK_N):
            column = first + tl.arange(0, BLOCK_N)
            summed, highest, total = _merged(sums, stats, row, column, width, shares, rows, WIDTH, BLOCK_S)
            mask = exists[:, None] & (column < width)[None, :]
            rows_of_it = widen(tl.load(weight + which[:, None] * weight_stride + column[None, :], mask, 0))
            expanded += tl.sum(rows_of_it * widen(as_operand(summed / total, DTYPE))[None, :], 1)
        if bias is not None:
            expanded += widen(tl.load(bias + which, exists, 0))
        tl.store(output + row * size + at, expanded, exists)
    # Scores are exponents of two; log(2) makes a natural logarithm of theirs.
    tl.store(log_sum + row, (highest + tl.log2(total)) * 0.6931471805599453, tl.program_id(1) == 0)


#: Types that the kernels take; others pass through float32.
_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

#: Most queries of a tile (with 16, registers spill), and sums of values that a program keeps; more are done by further
#: programs or launches.
_MAX_ROWS, _MAX_SUMS = 8, 8192

#: Tokens that are worth a program.
_TOKENS_OF_SHARE = 128


@lru_cache
def _wanted_programs(device: torch.device, resident: int) -> int:
    """Programs that fill a device, of which each multiprocessor takes so many."""
    if device.type != "cuda":
        return 4
    return resident * torch.cuda.get_device_properties(device).multi_processor_count


class _Span(NamedTuple):
    """Neighbouring channels of a head group: the first one as stored, how many, and the first one in the group."""

    start: int
    width: int
    column: int


class _Piece(NamedTuple):
    """A piece of a side: see `Spec`.

    Attributes:
        part: Index of the part.
        spec: What the kernel knows of it.
        spans, places: `[groups, 3]` int32, its `_Span` of each head group; the same as numbers.
        groups: `[channels of the part]` int32, scale group of each channel; `None`: scales per channel.
    """

    part: int
    spec: Spec
    spans: torch.Tensor
    places: tuple[_Span, ...]
    groups: torch.Tensor | None


def _pieces(channels: Sequence[int], widths: tuple[int, ...]) -> list[tuple[_Span, ...]]:
    """The spans of each piece, one for every head group, empty where a group has fewer pieces.

    Args:
        channels: Channel of each stored channel of a part.
        widths: Channels of each head group.
    """
    starts, found = group_starts(widths), [[] for _ in widths]
    for stored, channel in enumerate(channels):
        group = bisect_right(starts, channel) - 1
        spans, column = found[group], channel - starts[group]
        last = _Span(-1, 0, -1)
        if spans:
            last = spans[-1]
        # A channel that continues the last span, where it is stored and in the group, extends it.
        if (stored, column) == (last.start + last.width, last.column + last.width):
            spans[-1] = last._replace(width=last.width + 1)
        else:
            spans.append(_Span(stored, 1, column))
    return list(zip_longest(*found, fillvalue=_Span(0, 0, 0)))


def _straddles(spans: tuple[_Span, ...], group_of: list[int], block: int) -> bool:
    """Whether a chunk of `block` channels of a span lies in more than one scale group."""
    for start, width, _ in spans:
        for first in range(start, start + width, block):
            if len(set(group_of[first : min(first + block, start + width)])) > 1:
                return True
    return False


@lru_cache
def _side_layout(
    parts: tuple,
    channels: tuple[int, ...] | None,
    token_scaled: bool,
    widths: tuple[int, ...],
    length: int,
    block_t: int,
    pairs: bool,
    device,
) -> tuple[_Piece, ...]:
    """The pieces of a side.

    Args:
        parts: For each part bits, channels, run, groups, whether it is symmetric, the chains of a trellis, and whether
            all blocks have the same scales.
        channels: As in `PackedSide`.
        token_scaled: Whether tokens have scales of their own.
        widths: Channels of each head group.
        length, block_t: Tokens of a block and of a tile.
        pairs: Whether states are bfloat16, of which two are computed at a time.
    """
    layout, first = [], 0
    if channels is None:
        channels = range(sum(widths))
    for index, (bits, n, run, groups, symmetric, chains, calibrated) in enumerate(parts):
        table, group_of = None, []
        if groups:
            for group, width in enumerate(groups):
                group_of += [group] * width
            table = torch.tensor(group_of, dtype=torch.int32, device=device)
        if chains:
            places = torch.tensor(list(chain.from_iterable(map(range, chains))), dtype=torch.int32, device=device)
            # Points are bfloat16, how far they are from the middle: in lower halves, and in upper ones, as float32.
            points = (trellis.points_of(bits, device).float() - (trellis.LEVELS - 1) / 2).view(torch.int32)
            table = torch.cat([(points >> 16) & 0xFFFF, points, places])
        spec = Spec(
            bits=bits_of(bits),
            symmetric=symmetric,
            per_channel=groups is None,
            run=run,
            length=length,
            one_run=run >= length or run % block_t == 0,
            token_scaled=token_scaled,
            trellis=chains is not None,
        )
        if bits != 16:
            levels, spacing, offset = grid(bits)
            if chains:
                levels, spacing = trellis.LEVELS, 1
            scaled = {"levels": levels, "spacing": spacing, "offset": offset, "words": packed_words(run, bits)}
            whole = length % block_t == 0
            worded = whole and spec.one_run and spec.bits > 0
            # Calibrated scales are those of all blocks; a token's scale multiplies the distance from the middle.
            calibrated = calibrated and groups is None and not token_scaled and not chains
            spec = replace(spec, **scaled, whole=whole, worded=worded, calibrated=calibrated)
        for spans in _pieces(channels[first : first + n], widths):
            _, all_widths, _ = zip(*spans)
            widest = max(all_widths)
            # The widest chunk whose channels share a token's scale; if there is none, scales are read by channel.
            # Programs of long latents have eight warps: all have work where chunks are larger.
            most = 64
            if pairs and block_t == 64:
                most = 128
            block = fitting = power_of_two(widest, 16, most)
            while fitting >= 16 and _straddles(spans, group_of, fitting):
                fitting //= 2
            by_channel = fitting < 16
            if not by_channel:
                block = fitting
            own = replace(
                spec,
                block=block,
                chunks=-(-widest // block),
                by_channel=by_channel,
                align=math.gcd(16, *chain.from_iterable(spans)),
                filled=widest % block == 0 and set(all_widths) == {widest},
                # Of smaller tiles not every thread would have whole units, which the interpreter does not mind.
                worded=spec.worded and pairs and (INTERPRETED or block * block_t >= 2048),
            )
            layout.append(
                _Piece(index, own, torch.tensor(spans, dtype=torch.int32, device=device), tuple(spans), table)
            )
        first += n
    return tuple(layout)


def _bits(x: torch.Tensor | None) -> torch.Tensor | None:
    """A float tensor as the kernels take it: in the interpreter as bits."""
    if x is None or not INTERPRETED:
        return x
    return as_bits(x)


def _storage(
    part: PackedPart, spans: torch.Tensor, groups: torch.Tensor | None, token_scale: torch.Tensor | None
) -> tuple:
    """The runtime arguments of a piece; where it has no such tensor, another stands in that is not read."""
    packed = _bits(part.packed)
    scale = stand_in(_bits(part.scale), packed)
    zero_point = stand_in(_bits(part.zero_point), scale)
    slot_stride, stride, own_strides = 0, 0, (0, 0)
    if part.scale is not None:
        assert zero_point.stride() == scale.stride()
        stride = scale.stride(1)
        if scale.shape[0] > 1:  # else one scale for all slots
            slot_stride = scale.stride(0)
    if token_scale is not None:
        own_strides = token_scale.stride()[:2]
    strides = (packed.stride(0), packed.stride(1), slot_stride, stride)
    own = (stand_in(token_scale, packed), own_strides)
    return (packed, scale, zero_point, spans, stand_in(groups, spans), *strides, *own)


def _origins(part: PackedPart, spec: Spec) -> torch.Tensor:
    """`[channels of the part]`, float32 as int32: the calibrated code of what is nearest to 0."""
    step, zero = part.scale.float().flatten() * spec.spacing, part.scale.float().flatten() * -spec.offset
    if part.zero_point is not None:
        zero = part.zero_point.float().flatten()
    origins = (-zero / step).nan_to_num(0.0).clamp(0, spec.levels - 1).round()
    return origins.view(torch.int32)


def _side(
    side: PackedSide | None, widths: tuple[int, ...], length: int, block_t: int, pairs: bool, device
) -> tuple[list, list, list]:
    """Runtime arguments and `Spec`s of the pieces of a side, and their spans."""
    if side is None:
        return [], [], []
    parts, channels = [], None
    for part in side.parts:
        # What a layout follows from, as values that can be compared.
        symmetric = part.bits != 16 and part.zero_point is None
        chains = part.widths if part.trellis else None
        calibrated = part.bits != 16 and part.scale.shape[0] == 1
        parts.append((part.bits, part.packed.shape[2], part.run or length, part.groups, symmetric, chains, calibrated))
    if side.channels is not None:
        channels = tuple(side.channels.tolist())
    arguments, specs, places = [], [], []
    token_scaled = side.token_scale is not None
    for piece in _side_layout(tuple(parts), channels, token_scaled, tuple(widths), length, block_t, pairs, device):
        part, groups = side.parts[piece.part], piece.groups
        if piece.spec.calibrated:
            groups = _origins(part, piece.spec)
        arguments.append(_storage(part, piece.spans, groups, side.token_scale))
        specs.append(piece.spec)
        places.append(piece.places)
    return arguments, specs, places


@lru_cache
def _exact_layout(widths: tuple[int, ...], device) -> tuple[torch.Tensor, Spec]:
    """Spans and `Spec` of tokens in full precision."""
    spans = list(map(_Span, group_starts(widths), widths, repeat(0)))
    widest = max(widths)
    block = power_of_two(widest, 16, 64)
    filled = set(widths) == {widest} and widest % block == 0
    spec = Spec(bits=16, block=block, chunks=-(-widest // block), align=math.gcd(16, *widths), filled=filled)
    return torch.tensor(spans, dtype=torch.int32, device=device), spec


def _read_ahead(specs: list[Spec]) -> list[Spec]:
    """The specs of a side, of a single chunk as what is read ahead: there are registers for that of a tile."""
    if len(specs) != 1:
        return specs
    (spec,) = specs
    known_at_once = spec.weighted or spec.per_channel
    return [replace(spec, ahead=spec.worded and spec.chunks == 1 and not spec.trellis and known_at_once)]


def _launches(specs: list[Spec], rows: int) -> list[dict[int, Spec]]:
    """Specs by the index of their piece, of the sums that each launch keeps: together at most `_MAX_SUMS`."""
    launches, kept = [{}], 0
    for index, spec in enumerate(specs):
        first, room = 0, rows * spec.block
        while first < spec.chunks:
            # A launch keeps one chunk at least, even if it is larger than the bound.
            fit = max((_MAX_SUMS - kept) // room, int(kept == 0))
            if fit == 0:
                launches.append({})
                kept = 0
                continue
            chunks = min(fit, spec.chunks - first)
            launches[-1][index] = replace(spec, first=first, chunks=chunks)
            first, kept = first + chunks, kept + chunks * room
    return launches


#: Aligned weights by the weight that they are copies of.
_aligned_weights: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _aligned(weight: torch.Tensor, columns: tuple, heads: int, half: int) -> torch.Tensor:
    """A copy of the keys' expansion whose pieces begin at columns that wide loads can read, made once for a weight.

    Args:
        weight: `[heads * d, r]`.
        columns: Of each piece the first column, columns, and `_Span` of each head group.
        heads: Key heads.
        half: Rows for half a head, d / 2 at least.

    Returns:
        `[heads * 2 * half, columns of all pieces]`, zeros where a piece has none.
    """
    version = 0 if weight.is_inference() else weight._version
    known = _aligned_weights.setdefault(weight, {})
    key = (version, columns, weight.dtype)
    if key not in known:
        known.clear()
        total = columns[-1][0] + columns[-1][1]
        rows = weight.detach().view(heads, 2, -1, weight.shape[1])
        aligned = weight.new_zeros((heads, 2, half, total), requires_grad=False)
        for first, _, spans in columns:
            for group, of_group in enumerate(zip(rows.chunk(len(spans)), aligned.chunk(len(spans)), strict=True)):
                _, width, column = spans[group]
                source, target = of_group
                target[:, :, : source.shape[2], first : first + width] = source[..., column : column + width]
        known[key] = aligned.view(-1, total)
    return known[key]


def _exact_tensors(tile: Tile) -> tuple[torch.Tensor, ...]:
    return (_bits(tile.keys), _bits(tile.values), tile.start, tile.count)


def _exact_strides(tile: Tile) -> tuple[int, ...]:
    key, value = tile.keys.stride(), tile.values.stride()
    return (key[0], key[2], value[0], value[2], tile.start.stride(0), tile.count.stride(0))


class _Shape(NamedTuple):
    """All that a launch follows from besides the blocks themselves.

    Attributes:
        query: `[B, H_q, L, d]`.
        key_heads: Heads of the keys.
        key_widths, value_widths: Channels of each head group.
        block_length: Tokens of a block.
        identity: Whether keys are cached, not latents of them.
    """

    query: tuple[int, int, int, int]
    dtype: torch.dtype
    device: torch.device
    key_heads: int
    key_widths: tuple[int, ...]
    value_widths: tuple[int, ...]
    block_length: int
    identity: bool


class _LaunchRecord:
    """Arguments of the kernels for one layer, but for the tensors of a step and the number of blocks."""

    def __init__(self, keys: PackedSide | None, values: PackedSide | None, shape: _Shape):
        batch, heads, length, size = shape.query
        key_heads, device = shape.key_heads, shape.device
        shared, rows = heads // key_heads, batch * heads * length
        self.width, block_m = max(shape.value_widths), power_of_two(shared * length, 8, _MAX_ROWS)
        # Long latents take the registers of more threads; float32 takes more room still, and tiles of fewer tokens. In
        # short blocks there is not enough work for as many. Pairs of bfloat16 take half of the room.
        wide, pairs, short = shape.dtype == torch.float32, shape.dtype == torch.bfloat16, shape.block_length <= 32
        long = max(shape.key_widths) > 64 or wide
        block_t, exact_t, block_f, num_warps = 64, 64, 32, 4
        if pairs:
            block_f = 64
        if long:
            block_t, exact_t, block_f, num_warps = 32, 32, 64, 8
        if long and pairs:
            block_t = 64
            if short:
                num_warps = 4
        if wide:
            block_f = 16
        if short:
            block_t = 32
        key_pieces, key_specs, places = _side(keys, shape.key_widths, shape.block_length, block_t, pairs, device)
        value_pieces, value_specs, _ = _side(values, shape.value_widths, shape.block_length, block_t, pairs, device)
        for i, spec in enumerate(value_specs):
            by_token = spec.worded and not (spec.per_channel or spec.by_channel or spec.token_scaled)
            value_specs[i] = replace(spec, weighted=by_token)
        key_specs, value_specs = _read_ahead(key_specs), _read_ahead(value_specs)
        # With fewer frequencies at a time a third program fits a multiprocessor, whose warps wait less.
        registers, resident = None, 2
        if all(spec.ahead for spec in (*key_specs, *value_specs)) and not long:
            block_f, registers, resident = 32, 168, 3
        # Tokens in full precision are a piece with one span per head group.
        key_spans, exact_keys = _exact_layout(shape.key_widths, device)
        value_spans, exact_values = _exact_layout(shape.value_widths, device)
        half = power_of_two(size // 2, 16, size)

        #: First column in an aligned weight and spans of each piece, where the weight itself has columns that are not.
        self.half, self.columns = half, ()
        if any(spec.align % 8 for spec in key_specs) and not shape.identity:
            column = 0
            for i, spec in enumerate(key_specs):
                self.columns += ((column, spec.chunks * spec.block, places[i]),)
                key_specs[i] = replace(spec, aligned=True, column=column)
                column += spec.chunks * spec.block
        # The specs of the keys, those of the tokens in full precision last, with how they are expanded.
        expanded = []
        for spec in (*key_specs, exact_keys):
            expanded.append(replace(spec, held=spec.chunks == 1 and not long, identity=shape.identity))

        #: Grid without the shares, and programs that fit the device for each of them.
        self.grid = (batch * key_heads, -(-shared * length // block_m))
        wanted = _wanted_programs(device, resident)
        self.fitting = max(wanted // (self.grid[0] * self.grid[1]), 1)
        self.block_length, self.rows, self.packed = shape.block_length, rows, bool(key_pieces)
        common = {
            "keys": tuple(key_pieces),
            "exact_spans": (key_spans, value_spans),
            "length": length,
            "rows": rows,
            "heads": key_heads,
            "size": size,
            "DTYPE": _DTYPES[shape.dtype],
            "KEYS": tuple(expanded[:-1]),
            "EXACT_KEYS": (expanded[-1],),
            "SHARED": shared,
            "KEY_HEADS": key_heads // len(shape.key_widths),
            "VALUE_HEADS": key_heads // len(shape.value_widths),
            "WIDTH": self.width,
            "ALIGNED": bool(self.columns),
            "KEYS_ARE_CACHED": shape.identity,
            "TILES": -(-shape.block_length // block_t),
            "HALF": half,
            "BLOCK_F": min(half, block_f),
            "BLOCK_M": block_m,
            "BLOCK_T": block_t,
            "EXACT_T": exact_t,
            "num_warps": num_warps,
            "num_stages": 1,  # the compiler's own reading ahead takes more registers than ours
            "maxnreg": registers,
        }
        self.launches: list[Launcher] = []
        packed_launches, exact_launches = _launches(value_specs, block_m), _launches([exact_values], block_m)
        for packed, exact in zip_longest(packed_launches, exact_launches, fillvalue={}):
            own = {
                "values": tuple(map(value_pieces.__getitem__, packed)),
                "VALUES": tuple(packed.values()),
                "EXACT_VALUES": tuple(exact.values()),
            }
            self.launches.append(Launcher(_attention_kernel, common | own))
        # A program merges 64 sums of a query head's row, or expands them to 64 of its outputs.
        self.heads = heads
        merge = {
            "spans": value_spans,
            "rows": rows,
            "length": length,
            "heads": heads,
            "DTYPE": _DTYPES[shape.dtype],
            "WIDTH": self.width,
            "SHARED_HEADS": heads // len(shape.value_widths),
            "BLOCK_S": 64,
            "BLOCK_N": 64,
            "num_warps": 4,
        }
        self.merge = Launcher(_merge_kernel, merge)

    def merge_with(self, expand_values: Callable | None, states: torch.Tensor) -> tuple[tuple[int, int], dict, dict]:
        """Grid of the merge, its tensors but for the sums, among them one for the outputs, and its numbers."""
        channels, dtype, weight, bias, shared = self.width, torch.float32, states, None, 0
        if expand_values is not None:
            weight, bias, heads = expand_values.weight, expand_values.bias, expand_values.num_heads
            channels, shared = weight.shape[0] // heads, self.heads // heads
            dtype = torch.float32 if INTERPRETED else states.dtype
        output = torch.empty((*states.shape[:3], channels), dtype=dtype, device=states.device)
        tensors = {"output": output, "weight": _bits(weight), "bias": _bits(bias)}
        numbers = {"size": channels, "weight_stride": weight.stride(0), "SHARED": shared}
        return (self.rows, -(-channels // 64)), tensors, numbers

    def shares(self, blocks: int, exact: int) -> tuple[int, int]:
        """Shares into which the packed blocks are dealt, and programs: one wave, if there are enough blocks."""
        worth = -(-blocks * self.block_length // _TOKENS_OF_SHARE)
        shares = min(self.fitting, worth, blocks)
        return shares, max(shares, exact)


#: Records by the keys of the blocks that they are for: a pool makes those once.
_records: WeakKeyDictionary[PackedSide, dict[_Shape, _LaunchRecord]] = WeakKeyDictionary()


@lru_cache(maxsize=64)
def _record_without_blocks(shape: _Shape) -> _LaunchRecord:
    return _LaunchRecord(None, None, shape)


def _record(cache: PackedCache, shape: _Shape) -> _LaunchRecord:
    if cache.keys is None:
        return _record_without_blocks(shape)
    records = _records.setdefault(cache.keys, {})
    if shape not in records:
        records[shape] = _LaunchRecord(cache.keys, cache.values, shape)
    return records[shape]


#: Whether launches only compile: `compiled_together`.
_compiles_only: ContextVar[bool] = ContextVar("compiles_only", default=False)


@contextmanager
def compiled_together() -> Iterator[None]:
    """Within, nothing is launched: the kernels of `latent_attention` are compiled side by side, by the end at last.

    What is returned meanwhile is not computed.
    """
    token = _compiles_only.set(True)
    try:
        with ThreadPoolExecutor(os.cpu_count()) as threads, triton.AsyncCompileMode(threads):
            yield
    finally:
        _compiles_only.reset(token)


def _launch(launcher: Launcher, grid: tuple[int, ...], tensors: dict, numbers: dict) -> None:
    if not _compiles_only.get():
        launcher.start(grid, tensors, numbers)
    elif not INTERPRETED:
        launcher.compile(grid, tensors, numbers)


def latent_attention(query: LatentQuery, cache: PackedCache, expand_values: Callable | None = None) -> Attended:
    """As `latent_attention` in `modules/kernels/attention.py`, all in float32, without weights.

    With `expand_values`, an `ALinear`, the sums are expanded to the outputs of the heads, in the queries' type.

    Matrix products are in the type of the query, sums in float32. The device is not waited for: how the work is cut
    follows from the shapes alone.
    """
    states, positions, rope, expand_keys = query.states, query.positions, query.rope, query.expand_keys
    if states.dtype not in _DTYPES:
        states = states.float()
    exact = (*cache.before, *cache.after)
    # Keys that are cached themselves have no weight; the queries stand in, and are not read as one.
    weight, bias = _bits(states), None
    if expand_keys is not None:
        weight, bias = _bits(expand_keys.weight), _bits(expand_keys.bias)
    inv_freq, scaling = None, query.scaling * _LOG2_E  # the kernels take powers of two
    if rope is not None:
        inv_freq, scaling = rope.inv_freq, scaling * rope.attention_scaling**2
    sliding_window = query.sliding_window
    if sliding_window is not None:
        sliding_window = min(sliding_window, 1 << 30)  # as positions, 32 bits hold it
    key_heads, key_widths = query.key_layout(cache)
    shape = _Shape(
        tuple(states.shape),
        states.dtype,
        states.device,
        key_heads,
        tuple(key_widths),
        tuple(query.value_widths),
        cache.block_length,
        expand_keys is None,
    )
    record = _record(cache, shape)
    aligned = weight
    if record.columns:
        aligned = _bits(_aligned(expand_keys.weight, record.columns, key_heads, record.half))
    blocks, table_strides = 0, (0, 0)
    if cache.table is not None:
        table_strides = cache.table.stride()[:2]
    if record.packed:
        blocks = cache.table.shape[2]
    # Every tile in full precision has a share of its own, behind those of the packed blocks.
    shares, programs = record.shares(blocks, len(exact))
    total = shares + len(exact)
    log_sum = torch.empty(states.shape[:3], dtype=torch.float32, device=states.device)
    # Sums and, behind those of all shares, the highest score and the total of each.
    sums = torch.empty(total * record.rows * (record.width + 2), dtype=torch.float32, device=states.device)
    tensors = {
        "query": _bits(states),
        "positions": positions,
        "inv_freq": inv_freq,
        "weight": weight,
        "aligned": aligned,
        "bias": bias,
        "sums": sums,
        "table": cache.table,
        "exact": tuple(map(_exact_tensors, exact)),
    }
    numbers = {
        "total": total,
        "scaling": scaling,
        "sliding_window": sliding_window,
        "shares": shares,
        "blocks": blocks,
        "query_strides": states.stride(),
        "position_stride": positions.stride(0),
        "weight_stride": weight.stride(0),
        "aligned_stride": aligned.stride(0),
        "table_strides": table_strides,
        "exact_strides": tuple(map(_exact_strides, exact)),
    }
    with torch.cuda.device_of(states):
        if programs:
            for launch in record.launches:
                _launch(launch, (record.grid[0], programs, record.grid[1]), tensors, numbers)
        grid, merged, numbers = record.merge_with(expand_values, states)
        _launch(record.merge, grid, merged | {"sums": sums, "log_sum": log_sum}, numbers | {"shares": total})
    output = merged["output"]
    return Attended(output if expand_values is None else output.to(query.states.dtype), log_sum)
