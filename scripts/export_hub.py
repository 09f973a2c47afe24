"""Write a split checkpoint so that a machine without this project loads it, by `trust_remote_code=True`.

    python scripts/export_hub.py --model build/sixteenth --output build/hub/sixteenth

The output folder can be uploaded to a hub as it is, or loaded from where it stands:

    AutoModelForCausalLM.from_pretrained("build/hub/sixteenth", trust_remote_code=True)

It holds the checkpoint, the modules that the model imports, flat beside the weights and with their imports rewritten,
and a model card with the figures of the checkpoint's `report.json` and of an --evaluation, where there are such.
"""

import ast
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import metadata_load, metadata_save
from transformers import AutoTokenizer
from transformers.utils import CHAT_TEMPLATE_DIR

from configuration_alrd_llama import ALRDLlamaConfig
from modeling_alrd_llama import ALRDLlamaForCausalLM, ALRDLlamaModel
from modules.kernels.cpu import sources as cpp_sources
from scripts.common import ROOT, git_commit, human_bytes, parse_config
from scripts.eval_perplexity import perplexity_table, text_names
from scripts.sources import calibration_table

#: The module of the model's classes, whose imports are followed.
ENTRY = ALRDLlamaForCausalLM.__module__

#: Files of a checkpoint that go along: weights, tokenizer, chat template, generation settings, report and plots; no
#: pickles.
COPIED_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model", ".png")


@dataclass
class ExportConfig:
    """The checkpoint to export, and facts for the card that are not in it."""

    model: str = field(metadata={"help": "Folder of a split checkpoint, as calibrate_svd_ranks.py writes it."})
    output: str = field(metadata={"help": "Folder to write; it must not exist, or be empty."})
    evaluation: str | None = field(
        default=None,
        metadata={"help": "Results of eval_perplexity.py --output for this checkpoint; its table goes into the card."},
    )
    base_model: str | None = field(
        default=None, metadata={"help": "Hub name of the dense model, for the card. None: left out."}
    )
    license: str | None = field(
        default=None,
        metadata={"help": "License of the weights, for the card. None: that of the dense model's card, if it is here."},
    )


