"""What `generate` does with a packed cache: lossless, the dense model's text; quantized, that of the simulation.

Every back end runs greedy search, beams, samples and assisted decoding in `test_modeling.py`; here all modes run, on
the one that the device chooses.
"""

import copy
import functools
import threading

import pytest
import torch
from test_tiers import simulations as tiered_simulations
from test_tiers import tiered_model
from transformers import (
    AutoTokenizer,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

from modules.kivi_cache import KIVILatentCache
from tests.helpers import save_byte_tokenizer, tiny_dense, tiny_split
from tests.simulated_model import ExactRotaryEmbedding, SimulatedForCausalLM

#: Small blocks: 41 prompt tokens and 20 new ones fill several of them.
LOSSLESS = {"k_bits": 16, "v_bits": 16, "group_size": 8, "residual_length": 5, "sink_length": 3}
NEW = {"max_new_tokens": 20}


def text(batch: int = 2, length: int = 41, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(batch: int = 2, length: int = 41) -> dict[str, torch.Tensor]:
    """A prompt whose first row begins with 13 pads."""
    ids, mask = text(batch, length), torch.ones((batch, length), dtype=torch.long)
    ids[0, :13], mask[0, :13] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def negative_prompt() -> dict[str, torch.Tensor]:
    mask = torch.ones((2, 15), dtype=torch.long)
    mask[1, :4] = 0
    return {"negative_prompt_ids": text(2, 15, seed=2), "negative_prompt_attention_mask": mask}


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
    "beams that end early": {"num_beams": 3, "early_stopping": True, "eos_token_id": [*range(1, 20)]},
    "long beams": {"num_beams": 3, "early_stopping": "never", "length_penalty": 3.0, "eos_token_id": [*range(1, 20)]},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "prompt in chunks": {"prefill_chunk_size": 20},
    "guidance": {"guidance_scale": 1.7},
    "negative prompt": {"guidance_scale": 1.7, "do_sample": True, **negative_prompt()},
    "guidance, beams, chunks": {"guidance_scale": 1.7, "num_beams": 2, "prefill_chunk_size": 20},
    "logits processors": {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[9], [11, 12]],
        "eos_token_id": [*range(20, 40)],
        "min_new_tokens": 20,
    },
    "watermark": {"watermarking_config": {"bias": 3.0, "seeding_scheme": "selfhash"}},
}
by_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def generated(model, mode: dict, prompt: dict | None = None, seed: int = 7, **more) -> torch.Tensor:
    settings = {"do_sample": False, **NEW, **mode, **more}
    torch.manual_seed(seed)
    return model.generate(**(padded() if prompt is None else prompt), **settings)


def assert_packed(cache, blocks: int = 3) -> None:
    assert isinstance(cache, KIVILatentCache)
    assert all(len(row.blocks) >= blocks for layer in cache.layers for row in layer.rows)


