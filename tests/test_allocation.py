"""Prices, costs and the choice of widths, against the cache's own size, brute force and known distortions."""

import itertools
import math
import random

import pytest
import torch

from configuration_alrd_llama import SIDES, Projection, QuantScheme, side_scheme
from modules.cache.codecs import make_codec
from modules.fit.allocation import TIER_BITS, ChannelCosts, Prices, allocate, largest_share, measure_costs, tier_prices
from modules.fit.allocation import static_scales as find_scales
from modules.kivi_cache import CacheScheme, KIVILatentCache
from modules.quant_utils import quantize
from modules.svd_linear import Factors

K, V = "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"
STATIC = {"orientation": "per_channel", "static": True}
PER_TOKEN = {"orientation": "per_token"}


def by_side(price_of) -> dict[str, Prices]:
    """Prices as `allocate` takes them, from a function of a projection's name."""
    return {side: price_of(Projection(0, side).name) for side in SIDES}


# ---- prices


def random_tiers(turns: random.Random, widths: list[int], bits=TIER_BITS) -> list[list[tuple[int, float]]]:
    """For each head group some of the widths, falling, that together fill it."""
    groups = []
    for width in widths:
        chosen = sorted(turns.sample(bits, turns.randint(1, min(width, len(bits)))), reverse=True)
        cuts = [0, *sorted(turns.sample(range(1, width), len(chosen) - 1)), width]
        groups.append([(b - a, bits) for a, b, bits in zip(cuts, cuts[1:], chosen)])
    return groups


def price_of(tiers, price: Prices, bits=TIER_BITS) -> int:
    """What a projection with these tiers costs, but for its layer."""
    tiers_of_groups = sum(n * price.channel[bits.index(b)] + price.tier[bits.index(b)] for g in tiers for n, b in g)
    return tiers_of_groups + len(tiers) * price.head_group


PRICED = {
    "per channel": ({}, {"orientation": "per_channel", "range_method": "mse"}, 32),
    "per token": (PER_TOKEN, PER_TOKEN, 128),
    "per token, groups without bound": ({**PER_TOKEN, "group_size": 0}, PER_TOKEN, 64),
    "per token, a scale for each channel": ({**PER_TOKEN, "group_size": 1}, PER_TOKEN, 32),
    "static": (STATIC, STATIC, 32),
    "static, longer blocks": (STATIC, STATIC, 0),
    "static keys, values per token": (STATIC, PER_TOKEN, 128),
    "scales of tokens": ({**STATIC, "token_scale": True}, {**STATIC, "token_scale": True}, 32),
    "keys with scales of tokens": ({**STATIC, "token_scale": True}, STATIC, 20),
    "odd blocks": ({}, PER_TOKEN, 37),
}


