r"""Benchmark of a GPU lent for minutes: attention, whole models in `generate`, appends, packing, each beside its peer.

Rows; each is written when it is done, so a short lease is enough:

    attention   one step of one layer of Llama-3-8B (`benchmark_attention.py`): ours and PyTorch's flash attention, each
                in a CUDA graph, L2 cold
    model       8 layers of Llama-3-8B's shape, random, greedy, one row, through `generate`: ours as it runs by default,
                ours eager (`disable_compile=True`), ours with tiers of 8, 4 and 2 bits in place of one width, the dense
                model with `DynamicCache`, eager, and with `StaticCache`, which `generate` compiles. Seconds of a step
                are those of --new_tokens N1 less those of N0 over N1 - N0, on the same prompt and with room for N1
                tokens in both; beside them the time to the first token, and what the first call took: compilation,
                capture and N1 tokens (the first row of all finds the caches of the compilers empty)
    append      one token per row into one layer, growing and of fixed capacity: the device's time and the host's
    pack        quantize-and-pack against a copy of the same states (`benchmark_quantize.py`)

No row without its gate: the error of our attention, or of every layer's in a model, is at most twice that of plain
PyTorch in the model's type; `generate` gives the tokens that it gives eager; both appends store the same; packing gives
the reference's bits. A row whose gate is red, or that fails, has no figures; the others are measured all the same, and
the run ends in an error. Rows that the output holds are not measured again.

    make gpu    # the GPU tests, then: python scripts/benchmark_gpu.py --output scripts/results/benchmark_gpu.json
    python scripts/benchmark_gpu.py --quick --device cpu    # tries it out: no compilation, no graph
"""

import gc
import itertools
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import torch
from transformers import MaxLengthCriteria, PreTrainedModel, StoppingCriteriaList

from configuration_alrd_llama import check_positive
from scripts import benchmark_attention, benchmark_decode, benchmark_quantize
from scripts.benchmark_attention import YARDSTICKS, LatentLayer, measure_machine
from scripts.benchmark_decode import SMALL, Subject
from scripts.common import DTYPES, environment, parse_config
from scripts.records import ResultsFile
from scripts.timing import SPREAD, bounds, milliseconds, percentiles, timed_by_host, times_faster

LLAMA_3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "initializer_range": 0.03,
    "tie_word_embeddings": False,
}

#: Tiers of a head's channels, as the budget command deals them out: shares, and their bits.
TIERS = ((0.125, 8), (0.375, 4), (0.5, 2))

#: How a model is run: which one, arguments of `generate`, and seconds that its row takes at most.
WAYS = {
    "ours": ("latent", {}, 40),
    "ours, eager": ("latent", {"disable_compile": True}, 30),
    "ours, tiers": ("tiers", {}, 60),
    "DynamicCache": ("dense", {}, 20),
    "StaticCache": ("dense", {"cache_implementation": "static"}, 50),
}

#: Tokens for which an append's cache of fixed capacity has room beyond those that it is given.
ROOM = 256


