r"""Ranks at one width for all channels: by water-filling, and as other projects choose them.

    water-filling every latent direction that is kept removes more energy than any that is dropped
    uniform       every head group keeps the same share
    Fisher        ranks in proportion to the gradients of the loss (Palu, arXiv:2407.21118)
    sensitivity   a threshold on the perplexity after truncating one projection (ASVD, arXiv:2312.05821)

A search measures the dense model once; the ranks for any share then follow by a pure function. All return
`truncation_ranks`: by projection name, `"model.layers.{i}.self_attn.k_proj"`, one rank per head group.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.func import functional_call
from transformers import PreTrainedModel

from configuration_alrd_llama import SIDES, ALRDLlamaConfig
from modules.svd_linear import factor_groups, output_covariance

#: Shares of a projection's rank whose perplexity ASVD's search tries.
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

#: An offer to raise a rank: (worth, projection, head group, rank that it raises, channels).
Offer = tuple[float, str, int, int, int]


def projection_names(config: ALRDLlamaConfig) -> list[str]:
    """Names of all key and value projections, in the order of the layers."""
    return [projection.name for projection in config.projections()]


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: must be above 0 and at most 1")


def _spare_channels(ranks: dict[str, list[int]], total: int, share: float, multiple: int) -> int:
    """Channels that a share of `total` leaves beside the smallest ranks; a `ValueError` if it does not hold these."""
    smallest = sum(map(sum, ranks.values()))
    spare = round(share * total) - smallest
    if spare < 0:
        raise ValueError(f"share={share}: must be at least {smallest / total:.4f}, ranks of {multiple} everywhere")
    return spare


def water_fill(energies: dict[str, list[torch.Tensor]], share: float, multiple: int = 8) -> dict[str, list[int]]:
    """Spend a share of all latent channels where they remove the most energy.

    Energies are taken relative to the total of their projection, and channels are bought `multiple` at a time, the
    best first, over all layers, sides and groups (reverse water-filling: in the end every group drops directions of
    about the same energy).

    Args:
        energies: Descending energies of each head group, by projection.
        share: Share of the full rank to keep, in (0, 1].
        multiple: Ranks are multiples of this, except that no rank exceeds the full one.

    Returns:
        One rank per head group, by projection, each at least `multiple`; their sum is within `multiple` of the share.

    Raises:
        ValueError: A share out of range, or too small for the smallest ranks.
    """
    _check_share(share)
    ranks, offers, channels = {}, [], 0
    for name, groups in energies.items():
        # A projection without any energy has nothing to divide by.
        total = sum(energy.sum() for energy in groups).item() or 1.0
        ranks[name] = []
        for group, energy in enumerate(groups):
            channels += len(energy)
            ranks[name].append(min(multiple, len(energy)))
            # Everything beyond the smallest rank is on offer, a few channels at a time.
            for start in range(multiple, len(energy), multiple):
                piece = energy[start : start + multiple]
                offers.append((piece.mean().item() / total, name, group, start, len(piece)))
    return _buy(offers, ranks, _spare_channels(ranks, channels, share, multiple))


def _buy(offers: list[Offer], ranks: dict[str, list[int]], budget: int) -> dict[str, list[int]]:
    """Raise the ranks by the best offers that fit the budget of channels; returns the ranks.

    Args:
        offers: Within a head group the worth falls as the rank rises.
        ranks: Where to start from.
        budget: Channels.
    """
    for _, name, group, start, channels in sorted(offers, key=lambda offer: -offer[0]):
        # The last piece of a group may be smaller than one before it that did not fit.
        if channels <= budget and ranks[name][group] == start:
            ranks[name][group] += channels
            budget -= channels
    return ranks


def uniform_ranks(config: ALRDLlamaConfig, share: float, multiple: int = 8) -> dict[str, list[int]]:
    """The same rank everywhere, up to one `multiple`; arguments and errors as `proportional_ranks`."""
    weights = dict.fromkeys(projection_names(config), [1.0] * config.num_head_groups)
    return proportional_ranks(weights, config.full_group_rank, share, multiple)


def proportional_ranks(
    weights: dict[str, list[float]], full: int, share: float, multiple: int = 8
) -> dict[str, list[int]]:
    """Spend a share of all channels in proportion to weights.

    Every rank is its weight times one common factor, rounded to units of `multiple` and clamped to between one unit and
    the full rank; the factor is the one at which the total meets the share (Webster's apportionment: the k-th unit goes
    by weight / (k - 1/2)).

    Args:
        weights: One positive weight per head group, by projection.
        full: Full rank of a head group.
        share: Share of all channels to keep, in (0, 1].
        multiple: Ranks are multiples of this, except that none exceeds the full one.

    Returns:
        One rank per head group, by projection; their sum is within `multiple` of the share.

    Raises:
        ValueError: A share out of range or too small for the smallest ranks, or a weight that is not finite.
    """
    _check_share(share)
    ranks, offers = {}, []
    for name, groups in weights.items():
        ranks[name] = [min(multiple, full)] * len(groups)
        for group, weight in enumerate(groups):
            if not 0 <= weight < math.inf:
                raise ValueError("weights: must be finite and at least 0")
            for start in range(multiple, full, multiple):
                # Webster: the k-th unit goes by weight / (k - 1/2), and k - 1 units are there.
                worth = weight / (start / multiple + 0.5)
                offers.append((worth, name, group, start, min(multiple, full - start)))
    channels = full * sum(map(len, weights.values()))
    return _buy(offers, ranks, _spare_channels(ranks, channels, share, multiple))


def fisher_information(
    model: PreTrainedModel, batches: Iterable[torch.Tensor], config: ALRDLlamaConfig
) -> dict[str, list[float]]:
    """Palu's measure of each head group of the key and value projections.

    Root of the mean square, over texts, of the gradient of the language modelling loss, averaged over the group's part
    of the weight: `mean_ij sqrt(E_text (∂L/∂W_ij)²)`. The paper speaks of squared gradients, the published code takes
    their root; this follows the code.

    Args:
        model: The dense model; neither its gradients nor its `requires_grad` change.
        batches: `[B, T]` token ids without pads; each row is a text of its own.
        config: Cuts the heads into groups.

    Returns:
        One number per head group, by projection.

    Raises:
        ValueError: There is no text.
    """
    squares, texts = dict.fromkeys(projection_names(config), 0.0), 0
    for batch in batches:
        for text in batch.to(model.device).split(1):
            for name, gradient in _weight_gradients(model, text, list(squares)).items():
                squares[name] = squares[name] + gradient.double().square()
            texts += 1
    # Without a text the mean would be 0 / 0.
    if texts == 0:
        raise ValueError("batches: must hold at least one text")
    information = {}
    for name, square in squares.items():
        groups = (square / texts).sqrt().chunk(config.num_head_groups)
        information[name] = [group.mean().item() for group in groups]
    return information


def _weight_gradients(model: PreTrainedModel, text: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
    """Gradients of the language modelling loss of a text `[1, T]` by the weights of some projections."""
    weights = {}
    for name in names:
        # A detached weight stands in for the model's own, whose `requires_grad` stays as it is.
        weights[f"{name}.weight"] = model.get_parameter(f"{name}.weight").detach().requires_grad_()
    with torch.enable_grad():
        inputs = {"input_ids": text, "labels": text, "use_cache": False}
        loss = functional_call(model, weights, kwargs=inputs).loss
        return dict(zip(names, torch.autograd.grad(loss, list(weights.values()))))


def fisher_ranks(
    information: dict[str, list[float]], config: ALRDLlamaConfig, share: float, multiple: int = 8
) -> dict[str, list[int]]:
    """Ranks in proportion to `fisher_information`; the other arguments and errors as `proportional_ranks`."""
    return proportional_ranks(information, config.full_group_rank, share, multiple)


@torch.no_grad()
def mean_absolute_inputs(model: PreTrainedModel, batches: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """`[C]` float64 mean of `|x|` over a text (`[B, T]` batches of ids), per layer, x being what keys are made from."""
    layers = model.model.layers
    sums = torch.zeros(len(layers), model.config.hidden_size, dtype=torch.float64, device="cpu")
    tokens, handles = 0, []
    for layer, total in zip(layers, sums):

        def observe(module, inputs, total=total):
            total += inputs[0].flatten(0, 1).abs().double().sum(0).cpu()

        handles.append(layer.self_attn.k_proj.register_forward_pre_hook(observe))
    try:
        for batch in batches:
            model.model(batch.to(model.device), use_cache=False)
            tokens += batch.numel()
    finally:
        for handle in handles:
            handle.remove()
    if tokens == 0:
        raise ValueError("batches: must hold at least one token")
    return list(sums / tokens)


def asvd_statistics(model: PreTrainedModel, inputs: list[torch.Tensor], alpha: float = 0.5) -> list[dict[str, dict]]:
    """ASVD's activation-aware scaling as the statistics that `factor_groups` takes.

    ASVD scales the columns of the weight by `s_j = mean|x_j|^alpha`, truncates the SVD of `W S` and divides `S` out
    again: `U_r U_rᵀ (W S) S⁻¹ = U_r U_rᵀ W`, with `U_r` the leading left singular vectors of `W S`. Those are the
    leading eigenvectors of `W S² Wᵀ`, which is what `factor_weight` projects on for that covariance: the product of the
    factors is the same. (But for the latter's ridge, which adds 1e-7 of its trace. The latents differ by an invertible
    map, which nothing sees unless they are quantized: ASVD splits the singular values evenly.)

    Args:
        model: The dense model.
        inputs: `mean_absolute_inputs`.
        alpha: Exponent; the paper's 0.5.

    Returns:
        By layer and projection, `{"covariance": [n, n]}`.
    """
    result = []
    for layer, x in zip(model.model.layers, inputs, strict=True):
        # A channel that is never active must not make the scaling singular.
        squares = torch.diag((x.double() ** alpha + 1e-6) ** 2)
        result.append({})
        for side in SIDES:
            weight = getattr(layer.self_attn, f"{side}_proj").weight.detach().cpu()
            result[-1][f"{side}_proj"] = {"covariance": output_covariance(weight, squares)}
    return result


@contextmanager
def replaced_weight(linear: torch.nn.Linear, weight: torch.Tensor) -> Iterator[None]:
    """Put `weight` in place of the layer's for a while; the very tensor that was there comes back, whatever happens."""
    # `data`, so that the parameter itself and its hooks stay.
    saved = linear.weight.data
    linear.weight.data = weight.to(saved)
    try:
        yield
    finally:
        linear.weight.data = saved


