"""VidKV's interface (arXiv:2503.16257): its configuration, its packing functions along the last dimension, its front.

The names are VidKV's, the meaning is what its paper says, where its released code differs: one bit is ±scale, ternary
is scaled, the transform of 1.5-bit keys is real and orthonormal, and nothing is quantized twice.
"""

import ast
import json
from numbers import Real

import torch

from configuration_alrd_llama import QuantScheme, check_bits, check_choice, check_count, side_scheme
from modules.cache.codecs import Fields, make_codec
from modules.kernels import get_backend
from modules.quant_utils import grid, pack_codes, packed_words, unpack_codes

#: Back ends of `QUANTIZATION_CONFIG`.
VIDKV_BACKENDS = ("QuantizedCacheLM", "QuantizedCacheVLM", "QuantizedCacheVLMSTP")

_KEYS = ("backend", "nbits", "q_group_size", "residual_length", "axis_key", "axis_value", "vidkv_stp")

# ---- configuration


def parse_quantization_config(config: dict | str) -> dict:
    """The settings of `CacheScheme` that a `QUANTIZATION_CONFIG` means.

    Args:
        config: A dictionary, or a string of one (Python or JSON), with the keys

            backend: "QuantizedCacheLM": one width for whole sides; "QuantizedCacheVLM": besides, 1-bit keys are rotated
                and 1.5-bit keys exist; "QuantizedCacheVLMSTP": besides, `vidkv_stp` of the tokens keep 2-bit values.
            nbits: A width, or a list of the keys' and the values' widths.
            q_group_size: Elements per scale, default 32.
            residual_length: Newest tokens in full precision, default 128.
            axis_key, axis_value: -1 (default): one scale per channel and group of tokens; 0: per token and group of
                channels.
            vidkv_stp: Share of protected tokens, only for "QuantizedCacheVLMSTP".

    Raises:
        ValueError: A key is unknown or missing, or a value out of range; the message names key, value and rule.
    """
    if isinstance(config, str):
        config = _parse_dictionary(config)
    if not isinstance(config, dict):
        raise ValueError(f"quantization_config={config!r}: must be a dictionary or a string of one")
    unknown = [key for key in config if key not in _KEYS]
    if unknown:
        raise ValueError(f"quantization_config: unknown {', '.join(map(repr, unknown))}; keys are {', '.join(_KEYS)}")
    for key in ("backend", "nbits"):
        if key not in config:
            raise ValueError(f"quantization_config: {key!r} is missing")
    backend, nbits, protected = config["backend"], config["nbits"], config.get("vidkv_stp")
    check_choice("backend", backend, VIDKV_BACKENDS)
    k_bits, v_bits = _key_value_bits(nbits)
    group_size, residual_length = config.get("q_group_size", 32), config.get("residual_length", 128)
    check_count("q_group_size", group_size)
    check_count("residual_length", residual_length)
    axes = {name: config.get(name, -1) for name in ("axis_key", "axis_value")}
    for name, axis in axes.items():
        check_choice(name, axis, (-1, 0))

    k_scheme, v_scheme = ({"orientation": "per_token" if axis == 0 else "per_channel"} for axis in axes.values())
    if k_bits == 1.5 and backend == "QuantizedCacheLM":
        raise ValueError("nbits=1.5: keys of two widths need backend 'QuantizedCacheVLM' or 'QuantizedCacheVLMSTP'")
    if k_bits == 1.5 and axes["axis_key"] == 0:
        raise ValueError("axis_key=0: keys of 1.5 bits are per channel, axis_key=-1")
    if v_bits == 1.5:
        raise ValueError(f"nbits={nbits!r}: 1.5 is a width of keys; give a pair [1.5, width of the values]")
    if k_bits == 1 and backend != "QuantizedCacheLM":
        k_scheme["rotation"] = True
    if (protected is None) == (backend == "QuantizedCacheVLMSTP"):
        raise ValueError(f"vidkv_stp={protected!r}: must be given for backend 'QuantizedCacheVLMSTP' and for no other")
    if protected is not None:
        if isinstance(protected, bool) or not isinstance(protected, Real) or not 0 < protected < 1:
            raise ValueError(f"vidkv_stp={protected!r}: must be a share of tokens between 0 and 1")
        if v_bits >= 2:
            raise ValueError(f"nbits={nbits!r}: protected tokens have 2-bit values, so the others must have fewer")
        v_scheme |= {"protected": protected, "protected_bits": 2}
    return {
        "k_bits": k_bits,
        "v_bits": v_bits,
        "group_size": group_size,
        "residual_length": residual_length,
        "k_scheme": k_scheme,
        "v_scheme": v_scheme,
    }


def _parse_dictionary(text: str):
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, TypeError):
            continue
    raise ValueError(f"quantization_config={text!r}: must be a dictionary in Python or JSON")


def _key_value_bits(nbits) -> tuple[float, float]:
    pair = list(nbits) if isinstance(nbits, (list, tuple)) else [nbits, nbits]
    if len(pair) != 2:
        raise ValueError(f"nbits={nbits!r}: must be a width or a pair [keys, values]")
    for bits in pair:
        check_bits("nbits", bits)
    return tuple(pair)


