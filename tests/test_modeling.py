"""The model over its packed cache, against the dense model and against a simulation."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from configuration_alrd_llama import ALRDLlamaConfig
from modeling_alrd_llama import ALRDLlamaForCausalLM
from modules.kernels.packed import _differences, _kept_counts
from modules.kivi_cache import KIVILatentCache, create_kivi_cache
from tests.helpers import TINY_LLAMA, tiny_dense, tiny_split
from tests.simulated_model import ExactRotaryEmbedding, simulated_caches, simulated_forward

LOSSLESS = {"k_bits": 16, "v_bits": 16, "group_size": 32, "residual_length": 5}
ROPE = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
}


def left_padded(batch: int = 3, length: int = 230) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and a mask whose rows have 37, 0 and 101 pads on the left."""
    ids, mask = torch.randint(1, 97, (batch, length)), torch.ones(batch, length, dtype=torch.long)
    for row, pads in enumerate((37, 0, 101)[:batch]):
        mask[row, :pads] = 0
    return ids, mask


@torch.no_grad()
def in_chunks(model, ids, mask, cuts, cache, **kwargs) -> torch.Tensor:
    """Logits of a text fed in pieces, later pieces with the full mask."""
    outputs, start = [], 0
    for cut in cuts:
        piece = ids[:, start : start + cut]
        m = None if mask is None else mask[:, : start + cut]
        outputs.append(model(piece, attention_mask=m, past_key_values=cache, **kwargs).logits)
        start += cut
    assert start == ids.shape[1]
    return torch.cat(outputs, dim=1)


