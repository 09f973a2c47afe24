"""A pool of immutable quantized blocks, written once and shared by all rows, and caches, that refer to them."""

import threading
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Protocol
from weakref import WeakSet

import torch

from modules.cache.codecs import BlockCodec, Fields, block_nbytes
from modules.kernels.packed import PackedSide


class BlockOwner(Protocol):
    """Who refers to blocks of a pool: the layer of a cache."""

    def block_slots(self) -> Iterable[int]:
        """Slots that are referred to."""

    def move_blocks(self, moved: dict[int, int]) -> None:
        """Take note that blocks have other slots now."""


class BlockPool:
    """Slots for blocks that are written once; one slot holds a block of both sides.

    A block lives as long as an owner refers to it. There are no reference counts: when slots are needed, the owners are
    asked. Owners may live in several threads, and hold the `lock` while they deal with slots.

    The storages grow by copying, to an eighth more than is needed, so that an append is amortised O(1); blocks that
    nobody refers to leave slack of at most a quarter (`trim`).

    Args:
        codecs: Codec of each side, `{"keys": …, "values": …}`.
        device: Where the slots live.
        capacity: Slots to begin with; all that there ever are in a pool without owners
            (`modules/cache/fixed_store.py`).
        storage: The storages of such a pool, by side and field, if there are some.
    """

    def __init__(
        self,
        codecs: dict[str, BlockCodec],
        device: torch.device,
        capacity: int = 0,
        storage: dict[str, Fields] | None = None,
    ):
        self.codecs, self.capacity = codecs, capacity
        self.storage = storage or {side: _allocate(codec, capacity, device) for side, codec in codecs.items()}
        #: Slots that may be written; others may have become free since.
        self.free: list[int] = []
        self._sides: tuple[PackedSide, ...] | None = None
        self._begin()

    def _begin(self) -> None:
        self.owners: WeakSet[BlockOwner] = WeakSet()
        self.lock = threading.RLock()

    def __getstate__(self) -> dict:
        """A copy has no owners; those that are copied with it say so themselves."""
        # A lock cannot be copied, and owners are known by identity.
        state = dict(vars(self))
        del state["owners"], state["lock"]
        return state

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._begin()

    def live(self) -> set[int]:
        """Slots that somebody refers to."""
        with self.lock:
            return set().union(*[owner.block_slots() for owner in self.owners])

    @property
    def used(self) -> int:
        """Blocks that somebody refers to."""
        return len(self.live())

    @property
    def slot_nbytes(self) -> int:
        return sum(map(block_nbytes, self.codecs.values()))

    def tensors(self) -> list[torch.Tensor]:
        """The storages of all fields, `[capacity, …]` each."""
        return [tensor for *_, tensor in self._fields()]

    def _fields(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """Side, name and storage of each field."""
        for side, fields in self.storage.items():
            for name, tensor in list(fields.items()):
                yield side, name, tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the storages, slack included."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors())

    def encode(self, states: dict[str, torch.Tensor], score: torch.Tensor | None = None) -> dict[str, Fields]:
        """Quantize `[N, T, C]` states of each side without storing them; `score` `[N, T]`: see `BlockCodec.encode`."""
        return {side: self.codecs[side].encode(states[side], score) for side in self.codecs}

    def write(self, *batches: dict[str, Fields]) -> list[tuple[int, ...]]:
        """Store batches of encoded blocks in free slots; returns the slots of each.

        An owner refers to them before the next call and before it lets the `lock` go; else they are free again.
        """
        counts = [_count_blocks(encoded) for encoded in batches]
        if sum(counts) > len(self.free):
            # Blocks may have become free since the last look; only then is there reason to grow.
            live = self._sweep()
            if sum(counts) > len(self.free):
                needed = len(live) + sum(counts)
                self._grow(needed + needed // 8)
        free, written = list(self.free), []
        for encoded, count in zip(batches, counts, strict=True):
            # The lowest free slots, which stand last.
            slots = free[len(free) - count :][::-1]
            del free[len(free) - count :]
            for side, fields in encoded.items():
                for name, tensor in fields.items():
                    self.storage[side][name][slots] = tensor
            written.append(tuple(slots))
        self.free = free
        return written

    def sides(self) -> tuple[PackedSide, ...]:
        """Keys and values of all slots, as attention reads them."""
        if self._sides is None:
            self._sides = tuple(map(self._side, self.codecs.values(), map(self.storage.get, self.codecs)))
        return self._sides

    @staticmethod
    def _side(codec: BlockCodec, storage: Fields) -> PackedSide:
        storage = dict(storage)  # whoever reads keeps what there was, even if the pool is resized meanwhile
        read = partial(_read, codec, storage)
        return PackedSide(read, codec.parts(storage), codec.stored_channels, storage.get("token_scale"))

    def _sweep(self) -> set[int]:
        """Find the free slots, the lowest last; returns the others."""
        live = self.live()
        self.free = sorted(set(range(self.capacity)) - live, reverse=True)
        return live

    def trim(self) -> None:
        """Give back slack beyond a quarter of what is used; the owners learn where each block has moved."""
        # Copying costs as much as is kept, so that a pool is not compacted for a little.
        live = sorted(self._sweep())
        if self.capacity <= len(live) + len(live) // 4:
            return
        self._compact(live)
        moved = {old: new for new, old in enumerate(live)}
        for owner in self.owners:
            owner.move_blocks(moved)

    def _grow(self, capacity: int) -> None:
        """Reallocate for more slots, field by field, so that no more than one is there twice."""
        # Views of the old storages are of the old size.
        self._sides = None
        for side, name, old in self._fields():
            new = torch.empty((capacity, *old.shape[1:]), dtype=old.dtype, device=old.device)
            new[: self.capacity] = old[: self.capacity]  # of one that has grown already, if this failed before
            self.storage[side][name] = new
        self.free = [*reversed(range(self.capacity, capacity)), *self.free]
        self.capacity = capacity

    def _compact(self, kept: list[int]) -> None:
        """Reallocate for these slots alone, which move to the front; all fields or, if that fails, none."""
        index = torch.tensor(kept, dtype=torch.int64, device="cpu")
        compact = []
        for side, name, tensor in self._fields():
            compact.append((side, name, tensor[index.to(tensor.device)]))
        # All copies exist: from here on nothing takes memory, so nothing can fail.
        for side, name, tensor in compact:
            self.storage[side][name] = tensor
        self.free, self.capacity, self._sides = [], len(kept), None


def _read(codec: BlockCodec, storage: Fields, slots: torch.Tensor) -> torch.Tensor:
    """Dequantized states `[*slots.shape, T, C]` of a tensor of slots."""
    return codec.decode({name: tensor[slots] for name, tensor in storage.items()})


def _allocate(codec: BlockCodec, capacity: int, device: torch.device) -> Fields:
    """Storages for `capacity` blocks."""
    storage = {}
    for name, (shape, dtype) in codec.fields().items():
        storage[name] = torch.empty((capacity, *shape), dtype=dtype, device=device)
    return storage


def _count_blocks(encoded: dict[str, Fields]) -> int:
    """Blocks in the encoded fields of both sides."""
    fields = next(iter(encoded.values()))
    return len(next(iter(fields.values())))
