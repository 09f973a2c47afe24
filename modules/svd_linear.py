r"""Low-rank linear layers `W ≈ A·B` and the factorizations that make them.

`k = W x` is split into a latent `c = B x` (`BLinear`), which is what a cache stores, and its expansion `A c`
(`ALinear`, which carries the bias). The heads are cut into groups with a decomposition of their own; then `A` is
block-diagonal and the groups' latents lie side by side.

Several projections, the members of a block, can share a latent that is made of their outputs: `z = Σ_m B_m (y_m - ȳ_m)`
(`MemberBLinear`), and every member has an `ALinear` of its own, `y_m ≈ ȳ_m + A_m z` (`LatentFactors`).
"""

from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from modules.hadamard_utils import fuse_rotation


class Factors(NamedTuple):
    """Low-rank factors `W ≈ a·b`, float64.

    Attributes:
        a: `[out, r]`.
        b: `[r, in]`, which is `project @ W`.
        energy: `[out]`, the error that each latent direction removes, descending; if the mean is split off, its
            direction comes first.
        project: `[r, out]`, latents from outputs of the dense layer. An error of a latent, squared, counts `unit`.
        unit: Unit of the energies; `[r]` where every latent has one of its own.
    """

    a: torch.Tensor
    b: torch.Tensor
    energy: torch.Tensor
    project: torch.Tensor
    unit: float | torch.Tensor

    def select(self, channels: torch.Tensor) -> "Factors":
        """Factors with some of the latent channels `[n]`, in the given order."""
        chosen = {"a": self.a[:, channels], "b": self.b[channels], "project": self.project[channels]}
        unit = self.unit[channels] if isinstance(self.unit, torch.Tensor) else self.unit
        return self._replace(**chosen, energy=self.energy[channels], unit=unit)


def output_covariance(weight: torch.Tensor, input_covariance: torch.Tensor | None = None) -> torch.Tensor:
    """`E[(W x)(W x)ᵀ]`, `[out, out]` float64, from `W` `[out, in]` and `E[x xᵀ]` `[in, in]` (default: identity)."""
    w = weight.double()
    return w @ w.T if input_covariance is None else w @ input_covariance.double() @ w.T


def query_key_metric(query_energy: torch.Tensor, num_key_value_heads: int, floor: float = 1e-3) -> torch.Tensor:
    """Diagonal metric under which the error of a key is the mean squared error of its logits.

    Averaged over relative positions, RoPE leaves `Σ_f E|q_f|² |Δk_f|²` for the complex pair `(f, f + d/2)`.

    Args:
        query_energy: `[H_q, d/2]`, `E|q_f|²` of each query head, bias included.
        num_key_value_heads: Heads that the query heads share.
        floor: Smallest weight, as a share of the mean one.

    Returns:
        `[H_kv * d]` float64: the energies of the query heads that share a key head, summed.
    """
    # Both halves of a head, f and f + d/2, have the energy of their frequency.
    energy = query_energy.double().unflatten(0, (num_key_value_heads, -1)).sum(1)
    energy = energy.clamp(min=floor * energy.mean().clamp(min=torch.finfo(torch.float64).tiny))
    return torch.cat([energy, energy], dim=-1).flatten()


def value_output_metric(
    o_weight: torch.Tensor, num_heads: int, num_key_value_heads: int, overlap: torch.Tensor | None = None
) -> torch.Tensor:
    """Metric under which the error of a value is its squared error after the output projection.

    Args:
        o_weight: `[C, H_q * d]` weight of `o_proj`.
        num_heads, num_key_value_heads: H_q and H_kv.
        overlap: `[H_q, H_q]`, `E Σ_j p_j^h p_j^h'` of the heads' attention; default: the identity, which leaves the
            block-diagonal metric.

    Returns:
        `[H_kv * d, H_kv * d]` float64, positive semidefinite.
    """
    o = o_weight.double().unflatten(1, (num_heads, -1))
    if overlap is None:
        overlap = torch.eye(num_heads, dtype=o.dtype, device=o.device)
    # Products of the query heads' output weights, summed over the query heads that share a value head.
    blocks = torch.einsum("cpd,pq,cqe->pdqe", o, overlap.to(o), o)
    shared = num_heads // num_key_value_heads
    blocks = blocks.unflatten(0, (num_key_value_heads, shared)).unflatten(3, (num_key_value_heads, shared))
    metric = blocks.sum(dim=(1, 4))
    size = metric.shape[0] * metric.shape[1]
    return metric.reshape(size, size)


