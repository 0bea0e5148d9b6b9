"""Collect what is installed, and from whom.

`load_registry` asks every plugin once and freezes the answers. Entry points are loaded one by one, so that a plugin
that cannot be imported is reported by name while the others keep working; a name provided twice is an error that
names both owners, because a silent winner would change what a recipe means.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import pluggy

from refusalkit import hookspecs
from refusalkit.adapter import Adapter
from refusalkit.command import Command
from refusalkit.errors import InputError
from refusalkit.intervention import InterventionSpec
from refusalkit.metric import Metric
from refusalkit.prompt_source import PromptSource
from refusalkit.selector import Selector
from refusalkit.strategy import Strategy

#: Set to a comma-separated list of distributions to load only those, or to nothing for a clean room.
PLUGINS_VARIABLE = "REFUSALKIT_PLUGINS"


@dataclass(frozen=True)
class Owner:
    """Name the distribution that provides something."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


@dataclass(frozen=True)
class BrokenPlugin:
    """Name a plugin that could not be loaded, and why."""

    owner: Owner
    error: str


@dataclass(frozen=True)
class Provided:
    """Hold one provided thing beside its owner."""

    value: Any
    owner: Owner


@dataclass(frozen=True, eq=False)
class Registry:
    """Hold everything installed, by kind and name."""

    adapters: Mapping[str, Adapter]
    strategies: Mapping[str, type[Strategy]]
    selectors: Mapping[str, type[Selector]]
    interventions: Mapping[str, type[InterventionSpec]]
    metrics: Mapping[str, type[Metric]]
    prompt_sources: Mapping[str, PromptSource]
    commands: Mapping[str, Command]
    owners: Mapping[tuple[str, str], Owner]
    """Who provides what: (kind, name), kind being the name of the field above."""
    broken: tuple[BrokenPlugin, ...] = ()

    def owner(self, kind: str, name: str) -> Owner:
        """Return who provides `name`."""
        return self.owners[kind, name]


def load_registry(plugins: Iterable[object] = (), *, entry_points: bool = True) -> Registry:
    """Load the built-in providers, every installed plugin and `plugins`, and freeze what they provide.

    An installed plugin that raises, or returns what no hook can return, provides nothing and is listed as broken.
    Raises `InputError` when two plugins provide the same name, or when one of `plugins` is broken.
    """
    from refusalkit import builtin

    loading = _Loading(pluggy.PluginManager(hookspecs.NAME))
    loading.manager.add_hookspecs(hookspecs)
    loading.add(builtin, Owner(hookspecs.NAME, _version(hookspecs.NAME)))
    broken: list[BrokenPlugin] = []
    if entry_points:
        for point, owner in _entry_points():
            # Whatever a stranger's code does when it is imported or asked must not take the host down with it.
            try:
                loading.add(point.load(), owner)
            except (Exception, SystemExit) as error:  # noqa: BLE001
                broken.append(BrokenPlugin(owner, _told(error)))
    for plugin in plugins:
        loading.add(plugin, unpackaged(plugin))
    return _freeze(loading.provided, tuple(broken))


def _told(error: BaseException) -> str:
    """Say what a plugin raised, and on which line of which file; or what is wrong with what it returned."""
    if isinstance(error, InputError):
        return error.message
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames[-1].filename != __file__ else ""
    return f"{type(error).__name__}: {error}{place}"


def unpackaged(plugin: object) -> Owner:
    """Name the owner of what a plugin provides that is handed over and not installed."""
    return Owner(getattr(plugin, "__name__", repr(plugin)), "unpackaged")


@dataclass
class _Loading:
    """Ask plugins, one at a time, for what they provide."""

    manager: pluggy.PluginManager
    provided: list[tuple[str, str, Provided]] = field(default_factory=list)
    """Kind, name and thing of everything provided so far."""

    def add(self, plugin: object, owner: Owner) -> None:
        """Register a plugin and take over what it provides: everything, or nothing when it raises."""
        self.manager.register(plugin)
        try:
            self.manager.check_pending()
        except pluggy.PluginValidationError as error:
            self.manager.unregister(plugin)
            raise InputError(
                str(error),
                where=str(owner),
                hint=f"the hooks are listed in refusalkit/hookspecs.py; {PLUGINS_VARIABLE} says which plugins to load",
            ) from None
        hooks = [
            (kind, implementation.function)
            for kind in _KINDS
            for implementation in getattr(self.manager.hook, kind).get_hookimpls()
            if implementation.plugin is plugin
        ]
        if not hooks:
            raise InputError(
                "has no hook", where=str(owner), hint="mark a function of refusalkit/hookspecs.py with @hookimpl"
            )
        self.provided += [
            (kind, _name(kind, value), Provided(value, owner))
            for kind, function in hooks
            for value in _listed(kind, function())
        ]


