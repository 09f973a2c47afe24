"""Imports point one way: quantization maths and packing, cache and attention, modeling, the fit to a budget, scripts.

And what Triton kernels may not hold on every supported release; `tests/test_launch_path.py` launches them.
"""

import ast
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

#: Files and folders from the ground up: a module may import from those below its own, and inside a folder from its
#: neighbours, without a circle.
ORDER = [
    "configuration_alrd_llama",
    "modules.files",
    "modules.hadamard_utils",
    "modules.quant_utils",
    "modules.trellis_points",
    "modules.trellis",
    "modules.svd_linear",
    "modules.projections",
    "modules.kernels",
    "modules.cache",
    "modules.kivi_cache",
    "modules.decode_graph",
    "modules.latent_step",
    "modules.formats",
    "modules",
    "modules.loading",
    "modeling_alrd_llama",
    "modules.fit",
    "modules.vllm",
    "scripts",
]


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def sources() -> list[Path]:
    return [*ROOT.glob("*.py"), *(ROOT / "modules").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]


def imported(path: Path) -> set[str]:
    names, modules = set(), set(map(module_name, sources()))
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports cannot be loaded as hub code"
            # `from modules.cache import codecs` imports a module, not the package.
            names.update(
                name if name in modules else node.module for name in (f"{node.module}.{a.name}" for a in node.names)
            )
    return names


def room(name: str) -> int | None:
    """Place in `ORDER` of a module, which may lie in a folder that is listed there; `None`: it is none of ours."""
    if name in ORDER or "." not in name:
        return ORDER.index(name) if name in ORDER else None
    found = room(name.rpartition(".")[0])
    return None if found == ORDER.index("modules") else found  # its own are listed one by one


def test_every_module_has_a_room():
    homeless = [path for path in sources() if room(module_name(path)) is None]
    assert not homeless


def test_imports_point_one_way():
    for path in sources():
        name = module_name(path)
        for target in imported(path):
            assert room(target) is None or room(target) <= room(name), f"{name} imports {target}"


def test_imports_make_no_circle():
    names = {module_name(path) for path in sources()}
    waiting = {module_name(path): imported(path) & names for path in sources()}
    while free := [name for name, targets in waiting.items() if not targets & set(waiting)]:
        for name in free:
            del waiting[name]
    assert not waiting


def test_configuration_imports_no_torch():
    assert not any(name.split(".")[0] == "torch" for name in imported(ROOT / "configuration_alrd_llama.py"))


def test_nothing_but_scripts_imports_scripts():
    for path in sources():
        if not module_name(path).startswith("scripts"):
            assert not any(name.split(".")[0] == "scripts" for name in imported(path)), path


def test_every_package_is_installed():
    packages = {module_name(path) for path in sources() if path.name == "__init__.py"}
    assert set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]) == packages


def test_no_path_of_a_machine_is_written_down():
    for path in [*sources(), *ROOT.glob("*.md"), ROOT / "Makefile"]:
        for line in path.read_text().splitlines():
            assert not any(f"/{place}/" in line for place in ("work", "home", "root", "Users")), f"{path}: {line}"


# ---- Triton kernels


def is_jit(node: ast.AST) -> bool:
    """Whether it is a function that Triton compiles."""
    return isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)


def jit_functions() -> list[tuple[Path, ast.FunctionDef]]:
    return [(path, node) for path in sources() for node in ast.walk(ast.parse(path.read_text())) if is_jit(node)]


def within(node: ast.AST, left_out) -> Iterator[ast.AST]:
    """What stands in `node` but outside of parts that are left out."""
    for child in ast.iter_child_nodes(node):
        if not left_out(child):
            yield child
            yield from within(child, left_out)


def test_no_kernel_reads_a_float_global():
    """A launch compares globals with what was compiled, and NaN is never equal; Inductor cannot write Inf down."""
    pytest.importorskip("triton")
    for path, function in jit_functions():
        known = vars(import_module(module_name(path)))
        for node in ast.walk(function):
            if isinstance(node, ast.Name) and node.id in known:
                value = getattr(known[node.id], "value", known[node.id])
                assert not isinstance(value, float), f"{path}: {function.name} reads {node.id}={value}"


