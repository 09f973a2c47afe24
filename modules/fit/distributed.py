"""Work divided over the processes that `accelerate launch` or `torchrun` started, by accelerate's `PartialState`.

`processes` is what `join_processes` gave; `None` stands for this process alone, without a process group. Functions that
exchange something are called by all processes in the same order. A process that fails does not come to the next
exchange; the launcher sees it end and ends the others.
"""

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import (
    broadcast_object_list,
    gather_object,
    get_cpu_distributed_information,
    parse_flag_from_env,
    reduce,
)
from transformers.utils import logging

T = TypeVar("T")

#: How long a process waits for another. Long, since the main process allocates alone, for hours with a large model.
PATIENCE = timedelta(days=7)


def join_processes(device: str) -> PartialState | None:
    """The processes that this one was started with, or `None` if it was started alone.

    Args:
        device: "cpu", or "cuda": each process gets a GPU by the rules of accelerate.

    Raises:
        ValueError: Several processes were asked for and only this one was started, or the device is not there.
    """
    # The launcher says by environment variables how many it has started.
    count = get_cpu_distributed_information().world_size
    if count == 1:
        if parse_flag_from_env("ACCELERATE_USE_CPU") and "MASTER_ADDR" in os.environ:
            raise ValueError(
                "accelerate launch --cpu: starts one process whatever --num_processes is, unless mpirun starts the "
                "others; must be `accelerate launch --multi_gpu --num_processes N`, which serves CPUs too"
            )
        return None
    # A group that somebody else has made is his to end.
    if not torch.distributed.is_initialized():
        atexit.register(lambda: PartialState().destroy_process_group())
    processes = PartialState(cpu=device == "cpu", timeout=PATIENCE)
    if (processes.num_processes, processes.device.type) != (count, device):
        raise ValueError(f"device={device!r}: must be a device of this machine to start {count} processes on it")
    if not is_main(processes):
        logging.disable_progress_bar()  # that of loading weights
    return processes


def device_map(processes: PartialState | None, device: str) -> str | None:
    """`device_map` of `from_pretrained` for the option `device`: "cpu", "cuda" or "auto"."""
    if device == "cpu":
        return None
    return device if processes is None else str(processes.device)


def is_main(processes: PartialState | None) -> bool:
    """Whether this process is the one that writes and prints."""
    return processes is None or processes.is_main_process


def on_main(processes: PartialState | None, function: Callable[..., T], *args) -> T:
    """The result of `function` in the main process, which alone calls it; the others wait."""
    if processes is None:
        return function(*args)
    return broadcast_object_list([function(*args) if processes.is_main_process else None])[0]


def rounds(processes: PartialState | None, items: Sequence[T]) -> Iterator[tuple[Sequence[T], int]]:
    """Go through items in rounds of one for each process.

    Yields:
        The items of this process, one or none in the last round, and how many all processes have together.
    """
    index, count = (0, 1) if processes is None else (processes.process_index, processes.num_processes)
    # Item i of a round is that of process i.
    for first in range(0, len(items), count):
        some = items[first : first + count]
        yield some[index : index + 1], len(some)


def gather(processes: PartialState | None, items: list[T]) -> list[T]:
    """All processes' items, concatenated in rank order."""
    return items if processes is None else gather_object(items)


def sum_tensors(processes: PartialState | None, tensors: dict[str, torch.Tensor]) -> None:
    """Replace each CPU tensor by its sum over all processes, the same bits in all of them."""
    if processes is not None:
        for tensor in tensors.values():
            tensor.copy_(reduce(tensor.to(processes.device), "sum"))
