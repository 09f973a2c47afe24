"""`ALRDLlamaConfig`: defaults, sources, saving, and every refusal."""

import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers import AutoConfig, Gemma2Config, LlamaConfig

from configuration_alrd_llama import ALRDLlamaConfig, Projection
from modeling_alrd_llama import ALRDLlamaForCausalLM
from modules import KIVILatentCache, KIVIMixedQuantizer, KIVIQuantizer, create_kivi_cache
from modules.kivi_cache import CacheScheme
from tests.helpers import TINY_LLAMA, all_ranks, tiny_dense, tiny_split

K0, V2 = "model.layers.0.self_attn.k_proj", "model.layers.2.self_attn.v_proj"

DEFAULTS = {
    "dense_model_type": "llama",
    "k_bits": 2,
    "v_bits": 2,
    "group_size": 128,
    "residual_length": 32,
    "use_kivi": True,
    "sink_length": 4,
    "head_group_size": None,
    "k_hadamard": True,
    "v_hadamard": True,
    "truncation_ranks": {},
}


def tiny_config(**fields) -> ALRDLlamaConfig:
    return ALRDLlamaConfig(**{**TINY_LLAMA, **fields})


# ---- defaults and sources


@pytest.mark.parametrize("field, value", DEFAULTS.items())
def test_defaults(field, value):
    found = getattr(ALRDLlamaConfig(), field)
    assert found == value
    assert type(found) is type(value)


def test_defaults_of_cache_and_quantizers_agree_with_the_config():
    cache_fields = {name: DEFAULTS[name] for name in ("k_bits", "v_bits", "group_size", "residual_length")}
    assert CacheScheme() == CacheScheme(**cache_fields, sink_length=DEFAULTS["sink_length"])
    assert create_kivi_cache().scheme == CacheScheme()
    assert KIVIQuantizer() == KIVIQuantizer(n_bits=2, group_size=128, per_channel=True)
    assert KIVIMixedQuantizer() == KIVIMixedQuantizer(n_bits=2, group_size=128, residual_length=32, per_channel=True)


def test_instances_do_not_share_their_ranks():
    first, second = ALRDLlamaConfig(), ALRDLlamaConfig()
    first.truncation_ranks[K0] = 8
    assert second.truncation_ranks == {}


def test_from_a_plain_llama_directory(tmp_path):
    plain = LlamaConfig(**TINY_LLAMA, rms_norm_eps=3e-5)
    plain.save_pretrained(tmp_path)
    config = ALRDLlamaConfig.from_pretrained(tmp_path, truncation_ranks={K0: 8}, k_bits=4)
    assert config.model_type == "alrd_llama" == config.to_dict()["model_type"]
    assert (config.truncation_ranks, config.k_bits, config.v_bits) == ({K0: 8}, 4, 2)
    for field in (*TINY_LLAMA, "rms_norm_eps", "rope_parameters"):
        assert getattr(config, field) == getattr(plain, field), field


def test_from_llama_keeps_every_field_of_the_model():
    plain = LlamaConfig(
        **TINY_LLAMA, attention_bias=True, rope_parameters={"rope_type": "default", "rope_theta": 500.0}
    )
    config = ALRDLlamaConfig.from_llama(plain, truncation_ranks={V2: 5}, v_bits=3)
    assert config.model_type == "alrd_llama"
    assert (config.truncation_ranks, config.v_bits) == ({V2: 5}, 3)
    ours = config.to_dict()
    assert {name: ours[name] for name in plain.to_dict() if name != "model_type"} == {
        name: value for name, value in plain.to_dict().items() if name != "model_type"
    }


def test_another_architecture_is_refused(tmp_path):
    Gemma2Config(hidden_size=64, num_attention_heads=4, num_hidden_layers=2).save_pretrained(tmp_path)
    message = r"model_type='gemma2': must be one of 'llama', 'mistral', 'qwen2', .*; not split: soft-capped scores"
    with pytest.raises(ValueError, match=message):
        ALRDLlamaConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("rank", [24, [24, 7]])
