r"""Time of one decode step's attention in one layer: the packed latent cache against what else there is.

A *case* is a context length, a batch and a scheme (rank, head group, bits). The layer has random weights, the cache
is filled with random latents, and one new token per row attends to it, by the code that the model runs: query rotated,
packed cache and window read, sums expanded by `A_v`, token appended. Appends are timed over one whole block, which
packs one, and their mean is part of every figure. Projections of the hidden state are left out on all sides.

Against, each in turns with ours in the same rounds (ratios are of the medians; 20th and 80th percentile are of the
ratios of the rounds):
    DynamicCache              what a transformers user has: `update`, then its SDPA function, on post-RoPE keys, in the
                              type of the layer and in float32
    by hand                   the best of several dense codes on contiguous keys and values, without append
    quanto, hqq               `QuantizedCache` at 2 bits (its requantization, every 128th step, is not in the figure)
    unpack                    our cache dequantized and expanded whole, then SDPA
    llama.cpp f16, q8_0, q4_0 `ggml_flash_attn_ext` of llama-cpp-python on llama.cpp's layout, without append and mask
    flash                     on CUDA: `scaled_dot_product_attention` with `enable_gqa` and flash only, in a CUDA graph
The first scheme meets all of them, the others only the code by hand (on CUDA: flash). Before each call the threads of
the last one are given time to sleep, and a large buffer is read by the threads that PyTorch will use, so that its
workers are awake and caches cold, as when the layers of a model take turns (`--no_cold` reads a small one). On CUDA the
L2 is overwritten instead, and our step is a graph of its kernels without append, as the others are; its time from
Python is `eager_seconds`.

First comes a gate: the error of our step against float64 on what is stored must be at most twice that of plain
PyTorch in the model's type on the same states; otherwise nothing is reported. Peers that lose nothing are checked too.
Cases are appended to the output one by one: an interrupted run goes on where it stopped.

    python scripts/benchmark_attention.py --output scripts/results/benchmark_attention.json
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from copy import copy, deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from tqdm import tqdm
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from configuration_alrd_llama import ALRDLlamaConfig, check_positive
from modeling_alrd_llama import ALRDLlamaAttention, LatentStep
from modules.kernels.packed import Rope, Tile
from modules.kivi_cache import CacheScheme, KIVILatentCache, config_widths
from modules.svd_linear import SVDLinear, split_groups
from scripts.attention_peers import (
    GATE,
    PEERS,
    Contender,
    DenseStates,
    Run,
    relative_error,
    transformers_sdpa,
    unsupported_reason,
)
from scripts.common import DTYPES, environment, human_bytes, installed_version, parse_config, set_ranks
from scripts.records import ResultsFile
from scripts.timing import (
    SPREAD,
    in_turns,
    least_seconds,
    milliseconds,
    percentiles,
    ratios,
    timed,
    times_faster,
)

#: The best dense code on each kind of device, which every scheme meets.
YARDSTICKS = {"cpu": "by hand", "cuda": "flash"}

#: Seconds before each call: OpenMP's workers spin for a few milliseconds after a product, on the cores of the next one,
#: which may have threads of its own.
PAUSE = 0.02


@dataclass
class AttentionBenchmarkConfig:
    """Options of the benchmark."""

    lengths: list[int] = field(default_factory=lambda: [4096, 32768, 131072], metadata={"help": "Tokens per row."})
    batches: list[int] = field(default_factory=lambda: [1, 8], metadata={"help": "Rows."})
    ranks: list[float] = field(
        default_factory=lambda: [0.5, 0.25, 0.75], metadata={"help": "Shares of the full rank, per head."}
    )
    joint_ranks: list[float] = field(
        default_factory=lambda: [0.5], metadata={"help": "The same, all heads in one. 0: none."}
    )
    bits: list[int] = field(default_factory=lambda: [2, 3, 4], metadata={"help": "Bits of keys and values."})
    peers: list[str] = field(
        default_factory=list, metadata={"help": "Peers that the first scheme meets, by name. None given: all."}
    )
    num_attention_heads: int = field(default=32, metadata={"help": "Query heads; the defaults are Llama-3-8B's."})
    num_key_value_heads: int = field(default=8, metadata={"help": "Key and value heads."})
    head_dim: int = field(default=128, metadata={"help": "Size of a head."})
    backend: str | None = field(default=None, metadata={"help": "Back end of our cache. None: chosen by the device."})
    device: str = field(default="cpu", metadata={"help": "Where everything is; llama.cpp, quanto and hqq: CPU only."})
    dtype: Literal[DTYPES] = field(default="bfloat16", metadata={"help": "Type of the layer."})
    threads: int = field(default=2, metadata={"help": "CPU threads, of all contenders."})
    rounds: int = field(default=25, metadata={"help": "Rounds of a pair, each contender once in each."})
    seconds: float = field(default=60.0, metadata={"help": "No further round of a pair begins after this time."})
    cold: bool = field(default=True, metadata={"help": "Read a large buffer before each call, so caches are cold."})
    memory_gib: float = field(default=8.0, metadata={"help": "Peers that need more than this are left out, visibly."})
    seed: int = field(default=0, metadata={"help": "Seed of weights and states."})
    quick: bool = field(default=False, metadata={"help": "Small shapes and few rounds, to try the script out."})
    output: str | None = field(default=None, metadata={"help": "JSON file; cases that it holds are not run again."})

    def __post_init__(self):
        if self.quick:
            self.lengths, self.batches, self.bits, self.rounds = [512, 1024], [1], [2], 3
            self.num_attention_heads, self.num_key_value_heads, self.head_dim = 4, 2, 32
            self.ranks = [0.5, 0.25]
        for name in ("lengths", "batches", "ranks", "bits"):
            if not getattr(self, name):
                raise ValueError(f"{name}=[]: must name at least one")
        for name in ("batches", "threads", "rounds", "seconds", "memory_gib"):
            value = getattr(self, name)
            check_positive(name, *(value if isinstance(value, list) else [value]))
        for length in self.lengths:
            if length < 512:
                raise ValueError(f"lengths={length}: must be at least 512, so that blocks are packed")
        unknown = sorted(set(self.peers) - set(PEERS))
        if unknown:
            raise ValueError(f"peers={unknown}: must be among {', '.join(PEERS)}")

    def schemes(self) -> list[dict[str, Any]]:
        """Schemes that are measured at every length and batch; the first meets all peers."""
        kinds = [(r, 1) for r in self.ranks] + [(r, self.num_key_value_heads) for r in self.joint_ranks if r]
        chosen = itertools.product(kinds, self.bits)
        return [{"rank": rank, "head_group_size": size, "bits": bits} for (rank, size), bits in chosen]

    def layer_config(self, scheme: dict[str, Any]) -> ALRDLlamaConfig:
        """A model of one layer, the rest of which is as small as it goes."""
        config = ALRDLlamaConfig(
            hidden_size=self.num_attention_heads * self.head_dim,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            num_hidden_layers=1,
            intermediate_size=8,
            vocab_size=8,
            max_position_embeddings=2 * max(self.lengths),
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            k_bits=scheme["bits"],
            v_bits=scheme["bits"],
            attn_implementation="sdpa",
        )
        set_ranks(config, scheme["rank"], scheme["head_group_size"])
        return config


def measure_machine(options: AttentionBenchmarkConfig) -> dict[str, float]:
    """Read bandwidth (bytes per second) and peaks of matrix products (multiply-adds per second), as torch gets them."""
    device, size = torch.device(options.device), 256 if options.quick else 4096
    buffer = torch.ones(2 ** (16 if options.quick else 27), device=device)
    # Which reduction reads fastest differs; the highest figure is the bandwidth.
    views = [buffer.view(dtype) for dtype in (torch.int32, torch.int64, torch.float32, torch.float64)]
    reads = [*(view.max for view in views), *(view.sum for view in views)]
    machine = {"bytes_per_s": buffer.nbytes / min(least_seconds(read, device) for read in reads)}
    square = torch.ones(size, size, device=device)
    half = square.to(getattr(torch, options.dtype))
    machine[f"{options.dtype}_macs_per_s"] = size**3 / least_seconds(lambda: half @ half, device)
    codes = square.to(torch.int8)
    machine["int8_macs_per_s"] = size**3 / least_seconds(lambda: torch._int_mm(codes, codes), device)
    return machine


def between_calls(options: AttentionBenchmarkConfig) -> Callable[[int], None]:
    """Make the pause before each call, after which all find the same machine; it takes the threads to be woken."""
    cpu = torch.device(options.device).type == "cpu"  # elsewhere `timed` sees to the caches
    size = 2**26 if options.cold and cpu and not options.quick else 2**16
    buffer = torch.ones(size, dtype=torch.int32, device=options.device)

    def prepare(threads: int) -> None:
        time.sleep(PAUSE)
        torch.set_num_threads(threads)
        buffer.max()
        if buffer.is_cuda:
            torch.cuda.synchronize()
        torch.set_num_threads(options.threads)

    return prepare


class LatentLayer:
    """Our layer with a filled cache, and one new token per row that attends to it.

    Args:
        capacity: Of the cache; `None`: it grows.

    Attributes:
        attention: The module, random weights that keep keys and values at unit variance.
        cache: Its cache, of T - 1 tokens per row; the new token is the T-th.
        append: What the appends of the last block took, on the device and, until it could go on, the host.
    """

    @torch.no_grad()
    def __init__(
        self,
        options: AttentionBenchmarkConfig,
        scheme: dict[str, Any],
        length: int,
        batch: int,
        capacity: int | None = None,
    ):
        self.options, self.length, self.batch = options, length, batch
        self.dtype, self.device = getattr(torch, options.dtype), torch.device(options.device)
        self.config = config = options.layer_config(scheme)
        self.attention = ALRDLlamaAttention(LlamaAttention(config, 0)).to(self.device, self.dtype).eval()
        for projection in (self.attention.k_proj, self.attention.v_proj):
            expand = projection.ALinear
            expand.weight.normal_(std=max(expand.ranks) ** -0.5)
        embedding = LlamaRotaryEmbedding(config).to(self.device)
        self.rope = Rope(embedding.inv_freq, embedding.attention_scaling)
        self.widths = config_widths(config)[0]
        self.cache = KIVILatentCache(
            CacheScheme.from_config(config), [self.widths], backend=options.backend, capacity=capacity
        )
        self.layer = self.cache.layers[0]
        new = [self._states((batch, 1, sum(side))) for side in self.widths]
        self.new_keys, self.new_values = new
        self.query = self._states((batch, config.num_attention_heads, 1, config.head_dim))
        block = self.layer.scheme.block_length
        warm_up = block if self.device.type == "cuda" else 0  # which compiles the kernels
        self._fill(length - 1 - block - warm_up)
        for _ in range(warm_up):
            self._append()
        self.append = self._time_appends(block)

    def _states(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def _fill(self, length: int, piece: int = 16384) -> None:
        # In pieces, since what packing needs besides is many times the states.
        for start in range(0, length, piece):
            tokens = min(piece, length - start)
            self.layer.append(*(self._states((self.batch, tokens, sum(side))) for side in self.widths))

    def position(self) -> LatentStep:
        held = self.layer.rows[0].tokens
        return LatentStep.place([held] * self.batch, None, 1, self.device, has_past=True, rope=self.rope)

    @torch.no_grad()
    def attend(self) -> torch.Tensor:
        """The attention of the step, as the model runs it: `[B, H_q, d]`."""
        states, step = (self.query, self.new_keys, self.new_values), self.position()
        arguments = self.attention._attention_arguments(*states, self.layer, step)
        return self.attention._attend_cache(*arguments, self.layer.backend, step)[0].flatten(1, 2)

    def prepared(self) -> Run:
        """The same with what the host prepares made once, as a CUDA graph wants it."""
        states = (self.query, self.new_keys, self.new_values)
        arguments = self.attention._attention_arguments(*states, self.layer, self.position())
        attend, expand = self.layer.backend.attend_values, self.attention.v_proj.ALinear
        return lambda: attend(*arguments, expand)[0][:, :, 0]

    def _time_appends(self, block: int) -> dict[str, Any]:
        """Seconds of appending a token and making what attention reads, over the last block of the tokens."""
        packed = self._blocks()
        seconds, host = zip(*(timed(self._append, self.device) for _ in range(block)), strict=True)
        return {
            "tokens": block,
            "blocks_packed": (self._blocks() - packed) // self.batch,
            "mean_s": statistics.fmean(seconds),
            "p50_s": statistics.median(seconds),
            "max_s": max(seconds),
            "host_p50_s": statistics.median(host),
        }

    def _blocks(self) -> int:
        return sum(len(row.blocks) for row in self.layer.rows)

    def _append(self) -> float:
        """Seconds until the host is free again."""
        started = time.perf_counter()
        self.layer.append(self.new_keys, self.new_values)
        self.layer.packed()
        return time.perf_counter() - started

    def contender(self) -> Contender:
        """The step without its append, whose amortised time is added to every figure."""
        return Contender(self.attend, self.cache.nbytes_used, self._macs())

    def _macs(self) -> int:
        """Multiply-adds of rebuilding the keys, of the scores, and of the sums in the latent and their expansion."""
        c = self.config
        held = self.layer.rows[0].tokens + 1
        rows_of_a_group = c.num_key_value_heads * c.head_dim // len(self.widths[0])
        a_token = sum(self.widths[0]) * rows_of_a_group + c.num_attention_heads * (c.head_dim + max(self.widths[1]))
        return self.batch * (held * a_token + c.num_attention_heads * c.head_dim * max(self.widths[1]))

    def stored(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """States that the row holds, dequantized in float32, and of the new token: `[T, C_k]` and `[T, C_v]`."""
        seen = self.layer.packed(self.position().new_tokens(self.new_keys, self.new_values).tile())
        sides = []
        for side, codec in self.layer.pool.codecs.items():
            exact = copy(codec)
            exact.dtype = torch.float32
            blocks = list(self.layer.rows[row].blocks)
            packed = exact.decode({name: t[blocks] for name, t in self.layer.pool.storage[side].items()})
            before, after = (self._exact_states(tiles, side, row) for tiles in (seen.before, seen.after))
            sides.append(torch.cat([*before, packed.flatten(0, 1), *after]))
        return tuple(sides)

    @staticmethod
    def _exact_states(tiles: tuple[Tile, ...], side: str, row: int) -> list[torch.Tensor]:
        """States `[n, C]` of one side that each tile holds of a row, in float32."""
        return [getattr(tile, side)[row, 0, : tile.count[row, 0]].float() for tile in tiles]

    def unpacked(self, keys: torch.Tensor, values: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        """Plain PyTorch in the model's type: states expanded whole, rotated, SDPA. `[B, T, C]` to `[B, H_q, d]`."""
        keys, values = self.attention.k_proj.ALinear(keys), self.attention.v_proj.ALinear(values)
        keys, values = (x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2) for x in (keys, values))
        positions = torch.arange(keys.shape[2], device=self.device)
        angle = positions[:, None].float() * self.rope.inv_freq
        cos, sin = (torch.cat([x, x], -1).to(self.dtype) for x in (angle.cos(), angle.sin()))

        def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            low, high = x.chunk(2, dim=-1)
            return x * cos + torch.cat([-high, low], dim=-1) * sin

        query = rotate(self.query[rows], cos[-1:], sin[-1:])
        return transformers_sdpa(self.config, query, rotate(keys, cos, sin), values)

    def exact(self, row: int, piece: int = 4096) -> torch.Tensor:
        """The step of one row in float64 on what is stored: `[H_q, d]`."""
        keys, values = self.stored(row)
        expand_keys, expand_values = (deepcopy(p.ALinear).double() for p in self.projections())
        heads, size = self.config.num_key_value_heads, self.config.head_dim
        rope = Rope(self.rope.inv_freq.double(), self.rope.attention_scaling)
        last = torch.tensor([len(keys) - 1], device=self.device)
        query = rope.rotate(self.query[row].double(), last).view(heads, -1, size)
        scores = []
        for start in range(0, len(keys), piece):
            tile = expand_keys(keys[start : start + piece].double()).view(-1, heads, size)
            positions = torch.arange(start, start + len(tile), device=self.device)
            scores.append(query @ rope.rotate(tile, positions[:, None]).permute(1, 2, 0))
        weights = (torch.cat(scores, dim=-1) * size**-0.5).softmax(-1).flatten(0, 1)
        groups = split_groups(values.double(), self.widths[1]).transpose(0, 1)
        summed = weights.unflatten(0, (len(groups), -1)) @ groups
        return expand_values(summed.flatten(0, 1)[:, None], per_head=True)[:, 0]

    def projections(self) -> tuple[SVDLinear, SVDLinear]:
        return self.attention.k_proj, self.attention.v_proj

    @torch.no_grad()
    def check(self, step: Run | None = None) -> dict[str, float]:
        """The correctness gate, on the first and the last row, of `attend` or of a step that stands for it.

        Raises:
            RuntimeError: The step's error is more than `GATE` times that of plain PyTorch.
        """
        output, worst = (step or self.attend)(), {"ours": 0.0, "plain": 0.0, "ratio": 0.0}
        for row in sorted({0, self.batch - 1}):
            exact = self.exact(row)
            states = (x.to(self.dtype)[None] for x in self.stored(row))
            plain = self.unpacked(*states, rows=slice(row, row + 1))[0]
            ours, theirs = relative_error(output[row], exact), relative_error(plain, exact)
            if not ours <= GATE * theirs:
                raise RuntimeError(
                    f"correctness gate: error {ours:.2e} of {self.layer.backend}, row {row}, is more than {GATE:g} "
                    f"times the {theirs:.2e} of plain {self.options.dtype}; no figures"
                )
            if ours / theirs > worst["ratio"]:
                worst = {"ours": ours, "plain": theirs, "ratio": ours / theirs}
        return worst