# ---- packing along any dimension


def pack_tensor(data: torch.Tensor, bits: float, pack_dim: int) -> torch.Tensor:
    """Pack integer codes of 1, 1.58, 2, 3, 4 or 8 bits along `pack_dim` into int32 words.

    The layout is that of `modules/quant_utils.py`, of any length: the last word is filled with zeros.
    """
    _check_packed_bits(bits)
    moved = data.movedim(pack_dim, -1).unsqueeze(-1)
    return pack_codes(moved, bits).squeeze(-1).movedim(-1, pack_dim)


def unpack_tensor(v_code: torch.Tensor, bits: float, pack_dim: int, length: int | None = None) -> torch.Tensor:
    """Inverse of `pack_tensor`, int32; `length`: codes along `pack_dim`, default: all that the words have room for."""
    _check_packed_bits(bits)
    words = v_code.shape[pack_dim]
    if length is None:
        # Three words hold 32 codes of 3 bits; a last group of up to 16 codes has two, of its low and its high plane.
        length = words // 3 * 32 + words % 3 // 2 * 16 if bits == 3 else words * (20 if bits == 1.58 else 32 // bits)
    if packed_words(length, bits) != words:
        raise ValueError(f"length={length}: {words} words of {bits} bits must be what it packs into")
    codes = unpack_codes(v_code.movedim(pack_dim, -1).unsqueeze(-1), bits, length)
    return codes.squeeze(-1).movedim(-1, pack_dim)


def _check_packed_bits(bits: float) -> None:
    check_choice("bits", bits, (1, 1.58, 2, 3, 4, 8))


def triton_quantize_and_pack_along_last_dim(data: torch.Tensor, group_size: int, bit: float):
    """Quantize groups of the last dimension and pack them along it; by the back end of the device.

    Args:
        data: `[B, nh, D, T]`.
        group_size: Must divide T.
        bit: 1, 1.58, 2, 3, 4 or 8.

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
    scheme = QuantScheme(bit)
    lead, channels = data.shape[:2], data.shape[2]
    groups = data.shape[-1] // group_size
    blocks = data.unflatten(-1, (groups, group_size)).permute(0, 1, 3, 4, 2).reshape(-1, group_size, channels)
    packed, scale, zero_point = get_backend(None, data.device).quantize_and_pack(
        blocks, bit, None, scheme.symmetric, scheme.range_method
    )
    if zero_point is None:
        zero_point = scale * -grid(bit).offset
    code = packed.reshape(*lead, groups, -1, channels).permute(0, 1, 4, 2, 3).flatten(3)
    scale, mn = (p.reshape(*lead, groups, channels).transpose(2, 3) for p in (scale, zero_point))
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
    scale, mn = (p.reshape(*lead, channels, groups).transpose(2, 3).reshape(-1, channels) for p in (scale, mn))
    states = get_backend(None, code.device).unpack_and_dequantize(blocks, scale, mn, bits, group_size, dtype)
    return states.reshape(*lead, groups, group_size, channels).permute(0, 1, 4, 2, 3).flatten(3)


# ---- the front


class QuantizedTensorFunction:
    """Quantize and restore key and value states `[B, H, T, D]` as a `QUANTIZATION_CONFIG` says.

    Args:
        config: See `parse_quantization_config`. T must be a multiple of `q_group_size` along a side's tokens.
    """

    def __init__(self, config: dict | str):
        settings = parse_quantization_config(config)
        group_size = settings["group_size"]
        self.schemes = {
            side: side_scheme(side, settings[f"{side}_bits"], group_size, settings[f"{side}_scheme"])
            for side in ("k", "v")
        }

    def _codec(self, side: str, shape: torch.Size, dtype: torch.dtype, device: torch.device):
        scheme, (_, heads, tokens, size) = self.schemes[side], shape
        if scheme.per_channel and scheme.group_size and tokens % scheme.group_size:
            raise ValueError(f"q_group_size={scheme.group_size}: must divide the {tokens} tokens")
        return make_codec(scheme, tokens, (size,) * heads, dtype, get_backend(None, device))

    def _quantize(self, side: str, states: torch.Tensor) -> Fields:
        codec = self._codec(side, states.shape, states.dtype, states.device)
        return codec.encode(states.transpose(1, 2).flatten(2))

    def _dequantize(self, side: str, fields: Fields, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        device = next(iter(fields.values())).device
        states = self._codec(side, shape, dtype, device).decode(fields)
        return states.unflatten(2, (shape[1], shape[3])).transpose(1, 2)

    def _quantize_key(self, states: torch.Tensor) -> Fields:
        """Tensors that store `[B, H, T, D]` keys: `packed`, `scale`, `zero_point`, those of parts with their names."""
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


__all__ = [
    "VIDKV_BACKENDS",
    "QuantizedTensorFunction",
    "pack_tensor",
    "parse_quantization_config",
    "triton_quantize_and_pack_along_last_dim",
    "unpack_and_dequant_vcache",
    "unpack_tensor",
]
