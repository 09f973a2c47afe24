"""The C++ attention against the reference in float64 on the very same packed bits, and its reach in memory.

Errors are relative root mean squares over all results: float32 at most 1e-5, float16 and bfloat16 at most twice the
error of plain PyTorch in that type. So are those of the packed blocks and of the tokens in full precision, each
attended to by themselves and then merged; that is what the logarithms of the softmax's denominators are for. They
themselves are held to float32's bound in float32 only: an error that all scores of a query share leaves no trace in a
softmax, nor in plain PyTorch, and is up to five times as large in rounded expansion rows as in rounded scores.
"""

import copy
import ctypes
import itertools
import mmap
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configuration_alrd_llama import QuantScheme
from modeling_alrd_llama import LatentStep
from modules.cache.codecs import channel_bits
from modules.kernels import add_latents, get_backend
from modules.kernels.attention import Attended, merge_attended
from modules.kernels.attention import latent_attention as reference_attention
from modules.kernels.cpu.attention import latent_attention
from modules.kernels.cpu.library import MARCH_VARIABLE, library
from modules.kernels.packed import LatentQuery, PackedCache, Rope, Tile
from modules.kivi_cache import CacheScheme, KIVILatentLayer
from modules.svd_linear import ALinear, MemberBLinear, split_groups
from tests.helpers import attend

ROOT, CPU = Path(__file__).parent.parent, torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDTHS = (1, 1.58, 2, 3, 4, 5, 6, 8, 16)
ORIENTATIONS = ("per_channel", "per_token")
#: Queries of a step in half precision.
DRAWS = 3


@pytest.fixture(scope="module", autouse=True)
def built():
    """The library, whose first build takes a while."""
    try:
        return library()
    except RuntimeError as error:
        pytest.skip(str(error))


# ---- steps, and what they should give


@dataclass
class Step:
    """A cache layer and the arguments of an attention of new tokens to it."""

    layer: KIVILatentLayer
    arguments: dict

    @property
    def cache(self) -> PackedCache:
        return self.arguments["cache"]

    def but(self, **arguments) -> "Step":
        return Step(self.layer, {**self.arguments, **arguments})

    def on(self, **parts) -> "Step":
        """The step on an altered cache."""
        return self.but(cache=replace(self.cache, **parts))

    def attend(self) -> Attended:
        return attend(latent_attention, **self.arguments)

    def __call__(self) -> torch.Tensor:
        return self.attend().summed

    def in_parts(self) -> torch.Tensor:
        """The packed blocks and the tokens in full precision apart, then merged; a cache of one of them as it is."""
        if self.cache.keys is None or not self.cache.before + self.cache.after:
            return self()
        packed, others = self.on(before=(), after=()), self.on(keys=None, values=None, table=None, block_length=0)
        return merge_attended(packed.attend(), others.attend()).summed


def side(bits=2, orientation="per_channel", group_size=32, **fields) -> QuantScheme:
    return QuantScheme(bits, orientation, group_size, **fields)


def rope_of(size: int, theta: float = 1e4, attention_scaling: float = 1.0) -> Rope:
    return Rope(1 / theta ** (torch.arange(0, size, 2) / size), attention_scaling)


def noise(*shape: int, dtype: torch.dtype, shape_of_channels=None) -> torch.Tensor:
    """Latents with an offset and a size of their own for each channel."""
    channels = shape[-1]
    size = 0.5 + torch.rand(channels) if shape_of_channels is None else shape_of_channels.expand(channels)
    return (torch.randn(shape) * size + 0.3 * torch.randn(channels)).to(dtype)


def make_layer(keys, values, widths, dtype, tokens, sinks=4, residual=16, channels=None, token_sizes=False):
    """A layer with `tokens[i]` tokens in row i, the shorter rows padded on the left."""
    static = {}
    for name, scheme, width in (("keys", keys, widths[0]), ("values", values, widths[1])):
        if scheme.static:
            bits = torch.tensor(channel_bits(scheme, sum(width)))
            levels = torch.where(bits == 1, 2, 2**bits - 1)
            if scheme.code == "trellis":
                levels = torch.full_like(bits, 255)
            static[name] = (4 * (0.5 + torch.rand(sum(width))) / levels, -2 + 0.2 * torch.randn(sum(width)))
    scheme = CacheScheme.of(keys, values, sink_length=sinks, residual_length=residual)
    layer = KIVILatentLayer(scheme, widths, static or None, backend="reference")
    slots = max(tokens)
    real = torch.arange(slots) >= slots - torch.tensor(tokens)[:, None]
    states = [noise(len(tokens), slots, sum(width), dtype=dtype, shape_of_channels=channels) for width in widths]
    if token_sizes:
        states = [x * torch.exp(torch.randn(x.shape[:2]))[..., None].to(dtype) for x in states]
    layer.append(*states, None if real.all() else real)
    return layer


def make_step(
    keys: QuantScheme | None = None,
    values: QuantScheme | None = None,
    dtype: torch.dtype = torch.bfloat16,
    heads: tuple[int, int] = (4, 2),
    size: int = 16,
    ranks: tuple[tuple[int, ...], tuple[int, ...]] = ((12, 12), (12, 12)),
    tokens: tuple[int, ...] = (300,),
    new: int = 1,
    real: torch.Tensor | None = None,
    rope: Rope | str | None = "default",
    bias: bool = False,
    dense: bool = False,
    gain: float = 1.0,
    edit=None,
    channels: torch.Tensor | None = None,
    **window,
) -> Step:
    """A step of `new` tokens; `heads`: query and key/value heads; `real`: `[B, new]`, false for pads; `edit`: done to
    the layer before the step; `gain`: on the queries; `channels`: size of each latent channel."""
    query_heads, n_heads = heads
    key_ranks = (size,) * n_heads if dense else ranks[0]
    layer = make_layer(
        keys or side(), values or side(orientation="per_token"), (key_ranks, ranks[1]), dtype, tokens,
        channels=channels, **window,
    )  # fmt: skip
    if edit:
        edit(layer)
    expand = None
    if not dense:
        expand = ALinear(key_ranks, n_heads * size, n_heads, bias).to(dtype).requires_grad_(False)
        rows = n_heads * size // len(key_ranks)
        for group, rank in enumerate(key_ranks):
            piece = expand.weight[group * rows : (group + 1) * rows]
            piece.copy_(torch.randn(rows, piece.shape[1]) / rank**0.5)
            piece[:, rank:] = 0
        if bias:
            expand.bias.copy_(torch.randn(n_heads * size))
    rope = rope_of(size) if rope == "default" else rope
    lengths = torch.tensor([row.tokens for row in layer.rows])
    counted = torch.ones(len(lengths), new, dtype=torch.bool) if real is None else real
    positions = lengths[:, None] + counted.cumsum(1) - 1
    states = [
        noise(len(lengths), new, sum(width), dtype=dtype, shape_of_channels=channels) for width in (key_ranks, ranks[1])
    ]
    step = LatentStep.place(lengths.tolist(), real, new, torch.device("cpu"), has_past=True)
    tile = step.new_tokens(*states).tile()
    arguments = {
        "query": (gain * torch.randn(len(lengths), query_heads, new, size)).to(dtype),
        "positions": positions,
        "cache": layer.packed(tile),
        "expand_keys": expand,
        "value_widths": tuple(ranks[1]),
        "rope": rope,
        "scaling": size**-0.5,
    }
    return Step(layer, arguments)