def metric_root(metric: torch.Tensor | None, size: int, device: torch.device, floor: float = 1e-4):
    """Symmetric root of a metric (`None`, `[n]` diagonal or `[n, n]`), its inverse, and the metric's unit.

    The metric is divided by its largest eigenvalue, the unit, and smaller eigenvalues than `floor` are raised to it:
    the factors are stored in narrow types, so their sizes must neither depend on the unit nor differ too much. A metric
    of zeros (a pruned head) orders nothing; the identity stands in for it.
    """
    identity = torch.eye(size, dtype=torch.float64, device=device)
    if metric is None:
        return identity, identity, 1.0
    metric = metric.double()
    values, vectors = (metric, identity) if metric.dim() == 1 else torch.linalg.eigh(metric)
    # Of zeros there is no root to invert.
    unit = values.max().item()
    if unit <= 0:
        return identity, identity, 0.0
    root = (values / unit).clamp(min=floor).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T, unit


def factor_weight(
    weight: torch.Tensor,
    rank: int,
    covariance: torch.Tensor | None = None,
    metric: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
) -> Factors:
    r"""Rank-`rank` factors of `W` with the least expected error `E‖M^{1/2}(W x - A B x)‖²`.

    The optimal projector is spanned by the top eigenvectors `U` of `S Y S` with `Y = E[(W x)(W x)ᵀ]` and `S = M^{1/2}`:
    `A = S^{-1} U`, `B = Uᵀ S W`. No statistic is inverted, so singular ones and rank-deficient weights need no special
    case; at full rank `A B = W` whatever the statistics.

    With a `mean`, the first direction is that of `S E[W x]`, and the others are orthogonal to it: one channel, the mean
    scalar, carries all of the mean, and the other channels average to zero.

    Args:
        weight: `[out, in]`.
        rank: From 1 to `min(out, in)`.
        covariance: `Y`, uncentred, `[out, out]`; default: `W Wᵀ` (plain SVD of the weight).
        metric: `M`, the weight of an output error: `[out]` (diagonal) or `[out, out]`; default: the identity.
        mean: `E[W x]`, `[out]`, to be split off; `None`, or zeros: nothing is.

    Returns:
        `Factors`. The signs are fixed: the largest entry of every column of `U` is positive.

    Raises:
        ValueError: A rank out of range, or statistics that are not finite or of the wrong size.
    """
    out, size = weight.shape
    if not 1 <= rank <= min(out, size):
        raise ValueError(f"rank={rank}: must be from 1 to min(out, in)={min(out, size)}")
    for name, statistic, expected in (
        ("weight", weight, (tuple(weight.shape),)),
        ("covariance", covariance, ((out, out),)),
        ("metric", metric, ((out,), (out, out))),
        ("mean", mean, ((out,),)),
    ):
        if statistic is None:
            continue
        if tuple(statistic.shape) not in expected:
            raise ValueError(f"{name}: shape {tuple(statistic.shape)} must be {' or '.join(map(str, expected))}")
        if not torch.isfinite(statistic).all():
            raise ValueError(f"{name}: must be finite, found NaN or Inf")

    root, inverse_root, unit = metric_root(metric, out, weight.device)
    own = output_covariance(weight)
    if covariance is not None:
        # A trace of the weight's own covariance orders the directions that the text never excites, so that the
        # product at full rank is exact for any input.
        covariance = covariance.double()
        own = covariance + 1e-7 * covariance.trace() / own.trace().clamp(min=torch.finfo(torch.float64).tiny) * own
    # In the coordinates of the metric's root the best projector is spanned by the leading eigenvectors.
    own = root @ own @ root
    energy, vectors = torch.linalg.eigh(own)
    if mean is not None and mean.abs().max() > 0:
        first = root @ (mean.double() / mean.double().abs().max())
        first = (first / first.norm())[:, None]
        rest = torch.eye(out, dtype=torch.float64, device=first.device) - first @ first.T
        # `first` gets the one negative eigenvalue, so it comes first; put at the end, it becomes the first column.
        lowest = own.trace().clamp(min=torch.finfo(torch.float64).tiny)
        energy, vectors = torch.linalg.eigh(rest @ own @ rest - lowest * first @ first.T)
        vectors = torch.cat([vectors[:, 1:], first], dim=1)
        energy = torch.cat([energy[1:], (first.T @ own @ first)[0]])
    # `eigh` gives the largest eigenvalue last.
    u = vectors.flip(1)[:, :rank]
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))
    u = torch.where(largest < 0, -u, u)
    project = u.T @ root
    return Factors(inverse_root @ u, project @ weight.double(), unit * energy.flip(0).clamp(min=0), project, unit)


