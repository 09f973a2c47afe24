"""A checkpoint exported for a hub: loaded by processes that cannot import the project, equal to it token for token."""

import ast
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import metadata_load
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, Qwen3Config, dynamic_module_utils

from modeling_alrd_llama import ALRDLlamaForCausalLM
from modules.cache import fixed_store as fixed_cache
from modules.kernels.cpu import library as cpp_library
from modules.kernels.cpu import sources as cpp_sources
from modules.kivi_cache import KIVILatentCache
from scripts import calibrate_svd_ranks, export_hub
from scripts.calibrate_svd_ranks import CalibrationConfig
from scripts.common import git_commit
from scripts.eval_perplexity import EvalConfig, increase_cell
from scripts.eval_perplexity import main as evaluate
from scripts.export_hub import ENTRY, ExportConfig, flat_name, import_lines, main, module_closure
from tests.helpers import TINY_LLAMA, save_byte_tokenizer, tiny_dense

#: What the other process does first: it hides the project, which is installed here, and packages named by the test.
PROLOGUE = """
import importlib, json, pickle, sys

folder, output, names = sys.argv[1:]
names = json.loads(names)

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *args):
        return None if name.split(".")[0] in names else self.finder.find_spec(name, *args)

sys.meta_path[:] = map(Without, sys.meta_path)
for name in names:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} can be imported")

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

def generate(model, cache, ids, mask, new_tokens=24):
    options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **options).tolist()

def load(path):
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()

ids = torch.load(output + "/ids.pt")
mask = torch.ones_like(ids)
mask[1, :7] = 0
model, found = load(folder), {}
"""
EPILOGUE = """
assert not {name.split(".")[0] for name in sys.modules} & set(names)
with open(output + "/found.json", "w") as file:
    json.dump(found, file)
"""

#: Everything that a user of the folder may do.
EVERYTHING = """
for backend in ("cpu", "reference"):
    cache = model.create_kivi_cache(backend=backend)
    found[backend] = generate(model, cache, ids, mask)
    cache.save(f"{output}/{backend}.safetensors")

again = type(cache).load(f"{output}/reference.safetensors")
found["loaded cache"] = str(again) == str(cache).replace("backend reference", "backend cpu")
found["pickled cache"] = pickle.loads(pickle.dumps(cache)).nbytes_used == cache.nbytes_used
found["own cache"] = generate(model, None, ids, mask)
found["pickled model"] = generate(pickle.loads(pickle.dumps(model)), None, ids, mask)
cache = model.create_kivi_cache(quantization_config={"backend": "QuantizedCacheVLM", "nbits": 1, "residual_length": 9})
found["quantization_config"] = generate(model, cache, ids, mask)

found["one configuration class"] = type(model.config) is model.config_class
base = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
found["base model"] = [type(base).__name__, torch.equal(base(ids[:1])[0], model.model(ids[:1])[0])]
dense, config = model.to_dense(), model.config.to_dict()
found["dense"] = type(dense).__module__
config = type(model.config).from_llama(dense.config, truncation_ranks=config["truncation_ranks"])
split = type(model).from_dense(dense, config)
found["split again"] = generate(split, split.create_kivi_cache(k_bits=16, v_bits=16), ids, mask)
found["of its dense"] = generate(dense, None, ids, mask)

model.save_pretrained(output + "/saved again")
found["saved again"] = generate(load(output + "/saved again"), None, ids, mask)

tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
pipe = pipeline("text-generation", model=folder, trust_remote_code=True)
found["pipeline"] = [type(pipe.model).__name__, pipe(tokenizer.decode(ids[0]), max_new_tokens=8, do_sample=False)]

library = importlib.import_module(type(model).__module__.rpartition(".")[0] + ".kernels_cpu_library")
found["library"] = str(library._path())
"""

ROOTS = sorted({name.split(".")[0] for name in module_closure()} | {"scripts", "tests"})


SHAPE = {"vocab_size": 257, "num_hidden_layers": 2, "num_key_value_heads": 4, "head_dim": 8, "bos_token_id": 0}