@dataclass(frozen=True)
class GraphedStep:
    """A step that was captured in a CUDA graph.

    Attributes:
        step: What was captured. It owns the tensors that the graph reads: were it dropped, their memory would be given
            to others.
        graph: The capture.
        output: What the step returned; every replay writes it anew.
    """

    step: Run
    graph: torch.cuda.CUDAGraph
    output: torch.Tensor

    def __call__(self) -> torch.Tensor:
        self.graph.replay()
        return self.output


def in_a_graph(step: Run, name: str) -> tuple[Run, bool]:
    """On CUDA the step as a captured graph; as it is, with a line that says so, if it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            output = step()
    except RuntimeError as error:
        torch.cuda.synchronize()
        print(f"{name}: timed without a CUDA graph, which it does not fit into: {str(error).splitlines()[0]}")
        return step, False
    return GraphedStep(step, graph, output), True


def seconds_in_turns(
    options: AttentionBenchmarkConfig, steps: dict[str, Run], cool: Callable[[int], None], foreign: bool = False
) -> dict[str, list[float]]:
    """Seconds of each step in rounds. The step "peer" has threads of its own if `foreign`: PyTorch wakes only one."""

    def before(name: str) -> None:
        cool(1 if foreign and name == "peer" else options.threads)

    device = torch.device(options.device)
    return in_turns(steps, options.rounds, device, before=before, cold=options.cold, limit_s=options.seconds)


def figures(contender: Contender, seconds: list[float], machine: dict[str, float], dtype: str) -> dict[str, Any]:
    """Figures of a contender: time, bytes, multiply-adds, and its shares of what the machine can do."""
    spread = percentiles(seconds)
    rate = contender.macs / spread["p50"]
    return {
        "seconds": spread,
        "rounds": len(seconds),
        "nbytes": contender.nbytes,
        "bandwidth_share": contender.nbytes / spread["p50"] / machine["bytes_per_s"],
        "macs": contender.macs,
        "peak_share": rate / machine[f"{dtype}_macs_per_s"],
        "int8_peak_share": rate / machine["int8_macs_per_s"],
        **({"settings": contender.settings} if contender.settings else {}),
    }


@torch.no_grad()
def measure_case(
    options: AttentionBenchmarkConfig, length: int, batch: int, scheme: dict[str, Any], peers: list[str], machine: dict
) -> dict[str, Any]:
    """One case: gate, appends, and our step in turns with each peer."""
    torch.manual_seed(options.seed)
    ours = LatentLayer(options, scheme, length, batch)
    gate = ours.check()
    contender, cool, cuda = ours.contender(), between_calls(options), ours.device.type == "cuda"
    states = DenseStates(ours.config, length, batch, ours.dtype, ours.device, options.seed)
    sides = ours.layer.pool.sides()
    record = {
        "length": length,
        "batch": batch,
        **scheme,
        "backend": str(ours.layer.backend),
        "fused": ours.layer.backend.attends_to(*sides),
        "gate": gate,
        "append": ours.append,
        "dense_nbytes": states.nbytes(),
        "dense_read_s": states.nbytes() / machine["bytes_per_s"],
        "peers": {},
    }
    our_step = contender.step
    if cuda:
        record["eager_seconds"] = percentiles(seconds_in_turns(options, {"ours": our_step}, cool)["ours"])
        our_step, record["cuda_graph"] = in_a_graph(ours.prepared(), "ours")
        record["gate"] = ours.check(our_step)
    # On CUDA the graphs of both sides are kernels of the attention alone.
    append_s, everything = 0.0 if cuda else ours.append["mean_s"], []
    for name in peers:
        peer = PEERS[name]
        reason = unsupported_reason(peer, states, options.memory_gib)
        if reason is None:
            try:
                theirs = peer.make(states, ours)
            except ImportError as error:
                reason = str(error)
        if reason is not None:
            print(f"{name}: left out of {length:,} tokens x {batch}: {reason}")
            record["peers"][name] = {"left_out": reason}
            continue
        their_step, their_graph = in_a_graph(theirs.step, name) if cuda else (theirs.step, False)
        error = states.error(their_step()) if theirs.checked else None
        if theirs.tolerance is not None and not error <= theirs.tolerance:
            raise RuntimeError(f"correctness gate: error {error:.2e} of {name} is above {theirs.tolerance}; no figures")
        foreign = "llama-cpp-python" in peer.needs
        seconds = seconds_in_turns(options, {"ours": our_step, "peer": their_step}, cool, foreign)
        mine = [s + append_s for s in seconds["ours"]]
        everything += mine
        record["peers"][name] = {
            **figures(theirs, seconds["peer"], machine, options.dtype),
            "error": error,
            "ours_seconds": percentiles(mine),
            "speedup": statistics.median(seconds["peer"]) / statistics.median(mine),
            "speedup_rounds": percentiles(ratios(seconds["peer"], mine)),
            **({"cuda_graph": their_graph} if cuda else {}),
        }
        del theirs, their_step
    if not everything:
        everything = [s + append_s for s in seconds_in_turns(options, {"ours": our_step}, cool)["ours"]]
    record |= figures(contender, everything, machine, options.dtype)
    record["append_share"] = ours.append["mean_s"] / record["seconds"]["p50"]
    record["seconds_per_token"] = record["seconds"]["p50"] / (length * batch)
    return record


def cases(options: AttentionBenchmarkConfig) -> Iterator[tuple[str, int, int, dict[str, Any], list[str]]]:
    """Name, length, batch, scheme and peers of every case."""
    device = torch.device(options.device).type
    everybody = options.peers or [name for name, peer in PEERS.items() if device in peer.devices]
    first = options.schemes()[0]
    for length, batch, scheme in itertools.product(options.lengths, options.batches, options.schemes()):
        group = "per head" if scheme["head_group_size"] == 1 else "joint"
        name = f"{length} x {batch}, rank {scheme['rank']:g} {group}, {scheme['bits']} bit"
        yield name, length, batch, scheme, everybody if scheme == first else [YARDSTICKS[device]]


#: Options that two runs must share for their cases to stand in one file.
KEY = (
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "backend",
    "device",
    "dtype",
    "threads",
    "cold",
    "seed",
    "quick",
)


def main(options: AttentionBenchmarkConfig) -> dict[str, Any]:
    """Measure the cases that the output does not hold; returns the record."""
    torch.set_num_threads(options.threads)
    here = environment(torch.device(options.device))
    key = {name: getattr(options, name) for name in KEY} | {n: here[n] for n in ("cpu", "device", "torch")}
    key["spread"] = SPREAD
    results = ResultsFile(options.output, {"key": key, "cases": {}}, holds="cases")
    results.require("key", key)
    record = results.record
    machine = measure_machine(options)
    here |= {p: installed_version(p) for p in ("optimum-quanto", "hqq", "llama-cpp-python")}
    here |= {"onednn": torch.backends.mkldnn.is_available(), "instructions": torch.backends.cpu.get_cpu_capability()}
    held = record["cases"]
    missing = [(n, *case) for n, *case in cases(options) if not (n in held and set(case[-1]) <= set(held[n]["peers"]))]
    for name, *case in tqdm(missing, desc="cases", unit="case"):
        measured = measure_case(options, *case, machine)
        measured |= {"machine": machine, "environment": here}
        record["cases"][name] = measured
        record |= {"config": asdict(options), "environment": here, "machine": machine}
        results.save()
        tqdm.write(f"{name}: {describe(measured)}")
    print(attention_tables(record))
    return record


def describe(case: dict[str, Any]) -> str:
    """One case in a line."""
    parts = [f"{1e3 * case['seconds']['p50']:.2f} ms by {case['backend']}{'' if case['fused'] else ', not fused'}"]
    parts += [f"{name} {p['speedup']:.2f}x" for name, p in case["peers"].items() if "speedup" in p]
    return "; ".join(parts)


def scheme_name(case: dict[str, Any]) -> str:
    """Rank and bits of a case."""
    return f"{case['rank']:.0%} {'per head' if case['head_group_size'] == 1 else 'joint'}, {case['bits']} bit"


def size_name(case: dict[str, Any]) -> str:
    return f"{case['length']:,} × {case['batch']}"


def shares(figures: dict[str, Any]) -> list[str]:
    """Cells: bytes, share of the bandwidth, multiply-adds, share of the peaks."""
    return [
        human_bytes(figures["nbytes"]),
        f"{figures['bandwidth_share']:.0%}",
        f"{figures['macs'] / 1e9:.2f} G",
        f"{figures['peak_share']:.0%} / {figures['int8_peak_share']:.0%}",
    ]


def full_table(record: dict[str, Any]) -> str:
    """Every figure: our cases, and below each what it was measured against, as Markdown."""
    lines = [
        "| tokens × rows | step | ms | cache read | of bandwidth | multiply-adds | of bf16 / int8 peak | ours faster |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in record["cases"].values():
        name = f"**ours, {scheme_name(case)}**{'' if case['fused'] else ', not fused'}"
        rows = [[name, milliseconds(case["seconds"]), *shares(case), ""]]
        for peer, figures in case["peers"].items():
            if "left_out" in figures:
                rows.append([f"{peer}: {figures['left_out']}", *[""] * 6])
                continue
            faster = times_faster(figures["speedup"], figures["speedup_rounds"])
            rows.append([peer, milliseconds(figures["seconds"]), *shares(figures), faster])
        lines += [f"| {size_name(case)} | {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)


def pivot(record: dict[str, Any], row: Callable[[dict], dict[str, str]], title: str) -> str:
    """A table with a column per size; `row` gives the cells of a case by the name of their rows."""
    cells: dict[str, dict[str, str]] = {}
    for case in record["cases"].values():
        for name, cell in row(case).items():
            cells.setdefault(name, {})[size_name(case)] = cell
    sizes = list(dict.fromkeys(size_name(case) for case in record["cases"].values()))
    lines = [f"| {title} | {' | '.join(sizes)} |", f"|{'---|' * (1 + len(sizes))}"]
    for name, by_size in cells.items():
        shown = [by_size.get(size, "–") for size in sizes]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def attention_table(record: dict[str, Any]) -> str:
    """Speed of the first scheme over that of each peer, a column per size, as Markdown."""

    def row(case: dict[str, Any]) -> dict[str, str]:
        if len(case["peers"]) < 2:
            return {}
        faster = {name: f"{p['speedup']:.2f}×" for name, p in case["peers"].items() if "speedup" in p}
        return {f"**ours, {scheme_name(case)}: ms**": milliseconds(case["seconds"]), **faster}

    return pivot(record, row, "tokens × rows")


def schemes_table(record: dict[str, Any]) -> str:
    """Milliseconds of every scheme, and how many times faster than the best dense code, as Markdown."""

    def row(case: dict[str, Any]) -> dict[str, str]:
        yardsticks = [p for name, p in case["peers"].items() if name in YARDSTICKS.values() and "speedup" in p]
        faster = f" ({yardsticks[0]['speedup']:.2f}×)" if yardsticks else ""
        return {scheme_name(case): milliseconds(case["seconds"]).split(" [")[0] + faster}

    return pivot(record, row, "rank, bits: ms")


def attention_tables(record: dict[str, Any]) -> str:
    """All tables, as Markdown."""
    return "\n\n".join(make(record) for make in (full_table, attention_table, schemes_table))


if __name__ == "__main__":
    main(parse_config(AttentionBenchmarkConfig, __doc__))
