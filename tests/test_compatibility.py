"""What was saved earlier is read as it was meant: the same packed bytes, and the same tokens after them.

`tests/data` holds two split models, for each a cache that it has filled and saved, and `expected.json`: prompts, the
SHA-256 of the packed blocks, and the greedy tokens that follow. `python tests/test_compatibility.py` has made them, at
commit b4e634d. A change that needs them made again breaks what users have saved.
"""

import copy
import hashlib
import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from configuration_alrd_llama import ALRDLlamaConfig, Projection
from modeling_alrd_llama import ALRDLlamaForCausalLM
from modules.fit.allocation import static_scales
from modules.kivi_cache import KIVILatentCache
from modules.svd_linear import factor_groups
from tests.helpers import tiny_dense

DATA = Path(__file__).parent / "data"
EXPECTED = DATA / "expected.json"
BACKENDS = ("reference", "cpu")

#: Slots of the prompt that the saved cache does not hold yet, and tokens that follow.
FRESH, FOLLOWING = 4, 24

K0, V0, K1, V1 = (f"model.layers.{i}.self_attn.{side}_proj" for i in (0, 1) for side in "kv")


# ---- how they were made


def dense_model(seed: int) -> LlamaForCausalLM:
    """A Llama so small that two fit in 200 KB; its frequencies, powers of two, are the same on every machine."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "attention_bias": True}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": float(2**16)}, "max_position_embeddings": 256}
    return tiny_dense(seed, **sizes, **heads, **rope, tie_word_embeddings=True)


@torch.no_grad()
def calibrated(seed: int) -> ALRDLlamaForCausalLM:
    """A latent for each head, width tiers in a layer of either side, scales of the keys from a random text."""
    dense = dense_model(seed)
    config = ALRDLlamaConfig.from_llama(
        dense.config,
        truncation_ranks={K0: [5, 6], V0: 9, K1: 12, V1: [7, 4]},
        width_tiers={K0: [[[3, 4], [2, 2]], [[4, 3], [2, 1]]], V1: [[[1, 16], [2, 8], [4, 2]], [[4, 3]]]},
        head_group_size=1,
        k_scheme={"static": True},
        **{"k_hadamard": False, "v_hadamard": False, "group_size": 16, "residual_length": 5, "sink_length": 3},
    )
    text = torch.randint(1, 64, (2, 128), generator=torch.Generator().manual_seed(1))
    hidden, splits = dense(text, output_hidden_states=True).hidden_states, []
    for i, layer in enumerate(dense.model.layers):
        factors = factor_groups(layer.self_attn.k_proj.weight, config.group_ranks(Projection(i, "k")))
        x = layer.input_layernorm(hidden[i]).flatten(0, 1).double()
        latents = torch.cat([x @ f.b.T for f in factors], dim=1).float()
        tiers = config.width_tiers.get(f"model.layers.{i}.self_attn.k_proj", [[[latents.shape[1], 2]]])
        runs = [(n, bits) for group in tiers for n, bits in group]
        parts = latents.split([n for n, _ in runs], dim=1)
        pairs = [static_scales(part, bits) for part, (_, bits) in zip(parts, runs, strict=True)]
        scales = tuple(torch.cat(side) for side in zip(*pairs))
        splits.append({"k_proj": {"factors": factors, "static_scales": scales}, "v_proj": {}})
    return ALRDLlamaForCausalLM.from_dense(dense, config, splits)


def plain(seed: int) -> ALRDLlamaForCausalLM:
    """Joint latents by plain SVD, rotated; one projection stays dense."""
    dense = dense_model(seed)
    config = ALRDLlamaConfig.from_llama(
        dense.config, truncation_ranks={K0: 12, V0: 9, K1: 11}, group_size=16, residual_length=5, v_bits=3
    )
    return ALRDLlamaForCausalLM.from_dense(dense, config)


@torch.no_grad()
def changed(model: ALRDLlamaForCausalLM, seed: int) -> ALRDLlamaForCausalLM:
    """A copy whose weights are off by their rounding to float32 and more, as sums in another order would be."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.mul_(1 + 2e-7 * torch.randn(weight.shape, generator=generator))
    return model


