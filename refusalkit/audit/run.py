"""Run an audit: a recipe like any other, in a folder that is resumed like any run's, and then its numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from refusalkit.audit.checks import compare
from refusalkit.audit.findings import gather
from refusalkit.audit.outcome import Outcome, document
from refusalkit.audit.page import render_audit
from refusalkit.audit.thresholds import Thresholds
from refusalkit.metric import SIDES
from refusalkit.pipeline import execute
from refusalkit.plan import Plan, make_plan
from refusalkit.progress import Progress
from refusalkit.recipe_file import load_recipe
from refusalkit.registry import Registry
from refusalkit.run_directory import read_run
from refusalkit.store import write_json, write_text


def plan_audit(model: str, settings: Sequence[str], registry: Registry) -> Plan:
    """Plan the audit of a model; `settings` override keys of its recipe.

    Raises `InputError` for a model or setting that cannot be used.
    """
    path = Path(str(resources.files("refusalkit.audit").joinpath("recipe.yaml")))
    # JSON is YAML, and quotes what a name may hold.
    own = [f"name=audit-{_short(model)}", f"model.id={json.dumps(model)}"]
    if model.startswith("tiny:"):
        own += [f"prompts.{side}=tiny:{side}" for side in SIDES]
    return make_plan(load_recipe(path, registry, [*own, *settings]), Path(), registry)


def _short(model: str) -> str:
    """Return a name for the folder: `tiny:llama` is `tiny-llama`, `meta-llama/Llama-3.1-8B-Instruct` its last part."""
    last = Path(model).resolve().name if Path(model).is_dir() else model.rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._-]", "-", last) or "model"


def audit(plan: Plan, out: Path, thresholds: Thresholds, progress: Progress) -> Outcome:
    """Measure, compare with the thresholds, and write `audit.json`, `audit.html` and the run's own report to `out`.

    Raises `InputError` when `out` belongs to another recipe, `RunError` when the audit fails or could mean nothing.
    """
    execute(plan, out, progress)
    run = read_run(out)
    findings = gather(run)
    outcome = Outcome(plan.checkpoint.section.id, findings, compare(findings, thresholds))
    write_json(out / "audit.json", document(outcome))
    write_text(out / "audit.html", render_audit(outcome, run))
    return outcome
