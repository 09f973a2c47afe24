"""Calibrated INT8: the YAML, the choice of modules, statistics of all batches, fake quantization, files, threads."""

import json
import os
import threading

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from modules.formats import calibrated_int8
from modules.formats.calibrated_int8 import (
    SIDES,
    TAIL_LENGTH,
    CalibratedScales,
    DynamicCacheConfig,
    DynamicCacheQuantizer,
    FakeQuantDynamicCache,
    ModuleScales,
    calibrate,
    deploy_fake_quant,
    fake_quantize,
    int8_parameters,
    load_process_config,
    select_attention_modules,
)
from modules.kivi_cache import CacheScheme, KIVILatentCache
from scripts.calibrate_int8 import EXAMPLE_CONFIG, Int8Config
from scripts.calibrate_int8 import main as calibrate_script
from tests.helpers import TINY_LLAMA, randomize_vectors, tiny_dense

#: The example of the msModelSlim documentation.
DOCUMENTED_YAML = """
spec:
  process:
    - type: "dynamic_cache"
      qconfig:
        scope: "per_channel"
        dtype: "int8"
        symmetric: true
        method: "minmax"
      include: [ "*" ]
      exclude: [ "model.layers.0.self_attn" ]
"""

DECODERS = {
    "llama-gqa": (LlamaConfig, LlamaForCausalLM, {}),
    "llama-mha": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 8}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
}
LAYERS = [f"model.layers.{i}.self_attn" for i in range(3)]
ASYMMETRIC = DynamicCacheConfig(symmetric=False)


def decoder(kind: str = "llama-gqa", seed: int = 0, **fields):
    config_class, model_class, own = DECODERS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config_class(**{**TINY_LLAMA, **own, **fields}))
        randomize_vectors(model)
    return model.eval()


def random_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def stored(model, cache=None, **inputs) -> list[dict[str, np.ndarray]]:
    """What a forward leaves in the cache: `[B·S, C]` keys and values of each layer."""
    cache = model(**inputs, past_key_values=DynamicCache() if cache is None else cache).past_key_values
    return [{side: as_tokens(getattr(layer, side)) for side in SIDES} for layer in cache.layers]


def as_tokens(states: torch.Tensor) -> np.ndarray:
    batch, heads, length, size = states.shape
    return np.einsum("bhsd->bshd", states.float().numpy()).reshape(batch * length, heads * size)


def numpy_round_trip(x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray) -> np.ndarray:
    """INT8 there and back of `[N, C]` tokens in float32, written down again."""
    divisor = np.where(scale > 0, scale, np.float32(1))
    codes = np.where(scale > 0, np.floor(np.clip((x - zero_point) / divisor, 0, 255) + np.float32(0.5)), 0).astype(
        np.float32
    )
    return codes * scale + zero_point


def numpy_parameters(low: np.ndarray, high: np.ndarray, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    if symmetric:
        scale = np.maximum(abs(low), abs(high)) / np.float32(127)
        return scale, np.float32(-128) * scale
    return (high - low) / np.float32(255), low


class NumpyInt8Cache(DynamicCache):
    """A cache that rounds by itself, with constants of each layer or, given none, with those of all it has seen."""

    def __init__(self, scales: CalibratedScales | None = None, symmetric: bool = True):
        super().__init__()
        self.constants = scales and scales.by_layer(8)
        self.symmetric, self.ranges = symmetric, {}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        states = [self.rounded(layer_idx, s, x) for s, x in zip(SIDES, (key_states, value_states), strict=True)]
        return super().update(*states, layer_idx, *args, **kwargs)

    def rounded(self, layer_idx, side, states):
        x = as_tokens(states)
        if self.constants is None:
            low, high = self.ranges.get((layer_idx, side), (np.inf, -np.inf))
            low, high = np.minimum(low, x.min(0)), np.maximum(high, x.max(0))
            self.ranges[layer_idx, side] = low, high
            scale, zero_point = numpy_parameters(low, high, self.symmetric)
        elif self.constants[layer_idx] is None:
            return states
        else:
            scale, zero_point = (t.numpy() for t in self.constants[layer_idx][side])
        batch, heads, length, size = states.shape
        rounded = numpy_round_trip(x, scale, zero_point).reshape(batch, length, heads, size)
        return torch.from_numpy(rounded).transpose(1, 2)

    def emptied(self) -> "NumpyInt8Cache":
        """For the next text: the ranges stay, the tokens go."""
        fresh = NumpyInt8Cache(symmetric=self.symmetric)
        fresh.ranges = self.ranges
        return fresh


def hooks_of(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def assert_same_scales(a: CalibratedScales, b: CalibratedScales, only: list[str] | None = None, **tolerance):
    assert a.modules.keys() == b.modules.keys()
    for name in only or a.modules:
        assert a.modules[name].layer_idx == b.modules[name].layer_idx
        for side in SIDES:
            for x, y in zip(getattr(a.modules[name], side), getattr(b.modules[name], side), strict=True):
                torch.testing.assert_close(x, y, **(tolerance or {"rtol": 0, "atol": 0}))


# ---- configuration


def test_the_documented_yaml(tmp_path):
    file = tmp_path / "process.yaml"
    file.write_text(DOCUMENTED_YAML)
    config = load_process_config(file)
    assert config == load_process_config(yaml.safe_load(DOCUMENTED_YAML))
    assert config == DynamicCacheConfig("per_channel", "int8", True, "minmax", ("*",), ("model.layers.0.self_attn",))


def test_documented_defaults():
    config = load_process_config({"spec": {"process": [{"type": "dynamic_cache", "qconfig": {}}]}})
    assert config == DynamicCacheConfig("per_channel", "int8", True, "minmax", ("*",), ())


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("qconfig.scope", "per_tensor", r"scope='per_tensor': must be 'per_channel'"),
        ("qconfig.dtype", "int4", r"dtype='int4': must be 'int8'"),
        ("qconfig.dtype", 8, r"dtype=8: must be 'int8'"),
        ("qconfig.method", "percentile", r"method='percentile': must be 'minmax'"),
        ("qconfig.symmetric", "true", r"symmetric='true': must be true or false"),
        ("qconfig.symmetric", 1, r"symmetric=1: must be true or false"),
        ("qconfig.symetric", False, r"qconfig: unknown \['symetric'\]; the keys are dtype, method, scope, symmetric"),
        ("qconfig", None, r"qconfig=None: must be a mapping"),
        ("type", "linear_quant", r"type='linear_quant': must be 'dynamic_cache'"),
        ("includes", ["*"], r"spec.process\[0\]: unknown \['includes'\]"),
        ("include", "*", r"include='\*': must be a list of patterns"),
        ("include", [], r"include=\[\]: must hold a pattern"),
        ("include", None, r"include=None: must be a list"),
        ("exclude", [0], r"exclude=\[0\]: must be a list of patterns"),
        ("exclude", [""], r"exclude=\[''\]: must be a list of patterns, none of them empty"),
    ],
)
def test_refused_settings(path, value, message):
    content = yaml.safe_load(DOCUMENTED_YAML)
    *parents, last = path.split(".")
    target = content["spec"]["process"][0]
    for parent in parents:
        target = target[parent]
    target[last] = value
    with pytest.raises(ValueError, match=message):
        load_process_config(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("spec: [", "is not YAML"),
        ("just words", "must be a mapping with spec"),
        ("spec: {}", "spec: process must be given"),
        ("apiversion: 1\nspec: {process: []}", r"file: unknown \['apiversion'\]"),
        ("spec: {process: [], 7: 1, name: 2}", r"spec: unknown \[7, 'name'\]"),
        ("spec: {process: []}", r"spec.process=\[\]: must be a list of one process"),
        ("spec: {process: [{}, {}]}", "must be a list of one process"),
        ("spec: {process: {type: dynamic_cache}}", "must be a list of one process"),
        ("spec: {process: [{qconfig: {}}]}", "type must be given"),
        ("spec: {process: [{type: dynamic_cache}]}", "qconfig must be given"),
        ("spec: {process: [!!python/object/apply:os.getcwd []]}", "is not YAML"),
    ],
)
def test_refused_files(tmp_path, text, message):
    file = tmp_path / "process.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_process_config(file)


