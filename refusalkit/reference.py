"""Write the reference pages from the code: every recipe key, command and hook, with the help that stands beside it.

    python -m refusalkit.reference docs/reference

Only what refusalkit itself provides is written; `refusalkit plugins` and `refusalkit schema` cover installed plugins.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from refusalkit import hookspecs, testing
from refusalkit.adapter import Adapter, Family, Gain, Matrix, Refusal, Write
from refusalkit.analysis import ANALYSES
from refusalkit.arithmetic import OPERATIONS
from refusalkit.cli import app
from refusalkit.command import Command
from refusalkit.interchange.content import Trait
from refusalkit.interchange.formats import FORMATS
from refusalkit.intervention import ActivationSpec, Direction, Edit, Gate, Intervention, InterventionSpec, Place, States
from refusalkit.metric import SIDES, Evidence, Metric, TextMetric, Values
from refusalkit.prompt_source import Passage, PromptSource
from refusalkit.recipe import PromptFiles, recipe_type
from refusalkit.registry import Registry, load_registry
from refusalkit.selector import Attribution, Measure, Score, SelectInputs, Selection, Selector, Subject
from refusalkit.strategy import Captured, DifferentiableSubject, ModelInputs, Setting, Strategy

WIDTH = 80
NOTICE = "<!-- Written by `python -m refusalkit.reference` from the help in the code. -->"

#: The sections and lists of a recipe whose values are chosen from the registry, and where the choices stand.
CHOICES = {"find": "strategies", "select": "selectors", "interventions": "interventions", "metrics": "metrics"}


def pages() -> dict[str, str]:
    """Return the text of every generated page by file name."""
    registry = load_registry(entry_points=False)
    return {
        "recipe.md": recipe_page(registry),
        "command-line.md": command_line_page(),
        "hooks.md": hooks_page(registry),
        "formats.md": formats_page(),
    }


# -- the recipe -------------------------------------------------------------------------------------------------


def recipe_page(registry: Registry) -> str:
    """List every key of a recipe with its type, default and help."""
    made = recipe_type(registry)
    intro = (
        "A recipe is one YAML file. Unknown keys are errors. Every key without a default is required. "
        "`refusalkit schema` prints the same as a JSON schema, installed plugins included."
    )
    lines = ["# Recipe", "", NOTICE, "", *_wrapped(intro), "", "## Top level", ""]
    lines += [line for name, field in made.model_fields.items() for line in _key(name, field)]
    for name, field in made.model_fields.items():
        section = _model(field.annotation)
        if name in CHOICES:
            lines += _choices(name, registry)
        elif name == "analyze":
            lines += ["", "## `analyze`", "", *_described("analyze", ANALYSES)]
        elif section is not None:
            lines += ["", f"## `{name}`", "", *_wrapped(_doc(section)), ""]
            lines += [line for key, inner in section.model_fields.items() for line in _key(key, inner)]
            if name == "prompts":
                lines += ["", "### One source a split", "", *_wrapped(_doc(PromptFiles)), ""]
                lines += [line for key, inner in PromptFiles.model_fields.items() for line in _key(key, inner)]
                lines += ["", "### Prompt sources", "", "An address is `SCHEME:REST`.", ""]
                lines += [
                    line
                    for source in registry.prompt_sources.values()
                    for line in _item(f"`{source.scheme}:`", source.help)
                ]
            for key in section.model_fields:
                lines += _choices(key, registry) if key in CHOICES else []
    return "\n".join(lines) + "\n"


def _choices(name: str, registry: Registry) -> list[str]:
    """Describe every provider that may stand at `name`, with its options."""
    where = name if name in ("find", "select") else f"evaluate.{name}"
    bare = "A bare name stands for that choice with all its defaults."
    lines = ["", f"## `{where}`", "", bare, *_described(where, getattr(registry, CHOICES[name]))]
    if name == "find":
        lines += ["", "## `find.then`", "", *_wrapped(_THEN), *_described("find.then", OPERATIONS)]
    return lines


_THEN = (
    "Beside its own options every strategy takes `then`: a list of what to do with its directions, first to last. "
    "A bare name stands for an operation with all its defaults."
)


def _described(where: str, providers: Mapping[str, type[BaseModel]]) -> list[str]:
    """Describe each of several providers under a heading of its own."""
    lines: list[str] = []
    for choice, provider in providers.items():
        lines += ["", f"### `{where}`: `{choice}`", "", *_wrapped(_doc(provider))]
        helps = attribute_docs(provider)
        options = {
            key: field
            for key, field in provider.model_fields.items()
            if field.default != choice and key not in _shared(provider)
        }
        keys = [line for key, field in options.items() for line in _key(key, field, helps.get(key))]
        if _shared(provider):
            keys += _item("`layers`, `where`, `steps`", "see below")
        lines += ["", *_wrapped(_measured(provider))] if issubclass(provider, Metric) else []
        lines += ["", *keys] if keys else []
    if any(map(_shared, providers.values())):
        lines += ["", f"### `{where}`: `layers`, `where`, `steps`", "", *_wrapped(_WINDOWS), ""]
        fields = ActivationSpec.model_fields
        lines += [line for key in _shared(ActivationSpec) for line in _key(key, fields[key])]
    return lines


def _measured(metric: type[Metric]) -> str:
    """Say what the numbers of a metric are, and what they rest on."""
    sides = "of every side" if metric.sides == SIDES else f"that are {' or '.join(metric.sides)}"
    over = "texts" if issubclass(metric, TextMetric) else f"prompts {sides}"
    return f"A {metric.kind} over {over}. Unit: {metric.unit}. Needs: `{metric.needs}`."


_WINDOWS = "Whatever acts on activations can be kept to some layers, some tokens and some decode steps."


def _shared(provider: type[BaseModel]) -> tuple[str, ...]:
    """Return the keys that a provider has in common with others, and which are described once."""
    return tuple(inspect.get_annotations(ActivationSpec))[1:] if issubclass(provider, ActivationSpec) else ()


def _key(name: str, field: FieldInfo, about: str | None = None) -> list[str]:
    default = "required" if field.is_required() else f"default `{_value(field)}`"
    text = " ".join((about or field.description or "").split())
    return _item(f"`{name}` ({_type(field.annotation, field.metadata, name)}; {default})", text)


def _value(field: FieldInfo) -> str:
    if field.default_factory is not None or isinstance(field.default, BaseModel):
        return "{}"
    return _yaml(field.default)


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    return str(value)


_NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null", Path: "path"}
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def _type(annotation: Any, metadata: typing.Sequence[Any] = (), key: str = "") -> str:
    """Name a type in a recipe's terms."""
    if key in CHOICES or key == "analyze":
        return "one of the choices below" if key in ("find", "select") else "list of the choices below"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0], arguments[1:])
    bounds = [
        f"{sign} {getattr(part, name)}"
        for item in metadata
        for part in (item.metadata if isinstance(item, FieldInfo) else [item])
        for name, sign in _BOUNDS.items()
        if hasattr(part, name)
    ]
    if origin is typing.Literal:
        text = ", ".join(f"`{value}`" for value in arguments)
    elif origin in (typing.Union, types.UnionType):
        text = " or ".join(_type(part) for part in arguments)
    elif origin is tuple:
        item = _type(arguments[0])
        text = f"list of ({item})" if " or " in item else f"list of {item}"
    elif origin is dict:
        text = "keys and values"
    elif isinstance(annotation, type) and issubclass(annotation, InterventionSpec | Strategy):
        text = "strategy" if issubclass(annotation, Strategy) else "intervention"
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        text = "keys, see below"
    else:
        text = _NAMES[annotation]
    return f"{text} {' and '.join(bounds)}" if bounds else text


