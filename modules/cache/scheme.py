"""What a cache stores and how (`CacheScheme`), and the bytes that follow from it."""

from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import NamedTuple

import torch

from configuration_alrd_llama import ALRDLlamaConfig, QuantScheme, check_count, side_scheme
from modules.cache.codecs import BlockCodec, StaticScales, block_length, block_nbytes, check_codec, make_codec
from modules.kernels import Backend
from modules.svd_linear import shard_groups

#: The two sides as the cache names them; projections and settings say "k" and "v" (`SIDES` of the configuration).
SIDES = ("keys", "values")

#: Channels of each head group of the keys and of the values of one layer; one entry alone is of a latent of both, which
#: a layer holds as its keys.
LayerWidths = tuple[tuple[int, ...], ...]

#: Channels of the sinks of each side, where they are not those of `LayerWidths`: the layers of a block hold their own
#: keys and values there, side by side.
SinkChannels = dict[str, int]

#: Calibrated scales of a layer by side, "keys" and "values".
LayerScales = dict[str, StaticScales]

#: A block costs a row three int32 in its table: slot, first position, valid tokens.
TABLE_ENTRY_NBYTES = 12


def field_without_capacity(scheme: QuantScheme) -> str | None:
    """The field of a scheme for which a cache of fixed capacity cannot store it; `None`: it can."""
    if scheme.quantizer is not None:
        return "quantizer"
    if scheme.protected:
        return "protected"
    if scheme.rotation:
        return "rotation"
    return "bits" if scheme.bits == 1.5 and scheme.tiers is None else None


def check_fixed(name: str, scheme: QuantScheme) -> None:
    """Raise a `ValueError` for a scheme of the side `name` that a cache of fixed capacity does not store."""
    if (field := field_without_capacity(scheme)) is not None:
        raise ValueError(
            f"capacity: {name} have {field}={getattr(scheme, field)!r}, which a cache of fixed capacity does not "
            "store; leave out capacity, or choose another width or scheme"
        )


class Held(NamedTuple):
    """Where the tokens of a row stand, which came one after the other and were never cropped.

    Attributes:
        sinks, window: Tokens in full precision at the start and at the end.
        blocks: Packed blocks between them.
    """

    sinks: int
    blocks: int
    window: int

    @property
    def exact(self) -> int:
        """Tokens in full precision."""
        return self.sinks + self.window


