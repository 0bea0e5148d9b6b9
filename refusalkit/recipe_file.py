"""Read a recipe from a YAML file, and say what is wrong with it by file, line and key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ValidationError

from refusalkit.errors import InputError
from refusalkit.recipe import Recipe, recipe_type
from refusalkit.registry import Registry, nearest

KeyPath = tuple[str | int, ...]


class Source(NamedTuple):
    """Hold a parsed YAML document and the line on which every key stands."""

    path: Path
    data: dict[str, Any]
    lines: dict[KeyPath, int]

    def where(self, keys: KeyPath) -> str:
        """Return `file:line: key.path`, the line being that of the longest part of the path that is written down."""
        shown = ".".join(str(key) for key in keys)
        for length in range(len(keys), 0, -1):
            line = self.lines.get(keys[:length])
            if line is not None:
                return f"{self.path}:{line}: {shown}" if shown else f"{self.path}:{line}"
        return f"{self.path}: {shown}" if shown else str(self.path)


def load_recipe(path: Path, registry: Registry, settings: Sequence[str] = ()) -> Recipe:
    """Read and check the recipe at `path`, after applying `settings` (`key.path=value`, the value in YAML).

    Raises `InputError` with file, line, key path, what was seen and one hint.
    """
    source = read_source(path)
    for setting in settings:
        _apply(source, setting)
    return check(source, registry)


def read_source(path: Path) -> Source:
    """Parse the YAML at `path`, safely, remembering where every key stands."""
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        names = sorted(entry.name for entry in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        hint = nearest(path.name, names) if names else "a recipe is a YAML file; `recipes/quickstart.yaml` is one"
        raise InputError("no such recipe", where=str(path), hint=hint) from None
    except IsADirectoryError:
        raise InputError("this is a folder, not a recipe", where=str(path), hint="name the YAML file in it") from None
    except UnicodeDecodeError as error:
        raise InputError(f"byte {error.start} is not UTF-8", where=str(path), hint="save the recipe as UTF-8") from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        lines: dict[KeyPath, int] = {}
        if node is not None:
            _index(node, (), lines, path)
        data = loader.construct_document(node) if node is not None else None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(
            f"not YAML: {error.problem or error.context}",
            where=f"{path}:{line}",
            hint="check the indentation and that text with ': ' or '#' in it is quoted",
        ) from None
    except yaml.YAMLError as error:
        raise InputError(f"not YAML: {error}", where=str(path), hint="a recipe is plain text") from None
    if not isinstance(data, dict):
        seen = "nothing" if data is None else f"a {type(data).__name__}"
        raise InputError(
            f"holds {seen}, not keys and values", where=str(path), hint="start with `name:`, `model:` and `prompts:`"
        )
    return Source(path, data, lines)


def _index(node: yaml.Node, keys: KeyPath, lines: dict[KeyPath, int], path: Path) -> None:
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
            _index(value, here, lines, path)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            lines[(*keys, number)] = value.start_mark.line + 1
            _index(value, (*keys, number), lines, path)


def _apply(source: Source, setting: str) -> None:
    key, separator, text = setting.partition("=")
    where = f"--set {setting}"
    if not separator or not key.strip():
        raise InputError("not of the form key=value", where=where, hint="for example --set model.dtype=float32")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"the value is not YAML: {error}", where=where, hint="quote it for the shell") from None
    *parents, last = key.strip().split(".")
    target: Any = source.data
    for depth, part in enumerate(parents):
        # A bare name (`select: causal`) stands for a mapping, so a setting below it turns it into one.
        if isinstance(target.get(part), str) and part in _NAMED_SECTIONS:
            target[part] = {_NAMED_SECTIONS[part]: target[part]}
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise InputError(
                f"{'.'.join(parents[: depth + 1])} is not a section", where=where, hint="set the whole value instead"
            )
    target[last] = value


_NAMED_SECTIONS = {"find": "strategy", "select": "selector"}


def check(source: Source, registry: Registry) -> Recipe:
    """Check parsed YAML against the recipe model; raise the first error in the words of the user's file."""
    made = recipe_type(registry)
    try:
        return made.model_validate(source.data)
    except ValidationError as error:
        found = [_explain(source, made, registry, item) for item in error.errors(include_url=False)]
    first = found[0]
    if len(found) > 1:
        first.message += f" (and {len(found) - 1} more: {'; '.join(str(item.where) for item in found[1:4])})"
    raise first


def _explain(source: Source, made: type[Recipe], registry: Registry, item: Any) -> InputError:
    kind, keys, context = item["type"], tuple(item["loc"]), item.get("ctx", {})
    written = _as_written(source.data, keys)
    if kind == "extra_forbidden":
        names = _siblings(made, registry, keys)
        return InputError(f"unknown key {keys[-1]!r}", where=source.where(written), hint=nearest(str(keys[-1]), names))
    if kind == "missing":
        return InputError(f"{keys[-1]!r} is missing", where=source.where(written), hint=f"add `{keys[-1]}:`")
    if kind == "union_tag_invalid":
        names = [name.strip().strip("'") for name in context["expected_tags"].split(",")]
        noun = context["discriminator"].strip("'")
        return InputError(
            f"no {noun} is called {context['tag']!r}",
            where=source.where(written),
            hint=f"{nearest(context['tag'], names)} (`refusalkit plugins` lists what is installed)",
        )
    if kind == "union_tag_not_found":
        return InputError(
            f"does not say which {context['discriminator']}",
            where=source.where(written),
            hint=f"add `{str(context['discriminator']).strip(chr(39))}:`",
        )
    seen = "" if isinstance(item["input"], dict | list) else f", not {item['input']!r}"
    message = item["msg"].removeprefix("Value error, ")
    return InputError(f"{message[:1].lower()}{message[1:]}{seen}", where=source.where(written))


def _as_written(data: Any, keys: KeyPath) -> KeyPath:
    """Drop from pydantic's location the union tags that do not stand in the file."""
    written: list[str | int] = []
    here = data
    for number, key in enumerate(keys):
        last = number == len(keys) - 1
        if isinstance(here, Mapping) and key in here:
            here = here[key]
        elif isinstance(here, list) and isinstance(key, int) and key < len(here):  # noqa: SIM114
            here = here[key]
        elif not last or not isinstance(here, Mapping):
            continue
        written.append(key)
    return tuple(written)


def _siblings(made: type[BaseModel], registry: Registry, keys: KeyPath) -> list[str]:
    """Return the keys that are valid where `keys` points."""
    named: dict[str, Mapping[str, type[BaseModel]]] = {
        "find": registry.strategies,
        "select": registry.selectors,
        "interventions": registry.interventions,
        "metrics": registry.metrics,
    }
    model: type[BaseModel] | None = made
    for number, key in enumerate(keys[:-1]):
        if key in named:
            tag = next((str(part) for part in keys[number + 1 : -1] if part in named[str(key)]), None)
            if tag is not None:
                return list(named[str(key)][tag].model_fields)
        field = model.model_fields.get(str(key)) if model is not None else None
        model = _model_in(field.annotation) if field is not None else model
    return list(model.model_fields) if model is not None else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _model_in(inner)
        if found is not None:
            return found
    return None
