"""The checks of the other tests, called on code that is broken on purpose: each must notice."""

from dataclasses import replace

import pytest
import torch
from test_kivi_cache import SMALL, Setting, check_feeding_order, check_reorder, check_rows_are_independent
from test_quant_utils import check_constant_groups, check_error_bound, check_packed_layout

from modules import block_pool, codecs, quant_utils
from modules.kivi_cache import CacheScheme, KIVILatentLayer


def patch_quant(monkeypatch, name: str, broken) -> None:
    monkeypatch.setattr(quant_utils, name, broken)


# ---- scale of a constant group


def constant_scale_is_one(monkeypatch):
    quantize = quant_utils.quantize

    def broken(*args):
        codes, scale, zero_point = quantize(*args)
        return codes, torch.where(scale == 0, 1.0, scale).to(scale.dtype), zero_point

    patch_quant(monkeypatch, "quantize", broken)


def constant_scale_is_a_small_number(monkeypatch):
    """The usual guard against a division by zero."""
    quantize = quant_utils.quantize

    def broken(*args):
        codes, scale, zero_point = quantize(*args)
        return codes, scale.clamp(min=1e-5), zero_point

    patch_quant(monkeypatch, "quantize", broken)


def constant_scale_divides_by_zero(monkeypatch):
    quantize = quant_utils.quantize

    def broken(*args):
        codes, scale, zero_point = quantize(*args)
        return codes, torch.where(scale == 0, scale / scale, scale), zero_point

    patch_quant(monkeypatch, "quantize", broken)


def constant_group_takes_the_highest_code(monkeypatch):
    quantize = quant_utils.quantize

    def broken(x, n_bits, widths, *args):
        codes, scale, zero_point = quantize(x, n_bits, widths, *args)
        constant = quant_utils.expand_groups(scale, widths) == 0
        scale = torch.where(scale == 0, 1.0, scale).to(scale.dtype)
        return torch.where(constant, 2**n_bits - 1, codes), scale, zero_point

    patch_quant(monkeypatch, "quantize", broken)


def constant_group_loses_its_zero_point(monkeypatch):
    quantize = quant_utils.quantize

    def broken(*args):
        codes, scale, zero_point = quantize(*args)
        return codes, scale, torch.where(scale == 0, 0.0, zero_point).to(zero_point.dtype)

    patch_quant(monkeypatch, "quantize", broken)


# ---- rounding


def parameters_are_rounded_to_nearest(monkeypatch):
    monkeypatch.setattr(quant_utils, "_round_directed", lambda x, dtype, up: x.to(dtype))


def parameters_are_rounded_the_wrong_way(monkeypatch):
    rounded = quant_utils._round_directed
    monkeypatch.setattr(quant_utils, "_round_directed", lambda x, dtype, up: rounded(x, dtype, up=not up))


# ---- order of the packed elements


def reorder_elements(monkeypatch, reorder, restore) -> None:
    """Pack and unpack in another order, so that a round trip notices nothing."""
    pack, unpack = quant_utils.pack_codes, quant_utils.unpack_codes
    patch_quant(monkeypatch, "pack_codes", lambda codes, n_bits: reorder(pack(codes, n_bits), n_bits))
    patch_quant(
        monkeypatch,
        "unpack_codes",
        lambda packed, n_bits, length: unpack(restore(packed, n_bits), n_bits, length),
    )


def elements_start_at_the_highest_bit(monkeypatch):
    def swap_ends(packed, n_bits):
        bits = 2 if n_bits == 3 else n_bits
        swapped = torch.zeros_like(packed)
        for shift in range(0, 32, bits):
            swapped |= (packed >> shift & (2**bits - 1)) << (32 - bits - shift)
        return swapped

    reorder_elements(monkeypatch, swap_ends, swap_ends)


def words_are_in_reverse(monkeypatch):
    def flip(packed, n_bits):
        return packed.flip(-2)

    reorder_elements(monkeypatch, flip, flip)


def channels_are_in_reverse(monkeypatch):
    def flip(packed, n_bits):
        return packed.flip(-1)

    reorder_elements(monkeypatch, flip, flip)


def tokens_are_unpacked_in_reverse(monkeypatch):
    """Packing as documented, reading not."""
    unpack = quant_utils.unpack_codes
    patch_quant(monkeypatch, "unpack_codes", lambda *args: unpack(*args).flip(-2))


# ---- pads


def pads_are_stored(monkeypatch):
    append = KIVILatentLayer.append
    monkeypatch.setattr(KIVILatentLayer, "append", lambda self, keys, values, real=None: append(self, keys, values))


def the_last_pad_is_stored(monkeypatch):
    append = KIVILatentLayer.append

    def broken(self, keys, values, real=None):
        if real is not None and not real.all():
            row, column = (~real).nonzero()[-1].tolist()
            real = real.clone()
            real[row, column] = True
        append(self, keys, values, real)

    monkeypatch.setattr(KIVILatentLayer, "append", broken)


