"""A pool of immutable quantized blocks, written once and shared by reference counts."""

from functools import partial

import torch

from modules.codecs import BlockCodec, Fields, block_nbytes
from modules.kernels.packed import PackedSide


class BlockPool:
    """Slots for blocks that are written once, with reference counts; one slot holds a block of both sides.

    The storages grow by copying, to an eighth more than is needed, so that an append is amortised O(1); blocks that are
    released leave slack of at most a quarter (`trim`).

    Args:
        codecs: Codec of each side, `{"keys": …, "values": …}`.
        device: Where the slots live.
        slots: Rooms of a pool of a fixed size, whose owner says what is in which (`modules/fixed_cache.py`).
    """

    def __init__(self, codecs: dict[str, BlockCodec], device: torch.device, slots: int = 0):
        self.codecs = codecs
        self.storage = {
            side: {
                name: torch.empty((slots, *shape), dtype=dtype, device=device)
                for name, (shape, dtype) in codec.fields().items()
            }
            for side, codec in codecs.items()
        }
        self.references: list[int] = []
        self.free: list[int] = []
        self._sides: tuple[PackedSide, ...] | None = None

    @property
    def used(self) -> int:
        """Blocks that somebody refers to."""
        return len(self.references) - len(self.free)

    @property
    def slot_nbytes(self) -> int:
        return sum(block_nbytes(codec) for codec in self.codecs.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the storages, slack included."""
        return sum(t.untyped_storage().nbytes() for fields in self.storage.values() for t in fields.values())

    def encode(self, states: dict[str, torch.Tensor], score: torch.Tensor | None = None) -> dict[str, Fields]:
        """Quantize `[N, T, C]` states of each side without storing them; `score` `[N, T]`: see `BlockCodec.encode`."""
        return {side: self.codecs[side].encode(states[side], score) for side in self.codecs}

    def write(self, encoded: dict[str, Fields]) -> tuple[int, ...]:
        """Store encoded blocks in free slots, each with one reference; returns the slots."""
        count = len(next(iter(next(iter(encoded.values())).values())))
        missing = count - len(self.free)
        if missing > 0:
            needed = len(self.references) + missing
            self._resize(torch.arange(len(self.references)), needed + needed // 8)
        slots = [self.free.pop() for _ in range(count)]
        for side, fields in encoded.items():
            for name, tensor in fields.items():
                self.storage[side][name][slots] = tensor
        self.retain(slots)
        return tuple(slots)

    def read(self, side: str, slots: torch.Tensor) -> torch.Tensor:
        """Dequantized states `[*slots.shape, T, C]` of a tensor of slots."""
        return self.codecs[side].decode({name: t[slots] for name, t in self.storage[side].items()})

    def sides(self) -> tuple[PackedSide, ...]:
        """Keys and values of all slots, as attention reads them."""
        if self._sides is None:
            self._sides = tuple(self._side(side) for side in self.codecs)
        return self._sides

    def _side(self, side: str) -> PackedSide:
        codec, read = self.codecs[side], partial(self.read, side)
        if not hasattr(codec, "parts"):  # a quantizer of a user's own
            return PackedSide(read)
        return PackedSide(read, codec.parts(self.storage[side]), codec.stored_channels)

    def retain(self, slots) -> None:
        for slot in slots:
            self.references[slot] += 1

    def release(self, slots) -> None:
        for slot in slots:
            self.references[slot] -= 1
            if self.references[slot] == 0:
                self.free.append(slot)

    def trim(self) -> dict[int, int]:
        """Give back slack beyond a quarter of what is used; returns where each block has moved."""
        live = [slot for slot, references in enumerate(self.references) if references]
        if len(self.references) <= len(live) + len(live) // 4:
            return {slot: slot for slot in live}
        references = [self.references[slot] for slot in live]
        self.references, self.free = references, []
        self._resize(torch.tensor(live, dtype=torch.long), len(live))
        return {old: new for new, old in enumerate(live)}

    def _resize(self, kept: torch.Tensor, capacity: int) -> None:
        """Reallocate `capacity` slots that start with the `kept` ones."""
        self._sides = None
        for fields in self.storage.values():
            for name, old in fields.items():
                new = torch.empty((capacity, *old.shape[1:]), dtype=old.dtype, device=old.device)
                new[: len(kept)] = old if len(kept) == len(old) else old[kept.to(old.device)]
                fields[name] = new
        added = range(len(self.references), capacity)
        self.references.extend(0 for _ in added)
        self.free.extend(reversed(added))


__all__ = ["BlockPool"]
