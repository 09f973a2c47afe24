"""Bytes that a KV cache will take, before anything is loaded: packed latents against dense keys and values.

Reads nothing but the model's config.json. Everything is counted: codes, scales and zero points, the full-precision
window and sinks, the block table. A layer with a sliding window holds no more than that, here as in the dense cache.

    python scripts/estimate_memory.py --model meta-llama/Llama-2-7b-hf --dtype float16 --rank 0.5
    python scripts/estimate_memory.py --rank 128 --k_bits 4 --v_bits 3 --length 4096 32768 --batch_size 8
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from configuration_alrd_llama import SIDES, ALRDLlamaConfig, check_positive
from modules.cache.scheme import TABLE_ENTRY_NBYTES, CacheScheme, LayerWidths, SinkChannels
from modules.files import write_json
from modules.fit.budget import dense_nbytes
from modules.kivi_cache import config_schemes, config_sink_channels, config_widths, config_windows
from scripts.common import (
    BUNDLED_MODEL,
    DTYPES,
    CacheOptions,
    environment,
    format_table,
    human_bytes,
    latent_config,
    parse_config,
)


@dataclass
class EstimateConfig(CacheOptions):
    """Options of the estimate."""

    model: str = field(
        default=BUNDLED_MODEL,
        metadata={"help": "Folder, GGUF file or hub name of a model, dense or split; only its config.json is read."},
    )
    length: list[int] = field(
        default_factory=lambda: [4096, 32768, 131072], metadata={"help": "Tokens per sequence, one or more."}
    )
    batch_size: int = field(default=1, metadata={"help": "Sequences."})
    rank: float = field(
        default=0.5,
        metadata={
            "help": "Rank of every key and value projection: up to 1 a share of the full rank, above 1 the total rank "
            "itself. A checkpoint that is split already keeps its ranks."
        },
    )
    head_group_size: int | None = field(
        default=None, metadata={"help": "Key/value heads that share a latent. None: all, or the split checkpoint's."}
    )
    dtype: Literal[DTYPES] | None = field(
        default=None, metadata={"help": "Type of the model. None: the checkpoint's, or float16 if it names none."}
    )
    output: str | None = field(default=None, metadata={"help": "JSON file to write."})

    def __post_init__(self):
        super().__post_init__()
        check_positive("length", *self.length)
        check_positive("batch_size", self.batch_size)


def layer_breakdown(
    scheme: CacheScheme,
    length: int,
    widths: LayerWidths,
    dtype: torch.dtype,
    batch_size: int = 1,
    sink_channels: SinkChannels | None = None,
    sliding_window: int | None = None,
) -> dict[str, int]:
    """Bytes of rows of `length` tokens in one layer by what they hold; the sum is all that the layer takes."""
    held = scheme.held(length, sliding_window)
    codes, parameters = 0, 0
    for codec in scheme.codecs(widths, dtype).values():
        for name, (shape, field_dtype) in codec.fields().items():
            nbytes = held.blocks * torch.Size(shape).numel() * field_dtype.itemsize
            if name.endswith(("scale", "zero_point")):
                parameters += nbytes
            else:
                codes += nbytes
    table = held.blocks * TABLE_ENTRY_NBYTES
    exact = scheme.layer_nbytes(length, widths, dtype, sink_channels, sliding_window) - codes - parameters - table
    parts = {"codes": codes, "parameters": parameters, "exact": exact, "table": table}
    parts = {name: batch_size * nbytes for name, nbytes in parts.items()}
    return parts | {"parameters": parts["parameters"] + scheme.static_nbytes(widths)}


def layer_room(
    scheme: CacheScheme,
    length: int,
    widths: LayerWidths,
    dtype: torch.dtype,
    batch_size: int,
    sink_channels: SinkChannels | None = None,
    sliding_window: int | None = None,
) -> int:
    """Bytes that a layer of `batch_size` rows allocates at most: the pool has a quarter of slack, the window room."""
    held = scheme.held(length, sliding_window)
    table, blocks = held.blocks * TABLE_ENTRY_NBYTES, batch_size * held.blocks
    slot = scheme.slot_nbytes(widths, dtype)
    channels = sum(map(sum, widths))
    of_sink = sum(sink_channels.values()) if sink_channels else channels
    window = scheme.residual_length + scheme.block_length
    exact = (window * channels + scheme.sink_length * of_sink) * dtype.itemsize
    return (blocks + blocks // 4) * slot + batch_size * (table + exact) + scheme.static_nbytes(widths)


def dense_cache_nbytes(model: ALRDLlamaConfig, length: int, dtype: torch.dtype, batch_size: int) -> int:
    """Bytes of a dense cache, whose layers with a sliding window hold one token less than that."""
    tokens = 0
    for window in map(model.layer_window, range(model.num_hidden_layers)):
        tokens += length if window is None else min(length, window - 1)
    return dense_nbytes(model, tokens, dtype, batch_size) // model.num_hidden_layers


def _range(values: tuple[int, ...]) -> str:
    """Smallest and largest, or the only one, as text."""
    low, high = min(values), max(values)
    return f"{low}–{high}" if low < high else f"{low}"


def main(config: EstimateConfig) -> dict[str, Any]:
    """Print the table; returns the figures in bytes."""
    model, is_split = latent_config(config.model, config.rank, config.head_group_size)
    dtype = getattr(torch, config.dtype) if config.dtype else model.dtype or torch.float16
    scheme, tiered = config_schemes(model, **config.cache_settings())
    by_layer = zip(config_widths(model), config_sink_channels(model), config_windows(model), strict=True)
    layers = [(tiered.get(i, scheme), *of_layer) for i, of_layer in enumerate(by_layer)]

    estimates = []
    for length in config.length:
        parts = [
            layer_breakdown(its_scheme, length, widths, dtype, config.batch_size, *how)
            for its_scheme, widths, *how in layers
        ]
        breakdown = dict.fromkeys(parts[0], 0)
        for part in parts:
            for name, nbytes in part.items():
                breakdown[name] += nbytes
        dense, packed = dense_cache_nbytes(model, length, dtype, config.batch_size), sum(breakdown.values())
        estimates.append(
            {
                "length": length,
                "dense": dense,
                "packed": packed,
                "ratio": dense / packed,
                "dense_per_token": dense / (length * config.batch_size),
                "packed_per_token": packed / (length * config.batch_size),
                "breakdown": breakdown,
                "allocated_at_most": sum(
                    layer_room(its_scheme, length, widths, dtype, config.batch_size, *how)
                    for its_scheme, widths, *how in layers
                ),
            }
        )

    channels = [list(map(sum, widths)) for _, widths, *_ in layers]
    full = model.num_key_value_heads * model.head_dim
    print(f"{config.model}: {model.num_hidden_layers} layers, {full} key and value channels, {dtype}, ", end="")
    print(f"batch {config.batch_size}")
    print("ranks of the split checkpoint, --rank is not used" if is_split else f"--rank {config.rank:g}", end=": ")
    sides = ("kv",) if model.joint_kv else SIDES
    print(", ".join(f"{side} {_range(ranks)}" for side, ranks in zip(sides, zip(*channels), strict=True)))
    first = layers[0][0]
    stored = f"keys and values {first.keys}" if model.joint_kv else f"keys {first.keys}, values {first.values}"
    print(stored, end=", ")
    print(
        ", ".join(f"{name} {getattr(scheme, name)}" for name in ("residual_length", "sink_length")),
        end="\n\n",
    )
    header = ["length", "dense", "packed", "ratio", "dense/token", "packed/token"]
    header += ["codes", "scales+zeros", "window+sinks", "table", "allocated at most"]
    rows = []
    for e in estimates:
        sizes = (e["dense_per_token"], e["packed_per_token"], *e["breakdown"].values(), e["allocated_at_most"])
        row = [f"{e['length']:,}", human_bytes(e["dense"]), human_bytes(e["packed"]), f"{e['ratio']:.2f}"]
        rows.append(row + [human_bytes(size) for size in sizes])
    print(format_table(header, rows))

    result = {
        "config": asdict(config),
        "dtype": str(dtype).removeprefix("torch."),
        "cache": asdict(scheme),
        "truncation_ranks": model.truncation_ranks,
        "estimates": estimates,
        "environment": environment(),
    }
    if config.output:
        write_json(config.output, result)
    return result


if __name__ == "__main__":
    main(parse_config(EstimateConfig, __doc__))
