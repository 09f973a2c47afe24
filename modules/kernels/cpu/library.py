"""The C++ kernels as one shared library, built on first use and kept.

Every `*.cpp` of `sources.py` is compiled, as C++17 with `extern "C"` functions on raw pointers and no header of
PyTorch, by `torch.utils.cpp_extension`. The result stands in PyTorch's folder of extensions (`TORCH_EXTENSIONS_DIR`, or
`~/.cache/torch_extensions`) under a name that hashes sources, flags, compiler, PyTorch and processor: a changed source
or another machine with the same home directory builds its own. A build happens in a folder of its own and is moved
into place when it is complete, so that processes may build at once and a broken build leaves nothing behind.

The functions share PyTorch's OpenMP runtime: the library names none of its own and finds the symbols in `libtorch_cpu`.

`ALRD_CPU_MARCH` chooses the instructions (the compiler's `-march`; default "native"): "haswell" is AVX2 with FMA and
F16C, the least that the kernels are written for.
"""

import ctypes
import hashlib
import os
import platform
import re
import shutil
import sysconfig
import tempfile
from functools import lru_cache
from pathlib import Path

import torch

from modules.kernels.cpu.sources import SOURCES

#: Environment variable with the compiler's `-march`.
MARCH_VARIABLE = "ALRD_CPU_MARCH"

#: Without contraction and with IEEE divisions the kernels give the reference's bits; a fused product is written out.
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-Wno-psabi")
#: Force-links libtorch_cpu: the linker would drop it as unused, and OpenMP's symbols with it.
_LINKER_FLAGS = ("-Wl,--no-as-needed",)
_REQUIRED = ("avx2", "fma", "f16c")


def library() -> ctypes.CDLL:
    """The library; the first call on a machine takes the seconds of a compilation.

    Raises:
        RuntimeError: Something to build it is missing, or the processor has no AVX2. It is tried once in a process.
    """
    found = _load()
    if isinstance(found, RuntimeError):
        raise RuntimeError(str(found)) from found
    return found


@lru_cache(maxsize=1)
def _load() -> ctypes.CDLL | RuntimeError:
    try:
        path = _path()
        if not path.exists():
            _build(path)
        return ctypes.CDLL(str(path))
    except RuntimeError as error:
        return error
    except OSError as error:
        return RuntimeError(f"the C++ kernels cannot be stored or loaded: {error}")


def _processor() -> str:
    """The processor's model and features.

    Raises:
        RuntimeError: Not Linux on x86 with AVX2, FMA and F16C.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise RuntimeError(f"the C++ kernels are for Linux on x86_64, not {platform.system()} on {platform.machine()}")
    # All cores of a machine are alike.
    first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    fields = dict(re.findall(r"^(.*?)\s*: (.*)$", first, re.MULTILINE))
    missing = set(_REQUIRED) - set(fields["flags"].split())
    if missing:
        raise RuntimeError(
            f"the C++ kernels need a processor with {', '.join(_REQUIRED)}: {', '.join(missing)} missing"
        )
    return fields["model name"] + fields["flags"]


def _flags() -> list[str]:
    return [*_FLAGS, f"-march={os.environ.get(MARCH_VARIABLE) or 'native'}"]


def _path() -> Path:
    """Path of the library of these sources on this machine."""
    from torch.utils.cpp_extension import get_cxx_compiler, get_default_build_root

    parts = [_processor(), torch.__version__, get_cxx_compiler(), *_flags(), *_LINKER_FLAGS]
    digest = hashlib.sha256("\0".join(parts).encode())
    for name, text in SOURCES.items():
        digest.update(name.encode() + b"\0" + text.encode() + b"\0")
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    return Path(root) / f"alrd_kernels_{digest.hexdigest()[:16]}.so"


def _build(path: Path) -> None:
    from torch.utils import cpp_extension

    compiler = cpp_extension.get_cxx_compiler()
    if not shutil.which(compiler.split()[0]):
        raise RuntimeError(f"the C++ kernels need a compiler: {compiler!r} is not found (install g++, or set CXX)")
    search_path = os.environ.get("PATH", "")
    # PyTorch looks for ninja there; pip puts it beside a Python that need not be on the path.
    os.environ["PATH"] = os.pathsep.join([search_path, sysconfig.get_path("scripts")])
    try:
        if not cpp_extension.is_ninja_available():
            raise RuntimeError("the C++ kernels need ninja to be built: it is not found (pip install ninja)")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=path.stem, dir=path.parent) as folder:
            for name, text in SOURCES.items():
                Path(folder, name).write_text(text, encoding="utf-8")
            built = cpp_extension.load(
                "alrd_kernels",
                sorted(map(str, Path(folder).glob("*.cpp"))),
                extra_cflags=_flags(),
                extra_ldflags=list(_LINKER_FLAGS),
                build_directory=folder,
                is_python_module=False,
            )
            # At once, so that no process loads half a library.
            os.replace(built, path)
    except RuntimeError as error:
        lines = str(error).splitlines()
        if len(lines) == 1:
            raise
        # Of the compiler's many lines the first that names an error.
        problem = next((line for line in lines if "error" in line and not line.startswith("Error building")), lines[0])
        raise RuntimeError(f"the C++ kernels do not compile: {problem}") from error
    finally:
        os.environ["PATH"] = search_path
