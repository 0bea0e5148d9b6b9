"""Write the page of a search: one HTML file that needs nothing else. It holds no completion of any model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt

from refusalkit.report.charts import Figure, file_name
from refusalkit.report.page import placed, render
from refusalkit.report.wording import NOTHING_TO_SHOW, count, number, with_interval
from refusalkit.run_directory import mapping_in
from refusalkit.store import write_text
from refusalkit_search.choice import best, front
from refusalkit_search.outcome import NAMES, Found, failures, on_validation, rule, sentence
from refusalkit_search.space import Objective
from refusalkit_search.study import Trial

SHAPES = {"search": "circle", "random": "diamond", "fixed": "triangle-up"}


def write_page(found: Found, folder: Path) -> None:
    """Write `search.html`."""
    write_text(folder / "search.html", render_page(found, folder))


def render_page(found: Found, folder: Path) -> str:
    """Write the page, which lies in the search's folder."""
    model = found.setup.recipe("page", {}).model.id
    first, *others = found.objectives
    return render(
        "search.html.j2",
        package="refusalkit_search",
        kind="search",
        name=found.setup.name,
        model=model,
        toy=model.startswith("tiny:"),
        sentence=sentence(found),
        rule=rule(found),
        budget=count(len(found.search), "trial"),
        n_random=len(found.random),
        seed=found.budget.seed,
        objectives=[each.label for each in found.objectives],
        compared=[_compared(found, name, trial) for name, trial in found.compared()],
        paretos=[placed(_pareto(found, first, other)) for other in others],
        progress=placed(_progress(found)),
        keys=list(found.setup.space.space),
        front=[_row(found, trial) for trial in found.front],
        trials=[_row(found, trial) for trial in (*found.search, *found.random)],
        failures=failures(found),
        costs=_costs(folder),
    )


def _compared(found: Found, name: str, trial: Trial) -> dict[str, Any]:
    tested = [with_interval(found.tested(name, each)) for each in found.objectives]
    return {
        "name": NAMES[name],
        "link": f"test/{name}/report.html" if name in found.tests else None,
        "cells": [cell for pair in zip(on_validation(found, trial), tested, strict=True) for cell in pair],
        "values": _values(trial),
    }


def _values(trial: Trial) -> str:
    return ", ".join(f"{key}: {_short(value)}" for key, value in trial.values.items()) or NOTHING_TO_SHOW


def _short(value: Any) -> str:
    return number(value) if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def _row(found: Found, trial: Trial) -> dict[str, Any]:
    return {
        "run": trial.run,
        "chosen": trial in (found.chosen, found.rival),
        "cells": on_validation(found, trial),
        "values": [_short(trial.values[key]) for key in found.setup.space.space],
        "reason": trial.reason,
    }


def _measured(found: Found) -> list[tuple[str, Trial]]:
    named = [*(("random", trial) for trial in found.random), *(("search", trial) for trial in found.search)]
    return [(kind, trial) for kind, trial in (*named, ("fixed", found.fixed)) if trial.measured is not None]


def _pareto(found: Found, first: Objective, other: Objective) -> Figure:
    """Draw every trial by two objectives, and a line through those of the search that none beats in these two."""
    across, up = (found.objectives.index(each) for each in (first, other))
    rows = [
        {
            "kind": NAMES[kind],
            "run": trial.run,
            "across": trial.measured[across],
            "up": trial.measured[up],
            "values": _values(trial),
            "chosen": trial in (found.chosen, found.rival),
        }
        for kind, trial in _measured(found)
        if trial.measured is not None
    ]
    pair = [Trial(t.run, {}, (t.measured[across], t.measured[up])) for t in found.search if t.measured is not None]
    steps = [{"across": t.measured[0], "up": t.measured[1]} for t in front(pair, (first, other)) if t.measured]
    return Figure(
        name=file_name("pareto", first.metric, first.prompts, other.metric, other.prompts),
        title=f"{first.label} against {other.label}",
        note="On validation prompts, a mark a trial. The line joins trials of the search that none beats in both; "
        "large marks are the choices.",
        description=f"{first.label} and {other.label} of every trial, with the Pareto front of the search.",
        chart=_points(rows, steps, (_title(first), _title(other))),
        min_width=320,
    )


