"""Configurations and cache files that are damaged or nonsense: refused in words, or sound; never a crash.

The cases run in a process of their own, which notes each before it tries it, so that a crash shows, and which case it
was. `python tests/test_fuzz.py files 1 1000` runs a thousand cases of seed 1 by hand.
"""

import copy
import faulthandler
import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from configuration_alrd_llama import ALRDLlamaConfig
from modeling_alrd_llama import ALRDLlamaForCausalLM
from modules.cache.file import read_cache_file
from modules.kernels import get_backend
from modules.kernels.packed import LatentQuery
from modules.kivi_cache import CacheScheme, KIVILatentCache

ROOT = Path(__file__).resolve().parent.parent

# ---- cases


#: What no field should take without a word; beside it fields take one another's values.
NASTY = (-1, 0, 1, 3, 10**5, 2**31, 2**63, -(2**40), 0.5, 1e308, float("nan"), True, False, None, "", "x", [], {}, [[]])


def places(tree: Any, path: tuple = ()) -> list[tuple]:
    """Paths to all that stands in a JSON tree."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


def at(tree: Any, path: tuple) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def mutated(tree: Any, rng: random.Random, fields: tuple[str, ...] | None = None) -> Any:
    """A copy with one to three changes; `fields`: only below these names of the first level."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        paths = [p for p in places(tree) if p and (fields is None or p[0] in fields)]
        if not paths:
            return tree
        *above, key = rng.choice(paths)
        parent, paths = at(tree, tuple(above)), places(tree)
        kind = rng.randrange(6)
        if kind == 0 and (not isinstance(parent, list) or len(parent)):
            del parent[key]
        elif kind == 1 and isinstance(parent, list):
            parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(parent[key]))
        elif kind == 2:
            parent[key] = copy.deepcopy(at(tree, rng.choice(paths)))
        elif kind == 3 and type(parent[key]) in (int, float):
            parent[key] = parent[key] + rng.choice((-1, 1, 2, -parent[key] * 2, 0.5))
        else:
            parent[key] = copy.deepcopy(rng.choice(NASTY))
    return tree


# ---- cache files


def states(rows: int, length: int, channels: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(rows, length, channels).to(dtype) for _ in range(2))


def base_files(folder: Path) -> list[Path]:
    """Saved caches of all kinds: pads, shared blocks, a block that is cut; tiers, calibrated scales; an empty one."""
    torch.manual_seed(0)
    tiers = (((2, 16), (6, 4)), ((4, 3), (4, 1)))
    static = {"static": True, "orientation": "per_channel"}
    schemes = {
        "plain": CacheScheme(3, 2, 16, 5, 4),
        "tiers": CacheScheme(2, 4, 8, 3, 2, {"tiers": tiers}),
        "static": CacheScheme(4, 4, 8, 0, 0, v_scheme=static),
        "scored": CacheScheme(2, 2, 32, 5, 4, v_scheme={"protected": 0.1}),
        "exact": CacheScheme(16, 16, 8, 5, 4),
    }
    paths = []
    for name, scheme in schemes.items():
        dtype = torch.float16 if name == "plain" else torch.float32
        scales = {"values": (torch.rand(16) / 4 + 0.1, torch.randn(16) - 2)} if name == "static" else {}
        cache = KIVILatentCache(
            scheme,
            [((8, 8), (8, 8))] * 2,
            static_scales={i: scales for i in range(2)} if scales else None,
            token_score="attention" if name == "scored" else None,
        )
        length = 300 if name == "scored" else 60
        real = torch.ones(3, length, dtype=torch.bool)
        real[1, :11] = False
        for i in range(2):
            received = torch.rand(3, length) if name == "scored" else None
            cache.layer(i).append(*states(3, length, 16, dtype), real, received)
            assert max(len(row.blocks) for row in cache.layers[i].rows) >= 1
        cache.crop(-9)
        cache.reorder_cache(torch.tensor([2, 2, 1]))
        cache.save(folder / f"{name}.safetensors")
        paths.append(folder / f"{name}.safetensors")
    KIVILatentCache(schemes["plain"]).save(folder / "empty.safetensors")
    return [*paths, folder / "empty.safetensors"]


