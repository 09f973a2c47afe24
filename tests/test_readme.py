"""No figure in the documents is older than the JSON that it was made from, nor differs between the languages; what
the quick start prints runs in a fresh clone and a fresh shell."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from scripts.results_tables import DOCUMENTS, RENDERERS, RESULTS, ROOT, with_tables

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


# ---- the quick start


def shell_blocks(name: str) -> list[str]:
    """What a reader is to type, block by block."""
    return re.findall(r"```\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)


@pytest.fixture
def fresh_shell(tmp_path):
    """A shell in a clone, without this environment; in the clone's `.venv`, which `make` would fill, lies this one."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    (clone / ".venv").mkdir()
    for entry in Path(sys.prefix).iterdir():
        (clone / ".venv" / entry.name).symlink_to(entry)
    (clone / ".venv" / "installed").unlink(missing_ok=True)
    (clone / ".venv" / "installed").touch()
    path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if Path(p) != Path(sys.prefix) / "bin")
    # This environment knows the project by where it was installed; the clone's own modules are to come first.
    environment = {"PATH": path, "HOME": str(tmp_path), "PYTHONPATH": str(clone), "HF_HUB_OFFLINE": "1"}

    def run(script: str) -> str:
        shell = ["bash", "-euo", "pipefail", "-c", script]
        done = subprocess.run(shell, cwd=clone, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_the_commands_of_the_readme_are_found(fresh_shell):
    """In a fresh shell: targets of `make` exist, and the environment is activated, so a script finds the project."""
    targets, start, serve = shell_blocks("README.md")[:3]
    planned = fresh_shell(re.sub(r"^make", "make --dry-run", targets, flags=re.MULTILINE))
    assert "scripts/demo.py" in planned and "pytest" in planned and "pip install" not in planned
    install, *commands = (start + serve).splitlines()
    scripts = [re.match(r"python (scripts/\w+\.py) ", command)[1] for command in commands]
    assert len(scripts) == 4 and all((ROOT / script).is_file() for script in scripts)
    assert "usage: " in fresh_shell(f"{install}\npython {scripts[0]} --help")


def test_the_translation_prints_the_same_commands():
    commands = [
        [line.partition("  #")[0].strip() for block in shell_blocks(name)[:3] for line in block.splitlines()]
        for name in ("README.md", "README.zh-CN.md")
    ]
    assert commands[0] == commands[1] and len(commands[0]) == 7


@pytest.mark.slow
def test_the_quick_start_runs_as_printed(fresh_shell):
    """Minutes: it calibrates and measures."""
    start = shell_blocks("README.md")[1]
    assert start.startswith("make install")
    assert "class Stack:" in fresh_shell(start)
