"""`QuantScheme` and `CacheScheme`: every field, every refusal, JSON, and the way from a config to the cache."""

import dataclasses
import itertools
import json
import re
from dataclasses import FrozenInstanceError

import pytest
import torch
from transformers import AutoConfig

from configuration_alrd_llama import SUPPORTED_BITS, ALRDLlamaConfig, QuantScheme, side_scheme
from modeling_alrd_llama import ALRDLlamaForCausalLM
from modules.formats.qlutattn import QLUTATTN
from modules.kivi_cache import CacheScheme, KIVILatentCache, create_kivi_cache
from tests.helpers import TINY_LLAMA, tiny_split

FIELDS = {
    "bits": (1, 1.5, 1.58, 2, 3, 4, 5, 6, 8, 16),
    "orientation": ("per_channel", "per_token"),
    "group_size": (0, 1, 32, 128),
    "symmetric": (None, True, False),
    "range_method": (None, "minmax", "mse"),
    "rotation": (False, True),
    "static": (False, True),
    "token_scale": (False, True),
    "code": ("uniform", "trellis"),
    "protected": (0.0, 0.2),
    "protected_bits": (2, 4, 16),
    "quantizer": (None, "mine"),
}


def allowed(
    bits, orientation, group_size, symmetric, range_method, rotation, static, token_scale, code, protected,
    protected_bits, quantizer,
):  # fmt: skip
    """The rules of the documentation, told a second time."""
    if token_scale and not static:
        return False
    if bits == 1.58 and symmetric is False:
        return False
    if bits == 1.5 and (symmetric or orientation == "per_token"):
        return False
    around_zero = bits in (1, 1.58) if symmetric is None else symmetric
    if code == "trellis" and (not static or around_zero):
        return False
    if bits < 2 and around_zero and range_method == "minmax":
        return False
    if static and bits not in (1, 2, 3, 4, 5, 6, 8):
        return False
    if static and (orientation == "per_token" or rotation or protected or quantizer):
        return False
    if static and bits == 1 and around_zero:
        return False
    return not (protected and protected_bits <= bits)


def combinations():
    return [dict(zip(FIELDS, values, strict=True)) for values in itertools.product(*FIELDS.values())]


def test_exactly_the_documented_combinations_exist():
    accepted = 0
    for fields in combinations():
        try:
            QuantScheme(**fields)
        except ValueError as error:
            assert not allowed(*fields.values()), (fields, error)
            # The message begins with a field and its value.
            name, value = re.match(r"(\w+)=(\S+?):", str(error)).groups()
            assert name in FIELDS
            given = fields[name]
            assert value in (repr(given), str(given))
        else:
            assert allowed(*fields.values()), fields
            accepted += 1
    assert accepted > 1000


def test_json_round_trip_and_resolved_defaults():
    for fields in combinations():
        if not allowed(*fields.values()):
            continue
        scheme = QuantScheme(**fields)
        record = json.loads(json.dumps(scheme.to_dict()))
        assert QuantScheme(**record) == scheme
        assert record.pop("tiers") is None  # tests/test_tiers.py
        assert list(record) == list(FIELDS)
        expected = dict(fields)
        if fields["symmetric"] is None:
            expected["symmetric"] = fields["bits"] in (1, 1.58)
        if fields["range_method"] is None:
            expected["range_method"] = "mse" if fields["bits"] < 2 else "minmax"
        assert record == expected
        assert hash(scheme) == hash(QuantScheme(**record))


def test_defaults():
    assert QuantScheme().to_dict() == {
        "bits": 2,
        "orientation": "per_channel",
        "group_size": 128,
        "symmetric": False,
        "range_method": "minmax",
        "rotation": False,
        "static": False,
        "token_scale": False,
        "code": "uniform",
        "protected": 0.0,
        "protected_bits": 4,
        "quantizer": None,
        "tiers": None,
    }
    assert FIELDS["bits"] == SUPPORTED_BITS


@pytest.mark.parametrize("field", FIELDS)
def test_a_scheme_is_frozen(field):
    with pytest.raises(FrozenInstanceError):
        setattr(QuantScheme(), field, FIELDS[field][-1])