def factor_groups(
    weight: torch.Tensor,
    ranks: tuple[int, ...],
    covariance: torch.Tensor | None = None,
    metric: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
) -> list[Factors]:
    """`factor_weight` of each head group: `len(ranks)` equal slices of the rows of `weight` and of the statistics."""
    # A head group is a slice of the outputs, and has its own part of every statistic.
    rows = weight.shape[0] // len(ranks)
    factors = []
    for i, rank in enumerate(ranks):
        group = slice(i * rows, (i + 1) * rows)
        statistics = (_submatrix(statistic, group) for statistic in (covariance, metric, mean))
        factors.append(factor_weight(weight[group], rank, *statistics))
    return factors


def _submatrix(statistic: torch.Tensor | None, group: slice) -> torch.Tensor | None:
    """The entries of a vector, or the block on the diagonal of a matrix, for a slice of the outputs."""
    if statistic is None:
        return None
    return statistic[(group,) * statistic.dim()]


def join_factors(
    groups: list[Factors], rotate: bool, dtype: torch.dtype, tiers: list | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of `ALinear` `[out, max r]` and `BLinear` `[Σ r, in]` from the factors of the head groups.

    Args:
        groups: One `Factors` per head group.
        rotate: Fold a Hadamard rotation into each group's latent.
        dtype: Type of the result.
        tiers: For each group the (channels, bits) of its width tiers: each tier is rotated by itself.

    Raises:
        ValueError: A factor does not fit `dtype`.
    """
    widest = max(factors.a.shape[1] for factors in groups)
    weights_a, weights_b = [], []
    for i, (a, b, *_) in enumerate(groups):
        if rotate:
            spans = [channels for channels, _ in tiers[i]] if tiers else [len(b)]
            a, b = _rotate_spans(a, b, spans)
        weights_a.append(_widened(a, widest))
        weights_b.append(b)
    a, b = torch.cat(weights_a).to(dtype), torch.cat(weights_b).to(dtype)
    # Values beyond the type's range would become infinite without a word.
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ValueError(f"factors: values beyond the range of {dtype}; load the model in bfloat16 or float32")
    return a.contiguous(), b.contiguous()


def _rotate_spans(a: torch.Tensor, b: torch.Tensor, spans: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """`fuse_rotation` of consecutive channels, so many at a time."""
    rotated_a, rotated_b = zip(*map(fuse_rotation, a.split(spans, dim=1), b.split(spans)), strict=True)
    return torch.cat(rotated_a, dim=1), torch.cat(rotated_b)


def _widened(x: torch.Tensor, width: int) -> torch.Tensor:
    """`x` with zeros behind its last dimension, up to a width."""
    return nn.functional.pad(x, (0, width - x.shape[-1]))


class _SumGradient(torch.autograd.Function):
    """The identity. Its gradient is summed over the ranks of a process group, each of which has a part of it."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, process_group) -> torch.Tensor:
        ctx.process_group = process_group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        # The gradient that comes in is not ours to change.
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.process_group)
        return gradient, None


class BLinear(nn.Linear):
    """Projects hidden states `[..., C]` to latents `[..., Σ r]`; no bias."""

    def __init__(self, in_features: int, ranks: tuple[int, ...]):
        super().__init__(in_features, sum(ranks), bias=False)
        #: Tensor-parallel group, and what its ranks have in common: the "input" (each has latents of its own), or the
        #: "latents" (each has rows of A of its own).
        self.process_group, self.shared = None, "input"

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.process_group is None or not torch.is_grad_enabled():
            return super().forward(hidden_states)
        if self.shared == "input":
            return super().forward(_SumGradient.apply(hidden_states, self.process_group))
        return _SumGradient.apply(super().forward(hidden_states), self.process_group)