def test_save_and_load(tmp_path, rank):
    changed = {
        "truncation_ranks": {K0: rank, V2: [1, 32]},
        "head_group_size": 2,
        "use_kivi": False,
        "k_bits": 3,
        "v_bits": 8.0,
        "group_size": 0,
        "residual_length": 0,
        "sink_length": 0,
        "k_hadamard": False,
        "v_hadamard": False,
    }
    tiny_config(**changed).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "alrd_llama"
    for loaded in (ALRDLlamaConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is ALRDLlamaConfig
        assert {field: getattr(loaded, field) for field in changed} == changed


# ---- projections and ranks


def test_a_projection_and_its_name():
    config = tiny_config()
    names = [projection.name for projection in config.projections()]
    assert names[:3] == [K0, "model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.k_proj"]
    assert [Projection.parse(name) for name in names] == list(config.projections())
    assert Projection.parse("model.layers.12.self_attn.v_proj") == (12, "v")
    assert Projection(12, "v").attribute == "v_proj"
    for name in ("layers.0.self_attn.k_proj", "model.layers.0.self_attn.q_proj", f"{K0}.weight", ""):
        with pytest.raises(ValueError, match=rf"^{name!r}: must be the name of a projection, such as '{K0}'"):
            Projection.parse(name)


def test_the_widths_of_a_layer_are_those_of_its_projections():
    config = tiny_config(truncation_ranks={K0: 11, V2: [9, 32]}, head_group_size=2)
    assert config.layer_widths(0) == ((6, 5), (16, 16, 16, 16))
    assert config.layer_widths(2) == ((16, 16, 16, 16), (9, 32))


def test_an_int_rank_is_spread_over_the_groups():
    config = tiny_config(truncation_ranks={K0: 11, V2: [9, 32]}, head_group_size=2)
    assert config.group_ranks(Projection(0, "k")) == (6, 5)
    assert config.group_ranks(Projection(2, "v")) == (9, 32)
    assert config.group_ranks(Projection(1, "k")) is None
    assert config.cached_widths(Projection(0, "k")) == (6, 5)
    assert config.cached_widths(Projection(1, "v")) == (16, 16, 16, 16)


@pytest.mark.parametrize("size, groups, full", [(None, 1, 64), (4, 1, 64), (2, 2, 32), (1, 4, 16)])
def test_full_rank_by_head_group(size, groups, full):
    config = tiny_config(head_group_size=size, truncation_ranks={K0: full * groups, V2: [full] * groups})
    assert config.num_head_groups == groups
    assert config.group_ranks(Projection(0, "k")) == config.group_ranks(Projection(2, "v")) == (full,) * groups
    with pytest.raises(ValueError, match=rf"={full * groups + 1}: must be .*{full * groups}"):
        tiny_config(head_group_size=size, truncation_ranks={K0: full * groups + 1})


def test_full_rank_is_bounded_by_the_hidden_size():
    config = tiny_config(num_key_value_heads=8, truncation_ranks={K0: 64})
    assert config.full_group_rank == 64
    with pytest.raises(ValueError, match=r"=65: must be from 1 to the full rank 64"):
        tiny_config(num_key_value_heads=8, truncation_ranks={K0: 65})


# ---- refusals


def ranks(rank, name=K0, **fields) -> dict:
    return {"truncation_ranks": {name: rank}, **fields}


#: Fields, and what the message must say: field, value, rule.
REFUSALS = {
    "unknown projection": (
        ranks(8, "model.layers.0.self_attn.q_proj"),
        r"truncation_ranks\['model.layers.0.self_attn.q_proj'\].*no such projection.*k_proj",
    ),
    "short name": (ranks(8, "layers.0.self_attn.k_proj"), r"'layers.0.self_attn.k_proj'.*no such projection"),
    "name with a tail": (ranks(8, K0 + ".weight"), r"k_proj.weight'.*no such projection"),
    "layer too high": (ranks(8, "model.layers.3.self_attn.k_proj"), r"layers.3.*no such projection.*from 0 to 2"),
    "name not text": (ranks(8, 0), r"truncation_ranks\[0\].*no such projection"),
    "ranks not a dict": ({"truncation_ranks": [8]}, r"truncation_ranks=\[8\]: must map"),
    "rank zero": (ranks(0), r"k_proj'\]=0: must be from 1"),
    "rank negative": (ranks(-3), r"k_proj'\]=-3: must be from 1"),
    "rank too large": (ranks(65, V2), r"v_proj'\]=65: must be from 1 to the full rank 64"),
    "rank bool": (ranks(True), r"k_proj'\]=True: must be an int"),
    "rank float": (ranks(8.0), r"k_proj'\]=8\.0: must be an int"),
    "rank text": (ranks("8"), r"k_proj'\]='8': must be an int"),
    "rank none": (ranks(None), r"k_proj'\]=None: must be an int"),
    "too few for the groups": (ranks(3, head_group_size=1), r"k_proj'\]=3: must be from 4.*4 head groups"),
    "list too short": (ranks([8], head_group_size=2), r"k_proj'\]=\[8\]: must have one rank for each of 2"),
    "list empty": (ranks([]), r"k_proj'\]=\[\]: must have one rank for each of 1"),
    "list with zero": (ranks([8, 0], head_group_size=2), r"k_proj'\]=\[8, 0\]: must be from 1.*32 per head group"),
    "list too large": (ranks([33, 8], head_group_size=2), r"k_proj'\]=\[33, 8\]: must be.*32 per head group"),
    "list with bool": (ranks([True, 8], head_group_size=2), r"k_proj'\]=\[True, 8\]: must be an int"),
    "group size negative": ({"group_size": -1}, r"group_size=-1: must be an integer of at least 0"),
    "group size float": ({"group_size": 32.0}, r"group_size=32\.0: must be an integer"),
    "group size bool": ({"group_size": True}, r"group_size=True: must be an integer"),
    "window negative": ({"residual_length": -32}, r"residual_length=-32: must be an integer of at least 0"),
    "window bool": ({"residual_length": True}, r"residual_length=True: must be an integer"),
    "sinks negative": ({"sink_length": -1}, r"sink_length=-1: must be an integer of at least 0"),
    "sinks bool": ({"sink_length": False}, r"sink_length=False: must be an integer"),
    "head group not a divisor": ({"head_group_size": 3}, r"head_group_size=3: must divide num_key_value_heads=4"),
    "head group too large": ({"head_group_size": 8}, r"head_group_size=8: must divide num_key_value_heads=4"),
    "head group zero": ({"head_group_size": 0}, r"head_group_size=0: must divide"),
    "head group negative": ({"head_group_size": -2}, r"head_group_size=-2: must divide"),
    "head group bool": ({"head_group_size": True}, r"head_group_size=True: must divide"),
    "use_kivi int": ({"use_kivi": 1}, r"use_kivi=1: must be True or False"),
    "rotation text": ({"k_hadamard": "on"}, r"k_hadamard='on': must be True or False"),
    "rotation none": ({"v_hadamard": None}, r"v_hadamard=None: must be True or False"),
}
REFUSALS |= {
    f"{field} {bits!r}": ({field: bits}, rf"{field}={bits!r}: must be one of 1, 1.5, 1.58, 2, 3, 4, 5, 6, 8, 16 bits")
    for field in ("k_bits", "v_bits")
    for bits in (0, 7, 9, 32, -2, 1.6, 2.5, True, "2", None)
}


@pytest.mark.parametrize("fields, message", REFUSALS.values(), ids=REFUSALS.keys())
def test_refused_at_construction(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)


@pytest.mark.parametrize("fields, message", REFUSALS.values(), ids=REFUSALS.keys())
def test_refused_when_a_model_is_built(fields, message):
    config = tiny_config()
    for field, value in fields.items():
        setattr(config, field, value)
    with pytest.raises(ValueError, match=message):
        ALRDLlamaForCausalLM(config)


@pytest.mark.parametrize("fields, message", REFUSALS.values(), ids=REFUSALS.keys())
def test_refused_when_a_cache_is_built(fields, message):
    config = tiny_config()
    for field, value in fields.items():
        setattr(config, field, value)
    with pytest.raises(ValueError, match=message):
        create_kivi_cache(config=config)


@pytest.mark.parametrize("field", ["k_bits", "v_bits", "group_size", "residual_length", "sink_length"])
@pytest.mark.parametrize("value", [-1, True, "4", None, 1.6])
def test_refused_by_a_cache_without_config(field, value):
    with pytest.raises(ValueError, match=rf"{field}={value!r}: must be"):
        create_kivi_cache(**{field: value})


def test_assigned_fields_are_read_and_checked_by_a_loaded_model(tmp_path):
    model = tiny_split(tmp_path, ranks=8)
    model.config.k_bits, model.config.group_size = 4, 64
    assert model.create_kivi_cache().scheme == CacheScheme(k_bits=4, group_size=64)
    assert model.create_kivi_cache(k_bits=8).scheme == CacheScheme(k_bits=8, group_size=64)
    with pytest.raises(ValueError, match="k_bits=7: must be one of"):
        model.create_kivi_cache(k_bits=7)
    with pytest.raises(ValueError, match="bits: no such setting"):
        model.create_kivi_cache(bits=4)

    model.config.k_bits = 7
    ids = torch.arange(1, 9)[None]
    for build in (
        model.create_kivi_cache,
        lambda: model(ids, use_cache=True),
        lambda: model.generate(ids, max_new_tokens=2),
    ):
        with pytest.raises(ValueError, match=r"k_bits=7: must be one of 1, 1\.5, 1\.58, 2, 3, 4, 5, 6, 8, 16 bits"):
            build()


@pytest.mark.parametrize("bits", [1, 1.58, 2, 3, 4, 5, 6, 8, 16, 2.0, 3.0, 16.0])
def test_widths_that_exist(bits):
    config = tiny_config(k_bits=bits, v_bits=bits, truncation_ranks=all_ranks(3, 9))
    assert (config.k_bits, config.v_bits) == (bits, bits)
    model = ALRDLlamaForCausalLM(config).eval()
    cache = model(torch.arange(1, 9)[None], use_cache=True).past_key_values
    assert isinstance(cache, KIVILatentCache)
    assert cache.scheme.k_bits == bits


def test_rank_and_length_that_no_group_divides():
    config = tiny_config(truncation_ranks=all_ranks(3, [7, 13]), head_group_size=2, group_size=5, residual_length=0)
    model = ALRDLlamaForCausalLM(config).eval()
    cache = model(torch.arange(1, 24)[None], use_cache=True).past_key_values
    assert cache.row_tokens() == [23]
    assert cache.layers[0].pool.used == 3


def test_helpers_make_the_same_dense_model_twice():
    first, second = tiny_dense(), tiny_dense()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises((ValueError, OSError)):
        ALRDLlamaConfig.from_pretrained(tmp_path)


# ---- types that no file keeps, settings that nothing would read


NUMBERS = {
    "k_bits": np.int64(4),
    "v_bits": np.float32(4),
    "group_size": np.int64(64),
    "residual_length": np.int32(8),
    "sink_length": np.int64(2),
    "head_group_size": np.int64(2),
    "use_kivi": np.True_,
    "k_hadamard": np.False_,
    "truncation_ranks": {K0: np.int64(8)},
    "width_tiers": {K0: [[[4, np.int64(4)], [4, 2]]]},
    "k_scheme": {"group_size": np.int64(16)},
    "v_scheme": {"protected": np.float32(0.1)},
    "v_scheme ": {"protected": 0.1, "protected_bits": np.int64(8)},
    "k_scheme ": {"rotation": np.True_},
    "v_scheme  ": {"tiers": (((np.int64(4), 2),),)},
    "k_bits ": Fraction(4),
}


@pytest.mark.parametrize(("field", "value"), NUMBERS.items(), ids=NUMBERS)
def test_numbers_that_json_does_not_keep_are_refused_where_they_enter(field, value):
    field = field.strip()
    ranks = {} if field == "truncation_ranks" else {"truncation_ranks": {K0: 8}}
    with pytest.raises(ValueError, match=field.split("_")[1]):
        tiny_config(**{field: value}, **ranks)
    if field in ("k_bits", "v_bits", "group_size", "residual_length", "sink_length", "k_scheme", "v_scheme"):
        with pytest.raises(ValueError, match=field.split("_")[0]):
            create_kivi_cache(**{field: value})


def test_numpy_floats_are_floats_of_python(tmp_path):
    tiny_config(k_bits=np.float64(1.58), v_scheme={"protected": np.float64(0.25)}).save_pretrained(tmp_path)
    config = ALRDLlamaConfig.from_pretrained(tmp_path)
    assert (config.k_bits, config.v_scheme) == (1.58, {"protected": 0.25})


@pytest.mark.parametrize("bits", [3, 16])
def test_one_width_for_a_side_with_tiers_is_refused(bits, tmp_path):
    """Nothing would read it: the tiers say the widths."""
    ranks, tiers = all_ranks(3, 8), {n: [[[4, 8], [4, 3]]] for n in all_ranks(3, {"k_proj": 8})}
    model = tiny_split(tmp_path, ranks, width_tiers=tiers)
    model.save_pretrained(tmp_path / "tiered")
    message = f"k_bits={bits}: must be 2 as stored, for the width_tiers of k_proj take its place"
    for load in (ALRDLlamaConfig.from_pretrained, ALRDLlamaForCausalLM.from_pretrained, AutoConfig.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "tiered", k_bits=bits)
    with pytest.raises(ValueError, match=message):
        ALRDLlamaConfig.from_llama(model.config, k_bits=bits)
    assigned = ALRDLlamaConfig.from_pretrained(tmp_path / "tiered")
    assigned.k_bits = 16
    with pytest.raises(
        ValueError, match="k_bits=16: must be 2 as stored, for the width_tiers of k_proj take its place"
    ):
        ALRDLlamaForCausalLM.from_pretrained(tmp_path / "tiered", config=assigned)
    one = ALRDLlamaForCausalLM.from_pretrained(tmp_path / "tiered", k_bits=bits, v_bits=3, width_tiers={})
    assert {(s.keys.bits, s.values.bits) for s in cache_schemes(one.create_kivi_cache())} == {(bits, 3)}
    assert {s.keys.bits for s in cache_schemes(model.create_kivi_cache(k_bits=bits))} == {bits}


def cache_schemes(cache) -> list[CacheScheme]:
    return [layer.scheme for layer in cache.layers]
