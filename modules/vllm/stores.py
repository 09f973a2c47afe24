"""Tokens as they are beside the pages of vLLM: the sinks of texts, and what is in pages that are not packed yet."""

import torch

from modules.cache.pages import PageRows
from modules.kernels.packed import Tile
from modules.quant_utils import require
from modules.vllm.step import Requests, Step


class SinkStore(PageRows):
    """The first tokens of texts as they are, by the page that holds them.

    A page that begins a text has a row here as long as it is not written anew, by another text or another part of one.
    So a shared prefix shares its sinks, and there are at most as many rows as pages.
    """

    def among(self, step: Step) -> torch.Tensor:
        """Rows of the new tokens of a step that are sinks, `[n]` int64."""
        return torch.nonzero(step.positions < self.length)[:, 0]

    def write(self, step: Step, rows: torch.Tensor, states: dict[str, torch.Tensor]) -> None:
        """Keep the sinks of a step, and drop those of pages that are written anew.

        Args:
            step: The step.
            rows: `[n]`, as `among` gives them.
            states: By side `[n, C]`.
        """
        pages = step.slots // step.page_length
        self._drop(set(pages[step.positions >= step.page_length].tolist()))
        if not len(rows):
            return
        # A page may have come with the sinks of another text, whose row it keeps.
        index = self._index([self._row(page) for page in pages[rows].tolist()])
        for side, kept in self.states.items():
            kept[index, step.positions[rows]] = states[side]

    def tiles(self, requests: Requests, channels: slice = slice(None)) -> tuple[Tile, ...]:
        """The sinks of requests as attention reads them, of some of their channels; none if there are none."""
        # Those that another request is computing in this step are borrowed from it.
        rows = [self.row_of.get(page, -1) for page in requests.first_pages]
        if max(rows) < 0:
            return ()
        index = self._index(rows)
        keys, values = (states[index][:, None, :, channels] for states in self.states.values())
        count = requests.start.clamp(max=self.length)
        if requests.borrowed:
            count = count.clamp(max=min(run.start for run in requests.borrowed))
        return (Tile(keys, values, torch.zeros_like(count), count),)


class OpenStore(PageRows):
    """The tokens of pages that are not full, by schemes that pack whole pages.

    Of a request there are at most two: the page that it goes on in, and the one before, until its last tokens are known
    to be no rejected drafts. What requests leave behind that are finished, or lost their pages, nobody tells; the pages
    that were written longest ago go when there are too many, as do those behind windows shorter than 32 tokens.

    Args:
        limit: Pages at most; two for each request that may be under way at once.
        sinks: Tokens at the start of a text that are kept elsewhere, S.
    """

    def __init__(self, length: int, channels: dict[str, int], like: torch.Tensor, limit: int, sinks: int):
        super().__init__(length, channels, like, limit)
        self.sinks, self._made = sinks, {}

    def _row_of(self, page: int) -> int:
        """The row of a page that has one; any for -1, which is none."""
        if page >= 0 and page not in self.row_of:
            raise RuntimeError(
                f"max_num_seqs={self.limit // 2}: must be more: a request has waited until the tokens of page {page}, "
                "which is not packed, had to go; twice as many such pages are kept"
            )
        return self.row_of.get(page, 0)

    def write(self, step: Step, states: dict[str, torch.Tensor]) -> tuple[list[int], dict[str, torch.Tensor]]:
        """Keep the new tokens of a step, `[tokens, C]` of each side.

        Returns:
            Pages that are full now, and their tokens `[m, T, C]`.
        """
        for side, x in states.items():
            require(torch.isfinite(x).all(), f"{side}: must be finite; NaN or Inf were found")
        self._made.clear()
        # A page that is begun and ended for good in one step needs no row, and what it has is another text's.
        kept = {piece.page for piece in step.pieces if piece.count < self.length or piece.stays_open}
        self._drop(step.closed | {piece.page for piece in step.pieces if piece.page not in kept})
        others = [page for page in self.row_of if page not in kept]
        self._drop(set(others[: max(0, len(others) + len(kept) - self.limit)]))
        own, rows, places, full, done = [], [], [], [], set()
        for piece in step.pieces:
            if piece.place + piece.count == self.length:
                full.append(piece)
                if not piece.stays_open:
                    done.add(piece.page)
            if piece.page not in kept:
                continue
            row = self._row(piece.page) if piece.place == 0 else self._row_of(piece.page)
            self.row_of[piece.page] = self.row_of.pop(piece.page)  # in the order in which they are written
            own += range(piece.row, piece.row + piece.count)
            rows += [row] * piece.count
            places += range(piece.place, piece.place + piece.count)
        own, rows, places = map(self._index, (own, rows, places))
        whole = {}
        for side, held in self.states.items():
            held[rows, places] = states[side][own]
            of_page = []
            for piece in full:
                row = self.row_of.get(piece.page)
                of_page.append(states[side][piece.row : piece.row + self.length] if row is None else held[row])
            whole[side] = torch.stack(of_page) if full else held[:0]
            # Sinks, which are read elsewhere, are unlike other tokens, and must not stretch their scales.
            for page, piece in zip(whole[side], full, strict=True):
                hidden = max(0, min(self.sinks - piece.start, self.length - 1))
                page[:hidden] = page[hidden]
        self._drop(done)
        return [piece.page for piece in full], whole

    def tiles(self, requests: Requests) -> tuple[Tile, ...]:
        """History that is not packed yet as attention reads it, without sinks."""
        # All layers of a block ask for the same.
        tiles = self._made.setdefault(requests, [])
        for of in requests.open_pages[len(tiles) :]:
            index = self._index(list(map(self._row_of, of.pages)))[:, None]
            skipped = (self.sinks - of.start).clamp(min=0, max=self.length)
            places = (skipped + torch.arange(of.longest, dtype=torch.int64, device=index.device)).clamp(
                max=self.length - 1
            )
            states = [kept[index, places][:, None] for kept in self.states.values()]
            tiles.append(Tile(states[0], states[-1], of.start + skipped, (of.count - skipped).clamp(min=0)))
        return tuple(tiles)
