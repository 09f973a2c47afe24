"""RULER's generator: run from its wheel, `make test-real`, and a stand-in of it that needs no wheel."""

import sys

import pytest
from transformers import AutoTokenizer

from scripts import ruler
from scripts.common import BUNDLED_MODEL, find_model
from scripts.results_tables import ROOT

#: A generator with the options and the imports of the real one.
STAND_IN = """
import argparse
import tenacity
from nltk.tokenize import sent_tokenize

parser = argparse.ArgumentParser()
for name in ("save_dir", "save_name", "tokenizer_path", "tokenizer_type", "template", "type_haystack"):
    parser.add_argument(f"--{name}")
for name in ("max_seq_length", "tokens_to_generate", "num_samples", "random_seed", "num_needle_k"):
    parser.add_argument(f"--{name}", type=int)
args = parser.parse_args()


def generate_samples(num_samples, max_seq_length, save_dir):
    print("noise")
    context = "|".join(sent_tokenize("Grass grows. Is it? Yes! It is 3.5 high."))
    text = args.template.format(type_needle_v="number", context=context, query=args.type_haystack)
    answer = str(args.random_seed + 100 * args.num_needle_k)
    return [{"index": i, "input": text, "outputs": [answer]} for i in range(num_samples)]
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    folder = tmp_path / "long_context_eval"
    synthetic = folder / "data" / "synthetic"
    synthetic.mkdir(parents=True)
    for package in (folder, folder / "data", synthetic):
        (package / "__init__.py").touch()
    (tmp_path / "wonderwords.py").touch()
    (synthetic / "niah.py").write_text(STAND_IN)
    template = "Memorize.\\n{context}\\nWhat is the {type_needle_v} for {query}?"
    wording = {"template": template.replace("\\n", "\n"), "answer_prefix": " The special magic {type_needle_v} is"}
    (synthetic / "constants.py").write_text(f"TASKS = {{'niah': {wording!r}}}")
    task = "niah_single_1:\n  task: niah\n  args:\n    type_haystack: repeat\n    num_needle_k: 1\n"
    (folder / "synthetic.yaml").write_text(task)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.startswith("long_context_eval")]:
        del sys.modules[name]


def test_samples_of_the_generator(stand_in, capsys):
    arguments, modules = sys.argv, dict(sys.modules)
    found = ruler.samples("niah_single_1", 300, 2, "nowhere", seed=7)
    context = "Memorize.\nGrass grows.|Is it?|Yes!|It is 3.5 high."
    assert [sample.answers for sample in found] == [["107"], ["107"]]
    assert {(sample.context, sample.question, sample.prefix) for sample in found} == {
        (context, "\nWhat is the number for repeat?", " The special magic number is")
    }
    assert ruler.samples("niah_single_1", 300, 1, "nowhere", seed=7, needles=4)[0].answers == ["407"]
    assert capsys.readouterr().out == "" and sys.argv is arguments
    assert all(sys.modules.get(name) is modules.get(name) for name in ("nltk", "nltk.tokenize", "tenacity"))


def test_every_needle_of_a_context_is_asked_for():
    needle = "One of the special magic numbers for {} is: {}."
    context = f"Read. {needle.format('old-hat', 12)} Grass. {needle.format('red-bag', 345)} {needle.format('sea', 6)}"
    own = ruler.Sample(context, "\nWhat is the number for red-bag?", " The number for red-bag is", ["345"])
    found = ruler.ask_each(own, 3)
    assert found[0] is own
    assert [(sample.question, sample.prefix, sample.answers) for sample in found[1:]] == [
        ("\nWhat is the number for old-hat?", " The number for old-hat is", ["12"]),
        ("\nWhat is the number for sea?", " The number for sea is", ["6"]),
    ]
    assert {sample.context for sample in found} == {context} and len(ruler.ask_each(own, 2)) == 2
    with pytest.raises(ValueError, match="questions=4: must be at most the 3 needles of a context"):
        ruler.ask_each(own, 4)
    several = ruler.Sample(context, "\nWhat are they for sea, and red-bag?", " They are", ["6", "345"])
    with pytest.raises(ValueError, match="in a task that asks for one"):
        ruler.ask_each(several, 2)


def test_a_missing_package_is_named(stand_in, monkeypatch):
    real = ruler.find_spec
    monkeypatch.setattr(ruler, "find_spec", lambda name: None if name == "wonderwords" else real(name))
    with pytest.raises(ImportError, match=r"wonderwords: must be installed for RULER: pip install --no-deps nvidia"):
        ruler.samples("niah_single_1", 300, 1, "nowhere")


def test_the_makefile_installs_the_same_packages():
    assert f"RULER := {' '.join(ruler.WHEELS.values())}\n" in (ROOT / "Makefile").read_text()


@pytest.mark.real
# The generator takes long to begin with: it makes all pairs of its adjectives and nouns.
@pytest.mark.parametrize("variant", ["niah_single_1", "niah_multikey_1", "niah_multiquery"])
def test_samples_out_of_the_wheel(variant):
    path = find_model(BUNDLED_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(path)
    found = ruler.samples(variant, 1536, 3, path)
    assert len(found) == 3 and len({tuple(sample.answers) for sample in found}) == 3
    for sample in found:
        assert all(sample.context.count(answer) == 1 for answer in sample.answers)
        assert not any(answer in sample.question + sample.prefix for answer in sample.answers)
        assert len(sample.answers) == (4 if variant == "niah_multiquery" else 1)
        if variant == "niah_multikey_1":
            each = ruler.ask_each(sample, 4)
            assert len({other.answers[0] for other in each}) == len({other.question for other in each}) == 4
        whole = sample.context + sample.question + sample.prefix
        assert 300 < len(tokenizer(whole).input_ids) <= 1536 - ruler.ANSWER_TOKENS
