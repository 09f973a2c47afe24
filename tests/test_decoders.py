"""Mistral and Qwen2: split, cached, exported and refused like a Llama."""

import json

import pytest
import tokenizers
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    DynamicCache,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
)

from configuration_alrd_llama import ALRDLlamaConfig
from modeling_alrd_llama import ALRDLlamaForCausalLM
from modules.fit.objectives import OBJECTIVES
from modules.fit.statistics import collect_statistics
from modules.kivi_cache import KIVILatentCache
from modules.svd_linear import SVDLinear
from scripts import calibrate_svd_ranks, common, estimate_memory, eval_perplexity, generate
from tests.helpers import TINY_LLAMA, randomize_vectors, tiny_dense

#: Model types whose fields are walked; `test_architectures.py` goes over the whole table.
KINDS = ("llama", "mistral", "qwen2", "qwen3")

LOSSLESS = {"k_bits": 16, "v_bits": 16, "residual_length": 8, "group_size": 32}

#: Grouped, multi-head and one key/value head; head sizes that are no power of two, or not hidden_size / heads.
SHAPES = {
    "gqa": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": None},
    "mha, head size 10": {"hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": None},
    "gqa, head size 18": {"hidden_size": 108, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": None},
    "mqa, head size 22 of 16": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 22},
}


def tiny(model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0, **fields):
    """A random dense model, with biases and norms that matter."""
    fields = {**TINY_LLAMA, **({"sliding_window": None} if model_type == "mistral" else {}), **fields}
    if fields["head_dim"] is None:
        del fields["head_dim"]  # a Qwen2 would take the None for a size
    config = AutoConfig.for_model(model_type, **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        randomize_vectors(model)
    return model.to(dtype).eval()


def config_for(dense, share: float = 1.0, **fields) -> ALRDLlamaConfig:
    """Every projection split at a share of the full rank; into blocks of one where the architecture needs them."""
    config = ALRDLlamaConfig.from_llama(dense.config, **fields)
    config = ALRDLlamaConfig.from_llama(config, keep_dense=config.traits.of_outputs)
    ranks = {}
    for part in config.parts():
        ranks[part.name] = max(1, round(share * config.full_rank(part))) * config.num_head_groups
    return ALRDLlamaConfig.from_llama(config, truncation_ranks=ranks)


def load_split(dense, path, share: float = 1.0, **fields) -> ALRDLlamaForCausalLM:
    """Save a dense model and load it split."""
    dense.save_pretrained(path)
    config = config_for(dense, share, **fields)
    return ALRDLlamaForCausalLM.from_pretrained(path, config=config, dtype=dense.dtype).eval()


def without_names(config) -> dict:
    """The fields of a configuration, as written."""
    fields = config.to_dict()
    for name in ("_name_or_path", "architectures"):
        fields.pop(name, None)
    return fields


def same_state(a, b) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


@pytest.fixture(params=["mistral", "qwen2"])
def model_type(request) -> str:
    return request.param


# ---- the same function


@pytest.mark.parametrize("head_group_size", [None, 1])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_full_rank_is_the_dense_model(tmp_path, model_type, shape, head_group_size):
    dense = tiny(model_type, torch.float64, **shape)
    model = load_split(dense, tmp_path, head_group_size=head_group_size, **LOSSLESS)
    assert all(
        isinstance(projection, SVDLinear)
        for layer in model.model.layers
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj)
    )
    ids = torch.randint(1, 97, (2, 90))
    with torch.no_grad():
        expected = dense(ids).logits
        assert torch.allclose(model(ids, use_cache=False).logits, expected, atol=1e-12, rtol=0)
        # Attention over the packed cache works in float32, whatever the model's type.
        for cache, tolerance in ((model.create_kivi_cache(), 1e-4), (DynamicCache(), 1e-12)):
            pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([60, 1, 1, 20, 8], dim=1)]
            assert torch.allclose(torch.cat(pieces, dim=1), expected, atol=tolerance, rtol=0)
    packed = model(ids, use_cache=True).past_key_values
    assert isinstance(packed, KIVILatentCache) and packed.layers[0].pool.used > 0


