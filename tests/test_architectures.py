"""Every architecture of the table: the library's own model around our attention, by one entry of `ARCHITECTURES`.

Llama, Mistral and Qwen2 have tests of their own (`test_decoders.py`).
"""

import copy
import re
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.phi3 import modeling_phi3

from configuration_alrd_llama import ARCHITECTURES, DROP_IN_ONLY, NOT_CACHED, ALRDLlamaConfig
from modeling_alrd_llama import ALRDLlamaForCausalLM
from modules.fit import budget as fit
from modules.fit.objectives import OBJECTIVES
from modules.fit.statistics import collect_statistics
from modules.kernels.packed import Rope
from modules.loading import check_tensor_parallel_plan
from modules.projections import in_rope_order, norm_of, padded_frequencies
from tests.helpers import TINY_LLAMA, randomize_vectors
from tests.test_decoders import same_state, without_names

pytestmark = pytest.mark.usefixtures("one_thread")

#: Those of this file. An older release of the library may not have all of them.
KINDS = [kind for kind in ARCHITECTURES if kind in CONFIG_MAPPING and kind not in ("llama", "mistral", "qwen2")]

MULTIPLIERS = {"embedding_multiplier": 3.0, "attention_multiplier": 0.3}
MULTIPLIERS |= {"residual_multiplier": 0.7, "logits_scaling": 2.0}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_experts": 4}
FULL = {"layer_types": ["full_attention"] * 3}


def partial_rotary(factor: float) -> dict:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": factor}
    return {"rope_parameters": rope}


#: Those whose text is generated for 128 tokens; the others' for a few past the window, which costs a quarter.
LONG = ("qwen3", "qwen3_moe", "mixtral", "olmo2", "granite", "smollm3", "phi3", "gemma3_text")

#: Fields beside those of `TINY_LLAMA` with which an architecture shows what is its own; its trait without them is idle.
FIELDS = {
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "cohere": {"use_qk_norm": True, "logit_scale": 0.5},
    "cohere2": FULL,
    "cwm": {**FULL, "bos_token_id": 1, "eos_token_id": 2000},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
    | EXPERTS,
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 1},
    "flex_olmo": EXPERTS,
    "gemma3_text": {**FULL, "query_pre_attn_scalar": 20},
    "glm": partial_rotary(0.5),
    "glm4": partial_rotary(0.5),
    "helium": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "glm4_moe": {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "use_qk_norm": True}
    | {**EXPERTS, **partial_rotary(0.5)},
    "granite": MULTIPLIERS,
    "granitemoe": {**MULTIPLIERS, **EXPERTS},
    "granitemoeshared": {**MULTIPLIERS, **EXPERTS, "shared_intermediate_size": 32},
    "hy_v3": {**EXPERTS, "first_k_dense_replace": 1},
    "hyperclovax": MULTIPLIERS,
    "mellum": {**FULL, **EXPERTS},
    "minimax_m2": {**EXPERTS, **partial_rotary(0.5)},
    "ministral": FULL,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo3": FULL,
    "olmoe": {**EXPERTS, "head_dim": None},
    "phi3": partial_rotary(0.75),
    "phimoe": EXPERTS,
    "qwen2_moe": {"shared_expert_intermediate_size": 32, **EXPERTS},
    "qwen3_moe": EXPERTS,
    "smollm3": {"no_rope_layer_interval": 2},
    "solar_open": {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
    | {"intermediate_size": None, **EXPERTS},
    "starcoder2": {"sliding_window": None},
}

#: As in the model, with blocks that are full and others that are not.
LOSSLESS = {"k_bits": 16, "v_bits": 16, "residual_length": 8, "group_size": 32}


def dense_config(kind: str, **fields):
    fields = {**TINY_LLAMA, **FIELDS.get(kind, {}), **fields}
    for name in ("head_dim", "intermediate_size"):
        if fields[name] is None:
            del fields[name]  # its class has no such field
    return AutoConfig.for_model(kind, **fields)


@lru_cache(maxsize=2)
def dense_of(kind: str):
    """A random model of the library's class, with biases and norms that matter."""
    return random_model(dense_config(kind))


