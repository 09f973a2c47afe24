r"""Trellis codes: the codes of one token, channel after channel, of which each is read together with those before it.

A uniform code of b bits gives each channel one of 2^b values. A trellis code of b bits stores as much, and reads the
last `WINDOW` = 7 bits of the codes side by side, those of this channel and of the channels before it, as the number of
one of 128 points (a bit-shift trellis: QTIP, arXiv:2406.11235, section 3.1):

    window_c = (window_{c-1} << b | code_c) & 127,      x̂_c = zero_point_c + scale_c * POINTS[b][window_c]

Before the first channel of a chain the window is 0. A chain are the channels of one width in one head group, so a token
is written and read by itself, and so is a width. Points are bytes, those of a source of spread one times 1 / `UNITS[b]`
around 127.5: to a kernel a point is a code of 8 bits.

The encoder seeks the codes of least squared error in units of the points, over all channels of the chain (Viterbi: the
best path to each of the 2^(7-b) windows' ends). The relative squared error for a Gaussian, uniform codes of least error
in brackets: 1 bit 0.286 (0.363), 2 bits 0.0798 (0.1188), 3 bits 0.0223 (0.0374), 4 bits 0.0062 (0.0115), 5 bits 0.0017
(0.0035), 6 bits 0.00056 (0.00104). Codes of 8 bits are uniform.

Worked example, one chain at 4 bits: the codes 9, 2 have the windows 9 and (9 << 4 | 2) & 127 = 18.
"""

from functools import lru_cache

import torch

from modules.trellis_points import POINTS
from modules.trellis_points import UNITS as UNITS

#: Bits of the codes of a chain that say together which point a channel has.
WINDOW = 7

#: What a point is to those who read it: a code of as many levels.
LEVELS = 256

#: Widths that trellis codes have.
TRELLIS_BITS = tuple(POINTS)

#: Tokens whose paths are sought at a time.
_TOKENS = 1024


@lru_cache(maxsize=64)
def points_of(bits: int, device: torch.device) -> torch.Tensor:
    """Points `[128]` uint8 of a width by window."""
    with torch.inference_mode(False):
        return torch.tensor(list(bytes.fromhex(POINTS[bits])), dtype=torch.uint8, device=device)


def windows(codes: torch.Tensor, bits: int, widths: tuple[int, ...]) -> torch.Tensor:
    """Windows `[..., C]` int32 of integer codes `[..., C]`, in chains of `widths` channels side by side."""
    read = []
    for chain in codes.to(torch.int32).split(widths, dim=-1):
        window = chain.clone()
        # The codes of the channels before, as far as the window reaches.
        for back in range(1, min(-(-WINDOW // bits), chain.shape[-1])):
            window[..., back:] |= chain[..., :-back] << (bits * back)
        read.append(window & ((1 << WINDOW) - 1))
    return torch.cat(read, dim=-1)


def decode(codes: torch.Tensor, bits: int, widths: tuple[int, ...]) -> torch.Tensor:
    """Points `[..., C]` uint8 of integer codes `[..., C]`, in chains of `widths` channels side by side."""
    return points_of(bits, codes.device)[windows(codes, bits, widths).long()]


def encode(x: torch.Tensor, bits: int, widths: tuple[int, ...], points: torch.Tensor | None = None) -> torch.Tensor:
    """Codes `[N, C]` uint8 of least squared error.

    Args:
        x: `[N, C]` float32 in units of the points, 0 … 255; what is far beyond them counts as 128 beyond.
        bits: Width, one of `TRELLIS_BITS`.
        widths: Channels of each chain.
        points: `[128]` float32 by window; `None`: those of the width.
    """
    if points is None:
        points = points_of(bits, x.device).float()
    rows = []
    for piece in x.clamp(-128, 383).split(_TOKENS):
        rows.append(torch.cat([_best_path(chain, bits, points) for chain in piece.split(widths, dim=-1)], dim=-1))
    return torch.cat(rows) if rows else x.to(torch.uint8)


def _best_path(x: torch.Tensor, bits: int, points: torch.Tensor) -> torch.Tensor:
    """Codes `[N, C]` uint8 of one chain."""
    device, branches, states = x.device, 1 << bits, 1 << (WINDOW - bits)
    # A window is [code that leaves it][state that it leaves behind]; the state before it are its upper bits.
    points = points.view(branches, states)
    before = (torch.arange(1 << WINDOW, dtype=torch.int64, device=device) >> bits).view(branches, states)
    cost = x.new_full((len(x), states), torch.inf)
    cost[:, 0] = 0
    chosen = []
    for column in x.unbind(-1):
        missed = column[:, None, None] - points
        reached = cost[:, before] + missed * missed
        # Of equal costs the first branch, as every back end does it.
        best = reached.argmin(dim=1)
        cost = reached.gather(1, best[:, None]).squeeze(1)
        chosen.append(best)
    codes, state = torch.empty(x.shape, dtype=torch.uint8, device=device), cost.argmin(dim=1)
    for c in reversed(range(x.shape[-1])):
        window = chosen[c].gather(1, state[:, None]).squeeze(1) * states + state
        codes[:, c] = (window & (branches - 1)).to(torch.uint8)
        state = window >> bits
    return codes
