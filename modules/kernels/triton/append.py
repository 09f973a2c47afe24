"""Triton kernels of a step of `modules/cache/fixed_store.py`: append, quantize due blocks, move the window up.

Every step is the same launches. A program reads from the row's bookkeeping on the device whether there is anything to
do, so most of them end at once: a block is due once in as many steps as it has tokens. Blocks are quantized by the
kernel of `modules/kernels/triton/quantize.py`, so the bytes are those of any cache.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from modules.kernels.packed import PackRecord
from modules.kernels.triton import quantize
from modules.kernels.triton.quantize import _as_bits, _candidates, _quantize_kernel
from modules.quant_utils import grid, packed_words, require

# ---- a row


@triton.jit
def _read_row(
    state,
    row,
    batch,
    length,
    RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    SINKS: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Row of `FixedStore.state`, and what `length` new tokens make of it; a row that is full takes none."""
    sinks, start = tl.load(state + row), tl.load(state + batch + row)
    window, blocks = tl.load(state + 2 * batch + row), tl.load(state + 3 * batch + row)
    to_sinks = tl.where((window == 0) & (blocks == 0), tl.minimum(SINKS - sinks, length), 0)
    total = window + length - to_sinks
    flushed = tl.maximum(total - RESIDUAL, 0) // BLOCK
    fits = (start + to_sinks + total <= CAPACITY) & (blocks + flushed <= BLOCKS)
    return sinks, start, window, blocks, to_sinks, total, tl.where(fits, flushed, 0), fits


@triton.jit
def _copy_token(new, sink, window, row, i, place, channels, stride_b, stride_t, SINKS, ROOM, WIDTH: tl.constexpr):
    """Channels `place` of new token i of a row to its sinks or its window."""
    sinks, held, to_sinks, fits = row[1], row[2], row[3], row[4]
    columns = place * WIDTH + tl.arange(0, WIDTH)
    valid = (columns < channels) & fits
    b = row[0].to(tl.int64)
    x = tl.load(new + b * stride_b + i.to(tl.int64) * stride_t + columns, valid, 0)
    tl.store(sink + (b * SINKS + sinks + i) * channels + columns, x, valid & (i < to_sinks))
    tl.store(window + (b * ROOM + held + i - to_sinks) * channels + columns, x, valid & (i >= to_sinks))


# ---- kernels


@triton.jit
def _append_kernel(
    state,
    keys,
    values,
    sink_keys,
    sink_values,
    window_keys,
    window_values,
    batch,
    length,
    key_channels,
    value_channels,
    key_stride_b,
    key_stride_t,
    value_stride_b,
    value_stride_t,
    RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    SINKS: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROOM: tl.constexpr,  # tokens that the window's tensor has room for
    WIDTH: tl.constexpr,
):
    """The grid is rows x new tokens, and channels of the keys, then of the values."""
    b, i, place = tl.program_id(0) // length, tl.program_id(0) % length, tl.program_id(1)
    sinks, _, window, _, to_sinks, _, _, fits = _read_row(
        state, b, batch, length, RESIDUAL, BLOCK, SINKS, CAPACITY, BLOCKS
    )
    row = (b, sinks, window, to_sinks, fits)
    of_keys = tl.cdiv(key_channels, WIDTH)
    if place < of_keys:
        _copy_token(
            keys,
            sink_keys,
            window_keys,
            row,
            i,
            place,
            key_channels,
            key_stride_b,
            key_stride_t,
            SINKS,
            ROOM,
            WIDTH,
        )
    else:
        _copy_token(
            values,
            sink_values,
            window_values,
            row,
            i,
            place - of_keys,
            value_channels,
            value_stride_b,
            value_stride_t,
            SINKS,
            ROOM,
            WIDTH,
        )


