r"""Host time of an eager decode step on a GPU, measured on a machine without one.

What a user of an eager step waits for at short contexts is Python: the preparation of the launches, not the kernels.
Here a random model of tiny layers decodes on the CPU by the `triton` back end, in two ways:

    prepared    every launch `kernel[grid](**arguments)` of ours does nothing; all that comes before it is done
    launched    the launches are made as on a GPU (arguments bound and specialised, the compiled kernel looked up) up to
                the driver's own, which a function that does nothing stands for

The kernels of PyTorch run, on states of a few numbers. Against both, in turns: the dense model of the same shape with a
`DynamicCache`, whose time is that of its operators' dispatch. Ratios are of the rounds, with their 20th and 80th
percentile. The growing cache holds no packed block before 164 tokens; one of fixed capacity always has room for one.

First comes a gate: each layer's step must have launched kernels; otherwise nothing is reported.

    python scripts/benchmark_host.py --output scripts/results/benchmark_host.json
"""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any
from unittest.mock import patch
from weakref import WeakKeyDictionary

import torch
import triton
from tqdm import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import KernelInterface

from configuration_alrd_llama import ALRDLlamaConfig, check_positive
from modeling_alrd_llama import ALRDLlamaForCausalLM
from modules.files import write_json
from modules.kernels.triton import append as append_triton
from modules.kernels.triton import attention as attention_triton
from modules.kernels.triton import common
from modules.kernels.triton import quantize as quantize_triton
from scripts.benchmark_decode import SMALL
from scripts.common import environment, parse_config, set_ranks
from scripts.timing import bounds, milliseconds, percentiles, ratios, turns

KERNEL_MODULES = (quantize_triton, attention_triton, append_triton)

#: Tokens for which a cache of fixed capacity has room beyond those of the context.
ROOM = 128


@dataclass
class HostBenchmarkConfig:
    """Options of the benchmark."""

    contexts: list[int] = field(default_factory=lambda: [64, 256], metadata={"help": "Tokens per row in the cache."})
    batches: list[int] = field(default_factory=lambda: [1, 8], metadata={"help": "Rows."})
    layers: int = field(default=8, metadata={"help": "Layers of the model."})
    rank: float = field(default=0.5, metadata={"help": "Rank per head, a share of the full rank of 16."})
    bits: int = field(default=2, metadata={"help": "Bits of keys and values."})
    launcher: bool = field(default=True, metadata={"help": "Measure Triton's launcher too; it compiles the kernels."})
    steps: int = field(default=16, metadata={"help": "Steps of a round."})
    rounds: int = field(default=15, metadata={"help": "Rounds, each contender once in each."})
    threads: int = field(default=1, metadata={"help": "CPU threads."})
    seed: int = field(default=0, metadata={"help": "Seed of weights and tokens."})
    quick: bool = field(default=False, metadata={"help": "One case of two layers and two rounds, without launcher."})
    output: str | None = field(default=None, metadata={"help": "JSON file to write."})

    def __post_init__(self):
        if self.quick:
            self.contexts, self.batches, self.layers, self.steps, self.rounds = [64], [1], 2, 2, 2
            self.launcher = False
        for name in ("contexts", "batches", "layers", "steps", "rounds", "threads"):
            value = getattr(self, name)
            check_positive(name, *(value if isinstance(value, list) else [value]))
        if self.steps > ROOM - 2:
            raise ValueError(f"steps={self.steps}: must be at most {ROOM - 2}")
        if self.launcher and common.INTERPRETED:
            raise ValueError("launcher=True: must be False with TRITON_INTERPRET=1, whose kernels have no launcher")


class NoLaunch:
    """Stands for a kernel: a launch does nothing but be counted."""

    launches = 0

    def __getitem__(self, grid):
        return self._skip

    @staticmethod
    def _skip(**arguments) -> None:
        NoLaunch.launches += 1


class StandInDriver:
    """A driver for Triton, which answers as on an H100 what is asked before a launch, and launches nothing."""

    def __init__(self):
        self.utils = self

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        """Module, function, registers of a thread, what it spills, and threads that a program may have."""
        return name, name, 0, 0, 1024

    def launcher_cls(self, source, metadata) -> Callable:
        """What Triton makes once for each compiled kernel, and calls to launch it."""
        return lambda *arguments: None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@contextmanager