def is_stable(model: ALRDLlamaForCausalLM, prompt: torch.Tensor, path: Path) -> bool:
    """Whether another machine would make the same bytes and tokens."""
    models = [model, *(changed(model, seed) for seed in range(3))]
    outcomes = [outcome(one, prompt, backend, path) for one in models for backend in BACKENDS]
    return outcomes.count(outcomes[0]) == len(outcomes)


def outcome(model: ALRDLlamaForCausalLM, prompt: torch.Tensor, backend: str, path: Path) -> dict:
    """What `expected.json` says of a model, whose cache is saved as `path`."""
    filled_cache(model, prompt, backend).save(path)
    return {
        "packed": packed_sha256(path),
        "after the saved cache": following(model, prompt, KIVILatentCache.load(path, backend=backend)),
        "after the prompt": following(model, prompt, model.create_kivi_cache(backend=backend)),
    }


def make() -> None:
    prompt = torch.randint(1, 64, (2, 56), generator=torch.Generator().manual_seed(2))
    prompt[1, :13] = 0
    expected = {"prompt": prompt.tolist()}
    DATA.mkdir(exist_ok=True)
    for split in (calibrated, plain):
        name = split.__name__
        model = next(model for model in map(split, itertools.count()) if is_stable(model, prompt, cache_file(name)))
        model.save_pretrained(DATA / name)
        expected[name] = outcome(model, prompt, "reference", cache_file(name))
    EXPECTED.write_text(json.dumps(expected) + "\n")


# ---- how they are read


def cache_file(name: str) -> Path:
    return DATA / f"{name}_cache.safetensors"


def filled_cache(model: ALRDLlamaForCausalLM, prompt: torch.Tensor, backend: str) -> KIVILatentCache:
    """A cache that holds the prompt but for its last slots; zeros are pads."""
    cache, start = model.create_kivi_cache(backend=backend), prompt[:, :-FRESH]
    with torch.no_grad():
        model(start, attention_mask=start != 0, past_key_values=cache)
    return cache


def packed_sha256(path: Path) -> str:
    """Of names, types, shapes and bytes of the packed blocks in a cache file; what is in full precision is left out."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        if name.split(".")[1] in ("keys", "values") and tensor.dtype != torch.float32:
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def following(model: ALRDLlamaForCausalLM, prompt: torch.Tensor, cache: KIVILatentCache) -> list[list[int]]:
    """The greedy tokens after a prompt, some of which the cache may hold; no pair comes twice, so a row says more."""
    how = {"attention_mask": (prompt != 0).long(), "past_key_values": cache, "do_sample": False}
    tokens = model.generate(prompt, **how, no_repeat_ngram_size=2, max_new_tokens=FOLLOWING)
    return tokens[:, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["calibrated", "plain"])
class TestSavedEarlier:
    @pytest.fixture
    def saved(self, name):
        model = ALRDLlamaForCausalLM.from_pretrained(DATA / name, dtype=torch.float32)
        expected = json.loads(EXPECTED.read_text())
        return model, torch.tensor(expected["prompt"]), expected[name]

    def test_a_cache_goes_on(self, name, backend, saved):
        model, prompt, expected = saved
        cache = KIVILatentCache.load(cache_file(name), backend=backend, model=model)
        assert cache.row_tokens() == [52, 39] and all(layer.pool.used for layer in cache.layers)
        assert following(model, prompt, cache) == expected["after the saved cache"]

    def test_a_checkpoint_fills_a_cache_with_the_same_bytes(self, name, backend, saved, tmp_path):
        model, prompt, expected = saved
        filled_cache(model, prompt, backend).save(tmp_path / "cache")
        assert packed_sha256(tmp_path / "cache") == packed_sha256(cache_file(name)) == expected["packed"]

    def test_a_checkpoint_goes_on(self, backend, saved):
        model, prompt, expected = saved
        assert following(model, prompt, model.create_kivi_cache(backend=backend)) == expected["after the prompt"]


def test_the_files_stay_small():
    assert sum(file.stat().st_size for file in DATA.rglob("*") if file.is_file()) < 200_000


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    make()