# ---- which modules


def test_selection_by_globs():
    model = decoder()
    assert list(select_attention_modules(model)) == LAYERS
    assert select_attention_modules(model)[LAYERS[1]] is model.model.layers[1].self_attn
    assert list(select_attention_modules(model, ["*.1.*", "model.layers.2*"])) == LAYERS[1:]
    assert list(select_attention_modules(model, ["*"], ["*.0.self_attn"])) == LAYERS[1:]
    assert list(select_attention_modules(model, [LAYERS[0], LAYERS[1]], [LAYERS[0]])) == [LAYERS[1]]


def test_selection_errors():
    model = decoder()
    near = r"near: model\.layers\.\d\.self_attn"
    with pytest.raises(ValueError, match=rf"include='model.layers.9.self_attn': matches no attention module; {near}"):
        select_attention_modules(model, ["*", "model.layers.9.self_attn"])
    with pytest.raises(ValueError, match=rf"exclude='model.layer.0.self_attn': matches no attention module; {near}"):
        select_attention_modules(model, ["*"], ["model.layer.0.self_attn"])
    with pytest.raises(ValueError, match=r"include='model.layers.0.mlp': matches no attention"):
        select_attention_modules(model, ["model.layers.0.mlp"])
    with pytest.raises(ValueError, match=r"exclude=\['\*'\]: must leave one"):
        select_attention_modules(model, ["*.0.*"], ["*"])
    with pytest.raises(ValueError, match=r"Linear: has no module named \*self_attn"):
        select_attention_modules(nn.Linear(2, 2))


# ---- parameters and codes


def test_symmetric_codes_are_signed_eight_bit():
    scale = torch.tensor([0.01, 3.0])
    given = int8_parameters(-127 * scale, 50 * scale, symmetric=True)
    torch.testing.assert_close(given[0], scale)
    signed = torch.arange(-200, 201)[:, None]
    for offset in (-0.49, -0.2, 0, 0.49):
        rounded = fake_quantize((signed + offset) * scale, *given)
        torch.testing.assert_close(rounded, signed.clamp(-128, 127) * scale, rtol=0, atol=1e-4)


