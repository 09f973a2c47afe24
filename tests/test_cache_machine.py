"""Caches driven through random sequences of everything they can do, beside a simple model of themselves.

After every step each cache that is alive must hold what `simulated_cache.py` says: the tokens of every row bit for bit,
its sinks, blocks, window and pads, its slots, its bytes; and the pools count every reference.
"""

import copy
import os
import pickle
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from simulated_cache import SimulatedCache, round_trip
from test_kivi_cache import block_bits, raw_row, same_bits, storage_nbytes

from modules.kivi_cache import CacheScheme, KIVILatentCache, KIVILatentLayer

#: What a machine may grow to, so that a step stays fast.
MOST_CACHES, MOST_ROWS, MOST_TOKENS = 4, 5, 90


# ---- what a layer stores, and the model of it


@dataclass(frozen=True)
class Kind:
    """What one layer stores: widths of codes, channels, and tiers of the keys or calibrated scales of the values; of a
    block the channels of its sinks, and one side alone where a latent is both."""

    k_bits: int
    v_bits: int
    widths: tuple[tuple[int, ...], ...]
    tiers: tuple | None = None
    static: bool = False
    sinks: tuple[int, int] | None = None

    @property
    def k_scheme(self) -> dict:
        return {"tiers": self.tiers} if self.tiers else {}

    @property
    def v_scheme(self) -> dict:
        return {"static": True, "orientation": "per_channel"} if self.static else {}

    @property
    def scales(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Calibrated scale and zero point of each channel of the values."""
        if not self.static:
            return {}
        index = torch.arange(sum(self.widths[1]))
        return {"values": (0.25 + index / 64, -1.0 - index / 16)}


KINDS = (
    Kind(2, 2, ((5, 3), (4, 2))),
    Kind(3, 4, ((6,), (7,))),
    Kind(16, 16, ((4,), (4,))),
    Kind(8, 3, ((1, 1, 2), (6,))),
    Kind(2, 2, ((5, 3), (6,)), tiers=(((2, 16), (3, 4)), ((3, 2),))),
    Kind(4, 4, ((4,), (3, 2)), static=True),
    Kind(2, 3, ((5, 3), (4, 2)), sinks=(9, 7)),
    Kind(3, 16, ((5, 4),), sinks=(6, 6)),
)


@dataclass(frozen=True)
class Setting:
    """The settings of a cache of two layers."""

    kinds: tuple[Kind, Kind]
    group_size: int
    residual_length: int
    sink_length: int
    dtype: torch.dtype
    backend: str

    def cache(self, capacity: int | None = None) -> KIVILatentCache:
        first, *others = (
            CacheScheme(
                *(kind.k_bits, kind.v_bits, self.group_size, self.residual_length, self.sink_length),
                kind.k_scheme,
                kind.v_scheme,
            )
            for kind in self.kinds
        )
        return KIVILatentCache(
            first,
            [kind.widths for kind in self.kinds],
            layer_schemes={i + 1: scheme for i, scheme in enumerate(others)},
            static_scales={i: kind.scales for i, kind in enumerate(self.kinds) if kind.static},
            backend=self.backend,
            capacity=capacity,
        )

    def states(self, kind: Kind, batch: int, length: int, seed: int) -> list[torch.Tensor]:
        """Random `[B, L, C]` states: channels of unequal size and offset, now and then a constant or a huge token.

        Those of the keys, of the values, and of a block what becomes sinks.
        """
        rng = np.random.default_rng(seed)
        sides = []
        for channels in (*map(sum, kind.widths), *(kind.sinks or ())):
            shape = (batch, length, channels)
            x = rng.standard_normal(shape) * 3.0 ** rng.standard_normal(shape[2]) + rng.integers(-4, 5, shape[2])
            x[rng.random(shape[:2]) < 0.05] = rng.choice((0.0, -7.3, 6e-8, 3e4))
            sides.append(torch.from_numpy(x).to(self.dtype))
        return sides


def append_to(layer: KIVILatentLayer, kind: Kind, states: list[torch.Tensor], real: torch.Tensor | None = None) -> None:
    """Append `states` as a setting makes them; of the sinks those that the layer asks for."""
    sides, dense = states[: len(kind.widths)], None
    if kind.sinks:
        slots = layer.sink_slots(real, states[0].shape[1])
        dense = dict(zip(("keys", "values"), (x[:, :slots] for x in states[-2:]), strict=True))
    layer.append(**dict(zip(("keys", "values"), sides)), real=real, dense=dense)


settings_of_caches = st.builds(
    Setting,
    st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    st.sampled_from((4, 5, 8)),
    st.sampled_from((0, 1, 6)),
    st.sampled_from((0, 4)),
    st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    st.sampled_from(("cpu", "reference")),
)


class SimulatedLayer(SimulatedCache):
    """`SimulatedCache` with tiers of the keys and calibrated scales of the values."""

    def __init__(self, setting: Setting, kind: Kind):
        super().__init__(
            kind.k_bits,
            kind.v_bits,
            setting.group_size,
            setting.residual_length,
            setting.sink_length,
            kind.widths,
        )
        self.setting, self.kind = setting, kind

    def rounded(self, states: torch.Tensor, side: int) -> torch.Tensor:
        if len(self.kind.widths) == 1:
            side = 0
        if side == 0 and self.kind.tiers:
            bits = [b for group in self.kind.tiers for n, b in group for _ in range(n)]
            return torch.stack([self._channel(states[:, i], b) for i, b in enumerate(bits)], dim=1)
        if side == 1 and self.kind.static:
            scale, zero = (x.numpy() for x in self.kind.scales["values"])
            codes = np.floor(
                np.clip((states.float().numpy() - zero) / scale, 0, 2 ** self.bits[1] - 1) + np.float32(0.5)
            )
            return torch.from_numpy(codes * scale + zero).to(states.dtype)
        return super().rounded(states, side)

    @staticmethod
    def _channel(x: torch.Tensor, bits: int) -> torch.Tensor:
        if bits == 16:
            return x
        back = round_trip(x.float().numpy()[None], bits, x.dtype)[0]
        return torch.from_numpy(back.clip(-torch.finfo(x.dtype).max, torch.finfo(x.dtype).max)).to(x.dtype)

    def copy(self) -> "SimulatedLayer":
        other = SimulatedLayer(self.setting, self.kind)
        other.rows = [row.copy() for row in self.rows]
        return other

    def block_nbytes(self) -> int:
        """Bytes of a block, from the design."""
        kind, size, length = self.kind, self.setting.dtype.itemsize, self.block_length
        groups = [(kind.k_bits, kind.widths[0])]
        if kind.tiers:
            groups = [(b, (n,)) for group in kind.tiers for n, b in group]
        bits = sum(block_bits(b, length, widths, self.group_size, "keys", size) for b, widths in groups)
        if len(kind.widths) == 1:
            return bits // 8
        if kind.static:  # per channel, and no parameters
            parameters = 32 * sum(kind.widths[1])
            return (bits + block_bits(kind.v_bits, length, kind.widths[1], 0, "keys", size) - parameters) // 8
        return (bits + block_bits(kind.v_bits, length, kind.widths[1], self.group_size, "values", size)) // 8


@dataclass
class Pair:
    """A cache and its model, of the same setting."""

    setting: Setting
    cache: KIVILatentCache
    layers: list[SimulatedLayer] = field(default_factory=list)
    slots: int = 0

    @classmethod
    def empty(cls, setting: Setting, capacity: int | None = None) -> "Pair":
        return cls(setting, setting.cache(capacity), [SimulatedLayer(setting, kind) for kind in setting.kinds])

    def beside(self, cache: KIVILatentCache) -> "Pair":
        """The pair of a copy of this one's cache."""
        return Pair(self.setting, cache, [layer.copy() for layer in self.layers], self.slots)

    @property
    def rows(self) -> int:
        return len(self.layers[0].rows)

    @property
    def tokens(self) -> int:
        """Of the longest row."""
        return max((len(row.tokens) for row in self.layers[0].rows), default=0)

    def append(self, batch: int, length: int, seed: int, real: torch.Tensor | None) -> None:
        after = []
        for i, model in enumerate(self.layers):
            states = self.setting.states(model.kind, batch, length, seed + i)
            after.append(model.copy())
            sides = len(model.kind.widths)
            after[i].append(states[0], states[sides - 1], real, states[-2:] if model.kind.sinks else None)
            if self.fits(after[i]):
                append_to(self.cache.layer(i), model.kind, states, real)
            else:
                with pytest.raises(ValueError, match=f"capacity={self.cache.capacity}"):
                    append_to(self.cache.layer(i), model.kind, states, real)
                return
        self.layers = after
        self.slots += length

    def fits(self, model: SimulatedLayer) -> bool:
        """Whether a cache of fixed capacity has room for these rows: for their tokens, and for their blocks."""
        if self.cache.capacity is None:
            return True
        exact = model.sink_length + model.residual_length
        blocks = max(1, (self.cache.capacity - exact) // model.block_length)
        return all(len(row.tokens) <= self.cache.capacity and len(row.starts) <= blocks for row in model.rows)

    def check(self) -> None:
        assert self.cache.get_seq_length() == self.slots
        assert self.cache.get_mask_sizes(3, 0) == (self.slots + 3, 0)
        assert self.cache.row_tokens() == [len(row.tokens) for row in self.layers[0].rows]
        for layer, model in zip(self.cache.layers, self.layers, strict=True):
            assert len(layer.rows) == len(model.rows) and layer.slots == self.slots
            if model.rows:
                check_rows(layer, model)
                check_bytes(layer, model)


def check_rows(layer: KIVILatentLayer, model: SimulatedLayer) -> None:
    """Bookkeeping and states of every row."""
    tokens = [[] for _ in model.rows]
    # The sinks of a block have other channels, and are no tiles of the layer.
    first = [len(row.sinks) if model.kind.sinks else 0 for row in model.rows]
    for tile in layer.tiles():
        for i, row in enumerate(tokens):
            for run, (start, count) in enumerate(zip(tile.start[i].tolist(), tile.count[i].tolist(), strict=True)):
                assert count == 0 or start == len(row) + first[i]
                row.extend((tile.keys[i, run, j], tile.values[i, run, j]) for j in range(count))
    table = layer.block_table().tolist()
    for i, (row, expected) in enumerate(zip(layer.rows, model.rows, strict=True)):
        assert (row.sinks, row.packed, row.window) == tuple(
            len(part) for part in (expected.sinks, expected.packed, expected.window)
        )
        ends = [*expected.starts, len(expected.sinks) + len(expected.packed)][1:]
        assert table[1][i][: len(row.blocks)] == expected.starts
        assert list(row.counts) == [end - start for start, end in zip(expected.starts, ends, strict=True)]
        assert table[2][i] == [*row.counts, *[0] * (len(table[2][i]) - len(row.counts))]
        assert [slot for a, b in row.pads for slot in range(a, b)] == [
            slot for slot, held in enumerate(expected.slots) if not held
        ]
        assert len(tokens[i]) + first[i] == len(expected.tokens) == row.tokens
        if tokens[i]:
            for side, states in enumerate(model.row_states(i, first[i])):
                assert same_bits(torch.stack([token[side] for token in tokens[i]]), states)
        for side, name in enumerate(("keys", "values")):
            for j, token in enumerate(expected.sinks):
                assert same_bits(layer.exact.sinks[name][i, j], token[side])


def check_bytes(layer: KIVILatentLayer, model: SimulatedLayer) -> None:
    """The bytes of the tokens held, by the formula; a block that rows share counts once."""
    channels, itemsize = sum(map(sum, model.widths)), model.setting.dtype.itemsize
    of_sink = sum(model.kind.sinks or (channels,))
    exact = sum(len(row.sinks) * of_sink + len(row.window) * channels for row in model.rows)
    references = [slot for row in layer.rows for slot in row.blocks]
    static = 8 * sum(model.widths[1]) if model.kind.static else 0
    expected = len(set(references)) * model.block_nbytes() + 12 * len(references) + exact * itemsize + static
    assert layer.nbytes_used == expected
    assert layer.nbytes >= layer.nbytes_used


def check_pools(caches: list[KIVILatentCache], freed: bool = False) -> None:
    """The blocks of a pool are those that rows of the caches refer to, free slots are others, slack is a quarter.

    Caches share pools if they are forks of one another; `freed`: some have been thrown away, which gives their slots
    back but not their slack, until another of the caches is edited.
    """
    users: dict[int, list[KIVILatentLayer]] = {}
    for layer in (layer for cache in caches for layer in cache.layers if layer.is_initialized):
        users.setdefault(id(layer.pool), []).append(layer)
    for layers in users.values():
        pool, live = layers[0].pool, {slot for layer in layers for row in layer.rows for slot in row.blocks}
        assert pool.live() == live and pool.used == len(live)
        assert len(pool.free) == len(set(pool.free)) and set(pool.free) <= set(range(pool.capacity)) - live
        if freed and pool.capacity > pool.used + pool.used // 4:
            pool.trim()
        assert pool.capacity <= pool.used + pool.used // 4
        for fields in pool.storage.values():
            assert {len(tensor) for tensor in fields.values()} <= {pool.capacity}
    if all(layer.scheme.keys.tiers is None and not layer.scheme.values.static for c in caches for layer in c.layers):
        # Other codecs have tensors of their own.
        assert KIVILatentCache.nbytes_together(*caches) == storage_nbytes([cache.layers for cache in caches])


# ---- the machine


class Machine(RuleBasedStateMachine):
    """Several caches at once; each step does one thing to one of them, chosen by its number."""

    capacity: int | None = None

    def __init__(self):
        super().__init__()
        self.pairs: list[Pair] = []
        self.freed = False

    @initialize(setting=settings_of_caches)
    def start(self, setting: Setting) -> None:
        self.pairs = [Pair.empty(setting, self.capacity)]

    def pair(self, number: int) -> Pair:
        return self.pairs[number % len(self.pairs)]

    def fed(self, number: int) -> Pair:
        pair = self.pair(number)
        assume(pair.rows)
        return pair

    def new_rows(self, pair: Pair, seed: int) -> int:
        return pair.rows or 1 + seed % 3

    numbers = st.integers(0, 2**10)
    seeds = st.integers(0, 2**20)

    @rule(number=numbers, seed=seeds, times=st.integers(1, 9))
    def decode(self, number, seed, times):
        """Tokens one by one."""
        pair = self.pair(number)
        for i in range(times):
            assume(pair.tokens < MOST_TOKENS)
            pair.append(self.new_rows(pair, seed), 1, seed + i, None)

    @rule(number=numbers, seed=seeds, length=st.integers(1, 40))
    def feed(self, number, seed, length):
        pair = self.pair(number)
        assume(pair.tokens + length <= MOST_TOKENS)
        pair.append(self.new_rows(pair, seed), length, seed, None)

    @rule(number=numbers, seed=seeds, length=st.integers(1, 30), share=st.sampled_from((0.0, 0.5, 0.9)))
    def feed_with_pads(self, number, seed, length, share):
        """Left pads, or pads anywhere."""
        pair, rng = self.pair(number), np.random.default_rng(seed)
        assume(pair.tokens + length <= MOST_TOKENS)
        batch = self.new_rows(pair, seed)
        if seed % 2:
            real = torch.from_numpy(rng.random((batch, length)) >= share)
        else:
            real = torch.arange(length) >= torch.from_numpy(rng.integers(0, length + 1, (batch, 1)))
        pair.append(batch, length, seed, real)

    @rule(number=numbers, seed=seeds, bad=st.sampled_from((torch.nan, torch.inf)), side=st.integers(0, 1))
    def feed_what_is_refused(self, number, seed, bad, side):
        """A block that falls due holds what cannot be quantized: the error comes before anything is stored."""
        pair = self.fed(number)
        model, layer = pair.layers[0], pair.cache.layers[0]
        assume(side < len(model.kind.widths))
        bits = 16 if model.kind.tiers and side == 0 else model.bits[side]
        assume(bits != 16)
        length = model.sink_length + model.residual_length + 2 * model.block_length
        states = pair.setting.states(model.kind, pair.rows, length, seed)
        states[side][seed % pair.rows, model.sink_length, 0] = bad
        before = [raw_row(layer, i) for i in range(pair.rows)]
        with pytest.raises(ValueError, match=r"finite|capacity"):
            append_to(layer, model.kind, states)
        after = [raw_row(layer, i) for i in range(pair.rows)]
        assert all(same_bits(x, b[name]) for a, b in zip(after, before, strict=True) for name, x in a.items())

    @rule(number=numbers, seed=seeds)
    def reorder(self, number, seed):
        pair = self.fed(number)
        indices = np.random.default_rng(seed).integers(0, pair.rows, pair.rows).tolist()
        pair.cache.reorder_cache(torch.tensor(indices))
        for model in pair.layers:
            model.select(indices)

    @rule(number=numbers, share=st.floats(0, 1))
    def crop(self, number, share):
        pair = self.fed(number)
        removed = round(share * pair.slots)
        pair.cache.crop(-removed)
        for model in pair.layers:
            model.crop(-removed)
        pair.slots -= removed

    @rule(number=numbers, more=st.integers(1, 5))
    def crop_too_much(self, number, more):
        pair = self.fed(number)
        for amount in (1, -pair.slots - more):
            with pytest.raises(ValueError, match="tokens_to_remove"):
                pair.cache.crop(amount)

    @rule(number=numbers)
    def reset(self, number):
        pair = self.pair(number)
        pair.cache.reset()
        pair.slots = 0
        for model in pair.layers:
            model.rows = []

    # ---- copies

    def keep(self, pair: Pair) -> None:
        self.pairs.append(pair)

    @precondition(lambda self: len(self.pairs) < MOST_CACHES)
    @rule(number=numbers)
    def deepcopy(self, number):
        pair = self.pair(number)
        self.keep(pair.beside(copy.deepcopy(pair.cache)))

    @precondition(lambda self: len(self.pairs) < MOST_CACHES)
    @rule(number=numbers)
    def pickle(self, number):
        """Not to a file: to another process, or by `copy`."""
        pair = self.pair(number)
        self.keep(pair.beside(pickle.loads(pickle.dumps(pair.cache))))

    @precondition(lambda self: len(self.pairs) > 1)
    @rule(number=numbers)
    def forget(self, number):
        self.pairs.pop(number % len(self.pairs))
        self.freed = True

    # ---- after every step

    @invariant()
    def holds(self) -> None:
        for pair in self.pairs:
            pair.check()
        self.check_pools()

    def check_pools(self) -> None:
        check_pools([pair.cache for pair in self.pairs], self.freed)


class GrowingMachine(Machine):
    """Caches that grow: rows are repeated and selected too, and caches saved and loaded."""

    @rule(number=Machine.numbers, repeats=st.integers(1, 3))
    def repeat(self, number, repeats):
        pair = self.fed(number)
        assume(pair.rows * repeats <= MOST_ROWS)
        indices = [i for i in range(pair.rows) for _ in range(repeats)]
        pair.cache.batch_repeat_interleave(repeats)
        for model in pair.layers:
            model.select(indices)

    @rule(number=Machine.numbers, seed=Machine.seeds)
    def select(self, number, seed):
        pair, rng = self.fed(number), np.random.default_rng(seed)
        indices = rng.integers(-pair.rows, pair.rows, rng.integers(1, MOST_ROWS + 1)).tolist()
        pair.cache.batch_select_indices(torch.tensor(indices))
        for model in pair.layers:
            model.select(indices)

    @precondition(lambda self: len(self.pairs) < MOST_CACHES)
    @rule(number=Machine.numbers)
    def fork(self, number):
        pair = self.pair(number)
        before = KIVILatentCache.nbytes_together(*(p.cache for p in self.pairs))
        self.keep(pair.beside(pair.cache.fork()))
        exact = sum(t.nbytes for layer in pair.cache.layers for t in layer.exact.tensors())
        tables = sum(layer.block_table().nbytes for layer in pair.cache.layers if layer.is_initialized)
        assert KIVILatentCache.nbytes_together(*(p.cache for p in self.pairs)) <= before + exact + tables
        self.freed = True  # one of the two may let go blocks that the other holds
        for i, both in enumerate((pair, self.pairs[-1])):  # each goes on by itself, at the same place
            if both.rows and both.tokens < MOST_TOKENS:
                both.append(both.rows, 1, number + i, None)

    @precondition(lambda self: len(self.pairs) < MOST_CACHES)
    @rule(number=Machine.numbers)
    def save_and_load(self, number):
        pair = self.pair(number)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cache.safetensors"
            pair.cache.save(path)
            loaded = KIVILatentCache.load(path, backend=pair.setting.backend)
            assert os.listdir(folder) == [path.name]
        for layer, kind in zip(loaded.layers, pair.setting.kinds, strict=True):
            layer.given_widths = kind.widths
        self.keep(pair.beside(loaded))


class FixedMachine(Machine):
    """Caches of a fixed capacity, which is exceeded now and then; rows own their blocks."""

    capacity = 70

    def new_rows(self, pair: Pair, seed: int) -> int:
        layer = pair.cache.layers[0]
        return pair.rows or (layer.store.batch if layer.is_initialized else 1 + seed % 3)

    def check_pools(self) -> None:
        for layer in (layer for pair in self.pairs for layer in pair.cache.layers if layer.is_initialized):
            store, room = layer.store, layer.layout
            assert len(layer.pool.storage["keys"]) > 0
            slots = torch.arange(store.batch * room.blocks).view(store.batch, -1)
            assert torch.equal(layer.block_table()[0].long(), slots)
            assert all(row.tokens <= room.capacity for row in layer.rows)
            assert layer.nbytes <= storage_nbytes(layer)


def run(machine: type[Machine], examples: int, steps: int, derandomize: bool = True) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            deadline=None,
            derandomize=derandomize,
            max_examples=examples,
            stateful_step_count=steps,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_growing_caches_hold_what_the_model_says():
    run(GrowingMachine, examples=40, steps=20)


def test_caches_of_fixed_capacity_hold_what_the_model_says():
    run(FixedMachine, examples=30, steps=20)


@pytest.mark.slow
@pytest.mark.parametrize("machine", [GrowingMachine, FixedMachine])
def test_long_histories(machine):
    run(machine, examples=1500, steps=50, derandomize=False)
