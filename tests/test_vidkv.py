"""VidKV's interface: each key of its configuration, its packing along any dimension, its front, and the four examples.

Codes and words are read by the numpy reader of `test_codecs.py`.
"""

import json
import math
import re

import numpy as np
import pytest
import torch
from test_codecs import read_bits, read_block, read_codes, words_of
from test_kivi_cache import same_bits

from configuration_alrd_llama import QuantScheme
from modules.formats.vidkv import (
    VIDKV_BACKENDS,
    QuantizedTensorFunction,
    pack_tensor,
    parse_quantization_config,
    triton_quantize_and_pack_along_last_dim,
    unpack_and_dequant_vcache,
    unpack_tensor,
)
from modules.kivi_cache import CacheScheme, create_kivi_cache
from tests.helpers import tiny_dense, tiny_split

# ---- the examples of the document

TAIL = "'q_group_size': 32, 'residual_length': 128, 'axis_key': -1, 'axis_value': -1"
EXAMPLES = {
    "2": (
        f"{{'backend': 'QuantizedCacheLM', 'nbits': 2, {TAIL}}}",
        QuantScheme(2, group_size=32),
        QuantScheme(2, group_size=32),
    ),
    "1.5, 2": (
        f"{{'backend': 'QuantizedCacheVLM', 'nbits': [1.5, 2], {TAIL}}}",
        QuantScheme(1.5, group_size=32),
        QuantScheme(2, group_size=32),
    ),
    "1.5, 1.58": (
        f"{{'backend': 'QuantizedCacheVLM', 'nbits': [1.5, 1.58], {TAIL}}}",
        QuantScheme(1.5, group_size=32),
        QuantScheme(1.58, group_size=32),
    ),
    "stp": (
        f"{{'backend': 'QuantizedCacheVLMSTP', 'nbits': [1.5, 1.58], {TAIL}, \"vidkv_stp\": 0.2}}",
        QuantScheme(1.5, group_size=32),
        QuantScheme(1.58, group_size=32, protected=0.2, protected_bits=2),
    ),
}
by_example = pytest.mark.parametrize("text, keys, values", EXAMPLES.values(), ids=EXAMPLES.keys())


