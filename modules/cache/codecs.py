"""Quantizers of packed blocks: each turns the states of a block into tensors and back.

To add a quantizer, write a class with `fields`, `encode` and `decode`, and register it:

    @register_quantizer("mine")
    class MyCodec(BlockCodec): ...

Then `QuantScheme(quantizer="mine")` uses it for keys or values of any cache.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace

import torch

from configuration_alrd_llama import QuantScheme
from modules import trellis
from modules.hadamard_utils import rotate, rotate_back
from modules.kernels import Backend, get_backend
from modules.kernels.packed import PackedPart, PackRecord
from modules.quant_utils import (
    DEFAULT_BLOCK_LENGTH,
    GAUSSIAN_STEPS,
    decode_token_scale,
    encode_token_scale,
    expand_groups,
    grid,
    group_widths,
    pack_codes,
    packed_words,
    parameter_dtype,
    require,
    to_finite,
    unpack_codes,
)

Fields = dict[str, torch.Tensor]

#: Scale and zero point `[C]`, float32, from calibration.
StaticScales = tuple[torch.Tensor, torch.Tensor]


class BlockCodec(ABC):
    """Quantizer of one side of a layer: how the states of one block are stored.

    A quantizer defines `fields`, `encode` and `decode`. The other members have defaults, with which blocks are
    dequantized by `decode` before attention.

    Args:
        scheme: Settings of the side.
        length: Tokens of a block, T.
        widths: Channels of each head group; C is their sum.
        dtype: Type of the decoded states.
        backend: Functions that quantize and pack (`modules/kernels`).
        scale_dtype: Two-byte type of scales and zero points.
    """

    #: Channel of each stored channel, `[C]` int64 on the CPU (`PackedSide.channels`); `None`: each in its own place.
    stored_channels: torch.Tensor | None = None

    def __init__(
        self,
        scheme: QuantScheme,
        length: int,
        widths: tuple[int, ...],
        dtype: torch.dtype,
        backend: Backend,
        scale_dtype: torch.dtype,
    ):
        self.scheme, self.length, self.widths = scheme, length, tuple(widths)
        self.dtype, self.backend, self.scale_dtype = dtype, backend, scale_dtype
        self.channels = sum(self.widths)

    @abstractmethod
    def fields(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of each tensor that one block takes."""

    @abstractmethod
    def encode(self, states: torch.Tensor, score: torch.Tensor | None = None) -> Fields:
        """Store `[N, T, C]` states of N blocks; `score` `[N, T]`: worth of each token, `None` if unscored."""

    @abstractmethod
    def decode(self, fields: Fields) -> torch.Tensor:
        """States `[..., T, C]` from fields with one or more leading dimensions."""

    def parts(self, fields: Fields) -> tuple[PackedPart, ...] | None:
        """The storage of all slots, `[slots, …]`, as attention kernels read it; `None`: they cannot."""
        return None

    def records(self) -> tuple[PackRecord, ...] | None:
        """The layout of a block, as kernels that write blocks read it; `None`: they cannot."""
        return None

    def _record(self, **fields) -> PackRecord:
        return PackRecord("", tuple(range(self.channels)), self.scheme.bits, **fields)

    def _with(
        self, scheme: QuantScheme, length: int, widths: tuple[int, ...], dtype: torch.dtype, static_scales=None
    ) -> "BlockCodec":
        """The quantizer of a part of the states."""
        return make_codec(scheme, length, widths, dtype, self.backend, static_scales, self.scale_dtype)


#: Quantizers of users, by the name that `QuantScheme.quantizer` gives. Built-in ones have no name: several fields of
#: a scheme choose them (`_codec_class`).
QUANTIZERS: dict[str, type[BlockCodec]] = {}


def register_quantizer(name: str):
    """Class decorator: make a quantizer known under a name, for `QuantScheme.quantizer`."""

    def register(codec_class: type) -> type:
        # A class that does not inherit from `BlockCodec` gets the members that have a default.
        for member in ("stored_channels", "parts", "records"):
            if not hasattr(codec_class, member):
                setattr(codec_class, member, getattr(BlockCodec, member))
        QUANTIZERS[name] = codec_class
        return codec_class

    return register


