"""From a dense model, a text and a budget to the ranks and widths of a split model, and to that model.

    tokens = tokenizer(text, return_tensors="pt").input_ids[:, : 32 * 1024].view(32, 1024)
    config, source = FitConfig(), ALRDLlamaConfig.from_llama(dense.config)
    calibration = calibrate(config, dense, source, tokens)
    model = fit_budget(config, calibration, 0.0625).split()

`scripts/calibrate_svd_ranks.py` is the command. All measurements of the model are kept in a folder, and
another budget starts from there.
"""

import json
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from configuration_alrd_llama import (
    CODES,
    SIDES,
    ALRDLlamaConfig,
    Block,
    QuantScheme,
    check_choice,
    check_positive,
    parse_json,
    side_scheme,
)
from modeling_alrd_llama import ALRDLlamaForCausalLM
from modules.files import write_json
from modules.fit.allocation import (
    COSTS_VERSION,
    TIER_BITS,
    BudgetPlan,
    ChannelCosts,
    allocate,
    largest_share,
    load_costs,
    measure_costs,
    refit_scales,
    save_costs,
    settings_side,
    tier_prices,
)
from modules.fit.distributed import is_main, on_main
from modules.fit.expansion import expansion_gains, predicted_divergence, restored_latents
from modules.fit.objectives import (
    OBJECTIVES,
    RATES_VERSION,
    block_factors,
    probe_rates,
    projection_factors,
)
from modules.fit.rank_search import (
    asvd_ranks,
    asvd_sensitivity,
    fisher_information,
    fisher_ranks,
    uniform_ranks,
    water_fill,
)
from modules.fit.statistics import LayerStatistics, collect_statistics, member_samples, record_key, statistics_record
from modules.kivi_cache import CacheScheme, config_schemes, config_sink_channels, config_widths
from modules.svd_linear import BlockFactors, Factors

#: How channels are chosen for a budget: widths by channel; or one width for all and ranks by a search of
#: `rank_search`, "fisher" being Palu's and "sensitivity" ASVD's.
ALLOCATIONS = ("tiers", "water_filling", "uniform", "fisher", "sensitivity")

#: Tokens on which the error of calibrated scales is measured, at least.
_COST_TOKENS = 4096

#: Tokens of a block that tiers of calibrated scales choose from.
BLOCK_LENGTHS = (32, 64, 128)

#: Layers that share a latent where none are asked for, at most: the best measured on SmolLM2 (LOG.md).
MOST_LAYERS = 3

#: Budget from which on one layer to a latent is as good as several, and faster (RESULTS.md, the surface of SmolLM2).
AMPLE_BUDGET = 0.2

#: Sampled tokens that each output of a latent should have, for the covariance by which its directions are chosen.
TOKENS_PER_OUTPUT = 10

#: Static scales leave nothing to store per block; measured best at small budgets (LOG.md).
STATIC = '{"orientation": "per_channel", "static": true}'


def _option(default: Any, help: str, **how: Any) -> Any:
    """A field of a configuration whose help the command prints; `how` the command line reads it."""
    return field(default=default, metadata={"help": help, **how})


#: A switch that may be left open: alone on the command line it is on.
_SWITCH = {"nargs": "?", "const": True}