def save_checkpoint(folder: Path, seed: int = 0, dense=None, **options) -> Path:
    """A small random Llama, or another dense model, and its calibration to tiers with static scales, by the script with
    further `options`; returns the split one."""
    dense = tiny_dense(seed, **SHAPE) if dense is None else dense
    dense.save_pretrained(folder / "dense")
    save_byte_tokenizer(folder / "dense")
    (folder / "dense" / "README.md").write_text("---\nlicense: mit\n---\n# A dense model\n")
    words = random.Random(seed)
    text = " ".join("".join(words.choices("etaoinshrdlu", k=words.randint(2, 9))) for _ in range(500))
    (folder / "text.txt").write_text(text)
    calibrate_svd_ranks.main(
        CalibrationConfig(
            model=str(folder / "dense"),
            output=str(folder / "split"),
            budget=0.2,
            tokens=512,
            text=str(folder / "text.txt"),
            windows=4,
            length=140,
            rank_multiple=1,
            statistics=str(folder / "statistics"),
            **{"keep_dense": False} | options,
        )
    )
    return folder / "split"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the checkpoint in `split`, an `evaluation.json` of it, and both exported to `hub-1.5`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("place")
    split = save_checkpoint(place)
    how = {"dense": str(place / "dense"), "text": str(place / "text.txt"), "output": str(place / "evaluation.json")}
    evaluate(EvalConfig(model=str(split), windows=2, length=320, prefill=270, bits=["16", "config"], **how))
    main(ExportConfig(model=str(split), output=str(place / "hub-1.5"), evaluation=str(place / "evaluation.json")))
    torch.set_num_threads(threads)
    return place


def prompt(length: int = 150) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of bytes, the second with seven pads on the left."""
    ids = torch.randint(1, 257, (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    return ids, mask


def run(code: str, model: str, folder: Path, ids: torch.Tensor, hidden=(), **environment) -> dict:
    """What `code` finds out about the model of that path, or name on a hub, in a fresh isolated process."""
    folder.mkdir(exist_ok=True)
    torch.save(ids, folder / "ids.pt")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_", "TRITON_"))}
    environment = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment
    arguments = [model, str(folder), json.dumps([*ROOTS, *hidden])]
    process = subprocess.run(
        [sys.executable, "-I", "-c", PROLOGUE + code + EPILOGUE, *arguments],
        cwd=folder,
        env=inherited | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return json.loads((folder / "found.json").read_text()) | {"said": process.stdout + process.stderr}


def generate(model, cache, ids, mask, new_tokens: int = 24) -> list[list[int]]:
    options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **options).tolist()


def test_a_machine_without_the_project(place, tmp_path):
    ids, mask = prompt()
    found = run(EVERYTHING, str(place / "hub-1.5"), tmp_path, ids)
    model = ALRDLlamaForCausalLM.from_pretrained(place / "split").eval()
    for backend in ("cpu", "reference"):
        cache = model.create_kivi_cache(backend=backend)
        expected = generate(model, cache, ids, mask)
        assert all(layer.pool.used for layer in cache.layers) and cache.layer_schemes
        assert found[backend] == expected, backend
        cache.save(tmp_path / "expected.safetensors")
        stored, here = load_file(tmp_path / f"{backend}.safetensors"), load_file(tmp_path / "expected.safetensors")
        assert str(KIVILatentCache.load(tmp_path / f"{backend}.safetensors", backend=backend)) == str(cache)
        assert stored.keys() == here.keys() and all(torch.equal(stored[name], here[name]) for name in here)
    assert found["own cache"] == found["pickled model"] == found["saved again"] == found["cpu"]
    cache = model.create_kivi_cache(
        quantization_config={"backend": "QuantizedCacheVLM", "nbits": 1, "residual_length": 9}
    )
    assert found["quantization_config"] == generate(model, cache, ids, mask)
    assert found["loaded cache"] and found["pickled cache"]
    assert found["one configuration class"]
    assert found["base model"] == ["ALRDLlamaModel", True]
    assert found["dense"] == "transformers.models.llama.modeling_llama"
    assert found["split again"] == found["of its dense"]
    assert found["pipeline"][0] == "ALRDLlamaForCausalLM"
    tokenizer = AutoTokenizer.from_pretrained(place / "split")
    text = tokenizer.decode(ids[0])
    again = tokenizer(text, return_tensors="pt").input_ids
    expected = model.generate(again, attention_mask=torch.ones_like(again), max_new_tokens=8, do_sample=False)
    assert found["pipeline"][1] == [{"generated_text": text + tokenizer.decode(expected[0, again.shape[1] :])}]
    assert found["library"] == str(cpp_library._path())


def test_another_architecture(tmp_path):
    """A Qwen3 with latents of keys and values together, by the commands, on a machine without the project."""
    dense = AutoModelForCausalLM.from_config(Qwen3Config(**{**TINY_LLAMA, **SHAPE})).eval()
    split = save_checkpoint(tmp_path, dense=dense, keep_dense=True, joint_kv=True)
    main(ExportConfig(model=str(split), output=str(tmp_path / "hub")))
    ids, mask = prompt()
    found = run('found["tokens"] = generate(model, None, ids, mask)', str(tmp_path / "hub"), tmp_path / "other", ids)
    model = ALRDLlamaForCausalLM.from_pretrained(split).eval()
    assert found["tokens"] == generate(model, None, ids, mask) and model.config.dense_model_type == "qwen3"


@pytest.mark.interpreter
def test_triton_kernels(place, tmp_path):
    """Triton reads the sources of its kernels, here from the library's folder of modules."""
    code = """
cache = model.create_kivi_cache(backend="triton")
found["tokens"] = generate(model, cache, ids, mask, 2)
found["blocks"] = [layer.pool.used for layer in cache.layers]
"""
    ids, mask = prompt(62)
    found = run(code, str(place / "hub-1.5"), tmp_path, ids, TRITON_INTERPRET="1")
    model = ALRDLlamaForCausalLM.from_pretrained(place / "split").eval()
    assert found["tokens"] == generate(model, model.create_kivi_cache(backend="reference"), ids, mask, 2)
    assert all(found["blocks"])


