"""Save and load act on packed and residual parts, and refuse what they did not write; forks share blocks."""

import copy
import gc
import hashlib
import json
import os
import pickle
import threading
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from modules.cache.file import CHECKSUM, KEY
from modules.kivi_cache import CacheScheme, KIVILatentCache, create_kivi_cache
from tests.helpers import tiny_dense, tiny_split

SMALL = {"group_size": 16, "residual_length": 5}


def filled() -> KIVILatentCache:
    """Two layers, rows of different blocks, a block that is cut, shared blocks and pads."""
    cache = create_kivi_cache(k_bits=3, v_bits=6, **SMALL)
    for i, (k, v) in enumerate([(8, 6), (5, 9)]):
        real = torch.ones(3, 90, dtype=torch.bool)
        real[1, :40] = False
        cache.layer(i).append(torch.randn(3, 90, k), torch.randn(3, 90, v), real)
    cache.crop(-23)
    cache.reorder_cache(torch.tensor([2, 2, 1]))
    return cache


def feed(cache: KIVILatentCache, length: int, seed: int) -> None:
    """Feed both layers of a cache like `filled` with the same tokens for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for i, (k, v) in enumerate([(8, 6), (5, 9)]):
        keys, values = (torch.randn(3, length, c, generator=generator) for c in (k, v))
        cache.layer(i).append(keys, values)


def same_tiles(a: KIVILatentCache, b: KIVILatentCache) -> bool:
    pairs = [(x, y) for one, two in zip(a.layers, b.layers) for x, y in zip(one.tiles(), two.tiles(), strict=True)]
    fields = ("keys", "values", "start", "count")
    return all(torch.equal(getattr(x, f), getattr(y, f)) for x, y in pairs for f in fields)


# ---- files


def test_a_loaded_cache_goes_on_like_the_saved_one(tmp_path):
    cache = filled()
    cache.save(tmp_path / "prefix.safetensors")
    loaded = KIVILatentCache.load(tmp_path / "prefix.safetensors")
    assert loaded.scheme == cache.scheme and loaded.get_seq_length() == cache.get_seq_length()
    assert same_tiles(cache, loaded) and loaded.nbytes_used == cache.nbytes_used
    assert [row.pads for row in loaded.layers[0].rows] == [row.pads for row in cache.layers[0].rows]
    for c in (cache, loaded):
        feed(c, 40, seed=1)
    loaded.crop(-50)
    cache.crop(-50)
    assert same_tiles(cache, loaded)


def test_the_file_is_as_small_as_the_cache(tmp_path):
    cache = create_kivi_cache()
    cache.update(torch.randn(1, 1, 4096, 64).half(), torch.randn(1, 1, 4096, 64).half(), 0)
    cache.save(tmp_path / "prefix.safetensors")
    assert (tmp_path / "prefix.safetensors").stat().st_size < 1.1 * cache.nbytes_used


def test_an_empty_cache(tmp_path):
    create_kivi_cache(k_bits=4).save(tmp_path / "empty.safetensors")
    assert KIVILatentCache.load(tmp_path / "empty.safetensors").scheme.k_bits == 4


def test_a_cache_that_was_cropped_to_nothing(tmp_path):
    cache = filled()
    cache.crop(-67)
    cache.save(tmp_path / "cropped.safetensors")
    loaded = KIVILatentCache.load(tmp_path / "cropped.safetensors")
    for c in (cache, loaded):
        feed(c, 50, seed=1)
    assert same_tiles(cache, loaded) and loaded.row_tokens() == [50, 50, 50]


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    cache = filled()
    cache.save(tmp_path / "prefix.safetensors")
    before = (tmp_path / "prefix.safetensors").read_bytes()
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("interrupted")))
    with pytest.raises(OSError, match="interrupted"):
        cache.save(tmp_path / "prefix.safetensors")
    assert (tmp_path / "prefix.safetensors").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["prefix.safetensors"]


def header_of(path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[KEY])


def rewrite(path, change_header=None, change_tensors=None, checksum: bool = True) -> None:
    """Write a saved cache again with another header or other tensors, the header's checksum made anew or not."""
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    header = json.loads(metadata[KEY])
    if change_header:
        change_header(header)
    if change_tensors:
        change_tensors(tensors)
    text = json.dumps(header)
    checksum = hashlib.sha256(text.encode()).hexdigest() if checksum else metadata[CHECKSUM]
    save_file(tensors, path, {KEY: text, CHECKSUM: checksum})


