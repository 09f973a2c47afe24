"""Calibration of blocks: factors, bytes, sinks, the fitted expansion, the predicted divergence, the report."""

import itertools
import json
import random
import re
import string
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import Qwen2Config

from configuration_alrd_llama import ALRDLlamaConfig, QuantScheme
from modeling_alrd_llama import ALRDLlamaForCausalLM
from modules.fit import budget as fit
from modules.fit.allocation import refit_scales, static_scales
from modules.fit.expansion import expansion_gains, predicted_divergence, restored_latents
from modules.fit.objectives import block_factors
from modules.fit.statistics import LayerStatistics, ProjectionStatistics, member_samples
from scripts import calibrate_svd_ranks as script
from scripts import decode_bound
from scripts.calibrate_svd_ranks import CalibrationConfig, main
from scripts.common import load_model, parse_config
from scripts.sources import draw_windows, load_sources
from tests.helpers import save_byte_tokenizer, tiny_dense
from tests.test_budget import with_large_sinks

#: Two key/value heads of 8 in four layers: groups of three leave a short one.
TINY = {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "head_dim": 8}
TOKENS, LAYERS, OUTPUTS = 256, 4, 16

#: Layers of a group, keys and values together, heads of a head group.
SHAPES = list(itertools.product([1, 3], [False, True], [None, 1]))

pytestmark = pytest.mark.usefixtures("one_thread")


def shape_fields(shape) -> dict:
    return dict(zip(("layer_group_size", "joint_kv", "head_group_size"), shape, strict=True))


def config_of(**fields) -> ALRDLlamaConfig:
    return ALRDLlamaConfig(vocab_size=97, keep_dense=True, **TINY | fields)


def random_metric(n: int) -> torch.Tensor:
    """Fisher information of full rank, of very different eigenvalues."""
    directions = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    return directions @ torch.diag(torch.logspace(0, -3, n, dtype=torch.float64)) @ directions.T


