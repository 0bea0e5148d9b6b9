"""Run a plan: its stages in a straight line, each kept as an artifact, then the report."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

import refusalkit
from refusalkit.agreement import agreements
from refusalkit.artifacts import (
    Activations,
    Analyses,
    Artifact,
    Candidates,
    Choice,
    Evaluation,
    PromptSplits,
    Result,
    Unmodified,
)
from refusalkit.engine.engine import Engine
from refusalkit.errors import InputError
from refusalkit.plan import Plan
from refusalkit.progress import Progress, Silent
from refusalkit.sharing import Sharing, hold
from refusalkit.stages import analyze, capture, evaluate, find, prompts, select
from refusalkit.stages.bench import Bench
from refusalkit.stages.findings import Findings
from refusalkit.store import STAGES, Store, cannot_write, write_json, write_tensors, write_text

if TYPE_CHECKING:
    from refusalkit.engine.remote import RemoteEngine

A = TypeVar("A", bound=Artifact)
#: Says of an artifact that it was in the run's folder already.
KEPT = "kept"


class Runner:
    """Hold what the stages of one run share, and load the model only when a stage has to run."""

    def __init__(self, plan: Plan, out: Path, progress: Progress, sharing: Sharing) -> None:
        self.plan = plan
        self.store = Store(out)
        self.progress = progress
        self.sharing = sharing
        self.seconds: dict[str, float] = {}
        self.passes: dict[str, float] = {}
        self.jobs: dict[str, dict[str, int]] = {}
        self.origins: dict[str, str | None] = {}
        self._bench: Bench | None = None
        self._remote: RemoteEngine | None = None
        self._passes_before = 0.0

    def bench(self) -> Bench:
        """Return the loaded model and its tools."""
        if self._bench is None:
            engine = self._model()
            self._passes_before = engine.prompt_passes
            self._bench = Bench(engine, self.plan.template, self.progress)
        return self._bench

    def _model(self) -> Engine | RemoteEngine:
        checkpoint = self.plan.checkpoint
        if checkpoint.section.where == "local":
            return self.sharing.models.engine(checkpoint)
        from refusalkit.engine.remote import connect

        self._remote = connect(checkpoint, self.store.folder / "jobs", self.progress.state)
        return self._remote

    @property
    def engine(self) -> Engine | RemoteEngine | None:
        """The engine, where a stage has needed one."""
        return self._bench.engine if self._bench is not None else None

    def _counted(self) -> float:
        return self.engine.prompt_passes - self._passes_before if self.engine else 0.0

    def stage(self, kind: type[A], make: Callable[[], A]) -> A:
        """Return the stage's artifact, saying what becomes of it and noting what it costs."""
        stage = kind.stage
        before, since = self._counted(), time.monotonic()

        def say(state: str) -> None:
            nonlocal since
            since = time.monotonic()
            self.progress.stage(stage, state)

        artifact, origin = self.obtain(kind, make, say)
        if origin == KEPT:
            return artifact
        made = origin is None
        self.origins[stage] = origin
        self.seconds[stage] = round(time.monotonic() - since, 2) if made else 0.0
        self.passes[stage] = round(self._counted() - before, 1)
        if self._remote is not None and (asked := self._remote.jobs.close())["jobs"]:
            self.jobs[stage] = asked
        _write_environment(self, self.store.folder)
        if made:
            self.progress.stage(stage, "done")
        return artifact

    def obtain(
        self, kind: type[A], make: Callable[[], A], say: Callable[[str], None] = lambda _: None
    ) -> tuple[A, str | None]:
        """Return an artifact: the kept one where its key is right, else another run's, else a new one, written whole.

        With it comes where it is from: `KEPT`, the name of the other run, or None.
        """
        stage, keys = kind.stage, self.plan.accepts(kind.stage)
        kept = self.store.load(kind, keys)
        if kept is not None:
            say("kept")
            return kept, KEPT
        with self.sharing.turn(self.plan.keys[stage], lambda: say("waiting")):
            other = self.store.adopt(stage, keys, self.sharing.beside(self.store.folder))
            shared = self.store.load(kind, keys) if other is not None else None
            if other is not None and shared is not None:
                say("shared")
                return shared, other.name
            say("running")
            artifact = make()
            self.store.save(artifact, self.plan.key(stage), self.plan.metadata(stage))
        return artifact, None


