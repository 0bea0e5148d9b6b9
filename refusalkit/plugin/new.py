"""Write a plugin that works, for its author to change."""

from __future__ import annotations

import importlib.resources
import os
import re
import shutil
from pathlib import Path

from refusalkit.errors import InputError
from refusalkit.plugin.check import PREFIX
from refusalkit.registry import Registry

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
#: Where each file of the template goes.
_FILES = {
    "README.md.j2": "README.md",
    "pyproject.toml.j2": "pyproject.toml",
    "module.py.j2": "{module}.py",
    "test_module.py.j2": "tests/test_{module}.py",
}


def new_plugin(name: str, parent: Path, registry: Registry) -> Path:
    """Write the plugin `refusalkit-NAME` into a folder of that name in `parent` and return the folder.

    It provides a strategy and an adapter named after it. Raises `InputError` for a name that is none or is taken,
    and where the folder exists or cannot be written; then nothing is left behind.
    """
    words = _words(name)
    _check_free(words["identifier"], registry)
    folder = parent / words["distribution"]
    if os.path.lexists(folder):
        raise InputError("exists already", where=str(folder), hint="choose another name, or another place with --out")
    draft = parent / f".{folder.name}.{os.getpid()}.tmp"
    try:
        _write(draft, words)
        os.replace(draft, folder)
    except OSError as error:
        hint = "choose another place with --out"
        raise InputError(f"cannot be written: {error.strerror or error}", where=str(folder), hint=hint) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _words(name: str) -> dict[str, str]:
    """Return the name as every place in the template spells it."""
    short = name.removeprefix(PREFIX)
    if not _NAME.fullmatch(short):
        close = re.sub(r"[^a-z0-9]+", "-", short.lower()).strip("-")
        raise InputError(
            f"{name!r} cannot name a plugin",
            where="NAME",
            hint=(f"did you mean {close!r}? " if _NAME.fullmatch(close) else "")
            + "A name is words of lower-case letters and digits, joined by hyphens",
        )
    identifier = short.replace("-", "_")
    return {
        "name": short,
        "identifier": identifier,
        "distribution": PREFIX + short,
        "module": f"refusalkit_{identifier}",
    }


def _check_free(identifier: str, registry: Registry) -> None:
    """Refuse a name under which something is provided already: two plugins that share one cannot be loaded."""
    for (hook, name), owner in registry.owners.items():
        if name in (identifier, f"{identifier}_smollm3"):
            kind = hook.removeprefix("refusalkit_")
            raise InputError(f"{owner} has {name!r} among its {kind}", where="NAME", hint="choose another name")


def _write(folder: Path, words: dict[str, str]) -> None:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    template = importlib.resources.files("refusalkit.plugin").joinpath("template")
    for source, target in _FILES.items():
        text = environment.from_string(template.joinpath(source).read_text(encoding="utf-8")).render(words)
        path = folder / target.format(**words)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
