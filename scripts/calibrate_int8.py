"""Fit the constant scales of an INT8 KV cache on text: any decoder, which layers is said by a YAML file.

    python scripts/calibrate_int8.py --config scripts/int8_cache.yaml --windows 32 --output build/int8

The output folder gets the scales (`CalibratedScales.load` reads them) and a `report.json`.
"""

import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from configuration_alrd_llama import check_positive
from modules.files import write_json
from modules.formats.calibrated_int8 import calibrate, load_process_config
from scripts.common import BUNDLED_MODEL, ROOT, environment, find_model, format_table, parse_config
from scripts.corpus import describe, evenly_spread, load_documents, tokenize_windows

EXAMPLE_CONFIG = os.path.relpath(ROOT / "scripts" / "int8_cache.yaml")


@dataclass
class Int8Config:
    """The model to calibrate, how, and on which text."""

    model: str = field(
        default=BUNDLED_MODEL, metadata={"help": "Any causal LM: a local folder, a GGUF file or a hub name."}
    )
    config: str = field(default=EXAMPLE_CONFIG, metadata={"help": "YAML with the dynamic_cache process."})
    output: str = field(default="build/int8", metadata={"help": "Folder of the scales."})
    text: str = field(default="stdlib:calibration", metadata={"help": "Text for statistics: see scripts/corpus.py."})
    windows: int = field(default=32, metadata={"help": "Windows of text to run the model on."})
    length: int = field(default=1024, metadata={"help": "Tokens per window."})
    batch_size: int = field(default=4, metadata={"help": "Windows per forward."})
    percentile: float | None = field(
        default=None,
        metadata={"help": "Clip each channel to these percentiles, e.g. 99.9: above 50, at most 100. None: min-max."},
    )

    def __post_init__(self):
        check_positive("windows", self.windows)
        check_positive("length", self.length)
        check_positive("batch_size", self.batch_size)


def main(config: Int8Config) -> dict:
    """Write the scales; returns the report."""
    started = time.perf_counter()
    process = load_process_config(config.config)
    path = find_model(config.model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()

    documents = load_documents(config.text)
    windows = evenly_spread(tokenize_windows(documents, tokenizer, config.length), config.windows, config.text)
    pieces = tqdm(windows.split(config.batch_size), desc="Calibration")
    # The logits are of no use; one of them has to be computed.
    batches = ({"input_ids": piece, "logits_to_keep": 1} for piece in pieces)
    scales = calibrate(model, batches, process, config.percentile)
    scales.save(config.output)

    report = {
        "config": asdict(config),
        "environment": environment(model.device),
        "text": describe(documents),
        "tokens": scales.tokens,
        "scales": {name: describe_scales(module) for name, module in scales.modules.items()},
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_json(Path(config.output) / "report.json", report)
    print(f"{config.output}: scales from {scales.tokens:,} tokens, {report['seconds']} s")
    header = ["module", "layer", "key scale, median", "max", "value scale, median", "max"]
    print(format_table(header, [table_row(name, row) for name, row in report["scales"].items()]))
    return report


def describe_scales(module) -> dict[str, float]:
    """Layer of a calibrated module, and median and largest scale of its keys and values."""
    key_scales, value_scales = module.keys[0], module.values[0]
    return {
        "layer_idx": module.layer_idx,
        "keys_median": key_scales.median().item(),
        "keys_max": key_scales.max().item(),
        "values_median": value_scales.median().item(),
        "values_max": value_scales.max().item(),
    }


def table_row(name: str, row: dict) -> list[str]:
    """Cells of one module."""
    layer_idx, *scales = row.values()
    return [name, str(layer_idx), *(f"{scale:.5f}" for scale in scales)]


if __name__ == "__main__":
    main(parse_config(Int8Config, __doc__))
