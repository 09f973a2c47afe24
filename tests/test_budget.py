"""From a budget to a checkpoint, end to end on a random model: sizes, determinism, interruptions, refusals."""

import hashlib
import json
import random
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from configuration_alrd_llama import ALRDLlamaConfig
from modeling_alrd_llama import ALRDLlamaForCausalLM
from modules.fit import budget as fit
from modules.fit import statistics
from scripts import calibrate_svd_ranks as script
from scripts.calibrate_svd_ranks import CalibrationConfig, main
from scripts.common import ROOT, load_model
from tests.helpers import save_byte_tokenizer, tiny_dense

TINY = {"vocab_size": 300, "num_hidden_layers": 2, "num_key_value_heads": 4, "head_dim": 8, "hidden_size": 64}
TOKENS = 512
#: Two sides of two layers of four heads of eight, 16 bits.
DENSE = 2 * 2 * 4 * 8 * 2 * TOKENS
PROJECTIONS = [f"model.layers.{i}.self_attn.{p}" for i in range(2) for p in ("k_proj", "v_proj")]


def save_model(path: Path, dtype=torch.float32, **fields) -> str:
    """A random dense Llama and a byte-level tokenizer."""
    tiny_dense(dtype=dtype, **TINY | {"bos_token_id": 0} | fields).save_pretrained(path)
    save_byte_tokenizer(path)
    return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with models, texts, and the statistics that the tests share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("budget")
    save_model(path / "dense")
    save_model(path / "bfloat16", torch.bfloat16, attention_bias=True)
    save_model(path / "small vocabulary", vocab_size=100)
    words = random.Random(0)
    text = " ".join("".join(words.choices("etaoinshrdlu", k=words.randint(2, 9))) for _ in range(500))
    (path / "text.txt").write_text(text)
    (path / "constant.txt").write_text("a" * 3000)
    (path / "short.txt").write_text("too short " * 30)
    torch.set_num_threads(threads)
    return path


@pytest.fixture
def pictures():
    """For tests that want the pictures drawn, which takes a second."""


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    if "pictures" not in request.fixturenames:
        for name in ("spectra", "widths", "curve"):
            monkeypatch.setattr(script.plots, name, lambda *args: None)


