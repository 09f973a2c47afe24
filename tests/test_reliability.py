"""What goes wrong leaves the cache as it was: no memory in the middle of an edit, a failed step of the model, threads.

An edit is repeated with an error at its first allocation, at its second, and so on to the last. After each error every
byte that can be read is as before, and going on gives what a cache gives that never failed.
"""

import copy
import gc
import os
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers import tiny_dense, tiny_split
from test_cache_machine import check_pools
from test_kivi_cache import raw_row, same_bits
from torch.utils._python_dispatch import TorchDispatchMode

from modules import KIVILatentCache, create_kivi_cache
from modules.cache.binding import ModelBinding
from modules.cache.file import read_cache_file

#: Blocks are small, so that much happens within few tokens.
SMALL = {"k_bits": 2, "v_bits": 3, "group_size": 8, "residual_length": 5, "sink_length": 4}
WIDTHS = ((6, 5), (9, 3))

# ---- memory that runs out


class MemoryRunsOut(TorchDispatchMode):
    """From the n-th operation that takes memory on, or in that one only, there is none.

    Attributes:
        count: Operations that have taken memory, or would have.
    """

    ERRORS = (torch.OutOfMemoryError, RuntimeError, MemoryError)
    #: In-place operations that use memory of their own.
    WITH_SCRATCH = ("index_put_",)

    def __init__(self, n: int = 0, forever: bool = False):
        super().__init__()
        self.n, self.forever, self.count = n, forever, 0

    @classmethod
    def takes_memory(cls, operation) -> bool:
        schema = operation._schema
        fresh = any("Tensor" in str(x.type) and x.alias_info is None for x in schema.returns)
        return fresh or schema.name.split("::")[1] in cls.WITH_SCRATCH

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if self.takes_memory(operation):
            self.count += 1
            if self.n and (self.count == self.n or (self.forever and self.count > self.n)):
                raise self.ERRORS[self.n % 3](f"no memory for {operation}")
        return operation(*args, **(kwargs or {}))


def held(cache: KIVILatentCache) -> list:
    """All that can be read of a cache: bookkeeping and bytes of every row, and sizes."""
    rows = [
        [(row.sinks, row.window, row.counts, row.pads, raw_row(layer, i)) for i, row in enumerate(layer.rows)]
        for layer in cache.layers
    ]
    return [rows, [layer.slots for layer in cache.layers], cache.nbytes_used]


def assert_same(found, expected) -> None:
    """Nested lists, tuples and dictionaries of tensors and numbers are equal, bit by bit."""
    assert type(found) is type(expected)
    if isinstance(found, torch.Tensor):
        assert same_bits(found, expected)
    elif isinstance(found, (list, tuple)):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)
    elif isinstance(found, dict):
        assert_same(list(found), list(expected))
        assert_same(list(found.values()), list(expected.values()))
    else:
        assert found == expected


def states(seed: int, batch: int, length: int) -> list[list[torch.Tensor]]:
    """Keys and values of two layers."""
    generator = torch.Generator().manual_seed(seed)
    return [[3 * torch.randn(batch, length, sum(w), generator=generator) for w in WIDTHS] for _ in range(2)]


def append(cache: KIVILatentCache, seed: int, batch: int, length: int, real: torch.Tensor | None = None) -> None:
    """To the two layers of a cache that grows, to the only one of a fixed capacity, whose layers fail by themselves."""
    layers = nullcontext() if cache.capacity else cache.transaction()
    with layers:
        for i, pair in enumerate(states(seed, batch, length)[: 1 if cache.capacity else 2]):
            cache.layer(i, WIDTHS).append(*pair, real)


def filled(capacity: int | None = None, tokens: int = 37, backend: str = "cpu") -> KIVILatentCache:
    """Rows of pads and blocks, one of them cut by a crop; the window of every row is one token short of a block."""
    cache = create_kivi_cache(**SMALL, capacity=capacity, backend=backend)
    cache.layer(0 if capacity else 1)
    real = torch.ones(3, tokens, dtype=torch.bool)
    real[1, :8] = False
    append(cache, 0, 3, tokens, real)
    return cache


def left_pads(batch: int, length: int) -> torch.Tensor:
    return torch.arange(length) >= torch.arange(batch)[:, None]


ONE, MANY = 36, 33  # tokens that leave room for one more in the windows, and that leave none

