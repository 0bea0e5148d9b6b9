"""List what is installed: every plugin with its version and state, and all that it provides."""

from __future__ import annotations

import textwrap

from refusalkit.registry import Owner, Registry

WIDTH = 80
_KIND = 18


def plugin_list(registry: Registry) -> str:
    """Return every distribution, whether it is in order, what it provides by kind, and what broke."""
    provided: dict[Owner, dict[str, list[str]]] = {}
    for (hook, name), owner in registry.owners.items():
        kinds = provided.setdefault(owner, {})
        kinds.setdefault(hook.removeprefix("refusalkit_"), []).append(name)
    errors: dict[Owner, list[str]] = {}
    for broken in registry.broken:
        errors.setdefault(broken.owner, []).append(broken.error)
    lines: list[str] = []
    for owner in dict.fromkeys([*provided, *errors]):
        lines.append(f"{owner}: {'broken' if owner in errors else 'ok'}")
        for kind, names in provided.get(owner, {}).items():
            lines += _wrapped(f"{kind:<{_KIND - 2}}{', '.join(names)}", " " * _KIND)
        for error in errors.get(owner, []):
            lines += _wrapped(error, " " * 4)
    return "\n".join(lines)


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent=indent, break_on_hyphens=False)