def test_asymmetric_codes_are_unsigned_eight_bit():
    low, high = torch.tensor([-1.0, 5.0]), torch.tensor([1.55, 5.51])
    scale, zero_point = int8_parameters(low, high, symmetric=False)
    assert torch.equal(zero_point, low)
    torch.testing.assert_close(scale, torch.tensor([0.01, 0.002]))
    codes = torch.arange(-20, 300)[:, None]
    for offset in (-0.49, 0.49):
        rounded = fake_quantize((codes + offset) * scale + low, scale, zero_point)
        torch.testing.assert_close(rounded, codes.clamp(0, 255) * scale + low, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_constant_channels(dtype):
    x = torch.tensor([0.0, 2.5]).expand(1, 1, 6, 2).to(dtype)
    for symmetric in (True, False):
        quantizer = DynamicCacheQuantizer(symmetric)
        assert torch.equal(quantizer(x), x) or symmetric
        scale, zero_point = quantizer.scale_and_zero_point()
        assert scale[0] == 0 and zero_point[0] == 0
        deployed = FakeQuantDynamicCache(scale, zero_point)(torch.randn(2, 1, 5, 2).to(dtype))
        assert deployed.dtype == dtype and (deployed[..., 0] == 0).all() and deployed.isfinite().all()
        if not symmetric:
            assert scale[1] == 0 and (deployed[..., 1] == 2.5).all()


def test_a_step_beyond_the_type_stays_finite():
    largest = torch.finfo(torch.float16).max
    x = torch.tensor([-largest, largest], dtype=torch.float16).view(1, 1, 2, 1)
    # Scales of a bfloat16 model in a float16 one: the nearest multiple of 1000 is 66,000.
    assert torch.equal(FakeQuantDynamicCache(torch.tensor([1000.0]), torch.tensor([-128000.0]))(x), x)


# ---- DynamicCacheQuantizer and FakeQuantDynamicCache


@pytest.mark.parametrize("symmetric", [True, False])
def test_quantizer_keeps_all_calls_and_rounds_with_what_it_has(symmetric):
    quantizer, seen = DynamicCacheQuantizer(symmetric), []
    # The widest call is neither the last nor the first, and lengths differ as in prefill and decode.
    for length, width in ((5, 1.0), (7, 9.0), (1, 0.5), (3, 2.0)):
        x = torch.randn(2, 3, length, 4) * width + 0.3
        seen.append(as_tokens(x))
        every = np.concatenate(seen)
        low, high = every.min(0), every.max(0)
        expected = numpy_round_trip(seen[-1], *numpy_parameters(low, high, symmetric))
        rounded = quantizer(x)
        assert rounded.shape == x.shape
        np.testing.assert_array_equal(as_tokens(rounded), expected)
        np.testing.assert_array_equal(quantizer.minimum.numpy(), low)
        np.testing.assert_array_equal(quantizer.maximum.numpy(), high)
    assert quantizer.tokens == len(every) == 32
    fixed = FakeQuantDynamicCache(*quantizer.scale_and_zero_point())
    assert torch.equal(fixed(x), rounded)
    # What lies outside is clipped, at most one step beyond the range.
    assert fixed(100 * x).abs().max() <= quantizer.scale_and_zero_point()[0].max() * 128 + 9 * 4


def test_quantizer_refusals():
    quantizer = DynamicCacheQuantizer(name="model.layers.0.self_attn keys")
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match=r"model.layers.0.self_attn keys: states .* must be finite"):
            quantizer(torch.full((1, 2, 3, 4), bad))
    quantizer(torch.randn(1, 2, 3, 4))
    with pytest.raises(ValueError, match=r"keys: 4 channels must be 8"):
        quantizer(torch.randn(1, 1, 3, 4))
    with pytest.raises(ValueError, match=r"keys: mask of \[1, 2\] must be \[1, 3\]"):
        quantizer(torch.randn(1, 2, 3, 4), torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"values: 4 channels must be 8, as calibrated"):
        FakeQuantDynamicCache(torch.ones(8), torch.zeros(8), "values")(torch.randn(1, 1, 3, 4))