def test_a_repository_on_a_hub_without_triton(place, tmp_path):
    """The library downloads the files of a repository one by one and asks for every package that one imports."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "home" / "hub" / "models--someone--a.model-2"
    shutil.copytree(place / "hub-1.5", repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    code = """
found["class"] = [type(model).__module__, type(model.config) is model.config_class]
found["tokens"] = generate(model, None, ids, mask)
"""
    ids, mask = prompt()
    found = run(code, "someone/a.model-2", tmp_path, ids, hidden=["triton", "matplotlib", "accelerate"])
    module, same = found["class"]
    assert module.startswith("transformers_modules.someone.") and revision in module and same
    model = ALRDLlamaForCausalLM.from_pretrained(place / "split").eval()
    assert found["tokens"] == generate(model, None, ids, mask)


def test_beside_the_project(place, tmp_path, monkeypatch):
    """Where the project is imported its classes are taken, and a copy of the code changes nothing of them."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    hub = str(place / "hub-1.5")
    assert type(AutoModelForCausalLM.from_pretrained(hub, trust_remote_code=True)) is ALRDLlamaForCausalLM
    assert type(AutoModelForCausalLM.from_pretrained(hub)) is ALRDLlamaForCausalLM
    registered = CONFIG_MAPPING["alrd_llama"]
    copied = dynamic_module_utils.get_class_from_dynamic_module(f"{ENTRY}.ALRDLlamaForCausalLM", hub)
    assert copied is not ALRDLlamaForCausalLM and CONFIG_MAPPING["alrd_llama"] is registered
    ids, mask = prompt()
    found = [generate(cls.from_pretrained(hub).eval(), None, ids, mask) for cls in (copied, ALRDLlamaForCausalLM)]
    assert found[0] == found[1]
    theirs = sys.modules[copied.__module__.rpartition(".")[0] + ".cache_fixed_store"]._append_in_graph
    assert theirs._qualname != fixed_cache._append_in_graph._qualname
    pickle.loads(pickle.dumps(copied))


def definitions(path: Path) -> set[str]:
    """Names that a module binds at its top, `if` and `try` included."""
    found = {"__name__"}

    def visit(statements: list[ast.stmt]):
        for node in statements:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                found.update(alias.asname or alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update(n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name))
            elif isinstance(node, (ast.If, ast.Try)):
                visit([*node.body, *node.orelse])

    visit(ast.parse(path.read_text()).body)
    return found


