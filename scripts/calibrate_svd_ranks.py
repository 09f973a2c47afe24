r"""One budget in, a split checkpoint out: statistics on text, factors, ranks, widths, report and plots.

    python scripts/calibrate_svd_ranks.py --model meta-llama/Llama-3.1-8B-Instruct --budget 0.125 --output build/eighth
    python scripts/calibrate_svd_ranks.py --model models/tiny-python-llama --text stdlib:calibration \
        --sweep 0.25 0.125 0.0625 --output build/sweep

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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from accelerate import PartialState

from configuration_alrd_llama import ALRDLlamaConfig, check_choice, check_positive
from modeling_alrd_llama import ALRDLlamaForCausalLM
from modules.files import write_json
from modules.fit.budget import (
    AMPLE_BUDGET,
    Calibration,
    FitConfig,
    break_even,
    cache_nbytes,
    calibrate,
    dense_nbytes,
    fit_budget,
    multiply_adds,
    split_config,
)
from modules.fit.distributed import device_map, is_main, join_processes, on_main
from modules.loading import execution_device
from scripts import plots
from scripts.common import BUNDLED_MODEL, DTYPES, environment, find_model, git_commit, load_model, parse_config
from scripts.compare_peers import series
from scripts.decode_bound import fit_in_time
from scripts.eval_perplexity import EvalConfig, measure, perplexity_table
from scripts.sources import TEXT_HELP, calibration_table, describe_sources, draw_windows, list_texts, load_sources


@dataclass
class SourceOptions:
    """The model to split, the text for its statistics, and the folder to write."""

    model: str = field(
        default=BUNDLED_MODEL,
        metadata={"help": "Dense model: a local folder, a GGUF file or a hub name."},
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
    probe: bool | None = field(
        default=None,
        metadata={
            "help": "Measure what an error costs in each layer; else all errors cost the same. None: measure it where "
            "the objective is not 'fisher', whose errors have one unit in all layers."
        },
    )
    decode_ms: float | None = field(
        default=None,
        metadata={
            "help": "Most milliseconds of a decode step of one row, measured on this machine and device; none if not "
            "given. With blocks, of fewer layers first, then of fewer channels."
        },
    )
    decode_tokens: int | None = field(
        default=None, metadata={"help": "Tokens in the cache of that step. None: those that the budget is for."}
    )
    text: list[str] = field(default_factory=lambda: ["mixture"], metadata={"help": TEXT_HELP})
    windows: int = field(default=32, metadata={"help": "Windows of text to run the model on."})
    length: int = field(default=1024, metadata={"help": "Tokens per window."})
    dtype: str = field(
        default="float32", metadata={"help": f"Type in which the dense model runs: {', '.join(DTYPES)}."}
    )
    device: str = field(
        default="cpu",
        metadata={"help": "Where it runs: cpu, cuda, or auto: what a GPU does not hold waits in memory or on disk."},
    )


@dataclass
class CalibrationConfig(FitConfig, SourceOptions):  # options of the last base come first
    """All options of the command."""

    def __post_init__(self):
        given = [name for name in ("budget", "share") if getattr(self, name) is not None] + ["sweep"] * bool(self.sweep)
        if len(given) != 1:
            raise ValueError(f"budget, share, sweep: exactly one must be given, got {', '.join(given) or 'none'}")
        if self.keep_dense is None and self.probe:
            self.keep_dense = False
        super().__post_init__()
        if self.layer_group_size is None and self.keep_dense and min(self.budgets) >= AMPLE_BUDGET:
            self.layer_group_size = 1
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("device", self.device, ("cpu", "cuda", "auto"))
        if self.keep_dense and self.probe:
            raise ValueError("probe=True: must not go with keep_dense=True, whose errors have one unit in all layers")
        for name in ("windows", "length"):
            check_positive(name, getattr(self, name))
        if self.decode_tokens is None:
            self.decode_tokens = self.tokens
        check_positive("decode_tokens", self.decode_tokens)
        if self.decode_ms is not None:
            check_positive("decode_ms", self.decode_ms)
            if not self.keep_dense:
                raise ValueError(f"decode_ms={self.decode_ms}: must go with keep_dense=True")
        self.text = list_texts(self.text)
        for budget in self.budgets:
            if not 0 < budget <= 1:
                raise ValueError(f"budget={budget}: must be above 0 and at most 1, a share of the dense cache")

    @property
    def probed(self) -> bool:
        """Whether what an error costs is measured."""
        return self.tiered and (self.objective != "fisher" if self.probe is None else self.probe)

    @property
    def budgets(self) -> list[float]:
        return self.sweep or ([self.budget] if self.budget is not None else [])


def calibrate_model(config: CalibrationConfig, processes: PartialState | None = None) -> Calibration:
    """Load the dense model and the text that the options name, and `calibrate` the one on the other."""
    source = ALRDLlamaConfig.from_pretrained(find_model(config.model))
    if source.truncation_ranks:
        raise ValueError(f"model={config.model!r}: must be a dense checkpoint, is split already")
    # Settings and texts are refused before a large model is loaded.
    split_config(config, source)
    sources, text = [], None
    if config.needs_text:
        sources = load_sources(config.text)
        text = describe_sources(sources, config.length, config.windows)
    dense, tokenizer = load_model(config.model, getattr(torch, config.dtype), device_map(processes, config.device))
    if len(tokenizer) > dense.get_input_embeddings().num_embeddings:
        raise ValueError(
            f"model={config.model!r}: its tokenizer has {len(tokenizer)} tokens, its embedding only "
            f"{dense.get_input_embeddings().num_embeddings}; the tokenizer must be the model's own"
        )
    about = {"model": config.model, "text": text, "commit": git_commit()}
    tokens = draw_windows(sources, tokenizer, config.length, config.windows) if config.needs_text else None
    probe_tokens = None
    if config.probed:
        # A window of each source: what errors cost may differ between them, whatever their weights.
        alike = [replace(source, share=1 / len(sources)) for source in sources]
        probe_tokens = draw_windows(alike, tokenizer, config.length, max(2, len(sources)))
    calibration = calibrate(config, dense, source, tokens, probe_tokens, about, processes)
    calibration.tokenizer, calibration.text = tokenizer, text
    return calibration


def write_checkpoint(config: CalibrationConfig, calibration: Calibration, budget: float | None, folder: Path) -> dict:
    """The checkpoint with report and plots; returns the report."""
    started = time.perf_counter()
    split = calibration.split()
    split.save_pretrained(folder)
    calibration.tokenizer.save_pretrained(folder)
    target, dense = calibration.target, dense_nbytes(calibration.target, config.tokens, torch.float16)
    # The dense model runs in any type; its weights are counted in that of the checkpoint.
    weights = sum(map(torch.Tensor.numel, split.parameters())) * calibration.stored_dtype.itemsize
    dense_weights = sum(map(torch.Tensor.numel, calibration.dense.parameters())) * calibration.stored_dtype.itemsize
    nbytes = cache_nbytes(target, config.tokens, calibration.stored_dtype)
    report = {
        "config": asdict(config),
        "environment": environment(execution_device(calibration.dense), calibration.processes),
        "text": calibration.text,
        "budget": budget,
        "nbytes": nbytes,
        "share_of_dense": nbytes / dense,
        "predicted_divergence": _predicted(calibration),
        "independent_divergence": calibration.plan and calibration.plan.divergence,
        "multiply_adds": multiply_adds(target),
        "decode": calibration.decode,
        "weights_nbytes": weights,
        "dense_weights_nbytes": dense_weights,
        "smaller_from": break_even(target, weights, dense_weights, calibration.stored_dtype),
        "truncation_ranks": target.truncation_ranks,
        "width_tiers": target.width_tiers,
        "rates": calibration.rates,
        "energies": {name: [_rounded(f.energy) for f in groups] for name, groups in calibration.factors.items()},
        "energy_kept": {name: _energy_kept(calibration, name) for name in target.truncation_ranks},
        "seconds": {k: round(v, 1) for k, v in calibration.seconds.items()}
        | {"checkpoint": round(time.perf_counter() - started, 1)},
    }
    write_json(folder / "report.json", report)
    _write_card(report, folder)
    plots.spectra(report, folder / "spectra.png")
    plots.widths(report, folder / "widths.png")
    ranks = [sum(r) for r in target.truncation_ranks.values()]
    print(
        f"{folder}: {nbytes:,} bytes at {config.tokens:,} tokens, {report['share_of_dense']:.2%} of the dense cache "
        f"({dense / nbytes:.1f}× smaller); ranks {min(ranks)}–{max(ranks)}, {sum(report['seconds'].values()):.0f} s"
    )
    if target.keep_dense:
        print(blocks_summary(report))
    return report


def blocks_summary(report: dict) -> str:
    """What blocks cost beside the bytes of the cache, in a sentence."""
    weights = report["dense_weights_nbytes"]
    more = report["weights_nbytes"] - weights
    whole = "the model as a whole is not smaller within 2^24 tokens"
    if report["smaller_from"] is not None:
        whole = f"weights and cache together are smaller than the dense model's from {report['smaller_from']:,} tokens"
    return (
        f"{report['multiply_adds']:,.0f} multiply-adds per cached token and layer; {more:,} bytes of factors "
        f"beside the dense model's {weights:,} ({more / weights:.1%} more); {whole}."
    )


def _predicted(calibration: Calibration) -> float | None:
    """The predicted KL divergence: by gradients of single tokens if they are known, else of independent errors."""
    plan = calibration.plan
    if plan is None or plan.predicted is None:
        return plan and plan.divergence
    return plan.predicted


def _write_card(report: dict, folder: Path) -> None:
    """Say in the checkpoint's README what it was calibrated on."""
    readme = folder / "README.md"
    # A folder that is written again keeps what stands before this section.
    text = readme.read_text(encoding="utf-8").partition("\n## Calibration\n")[0]
    lines = [text.rstrip(), "## Calibration", calibration_table(report)]
    if report["config"]["keep_dense"]:
        lines.append(blocks_summary(report))
    readme.write_text("\n\n".join(lines) + "\n", encoding="utf-8")


