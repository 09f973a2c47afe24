"""Calibration and evaluation end to end on the bundled model, small; and their refusals."""

import json

import pytest
import torch

from modeling_alrd_llama import ALRDLlamaForCausalLM
from modules.fit.objectives import OBJECTIVES
from modules.fit.rank_search import water_fill
from modules.fit.statistics import collect_statistics
from scripts.calibrate_svd_ranks import CalibrationConfig
from scripts.calibrate_svd_ranks import main as calibrate
from scripts.common import BUNDLED_MODEL, load_model
from scripts.corpus import describe, load_documents, split_of, stdlib_documents, tokenize_windows
from scripts.eval_perplexity import EvalConfig, parse_bits, scored_positions
from scripts.eval_perplexity import main as evaluate
from tests.helpers import tiny_dense

SMALL = {"windows": 2, "length": 320, "prefill": 270, "chunk": 1, "group_size": 16, "residual_length": 8}


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """The bundled model at half rank, and the report of its calibration."""
    folder = tmp_path_factory.mktemp("calibrated")
    # The `seeded` fixture of a test comes later: two threads on a busy core wait for each other.
    torch.set_num_threads(1)
    where = {"output": str(folder), "statistics": str(tmp_path_factory.mktemp("statistics"))}
    return folder, calibrate(CalibrationConfig(**where, share=0.5, windows=8, length=512, text="stdlib:calibration"))


def test_calibration_writes_an_ordinary_checkpoint(half):
    folder, report = half
    kept = [rank for ranks in report["truncation_ranks"].values() for rank in ranks]
    assert sum(kept) / (len(kept) * 256) == pytest.approx(0.5, abs=0.01)
    assert json.loads((folder / "report.json").read_text()) == report
    model, tokenizer = load_model(str(folder))
    assert isinstance(model, ALRDLlamaForCausalLM) and tokenizer.vocab_size == model.config.vocab_size
    assert model.config.truncation_ranks == report["truncation_ranks"]
    assert len({r for ranks in report["truncation_ranks"].values() for r in ranks}) > 1


def test_statistics_beat_the_plain_svd_through_the_cache(half, tmp_path):
    calibrate(
        CalibrationConfig(output=str(tmp_path / "plain"), share=0.5, objective="weight", text="stdlib:calibration")
    )
    found = {
        name: evaluate(EvalConfig(model=str(path), bits=["16"], **SMALL))["results"]["16"]
        for name, path in (("weighted", half[0]), ("plain", tmp_path / "plain"))
    }
    assert found["weighted"]["kl_mean"] < 0.7 * found["plain"]["kl_mean"]


def test_evaluation_attributes_the_loss(half, tmp_path):
    output = tmp_path / "perplexity.json"
    record = evaluate(EvalConfig(model=str(half[0]), bits=["16", "4", "3:2", "2"], output=str(output), **SMALL))
    results = record["results"]
    assert list(results) == ["dense", "16", "4", "3:2", "2"]
    assert json.loads(output.read_text()) == record
    assert results["dense"]["kl_mean"] == 0 and results["dense"]["top1_agreement"] == 1
    assert results["16"]["kl_mean"] < results["4"]["kl_mean"] < results["3:2"]["kl_mean"] < results["2"]["kl_mean"]
    assert len({r["tokens"] for r in results.values()}) == 1
    two = results["2"]
    assert (1 + two["increase_due_to_rank"]) * (1 + two["increase_due_to_bits"]) == pytest.approx(
        1 + two["perplexity_increase"]
    )
    assert results["16"]["bytes_per_token"]["4096"] == pytest.approx(0.5 * 6144, rel=0.02)
    assert two["ratio"]["4096"] > results["3:2"]["ratio"]["4096"] > results["4"]["ratio"]["4096"]
    # 4 bits in groups of 16 are 6 bits with their parameters: twice 16/6, and a little for the window.
    assert 5 < results["4"]["ratio"]["4096"] < 2 * 16 / 6


def test_chunks_and_single_steps_score_nearly_the_same(half):
    one, many = (
        evaluate(EvalConfig(model=str(half[0]), dense="none", bits=["4"], **{**SMALL, "chunk": chunk}))
        for chunk in (1, 16)
    )
    assert one["results"]["4"]["perplexity"] == pytest.approx(many["results"]["4"]["perplexity"], rel=0.1)


