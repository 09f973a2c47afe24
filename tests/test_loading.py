"""From a dense checkpoint to a split model, back, and nothing left at random."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from configuration_alrd_llama import ALRDLlamaConfig
from modeling_alrd_llama import ALRDLlamaForCausalLM, ALRDLlamaModel
from modules.svd_linear import SVDLinear
from tests.helpers import all_ranks, tiny_dense, tiny_split
from tests.test_tiers import static_model, tiered_model

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
    monkeypatch.setattr("modules.loading.factor_groups", None)
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


K0 = "model.layers.0.self_attn.k_proj"

#: By checkpoint, fields that its factors or weights contradict, and the start of the message.
CONTRADICTIONS = {
    "no tiers for calibrated scales": ("static", {"width_tiers": {}}, r"width_tiers\["),
    "other tiers": ("tiered", {"width_tiers": {K0: [[[29, 2]]]}}, r"width_tiers\["),
    "width beside tiers": ("tiered", {"k_bits": 16}, "k_bits=16: must be 2 as stored, .* create_kivi_cache"),
    "width of values beside tiers": ("static", {"v_bits": 4}, "v_bits=4: must be 2 as stored"),
    "simple scheme": ("tiered", {"use_kivi": False}, "width_tiers: the simple scheme"),
    "other ranks": ("tiered", {"truncation_ranks": {K0: 5}, "width_tiers": {}}, "truncation_ranks: k_proj of layer 0"),
    "other rotation": ("tiered", {"v_hadamard": True}, "v_hadamard=True: the checkpoint's factors"),
    "a qwen2 as a llama": ("qwen2", {"dense_model_type": "llama"}, "dense_model_type='llama': must be 'qwen2'"),
    "a mean that a dense checkpoint has not": ("qwen2", {"k_mean_split": True}, "k_mean_split=True: the mean"),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A split model with width tiers, one with calibrated scales too, and a dense Qwen2."""
    path = tmp_path_factory.mktemp("checkpoints")
    tiered_model(path).save_pretrained(path / "tiered")
    static_model().save_pretrained(path / "static")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=97, num_hidden_layers=2, **sizes)).save_pretrained(path / "qwen2")
    return path


