"""A cache goes on in and out of `torch.inference_mode()`, as `DynamicCache` does: it keeps ordinary tensors."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from modules import hadamard_utils
from modules.kivi_cache import KIVILatentCache, create_kivi_cache
from tests.helpers import tiny_dense, tiny_split

SMALL = {"group_size": 16, "residual_length": 5}
IDS = torch.arange(1, 61).repeat(2, 1)
#: Sinks not full, a window, blocks in a pool that the steps let grow.
LENGTHS = (1, 3, 20, 24, 60)

CACHES = {
    "split": {},
    "mse": {"k_scheme": {"range_method": "mse"}, "v_scheme": {"range_method": "mse"}},
    "16 bits": {"k_bits": 16, "v_bits": 16},
    "1.5 and ternary": {"k_bits": 1.5, "v_bits": 1.58},
    "protected": {"k_scheme": {"rotation": True}, "v_scheme": {"protected": 0.1}, "token_score": "attention"},
    "fixed": {"capacity": 200},
    "drop-in": {},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {False: tiny_split(tmp_path_factory.mktemp("split"), 32), True: tiny_dense()}


def made(models, name: str):
    model = models[name == "drop-in"]
    return model, (create_kivi_cache if name == "drop-in" else model.create_kivi_cache)(**SMALL | CACHES[name])


def kept(cache: KIVILatentCache) -> list[torch.Tensor]:
    tensors = [t for layer in cache.layers for t in layer.tensors()]
    return tensors + [t for layer in cache.layers for t in layer.exact.tensors()]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", CACHES)
def test_a_prompt_in_inference_mode_goes_on_outside(name, length, models):
    texts = []
    for prompt_mode, step_mode in itertools.product((torch.inference_mode, torch.no_grad), repeat=2):
        model, cache = made(models, name)
        with prompt_mode():
            model(IDS[:, :length], past_key_values=cache)
        assert not any(tensor.is_inference() for tensor in kept(cache))
        text = [IDS[:, :1]]
        with step_mode():
            for _ in range(40):
                text.append(model(text[-1], past_key_values=cache).logits[:, -1:].argmax(-1))
        texts.append(torch.cat(text, dim=1))
    assert all(torch.equal(text, texts[0]) for text in texts)


def test_steps_with_gradients_follow_a_prompt_in_inference_mode(models):
    """A query that asks for its gradient meets what was cached there."""
    model, cache = made(models, "16 bits")
    with torch.inference_mode():
        model(IDS, past_key_values=cache)
    assert torch.isfinite(model(IDS[:, :20], past_key_values=cache).logits).all()


EDITS = {
    "crop": lambda cache: cache.crop(-30),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "select and trim": lambda cache: cache.batch_select_indices(torch.tensor([0])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "fork": lambda cache: cache.fork(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "reset": lambda cache: cache.reset(),
}


@pytest.mark.parametrize("name", ["split", "fixed", "drop-in"])
@pytest.mark.parametrize("edit", EDITS)
def test_edits_in_inference_mode_are_followed_by_steps_outside(edit, name, models, tmp_path):
    if name == "fixed" and edit in ("select and trim", "repeat", "fork"):
        edit = "crop"  # which such a cache has
    texts = []
    for mode in (torch.inference_mode, torch.no_grad):
        model, cache = made(models, name)
        with torch.no_grad():
            model(IDS, past_key_values=cache)
        with mode():
            cache = EDITS[edit](cache) or cache
        assert not any(tensor.is_inference() for tensor in kept(cache))
        rows = len(cache.row_tokens()) or 2
        with torch.no_grad():
            texts.append([model(IDS[:1, :9].expand(rows, 9), past_key_values=cache).logits for _ in range(5)])
    assert all(torch.equal(a, b) for a, b in zip(*texts))


def test_a_prefix_loaded_in_inference_mode_goes_on_outside(models, tmp_path):
    model, cache = made(models, "split")
    with torch.inference_mode():
        model(IDS, past_key_values=cache)
        cache.save(tmp_path / "prefix.safetensors")
        loaded = KIVILatentCache.load(tmp_path / "prefix.safetensors", model=model)
    assert not any(tensor.is_inference() for tensor in kept(loaded))
    with torch.no_grad():
        for _ in range(3):
            step = [model(IDS[:, :20], past_key_values=c).logits for c in (cache, loaded)]
            assert torch.equal(*step)


def test_a_model_that_was_made_in_inference_mode(tmp_path):
    with torch.inference_mode():
        model = tiny_split(tmp_path, 32)
        cache = model.create_kivi_cache(**SMALL)
        model(IDS, past_key_values=cache)
        cache.save(tmp_path / "prefix.safetensors")
    with torch.no_grad():
        for again in (cache, KIVILatentCache.load(tmp_path / "prefix.safetensors", model=model)):
            assert torch.isfinite(model(IDS[:, :20], past_key_values=again).logits).all()


def test_what_is_remembered_from_inference_mode_takes_part_in_gradients():
    """Signs of a rotation: made once for all calls."""
    hadamard_utils._signs.cache_clear()
    with torch.inference_mode():
        hadamard_utils.rotate(torch.ones(24))
    x = nn.Parameter(torch.ones(24))
    hadamard_utils.rotate(x).sum().backward()
    assert torch.isfinite(x.grad).all()
