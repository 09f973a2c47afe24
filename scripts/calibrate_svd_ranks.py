"""One budget in, a split checkpoint out: statistics on text, factors, ranks, widths, report and plots.

    python scripts/calibrate_svd_ranks.py --model models/tiny-python-llama --budget 0.0625 --output build/sixteenth
    python scripts/calibrate_svd_ranks.py --sweep 0.25 0.125 0.0625 --output build/sweep

The output is an ordinary Hugging Face checkpoint directory that `ALRDLlamaForCausalLM.from_pretrained` loads and
`create_kivi_cache()` honours, with `report.json`, `spectra.png` and `widths.png` beside the weights. With --sweep there
is one for each budget, and the perplexity of all, measured through the cache, in `sweep.json` and `curve.png`. What is
found out about the model is kept in --statistics: an interrupted run goes on where it stopped, another budget starts
from there.

Started by `accelerate launch --multi_gpu --num_processes N` (its name for several processes on one machine, CPUs too),
the processes divide the batches of text and the projections of the sensitivity probe; one of them does the rest.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from configuration_alrd_llama import ALRDLlamaConfig, QuantScheme, check_choice, side_scheme
from modeling_alrd_llama import ALRDLlamaForCausalLM
from modules.fit.allocation import (
    COSTS_VERSION,
    TIER_BITS,
    ChannelCosts,
    Plan,
    allocate,
    largest_share,
    load_costs,
    measure_costs,
    save_costs,
    tier_prices,
)
from modules.fit.distributed import device_map, is_main, join_processes, on_main
from modules.fit.objectives import OBJECTIVES, PROJECTIONS, RATES_VERSION, probe_rates, projection_factors
from modules.fit.rank_search import (
    asvd_ranks,
    asvd_sensitivity,
    fisher_information,
    fisher_ranks,
    uniform_ranks,
    water_fill,
)
from modules.fit.statistics import LayerStatistics, collect_statistics, record_key, statistics_record
from modules.kivi_cache import CacheScheme, config_schemes, config_widths
from modules.svd_linear import Factors
from scripts import plots
from scripts.common import (
    BUNDLED_MODEL,
    DTYPES,
    check_positive,
    dense_nbytes,
    environment,
    find_model,
    git_commit,
    load_model,
    parse_config,
    parse_json,
    write_json,
)
from scripts.compare_peers import series
from scripts.corpus import describe, load_documents, tokenize_windows
from scripts.eval_perplexity import EvalConfig, measure, table

#: How channels are chosen for a budget: widths by channel; or one width for all and ranks by a search of
#: `modules/fit/rank_search.py`, "fisher" being Palu's and "sensitivity" ASVD's.
ALLOCATIONS = ("tiers", "water_filling", "uniform", "fisher", "sensitivity")

#: Static scales leave nothing to store per block; measured best at small budgets (LOG.md).
STATIC = '{"orientation": "per_channel", "static": true}'


@dataclass
class CalibrationConfig:
    """What to split, on which text, into how much."""

    model: str = field(
        default=BUNDLED_MODEL, metadata={"help": "Dense Llama, Mistral or Qwen2: a local folder or a hub name."}
    )
    output: str = field(default="build/calibrated", metadata={"help": "Folder of the split checkpoint, or of several."})
    budget: float | None = field(
        default=None,
        metadata={"help": "Size of the cache as a share of the dense one in 16 bits, everything counted: 0.0625."},
    )
    sweep: list[float] = field(
        default_factory=list, metadata={"help": "Budgets of a whole curve, measured; in place of --budget."}
    )
    peers: str | None = field(
        default=None, metadata={"help": "JSON of scripts/compare_peers.py whose peers a sweep's curve shows too."}
    )
    tokens: int = field(default=4096, metadata={"help": "Tokens in the cache that the budget is for."})
    share: float | None = field(
        default=None, metadata={"help": "Without a budget: share of the latent channels to keep, at one width."}
    )
    allocation: str = field(
        default="tiers", metadata={"help": f"How ranks and widths are chosen for a budget: {', '.join(ALLOCATIONS)}."}
    )
    objective: str = field(default="fisher", metadata={"help": f"Error that is minimised: {', '.join(OBJECTIVES)}."})
    head_group_size: int | None = field(
        default=None, metadata={"help": "Key/value heads that share a latent; all of them (joint) if not given."}
    )
    k_mean_split: bool = field(default=False, metadata={"help": "Keep the mean of the keys in a channel of its own."})
    v_mean_split: bool = field(default=False, metadata={"help": "The same for values."})
    probe: bool = field(
        default=True, metadata={"help": "Measure what an error costs in each layer; else all errors cost the same."}
    )
    text: str = field(default="stdlib:calibration", metadata={"help": "Text for statistics: see scripts/corpus.py."})
    windows: int = field(default=32, metadata={"help": "Windows of text to run the model on."})
    length: int = field(default=1024, metadata={"help": "Tokens per window."})
    batch_size: int = field(default=4, metadata={"help": "Windows at a time, in each process."})
    seed: int = field(default=0, metadata={"help": "Of the tokens drawn for the Fisher information, and the noise."})
    statistics: str = field(default="build/statistics", metadata={"help": "Folder where statistics are kept."})
    rank_multiple: int = field(default=8, metadata={"help": "Without tiers: ranks are multiples of this."})
    k_bits: float = field(default=2, metadata={"help": "Without tiers: width of cached keys, 1 … 16."})
    v_bits: float = field(default=2, metadata={"help": "Without tiers: width of cached values."})
    group_size: int | None = field(
        default=None, metadata={"help": "Elements per scale, or tokens per block; with tiers the best of 32, 64, 128."}
    )
    residual_length: int | None = field(
        default=None, metadata={"help": "Newest tokens kept in full precision; 16 with tiers, else 32."}
    )
    sink_length: int = field(default=4, metadata={"help": "First tokens kept in full precision."})
    k_scheme: str | None = field(
        default=None,
        metadata={"help": f"Other fields of QuantScheme for keys, as JSON; with tiers {STATIC} by default."},
    )
    v_scheme: str | None = field(default=None, metadata={"help": "The same for values."})
    dtype: str = field(
        default="float32", metadata={"help": f"Type in which the dense model runs: {', '.join(DTYPES)}."}
    )
    device: str = field(default="cpu", metadata={"help": "Where it runs: cpu or cuda."})

    def __post_init__(self):
        given = [name for name in ("budget", "share") if getattr(self, name) is not None] + ["sweep"] * bool(self.sweep)
        if len(given) != 1:
            raise ValueError(f"budget, share, sweep: exactly one must be given, got {', '.join(given) or 'none'}")
        for name, choices in (
            ("allocation", ALLOCATIONS),
            ("objective", tuple(OBJECTIVES)),
            ("dtype", DTYPES),
            ("device", ("cpu", "cuda")),
        ):
            check_choice(name, getattr(self, name), choices)
        for name in ("tokens", "windows", "length", "batch_size", "rank_multiple"):
            check_positive(name, getattr(self, name))
        for budget in self.budgets:
            if not 0 < budget <= 1:
                raise ValueError(f"budget={budget}: must be above 0 and at most 1, a share of the dense cache")

    @property
    def budgets(self) -> list[float]:
        return self.sweep or ([self.budget] if self.budget is not None else [])

    @property
    def tiered(self) -> bool:
        return bool(self.budgets) and self.allocation == "tiers"


@dataclass
class Calibration:
    """A dense model, what was found out about it, and the configuration of its split form."""

    dense: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stored_dtype: torch.dtype
    text: dict
    statistics: list[LayerStatistics] | None
    record: dict
    factors: dict[str, list[Factors]]
    target: ALRDLlamaConfig
    costs: dict[Path, dict[str, list[ChannelCosts]]] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    search: Callable[[float], dict[str, list[int]]] | None = None
    plan: Plan | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    processes: PartialState | None = None

    def split(self, **fields) -> ALRDLlamaForCausalLM:
        """The split model, on the CPU in the type of the dense checkpoint, with other `fields` of its configuration."""
        target = ALRDLlamaConfig.from_llama(self.target, **fields)
        splits = []
        for i in range(target.num_hidden_layers):
            names = {p: f"model.layers.{i}.self_attn.{p}" for p in PROJECTIONS}
            splits.append({p: self._split(name, target.group_ranks(i, p)) for p, name in names.items()})
        return ALRDLlamaForCausalLM.from_dense(self.dense, target, splits, self.stored_dtype, "cpu")

    def _split(self, name: str, ranks: tuple[int, ...]) -> dict:
        """Factors of the channels that a projection keeps, and their calibrated scales."""
        chosen = self.plan.channels[name] if self.plan else [torch.arange(rank) for rank in ranks]
        scales = self.plan.scales[name] if self.plan else []
        how = {"factors": [f.select(c) for f, c in zip(self.factors[name], chosen, strict=True)]}
        return how | ({"static_scales": tuple(torch.cat(s) for s in zip(*scales))} if scales else {})


# ---- from a model and a text to factors, costs and rates


def calibrate(config: CalibrationConfig, processes: PartialState | None = None) -> Calibration:
    """Load the dense model, collect the statistics, make the factors; with a share, choose the ranks too."""
    source = ALRDLlamaConfig.from_pretrained(find_model(config.model))
    if source.truncation_ranks:
        raise ValueError(f"model={config.model!r}: must be a dense checkpoint, is split already")
    target = _target(config, source)
    for side, scheme in zip("kv", _sides(target)):
        if scheme.static and not config.tiered:
            raise ValueError(f"{side}_scheme: static=True must go with allocation='tiers', which calibrates the scales")
    dense, tokenizer = load_model(config.model, getattr(torch, config.dtype), device_map(processes, config.device))
    if any(parameter.is_meta for parameter in dense.parameters()):
        raise ValueError(f"device={config.device!r}: must hold the whole model; none of it may be offloaded")
    if len(tokenizer) > dense.get_input_embeddings().num_embeddings:
        raise ValueError(
            f"model={config.model!r}: its tokenizer has {len(tokenizer)} tokens, its embedding only "
            f"{dense.get_input_embeddings().num_embeddings}; the tokenizer must be the model's own"
        )
    documents = load_documents(config.text)
    sample = min(256, (config.length - config.sink_length) // 128 * 128)
    if config.tiered and sample <= 0:
        raise ValueError(f"length={config.length}: windows must hold the sinks and 128 tokens to sample")
    longest = CacheScheme.from_config(target).block_length
    if config.tiered and longest > sample:
        raise ValueError(f"group_size={longest}: must be at most {sample}, the consecutive tokens that are sampled")
    statistics, record, seconds, started = None, {}, {}, time.perf_counter()
    if config.objective != "weight" or config.budgets or config.k_mean_split or config.v_mean_split:
        tokens = _windows(config, documents, tokenizer, config.windows)
        settings = {
            "fisher": config.objective == "fisher",
            "sample": max(sample, 0),
            "sinks": config.sink_length,
            "batch_size": config.batch_size,
            "seed": config.seed,
        }
        record = statistics_record(dense, tokens, **settings)
        about = {"model": config.model, "text": config.text, **describe(documents), "commit": git_commit()}
        where = {"folder": config.statistics, "about": about, "processes": processes}
        statistics = collect_statistics(dense, tokens, **settings, **where)
    seconds["statistics"], started = time.perf_counter() - started, time.perf_counter()
    factors = projection_factors(dense, target, statistics, config.objective)
    seconds["factors"] = time.perf_counter() - started
    calibration = Calibration(
        dense, tokenizer, source.dtype or torch.float32, describe(documents), statistics, record, factors, target
    )
    calibration.seconds, calibration.processes = seconds, processes
    if config.share is not None:
        energies = {name: [f.energy[: f.a.shape[1]] for f in groups] for name, groups in factors.items()}
        target.truncation_ranks = water_fill(energies, config.share, config.rank_multiple)
    elif config.tiered and config.probe:
        calibration.rates = _probe(config, calibration, documents)
    return calibration


def _target(config: CalibrationConfig, source: ALRDLlamaConfig) -> ALRDLlamaConfig:
    """The configuration of the split model, without ranks and widths."""
    default = STATIC if config.tiered else None
    schemes = {name: parse_json(name, getattr(config, name) or default) for name in ("k_scheme", "v_scheme")}
    fields = {
        "k_bits": config.k_bits,
        "v_bits": config.v_bits,
        "group_size": 128 if config.group_size is None else config.group_size,
        "residual_length": config.residual_length,
        "sink_length": config.sink_length,
        "head_group_size": config.head_group_size,
        "k_mean_split": config.k_mean_split,
        "v_mean_split": config.v_mean_split,
    }
    if config.residual_length is None:
        fields["residual_length"] = 16 if config.tiered else 32
    if config.tiered:
        # A width by channel leaves nothing for a rotation to even out, but where a token's channels share a scale.
        sides = {s: side_scheme(s, fields[f"{s}_bits"], fields["group_size"], schemes[f"{s}_scheme"]) for s in "kv"}
        fields |= {f"{s}_hadamard": not scheme.per_channel for s, scheme in sides.items()}
    return ALRDLlamaConfig.from_llama(source, **fields, **schemes)


def _windows(config: CalibrationConfig, documents, tokenizer, count: int) -> torch.Tensor:
    """`[count, length]` windows, spread evenly over the text."""
    tokens = tokenize_windows(documents, tokenizer, config.length)
    if len(tokens) < count:
        raise ValueError(f"windows={count}: {config.text!r} has only {len(tokens)} windows of {config.length} tokens")
    return tokens[torch.linspace(0, len(tokens) - 1, count).round().long()]


def _probe(config: CalibrationConfig, calibration: Calibration, documents) -> dict[str, float]:
    """`probe_rates` on two windows, kept beside the statistics as they come."""
    started, processes = time.perf_counter(), calibration.processes
    tokens = _windows(config, documents, calibration.tokenizer, 2)
    variances = {
        name: [_variance(f, y) for f, y in zip(groups, _samples(calibration, name), strict=True)]
        for name, groups in calibration.factors.items()
    }
    path = _kept(config, calibration, "rates.json", version=RATES_VERSION, seed=config.seed, tokens=tokens.tolist())
    known = on_main(processes, lambda: json.loads(path.read_text())["rates"] if path.exists() else {})
    progress = tqdm(total=len(variances), initial=len(known), desc="Sensitivity", disable=not is_main(processes))

    def keep(rates: dict[str, float]) -> None:
        write_json(path, {"statistics": record_key(calibration.record), "rates": rates})
        progress.update()

    how = {"seed": config.seed, "known": known, "on_result": keep, "processes": processes}
    rates = probe_rates(calibration.dense, calibration.factors, variances, tokens, **how)
    progress.close()
    calibration.seconds["probe"] = time.perf_counter() - started
    return rates


def _kept(config: CalibrationConfig, calibration: Calibration, suffix: str, **settings) -> Path:
    """File in the statistics folder of what follows from the statistics, the factors and further settings."""
    names = ("objective", "head_group_size", "k_mean_split", "v_mean_split")
    of = {"statistics": calibration.record} | {name: getattr(config, name) for name in names} | settings
    return Path(config.statistics) / f"{record_key(of)}.{suffix}"


def _samples(calibration: Calibration, name: str) -> tuple[torch.Tensor, ...]:
    """Sampled outputs of each head group of a projection."""
    sample = getattr(calibration.statistics[int(name.split(".")[2])], name.rsplit(".", 1)[1]).sample
    return sample.chunk(len(calibration.factors[name]), dim=-1)


def _variance(factors: Factors, sample: torch.Tensor) -> torch.Tensor:
    return (sample.double() @ factors.project.T).flatten(0, 1).var(0)


# ---- from a budget to ranks and widths


def fit_budget(config: CalibrationConfig, calibration: Calibration, budget: float) -> Calibration:
    """The calibration with ranks and widths for a budget, a share of the dense 16-bit cache.

    Raises:
        ValueError: The budget is too small for block tables, window, sinks and scales.
    """
    started = time.perf_counter()
    dense = dense_nbytes(calibration.target, config.tokens, torch.float16)
    limit = int(budget * dense)
    try:
        if config.allocation == "tiers":
            fitted = _fit_tiers(config, calibration, limit)
        else:
            fitted = _fit_ranks(config, calibration, limit)
    except ValueError as error:
        raise ValueError(f"budget={budget} of {dense:,} bytes at {config.tokens} tokens: {error}") from None
    found = cache_nbytes(fitted.target, config.tokens, calibration.stored_dtype)
    if fitted.plan is not None and fitted.plan.nbytes != found:
        raise RuntimeError(f"the cache takes {found} bytes, not the {fitted.plan.nbytes} that were planned")
    fitted.seconds = calibration.seconds | {"allocation": time.perf_counter() - started}
    return fitted


def _fit_tiers(config: CalibrationConfig, calibration: Calibration, limit: int) -> Calibration:
    """Widths by channel, with the blocks that leave the least predicted cost."""
    static = all(scheme.static for scheme in _sides(calibration.target))
    group_sizes = [config.group_size] if config.group_size is not None else [32, 64, 128] if static else [128]
    rates, best = calibration.rates or dict.fromkeys(calibration.factors, 1.0), None
    refused = None
    for group_size in group_sizes:
        target = ALRDLlamaConfig.from_llama(calibration.target, group_size=group_size)
        cache, sides = CacheScheme.from_config(target), dict(zip(PROJECTIONS, _sides(target)))
        costs = _measured_costs(config, calibration, sides, cache.block_length)
        price = {p: tier_prices(s, cache, TIER_BITS, config.tokens, calibration.stored_dtype) for p, s in sides.items()}
        try:
            plan = allocate(costs, rates, price, TIER_BITS, limit)
        except ValueError as error:  # shorter blocks leave a shorter window
            refused = refused or error
            continue
        if best is None or plan.divergence < best[1].divergence:
            best = (target, plan)
    if best is None:
        raise refused
    target, plan = best
    target.truncation_ranks = {name: [len(c) for c in groups] for name, groups in plan.channels.items()}
    target.width_tiers = {n: [[list(t) for t in tiers] for tiers in groups] for n, groups in plan.tiers.items()}
    target.check_latent_cache()
    return replace(calibration, target=target, plan=plan)


def _measured_costs(
    config: CalibrationConfig, calibration: Calibration, sides: dict[str, QuantScheme], block_length: int
) -> dict[str, list[ChannelCosts]]:
    """`measure_costs` of every head group by projection, kept as they come; static scales know no blocks."""
    schemes = {p: s.to_dict() | ({"group_size": None} if s.static else {}) for p, s in sides.items()}
    sampled = calibration.statistics[0].k_proj.sample.shape[1]
    length = sampled if all(s.static for s in sides.values()) else block_length
    settings = {"version": COSTS_VERSION, "schemes": schemes, "length": length}
    path = _kept(config, calibration, "costs.safetensors", **settings)
    if path not in calibration.costs:
        costs = load_costs(path) if path.exists() else {}
        for name, groups in tqdm(calibration.factors.items(), desc="Distortion"):
            if name not in costs:
                costs[name] = [
                    measure_costs(f, y[:, : sampled // length * length], sides[name[-6:]], length)
                    for f, y in zip(groups, _samples(calibration, name), strict=True)
                ]
                save_costs(path, costs)
        calibration.costs[path] = {name: costs[name] for name in calibration.factors}
    return calibration.costs[path]


def _sides(target: ALRDLlamaConfig) -> tuple:
    scheme = CacheScheme.from_config(target)
    return scheme.keys, scheme.values


def _fit_ranks(config: CalibrationConfig, calibration: Calibration, limit: int) -> Calibration:
    """One width for all channels, and as many of them as fit."""
    calibration.search = ranks_of = calibration.search or _rank_search(config, calibration)
    target = ALRDLlamaConfig.from_llama(calibration.target)

    def nbytes(ranks: dict[str, list[int]]) -> int:
        target.truncation_ranks = ranks
        return cache_nbytes(target, config.tokens, calibration.stored_dtype)

    target.truncation_ranks = ranks_of(largest_share(ranks_of, nbytes, limit))
    return replace(calibration, target=target)


def _rank_search(config: CalibrationConfig, calibration: Calibration) -> Callable[[float], dict[str, list[int]]]:
    """Ranks for a share of all channels, as `config.allocation` finds them."""
    target, multiple = calibration.target, config.rank_multiple
    if config.allocation == "water_filling":
        energies = {name: [f.energy[: f.a.shape[1]] for f in groups] for name, groups in calibration.factors.items()}
        return partial(water_fill, energies, multiple=multiple)
    if config.allocation == "uniform":
        return partial(uniform_ranks, target, multiple=multiple)
    batches = _windows(config, load_documents(config.text), calibration.tokenizer, config.windows).split(1)
    if config.allocation == "fisher":
        return partial(fisher_ranks, fisher_information(calibration.dense, batches, target), target, multiple=multiple)
    hows = [OBJECTIVES[config.objective](calibration.dense, i, s) for i, s in enumerate(calibration.statistics)]
    sensitivity = asvd_sensitivity(calibration.dense, batches[:8], target, hows, multiple=multiple)
    return partial(asvd_ranks, sensitivity, target)


def cache_nbytes(config: ALRDLlamaConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of one row of the cache that a configuration makes, everything counted, calibrated scales too."""
    scheme, tiered = config_schemes(config)
    layers = [(tiered.get(i, scheme), widths) for i, widths in enumerate(config_widths(config))]
    return sum(s.layer_nbytes(tokens, widths, dtype) + s.static_nbytes(widths) for s, widths in layers)