@by_example
def test_examples_of_the_document(text, keys, values, tmp_path):
    cache = create_kivi_cache(quantization_config=text)
    scheme = cache.scheme
    assert (scheme.keys, scheme.values, scheme.residual_length) == (keys, values, 128)
    assert scheme.block_length == (128 if values.protected else 32)
    # A dictionary, and JSON, mean the same.
    as_dictionary = eval(text)
    assert create_kivi_cache(quantization_config=as_dictionary).scheme == scheme
    assert create_kivi_cache(quantization_config=json.dumps(as_dictionary)).scheme == scheme

    # As a drop-in for a stock model, through generate.
    dense = tiny_dense()
    ids = torch.randint(1, 97, (2, 270))
    result = dense.generate(ids, past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert result.shape == (2, 273)
    blocks = (272 - 4 - 128) // scheme.block_length
    assert [layer.pool.used for layer in cache.layers] == [2 * blocks] * 3
    assert blocks > 0
    widths = ((16,) * 4, (16,) * 4)
    assert cache.nbytes_used == 3 * 2 * scheme.layer_nbytes(272, widths, torch.float32)

    # And for the latents of our own.
    model = tiny_split(tmp_path, ranks=32, dense=dense)
    latent = model.create_kivi_cache(quantization_config=text)
    assert latent.scheme == scheme
    text_ids = model.generate(ids, past_key_values=latent, max_new_tokens=3, do_sample=False)
    assert text_ids.shape == (2, 273)
    assert [layer.pool.used for layer in latent.layers] == [2 * blocks] * 3
    assert latent.nbytes_used == 3 * 2 * scheme.layer_nbytes(272, ((32,), (32,)), torch.float32)


def test_examples_store_what_their_names_say():
    states = torch.randn(1, 2, 300, 16)
    bits = {}
    for name, (text, _, _) in EXAMPLES.items():
        cache = create_kivi_cache(quantization_config=text)
        cache.update(states, states, 0)
        bits[name] = cache.bits_per_element
    # Widths, and parameters of two bytes per group of 32: 16 bits a scale, 32 with a zero point.
    assert bits["2"] == {"keys": 3.0, "values": 3.0}
    half = 1.5 + (1 + 0.5) / 2
    mask = 1 / 32
    assert bits["1.5, 2"] == {"keys": half + mask, "values": 3.0}
    assert bits["1.5, 1.58"]["values"] == 2 + 0.5
    # 26 tokens at 2 bits in 2 words; 102 at 1.58 in groups of 32, 32, 32 and 6; scales; a bit per token.
    high, low = 2 * 32 + 32, (2 + 2 + 2 + 1) * 32 + 4 * 16
    assert bits["stp"]["values"] == pytest.approx((high + low) / 128 + 1 / 32)


# ---- every key has an effect

BASE = {"backend": "QuantizedCacheLM", "nbits": 2}


def scheme_of(**changes) -> CacheScheme:
    return create_kivi_cache(quantization_config={**BASE, **changes}).scheme


def test_defaults_of_the_keys():
    scheme = scheme_of()
    assert (scheme.keys, scheme.values) == (QuantScheme(2, group_size=32), QuantScheme(2, group_size=32))
    assert (scheme.residual_length, scheme.sink_length) == (128, 4)


@pytest.mark.parametrize(
    "changes, keys, values",
    [
        ({"nbits": 4}, {"bits": 4}, {"bits": 4}),
        ({"nbits": (3, 8)}, {"bits": 3}, {"bits": 8}),
        ({"nbits": [16, 1.58]}, {"bits": 16}, {"bits": 1.58}),
        ({"q_group_size": 64}, {"group_size": 64}, {"group_size": 64}),
        ({"q_group_size": 0}, {"group_size": 0}, {"group_size": 0}),
        ({"axis_key": 0}, {"orientation": "per_token"}, {}),
        ({"axis_value": 0}, {}, {"orientation": "per_token"}),
        ({"nbits": 1}, {"bits": 1}, {"bits": 1}),
        ({"nbits": 1, "backend": "QuantizedCacheVLM"}, {"bits": 1, "rotation": True}, {"bits": 1}),
        ({"nbits": [1, 2], "backend": "QuantizedCacheVLM"}, {"bits": 1, "rotation": True}, {}),
        ({"backend": "QuantizedCacheVLM"}, {}, {}),
        ({"vidkv_stp": None}, {}, {}),
        (
            {"backend": "QuantizedCacheVLMSTP", "nbits": [2, 1], "vidkv_stp": 0.4},
            {},
            {"bits": 1, "protected": 0.4, "protected_bits": 2},
        ),
    ],
)
def test_each_key_has_its_effect(changes, keys, values):
    scheme = scheme_of(**changes)
    base = {"bits": 2, "group_size": 32}
    assert scheme.keys == QuantScheme(**(base | keys))
    assert scheme.values == QuantScheme(**(base | values))


@pytest.mark.parametrize("residual_length", [0, 1, 64])
def test_residual_length_has_its_effect(residual_length):
    cache = create_kivi_cache(quantization_config={**BASE, "residual_length": residual_length})
    cache.update(*torch.randn(2, 1, 2, 200, 8), 0)
    assert cache.layers[0].rows[0].window == residual_length + (200 - 4 - residual_length) % 32


def test_axes_have_their_effect():
    """Keys with unequal channels: scales per channel are better; with unequal tokens the other way around."""
    x = torch.randn(1, 2, 300, 32)
    inputs = {"channels": x * 3.0 ** torch.randn(32), "tokens": x * 3.0 ** torch.randn(300, 1)}
    errors = {}
    for name, states in inputs.items():
        for axis in (-1, 0):
            config = {**BASE, "axis_key": axis, "axis_value": -1 - axis}
            cache = create_kivi_cache(quantization_config=config)
            cache.update(states, states, 0)
            keys, values = cache.layers[0].states()
            flat = states.transpose(1, 2).flatten(2)
            errors[name, axis] = [(side - flat).square().mean().item() for side in (keys, values)]
    assert errors["channels", -1][0] < errors["channels", 0][0] * 0.7
    assert errors["tokens", 0][0] < errors["tokens", -1][0] * 0.7
    for name in inputs:
        assert errors[name, -1] == errors[name, 0][::-1]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"bits": 2}, "unknown 'bits'; keys are backend, nbits"),
        ({"Backend": "x", "stp": 1}, "unknown 'Backend', 'stp'"),
        ({"backend": "quanto"}, "backend='quanto': must be one of 'QuantizedCacheLM', "),
        ({"backend": None}, "backend=None: must be one of"),
        ({"nbits": 7}, "nbits=7: must be one of"),
        ({"nbits": "2"}, "nbits='2': must be one of"),
        ({"nbits": True}, "nbits=True: must be one of"),
        ({"nbits": [2, 2, 2]}, "nbits=[2, 2, 2]: must be a width or a pair"),
        ({"nbits": []}, "nbits=[]: must be a width or a pair"),
        ({"nbits": [2, 9]}, "nbits=9: must be one of"),
        ({"nbits": [[2], 2]}, "nbits=[2]: must be one of"),
        ({"nbits": 1.5}, "nbits=1.5: keys of two widths need backend 'QuantizedCacheVLM'"),
        ({"nbits": [1.5, 2]}, "nbits=1.5: keys of two widths need backend"),
        ({"nbits": 1.5, "backend": "QuantizedCacheVLM"}, "nbits=1.5: 1.5 is a width of keys; give a pair"),
        ({"nbits": [2, 1.5], "backend": "QuantizedCacheVLM"}, "nbits=[2, 1.5]: 1.5 is a width of keys"),
        ({"q_group_size": -1}, "q_group_size=-1: must be an integer of at least 0"),
        ({"q_group_size": 32.0}, "q_group_size=32.0: must be an integer"),
        ({"residual_length": -1}, "residual_length=-1: must be an integer"),
        ({"residual_length": None}, "residual_length=None: must be an integer"),
        ({"axis_key": 1}, "axis_key=1: must be one of -1, 0"),
        ({"axis_value": "0"}, "axis_value='0': must be one of -1, 0"),
        ({"axis_value": False}, "axis_value=False: must be one of -1, 0"),
        ({"vidkv_stp": 0.2}, "vidkv_stp=0.2: must be given for backend 'QuantizedCacheVLMSTP' and for no other"),
        ({"backend": "QuantizedCacheVLMSTP", "nbits": 1}, "vidkv_stp=None: must be given for backend"),
        *(
            ({"backend": "QuantizedCacheVLMSTP", "nbits": 1, "vidkv_stp": bad}, f"vidkv_stp={bad!r}: must be a share")
            for bad in (0, 1, -0.2, 1.5, True, "0.2", float("nan"))
        ),
        ({"backend": "QuantizedCacheVLMSTP", "nbits": 2, "vidkv_stp": 0.2}, "nbits=2: protected tokens have 2-bit"),
        (
            {"backend": "QuantizedCacheVLMSTP", "nbits": [1, 4], "vidkv_stp": 0.2},
            "nbits=[1, 4]: protected tokens have 2-bit values",
        ),
    ],
)
def test_bad_values_are_refused_by_name(changes, message):
    config = {**BASE, **changes}
    makers = [parse_quantization_config, QuantizedTensorFunction, lambda c: create_kivi_cache(quantization_config=c)]
    if "nan" not in repr(config):
        makers.append(lambda c: parse_quantization_config(repr(c)))
    for make in makers:
        with pytest.raises(ValueError, match=re.escape(message)):
            make(config)


