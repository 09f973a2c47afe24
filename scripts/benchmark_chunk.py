r"""Time of many new tokens at once over a packed history: a prompt in pieces, a long turn.

    python scripts/benchmark_chunk.py --model build/real/dense --checkpoints build/real/0.125 build/real/0.0625 \
        --output build/benchmark_chunk.json

For the middle attention layer of each checkpoint a chunk of --chunk random queries attends to a cache of --lengths
tokens: by `attend_values`, which rebuilds keys and values tile by tile for the library's flash attention; by the
reference, which sums in the latent; and by `scaled_dot_product_attention` over dense keys and values. The new tokens'
attention to themselves is not in it. First comes a gate: the error of ours may be at most twice the reference's, both
against the reference in float32. The largest tensor that ours makes is recorded too.
"""

import copy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from configuration_alrd_llama import check_positive
from modules.fit.budget import dense_nbytes
from modules.kernels.attention import latent_attention
from modules.kernels.packed import LatentQuery, PackedCache, Rope
from modules.latent_step import LatentStep
from modules.svd_linear import ALinear
from scripts.benchmark_decode import GATE, DecodeBenchmarkConfig, Subject, relative_error
from scripts.common import DTYPES, environment, folder_sha256, human_bytes, parse_config
from scripts.records import ResultsFile
from scripts.timing import SPREAD, in_turns, milliseconds, percentiles, ratios, times_faster


@dataclass
class ChunkBenchmarkConfig:
    """Options of the benchmark."""

    model: str = field(metadata={"help": "Dense model that the checkpoints were split from."})
    checkpoints: list[str] = field(metadata={"help": "Split checkpoints, folders of calibrate_svd_ranks.py."})
    lengths: list[int] = field(default_factory=lambda: [16384], metadata={"help": "Tokens in the cache."})
    chunk: int = field(default=512, metadata={"help": "New tokens."})
    rounds: int = field(default=9, metadata={"help": "Times that each is measured, in turns."})
    dtype: Literal[DTYPES] = field(default="bfloat16", metadata={"help": "Type of the models."})
    threads: int = field(default=2, metadata={"help": "CPU threads."})
    output: str | None = field(default=None, metadata={"help": "JSON file; cases that it holds are not run again."})

    def __post_init__(self):
        check_positive("lengths", *self.lengths)
        for name in ("chunk", "rounds", "threads"):
            check_positive(name, getattr(self, name))

    def subjects(self) -> list[Subject]:
        how = {"model": self.model, "checkpoints": self.checkpoints, "dtype": self.dtype, "threads": self.threads}
        return DecodeBenchmarkConfig(random=False, **how).subjects()


class Allocations(TorchDispatchMode):
    """The bytes of the largest tensor that is made."""

    largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        result = function(*arguments, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


def by_tiles(query: LatentQuery, cache: PackedCache, expand_values: ALinear) -> torch.Tensor:
    """The reference, expanded: what a chunk took before."""
    return expand_values(latent_attention(query, cache).summed.to(query.states.dtype), per_head=True)


def exactly(query: LatentQuery, cache: PackedCache, expand_values: ALinear) -> torch.Tensor:
    """The same in float32, on what the cache holds."""
    keys, values = copy.deepcopy(query.expand_keys).float(), copy.deepcopy(expand_values).float()
    wide = replace(query, states=query.states.float(), expand_keys=lambda latents: keys(latents.float()))
    return by_tiles(wide, cache, values)


@torch.no_grad()
def measure_case(subject: Subject, length: int, options: ChunkBenchmarkConfig) -> dict[str, Any]:
    """The three attentions in turns."""
    model, config = subject.latent, subject.latent.config
    attention = model.model.layers[config.num_hidden_layers // 2].self_attn
    layer = subject.latent_cache(length, 1, None).layers[config.cache_layer(attention.layer_idx)]
    history, expand = layer.packed(), attention.expand_values
    rope = Rope(model.model.rotary_emb.inv_freq, model.model.rotary_emb.attention_scaling)
    step = LatentStep.place([length], None, options.chunk, model.device, has_past=True, rope=rope)
    torch.manual_seed(0)
    shape = (1, config.num_attention_heads, options.chunk, config.head_dim)
    query = attention._latent_query(torch.randn(shape, dtype=model.dtype), step)
    keys, values = torch.randn(2, 1, config.num_key_value_heads, length, config.head_dim, dtype=model.dtype)
    contenders = {
        "ours": partial(layer.backend.attend_values, query, history, expand),
        "tiles": partial(by_tiles, query, history, expand),
        "dense": partial(scaled_dot_product_attention, query.states, keys, values, enable_gqa=True),
    }
    exact = exactly(query, history, expand)
    errors = {"ours": contenders["ours"]().summed, "tiles": contenders["tiles"]()}
    errors = {name: relative_error(output, exact) for name, output in errors.items()}
    if not errors["ours"] <= GATE * errors["tiles"]:
        raise RuntimeError(f"correctness gate: errors of {subject.name} are {errors}; no figures")
    with Allocations() as allocations:
        contenders["ours"]()
    seconds = in_turns(contenders, options.rounds, warm_up=1)
    return {
        "checkpoint": subject.name,
        "sha256": folder_sha256(subject.checkpoint),
        "length": length,
        "chunk": options.chunk,
        "errors": errors,
        "largest_tensor": allocations.largest,
        "dense_nbytes": dense_nbytes(config, length, model.dtype),
        **{name: percentiles(found) for name, found in seconds.items()},
        "over_tiles": percentiles(ratios(seconds["tiles"], seconds["ours"])),
        "over_dense": percentiles(ratios(seconds["dense"], seconds["ours"])),
    }


#: Options that two runs must share for their cases to stand in one file.
KEY = ("model", "rounds", "dtype", "threads")


def main(options: ChunkBenchmarkConfig) -> dict[str, Any]:
    """Measure the cases that the output does not hold; returns the record."""
    torch.set_num_threads(options.threads)
    here = environment(torch.device("cpu"))
    key = {n: getattr(options, n) for n in KEY} | {n: here[n] for n in ("cpu", "torch")} | {"spread": SPREAD}
    results = ResultsFile(options.output, {"key": key, "cases": {}}, holds="cases")
    results.require("key", key)
    record = results.record
    for subject in options.subjects():
        for length in options.lengths:
            name = f"{subject.name}, {length} + {options.chunk}"
            if name not in record["cases"]:
                record["cases"][name] = measure_case(subject, length, options)
                record |= {"config": asdict(options), "environment": here}
                results.save()
    print(chunk_table(record))
    return record


def chunk_table(record: dict[str, Any]) -> str:
    """Times of every case, as Markdown."""
    lines = [
        "| checkpoint | tokens + new | ours, ms | by tiles in the latent, ms | dense keys, values, ms | times faster "
        "than by tiles | than dense | largest tensor, of the dense cache |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in record["cases"].values():
        cells = [case["checkpoint"], f"{case['length']:,} + {case['chunk']:,}"]
        cells += [milliseconds(case[name]) for name in ("ours", "tiles", "dense")]
        cells += [times_faster(case[name]["p50"], case[name]) for name in ("over_tiles", "over_dense")]
        cells += [f"{human_bytes(case['largest_tensor'])}, {case['largest_tensor'] / case['dense_nbytes']:.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(parse_config(ChunkBenchmarkConfig, __doc__))
