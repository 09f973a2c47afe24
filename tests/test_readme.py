"""No figure in the documents is older than the JSON that it was made from, nor differs between the languages."""

import re
from collections import Counter

from scripts.readme_tables import DOCUMENTS, RENDERERS, RESULTS, ROOT, with_tables

CODE = re.compile(r"```.*?```", flags=re.DOTALL)


def test_tables_are_those_of_the_results():
    texts = [path.read_text() for path in DOCUMENTS]
    measured = [name for name, (files, _) in RENDERERS.items() if all((RESULTS / f"{f}.json").exists() for f in files)]
    assert set(RENDERERS) - set(measured) <= {"gpu"}  # which needs a machine that is not always there
    assert all(any(f"<!-- table: {name} -->" in text for text in texts) for name in measured)
    for text in texts:
        assert with_tables(text) == text


def figures(text: str) -> Counter:
    """Numbers of the prose: not of the tables that are made, of code, or of links."""
    for rest in (r"<!-- table: .*?<!-- end -->", CODE, r"`[^`]*`", r"\]\([^)]*\)"):
        text = re.sub(rest, "", text, flags=0 if rest is CODE else re.DOTALL)
    return Counter(re.findall(r"\d[\d,.]*\d|\d", text))


def test_the_translation_says_the_same():
    english, chinese = ((ROOT / name).read_text() for name in ("README.md", "README.zh-CN.md"))
    assert figures(english) == figures(chinese)
    tables = [re.findall(r"<!-- table: (\w+) -->", text) for text in (english, chinese)]
    assert tables[0] == tables[1] and len(tables[0]) >= 4
    code = [[re.sub(r"  # .*", "", block) for block in CODE.findall(text)] for text in (english, chinese)]
    python = [[block for block in blocks if block.startswith("```python")] for blocks in code]
    assert python[0] == python[1] != []
    assert english.count("\n## ") == chinese.count("\n## ")
