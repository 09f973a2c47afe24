"""A pool of immutable quantized blocks, written once and shared by all rows, and caches, that refer to them."""

import threading
from collections.abc import Iterable
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

    A block lives as long as an owner refers to it: nothing is counted, the owners are asked when room is needed.
    Several threads may each have an owner of their own; what an owner does with slots it does while it holds the
    `lock`.

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
        self.storage = storage or {
            side: {
                name: torch.empty((capacity, *shape), dtype=dtype, device=device)
                for name, (shape, dtype) in codec.fields().items()
            }
            for side, codec in codecs.items()
        }
        #: Slots that may be written; others may have become free since.
        self.free: list[int] = []
        self._sides: tuple[PackedSide, ...] | None = None
        self._begin()

    def _begin(self) -> None:
        self.owners: WeakSet[BlockOwner] = WeakSet()
        self.lock = threading.RLock()

    def __getstate__(self) -> dict:
        """A copy has no owners; those that are copied with it say so themselves."""
        return {name: value for name, value in vars(self).items() if name not in ("owners", "lock")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._begin()

    def live(self) -> set[int]:
        """Slots that somebody refers to."""
        with self.lock:
            return {slot for owner in self.owners for slot in owner.block_slots()}

    @property
    def used(self) -> int:
        """Blocks that somebody refers to."""
        return len(self.live())

    @property
    def slot_nbytes(self) -> int:
        return sum(block_nbytes(codec) for codec in self.codecs.values())

    def tensors(self) -> list[torch.Tensor]:
        """The storages of all fields, `[capacity, …]` each."""
        return [tensor for fields in self.storage.values() for tensor in fields.values()]

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
        counts = [len(next(iter(next(iter(encoded.values())).values()))) for encoded in batches]
        if sum(counts) > len(self.free):
            live = self._sweep()
            if sum(counts) > len(self.free):
                needed = len(live) + sum(counts)
                self._grow(needed + needed // 8)
        free, written = list(self.free), []
        for encoded, count in zip(batches, counts):
            slots = [free.pop() for _ in range(count)]
            for side, fields in encoded.items():
                for name, tensor in fields.items():
                    self.storage[side][name][slots] = tensor
            written.append(tuple(slots))
        self.free = free
        return written

    def sides(self) -> tuple[PackedSide, ...]:
        """Keys and values of all slots, as attention reads them."""
        if self._sides is None:
            self._sides = tuple(self._side(codec, self.storage[side]) for side, codec in self.codecs.items())
        return self._sides

    @staticmethod
    def _side(codec: BlockCodec, storage: Fields) -> PackedSide:
        storage = dict(storage)  # whoever reads keeps what there was, even if the pool is resized meanwhile
        read = partial(_read, codec, storage)
        return PackedSide(read, codec.parts(storage), codec.stored_channels)

    def _sweep(self) -> set[int]:
        """Find the free slots, the lowest last; returns the others."""
        live = self.live()
        self.free = [slot for slot in reversed(range(self.capacity)) if slot not in live]
        return live

    def trim(self) -> None:
        """Give back slack beyond a quarter of what is used; the owners learn where each block has moved."""
        live = sorted(self._sweep())
        if self.capacity <= len(live) + len(live) // 4:
            return
        self._compact(live)
        moved = {old: new for new, old in enumerate(live)}
        for owner in self.owners:
            owner.move_blocks(moved)

    def _grow(self, capacity: int) -> None:
        """Reallocate for more slots, field by field, so that no more than one is there twice."""
        self._sides = None
        for fields in self.storage.values():
            for name, old in fields.items():
                new = torch.empty((capacity, *old.shape[1:]), dtype=old.dtype, device=old.device)
                new[: self.capacity] = old[: self.capacity]  # of one that has grown already, if this failed before
                fields[name] = new
        self.free = [*reversed(range(self.capacity, capacity)), *self.free]
        self.capacity = capacity

    def _compact(self, kept: list[int]) -> None:
        """Reallocate for these slots alone, which move to the front; all fields or, if that fails, none."""
        index = torch.tensor(kept, dtype=torch.int64, device="cpu")
        compact = {
            side: {name: tensor[index.to(tensor.device)] for name, tensor in fields.items()}
            for side, fields in self.storage.items()
        }
        for side, fields in compact.items():
            self.storage[side].update(fields)
        self.free, self.capacity, self._sides = [], len(kept), None


def _read(codec: BlockCodec, storage: Fields, slots: torch.Tensor) -> torch.Tensor:
    """Dequantized states `[*slots.shape, T, C]` of a tensor of slots."""
    return codec.decode({name: t[slots] for name, t in storage.items()})


__all__ = ["BlockOwner", "BlockPool"]
