"""Time refusalkit against plain hooks: `python -m tests.benchmarks RECIPE.yaml`.

Everything runs in one process, ours and theirs in turn, and medians are compared. The three plain sweeps are timed on
a share of the candidates, evenly spaced, and scaled: every candidate costs them the same. The floor is one bare forward
pass a prompt.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

# Threads that spin while they wait make every figure depend on what else the machine does.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import nnsight
import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

from refusalkit.artifacts import Candidates, Choice
from refusalkit.pipeline import execute

from .case import Case, Place, Scores, prepare


@dataclass
class Clock:
    """Collect the seconds of repeated measurements by name."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def time(self, name: str, work: Callable[[], Any]) -> Any:
        """Run `work` and write down how long it took."""
        _synchronise()
        since = time.perf_counter()
        result = work()
        _synchronise()
        self.seconds.setdefault(name, []).append(time.perf_counter() - since)
        return result

    def __getitem__(self, name: str) -> float:
        """Return the median of what was measured under `name`, in seconds."""
        return statistics.median(self.seconds[name])


@dataclass(frozen=True, eq=False)
class Found:
    """Hold what one round computed, to compare results as well as times."""

    candidates: Candidates
    choice: Choice
    screened: Choice
    plain: dict[Place, Scores]

    @property
    def largest_difference(self) -> float:
        """The largest difference, in nats, between a score of ours and the plain one."""
        ours = {(row.position, row.layer): row for row in self.choice.scores}
        differences = [0.0]
        for (row, layer), theirs in self.plain.items():
            mine = ours[self.candidates.positions[row], layer]
            for one, other in zip((mine.refusal_score, mine.induced_score, mine.kl_nats), theirs, strict=True):
                differences += [abs(one - other)] if one is not None else []
        return max(differences)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _round(case: Case, clock: Clock, places: list[Place], new_tokens: int) -> Found:
    """Measure everything once, ours and theirs in turn."""
    plain, engine = case.plain, case.bench.engine
    train = [*case.tokens("harmful", "train"), *case.tokens("harmless", "train")]
    test = case.tokens("harmless", "test")
    found = clock.time("capture ours", case.found)
    candidates = found[-1]
    clock.time("capture plain", lambda: plain.means(train, case.splits.positions))
    clock.time("capture floor", lambda: plain.logits(train))
    choice = clock.time("select ours", lambda: case.choice(found))
    clean = clock.time("reference plain", case.reference)
    scores = clock.time("share plain", lambda: case.sweeps(candidates, places, clean))
    screened = clock.time("select screened", lambda: case.choice(found, screen="gradient"))
    ablation, hooks = case.ablation(choice), plain.ablation(choice.direction)
    engine.shares_prefix = False
    clock.time("pass ours", lambda: engine.logits(test))
    clock.time("pass plain", lambda: plain.logits(test))
    clock.time("ablated ours", lambda: engine.logits(test, ablation))
    clock.time("ablated plain", lambda: plain.logits(test, hooks))
    engine.shares_prefix = True
    clock.time("generate ours", lambda: engine.generate(test, ablation, new_tokens))
    clock.time("generate plain", lambda: plain.generate(test, hooks, new_tokens))
    return Found(candidates, choice, screened, scores)


def _whole_run(case: Case) -> dict[str, float]:
    """Run the recipe from the start, and add up the time inside the model's forward passes."""
    inside, began = 0.0, 0.0

    def before(module: Any, args: Any) -> None:
        nonlocal began
        _synchronise()
        began = time.perf_counter()

    def after(module: Any, args: Any, output: Any) -> None:
        nonlocal inside
        _synchronise()
        inside += time.perf_counter() - began

    with tempfile.TemporaryDirectory() as folder:
        before_hook = torch.nn.modules.module.register_module_forward_pre_hook(_only(case, before))
        # Called for passes that stop early, too: capture needs no later layer, and stops its passes with an error.
        after_hook = torch.nn.modules.module.register_module_forward_hook(_only(case, after), always_call=True)
        since = time.perf_counter()
        execute(case.plan, Path(folder) / "run")
        seconds = time.perf_counter() - since
        before_hook.remove()
        after_hook.remove()
    return {"seconds": seconds, "forward_seconds": inside, "overhead": seconds / inside - 1}