@triton.jit
def _take_kernel(
    state,
    slots,
    window,
    source,
    taken,
    batch,
    length,
    channels,
    stride_b,
    stride_t,
    RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    SINKS: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCKS: tl.constexpr,
    DUE: tl.constexpr,
    TO_SLOTS: tl.constexpr,  # whether a block goes to its slot, or to the place of its row and number
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Copy channels `source` of the blocks that are due; the grid is rows x blocks, tiles of tokens and of channels."""
    b, nth = tl.program_id(0) // DUE, tl.program_id(0) % DUE
    _, _, _, blocks, _, _, flushed, _ = _read_row(state, b, batch, length, RESIDUAL, BLOCK, SINKS, CAPACITY, BLOCKS)
    if nth < flushed:
        tokens = tl.program_id(1) * HEIGHT + tl.arange(0, HEIGHT)
        columns = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
        valid = (tokens < BLOCK)[:, None] & (columns < channels)[None, :]
        first = window + b.to(tl.int64) * stride_b + (nth * BLOCK + tokens).to(tl.int64)[:, None] * stride_t
        x = tl.load(first + tl.load(source + columns, columns < channels, 0)[None, :], valid, 0)
        at = tl.load(slots + b * BLOCKS + blocks + nth) if TO_SLOTS else b * DUE + nth
        rows = at.to(tl.int64) * BLOCK + tokens
        tl.store(taken + rows[:, None] * channels + columns[None, :], x, valid)


@triton.jit
def _flush_kernel(
    state,
    slots,
    x,
    packed,
    scale,
    zero_point,
    finite,
    table,
    candidates,
    batch,
    new_tokens,
    runs,
    first_run,
    first_token,
    first_word,
    slot_words,
    slot_parameters,
    length,
    words,
    channels,
    groups,
    blocks,
    token_blocks,
    stride_b,
    stride_t,
    RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    SINKS: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCKS: tl.constexpr,
    DUE: tl.constexpr,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    SPACING: tl.constexpr,
    OFFSET: tl.constexpr,
    LIMIT: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    MSE: tl.constexpr,
    STATIC: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ALIGN: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`_quantize_kernel` on the blocks that are due, into their slots; its rows are rows x blocks x runs of a block."""
    n = tl.program_id(0) // blocks // groups // token_blocks
    b, nth, run = n // runs // DUE, n // runs % DUE, n % runs
    _, _, _, held, _, _, flushed, _ = _read_row(state, b, batch, new_tokens, RESIDUAL, BLOCK, SINKS, CAPACITY, BLOCKS)
    if nth < flushed:
        slot = tl.load(slots + b * BLOCKS + held + nth).to(tl.int64)
        token = (nth * BLOCK + first_token + run * length).to(tl.int64)
        # That kernel goes on to its row n by itself.
        to_word = slot * slot_words + (first_word + (run - n.to(tl.int64)) * words) * channels
        parameters = channels if PER_CHANNEL else length * groups
        to_parameter = slot * slot_parameters + (first_run + run - n.to(tl.int64)) * parameters
        if STATIC:
            to_parameter = to_parameter * 0
        _quantize_kernel(
            x + tl.multiple_of(b.to(tl.int64) * stride_b + token * stride_t, ALIGN),
            packed + tl.multiple_of(to_word, ALIGN),
            scale + to_parameter,
            zero_point + to_parameter,
            finite,
            table,
            candidates,
            length,
            words,
            channels,
            groups,
            blocks,
            token_blocks,
            0,
            stride_t,
            BITS,
            LEVELS,
            SPACING,
            OFFSET,
            LIMIT,
            SYMMETRIC,
            MSE,
            STATIC,
            PER_CHANNEL,
            ALIGN,
            HELD,
            BLOCK_T,
            BLOCK_C,
        )


@triton.jit
def _move_up(window, tokens, by, channels, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Tokens `by` … `by + tokens - 1` of a window to its front; a tile is no higher than `by`."""
    for first in range(0, tokens, HEIGHT):
        rows = first + tl.arange(0, HEIGHT)
        for left in range(0, channels, WIDTH):
            columns = left + tl.arange(0, WIDTH)
            valid = (rows < tokens)[:, None] & (columns < channels)[None, :]
            at = rows[:, None] * channels + columns[None, :]
            tl.store(window + at, tl.load(window + by * channels + at, valid, 0), valid)
        tl.debug_barrier()


@triton.jit
def _advance_kernel(
    state,
    table,
    window_keys,
    window_values,
    ok,
    batch,
    length,
    key_channels,
    value_channels,
    RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    SINKS: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROOM: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Move the window up and bring the bookkeeping to the end of the step; a program is a row."""
    b = tl.program_id(0)
    sinks, start, _, blocks, to_sinks, total, flushed, fits = _read_row(
        state, b, batch, length, RESIDUAL, BLOCK, SINKS, CAPACITY, BLOCKS
    )
    tl.debug_barrier()  # every thread has read the row before one of them changes it
    if fits:
        packed, begin = flushed * BLOCK, start + to_sinks
        if flushed > 0:
            row = b.to(tl.int64) * ROOM
            _move_up(window_keys + row * key_channels, total - packed, packed, key_channels, HEIGHT, WIDTH)
            _move_up(window_values + row * value_channels, total - packed, packed, value_channels, HEIGHT, WIDTH)
            for nth in range(0, flushed):
                at = table + b * BLOCKS + blocks + nth
                tl.store(at + batch * BLOCKS, begin + nth * BLOCK)
                tl.store(at + 2 * batch * BLOCKS, BLOCK)
        tl.store(state + b, sinks + to_sinks)
        tl.store(state + batch + b, begin + packed)
        tl.store(state + 2 * batch + b, total - packed)
        tl.store(state + 3 * batch + b, blocks + flushed)
    else:
        tl.store(ok + 1, 0)


# ---- launches


def _raw(x: torch.Tensor) -> torch.Tensor:
    """The bits of floats as integers, for copies."""
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize])