def set_first(row_field, value):
    """A change of a row's field; of a list the last element."""

    def change(header):
        row = header["layers"][1]["rows"][0]
        row[row_field] = [*row[row_field][:-1], value] if isinstance(row[row_field], list) else value

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda path: os.truncate(path, os.path.getsize(path) - 100), "not a whole safetensors file"),
        (lambda path: os.truncate(path, 5), "not a whole safetensors file"),
        (lambda path: save_file({"x": torch.zeros(1)}, path), "not a saved cache"),
        (lambda path: rewrite(path, lambda h: h.update(version=2)), "version 2 must be 4"),
        (
            lambda path: rewrite(path, lambda h: h["scheme"].update(sink_length=3), checksum=False),
            "altered; the header",
        ),
        (lambda path: rewrite(path, None, lambda t: t["1.window_keys"][0, 0].neg_()), "altered; .* 1.window_keys"),
        (lambda path: rewrite(path, None, lambda t: t.pop("0.keys.scale")), "altered; its tensors"),
        (lambda path: rewrite(path, lambda h: h["scheme"].update(bits=3)), "header is not that of a cache"),
        (lambda path: rewrite(path, lambda h: h["scheme"].update(k_bits=2)), "layer 0: keys.packed: .* must be"),
        (lambda path: rewrite(path, set_first("blocks", 99)), "layer 1: row: blocks=.* from 0 to"),
        (lambda path: rewrite(path, set_first("counts", 17)), "layer 1: row: counts=.* from 1 to 16"),
        (lambda path: rewrite(path, set_first("sinks", -1)), "layer 1: row: sinks=.* from 0 to 4"),
        (lambda path: rewrite(path, set_first("window", 1)), "its 67 slots"),
        (lambda path: rewrite(path, lambda h: h["layers"][0].update(widths=[[9], [6]])), "layer 0: sink_keys"),
        (lambda path: rewrite(path, lambda h: h["layers"].pop()), "header is not that of a cache"),
    ],
)
def test_what_was_not_saved_so_is_refused(tmp_path, change, message):
    path = tmp_path / "prefix.safetensors"
    filled().save(path)
    change(path)
    with pytest.raises(ValueError, match=message) as error:
        KIVILatentCache.load(path)
    assert str(error.value).startswith(str(path))


def test_another_scheme_is_refused(tmp_path):
    path = tmp_path / "prefix.safetensors"
    cache = filled()
    cache.save(path)
    assert same_tiles(KIVILatentCache.load(path, scheme=cache.scheme), cache)
    with pytest.raises(ValueError, match="another scheme: residual_length is 5, must be 7; v_bits is 6, must be 4"):
        KIVILatentCache.load(path, scheme=replace(cache.scheme, v_bits=4, residual_length=7))


@torch.no_grad()
def test_another_model_is_refused_when_loading_or_at_the_first_step(tmp_path):
    path, ids = tmp_path / "prefix.safetensors", torch.randint(1, 97, (1, 150))
    model = tiny_split(tmp_path, 32)
    cache = model.create_kivi_cache(**SMALL)
    expected = model(ids, past_key_values=cache).logits
    cache.save(path)
    others = {
        "weights": tiny_split(tmp_path, 32, dense=tiny_dense(seed=1)),
        "truncation_ranks": tiny_split(tmp_path, 24),
        "dtype": tiny_split(tmp_path, 32, dense=tiny_dense(dtype=torch.bfloat16)),
        "num_key_value_heads is 4, must be 8": tiny_split(tmp_path, 32, dense=tiny_dense(num_key_value_heads=8)),
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=f"{path}: of another model: .*{message}"):
            KIVILatentCache.load(path, model=other)
        with pytest.raises(ValueError, match="filled by another model"):
            other(ids[:, :1], past_key_values=KIVILatentCache.load(path))
        with pytest.raises(ValueError, match="filled by another model"):
            other(ids[:, :1], past_key_values=cache.fork())
    model.model.layers[1].mlp.up_proj.weight.mul_(1.01)  # as a fine-tuning does, noticed by the version
    with pytest.raises(ValueError, match="weights"):
        KIVILatentCache.load(path, model=model)
    again = tiny_split(tmp_path, 32)
    step = again(ids[:, :1], past_key_values=KIVILatentCache.load(path, model=again)).logits
    assert torch.equal(again(ids[:, :1], past_key_values=KIVILatentCache.load(path)).logits, step)
    assert torch.equal(again(ids, past_key_values=again.create_kivi_cache(**SMALL)).logits, expected)


