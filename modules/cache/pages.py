"""A page of a serving engine as a packed block of ours: the layout in bytes, and the writer of single tokens.

An engine deals out pages of T tokens and knows nothing but their size. A page holds one block of the cache's codecs,
field after field, so that views into the pages are what attention reads (`PackedPart`), and the engine's table of pages
is the table of a `PackedCache`.

Requests come and go, and a page fills up token by token. Where the codes of a token do not depend on the others of its
block (calibrated scales, scales by token, 16 bits), a token is packed when it comes, and its bits are set in the words
of its page, which are those of another text before. By other schemes a page is packed when it is full (`needs_whole`).
"""

from collections.abc import Set

import torch

from configuration_alrd_llama import QuantScheme
from modules.cache.codecs import BlockCodec, Fields, channel_bits, make_codec
from modules.cache.pool import BlockPool
from modules.cache.scheme import SIDES, CacheScheme, LayerScales, LayerWidths
from modules.kernels import Backend
from modules.kernels.packed import PackedSide
from modules.quant_utils import require

#: Tokens of a page are a multiple of it: so many fill whole words at any width.
PAGE_MULTIPLE = 32

#: Bits of the first plane of a width that has two (`modules/quant_utils.py`).
_LOW_BITS = {3: 2, 5: 4, 6: 4}


def check_page_length(length: int, sinks: int = 0) -> None:
    """Refuse a `--block-size` of vLLM whose tokens do not fill words, or of which the first page has not all sinks."""
    if length % PAGE_MULTIPLE:
        raise ValueError(f"block_size={length}: must be a multiple of {PAGE_MULTIPLE} tokens for packed pages")
    if sinks > length:
        raise ValueError(
            f"sink_length={sinks}: must be at most block_size={length}, for sinks go by a text's first page"
        )


def needs_whole(scheme: QuantScheme) -> bool:
    """Whether the codes of a token depend on other tokens of its block, or have no bits of their own."""
    if scheme.quantizer is not None or scheme.rotation or scheme.protected:
        return True
    bits = set(channel_bits(scheme, 1))
    measured = scheme.per_channel and not scheme.static and bits != {16}
    return measured or bool(bits & {1.5, 1.58})