#: Name: (tokens before, the edit).
APPENDS = {
    "one token into the window": (ONE, lambda cache: append(cache, 1, 3, 1)),
    "one token that completes blocks": (MANY + 7, lambda cache: append(cache, 1, 3, 1)),
    "many tokens": (MANY, lambda cache: append(cache, 1, 3, 40)),
    "tokens and pads": (MANY, lambda cache: append(cache, 1, 3, 19, left_pads(3, 19))),
}
EDITS = {
    "crop inside a block": (MANY, lambda cache: cache.crop(-14)),
    "crop that frees blocks": (MANY + 30, lambda cache: cache.crop(-60)),
    "reorder": (MANY, lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0]))),
}
GROWING = {
    "repeat": (MANY, lambda cache: cache.batch_repeat_interleave(2)),
    "select": (MANY, lambda cache: cache.batch_select_indices(torch.tensor([1]))),
}


def check_every_failure(
    make: Callable[[], KIVILatentCache],
    edit: Callable[[KIVILatentCache], object],
    must_fail: bool = True,
    thorough: bool = False,
) -> None:
    """Fail `edit` at each of its allocations: it is undone, or done after all if it could go without (a pool's slack).

    Every second time the memory is back at once; `thorough`: each time either way.
    """

    def go_on(cache: KIVILatentCache) -> list:
        for seed, length in ((5, 1), (6, 30)):
            append(cache, seed, len(cache.layers[0].rows) or 2, length)
        return held(cache)

    whole = make()
    before = held(whole)
    with MemoryRunsOut() as meter:
        edit(whole)
    after = held(whole)
    further = go_on(whole)
    failed = 0
    for n in range(1, meter.count + 1):
        for forever in (False, True) if thorough else (n % 2 == 0,):
            cache = make()
            try:
                with MemoryRunsOut(n, forever):
                    edit(cache)
            except MemoryRunsOut.ERRORS as error:
                assert "no memory" in str(error)
                failed += 1
                assert_same(held(cache), before)
                edit(cache)
            assert_same(held(cache), after)
            if cache.capacity is None:
                check_pools([cache], freed=True)
            assert_same(go_on(cache), further)
    assert meter.count and (failed or not must_fail)


def copies_of(cache: KIVILatentCache) -> Callable[[], KIVILatentCache]:
    return lambda: copy.deepcopy(cache)


@pytest.mark.parametrize("name", [*APPENDS, *EDITS, *GROWING])
def test_no_memory_in_an_edit(name):
    tokens, edit = (APPENDS | EDITS | GROWING)[name]
    cache = filled(tokens=tokens)
    assert min(len(row.blocks) for layer in cache.layers for row in layer.rows) >= 1
    check_every_failure(copies_of(cache), edit, must_fail="crop" not in name)


@pytest.mark.parametrize("name", [*APPENDS, *EDITS])
def test_no_memory_in_an_edit_of_a_fixed_cache(name):
    tokens, edit = (APPENDS | EDITS)[name]
    check_every_failure(copies_of(filled(150, tokens)), edit)


@pytest.mark.parametrize("capacity", [None, 150])
def test_no_memory_for_the_first_tokens(capacity):
    empty = create_kivi_cache(**SMALL, capacity=capacity, backend="cpu")
    empty.layer(0 if capacity else 1)
    check_every_failure(copies_of(empty), lambda cache: append(cache, 1, 2, 40, left_pads(2, 40)))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("capacity", [None, 150])
@pytest.mark.parametrize("name", [*APPENDS, *EDITS])
def test_no_memory_in_an_edit_of_any_back_end(name, capacity, backend):
    tokens, edit = (APPENDS | EDITS)[name]
    cache = filled(capacity, tokens, backend)
    check_every_failure(copies_of(cache), edit, must_fail=name in APPENDS, thorough=True)


@pytest.mark.parametrize("capacity", [None, 150])
def test_a_refused_crop_keeps_the_pads(capacity):
    cache = filled(capacity)
    before = held(cache)
    with pytest.raises(ValueError, match="tokens_to_remove"):
        cache.crop(-38)
    assert_same(held(cache), before)


def test_no_memory_for_a_fork_or_a_copy():
    cache = filled()
    for copied in (KIVILatentCache.fork, copy.deepcopy):
        check_every_failure(copies_of(cache), copied)


