"""Work out what a recipe will do before a weight is loaded.

`plan` is the only place where names are looked up: afterwards every stage works with the things themselves. Each
stage's content key hashes what decides its result, so a finished stage is recognised and never run twice.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import refusalkit
from refusalkit.analysis import Analysis
from refusalkit.arithmetic import Find, content, fitted
from refusalkit.artifacts import AS_FOUND, LAYER_CONVENTION, Split
from refusalkit.checkpoint import Checkpoint, open_checkpoint
from refusalkit.errors import InputError, nearest
from refusalkit.limits import check_quantized, check_remote
from refusalkit.metric import SIDES, Side, TextMetric
from refusalkit.prompt_source import Passage, PromptSource
from refusalkit.prompt_split import check_leaks, in_proportion, split_pool, without_duplicates
from refusalkit.recipe import EvaluateSection, PromptFiles, PromptsSection, Recipe
from refusalkit.registry import Registry
from refusalkit.selector import Selector
from refusalkit.stages.asking import WRITTEN
from refusalkit.stages.prompts import Request
from refusalkit.store import STAGES, content_key
from refusalkit.strategy import Setting
from refusalkit.template import ChatTemplate, Thinking

T = TypeVar("T")
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
#: Ends the key of captured activations that hold every prompt's. What follows from the means does not depend on it.
_SAMPLES = "+samples"


@dataclass(frozen=True, eq=False)
class Plan:
    """Hold everything a run needs, resolved."""

    recipe: Recipe
    registry: Registry
    checkpoint: Checkpoint
    template: ChatTemplate
    prompts: Request
    keys: Mapping[str, str]
    """The content key of every stage, and of the unmodified model's completions (`baseline`)."""
    find: Find
    """The section `find` as it runs on this model, its files looked up."""
    evaluate: EvaluateSection
    """The section `evaluate` as it runs, the texts of its metrics read."""
    analyses: tuple[Analysis, ...] = ()
    """The section `analyze` as it runs, its folders looked up."""
    groups: tuple[Mapping[str, tuple[str, ...]], ...] = ()
    """The prompts that each analysis needs beside the run's own, by the name it has for them."""
    host: str | None = None
    """The NDIF server the model runs on; None for this machine."""
    keeps_samples: bool = False
    """Whether capture keeps every prompt's activations although this recipe asks for the means alone."""

    @property
    def sides(self) -> tuple[Side, ...]:
        """The sides whose activations are captured."""
        return _sides(self.find)

    @property
    def needs(self) -> Literal["means", "samples"]:
        """What capture keeps."""
        return "samples" if self.keeps_samples else _needs(self.find, self.recipe.select)

    def key(self, stage: str) -> str:
        """Return the key to write the artifact of `stage` under."""
        return self.keys[stage] + (_SAMPLES if stage == "capture" and self.needs == "samples" else "")

    def accepts(self, stage: str) -> tuple[str, ...]:
        """Return the keys under which a finished artifact of `stage` serves: samples come with the same means.

        None serve where the recipe does not have the stage.
        """
        if stage != "capture":
            return (self.keys[stage],) if stage in self.keys else ()
        with_samples = self.keys[stage] + _SAMPLES
        asks_for_samples = _needs(self.find, self.recipe.select) == "samples"
        return (with_samples,) if asks_for_samples else (self.keys[stage], with_samples)

    @property
    def n_candidates(self) -> int:
        """How many places a direction is looked for."""
        return len(self.prompts.positions) * self.checkpoint.n_layers

    def metadata(self, stage: str) -> dict[str, str]:
        """Return what is written beside the tensors of a stage, so that a file can be understood alone."""
        return {
            "made_by": f"refusalkit {refusalkit.__version__}",
            "stage": stage,
            "model": self.checkpoint.section.id,
            "model_revision": self.checkpoint.revision,
            "template_hash": self.template.digest(),
            "site": self.recipe.capture.site,
            "layer_convention": LAYER_CONVENTION,
            "positions": ",".join(map(str, self.prompts.positions)),
            "strategy": self.find.label,
            "operation": AS_FOUND,
        }


