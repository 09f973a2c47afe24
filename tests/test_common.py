"""What transformers' own tests ask of every causal language model, the packed cache made by default and a stock one.

Loading, training and generation have more tests of their own in `test_loading.py`, `test_modeling.py` and
`test_generation.py`.
"""

import copy
import pickle

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationConfig, StaticCache, pipeline

from configuration_alrd_llama import ALRDLlamaConfig
from modeling_alrd_llama import ALRDLlamaForCausalLM, ALRDLlamaModel
from modules.kivi_cache import KIVILatentCache
from tests.helpers import TINY_LLAMA, all_ranks, save_byte_tokenizer, tiny_dense, tiny_split

SETTINGS = {"k_bits": 16, "v_bits": 16, "group_size": 8, "residual_length": 5, "sink_length": 3}


@pytest.fixture(params=[True, False], ids=["packed by default", "stock by default"])
def use_kivi(request) -> bool:
    return request.param


@pytest.fixture
def model(tmp_path, use_kivi) -> ALRDLlamaForCausalLM:
    """A split model of two layers, half rank, nothing rounded."""
    dense = tiny_dense(num_hidden_layers=2, pad_token_id=None)
    return tiny_split(tmp_path, 32, dense=dense, use_kivi=use_kivi, **SETTINGS)


def text(batch: int = 2, length: int = 50) -> torch.Tensor:
    return torch.randint(1, 97, (batch, length))


def padded(batch: int = 2, length: int = 50) -> dict[str, torch.Tensor]:
    ids, mask = text(batch, length), torch.ones((batch, length), dtype=torch.long)
    ids[0, :13], mask[0, :13] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits_of(model, *args, **kwargs) -> torch.Tensor:
    return model(*args, **kwargs).logits


def assert_cache_is(cache, use_kivi: bool) -> None:
    assert type(cache) is (KIVILatentCache if use_kivi else DynamicCache)


# ---- the class and its configuration


def test_what_the_library_reads_off_the_class(model, use_kivi):
    assert model.can_generate() and not model.model.can_generate()
    assert model.main_input_name == "input_ids" and model.base_model_prefix == "model"
    assert model.base_model is model.model and model.get_decoder() is model.model
    assert model.generation_config.eos_token_id is None
    assert model.supports_gradient_checkpointing and model._supports_sdpa and model._supports_flash_attn
    embedding, head = torch.nn.Embedding(97, 64), torch.nn.Linear(64, 97)
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(head)
    assert model.get_input_embeddings() is model.model.embed_tokens is embedding
    assert model.get_output_embeddings() is model.lm_head is head


def test_the_configuration_survives_every_copy(model, tmp_path):
    config = model.config
    config.save_pretrained(tmp_path / "config")
    torch.save(config, tmp_path / "config.pt")
    copies = [
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        torch.load(tmp_path / "config.pt", weights_only=False),
        ALRDLlamaConfig(**config.to_dict()),
        ALRDLlamaConfig.from_pretrained(tmp_path / "config"),
        AutoConfig.from_pretrained(tmp_path / "config"),
    ]
    for other in copies:
        assert type(other) is ALRDLlamaConfig
        assert other.to_diff_dict() | {"_name_or_path": ""} == config.to_diff_dict() | {"_name_or_path": ""}
    assert copies[0].truncation_ranks is not config.truncation_ranks
    assert set(ALRDLlamaConfig().to_diff_dict()) >= {"model_type"}


def test_a_copy_of_the_model_is_a_model(model):
    ids = text()
    other = copy.deepcopy(model)
    assert torch.equal(logits_of(other, ids), logits_of(model, ids))
    other.lm_head.weight.data.zero_()
    assert logits_of(model, ids).abs().max() > 0
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(other, ids), logits_of(model, ids))


def test_a_new_model_has_finite_weights_of_the_configured_spread(use_kivi):
    config = ALRDLlamaConfig(**TINY_LLAMA, truncation_ranks=all_ranks(3, 32), use_kivi=use_kivi)
    for made in (ALRDLlamaForCausalLM(config), AutoModelForCausalLM.from_config(config)):
        for name, parameter in made.named_parameters():
            if parameter.dim() == 2:
                assert 0.1 < parameter.std() < 0.3, name
        assert torch.isfinite(made.eval()(text()).logits).all()


# ---- saving and loading


