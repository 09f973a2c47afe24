"""The Triton encoder of trellis codes; the bits are those of `modules/trellis.py`, which says what a window is.

A program seeks the paths of 32 tokens through one chain. A thread is a token, with the costs of all ends of windows in
its registers: reshapes and minima run along windows, so that no thread waits for another. The way back needs of each
channel which branch led to each end: 2^(7-b) times b bits, a word of 64 bits.

Bits are those of the reference because a cost is the same sum in the same order, a product and a sum are not contracted
(`enable_fp_fusion=False`), and of equal costs the first is taken.
"""

import torch
import triton
import triton.language as tl

from modules import trellis
from modules.kernels.triton.quantize import group_table

#: Tokens of a launch, which bounds the memory for the ways back: 8 bytes for each element.
_TOKENS = 1 << 14

#: Tokens of a program, the threads of a warp.
_BLOCK_T = 32


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
    state = tl.arange(0, STATES)[:, None]

    # Before the first channel the window is 0.
    cost = tl.where(state + tl.zeros((1, BLOCK_T), tl.int32) == 0, 0.0, float("inf"))
    for c in range(width):
        value = tl.load(x + c, exists, 0)
        # Behind a NaN all costs are infinite, and all codes 0.
        value = tl.where(value == value, tl.minimum(tl.maximum(value, -128), 383), float("inf"))
        # Read in the loop: kept in registers the points would leave too few for the costs.
        point = tl.load(points + tl.arange(0, BRANCHES * STATES)).to(tl.float32)
        missed = value[None, :] - point[:, None]
        # The state that a window comes from is its upper bits …
        before = tl.broadcast_to(cost[:, None, :], (STATES, BRANCHES, BLOCK_T))
        reached = tl.reshape(before, (BRANCHES * STATES, BLOCK_T)) + missed * missed
        # … and the state that it leaves behind its lower ones.
        cost, branch = tl.min(tl.reshape(reached, (BRANCHES, STATES, BLOCK_T)), 0, return_indices=True)
        way = tl.sum(branch.to(tl.int64) << (state * BITS), 0)
        tl.store(ways + tl.cast(c, tl.int64) * tokens, way, exists)

    _, end = tl.min(cost, 0, return_indices=True)
    for back in range(width):
        c = width - 1 - back
        way = tl.load(ways + tl.cast(c, tl.int64) * tokens, exists, 0)
        branch = (way >> (end * BITS)).to(tl.int32) & (BRANCHES - 1)
        window = branch * STATES + end
        tl.store(codes + c, (window & (BRANCHES - 1)).to(tl.uint8), exists)
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
