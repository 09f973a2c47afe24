"""Launches that are alike from step to step, without Triton's preparation of each of them.

`kernel[grid](**arguments)` binds all arguments, asks each for what kernels are specialised to, and looks up the
compiled kernel by the answers and the constants: more time on the host than the launch itself. It returns that kernel,
which so long as the answers stay the same is launched directly, `compiled[grid](*arguments)`, as in Triton's tutorials.
"""

import inspect
from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Any

import torch
import triton
from triton.compiler import CompiledKernel

#: Compiled kernels that a launcher keeps: a number that grows, such as that of the blocks, makes new ones.
_MOST_KEPT = 64

#: Stands for no tensor; no kernel takes its type.
_NOTHING = torch.empty(0, dtype=torch.complex64, device="cpu")


def _flat(values: Iterable, flat: list[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors in nested tuples, and `_NOTHING` for a `None` and where a tuple ends."""
    for x in values:
        if isinstance(x, tuple):
            _flat(x, flat)
            x = None
        flat.append(_NOTHING if x is None else x)
    return flat


def specialisation(tensors: dict[str, Any], numbers: dict[str, Any]) -> tuple:
    """What Triton may specialise a kernel to in these arguments; other answers ask for another kernel.

    That is the type of a tensor and whether 16 divides its address, and of a number its type, whether it is 1 and
    whether 16 divides it: here of numbers all.

    Args:
        tensors: By name a tensor, `None`, or a tuple of tensors or of such tuples.
        numbers: By name a number, `None`, or a tuple of integers or of such tuples.
    """
    if not tensors and not numbers:
        return ()
    flat = _flat(tensors.values(), [])
    addresses, dtypes = [x.data_ptr() % 16 for x in flat], [x.dtype for x in flat]
    # The types too, since 1 and 1.0 are equal.
    return (*addresses, *dtypes, *numbers.values(), *map(type, numbers.values()))


class Launcher:
    """A kernel with the arguments and options that no launch changes.

    Hooks before a run (`add_pre_run_hook`) and changes of Triton's `knobs` that ask for another kernel are not seen
    once a kernel is kept; its hooks around launches are.

    Args:
        kernel: What `triton.jit` makes, or whatever is launched by `kernel[grid](**arguments)`. What that returns is
            only kept if it is a compiled kernel: the interpreter returns nothing.
        constant: Arguments by name. Their tensors stay where they are.
    """

    def __init__(self, kernel: Any, constant: dict[str, Any]):
        self.kernel, self.constant = kernel, constant
        self._kept: dict[tuple, Callable] = {}
        self._in_order = None

    def start(self, grid: tuple[int, ...], tensors: dict[str, Any], numbers: dict[str, Any]) -> None:
        """Launch with the constant arguments and these, as for `specialisation`, on the current device and stream."""
        arguments = self.constant | tensors | numbers
        if self._kept:
            launch = self._kept.get(self._key(grid, tensors, numbers))
            if launch is not None:
                launch(*self._in_order(arguments))
                return
        compiled = self.kernel[grid](**arguments)
        if isinstance(compiled, CompiledKernel):
            if len(self._kept) == _MOST_KEPT:
                self._kept.clear()
            self._in_order = itemgetter(*inspect.signature(self.kernel.fn).parameters)
            self._kept[self._key(grid, tensors, numbers)] = compiled[(*grid, 1, 1)[:3]]

    @staticmethod
    def _key(grid: tuple[int, ...], tensors: dict[str, Any], numbers: dict[str, Any]) -> tuple:
        # A compiled kernel is loaded on one device, the one that is current, as Triton has it.
        return (triton.runtime.driver.active.get_current_device(), grid, specialisation(tensors, numbers))

    def compile(self, grid: tuple[int, ...], tensors: dict[str, Any], numbers: dict[str, Any]) -> None:
        """Compile what `start` would launch, and launch nothing."""
        self.kernel.warmup(grid=grid, **self.constant, **tensors, **numbers)
