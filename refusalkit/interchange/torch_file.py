"""Read and write files of `torch.save` without running what is in them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from refusalkit.errors import InputError
from refusalkit.store import write_bytes

SUFFIXES = (".pt", ".pth")


def load(path: Path) -> Any:
    """Return the tensors, numbers and texts of a file on the CPU; raises `InputError` for anything else in it."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    # Unpickling raises nearly every kind of error for a file that is broken or holds code.
    except Exception as error:  # noqa: BLE001
        said = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        raise InputError(
            f"cannot be read as tensors, numbers and texts: {said}",
            where=str(path),
            hint="check that the file is whole; one that holds objects or code is never loaded",
        ) from None


def save(path: Path, value: Any) -> None:
    """Write `value` whole; every tensor in it has to own its storage, because a view's whole storage is written."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_bytes(path, buffer.getvalue())


def recognised(path: Path) -> Any:
    """Return the content of a file that ends like one of torch, or None for others."""
    return load(path) if path.is_file() and path.suffix in SUFFIXES else None
