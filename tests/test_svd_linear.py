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
    x = torch.eye(weight.shape[1]).double() if input_covariance is None else input_covariance
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
    factors = factor_weight(weight, rank, x, metric)
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
    factors = factor_weight(weight, OUT, x, metric)
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
        factors = factor_weight(weight, OUT, x, covariance(OUT, rank=20) if with_metric else None)
        assert torch.isfinite(factors.a).all()
        assert torch.isfinite(factors.b).all()
        assert torch.allclose(factors.a @ factors.b, weight, rtol=0, atol=1e-9 * max(weight.abs().max().item(), 1e-30))


def test_rank_three_statistics_need_rank_three():
    weight, x = torch.randn(OUT, IN, dtype=torch.float64), covariance(IN, rank=3)
    total = expected_error(weight, torch.zeros_like(weight), x)
    product = (lambda f: f.a @ f.b)(factor_weight(weight, 3, x))
    assert expected_error(weight, product, x) < 1e-9 * total
    two = factor_weight(weight, 2, x)
    assert expected_error(weight, two.a @ two.b, x) > 1e-3 * total


def test_rank_of_the_weight_is_enough():
    weight = torch.randn(OUT, 5, dtype=torch.float64) @ torch.randn(5, IN, dtype=torch.float64)
    for x, metric in ((None, None), (covariance(IN), covariance(OUT)), (covariance(IN, rank=4), None)):
        factors = factor_weight(weight, 5, x, metric)
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
    weight, x, metric = torch.randn(OUT, IN), covariance(IN), torch.rand(OUT).double() + 0.1
    first, second = (factor_weight(weight, 9, x, metric) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))
    # Without a metric A is orthonormal: its columns are the U whose largest entries are positive.
    u = factor_weight(weight, 9, x).a
    assert torch.allclose(u.T @ u, torch.eye(9).double(), atol=1e-10)
    assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()
    negated = factor_weight(-weight, 9, x)
    assert torch.allclose(negated.a, u, atol=1e-8)


@pytest.mark.parametrize("rank", [0, -1, 25, 41])
def test_ranks_out_of_range_are_refused(rank):
    for shape in ((OUT, IN), (IN, OUT)):
        with pytest.raises(ValueError, match=rf"rank={rank}: must be from 1 to min\(out, in\)=24"):
            factor_weight(torch.randn(shape), rank)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name, shape", [("weight", (OUT, IN)), ("input_covariance", (IN, IN)), ("metric", (OUT,))])
def test_statistics_that_are_not_finite_are_refused(bad, name, shape):
    arguments = {"weight": torch.randn(OUT, IN), "rank": 3, name: torch.ones(shape).index_fill(0, torch.tensor(1), bad)}
    with pytest.raises(ValueError, match=f"{name}: must be finite"):
        factor_weight(**arguments)


@pytest.mark.parametrize(
    "name, shape",
    [
        ("input_covariance", (OUT, OUT)),
        ("input_covariance", (IN,)),
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
    for statistics in ({}, {"input_covariance": covariance(IN, rank=3), "metric": metric}):
        split = SVDLinear.from_linear(linear, ranks, num_heads=4, rotate=rotate, **statistics)
        x = torch.randn(2, 5, IN)
        assert torch.allclose(split(x), linear(x), atol=1e-5)
        assert torch.allclose(split.dense_weight(), linear.weight, atol=1e-5)


@pytest.mark.parametrize("ranks", [(7, 3), (1, 12), (5, 5), (2, 6, 1, 3)])
@pytest.mark.parametrize("rotate", [False, True])
def test_groups_are_factored_by_themselves(ranks, rotate):
    linear, x, metric = nn.Linear(IN, OUT), covariance(IN), covariance(OUT)
    split = SVDLinear.from_linear(linear, ranks, 4, x, metric, rotate)
    assert split.BLinear.weight.shape == (sum(ranks), IN)
    assert split.ALinear.weight.shape == (OUT, max(ranks))
    rows = OUT // len(ranks)
    for i, rank in enumerate(ranks):
        span = slice(i * rows, (i + 1) * rows)
        factors = factor_weight(linear.weight[span].detach(), rank, x, metric[span, span])
        assert torch.allclose(split.dense_weight()[span].double(), factors.a @ factors.b, atol=1e-5)
        assert (split.ALinear.weight[span, rank:] == 0).all()
    inputs = torch.randn(3, IN)
    assert torch.allclose(split(inputs), inputs @ split.dense_weight().T + linear.bias, atol=1e-5)


def test_a_joint_decomposition_is_better_than_groups_of_the_same_rank():
    weight, x = torch.randn(OUT, 8) @ torch.randn(8, IN), covariance(IN)
    errors = []
    for ranks in ((8,), (4, 4), (2, 2, 2, 2)):
        a, b = join_factors(factor_groups(weight, ranks, x), False, torch.float64)
        errors.append(expected_error(weight, dense_product(a, b, ranks), x))
    assert errors[0] < 1e-6 < errors[1] < errors[2]


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
