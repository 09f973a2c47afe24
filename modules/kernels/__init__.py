"""Back ends of the quantized cache: the same functions on the same tensors, and the same bits come out.

`reference` is plain PyTorch (`modules/quant_utils.py`) and runs anywhere. `triton` are the kernels of
`modules/kernels/quantize.py`; it runs on CUDA devices, and for tests in Triton's interpreter on the CPU.
"""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from configuration_alrd_llama import check_choice
from modules import quant_utils

BACKENDS = ("reference", "triton")

#: Environment variable that chooses the back end where the caller does not.
BACKEND_VARIABLE = "ALRD_BACKEND"


@dataclass(frozen=True, repr=False)
class Backend:
    """Functions of `modules/quant_utils.py`, or equivalents with the same signatures, results and errors."""

    name: str
    quantize_and_pack: Callable
    unpack_and_dequantize: Callable
    find_range: Callable

    def __repr__(self) -> str:
        return self.name


def _backend(name: str, module) -> Backend:
    return Backend(name, module.quantize_and_pack, module.unpack_and_dequantize, module.find_range)


def get_backend(name: str | None, device: torch.device) -> Backend:
    """The back end for tensors on `device`.

    Args:
        name: "reference" or "triton". `None`: what the environment variable `ALRD_BACKEND` says; if it is not set,
            "triton" on CUDA devices and "reference" elsewhere. On a CUDA device where triton cannot be imported that is
            "reference" too, with a warning.
        device: Where the tensors are.

    Raises:
        ValueError: Another name, or triton is asked for where it cannot run.
    """
    field = "backend"
    if name is None and os.environ.get(BACKEND_VARIABLE):
        field, name = BACKEND_VARIABLE, os.environ[BACKEND_VARIABLE]
    if name is not None:
        check_choice(field, name, BACKENDS)
    if name == "reference" or (name is None and device.type != "cuda"):
        return _backend("reference", quant_utils)
    try:
        # Here, so that triton is imported only where it is chosen.
        import modules.kernels.quantize as kernels
    except ImportError as error:
        if name is not None:
            raise ValueError(f"{field}={name!r}: triton must be installed, but importing it failed: {error}") from error
        warnings.warn(f"backend: chose 'reference' on {device}, since triton cannot be imported: {error}", stacklevel=2)
        return _backend("reference", quant_utils)
    if device.type != "cuda" and not kernels.INTERPRETED:
        raise ValueError(
            f"{field}={name!r}: must be 'reference' for tensors on {device}: triton runs on CUDA devices, and "
            "elsewhere only in its interpreter (TRITON_INTERPRET=1, set before the kernels are imported)"
        )
    return _backend("triton", kernels)