@pytest.mark.parametrize("percentile", [90, 99.9, 100, 50.5])
def test_percentile_is_numpys(percentile):
    for symmetric in (True, False):
        quantizer, seen = DynamicCacheQuantizer(symmetric, percentile), []
        for length in (1, 400, 30):
            x = torch.randn(2, 2, length, 3) ** 3
            quantizer(x)
            seen.append(as_tokens(x))
            every = np.concatenate(seen).astype(np.float64)
            low, high = np.percentile(every, [100 - percentile, percentile], axis=0)
            scale, zero_point = numpy_parameters(low, high, symmetric)
            np.testing.assert_allclose(quantizer.scale_and_zero_point()[0], scale, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(quantizer.scale_and_zero_point()[1], zero_point, rtol=1e-4, atol=1e-6)


def test_percentile_of_more_tokens_than_the_tails_hold():
    quantizer, seen = DynamicCacheQuantizer(percentile=99), []
    for width in (4, 1, 2):
        x = torch.randn(1, 1, TAIL_LENGTH, 3) * width
        quantizer(x)
        seen.append(as_tokens(x))
    low, high = np.percentile(np.concatenate(seen).astype(np.float64), [1, 99], axis=0)
    for found, expected in zip(quantizer.range(), (low, high), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert len(quantizer.lower_tail) == len(quantizer.upper_tail) == TAIL_LENGTH


def test_percentile_beyond_the_tails_is_refused():
    limit = 2 * (TAIL_LENGTH - 1) + 1
    quantizer = DynamicCacheQuantizer(percentile=50.0 + 1e-9, name="values")
    x = torch.randn(1, 1, limit, 2)
    quantizer(x[:, :, :-1])
    np.testing.assert_allclose(
        quantizer.range()[1], np.percentile(as_tokens(x[:, :, :-1]), 50 + 1e-9, axis=0), atol=1e-6
    )
    with pytest.raises(ValueError, match=r"percentile=50.0\d+: values has had 4,097 tokens, must be at most 4,09\d"):
        quantizer(torch.randn(1, 1, 3, 2))


@pytest.mark.parametrize("percentile", [50, 0, 100.1, -1, True, "99", float("nan")])
def test_refused_percentiles(percentile):
    with pytest.raises(ValueError, match=r"percentile=.*: must be None \(min-max\), or above 50 and at most 100"):
        DynamicCacheQuantizer(percentile=percentile)


# ---- calibration of models


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", DECODERS)
def test_calibration_equals_numpy_over_all_batches(kind, symmetric):
    model = decoder(kind)
    batches = [random_ids(2, 17, seed=1), random_ids(1, 40, seed=2), random_ids(3, 5, seed=3)]
    scales = calibrate(model, iter(batches), DynamicCacheConfig(symmetric=symmetric))
    assert list(scales.modules) == LAYERS and scales.tokens == 34 + 40 + 15
    assert [module.layer_idx for module in scales.modules.values()] == [0, 1, 2]

    cache = NumpyInt8Cache(symmetric=symmetric)
    for ids in batches:
        cache = cache.emptied()
        stored(model, cache, input_ids=ids)
    for i, module in enumerate(scales.modules.values()):
        for side in SIDES:
            scale, zero_point = getattr(module, side)
            assert scale.dtype == zero_point.dtype == torch.float32
            assert scale.shape == (model.config.num_key_value_heads * 16,)
            expected = numpy_parameters(*cache.ranges[i, side], symmetric)
            np.testing.assert_array_equal(scale.numpy(), expected[0])
            np.testing.assert_array_equal(zero_point.numpy(), expected[1])

    # The last batch alone is another answer, so is each batch left out.
    for fewer in (batches[2:], batches[1:], batches[:2]):
        other = calibrate(model, fewer, DynamicCacheConfig(symmetric=symmetric))
        assert not torch.equal(other.modules[LAYERS[0]].keys[0], scales.modules[LAYERS[0]].keys[0])
    assert_same_scales(scales, calibrate(model, batches[::-1], DynamicCacheConfig(symmetric=symmetric)), LAYERS[:1])


def test_calibration_on_a_percentile():
    model, ids = decoder(), random_ids(4, 60)
    scales = calibrate(model, ids.split(1), ASYMMETRIC, percentile=97)
    plain = stored(model, input_ids=ids)[0]
    for side in SIDES:
        low, high = np.percentile(plain[side].astype(np.float64), [3, 97], axis=0)
        scale, zero_point = getattr(scales.modules[LAYERS[0]], side)
        np.testing.assert_allclose(scale, (high - low) / 255, rtol=1e-4)
        np.testing.assert_allclose(zero_point, low, rtol=1e-4, atol=1e-6)
    assert scales.percentile == 97


def test_pads_do_not_count():
    model = decoder()
    with torch.no_grad():
        # The library initialises the embedding of the pad with zeros, which are nobody's extremes.
        model.model.embed_tokens.weight[0].normal_()
    short, long = random_ids(1, 9, seed=1), random_ids(1, 14, seed=2)
    alone = calibrate(model, [long, short])
    ids = torch.cat([long, nn.functional.pad(short, (0, 5), value=0)])
    mask = (torch.arange(14) < torch.tensor([[14], [9]])).long()
    padded = calibrate(model, [{"input_ids": ids, "attention_mask": mask}])
    assert padded.tokens == alone.tokens == 23
    assert_same_scales(padded, alone, LAYERS[:1], rtol=1e-5, atol=1e-6)
    counted = calibrate(model, [ids])
    assert counted.tokens == 28
    assert not torch.allclose(counted.modules[LAYERS[0]].values[0], alone.modules[LAYERS[0]].values[0])

    left = {
        "input_ids": torch.cat([long, nn.functional.pad(short, (5, 0), value=0)]),
        "attention_mask": mask.flip(1),
        "position_ids": (mask.flip(1).cumsum(1) - 1).clamp_min(0),
    }
    assert_same_scales(calibrate(model, [left]), alone, LAYERS[:1], rtol=1e-5, atol=1e-6)
    # A batch of nothing but pads, first, changes nothing.
    empty = {"input_ids": torch.zeros(1, 4, dtype=torch.long), "attention_mask": torch.zeros(1, 4, dtype=torch.long)}
    assert_same_scales(calibrate(model, [empty, left]), calibrate(model, [left]))


def test_a_text_in_pieces_with_one_cache():
    model, ids = decoder(), random_ids(2, 20)
    cache, mask = DynamicCache(), torch.ones(2, 20, dtype=torch.long)
    mask[1, 15:] = 0
    pieces = (
        {"input_ids": ids[:, a:b], "attention_mask": mask[:, :b], "past_key_values": cache}
        for a, b in ((0, 12), (12, 13), (13, 20))
    )
    whole = calibrate(model, [{"input_ids": ids, "attention_mask": mask}])
    assert_same_scales(calibrate(model, pieces), whole, LAYERS[:1], rtol=1e-5, atol=1e-6)
    assert cache.get_seq_length() == 20


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches: must hold at least one token"),
        (random_ids(2, 5), r"batches: \[5\] must be \[B, S\] input_ids or a mapping"),
        ({"input_ids": random_ids(2, 5)}, r"batches: str must be \[B, S\] input_ids or a mapping"),
        (
            [{"input_ids": random_ids(1, 4), "attention_mask": torch.zeros(1, 4, dtype=torch.long)}],
            "at least one token that is no pad",
        ),
        (
            [{"input_ids": random_ids(1, 4), "attention_mask": torch.ones(1, 1, 4, 4)}],
            r"attention_mask: \[1, 1, 4, 4\] must be \[B, S\]",
        ),
    ],
)
def test_refused_batches(batches, message):
    model = decoder()
    with pytest.raises(ValueError, match=message):
        calibrate(model, batches)
    assert hooks_of(model) == 0


@pytest.mark.parametrize(("projection", "side"), [("k_proj", "keys"), ("v_proj", "values")])
def test_rubbish_in_a_state_names_module_and_side(projection, side):
    model = decoder()
    with torch.no_grad():
        getattr(model.model.layers[1].self_attn, projection).weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=rf"model.layers.1.self_attn {side}: .* NaN or Inf"):
        calibrate(model, [random_ids(1, 4)])
    assert hooks_of(model) == 0


def test_excluded_layers_stay_exact():
    model, ids = decoder(), random_ids(2, 20)
    scales = calibrate(model, [ids], DynamicCacheConfig(include=["*"], exclude=["model.layers.0.self_attn"]))
    assert list(scales.modules) == LAYERS[1:]
    layers = scales.by_layer(3)
    assert layers[0] is None and layers[1]["keys"] is scales.modules[LAYERS[1]].keys
    plain = stored(model, input_ids=ids)
    with deploy_fake_quant(model, scales):
        deployed = stored(model, input_ids=ids)
    for side in SIDES:
        np.testing.assert_array_equal(deployed[0][side], plain[0][side])
        scale, zero_point = (t.numpy() for t in layers[1][side])
        np.testing.assert_array_equal(deployed[1][side], numpy_round_trip(plain[1][side], scale, zero_point))
        assert (deployed[1][side] != plain[1][side]).mean() > 0.9