@pytest.mark.parametrize("bits", [2.0, 4.0, 16.0, 1.0])
def test_a_whole_width_is_an_int(bits):
    scheme = QuantScheme(bits)
    assert type(scheme.bits) is int
    assert scheme == QuantScheme(int(bits))


BAD_FIELDS = [
    *(("bits", value) for value in (0, 7, 1.6, 32, -2, True, "2", None, float("nan"), [2])),
    *(("orientation", value) for value in ("per_head", "", None, 0, True)),
    *(("group_size", value) for value in (-1, 2.0, True, "32", None)),
    *(("symmetric", value) for value in (1, 0, "yes")),
    *(("range_method", value) for value in ("max", "", True, 0)),
    *(("rotation", value) for value in (1, None, "hadamard")),
    *(("static", value) for value in (0, None, "int8")),
    *(("protected", value) for value in (-0.1, 1, 1.5, True, "0.2", None, float("nan"), float("inf"))),
    *(("protected_bits", value) for value in (7, True, None, "4")),
    *(("quantizer", value) for value in (1, True, ["mine"])),
]


@pytest.mark.parametrize("field, value", BAD_FIELDS, ids=str)
def test_bad_fields_are_refused(field, value):
    with pytest.raises(ValueError, match=re.escape(f"{field}={value!r}: must be ")):
        QuantScheme(**{field: value})


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"bits": 1.58, "symmetric": False}, r"symmetric=False: ternary codes \(bits=1.58\) are symmetric"),
        ({"bits": 1.5, "orientation": "per_token"}, "bits=1.5: .*must be per_channel and not symmetric.*per_token"),
        ({"bits": 1.5, "symmetric": True}, "bits=1.5: .*must be per_channel and not symmetric.*True"),
        ({"bits": 1, "range_method": "minmax"}, "range_method='minmax': symmetric codes of 1 bits"),
        ({"bits": 1.58, "range_method": "minmax"}, "range_method='minmax': symmetric codes of 1.58 bits"),
        (
            {"static": True, "orientation": "per_token"},
            "static=True: .* per_channel, of 1 .* to 6 or 8 whole bits",
        ),
        ({"static": True, "bits": 16}, "static=True: .*got per_channel, 16 bits"),
        ({"static": True, "bits": 1}, "static=True: .*got per_channel, 1 bits"),
        ({"static": True, "rotation": True}, "static=True: .*rotation=True"),
        ({"static": True, "protected": 0.5}, "static=True: .*protected=0.5"),
        ({"token_scale": True}, "token_scale=True: must go with static=True"),
        ({"bits": 4, "protected": 0.5}, "protected_bits=4: must be above bits=4"),
        ({"bits": 8, "protected": 0.5}, "protected_bits=4: must be above bits=8"),
        ({"bits": 16, "protected": 0.5, "protected_bits": 16}, "protected_bits=16: must be above bits=16"),
    ],
)
def test_bad_combinations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        QuantScheme(**fields)


# ---- text


@pytest.mark.parametrize(
    "fields, pieces, absent",
    [
        ({}, ["2-bit per channel"], ["symmetric", "mse", "minmax", "rotation", "static"]),
        ({"orientation": "per_token", "range_method": "mse"}, ["2-bit per token", "mse"], []),
        ({"bits": 1}, ["1-bit per channel"], ["symmetric", "mse"]),
        ({"bits": 1, "symmetric": False}, ["1-bit", "asymmetric"], []),
        ({"bits": 1, "symmetric": False, "range_method": "minmax"}, ["1-bit", "asymmetric", "minmax"], []),
        ({"bits": 1.58}, ["1.58-bit"], ["symmetric", "mse"]),
        ({"bits": 1.5, "range_method": "minmax"}, ["1.5-bit", "minmax"], []),
        ({"bits": 4, "symmetric": True, "rotation": True}, ["4-bit", "symmetric", "rotation"], ["asymmetric"]),
        ({"bits": 8, "static": True}, ["8-bit", "static"], ["token scale"]),
        ({"bits": 8, "static": True, "token_scale": True}, ["8-bit", "static", "token scale"], []),
        ({"bits": 1, "protected": 0.2, "protected_bits": 2}, ["1-bit", "20% of tokens at 2 bits"], []),
        ({"quantizer": "mine"}, ["mine"], []),
    ],
)
def test_text(fields, pieces, absent):
    text = str(QuantScheme(**fields))
    assert all(piece in text for piece in pieces), text
    assert not any(piece in text for piece in absent), text


