"""The Triton kernels against their reference, bit for bit: in Triton's interpreter, and on a GPU where there is one."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modules import quant_utils as reference
from modules.kernels import BACKENDS, get_backend
from modules.kivi_cache import create_kivi_cache
from tests.helpers import assert_same, magnitudes, tiny_split

triton = pytest.importorskip("triton")
from modules.kernels.triton import common  # noqa: E402
from modules.kernels.triton import quantize as kernels  # noqa: E402

# numpy's, on what the interpreter computes where the kernels then do not look: beyond the end, and behind a NaN.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("poisoned_kernels")]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: (n_bits, symmetric, range_method), all there are.
SETTINGS = [
    (n_bits, symmetric, method)
    for n_bits, symmetric, method in itertools.product((1, 1.58, 2, 3, 4, 5, 6, 8), (False, True), ("minmax", "mse"))
    if (symmetric or n_bits != 1.58) and (method == "mse" or n_bits >= 2 or not symmetric)
]

#: Blocks, tokens and groups of channels, of sizes that divide nothing; one tile, more than a tile, or a single value.
SHAPES = [(1, 63, (7, 1, 5)), (2, 111, (13,)), (1, 130, (3, 37)), (2, 1, (1,)), (2, 33, (16, 16)), (1, 35, (40, 8))]


def compare(x, device, n_bits, widths, symmetric, method, scale_dtype=None, states_dtype=None) -> None:
    """Compare all functions on `x`, on the CPU, for the reference, and its copy on `device`."""
    arguments = (n_bits, widths, symmetric, method, scale_dtype)
    expected = reference.quantize_and_pack(x, *arguments)
    on_device = x.to(device)
    assert_same(kernels.quantize_and_pack(on_device, *arguments), expected)
    stored = [None if t is None else t.to(device) for t in expected]
    rest = (n_bits, x.shape[1], states_dtype or x.dtype, widths)
    assert_same([kernels.unpack_and_dequantize(*stored, *rest)], [reference.unpack_and_dequantize(*expected, *rest)])


# ---- the same bits


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(("n_bits", "symmetric", "method"), SETTINGS)
def test_same_bits(device, n_bits, symmetric, method, per_channel):
    case = SETTINGS.index((n_bits, symmetric, method)) + 3 * per_channel
    for i in (2 * case, 2 * case + 1):
        (n, length, widths), dtype = SHAPES[i % len(SHAPES)], DTYPES[i % 3]
        scale_dtype = (None, torch.float16, torch.bfloat16)[i // 2 % 3]
        x = (3 * torch.randn(n, length, sum(widths)) + torch.randn(sum(widths))).to(dtype)
        compare(x, device, n_bits, None if per_channel else widths, symmetric, method, scale_dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("n_bits", "symmetric", "method"), SETTINGS)
def test_reference_has_the_same_bits_on_a_gpu(n_bits, symmetric, method):
    x = torch.randn(4, 63, 40)
    for widths in (None, (33, 7)):
        expected = reference.quantize_and_pack(x, n_bits, widths, symmetric, method)
        assert_same(reference.quantize_and_pack(x.cuda(), n_bits, widths, symmetric, method), expected)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(("n_bits", "symmetric", "method"), [s for s in SETTINGS if s[0] in (1, 1.58, 3, 6)])
def test_magnitudes(device, n_bits, symmetric, method, per_channel):
    dtype = DTYPES[1 + SETTINGS.index((n_bits, symmetric, method)) % 2]
    # A range of twice the limit does not fit a scale of bfloat16, whose limit is that of float32.
    x = magnitudes(20, 5, dtype) / (1 if dtype == torch.float16 else 4)
    compare(x, device, n_bits, None if per_channel else (4, 1), symmetric, method)


@pytest.mark.parametrize("dtype", DTYPES)
def test_halves_and_rounding(device, dtype):
    """Values half-way between two codes, and ranges that the stored types cannot hold exactly."""
    x = (torch.arange(64.0)[:, None] * torch.tensor([1.0, 0.5, 1 / 3, 1e-3]) + torch.tensor([0, 1e3, -1e3, 0.1])).to(
        dtype
    )
    for n_bits, symmetric in itertools.product((2, 4, 8), (True, False)):
        compare(x[None], device, n_bits, None, symmetric, "minmax")
        compare(x[None], device, n_bits, (4,), symmetric, "minmax", torch.bfloat16)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(("n_bits", "symmetric"), [(1, False), (1, True), (1.58, True), (4, False), (4, True)])
def test_ranges_finer_than_the_stored_types(device, n_bits, symmetric, per_channel):
    # The steps of float16 near the third and fourth offset are 7,000 of these spreads: errors that the sums clamp.
    offset = torch.tensor([1000.3, -1000.3, 1.3018e-6, 1.43584e-5, 0, 0])
    spread = torch.tensor([1e-3, 1e-2, 8.4e-12, 5.4e-12, 1e-12, 1e-40])
    x = offset + spread * torch.rand(20, 6)
    compare((x if per_channel else x.T)[None], device, n_bits, None if per_channel else (20,), symmetric, "mse")


@pytest.mark.parametrize(("n_bits", "method"), [(1.58, "mse"), (3, "minmax"), (3, "mse")])
def test_groups_that_exceed_a_tile(device, n_bits, method):
    symmetric = n_bits == 1.58
    x = torch.randn(1, 300, 3, dtype=torch.float16)
    compare(x, device, n_bits, None, symmetric, method)
    compare(x.transpose(1, 2).contiguous()[:, :, :270], device, n_bits, (269, 1), symmetric, method)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("n_bits", [2, 3, 4, 5, 6, 8])
def test_static_scales_clip(device, n_bits, symmetric):
    x, scale = torch.randn(2, 70, 9), torch.rand(9)
    scale[3] = 0
    zero_point = None if symmetric else torch.randn(9)
    static = [None if t is None else t.to(device) for t in (scale, zero_point)]
    expected = reference.quantize_and_pack(x, n_bits, static=(scale, zero_point))
    actual = kernels.quantize_and_pack(x.to(device), n_bits, static=tuple(static))
    assert_same(actual, expected)
    for rows in (1, 2):  # one for all blocks, or one each
        parameters = [None if t is None else t.expand(rows, 9) for t in (scale, zero_point)]
        on_device = [None if t is None else t.to(device) for t in parameters]
        states = kernels.unpack_and_dequantize(actual[0], *on_device, n_bits, 70, torch.bfloat16)
        assert_same([states], [reference.unpack_and_dequantize(expected[0], *parameters, n_bits, 70, torch.bfloat16)])


@pytest.mark.parametrize("per_channel", [True, False])
def test_states_of_every_type_stay_finite(device, per_channel):
    widths = None if per_channel else (3,)
    for dtype, scale_dtype in itertools.product((*DTYPES, torch.float64), DTYPES[1:]):
        x = torch.tensor([-1.0, 0.3, 1.0])[:, None] * torch.tensor([torch.finfo(scale_dtype).max / 3, 2.0, 1e-6])
        compare(x[None].to(torch.float64), device, 4, widths, False, "minmax", scale_dtype, dtype)


@pytest.mark.parametrize("per_channel", [True, False])
def test_views_are_read_in_place(device, per_channel):
    widths = None if per_channel else (5, 4)
    x = torch.randn(4, 66, 27).to(torch.bfloat16)
    views = [
        x[1::2, 3:, 9:18],
        x[:2, ::3, :9],
        x[:2, :9].transpose(1, 2),
        x[:2, :, ::3],
        x[:1, :1, :9].expand(2, 40, 9),
    ]
    for view in views:
        assert view.stride(-1) != 1 or kernels.readable_rows(view).data_ptr() == view.data_ptr()
        compare(view, device, 2, widths, False, "minmax")


@pytest.mark.parametrize("n_bits", [2, 3, 1.58])
def test_packed_views_and_no_blocks(device, n_bits):
    x = torch.randn(3, 45, 12)
    symmetric = n_bits == 1.58
    packed, scale, zero_point = reference.quantize_and_pack(x, n_bits, None, symmetric, "mse")
    for blocks, channels in ((slice(0, 3, 2), slice(4, 9)), (slice(0, 0), slice(None))):
        stored = [packed[blocks, :, channels], scale[blocks, channels], symmetric or zero_point[blocks, channels]]
        stored = [None if t is True else t for t in stored]
        on_device = [None if t is None else t.to(device) for t in stored]
        assert_same(
            [kernels.unpack_and_dequantize(*on_device, n_bits, 45, torch.float16)],
            [reference.unpack_and_dequantize(*stored, n_bits, 45, torch.float16)],
        )
    assert_same(kernels.quantize_and_pack(x[:0].to(device), 2), reference.quantize_and_pack(x[:0], 2))


# ---- errors


@pytest.mark.interpreter
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 65505.0, -1e9])
@pytest.mark.parametrize(
    ("n_bits", "symmetric", "method"), [(1, True, "mse"), (1.58, True, "mse"), (2, False, "minmax")]
)
def test_values_that_do_not_fit_are_refused(n_bits, symmetric, method, value):
    """On a GPU the same condition is checked on the device; see `require`."""
    x = torch.randn(1, 40, 6)
    x[0, 39, 2] = value
    for widths in (None, (5, 1)):
        messages = []
        for module in (reference, kernels):
            with pytest.raises(ValueError, match="must be finite") as error:
                module.quantize_and_pack(x, n_bits, widths, symmetric, method)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


@pytest.mark.interpreter
@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_a_range_that_does_not_fit_is_refused(method):
    x = torch.randn(1, 40, 6, dtype=torch.bfloat16)
    x[0, 3, 2], x[0, 39, 2] = 3e38, -3e38
    for module in (reference, kernels):
        with pytest.raises(ValueError, match="they and their range must fit"):
            module.quantize_and_pack(x, 2, range_method=method)


@pytest.mark.interpreter
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_static_scales_refuse_what_is_not_finite(value):
    x = torch.randn(2, 70, 6)
    x[1, 69, 5] = value
    messages = []
    for module in (reference, kernels):
        with pytest.raises(ValueError, match="must be finite") as error:
            module.quantize_and_pack(x, 8, static=(torch.ones(6), torch.zeros(6)))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


# ---- choice of the back end


def test_back_end_follows_the_device(monkeypatch):
    monkeypatch.delenv("ALRD_BACKEND", raising=False)
    assert str(get_backend(None, torch.device("cpu"))) == "cpu"
    assert str(get_backend(None, torch.device("cuda"))) == "triton"
    assert get_backend("reference", torch.device("cuda")).quantize_and_pack is reference.quantize_and_pack
    assert get_backend("triton", torch.device("cuda")).quantize_and_pack is kernels.quantize_and_pack


def test_environment_chooses_where_the_caller_does_not(monkeypatch):
    monkeypatch.setenv("ALRD_BACKEND", "reference")
    assert get_backend(None, torch.device("cuda")).name == "reference"
    assert get_backend("triton", torch.device("cuda")).name == "triton"
    monkeypatch.setenv("ALRD_BACKEND", "cuda")
    with pytest.raises(ValueError, match="ALRD_BACKEND='cuda': must be one of 'reference', 'triton', 'cpu'"):
        get_backend(None, torch.device("cpu"))
    assert BACKENDS == ("reference", "triton", "cpu")


def test_triton_needs_a_gpu_or_its_interpreter(monkeypatch):
    monkeypatch.setattr(common, "INTERPRETED", False)
    with pytest.raises(ValueError, match="backend='triton': must be 'reference' or 'cpu' for tensors on cpu"):
        get_backend("triton", torch.device("cpu"))
    monkeypatch.setattr(common, "INTERPRETED", True)
    assert get_backend("triton", torch.device("cpu")).name == "triton"


def test_without_triton_the_choice_is_said(monkeypatch):
    monkeypatch.delenv("ALRD_BACKEND", raising=False)
    monkeypatch.setitem(sys.modules, "modules.kernels.triton.quantize", None)
    with pytest.warns(
        UserWarning,
        match="chose 'reference' on cuda, since 'triton' cannot be used: import of",
    ):
        assert get_backend(None, torch.device("cuda")).name == "reference"
    with pytest.raises(ValueError, match="backend='triton': cannot be used on this machine: import of"):
        get_backend("triton", torch.device("cuda"))


def test_triton_is_imported_only_when_chosen():
    code = (
        "import sys, torch; from modules.kernels import get_backend; get_backend(None, torch.device('cpu')); "
        "assert 'modules.kernels.triton.quantize' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


# ---- GPUs that are not here


def assert_compiles(*options: str) -> None:
    """The kernels compile for GPUs, spill nothing and round as the reference does."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parent.parent
    command = [sys.executable, str(root / "tests" / "aot_compile.py"), "--json", *options]
    result = subprocess.run(command, capture_output=True, text=True, env=environment | {"PYTHONPATH": str(root)})
    assert result.returncode == 0, result.stderr
    records = json.loads(result.stdout)
    kernels = {"quantize_kernel", "dequantize_kernel", "trellis_kernel", "scale_tokens_kernel"}
    assert {r["kernel"] for r in records} == kernels
    assert not [r for r in records if r["stack"] or r["local"] or r["inexact"]]


