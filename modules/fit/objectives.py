"""Objectives of a factorization: the error that the model can see, from the statistics of a text.

An objective says how errors of keys and values are weighted, and on which inputs (`OBJECTIVES`); `probe_rates` measures
what an error of each projection costs.
"""

from collections.abc import Callable

import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from configuration_alrd_llama import SIDES, ALRDLlamaConfig, Block, Projection, check_choice
from modules.cache.fingerprint import weights_at_hand
from modules.fit.distributed import gather, is_main, rounds
from modules.fit.statistics import LayerStatistics, member_samples
from modules.loading import execution_device
from modules.projections import has_rope
from modules.svd_linear import Factors, factor_groups, metric_root, query_key_metric, value_output_metric

#: Version of the rates of `probe_rates` that are kept; part of their key.
RATES_VERSION = 2

#: Smallest eigenvalue of the Fisher information of a member of a block, as a share of the largest.
_FISHER_FLOOR = 1e-7

#: Smallest energy of a latent of a block that is scaled to one, as a share of the largest.
_SMALLEST_ENERGY = 1e-8

#: Offsets between a query and a key over which `rope_key_metric` averages, spread evenly over their logarithms.
_OFFSETS = 256


def rope_key_metric(
    query_covariance: torch.Tensor, num_key_value_heads: int, inv_freq: torch.Tensor, longest: int
) -> torch.Tensor:
    r"""Metric under which the error of a key is the mean squared error of its logits, slow frequencies included.

    `M = E[R_Δ q qᵀ R_Δᵀ]` over offsets Δ from 1 to `longest`, spread evenly over their logarithms; half of
    `query_key_metric` is its limit when every frequency has turned many times.

    Args:
        query_covariance: `[H_q, d, d]`, `E[q qᵀ]` before RoPE.
        num_key_value_heads: Heads that the query heads share.
        inv_freq: `[d/2]`, angle per position.
        longest: Largest offset.

    Returns:
        `[H_kv * d, H_kv * d]` float64, block-diagonal.
    """
    q = query_covariance.double().unflatten(0, (num_key_value_heads, -1)).sum(1)
    half = inv_freq.double().cpu()
    eye = torch.eye(q.shape[-1], dtype=torch.float64, device=q.device)
    total = torch.zeros_like(q)
    float32 = {"dtype": torch.float32, "device": "cpu"}
    last = torch.tensor(longest, **float32).log().item()
    # R_Δ turns the pairs (i, i + d/2); the mean over Δ is taken of its products with the query's second moment.
    for offset in torch.linspace(0, last, _OFFSETS, **float32).exp().round().tolist():
        cos, sin = (offset * half).cos(), (offset * half).sin()
        low, high = eye.chunk(2, dim=-1)
        rotation = torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)
        total += rotation.T @ q @ rotation
    return torch.block_diag(*(total / _OFFSETS))


def _weight_of(linear: torch.nn.Linear) -> torch.Tensor:
    """The weight of a layer on the CPU, offloaded or not."""
    with weights_at_hand(linear):
        return linear.weight.detach().cpu()


def _weight(model: PreTrainedModel, layer_idx: int, stats: LayerStatistics | None) -> dict[str, dict]:
    return {"k_proj": {}, "v_proj": {}}


def _input(model: PreTrainedModel, layer_idx: int, stats: LayerStatistics) -> dict[str, dict]:
    return {"k_proj": {"covariance": stats.k_proj.covariance}, "v_proj": {"covariance": stats.v_proj.covariance}}


def _query_output(model: PreTrainedModel, layer_idx: int, stats: LayerStatistics) -> dict[str, dict]:
    arguments, heads = _input(model, layer_idx, stats), model.config.num_key_value_heads
    o_weight = _weight_of(model.model.layers[layer_idx].self_attn.o_proj)
    arguments["k_proj"]["metric"] = query_key_metric(stats.query_energy, heads)
    arguments["v_proj"]["metric"] = value_output_metric(o_weight, model.config.num_attention_heads, heads)
    return arguments


def _query_output_rope(model: PreTrainedModel, layer_idx: int, stats: LayerStatistics) -> dict[str, dict]:
    arguments, heads = _query_output(model, layer_idx, stats), model.config.num_key_value_heads
    inv_freq, longest = model.model.rotary_emb.inv_freq, min(model.config.max_position_embeddings, 8192)
    if not has_rope(model.model.layers[layer_idx].self_attn):
        inv_freq = torch.zeros_like(inv_freq)
    arguments["k_proj"]["metric"] = rope_key_metric(stats.query_covariance, heads, inv_freq, longest)
    return arguments


