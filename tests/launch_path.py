"""Launch the Triton kernels on GPUs that are not here, every case twice: all that a launch does but the launch itself.

    python tests/launch_path.py [--all] [--architectures 80 90] [--only llama3]

`triton.compile`, which the programs `aot_*.py` use, leaves out what comes before and after it. Here host code calls
Triton as on a GPU, and a driver stands in for CUDA's: arguments are bound and specialised, kernels compiled, their
globals compared with those that were compiled, and what they need with what the device has.

Prints a JSON record for each compiled kernel: how often it was launched. Not under TRITON_INTERPRET: run as a process
of its own. `tests/test_launch_path.py` asserts the records.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
from triton.backends.compiler import GPUTarget

from modules.kernels.triton import attention as attention_triton
from modules.kernels.triton import quantize as quantize_triton
from tests import aot_append, aot_attention, aot_compile
from tests.helpers import attend


class CountingDriver:
    """Stands in for the driver of CUDA. Its device n is a GPU of architecture n; launches are counted, not made."""

    def __init__(self):
        self.device = 0
        self.utils = self
        self.records: list[dict] = []

    def get_current_device(self) -> int:
        return self.device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.device, 32)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict:
        return {"max_shared_mem": aot_attention.SHARED_LIMIT[device]}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        """Module, function, registers of a thread, what it spills, and threads that a program may have."""
        return name, name, 0, 0, 1024

    def launcher_cls(self, source, metadata) -> Callable:
        """What Triton makes once for each compiled kernel, and calls to launch it."""
        record = {"kernel": source.fn.__name__, "architecture": self.device, "launches": 0}
        self.records.append(record)

        def launch(*arguments) -> None:
            record["launches"] += 1

        return launch


def cases(everything: bool) -> Iterator[tuple[str, Callable]]:
    """Functions that make a call of host code, by name: the call launches the same kernels each time."""
    for name, arguments in aot_compile.cases(everything):
        yield f"quantize {name}", lambda a=arguments: partial(aot_compile.run_case, **a)
    for name, step in aot_append.CASES.items():
        if everything or name == "tiers":
            yield f"append {name}", lambda s=step: aot_append.appender(*s)
    for name, case in aot_attention.cases(everything):
        yield f"attention {name}", lambda c=case: partial(attend, attention_triton.latent_attention, **c())
    if everything:
        yield "attention with a bias", attention_with_bias


def attention_with_bias() -> Callable:
    arguments = aot_attention.llama3(2)
    expansion = arguments["expand_keys"]
    expansion.bias = torch.nn.Parameter(expansion.weight.new_zeros(len(expansion.weight)))
    return partial(attend, attention_triton.latent_attention, **arguments)


@torch.no_grad()
def main(everything: bool, architectures: list[int], only: str = "") -> list[dict]:
    """Launch; returns a record for each compiled kernel."""
    quantize_triton.check_scale = quantize_triton.require = lambda *_: None  # nothing was computed
    driver = CountingDriver()
    triton.runtime.driver.set_active(driver)
    for name, make_call in cases(everything):
        if only not in name:
            continue
        call = make_call()
        for driver.device in architectures:
            for launch in ("first", "second"):
                try:
                    call()
                except Exception as error:
                    error.add_note(f"{launch} launch of {name} on sm_{driver.device}")
                    raise
    return driver.records


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="Every case.")
    parser.add_argument("--architectures", type=int, nargs="+", default=aot_compile.ARCHITECTURES)
    parser.add_argument("--only", default="", help="Cases whose name contains this.")
    options = parser.parse_args()
    print(json.dumps(main(options.all, options.architectures, options.only)))
