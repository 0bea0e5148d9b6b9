"""Turn what pydantic says of a recipe into what its author should read: the key as written, what is wrong, one hint."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from refusalkit.analysis import ANALYSES, Analysis
from refusalkit.arithmetic import OPERATIONS, Operation
from refusalkit.errors import InputError, nearest
from refusalkit.intervention import InterventionSpec
from refusalkit.recipe import EvaluateSection, Recipe, find_types
from refusalkit.registry import Registry
from refusalkit.strategy import Strategy

KeyPath = tuple[str | int, ...]

#: What a value should have been, where pydantic's own words are about Python.
_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "tuple_type": "a list",
    "dict_type": "keys and values",
    "model_type": "keys and values",
    "model_attributes_type": "keys and values",
}


@dataclass(frozen=True)
class Fault:
    """Hold everything pydantic says of one place; several items where every branch of a union was tried."""

    keys: KeyPath
    """The place as it stands in the file, union tags left out."""
    items: Sequence[Any]
    parent: Any
    """What stands in the file one level up."""


@dataclass(frozen=True)
class Place:
    """Hold what the recipe's model knows of a place."""

    model: type[BaseModel]
    """The model whose key is there, or the model of the section that is there."""
    field: FieldInfo | None
    """The innermost key that the model knows."""
    names: Sequence[str]
    """The installed names that can stand there."""


def described(value: Any) -> str:
    """Describe a YAML value in a few words."""
    if value is None:
        return "nothing"
    if isinstance(value, dict | list):
        return "keys and values" if isinstance(value, dict) else "a list"
    shown = repr(value) if isinstance(value, str | int | float) else repr(str(value))
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def nan_at(data: Any) -> KeyPath | None:
    """Return the first place that holds not-a-number, which no key means and every comparison lets through."""
    return next((keys for keys, value in _scalars(data, (), set()) if value != value), None)


def _scalars(data: Any, keys: KeyPath, seen: set[int]) -> Iterator[tuple[KeyPath, float]]:
    if isinstance(data, float) and math.isnan(data):
        yield keys, data
    elif isinstance(data, dict | list) and id(data) not in seen:
        seen.add(id(data))
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from _scalars(value, (*keys, key), seen)


def faults(data: Any, error: ValidationError) -> list[Fault]:
    """Group what pydantic found by place, unknown keys first: a misspelt key also makes the right one missing."""
    grouped: dict[KeyPath, list[Any]] = {}
    for item in error.errors(include_url=False):
        grouped.setdefault(_as_written(data, item), []).append(item)
    inner = [keys for keys in grouped if not any(keys == other[: len(keys)] and keys != other for other in grouped)]
    found = [Fault(keys, grouped[keys], _at(data, keys[:-1])) for keys in inner]
    return sorted(found, key=lambda fault: fault.items[0]["type"] != "extra_forbidden")


def _as_written(data: Any, item: Any) -> KeyPath:
    """Drop from pydantic's location the union tags that do not stand in the file."""
    written: list[str | int] = []
    here = data
    *_, last = item["loc"]
    for key in item["loc"]:
        known = key in here if isinstance(here, dict) else isinstance(here, list) and isinstance(key, int)
        if known:
            here = here[key]
            written.append(key)
    if item["type"] == "missing":
        written.append(last)
    elif item["type"].startswith("union_tag") and isinstance(here, dict):
        tag = item["ctx"]["discriminator"].strip("'")
        written += [tag] if tag in here else []
    return tuple(written)


def _at(data: Any, keys: KeyPath) -> Any:
    for key in keys:
        data = data[key]
    return data


def explain(fault: Fault, made: type[BaseModel], registry: Registry) -> tuple[KeyPath, InputError]:
    """Put a fault into words; the caller knows which line it stands on."""
    item = fault.items[0]
    match item["type"]:
        case "extra_forbidden":
            names = list(_place(made, registry, item["loc"][:-1]).model.model_fields)
            error = InputError(f"unknown key {fault.keys[-1]!r}", hint=nearest(str(fault.keys[-1]), names))
        case "missing":
            error = _missing(fault)
        case "union_tag_invalid":
            error = _unknown_name(item, registry)
        case "union_tag_not_found":
            noun = item["ctx"]["discriminator"].strip("'")
            error = InputError(f"does not say which {noun}", hint=f"add `{noun}:`")
        case "invalid_key":
            error = InputError(f"a key should be text, not {item['input']!r}", hint=f'quote it: "{item["input"]}":')
        case _:
            error = _unfit(fault, _place(made, registry, item["loc"]))
    return fault.keys, error


