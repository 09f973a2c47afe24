"""No figure in the README is older than the JSON that it was made from."""

from scripts.common import ROOT
from scripts.readme_tables import RENDERERS, with_tables


def test_tables_are_those_of_the_results():
    text = (ROOT / "README.md").read_text()
    assert all(f"<!-- table: {name} -->" in text for name in RENDERERS)
    assert with_tables(text) == text
