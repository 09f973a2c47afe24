"""The Triton encoder of trellis codes; the bits are those of `modules/trellis.py`, which says what a window is.

A program, one warp, seeks the paths of four tokens through one chain: eight threads have the windows of a token in
their registers, and give each other the costs of the ends. (A token to a thread takes fewer instructions, but a block
of few tokens then waits for few threads.) The way back needs of each channel which branch led to each end: 2^(7-b)
times b bits, a word of 64 bits.

Bits are those of the reference because a cost is the same sum in the same order, a product and a sum are not contracted
(`enable_fp_fusion=False`), and of equal costs the first is taken.
"""

import torch
import triton
import triton.language as tl

from modules import trellis
from modules.kernels.triton.common import INTERPRETED
from modules.kernels.triton.quantize import group_table

#: Tokens of a launch, which bounds the memory for the ways back: 8 bytes for each element.
_TOKENS = 1 << 14

#: Tokens of a program. The interpreter takes as long for many as for few.
_BLOCK_T = 4
if INTERPRETED:
    _BLOCK_T = 32

#: Channels of the way back that are read at a time.
_AHEAD = tl.constexpr(8)


# One binary for each width: no size is worth one of its own.
@triton.jit(do_not_specialize=["tokens", "channels", "chains"])
def trellis_kernel(
    x,
    points,
    ways,
    codes,
    table,
    tokens,
    channels,
    chains,
    BITS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Codes of `BLOCK_T` tokens for one chain; `ways` `[channels, tokens]` int64 is scratch."""
    BRANCHES: tl.constexpr = 1 << BITS
    STATES: tl.constexpr = 1 << (WINDOW - BITS)
    chain = tl.program_id(0) % chains
    token = tl.program_id(0) // chains * BLOCK_T + tl.arange(0, BLOCK_T)
    exists = token < tokens
    first, width = tl.load(table + chain), tl.load(table + chains + chain)
    offset = token.to(tl.int64) * channels + first
    x, codes = x + offset, codes + offset
    ways += first.to(tl.int64) * tokens + token
    point = tl.load(points + tl.arange(0, BRANCHES * STATES)).to(tl.float32)[:, None]
    state = tl.arange(0, STATES)[:, None]

    # Before the first channel the window is 0.
    cost = tl.where(state + tl.zeros((1, BLOCK_T), tl.int32) == 0, 0.0, float("inf"))
    following = tl.load(x, exists & (width > 0), 0)
    for c in range(width):
        # The next value is on its way while this one is worked on.
        value = following
        following = tl.load(x + c + 1, exists & (c + 1 < width), 0)
        # Behind a NaN all costs are infinite, and all codes 0.
        value = tl.where(value == value, tl.minimum(tl.maximum(value, -128), 383), float("inf"))
        missed = value[None, :] - point
        # The state that a window comes from is its upper bits …
        before = tl.broadcast_to(cost[:, None, :], (STATES, BRANCHES, BLOCK_T))
        reached = tl.reshape(before, (BRANCHES * STATES, BLOCK_T)) + missed * missed
        # … and the state that it leaves behind its lower ones.
        cost, branch = tl.min(tl.reshape(reached, (BRANCHES, STATES, BLOCK_T)), 0, return_indices=True)
        way = tl.sum(branch.to(tl.int64) << (state * BITS), 0)
        tl.store(ways + tl.cast(c, tl.int64) * tokens, way, exists)

    _, end = tl.min(cost, 0, return_indices=True)
    for chunk in range(tl.cdiv(width, _AHEAD)):
        # None of these reads waits for the one before it.
        last, read = width - 1 - chunk * _AHEAD, ()
        for i in tl.static_range(_AHEAD):
            read += (tl.load(ways + tl.cast(last - i, tl.int64) * tokens, exists & (last >= i), 0),)
        for i in tl.static_range(_AHEAD):
            window = ((read[i] >> (end * BITS)).to(tl.int32) & (BRANCHES - 1)) * STATES + end
            tl.store(codes + last - i, (window & (BRANCHES - 1)).to(tl.uint8), exists & (last >= i))
            end = window >> BITS


def encode(x: torch.Tensor, bits: int, widths: tuple[int, ...], points: torch.Tensor | None = None) -> torch.Tensor:
    """As `encode` in `modules/trellis.py`."""
    if points is None:
        points = trellis.points_of(bits, x.device)
    x, table = x.float().contiguous(), group_table(tuple(widths), x.device)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    ways = torch.empty((x.shape[1], min(len(x), _TOKENS)), dtype=torch.int64, device=x.device)
    for piece, piece_codes in zip(x.split(_TOKENS), codes.split(_TOKENS)):
        programs = triton.cdiv(len(piece), _BLOCK_T) * len(widths)
        if not programs:
            continue
        with torch.cuda.device_of(x):
            trellis_kernel[(programs,)](
                x=piece,
                points=points,
                ways=ways,
                codes=piece_codes,
                table=table,
                tokens=len(piece),
                channels=x.shape[1],
                chains=len(widths),
                BITS=bits,
                WINDOW=trellis.WINDOW,
                BLOCK_T=_BLOCK_T,
                num_warps=1,
                maxnreg=255,
                enable_fp_fusion=False,
            )
    return codes
