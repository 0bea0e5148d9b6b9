"""Read a recipe from a YAML file, and say what is wrong with it by file, line and key."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from refusalkit.errors import InputError, nearest
from refusalkit.recipe import Recipe, recipe_type
from refusalkit.recipe_faults import KeyPath, described, explain, faults, nan_at
from refusalkit.registry import Registry
from refusalkit.sweep import Point, points

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Source:
    """Hold a parsed YAML document, the line on which every key stands, and what was put in the place of keys."""

    path: Path
    data: dict[str, Any]
    lines: dict[KeyPath, int]
    settings: dict[KeyPath, str] = field(default_factory=dict)
    """What `--set` put there."""
    swept: dict[KeyPath, KeyPath] = field(default_factory=dict)
    """Where in `sweep` the value of a key stands."""
    run: str | None = None
    """Which run of a sweep it is."""

    def where(self, keys: KeyPath) -> str:
        """Return `file:line: key.path`, or the setting, by the longest part of the path that is written down."""
        shown = ".".join(str(key) for key in keys) + (f" (run {self.run})" if self.run else "")
        for length in range(len(keys), 0, -1):
            here = keys[:length]
            if here in self.swept:
                written = (*self.swept[here], *keys[length:])
                return Source(self.path, {}, self.lines, self.settings).where(written) + f": in the run {self.run}"
            if here in self.settings:
                return f"--set {self.settings[here]}"
            line = self.lines.get(here)
            if line is not None:
                return f"{self.path}:{line}: {shown}"
        return f"{self.path}: {shown}" if shown else str(self.path)


class Words(NamedTuple):
    """Say what a file is called in messages about it."""

    what: str
    start: str
    """How to start one."""
    example: str
    """Where to find one."""


RECIPE = Words("recipe", "start with `name:`, `model:` and `prompts:`", "`recipes/quickstart.yaml` is one")


@dataclass(frozen=True)
class Member:
    """Hold one run that a recipe asks for: all of it, or one point of its sweep."""

    recipe: Recipe
    run: str | None = None
    """The name within the sweep, and of its folder; null where there is no sweep."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """What the sweep sets for it, by dotted key."""


def load_recipe(path: Path, registry: Registry, settings: Sequence[str] = ()) -> Recipe:
    """Read and check the recipe at `path`, after applying `settings` (`key.path=value`, the value in YAML).

    Raises `InputError` with file, line, key path, what was seen and one hint, also for a sweep over several runs.
    """
    first, *others = load_members(path, registry, settings)
    if others:
        raise InputError(
            f"is a sweep over {len(others) + 1} runs, and one is needed here",
            where=str(path),
            hint="`refusalkit run` runs them all; to choose one, leave one value in every list, as with --set "
            + " --set ".join(f"'sweep.{key}={json.dumps([value])}'" for key, value in first.values.items()),
        )
    return first.recipe


def load_members(path: Path, registry: Registry, settings: Sequence[str] = ()) -> tuple[Member, ...]:
    """Read and check every run that the recipe at `path` asks for: one, or those of its sweep.

    Raises `InputError` as `load_recipe` does; in a sweep it names the run as well.
    """
    source = read_recipe(path, settings)
    if source.data.get("sweep", {}) == {}:
        return (Member(check(source, registry)),)
    _check_not_overruled(source)
    members = [
        Member(check(_at(source, point), registry), point.name, point.values)
        for point in points(source.data["sweep"], source.where)
    ]
    asked = [member.recipe.model_dump(mode="json", serialize_as_any=True, exclude={"name"}) for member in members]
    for number, one in enumerate(asked):
        if one in asked[:number]:
            raise InputError(
                f"the runs {members[asked.index(one)].run} and {members[number].run} are the same",
                where=source.where(("sweep",)),
                hint="a key that another one sets as a whole comes after it",
            )
    return tuple(members)


def _check_not_overruled(source: Source) -> None:
    """Refuse a setting that every run of the sweep would replace."""
    for keys, setting in source.settings.items():
        for key in source.data["sweep"] if isinstance(source.data["sweep"], dict) else ():
            if keys[: len(str(key).split("."))] == tuple(str(key).split(".")):
                raise InputError(
                    f"the recipe sweeps over {key}, which takes the place of this",
                    where=f"--set {setting}",
                    hint=f"set the list: --set 'sweep.{key}=[VALUE]'; or no sweep at all: --set 'sweep={{}}'",
                )


def _at(source: Source, point: Point) -> Source:
    """Return the recipe of one run of a sweep."""
    made = variant(source, point.name)
    for key, value in point.values.items():
        written = ("sweep", key, point.indices[key])
        for begun in put(made, key, copy.deepcopy(value), source.where(written)):
            made.swept[begun] = written
    return made


def read_recipe(path: Path, settings: Sequence[str] = ()) -> Source:
    """Parse the recipe at `path` and apply `settings`, without checking what it says."""
    source = read_source(path)
    for setting in settings:
        _apply(source, setting)
    return source


def variant(source: Source, run: str) -> Source:
    """Return a copy of a recipe to change, called `run` below the recipe's own name."""
    data = copy.deepcopy({key: value for key, value in source.data.items() if key != "sweep"})
    if isinstance(data.get("name"), str):
        data["name"] += f"/{run}"
    return Source(source.path, data, dict(source.lines), dict(source.settings), {}, run)


def read_source(path: Path, words: Words = RECIPE) -> Source:
    """Parse the YAML at `path`, safely, remembering where every key stands."""
    lines: dict[KeyPath, int] = {}
    data = _parse(_text(path, words), path, lines)
    if not isinstance(data, dict):
        raise InputError(f"holds {described(data)}, not keys and values", where=str(path), hint=words.start)
    return Source(path, data, lines)