def test_no_tuple_of_a_kernel_holds_none():
    """Triton 3.6 compiles no such tuple. So `None` is only compared with, and what is compared stands in no tuple."""
    optional, elements = set(), set()
    for path, function in jit_functions():
        indices = {node.slice for node in ast.walk(function) if isinstance(node, ast.Subscript)}
        nodes = list(within(function, indices.__contains__))
        nones = {node for node in nodes if isinstance(node, ast.Constant) and node.value is None}
        comparisons = [n for n in nodes if isinstance(n, ast.Compare) and nones & set(n.comparators)]
        stray = nones - {n for comparison in comparisons for n in comparison.comparators}
        assert not stray, f"{path}: {function.name} holds None in line {[n.lineno for n in stray]}"
        optional |= {ast.unparse(comparison.left) for comparison in comparisons}
        elements |= {(ast.unparse(e), function.name) for n in nodes if isinstance(n, ast.Tuple) for e in n.elts}
    held = [(element, function) for element, function in elements if element in optional]
    assert optional and not held, f"may be None, and stand in a tuple: {held}"


def test_elements_of_constant_tuples_reach_functions_as_known():
    """Triton 3.6 hands them over bare, which a function does not take: `known` makes constants of them."""
    for path, function in jit_functions():
        constants = {a.arg for a in function.args.args if a.annotation and "constexpr" in ast.unparse(a.annotation)}
        for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
            if isinstance(call.func, ast.Name) and call.func.id != "known":
                for node in within(call, lambda child: isinstance(child, ast.Call)):
                    bare = isinstance(node, ast.Subscript) and ast.unparse(node.value) in constants
                    assert not bare, f"{path}: {function.name} passes {ast.unparse(node)} to {call.func.id}"


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def library() -> list[Path]:
    return [*ROOT.glob("*.py"), *(ROOT / "modules").rglob("*.py")]


def test_an_expression_has_one_for_and_one_if():
    """What needs more is easier to read as a loop."""
    dense = []
    for path in library():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, COMPREHENSIONS):
                inside = list(within(node, lambda child: False))
                loops = len(node.generators) + sum(isinstance(child, COMPREHENSIONS) for child in inside)
                conditions = sum(len(generator.ifs) for generator in node.generators)
                if loops > 1 or conditions > 1 or any(isinstance(child, ast.IfExp) for child in inside):
                    dense.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not dense


def test_the_library_is_not_dense():
    """Comprehensions and ternaries per 1,000 lines, share of comments, and the longest class."""
    lines, comments, comprehensions, ternaries = 0, 0, 0, 0
    for path in (ROOT / "modules").rglob("*.py"):
        text = path.read_text()
        lines += len(text.splitlines())
        comments += sum(line.lstrip().startswith("#") for line in text.splitlines())
        for node in ast.walk(ast.parse(text)):
            comprehensions += isinstance(node, COMPREHENSIONS)
            ternaries += isinstance(node, ast.IfExp)
    assert comprehensions < 0.012 * lines and ternaries < 0.010 * lines
    assert comments >= 0.04 * lines


def test_no_class_is_long():
    for path in library():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                assert node.end_lineno - node.lineno < 250, f"{path}: {node.name}"


def test_no_banners():
    for path in [*library(), *(ROOT / "scripts").rglob("*.py")]:
        assert not any(line.startswith("# ---") for line in path.read_text().splitlines()), path


def test_caches_do_not_ask_for_a_capacity():
    """Layers know whether they have one; the cache treats them alike, once it has made them."""
    for path in ROOT / "modules" / "kivi_cache.py", ROOT / "modules" / "cache" / "transactions.py":
        classes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
        assert classes
        for node in within(ast.Module(classes, []), lambda child: False):
            if isinstance(node, (ast.If, ast.IfExp)):
                assert "capacity" not in ast.unparse(node.test), f"{path}:{node.lineno}"
