"""Ranks and widths for a budget: which latent channels are kept, and with how many bits.

Every channel of every layer has a cost for each width, its measured error times what an error costs in its layer, and a
price, the bytes that it takes in a cache of given length. The choice minimises the sum of the costs at a total price:
with one multiplier on the bytes every channel chooses for itself (Lagrangian relaxation; the discrete form of reverse
water-filling).
"""

import itertools
import operator
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from configuration_alrd_llama import QuantScheme
from modules import trellis
from modules.cache.codecs import block_nbytes, is_trellis, make_codec
from modules.cache.scheme import TABLE_ENTRY_NBYTES, CacheScheme
from modules.files import save_tensors
from modules.hadamard_utils import rotate
from modules.kernels import BACKEND_VARIABLE, Backend, get_backend
from modules.quant_utils import decode_token_scale, encode_token_scale, grid
from modules.svd_linear import Factors

#: Widths of the tiers that are offered, beside 0.
TIER_BITS = (1, 2, 3, 4, 5, 6, 8)

#: Version of the measurements that `save_costs` keeps; part of their key.
COSTS_VERSION = 5

#: Shift of the middle of a static range and growth of it, in turn.
_MOVES = [(0, 1), (0, -1), (1, 0), (-1, 0)]
_GROWTHS = _MOVES[:2]

#: Spreads that the points of a trellis are tried for, over that of the channel, and the middle of the points.
_SPREADS = (0.8, 0.88, 0.95, 1.02, 1.1, 1.2)
_MIDDLE_POINT = (trellis.LEVELS - 1) / 2

#: Times that the steps of kept channels are fitted to the scales of the tokens.
_REFITS = 2


@dataclass
class ChannelCosts:
    """Errors of the channels of one head group.

    Attributes:
        dropped: `[n]` float64, `E|c|²` in the unit of the objective: the error of a channel that is not kept.
        kept: `[n, widths]` float64, measured error of a channel at each width.
        scales: For static scales, scale and zero point `[n]` at each width; else empty.
    """

    dropped: torch.Tensor
    kept: torch.Tensor
    scales: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)


def sample_backend(device: torch.device) -> Backend:
    """Back end that quantizes a sample: the C++ kernels on CPUs if they can be built, else PyTorch; the same bits."""
    # The variable is for a model's cache. A sample is on the CPU, and Triton may be asked for beside it.
    if device.type == "cpu" and os.environ.get(BACKEND_VARIABLE) != "triton":
        return get_backend(None, device)
    return get_backend("reference", device)


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
    gains = token_gains(latents.flatten(0, 1)) if scheme.token_scale else None
    dropped = factors.unit * latents.square().mean((0, 1))
    blocks = latents.float().reshape(-1, length, latents.shape[-1])
    channels, kept, scales = blocks.shape[-1], [], []
    for width in bits:
        at_width = scheme.at_width(width)
        static = None
        if at_width.static:
            static = static_scales(blocks.flatten(0, 1), width, gains, at_width)
            scales.append(static)
        backend = sample_backend(blocks.device)
        codec = make_codec(at_width, length, (channels,), torch.float32, backend, static_scales=static)
        if scheme.per_channel:
            error = (codec.decode(codec.encode(blocks)) - blocks).double().square().mean((0, 1))
        else:
            # A tier is rotated, so its channels share their error in proportion to the tier's variance.
            error = _rotated_error(codec, blocks)
        # A channel that is worse kept than dropped costs what dropping it costs.
        kept.append(torch.minimum(factors.unit * error, dropped))
    return ChannelCosts(dropped, torch.stack(kept, dim=1), scales)


