r"""Time of a decode step by the shape of the blocks of projections that share a latent, against the dense model's step.

Shapes: layers of a block × one latent for all heads or one per head × keys and values apart or together. The caches
store 2 bits by calibrated scales, with a scale for each token, as the budget command makes them; each shape has as many
channels as the same bytes hold at --tokens tokens, everything counted. Measured for two geometries, random weights:

    Llama-3-8B's attention   the layers of one block, without their MLPs: times are those of a layer
    SmolLM2-135M             the whole model: times are those of a step

The caches are filled with random latents or states, on which the speed does not depend. Then steps of one token by the
same model with either cache take turns; `DynamicCache` grows by copying, step by step.

First comes a gate for each shape: the attention of all layers in a step by the chosen back end, against the same model
in float32 on the same states, may be wrong by at most twice the error of the reference back end; otherwise nothing is
reported. Cases are appended to the output one by one: an interrupted run goes on where it stopped.

    python scripts/benchmark_blocks.py --output build/benchmark_blocks.json
"""

import itertools
import os
from bisect import bisect_right
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from configuration_alrd_llama import ALRDLlamaConfig, check_positive
from modules.fit.budget import cache_nbytes, dense_nbytes, rebuild_costs
from modules.svd_linear import ALinear, MemberBLinear
from scripts.benchmark_cache import LLAMA_3_8B
from scripts.benchmark_decode import Subject, check
from scripts.common import DTYPES, environment, human_bytes, parse_config
from scripts.records import ResultsFile
from scripts.timing import SPREAD, in_turns, milliseconds, percentiles, ratios, times_faster

#: Layers of Llama-3-8B but for their MLPs, which are the same on both sides.
ATTENTION = LLAMA_3_8B | {
    "vocab_size": 64,
    "intermediate_size": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
}
#: By name; one without a number of layers has those of one block, and its times are of a layer.
GEOMETRIES = {"Llama-3-8B's attention": ATTENTION, "SmolLM2-135M": SMOLLM2}
SMALL = {"small": ATTENTION | {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}}

#: Calibrated scales of channels and tokens, and what the budget command gives a cache beside them.
STATIC = {"orientation": "per_channel", "static": True, "token_scale": True}
CACHE = {"k_bits": 2, "v_bits": 2, "group_size": 32, "residual_length": 16, "k_hadamard": False, "v_hadamard": False}


@dataclass
class BlocksBenchmarkConfig:
    """Options of the benchmark."""

    layers: list[int] = field(default_factory=lambda: [1, 3, 5], metadata={"help": "Layers of a block."})
    lengths: list[int] = field(default_factory=lambda: [4096, 32768], metadata={"help": "Tokens in the cache."})
    share: float = field(default=0.125, metadata={"help": "Bytes of the cache, a share of the dense cache's."})
    tokens: int = field(default=4096, metadata={"help": "Tokens at which the bytes are counted."})
    rounds: int = field(default=15, metadata={"help": "Steps of each cache, in turns."})
    seconds: float = field(default=4.0, metadata={"help": "No round of a case begins after this, but the first five."})
    backend: str | None = field(default=None, metadata={"help": "Back end of our cache. None: chosen by the device."})
    device: str = field(default="cpu", metadata={"help": "Where everything is."})
    dtype: Literal[DTYPES] = field(default="bfloat16", metadata={"help": "Type of the models."})
    threads: int = field(default=2, metadata={"help": "CPU threads."})
    seed: int = field(default=0, metadata={"help": "Seed of weights and states."})
    quick: bool = field(default=False, metadata={"help": "A small model and few steps, to try the script out."})
    output: str | None = field(default=None, metadata={"help": "JSON file; cases that it holds are not run again."})

    def __post_init__(self):
        if self.quick:
            self.layers, self.lengths, self.tokens, self.rounds = [1, 2], [256], 256, 2
        for name in ("layers", "lengths", "share", "tokens", "rounds", "seconds", "threads"):
            value = getattr(self, name)
            check_positive(name, *(value if isinstance(value, list) else [value]))

    def subjects(self) -> list["BlockSubject"]:
        """A model for each geometry and shape."""
        geometries = SMALL if self.quick else GEOMETRIES
        shapes = itertools.product(geometries, self.layers, (None, 1), (False, True))
        return [BlockSubject(self, name, shape=geometries[name], block=block) for name, *block in shapes]


