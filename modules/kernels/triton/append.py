"""Triton kernels of a step of `modules/cache/fixed_store.py`: append, quantize due blocks, move the window up.

Every step is the same launches. A program reads from the row's bookkeeping on the device whether there is anything to
do, so most of them end at once: a block is due once in as many steps as it has tokens. Blocks are quantized by the
kernel of `modules/kernels/triton/quantize.py`, so the bytes are those of any cache.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from modules.kernels.packed import PackRecord
from modules.kernels.triton.common import as_bits, stand_in
from modules.kernels.triton.launch import Launcher
from modules.kernels.triton.quantize import Format, quantize_kernel, quantize_launch
from modules.quant_utils import packed_words, require

#: Channels, and tokens of a block, of a tile that is copied.
_WIDTH, _HEIGHT = 128, 16


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
    # Sinks fill up only while the row holds nothing else.
    to_sinks = tl.where((window == 0) & (blocks == 0), tl.minimum(SINKS - sinks, length), 0)
    total = window + length - to_sinks
    # The oldest tokens of the window are packed, in whole blocks that leave it its residual length.
    flushed = tl.maximum(total - RESIDUAL, 0) // BLOCK
    fits = (start + to_sinks + total <= CAPACITY) & (blocks + flushed <= BLOCKS)
    return sinks, start, window, blocks, to_sinks, total, tl.where(fits, flushed, 0), fits


@triton.jit
def _copy_token(new, sink, window, row, i, block, channels, stride_b, stride_t, SINKS, ROOM, WIDTH: tl.constexpr):
    """A block of channels of new token i of a row to its sinks or its window."""
    sinks, held, to_sinks, fits = row[1], row[2], row[3], row[4]
    columns = block * WIDTH + tl.arange(0, WIDTH)
    mask = (columns < channels) & fits
    b = row[0].to(tl.int64)
    x = tl.load(new + b * stride_b + i.to(tl.int64) * stride_t + columns, mask, 0)
    # One of the two stores is masked out as a whole.
    tl.store(sink + (b * SINKS + sinks + i) * channels + columns, x, mask & (i < to_sinks))
    tl.store(window + (b * ROOM + held + i - to_sinks) * channels + columns, x, mask & (i >= to_sinks))


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
    b, i, block = tl.program_id(0) // length, tl.program_id(0) % length, tl.program_id(1)
    sinks, _, window, _, to_sinks, _, _, fits = _read_row(
        state, b, batch, length, RESIDUAL, BLOCK, SINKS, CAPACITY, BLOCKS
    )
    # Only `_advance_kernel`, the last of a step, changes the bookkeeping, so that every kernel reads the same.
    row = (b, sinks, window, to_sinks, fits)
    of_keys = tl.cdiv(key_channels, WIDTH)
    # Programs of the first blocks of channels copy keys, the others values.
    if block < of_keys:
        _copy_token(
            keys,
            sink_keys,
            window_keys,
            row,
            i,
            block,
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
            block - of_keys,
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
    TO_SLOTS: tl.constexpr,  # whether a block goes to its slot, or to a scratch by its row and number
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Copy channels `source` of the blocks that are due; the grid is rows x blocks, tiles of tokens and of channels."""
    b, nth = tl.program_id(0) // DUE, tl.program_id(0) % DUE
    _, _, _, blocks, _, _, flushed, _ = _read_row(state, b, batch, length, RESIDUAL, BLOCK, SINKS, CAPACITY, BLOCKS)
    if nth < flushed:
        # Most programs do not come here: a block is due once in as many steps as it has tokens.
        tokens = tl.program_id(1) * HEIGHT + tl.arange(0, HEIGHT)
        columns = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
        mask = (tokens < BLOCK)[:, None] & (columns < channels)[None, :]
        ptr = window + b.to(tl.int64) * stride_b + (nth * BLOCK + tokens).to(tl.int64)[:, None] * stride_t
        x = tl.load(ptr + tl.load(source + columns, columns < channels, 0)[None, :], mask, 0)
        slot = b * DUE + nth
        if TO_SLOTS:
            slot = tl.load(slots + b * BLOCKS + blocks + nth)
        rows = slot.to(tl.int64) * BLOCK + tokens
        tl.store(taken + rows[:, None] * channels + columns[None, :], x, mask)


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
    """`quantize_kernel` on the blocks that are due, into their slots; its rows are rows x blocks x runs of a block."""
    n = tl.program_id(0) // blocks // groups // token_blocks
    b, nth, run = n // runs // DUE, n // runs % DUE, n % runs
    _, _, _, held, _, _, flushed, _ = _read_row(state, b, batch, new_tokens, RESIDUAL, BLOCK, SINKS, CAPACITY, BLOCKS)
    if nth < flushed:
        # Where the block starts in the window, and where its codes and parameters go.
        slot = tl.load(slots + b * BLOCKS + held + nth).to(tl.int64)
        token = (nth * BLOCK + first_token + run * length).to(tl.int64)
        # `quantize_kernel` adds n rows to these pointers itself, so that they start n rows early.
        to_word = slot * slot_words + (first_word + (run - n.to(tl.int64)) * words) * channels
        parameters = length * groups
        if PER_CHANNEL:
            parameters = channels
        to_parameter = slot * slot_parameters + (first_run + run - n.to(tl.int64)) * parameters
        if STATIC:  # one pair for all blocks
            to_parameter = to_parameter * 0
        quantize_kernel(
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
            mask = (rows < tokens)[:, None] & (columns < channels)[None, :]
            offs = rows[:, None] * channels + columns[None, :]
            tl.store(window + offs, tl.load(window + by * channels + offs, mask, 0), mask)
        # The next tile may overwrite what another thread has yet to read of this one.
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
                ptr = table + b * BLOCKS + blocks + nth
                # The table has three planes: slots, which stay, positions of the first token, and counts.
                tl.store(ptr + batch * BLOCKS, begin + nth * BLOCK)
                tl.store(ptr + 2 * batch * BLOCKS, BLOCK)
        tl.store(state + b, sinks + to_sinks)
        tl.store(state + batch + b, begin + packed)
        tl.store(state + 2 * batch + b, total - packed)
        tl.store(state + 3 * batch + b, blocks + flushed)
    else:
        # A row that would exceed its capacity stays as it is; the host learns of it later.
        tl.store(ok, 0)


def _raw(x: torch.Tensor) -> torch.Tensor:
    """The bits of floats as integers, for copies."""
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize])