@dataclass
class GpuBenchmarkConfig:
    """Options of the benchmark."""

    sizes: list[str] = field(
        default_factory=lambda: ["8192x1", "16384x1", "65536x1", "65536x8"],
        metadata={"help": "Attention: tokens x rows."},
    )
    contexts: list[int] = field(default_factory=lambda: [4096, 32768], metadata={"help": "Models: prompt, in tokens."})
    new_tokens: list[int] = field(
        default_factory=lambda: [16, 144], metadata={"help": "Models: N0 and N1; a block of 128 is packed in between."}
    )
    append: str = field(default="65536x1", metadata={"help": "Appends: tokens x rows in the cache."})
    rank: float = field(default=0.5, metadata={"help": "Rank per head, a share of the full rank."})
    bits: int = field(default=2, metadata={"help": "Bits of keys and values."})
    rounds: int = field(default=25, metadata={"help": "Attention: rounds, each contender once in each."})
    model_rounds: int = field(default=3, metadata={"help": "Models: how often each number of tokens is generated."})
    budget_s: float = field(default=300.0, metadata={"help": "No row begins that would end after so many seconds."})
    device: str = field(default="cuda", metadata={"help": "Where everything is."})
    dtype: Literal[DTYPES] = field(default="bfloat16", metadata={"help": "Type of layers and models."})
    threads: int = field(default=2, metadata={"help": "CPU threads."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, states and prompts."})
    quick: bool = field(default=False, metadata={"help": "Tiny shapes and few rounds, to try the script out."})
    output: str | None = field(default=None, metadata={"help": "JSON file; rows that it holds are not measured again."})

    def __post_init__(self):
        if self.quick:
            self.sizes, self.contexts, self.new_tokens, self.append = ["512x1", "512x2"], [192], [2, 6], "512x2"
            self.rounds = self.model_rounds = 2
        for name in ("contexts", "new_tokens", "rounds", "model_rounds", "budget_s", "threads"):
            value = getattr(self, name)
            check_positive(name, *(value if isinstance(value, list) else [value]))
        for name, sizes in (("sizes", self.sizes), ("append", [self.append])):
            for size in sizes:
                parts = size.split("x")
                if len(parts) != 2 or not all(part.isdecimal() for part in parts):
                    raise ValueError(f"{name}={size!r}: must be tokens x rows, like 4096x1")
        if len(self.new_tokens) != 2 or not 1 < self.new_tokens[0] < self.new_tokens[1]:
            raise ValueError(f"new_tokens={self.new_tokens}: must be two rising numbers above 1")
        self.contexts = sorted(self.contexts)  # a static cache is never made smaller than an earlier one

    def attention_options(self) -> benchmark_attention.AttentionBenchmarkConfig:
        lengths, batches = zip(*map(size_of, [*self.sizes, self.append]), strict=True)
        options = benchmark_attention.AttentionBenchmarkConfig(
            lengths=list(lengths),
            batches=list(batches),
            ranks=[self.rank],
            joint_ranks=[],
            bits=[self.bits],
            device=self.device,
            dtype=self.dtype,
            threads=self.threads,
            seed=self.seed,
            quick=self.quick,
        )
        options.rounds = self.rounds
        return options

    def subject(self, tiers: tuple | None = None) -> Subject:
        """The random model, split and dense; split into one width, or into tiers."""
        options = benchmark_decode.DecodeBenchmarkConfig(
            lengths=[max(self.contexts) + self.new_tokens[1]],
            rank=self.rank,
            bits=self.bits,
            device=self.device,
            dtype=self.dtype,
            threads=self.threads,
            seed=self.seed,
        )
        return Subject(options, "8 layers of Llama-3-8B", shape=SMALL if self.quick else LLAMA_3_8B, tiers=tiers)


def size_of(text: str) -> tuple[int, int]:
    """Tokens and rows."""
    length, batch = text.split("x")
    return int(length), int(batch)


def check_tokens(found: torch.Tensor, eager: torch.Tensor, logits: tuple[torch.Tensor, ...], eps: float) -> int:
    """The gate of `generate`: the greedy tokens `[n]` are those of eager steps, up to the first tie.

    After a tie, two logits within two units of the last place of their type, the texts are not the same any more.

    Args:
        logits: Of each eager step, `[1, vocabulary]`.
        eps: Of the model's type.

    Returns:
        How many tokens are equal from the first on.

    Raises:
        RuntimeError: A token differs that is no tie.
    """
    differing = (found != eager).nonzero()
    if not len(differing):
        return len(found)
    step = differing[0].item()
    scores = logits[step][0].float()
    gap, limit = (scores.max() - scores[found[step]]).item(), 2 * eps * scores.max().abs().item()
    if not gap <= limit:
        raise RuntimeError(
            f"correctness gate: token {step} of generate() is not that of eager steps, whose logit is {gap:.3g} higher "
            f"(a tie: {limit:.3g}); no figures"
        )
    return step


class Models:
    """The random models, made when the first row asks for one, and their gate."""

    def __init__(self, options: GpuBenchmarkConfig):
        self.options, self.device = options, torch.device(options.device)

    @cached_property
    def subjects(self) -> dict[str, Subject]:
        one_width = self.options.subject()
        return {"latent": one_width, "dense": one_width, "tiers": self.options.subject(TIERS)}

    @cached_property
    def gates(self) -> dict[str, dict[str, float]]:
        """Of the models that were measured, filled as they are."""
        return {}

    def model(self, which: str) -> PreTrainedModel:
        subject = self.subjects[which]
        return subject.dense if which == "dense" else subject.latent

    def generate(self, model: PreTrainedModel, context: int, tokens: int, **how):
        """`generate` of so many tokens after a random prompt, with room for as many as are generated at most."""
        generator = torch.Generator().manual_seed(self.options.seed)
        ids = torch.randint(model.config.vocab_size, (1, context), generator=generator).to(self.device)
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self.options.new_tokens[1],
            stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(context + tokens)]),
            do_sample=False,
            pad_token_id=0,
            **how,
        )

    def measure(self, way: str, context: int) -> dict[str, Any]:
        """One row."""
        which, how, _ = WAYS[way]
        record: dict[str, Any] = {"kind": "model", "way": way, "context": context}
        few, many = self.options.new_tokens
        run = partial(self.generate, self.model(which), context, **how)
        record["first_call_s"], ids = timed_by_host(partial(run, many), self.device)
        if which != "dense":
            # Not before the first call, for which it would compile the kernels.
            if which not in self.gates:
                self.gates[which] = benchmark_decode.check(self.subjects[which])
            record["gate"] = self.gates[which]
        if way == "ours":
            eager = self.generate(
                self.model(which),
                context,
                many,
                disable_compile=True,
                output_logits=True,
                return_dict_in_generate=True,
            )
            found, expected = ids[0, context:], eager.sequences[0, context:]
            record["equal_tokens"] = check_tokens(
                found, expected, eager.logits, torch.finfo(self.subjects[which].dtype).eps
            )
        first, steps = [], []
        for _ in range(self.options.model_rounds):
            one, short, long = (timed_by_host(partial(run, n), self.device)[0] for n in (1, few, many))
            first.append(one)
            steps.append((long - short) / (many - few))
        return record | {"step": percentiles(steps), "first_token": percentiles(first), "new_tokens": [few, many]}


