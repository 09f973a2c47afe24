"""The Triton encoder of trellis codes against its reference, bit for bit; blocks of a cache that it writes."""

import pytest
import torch

from configuration_alrd_llama import QuantScheme
from modules import trellis
from modules.kivi_cache import CacheScheme, KIVILatentLayer

pytest.importorskip("triton")
from modules.kernels.triton import trellis as kernels

pytestmark = [
    # numpy's, on costs that are infinite.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("poisoned_kernels"),
]

by_bits = pytest.mark.parametrize("bits", trellis.TRELLIS_BITS)


def compare(x: torch.Tensor, bits: int, widths: tuple[int, ...], device: torch.device, points=None) -> None:
    """Compare codes of `x`, on the CPU, by the reference with those of its copy on `device`."""
    expected = trellis.encode(x, bits, widths, points)
    found = kernels.encode(x.to(device), bits, widths, None if points is None else points.to(device))
    assert found.device.type == device.type and found.dtype == torch.uint8
    assert torch.equal(found.cpu(), expected)


@by_bits
def test_same_codes(device, bits):
    """Several chains, one without channels, of as many tokens as fill no program; one channel; one token."""
    x = 127.5 + 45 * torch.randn(70, 45)
    for widths in ((45,), (1, 7, 0, 37)):
        compare(x, bits, widths, device)
        compare(x[:1], bits, widths, device)
    compare(x[:33, :1], bits, (1,), device)
    compare(x[:, ::3], bits, (15,), device)
    for empty in (x[:0], x[:, :0]):
        assert kernels.encode(empty.to(device), bits, (empty.shape[1],)).shape == empty.shape


@by_bits
def test_the_first_of_equal_costs(device, bits):
    """Values that lie between points, or where a table has one point many times, have paths of equal cost."""
    compare(torch.full((3, 40), 127.5), bits, (40,), device)
    compare(torch.randint(0, 3, (40, 40)).float(), bits, (11, 29), device, torch.randint(0, 3, (128,)).float())


@by_bits
def test_far_beyond_the_points(device, bits):
    x = 1e6 * torch.randn(5, 45)
    x[0, 3], x[1, 4], x[2, 20], x[3, 0] = torch.inf, -torch.inf, torch.nan, torch.nan
    compare(x, bits, (40, 5), device)


def test_points_of_ones_own(device):
    compare(127.5 + 45 * torch.randn(20, 30), 2, (30,), device, 255 * torch.rand(128))


def test_many_tokens_are_several_launches(device, monkeypatch):
    monkeypatch.setattr(kernels, "_TOKENS", 64)
    compare(127.5 + 45 * torch.randn(150, 12), 3, (5, 7), device)


@pytest.mark.gpu
def test_a_graph_takes_the_kernel():
    x = 127.5 + 45 * torch.randn(70, 45, device="cuda")
    kernels.encode(x, 2, (8, 37))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes = kernels.encode(x, 2, (8, 37))
    x.normal_(127.5, 45)
    graph.replay()
    assert torch.equal(codes.cpu(), trellis.encode(x.cpu(), 2, (8, 37)))


TIERS = {"keys": [[[3, 2], [4, 5], [5, 1]], [[7, 2], [1, 8]]], "values": [[[12, 3]], [[2, 6], [6, 4]]]}


@pytest.mark.parametrize("token_scale", [False, True], ids=["channels", "tokens"])
def test_blocks_of_a_cache(device, monkeypatch, token_scale):
    """The bytes of the reference, by one launch for each width, however many tokens."""
    launches = []
    encode = kernels.encode

    def counted(x, bits, widths):
        launches.append((bits, widths))
        return encode(x, bits, widths)

    monkeypatch.setattr(kernels, "encode", counted)
    sides, scales = {}, {}
    for side, tiers in TIERS.items():
        sides[side] = QuantScheme(
            2, group_size=16, static=True, symmetric=False, code="trellis", tiers=tiers, token_scale=token_scale
        )
        scales[side] = (0.02 + torch.rand(20) / 50, torch.randn(20) - 3)
    scheme = CacheScheme.of(sides["keys"], sides["values"], residual_length=5, sink_length=2)
    states, stored = torch.randn(2, 2, 60, 20), []
    for backend, where in (("reference", torch.device("cpu")), ("triton", device)):
        static = {side: tuple(x.to(where) for x in pair) for side, pair in scales.items()}
        layer = KIVILatentLayer(scheme, ((12, 8), (12, 8)), static, backend)
        for piece in states.to(where).split([50, 10], dim=2):
            layer.append(*piece)
        stored.append([tensor.cpu()[: layer.pool.used] for tensor in layer.pool.tensors()])
    for reference, found in zip(*stored, strict=True):
        assert torch.equal(reference, found)
    # Two blocks of each of two rows by the first piece, one by the second: for a row all its blocks at once.
    row = [(5, (4, 0)), (2, (3, 7)), (1, (5, 0)), (6, (0, 2)), (4, (0, 6)), (3, (12, 0))]
    assert launches == 4 * row
