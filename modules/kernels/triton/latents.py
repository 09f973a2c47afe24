"""Tiles of packed latents as operands of matrix products, in Triton: unpacked and scaled in registers.

A code becomes a float by or-ing it into the mantissa of 128 (bfloat16, in pairs) or 2^23. Where a tile is whole words,
each word is read once and unpacked two codes at a time, in int32 that hold a pair of bfloat16. Every operation on such
a pair is rounded, which is what plain PyTorch does in that type.

Triton's interpreter has bfloat16 in name only. There it goes in as the int16 of its bits, and operands of products are
float32 rounded to it, which gives what tensor cores give.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from modules.kernels.triton.common import INTERPRETED, low_bits, power_of_three, widen

_INTERPRETED = tl.constexpr(INTERPRETED)


@dataclass(frozen=True)
class Spec:
    """Constants with which a kernel is compiled for a piece of one side.

    A piece is, of a `PackedPart` and for every head group, a run of channels that are neighbours in the group too.

    Attributes:
        bits: 0: ternary.
        levels, spacing, offset: `modules.quant_utils.grid`.
        run, words, length: Tokens and words of a run, tokens of a block.
        one_run: Whether a tile lies in one run.
        whole, filled: Whether tiles never overrun a block, and chunks never a group's channels.
        by_channel: Whether a chunk of channels lies in more than one scale group of a token.
        token_scaled: Whether tokens have scales of their own.
        trellis: Whether codes are those of a trellis.
        worded: Whether a tile is whole words of every plane, and states bfloat16.
        calibrated: Whether the scales of all blocks are the same.
        weighted: Whether the scales of its tokens go into their weights.
        ahead: Whether what is stored of a tile is read while the one before it is computed.
        block, chunks, first: Channels of a chunk, how many chunks, and the first one.
        held: Whether the weight of its keys is kept from tile to tile.
        identity: Whether it holds the keys themselves, which no weight expands.
        aligned, column: Whether the weight is that of `_aligned`, and the piece's first column in it.
        align: What divides where its channels start and how many they are, so that loads are wide.
    """

    bits: int
    levels: int = 0
    spacing: int = 1
    offset: int = 0
    symmetric: bool = False
    per_channel: bool = False
    run: int = 0
    words: int = 0
    length: int = 0
    one_run: bool = False
    whole: bool = False
    filled: bool = False
    by_channel: bool = False
    token_scaled: bool = False
    trellis: bool = False
    worded: bool = False
    calibrated: bool = False
    weighted: bool = False
    ahead: bool = False
    block: int = 64
    chunks: int = 1
    first: int = 0
    held: bool = False
    identity: bool = False
    aligned: bool = False
    column: int = 0
    align: int = 1


@triton.constexpr_function
def known(value):
    """An element of a constexpr tuple, as what is known when compiling: Triton 3.6 hands it over bare."""
    return value


@triton.jit
def as_operand(x, DTYPE: tl.constexpr):
    """`x` as an operand of matrix products in `DTYPE`."""
    if _INTERPRETED and DTYPE.is_bf16():
        # Round to the upper 16 bits, halves to even.
        bits = widen(x).to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def _codes(packed, before, within, mask, columns, stride, BITS: tl.constexpr):
    """Codes `[t, n]` of a plane that starts at row `before`, for the tokens `within` it; 0 bits: ternary."""
    if BITS == 0:
        PER_WORD: tl.constexpr = 20
    else:
        PER_WORD: tl.constexpr = 32 // BITS
    row, element = before + within // PER_WORD, (within % PER_WORD)[:, None]
    words = tl.load(packed + row[:, None] * stride + columns[None, :], mask, 0)
    if BITS == 0:
        # Digits of a byte without a division: see `modules/quant_utils.py`.
        digits = ((words >> (element // 5 * 8)) & 255) * power_of_three(element % 5)
        return ((digits & 255) * 3) >> 8
    else:
        return (words >> (element * BITS)) & ((1 << BITS) - 1)


@triton.jit
def _whole_codes(packed, where, mask, columns, stride, SPEC: tl.constexpr):
    """Codes `[t, n]` of all planes; `where`: first row of the run, tokens within it, tokens of the run."""
    before, within, tokens = where
    LOW: tl.constexpr = low_bits(SPEC.bits)
    codes = _codes(packed, before, within, mask, columns, stride, LOW)
    if SPEC.bits > LOW:
        # The high bits stand in a plane of their own behind that of the low ones.
        before += tl.cdiv(tokens, 32 // LOW)
        codes |= _codes(packed, before, within, mask, columns, stride, SPEC.bits - LOW) << LOW
    return codes


@triton.jit
def _fma(x, y, z):
    """`x * y + z` of pairs of bfloat16 in int32, each rounded once."""
    return tl.inline_asm_elementwise(
        "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", (x, y, z), dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _both(low, high):
    """Pairs of bfloat16 in int32 of two tensors of float32."""
    return tl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", (low, high), dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _halves(pairs):
    """Both bfloat16 of pairs in int32."""
    low, high = pairs.to(tl.int16), (pairs >> 16).to(tl.int16)
    return low.to(tl.bfloat16, bitcast=True), high.to(tl.bfloat16, bitcast=True)


@triton.jit
def _and_or(x, y, MASK: tl.constexpr):
    """`x & MASK | y` in one instruction, which the compiler does not find where `y` is a constant too."""
    if _INTERPRETED:
        return (x & MASK) | y
    else:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", (x, MASK, y), dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def _looked_up(table, index):
    """Elements of a table of int32 at four times `index`; a known load the compiler would give a layout of its own."""
    if _INTERPRETED:
        return tl.load(table + index // 4)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b64 a; cvt.u64.u32 a, $1; add.s64 a, a, $2; ld.global.nc.b32 $0, [a]; }",
            "=r,r,l",
            (index, table.to(tl.int64)),
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def _joined(x, FIRST: tl.constexpr):
    """Four of the tensors of a tuple, in two dimensions more, which lie in the registers of a thread."""
    low = tl.join(x[FIRST], x[FIRST + 1])
    return tl.join(low, tl.join(x[FIRST + 2], x[FIRST + 3]))


@triton.jit
def _read(ptr, known):
    """What is at pointers, 0 where it is not `known`, in the layout of what it is combined with.

    `tl.load` has a layout of its own, for which the compiler follows whatever depends on it: hundreds take it minutes.
    """
    if _INTERPRETED or ptr.dtype.element_ty.primitive_bitwidth < 32:
        return tl.load(ptr, known, 0)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.global.nc.b32 $0, [$1]; }",
            "=&r,l,r",
            (ptr.to(tl.int64), known.to(tl.int32)),
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        ).to(ptr.dtype.element_ty, bitcast=True)


@triton.jit
def _pairs(ptr, column, rows, mask, N: tl.constexpr, WIDE: tl.constexpr):
    """What `ptr` has at `rows`, and there at `N` even columns from `column` on, `[len(rows), N]`; and at the odd ones.

    `mask`: which of the even columns there are, of the odd ones, and of all in order. `WIDE`: whether two are read at
    once.
    """
    if WIDE:
        both = tl.load(ptr + rows[:, None] + (column + tl.arange(0, 2 * N))[None, :], mask[2][None, :], 0)
        return tl.split(tl.reshape(both, (rows.shape[0], N, 2)))
    else:
        at = ptr + rows[:, None] + (column + 2 * tl.arange(0, N))[None, :]
        return tl.load(at, mask[0][None, :], 0), _read(at + 1, mask[1][None, :])


@triton.jit
def _plane(
    packed,
    token,
    mask,
    column,
    stride,
    BACK: tl.constexpr,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,
    N: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Words of a plane of `BITS` bits, `BACK` before the even and the odd channels, each `[len(token), N]`: `_pairs`.

    `packed` points to the plane, `token` has the first of every `UNIT` tokens, which one thread unpacks.
    """
    PER_WORD: tl.constexpr = 32 // BITS
    words = ()
    for i in tl.static_range(max(UNIT // PER_WORD, 1)):
        row = (token // PER_WORD + i) * stride
        if BACK == 0:
            words += (_pairs(packed, column, row, mask, N, WIDE),)
        else:
            at = packed + row[:, None] + (column - BACK + 2 * tl.arange(0, N))[None, :]
            words += ((_read(at, mask[0][None, :]), _read(at + 1, mask[1][None, :])),)
    return words


@triton.jit
def _add_plane(fields, words, token, BITS: tl.constexpr, UNIT: tl.constexpr, AT: tl.constexpr, MASK: tl.constexpr):
    """`fields` with the codes of `_plane` or-ed into their halves, in the bits `MASK`, from bit `AT` on."""
    PER_WORD: tl.constexpr = 32 // BITS
    halves, added = (), ()
    for i in tl.static_range(len(words)):
        even, odd = words[i]
        if UNIT < PER_WORD:
            shift = (token % PER_WORD * BITS)[:, None]
            even, odd = even >> shift, odd >> shift
        # The codes of two neighbouring channels lie side by side, in the halves of a word.
        halves += ((even & 0xFFFF) | (odd << 16), ((even >> 16) & 0xFFFF) | (odd & -65536))
    for i in tl.static_range(UNIT):
        if BITS * i % 16 >= AT:
            field = halves[BITS * i // 16] >> (BITS * i % 16 - AT)
        else:
            field = halves[BITS * i // 16] << (AT - BITS * i % 16)
        added += (_and_or(field, fields[i], MASK * 0x10001),)
    return added


@triton.jit
def _in_order(fields, N: tl.constexpr):
    """The fields of all units of tokens, in the order of the tokens: `[tokens, N]`."""
    UNIT: tl.constexpr = len(fields)
    joined = tl.join(_joined(fields, 0), _joined(fields, 4))
    if UNIT == 16:
        joined = tl.join(joined, tl.join(_joined(fields, 8), _joined(fields, 12)))
        joined = tl.permute(joined, (0, 5, 4, 3, 2, 1))
    else:
        joined = tl.permute(joined, (0, 4, 3, 2, 1))
    return tl.reshape(joined, (joined.shape[0] * UNIT, N))


@triton.jit
def _units(first, SPEC: tl.constexpr, BLOCK_T: tl.constexpr):
    """Of the tokens of a tile that one thread unpacks, the first: fewer where the tile is small, that all have some."""
    UNIT: tl.constexpr = 16 if BLOCK_T * SPEC.block >= 4096 else 8
    return first + tl.arange(0, BLOCK_T // UNIT) * UNIT


@triton.jit
def _words(part, at, first, mask, column, BACK: tl.constexpr, SPEC: tl.constexpr, BLOCK_T: tl.constexpr):
    """Words of all planes of a tile: `_plane`. `at`: where the block's begin."""
    packed, stride = part[0], part[6]
    LOW: tl.constexpr = low_bits(SPEC.bits)
    N: tl.constexpr = SPEC.block // 2
    WIDE: tl.constexpr = SPEC.align % 2 == 0
    run = first // SPEC.run
    packed += at + run * SPEC.words * stride
    token = _units(first - run * SPEC.run, SPEC, BLOCK_T)
    UNIT: tl.constexpr = BLOCK_T // token.shape[0]
    planes = (_plane(packed, token, mask, column, stride, BACK, LOW, UNIT, N, WIDE),)
    if SPEC.bits > LOW:
        # The high bits stand in a plane of their own behind that of the low ones.
        packed += tl.cdiv(tl.minimum(SPEC.run, SPEC.length - run * SPEC.run), 32 // LOW) * stride
        planes += (_plane(packed, token, mask, column, stride, BACK, SPEC.bits - LOW, UNIT, N, WIDE),)
    return planes


@triton.jit
def _add_codes(fields, planes, first, SPEC: tl.constexpr, BLOCK_T: tl.constexpr, AT: tl.constexpr):
    """`fields` with the codes of a tile of whole words, of neighbouring channels in their halves, or-ed into them.

    From bit `AT` of each half on; of a trellis' window no more than its bits. A field is one of each unit of tokens.
    """
    LOW: tl.constexpr = low_bits(SPEC.bits)
    LIMIT: tl.constexpr = 0x7F << 2 if SPEC.trellis else 0xFFFF
    token = _units(first - first // SPEC.run * SPEC.run, SPEC, BLOCK_T)
    UNIT: tl.constexpr = BLOCK_T // token.shape[0]
    MASK: tl.constexpr = (((1 << LOW) - 1) << AT) & LIMIT
    fields = _add_plane(fields, planes[0], token, LOW, UNIT, AT, MASK)
    if SPEC.bits > LOW:
        HIGH_MASK: tl.constexpr = (((1 << (SPEC.bits - LOW)) - 1) << (AT + LOW)) & LIMIT
        fields = _add_plane(fields, planes[1], token, SPEC.bits - LOW, UNIT, AT + LOW, HIGH_MASK)
    return fields


@triton.jit
def _stored_parameters(part, slot, offs, mask, SPEC: tl.constexpr):
    """Scales and zero points at some offsets, as they are stored."""
    _, scale, zero_point, _, _, _, _, scale_slot, _, _, _ = part
    step = tl.load(scale + slot * scale_slot + offs, mask, 0)
    if SPEC.symmetric:
        return step, step
    else:
        return step, tl.load(zero_point + slot * scale_slot + offs, mask, 0)


@triton.jit
def parameters(stored, DTYPE: tl.constexpr, SPEC: tl.constexpr):
    """Float32 steps of the codes, and what the middle of their range stands for, of what is stored."""
    step = widen(stored[0])
    zero = step * -SPEC.offset
    if not SPEC.symmetric:
        zero = widen(stored[1])
    step *= SPEC.spacing
    if DTYPE.is_fp16():
        # The last level of a group may have been rounded beyond the type.
        zero = tl.maximum(zero, -65504.0)
        step = tl.minimum(step, (65504.0 - zero) * (1 / (SPEC.levels - 1)))
    return step, zero + step * ((SPEC.levels - 1) * 0.5)


@triton.jit
def stored_of_tokens(part, span, chunk, tile, SPEC: tl.constexpr, BLOCK_T: tl.constexpr):
    """As `_stored_parameters`, of the tokens of a tile, for a chunk that lies in one scale group."""
    groups, scale_stride = part[4], part[8]
    token = tile[1] + tl.arange(0, BLOCK_T)
    group = tl.load(groups + span[0] + chunk * SPEC.block, chunk * SPEC.block < span[1], 0)
    return _stored_parameters(part, tile[0], token * scale_stride + group, token < SPEC.length, SPEC)


@triton.jit
def _channels(span, chunk, SPEC: tl.constexpr):
    """First channel of a chunk as stored; which of its even channels there are, of the odd ones, of all in order."""
    start, width, _, _ = span
    first = chunk * SPEC.block
    even, both = first + 2 * tl.arange(0, SPEC.block // 2), first + tl.arange(0, SPEC.block)
    exists = (even < width, even + 1 < width, both < width)
    if SPEC.filled:
        exists = (even >= 0, even >= 0, both >= 0)
    return start + first, exists


@triton.jit
def _stored_of_pairs(part, at, first, column, exists, SPEC: tl.constexpr):
    """As `_stored_parameters`, of the run's even channels, and of the odd ones. `at`: where the block's begin."""
    _, scale, zero_point, _, _, _, _, _, scale_stride, _, _ = part
    N: tl.constexpr = SPEC.block // 2
    WIDE: tl.constexpr = SPEC.align % 2 == 0
    row = tl.full((1,), first // SPEC.run, tl.int32) * scale_stride
    even, odd = _pairs(scale + at, column, row, exists, N, WIDE)
    if SPEC.symmetric:
        return (even, even), (odd, odd)
    else:
        zeros = _pairs(zero_point + at, column, row, exists, N, WIDE)
        return (even, zeros[0]), (odd, zeros[1])


@triton.jit
def read_ahead(part, span, slot, first, SPEC: tl.constexpr, BLOCK_T: tl.constexpr):
    """What is stored of a tile of one chunk, of the block in a slot: its words, and the parameters of channels."""
    if not SPEC.ahead:
        return 0
    else:
        column, exists = _channels(span, 0, SPEC)
        stored = 0
        if SPEC.per_channel:
            at = slot * part[7]
            stored = _stored_of_pairs(part, at, first, column, exists, SPEC)
        return _words(part, slot * part[5], first, exists, column, 0, SPEC, BLOCK_T), stored


@triton.jit
def _factors(part, slot, token, valid, head_group):
    """Float32 factors of tokens, by which their distance from the middles of the ranges is multiplied."""
    ptr = part[9] + slot * part[10][0] + token * part[10][1] + head_group
    if _INTERPRETED:
        byte = tl.load(ptr, valid, 0).to(tl.int32)
    else:
        # Where the compiler sees that bytes are read, it reads the operands of products in an order that costs moves.
        byte = tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.global.nc.u8 $0, [$1]; }",
            "=&r,l,r",
            (ptr.to(tl.int64), valid.to(tl.int32)),
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return tl.exp2((byte.to(tl.float32) - 128) / 16)


@triton.jit
def _whole_words(part, span, chunk, tile, ahead, DTYPE: tl.constexpr, SPEC: tl.constexpr, BLOCK_T: tl.constexpr):
    """As `latent_tile`, bfloat16 of whole words, each of which is read once and unpacked two codes at a time."""
    groups, scale_stride = part[4], part[8]
    slot, first, _ = tile
    MIDDLE: tl.constexpr = (SPEC.levels - 1) * 0.5
    PAIRED: tl.constexpr = not _INTERPRETED
    column, both = _channels(span, chunk, SPEC)
    exists, odd_exists, _ = both
    columns = column + 2 * tl.arange(0, SPEC.block // 2)
    token = first + tl.arange(0, BLOCK_T)
    # Pairs of bfloat16 have their codes in the mantissas of 128, doubled: half of a code has a bit behind the point.
    MANTISSA: tl.constexpr = PAIRED and SPEC.bits < 8 and not SPEC.trellis
    DOUBLED: tl.constexpr = MANTISSA and not SPEC.calibrated
    fields = ()
    for _ in tl.static_range(BLOCK_T // _units(first, SPEC, BLOCK_T).shape[0]):
        fields += (tl.full((), 0x43004300 if MANTISSA else 0, tl.int32),)
    # Those of a trellis are offsets into a table of four bytes each.
    AT: tl.constexpr = 2 if SPEC.trellis else (1 if DOUBLED else 0)
    if not SPEC.ahead:
        ahead = (_words(part, slot * part[5], first, both, column, 0, SPEC, BLOCK_T), 0)
    fields = _add_codes(fields, ahead[0], first, SPEC, BLOCK_T, AT)
    if SPEC.trellis:
        # `groups` are the points twice, then the place of each channel in its chain (`modules/trellis.py`).
        place = _read(groups + 256 + columns, exists)
        odd_place = _read(groups + 257 + columns, odd_exists)
        for back in tl.static_range(1, (6 + SPEC.bits) // SPEC.bits):
            known = (exists & (place >= back), odd_exists & (odd_place >= back), exists)
            planes = _words(part, slot * part[5], first, known, column, back, SPEC, BLOCK_T)
            fields = _add_codes(fields, planes, first, SPEC, BLOCK_T, AT + SPEC.bits * back)
    codes = _in_order(fields, SPEC.block // 2)

    # Steps and middles, for both channels of a pair.
    low_origin, high_origin = MIDDLE, MIDDLE
    if SPEC.weighted:
        low_step, low_middle, high_step, high_middle = 0, 0, 0, 0
    elif SPEC.per_channel:
        if SPEC.ahead:
            even, odd = ahead[1]
        else:
            even, odd = _stored_of_pairs(part, slot * part[7], first, column, both, SPEC)
        low_step, low_middle = parameters(even, DTYPE, SPEC)
        high_step, high_middle = parameters(odd, DTYPE, SPEC)
        if SPEC.calibrated:
            # Ranges of calibration need not be centred: codes count from the one that is nearest to zero.
            low_origin = tl.load(groups + columns, exists, 0).to(tl.float32, bitcast=True)[None, :]
            high_origin = tl.load(groups + columns + 1, odd_exists, 0).to(tl.float32, bitcast=True)[None, :]
            low_middle += (low_origin - MIDDLE) * low_step
            high_middle += (high_origin - MIDDLE) * high_step
    elif SPEC.by_channel:
        offs = token[:, None] * scale_stride
        even = offs + tl.load(groups + columns, exists, 0)[None, :]
        odd = offs + tl.load(groups + columns + 1, odd_exists, 0)[None, :]
        low_step, low_middle = parameters(_stored_parameters(part, slot, even, exists[None, :], SPEC), DTYPE, SPEC)
        high_step, high_middle = parameters(_stored_parameters(part, slot, odd, odd_exists[None, :], SPEC), DTYPE, SPEC)
    else:
        low_step, low_middle = parameters(stored_of_tokens(part, span, chunk, tile, SPEC, BLOCK_T), DTYPE, SPEC)
        low_step, low_middle = low_step[:, None], low_middle[:, None]
        high_step, high_middle = low_step, low_middle

    # How far codes are from the middle of their range, or from another: exact in every type.
    if PAIRED and SPEC.trellis:
        x = _looked_up(groups, codes & 0xFFFF) | _looked_up(groups + 128, codes >> 16)
    elif MANTISSA and SPEC.calibrated:
        x = _fma(codes, 0x3F803F80, _both(-128.0 - low_origin, -128.0 - high_origin))
    elif MANTISSA:
        x = _fma(codes, 0x3F003F00, (0xC280 | (SPEC.levels - 1)) * 0x10001 - (1 << 32))
    else:
        if SPEC.trellis:
            low = _looked_up(groups + 128, codes & 0xFFFF).to(tl.float32, bitcast=True)
            high = _looked_up(groups + 128, codes >> 16).to(tl.float32, bitcast=True)
        else:
            # A code or-ed into the mantissa of 2^23 is a float: a conversion takes four times as long on some devices.
            low = ((codes & 0xFFFF) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0 - low_origin
            high = ((codes >> 16) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0 - high_origin
        if PAIRED:
            x = _both(low, high)
    if SPEC.weighted:
        if PAIRED:
            low, high = _halves(x)
        else:
            low, high = as_operand(low, DTYPE), as_operand(high, DTYPE)
    elif SPEC.token_scaled and not SPEC.trellis:
        # Ranges of calibration need not be centred, and codes that a token's scale multiplies are not moved: a range
        # whose middle is far from the states would lose what float32 keeps.
        factor = _factors(part, slot, token, token >= 0, span[3])[:, None]
        if PAIRED:
            low, high = (x << 16).to(tl.float32, bitcast=True), (x & -65536).to(tl.float32, bitcast=True)
        low, high = low * factor * low_step + low_middle, high * factor * high_step + high_middle
        if PAIRED:
            low, high = _halves(_both(low, high))
        else:
            low, high = as_operand(low, DTYPE), as_operand(high, DTYPE)
    elif PAIRED:
        if SPEC.token_scaled:
            factor = _factors(part, slot, token, token >= 0, span[3])
            x = _fma(x, _both(factor, factor)[:, None], 0x80008000 - (1 << 32))
        low, high = _halves(_fma(x, _both(low_step, high_step), _both(low_middle, high_middle)))
    else:
        if SPEC.token_scaled:
            factor = rounded(_factors(part, slot, token, token >= 0, span[3]), DTYPE)[:, None]
            low, high = rounded(low * factor, DTYPE), rounded(high * factor, DTYPE)
        low = low * rounded(low_step, DTYPE) + rounded(low_middle, DTYPE)
        high = high * rounded(high_step, DTYPE) + rounded(high_middle, DTYPE)
        low, high = as_operand(low, DTYPE), as_operand(high, DTYPE)
    return tl.reshape(tl.join(low, high), (BLOCK_T, SPEC.block))


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """In the interpreter what pairs of bfloat16 are rounded to; other types are computed in float32."""
    if DTYPE.is_bf16():
        return as_operand(x, DTYPE)
    else:
        return x


@triton.jit
def latent_tile(part, span, chunk, tile, ahead, DTYPE: tl.constexpr, SPEC: tl.constexpr, BLOCK_T: tl.constexpr):
    """Tile `[BLOCK_T, SPEC.block]` of states, as an operand.

    `tile`: slot of the block, the tile's first token in it, and valid tokens of the block. `ahead`: `read_ahead`.
    """
    packed, _, _, _, groups, stride_slot, stride, _, scale_stride, _, _ = part
    start, width, _, head_group = span
    slot, first, count = tile
    channel = chunk * SPEC.block + tl.arange(0, SPEC.block)
    exists, columns = channel < width, start + channel
    if SPEC.filled:
        exists = channel >= 0
    token = first + tl.arange(0, BLOCK_T)
    # Codes beyond the valid tokens are finite, whatever they are; states in full precision may be NaN there.
    end = SPEC.length
    if SPEC.bits == 16:
        end = count
    valid = token < end
    if SPEC.whole:
        valid = token >= 0
    mask = valid[:, None] & exists[None, :]
    packed += slot * stride_slot
    if SPEC.bits == 16:
        return as_operand(tl.load(packed + token[:, None] * stride + columns[None, :], mask, 0), DTYPE)
    elif SPEC.worded:
        return _whole_words(part, span, chunk, tile, ahead, DTYPE, SPEC, BLOCK_T)
    else:
        run = token // SPEC.run
        if SPEC.one_run:
            run = first // SPEC.run
        before, within = run * SPEC.words, token - run * SPEC.run
        where = (before, within, tl.minimum(SPEC.run, SPEC.length - run * SPEC.run))
        codes = _whole_codes(packed, where, mask, columns, stride, SPEC)
        if SPEC.trellis:
            # `groups` are the points twice, then the place of each channel in its chain (`modules/trellis.py`).
            place = tl.load(groups + 256 + columns, exists, 0)
            for back in tl.static_range(1, (6 + SPEC.bits) // SPEC.bits):
                known = mask & (place >= back)[None, :]
                codes |= _whole_codes(packed, where, known, columns - back, stride, SPEC) << (SPEC.bits * back)

        # The parameters are a row or a column of the tile where they can be, which is read by few threads.
        if SPEC.per_channel and SPEC.one_run:
            offs, mask = (run * scale_stride + columns)[None, :], exists[None, :]
        elif SPEC.per_channel:
            offs = run[:, None] * scale_stride + columns[None, :]
        elif SPEC.by_channel:
            offs = token[:, None] * scale_stride + tl.load(groups + columns, exists, 0)[None, :]
        else:
            group = tl.load(groups + start + chunk * SPEC.block, chunk * SPEC.block < width, 0)
            offs, mask = (token * scale_stride + group)[:, None], valid[:, None]
        step, middle = parameters(_stored_parameters(part, slot, offs, mask, SPEC), DTYPE, SPEC)
        if SPEC.trellis:
            x = tl.load(groups + 128 + (codes & 127)).to(tl.float32, bitcast=True)
        else:
            # A code or-ed into the mantissa of 2^23 is a float: a conversion takes four times as long on some devices.
            x = (codes | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0 - (SPEC.levels - 1) * 0.5
        if SPEC.token_scaled:
            x *= _factors(part, slot, token, valid, head_group)[:, None]
        x = x * step + middle
        if SPEC.token_scaled and DTYPE.is_fp16():
            x = tl.clamp(x, -65504.0, 65504.0)
        return as_operand(x, DTYPE)