@torch.no_grad()
def dense_logits(dense, ids, mask) -> torch.Tensor:
    return dense(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits


@pytest.mark.parametrize("heads", [{"num_key_value_heads": 4}, {"num_key_value_heads": 8}], ids=["gqa", "mha"])
@pytest.mark.parametrize("group", [None, 1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_full_rank_lossless_gives_the_dense_logits(tmp_path, heads, group, bias):
    dense = tiny_dense(attention_bias=bias, **heads)
    full = min(heads["num_key_value_heads"] * 16, 64) if group is None else heads["num_key_value_heads"] * 16
    model = tiny_split(tmp_path, full, group, dense=dense, **LOSSLESS)
    ids, mask = left_padded()
    cache = model.create_kivi_cache()
    logits = in_chunks(model, ids, mask, (120, 1, 1, 60, 2, 46), cache)
    real = mask.bool()
    assert (logits - dense_logits(dense, ids, mask))[real].abs().max() < 1e-4
    assert torch.isfinite(logits).all()
    assert all(layer.pool.used > 0 for layer in cache.layers)
    assert cache.row_tokens() == mask.sum(1).tolist() and cache.get_seq_length() == 230


def test_full_rank_lossless_writes_the_same_text(tmp_path):
    dense = tiny_dense()
    model = tiny_split(tmp_path, 64, dense=dense, **{**LOSSLESS, "group_size": 128, "residual_length": 32})
    ids, mask = left_padded(length=150)
    settings = {"attention_mask": mask, "max_new_tokens": 256, "do_sample": False}
    expected = dense.generate(ids, **settings)
    cache = model.create_kivi_cache()
    assert torch.equal(model.generate(ids, past_key_values=cache, **settings), expected)
    assert torch.equal(model.generate(ids, **settings), expected)
    assert min(len(row.blocks) for row in cache.layers[0].rows) >= 1


@pytest.mark.parametrize("rope", ROPE)
def test_rope_scalings(tmp_path, rope):
    dense = tiny_dense(rope_parameters=ROPE[rope])
    model = tiny_split(tmp_path, 64, dense=dense, **LOSSLESS)
    ids, mask = left_padded()
    logits = in_chunks(model, ids, mask, (100, 1, 129), model.create_kivi_cache())
    assert (logits - dense_logits(dense, ids, mask))[mask.bool()].abs().max() < 1e-4


def test_dynamic_ntk_rotates_the_whole_cache_with_the_frequencies_of_the_step(tmp_path):
    # One layer, whose latents do not depend on positions: what differs from a stock cache is the rotation alone.
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    dense = tiny_dense(rope_parameters=rope, max_position_embeddings=128, num_hidden_layers=1)
    model = tiny_split(tmp_path, 64, dense=dense, **LOSSLESS)
    ids = torch.randint(1, 97, (1, 200))
    ours = in_chunks(model, ids, None, (60, 1, 139), model.create_kivi_cache())
    stock = in_chunks(dense, ids, None, (60, 1, 139), DynamicCache())
    with torch.no_grad():
        assert (ours[:, :61] - dense(ids[:, :61]).logits).abs().max() < 1e-4
        assert (ours[:, 61:] - dense(ids).logits[:, 61:]).abs().max() < 1e-4
    assert (ours - stock)[:, 61:].abs().max() > 1e-2


QUANTIZED = [
    {"k_bits": 2, "v_bits": 2, "group_size": 32, "residual_length": 7, "sink_length": 4},
    {"k_bits": 3, "v_bits": 4, "group_size": 20, "residual_length": 0, "sink_length": 0},
    {"k_bits": 4, "v_bits": 3, "group_size": 0, "residual_length": 16, "sink_length": 3},
    {"k_bits": 8, "v_bits": 16, "group_size": 32, "residual_length": 32, "sink_length": 4},
    {"k_bits": 16, "v_bits": 2, "group_size": 128, "residual_length": 32, "sink_length": 4},
]


@pytest.mark.parametrize("settings", QUANTIZED)
@pytest.mark.parametrize("group, ranks", [(None, 29), (2, {"k_proj": [13, 21], "v_proj": [32, 7]}), (1, 40)])
def test_simulation_of_the_same_settings_gives_the_same_logits(tmp_path, settings, group, ranks):
    model = tiny_split(tmp_path, ranks, group, **settings).double()
    model.model.rotary_emb = ExactRotaryEmbedding(model.model.rotary_emb)
    ids = torch.randint(1, 97, (2, 330))
    real = torch.ones_like(ids, dtype=torch.bool)
    real[0, :23] = False
    real[1, 200:205] = False
    cache, simulated, start = model.create_kivi_cache(), simulated_caches(model), 0
    for cut in (170, 1, 1, 64, 3, 90, 1):
        piece, mask = ids[:, start : start + cut], real[:, start : start + cut]
        with torch.no_grad():
            logits = model(piece, attention_mask=real[:, : start + cut].long(), past_key_values=cache).logits
        expected = simulated_forward(model, piece, simulated, mask)
        assert (logits - expected)[mask].abs().max() < 1e-5
        start += cut
    assert all(layer.pool.used > 0 for layer in cache.layers)


def test_a_packed_cache_is_not_the_lossless_one(tmp_path):
    model = tiny_split(tmp_path, 40, **QUANTIZED[0])
    ids = torch.randint(1, 97, (1, 300))
    lossy = in_chunks(model, ids, None, (299, 1), model.create_kivi_cache())
    exact = in_chunks(model, ids, None, (299, 1), model.create_kivi_cache(k_bits=16, v_bits=16))
    assert torch.equal(lossy[:, :299], exact[:, :299])
    assert (lossy[:, 299] - exact[:, 299]).abs().max() > 1e-2


def test_some_layers_dense_some_split(tmp_path):
    dense = tiny_dense(attention_bias=True)
    ranks = {"model.layers.0.self_attn.k_proj": 64, "model.layers.2.self_attn.v_proj": 64}
    model = tiny_split(tmp_path, ranks, dense=dense, **LOSSLESS)
    ids, mask = left_padded()
    logits = in_chunks(model, ids, mask, (100, 1, 129), model.create_kivi_cache())
    assert (logits - dense_logits(dense, ids, mask))[mask.bool()].abs().max() < 1e-4


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.15), (torch.float16, 0.03)])
def test_a_row_of_a_padded_batch_gives_what_it_gives_alone(tmp_path, dtype, tolerance):
    model = tiny_split(tmp_path, 32, dense=tiny_dense(dtype=dtype), k_bits=4, v_bits=4, group_size=32)
    ids, mask = left_padded()
    cuts = (160, 1, 40, 29)
    together = in_chunks(model, ids, mask, cuts, model.create_kivi_cache())
    for row, pads in enumerate((37, 0, 101)):
        alone = in_chunks(model, ids[row : row + 1, pads:], None, (160 - pads, 1, 40, 29), model.create_kivi_cache())
        difference = (together[row, pads:] - alone[0]).abs().max()
        assert difference <= tolerance * alone.abs().max().clamp(min=1)


