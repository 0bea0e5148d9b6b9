"""Print a plan: what would run, on what, how much, and what is already done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from refusalkit.checkpoint import Checkpoint
from refusalkit.plan import SPLITS, Plan
from refusalkit.recipe import Recipe
from refusalkit.store import STAGES, Store
from refusalkit.template import PINNED, ChatTemplate

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def describe(plan: Plan, out: Path) -> str:
    """Return the plan as text, in lines of at most 80 columns where names allow it."""
    recipe, checkpoint = plan.recipe, plan.checkpoint
    owner = plan.registry.owner("refusalkit_adapters", checkpoint.adapter.name)
    parameters, size = _weight(checkpoint)
    positions = ", ".join(
        f"{position} {label!r}"
        for position, label in zip(plan.prompts.positions, plan.template.labels(plan.prompts.positions), strict=True)
    )
    before, after = plan.template.around()
    rows = [
        ("recipe", recipe.name),
        ("model", f"{checkpoint.section.id} (revision {checkpoint.revision})"),
        ("", f"{checkpoint.architecture}, {checkpoint.n_layers} layers of {checkpoint.d_model}"),
        ("adapter", f"{checkpoint.adapter.name}, from {owner}"),
        ("weights", f"{parameters / 1e6:.1f} M parameters, about {_human(size)} of memory, {recipe.model.where}"),
        ("template", f"{before!r} … {after!r}"),
        *_template(plan.template),
        *[(side, _counts(plan, side)) for side in ("harmful", "harmless")],
        ("capture", f"{recipe.capture.site} at {len(plan.prompts.positions)} positions: {positions}"),
        ("find", f"{recipe.find.strategy}: {_at_most(recipe)}{plan.n_candidates} candidates"),
        ("select", f"{recipe.select.selector}, {_options(recipe.select)}"),
        ("evaluate", ", ".join(spec.label for spec in recipe.evaluate.interventions)),
        ("", ", ".join(metric.metric for metric in recipe.evaluate.metrics)),
        *_gradients(recipe),
        *[("forward" if number == 0 else "", text) for number, text in enumerate(_passes(plan))],
        ("out", str(out)),
        *_done(plan, out),
    ]
    return "\n".join(f"{name:<9} {text}" for name, text in rows)


def _template(template: ChatTemplate) -> list[tuple[str, str]]:
    """Say what the template adds by itself, where it does."""
    rows = []
    if template.thinks:
        rows.append(("thinking", "on: completions think, everything else is read behind an empty thought"))
        if not template.thinking.on:
            rows = [("thinking", "off: the answer follows a thought that is closed and empty")]
    if (system := template.default_system()) is not None:
        rows.append(("system", f"{system!r}, the template's own"))
    if template.is_dated:
        rows.append(("date", f"{PINNED:%d %b %Y}, whenever it runs"))
    return rows


def _at_most(recipe: Recipe) -> str:
    return "at most " if recipe.find.needs == "model" else ""


def _gradients(recipe: Recipe) -> list[tuple[str, str]]:
    """Name the stages that run backward passes."""
    asked = {"find": recipe.find.needs_gradients, "select": recipe.select.needs_gradients}
    stages = " and ".join(stage for stage, needed in asked.items() if needed)
    return [("gradients", f"{stages}: through a model loaded here, which no shared server allows")] if stages else []


def _options(section: Any) -> str:
    values = section.model_dump(mode="json")
    return ", ".join(f"{key} {value}" for key, value in values.items() if key != "selector")


def _counts(plan: Plan, side: str) -> str:
    splits = plan.prompts.harmful if side == "harmful" else plan.prompts.harmless
    return ", ".join(f"{len(splits[split])} {split}" for split in SPLITS)


def _passes(plan: Plan) -> list[str]:
    """Count forward passes of one prompt: exactly where that is possible, else the most there can be."""
    asked = plan.prompts
    train = len(asked.harmful["train"]) + len(asked.harmless["train"])
    harmful, harmless = len(asked.harmful["validation"]), len(asked.harmless["validation"])
    test = len(asked.harmful["test"]) + len(asked.harmless["test"])
    acting = [spec for spec in plan.recipe.evaluate.interventions if spec.uses_direction]
    controls = sum(not spec.on_weights for spec in acting) * plan.recipe.evaluate.controls
    cases = 1 + len(acting) + controls
    return [
        f"prompts {train + harmful + harmless} passes of one prompt, capture at most {train}",
        f"select at most {plan.n_candidates * (2 * harmless + harmful)}, most far fewer",
        f"evaluate {cases * test} and as many completions of up to {plan.recipe.evaluate.max_new_tokens} tokens",
    ]


def _done(plan: Plan, out: Path) -> list[tuple[str, str]]:
    store = Store(out)
    done = [stage for stage in STAGES if store.key(stage) == plan.keys[stage]]
    waiting = [stage for stage in STAGES if stage not in done]
    return [("done", ", ".join(done) or "nothing yet"), ("to do", ", ".join([*waiting, "report"]))]


def _weight(checkpoint: Checkpoint) -> tuple[int, int]:
    """Return the number of parameters and the bytes they take, from an empty model of the same shape."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            checkpoint.config, trust_remote_code=checkpoint.section.trust_remote_code
        )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters, parameters * _BYTES[checkpoint.dtype]


def _human(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
