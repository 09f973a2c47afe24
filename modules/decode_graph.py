"""Decode steps of `generate` replayed from a CUDA graph: the host starts one thing a step, not a kernel at a time."""

import warnings
from collections.abc import Callable
from typing import Any

import torch

#: Arguments of a forward pass that say nothing of single tokens.
_SETTINGS = ("use_cache", "return_dict", "logits_to_keep")


class DecodeGraph:
    """A decode step over a cache of fixed capacity. Called like the model, by whose side it lives for one `generate`.

    The first step runs as it is, once `prepare` has compiled its kernels; the second is captured, and it and all that
    follow are replayed. Nothing is captured of a step that is more than the ids of new tokens, such as one with a mask:
    it runs as it is, and so do all if the device refuses the capture, with a warning.

    The logits of a step are overwritten by the next one.

    Args:
        model: The model, on one CUDA device.
        prepare: Called with the ids of new tokens and the cache before the first step.
    """

    def __init__(self, model: Callable, prepare: Callable):
        self.model, self.prepare = model, prepare
        self._step: tuple | None = None  # what the last step was called with, but for its tokens
        self._graph: torch.cuda.CUDAGraph | None = None
        self._refused = False

    def __call__(self, input_ids: torch.Tensor, past_key_values, **arguments) -> Any:
        # A step that is more than the ids of new tokens has another argument in use.
        others = map(arguments.get, arguments.keys() - _SETTINGS)
        if self._refused or any(value is not None and value is not False for value in others):
            return self.model(input_ids=input_ids, past_key_values=past_key_values, **arguments)
        # A graph is for one cache and one shape: another step starts anew.
        step = (past_key_values, tuple(input_ids.shape), arguments)
        if step != self._step:
            self._step, self._graph = step, None
            self.prepare(input_ids, past_key_values)
            return self.model(input_ids=input_ids, past_key_values=past_key_values, **arguments)
        if self._graph is None:
            try:
                self._capture(input_ids, past_key_values, arguments)
            except RuntimeError as error:
                self._refused = True
                warnings.warn(f"generate: steps are not replayed from a CUDA graph: {error}", stacklevel=2)
                return self.model(input_ids=input_ids, past_key_values=past_key_values, **arguments)
        self._input_ids.copy_(input_ids)
        self._graph.replay()
        return self._outputs

    def _capture(self, input_ids: torch.Tensor, past_key_values, arguments: dict[str, Any]) -> None:
        with torch.inference_mode(False):
            self._input_ids = input_ids.clone()
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on with the device: a server's.
        with torch.cuda.device_of(input_ids), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._outputs = self.model(input_ids=self._input_ids, past_key_values=past_key_values, **arguments)
        self._graph = graph