# ---- output


def write_checkpoint(config: CalibrationConfig, calibration: Calibration, budget: float | None, folder: Path) -> dict:
    """The checkpoint with report and plots; returns the report."""
    started = time.perf_counter()
    calibration.split().save_pretrained(folder)
    calibration.tokenizer.save_pretrained(folder)
    target, dense = calibration.target, dense_nbytes(calibration.target, config.tokens, torch.float16)
    nbytes = cache_nbytes(target, config.tokens, calibration.stored_dtype)
    report = {
        "config": asdict(config),
        "environment": environment(calibration.dense.device, calibration.processes),
        "text": calibration.text,
        "budget": budget,
        "nbytes": nbytes,
        "share_of_dense": nbytes / dense,
        "predicted_divergence": calibration.plan and calibration.plan.divergence,
        "truncation_ranks": target.truncation_ranks,
        "width_tiers": target.width_tiers,
        "rates": calibration.rates,
        "energies": {
            name: [[float(f"{e:.4g}") for e in f.energy.tolist()] for f in groups]
            for name, groups in calibration.factors.items()
        },
        "energy_kept": {name: _energy_kept(calibration, name) for name in target.truncation_ranks},
        "seconds": {k: round(v, 1) for k, v in calibration.seconds.items()}
        | {"checkpoint": round(time.perf_counter() - started, 1)},
    }
    write_json(folder / "report.json", report)
    plots.spectra(report, folder / "spectra.png")
    plots.widths(report, folder / "widths.png")
    ranks = [sum(r) for r in target.truncation_ranks.values()]
    print(
        f"{folder}: {nbytes:,} bytes at {config.tokens:,} tokens, {report['share_of_dense']:.2%} of the dense cache "
        f"({dense / nbytes:.1f}× smaller); ranks {min(ranks)}–{max(ranks)}, {sum(report['seconds'].values()):.0f} s"
    )
    return report