class Expansion(NamedTuple):
    """Tensors and attributes of an `ALinear`, for an operation in a graph, which must not hold a module."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    ranks: tuple[int, ...]
    num_heads: int

    def __call__(self, latent: torch.Tensor) -> torch.Tensor:
        """`ALinear.forward` of latents `[..., Σ r]`."""
        if len(self.ranks) == 1:
            return nn.functional.linear(latent, self.weight, self.bias)
        weight = self.weight.unflatten(0, (len(self.ranks), -1))
        states = torch.einsum("...nr,nor->...no", split_groups(latent, self.ranks), weight).flatten(-2)
        return states if self.bias is None else states + self.bias


class ALinear(nn.Module):
    """Expands latents to keys or values, head group by head group.

    `weight` is `[H_kv * d, max r]`: the rows of group i use its first `ranks[i]` columns, the rest are zero. `bias` is
    `[H_kv * d]` or absent.
    """

    def __init__(self, ranks: tuple[int, ...], out_features: int, num_heads: int, bias: bool):
        super().__init__()
        self.ranks, self.num_heads = tuple(ranks), num_heads
        self.weight = nn.Parameter(torch.empty(out_features, max(ranks)))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def extra_repr(self) -> str:
        return f"ranks={list(self.ranks)}, out_features={self.weight.shape[0]}, bias={self.bias is not None}"

    def forward(self, latent: torch.Tensor, per_head: bool = False) -> torch.Tensor:
        """Expand latents, or sums of latents.

        Args:
            latent: `[..., Σ r]`; with `per_head`, `[..., H_q, L, max r]`: for every query head its own combination
                of the latents of its group.
            per_head: Expand with the rows of each query head's key/value head only.

        Returns:
            `[..., H_kv * d]`; with `per_head`, `[..., H_q, L, d]`. The bias is added once: combinations are expected
            to have weights that sum to one.
        """
        if per_head:
            *lead, heads, length, rank = latent.shape
            # One product for each key/value head, of the queries of all rows: the weight is not repeated for them.
            queries = heads // self.num_heads * length
            grouped = latent.reshape(-1, self.num_heads, queries, rank).transpose(0, 1)
            weight = self.weight.view(self.num_heads, -1, rank)
            states = torch.bmm(grouped.reshape(self.num_heads, -1, rank), weight.mT)
            if self.bias is not None:
                states = states + self.bias.view(self.num_heads, 1, -1)
            states = states.view(self.num_heads, -1, queries, states.shape[-1]).transpose(0, 1)
            return states.reshape(*lead, heads, length, states.shape[-1])
        return Expansion(self.weight, self.bias, self.ranks, self.num_heads)(latent)


def shard_groups(groups: Sequence, rank: int, size: int) -> Sequence:
    """Entries of `groups` owned by tensor-parallel `rank` of `size`; a single joint group belongs to every rank."""
    if len(groups) == 1:
        return groups
    share = len(groups) // size
    return groups[rank * share : (rank + 1) * share]


def split_groups(latent: torch.Tensor, ranks: tuple[int, ...]) -> torch.Tensor:
    """Split latents `[..., Σ r]` into their groups, `[..., n, max r]`, shorter ones filled with zeros."""
    if len(set(ranks)) == 1:
        return latent.unflatten(-1, (len(ranks), ranks[0]))
    # Ranks that differ are made equal, so that one product serves all groups.
    widest = max(ranks)
    return torch.stack([_widened(group, widest) for group in latent.split(ranks, dim=-1)], dim=-2)


class SVDLinear(nn.Module):
    """A linear layer of rank `Σ r` for the keys or values of `num_heads` heads: `ALinear(BLinear(x))`.

    Args:
        in_features, out_features: C and `H_kv * d`.
        ranks: One rank per head group.
        num_heads: H_kv.
        bias: Whether `ALinear` has a bias.
        static: Whether the cache quantizes the latent by calibrated scales, which are then stored here, in the buffers
            `latent_scale` and `latent_zero_point` `[Σ r]`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ranks: tuple[int, ...],
        num_heads: int,
        bias: bool = False,
        static: bool = False,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.BLinear = BLinear(in_features, ranks)
        self.ALinear = ALinear(ranks, out_features, num_heads, bias)
        #: Applied to the latent on its way from B to A; the simple scheme of `use_kivi=False` rounds it here.
        self.latent_transform = nn.Identity()
        for name in ("latent_scale", "latent_zero_point"):
            self.register_buffer(name, torch.zeros(sum(ranks)) if static else None)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.ALinear(self.latent_transform(self.BLinear(hidden_states)))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        ranks: tuple[int, ...],
        num_heads: int,
        rotate: bool = True,
        tiers: list | None = None,
        factors: list[Factors] | None = None,
        static_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
        **statistics,
    ) -> "SVDLinear":
        """Split a dense layer.

        Args:
            linear, ranks, num_heads: The layer, the rank of each head group, H_kv.
            rotate, tiers: As for `join_factors`.
            factors: Of each head group; default: those that `factor_groups` makes with the `statistics`.
            static_scales: Scale and zero point `[Σ r]` of the latent channels, for a cache with calibrated scales.
        """
        factors = factors or factor_groups(linear.weight.detach(), ranks, **statistics)
        a, b = join_factors(factors, rotate, linear.weight.dtype, tiers)
        static = static_scales is not None
        split = cls(linear.in_features, linear.out_features, ranks, num_heads, linear.bias is not None, static)
        split = split.to(linear.weight)
        with torch.no_grad():
            split.ALinear.weight.copy_(a)
            split.BLinear.weight.copy_(b)
            if linear.bias is not None:
                split.ALinear.bias.copy_(linear.bias)
            if static:
                split.latent_scale.copy_(static_scales[0])
                split.latent_zero_point.copy_(static_scales[1])
        return split

    @torch.no_grad()
    def keep_shard(self, rank: int, size: int, process_group) -> None:
        """Drop what other ranks of tensor parallelism hold: the rows of their heads, and the latents of their groups.

        A joint latent is kept whole by every rank.

        Args:
            rank, size: Of this process and how many; `size` divides the heads, and the groups if there are several.
            process_group: Of the ranks; gradients are summed over it.
        """
        self.BLinear.process_group, self.BLinear.shared = process_group, "input"
        if len(self.ALinear.ranks) == 1:
            self.BLinear.shared = "latents"
        latents = _keep_heads(self, rank, size)
        self.BLinear.weight = _shard(self.BLinear.weight, latents)
        self.BLinear.out_features, self.out_features = sum(self.ALinear.ranks), self.ALinear.weight.shape[0]

    @torch.no_grad()
    def gathered_state(self) -> dict[str, torch.Tensor]:
        """The `state_dict` of the whole layer, after `keep_shard`; every rank must call it."""
        state = dict(self.state_dict())
        for name, tensor in state.items():
            if self.BLinear.shared == "input" or name.startswith("ALinear."):
                state[name] = _gathered(self, name, tensor, self.BLinear.process_group)
        return state

    @torch.no_grad()
    def dense_weight(self) -> torch.Tensor:
        """The product `A·B`, `[out, in]`, multiplied in float32 and returned in the layer's type."""
        return dense_product(self.ALinear.weight, self.BLinear.weight, self.ALinear.ranks)


