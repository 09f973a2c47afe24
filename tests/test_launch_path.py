"""Triton's own launch path, for GPUs that are not here: see `tests/launch_path.py`."""

import ast
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("triton")
from triton.runtime import KernelInterface

from tests.test_structure import is_jit, module_name, within

ROOT = Path(__file__).parent.parent


def run(*command: str) -> subprocess.CompletedProcess:
    """Python without the interpreter of Triton."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    command = [sys.executable, *command]
    return subprocess.run(command, capture_output=True, text=True, env=environment | {"PYTHONPATH": path})


def launched_kernels() -> set[str]:
    """Kernels that host code speaks of: it cannot call them, so it launches them."""
    found = set()
    for path in (ROOT / "modules").rglob("*.py"):
        if "vllm" in path.parts:
            continue  # a package of its own, which launches nothing itself
        known = vars(import_module(module_name(path)))
        for node in within(ast.parse(path.read_text()), is_jit):
            value = known.get(node.id) if isinstance(node, ast.Name) else None
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                value = getattr(known.get(node.value.id), node.attr, None)
            if isinstance(value, KernelInterface):
                found.add(value.fn.__name__)
    return found


def check(architectures: list[int], *options: str) -> None:
    """Every kernel is launched on each architecture, and none is compiled again for the second launch."""
    result = run(str(ROOT / "tests" / "launch_path.py"), "--architectures", *map(str, architectures), *options)
    assert result.returncode == 0, result.stderr
    records = json.loads(result.stdout)
    for architecture in architectures:
        assert {r["kernel"] for r in records if r["architecture"] == architecture} == launched_kernels()
    assert not [r for r in records if r["launches"] < 2]


def test_kernels_are_launched_twice():
    check([80, 89, 90, 100])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 89, 90, 100])
def test_every_case_is_launched_twice(architecture):
    check([architecture], "--all")


CHANGED = """
import torch, triton
import triton.language as tl
from tests.launch_path import CountingDriver

OFFSET = tl.constexpr(1)

@triton.jit
def kernel(x):
    tl.store(x, OFFSET)

driver = CountingDriver()
driver.device = 90
triton.runtime.driver.set_active(driver)
x = torch.zeros(1)
kernel[(1,)](x)
kernel[(1,)](x)
print([record["launches"] for record in driver.records])
OFFSET = tl.constexpr(2)
kernel[(1,)](x)
"""


def test_globals_are_compared_at_every_launch(tmp_path):
    (tmp_path / "changed.py").write_text(CHANGED)
    result = run(str(tmp_path / "changed.py"))
    assert result.stdout == "[2]\n"
    assert "Global variable OFFSET has changed since we compiled this kernel, from constexpr[1]" in result.stderr


TOGETHER = """
import triton
from functools import partial
from modules.kernels.triton import attention
from tests.aot_attention import llama3
from tests.helpers import attend
from tests.launch_path import CountingDriver

driver = CountingDriver()
driver.device = 90
triton.runtime.driver.set_active(driver)
compiled = [kernel.device_caches[90][0] for kernel in (attention._attention_kernel, attention._merge_kernel)]
calls = [partial(attend, attention.latent_attention, **llama3(bits)) for bits in (2, 4)]
with attention.compiled_together():
    for call in calls:
        call()
assert list(map(len, compiled)) == [2, 1] and not driver.records
for call in calls:
    call()
assert list(map(len, compiled)) == [2, 1] and [record["launches"] for record in driver.records] == [1, 2, 1]
"""


def test_kernels_are_compiled_together_before_they_are_launched():
    result = run("-c", TOGETHER)
    assert result.returncode == 0, result.stderr


LAUNCHERS = """
import torch, triton
import triton.language as tl
from modules.kernels.triton.launch import Launcher
from tests.launch_path import CountingDriver

@triton.jit(do_not_specialize=["free"])
def kernel(x, more, bias, n, strides, factor, free, SIZE: tl.constexpr):
    tl.store(x, tl.load(more[0][0]) * n * strides[1] * factor * free * SIZE)

launched = []

class Driver(CountingDriver):
    def launcher_cls(self, source, metadata):
        count = super().launcher_cls(source, metadata)
        # Metadata for profilers are made anew for each launch.
        return lambda *arguments: launched.append((source, arguments[:6] + arguments[7:])) or count()

driver = Driver()
triton.runtime.driver.set_active(driver)
# Arguments that differ in one place.
x, y = torch.zeros(64), torch.zeros(64, dtype=torch.int32)
tensors = [{"x": x, "more": ((x,), (y,)), "bias": None}]
tensors += [tensors[0] | {"x": x[1:]}, tensors[0] | {"x": x[4:]}, tensors[0] | {"x": y}, tensors[0] | {"bias": x}]
tensors += [tensors[0] | {"more": more} for more in (((x[2:],), (y,)), ((y,), (y,)), ((x, y), ()), ((x,), (y,), (x,)))]
numbers = [{"n": 3, "strides": (16, 3), "factor": 1.0, "free": 5}]
numbers += [numbers[0] | {"n": n} for n in (1, 16, 17, True, 1.0, 1 << 31)]
numbers += [numbers[0] | {"strides": strides} for strides in ((1, 3), (16, 32), (16, 3, 1))]
numbers += [numbers[0] | {"factor": 0.5}, numbers[0] | {"free": 1}, numbers[0] | {"free": 1 << 31}]
cases = [((4,), t, numbers[0]) for t in tensors] + [((4,), tensors[0], n) for n in numbers[1:]]
cases.append(((4, 2, 3), tensors[0], numbers[0]))
launcher = Launcher(kernel, {"SIZE": 2, "num_warps": 2})
run, prepared = triton.JITFunction.run, []
for turn in range(2):
    for driver.device in (90, 80):
        for grid, t, n in cases:
            launched.clear()
            kernel[grid](**t, **n, SIZE=2, num_warps=2)
            triton.JITFunction.run = lambda *a, **k: prepared.append(turn) or run(*a, **k)
            launcher.start(grid, t, n)
            triton.JITFunction.run = run
            expected, got = launched
            # The kernel that Triton takes, and all that it is launched with.
            assert got[0] is expected[0] and got[1] == expected[1], (grid, t, n)
# Of each device; x[4:] is aligned as x is.
others = 2 * (len(cases) - 1)
assert len(driver.records) > 30 and len(launcher._kept) == others and prepared == [0] * others
for n in range(100, 300):
    launcher.start((4,), tensors[0], numbers[0] | {"n": n})
assert len(launcher._kept) <= 64 and len(launched) > 200
"""


def test_what_is_kept_of_a_launch_is_what_triton_would_take(tmp_path):
    """By alignment, type and divisibility of every argument, and by device: Triton prepares a launch once for each."""
    (tmp_path / "launchers.py").write_text(LAUNCHERS)
    result = run(str(tmp_path / "launchers.py"))
    assert result.returncode == 0, result.stderr
