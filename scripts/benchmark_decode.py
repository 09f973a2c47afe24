r"""Decode speed of whole models: the packed latent cache against the dense model with its default cache.

Measured for a random Llama of 8 layers, hidden size 1,024 and the heads of Llama-3-8B (about 150 M parameters), split
at half rank per head, and for checkpoints of the budget command against the bundled dense model. The caches are filled
with random latents (of a checkpoint with those of random tokens) or states; then both models decode in turns, greedily:

    tokens per second     of all rows together, over one whole block of steps of ours (so that packing is in it) and
                          --dense_steps of the dense model, which grows its cache by copying it, step by step
    memory                peak of the process during decode, above what it was without the cache (on Linux; on CUDA
                          that of torch's allocator)
    time to first token   of a prompt of --prompt tokens, with an empty cache

First comes a gate: the attention of all layers in a step over 1,024 tokens by the chosen back end, against the same
model in float32 on the same states, may be wrong by at most twice the error of the reference back end; otherwise
nothing is reported.
Cases are appended to the output one by one: an interrupted run goes on where it stopped.

    python scripts/benchmark_decode.py --checkpoints build/sweep/0.125 --output scripts/results/benchmark_decode.json
"""

import ctypes
import gc
import itertools
import math
import statistics
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, Cache, DynamicCache, LlamaConfig, PreTrainedModel

from configuration_alrd_llama import ALRDLlamaConfig, check_positive
from modules.cache.growing import KIVILatentLayer, SavedLayer
from modules.fit.budget import dense_nbytes
from modules.kivi_cache import CacheScheme, KIVILatentCache, config_sink_channels, config_widths
from scripts.attention_peers import GATE, relative_error
from scripts.common import (
    BUNDLED_MODEL,
    DTYPES,
    environment,
    find_model,
    folder_sha256,
    human_bytes,
    load_model,
    parse_config,
    set_ranks,
)
from scripts.records import ResultsFile
from scripts.timing import SPREAD, milliseconds, percentiles, timed, turns

#: The random model: 150 M parameters beside the tied embedding of 8 M.
RANDOM = {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 2560,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    # More than the usual 0.02, with which attention would be nearly uniform, whatever the keys.
    "initializer_range": 0.05,
}
SMALL = RANDOM | {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
}


#: Blocks of a cache that are packed, and then copied: to search the scale of every token takes long.
DIFFERENT_BLOCKS = 16


@dataclass
class DecodeBenchmarkConfig:
    """Options of the benchmark."""

    lengths: list[int] = field(default_factory=lambda: [4096, 32768, 131072], metadata={"help": "Tokens per row."})
    batches: list[int] = field(default_factory=lambda: [1, 8], metadata={"help": "Rows."})
    rank: float = field(default=0.5, metadata={"help": "Rank of the random model, a share of the full rank."})
    head_group_size: int = field(default=1, metadata={"help": "Key/value heads of it that share a latent."})
    bits: int = field(default=2, metadata={"help": "Bits of its keys and values."})
    random: bool = field(default=True, metadata={"help": "Measure the random model."})
    checkpoints: list[str] = field(
        default_factory=list, metadata={"help": "Split checkpoints to measure, folders of calibrate_svd_ranks.py."}
    )
    model: str = field(default=BUNDLED_MODEL, metadata={"help": "The dense original of the checkpoints."})
    prompt: int = field(default=4096, metadata={"help": "Tokens of the prompt whose first token is timed."})
    prompts: int = field(default=3, metadata={"help": "How often it is timed. 0: never."})
    steps: int = field(default=128, metadata={"help": "Steps of ours; those of a whole block have packing in them."})
    dense_steps: int = field(default=8, metadata={"help": "Steps of the dense model, in turns with ours."})
    backend: str | None = field(default=None, metadata={"help": "Back end of our cache. None: chosen by the device."})
    device: str = field(default="cpu", metadata={"help": "Where everything is."})
    dtype: Literal[DTYPES] = field(default="bfloat16", metadata={"help": "Type of the models."})
    threads: int = field(default=2, metadata={"help": "CPU threads."})
    memory_gib: float = field(default=8.0, metadata={"help": "Caches that need more than this are left out, visibly."})
    seed: int = field(default=0, metadata={"help": "Seed of weights and states."})
    quick: bool = field(default=False, metadata={"help": "A small random model and few steps, to try the script out."})
    output: str | None = field(default=None, metadata={"help": "JSON file; cases that it holds are not run again."})

    def __post_init__(self):
        if self.quick:
            self.lengths, self.batches, self.steps, self.dense_steps = [512], [1, 2], 6, 2
            self.prompt, self.prompts = 256, min(self.prompts, 2)
        for name in ("lengths", "batches", "dense_steps", "prompt", "threads", "memory_gib"):
            value = getattr(self, name)
            check_positive(name, *(value if isinstance(value, list) else [value]))
        if self.steps < self.dense_steps or self.steps % self.dense_steps:
            raise ValueError(f"steps={self.steps}: must be a multiple of dense_steps={self.dense_steps}")
        if not self.random and not self.checkpoints:
            raise ValueError("random=False: needs checkpoints, there is nothing else to measure")
        for checkpoint in self.checkpoints:
            find_model(checkpoint)

    def subjects(self) -> list["Subject"]:
        """The models to measure."""
        chosen = [Subject(self, Path(c).name, c) for c in self.checkpoints]
        return [Subject(self, "random")] * self.random + chosen


