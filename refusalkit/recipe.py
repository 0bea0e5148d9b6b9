"""Say what a recipe may contain.

A recipe is YAML, checked against frozen pydantic models that forbid unknown keys. The sections `find`, `select` and
`evaluate` take their choices from what is installed, so `recipe_type(registry)` builds the model (and with it the
JSON schema and every error message) from the registry. Nothing here imports torch: checking a recipe is instant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, reduce
from operator import or_
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    create_model,
    field_validator,
)
from pydantic.fields import FieldInfo

from refusalkit.analysis import ANALYSES, Analysis
from refusalkit.arithmetic import OPERATIONS, Find
from refusalkit.intervention import InterventionSpec, Site
from refusalkit.metric import Metric
from refusalkit.registry import Registry
from refusalkit.selector import Selector
from refusalkit.strategy import Strategy

M = TypeVar("M", bound=BaseModel)
Position = Literal["post_instruction", "instruction_end"] | Annotated[int, Field(lt=0)]
#: Numbers are numbers here: YAML's `yes` is not 1.
Count = Annotated[int, Field(ge=1, strict=True)]
Seed = Annotated[int, Field(strict=True)]


class Section(BaseModel):
    """Forbid unknown keys and changes, as every part of a recipe does."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ModelSection(Section):
    """Which model to study, and how to load it."""

    id: str
    """A model hub name, a folder, or one of the embedded models: `tiny:llama`, `tiny:gemma`, `tiny:qwen`, `tiny:yi`."""
    revision: str | None = None
    """The branch, tag or commit of a hub model; null takes the hub's default and the run records the commit."""
    adapter: str | None = None
    """The architecture adapter by name; null finds the one that matches the checkpoint."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The weights' type; `auto` takes the checkpoint's own, and float32 for the embedded models."""
    device: str = "auto"
    """`auto` (a GPU where there is one), `cpu`, `cuda`, `cuda:1`, `mps`; `balanced` spreads layers over all GPUs."""
    quantize: Literal["none", "int8", "nf4"] = "none"
    """Pack the weights to 8 or 4 bits as they are loaded (bitsandbytes, the extra `quantized`). Activations are read
    and edited as ever; the weights can no longer be edited."""
    batch_size: Literal["auto"] | Count = "auto"
    """Prompts a forward pass; `auto` starts at 32 and halves when memory runs out. Results do not depend on it."""
    where: Literal["local", "ndif"] = "local"
    """Where the model runs: `local`, this machine; `ndif`, a server that hosts it (docs/how-to/run-on-ndif.md)."""
    host: str | None = None
    """The address of the NDIF server; null takes `NDIF_HOST` or the one in nnsight's configuration."""
    trust_remote_code: bool = False
    """Whether code inside the checkpoint may run. Only for checkpoints whose code you have read."""


class PromptFiles(Section):
    """One source a split."""

    train: str
    """Prompts from which directions are found."""
    validation: str
    """Prompts on which the direction is selected."""
    test: str
    """Prompts on which the result is measured; nothing before that sees them."""


class PromptsSection(Section):
    """Which prompts to use, how many, and how to render them."""

    harmful: str | PromptFiles
    """Requests the model should refuse: one source that is split by the seed, or one source a split."""
    harmless: str | PromptFiles
    """Requests the model should answer."""
    over_refusal: str | PromptFiles | None = None
    """Safe requests that look harmful: every intervention is measured on them too, and some methods find from them. A
    source that has fewer than the numbers below is divided in their proportion."""
    train: Count = 128
    """Prompts a side for finding directions, before the filter; at most this many from a source that is split."""
    validation: Count = 32
    """Prompts a side for selecting, before the filter."""
    test: Count = 64
    """Prompts a side for the evaluation; never filtered."""
    seed: Seed = 0
    """Decides which prompts of a source land in which split."""
    filter: bool = True
    """Keep only harmful prompts the model refuses and harmless ones it answers, by refusal score, in train and
    validation, as the paper's code does; of `over_refusal`, those it refuses."""
    system: str | None = None
    """A system prompt; null leaves it to the chat template."""
    chat_template: str | None = None
    """A chat template in Jinja that takes the place of the checkpoint's."""
    thinking: bool | None = None
    """Let a model that can think before it answers; off unless true. Directions and refusal scores are read where the
    answer starts, behind an empty thought; with true, completions think, and only the answer is judged."""
    template_options: dict[str, str | int | float | bool | None] = Field(default_factory=dict)
    """Further variables for the chat template."""


class CaptureSection(Section):
    """Where to read activations."""

    site: Site = "resid_pre"
    """The place in each block; the paper reads `resid_pre`, the block's input."""
    positions: Literal["auto"] | Position | Annotated[tuple[Position, ...], Field(min_length=1)] = "auto"
    """`post_instruction` (every template token after the instruction), `instruction_end` (the instruction's last
    token), negative numbers counted from the end of the prompt, or a list of these. `auto` is where the strategy is
    read: `post_instruction` for all but `harmfulness`."""


