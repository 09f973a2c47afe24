"""How the C++ kernels are built: once, apart from other machines and sources, and with what said when it cannot be."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from modules.kernels.cpu import library as cpp_library
from modules.kernels.cpu.library import library

ROOT = Path(__file__).parent.parent

#: A source that compiles in a moment, and what is left of a library when it runs.
SOURCE = """
#include <cstdint>
extern "C" int64_t sum_threads(const float* x, int64_t n, float scale, int64_t threads) {
    int64_t sum = x ? 0 : -100;
#pragma omp parallel num_threads(threads) reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += scale * x[i];
    return sum;
}
"""
CODE = """
import ctypes, sys, torch
from modules.kernels.cpu import library as cpp_library
def runtimes():  # the library may load those of other packages
    return {line.split()[-1] for line in open("/proc/self/maps") if "/libgomp" in line or "/libiomp" in line}
before = runtimes()
cpp_library.SOURCES = {"sum.cpp": sys.argv[1]}
x = torch.arange(4.0)
sum_threads = cpp_library.library().sum_threads
sum_threads.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int64]
sum_threads.restype = ctypes.c_int64
print(sum_threads(x.data_ptr(), 4, 2.0, 3), sum_threads(None, 0, 1.0, 1))
print(len(before) > 0, len(runtimes() - before))
"""


@pytest.fixture
def sources(tmp_path, monkeypatch) -> dict[str, str]:
    """Sources of the test's own, and an empty folder for what is built."""
    sources = {"sum.cpp": SOURCE}
    monkeypatch.setattr(cpp_library, "SOURCES", sources)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return sources


def build() -> Path:
    path = cpp_library._path()
    cpp_library._build(path)
    return path


def start() -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", CODE, SOURCE], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_processes_build_at_once_and_share_the_openmp_of_torch(sources, tmp_path, monkeypatch):
    processes = [start() for _ in range(2)]
    outputs = [process.communicate() for process in processes]
    assert [out.splitlines() for out, _ in outputs] == [["36 -100", "True 0"]] * 2, outputs
    (built,) = (tmp_path / "built").iterdir()
    # Another process takes it as it is: without a path there is neither ninja nor a compiler.
    written = built.stat().st_mtime_ns
    monkeypatch.setenv("PATH", "")
    out, error = start().communicate()
    assert out.splitlines() == ["36 -100", "True 0"], error
    assert built.stat().st_mtime_ns == written


def test_a_broken_build_leaves_nothing_behind(sources, tmp_path):
    sources["sum.cpp"] = SOURCE.replace("sum = x", "sum = y")
    with pytest.raises(RuntimeError, match=r"do not compile: .*sum.cpp:4:\d+: error: .*y.* was not declared") as error:
        build()
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "built").iterdir())
    sources["sum.cpp"] = SOURCE
    path = build()
    assert list((tmp_path / "built").iterdir()) == [path]


def test_the_name_follows_what_the_library_depends_on(sources, monkeypatch):
    names = [cpp_library._path()]
    with monkeypatch.context() as patch:
        patch.setenv("ALRD_CPU_MARCH", "haswell")
        names.append(cpp_library._path())
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "/usr/bin/another")
        names.append(cpp_library._path())
    with monkeypatch.context() as patch:
        patch.setattr(cpp_library, "_processor", lambda: "another")
        names.append(cpp_library._path())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.99")
        names.append(cpp_library._path())
    sources["shared.h"] = ""
    names.append(cpp_library._path())
    assert len(set(names)) == len(names)
    del sources["shared.h"]
    assert cpp_library._path() == names[0]


def test_what_is_missing_is_said(sources, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "no-such-compiler -m64")
        with pytest.raises(RuntimeError, match="need a compiler: 'no-such-compiler -m64' is not found"):
            build()
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: False)
    with pytest.raises(RuntimeError, match="need ninja to be built: it is not found"):
        build()


def test_a_folder_that_cannot_be_written_is_said(sources, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "folder"))
    cpp_library._load.cache_clear()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"cannot be stored or loaded: .*file"):
            library()
    assert cpp_library._load.cache_info().hits == 1
    cpp_library._load.cache_clear()


@pytest.mark.parametrize(("function", "value"), [("machine", "aarch64"), ("system", "Darwin")])
def test_other_machines_are_refused(monkeypatch, function, value):
    monkeypatch.setattr(platform, function, lambda: value)
    with pytest.raises(RuntimeError, match=f"are for Linux on x86_64, not .*{value}"):
        cpp_library._path()


def test_a_processor_without_the_instructions_is_refused(monkeypatch):
    monkeypatch.setattr(cpp_library, "_REQUIRED", ("avx2", "avx9"))
    with pytest.raises(RuntimeError, match="need a processor with avx2, avx9: avx9 missing"):
        cpp_library._path()