#: Heads, head groups and what the cache is given besides.
KINDS = {
    "gqa, joint": ({}, None, {}),
    "mha, per head": ({"num_key_value_heads": 8, "head_dim": 8}, 1, {}),
    "gqa, pairs, fixed capacity": ({}, 2, {"capacity": 200}),
}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def pair(request, tmp_path_factory):
    """A dense model, its full-rank split, and how to make a cache for it."""
    heads, group, settings = request.param
    # No pad token: of an assistant that is given no mask the library would take every pad that is written for padding.
    dense = tiny_dense(num_hidden_layers=2, pad_token_id=None, **heads)
    model = tiny_split(tmp_path_factory.mktemp("pair"), 64, group, dense, **LOSSLESS)
    return dense, model, functools.partial(model.create_kivi_cache, **settings)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A dense model and its lossless split."""
    dense = tiny_dense(num_hidden_layers=2, pad_token_id=None)
    return dense, tiny_split(tmp_path_factory.mktemp("models"), 64, None, dense, **LOSSLESS)


# ---- lossless: the dense model's text


@pytest.mark.parametrize("size", [1, 9])
def test_small_chunks(models, size):
    dense, model = models
    assert torch.equal(generated(model, {"prefill_chunk_size": size}), generated(dense, {}))


@by_mode
def test_lossless_is_the_dense_model(pair, mode):
    dense, model, new_cache = pair
    cache = new_cache()
    found = generated(model, mode, past_key_values=cache)
    assert torch.equal(found, generated(dense, mode))
    assert_packed(cache, 2)
    if cache.capacity is None:
        own = generated(model, mode, return_dict_in_generate=True)
        assert torch.equal(own.sequences, found)
        assert own.past_key_values.row_tokens() == cache.row_tokens()


def test_modes_are_not_all_the_same_text(models):
    """Otherwise the modes above would show nothing."""
    texts = {name: generated(models[0], mode) for name, mode in MODES.items() if name != "prompt in chunks"}
    assert len({tuple(t[1].tolist()) for t in texts.values()}) == len(texts)
    assert texts["beams that end early"].shape[1] < 61


def looking_up() -> dict[str, torch.Tensor]:
    return {"input_ids": text(1, 20).repeat(1, 2)}


@pytest.mark.parametrize(
    ("ours", "draft", "sampling"),
    [
        ("target", "good", {}),
        ("target", "bad", {}),
        ("assistant", "good", {}),
        ("both", "good", {}),
        ("target", "bad", {"do_sample": True}),
        ("assistant", "good", {"do_sample": True}),
    ],
    ids=str,
)
def test_assisted_decoding(pair, sampling, draft, ours, monkeypatch):
    dense, model, new_cache = pair
    assistant = dense if draft == "good" else tiny_dense(1, num_hidden_layers=2, pad_token_id=None)
    made = []
    monkeypatch.setattr(model, "create_kivi_cache", lambda: made.append(new_cache()) or made[-1])
    for m in (dense, model, assistant):  # twenty tokens at a time, so that a crop reaches packed blocks
        monkeypatch.setattr(m.generation_config, "num_assistant_tokens", 20)
        monkeypatch.setattr(m.generation_config, "assistant_confidence_threshold", 0.0)
    expected = generated(dense, sampling, looking_up(), assistant_model=assistant)
    target = dense if ours == "assistant" else model
    found = generated(target, sampling, looking_up(), assistant_model=assistant if ours == "target" else model)
    assert torch.equal(found, expected)
    if not sampling:
        assert torch.equal(found, generated(dense, {}, looking_up()))
    assert len(made) == (2 if ours == "both" else 1)
    for cache in made:
        assert_packed(cache)
        if draft == "bad":  # blocks of which a crop has left a part
            assert cache.row_tokens() == [59] and any(c < 8 for c in cache.layers[0].rows[0].counts)


DRAFTLESS = {
    "prompt look-up": {"prompt_lookup_num_tokens": 4},
    "sampled look-up": {"prompt_lookup_num_tokens": 4, "do_sample": True},
    "early exit": {"assistant_early_exit": 1},
}


@pytest.mark.parametrize("mode", DRAFTLESS.values(), ids=DRAFTLESS)
def test_speculation_without_a_second_model(pair, mode):
    dense, model, new_cache = pair
    cache = new_cache()
    found = generated(model, mode, looking_up(), past_key_values=cache)
    assert torch.equal(found, generated(dense, mode, looking_up()))
    assert_packed(cache)


def test_an_early_exit_drafts_with_the_first_layers(tmp_path, monkeypatch):
    model = tiered_model(tmp_path, 4, (20, 31), (18, 17), tiny_dense(num_key_value_heads=8, pad_token_id=None))
    made, create = [], model.create_kivi_cache
    monkeypatch.setattr(model, "create_kivi_cache", lambda: made.append(create()) or made[-1])
    generated(model, {"assistant_early_exit": 2}, looking_up())
    target, draft = sorted(made, key=lambda cache: -len(cache.layers))
    assert (len(target.layers), len(draft.layers)) == (3, 2)
    assert all(layer.is_initialized for cache in made for layer in cache.layers)
    assert model.create_kivi_cache().layers[2].given_widths == target.layers[2].given_widths


@pytest.mark.parametrize("seed", range(5))
def test_a_draft_knows_no_pads_but_those_of_its_target(tmp_path, seed):
    """A mask of ones is dropped by the library, which would then take every pad id in the draft's text for padding."""
    dense = tiny_dense(seed, num_hidden_layers=2, pad_token_id=5)
    model, ids = tiny_split(tmp_path, 40, None, dense, **LOSSLESS), text(1, 30, seed)
    ids[0, 7 + seed] = 5
    expected = generated(dense, {}, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    for prompt in ({"attention_mask": torch.ones_like(ids)}, {"pad_token_id": 7, "eos_token_id": 96}):
        text_of_target = expected if "attention_mask" in prompt else generated(dense, prompt, {"input_ids": ids})
        found = generated(dense, prompt, {"input_ids": ids}, assistant_model=model)
        assert torch.equal(found, text_of_target)


@pytest.mark.parametrize("capacity", [None, 100])
def test_training_mode_with_gradient_checkpointing(tmp_path, capacity):
    dense = tiny_dense(num_hidden_layers=2)
    model = tiny_split(tmp_path, 64, None, dense, **LOSSLESS).train()
    model.gradient_checkpointing_enable()
    expected = generated(dense, {})
    for settings in ({"past_key_values": model.create_kivi_cache(capacity=capacity)}, {}, {"use_cache": False}):
        assert torch.equal(generated(model, settings), expected)
    for cache in (DynamicCache(), model.create_kivi_cache()):
        assert torch.equal(generated(model, {}, past_key_values=cache), expected)
        # The step that computes a gradient would be run again by the backward pass, and fill the cache twice.
        with pytest.raises(ValueError, match="past_key_values: must be None with gradient checkpointing"):
            model(text(), past_key_values=type(cache)())
    model(text(), labels=text()).loss.backward()
    assert model.model.layers[0].self_attn.k_proj.ALinear.weight.grad.abs().sum() > 0


def test_dropout_of_the_attention_is_refused_with_a_packed_cache(tmp_path):
    model = tiny_split(tmp_path, 64, None, tiny_dense(attention_dropout=0.1), **LOSSLESS).train()
    with pytest.raises(ValueError, match=r"attention_dropout=0\.1: must be 0 in training mode"):
        generated(model, {})
    generated(model, {}, past_key_values=DynamicCache())
    generated(model.eval(), {})


# ---- quantized: the simulation's text

SCHEMES = {
    "2 bits, joint": ({}, None, 29, {"k_bits": 2, "v_bits": 2}),
    "4 and 3 bits, per head": (
        {"num_key_value_heads": 8, "head_dim": 8},
        1,
        {"k_proj": [5, 8, 7, 3, 8, 6, 4, 2], "v_proj": 48},
        {"k_bits": 4, "v_bits": 3, "sink_length": 0, "residual_length": 0},
    ),
}


def exact(model):
    """In float64 and with exact angles, so that rounding decides no code and no token."""
    model = model.double()
    model.model.rotary_emb = ExactRotaryEmbedding(model.model.rotary_emb)
    return model


@pytest.fixture(scope="module", params=SCHEMES.values(), ids=SCHEMES)
def quantized(request, tmp_path_factory):
    """A quantized model and its simulation, which takes the same weights."""
    heads, group, ranks, scheme = request.param
    dense = tiny_dense(num_hidden_layers=2, pad_token_id=None, **heads)
    model = exact(tiny_split(tmp_path_factory.mktemp("quantized"), ranks, group, dense, **{**LOSSLESS, **scheme}))
    return model, SimulatedForCausalLM.of(model)


@by_mode
def test_quantized_is_the_simulation(quantized, mode):
    model, simulation = quantized
    found = generated(model, mode, return_dict_in_generate=True)
    assert torch.equal(found.sequences, generated(simulation, mode))
    assert_packed(found.past_key_values, 1)


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}], ids=str)
def test_width_tiers_are_their_simulation(tmp_path, mode):
    dense = tiny_dense(num_hidden_layers=2, pad_token_id=None)
    model = exact(tiered_model(tmp_path, 2, (20, 31), (18, 17), dense))
    found = generated(model, mode, return_dict_in_generate=True)
    assert torch.equal(found.sequences, generated(SimulatedForCausalLM.of(model, tiered_simulations), mode))
    assert_packed(found.past_key_values, 1)