@dataclass
class BlockSubject(Subject):
    """A random model of one shape of blocks; with a `DynamicCache` it is the dense model.

    Attributes:
        block: Layers of a block, heads that share a latent (`None`: all), whether keys and values share it.
    """

    block: tuple[int, int | None, bool] = (1, None, False)

    gate_size = (512, 4)

    @property
    def label(self) -> str:
        """Geometry and shape, e.g. "SmolLM2-135M, 3 layers, per head, keys + values"."""
        layers, heads, joint = self.block
        counted = f"{layers} layer{'s' * (layers > 1)}"
        return f"{self.name}, {counted}, {'per head' if heads else 'all heads'}, keys {'+' if joint else 'and'} values"

    @cached_property
    def config(self) -> ALRDLlamaConfig:
        """The configuration with the most channels whose cache has at most the share of the dense cache's bytes."""
        layers, heads, joint = self.block
        fields = {"num_hidden_layers": layers} | self.shape | CACHE
        # With unit variance of what comes in, queries and keys have it too, and attention is not uniform.
        fields["initializer_range"] = fields["hidden_size"] ** -0.5
        config = ALRDLlamaConfig(
            **fields,
            max_position_embeddings=2 * max(self.options.lengths),
            keep_dense=True,
            layer_group_size=layers,
            head_group_size=heads,
            joint_kv=joint,
            k_scheme=STATIC,
            v_scheme=None if joint else STATIC,
        )
        limit = self.options.share * dense_nbytes(config, self.options.tokens, self.dtype)

        def nbytes(rank: int) -> int:
            ranks = {}
            for part in config.parts():
                ranks[part.name] = [min(rank, config.full_rank(part))] * config.num_head_groups
            config.truncation_ranks = ranks
            return cache_nbytes(config, self.options.tokens, self.dtype)

        full = max(map(config.full_rank, config.parts()))
        rank = bisect_right(range(1, full + 1), limit, key=nbytes)
        if rank == 0:
            raise ValueError(f"share={self.options.share}: must hold one channel of each latent, in {self.label}")
        nbytes(rank)
        return config

    @cached_property
    @torch.no_grad()
    def latent(self) -> PreTrainedModel:
        torch.manual_seed(self.options.seed)
        model = self._random_model(self.config)
        # Latents, keys and values of unit variance; two bits of a Gaussian are best in steps of about 1.
        for module in model.modules():
            if isinstance(module, ALinear):
                module.weight.mul_((self.config.hidden_size / module.weight.shape[1]) ** 0.5)
            if isinstance(module, MemberBLinear):
                summed = module.weight.shape[1] * len(self.config.blocks()[0].members())
                module.weight.mul_((self.config.hidden_size / summed) ** 0.5)
            if getattr(module, "latent_scale", None) is not None:
                module.latent_scale.fill_(1.0)
                module.latent_zero_point.fill_(-1.5)
        return model

    @property
    def dense(self) -> PreTrainedModel:
        return self.latent


@torch.no_grad()
def measure_case(subject: BlockSubject, length: int) -> dict[str, Any]:
    """Steps with either cache, in turns, and what the cache holds."""
    options, model, config = subject.options, subject.latent, subject.config
    ours, dense = subject.latent_cache(length, 1, options.backend), subject.dense_cache(length, 1)
    nbytes = ours.nbytes_used
    token = torch.zeros((1, 1), dtype=torch.long, device=options.device)
    caches = {"ours": ours, "dense": dense}
    steps = {name: partial(model, token, past_key_values=cache) for name, cache in caches.items()}
    seconds = in_turns(steps, options.rounds, torch.device(options.device), limit_s=options.seconds, warm_up=1)
    ranks, costs = config.truncation_ranks, rebuild_costs(config)
    return {
        "geometry": subject.name,
        "shape": subject.label.removeprefix(f"{subject.name}, "),
        "length": length,
        "whole": "num_hidden_layers" in subject.shape,
        "layers": config.num_hidden_layers,
        "rank": config.group_ranks(config.blocks()[0])[0],
        "rebuild_macs": sum(cost * sum(ranks[name]) for name, cost in costs.items()),
        "factor_nbytes": sum(p.nbytes for n, p in model.named_parameters() if "_latent." in n),
        "cache_nbytes": nbytes,
        "cache_share": nbytes / dense_nbytes(config, length, subject.dtype),
        "backend": " and ".join(sorted({layer.backend_note for layer in ours.layers})),
        "rounds": len(seconds["ours"]),
        "ours": percentiles(seconds["ours"]),
        "dense": percentiles(seconds["dense"]),
        # Of the two steps of each round, which share what else the machine does.
        "speedup": percentiles(ratios(seconds["dense"], seconds["ours"])),
        "load": os.getloadavg()[0],
    }