def _only(case: Case, hook: Callable[..., None]) -> Callable[..., None]:
    """Let a hook on every module see the whole model alone: the run loads its own copy."""
    kind = type(case.bench.engine.module)
    return lambda module, *rest: hook(module, *rest) if type(module) is kind else None


def _places(candidates: Candidates, share: float) -> list[Place]:
    rows, layers = candidates.directions.shape[:2]
    everything = [(row, layer) for row in range(rows) for layer in range(layers)]
    return everything[:: max(1, round(1 / share))]


def main(
    recipe: Annotated[Path, typer.Argument(help="A recipe whose selector is `causal`.")],
    repeats: Annotated[int, typer.Option(help="Rounds; medians are shown.")] = 3,
    threads: Annotated[int, typer.Option(help="torch threads.")] = 2,
    share: Annotated[float, typer.Option(help="Share of the candidates the plain sweeps are timed on.")] = 0.05,
    whole: Annotated[bool, typer.Option(help="Time a whole run, too.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Time capture, select, generate and the whole run against plain hooks and bare forward passes."""
    torch.set_num_threads(threads)
    case, clock = prepare(recipe), Clock()
    places = _places(case.found()[-1], share)
    new_tokens = case.plan.recipe.evaluate.max_new_tokens
    for _ in range(repeats):
        found = _round(case, clock, places, new_tokens)
    figures = _figures(case, clock, found)
    if whole:
        figures["run"] = _whole_run(case)
    _show(figures)
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _figures(case: Case, clock: Clock, found: Found) -> dict[str, Any]:
    n_candidates = found.candidates.directions.shape[:2].numel()
    sweeps = clock["reference plain"] + clock["share plain"] * n_candidates / len(found.plain)
    whole, ours = clock["capture plain"] + sweeps, clock["capture ours"] + clock["select ours"]
    fast = clock["capture ours"] + clock["select screened"]
    cuda = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "model": case.plan.recipe.model.id,
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, nnsight)},
        "candidates": n_candidates,
        "plain_candidates_timed": len(found.plain),
        "largest_score_difference_nats": found.largest_difference,
        "same_choice_when_screened": _place(found.choice) == _place(found.screened),
        "choice": _place(found.choice),
        "peak_bytes": peak,
        "rows": [
            {"what": "capture", "ours": clock["capture ours"], "plain": clock["capture plain"]},
            {"what": "capture, bare passes", "ours": clock["capture ours"], "plain": clock["capture floor"]},
            {"what": "select", "ours": clock["select ours"], "plain": sweeps},
            {"what": "select, screened", "ours": clock["select screened"], "plain": sweeps},
            {"what": "capture + select", "ours": ours, "plain": whole},
            {"what": "capture + select, screened", "ours": fast, "plain": whole},
            {"what": "one pass", "ours": clock["pass ours"], "plain": clock["pass plain"]},
            {"what": "one ablated pass", "ours": clock["ablated ours"], "plain": clock["ablated plain"]},
            {"what": "generate, ablated", "ours": clock["generate ours"], "plain": clock["generate plain"]},
        ],
    }


def _place(choice: Choice) -> tuple[int, int]:
    return choice.position, choice.layer


def _show(figures: dict[str, Any]) -> None:
    console = Console()
    table = Table(title=f"{figures['model']} on {figures['device']}")
    for name in ("what", "ours, s", "plain, s", "times faster"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for row in figures["rows"]:
        ratio = row["plain"] / row["ours"]
        table.add_row(row["what"], f"{row['ours']:.2f}", f"{row['plain']:.2f}", f"{ratio:.2f}")
    console.print(table)
    console.print(
        f"Choice {figures['choice']}, screened the same: {figures['same_choice_when_screened']}; largest difference "
        f"of a score {figures['largest_score_difference_nats']:.1e} nats. Peak memory "
        f"{figures['peak_bytes'] / 2**30:.2f} GiB."
    )
    if run := figures.get("run"):
        console.print(f"Whole run {run['seconds']:.1f} s, {run['overhead']:.1%} over its forward passes.")


if __name__ == "__main__":
    typer.run(main)
