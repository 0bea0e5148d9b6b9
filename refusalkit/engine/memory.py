"""Recognise that memory ran out, however the device says it."""

from __future__ import annotations

import torch

_PHRASES = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")


def out_of_memory(error: BaseException) -> bool:
    """Return whether `error`, or what it was raised from, says that memory ran out."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError | torch.OutOfMemoryError):
            return True
        if any(phrase in str(seen).lower() for phrase in _PHRASES):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
