"""Print a plan: what would run, on what, how much, and what is already done."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from refusalkit.artifacts import Split
from refusalkit.batch import Batch
from refusalkit.checkpoint import Checkpoint
from refusalkit.intervention import InterventionSpec
from refusalkit.limits import gradients
from refusalkit.metric import TextMetric
from refusalkit.plan import SPLITS, Plan
from refusalkit.recipe import Recipe
from refusalkit.remote_cost import costs
from refusalkit.report.wording import bytes_of
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
        ("weights", f"{parameters / 1e6:.1f} M parameters, about {bytes_of(size)} of memory, {recipe.model.where}"),
        *_server(plan),
        ("template", f"{before!r} … {after!r}"),
        *_template(plan.template),
        *[(side.replace("_refusal", "-ref."), _counts(splits)) for side, splits in plan.prompts.sides.items()],
        ("capture", f"{recipe.capture.site} at {len(plan.prompts.positions)} positions: {positions}"),
        ("find", f"{plan.find.label}: {'at most ' if plan.find.needs_model else ''}{plan.n_candidates} candidates"),
        ("select", f"{recipe.select.selector}, {_options(recipe.select)}"),
        ("evaluate", ", ".join(spec.label for spec in recipe.evaluate.interventions)),
        ("", ", ".join(part.label for metric in recipe.evaluate.metrics for part in metric.parts)),
        *_sent(plan),
        *[("analyze" if number == 0 else "", text) for number, text in enumerate(_analyses(plan))],
        *_gradients(recipe),
        *[("forward" if number == 0 else "", text) for number, text in enumerate(_passes(plan))],
        ("out", str(out)),
        *_done(plan, out),
    ]
    return "\n".join(f"{name:<9} {text}" for name, text in rows)


def describe_sweep(batch: Batch) -> str:
    """Return the first run's plan, how often each stage of the sweep is computed, and what is done in each run."""
    first, runs = batch.runs[0], batch.runs
    counts = []
    for stage in (*STAGES, "baseline"):
        times = len({run.plan.key(stage) for run in runs})
        counts.append(f"{stage} {'once' if times == 1 else f'{times} times'}")
    *stages, baseline = counts
    width = max(len(str(run.member.run)) for run in runs)
    done = [f"{run.member.run!s:<{width}}  {', '.join(_finished(run.plan, run.out)) or 'nothing yet'}" for run in runs]
    rows = [
        ("sweep", f"{len(runs)} runs over {', '.join(first.member.values)}, in {batch.folder}"),
        ("computed", ", ".join(stages)),
        ("", f"completions of the unmodified model {baseline.partition(' ')[2]}"),
        *[("done" if number == 0 else "", text) for number, text in enumerate(done)],
    ]
    lines = [f"{name:<9} {text}".rstrip() for name, text in rows]
    return "\n".join([*lines, "", "The first run:", "", describe(first.plan, first.out)])


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


def _server(plan: Plan) -> list[tuple[str, str]]:
    """Say where the model runs, and at most how much is asked of whoever runs it there."""
    if plan.host is None:
        return []
    stages = {stage: cost for stage, cost in costs(plan).items() if cost.jobs}
    up, down = (sum(getattr(cost, way) for cost in stages.values()) for way in ("bytes_up", "bytes_down"))
    counts = ", ".join(f"{stage} {cost.jobs}" for stage, cost in stages.items())
    return [
        ("server", plan.host),
        ("jobs", f"about {sum(cost.jobs for cost in stages.values())}: {counts}"),
        ("bytes", f"at most about {bytes_of(up)} up, {bytes_of(down)} down"),
    ]


def _analyses(plan: Plan) -> Iterator[str]:
    """Say what each analysis looks at."""
    for analysis, groups in zip(plan.recipe.analyze, plan.groups, strict=True):
        named = [*getattr(analysis, "append", ())] + [f"{name} ({len(prompts)})" for name, prompts in groups.items()]
        yield analysis.analysis + (f": {', '.join(named)}" if named else "")


def _sent(plan: Plan) -> list[tuple[str, str]]:
    """Say which hosts get prompts and completions."""
    rows = []
    for metric in plan.recipe.evaluate.metrics:
        if metric.sends_to is not None:
            sides = " and ".join(side.replace("_", "-") for side in plan.prompts.sides if side in metric.sides)
            rows.append(("sends", f"{sides} prompts and their completions are sent to {metric.sends_to}"))
    return rows


def _gradients(recipe: Recipe) -> list[tuple[str, str]]:
    """Name the stages that run backward passes."""
    stages = " and ".join(stage for stage, needed in gradients(recipe).items() if needed)
    return [("gradients", f"{stages}: on this machine, no server computes them")] if stages else []


def _options(section: Any) -> str:
    values = section.model_dump(mode="json")
    values |= {key: value.label for key, value in section if isinstance(value, InterventionSpec)}
    return ", ".join(f"{key} {value}" for key, value in values.items() if key != "selector")


def _counts(splits: Mapping[Split, tuple[str, ...]]) -> str:
    return ", ".join(f"{len(splits[split])} {split}" for split in SPLITS)


def _passes(plan: Plan) -> list[str]:
    """Count forward passes of one prompt: exactly where that is possible, else the most there can be."""
    sides = plan.prompts.sides
    captured = sum(len(sides[side]["train"]) for side in plan.sides)
    read, test = (sum(len(splits[split]) for splits in sides.values()) for split in ("train", "test"))
    validation = {side: len(splits["validation"]) for side, splits in sides.items()}
    # On harmless prompts two things are measured, on the others one.
    a_candidate = validation["harmless"] + sum(validation[side] for side in plan.recipe.select.sides)
    tried = plan.n_candidates * math.prod(map(len, plan.recipe.select.tries.values()))
    selecting = f"at most {tried * a_candidate}, most far fewer"
    acting = [spec for spec in plan.recipe.evaluate.interventions if spec.uses_direction]
    controls = sum(not spec.on_weights for spec in acting) * plan.recipe.evaluate.n_controls
    # A gate is read for itself, and what it does is compared with a pass of its own.
    gated = sum(spec.gated for spec in acting)
    cases = 1 + len(acting) + controls + gated + bool(gated)
    learnt = sum(len(sides[side]["train"]) for side in {side for spec in acting for side in spec.learns_from})
    texts = sum(len(metric.texts) for metric in plan.evaluate.metrics if isinstance(metric, TextMetric))
    of_texts = f", {(1 + len(acting) + controls) * texts} of texts" if texts else ""
    of_training = f", {learnt} of training prompts" if learnt else ""
    return [
        f"prompts {read + sum(validation.values())} passes of one prompt, capture at most {captured}",
        f"select {selecting if plan.recipe.select.runs_model else 'none'}",
        f"evaluate {cases * test} and as many completions of up to {plan.recipe.evaluate.max_new_tokens} tokens"
        f"{of_texts}{of_training}",
    ]


def _done(plan: Plan, out: Path) -> list[tuple[str, str]]:
    done = _finished(plan, out)
    waiting = [stage for stage in _stages(plan) if stage not in done]
    return [("done", ", ".join(done) or "nothing yet"), ("to do", ", ".join([*waiting, "report"]))]


def _finished(plan: Plan, out: Path) -> list[str]:
    store = Store(out)
    return [stage for stage in _stages(plan) if store.key(stage) in plan.accepts(stage)]


def _stages(plan: Plan) -> list[str]:
    """List the stages that this recipe has."""
    return [*STAGES, *(["analyze"] if plan.recipe.analyze else [])]


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