@pytest.mark.parametrize("mode", [{"prompt_lookup_num_tokens": 4}, {"do_sample": True}], ids=str)
def test_quantized_speculation_is_the_simulation(quantized, mode):
    """Drafted tokens are verified several at a time and cropped, which changes what is packed when."""
    model, simulation = quantized
    if "prompt_lookup_num_tokens" not in mode:
        assistant = tiny_dense(1, num_hidden_layers=2, dtype=torch.float64, pad_token_id=None)
        assistant.generation_config.num_assistant_tokens = 20
        assistant.generation_config.assistant_confidence_threshold = 0.0
        mode = {**mode, "assistant_model": assistant}
    cache = model.create_kivi_cache()
    found = generated(model, mode, looking_up(), past_key_values=cache)
    assert torch.equal(found, generated(simulation, mode, looking_up()))
    assert_packed(cache, 1)
    if "assistant_model" in mode:
        drafted = generated(assistant, {}, looking_up(), assistant_model=model)
        assert torch.equal(drafted, generated(assistant, {}, looking_up()))


def test_a_quantized_text_is_not_the_lossless_one(quantized):
    model, _ = quantized
    lossless = model.create_kivi_cache(k_bits=16, v_bits=16)
    assert not torch.equal(generated(model, {}), generated(model, {}, past_key_values=lossless))


# ---- short prompts: blocks of 4 tokens and a window of 4, so that 20 tokens are packed already

SHORT = {"group_size": 4, "residual_length": 4, "sink_length": 2, "pad_token_id": None}


@pytest.fixture(scope="module", params=[16, 2])
def short(request, tmp_path_factory):
    """A split model and what writes the same: at 16 bits its dense model, at 2 bits its simulation."""
    dense = tiny_dense(num_hidden_layers=2, pad_token_id=None)
    bits = {"k_bits": request.param, "v_bits": request.param}
    model = exact(tiny_split(tmp_path_factory.mktemp("short"), 40, None, dense, **{**SHORT, **bits}))
    reference = SimulatedForCausalLM.of(model)
    if request.param == 16:
        reference = model.to_dense()
        reference.model.rotary_emb = model.model.rotary_emb
    return model, reference