#: The prompts of every side, by split.
Pools = dict[Side, dict[Split, tuple[str, ...]]]


def make_plan(
    recipe: Recipe, folder: Path, registry: Registry, *, keeps_samples: bool = False, measured: Split = "test"
) -> Plan:
    """Resolve a recipe whose relative paths start at `folder`.

    With `measured="validation"` the run evaluates on the validation prompts, unfiltered, and knows no test prompt: for
    whoever chooses between runs.
    Raises `InputError` for a model, adapter, prompt source or option that cannot be used.
    """
    check_remote(recipe)
    pools, dropped = read_pools(recipe.prompts, folder, registry)
    pools = {side: {**splits, "test": splits[measured]} for side, splits in pools.items()}
    checkpoint = open_checkpoint(recipe.model, registry)
    check_quantized(recipe)
    template = chat_template(recipe, checkpoint)
    _check_interventions(recipe, checkpoint, template)
    wanted = recipe.find.reads_at if recipe.capture.positions == "auto" else recipe.capture.positions
    if recipe.select.openers != "auto":
        _check_openers(recipe.select.openers, template)
    positions = template.positions(wanted if isinstance(wanted, tuple) else (wanted,))
    request = _request(recipe, pools, checkpoint, positions, dropped)
    _check_sides(recipe)
    _check_finds_again(recipe)
    for metric in recipe.evaluate.metrics:
        metric.check()
    find = fitted(
        recipe.find,
        Setting(
            folder,
            request.positions,
            template.positions(("instruction_end",))[0],
            recipe.capture.site,
            checkpoint.n_layers,
            checkpoint.d_model,
        ),
    )
    evaluate = _with_texts(recipe.evaluate, folder, registry)
    keys = _keys((recipe, find, evaluate), registry, checkpoint, (template, request))
    analyses = tuple(analysis.at(folder) for analysis in recipe.analyze)
    groups = tuple(_groups(recipe, folder, registry))
    if recipe.analyze:
        keys |= {"analyze": _analyze_key(recipe, registry, (analyses, groups), keys)}
    return Plan(
        recipe,
        registry,
        checkpoint,
        template,
        request,
        keys,
        find,
        evaluate,
        analyses,
        groups,
        _host(recipe),
        keeps_samples,
    )


def _request(recipe: Recipe, pools: Pools, checkpoint: Checkpoint, positions: tuple[int, ...], dropped: int) -> Request:
    return Request(
        harmful=pools["harmful"],
        harmless=pools["harmless"],
        positions=positions,
        filter=recipe.prompts.filter,
        openers=recipe.select.openers,
        family_openers=checkpoint.adapter.family.openers,
        duplicates_dropped=dropped,
        over_refusal=pools.get("over_refusal"),
        openers_needed=recipe.prompts.filter or recipe.select.scores_refusals,
    )


def _groups(recipe: Recipe, folder: Path, registry: Registry) -> Iterator[Mapping[str, tuple[str, ...]]]:
    """Read the prompts that analyses name; a source that is divided gives its training prompts."""
    for number, analysis in enumerate(recipe.analyze):
        found = {}
        for name, address in analysis.sources.items():
            pools = read_source(address, folder, registry, f"analyze.{number}.groups.{name}")
            found[name] = without_duplicates(_only(pools, "train"))[0]
        yield found


def _analyze_key(
    recipe: Recipe,
    registry: Registry,
    asked: tuple[Sequence[Analysis], Sequence[Mapping[str, tuple[str, ...]]]],
    keys: Mapping[str, str],
) -> str:
    """Return the content key of the analyses, which follow from the choice and from how refusal is measured."""
    analyses, groups = asked
    left_out = set() if any(each.follows_interventions for each in analyses) else {"interventions"}
    section = recipe.evaluate.model_dump(mode="json", serialize_as_any=True, exclude={"controls", *left_out})
    own = {
        "analyses": [[each.model_dump(mode="json", exclude={"folder"}), each.files] for each in analyses],
        "groups": groups,
        "evaluate": section,
        "owners": [str(registry.owner("refusalkit_metrics", metric.metric)) for metric in recipe.evaluate.metrics],
    }
    return content_key({"stage": "analyze", "parent": keys["select"], "own": own})