@dataclass
class Subject:
    """A model split into latents, and the same model dense; loaded when they are needed.

    Attributes:
        checkpoint: Folder of the split model; `None`: the random one.
        shape: Arguments of the random model's `LlamaConfig`; `None`: `RANDOM`, or `SMALL` in a quick run.
        tiers: Of the random model's latents, pairs of a share of a head's channels and their bits; `None`: one width.
    """

    options: DecodeBenchmarkConfig
    name: str
    checkpoint: str | None = None
    shape: dict[str, Any] | None = None
    tiers: tuple[tuple[float, int], ...] | None = None

    #: Tokens and rows of the gate.
    gate_size = (1024, 2)

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.options.dtype)

    def _random_config(self) -> LlamaConfig:
        shape = self.shape or (SMALL if self.options.quick else RANDOM)
        longest = 2 * max(*self.options.lengths, self.options.prompt)
        return LlamaConfig(
            **{"tie_word_embeddings": True} | shape,
            max_position_embeddings=longest,
            eos_token_id=None,
            bos_token_id=None,
        )

    def _random_model(self, config: LlamaConfig) -> PreTrainedModel:
        with torch.device(self.options.device):  # where random numbers are drawn fastest
            return AutoModelForCausalLM.from_config(config, dtype=self.dtype).eval()

    @cached_property
    def latent(self) -> PreTrainedModel:
        torch.manual_seed(self.options.seed)
        if self.checkpoint:
            return load_model(self.checkpoint, dtype=self.dtype)[0].to(self.options.device)
        config = ALRDLlamaConfig.from_llama(self._random_config(), k_bits=self.options.bits, v_bits=self.options.bits)
        set_ranks(config, self.options.rank, self.options.head_group_size)
        if self.tiers:
            config.width_tiers = {
                projection.name: [
                    [(round(share * rank), bits) for share, bits in self.tiers]
                    for rank in config.group_ranks(projection)
                ]
                for projection in config.projections()
            }
        return self._random_model(config)

    @cached_property
    def dense(self) -> PreTrainedModel:
        torch.manual_seed(self.options.seed)
        if self.checkpoint:
            return load_model(self.options.model, dtype=self.dtype)[0].to(self.options.device)
        return self._random_model(self._random_config())

    @torch.no_grad()
    def latent_cache(self, length: int, batch: int, backend: str | None) -> KIVILatentCache:
        """A packed cache, the same one for the same size, in copies of the first blocks: of random latents, or those of
        random tokens in a checkpoint, whose layers make nothing but noise of other latents."""
        cache, config = self.latent.create_kivi_cache(backend=backend), self.latent.config
        torch.manual_seed(self.options.seed)
        blocks = cache.scheme.held(length).blocks
        # As many tokens fewer as whole blocks are left out: sinks and window are those of the length.
        first = length - max(0, blocks - DIFFERENT_BLOCKS) * cache.scheme.block_length
        if self.checkpoint:
            tokens = torch.randint(config.vocab_size, (batch, first), device=self.options.device)
            self.latent(tokens, past_key_values=cache, logits_to_keep=1)
        for i, (widths, sinks) in enumerate(zip(config_widths(config), config_sink_channels(config), strict=True)):
            layer = cache.layer(i, widths)
            if not self.checkpoint:
                latents, dense = [self._states((batch, first, sum(side))) for side in widths], None
                if sinks is not None:
                    dense = {side: self._states((batch, config.sink_length, count)) for side, count in sinks.items()}
                layer.append(*latents, dense=dense)
            if first < length:
                layer.restore(lengthened(layer, length, blocks))
        return cache

    def exact_cache(self, packed: KIVILatentCache) -> KIVILatentCache:
        """What a packed cache holds, as float32 states, in a cache that keeps them as they are."""
        config = self.latent.config
        scheme = CacheScheme(k_bits=16, v_bits=16, sink_length=packed.scheme.sink_length)
        exact = KIVILatentCache(scheme, config_widths(config), backend="reference")
        for layer, held in zip(exact.layers, packed.layers, strict=True):
            latents, dense = [x.float() for x in held.states()], None
            if config.keep_dense:
                # The sinks of blocks have no latents: room for them stands in front.
                latents = [torch.nn.functional.pad(x, (0, 0, scheme.sink_length, 0)) for x in latents]
                dense = {side: states.float() for side, states in held.exact.sinks.items()}
            layer.append(*latents[: len(held.channels)], dense=dense)
        return exact

    def dense_cache(self, length: int, batch: int) -> DynamicCache:
        """A `DynamicCache` of random states."""
        config = self.dense.config
        cache = DynamicCache(config=config)
        for layer in cache.layers:
            states = [
                self._states((batch, config.num_key_value_heads, length, config.head_dim)) for _ in ("keys", "values")
            ]
            # Not by `update`, which would hold every state twice.
            layer.update(*(x[:, :, :0] for x in states))
            layer.keys, layer.values = states
        return cache

    def _states(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.options.device)


