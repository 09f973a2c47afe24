r"""The surface of shapes: bytes, divergence, decode time and weights of checkpoints by the shape of their blocks.

    python scripts/frontier.py --model build/real/dense --statistics build/real/statistics --output build/frontier.json

For every shape (layers of a block × one latent for each head or for all × keys and values together or apart), every
budget and every bound on the multiply-adds of a decode step, a checkpoint is calibrated and written, its divergence
from the dense model measured through the packed cache on several texts, and a decode step timed in turns with the dense
model's. Few windows and steps of several tokens: enough to choose a shape, which `compare_peers.py` then measures in
full. Points are kept as they come, and a run that was interrupted goes on with the next one.
"""

import itertools
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from configuration_alrd_llama import CODES, check_positive
from modules.fit.budget import BLOCK_LENGTHS, fit_budget, multiply_adds
from modules.kivi_cache import CacheScheme
from scripts.benchmark_decode import DecodeBenchmarkConfig, measure_case
from scripts.calibrate_svd_ranks import CalibrationConfig, calibrate_model, write_checkpoint
from scripts.common import environment, load_model, parse_config
from scripts.eval_perplexity import EvalConfig, measure, text_names
from scripts.records import ResultsFile
from scripts.sources import TEXT_HELP, list_texts


@dataclass
class FrontierConfig:
    """The model, the shapes and budgets, and how each point is measured."""

    model: str = field(metadata={"help": "Dense model: a local folder, a GGUF file or a hub name."})
    layers: list[int] = field(default_factory=lambda: [1, 2, 3, 5, 10], metadata={"help": "Layers of a block."})
    heads: list[int] = field(default_factory=lambda: [0, 1], metadata={"help": "Heads that share a latent. 0: all."})
    code: str = field(default="trellis", metadata={"help": f"What codes mean: {', '.join(CODES)}."})
    apart: bool = field(default=False, metadata={"help": "Keys and values have latents of their own, else one."})
    budgets: list[float] = field(
        default_factory=lambda: [0.25, 0.125, 0.0625], metadata={"help": "Sizes of the cache, shares of the dense one."}
    )
    rebuild: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={"help": "Multiply-adds that are allowed, shares of those of the choice without a bound."},
    )
    calibration_text: list[str] = field(default_factory=lambda: ["mixture"], metadata={"help": TEXT_HELP})
    calibration_windows: int = field(default=32, metadata={"help": "Windows of 1,024 tokens to calibrate on."})
    text: list[str] = field(
        default_factory=lambda: ["speech:test", "stdlib:test", "manual", "licence", "cyrillic"],
        metadata={"help": "Texts to measure on: see scripts/corpus.py."},
    )
    windows: int = field(default=1, metadata={"help": "Windows of each text."})
    length: int = field(default=1920, metadata={"help": "Tokens per window."})
    prefill: int = field(default=1792, metadata={"help": "Tokens of a window that are fed at once."})
    chunk: int = field(default=16, metadata={"help": "Tokens per step after the prefill."})
    decode_tokens: int = field(default=8192, metadata={"help": "Tokens in the cache of the step that is timed."})
    steps: int = field(default=16, metadata={"help": "Steps that are timed, in turns with the dense model's."})
    threads: int = field(default=2, metadata={"help": "CPU threads."})
    statistics: str = field(default="build/statistics", metadata={"help": "Folder where statistics are kept."})
    checkpoints: str = field(default="build/frontier", metadata={"help": "Folder of the checkpoints."})
    output: str | None = field(default=None, metadata={"help": "JSON file; points that it holds are not measured."})

    def __post_init__(self):
        for name in ("layers", "budgets", "rebuild", "windows", "chunk", "decode_tokens", "steps", "threads"):
            value = getattr(self, name)
            check_positive(name, *(value if isinstance(value, list) else [value]))
        if max(self.rebuild) > 1:
            raise ValueError(f"rebuild={self.rebuild}: must be shares of the multiply-adds, at most 1")
        self.text = text_names(self.text)
        self.calibration_text = list_texts(self.calibration_text)

    def shapes(self) -> dict[str, CalibrationConfig]:
        """Options of the budget command for each shape, by a name for it."""
        common = CalibrationConfig(
            model=self.model,
            sweep=self.budgets,
            text=self.calibration_text,
            windows=self.calibration_windows,
            statistics=self.statistics,
            keep_dense=True,
            joint_kv=not self.apart,
            code=self.code,
        )
        found = {}
        for layers, heads in itertools.product(self.layers, self.heads):
            name = f"{layers} layer{'s' * (layers > 1)}, {heads or 'all'} head{'s' * (heads != 1)}, "
            name += "keys and values" if self.apart else "keys + values"
            found[name] = replace(common, layer_group_size=layers, head_group_size=heads or None)
        return found


#: Options that two runs must share for their points to stand in one file.
KEY = ("model", "code", "calibration_text", "calibration_windows", "text", "windows", "length", "prefill", "chunk")
KEY += ("decode_tokens", "steps", "threads")