def test_scored_positions_by_hand():
    class Scheme:
        sink_length, block_length = 4, 16

        @staticmethod
        def flushed_blocks(window):
            return max(0, (window - 8) // 16)

    # At 172 tokens: (172 - 4 - 8) // 16 = 10 blocks, 160 tokens of 173 are packed: 92 %.
    scored = scored_positions(200, 100, 1, [Scheme])
    assert scored[172 - 100] and not scored[0]
    for i in range(100, 199):
        assert scored[i - 100] == ((i - 12) // 16 * 16 >= 0.9 * (i + 1))


class TestRefusals:
    def test_nothing_packed(self, half):
        with pytest.raises(ValueError, match="length=320: no token has nine tenths of its context packed"):
            evaluate(EvalConfig(model=str(half[0]), **{**SMALL, "group_size": 128, "residual_length": 32}))

    def test_prefill(self, half):
        with pytest.raises(ValueError, match="prefill=320"):
            evaluate(EvalConfig(model=str(half[0]), **{**SMALL, "prefill": 320}))

    def test_too_little_text(self, half, tmp_path):
        (tmp_path / "short.txt").write_text("import os\n" * 200)
        with pytest.raises(ValueError, match="windows=2"):
            evaluate(EvalConfig(model=str(half[0]), text=str(tmp_path / "short.txt"), **{**SMALL, "length": 600}))
        with pytest.raises(ValueError, match="windows=32"):
            where = {"output": str(tmp_path / "x"), "statistics": str(tmp_path / "s")}
            calibrate(CalibrationConfig(**where, share=0.5, text=str(tmp_path / "short.txt"), length=64))

    def test_a_split_checkpoint_cannot_be_split_again(self, half, tmp_path):
        with pytest.raises(ValueError, match="must be a dense checkpoint, is split already"):
            calibrate(CalibrationConfig(model=str(half[0]), output=str(tmp_path), share=0.5))

    @pytest.mark.parametrize("bits", ["x", "2:3:4", ""])
    def test_bits(self, bits):
        with pytest.raises(ValueError, match="bits="):
            parse_bits(bits)

    def test_share(self):
        energies = {"a": [torch.rand(64)]}
        with pytest.raises(ValueError, match="share=0"):
            water_fill(energies, 0.0)
        with pytest.raises(ValueError, match=r"share=0\.01: must be at least 0\.1250"):
            water_fill(energies, 0.01)

    def test_no_tokens(self):
        with pytest.raises(ValueError, match="tokens"):
            collect_statistics(tiny_dense(), torch.zeros(0, 300, dtype=torch.long))


def test_water_filling_buys_the_largest_energies():
    energies = {"a": [torch.tensor([8.0, 4.0, 2.0, 1.0])], "b": [torch.tensor([4.0, 4.0, 4.0, 3.0])]}
    assert water_fill(energies, 0.75, multiple=1) == {"a": [2], "b": [4]}
    assert water_fill(energies, 1.0, multiple=1) == {"a": [4], "b": [4]}
    assert water_fill(energies, 0.5, multiple=2) == {"a": [2], "b": [2]}


def test_statistics_are_the_moments_of_the_text():
    model, ids = tiny_dense(attention_bias=True), torch.randint(1, 97, (3, 40))
    stats = collect_statistics(model, ids, fisher=False, sample=16, batch_size=2)
    attention = model.model.layers[0].self_attn
    # The first four tokens of a window are sinks, which take no part.
    x = model.model.layers[0].input_layernorm(model.get_input_embeddings()(ids))[:, 4:].flatten(0, 1).double()
    for p in ("k_proj", "v_proj"):
        y = x @ getattr(attention, p).weight.double().T
        assert torch.allclose(getattr(stats[0], p).covariance, y.T @ y / len(x), rtol=1e-5, atol=1e-5)
    query = attention.q_proj(x.float()).double().unflatten(-1, (8, 16))
    energy = (query[..., :8] ** 2 + query[..., 8:] ** 2).mean(0)
    assert torch.allclose(stats[0].query_energy, energy, rtol=1e-5)
    assert OBJECTIVES["query_output"](model, 2, stats[2])["v_proj"]["metric"].shape == (64, 64)


class TestCorpus:
    def test_splits_are_disjoint_by_name(self):
        splits = {s: stdlib_documents(s) for s in ("train", "calibration", "selection", "test")}
        names = [d.name for documents in splits.values() for d in documents]
        assert len(names) == len(set(names))
        assert split_of("json/decoder.py") == split_of("test/test_json.py")
        for split in ("calibration", "selection", "test"):
            assert sum(len(d.text) for d in splits[split]) > 100_000

    def test_specs(self, tmp_path):
        (tmp_path / "a.txt").write_text("text")
        assert [d.text for d in load_documents(str(tmp_path))] == ["text"]
        assert describe(load_documents(str(tmp_path / "a.txt")))["characters"] == 4
        with pytest.raises(FileNotFoundError):
            load_documents(str(tmp_path / "none.txt"))
        with pytest.raises(ValueError, match="unknown text 'wikitext'"):
            load_documents("wikitext")
        with pytest.raises(ValueError, match="too few"):
            tokenize_windows(load_documents(str(tmp_path)), load_model(BUNDLED_MODEL)[1], 100)
