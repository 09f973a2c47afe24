"""Compile the attention kernels for GPUs that are not here, and read off the binaries what they use.

    python tests/aot_attention.py [--all] [--architectures 80 90] [--only llama3]
    python tests/aot_attention.py --roofline

For each case, a layer and what its cache holds: registers of a thread, its stack and local memory (both 0 unless
registers spill), shared memory of a program, and how much of it an architecture has; on sm_90, a quarter of the
instructions that the warps of a program take for 64 packed tokens: of four warps, those of each. Not under
TRITON_INTERPRET: run as a process of its own. `tests/test_attention_triton.py` asserts the record.

`--roofline`: bounds on paper for an H200, nothing of which is measured, from bytes, operations and the instructions of
the compiled loop over the packed tiles.
"""

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from configuration_alrd_llama import QuantScheme
from modules.cache.codecs import make_codec
from modules.kernels.packed import PackedCache, PackedSide, Rope, Tile
from modules.kernels.triton import attention as kernels
from modules.svd_linear import ALinear
from tests.aot_compile import TYPES, Recorder, usage
from tests.helpers import attend

#: Shared memory that a program may have, in bytes, by architecture.
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}

TYPES = TYPES | {torch.bfloat16: "*bf16", torch.int64: "*i64", torch.uint8: "*u8"}


def describe(value, constant: bool, path: tuple, constants: dict, attributes: dict):
    """Signature of an argument as a launch would have it; constants and attributes go where they belong."""
    if not constant and isinstance(value, (tuple, list)):
        return tuple(describe(v, False, (*path, i), constants, attributes) for i, v in enumerate(value))
    if constant or value is None or (isinstance(value, int) and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, torch.Tensor) or value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"


def compile_kernel(kernel, arguments: dict, architecture: int):
    """Compile as a launch with `arguments` would."""
    arguments = dict(arguments)
    options = {name: arguments.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in arguments}
    constants, attributes, signature = {}, {}, {}
    for i, p in enumerate(kernel.params):
        value = arguments[p.name]
        if p.do_not_specialize:
            signature[p.name] = "i32"
        else:
            signature[p.name] = describe(value, p.is_constexpr, (i,), constants, attributes)
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def llama3(bits: int, ranks=(64,) * 8, length: int = 1, value_ranks=None, dtype=torch.bfloat16, **scheme):
    """A layer of Llama-3-8B: 32 query heads on 8 key/value heads of 128."""
    return layer(32, 8, 128, ranks, value_ranks or ranks, length, dtype, bits, **scheme)


def llama2(length: int):
    """A layer of Llama-2-7B, 32 heads of 128, in groups of four heads of rank 256."""
    return layer(32, 32, 128, (256,) * 8, (256,) * 8, length, torch.float16, 2)


