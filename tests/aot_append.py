"""Compile the Triton kernels of `modules/kernels/triton/append.py` for GPUs that are not here: see `aot_compile.py`.

    python tests/aot_append.py [--architectures 80 90]

Prints one JSON record for each kernel and architecture. Not under TRITON_INTERPRET: run as a process of its own;
`tests/test_append_triton.py` asserts the records.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch

from modules.cache.fixed_store import FixedStore, RowLayout
from modules.kernels.triton import append as append_triton
from modules.kivi_cache import CacheScheme
from tests import aot_compile

TIERS = {"orientation": "per_channel", "tiers": [[[16, 16], [64, 4], [48, 2]], [[8, 16], [80, 4], [40, 1]]]}

MSE = {"range_method": "mse"}

#: Scheme, dtype, new tokens of a step.
CASES = {
    "2-bit": (CacheScheme(2, 2), torch.float16, 1),
    "3-bit mse, 16 tokens": (CacheScheme(3, 4, 64, k_scheme=MSE), torch.bfloat16, 16),
    "2-bit mse, fp32": (CacheScheme(2, 2, 0, k_scheme=MSE, v_scheme=MSE), torch.float32, 1),
    "3-bit mse, long": (CacheScheme(3, 3, 512, k_scheme=MSE, v_scheme=MSE), torch.float16, 1),
    "5 and 6 bits": (CacheScheme(5, 6), torch.bfloat16, 1),
    "ternary and 1 bit": (CacheScheme(1.58, 1, 32), torch.float32, 3),
    "tiers": (CacheScheme(k_scheme=TIERS, v_scheme=TIERS), torch.bfloat16, 1),
    "16 bits and static": (CacheScheme(8, 16, k_scheme={"static": True}), torch.bfloat16, 1),
}
KERNELS = {
    name: getattr(append_triton, name)
    for name in ("_append_kernel", "_take_kernel", "_flush_kernel", "_advance_kernel")
}
WIDTHS = ((128, 128), (128, 128))


def appender(scheme: CacheScheme, dtype: torch.dtype, length: int) -> Callable[[], None]:
    """A function that makes the step of a case, always on the same store."""
    scales = {"keys": (torch.ones(256), torch.zeros(256))} if scheme.keys.static else None
    backend = SimpleNamespace(name="triton", fused_append=append_triton.FusedAppend)
    codecs = scheme.codecs(WIDTHS, dtype, backend, scales)
    layout = RowLayout(scheme.residual_length, scheme.block_length, scheme.sink_length, 4096)
    store = FixedStore(codecs, layout, 2, dtype, torch.device("cpu"))
    return partial(store.append, *(torch.zeros(2, length, 256, dtype=dtype) for _ in range(2)))


def launches_of(scheme: CacheScheme, dtype: torch.dtype, length: int) -> list:
    """The kernels that a step launches, with their arguments."""
    launches: list = []
    for name in KERNELS:
        setattr(append_triton, name, aot_compile.Recorder(KERNELS[name], launches))
    appender(scheme, dtype, length)()
    return launches


def main(architectures: list[int], only: str = "") -> list[dict]:
    """Compile; returns one record for each kernel and architecture."""
    aot_compile.TYPES[torch.uint8] = "*u8"
    records = []
    for case, settings in CASES.items():
        if only not in case:
            continue
        for kernel, arguments in launches_of(*settings):
            options = {"maxnreg": None, "enable_fp_fusion": True} | arguments
            for architecture in architectures:
                record = {"kernel": kernel.__name__.strip("_"), "case": case, "architecture": architecture}
                compiled = aot_compile.compile_kernel(kernel, options, architecture)
                records.append(record | aot_compile.usage(compiled))
    return records


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", type=int, nargs="+", default=aot_compile.ARCHITECTURES)
    parser.add_argument("--only", default="", help="Cases whose name contains this.")
    options = parser.parse_args()
    print(json.dumps(main(options.architectures, options.only)))