class EvaluateSection(Section):
    """What to do with the direction and what to measure."""

    interventions: tuple[InterventionSpec, ...]
    """What to compare; the unmodified model is always measured too. Only `orthogonalize` edits
    weights: name it where they are yours to edit."""
    metrics: tuple[Metric, ...]
    """What to measure."""
    max_new_tokens: Count = 64
    """Length of the greedy completions; a completion ends earlier at the model's end-of-turn token."""
    controls: Annotated[int, Field(ge=0, strict=True)] = 1
    """How many random directions of the same norm to put through every intervention that uses the direction. Unless 0,
    the direction of a shuffled labelling goes the same way: half of each side's training prompts against the rest."""
    seed: Seed = 0
    """Seed of the random directions and of the bootstrap."""

    @property
    def n_controls(self) -> int:
        """How many controls an intervention on activations has, the shuffled labelling among them."""
        return self.controls + (self.controls > 0)

    @field_validator("interventions", "metrics")
    @classmethod
    def _listed_once(
        cls, listed: tuple[InterventionSpec | Metric, ...], info: ValidationInfo
    ) -> tuple[InterventionSpec | Metric, ...]:
        if info.field_name == "metrics" and not listed:
            raise ValueError("lists nothing to measure")
        for number, item in enumerate(listed):
            if item in listed[:number]:
                raise ValueError(f"lists {item.label} twice")
        labels = [part.label for metric in listed if isinstance(metric, Metric) for part in metric.parts]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"calls two metrics {label}: give one of them another `name`")
        return listed


class Recipe(Section):
    """Declare a whole run, from the model to the report."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._=,+-]*)?$")]
    """A short name; the run directory is called after it. A run of a sweep is called SWEEP/RUN."""
    description: str | None = None
    """What the run is for, shown at the top of the report."""
    model: ModelSection
    """Which model to study."""
    prompts: PromptsSection
    """Which prompts to use."""
    capture: CaptureSection = CaptureSection()
    """Where to read activations."""
    find: Find
    """How to find directions: `strategy` and its options, and what to do with them `then`."""
    select: Selector
    """How to choose one of them: `selector` and its options."""
    evaluate: EvaluateSection
    """What to do with it and what to measure."""
    analyze: tuple[Analysis, ...] = ()
    """What else to find out about the direction, in the unmodified model (docs/how-to/analyse-a-direction.md)."""
    sweep: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = Field(default_factory=dict, exclude=True)
    """Dotted keys with lists of values, such as `find: [difference_in_means, pca]` or `prompts.seed: [0, 1, 2]`. Every
    combination is a run of its own in a folder below the sweep's; stages that come out the same are computed once."""

    @field_validator("analyze")
    @classmethod
    def _analysed_once(cls, listed: tuple[Analysis, ...]) -> tuple[Analysis, ...]:
        for number, item in enumerate(listed):
            if item in listed[:number]:
                raise ValueError(f"lists {item.analysis} twice with the same options")
        return listed

    @field_validator("description")
    @classmethod
    def _one_paragraph(cls, text: str | None) -> str | None:
        return " ".join(text.split()) if text else None


@lru_cache(maxsize=16)
def recipe_type(registry: Registry) -> type[Recipe]:
    """Build the recipe model for what is installed, once for each registry.

    Every choice becomes a discriminated union over the registry, so that an unknown key is an error with its full
    path (`find.pca.compnent`) and editors complete the options of installed plugins.
    """
    strategy = _choice(find_types(registry), "strategy", default="difference_in_means")
    intervention = _choice(_with_parts(registry.interventions), "intervention")
    selectors = {name: _holding(intervention, kind, InterventionSpec) for name, kind in registry.selectors.items()}
    selector = _choice(selectors, "selector", default="causal")
    metric = _choice(registry.metrics, "metric")
    analysis = _choice(ANALYSES, "analysis")
    evaluate = create_model(
        "EvaluateSection",
        __base__=EvaluateSection,
        interventions=(
            tuple[intervention, ...],  # type: ignore[valid-type]
            Field(("none", "ablate", "steer"), validate_default=True),
        ),
        metrics=(
            tuple[metric, ...],  # type: ignore[valid-type]
            Field(("refusal_rate", "refusal_score", "kl", "cross_entropy"), validate_default=True),
        ),
    )
    made = create_model(
        "Recipe",
        __base__=Recipe,
        find=(strategy, Field("difference_in_means", validate_default=True)),
        select=(selector, Field("causal", validate_default=True)),
        evaluate=(evaluate, Field(default_factory=dict, validate_default=True)),
        analyze=(tuple[analysis, ...], Field(())),  # type: ignore[valid-type]
    )
    # The section before the recipe, which takes its schema over.
    _inherit_descriptions(evaluate)
    _inherit_descriptions(made)
    return made


