"""Write the tables of RESULTS.md and the READMEs from measured JSON, so that no figure is typed by hand.

    python scripts/results_tables.py

Each table stands between `<!-- table: NAME -->` and `<!-- end -->`; the JSON is in scripts/results. Under each table
stand the script that measured it, the `make` target that runs the script, commit and machine.
"""

import json
import operator
import re
import statistics
from pathlib import Path

from configuration_alrd_llama import QuantScheme
from modules.formats.qlutattn import QLUTATTN
from scripts import plots
from scripts.ablate_calibration import ablation_table
from scripts.benchmark_attention import attention_table, full_table, schemes_table
from scripts.benchmark_blocks import blocks_tables
from scripts.benchmark_chunk import chunk_table
from scripts.benchmark_decode import decode_table, first_token_table
from scripts.benchmark_gpu import gpu_attention_table, gpu_model_table, gpu_table
from scripts.benchmark_lookup import lookup_table
from scripts.benchmark_prefix import prefix_cells
from scripts.benchmark_vllm import vllm_table
from scripts.common import ROOT, human_bytes
from scripts.compare_peers import (
    before_table,
    equal_bytes_table,
    frontier_table,
    measured,
    peers_table,
    share,
    smaller_from,
)
from scripts.compare_schemes import drop_in_table, latent_table
from scripts.eval_long_documents import long_documents_table
from scripts.eval_perplexity import perplexity_table, text_names
from scripts.eval_retrieval import retrieval_table
from scripts.frontier import surface_table
from scripts.measure_distortion import distortion_table
from scripts.project_calibration import projection_table
from scripts.published import PUBLISHED
from scripts.rate_distortion import estimates_table, rate_table
from scripts.timing import bounds_note, milliseconds

RESULTS = ROOT / "scripts" / "results"


def _machine(e: dict) -> str:
    """Processor, threads and torch of a recorded environment."""
    return f"{e['cpu'].split(' (')[0]}, {e['threads']} thread{'s' * (e['threads'] > 1)}, torch {e['torch']}"


def _texts(names: str | list[str], text: dict) -> str:
    """Which texts a record is of; the standard library is that of a version of Python."""
    said = []
    for name in text_names(names):
        split = name.removeprefix("stdlib:")
        said.append(f"standard library of Python {text['python']}, {split} modules" if split != name else f"`{name}`")
    return f"Text: {'; '.join(said)}, sha256 {text['sha256'][:12]}."


