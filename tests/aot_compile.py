"""Compile the Triton kernels for GPUs that are not here, and read off the binaries what they use.

    python tests/aot_compile.py [--all] [--architectures 80 90]

For each kernel that the functions of `quantize.py`, `trellis.py` and `token_scales.py` of `modules/kernels/triton`
would launch: registers of a thread, its stack and local memory (both 0 unless registers spill), shared memory of a
program, and instructions that would round differently from the reference. Not under TRITON_INTERPRET: run as a process
of its own. `tests/test_kernels.py` asserts the record.
"""

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from modules.kernels.triton import quantize, token_scales
from modules.kernels.triton import trellis as trellis_triton
from modules.trellis import TRELLIS_BITS

ARCHITECTURES = (80, 89, 90, 100)

#: Approximate division, contraction of a product and a sum, flushing of subnormals.
INEXACT = re.compile(r"div\.(?:full|approx)|rcp\.approx|fma\.|\S*\.ftz")
#: Rounds down to an integer; subnormals, which it flushes, do not occur: what goes in is 0 or at least 2^-25.
FLOOR = "cvt.rmi.ftz.f32.f32"

TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.int16: "*i16", torch.int32: "*i32"}
TYPES |= {torch.int64: "*i64", torch.uint8: "*u8", torch.float64: "*fp64"}


class Recorder:
    """Stands in for a kernel and keeps what it is launched with."""

    def __init__(self, kernel, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda **arguments: self.launches.append((self.kernel, arguments))


def compile_kernel(kernel, arguments: dict, architecture: int):
    """Compile as a launch with `arguments` would: an int of 1 is a constant, one that 16 divides is known to be so."""
    arguments = dict(arguments)
    options = {name: arguments.pop(name) for name in ("num_warps", "maxnreg", "enable_fp_fusion")}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        elif parameter.is_constexpr or value == 1:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        else:
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
        if signature[parameter.name] != "constexpr" and (isinstance(value, torch.Tensor) or value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def usage(compiled) -> dict:
    """Registers, stack and local bytes of a thread, shared bytes of a program, and inexact instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    figures = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    return {
        "registers": int(figures["REG"]),
        "stack": int(figures["STACK"]),
        "local": int(figures["LOCAL"]),
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "inexact": sorted(word for word in set(compiled.asm["ptx"].split()) - {FLOOR} if INEXACT.match(word)),
    }


def run_case(n_bits, widths, symmetric, method, dtype=torch.float16, length=128, static=False) -> None:
    """Call every function once; `Recorder`s take the place of the kernels."""
    channels = sum(widths) if widths else 256
    x = torch.zeros(2, length, channels, dtype=dtype)
    if method == "trellis":
        trellis_triton.encode(x[0], n_bits, widths)
        return
    if method == "token scales":
        energy = torch.ones(len(widths), dtype=torch.float64)
        token_scales.scale_tokens(x, widths, (torch.ones(channels),) * 5, energy, ((-8, 0, 8), (-2, 2)))
        return
    parameters = (torch.zeros(channels), None if symmetric else torch.zeros(channels)) if static else None
    packed, scale, zero_point = quantize.quantize_and_pack(x, n_bits, widths, symmetric, method, static=parameters)
    scale, zero_point = (t[None] if static and t is not None else t for t in (scale, zero_point))
    quantize.unpack_and_dequantize(packed, scale, zero_point, n_bits, length, dtype, widths)


def cases(everything: bool):
    """Keyword arguments of `run_case`, by a name."""
    settings = [((1.58, True, "mse"), (128, 128)), ((3, False, "mse"), None)]
    if everything:
        schemes = itertools.product((1, 1.58, 2, 3, 4, 5, 6, 8), (False, True), ("minmax", "mse"))
        valid = [(b, s, m) for b, s, m in schemes if (s or b != 1.58) and (m == "mse" or b >= 2 or not s)]
        settings = itertools.product(valid, (None, (128, 128)))
    for (b, symmetric, method), widths in settings:
        name = f"{b}-bit per {'token' if widths else 'channel'}{' symmetric' if symmetric else ''} {method}"
        case = {"n_bits": b, "widths": widths, "symmetric": symmetric, "method": method}
        yield name, case
        if everything:
            yield f"{name} bf16", case | {"dtype": torch.bfloat16}
            yield f"{name} fp32", case | {"dtype": torch.float32}
            yield f"{name} long", case | {"length": 2048} if widths is None else case | {"widths": (2048,)}
            yield f"{name} odd", case | {"length": 111, "widths": widths and (7, 1, 130)}
        if everything and b >= 2 and widths is None:
            yield f"{name} static", case | {"static": True}
    for bits in TRELLIS_BITS if everything else (1, 2):
        case = {"n_bits": bits, "widths": (48, 0, 7), "symmetric": False, "method": "trellis"}
        yield f"{bits}-bit trellis", case
    for widths in ((7, 1), (128, 128), (653,), (4000,)) if everything else ((653,),):
        case = {"n_bits": 2, "widths": widths, "symmetric": False, "method": "token scales"}
        yield f"token scales of {max(widths)} channels", case
        yield f"token scales of {max(widths)} channels bf16", case | {"dtype": torch.bfloat16}
    yield "one token, one channel", {"n_bits": 2, "widths": (1,), "symmetric": False, "method": "mse", "length": 1}


def main(everything: bool, architectures: list[int], only: str = "") -> list[dict]:
    """Compile; returns one record for each kernel and architecture."""
    quantize.check_scale = quantize.require = lambda *_: None  # nothing was computed
    launches: list = []
    for name in ("quantize_kernel", "_dequantize_kernel"):
        setattr(quantize, name, Recorder(getattr(quantize, name), launches))
    trellis_triton.trellis_kernel = Recorder(trellis_triton.trellis_kernel, launches)
    token_scales.scale_tokens_kernel = Recorder(token_scales.scale_tokens_kernel, launches)
    records, seen = [], set()
    for name, case in cases(everything):
        if only not in name:
            continue
        run_case(**case)
        for kernel, arguments in launches:
            key = (kernel.__name__, *(v.dtype if isinstance(v, torch.Tensor) else v for v in arguments.values()))
            if key not in seen:
                seen.add(key)
                for architecture in architectures:
                    record = {"kernel": kernel.__name__.strip("_"), "case": name, "architecture": architecture}
                    records.append(record | usage(compile_kernel(kernel, arguments, architecture)))
        launches.clear()
    return records


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="Every width, orientation, method and type.")
    parser.add_argument("--architectures", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--only", default="", help="Cases whose name contains this.")
    parser.add_argument("--json", action="store_true", help="Print the records as JSON.")
    options = parser.parse_args()
    records = main(options.all, options.architectures, options.only)
    if options.json:
        print(json.dumps(records))
    else:
        print(f"{'kernel':18} {'case':38} {'sm':>3} {'regs':>4} {'stack':>5} {'local':>5} {'shared':>6} warps inexact")
        for r in records:
            print(
                f"{r['kernel']:18} {r['case']:38} {r['architecture']:3} {r['registers']:4} {r['stack']:5} "
                f"{r['local']:5} {r['shared']:6} {r['warps']:5} {' '.join(r['inexact'])}"
            )