def test_text_tells_the_group_size():
    """The docstring's own example."""
    assert str(QuantScheme(range_method="mse")) == "2-bit per channel in groups of 128 (mse)"
    assert str(QuantScheme(group_size=32)) != str(QuantScheme(group_size=64))


def test_repr_is_python():
    scheme = QuantScheme(bits=1.58, orientation="per_token", protected=0.25)
    assert eval(repr(scheme)) == scheme


def test_qlutattn_formats():
    assert sorted(QLUTATTN) == ["K1", "K2", "K4", "V1", "V2", "V4"]
    for name, scheme in QLUTATTN.items():
        assert scheme.orientation == {"K": "per_token", "V": "per_channel"}[name[0]]
        assert (scheme.bits, scheme.group_size) == (int(name[1]), 128)
    for k, v in itertools.product((1, 2, 4), repeat=2):
        cache = CacheScheme.of(QLUTATTN[f"K{k}"], QLUTATTN[f"V{v}"], residual_length=0, sink_length=0)
        assert (cache.keys, cache.values) == (QLUTATTN[f"K{k}"], QLUTATTN[f"V{v}"])
        # 128 tokens of 128 channels a side: K per token and V per channel have 128 scales and zero points each, and 1
        # bit has no zero point.
        expected = sum(128 * 128 * b // 8 + 128 * (2 if b == 1 else 4) for b in (k, v))
        assert cache.layer_nbytes(128, ((128,), (128,)), torch.float16) == expected + 12


# ---- the settings of a cache


def test_sides_by_default_and_by_fields():
    assert side_scheme("k", 2, 64, None) == QuantScheme(2, "per_channel", 64)
    assert side_scheme("v", 3, 64, {}) == QuantScheme(3, "per_token", 64)
    fields = {"orientation": "per_channel", "group_size": 32, "range_method": "mse", "protected": 0.1}
    assert side_scheme("v", 2, 64, fields) == QuantScheme(2, "per_channel", 32, range_method="mse", protected=0.1)
    # A default that follows from the width does not come from another width.
    assert side_scheme("v", 1, 64, None) == QuantScheme(1, "per_token", 64, True, "mse")
    assert side_scheme("k", 2, 64, {"symmetric": None, "range_method": None}) == QuantScheme(2, group_size=64)


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize(
    "bits, group_size, fields, message",
    [
        (7, 32, None, "{side}_bits=7: must be one of"),
        (True, 32, None, "{side}_bits=True: must be one of"),
        (2, -1, None, "group_size=-1: must be an integer"),
        (2, 32, {"bits": 3}, "{side}_scheme={{'bits': 3}}: must be a dictionary with keys among orientation"),
        (2, 32, {"bit": 3}, "{side}_scheme={{'bit': 3}}: must be a dictionary"),
        (2, 32, "mse", "{side}_scheme='mse': must be a dictionary"),
        (2, 32, ["mse"], "{side}_scheme=['mse']: must be a dictionary"),
        (2, 32, {"range_method": "max"}, "{side}_scheme, with {side}_bits=2: range_method='max': must be one of"),
        (1, 32, {"range_method": "minmax"}, "{side}_scheme, with {side}_bits=1: range_method='minmax': "),
        (8, 32, {"protected": 0.5}, "{side}_scheme, with {side}_bits=8: protected_bits=4: must be above"),
    ],
)
def test_bad_settings_are_refused_everywhere(side, bits, group_size, fields, message):
    pattern = "^" + re.escape(message.format(side=side))
    settings = {f"{side}_bits": bits, "group_size": group_size, f"{side}_scheme": fields}
    with pytest.raises(ValueError, match=pattern):
        side_scheme(side, bits, group_size, fields)
    for make in (CacheScheme, create_kivi_cache):
        with pytest.raises(ValueError, match=pattern):
            make(**settings)
    with pytest.raises(ValueError, match=re.escape(message.format(side=side))):
        ALRDLlamaConfig(**settings)
    config = ALRDLlamaConfig()
    for name, value in settings.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=pattern):
        config.check_latent_cache()