def _listed(kind: str, values: Any) -> list[Any]:
    if not isinstance(values, list | tuple):
        raise _not_allowed(kind, f"{values!r}, not a list or tuple")
    return list(values)


def _name(kind: str, value: Any) -> str:
    """Return the name of a provided thing; raises `InputError` for what could not be used under it."""
    expected, key = _KINDS[kind]
    if key is None:
        if not isinstance(value, expected):
            raise _not_allowed(kind, f"{value!r}, which is no {expected.__name__}")
        return str(value.scheme if isinstance(value, PromptSource) else value.name)
    if not (isinstance(value, type) and issubclass(value, expected)):
        raise _not_allowed(kind, f"{value!r}, which is no subclass of {expected.__name__}")
    if inspect.isabstract(value):
        missing = [name for name in dir(value) if getattr(getattr(value, name), "__isabstractmethod__", False)]
        raise _not_allowed(kind, f"{value.__name__}, which does not define {', '.join(missing)}")
    return default_of(value, key)


def _not_allowed(kind: str, what: str) -> InputError:
    return InputError(
        f"{kind} returned {what}", where=kind, hint="refusalkit/hookspecs.py says what every hook returns"
    )


#: What each hook returns: values of a class, or subclasses named by the default of a field.
_KINDS: Mapping[str, tuple[type[Any], str | None]] = {
    "refusalkit_adapters": (Adapter, None),
    "refusalkit_strategies": (Strategy, "strategy"),
    "refusalkit_selectors": (Selector, "selector"),
    "refusalkit_interventions": (InterventionSpec, "intervention"),
    "refusalkit_metrics": (Metric, "metric"),
    "refusalkit_prompt_sources": (PromptSource, None),
    "refusalkit_commands": (Command, None),
}


def _entry_points() -> list[tuple[importlib.metadata.EntryPoint, Owner]]:
    wanted = os.environ.get(PLUGINS_VARIABLE)
    names = None if wanted is None else {name.strip() for name in wanted.split(",")}
    found = []
    for point in importlib.metadata.entry_points(group=hookspecs.NAME):
        distribution = point.dist
        owner = Owner(distribution.name, distribution.version) if distribution else Owner(point.name, "unknown")
        if names is None or owner.name in names:
            found.append((point, owner))
    return sorted(found, key=lambda pair: (pair[1].name, pair[0].name))


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "source"


def _freeze(provided: Sequence[tuple[str, str, Provided]], broken: tuple[BrokenPlugin, ...]) -> Registry:
    """Sort what was provided by kind; raises `InputError` for a name that stands twice."""
    values: dict[str, dict[str, Any]] = {kind: {} for kind in _KINDS}
    owned: dict[tuple[str, str], Owner] = {}
    for kind, name, thing in provided:
        if name in values[kind]:
            raise InputError(
                f"{name!r} is provided by both {owned[kind, name]} and {thing.owner}",
                where=kind,
                hint=f"uninstall one of them, or set {PLUGINS_VARIABLE} to the plugins to load",
            )
        values[kind][name] = thing.value
        owned[kind, name] = thing.owner
    kinds = {kind.removeprefix("refusalkit_"): MappingProxyType(found) for kind, found in values.items()}
    in_order = {(kind, name): owned[kind, name] for kind, found in values.items() for name in found}
    return Registry(**kinds, owners=MappingProxyType(in_order), broken=broken)


def default_of(provider: type[Any], key: str) -> str:
    """Return the name a provider class declares as the default of its field `key`."""
    declared = provider.model_fields[key]
    name = declared.default
    # Anything but a literal would match every name, or none.
    if not isinstance(name, str) or get_args(declared.annotation) != (name,):
        raise InputError(
            f"{provider.__name__} has no name",
            where=f"{provider.__module__}.{provider.__name__}",
            hint=f'declare it as `{key}: Literal["NAME"] = "NAME"`',
        )
    return name