@torch.no_grad()
def perplexity(model: PreTrainedModel, batches: list[torch.Tensor]) -> float:
    """Perplexity of a text, `[B, T]` batches of token ids, in plain forward passes."""
    nll, tokens = 0.0, 0
    for batch in batches:
        ids = batch.to(model.device)
        # The loss is a mean over all tokens but the first of each row.
        scored = ids[:, 1:].numel()
        nll += model(ids, labels=ids, use_cache=False).loss.double().item() * scored
        tokens += scored
    return math.exp(nll / tokens)


@torch.no_grad()
def asvd_sensitivity(
    model: PreTrainedModel,
    batches: list[torch.Tensor],
    config: ALRDLlamaConfig,
    statistics: list[dict[str, dict]],
    ratios: tuple[float, ...] = RATIOS,
    multiple: int = 8,
) -> dict[str, dict[int, float]]:
    """Perplexity of the model when one projection alone is truncated, for every projection and ratio.

    Args:
        model: The dense model; every weight is as it was afterwards, to the bit.
        batches: `[B, T]` token ids to measure on.
        config: Cuts the heads into groups, each of which gets the same rank.
        statistics: For `factor_groups`, by layer and projection: `asvd_statistics`, or any other.
        ratios: Shares of the full rank to try.
        multiple: Ranks are multiples of this, at least one of them, at most the full rank.

    Returns:
        By projection, the perplexity for each rank of a head group.
    """
    full, groups = config.full_group_rank, config.num_head_groups
    ranks = sorted({min(full, max(1, round(ratio * full / multiple)) * multiple) for ratio in ratios})
    sensitivity = {}
    for projection in config.projections():
        linear = model.get_submodule(projection.name)
        how = statistics[projection.layer][projection.attribute]
        factors = factor_groups(linear.weight.detach().cpu(), (full,) * groups, **how)
        perplexities = sensitivity[projection.name] = {}
        for rank in ranks:
            # The leading channels are the factors of a smaller rank.
            truncated = torch.cat([f.a[:, :rank] @ f.b[:rank] for f in factors])
            with replaced_weight(linear, truncated):
                perplexities[rank] = perplexity(model, batches)
    return sensitivity