def lengthened(layer: KIVILatentLayer, length: int, blocks: int) -> SavedLayer:
    """What a layer of `length` tokens holds: its own blocks again and again, each copy in a slot of its own."""
    slots, rows = [], []
    for row in layer.rows:
        copies = tuple(range(len(slots), len(slots) + blocks))
        rows.append(row._replace(blocks=copies, counts=(layer.scheme.block_length,) * blocks))
        slots += itertools.islice(itertools.cycle(row.blocks), blocks)
    packed = {}
    for side, fields in layer.pool.storage.items():
        packed[side] = {name: tensor[slots] for name, tensor in fields.items()}
    return SavedLayer(layer.static_scales, length, layer.widths, rows, layer.exact, packed, layer.sink_channels)


@torch.no_grad()
def attention_outputs(model: PreTrainedModel, cache: KIVILatentCache) -> list[torch.Tensor]:
    """Inputs of every layer's output projection, `[B, 1, H_q * d]`, in a step of one token."""
    outputs: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, inputs: outputs.append(inputs[0]))
        for layer in model.model.layers
    ]
    model(torch.arange(len(cache.row_tokens()), device=model.device)[:, None], past_key_values=cache)
    for hook in hooks:
        hook.remove()
    return outputs


def check(subject: Subject) -> dict[str, float]:
    """The correctness gate; returns the relative error of the attention, pooled over the layers.

    Raises:
        RuntimeError: The chosen back end is wrong by more than `GATE` times as much as the reference.
    """
    (length, batch), model = subject.gate_size, subject.latent
    caches = [subject.latent_cache(length, batch, name) for name in (subject.options.backend, "reference")]
    expected = attention_outputs(deepcopy(model).float(), subject.exact_cache(caches[1]))
    errors = []
    for cache in caches:
        # Pooled over the layers: each of them is also given what those before it got wrong, well or ill.
        of_layers = list(map(relative_error, attention_outputs(model, cache), expected))
        errors.append(math.hypot(*of_layers) / len(of_layers) ** 0.5)
    if not errors[0] <= GATE * errors[1]:
        raise RuntimeError(
            f"correctness gate: error {errors[0]:.2e} of {caches[0].layers[0].backend} in {subject.name} is more than "
            f"{GATE:g} times the {errors[1]:.2e} of the reference; no figures"
        )
    return {"ours": errors[0], "reference": errors[1], "ratio": errors[0] / errors[1]}