def _sides(find: Find) -> tuple[Side, ...]:
    """Return the sides that the strategies of a recipe find from."""
    return tuple(side for side in SIDES if any(side in strategy.sides for strategy in find.strategies))


def _needs(find: Find, select: Selector) -> Literal["means", "samples"]:
    """Return what a recipe asks capture to keep."""
    return "samples" if "samples" in {select.needs, *(strategy.needs for strategy in find.strategies)} else "means"


def _check_sides(recipe: Recipe) -> None:
    """Refuse what works on over-refusal prompts where the recipe names none."""
    asking = [strategy.strategy for strategy in recipe.find.strategies if "over_refusal" in strategy.sides]
    asking += [recipe.select.selector] if "over_refusal" in recipe.select.sides else []
    asking += [spec.label for spec in recipe.evaluate.interventions if "over_refusal" in spec.sides]
    if asking and recipe.prompts.over_refusal is None:
        raise InputError(
            f"{asking[0]} works on safe prompts that look harmful, and the recipe names none",
            where="prompts.over_refusal",
            hint="add `over_refusal:` below `prompts:`, such as builtin:over_refusal_safe",
        )


def _check_finds_again(recipe: Recipe) -> None:
    selector, find = recipe.select, recipe.find
    if (selector.finds_again or selector.tries) and find.needs_model:
        raise InputError(
            f"{selector.selector} finds directions again, and {find.label} needs the model for that",
            where="select",
            hint="choose another selector, such as causal",
        )
    for option in selector.tries:
        if option not in type(find).model_fields:
            raise InputError(
                f"{selector.selector} tries values of `{option}`, which {find.strategy} does not have",
                where="select",
                hint="take a strategy that has it, such as false_refusal, or let the selector try nothing",
            )
        if option in find.model_fields_set:
            raise InputError(
                f"`find.{option}` has one value, and {selector.selector} tries several",
                where="select",
                hint=f"leave out `find.{option}`, or let the selector try nothing",
            )


def chat_template(recipe: Recipe, checkpoint: Checkpoint) -> ChatTemplate:
    """Resolve how prompts are rendered, with the thinking mode off unless the recipe switches it on."""
    template = ChatTemplate(checkpoint.tokenizer, recipe.prompts.system, instead=recipe.prompts.chat_template)
    options: dict[str, Any] = dict(recipe.prompts.template_options)
    for name in options:
        _check_variable(name, template, f"prompts.template_options.{name}")
    asked, family = recipe.prompts.thinking, checkpoint.adapter.family
    variable = family.thinking
    if variable is not None:
        if asked is not None:
            _check_variable(variable, template, "prompts.thinking")
        if variable in _words(template):
            options = {variable: bool(asked), **options}
        else:
            variable = None
    on = bool(options[variable]) if variable is not None else bool(asked)
    template = replace(template, options=options, thinking=Thinking(on, variable, family.answer_header))
    if asked is not None and not template.thinks:
        raise InputError(
            f"the family {checkpoint.adapter.name!r} has no thinking mode to switch",
            where="prompts.thinking",
            hint="leave it out, or set the template's own variable in `prompts.template_options`",
        )
    return template


def _words(template: ChatTemplate) -> set[str]:
    return set(re.findall(r"\b[A-Za-z_]\w*\b", str(template.source)))


def _host(recipe: Recipe) -> str | None:
    """Return the server that was chosen, where the model runs on one."""
    if recipe.model.where == "local":
        return None
    from refusalkit.engine.server import chosen_host

    return chosen_host(recipe.model.host)


def _check_interventions(recipe: Recipe, checkpoint: Checkpoint, template: ChatTemplate) -> None:
    for spec in recipe.evaluate.interventions:
        spec.check(checkpoint.n_layers)
        if spec.gated and template.thinking.on and template.thinks:
            raise InputError(
                "its gate is read where the answer starts, and completions start with a thought",
                where=f"evaluate.interventions: {spec.label}",
                hint="leave `prompts.thinking` out",
            )