def settings(place: Path, output: Path, **fields) -> CalibrationConfig:
    how = {
        "model": str(place / "dense"),
        "output": str(output),
        "tokens": TOKENS,
        "text": str(place / "text.txt"),
        "windows": 4,
        "length": 140,
        "batch_size": 2,
        "group_size": 32,
        "statistics": str(place / "statistics"),
        "keep_dense": False,
        "probe": True,
    }
    if not {"budget", "share", "sweep"} & set(fields):
        how["budget"] = 0.15
    return CalibrationConfig(**how | fields)


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@torch.no_grad()
def check_checkpoint(folder: Path, report: dict, budget: float, least: float = 0.9) -> ALRDLlamaForCausalLM:
    """The checkpoint loads, and a cache of `TOKENS` tokens takes the bytes that were planned, within the budget."""
    model = ALRDLlamaForCausalLM.from_pretrained(folder).eval()
    assert report["nbytes"] <= budget * DENSE
    assert report["nbytes"] >= least * budget * DENSE
    ids = torch.randint(1, 257, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    cache = model.create_kivi_cache()
    model(ids[:, :-7], past_key_values=cache)
    for i in range(TOKENS - 7, TOKENS):
        model(ids[:, i : i + 1], past_key_values=cache)
    assert cache.row_tokens() == [TOKENS]
    assert cache.nbytes_used == report["nbytes"]
    assert all(layer.pool.used for layer in cache.layers)
    generated = model.generate(ids[:, :50], max_new_tokens=60, min_new_tokens=60, do_sample=False)
    assert generated.shape == (1, 110)
    assert json.loads((folder / "report.json").read_text()) == report
    assert model.config.truncation_ranks == report["truncation_ranks"]
    assert model.config.width_tiers == report["width_tiers"]
    return model


# ---- budgets


def test_a_budget_gives_a_checkpoint_report_and_pictures(place, tmp_path, capsys, pictures):
    report = main(settings(place, tmp_path, budget=0.2, group_size=None))
    model = check_checkpoint(tmp_path, report, 0.2)
    assert report["config"]["budget"] == report["budget"] == 0.2
    assert report["share_of_dense"] == report["nbytes"] / DENSE
    assert {"environment", "seconds"} <= report.keys() and report["text"]["documents"] == 1
    assert list(report["truncation_ranks"]) == list(report["width_tiers"]) == list(report["rates"]) == PROJECTIONS
    assert report["predicted_divergence"] > 0 and min(report["rates"].values()) > 0
    for name in PROJECTIONS:
        ((energy,), (kept,)) = report["energies"][name], report["energy_kept"][name]
        assert len(energy) == 32 and sorted(energy, reverse=True) == energy
        assert 0 < kept <= 1
        ((rank,), (tiers,)) = report["truncation_ranks"][name], report["width_tiers"][name]
        assert sum(n for n, _ in tiers) == rank
        assert [b for _, b in tiers] == sorted({b for _, b in tiers}, reverse=True)
    for picture in ("spectra.png", "widths.png"):
        data = (tmp_path / picture).read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 5000
    # Its defaults: static scales on both sides, nothing rotated, a window of 16.
    c = model.config
    assert c.k_scheme == c.v_scheme == {"orientation": "per_channel", "static": True}
    assert (c.k_hadamard, c.v_hadamard, c.residual_length, c.sink_length) == (False, False, 16, 4)
    assert c.group_size in (32, 64, 128)
    tokenizer = load_model(str(tmp_path))[1]
    assert tokenizer("abc")["input_ids"] == load_model(str(place / "dense"))[1]("abc")["input_ids"]
    assert f"{report['nbytes']:,} bytes at {TOKENS} tokens" in capsys.readouterr().out


def test_a_scale_for_each_token(place, tmp_path):
    """The byte of a token is paid for, and the cache has it."""
    report = main(settings(place, tmp_path, budget=0.2, group_size=None, token_scale=True, head_group_size=2))
    model = check_checkpoint(tmp_path, report, 0.2)
    assert model.config.k_scheme == {"orientation": "per_channel", "static": True, "token_scale": True}
    assert model.config.v_scheme == model.config.k_scheme
    assert report["predicted_divergence"] > 0


def test_a_larger_budget_is_better(place, tmp_path):
    reports = [main(settings(place, tmp_path / str(b), budget=b)) for b in (0.1, 0.3)]
    divergences = [r["predicted_divergence"] for r in reports]
    assert divergences == sorted(divergences, reverse=True) and divergences[1] < 0.5 * divergences[0]
    assert reports[0]["nbytes"] < reports[1]["nbytes"]


def test_scales_are_those_of_the_latents(place, tmp_path):
    """A calibrated grid covers what its channel holds on the text: little is clipped, no level is far outside."""
    main(settings(place, tmp_path, budget=0.4))
    model, tokenizer = load_model(str(tmp_path))
    ids = torch.tensor([tokenizer((place / "text.txt").read_text())["input_ids"][:500]])
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True, use_cache=False).hidden_states[0]
    layer = model.model.layers[0]
    for p in ("k_proj", "v_proj"):
        projection = getattr(layer.self_attn, p)
        latents = projection.BLinear(layer.input_layernorm(hidden))[0, 4:].detach()
        (tiers,) = model.config.width_tiers[f"model.layers.0.self_attn.{p}"]
        bits = torch.cat([torch.full((n,), b) for n, b in tiers])
        zero, scale = projection.latent_zero_point, projection.latent_scale
        top = zero + scale * torch.where(bits == 1, 2, 2**bits - 1)
        step = scale * torch.where(bits == 1, 2, 1)
        outside = ((latents < zero - step) | (latents > top + step)).float().mean()
        assert outside < 0.05
        back = ((latents - zero) / step + 0.5).floor().clamp(min=0).minimum(2**bits - 1) * step + zero
        error = (back - latents).square().mean(0) / latents.var(0)
        assert (error[bits == 1] < 0.7).all()
        assert (error[bits >= 3] < 0.15).all()