def _model(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


# -- the command line -------------------------------------------------------------------------------------------


def command_line_page() -> str:
    """List every command with its arguments and options."""
    intro = (
        "stdout is data, stderr is talk. Exit status 0: done; 1: the run failed or could not mean anything; 2: bad "
        "input; 130: interrupted. `python -m refusalkit` is the same as `refusalkit`."
    )
    lines = ["# Command line", "", NOTICE, "", *_wrapped(intro)]
    for name, callback in commands(app):
        lines += ["", f"## `refusalkit {name}`", "", *_paragraphs(callback)]
        items = [line for parameter in _parameters(callback) for line in parameter]
        lines += ["", *items] if items else []
    return "\n".join(lines) + "\n"


def commands(group: typer.Typer, prefix: str = "") -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield every command's full name and the function behind it."""
    for command in group.registered_commands:
        if command.callback is not None:
            yield prefix + (command.name or command.callback.__name__.replace("_", "-")), command.callback
    for inner in group.registered_groups:
        if inner.typer_instance is not None:
            yield from commands(inner.typer_instance, f"{prefix}{inner.name} ")


def _parameters(callback: Callable[..., Any]) -> Iterator[list[str]]:
    hints = typing.get_type_hints(callback, include_extras=True)
    for name, parameter in inspect.signature(callback).parameters.items():
        annotation, info = typing.get_args(hints[name])[:2]
        if isinstance(info, typer.models.ArgumentInfo):
            yield _item(f"`{info.metavar or name.upper()}`", info.help or "")
            continue
        # Under `Annotated`, typer keeps a flag that is spelt out where the default would stand.
        spelt = [text for text in (info.default, *(info.param_decls or ())) if str(text).startswith("--")]
        flag = spelt[0] if spelt else f"--{name.replace('_', '-')}"
        choices = [part for part in _parts(annotation) if issubclass(part, str) and hasattr(part, "__members__")]
        metavar = info.metavar or next((_METAVARS[part] for part in _parts(annotation) if part in _METAVARS), "")
        shown = f"{flag} {'VALUE' if choices else metavar}".strip()
        about = info.help or ""
        if choices:
            about += f" One of {', '.join(f'`{choice}`' for choice in choices[0].__members__)}."
        if parameter.default is inspect.Parameter.empty:
            about += " Required."
        elif parameter.default is not None and parameter.default is not False:
            about += f" Default `{getattr(parameter.default, 'value', parameter.default)}`."
        if any(typing.get_origin(part) is list for part in (annotation, *typing.get_args(annotation))):
            about += ". May be given several times."
        yield _item(f"`{shown}`", about)


_METAVARS: Mapping[type, str] = {Path: "PATH", int: "NUMBER"}


def _parts(annotation: Any) -> list[type]:
    return [part for part in (annotation, *typing.get_args(annotation)) if isinstance(part, type)]


# -- the hooks --------------------------------------------------------------------------------------------------

#: What each hook returns first, then what it is made of, given and asked for; and its laws.
_BASES: dict[str, tuple[tuple[type, ...], Callable[..., Any]]] = {
    "adapters": ((Adapter, Write, Matrix, Gain, Refusal, Family), testing.check_adapter),
    "strategies": ((Strategy, Captured, ModelInputs, DifferentiableSubject, Setting), testing.check_strategy),
    "selectors": (
        (Selector, SelectInputs, Subject, Measure, Attribution, Selection, Score),
        testing.check_selector,
    ),
    "interventions": (
        (InterventionSpec, ActivationSpec, Direction, Place, States, Intervention, Edit, Gate),
        testing.check_intervention,
    ),
    "metrics": ((Metric, TextMetric, Evidence, Values), testing.check_metric),
    "prompt_sources": ((PromptSource, Passage), testing.check_prompt_source),
    "commands": ((Command,), testing.check_command),
}


def hooks_page(registry: Registry) -> str:
    """List every hook, what it returns, and what is built in."""
    lines = ["# Hooks", "", NOTICE, "", *_paragraphs(hookspecs)]
    for kind, (bases, laws) in _BASES.items():
        hook = f"refusalkit_{kind}"
        function = getattr(hookspecs, hook)
        signature = f"def {hook}() -> {inspect.signature(function).return_annotation}: ..."
        lines += ["", f"## `{hook}`", "", "```text", signature, "```", "", *_paragraphs(function)]
        for base in bases:
            lines += ["", f"### `{base.__name__}`", "", *_paragraphs(base), "", *_members(base)]
        lines += ["", "### Laws", "", *_wrapped(f"`refusalkit.testing.{laws.__name__}`: {_doc(laws)}")]
        built_in = getattr(registry, kind)
        lines += ["", "### Built in", ""] if built_in else []
        for name, value in built_in.items():
            lines += _item(f"`{name}`, from {registry.owner(hook, name).name}", _about(value))
    return "\n".join(lines) + "\n"


def _members(base: type) -> list[str]:
    """List the fields, class variables and methods that a provider has or sets."""
    helps = attribute_docs(base)
    own = inspect.get_annotations(base)
    if is_dataclass(base):
        own = {
            field.name: f"{field.type}" if field.default is MISSING else f"{field.type} = {field.default!r}"
            for field in fields(base)
        }
    lines = [
        line
        for name, annotation in own.items()
        if not name.startswith("_") and name != "model_config"
        for line in _item(f"`{name}: {annotation}`", helps.get(name, ""))
    ]
    public = {name: value for name, value in vars(base).items() if not name.startswith("_")}
    asked = [name for name, value in public.items() if inspect.isfunction(value)]
    if base is Metric:
        for name, value in public.items():
            if isinstance(value, property):
                returned = inspect.signature(value.fget).return_annotation  # type: ignore[arg-type]
                lines += _item(f"`{name}: {returned}`", " ".join((inspect.getdoc(value) or "").split()))
    for name in (
        asked if base in (Subject, DifferentiableSubject, Metric) else sorted(getattr(base, "__abstractmethods__", ()))
    ):
        method = getattr(base, name)
        about = " ".join((inspect.getdoc(method) or "").split())
        lines += _item(f"`{name}{inspect.signature(method)}`".replace("'", ""), about)
    return lines


def _about(value: Any) -> str:
    if isinstance(value, Adapter):
        patterns = f", model ids {', '.join(f'`{pattern}`' for pattern in value.model_ids)}" if value.model_ids else ""
        edit = [] if value.exactness == "refused" else [f"the weight edit is {value.exactness}"]
        refusal = [str(value.refuses)] if value.refuses else []
        names = ", ".join(f"`{name}`" for name in value.architectures)
        return "; ".join([f"{names}{patterns}", *edit, *refusal]) + "."
    if isinstance(value, PromptSource):
        return value.help
    return re.split(r"(?<!et al)\. ", _doc(value))[0].rstrip(".") + "."


def attribute_docs(cls: type) -> dict[str, str]:
    """Return the text under each field of a class, inherited ones included."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.partition(".")[0] != hookspecs.NAME:
            continue
        body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]).body
        for field, after in itertools.pairwise(body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                found[field.target.id] = " ".join(str(after.value.value).split())
    return found


# -- formats ----------------------------------------------------------------------------------------------------


def formats_page() -> str:
    """List the formats of directions that are read and written, and what each can say."""
    intro = (
        "`refusalkit convert SOURCE TARGET` reads and writes every one of them. Sources are told by name and content. "
        "A target is told by how it ends; `--to` chooses where several end alike."
    )
    head = ("format", "ends in", "done with it", "subspace", "kept", "needs the model")
    needs = {"nothing": "no", "model_type": "its configuration, where the source does not say", "model": "yes"}
    rows = [
        (
            f"`{kind.name}`",
            ", ".join(f"`{suffix}`" if suffix else "a folder" for suffix in kind.suffixes),
            " or ".join(f"`{operation}`" for operation in kind.says) or "left open",
            "yes" if kind.subspaces else "no",
            ", ".join(trait for trait in typing.get_args(Trait) if trait in kind.keeps),
            needs[kind.needs],
        )
        for kind in FORMATS
    ]
    table = [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]
    items = [line for kind in FORMATS for line in _item(f"`{kind.name}`", f"{kind.what}. Cannot say {kind.limits}.")]
    lines = ["# Formats", "", NOTICE, "", *_wrapped(intro), "", *table, "", *items, "", *_wrapped(_TRAITS)]
    return "\n".join(lines) + "\n"


_TRAITS = (
    "*Kept* lists what survives: `digits` beyond float32, `length` of the rows of a subspace, `operation`, `layer` and "
    "`position` of a direction that is removed everywhere (one that is added always has its layer), `provenance` "
    "(model, template, strategy), and the rest of a `run` where the target is a folder."
)


# -- text -------------------------------------------------------------------------------------------------------


def _doc(value: Any) -> str:
    return " ".join((inspect.getdoc(value) or "").split())


def _paragraphs(value: Any) -> list[str]:
    paragraphs = (inspect.getdoc(value) or "").split("\n\n")
    return [line for text in paragraphs for line in (*_wrapped(" ".join(text.split())), "")][:-1]


def _item(head: str, text: str) -> list[str]:
    return textwrap.wrap(
        f"- {head}: {text}" if text else f"- {head}",
        WIDTH,
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def write(folder: Path) -> None:
    """Write every generated page into `folder`."""
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/reference"))