def assistant() -> dict:
    drafting = tiny_dense(1, num_hidden_layers=2, dtype=torch.float64, pad_token_id=None)
    drafting.generation_config.num_assistant_tokens = 7
    drafting.generation_config.assistant_confidence_threshold = 0.0
    return {"assistant_model": drafting}


SHORT_MODES = {name: MODES[name] for name in ("greedy", "sampling", "several samples", "beams", "beam sampling")}
SHORT_MODES |= {"chunks of 6": {"prefill_chunk_size": 6}, "chunks of 1": {"prefill_chunk_size": 1}}
SHORT_MODES |= {"look-up": DRAFTLESS["prompt look-up"], "draft": None, "sampled draft": {"do_sample": True}}


@pytest.mark.parametrize("name", SHORT_MODES)
def test_short_prompts(short, name):
    (model, reference), mode = short, SHORT_MODES[name]
    if name in ("look-up", "draft", "sampled draft"):
        prompt = {"input_ids": text(1, 10).repeat(1, 2)}
        mode = {**(mode or {}), **(assistant() if "draft" in name else {})}
    else:
        prompt = padded(length=20)
    cache = model.create_kivi_cache()
    found = generated(model, mode, prompt, past_key_values=cache)
    assert torch.equal(found, generated(reference, mode, prompt))
    assert_packed(cache, 4)
    assert max(row.window for row in cache.layers[0].rows) < 8
    if "draft" in name:  # and the other way round, where nothing but the drafts is the cache's
        drafting = mode.pop("assistant_model")
        assert torch.equal(generated(drafting, {}, prompt, assistant_model=model), generated(drafting, {}, prompt))


def test_short_prompts_with_pads_on_the_right(short):
    """A row is what it is alone; the first new token, made of a pad, is taken as it came."""
    model, _ = short
    ids, mask = text(2, 20), torch.ones((2, 20), dtype=torch.long)
    mask[0, 14:] = 0
    found = generated(model, {}, {"input_ids": ids, "attention_mask": mask}, return_dict_in_generate=True)
    simulated = generated(SimulatedForCausalLM.of(model), {}, {"input_ids": ids, "attention_mask": mask})
    assert torch.equal(found.sequences, simulated)
    assert found.past_key_values.row_tokens() == [33, 39]
    assert_packed(found.past_key_values, 6)


@pytest.mark.parametrize("only_new", [False, True], ids=["whole text", "new ids, full mask"])
def test_short_turns(short, only_new):
    model, reference = short
    ours, theirs = model.create_kivi_cache(), DynamicCache()
    if isinstance(reference, SimulatedForCausalLM):
        theirs = reference.new_cache()
    prompts = [padded(length=20), padded(length=20)]
    for turn in range(3):
        outcomes = []
        for m, cache, prompt in zip(short, (ours, theirs), prompts):
            held, given = cache.get_seq_length(), dict(prompt)
            if only_new:
                given["input_ids"] = prompt["input_ids"][:, held:]
            new = generated(m, {}, given, past_key_values=cache)[:, given["input_ids"].shape[1] :]
            outcomes.append(torch.cat([prompt["input_ids"], new], dim=1))
        assert torch.equal(*outcomes)
        prompts = [extended(p, whole, text(2, 5, seed=turn)) for p, whole in zip(prompts, outcomes)]
    assert_packed(ours, 16)


# ---- one cache, several calls


def extended(prompt: dict, text_so_far: torch.Tensor, new: torch.Tensor) -> dict[str, torch.Tensor]:
    ids = torch.cat([text_so_far, new], dim=1)
    ones = torch.ones((len(ids), ids.shape[1] - prompt["attention_mask"].shape[1]), dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.cat([prompt["attention_mask"], ones], dim=1)}


def conversation(model, cache, only_new: bool, turns: int = 3) -> torch.Tensor:
    """All ids after several turns on one cache; later ones pass the whole text, or what the cache does not hold."""
    prompt = padded()
    for turn in range(turns):
        held, given = cache.get_seq_length(), dict(prompt)
        if only_new:
            given["input_ids"] = prompt["input_ids"][:, held:]
        found = generated(model, {}, given, past_key_values=cache)
        whole = torch.cat([prompt["input_ids"], found[:, given["input_ids"].shape[1] :]], dim=1)
        # The last token that was written is not in the cache yet.
        assert cache.get_seq_length() == whole.shape[1] - 1
        prompt = extended(prompt, whole, text(2, 3 + 7 * turn, seed=turn))
    return whole


@pytest.mark.parametrize("only_new", [False, True], ids=["whole text", "new ids, full mask"])
def test_several_turns(models, only_new):
    dense, model = models
    cache = model.create_kivi_cache()
    assert torch.equal(conversation(model, cache, only_new), conversation(dense, DynamicCache(), only_new))
    assert_packed(cache, 8)


