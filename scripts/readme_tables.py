"""Write the tables of README.md from the JSON that the scripts measured, so that no figure is typed by hand.

    python scripts/readme_tables.py

Each table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME.json is in scripts/results.
"""

import json
import re
from pathlib import Path

from scripts.common import ROOT, human_bytes
from scripts.eval_perplexity import table as perplexity_table

RESULTS = ROOT / "scripts" / "results"


def perplexity(record: dict) -> str:
    c, e, text = record["config"], record["environment"], record["text"]
    tokens = next(iter(record["results"].values()))["tokens"]
    return (
        f"{perplexity_table(record['results'])}\n\n"
        f"{tokens:,} scored tokens, nine tenths of whose context is packed, of {c['windows']} windows of "
        f"{c['length']:,} tokens (prefill {c['prefill']:,}, then steps of {c['chunk']}). Text: standard library of "
        f"Python {text['python']}, held-out modules, sha256 {text['sha256'][:12]}. "
        f"{record['dtype'].removeprefix('torch.')} on {e['cpu']}, torch {e['torch']}, "
        f"transformers {e['transformers']}."
    )


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


RENDERERS = {"perplexity": perplexity, "benchmark_cache": benchmark_cache}


def with_tables(text: str) -> str:
    """The Markdown `text` with every marked table made anew."""

    def render(match: re.Match) -> str:
        name = match[1]
        record = json.loads((RESULTS / f"{name}.json").read_text())
        return f"<!-- table: {name} -->\n{RENDERERS[name](record)}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", render, text, flags=re.DOTALL)


def main(path: Path = ROOT / "README.md") -> None:
    path.write_text(with_tables(path.read_text()))


if __name__ == "__main__":
    main()
