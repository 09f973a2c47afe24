"""The Triton kernel that chooses the scales of tokens: the bytes of PyTorch, and the states by them, to the bit."""

import pytest
import torch

pytest.importorskip("triton")
from modules.kernels.triton import token_scales as kernels
from tests.helpers import assert_same, magnitudes
from tests.test_quantize_cpu import TIERS, scaled_codec

pytestmark = [
    # numpy's, on states that are not finite.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("poisoned_kernels"),
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def compare(x: torch.Tensor, tiers, device: torch.device, **settings) -> torch.Tensor:
    """The bytes of the scales of `x`, on the CPU, which the reference and the kernel on `device` choose."""
    codec = scaled_codec(tiers, "reference", **settings)
    channels = (codec.middle, codec.step, codec.levels, codec.weight, codec.error_weight)
    on_device = [channel.to(device) for channel in channels]
    rounds = (codec._COARSE, codec._FINE)
    actual = kernels.scale_tokens(x.to(device), codec.widths, on_device, codec.energy.to(device), rounds)
    actual, expected = [a.cpu() for a in actual], codec._scale_tokens(x)
    # Where the states are not finite, so are both; NaN is not equal to itself.
    assert_same([a.nan_to_num() for a in actual], [e.nan_to_num() for e in expected])
    assert torch.equal(actual[1].isnan(), expected[1].isnan())
    return actual[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tiers", TIERS, ids=str)
def test_same_scales(device, tiers, dtype):
    """Tokens of very different size, one channel far out, and constant channels."""
    channels = sum(count for group in tiers for count, _ in group)
    x = torch.randn(3, 13, channels) * torch.exp(2 * torch.randn(3, 13, 1))
    x[..., 3 % channels] *= 30
    for constant in (0.0, 0.3, 1.0):
        compare(x.clamp(-6e4, 6e4).to(dtype), tiers, device, constant=constant)
    assert compare(x[:0], tiers, device).shape == (0, 13, len(tiers))


@pytest.mark.parametrize("tiers", TIERS[1:3], ids=str)
def test_ends_of_the_scales(device, tiers):
    """Sizes beyond both ends, none at all, and steps whose squares float32 does not hold."""
    channels = sum(count for group in tiers for count, _ in group)
    x = torch.randn(1, 41, channels) * torch.exp2(torch.linspace(-40, 40, 41))[:, None]
    x[0, 20] = scaled_codec(tiers, "reference").middle
    codes = compare(x, tiers, device)
    assert codes.min() < 3 and codes.max() == 255
    for spread in (1e-30, 1e-22, 1e15, 1e22):
        compare(x[:, ::4] * spread, tiers, device, spread=spread)
    compare(magnitudes(9, channels, torch.float16), tiers, device, constant=0.2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite(device, value):
    x = torch.randn(1, 4, 141)
    x[0, 1, 0], x[0, 2, 139] = value, value
    compare(x, TIERS[2], device, constant=0.2)


def test_views(device):
    x = torch.randn(3, 9, 3 * 141).to(torch.bfloat16)
    for view in (x[..., 141:282], x[1::2, ::3, :141], x[..., ::3], x[:2, :1, :141].expand(2, 5, 141)):
        compare(view, TIERS[2], device)


@pytest.mark.gpu
def test_a_graph_takes_the_kernel():
    codec = scaled_codec(TIERS[2], "reference")
    channels = [c.cuda() for c in (codec.middle, codec.step, codec.levels, codec.weight, codec.error_weight)]
    arguments = (codec.widths, channels, codec.energy.cuda(), (codec._COARSE, codec._FINE))
    x = torch.randn(2, 9, 141, device="cuda")
    kernels.scale_tokens(x, *arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kernels.scale_tokens(x, *arguments)
    x.normal_()
    graph.replay()
    assert_same([f.cpu() for f in found], codec._scale_tokens(x.cpu()))
