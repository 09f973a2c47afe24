"""VidKV's interface (arXiv:2503.16257): packing functions along the last dimension, and its front.

The names are VidKV's. Where its released code differs from its paper, the paper is followed: one bit is ±scale, ternary
is scaled, the transform of 1.5-bit keys is real and orthonormal, and nothing is quantized twice.
"""

import torch

from configuration_alrd_llama import QuantScheme, check_choice, side_scheme
from modules.cache.codecs import Fields, make_codec
from modules.cache.quantization_config import VIDKV_BACKENDS as VIDKV_BACKENDS
from modules.cache.quantization_config import parse_quantization_config
from modules.kernels import get_backend
from modules.quant_utils import grid, low_bits, pack_codes, packed_words, unpack_codes


def pack_tensor(data: torch.Tensor, bits: float, pack_dim: int) -> torch.Tensor:
    """Pack integer codes of 1, 1.58, 2, 3, 4, 5, 6 or 8 bits along `pack_dim` into int32 words.

    The layout is the one of `modules/quant_utils.py`, for any length: the last word is filled with zeros.
    """
    _check_packed_bits(bits)
    moved = data.movedim(pack_dim, -1).unsqueeze(-1)
    return pack_codes(moved, bits).squeeze(-1).movedim(-1, pack_dim)


def unpack_tensor(v_code: torch.Tensor, bits: float, pack_dim: int, length: int | None = None) -> torch.Tensor:
    """Inverse of `pack_tensor`, int32; `length`: codes along `pack_dim`, default: all that the words have room for."""
    _check_packed_bits(bits)
    words = v_code.shape[pack_dim]
    if length is None:
        length = _most_codes(words, bits)
    if packed_words(length, bits) != words:
        raise ValueError(f"length={length}: {words} words of {bits} bits must be what it packs into")
    codes = unpack_codes(v_code.movedim(pack_dim, -1).unsqueeze(-1), bits, length)
    return codes.squeeze(-1).movedim(-1, pack_dim)


def _most_codes(words: int, bits: float) -> int:
    """Codes that the words have room for."""
    if bits == 1.58:
        return words * 20
    low = low_bits(int(bits))
    if low == bits:
        return words * (32 // low)
    # A word of the high plane and those of the low one beside it make a group; a last group may have fewer.
    high = int(bits) - low
    group = 1 + low // high
    return words // group * (32 // high) + max(0, words % group - 1) * (32 // low)


def _check_packed_bits(bits: float) -> None:
    check_choice("bits", bits, (1, 1.58, 2, 3, 4, 5, 6, 8))


def triton_quantize_and_pack_along_last_dim(data: torch.Tensor, group_size: int, bit: float):
    """Quantize groups of the last dimension and pack them along it; by the back end of the device.

    Args:
        data: `[B, nh, D, T]`.
        group_size: Must divide T.
        bit: 1, 1.58, 2, 3, 4, 5, 6 or 8.

    Returns:
        `code` `[B, nh, D, W]` int32, every group packed by itself; `scale` and `mn` `[B, nh, D, T / group_size]`.
        x̂ = code * step + mn, step = scale, at one bit 2 * scale (see `modules/quant_utils.py`).

    Raises:
        ValueError: A bad width or group size, or values that are not finite or do not fit the stored type.
    """
    _check_packed_bits(bit)
    if data.dim() != 4 or isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"data of shape {list(data.shape)}, group_size={group_size!r}: must be [B, nh, D, T] and >= 1")
    if data.shape[-1] % group_size:
        raise ValueError(f"group_size={group_size}: must divide the last dimension, {data.shape[-1]}")
    # `quantize_and_pack` takes blocks of tokens, `[N, T, C]`: here a block is a group, and its channels are D.
    scheme = QuantScheme(bit)
    lead, channels = data.shape[:2], data.shape[2]
    groups = data.shape[-1] // group_size
    blocks = data.unflatten(-1, (groups, group_size)).permute(0, 1, 3, 4, 2).reshape(-1, group_size, channels)
    packed, scale, zero_point = get_backend(None, data.device).quantize_and_pack(
        blocks, bit, None, scheme.symmetric, scheme.range_method
    )
    # Symmetric codes store no zero point; VidKV's `mn` is their lowest level.
    if zero_point is None:
        zero_point = scale * -grid(bit).offset
    # Back to VidKV's order: the words of all groups of a channel side by side.
    code = packed.reshape(*lead, groups, -1, channels).permute(0, 1, 4, 2, 3).flatten(3)
    scale = scale.reshape(*lead, groups, channels).transpose(2, 3)
    mn = zero_point.reshape(*lead, groups, channels).transpose(2, 3)
    return code, scale, mn