def _check_openers(openers: tuple[str | int, ...], template: ChatTemplate) -> None:
    """Find out before any weight is loaded whether the openers can be turned into tokens."""
    if not openers:
        raise InputError("lists no opener", where="select.openers", hint="name some, or write `auto`")
    template.opener_ids(openers)


def _check_variable(name: str, template: ChatTemplate, where: str) -> None:
    """Refuse a variable that the chat template never reads: switching it would change nothing and raise nothing."""
    import inspect

    reserved = {"messages", *inspect.signature(template.tokenizer.apply_chat_template).parameters}
    words = _words(template)
    if name in reserved or name not in words:
        close = difflib.get_close_matches(name, words - reserved, n=1, cutoff=0.7)
        raise InputError(
            f"the chat template has no variable {name!r} to set",
            where=where,
            hint=f"did you mean {close[0]!r}?" if close else "leave it out, or read the chat template",
        )


def read_pools(section: PromptsSection, folder: Path, registry: Registry) -> tuple[Pools, int]:
    """Read the prompts of every side and divide them into splits; also count the duplicates that were dropped.

    Raises `InputError` for a prompt that stands in two splits.
    """
    sizes = {"train": section.train, "validation": section.validation, "test": section.test}
    declared: dict[Side, str | PromptFiles | None] = {side: getattr(section, side) for side in SIDES}
    pools: dict[Side, dict[Split, tuple[str, ...]]] = {}
    dropped = 0
    for side, declaration in declared.items():
        if declaration is None:
            continue
        where = f"prompts.{side}"
        found: dict[str, tuple[str, ...]]
        if isinstance(declaration, PromptFiles):
            found = {
                split: _only(read_source(getattr(declaration, split), folder, registry, f"{where}.{split}"), split)
                for split in SPLITS
            }
        else:
            found = dict(read_source(declaration, folder, registry, where))
        distinct = {name: without_duplicates(prompts) for name, prompts in found.items()}
        dropped += sum(count for _, count in distinct.values())
        if "all" in distinct:
            whole = distinct["all"][0]
            # Prompts that look harmful and are safe are rare, and other methods do without them.
            asked = in_proportion(sizes, len(whole)) if side == "over_refusal" else sizes
            divided = split_pool(whole, asked, section.seed, where)
            pools[side] = {split: divided[split] for split in SPLITS}
        else:
            pools[side] = {split: _at_most(distinct[split][0], sizes[split], section.seed) for split in SPLITS}
    check_leaks([(side, split, prompts) for side, splits in pools.items() for split, prompts in splits.items()])
    return pools, dropped


def _only(found: Mapping[str, tuple[str, ...]], split: Split) -> tuple[str, ...]:
    """Take a whole source for one split, or the split of that name where the source is divided."""
    return found["all"] if "all" in found else found[split]


def _at_most(prompts: tuple[str, ...], size: int, seed: int) -> tuple[str, ...]:
    import random

    return prompts if len(prompts) <= size else tuple(random.Random(seed).sample(prompts, size))


def read_source(address: str, folder: Path, registry: Registry, where: str) -> Mapping[str, tuple[str, ...]]:
    """Read the prompts at `scheme:address`."""
    source, rest = _source(address, registry, where)
    return _read(partial(source.read, rest, folder), where)


def _with_texts(section: EvaluateSection, folder: Path, registry: Registry) -> EvaluateSection:
    """Read the texts of the metrics that look at some."""
    metrics = tuple(
        metric.holding(_texts(metric, folder, registry)) if isinstance(metric, TextMetric) else metric
        for metric in section.metrics
    )
    return section.model_copy(update={"metrics": metrics})