def _measured_by(record: dict, options: dict) -> str:
    """Under a table of perplexities: which text, fed how, on what; `options` are those of the evaluation."""
    e, each = record["environment"], " of each text" if len(text_names(options["text"])) > 1 else ""
    return (
        f"{options['windows']} windows of {options.get('length', 2048):,} tokens{each} (prefill "
        f"{options['prefill']:,}, then steps of {options['chunk']}). {_texts(options['text'], record['text'])} "
        f"{record['dtype'].removeprefix('torch.')} on {_machine(e)}, "
        f"transformers {e['transformers']}."
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
        f"({human_bytes(step['dense_layer_bytes'])}). {record['config']['dtype']} on {_machine(e)}."
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
            cells = [f"{side}{bits}"]
            for cell, met in (
                (f"{increase:+.3f} (< {PERPLEXITY_TARGETS[side]})", increase < PERPLEXITY_TARGETS[side]),
                (f"{saved:.1%}", saved >= MEMORY_TARGET[0]),
                (f"{speed / 1e9:.2f} GB/s", speed >= THROUGHPUT_TARGET),
            ):
                cells.append(f"{cell}, {'met' if met else 'missed'}")
            lines.append(f"| {' | '.join(cells)} |")
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


def _keep_columns(table: str, kept: tuple[int, ...]) -> str:
    """The Markdown `table` with the columns `kept`, counted from 0."""
    lines = []
    for line in table.splitlines():
        cells = line.strip("|").split("|")
        lines.append("|" + "|".join([cells[i] for i in kept]) + "|")
    return "\n".join(lines)


def all_peers(record: dict) -> str:
    return peers_table(record)


def _real_note(record: dict) -> str:
    """Under the tables of the language model: what was measured, and how much of a cache is not quantized."""
    key, dense, unpacked = record["key"], record["results"]["dense"], set()
    for result in measured(record, "ours").values():
        settings = result["settings"]
        unpacked.add(f"a window of {settings['residual_length']} tokens or more and {settings['sink_length']} sinks")
    return (
        f"SmolLM2-135M-Instruct: dense perplexity {dense['perplexity']:.3f}; {dense['tokens']:,} scored tokens, "
        f"{_measured_by(record, key)} All bytes at 4,096 tokens; in our caches {' or '.join(sorted(unpacked))} are "
        "kept in 16 bits. Intervals: paired bootstrap over windows, drawn within each text."
    )


def _weights_note(record: dict) -> str:
    """What the factors add to the weights, and from which length on that is saved."""
    dense, said = record["results"]["dense"], []
    for result in sorted(measured(record, "ours").values(), key=lambda result: -share(result)):
        added = human_bytes(result["weight_nbytes"] - dense["weight_nbytes"])
        said.append(f"{share(result):.2%}: {added}, from {smaller_from(result, dense):,} tokens")
    return (
        f"The factors come on top of the weights ({human_bytes(dense['weight_nbytes'])}), once for all rows. What they "
        f"add, and tokens of one row from which weights and cache together are smaller: {'; '.join(said)}."
    )


def real_frontier(record: dict) -> str:
    parts = [equal_bytes_table(record)]
    if measured(record, "before"):
        parts.append(before_table(record))
    return "\n\n".join([*parts, _real_note(record), _weights_note(record)])


def real_float32(record: dict) -> str:
    c, tokens = record["config"], record["results"]["dense"]["tokens"]
    return (
        f"{perplexity_table(record['results'])}\n\n`{c['model']}` in {c['dtype']}: {tokens:,} scored tokens, "
        f"{c['windows']} windows of {c['length']:,} of each text, a prefill of {c['prefill']:,}, then steps of one."
    )


def real_figure(record: dict) -> str:
    """The figure that `compare_peers.py` draws beside its record."""
    text = ", ".join(f"`{name}`" for name in text_names(record["key"]["text"]))
    return f"![SmolLM2-135M-Instruct: perplexity against bytes, on {text}](scripts/results/real_frontier.png)"


def real_peers(record: dict) -> str:
    return f"{peers_table(record)}\n\n{_real_note(record)}"


def real_summary(record: dict, decode: dict) -> str:
    """Table of the front page: the columns of `real_frontier` that say most, and the speed of a step of one row."""
    table = _keep_columns(equal_bytes_table(record), (0, 1, 2, 3, 5, 6, 9))
    length = decode["config"]["lengths"][0]
    added = [f" a step at {length:,} tokens, times faster than `DynamicCache` |", "---|"]
    for name, _ in sorted(measured(record, "ours").items(), key=lambda item: -share(item[1])):
        case = decode["cases"].get(f"{name}, {length} x 1")
        added.append(f" {case['speedup']:.2f} |" if case else " not measured |")
    return "\n".join(map(operator.add, table.splitlines(), added))


def real_retrieval(record: dict) -> str:
    c = record["config"]
    cells = record["results"]["dense"]["cells"]
    samples = c["trials"] * len(cells)
    packed = []
    for name, result in record["results"].items():
        if name != "dense":
            packed.append(f"{name}: {sum(cell['packed'] for cell in result['cells'].values())}")
    return (
        f"{retrieval_table(record)}\n\nShare of the needles that the answer contains, by tokens and task of RULER "
        f"({record['text']['generator']}), {c['trials']} samples each, questions to each: {c['questions']}, answers of "
        f"{c['new_tokens']} tokens at most{', asked in the chat template' if c['chat'] else ''}. "
        f"Intervals: paired bootstrap over samples. {record['verdict']} Of {samples} samples all needles "
        f"were packed in {'; '.join(packed)}. {_machine(record['environment'])}."
    )


def published() -> str:
    """Table of what other methods reach on larger models, as their authors or others state it."""
    lines = [
        "| bytes of dense | method | model | figure, dense → cache | source |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(PUBLISHED, key=lambda row: -row.share):
        lines.append(f"| {row.share:.1%} | {row.method} | {row.model} | {row.figure} | {row.source} |")
    return "\n".join(lines) + (
        "\n\nTheir figures, none of them measured here, by the bytes that they state for all of the cache, scales "
        "included. Models and tasks differ from ours and from one another: a row shows what is possible at its size, "
        "and no order of methods."
    )


def ablation(record: dict) -> str:
    o = record["options"]
    tokens = record["results"]["default"]["dense"]["tokens"]
    by = _measured_by(record, o)
    return f"{ablation_table(record)}\n\n{tokens:,} scored tokens, {by}"


def chunk(record: dict) -> str:
    return (
        f"{chunk_table(record)}\n\nOne layer of SmolLM2-135M-Instruct, its history alone. "
        f"{bounds_note(record['cases'])} {record['config']['dtype']} on {_machine(record['environment'])}."
    )


def vllm(record: dict) -> str:
    c, e = record["config"], record["environment"]
    loads = [case["load"] for case in record["cases"].values()]
    return (
        f"{vllm_table(record)}\n\nSteps of all requests at once, {c['steps']} of each engine, in turns of "
        f"{c['at_a_time']}. {bounds_note(record['cases'])} vLLM {e['vllm']}, {'eager' if c['eager'] else 'compiled'}, "
        f"{c['dtype']}, pages of {c['stock_block_size']} tokens (stock) and {c['block_size']}. Other work ran on the "
        f"machine: load {min(loads):.1f} to {max(loads):.1f}. {_machine(e)}."
    )


def rate_distortion(record: dict) -> str:
    c = record["config"]
    return (
        f"{rate_table(record)}\n\nThe energies are those of {c['windows']} windows of {c['length']:,} tokens of the "
        f"default calibration text; {_machine(record['environment'])}."
    )


def estimates(record: dict) -> str:
    return (
        f"{estimates_table(record)}\n\nPredicted to second order, over the blocks of the budget command, on every "
        f"fourth of {record['config']['windows']} windows; {_machine(record['environment'])}."
    )


def projection(record: dict) -> str:
    c, e = record["config"], record["environment"]
    return (
        f"{projection_table(record)}\n\nFrom one layer of each shape with random weights, run on {c['tokens']} tokens "
        f"in float32, scaled to {c['windows']} windows of {c['length']:,}; {_machine(e)}."
    )


def _speed_note(record: dict) -> str:
    """Where and how a speed was measured."""
    e, backends = record["environment"], {c["backend"] for c in record["cases"].values() if "backend" in c}
    machine = e["cpu"] if e["device"] == "cpu" else e["device"]
    return (
        f"{bounds_note(record['cases'])} {machine}, {e['threads']} thread{'s' * (e['threads'] > 1)}, "
        f"{record['key']['dtype']}, back end "
        f"{' and '.join(sorted(backends))}, torch {e['torch']}, transformers {e['transformers']}."
    )


def _machine_note(record: dict) -> str:
    m, dtype = record["machine"], record["key"]["dtype"]
    return (
        f"Measured in the same run: {m['bytes_per_s'] / 1e9:.1f} GB/s read, {m[f'{dtype}_macs_per_s'] / 1e9:,.0f} G "
        f"multiply-adds/s in {dtype}, {m['int8_macs_per_s'] / 1e9:,.0f} G in int8. {_speed_note(record)}"
    )


def attention(record: dict) -> str:
    return f"{attention_table(record)}\n\n{schemes_table(record)}\n\n{_machine_note(record)}"


def attention_full(record: dict) -> str:
    return full_table(record)


def decode(record: dict) -> str:
    return f"{decode_table(record)}\n\n{first_token_table(record)}\n\n{_speed_note(record)}"


def blocks(record: dict) -> str:
    return f"{blocks_tables(record)} {_speed_note(record)}"


def real_long(*records: dict) -> str:
    """KL divergence of the last tokens of windows of several lengths, by checkpoint and text."""
    first = records[0]
    texts = list(first["results"]["config"]["domains"])
    lines = []
    for record in records:
        result, length = record["results"]["config"], record["config"]["length"]
        by_text = [f"{result['domains'][text]['kl_mean']:.4f}" for text in texts]
        windows, smaller = result["kl_by_window"], result["ratio"]["4096"]
        cells = [f"{1 / smaller:.2%}", f"{length:,}", f"{result['kl_mean']:.4f}", f"{statistics.median(windows):.4f}"]
        lines.append(f"| {' | '.join([*cells, f'{max(windows):.4f}', *by_text])} |")
    header = ["bytes", "tokens", "mean KL", "median window", "worst window", *(f"`{text}`" for text in texts)]
    table = "\n".join([f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *lines])
    tokens, windows = first["scored_tokens_per_window"], first["config"]["windows"]
    windows = "one window" if windows == 1 else f"{windows} windows"
    return f"{table}\n\nThe last {tokens} tokens of {windows} of each text, one token at a time."


def gpu(record: dict) -> str:
    c, e, (few, many) = record["config"], record["environment"], record["config"]["new_tokens"]
    return (
        f"{gpu_table(record)}\n\nAttention and appends: one layer of Llama-3-8B, rank {c['rank']:.0%} per head, "
        f"{c['bits']} bits; L2 cold, attention in CUDA graphs on both sides. Models: 8 layers of that shape, random; a "
        f"step is the time of {many} new tokens less that of {few}, over {many - few}. "
        f"{bounds_note(record['cases'])} {e['device']}, {c['dtype']}, "
        f"Python {e['python']}, torch {e['torch']}, triton {e['triton']}, transformers {e['transformers']}."
    )


def gpu_summary(record: dict) -> str:
    """Attention and whole models of the same record."""
    cases = list(record["cases"].values())
    of = {kind: [case for case in cases if case["kind"] == kind] for kind in ("attention", "model")}
    return f"{gpu_attention_table(of['attention'])}\n\n{gpu_model_table(of['model'])}"


#: How many times faster the attention step is to be than other codes, at 32k tokens and at 4k.
DECODE_TARGETS = {
    32768: {"DynamicCache": 15, "quanto 2 bit": 25, "hqq 2 bit": 25, "by hand": 1},
    4096: {"llama.cpp f16": 3, "llama.cpp q4_0": 6},
}
RANDOM_MODEL_TARGET, CHECKPOINT_TARGET = 8, 10


def decode_targets(attention_record: dict, decode_record: dict) -> str:
    """Table of the targets of the decode step beside the measurements."""
    cases, models = attention_record["cases"], decode_record["cases"]

    def at(length: int, group: str = "per head") -> dict | None:
        return cases.get(f"{length} x 1, rank 0.5 {group}, 2 bit")

    # Each row: the target's name, the measurement (`None`: not measured), the target. First the lower bounds.
    least = []
    for length, targets in DECODE_TARGETS.items():
        peers = (at(length) or {"peers": {}})["peers"]
        for peer, target in targets.items():
            least.append((f"{length:,} tokens: times faster than {peer}", peers.get(peer, {}).get("speedup"), target))
    for case in models.values():
        if (case.get("length"), case.get("batch")) == (32768, 1):
            kind, target = "checkpoint", CHECKPOINT_TARGET
            if case["model"] == "random":
                kind, target = "model", RANDOM_MODEL_TARGET
            name = f"32,768 tokens, {kind} {case['model']}: times faster than dense"
            least.append((name, case.get("speedup"), target))
    # Then the upper bounds.
    short, middle, long, joint = at(4096), at(32768), at(131072), at(32768, "joint")
    most = [
        (
            "32,768 tokens: time over that of reading the dense cache once (the goal)",
            middle and middle["seconds"]["p50"] / middle["dense_read_s"],
            1,
        ),
        ("32,768 tokens, joint: time over its arithmetic at the int8 peak", joint and 1 / joint["int8_peak_share"], 2),
        (
            "time per token of context, 131,072 over 4,096 tokens",
            short and long and long["seconds_per_token"] / short["seconds_per_token"],
            1.1,
        ),
        ("32,768 tokens: share of the append, packing included", middle and middle["append_share"], 0.02),
    ]
    lines = ["| what | target | measured | |", "|---|---|---|---|"]
    lines += [_target_row(*row, "≥") for row in least]
    lines += [_target_row(*row, "≤") for row in most]
    return "\n".join(lines)


def _target_row(name: str, measured: float | None, target: float, sign: str) -> str:
    if measured is None:
        return f"| {name} | {sign} {target:g} | not measured |  |"
    met = measured >= target if sign == "≥" else measured <= target
    return f"| {name} | {sign} {target:g} | {measured:.3g} | {'met' if met else 'missed'} |"


def lookup(record: dict) -> str:
    c, e = record["config"], record["environment"]
    worst = max(r["error_over_bfloat16"]["lookup"] for r in record["results"])
    return (
        f"{lookup_table(record)}\n\nOne decode step of one layer, {c['heads']} query and {c['kv_heads']} key/value "
        f"heads of {c['head_dim']}, memory cold: {c['rounds']} rounds: medians, and ratios' 20th and 80th percentile. "
        f"Error of look-up: at most {worst:.2f} of plain bfloat16's. {record['instructions']} on {_machine(e)}."
    )


def prefix(record: dict, longer: dict) -> str:
    c, e = record["config"], record["environment"]
    (name, long), tokens = next(iter(longer["models"].items())), longer["config"]["length"]
    times = {way: milliseconds(long["seconds"][way]) for way in ("computed", "loaded")}
    header, rows = prefix_cells(record)
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines) + (
        f"\n\nPrefix of {c['length']:,} tokens; each continuation goes on by {1 + c['steps']} tokens; medians of "
        f"{c['rounds']} rounds. {bounds_note(record['models'])} "
        f"Prefix of {tokens:,} tokens, {name}: computed in {times['computed']} ms, "
        f"loaded in {times['loaded']} ms, {long['times_faster']['computed']:.0f}×. {c['dtype']} on "
        f"{_machine(e)}."
    )


def _evaluation_note(record: dict) -> str:
    """Where an evaluation of compared caches was run, and on which text."""
    e, text = record["environment"], record.get("text")
    of_text = f"{_texts(record['config']['text'], text)} " if text else ""
    return f"{of_text}{_machine(e)}, transformers {e['transformers']}."


def copying(record: dict) -> str:
    c, cells = record["config"], record["results"]["dense"]["cells"]
    questions = next(iter(cells.values()))["questions"]
    return (
        f"{retrieval_table(record)}\n\nShare of right answers by tokens between listing and question: which of "
        f"{c['choices']} orders of {c['words']} words was listed? {questions} questions each. {record['verdict']} "
        f"{_evaluation_note(record)}"
    )


def long_documents(record: dict) -> str:
    c = record["config"]
    rope = json.loads(c["rope_parameters"] or "{}")
    stretched = f", positions stretched {rope['factor']:g} times by {rope['rope_type']}" if rope else ""
    return (
        f"{long_documents_table(record)}\n\nPerplexity of the dense model and increases over it by position, "
        f"{c['documents']} documents of {c['length']:,} tokens{stretched}; fed in steps of {c['chunk']}. "
        f"Intervals: paired bootstrap over documents. {_evaluation_note(record)}"
    )


def lm_eval(record: dict) -> str:
    from scripts.lm_eval_harness import scores_table  # here, as a machine that is lent for a benchmark has no lm_eval

    c, e = record["config"], record["environment"]
    return (
        f"{scores_table(record)}\n\nlm-evaluation-harness {e['lm_eval']}, the first {c['limit']} questions, every "
        f"scored token read from the cache in steps of {c['chunk']}. {_evaluation_note(record)}"
    )


def real_decode(record: dict) -> str:
    c = record["config"]
    return (
        f"{decode_table(record)}\n\nSteps of one token of SmolLM2 with the cache of each budget and, in turns, with a "
        f"`DynamicCache`, {c['dtype']}; caches of random tokens. {bounds_note(record['cases'])}"
    )


def surface(record: dict) -> str:
    c, points, texts = record["config"], record["points"].values(), ", ".join(record["config"]["text"])
    return (
        f"{surface_table(record)}\n\n{c['windows']} windows of {c['length']:,} tokens of each of {texts}: "
        f"a prefill of {c['prefill']:,}, then steps of {c['chunk']}, {next(iter(points))['tokens']:,} scored tokens. "
        f"Multiply-adds per cached token and layer. A step of one token: with {c['decode_tokens']:,} in the cache, "
        f"median of {c['steps']} in turns with the dense model's."
    )


#: Windows of SmolLM2 by share of the bytes and length.
REAL_LONG = [f"real_long_{budget}_{length}" for budget in (0.125, 0.0625) for length in (2048, 4096, 8192)]
REAL_YARN = [f"real_yarn_{budget}_{length}" for budget in (0.125, 0.0625) for length in (16384, 32768)]

#: The script and the `make` target that write each JSON file of scripts/results.
MADE_BY = {
    "ablation": ("ablate_calibration.py", "results"),
    "real_ablation": ("ablate_calibration.py", "surface"),
    "benchmark_attention": ("benchmark_attention.py", "results"),
    "benchmark_blocks": ("benchmark_blocks.py", "results"),
    "benchmark_cache": ("benchmark_cache.py", "results"),
    "benchmark_chunk": ("benchmark_chunk.py", "real-results"),
    "benchmark_decode": ("benchmark_decode.py", "results"),
    "benchmark_gpu": ("benchmark_gpu.py", "gpu"),
    "benchmark_host": ("benchmark_host.py", "results"),
    "benchmark_lookup": ("benchmark_lookup.py", "results"),
    "benchmark_prefix": ("benchmark_prefix.py", "results"),
    "benchmark_prefix_32k": ("benchmark_prefix.py", "results"),
    "benchmark_quantize": ("benchmark_quantize.py", "schemes"),
    "benchmark_vllm": ("benchmark_vllm.py", "vllm-results"),
    "copying": ("eval_retrieval.py", "results"),
    "distortion": ("measure_distortion.py", "schemes"),
    "lm_eval_harness": ("lm_eval_harness.py", "results"),
    **{name: ("eval_perplexity.py", "real-results") for name in REAL_LONG + REAL_YARN},
    "long_documents": ("eval_long_documents.py", "results"),
    "peers": ("compare_peers.py", "results"),
    "projection": ("project_calibration.py", "results"),
    "rate_distortion": ("rate_distortion.py", "real-results"),
    "real_decode": ("benchmark_decode.py", "real-results"),
    "real_decode_amx": ("benchmark_decode.py", "real-amx"),
    "vllm_amx": ("benchmark_vllm.py", "vllm-amx"),
    "real_float32": ("eval_perplexity.py", "real-results"),
    "real_float32_one_layer": ("eval_perplexity.py", "real-results"),
    "real_frontier": ("compare_peers.py", "real-results"),
    "real_ruler": ("eval_retrieval.py", "real-results"),
    "real_ruler_4k": ("eval_retrieval.py", "real-results"),
    "real_ruler_8k": ("eval_retrieval.py", "real-results"),
    "recommended": ("compare_schemes.py", "schemes"),
    "surface": ("frontier.py", "surface"),
    "schemes": ("compare_schemes.py", "schemes"),
}


def made_by(source: str, record: dict) -> str:
    """One line: which command measured `record`, at which commit, on which machine."""
    (script, target), e = MADE_BY[source], record["environment"]
    machine = e["cpu"] if e["device"] == "cpu" else e["device"]
    commit, *dirty = e["commit"].split("-")
    return (
        f"Measured by `scripts/{script}` (`make {target}`) at commit `{'-'.join([commit[:12], *dirty])}`, "
        f"{machine}, {e['threads']} thread{'s' * (e['threads'] > 1)}."
    )


#: Contents between the marks of a table: the JSON files in scripts/results, and the function that shows them.
RENDERERS = {
    "frontier": (["peers"], frontier),
    "peers": (["peers"], all_peers),
    "real_summary": (["real_frontier", "real_decode"], real_summary),
    "real_figure": (["real_frontier"], real_figure),
    "real_frontier": (["real_frontier"], real_frontier),
    "real_float32": (["real_float32"], real_float32),
    "real_float32_one_layer": (["real_float32_one_layer"], real_float32),
    "real_peers": (["real_frontier"], real_peers),
    "real_long": (REAL_LONG, real_long),
    "real_yarn": (REAL_YARN, real_long),
    "real_ruler": (["real_ruler"], real_retrieval),
    "real_ruler_4k": (["real_ruler_4k"], real_retrieval),
    "real_ruler_8k": (["real_ruler_8k"], real_retrieval),
    "real_decode": (["real_decode"], real_decode),
    "real_decode_amx": (["real_decode_amx"], real_decode),
    "chunk": (["benchmark_chunk"], chunk),
    "rate_distortion": (["rate_distortion"], rate_distortion),
    "estimates": (["rate_distortion"], estimates),
    "published": ([], published),
    "ablation": (["ablation"], ablation),
    "real_ablation": (["real_ablation"], ablation),
    "projection": (["projection"], projection),
    "benchmark_cache": (["benchmark_cache"], benchmark_cache),
    "distortion": (["distortion"], distortion),
    "schemes": (["schemes"], schemes),
    "drop_in": (["schemes"], drop_in),
    "recommended": (["recommended"], recommended),
    "qlutattn": (["schemes", "benchmark_quantize"], qlutattn),
    "attention": (["benchmark_attention"], attention),
    "attention_full": (["benchmark_attention"], attention_full),
    "decode": (["benchmark_decode"], decode),
    "decode_targets": (["benchmark_attention", "benchmark_decode"], decode_targets),
    "blocks": (["benchmark_blocks"], blocks),
    "gpu": (["benchmark_gpu"], gpu),
    "gpu_summary": (["benchmark_gpu"], gpu_summary),
    "lookup": (["benchmark_lookup"], lookup),
    "surface": (["surface"], surface),
    "vllm": (["benchmark_vllm"], vllm),
    "vllm_amx": (["vllm_amx"], vllm),
    "prefix": (["benchmark_prefix", "benchmark_prefix_32k"], prefix),
    "copying": (["copying"], copying),
    "long_documents": (["long_documents"], long_documents),
    "lm_eval": (["lm_eval_harness"], lm_eval),
}


def with_tables(text: str) -> str:
    """The Markdown `text` with every marked table made anew; where nothing is measured yet, how to measure it."""

    def render(match: re.Match) -> str:
        name = match[1]
        sources, renderer = RENDERERS[name]
        missing = [source for source in sources if not (RESULTS / f"{source}.json").exists()]
        if missing:
            commands = " and ".join(sorted({f"`make {MADE_BY[source][1]}`" for source in missing}))
            return f"<!-- table: {name} -->\n*Not measured yet: {commands} measures it.*\n<!-- end -->"
        records = [json.loads((RESULTS / f"{source}.json").read_text()) for source in sources]
        parts = [renderer(*records), "\n".join(dict.fromkeys(map(made_by, sources, records)))]
        return f"<!-- table: {name} -->\n" + "\n\n".join(filter(None, parts)) + "\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", render, text, flags=re.DOTALL)


#: The documents with tables.
DOCUMENTS = (ROOT / "README.md", ROOT / "README.zh-CN.md", ROOT / "RESULTS.md")


def main(documents: tuple[Path, ...] = DOCUMENTS) -> None:
    plots.method(RESULTS / "method.png")
    for path in documents:
        path.write_text(with_tables(path.read_text()))


if __name__ == "__main__":
    main()