def unpack_and_dequant_vcache(
    code: torch.Tensor,
    scale: torch.Tensor,
    mn: torch.Tensor,
    group_size: int,
    bits: float,
    dtype: torch.dtype = torch.float16,
) -> torch.Tensor:
    """States `[B, nh, D, T]` of `triton_quantize_and_pack_along_last_dim`.

    `scale` and `mn` may have a last dimension of 1, as VidKV passes them.
    """
    _check_packed_bits(bits)
    groups = scale.shape[3]
    words = packed_words(group_size, bits)
    if code.shape[-1] != groups * words:
        raise ValueError(f"code: {code.shape[-1]} words must be {groups} groups of {group_size} at {bits} bits")
    lead, channels = code.shape[:2], code.shape[2]
    blocks = code.unflatten(-1, (groups, words)).permute(0, 1, 3, 4, 2).reshape(-1, words, channels)
    # A block has one row of parameters, and these may come as `[B, nh, D, groups, 1]`.
    scale = scale.reshape(*lead, channels, groups).transpose(2, 3).reshape(-1, channels)
    mn = mn.reshape(*lead, channels, groups).transpose(2, 3).reshape(-1, channels)
    states = get_backend(None, code.device).unpack_and_dequantize(blocks, scale, mn, bits, group_size, dtype)
    return states.reshape(*lead, groups, group_size, channels).permute(0, 1, 4, 2, 3).flatten(3)


class QuantizedTensorFunction:
    """Quantize and restore key and value states `[B, H, T, D]` as a `QUANTIZATION_CONFIG` says.

    Args:
        config: See `parse_quantization_config`. T must be a multiple of `q_group_size` along a side's tokens.
    """

    def __init__(self, config: dict | str):
        settings = parse_quantization_config(config)
        group_size = settings["group_size"]
        self.schemes: dict[str, QuantScheme] = {}
        for side in ("k", "v"):
            bits, fields = settings[f"{side}_bits"], settings[f"{side}_scheme"]
            self.schemes[side] = side_scheme(side, bits, group_size, fields)

    def _codec(self, side: str, shape: torch.Size, dtype: torch.dtype, device: torch.device):
        scheme, (_, heads, tokens, size) = self.schemes[side], shape
        if scheme.per_channel and scheme.group_size and tokens % scheme.group_size:
            raise ValueError(f"q_group_size={scheme.group_size}: must divide the {tokens} tokens")
        # One block holds the whole sequence.
        return make_codec(scheme, tokens, (size,) * heads, dtype, get_backend(None, device))

    def _quantize(self, side: str, states: torch.Tensor) -> Fields:
        codec = self._codec(side, states.shape, states.dtype, states.device)
        return codec.encode(states.transpose(1, 2).flatten(2))

    def _dequantize(self, side: str, fields: Fields, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        device = next(iter(fields.values())).device
        states = self._codec(side, shape, dtype, device).decode(fields)
        return states.unflatten(2, (shape[1], shape[3])).transpose(1, 2)

    def _quantize_key(self, states: torch.Tensor) -> Fields:
        """Tensors that store `[B, H, T, D]` keys: `packed`, `scale`, `zero_point`; before a part's stands its name."""
        return self._quantize("k", states)

    def _quantize_value(self, states: torch.Tensor) -> Fields:
        """As `_quantize_key`, for values."""
        return self._quantize("v", states)

    def _dequantize_key(self, fields: Fields, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Keys of the given `[B, H, T, D]` shape and type."""
        return self._dequantize("k", fields, shape, dtype)

    def _dequantize_value(self, fields: Fields, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Values of the given `[B, H, T, D]` shape and type."""
        return self._dequantize("v", fields, shape, dtype)
