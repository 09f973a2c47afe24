"""Time and memory of a calibration of a large model, projected from one layer of its shape, which is really run.

    python scripts/project_calibration.py --output build/projection.json

A model of one layer with random weights goes through the parts of the budget command that take time: statistics,
factors, distortion. What is measured is scaled to all layers and to the windows of the default calibration; the head,
which the small model lacks, is added by its multiply-adds at the rate of the layer's forward pass.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from configuration_alrd_llama import ALRDLlamaConfig, QuantScheme, check_choice
from modules.files import write_json
from modules.fit.allocation import measure_costs
from modules.fit.objectives import projection_factors
from modules.fit.statistics import collect_statistics, model_digest
from scripts.common import environment, format_table, human_bytes, parse_config

#: Shapes as in the config.json of the checkpoints on the hub.
SHAPES = {
    "Llama-3.1-8B": {"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256},
    "Llama-2-7B": {"num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 32000},
}
_COMMON = {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32}
_VOCABULARY = 1024  # of the small model


@dataclass
class ProjectionConfig:
    """Sizes that are really run, and the sizes that they stand for."""

    tokens: int = field(default=512, metadata={"help": "Tokens of the one window that is run."})
    windows: int = field(default=32, metadata={"help": "Windows of the calibration that is projected."})
    length: int = field(default=1024, metadata={"help": "Tokens per window of it."})
    head_group_size: int | None = field(default=None, metadata={"help": "Heads that share a latent; default: joint."})
    models: list[str] = field(default_factory=lambda: list(SHAPES), metadata={"help": f"Of {', '.join(SHAPES)}."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})

    def __post_init__(self):
        for name in self.models:
            check_choice("models", name, tuple(SHAPES))


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def project(config: ProjectionConfig, shape: dict) -> dict:
    """Run one layer, and scale."""
    small = LlamaConfig(**{**_COMMON, **shape, "num_hidden_layers": 1, "vocab_size": _VOCABULARY})
    torch.manual_seed(0)
    dense = LlamaForCausalLM(small).eval()
    target = ALRDLlamaConfig.from_llama(small, head_group_size=config.head_group_size)
    tokens = torch.randint(_VOCABULARY, (1, config.tokens))
    scheme = QuantScheme(orientation="per_channel", static=True)

    run: dict[str, float] = {}
    collect_statistics(dense, tokens, batch_size=1)  # warm
    with _timed(run, "digest"):
        model_digest(dense)
    with _timed(run, "statistics"):
        statistics = collect_statistics(dense, tokens, batch_size=1)
    run["statistics"] -= run["digest"]  # the weights are read once, not once a window
    with _timed(run, "forward"), torch.no_grad():
        dense(tokens, use_cache=False)
    with _timed(run, "factors"):
        factors = projection_factors(dense, target, statistics, "fisher")
    samples = {
        projection.name: getattr(statistics[0], projection.attribute).sample.chunk(target.num_head_groups, dim=-1)
        for projection in target.projections()
    }
    with _timed(run, "distortion"):
        for name, groups in factors.items():
            for f, y in zip(groups, samples[name]):
                measure_costs(f, y, scheme, 128)

    layers, windows = _COMMON["num_hidden_layers"], config.windows
    ratio, all_tokens = config.length / config.tokens, windows * config.length
    weights = sum(p.numel() for n, p in dense.model.layers.named_parameters())
    rate = config.tokens * (weights + dense.lm_head.weight.numel()) / run["forward"]  # multiply-adds per second
    head = shape["vocab_size"] * _COMMON["hidden_size"]
    seconds = {
        # Forwards and backwards through the head; the layers run once more to be differentiated.
        "statistics": layers * (windows * ratio * run["statistics"] + run["digest"]) + 2 * all_tokens * head / rate,
        "factors": layers * run["factors"],
        "distortion": layers * windows * run["distortion"],
    }
    n = shape["num_key_value_heads"] * 128
    parameters = layers * weights + 2 * head
    hidden = 4 * config.length * _COMMON["hidden_size"] * 2
    nbytes = {
        "weights in bfloat16": 2 * parameters,
        "hidden states of a batch of 4, in bfloat16": hidden * (layers + 1),
        # Logits, their gradients, probabilities and logarithms, and the cumulative sums in float64.
        "logits of 256 tokens and what is made of them": (4 * 4 + 8) * 256 * shape["vocab_size"],
        "sums on the CPU, float64": layers * 8 * (4 * n * n + 32 * 128 * 128),
        "samples on the CPU": layers * 2 * windows * 256 * n * 2,
        "factors on the CPU, float64": layers * 2 * 8 * (2 * n * n // target.num_head_groups + n * 4096),
    }
    return {"run": run, "seconds": seconds, "nbytes": nbytes, "multiply_adds_per_s": rate, "parameters": parameters}


def projection_table(record: dict) -> str:
    """The projection as Markdown."""
    models = record["results"]
    lines = [f"| | {' | '.join(models)} |", "|---" * (1 + len(models)) + "|"]
    for part in next(iter(models.values()))["seconds"]:
        lines.append(f"| {part} | " + " | ".join(f"{m['seconds'][part] / 60:.0f} min" for m in models.values()) + " |")
    total = [f"**{sum(m['seconds'].values()) / 3600:.1f} h**" for m in models.values()]
    lines.append(f"| all, on these processors | {' | '.join(total)} |")
    for part in next(iter(models.values()))["nbytes"]:
        lines.append(f"| {part} | " + " | ".join(human_bytes(m["nbytes"][part]) for m in models.values()) + " |")
    return "\n".join(lines)


def main(config: ProjectionConfig) -> dict:
    """Measure and print; returns the record."""
    results = {name: project(config, SHAPES[name]) for name in config.models}
    record = {"config": asdict(config), "environment": environment(), "results": results}
    for name, result in results.items():
        rows = [[part, f"{seconds:.2f}"] for part, seconds in result["run"].items()]
        print(f"{name}, one layer, {config.tokens} tokens:\n{format_table(['part', 'seconds'], rows)}\n")
    print(projection_table(record))
    if config.output:
        write_json(config.output, record)
    return record


if __name__ == "__main__":
    main(parse_config(ProjectionConfig, __doc__))