# ---- deployment


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", DECODERS)
def test_deployed_model_equals_a_cache_that_rounds_by_itself(kind, symmetric):
    model, ids = decoder(kind), random_ids(2, 30, seed=5)
    scales = calibrate(model, [random_ids(2, 30)], DynamicCacheConfig(symmetric=symmetric), percentile=99)
    plain = stored(model, input_ids=ids)
    cache = DynamicCache()
    with deploy_fake_quant(model, scales):
        deployed = stored(model, cache, input_ids=ids)
    assert type(cache) is DynamicCache and vars(cache).keys() == vars(DynamicCache()).keys()
    expected = stored(model, NumpyInt8Cache(scales), input_ids=ids)
    for layer, exact, reference in zip(deployed, plain, expected, strict=True):
        for side in SIDES:
            np.testing.assert_array_equal(layer[side], reference[side])
            assert (layer[side] != exact[side]).mean() > 0.9
    again = stored(model, input_ids=ids)
    assert hooks_of(model) == 0 and all(np.array_equal(a[s], p[s]) for a, p in zip(again, plain) for s in SIDES)


@pytest.mark.parametrize("kind", ["llama-gqa", "qwen3"])
def test_generate_with_padding_and_beams(kind):
    model, ids = decoder(kind), random_ids(2, 12)
    scales = calibrate(model, [random_ids(4, 12, seed=8)], percentile=90)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    settings = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "attention_mask": mask}
    for beams in (1, 3):
        handle = deploy_fake_quant(model, scales)
        deployed = model.generate(ids, num_beams=beams, **settings)
        handle.remove()
        handle.remove()
        expected = model.generate(ids, num_beams=beams, past_key_values=NumpyInt8Cache(scales), **settings)
        assert torch.equal(deployed.sequences, expected.sequences)
        assert type(deployed.past_key_values) is DynamicCache
        for layer, constants in zip(deployed.past_key_values.layers, scales.by_layer(3), strict=True):
            for side in SIDES:
                scale, zero_point = (t.numpy() for t in constants[side])
                codes = (as_tokens(getattr(layer, side)) - zero_point) / scale
                assert abs(codes - np.rint(codes)).max() < 1e-2 and codes.min() > -0.1 and codes.max() < 255.1
    assert hooks_of(model) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    model, ids = decoder().to(dtype), random_ids(2, 10)
    scales = calibrate(model, [ids])
    with deploy_fake_quant(model, scales):
        cache = model(ids).past_key_values
    assert cache.layers[0].keys.dtype == dtype and scales.modules[LAYERS[0]].keys[0].dtype == torch.float32
    with deploy_fake_quant(model.float(), scales):
        assert model(ids).past_key_values.layers[0].keys.dtype == torch.float32


def test_errors_take_the_hooks_off():
    model, ids = decoder(), random_ids(1, 4)
    scales = calibrate(model, [ids])
    with pytest.raises(IndexError), deploy_fake_quant(model, scales):
        model(torch.full((1, 4), 1000))
    assert hooks_of(model) == 0


def test_deployment_on_another_model_is_refused():
    scales = calibrate(decoder(), [random_ids(1, 4)])
    for other, message in (
        (decoder("qwen2"), "model_type='qwen2': must be 'llama', as calibrated"),
        (decoder("llama-mha"), "num_key_value_heads=8: must be 4"),
        (decoder(num_hidden_layers=2), "num_hidden_layers=2: must be 3"),
        (decoder(head_dim=32), "head_dim=32: must be 16"),
        (decoder().model, r"model.layers.0.self_attn: was calibrated, is not in the model; near: layers.0.self_attn"),
    ):
        with pytest.raises(ValueError, match=message):
            deploy_fake_quant(other, scales)
        assert hooks_of(other) == 0


# ---- nothing intercepted


def test_a_forward_without_a_cache_is_an_error():
    model, ids = decoder(), random_ids(1, 4)
    message = r"model.layers.0.self_attn: its forward stored nothing through cache.update \(cache arguments: none\)"
    with pytest.raises(RuntimeError, match=message):
        calibrate(model, [{"input_ids": ids, "use_cache": False}])
    with deploy_fake_quant(model, calibrate(model, [ids])), pytest.raises(RuntimeError, match=message):
        model(ids, use_cache=False)
    assert hooks_of(model) == 0


def test_two_deployments_on_a_model_are_an_error():
    model, ids = decoder(), random_ids(1, 4)
    scales = calibrate(model, [ids])
    with deploy_fake_quant(model, scales):
        with deploy_fake_quant(model, scales), pytest.raises(RuntimeError, match="no other interception may be"):
            model(ids)
        model(ids)


class ToyAttention(nn.Module):
    """Attention over a cache that it gets as its second positional argument, and returns."""

    def __init__(self, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, x, cache, unrelated=None):
        states = x.view(*x.shape[:2], 2, -1).transpose(1, 2)
        assert isinstance(cache, ToyCache) and len(cache) == len(cache.log) and list(cache) == cache.log and cache
        assert unrelated is None or type(unrelated) in (dict, set)
        keys, values = cache.update(states, value_states=-states, layer_idx=self.layer_idx, note="kept")
        cache.calls = cache.calls + 1
        return keys.transpose(1, 2).flatten(2) + 0.0 * values.sum(), cache


class ToyCache:
    """Nothing of the library's: a list of what it was given."""

    def __init__(self):
        self.log, self.calls = ["start"], 0

    def __len__(self):
        return len(self.log)

    def __getitem__(self, index):
        return self.log[index]

    def update(self, key_states, value_states, layer_idx, note=None):
        self.log.append((key_states, value_states, layer_idx, note))
        return key_states, value_states