def test_chunks_in_half_precision_agree_with_float32(tmp_path):
    ids = torch.randint(1, 97, (1, 220))
    logits = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = tiny_split(tmp_path, 64, dense=tiny_dense(dtype=dtype), **LOSSLESS)
        logits[dtype] = in_chunks(model, ids, None, (150, 1, 69), model.create_kivi_cache()).float()
        dense = tiny_dense(dtype=dtype)(ids).logits.float()
        exact = logits[torch.float32]
        # No more than twice the error of the dense model in the same type.
        assert (logits[dtype] - exact).abs().mean() <= 2 * (dense - exact).abs().mean() + 1e-5


def test_the_plain_prefill_and_decode_loop_makes_its_own_cache(tmp_path):
    model = tiny_split(tmp_path, 64, **LOSSLESS)
    ids = torch.randint(1, 97, (1, 100))
    with torch.no_grad():
        outputs = model(ids, use_cache=True)
        cache = outputs.past_key_values
        assert isinstance(cache, KIVILatentCache)
        text = [outputs.logits[:, -1:].argmax(-1)]
        for _ in range(20):
            outputs = model(text[-1], past_key_values=cache, use_cache=True)
            assert outputs.past_key_values is cache
            text.append(outputs.logits[:, -1:].argmax(-1))
        assert model(ids, use_cache=False).past_key_values is None
    expected = model.generate(ids, max_new_tokens=21, do_sample=False, past_key_values=DynamicCache())
    assert torch.equal(torch.cat([ids, *text], dim=1), expected)
    model.config.use_kivi = False
    assert isinstance(model(ids, use_cache=True).past_key_values, DynamicCache)


def test_stock_caches_work_with_full_keys_and_values(tmp_path):
    dense = tiny_dense()
    model = tiny_split(tmp_path, 64, dense=dense)
    ids, mask = left_padded(length=120)
    settings = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    expected = dense.generate(ids, **settings)
    assert torch.equal(model.generate(ids, past_key_values=DynamicCache(), **settings), expected)
    assert torch.equal(
        model.generate(ids, past_key_values=StaticCache(config=model.config, max_cache_len=160), **settings), expected
    )
    assert torch.equal(model.generate(ids, cache_implementation="static", **settings), expected)
    assert torch.equal(model.generate(ids, use_cache=False, **settings), expected)


def test_several_turns_on_one_cache(tmp_path):
    dense = tiny_dense()
    model = tiny_split(tmp_path, 64, dense=dense, **LOSSLESS)
    ids, mask = left_padded(length=120)
    ours, theirs = model.create_kivi_cache(), DynamicCache()
    for turn in range(3):
        settings = {"attention_mask": mask, "max_new_tokens": 15, "do_sample": False}
        text = model.generate(ids, past_key_values=ours, **settings)
        assert torch.equal(text, dense.generate(ids, past_key_values=theirs, **settings))
        new = torch.randint(1, 97, (3, 30 + turn))
        ids = torch.cat([text, new], dim=1)
        mask = torch.cat([mask, torch.ones(3, ids.shape[1] - mask.shape[1], dtype=torch.long)], dim=1)


