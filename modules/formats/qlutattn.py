"""QLUTATTN's formats: keys per token, values per channel, blocks of 128 tokens and 128 channels, 1, 2 or 4 bits."""

from collections.abc import Iterable, Mapping
from statistics import median_low

import torch

from configuration_alrd_llama import QuantScheme
from modules.cache.scheme import CacheScheme

#: The six formats, `K1` … `V4`.
QLUTATTN: dict[str, QuantScheme] = {}
for _bits in (1, 2, 4):
    QLUTATTN[f"K{_bits}"] = QuantScheme(bits=_bits, orientation="per_token")
    QLUTATTN[f"V{_bits}"] = QuantScheme(bits=_bits, orientation="per_channel")

#: Variance and range below which a block is stored at a width; wider ones take 4 bits.
LIMITS = ((0.1, 2.0, 1), (0.5, 8.0, 2))


def select_quantization_bits(block: torch.Tensor) -> int:
    """Width of a block of states by its variance and range: 1, 2 or 4 (`LIMITS`)."""
    block = block.float()
    spread, variance = (block.max() - block.min()).item(), block.var(correction=0).item()
    for limit, reach, bits in LIMITS:
        if variance < limit and spread < reach:
            return bits
    return 4


def layer_schemes_by_range(
    states: Iterable[tuple[torch.Tensor, torch.Tensor]], **window: int
) -> Mapping[int, CacheScheme]:
    """A scheme for every layer, each side at the width of its sample, for `create_kivi_cache(layer_schemes=…)`.

    A pool has slots of one size, so the width is chosen once per layer and side: the lower median of the widths that
    `select_quantization_bits` gives the blocks of a sample.

    Args:
        states: Keys `[B, T, C_k]` and values `[B, T, C_v]` of each layer, e.g. `layer.states()` of a 16-bit cache after
            a prompt of at least 128 tokens.
        window: `residual_length` and `sink_length`.

    Raises:
        ValueError: The sample holds no block.
    """
    schemes = {}
    for i, pair in enumerate(states):
        bits = []
        for side in pair:
            # Tokens beyond the last whole block would wait in the window.
            runs = side.shape[1] // 128
            if not runs:
                raise ValueError(f"states: {side.shape[1]} tokens of layer {i} must be at least a block of 128")
            widths = []
            for run in side[:, : runs * 128].split(128, dim=1):
                # The rows of the batch are blocks of their own.
                for channels in run.split(128, dim=2):
                    widths.extend(map(select_quantization_bits, channels))
            bits.append(median_low(widths))
        schemes[i] = CacheScheme.of(QLUTATTN[f"K{bits[0]}"], QLUTATTN[f"V{bits[1]}"], **window)
    return schemes
