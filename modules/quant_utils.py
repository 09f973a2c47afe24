r"""Quantization as pure functions: ranges, codes, packed words.

Affine quantization (KIVI, arXiv:2402.02750, eq. 1) of a group of elements to `b` bits:

    code = round((x - zero_point) / scale),    x̂ = code * scale + zero_point,    0 <= code <= 2**b - 1

with `zero_point` the group's minimum and `scale` its range over `2**b - 1`. All arithmetic is float32. The zero point
is rounded down and the scale up to the type they are stored in *before* the codes are computed from the stored
values, so |x - x̂| is at most 0.501 stored scales, whatever the group's offset and range (x̂ before it is rounded to the
type of the states). A group of one value has
scale 0: its codes are 0 and its zero point comes back.

Packed layout
-------------
Codes are packed along the tokens of a block. The block `[T, C]` (tokens, channels) becomes `[W, C]` int32 words: word
`w` of a channel holds the codes of `32 // b` consecutive tokens, element `i` of the word at bits `i·b … i·b + b - 1`,
bit 0 the least significant. A decode kernel that walks the channels reads consecutive addresses. The last word of a
plane is filled with zeros when the tokens do not fill it; with T a multiple of 32 nothing is lost at any width.

Width 3 costs exactly 3.0 bits: a plane of the codes' low two bits, as for `b = 2`, is followed by a plane of their
high bit, as for `b = 1`.

Worked example, one channel, `b = 2`, tokens with codes 3, 0, 2, 1:
    3 << 0 | 0 << 2 | 2 << 4 | 1 << 6  =  0b01_10_00_11  =  0x63        one word (of 16 tokens' room)
and `b = 3`, codes 5 (101), 2 (010), 7 (111), 4 (100):
    low plane   1 << 0 | 2 << 2 | 3 << 4 | 0 << 6  =  0x39
    high plane  1 << 0 | 0 << 1 | 1 << 2 | 1 << 3  =  0x0D              the words [0x39, 0x0D]
"""

from dataclasses import dataclass

import torch

from configuration_alrd_llama import check_bits, check_count

#: Tokens of a block when `group_size=0` puts no bound on the scale's reach.
DEFAULT_BLOCK_LENGTH = 128

# ---- checks and rounding


def require(condition: torch.Tensor, message: str) -> None:
    """Raise `ValueError(message)` unless the boolean scalar `condition` holds.

    On an accelerator the check runs asynchronously on the device (a failure surfaces there at a later call), so that
    no step waits for it.
    """
    if condition.device.type == "cpu":
        if not condition:
            raise ValueError(message)
    else:
        torch._assert_async(condition, message)


def parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type in which scales and zero points of states of type `dtype` are stored: two bytes either way."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float16


def _round_directed(x: torch.Tensor, dtype: torch.dtype, up: bool) -> torch.Tensor:
    """Cast float32 `x` to a two-byte `dtype`, rounding towards +inf (`up`) or -inf."""
    y = x.to(dtype)
    wrong = y.float() < x if up else y.float() > x
    # One step in the wanted direction: the bit patterns of floats of one sign are ordered like their magnitudes.
    bits = y.view(torch.int16)
    away_from_zero = (bits >= 0) == up
    stepped = torch.where(away_from_zero, bits + 1, bits - 1).view(dtype)
    smallest = torch.tensor(1, dtype=torch.int16, device=x.device).view(dtype)
    stepped = torch.where(y == 0, smallest if up else -smallest, stepped)
    return torch.where(wrong, stepped, y)


# ---- codes


