"""Quantizers of packed blocks: each turns the states of a block into tensors and back.

A quantizer is a class with the members of `BlockCodec`. To add one, write the class and register it:

    @register_quantizer("mine")
    class MyCodec: ...

Then `QuantScheme(quantizer="mine")` uses it for keys or values of any cache.
"""

from dataclasses import replace
from typing import Protocol

import torch

from configuration_alrd_llama import QuantScheme
from modules.hadamard_utils import rotate, rotate_back
from modules.kernels import Backend, get_backend
from modules.kernels.packed import PackedPart, PackRecord
from modules.quant_utils import DEFAULT_BLOCK_LENGTH, group_widths, packed_words, parameter_dtype, to_finite

Fields = dict[str, torch.Tensor]

#: Scale and zero point `[C]`, float32, from calibration.
StaticScales = tuple[torch.Tensor, torch.Tensor]


class BlockCodec(Protocol):
    """How the states of one block are stored.

    Args of the constructor:
        scheme: What the user asked for.
        length: Tokens of a block, T.
        widths: Channels of each head group; C is their sum.
        dtype: Type of the decoded states.
        backend: Functions that quantize and pack (`modules/kernels`).
        scale_dtype: Two-byte type of scales and zero points.
    """

    def __init__(
        self,
        scheme: QuantScheme,
        length: int,
        widths: tuple[int, ...],
        dtype: torch.dtype,
        backend: Backend,
        scale_dtype: torch.dtype,
    ): ...

    def fields(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of each tensor that one block takes."""

    def encode(self, states: torch.Tensor, score: torch.Tensor | None = None) -> Fields:
        """Store `[N, T, C]` states of N blocks; `score` `[N, T]`: what each token is worth, if somebody knows."""

    def decode(self, fields: Fields) -> torch.Tensor:
        """States `[..., T, C]` from fields with one or more leading dimensions."""


#: Quantizers of users, by the name that `QuantScheme.quantizer` gives.
QUANTIZERS: dict[str, type[BlockCodec]] = {}


def register_quantizer(name: str):
    """Class decorator: make a quantizer known under a name, for `QuantScheme.quantizer`."""

    def register(codec_class: type[BlockCodec]) -> type[BlockCodec]:
        QUANTIZERS[name] = codec_class
        return codec_class

    return register


class _Codec:
    """The constructor that all quantizers share."""

    def __init__(self, scheme, length, widths, dtype, backend, scale_dtype):
        self.scheme, self.length, self.widths = scheme, length, tuple(widths)
        self.dtype, self.backend, self.scale_dtype = dtype, backend, scale_dtype

    #: `PackedSide.channels`.
    stored_channels: torch.Tensor | None = None

    def parts(self, fields: Fields) -> tuple[PackedPart, ...] | None:
        """The storage of all slots, `[slots, …]`, as attention kernels read it; `None`: they cannot."""
        return None

    def records(self) -> tuple[PackRecord, ...] | None:
        """How its blocks are packed, as kernels that write blocks read it; `None`: they cannot."""
        return None

    def _record(self, **fields) -> PackRecord:
        return PackRecord("", tuple(range(sum(self.widths))), self.scheme.bits, **fields)

    def _with(self, scheme: QuantScheme, length: int, widths: tuple[int, ...], dtype: torch.dtype) -> BlockCodec:
        """The quantizer of a part of the states."""
        return make_codec(scheme, length, widths, dtype, self.backend, scale_dtype=self.scale_dtype)


class ExactCodec(_Codec):
    """16 bits, the lossless mode: the states in their own type."""

    def fields(self):
        return {"states": ((self.length, sum(self.widths)), self.dtype)}

    def encode(self, states: torch.Tensor, score=None) -> Fields:
        return {"states": states}

    def decode(self, fields: Fields) -> torch.Tensor:
        return fields["states"]

    def parts(self, fields: Fields) -> tuple[PackedPart, ...]:
        return (PackedPart(16, self.widths, fields["states"], run=self.length),)

    def records(self) -> tuple[PackRecord, ...]:
        return (self._record(),)


class UniformCodec(_Codec):
    """Codes on a uniform grid (`modules/quant_utils.py`).

    Per channel a block holds groups of g tokens, the last one shorter if need be, each packed by itself; per token,
    groups of the channels of a head group. With two-byte parameters and whole widths that is `bits + 32 / g` bits per
    element (symmetric: 16 / g).
    """

    def __init__(self, *args):
        super().__init__(*args)
        scheme, channels = self.scheme, sum(self.widths)
        if scheme.per_channel:
            #: Tokens of each group that is packed by itself, and channels of each group of a token.
            self.runs, self.groups = group_widths(self.length, scheme.group_size), None
            parameter = (len(self.runs), channels)
        else:
            self.runs = (self.length,)
            self.groups = tuple(g for width in self.widths for g in group_widths(width, scheme.group_size))
            parameter = (self.length, len(self.groups))
        words = sum(packed_words(run, scheme.bits) for run in self.runs)
        self._fields = {"packed": ((words, channels), torch.int32), "scale": (parameter, self.scale_dtype)}
        if not scheme.symmetric:
            self._fields["zero_point"] = (parameter, self.scale_dtype)

    def _equal_runs(self) -> tuple[tuple[int, int], ...]:
        """(how many, tokens) of the groups of equal length."""
        full = self.runs.count(self.runs[0])
        return ((full, self.runs[0]), *((1, run) for run in self.runs[full:]))

    def _rows(self, name: str, run: int) -> int:
        """Rows of a field that a group takes: its words; one row of parameters per channel, or one per token."""
        return packed_words(run, self.scheme.bits) if name == "packed" else 1 if self.groups is None else run

    def fields(self):
        return self._fields

    def encode(self, states: torch.Tensor, score=None) -> Fields:
        scheme, blocks = self.scheme, len(states)
        how = (scheme.bits, self.groups, scheme.symmetric, scheme.range_method, self.scale_dtype)
        pieces: dict[str, list[torch.Tensor]] = {name: [] for name in self._fields}
        runs = self._equal_runs()
        for part, (_, run) in zip(states.split([count * run for count, run in runs], dim=1), runs):
            results = self.backend.quantize_and_pack(part.reshape(-1, run, part.shape[-1]), *how)
            for name, tensor in zip(("packed", "scale", "zero_point"), results):
                if name in pieces:
                    pieces[name].append(tensor.reshape(blocks, -1, tensor.shape[-1]))
        return {name: torch.cat(parts, dim=1) for name, parts in pieces.items()}

    def decode(self, fields: Fields) -> torch.Tensor:
        lead, channels, runs = fields["packed"].shape[:-2], sum(self.widths), self._equal_runs()
        split = {
            name: tensor.flatten(0, -3).split([count * self._rows(name, run) for count, run in runs], dim=1)
            for name, tensor in fields.items()
        }
        states = []
        for i, (count, run) in enumerate(runs):
            groups = {name: parts[i].unflatten(1, (count, -1)).flatten(0, 1) for name, parts in split.items()}
            parameters = [groups.get(name) for name in ("scale", "zero_point")]
            if self.groups is None:
                parameters = [None if p is None else p.squeeze(1) for p in parameters]
            part = self.backend.unpack_and_dequantize(
                groups["packed"], *parameters, self.scheme.bits, run, self.dtype, self.groups
            )
            states.append(part.reshape(-1, count * run, channels))
        return torch.cat(states, dim=1).reshape(*lead, self.length, channels)

    def parts(self, fields: Fields) -> tuple[PackedPart, ...]:
        parameters = (fields["scale"], fields.get("zero_point"))
        return (PackedPart(self.scheme.bits, self.widths, fields["packed"], *parameters, self.runs[0], self.groups),)

    def records(self) -> tuple[PackRecord, ...]:
        how = {"symmetric": self.scheme.symmetric, "range_method": self.scheme.range_method}
        return (self._record(runs=self._equal_runs(), groups=self.groups, scale_dtype=self.scale_dtype, **how),)


class StaticCodec(_Codec):
    """Codes by scales from calibration, which are stored once, not per block: exactly `bits` bits per element."""

    def __init__(self, *args, scales: StaticScales | None):
        super().__init__(*args)
        self.scales = scales  # `None`: the codec only tells the size

    def fields(self):
        return {"packed": ((packed_words(self.length, self.scheme.bits), sum(self.widths)), torch.int32)}

    def encode(self, states: torch.Tensor, score=None) -> Fields:
        return {"packed": self.backend.quantize_and_pack(states, self.scheme.bits, static=self.scales)[0]}

    def decode(self, fields: Fields) -> torch.Tensor:
        packed = fields["packed"]
        scale, zero_point = (x.unsqueeze(0) for x in self.scales)
        states = self.backend.unpack_and_dequantize(
            packed.flatten(0, -3), scale, zero_point, self.scheme.bits, self.length, self.dtype
        )
        return states.reshape(*packed.shape[:-2], *states.shape[1:])

    def parts(self, fields: Fields) -> tuple[PackedPart, ...]:
        parameters = (None if x is None else x.view(1, 1, -1) for x in self.scales)
        return (PackedPart(self.scheme.bits, self.widths, fields["packed"], *parameters, self.length),)

    def records(self) -> tuple[PackRecord, ...]:
        how = {"symmetric": self.scales[1] is None, "scale_dtype": self.scale_dtype, "scales": self.scales}
        return (self._record(runs=((1, self.length),), **how),)


class RotatedCodec(_Codec):
    """Each head group rotated by a Hadamard matrix before it is quantized, and back after."""

    def __init__(self, *args):
        super().__init__(*args)
        plain = replace(self.scheme, rotation=False)
        self.inner = self._with(plain, self.length, self.widths, torch.float32)

    def fields(self):
        return self.inner.fields()

    def encode(self, states: torch.Tensor, score=None) -> Fields:
        rotated = [rotate(group.float()) for group in states.split(self.widths, dim=-1)]
        return self.inner.encode(torch.cat(rotated, dim=-1), score)

    def decode(self, fields: Fields) -> torch.Tensor:
        groups = self.inner.decode(fields).split(self.widths, dim=-1)
        return to_finite(torch.cat([rotate_back(g) for g in groups], dim=-1), self.dtype)


def _channel_ranges(states: torch.Tensor) -> torch.Tensor:
    """Highest minus lowest value of each channel of a block: `[N, T, C]` to `[N, C]` float32."""
    low, high = torch.aminmax(states.float(), dim=1)
    return high - low


class MixedChannelCodec(_Codec):
    """1.5 bits: of each head group the half of the channels with the widest range in a block at 2 bits, the others
    rotated among themselves by an orthonormal transform and kept at 1 bit (VidKV, arXiv:2503.16257, section 3.2).

    The choice is a bit per channel and block. VidKV transforms by a full complex FFT, which doubles what is stored; a
    real orthonormal transform does not.
    """

    def __init__(self, *args):
        super().__init__(*args)
        wide = tuple(-(-width // 2) for width in self.widths)
        narrow = tuple(width - w for width, w in zip(self.widths, wide))
        self.narrow = tuple(width for width in narrow if width)
        low = replace(self.scheme, bits=1, symmetric=True, range_method="mse")
        self.codecs = {"wide": self._with(replace(self.scheme, bits=2), self.length, wide, torch.float32)}
        if self.narrow:
            self.codecs["narrow"] = self._with(low, self.length, self.narrow, torch.float32)
        group = [i for i, width in enumerate(self.widths) for _ in range(width)]
        self._group = torch.tensor(group, dtype=torch.int64, device="cpu")
        self._wide_of_group = torch.tensor(wide, dtype=torch.int64, device="cpu")[self._group]

    def fields(self):
        own = {"is_wide": ((_mask_bytes(sum(self.widths)),), torch.uint8)}
        return own | _join({name: codec.fields() for name, codec in self.codecs.items()})

    def _order(self, is_wide: torch.Tensor) -> torch.Tensor:
        """Channels `[..., C]` in the order of storage: the wide ones by head group, then the narrow ones."""
        group = self._group.to(is_wide.device)
        return (group + (~is_wide).long() * len(self.widths)).argsort(dim=-1, stable=True)

    def encode(self, states: torch.Tensor, score=None) -> Fields:
        group = self._group.to(states.device)
        # Rank of each channel's range in its group: sorted by falling range, then by group, both stably.
        falling = (-_channel_ranges(states)).argsort(dim=-1, stable=True)
        by_group = falling.gather(-1, group[falling].argsort(dim=-1, stable=True))
        starts = [sum(self.widths[:i]) for i in range(len(self.widths))]
        starts = torch.tensor(starts, dtype=torch.int64, device=states.device)
        rank = by_group.argsort(dim=-1) - starts[group]
        is_wide = rank < self._wide_of_group.to(states.device)

        sorted_states = states.float().gather(-1, self._order(is_wide)[:, None].expand_as(states))
        wide, narrow = sorted_states.split([sum(self.codecs["wide"].widths), sum(self.narrow)], dim=-1)
        encoded = {"wide": self.codecs["wide"].encode(wide)}
        if self.narrow:
            rotated = torch.cat([rotate(group) for group in narrow.split(self.narrow, dim=-1)], dim=-1)
            encoded["narrow"] = self.codecs["narrow"].encode(rotated)
        return {"is_wide": _pack_mask(is_wide)} | _join(encoded)

    def decode(self, fields: Fields) -> torch.Tensor:
        decoded = {name: codec.decode(_part(fields, name)) for name, codec in self.codecs.items()}
        groups = [decoded["wide"]]
        if self.narrow:
            groups += [rotate_back(group) for group in decoded["narrow"].split(self.narrow, dim=-1)]
        order = self._order(_unpack_mask(fields["is_wide"], sum(self.widths)))
        states = torch.cat(groups, dim=-1)
        states = states.gather(-1, order.argsort(dim=-1)[..., None, :].expand_as(states))
        return to_finite(states, self.dtype)


class TieredCodec(_Codec):
    """Widths by channel: the channels of each width, of all head groups, are one part with a quantizer of its own.

    Which channels those are is fixed (`QuantScheme.tiers`), so nothing is stored but the parts.
    """

    def __init__(self, *args, static_scales: StaticScales | None = None):
        super().__init__(*args)
        channels = torch.arange(sum(self.widths), dtype=torch.int64, device="cpu")
        channels = channels.split([n for group in self.scheme.tiers for n, _ in group])
        tiers = [(bits, c) for (_, bits), c in zip((t for g in self.scheme.tiers for t in g), channels)]
        #: Channels of each width, the widest first, and its quantizer.
        self.channels, self.codecs = {}, {}
        self.bits = sorted({bits for bits, _ in tiers}, reverse=True)
        for bits in self.bits:
            name, mine = f"{bits}bit", [c for b, c in tiers if b == bits]
            scheme, index = self.scheme.at_width(bits), torch.cat(mine)
            scales = tuple(s[index.to(s.device)] for s in static_scales) if static_scales and scheme.static else None
            self.channels[name] = index
            self.codecs[name] = make_codec(
                scheme, self.length, tuple(map(len, mine)), self.dtype, self.backend, scales, self.scale_dtype
            )
        stored = torch.cat(list(self.channels.values()))
        #: Where each channel stands in what is stored; `None`: in its own place.
        self.order = None if (stored.diff() == 1).all() else stored.argsort()
        self.stored_channels = None if self.order is None else stored

    def fields(self):
        return _join({name: codec.fields() for name, codec in self.codecs.items()})

    def encode(self, states: torch.Tensor, score=None) -> Fields:
        if self.stored_channels is not None:
            states = states[..., self.stored_channels.to(states.device)]
        parts = states.split([len(c) for c in self.channels.values()], dim=-1)
        return _join({name: codec.encode(part) for part, (name, codec) in zip(parts, self.codecs.items())})

    def decode(self, fields: Fields) -> torch.Tensor:
        states = torch.cat([codec.decode(_part(fields, name)) for name, codec in self.codecs.items()], dim=-1)
        if self.order is None:
            return states
        self.order = self.order.to(states.device)
        return states[..., self.order]

    def parts(self, fields: Fields) -> tuple[PackedPart, ...] | None:
        parts = {bits: self.codecs[f"{bits}bit"].parts(_part(fields, f"{bits}bit")) for bits in self.bits}
        if None in parts.values():
            return None
        widths = {bits: tuple(sum(n for n, b in group if b == bits) for group in self.scheme.tiers) for bits in parts}
        return tuple(replace(part, widths=widths[bits]) for bits, (part,) in parts.items())

    def records(self) -> tuple[PackRecord, ...] | None:
        records = []
        for name, codec in self.codecs.items():
            own = codec.records()
            if own is None:
                return None
            (record,) = own
            records.append(replace(record, prefix=f"{name}.", channels=tuple(self.channels[name].tolist())))
        return tuple(records)


class ProtectedTokenCodec(_Codec):
    """A share of each block's tokens at a higher width (VidKV's selective token protection, section 3.3).

    The tokens of the highest score are protected; without scores those that the lower width would hurt most, by their
    squared error. The choice is a bit per token and block.
    """

    def __init__(self, *args):
        super().__init__(*args)
        scheme = self.scheme
        self.count = _protected_count(scheme, self.length)
        low = replace(scheme, protected=0.0)
        by_width = {"symmetric": None, "range_method": None if scheme.range_method == "minmax" else "mse"}
        high = replace(low, bits=scheme.protected_bits, **by_width)
        self.unprotected = self._with(low, self.length, self.widths, torch.float32)
        self.codecs = {
            "high": self._with(high, self.count, self.widths, self.dtype),
            "low": self._with(low, self.length - self.count, self.widths, self.dtype),
        }

    def fields(self):
        own = {"is_protected": ((_mask_bytes(self.length),), torch.uint8)}
        return own | _join({name: codec.fields() for name, codec in self.codecs.items()})

    def encode(self, states: torch.Tensor, score: torch.Tensor | None = None) -> Fields:
        if score is None:
            low = self.unprotected.decode(self.unprotected.encode(states))
            score = (states.float() - low).square().sum(-1)
        chosen = score.argsort(dim=-1, descending=True, stable=True)[:, : self.count]
        is_protected = torch.zeros(states.shape[:2], dtype=torch.bool, device=states.device).scatter(1, chosen, True)
        order = _mask_order(is_protected)
        sorted_states = states.gather(1, order[..., None].expand_as(states))
        high, low = sorted_states.tensor_split([self.count], dim=1)
        encoded = {"high": self.codecs["high"].encode(high), "low": self.codecs["low"].encode(low)}
        return {"is_protected": _pack_mask(is_protected)} | _join(encoded)

    def decode(self, fields: Fields) -> torch.Tensor:
        states = torch.cat([codec.decode(_part(fields, name)) for name, codec in self.codecs.items()], dim=-2)
        order = _mask_order(_unpack_mask(fields["is_protected"], self.length))
        return states.gather(-2, order.argsort(dim=-1)[..., None].expand_as(states))


# ---- fields of parts, masks of a bit per element


def _join(parts: dict[str, dict]) -> dict:
    """The fields of all parts, each with its part's name before its own."""
    return {f"{part}.{name}": field for part, fields in parts.items() for name, field in fields.items()}