def measure_attention(options: GpuBenchmarkConfig, size: str) -> dict[str, Any]:
    layer_options = options.attention_options()
    (scheme,) = [s for s in layer_options.schemes() if (s["rank"], s["head_group_size"]) == (options.rank, 1)]
    machine = measure_machine(layer_options)
    peer = YARDSTICKS[torch.device(options.device).type]
    measured = benchmark_attention.measure_case(layer_options, *size_of(size), scheme, [peer], machine)
    return {"kind": "attention", "machine": machine, **measured}


@torch.no_grad()
def measure_append(options: GpuBenchmarkConfig) -> dict[str, Any]:
    """Appends of a block, token by token, to a growing cache and to one of fixed capacity.

    Raises:
        RuntimeError: Their attention is wrong, or they do not store the same.
    """
    layer_options, (length, batch) = options.attention_options(), size_of(options.append)
    scheme = {"rank": options.rank, "head_group_size": 1, "bits": options.bits}
    record: dict[str, Any] = {"kind": "append", "length": length, "batch": batch}
    stored = {}
    for name, capacity in (("growing", None), ("fixed capacity", length + ROOM)):
        torch.manual_seed(options.seed)
        layer = LatentLayer(layer_options, scheme, length, batch, capacity)
        record[name] = layer.append | {"gate": layer.check()}
        stored[name] = layer.stored(batch - 1)
    if not all(map(torch.equal, *stored.values())):
        raise RuntimeError("correctness gate: a fixed capacity stores other bits than a growing cache; no figures")
    return record


def measure_pack(options: GpuBenchmarkConfig) -> dict[str, Any]:
    quantize = benchmark_quantize.QuantizeBenchmarkConfig(
        device=options.device,
        backends=["triton" if torch.device(options.device).type == "cuda" else "cpu"],
        bits=[2, 4],
        methods=["minmax"],
        dtype=options.dtype,
        threads=options.threads,
        quick=options.quick,
    )
    measured = benchmark_quantize.main(quantize)
    return {"kind": "pack", **{name: measured[name] for name in ("shape", "gate", "copy", "results")}}


class Row(NamedTuple):
    """A row: its name, the seconds that it takes at most, and what measures it."""

    name: str
    needs_s: float
    measure: Callable[[], dict[str, Any]]


def rows(options: GpuBenchmarkConfig) -> Iterator[Row]:
    """Every row: the first finds nothing compiled, the last ones take longest."""
    models = Models(options)
    of_models = []
    for context, way in itertools.product(options.contexts, WAYS):
        needs_s = WAYS[way][2]
        of_models.append(Row(f"model, {context}, {way}", needs_s, partial(models.measure, way, context)))
    first, *others = of_models
    yield first
    for size in options.sizes:
        yield Row(f"attention, {size}", 20, partial(measure_attention, options, size))
    yield from (row for row in others if not row.name.endswith("StaticCache"))
    yield Row(f"append, {options.append}", 15, partial(measure_append, options))
    yield Row("pack", 15, partial(measure_pack, options))
    yield from (row for row in others if row.name.endswith("StaticCache"))


