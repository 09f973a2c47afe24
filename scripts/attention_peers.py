"""The peers of one step of our attention: dense caches, quantized ones, other engines.

Each peer is made from the same dense states and takes the attention step of one layer; see `benchmark_attention.py`.
"""

import ctypes
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import DynamicCache, QuantizedCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from configuration_alrd_llama import ALRDLlamaConfig
from scripts.common import human_bytes, installed_version
from scripts.timing import least_seconds

#: The largest error of our step, in units of that of plain PyTorch in the model's type.
GATE = 2.0

#: The largest relative error of a peer that stores its states in 16 or more bits, or in 8.
PEER_TOLERANCE = 0.05

Run = Callable[[], torch.Tensor]


def relative_error(x: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square of the error over that of the exact result; infinite for results that are not finite."""
    error = ((x.double() - exact).norm() / exact.norm()).item()
    return error if math.isfinite(error) else math.inf


@dataclass
class Contender:
    """One way to take the step.

    Attributes:
        step: Takes it; returns `[B, H_q, d]`.
        nbytes: Of the cache that a step reads.
        macs: Multiply-adds of a step.
        settings: What else is worth knowing.
        tolerance: Largest relative error of the first step; `None`: it stores its states in fewer bits.
        checked: Whether its first step attends to the dense states, so that its error is known.
    """

    step: Run
    nbytes: int
    macs: int
    settings: dict[str, Any] = field(default_factory=dict)
    tolerance: float | None = PEER_TOLERANCE
    checked: bool = True


def transformers_sdpa(config: ALRDLlamaConfig, query, keys, values) -> torch.Tensor:
    """Attention as transformers' Llama computes it in a decode step without pads; returns `[B, H_q, d]`."""
    groups = config.num_attention_heads // config.num_key_value_heads
    layer = SimpleNamespace(num_key_value_groups=groups, is_causal=True, layer_idx=0)
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return attend(layer, query, keys, values, None, scaling=config.head_dim**-0.5)[0][:, 0]


@dataclass
class DenseStates:
    """Random post-RoPE states of a dense cache of T tokens per row, and a query; the same ones on every call."""

    config: ALRDLlamaConfig
    length: int
    batch: int
    dtype: torch.dtype
    device: torch.device
    seed: int = 0

    def row(self, row: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Keys and values of a row, `[2, H_kv, T, d]`."""
        generator = torch.Generator(self.device).manual_seed(1 + self.seed + 1000 * row)
        shape = (2, self.config.num_key_value_heads, self.length, self.config.head_dim)
        states = torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)
        return states.to(dtype or self.dtype)

    def all(self, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, `[B, H_kv, T, d]`, each with a storage of its own."""
        shape = (self.batch, self.config.num_key_value_heads, self.length, self.config.head_dim)
        keys, values = (torch.empty(shape, dtype=dtype or self.dtype, device=self.device) for _ in range(2))
        for row in range(self.batch):
            keys[row], values[row] = self.row(row, dtype)
        return keys, values

    def query(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """`[B, H_q, 1, d]`, after RoPE."""
        generator = torch.Generator(self.device).manual_seed(self.seed)
        shape = (self.batch, self.config.num_attention_heads, 1, self.config.head_dim)
        query = torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)
        return query.to(dtype or self.dtype)

    def nbytes(self, itemsize: int | None = None) -> int:
        heads, size = self.config.num_key_value_heads, self.config.head_dim
        return 2 * self.batch * heads * self.length * size * (itemsize or self.dtype.itemsize)

    def macs(self) -> int:
        return 2 * self.batch * self.config.num_attention_heads * self.length * self.config.head_dim

    def error(self, output: torch.Tensor) -> float:
        """Relative error of `[B, H_q, d]` in the query heads of the last row's last key/value head."""
        keys, values = self.row(self.batch - 1)[:, -1].double()
        shared = self.config.num_attention_heads // self.config.num_key_value_heads
        query = self.query()[-1, -shared:, 0].double()
        exact = (query @ keys.T * self.config.head_dim**-0.5).softmax(-1) @ values
        return relative_error(output[-1, -shared:].to(exact.device), exact)


def dynamic_cache(states: DenseStates, ours, dtype: torch.dtype | None) -> Contender:
    """`DynamicCache.update` of one token, then transformers' SDPA."""
    dtype = dtype or states.dtype
    keys, values = states.all(dtype)
    query, cache = states.query(dtype), DynamicCache()
    new = [x[:, :, -1:].clone() for x in (keys, values)]
    cache.update(keys[:, :, :0], values[:, :, :0], 0)
    # Not by `update`, which would hold every state twice.
    cache.layers[0].keys, cache.layers[0].values = keys[:, :, :-1], values[:, :, :-1]

    def step() -> torch.Tensor:
        return transformers_sdpa(states.config, query, *cache.update(*new, 0))

    return Contender(step, states.nbytes(dtype.itemsize), states.macs(), {"dtype": str(dtype).removeprefix("torch.")})


def quantized_cache(states: DenseStates, ours, backend: str, axis: int) -> Contender:
    """`QuantizedCache.update` at 2 bits with its default groups of 64, then transformers' SDPA."""
    settings = {"nbits": 2, "axis_key": axis, "axis_value": axis, "q_group_size": 64, "residual_length": 128}
    cache = QuantizedCache(backend, states.config, **settings)
    keys, values = states.all()
    query, new = states.query(), [x[:, :, -1:].clone() for x in (keys, values)]
    # Half of its window, so that no step of ours meets a flush; hqq packs multiples of four tokens only.
    for piece in (slice(None, -64), slice(-64, -1)):
        cache.update(keys[:, :, piece], values[:, :, piece], 0)
    nbytes = states.nbytes(1) // 4 + states.nbytes(1) // 64 * 2 * states.dtype.itemsize

    def step() -> torch.Tensor:
        return transformers_sdpa(states.config, query, *cache.update(*new, 0))

    return Contender(step, nbytes, states.macs(), {"backend": backend, **settings}, tolerance=None)


#: Ways to compute the scores `[n, shared, T]` of queries `[n, shared, d]`; "[d, T]" ones want the keys transposed.
SCORES = {
    "q @ k.T": lambda q, k: q @ k.transpose(1, 2),
    "q @ k.T by head": lambda q, k: torch.stack([a @ b.T for a, b in zip(q, k)]),
    "(k @ q.T).T": lambda q, k: (k @ q.transpose(1, 2)).transpose(1, 2),
    "q @ k, keys [d, T]": lambda q, k: q @ k,
    "q @ k by head, keys [d, T]": lambda q, k: torch.stack([a @ b for a, b in zip(q, k)]),
}

#: Ways to sum up values `[n, T, d]` by weights `[n, shared, T]`; "[d, T]" ones want the values transposed.
SUMS = {
    "p @ v": lambda p, v: p @ v,
    "p @ v by head": lambda p, v: torch.stack([a @ b for a, b in zip(p, v)]),
    "p @ v.T, values [d, T]": lambda p, v: p @ v.transpose(1, 2),
    "p @ v.T by head, values [d, T]": lambda p, v: torch.stack([a @ b.T for a, b in zip(p, v)]),
    "(v @ p.T).T, values [d, T]": lambda p, v: (v @ p.transpose(1, 2)).transpose(1, 2),
}


def by_hand(states: DenseStates, ours) -> Contender:
    """Grouped matrix products on contiguous keys and values: the fastest of several layouts and codes, tried here.

    The softmax is torch's, in float32 inside. The same with SDPA, the queries of a key head side by side, is tried too.
    """
    config, device = states.config, ours.device
    heads = config.num_key_value_heads
    shared = config.num_attention_heads // heads
    query = (states.query() * config.head_dim**-0.5).view(-1, shared, config.head_dim)
    keys, values = (x.flatten(0, 1) for x in states.all())

    def laid_out(x: torch.Tensor, how: str) -> torch.Tensor:
        return x.transpose(1, 2).contiguous() if "[d, T]" in how else x

    # Tried on one row, since a second copy of all states may not fit.
    q, k, v = query[:heads], keys[:heads], values[:heads]
    score_times, sum_times = {}, {}
    for how, compute in SCORES.items():
        score_times[how] = least_seconds(partial(compute, q, laid_out(k, how)), device)
    weights = SCORES["q @ k.T"](q, k).softmax(-1)
    for how, compute in SUMS.items():
        sum_times[how] = least_seconds(partial(compute, weights, laid_out(v, how)), device)
    scored, summed = min(score_times, key=score_times.get), min(sum_times, key=sum_times.get)
    del q, k, v  # they keep the storages that are replaced here, one after the other
    keys = laid_out(keys, scored)
    values = laid_out(values, summed)

    def step() -> torch.Tensor:
        output = SUMS[summed](SCORES[scored](query, keys).softmax(-1), values)
        return output.reshape(states.batch, -1, config.head_dim)

    settings = {"scores": scored, "sums": summed}
    if "[d, T]" not in scored and "[d, T]" not in summed:
        four = [x.unflatten(0, (-1, heads)) for x in (query, keys, values)]

        def sdpa() -> torch.Tensor:
            output = torch.nn.functional.scaled_dot_product_attention(*four, scale=1.0)
            return output.reshape(states.batch, -1, config.head_dim)

        if least_seconds(sdpa, device) < least_seconds(step, device):
            step, settings = sdpa, {"scores": "SDPA", "sums": "SDPA"}
    return Contender(step, states.nbytes(), states.macs(), settings)


def unpack(states: DenseStates, ours) -> Contender:
    """Our own cache, dequantized and expanded whole, then transformers' SDPA."""

    def step() -> torch.Tensor:
        seen = [torch.cat(pair, 1) for pair in zip(ours.layer.states(), (ours.new_keys, ours.new_values))]
        return ours.unpacked(*seen)

    # Its correctness is that of plain PyTorch in the gate.
    return Contender(step, ours.cache.nbytes_used, states.macs(), tolerance=None, checked=False)


def flash(states: DenseStates, ours) -> Contender:
    """Flash attention of PyTorch on contiguous states, `enable_gqa`, no append."""
    query, (keys, values) = states.query(), states.all()

    def step() -> torch.Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            output = torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
        return output[:, :, 0]

    return Contender(step, states.nbytes(), states.macs())


class Ggml:
    """The functions of llama-cpp-python's bundled libggml that one attention step takes.

    Raises:
        ImportError: llama-cpp-python is not installed.
    """

    F32, F16, Q4_0, Q8_0 = 0, 1, 2, 8

    class _InitParams(ctypes.Structure):
        _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]

    def __init__(self):
        # Found, not imported: the package wants others that only its model classes need.
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None:
            raise ImportError("llama-cpp-python is not installed")
        folder = Path(spec.origin).parent / "lib"
        try:
            base, cpu = (ctypes.CDLL(str(folder / f"libggml-{part}.so")) for part in ("base", "cpu"))
        except OSError as error:
            raise ImportError(f"llama-cpp-python has no libggml that can be loaded: {error}") from error
        p, i, n, size, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t, ctypes.c_float
        for library, name, result, *arguments in (
            (base, "ggml_init", p, self._InitParams),
            (base, "ggml_free", None, p),
            (base, "ggml_new_tensor_4d", p, p, i, n, n, n, n),
            (base, "ggml_permute", p, p, p, i, i, i, i),
            (base, "ggml_flash_attn_ext", p, p, p, p, p, p, real, real, real),
            (base, "ggml_new_graph", p, p),
            (base, "ggml_build_forward_expand", None, p, p),
            (base, "ggml_backend_alloc_ctx_tensors", p, p, p),
            (base, "ggml_backend_buffer_free", None, p),
            (base, "ggml_backend_free", None, p),
            (base, "ggml_backend_graph_compute", i, p, p),
            (base, "ggml_backend_tensor_set", None, p, p, size, size),
            (base, "ggml_backend_tensor_get", None, p, p, size, size),
            (base, "ggml_nbytes", size, p),
            (base, "ggml_quantize_chunk", size, i, p, p, n, n, n, p),
            (cpu, "ggml_backend_cpu_init", p),
            (cpu, "ggml_backend_cpu_set_n_threads", None, p, i),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)

    def stored(self, states: torch.Tensor, kind: int) -> torch.Tensor:
        """Float32 `[..., d]` as ggml stores it."""
        states = states.contiguous()
        if kind in (self.F32, self.F16):
            return states if kind == self.F32 else states.half()
        rows, size = states.numel() // states.shape[-1], states.shape[-1]
        data = torch.empty(2 * states.numel(), dtype=torch.uint8)
        written = self.quantize_chunk(kind, states.data_ptr(), data.data_ptr(), 0, rows, size, None)
        return data[:written]


class LlamaCpp:
    """One attention step of llama.cpp: flash attention over a cache laid out as its own, `[d, H_kv, T, B]`."""

    def __init__(self, states: DenseStates, kind: int):
        self.ggml = ggml = Ggml()
        config, self.batch = states.config, states.batch
        size, heads, queries = config.head_dim, config.num_key_value_heads, config.num_attention_heads
        self.shape = (states.batch, queries, size)
        self.backend = ggml.backend_cpu_init()
        ggml.backend_cpu_set_n_threads(self.backend, torch.get_num_threads())
        self.context = ggml.init(Ggml._InitParams(2**20, None, True))
        query = ggml.new_tensor_4d(self.context, Ggml.F32, size, 1, queries, states.batch)
        held = [ggml.new_tensor_4d(self.context, kind, size, heads, states.length, states.batch) for _ in range(2)]
        views = [ggml.permute(self.context, x, 0, 2, 1, 3) for x in held]
        self.output = ggml.flash_attn_ext(self.context, query, *views, None, size**-0.5, 0.0, 0.0)
        self.graph = ggml.new_graph(self.context)
        ggml.build_forward_expand(self.graph, self.output)
        self.buffer = ggml.backend_alloc_ctx_tensors(self.context, self.backend)
        if not self.buffer:
            raise MemoryError("ggml could not allocate the cache")
        self._set(query, states.query(torch.float32), Ggml.F32)
        for row in range(states.batch):
            for tensor, x in zip(held, states.row(row, torch.float32)):
                self._set(tensor, x.transpose(0, 1), kind, row)
        self.nbytes = sum(ggml.nbytes(x) for x in held)

    def _set(self, tensor: int, states: torch.Tensor, kind: int, row: int = 0) -> None:
        data = self.ggml.stored(states, kind)
        self.ggml.backend_tensor_set(tensor, data.data_ptr(), row * data.nbytes, data.nbytes)

    def __call__(self) -> torch.Tensor:
        if self.ggml.backend_graph_compute(self.backend, self.graph):
            raise RuntimeError("ggml_backend_graph_compute failed")
        output = torch.empty(self.shape)
        self.ggml.backend_tensor_get(self.output, output.data_ptr(), 0, output.nbytes)
        return output

    def __del__(self):
        if getattr(self, "buffer", None):
            self.ggml.backend_buffer_free(self.buffer)
            self.ggml.free(self.context)
            self.ggml.backend_free(self.backend)


def llama_cpp(states: DenseStates, ours, kind: int) -> Contender:
    """`ggml_flash_attn_ext` over a cache of this kind, queries in float32 as llama.cpp has them."""
    step = LlamaCpp(states, kind)
    return Contender(step, step.nbytes, states.macs(), tolerance=None if kind == Ggml.Q4_0 else PEER_TOLERANCE)


@dataclass(frozen=True)
class AttentionPeer:
    """Recipe of a peer, and the devices where it runs.

    Attributes:
        make: From the dense states and our layer.
        memory: Peak of making it and of its step, in units of the dense cache in the model's type.
        needs: Packages.
        devices: Where it runs.
    """

    make: Callable[[DenseStates, Any], Contender]
    memory: float
    needs: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")


PEERS = {
    "DynamicCache": AttentionPeer(partial(dynamic_cache, dtype=None), 1.8),
    "DynamicCache fp32": AttentionPeer(partial(dynamic_cache, dtype=torch.float32), 3.3),
    "by hand": AttentionPeer(by_hand, 2.0),
    "quanto 2 bit": AttentionPeer(
        partial(quantized_cache, backend="quanto", axis=0), 6.2, ("optimum-quanto",), ("cpu",)
    ),
    "hqq 2 bit": AttentionPeer(partial(quantized_cache, backend="hqq", axis=1), 9.7, ("hqq",), ("cpu",)),
    "unpack": AttentionPeer(unpack, 4.0),
    "llama.cpp f16": AttentionPeer(partial(llama_cpp, kind=Ggml.F16), 1.8, ("llama-cpp-python",), ("cpu",)),
    "llama.cpp q8_0": AttentionPeer(partial(llama_cpp, kind=Ggml.Q8_0), 1.6, ("llama-cpp-python",), ("cpu",)),
    "llama.cpp q4_0": AttentionPeer(partial(llama_cpp, kind=Ggml.Q4_0), 1.6, ("llama-cpp-python",), ("cpu",)),
    "flash": AttentionPeer(flash, 1.1, devices=("cuda",)),
}


def unsupported_reason(peer: AttentionPeer, states: DenseStates, memory_gib: float) -> str | None:
    """Reason for leaving a peer out of a case; `None`: it is measured."""
    device = states.device.type
    if device not in peer.devices:
        return f"runs on {' and '.join(peer.devices)}, not on {device}"
    missing = [package for package in peer.needs if installed_version(package) is None]
    if missing:
        return f"{', '.join(missing)} is not installed"
    need, limit = peer.memory * states.nbytes(), memory_gib * 2**30
    return f"would need {human_bytes(need)} of memory, above --memory_gib" if need > limit else None