def statistics_of(outputs: dict[tuple[int, str], torch.Tensor]) -> list[LayerStatistics]:
    """Statistics with these outputs `[windows, S, n]` by layer and side, and metrics of their own."""
    layers = []
    for i in range(len(outputs) // 2):
        sides = []
        for side in "kv":
            y = outputs[i, side]
            flat, n = y.flatten(0, 1).double(), y.shape[-1]
            gradient = torch.randn(y.shape).bfloat16()
            found = ProjectionStatistics(flat.T @ flat / len(flat), flat.mean(0), random_metric(n), y, gradient)
            sides.append(found)
        layers.append(LayerStatistics(*sides, torch.eye(n, dtype=torch.float64)))
    return layers


def random_outputs(layers: int = LAYERS, tokens: int = 128, n: int = OUTPUTS) -> dict:
    """Outputs with a mean and channels of different size, all independent of each other."""
    outputs = {}
    for key in itertools.product(range(layers), "kv"):
        outputs[key] = torch.randn(8, tokens, n) * torch.logspace(0.5, -0.5, n) + torch.randn(n)
    return outputs


@pytest.fixture(scope="module")
def dense():
    return tiny_dense(**TINY)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(1, 97, (8, 132), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the statistics, which are the same for all shapes."""
    return str(tmp_path_factory.mktemp("statistics"))


def fit_config(folder: str, shape=(3, True, None), **fields) -> fit.FitConfig:
    how = {"tokens": TOKENS, "group_size": 32, "statistics": folder, "keep_dense": True} | shape_fields(shape)
    return fit.FitConfig(**how | fields)


def calibrated(config: fit.FitConfig, dense, tokens: torch.Tensor) -> fit.Calibration:
    return fit.calibrate(config, dense, ALRDLlamaConfig.from_llama(dense.config), tokens)


# Factors


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factors_of_full_rank_rebuild_any_outputs(shape):
    """Of tokens that were not sampled, too, and the projected sample has channels of unit variance."""
    config, found = config_of(**shape_fields(shape)), statistics_of(random_outputs())
    factors = block_factors(config, found)
    assert list(factors) == [block.name for block in config.blocks()]
    for block in config.blocks():
        samples = member_samples(found, block, config.num_head_groups)
        for group, sample in zip(factors[block.name], samples, strict=True):
            assert group.a.shape == (config.full_rank(block),) * 2
            y = torch.randn(20, config.full_rank(block)).double()
            assert torch.allclose(y @ group.project.T @ group.a.T, y, atol=1e-9)
            latents = sample.flatten(0, 1).double() @ group.project.T
            # No channel is a function of the others.
            moments = latents.T @ latents / len(latents)
            assert torch.allclose(moments, torch.eye(len(moments), dtype=torch.float64), atol=1e-6)
            # An error of one standard deviation costs what dropping the channel does.
            assert (group.energy.diff() <= 0).all() and torch.allclose(group.unit, group.energy)


def test_the_error_of_a_latent_counts_what_the_metrics_of_the_members_say():
    config, found = config_of(layer_group_size=2, joint_kv=True), statistics_of(random_outputs())
    for block in config.blocks():
        (group,) = block_factors(config, found)[block.name]
        error = torch.randn(len(group.a)).double()
        cost = 0.0
        for projection, delta in zip(block.members(), (group.a @ error).split(OUTPUTS), strict=True):
            fisher = getattr(found[projection.layer], projection.attribute).fisher
            cost += (delta @ fisher @ delta).item() / 2
        assert (group.unit * error.square()).sum().item() == pytest.approx(cost, rel=1e-6)


def test_energies_of_a_block_are_those_of_its_members():
    """However many share a latent: directions change, not the sum over them."""
    found, totals = statistics_of(random_outputs()), []
    for shape in itertools.product([1, 2, 4], [False, True], [None]):
        factors = block_factors(config_of(**shape_fields(shape)), found)
        totals.append(sum(group.energy.sum().item() for groups in factors.values() for group in groups))
    assert totals == pytest.approx([totals[0]] * len(totals), rel=1e-9)


@pytest.mark.parametrize("planted", ["values from keys", "layers alike"])
def test_shared_structure_is_found(planted):
    """The channels of one member hold what two members know."""
    outputs = random_outputs()
    for layer in range(LAYERS):
        if planted == "values from keys":
            outputs[layer, "v"] = outputs[layer, "k"] @ torch.randn(OUTPUTS, OUTPUTS) + 3
        elif layer % 2:
            outputs[layer, "k"], outputs[layer, "v"] = outputs[layer - 1, "k"], outputs[layer - 1, "v"]
    found, kept = statistics_of(outputs), {}
    for layer_group_size, joint_kv in itertools.product([1, 2], [False, True]):
        config = config_of(layer_group_size=layer_group_size, joint_kv=joint_kv)
        members = len(config.blocks()[0].members())
        shares = []
        for (group,) in block_factors(config, found).values():
            leading = len(group.energy) // max(2, members)
            shares.append((group.energy[:leading].sum() / group.energy.sum()).item())
        kept[layer_group_size, joint_kv] = min(shares)
    shared = (1, True) if planted == "values from keys" else (2, False)
    other = (2, False) if planted == "values from keys" else (1, True)
    # One member's channels of two members' are enough where the two know the same, and only there.
    assert kept[shared] > 1 - 1e-9 and kept[other] < 0.999


def test_a_head_that_costs_nothing(folder, tokens, tmp_path):
    """A head that the output projection does not read has no Fisher information, and gets the least there is."""
    pruned = tiny_dense(**TINY)
    with torch.no_grad():
        for layer in pruned.model.layers:
            layer.self_attn.o_proj.weight[:, 2 * 8 :] = 0
    for shape in [(3, True, None), (3, True, 1)]:
        config = fit_config(str(tmp_path), shape)
        calibration = calibrated(config, pruned, tokens)
        fisher = calibration.statistics[1].v_proj.fisher
        assert (fisher[8:] == 0).all() and (fisher[:8, :8] != 0).any()
        for groups in calibration.factors.values():
            assert all(torch.isfinite(x).all() for group in groups for x in (group.a, group.project, group.energy))
        fitted = fit.fit_budget(config, calibration, 0.3)
        assert torch.isfinite(fitted.split()(tokens[:1]).logits).all()
        if shape[-1] == 1:
            for name, ranks in fitted.target.truncation_ranks.items():
                assert ranks[1] == 1 < ranks[0]
                assert torch.equal(fitted.plan.gains[name][1], torch.ones_like(fitted.plan.gains[name][1]))


def test_no_information_at_all():
    """A layer whose members cost nothing has factors all the same."""
    config, found = config_of(layer_group_size=1, joint_kv=True), statistics_of(random_outputs())
    for side in (found[0].k_proj, found[0].v_proj):
        side.fisher.zero_()
    (group,) = block_factors(config, found)["model.layers.0.self_attn.kv_latent"]
    y = torch.randn(5, 2 * OUTPUTS).double()
    assert torch.allclose(y @ group.project.T @ group.a.T, y, atol=1e-9)
    assert (group.energy == 0).all() and (group.unit == 0).all()


def test_selected_channels_take_their_units_along():
    config, found = config_of(joint_kv=True), statistics_of(random_outputs())
    (group,) = block_factors(config, found)["model.layers.0.self_attn.kv_latent"]
    channels = torch.tensor([5, 0, 9])
    chosen = group.select(channels)
    assert torch.equal(chosen.unit, group.unit[channels]) and torch.equal(chosen.a, group.a[:, channels])


# Bytes


@torch.no_grad()
@pytest.mark.parametrize(
    "fields", [{"token_scale": False}, {"token_scale": True}, {"token_scale": True, "code": "trellis"}], ids=str
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_planned_are_those_of_the_cache(folder, dense, tokens, shape, fields):
    config = fit_config(folder, shape, **fields)
    fitted = fit.fit_budget(config, calibrated(config, dense, tokens), 0.3)
    limit = 0.3 * fit.dense_nbytes(fitted.target, TOKENS, torch.float16)
    assert 0.9 * limit < fitted.plan.nbytes <= limit
    model, ids = fitted.split().eval(), torch.randint(1, 97, (1, TOKENS))
    cache = model.create_kivi_cache()
    model(ids[:, :-3], past_key_values=cache)
    for i in range(TOKENS - 3, TOKENS):
        model(ids[:, i : i + 1], past_key_values=cache)
    assert cache.row_tokens() == [TOKENS] and cache.nbytes_used == fitted.plan.nbytes
    # Groups of three leave a block of one layer.
    assert len(cache.layers) == fitted.target.num_cache_layers == -(-LAYERS // shape[0])


# Multiply-adds


def test_multiply_adds_by_hand():
    """Per channel of a head group: its members' keys, and a value for each query head that reads it."""
    name = "model.layers.{}.self_attn.{}".format
    costs = fit.rebuild_costs(config_of(layer_group_size=3, joint_kv=True))
    # Keys of 16 outputs and 4 query heads in each layer, over four layers.
    assert costs == {name(0, "kv_latent"): 3 * (16 + 4) / 4, name(3, "kv_latent"): (16 + 4) / 4}
    costs = fit.rebuild_costs(config_of(layer_group_size=2, head_group_size=1))
    halves = {"k_latent": 2 * 8 / 4, "v_latent": 2 * 2 / 4}
    assert costs == {name(i, side): cost for i in (0, 2) for side, cost in halves.items()}
    costs = fit.rebuild_costs(ALRDLlamaConfig(vocab_size=97, **TINY))
    assert costs[name(0, "k_proj")] == 16 / 4 and costs[name(3, "v_proj")] == 4 / 4


def multiply_adds(fitted: fit.Calibration) -> float:
    ranks = fitted.target.truncation_ranks
    return sum(cost * sum(ranks[name]) for name, cost in fit.rebuild_costs(fitted.target).items())


@pytest.mark.parametrize("shape", [(3, True, None), (3, False, 1)], ids=str)
def test_a_bound_on_multiply_adds(folder, dense, tokens, shape):
    config = fit_config(folder, shape)
    calibration = calibrated(config, dense, tokens)
    free = fit.fit_budget(config, calibration, 0.4)
    before, previous = multiply_adds(free), free.plan.divergence
    for share in (1.0, 0.8, 0.5):
        bounded = fit_config(folder, shape, max_rebuild=int(share * before) + 1)
        fitted = fit.fit_budget(bounded, calibration, 0.4)
        assert multiply_adds(fitted) <= bounded.max_rebuild
        assert multiply_adds(fitted) > 0.8 * bounded.max_rebuild
        assert fitted.plan.nbytes <= 0.4 * fit.dense_nbytes(fitted.target, TOKENS, torch.float16)
        # The bytes go into widths; fewer channels cost more all the same.
        if share == 1.0:
            assert fitted.target.width_tiers == free.target.width_tiers
        else:
            assert fitted.plan.divergence > previous
        previous = fitted.plan.divergence


def test_a_bound_that_cannot_be_met(folder, dense, tokens):
    config = fit_config(folder, max_rebuild=1)
    calibration = calibrated(config, dense, tokens)
    with pytest.raises(
        ValueError, match=r"budget=0\.4 of .*: max_rebuild=1: must be at least \d+ multiply-adds"
    ) as error:
        fit.fit_budget(config, calibration, 0.4)
    least = int(re.search(r"at least (\d+)", str(error.value))[1])
    # One channel in each block.
    assert least == sum(fit.rebuild_costs(calibration.target).values()) == 20
    fitted = fit.fit_budget(fit_config(folder, max_rebuild=least), calibration, 0.4)
    assert set(map(tuple, fitted.target.truncation_ranks.values())) == {(1,)}


def timed_by_line(monkeypatch, start: float = 20.0, slope: float = 1 / 50) -> None:
    """A machine whose step takes a line of the multiply-adds."""
    monkeypatch.setattr(decode_bound, "step_ms", lambda model, tokens: start + slope * fit.multiply_adds(model.config))


def test_a_bound_on_the_time_of_a_step(folder, dense, tokens, monkeypatch):
    timed_by_line(monkeypatch)
    config = fit_config(folder, (3, True, None))
    calibration = calibrated(config, dense, tokens)
    free = fit.multiply_adds(fit.fit_budget(config, calibration, 0.4).target)
    of = partial(decode_bound.fit_in_time, config, calibration, 0.4, tokens=64, device="cpu")
    for share in (1.0, 0.7, 0.4):
        limit = 20.0 + share * free / 50
        fitted = of(limit)
        tried, macs = fitted.decode["tried"], fit.multiply_adds(fitted.target)
        assert dict(tried)[macs] == fitted.decode["ms"] and 0.8 * limit < fitted.decode["ms"] <= limit
        assert (len(tried) == 1) == (share == 1)
    with pytest.raises(ValueError, match=r"decode_ms=15: must be at least 20\.\d, the fastest step"):
        of(15)


def test_a_bound_takes_fewer_layers_first(folder, dense, tokens, monkeypatch):
    timed_by_line(monkeypatch)
    config = fit_config(folder, (None, True, None))
    calibration = calibrated(replace(config, layer_group_size=3), dense, tokens)
    free = {}
    for layers in (3, 2, 1):
        free[layers] = fit.multiply_adds(fit.fit_budget(config, fit.regroup(calibration, layers), 0.4).target)
    assert free[3] > free[2] > free[1]
    of = partial(decode_bound.fit_in_time, config, calibration, 0.4, tokens=64, device="cpu")
    for layers in (3, 2, 1):
        fitted = of(20.0 + 1.01 * free[layers] / 50)
        assert fitted.target.layer_group_size == fitted.decode["layer_group_size"] == layers
        assert fit.multiply_adds(fitted.target) == free[layers] and len(fitted.decode["tried"]) == 4 - layers
        # As if this number of layers had been asked for.
        asked = fit.fit_budget(config, calibrated(replace(config, layer_group_size=layers), dense, tokens), 0.4)
        assert asked.target.to_dict() == fitted.target.to_dict()
    # Two layers of different windows share nothing.
    monkeypatch.setattr(decode_bound, "_may_share", lambda config, layers: layers != 2)
    assert of(20.0 + 1.01 * free[2] / 50).target.layer_group_size == 1
    # Below that, fewer channels of one layer each.
    fitted = of(20.0 + 0.8 * free[1] / 50)
    assert fitted.target.layer_group_size == 1 and 0 < fit.multiply_adds(fitted.target) < free[1]


def test_the_command_times_its_choice(place, tmp_path):
    how = {"decode_ms": 1e4, "decode_tokens": 200}
    report = main(command(place, tmp_path / "out", (3, True, None), **how))
    assert report["decode"]["limit_ms"] == 1e4 and report["decode"]["tokens"] == 200
    ((macs, ms),) = report["decode"]["tried"]
    assert macs == report["multiply_adds"] and 0 < ms < 1e4
    with pytest.raises(ValueError, match=r"decode_ms=1e-06: must be at least \d"):
        main(command(place, tmp_path / "none", (3, True, None), **how | {"decode_ms": 1e-6}))
    assert not (tmp_path / "none").exists()


# Sinks


def test_sinks_take_no_part(dense, tokens, tmp_path, monkeypatch):
    """What is seen of the first four tokens is a thousand times as large, and nothing changes unless it is counted."""
    written = {}
    for name in ("plain", "large"):
        if name == "large":
            register = with_large_sinks(torch.nn.Module.register_forward_hook)
            monkeypatch.setattr(torch.nn.Module, "register_forward_hook", register)
        for sinks in (4, 3):
            config = fit_config(str(tmp_path / f"{name}{sinks}"), sink_length=sinks, token_scale=True)
            fitted = fit.fit_budget(config, calibrated(config, dense, tokens), 0.3)
            tensors = []
            for block, (group,) in fitted.factors.items():
                (costs,) = next(iter(fitted.costs.values()))[block]
                tensors += [group.a, group.project, group.energy, costs.dropped, costs.kept, *costs.scales[0]]
                tensors += [*fitted.plan.channels[block], *fitted.plan.gains[block], *fitted.plan.scales[block][0]]
            written[name, sinks] = (tensors, fitted.plan.predicted, fitted.target.width_tiers)
    plain, large = written["plain", 4], written["large", 4]
    assert all(map(torch.equal, plain[0], large[0])) and len(plain[0]) == len(large[0]) == 2 * 11
    assert plain[1:] == large[1:]
    assert not torch.equal(written["plain", 3][0][0], written["large", 3][0][0])


# The fitted expansion


def planted(count: int = 4000, outputs: int = 12, rank: int = 5):
    """Columns, latents, their outputs and independent gradients."""
    a, latents = torch.randn(outputs, rank), torch.randn(count, rank) * torch.linspace(2, 0.5, rank)
    return a, latents, latents @ a.T, torch.randn(count, outputs)


def change(a, restored, outputs, gradient) -> float:
    return (gradient * (restored @ a.T - outputs)).sum(1).square().mean().item()


def test_gains_recover_what_each_tier_has_lost():
    a, latents, outputs, gradient = planted()
    lost = torch.tensor([0.9, 0.9, 0.9, 0.5, 0.5])
    found = expansion_gains(a, latents * lost, outputs, gradient, [3, 2])
    # The ridge is small, and draws them to one.
    assert torch.allclose(found, 1 / lost.double(), atol=0.02)
    assert len(found.unique()) == 2
    # Channels of one tier have one factor, between what each of them would ask for.
    (one,) = expansion_gains(a, latents * lost, outputs, gradient, [5]).unique().tolist()
    assert 1 / 0.9 - 0.01 < one < 2


def test_gains_without_gradients_or_latents_are_one():
    a, latents, outputs, gradient = planted(100)
    assert torch.equal(expansion_gains(a, latents, outputs, 0 * gradient, [3, 2]), torch.ones(5).double())
    assert torch.equal(expansion_gains(a, 0 * latents, outputs, gradient, [3, 2]), torch.ones(5).double())


@pytest.mark.parametrize("coherent", [False, True], ids=["independent", "along the latents"])
def test_gains_of_a_quantizer_of_least_squared_error(coherent):
    """It shrinks: where gradients lie along what it shrinks, on tokens not fitted too, undoing it is cheaper."""
    a, latents, outputs, gradient = planted(8000)
    if coherent:
        gradient = latents @ torch.linalg.pinv(a) + 0.1 * gradient
    scheme, tiers = QuantScheme(1, static=True, symmetric=False), [(5, 1)]
    factors = fit.Factors(a, torch.linalg.pinv(a).double(), torch.ones(5), torch.linalg.pinv(a).double(), 1.0)
    restored = restored_latents(factors, outputs[None], scheme, tiers, static_scales(latents, 1))
    assert restored.square().mean() < 0.8 * latents.square().mean()
    parts = [x.split(4000) for x in (restored, outputs, gradient)]
    gains = expansion_gains(a, *(part[0] for part in parts), [5]).float()
    held_out = [part[1] for part in parts]
    fitted, plain = change(a * gains, *held_out), change(a, *held_out)
    if coherent:
        assert (gains[:3] > 1.05).all() and fitted < 0.7 * plain
    else:
        # Least squared error is what independent gradients ask for.
        assert (gains - 1).abs().max() < 0.1 and fitted < 1.03 * plain


@pytest.mark.parametrize("token_scale", [False, True], ids=["steps", "token scale"])
def test_restored_latents_are_those_of_the_cache(token_scale):
    """The cost by `restored_latents` is the one that the refit measures."""
    config, found = config_of(joint_kv=True), statistics_of(random_outputs())
    name = "model.layers.0.self_attn.kv_latent"
    (group,), (sample,) = block_factors(config, found)[name], member_samples(found, config.part(name), 1)
    scheme = QuantScheme(2, static=True, symmetric=False, token_scale=token_scale)
    channels, tiers = torch.arange(12), [(4, 4), (8, 2)]
    if token_scale:
        scales, cost = refit_scales(group, sample, scheme, channels, tiers)
    else:
        latents = sample.flatten(0, 1) @ group.project.T.float()
        pieces = [torch.stack(static_scales(latents[:, :4], 4)), torch.stack(static_scales(latents[:, 4:12], 2))]
        scales, cost = tuple(torch.cat(pieces, dim=1)), None
    kept = group.select(channels)
    restored = restored_latents(kept, sample, scheme, tiers, scales)
    error = torch.zeros(len(restored), len(group.a)).double()
    error[:, :12] = restored
    error -= sample.flatten(0, 1).double() @ group.project.T
    mine = (group.unit * error.square().mean(0)).sum().item()
    if token_scale:
        assert mine == pytest.approx(cost, rel=1e-5)
    else:
        # Four bits lose 1.2%, two 12% of a Gaussian channel, and dropped channels all.
        expected = group.unit[:4].sum() * 0.0115 + group.unit[4:12].sum() * 0.119 + group.unit[12:].sum()
        assert mine == pytest.approx(expected.item(), rel=0.05)


# The predicted divergence


@pytest.mark.parametrize("length", [10, 64, 150])
def test_the_prediction_is_the_sum_over_runs(length):
    changes = torch.randn(3, length) + 0.3
    run, total, count = min(64, length), 0.0, 0
    for window in changes.tolist():
        for start in range(0, length - run + 1, run):
            total += sum(window[start : start + run]) ** 2
            count += run
    assert predicted_divergence(changes) == pytest.approx(total / count / 2, rel=1e-6)


def test_errors_of_one_sign_add_up():
    changes = torch.full((2, 128), 0.1)
    assert predicted_divergence(changes) == pytest.approx(64 * 0.01 / 2)
    signs = torch.tensor([1.0, -1.0]).repeat(64)
    assert predicted_divergence(changes * signs) == pytest.approx(0, abs=1e-12)


def test_a_plan_predicts_what_its_own_errors_do(folder, dense, tokens):
    """The sum over blocks, sides and layers of gradients times errors, written out."""
    config = fit_config(folder, (3, True, 1))
    fitted = fit.fit_budget(config, calibrated(config, dense, tokens), 0.3)
    states, changes = fitted.split().state_dict(), 0.0
    scheme = QuantScheme(2, static=True, symmetric=False, token_scale=True)
    for block in fitted.target.blocks():
        samples = member_samples(fitted.statistics, block, 2)
        for i, (group, sample) in enumerate(zip(fitted.factors[block.name], samples, strict=True)):
            tiers, scales = fitted.plan.tiers[block.name][i], fitted.plan.scales[block.name][i]
            kept = group.select(fitted.plan.channels[block.name][i])
            restored = restored_latents(kept, sample, scheme, tiers, scales)
            outputs = sample.flatten(0, 1).chunk(len(block.members()), dim=1)
            for projection, y in zip(block.members(), outputs, strict=True):
                # The weights that the model will expand with, gains included.
                prefix = f"model.layers.{projection.layer}.self_attn.{projection.side}"
                (name,) = [n for n in states if n.startswith(prefix) and n.endswith("ALinear.weight")]
                a = states[name][8 * i : 8 * (i + 1), : restored.shape[1]]
                found = getattr(fitted.statistics[projection.layer], projection.attribute)
                g = found.gradient.flatten(0, 1)[:, 8 * i : 8 * (i + 1)].float()
                changes = changes + (g * (restored @ a.T - y)).sum(1)
    total = changes.view(8, 2, 64).double().sum(2).square().mean().item() / 64 / 2
    assert fitted.plan.predicted == pytest.approx(total, rel=1e-3)


# The command


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a dense model and a text."""
    path = tmp_path_factory.mktemp("blocks")
    tiny_dense(**TINY | {"vocab_size": 300, "bos_token_id": 0}).save_pretrained(path / "dense")
    save_byte_tokenizer(path / "dense")
    (path / "text.txt").write_text("".join(random.Random(0).choices(string.printable[:94], k=64 * 390)))
    return path


def command(place, output, shape, **fields) -> CalibrationConfig:
    how = {"model": str(place / "dense"), "text": str(place / "text.txt"), "output": str(output), "windows": 4}
    how |= {"length": 388, "tokens": 512, "group_size": 32, "statistics": str(place / "statistics"), "budget": 0.3}
    return CalibrationConfig(**how | {"keep_dense": True} | shape_fields(shape) | fields)


@torch.no_grad()
def divergence_through_the_cache(model, dense, windows: torch.Tensor) -> float:
    """Mean KL divergence over all tokens behind the sinks, a token at a time."""
    reference, cache, steps = dense(windows).logits.log_softmax(-1), model.create_kivi_cache(), []
    for i in range(windows.shape[1]):
        steps.append(model(windows[:, i : i + 1], past_key_values=cache).logits)
    found = torch.cat(steps, dim=1).log_softmax(-1)
    assert cache.layers[0].pool.used
    return (reference.exp() * (reference - found)).sum(-1)[:, 4:].mean().item()


@pytest.mark.parametrize(
    ("shape", "token_scale"), [((3, True, None), False), ((1, True, 1), True), ((2, False, None), False)], ids=str
)
def test_the_checkpoint_diverges_as_predicted(place, tmp_path, shape, token_scale):
    """From 384 runs of 64 tokens: 0.92, 0.69 and 0.93 times as much, 1.5 to 1.6 times that of independent errors."""
    report = main(command(place, tmp_path, shape, windows=64, residual_length=0, token_scale=token_scale))
    model, (dense, tokenizer) = ALRDLlamaForCausalLM.from_pretrained(tmp_path).eval(), load_model(place / "dense")
    windows = draw_windows(load_sources([str(place / "text.txt")]), tokenizer, 388, 64)
    found = divergence_through_the_cache(model, dense, windows[::8])
    assert 0.5 < found / report["predicted_divergence"] < 1.5
    assert found > 1.3 * report["independent_divergence"]


def test_the_report_of_blocks(place, tmp_path, capsys):
    shape = (3, True, None)
    report = main(command(place, tmp_path, shape))
    model = ALRDLlamaForCausalLM.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert model.config.truncation_ranks == report["truncation_ranks"]
    names = [block.name for block in model.config.blocks()]
    assert list(report["energies"]) == list(report["energy_kept"]) == names == list(report["width_tiers"])
    assert all(0.5 < kept <= 1 for (kept,) in report["energy_kept"].values())
    assert 0 < report["independent_divergence"] != report["predicted_divergence"] > 0
    # Weights of the members' factors, and the biases of B and A; 4 bytes each.
    (three,), (one,) = report["truncation_ranks"].values()
    factors = sum(members * (2 * rank * OUTPUTS + rank + OUTPUTS) for members, rank in ((6, three), (2, one)))
    assert report["weights_nbytes"] - report["dense_weights_nbytes"] == 4 * factors
    assert report["dense_weights_nbytes"] == sum(p.nbytes for p in load_model(place / "dense")[0].parameters())
    assert report["multiply_adds"] == 20 / 4 * (3 * three + one)
    # From that length on everything together is smaller.
    for tokens, smaller in ((report["smaller_from"] - 128, False), (report["smaller_from"], True)):
        saved = 2 * LAYERS * OUTPUTS * 2 * tokens - fit.cache_nbytes(model.config, tokens, torch.float32)
        assert (saved > 4 * factors) == smaller
    printed, card = capsys.readouterr().out, (tmp_path / "README.md").read_text()
    for said in (
        f"{report['multiply_adds']:,.0f} multiply-adds per cached token and layer",
        "% more",
        f"from {report['smaller_from']:,} tokens",
    ):
        assert said in printed and said in card
    for picture in ("spectra.png", "widths.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_a_model_that_never_gets_smaller():
    """Ranks and widths that save nothing: there is no such length."""
    config = config_of(k_bits=16, v_bits=16)
    config.truncation_ranks = {block.name: [OUTPUTS] for block in config.blocks()}
    assert fit.break_even(config, 1000, 0, torch.float32) is None
    config.k_bits = config.v_bits = 2
    assert fit.break_even(config, 0, 10**9, torch.float32) == 0
    assert fit.break_even(config, 10**12, 0, torch.float32) is None


#: Options of the command, and what the message must say.
REFUSALS = {
    "a probe": ({"probe": True}, r"probe=True: must not go with keep_dense=True"),
    "another allocation": ({"allocation": "uniform"}, r"keep_dense=True: must go with allocation='tiers'"),
    "another objective": (
        {"objective": "input"},
        r"keep_dense=True: must go with allocation='tiers', objective='fisher'",
    ),
    "no multiply-adds": ({"max_rebuild": 0}, r"max_rebuild=0: must be above 0"),
    "no time": ({"decode_ms": 0.0}, r"decode_ms=0\.0: must be above 0"),
    "no tokens in a timed step": ({"decode_ms": 9.0, "decode_tokens": 0}, r"decode_tokens=0: must be above 0"),
    "time without blocks": ({"keep_dense": False, "decode_ms": 9.0}, r"decode_ms=9\.0: must go with keep_dense=True"),
    "a bound without blocks": ({"keep_dense": False, "max_rebuild": 5}, r"max_rebuild=5: must go with keep_dense=True"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refused_options(fields, message):
    with pytest.raises(ValueError, match=message):
        CalibrationConfig(**{"keep_dense": True, "budget": 0.1} | fields)


def test_a_layer_group_without_blocks_is_refused(place, tmp_path):
    with pytest.raises(ValueError, match=r"layer_group_size=3: must be 1 without keep_dense=True"):
        main(command(place, tmp_path, (3, False, None), keep_dense=False))


def test_rates_of_blocks_are_refused(folder, dense, tokens):
    source = ALRDLlamaConfig.from_llama(dense.config)
    with pytest.raises(ValueError, match="probe_tokens: must be None with keep_dense=True"):
        fit.calibrate(fit_config(folder), dense, source, tokens, tokens[:2])


def test_the_script_predicts_by_gradients(place, tmp_path):
    """Where no gradient is known, the errors count as independent."""
    config = command(place, tmp_path, (1, False, None), keep_dense=False, objective="input", probe=False)
    report = main(config)
    assert report["predicted_divergence"] == report["independent_divergence"] > 0
    assert script.blocks_summary(report | {"smaller_from": None}).endswith("is not smaller within 2^24 tokens.")


@pytest.mark.parametrize(
    ("fields", "blocks"),
    [
        ({}, True),
        ({"code": "trellis", "head_group_size": 1}, True),
        ({"share": 0.5}, False),
        ({"allocation": "uniform"}, False),
        ({"objective": "input"}, False),
        ({"k_mean_split": True}, False),
        ({"v_scheme": '{"range_method": "mse"}'}, False),
        ({"keep_dense": False}, False),
    ],
)
def test_a_budget_makes_blocks_unless_other_options_are_for_projections(fields, blocks):
    config = fit.FitConfig(**fields)
    assert (config.keep_dense, config.joint_kv) == (blocks, blocks)
    assert CalibrationConfig(budget=0.1, probe=True).keep_dense is False


def test_ample_budgets_have_one_layer_to_a_latent():
    assert CalibrationConfig(budget=0.25).layer_group_size == CalibrationConfig(sweep=[0.2, 0.5]).layer_group_size == 1
    assert CalibrationConfig(budget=0.25, layer_group_size=3).layer_group_size == 3
    for smaller in ({"budget": 0.125}, {"sweep": [0.25, 0.125]}, {"budget": 0.25, "keep_dense": False}):
        assert CalibrationConfig(**smaller).layer_group_size is None


def test_layers_of_a_block_follow_from_the_text(dense):
    """Ten sampled tokens for each output of a latent."""
    source = ALRDLlamaConfig.from_llama(dense.config)
    outputs = 2 * source.num_key_value_heads * source.head_dim  # of a layer's keys and values

    def layers(tokens: int, **fields) -> int:
        return fit.split_config(fit.FitConfig(**fields), source, tokens).layer_group_size

    assert [layers(10 * outputs * n) for n in (0, 1, 2, 3, 9)] == [1, 1, 2, 3, 3]
    assert layers(20 * outputs - 1) == 1 and layers(10 * outputs, joint_kv=False) == 2
    assert layers(10 * outputs, head_group_size=1) == min(3, source.num_key_value_heads)
    assert layers(0, layer_group_size=2) == 2 and layers(10**9, keep_dense=False) == 1


@pytest.mark.parametrize(("types", "layers"), [("ssssss", 3), ("sssfff", 3), ("ssffss", 2), ("ssfsss", 1)])
def test_layers_of_a_block_have_one_window(types, layers):
    names = {"s": "sliding_attention", "f": "full_attention"}
    config = Qwen2Config(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=6,
        layer_types=[names[letter] for letter in types],
        use_sliding_window=True,
        sliding_window=64,
    )
    source = ALRDLlamaConfig.from_llama(config)
    assert fit.split_config(fit.FitConfig(), source, 10**6).layer_group_size == layers


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", (True, True, True)),
        ("--keep_dense", (True, True, True)),
        ("--joint_kv", (True, True, True)),
        ("--keep_dense false", (False, False, False)),
        ("--joint_kv false", (True, False, True)),
        ("--token_scale false", (True, True, False)),
        ("--keep_dense --joint_kv false", (True, False, True)),
    ],
)
def test_switches_on_the_command_line(monkeypatch, given, expected):
    monkeypatch.setattr(sys, "argv", ["calibrate_svd_ranks.py", "--budget", "0.1", *given.split()])
    config = parse_config(CalibrationConfig, None)
    assert (config.keep_dense, config.joint_kv, config.token_scale) == expected