def _keep_heads(factors: nn.Module, rank: int, size: int) -> slice:
    """Drop from `ALinear`, and from calibrated scales, what other ranks hold; returns the latents that are left."""
    expand = factors.ALinear
    #: Ranks of the head groups of all ranks, and latents that each rank has.
    factors.full_ranks = expand.ranks
    factors.shares = [sum(shard_groups(expand.ranks, i, size)) for i in range(size)]
    latents = slice(None)
    if len(expand.ranks) > 1:
        first = sum(factors.shares[:rank])
        latents = slice(first, first + factors.shares[rank])
    # The rows of this rank's heads, and the columns that its own groups use.
    own, rows = shard_groups(expand.ranks, rank, size), expand.weight.shape[0] // size
    heads = slice(rank * rows, (rank + 1) * rows)
    expand.ranks, expand.num_heads = own, expand.num_heads // size
    expand.weight = _shard(expand.weight, heads, slice(max(own)))
    expand.bias = _shard(expand.bias, heads)
    for name in ("latent_scale", "latent_zero_point"):
        if getattr(factors, name) is not None:
            setattr(factors, name, getattr(factors, name)[latents].clone())
    return latents


def _gathered(factors: nn.Module, name: str, tensor: torch.Tensor, process_group) -> torch.Tensor:
    """The whole of a tensor of factors whose first dimension the ranks have parts of, after `_keep_heads`."""
    counts = factors.shares
    if name.startswith("ALinear."):
        counts = [len(tensor)] * len(counts)
    if name == "ALinear.weight":
        tensor = _widened(tensor, max(factors.full_ranks))
    # Ranks exchange tensors of one shape, so shorter shards are padded.
    padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    shards = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(shards, padded, group=process_group)
    return torch.cat([shard[:n] for shard, n in zip(shards, counts, strict=True)])