def asvd_ranks(sensitivity: dict[str, dict[int, float]], config: ALRDLlamaConfig, share: float) -> dict[str, list[int]]:
    """ASVD's search: every projection takes the lowest rank whose perplexity is at most a common threshold.

    The threshold is found by binary search over the sorted perplexities: the lowest one at which the ranks are no more
    than the share. A projection all of whose ranks cost more stays at the full rank.

    Args:
        sensitivity: Perplexities of `asvd_sensitivity`.
        config: Cuts the heads into groups.
        share: Share of all channels to keep, in (0, 1].

    Returns:
        One rank per head group, by projection. They sum up to the share or less: the ranks tried are coarse.

    Raises:
        ValueError: A share out of range, or smaller than the lowest ranks tried.
    """
    _check_share(share)
    full = config.full_group_rank

    def ranks_at(threshold: float) -> dict[str, int]:
        ranks = {}
        for name, perplexities in sensitivity.items():
            # The lowest rank that is good enough, or all channels.
            good = [rank for rank, value in perplexities.items() if value <= threshold]
            ranks[name] = min(good, default=full)
        return ranks

    thresholds = {0.0}
    for perplexities in sensitivity.values():
        thresholds.update(perplexities.values())
    thresholds = sorted(thresholds)
    budget = share * full * len(sensitivity)
    if sum(ranks_at(thresholds[-1]).values()) > budget:
        raise ValueError(f"share={share}: must be at least the lowest rank tried in every projection")
    # A higher threshold admits lower ranks, so the lowest that fits is found by halving.
    low, high = 0, len(thresholds) - 1
    while low < high:
        middle = (low + high) // 2
        if sum(ranks_at(thresholds[middle]).values()) <= budget:
            high = middle
        else:
            low = middle + 1
    return {name: [rank] * config.num_head_groups for name, rank in ranks_at(thresholds[low]).items()}
