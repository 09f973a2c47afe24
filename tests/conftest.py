"""Every test: seeded, one thread, offline, and with fresh allocations of the cache full of rubbish."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch


def pytest_configure(config):
    """Kernels run in Triton's interpreter, unless the `gpu` tests are asked for; read when they are first imported."""
    chosen = config.option.markexpr
    if "gpu" not in chosen or "not gpu" in chosen:
        os.environ["TRITON_INTERPRET"] = "1"


#: Modules whose tests run with each back end forced.
FORCED_MODULES = ("test_kivi_cache", "test_modeling")
FORCED_BACKENDS = ["cpu", "reference", pytest.param("triton", marks=pytest.mark.interpreter)]


def pytest_generate_tests(metafunc):
    if metafunc.module.__name__ in FORCED_MODULES:
        metafunc.fixturenames.append("forced_backend")
        metafunc.parametrize("forced_backend", FORCED_BACKENDS, indirect=True)


@pytest.fixture
def forced_backend(request, monkeypatch):
    """The back end wherever a test does not choose one itself."""
    monkeypatch.setenv("ALRD_BACKEND", request.param)


def poisoned_empty(*args, **kwargs) -> torch.Tensor:
    """`torch.empty`, floating elements NaN and the bytes of integer ones 0xA5."""
    fresh = torch.empty(*args, **kwargs)
    if fresh.is_floating_point():
        return fresh.fill_(torch.nan)
    fresh.view(torch.uint8).fill_(0xA5)
    return fresh


class PoisonedTorch:
    """The `torch` that a module under test sees: all of it, with `empty` replaced."""

    empty = staticmethod(poisoned_empty)

    def __getattr__(self, name: str):
        return getattr(torch, name)


@pytest.fixture(autouse=True)
def seeded():
    threads = torch.get_num_threads()
    # Handing tensors this small to a second thread costs more than it saves.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch):
    """An element of a pool, a window or the sinks that is read before it was written shows as NaN."""
    for module in ("modules.cache.pool", "modules.cache.exact"):
        monkeypatch.setattr(f"{module}.torch", PoisonedTorch())


@pytest.fixture
def poisoned_kernels(request, monkeypatch):
    """An element of a result that the module under test, `kernels`, does not write shows as NaN or rubbish."""
    monkeypatch.setattr(request.module.kernels, "torch", PoisonedTorch())


@pytest.fixture(
    params=[pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def device(request) -> torch.device:
    """Where the Triton kernels of the module under test run: in the interpreter on the CPU, or compiled on a GPU."""
    from modules.kernels.triton import common  # the mode is settled by now

    interpreted = common.INTERPRETED
    assert (request.param == "cpu") == interpreted, "the two tiers run by themselves: see `pytest_configure`"
    return torch.device(request.param)


@pytest.fixture(scope="module")
def one_thread():
    """One thread for the tests of a module: no figure depends on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