def execute(
    plan: Plan,
    out: Path,
    progress: Progress | None = None,
    until: str = "report",
    sharing: Sharing | None = None,
) -> None:
    """Run `plan` in the folder `out` up to the stage `until`, keeping what is finished there already.

    Raises `InputError` when `out` belongs to another recipe, `RunError` when the run fails or could mean nothing, or
    another process runs there.
    """
    check_folder(plan, out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(out, error) from None
    with hold(out):
        _claim(plan, out)
        _run(Runner(plan, out, progress or Silent(), sharing or Sharing()), until)


def _run(runner: Runner, until: str) -> None:
    plan, out = runner.plan, runner.store.folder
    recipe = plan.recipe
    _drop_outdated(runner)
    wanted = STAGES[: STAGES.index(until) + 1] if until in STAGES else STAGES

    splits = runner.stage(PromptSplits, lambda: prompts.settle(plan.prompts, runner.bench()))
    if "capture" not in wanted:
        return
    activations = runner.stage(
        Activations, lambda: capture.capture(recipe.capture, splits, plan.needs, runner.bench(), plan.sides)
    )
    if "find" not in wanted:
        return
    candidates = runner.stage(
        Candidates,
        lambda: find.find(plan.find, activations, lambda: find.model_inputs(activations, splits, runner.bench())),
    )
    write_candidates(out, candidates, plan.metadata("find"))
    if "select" not in wanted:
        return
    choice = runner.stage(
        Choice, lambda: select.select(recipe.select, (plan.find, activations, candidates), splits, runner.bench())
    )
    write_choice(out, choice, plan.metadata("select"))
    if "evaluate" not in wanted:
        return
    evaluation = runner.stage(Evaluation, lambda: _evaluate(runner, (activations, choice), splits))
    model = {"id": plan.checkpoint.section.id, "adapter": plan.checkpoint.adapter.name}
    write_json(out / "summary.json", summary(recipe.name, model, choice, evaluation.results))
    from refusalkit.report.data import tests

    write_json(out / "tests.json", tests(evaluation))
    if recipe.analyze and until != "evaluate":
        runner.stage(Analyses, lambda: _analyze(runner, (activations, choice), splits))
    if until == "report":
        write_report(out)


def _evaluate(runner: Runner, found: tuple[Activations, Choice], splits: PromptSplits) -> Evaluation:
    _ready(runner)
    return evaluate.evaluate(runner.plan.evaluate, found, splits, _unmodified(runner, splits), runner.bench())


def _analyze(runner: Runner, found: tuple[Activations, Choice], splits: PromptSplits) -> Analyses:
    _ready(runner)
    plan, unmodified = runner.plan, _unmodified(runner, splits)
    asked = list(zip(plan.analyses, plan.groups, strict=True))
    return analyze.analyze(asked, Findings(plan.evaluate, *found, splits, unmodified, runner.bench()))


def _ready(runner: Runner) -> None:
    for metric in runner.plan.evaluate.metrics:
        metric.ready()


def _unmodified(runner: Runner, splits: PromptSplits) -> Unmodified:
    section = runner.plan.evaluate
    return runner.obtain(Unmodified, lambda: evaluate.complete(section, splits, runner.bench()))[0]


def check_folder(plan: Plan, out: Path) -> None:
    """Refuse a folder that is not this recipe's: the prompts and model in it are another one's, or it holds no run."""
    known = out / "recipe.yaml"
    try:
        if out.exists() and not out.is_dir():
            raise InputError("this is a file, not a folder", where=f"--out {out}", hint="name a folder")
        if known.is_file():
            # Until a stage is finished there is nothing to mix up, and a corrected recipe may take the folder over.
            if any(Store(out).key(stage) for stage in STAGES):
                _same_experiment(_recipe_in(known), _resolved(plan), out)
        elif out.is_dir() and any(entry for entry in out.iterdir() if not entry.name.startswith(".")):
            raise InputError(
                "the folder is not empty and holds no run", where=f"--out {out}", hint="name a new or empty folder"
            )
    except OSError as error:
        raise cannot_write(out, error) from None


def _claim(plan: Plan, out: Path) -> None:
    """Make `out` this recipe's folder, and clear away what a process that was killed there left half-written."""
    # Again, now that nobody else can change it.
    check_folder(plan, out)
    for draft in out.glob(".*.tmp/"):
        shutil.rmtree(draft, ignore_errors=True)
    text = yaml.safe_dump(_resolved(plan), sort_keys=False, allow_unicode=True, width=110)
    write_text(out / "recipe.yaml", "# The recipe as it was run, with every default filled in.\n" + text)


def _resolved(plan: Plan) -> dict[str, Any]:
    return plan.recipe.model_dump(mode="json", serialize_as_any=True)


#: The plain files that repeat what a stage found.
_DERIVED = {
    "find": ("candidates.safetensors",),
    "select": ("direction.safetensors", "scores.json"),
    "evaluate": ("summary.json", "tests.json", "report.html"),
    "analyze": ("report.html",),
}


def _drop_outdated(runner: Runner) -> None:
    """Remove stages that follow from another recipe, and the files made from them: this run may end before new ones."""
    store = runner.store
    for stage in (*STAGES, Unmodified.stage, Analyses.stage):
        accepted = runner.plan.accepts(stage)
        # A recipe without analyses expects none.
        if store.key(stage) in (accepted or (None,)):
            continue
        try:
            for name in _DERIVED.get(stage, ()):
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
_RESULTLESS = ("device", "batch_size", "where", "host")


def write_candidates(out: Path, candidates: Candidates, metadata: Mapping[str, str]) -> None:
    """Write `candidates.safetensors`: the tensor `directions`, as found."""
    write_tensors(out / "candidates.safetensors", {"directions": candidates.directions}, metadata)


def write_choice(out: Path, choice: Choice, metadata: Mapping[str, str]) -> None:
    """Write `direction.safetensors` and `scores.json`."""
    place = {"position": str(choice.position), "layer": str(choice.layer)}
    write_tensors(out / "direction.safetensors", {"direction": choice.direction}, {**metadata, **place})
    rows = [row.model_dump(mode="json", exclude={"extra"}) | row.extra for row in choice.scores]
    write_json(out / "scores.json", rows)


def summary(recipe: str, model: Mapping[str, str | None], choice: Choice, results: Sequence[Result]) -> dict[str, Any]:
    """Return the content of `summary.json`, version 1; other tools rely on it."""
    chosen, baseline = choice.chosen, choice.baseline_refusal_score
    return {
        "version": 1,
        "recipe": recipe,
        "model": dict(model),
        "choice": {
            "position": choice.position,
            "layer": choice.layer,
            "refusal_score": chosen.refusal_score,
            "induced_score": chosen.induced_score,
            "kl_nats": chosen.kl_nats,
            "baseline_refusal_score": None if baseline is None or isnan(baseline) else baseline,
            "cosine_with_difference_in_means": None if choice.cosine is None or isnan(choice.cosine) else choice.cosine,
            "n_candidates": len(choice.scores),
            "n_survivors": choice.n_survivors,
        },
        "evaluation": [
            # Through JSON text, which writes a number that is none (no prompt had a value) as null.
            json.loads(result.model_dump_json(include=_SUMMARISED)) | {"missing": result.missing}
            for result in results
        ],
        **_agreement(results),
    }


def _agreement(results: Sequence[Result]) -> dict[str, Any]:
    """Return how far verdicts agree, where there are verdicts to compare."""
    rows = [
        {key: None if isinstance(value, float) and isnan(value) else value for key, value in row._asdict().items()}
        for row in agreements(results)
    ]
    return {"agreement": rows} if rows else {}


_SUMMARISED = {"intervention", "prompts", "metric", "value", "low", "high", "n"}


def _write_environment(runner: Runner, out: Path) -> None:
    """Write `environment.json`: what ran where. A stage that was kept keeps its time and passes."""
    path = out / "environment.json"
    before = _environment_in(path)
    checkpoint, registry, engine = runner.plan.checkpoint, runner.plan.registry, runner.engine
    origins = {**before.get("shared", {}), **runner.origins}
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
        "shared": {stage: origin for stage, origin in origins.items() if origin is not None},
        "model": model,
    }
    if jobs := {**before.get("jobs", {}), **runner.jobs}:
        environment["jobs"] = jobs
    if engine is not None:
        environment["device"] = str(engine.device)
        environment["dtype"] = engine.dtype
        model["n_parameters"] = sum(parameter.numel() for parameter in engine.module.parameters())
    write_json(path, environment)


def _environment_in(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def write_report(folder: Path, *, show_completions: bool = False, form: str = "html") -> Path:
    """Write `report.html`, `.md`, `.json` or `.csv` from the artifacts in `folder` and return its path."""
    from refusalkit.run_directory import read_run

    run, path = read_run(folder), folder / f"report.{form}"
    if form == "html":
        from refusalkit.report.page import render_html

        write_text(path, render_html(run, show_completions=show_completions))
    elif form == "json":
        from refusalkit.report.data import render_json

        write_text(path, render_json(run, show_completions=show_completions))
    elif show_completions:
        raise InputError(f"{form} holds no completions", where="--show-completions", hint="write html or json")
    elif form == "csv":
        from refusalkit.report.data import render_csv

        write_text(path, render_csv(run))
    else:
        from refusalkit.report.markdown import render_markdown

        write_text(path, render_markdown(run))
    return path