def _text(path: Path, words: Words) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        names = sorted(entry.name for entry in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        hint = nearest(path.name, names) if names else f"a {words.what} is a YAML file; {words.example}"
        raise InputError(f"no such {words.what}", where=str(path), hint=hint) from None
    except IsADirectoryError:
        message = f"this is a folder, not a {words.what}"
        raise InputError(message, where=str(path), hint="name the YAML file in it") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"byte {error.start} is not UTF-8", where=f"{path}:{line}", hint="save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path), hint="name a YAML file") from None
    except ValueError as error:  # a name with a null character never reaches the file system
        raise InputError(f"cannot be read: {error}", where=repr(str(path)), hint="name a YAML file") from None


def _parse(text: str, path: Path, lines: dict[KeyPath, int]) -> Any:
    """Read one YAML document and note in `lines` where every key stands."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _index(node, (), path, lines, set())
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        plain = isinstance(error, yaml.constructor.ConstructorError)
        raise InputError(
            f"not YAML: {error.problem or error.context}",
            where=f"{path}:{line}",
            hint="write text, numbers, lists and keys only; tags mean nothing here"
            if plain
            else "check the indentation and that text with ': ' or '#' in it is quoted",
        ) from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise InputError(
            f"not YAML: {error.reason}", where=f"{path}:{line}", hint="write plain text without control codes"
        ) from None
    except (RecursionError, ValueError) as error:  # a date that is none, a number too long, lists without end
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InputError(f"not YAML that can be read: {reason}", where=str(path), hint="quote what is text") from None


def _index(node: yaml.Node, keys: KeyPath, path: Path, lines: dict[KeyPath, int], seen: set[int]) -> None:
    # What an alias repeats is indexed once: a few lines of aliases can stand for billions of keys, or for themselves.
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        for key_node, value in node.value:
            here = (*keys, str(key_node.value))
            line = key_node.start_mark.line + 1
            if here in lines:
                raise InputError(
                    f"the key stands twice, first on line {lines[here]}",
                    where=f"{path}:{line}: {'.'.join(map(str, here))}",
                    hint="keep one of them",
                )
            lines[here] = line
            _index(value, here, path, lines, seen)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            lines[(*keys, number)] = value.start_mark.line + 1
            _index(value, (*keys, number), path, lines, seen)


def _apply(source: Source, setting: str) -> None:
    key, separator, text = setting.partition("=")
    where = f"--set {setting}"
    if not separator or not all(key.strip().split(".")):
        raise InputError("not of the form key=value", where=where, hint="for example --set model.dtype=float32")
    for begun in put(source, key.strip(), _value(text, where), where):
        source.settings[begun] = setting


def put(source: Source, key: str, value: Any, where: str) -> list[KeyPath]:
    """Set one dotted key, in which a number counts the items of a list from 0.

    Returns its path and those of the sections that had to be begun for it.
    """
    parts = key.split(".")
    if parts[0] == "sweep" and len(parts) > 2:
        # The keys of a sweep hold dots themselves.
        parts = ["sweep", ".".join(parts[1:])]
    keys: KeyPath = ()
    begun: list[KeyPath] = []
    target: Any = source.data
    for part in parts[:-1]:
        keys = (*keys, _step(target, part, keys, where))
        here = keys[-1]
        if isinstance(target, dict) and here not in target:
            begun.append(keys)
            target[here] = {}
        # A bare name (`select: causal`) stands for a mapping, so a setting below it turns it into one.
        noun = _NAMED_ITEMS.get(keys[-2]) if isinstance(here, int) else _NAMED_SECTIONS.get(here)
        if isinstance(target[here], str) and noun is not None:
            target[here] = {noun: target[here]}
        target = target[here]
    last = _step(target, parts[-1], keys, where)
    keys = (*keys, last)
    target[last] = value
    for written in [written for written in source.lines if written[: len(keys)] == keys]:
        del source.lines[written]
    return [*begun, keys]


def _step(target: Any, part: str, keys: KeyPath, where: str) -> str | int:
    """Return what leads from `target` to `part`: the key itself, or a place in a list."""
    if isinstance(target, dict):
        return part
    if isinstance(target, list) and part.isdecimal() and int(part) < len(target):
        return int(part)
    shown = ".".join(map(str, keys))
    if isinstance(target, list):
        raise InputError(
            f"{part!r} is no place in the list {shown}", where=where, hint=f"0 to {len(target) - 1}, in its order"
        )
    raise InputError(f"{shown} is not a section", where=where, hint="set the whole value instead")


_NAMED_SECTIONS = {"find": "strategy", "select": "selector"}
_NAMED_ITEMS: dict[str | int, str] = {"interventions": "intervention", "metrics": "metric"}


def _value(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise InputError(f"the value is not YAML: {reason}", where=where, hint="quote it for the shell") from None


def check(source: Source, registry: Registry) -> Recipe:
    """Check parsed YAML against the recipe model; raise the first error in the words of the user's file."""
    return checked(source, recipe_type(registry), registry)


def checked(source: Source, made: type[M], registry: Registry) -> M:
    """Check parsed YAML against a model; raise the first error in the words of the user's file."""
    nan = nan_at(source.data)
    if nan is not None:
        raise InputError("not a number", where=source.where(nan), hint="write a number, or leave the key out")
    try:
        return made.model_validate(source.data)
    except ValidationError as error:
        found = [explain(fault, made, registry) for fault in faults(source.data, error)]
    keys, first = found[0]
    first.where = source.where(keys)
    if len(found) > 1:
        more = ", ".join(".".join(map(str, keys)) for keys, _ in found[1:4])
        first.message += f" (and {len(found) - 1} more: {more})"
    raise first