def _fisher(model: PreTrainedModel, layer_idx: int, stats: LayerStatistics) -> dict[str, dict]:
    arguments = _input(model, layer_idx, stats)
    for name in arguments:
        fisher = getattr(stats, name).fisher
        if fisher is None:
            raise ValueError("objective='fisher': needs statistics that were collected with fisher=True")
        arguments[name]["metric"] = fisher / 2
    return arguments


#: Objectives by name: functions of the model, a layer's index and its statistics that give, for each projection,
#: keyword arguments of `factor_groups`.
#: - weight: error of the weight (plain SVD);
#: - input: error of keys and values on the text (SVD-LLM, Palu);
#: - query_output: error of the logits, averaged over the angles of RoPE, and of the output of `o_proj`;
#: - query_output_rope: the same with the offsets that occur, in place of all angles;
#: - fisher: KL divergence of the next-token distribution to second order, `½ tr(E[δ δᵀ] E[g gᵀ])`, errors δ of tokens
#:   taken as independent of each other and of the gradients g. It knows what the layers above make of an error.
OBJECTIVES: dict[str, Callable[[PreTrainedModel, int, LayerStatistics], dict[str, dict]]] = {
    "weight": _weight,
    "input": _input,
    "query_output": _query_output,
    "query_output_rope": _query_output_rope,
    "fisher": _fisher,
}


def projection_factors(
    model: PreTrainedModel, config: ALRDLlamaConfig, statistics: list[LayerStatistics] | None, objective: str = "fisher"
) -> dict[str, list[Factors]]:
    """Factors of full rank for every head group of every projection, by its name; channels by falling energy.

    Args:
        model: The dense model.
        config: Head groups, and whether the mean is split off.
        statistics: Of every layer; `None`, with "weight" only: none.
        objective: One of `OBJECTIVES`.

    Raises:
        ValueError: Another objective, or one that needs statistics that are not there.
    """
    check_choice("objective", objective, tuple(OBJECTIVES))
    if statistics is None and objective != "weight":
        raise ValueError(f"objective={objective!r}: needs the statistics of a text")
    if statistics is None and (config.k_mean_split or config.v_mean_split):
        raise ValueError("k_mean_split, v_mean_split: need the statistics of a text")
    factors, ranks = {}, (config.full_group_rank,) * config.num_head_groups
    for layer in range(config.num_hidden_layers):
        arguments = OBJECTIVES[objective](model, layer, statistics[layer] if statistics else None)
        for side in SIDES:
            projection = Projection(layer, side)
            if getattr(config, f"{side}_mean_split"):
                arguments[projection.attribute]["mean"] = getattr(statistics[layer], projection.attribute).mean
            weight = _weight_of(model.get_submodule(projection.name))
            factors[projection.name] = factor_groups(weight, ranks, **arguments[projection.attribute])
    return factors


def block_factors(config: ALRDLlamaConfig, statistics: list[LayerStatistics]) -> dict[str, list[Factors]]:
    r"""Factors of full rank for every head group of every block, by its name; channels by falling energy.

    With `u_m = F_m^{1/2} (y_m - ȳ_m)`, where `F_m` is half of the Fisher information of the member m, an error of u
    counts its square, in nats. The latent's directions are the eigenvectors of the covariance of all members' u: those
    of one layer and of its neighbours are functions of nearly the same hidden state, so that few of them have energy.
    Channels are scaled to variance one, so that none overflows in half precision. DESIGN section 7.

    Args:
        config: Which projections make a block.
        statistics: Of every layer, with the Fisher information.

    Returns:
        `Factors` of the members' outputs side by side, without bias and less their mean: `b` is `project`, and each
        latent has a `unit` of its own.
    """
    factors = {}
    for block in config.blocks():
        groups = []
        for i, sample in enumerate(member_samples(statistics, block, config.num_head_groups)):
            roots, inverses, unit = _member_roots(statistics, block, i, config.group_outputs)
            root, inverse = torch.block_diag(*roots), torch.block_diag(*inverses)
            u = sample.flatten(0, 1).double() @ root
            energy, vectors = torch.linalg.eigh(u.T @ u / len(u))
            energy, vectors = energy.flip(0).clamp(min=0), vectors.flip(1)
            # Signs are fixed by the largest entry of each direction.
            largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
            vectors = torch.where(largest < 0, -vectors, vectors)
            spread = energy.clamp(min=_SMALLEST_ENERGY * energy[0]).sqrt()
            project = (vectors / spread).T @ root
            a = inverse @ (vectors * spread)
            groups.append(Factors(a, project, unit * energy, project, unit * spread.square()))
        factors[block.name] = groups
    return factors


