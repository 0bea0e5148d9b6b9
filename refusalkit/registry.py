"""Collect what is installed, and from whom.

`load_registry` asks every plugin once and freezes the answers. Entry points are loaded one by one, so that a plugin
that cannot be imported is reported by name while the others keep working; a name provided twice is an error that
names both owners, because a silent winner would change what a recipe means.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import pluggy

from refusalkit import hookspecs
from refusalkit.adapter import Adapter
from refusalkit.errors import InputError
from refusalkit.intervention import InterventionSpec
from refusalkit.metric import Metric
from refusalkit.prompt_source import PromptSource
from refusalkit.selector import Selector
from refusalkit.strategy import Strategy

#: Set to a comma-separated list of distributions to load only those, or to nothing for a clean room.
PLUGINS_VARIABLE = "REFUSALKIT_PLUGINS"

T = TypeVar("T")


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


@dataclass(frozen=True)
class Registry:
    """Hold everything installed, by kind and name."""

    adapters: Mapping[str, Adapter]
    strategies: Mapping[str, type[Strategy]]
    selectors: Mapping[str, type[Selector]]
    interventions: Mapping[str, type[InterventionSpec]]
    metrics: Mapping[str, type[Metric]]
    prompt_sources: Mapping[str, PromptSource]
    owners: Mapping[tuple[str, str], Owner]
    """Who provides what: (kind, name), kind being the name of the field above."""
    broken: tuple[BrokenPlugin, ...] = ()

    def owner(self, kind: str, name: str) -> Owner:
        """Return who provides `name`."""
        return self.owners[kind, name]


def load_registry(plugins: Iterable[object] = (), *, entry_points: bool = True) -> Registry:
    """Load the built-in providers, every installed plugin and `plugins`, and freeze what they provide.

    Raises `InputError` when two plugins provide the same name or a hook is misspelt.
    """
    from refusalkit import builtin

    manager = pluggy.PluginManager(hookspecs.NAME)
    manager.add_hookspecs(hookspecs)
    owners: dict[object, Owner] = {}
    own = Owner(hookspecs.NAME, _version(hookspecs.NAME))
    _register(manager, owners, builtin, own)
    broken: list[BrokenPlugin] = []
    if entry_points:
        for point, owner in _entry_points():
            # Whatever a stranger's module does at import must not take the host down with it.
            try:
                plugin = point.load()
            except (Exception, SystemExit) as error:  # noqa: BLE001
                broken.append(BrokenPlugin(owner, f"{type(error).__name__}: {error}"))
            else:
                _register(manager, owners, plugin, owner)
    for plugin in plugins:
        _register(manager, owners, plugin, Owner(getattr(plugin, "__name__", repr(plugin)), "unpackaged"))
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise InputError(str(error), hint="the hooks are listed in refusalkit/hookspecs.py") from error
    return _freeze(manager, owners, tuple(broken))


def _register(manager: pluggy.PluginManager, owners: dict[object, Owner], plugin: object, owner: Owner) -> None:
    manager.register(plugin)
    owners[plugin] = owner


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


def _freeze(manager: pluggy.PluginManager, owners: dict[object, Owner], broken: tuple[BrokenPlugin, ...]) -> Registry:
    owned: dict[tuple[str, str], Owner] = {}

    def collect(kind: str, name_of: Any) -> Mapping[str, Any]:
        values: dict[str, Any] = {}
        for implementation in getattr(manager.hook, kind).get_hookimpls():
            owner = owners[implementation.plugin]
            for value in implementation.function():
                name = name_of(value)
                if name in values:
                    raise InputError(
                        f"{name!r} is provided by both {owned[kind, name]} and {owner}",
                        where=kind,
                        hint=f"uninstall one of them, or set {PLUGINS_VARIABLE} to the plugins to load",
                    )
                values[name] = value
                owned[kind, name] = owner
        return MappingProxyType(values)

    return Registry(
        adapters=collect("refusalkit_adapters", lambda value: value.name),
        strategies=collect("refusalkit_strategies", lambda value: default_of(value, "strategy")),
        selectors=collect("refusalkit_selectors", lambda value: default_of(value, "selector")),
        interventions=collect("refusalkit_interventions", lambda value: default_of(value, "intervention")),
        metrics=collect("refusalkit_metrics", lambda value: default_of(value, "metric")),
        prompt_sources=collect("refusalkit_prompt_sources", lambda value: value.scheme),
        owners=MappingProxyType(owned),
        broken=broken,
    )


def default_of(provider: type[Any], key: str) -> str:
    """Return the name a provider class declares as the default of its field `key`."""
    name = provider.model_fields[key].default
    if not isinstance(name, str):
        raise InputError(
            f"{provider.__name__} has no name",
            where=f"{provider.__module__}.{provider.__name__}",
            hint=f'declare it as `{key}: Literal["NAME"] = "NAME"`',
        )
    return name


def nearest(name: str, names: Sequence[str]) -> str:
    """Return a hint that points from a misspelt `name` to the nearest valid one, or lists them all."""
    import difflib

    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"one of: {', '.join(names)}"