def test_no_memory_for_a_file(tmp_path, monkeypatch):
    cache, path = filled(), tmp_path / "prefix.safetensors"
    cache.save(path)
    before, contents = held(cache), read_cache_file(path)
    monkeypatch.setattr("modules.kivi_cache.read_cache_file", lambda path: contents)  # safetensors takes no such mode
    for act in (lambda: cache.save(path), lambda: KIVILatentCache.load(path)):
        with MemoryRunsOut() as meter:
            act()
        whole = path.read_bytes()
        assert meter.count > 10
        for n in range(1, meter.count + 1):
            with pytest.raises(MemoryRunsOut.ERRORS, match="no memory"), MemoryRunsOut(n):
                act()
            assert [file.name for file in tmp_path.iterdir()] == [path.name]
            assert path.read_bytes() == whole
    assert_same(held(cache), before)
    monkeypatch.undo()
    assert_same(held(KIVILatentCache.load(path)), before)


def test_layers_of_fixed_capacity_that_may_differ_are_refused():
    cache = create_kivi_cache(**SMALL, capacity=150, backend="cpu")
    for i, pair in enumerate(states(0, 3, 40)):
        cache.layer(i).append(*pair)
    before = held(cache)
    other = copy.deepcopy(cache)
    with MemoryRunsOut() as meter:
        other.crop(-3)
    with pytest.raises(MemoryRunsOut.ERRORS), MemoryRunsOut(1):
        cache.crop(-3)  # in the first layer: nothing has changed
    assert_same(held(cache), before)
    with pytest.raises(MemoryRunsOut.ERRORS), MemoryRunsOut(meter.count):
        cache.crop(-3)
    assert len({layer.slots for layer in cache.layers}) == 2
    for edit in (lambda: cache.crop(-1), lambda: cache.reorder_cache(torch.arange(3))):
        with pytest.raises(ValueError, match=r"capacity=150: .* reset\(\) it"):
            edit()
    cache.reset()
    for i, pair in enumerate(states(0, 3, 40)):
        cache.layer(i).append(*pair)
    assert_same(held(cache), before)


# ---- a step of the model that fails


class BrokenStep(Exception):
    """Raised in the middle of a model."""


@pytest.fixture(scope="module", params=[4, 8], ids=["GQA", "MHA"])
def model(request, tmp_path_factory):
    dense = tiny_dense(num_key_value_heads=request.param)
    return tiny_split(tmp_path_factory.mktemp("model"), 24, dense=dense, **SMALL)


def prompt(seed: int, batch: int, length: int) -> torch.Tensor:
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model, cache: KIVILatentCache, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, past_key_values=cache).logits


#: Tokens of the step: the prompt; a piece of it; one token that completes a block, and one that does not.
STEPS = {"prompt": (0, 40), "piece": (40, 19), "token that completes blocks": (40, 1), "token": (36, 1)}