def test_kernels_compile_for_gpus():
    assert_compiles()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "89", "90", "100"])
def test_every_kernel_compiles_for_gpus(architecture):
    assert_compiles("--all", "--architectures", architecture)


# ---- what a cache says


@pytest.mark.parametrize(
    "settings, said",
    [
        ({}, "backend cpu;"),
        ({"backend": "reference"}, "backend reference;"),
        ({"k_bits": 1.5}, "backend cpu (attention: reference);"),
        ({"v_scheme": {"protected": 0.25}}, "backend cpu (attention: reference);"),
    ],
)
def test_the_cache_says_who_attends(settings, said, monkeypatch):
    monkeypatch.delenv("ALRD_BACKEND", raising=False)
    cache = create_kivi_cache(**settings)
    cache.update(*torch.randn(2, 1, 2, 200, 16), 0)
    assert said in repr(cache)


def test_a_step_over_the_cache_refuses_its_gradient(tmp_path):
    model, ids = tiny_split(tmp_path, 24), torch.randint(1, 97, (1, 60))
    cache = model.create_kivi_cache(backend="cpu")
    model(ids, past_key_values=cache).logits.sum().backward()  # the prompt attends to itself
    with pytest.raises(RuntimeError, match="a step over a packed cache has no gradient"):
        model(ids[:, :1], past_key_values=cache).logits.sum().backward()
