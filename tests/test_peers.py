"""Peers through one evaluation: when transformers' cache packs, what it stores, windows by document, the bootstrap.

`QuantizedCache` runs with a back end of our own in place of quanto's, whose bytes are known; quanto itself and hqq were
run by `scripts/compare_peers.py`.
"""

import json
import math
from functools import partial

import pytest
import torch
from transformers import cache_utils

from modules.kivi_cache import CacheScheme, create_kivi_cache
from scripts import compare_peers, results_tables
from scripts.common import BUNDLED_MODEL, load_model
from scripts.compare_peers import CountedQuantizedCache, FlushScheme, PeersConfig, peers, stored_nbytes
from scripts.corpus import Document, document_windows, load_documents, tokenize_windows
from scripts.eval_perplexity import (
    EvalConfig,
    bootstrap_mean,
    divergence,
    has_packed,
    increase,
    measure,
    paired_bootstrap,
    perplexity_table,
    scored_positions,
    worst_domain,
)
from scripts.published import PUBLISHED
from scripts.results_tables import RESULTS
from tests.helpers import tiny_dense, tiny_split

#: What `PeersConfig` must be told.
BUNDLED = {"model": BUNDLED_MODEL, "text": "stdlib:test", "calibration_text": "stdlib:calibration"}


class WrappedCodes(torch.Tensor):
    """A tensor subclass that stores its elements elsewhere, as quanto's do."""

    @staticmethod
    def __new__(cls, packed, size):
        return torch.Tensor._make_wrapper_subclass(cls, size, dtype=torch.bfloat16)

    def __init__(self, packed, size):
        self.packed = packed

    def __tensor_flatten__(self):
        return ["packed"], None

    @classmethod
    def __torch_dispatch__(cls, *args):
        pytest.fail("an operation on elements that are stored elsewhere")


