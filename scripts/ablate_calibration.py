"""What each choice of the budget command contributes: objective, grouping, mean split, allocation, scales.

    python scripts/ablate_calibration.py --output build/ablation.json

Each variant differs from the default in one choice, and is measured through the cache at the same budgets, on the text
that chooses defaults and on the same tokens. Goes on where it stopped.
"""

from dataclasses import asdict, dataclass, field

import torch

from modules.fit.budget import fit_budget
from scripts.calibrate_svd_ranks import CalibrationConfig, calibrate_model
from scripts.common import BUNDLED_MODEL, find_model, folder_sha256, load_model, parse_config
from scripts.corpus import describe, load_documents
from scripts.eval_perplexity import EvalConfig, measure
from scripts.records import ResultsFile

_DYNAMIC = {"k_scheme": '{"range_method": "mse"}', "v_scheme": '{"orientation": "per_channel", "range_method": "mse"}'}
#: One width for all channels takes the cache's own scheme: measured scales, rotation, values per token, blocks of 128.
_FOUR = {"k_bits": 4, "v_bits": 4, "residual_length": 16}
_TWO = {"k_scheme": '{"range_method": "mse"}', "v_scheme": '{"range_method": "mse"}', "residual_length": 16}

#: By name, what differs from the default.
VARIANTS: dict[str, dict] = {
    "default": {},
    "objective: weight": {"objective": "weight"},
    "objective: input": {"objective": "input"},
    "objective: query, output": {"objective": "query_output"},
    "objective: query with RoPE, output": {"objective": "query_output_rope"},
    "grouping: 2 heads": {"head_group_size": 2},
    "grouping: per head": {"head_group_size": 1},
    "mean split: keys": {"k_mean_split": True},
    "mean split: keys and values": {"k_mean_split": True, "v_mean_split": True},
    "allocation: tiers, all errors cost the same": {"probe": False},
    "allocation: tiers, objective input, all errors cost the same": {"probe": False, "objective": "input"},
    "scales: measured per block of 128, not calibrated": _DYNAMIC,
    "allocation: 2 bits, water-filling": {"allocation": "water_filling", **_TWO},
    "allocation: 4 bits, water-filling": {"allocation": "water_filling", **_FOUR},
    "allocation: 4 bits, uniform": {"allocation": "uniform", **_FOUR},
    "allocation: 4 bits, Fisher (Palu)": {"allocation": "fisher", **_FOUR},
    "allocation: 4 bits, sensitivity (ASVD)": {"allocation": "sensitivity", **_FOUR},
}


@dataclass
class AblationConfig:
    """The model, the budgets, and the evaluation."""

    model: str = field(
        default=BUNDLED_MODEL, metadata={"help": "Dense model: a local folder, a GGUF file or a hub name."}
    )
    budgets: list[float] = field(
        default_factory=lambda: [0.125, 0.0625], metadata={"help": "Shares of the dense cache."}
    )
    only: list[str] = field(default_factory=list, metadata={"help": "Variants to measure; default: all."})
    text: str = field(default="stdlib:selection", metadata={"help": "Text to measure on: see scripts/corpus.py."})
    windows: int = field(default=8, metadata={"help": "Windows of 2,048 tokens, spread evenly over it."})
    prefill: int = field(default=1792, metadata={"help": "Tokens of a window that are fed at once."})
    chunk: int = field(default=32, metadata={"help": "Tokens per step after the prefill."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})


def main(config: AblationConfig) -> dict:
    """Measure what is not in the output yet; returns the record."""
    options = {name: value for name, value in asdict(config).items() if name not in ("only", "output", "budgets")}
    options |= {
        "model_sha256": folder_sha256(find_model(config.model)),
        "text_sha256": describe(load_documents(config.text))["sha256"],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    file = ResultsFile(config.output, {"options": options, "variants": {}, "results": {}})
    file.require("options", options)
    record = file.record
    evaluation = EvalConfig(
        model=config.model,
        text=config.text,
        windows=config.windows,
        prefill=config.prefill,
        chunk=config.chunk,
        batch_size=4,
    )
    for name in config.only or VARIANTS:
        if record["variants"].get(name, VARIANTS[name]) != VARIANTS[name]:
            record["results"].pop(name)  # of other settings under the same name
        record["variants"][name] = VARIANTS[name]
        results = record["results"].setdefault(name, {})
        missing = [budget for budget in config.budgets if f"{budget:g}" not in results]
        if not missing:
            continue
        print(f"\n{name}")
        calibration_config = CalibrationConfig(model=config.model, sweep=missing, **VARIANTS[name])
        calibration, caches, fitted = calibrate_model(calibration_config), {}, {}
        for budget in missing:
            try:
                fitted[budget] = fit_budget(calibration_config, calibration, budget)
            except ValueError as error:
                results[f"{budget:g}"] = {"impossible": str(error)}
                print(error)
                continue
            model = fitted[budget].split().eval()
            caches[f"{budget:g}"] = (model, model.create_kivi_cache)
        if caches:
            measured = measure(evaluation, calibration.tokenizer, load_model(config.model)[0], caches)
            tokens = {r["dense"]["tokens"] for r in record["results"].values() if "dense" in r}
            if tokens - {measured["results"]["dense"]["tokens"]}:
                raise RuntimeError(f"{name}: was scored on other tokens than the variants before")
            results["dense"] = measured["results"].pop("dense")
            results.update(measured["results"])
            record |= {key: measured[key] for key in ("environment", "text", "dtype")}
        file.save()
    print(ablation_table(record))
    return record


def ablation_table(record: dict) -> str:
    """Increase of the perplexity of every variant at every budget, as Markdown."""
    budgets = [b for b in next(iter(record["results"].values())) if b != "dense"]
    lines = [
        "| variant | " + " | ".join(f"at {float(b):.4g} of the bytes | KL mean" for b in budgets) + " |",
        "|---" * (1 + 2 * len(budgets)) + "|",
    ]
    for name, results in record["results"].items():
        cells = []
        for b in budgets:
            r = results.get(b, {})
            if "impossible" in r:
                cells += ["does not fit", ""]
            elif r:
                cells += [f"{r['perplexity_increase']:+.2%}", f"{r['kl_mean']:.4f}"]
            else:
                cells += ["", ""]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(parse_config(AblationConfig, __doc__))