def test_saved_and_loaded(model, use_kivi, tmp_path):
    model.generation_config = GenerationConfig(max_new_tokens=7, do_sample=False, eos_token_id=96)
    prompt = padded()
    expected = logits_of(model, **prompt)
    model.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    assert len(list((tmp_path / "saved").glob("model-*.safetensors"))) > 1
    for load in (ALRDLlamaForCausalLM, AutoModelForCausalLM):
        loaded, info = load.from_pretrained(tmp_path / "saved", output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert torch.equal(logits_of(loaded, **prompt), expected)
        assert loaded.generation_config.max_new_tokens == 7
        assert torch.equal(loaded.generate(**prompt), model.generate(**prompt))
        assert not loaded.training
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {
        torch.bfloat16
    } and half.model.rotary_emb.inv_freq.dtype == torch.float32
    half.save_pretrained(tmp_path / "half")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16
    base = ALRDLlamaModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(base(**prompt).last_hidden_state, model.model(**prompt).last_hidden_state)


@pytest.mark.parametrize("tied", [False, True])
def test_resized_embeddings(tmp_path, use_kivi, tied):
    dense = tiny_dense(num_hidden_layers=1, pad_token_id=None, tie_word_embeddings=tied)
    model = tiny_split(tmp_path, 32, dense=dense, use_kivi=use_kivi, **SETTINGS)
    ids = torch.randint(1, 80, (2, 30))
    before = logits_of(model, ids)
    for size in (110, 83):
        model.resize_token_embeddings(size)
        assert model.config.vocab_size == model.vocab_size == size
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        assert embedding.shape == head.shape == (size, 64) and (embedding is head) == tied
        found = logits_of(model, ids)
        assert found.shape[-1] == size and torch.equal(found[..., :80], before[..., :80])
    model.save_pretrained(tmp_path / "resized")
    loaded = ALRDLlamaForCausalLM.from_pretrained(tmp_path / "resized")
    assert torch.equal(logits_of(loaded, ids), found)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert model.generate(ids, max_new_tokens=3).shape == (2, 33)
    padded_size = model.resize_token_embeddings(pad_to_multiple_of=64)
    assert padded_size.weight.shape[0] == 128


def test_tied_embeddings_are_one_tensor(tmp_path):
    """Among the parameters, after a step of training, and on the way to the dense model."""
    dense = tiny_dense(num_hidden_layers=1, tie_word_embeddings=True)
    model = tiny_split(tmp_path, 32, dense=dense)
    assert "lm_head.weight" not in dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    ids = text()
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert not torch.equal(model.lm_head.weight, dense.lm_head.weight)
    exported = model.eval().to_dense()
    assert exported.lm_head.weight is exported.model.embed_tokens.weight


# ---- forward


@torch.no_grad()
def test_tuples_hold_what_the_output_has(model, use_kivi):
    ids = text()
    named = model(ids, use_cache=True, output_hidden_states=True)
    plain = model(ids, use_cache=True, output_hidden_states=True, return_dict=False)
    assert torch.equal(plain[0], named.logits)
    assert_cache_is(plain[1], use_kivi)
    assert [x.shape for x in plain[2]] == [x.shape for x in named.hidden_states]
    assert isinstance(model.model(ids, return_dict=False), tuple)


@torch.no_grad()
def test_attention_implementations_agree(model, use_kivi):
    prompt = padded()
    real = prompt["attention_mask"].bool()
    found = {}
    for name in ("sdpa", "eager", "sdpa"):
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == model.model.config._attn_implementation == name
        found[name] = model(**prompt).logits[real]
    assert (found["sdpa"] - found["eager"]).abs().max() < 1e-4
    model.set_attn_implementation("eager")
    outputs = model(**prompt, output_attentions=True, output_hidden_states=True)
    assert [tuple(a.shape) for a in outputs.attentions] == [(2, 8, 50, 50)] * 2
    assert [tuple(h.shape) for h in outputs.hidden_states] == [(2, 50, 64)] * 3
    for weights in outputs.attentions:
        assert torch.allclose(weights[1].sum(-1), torch.ones(8, 50), atol=1e-5)
        assert weights[1].triu(1).abs().max() == 0 and weights[0, :, 13:, :13].abs().max() == 0
    model.config.output_attentions = True
    assert len(model(**prompt).attentions) == 2


def test_flash_attention_that_is_not_installed_is_refused(model):
    with pytest.raises((ImportError, ValueError), match=r"(?i)flash"):
        model.set_attn_implementation("flash_attention_2")
    assert model.config._attn_implementation == "sdpa"
    assert logits_of(model, text()).shape == (2, 50, 97)


def test_embeddings_and_kept_logits(model):
    prompt = padded()
    expected = logits_of(model, **prompt)
    embeds = model.get_input_embeddings()(prompt["input_ids"])
    assert torch.equal(logits_of(model, inputs_embeds=embeds, attention_mask=prompt["attention_mask"]), expected)
    for kept in (1, 7, torch.tensor([3, 20, 49])):
        rows = expected[:, -kept:] if isinstance(kept, int) else expected[:, kept]
        assert torch.allclose(logits_of(model, **prompt, logits_to_keep=kept), rows, atol=1e-5)
    for wrong in ({}, {"input_ids": prompt["input_ids"], "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            model(**wrong)


def test_rows_and_pads_do_not_meet(model):
    """A row is what it is alone, and what it is behind pads; a text is what it is beside others."""
    ids = text(3)
    together = logits_of(model, ids)
    behind = torch.cat([torch.zeros((3, 17), dtype=torch.long), ids], dim=1)
    mask = torch.ones_like(behind)
    mask[:, :17] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    shifted = logits_of(model, behind, attention_mask=mask, position_ids=positions)
    assert (shifted[:, 17:] - together).abs().max() < 1e-4
    for row in range(3):
        assert (logits_of(model, ids[row : row + 1])[0] - together[row]).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("make", [lambda m: None, lambda m: DynamicCache(), lambda m: StaticCache(m.config, 80)])
def test_text_in_pieces(model, use_kivi, make):
    """With the cache that is made by default, with stock caches, and with any number of tokens at once."""
    prompt, cache, pieces = padded(), make(model), []
    positions = (prompt["attention_mask"].cumsum(1) - 1).clamp(min=0)
    for start, stop in ((0, 30), (30, 31), (31, 47), (47, 50)):
        outputs = model(
            prompt["input_ids"][:, start:stop],
            attention_mask=prompt["attention_mask"][:, :stop],
            position_ids=positions[:, start:stop],
            past_key_values=cache,
            use_cache=True,
        )
        cache = outputs.past_key_values
        pieces.append(outputs.logits)
    if make(model) is None:
        assert_cache_is(cache, use_kivi)
        assert cache.get_seq_length() == 50 and len(cache.layers) == 2
        assert model(**prompt, use_cache=False).past_key_values is None
    whole = logits_of(model, **prompt, position_ids=positions, use_cache=False)
    assert (torch.cat(pieces, dim=1) - whole)[prompt["attention_mask"].bool()].abs().max() < 1e-4


# ---- training


def test_loss(model):
    ids = text()
    labels = ids.clone()
    labels[0, :20] = -100
    outputs = model(ids, labels=labels)
    scores, wanted = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    assert torch.allclose(outputs.loss, torch.nn.functional.cross_entropy(scores, wanted), atol=1e-5)
    count = (labels[:, 1:] != -100).sum()
    assert torch.allclose(model(ids, labels=labels, num_items_in_batch=2 * count).loss, outputs.loss / 2, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(model, reentrant):
    ids = text()
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            assert model.is_gradient_checkpointing
        model.zero_grad()
        model(ids, labels=ids, use_cache=True).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0 and torch.allclose(gradient, gradients[1][name], atol=1e-6), name
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_a_text_can_be_learned(model):
    ids = text(1, 20)
    optimizer = torch.optim.Adam(model.train().parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    model.eval()
    assert torch.equal(model.generate(ids[:, :5], max_new_tokens=15, do_sample=False), ids)


# ---- generation with the cache that is made by default


def test_generation_returns_its_cache_and_goes_on(model, use_kivi):
    prompt = padded()
    settings = {"do_sample": False, "return_dict_in_generate": True}
    whole = model.generate(**prompt, max_new_tokens=20, **settings)
    assert_cache_is(whole.past_key_values, use_kivi)
    assert whole.past_key_values.get_seq_length() == 69
    first = model.generate(**prompt, max_new_tokens=8, **settings)
    mask = torch.cat([prompt["attention_mask"], torch.ones((2, 8), dtype=torch.long)], dim=1)
    rest = model.generate(
        first.sequences, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=12, **settings
    )
    assert torch.equal(rest.sequences, whole.sequences)
    for stock in (DynamicCache(), StaticCache(model.config, 80)):
        again = model.generate(**prompt, max_new_tokens=20, past_key_values=stock, **settings)
        assert torch.equal(again.sequences, whole.sequences)
    for name in ("static", "dynamic"):
        again = model.generate(**prompt, max_new_tokens=20, cache_implementation=name, **settings)
        assert torch.equal(again.sequences, whole.sequences)
        assert not isinstance(again.past_key_values, KIVILatentCache)


def test_features_by_a_pipeline(model, tmp_path):
    save_byte_tokenizer(tmp_path / "tokenizer")
    model.resize_token_embeddings(257)
    features = pipeline("feature-extraction", model=model.model, tokenizer=str(tmp_path / "tokenizer"))("abc")
    assert torch.tensor(features).shape == (1, 3, 64)
