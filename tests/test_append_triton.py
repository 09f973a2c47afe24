"""A step of the cache of fixed capacity by Triton kernels: the bytes of any cache, the same launches in every step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from modules.kernels.triton import append as append_triton
from modules.kivi_cache import CacheScheme
from tests.test_fixed_cache import SCHEMES, assert_same_rows, left_padded, pair, random_states

pytestmark = [
    pytest.mark.interpreter,
    # numpy's, on what the interpreter computes where the kernels then do not look.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

KERNELS = ("_append_kernel", "_take_kernel", "_flush_kernel", "_advance_kernel")


class Counter:
    """A kernel that writes down its launches."""

    def __init__(self, kernel, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(**arguments):
            constants = {name: x for name, x in arguments.items() if not isinstance(x, torch.Tensor)}
            self.launches.append((self.kernel.__name__, grid, constants))
            return self.kernel[grid](**arguments)

        return launch


@pytest.fixture
def launches(monkeypatch) -> list:
    found: list = []
    for name in KERNELS:
        monkeypatch.setattr(append_triton, name, Counter(getattr(append_triton, name), found))
    return found


@pytest.mark.parametrize("name", SCHEMES)
def test_same_bytes_as_any_cache(launches, name):
    scheme, dtype = SCHEMES[name], (torch.float32, torch.bfloat16, torch.float16)[list(SCHEMES).index(name) % 3]
    ordinary, fixed = pair(scheme, backend="triton")
    most = scheme.sink_length + scheme.residual_length + scheme.block_length  # the first row's block is due with these
    pieces = ((3, (1, 3)), (2, None), (most - 4, (0, most - 9)), (1, None), (13, None))
    for length, pads in pieces:
        states, real = random_states(2, length, dtype), None if pads is None else left_padded(2, length, pads)
        for layer in (ordinary, fixed):
            layer.append(*states, real)
        assert_same_rows(fixed, ordinary)
    assert fixed.rows[0].blocks
    assert sum(kernel == "_append_kernel" for kernel, _, _ in launches) == 3


def test_every_step_is_the_same_launches(launches):
    _, fixed = pair(SCHEMES["tiers"], backend="triton")
    fixed.append(*random_states(2, 21), left_padded(2, 21, (2, 0)))
    assert not launches
    steps, blocks = [], []
    for _ in range(4):
        fixed.append(*random_states(2, 1))
        steps.append(list(launches))
        blocks.append([len(row.blocks) for row in fixed.rows])
        launches.clear()
    assert all(step == steps[0] for step in steps) and len(steps[0]) > 5
    assert blocks[0] == [0, 0] and blocks[-1] == [1, 1] and [0, 1] in blocks


def test_a_step_is_checked_once(monkeypatch):
    """Each check is a launch on a GPU."""
    checks = []
    monkeypatch.setattr(append_triton, "require", lambda *check: checks.append(check))
    _, fixed = pair(SCHEMES["tiers"], backend="triton")
    fixed.append(*random_states(2, 3))
    ((ok, message),) = checks
    assert ok.shape == () and ok and "values to quantize must be finite" in message and "capacity=" in message


@pytest.mark.parametrize("scheme", [CacheScheme(2, 3, 5, 21, 0), CacheScheme(3, 1, 4, 9, 1)], ids=str)
def test_windows_longer_than_a_block_move_up(scheme):
    ordinary, fixed = pair(scheme, backend="triton")
    for length in (30, 1, 5):
        states = random_states(2, length)
        for layer in (ordinary, fixed):
            layer.append(*states)
        assert_same_rows(fixed, ordinary)


def test_views_are_read_in_place():
    ordinary, fixed = pair(SCHEMES["per channel and token"], backend="triton")
    for length in (30, 3):
        keys, values = (x.repeat(1, 2, 2)[:, ::2, 7:27] for x in random_states(2, length))
        values = values.transpose(1, 2).contiguous().transpose(1, 2)
        for layer in (ordinary, fixed):
            layer.append(keys, values)
    assert_same_rows(fixed, ordinary)


def test_a_graph_takes_the_kernels():
    ordinary, fixed = pair(SCHEMES["per channel and token"], backend="triton")
    states = random_states(2, 25)
    for layer in (ordinary, fixed):
        layer.append(*states)
    step = torch.compile(fixed.append, backend="eager", fullgraph=True)
    for _ in range(5):
        states = random_states(2, 1)
        ordinary.append(*states)
        step(*states)
    assert_same_rows(fixed, ordinary)
    assert all(len(row.blocks) == 1 for row in fixed.rows)


def test_capacity_is_a_bound():
    ordinary, fixed = pair(SCHEMES["no window, no sinks"], 29, backend="triton")
    states, real = random_states(2, 26), left_padded(2, 26, (20, 0))
    ordinary.append(*states, real)
    fixed.append(*states, real)
    states = random_states(2, 3)
    ordinary.append(*states)
    fixed.append(*states)
    assert_same_rows(fixed, ordinary)
    with pytest.raises(ValueError, match="capacity=29: a row of the cache would exceed it"):
        fixed.append(*random_states(2, 1))
    assert [row.tokens for row in fixed.rows] == [10, 29]
    fixed.reset()
    fixed.append(*random_states(2, 1))


@pytest.mark.parametrize("name", ["per channel and token", "static", "ternary and one bit"])
def test_values_that_cannot_be_quantized_are_refused(name):
    scheme = SCHEMES[name]
    _, fixed = pair(scheme, backend="triton")
    states = random_states(2, scheme.sink_length + scheme.residual_length + scheme.block_length - 1)
    states[1][1, -scheme.residual_length - 2, 3] = torch.inf
    fixed.append(*states)
    with pytest.raises(ValueError, match="values to quantize must be finite and fit their scales"):
        fixed.append(*random_states(2, 1))
    fixed.reset()
    fixed.append(*random_states(2, 1))


def assert_compiles(*options: str) -> None:
    """The kernels compile for GPUs, spill nothing and round as the reference does."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parent.parent
    command = [sys.executable, str(root / "tests" / "aot_append.py"), *options]
    result = subprocess.run(command, capture_output=True, text=True, env=environment | {"PYTHONPATH": str(root)})
    assert result.returncode == 0, result.stderr
    records = json.loads(result.stdout)
    assert {f"_{r['kernel']}" for r in records} == set(KERNELS)
    assert not [r for r in records if r["stack"] or r["local"] or r["inexact"] or r["shared"] > 48 << 10]


def test_kernels_compile_for_gpus():
    assert_compiles("--architectures", "90", "--only", "tiers")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "89", "90", "100"])
def test_every_kernel_compiles_for_gpus(architecture):
    assert_compiles("--architectures", architecture)
