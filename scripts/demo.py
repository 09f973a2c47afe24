"""See it work: give the bundled Llama three budgets, measure each through the packed cache, plot, generate.

    make demo        or        python scripts/demo.py --model PATH_OR_HUB_NAME

Writes to the output folder: for each budget a checkpoint with `report.json`, `spectra.png` and `widths.png`; the
measurements in `sweep.json` and `curve.png`.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoTokenizer, set_seed

from modeling_alrd_llama import ALRDLlamaForCausalLM
from modules.fit.budget import fit_budget
from scripts.calibrate_svd_ranks import CalibrationConfig, calibrate_model, measure_sweep, write_checkpoint
from scripts.common import BUNDLED_MODEL, ROOT, parse_config
from scripts.corpus import load_documents


@dataclass
class DemoConfig:
    """The model to show, and how much work to spend on it."""

    model: str = field(
        default=BUNDLED_MODEL, metadata={"help": "Dense model: a local folder, a GGUF file or a hub name."}
    )
    budgets: list[float] = field(
        default_factory=lambda: [0.125, 0.0625, 0.04], metadata={"help": "Sizes of the cache, shares of the dense one."}
    )
    windows: int = field(default=4, metadata={"help": "Windows of 2,048 tokens to measure on."})
    prefill: int = field(default=1792, metadata={"help": "Tokens of a window that are fed at once, before the steps."})
    text: str = field(default="stdlib:test", metadata={"help": "Text to measure on: see scripts/corpus.py."})
    output: str = field(default="build/demo", metadata={"help": "Folder for everything that the demo writes."})


def continue_code(checkpoint: Path, text: str, prompt_tokens: int = 600, new_tokens: int = 100) -> None:
    """Print how the split model continues held-out code, with most of the prompt packed."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = ALRDLlamaForCausalLM.from_pretrained(checkpoint, dtype="auto")
    prompt = tokenizer(load_documents(text)[0].text, return_tensors="pt").input_ids[:, :prompt_tokens]
    cache = model.create_kivi_cache()
    set_seed(0)
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        max_new_tokens=new_tokens,
        do_sample=True,
        temperature=0.6,
    )
    print("…" + tokenizer.decode(prompt[0, -60:]) + "\n>>> generated from here >>>")
    print(tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True))
    print(f"\n{cache}")


def main(config: DemoConfig) -> dict:
    """Run the demo; returns the results of the evaluation."""
    started, folder = time.perf_counter(), Path(config.output)
    peers = str(ROOT / "scripts" / "results" / "peers.json") if config.model == BUNDLED_MODEL else None
    calibration_config = CalibrationConfig(model=config.model, sweep=config.budgets, output=config.output, peers=peers)
    print(f"1. Calibrate {config.model}: statistics on text, then ranks and widths for each budget\n")
    calibration = calibrate_model(calibration_config)
    for budget in config.budgets:
        fitted = fit_budget(calibration_config, calibration, budget)
        write_checkpoint(calibration_config, fitted, budget, folder / f"{budget:g}")
    print("\n2. Measure through the cache: prefill, then one token at a time\n")
    how = {"text": config.text, "windows": config.windows, "prefill": config.prefill}
    record = measure_sweep(calibration_config, **how)
    smallest = folder / f"{min(config.budgets):g}"
    print(f"\n3. Pictures: {folder / 'curve.png'}, {smallest / 'widths.png'}, {smallest / 'spectra.png'}")
    print(f"\n4. Generate through the cache at {min(config.budgets):.4g} of the dense bytes\n")
    continue_code(smallest, config.text)
    print(f"\nDone in {time.perf_counter() - started:.0f} s.")
    return record


if __name__ == "__main__":
    main(parse_config(DemoConfig, __doc__))