def _texts(metric: TextMetric, folder: Path, registry: Registry) -> tuple[Passage, ...]:
    where = f"evaluate.metrics: {metric.metric}.source"
    if not metric.answered:
        found = read_source(metric.source, folder, registry, where)
        return tuple(Passage(text) for text in _only(found, "test"))
    source, rest = _source(metric.source, registry, where)
    if source.read_answered is None:
        answering = [scheme for scheme, each in registry.prompt_sources.items() if each.read_answered is not None]
        raise InputError(
            f"{source.scheme}: has prompts and no answers", where=where, hint=f"take one of {', '.join(answering)}"
        )
    return _read(partial(source.read_answered, rest, folder), where)


def _source(address: str, registry: Registry, where: str) -> tuple[PromptSource, str]:
    """Return the source that an address names, and the rest of the address."""
    scheme, separator, rest = address.partition(":")
    source = registry.prompt_sources.get(scheme)
    if source is None or not separator:
        known = list(registry.prompt_sources)
        schemes = f"the schemes are {', '.join(known)}"
        hint = nearest(scheme, known) if separator else f"write SCHEME:ADDRESS, such as file:{address}; {schemes}"
        raise InputError(f"{address!r} names no prompt source", where=where, hint=hint)
    return source, rest


def _read(read: Callable[[], T], where: str) -> T:
    try:
        return read()
    except InputError as error:
        # The source knows the file and the line; which side and split it was read for is known here.
        error.where = f"{where}: {error.where}" if error.where else where
        raise


def _keys(
    as_run: tuple[Recipe, Find, EvaluateSection],
    registry: Registry,
    checkpoint: Checkpoint,
    prompts: tuple[ChatTemplate, Request],
) -> dict[str, str]:
    """Return every stage's content key; each includes that of the stage before.

    What only some recipes have is left out of the keys of the others.
    """
    (recipe, find, evaluate), (template, request) = as_run, prompts
    texts = {metric.label: metric.texts for metric in evaluate.metrics if isinstance(metric, TextMetric)}
    others = [strategy.strategy for strategy in find.strategies[1:]]
    extra_sides = [side for side in _sides(find) if side == "over_refusal"]

    def owner(kind: str, name: str) -> str:
        return str(registry.owner(f"refusalkit_{kind}", name))

    model = recipe.model
    own: dict[str, dict[str, Any]] = {
        "prompts": {
            "model": [model.id, checkpoint.revision, model.dtype, model.quantize],
            "adapter": [repr(checkpoint.adapter), owner("adapters", checkpoint.adapter.name)],
            "template": template.digest(),
            "request": [request.harmful, request.harmless, request.positions, request.filter, request.openers],
            **({"over_refusal": request.over_refusal} if request.over_refusal else {}),
            **({} if request.openers_needed else {"openers_needed": False}),
        },
        "capture": {"site": recipe.capture.site, **({"sides": extra_sides} if extra_sides else {})},
        "find": {
            "section": content(find),
            "owner": owner("strategies", find.strategy),
            **({"others": [owner("strategies", name) for name in others]} if others else {}),
            # What it makes of the model is our work as much as its owner's. All else that decides the result (prompts,
            # openers, template, weights) is in the key of the stage before.
            **({"engine": refusalkit.__version__} if find.needs_model else {}),
        },
        "select": {
            "section": recipe.select.model_dump(mode="json"),
            "owner": owner("selectors", recipe.select.selector),
        },
        "evaluate": {
            "section": evaluate.model_dump(mode="json", serialize_as_any=True),
            "owners": [owner("interventions", name) for spec in evaluate.interventions for name in spec.names]
            + [owner("metrics", metric.metric) for metric in evaluate.metrics],
            **({"texts": {label: list(map(astuple, read)) for label, read in texts.items()}} if texts else {}),
        },
    }
    keys: dict[str, str] = {}
    parent = ""
    for stage in STAGES:
        parent = keys[stage] = content_key({"stage": stage, "parent": parent, "own": own[stage]})
    sides = {side for metric in evaluate.metrics if metric.needs in WRITTEN for side in metric.sides}
    sides &= set(request.sides)
    written = {"sides": sorted(sides), "max_new_tokens": evaluate.max_new_tokens}
    return {**keys, "baseline": content_key({"stage": "baseline", "parent": keys["prompts"], "own": written})}
