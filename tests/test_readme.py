"""The documents: no figure is older than the JSON that it was made from, nor differs between the languages; links and
contents lists lead somewhere; the quick start runs line by line in a fresh clone and a fresh shell."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from scripts import results_tables
from scripts.results_tables import DOCUMENTS, MADE_BY, RENDERERS, RESULTS, ROOT, with_tables

CODE = re.compile(r"```.*?```", flags=re.DOTALL)


def test_tables_are_those_of_the_results():
    texts = [path.read_text() for path in DOCUMENTS]
    measured = [name for name, (files, _) in RENDERERS.items() if all((RESULTS / f"{f}.json").exists() for f in files)]
    # A GPU is not always there; the language model's tables are made once `make real-results` has run.
    of_real = {"real_summary", "real_figure", "real_frontier", "real_peers", "real_ruler", "real_decode", "chunk"} | {
        "real_float32",
        "real_ruler_4k",
        "real_ruler_8k",
        "real_decode_amx",
        "surface",
        "real_ablation",
    }
    assert set(RENDERERS) - set(measured) <= {"gpu", *of_real}
    assert all(any(f"<!-- table: {name} -->" in text for text in texts) for name in measured)
    for text in texts:
        assert with_tables(text) == text


def test_what_is_not_measured_says_how(monkeypatch, tmp_path):
    monkeypatch.setattr(results_tables, "RESULTS", tmp_path)
    shown = with_tables("<!-- table: real_summary -->\nold\n<!-- end -->\n")
    assert shown == (
        "<!-- table: real_summary -->\n*Not measured yet: `make real-results` measures it.*\n<!-- end -->\n"
    )


def test_the_named_commands_make_the_results():
    """Every JSON file is written by the script that stands under its tables, in the named target of the Makefile."""
    assert {path.stem for path in RESULTS.glob("*.json")} <= set(MADE_BY)
    for source, (script, target) in MADE_BY.items():
        planned = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True)
        commands = planned.stdout.replace("\\\n", " ").splitlines()
        assert any(f"scripts/{script} " in line and f"/{source}.json" in line for line in commands), source


def figures(text: str) -> Counter:
    """Numbers of the prose: not of the tables that are made, of code, or of links."""
    for rest in (r"<!-- table: .*?<!-- end -->", CODE, r"`[^`]*`", r"\]\([^)]*\)"):
        text = re.sub(rest, "", text, flags=0 if rest is CODE else re.DOTALL)
    return Counter(re.findall(r"\d[\d,.]*\d|\d", text))


def test_the_translation_says_the_same():
    english, chinese = ((ROOT / name).read_text() for name in ("README.md", "README.zh-CN.md"))
    assert figures(english) == figures(chinese)
    tables = [re.findall(r"<!-- table: (\w+) -->", text) for text in (english, chinese)]
    assert tables[0] == tables[1] == ["real_summary", "gpu_summary", "real_figure", "published"]
    code = [[re.sub(r"  # .*", "", block) for block in CODE.findall(text)] for text in (english, chinese)]
    python = [[block for block in blocks if block.startswith("```python")] for blocks in code]
    assert python[0] == python[1] != []
    assert english.count("\n## ") == chinese.count("\n## ")


def anchors(text: str) -> set[str]:
    """Names by which GitHub links to the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md", "RESULTS.md", "KIVI_INTEGRATION.md"])
def test_links_lead_somewhere(name):
    links = re.findall(r"\]\(([^)\s]*)\)", CODE.sub("", (ROOT / name).read_text()))
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        if not path.startswith("https://"):
            assert (ROOT / (path or name)).exists(), link
            assert not anchor or anchor in anchors((ROOT / (path or name)).read_text()), link


@pytest.mark.parametrize("name", ["RESULTS.md", "KIVI_INTEGRATION.md"])
def test_the_contents_list_is_complete(name):
    """The contents list names every chapter, in order."""
    text = CODE.sub("", (ROOT / name).read_text())
    contents, chapters = text.partition("\n## Contents\n")[2].split("\n## ", 1)
    listed = re.findall(r"^ *- \[([^\]]*)\]", contents, flags=re.MULTILINE)
    assert listed == re.findall(r"^## (.*)$", "## " + chapters, flags=re.MULTILINE)


def code_blocks(name: str) -> list[tuple[str, str]]:
    """Language, empty for a shell, and text of each block of code, in order."""
    return re.findall(r"```(\w*)\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)


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
    # Other workers of the suite have the other processors.
    environment["OMP_NUM_THREADS"] = "1"
    # The C++ kernels that other tests have built serve here too.
    environment["XDG_CACHE_HOME"] = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    environment |= {name: os.environ[name] for name in ("TORCH_EXTENSIONS_DIR",) if name in os.environ}

    def run(script: str) -> str:
        shell = ["bash", "-euo", "pipefail", "-c", script]
        done = subprocess.run(shell, cwd=clone, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_the_two_commands_of_the_readme_are_targets(fresh_shell):
    """In a fresh shell both targets of `make` exist and use the environment."""
    planned = fresh_shell(re.sub(r"^make", "make --dry-run", code_blocks("README.md")[0][1], flags=re.MULTILINE))
    assert "scripts/real_model.py" in planned and "pytest" in planned
    # The language model is installed, the environment is there.
    assert re.findall("pip install (.*)", planned) and "--requirement" not in planned


def test_the_translation_prints_the_same_commands():
    commands = []
    for name in ("README.md", "README.zh-CN.md"):
        lines = [line for language, block in code_blocks(name) if not language for line in block.splitlines()]
        commands.append([line.partition("  #")[0].strip() for line in lines])
    assert commands[0] == commands[1] and len(commands[0]) == 15


def quick_start() -> str:
    """Blocks of the README's quick start as one script of the shell, in their order; Python's are fed to `python`."""
    text = (ROOT / "README.md").read_text().partition("\n## Quick start\n")[2].partition("\n## ")[0]
    lines = []
    for language, block in re.findall(r"```(\w*)\n(.*?)```", text, flags=re.DOTALL):
        lines.append(block if not language else f"{language} - <<'END'\n{block}END\n")
    return "".join(lines)


def test_the_quick_start_runs_as_printed(fresh_shell):
    """Every line, from the first one; a minute or so, since it calibrates and measures."""
    script = quick_start()
    assert script.startswith("make install\n") and "python - <<" in script
    printed = fresh_shell(script)
    assert "| config |" in printed and "class Stack:" in printed  # measured, and generated
    assert "def read_lines(path):" in printed and "KIVILatentCache(keys" in printed  # from Python