VARIANTS = {
    "mean split": {"k_mean_split": True, "v_mean_split": True},
    "one head": {"head_group_size": 1, "budget": 0.3},
    "two heads, mean split": {"head_group_size": 2, "budget": 0.2, "k_mean_split": True},
    "mse keys, values per channel": {
        "k_scheme": '{"range_method": "mse"}',
        "v_scheme": '{"orientation": "per_channel"}',
        "budget": 0.45,
    },
    "mse keys, values per token": {
        "k_scheme": '{"range_method": "mse"}',
        "v_scheme": '{"orientation": "per_token"}',
        "budget": 0.45,
    },
    "static keys, values per token": {"v_scheme": '{"orientation": "per_token", "range_method": "mse"}', "budget": 0.4},
    "tiers wider than a token's group": {
        "k_scheme": '{"orientation": "per_token", "group_size": 4}',
        "v_scheme": '{"orientation": "per_token", "group_size": 4}',
        "budget": 0.6,
    },
    "default blocks, values per token": {
        "v_scheme": '{"orientation": "per_token"}',
        "group_size": None,
        "residual_length": 5,
        "budget": 0.6,
    },
    "blocks of 64, other window": {"group_size": 64, "residual_length": 40, "sink_length": 1, "budget": 0.3},
    "no probe": {"probe": False},
    "objective input": {"objective": "input"},
    "bfloat16 with biases": {"model": "bfloat16"},
    "water-filling": {"allocation": "water_filling", "budget": 0.3, "rank_multiple": 1},
    "water-filling, wider": {
        "allocation": "water_filling",
        "budget": 0.4,
        "k_bits": 4,
        "v_bits": 3,
        "residual_length": 8,
        "rank_multiple": 2,
        "head_group_size": 2,
    },
}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_variants(place, tmp_path, fields):
    fields = {"budget": 0.15} | fields
    fields["model"] = str(place / fields.get("model", "dense"))
    config = settings(place, tmp_path, **fields)
    report = main(config)
    model = check_checkpoint(tmp_path, report, config.budget, 0.85)
    c = model.config
    assert model.dtype == (torch.bfloat16 if "bfloat16" in fields["model"] else torch.float32)
    assert (c.k_mean_split, c.v_mean_split) == (config.k_mean_split, config.v_mean_split)
    groups = 4 // (config.head_group_size or 4)
    assert {len(ranks) for ranks in c.truncation_ranks.values()} == {groups} == {c.num_head_groups}
    assert set(c.width_tiers) == (set(PROJECTIONS) if config.tiered else set())
    for side in ("k", "v"):
        scheme = getattr(c, f"{side}_scheme") or {}
        asked = json.loads(getattr(config, f"{side}_scheme") or "null")
        if asked is not None:
            assert scheme == asked
        # With tiers, a rotation only where the channels of a token share a scale.
        per_token = scheme.get("orientation", "per_channel" if side == "k" else "per_token") == "per_token"
        assert getattr(c, f"{side}_hadamard") == (per_token or not config.tiered)
        for i in range(2):
            projection = getattr(model.model.layers[i].self_attn, f"{side}_proj")
            assert (projection.latent_scale is not None) == scheme.get("static", False)
    if config.group_size is not None:
        assert c.group_size == config.group_size
    assert (set(report["rates"]) == set(PROJECTIONS)) == (config.tiered and config.probe)


@pytest.mark.parametrize(("objective", "probed"), [("fisher", False), ("input", True)])
def test_the_probe_is_for_errors_without_a_unit(place, tmp_path, objective, probed):
    """By default it runs unless the objective is in the unit of the divergence already."""
    report = main(settings(place, tmp_path, probe=None, objective=objective))
    assert set(report["rates"]) == (set(PROJECTIONS) if probed else set())
    assert set(report["seconds"]) >= {"statistics", "allocation"} and ("probe" in report["seconds"]) == probed