def _missing(fault: Fault) -> InputError:
    name = fault.keys[-1]
    section = fault.keys[-2] if len(fault.keys) > 1 else None
    if isinstance(fault.parent, str) and isinstance(section, int):
        return InputError(f"{name!r} is missing", hint=f"write {fault.parent} as keys and values, with `{name}:`")
    if isinstance(fault.parent, str):
        return InputError(f"{name!r} is missing", hint=f"give {fault.parent} its options: a mapping below `{section}:`")
    return InputError(f"{name!r} is missing", hint=f"add `{name}:`" + (f" below `{section}:`" if section else ""))


def _unknown_name(item: Any, registry: Registry) -> InputError:
    names = [name.strip().strip("'") for name in item["ctx"]["expected_tags"].split(",")]
    noun, tag = item["ctx"]["discriminator"].strip("'"), item["ctx"]["tag"]
    broken = "".join(f"; {plugin.owner.name} is broken" for plugin in registry.broken)
    hint = f"{nearest(tag, names)} (`refusalkit plugins` lists what is installed{broken})"
    return InputError(f"no {noun} is called {tag!r}", hint=hint)


def _unfit(fault: Fault, place: Place) -> InputError:
    """Say of a value what it should have been, or only that it cannot be used where several kinds could stand."""
    item = fault.items[0]
    value, kind = item["input"], item["type"]
    if len(fault.items) > 1:
        message = f"cannot be {described(value)}"
    elif kind in _EXPECTED:
        message = f"should be {_EXPECTED[kind]}, not {described(value)}"
    elif kind in ("too_short", "too_long"):
        most, length = ("at least", "min_length") if kind == "too_short" else ("at most", "max_length")
        message = f"should list {most} {item['ctx'][length]}, not {item['ctx']['actual_length']}"
    elif kind == "value_error":
        message = str(item["ctx"]["error"])
    else:
        said = item["msg"].removeprefix("Input ").removeprefix("String ")
        message = f"{said[:1].lower()}{said[1:]}, not {described(value)}"
    return InputError(message, hint=_how(fault, place))


def _how(fault: Fault, place: Place) -> str:
    value, kinds = fault.items[0]["input"], {item["type"] for item in fault.items}
    literals = [item["ctx"]["expected"] for item in fault.items if item["type"] == "literal_error"]
    # Every second part of 'a', 'b' or 'c' is a name.
    names = [name for text in literals for name in text.split("'")[1::2]]
    if isinstance(value, str) and (close := nearest(value, names)).startswith("did you mean"):
        return close
    if kinds == {"value_error"} and isinstance(fault.keys[-1], int):
        # Of one thing in a list, what it is for says more than what the list is for.
        return " ".join((inspect.getdoc(place.model) or "").partition("\n\n")[0].split())
    if place.names:
        return f"one of: {', '.join(place.names)}"
    if kinds & {"model_type", "model_attributes_type"} and len(kinds) == 1:
        return f"write its keys below `{fault.keys[-1]}:`, one a line: {', '.join(place.model.model_fields)}"
    if kinds == {"string_type"} and value is not None and not isinstance(value, dict | list):
        return f'quote it: "{value}"'
    if place.field is not None and place.field.description:
        key = next(key for key in reversed(fault.keys) if isinstance(key, str))
        return f"`{key}`: {' '.join(place.field.description.split())}"
    return "docs/reference/recipe.md and `refusalkit schema` describe every key"


def _place(made: type[BaseModel], registry: Registry, keys: KeyPath) -> Place:
    """Follow a location of pydantic's, union tags included, through the recipe's model."""
    named: dict[str, Mapping[str, type[BaseModel]]] = {
        "find": find_types(registry),
        "select": registry.selectors,
        "interventions": registry.interventions,
        "metrics": registry.metrics,
    }
    parts: list[tuple[type[BaseModel], Mapping[str, type[BaseModel]]]] = [
        (InterventionSpec, registry.interventions),
        (Strategy, registry.strategies),
        (Operation, OPERATIONS),
        (Analysis, ANALYSES),
    ]
    model: type[BaseModel] = made
    field: FieldInfo | None = None
    providers: Mapping[str, type[BaseModel]] = {}
    for key in map(str, keys):
        if key in providers:
            model, providers = providers[key], {}
        elif key in model.model_fields:
            field = model.model_fields[key]
            inner = _model_in(field.annotation)
            if key in named and issubclass(model, Recipe | EvaluateSection):
                providers = named[key]
            else:
                providers = next((known for base, known in parts if inner is not None and issubclass(inner, base)), {})
            model = inner or model
    return Place(model, field, list(providers))


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _model_in(inner)
        if found is not None:
            return found
    return None
