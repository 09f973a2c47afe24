"""Statistics of a dense model on text, and the choice of ranks from them."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from configuration_alrd_llama import ALRDLlamaConfig
from modules.svd_linear import factor_groups, query_key_metric, value_output_metric


@dataclass
class LayerStatistics:
    """Moments of one attention layer over a text.

    Attributes:
        input_covariance: `[C, C]` float64, `E[x xᵀ]` of the normalised hidden states.
        query_energy: `[H_q, d/2]` float64, `E|q_f|²` of each head and frequency.
    """

    input_covariance: torch.Tensor
    query_energy: torch.Tensor


@torch.no_grad()
def collect_statistics(model: PreTrainedModel, batches) -> list[LayerStatistics]:
    """Run a dense Llama, Mistral or Qwen2 over text in one pass, accumulating in float64.

    Args:
        model: The dense model.
        batches: Iterable of `[B, T]` token ids without pads.

    Returns:
        One `LayerStatistics` per layer.

    Raises:
        ValueError: There is no token.
    """
    config, handles, tokens = model.config, [], 0
    size, half = config.hidden_size, model.model.layers[0].self_attn.head_dim // 2
    sums = [
        LayerStatistics(torch.zeros(size, size).double(), torch.zeros(config.num_attention_heads, half).double())
        for _ in model.model.layers
    ]

    def observer(total: LayerStatistics):
        def observe(module, inputs, queries):
            x = inputs[0].flatten(0, 1).double().cpu()
            q = queries.flatten(0, 1).double().cpu().unflatten(-1, (-1, 2, half))
            total.input_covariance += x.T @ x
            total.query_energy += q.square().sum(dim=(0, 2))

        return observe

    for layer, total in zip(model.model.layers, sums, strict=True):
        handles.append(layer.self_attn.q_proj.register_forward_hook(observer(total)))
    try:
        for batch in batches:
            model.model(batch.to(model.device), use_cache=False)
            tokens += batch.numel()
    finally:
        for handle in handles:
            handle.remove()
    if tokens == 0:
        raise ValueError("batches: must hold at least one token")
    return [LayerStatistics(s.input_covariance / tokens, s.query_energy / tokens) for s in sums]


def projection_statistics(model: PreTrainedModel, statistics: list[LayerStatistics]) -> list[dict[str, dict]]:
    """What `factor_groups` takes for each projection: keys weighted by queries, values by the output projection."""
    config = model.config
    heads = (config.num_attention_heads, config.num_key_value_heads)
    result = []
    for layer, stats in zip(model.model.layers, statistics, strict=True):
        metrics = {
            "k_proj": query_key_metric(stats.query_energy, config.num_key_value_heads),
            "v_proj": value_output_metric(layer.self_attn.o_proj.weight.detach().cpu(), *heads),
        }
        result.append({p: {"input_covariance": stats.input_covariance, "metric": m} for p, m in metrics.items()})
    return result


def group_energies(
    model: PreTrainedModel, config: ALRDLlamaConfig, statistics: list[dict[str, dict]] | None = None
) -> dict[str, list[torch.Tensor]]:
    """Energy that each latent direction removes, descending, for every head group of every projection by its name."""
    energies = {}
    ranks = (config.full_group_rank,) * config.num_head_groups
    for i, layer in enumerate(model.model.layers):
        for projection in ("k_proj", "v_proj"):
            weight = getattr(layer.self_attn, projection).weight.detach().cpu()
            how = statistics[i][projection] if statistics else {}
            factors = factor_groups(weight, ranks, **how)
            energies[f"model.layers.{i}.self_attn.{projection}"] = [f.energy[: config.full_group_rank] for f in factors]
    return energies


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
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: must be above 0 and at most 1")
    full = sum(len(e) for groups in energies.values() for e in groups)
    ranks = {name: [min(multiple, len(e)) for e in groups] for name, groups in energies.items()}
    smallest = sum(map(sum, ranks.values()))
    budget = round(share * full) - smallest
    if budget < 0:
        raise ValueError(f"share={share}: must be at least {smallest / full:.4f}, ranks of {multiple} everywhere")

    offers = []
    for name, groups in energies.items():
        total = sum(e.sum() for e in groups).item() or 1.0
        for group, energy in enumerate(groups):
            for start in range(multiple, len(energy), multiple):
                piece = energy[start : start + multiple]
                offers.append((piece.mean().item() / total, name, group, len(piece)))
    # Within a group the energies fall, so the best offers are always a group's next ones.
    for _, name, group, channels in sorted(offers, key=lambda offer: -offer[0]):
        if channels <= budget:
            ranks[name][group] += channels
            budget -= channels
    return ranks
