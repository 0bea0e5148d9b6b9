"""Fit a detector to a finished run, once, and open it again wherever its folder is.

A detector is kept in the run's folder `monitor`, with the part of the recipe that says which model reads prompts and
how. That folder is all that scoring needs: without the rest of the run, a detector is used as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import yaml

import refusalkit
from refusalkit.artifacts import Choice, PromptSplits
from refusalkit.checkpoint import Checkpoint, open_checkpoint
from refusalkit.engine.load import load
from refusalkit.engine.request import Capture
from refusalkit.errors import InputError, RunError
from refusalkit.metric import Side
from refusalkit.monitor.detector import KINDS, Detector, Kind, Rule, area, latent_guard, projection, threshold
from refusalkit.plan import chat_template
from refusalkit.progress import Progress
from refusalkit.recipe import Recipe
from refusalkit.recipe_file import load_recipe
from refusalkit.registry import Registry
from refusalkit.run_directory import artifact_in, mapping_in
from refusalkit.stages.bench import Bench
from refusalkit.store import Store, content_key, write_text
from refusalkit.template import ChatTemplate

#: The folder in the run's, and the recipe in it.
FOLDER = "monitor"
RECIPE = "recipe.yaml"
SIDES: tuple[Side, Side] = ("harmful", "harmless")
_LOCALLY = "where the weights are here, add --set model.where=local --set model.host=null"


@dataclass(frozen=True, eq=False)
class Reader:
    """Hold the model that reads prompts, and load it only when one has to be read."""

    recipe: Recipe
    checkpoint: Checkpoint
    template: ChatTemplate
    progress: Progress

    @cached_property
    def bench(self) -> Bench:
        """The loaded model and its tools."""
        return Bench(load(self.checkpoint), self.template, self.progress)

    @property
    def weights(self) -> tuple[str, str, str]:
        """What decides the activations: revision, dtype and quantization."""
        return self.checkpoint.revision, self.checkpoint.dtype, self.recipe.model.quantize


@dataclass(frozen=True, eq=False)
class Monitor:
    """Hold a detector and the model it was fitted to."""

    detector: Detector
    reader: Reader


def reader_of(folder: Path, registry: Registry, settings: Sequence[str], progress: Progress) -> Reader:
    """Find out which model reads prompts, and how, from the run in `folder` or the detector copied there."""
    path = next((path for path in (folder / RECIPE, folder / FOLDER / RECIPE) if path.is_file()), None)
    if path is None:
        raise InputError(
            "holds neither a run nor a detector", where=str(folder), hint="give the folder that `refusalkit run` made"
        )
    recipe = load_recipe(path, registry, settings)
    if recipe.model.where != "local":
        raise InputError(
            "a monitor reads prompts on this machine", where=f"model.where {recipe.model.where!r}", hint=_LOCALLY
        )
    checkpoint = open_checkpoint(recipe.model, registry)
    return Reader(recipe, checkpoint, chat_template(recipe, checkpoint), progress)


def open_monitor(folder: Path, kind: Kind, fpr: float, reader: Reader) -> Monitor:
    """Return the detector in `folder` with the threshold for `fpr`, fitting it first where the run has none yet.

    Raises `InputError` when there is no chosen direction and no detector, or the model is not theirs; `RunError` when
    scores are not numbers.
    """
    if not 0 <= fpr < 1:
        raise InputError(f"{fpr:g} is no share of harmless prompts", where="--fpr", hint="such as 0.05")
    store = Store(folder / FOLDER)
    if not (folder / RECIPE).is_file():
        detector = artifact_in(store, KINDS[kind])
        _check_model(detector.weights, detector.template_hash, reader, folder)
        return Monitor(detector.at(fpr), reader)
    key = content_key({"select": Store(folder).key(Choice.stage), "score": kind, "weights": reader.weights})
    kept = store.load(KINDS[kind], (key,))
    if kept is not None and kept.fpr == fpr:
        return Monitor(kept, reader)
    detector = _fitted(folder, kind, fpr, reader) if kept is None else kept.at(fpr)
    store.save(detector, key, _metadata(detector, reader))
    write_text(folder / FOLDER / RECIPE, _reading_part(reader.recipe))
    return Monitor(detector, reader)


def _fitted(folder: Path, kind: Kind, fpr: float, reader: Reader) -> Detector:
    """Score the run's validation and test prompts and set the threshold."""
    splits, choice = artifact_in(Store(folder), PromptSplits), artifact_in(Store(folder), Choice)
    revision = str(mapping_in(folder / "environment.json")["model"]["revision"])
    _check_model((revision, *reader.weights[1:]), splits.template.hash, reader, folder)
    reader.progress.stage(FOLDER, "running")
    rule = _rule(kind, splits, choice, reader)
    validation = {side: _scores(rule, splits.of(side, "validation"), side, reader.bench) for side in SIDES}
    test = {side: _scores(rule, splits.of(side, "test"), side, reader.bench) for side in splits.sides}
    reader.progress.stage(FOLDER, "done")
    return KINDS[kind](
        position=rule.position,
        site=rule.site,
        layers=rule.layers,
        vectors=rule.vectors,
        scaled=rule.scaled,
        fpr=fpr,
        threshold=threshold(validation["harmless"], fpr),
        auroc=area(test),
        validation=validation,
        test=test,
        weights=reader.weights,
        template_hash=splits.template.hash,
    )