def test_every_import_of_the_exported_code_resolves(place):
    hub = place / "hub-1.5"
    files = sorted(hub.glob("*.py"))
    assert {f"{flat_name(name)}.py" for name in module_closure()} == {file.name for file in files}
    for file in files:
        for node in ast.walk(compile(file.read_text(), str(file), "exec", ast.PyCF_ONLY_AST)):
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & set(ROOTS), file
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] not in ROOTS, file
            elif isinstance(node, ast.ImportFrom) and node.module:
                assert node.level == 1 and {a.name for a in node.names} <= definitions(hub / f"{node.module}.py"), file
            elif isinstance(node, ast.ImportFrom):
                assert all((hub / f"{alias.name}.py").is_file() for alias in node.names), file
    # What the library takes along of a folder is all of it.
    found = dynamic_module_utils.get_relative_import_files(hub / f"{ENTRY}.py")
    assert {Path(path) for path in found} | {hub / f"{ENTRY}.py"} == set(files)


def test_the_texts_of_the_kernels_are_all_there(place):
    scope = {}
    exec((place / "hub-1.5" / f"{flat_name(cpp_sources.__name__)}.py").read_text(), scope)
    assert scope["SOURCES"] == cpp_sources.SOURCES and list(scope["SOURCES"]) == list(cpp_sources.SOURCES)
    assert {path.name for path in Path(cpp_sources.__file__).parent.glob("*.[ch]*")} == set(cpp_sources.SOURCES)


def test_any_text_becomes_a_constant(monkeypatch):
    texts = ["plain\n", "a \\n b\\\n", '"""\n', "no newline at the end\\", "carriage\r\nreturn\n", "'quoted'\n", ""]
    sources = {f"{i}.cpp": text for i, text in enumerate(texts)}
    monkeypatch.setattr(cpp_sources, "SOURCES", sources)
    scope = {}
    exec(export_hub.constant_sources(), scope)
    assert scope["SOURCES"] == sources


def test_files_beside_the_code(place):
    hub, split = place / "hub-1.5", place / "split"
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (hub / name).read_bytes() == (split / name).read_bytes()
    stored, exported = (json.loads((folder / "config.json").read_text()) for folder in (split, hub))
    auto_map = exported.pop("auto_map")
    assert exported == stored
    assert auto_map.keys() == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert "Apache License" in (hub / "LICENSE.code").read_text()


def test_card_has_the_measured_figures(place, tmp_path):
    card = (place / "hub-1.5" / "README.md").read_text()
    report = json.loads((place / "split" / "report.json").read_text())
    results = json.loads((place / "evaluation.json").read_text())["results"]
    assert f"At 512 tokens the cache of one sequence takes {report['nbytes']:,} bytes" in card
    assert f"{report['share_of_dense']:.2%} of a dense one" in card
    for result in results.values():
        assert f"| {result['perplexity']:.3f} | {increase_cell(result, results['dense'])} |" in card
    assert f"commit `{git_commit()}`" in card and str(place) not in card
    data = metadata_load(place / "hub-1.5" / "README.md")
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert data["license"] == "mit" and "base_model" not in data  # the dense model has no name on a hub

    (place / "split" / "report.json").rename(tmp_path / "report.json")
    try:
        main(ExportConfig(model=str(place / "split"), output=str(tmp_path / "bare"), base_model="someone/llama"))
    finally:
        (tmp_path / "report.json").rename(place / "split" / "report.json")
    card = (tmp_path / "bare" / "README.md").read_text()
    assert "Not stated: the checkpoint has no `report.json`" in card and "Not measured: no evaluation" in card
    data = metadata_load(tmp_path / "bare" / "README.md")
    assert data["base_model"] == "someone/llama" and "license" not in data


def test_card_says_what_shares_a_latent(place, tmp_path):
    config = ExportConfig(model=str(place / "split"), output=str(tmp_path / "hub"))
    stored = json.loads((place / "split" / "config.json").read_text())
    assert "whose key and value projections are factored" in export_hub.model_card(config, stored, None, None)
    stored |= {"keep_dense": True, "layer_group_size": 3, "joint_kv": True}
    card = export_hub.model_card(config, stored, None, None)
    assert "low-rank latents of keys and values together of each 3 layers in place of these, quantized" in card
    stored |= {"layer_group_size": 1, "joint_kv": False}
    assert "low-rank latents of keys, and of values, of each layer" in export_hub.model_card(config, stored, None, None)


