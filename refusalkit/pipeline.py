"""Run a plan: five stages in a straight line, each kept as an artifact, then the report."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml

import refusalkit
from refusalkit.artifacts import Activations, Artifact, Candidates, Choice, Evaluation, PromptSplits
from refusalkit.engine.engine import Engine
from refusalkit.engine.load import load
from refusalkit.errors import InputError
from refusalkit.plan import Plan
from refusalkit.progress import Progress, Silent
from refusalkit.stages import capture, evaluate, find, prompts, select
from refusalkit.stages.bench import Bench
from refusalkit.store import STAGES, Store, cannot_write, write_json, write_tensors, write_text

A = TypeVar("A", bound=Artifact)


class Runner:
    """Hold what the stages of one run share, and load the model only when a stage has to run."""

    def __init__(self, plan: Plan, out: Path, progress: Progress) -> None:
        self.plan = plan
        self.store = Store(out)
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self.passes: dict[str, float] = {}
        self._bench: Bench | None = None

    def bench(self) -> Bench:
        """Return the loaded model and its tools."""
        if self._bench is None:
            self._bench = Bench(load(self.plan.checkpoint), self.plan.template, self.progress)
        return self._bench

    @property
    def engine(self) -> Engine | None:
        """The engine, where a stage has needed one."""
        return self._bench.engine if self._bench is not None else None

    def stage(self, kind: type[A], make: Callable[[], A]) -> A:
        """Return the stage's artifact: the kept one where its key is right, else a new one, written whole."""
        key = self.plan.keys[kind.stage]
        kept = self.store.load(kind, key)
        if kept is not None:
            self.progress.stage(kind.stage, "kept")
            return kept
        self.progress.stage(kind.stage, "running")
        before, since = self.engine.prompt_passes if self.engine else 0.0, time.monotonic()
        artifact = make()
        self.store.save(artifact, key, self.plan.metadata(kind.stage))
        self.seconds[kind.stage] = round(time.monotonic() - since, 2)
        self.passes[kind.stage] = round((self.engine.prompt_passes if self.engine else 0.0) - before, 1)
        _write_environment(self, self.store.folder)
        self.progress.stage(kind.stage, "done")
        return artifact


def execute(plan: Plan, out: Path, progress: Progress | None = None, until: str = "report") -> None:
    """Run `plan` in the folder `out` up to the stage `until`, keeping what is finished there already.

    Raises `InputError` when `out` belongs to another recipe, `RunError` when the run fails or could mean nothing.
    """
    recipe, shown = plan.recipe, progress or Silent()
    _claim(plan, out)
    runner = Runner(plan, out, shown)
    _drop_outdated(runner)
    wanted = STAGES[: STAGES.index(until) + 1] if until in STAGES else STAGES

    splits = runner.stage(PromptSplits, lambda: prompts.settle(plan.prompts, runner.bench()))
    if "capture" not in wanted:
        return
    activations = runner.stage(
        Activations, lambda: capture.capture(recipe.capture, splits, recipe.find.needs, runner.bench())
    )
    if "find" not in wanted:
        return
    candidates = runner.stage(Candidates, lambda: find.find(recipe.find, activations, splits, runner.bench))
    write_candidates(out, candidates, plan)
    if "select" not in wanted:
        return
    choice = runner.stage(Choice, lambda: select.select(recipe.select, candidates, splits, runner.bench()))
    write_choice(out, choice, plan)
    if "evaluate" not in wanted:
        return
    evaluation = runner.stage(
        Evaluation, lambda: evaluate.evaluate(recipe.evaluate, (activations, choice), splits, runner.bench())
    )
    write_json(out / "summary.json", summary(plan, choice, evaluation))
    if until == "report":
        write_report(out, show_completions=False)


def _claim(plan: Plan, out: Path) -> None:
    """Make `out` this recipe's folder, or refuse when the prompts and model in it are another recipe's."""
    resolved = plan.recipe.model_dump(mode="json", serialize_as_any=True)
    known = out / "recipe.yaml"
    try:
        if out.exists() and not out.is_dir():
            raise InputError("this is a file, not a folder", where=f"--out {out}", hint="name a folder")
        if known.is_file():
            # Until a stage is finished there is nothing to mix up, and a corrected recipe may take the folder over.
            if any(Store(out).key(stage) for stage in STAGES):
                _same_experiment(_recipe_in(known), resolved, out)
        elif out.is_dir() and any(entry for entry in out.iterdir() if not entry.name.startswith(".")):
            raise InputError(
                "the folder is not empty and holds no run", where=f"--out {out}", hint="name a new or empty folder"
            )
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(out, error) from None
    text = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True, width=110)
    write_text(known, "# The recipe as it was run, with every default filled in.\n" + text)


#: The plain files that repeat what a stage found.
_DERIVED = {
    "prompts": (),
    "capture": (),
    "find": ("candidates.safetensors",),
    "select": ("direction.safetensors", "scores.json"),
    "evaluate": ("summary.json", "report.html"),
}


