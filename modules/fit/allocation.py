"""Ranks and widths for a budget: which latent channels are kept, and with how many bits.

Every channel of every layer has a cost for each width, its measured error times what an error costs in its layer, and a
price, the bytes that it takes in a cache of given length. The choice minimises the sum of the costs at a total price:
with one multiplier on the bytes every channel chooses for itself (Lagrangian relaxation; the discrete form of reverse
water-filling).
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from configuration_alrd_llama import QuantScheme
from modules.cache.codecs import block_nbytes, make_codec
from modules.cache.scheme import TABLE_ENTRY_NBYTES, CacheScheme
from modules.files import save_tensors
from modules.hadamard_utils import rotate
from modules.quant_utils import grid
from modules.svd_linear import Factors

#: Widths of the tiers that are offered, beside 0.
TIER_BITS = (1, 2, 3, 4, 8)

#: Version of the measurements that `save_costs` keeps; part of their key.
COSTS_VERSION = 3

#: Shift of the middle of a static range and growth of it, in turn.
_MOVES = [(0, 1), (0, -1), (1, 0), (-1, 0)]

# ---- costs


@dataclass
class ChannelCosts:
    """What the channels of one head group cost.

    Attributes:
        dropped: `[n]` float64, `E|c|²` in the unit of the objective: the error of a channel that is not kept.
        kept: `[n, widths]` float64, measured error of a channel at each width.
        scales: For static scales, scale and zero point `[n]` at each width; else empty.
    """

    dropped: torch.Tensor
    kept: torch.Tensor
    scales: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)


def measure_costs(
    factors: Factors, sample: torch.Tensor, scheme: QuantScheme, length: int, bits: tuple = TIER_BITS
) -> ChannelCosts:
    """Quantize a sample of latents at each width.

    Args:
        factors: Of full rank, n channels.
        sample: `[windows, S, out]` outputs of the dense projection; S is a multiple of `length`.
        scheme: What the cache will store, but for the width.
        length: Tokens of a block.
        bits: Widths to measure.
    """
    latents = sample.double() @ factors.project.T
    dropped = factors.unit * latents.square().mean((0, 1))
    blocks = latents.float().reshape(-1, length, latents.shape[-1])
    channels, kept, scales = blocks.shape[-1], [], []
    for width in bits:
        at_width = scheme.at_width(width)
        static = static_scales(blocks.flatten(0, 1), width) if at_width.static else None
        codec = make_codec(at_width, length, (channels,), torch.float32, static_scales=static)
        if scheme.per_channel:
            error = (codec.decode(codec.encode(blocks)) - blocks).double().square().mean((0, 1))
        else:
            # A tier is rotated, so its channels share their error in proportion to the tier's variance.
            error = _rotated_error(codec, blocks)
        kept.append(torch.minimum(factors.unit * error, dropped))
        if static is not None:
            scales.append(static)
    return ChannelCosts(dropped, torch.stack(kept, dim=1), scales)


def save_costs(path: Path, costs: dict[str, list[ChannelCosts]]) -> None:
    """Write costs by projection to a safetensors file."""
    tensors = {}
    for name, groups in costs.items():
        for i, group in enumerate(groups):
            tensors |= {f"{name}/{i}/dropped": group.dropped, f"{name}/{i}/kept": group.kept}
            if group.scales:
                tensors[f"{name}/{i}/scales"] = torch.stack([torch.stack(pair) for pair in group.scales])
    save_tensors(path, tensors)


def load_costs(path: Path) -> dict[str, list[ChannelCosts]]:
    """Inverse of `save_costs`."""
    try:
        tensors, costs = load_file(path), {}
    except SafetensorError as error:
        raise ValueError(f"{path}: is damaged, delete it to measure the costs anew ({error})") from None
    for name, i in sorted({(name, int(i)) for name, i, _ in (key.split("/") for key in tensors)}):
        pairs = [tuple(pair) for pair in tensors.get(f"{name}/{i}/scales", ())]
        costs.setdefault(name, []).append(
            ChannelCosts(tensors[f"{name}/{i}/dropped"], tensors[f"{name}/{i}/kept"], pairs)
        )
    return costs


def _rotated_error(codec, blocks: torch.Tensor) -> torch.Tensor:
    """Error of each channel of a rotated tier: its second moment times the tier's relative error."""
    rotated = rotate(blocks)
    relative = (codec.decode(codec.encode(rotated)) - rotated).square().sum() / rotated.square().sum().clamp(min=1e-30)
    return relative.double() * blocks.double().square().mean((0, 1))


