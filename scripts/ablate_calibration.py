r"""Contribution of each choice of the budget command: objective, grouping, mean split, allocation, scales.

    python scripts/ablate_calibration.py --output build/ablation.json
    python scripts/ablate_calibration.py --blocks --model build/real/dense --calibration_text mixture \
        --text speech:test stdlib:test manual licence cyrillic --windows 2 --length 1920 --chunk 4 \
        --statistics build/real/statistics --output build/real_ablation.json

Each variant differs from the default in one choice, and is measured through the cache at the same budgets, on the same
tokens. Without --blocks the default is a latent for each projection (`--keep_dense false` of the budget command), with
it the blocks that `make real` makes. Goes on where it stopped.
"""

from dataclasses import asdict, dataclass, field

import torch

from modules.fit.budget import BLOCK_LENGTHS, fit_budget
from modules.kivi_cache import CacheScheme
from scripts.calibrate_svd_ranks import CalibrationConfig, calibrate_model
from scripts.common import BUNDLED_MODEL, find_model, folder_sha256, load_model, parse_config
from scripts.corpus import describe, load_documents
from scripts.eval_perplexity import EvalConfig, measure, text_names
from scripts.records import ResultsFile
from scripts.sources import TEXT_HELP, list_texts

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
    "allocation: tiers, cost of errors measured": {"probe": True},
    "allocation: tiers, objective input, all errors cost the same": {"probe": False, "objective": "input"},
    "scales: measured per block of 128, not calibrated": _DYNAMIC,
    "allocation: 2 bits, water-filling": {"allocation": "water_filling", **_TWO},
    "allocation: 4 bits, water-filling": {"allocation": "water_filling", **_FOUR},
    "allocation: 4 bits, uniform": {"allocation": "uniform", **_FOUR},
    "allocation: 4 bits, Fisher (Palu)": {"allocation": "fisher", **_FOUR},
    "allocation: 4 bits, sensitivity (ASVD)": {"allocation": "sensitivity", **_FOUR},
}

#: Tokens of the longest window among the variants of blocks.
WINDOW = 64
#: Blocks as `make real` makes them.
BLOCKS = {"keep_dense": True, "layer_group_size": 3, "joint_kv": True, "code": "trellis"}
#: What differs from them.
BLOCK_VARIANTS: dict[str, dict] = {
    "default": {},
    "layers: 1": {"layer_group_size": 1},
    "layers: 2": {"layer_group_size": 2},
    "layers: 5": {"layer_group_size": 5},
    "keys and values: apart": {"joint_kv": False},
    "heads: a latent for each": {"head_group_size": 1},
    "no blocks": {"keep_dense": False, "layer_group_size": 1, "joint_kv": False},
    "no blocks, objective: input": {
        "keep_dense": False,
        "layer_group_size": 1,
        "joint_kv": False,
        "objective": "input",
        "probe": False,
    },
    "scale of each token: none": {"token_scale": False},
    "codes: uniform": {"code": "uniform"},
    "text: code alone": {"text": ["stdlib:calibration"]},
    "text: half as many windows": {"windows": 16},
    "text: twice as many windows": {"windows": 64},
    "sinks: none": {"sink_length": 0},
    "window: none": {"residual_length": 0},
    f"window: {WINDOW} tokens": {"residual_length": WINDOW},
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
    blocks: bool = field(default=False, metadata={"help": "Variants of blocks of layers, else of single projections."})
    only: list[str] = field(default_factory=list, metadata={"help": "Variants to measure; default: all."})
    calibration_text: list[str] = field(default_factory=lambda: ["stdlib:calibration"], metadata={"help": TEXT_HELP})
    statistics: str = field(default="build/statistics", metadata={"help": "Folder where statistics are kept."})
    text: list[str] = field(
        default_factory=lambda: ["stdlib:selection"], metadata={"help": "Texts to measure on: see scripts/corpus.py."}
    )
    windows: int = field(default=8, metadata={"help": "Windows of each text, spread evenly over it."})
    length: int = field(default=2048, metadata={"help": "Tokens per window."})
    prefill: int = field(default=1792, metadata={"help": "Tokens of a window that are fed at once."})
    chunk: int = field(default=32, metadata={"help": "Tokens per step after the prefill."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})

    def __post_init__(self):
        self.text, self.calibration_text = text_names(self.text), list_texts(self.calibration_text)
        unknown = set(self.only) - set(self.variants)
        if unknown:
            raise ValueError(f"only={sorted(unknown)}: must be among {', '.join(self.variants)}")

    @property
    def variants(self) -> dict[str, dict]:
        """Options of the budget command by name of the variant."""
        if not self.blocks:
            return VARIANTS
        return {name: BLOCKS | changed for name, changed in BLOCK_VARIANTS.items()}


def main(config: AblationConfig) -> dict:
    """Measure what is not in the output yet; returns the record."""
    unrelated = ("only", "output", "budgets", "statistics")
    options = {name: value for name, value in asdict(config).items() if name not in unrelated}
    options |= {
        "model_sha256": folder_sha256(find_model(config.model)),
        "text_sha256": [describe(load_documents(text))["sha256"] for text in config.text],
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
        length=config.length,
        prefill=config.prefill,
        chunk=config.chunk,
        batch_size=4,
    )
    dense = load_model(config.model)[0]
    for name in config.only or config.variants:
        variant = config.variants[name]
        if record["variants"].get(name, variant) != variant:
            record["results"].pop(name)  # of other settings under the same name
        record["variants"][name] = variant
        results = record["results"].setdefault(name, {})
        missing = [budget for budget in config.budgets if f"{budget:g}" not in results]
        if not missing:
            continue
        print(f"\n{name}")
        common = {"model": config.model, "sweep": missing, "statistics": config.statistics, "keep_dense": config.blocks}
        calibration_config = CalibrationConfig(**{**common, "text": config.calibration_text, **variant})
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
            # All variants are scored on tokens behind the longest window and block of any.
            others = [CacheScheme(group_size=length, residual_length=WINDOW) for length in BLOCK_LENGTHS]
            measured = measure(evaluation, calibration.tokenizer, dense, caches, others if config.blocks else None)
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
    """Increase of the perplexity and divergence of every variant at every budget, as Markdown; of several texts also
    the worst one's divergence."""
    budgets = [b for b in next(iter(record["results"].values())) if b != "dense"]
    kl = "KL mean"
    if len(text_names(record["options"]["text"])) > 1:
        kl += " (worst text)"
    lines = [
        "| variant | " + " | ".join(f"at {float(b):.4g} of the bytes | {kl}" for b in budgets) + " |",
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
                by_text = [of_text["kl_mean"] for of_text in r.get("domains", {}).values()]
                if by_text:
                    cells[-1] += f" ({max(by_text):.4f})"
            else:
                cells += ["", ""]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(parse_config(AblationConfig, __doc__))