def _member_roots(
    statistics: list[LayerStatistics], block: Block, group: int, outputs: int
) -> tuple[list[torch.Tensor], list[torch.Tensor], float]:
    """Root of half the Fisher information of one head group of each member of a block, and its inverse.

    And the unit of squared errors: one; zero where no error of the head group costs anything.
    """
    roots, inverses, units = [], [], []
    rows = slice(group * outputs, (group + 1) * outputs)
    for projection in block.members():
        metric = getattr(statistics[projection.layer], projection.attribute).fisher[rows, rows] / 2
        root, inverse, unit = metric_root(metric, outputs, metric.device, _FISHER_FLOOR)
        roots.append(root)
        inverses.append(inverse)
        units.append(unit)
    # All members' errors are in one unit; one that costs nothing (a pruned head) gets next to none.
    for i, unit in enumerate(units):
        scale = max(unit, _FISHER_FLOOR * max(units)) or 1.0
        roots[i], inverses[i] = roots[i] * scale**0.5, inverses[i] / scale**0.5
    return roots, inverses, float(max(units) > 0)


@torch.no_grad()
def probe_rates(
    model: PreTrainedModel,
    factors: dict[str, list[Factors]],
    variances: dict[str, list[torch.Tensor]],
    tokens: torch.Tensor,
    level: float = 0.05,
    seed: int = 0,
    sinks: int = 4,
    known: dict[str, float] | None = None,
    on_result: Callable[[dict[str, float]], None] | None = None,
    processes: PartialState | None = None,
) -> dict[str, float]:
    """Cost of a unit of error in each projection: KL divergence of the next-token distribution, measured.

    Noise is added to the latents of one projection at a time, as an optimal quantizer would: the same to every channel,
    but to none more than its variance. The first tokens of a window, which the cache keeps exact, get none.

    Args:
        model: The dense model.
        factors: Of full rank.
        variances: `[r]` of the latents of each head group.
        tokens: `[windows, T]` token ids; the last three quarters of each window are scored.
        level: Noise, as a share of all variance.
        seed: Of the noise.
        sinks: First tokens of a window that get no noise.
        known, on_result: Rates that an interrupted probe has found, and what is called with all that are known, in the
            main process only.
        processes: Of `distributed`, over which the projections are divided; the rates do not depend on them.

    Returns:
        By projection the rate, per unit of `Factors.energy`; zero where nothing varies.
    """
    first, rates, device = tokens.shape[1] // 4, dict(known or {}), execution_device(model)

    def log_probabilities(window: torch.Tensor) -> torch.Tensor:
        logits = model(window[None].to(device), use_cache=False).logits[0, first:]
        return logits.float().log_softmax(-1)

    # The model's own predictions, without noise, are made once for all projections.
    missing = [name for name in factors if name not in rates]
    references = list(map(log_probabilities, tokens)) if missing else []

    def probe(name: str) -> float:
        error, shapes = 0.0, []
        for group, variance in zip(factors[name], variances[name], strict=True):
            deviation = _noise(variance, level)
            error += (group.unit * deviation.square().sum()).item()
            shapes.append((group.a * deviation).T.float())
        # The noise of a projection does not depend on the order in which they are probed.
        generator = torch.Generator().manual_seed(seed)

        def add_noise(module, inputs, output):
            # Noise of the latents, expanded to noise of the outputs.
            parts = []
            for shape in shapes:
                size = (*output.shape[:-1], len(shape))
                parts.append(torch.randn(size, generator=generator, dtype=torch.float32, device="cpu") @ shape)
            noise = torch.cat(parts, dim=-1)
            noise[:, :sinks] = 0
            return output + noise.to(output)

        handle = model.get_submodule(name).register_forward_hook(add_noise)
        try:
            divergence = 0.0
            for window, reference in zip(tokens, references, strict=True):
                divergence += (reference.exp() * (reference - log_probabilities(window))).sum(-1).mean().item()
        finally:
            handle.remove()
        if error <= 0:
            return 0.0
        return max(divergence / len(tokens), 0.0) / error

    for names, _ in rounds(processes, missing):
        for name, rate in gather(processes, [(name, probe(name)) for name in names]):
            rates[name] = rate
            if on_result is not None and is_main(processes):
                on_result(rates)
    return rates


def _noise(variance: torch.Tensor, level: float) -> torch.Tensor:
    """Standard deviation of each channel's share of the noise, all together a share `level` of the variance."""
    return variance.clamp(min=0, max=water_level(variance, level)).sqrt()


def water_level(energy: torch.Tensor, share: float) -> float:
    """Level w at which `Σ min(E, w)` is a share of all energy `[n]`, reverse water-filling (Cover and Thomas)."""
    low, high = 0.0, energy.max().item()
    for _ in range(60):
        middle = (low + high) / 2
        if energy.clamp(max=middle).sum() < share * energy.sum():
            low = middle
        else:
            high = middle
    return high
