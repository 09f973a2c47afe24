"""The new tokens of a step of vLLM: requests of all lengths in one flat batch, and where their history lies.

A token attends to the pages that were written before the step, and to the new tokens of its own request as they are.
vLLM also lets a request share pages which another one is writing in this very step. Those are not packed before
the last layer of their block has run, so what is new in them is read from the other request's new tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from modules.cache.pages import PAGE_MULTIPLE
from modules.kernels import MAX_QUERY_LENGTH
from modules.kernels.packed import Tile

#: New tokens in a tile of those that attend to each other.
_TILE = 512

#: Drafts that may stand at the end of a request's new tokens, and be rejected.
MAX_DRAFTS = PAGE_MULTIPLE - 1


@dataclass(frozen=True, eq=False)
class Run:
    """New tokens of the step that stand one after the other.

    Attributes:
        first: Row of the first one among the step's tokens.
        start: Its position in the text.
        count: How many.
    """

    first: int
    start: int
    count: int


@dataclass(frozen=True, eq=False)
class OpenPages:
    """A page of each of n requests that is not packed yet.

    Attributes:
        pages: Which ones, -1: none.
        start, count: `[n, 1]` int32, position of its first token, and the tokens that it holds.
        longest: Most of `count`, as the host knows it.
    """

    pages: list[int]
    start: torch.Tensor
    count: torch.Tensor
    longest: int


@dataclass(frozen=True, eq=False)
class Requests:
    """Requests of a step that have equally many new tokens, n of L each.

    Attributes:
        rows: `[n * L]` int64, or a slice: their new tokens among the step's.
        count: n.
        positions: `[n, L]` int64.
        start, added: `[n, 1]` int32: tokens before the new ones, and L.
        least_held: Least of `start`, as the host knows it.
        table, full: `[3, n, blocks]` int32 and a flag, as in `PackedCache`; `None`: no history is packed.
        first_pages: Page of the first token of each request's history, -1: it has none.
        open_pages: History that is not packed yet and not in `table`.
        borrowed: Runs of other requests' tokens that are history here (n = 1).
    """

    rows: torch.Tensor | slice
    count: int
    positions: torch.Tensor
    start: torch.Tensor
    added: torch.Tensor
    least_held: int
    table: torch.Tensor | None
    full: bool
    first_pages: list[int]
    open_pages: tuple[OpenPages, ...] = ()
    borrowed: tuple[Run, ...] = ()

    def gathered(self, states: torch.Tensor) -> torch.Tensor:
        """States `[tokens, C]` of the step as `[n, L, C]` of these requests."""
        return states[self.rows].unflatten(0, (self.count, -1))

    def new_tiles(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[Tile, ...]:
        """The new tokens as attention reads them, from `[tokens, C]` states of the step."""
        tiles, length = [], self.positions.shape[1]
        for run in self.borrowed:
            own = slice(run.first, run.first + run.count)
            start = torch.full((1, 1), run.start, dtype=torch.int32, device=keys.device)
            tiles += _tiles(keys[None, own], values[None, own], start)
        # A tile at a time, so that no score of all new tokens by all exists.
        step = length if length <= MAX_QUERY_LENGTH else _TILE
        return (*tiles, *_tiles(self.gathered(keys), self.gathered(values), self.start, step))


def _tiles(keys: torch.Tensor, values: torch.Tensor, start: torch.Tensor, step: int = _TILE) -> list[Tile]:
    """Tiles of at most `step` tokens of `[n, L, C]` states from position `start` `[n, 1]` on."""
    tiles = []
    for first in range(0, keys.shape[1], step):
        some_keys, some_values = keys[:, first : first + step], values[:, first : first + step]
        count = torch.full_like(start, some_keys.shape[1])
        tiles.append(Tile(some_keys[:, None], some_values[:, None], start + first, count))
    return tiles


@dataclass(frozen=True, eq=False)
class Piece:
    """New tokens of the step in one page.

    Attributes:
        page: Which one.
        start: Position of its first token.
        row: Row of the first of the new ones among the step's tokens.
        place: Its place in the page.
        count: How many, one after the other.
        stays_open: Whether more is to come, or some may be drafts, which are written anew if they are rejected.
    """

    page: int
    start: int
    row: int
    place: int
    count: int
    stays_open: bool


@dataclass(frozen=True, eq=False)
class Step:
    """All new tokens of a step.

    Attributes:
        requests: Requests by their count of new tokens.
        tokens: How many new tokens; what else lies in the tensors of a step is padding.
        slots: `[tokens]` int64, page * T + place.
        positions: `[tokens]` int64.
        page_length: Tokens of a page, T.
        pieces: The same tokens page by page, where pages are packed when they are full.
        closed: Then also pages that are full for good.
    """

    requests: tuple[Requests, ...]
    tokens: int
    slots: torch.Tensor
    positions: torch.Tensor
    page_length: int
    pieces: tuple[Piece, ...] = ()
    closed: frozenset[int] = frozenset()


def make_step(
    starts: np.ndarray,
    lengths: np.ndarray,
    pages: np.ndarray,
    slots: torch.Tensor,
    page_length: int,
    window: int | None = None,
    whole_pages: bool = False,
) -> Step:
    """The step of a batch.

    Args:
        starts: `[requests + 1]` first row of each request's new tokens, then their number.
        lengths: `[requests]` tokens of each request, the new ones included.
        pages: `[requests, …]` int32, pages of each request in order.
        slots: `[tokens]` int64, where the new tokens are to be stored.
        page_length: Tokens of a page, T.
        window: Tokens that a query sees; pages before it may have been given to others since. `None`: all.
        whole_pages: Whether a page is packed when it is full, not token by token.
    """
    new = np.diff(starts)
    held = lengths - new
    if window is not None:
        # Page 0 is nobody's.
        pages = pages * (np.arange(1, pages.shape[1] + 1) * page_length > (held - window + 1)[:, None])
    shared = _shared_runs(starts, held, new, pages, page_length)
    # Requests of one length are rows of one call of the kernel.
    by_length: dict[tuple, list[int]] = {}
    for i in np.flatnonzero(new).tolist():
        # Long pieces and those with tokens of others go by themselves.
        alone = new[i] > MAX_QUERY_LENGTH or i in shared
        by_length.setdefault((int(new[i]), i if alone else -1), []).append(i)
    requests, device = [], slots.device
    for (length, _), members in by_length.items():
        # Neighbours are a slice of the step's tokens, which is no copy.
        first = starts[members]
        rows: torch.Tensor | slice = slice(int(first[0]), int(first[0]) + length * len(members))
        if not np.array_equal(first, first[0] + length * np.arange(len(members))):
            spread = (first[:, None] + np.arange(length)).reshape(-1)
            rows = torch.from_numpy(spread.astype(np.int64)).to(device)
        before = torch.from_numpy(held[members].astype(np.int32)).to(device)[:, None]
        # Only a request that is by itself has tokens of others.
        hidden, borrowed = shared.get(members[0], ({}, ()))
        table, first_pages = _table(held[members], pages[members], page_length, hidden)
        is_open = whole_pages and table is not None
        table, open_pages = _open_pages(table, page_length, device) if is_open else (table, ())
        requests.append(
            Requests(
                rows=rows,
                count=len(members),
                positions=before.long() + torch.arange(length, dtype=torch.int64, device=device),
                start=before,
                added=torch.full_like(before, length),
                least_held=int(held[members].min()),
                table=None if table is None else torch.from_numpy(table).to(device),
                full=table is not None and bool((table[2] == page_length).all()),
                first_pages=first_pages,
                open_pages=open_pages,
                borrowed=borrowed,
            )
        )
    # Token i of a request stands behind those that it holds already.
    tokens = int(starts[-1])
    positions = np.repeat(held - starts[:-1], new) + np.arange(tokens)
    positions = torch.from_numpy(positions.astype(np.int64)).to(device)
    step = Step(tuple(requests), tokens, slots[:tokens].long(), positions, page_length)
    if not whole_pages:
        return step
    # The last full page of a history may have been filled by drafts, of which it is known only now that they are right.
    last_full = pages[np.arange(len(held)), np.maximum(held // page_length - 1, 0)]
    closed = frozenset(last_full[held >= page_length].tolist())
    return replace(step, pieces=tuple(_pieces(starts, held, new, pages, page_length)), closed=closed)


def _pieces(
    starts: np.ndarray, held: np.ndarray, new: np.ndarray, pages: np.ndarray, page_length: int
) -> Iterator[Piece]:
    """The new tokens of a step page by page; arguments as for `make_step`."""
    for i in np.flatnonzero(new).tolist():
        first, end = int(held[i]), int(held[i] + new[i])
        settled = max(first, end - MAX_DRAFTS)
        for place in range(first // page_length, -(-end // page_length)):
            start = place * page_length
            own, stop = max(first, start), min(end, start + page_length)
            row, stays_open = int(starts[i]) + own - first, start + page_length > settled
            yield Piece(int(pages[i, place]), start, row, own - start, stop - own, stays_open)


def _open_pages(table: np.ndarray, page_length: int, device: torch.device) -> tuple[np.ndarray | None, list[OpenPages]]:
    """Take the pages that are not full out of a table `[3, n, blocks]`; one of each request at a time."""
    is_open, rows, taken = (table[2] > 0) & (table[2] < page_length), np.arange(table.shape[1]), []
    while is_open.any():
        place = is_open.argmax(axis=1)
        found = is_open[rows, place]
        pages, start, count = table[:, rows, place] * found
        where = (torch.from_numpy(numbers[:, None]).to(device) for numbers in (start, count))
        taken.append(OpenPages(np.where(found, pages, -1).tolist(), *where, int(count.max())))
        table[2, rows[found], place[found]] = 0
        is_open[rows, place] = False
    packed = np.flatnonzero(table[2].any(axis=0))
    return np.ascontiguousarray(table[:, :, : packed[-1] + 1]) if len(packed) else None, tuple(taken)


def _table(
    held: np.ndarray, pages: np.ndarray, page_length: int, counts: dict[int, int]
) -> tuple[np.ndarray | None, list[int]]:
    """Table of the pages that hold so many tokens of each request, and the first pages.

    Args:
        held: `[n]`.
        pages: `[n, …]`.
        page_length: T.
        counts: Of single pages, by their place, the tokens that are packed.
    """
    blocks = -(-int(held.max()) // page_length)
    if not blocks:
        return None, [-1] * len(held)
    table = np.zeros((3, len(held), blocks), dtype=np.int32)
    table[1] = np.arange(blocks) * page_length
    table[2] = np.clip(held[:, None] - table[1], 0, page_length)
    for place, count in counts.items():
        table[2, :, place] = count
    # Places behind a request's last page, which vLLM leaves as they were, end in zeros.
    used = table[1] < held[:, None]
    table[0] = pages[:, :blocks]
    table *= used
    return table, np.where(held > 0, pages[:, 0], -1).tolist()


def _shared_runs(
    starts: np.ndarray, held: np.ndarray, new: np.ndarray, pages: np.ndarray, page_length: int
) -> dict[int, tuple[dict[int, int], tuple[Run, ...]]]:
    """Of each request whose history is being written by others: tokens packed by place of the page, and the runs."""
    # Which request writes a page in this step.
    writers: dict[int, tuple[int, int]] = {}
    for i in np.flatnonzero(new).tolist():
        for place in range(held[i] // page_length, -(-(held[i] + new[i]) // page_length)):
            writers[int(pages[i, place])] = (i, place)
    # Only full pages are shared. The one that a request goes on in is its own.
    full = np.arange(pages.shape[1]) < (held // page_length)[:, None]
    being_written = full & np.isin(pages, np.fromiter(writers, dtype=pages.dtype))
    shared = {}
    for i in np.flatnonzero((new > 0) & being_written.any(axis=1)).tolist():
        counts, runs = {}, []
        for place in np.flatnonzero(being_written[i]).tolist():
            writer, _ = writers[int(pages[i, place])]
            # The first part of the page may have been packed in an earlier step.
            first = max(int(held[writer]), place * page_length)
            counts[place] = first - place * page_length
            run = Run(int(starts[writer] + first - held[writer]), first, (place + 1) * page_length - first)
            # Pages that one request writes one after the other are one run.
            if runs and runs[-1].first + runs[-1].count == run.first:
                last = runs.pop()
                run = Run(last.first, last.start, last.count + run.count)
            runs.append(run)
        shared[i] = (counts, tuple(runs))
    return shared
