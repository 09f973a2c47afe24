"""The checks of the other tests, called on code that is broken on purpose: each must notice."""

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import test_codecs
import test_token_scores
import test_vidkv
import torch
from test_kivi_cache import SMALL, Setting, check_feeding_order, check_reorder, check_rows_are_independent
from test_quant_utils import check_constant_groups, check_error_bound, check_packed_layout

import modeling_alrd_llama
from configuration_alrd_llama import QuantScheme
from modules import hadamard_utils, quant_utils
from modules.cache import codecs, growing
from modules.cache import pool as block_pool
from modules.formats import vidkv
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


def break_selection(monkeypatch, broken) -> None:
    """Have `broken(layer, edit, indices)` called where a layer takes other rows by `edit`."""
    selection = KIVILatentLayer.selection

    def breaking(self, indices):
        indices = indices.tolist() if isinstance(indices, torch.Tensor) else indices
        edit = selection(self, indices)
        return lambda: broken(self, edit, indices)

    monkeypatch.setattr(KIVILatentLayer, "selection", breaking)


def reorder_forgets_the_packed_part(monkeypatch):
    def broken(layer, edit, indices):
        layer.rows = [
            layer.rows[source]._replace(blocks=own.blocks, counts=own.counts)
            for own, source in zip(layer.rows, indices, strict=True)
        ]
        layer.exact = layer.exact.map(lambda tensor: tensor[indices])
        layer._table = None

    break_selection(monkeypatch, broken)


def reorder_forgets_the_exact_part(monkeypatch):
    def broken(layer, edit, indices):
        exact = layer.exact
        edit()
        layer.exact = exact

    break_selection(monkeypatch, broken)


def reorder_forgets_the_table(monkeypatch):
    def broken(layer, edit, indices):
        layer.block_table()
        table = layer._table
        edit()
        layer._table = table

    break_selection(monkeypatch, broken)


def the_pool_forgets_rows(monkeypatch):
    monkeypatch.setattr(KIVILatentLayer, "block_slots", lambda self: self.rows[0].blocks)


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

    monkeypatch.setattr("modules.cache.scheme.make_codec", swapped)


# ---- widths below two bits, ranges, signs


def ternary_digits_are_in_reverse(monkeypatch):
    """The least significant first, in both directions."""

    def flip(codes):
        return codes.unflatten(-2, (-1, 5)).flip(-2).flatten(-3, -2)

    pack, unpack = quant_utils._pack_ternary, quant_utils._unpack_ternary
    patch_quant(monkeypatch, "_pack_ternary", lambda codes: pack(flip(codes)))
    patch_quant(monkeypatch, "_unpack_ternary", lambda words: flip(unpack(words)))


def one_bit_takes_the_largest_magnitude(monkeypatch):
    quantize = quant_utils.quantize

    def broken(x, n_bits, widths, *args):
        codes, scale, zero_point = quantize(x, n_bits, widths, *args)
        largest = torch.stack([group.abs().amax(-1) for group in x.split(widths, -1)], -1)
        return codes, largest.to(scale.dtype), zero_point

    patch_quant(monkeypatch, "quantize", broken)


def the_range_is_never_clipped(monkeypatch):
    monkeypatch.setattr(quant_utils, "RATIOS", (1.0,))
    monkeypatch.setattr(quant_utils, "REFITS", 0)


def the_clipped_range_is_not_refitted(monkeypatch):
    monkeypatch.setattr(quant_utils, "REFITS", 0)


def symmetric_codes_are_shifted(monkeypatch):
    grid = quant_utils.grid
    monkeypatch.setattr(quant_utils, "grid", lambda n_bits: grid(n_bits)._replace(offset=grid(n_bits).offset + 1))


def one_bit_is_zero_or_the_scale(monkeypatch):
    """As VidKV's released code has it."""
    grid = vidkv.grid
    monkeypatch.setattr(vidkv, "grid", lambda n_bits: grid(n_bits)._replace(offset=0))


# ---- whole blocks


def groups_of_a_block_share_a_scale(monkeypatch):
    monkeypatch.setattr(codecs, "group_widths", lambda length, group_size: (length,))


def the_narrowest_channels_get_two_bits(monkeypatch):
    ranges = codecs._channel_ranges
    monkeypatch.setattr(codecs, "_channel_ranges", lambda states: -ranges(states))


def nothing_is_rotated(monkeypatch):
    monkeypatch.setattr(codecs, "rotate", lambda x: x)
    monkeypatch.setattr(codecs, "rotate_back", lambda x: x)


def the_rotation_has_no_signs(monkeypatch):
    monkeypatch.setattr(hadamard_utils, "_signs", lambda n, device: torch.ones(n, device=device))


def bits_of_a_mask_are_in_reverse(monkeypatch):
    pack, unpack = codecs._pack_mask, codecs._unpack_mask

    def mirrored(packed):
        return sum((packed >> i & 1) << (7 - i) for i in range(8)).to(torch.uint8)

    monkeypatch.setattr(codecs, "_pack_mask", lambda mask: mirrored(pack(mask)))
    monkeypatch.setattr(codecs, "_unpack_mask", lambda packed, length: unpack(mirrored(packed), length))


def the_least_worthy_tokens_are_protected(monkeypatch):
    encode = codecs.ProtectedTokenCodec.encode

    def broken(self, states, score=None):
        return encode(self, states, None if score is None else -score)

    monkeypatch.setattr(codecs.ProtectedTokenCodec, "encode", broken)


def scores_are_not_used(monkeypatch):
    encode = block_pool.BlockPool.encode
    monkeypatch.setattr(block_pool.BlockPool, "encode", lambda self, states, score=None: encode(self, states))


