"""The Triton kernel that chooses the scales of tokens: the bytes of `TokenScaledCodec` (`modules/cache/codecs.py`).

A program has a token of one head group in its registers, or a few, and tries one byte after the other. As there an
error is float32, its sum over the channels float64, and a division is rounded as IEEE 754 asks. The first guess, a
logarithm, is read off the squares at which it goes from one byte to the next.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl

from modules.kernels.triton.common import INTERPRETED, power_of_two, widen
from modules.kernels.triton.quantize import group_table, readable_rows
from modules.quant_utils import TOKEN_SCALE_ONE, TOKEN_SCALES_PER_OCTAVE, decode_token_scale


@triton.jit
def _error(centred, step, levels, error_weight, scale):
    """Squared error of tokens `[T, C]` with scales `[T]`, float64."""
    step = step * scale[:, None]
    # Levels count from the middle of the range; a constant channel has its middle alone.
    half = (levels - 1) * 0.5
    nearest = tl.where(step > 0, tl.div_rn(centred, tl.where(step > 0, step, 1)), 0)
    nearest = tl.floor(nearest + (half + 0.5))
    error = (tl.minimum(tl.maximum(nearest, 0), levels - 1) - half) * step - centred
    return tl.sum((error * error * error_weight).to(tl.float64), 1)


@triton.jit(do_not_specialize=["tokens", "length", "channels", "groups", "tries", "coarse"])
def scale_tokens_kernel(
    x,
    codes,
    scaled,
    middle,
    step,
    levels,
    weight,
    error_weight,
    energy,
    scale_of,
    bounds,
    offsets,
    table,
    tokens,
    length,
    channels,
    groups,
    coarse,
    tries,
    stride_n,
    stride_t,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Bytes of the scales of `BLOCK_T` tokens of a head group, and the tokens by these scales."""
    token = (tl.program_id(0) // groups).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    group, exists = tl.program_id(0) % groups, token < tokens
    first, width = tl.load(table + group), tl.load(table + groups + group)
    column = first + tl.arange(0, BLOCK_C)[None, :]
    is_channel = column < first + width
    mask = exists[:, None] & is_channel
    middle = tl.load(middle + column, is_channel, 0)
    step, levels = tl.load(step + column, is_channel, 0), tl.load(levels + column, is_channel, 1)
    weight, error_weight = tl.load(weight + column, is_channel, 0), tl.load(error_weight + column, is_channel, 0)
    x += token // length * stride_n + token % length * stride_t
    centred = tl.where(mask, widen(tl.load(x[:, None] + column, mask, 0)) - middle, 0)

    size = tl.sum((centred * centred * weight).to(tl.float64), 1) / tl.load(energy + group)
    byte = tl.sum((size[:, None] >= tl.load(bounds + tl.arange(0, 256))[None, :]).to(tl.int32), 1)
    best, around = _error(centred, step, levels, error_weight, tl.load(scale_of + byte)), byte
    for i in range(tries):
        # The second round goes on from the best of the first.
        around = tl.where(i == coarse, byte, around)
        tried = tl.minimum(tl.maximum(around + tl.load(offsets + i), 0), 255)
        error = _error(centred, step, levels, error_weight, tl.load(scale_of + tried))
        byte = tl.where(error < best, tried, byte)
        best = tl.minimum(error, best)
    tl.store(codes + token * groups + group, byte.to(tl.uint8), exists)
    scale = tl.broadcast_to(tl.load(scale_of + byte)[:, None], centred.shape)
    tl.store(scaled + token[:, None] * channels + column, tl.div_rn(centred, scale) + middle, mask)


@lru_cache
def _scale_of(device: torch.device) -> torch.Tensor:
    """The scale of each byte, `[256]` float32."""
    return decode_token_scale(torch.arange(256, dtype=torch.uint8, device="cpu")).to(device)


@lru_cache
def _bounds(device: torch.device) -> torch.Tensor:
    """The squares of scales from which on each byte is the nearest, `[256]` float64; the first has none, NaN."""
    steps = torch.arange(256, dtype=torch.float64, device="cpu") - (TOKEN_SCALE_ONE + 0.5)
    bounds = torch.exp2(2 * steps / TOKEN_SCALES_PER_OCTAVE)
    bounds[0] = torch.nan
    return bounds.to(device)


@lru_cache
def _offsets(tried: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(tried, dtype=torch.int32, device=device)


def scale_tokens(
    x: torch.Tensor,
    widths: tuple[int, ...],
    channels: tuple[torch.Tensor, ...],
    energy: torch.Tensor,
    rounds: tuple[Sequence[int], Sequence[int]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `scale_tokens` in `modules/kernels/cpu/quantize.py`."""
    x, device = readable_rows(x), x.device
    n, length, count = x.shape
    codes = torch.empty((n, length, len(widths)), dtype=torch.uint8, device=device)
    scaled = torch.empty((n, length, count), dtype=torch.float32, device=device)
    middle, step, levels, weight, error_weight = [channel.float().contiguous() for channel in channels]
    if not codes.numel():
        return codes, scaled
    block_c = power_of_two(max(widths), 32, 1 << 20)
    # The interpreter takes as long for many tokens as for few.
    elements = 256
    if INTERPRETED:
        elements = 1 << 14
    block_t = max(elements // block_c, 1)
    with torch.cuda.device_of(x):
        scale_tokens_kernel[(triton.cdiv(n * length, block_t) * len(widths),)](
            x=x,
            codes=codes,
            scaled=scaled,
            middle=middle,
            step=step,
            levels=levels,
            weight=weight,
            error_weight=error_weight,
            energy=energy,
            scale_of=_scale_of(device),
            bounds=_bounds(device),
            offsets=_offsets((*rounds[0], *rounds[1]), device),
            table=group_table(tuple(widths), device),
            tokens=n * length,
            length=length,
            channels=count,
            groups=len(widths),
            coarse=len(rounds[0]),
            tries=len(rounds[0]) + len(rounds[1]),
            stride_n=x.stride(0),
            stride_t=x.stride(1),
            BLOCK_T=block_t,
            BLOCK_C=block_c,
            # Eight channels to a thread, as long as there are threads.
            num_warps=min(max(block_c // 256, 1), 16),
            maxnreg=128,
            enable_fp_fusion=False,
        )
    return codes, scaled