class ToyDecoder(nn.Module):
    """Layers of these attention modules; the forward of those listed in `direct` is called past the hooks."""

    def __init__(self, *attentions: nn.Module, direct: tuple[int, ...] = ()):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"self_attn": attention}) for attention in attentions)
        self.direct = direct

    def forward(self, x, cache):
        for i, layer in enumerate(self.layers):
            attention = layer["self_attn"]
            x, returned = (attention.forward if i in self.direct else attention)(x, cache, {"a": 1} if i else {2})
            assert returned is cache
        return x


def test_any_object_with_an_update_is_a_cache():
    model, x, cache = ToyDecoder(ToyAttention(0), ToyAttention(1)), torch.randn(2, 3, 8), ToyCache()
    scales = calibrate(model, [{"x": x, "cache": cache}], ASYMMETRIC)
    assert [entry[2:] for entry in cache.log[1:]] == [(0, "kept"), (1, "kept")] and cache.calls == 2
    assert vars(cache).keys() == {"log", "calls"}
    low, high = x.view(-1, 8).amin(0), x.view(-1, 8).amax(0)
    torch.testing.assert_close(scales.modules["layers.0.self_attn"].keys, ((high - low) / 255, low))
    torch.testing.assert_close(scales.modules["layers.0.self_attn"].values, ((high - low) / 255, -high))
    with deploy_fake_quant(model, scales):
        model(10 * x, fresh := ToyCache())
    keys = fresh.log[1][0].transpose(1, 2).reshape(-1, 8)
    assert (keys <= high + 1e-6).all() and (keys >= low - 1e-6).all()


def test_a_duck_typed_cache_in_llama():
    class DuckCache:
        def __init__(self):
            self.kept = {}

        def update(self, key_states, value_states, layer_idx):
            old = self.kept.get(layer_idx, (key_states[:, :, :0], value_states[:, :, :0]))
            self.kept[layer_idx] = [torch.cat(pair, 2) for pair in zip(old, (key_states, value_states), strict=True)]
            return self.kept[layer_idx]

        def get_seq_length(self, layer_idx=0):
            return self.kept[0][0].shape[2] if self.kept else 0

        def get_mask_sizes(self, query_length, layer_idx):
            return self.get_seq_length() + query_length, 0

        def get_query_offset(self, layer_idx):
            return self.get_seq_length()

    model, ids = decoder(), random_ids(2, 11)
    own = calibrate(model, [{"input_ids": ids, "past_key_values": DuckCache()}])
    assert_same_scales(own, calibrate(model, [ids]), rtol=1e-5, atol=1e-6)
    cache = DuckCache()
    with torch.no_grad(), deploy_fake_quant(model, own):
        for piece in ids.split((6, 5), dim=1):
            model(piece, past_key_values=cache)
    expected = stored(model, NumpyInt8Cache(own), input_ids=ids)
    np.testing.assert_allclose(as_tokens(cache.kept[0][0]), expected[0]["keys"], atol=1e-5)


class Nested(nn.Module):
    """An attention module around another one, which does the work."""

    def __init__(self, inner):
        super().__init__()
        self.self_attn = inner

    def forward(self, x, cache, unrelated=None):
        return self.self_attn(x, cache)


class Forgetful(nn.Module):
    def forward(self, x, cache, unrelated=None):
        return x, cache


class Restless(ToyAttention):
    """Updates another layer at every call."""

    def forward(self, *args):
        output = super().forward(*args)
        self.layer_idx += 1
        return output


def test_modules_that_escape_are_errors():
    x = torch.randn(1, 3, 8)

    def run(model, config=None, batches=1):
        try:
            return calibrate(model, [{"x": x, "cache": ToyCache()} for _ in range(batches)], config)
        finally:
            assert hooks_of(model) == 0

    with pytest.raises(RuntimeError, match=r"layers.1.self_attn: .*\(cache arguments: ToyCache\)"):
        run(ToyDecoder(ToyAttention(0), Forgetful()))
    with pytest.raises(RuntimeError, match=r"layers.1.self_attn: not called in a forward of ToyDecoder"):
        run(ToyDecoder(ToyAttention(0), ToyAttention(1), direct=(1,)))
    with pytest.raises(RuntimeError, match=r"layers.0.self_attn: its forward stored nothing"):
        run(ToyDecoder(Nested(ToyAttention(0))))
    with pytest.raises(ValueError, match=r"layers.0.self_attn: layer_idx=None: must be an integer"):
        run(ToyDecoder(ToyAttention(None)))
    with pytest.raises(ValueError, match=r"layers.0.self_attn: layer_idx=1 must be 0, as before"):
        run(ToyDecoder(Restless(0)), batches=2)
    assert list(run(ToyDecoder(Nested(ToyAttention(0))), DynamicCacheConfig(exclude=["layers.0.self_attn"])).modules)
    deployed = ToyDecoder(ToyAttention(0), ToyAttention(1))
    scales, deployed.direct = run(deployed), (0, 1)
    with deploy_fake_quant(deployed, scales), pytest.raises(RuntimeError, match=r"layers.0.self_attn, layers.1.self"):
        deployed(x, ToyCache())
    deployed.direct, deployed.layers[1]["self_attn"].layer_idx = (), 0
    with deploy_fake_quant(deployed, scales), pytest.raises(ValueError, match="layer_idx=0 must be 1, as calibrated"):
        deployed(x, ToyCache())


# ---- threads


def test_two_models_in_two_threads_do_not_meet():
    models = [decoder(seed=1), decoder(seed=2)]
    texts = [random_ids(2, 16, seed=i) for i in range(6)]
    scales = [calibrate(model, texts, percentile=p) for model, p in zip(models, (None, 80), strict=True)]
    alone = [[stored(m, NumpyInt8Cache(s), input_ids=ids) for ids in texts] for m, s in zip(models, scales)]
    found = [None, None]

    def run(i):
        found[i] = calibrate(models[i], texts, percentile=(None, 80)[i])
        with deploy_fake_quant(models[i], scales[i]):
            found[i] = found[i], [stored(models[i], input_ids=ids) for ids in texts]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert_same_scales(found[i][0], scales[i])
        for one, two in zip(found[i][1], alone[i], strict=True):
            assert all(np.array_equal(a[side], b[side]) for a, b in zip(one, two, strict=True) for side in SIDES)