def test_values_of_two_widths_must_be_made_per_channel():
    with pytest.raises(ValueError, match=r"v_scheme, with v_bits=1.5: bits=1.5: .*must be per_channel"):
        CacheScheme(v_bits=1.5)
    assert CacheScheme(v_bits=1.5, v_scheme={"orientation": "per_channel"}).values.bits == 1.5


@pytest.mark.parametrize(
    "keys, values",
    [
        (QuantScheme(1.5), QuantScheme(1.58, "per_token")),
        (QuantScheme(2, "per_token", 64, True, "mse", True), QuantScheme(1, protected=0.2, protected_bits=2)),
        (QuantScheme(16), QuantScheme(1, symmetric=False, range_method="minmax")),
        (QuantScheme(8, static=True, group_size=0), QuantScheme(3, symmetric=True)),
    ],
    ids=str,
)
def test_cache_scheme_of_two_sides(keys, values):
    scheme = CacheScheme.of(keys, values, residual_length=7, sink_length=0)
    assert (scheme.keys, scheme.values) == (keys, values)
    assert (scheme.residual_length, scheme.sink_length) == (7, 0)
    record = json.loads(json.dumps(dataclasses.asdict(scheme)))
    again = CacheScheme(**record)
    assert again == scheme
    assert (again.keys, again.values) == (keys, values)
    assert CacheScheme.of(keys, values) == CacheScheme.of(keys, values, residual_length=32, sink_length=4)
    with pytest.raises(ValueError, match="residual_length=-1: must be"):
        CacheScheme.of(keys, values, residual_length=-1)
    with pytest.raises(FrozenInstanceError):
        scheme.k_bits = 4


@pytest.mark.parametrize("index", [2, -1, "0"])
def test_layer_schemes_are_of_layers_that_exist(index, tmp_path):
    model = tiny_split(tmp_path, ranks=8, dense=None)
    index = 3 if index == 2 else index
    with pytest.raises(ValueError, match="layer_schemes"):
        model.create_kivi_cache(layer_schemes={index: CacheScheme(4)})


def test_protected_bits_that_no_codec_has_are_refused():
    with pytest.raises(ValueError, match=r"protected_bits=1\.5: .* per_channel"):
        QuantScheme(1, "per_token", protected=0.1, protected_bits=1.5)


def test_what_no_quantizer_can_store_is_refused_when_the_cache_is_made():
    with pytest.raises(ValueError, match="quantizer='nobody': must be registered"):
        create_kivi_cache(k_scheme={"quantizer": "nobody"})
    with pytest.raises(ValueError, match=r"protected=0\.999: must leave tokens of a block of 128 unprotected"):
        create_kivi_cache(v_scheme={"protected": 0.999})


@pytest.mark.parametrize(
    "k_group, v_group, protected, length",
    [
        (128, 128, 0, 128),
        (32, 64, 0, 64),
        (0, 32, 0, 128),
        (256, 0, 0, 256),
        (1, 5, 0, 5),
        (32, 32, 0.2, 128),
        (48, 20, 0.2, 144),
        (256, 32, 0.2, 256),
        (0, 0, 0.2, 128),
    ],
)
def test_block_length(k_group, v_group, protected, length):
    keys = QuantScheme(1, group_size=k_group)
    values = QuantScheme(1, "per_token", v_group, protected=protected)
    assert CacheScheme.of(keys, values).block_length == length
    assert CacheScheme.of(values, keys).block_length == length


# ---- through the config, files, the model and generate

SIDES = {
    "k_bits": 1.5,
    "v_bits": 1.58,
    "group_size": 32,
    "k_scheme": {"range_method": "minmax", "rotation": True},
    "v_scheme": {"orientation": "per_token", "group_size": 16, "protected": 0.25, "protected_bits": 3},
}
KEYS = QuantScheme(1.5, group_size=32, range_method="minmax", rotation=True)
VALUES = QuantScheme(1.58, "per_token", 16, protected=0.25, protected_bits=3)