@pytest.mark.parametrize(("k_scheme", "v_scheme", "group_size"), PRICED.values(), ids=PRICED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_prices_add_up_to_the_bytes_of_the_cache(k_scheme, v_scheme, group_size, dtype):
    turns = random.Random(f"{k_scheme}{v_scheme}{dtype}")
    for window, sinks, length in ((16, 4, 4096), (0, 0, 1000), (5, 3, 133), (32, 4, 20), (7, 9, 5), (0, 4, 0)):
        base = CacheScheme(2, 2, group_size, window, sinks, k_scheme, v_scheme)
        sides, widths, total = [], [], 0
        for side, scheme in (("k", k_scheme), ("v", v_scheme)):
            width = [turns.randint(1, 31) for _ in range(turns.randint(1, 3))]
            tiers = random_tiers(turns, width)
            plain = side_scheme(side, 2, group_size, scheme)
            price = tier_prices(plain, base, TIER_BITS, length, dtype)
            sides.append(side_scheme(side, 2, group_size, {**scheme, "tiers": tiers}))
            widths.append(tuple(width))
            total += price_of(tiers, price)
        total += price.layer
        found = CacheScheme.of(*sides, residual_length=window, sink_length=sinks)
        assert total == found.layer_nbytes(length, tuple(widths), dtype) + found.static_nbytes(tuple(widths))


def test_prices_are_what_a_cache_really_takes():
    tiers = [[(3, 8), (9, 2), (7, 1)]], [[(1, 8), (20, 3)]]
    sides = [QuantScheme(**STATIC, group_size=32, tiers=t) for t in tiers]
    scheme = CacheScheme.of(*sides, residual_length=16, sink_length=4)
    scales = {0: {s: (torch.full((n,), 0.1), torch.zeros(n)) for s, n in (("keys", 19), ("values", 21))}}
    cache = KIVILatentCache(scheme, [((19,), (21,))], static_scales=scales)
    cache.layers[0].append(*(torch.randn(1, 333, n, dtype=torch.bfloat16) for n in (19, 21)))
    price = tier_prices(QuantScheme(**STATIC, group_size=32), scheme, TIER_BITS, 333, torch.bfloat16)
    assert cache.nbytes_used == price.layer + sum(price_of(t, price) for t in tiers)


def test_prices_by_hand():
    """4,096 tokens, 4 sinks, a window of 16: 127 blocks of 32, and 32 tokens that are exact."""
    cache = CacheScheme(2, 2, 32, 16, 4)
    price = tier_prices(QuantScheme(**STATIC, group_size=32), cache, (1, 2, 3), 4096, torch.bfloat16)
    assert price == Prices((127 * 4 + 64 + 8, 127 * 8 + 64 + 8, 127 * 12 + 64 + 8), (0, 0, 0), 127 * 12)
    price = tier_prices(QuantScheme(group_size=32), cache, (1, 2), 4096, torch.float32)
    assert price.channel == (127 * (4 + 2) + 128, 127 * (8 + 4) + 128)
    price = tier_prices(QuantScheme(2, "per_token", 32), cache, (1, 2), 4096, torch.float32)
    assert price.channel == (127 * 4 + 128, 127 * 8 + 128)
    assert (price.tier, price.layer) == ((127 * 32 * 2, 127 * 32 * 4), 127 * 12)


# ---- choice


def costs_of(*groups: list[list[float]]) -> list[ChannelCosts]:
    """Costs of head groups from tables `[n][1 + widths]`, the first column that of a channel that is dropped."""
    tables = [torch.tensor(table, dtype=torch.float64) for table in groups]
    return [ChannelCosts(t[:, 0], t[:, 1:]) for t in tables]


def falling_costs(seed: int, channels: int, widths: int = 2, scale: float = 1.0) -> list[list[float]]:
    """Channels by falling energy; each width leaves some of it, a wider one less."""
    turns = random.Random(seed)
    energies = sorted((scale * math.exp(turns.gauss(0, 2)) for _ in range(channels)), reverse=True)
    return [[e, *sorted((e * turns.random() * 0.6 for _ in range(widths)), reverse=True)] for e in energies]


def every_assignment(costs, rates, price_of_name, budget=math.inf):
    """(bytes, cost, columns) of all assignments with a channel in every head group."""
    names = list(costs)
    fixed = sum(price_of_name(name).layer for name in names if name.endswith("k_proj"))
    per_group = []
    for name in names:
        price = price_of_name(name)
        for group in costs[name]:
            options = []
            for columns in itertools.product(range(len(price.channel) + 1), repeat=len(group.dropped)):
                if not any(columns):
                    continue
                nbytes = sum(price.channel[c - 1] for c in columns if c) + sum(
                    price.tier[c - 1] for c in {*columns} - {0}
                )
                cost = sum((group.dropped[i] if c == 0 else group.kept[i, c - 1]).item() for i, c in enumerate(columns))
                options.append((nbytes, rates[name] * cost, columns))
            per_group.append(options)
    for parts in itertools.product(*per_group):
        nbytes = fixed + sum(p[0] for p in parts)
        if nbytes <= budget:
            yield nbytes, sum(p[1] for p in parts), tuple(p[2] for p in parts)


def lower_hull(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Vertices of the lower convex hull, from the fewest bytes to the least cost."""
    best = {}
    for nbytes, cost in points:
        best[nbytes] = min(cost, best.get(nbytes, math.inf))
    hull = []
    for point in sorted(best.items()):
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (point[0] - hull[-2][0]) >= (point[1] - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append(point)
    return hull


TINY_PRICES = {
    "free tiers": (Prices((10, 17), (0, 0), 5), Prices((9, 21), (0, 0), 5)),
    "tiers that cost": (Prices((10, 17), (13, 8), 5), Prices((9, 21), (4, 30), 5)),
}


def tiny_problem(seed: int, kind: str):
    """Two projections, three head groups, of a few channels each."""
    costs = {
        K: costs_of(falling_costs(seed, 4)),
        V: costs_of(falling_costs(seed + 100, 2), falling_costs(seed + 200, 2)),
    }
    key, value = TINY_PRICES[kind]
    rates = {K: 1.0, V: (1.0, 0.3, 4.0)[seed % 3]}
    return costs, rates, {K: key, V: value}.__getitem__


def columns_of(plan, costs, bits) -> dict[str, list[list[int]]]:
    """Column of every channel (0: dropped) that a plan chose."""
    found = {}
    for name, groups in costs.items():
        found[name] = []
        for group, channels, tiers in zip(groups, plan.channels[name], plan.tiers[name], strict=True):
            columns, at = [0] * len(group.dropped), 0
            for n, b in tiers:
                for channel in channels[at : at + n].tolist():
                    assert columns[channel] == 0
                    columns[channel] = bits.index(b) + 1
                at += n
            assert at == len(channels)
            found[name].append(columns)
    return found


def check_plan(plan, costs, rates, price_of_name, bits, budget) -> None:
    """Bytes and cost are those of what was chosen; tiers are in order."""
    chosen = columns_of(plan, costs, bits)
    nbytes = sum(price_of_name(name).layer for name in costs if name.endswith("k_proj"))
    cost = 0.0
    for name, groups in costs.items():
        price = price_of_name(name)
        for group, columns, tiers in zip(groups, chosen[name], plan.tiers[name], strict=True):
            assert any(columns)
            nbytes += sum(price.channel[c - 1] for c in columns if c) + sum(price.tier[c - 1] for c in {*columns} - {0})
            table = torch.cat([group.dropped[:, None], group.kept], dim=1)
            cost += rates[name] * sum(table[i, c].item() for i, c in enumerate(columns))
            assert [b for _, b in tiers] == sorted({bits[c - 1] for c in columns if c}, reverse=True)
    assert plan.nbytes == nbytes <= budget
    assert plan.divergence == pytest.approx(cost, rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "seed"), [("free tiers", 0), ("free tiers", 1), ("tiers that cost", 2), ("tiers that cost", 4)]
)
def test_the_choice_is_on_the_lower_hull(kind, seed):
    costs, rates, price = tiny_problem(seed, kind)
    points = [(nbytes, cost) for nbytes, cost, _ in every_assignment(costs, rates, price)]
    hull = lower_hull(points)
    smallest, largest = min(p[0] for p in points), hull[-1][0]
    start = next(i for i, point in enumerate(hull) if point[0] > smallest)
    for budget, least in hull[start:]:
        plan = allocate(costs, rates, by_side(price), (2, 4), budget)
        check_plan(plan, costs, rates, price, (2, 4), budget)
        assert (plan.nbytes, plan.divergence) == (budget, pytest.approx(least, rel=1e-9))
    previous = None
    for budget in range(smallest, largest + 40, 11):
        plan = allocate(costs, rates, by_side(price), (2, 4), budget)
        check_plan(plan, costs, rates, price, (2, 4), budget)
        below = [point for point in hull[start:] if point[0] <= budget]
        if below:
            # No assignment of as many bytes costs less, and none that fits is better than the next step of the hull.
            assert (plan.nbytes, plan.divergence) == (below[-1][0], pytest.approx(below[-1][1], rel=1e-9))
            later = [point for point in hull if point[0] > budget]
            best = min(cost for nbytes, cost in points if nbytes <= budget)
            step = below[-1][1] - (later[0][1] if later else below[-1][1])
            assert best >= plan.divergence - step - 1e-12
        if previous is not None:
            assert plan.divergence <= previous.divergence and plan.nbytes >= previous.nbytes
        previous = plan
    assert previous.divergence == pytest.approx(min(p[1] for p in points), rel=1e-9)


@pytest.mark.parametrize("kind", TINY_PRICES)
def test_the_smallest_budget(kind):
    costs, rates, price = tiny_problem(1, kind)
    smallest = min(nbytes for nbytes, _, _ in every_assignment(costs, rates, price))
    plan = allocate(costs, rates, by_side(price), (2, 4), smallest)
    check_plan(plan, costs, rates, price, (2, 4), smallest)
    assert plan.nbytes == smallest
    assert [[c.tolist() for c in groups] for groups in plan.channels.values()] == [[[0]], [[0], [0]]]
    with pytest.raises(ValueError, match=rf"budget: {smallest - 1:,} bytes must be at least {smallest:,}"):
        allocate(costs, rates, by_side(price), (2, 4), smallest - 1)


def large_problem(seed: int = 0, channels: int = 64, layers: int = 3):
    generator = torch.Generator().manual_seed(seed)
    costs = {}
    for i, p in itertools.product(range(layers), ("k_proj", "v_proj")):
        energy = (torch.randn(channels, generator=generator, dtype=torch.float64) * 2).exp().sort(descending=True)[0]
        noise = 1 + 0.2 * torch.rand(channels, 7, generator=generator, dtype=torch.float64)
        shares = torch.tensor([0.36, 0.12, 0.035, 0.0095, 0.0025, 6e-4, 4e-5], dtype=torch.float64)
        left = energy[:, None] * shares * noise
        scales = [(left[:, w].float(), energy.float() + w) for w in range(7)]
        costs[f"model.layers.{i}.self_attn.{p}"] = [ChannelCosts(energy, left, scales)]
    return costs, dict.fromkeys(costs, 1.0)


STATIC_PRICE = Prices((580, 1088, 1596, 2104, 2612, 3120, 4136), (0,) * 7, 1524)


def test_never_above_the_budget_and_close_below_it():
    costs, rates = large_problem()
    largest = 3 * 1524 + 6 * 64 * 4136
    previous = math.inf
    for share in (0.02, 0.05, 0.0625, 0.1, 0.25, 0.5, 0.9):
        budget = int(share * largest)
        plan = allocate(costs, rates, by_side(lambda name: STATIC_PRICE), TIER_BITS, budget)
        check_plan(plan, costs, rates, lambda name: STATIC_PRICE, TIER_BITS, budget)
        # Costs of real channels differ, so that they change one by one.
        assert budget - plan.nbytes < 4136
        assert plan.divergence < previous
        previous = plan.divergence
    for budget in (largest, 10 * largest):
        plan = allocate(costs, rates, by_side(lambda name: STATIC_PRICE), TIER_BITS, budget)
        assert plan.nbytes == largest and plan.tiers[K] == [[(64, 8)]]


def test_the_same_twice():
    plans = [allocate(*large_problem(), by_side(lambda name: STATIC_PRICE), TIER_BITS, 200_000) for _ in range(2)]
    assert plans[0].tiers == plans[1].tiers
    assert (plans[0].nbytes, plans[0].divergence) == (plans[1].nbytes, plans[1].divergence)
    for name, groups in plans[0].channels.items():
        assert all(torch.equal(a, b) for a, b in zip(groups, plans[1].channels[name], strict=True))


def test_scales_go_with_their_channels_and_widths():
    costs, rates = large_problem(3)
    plan = allocate(costs, rates, by_side(lambda name: STATIC_PRICE), TIER_BITS, 300_000)
    assert max(len(tiers) for groups in plan.tiers.values() for tiers in groups) > 2
    for name, columns in columns_of(plan, costs, TIER_BITS).items():
        for (scale, zero), channels, group, chosen in zip(
            plan.scales[name], plan.channels[name], costs[name], columns, strict=True
        ):
            for i, channel in enumerate(channels.tolist()):
                expected = group.scales[chosen[channel] - 1]
                assert (scale[i], zero[i]) == (expected[0][channel], expected[1][channel])
    without = {name: [ChannelCosts(g.dropped, g.kept) for g in groups] for name, groups in costs.items()}
    plan = allocate(without, rates, by_side(lambda name: STATIC_PRICE), TIER_BITS, 300_000)
    assert all(not pairs for pairs in plan.scales.values())


def spent(plan, name: str) -> int:
    return sum(n * b for group in plan.tiers[name] for n, b in group)


def test_a_larger_rate_draws_bits():
    costs, rates = large_problem(1)
    twin = {name: costs[K] for name in costs}  # all alike
    even = allocate(twin, rates, by_side(lambda name: STATIC_PRICE), TIER_BITS, 300_000)
    assert len({spent(even, name) for name in twin}) == 1
    tilted = allocate(twin, {**rates, V: 20.0}, by_side(lambda name: STATIC_PRICE), TIER_BITS, 300_000)
    assert spent(tilted, V) > spent(even, V)
    assert all(spent(tilted, name) < spent(even, name) for name in twin if name != V)
    # A rate that all share changes nothing but the cost.
    scaled = allocate(twin, dict.fromkeys(rates, 1e-6), by_side(lambda name: STATIC_PRICE), TIER_BITS, 300_000)
    assert scaled.tiers == even.tiers
    assert scaled.divergence == pytest.approx(1e-6 * even.divergence)
    # What costs nothing keeps the least.
    free = allocate(twin, {**rates, V: 0.0}, by_side(lambda name: STATIC_PRICE), TIER_BITS, 300_000)
    assert free.tiers[V] == [[(1, 1)]]


def test_tiers_that_cost_bytes_are_fewer():
    costs, rates = large_problem(2)
    counts = []
    for tier in (0, 20_000):
        price = Prices(STATIC_PRICE.channel, (tier,) * 7, 1524)
        budget = 300_000 + 6 * tier
        plan = allocate(costs, rates, by_side(lambda name, price=price: price), TIER_BITS, budget)
        check_plan(plan, costs, rates, lambda name, price=price: price, TIER_BITS, budget)
        counts.append(sum(len(tiers) for groups in plan.tiers.values() for tiers in groups))
    assert counts[0] > 18 and counts[1] < counts[0] * 0.75


PLANNED = {name: PRICED[name] for name in PRICED if name != "odd blocks"} | {
    "per token, tiers wider than a group": (PER_TOKEN, {**PER_TOKEN, "group_size": 8}, 32),
}


@pytest.mark.parametrize(("k_scheme", "v_scheme", "group_size"), PLANNED.values(), ids=PLANNED)
def test_a_plan_takes_the_bytes_that_it_says(k_scheme, v_scheme, group_size):
    costs, rates = large_problem(4, channels=40, layers=1)
    base = CacheScheme(2, 2, group_size, 16, 4, k_scheme, v_scheme)
    sides = {K: ("k", k_scheme, base.keys), V: ("v", v_scheme, base.values)}
    price = {name: tier_prices(side[2], base, TIER_BITS, 1500, torch.bfloat16) for name, side in sides.items()}
    plan = allocate(costs, rates, by_side(price.__getitem__), TIER_BITS, 50_000)
    found = [side_scheme(s, 2, group_size, {**fields, "tiers": plan.tiers[n]}) for n, (s, fields, _) in sides.items()]
    scheme = CacheScheme.of(*found, residual_length=16, sink_length=4)
    widths = tuple((len(plan.channels[name][0]),) for name in sides)
    nbytes = scheme.layer_nbytes(1500, widths, torch.bfloat16) + scheme.static_nbytes(widths)
    assert plan.nbytes == nbytes <= 50_000
    assert nbytes > 45_000


# ---- costs


def identity_factors(channels: int, unit: float = 1.0) -> Factors:
    eye = torch.eye(channels, dtype=torch.float64)
    return Factors(eye, eye, torch.ones(channels, dtype=torch.float64), eye, unit)


#: MSE over variance of a unit Gaussian, from DESIGN.md, section 3: (range, bits, group) -> distortion.
KNOWN = {
    ("minmax", 2, 32): 0.154,
    ("minmax", 2, 128): 0.251,
    ("minmax", 3, 32): 0.028,
    ("minmax", 3, 128): 0.046,
    ("minmax", 4, 32): 0.0061,
    ("minmax", 4, 128): 0.0099,
    (None, 1, 32): 0.352,
    (None, 1, 128): 0.361,
}


@pytest.mark.parametrize("orientation", ["per_channel", "per_token"])
@pytest.mark.parametrize("group", [32, 128])
def test_measured_costs_are_the_known_distortions(group, orientation):
    deviations = torch.logspace(1, -1, 128)
    if orientation == "per_token":
        deviations = torch.ones(128)  # a rotation makes a tier's channels alike; here they are alike to begin with
    sample = torch.randn(40, 128, 128) * deviations
    scheme = QuantScheme(2, orientation, group)
    costs = measure_costs(identity_factors(128, 0.5), sample, scheme, group if orientation == "per_channel" else 128)
    variance = 0.5 * deviations.double().square()
    assert torch.allclose(costs.dropped, 0.5 * sample.double().square().mean((0, 1)), rtol=1e-6)
    assert costs.scales == []
    for (_, bits, size), expected in KNOWN.items():
        if size == group:
            found = (costs.kept[:, TIER_BITS.index(bits)] / variance).mean().item()
            assert found == pytest.approx(expected, rel=0.03)
    assert (costs.kept <= costs.dropped[:, None]).all()


def test_costs_of_static_scales():
    """Lloyd's distortions of a uniform quantizer of a Gaussian (Max 1960)."""
    sample = torch.randn(40, 128, 16) * torch.logspace(1, -1, 16) + 5
    costs = measure_costs(identity_factors(16), sample, QuantScheme(**STATIC, group_size=64), 64)
    relative = (costs.kept / torch.logspace(1, -1, 16).double().square()[:, None]).mean(0)
    for bits, expected in ((1, 0.3634), (2, 0.1188), (3, 0.03744), (4, 0.01154)):
        assert relative[TIER_BITS.index(bits)].item() == pytest.approx(expected, rel=0.04)
    assert len(costs.scales) == len(TIER_BITS)
    for bits, (scale, zero) in zip(TIER_BITS, costs.scales, strict=True):
        expected = find_scales(sample.flatten(0, 1), bits)
        assert torch.equal(scale, expected[0]) and torch.equal(zero, expected[1])
        assert scale.dtype == zero.dtype == torch.float32


@pytest.mark.parametrize("fields", [{}, PER_TOKEN, {"range_method": "mse"}, STATIC], ids=str)
def test_no_cost_is_beyond_that_of_dropping(fields):
    """Not even of channels that a narrow code would make worse: zeros, constants, heavy tails, an outlier."""
    sample = torch.randn(6, 64, 12) * torch.logspace(2, -3, 12)
    sample[..., 3], sample[..., 4] = 0.0, -2.5
    sample[..., 5] = torch.distributions.StudentT(1.5).sample((6, 64))
    sample[2, 7, 6] = 1e4
    # Zeros between two far levels: two bits from end to end store them worse than not at all.
    sample[..., 7] = torch.eye(32)[0].repeat(2) - torch.eye(32)[1].repeat(2)
    costs = measure_costs(identity_factors(12, 3.0), sample, QuantScheme(**fields, group_size=32), 32)
    assert costs.dropped.dtype == costs.kept.dtype == torch.float64
    assert (costs.kept <= costs.dropped[:, None]).all() and (costs.kept >= 0).all()
    assert torch.isfinite(costs.kept).all()
    assert costs.dropped[3] == 0 and (costs.kept[3] == 0).all()
    assert costs.dropped[4] == pytest.approx(3 * 2.5**2)


def test_costs_are_of_the_latents_that_the_factors_give():
    mix = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    factors = Factors(mix.T, mix, torch.ones(8, dtype=torch.float64), mix, 2.0)
    sample = torch.randn(4, 64, 8) * torch.logspace(1, -1, 8)
    costs = measure_costs(factors, sample, QuantScheme(group_size=32), 32, (2, 4))
    latents = (sample.double() @ mix.T).float().reshape(-1, 32, 8)
    codec = make_codec(QuantScheme(2, group_size=32), 32, (8,), torch.float32)
    error = (codec.decode(codec.encode(latents)) - latents).double().square().mean((0, 1))
    assert costs.kept.shape == (8, 2)
    assert torch.allclose(costs.kept[:, 0], 2 * error)


def test_measuring_leaves_the_generator_alone():
    """Nothing but the sample decides, and nobody else's random numbers change."""
    sample = torch.randn(2, 64, 8)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(measure_costs(identity_factors(8), sample, QuantScheme(2, "per_token", 32), 32).kept)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*found)


# ---- static scales


def grid_search(x: torch.Tensor, bits: int) -> float:
    """Least mean squared error of any uniform grid, both ends in fine steps."""
    x = x.double()
    low, high, best = x.min(), x.max(), math.inf
    ends = torch.linspace(0, 0.5, 51, dtype=torch.float64)
    for a in ends:
        zero = low + a * (high - low)
        tops = high - ends * (high - low)
        step = ((tops - zero) / (2**bits - 1)).clamp(min=1e-12)[:, None]
        back = ((x - zero) / step).round().clamp(0, 2**bits - 1) * step + zero
        best = min(best, (back - x).square().mean(1).min().item())
    return best


def error_of(x: torch.Tensor, scale, zero, bits: int) -> float:
    """Mean squared error by static codes, read from their definition."""
    step = scale.double() * (2 if bits == 1 else 1)
    codes = ((x.double() - zero.double()) / step).round().clamp(0, 2**bits - 1)
    return (codes * step + zero.double() - x.double()).square().mean().item()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_static_scales_are_near_the_best(bits):
    torch.manual_seed(bits)
    x = torch.randn(3000, 3) * torch.tensor([1.0, 30.0, 1e-3]) + torch.tensor([0.0, 100.0, -1.0])
    scale, zero = find_scales(x, bits)
    assert (scale.shape, zero.shape, scale.dtype) == ((3,), (3,), torch.float32)
    for c in range(3):
        assert error_of(x[:, c], scale[c], zero[c], bits) <= 1.03 * grid_search(x[:, c], bits)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_static_scales_of_heavy_tails_beat_the_whole_range(bits):
    x = torch.distributions.StudentT(3.0).sample((4000, 1))
    scale, zero = find_scales(x, bits)
    _, whole, low = quantize(x.T, bits, (4000,), False, "minmax", torch.float32)
    best = error_of(x[:, 0], scale[0], zero[0], bits)
    assert best <= error_of(x[:, 0], whole[0, 0], low[0, 0], bits) * (1 + 1e-6)
    assert best <= 1.05 * grid_search(x[:, 0], bits)
    if bits <= 3:
        assert best < 0.7 * error_of(x[:, 0], whole[0, 0], low[0, 0], bits)


@pytest.mark.parametrize("bits", TIER_BITS)
def test_static_scales_of_constant_channels(bits):
    x = torch.tensor([0.0, 0.1, -7.3, 1e30]).expand(50, 4).contiguous()
    scale, zero = find_scales(x, bits)
    assert torch.equal(scale, torch.zeros(4)) and torch.equal(zero, x[0])
    codec = make_codec(QuantScheme(bits, **STATIC, symmetric=False), 50, (4,), torch.float32, None, (scale, zero))
    assert torch.equal(codec.decode(codec.encode(x[None])), x[None])


# ---- the largest share


def test_the_largest_share_that_fits():
    def ranks_of(share):
        if share < 0.1:
            raise ValueError(f"share={share}: must be at least 0.1")
        return {K: [math.floor(64 * share)]}

    def nbytes(ranks):
        return 100 * ranks[K][0]

    for budget in (600, 650, 3200, 6400, 10**6):
        share = largest_share(ranks_of, nbytes, budget)
        assert share * 512 == int(share * 512)
        assert nbytes(ranks_of(share)) <= budget
        assert share == 1 or nbytes(ranks_of(share + 1 / 512)) > budget
    assert largest_share(ranks_of, nbytes, 6400) == 1.0
    for budget in (599, 0, -5):
        with pytest.raises(ValueError, match=f"budget: {budget:,} bytes must hold the smallest ranks"):
            largest_share(ranks_of, nbytes, budget)