def static_scales(latents: torch.Tensor, bits: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point `[n]`, float32, of least squared error for latents `[N, n]`; a constant channel gets its own
    value as zero point."""
    x, (levels, spacing, _) = latents.float().T.contiguous(), grid(bits)
    low, high = x.aminmax(dim=1)
    mean = x.mean(1)
    start = (mean, torch.maximum(high - mean, mean - low))

    def error(centre: torch.Tensor, half: torch.Tensor) -> torch.Tensor:
        zero, step = (centre - half)[:, None], (2 * half / (levels - 1)).clamp(min=1e-38)[:, None]
        codes = ((x - zero) / step).add_(0.5).floor_().clamp_(0, levels - 1)
        return codes.mul_(step).add_(zero).sub_(x).square_().mean(1)

    # A coarse search of the range, down to where the tails are heavy, then ever smaller moves of its size and middle.
    centre, half = low + (high - low) / 2, (high - low) / 2
    best = error(centre, half)
    moves = [(0.0, 2 ** (-i / 4)) for i in range(24)]
    moves += [(shift * d, 1 + grow * d) for d in (0.08, 0.04, 0.02, 0.01) for shift, grow in _MOVES * 2]
    for i, (shift, factor) in enumerate(moves):
        of = start if i < 24 else (centre, half)
        new = (of[0] + shift * of[1], of[1] * factor)
        found = error(*new)
        better = (found < best) & (high > low)
        best, centre, half = (torch.where(better, a, b) for a, b in zip((found, *new), (best, centre, half)))
    return 2 * half / (levels - 1) / spacing, centre - half


# ---- prices


@dataclass(frozen=True)
class Prices:
    """Bytes in a layer's cache of given length, one row: each is exact, and so is their sum.

    Attributes:
        channel: For a channel at each width.
        tier: For a tier at each width, beside its channels: the scales that a token has per tier.
        layer: For a layer whatever it stores.
        group: Channels of a tier that share a token's scale: a larger tier pays `tier` for each group. 0: no bound.
    """

    channel: tuple[int, ...]
    tier: tuple[int, ...]
    layer: int
    group: int = 0


def tier_prices(scheme: QuantScheme, cache: CacheScheme, bits: tuple, length: int, dtype: torch.dtype) -> Prices:
    """Prices of one side of a cache of `length` tokens.

    Args:
        scheme: Of the side, but for the width.
        cache: Window, sinks and block length.
        bits: Widths.
        length: Tokens.
        dtype: Of the model, and so of window and sinks.
    """
    held = cache.held(length)
    channel, tier = [], []
    for width in bits:
        at_width = scheme.at_width(width)
        one, two = (block_nbytes(make_codec(at_width, cache.block_length, (n,), dtype)) for n in (1, 2))
        own = 2 * 4 if scheme.static else 0  # calibrated scale and zero point, once a layer
        channel.append(held.blocks * (two - one) + held.exact * dtype.itemsize + own)
        tier.append(held.blocks * (2 * one - two))
    return Prices(
        tuple(channel), tuple(tier), held.blocks * TABLE_ENTRY_NBYTES, 0 if scheme.per_channel else scheme.group_size
    )


# ---- choice


@dataclass
class Plan:
    """Ranks and widths by projection and head group.

    Attributes:
        channels: Channels of the full-rank factors that are kept, tier after tier.
        tiers: (channels, bits) of each tier, the widest first.
        scales: Scale and zero point of the kept channels, for static scales; else empty.
        nbytes: Bytes of one row of the length that was planned for, everything counted.
        divergence: What the costs add up to: the predicted KL divergence if the rates are those of `probe_rates`.
    """

    channels: dict[str, list[torch.Tensor]]
    tiers: dict[str, list[list[tuple[int, float]]]]
    scales: dict[str, list[tuple[torch.Tensor, torch.Tensor]]]
    nbytes: int
    divergence: float


def allocate(
    costs: dict[str, list[ChannelCosts]],
    rates: dict[str, float],
    prices: dict[str, Prices],
    bits: tuple,
    budget: int,
) -> Plan:
    """Choose the width of every channel, 0 included, at the least total cost within a budget.

    Args:
        costs: Of each head group of each projection, by name.
        rates: Factor on the costs of each projection.
        prices: Of a layer's "k_proj" and "v_proj".
        bits: Widths that costs and prices are for.
        budget: Bytes of one row, all layers together.

    Raises:
        ValueError: One channel of the smallest width in each head group is beyond the budget.
    """
    fixed = sum(prices["k_proj"].layer for name in costs if name.endswith("k_proj"))
    smallest = fixed + sum(
        len(groups) * min(map(sum, zip(prices[name[-6:]].channel, prices[name[-6:]].tier)))
        for name, groups in costs.items()
    )
    if smallest > budget:
        raise ValueError(
            f"budget: {budget:,} bytes must be at least {smallest:,}, what block tables, window, sinks and scales take "
            "with one channel per projection and head group"
        )

    def choose(multiplier: float) -> tuple[dict, int, float]:
        chosen, nbytes, cost = {}, fixed, 0.0
        for name, groups in costs.items():
            price = prices[name[-6:]]
            chosen[name] = []
            for group in groups:
                table = rates[name] * torch.cat([group.dropped[:, None], group.kept], dim=1)
                widths, its_bytes = _choose_group(table, price, multiplier)
                chosen[name].append(widths)
                nbytes += its_bytes
                cost += table.gather(1, widths[:, None]).sum().item()
        return chosen, nbytes, cost

    # Between a multiplier at which every byte pays and one at which none does, by halving of the logarithm.
    low, high = -100.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if choose(2.0**middle)[1] > budget else (low, middle)
    chosen, nbytes, cost = choose(2.0**high)
    return _to_plan(chosen, costs, bits, nbytes, cost)


def _choose_group(table: torch.Tensor, price: Prices, multiplier: float) -> tuple[torch.Tensor, int]:
    """Column of each row (0: dropped) of a `[n, 1 + widths]` table with the least cost plus bytes, and the bytes."""
    per_channel = torch.tensor([0, *price.channel], dtype=torch.float64, device="cpu")
    widths = range(len(price.channel))
    sets, best = [tuple(widths)], None
    if any(price.tier):
        # Every set of tiers is tried, since one that is used costs bytes of its own.
        sets = [tiers for n in widths for tiers in itertools.combinations(widths, n + 1)]
    for tiers in sets:
        columns = torch.tensor([0, *(w + 1 for w in tiers)], dtype=torch.int64, device="cpu")
        index = columns[(table[:, columns] + multiplier * per_channel[columns]).argmin(dim=1)]
        if not index.any():
            # A projection keeps at least its first channel.
            index[0] = min(tiers, key=lambda w: price.channel[w] + price.tier[w]) + 1
        counts = [int((index == w + 1).sum()) for w in widths]
        scales = sum(p * -(-n // (price.group or max(n, 1))) for p, n in zip(price.tier, counts))
        nbytes = int(per_channel[index].sum()) + scales
        total = table.gather(1, index[:, None]).sum().item() + multiplier * nbytes
        if best is None or total < best[0]:
            best = (total, index, nbytes)
    return best[1], best[2]


def _to_plan(chosen: dict, costs: dict[str, list[ChannelCosts]], bits: tuple, nbytes: int, cost: float) -> Plan:
    plan = Plan({}, {}, {}, nbytes, cost)
    for name, groups in chosen.items():
        plan.channels[name], plan.tiers[name], plan.scales[name] = [], [], []
        for widths, group in zip(groups, costs[name], strict=True):
            order = sorted((w for w in set(widths.tolist()) if w), key=lambda w: -bits[w - 1])
            members = [(widths == w).nonzero()[:, 0] for w in order]
            plan.channels[name].append(torch.cat(members))
            plan.tiers[name].append([(len(m), bits[w - 1]) for w, m in zip(order, members)])
            if group.scales:
                pairs = [[s[m] for s in group.scales[w - 1]] for w, m in zip(order, members)]
                plan.scales[name].append(tuple(torch.cat(s) for s in zip(*pairs)))
    return plan


def largest_share(
    ranks_of: Callable[[float], dict[str, list[int]]], nbytes_of: Callable[[dict[str, list[int]]], int], budget: int
) -> float:
    """The largest share of the ranks, in steps of 1/512, whose cache fits the budget, for searches that give ranks.

    Args:
        ranks_of: Ranks for a share.
        nbytes_of: Bytes of a cache with these ranks.
        budget: Bytes.

    Raises:
        ValueError: No share fits.
    """
    low, high = 0, 512
    while low < high:
        middle = (low + high + 1) // 2
        try:
            fits = nbytes_of(ranks_of(middle / 512)) <= budget
        except ValueError:  # too small a share for this search
            fits = True
        low, high = (middle, high) if fits else (low, middle - 1)
    try:
        fits = low > 0 and nbytes_of(ranks_of(low / 512)) <= budget
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"budget: {budget:,} bytes must hold the smallest ranks")
    return low / 512
