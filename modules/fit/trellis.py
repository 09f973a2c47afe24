"""The points of trellis codes (`modules/trellis_points.py`), fitted to a Gaussian source."""

import math

import torch

from modules.kernels import get_backend
from modules.trellis import WINDOW, windows

#: Middle of the bytes, and the bytes that the largest point is away from it.
_MIDDLE = 127.5

#: Spreads of the source within which the points lie.
_MOST = 3.6


def fit_points(
    bits: int, starts: int = 60, rounds: int = 30, tokens: int = 1024, seed: int = 0
) -> tuple[torch.Tensor, float]:
    """Points of least squared error: Lloyd's algorithm over the best paths of Gaussian tokens.

    A round seeks the codes of all tokens and moves each point to the mean of the values that took it. That ends in a
    local minimum, so several starts are made, in turn a Gaussian's quantiles in any order, quantizers of one state each
    that lie between those of the others, and one quantizer for all states; the one that is best on other tokens goes on
    with four times the tokens.

    Args:
        bits: Width, 1 … 6.
        starts: Starts that are tried.
        rounds: Rounds of each; the chosen one takes twice as many more.
        tokens: Tokens of 256 channels of each round.
        seed: Of starts and tokens.

    Returns:
        `[128]` uint8 by window, and the distance of neighbouring bytes for a source of spread one.
    """
    generator = torch.Generator("cpu").manual_seed(seed)

    def draw(count: int) -> torch.Tensor:
        return torch.randn(count, 256, generator=generator, dtype=torch.float32, device="cpu")

    x, other = draw(tokens), draw(tokens)
    best, points = math.inf, None
    for start in range(starts):
        found = _improved(_start(bits, start % 3, generator), x, bits, rounds)
        error = (found[_windows_of(other, found, bits)] - other).square().mean().item()
        if error < best:
            best, points = error, found
    points = _improved(points, torch.cat([x, draw(3 * tokens)]), bits, 2 * rounds)
    unit = points.abs().max().item() / _MIDDLE
    return (points / unit + _MIDDLE).round().clamp(0, 255).to(torch.uint8), unit


def _start(bits: int, kind: int, generator: torch.Generator) -> torch.Tensor:
    """Points `[128]` of a first round."""
    ranks = (torch.arange(1 << WINDOW, dtype=torch.float64, device="cpu") + 0.5) / (1 << WINDOW)
    quantiles = torch.special.ndtri(ranks).float()
    if kind == 0:
        order = torch.randperm(len(quantiles), generator=generator, dtype=torch.int64, device="cpu")
        return quantiles[order]
    # By the state before and the code; of each code the quantiles that lie side by side.
    by_code = quantiles.view(1 << bits, -1)
    if kind == 1:
        order = torch.randperm(by_code.shape[1], generator=generator, dtype=torch.int64, device="cpu")
        return by_code[:, order].T.flatten()
    # As dense as is best at high rates: the cube root of the density, that of a Gaussian of three times the variance.
    same = math.sqrt(3) * by_code.mean(1).expand(by_code.shape[1], -1).flatten()
    return same + 0.001 * torch.randn(same.shape, generator=generator, dtype=torch.float32, device="cpu")


def _windows_of(x: torch.Tensor, points: torch.Tensor, bits: int) -> torch.Tensor:
    """Windows `[N, C]` int64 of the best paths for values in units of the source."""
    # The encoder takes units of bytes.
    unit = points.abs().max() / _MIDDLE
    encode, chain = get_backend(None, x.device).trellis_codes, (x.shape[1],)
    return windows(encode(x / unit + _MIDDLE, bits, chain, points / unit + _MIDDLE), bits, chain).long()


def _improved(points: torch.Tensor, x: torch.Tensor, bits: int, rounds: int) -> torch.Tensor:
    """The points after some rounds."""
    for _ in range(rounds):
        taken = _windows_of(x, points, bits).flatten()
        count = taken.bincount(minlength=len(points))
        total = torch.zeros(len(points), dtype=torch.float64, device="cpu")
        total.index_add_(0, taken, x.flatten().double())
        # A point that no value took stays where it is; a few beyond all others would make the unit of bytes coarse.
        points = torch.where(count > 0, (total / count.clamp(min=1)).float(), points).clamp(-_MOST, _MOST)
    return points