def group_widths(length: int, group_size: int) -> tuple[int, ...]:
    """Cut `length` elements into groups of `group_size` (0: one group); the last one may be shorter."""
    size = group_size or max(length, 1)
    return (size,) * (length // size) + ((length % size,) if length % size else ())


def expand_groups(parameter: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
    """Repeat the `[..., n]` values of n groups over their elements: `[..., sum(widths)]`."""
    if len(widths) == 1:
        return parameter.expand(*parameter.shape[:-1], widths[0])
    return parameter.repeat_interleave(torch.tensor(widths, device=parameter.device), dim=-1)


def quantize(x: torch.Tensor, n_bits: int, widths: tuple[int, ...]):
    """Quantize groups along the last dimension.

    Args:
        x: `[..., sum(widths)]`, any floating type.
        n_bits: Width of a code, at most 8.
        widths: Elements of each group, in order.

    Returns:
        `codes` uint8, shape of `x`; `scale` and `zero_point` `[..., len(widths)]` in `parameter_dtype(x.dtype)`.

    Raises:
        ValueError: A group contains NaN or Inf, or values beyond the range of the stored type.
    """
    dtype, x, steps = parameter_dtype(x.dtype), x.float(), 2**n_bits - 1
    extremes = [torch.aminmax(group, dim=-1) for group in x.split(widths, dim=-1)]
    low = torch.stack([e.min for e in extremes], dim=-1)
    high = torch.stack([e.max for e in extremes], dim=-1)

    zero_point = _round_directed(low, dtype, up=False)
    scale = _round_directed((high - zero_point.float()) / steps, dtype, up=True)
    require(
        torch.isfinite(scale).all() & torch.isfinite(zero_point).all() & (high <= torch.finfo(dtype).max).all(),
        f"x: values to quantize must be finite, and they and their range must fit {dtype} (the type of the stored "
        "scales); NaN, Inf or larger values were found (a bfloat16 model has bfloat16 scales)",
    )

    step = expand_groups(scale.float(), widths)
    offset = x - expand_groups(zero_point.float(), widths)
    codes = torch.where(step > 0, (offset / step).round_(), 0).clamp_(0, steps)
    return codes.to(torch.uint8), scale, zero_point


def dequantize(codes, scale, zero_point, widths: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Inverse of `quantize`: `[..., sum(widths)]` in `dtype`, kept inside its finite range."""
    x = codes * expand_groups(scale.float(), widths) + expand_groups(zero_point.float(), widths)
    limit = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    return x.clamp_(-limit, limit).to(dtype)


# ---- packing


def _planes(n_bits: int) -> tuple[tuple[int, int], ...]:
    """(bits, position in the code) of the bit planes that a width is stored as."""
    return ((2, 0), (1, 2)) if n_bits == 3 else ((n_bits, 0),)


def packed_words(length: int, n_bits: int) -> int:
    """int32 words per channel for a block of `length` tokens."""
    return sum(-(-length // (32 // bits)) for bits, _ in _planes(n_bits))


def pack_codes(codes: torch.Tensor, n_bits: int) -> torch.Tensor:
    """Pack `[..., T, C]` integer codes into `[..., W, C]` int32 words (layout: module docstring)."""
    planes = []
    for bits, position in _planes(n_bits):
        per_word = 32 // bits
        plane = (codes.to(torch.int32) >> position) & (2**bits - 1)
        plane = torch.nn.functional.pad(plane, (0, 0, 0, -plane.shape[-2] % per_word))
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=codes.device)[:, None]
        planes.append((plane.unflatten(-2, (-1, per_word)) << shifts).sum(-2, dtype=torch.int32))
    return torch.cat(planes, dim=-2)


def unpack_codes(packed: torch.Tensor, n_bits: int, length: int) -> torch.Tensor:
    """Inverse of `pack_codes`: `[..., W, C]` int32 words to `[..., length, C]` int32 codes."""
    codes, start = 0, 0
    for bits, position in _planes(n_bits):
        words = -(-length // (32 // bits))
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)[:, None]
        plane = (packed[..., start : start + words, :].unsqueeze(-2) >> shifts) & (2**bits - 1)
        codes = codes | plane.flatten(-3, -2)[..., :length, :] << position
        start += words
    return codes


# ---- round trips on latents


def _round_trip(x: torch.Tensor, n_bits: int, group_size: int):
    """Quantize along the last dimension and back; returns (states, scale, zero_point)."""
    widths = group_widths(x.shape[-1], group_size)
    if x.numel() == 0:
        parameter = x.new_empty((*x.shape[:-1], len(widths)), dtype=parameter_dtype(x.dtype))
        return x, parameter, parameter
    codes, scale, zero_point = quantize(x, n_bits, widths)
    return dequantize(codes, scale, zero_point, widths, x.dtype), scale, zero_point


def _check_quantizer(n_bits, group_size: int) -> int:
    check_bits("n_bits", n_bits)
    check_count("group_size", group_size)
    if n_bits == 16:
        raise ValueError("n_bits=16: 16 bits is the untouched state and has no scale and zero point; use 2, 3, 4 or 8")
    return int(n_bits)


def kivi_quantize_per_channel(x: torch.Tensor, n_bits: int, group_size: int = 128):
    """Round trip of key latents with one scale per channel and group of tokens (KIVI, section 3.2).

    Args:
        x: `[B, L, r]` states.
        n_bits: 2, 3, 4 or 8.
        group_size: Tokens per group; the last group may be shorter. 0: all tokens in one.

    Returns:
        states `[B, L, r]` in the type of `x`; `scale` and `zero_point` `[B, ceil(L / group_size), r]`.

    Raises:
        ValueError: A bad width or group size, or values that are not finite or do not fit the stored type.
    """
    n_bits = _check_quantizer(n_bits, group_size)
    states, scale, zero_point = _round_trip(x.transpose(-1, -2), n_bits, group_size)
    return states.transpose(-1, -2), scale.transpose(-1, -2), zero_point.transpose(-1, -2)


def kivi_quantize_per_token(x: torch.Tensor, n_bits: int, group_size: int = 128):
    """Round trip of value latents with one scale per token and group of channels (KIVI, section 3.2).

    Args, errors: as `kivi_quantize_per_channel`, with groups of channels (0: the whole rank).

    Returns:
        states `[B, L, r]` in the type of `x`; `scale` and `zero_point` `[B, L, ceil(r / group_size)]`.
    """
    return _round_trip(x, _check_quantizer(n_bits, group_size), group_size)


@dataclass(frozen=True)
class KIVIQuantizer:
    """Round trip of `[B, L, r]` states of any length, as a callable: same shape and type out; 16 bits: untouched."""

    n_bits: int = 2
    group_size: int = 128
    per_channel: bool = True

    def __post_init__(self):
        check_bits("n_bits", self.n_bits)
        check_count("group_size", self.group_size)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.n_bits == 16:
            return x
        quantize_states = kivi_quantize_per_channel if self.per_channel else kivi_quantize_per_token
        return quantize_states(x, self.n_bits, self.group_size)[0]


@dataclass(frozen=True)
class KIVIMixedQuantizer:
    """`KIVIQuantizer` on all but the last `residual_length` tokens of `[B, L, r]`, which come back untouched."""

    n_bits: int = 2
    group_size: int = 128
    residual_length: int = 32
    per_channel: bool = True

    def __post_init__(self):
        check_count("residual_length", self.residual_length)
        KIVIQuantizer(self.n_bits, self.group_size, self.per_channel)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        old, recent = x.tensor_split([max(x.shape[-2] - self.residual_length, 0)], dim=-2)
        return torch.cat([KIVIQuantizer(self.n_bits, self.group_size, self.per_channel)(old), recent], dim=-2)


def quantize_latent(x: torch.Tensor, n_bits: int, group_size: int = 0) -> torch.Tensor:
    """The simple scheme (`use_kivi=False`): round every token of `[..., L, r]` latents by itself, at once."""
    return KIVIQuantizer(n_bits, group_size, per_channel=False)(x)


def quantize_latent_mixed(x: torch.Tensor, n_bits: int, residual_length: int, group_size: int = 0) -> torch.Tensor:
    """`quantize_latent` on all but the last `residual_length` tokens."""
    return KIVIMixedQuantizer(n_bits, group_size, residual_length, per_channel=False)(x)
