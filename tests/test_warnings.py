"""States of which a quantizer must lose much are told, with what to do; ordinary ones are not."""

import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, Qwen2Config, Qwen2ForCausalLM

from configuration_alrd_llama import ALRDLlamaConfig
from modeling_alrd_llama import ALRDLlamaForCausalLM
from modules.kivi_cache import KIVILatentCache, create_kivi_cache
from scripts.common import BUNDLED_MODEL
from tests.helpers import TINY_LLAMA, tiny_dense, tiny_split

TURNING = r"layer 0: keys after RoPE reach over \d+ times .* codes of {} bits .* split the model .* k_bits=8"
IDS = torch.randint(1, 97, (1, 340), generator=torch.Generator().manual_seed(0))


def biased(bias: float, fields: dict) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**{**TINY_LLAMA, **fields})).eval()
    for layer in model.model.layers:
        torch.nn.init.constant_(layer.self_attn.k_proj.bias, bias)
    return model


@torch.no_grad()
def divergence(model, cache, dense) -> float:
    """KL divergence of the tokens after 300, of which most are packed, in nats."""
    found = []
    for its_model, its_cache in ((dense, DynamicCache()), (model, cache)):
        its_model(IDS[:, :300], past_key_values=its_cache)
        found.append(its_model(IDS[:, 300:], past_key_values=its_cache).logits.double().log_softmax(-1))
    return (found[0].exp() * (found[0] - found[1])).sum(-1).mean().item()


@pytest.mark.parametrize("fields", [{}, {"initializer_range": 0.06, "hidden_size": 256, "head_dim": 32}], ids=str)
@pytest.mark.parametrize("capacity", [None, 400])
@pytest.mark.parametrize("bias", [10, 30, 300])
def test_keys_that_turn_with_a_bias(bias, capacity, fields):
    dense = biased(bias, fields)
    with pytest.warns(UserWarning, match=TURNING.format(4)) as told:
        lost = divergence(dense, create_kivi_cache(k_bits=4, v_bits=16, capacity=capacity), dense)
    assert len(told) == 1  # of all layers
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wide = divergence(dense, create_kivi_cache(k_bits=8, v_bits=16, capacity=capacity), dense)
        size = dense.config.num_key_value_heads * dense.config.head_dim
        ranks = {f"model.layers.{i}.self_attn.k_proj": min(size, dense.config.hidden_size) for i in range(3)}
        config = ALRDLlamaConfig.from_llama(dense.config, truncation_ranks=ranks)
        model = ALRDLlamaForCausalLM.from_dense(dense, config)
        split = divergence(model, model.create_kivi_cache(k_bits=4, v_bits=16), dense)
    assert lost > 0.05 and wide < lost / 4 and split < lost / 3


def test_a_bias_is_seen_when_the_first_block_is_packed_token_by_token():
    dense, cache = biased(30, {}), create_kivi_cache(k_bits=2, group_size=16, residual_length=5)
    with torch.no_grad(), pytest.warns(UserWarning, match=TURNING.format(2)):
        for i in range(30):
            dense(IDS[:, i : i + 1], past_key_values=cache)


@pytest.mark.parametrize("block", [16, 128])
def test_ordinary_keys_are_taken_without_a_word(block):
    bundled = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    text = tokenizer(Path(__file__).read_text(), return_tensors="pt").input_ids[:, :400]
    same = torch.full((2, 300), 7)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        for model, ids in (
            (bundled, text),
            (tiny_dense(), IDS),
            (tiny_dense(), same),  # tokens that are all the same, as pads are
            (biased(0, {}), IDS),
            (biased(1, {}), IDS),
        ):
            for bits in (2, 4):
                model(ids, past_key_values=create_kivi_cache(k_bits=bits, group_size=block))
        create_kivi_cache(group_size=block).update(torch.zeros(1, 2, 300, 8), torch.zeros(1, 2, 300, 8), 0)
        create_kivi_cache(group_size=block).update(torch.randn(1, 2, 1, 7), torch.randn(1, 2, 1, 7), 0)


def relative_error(scale: float, bits: float) -> float:
    cache = KIVILatentCache(create_kivi_cache(k_bits=bits, v_bits=int(bits)).scheme)
    states = torch.randn(1, 400, 16, generator=torch.Generator().manual_seed(0)) * scale
    cache.layer(0).append(states, states)
    errors = [((x - states) / scale).norm().item() for x in cache.layers[0].states()]
    return max(errors) / (states / scale).norm().item()


@pytest.mark.parametrize("bits", [1, 1.5, 2, 4, 8])
def test_float32_states_too_small_for_float16_scales(bits):
    """Whatever is lost by more than a quarter beyond what it would be at another scale is told."""
    ordinary = relative_error(1.0, bits)
    for exponent in range(-26, -8):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            error = relative_error(2.0**exponent, bits)
        told = {str(w.message).split(":")[0] for w in caught}
        assert told or error < 1.25 * ordinary
        assert not told or exponent < -12
    with pytest.warns(UserWarning, match=r"keys: states of at most 4.*e-08 in torch.float32 .* bfloat16, .* 16 bits"):
        relative_error(1e-8, bits)


@torch.no_grad()
def test_small_states_of_a_model_are_told(tmp_path):
    model = tiny_split(tmp_path, 32)
    for layer in model.model.layers:
        layer.self_attn.v_proj.BLinear.weight.mul_(1e-8)
    for capacity in (None, 400):
        with pytest.warns(UserWarning, match="values: states of at most"):
            model(IDS, past_key_values=model.create_kivi_cache(capacity=capacity))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(IDS, past_key_values=model.create_kivi_cache(v_bits=16))
        model.bfloat16()(IDS, past_key_values=model.create_kivi_cache())