def _rule(kind: Kind, splits: PromptSplits, choice: Choice, reader: Reader) -> Rule:
    site = reader.recipe.capture.site
    if kind == "projection":
        return projection(choice.direction, choice.position, choice.layer, site)
    (position,) = reader.template.positions(["instruction_end"])
    requests = [Capture(reader.bench.tokens(splits.of(side, "train")), (position,), site) for side in SIDES]
    harmful, harmless = reader.bench.engine.run(requests, reader.bench.advance("training prompts"))
    return latent_guard(harmful.mean[0], harmless.mean[0], position, site)


def _scores(rule: Rule, prompts: Sequence[str], side: Side, bench: Bench) -> tuple[float, ...]:
    scores = rule.scores(bench.tokens(prompts), bench.engine)
    if not torch.tensor(scores).isfinite().all():
        raise RunError(
            f"scores of {side} prompts are not numbers",
            where=FOLDER,
            hint="float16 overflows on many models: `--set model.dtype=float32`",
        )
    return scores


def _check_model(weights: Sequence[str], template_hash: str, reader: Reader, folder: Path) -> None:
    """Refuse a model whose activations are not those that the scores are of."""
    for what, theirs, ours in (
        *zip(("revision", "dtype", "quantization"), weights, reader.weights, strict=True),
        ("chat template", template_hash, reader.template.digest()),
    ):
        if theirs != ours:
            raise InputError(
                f"was made with another model: its {what} is {theirs}, here it is {ours}",
                where=str(folder),
                hint="take the checkpoint that the recipe was run on, or run the recipe again",
            )


def _metadata(detector: Detector, reader: Reader) -> dict[str, str]:
    return {
        "made_by": f"refusalkit {refusalkit.__version__}",
        "model": reader.recipe.model.id,
        "model_revision": detector.weights[0],
        "template_hash": detector.template_hash,
        "site": detector.site,
        "position": str(detector.position),
        "layers": ",".join(map(str, detector.layers)),
        "layer_convention": "layer l is the block whose input is resid_pre[l]",
        "score": f"mean over layers of ({'h / |h|' if detector.scaled else 'h'}) @ vectors[layer]",
    }


def _reading_part(recipe: Recipe) -> str:
    """Return the part of a recipe that says which model reads prompts, and how; the rest takes its defaults."""
    part = recipe.model_dump(mode="json", include={"name", "model", "prompts"})
    text = yaml.safe_dump(part, sort_keys=False, allow_unicode=True, width=110)
    return "# Which model reads prompts, and how; the rest of the run's recipe is not needed for that.\n" + text