def _part(fields: Fields, part: str) -> Fields:
    """The fields of one part by their own names."""
    return {n.removeprefix(f"{part}."): t for n, t in fields.items() if n.startswith(f"{part}.")}


def _mask_bytes(length: int) -> int:
    return -(-length // 8)


def _pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """`[..., ceil(n / 8)]` uint8 of a bool `[..., n]`; element `i` is bit `i % 8` of byte `i // 8`."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (padded << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1).to(torch.uint8)


def _unpack_mask(packed: torch.Tensor, length: int) -> torch.Tensor:
    bits = packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten(-2)[..., :length].bool()


def _mask_order(mask: torch.Tensor) -> torch.Tensor:
    """Positions `[..., n]`: those in the mask, then the others, each in their own order."""
    return (~mask).to(torch.uint8).argsort(dim=-1, stable=True)


# ---- choice


def _protected_count(scheme: QuantScheme, length: int) -> int:
    """Tokens of a block that are protected."""
    return max(1, round(scheme.protected * length))


def check_codec(scheme: QuantScheme, length: int) -> None:
    """Raise a `ValueError` for a scheme that has no quantizer for blocks of `length` tokens."""
    if scheme.quantizer is not None and scheme.quantizer not in QUANTIZERS:
        known = ", ".join(sorted(QUANTIZERS)) or "none"
        raise ValueError(f"quantizer={scheme.quantizer!r}: must be registered (registered are: {known})")
    if scheme.protected and _protected_count(scheme, length) >= length:
        raise ValueError(f"protected={scheme.protected}: must leave tokens of a block of {length} unprotected")


def make_codec(
    scheme: QuantScheme,
    length: int,
    widths: tuple[int, ...],
    dtype: torch.dtype,
    backend: Backend | None = None,
    static_scales: StaticScales | None = None,
    scale_dtype: torch.dtype | None = None,
) -> BlockCodec:
    """Quantizer of one side of a layer.

    Args:
        scheme: What to store.
        length: Tokens per block.
        widths: Channels of each head group.
        dtype: Type of the states.
        backend: Default: the reference.
        static_scales: For `scheme.static`; without them its codec only tells the size.
        scale_dtype: Default: `parameter_dtype(dtype)`.

    Raises:
        ValueError: The scheme asks for what does not exist or was not given.
    """
    arguments = (
        scheme,
        length,
        widths,
        dtype,
        backend or get_backend("reference", torch.device("cpu")),
        scale_dtype or parameter_dtype(dtype),
    )
    check_codec(scheme, length)
    if scheme.tiers is not None:
        channels = tuple(sum(n for n, _ in group) for group in scheme.tiers)
        if channels != tuple(widths):
            raise ValueError(f"tiers: of {list(channels)} channels must fill the head groups of {list(widths)}")
        return TieredCodec(*arguments, static_scales=static_scales)
    if scheme.static:
        return StaticCodec(*arguments, scales=static_scales)
    if scheme.bits == 16 and scheme.quantizer is None:
        return ExactCodec(*arguments)
    if scheme.protected:
        return ProtectedTokenCodec(*arguments)
    if scheme.rotation:
        return RotatedCodec(*arguments)
    if scheme.quantizer is None:
        return MixedChannelCodec(*arguments) if scheme.bits == 1.5 else UniformCodec(*arguments)
    return QUANTIZERS[scheme.quantizer](*arguments)


def block_length(*schemes: QuantScheme) -> int:
    """Tokens of a block that all sides share, G: the larger group size; with protected tokens at least 128."""
    length = max(scheme.group_size or DEFAULT_BLOCK_LENGTH for scheme in schemes)
    if any(scheme.protected for scheme in schemes):
        length *= -(-DEFAULT_BLOCK_LENGTH // length)
    return length


def block_nbytes(codec: BlockCodec) -> int:
    """Bytes that one block takes, everything counted."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in codec.fields().values())


__all__ = [
    "QUANTIZERS",
    "BlockCodec",
    "ExactCodec",
    "MixedChannelCodec",
    "ProtectedTokenCodec",
    "RotatedCodec",
    "StaticCodec",
    "TieredCodec",
    "UniformCodec",
    "block_length",
    "block_nbytes",
    "make_codec",
    "register_quantizer",
]