def _rounded(energies: torch.Tensor) -> list[float]:
    """Four digits of each, which a plot shows."""
    return [float(f"{energy:.4g}") for energy in energies.tolist()]


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
    calibration = calibrate_model(config, processes)
    report = on_main(processes, _write, config, calibration)
    return measure_sweep(config, processes) if config.sweep else report


def _write(config: CalibrationConfig, calibration: Calibration) -> dict | None:
    """Choose and write all checkpoints; returns the report if there is one."""
    output = Path(config.output)
    if config.share is not None:
        return write_checkpoint(config, calibration, None, output)
    fitted = {budget: _fit(config, calibration, budget) for budget in config.budgets}
    if not config.sweep:
        return write_checkpoint(config, fitted[config.budget], config.budget, output)
    for budget in config.sweep:
        write_checkpoint(config, fitted[budget], budget, output / f"{budget:g}")
    return None


def _fit(config: CalibrationConfig, calibration: Calibration, budget: float) -> Calibration:
    """Channels for a budget, and for the time of a decode step if there is a bound on it."""
    if config.decode_ms is None:
        return fit_budget(config, calibration, budget)
    where = execution_device(calibration.dense)
    return fit_in_time(config, calibration, budget, config.decode_ms, config.decode_tokens, where)


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
    print(perplexity_table(record["results"]))
    return record


if __name__ == "__main__":
    main(parse_config(CalibrationConfig, __doc__))