def locate(name: str) -> Path | None:
    """The file of a module of this project by its dotted name; `None`: it is none."""
    path = ROOT.joinpath(*name.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def flat_name(name: str) -> str:
    """Name of an exported module: `modules.kernels.packed` becomes `kernels_packed`."""
    return name.removeprefix("modules.").replace(".", "_")


def imported_modules(node: ast.Import | ast.ImportFrom) -> set[str]:
    """Modules of this project that a statement imports, `from package import module` among them."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names if locate(alias.name)}
    found = {f"{node.module}.{alias.name}" for alias in node.names if locate(f"{node.module}.{alias.name}")}
    return found if len(found) == len(node.names) or not locate(node.module) else found | {node.module}


def import_statements(tree: ast.AST, at_once: bool = False) -> list[ast.Import | ast.ImportFrom]:
    """The import statements in a tree; `at_once`: only such as run on import, none inside functions."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.append(node)
        elif not (at_once and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
            found += import_statements(node, at_once)
    return found


def module_closure(entry: str = ENTRY, at_once: bool = False) -> dict[str, ast.Module]:
    """The modules of this project that `entry` needs, itself first, parsed; `at_once`: when it is imported."""
    found, waiting = {}, [entry]
    while waiting:
        name = waiting.pop(0)
        if name not in found:
            found[name] = ast.parse(locate(name).read_text(encoding="utf-8"))
            waiting += sorted(set().union(*map(imported_modules, import_statements(found[name], at_once))))
    return found


def foreign_packages(node: ast.Import | ast.ImportFrom) -> set[str]:
    """Packages, neither of this project nor of Python, that a statement imports from."""
    names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else {node.module}
    return {name.split(".")[0] for name in names if not locate(name)} - set(sys.stdlib_module_names)


def required_packages() -> set[str]:
    """Packages without which the model cannot be imported, by the names in `import`."""
    required = set()
    for tree in module_closure(at_once=True).values():
        for node in import_statements(tree, at_once=True):
            required |= foreign_packages(node)
    return required


def rewrite_module(name: str, required: set[str]) -> str:
    """Source of a module of this project with its imports from the same folder, and without its registrations.

    transformers finds the files to take along by lines that begin with `from .name import`, so `from . import name`
    has such a line before it. It refuses to load code that imports a package that is not installed, anywhere but in a
    `try`, so packages that only some back end needs stand in one.

    Args:
        name: The module's.
        required: Packages that the model needs in any case, see `required_packages`.

    Raises:
        ValueError: An import has a form that cannot be rewritten.
    """
    path = locate(name)
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    replacements = []
    for node in import_statements(tree):
        lines = import_lines(node, required, f"{path.relative_to(ROOT)}:{node.lineno}")
        if lines is not None:
            replacements.append((node, lines))
    # The library prefers registered code to that of the folder it loads, even to another version's.
    replacements += [(node, []) for node in tree.body if _is_registration(node)]

    text = source.encode().splitlines(keepends=True)
    for node, lines in sorted(replacements, key=lambda pair: pair[0].lineno, reverse=True):
        before, after = text[node.lineno - 1][: node.col_offset], text[node.end_lineno - 1][node.end_col_offset :]
        if before.strip() or after.split(b"#")[0].strip():
            raise ValueError(f"{path.relative_to(ROOT)}:{node.lineno}: must be a line of its own")
        text[node.lineno - 1 : node.end_lineno] = [before + line.encode() + b"\n" for line in lines]
    origin = path.relative_to(ROOT).as_posix()
    return f"# Written by scripts/export_hub.py from {origin}.\n" + b"".join(text).decode().rstrip() + "\n"


def import_lines(node: ast.Import | ast.ImportFrom, required: set[str], where: str) -> list[str] | None:
    """Lines that replace an import statement; `None`: it stays as it is. See `rewrite_module`."""
    if isinstance(node, ast.ImportFrom) and node.level:
        raise ValueError(f"{where}: the project imports absolutely")
    if not imported_modules(node):
        if foreign_packages(node) <= required:
            return None
        return ["try:", *(f"    {line}" for line in ast.unparse(node).splitlines()), "except ImportError:", "    raise"]
    lines, others = [], []
    for alias in node.names:
        target = alias.name if isinstance(node, ast.Import) else f"{node.module}.{alias.name}"
        if locate(target) is None:
            others.append(alias)
            continue
        if isinstance(node, ast.Import) and alias.asname is None:
            raise ValueError(f"{where}: `import {target}` must have a name: `import {target} as …`")
        flat, bound = flat_name(target), alias.asname or alias.name
        lines += [f"from .{flat} import __name__ as _", f"from . import {flat}" + f" as {bound}" * (bound != flat)]
    if others and isinstance(node, ast.Import):
        lines.insert(0, ast.unparse(ast.Import(others)))
    elif others:
        statement = ast.unparse(ast.ImportFrom(flat_name(node.module), others, level=1))
        if len(statement) > 100:
            head, names = statement.split(" import ")
            statement = f"{head} import (\n    " + ",\n    ".join(names.split(", ")) + ",\n)"
        lines += statement.splitlines()
    return lines


def _is_registration(node: ast.stmt) -> bool:
    """Whether a statement is `AutoConfig.register(…)` or of another auto class."""
    match node:
        case ast.Expr(ast.Call(ast.Attribute(ast.Name(name), "register"))):
            return name.startswith("Auto")
    return False


def constant_sources() -> str:
    """`modules/kernels/cpu/sources.py` with the texts in it, since files that are not Python stay behind."""
    lines = [f"# Written by scripts/export_hub.py.\n{cpp_sources.__doc__!r}\n", "SOURCES = {"]
    for name, text in cpp_sources.SOURCES.items():
        readable = '"""' not in text and text.endswith("\n") and "\r" not in text
        literal = f'r"""{text}"""' if readable else repr(text)
        lines.append(f"    {name!r}: {literal},")
    return "\n".join([*lines, "}", ""])


def hub_code() -> dict[str, str]:
    """Text of every Python file of the export by name.

    Raises:
        ValueError: Two modules would have one name, or an import cannot be rewritten.
    """
    files, required = {}, required_packages()
    for name in module_closure():
        file = f"{flat_name(name)}.py"
        if file in files:
            raise ValueError(f"{name}: another module is {file} already")
        files[file] = constant_sources() if name == cpp_sources.__name__ else rewrite_module(name, required)
    return files


def find_checkpoint(name: str) -> tuple[Path, dict]:
    """The folder of a split checkpoint and what its `config.json` says.

    Raises:
        ValueError: It is none.
    """
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file():
        raise ValueError(f"model={name!r}: must be a checkpoint folder, with a config.json")
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if stored.get("model_type") != ALRDLlamaConfig.model_type:
        raise ValueError(
            f"model={name!r}: is a dense checkpoint (model_type={stored.get('model_type')!r}), must be a split one; "
            "split it first, with scripts/calibrate_svd_ranks.py"
        )
    ALRDLlamaConfig.from_pretrained(folder).check_latent_cache()
    index = folder / "model.safetensors.index.json"
    weights = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    if missing := sorted(file for file in weights if not (folder / file).is_file()):
        raise ValueError(f"model={name!r}: has no {', '.join(missing)}; the weights must be safetensors")
    try:
        AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"model={name!r}: has no tokenizer that can be loaded; save it beside the weights") from error
    return folder, stored


def auto_map() -> dict[str, str]:
    """Where the auto classes find ours. The configuration is that of the model's file: of a local folder, the library
    loads each file named here as a package of its own, and there would be two of its class."""
    classes = {
        "AutoConfig": ALRDLlamaConfig,
        "AutoModel": ALRDLlamaModel,
        "AutoModelForCausalLM": ALRDLlamaForCausalLM,
    }
    return {auto: f"{flat_name(ENTRY)}.{found.__name__}" for auto, found in classes.items()}


def load_record(path: Path) -> dict | None:
    """A JSON file, if it is there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def load_evaluation(path: str, folder: Path) -> dict:
    """Results of `scripts/eval_perplexity.py`.

    Raises:
        ValueError: They are no such results, or of another checkpoint.
    """
    record = load_record(Path(path))
    if record is None or not {"config", "results", "text", "environment"} <= set(record):
        raise ValueError(f"evaluation={path!r}: must be a file that eval_perplexity.py --output wrote")
    if Path(record["config"]["model"]).expanduser().resolve() != folder.resolve():
        raise ValueError(f"evaluation={path!r}: is of {record['config']['model']!r}, must be of {str(folder)!r}")
    return record


def model_card(config: ExportConfig, stored: dict, report: dict | None, evaluation: dict | None) -> str:
    """Text of the card, without the data before it; every figure is one that the records hold."""
    name = Path(config.output).name
    return f"""# {name}

A {stored["dense_model_type"]} model {_split_as(stored)}, quantized and packed to the bit
(`KIVILatentCache`).{_origin(config, report)}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = {name!r}  # this folder, or its name on a hub
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype="auto")
inputs = tokenizer("def main(", return_tensors="pt")
cache = model.create_kivi_cache()  # `generate` makes one by itself; this one can be looked at
output = model.generate(**inputs, past_key_values=cache, max_new_tokens=64)
print(tokenizer.decode(output[0]))
print(cache)
```

{_requirements()}

## Size

{_size(report)}

## Quality

{_quality(evaluation)}

## Limits

- Inference only: a step over the packed cache has no gradient.
- Continuous batching, vLLM and other engines with a cache of their own do not use this one. With a fixed `capacity`
  layers of a sliding window keep all tokens, and only mask.
- The fused kernels are for CUDA devices (Triton) and for Linux on x86-64 with AVX2 (C++, compiled on first use, which
  needs a compiler and ninja). Elsewhere the plain PyTorch reference runs, slower, and a warning says so.
- What the cache stores is lossy unless it is made with `k_bits=16, v_bits=16`, and factors of less than full rank are
  lossy in any case.
- Where the project itself is installed and imported, the library takes its classes and not the code of this folder.

## Code

The Python files are those of the project at commit `{git_commit() or "unknown (exported outside a git checkout)"}`,
written flat by `scripts/export_hub.py`. Their license is Apache-2.0 (`LICENSE.code`).
"""


def _split_as(stored: dict) -> str:
    """What the latents of a checkpoint are made of, as the card's first sentence goes on."""
    if not stored.get("keep_dense"):
        return "whose key and value projections are factored, `W = A·B`, so that its KV cache holds the latents `B·x`"
    sides = "keys and values together" if stored["joint_kv"] else "keys, and of values,"
    layers = stored["layer_group_size"]
    of_layers = f"of each {layers} layers" if layers > 1 else "of each layer"
    return f"whose KV cache holds low-rank latents of {sides} {of_layers} in place of these"


def _origin(config: ExportConfig, report: dict | None) -> str:
    dense = config.base_model or (report and _public(report["config"]["model"]))
    return f" Made from `{dense}`." if dense else ""


def _public(path: str) -> str:
    """Strip local folders from a path or name that a model card shows."""
    return Path(path).name if Path(path).is_absolute() else path


def _requirements() -> str:
    """Sentence with the packages that the code needs, in the ranges of the project."""
    lines = re.findall(r"^([\w-]+)([^;#\n]*)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    ranges = {name: f"{name}{bounds.strip()}" for name, bounds in lines}
    optional = [ranges[name] for name in ("triton", "ninja")]
    needed = [ranges.get(name, name) for name in sorted(required_packages())]
    return (
        f"Needs {', '.join(f'`{name}`' for name in needed)}; the fused kernels "
        f"{' and '.join(f'`{name}`' for name in optional)}."
    )


def _size(report: dict | None) -> str:
    if report is None:
        return "Not stated: the checkpoint has no `report.json`."
    settings = report["config"]
    ranks = []
    for rank in report["truncation_ranks"].values():
        ranks.append(sum(rank) if isinstance(rank, list) else rank)  # of head groups, or of a joint latent
    card = (
        f"At {settings['tokens']:,} tokens the cache of one sequence takes {report['nbytes']:,} bytes "
        f"({human_bytes(report['nbytes'])}), {report['share_of_dense']:.2%} of a dense one in 16 bits, with codes, "
        "scales, zero points, window and sinks counted.\n\n"
        f"Ranks {min(ranks)} to {max(ranks)} per {'latent' if settings.get('keep_dense') else 'projection'}"
    )
    if report.get("energy_kept"):
        kept = list(itertools.chain.from_iterable(report["energy_kept"].values()))
        card += f", which keep {min(kept):.2%} to {max(kept):.2%} of the energy"
    return card + (
        f". Objective `{settings['objective']}`, allocation `{settings['allocation']}`. Everything is in "
        f"`report.json`.\n\n{calibration_table(report, _public)}"
    )


def _quality(evaluation: dict | None) -> str:
    if evaluation is None:
        return "Not measured: no evaluation was given when this folder was written."
    how, machine = evaluation["config"], evaluation["environment"]
    shown, texts = perplexity_table(evaluation["results"]), text_names(how["text"])
    # Several texts are named in the table, too.
    for text in texts:
        shown = shown.replace(text, _public(text))
    text = "`, `".join(map(_public, texts))
    return (
        f"Perplexity through the cache: {how['windows']} windows of {how['length']} tokens of `{text}`, "
        f"{how['prefill']} fed at once, then {how['chunk']} at a time; only tokens nine tenths of whose context is "
        f"packed are scored ({evaluation['scored_tokens_per_window']} per window). {evaluation['dtype']}, "
        f"{machine['device']}, torch {machine['torch']}, transformers {machine['transformers']}, commit "
        f"`{machine['commit']}`. A width in bits replaces the checkpoint's own; `config` is what the checkpoint "
        f"asks for.\n\n{shown}"
    )


def card_data(config: ExportConfig, report: dict | None) -> dict:
    """Front matter of the card; the license is that of the dense model's own card, if that is in a folder here."""
    data = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["kv-cache", "low-rank", "quantization", ALRDLlamaConfig.model_type, "custom_code"],
    }
    dense_card = report and Path(report["config"]["model"]) / "README.md"
    license_name = config.license
    if license_name is None and dense_card and dense_card.is_file():
        license_name = (metadata_load(dense_card) or {}).get("license")
    known = {"base_model": config.base_model, "license": license_name}
    return data | {name: value for name, value in known.items() if value}


def _not_exported(directory: str, names: list[str]) -> list[str]:
    """Names that `shutil.copytree` leaves out; of folders only that of further chat templates goes along."""
    kept = {CHAT_TEMPLATE_DIR} | {name for name in names if Path(name).suffix in COPIED_SUFFIXES}
    return [name for name in names if name not in kept or name == "config.json" or name.startswith(".")]


def main(config: ExportConfig) -> Path:
    """Write the folder, whole or not at all; returns it.

    Raises:
        ValueError: `model` is no split checkpoint with safetensors and tokenizer, `output` is in use, or `evaluation`
            is of another checkpoint.
    """
    folder, stored = find_checkpoint(config.model)
    output = Path(config.output).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output={config.output!r}: must not exist, or be an empty folder")
    evaluation = None if config.evaluation is None else load_evaluation(config.evaluation, folder)
    report = load_record(folder / "report.json")

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as temporary:
        written = Path(temporary) / output.name
        shutil.copytree(folder, written, ignore=_not_exported, copy_function=shutil.copyfile)
        for file, text in hub_code().items():
            (written / file).write_text(text, encoding="utf-8")
        text = json.dumps({**stored, "auto_map": auto_map()}, indent=2, sort_keys=True) + "\n"
        (written / "config.json").write_text(text, encoding="utf-8")
        (written / "README.md").write_text(model_card(config, stored, report, evaluation), encoding="utf-8")
        metadata_save(written / "README.md", card_data(config, report))
        shutil.copyfile(ROOT / "LICENSE", written / "LICENSE.code")
        os.replace(written, output)
    print(f"{output}: {len(list(output.glob('*.py')))} Python files beside {folder}")
    return output


if __name__ == "__main__":
    main(parse_config(ExportConfig, __doc__))