def codecs_of(layer: KIVILatentLayer):
    for codec in layer.pool.codecs.values():
        if codec.scheme.token_scale:
            yield codec
            codec = codec.inner
        yield codec
        yield from getattr(codec, "codecs", {}).values()


def exact(step: Step) -> Attended:
    """The reference in float64, on dequantized states that are not rounded to the type of the model."""
    arguments, expand = step.arguments, copy.deepcopy(step.arguments["expand_keys"])
    kept = [(codec, codec.dtype) for codec in codecs_of(step.layer)]
    for codec, _ in kept:
        codec.dtype = torch.float32
    cache = step.on(
        before=tuple(tile.masked() for tile in step.cache.before),
        after=tuple(tile.masked() for tile in step.cache.after),
    ).cache
    if expand is not None:
        expand = expand.double()
    try:
        return attend(
            reference_attention,
            **{
                **arguments,
                "query": arguments["query"].double(),
                "cache": cache,
                "expand_keys": None if expand is None else lambda latents: expand(latents.double()),
            },
        )
    finally:
        for codec, dtype in kept:
            codec.dtype = dtype


def plain(step: Step) -> torch.Tensor:
    """What a Llama does in the type of the model: rebuild the keys, rotate them, `scaled_dot_product_attention`."""
    arguments, cache = step.arguments, step.cache
    query, positions, expand, rope = (arguments[n] for n in ("query", "positions", "expand_keys", "rope"))
    dtype, size = query.dtype, query.shape[-1]
    tiles = [tile.masked() for tile in cache.tiles()]
    keys = torch.cat([tile.keys.flatten(1, 2) for tile in tiles], 1)
    values = torch.cat([tile.values.flatten(1, 2) for tile in tiles], 1)
    offsets = [torch.arange(tile.keys.shape[2]).expand(*tile.keys.shape[:3]) for tile in tiles]
    at = torch.cat([(tile.start[..., None] + o).flatten(1) for tile, o in zip(tiles, offsets)], 1)
    valid = torch.cat([(o < tile.count[..., None]).flatten(1) for tile, o in zip(tiles, offsets)], 1)
    keys = (keys if expand is None else expand(keys)).unflatten(-1, (-1, size)).transpose(1, 2)

    def rotate(x, x_at):
        if rope is None:
            return x
        angles = x_at[:, None, :, None].double() * rope.inv_freq.double()
        cos, sin = ((f(angles) * rope.attention_scaling).to(dtype) for f in (torch.cos, torch.sin))
        low, high = x.chunk(2, -1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)

    keys, query = rotate(keys, at), rotate(query, positions)
    values = split_groups(values, arguments["value_widths"]).transpose(1, 2)
    keys, values = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (keys, values))
    distances = positions[:, None, :, None] - at[:, None, None]
    seen = valid[:, None, None] & (distances >= 0)
    if arguments.get("sliding_window"):
        seen &= distances < arguments["sliding_window"]
    attend = torch.nn.functional.scaled_dot_product_attention
    result = attend(query, keys, values, attn_mask=seen, scale=arguments["scaling"])
    return result.where(seen.any(-1, keepdim=True), 0)


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def log_distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Of logarithms, -inf in the same places; those below 1 count as 1, as the error is that of a factor."""
    seen = expected > -torch.inf
    assert torch.equal(actual > -torch.inf, seen)
    error, size = (actual.double() - expected)[seen], expected[seen].clamp(min=1)
    return (error.norm() / size.norm().clamp(min=1)).item()


def check(*steps: Step) -> torch.Tensor:
    """Compare steps of one type with the reference, each with `DRAWS` queries; returns the result of the first.

    A few peaked rows of weights are too few to compare two errors by, so errors are pooled over all of them.
    """
    first, errors = None, defaultdict(list)
    for step in steps:
        query = step.arguments["query"]
        draws = 1 if query.dtype == torch.float32 else DRAWS
        for draw in range(draws):
            drawn = step.but(query=query[..., torch.randperm(query.shape[3])]) if draw else step
            found, expected = drawn.attend(), exact(drawn)
            first = found.summed if first is None else first
            for mine, other in zip(found[:2], expected[:2]):
                assert (mine.dtype, mine.shape) == (torch.float32, other.shape)
            assert torch.isfinite(found.summed).all()
            errors["whole"].append(distance(found.summed, expected.summed))
            errors["in parts"].append(distance(drawn.in_parts(), expected.summed))
            errors["logarithms"].append(log_distance(found.log_sum, expected.log_sum))
            errors["plain"].append(0 if draws == 1 else distance(plain(drawn), expected.summed))
    if query.dtype == torch.float32:
        assert max(errors["whole"] + errors["in parts"] + errors["logarithms"]) <= 1e-5, errors
        return first
    others = sum(e**2 for e in errors["plain"])
    for name in ("whole", "in parts"):
        ours = sum(e**2 for e in errors[name])
        assert ours <= 4 * others, (
            f"{name}: {(ours / len(errors[name])) ** 0.5:.2e}, {(ours / others) ** 0.5:.2f} times that of PyTorch"
        )
    return first


# ---- formats


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_widths(bits, orientation, dtype):
    other = ORIENTATIONS[orientation == ORIENTATIONS[0]]
    check(make_step(side(bits, orientation), side(bits, orientation), dtype))
    check(make_step(side(bits, orientation, 0), side(2, other, 20), dtype, tokens=(400, 163)))
    check(make_step(side(2, other, 20), side(bits, orientation, 0), dtype, heads=(6, 6), ranks=((12,) * 6, (40,))))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("bits", (1, 2, 3, 4, 5, 6, 8))
def test_the_other_symmetry(bits, orientation, dtype):
    scheme = side(bits, orientation, symmetric=bits != 1)
    check(make_step(scheme, scheme, dtype, size=24, ranks=((17, 17), (23, 23))))


@pytest.mark.parametrize("turn", (0, *(pytest.param(turn, marks=pytest.mark.slow) for turn in (1, 2))))
@pytest.mark.parametrize("key_group", (0, 20, 32, 96, 128, 160, 256))
@pytest.mark.parametrize("value_group", (0, 20, 32, 160))
def test_group_sizes(key_group, value_group, turn):
    """Runs shorter than a block, short last runs, blocks that are longer or shorter than the kernel's span."""
    i = key_group // 4 + value_group // 4
    dtype = DTYPES[(i + turn) % 3]
    widths = (2, 1.58, 3, 5, 4, 6, 1)
    keys, values = side(widths[i % 7], group_size=key_group), side(widths[(i + 1) % 7], group_size=value_group)
    check(make_step(keys, values, dtype, tokens=(700,)))
    check(make_step(replace(keys, orientation="per_token"), values, dtype, tokens=(700, 333)))
    check(make_step(keys, replace(values, orientation="per_token"), dtype, tokens=(700, 333)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", (1, 2, 3, 4, 5, 6, 8))
def test_static_scales(bits, dtype):
    for symmetric in (False, True)[: 1 + (bits > 1)]:
        static = side(bits, group_size=128, static=True, symmetric=symmetric)
        check(make_step(static, static, dtype, tokens=(500,)))
    check(make_step(static, side(2, group_size=20), dtype, tokens=(500,), heads=(8, 2), ranks=((30,), (9, 15))))
    check(make_step(side(2, group_size=20), static, dtype, tokens=(500,)))


def scaled(bits=2, **fields) -> QuantScheme:
    return side(bits, group_size=128, static=True, symmetric=False, token_scale=True, **fields)


def joint(step: Step) -> Step:
    """The step with one latent for keys and values, in the blocks and in full precision."""
    before, after = (
        tuple(replace(tile, values=tile.keys) for tile in tiles) for tiles in (step.cache.before, step.cache.after)
    )
    step = step.on(values=step.cache.keys, before=before, after=after)
    return step.but(value_widths=step.arguments["expand_keys"].ranks)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks", ((21,), (14, 9), (40, 1, 17)), ids=str)
@pytest.mark.parametrize(
    "scheme", ("scaled", "static", "measured", "per token", "ternary", "tiers", "trellis", "exact")
)
def test_one_latent_for_keys_and_values(scheme, ranks, dtype):
    """Of one head, a head of several, or all of them; blocks that end early, rows of their own length, GQA and MHA."""
    tiers = tuple(((rank // 3, 4), (rank - rank // 3, 2)) if rank > 3 else ((rank, 3),) for rank in ranks)
    keys = {
        "scaled": scaled(2),
        "static": side(3, group_size=128, static=True),
        "measured": side(4),
        "per token": side(2, "per_token", 20),
        "ternary": side(1.58, group_size=20),
        "tiers": scaled(tiers=tiers),
        "trellis": scaled(tiers=tiers, code="trellis"),
        "exact": side(16),
    }[scheme]
    n_heads = 2 * len(ranks)
    steps = []
    for query_heads, new, edit in ((3 * n_heads, 1, None), (n_heads, 3, crop_and_grow)):
        made = make_step(keys, side(16), dtype, (query_heads, n_heads), 16, (ranks, (1,)), (300, 211), new, bias=True,
                         edit=edit, token_sizes=scheme in ("scaled", "tiers", "trellis"))  # fmt: skip
        steps.append(joint(made))
    # Large tokens that are keys and values at once are few: errors are pooled over both shapes.
    check(*steps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heavy_columns(dtype):
    """A few channels of a latent of all heads weigh 20 times as much as the others, in two tiers."""
    tiers = (((24, 8), (70, 2)),)
    step = make_step(scaled(tiers=tiers), side(16), dtype, (9, 3), 16, ((94,), (1,)), (500, 211), token_sizes=True)
    step.arguments["expand_keys"].weight[:, [2, 13, 40]] *= 20
    check(joint(step.but(scaling=step.arguments["scaling"] / 8)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", (1, 2, 3, 4, 5, 6, 8))
def test_token_scales(bits, dtype):
    """Tokens of very different size, in head groups of their own, in blocks that end early, beside an unscaled side."""

    def step(*args, **kwargs):
        return make_step(*args, dtype, tokens=(500, 263), token_sizes=True, bias=True, **kwargs)

    check(step(scaled(bits), scaled(bits)))
    check(step(scaled(bits), side(2, group_size=20), heads=(8, 2), ranks=((30,), (9, 15))))
    check(step(side(2, "per_token", 20), scaled(bits), heads=(6, 2), ranks=((9, 15), (37,)), new=3))
    check(step(scaled(bits), scaled(bits), dense=True, edit=crop_and_grow))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ("missing", "repeated", "one"))
def test_token_scales_of_tiers(name, dtype):
    scheme = scaled(tiers=TIERS[name])
    ranks = tuple(sum(count for count, _ in group) for group in TIERS[name])
    check(make_step(scheme, scheme, dtype, tokens=(500, 263), ranks=(ranks, ranks), token_sizes=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", (1, 2, 3, 4, 5, 6))
def test_trellis_codes(bits, dtype):
    """Chains of many lengths, with and without token scales, in blocks that end early, beside a uniform side."""
    trellis = side(bits, group_size=128, static=True, symmetric=False, code="trellis")
    check(make_step(trellis, trellis, dtype, tokens=(500, 263)))
    check(make_step(trellis, side(2, group_size=20), dtype, tokens=(500,), heads=(8, 2), ranks=((30,), (9, 15))))
    check(make_step(side(2, "per_token", 20), scaled(bits, code="trellis"), dtype, heads=(6, 2), ranks=((9, 15), (37,)),
                    tokens=(400, 163), new=3, bias=True, token_sizes=True))  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ("missing", "repeated", "one"))
def test_trellis_codes_of_tiers(name, dtype):
    scheme = scaled(tiers=TIERS[name], code="trellis")
    ranks = tuple(sum(count for count, _ in group) for group in TIERS[name])
    check(make_step(scheme, scheme, dtype, tokens=(500, 263), ranks=(ranks, ranks), token_sizes=True))


#: Tiers of two head groups.
TIERS = {
    "sorted": (((2, 16), (5, 8), (4, 4), (6, 3), (9, 2), (3, 1)), ((1, 16), (6, 8), (4, 4), (5, 3), (9, 2), (2, 1))),
    "unsorted": (((3, 1), (4, 4), (2, 16), (5, 2)), ((5, 2), (1, 16), (7, 4), (6, 1))),
    "missing": (((4, 4), (9, 2)), ((6, 8), (3, 2), (2, 3))),
    "repeated": (((4, 2), (3, 4), (5, 2)), ((6, 4), (1, 2), (2, 4))),
    "one": (((20, 3),), ((7, 3),)),
    "16 first": (((17, 16), (3, 1.58)), ((18, 1.58),)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("name", TIERS)
def test_tiers(name, orientation, dtype):
    tiers = TIERS[name]
    scheme = side(2, orientation, 20, tiers=tiers)
    widths = tuple(sum(n for n, _ in group) for group in tiers)
    joint = (tuple(t for group in tiers for t in group),)
    check(make_step(scheme, scheme, dtype, heads=(8, 4), ranks=(widths, widths)))
    check(make_step(scheme, replace(scheme, tiers=joint), dtype, ranks=(widths, (sum(widths),)), tokens=(222, 170)))
    if orientation == "per_channel" and name in ("unsorted", "missing"):
        static = side(2, orientation, 64, tiers=tiers, static=True)
        check(make_step(static, static, dtype, ranks=(widths, widths)))


# ---- sliding windows

#: Keys, values and shape: runs and blocks of every kind that a window may cut.
WINDOWED = {
    "joint": (side(2), side(3, "per_token", 0), {"ranks": ((21,), (23,))}),
    "per head": (side(4, group_size=20), side(2, "per_token"), {"heads": (8, 2)}),
    "calibrated": (scaled(3), scaled(2), {"token_sizes": True, "bias": True}),
    "states": (side(16), side(16), {"heads": (6, 6), "ranks": ((12,) * 6, (40,))}),
    "dense": (side(2), side(2), {"dense": True}),
    "tiers": (
        side(2, group_size=20, tiers=(((5, 8), (7, 2)), ((9, 3), (3, 1)))),
        side(2, "per_token", 20, tiers=(((24, 4),),)),
        {"ranks": ((12, 12), (24,))},
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WINDOWED)
def test_sliding_windows(name, dtype):
    """Windows that end in the new tokens, in the window in full precision, in blocks, in the sinks, and beyond."""
    keys, values, shape = WINDOWED[name]
    real = torch.tensor([[True, False, True, True, False], [False, True, True, True, True]])
    cases = ({"tokens": (700,)}, {"tokens": (433, 211), "new": 5, "real": real}, {"tokens": (390, 128, 20), "new": 16})
    for windows, case in zip(((1, 300, 699), (2, 150, 430), (24, 131, 2**40)), cases, strict=True):
        step = make_step(keys, values, dtype, **shape, **case)
        check(*[step.but(sliding_window=window) for window in windows])
        whole = step.but(sliding_window=10_000)
        assert torch.equal(whole(), step())


@pytest.mark.parametrize("threads", (1, 3))
def test_blocks_before_a_window_are_not_read(threads):
    """NaN in each block that no query sees: rows of their own lengths, and a block that a crop has cut."""
    step = make_step(side(16), side(16), torch.float32, tokens=(900, 640), edit=crop(20), new=2)
    window = 300
    for row in step.layer.rows:
        first = row.tokens + 1 - window
        unseen = [slot for slot, start, n in zip(row.blocks, row.starts, row.counts) if start + n <= first]
        assert len(unseen) > 1
        for fields in step.layer.pool.storage.values():
            fields["states"][unseen] = torch.nan
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = step.but(sliding_window=window)()
    finally:
        torch.set_num_threads(before)
    assert torch.isfinite(found).all() and not torch.isfinite(step()).all()


def test_windows_of_one_latent_for_keys_and_values():
    step = joint(make_step(scaled(2), side(16), torch.bfloat16, (6, 2), 16, ((21,), (1,)), (500, 211), 3, bias=True))
    check(*[step.but(sliding_window=window) for window in (100, 333)])


# ---- heads and sizes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "ranks"),
    [
        ((4, 4), ((5, 5, 5, 5), (7, 7, 7, 7))),  # MHA
        ((6, 2), ((33,), (21,))),  # joint
        ((5, 1), ((40,), (40,))),  # MQA
        ((8, 4), ((9, 20, 1, 16), (3, 17, 32, 1))),  # unequal ranks
        ((8, 4), ((12, 12, 12, 12), (30,))),  # keys grouped, values joint
        ((8, 4), ((30,), (8, 9, 10, 11))),
        ((8, 4), ((31, 18), (8, 9, 10, 11))),
        ((12, 2), ((130, 70), (70, 130))),
    ],
)
def test_heads(heads, ranks, dtype):
    check(make_step(dtype=dtype, heads=heads, ranks=ranks))
    check(make_step(side(4, "per_token", 20), side(3), dtype, heads, 32, ranks, new=3, bias=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", (2, 6, 64, 80, 96, 128))
def test_head_sizes(size, dtype):
    check(make_step(dtype=dtype, size=size, ranks=((20, 20), (20, 20)), rope=rope_of(size, 5e5)))
    check(make_step(side(4, "per_token"), side(4), dtype, (8, 2), size, ((33,), (20, 20)), rope=rope_of(size)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rope", ("default", None))
@pytest.mark.parametrize("bits", (1.58, 2, 8, 16))
def test_dense_keys(bits, rope, dtype):
    for orientation in ORIENTATIONS:
        check(make_step(side(bits, orientation, 20), dtype=dtype, dense=True, rope=rope))
    check(make_step(side(bits), dtype=dtype, dense=True, rope=rope, new=5, heads=(3, 3), ranks=(None, (15,)), size=64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", ((9,), (300, 40)))
def test_dense_keys_beside_joint_values(tokens, dtype):
    """As look-up attention reads them, but for the number of groups."""
    for groups in ((7,), (7, 7), (7, 7, 7, 7)):
        how = {"heads": (8, 4), "ranks": (None, groups), "dense": True, "rope": None}
        check(make_step(side(4, "per_token"), side(4), dtype, tokens=tokens, **how))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_and_no_rope(dtype):
    for rope in ("default", None):
        for orientation in ORIENTATIONS:
            check(make_step(side(2, orientation), dtype=dtype, bias=True, rope=rope, ranks=((9, 14), (5, 6))))


# ---- rotary embeddings


def llama3(size: int, theta: float = 5e5, factor: float = 8.0, old: int = 8192) -> Rope:
    """The frequencies of Llama 3.1: slow ones divided, those between blended."""
    inv_freq = rope_of(size, theta).inv_freq
    turns = old * inv_freq / (2 * torch.pi)
    share = ((turns - 1) / (4 - 1)).clamp(0, 1)
    return Rope(inv_freq * (share + (1 - share) / factor))


def yarn(size: int) -> Rope:
    inv_freq = rope_of(size).inv_freq
    ramp = torch.linspace(-0.3, 1.3, len(inv_freq)).clamp(0, 1)
    return Rope(inv_freq * (1 - ramp) + inv_freq / 16 * ramp, 1.2772588722239782)


def shuffled(size: int) -> Rope:
    inv_freq = rope_of(size, 5e5).inv_freq
    return Rope(inv_freq[torch.randperm(len(inv_freq))])


def partial_rope(size: int) -> Rope:
    """Half of the pairs do not turn."""
    inv_freq = rope_of(size).inv_freq
    return Rope(inv_freq.where(torch.arange(len(inv_freq)) % 2 == 0, 0))


def one_frequency(size: int) -> Rope:
    return Rope(torch.full((size // 2,), 0.01))


ROPES = {
    "theta 1e4": rope_of,
    "theta 5e5": lambda size: rope_of(size, 5e5),
    "theta 1e7": lambda size: rope_of(size, 1e7),
    "llama3": llama3,
    "yarn": yarn,
    "shuffled": shuffled,
    "partial": partial_rope,
    "one": one_frequency,
}


def spread(step: Step, starts: torch.Tensor, position: int) -> Step:
    """The step with the packed blocks at `starts` `[blocks]` and the window and the new tokens at `position`."""
    table = step.cache.table.clone()
    table[1] = starts.to(table)
    shift = position - int(step.arguments["positions"].min())
    after = tuple(replace(tile, start=tile.start + shift) for tile in step.cache.after)
    return step.on(table=table, after=after).but(positions=step.arguments["positions"] + shift)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ROPES)
def test_rotary_embeddings_far_away(name, dtype):
    """Blocks in order, with gaps, back and forth, and behind the queries; distances up to 200,000 tokens."""
    size = 64
    cases = ((32, "per_channel", 1), (128, "per_token", 2), (20, "per_token", 1))
    for group, orientation, new in cases[:: 1 + 2 * (dtype == torch.float16)]:
        tokens = 8 * group + 50
        step = make_step(side(4, orientation, group), side(4, group_size=group), dtype, (4, 2), size,
                         ((20, 20), (8, 8)), (tokens,), new, rope=ROPES[name](size))  # fmt: skip
        blocks = step.cache.table.shape[2]
        regular = torch.arange(blocks) * group
        gaps = (torch.rand(blocks) * 2 * 200_000 / blocks).int().cumsum(0)
        check(
            spread(step, 4 + regular, 200_000),
            spread(step, 190_000 + regular, 200_000),
            spread(step, gaps, 400_000),
            spread(step, gaps[torch.randperm(blocks)], 400_000),
            spread(step, regular.flip(0), 100_000),
            spread(step, 3 * regular[torch.randperm(blocks)], int(regular[blocks // 2])),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_blocks(dtype):
    """As many tokens as make every level of the interpolation move."""
    step = make_step(side(2, group_size=128), dtype=dtype, size=64, ranks=((8, 8), (4, 4)), tokens=(9000,),
                     rope=rope_of(64, 5e5))  # fmt: skip
    check(step)


# ---- what is in the cache


def crop(amount: int):
    return lambda layer: layer.crop(-amount)


def crop_and_grow(layer):
    """Blocks of other lengths than T between full ones, at irregular positions."""
    for removed, added in ((37, 90), (70, 55), (3, 121)):
        layer.crop(-removed)
        layer.append(*(noise(len(layer.rows), added, layer.channels[s], dtype=layer.dtype) for s in ("keys", "values")))


def reorder(layer):
    layer.reorder_cache(torch.arange(len(layer.rows)).flip(0))
    layer.append(*(noise(len(layer.rows), 70, layer.channels[s], dtype=layer.dtype) for s in ("keys", "values")))
    layer.reorder_cache(torch.zeros(len(layer.rows), dtype=torch.long))
    layer.append(*(noise(len(layer.rows), 70, layer.channels[s], dtype=layer.dtype) for s in ("keys", "values")))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        {"tokens": (300, 41, 3, 178)},
        {"tokens": (300, 41, 3, 178), "sinks": 0, "new": 2},
        {"tokens": (300, 64), "edit": crop(20)},
        {"tokens": (300, 64), "edit": crop(130)},
        {"tokens": (300, 211), "edit": crop_and_grow},
        {"tokens": (300, 211), "edit": crop_and_grow, "new": 4},
        {"tokens": (300, 100, 7), "edit": reorder},
        {"tokens": (3,)},
        {"tokens": (1,), "sinks": 0, "residual": 0},
        {"tokens": (40, 2)},
        {"tokens": (160,), "sinks": 0, "residual": 0},
        {"tokens": (164, 68), "residual": 0, "new": 2},
        {"tokens": (132,), "residual": 128},
    ],
    ids=lambda case: " ".join(f"{name}={getattr(value, '__qualname__', value)}" for name, value in case.items()),
)
def test_what_the_cache_holds(case, dtype):
    schemes = (
        (side(), side(orientation="per_token")),
        (side(3, "per_token", 20), side(1.58)),
        (side(1.58, group_size=20), side(4, group_size=64)),
        (side(4, "per_token", 0), side(3, "per_token", 0)),
    )
    for keys, values in schemes[DTYPES.index(dtype) % 2 :: 2] if dtype != torch.float32 else schemes:
        check(make_step(keys, values, dtype, **case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", (side(), side(3, "per_token", 160)), ids=str)
def test_only_blocks(keys, dtype):
    """No sinks, no window, and no new token."""
    step = make_step(keys, dtype=dtype, tokens=(320,), sinks=0, residual=0).on(after=())
    assert not step.cache.before
    check(step)
    check(make_step(keys, dtype=dtype, tokens=(320,), sinks=0, residual=0, dense=True).on(after=()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("new", (1, 2, 3, 5, 8, 13, 16))
def test_new_tokens(new, dtype):
    """Causal among themselves, with pads among them."""
    check(make_step(dtype=dtype, new=new, heads=(6, 2)))
    real = torch.rand(3, new) < 0.6
    real[0] = True
    check(make_step(side(4, "per_token"), side(4), dtype, tokens=(170, 40, 100), new=new, real=real))
    step = make_step(dtype=dtype, new=new)
    check(step.on(before=(), keys=None, values=None, table=None, block_length=0, after=step.cache.after[-1:]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_that_see_nothing(dtype):
    step = make_step(dtype=dtype, tokens=(300, 200), new=2)
    positions = torch.tensor([[-1, 100], [-5, -1]])
    result = check(step.but(positions=positions))
    assert not result[0, :, 0].any() and not result[1].any() and result[0, :, 1].all()
    empty = torch.zeros(2, 1, dtype=torch.int32)
    tile = Tile(*(torch.randn(2, 1, 3, 24).to(dtype) for _ in range(2)), empty, empty)
    for cache in (PackedCache(after=(tile,)), PackedCache()):
        nothing = step.but(cache=cache).attend()
        assert not nothing.summed.any() and (nothing.log_sum == -torch.inf).all()


def test_rubbish_that_belongs_to_no_token():
    """NaN and Inf in free slots, and behind the valid tokens of a tile."""
    for dtype in DTYPES:
        for keys in (side(3), side(4, "per_token", 20), side(16), side(2, group_size=160)):

            def edit(layer):
                layer.crop(-70)
                layer.pool._grow(layer.pool.capacity + 2)

            real = torch.tensor([[True, False, True], [False, False, True], [True, True, True]])
            step = make_step(keys, replace(keys, bits=2), dtype, tokens=(400, 30, 200), new=3, real=real, edit=edit)
            clean = step()
            pool = step.layer.pool
            assert pool.free
            for fields in pool.storage.values():
                for tensor in fields.values():
                    tensor[pool.free] = torch.nan if tensor.is_floating_point() else 0x5A5A5A5A
            exact_tiles = []
            for tile in (*step.cache.before, *step.cache.after):
                tile = replace(tile, keys=tile.keys.clone(), values=tile.values.clone())
                invalid = torch.arange(tile.keys.shape[2]) >= tile.count[..., None]
                tile.keys[invalid], tile.values[invalid] = torch.nan, torch.inf
                exact_tiles.append(tile)
            n = len(step.cache.before)
            dirty = step.on(before=tuple(exact_tiles[:n]), after=tuple(exact_tiles[n:]))
            assert torch.equal(dirty(), clean)
            check(dirty)


# ---- values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("gain", (0.0, 0.01, 4.0))
def test_flat_and_peaked_softmax(gain, orientation, dtype):
    schemes = [side(bits, orientation) for bits in (2, 4, 8)]
    check(*(make_step(s, s, dtype, gain=gain, size=64, tokens=(600,), heads=(16, 2)) for s in schemes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", ("block", "window", "new", "sink"))
def test_one_token_takes_all(place, dtype):
    step = make_step(side(8), side(8, "per_token"), dtype, (4, 2), 32, ((16, 16), (16, 16)), gain=1.0)
    at = {"block": 100, "window": 290, "new": 300, "sink": 1}[place]
    latents = torch.cat([t.masked().keys.flatten(1, 2) for t in step.cache.tiles()], 1)[0]
    keys = step.arguments["expand_keys"](latents).double().unflatten(1, (2, 32)).transpose(0, 1)
    rope = step.arguments["rope"]
    keys = rope.rotate(keys, torch.arange(301))
    # The direction in which the token stands out most.
    towards = torch.linalg.lstsq(
        keys - keys.mean(1, keepdim=True), torch.eye(301)[at].double().expand(2, 301)[..., None]
    )
    query = towards.solution.transpose(1, 2)
    logits = query @ keys.transpose(1, 2) * step.arguments["scaling"]
    best, second = logits.topk(2).values.unbind(-1)
    assert (logits.argmax(-1) == at).all()
    query = rope.rotate(query * (8 / (best - second))[..., None], torch.tensor(-300))
    step = step.but(query=query.repeat_interleave(2, 0)[None].to(dtype))
    weights = attend(reference_attention, 301, **step.arguments).weights
    assert (weights[..., at] > 0.9).all()
    check(step)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("decades", (1.3, 3.0))
@pytest.mark.parametrize("bits", (2, 4, 8, 16))
def test_heavy_tails(bits, decades, orientation, dtype):
    """Latents sorted by energy, as the decomposition gives them without rotation."""
    channels = torch.logspace(0, -decades, 24).repeat(2)
    scheme = side(bits, orientation, 0)
    check(make_step(scheme, scheme, dtype, size=64, ranks=((24, 24), (24, 24)), channels=channels, tokens=(400,)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", (1e-3, 300.0))
def test_magnitudes(size, dtype):
    for orientation in ORIENTATIONS:
        scheme = side(3, orientation)
        step = make_step(scheme, scheme, dtype, channels=torch.tensor(size))
        check(step.but(scaling=step.arguments["scaling"] / size))


def test_constant_channels():
    """Scales of zero."""
    for dtype in DTYPES:
        channels = (torch.arange(24) % 3 > 0).float()
        for bits in (1, 2, 4):
            check(make_step(side(bits), side(bits), dtype, channels=channels))


# ---- from call to call


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_thread_counts(dtype):
    for case in ({"tokens": (900,), "heads": (4, 1), "ranks": ((20,), (20,))}, {"tokens": (500, 90), "new": 3}):
        for keys in (side(), side(4, "per_token", 160)):
            step = make_step(keys, dtype=dtype, **case)
            results = []
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                results.append(step())
                assert torch.equal(step(), results[-1])
            check(step)
            for result in results[1:]:
                assert distance(result, results[0].double()) <= 1e-5


def test_a_changed_expansion_is_noticed():
    step = make_step(dtype=torch.float32, bias=True)
    expand = step.arguments["expand_keys"]

    def other(tensor):
        return torch.randn_like(tensor) / 3

    changes = (
        lambda: expand.weight.mul_(-1),
        lambda: expand.bias.add_(1),
        lambda: setattr(expand.weight, "data", other(expand.weight)),
        lambda: setattr(expand.bias, "data", other(expand.bias)),
        lambda: expand.load_state_dict({"weight": other(expand.weight), "bias": other(expand.bias)}),
        lambda: expand.load_state_dict({"weight": other(expand.weight), "bias": other(expand.bias)}, assign=True),
        lambda: setattr(expand, "weight", torch.nn.Parameter(other(expand.weight), requires_grad=False)),
        lambda: expand.weight.data.mul_(-1),
        lambda: [setattr(expand.weight, "data", other(expand.weight)) for _ in range(2)],
        lambda: [setattr(expand.weight, "data", other(expand.weight)) for _ in range(3)],
    )
    before = check(step)
    for i, change in enumerate(changes):
        change()
        result = step()
        assert distance(result, exact(step).summed) <= 1e-5, f"change {i} was not noticed"
        assert distance(result, before.double()) > 1e-3
        before = result


def test_a_growing_pool():
    step = make_step(dtype=torch.bfloat16, tokens=(100, 40))
    layer = step.layer
    for i in range(8):
        states = [noise(2, 50 + i, layer.channels[s], dtype=layer.dtype) for s in ("keys", "values")]
        layer.append(*states)
        if i % 3 == 2:
            layer.crop(-60)
        positions = torch.tensor([[row.tokens] for row in layer.rows])
        tile = Tile(*(noise(2, 1, 1, 24, dtype=layer.dtype) for _ in range(2)), positions.int(), torch.ones(2, 1).int())
        check(step.but(positions=positions, cache=layer.packed(tile)))


def test_layers_of_one_shape():
    steps = [make_step(dtype=torch.float16, tokens=(200 + i % 2,)) for i in range(6)]
    first = [check(step) for step in steps]
    for step, result in zip(reversed(steps), reversed(first)):
        assert torch.equal(step(), result)
    for i, step in enumerate(steps):
        check(step.but(expand_keys=steps[i - 1].arguments["expand_keys"]))
    for _ in range(20):  # layers that come and go: new objects at old addresses
        check(make_step(dtype=torch.float32, tokens=(80,)))


def test_inputs_are_left_alone():
    step = make_step(new=3)
    tensors = [
        step.arguments["query"],
        step.arguments["positions"],
        step.cache.table,
        step.arguments["expand_keys"].weight,
    ]
    tensors += [t for fields in step.layer.pool.storage.values() for t in fields.values()]
    tensors += [t for tile in (*step.cache.before, *step.cache.after) for t in (tile.keys, tile.values)]
    before = [t.clone() for t in tensors]
    step()
    assert all(a.view(torch.uint8).equal(b.view(torch.uint8)) for a, b in zip(tensors, before))


def test_views_are_read_as_they_are():
    """Queries and positions that are not contiguous, and new tokens cut out of a larger tensor."""
    for dtype in DTYPES:
        step = make_step(dtype=dtype, tokens=(300, 280), new=3)
        arguments, (*window, new) = step.arguments, step.cache.after
        wide = [torch.full((2, 1, 7, 40), torch.nan, dtype=dtype) for _ in range(2)]
        for x, states in zip(wide, (new.keys, new.values)):
            x[:, :, 1:7:2, 5:29] = states
        keys, values = (x[:, :, 1:7:2, 5:29] for x in wide)
        query = arguments["query"].transpose(1, 2).contiguous().transpose(1, 2)
        positions = arguments["positions"].T.contiguous().T
        same = step.on(after=(*window, replace(new, keys=keys, values=values))).but(query=query, positions=positions)
        assert torch.equal(same(), step())


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def test_any_strides():
    for dtype in DTYPES:
        step = make_step(dtype=dtype, tokens=(300, 280), new=3, bias=True)
        expected, (*window, new) = step(), step.cache.after
        tile = replace(new, keys=transposed(new.keys), values=transposed(new.values))
        assert torch.equal(step.on(after=(*window, tile))(), expected)
        expand = step.arguments["expand_keys"]
        expand.weight.data = transposed(expand.weight.data)
        assert torch.equal(step(), expected)


# ---- memory


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype, _libc.munmap.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_size_t)
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Fenced:
    """Copies of tensors that begin or end at a page which must not be touched."""

    def __init__(self, at_the_end: bool):
        self.at_the_end, self.regions = at_the_end, []

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor, page = tensor.contiguous(), mmap.PAGESIZE
        size = -(-max(1, tensor.nbytes) // page) * page
        start = _libc.mmap(
            None, size + 2 * page, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
        )
        self.regions.append((start, size + 2 * page))
        for fence in (start, start + page + size):
            assert _libc.mprotect(fence, page, 0) == 0
        address = start + page + (size - tensor.nbytes if self.at_the_end else 0)
        fenced = torch.frombuffer((ctypes.c_char * tensor.nbytes).from_address(address), dtype=tensor.dtype)
        return fenced.view(tensor.shape).copy_(tensor)

    def release(self) -> None:
        for region in self.regions:
            _libc.munmap(*region)


FENCED = {
    "per channel": (side(2), side(3, group_size=20), {}),
    "per token": (side(4, "per_token", 20), side(8, "per_token", 0), {}),
    "wide blocks": (side(1.58, group_size=160), side(1.58, "per_token", 20), {}),
    "one bit": (side(1, group_size=0), side(1, group_size=20), {}),
    "bytes": (side(8, group_size=0), side(8), {"dense": True}),
    "exact": (side(16), side(16), {}),
    "joint": (side(3, "per_token", 0), side(4, group_size=128), {"ranks": ((21,), (23,))}),
    "static": (side(2, static=True), side(4, static=True), {}),
    "token scales": (scaled(2), scaled(tiers=(((9, 4), (10, 1)), ((19, 2),))), {}),
    "tiers": (
        side(tiers=TIERS["sorted"]),
        side(orientation="per_token", tiers=TIERS["sorted"]),
        {"ranks": ((29, 27),) * 2},
    ),
}


@pytest.mark.parametrize("at_the_end", (True, False))
@pytest.mark.parametrize("name", FENCED)
def test_nothing_is_read_beyond_a_tensor(name, at_the_end):
    """A crash of the interpreter is a failure; every slot of the pool is in use."""
    keys, values, case = FENCED[name]
    for dtype, new in ((torch.bfloat16, 1), (torch.float32, 3), (torch.float16, 2)):
        step = make_step(
            keys,
            values,
            dtype,
            **{"ranks": ((13, 13), (19, 19)), "tokens": (353, 200), "new": new, "bias": True, **case},
        )
        fenced = Fenced(at_the_end)
        pool = step.layer.pool
        expected = step()
        used = 1 + max(slot for row in step.layer.rows for slot in row.blocks)
        pool.storage = {s: {n: fenced(t[:used]) for n, t in fields.items()} for s, fields in pool.storage.items()}
        for codec in codecs_of(step.layer):
            if getattr(codec, "scales", None) is not None:
                codec.scales = tuple(map(fenced, codec.scales))
        pool._sides = None
        sides = dict(zip(("keys", "values"), pool.sides()))

        before, after = (
            tuple(Tile(*map(fenced, (t.keys, t.values, t.start, t.count))) for t in tiles)
            for tiles in (step.cache.before, step.cache.after)
        )
        cache = replace(step.cache, **sides, table=fenced(step.cache.table), before=before, after=after)
        expand = step.arguments["expand_keys"]
        for parameter in () if expand is None else (expand.weight, expand.bias):
            parameter.data = fenced(parameter.data)
        inputs = {name: fenced(step.arguments[name]) for name in ("query", "positions")}
        rope = Rope(fenced(step.arguments["rope"].inv_freq))
        assert torch.equal(step.but(cache=cache, rope=rope, **inputs)(), expected)
        fenced.release()


# ---- any step


@st.composite
def schemes(draw, groups: tuple[int, ...]):
    orientation, group_size = draw(st.sampled_from(ORIENTATIONS)), draw(st.sampled_from((0, 7, 20, 32, 96, 128, 160)))
    kind = draw(st.sampled_from(("uniform", "uniform", "tiers", "static", "token scales")))
    if kind in ("static", "token scales"):
        calibrated = {"static": True, "symmetric": False, "token_scale": kind != "static"}
        return side(draw(st.sampled_from((1, 2, 3, 4, 5, 6, 8))), "per_channel", group_size, **calibrated)
    if kind == "uniform":
        bits = draw(st.sampled_from(WIDTHS))
        symmetric = None if bits in (1.58, 16) else draw(st.booleans())
        return side(bits, orientation, group_size, symmetric=symmetric)
    tiers = []
    for rank in groups:
        cuts = sorted(draw(st.sets(st.integers(1, rank - 1), max_size=4))) if rank > 1 else []
        edges = [0, *cuts, rank]
        tiers.append(tuple((b - a, draw(st.sampled_from(WIDTHS))) for a, b in itertools.pairwise(edges)))
    return side(2, orientation, group_size, tiers=tuple(tiers))


@st.composite
def steps(draw):
    n_heads = draw(st.sampled_from((1, 2, 4)))
    size = 2 * draw(st.integers(1, 40))
    divisors = [n for n in (1, 2, 4) if n_heads % n == 0]
    dense = draw(st.integers(0, 4)) == 0
    ranks = [tuple(draw(st.integers(1, 40)) for _ in range(draw(st.sampled_from(divisors)))) for _ in range(2)]
    key_widths = (size,) * n_heads if dense else ranks[0]
    batch, new = draw(st.integers(1, 3)), draw(st.integers(1, 16))
    tokens = tuple(draw(st.integers(1, 600)) for _ in range(batch))
    edit = draw(st.sampled_from((None, None, crop(min(tokens) // 2), crop_and_grow, reorder)))
    if min(tokens) < 120 and edit is crop_and_grow:
        edit = None
    seed = draw(st.integers(0, 2**16))
    torch.manual_seed(seed)
    real = torch.rand(batch, new) < 0.7 if draw(st.booleans()) else None
    rope = draw(st.sampled_from((None, *ROPES))) if size >= 4 else "theta 1e4"
    return make_step(
        draw(schemes(key_widths)),
        draw(schemes(ranks[1])),
        draw(st.sampled_from(DTYPES)),
        (n_heads * draw(st.sampled_from((1, 2, 3))), n_heads),
        size,
        tuple(ranks),
        tokens,
        new,
        real,
        None if rope is None else ROPES[rope](size),
        bias=draw(st.booleans()),
        dense=dense,
        edit=edit,
        sinks=draw(st.sampled_from((0, 4))),
        residual=draw(st.sampled_from((0, 16, 32))),
    )


def any_step(examples: int):
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(deadline=None, derandomize=True, max_examples=examples, suppress_health_check=quiet)


def check_any(step: Step) -> None:
    """More queries: some steps have so few that their errors scatter."""
    query = step.arguments["query"]
    check(step, *(step.but(query=torch.randn(query.shape).to(query.dtype)) for _ in range(2)))


@any_step(40)
@given(steps())
def test_any_step(step):
    check_any(step)


@pytest.mark.slow
@any_step(2000)
@given(steps())
def test_any_step_many(step):
    check_any(step)


# ---- other instructions


#: What the C++ kernels are compiled for below, and whether they multiply codes of 8 bits then: without AVX-512, and,
#: where the tests above run with AMX, without that.
OTHER_PROCESSORS = {"haswell": 0}
if "amx_int8" in Path("/proc/cpuinfo").read_text().split():
    OTHER_PROCESSORS["icelake-server"] = 1


def test_instructions():
    """What the subprocess below runs on."""
    if (march := os.environ.get(MARCH_VARIABLE)) in OTHER_PROCESSORS:
        assert library().alrd_takes_bytes() == OTHER_PROCESSORS[march]
        assert library().alrd_has_tiles() == 0


@pytest.mark.skipif(os.environ.get(MARCH_VARIABLE) in OTHER_PROCESSORS, reason="this is the subprocess")
@pytest.mark.parametrize("march", OTHER_PROCESSORS)
def test_other_processors(march):
    """Some of these tests with the instructions of such a processor."""
    chosen = "instructions or (widths and bfloat16) or (beyond and True) or (tiers and bfloat16) or yarn or any_step"
    chosen += " or sliding or (beside_the and not float16) or latents_of_new"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, __file__],
        cwd=ROOT,
        env={**os.environ, MARCH_VARIABLE: march, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout


# ---- tokens beside the latents, and the latents of new tokens


def beside(step: Step, sinks: int, size: int) -> tuple[Tile, ...]:
    """The first tokens of the rows, if there are some, and the new ones as they are, with random states."""
    query, new = step.arguments["query"], step.cache.after[-1]
    batch, dtype = len(query), query.dtype
    count = torch.full((batch, 1), sinks, dtype=torch.int32)
    count[0] = min(1, sinks)
    channels = step.arguments["expand_keys"].num_heads * size
    tiles = []
    own = (query.shape[2], new.start, new.count)
    for tokens, start, counted in ((sinks, torch.zeros_like(count), count), own)[sinks == 0 :]:
        keys, values = (torch.randn(batch, 1, tokens, channels).to(dtype) for _ in range(2))
        tiles.append(Tile(keys, values, start, counted).masked())
    return tuple(tiles)


def block_distance(step: Step, tiles: tuple[Tile, ...], expand: ALinear) -> tuple[float, float, Attended]:
    """Relative errors of the fused step of a block, and of the reference in the type of the model, against float64."""
    fields = {name: x for name, x in step.arguments.items() if name not in ("query", "cache")}
    # Without the tokens of this step, which are beside the latents.
    history = step.on(after=step.cache.after[:-1]).cache
    query = step.arguments["query"]
    found = get_backend("cpu", query.device).attend_block(LatentQuery(query, **fields), tiles, history, expand)
    reference = get_backend("reference", query.device)
    coarse = reference.attend_block(LatentQuery(query, **fields), tiles, history, expand)

    def wide(tile):
        return replace(tile, keys=tile.keys.double(), values=tile.values.double())

    double = {**fields, "expand_keys": copy.deepcopy(fields["expand_keys"]).double()}
    packed = exact(step.on(after=step.cache.after[:-1]))
    summed = copy.deepcopy(expand).double()(packed.summed, per_head=True)
    heads = double.pop("expand_keys").num_heads
    size = query.shape[3]
    how = {**double, "expand_keys": None, "value_widths": (size,) * heads}
    others = reference_attention(LatentQuery(query.double(), **how), PackedCache(after=tuple(map(wide, tiles))))
    expected = merge_attended(Attended(summed, packed.log_sum), others)
    assert (found.summed.dtype, found.summed.shape) == (torch.float32, expected.summed.shape)
    assert log_distance(found.log_sum, expected.log_sum) <= (1e-5 if query.dtype == torch.float32 else 2e-2)
    return distance(found.summed, expected.summed), distance(coarse.summed, expected.summed), found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("new", (1, 5, 16))
@pytest.mark.parametrize("window", (None, 37))
def test_tokens_beside_the_latents(window, new, dtype):
    """One call gives what two attentions give that are merged behind the expansion of the values, bias included."""
    ours, plainly = 0.0, 0.0
    for heads, size, ranks in (((4, 2), 16, (12, 12)), ((3, 3), 6, (20,)), ((6, 2), 64, (33, 20))):
        for sinks, tokens in ((4, (300, 41)), (0, (90, 90))):
            step = make_step(dtype=dtype, heads=heads, size=size, ranks=(ranks, ranks), tokens=tokens, new=new, sinks=0)
            step = step.but(sliding_window=window)
            expand = copy.deepcopy(step.arguments["expand_keys"])
            expand.bias = torch.nn.Parameter(torch.randn(len(expand.weight)).to(dtype), requires_grad=False)
            error, other, _ = block_distance(step, beside(step, sinks, size), expand)
            ours, plainly = ours + error**2, plainly + other**2
    if dtype == torch.float32:
        assert ours**0.5 <= 1e-5
    else:
        assert ours <= 4 * plainly, (ours / plainly) ** 0.5


def test_tokens_beside_no_latents():
    """A short text has no latents yet; a query that sees nothing gets zeros."""
    step = make_step(dtype=torch.float32, tokens=(30, 30), new=2, sinks=0)
    expand = copy.deepcopy(step.arguments["expand_keys"])
    tiles = beside(step, 0, 16)
    fields = {name: x for name, x in step.arguments.items() if name not in ("query", "cache")}
    fields["positions"] = fields["positions"].clone()
    fields["positions"][1] = -1
    query = LatentQuery(step.arguments["query"], **fields)
    found = get_backend("cpu", CPU).attend_block(query, tiles, PackedCache(), expand)
    expected = get_backend("reference", CPU).attend_block(query, tiles, PackedCache(), expand)
    assert distance(found.summed, expected.summed) <= 1e-5
    assert not found.summed[1].any() and (found.log_sum[1] == -torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values_width", (20, 36))
@pytest.mark.parametrize("ranks", ((40,), (7, 18, 3)))
def test_latents_of_new_tokens(ranks, values_width, dtype):
    """Added to those of the members before, in float32, of one latent or two; what gets a gradient, or is many tokens,
    by PyTorch."""
    torch.manual_seed(0)
    linears, outputs = [], []
    for width in (20, values_width):
        linears.append(MemberBLinear(ranks, len(ranks) * width).to(dtype).requires_grad_(False))
        linears[-1].bias.data.normal_()
        outputs.append(torch.randn(2, 16, len(ranks) * width + 40).to(dtype)[..., 20:-20])
    backend = get_backend("cpu", CPU)
    assert all(map(backend.multiplies, linears, outputs))
    keys, values = (copy.deepcopy(x).double()(y.double()) for x, y in zip(linears, outputs, strict=True))

    def added(sides, latents, given=outputs):
        add_latents(backend, sides, linears, given, latents)
        return latents

    apart = added(("keys", "values"), {})
    assert apart["keys"].dtype == torch.float32
    assert distance(apart["keys"], keys) <= 1e-6 and distance(apart["values"], values) <= 1e-6
    joint = added(("keys", "keys"), {"keys": apart["keys"].clone()})
    assert distance(joint["keys"], 2 * keys + values) <= 1e-6
    for others in ([x.repeat(1, 2, 1) for x in outputs], [outputs[0], outputs[1].clone().requires_grad_()]):
        assert not all(map(backend.multiplies, linears, others))
        by_library = added(("keys", "values"), {}, others)
        assert distance(by_library["values"], linears[1](others[1]).detach()) == 0
    linears[0].bias.data = linears[0].bias.data.double()
    assert not backend.multiplies(linears[0], outputs[0])
