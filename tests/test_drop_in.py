"""The packed cache under models of the library that are not ours: right, or refused by name."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    EncoderDecoderCache,
    T5Config,
    T5ForConditionalGeneration,
)

from modules.kivi_cache import KIVILatentCache, create_kivi_cache
from tests.helpers import TINY_LLAMA

SIZES = TINY_LLAMA | {"num_hidden_layers": 4, "initializer_range": 0.1}
SSM = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
TWICE = {"linear_attention": ["linear_attention", "full_attention"] * 2, "conv": ["conv", "full_attention"] * 2}

#: Models with layers whose state is no list of keys and values: gated delta nets, state spaces, short convolutions.
WITH_STATES = {
    "qwen3_next": {
        "layer_types": TWICE["linear_attention"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "jamba": {
        "num_experts": 2,
        "use_mamba_kernels": False,
        "mamba_d_state": 8,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "bamba": {"attn_layer_indices": [1], **SSM},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "num_local_experts": 0, **SSM},
    "falcon_h1": {"mamba_d_ssm": 64, **SSM, "mamba_d_head": 8},
    "zamba2": {
        "mamba_d_state": 8,
        "mamba_headdim": 16,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "hybrid_layer_ids": [1, 3],
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "adapter_rank": 4,
    },
    "lfm2": {"layer_types": TWICE["conv"]},
    "minimax": {"layer_types": TWICE["linear_attention"], "num_local_experts": 2},
}

#: Models that keep keys and values in every layer, some of which their masks narrow to a window or a chunk.
WITHOUT_STATES = {
    "qwen3": {},
    "phi3": {},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "gemma2": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8},
    "mistral": {"sliding_window": 8},
    "llama4_text": {"attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 64},
}

SETTINGS = {"max_new_tokens": 20, "do_sample": False}


def new_cache(**settings) -> KIVILatentCache:
    """Lossless, with blocks of 4."""
    return create_kivi_cache(**{"k_bits": 16, "v_bits": 16, "group_size": 4, "residual_length": 4, **settings})


def random_model(name: str, fields: dict):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SIZES | fields)).eval()


@pytest.mark.parametrize(("name", "fields"), WITH_STATES.items(), ids=WITH_STATES)
def test_layers_with_other_states_are_refused_by_name(name, fields):
    model, ids = random_model(name, fields), torch.randint(1, 97, (1, 20))
    model.generate(ids, **SETTINGS)  # the model itself runs
    with pytest.raises(ValueError, match=r"past_key_values.*KIVILatentCache"):
        model.generate(ids, past_key_values=new_cache(), **SETTINGS)


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_a_pure_state_space_model_is_refused_by_name(name):
    fields = {"mamba": {"state_size": 8}, "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 1}}
    model = random_model(name, fields[name])
    with pytest.raises(ValueError, match="past_key_values: a KIVILatentCache holds keys and values only"):
        model(torch.randint(1, 97, (1, 20)), cache_params=new_cache())


@pytest.mark.parametrize("capacity", [None, 80])
@pytest.mark.parametrize(("name", "fields"), WITHOUT_STATES.items(), ids=WITHOUT_STATES)
def test_keys_and_values_of_every_layer_are_held(name, fields, capacity):
    model, ids, cache = random_model(name, fields), torch.randint(1, 97, (2, 20)), new_cache(capacity=capacity)
    found = model.generate(ids, past_key_values=cache, **SETTINGS)
    assert torch.equal(found, model.generate(ids, **SETTINGS))
    assert cache.row_tokens() == [39, 39] and len(set(found[0].tolist())) > 3
    assert all(len(row.blocks) > 6 for layer in cache.layers for row in layer.rows)


# ---- encoder and decoder

TOKENS = {"vocab_size": 97, "pad_token_id": 0, "eos_token_id": None, "decoder_start_token_id": 0}


def encoder_decoder(kind: str, layers: int):
    torch.manual_seed(0)
    if kind == "t5":
        sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": layers, "num_heads": 4}
        model = T5ForConditionalGeneration(T5Config(**TOKENS, **sizes, initializer_factor=3.0)).eval()
    else:
        sizes = {
            f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("ffn_dim", 96), ("layers", layers))
        }
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
        config = BartConfig(**TOKENS, **sizes, **heads, d_model=64, init_std=0.3, bos_token_id=None)
        model = BartForConditionalGeneration(config).eval()
    model.generation_config.forced_eos_token_id = None
    return model


@pytest.fixture(params=[("t5", 1), ("t5", 2), ("bart", 1), ("bart", 2)], ids=str)
def translating(request):
    """A model, a padded batch for it, and what it writes greedily and by beams."""
    model, ids = encoder_decoder(*request.param), torch.randint(1, 97, (2, 14))
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    prompt["attention_mask"][0, 10:] = 0
    modes = ({}, {"num_beams": 3})
    return model, prompt, [(mode, model.generate(**prompt, **SETTINGS, **mode)) for mode in modes]


@pytest.mark.parametrize("cross", ["dynamic", "packed"])
def test_the_two_caches_of_a_decoder(translating, cross):
    model, prompt, expected = translating
    for mode, text in expected:
        cache = EncoderDecoderCache(new_cache(), DynamicCache() if cross == "dynamic" else new_cache())
        assert torch.equal(model.generate(**prompt, past_key_values=cache, **SETTINGS, **mode), text)
        assert all(len(row.blocks) > 2 for layer in cache.self_attention_cache.layers for row in layer.rows)
        if cross == "packed":
            assert cache.cross_attention_cache.row_tokens() == [14] * (2 * mode.get("num_beams", 1))


def test_one_cache_for_both_is_refused_by_name(translating):
    model, prompt, expected = translating
    message = r"past_key_values: layer 0 would hold 15 slots.* EncoderDecoderCache\(this cache, DynamicCache\(\)\)"
    one = new_cache()
    for cache in (new_cache(), EncoderDecoderCache(one, one)):
        for mode, _ in expected:
            with pytest.raises(ValueError, match=message):
                model.generate(**prompt, past_key_values=cache, **SETTINGS, **mode)
            cache.reset()
    # Without a mask nothing else would fail: the logits would be wrong.
    with pytest.raises(ValueError, match=message), torch.no_grad():
        model(input_ids=prompt["input_ids"], decoder_input_ids=torch.tensor([[0], [0]]), past_key_values=new_cache())


def test_layers_that_hold_different_tokens_are_refused():
    """As after an error in a step, or where a decoder's cross-attention feeds the layer of its self-attention."""
    cache, states = new_cache(), torch.randn(1, 2, 6, 16)
    for i in range(2):
        cache.update(states, states, i)
    cache.update(states, states, 0)
    with pytest.raises(ValueError, match="layer 1 would hold 7 slots, but layer 0 holds 12"):
        cache.update(states[:, :, :1], states[:, :, :1], 1)
    assert [layer.slots for layer in cache.layers] == [12, 6]


def test_keys_and_values_are_read_where_cross_attention_reads_them():
    cache, keys, values = new_cache(), torch.randn(2, 3, 11, 16), torch.randn(2, 3, 11, 16)
    assert cache.layer(0).keys is None
    cache.update(keys, values, 0)
    assert torch.equal(cache.layers[0].keys, keys) and torch.equal(cache.layers[0].values, values)
    with pytest.raises(ValueError, match="keys: must not be assigned"):
        cache.layers[0].values = values