def test_quantized_turns_are_the_simulation(quantized):
    model, simulation = quantized
    cache, simulated = model.create_kivi_cache(), simulation.new_cache()
    assert torch.equal(conversation(model, cache, True), conversation(simulation, simulated, True))
    assert_packed(cache, 8)


# ---- a cache that does not fit the prompt

HOLDS = r"past_key_values: holds 40 slots, rows of \[40\] tokens; the prompt has {0}, its attention_mask {1}: must be "
HOLDS += r".*new tokens with a mask of all {2} slots\. cache\.crop\(-n\) .*cache\.reset\(\)"

#: Prompts that do not go on from a cache of 40 tokens: length of ids and mask.
UNFIT = {"held whole": (40, None), "shorter": (5, None), "new ids without a mask": (12, None), "short mask": (12, 30)}


@pytest.mark.parametrize("settings", [{}, {"prefill_chunk_size": 6}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("capacity", [None, 100])
@pytest.mark.parametrize(("length", "mask"), UNFIT.values(), ids=UNFIT)
@torch.no_grad()
def test_a_prompt_that_does_not_go_on_is_refused(models, length, mask, capacity, settings):
    _, model = models
    cache = model.create_kivi_cache(capacity=capacity)
    model(text(1, 40), past_key_values=cache)
    prompt = {"input_ids": text(1, 40)[:, :length]}
    if mask is not None:
        prompt["attention_mask"] = torch.ones((1, mask), dtype=torch.long)
    with pytest.raises(ValueError, match=HOLDS.format(length, mask or length, 40 + length)):
        generated(model, settings, prompt, past_key_values=cache)
    assert cache.row_tokens() == [40]


def test_the_same_cache_twice_is_refused_and_the_ways_on_work(models):
    dense, model = models
    prompt, cache = {"input_ids": text(1, 41)}, model.create_kivi_cache()
    expected = generated(dense, {}, prompt)
    assert torch.equal(generated(model, {}, prompt, past_key_values=cache), expected)
    with pytest.raises(ValueError, match=r"holds 60 slots, rows of \[60\] tokens; the prompt has 41"):
        generated(model, {}, prompt, past_key_values=cache)
    cache.crop(-20)
    assert torch.equal(generated(model, {}, prompt, past_key_values=cache), expected)
    cache.reset()
    assert torch.equal(generated(model, {}, prompt, past_key_values=cache), expected)
    embeds = dense.get_input_embeddings()(prompt["input_ids"]).detach()
    with pytest.raises(ValueError, match=r"holds 60 slots.* the prompt has 41"):
        generated(model, {}, {"inputs_embeds": embeds}, past_key_values=cache)


@pytest.mark.parametrize("mode", [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}], ids=str)
def test_a_draft_needs_an_empty_cache(models, mode):
    """The library feeds the whole text: a stock cache would go on with a wrong one."""
    _, model = models
    cache = model.create_kivi_cache()
    written = generated(model, {}, looking_up(), past_key_values=cache)
    prompt = {"input_ids": torch.cat([written, text(1, 9)], dim=1)}
    with pytest.raises(ValueError, match=r"past_key_values: holds 59 slots, but assisted decoding.*reset\(\)"):
        generated(model, mode, prompt, past_key_values=cache)


# ---- rows that end early


def chat(model, cache, only_new: bool = False) -> list[torch.Tensor]:
    """New tokens of three turns on one cache, -1 in rows that have ended: a row ends at a token below 12, and the next
    turn's mask calls the pads that it was fed then what they are."""
    prompt, written = padded(), []
    for turn in range(3):
        held, given = cache.get_seq_length(), dict(prompt)
        if only_new:
            given["input_ids"] = prompt["input_ids"][:, held:]
        how = {"eos_token_id": [*range(1, 12)], "pad_token_id": 0, "past_key_values": cache}
        new = generated(model, how, given)[:, given["input_ids"].shape[1] :]
        ends = ((new > 0) & (new < 12)).long()
        ended = ends.cumsum(1) - ends > 0
        written.append(new.masked_fill(ended, -1))
        more = text(2, 17 + 4 * turn, seed=50 + turn)
        ids = torch.cat([prompt["input_ids"], new, more], dim=1)
        mask = torch.cat([prompt["attention_mask"], (~ended).long(), torch.ones_like(more)], dim=1)
        prompt = {"input_ids": ids, "attention_mask": mask}
    return written


@pytest.mark.parametrize("only_new", [False, True], ids=["whole text", "new ids, full mask"])
@pytest.mark.parametrize("capacity", [None, 250])
def test_chats_whose_rows_end_at_different_times(models, only_new, capacity):
    dense, model = models
    cache = model.create_kivi_cache(capacity=capacity)
    found, expected = chat(model, cache, only_new), chat(dense, DynamicCache(), only_new)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    fed = [(new == -1).sum(1).tolist() for new in expected[:-1]]
    assert all(a != b for a, b in fed) and max(map(max, fed)) > 8  # more than a block of pads is taken out
    assert_packed(cache, 4)


def test_quantized_chats_are_the_simulation(quantized):
    """What was packed when a row's pads are taken out stays as it is."""
    model, simulation = quantized
    cache, simulated = model.create_kivi_cache(), simulation.new_cache()
    for found, expected in zip(chat(model, cache), chat(simulation, simulated), strict=True):
        assert torch.equal(found, expected)
    assert cache.row_tokens() == [len(row.tokens) for row in simulated.layers[0].rows]


@torch.no_grad()
def test_tokens_taken_out_by_hand(models):
    dense, model = models
    ids, mask = text(2, 60), torch.ones((2, 80), dtype=torch.long)
    mask[0, 37:60] = 0
    cache, new = model.create_kivi_cache(), text(2, 20, seed=9)
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match=r"past part must mark the \[60, 60\] .*cache\.take_out\(attention_mask\)"):
        model(new, attention_mask=mask, past_key_values=cache)
    cache.take_out(mask)
    assert cache.row_tokens() == [37, 60] and cache.get_seq_length() == 60
    found = model(new, attention_mask=mask, past_key_values=cache).logits
    alone = dense(torch.cat([ids[:1, :37], new[:1]], dim=1)).logits[0, 37:]
    assert torch.allclose(found[0], alone, atol=1e-4)
    cache.crop(-30)
    assert cache.row_tokens() == [37, 50]
    before = cache.layers[1].rows
    for row, slots, value in ((1, slice(20, 30), 0), (0, slice(40, 45), 1)):
        wrong = mask[:, :50].clone()
        wrong[row, slots] = value
        with pytest.raises(
            ValueError, match=r"attention_mask: rows of \[37, 50\] tokens can lose their last ones only"
        ):
            cache.take_out(wrong)
    with pytest.raises(ValueError, match=r"attention_mask: \[2, 49\] must be \[2, 50\] or longer"):
        cache.take_out(mask[:, :49])
    assert cache.layers[1].rows == before