def test_the_mean_is_in_one_channel(place, tmp_path):
    """Of the channels that are kept, one carries the mean over the text; the others average to nothing."""
    main(settings(place, tmp_path, budget=0.4, k_mean_split=True))
    model, tokenizer = load_model(str(tmp_path))
    tokens = tokenizer((place / "text.txt").read_text())["input_ids"]
    windows = torch.tensor(tokens[: len(tokens) // 140 * 140]).view(-1, 140)
    windows = windows[torch.linspace(0, len(windows) - 1, 4).round().long()]
    with torch.no_grad():
        hidden = model(windows, output_hidden_states=True, use_cache=False).hidden_states[0]
        attention = model.model.layers[0].self_attn
        x = model.model.layers[0].input_layernorm(hidden).flatten(0, 1)
    keys, values = (p.BLinear(x).detach() for p in (attention.k_proj, attention.v_proj))
    shares = [(z.mean(0).square() / z.square().mean(0)).sort(descending=True)[0] for z in (keys, values)]
    assert shares[0][0] > 0.02 and shares[0][1:].max() < 1e-3
    assert shares[1][1] > 1e-3


def test_shares_still_work(place, tmp_path):
    report = main(settings(place, tmp_path, share=0.5, rank_multiple=1))
    assert report["budget"] is None and report["width_tiers"] == {}
    assert sum(sum(ranks) for ranks in report["truncation_ranks"].values()) == 64
    model = ALRDLlamaForCausalLM.from_pretrained(tmp_path)
    assert model.config.truncation_ranks == report["truncation_ranks"]
    assert (model.config.k_hadamard, model.config.residual_length) == (True, 32)


def test_constant_text(place, tmp_path):
    """All tokens alike: the covariance has rank one, nothing varies."""
    how = {"text": str(place / "constant.txt"), "budget": 0.3, "k_mean_split": True, "head_group_size": 2}
    report = main(settings(place, tmp_path, **how))
    model = check_checkpoint(tmp_path, report, 0.3, 0)
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_split_model_is_the_one_that_is_loaded(place, tmp_path, dtype):
    """To the frequencies of RoPE, which are float32 in a bfloat16 model too."""
    config = settings(place, tmp_path, model=str(place / "bfloat16"), dtype=dtype, objective="input", probe=False)
    calibration = script.calibrate_model(config)
    made = fit.fit_budget(config, calibration, 0.15).split()
    made.save_pretrained(tmp_path)
    loaded = ALRDLlamaForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(1, 257, (1, 200))
    assert made.dtype == loaded.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(made(ids).logits, loaded(ids).logits)


# ---- without the script


def own_config(place: Path, **fields) -> fit.FitConfig:
    how = {"tokens": TOKENS, "batch_size": 2, "group_size": 32, "keep_dense": False, "statistics": str(place / "own")}
    return fit.FitConfig(**how | fields)


def calibrate_loaded(config: fit.FitConfig, place: Path, *tokens, **how) -> fit.Calibration:
    """The calibration of a model that is loaded already, on windows that are tokens already."""
    dense = AutoModelForCausalLM.from_pretrained(place / "bfloat16", dtype=torch.float32, **how)
    return fit.calibrate(config, dense, ALRDLlamaConfig.from_pretrained(place / "bfloat16"), *tokens)


def test_a_loaded_model_and_tokens_give_what_the_command_writes(place, tmp_path):
    main(settings(place, tmp_path, model=str(place / "bfloat16"), budget=0.2))
    tokenizer, text = load_model(str(place / "bfloat16"))[1], (place / "text.txt").read_text()
    tokens = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    windows = torch.tensor(tokens[: len(tokens) // 140 * 140]).view(-1, 140)
    chosen = windows[torch.linspace(0, len(windows) - 1, 4).round().long()]
    calibration = calibrate_loaded(own_config(place), place, chosen, windows[[0, -1]])
    assert list(calibration.rates) == PROJECTIONS
    fitted = fit.fit_budget(own_config(place), calibration, 0.2)
    fitted.split().save_pretrained(tmp_path / "own")
    assert digest(tmp_path / "own") == digest(tmp_path)
    assert (tmp_path / "own" / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()


def test_a_loaded_model_needs_tokens_of_a_text(place):
    windows = torch.ones(2, 100, dtype=torch.int64)
    for given, fields, message in (
        (None, {}, "tokens=None: must be given"),
        (None, {"share": 0.5}, "tokens=None: must be given"),
        (windows, {}, "length=100: windows must hold the sinks and 128 tokens"),
        (windows, {"allocation": "best"}, "allocation='best': must be one of"),
        (windows, {"batch_size": 0}, "batch_size=0: must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate_loaded(own_config(place, **fields), place, given)
    needs_none = own_config(place, share=0.5, objective="weight")
    assert calibrate_loaded(needs_none, place).target.truncation_ranks


@pytest.mark.parametrize("objective", ["fisher", "query_output"])
def test_an_offloaded_model(place, tmp_path, objective):
    """Weights on disk and in memory give the bytes of a model that is all there, layer by layer."""
    windows = torch.randint(1, 257, (4, 140), generator=torch.Generator().manual_seed(0))
    places = dict.fromkeys(("model.embed_tokens", "model.layers.1", "lm_head"), "disk")
    places |= dict.fromkeys(("model.layers.0", "model.norm", "model.rotary_emb"), "cpu")
    states = []
    for name, how in (("whole", {}), ("offloaded", {"device_map": places, "offload_folder": str(tmp_path)})):
        config = own_config(place, statistics=str(tmp_path / name), objective=objective)
        calibration = calibrate_loaded(config, place, windows, windows[:2], **how)
        on_disk = {parameter.is_meta for parameter in calibration.dense.parameters()}
        assert on_disk == ({True, False} if how else {False})
        assert calibration.dense.model.layers[1].self_attn.k_proj.weight.is_meta == bool(how)
        states.append(fit.fit_budget(config, calibration, 0.2).split().state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())
    names = [sorted(file.name for file in (tmp_path / name).iterdir()) for name in ("whole", "offloaded")]
    assert names[0] == names[1]


@pytest.mark.parametrize("allocation", ["fisher", "sensitivity"])
def test_searches_that_change_weights_need_them_in_memory(place, tmp_path, allocation):
    places = {"model": "cpu", "lm_head": "disk"}
    config = own_config(place, allocation=allocation)
    how = {"device_map": places, "offload_folder": str(tmp_path)}
    calibration = calibrate_loaded(config, place, torch.ones(2, 140, dtype=torch.int64), **how)
    with pytest.raises(ValueError, match=f"allocation='{allocation}': must have the whole model in memory"):
        fit.fit_budget(config, calibration, 0.3)


def test_the_configuration_of_a_split_model_is_refused(place):
    split = ALRDLlamaConfig.from_pretrained(place / "dense", truncation_ranks={PROJECTIONS[0]: 4})
    with pytest.raises(ValueError, match="source: must be the configuration of a dense model, is split already"):
        fit.split_config(fit.FitConfig(), split)


# ---- the same again


def test_a_seed_decides_every_byte(place, tmp_path):
    digests = []
    for i, seed in enumerate((0, 0, 1)):
        own = {"statistics": str(tmp_path / f"statistics{i}"), "seed": seed}
        main(settings(place, tmp_path / str(i), **own))
        digests.append(digest(tmp_path / str(i)))
        torch.manual_seed(17)  # somebody else's random numbers
        torch.randn(100)
    assert digests[0] == digests[1] != digests[2]
    first, other = (load_file(tmp_path / i / "model.safetensors") for i in "02")
    assert torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def with_large_sinks(register):
    """`register_forward_hook` whose hooks see the first four tokens' outputs of linear layers times 1,024.

    A power of two, so that what flows on is divided by it again and has the bits that it had.
    """

    def register_magnified(module, hook, **how):
        def magnified(module, inputs, output):
            scale = torch.ones(output.shape[1], 1)
            scale[:4] = 1024
            seen = output * scale
            changed = hook(module, inputs, seen)
            return (seen if changed is None else changed) / scale

        return register(module, magnified if isinstance(module, torch.nn.Linear) else hook, **how)

    return register_magnified


@pytest.mark.parametrize(
    "fields",
    [
        {"k_mean_split": True},
        {"objective": "query_output_rope"},
        {"allocation": "water_filling", "budget": 0.4},
    ],
    ids=["tiers", "queries", "ranks"],
)
def test_sinks_take_no_part(place, tmp_path, monkeypatch, fields):
    """The observed outputs of the first tokens are a thousand times as large, and nothing that is written changes."""
    written = []
    for name in ("plain", "large"):
        if name == "large":
            register = with_large_sinks(torch.nn.Module.register_forward_hook)
            monkeypatch.setattr(torch.nn.Module, "register_forward_hook", register)
        config = settings(place, tmp_path / name, statistics=str(tmp_path / f"{name} statistics"), **fields)
        report = main(config)
        del report["config"], report["seconds"]
        files = [*(tmp_path / f"{name} statistics").iterdir(), *(tmp_path / name).glob("model*")]
        written.append((report, {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}))
    assert written[0][0] == written[1][0]
    # Statistics and their record, rates and costs where there are some, the model.
    assert written[0][1] == written[1][1] and len(written[0][1]) >= 3


class Clock:
    """`time` in which a minute and a half passes between two looks at it."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 90.0
        return self.now


class Interruption(Exception):
    """What breaks a run off."""


def interrupt_after(calls: int, function, seen: list):
    """The function, which breaks down when it is called once more than `calls` times."""

    def wrapped(*args, **kwargs):
        if len(seen) == calls:
            raise Interruption
        seen.append(args)
        return function(*args, **kwargs)

    return wrapped


def test_an_interrupted_statistics_pass_goes_on(place, tmp_path, monkeypatch):
    main(settings(place, tmp_path / "whole", batch_size=1, statistics=str(tmp_path / "s1")))
    config = settings(place, tmp_path / "again", batch_size=1, statistics=str(tmp_path / "s2"))
    seen, run = [], statistics._run
    with monkeypatch.context() as patch:
        patch.setattr(statistics, "time", Clock())
        patch.setattr(statistics, "_run", interrupt_after(3, run, seen))
        with pytest.raises(Interruption):
            main(config)
    assert not (tmp_path / "again").exists()
    seen.clear()
    monkeypatch.setattr(statistics, "_run", interrupt_after(1, run, seen))
    main(config)
    assert len(seen) == 1
    assert digest(tmp_path / "again") == digest(tmp_path / "whole")


def test_an_interrupted_probe_goes_on(place, tmp_path, monkeypatch):
    main(settings(place, tmp_path / "whole", statistics=str(tmp_path / "s1")))
    config = settings(place, tmp_path / "again", statistics=str(tmp_path / "s2"))
    write, seen = fit.write_json, []

    def write_rates(path, record):
        write(path, record)
        if str(path).endswith(".rates.json"):
            seen.append(len(record["rates"]))
            if seen == [1, 2]:
                raise Interruption

    monkeypatch.setattr(fit, "write_json", write_rates)
    with pytest.raises(Interruption):
        main(config)
    assert not (tmp_path / "again").exists()
    assert main(config)["rates"] == json.loads((tmp_path / "whole" / "report.json").read_text())["rates"]
    assert seen == [1, 2, 3, 4]
    assert digest(tmp_path / "again") == digest(tmp_path / "whole")
    main(config)
    assert seen == [1, 2, 3, 4]


def test_rates_are_kept_by_all_that_they_depend_on(place, tmp_path):
    own = {"statistics": str(tmp_path / "statistics")}
    for i, fields in enumerate(
        ({}, {"budget": 0.3}, {"k_mean_split": True}, {"objective": "input"}, {"head_group_size": 2, "budget": 0.2})
    ):
        main(settings(place, tmp_path / str(i), **own | fields))
    # A budget changes nothing that is measured; the others do.
    assert len(list((tmp_path / "statistics").glob("*.rates.json"))) == 4
    # The pass over the text is one for all, but for the objective that needs no gradients.
    passes = [p for p in (tmp_path / "statistics").glob("*.safetensors") if ".costs" not in p.name]
    assert len(passes) == 2


def test_costs_are_kept_by_all_that_they_depend_on(place, tmp_path):
    """A run that finds what another has left writes what it writes without it."""
    shared, alone = ({"statistics": str(tmp_path / name)} for name in ("shared", "alone"))
    fields = {"budget": 0.5, "probe": False, "objective": "input"}
    for size in (8, 16):
        fields["k_scheme"] = json.dumps({"group_size": size})
        main(settings(place, tmp_path / f"shared{size}", **fields, **shared))
    main(settings(place, tmp_path / "alone16", **fields, **alone))
    assert digest(tmp_path / "shared16") == digest(tmp_path / "alone16") != digest(tmp_path / "shared8")
    reports = [json.loads((tmp_path / n / "report.json").read_text()) for n in ("shared16", "alone16")]
    assert reports[0]["predicted_divergence"] == reports[1]["predicted_divergence"]


def test_interrupted_measurements_of_costs_go_on(place, tmp_path, monkeypatch):
    own = {"probe": False, "objective": "input", "head_group_size": 2, "budget": 0.2}
    main(settings(place, tmp_path / "whole", **own, statistics=str(tmp_path / "s1")))
    config = settings(place, tmp_path / "again", **own, statistics=str(tmp_path / "s2"))
    measure, seen = fit.measure_costs, []
    with monkeypatch.context() as patch:
        patch.setattr(fit, "measure_costs", interrupt_after(5, measure, seen))
        with pytest.raises(Interruption):
            main(config)
    assert not (tmp_path / "again").exists()
    main(config)
    assert digest(tmp_path / "again") == digest(tmp_path / "whole")


# ---- sweeps


SMALL_EVALUATION = {"windows": 1, "length": 600, "prefill": 560, "chunk": 8}


def test_a_sweep(place, tmp_path, monkeypatch, pictures):
    evaluation = SMALL_EVALUATION | {"text": str(place / "text.txt")}
    monkeypatch.setattr(script, "measure_sweep", partial(script.measure_sweep, **evaluation))
    for name in ("spectra", "widths"):
        monkeypatch.setattr(script.plots, name, lambda *args: None)
    drawn, curve = [], script.plots.curve
    monkeypatch.setattr(script.plots, "curve", lambda lines, path: drawn.extend(lines) or curve(lines, path))
    peers = str(ROOT / "scripts" / "results" / "peers.json")
    record = main(settings(place, tmp_path, sweep=[0.3, 0.15], peers=peers))
    assert drawn[0] == "ours" and "recorded: QuantizedCache, hqq" in drawn and "recorded: ours" not in drawn
    assert json.loads((tmp_path / "sweep.json").read_text()) == record
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["0.15", "0.3"]
    assert len(record["results"]) == 3 and "dense" in record["results"]
    for budget in (0.3, 0.15):
        report = json.loads((tmp_path / f"{budget}" / "report.json").read_text())
        check_checkpoint(tmp_path / f"{budget}", report, budget)
        # As if it had been made by itself.
        main(settings(place, tmp_path / "alone" / str(budget), budget=budget))
        assert digest(tmp_path / "alone" / str(budget)) == digest(tmp_path / str(budget))


def test_a_sweep_with_a_budget_that_cannot_be_met_writes_nothing(place, tmp_path):
    with pytest.raises(ValueError, match=r"budget=0\.001 of 131,072 bytes at 512 tokens: budget: 131 bytes must be"):
        main(settings(place, tmp_path / "sweep", sweep=[0.3, 0.001]))
    assert not (tmp_path / "sweep").exists()


def test_blocks_that_a_budget_cannot_pay_are_left_out(place, tmp_path):
    """The window of a block of 128 alone would take more than this; that of a block of 32 does not."""
    report = main(settings(place, tmp_path, budget=0.01, group_size=None))
    assert check_checkpoint(tmp_path, report, 0.01, 0.8).config.group_size == 32


# ---- refusals


BAD_OPTIONS = {
    "scales of tokens at one width": (
        {"budget": 0.1, "allocation": "uniform", "token_scale": True},
        r"token_scale=True: must go with allocation='tiers'",
    ),
    "a trellis at one width": (
        {"budget": 0.1, "allocation": "uniform", "code": "trellis"},
        r"code='trellis': must go with allocation='tiers'",
    ),
    "no size": ({}, r"budget, share, sweep: exactly one must be given, got none"),
    "two sizes": ({"budget": 0.1, "share": 0.5}, r"exactly one must be given, got budget, share"),
    "budget and sweep": ({"budget": 0.1, "sweep": [0.1]}, r"exactly one must be given, got budget, sweep"),
    "share and sweep": ({"share": 0.1, "sweep": [0.1]}, r"exactly one must be given, got share, sweep"),
    "budget of nothing": ({"budget": 0.0}, r"budget=0\.0: must be above 0 and at most 1"),
    "budget beyond the dense cache": ({"budget": 1.1}, r"budget=1\.1: must be above 0 and at most 1"),
    "a bad budget of a sweep": ({"sweep": [0.1, -0.1]}, r"budget=-0\.1: must be above 0"),
    "allocation": ({"budget": 0.1, "allocation": "best"}, r"allocation='best': must be one of .*tiers.*water_filling"),
}


@pytest.mark.parametrize(("fields", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options(fields, message):
    with pytest.raises(ValueError, match=message):
        CalibrationConfig(**fields)


#: Options, and what the message must say.
REFUSALS = {
    "budget that cannot be met": (
        {"budget": 0.005, "group_size": None},
        r"budget=0\.005 of 131,072 bytes at 512 tokens: budget: 655 bytes must be at least [\d,]+, what block tables",
    ),
    "budget that ranks cannot meet": (
        {"budget": 0.05, "allocation": "water_filling"},
        r"budget=0\.05 of 131,072 bytes at 512 tokens: budget: 6,553 bytes must hold the smallest ranks",
    ),
    "text too short": ({"text": "short.txt"}, r"windows=4: '.*short\.txt' has only 2 windows of 140 tokens"),
    "tokenizer of another model": (
        {"model": "small vocabulary"},
        r"model='.*small vocabulary': its tokenizer has 257 tokens, its embedding only 100",
    ),
    "no such model": ({"model": "nowhere"}, r"model='.*nowhere': must be an existing folder"),
    "windows without a sample": ({"length": 100}, r"length=100: .*sinks and 128"),
    "blocks longer than the sample": ({"group_size": 512}, r"group_size=512: must"),
    "objective": ({"objective": "best"}, r"objective='best': must be one of"),
    "head groups": ({"head_group_size": 3}, r"head_group_size=3: must divide"),
    "a scheme that is not JSON": ({"k_scheme": "{static"}, r"k_scheme='\{static': must be JSON"),
    "a scheme that does not go with tiers": ({"k_scheme": '{"rotation": true}'}, r"tiers: .*rotation"),
    "static scales without tiers": (
        {"allocation": "water_filling", "k_scheme": '{"orientation": "per_channel", "static": true}'},
        r"k_scheme.*static",
    ),
    "scales of tokens without static ones": (
        {"token_scale": True, "v_scheme": '{"orientation": "per_token"}'},
        r"v_scheme.*token_scale=True: must go with static=True",
    ),
    "a trellis without static scales": (
        {"code": "trellis", "v_scheme": '{"orientation": "per_token"}'},
        r"v_scheme.*code='trellis': must go with static=True",
    ),
    "scales of tokens of one side": (
        {"k_scheme": '{"orientation": "per_channel", "static": true, "token_scale": true}'},
        r"k_scheme, v_scheme: token_scale=True must be given as token_scale=True of the fit",
    ),
    "static scales for a share": (
        {"share": 0.5, "v_scheme": '{"orientation": "per_channel", "static": true}'},
        r"v_scheme.*static",
    ),
}


@pytest.mark.parametrize(("fields", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refused_before_anything_is_written(place, tmp_path, fields, message):
    fields = dict(fields)
    for name in ("model", "text"):
        if name in fields:
            fields[name] = str(place / fields[name])
    with pytest.raises(ValueError, match=message):
        main(settings(place, tmp_path / "output", **fields))
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("fields", [{"objective": "best"}, {"length": 100}, {"group_size": 512}], ids=str)
def test_options_are_checked_before_the_long_work(place, tmp_path, fields, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("ran the model")

    monkeypatch.setattr(fit, "collect_statistics", never)
    with pytest.raises(ValueError, match=next(iter(fields))):
        main(settings(place, tmp_path / "output", **fields))


def test_a_split_checkpoint_is_not_split_again(place, tmp_path):
    main(settings(place, tmp_path / "first"))
    before = digest(tmp_path / "first")
    with pytest.raises(ValueError, match=r"model='.*first': must be a dense checkpoint, is split already"):
        main(settings(place, tmp_path / "second", model=str(tmp_path / "first")))
    assert not (tmp_path / "second").exists() and digest(tmp_path / "first") == before


def test_the_smallest_budget_is_accepted(place, tmp_path):
    """The refusal says which one; a byte less is refused."""
    with pytest.raises(ValueError) as error:
        main(settings(place, tmp_path / "none", budget=0.005))
    smallest = int(str(error.value).split("at least ")[1].split(", what")[0].replace(",", ""))
    report = main(settings(place, tmp_path / "some", budget=smallest / DENSE))
    check_checkpoint(tmp_path / "some", report, smallest / DENSE, 1)
    assert report["truncation_ranks"] == {name: [1] for name in PROJECTIONS}
    with pytest.raises(ValueError, match=f"must be at least {smallest:,}"):
        main(settings(place, tmp_path / "none", budget=(smallest - 1) / DENSE))
    assert not (tmp_path / "none").exists()