def random_model(config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        randomize_vectors(model)
    return model.eval()


def split_of(dense, share: float = 1.0, **fields) -> ALRDLlamaForCausalLM:
    """All keys and values split, into blocks of a layer where the architecture needs them, or as `fields` say."""
    config = ALRDLlamaConfig.from_llama(dense.config)
    fields = {"keep_dense": config.traits.of_outputs, **fields}
    config = ALRDLlamaConfig.from_llama(config, **fields)
    ranks = {part.name: [max(1, round(share * config.full_rank(part)))] for part in config.parts()}
    return ALRDLlamaForCausalLM.from_dense(dense, ALRDLlamaConfig.from_llama(config, truncation_ranks=ranks))


def fed(model, ids: torch.Tensor, cache, sizes=(60, 1, 1, 20, 8)) -> torch.Tensor:
    """Logits of a text in pieces through a cache."""
    with torch.no_grad():
        return torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split(sizes, dim=1)], dim=1)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_lossless_logits_and_text_are_the_dense_models(kind):
    dense, ids = dense_of(kind), torch.randint(1, 97, (2, 90))
    model, expected = split_of(dense, **LOSSLESS), dense(ids).logits
    assert torch.allclose(model(ids, use_cache=False).logits, expected, atol=1e-4, rtol=0)
    caches = [model.create_kivi_cache(), model.create_kivi_cache(backend="reference"), DynamicCache()]
    if kind in LONG:
        caches.append(model.create_kivi_cache(capacity=128))
    for cache in caches:
        assert torch.allclose(fed(model, ids, cache), expected, atol=1e-4, rtol=0)
    # Padded on the left, 128 tokens past the window; and a row is what it is alone.
    mask = torch.ones_like(ids)
    ids[1, :41], mask[1, :41] = 0, 0
    new = 128 if kind in LONG else 16
    settings = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    cache = model.create_kivi_cache()
    found = model.generate(ids, attention_mask=mask, past_key_values=cache, **settings)
    assert torch.equal(found, dense.generate(ids, attention_mask=mask, **settings))
    assert cache.row_tokens() == [89 + new, 48 + new] and cache.layers[0].pool.used > 0


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_bfloat16_is_as_near_as_the_dense_model(kind):
    dense, ids = dense_of(kind), torch.randint(1, 97, (1, 90))
    low = copy.deepcopy(dense).bfloat16()
    model, expected = split_of(low, **LOSSLESS), dense(ids).logits
    found = fed(model, ids, model.create_kivi_cache())
    assert found.dtype == torch.bfloat16
    # Of the median token: of those that a router sends to other experts, the error says nothing.
    ours, theirs = ((logits - expected).square().mean(-1).median() for logits in (found, low(ids).logits))
    assert ours < 4 * theirs  # twice the error


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_one_latent_for_all_layers(kind):
    dense, ids = dense_of(kind), torch.randint(1, 97, (1, 90))
    layers = dense.config.num_hidden_layers
    model = split_of(dense, keep_dense=True, layer_group_size=layers, joint_kv=True, **LOSSLESS)
    assert torch.allclose(fed(model, ids, model.create_kivi_cache()), dense(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_saved_loaded_and_dense_again(tmp_path, kind):
    dense, ids = dense_of(kind), torch.randint(1, 97, (1, 90))
    model = split_of(dense, 0.5, group_size=32)
    model.save_pretrained(tmp_path / "split")
    expected = model(ids, use_cache=False).logits
    for load in (ALRDLlamaForCausalLM, AutoModelForCausalLM):
        loaded = load.from_pretrained(tmp_path / "split")
        assert type(loaded) is ALRDLlamaForCausalLM and loaded.config.dense_model_type == kind
        assert same_state(loaded, model) and without_names(loaded.config) == without_names(model.config)
        assert torch.allclose(loaded(ids, use_cache=False).logits, expected, atol=1e-4, rtol=0)
        assert fed(loaded, ids, loaded.create_kivi_cache()).isfinite().all()

    back = split_of(dense).to_dense()
    assert type(back) is type(dense) and back.state_dict().keys() == dense.state_dict().keys()
    assert without_names(back.config) | {"dtype": 0} == without_names(dense.config) | {"dtype": 0}
    assert torch.allclose(back(ids).logits, dense(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_dense_folder_is_loaded(tmp_path, kind):
    """Not split, its own keys and values are packed; split, the weights of experts are fused on the way."""
    dense, ids = dense_of(kind), torch.randint(1, 97, (1, 90))
    dense.save_pretrained(tmp_path)
    model = ALRDLlamaForCausalLM.from_pretrained(tmp_path, **LOSSLESS)
    assert torch.allclose(fed(model, ids, model.create_kivi_cache()), dense(ids).logits, atol=1e-4, rtol=0)
    loaded = ALRDLlamaForCausalLM.from_pretrained(tmp_path, config=split_of(dense, **LOSSLESS).config)
    assert loaded.config.truncation_ranks
    assert torch.allclose(fed(loaded, ids, loaded.create_kivi_cache()), dense(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_statistics_are_of_what_the_cache_holds(kind):
    """Keys behind the norm and in the order of RoPE, as those that a packed cache of them is given."""
    dense, ids = dense_of(kind), torch.randint(1, 97, (2, 20))
    found = collect_statistics(dense, ids, sample=16, batch_size=2)
    model = split_of(dense, keep_dense=True)
    for layer, own, theirs in zip(found, model.model.layers, dense.model.layers):
        states = {}

        def keep(module, inputs, keywords, states=states, own=own):
            query, keys, values = own.self_attn._project(keywords["hidden_states"])
            states.update(query=query, k_proj=keys, v_proj=values)

        handle = theirs.self_attn.register_forward_pre_hook(keep, with_kwargs=True)
        dense(ids)
        handle.remove()
        for name in ("k_proj", "v_proj"):
            statistics = getattr(layer, name)
            expected = states[name][:, 4:].flatten(0, 1).double()
            bias = getattr(getattr(theirs.self_attn, name, None), "bias", None)
            if bias is not None and not (name == "k_proj" and norm_of(theirs.self_attn, "k")):
                expected = expected - in_rope_order(theirs.self_attn, name[0], bias)
            assert torch.allclose(statistics.mean, expected.mean(0), atol=1e-5)
            assert torch.allclose(statistics.covariance, expected.T @ expected / len(expected), atol=1e-4)
            assert (statistics.fisher.diagonal() > 0).all()
        query = states["query"][:, :, 4:].transpose(0, 1).flatten(1, 2).double()
        assert torch.allclose(layer.query_covariance, query.transpose(1, 2) @ query / query.shape[1], atol=1e-4)


def test_queries_of_layers_without_rope_are_weighed_as_they_are():
    dense = dense_of("smollm3")
    statistics = collect_statistics(dense, torch.randint(1, 97, (2, 20)), fisher=False, sample=16, batch_size=2)
    for layer, turned in enumerate(dense.config.no_rope_layers):
        found = OBJECTIVES["query_output_rope"](dense, layer, statistics[layer])["k_proj"]["metric"]
        covariance = statistics[layer].query_covariance.unflatten(0, (4, -1)).sum(1)
        assert torch.allclose(found, torch.block_diag(*covariance)) == (not turned)


@pytest.fixture(scope="module")
def calibration_text() -> torch.Tensor:
    return torch.randint(1, 97, (8, 140), generator=torch.Generator().manual_seed(1))


def fitted(dense, text: torch.Tensor, folder, budget: float, **fields) -> fit.Calibration:
    config = fit.FitConfig(keep_dense=True, statistics=str(folder), batch_size=8, **fields)
    calibration = fit.calibrate(config, dense, ALRDLlamaConfig.from_llama(dense.config), text)
    return fit.fit_budget(config, calibration, budget)


@pytest.mark.parametrize("kind", KINDS)
def test_an_eighth_of_the_bytes(tmp_path, calibration_text, kind):
    dense = dense_of(kind)
    calibration = fitted(dense, calibration_text, tmp_path, 0.125, layer_group_size=3, joint_kv=True)
    model = calibration.split()
    assert (
        fit.cache_nbytes(model.config, 4096, torch.float32) <= fit.dense_nbytes(model.config, 4096, torch.float16) / 8
    )
    model.save_pretrained(tmp_path / "eighth")
    model = ALRDLlamaForCausalLM.from_pretrained(tmp_path / "eighth")
    # Far better than what the latents' means alone give: a model that knows nothing of its past.
    ids = calibration_text[:2]
    blind = copy.deepcopy(model)
    with torch.no_grad():
        for layer in blind.model.layers:
            layer.self_attn.k_latent.ALinear.weight.zero_()
            layer.self_attn.v_latent.ALinear.weight.zero_()
    losses = [divergence(each, dense, ids) for each in (model, blind)]
    assert losses[0] < 0.5 * losses[1]


@torch.no_grad()
def divergence(model, dense, ids: torch.Tensor) -> float:
    """KL divergence of the dense model's predictions, of the tokens behind the first 96, read 4 at a time."""
    expected = dense(ids).logits.log_softmax(-1)[:, 96:]
    sizes = [96] + [4] * ((ids.shape[1] - 96) // 4)
    found = fed(model, ids, model.create_kivi_cache(), sizes).log_softmax(-1)[:, 96:]
    return (expected.exp() * (expected - found)).sum(-1).mean().item()


def with_outliers(dense, weight: float = 30.0):
    """The same function with three channels of the normalised keys far larger than the others.

    Queries are smaller by as much, and so is the channel that RoPE turns with each.
    """
    model, half = copy.deepcopy(dense), dense.config.head_dim // 2
    with torch.no_grad():
        for layer in model.model.layers:
            query, key = layer.self_attn.q_norm.weight, layer.self_attn.k_norm.weight
            for channel in (3, 6, 12):
                factor = weight / key[channel].item()
                for each in (channel, (channel + half) % (2 * half)):
                    key[each] *= factor
                    query[each] /= factor
            assert torch.equal(key[[3, 6, 12]].round(decimals=3), torch.full((3,), weight))
    return model


def test_outlier_keys_of_a_qwen3_cost_nothing(tmp_path, calibration_text):
    dense, ids = dense_of("qwen3"), calibration_text[:4]
    planted = with_outliers(dense)
    bits = {"k_bits": 4, "v_bits": 4, "group_size": 32, "residual_length": 16}
    for make in (
        lambda model, name: split_of(model, **bits),
        lambda model, name: ALRDLlamaForCausalLM.from_dense(model, ALRDLlamaConfig.from_llama(model.config, **bits)),
        lambda model, name: fitted(model, calibration_text, tmp_path / name, 0.3).split(),
    ):
        without = divergence(make(dense, "dense"), dense, ids)
        assert 0 < divergence(make(planted, "planted"), planted, ids) <= 1.2 * without


@pytest.mark.parametrize(
    ("kind", "rule"),
    [("granitemoe", "[qkv]_proj must be 'colwise'"), ("phi3", "qkv_proj must be 'colwise_gather_output'")],
)
def test_a_plan_without_the_projections_is_refused_under_tensor_parallelism(kind, rule):
    """The library has none for a Granite's experts; plans that it has are in `test_parallel.py`."""
    with pytest.raises(ValueError, match=f"tp_plan: {rule}"):
        check_tensor_parallel_plan(split_of(dense_of(kind)).config, {})


@pytest.mark.parametrize("kind", KINDS)
def test_a_configuration_made_by_its_fields_has_what_the_library_derives(kind):
    """Layer types, windows that are switched off, layers of experts: as in the dense model's own class."""
    fields = {**TINY_LLAMA, **FIELDS.get(kind, {})}
    given = {name: value for name, value in fields.items() if value is not None and name != "layer_types"}
    if ARCHITECTURES[kind].has_window:
        given |= {"use_sliding_window": False, "sliding_window": 24}
    config = ALRDLlamaConfig(dense_model_type=kind, **given)
    dense = config.to_dense()
    derived = without_names(ALRDLlamaConfig.from_llama(dense))
    assert without_names(config) == {name: value for name, value in derived.items() if not name.startswith("_")}
    if kind in ("qwen3", "qwen3_moe", "qwen2_moe"):
        assert list(map(config.layer_window, range(3))) == [None] * 3


def test_latents_of_normalised_keys_are_made_of_outputs():
    config = dense_of("qwen3").config
    message = "keep_dense=False: must be True to split a 'qwen3'"
    with pytest.raises(ValueError, match=message):
        ALRDLlamaConfig.from_llama(config, truncation_ranks={"model.layers.0.self_attn.k_proj": 8})
    with pytest.raises(ValueError, match="keep_dense=False: must be True for a 'qwen3'"):
        fit.split_config(fit.FitConfig(keep_dense=False), ALRDLlamaConfig.from_llama(config))
    assert fit.split_config(fit.FitConfig(), ALRDLlamaConfig.from_llama(config)).keep_dense


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping=50.0: must be None; scores are not"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True: must be False"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0: must be None; keys and values are not clipped"),
    ],
)
def test_what_an_architecture_may_not_do(kind, fields, message):
    config = dense_config(kind, **fields)
    with pytest.raises(ValueError, match=message):
        ALRDLlamaConfig.from_llama(config)


#: Fields by which layers get a window of 24, all of them or some.
WINDOWS = {
    "qwen3": {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None},
    "qwen2_moe": {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None},
    "smollm3": {"use_sliding_window": True, "layer_types": None},
    "gemma3_text": {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    "olmo3": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "phi3": {},
    "mixtral": {},
    "starcoder2": {},
}


@pytest.mark.parametrize("kind", [kind for kind in WINDOWS if kind in KINDS])
@torch.no_grad()
def test_a_text_of_four_windows(kind):
    dense, ids = random_model(dense_config(kind, **WINDOWS[kind], sliding_window=24)), torch.randint(1, 97, (2, 96))
    model, expected = split_of(dense, **LOSSLESS), dense(ids).logits
    full = random_model(dense_config(kind))(ids).logits
    assert (expected - full)[:, -1].abs().max() > 1e-3  # the window matters
    for cache in (model.create_kivi_cache(), model.create_kivi_cache(backend="reference"), DynamicCache()):
        found = fed(model, ids, cache, (33, 1, 1, 40, 9, 12))
        assert torch.allclose(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("factor", [0.5, 0.75, 1.0])
def test_channels_that_rope_does_not_turn_stand_behind_the_halves(factor):
    """Scores are those of the library's own rotation, and `Rope` with frequencies of zero is that rotation."""
    dense = random_model(dense_config("phi3", **partial_rotary(factor)))
    attention, rotary = dense.model.layers[0].self_attn, dense.model.rotary_emb
    query, key = torch.randn(2, 1, 5, 4, 16)
    position = torch.arange(5)[None]
    expected = modeling_phi3.apply_rotary_pos_emb(query, key, *rotary(query, position), unsqueeze_dim=2)
    expected = torch.einsum("blhd,bmhd->bhlm", *expected)
    turned = []
    turning = Rope(padded_frequencies(rotary.inv_freq, 16))
    for side, states in (("q", query), ("k", key)):
        ordered = in_rope_order(attention, side, states.flatten(2)).unflatten(2, (4, 16))
        turned.append(turning.rotate(ordered, position[..., None].expand(1, 5, 4)))
    assert torch.allclose(torch.einsum("blhd,bmhd->bhlm", *turned), expected, atol=1e-4)
    assert (rotary.inv_freq.shape[0] == 8) == (factor == 1.0)


def test_the_guide_lists_every_architecture_of_the_library():
    """Each causal language model of the installed release once, with what the code says of it."""
    guide = (Path(__file__).parents[1] / "KIVI_INTEGRATION.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (split|drop-in only|refused) \| (.+) \| (.+) \|$", guide, re.MULTILINE)
    listed, expected = {}, {}
    for kind in ARCHITECTURES:
        expected[kind] = ("split", None)
    for status, table in (("drop-in only", DROP_IN_ONLY), ("refused", NOT_CACHED)):
        for reason, types in table.items():
            expected |= dict.fromkeys(types.split(), (status, reason))
    for status, types, reason in rows:
        for kind in re.findall(r"`(.+?)`", types):
            assert kind not in listed, f"{kind} is listed twice"
            listed[kind] = (status, None if status == "split" else reason)
    assert listed == expected
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= set(listed)