def peak_memory(device: torch.device, reset: bool = False) -> int | None:
    """Peak bytes of the process (on CUDA: of torch's allocator) since the last reset; `None`: not known."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    if reset:
        gc.collect()
        # What is free and not given back would hide a later allocation.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))


class Decoder:
    """Greedy decoding with a filled cache.

    Attributes:
        memory: Peak bytes of decoding above what there was before the cache.
        seconds: Of every step since the first two.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, make_cache: Callable[[], Cache], batch: int):
        self.model = model
        before = peak_memory(model.device, reset=True)
        self.cache = make_cache()
        peak_memory(model.device, reset=True)
        self.token = torch.zeros((batch, 1), dtype=torch.long, device=model.device)
        for _ in range(2):
            self._step()
        self.memory = None if before is None else peak_memory(model.device) - before
        self.seconds: list[float] = []

    def _step(self) -> None:
        logits = self.model(self.token, past_key_values=self.cache, use_cache=True).logits
        self.token = logits[:, -1:].argmax(-1)

    @torch.no_grad()
    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.seconds.append(timed(self._step, self.model.device)[0])

    def figures(self) -> dict[str, Any]:
        mean = statistics.fmean(self.seconds)
        return {
            "tokens_per_s": len(self.token) / mean,
            "mean_s": mean,
            "seconds": percentiles(self.seconds),
            "steps": len(self.seconds),
            "peak_memory": self.memory,
        }


def dense_unsupported_reason(config, length: int, batch: int, dtype: torch.dtype, memory_gib: float) -> str | None:
    """Reason for leaving a dense cache out; `None`: it is measured. Its append holds one side of a layer twice."""
    need = dense_nbytes(config, length, dtype, batch) * (1 + 0.5 / config.num_hidden_layers)
    return f"would need {human_bytes(need)} of memory, above --memory_gib" if need > memory_gib * 2**30 else None