def test_another_thread_may_use_the_model_during_calibration():
    model, ids, foreign = decoder(), random_ids(1, 8, seed=1), random_ids(4, 30, seed=2)
    expected = calibrate(model, [ids, ids]), stored(model, input_ids=foreign)
    seen = []

    def batches():
        yield ids
        other = threading.Thread(
            target=lambda: seen.append((stored(model, input_ids=foreign), model(ids, use_cache=False)))
        )
        other.start()
        other.join()
        yield ids

    assert_same_scales(calibrate(model, batches()), expected[0])
    assert all(np.array_equal(a[side], b[side]) for a, b in zip(seen[0][0], expected[1]) for side in SIDES)


# ---- the result


def test_by_layer_refusals():
    one = ModuleScales(0, *[(torch.ones(4), torch.zeros(4))] * 2)
    about = {"config": DynamicCacheConfig(), "percentile": None, "tokens": 1, "model": {}}
    scales = CalibratedScales({"a.self_attn": one, "b.self_attn": one}, **about)
    with pytest.raises(ValueError, match=r"b.self_attn: layer_idx=0 must not be another module's"):
        scales.by_layer(2)
    with pytest.raises(ValueError, match=r"num_layers=0: a.self_attn updates layer 0"):
        scales.by_layer(0)
    bad = {
        "scale.*at least 0": (-torch.ones(4), torch.zeros(4)),
        r"zero_point: \[3\]": (torch.ones(4), torch.zeros(3)),
        "float64 must be finite float32": (torch.ones(4).double(), torch.zeros(4)),
        "scale: .*finite": (torch.tensor([torch.nan]), torch.zeros(1)),
    }
    for message, pair in bad.items():
        with pytest.raises(ValueError, match=rf"a\.keys\.{message}|a\.keys\.\w+: .*{message}"):
            CalibratedScales({"a": ModuleScales(0, pair, one.values)}, **about)
    with pytest.raises(ValueError, match=r"modules=\{\}: must map"):
        CalibratedScales({}, **about)


@pytest.fixture(scope="module")
def qwen_scales():
    config = DynamicCacheConfig(symmetric=False, exclude=["*.1.self_attn"])
    return calibrate(decoder("qwen2"), [random_ids(2, 10)], config, percentile=99.5)


def test_scales_survive_a_file(qwen_scales, tmp_path):
    qwen_scales.save(tmp_path / "deep" / "scales")
    loaded = CalibratedScales.load(tmp_path / "deep" / "scales")
    assert_same_scales(loaded, qwen_scales)
    for field in ("config", "percentile", "tokens", "model"):
        assert getattr(loaded, field) == getattr(qwen_scales, field)
    assert loaded.model["model_type"] == "qwen2" and loaded.tokens == 20
    assert sorted(file.name for file in (tmp_path / "deep" / "scales").iterdir()) == [
        "int8_scales.json",
        "int8_scales.safetensors",
    ]
    model, ids = decoder("qwen2"), random_ids(1, 6)
    with deploy_fake_quant(model, loaded):
        found = stored(model, input_ids=ids)
    with deploy_fake_quant(model, qwen_scales):
        assert all(np.array_equal(a[s], b[s]) for a, b in zip(found, stored(model, input_ids=ids)) for s in SIDES)


def test_an_interrupted_save_leaves_the_old_files(qwen_scales, tmp_path, monkeypatch):
    qwen_scales.save(tmp_path)
    other = calibrate(decoder(), [random_ids(1, 5)])

    def full_disk(*args):
        raise OSError("disk full")

    monkeypatch.setattr(calibrated_int8.os, "replace", full_disk)
    with pytest.raises(OSError, match="disk full"):
        other.save(tmp_path)
    monkeypatch.undo()
    assert_same_scales(CalibratedScales.load(tmp_path), qwen_scales)
    assert len(os.listdir(tmp_path)) == 2


def edited(**changes):
    """A damage that sets (or, with `None` at the top, removes) fields of the record."""

    def damage(folder):
        file = folder / "int8_scales.json"
        record = json.loads(file.read_text())
        for field, value in changes.items():
            record[field] = value(record[field]) if callable(value) else value
        file.write_text(json.dumps(record))

    return damage


def truncated(name):
    def damage(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:-20])

    return damage


def of_another_calibration(folder):
    calibrate(decoder("qwen2"), [random_ids(2, 9)]).save(folder / "other")
    os.replace(folder / "other" / "int8_scales.safetensors", folder / "int8_scales.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated("int8_scales.safetensors"), r"int8_scales.safetensors: sha256=\w+ must be \w+"),
        (truncated("int8_scales.json"), r"int8_scales.json: is not JSON"),
        (of_another_calibration, r"int8_scales.safetensors: sha256=\w+ must be"),
        (edited(version=2), r"version=2 must be 1"),
        (edited(kind="ranks"), r"kind='ranks' must be 'calibrated_int8'"),
        (edited(extra=1), r"unknown \['extra'\]"),
        (edited(modules=lambda m: {LAYERS[0]: 0}), r"safetensors: unknown \['model.layers.2.self_attn.keys"),
        (edited(modules=lambda m: {**m, "x.self_attn": 1}), r"safetensors: x.self_attn.keys.scale, .* must be given"),
        (edited(modules=lambda m: list(m)), r"modules=\[.*\] must map modules to layers"),
        (edited(modules=lambda m: dict.fromkeys(m, "0")), r"layer_idx='0': must be an integer"),
        (edited(config=lambda c: {**c, "dtype": "int4"}), r"dtype='int4': must be 'int8'"),
        (edited(config=lambda c: {**c, "bits": 8}), r"config: unknown \['bits'\]"),
        (edited(percentile=10), r"percentile=10: must be None"),
        (edited(tokens="many"), r"tokens='many': must be an integer"),
        (edited(model={"model_type": "qwen2"}), r"model: head_dim, .* must be given"),
    ],
)
def test_damaged_files_are_refused(qwen_scales, tmp_path, damage, message):
    qwen_scales.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        CalibratedScales.load(tmp_path)