@contextmanager
def empty_compiler_caches() -> Iterator[None]:
    """Give Triton and `torch.compile` empty caches, and leave them none: a first call is that of a new user."""
    with tempfile.TemporaryDirectory() as folder:
        places = {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        with patch.dict(os.environ, places):
            yield


#: Options that two runs must share for their rows to stand in one file.
KEY = ("new_tokens", "rank", "bits", "rounds", "model_rounds", "dtype", "threads", "seed", "quick")


def main(options: GpuBenchmarkConfig) -> dict[str, Any]:
    """Measure the rows that the output does not hold, as far as the budget goes; returns the record.

    Raises:
        ValueError: There is no such device, or the output holds rows of other options, or of another device, commit or
            release.
        RuntimeError: A row failed; the others are measured.
    """
    started = time.perf_counter()
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={options.device!r}: this machine has none; --quick --device cpu tries the script out")
    torch.set_num_threads(options.threads)
    here = environment(options.device)
    names = ("device", "cpu", "python", "torch", "transformers", "triton", "commit")
    key = {name: getattr(options, name) for name in KEY} | {name: here[name] for name in names}
    key["spread"] = SPREAD
    results = ResultsFile(options.output, {"key": key, "cases": {}}, holds="cases")
    results.require("key", key)
    record = results.record
    late, failed = [], []
    for row in rows(options):
        if row.name in record["cases"]:
            continue
        began = time.perf_counter()
        if began - started + (0 if options.quick else row.needs_s) > options.budget_s:
            late.append(row.name)
            continue
        gc.collect()
        if torch.device(options.device).type == "cuda":
            torch.cuda.empty_cache()
        try:
            measured = row.measure()
        except Exception:
            # The next rows may be the only ones that this machine will ever measure.
            traceback.print_exc()
            failed.append(row.name)
            continue
        took = time.perf_counter() - began
        record["cases"][row.name] = measured | {"row_s": took}
        record |= {"config": asdict(options), "environment": here}
        results.save()
        print(f"{row.name}: measured in {took:.1f} s", flush=True)
    print(gpu_table(record))
    if late:
        print(f"budget_s={options.budget_s:g}: reached; not measured: {'; '.join(late)}")
    if failed:
        raise RuntimeError(f"no figures of {'; '.join(failed)}: see above")
    return record


def _markdown(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines))


def gpu_table(record: dict[str, Any]) -> str:
    """All rows, a table per kind, as Markdown."""
    cases: dict[str, list[dict[str, Any]]] = {}
    for case in record["cases"].values():
        cases.setdefault(case["kind"], []).append(case)
    tables = {
        "attention": gpu_attention_table,
        "model": gpu_model_table,
        "append": gpu_append_table,
        "pack": gpu_pack_table,
    }
    return "\n\n".join(make(cases[kind]) for kind, make in tables.items() if kind in cases)


def _microseconds(seconds: dict[str, float]) -> str:
    low, high = bounds(seconds)
    return f"{1e6 * seconds['p50']:,.0f} [{1e6 * low:,.0f}–{1e6 * high:,.0f}]"


def gpu_attention_table(cases: list[dict[str, Any]]) -> str:
    lines = []
    for case in cases:
        ((name, peer),) = case["peers"].items()
        ratio = times_faster(peer["speedup"], peer["speedup_rounds"])
        size = f"{case['length']:,} × {case['batch']}"
        lines.append([size, _microseconds(peer["ours_seconds"]), f"{name}: {_microseconds(peer['seconds'])}", ratio])
    return _markdown(["attention, tokens × rows", "ours, µs", "peer, µs", "times faster"], lines)


def gpu_model_table(cases: list[dict[str, Any]]) -> str:
    order = list(WAYS)
    lines = []
    for case in sorted(cases, key=lambda case: (case["context"], order.index(case["way"]))):
        times = [milliseconds(case["step"]), milliseconds(case["first_token"]), f"{case['first_call_s']:.1f}"]
        lines.append([f"{case['context']:,}", case["way"], *times])
    header = ["prompt", "`generate` with", "ms per step", "first token, ms", "first call, s"]
    return _markdown(header, lines)


def gpu_append_table(cases: list[dict[str, Any]]) -> str:
    lines = []
    for case, name in itertools.product(cases, ("growing", "fixed capacity")):
        times = [f"{1e6 * case[name][figure]:,.0f}" for figure in ("p50_s", "mean_s", "host_p50_s")]
        lines.append([f"{case['length']:,} × {case['batch']}", name, *times])
    return _markdown(["append, tokens × rows", "cache", "median, µs", "mean, packing in it, µs", "host, µs"], lines)


def gpu_pack_table(cases: list[dict[str, Any]]) -> str:
    lines = []
    for case in cases:
        for r in case["results"]:
            speed = r["pack"]["gb_per_s"]
            lines.append([r["name"], f"{speed:,.0f}", f"{speed / case['copy']['gb_per_s']:.2f}"])
    return _markdown(["quantize and pack", "GB/s", "of a copy"], lines)


if __name__ == "__main__":
    with empty_compiler_caches():
        main(parse_config(GpuBenchmarkConfig, __doc__))