def _shard(parameter: nn.Parameter | None, *index: slice) -> nn.Parameter | None:
    """A copy of a slice of a parameter, which leaves the rest to be freed."""
    if parameter is None:
        return None
    return nn.Parameter(parameter[index].clone(memory_format=torch.contiguous_format), parameter.requires_grad)


def dense_product(a: torch.Tensor, b: torch.Tensor, ranks: tuple[int, ...]) -> torch.Tensor:
    """`[out, in]` product of the weights of an `ALinear` and a `BLinear`."""
    # Beyond its own rank a group's columns of A are zeros.
    groups = zip(a.float().chunk(len(ranks)), b.float().split(ranks), ranks, strict=True)
    return torch.cat([ai[:, :r] @ bi for ai, bi, r in groups]).to(a.dtype)


class BlockFactors(NamedTuple):
    """How one head group of the members of a block shares a latent of r channels.

    Attributes:
        a: Of each member `[out_m, r]`: its outputs from the latent.
        project: Of each member `[r, out_m]`: its part of the latent from its outputs.
        mean: Of each member `[out_m]`: mean of its outputs without bias, which the latent leaves out.
    """

    a: list[torch.Tensor]
    project: list[torch.Tensor]
    mean: list[torch.Tensor]


class MemberBLinear(nn.Module):
    """A member's part of the latent of its block, `[..., Σ r]` float32, from its outputs `[..., H_kv * d]`.

    `weight` is `[Σ r, H_kv * d / n]`: the rows of head group i of n act on the outputs of that group. `bias` `[Σ r]` is
    minus what the member's mean and bias would give, so that the parts of all members are to be summed up.
    """

    def __init__(self, ranks: tuple[int, ...], out_features: int):
        super().__init__()
        self.ranks = tuple(ranks)
        self.weight = nn.Parameter(torch.empty(sum(ranks), out_features // len(ranks)))
        self.bias = nn.Parameter(torch.zeros(sum(ranks)))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def extra_repr(self) -> str:
        return f"ranks={list(self.ranks)}, group_outputs={self.weight.shape[1]}"

    def forward(self, outputs: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(outputs.dtype, torch.float32)
        groups = outputs.to(dtype).chunk(len(self.ranks), dim=-1)
        weights, biases = self.weight.to(dtype).split(self.ranks), self.bias.to(dtype).split(self.ranks)
        return torch.cat(list(map(nn.functional.linear, groups, weights, biases)), dim=-1)


class LatentFactors(nn.Module):
    """Factors of one member of a block: `BLinear` to its part of the latent, `ALinear` from the whole latent.

    Args:
        out_features: `H_kv * d` outputs of the member.
        ranks: Rank of each head group; all members of a block have the same.
        num_heads: H_kv.
        static: Whether the cache quantizes the block's latent by calibrated scales, which are then stored here, in
            `latent_scale` and `latent_zero_point` `[Σ r]`: with the block's first member.
    """

    def __init__(self, out_features: int, ranks: tuple[int, ...], num_heads: int, static: bool = False):
        super().__init__()
        self.BLinear = MemberBLinear(ranks, out_features)
        self.ALinear = ALinear(ranks, out_features, num_heads, bias=True)
        self.process_group = None
        for name in ("latent_scale", "latent_zero_point"):
            self.register_buffer(name, torch.zeros(sum(ranks)) if static else None)

    @property
    def is_joint(self) -> bool:
        """Whether the ranks of a process group have parts of one latent, which are to be summed up."""
        return self.process_group is not None and len(self.full_ranks) == 1

    @torch.no_grad()
    def keep_shard(self, rank: int, size: int, process_group) -> None:
        """Drop what other ranks of tensor parallelism hold; arguments as for `SVDLinear.keep_shard`.

        Head groups are dealt out. A latent of all heads is the sum of what the ranks make of their own outputs.
        """
        self.process_group, b = process_group, self.BLinear
        latents = _keep_heads(self, rank, size)
        if self.is_joint:
            outputs = b.weight.shape[1] // size
            b.weight = _shard(b.weight, slice(None), slice(rank * outputs, (rank + 1) * outputs))
            if rank > 0:
                b.bias.zero_()  # counted once
            return
        b.ranks, b.weight, b.bias = self.ALinear.ranks, _shard(b.weight, latents), _shard(b.bias, latents)

    @torch.no_grad()
    def gathered_state(self) -> dict[str, torch.Tensor]:
        """The `state_dict` of the whole factors, after `keep_shard`; every rank must call it."""
        state = dict(self.state_dict())
        for name, tensor in state.items():
            if not self.is_joint or name.startswith("ALinear."):
                state[name] = _gathered(self, name, tensor, self.process_group)
        if self.is_joint:
            columns = [torch.empty_like(self.BLinear.weight) for _ in self.shares]
            dist.all_gather(columns, self.BLinear.weight.contiguous(), group=self.process_group)
            state["BLinear.weight"] = torch.cat(columns, dim=1)
            state["BLinear.bias"] = state["BLinear.bias"].clone()
            dist.all_reduce(state["BLinear.bias"], group=self.process_group)
        return state


def factor_block(weights: list[torch.Tensor], ranks: tuple[int, ...]) -> list[BlockFactors]:
    """Factors of the members of a block by plain SVD, one for each head group.

    The members' weights are stacked as if all had the same input of covariance one. Those of several layers have not;
    but what their hidden states have in common cannot be known from the weights.

    Args:
        weights: Of each member `[out, C]`.
        ranks: Rank of each head group, up to the outputs of all members for the group.
    """
    factors, split = [], [weight.chunk(len(ranks)) for weight in weights]
    for parts, rank in zip(zip(*split), ranks, strict=True):
        rows = list(map(len, parts))
        _, vectors = torch.linalg.eigh(output_covariance(torch.cat(parts)))
        # `eigh` gives the largest eigenvalue last.
        a = vectors.flip(1)[:, :rank]
        largest = a.gather(0, a.abs().argmax(0, keepdim=True))
        a = torch.where(largest < 0, -a, a)
        means = a.new_zeros(len(a)).split(rows)
        factors.append(BlockFactors(list(a.split(rows)), list(a.T.split(rows, dim=1)), list(means)))
    return factors


def member_states(
    factors: list[BlockFactors],
    linears: list[nn.Linear],
    rotate: bool = True,
    tiers: list | None = None,
    static_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> list[dict[str, torch.Tensor]]:
    """The `state_dict` of the `LatentFactors` of each member of a block, in the type of the dense layers.

    Args:
        factors: Of each head group.
        linears: The members' dense layers, or their weights and biases by these names (`DenseLayer`).
        rotate, tiers: As for `join_factors`.
        static_scales: Scale and zero point `[Σ r]` of the latent channels, for a cache with calibrated scales.

    Raises:
        ValueError: A factor does not fit the type of the dense layers.
    """
    dtype, rows, joined, states = linears[0].weight.dtype, list(map(len, factors[0].a)), [], []
    widest = max(len(group.project[0]) for group in factors)
    for i, group in enumerate(factors):
        # One rotation of the latent for all members: of the columns of the stacked A, of the rows of the stacked B.
        a, project = torch.cat(list(group.a)).double(), torch.cat(list(group.project), dim=1).double()
        stacked = Factors(a, project, a.new_empty(0), project, 1.0)
        a, b = join_factors([stacked], rotate, dtype, tiers and [tiers[i]])
        joined.append((_widened(a, widest).split(rows), b.split(rows, dim=1)))
    means = zip(*map(attrgetter("mean"), factors))
    for member, (linear, mean) in enumerate(zip(linears, means, strict=True)):
        centre = torch.cat(list(mean)).double()
        if linear.bias is not None:
            centre = centre + linear.bias.detach().double()
        state = _member_state(joined, member, centre.to(dtype))
        if member == 0 and static_scales is not None:
            state["latent_scale"], state["latent_zero_point"] = static_scales
        states.append(state)
    return states


def _member_state(joined: list[tuple], member: int, centre: torch.Tensor) -> dict[str, torch.Tensor]:
    """State of one member, from (A, B) by member of each head group; `centre` `[out]`: mean and bias of its outputs."""
    weights_a, weights_b, biases = [], [], []
    for (a, b), group_centre in zip(joined, centre.chunk(len(joined)), strict=True):
        weights_a.append(a[member])
        weights_b.append(b[member])
        # Of the weight as it is stored, so that a member at its mean gives a latent of zeros, but for rounding.
        biases.append(-(b[member].double() @ group_centre.double()))
    return {
        "ALinear.weight": torch.cat(weights_a),
        "ALinear.bias": centre,
        "BLinear.weight": torch.cat(weights_b),
        "BLinear.bias": torch.cat(biases).to(centre.dtype),
    }
