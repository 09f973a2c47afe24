"""Write the tables of README.md and KIVI_INTEGRATION.md from measured JSON, so that no figure is typed by hand.

    python scripts/readme_tables.py

Each table stands between `<!-- table: NAME -->` and `<!-- end -->`; the JSON is in scripts/results.
"""

import json
import re
from pathlib import Path

from configuration_alrd_llama import QuantScheme
from modules.qlutattn import QLUTATTN
from scripts.ablate_calibration import table as ablation_table
from scripts.common import ROOT, human_bytes
from scripts.compare_peers import frontier_table, peers_table
from scripts.compare_schemes import drop_in_table, latent_table
from scripts.eval_perplexity import table as perplexity_table
from scripts.measure_distortion import table as distortion_table
from scripts.project_calibration import table as projection_table

RESULTS = ROOT / "scripts" / "results"


def _measured_by(record: dict, options: dict) -> str:
    """Under a table of perplexities: which text, fed how, on what; `options` are those of the evaluation."""
    e, text = record["environment"], record["text"]
    split = options["text"].removeprefix("stdlib:")
    return (
        f"{options['windows']} windows of 2,048 tokens (prefill {options['prefill']:,}, then steps of "
        f"{options['chunk']}). Text: standard library of Python {text['python']}, {split} modules, "
        f"sha256 {text['sha256'][:12]}. "
        f"{record['dtype'].removeprefix('torch.')} on {e['cpu'].split(' (')[0]}, {e['threads']} "
        f"thread{'s' * (e['threads'] > 1)}, torch {e['torch']}, transformers {e['transformers']}."
    )


def recommended(record: dict) -> str:
    c, tokens = record["config"], record["results"]["dense"]["tokens"]
    by = _measured_by(record, c)
    return f"{perplexity_table(record['results'])}\n\n{tokens:,} scored tokens, {by}"


def benchmark_cache(record: dict) -> str:
    lines = [
        "| tokens cached | packed: median / mean | `DynamicCache`: median / mean | ratio of the medians |",
        "|---|---|---|---|",
    ]
    for r in record["appends"]:
        ours, theirs = (f"{r[c]['p50']:,.0f} / {r[c]['mean']:,.0f} µs" for c in ("packed_us", "dense_us"))
        lines.append(f"| {r['length']:,} | {ours} | {theirs} | {r['dense_over_packed']:.1f}× |")
    e, step = record["environment"], max(record["decode_step_memory"]["steps"], key=lambda s: s["temporary_share"])
    return "\n".join(lines) + (
        f"\n\nTemporary memory of a decode step at {step['cached_tokens']:,} tokens: at most "
        f"{human_bytes(step['temporary_bytes'])}, {step['temporary_share']:.1%} of the layer's dense keys and values "
        f"({human_bytes(step['dense_layer_bytes'])}). {record['config']['dtype']} on {e['cpu']}, "
        f"{e['threads']} thread{'s' * (e['threads'] > 1)}, torch {e['torch']}."
    )


def distortion(record: dict) -> str:
    e = record["environment"]
    return (
        f"{distortion_table(record, 128)}\n\nBlocks of 128 tokens, groups of 128; those of 32 are in "
        f"`scripts/results/distortion.json`. torch {e['torch']}."
    )


def _schemes_note(record: dict) -> str:
    c, e, text = record["config"], record["environment"], record["text"]
    tokens = next(iter(record["results"]["both"].values()))["tokens"]
    return (
        f"{tokens:,} scored tokens of {c['windows']} windows of {c['length']:,} (prefill {c['prefill']:,}, then "
        f"steps of {c['chunk']}). Text: standard library of Python {text['python']}, modules for selection, "
        f"sha256 {text['sha256'][:12]}. {record['dtype'].removeprefix('torch.')} on {e['cpu']}, torch {e['torch']}."
    )


def schemes(record: dict) -> str:
    dense = record["results"]["both"]["dense"]["perplexity"]
    return f"{latent_table(record)}\n\nIncrease over the dense model's {dense:.3f}. {_schemes_note(record)}"


def drop_in(record: dict) -> str:
    dense = record["results"]["drop-in"]["dense"]["perplexity"]
    return f"{drop_in_table(record)}\n\nDense: {dense:.3f}. {_schemes_note(record)}"