def _title(objective: Objective) -> str:
    return f"{objective.label} ({'lower' if objective.goal == 'minimize' else 'higher'} is better)"


def _colour(kinds: Sequence[str]) -> Any:
    every = [NAMES[kind] for kind in SHAPES]
    return (
        alt.Color("kind:N").scale(domain=every, range="category").title(None).legend(orient="top", values=list(kinds)),
        alt.Shape("kind:N")
        .scale(domain=every, range=list(SHAPES.values()))
        .title(None)
        .legend(orient="top", values=list(kinds)),
    )


def _points(rows: Sequence[dict[str, Any]], steps: Sequence[dict[str, Any]], titles: tuple[str, str]) -> alt.LayerChart:
    colour, shape = _colour(list(dict.fromkeys(row["kind"] for row in rows)))
    x, y = alt.X("across:Q").title(titles[0]), alt.Y("up:Q").title(titles[1])
    line = alt.Chart(alt.InlineData(list(steps))).mark_line(style="reference", interpolate="linear").encode(x=x, y=y)
    marks = (
        alt.Chart(alt.InlineData(list(rows)))
        .mark_point(filled=True, opacity=0.75)
        .encode(
            x=x,
            y=y,
            color=colour,
            shape=shape,
            size=alt.condition("datum.chosen", alt.value(170), alt.value(50)),
            tooltip=[
                alt.Tooltip("run:N", title="trial"),
                alt.Tooltip("across:Q", title=titles[0], format=".3f"),
                alt.Tooltip("up:Q", title=titles[1], format=".3f"),
                alt.Tooltip("values:N", title="with"),
            ],
        )
    )
    return alt.layer(line, marks).properties(width="container", height=320)


def _progress(found: Found) -> Figure:
    """Draw the first objective of the best trial so far, by the number of trials, for search and random search."""
    objective = found.objectives[0]
    rows = []
    for kind, trials in (("search", found.search), ("random", found.random)):
        for done in range(1, len(trials) + 1):
            so_far = best(trials[:done], found.objectives)
            if so_far is not None and so_far.measured is not None:
                rows.append({"kind": NAMES[kind], "trials": done, "value": so_far.measured[0]})
    colour, _ = _colour(list(dict.fromkeys(row["kind"] for row in rows)))
    lines = (
        alt.Chart(alt.InlineData(rows))
        .mark_line(interpolate="step-after", strokeWidth=2)
        .encode(
            x=alt.X("trials:Q").title("trials").axis(tickMinStep=1, format="d"),
            y=alt.Y("value:Q").title(_title(objective)),
            color=colour,
        )
    )
    return Figure(
        name="progress",
        title="The best trial so far",
        note="On validation prompts. Curves begin with the first trial that keeps the limits.",
        description=f"{objective.label} of the best trial so far, by number of trials, for search and random search.",
        chart=alt.layer(lines).properties(width="container", height=240),
        min_width=320,
    )


def _costs(folder: Path) -> list[tuple[str, int, str]]:
    """Sum the forward passes of one prompt: of the trials, by kind, and of the runs on test prompts."""
    groups = {NAMES[kind]: f"trials/{kind}*" for kind in ("fixed", "search", "random")} | {"test prompts": "test/*"}
    rows = []
    for what, pattern in groups.items():
        environments = [mapping_in(path) for path in folder.glob(f"{pattern}/environment.json")]
        passes = sum(sum(environment.get("forward_passes", {}).values()) for environment in environments)
        rows.append((what, len(environments), f"{passes:,.0f}"))
    return rows