@pytest.mark.parametrize("removed", [3, 17, 30])
def test_crop_inside_the_packed_part_and_on(models, removed):
    dense, model = models
    ours, theirs = model.create_kivi_cache(), DynamicCache()
    outcomes = []
    for m, cache in ((model, ours), (dense, theirs)):
        first = generated(m, {}, past_key_values=cache)
        packed = cache.layers[0].rows[0].packed if cache is ours else None
        cache.crop(-removed)
        if packed and removed > 12:
            assert 0 < cache.layers[0].rows[0].packed < packed
        prompt = extended(padded(), first[:, : cache.get_seq_length()], text(2, 20, seed=3))
        outcomes.append(generated(m, {}, prompt, past_key_values=cache))
    assert torch.equal(*outcomes)
    assert_packed(ours)


@pytest.mark.parametrize("capacity", [None, 100])
@torch.no_grad()
def test_crop_by_a_tensor(models, capacity):
    """What assisted decoding gives it in transformers 5.17."""
    caches, prompt = [models[1].create_kivi_cache(capacity=capacity) for _ in range(2)], padded()
    for cache, removed in zip(caches, (-29, torch.tensor(-29))):
        models[1](**prompt, past_key_values=cache)
        cache.crop(removed)
    assert caches[0].layers[1].rows == caches[1].layers[1].rows
    assert [type(n) for n in caches[1].row_tokens()] == [int, int]
    assert caches[1].row_tokens() == [0, 12]


def test_quantized_crop_is_the_simulation(quantized):
    model, simulation = quantized
    outcomes = []
    for m in (model, simulation):
        first = generated(m, {}, return_dict_in_generate=True)
        cache, written = first.past_key_values, first.sequences
        cache.crop(-22)
        prompt = extended(padded(), written[:, : cache.get_seq_length()], text(2, 30, seed=3))
        outcomes.append(generated(m, {}, prompt, past_key_values=cache))
    assert torch.equal(*outcomes)


@torch.no_grad()
def test_a_prompt_shared_by_several_texts(models):
    dense, model = models
    prefix, ends = text(1, 60), [text(1, length, seed=length) for length in (3, 20)]
    filled = model.create_kivi_cache()
    model(prefix, past_key_values=filled)
    held = filled.nbytes_used
    for end in ends:
        prompt = {"input_ids": torch.cat([prefix, end], dim=1)}
        found = generated(model, {}, prompt, past_key_values=copy.deepcopy(filled))
        assert torch.equal(found, generated(dense, {}, prompt))
    assert filled.nbytes_used == held and filled.row_tokens() == [60]
    # As one batch, whose shorter end has pads in the middle of its row.
    filled.batch_repeat_interleave(2)
    ids = torch.zeros((2, 80), dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, 60:77] = 0
    ids[:, :60], ids[0, 77:], ids[1, 60:] = prefix, ends[0], ends[1]
    found = generated(model, {}, {"input_ids": ids, "attention_mask": mask}, past_key_values=filled)
    alone = [generated(dense, {}, {"input_ids": torch.cat([prefix, end], dim=1)})[0, -20:] for end in ends]
    assert torch.equal(found[:, -20:], torch.stack(alone))
    assert_packed(filled, 7)