def measure_case(subject: Subject, length: int, batch: int) -> dict[str, Any]:
    """Both models decode in turns with this many tokens in the cache."""
    options = subject.options
    ours = Decoder(subject.latent, lambda: subject.latent_cache(length, batch, options.backend), batch)
    layers = ours.cache.layers
    record = {
        "model": subject.name,
        "length": length,
        "batch": batch,
        "backend": " and ".join(sorted({str(layer.backend) for layer in layers})),
        "fused": all(layer.backend.attends_to(*layer.pool.sides()) for layer in layers),
    }
    reason = dense_unsupported_reason(subject.dense.config, length, batch, subject.dtype, options.memory_gib)
    theirs = None
    if reason is None:
        theirs = Decoder(subject.dense, lambda: subject.dense_cache(length, batch), batch)
    else:
        print(f"dense cache left out of {length:,} tokens x {batch}: {reason}")
    for _ in range(options.dense_steps):
        if theirs:
            theirs.run(1)
        ours.run(options.steps // options.dense_steps)
    packed = {"cache_nbytes": ours.cache.nbytes_used, "cache_allocated": ours.cache.nbytes}
    record["ours"] = ours.figures() | packed
    dense_bytes = dense_nbytes(subject.dense.config, length, subject.dtype, batch)
    record["dense"] = theirs.figures() | {"cache_nbytes": dense_bytes} if theirs else {"left_out": reason}
    if theirs:
        record["speedup"] = record["ours"]["tokens_per_s"] / record["dense"]["tokens_per_s"]
    return record


@torch.no_grad()
def measure_first_token(subject: Subject) -> dict[str, Any]:
    """Time from a prompt to its first token, in turns."""
    options = subject.options
    vocabulary = min(subject.latent.config.vocab_size, subject.dense.config.vocab_size)
    generator = torch.Generator().manual_seed(options.seed)
    prompt = torch.randint(vocabulary, (1, options.prompt), generator=generator).to(options.device)

    contenders = {
        "ours": (subject.latent, partial(subject.latent.create_kivi_cache, backend=options.backend)),
        "dense": (subject.dense, partial(DynamicCache, config=subject.dense.config)),
    }

    def first_token(name: str) -> float:
        model, make_cache = contenders[name]
        how = {"past_key_values": make_cache(), "use_cache": True, "logits_to_keep": 1}
        return timed(lambda: model(prompt, **how).logits.argmax(-1), model.device)[0]

    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for name in contenders:  # warms up
        first_token(name)
    for name in turns(contenders, options.prompts):
        seconds[name].append(first_token(name))
    found = {name: {"seconds": percentiles(s)} for name, s in seconds.items()}
    times_faster = found["dense"]["seconds"]["p50"] / found["ours"]["seconds"]["p50"]
    return {"model": subject.name, "prompt": options.prompt, **found, "speedup": times_faster}


#: Options that two runs must share for their cases to stand in one file.
KEY = ("rank", "head_group_size", "bits", "model", "steps", "dense_steps", "backend", "device", "dtype", "threads")


def main(options: DecodeBenchmarkConfig) -> dict[str, Any]:
    """Measure the cases that the output does not hold; returns the record."""
    torch.set_num_threads(options.threads)
    here = environment(torch.device(options.device))
    key = {n: getattr(options, n) for n in (*KEY, "seed", "quick")} | {n: here[n] for n in ("cpu", "device", "torch")}
    key["spread"] = SPREAD
    results = ResultsFile(options.output, {"key": key, "cases": {}}, holds="cases")
    results.require("key", key)
    record = results.record
    for subject in options.subjects():
        every_size = itertools.product(options.lengths, options.batches)
        sizes = {f"{subject.name}, {length} x {batch}": (length, batch) for length, batch in every_size}
        prompt = f"{subject.name}, prompt of {options.prompt}"
        todo = [*sizes, *[prompt] * bool(options.prompts)]
        missing = [name for name in todo if name not in record["cases"]]
        if not missing:
            continue
        gate = check(subject)
        described = {
            "checkpoint": subject.checkpoint,
            "sha256": folder_sha256(subject.checkpoint) if subject.checkpoint else None,
            "parameters": {"ours": subject.latent.num_parameters(), "dense": subject.dense.num_parameters()},
            "cache": repr(subject.latent.create_kivi_cache(backend=options.backend)),
            "gate": gate,
        }
        for name in tqdm(missing, desc=subject.name, unit="case"):
            measured = measure_first_token(subject) if name == prompt else measure_case(subject, *sizes[name])
            record["cases"][name] = measured | described | {"environment": here}
            record |= {"config": asdict(options), "environment": here}
            results.save()
    print(decode_tables(record))
    return record


def decode_table(record: dict[str, Any]) -> str:
    """Tokens per second and memory of every case, as Markdown."""
    lines = [
        "| model | tokens × rows | ours, tokens/s | dense, tokens/s | times faster | ours, ms per step | "
        "dense, ms per step | cache, ours / dense | peak above the weights, ours / dense |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in record["cases"].values():
        if "prompt" in case:
            continue
        ours, dense = case["ours"], case["dense"]
        cells = [case["model"], f"{case['length']:,} × {case['batch']}", f"{ours['tokens_per_s']:,.1f}"]
        if "left_out" in dense:
            cells += [dense["left_out"], "", milliseconds(ours["seconds"]), "", human_bytes(ours["cache_nbytes"])]
            cells += [memory(ours)]
        else:
            cells += [f"{dense['tokens_per_s']:,.2f}", f"{case['speedup']:.1f}×", milliseconds(ours["seconds"])]
            cells += [milliseconds(dense["seconds"])]
            cells += [f"{human_bytes(ours['cache_nbytes'])} / {human_bytes(dense['cache_nbytes'])}"]
            cells += [f"{memory(ours)} / {memory(dense)}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def memory(figures: dict[str, Any]) -> str:
    return "not known" if figures["peak_memory"] is None else human_bytes(figures["peak_memory"])


def first_token_table(record: dict[str, Any]) -> str:
    """Time to the first token of every model, as Markdown."""
    lines = ["| model | prompt | ours, ms | dense, ms | times faster |", "|---|---|---|---|---|"]
    for case in record["cases"].values():
        if "prompt" in case:
            ours, dense = (milliseconds(case[name]["seconds"]) for name in ("ours", "dense"))
            cells = (case["model"], f"{case['prompt']:,}", ours, dense, f"{case['speedup']:.2f}×")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def decode_tables(record: dict[str, Any]) -> str:
    """Both tables, as Markdown."""
    return f"{decode_table(record)}\n\n{first_token_table(record)}"


if __name__ == "__main__":
    main(parse_config(DecodeBenchmarkConfig, __doc__))
