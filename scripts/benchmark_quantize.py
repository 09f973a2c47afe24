"""Throughput of quantize-and-pack and unpack-and-dequantize, by width, orientation and range method.

GB/s are bytes of the states read (or written) plus bytes written (or read) in packed form, 1e9 to the GB; "states only"
counts the states alone. Beside them, in the same run, the bandwidth of a copy of the same tensor (read plus write), and
the ratio to it. On a CPU the target of packing is 10 GB/s of states.

First comes a correctness gate: every configuration must give, bit for bit, what the reference gives on the CPU;
otherwise nothing is reported.

    python scripts/benchmark_quantize.py --output build/benchmark_quantize.json
"""

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from tqdm import tqdm

from configuration_alrd_llama import QuantScheme, check_choice, check_positive
from modules import quant_utils
from modules.files import write_json
from modules.kernels import BACKENDS, Backend, get_backend
from scripts.common import DTYPES, environment, parse_config, whole
from scripts.timing import in_turns, percentiles

#: GB/s of states that packing should reach on a CPU.
CPU_TARGET = 10.0

MIB = 2**20


@dataclass
class QuantizeBenchmarkConfig:
    """Options of the benchmark."""

    device: str | None = field(default=None, metadata={"help": "Where to measure. None: CUDA if there is a device."})
    backends: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Back ends to measure. None given: triton and reference on CUDA, cpu and reference elsewhere."
        },
    )
    mib: float | None = field(default=None, metadata={"help": "Size of the states. None: 256 on CUDA, 4 elsewhere."})
    channels: int = field(default=1024, metadata={"help": "Channels of a token."})
    block_length: int = field(default=128, metadata={"help": "Tokens of a block."})
    group_size: int = field(default=128, metadata={"help": "Channels that share a scale of a token; 0: all."})
    dtype: Literal[DTYPES] = field(default="bfloat16", metadata={"help": "Type of the states."})
    bits: list[float] = field(default_factory=lambda: [1, 1.58, 2, 3, 4, 8], metadata={"help": "Widths to measure."})
    methods: list[str] = field(
        default_factory=lambda: ["minmax", "mse"],
        metadata={"help": "Range methods; below two bits, where codes are symmetric, only mse exists."},
    )
    repeats: int = field(default=20, metadata={"help": "Times that each call is measured."})
    seed: int = field(default=0, metadata={"help": "Seed of the states."})
    threads: int = field(default=1, metadata={"help": "CPU threads of PyTorch."})
    quick: bool = field(default=False, metadata={"help": "1/16 MiB and three repeats, to try the script out."})
    output: str | None = field(default=None, metadata={"help": "JSON file to write."})

    def __post_init__(self):
        cuda = torch.cuda.is_available()
        self.device = self.device or ("cuda" if cuda else "cpu")
        on_cuda = torch.device(self.device).type == "cuda"
        self.backends = self.backends or ["triton" if on_cuda else "cpu", "reference"]
        self.mib = self.mib or (256 if on_cuda else 4)
        if self.quick:
            self.mib, self.repeats = 1 / 16, 3
        check_positive("mib", self.mib)
        check_positive("channels", self.channels)
        check_positive("block_length", self.block_length)
        check_positive("repeats", self.repeats - 1)
        check_positive("threads", self.threads)
        for backend in self.backends:
            check_choice("backends", backend, BACKENDS)
        for method in self.methods:
            check_choice("methods", method, ("minmax", "mse"))
        self.bits = [whole(bits) for bits in self.bits]
        for b in self.bits:
            QuantScheme(b, group_size=self.group_size)
            if b not in (1, 1.58, 2, 3, 4, 5, 6, 8):
                raise ValueError(f"bits={b!r}: must be one of 1, 1.58, 2, 3, 4, 5, 6, 8")

    def schemes(self) -> list[QuantScheme]:
        """Every width in every orientation by every method that it has."""
        found = []
        for bits, orientation, method in itertools.product(self.bits, ("per_channel", "per_token"), self.methods):
            if bits >= 2 or method == "mse":
                found.append(QuantScheme(bits, orientation, self.group_size, range_method=method))
        return found


def calls(scheme: QuantScheme, backend: Backend, x: torch.Tensor) -> tuple[Callable, Callable, tuple]:
    """The two calls to time, and what the first one returned."""
    widths = None if scheme.per_channel else quant_utils.group_widths(x.shape[-1], scheme.group_size)

    def pack():
        return backend.quantize_and_pack(x, scheme.bits, widths, scheme.symmetric, scheme.range_method)

    stored = pack()

    def unpack():
        return backend.unpack_and_dequantize(*stored, scheme.bits, x.shape[1], x.dtype, widths)

    return pack, unpack, stored