# ---- what goes in


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("with_ids", [False, True])
def test_embeddings_as_prompt(models, mode, with_ids):
    dense, model = models
    prompt = padded()
    ids = prompt.pop("input_ids")
    prompt["inputs_embeds"] = dense.get_input_embeddings()(ids).detach() + 0.1  # not the embeddings of any tokens
    prompt |= {"input_ids": ids} if with_ids else {}
    found = generated(model, mode, prompt, return_dict_in_generate=True)
    assert torch.equal(found.sequences, generated(dense, mode, prompt))
    assert found.sequences.shape[1] == 20 + 41 * with_ids
    assert not torch.equal(found.sequences[:, -20:], generated(dense, mode)[:, -20:])
    assert_packed(found.past_key_values)


def test_embeddings_quantized(quantized):
    model, simulation = quantized
    embeds = torch.randn(2, 50, 64, dtype=torch.float64) / 5
    found = generated(model, {}, {"inputs_embeds": embeds})
    assert torch.equal(found, generated(simulation, {}, {"inputs_embeds": embeds}))


def test_no_prompt(models):
    dense, model = models
    settings = {"bos_token_id": 5, "do_sample": False, "max_new_tokens": 40}
    found = model.generate(return_dict_in_generate=True, **settings)
    assert torch.equal(found.sequences, dense.generate(**settings))
    assert_packed(found.past_key_values)


def test_rows_with_pads_on_the_right_go_on_where_their_text_ends(models):
    """The library warns of such a prompt and would go on from position 1; here each row is what it is alone."""
    _, model = models
    ids, mask = text(), torch.ones((2, 41), dtype=torch.long)
    mask[0, 28:] = 0
    found = generated(model, {}, {"input_ids": ids, "attention_mask": mask}, return_dict_in_generate=True)
    assert found.past_key_values.row_tokens() == [28 + 19, 41 + 19]
    # The first new token follows a pad; from then on the row knows its own tokens only.
    alone = torch.cat([ids[:1, :28], found.sequences[:1, 41:42]], dim=1)
    expected = generated(model, {}, {"input_ids": alone}, max_new_tokens=19)
    assert torch.equal(found.sequences[:1, 42:], expected[:, 29:])


