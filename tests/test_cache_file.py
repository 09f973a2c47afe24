"""Save and load act on packed and residual parts, and refuse what they did not write."""

import pytest
import torch
from safetensors.torch import save_file

from modules.kivi_cache import KIVILatentCache, create_kivi_cache


def filled() -> KIVILatentCache:
    """Two layers, rows of different blocks, a block that is cut, shared blocks and pads."""
    cache = create_kivi_cache(k_bits=3, v_bits=2, group_size=16, residual_length=5)
    for i, (k, v) in enumerate([(8, 6), (5, 9)]):
        real = torch.ones(3, 90, dtype=torch.bool)
        real[1, :40] = False
        cache.layer(i).append(torch.randn(3, 90, k), torch.randn(3, 90, v), real)
    cache.crop(-23)
    cache.reorder_cache(torch.tensor([2, 2, 1]))
    return cache


def same_tiles(a: KIVILatentCache, b: KIVILatentCache) -> bool:
    pairs = [(x, y) for one, two in zip(a.layers, b.layers) for x, y in zip(one.tiles(), two.tiles(), strict=True)]
    fields = ("keys", "values", "start", "count")
    return all(torch.equal(getattr(x, f), getattr(y, f)) for x, y in pairs for f in fields)


def test_a_loaded_cache_goes_on_like_the_saved_one(tmp_path):
    cache = filled()
    cache.save(tmp_path / "prefix.safetensors")
    loaded = KIVILatentCache.load(tmp_path / "prefix.safetensors")
    assert loaded.scheme == cache.scheme and loaded.get_seq_length() == cache.get_seq_length()
    assert same_tiles(cache, loaded) and loaded.nbytes_used == cache.nbytes_used
    assert [row.pads for row in loaded.layers[0].rows] == [row.pads for row in cache.layers[0].rows]
    for i, (k, v) in enumerate([(8, 6), (5, 9)]):
        keys, values = torch.randn(3, 40, k), torch.randn(3, 40, v)
        for c in (cache, loaded):
            c.layer(i).append(keys, values)
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


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    cache = filled()
    cache.save(tmp_path / "prefix.safetensors")
    before = (tmp_path / "prefix.safetensors").read_bytes()
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("interrupted")))
    with pytest.raises(OSError, match="interrupted"):
        cache.save(tmp_path / "prefix.safetensors")
    assert (tmp_path / "prefix.safetensors").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["prefix.safetensors"]


def test_another_file_is_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="version None must be 2"):
        KIVILatentCache.load(tmp_path / "other.safetensors")
