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
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import torch
from helpers import tiny_dense, tiny_split
from test_cache_machine import check_pools
from test_kivi_cache import raw_row, same_bits
from torch.utils._python_dispatch import TorchDispatchMode

from modules import KIVILatentCache, create_kivi_cache

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
    layers = nullcontext() if cache.capacity else cache.all_or_nothing()
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
    make: Callable[[], KIVILatentCache], edit: Callable[[KIVILatentCache], None], must_fail: bool = True
) -> None:
    """Fail `edit` at each of its allocations: it is undone, or done after all if it could go without (a pool's slack)."""

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
        for forever in (False, True):
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
@pytest.mark.parametrize("capacity", [None, 150])
@pytest.mark.parametrize("name", [*APPENDS, *EDITS])
def test_no_memory_with_the_reference(name, capacity):
    tokens, edit = (APPENDS | EDITS)[name]
    check_every_failure(copies_of(filled(capacity, tokens, backend="reference")), edit)
