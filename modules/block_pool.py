"""Storage of immutable quantized blocks: codecs that turn the tokens of a block into tensors, and a pool of slots."""

from dataclasses import dataclass
from typing import Protocol

import torch

from modules.quant_utils import (
    dequantize,
    group_widths,
    pack_codes,
    packed_words,
    parameter_dtype,
    quantize,
    unpack_codes,
)

Fields = dict[str, torch.Tensor]


class BlockCodec(Protocol):
    """How the states of one block are stored. A new quantizer is a new class with these three members."""

    def fields(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of each tensor that one block takes."""

    def encode(self, states: torch.Tensor) -> Fields:
        """Store `[N, T, C]` states of N blocks of T tokens."""

    def decode(self, fields: Fields) -> torch.Tensor:
        """States `[..., T, C]` from fields with any leading dimensions."""


@dataclass(frozen=True)
class ExactCodec:
    """16 bits, the lossless mode: blocks of `T` tokens and `C` channels in the model's own dtype."""

    length: int
    channels: int
    dtype: torch.dtype

    def fields(self):
        return {"states": ((self.length, self.channels), self.dtype)}

    def encode(self, states: torch.Tensor) -> Fields:
        return {"states": states}

    def decode(self, fields: Fields) -> torch.Tensor:
        return fields["states"]


@dataclass(frozen=True)
class PerChannelCodec:
    """Affine codes with one scale per channel and block (KIVI keys): `n_bits + 32 / T` bits per element."""

    n_bits: int
    length: int
    channels: int
    dtype: torch.dtype

    def fields(self):
        parameter = ((self.channels,), parameter_dtype(self.dtype))
        packed = ((packed_words(self.length, self.n_bits), self.channels), torch.int32)
        return {"packed": packed, "scale": parameter, "zero_point": parameter}

    def encode(self, states: torch.Tensor) -> Fields:
        codes, scale, zero_point = quantize(states.transpose(-1, -2), self.n_bits, (self.length,))
        packed = pack_codes(codes.transpose(-1, -2), self.n_bits)
        return {"packed": packed, "scale": scale.squeeze(-1), "zero_point": zero_point.squeeze(-1)}

    def decode(self, fields: Fields) -> torch.Tensor:
        codes = unpack_codes(fields["packed"], self.n_bits, self.length).transpose(-1, -2)
        scale, zero_point = fields["scale"].unsqueeze(-1), fields["zero_point"].unsqueeze(-1)
        return dequantize(codes, scale, zero_point, (self.length,), self.dtype).transpose(-1, -2)


@dataclass(frozen=True)
class PerTokenCodec:
    """Affine codes with one scale per token and group of channels (KIVI values).

    `widths` are the channels of each group, so a block takes `n_bits + 32 · len(widths) / C` bits per element.
    """

    n_bits: int
    length: int
    widths: tuple[int, ...]
    dtype: torch.dtype

    def fields(self):
        parameter = ((self.length, len(self.widths)), parameter_dtype(self.dtype))
        packed = ((packed_words(self.length, self.n_bits), sum(self.widths)), torch.int32)
        return {"packed": packed, "scale": parameter, "zero_point": parameter}

    def encode(self, states: torch.Tensor) -> Fields:
        codes, scale, zero_point = quantize(states, self.n_bits, self.widths)
        return {"packed": pack_codes(codes, self.n_bits), "scale": scale, "zero_point": zero_point}

    def decode(self, fields: Fields) -> torch.Tensor:
        codes = unpack_codes(fields["packed"], self.n_bits, self.length)
        return dequantize(codes, fields["scale"], fields["zero_point"], self.widths, self.dtype)


def make_codec(
    n_bits: float, per_channel: bool, group_size: int, length: int, widths: tuple[int, ...], dtype: torch.dtype
) -> BlockCodec:
    """Codec of one side of a layer.

    Args:
        n_bits: Width of a code; 16 stores `dtype` itself.
        per_channel: One scale per channel and block, else per token and `group_size` channels.
        group_size: Channels per scale of a token; 0 means a whole head group.
        length: Tokens per block.
        widths: Channels of each head group.
        dtype: Type of the states.
    """
    if n_bits == 16:
        return ExactCodec(length, sum(widths), dtype)
    if per_channel:
        return PerChannelCodec(int(n_bits), length, sum(widths), dtype)
    groups = tuple(g for width in widths for g in group_widths(width, group_size))
    return PerTokenCodec(int(n_bits), length, groups, dtype)


def block_nbytes(codec: BlockCodec) -> int:
    """Bytes that one block takes: codes, scales and zero points."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in codec.fields().values())


class BlockPool:
    """Slots for blocks that are written once, with reference counts; one slot holds a block of both sides.

    The storages grow by copying, to an eighth more than is needed, so that an append is amortised O(1); blocks that are
    released leave slack of at most a quarter (`trim`).

    Args:
        codecs: Codec of each side, `{"keys": …, "values": …}`.
        device: Where the slots live.
    """

    def __init__(self, codecs: dict[str, BlockCodec], device: torch.device):
        self.codecs = codecs
        self.storage = {
            side: {
                name: torch.empty((0, *shape), dtype=dtype, device=device)
                for name, (shape, dtype) in codec.fields().items()
            }
            for side, codec in codecs.items()
        }
        self.references: list[int] = []
        self.free: list[int] = []

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

    def encode(self, states: dict[str, torch.Tensor]) -> dict[str, Fields]:
        """Quantize `[N, T, C]` states of each side without storing them."""
        return {side: self.codecs[side].encode(states[side]) for side in self.codecs}

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
        for fields in self.storage.values():
            for name, old in fields.items():
                new = torch.empty((capacity, *old.shape[1:]), dtype=old.dtype, device=old.device)
                new[: len(kept)] = old if len(kept) == len(old) else old[kept.to(old.device)]
                fields[name] = new
        added = range(len(self.references), capacity)
        self.references.extend(0 for _ in added)
        self.free.extend(reversed(added))


__all__ = ["BlockCodec", "BlockPool", "ExactCodec", "PerChannelCodec", "PerTokenCodec", "block_nbytes", "make_codec"]