# ---- reorder


def reorder_forgets_the_packed_part(monkeypatch):
    def broken(self, indices):
        self.rows = [
            replace(self.rows[source], blocks=own.blocks, counts=own.counts)
            for own, source in zip(self.rows, indices, strict=True)
        ]
        self._exact = {name: exact[indices] for name, exact in self._exact.items()}
        self._table = None

    monkeypatch.setattr(KIVILatentLayer, "_select", broken)


def reorder_forgets_the_exact_part(monkeypatch):
    select = KIVILatentLayer._select

    def broken(self, indices):
        exact = self._exact
        select(self, indices)
        self._exact = exact

    monkeypatch.setattr(KIVILatentLayer, "_select", broken)


def reorder_forgets_the_table(monkeypatch):
    select = KIVILatentLayer._select

    def broken(self, indices):
        table = self.block_table()
        select(self, indices)
        self._table = table

    monkeypatch.setattr(KIVILatentLayer, "_select", broken)


def reorder_forgets_to_count_references(monkeypatch):
    monkeypatch.setattr(block_pool.BlockPool, "release", lambda self, slots: None)


# ---- blocks


def blocks_leave_the_window_early(monkeypatch):
    monkeypatch.setattr(
        CacheScheme,
        "flushed_blocks",
        lambda self, window: max(0, (window - self.residual_length + 1) // self.block_length),
    )


def sides_are_swapped(monkeypatch):
    """Keys per token, values per channel."""

    def swapped(scheme, *args):
        other = "per_token" if scheme.per_channel else "per_channel"
        return codecs.make_codec(replace(scheme, orientation=other), *args)

    monkeypatch.setattr("modules.kivi_cache.make_codec", swapped)


CACHE = Setting(3, 2, 20, 5, 4)
CHECKS = {
    "constant groups": lambda: check_constant_groups(2, torch.float32),
    "error bound": lambda: check_error_bound("gaussian", torch.float32, 8, 16, True),
    "layout, 2 bits": lambda: check_packed_layout(2, 100, 3),
    "layout, 3 bits": lambda: check_packed_layout(3, 100, 3),
    "rows": lambda: check_rows_are_independent(SMALL[0]),
    "reorder": lambda: check_reorder(SMALL[0]),
    "reorder, 16 bits": lambda: check_reorder(SMALL[3]),
    "cache": lambda: check_feeding_order(CACHE),
}
MUTATIONS = [
    (constant_scale_is_one, "constant groups"),
    (constant_scale_is_a_small_number, "constant groups"),
    (constant_scale_divides_by_zero, "constant groups"),
    (constant_scale_divides_by_zero, "cache"),
    (constant_group_takes_the_highest_code, "constant groups"),
    (constant_group_takes_the_highest_code, "cache"),
    (constant_group_loses_its_zero_point, "constant groups"),
    (constant_group_loses_its_zero_point, "cache"),
    (parameters_are_rounded_to_nearest, "error bound"),
    (parameters_are_rounded_to_nearest, "cache"),
    (parameters_are_rounded_the_wrong_way, "error bound"),
    (elements_start_at_the_highest_bit, "layout, 2 bits"),
    (elements_start_at_the_highest_bit, "layout, 3 bits"),
    (words_are_in_reverse, "layout, 2 bits"),
    (words_are_in_reverse, "layout, 3 bits"),
    (channels_are_in_reverse, "layout, 2 bits"),
    (tokens_are_unpacked_in_reverse, "layout, 2 bits"),
    (tokens_are_unpacked_in_reverse, "cache"),
    (pads_are_stored, "rows"),
    (the_last_pad_is_stored, "rows"),
    (reorder_forgets_the_packed_part, "reorder"),
    (reorder_forgets_the_packed_part, "reorder, 16 bits"),
    (reorder_forgets_the_exact_part, "reorder"),
    (reorder_forgets_the_table, "reorder"),
    (reorder_forgets_to_count_references, "reorder"),
    (blocks_leave_the_window_early, "cache"),
    (sides_are_swapped, "cache"),
]


@pytest.mark.parametrize("check", CHECKS)
def test_the_check_passes_on_the_code_as_it_is(check):
    CHECKS[check]()


@pytest.mark.parametrize("mutate, check", MUTATIONS, ids=lambda x: getattr(x, "__name__", x))
def test_the_check_fails_on_broken_code(mutate, check, monkeypatch):
    mutate(monkeypatch)
    noticed = {
        reorder_forgets_the_table: IndexError,  # a stale table may point beyond a pool that was trimmed
        constant_scale_divides_by_zero: ValueError,  # the cache refuses a scale that is no number
    }
    with pytest.raises((AssertionError, noticed.get(mutate, AssertionError))):
        CHECKS[check]()