def test_copies_and_files_of_copies_know_the_model(tmp_path):
    model = tiny_split(tmp_path, 32)
    cache = model.create_kivi_cache(**SMALL)
    model(torch.randint(1, 97, (1, 50)), past_key_values=cache)
    known = cache.fingerprint()
    assert known["hidden_size"] == 64 and len(known["weights"]) == 64
    for copied in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache.fork()):
        assert copied.fingerprint() == known
        copied.save(tmp_path / "copy.safetensors")
        assert header_of(tmp_path / "copy.safetensors")["model"] == known
    by_hand = create_kivi_cache()
    by_hand.save(tmp_path / "other.safetensors")
    assert header_of(tmp_path / "other.safetensors")["model"] is None
    dense = tiny_dense()
    by_hand.save(tmp_path / "other.safetensors", model=dense)
    assert KIVILatentCache.load(tmp_path / "other.safetensors", model=dense).fingerprint()["model_type"] == "llama"


@torch.no_grad()
def test_a_stored_prefix_goes_on_with_the_same_text(tmp_path):
    model = tiny_split(tmp_path, 32)
    ids = torch.randint(1, 97, (1, 200))
    cache = model.create_kivi_cache(**SMALL)
    model(ids, past_key_values=cache)
    cache.save(tmp_path / "prefix.safetensors")
    prompt = torch.cat([ids, torch.randint(1, 97, (1, 9))], dim=1)
    settings = {"max_new_tokens": 30, "do_sample": False}
    loaded = KIVILatentCache.load(tmp_path / "prefix.safetensors", model=model)
    expected = model.generate(prompt, past_key_values=cache, **settings)
    assert torch.equal(model.generate(prompt, past_key_values=loaded, **settings), expected)
    assert loaded.get_seq_length() == 200 + 9 + 29


# ---- forks


def test_forks_share_blocks_and_do_not_meet():
    cache = filled()
    alone = copy.deepcopy(cache)
    forks = [cache.fork() for _ in range(4)]
    once = KIVILatentCache.nbytes_together(cache)
    pools = sum(layer.pool.nbytes for layer in cache.layers)
    assert KIVILatentCache.nbytes_together(cache, *forks) <= 5 * once - 4 * pools
    assert all(a.pool is b.pool for fork in forks for a, b in zip(fork.layers, cache.layers))
    feed(forks[0], 61, seed=1)
    forks[1].crop(-40)
    feed(forks[1], 30, seed=2)
    forks[2].reorder_cache(torch.tensor([0, 0, 2]))
    forks[3].reset()
    assert same_tiles(cache, alone)
    expected = copy.deepcopy(alone)
    feed(expected, 61, seed=1)
    assert same_tiles(forks[0], expected)
    expected = copy.deepcopy(alone)
    expected.crop(-40)
    feed(expected, 30, seed=2)
    assert same_tiles(forks[1], expected)
    feed(cache, 61, seed=1)
    assert same_tiles(cache, forks[0])


def test_forks_decode_side_by_side():
    """Token by token, in turns: each writes its window where the others write theirs."""
    cache = filled()
    feed(cache, 3, seed=9)
    alone = [copy.deepcopy(cache) for _ in range(3)]
    forks = [cache.fork() for _ in range(3)]
    for turn in range(40):
        for i, one in enumerate(forks):
            feed(one, 1, seed=100 * i + turn)
    for i, one in enumerate(alone):
        for turn in range(40):
            feed(one, 1, seed=100 * i + turn)
        assert same_tiles(forks[i], one)