@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}])
def test_beams_and_repeats_act_on_the_packed_part(tmp_path, mode):
    dense = tiny_dense()
    model = tiny_split(tmp_path, 64, dense=dense, **LOSSLESS)
    ids, mask = left_padded(length=150)
    settings = {"attention_mask": mask, "max_new_tokens": 60, **mode}
    torch.manual_seed(1)
    expected = dense.generate(ids, **settings)
    torch.manual_seed(1)
    assert torch.equal(model.generate(ids, **settings), expected)


def test_assisted_decoding_crops_the_cache(tmp_path):
    dense = tiny_dense()
    model = tiny_split(tmp_path, 64, dense=dense, **LOSSLESS)
    ids = torch.randint(1, 97, (1, 90)).repeat(1, 2)
    expected = dense.generate(ids, max_new_tokens=50, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=50, do_sample=False, assistant_model=dense), expected)
    assert torch.equal(model.generate(ids, max_new_tokens=50, do_sample=False, prompt_lookup_num_tokens=4), expected)


def test_attention_weights(tmp_path):
    dense = tiny_dense()
    dense.set_attn_implementation("eager")
    model = tiny_split(tmp_path, 64, dense=dense, **LOSSLESS)
    model.set_attn_implementation("eager")
    ids, mask = left_padded()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = dense(ids, attention_mask=mask, position_ids=positions, output_attentions=True).attentions
        cache = model.create_kivi_cache()
        first = model(ids[:, :180], attention_mask=mask[:, :180], past_key_values=cache, output_attentions=True)
        second = model(ids[:, 180:], attention_mask=mask, past_key_values=cache, output_attentions=True)
    for layer in range(3):
        for row in range(3):
            real = mask[row, :180].bool()
            found = first.attentions[layer][row][:, real]
            assert torch.allclose(found, expected[layer][row, :, :180, :180][:, real], atol=1e-4)
        assert torch.allclose(second.attentions[layer], expected[layer][:, :, 180:], atol=1e-4)
    assert len(second.attentions) == 3


def test_hidden_states_and_embeddings(tmp_path):
    model = tiny_split(tmp_path, 40)
    ids = torch.randint(1, 97, (1, 50))
    with torch.no_grad():
        by_ids = model(ids, output_hidden_states=True)
        by_embeddings = model(inputs_embeds=model.get_input_embeddings()(ids))
    assert len(by_ids.hidden_states) == 4
    assert torch.equal(by_ids.logits, by_embeddings.logits)


def test_training_reaches_both_factors(tmp_path):
    model = tiny_split(tmp_path, 40).train()
    ids = torch.randint(1, 97, (2, 60))
    outputs = model(ids, labels=ids)
    assert not isinstance(outputs.past_key_values, KIVILatentCache)
    outputs.loss.backward()
    for layer in model.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            for factor in (projection.ALinear.weight, projection.BLinear.weight):
                assert factor.grad is not None and factor.grad.abs().max() > 0
    reference = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, reference[name], atol=1e-5), name


def test_simple_scheme_rounds_every_latent_and_keeps_stock_caches(tmp_path):
    model = tiny_split(tmp_path, 40, use_kivi=False, k_bits=3, v_bits=3)
    exact = ALRDLlamaForCausalLM.from_dense(tiny_dense(), _without_rounding(model.config))
    ids = torch.randint(1, 97, (1, 100))
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache = DynamicCache()
        pieces = in_chunks(model, ids, None, (50, 1, 49), cache)
        assert torch.allclose(whole, pieces, atol=1e-3)
        assert (whole - exact(ids, use_cache=False).logits).abs().max() > 1e-2
    model.generate(ids, max_new_tokens=3)