def test_config_keeps_schemes_in_its_file(tmp_path):
    config = ALRDLlamaConfig(**TINY_LLAMA, **SIDES)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {name: written[name] for name in SIDES} == SIDES
    for loaded in (ALRDLlamaConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert {name: getattr(loaded, name) for name in SIDES} == SIDES
        scheme = CacheScheme.from_config(loaded)
        assert (scheme.keys, scheme.values) == (KEYS, VALUES)
        assert (scheme.residual_length, scheme.sink_length) == (32, 4)
    plain = CacheScheme.from_config(ALRDLlamaConfig(**TINY_LLAMA))
    assert plain == CacheScheme() == create_kivi_cache().scheme


def test_model_and_generate_honour_the_schemes(tmp_path):
    made = tiny_split(tmp_path, ranks={"k_proj": 24, "v_proj": 20}, residual_length=3, **SIDES)
    made.save_pretrained(tmp_path / "split")
    model = ALRDLlamaForCausalLM.from_pretrained(tmp_path / "split")
    scheme = model.create_kivi_cache().scheme
    assert (scheme.keys, scheme.values, scheme.residual_length) == (KEYS, VALUES, 3)

    ids = torch.randint(1, 97, (2, 150))
    result = model.generate(ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    cache = result.past_key_values
    assert isinstance(cache, KIVILatentCache)
    assert (cache.scheme.keys, cache.scheme.values) == (KEYS, VALUES)
    assert [layer.pool.used for layer in cache.layers] == [2, 2, 2]
    assert "is_wide" in cache.layers[0].pool.storage["keys"]
    assert "is_protected" in cache.layers[0].pool.storage["values"]
    assert cache.nbytes_used == 3 * 2 * cache.scheme.layer_nbytes(153, ((24,), (20,)), torch.float32)

    # What is given to the method goes before the config; what is not given stays.
    changed = model.create_kivi_cache(v_bits=4, v_scheme={}, k_scheme={"rotation": False}).scheme
    assert changed.keys == QuantScheme(1.5, group_size=32)
    assert changed.values == QuantScheme(4, "per_token", 32)
    with pytest.raises(ValueError, match="v_schema: no such setting"):
        model.create_kivi_cache(v_schema={})


def test_a_scheme_does_not_follow_its_source():
    """A dictionary that is changed later must not change a frozen scheme."""
    fields = {"group_size": 64}
    scheme = CacheScheme(k_scheme=fields)
    fields["group_size"] = 32
    assert scheme == CacheScheme(k_scheme={"group_size": 64})


def test_cache_repr_tells_both_schemes():
    cache = create_kivi_cache(1, 1.58, 32, k_scheme={"rotation": True}, v_scheme={"range_method": "mse"})
    assert f"keys {cache.scheme.keys}" in repr(cache)
    assert f"values {cache.scheme.values}" in repr(cache)


@pytest.mark.parametrize("side", ["k", "v"])
def test_the_simple_scheme_has_no_scheme_fields_that_are_ignored(side):
    """`use_kivi=False` rounds each token by the width alone, so other fields of a scheme have no effect there."""
    with pytest.raises(ValueError, match=f"{side}_scheme"):
        ALRDLlamaConfig(use_kivi=False, **{f"{side}_scheme": {"range_method": "mse"}})


def test_the_simple_scheme_refuses_two_widths():
    with pytest.raises(ValueError, match=r"k_bits=1.5: the simple scheme \(use_kivi=False\)"):
        ALRDLlamaConfig(use_kivi=False, k_bits=1.5)


def test_layer_schemes_must_share_window_and_blocks():
    base = CacheScheme()
    for other, name in (
        (CacheScheme(residual_length=31), "residual_length"),
        (CacheScheme(sink_length=3), "sink_length"),
        (CacheScheme(group_size=64), "block_length"),
    ):
        with pytest.raises(ValueError, match=rf"layer_schemes\[1\]: {name} must be {getattr(base, name)}"):
            KIVILatentCache(base, layer_schemes={1: other})
    cache = KIVILatentCache(base, layer_schemes={1: CacheScheme(1, 4, k_scheme={"group_size": 32})})
    layers = [cache.layer(i).scheme for i in range(3)]
    assert [scheme.k_bits for scheme in layers] == [2, 1, 2]
    assert "1 layers of their own" in repr(cache)