def refit_scales(
    factors: Factors, sample: torch.Tensor, scheme: QuantScheme, channels: torch.Tensor, tiers: list[tuple[int, float]]
) -> tuple[tuple[torch.Tensor, torch.Tensor], float]:
    """Calibrate the kept channels of a head group anew, for tokens whose scale is taken over these channels alone.

    Args:
        factors, sample: As for `measure_costs`.
        scheme: Of the side.
        channels: `[r]`, those that are kept, tier after tier.
        tiers: (channels, bits) of each tier.

    Returns:
        Scale and zero point `[r]`, and the measured cost of the head group, dropped channels included.
    """
    latents = (sample.double() @ factors.project.T).flatten(0, 1)
    kept = latents[:, channels]
    scheme, gains = replace(scheme, tiers=(tiers,)), token_gains(kept)
    # Steps for the scales of the tokens, then scales by these steps, in turn: each lowers the squared error.
    for _ in range(_REFITS):
        pieces = []
        for (_, bits), piece in zip(tiers, kept.split([count for count, _ in tiers], dim=1)):
            pieces.append(torch.stack(static_scales(piece, bits, gains, scheme)))
        scale, zero_point = torch.cat(pieces, dim=1)
        backend, static = sample_backend(kept.device), (scale, zero_point)
        codec = make_codec(scheme, len(kept), (len(channels),), torch.float32, backend, static_scales=static)
        fields = codec.encode(kept[None])
        gains = decode_token_scale(fields["token_scale"][0])
    restored = torch.zeros_like(latents)
    restored[:, channels] = codec.decode(fields)[0].double()
    return static, (factors.unit * (restored - latents).square().mean(0)).sum().item()


def save_costs(path: Path, costs: dict[str, list[ChannelCosts]]) -> None:
    """Write costs by projection to a safetensors file."""
    tensors = {}
    for name, groups in costs.items():
        for i, group in enumerate(groups):
            tensors |= {f"{name}/{i}/dropped": group.dropped, f"{name}/{i}/kept": group.kept}
            if group.scales:
                tensors[f"{name}/{i}/scales"] = torch.stack(list(map(torch.stack, group.scales)))
    save_tensors(path, tensors)


def load_costs(path: Path) -> dict[str, list[ChannelCosts]]:
    """Inverse of `save_costs`."""
    try:
        tensors, costs = load_file(path), {}
    except SafetensorError as error:
        raise ValueError(f"{path}: is damaged, delete it to measure the costs anew ({error})") from None
    found = set()
    for key in tensors:
        name, group, _ = key.split("/")
        found.add((name, int(group)))
    for name, group in sorted(found):
        prefix = f"{name}/{group}"
        pairs = list(map(tuple, tensors.get(f"{prefix}/scales", ())))
        costs.setdefault(name, []).append(ChannelCosts(tensors[f"{prefix}/dropped"], tensors[f"{prefix}/kept"], pairs))
    return costs


def _rotated_error(codec, blocks: torch.Tensor) -> torch.Tensor:
    """Error of each channel of a rotated tier: its second moment times the tier's relative error."""
    rotated = rotate(blocks)
    relative = (codec.decode(codec.encode(rotated)) - rotated).square().sum() / rotated.square().sum().clamp(min=1e-30)
    return relative.double() * blocks.double().square().mean((0, 1))


def token_gains(latents: torch.Tensor) -> torch.Tensor:
    """Scale `[N, 1]` of each token of latents `[N, n]` of a head group: its size relative to the others', in units of
    the channels' standard deviations."""
    centred = latents.double() - latents.double().mean(0)
    spread = centred.square().mean(0)
    sizes = (centred.square() / spread.clamp(min=1e-300)).mean(1, keepdim=True).sqrt()
    return decode_token_scale(encode_token_scale(sizes))