@dataclass
class FitConfig:
    """Settings of a fit: the budget's cache, the choice of ranks and widths, the error that is minimised."""

    tokens: int = _option(4096, "Tokens in the cache that the budget is for.")
    share: float | None = _option(None, "Without a budget: share of the latent channels to keep, at one width.")
    allocation: str = _option("tiers", f"How ranks and widths are chosen for a budget: {', '.join(ALLOCATIONS)}.")
    objective: str = _option("fisher", f"Error that is minimised: {', '.join(OBJECTIVES)}.")
    head_group_size: int | None = _option(
        None, "Key/value heads that share a latent; all of them (joint) if not given."
    )
    keep_dense: bool | None = _option(
        None,
        "Keep the dense projections, and make latents of their outputs, by blocks. None: for a budget, unless other "
        "options are for single projections.",
        **_SWITCH,
    )
    layer_group_size: int | None = _option(
        None,
        f"Layers that share a latent (with keep_dense). None: up to {MOST_LAYERS} of one sliding window while the text "
        f"has {TOKENS_PER_OUTPUT} sampled tokens for each output of a latent; by the command 1 where no budget is "
        f"below {AMPLE_BUDGET:g}.",
    )
    joint_kv: bool | None = _option(None, "Keys and values share a latent. None: with keep_dense.", **_SWITCH)
    max_rebuild: int | None = _option(
        None,
        "With keep_dense: most multiply-adds per cached token and layer to rebuild keys and to sum values; none if not "
        "given.",
    )
    k_mean_split: bool = _option(False, "Keep the mean of the keys in a channel of its own.")
    v_mean_split: bool = _option(False, "The same for values.")
    batch_size: int = _option(4, "Windows at a time, in each process.")
    seed: int = _option(0, "Random seed for Fisher sampling and noise.")
    statistics: str = _option("build/statistics", "Folder where statistics are kept.")
    rank_multiple: int = _option(8, "Without tiers: ranks are multiples of this.")
    k_bits: float = _option(2, "Without tiers: width of cached keys, 1 … 16.")
    v_bits: float = _option(2, "Without tiers: width of cached values.")
    group_size: int | None = _option(
        None, "Elements per scale, or tokens per block; with tiers the best of 32, 64, 128."
    )
    residual_length: int | None = _option(None, "Newest tokens kept in full precision; 16 with tiers, else 32.")
    sink_length: int = _option(4, "First tokens kept in full precision.")
    token_scale: bool | None = _option(
        None,
        "With tiers: a scale for each token beside the calibrated ones (static sides). None: with keep_dense.",
        **_SWITCH,
    )
    code: str = _option(
        "uniform",
        "With tiers: what codes of static sides mean. uniform: levels of their channels; trellis: points, by the codes "
        "of the channels before too (less error, more work).",
    )
    k_scheme: str | None = _option(
        None, f"Other fields of QuantScheme for keys, as JSON; with tiers {STATIC} by default."
    )
    v_scheme: str | None = _option(None, "The same for values.")

    def __post_init__(self):
        check_choice("allocation", self.allocation, ALLOCATIONS)
        check_choice("objective", self.objective, tuple(OBJECTIVES))
        check_choice("code", self.code, CODES)
        for name in ("tokens", "batch_size", "rank_multiple"):
            check_positive(name, getattr(self, name))
        if self.keep_dense is None:
            single = self.k_mean_split or self.v_mean_split or self.k_scheme or self.v_scheme
            self.keep_dense = self.tiered and self.objective == "fisher" and not single
        if self.joint_kv is None:
            self.joint_kv = self.keep_dense
        if self.keep_dense and not (self.tiered and self.objective == "fisher"):
            raise ValueError("keep_dense=True: must go with allocation='tiers', objective='fisher' and no share")
        if self.token_scale is None:
            self.token_scale = self.keep_dense
        if self.token_scale and not self.tiered:
            raise ValueError("token_scale=True: must go with allocation='tiers', which calibrates the scales")
        if self.code != "uniform" and not self.tiered:
            raise ValueError(f"code={self.code!r}: must go with allocation='tiers', which calibrates the scales")
        if self.max_rebuild is not None:
            check_positive("max_rebuild", self.max_rebuild)
            if not self.keep_dense:
                raise ValueError(f"max_rebuild={self.max_rebuild}: must go with keep_dense=True")

    @property
    def tiered(self) -> bool:
        """Whether each channel gets a width of its own."""
        return self.share is None and self.allocation == "tiers"

    @property
    def needs_text(self) -> bool:
        """Whether statistics of a text are needed."""
        return self.objective != "weight" or self.share is None or self.k_mean_split or self.v_mean_split


