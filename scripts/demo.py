"""See it work: split the bundled Llama, measure it through the packed cache, plot, generate.

    make demo        or        python scripts/demo.py --model PATH_OR_HUB_NAME

Writes the split checkpoint, `report.json`, `perplexity.json` and `perplexity.png` to the output folder.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
from transformers import AutoTokenizer, set_seed

from modeling_alrd_llama import ALRDLlamaForCausalLM
from scripts import calibrate_svd_ranks, eval_perplexity
from scripts.common import BUNDLED_MODEL, parse_config
from scripts.corpus import load_documents

matplotlib.use("Agg")
from matplotlib import pyplot


@dataclass
class DemoConfig:
    """The model to show, and how much work to spend on it."""

    model: str = field(default=BUNDLED_MODEL, metadata={"help": "Dense Llama: a local folder or a hub name."})
    share: float = field(default=0.5, metadata={"help": "Share of the latent channels to keep."})
    windows: int = field(default=8, metadata={"help": "Windows of 2,048 tokens to measure on."})
    prefill: int = field(default=1792, metadata={"help": "Tokens of a window that are fed at once, before the steps."})
    text: str = field(default="stdlib:test", metadata={"help": "Text to measure on: see scripts/corpus.py."})
    output: str = field(default="build/demo", metadata={"help": "Folder for everything that the demo writes."})


def plot(results: dict, path: Path) -> None:
    """Perplexity against bytes per token of a 4,096-token cache."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    latent = [(name, r) for name, r in results.items() if name != "dense"]
    axes.plot(
        [r["bytes_per_token"]["4096"] for _, r in latent], [r["perplexity"] for _, r in latent], "o-", label="latent"
    )
    for name, r in latent:
        point = (r["bytes_per_token"]["4096"], r["perplexity"])
        axes.annotate(f"{name} bit, {r['ratio']['4096']:.1f}×", point, (4, 6), textcoords="offset points")
    dense = results["dense"]
    axes.plot(dense["bytes_per_token"]["4096"], dense["perplexity"], "s", color="black", label="dense")
    axes.axhline(dense["perplexity"], color="black", linewidth=0.7, linestyle=":")
    axes.set(xscale="log", xlabel="bytes per token of cache (4,096 tokens, everything counted)", ylabel="perplexity")
    sizes = [r["bytes_per_token"]["4096"] for r in results.values()]
    axes.set_xticks(sizes, [f"{size:,.0f}" for size in sizes])
    axes.set_xticks([], minor=True)
    axes.set_title("Perplexity through the cache: low rank, then bits")
    axes.margins(x=0.15, y=0.15)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def continue_code(checkpoint: Path, text: str, prompt_tokens: int = 600, new_tokens: int = 100) -> None:
    """Print how the split model continues held-out code, with most of the prompt packed."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = ALRDLlamaForCausalLM.from_pretrained(checkpoint, dtype="auto")
    prompt = tokenizer(load_documents(text)[0].text, return_tensors="pt").input_ids[:, :prompt_tokens]
    cache = model.create_kivi_cache(k_bits=4, v_bits=4)
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
    checkpoint = folder / "checkpoint"
    print(f"1. Split {config.model} at {config.share:.0%} of the rank, weighted by queries and outputs on text\n")
    calibrate_svd_ranks.main(
        calibrate_svd_ranks.CalibrationConfig(model=config.model, output=str(checkpoint), share=config.share)
    )
    print("\n2. Measure through the cache: prefill, then one token at a time\n")
    record = eval_perplexity.main(
        eval_perplexity.EvalConfig(
            model=str(checkpoint),
            dense=config.model,
            windows=config.windows,
            prefill=config.prefill,
            text=config.text,
            output=str(folder / "perplexity.json"),
        )
    )
    plot(record["results"], folder / "perplexity.png")
    print(f"\n3. Plot: {folder / 'perplexity.png'}\n\n4. Generate through the 4-bit cache\n")
    continue_code(checkpoint, config.text)
    print(f"\nDone in {time.perf_counter() - started:.0f} s.")
    return record


if __name__ == "__main__":
    main(parse_config(DemoConfig, __doc__))
