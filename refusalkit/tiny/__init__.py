"""Ship four chat models so small that the whole tool can be tried in seconds on any machine.

They are trained by this project (`train.py`) on made-up requests (`grammar.py`): they refuse what is harmful and
answer the rest in one generic sentence. They are for trying and testing the tool and say nothing about real models.
"""

from __future__ import annotations

from pathlib import Path

from refusalkit.errors import InputError

FAMILIES: tuple[str, ...] = ("llama", "gemma", "qwen", "yi")


def checkpoint(family: str) -> Path:
    """Give the folder of a shipped model, which `from_pretrained` loads without a network."""
    if family not in FAMILIES:
        raise InputError(f"there is no tiny model named {family!r}", hint=f"the tiny models are {', '.join(FAMILIES)}")
    return Path(__file__).parent / "checkpoints" / family
