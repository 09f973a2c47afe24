"""Questions about the test split of the standard library, for tasks of lm-evaluation-harness without network."""

import random

import datasets

from scripts.corpus import load_documents

#: Lines that a question shows and asks for, and how many questions a document gives at most.
SHOWN, ASKED, PER_DOCUMENT = 120, 3, 12


def next_lines(**_) -> dict[str, datasets.Dataset]:
    """Which three lines follow 120 lines of code? The other three choices stand elsewhere in the same document."""
    generator, rows = random.Random(0), []
    for document in load_documents("stdlib:test"):
        lines = [line for line in document.text.splitlines(keepends=True) if line.strip()]
        pieces = range(SHOWN, len(lines) - ASKED, SHOWN // 2)
        for start in list(pieces)[:PER_DOCUMENT]:
            elsewhere = [i for i in range(len(lines) - ASKED) if not start - SHOWN - ASKED < i < start + ASKED]
            if len(elsewhere) < 3:
                continue
            starts = [start, *generator.sample(elsewhere, 3)]
            order = generator.sample(range(4), 4)
            choices = ["".join(lines[starts[i] : starts[i] + ASKED]) for i in order]
            rows.append({"text": "".join(lines[start - SHOWN : start]), "choices": choices, "answer": order.index(0)})
    # Questions of different documents side by side, so that a limited run sees them all.
    generator.shuffle(rows)
    return {"test": datasets.Dataset.from_list(rows)}


def documents(**_) -> dict[str, datasets.Dataset]:
    """Whole documents."""
    rows = [{"text": document.text} for document in load_documents("stdlib:test")]
    return {"test": datasets.Dataset.from_list(rows)}