def layer(
    heads, key_heads, size, key_ranks, value_ranks, length, dtype, bits, batch=1, blocks=512, tiers=None, **scheme
):
    """Keyword arguments of `latent_attention` for a layer, its cache empty memory on the CPU."""
    sides = []
    for ranks, orientation in ((key_ranks, "per_channel"), (value_ranks, "per_token")):
        own = {"orientation": orientation} | scheme
        if tiers:
            own["tiers"] = [list(t) for t in tiers]
        its_scheme = QuantScheme(bits, **own)
        block = own.get("group_size", 128) or 128
        scales = (torch.zeros(sum(ranks)), torch.zeros(sum(ranks))) if its_scheme.static else None
        codec = make_codec(its_scheme, block, ranks, dtype, static_scales=scales)
        fields = {n: torch.empty((8, *shape), dtype=t) for n, (shape, t) in codec.fields().items()}
        sides.append(PackedSide(None, codec.parts(fields), codec.stored_channels, fields.get("token_scale")))
    block = own.get("group_size", 128) or 128
    start = torch.zeros(batch, 1, dtype=torch.int32)
    window = [torch.empty(batch, 256, sum(ranks), dtype=dtype)[:, None, :40] for ranks in (key_ranks, value_ranks)]
    new = [torch.empty(batch, 1, length, sum(ranks), dtype=dtype) for ranks in (key_ranks, value_ranks)]
    sinks = [torch.empty(batch, 1, 4, sum(ranks), dtype=dtype) for ranks in (key_ranks, value_ranks)]
    tiles = [Tile(*pair, start, start) for pair in (sinks, window, new)]
    table = torch.zeros(3, batch, blocks, dtype=torch.int32)
    cache = PackedCache((tiles[0],), tuple(tiles[1:]), *sides, block, table)
    return {
        "query": torch.empty(batch, length, heads, size, dtype=dtype).transpose(1, 2),
        "positions": torch.zeros(batch, length, dtype=torch.int64),
        "cache": cache,
        "expand_keys": ALinear(key_ranks, key_heads * size, key_heads, False).to(dtype),
        "value_widths": value_ranks,
        "rope": Rope(torch.zeros(size // 2)),
        "scaling": size**-0.5,
    }


#: Tiers of every width as the budget command stores them for the bundled tiny model: calibrated scales, blocks of 32.
TINY = {
    "tiers": [[(1, 16), (15, 8), (16, 6), (16, 5), (16, 4), (16, 3), (16, 2), (16, 1)]],
    "group_size": 32,
    "static": True,
    "orientation": "per_channel",
}


#: Calibrated scales times a scale of each token.
SCALED = {"static": True, "orientation": "per_channel", "symmetric": False, "token_scale": True}


def tiny(length: int, dtype=torch.bfloat16):
    """A layer of the bundled tiny model: 8 query heads on 4 key/value heads of 64, joint latents."""
    return layer(8, 4, 64, (112,), (112,), length, dtype, 2, **TINY)


def smollm2(code: str):
    """A block of the 1/8 checkpoint of SmolLM2: three layers, keys and values as one latent, seven widths."""
    tiers = [(24, 8), (43, 6), (60, 5), (108, 4), (142, 3), (145, 2), (131, 1)]
    rank = (sum(width for width, _ in tiers),)
    arguments = layer(9, 3, 64, rank, rank, 1, torch.bfloat16, 2, tiers=[tiers], group_size=32, code=code, **SCALED)
    cache = arguments["cache"]
    before, after = ([replace(t, values=t.keys) for t in tiles] for tiles in (cache.before, cache.after))
    return arguments | {"cache": replace(cache, before=tuple(before), after=tuple(after), values=cache.keys)}


def cases(everything: bool):
    """Functions that make the arguments of `latent_attention`, by name."""
    yield "llama3 rank 64 2-bit", lambda: llama3(2)
    yield "llama3 rank 64 4-bit", lambda: llama3(4)
    yield "llama3 joint 512 2-bit token scale", lambda: llama3(2, (512,), **SCALED)
    if not everything:
        return
    yield "smollm2 eighth trellis", lambda: smollm2("trellis")
    yield "smollm2 eighth uniform", lambda: smollm2("uniform")
    for length in (1, 16):
        suffix = f" L={length}" if length > 1 else ""
        if length > 1:
            yield f"llama3 rank 64 2-bit{suffix}", lambda n=length: llama3(2, length=n)
            yield f"llama3 rank 64 4-bit{suffix}", lambda n=length: llama3(4, length=n)
        yield f"llama3 joint 512 2-bit{suffix}", lambda n=length: llama3(2, (512,), n)
        yield f"llama2 groups of four 2-bit{suffix}", lambda n=length: llama2(n)
        yield f"tiny tiers static{suffix}", lambda n=length: tiny(n)
    yield "llama3 rank 64 2-bit window", lambda: llama3(2) | {"sliding_window": 4096}
    yield "llama3 rank 64 3-bit", lambda: llama3(3)
    yield "llama3 rank 64 6-bit", lambda: llama3(6)
    yield "llama3 rank 64 1.58-bit", lambda: llama3(1.58, symmetric=True)
    yield "llama3 rank 64 8-bit fp16", lambda: llama3(8, dtype=torch.float16)
    yield "llama3 rank 64 2-bit fp32", lambda: llama3(2, dtype=torch.float32)
    yield "llama3 keys without RoPE 2-bit", lambda: llama3(2, (128,) * 8) | {"expand_keys": None, "rope": None}


def record_launches() -> list:
    """From now on launches are recorded, in this list, and not made."""
    launches: list = []
    for name in ("_attention_kernel", "_merge_kernel"):
        kernel = getattr(kernels, name)
        setattr(kernels, name, Recorder(kernel.kernel if isinstance(kernel, Recorder) else kernel, launches))
    kernels._wanted_programs = lambda device, resident: 132 * resident
    return launches


def main(everything: bool, architectures: list[int], only: str = "") -> list[dict]:
    """Compile; returns one record for each kernel and architecture."""
    launches, records = record_launches(), []
    for name, case in cases(everything):
        if only not in name:
            continue
        launches.clear()
        with torch.no_grad():
            attend(kernels.latent_attention, **case())
        for kernel, arguments in launches:
            for architecture in architectures:
                compiled = compile_kernel(kernel, arguments, architecture)
                record = {"kernel": kernel.__name__.strip("_"), "case": name, "architecture": architecture}
                record |= usage(compiled)
                del record["inexact"]
                if architecture == 90 and "KEYS" in arguments:
                    instructions, record["kinds"] = tile_instructions(compiled, arguments)
                    record["instructions"] = instructions * 64 / arguments["BLOCK_T"] * record["warps"] / 4
                records.append(record | {"shared_limit": SHARED_LIMIT[architecture]})
    return records


#: An H200: bytes a second, dense bf16 operations a second, multiprocessors, clock under load, registers of each.
H200 = {"bandwidth": 4.8e12, "flops": 989e12, "sms": 132, "clock": 1.7e9, "registers": 65536}


def loops(compiled) -> tuple[list[tuple[int, int]], list[str]]:
    """First and last instruction of every loop of a binary, nested ones too, and the kinds of all instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", text)]
    places = {address: i for i, (address, _) in enumerate(lines)}
    targets = [(i, re.search(r"\bBRA\b.*?0x([0-9a-f]+)", line)) for i, (_, line) in enumerate(lines)]
    found = [(places[int(m[1], 16)], i) for i, m in targets if m and int(m[1], 16) < lines[i][0]]
    return found, [re.sub(r"^@!?U?P\w+\s+", "", line).split()[0].split(".")[0] for _, line in lines]


def tile_instructions(compiled, arguments: dict) -> tuple[float, dict[str, int]]:
    """Instructions of a warp for a tile of packed tokens: its own, its share of the block's, those of all chunks.

    Then its own by kind.
    """
    found, kinds = loops(compiled)

    def within(outer: tuple[int, int]) -> list[tuple[int, int]]:
        inner = [x for x in found if outer[0] <= x[0] and x[1] <= outer[1] and x != outer]
        return sorted(inner, key=lambda x: x[0] - x[1])

    def size(loop: tuple[int, int]) -> int:
        return loop[1] - loop[0] + 1

    # The longest loop is that over the blocks, the longest within it that over the tiles of a block.
    tile = block = max(found, key=size)
    per_tile = size(block)
    if arguments["TILES"] > 1:
        tile = within(block)[0]
        per_tile = size(tile) + (size(block) - size(tile)) / arguments["TILES"]
    # Pieces of several chunks have a loop over them for each piece of frequencies, in order.
    pieces = arguments["HALF"] // arguments["BLOCK_F"]
    trips = [spec.chunks for spec in arguments["KEYS"] if spec.chunks > 1] * pieces
    chunks = sorted(within(tile))
    assert len(chunks) == len(trips), (chunks, trips)
    per_tile += sum((n - 1) * size(loop) for n, loop in zip(trips, chunks, strict=True))
    return per_tile, dict(Counter(kinds[tile[0] : tile[1] + 1]).most_common())


def roofline(bits: int, tokens: int, batch: int) -> dict:
    """Lower bounds, in microseconds, of a step of Llama-3-8B's layer at rank 64 per head, and of its dense cache."""
    launches = record_launches()
    with torch.no_grad():
        attend(kernels.latent_attention, **llama3(bits))
    kernel, arguments = launches[0]
    compiled = compile_kernel(kernel, arguments, 90)
    used, heads, size, rank = usage(compiled), 8, 128, 64
    queries, tile = arguments["BLOCK_M"], arguments["BLOCK_T"]
    # Codes of both sides; keys: two parameters of two bytes per channel and block; values: per token and head.
    nbytes = tokens * batch * heads * (2 * rank * bits / 8 + 4 * rank / 128 + 4)
    work = tokens * batch * heads * 2 * (rank * size + size * queries + rank * queries)
    issued = tokens * batch * heads / tile * used["warps"] * tile_instructions(compiled, arguments)[0]
    resident = min(
        H200["registers"] // (-(-used["registers"] // 8) * 8 * 32 * used["warps"]), SHARED_LIMIT[90] // used["shared"]
    )
    return {
        "memory": nbytes / H200["bandwidth"] * 1e6,
        "tensor cores": work / H200["flops"] * 1e6,
        "instructions": issued / (4 * H200["sms"] * H200["clock"]) * 1e6,
        "dense": tokens * batch * heads * size * 4 / H200["bandwidth"] * 1e6,
        "registers": used["registers"],
        "warps": resident * used["warps"],
        "megabytes": nbytes / 1e6,
    }


def print_roofline() -> None:
    print("Llama-3-8B layer, rank 64 per head, 65,536 tokens, H200: lower bounds in µs, on paper, not measured\n")
    print("| bits | batch | MB read | memory | tensor cores | issue | registers | warps/SM | dense fp16 | ratio |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for bits, batch in itertools.product((2, 4), (1, 8)):
        r = roofline(bits, 65536, batch)
        bound = max(r["memory"], r["tensor cores"], r["instructions"])
        print(
            f"| {bits} | {batch} | {r['megabytes']:.1f} | {r['memory']:.1f} | {r['tensor cores']:.1f} | "
            f"{r['instructions']:.1f} | {r['registers']} | {r['warps']} of 64 | {r['dense']:.1f} | "
            f"{r['dense'] / bound:.2f} |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="Every case.")
    parser.add_argument("--architectures", type=int, nargs="+", default=(80, 89, 90, 100))
    parser.add_argument("--only", default="", help="Cases whose name contains this.")
    parser.add_argument("--json", action="store_true", help="Print the records as JSON.")
    parser.add_argument("--roofline", action="store_true", help="Bounds on paper instead.")
    options = parser.parse_args()
    if options.roofline:
        print_roofline()
        raise SystemExit
    records = main(options.all, options.architectures, options.only)
    if options.json:
        print(json.dumps(records))
    else:
        print(f"{'kernel':18} {'case':34} {'sm':>3} {'regs':>4} {'stack':>5} {'local':>5} {'shared':>7} warps  loop")
        for r in records:
            print(
                f"{r['kernel']:18} {r['case']:34} {r['architecture']:3} {r['registers']:4} {r['stack']:5} "
                f"{r['local']:5} {r['shared']:7} {r['warps']:5} {r.get('instructions', 0):6.0f}"
            )