def scores_stay_when_rows_move(monkeypatch):
    def broken(layer, edit, indices):
        score = layer.exact.window.get("score")
        edit()
        if score is not None:
            layer.exact.window["score"] = score

    break_selection(monkeypatch, broken)


def queries_of_pads_count(monkeypatch):
    received = modeling_alrd_llama.attention_received

    def broken(query, cache, real, length):
        return received(query, cache, None, length)

    monkeypatch.setattr(modeling_alrd_llama, "attention_received", broken)


def attention_is_not_added_up(monkeypatch):
    scores = growing.score_tokens

    def broken(layer, *args):
        layer.exact.window["score"] = torch.zeros_like(layer.exact.window["score"])
        return scores(layer, *args)

    monkeypatch.setattr(growing, "score_tokens", broken)


def a_refused_append_keeps_its_scores(monkeypatch):
    scores = growing.score_tokens

    def broken(layer, states, real, received):
        kept = layer.exact.window["score"]
        new = scores(layer, states, real, received)
        kept.copy_(layer.exact.window["score"])
        return new

    monkeypatch.setattr(growing, "score_tokens", broken)


def check_attention() -> None:
    with tempfile.TemporaryDirectory() as directory:
        test_token_scores.test_attention_is_that_of_a_stock_llama(Path(directory), 4, "sdpa")


CACHE = Setting(3, 2, 20, 5, 4)
PROTECTED = QuantScheme(1.58, "per_channel", 20, protected=0.2, protected_bits=4)
SCORED = test_codecs.Case(PROTECTED, QuantScheme(2, group_size=20), scored=True)
CHECKS = {
    "constant groups": lambda: check_constant_groups(2, torch.float32),
    "error bound": lambda: check_error_bound("gaussian", torch.float32, 8, 16, True),
    "layout, 2 bits": lambda: check_packed_layout(2, 100, 3),
    "layout, 3 bits": lambda: check_packed_layout(3, 100, 3),
    "rows": lambda: check_rows_are_independent(SMALL[0]),
    "reorder": lambda: check_reorder(SMALL[0]),
    "reorder, 16 bits": lambda: check_reorder(SMALL[3]),
    "cache": lambda: check_feeding_order(CACHE),
    "layout, ternary": lambda: check_packed_layout(1.58, 100, 3),
    "one bit": lambda: test_codecs.test_one_bit_is_the_mean_magnitude("per_channel", torch.float32),
    "clipped": test_codecs.test_the_clipped_range_is_near_the_best_one,
    "symmetric": lambda: test_codecs.test_symmetric_codes_are_signed_integers_times_scale(3),
    "one bit of VidKV": test_vidkv.test_one_bit_is_plus_and_minus_the_scale_and_ternary_is_scaled,
    "block": lambda: test_codecs.check_stored_block(QuantScheme(2, group_size=20)),
    "rotated block": lambda: test_codecs.check_stored_block(QuantScheme(3, "per_token", 8, rotation=True)),
    "protected block": lambda: test_codecs.check_stored_block(PROTECTED),
    "mixed channels": lambda: test_codecs.test_mixed_channels_keep_the_widest_at_two_bits((13, 7)),
    "rotation": lambda: test_codecs.test_rotation_is_the_product_with_the_matrix(24),
    "protected tokens": lambda: test_codecs.test_protected_tokens_are_those_of_the_highest_score(0.2, 128),
    "scored cache": lambda: test_codecs.check_case(SCORED),
    "scores": test_token_scores.test_scores_follow_their_rows_and_cost_four_bytes,
    "refused scores": lambda: test_token_scores.test_a_refused_append_keeps_the_attention_received(True),
    "attention": check_attention,
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
    (the_pool_forgets_rows, "reorder"),
    (blocks_leave_the_window_early, "cache"),
    (sides_are_swapped, "cache"),
    (ternary_digits_are_in_reverse, "layout, ternary"),
    (one_bit_takes_the_largest_magnitude, "one bit"),
    (the_range_is_never_clipped, "clipped"),
    (the_clipped_range_is_not_refitted, "clipped"),
    (symmetric_codes_are_shifted, "symmetric"),
    (one_bit_is_zero_or_the_scale, "one bit of VidKV"),
    (groups_of_a_block_share_a_scale, "block"),
    (the_narrowest_channels_get_two_bits, "mixed channels"),
    (nothing_is_rotated, "mixed channels"),
    (nothing_is_rotated, "rotated block"),
    (the_rotation_has_no_signs, "rotation"),
    (the_rotation_has_no_signs, "rotated block"),
    (bits_of_a_mask_are_in_reverse, "protected block"),
    (the_least_worthy_tokens_are_protected, "protected tokens"),
    (scores_are_not_used, "scored cache"),
    (scores_stay_when_rows_move, "scores"),
    (queries_of_pads_count, "attention"),
    (attention_is_not_added_up, "attention"),
    (a_refused_append_keeps_its_scores, "refused scores"),
]


@pytest.mark.parametrize("check", CHECKS)
def test_the_check_passes_on_the_code_as_it_is(check):
    CHECKS[check]()


@pytest.mark.parametrize("mutate, check", MUTATIONS, ids=lambda x: getattr(x, "__name__", x))
def test_the_check_fails_on_broken_code(mutate, check, monkeypatch):
    monkeypatch.setenv("ALRD_BACKEND", "reference")  # what is broken here
    mutate(monkeypatch)
    noticed = {
        reorder_forgets_the_table: IndexError,  # a stale table may point beyond a pool that was trimmed
        the_pool_forgets_rows: KeyError,  # blocks that are still referred to have moved nowhere
        constant_scale_divides_by_zero: ValueError,  # the cache refuses a scale that is no number
    }
    with pytest.raises((AssertionError, noticed.get(mutate, AssertionError))):
        CHECKS[check]()
