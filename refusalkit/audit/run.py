"""Run an audit: a recipe of its own, then one more stage, in a folder that is resumed like any run's."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from refusalkit.audit.checks import compare
from refusalkit.audit.findings import gather
from refusalkit.audit.outcome import Outcome, document
from refusalkit.audit.over_refusal import ADDRESS, OverRefusal, over_refusal
from refusalkit.audit.page import render_audit
from refusalkit.audit.thresholds import Thresholds
from refusalkit.pipeline import execute
from refusalkit.plan import Plan, make_plan, read_source
from refusalkit.progress import Progress
from refusalkit.recipe_file import load_recipe
from refusalkit.registry import Registry
from refusalkit.run_directory import read_run
from refusalkit.sharing import Sharing, hold
from refusalkit.stages.bench import Bench
from refusalkit.store import Store, content_key, write_json, write_text


def plan_audit(model: str, settings: Sequence[str], registry: Registry) -> Plan:
    """Plan the audit of a model; `settings` override keys of its recipe.

    Raises `InputError` for a model or setting that cannot be used.
    """
    path = Path(str(resources.files("refusalkit.audit").joinpath("recipe.yaml")))
    # JSON is YAML, and quotes what a name may hold.
    own = [f"name=audit-{_short(model)}", f"model.id={json.dumps(model)}"]
    if model.startswith("tiny:"):
        own += [f"prompts.{side}=tiny:{side}" for side in ("harmful", "harmless")]
    return make_plan(load_recipe(path, registry, [*own, *settings]), Path(), registry)


def _short(model: str) -> str:
    """Return a name for the folder: `tiny:llama` is `tiny-llama`, `meta-llama/Llama-3.1-8B-Instruct` its last part."""
    last = Path(model).resolve().name if Path(model).is_dir() else model.rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._-]", "-", last) or "model"


def audit(plan: Plan, out: Path, thresholds: Thresholds, progress: Progress) -> Outcome:
    """Measure, compare with the thresholds, and write `audit.json`, `audit.html` and the run's own report to `out`.

    Raises `InputError` when `out` belongs to another recipe, `RunError` when the audit fails or could mean nothing.
    """
    sharing = Sharing()
    execute(plan, out, progress, sharing=sharing)
    with hold(out):
        over = _over_refusal(plan, out, progress, sharing)
        run = read_run(out)
        findings = gather(run, over)
        outcome = Outcome(plan.checkpoint.section.id, findings, compare(findings, thresholds))
        write_json(out / "audit.json", document(outcome))
        write_text(out / "audit.html", render_audit(outcome, run))
    return outcome


def _over_refusal(plan: Plan, out: Path, progress: Progress, sharing: Sharing) -> OverRefusal:
    """Return the stage's artifact: the kept one where its key is right, else a new one."""
    prompts = read_source(ADDRESS, Path(), plan.registry, "over_refusal")["all"]
    length, store = plan.recipe.evaluate.max_new_tokens, Store(out)
    key = content_key(
        {"stage": OverRefusal.stage, "parent": plan.keys["prompts"], "prompts": prompts, "max_new_tokens": length}
    )
    kept = store.load(OverRefusal, (key,))
    if kept is not None:
        progress.stage(OverRefusal.stage, "kept")
        return kept
    progress.stage(OverRefusal.stage, "running")
    bench = Bench(sharing.models.engine(plan.checkpoint), plan.template, progress)
    made = over_refusal(prompts, length, bench)
    store.save(made, key, plan.metadata(OverRefusal.stage))
    progress.stage(OverRefusal.stage, "done")
    return made