def contents(cache: KIVILatentCache) -> list:
    """All that can be read of a cache, in types that compare."""
    found = [str(cache.scheme), str(cache.token_score)]
    for layer in cache.layers:
        found.append((layer.slots, [(r.sinks, r.window, r.counts, r.pads) for r in layer.rows]))
        for tile in layer.tiles() if layer.is_initialized else ():
            for x in (tile.keys, tile.values, tile.start, tile.count):
                found.append(x.contiguous().view(torch.uint8).numpy().tobytes())
    return found


def check_sound(cache: KIVILatentCache, folder: Path) -> None:
    """A cache that was loaded can be attended to, edited, fed and saved; nothing reads beyond its storages."""
    for layer in cache.layers:
        if not layer.is_initialized:
            continue
        assert layer.pool.capacity == len(next(iter(layer.pool.tensors()))) and len(layer.rows) > 0
        for row in layer.rows:
            assert all(0 <= slot < layer.pool.capacity for slot in row.blocks)
            assert all(1 <= count <= layer.scheme.block_length for count in row.counts)
            assert row.tokens + sum(stop - start for start, stop in row.pads) == layer.slots
        widths = {len(set(side)) for side in layer.widths}
        size = layer.widths[0][0]
        if widths == {1} and size % 2 == 0:
            query = torch.randn(len(layer.rows), len(layer.widths[0]), 1, size)
            positions = torch.tensor([[row.tokens] for row in layer.rows])
            how = {"expand_keys": None, "value_widths": layer.widths[1], "rope": None, "scaling": 0.3}
            for name in ("cpu", "reference"):
                get_backend(name, torch.device("cpu")).attend(LatentQuery(query, positions, **how), layer.packed())
    cache.save(folder / "again.safetensors")
    again = KIVILatentCache.load(folder / "again.safetensors")
    assert contents(again) == contents(cache)
    for layer in again.layers:
        if layer.is_initialized:
            rows, length = len(layer.rows), layer.scheme.block_length + layer.scheme.residual_length + 3
            new = (torch.randn(rows, length, sum(side)).to(layer.dtype) for side in layer.widths)
            received = torch.rand(rows, layer.slots + length) if layer.score == "attention" else None
            try:
                layer.append(*new, received=received)
            except ValueError as error:  # what was loaded in the window cannot be quantized
                assert "finite" in str(error) or "float16" in str(error)
    if again.layers:
        again.crop(-min(1, again.get_seq_length()))
        again.reset()


def damaged(path: Path, rng: random.Random, target: Path) -> str:
    """Write a damaged copy of a file; returns in words what was done."""
    whole = path.read_bytes()
    kind = rng.choice(("flip", "cut", "header", "header", "record", "record", "record", "tensors", "tensors"))
    if kind == "flip":
        data, header = bytearray(whole), int.from_bytes(whole[:8], "little")
        first, last = rng.choice(((0, 8), (8, 8 + header), (8 + header, len(data)), (0, len(data))))
        spots = [rng.randrange(first, last) for _ in range(rng.choice((1, 1, 1, 2, 8)))] if last > first else [0]
        for spot in spots:
            data[spot] ^= 1 << rng.randrange(8)
        target.write_bytes(data)
        return f"flip {spots}"
    if kind == "cut":
        length = rng.randrange(len(whole))
        target.write_bytes(whole[:length] + (b"\0" * rng.choice((0, 0, 7, len(whole)))))
        return f"cut at {length}"
    header, tensors = read_cache_file(path)
    del header["tensors"]
    if kind in ("header", "record"):
        header = mutated(header, rng, ("layers",) if kind == "record" else None)
    else:
        damage_tensors(tensors, rng)
    consistent = rng.random() < 0.9
    write_consistent(target, header, tensors) if consistent else write_altered(path, target, header)
    return f"{kind}{'' if consistent else ' without checksum'}: {json.dumps(header)[:2000]}"


