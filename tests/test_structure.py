"""Imports point one way: quantization maths and packing, then cache and attention, then modeling, then scripts."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: Rooms from the ground up; a module may import from rooms below its own, never from the same or a higher one, except
#: that the maths of one room may build on each other in the order listed.
ORDER = [
    "configuration_alrd_llama",
    "modules.files",
    "modules.fingerprint",
    "modules.cache_file",
    "modules.distributed",
    "modules.hadamard_utils",
    "modules.quant_utils",
    "modules.svd_linear",
    "modules.kernels.packed",
    "modules.kernels.attention",
    "modules.kernels.quantize_triton",
    "modules.kernels.attention_triton",
    "modules.kernels.append_triton",
    "modules.kernels.cpp_sources",
    "modules.kernels.cpp_library",
    "modules.kernels.quantize_cpu",
    "modules.kernels.lookup_attention",
    "modules.kernels.attention_cpu",
    "modules.kernels",
    "modules.codecs",
    "modules.token_scores",
    "modules.vidkv",
    "modules.block_pool",
    "modules.fixed_cache",
    "modules.cache_layer",
    "modules.kivi_cache",
    "modules.decode_graph",
    "modules.qlutattn",
    "modules.calibrated_int8",
    "modules.statistics",
    "modules.calibration",
    "modules.allocation",
    "modules.rank_search",
    "modules",
    "modeling_alrd_llama",
    "scripts",
]


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def sources() -> list[Path]:
    return [*ROOT.glob("*.py"), *(ROOT / "modules").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports cannot be loaded as hub code"
            # `from modules import codecs` imports a module, not the package.
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            names.update(submodules if submodules <= set(ORDER) else {node.module})
    return names


def room(name: str) -> int | None:
    if name in ORDER:
        return ORDER.index(name)
    return ORDER.index("scripts") if name.startswith("scripts.") else None


def test_every_module_has_a_room():
    homeless = [path for path in sources() if room(module_name(path)) is None]
    assert not homeless


def test_imports_point_one_way():
    for path in sources():
        name = module_name(path)
        for target in imported(path):
            if room(target) is not None and target != name:
                below = room(target) < room(name) or (room(target) == room(name) == ORDER.index("scripts"))
                assert below, f"{name} imports {target}"


def test_configuration_imports_no_torch():
    assert not any(name.split(".")[0] == "torch" for name in imported(ROOT / "configuration_alrd_llama.py"))


def test_nothing_but_scripts_imports_scripts():
    for path in sources():
        if not module_name(path).startswith("scripts"):
            assert not any(name.split(".")[0] == "scripts" for name in imported(path)), path


def test_no_path_of_a_machine_is_written_down():
    for path in [*sources(), *ROOT.glob("*.md"), ROOT / "Makefile"]:
        for line in path.read_text().splitlines():
            assert not any(f"/{place}/" in line for place in ("work", "home", "root", "Users")), f"{path}: {line}"