@pytest.mark.parametrize("key", ["backend", "nbits"])
def test_missing_keys_are_refused_by_name(key):
    config = {name: value for name, value in BASE.items() if name != key}
    with pytest.raises(ValueError, match=f"quantization_config: '{key}' is missing"):
        parse_quantization_config(config)


@pytest.mark.parametrize("text", ["", "QuantizedCacheLM", "{'backend': }", "__import__('os')", "{'a': f()}"])
def test_what_is_no_dictionary_is_refused(text):
    with pytest.raises(ValueError, match=r"quantization_config=.*: must be a dictionary in Python or JSON"):
        parse_quantization_config(text)


@pytest.mark.parametrize("config", ["[1]", "2", [1], 2, None])
def test_what_is_another_type_is_refused(config):
    with pytest.raises(ValueError, match=r"quantization_config=.*: must be a dictionary or a string of one"):
        parse_quantization_config(config)


def test_a_dictionary_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="must be a dictionary"):
        parse_quantization_config("{[]: 1}")


def test_two_widths_per_token_are_refused_by_the_key():
    with pytest.raises(ValueError, match=r"^axis_key=0: "):
        scheme_of(backend="QuantizedCacheVLM", nbits=[1.5, 2], axis_key=0)


@pytest.mark.parametrize(
    "other", [{"k_bits": 4}, {"residual_length": 64}, {"sink_length": 0}, {"v_scheme": {"orientation": "per_channel"}}]
)
def test_it_stands_for_all_settings(other, tmp_path):
    with pytest.raises(ValueError, match="quantization_config: stands for all settings of the cache"):
        create_kivi_cache(**other, quantization_config=BASE)
    model = tiny_split(tmp_path, k_bits=4, residual_length=7)
    with pytest.raises(ValueError, match="quantization_config: stands for all settings of the cache"):
        model.create_kivi_cache(**other, quantization_config=BASE)
    # The config's own settings are not "given".
    assert model.create_kivi_cache(quantization_config=BASE).scheme == scheme_of()