class _Launch(NamedTuple):
    """A kernel on its grid, and the arguments that no step changes."""

    run: Callable
    arguments: dict[str, Any]

    def start(self, **arguments) -> None:
        self.run(**self.arguments, **arguments)


class _Flush(NamedTuple):
    """Quantizing the channels of one record, of the blocks that are due.

    Attributes:
        take: Copies channels that are not side by side to `scratch`, or states as they are to their slots; `None`:
            there is nothing to copy.
        scratch: Shape of the copy; `None`: there is none.
        quantize: For each length of the groups of a block that are packed by themselves; none at 16 bits.
    """

    take: _Launch | None
    scratch: tuple[int, int, int] | None
    quantize: list[_Launch]


class FusedAppend:
    """`append_tokens` of `modules/cache/fixed_store.py` by kernels: up to `MAX_QUERY_LENGTH` tokens per row, no pads.

    What is launched depends on the number of new tokens alone and is prepared once for each. An error is raised as
    `require` does, after the fact: the rows are then not usable until they are cleared.

    Args:
        room: `Room` of a row.
        records: Of each side, how its blocks are packed.
        tensors: Those of the store, by name.
    """

    def __init__(self, room, records: dict[str, tuple[PackRecord, ...]], tensors: dict[str, torch.Tensor]):
        self.room, self.records, self.tensors = room, records, tensors
        exact = {name: _raw(tensors[name]) for name in ("sink_keys", "sink_values", "window_keys", "window_values")}
        self.batch, self.device = len(tensors["window_keys"]), tensors["state"].device
        self.row = {
            "state": tensors["state"],
            "batch": self.batch,
            "RESIDUAL": room.residual_length,
            "BLOCK": room.block_length,
            "SINKS": room.sink_length,
            "CAPACITY": room.capacity,
            "BLOCKS": room.blocks,
        }
        self.whole = self.row | {
            "window_keys": exact["window_keys"],
            "window_values": exact["window_values"],
            "key_channels": exact["window_keys"].shape[2],
            "value_channels": exact["window_values"].shape[2],
            "ROOM": exact["window_keys"].shape[1],
            "WIDTH": 128,
        }
        self.sinks = {"sink_keys": exact["sink_keys"], "sink_values": exact["sink_values"]}
        self.finite, self.fits = tensors["ok"]
        self.prepared: dict[int, tuple[_Launch, list[_Flush], _Launch]] = {}

    def __call__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        length = keys.shape[1]
        if length not in self.prepared:
            self.prepared[length] = self._prepare(length)
        append, flushes, advance = self.prepared[length]
        keys, values = (_raw(x if x.stride(-1) == 1 else x.contiguous()) for x in (keys, values))
        with torch.cuda.device_of(keys):
            append.start(
                keys=keys,
                values=values,
                key_stride_b=keys.stride(0),
                key_stride_t=keys.stride(1),
                value_stride_b=values.stride(0),
                value_stride_t=values.stride(1),
            )
            for flush in flushes:
                self._start(flush)
            advance.start()
        require(self.finite, "x: values to quantize must be finite and fit their scales; see check_scale")
        require(self.fits, self.room.full_message)

    def _start(self, flush: _Flush) -> None:
        copied = {}
        if flush.scratch is not None:
            x = torch.empty(flush.scratch, dtype=self.tensors["window_keys"].dtype, device=self.device)
            flush.take.start(taken=_raw(x))
            copied = {"x": _as_bits(x)}
        elif flush.take is not None:
            flush.take.start()
        for launch in flush.quantize:
            launch.start(**copied)

    def _prepare(self, length: int) -> tuple[_Launch, list[_Flush], _Launch]:
        blocks = sum(-(-self.whole[f"{side}_channels"] // self.whole["WIDTH"]) for side in ("key", "value"))
        append = self.whole | self.sinks | {"length": length, "num_warps": 4}
        advance = self.whole | {
            "table": self.tensors["table"],
            "ok": self.tensors["ok"].view(torch.uint8),
            "length": length,
            "HEIGHT": 1 << min(self.room.block_length.bit_length() - 1, 4),
            "num_warps": 8,
        }
        flushes = []
        for side, records in self.records.items():
            flushes += [self._flush(side, record, length) for record in records]
        return (
            _Launch(_append_kernel[(self.batch * length, blocks)], append),
            flushes,
            _Launch(_advance_kernel[(self.batch,)], advance),
        )

    def _take(self, window: torch.Tensor, channels: tuple[int, ...], length: int, to_slots: bool) -> _Launch:
        due, height = self.room.due(length), 16
        grid = (self.batch * due, -(-self.room.block_length // height), -(-len(channels) // 128))
        arguments = self.row | {
            "slots": self.tensors["table"],
            "window": _raw(window),
            "source": torch.tensor(channels, dtype=torch.int32, device=self.device),
            "length": length,
            "channels": len(channels),
            "stride_b": window.stride(0),
            "stride_t": window.stride(1),
            "DUE": due,
            "TO_SLOTS": to_slots,
            "HEIGHT": height,
            "WIDTH": 128,
            "num_warps": 4,
        }
        return _Launch(_take_kernel[grid], arguments)

    def _flush(self, side: str, record: PackRecord, new_tokens: int) -> _Flush:
        window, due, prefix = self.tensors[f"window_{side}"], self.room.due(new_tokens), f"{side}.{record.prefix}"
        channels, bits, static = record.channels, record.bits, record.scales is not None
        if bits == 16:
            take = self._take(window, channels, new_tokens, True)
            take.arguments["taken"] = _raw(self.tensors[f"{prefix}states"])
            return _Flush(take, None, [])
        x, take, scratch = window[..., channels[0] :], None, None
        if channels[-1] - channels[0] >= len(channels):  # not side by side
            scratch = (self.batch, due * self.room.block_length, len(channels))
            x = torch.empty(scratch, dtype=window.dtype, device="meta")  # for its strides
            take = self._take(window, channels, new_tokens, False)
        packed = self.tensors[f"{prefix}packed"]
        stored = (self.tensors.get(f"{prefix}scale"), self.tensors.get(f"{prefix}zero_point"))
        scale, zero_point = record.scales or stored
        levels, spacing, offset = grid(bits)
        symmetric, widths = record.symmetric, record.groups
        launches, first = [], {"first_run": 0, "first_token": 0, "first_word": 0}
        for count, run in record.runs:
            slots, words = -(-run // 20) * 32 if bits == 1.58 else run, packed_words(run, bits)
            search = not static and (record.range_method == "mse" or (symmetric and bits < 2))
            align = math.gcd(16, len(channels), x.stride(0), x.stride(1), *(widths or ()))
            tile = quantize._tile(slots, max(widths or (len(channels),)), widths is None, align, search)
            if search and widths is None:
                tile = (tile[0], max(tile[1] // 2, 16), tile[2])  # the row's bookkeeping takes registers too
            prepared, further = quantize._prepared(
                self.batch * due * count,
                -(-len(channels) // tile[1]) if widths is None else 1,
                1 if widths is None and not static else -(-slots // tile[0]),
                widths,
                align,
                tile,
                self.device,
            )
            arguments = {
                "slots": self.tensors["table"],
                "packed": packed,
                "scale": _as_bits(scale),
                "zero_point": _as_bits(scale if symmetric else zero_point),
                "finite": self.tensors["ok"].view(torch.uint8),
                "candidates": _candidates(bits, symmetric, self.device),
                "new_tokens": new_tokens,
                "runs": count,
                "slot_words": packed.stride(0),
                "slot_parameters": scale.stride(0),
                "length": run,
                "words": words,
                "channels": len(channels),
                "stride_b": x.stride(0),
                "stride_t": x.stride(1),
                "DUE": due,
                "BITS": quantize._bits(bits),
                "LEVELS": levels,
                "SPACING": spacing,
                "OFFSET": offset,
                "LIMIT": torch.finfo(record.scale_dtype).max,
                "SYMMETRIC": symmetric,
                "MSE": search,
                "STATIC": static,
                "HELD": static or (slots <= tile[0] if widths is None else max(widths) <= tile[1]),
            }
            if scratch is None:
                arguments["x"] = _as_bits(x)
            launches.append(_Launch(_flush_kernel[prepared], arguments | first | self.row | further))
            first["first_run"] += count
            first["first_token"] += count * run
            first["first_word"] += count * words
        return _Flush(take, scratch, launches)


__all__ = ["FusedAppend"]
