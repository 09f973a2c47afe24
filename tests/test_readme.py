"""No figure in the documents is older than the JSON that it was made from."""

from scripts.readme_tables import DOCUMENTS, RENDERERS, with_tables


def test_tables_are_those_of_the_results():
    texts = [path.read_text() for path in DOCUMENTS]
    assert all(any(f"<!-- table: {name} -->" in text for text in texts) for name in RENDERERS)
    for text in texts:
        assert with_tables(text) == text
