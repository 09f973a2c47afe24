"""Questions about the test split of the standard library, for tasks of lm-evaluation-harness without network."""

import random

import datasets

from scripts.corpus import load_documents

#: Lines that a question shows and asks for, and how many questions a document gives at most.
SHOWN, ASKED, PER_DOCUMENT = 80, 4, 12


def next_lines(**_) -> dict[str, datasets.Dataset]:
    """Which four lines follow 80 lines of code? The other three choices stand in other documents."""
    generator, rows = random.Random(0), []
    texts = [[line for line in d.text.splitlines(keepends=True) if line.strip()] for d in load_documents("stdlib:test")]
    for lines in texts:
        for start in range(SHOWN, len(lines) - ASKED, SHOWN)[:PER_DOCUMENT]:
            choices = ["".join(lines[start : start + ASKED])]
            for other in generator.sample([x for x in texts if x is not lines], 3):
                place = generator.randrange(len(other) - ASKED)
                choices.append("".join(other[place : place + ASKED]))
            order = generator.sample(range(4), 4)
            text = "".join(lines[start - SHOWN : start])
            rows.append({"text": text, "choices": [choices[i] for i in order], "answer": order.index(0)})
    # Questions of different documents side by side, so that a limited run sees them all.
    generator.shuffle(rows)
    return {"test": datasets.Dataset.from_list(rows)}


def documents(**_) -> dict[str, datasets.Dataset]:
    """Whole documents."""
    rows = [{"text": document.text} for document in load_documents("stdlib:test")]
    return {"test": datasets.Dataset.from_list(rows)}
