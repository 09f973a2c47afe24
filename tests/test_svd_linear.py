"""Low-rank layers: the factorizations against brute force, and the modules against plain linear layers."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from modules.svd_linear import (
    ALinear,
    BLinear,
    SVDLinear,
    dense_product,
    factor_groups,
    factor_weight,
    join_factors,
    output_covariance,
    query_key_metric,
    split_groups,
    value_output_metric,
)

OUT, IN = 24, 40


def covariance(size: int, rank: int | None = None, decay: float = 0.8) -> torch.Tensor:
    """A random `[size, size]` covariance of the given rank with geometrically falling energies."""
    rank = size if rank is None else rank
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q[:, :rank]
    return (basis * decay ** torch.arange(rank, dtype=torch.float64)) @ basis.T


def expected_error(weight, product, x=None, metric=None) -> float:
    """`E‖M^{1/2}(W x - P x)‖²` = tr(M (W - P) X (W - P)ᵀ)."""
    difference = weight.double() - product.double()
    x = torch.eye(weight.shape[1]).double() if x is None else x
    m = torch.eye(weight.shape[0]).double() if metric is None else metric
    m = torch.diag(m) if m.dim() == 1 else m
    return torch.trace(m @ difference @ x @ difference.T).item()


def root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


# ---- factors


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (24, 24)])
def test_without_statistics_the_error_is_the_tail_of_the_singular_values(shape):
    weight = torch.randn(shape, dtype=torch.float64)
    singular = torch.linalg.svdvals(weight)
    for rank in (1, 7, 23, 24):
        factors = factor_weight(weight, rank)
        assert (factors.a.shape, factors.b.shape) == ((shape[0], rank), (rank, shape[1]))
        assert factors.a.dtype == factors.b.dtype == factors.energy.dtype == torch.float64
        tail = singular[rank:].square().sum().item()
        assert expected_error(weight, factors.a @ factors.b) == pytest.approx(tail, rel=1e-9, abs=1e-20)
        assert torch.allclose(factors.energy[:24], singular.square(), rtol=1e-9, atol=1e-12)
        assert factors.energy.shape == (shape[0],)


@pytest.mark.parametrize("metric_kind", [None, "diagonal", "full"])
@pytest.mark.parametrize("rank", [1, 5, 16])
def test_with_statistics_the_error_is_least(metric_kind, rank):
    weight, x = torch.randn(OUT, IN, dtype=torch.float64), covariance(IN)
    metric = {None: None, "diagonal": torch.rand(OUT).double() + 0.05, "full": covariance(OUT, decay=0.9)}[metric_kind]
    factors = factor_weight(weight, rank, output_covariance(weight, x), metric)
    error = expected_error(weight, factors.a @ factors.b, x, metric)

    m = torch.eye(OUT).double() if metric is None else torch.diag(metric) if metric.dim() == 1 else metric
    tail = torch.linalg.svdvals(root(m) @ weight @ root(x))[rank:].square().sum().item()
    assert error == pytest.approx(tail, rel=1e-5)
    assert error == pytest.approx(factors.energy[rank:].sum().item(), rel=1e-5)
    plain = factor_weight(weight, rank)
    assert error < 0.98 * expected_error(weight, plain.a @ plain.b, x, metric)
    for _ in range(5):
        other = (factors.a + 1e-3 * torch.randn_like(factors.a)) @ (factors.b + 1e-3 * torch.randn_like(factors.b))
        assert error <= expected_error(weight, other, x, metric)


def test_the_latents_are_sorted_by_the_error_they_remove():
    weight, x, metric = torch.randn(OUT, IN, dtype=torch.float64), covariance(IN), covariance(OUT)
    factors = factor_weight(weight, OUT, output_covariance(weight, x), metric)
    assert (factors.energy.diff() <= 0).all()
    for rank in (1, 4, 9):
        product = factors.a[:, :rank] @ factors.b[:rank]
        tail = factors.energy[rank:].sum().item()
        assert expected_error(weight, product, x, metric) == pytest.approx(tail, rel=1e-5)


def test_output_covariance_is_that_of_samples():
    weight, samples = torch.randn(6, 9), torch.randn(500, 9, dtype=torch.float64) @ torch.randn(9, 9).double()
    outputs = samples @ weight.double().T
    found = output_covariance(weight, samples.T @ samples / 500)
    assert torch.allclose(found, outputs.T @ outputs / 500)
    assert torch.allclose(output_covariance(weight), weight.double() @ weight.double().T)


@pytest.mark.parametrize("with_metric", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(OUT, IN),
        lambda: torch.randn(OUT, 5) @ torch.randn(5, IN),
        lambda: torch.zeros(OUT, IN),
        lambda: torch.eye(OUT, IN),
        lambda: 3.0 * torch.linalg.qr(torch.randn(IN, IN)).Q[:OUT],
        lambda: torch.randn(OUT, IN).index_fill(0, torch.arange(3, 9), 0.0),
        lambda: torch.randn(1, IN).expand(OUT, IN),
        lambda: 1e-6 * torch.randn(OUT, IN),
    ],
    ids=["random", "rank 5", "zero", "identity", "repeated values", "zero rows", "equal rows", "small"],
)
def test_full_rank_is_the_weight_whatever_the_statistics(make, with_metric):
    weight = make().double()
    for x in (None, covariance(IN), covariance(IN, rank=3), torch.zeros(IN, IN).double(), 1e6 * covariance(IN)):
        y = None if x is None else output_covariance(weight, x)
        factors = factor_weight(weight, OUT, y, covariance(OUT, rank=20) if with_metric else None)
        assert torch.isfinite(factors.a).all()
        assert torch.isfinite(factors.b).all()
        assert torch.allclose(factors.a @ factors.b, weight, rtol=0, atol=1e-9 * max(weight.abs().max().item(), 1e-30))


def test_rank_three_statistics_need_rank_three():
    weight, x = torch.randn(OUT, IN, dtype=torch.float64), covariance(IN, rank=3)
    total = expected_error(weight, torch.zeros_like(weight), x)
    product = (lambda f: f.a @ f.b)(factor_weight(weight, 3, output_covariance(weight, x)))
    assert expected_error(weight, product, x) < 1e-9 * total
    two = factor_weight(weight, 2, output_covariance(weight, x))
    assert expected_error(weight, two.a @ two.b, x) > 1e-3 * total


def test_rank_of_the_weight_is_enough():
    weight = torch.randn(OUT, 5, dtype=torch.float64) @ torch.randn(5, IN, dtype=torch.float64)
    for x, metric in ((None, None), (covariance(IN), covariance(OUT)), (covariance(IN, rank=4), None)):
        factors = factor_weight(weight, 5, None if x is None else output_covariance(weight, x), metric)
        assert torch.allclose(factors.a @ factors.b, weight, atol=1e-6)


def test_repeated_singular_values():
    for rank in (1, 6, 24):
        factors = factor_weight(torch.eye(OUT, dtype=torch.float64), rank)
        product = factors.a @ factors.b
        assert torch.allclose(product @ product, product, atol=1e-12)
        assert torch.trace(product).item() == pytest.approx(rank)


def test_a_zero_metric_still_gives_the_weight():
    """A pruned head: its part of `o_proj` is zero, so that no error of its values can be seen."""
    linear = nn.Linear(IN, OUT, bias=False)
    metric = torch.ones(OUT)
    metric[: OUT // 2] = 0
    split = SVDLinear.from_linear(linear, (OUT // 2, OUT // 2), 2, metric=metric)
    assert torch.allclose(split.dense_weight(), linear.weight, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1.0, 1e4, 1e8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_unit_of_the_metric_does_not_matter(scale, dtype):
    weight = (0.02 * torch.randn(OUT, IN)).to(dtype)
    metric = covariance(OUT)
    a, b = join_factors([factor_weight(weight, OUT, None, metric)], True, dtype)
    scaled_a, scaled_b = join_factors([factor_weight(weight, OUT, None, scale * metric)], True, dtype)
    error, scaled_error = (
        (p.double() - weight.double()).norm() for p in (a.double() @ b.double(), scaled_a.double() @ scaled_b.double())
    )
    assert scaled_error <= 2 * error


def test_signs_and_results_are_determined():
    weight, metric = torch.randn(OUT, IN), torch.rand(OUT).double() + 0.1
    y = output_covariance(weight, covariance(IN))
    first, second = (factor_weight(weight, 9, y, metric) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(first[:4], second[:4], strict=True)) and first.unit == second.unit
    # Without a metric A is orthonormal: its columns are the U whose largest entries are positive.
    u = factor_weight(weight, 9, y).a
    assert torch.allclose(u.T @ u, torch.eye(9).double(), atol=1e-10)
    assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()
    negated = factor_weight(-weight, 9, y)
    assert torch.allclose(negated.a, u, atol=1e-8)


@pytest.mark.parametrize("rank", [0, -1, 25, 41])
def test_ranks_out_of_range_are_refused(rank):
    for shape in ((OUT, IN), (IN, OUT)):
        with pytest.raises(ValueError, match=rf"rank={rank}: must be from 1 to min\(out, in\)=24"):
            factor_weight(torch.randn(shape), rank)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "name, shape", [("weight", (OUT, IN)), ("covariance", (OUT, OUT)), ("metric", (OUT,)), ("mean", (OUT,))]
)
def test_statistics_that_are_not_finite_are_refused(bad, name, shape):
    arguments = {"weight": torch.randn(OUT, IN), "rank": 3, name: torch.ones(shape).index_fill(0, torch.tensor(1), bad)}
    with pytest.raises(ValueError, match=f"{name}: must be finite"):
        factor_weight(**arguments)


@pytest.mark.parametrize(
    "name, shape",
    [
        ("covariance", (IN, IN)),
        ("covariance", (OUT, IN)),
        ("covariance", (OUT,)),
        ("mean", (IN,)),
        ("mean", (OUT, OUT)),
        ("metric", (IN,)),
        ("metric", (IN, IN)),
        ("metric", (OUT, IN)),
    ],
)
def test_statistics_of_the_wrong_size_are_refused(name, shape):
    with pytest.raises(ValueError, match=rf"{name}: shape .* must be"):
        factor_weight(torch.randn(OUT, IN), 3, **{name: torch.ones(shape)})


# ---- head groups


@pytest.mark.parametrize("ranks", [(24,), (12, 12), (6, 6, 6, 6)])
@pytest.mark.parametrize("rotate", [False, True])
def test_full_rank_layers_are_the_linear_layer(ranks, rotate):
    linear = nn.Linear(IN, OUT)
    metric = torch.rand(OUT) + 0.1
    y = output_covariance(linear.weight.detach(), covariance(IN, rank=3))
    for statistics in ({}, {"covariance": y, "metric": metric}, {"covariance": y, "mean": torch.randn(OUT)}):
        split = SVDLinear.from_linear(linear, ranks, num_heads=4, rotate=rotate, **statistics)
        x = torch.randn(2, 5, IN)
        assert torch.allclose(split(x), linear(x), atol=1e-5)
        assert torch.allclose(split.dense_weight(), linear.weight, atol=1e-5)


@pytest.mark.parametrize("ranks", [(7, 3), (1, 12), (5, 5), (2, 6, 1, 3)])
@pytest.mark.parametrize("rotate", [False, True])
def test_groups_are_factored_by_themselves(ranks, rotate):
    linear, x, metric = nn.Linear(IN, OUT), covariance(IN), covariance(OUT)
    y = output_covariance(linear.weight.detach(), x)
    split = SVDLinear.from_linear(linear, ranks, 4, rotate, covariance=y, metric=metric)
    assert split.BLinear.weight.shape == (sum(ranks), IN)
    assert split.ALinear.weight.shape == (OUT, max(ranks))
    rows = OUT // len(ranks)
    for i, rank in enumerate(ranks):
        span = slice(i * rows, (i + 1) * rows)
        own = linear.weight[span].detach()
        factors = factor_weight(own, rank, output_covariance(own, x), metric[span, span])
        assert torch.allclose(split.dense_weight()[span].double(), factors.a @ factors.b, atol=1e-5)
        assert (split.ALinear.weight[span, rank:] == 0).all()
    inputs = torch.randn(3, IN)
    assert torch.allclose(split(inputs), inputs @ split.dense_weight().T + linear.bias, atol=1e-5)


def test_a_joint_decomposition_is_better_than_groups_of_the_same_rank():
    weight, x = torch.randn(OUT, 8) @ torch.randn(8, IN), covariance(IN)
    errors = []
    for ranks in ((8,), (4, 4), (2, 2, 2, 2)):
        a, b = join_factors(factor_groups(weight, ranks, output_covariance(weight, x)), False, torch.float64)
        errors.append(expected_error(weight, dense_product(a, b, ranks), x))
    assert errors[0] < 1e-6 < errors[1] < errors[2]


# ---- the mean in a channel of its own

METRICS = {
    "none": lambda: None,
    "diagonal": lambda: torch.rand(OUT).double() + 0.1,
    "full": lambda: covariance(OUT, decay=0.9),
}


def outputs_with_a_mean(weight, tokens: int = 400) -> torch.Tensor:
    """`[tokens, OUT]` outputs of inputs that share most of their energy."""
    x = torch.randn(tokens, IN, dtype=torch.float64) @ root(covariance(IN)) + 2 * torch.randn(IN, dtype=torch.float64)
    return x @ weight.double().T


def root_of(metric) -> torch.Tensor:
    m = torch.eye(OUT).double() if metric is None else torch.diag(metric) if metric.dim() == 1 else metric
    return root(m)


@pytest.mark.parametrize("make", METRICS.values(), ids=METRICS.keys())
class TestMean:
    def test_one_channel_carries_the_mean(self, make):
        weight, metric = torch.randn(OUT, IN, dtype=torch.float64), make()
        y = outputs_with_a_mean(weight)
        factors = factor_weight(weight, OUT, y.T @ y / len(y), metric, y.mean(0))
        latents = (y @ factors.project.T).mean(0).abs()
        assert latents[0] > 1 and (latents[1:] < 1e-11 * latents[0]).all()
        assert torch.allclose(factors.project @ weight, factors.b)
        # It lies along S E[y], with S the root of the metric in its unit.
        s = root_of(metric) / factors.unit**0.5
        direction = torch.nn.functional.normalize(s @ y.mean(0), dim=0)
        basis = s @ factors.a
        assert (basis[:, 0] @ direction).abs().item() == pytest.approx(1, abs=1e-12)
        assert torch.allclose(basis.T @ basis, torch.eye(OUT).double(), atol=1e-10)
        assert torch.allclose(basis.T @ s, factors.project, atol=1e-10)
        assert (basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all()
        # Without a mean all channels share it.
        shared = (y @ factor_weight(weight, OUT, y.T @ y / len(y), metric).project.T).mean(0).abs()
        assert (shared[1:] > 1e-8 * shared[0]).all()

    def test_the_error_is_the_sum_of_the_energies_that_are_dropped(self, make):
        weight, metric = torch.randn(OUT, IN, dtype=torch.float64), make()
        y = outputs_with_a_mean(weight)
        moments = y.T @ y / len(y)
        s = root_of(metric)
        for mean in (None, y.mean(0)):
            factors = factor_weight(weight, OUT, moments, metric, mean)
            assert factors.energy.sum().item() == pytest.approx((s @ moments @ s).trace().item(), rel=1e-5)
            assert (factors.energy[1:].diff() <= 0).all()
            total = factors.energy.sum().item()
            for kept in ([0], [0, 1, 2, 3], [5, 2, 9], list(range(1, OUT)), list(range(OUT - 1))):
                chosen = factors.select(torch.tensor(kept))
                lost = (y - y @ chosen.project.T @ chosen.a.T) @ s
                dropped = [i for i in range(OUT) if i not in kept]
                expected = factors.energy[dropped].sum().item()
                assert lost.square().sum(1).mean().item() == pytest.approx(expected, rel=1e-6, abs=1e-6 * total)
                assert factors.energy[kept].sum().item() == pytest.approx(chosen.energy.sum().item())

    def test_the_other_channels_are_the_best_beside_it(self, make):
        weight, metric = torch.randn(OUT, IN, dtype=torch.float64), make()
        y = outputs_with_a_mean(weight)
        moments, s = y.T @ y / len(y), root_of(metric)
        energy = factor_weight(weight, OUT, moments, metric, y.mean(0)).energy
        first = s @ y.mean(0) / (s @ y.mean(0)).norm()
        frame = torch.linalg.qr(torch.cat([first[:, None], torch.randn(OUT, OUT - 1, dtype=torch.float64)], 1)).Q[:, 1:]
        inside = torch.linalg.eigvalsh(frame.T @ s @ moments @ s @ frame).flip(0)
        assert torch.allclose(energy[1:], inside, rtol=1e-4, atol=1e-6 * moments.trace())
        assert energy[0].item() == pytest.approx((first @ s @ moments @ s @ first).item(), rel=1e-5)
        # It comes first, and the rest in order, whatever it weighs.
        weak = factor_weight(weight, OUT, torch.cov(y.T), metric, frame[:, 0])
        assert weak.energy[0] < weak.energy[1] and (weak.energy[1:].diff() <= 0).all()

    def test_full_rank_is_the_weight(self, make):
        weights = {
            "random": torch.randn(OUT, IN).double(),
            "rank 5": (torch.randn(OUT, 5) @ torch.randn(5, IN)).double(),
            "zero rows": torch.randn(OUT, IN).double().index_fill(0, torch.arange(3, 9), 0.0),
            "zero": torch.zeros(OUT, IN).double(),
        }
        for weight in weights.values():
            y = outputs_with_a_mean(weight)
            moments = {"text": y.T @ y / len(y), "two tokens": y[:2].T @ y[:2], "zero": torch.zeros(OUT, OUT).double()}
            for covariance_y in (None, *moments.values()):
                for mean in (y.mean(0), torch.randn(OUT).double(), 1e6 * torch.randn(OUT), torch.zeros(OUT)):
                    factors = factor_weight(weight, OUT, covariance_y, make(), mean)
                    assert torch.allclose(factors.a @ factors.b, weight, rtol=0, atol=1e-9)
                    assert all(torch.isfinite(f).all() for f in factors[:4])


def test_no_mean_is_split_off_where_there_is_none():
    weight, metric = torch.randn(OUT, IN, dtype=torch.float64), torch.rand(OUT) + 0.1
    y = output_covariance(weight, covariance(IN))
    without, zeros = (factor_weight(weight, 7, y, metric, mean) for mean in (None, torch.zeros(OUT)))
    assert all(torch.equal(p, q) for p, q in zip(without[:4], zeros[:4], strict=True))


@pytest.mark.parametrize("scale", [1e-13, 1e-20, 1e-200])
def test_a_mean_of_rounding_errors(scale):
    weight, mean = torch.randn(OUT, IN, dtype=torch.float64), scale * torch.randn(OUT, dtype=torch.float64)
    for metric in (None, torch.rand(OUT).double() + 0.1):
        factors = factor_weight(weight, OUT, output_covariance(weight, covariance(IN)), metric, mean)
        assert torch.allclose(factors.a @ factors.b, weight, rtol=0, atol=1e-9)
        assert torch.allclose(factors.a @ factors.project, torch.eye(OUT).double(), atol=1e-9)


def test_groups_split_their_own_means():
    weight = torch.randn(OUT, IN, dtype=torch.float64)
    y = outputs_with_a_mean(weight)
    mean = y.mean(0) * (torch.arange(OUT) < OUT // 2)  # nothing in the second group
    first, second = factor_groups(weight, (4, 6), y.T @ y / len(y), torch.rand(OUT).double() + 0.1, mean)
    assert ((first.project @ mean[: OUT // 2])[1:].abs() < 1e-12).all()
    assert second.energy[0] == second.energy.max()
    assert (first.a.shape[1], second.a.shape[1]) == (4, 6)


def test_selected_channels():
    weight, metric = torch.randn(OUT, IN, dtype=torch.float64), torch.rand(OUT) + 0.1
    y = output_covariance(weight, covariance(IN))
    full = factor_weight(weight, OUT, y, metric)
    chosen = full.select(torch.tensor([7, 0, 3]))
    assert torch.equal(chosen.a, full.a[:, [7, 0, 3]]) and torch.equal(chosen.b, full.b[[7, 0, 3]])
    assert torch.equal(chosen.project, full.project[[7, 0, 3]]) and torch.equal(chosen.energy, full.energy[[7, 0, 3]])
    assert chosen.unit == full.unit == metric.max().item()
    first, short = full.select(torch.arange(5)), factor_weight(weight, 5, y, metric)
    for name in ("a", "b", "project"):
        assert torch.allclose(getattr(first, name), getattr(short, name), rtol=1e-12, atol=1e-12)
    assert torch.equal(first.energy, short.energy[:5]) and short.energy.shape == (OUT,)
    assert chosen.select(torch.tensor([], dtype=torch.long)).a.shape == (OUT, 0)


# ---- tiers


def test_rotation_stays_inside_each_tier():
    weight = torch.randn(OUT, IN, dtype=torch.float64)
    groups = factor_groups(weight, (12, 9))
    tiers = [[(1, 16), (8, 4), (3, 2)], [(4, 3), (5, 1)]]
    a, b = join_factors(groups, True, torch.float64, tiers)
    plain_a, plain_b = join_factors(groups, False, torch.float64, tiers)
    together = join_factors(groups, True, torch.float64)
    assert torch.equal(plain_b, torch.cat([f.b for f in groups]))
    for i, (rank, spans) in enumerate(zip((12, 9), tiers, strict=True)):
        rows, channels = slice(12 * i, 12 * i + 12), slice(12 * i, 12 * i + rank)
        product = groups[i].a @ groups[i].b
        for left, right in ((a, b), together):
            assert torch.allclose(left[rows, :rank] @ right[channels], product, atol=1e-10)
        rotation = torch.linalg.pinv(plain_a[rows, :rank]) @ a[rows, :rank]
        assert torch.allclose(rotation @ b[channels], plain_b[channels], atol=1e-10)
        assert torch.allclose(rotation @ rotation.T, torch.eye(rank).double(), atol=1e-10)
        own = torch.block_diag(*(torch.ones(n, n) for n, _ in spans)).bool()
        assert (rotation[~own].abs() < 1e-10).all() and (rotation[own].abs() > 1e-3).all()
        mixed = torch.linalg.pinv(plain_a[rows, :rank]) @ together[0][rows, :rank]
        assert (mixed.abs() > 1e-3).all()


def test_tiers_must_add_up_to_the_ranks():
    groups = factor_groups(torch.randn(OUT, IN), (6, 6))
    with pytest.raises((ValueError, RuntimeError)):
        join_factors(groups, True, torch.float32, [[(4, 2)], [(6, 2)]])


# ---- metrics


def test_query_metric_is_the_logit_error_averaged_over_positions():
    heads, key_heads, size = 6, 2, 16
    # A base at which even the slowest frequency turns often, as the average supposes.
    config = LlamaConfig(
        hidden_size=heads * size,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=size,
        rope_parameters={"rope_type": "default", "rope_theta": 10.0},
    )
    rotary = LlamaRotaryEmbedding(config).double()
    queries = torch.randn(50, heads, size, dtype=torch.float64) * torch.rand(heads, size) + torch.randn(heads, size)
    error = torch.randn(key_heads, size, dtype=torch.float64)

    squared = torch.zeros((), dtype=torch.float64)
    positions = torch.arange(20000)[None]
    cos, sin = (x.double() for x in rotary(queries, positions))
    expanded = error.repeat_interleave(heads // key_heads, 0)[None, :, None].expand(1, heads, positions.shape[1], size)
    rotated = apply_rotary_pos_emb(expanded, expanded, cos, sin)[1][0]
    for query in queries:
        squared += torch.einsum("hd,hpd->hp", query, rotated).square().mean(1).sum() / len(queries)

    energy = queries[..., : size // 2].square() + queries[..., size // 2 :].square()
    metric = query_key_metric(energy.mean(0), key_heads)
    assert metric.shape == (key_heads * size,)
    # The square of a cosine averages to one half.
    assert 0.5 * (metric * error.flatten().square()).sum().item() == pytest.approx(squared.item(), rel=0.01)


def test_query_metric_has_a_floor():
    metric = query_key_metric(torch.tensor([[4.0, 0.0], [2.0, 0.0]]), num_key_value_heads=1)
    assert metric.tolist() == pytest.approx([6.0, 3e-3, 6.0, 3e-3])
    assert (query_key_metric(torch.zeros(2, 4), 2) > 0).all()


@pytest.mark.parametrize("with_overlap", [False, True])
@pytest.mark.parametrize("heads, key_heads", [(6, 2), (4, 4), (4, 1)])
def test_value_metric_is_the_error_after_the_output_projection(with_overlap, heads, key_heads):
    hidden, size, tokens = 20, 5, 30
    output = nn.Linear(heads * size, hidden, bias=False).double()
    # Errors of different tokens are independent: e_j = ±e, so that the expected square is the sum over tokens.
    error = torch.randn(key_heads, size, dtype=torch.float64)
    expanded = error.repeat_interleave(heads // key_heads, 0)
    if with_overlap:
        attention = torch.randn(heads, tokens, dtype=torch.float64).softmax(1)
        metric = value_output_metric(output.weight.detach(), heads, key_heads, attention @ attention.T)
        expected = sum(output((attention[:, j, None] * expanded).flatten()).square().sum() for j in range(tokens))
    else:
        metric = value_output_metric(output.weight.detach(), heads, key_heads)
        alone = torch.eye(heads, dtype=torch.float64)
        expected = sum(output((alone[:, h, None] * expanded).flatten()).square().sum() for h in range(heads))
    assert metric.shape == (key_heads * size, key_heads * size)
    assert metric.dtype == torch.float64
    assert (error.flatten() @ metric @ error.flatten()).item() == pytest.approx(expected.item(), rel=1e-9)
    assert torch.linalg.eigvalsh(metric).min() > -1e-9


# ---- modules


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ranks", [(10,), (7, 3), (4, 4), (2, 6, 1, 3)])
@pytest.mark.parametrize("query_heads", [4, 12])
def test_per_head_expansion_is_the_diagonal_of_the_full_one(bias, ranks, query_heads):
    heads, size = 4, 6
    linear = nn.Linear(IN, heads * size, bias=bias)
    layer = SVDLinear.from_linear(linear, ranks, heads).ALinear
    # For every query head its own latents; of these only the group of its key/value head is passed.
    latent = torch.randn(2, query_heads, 5, sum(ranks))
    full = layer(latent).unflatten(-1, (heads, size))
    shared = query_heads // heads
    expected = torch.stack([full[:, h, :, h // shared] for h in range(query_heads)], dim=1)
    grouped = split_groups(latent, ranks)
    own = torch.stack([grouped[:, h, :, h // shared * len(ranks) // heads] for h in range(query_heads)], dim=1)
    found = layer(own, per_head=True)
    assert found.shape == (2, query_heads, 5, size)
    assert torch.allclose(found, expected, atol=1e-5)


def test_split_groups_fills_short_groups_with_zeros():
    latent = torch.arange(1.0, 13.0).view(2, 6)
    assert split_groups(latent, (2, 3, 1)).tolist() == [
        [[1, 2, 0], [3, 4, 5], [6, 0, 0]],
        [[7, 8, 0], [9, 10, 11], [12, 0, 0]],
    ]
    assert torch.equal(split_groups(latent, (3, 3)), latent.view(2, 2, 3))


@pytest.mark.parametrize("bias", [False, True])
def test_layer_carries_the_bias_and_applies_its_latent_transform(bias):
    linear = nn.Linear(IN, OUT, bias=bias)
    split = SVDLinear.from_linear(linear, (9,), 4)
    assert isinstance(split.BLinear, BLinear)
    assert isinstance(split.ALinear, ALinear)
    assert split.BLinear.bias is None
    assert (split.ALinear.bias is not None) is bias
    expected = linear.bias if bias else torch.zeros(OUT)
    assert torch.equal(split(torch.zeros(1, IN))[0], expected)
    x = torch.randn(3, IN)
    assert torch.allclose(split(x), split.ALinear(split.BLinear(x)))
    full = split(x)
    split.latent_transform = nn.ReLU()
    assert torch.allclose(split(x), split.ALinear(split.BLinear(x).relu()))
    assert not torch.allclose(split(x), full)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_split_keeps_type_and_leaves_the_linear_layer_alone(dtype):
    linear = nn.Linear(IN, OUT).to(dtype)
    kept = linear.weight.detach().clone()
    split = SVDLinear.from_linear(linear, (OUT,), 4)
    assert {p.dtype for p in split.parameters()} == {dtype}
    assert torch.equal(linear.weight, kept)
    assert linear.bias.data_ptr() != split.ALinear.bias.data_ptr()
    tolerance = 4 * torch.finfo(dtype).eps * kept.abs().max().item()
    assert torch.allclose(split.dense_weight().float(), kept.float(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("static", [False, True])
def test_given_factors_and_calibrated_scales_are_taken(static):
    linear = nn.Linear(IN, OUT).half()
    factors = [
        f.select(torch.tensor(c)) for f, c in zip(factor_groups(linear.weight.detach(), (12, 12)), ([4, 1], [0, 7, 2]))
    ]
    scales = (torch.rand(5) + 0.5, torch.randn(5))
    split = SVDLinear.from_linear(
        linear, (2, 3), 4, rotate=False, factors=factors, static_scales=scales if static else None, mean=None
    )
    assert torch.equal(split.BLinear.weight, torch.cat([f.b for f in factors]).half())
    assert torch.equal(split.ALinear.weight[:12, :2], factors[0].a.half())
    names = {"latent_scale", "latent_zero_point"}
    assert names & set(split.state_dict()) == (names if static else set())
    if static:
        assert torch.equal(split.latent_scale, scales[0].half())
        assert torch.equal(split.latent_zero_point, scales[1].half())
    else:
        assert split.latent_scale is None and split.latent_zero_point is None


def test_gradients_reach_both_factors():
    split = SVDLinear.from_linear(nn.Linear(IN, OUT), (5, 3), 4)
    split(torch.randn(2, IN)).square().sum().backward()
    for parameter in split.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


def test_factors_that_do_not_fit_the_type_are_refused():
    factors = factor_weight(torch.randn(OUT, IN) * 6e4, 4)
    with pytest.raises(ValueError, match=r"factors: values beyond the range of torch\.float16"):
        join_factors([factors], True, torch.float16)
    a, b = join_factors([factors], True, torch.bfloat16)
    assert torch.isfinite(a).all()
    assert torch.isfinite(b).all()