def static_scales(
    latents: torch.Tensor, bits: float, gains: torch.Tensor | None = None, scheme: QuantScheme | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of least squared error.

    Args:
        latents: `[N, n]`.
        bits: Width.
        gains: `[N, 1]`, scale of each token, by which its distance from the channels' means is divided; `None`: none.
        scheme: Of the width, if its codes are those of a trellis.

    Returns:
        `[n]` float32 each; a constant channel gets its own value as zero point.
    """
    if scheme is not None and is_trellis(scheme, bits):
        return _trellis_scales(latents.float(), bits, gains)
    x, (levels, spacing, _) = latents.float(), grid(bits)
    offset, weight, moves = 0.0, 1.0, _MOVES
    if gains is not None:
        # An error is multiplied by the token's scale again. The middle of the range is the mean, which has no scale.
        offset, weight, moves = x.mean(0), gains.T.square(), _GROWTHS
        x = (x - offset) / gains
    x = x.T.contiguous()
    low, high = x.aminmax(dim=1)
    if gains is not None:
        high = torch.maximum(high, -low)
        low = -high
    # From the range that holds all values, narrower ones are tried: outliers are few.
    mean = x.mean(1) if gains is None else torch.zeros_like(high)
    centre, half = low + (high - low) / 2, (high - low) / 2

    def error(centre: torch.Tensor, half: torch.Tensor) -> torch.Tensor:
        zero, step = (centre - half)[:, None], (2 * half / (levels - 1)).clamp(min=1e-38)[:, None]
        codes = ((x - zero) / step).add_(0.5).floor_().clamp_(0, levels - 1)
        return codes.mul_(step).add_(zero).sub_(x).square_().mul_(weight).mean(1)

    best = error(centre, half)

    def offer(new_centre: torch.Tensor, new_half: torch.Tensor) -> None:
        nonlocal best, centre, half
        found = error(new_centre, new_half)
        better = (found < best) & (high > low)
        best = torch.where(better, found, best)
        centre, half = torch.where(better, new_centre, centre), torch.where(better, new_half, half)

    # A coarse search of ranges around the mean, down to where the tails are heavy.
    widest = torch.maximum(high - mean, mean - low)
    for i in range(24):
        offer(mean, widest * 2 ** (-i / 4))
    # Then ever smaller moves of the range's size and middle.
    for size, (shift, growth) in itertools.product((0.08, 0.04, 0.02, 0.01), moves * 2):
        offer(centre + shift * size * half, half * (1 + growth * size))
    return 2 * half / (levels - 1) / spacing, centre - half + offset


def _trellis_scales(x: torch.Tensor, bits: float, gains: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`static_scales` of points: the spread of each channel in their unit, times a growth of least error."""
    mean, weight = x.mean(0), 1.0
    x = x - mean
    spread = x.square().mean(0).sqrt() * trellis.UNITS[bits]
    if gains is not None:
        # An error is multiplied by the token's scale again.
        x, weight = x / gains, gains.square()
        spread = spread / weight.mean().sqrt()
    encode, best, scale = sample_backend(x.device).trellis_codes, torch.full_like(spread, torch.inf), spread
    for growth in _SPREADS:
        tried = spread * growth
        unit = tried.clamp(min=1e-38)
        codes = encode((x / unit).add_(_MIDDLE_POINT), bits, (x.shape[1],))
        points = trellis.decode(codes, bits, (x.shape[1],)).float()
        error = (points.sub_(_MIDDLE_POINT) * unit - x).square_().mul_(weight).mean(0)
        scale = torch.where(error < best, tried, scale)
        best = torch.minimum(error, best)
    return scale, mean - _MIDDLE_POINT * scale


@dataclass(frozen=True)
class Prices:
    """Bytes in a layer's cache of given length, one row: each is exact, and so is their sum.

    Attributes:
        channel: For a channel at each width.
        tier: For a tier at each width, beside its channels: the scales that a token has per tier.
        layer: For a layer whatever it stores.
        group: Channels of a tier that share a token's scale: a larger tier pays `tier` for each group. 0: no bound.
        head_group: For a head group whatever it stores: the scales that a token has for all its tiers.
    """

    channel: tuple[int, ...]
    tier: tuple[int, ...]
    layer: int
    group: int = 0
    head_group: int = 0

    @property
    def smallest(self) -> int:
        """Bytes of one channel at the cheapest width."""
        return min(map(operator.add, self.channel, self.tier))

    def scales_nbytes(self, counts: list[int]) -> int:
        """Bytes of the tokens' scales for tiers of so many channels at each width."""
        nbytes = 0
        for price, channels in zip(self.tier, counts, strict=True):
            if channels:
                nbytes += price * -(-channels // (self.group or channels))
        return nbytes


def tier_prices(
    scheme: QuantScheme, cache: CacheScheme, bits: tuple, length: int, dtype: torch.dtype, sinks: bool = True
) -> Prices:
    """Prices of one side of a cache of `length` tokens.

    Args:
        scheme: Of the side, but for the width.
        cache: Window, sinks and block length.
        bits: Widths.
        length: Tokens.
        dtype: Of the model, and so of window and sinks.
        sinks: Whether the sinks are held by these channels; those of blocks are not.
    """
    held = cache.held(length)
    exact = held.exact if sinks else held.window
    calibrated = 2 * 4 if scheme.static else 0  # scale and zero point of a channel, once a layer
    channel, tier = [], []
    # The scale of a token is shared by all tiers of a head group: one byte.
    head_group = held.blocks * cache.block_length * scheme.token_scale
    scheme = replace(scheme, token_scale=False)
    for width in bits:
        # A block of one channel and one of two say what a channel takes, and what a tier takes beside its channels.
        at_width = scheme.at_width(width)
        one = block_nbytes(make_codec(at_width, cache.block_length, (1,), dtype))
        two = block_nbytes(make_codec(at_width, cache.block_length, (2,), dtype))
        channel.append(held.blocks * (two - one) + exact * dtype.itemsize + calibrated)
        tier.append(held.blocks * (2 * one - two))
    group = 0 if scheme.per_channel else scheme.group_size
    return Prices(tuple(channel), tuple(tier), held.blocks * TABLE_ENTRY_NBYTES, group, head_group)


@dataclass
class BudgetPlan:
    """Ranks and widths by projection and head group.

    Attributes:
        channels: Channels of the full-rank factors that are kept, tier after tier.
        tiers: (channels, bits) of each tier, the widest first.
        scales: Scale and zero point of the kept channels, for static scales; else empty.
        gains: Factors on the columns of A of each member (`expansion_gains`), `[out, r]`; empty: none.
        nbytes: Bytes of one row of the length that was planned for, everything counted.
        divergence: What the costs add up to: the predicted KL divergence if the rates are those of `probe_rates`,
            errors taken as independent of each other and of the gradients.
        predicted: KL divergence that `predicted_divergence` makes of the gradients of single tokens; `None`: unknown.
    """

    channels: dict[str, list[torch.Tensor]]
    tiers: dict[str, list[list[tuple[int, float]]]]
    scales: dict[str, list[tuple[torch.Tensor, torch.Tensor]]]
    nbytes: int
    divergence: float
    gains: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    predicted: float | None = None


def settings_side(name: str) -> str:
    """The side, "k" or "v", by whose settings the latent of a projection or a block is stored: what the last part of
    its name begins with."""
    return name.rpartition(".")[2][0]


def allocate(
    costs: dict[str, list[ChannelCosts]],
    rates: dict[str, float],
    prices: dict[str, Prices],
    bits: tuple,
    budget: int,
    fixed: int = 0,
    rebuild: dict[str, float] | None = None,
    max_rebuild: float | None = None,
) -> BudgetPlan:
    """Choose the width of every channel, 0 included, at the least total cost within a budget.

    Args:
        costs: Of each head group of each projection, or block of them, by name.
        rates: Factor on the costs of each.
        prices: Of each side of a layer, "k" and "v"; keys and values together are stored as keys.
        bits: Widths that costs and prices are for.
        budget: Bytes of one row, all layers together.
        fixed: Bytes that no choice changes, beside those of the `prices`.
        rebuild: Multiply-adds per cached token that a channel of each costs attention.
        max_rebuild: Most multiply-adds of all channels; `None`: no bound.

    Raises:
        ValueError: One channel of the smallest width in each head group is beyond the budget.
    """
    price_of, layers = {}, set()
    for name in costs:
        price_of[name] = prices[settings_side(name)]
        layers.add(name.rpartition(".")[0])
    fixed += len(layers) * prices["k"].layer
    for name, groups in costs.items():
        fixed += len(groups) * price_of[name].head_group
    smallest = fixed
    for name, groups in costs.items():
        smallest += len(groups) * price_of[name].smallest
    if smallest > budget:
        raise ValueError(
            f"budget: {budget:,} bytes must be at least {smallest:,}, what block tables, window, sinks and scales take "
            "with one channel per projection and head group"
        )

    def choose(multiplier: float, toll: float) -> tuple[dict, int, float]:
        chosen, nbytes, cost = {}, fixed, 0.0
        for name, groups in costs.items():
            chosen[name] = []
            for group in groups:
                # Column 0 is the cost of dropping a channel.
                table = rates[name] * torch.cat([group.dropped[:, None], group.kept], dim=1)
                tolled = table
                if toll:
                    tolled = table.clone()
                    tolled[:, 1:] += toll * rebuild[name]
                columns, group_nbytes = _choose_group(tolled, price_of[name], multiplier)
                chosen[name].append(columns)
                nbytes += group_nbytes
                cost += table.gather(1, columns[:, None]).sum().item()
        return chosen, nbytes, cost

    def within_budget(toll: float) -> tuple[dict, int, float]:
        """The choice of least cost and toll within the bytes."""
        return choose(_halved(lambda multiplier: choose(multiplier, toll)[1] <= budget), toll)

    def rebuilt(chosen: dict) -> float:
        """Multiply-adds of the channels that are kept."""
        total = 0.0
        for name, groups in chosen.items():
            total += rebuild[name] * sum(map(torch.count_nonzero, groups)).item()
        return total

    chosen, nbytes, cost = within_budget(0.0)
    if max_rebuild is not None and rebuilt(chosen) > max_rebuild:
        # A second multiplier is the price of a multiply-add.
        chosen, nbytes, cost = within_budget(_halved(lambda toll: rebuilt(within_budget(toll)[0]) <= max_rebuild, 30))
        if rebuilt(chosen) > max_rebuild:
            raise ValueError(f"max_rebuild={max_rebuild:,.0f}: must be at least {rebuilt(chosen):,.0f} multiply-adds")
    return _to_plan(chosen, costs, bits, nbytes, cost)


def _halved(suffices: Callable[[float], bool], steps: int = 60) -> float:
    """The least multiplier that suffices, between one at which all pays and one at which nothing does."""
    low, high = -100.0, 50.0
    for _ in range(steps):
        middle = (low + high) / 2
        if suffices(2.0**middle):
            high = middle
        else:
            low = middle
    return 2.0**high


def _choose_group(table: torch.Tensor, price: Prices, multiplier: float) -> tuple[torch.Tensor, int]:
    """Column of each row (0: dropped) of a `[n, 1 + widths]` table with the least cost plus bytes, and the bytes."""
    per_channel = torch.tensor([0, *price.channel], dtype=torch.float64, device="cpu")
    best = None
    for tiers in _tier_sets(price):
        columns = torch.tensor([0, *tiers], dtype=torch.int64, device="cpu")
        index = columns[(table[:, columns] + multiplier * per_channel[columns]).argmin(dim=1)]
        if not index.any():
            # A projection keeps at least its first channel.
            index[0] = min(tiers, key=lambda column: price.channel[column - 1] + price.tier[column - 1])
        counts = index.bincount(minlength=len(per_channel))[1:].tolist()
        nbytes = int(per_channel[index].sum()) + price.scales_nbytes(counts)
        # The Lagrangian of this set: cost plus price.
        total = table.gather(1, index[:, None]).sum().item() + multiplier * nbytes
        if best is None or total < best[0]:
            best = (total, index, nbytes)
    return best[1], best[2]


def _tier_sets(price: Prices) -> list[tuple[int, ...]]:
    """Sets of widths, by column of a table of costs, from which the channels of a head group choose."""
    columns = range(1, len(price.channel) + 1)
    if not any(price.tier):
        return [tuple(columns)]
    # Every set of tiers is tried, since one that is used costs bytes of its own.
    sets: list[tuple[int, ...]] = []
    for size in columns:
        sets.extend(itertools.combinations(columns, size))
    return sets


def _to_plan(chosen: dict, costs: dict[str, list[ChannelCosts]], bits: tuple, nbytes: int, cost: float) -> BudgetPlan:
    """The plan of chosen columns (0: dropped, else one more than the index of the width) of every channel."""
    plan = BudgetPlan({}, {}, {}, nbytes, cost)
    for name, groups in chosen.items():
        plan.channels[name], plan.tiers[name], plan.scales[name] = [], [], []
        for columns, group in zip(groups, costs[name], strict=True):
            channels, tiers, scales = [], [], []
            for column in sorted(set(columns.tolist()) - {0}, key=lambda column: -bits[column - 1]):
                members = (columns == column).nonzero()[:, 0]
                channels.append(members)
                tiers.append((len(members), bits[column - 1]))
                if group.scales:
                    scales.append(torch.stack(group.scales[column - 1])[:, members])
            plan.channels[name].append(torch.cat(channels))
            plan.tiers[name].append(tiers)
            if scales:
                plan.scales[name].append(tuple(torch.cat(scales, dim=1)))
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
    # A larger share has larger ranks, and these take more bytes.
    low, high = 0, 512
    while low < high:
        middle = (low + high + 1) // 2
        try:
            fits = nbytes_of(ranks_of(middle / 512)) <= budget
        except ValueError:  # too small a share for this search
            fits = True
        if fits:
            low = middle
        else:
            high = middle - 1
    try:
        fits = low > 0 and nbytes_of(ranks_of(low / 512)) <= budget
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"budget: {budget:,} bytes must hold the smallest ranks")
    return low / 512