def damage_tensors(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    """Change some tensors in type, shape, number or contents."""
    dtypes = (torch.float16, torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8, torch.bool)
    for _ in range(rng.choice((1, 1, 2))):
        if not tensors:
            tensors["0.window_keys"] = torch.zeros(1, 21, 16)
            return
        name = rng.choice(sorted(tensors))
        x, kind = tensors[name], rng.randrange(8)
        if kind == 0:
            del tensors[name]
        elif kind == 1:
            tensors[rng.choice((f"{name}x", "9.window_keys", "x", "0.", "-1.window_keys", "0.keys.x"))] = x.clone()
        elif kind == 2:
            tensors[name] = x.to(rng.choice(dtypes))
        elif kind == 3:
            tensors[name] = x.flatten() if rng.random() < 0.5 else x.transpose(0, -1).contiguous()
        elif kind == 4 and x.dim():
            axis = rng.randrange(x.dim())
            tensors[name] = x.narrow(axis, 0, max(0, x.shape[axis] - 1)).contiguous()
        elif kind == 5 and x.dim():
            tensors[name] = torch.cat([x, x[:1]]) if len(x) else x
        elif kind == 6 and x.is_floating_point():
            tensors[name] = torch.full_like(x, rng.choice((float("nan"), float("inf"), 6e4, -1.0)))
        else:
            raw = bytes(rng.randrange(256) for _ in range(x.nbytes))
            tensors[name] = torch.frombuffer(bytearray(raw), dtype=x.dtype).view(x.shape) if raw else x


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_consistent(target: Path, header: Any, tensors: dict[str, torch.Tensor]) -> None:
    """A file whose checksums are right, whatever it says."""
    sums = {name: digest(x.contiguous().flatten().view(torch.uint8).numpy().tobytes()) for name, x in tensors.items()}
    text = json.dumps({**header, "tensors": sums})
    metadata = {"kivi_latent_cache": text, "sha256": digest(text.encode())}
    save_file({name: x.contiguous() for name, x in tensors.items()}, target, metadata)


def write_altered(path: Path, target: Path, header: dict) -> None:
    """A file whose header was changed by hand, its checksum left."""
    old, _ = read_cache_file(path)
    text = json.dumps({**header, "tensors": old["tensors"]})
    unchanged = json.dumps(old)
    metadata = {"kivi_latent_cache": text + ("" if text != unchanged else " "), "sha256": digest(unchanged.encode())}
    save_file(load_file(path), target, metadata)


def fuzz_files(seed: int, cases: int, note: Callable[[str], None]) -> Counter:
    counts = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bases = {path: contents(KIVILatentCache.load(path)) for path in base_files(folder)}
        target = folder / "damaged.safetensors"
        for case in range(cases):
            rng = random.Random(f"{seed} {case}")
            path = rng.choice(sorted(bases))
            what = damaged(path, rng, target)
            note(f"case {case}, {path.stem}: {what}")
            try:
                cache = KIVILatentCache.load(target)
            except ValueError as error:
                assert str(error).startswith(f"{target}: ") and len(str(error)) > len(str(target)) + 10, error
                counts["refused"] += 1
                continue
            same = contents(cache) == bases[path]
            assert same or not what.startswith(("flip", "cut")), "a damaged file gives another cache"
            check_sound(cache, folder)
            counts["the same" if same else "sound"] += 1
    return counts


# ---- configurations


#: A model so small that a case takes milliseconds.
CONFIG = ALRDLlamaConfig(
    vocab_size=31,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    truncation_ranks={f"model.layers.{i}.self_attn.{p}_proj": [5, 6] for i in range(2) for p in "kv"},
    head_group_size=1,
    k_bits=2,
    v_bits=3,
    group_size=8,
    residual_length=5,
    sink_length=2,
    k_scheme={"range_method": "mse"},
    v_scheme={"symmetric": True, "rotation": False},
    width_tiers={"model.layers.1.self_attn.k_proj": [[[2, 4], [3, 2]], [[6, 3]]]},
    eos_token_id=None,
    bos_token_id=None,
)

OWN_FIELDS = tuple(sorted(set(ALRDLlamaConfig.__annotations__) & set(CONFIG.to_dict())))

#: Errors that are clear for a field of our own; those of the library's fields are the library's.
CLEAR = (ValueError, TypeError)


def is_clear(error: BaseException) -> bool:
    return isinstance(error, CLEAR) or type(error).__module__.startswith("huggingface_hub")


def fuzz_configs(seed: int, cases: int, note: Callable[[str], None]) -> Counter:
    counts, base = Counter(), json.loads(CONFIG.to_json_string(use_diff=False))
    ids = torch.randint(31, (2, 30))
    with tempfile.TemporaryDirectory() as folder:
        for case in range(cases):
            rng = random.Random(f"{seed} {case}")
            fields = OWN_FIELDS if case % 3 else ("num_key_value_heads", "head_dim", "layer_types", "rope_parameters")
            tree = mutated(base, rng, fields)
            changed = sorted(name for name in {*base, *tree} if base.get(name, ...) != tree.get(name, ...))
            note(f"case {case}: {json.dumps({name: tree.get(name) for name in changed})}")
            (Path(folder) / "config.json").write_text(json.dumps(tree))
            try:
                config = ALRDLlamaConfig.from_pretrained(folder)
                config.check_latent_cache()
            except Exception as error:
                assert is_clear(error) or not set(changed) & set(OWN_FIELDS), f"{type(error)}: {error}"
                counts["refused"] += 1
                continue
            if not set(changed) <= set(OWN_FIELDS):
                counts["the library's"] += 1
                continue
            check_model(config, ids)
            counts["sound"] += 1
    return counts


@torch.no_grad()
def check_model(config: ALRDLlamaConfig, ids: torch.Tensor) -> None:
    """A configuration that was taken makes a model whose steps store what the formula says."""
    if max(config.group_size, config.residual_length, config.sink_length) > 10**6:
        return  # sound, but no machine has the memory
    torch.manual_seed(0)
    model = ALRDLlamaForCausalLM(config).eval()
    cache = model.create_kivi_cache()
    for piece in (ids, ids[:, :1], ids[:, :7]):
        logits = model(piece, past_key_values=cache if config.use_kivi else None).logits
        assert logits.shape == (2, piece.shape[1], 31) and torch.isfinite(logits).all()
    if config.use_kivi:
        schemes = [cache.layer_schemes.get(i, cache.scheme) for i in range(2)]
        layers = zip(schemes, cache.layers, strict=True)
        sizes = [scheme.layer_nbytes(38, layer.widths, torch.float32) for scheme, layer in layers]
        assert cache.row_tokens() == [38, 38] and cache.nbytes_used == 2 * sum(sizes)


# ---- the process of its own


def run(kind: str, seed: int, cases: int, timeout: int = 600) -> Counter:
    """Run cases in another process; returns how many ended how."""
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder) / "notes"
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, kind, str(seed), str(cases), str(notes)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
        last = notes.read_text() if notes.exists() else "before the first case"
    assert done.returncode == 0, f"exit code {done.returncode} at {last}\n{done.stderr[-4000:]}"
    return Counter(json.loads(done.stdout.splitlines()[-1]))