def test_absent_files_are_named(qwen_scales, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"int8_scales.json"):
        CalibratedScales.load(tmp_path)
    qwen_scales.save(tmp_path)
    (tmp_path / "int8_scales.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"int8_scales.safetensors"):
        CalibratedScales.load(tmp_path)


# ---- the script


def test_script(tmp_path, capsys):
    (tmp_path / "text.py").write_text("def add(a, b):\n    return a + b\n" * 60)
    config = tmp_path / "asymmetric.yaml"
    config.write_text(DOCUMENTED_YAML.replace("true", "false"))
    settings = {"text": str(tmp_path / "text.py"), "windows": 3, "length": 64, "batch_size": 2}
    report = calibrate_script(Int8Config(config=str(config), output=str(tmp_path / "out"), **settings, percentile=99))
    scales = CalibratedScales.load(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert scales.tokens == report["tokens"] == 192 and scales.percentile == 99 and not scales.config.symmetric
    assert LAYERS[0] not in scales.modules and len(scales.modules) == 5
    keys = scales.modules[LAYERS[1]].keys[0]
    assert report["scales"][LAYERS[1]]["keys_max"] == keys.max().item()
    assert f"{keys.median().item():.5f}" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"windows=300: .* has only \d+ windows of 64"):
        calibrate_script(Int8Config(output=str(tmp_path / "out"), **{**settings, "windows": 300}))
    with pytest.raises(ValueError, match=r"batch_size=0: must be above 0"):
        Int8Config(batch_size=0)


def test_example_config():
    assert load_process_config(EXAMPLE_CONFIG) == DynamicCacheConfig()


# ---- the packed cache


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_packed_cache_stores_what_the_fake_quantization_makes(symmetric):
    model = tiny_dense()
    ids = torch.randint(1, 97, (2, 70))
    scales = calibrate(model, [ids], DynamicCacheConfig(symmetric=symmetric, exclude=("model.layers.1.self_attn",)))
    fresh = torch.randint(1, 97, (2, 75))  # beyond the calibrated range here and there
    stock, packed = DynamicCache(), scales.create_cache(group_size=16)
    with deploy_fake_quant(model, scales), torch.no_grad():
        model(fresh, past_key_values=stock)
    with torch.no_grad():
        model(fresh, past_key_values=DynamicCache())
    exact = DynamicCache()
    model(fresh, past_key_values=exact)
    for i, (fake, layer) in enumerate(zip(stock.layers, exact.layers, strict=True)):
        packed.update(layer.keys, layer.values, i)
        for side, ours in zip(("keys", "values"), packed.layers[i].states(), strict=True):
            ours = ours.unflatten(2, (4, -1)).transpose(1, 2)
            now = getattr(layer, side)
            if i == 1:
                assert torch.equal(ours, now)
                continue
            # 64 of 75 tokens are packed; the states of layers above differ by what is below them.
            scale, zero_point = scales.by_layer(3)[i][side]
            expected = fake_quantize(now.transpose(1, 2).reshape(-1, 64), scale, zero_point)
            expected = expected.reshape(2, 75, 4, 16).transpose(1, 2)
            assert torch.equal(ours[:, :, :64], expected[:, :, :64])
            assert torch.equal(ours[:, :, 64:], now[:, :, 64:])
            if i == 0:
                assert torch.equal(getattr(fake, side), expected)
    codes = {name for layer in packed.layers for fields in layer.pool.storage.values() for name in fields}
    assert codes == {"packed", "states"}
    quantized = packed.layers[0]
    assert quantized.pool.slot_nbytes == 2 * 16 * 64  # a byte per element, and no scale
    assert quantized.nbytes_used == 2 * (64 * 128 + 11 * 128 * 4 + 4 * 12) + 2 * 2 * 64 * 4


def test_a_packed_cache_of_calibrated_scales_generates_and_is_saved(tmp_path):
    model = tiny_dense()
    scales = calibrate(model, [torch.randint(1, 97, (2, 70))])
    ids = torch.randint(1, 97, (2, 50))
    cache = scales.create_cache(group_size=8)
    output = model.generate(ids, past_key_values=cache, max_new_tokens=30, do_sample=False)
    assert output.shape == (2, 80)
    assert [row.packed for row in cache.layers[0].rows] == [72, 72]
    cache.save(tmp_path / "cache.safetensors")
    loaded = type(cache).load(tmp_path / "cache.safetensors")
    for ours, theirs in zip(loaded.layers, cache.layers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours.states(), theirs.states(), strict=True))
    assert loaded.nbytes_used == cache.nbytes_used


def test_static_scales_must_be_given():
    cache = KIVILatentCache(CacheScheme(8, 8, k_scheme={"static": True}))
    with pytest.raises(ValueError, match="static=True of the keys: needs calibrated scales"):
        cache.update(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4), 0)


def test_an_empty_cache_keeps_its_scales_through_a_file(tmp_path):
    model, ids = tiny_dense(), torch.randint(1, 97, (2, 70))
    scales = calibrate(model, [ids])
    scales.create_cache(group_size=16).save(tmp_path / "empty.safetensors")
    loaded, fresh = KIVILatentCache.load(tmp_path / "empty.safetensors"), scales.create_cache(group_size=16)
    for cache in (loaded, fresh):
        model(ids, past_key_values=cache)
    for a, b in zip(loaded.layers, fresh.layers, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.states(), b.states(), strict=True))
    fresh.reset()
    fresh.save(tmp_path / "reset.safetensors")
    model(ids, past_key_values=KIVILatentCache.load(tmp_path / "reset.safetensors"))