def _drop_outdated(runner: Runner) -> None:
    """Remove stages that follow from another recipe, and the files made from them: this run may end before new ones."""
    store = runner.store
    for stage in STAGES:
        if store.key(stage) == runner.plan.keys[stage]:
            continue
        try:
            for name in _DERIVED[stage]:
                (store.folder / name).unlink(missing_ok=True)
            if (store.folder / stage).exists():
                shutil.rmtree(store.folder / stage)
        except OSError as error:
            raise cannot_write(store.folder / stage, error) from None


def _recipe_in(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise InputError(
            "cannot be read, so whose run this is cannot be known",
            where=str(path),
            hint="choose another folder with --out, or delete this one",
        ) from None


def _same_experiment(before: Any, now: dict[str, Any], out: Path) -> None:
    """Refuse a folder whose run asked another question: another name, model or set of prompts."""
    for key in ("name", "model", "prompts"):
        ours, theirs = now.get(key), before.get(key) if isinstance(before, dict) else None
        if isinstance(ours, dict) and isinstance(theirs, dict):
            differ = [part for part in ours if part not in _RESULTLESS and ours[part] != theirs.get(part)]
            if not differ:
                continue
            key, ours, theirs = f"{key}.{differ[0]}", ours[differ[0]], theirs.get(differ[0])
        if ours != theirs:
            raise InputError(
                f"the folder holds a run of another recipe: its {key} is {theirs!r}, here it is {ours!r}",
                where=f"--out {out}",
                hint="choose another folder with --out, or delete this one",
            )


#: Keys of `model` that do not decide any result.
_RESULTLESS = ("device", "batch_size")


def write_candidates(out: Path, candidates: Candidates, plan: Plan) -> None:
    """Write `candidates.safetensors`: the tensor `directions`, as found."""
    write_tensors(out / "candidates.safetensors", {"directions": candidates.directions}, plan.metadata("find"))


def write_choice(out: Path, choice: Choice, plan: Plan) -> None:
    """Write `direction.safetensors` and `scores.json`."""
    metadata = {**plan.metadata("select"), "position": str(choice.position), "layer": str(choice.layer)}
    write_tensors(out / "direction.safetensors", {"direction": choice.direction}, metadata)
    rows = [row.model_dump(mode="json", exclude={"extra"}) | row.extra for row in choice.scores]
    write_json(out / "scores.json", rows)


def summary(plan: Plan, choice: Choice, evaluation: Evaluation) -> dict[str, Any]:
    """Return the content of `summary.json`, version 1; other tools rely on it."""
    chosen = choice.chosen
    return {
        "version": 1,
        "recipe": plan.recipe.name,
        "model": {"id": plan.checkpoint.section.id, "adapter": plan.checkpoint.adapter.name},
        "choice": {
            "position": choice.position,
            "layer": choice.layer,
            "refusal_score": chosen.refusal_score,
            "induced_score": chosen.induced_score,
            "kl_nats": chosen.kl_nats,
            "baseline_refusal_score": choice.baseline_refusal_score,
            "n_candidates": len(choice.scores),
            "n_survivors": choice.n_survivors,
        },
        "evaluation": [
            # Through JSON text, which writes a number that is none (no prompt had a value) as null.
            json.loads(result.model_dump_json(include=_SUMMARISED))
            for result in evaluation.results
        ],
    }


_SUMMARISED = {"intervention", "prompts", "metric", "value", "low", "high", "n"}


def _write_environment(runner: Runner, out: Path) -> None:
    """Write `environment.json`: what ran where. A stage that was kept keeps its time and passes."""
    path = out / "environment.json"
    before = _environment_in(path)
    checkpoint, registry, engine = runner.plan.checkpoint, runner.plan.registry, runner.engine
    model = {
        "id": checkpoint.section.id,
        "revision": checkpoint.revision,
        "adapter": checkpoint.adapter.name,
        "adapter_owner": str(registry.owner("refusalkit_adapters", checkpoint.adapter.name)),
        "architecture": checkpoint.architecture,
        "n_layers": checkpoint.n_layers,
        "d_model": checkpoint.d_model,
        "d_vocab": checkpoint.d_vocab,
        "n_parameters": before.get("model", {}).get("n_parameters"),
    }
    environment = {
        "refusalkit": refusalkit.__version__,
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "nnsight")},
        "plugins": [{"name": o.name, "version": o.version} for o in sorted(set(registry.owners.values()), key=str)],
        "platform": platform.platform(),
        "device": before.get("device"),
        "dtype": before.get("dtype"),
        "started": before.get("started", datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")),
        "seconds": {**before.get("seconds", {}), **runner.seconds},
        "forward_passes": {**before.get("forward_passes", {}), **runner.passes},
        "model": model,
    }
    if engine is not None:
        environment["device"] = str(engine.device)
        environment["dtype"] = str(engine.module.dtype).removeprefix("torch.")
        model["n_parameters"] = sum(parameter.numel() for parameter in engine.module.parameters())
    write_json(path, environment)


def _environment_in(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def write_report(folder: Path, *, show_completions: bool) -> Path:
    """Write `report.html` from the artifacts in `folder` and return its path."""
    from refusalkit.report.page import render_html
    from refusalkit.run_directory import read_run

    path = folder / "report.html"
    write_text(path, render_html(read_run(folder), show_completions=show_completions))
    return path