@pytest.mark.parametrize("part", ["self_attn", "mlp"])
@pytest.mark.parametrize(("before", "length"), STEPS.values(), ids=STEPS)
def test_a_failed_step_leaves_every_layer_as_it_was(model, monkeypatch, before, length, part):
    cache = model.create_kivi_cache(backend="cpu")
    if before:
        logits_of(model, cache, prompt(0, 2, before))
    held_before, whole = held(cache), copy.deepcopy(cache)
    expected = logits_of(model, whole, prompt(1, 2, length))
    flushed = [len(b.rows[0].blocks) > len(a.rows[0].blocks) for a, b in zip(cache.layers, whole.layers) if a.rows]
    assert not before or all(flushed) == (before + length - 4 - 5 >= 8 * ((before - 4 - 5) // 8 + 1))
    for k in range(3):
        module = getattr(model.model.layers[k], part)
        for when in ("before", "after"):
            with monkeypatch.context() as patched:
                forward = module.forward

                def broken(*args, forward=forward, when=when, **kwargs):
                    if when == "after":
                        forward(*args, **kwargs)
                    raise BrokenStep

                patched.setattr(module, "forward", broken)
                with pytest.raises(BrokenStep):
                    logits_of(model, cache, prompt(1, 2, length))
            assert_same(held(cache), held_before)
    assert same_bits(logits_of(model, cache, prompt(1, 2, length)), expected)
    assert_same(held(cache), held(whole))
    check_pools([cache])


def test_no_memory_in_a_step_of_the_model(model):
    """From the embedding to the logits."""
    start = model.create_kivi_cache(backend="cpu")
    logits_of(model, start, prompt(0, 2, 40))
    before, ids, whole = held(start), prompt(1, 2, 1), copy.deepcopy(start)
    logits_of(model, copy.deepcopy(start), ids)  # which makes what is kept for all caches
    with MemoryRunsOut() as meter:
        expected = logits_of(model, whole, ids)
    assert meter.count > 200
    for n in [*range(1, meter.count, 5), meter.count]:
        cache = copy.deepcopy(start)
        with pytest.raises(MemoryRunsOut.ERRORS, match="no memory"), MemoryRunsOut(n, forever=n % 2 == 0):
            logits_of(model, cache, ids)
        assert_same(held(cache), before)
        assert same_bits(logits_of(model, cache, ids), expected)


def test_a_failed_step_of_a_fixed_cache_is_not_gone_on_from(model, monkeypatch):
    cache = model.create_kivi_cache(backend="cpu", capacity=90)
    expected = [logits_of(model, cache, prompt(0, 2, 40)), logits_of(model, cache, prompt(1, 2, 1))]
    with monkeypatch.context() as patched:
        patched.setattr(model.model.layers[1].mlp, "forward", lambda *args: (_ for _ in ()).throw(BrokenStep))
        with pytest.raises(BrokenStep):
            logits_of(model, cache, prompt(2, 2, 1))
    with pytest.raises(ValueError, match=r"capacity=90: .* reset\(\) it"):
        logits_of(model, cache, prompt(2, 2, 1))
    cache.reset()
    for seed, length, logits in ((0, 40, expected[0]), (1, 1, expected[1])):
        assert same_bits(logits_of(model, cache, prompt(seed, 2, length)), logits)


# ---- threads


def together(*work: Callable[[], object]) -> list:
    """Results of functions that run at the same time, each in a thread of its own, which change places all the time."""
    results, errors, start = [None] * len(work), [], threading.Barrier(len(work))

    def run(i: int) -> None:
        try:
            start.wait()
            results[i] = work[i]()
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(work))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    if errors:
        raise errors[0]
    return results


@torch.no_grad()
def written(model, ids: torch.Tensor, cache: KIVILatentCache, tokens: int = 30, **how) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=tokens, do_sample=False, past_key_values=cache, **how)


def test_threads_with_a_cache_each_do_not_meet(model):
    """Different prompts, batches, back ends, capacities and beams on one model."""
    jobs = [
        lambda: written(model, prompt(0, 1, 30), model.create_kivi_cache(backend="cpu")),
        lambda: written(model, prompt(1, 3, 23), model.create_kivi_cache(backend="reference")),
        lambda: written(model, prompt(2, 2, 17), model.create_kivi_cache(backend="cpu", k_bits=4), num_beams=3),
        lambda: written(model, prompt(3, 1, 25), model.create_kivi_cache(backend="cpu", capacity=80)),
    ]
    expected = [job() for job in jobs]
    for _ in range(2):
        assert_same(together(*jobs), expected)


def test_threads_that_continue_forks_of_one_prefix(model):
    """Each packs blocks of its own into the pool that they share, which grows and moves under both."""
    prefix = model.create_kivi_cache(backend="cpu")
    logits_of(model, prefix, prompt(0, 1, 50))
    before = held(prefix)

    def job(seed: int, cache: KIVILatentCache) -> Callable[[], object]:
        def go_on():
            for turn in range(3):
                ids = torch.cat([prompt(0, 1, 50), prompt(100 * seed, 1, cache.get_seq_length() - 50 + 1)], dim=1)
                text = written(model, ids, cache, 20)
                cache.crop(-7)
                cache.batch_repeat_interleave(2)
                logits_of(model, cache, prompt(seed + turn, 2, 11))
                cache.batch_select_indices(torch.tensor([1]))
            return [text, held(cache)]

        return go_on

    expected = [job(seed, copy.deepcopy(prefix))() for seed in (1, 2)]
    for _ in range(3):
        forks = [prefix.fork() for _ in range(2)]
        assert_same(together(*(job(seed, fork) for seed, fork in zip((1, 2), forks, strict=True))), expected)
        assert_same(held(prefix), before)
        assert len({id(layer.pool) for cache in (prefix, *forks) for layer in cache.layers}) == 3
        check_pools([prefix, *forks], freed=True)
        del forks
    gc.collect()
    check_pools([prefix], freed=True)
    assert_same(held(prefix), before)