@pytest.mark.parametrize(("name", "fields", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_keywords_and_config_are_refused_alike(checkpoints, name, fields, message):
    folder = checkpoints / name
    for load in (
        lambda: ALRDLlamaForCausalLM.from_pretrained(folder, **fields),
        lambda: ALRDLlamaForCausalLM.from_pretrained(folder, config=ALRDLlamaConfig.from_pretrained(folder, **fields)),
        lambda: ALRDLlamaForCausalLM.from_pretrained(folder, config=str(folder), **fields),
        lambda: ALRDLlamaModel.from_pretrained(folder, **fields),
    ):
        with pytest.raises(ValueError, match=message):
            load()


def test_keywords_that_fit_are_taken(checkpoints):
    model = ALRDLlamaForCausalLM.from_pretrained(
        checkpoints / "qwen2", truncation_ranks={K0: 8}, k_bits=4, residual_length=7, dtype=torch.bfloat16
    )
    assert isinstance(model.model.layers[0].self_attn.k_proj, SVDLinear) and model.dtype == torch.bfloat16
    assert (model.create_kivi_cache().scheme.k_bits, model.create_kivi_cache().scheme.residual_length) == (4, 7)
    tiered = ALRDLlamaForCausalLM.from_pretrained(checkpoints / "tiered", residual_length=9)
    assert tiered.create_kivi_cache().layer_schemes[0].residual_length == 9


# ---- models that are no plain model


class Adapted(nn.Module):
    """A layer as PEFT's LoRA wraps it."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, 4, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, layer.out_features, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class Tuner(nn.Module):
    """As PEFT's `LoraModel`, which passes on what it does not have itself."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.model, name)


class PeftModel(nn.Module):
    """As PEFT's own: `base_model.model` is the model."""

    def __init__(self, model):
        super().__init__()
        self.peft_config, self.base_model = {"default": None}, Tuner(model)

    __getattr__ = lambda self, name: (  # noqa: E731
        nn.Module.__getattr__(self, name) if name == "base_model" else getattr(self.base_model, name)
    )


def adapted(dense, projections=("q_proj", "v_proj")):
    for layer in dense.model.layers:
        for name in projections:
            setattr(layer.self_attn, name, Adapted(getattr(layer.self_attn, name)))
    return dense


def quantized_weights(dense):
    projection = dense.model.layers[1].self_attn.o_proj
    projection.weight = nn.Parameter(projection.weight.to(torch.int8), requires_grad=False)
    return dense


def adapted_mlp(dense):
    mlp = dense.model.layers[0].mlp
    mlp.up_proj = Adapted(mlp.up_proj)
    return PeftModel(dense)


NOT_PLAIN = {
    "PEFT": (lambda dense: PeftModel(adapted(dense)), r"PeftModel has PEFT adapters, of .*layers\.0\.self_attn\.q_pro"),
    "PEFT, feed-forward only": (adapted_mlp, r"has PEFT adapters, of .*up_proj .*merge_and_unload"),
    "PEFT, prompts": (PeftModel, r"PeftModel has PEFT prompts: .*dense\.get_base_model\(\)"),
    "adapters in the model": (adapted, r"LlamaForCausalLM has PEFT adapters"),
    "compiled": (torch.compile, r"OptimizedModule must be a plain model, .*q_proj\.weight: no such weight"),
    "quantized": (quantized_weights, r"layers\.1\.self_attn\.o_proj\.weight: a weight in torch\.int8"),
}


@pytest.mark.parametrize(("wrap", "message"), NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_only_a_plain_model_is_split(dense, wrap, message):
    config = config_for(dense, 40)
    with pytest.raises(ValueError, match=message):
        ALRDLlamaForCausalLM.from_dense(wrap(dense), config)


# ---- a folder in other hands


def test_a_saved_folder_says_how_it_is_loaded(tmp_path, dense):
    model = tiny_split(tmp_path, 40, dense=dense)
    model.save_pretrained(tmp_path / "split")
    readme = (tmp_path / "split" / "README.md").read_text()
    names: dict = {}
    lines = [line[4:] for line in readme.splitlines() if line.startswith("    ")]
    exec("\n".join(lines).replace("path of this folder", str(tmp_path / "split")), names)
    assert same_state(names["model"], model)
    (tmp_path / "split" / "README.md").write_text("my own")
    model.save_pretrained(tmp_path / "split")
    assert (tmp_path / "split" / "README.md").read_text() == "my own"
    model.save_pretrained(tmp_path / "export", save_original_format=True)
    model.save_pretrained(tmp_path / "rank 1", False)
    for folder in ("export", "rank 1"):
        assert not (tmp_path / folder / "README.md").exists()


@pytest.mark.parametrize("foreign", [LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM])
def test_a_foreign_class_refuses_the_folder(checkpoints, tmp_path, dense, foreign):
    """Its projections would be random, behind a table that nobody reads."""
    tiny_split(tmp_path, {K0: 8}, dense=dense).save_pretrained(tmp_path / "split")
    for folder in (tmp_path / "split", checkpoints / "tiered"):
        with pytest.raises(Exception, match=r"layer_types.*latent_attention of alrd_llama: see README.md"):
            foreign.from_pretrained(folder)
    # What is split nowhere is a Llama's, and is read as that.
    unsplit = tiny_split(tmp_path, {}, dense=dense)
    unsplit.save_pretrained(tmp_path / "unsplit")
    assert same_state(LlamaForCausalLM.from_pretrained(tmp_path / "unsplit"), dense)


def test_the_auto_classes_without_the_project_refuse_the_folder(checkpoints):
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(checkpoints / 'tiered')!r})"
    run = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    assert run.returncode and "alrd_llama" in run.stderr


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