def check(schemes: list[QuantScheme], backend: Backend, x: torch.Tensor) -> None:
    """The correctness gate.

    Raises:
        RuntimeError: A result is not that of the reference on the CPU.
    """
    reference = get_backend("reference", torch.device("cpu"))
    for scheme in schemes:
        results = []
        for one, states in ((backend, x), (reference, x.cpu())):
            _, unpack, stored = calls(scheme, one, states)
            results.append([t.cpu() for t in (*stored, unpack()) if t is not None])
        if not all(map(torch.equal, *results)):
            raise RuntimeError(
                f"correctness gate: {backend} on {x.device}, {scheme}: not the reference's bits; no figures"
            )


def nbytes(*tensors: torch.Tensor | None) -> int:
    return sum(t.numel() * t.itemsize for t in tensors if t is not None)


def measure(schemes: list[QuantScheme], backend: Backend, x: torch.Tensor, repeats: int) -> list[dict[str, Any]]:
    """Both directions of every scheme."""
    records = []
    for scheme in tqdm(schemes, desc=str(backend), unit="scheme"):
        pack, unpack, stored = calls(scheme, backend, x)
        record = {"backend": str(backend), "scheme": scheme.to_dict(), "name": str(scheme)}
        for direction, seconds in in_turns({"pack": pack, "unpack": unpack}, repeats, x.device).items():
            figures = percentiles(seconds)
            record[direction] = {
                "seconds": figures,
                "gb_per_s": (nbytes(x) + nbytes(*stored)) / figures["p50"] / 1e9,
                "states_gb_per_s": nbytes(x) / figures["p50"] / 1e9,
            }
        records.append(record)
    return records


def quantize_table(records: list[dict[str, Any]], copy_gb_per_s: float) -> str:
    """Markdown table of what was measured."""
    lines = [
        "| back end | scheme | pack GB/s | of copy | states only | unpack GB/s | of copy | states only |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for r in records:
        cells = [r["backend"], r["name"]]
        for direction in ("pack", "unpack"):
            both, states = r[direction]["gb_per_s"], r[direction]["states_gb_per_s"]
            cells += [f"{both:,.3g}", f"{both / copy_gb_per_s:.2f}", f"{states:,.3g}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@torch.no_grad()
def main(options: QuantizeBenchmarkConfig) -> dict[str, Any]:
    """Check, measure and report; returns the record."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    device, dtype, schemes = torch.device(options.device), getattr(torch, options.dtype), options.schemes()
    block = options.block_length * options.channels
    blocks = max(round(options.mib * MIB / dtype.itemsize / block), 1)
    x = torch.randn(blocks, options.block_length, options.channels, device=device).to(dtype)
    backends = [get_backend(name, device) for name in options.backends]
    for backend in backends:
        check(schemes, backend, x[:2])
        print(f"gate: {backend} on {device} gives the reference's bits in {len(schemes)} schemes")

    target = torch.empty_like(x)
    copy = percentiles(in_turns({"copy": lambda: target.copy_(x)}, options.repeats, device)["copy"])
    copy_gb_per_s = 2 * nbytes(x) / copy["p50"] / 1e9
    records = []
    for backend in backends:
        records += measure(schemes, backend, x, options.repeats)

    shape = " x ".join(map(str, x.shape))
    print(f"\n{nbytes(x) / MIB:g} MiB of {options.dtype} states ({shape}) on {device}; copy {copy_gb_per_s:,.4g} GB/s")
    print(quantize_table(records, copy_gb_per_s))
    if device.type == "cpu":
        for r in records:
            r["target_gb_per_s"], r["on_target"] = CPU_TARGET, r["pack"]["states_gb_per_s"] >= CPU_TARGET
        hits = [r["name"] for r in records if r["on_target"]]
        print(f"\ntarget of packing on a CPU, {CPU_TARGET:g} GB/s of states: hit by {len(hits)} of {len(records)}")
        for r in records:
            verdict = "hit" if r["on_target"] else "MISS"
            print(f"  {verdict}: {r['backend']}, {r['name']}: {r['pack']['states_gb_per_s']:.3g} GB/s")

    result = {
        "config": asdict(options),
        "shape": list(x.shape),
        "gate": {"passed": True, "schemes": len(schemes)},
        "copy": {"seconds": copy, "gb_per_s": copy_gb_per_s},
        "results": records,
        "environment": environment(device),
    }
    if options.output:
        write_json(options.output, result)
    return result


if __name__ == "__main__":
    main(parse_config(QuantizeBenchmarkConfig, __doc__))