class ExactCodec(BlockCodec):
    """16 bits, the lossless mode: the states in their own type."""

    def fields(self):
        return {"states": ((self.length, self.channels), self.dtype)}

    def encode(self, states: torch.Tensor, score=None) -> Fields:
        return {"states": states}

    def decode(self, fields: Fields) -> torch.Tensor:
        return fields["states"]

    def parts(self, fields: Fields) -> tuple[PackedPart, ...]:
        return (PackedPart(16, self.widths, fields["states"], run=self.length),)

    def records(self) -> tuple[PackRecord, ...]:
        return (self._record(),)


class UniformCodec(BlockCodec):
    """Codes on a uniform grid (`modules/quant_utils.py`).

    Per channel a block holds groups of g tokens, the last one shorter if need be, each packed by itself; per token,
    groups of the channels of a head group. With two-byte parameters and whole widths that is `bits + 32 / g` bits per
    element (symmetric: 16 / g).
    """

    def __init__(self, *args):
        super().__init__(*args)
        scheme = self.scheme
        #: Per token, the channels of each scale group; `None`: per channel.
        self.groups: tuple[int, ...] | None = None
        #: (how many, tokens) of the runs of equal length; a run is packed by itself.
        self.runs = ((1, self.length),)
        if scheme.per_channel:
            lengths = group_widths(self.length, scheme.group_size)
            full = lengths.count(lengths[0])
            self.runs = ((full, lengths[0]),)
            if full < len(lengths):
                self.runs += ((1, lengths[-1]),)
        else:
            groups: list[int] = []
            for width in self.widths:
                groups.extend(group_widths(width, scheme.group_size))
            self.groups = tuple(groups)

        # Rows that the runs of each length take of `packed`, and of a field of parameters: a row of parameters belongs
        # to a run or, per token, to a token.
        self._tokens, words, rows = [], [], []
        for count, run in self.runs:
            self._tokens.append(count * run)
            words.append(count * packed_words(run, scheme.bits))
            rows.append(count if self.groups is None else count * run)
        self._rows = {"packed": words, "scale": rows, "zero_point": rows}
        columns = self.channels if self.groups is None else len(self.groups)
        parameter = ((sum(rows), columns), self.scale_dtype)
        self._fields = {"packed": ((sum(words), self.channels), torch.int32), "scale": parameter}
        if not scheme.symmetric:
            self._fields["zero_point"] = parameter

    def fields(self):
        return self._fields

    def encode(self, states: torch.Tensor, score=None) -> Fields:
        scheme, blocks = self.scheme, len(states)
        settings = (scheme.bits, self.groups, scheme.symmetric, scheme.range_method, self.scale_dtype)
        # All runs of one length, of all blocks, are packed by one call.
        results = []
        for (_, run), part in zip(self.runs, states.split(self._tokens, dim=1)):
            results.append(self.backend.quantize_and_pack(part.reshape(-1, run, self.channels), *settings))
        encoded = {}
        # The results come in the order of the fields. Symmetric codes have no field for the zero point, a `None`.
        for name, pieces in zip(self._fields, zip(*results)):
            encoded[name] = torch.cat([piece.reshape(blocks, -1, piece.shape[-1]) for piece in pieces], dim=1)
        return encoded

    def _split(self, fields: Fields, name: str) -> list[torch.Tensor | None]:
        """A field by the lengths of the runs, as `quantize_and_pack` returns it for each; `None`: there is none."""
        if name not in fields:
            return [None] * len(self.runs)
        pieces = []
        for (count, _), piece in zip(self.runs, fields[name].flatten(0, -3).split(self._rows[name], dim=1)):
            # Per channel a run has one row of parameters, without a dimension of its own.
            if name == "packed" or self.groups is not None:
                piece = piece.unflatten(1, (count, -1))
            pieces.append(piece.flatten(0, 1))
        return pieces

    def decode(self, fields: Fields) -> torch.Tensor:
        lead, scheme = fields["packed"].shape[:-2], self.scheme
        # The way back: all runs of one length at once, then the runs of each block side by side.
        split = (self._split(fields, "packed"), self._split(fields, "scale"), self._split(fields, "zero_point"))
        states = []
        for (count, run), *stored in zip(self.runs, *split):
            part = self.backend.unpack_and_dequantize(*stored, scheme.bits, run, self.dtype, self.groups)
            states.append(part.reshape(-1, count * run, self.channels))
        return torch.cat(states, dim=1).reshape(*lead, self.length, self.channels)

    def parts(self, fields: Fields) -> tuple[PackedPart, ...]:
        parameters = (fields["scale"], fields.get("zero_point"))
        run = self.runs[0][1]
        return (PackedPart(self.scheme.bits, self.widths, fields["packed"], *parameters, run, self.groups),)

    def records(self) -> tuple[PackRecord, ...]:
        levels = {"symmetric": self.scheme.symmetric, "range_method": self.scheme.range_method}
        return (self._record(runs=self.runs, groups=self.groups, scale_dtype=self.scale_dtype, **levels),)