#: Options that two runs must share for their cases to stand in one file.
KEY = ("share", "tokens", "rounds", "seconds", "backend", "device", "dtype", "threads", "seed", "quick")


def main(options: BlocksBenchmarkConfig) -> dict[str, Any]:
    """Measure the cases that the output does not hold; returns the record."""
    torch.set_num_threads(options.threads)
    here = environment(torch.device(options.device))
    key = {n: getattr(options, n) for n in KEY} | {n: here[n] for n in ("cpu", "device", "torch")}
    key["spread"] = SPREAD
    results = ResultsFile(options.output, {"key": key, "cases": {}}, holds="cases")
    results.require("key", key)
    record = results.record
    for subject in tqdm(options.subjects(), desc="Shapes"):
        sizes = {f"{subject.label}, {length}": length for length in options.lengths}
        missing = [name for name in sizes if name not in record["cases"]]
        # The gate costs as much as a case.
        gate = check(subject) if missing else None
        for name in missing:
            record["cases"][name] = measure_case(subject, sizes[name]) | {"gate": gate, "environment": here}
            record |= {"config": asdict(options), "environment": here}
            results.save()
        # The next model takes its room.
        vars(subject).pop("latent", None)
    print(blocks_tables(record))
    return record


def blocks_table(record: dict[str, Any], geometry: str) -> str:
    """Times of a step of one geometry by shape and tokens, as Markdown."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for case in record["cases"].values():
        if case["geometry"] == geometry:
            rows.setdefault(case["shape"], []).append(case)
    lengths = [case["length"] for case in next(iter(rows.values()))]
    header = ["shape", "channels of a latent", "multiply-adds", "factors"]
    for length in lengths:
        header += [f"{length:,} tokens: ms", "dense, ms", "times faster"]
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header))]
    for shape, cases in rows.items():
        first = cases[0]
        parts = 1 if first["whole"] else first["layers"]
        cells = [shape, f"{first['rank']:,}", f"{first['rebuild_macs'] / 1e3:,.0f} k"]
        cells += [human_bytes(first["factor_nbytes"] / parts)]
        for case in cases:
            for name in ("ours", "dense"):
                cells.append(milliseconds({bound: value / parts for bound, value in case[name].items()}))
            cells.append(times_faster(case["speedup"]["p50"], case["speedup"]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def blocks_tables(record: dict[str, Any]) -> str:
    """The table of each geometry under its name, and what the figures are, as Markdown."""
    cases, c = record["cases"].values(), record["config"]
    parts = []
    for geometry, whole in {case["geometry"]: case["whole"] for case in cases}.items():
        of = "of the whole model" if whole else "of a layer"
        parts.append(f"{geometry}, a step {of}:\n\n{blocks_table(record, geometry)}")
    loads, rounds = [case["load"] for case in cases], [case["rounds"] for case in cases]
    worst = max(case["gate"]["ratio"] for case in cases)
    parts.append(
        f"Multiply-adds per cached token and layer, as `max_rebuild` counts them; {c['share']:.1%} of the dense bytes "
        f"at {c['tokens']:,} tokens; medians of {min(rounds)} to {max(rounds)} steps, of the ratio round by round. "
        f"Error of the attention: at most {worst:.2f} of the reference back end's. Other work ran on the machine: load "
        f"{min(loads):.1f} to {max(loads):.1f} on {os.cpu_count()} processors."
    )
    return "\n\n".join(parts)


if __name__ == "__main__":
    main(parse_config(BlocksBenchmarkConfig, __doc__))
