"""The packed cache: the invariants of the design (section 4), one by one, and the cache as a drop-in.

The `check_*` functions are tests of the production code as it stands when they are called; `test_mutations.py` calls
them on broken code.
"""

import copy
import dataclasses
import io
import itertools
import math
import random
from dataclasses import dataclass

import pytest
import torch
from simulated_cache import SimulatedCache
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from modules import KIVILatentCache, create_kivi_cache
from modules.kernels.packed import _kept_counts
from modules.kivi_cache import CacheScheme, KIVILatentLayer
from tests.helpers import TINY_LLAMA, randomize_vectors, tiny_dense, tiny_split

ODD = ((13, 7), (9, 9, 2))
JOINT = ((24,), (24,))
HEADS = ((16, 16), (16, 16))


@dataclass(frozen=True)
class Setting:
    k_bits: float
    v_bits: float
    group_size: int
    residual_length: int
    sink_length: int
    widths: tuple = ODD
    dtype: torch.dtype = torch.float32

    @property
    def scheme(self) -> CacheScheme:
        return CacheScheme(self.k_bits, self.v_bits, self.group_size, self.residual_length, self.sink_length)

    @property
    def block_length(self) -> int:
        return self.group_size or 128

    @property
    def channels(self) -> tuple[int, int]:
        return sum(self.widths[0]), sum(self.widths[1])

    @property
    def length(self) -> int:
        """Tokens that fill the sinks, more than four blocks, and a part of the window."""
        return max(self.sink_length + 4 * self.block_length + self.residual_length + self.block_length // 2 + 21, 128)

    def layer(self) -> KIVILatentLayer:
        return KIVILatentLayer(self.scheme, self.widths)

    def simulated(self) -> SimulatedCache:
        s = self.scheme
        return SimulatedCache(s.k_bits, s.v_bits, s.group_size, s.residual_length, s.sink_length, self.widths)

    def states(self, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random `[B, L, C]` keys and values: channels of unequal size, with offsets, one of them constant."""
        sides = []
        for channels in self.channels:
            x = torch.randn(batch, length, channels) * 3.0 ** torch.randn(channels) + 4 * torch.randn(channels)
            x[..., 1] = 0.75
            sides.append(x.to(self.dtype))
        return tuple(sides)

    def __str__(self) -> str:
        numbers = "-".join(map(str, dataclasses.astuple(self)[:5]))
        return f"{numbers}-{'/'.join(map(str, self.channels))}-{str(self.dtype)[6:]}"


def every_width_and_group() -> list[Setting]:
    """All key widths with all group sizes; the other fields take turns, so that all their values appear."""
    bits, turns = (2, 3, 4, 5, 6, 8, 16), random.Random(1)
    settings = []
    for i, group_size in enumerate((128, 32, 20, 0)):
        for j, k_bits in enumerate(bits):
            settings.append(
                Setting(
                    k_bits,
                    bits[(j + i + 1) % 5],
                    group_size,
                    (32, 0, 5)[(i + j) % 3],
                    (4, 0)[turns.random() < 0.4],
                    (ODD, JOINT, HEADS)[(i + 2 * j) % 3],
                    (torch.float32, torch.float16, torch.bfloat16)[(i * 5 + j) % 3],
                )
            )
    return settings


SETTINGS = every_width_and_group()
#: Small blocks, so that much happens within few tokens.
SMALL = [
    Setting(2, 2, 20, 5, 4),
    Setting(3, 4, 20, 0, 0, dtype=torch.float16),
    Setting(2, 3, 8, 5, 4, HEADS, torch.bfloat16),
    Setting(16, 16, 20, 5, 4),
    Setting(4, 16, 5, 0, 3),
]
by_setting = pytest.mark.parametrize("setting", SETTINGS, ids=str)
by_small_setting = pytest.mark.parametrize("setting", SMALL, ids=str)


# ---- what a cache holds


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in type, shape and every bit."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (x.clone(memory_format=torch.contiguous_format).view(torch.uint8) for x in (a, b))
    return torch.equal(a, b)


def raw_row(layer: KIVILatentLayer, i: int) -> dict[str, torch.Tensor]:
    """Everything stored of a row, as it lies in memory: sinks, window, the fields of its blocks in order."""
    row = layer.rows[i]
    stored = {f"sink_{side}": layer.exact.sinks[side][i, : row.sinks].clone() for side in ("keys", "values")}
    stored |= {f"window_{side}": layer.exact.window[side][i, : row.window].clone() for side in layer.channels}
    table = layer.block_table()[:, i, : len(row.blocks)].long()
    stored |= {"starts": table[1], "counts": table[2]}
    for side, fields in layer.pool.storage.items():
        stored |= {f"{side}.{name}": tensor[table[0]] for name, tensor in fields.items()}
    return stored


def assert_same_rows(found: KIVILatentLayer, i: int, expected: KIVILatentLayer, j: int) -> None:
    a, b = raw_row(found, i), raw_row(expected, j)
    assert a.keys() == b.keys()
    for name in a:
        assert same_bits(a[name], b[name]), f"row {i}: {name}"


def row_states(layer: KIVILatentLayer, i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`[T, C]` keys and values of one row as attention reads them; their positions have no gap."""
    keys, values, position = [], [], 0
    for tile in layer.tiles():
        for run in range(tile.start.shape[1]):
            count = int(tile.count[i, run])
            if count:
                assert int(tile.start[i, run]) == position
            position += count
            keys.append(tile.keys[i, run, :count])
            values.append(tile.values[i, run, :count])
    assert position == layer.rows[i].tokens
    return torch.cat(keys), torch.cat(values)


def tensors_of(thing, seen: set[int]) -> list[torch.Tensor]:
    """All tensors that an object holds, found without asking it."""
    if id(thing) in seen:
        return []
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        return [thing]
    if isinstance(thing, dict):
        parts = list(thing.values())
    elif isinstance(thing, (list, tuple, set)):
        parts = list(thing)
    else:
        parts = list(vars(thing).values()) if hasattr(thing, "__dict__") else []
    return [tensor for part in parts for tensor in tensors_of(part, seen)]


def storage_nbytes(thing) -> int:
    """Bytes of the distinct storages behind the tensors of an object."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(thing, set())}
    return sum(storages.values())


def block_bits(n_bits: float, length: int, widths: tuple[int, ...], group_size: int, side: str, itemsize: int) -> int:
    """Bits of one side of a block, written out from the design, section 3."""
    channels = sum(widths)
    if n_bits == 16:
        return length * channels * itemsize * 8
    # b bits an element; a plane of a block ends with a whole word of 32 bits.
    planes = {3: (2, 1), 5: (4, 1), 6: (4, 2)}.get(n_bits, (n_bits,))
    codes = channels * sum(math.ceil(length / (32 // plane)) * 32 for plane in planes)
    if length % 32 == 0:
        assert codes == n_bits * length * channels
    # A scale and a zero point of 16 bits: per channel and block, or per token and group of channels.
    if side == "keys":
        return codes + 32 * channels
    return codes + 32 * length * sum(math.ceil(width / (group_size or width)) for width in widths)


def row_nbytes(setting: Setting, tokens: int) -> int:
    """Bytes of one row that was never cropped, from the design."""
    sinks = min(tokens, setting.sink_length)
    blocks = max(0, (tokens - sinks - setting.residual_length) // setting.block_length)
    exact = tokens - blocks * setting.block_length
    bits = sum(
        block_bits(n_bits, setting.block_length, widths, setting.group_size, side, setting.dtype.itemsize)
        for n_bits, widths, side in zip(
            (setting.k_bits, setting.v_bits), setting.widths, ("keys", "values"), strict=True
        )
    )
    table = 12 * blocks
    return blocks * bits // 8 + table + exact * sum(setting.channels) * setting.dtype.itemsize


def check_accounting(layer: KIVILatentLayer) -> None:
    """Free slots, table, sizes and slack agree with the rows."""
    pool, used = layer.pool, [slot for row in layer.rows for slot in row.blocks]
    assert pool.live() == set(used) and pool.used == len(set(used))
    assert set(pool.free) == set(range(pool.capacity)) - set(used)
    assert pool.capacity <= pool.used + pool.used // 4
    for fields in pool.storage.values():
        assert {len(tensor) for tensor in fields.values()} <= {pool.capacity}

    exact = sum(row.sinks + row.window for row in layer.rows)
    channels = sum(layer.channels.values())
    expected = pool.used * pool.slot_nbytes + 12 * len(used) + exact * channels * layer.dtype.itemsize
    assert layer.nbytes_used == expected
    assert layer.nbytes == storage_nbytes(layer)
    room = layer.scheme.sink_length + layer.scheme.residual_length + layer.scheme.block_length
    slack = pool.used * pool.slot_nbytes // 4 + (len(layer.rows) * room - exact) * channels * layer.dtype.itemsize
    table_slack = 12 * (len(layer.rows) * max(len(row.blocks) for row in layer.rows) - len(used))
    assert 0 <= layer.nbytes - layer.nbytes_used <= slack + table_slack


def chunks_of(length: int, largest: int) -> list[int]:
    """A random composition of `length`, from the seed of the test."""
    sizes = []
    while sum(sizes) < length:
        sizes.append(min(int(torch.randint(1, largest + 1, ())), length - sum(sizes)))
    return sizes


def feed(layer, keys, values, sizes, real=None):
    start = 0
    for size in sizes:
        piece = slice(start, start + size)
        layer.append(keys[:, piece], values[:, piece], *([] if real is None else [real[:, piece]]))
        start += size
    return layer


# ---- invariant 1: feeding order


def check_feeding_order(setting: Setting, length: int | None = None) -> None:
    """One piece, chunks and single tokens leave the same bits, and what the simulated cache leaves."""
    length = length or setting.length
    keys, values = setting.states(2, length)
    whole = feed(setting.layer(), keys, values, [length])
    others = [
        feed(setting.layer(), keys, values, [1] * length),
        feed(setting.layer(), keys, values, chunks_of(length, 7)),
        feed(setting.layer(), keys, values, chunks_of(length, 2 * setting.block_length)),
    ]
    for other in others:
        for i in range(2):
            assert_same_rows(other, i, whole, i)
        assert other.get_seq_length() == whole.get_seq_length() == length
    simulated = setting.simulated()
    simulated.append(keys, values)
    for layer in (whole, *others):
        for found, expected in zip(layer.states(), simulated.states(), strict=True):
            assert same_bits(found, expected)
    assert whole.pool.used >= 2 * 4
    check_accounting(whole)


@by_setting
def test_feeding_order_does_not_matter(setting):
    check_feeding_order(setting)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8, 16])
def test_feeding_order_with_the_default_window(bits):
    check_feeding_order(Setting(bits, bits, 128, 32, 4, ((40,), (24,)), torch.float16), length=700)


# ---- invariant 2: written once


@by_small_setting
def test_blocks_are_written_once(setting, monkeypatch):
    keys, values = setting.states(2, 300)
    layer = setting.layer()
    layer.append(keys[:, :1], values[:, :1])
    encoded, written = [], []
    encode, write = layer.pool.encode, layer.pool.write
    monkeypatch.setattr(layer.pool, "encode", lambda states, _: encoded.append(states["keys"].shape) or encode(states))
    monkeypatch.setattr(layer.pool, "write", lambda *batches: written.extend(now := write(*batches)) or now)
    held: list[dict[str, torch.Tensor]] = [{}, {}]
    start = 1
    for size in [*([1] * 60), *chunks_of(239, 40)]:
        layer.append(keys[:, start : start + size], values[:, start : start + size])
        start += size
        for i, before in enumerate(held):
            now = raw_row(layer, i)
            for name, tensor in before.items():
                if not name.startswith("window"):
                    assert same_bits(now[name][: len(tensor)], tensor), name
            held[i] = now
    blocks = (300 - setting.sink_length - setting.residual_length) // setting.block_length
    assert [len(row.blocks) for row in layer.rows] == [blocks, blocks]
    assert sum(shape[0] for shape in encoded) == sum(map(len, written)) == 2 * blocks
    assert {shape[1] for shape in encoded} == {setting.block_length}


# ---- invariant 3: growth


class AllocationMeter(TorchDispatchMode):
    """Counts the bytes of new storages that operations return."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage().data_ptr() for t in tensors_of([args, kwargs or {}], set())}
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_of([result], set()):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                known.add(storage.data_ptr())
                self.nbytes += storage.nbytes()
        return result


def test_the_pool_grows_geometrically_and_appends_are_flat(monkeypatch):
    setting, steps = Setting(2, 2, 4, 3, 0, ((5,), (3,))), 2000
    layer = setting.layer()
    layer.append(*setting.states(1, 8))
    resized = []
    grow = layer.pool._grow
    monkeypatch.setattr(layer.pool, "_grow", lambda capacity: resized.append(capacity) or grow(capacity))
    keys, values = setting.states(1, steps)
    costs = []
    for t in range(steps):
        count = len(resized)
        with AllocationMeter() as meter:
            layer.append(keys[:, t : t + 1], values[:, t : t + 1])
        costs.append((meter.nbytes, len(resized) > count))

    blocks = layer.pool.used
    assert blocks == (steps + 8 - 3) // 4
    # Up to sixteen blocks an eighth is little or nothing; then every reallocation makes the pool an eighth larger.
    assert len(resized) <= 16 + math.ceil(math.log(blocks / 8, 1.125))
    plain = [cost for cost, grew in costs if not grew]
    assert len(plain) == steps - len(resized)
    assert max(plain[steps // 2 :]) <= max(plain[:100])
    # All reallocations together: the sum of a geometric series of ratio 1.125, and rounding of small pools.
    growth = sum(cost for cost, grew in costs if grew)
    assert growth <= 12 * layer.pool.nbytes + len(resized) * max(plain)


def test_a_single_append_copies_no_history():
    """After 1,000 or 20,200 tokens the next 40 allocate the same bytes."""
    setting = Setting(2, 2, 32, 5, 4, JOINT)
    costs = []
    for length in (1000, 1000 + 600 * setting.block_length):
        layer = feed(setting.layer(), *setting.states(1, length), [length])
        held = {tensor.data_ptr() for fields in layer.pool.storage.values() for tensor in fields.values()}
        step = setting.states(1, 40)
        _kept_counts.cache_clear()  # which all layers share
        with AllocationMeter() as meter:
            feed(layer, *step, [1] * 40)
        assert held == {tensor.data_ptr() for fields in layer.pool.storage.values() for tensor in fields.values()}
        costs.append(meter.nbytes)
    assert costs[0] == costs[1]


# ---- invariant 4: true size


@by_setting
def test_sizes_are_those_of_the_formula(setting):
    layer, batch = setting.layer(), 2
    keys, values = setting.states(batch, setting.length)
    assert layer.nbytes == layer.nbytes_used == 0
    length = 0
    for size in (1, 3, 1, 40, 1, setting.length - 46):
        feed(layer, keys[:, length : length + size], values[:, length : length + size], [size])
        length += size
        assert layer.nbytes_used == batch * row_nbytes(setting, length)
        assert layer.nbytes_used == batch * setting.scheme.layer_nbytes(length, setting.widths, setting.dtype)
        check_accounting(layer)
    layer.reset()
    assert layer.nbytes == layer.nbytes_used == storage_nbytes(layer) == 0


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 31, 36, 37, 163, 164, 165, 292, 4096])
def test_layer_nbytes_at_the_edges(length):
    setting = Setting(2, 3, 128, 32, 4)
    assert setting.scheme.layer_nbytes(length, setting.widths, setting.dtype) == row_nbytes(setting, length)


@pytest.mark.parametrize(
    "n_bits, group_size, bits",
    [(2, 128, 2.25), (2, 64, 2.5), (2, 32, 3.0), (3, 128, 3.25), (4, 128, 4.25), (8, 32, 9.0), (3, 32, 4.0)],
)
def test_bits_per_element_with_parameters(n_bits, group_size, bits):
    channels = 256
    setting = Setting(n_bits, n_bits, group_size, 0, 0, ((channels,), (channels,)), torch.float16)
    layer = feed(setting.layer(), *setting.states(1, 8 * group_size), [8 * group_size])
    packed = layer.nbytes_used - 12 * layer.pool.used
    assert packed * 8 == bits * 2 * channels * 8 * group_size


@pytest.mark.parametrize("length, ratio", [(4096, 11.4), (32768, 13.5)])
def test_the_ratio_to_the_dense_cache(length, ratio):
    """2 bits, group 128, joint half rank of 1,024 channels a side, an fp16 model: everything counted."""
    setting = Setting(2, 2, 128, 32, 4, ((512,), (512,)), torch.float16)
    keys, values = (torch.randn(1, length, 512).half() for _ in range(2))
    cache = KIVILatentCache(setting.scheme, [setting.widths])
    cache.layers[0].append(keys, values)
    dense = 2 * 1024 * 2 * length
    assert dense / cache.nbytes_used >= ratio
    assert cache.nbytes_used == row_nbytes(setting, length)
    assert cache.nbytes == storage_nbytes(cache)
    assert cache.nbytes <= 1.25 * cache.nbytes_used + 2 * 1024 * (4 + 32 + 128)


# ---- invariant 5: rows


def padded_masks(batch: int, length: int) -> torch.Tensor:
    """`[B, L]`: left pads of different lengths, and pads scattered through the later tokens; the first row has none."""
    real = torch.rand(batch, length) < 0.8
    for i in range(batch):
        real[i, : 11 * i] = False
    real[0] = True
    real[batch - 1, length // 2 : length // 2 + 30] = False
    return real


def check_rows_are_independent(setting: Setting) -> None:
    """Pads are not stored: every row of a padded batch holds what it holds alone."""
    batch, length = 4, 150
    keys, values = setting.states(batch, length)
    real = padded_masks(batch, length)
    for sizes in ([length], [60, 1, 1, 30, 1, 57], [1] * length):
        layer = feed(setting.layer(), keys, values, sizes, real)
        assert layer.get_seq_length() == length
        assert [row.tokens for row in layer.rows] == real.sum(1).tolist()
        for i in range(batch):
            alone = feed(setting.layer(), keys[i : i + 1, real[i]], values[i : i + 1, real[i]], [int(real[i].sum())])
            assert_same_rows(layer, i, alone, 0)
            for found, expected in zip(row_states(layer, i), alone.states(), strict=True):
                assert same_bits(found, expected[0])
        used = sum(row_nbytes(setting, tokens) for tokens in real.sum(1).tolist())
        assert layer.nbytes_used == used
        check_accounting(layer)


@by_small_setting
def test_rows_are_independent(setting):
    check_rows_are_independent(setting)


def test_a_row_may_start_later_and_pause():
    setting = SMALL[0]
    keys, values = setting.states(2, 60)
    real = torch.ones(2, 60, dtype=torch.bool)
    real[1, :40] = False
    layer = feed(setting.layer(), keys, values, [10, 10, 10, 30], real)
    assert [row.tokens for row in layer.rows] == [60, 20]
    assert_same_rows(layer, 1, feed(setting.layer(), keys[1:, 40:], values[1:, 40:], [20]), 0)
    # A chunk in which nobody has a token adds slots only.
    before = [raw_row(layer, i) for i in range(2)]
    layer.append(keys[:, :3], values[:, :3], torch.zeros(2, 3, dtype=torch.bool))
    assert layer.get_seq_length() == 63
    for i in range(2):
        assert all(same_bits(a, b) for a, b in zip(raw_row(layer, i).values(), before[i].values(), strict=True))


def test_a_broken_row_does_not_reach_another():
    """An overflow in a 16-bit block of one row must not be read, not even times zero, as part of a shorter row."""
    setting = Setting(16, 16, 20, 5, 4)
    keys, values = setting.states(2, 150)
    real = torch.ones(2, 150, dtype=torch.bool)
    real[1, :140] = False
    keys[0, 10:40], values[0, 10:40] = torch.inf, torch.nan
    layer = feed(setting.layer(), keys, values, [150], real)
    for tile in layer.tiles():
        assert torch.isfinite(tile.keys[1]).all()
        assert torch.isfinite(tile.values[1]).all()


@pytest.mark.parametrize("tokens", [1, 20, 256, 10000])
def test_tiles_cover_every_row_once(tokens):
    setting = SMALL[0]
    keys, values = setting.states(3, 200)
    layer = feed(setting.layer(), keys, values, [200], padded_masks(3, 200))
    whole = list(layer.tiles())
    pieces = list(layer.tiles(tokens))
    for i in range(3):
        found = [
            (int(tile.start[i, run]), int(tile.count[i, run]))
            for tile in pieces
            for run in range(tile.start.shape[1])
            if tile.count[i, run]
        ]
        assert sum(count for _, count in found) == layer.rows[i].tokens
        assert all(a[0] + a[1] == b[0] for a, b in itertools.pairwise(found))
    for tile in pieces + whole:
        assert torch.isfinite(tile.keys).all()
        assert torch.isfinite(tile.values).all()
        assert tile.keys.shape[1] * tile.keys.shape[2] <= max(tokens, 256, setting.block_length + 5)


def test_states_never_mixes_rows_of_equal_length_and_different_layout():
    """Two rows of 23 tokens: one packed a block before the cut, the other kept all of them in the window."""
    setting = Setting(2, 2, 20, 5, 0)
    keys, values = setting.states(2, 25)
    real = torch.ones(2, 25, dtype=torch.bool)
    real[1, 24] = False
    layer = feed(setting.layer(), keys, values, [25], real)
    layer.crop(-2)
    assert [(len(row.blocks), row.tokens) for row in layer.rows] == [(1, 23), (0, 23)]
    try:
        found = layer.states()
    except ValueError:
        return
    for i in range(2):
        for side, expected in zip(found, row_states(layer, i), strict=True):
            assert torch.equal(side[i], expected)


# ---- invariant 6: editing


def check_reorder(setting: Setting) -> None:
    """A reorder with duplicates moves packed and exact parts alike, and copies no packed byte it need not."""
    batch, length, step = 4, 3 * setting.block_length + setting.residual_length + 10, setting.block_length
    keys, values = setting.states(batch, length)
    later = setting.states(batch, 2 * step)
    layer, simulated = feed(setting.layer(), keys, values, [length]), setting.simulated()
    simulated.append(keys, values)
    for indices in ([2, 2, 0, 3], [3, 1, 0, 2], [0, 0, 0, 0], [1, 3, 2, 0]):
        written = layer.pool.used
        layer.reorder_cache(torch.tensor(indices))
        simulated.select(indices)
        assert layer.pool.used <= written
        check_states(layer, simulated)
        check_accounting(layer)
        # After the beams have parted their blocks must not fall on each other.
        feed(layer, *later, [step, 1, step - 1])
        simulated.append(*later)
        check_states(layer, simulated)
        check_accounting(layer)


def check_states(layer: KIVILatentLayer, simulated: SimulatedCache) -> None:
    """Every row reads as the simulated one, with its blocks where that has them."""
    assert [row.tokens for row in layer.rows] == [len(row.tokens) for row in simulated.rows]
    table = layer.block_table()
    for i, row in enumerate(simulated.rows):
        assert layer.get_seq_length() == len(row.slots)
        starts = table[1, i, : len(layer.rows[i].blocks)].tolist()
        assert starts == row.starts
        assert table[2, i].sum().item() == len(row.packed)
        assert (layer.rows[i].sinks, layer.rows[i].window) == (len(row.sinks), len(row.window))
        if row.tokens:
            for found, expected in zip(row_states(layer, i), simulated.row_states(i), strict=True):
                assert same_bits(found, expected)


@by_small_setting
def test_reorder(setting):
    check_reorder(setting)


def test_a_permutation_touches_no_packed_byte():
    setting = SMALL[0]
    layer = feed(setting.layer(), *setting.states(4, 200), [200])
    before = {
        (side, name): (tensor.data_ptr(), tensor.clone())
        for side, fields in layer.pool.storage.items()
        for name, tensor in fields.items()
    }
    with AllocationMeter() as meter:
        layer.reorder_cache(torch.tensor([3, 0, 1, 2]))
    for (side, name), (address, kept) in before.items():
        assert layer.pool.storage[side][name].data_ptr() == address
        used = sorted(slot for row in layer.rows for slot in row.blocks)
        assert same_bits(layer.pool.storage[side][name][used], kept[used])
    assert meter.nbytes <= sum(t.nbytes for t in layer.exact.tensors()) + 64


@by_small_setting
def test_repeat_and_select(setting):
    length = 150
    keys, values = setting.states(3, length)
    layer, simulated = feed(setting.layer(), keys, values, [length]), setting.simulated()
    simulated.append(keys, values)
    blocks = layer.pool.used

    layer.batch_repeat_interleave(3)
    simulated.select([0, 0, 0, 1, 1, 1, 2, 2, 2])
    check_states(layer, simulated)
    check_accounting(layer)
    assert layer.pool.used == blocks
    assert all(layer.rows[i].blocks == layer.rows[i // 3 * 3].blocks for i in range(9))

    later = setting.states(9, setting.block_length)
    feed(layer, *later, [setting.block_length])
    simulated.append(*later)
    check_states(layer, simulated)
    assert layer.pool.used == blocks + 9

    layer.batch_select_indices(torch.tensor([8, 1, 1, 5]))
    simulated.select([8, 1, 1, 5])
    check_states(layer, simulated)
    check_accounting(layer)

    layer.batch_select_indices(torch.tensor([True, False, True, True]))
    simulated.select([0, 2, 3])
    check_states(layer, simulated)
    check_accounting(layer)

    layer.batch_select_indices(torch.tensor([1]))
    simulated.select([1])
    check_states(layer, simulated)
    check_accounting(layer)
    per_row = (length + setting.block_length - setting.sink_length - setting.residual_length) // setting.block_length
    assert layer.pool.used == per_row
    single = setting.states(1, 2 * setting.block_length)
    feed(layer, *single, [1] * (2 * setting.block_length))
    simulated.append(*single)
    check_states(layer, simulated)

    layer.reset()
    assert (layer.get_seq_length(), layer.rows, layer.pool, layer.nbytes) == (0, [], None, 0)


def test_shared_blocks_count_once():
    setting = SMALL[0]
    layer = feed(setting.layer(), *setting.states(1, 205), [205])
    alone, exact = layer.nbytes_used, layer.rows[0].sinks + layer.rows[0].window
    blocks = len(layer.rows[0].blocks)
    layer.batch_repeat_interleave(5)
    assert layer.nbytes_used == alone + 4 * (12 * blocks + exact * sum(setting.channels) * 4)
    check_accounting(layer)


#: What a cut of a 150-token row leaves, in SMALL[0]: sinks 4, blocks of 20 at 4, 24, …, window 5 to 24.
CUTS = {
    "nothing": 0,
    "one token of the window": 1,
    "the window": 6,
    "one token of a block": 7,
    "half a block": 16,
    "two blocks and a half": 56,
    "all blocks": 146,
    "into the sinks": 148,
    "everything": 150,
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS.keys())
@by_small_setting
def test_crop_and_go_on(cut, setting):
    keys, values = setting.states(2, 150)
    later = setting.states(2, 150)
    for sizes in ([150], [1] * 150, chunks_of(150, 40)):
        layer, simulated = feed(setting.layer(), keys, values, [150]), setting.simulated()
        simulated.append(keys, values)
        held = [raw_row(layer, i) for i in range(2)]
        layer.crop(-cut)
        simulated.crop(-cut)
        assert layer.get_seq_length() == 150 - cut
        check_states(layer, simulated)
        check_accounting(layer)
        # Nothing was quantized a second time: the codes that remain are the ones that were there.
        for i in range(2):
            now = raw_row(layer, i)
            for name, tensor in now.items():
                if name != "counts":
                    assert same_bits(tensor, held[i][name][: len(tensor)]), name
        feed(layer, *later, sizes)
        simulated.append(*later)
        check_states(layer, simulated)
        check_accounting(layer)


def test_crop_inside_a_block_moves_the_next_one():
    setting = SMALL[0]
    layer = feed(setting.layer(), *setting.states(1, 150), [150])
    assert layer.block_table()[1:].tolist() == [[[4, 24, 44, 64, 84, 104, 124]], [[20] * 7]]
    layer.crop(-56)
    assert layer.block_table()[1:].tolist() == [[[4, 24, 44, 64, 84]], [[20, 20, 20, 20, 10]]]
    feed(layer, *setting.states(1, 45), [45])
    assert layer.block_table()[1:].tolist() == [[[4, 24, 44, 64, 84, 94, 114]], [[20, 20, 20, 20, 10, 20, 20]]]
    layer.crop(-(5 + 20 + 20 + 3))
    assert layer.block_table()[1:].tolist() == [[[4, 24, 44, 64, 84]], [[20, 20, 20, 20, 7]]]


def test_crop_counts_slots_of_padded_rows():
    setting = SMALL[0]
    keys, values = setting.states(3, 150)
    real = padded_masks(3, 150)
    layer, simulated = feed(setting.layer(), keys, values, [40, 60, 50], real), setting.simulated()
    simulated.append(keys, values, real)
    for cut in (0, 1, 1, 9, 30, 44, 20, 31, 9, 5):
        layer.crop(-cut)
        simulated.crop(-cut)
        check_states(layer, simulated)
        check_accounting(layer)
    assert layer.get_seq_length() == 0


@pytest.mark.parametrize("amount", [1, 149, -151])
def test_a_crop_of_what_is_not_there_is_refused(amount):
    setting = SMALL[0]
    layer = feed(setting.layer(), *setting.states(1, 150), [150])
    before = raw_row(layer, 0)
    with pytest.raises(ValueError, match=rf"tokens_to_remove={amount}: must be 0 or negative.*150"):
        layer.crop(amount)
    assert all(same_bits(a, b) for a, b in zip(raw_row(layer, 0).values(), before.values(), strict=True))


def test_reset_starts_anew():
    setting = SMALL[0]
    layer = feed(setting.layer(), *setting.states(3, 150), [150])
    layer.reset()
    keys, values = setting.states(1, 90)
    feed(layer, keys, values, [90])
    assert_same_rows(layer, 0, feed(setting.layer(), keys, values, [90]), 0)
    check_accounting(layer)


@pytest.mark.parametrize("copied", ["deepcopy", "saved and loaded"])
@by_small_setting
def test_copies_are_whole_and_independent(setting, copied):
    keys, values = setting.states(2, 150)
    cache = KIVILatentCache(setting.scheme, [setting.widths])
    feed(cache.layers[0], keys, values, [150], padded_masks(2, 150))
    cache.reorder_cache(torch.tensor([1, 1]))
    if copied == "deepcopy":
        other = copy.deepcopy(cache)
    else:
        file = io.BytesIO()
        torch.save(cache, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    layer, copied_layer = cache.layers[0], other.layers[0]
    assert other.scheme == cache.scheme
    before = [raw_row(layer, i) for i in range(2)]
    addresses = [{t.data_ptr() for t in tensors_of(x, set()) if t.numel()} for x in (layer, copied_layer)]
    assert addresses[0].isdisjoint(addresses[1])
    for i in range(2):
        assert_same_rows(copied_layer, i, layer, i)

    later = setting.states(2, 60)
    other.crop(-30)
    feed(copied_layer, *later, [60])
    check_accounting(copied_layer)
    for i in range(2):
        assert all(same_bits(a, b) for a, b in zip(raw_row(layer, i).values(), before[i].values(), strict=True))
    cache.crop(-30)
    feed(layer, *later, [1] * 60)
    for i in range(2):
        assert_same_rows(copied_layer, i, layer, i)


def check_window(layer: KIVILatentLayer, setting: Setting) -> None:
    for row in layer.rows:
        assert row.sinks == min(row.tokens, setting.sink_length)
        later = row.tokens - row.sinks
        if later >= setting.residual_length:
            assert setting.residual_length <= row.window <= setting.residual_length + setting.block_length - 1
        else:
            assert row.window == later
        assert set(row.counts) <= {setting.block_length}


@by_small_setting
def test_the_window_never_holds_less_than_promised(setting):
    keys, values = setting.states(3, 260)
    real = padded_masks(3, 260)
    for sizes, mask in (([1] * 260, None), (chunks_of(260, 30), None), (chunks_of(260, 30), real)):
        layer, start = setting.layer(), 0
        for size in sizes:
            piece = slice(start, start + size)
            layer.append(keys[:, piece], values[:, piece], None if mask is None else mask[:, piece])
            start += size
            check_window(layer, setting)


# ---- invariant 7: 16 bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [128, 20, 0])
def test_sixteen_bits_return_what_was_fed(dtype, group_size):
    setting = Setting(16, 16, group_size, 5, 4, dtype=dtype)
    keys, values = setting.states(2, 600)
    layer = feed(setting.layer(), keys, values, chunks_of(600, 50))
    for found, expected in zip(layer.states(), (keys, values), strict=True):
        assert same_bits(found, expected)
    assert layer.pool.used >= 8


def test_each_side_has_its_own_width():
    keys, values = Setting(2, 2, 32, 0, 0).states(1, 320)
    exact_values = feed(Setting(2, 16, 32, 0, 0).layer(), keys, values, [320])
    exact_keys = feed(Setting(16, 2, 32, 0, 0).layer(), keys, values, [320])
    assert same_bits(exact_values.states()[1], values)
    assert same_bits(exact_keys.states()[0], keys)
    assert not torch.equal(exact_values.states()[0], keys)
    assert not torch.equal(exact_keys.states()[1], values)


# ---- against the simulated cache


@pytest.mark.parametrize("seed", range(4))
@by_small_setting
def test_any_history_reads_as_the_simulated_one(setting, seed):
    """Prefill, chunks, single steps, pads, crops, reorders, repeats, selections, in random order."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    layer, simulated, batch = setting.layer(), setting.simulated(), 3
    for step in range(30):
        kind = rng.choice(["chunk", "chunk", "step", "step", "pads", "crop", "reorder", "select"]) if step else "chunk"
        if kind in ("chunk", "step", "pads"):
            length = 1 if kind == "step" else rng.choice([2, 9, 33, 70])
            keys, values = setting.states(batch, length)
            real = torch.rand(batch, length) < 0.7 if kind == "pads" else None
            layer.append(keys, values, real)
            simulated.append(keys, values, real)
        elif kind == "crop":
            cut = rng.randint(0, min(layer.get_seq_length(), 45))
            layer.crop(-cut)
            simulated.crop(-cut)
        else:
            repeat = kind == "select" and batch <= 2
            indices = [rng.randrange(batch) for _ in range(batch + repeat - (kind == "select" and batch > 2))]
            (layer.reorder_cache if kind == "reorder" else layer.batch_select_indices)(torch.tensor(indices))
            simulated.select(indices)
            batch = len(indices)
        check_states(layer, simulated)
        check_accounting(layer)


# ---- refusals


@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("single", [True, False])
def test_a_refused_append_leaves_the_cache_as_it_was(side, bad, single):
    setting = Setting(2, 2, 20, 5, 4)
    keys, values = setting.states(2, 180)
    # The block of tokens 144 to 163 is due with token 168; one row of two is fine.
    {"keys": keys, "values": values}[side][1, 145, 3] = bad
    layer = feed(setting.layer(), keys, values, [100, 68])
    before, sizes = [raw_row(layer, i) for i in range(2)], (layer.slots, layer.nbytes_used, layer.nbytes)
    with pytest.raises(ValueError, match="finite"):
        feed(layer, keys[:, 168:], values[:, 168:], [1 if single else 12])
    assert (layer.slots, layer.nbytes_used, layer.nbytes) == sizes
    for i in range(2):
        assert all(same_bits(a, b) for a, b in zip(raw_row(layer, i).values(), before[i].values(), strict=True))
    check_accounting(layer)
    # The bad token gone, the cache goes on.
    layer.crop(145 - 168)
    fine, simulated = setting.states(2, 40), setting.simulated()
    feed(layer, *fine, [40])
    simulated.append(*(torch.cat([old[:, :145], new], 1) for old, new in zip((keys, values), fine, strict=True)))
    check_states(layer, simulated)
    check_accounting(layer)


@pytest.mark.parametrize(
    "change",
    [
        lambda k, v: (k[..., :-1], v),
        lambda k, v: (k, torch.cat([v, v], -1)),
        lambda k, v: (k.half(), v.half()),
        lambda k, v: (k, v.double()),
        lambda k, v: (k[:1], v[:1]),
        lambda k, v: (k.repeat(2, 1, 1), v.repeat(2, 1, 1)),
        lambda k, v: (k, v[:, :-1]),
    ],
    ids=["key width", "value width", "type", "value type", "fewer rows", "more rows", "value length"],
)
def test_states_that_do_not_fit_are_refused(change):
    setting = SMALL[0]
    layer = feed(setting.layer(), *setting.states(2, 50), [50])
    before = [raw_row(layer, i) for i in range(2)]
    with pytest.raises(ValueError, match=r"(keys|values): \[batch, tokens, channels\] of .* must be .* as the cache"):
        layer.append(*change(*setting.states(2, 3)))
    assert layer.get_seq_length() == 50
    for i in range(2):
        assert all(same_bits(a, b) for a, b in zip(raw_row(layer, i).values(), before[i].values(), strict=True))


def test_a_refused_first_append_leaves_the_cache_empty():
    setting = SMALL[0]
    layer = setting.layer()
    keys, values = setting.states(3, 50)
    with pytest.raises(ValueError, match="keys"):
        layer.append(keys[..., :-1].half(), values.half())
    broken = keys.clone()
    broken[0, 10] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        layer.append(broken, values)
    assert layer.get_seq_length() == layer.nbytes == 0
    keys, values = setting.states(2, 50)
    feed(layer, keys, values, [50])
    assert_same_rows(layer, 1, feed(setting.layer(), keys[1:], values[1:], [50]), 0)


def test_rows_of_different_lengths_are_not_one_tensor():
    setting = SMALL[0]
    layer = feed(setting.layer(), *setting.states(2, 50), [50], padded_masks(2, 50))
    with pytest.raises(ValueError, match=r"rows of .* tokens"):
        layer.states()


def test_gradients_are_not_kept():
    setting = SMALL[0]
    keys, values = (x.requires_grad_() for x in setting.states(1, 50))
    layer = feed(setting.layer(), keys, values, [50])
    assert not any(tensor.requires_grad for tensor in tensors_of(layer, set()))


# ---- the cache as a whole


def heads_of(x: torch.Tensor, heads: int) -> torch.Tensor:
    """`[B, L, C]` to `[B, H, L, D]`."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


@pytest.mark.parametrize("bits", [(2, 2), (3, 4), (16, 16)])
@pytest.mark.parametrize("group_size", [5, 32, 0])
def test_update_returns_what_attention_sees(bits, group_size):
    """New tokens and the window as they are, older ones as stored; blocks are packed after the result is made."""
    heads, sizes, length = (3, 2), (6, 10), 400
    widths = tuple((size,) * head for size, head in zip(sizes, heads, strict=True))
    setting = Setting(*bits, group_size, 5, 4, widths)
    cache = create_kivi_cache(*bits, group_size, 5, 4)
    simulated = [setting.simulated() for _ in range(2)]
    start = 0
    for size in [170, 1, 1, *chunks_of(length - 172, 60)]:
        for layer_idx, slow in enumerate(simulated):
            new = setting.states(2, size)
            seen = [torch.cat(pair, 1) for pair in zip(slow.states(), new, strict=True)] if start else new
            found = cache.update(*(heads_of(x, h) for x, h in zip(new, heads, strict=True)), layer_idx)
            for returned, expected, head in zip(found, seen, heads, strict=True):
                assert same_bits(returned, heads_of(expected, head))
            slow.append(*new)
            assert cache.get_mask_sizes(7, layer_idx) == (start + size + 7, 0)
        start += size
        assert cache.get_seq_length() == start
    assert len(cache.layers) == 2
    for layer, slow in zip(cache.layers, simulated, strict=True):
        check_states(layer, slow)
        check_accounting(layer)
    assert cache.nbytes == sum(layer.nbytes for layer in cache.layers) == storage_nbytes(cache)
    assert cache.nbytes_used == 2 * 2 * row_nbytes(setting, length)

    for edit, indices in (
        (lambda: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda: cache.batch_select_indices(torch.tensor([3, 0])), [3, 0]),
    ):
        edit()
        for layer, slow in zip(cache.layers, simulated, strict=True):
            slow.select(indices)
            check_states(layer, slow)
    cache.crop(-33)
    for layer, slow in zip(cache.layers, simulated, strict=True):
        slow.crop(-33)
        check_states(layer, slow)
    assert cache.get_seq_length() == length - 33
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes, cache.nbytes_used) == (0, 0, 0)


def test_an_empty_cache_answers_what_the_library_asks():
    cache = create_kivi_cache()
    assert (cache.get_seq_length(), cache.nbytes, cache.nbytes_used, cache.row_tokens()) == (0, 0, 0, [])
    assert cache.get_mask_sizes(9, 0) == (9, 0)
    assert cache.get_max_length(0) == -1
    assert not cache.is_compileable
    for edit in (
        lambda: cache.reorder_cache(torch.tensor([0])),
        lambda: cache.batch_repeat_interleave(2),
        lambda: cache.crop(0),
        cache.reset,
        lambda: copy.deepcopy(cache),
    ):
        edit()
    assert "empty" in repr(cache)


def test_repr_tells_settings_and_size():
    setting = Setting(2, 4, 20, 5, 4)
    cache = KIVILatentCache(setting.scheme, [setting.widths])
    feed(cache.layers[0], *setting.states(2, 50), [50])
    text = repr(cache)
    for piece in ("keys 2-bit", "values 4-bit", "residual_length=5", "sink_length=4", "[50, 50]"):
        assert piece in text
    assert f"{cache.nbytes_used:,} bytes used" in text


def test_the_widths_of_a_model_are_its_ranks(tmp_path):
    model = tiny_split(tmp_path, ranks={"k_proj": [13, 7], "v_proj": [9, 20]}, head_group_size=2, group_size=20)
    cache = model.create_kivi_cache()
    with torch.no_grad():
        model(torch.randint(1, 97, (2, 60)), past_key_values=cache)
    assert {(layer.channels["keys"], layer.channels["values"]) for layer in cache.layers} == {(20, 29)}
    scheme, widths = cache.scheme, ((13, 7), (9, 20))
    assert cache.nbytes_used == 3 * 2 * scheme.layer_nbytes(60, widths, torch.float32)
    assert cache.nbytes == storage_nbytes(cache)


# ---- as a drop-in for stock models


def tiny_qwen2() -> Qwen2ForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(**TINY_LLAMA))
        randomize_vectors(model)
    return model.eval()


STOCK = {"llama": tiny_dense, "qwen2": tiny_qwen2}
HOW = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "prompt look-up": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("make", STOCK.values(), ids=STOCK.keys())
@pytest.mark.parametrize("how", HOW.values(), ids=HOW.keys())
def test_a_lossless_cache_generates_the_stock_text(make, how):
    model = make()
    ids = torch.randint(1, 97, (1 if "prompt_lookup_num_tokens" in how else 2, 50))
    mask = torch.ones_like(ids)
    if len(ids) > 1:
        ids[1, :7], mask[1, :7] = 0, 0
    texts = []
    for cache in (DynamicCache(), create_kivi_cache(16, 16, group_size=16, residual_length=5)):
        torch.manual_seed(3)
        texts.append(
            model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=40, do_sample=False, **how)
            if "do_sample" not in how
            else model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=40, **how)
        )
    assert torch.equal(*texts)
    assert all(layer.pool.used > 0 for layer in cache.layers)


@pytest.mark.parametrize("make", STOCK.values(), ids=STOCK.keys())
def test_a_packed_cache_generates_and_really_packs(make):
    model = make()
    ids = torch.randint(1, 97, (2, 150))
    cache = create_kivi_cache()
    text = model.generate(ids, past_key_values=cache, max_new_tokens=30, do_sample=False)
    assert text.shape == (2, 180)
    assert len(cache.layers) == 3
    for layer in cache.layers:
        assert layer.pool.used == 2
        assert layer.pool.storage["keys"]["packed"].dtype == torch.int32
    assert cache.get_seq_length() == 179
    widths = ((16,) * 4, (16,) * 4)
    assert cache.nbytes_used == 3 * 2 * cache.scheme.layer_nbytes(179, widths, torch.float32)
    stock = DynamicCache()
    with torch.no_grad():
        model(text[:, :-1], past_key_values=stock)
    dense = sum(layer.keys.nbytes + layer.values.nbytes for layer in stock.layers)
    assert cache.nbytes_used < 0.5 * dense


def test_a_back_end_that_cannot_run_leaves_the_cache_empty(monkeypatch):
    monkeypatch.setattr("modules.cache.layer.get_backend", lambda *_: (_ for _ in ()).throw(ValueError("backend")))
    cache = create_kivi_cache()
    with pytest.raises(ValueError, match="backend"):
        cache.update(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4), 0)
    assert cache.row_tokens() == [] and not cache.layers[0].is_initialized