@torch.no_grad()
def test_the_simple_scheme_may_be_switched_on_a_built_model(tmp_path):
    model, ids = tiny_split(tmp_path, 40, k_bits=2, v_bits=3, group_size=16), torch.randint(1, 97, (1, 60))
    exact = model(ids, use_cache=False).logits
    for fields in ({"use_kivi": False}, {"k_bits": 3}, {"group_size": 8}):
        for name, value in fields.items():
            setattr(model.config, name, value)
        built = ALRDLlamaForCausalLM.from_dense(tiny_dense(), ALRDLlamaConfig(**model.config.to_dict()))
        assert torch.equal(model(ids, use_cache=False).logits, built(ids, use_cache=False).logits)
        assert not torch.equal(model(ids, use_cache=False).logits, exact)
        written = model.generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
        assert isinstance(written.past_key_values, DynamicCache)
        assert torch.equal(written.sequences, built.generate(ids, max_new_tokens=5, do_sample=False))
    model.config.use_kivi = True
    assert torch.equal(model(ids, use_cache=False).logits, exact)
    assert isinstance(model(ids).past_key_values, KIVILatentCache)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"k_bits": 7}, "k_bits=7: must be"), ({"v_scheme": {"rotation": True}}, "v_scheme: the simple scheme")],
    ids=str,
)
def test_what_the_simple_scheme_does_not_do_is_refused_on_a_built_model(tmp_path, fields, message):
    model, ids = tiny_split(tmp_path, 40), torch.randint(1, 97, (1, 10))
    for name, value in {"use_kivi": False, **fields}.items():
        setattr(model.config, name, value)
    for run in (lambda: model(ids), lambda: model(ids, use_cache=False), lambda: model.generate(ids)):
        with pytest.raises(ValueError, match=message):
            run()


def _without_rounding(config: ALRDLlamaConfig) -> ALRDLlamaConfig:
    return ALRDLlamaConfig(**{**config.to_dict(), "k_bits": 16, "v_bits": 16})


@pytest.mark.parametrize("group", [None, 2])
def test_a_cache_made_by_hand_serves_the_model(tmp_path, group):
    model = tiny_split(tmp_path, 40, group, group_size=16)
    ids = torch.randint(1, 97, (2, 150))
    by_hand = create_kivi_cache(k_bits=2, v_bits=2, group_size=16, residual_length=32)
    settings = {"max_new_tokens": 10, "do_sample": False}
    text = model.generate(ids, past_key_values=by_hand, **settings)
    own = model.create_kivi_cache()
    assert torch.equal(text, model.generate(ids, past_key_values=own, **settings))
    assert by_hand.nbytes_used == own.nbytes_used and by_hand.layers[0].pool.used