@dataclass(frozen=True)
class CacheScheme:
    """Settings of a cache; the fields are those of `ALRDLlamaConfig`.

    `keys` and `values` are the `QuantScheme` of each side, `block_length` the tokens per block, G.
    """

    k_bits: float = ALRDLlamaConfig.k_bits
    v_bits: float = ALRDLlamaConfig.v_bits
    group_size: int = ALRDLlamaConfig.group_size
    residual_length: int = ALRDLlamaConfig.residual_length
    sink_length: int = ALRDLlamaConfig.sink_length
    k_scheme: dict = field(default_factory=dict)
    v_scheme: dict = field(default_factory=dict)

    def __post_init__(self):
        for name in ("k_scheme", "v_scheme"):
            given = getattr(self, name) or {}
            # A copy, since the caller may change the dictionary later; what is no dictionary is refused below.
            object.__setattr__(self, name, dict(given) if isinstance(given, dict) else given)
        check_count("residual_length", self.residual_length)
        check_count("sink_length", self.sink_length)
        check_codec(self.keys, self.block_length)
        check_codec(self.values, self.block_length)

    @classmethod
    def from_config(cls, config: ALRDLlamaConfig) -> "CacheScheme":
        """The settings of a model's configuration, without its width tiers (`config_schemes`)."""
        return cls(**{f.name: getattr(config, f.name) for f in fields(cls)})

    @classmethod
    def of(cls, keys: QuantScheme, values: QuantScheme, **window) -> "CacheScheme":
        """The scheme of two sides; `window`: `residual_length` and `sink_length`."""
        k_scheme, v_scheme = asdict(keys), asdict(values)
        k_bits, v_bits = k_scheme.pop("bits"), v_scheme.pop("bits")
        return cls(k_bits, v_bits, keys.group_size, **window, k_scheme=k_scheme, v_scheme=v_scheme)

    @cached_property
    def keys(self) -> QuantScheme:
        return side_scheme("k", self.k_bits, self.group_size, self.k_scheme)

    @cached_property
    def values(self) -> QuantScheme:
        return side_scheme("v", self.v_bits, self.group_size, self.v_scheme)

    @cached_property
    def block_length(self) -> int:
        return block_length(self.keys, self.values)

    def shard(self, rank: int, size: int) -> "CacheScheme":
        """The scheme restricted to the head groups of a rank of tensor parallelism."""
        shards = {}
        for name in ("k_scheme", "v_scheme"):
            fields_of_side = getattr(self, name)
            if fields_of_side.get("tiers"):
                shards[name] = {**fields_of_side, "tiers": shard_groups(fields_of_side["tiers"], rank, size)}
        return replace(self, **shards) if shards else self

    def codecs(
        self,
        widths: LayerWidths,
        dtype: torch.dtype,
        backend: Backend | None = None,
        static_scales: LayerScales | None = None,
    ) -> dict[str, BlockCodec]:
        """Quantizer of each side that has widths, `{"keys": …, "values": …}`; arguments as for `make_codec`."""
        codecs, scales = {}, static_scales or {}
        for side, width in zip(SIDES, widths):
            scheme = getattr(self, side)
            codecs[side] = make_codec(scheme, self.block_length, width, dtype, backend, scales.get(side))
        return codecs

    @property
    def takes_capacity(self) -> bool:
        """Whether a cache of fixed capacity can store it."""
        return field_without_capacity(self.keys) is None and field_without_capacity(self.values) is None

    @property
    def longest_window(self) -> int:
        """Tokens that a window holds at most after an append."""
        return self.residual_length + self.block_length - 1

    def flushed_blocks(self, window: int) -> int:
        """Blocks that leave a window which has grown to this many tokens."""
        return max(0, (window - self.residual_length) // self.block_length)

    def held(self, length: int, sliding_window: int | None = None) -> Held:
        """Where `length` tokens of a row stand, or what a sliding window has left of them. All sizes of a cache follow
        from it."""
        sinks = min(length, self.sink_length)
        blocks = self.flushed_blocks(length - sinks)
        window = length - sinks - blocks * self.block_length
        if sliding_window is not None:
            # The first token of the window sees so many before it.
            blocks = min(blocks, -(-(sliding_window - 1) // self.block_length))
        return Held(sinks, blocks, window)

    def packed_tokens(self, length: int) -> int:
        """Tokens in packed blocks of a row that holds `length`."""
        return self.held(length).blocks * self.block_length

    def static_nbytes(self, widths: LayerWidths) -> int:
        """Bytes of the calibrated scales of a layer, two float32 per channel of a static side; once for all rows."""
        # `static` is true or false: sides without calibrated scales count nothing.
        channels = 0
        for side, width in zip(SIDES, widths):
            channels += sum(width) * getattr(self, side).static
        return 2 * 4 * channels

    def slot_nbytes(self, widths: LayerWidths, dtype: torch.dtype) -> int:
        """Bytes of a packed block of a layer, keys and values."""
        return sum(map(block_nbytes, self.codecs(widths, dtype).values()))

    def layer_nbytes(
        self,
        length: int,
        widths: LayerWidths,
        dtype: torch.dtype,
        sink_channels: SinkChannels | None = None,
        sliding_window: int | None = None,
    ) -> int:
        """Bytes that one row of `length` tokens takes in a layer: `nbytes_used` without `static_nbytes`.

        Args:
            length, widths, dtype: Tokens, and what the layer stores of each.
            sink_channels: Of the layer of a block; `None`: sinks are as wide as the window.
            sliding_window: Positions that a query of the layer sees at most; `None`: all before it.
        """
        held, channels = self.held(length, sliding_window), sum(map(sum, widths))
        of_sink = channels if sink_channels is None else sum(sink_channels.values())
        packed = held.blocks * (self.slot_nbytes(widths, dtype) + TABLE_ENTRY_NBYTES)
        return packed + (held.window * channels + held.sinks * of_sink) * dtype.itemsize