def test_card_names_several_texts_without_their_folders(place, tmp_path):
    record = json.loads((place / "evaluation.json").read_text())
    record["config"]["text"] = [str(tmp_path / "speeches.txt"), "manual"]
    for result in record["results"].values():
        result["domains"] = {text: dict(result) for text in record["config"]["text"]}
    quality = export_hub._quality(record)
    assert "tokens of `speeches.txt`, `manual`, " in quality and str(tmp_path) not in quality
    assert quality.count("| – speeches.txt |") == 3 and "Worst text: " in quality


def test_nothing_is_left_of_a_broken_export(place, tmp_path, monkeypatch):
    monkeypatch.setattr(export_hub, "model_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(ExportConfig(model=str(place / "split"), output=str(tmp_path / "hub")))
    assert not list(tmp_path.iterdir())


class TestRefusals:
    def test_dense(self, place, tmp_path):
        with pytest.raises(ValueError, match=r"is a dense checkpoint \(model_type='llama'\), must be a split one"):
            main(ExportConfig(model=str(place / "dense"), output=str(tmp_path / "hub")))

    def test_no_checkpoint(self, place, tmp_path):
        with pytest.raises(ValueError, match=r"must be a checkpoint folder, with a config\.json"):
            main(ExportConfig(model=str(tmp_path), output=str(tmp_path / "hub")))

    @pytest.mark.parametrize(
        ("missing", "message"), [("model.safetensors", "no model.safetensors"), ("tokenizer.json", "no tokenizer")]
    )
    def test_missing_files(self, place, tmp_path, missing, message):
        shutil.copytree(place / "split", tmp_path / "split")
        (tmp_path / "split" / missing).unlink()
        with pytest.raises(ValueError, match=message):
            main(ExportConfig(model=str(tmp_path / "split"), output=str(tmp_path / "hub")))

    def test_output_in_use(self, place):
        with pytest.raises(ValueError, match="must not exist, or be an empty folder"):
            main(ExportConfig(model=str(place / "split"), output=str(place / "hub-1.5")))

    def test_evaluation_of_another_checkpoint(self, place, tmp_path):
        shutil.copytree(place / "split", tmp_path / "other")
        how = {"output": str(tmp_path / "hub"), "evaluation": str(place / "evaluation.json")}
        with pytest.raises(ValueError, match=r"evaluation=.*must be of .*other"):
            main(ExportConfig(model=str(tmp_path / "other"), **how))
        how["evaluation"] = str(place / "split" / "report.json")
        with pytest.raises(ValueError, match=r"must be a file that eval_perplexity\.py --output wrote"):
            main(ExportConfig(model=str(place / "split"), **how))


@pytest.mark.parametrize(
    ("statement", "lines"),
    [
        ("from modules.quant_utils import grid as g, require", ["from .quant_utils import grid as g, require"]),
        ("from modules.kernels import MAX_QUERY_LENGTH", ["from .kernels import MAX_QUERY_LENGTH"]),
        (
            "from modules.kernels import BACKENDS, packed as p",
            [
                "from .kernels_packed import __name__ as _",
                "from . import kernels_packed as p",
                "from .kernels import BACKENDS",
            ],
        ),
        (
            "from modules.cache import codecs",
            ["from .cache_codecs import __name__ as _", "from . import cache_codecs as codecs"],
        ),
        (
            "import os, modules.kernels.packed as packed",
            ["import os", "from .kernels_packed import __name__ as _", "from . import kernels_packed as packed"],
        ),
        ("import os.path, torch", None),
        ("from torch import nn", None),
        ("import triton", ["try:", "    import triton", "except ImportError:", "    raise"]),
    ],
)
def test_import_forms(statement, lines):
    assert import_lines(ast.parse(statement).body[0], {"torch"}, "here:1") == lines


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("import modules.files", "here:1: `import modules.files` must have a name"),
        ("from . import x", "absolutely"),
    ],
)
def test_import_forms_that_cannot_be_rewritten(statement, message):
    with pytest.raises(ValueError, match=message):
        import_lines(ast.parse(statement).body[0], {"torch"}, "here:1")
