"""Interception of `cache.update`: a function on the way of keys and values from attention modules to any cache."""

import threading
from collections.abc import Callable, MutableMapping, MutableSet
from functools import partial

import torch
from torch import nn


class _CacheProxy:
    """A cache as one attention module sees it in one call: everything is the real cache's own, but for `update`."""

    # The names are long so as not to hide an attribute of the cache.
    __slots__ = ("_proxy_cache", "_proxy_is_updated", "_proxy_module_name", "_proxy_owner")

    def __init__(self, cache, owner: "CacheInterception", module_name: str):
        for slot, value in zip(self.__slots__, (cache, False, module_name, owner), strict=True):
            object.__setattr__(self, slot, value)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        states = self._proxy_owner.quantize(self._proxy_module_name, layer_idx, key_states, value_states)
        object.__setattr__(self, "_proxy_is_updated", True)
        return self._proxy_cache.update(*states, layer_idx, *args, **kwargs)

    # Models ask `isinstance(cache, ...)`: the stand-in answers as the cache would.
    @property
    def __class__(self):
        return type(self._proxy_cache)

    def __getattr__(self, name):
        return getattr(self._proxy_cache, name)

    def __setattr__(self, name, value):
        setattr(self._proxy_cache, name, value)

    def __delattr__(self, name):
        delattr(self._proxy_cache, name)

    # Python looks operators up on the type, past `__getattr__`.

    def __len__(self):
        return len(self._proxy_cache)

    def __bool__(self):
        return bool(self._proxy_cache)

    def __iter__(self):
        return iter(self._proxy_cache)

    def __getitem__(self, index):
        return self._proxy_cache[index]


def _unwrap(value):
    if type(value) is _CacheProxy:
        return value._proxy_cache
    return value


def _is_cache(value) -> bool:
    """Whether a value has a callable `update` that is not the one of a dictionary or a set."""
    return callable(getattr(value, "update", None)) and not isinstance(value, (MutableMapping, MutableSet, type))


class CacheInterception:
    """Hooks that pass the states of some attention modules through a function on their way to the cache.

    A module's forward is given a stand-in for its cache argument; the cache itself is not touched and may be of any
    type with a callable `update(key_states, value_states, layer_idx, ...)`. Remove the hooks by `remove`, or use the
    object as a context manager.

    Args:
        model: The model; a forward of it in which a module was passed by is an error (`RuntimeError`).
        modules: Attention modules of the model by name.
        quantize: Function of (module name, layer_idx, key states, value states) to the states to store.
        thread: Identifier of the only thread whose calls are intercepted; `None`: all.
    """

    def __init__(self, model: nn.Module, modules: dict[str, nn.Module], quantize: Callable, thread: int | None = None):
        self.quantize, self.thread = quantize, thread
        #: Modules that no forward of the model has called yet.
        self._not_yet = set(modules)
        self._handles = [model.register_forward_hook(self._after_model)]
        for name, module in modules.items():
            self._handles.append(module.register_forward_pre_hook(partial(self._before, name), with_kwargs=True))
            self._handles.append(module.register_forward_hook(partial(self._after, name), with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks off; a second time does nothing."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> "CacheInterception":
        return self

    def __exit__(self, *error) -> None:
        self.remove()

    def _is_foreign(self) -> bool:
        """Whether a thread calls that is not the one to intercept."""
        return self.thread not in (None, threading.get_ident())

    def _before(self, name: str, module: nn.Module, args: tuple, kwargs: dict):
        if self._is_foreign():
            return None

        def wrapped(value):
            # A module inside another selected one is handed that one's stand-in: the innermost quantizes.
            value = _unwrap(value)
            if _is_cache(value):
                return _CacheProxy(value, self, name)
            return value

        return tuple(map(wrapped, args)), {key: wrapped(value) for key, value in kwargs.items()}

    def _after(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output):
        if self._is_foreign():
            return None
        caches, is_updated = [], False
        for value in (*args, *kwargs.values()):
            if type(value) is _CacheProxy:
                caches.append(type(_unwrap(value)).__name__)
                is_updated = is_updated or (value._proxy_owner is self and value._proxy_is_updated)
        if not is_updated:
            found = ", ".join(caches) or "none"
            raise RuntimeError(
                f"{name}: its forward stored nothing through cache.update (cache arguments: {found}), so nothing would "
                "be quantized; use_cache must be on and the cache an argument of the module, it must call "
                "cache.update(key_states, value_states, layer_idx), and no other interception may be installed; or "
                "exclude the module"
            )
        self._not_yet.discard(name)
        # Some attention modules return their cache; the caller must not get the stand-in.
        if type(output) in (tuple, list):
            return type(output)(map(_unwrap, output))
        return _unwrap(output)

    def _after_model(self, model: nn.Module, args: tuple, output) -> None:
        if self._not_yet and not self._is_foreign():
            raise RuntimeError(
                f"{', '.join(sorted(self._not_yet))}: not called in a forward of {type(model).__name__}, so nothing "
                "would be quantized there; exclude what is not in use (hooks do not see a direct call of `.forward`)"
            )