class StaticCodec(BlockCodec):
    """Codes by scales from calibration, which are stored once, not per block: exactly `bits` bits per element."""

    def __init__(self, *args, static_scales: StaticScales | None):
        super().__init__(*args)
        self.scales = static_scales  # `None`: the codec only tells the size

    def fields(self):
        return {"packed": ((packed_words(self.length, self.scheme.bits), self.channels), torch.int32)}

    def encode(self, states: torch.Tensor, score=None) -> Fields:
        return {"packed": self.backend.quantize_and_pack(states, self.scheme.bits, static=self.scales)[0]}

    def decode(self, fields: Fields) -> torch.Tensor:
        packed, (scale, zero_point) = fields["packed"], self.scales
        states = self.backend.unpack_and_dequantize(
            packed.flatten(0, -3), scale[None], zero_point[None], self.scheme.bits, self.length, self.dtype
        )
        return states.reshape(*packed.shape[:-2], *states.shape[1:])

    def parts(self, fields: Fields) -> tuple[PackedPart, ...]:
        scale, zero_point = self.scales
        parameters = (scale.view(1, 1, -1), zero_point.view(1, 1, -1))
        return (PackedPart(self.scheme.bits, self.widths, fields["packed"], *parameters, self.length),)

    def records(self) -> tuple[PackRecord, ...]:
        return (self._record(runs=((1, self.length),), scale_dtype=self.scale_dtype, scales=self.scales),)


class TrellisCodec(StaticCodec):
    """As `StaticCodec`, but the codes of the channels before say with a channel's own which value it has.

    The channels of each head group are a chain (`modules/trellis.py`); with tiers those of each tier. A scale belongs
    to a point: x̂ = zero_point + scale * point, and the middle of the range is zero_point + 127.5 * scale.
    """

    def encode(self, states: torch.Tensor, score=None) -> Fields:
        require(torch.isfinite(states).all(), "x: values to quantize must be finite; NaN or Inf were found")
        scale, zero_point = self.scales
        # A constant channel takes the middle, and no part in the error.
        in_points = torch.where(scale > 0, (states.float() - zero_point) / scale, (trellis.LEVELS - 1) / 2)
        codes = self.backend.trellis_codes(in_points.flatten(0, 1), self.scheme.bits, self.widths)
        return {"packed": pack_codes(codes.view(states.shape), self.scheme.bits)}

    def decode(self, fields: Fields) -> torch.Tensor:
        codes, (scale, zero_point) = unpack_codes(fields["packed"], self.scheme.bits, self.length), self.scales
        return to_finite(trellis.decode(codes, self.scheme.bits, self.widths) * scale + zero_point, self.dtype)

    def parts(self, fields: Fields) -> tuple[PackedPart, ...]:
        return (replace(super().parts(fields)[0], trellis=True),)

    def records(self) -> None:
        return None


class RotatedCodec(BlockCodec):
    """Each head group rotated by a Hadamard matrix before it is quantized, and back after."""

    def __init__(self, *args):
        super().__init__(*args)
        plain = replace(self.scheme, rotation=False)
        self.inner = self._with(plain, self.length, self.widths, torch.float32)

    def fields(self):
        return self.inner.fields()

    def encode(self, states: torch.Tensor, score=None) -> Fields:
        return self.inner.encode(torch.cat(_map_groups(rotate, states.float(), self.widths), dim=-1), score)

    def decode(self, fields: Fields) -> torch.Tensor:
        groups = _map_groups(rotate_back, self.inner.decode(fields), self.widths)
        return to_finite(torch.cat(groups, dim=-1), self.dtype)