def _energy_kept(calibration: Calibration, name: str) -> list[float]:
    ranks = calibration.target.truncation_ranks[name]
    chosen = calibration.plan.channels[name] if calibration.plan else [torch.arange(r) for r in ranks]
    return [
        round((f.energy[c].sum() / f.energy.sum().clamp(min=1e-300)).item(), 6)
        for f, c in zip(calibration.factors[name], chosen, strict=True)
    ]


def main(config: CalibrationConfig) -> dict:
    """Write the checkpoint, or one for each budget of a sweep; returns the report, or the record of the sweep."""
    processes = join_processes(config.device)
    calibration = calibrate(config, processes)
    report = on_main(processes, _write, config, calibration)
    return measure_sweep(config, processes) if config.sweep else report


def _write(config: CalibrationConfig, calibration: Calibration) -> dict | None:
    """Choose and write all checkpoints; returns the report if there is one."""
    output = Path(config.output)
    if config.share is not None:
        return write_checkpoint(config, calibration, None, output)
    fitted = {budget: fit_budget(config, calibration, budget) for budget in config.budgets}
    if not config.sweep:
        return write_checkpoint(config, fitted[config.budget], config.budget, output)
    for budget in config.sweep:
        write_checkpoint(config, fitted[budget], budget, output / f"{budget:g}")
    return None


def measure_sweep(config: CalibrationConfig, processes: PartialState | None = None, **evaluation) -> dict:
    """Perplexity of the checkpoints of a sweep, through the cache, on the text that chooses defaults."""
    output, caches = Path(config.output), {}
    where = device_map(processes, config.device)
    dense, tokenizer = load_model(config.model, device_map=where)
    for budget in config.sweep:
        model = ALRDLlamaForCausalLM.from_pretrained(output / f"{budget:g}", device_map=where).eval()
        caches[f"{budget:.4g} of the bytes"] = (model, model.create_kivi_cache)
    how = {"text": "stdlib:selection", "windows": 8, "prefill": 1792} | evaluation
    record = measure(EvalConfig(model=config.model, **how), tokenizer, dense, caches, processes=processes)
    if not is_main(processes):
        return record
    write_json(output / "sweep.json", record)
    lines = {"ours": record["results"]}
    if config.peers is not None:
        recorded = series(json.loads(Path(config.peers).read_text()))
        lines |= {f"recorded: {label}": results for label, results in recorded.items() if label != "ours"}
    plots.curve(lines, output / "curve.png")
    print(table(record["results"]))
    return record


if __name__ == "__main__":
    main(parse_config(CalibrationConfig, __doc__))