class PageLayout:
    """Bytes of a page of one layer of a cache.

    Args:
        scheme: What the layer stores.
        widths: Channels of each head group, of keys and values or of the one latent of both.
        length: Tokens of a page, T.
        dtype: Type of the states.
        backend: Functions that quantize.
        scales: Calibrated scales; without them the layout only tells the size.

    Attributes:
        nbytes: Bytes of a page, a multiple of 4.
    """

    def __init__(
        self,
        scheme: CacheScheme,
        widths: LayerWidths,
        length: int,
        dtype: torch.dtype,
        backend: Backend | None = None,
        scales: LayerScales | None = None,
    ):
        check_page_length(length)
        self.length = length
        #: Of blocks of T tokens.
        self.codecs = _codecs(scheme, length, widths, dtype, backend, scales)
        #: Of one token, for codes that depend on nothing else.
        self.token_codecs: dict[str, BlockCodec] = {}
        if not any([needs_whole(getattr(scheme, side)) for side in self.codecs]):
            self.token_codecs = _codecs(scheme, 1, widths, dtype, backend, scales)
        # Wide types come first, so that every field starts where its type may.
        fields = []
        for side, codec in self.codecs.items():
            for name, (shape, field_type) in codec.fields().items():
                fields.append((side, name, shape, field_type))
        fields.sort(key=lambda field: -field[3].itemsize)
        self.fields, self.nbytes = [], 0
        for side, name, shape, field_type in fields:
            size = torch.Size(shape).numel() * field_type.itemsize
            self.fields.append((side, name, shape, field_type, self.nbytes, size))
            self.nbytes += size
        # Where the next page starts, words must start too.
        self.nbytes = -(-self.nbytes // 4) * 4

    def storage(self, pages: torch.Tensor) -> dict[str, Fields]:
        """Views of the fields of all pages, by side and name: `[pages, …]`.

        Args:
            pages: `[pages, nbytes]` uint8.
        """
        storage: dict[str, Fields] = {side: {} for side in self.codecs}
        for side, name, shape, field_type, start, size in self.fields:
            storage[side][name] = pages[:, start : start + size].view(field_type).unflatten(1, shape)
        return storage


def _codecs(
    scheme: CacheScheme,
    length: int,
    widths: LayerWidths,
    dtype: torch.dtype,
    backend: Backend | None,
    scales: LayerScales | None,
) -> dict[str, BlockCodec]:
    """The codecs of a layer for blocks of so many tokens."""
    codecs, scales = {}, scales or {}
    for side, width in zip(SIDES, widths):
        codecs[side] = make_codec(getattr(scheme, side), length, width, dtype, backend, scales.get(side))
    return codecs


class Pages:
    """The pages of one layer of a cache.

    Args:
        layout: Of a page.
        pages: `[pages, nbytes]` uint8, all pages that there are; what they hold at first is never read.

    Attributes:
        keys, values: The pages as attention reads them; one object where a latent is both.
    """

    def __init__(self, layout: PageLayout, pages: torch.Tensor):
        self.layout, self.storage = layout, layout.storage(pages)
        sides = BlockPool(layout.codecs, pages.device, len(pages), self.storage).sides()
        self.keys: PackedSide = sides[0]
        self.values: PackedSide = sides[-1]

    def write_whole(self, pages: list[int], states: dict[str, torch.Tensor]) -> None:
        """Store the tokens of whole pages, finite ones, of each side `[m, T, C]`."""
        if not pages:
            return
        for side, codec in self.layout.codecs.items():
            for name, value in codec.encode(states[side]).items():
                self.storage[side][name][pages] = value

    def write(self, slots: torch.Tensor, states: dict[str, torch.Tensor]) -> None:
        """Store tokens, in whatever order and company they come, by a scheme that does not need whole pages.

        Args:
            slots: `[N]` int64, each once: page * T + place in the page.
            states: By side `[N, C]`.

        Raises:
            ValueError: A value is not finite.
        """
        page, token = slots // self.layout.length, slots % self.layout.length
        for side, codec in self.layout.token_codecs.items():
            require(torch.isfinite(states[side]).all(), f"{side}: must be finite; NaN or Inf were found")
            for name, value in codec.encode(states[side][:, None]).items():
                field = self.storage[side][name]
                if field.dtype == torch.int32:
                    self._set_bits(field, page, token, value)
                else:
                    field[page, token] = value[:, 0]

    def _set_bits(self, words: torch.Tensor, page: torch.Tensor, token: torch.Tensor, codes: torch.Tensor) -> None:
        """Put codes in the place of what their bits are.

        Args:
            words: `[pages, W, C]` int32.
            page, token: `[N]`.
            codes: `[N, planes, C]` int32, tokens packed by themselves: the code of a plane is its lowest bits.
        """
        bits, first = words.shape[1] * 32 // self.layout.length, 0
        low = _LOW_BITS.get(bits, bits)
        for plane, plane_bits in enumerate((low, bits - low)[: codes.shape[1]]):
            per_word = 32 // plane_bits
            word, shift = first + token // per_word, (token % per_word * plane_bits).int()[:, None]
            mask = (1 << plane_bits) - 1
            old = words[page, word] >> shift & mask
            # Tokens of one word must not overwrite each other. They have bits of their own, so differences add up.
            words.index_put_((page, word), (codes[:, plane] & mask) - old << shift, accumulate=True)
            first += self.layout.length // per_word


class PageRows:
    """States of tokens as they are, in a row for each page that has one.

    Args:
        length: Tokens of a row.
        channels: By side.
        like: Tensor of the type and on the device of the states.
        limit: Rows at most, but for those of one step.
    """

    def __init__(self, length: int, channels: dict[str, int], like: torch.Tensor, limit: int = 1 << 31):
        self.length, self.limit, self.row_of, self.free = length, limit, {}, []
        self.states = {side: like.new_zeros((0, length, width)) for side, width in channels.items()}

    def _row(self, page: int) -> int:
        if page not in self.row_of:
            if not self.free:
                self._grow()
            self.row_of[page] = self.free.pop()
        return self.row_of[page]

    def _grow(self) -> None:
        for side, old in self.states.items():
            rows = len(old)
            added = max(1, min(max(8, rows), self.limit - rows))
            self.states[side] = torch.cat([old, old.new_zeros((added, *old.shape[1:]))])
        self.free = list(range(rows, rows + added))

    def _drop(self, pages: Set[int]) -> None:
        for page in pages & set(self.row_of):
            self.free.append(self.row_of.pop(page))

    def _index(self, rows: list[int]) -> torch.Tensor:
        device = next(iter(self.states.values())).device
        return torch.tensor(rows, dtype=torch.int64, device=device)