#: Steps below this share of the largest are of rounding, or of what does not matter: in directions that the calibration
#: text hardly has.
_ROUNDING = 1e-3


class TokenScaledCodec(BlockCodec):
    """Calibrated scales times one scale per token and head group.

    With the step of a channel and the middle of its range from calibration, and the scale `s` of the token,

        x̂ = middle + s * step * (code - (L - 1) / 2)

    The middle stands for the channel's mean, which a token's scale must not touch. The scale is a byte
    (`decode_token_scale`); all widths of a head group share it. A block holds `token_scale` `[T, head groups]` uint8
    beside the fields of its codes.

    With a trellis code the middle is that of its points, and its scale is sought with uniform steps in their place. The
    scale is chosen by least squared error over the head group, from half an octave below a first guess to three and a
    half above it. The guess is the size of the token in units of the channels' spreads, which follow from their steps
    if they are Gaussian: most outliers are so in all channels. Errors are in units of the channels' steps: widths are
    given so that a step costs the model about the same in all channels. That holds the tokens whose size is in a few
    channels of many bits, as of those that a model makes its sinks in the midst of a text (LOG.md).
    """

    #: Bytes beside the guess that are tried, half an octave apart; then beside the best of these.
    _COARSE, _FINE = range(-8, 57, 8), (-6, -4, -2, 2, 4, 6)

    def __init__(self, *args, static_scales: StaticScales | None):
        super().__init__(*args)
        plain = replace(self.scheme, token_scale=False)
        self.inner = self._with(plain, self.length, self.widths, torch.float32, static_scales)
        self.stored_channels = self.inner.stored_channels
        if static_scales is None:  # the codec only tells the size
            return
        # Of each channel: levels, step and middle of the range in scales, and the step of a Gaussian of unit spread.
        # The points of a trellis are tried as uniform steps of least error.
        table = []
        for bits in channel_bits(self.scheme, self.channels):
            levels, spacing, _ = grid(bits)
            middle = (levels - 1) / 2 * spacing
            if is_trellis(self.scheme, bits):
                spacing, middle = GAUSSIAN_STEPS[bits] / trellis.UNITS[bits], (trellis.LEVELS - 1) / 2
            table.append((levels, spacing, middle, GAUSSIAN_STEPS[bits]))
        scale, zero_point = static_scales
        self.levels, spacing, middle, gaussian = torch.tensor(
            table, dtype=torch.float32, device=scale.device
        ).T.contiguous()
        self.step = scale * spacing
        self.middle = zero_point + middle * scale
        #: One over the variance of each channel, and over the square of its step. Channels that are constant but for
        #: rounding take no part: by their steps any token would look huge.
        varies = self.step > _ROUNDING * self.step.max()
        self.weight = torch.where(varies, (gaussian / self.step).square(), 0)
        self.error_weight = torch.where(varies, self.step.reciprocal().square(), 0)
        #: Energy of a token of scale 1 in each head group; a group of constant channels has none.
        self.energy = self._by_group(varies.float()).clamp(min=1)

    def fields(self):
        return self.inner.fields() | {"token_scale": ((self.length, len(self.widths)), torch.uint8)}

    def _by_group(self, x: torch.Tensor) -> torch.Tensor:
        """Sums over the channels of each head group, in float64, so that all devices round to the same byte."""
        return torch.stack([group.double().sum(dim=-1) for group in x.split(self.widths, dim=-1)], dim=-1)

    def _expanded(self, codes: torch.Tensor) -> torch.Tensor:
        """The scale of each token and channel."""
        return expand_groups(decode_token_scale(codes), self.widths)

    def _error(self, centred: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Squared error of each head group with the scales of these bytes."""
        step = self.step * self._expanded(codes)
        # Levels count from the middle of the range; a constant channel has its middle alone.
        half = (self.levels - 1) / 2
        nearest = torch.where(step > 0, centred / step, 0).add_(half + 0.5).floor_()
        nearest = torch.minimum(nearest.clamp_(min=0), self.levels - 1).sub_(half)
        return self._by_group(nearest.mul_(step).sub_(centred).square_().mul_(self.error_weight))

    def encode(self, states: torch.Tensor, score=None) -> Fields:
        if self.backend.scale_tokens is None:
            codes, scaled = self._scale_tokens(states)
        else:
            channels = (self.middle, self.step, self.levels, self.weight, self.error_weight)
            rounds = (self._COARSE, self._FINE)
            codes, scaled = self.backend.scale_tokens(states, self.widths, channels, self.energy, rounds)
        return self.inner.encode(scaled) | {"token_scale": codes}

    def _scale_tokens(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The bytes of the tokens' scales `[N, T, head groups]`, and the states by these scales `[N, T, C]`."""
        centred = states.float() - self.middle
        guess = encode_token_scale((self._by_group(centred.square() * self.weight) / self.energy).sqrt()).int()
        codes = guess.to(torch.uint8)
        best = self._error(centred, codes)
        for offsets in (self._COARSE, self._FINE):
            around = codes.int()
            for offset in offsets:
                tried = (around + offset).clamp_(0, 255).to(torch.uint8)
                error = self._error(centred, tried)
                codes = torch.where(error < best, tried, codes)
                best = torch.minimum(error, best)
        return codes, centred / self._expanded(codes) + self.middle

    def decode(self, fields: Fields) -> torch.Tensor:
        centred = self.inner.decode(fields) - self.middle
        return to_finite(centred * self._expanded(fields["token_scale"]) + self.middle, self.dtype)

    def parts(self, fields: Fields) -> tuple[PackedPart, ...] | None:
        return self.inner.parts(fields)


def channel_bits(scheme: QuantScheme, channels: int) -> list[float]:
    """Width of each channel."""
    if scheme.tiers is None:
        return [scheme.bits] * channels
    bits: list[float] = []
    for group in scheme.tiers:
        for count, width in group:
            bits += [width] * count
    return bits


def is_trellis(scheme: QuantScheme, bits: float) -> bool:
    """Whether channels of this width have trellis codes."""
    return scheme.code == "trellis" and bits in trellis.TRELLIS_BITS


def _channel_ranges(states: torch.Tensor) -> torch.Tensor:
    """Highest minus lowest value of each channel of a block: `[N, T, C]` to `[N, C]` float32."""
    low, high = torch.aminmax(states.float(), dim=1)
    return high - low


def _head_groups(widths: tuple[int, ...]) -> torch.Tensor:
    """Head group of each channel, `[C]` int64 on the CPU."""
    widths = torch.tensor(widths, dtype=torch.int64, device="cpu")
    return torch.arange(len(widths), dtype=torch.int64, device="cpu").repeat_interleave(widths)


def _map_groups(function: Callable, states: torch.Tensor, widths: tuple[int, ...]) -> list[torch.Tensor]:
    """The function of the channels of each head group."""
    return [function(group) for group in states.split(widths, dim=-1)]


class _PartsCodec(BlockCodec):
    """States in parts, each with a quantizer of its own; the fields of a part are named `{part}.{field}`."""

    def __init__(self, *args):
        super().__init__(*args)
        #: Quantizer of each part, in the order of storage.
        self.codecs: dict[str, BlockCodec] = {}

    def fields(self):
        fields = {}
        for part, codec in self.codecs.items():
            for name, field in codec.fields().items():
                fields[f"{part}.{name}"] = field
        return fields

    def _encode_parts(self, *states: torch.Tensor) -> Fields:
        """Encode the states of each part, in the order of `codecs`."""
        fields = {}
        for (part, codec), part_states in zip(self.codecs.items(), states):
            for name, tensor in codec.encode(part_states).items():
                fields[f"{part}.{name}"] = tensor
        return fields

    def _decode_parts(self, fields: Fields) -> list[torch.Tensor]:
        return [codec.decode(self._fields_of(part, fields)) for part, codec in self.codecs.items()]

    @staticmethod
    def _fields_of(part: str, fields: Fields) -> Fields:
        """The fields of one part by their own names."""
        prefix = f"{part}."
        return {name.removeprefix(prefix): field for name, field in fields.items() if name.startswith(prefix)}


class MixedChannelCodec(_PartsCodec):
    """1.5 bits: of each head group the half of the channels with the widest range in a block at 2 bits, the others
    rotated among themselves by an orthonormal transform and kept at 1 bit (VidKV, arXiv:2503.16257, section 3.2).

    The choice is a bit per channel and block. VidKV transforms by a full complex FFT, which doubles what is stored; a
    real orthonormal transform does not.
    """

    def __init__(self, *args):
        super().__init__(*args)
        wide, narrow = [], []
        for width in self.widths:
            wide.append(width - width // 2)
            narrow.append(width // 2)
        self.codecs["wide"] = self._with(replace(self.scheme, bits=2), self.length, tuple(wide), torch.float32)
        # A head group of one channel has no narrow half; if none has one, there is no such part.
        self.narrow = tuple(filter(None, narrow))
        if self.narrow:
            low = replace(self.scheme, bits=1, symmetric=True, range_method="mse")
            self.codecs["narrow"] = self._with(low, self.length, self.narrow, torch.float32)
        # For each channel its head group, the first channel of the group, and the group's count of wide channels.
        widths = torch.tensor(self.widths, dtype=torch.int64, device="cpu")
        self._group = _head_groups(self.widths)
        self._group_start = (widths.cumsum(0) - widths)[self._group]
        self._wide_of_group = torch.tensor(wide, dtype=torch.int64, device="cpu")[self._group]

    def fields(self):
        return {"is_wide": ((_mask_bytes(self.channels),), torch.uint8)} | super().fields()

    def _order(self, is_wide: torch.Tensor) -> torch.Tensor:
        """Channels `[..., C]` in the order of storage: the wide ones by head group, then the narrow ones."""
        group = self._group.to(is_wide.device)
        return (group + (~is_wide).long() * len(self.widths)).argsort(dim=-1, stable=True)

    def encode(self, states: torch.Tensor, score=None) -> Fields:
        group = self._group.to(states.device)
        # Rank of each channel's range in its group: sorted by falling range, then by group, both stably.
        falling = (-_channel_ranges(states)).argsort(dim=-1, stable=True)
        by_group = falling.gather(-1, group[falling].argsort(dim=-1, stable=True))
        rank = by_group.argsort(dim=-1) - self._group_start.to(states.device)
        is_wide = rank < self._wide_of_group.to(states.device)

        sorted_states = states.float().gather(-1, self._order(is_wide)[:, None].expand_as(states))
        wide, narrow = sorted_states.split([self.channels - sum(self.narrow), sum(self.narrow)], dim=-1)
        parts = [wide]
        if self.narrow:
            parts.append(torch.cat(_map_groups(rotate, narrow, self.narrow), dim=-1))
        return {"is_wide": _pack_mask(is_wide)} | self._encode_parts(*parts)

    def decode(self, fields: Fields) -> torch.Tensor:
        wide, *narrow = self._decode_parts(fields)
        groups = [wide]
        if self.narrow:
            groups += _map_groups(rotate_back, narrow[0], self.narrow)
        states = torch.cat(groups, dim=-1)
        # The inverse of the order of storage brings each channel back to its place.
        order = self._order(_unpack_mask(fields["is_wide"], self.channels))
        states = states.gather(-1, order.argsort(dim=-1)[..., None, :].expand_as(states))
        return to_finite(states, self.dtype)


class TieredCodec(_PartsCodec):
    """Widths by channel: the channels of each width, of all head groups, are one part with a quantizer of its own.

    The choice of the channels is fixed (`QuantScheme.tiers`), so nothing is stored but the parts.

    Raises:
        ValueError: The tiers do not fill the head groups.
    """

    def __init__(self, *args, static_scales: StaticScales | None = None):
        super().__init__(*args)
        tiers = self._tiers_by_bits()
        #: Channels of each part, int64 on the CPU.
        self.channels_of: dict[str, torch.Tensor] = {}
        #: Channels of each head group in each part.
        self._group_widths: dict[str, tuple[int, ...]] = {}
        for bits in sorted(tiers, reverse=True):
            part, scheme, channels = f"{bits}bit", self.scheme.at_width(bits), torch.cat(tiers[bits])
            scales = None
            if static_scales is not None and scheme.static:
                scale, zero_point = static_scales
                scales = (scale[channels.to(scale.device)], zero_point[channels.to(zero_point.device)])
            # For attention the head groups are the model's; one of them may have no channel of this width.
            counts = _head_groups(self.widths)[channels].bincount(minlength=len(self.widths))
            self._group_widths[part] = tuple(counts.tolist())
            # For the quantizer of the part every tier is a head group; but a chain is all of a group's channels.
            widths = tuple(map(len, tiers[bits]))
            if is_trellis(scheme, bits):
                widths = self._group_widths[part]
            self.codecs[part] = make_codec(
                scheme, self.length, widths, self.dtype, self.backend, scales, self.scale_dtype
            )
            self.channels_of[part] = channels
        self._sizes = list(map(len, self.channels_of.values()))
        #: Place of each channel in storage; `None`: its own place.
        self.order = None
        stored = torch.cat(list(self.channels_of.values()))
        if not (stored.diff() == 1).all():
            self.order, self.stored_channels = stored.argsort(), stored

    def _tiers_by_bits(self) -> dict[float, list[torch.Tensor]]:
        """Channels of the tiers of each width, one tensor per tier."""
        tiers: dict[float, list[torch.Tensor]] = {}
        filled, start = [], 0
        for group in self.scheme.tiers:
            first = start
            for count, bits in group:
                channels = torch.arange(start, start + count, dtype=torch.int64, device="cpu")
                tiers.setdefault(bits, []).append(channels)
                start += count
            filled.append(start - first)
        if filled != list(self.widths):
            raise ValueError(f"tiers: of {filled} channels must fill the head groups of {list(self.widths)}")
        return tiers

    def encode(self, states: torch.Tensor, score=None) -> Fields:
        if self.stored_channels is not None:
            states = states[..., self.stored_channels.to(states.device)]
        return self._encode_parts(*states.split(self._sizes, dim=-1))

    def decode(self, fields: Fields) -> torch.Tensor:
        states = torch.cat(self._decode_parts(fields), dim=-1)
        if self.order is None:
            return states
        # Kept on the device, so that the next call copies nothing.
        self.order = self.order.to(states.device)
        return states[..., self.order]

    def parts(self, fields: Fields) -> tuple[PackedPart, ...] | None:
        parts = []
        for name, codec in self.codecs.items():
            own = codec.parts(self._fields_of(name, fields))
            if own is None:
                return None
            parts.append(replace(own[0], widths=self._group_widths[name]))
        return tuple(parts)

    def records(self) -> tuple[PackRecord, ...] | None:
        records = []
        for name, codec in self.codecs.items():
            own = codec.records()
            if own is None:
                return None
            records.append(replace(own[0], prefix=f"{name}.", channels=tuple(self.channels_of[name].tolist())))
        return tuple(records)


class ProtectedTokenCodec(_PartsCodec):
    """A share of each block's tokens at a higher width (VidKV's selective token protection, section 3.3).

    The tokens of the highest score are protected; without scores those that the lower width would hurt most, by their
    squared error. The choice is a bit per token and block.
    """

    def __init__(self, *args):
        super().__init__(*args)
        scheme = self.scheme
        self.count = _protected_count(scheme, self.length)
        low = replace(scheme, protected=0.0)
        # Sign and range method have other defaults at the higher width; a range by squared error stays one.
        high = replace(low, bits=scheme.protected_bits, symmetric=None, range_method=None)
        if scheme.range_method != "minmax":
            high = replace(high, range_method="mse")
        self.unprotected = self._with(low, self.length, self.widths, torch.float32)
        self.codecs["high"] = self._with(high, self.count, self.widths, self.dtype)
        self.codecs["low"] = self._with(low, self.length - self.count, self.widths, self.dtype)

    def fields(self):
        return {"is_protected": ((_mask_bytes(self.length),), torch.uint8)} | super().fields()

    def encode(self, states: torch.Tensor, score: torch.Tensor | None = None) -> Fields:
        if score is None:
            # The error of the lower width over the whole block stands for the error in the part.
            low = self.unprotected.decode(self.unprotected.encode(states))
            score = (states.float() - low).square().sum(-1)
        chosen = score.argsort(dim=-1, descending=True, stable=True)[:, : self.count]
        is_protected = torch.zeros(states.shape[:2], dtype=torch.bool, device=states.device).scatter(1, chosen, True)
        # The protected tokens go to the front, then both parts are stored by themselves.
        order = _mask_order(is_protected)
        sorted_states = states.gather(1, order[..., None].expand_as(states))
        parts = sorted_states.tensor_split([self.count], dim=1)
        return {"is_protected": _pack_mask(is_protected)} | self._encode_parts(*parts)

    def decode(self, fields: Fields) -> torch.Tensor:
        states = torch.cat(self._decode_parts(fields), dim=-2)
        order = _mask_order(_unpack_mask(fields["is_protected"], self.length))
        return states.gather(-2, order.argsort(dim=-1)[..., None].expand_as(states))


def _protected_count(scheme: QuantScheme, length: int) -> int:
    """Protected tokens of a block."""
    return max(1, round(scheme.protected * length))


def _mask_bytes(length: int) -> int:
    return -(-length // 8)


def _pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """`[..., ceil(n / 8)]` uint8 of a bool `[..., n]`; element `i` is bit `i % 8` of byte `i // 8`."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (padded << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1).to(torch.uint8)


def _unpack_mask(packed: torch.Tensor, length: int) -> torch.Tensor:
    """Inverse of `_pack_mask` for a mask of `length` elements."""
    bits = packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten(-2)[..., :length].bool()


def _mask_order(mask: torch.Tensor) -> torch.Tensor:
    """Positions `[..., n]`: those in the mask, then the others, each in their own order."""
    return (~mask).to(torch.uint8).argsort(dim=-1, stable=True)


def check_codec(scheme: QuantScheme, length: int) -> None:
    """Raise a `ValueError` for a scheme that has no quantizer for blocks of `length` tokens."""
    if scheme.quantizer is not None and scheme.quantizer not in QUANTIZERS:
        known = ", ".join(sorted(QUANTIZERS)) or "none"
        raise ValueError(f"quantizer={scheme.quantizer!r}: must be registered (registered are: {known})")
    if scheme.protected and _protected_count(scheme, length) >= length:
        raise ValueError(f"protected={scheme.protected}: must leave tokens of a block of {length} unprotected")


def _codec_class(scheme: QuantScheme) -> type[BlockCodec]:
    """The quantizer of a scheme; the one that wraps others comes first."""
    if scheme.token_scale:
        return TokenScaledCodec
    if scheme.tiers is not None:
        return TieredCodec
    if scheme.static:
        return TrellisCodec if is_trellis(scheme, scheme.bits) else StaticCodec
    if scheme.bits == 16 and scheme.quantizer is None:
        return ExactCodec  # lossless, so neither protection nor rotation gains anything
    if scheme.protected:
        return ProtectedTokenCodec
    if scheme.rotation:
        return RotatedCodec
    if scheme.quantizer is not None:
        return QUANTIZERS[scheme.quantizer]
    if scheme.bits == 1.5:
        return MixedChannelCodec
    return UniformCodec


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
        scheme: Settings of the side.
        length: Tokens per block.
        widths: Channels of each head group.
        dtype: Type of the states.
        backend: Default: the reference.
        static_scales: For `scheme.static`; without them its codec only tells the size.
        scale_dtype: Default: `parameter_dtype(dtype)`.

    Raises:
        ValueError: The scheme asks for a quantizer that does not exist or does not fit the block or the head groups.
    """
    check_codec(scheme, length)
    backend = backend or get_backend("reference", torch.device("cpu"))
    arguments = (scheme, length, widths, dtype, backend, scale_dtype or parameter_dtype(dtype))
    codec_class = _codec_class(scheme)
    if codec_class in (TokenScaledCodec, TieredCodec, StaticCodec, TrellisCodec):
        return codec_class(*arguments, static_scales=static_scales)
    return codec_class(*arguments)


def block_length(*schemes: QuantScheme) -> int:
    """Tokens of a block that all sides share, G: the larger group size; with protected tokens at least 128."""
    length, is_protected = 0, False
    for scheme in schemes:
        length = max(length, scheme.group_size or DEFAULT_BLOCK_LENGTH)
        is_protected = is_protected or scheme.protected > 0
    # A multiple of the group size, so that a block still holds whole groups.
    if is_protected:
        length *= -(-DEFAULT_BLOCK_LENGTH // length)
    return length


def block_nbytes(codec: BlockCodec) -> int:
    """Bytes that one block takes, everything counted."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in codec.fields().values())
