"""The model that has filled a cache, which another one must not go on with."""

import weakref

import torch

from modules.cache.fingerprint import differences, model_fingerprint


class ModelBinding:
    """Knows the decoder that feeds a cache while it is in this process, and its fingerprint elsewhere. Never changes.

    Args:
        decoder: Who feeds the cache, if it is in this process.
        fingerprint: Of the model that has filled the cache elsewhere; `None`: not known.
    """

    def __init__(self, decoder: torch.nn.Module | None = None, fingerprint: dict | None = None):
        self._decoder = None if decoder is None else weakref.ref(decoder)
        self._fingerprint = fingerprint

    def is_bound_to(self, decoder: torch.nn.Module) -> bool:
        """Whether the decoder feeds the cache; a compiled step trusts that it is the one that fed it before."""
        return self._decoder is not None and (torch.compiler.is_compiling() or self._decoder() is decoder)

    def fingerprint(self, digest: str = "all") -> dict | None:
        """Fingerprint of the model as it is now, if it is in this process, else as it was; `None`: not known.

        Args:
            digest: As for `model_fingerprint`, where it is taken now.
        """
        # A model that is gone has left no fingerprint unless it was taken while the cache was saved or copied.
        decoder = self._decoder() if self._decoder is not None else None
        return self._fingerprint if decoder is None else model_fingerprint(decoder, digest)

    def check(self, decoder: torch.nn.Module) -> None:
        """Refuse to go on with another model than that which has filled the cache.

        Raises:
            ValueError: The fingerprints differ.
        """
        filled_by = self.fingerprint()
        if filled_by is None:
            return
        if differing := differences(model_fingerprint(decoder, filled_by.get("digest")), filled_by):
            raise ValueError(f"past_key_values: filled by another model than this one: {'; '.join(differing)}")

    def __deepcopy__(self, memo: dict) -> "ModelBinding":
        return self

    def __getstate__(self) -> dict:
        """A copy in another process knows the model by its fingerprint."""
        return {"_decoder": None, "_fingerprint": self.fingerprint()}