@dataclass
class Calibration:
    """A dense model, the measurements of it, and the configuration of its split form."""

    dense: PreTrainedModel
    stored_dtype: torch.dtype
    tokens: torch.Tensor | None
    statistics: list[LayerStatistics] | None
    record: dict
    factors: dict[str, list[Factors]]
    target: ALRDLlamaConfig
    costs: dict[Path, dict[str, list[ChannelCosts]]] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    search: Callable[[float], dict[str, list[int]]] | None = None
    plan: BudgetPlan | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    processes: PartialState | None = None
    #: What a script writes beside the split model: its tokenizer, and what identifies the text.
    tokenizer: PreTrainedTokenizerBase | None = None
    text: dict = field(default_factory=dict)
    #: The bound on a decode step, and what was timed for it.
    decode: dict = field(default_factory=dict)

    def split(self, **fields) -> ALRDLlamaForCausalLM:
        """The split model, on the CPU in the type of the dense checkpoint, with other `fields` of its configuration."""
        target = ALRDLlamaConfig.from_llama(self.target, **fields)
        splits: list[dict[str, dict]] = [{} for _ in range(target.num_hidden_layers)]
        for part in target.parts():
            # `from_dense` takes the factors by layer and name of the projection, or at the first layer of the block.
            split = self._split(part.name, target.group_ranks(part))
            if isinstance(part, Block):
                split["factors"] = self._block_factors(part, split["factors"])
            splits[part.members()[0].layer][part.attribute] = split
        return ALRDLlamaForCausalLM.from_dense(self.dense, target, splits, self.stored_dtype, "cpu")

    def _split(self, name: str, ranks: tuple[int, ...]) -> dict:
        """Factors of the channels that a projection keeps, and their calibrated scales."""
        if self.plan is None:
            # A search of ranks keeps the leading channels.
            chosen = [torch.arange(rank, dtype=torch.int64, device="cpu") for rank in ranks]
        else:
            chosen = self.plan.channels[name]
        factors = list(map(Factors.select, self.factors[name], chosen))
        if self.plan is not None and self.plan.gains:
            for i, gains in enumerate(self.plan.gains[name]):
                factors[i] = factors[i]._replace(a=factors[i].a * gains)
        split: dict = {"factors": factors}
        if self.plan is not None and self.plan.scales[name]:
            split["static_scales"] = tuple(map(torch.cat, zip(*self.plan.scales[name])))
        return split

    def _block_factors(self, block: Block, groups: list[Factors]) -> list[BlockFactors]:
        """Factors of the members' outputs side by side, member by member."""
        found, means = [], []
        for projection in block.members():
            mean = getattr(self.statistics[projection.layer], projection.attribute).mean
            means.append(mean.chunk(len(groups)))
        for group, group_means in zip(groups, zip(*means, strict=True), strict=True):
            outputs = len(group_means[0])
            parts = group.a.split(outputs), group.project.split(outputs, dim=1)
            found.append(BlockFactors(*parts, list(group_means)))
        return found


def calibrate(
    config: FitConfig,
    dense: PreTrainedModel,
    source: ALRDLlamaConfig,
    tokens: torch.Tensor | None = None,
    probe_tokens: torch.Tensor | None = None,
    about: dict | None = None,
    processes: PartialState | None = None,
) -> Calibration:
    """Collect the statistics and make the factors; with a share, choose the ranks too.

    Args:
        config: Settings; `config.statistics` names the folder that keeps what is measured.
        dense: The dense model, on any device; accelerate may have offloaded some of it.
        source: Its configuration. Its `dtype` is that of the split model, whatever type `dense` runs in.
        tokens: `[windows, T]` token ids of the text, without pads; `None` if not `config.needs_text`.
        probe_tokens: `[windows, T]` token ids on which is measured what an error costs in each layer, for widths by
            channel; `None`: all errors cost the same.
        about: What a reader of the statistics' record may want to know: names of model and text, commit.
        processes: Of `distributed`, over which the work is divided.

    Raises:
        ValueError: As `split_config`; the text is missing, or its windows are too short.
    """
    if config.keep_dense and probe_tokens is not None:
        raise ValueError("probe_tokens: must be None with keep_dense=True, whose errors have one unit in all layers")
    if config.needs_text and tokens is None:
        raise ValueError("tokens=None: must be given, for the statistics of a text")
    sample = 0 if tokens is None else _sampled_tokens(config, tokens.shape[-1])
    target = split_config(config, source, 0 if tokens is None else sample * len(tokens))
    block_length = CacheScheme.from_config(target).block_length
    if config.tiered and tokens is not None and block_length > sample:
        raise ValueError(
            f"group_size={block_length}: must be at most {sample}, the consecutive tokens that are sampled"
        )
    statistics, record, seconds, started = None, {}, {}, time.perf_counter()
    # The settings on which the statistics depend are part of their file's key.
    if config.needs_text:
        settings = {
            "fisher": config.objective == "fisher",
            "sample": sample,
            "sinks": config.sink_length,
            "batch_size": config.batch_size,
            "seed": config.seed,
        }
        record = statistics_record(dense, tokens, **settings)
        where = {"folder": config.statistics, "about": about, "processes": processes}
        statistics = collect_statistics(dense, tokens, **settings, **where)
    seconds["statistics"], started = time.perf_counter() - started, time.perf_counter()
    if config.keep_dense:
        factors = block_factors(target, statistics)
    else:
        factors = projection_factors(dense, target, statistics, config.objective)
    seconds["factors"] = time.perf_counter() - started
    # The split model has the type of the checkpoint, whatever type `dense` runs in.
    stored_dtype = source.dtype or torch.float32
    calibration = Calibration(dense, stored_dtype, tokens, statistics, record, factors, target)
    calibration.seconds, calibration.processes = seconds, processes
    if config.share is not None:
        target.truncation_ranks = water_fill(_energies(factors), config.share, config.rank_multiple)
    elif config.tiered and probe_tokens is not None:
        calibration.rates = _probe(config, calibration, probe_tokens)
    return calibration