@pytest.mark.parametrize("name", ["q_proj.bias", "k_proj.bias", "v_proj.bias"])
def test_every_bias_of_a_qwen2_matters(name):
    """Else the comparison with the dense model would say nothing about it."""
    dense, ids = tiny("qwen2"), torch.randint(1, 97, (1, 30))
    expected = dense(ids).logits
    with torch.no_grad():
        for layer in dense.model.layers:
            layer.self_attn.get_parameter(name).zero_()
    assert (dense(ids).logits - expected).abs().max() > 0.1


@pytest.mark.parametrize("rope_type", ["yarn", "linear"])
def test_scaled_rope(tmp_path, model_type, rope_type):
    rope = {"rope_type": rope_type, "factor": 4.0, "rope_theta": 1e6}
    rope |= {"original_max_position_embeddings": 512} if rope_type == "yarn" else {}
    dense = tiny(model_type, rope_parameters=rope)
    model = load_split(dense, tmp_path, **LOSSLESS)
    assert model.config.rope_parameters == dense.config.rope_parameters
    ids = torch.randint(1, 97, (1, 120))
    cache = model.create_kivi_cache()
    with torch.no_grad():
        logits = torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split(40, dim=1)], dim=1)
        assert torch.allclose(logits, dense(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", ["gqa", "mha, head size 10"])
def test_generation_and_left_padding(tmp_path, model_type, shape):
    dense = tiny(model_type, torch.float64, **SHAPES[shape])
    model = load_split(dense, tmp_path, **LOSSLESS)
    ids = torch.randint(1, 97, (3, 50))
    mask = torch.ones_like(ids)
    for row, pads in enumerate((0, 7, 41)):
        ids[row, :pads], mask[row, :pads] = 0, 0
    settings = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    cache = model.create_kivi_cache()
    found = model.generate(ids, attention_mask=mask, past_key_values=cache, **settings)
    assert torch.equal(found, dense.generate(ids, attention_mask=mask, **settings))
    assert cache.row_tokens() == [89, 82, 48] and cache.layers[0].pool.used > 0
    # A row is what it is alone.
    alone = dense.generate(ids[2:, 41:], attention_mask=mask[2:, 41:], **settings)
    assert torch.equal(found[2, 50:], alone[0, 9:])


# ---- loading, splitting, the way back


@pytest.mark.parametrize("tied", [False, True])
def test_loading_equals_splitting_a_loaded_model(tmp_path, model_type, tied):
    dense = tiny(model_type, tie_word_embeddings=tied)
    model = load_split(dense, tmp_path / "dense", share=0.4)
    config = model.config
    assert config.model_type == "alrd_llama" and config.dense_model_type == model_type
    assert same_state(model, ALRDLlamaForCausalLM.from_dense(dense, config))
    names = {name.rpartition("self_attn.")[2] for name in model.state_dict() if name.endswith("bias")}
    biases = {"q_proj.bias", "k_proj.ALinear.bias", "v_proj.ALinear.bias"}
    assert names == (biases if model_type == "qwen2" else set())

    model.save_pretrained(tmp_path / "split")
    for loaded in (
        ALRDLlamaForCausalLM.from_pretrained(tmp_path / "split"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "split"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", config=config),
    ):
        assert type(loaded) is ALRDLlamaForCausalLM and same_state(loaded, model)
        assert without_names(loaded.config) == without_names(config)


@pytest.mark.parametrize("layers", [(), (1,)])
def test_layers_that_stay_dense(tmp_path, model_type, layers):
    dense = tiny(model_type, torch.float64)
    dense.save_pretrained(tmp_path)
    config = config_for(dense, **LOSSLESS)
    config.truncation_ranks = {name: r for name, r in config.truncation_ranks.items() if int(name[13]) in layers}
    model = ALRDLlamaForCausalLM.from_pretrained(tmp_path, config=config)
    ids = torch.randint(1, 97, (1, 70))
    cache = model.create_kivi_cache()
    with torch.no_grad():
        logits = torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split(60, dim=1)], dim=1)
        assert torch.allclose(logits, dense(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("tied", [False, True])
def test_export(tmp_path, model_type, tied, shape):
    dense = tiny(model_type, tie_word_embeddings=tied, rms_norm_eps=3e-5, **shape)
    model = load_split(dense, tmp_path / "dense")
    back = model.to_dense()
    assert type(back) is type(dense) is {"mistral": MistralForCausalLM, "qwen2": Qwen2ForCausalLM}[model_type]
    assert type(back.config) is type(dense.config)
    assert without_names(back.config) | {"dtype": None} == without_names(dense.config) | {"dtype": None}
    assert back.state_dict().keys() == dense.state_dict().keys()
    for name, tensor in dense.state_dict().items():
        assert torch.allclose(back.state_dict()[name], tensor, atol=1e-5), name
    assert (back.lm_head.weight is back.model.embed_tokens.weight) == tied

    model.save_pretrained(tmp_path / "export", save_original_format=True)
    written, original = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("export", "dense"))
    assert written == original and written["model_type"] == model_type
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert type(loaded) is type(dense) and not any(info.values())
    ids = torch.randint(1, 97, (1, 50))
    assert torch.allclose(loaded(ids).logits, dense(ids).logits, atol=1e-3)


def test_export_of_a_low_rank(tmp_path, model_type):
    model = load_split(tiny(model_type), tmp_path, share=0.3, head_group_size=2)
    ids = torch.randint(1, 97, (1, 50))
    assert torch.allclose(model.to_dense()(ids).logits, model(ids, use_cache=False).logits, atol=1e-3)


# ---- calibration


def test_statistics(tmp_path, model_type):
    dense, ids = tiny(model_type, head_dim=None), torch.randint(1, 97, (4, 40))
    statistics = collect_statistics(dense, ids, sample=16, batch_size=2)
    attention = dense.model.layers[0].self_attn
    # The first four tokens of a window are sinks, which take no part.
    x = dense.model.layers[0].input_layernorm(dense.get_input_embeddings()(ids))[:, 4:].flatten(0, 1)
    query = attention.q_proj(x).double().unflatten(-1, (-1, 2, attention.head_dim // 2))
    assert torch.allclose(statistics[0].query_energy, query.square().sum(2).mean(0), rtol=1e-5)
    if model_type == "qwen2":
        without = (x @ attention.q_proj.weight.T).double().unflatten(-1, (-1, 2, attention.head_dim // 2))
        assert not torch.allclose(statistics[0].query_energy, without.square().sum(2).mean(0), rtol=0.01)

    # What is lost with statistics is less than by plain SVD, and nothing at full rank.
    expected = dense(ids).logits.log_softmax(-1)

    def loss(model):
        logits = model(ids, use_cache=False).logits.log_softmax(-1)
        return (expected.exp() * (expected - logits)).sum(-1).mean().item()

    half = config_for(dense, 0.5)
    plain = loss(ALRDLlamaForCausalLM.from_dense(dense, half))
    for name in ("query_output", "fisher"):
        how = [OBJECTIVES[name](dense, i, stats) for i, stats in enumerate(statistics)]
        assert loss(ALRDLlamaForCausalLM.from_dense(dense, half, how)) < plain
        assert loss(ALRDLlamaForCausalLM.from_dense(dense, config_for(dense), how)) < 1e-5


@pytest.fixture(scope="module", params=["mistral", "qwen2"])
def checkpoint(request, tmp_path_factory):
    """A folder with a random dense model and a byte-level tokenizer."""
    path = tmp_path_factory.mktemp(request.param)
    tiny(request.param, vocab_size=300, num_hidden_layers=2, head_dim=None).save_pretrained(path)
    alphabet = ["<s>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(path)
    return request.param, path


def test_the_same_commands(checkpoint, tmp_path):
    model_type, path = checkpoint
    text = tmp_path / "text.txt"
    text.write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(400)))
    half = str(tmp_path / "half")
    report = calibrate_svd_ranks.main(
        calibrate_svd_ranks.CalibrationConfig(
            model=str(path),
            output=half,
            statistics=str(tmp_path / "statistics"),
            share=0.5,
            text=str(text),
            windows=4,
            length=128,
            k_bits=4,
            v_bits=4,
        )
    )
    kept = [rank for ranks in report["truncation_ranks"].values() for rank in ranks]
    full = TINY_LLAMA["num_key_value_heads"] * TINY_LLAMA["hidden_size"] // TINY_LLAMA["num_attention_heads"]
    assert sum(kept) / (len(kept) * full) == pytest.approx(0.5, abs=0.05)
    model, _ = common.load_model(half)
    assert type(model) is ALRDLlamaForCausalLM and model.config.dense_model_type == model_type
    assert type(common.load_model(str(path))[0]).__name__.lower() == f"{model_type}forcausallm"

    measured = eval_perplexity.main(
        eval_perplexity.EvalConfig(
            model=half,
            dense=str(path),
            text=str(text),
            bits=["16", "4"],
            windows=2,
            length=256,
            prefill=200,
            group_size=16,
            residual_length=4,
            sink_length=0,
        )
    )["results"]
    assert 0 < measured["16"]["kl_mean"] < measured["4"]["kl_mean"]
    full = eval_perplexity.main(
        eval_perplexity.EvalConfig(
            model=str(path),
            dense=str(path),
            text=str(text),
            bits=["16"],
            windows=2,
            length=256,
            prefill=200,
            group_size=16,
            residual_length=4,
            sink_length=0,
        )
    )["results"]
    assert full["16"]["kl_mean"] < 1e-5 and full["16"]["top1_agreement"] == 1

    for source in (half, str(path)):
        estimate = estimate_memory.main(estimate_memory.EstimateConfig(model=source, length=[4096]))["estimates"][0]
        assert estimate["dense_per_token"] == 2 * 2 * 4 * 8 * 4 and estimate["ratio"] > 3
    generated = generate.main(
        generate.GenerateConfig(
            model=str(path), prompt="def f(x):", rank=1.0, k_bits=16, v_bits=16, max_new_tokens=60, compare_dense=True
        )
    )
    assert generated["same_tokens"] == 60
    assert generate.main(generate.GenerateConfig(model=half, prompt="def f(x):", max_new_tokens=4))["packed"]


# ---- configurations


def test_missing_keys_are_the_defaults_of_the_dense_class(tmp_path, model_type):
    """Mistral's, Qwen2's and Llama's defaults differ: context, token ids, key/value heads."""
    sizes = {name: TINY_LLAMA[name] for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")}
    sizes |= {"vocab_size": 97, "intermediate_size": 96, "sliding_window": None}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **sizes}))
    config, dense = ALRDLlamaConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)
    assert config.max_position_embeddings == {"mistral": 131072, "qwen2": 32768}[model_type]
    assert config.num_key_value_heads == {"mistral": 8, "qwen2": 32}[model_type]
    assert (config.bos_token_id, config.eos_token_id) == {"mistral": (1, 2), "qwen2": (None, None)}[model_type]
    assert without_names(config.to_dense()) == without_names(dense)
    expected = without_names(dense) | {"model_type": "alrd_llama"}
    assert {name: config.to_dict()[name] for name in expected} == expected


def test_saving_keeps_the_configuration(tmp_path, model_type):
    dense = tiny(model_type).config
    config = ALRDLlamaConfig.from_llama(dense, k_bits=4, truncation_ranks={"model.layers.0.self_attn.k_proj": 8})
    assert (config.attention_bias, config.mlp_bias) == (model_type == "qwen2", False)
    config.save_pretrained(tmp_path)
    for loaded in (ALRDLlamaConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is ALRDLlamaConfig and without_names(loaded) == without_names(config)
        assert type(loaded.to_dense()) is type(dense)
        assert without_names(loaded.to_dense()) == without_names(dense)


def test_keys_that_the_dense_class_does_not_read(tmp_path, model_type):
    """Biases are a matter of the class, whatever a `config.json` says of them."""
    dense = tiny(model_type, attention_bias=model_type == "mistral", mlp_bias=True)
    model = load_split(dense, tmp_path, **LOSSLESS)
    ids = torch.randint(1, 97, (1, 30))
    assert torch.allclose(model(ids, use_cache=False).logits, dense(ids).logits, atol=1e-3)


def test_a_configuration_by_hand_has_no_window():
    config = ALRDLlamaConfig(dense_model_type="mistral", **TINY_LLAMA)
    assert config.to_dense().sliding_window is None


def test_a_llama_keeps_its_biases(tmp_path):
    dense = tiny_dense(attention_bias=True, mlp_bias=True)
    model = load_split(dense, tmp_path, **LOSSLESS)
    assert model.config.dense_model_type == "llama" and model.model.layers[0].self_attn.o_proj.bias is not None
    assert "sliding_window" not in model.config.to_dict()
    ids = torch.randint(1, 97, (1, 30))
    assert torch.allclose(model(ids, use_cache=False).logits, dense(ids).logits, atol=1e-3)


@pytest.mark.parametrize("window", [2048, 4096])
def test_a_window_that_never_acts(tmp_path, window):
    dense = tiny("mistral", sliding_window=window)
    model = load_split(dense, tmp_path, **LOSSLESS)
    ids = torch.randint(1, 97, (1, 2048))
    cache = model.create_kivi_cache()
    with torch.no_grad():
        model(ids[:, :2040], past_key_values=cache, logits_to_keep=1)
        found = model(ids[:, 2040:], past_key_values=cache).logits
        assert torch.allclose(found, dense(ids, logits_to_keep=8).logits, atol=1e-3)
    assert without_names(model.config.to_dense()) | {"dtype": 0} == without_names(dense.config) | {"dtype": 0}


# ---- what a configuration says about attention

#: Values of every field that the attention of a stock model reads, or that the library's caches and masks read. Dynamic
#: NTK, whose frequencies change from step to step, has a test of its own (`test_modeling.py`).
ATTENTION_FIELDS = {
    "attention_bias": [True, False],
    "attention_chunk_size": [8],
    "attention_dropout": [0.5],
    "head_dim": [8],
    "is_causal": [False],
    "layer_types": [["full_attention"] * 2, ["full_attention", "sliding_attention"]],
    "max_position_embeddings": [32],
    "max_window_layers": [0, 1],
    "mlp_bias": [True],
    "num_attention_heads": [4],
    "num_key_value_heads": [8, 1],
    "pretraining_tp": [2],
    "rope_parameters": [
        {"rope_type": "default", "rope_theta": 500.0},
        {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "factor": 2.0,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
            "original_max_position_embeddings": 32,
        },
    ],
    "sliding_window": [None, 16, 64, 65, 80],
    "use_sliding_window": [True, False],
}

#: Fields that are none of attention's business, or that a test of their own is about.
OTHER_FIELDS = {
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "num_hidden_layers",
    "rms_norm_eps",
}
OTHER_FIELDS |= {"tie_word_embeddings", "use_cache", "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"}


@pytest.mark.parametrize("config_class", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def test_every_field_is_walked(config_class):
    """A field that a release of the library adds is to be looked at."""
    own = set(config_class.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__)
    assert own <= set(ATTENTION_FIELDS) | OTHER_FIELDS


@pytest.mark.parametrize(
    ("field", "value"), [(f, v) for f, values in ATTENTION_FIELDS.items() for v in values], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_field_is_applied_or_refused(kind, field, value):
    """A text of 70 tokens, beyond windows and contexts of 64: the dense model's logits, or an error with a field.

    Only what the dense class does not read is refused: a window of a Llama, layer types of Llama and Mistral.
    """
    fields = {"num_hidden_layers": 2, "max_position_embeddings": 64, field: value}
    if kind in ("qwen2", "qwen3") and field == "sliding_window":
        fields["use_sliding_window"] = value is not None  # the window of others is dropped by their class
    elif field in ("use_sliding_window", "max_window_layers", "layer_types"):
        fields |= {"sliding_window": 16, "use_sliding_window": field != "layer_types" and value is not False}
    dense, ids = tiny(kind, **fields), torch.randint(1, 97, (1, 70))
    try:
        model = ALRDLlamaForCausalLM.from_dense(dense, config_for(dense, **LOSSLESS))
        cache = model.create_kivi_cache()
        found = torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split([50, 1, 19], 1)], 1)
    except ValueError as error:
        if field in ("is_causal", "attention_chunk_size"):
            assert str(error).startswith(f"{field}={value}: ")
        elif str(error).startswith("sliding_window="):
            # A window without `use_sliding_window` is dropped by the dense class, but its layers keep their types.
            assert kind == "llama" or (kind in ("qwen2", "qwen3") and field == "layer_types")
        else:
            assert str(error).startswith("layer_types: ") and kind in ("llama", "mistral") and field == "layer_types"
        return
    assert field not in ("is_causal", "attention_chunk_size")
    for start, stop in ((0, 50), (50, 51), (51, 70)):  # frequencies may depend on the length of the text so far
        expected = dense(ids[:, :stop], use_cache=False).logits
        assert torch.allclose(found[:, start:stop], expected[:, start:], atol=1e-3)


@pytest.mark.parametrize("window", [64, 100])
@torch.no_grad()
def test_a_text_beyond_a_window(window):
    """Longer than the window, and than the positions that the model was trained for."""
    dense = tiny("mistral", sliding_window=window, max_position_embeddings=64)
    model = ALRDLlamaForCausalLM.from_dense(dense, config_for(dense, **LOSSLESS))
    ids = torch.randint(1, 97, (1, window))
    expected = dense.generate(ids, max_new_tokens=30, do_sample=False)
    for settings in ({}, {"use_cache": False}, {"past_key_values": DynamicCache()}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(ids, max_new_tokens=30, do_sample=False, **settings), expected)
    cache = model.create_kivi_cache(capacity=window + 30)
    assert torch.equal(model.generate(ids, max_new_tokens=30, do_sample=False, past_key_values=cache), expected)


# ---- refusals

#: Configurations that cannot be split, and what the message says: field, value, rule.
REFUSED = {
    "layer types without a window": (
        lambda: Qwen2Config(num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"]),
        r"sliding_window=None: must be an integer where layer_types has 'sliding_attention'",
    ),
    "layer types": (
        lambda: Qwen2Config(num_hidden_layers=1, layer_types=["chunked_attention"]),
        r"layer_types: must all be 'full_attention' or 'sliding_attention'; not supported: chunked_attention",
    ),
    "layer types of a mistral": (
        lambda: MistralConfig(sliding_window=None, num_hidden_layers=1, layer_types=["chunked_attention"]),
        r"layer_types: must all be 'full_attention'; not supported: chunked_attention",
    ),
    "window of a llama": (
        lambda: LlamaConfig(sliding_window=64),
        r"sliding_window=64: must be None or at least max_position_embeddings=2048 for a 'llama'",
    ),
    "gemma2": (lambda: Gemma2Config(), r"model_type='gemma2': must be one of 'llama', .*; not split: soft-capped sc"),
    "mamba": (lambda: MambaConfig(), r"model_type='mamba': must be one of .*; not split: state-space, recurrent"),
    "deepseek": (lambda: DeepseekV3Config(), r"model_type='deepseek_v3': must be .*; not split: multi-head latent"),
    "gpt2": (lambda: GPT2Config(), r"model_type='gpt2': must be one of .*; not split: learned positions, or sin"),
}


@pytest.mark.parametrize("make, message", REFUSED.values(), ids=REFUSED.keys())
def test_refused(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        ALRDLlamaConfig.from_llama(make())
    make().save_pretrained(tmp_path)
    path = str(tmp_path)
    for load in (
        lambda: ALRDLlamaConfig.from_pretrained(path),
        lambda: ALRDLlamaForCausalLM.from_pretrained(path),
        lambda: ALRDLlamaForCausalLM.from_pretrained(path, config=ALRDLlamaConfig(**TINY_LLAMA)),
        lambda: common.load_model(path),
        lambda: calibrate_svd_ranks.main(calibrate_svd_ranks.CalibrationConfig(model=path, share=0.5)),
        lambda: estimate_memory.main(estimate_memory.EstimateConfig(model=path)),
    ):
        with pytest.raises(ValueError, match=message):
            load()


def test_a_folder_of_unknown_type_is_refused_by_name(tmp_path):
    for fields, value in (({"model_type": "mamba9"}, "'mamba9'"), ({}, "None")):
        (tmp_path / "config.json").write_text(json.dumps(fields))
        with pytest.raises(ValueError, match=rf"{tmp_path}: model_type={value}: must be one of 'llama'"):
            ALRDLlamaConfig.from_pretrained(tmp_path)


def test_a_missing_window_is_mistrals_default(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    config = ALRDLlamaConfig.from_pretrained(tmp_path)
    assert config.layer_window(0) == config.to_dense().sliding_window == 4096


@pytest.mark.parametrize("value", ["alrd_llama", "gemma2", "", None, "Mistral"])
def test_dense_model_type(value):
    with pytest.raises(ValueError, match=rf"dense_model_type={value!r}"):
        ALRDLlamaConfig(dense_model_type=value, **TINY_LLAMA)
    config = ALRDLlamaConfig(**TINY_LLAMA)
    config.dense_model_type = value
    with pytest.raises(ValueError, match=rf"dense_model_type={value!r}: must be one of 'llama', 'mistral', 'qwen2'"):
        ALRDLlamaForCausalLM(config)


def test_a_window_assigned_to_a_llama_later_is_refused_by_the_model():
    config = ALRDLlamaConfig(**TINY_LLAMA)
    config.sliding_window = 100
    with pytest.raises(ValueError, match="sliding_window=100"):
        ALRDLlamaForCausalLM(config)


def test_a_configuration_for_another_kind_of_model(tmp_path):
    models = {name: tiny(name) for name in KINDS}
    for name, dense in models.items():
        dense.save_pretrained(tmp_path / name)
        for other, model in models.items():
            if other != name:
                message = rf"dense_model_type='{other}': must be '{name}', as the weights are"
                config = config_for(model)
                with pytest.raises(ValueError, match=message):
                    ALRDLlamaForCausalLM.from_pretrained(tmp_path / name, config=config)
                with pytest.raises(ValueError, match=message):
                    ALRDLlamaForCausalLM.from_dense(dense, config)


def test_nothing_stays_random(tmp_path):
    dense = tiny("qwen2")
    for lost in ("q_proj.bias", "k_proj.bias", "o_proj.weight"):
        state = dense.state_dict()
        del state[f"model.layers.1.self_attn.{lost}"]
        with pytest.raises(ValueError, match=rf"layers\.1\.self_attn\.{lost[:6]}.* would be random"):
            ALRDLlamaForCausalLM.from_pretrained(None, config=config_for(dense), state_dict=state)