def test_names_of_the_backends():
    assert VIDKV_BACKENDS == ("QuantizedCacheLM", "QuantizedCacheVLM", "QuantizedCacheVLMSTP")


# ---- packing

PACKED_BITS = (1, 1.58, 2, 3, 4, 5, 6, 8)


def top(bits: float) -> int:
    return 3 if bits == 1.58 else 2**bits


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("shape, dim", [((33,), 0), ((5, 19), 1), ((2, 3, 41, 5), 2), ((2, 3, 5, 1), -1), ((97, 2), 0)])
def test_pack_and_unpack_along_any_dimension(bits, shape, dim):
    codes = torch.randint(0, top(bits), shape, dtype=torch.int32)
    packed = pack_tensor(codes, bits, dim)
    length = shape[dim]
    assert packed.dtype == torch.int32
    expected = list(shape)
    expected[dim] = words_of(length, bits)
    assert list(packed.shape) == expected
    words = np.moveaxis(packed.numpy(), dim, 0).reshape(packed.shape[dim], -1)
    assert np.array_equal(read_codes(words, bits, length), np.moveaxis(codes.numpy(), dim, 0).reshape(length, -1))
    found = unpack_tensor(packed, bits, dim, length)
    assert found.dtype == torch.int32
    assert torch.equal(found, codes)
    assert torch.equal(unpack_tensor(pack_tensor(codes.to(torch.uint8), bits, dim), bits, dim, length), codes)


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("length", [1, 16, 20, 32, 33, 48, 88, 100])
def test_unpacking_all_that_the_words_hold(bits, length):
    codes = torch.randint(0, top(bits), (2, length), dtype=torch.int32)
    found = unpack_tensor(pack_tensor(codes, bits, 1), bits, 1)
    assert torch.equal(found[:, :length], codes)
    assert (found[:, length:] == 0).all()
    # One code more would take another word.
    assert words_of(found.shape[1], bits) == words_of(length, bits) < words_of(found.shape[1] + 1, bits)


@pytest.mark.parametrize("bits", [0, 1.5, 7, 16, "2", True])
def test_widths_that_are_not_packed_are_refused(bits):
    for call in (
        lambda: pack_tensor(torch.zeros(4, 4), bits, 0),
        lambda: unpack_tensor(torch.zeros(4, 4, dtype=torch.int32), bits, 0),
        lambda: triton_quantize_and_pack_along_last_dim(torch.zeros(1, 1, 2, 4), 4, bits),
        lambda: unpack_and_dequant_vcache(*torch.zeros(3, 1, 1, 1, 1), 4, bits),
    ):
        with pytest.raises(ValueError, match=re.escape(f"bits={bits!r}: must be one of 1, 1.58, 2, 3, 4, 5, 6, 8")):
            call()


@pytest.mark.parametrize("bits, length", [(2, 33), (2, 16), (3, 33), (1.58, 41), (8, 3)])
def test_a_length_that_does_not_fit_the_words_is_refused(bits, length):
    packed = pack_tensor(torch.zeros(32, dtype=torch.int32), bits, 0)
    with pytest.raises(ValueError, match=rf"length={length}: {len(packed)} words of {bits} bits"):
        unpack_tensor(packed, bits, 0, length)