def test_a_fork_that_is_thrown_away_frees_its_blocks():
    prefix = filled()
    pool, blocks = prefix.layers[0].pool, prefix.layers[0].pool.used
    forks = [prefix.fork() for _ in range(4)]
    for seed, fork in enumerate(forks):
        append(fork, seed, 3, 80)
    assert pool.used == blocks + 4 * 3 * 10
    check_pools([prefix, *forks])
    del fork
    while forks:
        forks.pop()
        assert pool.used == blocks + len(forks) * 3 * 10
    append(prefix, 9, 3, 1)
    prefix.crop(-1)
    assert pool.capacity <= blocks + blocks // 4
    check_pools([prefix])


# ---- a cache of another model


def test_a_cache_of_other_channels_or_type_is_refused_before_a_kernel_reads_it(tmp_path, monkeypatch):
    """Also where channels are as many in all, but in other head groups; the C++ attention would read beyond a row."""

    def split(name: str, k_ranks: list[int], v_ranks: list[int]):
        (tmp_path / name).mkdir()
        return tiny_split(tmp_path / name, {"k_proj": k_ranks, "v_proj": v_ranks}, head_group_size=2, **SMALL)

    model = split("model", [13, 21], [32, 7])
    others = [split("swapped", [21, 13], [7, 32]), split("wider", [30, 30], [32, 30]), copy.deepcopy(model).half()]
    for backend in ("cpu", "reference"):
        cache = model.create_kivi_cache(backend=backend)
        logits_of(model, cache, prompt(0, 2, 40))
        before = held(cache)
        for other in others:
            with monkeypatch.context() as patched:
                patched.setattr(type(model.model.layers[0].self_attn), "_attend_cache", None)  # not called
                with pytest.raises(ValueError, match="filled by another model"):
                    logits_of(other, cache, prompt(1, 2, 1))
                cache._binding = ModelBinding()  # as if its fingerprint were not known
                with pytest.raises(ValueError, match=r"channels by head group|as the cache was started"):
                    logits_of(other, cache, prompt(1, 2, 1))
                cache.bind(model.get_decoder())
            assert_same(held(cache), before)
        assert torch.isfinite(logits_of(model, cache, prompt(1, 2, 1))).all()


# ---- ten thousand steps

STEPS_OF_A_DAY = 10_000


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def formula(cache: KIVILatentCache, tokens: int) -> int:
    schemes = [cache.layer_schemes.get(i, cache.scheme) for i in range(len(cache.layers))]
    return sum(
        scheme.layer_nbytes(tokens, layer.widths, layer.dtype)
        for scheme, layer in zip(schemes, cache.layers, strict=True)
    )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the process's memory from Linux")
@pytest.mark.parametrize("limit", [None, 300, "capacity"], ids=["growing", "cropped back", "fixed capacity"])
@torch.no_grad()
def test_ten_thousand_decode_steps_keep_their_memory(tmp_path, limit):
    """The cache takes what the formula says at every step, and the process no more than the cache.

    `limit` slots: the cache is cropped back by 200 whenever it has reached them.
    """
    model = tiny_split(tmp_path, 24, **SMALL | {"group_size": 32})
    capacity = STEPS_OF_A_DAY + 50 if limit == "capacity" else None
    cache, cut = model.create_kivi_cache(backend="cpu", capacity=capacity), isinstance(limit, int)
    logits = logits_of(model, cache, prompt(0, 1, 40))
    tokens, log = 40, []
    for step in range(STEPS_OF_A_DAY):
        if cut and tokens >= limit:
            cache.crop(-200)
            tokens -= 200
        logits = logits_of(model, cache, logits[:, -1:].argmax(-1))
        tokens += 1
        if not cut and step % 100 == 0:
            assert cache.nbytes_used == formula(cache, tokens)
        if step % 2000 == 1999:
            gc.collect()
            live = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
            log.append((step + 1, tokens, resident(), cache.nbytes_used, cache.nbytes, live))
            print("step {}: {} tokens, {:,} resident, {:,} used, {:,} allocated, {} tensors".format(*log[-1]))
    assert torch.isfinite(logits).all() and cache.row_tokens() == [tokens]
    used, allocated = ([entry[i] for entry in log] for i in (3, 4))
    assert all(u <= a for u, a in zip(used, allocated, strict=True))
    assert len({entry[5] for entry in log[1:]}) == 1, "tensors pile up"
    # Past the first 2000 steps the process grows with the cache: its storages, and while one is copied, both.
    grown = log[-1][2] - log[0][2]
    assert grown <= 2 * (allocated[-1] - allocated[0]) + 4 * 2**20
    if cut:
        assert max(used) < formula(cache, limit + 32) and max(allocated) < 4 * max(used)
    if limit == "capacity":
        assert len(set(allocated)) == 1