def without_launches(launcher: bool) -> Iterator[None]:
    """The `triton` back end takes CPU tensors, and launches nothing; with `launcher` Triton prepares each launch."""
    with ExitStack() as stack:

        def replaced(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(patch.object(owner, name, value))

        replaced(common, "INTERPRETED", True)
        # What is kept of earlier launches is that of other kernels.
        replaced(attention_triton, "_records", WeakKeyDictionary())
        kept = lru_cache(attention_triton._record_without_blocks.__wrapped__)
        replaced(attention_triton, "_record_without_blocks", kept)
        for name in ("check_scale", "require"):  # of what no kernel has written
            replaced(quantize_triton, name, lambda *_: None)
        if launcher:
            replaced(triton.runtime.driver, "_active", StandInDriver())
        else:
            for module in KERNEL_MODULES:
                for name, kernel in list(vars(module).items()):
                    if isinstance(kernel, KernelInterface):
                        replaced(module, name, NoLaunch())
        yield


@dataclass
class HostContender:
    """A model with a filled cache.

    Attributes:
        launcher: Whether Triton prepares the launches; `None`: there are none of ours.
    """

    model: PreTrainedModel
    cache: Cache
    launcher: bool | None

    @torch.no_grad()
    def seconds(self, token: torch.Tensor, steps: int) -> float:
        """Seconds of a step, the mean of several in a row, from the same cache each time."""
        with without_launches(bool(self.launcher)):
            cache = deepcopy(self.cache)
            for _ in range(2):  # what a cache keeps from its first step on
                self.model(token, past_key_values=cache)
            started = time.perf_counter()
            for _ in range(steps):
                self.model(token, past_key_values=cache)
            return (time.perf_counter() - started) / steps


def models(options: HostBenchmarkConfig) -> tuple[ALRDLlamaForCausalLM, PreTrainedModel]:
    """The random model and the dense one that it is equal to."""
    torch.manual_seed(options.seed)
    shape = SMALL | {"num_hidden_layers": options.layers}
    config = ALRDLlamaConfig(
        **shape,
        max_position_embeddings=max(options.contexts) + ROOM,
        k_bits=options.bits,
        v_bits=options.bits,
        eos_token_id=None,
        bos_token_id=None,
    )
    set_ranks(config, options.rank, 1)
    ours = ALRDLlamaForCausalLM(config).eval()
    return ours, ours.to_dense()


@torch.no_grad()
def measure_case(options: HostBenchmarkConfig, ours: PreTrainedModel, dense: PreTrainedModel, context: int, batch: int):
    """All contenders in turns at this context and batch."""
    prompt = torch.randint(ours.config.vocab_size, (batch, context))
    token = prompt[:, :1]
    contenders = {"dense": HostContender(dense, DynamicCache(config=dense.config), None)}
    for launcher in (False, True)[: 1 + options.launcher]:
        for kind, capacity in (("growing", None), ("fixed", context + ROOM)):
            cache = ours.create_kivi_cache(capacity=capacity, backend="triton")
            contenders[f"{kind}, {'launched' if launcher else 'prepared'}"] = HostContender(ours, cache, launcher)
    launches = {}
    for name, contender in contenders.items():
        with without_launches(launcher=False):
            contender.model(prompt, past_key_values=contender.cache)
            if contender.launcher is False:
                before = NoLaunch.launches
                contender.model(token, past_key_values=deepcopy(contender.cache))
                launches[name] = NoLaunch.launches - before
                if launches[name] < options.layers:
                    raise RuntimeError(
                        f"gate: {launches[name]} launches of {options.layers} layers in {name}; no figures"
                    )
        contender.seconds(token, 1)  # compiles
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for name in turns(contenders, options.rounds):
        seconds[name].append(contenders[name].seconds(token, options.steps))
    return {
        "context": context,
        "batch": batch,
        "launches_per_step": launches,
        "rounds": options.rounds,
        "contenders": {
            name: {
                "seconds": percentiles(spent),
                "over_dense": percentiles(ratios(spent, seconds["dense"])),
            }
            for name, spent in seconds.items()
        },
    }


def main(options: HostBenchmarkConfig) -> dict[str, Any]:
    """Measure all cases; returns the record."""
    torch.set_num_threads(options.threads)
    ours, dense = models(options)
    sizes = list(itertools.product(options.contexts, options.batches))
    cases = [measure_case(options, ours, dense, *size) for size in tqdm(sizes, unit="case")]
    record = {"config": asdict(options), "environment": environment(), "cases": cases}
    if options.output:
        write_json(options.output, record)
    print(host_table(record))
    return record


def host_table(record: dict[str, Any]) -> str:
    """Time of a step of every contender, as Markdown."""
    lines = ["| tokens × rows | cache | ms per step | over dense | launches |", "|---|---|---|---|---|"]
    for case in record["cases"]:
        for name, c in case["contenders"].items():
            low, high = bounds(c["over_dense"])
            ratio = f"{c['over_dense']['p50']:.2f} [{low:.2f}–{high:.2f}]"
            launches = case["launches_per_step"].get(name, "")
            size = f"{case['context']:,} × {case['batch']}"
            lines.append(f"| {size} | {name} | {milliseconds(c['seconds'])} | {ratio} | {launches} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(parse_config(HostBenchmarkConfig, __doc__))
