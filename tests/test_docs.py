"""The code that the user guide prints runs as printed; tests/test_readme.py runs that of the README."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def python_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)


def test_the_printed_code_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    blocks, names = python_blocks("KIVI_INTEGRATION.md"), {}
    assert blocks
    for block in blocks:
        exec(compile(block, "KIVI_INTEGRATION.md", "exec"), names)
    cache = names["kivi_cache"]
    assert cache.get_seq_length() > 0 and cache.nbytes_used > 0
    assert "KIVILatentCache(keys" in capsys.readouterr().out


def test_the_loop_of_the_source_document(monkeypatch):
    """The loop by hand, with a prompt long enough that blocks are packed."""
    monkeypatch.chdir(ROOT)
    names: dict = {}
    exec(python_blocks("KIVI_INTEGRATION.md")[0], names)
    model, kivi_cache = names["model"], names["model"].create_kivi_cache()
    next_token_id = names["input_ids"].repeat(1, 40)[:, :300]
    next_token_id = model(next_token_id, past_key_values=kivi_cache).logits[:, -1:].argmax(-1)
    for _ in range(5):
        outputs = model(
            input_ids=next_token_id,
            past_key_values=kivi_cache,
            use_cache=True,
        )
        next_token_id = outputs.logits.argmax(-1)
    assert kivi_cache.row_tokens() == [305]
    assert all(layer.pool.used == 2 for layer in kivi_cache.layers)