def main(kind: str, seed: int, cases: int, notes: str | None = None) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (24 << 30,) * 2)  # a size from a file that is taken at its word shows
    fuzz = {"files": fuzz_files, "configs": fuzz_configs}[kind]
    last = ["before the first case"]

    def note(text: str) -> None:
        last[0] = text
        if notes:
            Path(notes).write_text(text)

    try:
        print(json.dumps(fuzz(seed, cases, note)))
    except BaseException:
        print(last[0], file=sys.stderr)
        raise


def test_damaged_cache_files():
    counts = run("files", seed=0, cases=500)
    assert counts["refused"] > 200 and counts["sound"] > 5 and counts["the same"] > 5


def test_damaged_configurations():
    counts = run("configs", seed=0, cases=300)
    assert counts["refused"] > 100 and counts["sound"] > 15


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("kind", ["files", "configs"])
def test_many_damaged_files(kind, seed):
    counts = run(kind, seed, 5000, timeout=3600)
    print(kind, dict(counts))
    assert counts["refused"] > 1000 and counts["sound"] > 50


def test_a_file_cut_at_any_place(tmp_path):
    """At every byte of the header, and between and inside the tensors."""
    path = base_files(tmp_path)[0]
    whole = path.read_bytes()
    target = tmp_path / "cut.safetensors"
    for length in [*range(0, 40), *range(40, len(whole), 97), len(whole) - 1]:
        target.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"^{target}: "):
            KIVILatentCache.load(target)
    assert contents(KIVILatentCache.load(path)) == contents(KIVILatentCache.load(shutil.copy(path, target)))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