# ---- quantize along the last dimension


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize(
    "shape, group", [((2, 3, 5, 64), 32), ((1, 1, 3, 60), 20), ((1, 2, 1, 7), 7), ((1, 1, 2, 4), 1)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_quantize_and_pack_along_the_last_dimension(bits, shape, group, dtype):
    data = (torch.randn(shape) * 3 + 1).to(dtype)
    code, scale, mn = triton_quantize_and_pack_along_last_dim(data, group, bits)
    groups, words = shape[-1] // group, words_of(group, bits)
    assert (code.shape, code.dtype) == ((*shape[:3], groups * words), torch.int32)
    parameter = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    for tensor in (scale, mn):
        assert (tensor.shape, tensor.dtype) == ((*shape[:3], groups), parameter)
    back = unpack_and_dequant_vcache(code, scale, mn, group, bits, dtype)
    assert (back.shape, back.dtype) == (shape, dtype)

    # Read by hand: word by word, x̂ = code * step + mn.
    x, s, m = data.double(), scale.double().numpy(), mn.double().numpy()
    for b, h, d, g in np.ndindex(*shape[:3], groups):
        own = code[b, h, d, g * words : (g + 1) * words].numpy()[:, None]
        codes = read_codes(own, bits, group)[:, 0]
        read = codes * s[b, h, d, g] * (2 if bits == 1 else 1) + m[b, h, d, g]
        found = back[b, h, d, g * group : (g + 1) * group].double().numpy()
        np.testing.assert_allclose(found, read, rtol=torch.finfo(dtype).eps, atol=1e-6)
    step = scale.double().repeat_interleave(group, -1)
    error = (back.double() - x).abs()
    if bits >= 2:
        assert (error <= 0.501 * step + back.double().abs().clamp(min=1) * torch.finfo(dtype).eps).all()
        low = x.unflatten(-1, (groups, group)).amin(-1)
        assert (mn <= low).all()
        assert (low - mn <= low.abs() * torch.finfo(parameter).eps + 1e-6).all()
    else:
        assert (
            error.square().unflatten(-1, (groups, group)).sum(-1)
            <= x.square().unflatten(-1, (groups, group)).sum(-1) * (1 + 1e-3) + 1e-9
        ).all()


def test_one_bit_is_plus_and_minus_the_scale_and_ternary_is_scaled():
    data = torch.randn(2, 2, 4, 64) * 5
    code, scale, mn = triton_quantize_and_pack_along_last_dim(data, 32, 1)
    back = unpack_and_dequant_vcache(code, scale, mn, 32, 1, torch.float32)
    expected = torch.where(data >= 0, 1, -1) * scale.float().repeat_interleave(32, -1)
    assert torch.equal(back, expected)
    mean = data.abs().unflatten(-1, (2, 32)).mean(-1)
    assert torch.allclose(scale.float(), mean, rtol=2**-10)

    code, scale, mn = triton_quantize_and_pack_along_last_dim(data, 32, 1.58)
    back = unpack_and_dequant_vcache(code, scale, mn, 32, 1.58, torch.float32)
    levels = (back / scale.float().repeat_interleave(32, -1)).unique()
    assert levels.tolist() == [-1, 0, 1]
    assert (scale > 1).all()
    assert torch.equal(mn, -scale)
    # The middle level is where the states are small.
    assert data[back == 0].abs().mean() < data[back != 0].abs().mean() / 2


def test_scale_and_mn_with_a_last_dimension_as_vidkv_passes_them():
    data = torch.randn(2, 3, 4, 64)
    code, scale, mn = triton_quantize_and_pack_along_last_dim(data, 16, 2)
    plain = unpack_and_dequant_vcache(code, scale, mn, 16, 2)
    assert plain.dtype == torch.float16
    assert same_bits(plain, unpack_and_dequant_vcache(code, scale.unsqueeze(-1), mn.unsqueeze(-1), 16, 2))


@pytest.mark.parametrize(
    "data, group, message",
    [
        (torch.zeros(1, 1, 2, 40), 32, "group_size=32: must divide the last dimension, 40"),
        (torch.zeros(2, 40), 20, r"data of shape \[2, 40\]"),
        (torch.zeros(1, 1, 2, 40), 0, "group_size=0: must be"),
        (torch.zeros(1, 1, 2, 40), -4, "group_size=-4: must be"),
        (torch.zeros(1, 1, 2, 40), True, "group_size=True: must be"),
        (torch.zeros(1, 1, 2, 40), 20.0, "group_size=20.0: must be"),
        (torch.full((1, 1, 2, 40), torch.nan), 20, "finite"),
        (torch.full((1, 1, 2, 40), torch.inf), 20, "finite"),
        (torch.full((1, 1, 2, 40), 1e6), 20, "float16"),
    ],
)
@pytest.mark.parametrize("bits", [1, 1.58, 2])
def test_bad_data_is_refused(data, group, message, bits):
    with pytest.raises(ValueError, match=message):
        triton_quantize_and_pack_along_last_dim(data, group, bits)


@pytest.mark.parametrize("group, bits", [(48, 2), (32, 4), (16, 8)])
def test_codes_of_another_group_size_or_width_are_refused(group, bits):
    code, scale, mn = triton_quantize_and_pack_along_last_dim(torch.randn(1, 1, 2, 96), 32, 2)
    with pytest.raises(ValueError, match=rf"code: 6 words must be 3 groups of {group} at {bits} bits"):
        unpack_and_dequant_vcache(code, scale, mn, group, bits)


# ---- the front


@by_example
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_quantized_tensor_function(text, keys, values, dtype):
    front = QuantizedTensorFunction(text)
    shape, heads = (2, 3, 128, 10), (10,) * 3
    states = (torch.randn(shape) * 2.0 ** torch.randn(10) + torch.randn(10)).to(dtype)
    for scheme, quantize, dequantize in (
        (keys, front._quantize_key, front._dequantize_key),
        (values, front._quantize_value, front._dequantize_value),
    ):
        fields = quantize(states)
        assert {len(tensor) for tensor in fields.values()} == {2}
        back = dequantize(fields, states.shape, dtype)
        assert (back.shape, back.dtype) == (shape, dtype)
        for n in range(2):
            read = read_block({name: t[n] for name, t in fields.items()}, scheme, 128, heads)
            found = back[n].transpose(0, 1).flatten(1).double().numpy()
            np.testing.assert_allclose(found, read, atol=np.abs(read).max() * (2e-6 + torch.finfo(dtype).eps), rtol=0)
        assert (back - states).square().sum() < 0.6 * states.square().sum()
    assert ("is_wide" in front._quantize_key(states)) == (keys.bits == 1.5)
    if values.protected:
        mask = read_bits(front._quantize_value(states)["is_protected"][0], 128)
        assert mask.sum() == round(0.2 * 128)


@pytest.mark.parametrize("tokens", [1, 31, 33])
def test_the_front_takes_whole_groups_of_tokens(tokens):
    front = QuantizedTensorFunction({**BASE, "axis_value": 0})
    with pytest.raises(ValueError, match=f"q_group_size=32: must divide the {tokens} tokens"):
        front._quantize_key(torch.randn(1, 2, tokens, 8))
    # Per token any number will do.
    states = torch.randn(1, 2, tokens, 8)
    back = front._dequantize_value(front._quantize_value(states), states.shape, states.dtype)
    step = (states.amax(-1) - states.amin(-1)) / 3
    assert ((back - states).abs() <= 0.505 * step[..., None] + 1e-3).all()


def test_the_front_is_what_the_cache_stores():
    """The same states through the cache and through the front give the same codes."""
    config = {**BASE, "nbits": [1, 1.58], "backend": "QuantizedCacheVLM", "residual_length": 0}
    states = torch.randn(1, 2, 4 + 64, 8)
    cache = create_kivi_cache(quantization_config=config)
    cache.update(states, states, 0)
    front, pool = QuantizedTensorFunction(config), cache.layers[0].pool
    order = cache.layers[0].block_table()[0, 0].tolist()
    for side, fields in (
        ("keys", front._quantize_key(states[:, :, 4:])),
        ("values", front._quantize_value(states[:, :, 4:])),
    ):
        for name, tensor in fields.items():
            assert same_bits(pool.storage[side][name][order].flatten(0, 1), tensor[0])
    assert math.isclose(cache.bits_per_element["keys"], 1.5)