def test_blocks_of_forks_that_are_gone_are_freed():
    cache = filled()
    used = [layer.pool.used for layer in cache.layers]
    fork = cache.fork()
    feed(fork, 200, seed=1)
    assert all(layer.pool.used > before for layer, before in zip(cache.layers, used))
    del fork
    gc.collect()
    assert [layer.pool.used for layer in cache.layers] == used
    cache.crop(-1)
    assert all(layer.pool.capacity <= layer.pool.used * 5 // 4 for layer in cache.layers)
    only = cache.fork()
    del cache
    gc.collect()
    feed(only, 20, seed=1)


def test_a_copy_of_a_fork_owns_its_blocks():
    cache = filled()
    fork = cache.fork()
    feed(fork, 100, seed=1)
    copied = copy.deepcopy(fork)
    assert all(a.pool is not b.pool for a, b in zip(copied.layers, fork.layers))
    copied.crop(-90)
    feed(copied, 100, seed=2)
    again = cache.fork()
    feed(again, 100, seed=1)
    assert same_tiles(fork, again)


def test_forks_in_threads():
    """Each thread grows, crops and reorders its fork, so that blocks move in the pool that all share."""
    cache = filled()
    untouched = copy.deepcopy(cache)
    alone = [copy.deepcopy(cache) for _ in range(4)]
    forks = [cache.fork() for _ in range(4)]

    def work(one: KIVILatentCache, seed: int) -> None:
        for turn in range(12):
            feed(one, 37, seed=100 * seed + turn)
            list(one.layer(0).tiles())
            one.crop(-30)
            one.reorder_cache(torch.tensor([(turn + seed) % 3, 1, 2]))

    threads = [threading.Thread(target=work, args=(fork, i)) for i, fork in enumerate(forks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, (fork, other) in enumerate(zip(forks, alone)):
        work(other, i)
        assert same_tiles(fork, other)
    assert same_tiles(cache, untouched)


def test_a_fixed_capacity_has_no_forks():
    cache = KIVILatentCache(CacheScheme(**SMALL), [((4,), (4,))], capacity=100)
    cache.layer(0).append(torch.randn(1, 60, 4), torch.randn(1, 60, 4))
    with pytest.raises(ValueError, match=r"fork: .*fixed capacity"):
        cache.fork()


# ---- all layers or none


@pytest.mark.parametrize("length", [1, 30])
@torch.no_grad()
def test_a_step_that_fails_in_a_later_layer_leaves_the_cache_as_it_was(tmp_path, length, monkeypatch):
    model = tiny_split(tmp_path, 32)
    ids = torch.randint(1, 97, (2, 140))
    cache = model.create_kivi_cache(**SMALL)
    model(ids, past_key_values=cache)
    untouched = copy.deepcopy(cache)
    new = torch.randint(1, 97, (2, length))

    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[2].mlp, "forward", fails)
        for _ in range(3):
            with pytest.raises(torch.OutOfMemoryError):
                model(new, past_key_values=cache)
            assert same_tiles(cache, untouched) and cache.get_seq_length() == 140
        empty = model.create_kivi_cache(**SMALL)
        with pytest.raises(torch.OutOfMemoryError):
            model(new, past_key_values=empty)
        assert empty.get_seq_length() == 0 and not empty.layers[0].is_initialized
    expected = model(new, past_key_values=untouched).logits
    assert torch.equal(model(new, past_key_values=cache).logits, expected)
    assert same_tiles(cache, untouched)


@torch.no_grad()
def test_a_cache_may_go_on_with_a_copy_of_its_model(tmp_path):
    model, twin = tiny_split(tmp_path, 32), tiny_split(tmp_path, 32)
    ids = torch.randint(1, 97, (1, 150))
    cache = model.create_kivi_cache(**SMALL)
    model(ids, past_key_values=cache)
    expected = model(ids[:, :1], past_key_values=cache.fork()).logits
    assert torch.equal(twin(ids[:, :1], past_key_values=cache).logits, expected)
    other = tiny_split(tmp_path, 32, dense=tiny_dense(seed=1))
    with pytest.raises(ValueError, match="filled by another model"):
        other(ids[:, :1], past_key_values=cache)
    empty = model.create_kivi_cache(**SMALL)
    assert other(ids, past_key_values=empty).past_key_values.get_seq_length() == 150