def write_points(config: FrontierConfig, name: str, shape: CalibrationConfig, known: dict) -> dict[str, dict[str, Any]]:
    """Checkpoints of a shape, one for each budget and bound that is not `known`: their folders and reports by name."""
    asked: dict[str, tuple[float, float]] = {}
    for budget, share in itertools.product(config.budgets, config.rebuild):
        point = f"{name}, {budget:.4g}" + f", {share:g} of the multiply-adds" * (share < 1)
        if point not in known:
            asked[point] = (budget, share)
    found: dict[str, dict[str, Any]] = {}
    calibration = calibrate_model(shape) if asked else None
    for point, (budget, share) in asked.items():
        options, folder = replace(shape, sweep=[budget]), Path(config.checkpoints) / re.sub(r"\W+", "-", point)
        try:
            fitted = fit_budget(options, calibration, budget)
            if share < 1:
                options = replace(options, max_rebuild=int(share * multiply_adds(fitted.target)))
                fitted = fit_budget(options, calibration, budget)
        except ValueError as error:  # the shape needs more bytes
            print(f"{point}: left out, {error}")
            continue
        report = write_checkpoint(options, fitted, budget, folder)
        kept = ("share_of_dense", "predicted_divergence", "multiply_adds", "smaller_from")
        found[point] = {"shape": name, "budget": budget, "rebuild": share, "folder": str(folder)}
        found[point] |= {key: report[key] for key in kept}
        found[point]["added_weights"] = report["weights_nbytes"] / report["dense_weights_nbytes"] - 1
    return found


def measure_points(config: FrontierConfig, points: dict[str, dict[str, Any]], dense, tokenizer) -> None:
    """Put the measured divergence and the time of a decode step into each of the points."""
    caches: dict[str, tuple] = {}
    decode = DecodeBenchmarkConfig(
        random=False,
        model=config.model,
        checkpoints=[point["folder"] for point in points.values()],
        steps=config.steps,
        dense_steps=config.steps,
        threads=config.threads,
        dtype=str(dense.dtype).removeprefix("torch."),
    )
    subjects = dict(zip(points, decode.subjects(), strict=True))
    for name, subject in subjects.items():
        caches[name] = (subject.latent, subject.latent.create_kivi_cache)
    how = {name: getattr(config, name) for name in ("model", "text", "windows", "length", "prefill", "chunk")}
    # Tokens are scored that blocks of every length have packed.
    others = [CacheScheme(group_size=length, residual_length=16) for length in BLOCK_LENGTHS]
    results = measure(EvalConfig(**how, batch_size=config.windows), tokenizer, dense, caches, others)["results"]
    for name, point in points.items():
        domains = results[name].get("domains", {config.text[0]: results[name]})
        point["kl"] = {text: of_text["kl_mean"] for text, of_text in domains.items()}
        point["kl_mean"], point["tokens"] = results[name]["kl_mean"], results[name]["tokens"]
        point["increase"] = results[name]["perplexity_increase"]
        case = measure_case(subjects[name], config.decode_tokens, 1)
        point |= {side: case[side]["seconds"] for side in ("ours", "dense")}
        point["speedup"] = case["dense"]["seconds"]["p50"] / case["ours"]["seconds"]["p50"]


def main(config: FrontierConfig) -> dict[str, Any]:
    """Measure the points that the output does not hold; returns the record."""
    torch.set_num_threads(config.threads)
    key = {name: getattr(config, name) for name in KEY}
    file = ResultsFile(config.output, {"key": key, "points": {}}, holds="points")
    file.require("key", key)
    record = file.record
    dense, tokenizer = load_model(config.model)
    for name, shape in tqdm(config.shapes().items(), desc="Shapes"):
        points = write_points(config, name, shape, record["points"])
        if not points:
            continue
        measure_points(config, points, dense, tokenizer)
        record["points"] |= points
        record |= {"config": asdict(config), "environment": environment(torch.device("cpu"))}
        file.save()
    print(surface_table(record))
    return record


def surface_table(record: dict[str, Any]) -> str:
    """The points by budget, the least divergence of the worst text first, as Markdown."""
    lines = [
        "| bytes | shape | KL, all texts | worst text | perplexity | predicted KL | multiply-adds | factors beside the "
        "weights | a step: times faster than dense |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    points = record["points"].values()
    for point in sorted(points, key=lambda p: (-p["budget"], max(p["kl"].values()))):
        worst = max(point["kl"], key=point["kl"].get)
        shape = point["shape"] + f", {point['rebuild']:g} of the multiply-adds" * (point["rebuild"] < 1)
        cells = [
            f"{point['share_of_dense']:.2%}",
            shape,
            f"{point['kl_mean']:.4f}",
            f"{point['kl'][worst]:.4f} {worst}",
        ]
        cells += [f"{point['increase']:+.2%}", f"{point['predicted_divergence']:.4f}"]
        cells += [
            f"{point['multiply_adds'] / 1e3:,.0f} k",
            f"{point['added_weights']:+.0%}",
            f"{point['speedup']:.2f}×",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(parse_config(FrontierConfig, __doc__))