def _copied(x: torch.Tensor) -> torch.Tensor:
    """New states as the kernels copy them: bits, channels side by side."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    return _raw(x)


class _Launch(NamedTuple):
    """A kernel with the arguments that no step changes, and its grid."""

    launcher: Launcher
    grid: tuple[int, ...]

    def start(self, tensors: dict[str, torch.Tensor] | None = None, numbers: dict[str, int] | None = None) -> None:
        self.launcher.start(self.grid, tensors or {}, numbers or {})


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
        layout: Sizes of a row, a `RowLayout`.
        records: Of each side, how its blocks are packed.
        tensors: Tensors of the store, by name.
    """

    def __init__(self, layout, records: dict[str, tuple[PackRecord, ...]], tensors: dict[str, torch.Tensor]):
        self.layout, self.records, self.tensors = layout, records, tensors
        exact = {name: _raw(tensors[name]) for name in ("sink_keys", "sink_values", "window_keys", "window_values")}
        self.batch, self.device = len(tensors["window_keys"]), tensors["state"].device
        # Arguments of every kernel: the bookkeeping, and the sizes of a row.
        self.row = {
            "state": tensors["state"],
            "batch": self.batch,
            "RESIDUAL": layout.residual_length,
            "BLOCK": layout.block_length,
            "SINKS": layout.sink_length,
            "CAPACITY": layout.capacity,
            "BLOCKS": layout.blocks,
        }
        # Arguments of the kernels that move tokens in full precision.
        self.whole = self.row | {
            "window_keys": exact["window_keys"],
            "window_values": exact["window_values"],
            "key_channels": exact["window_keys"].shape[2],
            "value_channels": exact["window_values"].shape[2],
            "ROOM": exact["window_keys"].shape[1],
            "WIDTH": _WIDTH,
        }
        self.sinks = {"sink_keys": exact["sink_keys"], "sink_values": exact["sink_values"]}
        # One check for all that can fail, since each is launched as well.
        unfit = "x: values to quantize must be finite and fit their scales; see check_scale"
        self.message = f"{unfit}; or {layout.full_message}"
        self.prepared: dict[int, tuple[_Launch, list[_Flush], _Launch]] = {}

    def __call__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        length = keys.shape[1]
        # The launches of a step depend on its number of tokens alone.
        if length not in self.prepared:
            self.prepared[length] = self._prepare(length)
        append, flushes, advance = self.prepared[length]
        keys, values = _copied(keys), _copied(values)
        with torch.cuda.device_of(keys):
            (key_b, key_t, _), (value_b, value_t, _) = keys.stride(), values.stride()
            strides = {
                "key_stride_b": key_b,
                "key_stride_t": key_t,
                "value_stride_b": value_b,
                "value_stride_t": value_t,
            }
            append.start({"keys": keys, "values": values}, strides)
            for flush in flushes:
                self._start(flush)
            advance.start()
        require(self.tensors["ok"], self.message)

    def _start(self, flush: _Flush) -> None:
        copied = {}
        # Channels that lie apart are copied side by side, and quantized from there.
        if flush.scratch is not None:
            x = torch.empty(flush.scratch, dtype=self.tensors["window_keys"].dtype, device=self.device)
            flush.take.start({"taken": _raw(x)})
            copied = {"x": as_bits(x)}
        elif flush.take is not None:
            flush.take.start()
        for launch in flush.quantize:
            launch.start(copied)

    def _prepare(self, length: int) -> tuple[_Launch, list[_Flush], _Launch]:
        """The launches of a step of `length` tokens per row."""
        blocks = -(-self.whole["key_channels"] // _WIDTH) + -(-self.whole["value_channels"] // _WIDTH)
        append = self.whole | self.sinks | {"length": length, "num_warps": 4}
        advance = self.whole | {
            "table": self.tensors["table"],
            "ok": self.tensors["ok"].view(torch.uint8),
            "length": length,
            # A power of two that is no higher than a block, by which tokens move up.
            "HEIGHT": 1 << min(self.layout.block_length.bit_length() - 1, 4),
            "num_warps": 8,
        }
        # Blocks of each side that are due, one record of channels after the other.
        flushes = []
        for side, records in self.records.items():
            for record in records:
                flushes.append(self._flush(side, record, length))
        return (
            _Launch(Launcher(_append_kernel, append), (self.batch * length, blocks)),
            flushes,
            _Launch(Launcher(_advance_kernel, advance), (self.batch,)),
        )

    def _take(self, window: torch.Tensor, channels: tuple[int, ...], length: int, to_slots: bool) -> _Launch:
        """Copying channels of the blocks that are due; the call adds where to, `taken`."""
        due = self.layout.due(length)
        grid = (self.batch * due, -(-self.layout.block_length // _HEIGHT), -(-len(channels) // _WIDTH))
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
            "HEIGHT": _HEIGHT,
            "WIDTH": _WIDTH,
            "num_warps": 4,
        }
        return _Launch(Launcher(_take_kernel, arguments), grid)

    def _flush(self, side: str, record: PackRecord, new_tokens: int) -> _Flush:
        window, due, prefix = self.tensors[f"window_{side}"], self.layout.due(new_tokens), f"{side}.{record.prefix}"
        channels, static = record.channels, record.scales is not None
        # At 16 bits there is nothing to quantize: the states go to their slots.
        if record.bits == 16:
            take = self._take(window, channels, new_tokens, True)
            take.launcher.constant["taken"] = _raw(self.tensors[f"{prefix}states"])
            return _Flush(take, None, [])
        # The kernel reads a range of channels of the window itself, and other channels from a copy.
        x, take, scratch = window[..., channels[0] : channels[0] + len(channels)], None, None
        if channels[-1] - channels[0] >= len(channels):
            scratch = (self.batch, due * self.layout.block_length, len(channels))
            x = torch.empty(scratch, dtype=window.dtype, device="meta")  # for its strides
            take = self._take(window, channels, new_tokens, False)
        # Where blocks go; calibrated scales are read, others written.
        packed = self.tensors[f"{prefix}packed"]
        stored = (self.tensors.get(f"{prefix}scale"), self.tensors.get(f"{prefix}zero_point"))
        scale, zero_point = record.scales or stored
        form = Format(record.bits, record.groups, record.symmetric, record.range_method, record.scale_dtype, static)
        constant = self.row | {
            "slots": self.tensors["table"],
            "packed": packed,
            "scale": as_bits(scale),
            "zero_point": as_bits(stand_in(zero_point, scale)),
            "finite": self.tensors["ok"].view(torch.uint8),
            "new_tokens": new_tokens,
            "slot_words": packed.stride(0),
            "slot_parameters": scale.stride(0),
            "stride_b": x.stride(0),
            "DUE": due,
        }
        if scratch is None:
            constant["x"] = as_bits(x)
        # A launch for the runs of one length, behind the runs of the launches before.
        launches, first = [], {"first_run": 0, "first_token": 0, "first_word": 0}
        for count, run in record.runs:
            rows = self.batch * due * count
            grid, arguments = quantize_launch(x, rows, run, form, self.device, crowded=True)
            launcher = Launcher(_flush_kernel, constant | first | arguments | {"runs": count})
            launches.append(_Launch(launcher, grid))
            first["first_run"] += count
            first["first_token"] += count * run
            first["first_word"] += count * packed_words(run, record.bits)
        return _Flush(take, scratch, launches)
