"""VidKV's `QUANTIZATION_CONFIG` (arXiv:2503.16257) as settings of `CacheScheme`."""

import ast
import json
from numbers import Real

from configuration_alrd_llama import check_bits, check_choice, check_count

#: Back ends of `QUANTIZATION_CONFIG`.
VIDKV_BACKENDS = ("QuantizedCacheLM", "QuantizedCacheVLM", "QuantizedCacheVLMSTP")

_KEYS = ("backend", "nbits", "q_group_size", "residual_length", "axis_key", "axis_value", "vidkv_stp")

#: `QuantScheme.orientation` of each axis.
_ORIENTATIONS = {-1: "per_channel", 0: "per_token"}


def parse_quantization_config(config: dict | str) -> dict:
    """Settings of `CacheScheme` for a `QUANTIZATION_CONFIG`.

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
    if unknown := [key for key in config if key not in _KEYS]:
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
    key_axis, value_axis = config.get("axis_key", -1), config.get("axis_value", -1)
    check_choice("axis_key", key_axis, (-1, 0))
    check_choice("axis_value", value_axis, (-1, 0))

    # The paper mixes widths by channel and rotates for keys only, and protects tokens for values only.
    k_scheme = {"orientation": _ORIENTATIONS[key_axis]}
    v_scheme = {"orientation": _ORIENTATIONS[value_axis]}
    if k_bits == 1.5 and backend == "QuantizedCacheLM":
        raise ValueError("nbits=1.5: keys of two widths need backend 'QuantizedCacheVLM' or 'QuantizedCacheVLMSTP'")
    if k_bits == 1.5 and key_axis == 0:
        raise ValueError("axis_key=0: keys of 1.5 bits are per channel, axis_key=-1")
    if v_bits == 1.5:
        raise ValueError(f"nbits={nbits!r}: 1.5 is a width of keys; give a pair [1.5, width of the values]")
    if k_bits == 1 and backend != "QuantizedCacheLM":
        k_scheme["rotation"] = True
    # With this back end the share must be given; with the others it would be ignored.
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
    """The value of a text in JSON or, if it is none, of a literal of Python."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, TypeError):
            continue
    raise ValueError(f"quantization_config={text!r}: must be a dictionary in Python or JSON")


def _key_value_bits(nbits) -> tuple[float, float]:
    """Widths of keys and values from one width for both, or a pair."""
    pair = (nbits, nbits)
    if isinstance(nbits, (list, tuple)):
        pair = tuple(nbits)
    if len(pair) != 2:
        raise ValueError(f"nbits={nbits!r}: must be a width or a pair [keys, values]")
    for bits in pair:
        check_bits("nbits", bits)
    return pair