class FourBitLayer(cache_utils.QuantizedLayer):
    """Keeps the states and, beside them, as many bytes as four-bit codes with a scale and a zero per 64 would take."""

    def _quantize(self, tensor, axis):
        groups = tensor.numel() // self.q_group_size
        codes = torch.empty(tensor.numel() // 2, dtype=torch.uint8)
        meta = {"scale": torch.empty(groups, 1).bfloat16(), "zero": torch.empty(groups, 1).bfloat16(), "axis": axis}
        return WrappedCodes(codes, tensor.shape), {**meta, "read": lambda: tensor}  # a closure is no storage

    def _dequantize(self, stored):
        return stored[1]["read"]()


@pytest.fixture
def four_bit(monkeypatch):
    monkeypatch.setattr(cache_utils, "QuantoQuantizedLayer", FourBitLayer)


@pytest.fixture(scope="module")
def bundled():
    return load_model(BUNDLED_MODEL)


class TestFlushScheme:
    @pytest.mark.parametrize("chunk", [1, 5, 12, 20])
    @pytest.mark.parametrize("prefill", [30, 64])
    def test_follows_the_layer(self, chunk, prefill):
        scheme = FlushScheme("quanto", 4, 0, prefill, chunk, q_group_size=8, residual_length=12)
        layer = FourBitLayer(q_group_size=8, residual_length=12)
        layer.update(*torch.randn(2, 1, 2, prefill, 4))
        for start in range(prefill, prefill + 100, chunk):
            packed = layer._dequantize(layer._quantized_keys).shape[2]
            assert packed + (layer.keys.shape[2] if layer.keys.dim() == 4 else 0) == start
            assert scheme.flushed_blocks(start) == packed
            layer.update(*torch.randn(2, 1, 2, chunk, 4))

    def test_scored_positions(self):
        scheme = FlushScheme("quanto", 4, 0, prefill=100, chunk=1, residual_length=20)
        scored = scored_positions(200, 100, 1, [scheme])
        # Packed: 100 of 101 … 111 tokens are nine tenths, of 112 … 120 not; 120 of 121 … 133, then again 140.
        for i in range(100, 199):
            assert scored[i - 100] == ((100 + (i - 100) // 20 * 20) >= 0.9 * (i + 1))
        assert scored[110 - 100] and not scored[111 - 100] and scored[120 - 100]

    def test_chunks_see_what_was_packed_before_them(self, monkeypatch):
        monkeypatch.setattr(compare_peers, "_flush_period", lambda *_: 32)  # that of 5.23
        scheme = FlushScheme("quanto", 4, 0, prefill=100, chunk=16, residual_length=20)
        scored = scored_positions(200, 100, 16, [scheme])
        # Two chunks make 32 ≥ 20 tokens: 100 are packed up to token 131, 132 from there to 163.
        assert scored.tolist()[:46] == [True] * 11 + [False] * 21 + [True] * 14


class TestBytes:
    def test_containers_subclasses_and_views(self):
        base = torch.zeros(10, dtype=torch.int32)
        assert stored_nbytes(base[:2]) == 40
        assert stored_nbytes([base[:2], {"again": base[5:]}, (torch.zeros(3).half(), "text", None, 7)]) == 46
        assert stored_nbytes(WrappedCodes(torch.zeros(5, dtype=torch.uint8), (20,))) == 5
        assert stored_nbytes({"empty": torch.tensor([])}) == 0

    def test_of_a_cache(self, four_bit):
        model = tiny_dense(dtype=torch.bfloat16)
        cache = CountedQuantizedCache(FlushScheme("quanto", 4, 0, 96, 1), model.config)
        assert not has_packed(cache)
        model(torch.randint(1, 97, (2, 96)), past_key_values=cache)
        model(torch.randint(1, 97, (2, 8)), past_key_values=cache)
        assert has_packed(cache)
        # Three layers, keys and values, two rows, four heads of 16: codes, 4 bytes of parameters per 64 elements.
        elements = 3 * 2 * 2 * 4 * 16
        assert cache.nbytes_used == elements * 96 / 2 + elements * 96 / 64 * 4 + elements * 8 * 2
        # One row, of which 64 tokens are residual.
        per_token = 3 * 2 * 4 * 16
        for length in (4096, 32768):
            expected = per_token * ((length - 64) * (0.5 + 4 / 64) + 64 * 2) / length
            assert cache.token_nbytes(length) == pytest.approx(expected)
        assert cache.bits_per_element == {"keys": 4.5, "values": 4.5}


class TestMeasure:
    SMALL = {"windows": 2, "length": 260, "prefill": 240, "chunk": 1, "batch_size": 1, "per_document": True}

    def test_a_foreign_cache(self, four_bit, bundled):
        dense, tokenizer = bundled
        scheme = FlushScheme("quanto", 4, 0, 240, 1)
        config = EvalConfig(model=BUNDLED_MODEL, **self.SMALL)
        caches = {
            "exact": (dense, lambda: CountedQuantizedCache(scheme, dense.config)),
            "2": (dense, partial(create_kivi_cache, group_size=16, residual_length=0)),
        }
        record = measure(config, tokenizer, dense, caches)
        exact, two, reference = (record["results"][name] for name in ("exact", "2", "dense"))
        assert exact["kl_mean"] == 0 and exact["nll_by_window"] == reference["nll_by_window"]
        assert two["kl_mean"] > 0
        assert record["settings"]["exact"]["residual_length"] == 128
        assert exact["bits_per_element"] == {"keys": 4.5, "values": 4.5}
        assert exact["ratio"]["32768"] == pytest.approx(16 / 4.5, rel=0.02)

        # By hand: the losses of the starts of two documents, in one pass.
        documents = document_windows(load_documents("stdlib:test"), tokenizer, 260)
        chosen = documents[[0, len(documents) - 1]]
        logs = dense.float()(chosen).logits.log_softmax(-1)
        dense.bfloat16()
        positions = 240 + scored_positions(260, 240, 1, [scheme, create_kivi_cache(2, 2, 16, 0).scheme]).nonzero()[:, 0]
        assert reference["tokens"] == 2 * len(positions)
        expected = [
            -torch.stack([logs[i, p, chosen[i, p + 1]] for p in positions]).mean().item() for i in range(len(chosen))
        ]
        assert reference["nll_by_window"] == pytest.approx(expected, rel=0.01)
        assert sum(reference["nll_by_window"]) / 2 == pytest.approx(reference["nll"])

    def test_batches_do_not_mix_windows(self):
        # In bfloat16 the processor's products for one row and for two may round differently.
        dense, tokenizer = load_model(BUNDLED_MODEL, torch.float32)
        caches = {"2": (dense, partial(create_kivi_cache, group_size=16, residual_length=0))}
        found = [
            measure(
                EvalConfig(model=BUNDLED_MODEL, **{**self.SMALL, "windows": 3, "batch_size": n}),
                tokenizer,
                dense,
                caches,
            )["results"]["dense"]["nll_by_window"]
            for n in (1, 2)
        ]
        assert found[0] == pytest.approx(found[1], rel=1e-5) and len(set(found[0])) == 3

    def test_several_texts(self, bundled, tmp_path):
        """Each text is measured as if it were alone, and all together by the tokens of all."""
        dense, tokenizer = bundled
        (tmp_path / "letters.txt").write_text("the cat sat on the mat and the dog lay under the old tree\n" * 200)
        texts = ["stdlib:test", str(tmp_path / "letters.txt")]
        how = {**self.SMALL, "per_document": False}
        caches = {"2": (dense, partial(create_kivi_cache, group_size=16, residual_length=0))}

        def of(text):
            return measure(EvalConfig(model=BUNDLED_MODEL, text=text, **how), tokenizer, dense, caches)

        both, alone = of(texts), {text: of(text)["results"] for text in texts}
        for name, result in both["results"].items():
            assert list(result["domains"]) == texts
            for text in texts:
                for figure in ("nll_by_window", "kl_by_window", "kl_mean", "kl_p99", "perplexity_increase", "tokens"):
                    assert result["domains"][text][figure] == alone[text][name][figure], (name, text, figure)
                assert "domains" not in alone[text][name]
            first, second = (alone[text][name] for text in texts)
            assert result["tokens"] == first["tokens"] + second["tokens"]
            assert result["nll"] == pytest.approx((first["nll"] + second["nll"]) / 2)
            assert result["kl_by_window"] == first["kl_by_window"] + second["kl_by_window"]
            assert sum(result["kl_by_window"]) / 4 == pytest.approx(result["kl_mean"])
        two = both["results"]["2"]
        worst = max(texts, key=lambda text: alone[text]["2"]["perplexity_increase"])
        assert worst_domain(two)[0] == worst and both["config"]["text"] == texts
        assert both["text"]["documents"] == of(texts[0])["text"]["documents"] + 1
        table = perplexity_table(both["results"])
        assert table.count("| – stdlib:test |") == 2 and f"Worst text: latent, 2 bit: {worst}, " in table
        found = divergence(two)
        assert f"{two['kl_mean']:.4f} [{found['low']:.4f}, {found['high']:.4f}]" in table
        assert found["low"] < two["kl_mean"] < found["high"]

    def test_a_cache_that_packs_nothing(self, four_bit, bundled, monkeypatch):
        dense, tokenizer = bundled
        monkeypatch.setattr(CountedQuantizedCache, "has_packed", False)
        caches = {"idle": (dense, lambda: CountedQuantizedCache(FlushScheme("quanto", 4, 0, 240, 1), dense.config))}
        with pytest.raises(RuntimeError, match="idle: a layer of the cache has packed nothing"):
            measure(EvalConfig(model=BUNDLED_MODEL, **self.SMALL), tokenizer, dense, caches)


def test_windows_by_document(bundled):
    tokenizer = bundled[1]
    documents = [Document("a", "x = 1\n" * 50), Document("b", "y"), Document("c", "def f(z):\n    return z\n" * 30)]
    windows = document_windows(documents, tokenizer, 40)
    assert windows.shape == (2, 40) and (windows[:, 0] == tokenizer.bos_token_id).all()
    assert torch.equal(windows[:1], tokenize_windows(documents[:1], tokenizer, 40, 1))
    assert torch.equal(windows[1:], tokenize_windows(documents[2:], tokenizer, 40, 1))
    assert torch.equal(document_windows(documents, tokenizer, 40, 1), windows[:1])
    with pytest.raises(ValueError, match="2 documents of 40 tokens are too few for 3"):
        document_windows(documents, tokenizer, 40, 3)
    with pytest.raises(ValueError, match="0 documents"):
        document_windows(documents, tokenizer, 4000)


class TestBootstrap:
    def test_of_a_constant_difference(self):
        found = paired_bootstrap([1.0, 5.0, 3.0], [0.9, 4.9, 2.9])
        # The documents differ by nats and the pairs by a tenth: only an unpaired bootstrap would have an interval.
        assert all(found[name] == pytest.approx(math.exp(0.1)) for name in ("ratio", "low", "high"))

    def test_of_two_documents(self):
        # Means of the draws: 0 once in four, 1/2 twice, 1 once.
        a, b = [2.0, 1.0], [2.0, 0.0]
        assert paired_bootstrap(a, b) == pytest.approx({"ratio": math.exp(0.5), "low": 1.0, "high": math.e})
        assert paired_bootstrap(a, b, level=0.4) == pytest.approx(
            dict.fromkeys(("ratio", "low", "high"), math.exp(0.5))
        )

    def test_of_many_documents(self):
        n = 400
        difference = torch.linspace(-1, 1, n).double()
        found = paired_bootstrap((1 + difference).tolist(), [1.0] * n)
        half = 1.96 * difference.std(correction=0).item() / n**0.5
        assert math.log(found["high"]) == pytest.approx(half, rel=0.05)
        assert math.log(found["low"]) == pytest.approx(-half, rel=0.05)

    def test_is_seeded(self):
        a, b = torch.rand(2, 9).tolist()
        assert paired_bootstrap(a, b) == paired_bootstrap(a, b) != paired_bootstrap(a, b, seed=1)

    def test_of_several_texts(self):
        """Documents are drawn within each text: what differs between the texts makes no interval."""
        values = [1.0, 1.0, 9.0, 9.0]
        assert bootstrap_mean(values, strata=2) == {"mean": 5.0, "low": 5.0, "high": 5.0}
        assert bootstrap_mean(values) == {"mean": 5.0, "low": 1.0, "high": 9.0}
        found = bootstrap_mean([0.0, 2.0, 8.0, 8.0], strata=2)
        assert found == {"mean": 4.5, "low": 4.0, "high": 5.0}
        with pytest.raises(ValueError, match="3 documents; must be two or more, in 2 equal parts"):
            bootstrap_mean(values[:3], strata=2)

    def test_no_interval_without_windows(self):
        one = {"perplexity": 2.0, "nll_by_window": [0.7], "kl_by_window": [0.1], "kl_mean": 0.1}
        assert increase(one, one) is None and divergence(one) is None
        # One window of each of two texts: none could be drawn in place of another.
        two = {"nll_by_window": [0.7, 0.9], "kl_by_window": [0.1, 0.2], "domains": {"a": {}, "b": {}}}
        assert increase(two, two) is None and divergence(two) is None
        old = {"perplexity": 2.0, "perplexity_increase": 0.0, "kl_mean": 0.1, "kl_p99": 1.0, "top1_agreement": 0.9}
        old |= {"bytes_per_token": {"4096": 100}, "ratio": {"4096": 8.0, "32768": 9.0}}
        table = perplexity_table({"dense": old, "2": {**old, "perplexity_increase": 0.031}})
        assert "| latent, 2 bit | 2.000 | +3.10% | 0.1000 | 1.000 |" in table and "[" not in table

    def test_refusals(self):
        with pytest.raises(ValueError, match="2 and 1 documents"):
            paired_bootstrap([1.0, 2.0], [1.0])
        with pytest.raises(ValueError, match="1 and 1 documents"):
            paired_bootstrap([1.0], [1.0])


class TestPeers:
    def test_all_are_there_and_ours_are_named(self):
        found = peers(PeersConfig(**BUNDLED))
        by_part = {part: [n for n, p in found.items() if p.part == part] for part in compare_peers.PARTS}
        assert {part: len(names) for part, names in by_part.items()} == {
            "transformers": 4, "KIVI": 4, "Palu": 8, "ASVD": 2, "before": 0, "checkpoints": 0
        }  # fmt: skip
        for name, peer in found.items():
            assert ("our" in name) == (peer.engine == "ours") == (peer.part != "transformers")
        assert found["KIVI, 2 bit (our engine)"].scheme == CacheScheme(2, 2, 32, 128, 0)
        palu = found["Palu, 50% of ranks, 3 bit (our engine)"].scheme
        assert not palu.keys.per_channel and not palu.values.per_channel and palu.keys.group_size == 0

    def test_default_feeding_scores_tokens_of_every_peer(self):
        config = PeersConfig(**BUNDLED)
        schemes = [peer.scheme for peer in peers(config).values()]
        assert scored_positions(config.length, config.prefill, config.chunk, schemes).all()

    def test_models(self, tmp_path, monkeypatch, bundled):
        """Palu in groups of four heads, ASVD joint; shares met."""
        models = object.__new__(compare_peers.Models)
        models.config, models.exact = (
            PeersConfig(**BUNDLED, rank_multiple=4, sensitivity_windows=1, statistics=str(tmp_path)),
            tiny_dense(num_key_value_heads=8),
        )
        models.dense = models.exact
        models.__dict__["calibration"] = torch.randint(1, 97, (2, 264))
        for share in (0.7, 0.3):
            palu = models.palu(share)
            assert palu.config.head_group_size == 4 and palu.config.k_hadamard
            assert abs(sum(map(sum, palu.config.truncation_ranks.values())) - share * 6 * 128) < 4
        palu(models.calibration[:, :8])
        asvd = models.asvd(0.25)
        assert not asvd.config.k_hadamard
        assert 0.15 < sum(map(sum, asvd.config.truncation_ranks.values())) / (6 * 64) <= 0.25

    def test_refusals(self):
        with pytest.raises(ValueError, match="parts="):
            PeersConfig(**BUNDLED, parts=["Palu", "palu"])
        with pytest.raises(ValueError, match="must differ in the names"):
            PeersConfig(**BUNDLED, checkpoints=["a/half", "b/half"])
        with pytest.raises(ValueError, match=r"before=.*must differ in the names"):
            PeersConfig(**BUNDLED, before=["a/half", "b/half"])
        # One of before may have the name of one that came after it.
        PeersConfig(**BUNDLED, checkpoints=["a/half"], before=["b/half"])
        with pytest.raises(ValueError, match="windows=1: must be 2 or more"):
            PeersConfig(**BUNDLED, windows=1)
        with pytest.raises(ValueError, match=r"text=\['a', 'a'\]: must be one or more different texts"):
            PeersConfig(**BUNDLED | {"text": ["a", "a"]})

    def test_nothing_of_the_bundled_model_is_a_default(self):
        for name in BUNDLED:
            with pytest.raises(TypeError, match=name):
                PeersConfig(**{key: value for key, value in BUNDLED.items() if key != name})


def peer_record(**peers_found) -> dict:
    """A record of peers and checkpoints by name, each given as its share of the bytes, KL divergence and loss."""
    results = {"dense": (1.0, 0.0, 2.0), **peers_found}
    for name, (size, kl, nll) in results.items():
        results[name] = {
            "part": {"ours": "checkpoints", "before": "before"}.get(name.split("_")[0], "peers"),
            "engine": "ours",
            "perplexity": math.exp(nll),
            "perplexity_increase": math.exp(nll - 2.0) - 1,
            "nll": nll,
            "nll_by_window": [nll - 0.1, nll + 0.1],
            "kl_mean": kl,
            "kl_by_window": [kl / 2, 3 * kl / 2],
            "kl_p99": 9 * kl,
            "top1_agreement": 0.9,
            "tokens": 510,
            "bytes_per_token": {"4096": 1000 * size},
            "weight_nbytes": 2_000_000 if name == "dense" else 2_100_000,
            "ratio": {"4096": 1 / size},
        }
    return {"results": results}


class TestEqualBytes:
    RECORD = peer_record(
        ours=(0.125, 0.05, 2.02), ours_small=(0.04, 0.5, 2.5), a=(0.25, 0.04, 2.0), b=(0.0625, 0.36, 2.2)
    )

    def test_between_two_peers(self):
        # An eighth is half way between a quarter and a sixteenth, and 0.12 between 0.04 and 0.36.
        found = compare_peers.at_equal_bytes(self.RECORD, 0.125)
        assert found["peers"] == ["b", "a"] and found["kl"] == pytest.approx(0.12)
        assert found["increase"] == pytest.approx(math.exp(0.1) - 1)

    def test_the_best_of_all_pairs(self):
        # A third peer off the line of the other two counts by itself, not when it is worse than the line.
        better = {"results": self.RECORD["results"] | peer_record(c=(0.12, 0.1, 2.1))["results"]}
        found = compare_peers.at_equal_bytes(better, 0.125)
        assert found["peers"] == ["c", "a"] and 0.09 < found["kl"] < 0.1
        worse = {"results": self.RECORD["results"] | peer_record(c=(0.12, 0.2, 2.1))["results"]}
        assert compare_peers.at_equal_bytes(worse, 0.125) == compare_peers.at_equal_bytes(self.RECORD, 0.125)
        # A smaller peer that is better than all larger ones stands for itself.
        small = {"results": self.RECORD["results"] | peer_record(c=(0.05, 0.01, 2.0))["results"]}
        assert compare_peers.at_equal_bytes(small, 0.125)["peers"] == ["c"]

    def test_no_peer_is_as_small(self):
        assert compare_peers.at_equal_bytes(self.RECORD, 0.04) is None
        table = compare_peers.equal_bytes_table(self.RECORD).splitlines()
        assert table[2].startswith(
            "| 12.50% | 8.0× | +2.02% [+2.02%, +2.02%] | 0.0500 [0.0250, 0.0750] | 0.450 | one text"
        )
        assert table[2].endswith("| b – a | +10.52% | 0.1200 | 2.4 |")
        assert (
            "| none as small; b, 6.2% | +22.14% [+22.14%, +22.14%] | 0.3600 [0.1800, 0.5400] | over 0.7 |" in table[3]
        )
        alone = compare_peers.equal_bytes_table(peer_record(ours=(0.1, 0.2, 2.0)))
        assert "no peer measured" in alone

    def test_checkpoints_of_before_are_no_peers(self):
        record = peer_record(ours=(0.125, 0.05, 2.02), before_a=(0.126, 0.1, 2.2), before_b=(0.25, 0.04, 2.0))
        assert compare_peers.at_equal_bytes(record, 0.25) is None
        assert "no peer measured" in compare_peers.equal_bytes_table(record)
        assert list(compare_peers.series(record)) == ["ours", "ours, before"]
        table = compare_peers.before_table(record).splitlines()
        assert len(table) == 4 and table[2].endswith("| one text | none of this size |")
        assert table[3].startswith("| 12.60% | +22.14% [+22.14%, +22.14%] | 0.1000 [0.0500, 0.1500] | 0.900 | ")
        assert table[3].endswith("| 2.0 |")
        assert "| ours, before_a | 126 | 12.6% |" in compare_peers.peers_table(record)

    def test_the_documents_tables(self):
        """Those of a frontier as `main` writes it, with two texts."""
        found = {"ours": (0.125, 0.05, 2.02), "a": (0.25, 0.04, 2.0), "b": (0.0625, 0.36, 2.2)}
        record = peer_record(**found, before_a=(0.125, 0.2, 2.2))
        for result in record["results"].values():
            part = {name: result[name] for name in ("perplexity_increase", "kl_mean")}
            worse = {name: 2 * figure for name, figure in part.items()}
            exact = {"residual_length": 32, "sink_length": 4}
            result |= {"domains": {"speech": part, "manual": worse}, "settings": exact}
            for name in ("nll_by_window", "kl_by_window"):
                result[name] = 2 * result[name]
        record["key"] = {"windows": 2, "length": 2048, "prefill": 1792, "chunk": 1, "text": ["speech", "manual"]}
        record |= {"text": {"python": "3.11.7", "sha256": "0123456789abcdef"}, "dtype": "torch.bfloat16"}
        record["environment"] = {"cpu": "EPYC", "threads": 1, "torch": "2.13", "transformers": "5.23"}
        shown = results_tables.real_frontier(record)
        assert "| manual: +4.04%, KL 0.1000 | b – a | +10.52% | 0.1200 | 2.4 |" in shown
        assert "510 scored tokens, 2 windows of 2,048 tokens of each text (prefill 1,792, then steps of 1). " in shown
        assert "Text: `speech`; `manual`, sha256 0123456789ab. bfloat16 on EPYC" in shown
        assert "in our caches a window of 32 tokens or more and 4 sinks are kept in 16 bits" in shown
        # 100,000 bytes more, and 875 fewer for each token.
        assert "12.50%: 97.7 KiB, from 115 tokens" in shown and "| 4.0 |" in shown
        decode = {"config": {"lengths": [8192]}, "cases": {"ours, 8192 x 1": {"speedup": 1.25}}}
        front = results_tables.real_summary(record, decode).splitlines()
        assert front[0].count("|") == 9 and "at 8,192 tokens" in front[0]
        assert front[2].endswith("| manual: +4.04%, KL 0.1000 | b – a | 2.4 | 1.25 |")
        decode["cases"].clear()
        assert results_tables.real_summary(record, decode).splitlines()[2].endswith("| not measured |")
        assert "against bytes, on `speech`, `manual`](scripts/" in results_tables.real_figure(record)
        peers_shown = results_tables.real_peers(record)
        assert "| **ours, ours** | 125 | 12.5% |" in peers_shown and peers_shown.count("manual: ") == 3

    def test_published_figures(self):
        shown = results_tables.published().splitlines()
        sizes = [float(line.split("|")[1].strip(" %")) for line in shown if line.startswith("| ") and "%" in line[:9]]
        assert sizes == sorted(sizes, reverse=True) and len(sizes) == len(PUBLISHED)
        assert all(0.05 < row.share < 0.5 for row in PUBLISHED)
        assert "none of them measured here" in shown[-1]

    def test_old_records_have_no_interval_of_the_divergence(self):
        record = json.loads((RESULTS / "peers.json").read_text())
        assert "kl_by_window" not in json.dumps(record)
        shown = compare_peers.peers_table(record).splitlines()
        assert shown[0].startswith("| cache | bytes/token at 4k | of dense | increase [95%] | KL mean | KL p99 |")
        assert all(line.count("[") <= 1 for line in shown[1:])


class TestMain:
    SMALL = {"windows": 2, "length": 1482, "prefill": 1472, "chunk": 5, "batch_size": 2}

    @pytest.fixture
    def few(self, monkeypatch):
        """Two peers of our engine, one of transformers' whose package is not there, and checkpoints."""
        kept = ("QuantizedCache, hqq 2 bit", "KIVI, 2 bit (our engine)", "KIVI, 4 bit (our engine)")
        every = peers
        monkeypatch.setattr(compare_peers, "installed_version", lambda package: None)
        monkeypatch.setattr(
            compare_peers,
            "peers",
            lambda config: {n: p for n, p in every(config).items() if n in kept or p.part in compare_peers.FOLDERS},
        )

    def test_resumes(self, few, monkeypatch, tmp_path, capsys):
        output = tmp_path / "peers.json"
        tiny_split(tmp_path, 64, dense=load_model(BUNDLED_MODEL)[0]).save_pretrained(tmp_path / "ours")
        config = {**BUNDLED, **self.SMALL, "output": str(output)}
        record = compare_peers.main(PeersConfig(**config, parts=["KIVI", "transformers"]))
        assert json.loads(output.read_text()) == record
        two, four = (record["results"][f"KIVI, {bits} bit (our engine)"] for bits in (2, 4))
        assert two["kl_mean"] > four["kl_mean"] > 0 and two["engine"] == "ours"
        assert len(two["nll_by_window"]) == 2
        absent = record["results"]["QuantizedCache, hqq 2 bit"]
        assert absent["not_installed"] == "hqq" and "perplexity" not in absent
        printed = capsys.readouterr().out
        assert "hqq 2 bit: not measured, hqq is not installed" in printed
        assert "| not installed: hqq |" in printed

        measured, really = [], measure

        def counted(*args):
            measured.extend(args[3])
            return really(*args)

        monkeypatch.setattr(compare_peers, "measure", counted)
        record["results"]["KIVI, 4 bit (our engine)"] = absent  # as if it could be run only now
        output.write_text(json.dumps(record))
        checkpoints = [str(tmp_path / "ours")]
        again = compare_peers.main(PeersConfig(**config, checkpoints=checkpoints))
        assert measured == ["KIVI, 4 bit (our engine)", "ours"]
        assert again["results"]["KIVI, 4 bit (our engine)"]["nll_by_window"] == four["nll_by_window"]
        assert again["results"]["KIVI, 2 bit (our engine)"] == two
        assert list(again["results"])[-1] == "ours" and again["results"]["ours"]["part"] == "checkpoints"
        assert again["results"]["ours"]["truncation_ranks"]
        assert "| **ours, ours** |" in capsys.readouterr().out

        # One of before stands under a name of its own, and joins a record that has begun.
        earlier = compare_peers.main(PeersConfig(**config, checkpoints=checkpoints, before=checkpoints))
        assert measured[2:] == ["before, ours"]
        assert earlier["results"]["before, ours"]["nll_by_window"] == again["results"]["ours"]["nll_by_window"]
        assert "| before, bytes of dense |" in capsys.readouterr().out

        # A checkpoint that has changed under its name is measured again; other options are another file's.
        path = tmp_path / "ours" / "config.json"
        path.write_text(path.read_text().replace('"k_bits": 2', '"k_bits": 4'))
        changed = compare_peers.main(PeersConfig(**config, checkpoints=checkpoints))
        assert measured[3:] == ["ours"]
        assert changed["results"]["ours"]["kl_mean"] != again["results"]["ours"]["kl_mean"]
        with pytest.raises(ValueError, match=r"other options \(batch_size\)"):
            compare_peers.main(PeersConfig(**{**config, "batch_size": 1}))
        # Nothing of a checkpoint with so long a window would be packed where the others are scored.
        path.write_text(path.read_text().replace('"residual_length": 32', '"residual_length": 192'))
        with pytest.raises(ValueError, match=r"other options \(scored_sha256\)"):
            compare_peers.main(PeersConfig(**config, checkpoints=checkpoints))