def regroup(calibration: Calibration, layers: int) -> Calibration:
    """The calibration, with `keep_dense`, of blocks of another number of layers, from the same statistics."""
    target = ALRDLlamaConfig.from_llama(calibration.target, layer_group_size=layers)
    return replace(calibration, target=target, factors=block_factors(target, calibration.statistics))


def _sampled_tokens(config: FitConfig, length: int) -> int:
    """Consecutive tokens of a window of `length` that are sampled: whole blocks of 128, at most two.

    The covariance of a block of projections comes from the sample: it is twice as long.
    """
    most = 512 if config.keep_dense else 256
    sample = max(0, min(most, (length - config.sink_length) // 128 * 128))
    if config.tiered and sample == 0:
        raise ValueError(f"length={length}: windows must hold the sinks and 128 tokens to sample")
    return sample


def _layers_of_block(config: FitConfig, source: ALRDLlamaConfig, sampled: int) -> int:
    """Layers that share a latent: those asked for, or as many of one window as `sampled` tokens suffice for."""
    if config.layer_group_size is not None or not config.keep_dense:
        return config.layer_group_size or 1
    heads = config.head_group_size or source.num_key_value_heads
    outputs = heads * source.head_dim * (2 if config.joint_kv else 1)
    layers = max(1, min(MOST_LAYERS, source.num_hidden_layers, sampled // (TOKENS_PER_OUTPUT * outputs)))
    # Layers of different sliding windows share none.
    while any(len(set(windows)) > 1 for windows in source.group_windows(layers)):
        layers -= 1
    return layers


def _energies(factors: dict[str, list[Factors]]) -> dict[str, list[torch.Tensor]]:
    """Energies of the factors' channels, by projection and head group."""
    energies = {}
    for name, groups in factors.items():
        energies[name] = [group.energy[: group.a.shape[1]] for group in groups]
    return energies


def split_config(config: FitConfig, source: ALRDLlamaConfig, sampled: int = 0) -> ALRDLlamaConfig:
    """The configuration of the split model that `source`, that of a dense one, becomes; without ranks and widths.

    Args:
        config, source: As for `calibrate`.
        sampled: Tokens of the text that are sampled.

    Raises:
        ValueError: `source` is split already, or a setting is out of range or does not go with the others.
    """
    if source.truncation_ranks:
        raise ValueError("source: must be the configuration of a dense model, is split already")
    if source.traits.of_outputs and not config.keep_dense:
        raise ValueError(
            f"keep_dense=False: must be True for a {source.dense_model_type!r}, whose keys are not a product of one "
            "weight: latents are made of outputs"
        )
    # A setting that is not given is the best measured one for tiers, or the cache's default.
    default = STATIC if config.tiered else None
    schemes = {}
    for side in SIDES:
        name = f"{side}_scheme"
        schemes[name] = parse_json(name, getattr(config, name) or default)
    if config.joint_kv and not config.v_scheme:
        del schemes["v_scheme"]  # keys and values together are stored as keys
    if config.token_scale:
        schemes = {name: {**(scheme or {}), "token_scale": True} for name, scheme in schemes.items()}
    if config.code != "uniform":
        schemes = {name: {**(scheme or {}), "code": config.code} for name, scheme in schemes.items()}
    if not config.token_scale and any((scheme or {}).get("token_scale") for scheme in schemes.values()):
        raise ValueError("k_scheme, v_scheme: token_scale=True must be given as token_scale=True of the fit, for both")
    names = ["k_bits", "v_bits", "sink_length", "head_group_size", "k_mean_split", "v_mean_split"]
    names += ["keep_dense", "joint_kv"]
    fields = {name: getattr(config, name) for name in names}
    fields["layer_group_size"] = _layers_of_block(config, source, sampled)
    fields["group_size"] = 128 if config.group_size is None else config.group_size
    fields["residual_length"] = config.residual_length
    if config.residual_length is None:
        fields["residual_length"] = 16 if config.tiered else 32
    if config.tiered:
        # A width by channel leaves nothing for a rotation to even out, but where a token's channels share a scale.
        for name in schemes:
            side = name[0]
            scheme = side_scheme(side, fields[f"{side}_bits"], fields["group_size"], schemes[name])
            fields[f"{side}_hadamard"] = not scheme.per_channel
    target = ALRDLlamaConfig.from_llama(source, **fields, **schemes)
    for side, scheme in _side_schemes(target).items():
        if scheme.static and not config.tiered:
            raise ValueError(f"{side}_scheme: static=True must go with allocation='tiers', which calibrates the scales")
    return target


def _probe(config: FitConfig, calibration: Calibration, tokens: torch.Tensor) -> dict[str, float]:
    """`probe_rates`, kept beside the statistics as they come."""
    started, processes = time.perf_counter(), calibration.processes
    variances = {}
    for name, groups in calibration.factors.items():
        variances[name] = list(map(_variance, groups, _samples(calibration, name)))
    path = _measurement_path(
        config, calibration, "rates.json", version=RATES_VERSION, seed=config.seed, tokens=tokens.tolist()
    )

    def stored() -> dict[str, float]:
        return json.loads(path.read_text())["rates"] if path.exists() else {}

    known = on_main(processes, stored)
    progress = tqdm(total=len(variances), initial=len(known), desc="Sensitivity", disable=not is_main(processes))

    def keep(rates: dict[str, float]) -> None:
        write_json(path, {"statistics": record_key(calibration.record), "rates": rates})
        progress.update()

    settings = {"seed": config.seed, "sinks": config.sink_length, "known": known, "on_result": keep}
    inputs = (calibration.dense, calibration.factors, variances, tokens)
    rates = probe_rates(*inputs, **settings, processes=processes)
    progress.close()
    calibration.seconds["probe"] = time.perf_counter() - started
    return rates


def _measurement_path(config: FitConfig, calibration: Calibration, suffix: str, **settings) -> Path:
    """File in the statistics folder for a measurement by the statistics, the factors and further settings."""
    record = {"statistics": calibration.record} | settings
    for name in ("objective", "head_group_size", "k_mean_split", "v_mean_split"):
        record[name] = getattr(config, name)
    if config.keep_dense:
        record |= {name: getattr(calibration.target, name) for name in ("layer_group_size", "joint_kv")}
    return Path(config.statistics) / f"{record_key(record)}.{suffix}"


def _samples(calibration: Calibration, name: str) -> list[torch.Tensor]:
    """Sampled outputs of each head group of a projection; of a block those of all members, less their mean."""
    return member_samples(calibration.statistics, calibration.target.part(name), calibration.target.num_head_groups)


def _gradients(calibration: Calibration, name: str) -> list[torch.Tensor]:
    """Gradients with respect to `_samples`."""
    part, groups = calibration.target.part(name), calibration.target.num_head_groups
    return member_samples(calibration.statistics, part, groups, "gradient")


def _variance(factors: Factors, sample: torch.Tensor) -> torch.Tensor:
    """`[r]`, variance of each latent channel over a sample `[windows, S, out]` of the outputs."""
    return (sample.double() @ factors.project.T).flatten(0, 1).var(0)


def fit_budget(config: FitConfig, calibration: Calibration, budget: float) -> Calibration:
    """The calibration with ranks and widths for a budget, a share of the dense 16-bit cache.

    Raises:
        ValueError: The budget is too small for block tables, window, sinks and scales.
    """
    started = time.perf_counter()
    dense = dense_nbytes(calibration.target, config.tokens, torch.float16)
    # Budgets are shares of the 16-bit cache, whatever type the model has.
    limit = int(budget * dense)
    try:
        if config.allocation == "tiers":
            fitted = _fit_tiers(config, calibration, limit)
        else:
            fitted = _fit_ranks(config, calibration, limit)
    except ValueError as error:
        raise ValueError(f"budget={budget} of {dense:,} bytes at {config.tokens} tokens: {error}") from None
    # The bytes that the search added up must be those of the cache.
    nbytes = cache_nbytes(fitted.target, config.tokens, calibration.stored_dtype)
    if fitted.plan is not None and fitted.plan.nbytes != nbytes:
        raise RuntimeError(f"the cache takes {nbytes} bytes, not the {fitted.plan.nbytes} that were planned")
    fitted.seconds = calibration.seconds | {"allocation": time.perf_counter() - started}
    return fitted


def _fit_tiers(config: FitConfig, calibration: Calibration, limit: int) -> Calibration:
    """Widths by channel, with the blocks that leave the least predicted cost."""
    group_sizes: Sequence[int] = [128]
    if config.group_size is not None:
        group_sizes = [config.group_size]
    elif _all_static(_side_schemes(calibration.target)):
        group_sizes = BLOCK_LENGTHS
    # Without a probe an error costs the same in all layers.
    rates = calibration.rates or dict.fromkeys(calibration.factors, 1.0)
    # Smaller blocks keep fewer exact tokens, larger ones store fewer tables: the costs decide.
    best = refused = None
    for group_size in group_sizes:
        target = ALRDLlamaConfig.from_llama(calibration.target, group_size=group_size)
        cache, sides, prices = CacheScheme.from_config(target), _side_schemes(target), {}
        # The sinks of blocks are the members' own keys and values.
        sinks = 0
        if target.keep_dense:
            sinks = dense_nbytes(target, cache.held(config.tokens).sinks, calibration.stored_dtype)
        for side, scheme in sides.items():
            how = (TIER_BITS, config.tokens, calibration.stored_dtype, not target.keep_dense)
            prices[side] = tier_prices(scheme, cache, *how)
        costs = _measured_costs(config, calibration, sides, cache.block_length)
        try:
            how = {"rebuild": rebuild_costs(target), "max_rebuild": config.max_rebuild}
            plan = allocate(costs, rates, prices, TIER_BITS, limit, sinks, **how)
        except ValueError as error:  # shorter blocks leave a shorter window
            refused = refused or error
            continue
        if best is None or plan.divergence < best[1].divergence:
            best = (target, plan)
    if best is None:
        raise refused
    target, plan = best
    if config.token_scale:
        _refit(calibration, target, plan, rates)
    if _all_static(_side_schemes(target)) and config.objective == "fisher":
        _fit_expansion(calibration, target, plan)
    # The configuration is JSON, which has lists.
    target.truncation_ranks, target.width_tiers = {}, {}
    for name, groups in plan.tiers.items():
        target.truncation_ranks[name] = list(map(len, plan.channels[name]))
        target.width_tiers[name] = [list(map(list, tiers)) for tiers in groups]
    target.check_latent_cache()
    return replace(calibration, target=target, plan=plan)


def _refit(calibration: Calibration, target: ALRDLlamaConfig, plan: BudgetPlan, rates: dict[str, float]) -> None:
    """Put the scales of the channels that are kept, and what they cost, into a plan (`refit_scales`)."""
    sides, plan.divergence = _side_schemes(target), 0.0
    for name, groups in calibration.factors.items():
        scheme, plan.scales[name] = sides[settings_side(name)], []
        kept = zip(groups, _samples(calibration, name), plan.channels[name], plan.tiers[name], strict=True)
        for factors, sample, channels, tiers in kept:
            scales, cost = refit_scales(factors, sample, scheme, channels, tiers)
            plan.scales[name].append(scales)
            plan.divergence += rates[name] * cost


def _fit_expansion(calibration: Calibration, target: ALRDLlamaConfig, plan: BudgetPlan) -> None:
    """Put factors on the columns of A, and the divergence that they leave, into a plan (`expansion_gains`)."""
    sides, changes = _side_schemes(target), 0.0
    for name, groups in calibration.factors.items():
        plan.gains[name] = []
        samples, gradients = _samples(calibration, name), _gradients(calibration, name)
        for i, (factors, sample, gradient) in enumerate(zip(groups, samples, gradients, strict=True)):
            kept, tiers = factors.select(plan.channels[name][i]), plan.tiers[name][i]
            restored = restored_latents(kept, sample, sides[settings_side(name)], tiers, plan.scales[name][i])
            outputs, gradient = sample.flatten(0, 1).float(), gradient.flatten(0, 1).float()
            # Every member of a block expands the latent for itself.
            rows, pieces = target.group_outputs, []
            for a, y, g in zip(kept.a.float().split(rows), outputs.split(rows, dim=1), gradient.split(rows, dim=1)):
                gains = expansion_gains(a, restored, y, g, [channels for channels, _ in tiers])
                error = restored @ (a * gains.float()).T - y
                changes = changes + (g * error).sum(1)
                pieces.append(gains.expand(rows, -1))
            plan.gains[name].append(torch.cat(pieces))
    plan.predicted = predicted_divergence(changes.view(sample.shape[:2]))


def _measured_costs(
    config: FitConfig, calibration: Calibration, sides: dict[str, QuantScheme], block_length: int
) -> dict[str, list[ChannelCosts]]:
    """`measure_costs` of every head group by projection, kept as they come; static scales know no blocks."""
    schemes = {}
    for side, scheme in sides.items():
        # Static scales do not depend on blocks, so that their costs serve all block lengths.
        schemes[f"{side}_proj"] = scheme.to_dict()
        if scheme.static:
            schemes[f"{side}_proj"]["group_size"] = None
    windows, sampled = calibration.statistics[0].k_proj.sample.shape[:2]
    length, every = block_length, 1
    if _all_static(sides):
        # Scales that all tokens share are measured on a few thousand.
        every = max(1, windows * sampled // _COST_TOKENS)
        length = len(range(0, sampled, every))
    settings = {"version": COSTS_VERSION, "schemes": schemes, "length": length, "every": every}
    path = _measurement_path(config, calibration, "costs.safetensors", **settings)
    if path not in calibration.costs:
        costs = load_costs(path) if path.exists() else {}
        for name, groups in tqdm(calibration.factors.items(), desc="Distortion"):
            if name in costs:
                continue
            costs[name], scheme = [], sides[settings_side(name)]
            for factors, sample in zip(groups, _samples(calibration, name), strict=True):
                # Blocks are quantized whole.
                whole_blocks = sample[:, ::every]
                whole_blocks = whole_blocks[:, : whole_blocks.shape[1] // length * length]
                costs[name].append(measure_costs(factors, whole_blocks, scheme, length))
            # An interrupted measurement goes on from here.
            save_costs(path, costs)
        calibration.costs[path] = {name: costs[name] for name in calibration.factors}
    return calibration.costs[path]


def _side_schemes(target: ALRDLlamaConfig) -> dict[str, QuantScheme]:
    """The scheme of each side of a cache, by the name of the side; that of the keys is of a latent of both."""
    scheme = CacheScheme.from_config(target)
    return {"k": scheme.keys} if target.joint_kv else {"k": scheme.keys, "v": scheme.values}


def _all_static(sides: dict[str, QuantScheme]) -> bool:
    return all(scheme.static for scheme in sides.values())


def _fit_ranks(config: FitConfig, calibration: Calibration, limit: int) -> Calibration:
    """One width for all channels, and as many of them as fit."""
    calibration.search = ranks_of = calibration.search or _rank_search(config, calibration)
    target = ALRDLlamaConfig.from_llama(calibration.target)

    def nbytes(ranks: dict[str, list[int]]) -> int:
        target.truncation_ranks = ranks
        return cache_nbytes(target, config.tokens, calibration.stored_dtype)

    target.truncation_ranks = ranks_of(largest_share(ranks_of, nbytes, limit))
    return replace(calibration, target=target)


def _rank_search(config: FitConfig, calibration: Calibration) -> Callable[[float], dict[str, list[int]]]:
    """Ranks for a share of all channels, as `config.allocation` finds them."""
    target, multiple = calibration.target, config.rank_multiple
    if config.allocation == "water_filling":
        return partial(water_fill, _energies(calibration.factors), multiple=multiple)
    if config.allocation == "uniform":
        return partial(uniform_ranks, target, multiple=multiple)
    if any(parameter.is_meta for parameter in calibration.dense.parameters()):
        raise ValueError(f"allocation={config.allocation!r}: must have the whole model in memory, none offloaded")
    # The other searches look at the text once more.
    batches = calibration.tokens.split(1)
    if config.allocation == "fisher":
        return partial(fisher_ranks, fisher_information(calibration.dense, batches, target), target, multiple=multiple)
    objective, weightings = OBJECTIVES[config.objective], []
    for layer, statistics in enumerate(calibration.statistics):
        weightings.append(objective(calibration.dense, layer, statistics))
    sensitivity = asvd_sensitivity(calibration.dense, batches[:8], target, weightings, multiple=multiple)
    return partial(asvd_ranks, sensitivity, target)


def rebuild_costs(config: ALRDLlamaConfig) -> dict[str, float]:
    """Multiply-adds per cached token and layer of attention, for each channel of what has a latent, by its name.

    A channel is expanded to the keys of its head group in every layer that reads it, and summed up for every query
    head that reads it as a value.
    """
    of_member = {"k": config.group_outputs, "v": config.num_attention_heads // config.num_head_groups}
    costs = {}
    for part in config.parts():
        costs[part.name] = sum(of_member[member.side] for member in part.members()) / config.num_hidden_layers
    return costs


def multiply_adds(config: ALRDLlamaConfig) -> float:
    """Multiply-adds per cached token and layer of attention, all channels together."""
    return sum(cost * sum(config.truncation_ranks[name]) for name, cost in rebuild_costs(config).items())


def cache_nbytes(config: ALRDLlamaConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of one row of the cache that a configuration makes, everything counted, calibrated scales too."""
    scheme, tiered = config_schemes(config)
    nbytes = 0
    for layer, (widths, sinks) in enumerate(zip(config_widths(config), config_sink_channels(config), strict=True)):
        layer_scheme = tiered.get(layer, scheme)
        nbytes += layer_scheme.layer_nbytes(tokens, widths, dtype, sinks) + layer_scheme.static_nbytes(widths)
    return nbytes


def dense_nbytes(config: ALRDLlamaConfig, length: int, dtype: torch.dtype, batch_size: int = 1) -> int:
    """Bytes of a dense cache: 2 · layers · H_kv · d · bytes · batch · T."""
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
    return per_token * batch_size * length


def break_even(config: ALRDLlamaConfig, weights: int, dense_weights: int, dtype: torch.dtype) -> int | None:
    """Tokens, in blocks of 128, from which weights and cache of one row are smaller than those of the dense model.

    Args:
        config: Of the split model, with ranks and widths.
        weights, dense_weights: Bytes of the weights of the split and of the dense model.
        dtype: Of the split model. The dense cache has 16 bits.

    Returns:
        The tokens; `None`: more than 2^24.
    """

    def is_smaller(tokens: int) -> bool:
        dense = dense_weights + dense_nbytes(config, tokens, torch.float16)
        return weights + cache_nbytes(config, tokens, dtype) < dense

    # Whole blocks save alike, so that the lengths at which the model is smaller follow those at which it is not.
    lengths = range(0, 2**24, 128)
    found = bisect_left(lengths, True, key=is_smaller)
    return lengths[found] if found < len(lengths) else None