class TestRefusals:
    def test_positions_with_gaps(self, tmp_path):
        model = tiny_split(tmp_path, 40)
        ids = torch.randint(1, 97, (1, 10))
        with pytest.raises(ValueError, match="position_ids: must count the tokens"):
            model(ids, position_ids=torch.arange(10)[None] * 2, use_cache=True)

    def test_mask_of_the_new_tokens_only(self, tmp_path):
        model, cache = (m := tiny_split(tmp_path, 40)), m.create_kivi_cache()
        ids = torch.randint(1, 97, (2, 10))
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match=r"attention_mask: \(2, 10\) must be .* \(2, 20\)"):
            model(ids, attention_mask=torch.ones(2, 10), past_key_values=cache)

    def test_mask_that_hides_one_token_and_shows_a_pad(self, tmp_path):
        model, cache = (m := tiny_split(tmp_path, 40)), m.create_kivi_cache()
        ids, mask = torch.randint(1, 97, (2, 10)), torch.ones(2, 20)
        mask[0, :2] = 0
        model(ids, attention_mask=mask[:, :10], past_key_values=cache)
        mask[0] = mask[0].roll(3)
        with pytest.raises(ValueError, match=r"attention_mask: its past part must mark the \[8, 10\] tokens"):
            model(ids, attention_mask=mask, past_key_values=cache)

    def test_positions_of_another_length(self, tmp_path):
        model = tiny_split(tmp_path, 40)
        with pytest.raises(ValueError, match=r"position_ids: \(1, 9\) must be \(2, 10\)"):
            model(torch.randint(1, 97, (2, 10)), position_ids=torch.arange(9)[None], use_cache=True)

    def test_mask_that_hides_cached_tokens(self, tmp_path):
        model, cache = (m := tiny_split(tmp_path, 40)), m.create_kivi_cache()
        ids, mask = torch.randint(1, 97, (2, 10)), torch.ones(2, 20)
        model(ids, past_key_values=cache)
        mask[0, 3] = 0
        with pytest.raises(ValueError, match="attention_mask: its past part"):
            model(ids, attention_mask=mask, past_key_values=cache)

    def test_four_dimensional_mask(self, tmp_path):
        model = tiny_split(tmp_path, 40)
        with pytest.raises(ValueError, match="attention_mask"):
            model(torch.randint(1, 97, (1, 10)), attention_mask=torch.ones(1, 1, 10, 10), use_cache=True)

    def test_other_batch(self, tmp_path):
        model, cache = (m := tiny_split(tmp_path, 40)), m.create_kivi_cache()
        model(torch.randint(1, 97, (2, 10)), past_key_values=cache)
        with pytest.raises(ValueError, match="batch of 3 must be the 2 rows"):
            model(torch.randint(1, 97, (3, 10)), past_key_values=cache)

    def test_unknown_cache_setting(self, tmp_path):
        with pytest.raises(ValueError, match="bits: no such setting"):
            tiny_split(tmp_path, 40).create_kivi_cache(bits=2)

    @pytest.mark.parametrize("fields", [{"head_group_size": 2}, {"truncation_ranks": {}}], ids=str)
    def test_ranks_assigned_later(self, tmp_path, fields):
        model = tiny_split(tmp_path, 40)
        for name, value in fields.items():
            setattr(model.config, name, value)
        with pytest.raises(ValueError, match="truncation_ranks, head_group_size: must stay as layer 0 was built"):
            model.generate(torch.randint(1, 97, (1, 10)))

    def test_settings_assigned_later(self, tmp_path):
        model = tiny_split(tmp_path, 40)
        model.config.k_bits = 7
        with pytest.raises(ValueError, match="k_bits=7"):
            model.create_kivi_cache()
        config = ALRDLlamaConfig(**TINY_LLAMA)
        config.v_bits = 7
        with pytest.raises(ValueError, match="v_bits=7"):
            ALRDLlamaForCausalLM(config)


def test_a_step_makes_no_tensor_of_numbers(tmp_path, monkeypatch):
    """On an accelerator each would be copied from the host; rows of different lengths, steps that pack nothing."""
    model = tiny_split(tmp_path, 24, group_size=32, residual_length=5)
    ids, mask = torch.randint(1, 97, (2, 60)), torch.ones((2, 50), dtype=torch.long)
    mask[0, :7] = 0
    cache = model.create_kivi_cache()
    with torch.no_grad():
        model(ids[:, :50], attention_mask=mask, past_key_values=cache)
        model(ids[:, 50:51], past_key_values=cache)

        def refuse(*args, **kwargs):
            raise AssertionError("made of numbers on the host")

        for name in ("tensor", "as_tensor", "from_numpy"):
            monkeypatch.setattr(torch, name, refuse)
        blocks = [len(row.blocks) for row in cache.layers[0].rows]
        for t in range(51, 56):
            model(ids[:, t : t + 1], past_key_values=cache)
    assert [len(row.blocks) for row in cache.layers[0].rows] == blocks == [1, 1]


def test_a_refused_export_leaves_no_trace(tmp_path):
    """Where tokens stand is kept from step to step, but not as the fake tensors of an export."""
    model = tiny_split(tmp_path, 24)
    ids = torch.randint(1, 97, (2, 40))
    expected = model(ids).logits
    _kept_counts.cache_clear()
    _differences.cache_clear()
    with torch.no_grad(), pytest.raises(RuntimeError):
        torch.export.export(model, (ids,))
    assert torch.equal(model(ids).logits, expected)