#: QLUTATTN's targets: perplexity increase of keys and of values, memory saved, bytes packed per second.
PERPLEXITY_TARGETS, MEMORY_TARGET, THROUGHPUT_TARGET = {"K": 0.1, "V": 0.05}, (0.75, 0.875), 10e9


def qlutattn(schemes_record: dict, quantize_record: dict) -> str:
    results = schemes_record["results"]["drop-in"]
    lines = [
        "| format | perplexity increase (target) | memory saved (target 75 to 87.5%) | packed (target 10 GB/s) |",
        "|---|---|---|---|",
    ]
    for side, name in (("K", "keys"), ("V", "values")):
        for bits in (1, 2, 4):
            result = results[f"QLUTATTN {side}{bits}"]
            increase = result["perplexity"] - results["16 bit"]["perplexity"]
            saved = 1 - result["bits_per_element"][name] / 16
            speed = max(
                1e9 * r["pack"]["states_gb_per_s"]
                for r in quantize_record["results"]
                if QuantScheme(**r["scheme"]) == QLUTATTN[f"{side}{bits}"]
            )
            cells = (
                (f"{increase:+.3f} (< {PERPLEXITY_TARGETS[side]})", increase < PERPLEXITY_TARGETS[side]),
                (f"{saved:.1%}", saved >= MEMORY_TARGET[0]),
                (f"{speed / 1e9:.2f} GB/s", speed >= THROUGHPUT_TARGET),
            )
            lines.append(
                f"| {side}{bits} | " + " | ".join(f"{c}, {'met' if met else 'missed'}" for c, met in cells) + " |"
            )
    e = quantize_record["environment"]
    device = e["cpu"] if e["device"] == "cpu" else e["device"]
    return "\n".join(lines) + (
        f"\n\nOne side at a time, the other in 16 bits; the perplexity of the dense model is "
        f"{results['dense']['perplexity']:.3f}. Throughput of the states on {device}, "
        f"{e['threads']} thread{'s' * (e['threads'] > 1)}."
    )


def frontier(record: dict) -> str:
    key = record["key"]
    tokens = record["results"]["dense"]["tokens"]
    by = _measured_by(record, key)
    return (
        f"{frontier_table(record)}\n\nThe dense perplexity is {record['results']['dense']['perplexity']:.3f}; "
        f"{tokens:,} scored tokens of different documents, {by} Intervals: paired bootstrap over documents."
    )


def all_peers(record: dict) -> str:
    return peers_table(record)


def ablation(record: dict) -> str:
    o = record["options"]
    tokens = record["results"]["default"]["dense"]["tokens"]
    by = _measured_by(record, o)
    return f"{ablation_table(record)}\n\n{tokens:,} scored tokens, {by}"


def projection(record: dict) -> str:
    c, e = record["config"], record["environment"]
    return (
        f"{projection_table(record)}\n\nFrom one layer of each shape with random weights, run on {c['tokens']} tokens "
        f"in float32, scaled to {c['windows']} windows of {c['length']:,}; {e['cpu'].split(' (')[0]}, {e['threads']} "
        f"thread{'s' * (e['threads'] > 1)}, torch {e['torch']}."
    )


#: What is written between the marks of a table: the JSON files in scripts/results, and how they are shown.
RENDERERS = {
    "frontier": (["peers"], frontier),
    "peers": (["peers"], all_peers),
    "ablation": (["ablation"], ablation),
    "projection": (["projection"], projection),
    "benchmark_cache": (["benchmark_cache"], benchmark_cache),
    "distortion": (["distortion"], distortion),
    "schemes": (["schemes"], schemes),
    "drop_in": (["schemes"], drop_in),
    "recommended": (["recommended"], recommended),
    "qlutattn": (["schemes", "benchmark_quantize"], qlutattn),
}


def with_tables(text: str) -> str:
    """The Markdown `text` with every marked table made anew."""

    def render(match: re.Match) -> str:
        name = match[1]
        sources, renderer = RENDERERS[name]
        records = [json.loads((RESULTS / f"{source}.json").read_text()) for source in sources]
        return f"<!-- table: {name} -->\n{renderer(*records)}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", render, text, flags=re.DOTALL)


#: The documents with tables.
DOCUMENTS = (ROOT / "README.md", ROOT / "KIVI_INTEGRATION.md")


def main(documents: tuple[Path, ...] = DOCUMENTS) -> None:
    for path in documents:
        path.write_text(with_tables(path.read_text()))


if __name__ == "__main__":
    main()
