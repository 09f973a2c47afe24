"""From a dense checkpoint to a split model, back, and nothing left at random."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM

from configuration_alrd_llama import ALRDLlamaConfig
from modeling_alrd_llama import ALRDLlamaForCausalLM, ALRDLlamaModel
from modules.svd_linear import SVDLinear
from tests.helpers import all_ranks, tiny_dense, tiny_split

MIXED = {
    "model.layers.0.self_attn.k_proj": 24,
    "model.layers.0.self_attn.v_proj": [5, 11, 9, 16],
    "model.layers.2.self_attn.v_proj": 33,
}


def config_for(dense, ranks, **fields) -> ALRDLlamaConfig:
    full_names = isinstance(ranks, dict) and any(name.startswith("model.") for name in ranks)
    return ALRDLlamaConfig.from_llama(
        dense.config, truncation_ranks=ranks if full_names else all_ranks(3, ranks), **fields
    )


def same_state(a, b) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


@pytest.fixture
def dense():
    return tiny_dense(attention_bias=True)


def test_loading_equals_splitting_a_loaded_model(tmp_path, dense):
    model = tiny_split(tmp_path, MIXED, head_group_size=1, dense=dense)
    assert same_state(model, ALRDLlamaForCausalLM.from_dense(dense, model.config))
    assert isinstance(model.model.layers[0].self_attn.k_proj, SVDLinear)
    assert isinstance(model.model.layers[1].self_attn.k_proj, torch.nn.Linear)
    assert model.config.model_type == "alrd_llama"


@pytest.mark.parametrize("layout", ["safetensors", "sharded", "bin", "state_dict"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_layout_of_a_dense_checkpoint(tmp_path, layout, tied):
    dense = tiny_dense(attention_bias=True, tie_word_embeddings=tied)
    config = config_for(dense, MIXED, head_group_size=1)
    expected, state = ALRDLlamaForCausalLM.from_dense(dense, config), {}
    dense.save_pretrained(tmp_path, max_shard_size="20KB" if layout == "sharded" else "1GB")
    if layout == "sharded":
        assert len(list(tmp_path.glob("*.safetensors"))) > 3
    if layout == "bin":
        next(tmp_path.glob("*.safetensors")).unlink()
        torch.save(dense.state_dict(), tmp_path / "pytorch_model.bin")
    if layout == "state_dict":
        state = {"state_dict": dense.state_dict()}
    path = None if layout == "state_dict" else tmp_path
    model = ALRDLlamaForCausalLM.from_pretrained(path, config=config, **state)
    assert same_state(model, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_save_and_reload_is_bit_exact_and_does_not_factor_again(tmp_path, dense, dtype, monkeypatch):
    model = tiny_split(tmp_path, MIXED, head_group_size=1, dense=dense.to(dtype))
    assert model.dtype == dtype
    model.save_pretrained(tmp_path / "split")
    monkeypatch.setattr("modeling_alrd_llama.factor_groups", None)
    again = ALRDLlamaForCausalLM.from_pretrained(tmp_path / "split", dtype="auto")
    assert same_state(again, model) and again.config.truncation_ranks == model.config.truncation_ranks
    ids = torch.randint(1, 97, (1, 40))
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_auto_classes_know_the_model(tmp_path, dense):
    model = tiny_split(tmp_path, MIXED, head_group_size=1, dense=dense)
    model.save_pretrained(tmp_path / "split")
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "split"), ALRDLlamaConfig)
    assert same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "split"), model)
    assert same_state(AutoModel.from_pretrained(tmp_path / "split"), model.model)
    by_config = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", config=model.config)
    assert isinstance(by_config, ALRDLlamaForCausalLM) and same_state(by_config, model)


def test_base_model_and_prefixes(tmp_path, dense):
    model = tiny_split(tmp_path, MIXED, head_group_size=1, dense=dense)
    base = ALRDLlamaModel.from_pretrained(tmp_path / "dense", config=model.config)
    assert same_state(base, model.model)
    dense.model.save_pretrained(tmp_path / "base")
    assert same_state(ALRDLlamaModel.from_pretrained(tmp_path / "base", config=model.config), model.model)
    with pytest.raises(ValueError, match=r"no fitting weights for lm_head\.weight"):
        ALRDLlamaForCausalLM.from_pretrained(tmp_path / "base", config=model.config)


def test_device_map_and_offload(tmp_path, dense):
    expected = tiny_split(tmp_path, MIXED, head_group_size=1, dense=dense)
    ids = torch.randint(1, 97, (2, 200))
    for device_map in (
        "auto",
        {
            "model.embed_tokens": "cpu",
            "model.layers": "cpu",
            "model.norm": "cpu",
            "model.rotary_emb": "cpu",
            "lm_head": "cpu",
        },
        {
            "model.embed_tokens": "cpu",
            "model.layers.0": "disk",
            "model.layers.1": "cpu",
            "model.layers.2": "disk",
            "model.norm": "cpu",
            "model.rotary_emb": "cpu",
            "lm_head": "cpu",
        },
    ):
        model = ALRDLlamaForCausalLM.from_pretrained(
            tmp_path / "dense", config=expected.config, device_map=device_map, offload_folder=str(tmp_path / "off")
        )
        with torch.no_grad():
            for m in (model, expected):
                m.cache = m.create_kivi_cache(group_size=32)
                m(ids[:, :199], past_key_values=m.cache)
            a, b = (m(ids[:, 199:], past_key_values=m.cache).logits for m in (model, expected))
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_export_to_a_dense_llama(tmp_path, tied):
    dense = tiny_dense(attention_bias=True, tie_word_embeddings=tied)
    model = tiny_split(tmp_path, 64, dense=dense, k_bits=16, v_bits=16)
    model.save_pretrained(tmp_path / "export", save_original_format=True)
    assert json.loads((tmp_path / "export" / "config.json").read_text())["model_type"] == "llama"
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "export")
    ids = torch.randint(1, 97, (1, 50))
    assert torch.allclose(plain(ids).logits, dense(ids).logits, atol=1e-4)
    low = tiny_split(tmp_path, {"k_proj": 20, "v_proj": [3, 9]}, head_group_size=2, dense=dense)
    assert torch.allclose(low.to_dense()(ids).logits, low(ids, use_cache=False).logits, atol=1e-4)


class TestNothingStaysRandom:
    def test_missing_weight(self, tmp_path, dense):
        state = dense.state_dict()
        del state["model.layers.1.self_attn.v_proj.weight"]
        for ranks in (MIXED, 40):
            with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.v_proj.* would be random"):
                ALRDLlamaForCausalLM.from_pretrained(
                    None, config=config_for(dense, ranks, head_group_size=1), state_dict=state
                )

    def test_split_checkpoint_with_other_ranks(self, tmp_path, dense):
        model = tiny_split(tmp_path, 40, dense=dense)
        model.save_pretrained(tmp_path / "split")
        for ranks in (39, {"model.layers.0.self_attn.k_proj": 40}):
            with pytest.raises(ValueError, match=r"truncation_ranks: .* is stored with group ranks"):
                ALRDLlamaForCausalLM.from_pretrained(tmp_path / "split", config=config_for(dense, ranks))

    def test_split_checkpoint_with_another_rotation(self, tmp_path, dense):
        model = tiny_split(tmp_path, 40, dense=dense)
        model.save_pretrained(tmp_path / "split")
        with pytest.raises(ValueError, match=r"v_hadamard=False: .* stored with v_hadamard=True"):
            ALRDLlamaForCausalLM.from_pretrained(tmp_path / "split", config=config_for(dense, 40, v_hadamard=False))

    def test_config_of_another_size(self, tmp_path, dense):
        other = ALRDLlamaConfig.from_llama(
            tiny_dense(hidden_size=32, head_dim=16, num_attention_heads=2, num_key_value_heads=2).config
        )
        dense.save_pretrained(tmp_path / "dense")
        with pytest.raises((ValueError, RuntimeError)):
            ALRDLlamaForCausalLM.from_pretrained(tmp_path / "dense", config=other)

    def test_factors_beyond_the_type(self, tmp_path, dense):
        with torch.no_grad():
            dense.model.layers[0].self_attn.k_proj.weight.fill_(60000.0)
        dense.save_pretrained(tmp_path / "dense")
        with pytest.raises((ValueError, RuntimeError)):
            ALRDLlamaForCausalLM.from_pretrained(tmp_path / "dense", config=config_for(dense, 40), dtype=torch.float16)


def test_rotation_keeps_the_product(tmp_path, dense):
    rotated = tiny_split(tmp_path, 40, dense=dense)
    plain = ALRDLlamaForCausalLM.from_pretrained(
        tmp_path / "dense", config=config_for(dense, 40, k_hadamard=False, v_hadamard=False)
    )
    for a, b in zip(rotated.model.layers, plain.model.layers):
        for name in ("k_proj", "v_proj"):
            one, two = getattr(a.self_attn, name), getattr(b.self_attn, name)
            assert torch.allclose(one.dense_weight(), two.dense_weight(), atol=1e-5)
            assert not torch.allclose(one.BLinear.weight, two.BLinear.weight, atol=1e-2)