def test_positions_of_the_prompt_may_be_given(models):
    _, model = models
    prompt = padded()
    positions = (prompt["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert torch.equal(generated(model, {}, prompt, position_ids=positions), generated(model, {}, prompt))
    with pytest.raises(ValueError, match="position_ids: must count the tokens of each row from 0"):
        generated(model, {}, prompt, position_ids=positions + 1)


def test_without_a_cache_nothing_is_rounded(quantized):
    model, _ = quantized
    dense = model.to_dense()
    dense.model.rotary_emb = model.model.rotary_emb
    assert torch.equal(generated(model, {}, use_cache=False), generated(dense, {}))
    assert not torch.equal(generated(model, {}), generated(dense, {}))


# ---- what comes out


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
def test_scores_attentions_and_hidden_states(models, mode, monkeypatch):
    wanted = ("scores", "logits", "attentions", "hidden_states")
    outputs = []
    for m in models:
        before = m.config._attn_implementation
        m.set_attn_implementation("eager")
        outputs.append(generated(m, mode, return_dict_in_generate=True, **{f"output_{name}": True for name in wanted}))
        m.set_attn_implementation(before)
    expected, found = outputs
    assert torch.equal(found.sequences, expected.sequences)
    assert isinstance(found.past_key_values, KIVILatentCache) and isinstance(expected.past_key_values, DynamicCache)
    for name in ("scores", "logits"):
        for a, b in zip(found[name], expected[name], strict=True):
            assert torch.allclose(a, b, atol=1e-3)
    real = padded()["attention_mask"].bool().repeat_interleave(mode.get("num_beams", 1), 0)
    for name in ("attentions", "hidden_states"):
        assert len(found[name]) == 20
        for step, (a, b) in enumerate(zip(found[name], expected[name], strict=True)):
            for x, y in zip(a, b, strict=True):
                assert x.shape == y.shape
                if step == 0:  # of pads in the prompt nothing is promised
                    x, y = ((t.transpose(1, 2) if t.dim() == 4 else t)[real] for t in (x, y))
                assert torch.allclose(x, y, atol=1e-3)
    if mode:
        assert torch.equal(found.beam_indices, expected.beam_indices)
        assert torch.allclose(found.sequences_scores, expected.sequences_scores, atol=1e-4)
    indices = found.beam_indices if mode else None
    ours, theirs = (m.compute_transition_scores(o.sequences, o.scores, indices) for m, o in zip(models, outputs[::-1]))
    assert torch.allclose(ours, theirs, atol=1e-3)


class EveryThird(LogitsProcessor):
    """Allows a third of the tokens, by the length of the text."""

    def __call__(self, input_ids, scores):
        allowed = torch.arange(scores.shape[1]) % 3 == input_ids.shape[1] % 3
        return scores.masked_fill(~allowed, -torch.inf)


class OnToken(StoppingCriteria):
    """Ends a row at a token; the rows of a batch end at different times."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] < 12


def test_own_processors_and_criteria(models):
    criteria = StoppingCriteriaList([OnToken(), MaxLengthCriteria(80)])
    how = {"logits_processor": LogitsProcessorList([EveryThird()]), "stopping_criteria": criteria, "max_new_tokens": 60}
    ours, theirs = (generated(m, how) for m in models[::-1])
    assert torch.equal(ours, theirs) and ours.shape[1] < 80
    lengths = 41 + torch.arange(ours.shape[1] - 41)
    assert (ours[0, 41:] % 3 == lengths % 3)[:5].all()
    only = {"prefix_allowed_tokens_fn": lambda row, ids: [20 + row, 30 + row]}
    assert set(generated(models[1], only)[1, 41:].tolist()) <= {21, 31}


# ---- text in, text out


@pytest.fixture(scope="module")
def speaking(tmp_path_factory):
    """A dense model of bytes, its lossless split, saved, and their tokenizer, with a chat template."""
    path = tmp_path_factory.mktemp("speaking")
    dense = tiny_dense(vocab_size=257, num_hidden_layers=2, pad_token_id=None)
    model = tiny_split(path, 64, None, dense, **LOSSLESS)
    model.save_pretrained(path / "split")
    save_byte_tokenizer(path / "split")
    tokenizer = AutoTokenizer.from_pretrained(path / "split", padding_side="left", pad_token="<s>")
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
    return dense, model, tokenizer, str(path / "split")


PROMPTS = ["def read_lines(path):\n    ", "class Stack:", "import os, sys\nfor name in os.listdir('.'):"]


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value)

    def end(self):
        self.ended = True


@pytest.mark.parametrize("mode", [{}, {"do_sample": True}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_streams_what_it_returns(models, mode):
    recorder = Recorder()
    found = generated(models[1], mode, looking_up(), streamer=recorder)
    assert recorder.ended and len(recorder.pieces) > 2
    assert torch.equal(torch.cat([piece.flatten() for piece in recorder.pieces]), found[0])


def test_text_streamers(speaking, capsys):
    _, model, tokenizer, _ = speaking
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    text = tokenizer.decode(generated(model, {}, inputs)[0, inputs["input_ids"].shape[1] :])
    generated(model, {}, inputs, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out == text + "\n"
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=generated, args=(model, {}, inputs), kwargs={"streamer": streamer})
    thread.start()
    assert "".join(streamer) == text
    thread.join()


def test_a_string_ends_the_text(speaking):
    dense, model, tokenizer, _ = speaking
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    whole = tokenizer.decode(generated(dense, {}, inputs)[0, length:])
    stop = next(c for c in whole[4:] if c.isascii() and c.isprintable() and c not in whole[:4])
    found, expected = (generated(m, {}, inputs, stop_strings=[stop], tokenizer=tokenizer) for m in (model, dense))
    assert torch.equal(found, expected) and found.shape[1] < length + 20
    assert tokenizer.decode(found[0]).endswith(stop)


@pytest.mark.parametrize("source", ["model", "folder"])
def test_pipeline(speaking, source):
    dense, model, tokenizer, folder = speaking
    how = {"max_new_tokens": 20, "do_sample": False, "return_full_text": False}
    ours = pipeline("text-generation", model=model if source == "model" else folder, tokenizer=tokenizer)
    theirs = pipeline("text-generation", model=dense, tokenizer=tokenizer)
    assert type(ours.model) is type(model)
    for prompts, more in (
        (PROMPTS[0], {}),
        (PROMPTS, {"batch_size": 3}),
        (PROMPTS, {"batch_size": 2, "num_beams": 2}),
        ([{"role": "user", "content": "a stack, please"}], {}),
        ([[{"role": "user", "content": "a stack"}], [{"role": "user", "content": "a queue, then"}]], {"batch_size": 2}),
    ):
        found = ours(prompts, **how, **more)
        assert found == theirs(prompts, **how, **more)
    cache = model.create_kivi_cache()
    ours(PROMPTS[0], past_key_values=cache, max_new_tokens=1)
    found = ours(PROMPTS[0] + PROMPTS[2], past_key_values=cache, **how)
    assert found == theirs(PROMPTS[0] + PROMPTS[2], **how)
    assert_packed(cache)