@lru_cache(maxsize=16)
def find_types(registry: Registry) -> dict[str, type[Find]]:
    """Let every strategy be followed by operations, which choose other strategies from what is installed."""
    other = _choice(registry.strategies, "strategy")
    operation = _choice({name: _holding(other, kind, Strategy) for name, kind in OPERATIONS.items()}, "operation")
    then = (
        tuple[operation, ...],  # type: ignore[valid-type]
        Field((), description=Find.model_fields["then"].description),
    )
    made: dict[str, type[Find]] = {}
    for name, kind in registry.strategies.items():
        bases: Any = (kind, Find)
        made[name] = create_model(kind.__name__, __base__=bases, __doc__=kind.__doc__, then=then)
    return made


def _inherit_descriptions(made: type[BaseModel]) -> None:
    for name, field in made.model_fields.items():
        inherited = made.__mro__[1].model_fields.get(name)  # type: ignore[attr-defined]
        if field.description is None and inherited is not None:
            field.description = inherited.description
    made.model_rebuild(force=True)


def _choice(providers: Mapping[str, type[BaseModel]], key: str, default: str | None = None) -> Any:
    """Build the type of a choice among `providers`: a mapping with `key`, or a bare name for all defaults."""
    union = reduce(or_, providers.values())
    tagged = Annotated[union, Field(discriminator=key)] if len(providers) > 1 else union
    mapping = {"anyOf": [{"enum": sorted(providers)}, *[_schema_of(provider) for provider in providers.values()]]}
    return Annotated[tagged, BeforeValidator(_expand(key, default)), WithJsonSchema(mapping)]


def _with_parts(providers: Mapping[str, type[InterventionSpec]]) -> Mapping[str, type[InterventionSpec]]:
    """Let interventions that hold others choose them from what is installed, two levels deep."""
    found: Mapping[str, type[InterventionSpec]] = {
        name: kind for name, kind in providers.items() if not _holders(kind, InterventionSpec)
    }
    for _ in range(2):
        part = _choice(found, "intervention")
        found = {name: _holding(part, kind, InterventionSpec) for name, kind in providers.items()}
    return found


def _holding(part: Any, provider: type[M], base: type[BaseModel]) -> type[M]:
    """Let the fields of a provider that hold some `base` choose it from `part`."""
    holders = _holders(provider, base)
    if not holders:
        return provider
    # A field that is one of them takes its discriminator from `part` alone; a list has its own bounds to keep.
    fields: dict[str, Any] = {
        key: (tuple[part, ...], field)
        if get_origin(field.annotation) is tuple
        else (part, Field(... if field.is_required() else field.default, description=field.description))
        for key, field in holders.items()
    }
    return create_model(provider.__name__, __base__=provider, __doc__=provider.__doc__, **fields)


def _holders(provider: type[BaseModel], base: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields of a provider that hold some `base`."""
    fields = provider.model_fields.items()
    return {key: field for key, field in fields if base in (field.annotation, *get_args(field.annotation))}


def _expand(key: str, default: str | None) -> Callable[[Any], Any]:
    """Turn a bare name into a mapping and fill in the default name, so that one spelling reaches validation."""

    def expand(value: Any) -> Any:
        if isinstance(value, str):
            return {key: value}
        if isinstance(value, dict) and key not in value and default is not None:
            return {key: default, **value}
        return value

    return expand


@lru_cache(maxsize=128)
def _schema_of(provider: type[BaseModel]) -> dict[str, Any]:
    schema = provider.model_json_schema()
    schema.pop("$defs", None)
    return schema


def json_schema(registry: Registry) -> dict[str, Any]:
    """Return the JSON schema of recipes, installed plugins included, for editors and other tools."""
    schema = recipe_type(registry).model_json_schema()
    definitions: dict[str, Any] = {}
    # Pydantic's own first, so that none of their names is taken.
    for name, section in schema.pop("$defs").items():
        definitions[name] = _referring(section, definitions)
    rest = _referring(schema, definitions)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$defs": definitions, **rest}


def _referring(schema: Any, definitions: dict[str, Any]) -> Any:
    """Move every choice inside a schema to `definitions`, where those that stand in several places stand once."""
    if isinstance(schema, list):
        return [_defined(item, definitions) for item in schema]
    if isinstance(schema, dict):
        return {key: _defined(value, definitions) for key, value in schema.items()}
    return schema


def _defined(schema: Any, definitions: dict[str, Any]) -> Any:
    made = _referring(schema, definitions)
    if not (isinstance(made, dict) and "title" in made and "properties" in made):
        return made
    name = made["title"]
    while definitions.setdefault(name, made) != made:
        name += "_"
    return {"$ref": f"#/$defs/{name}"}
