"""Write the report: one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

import base64
import re
from contextlib import suppress
from functools import cache
from importlib import resources
from importlib.metadata import version
from typing import Any

import yaml
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from refusalkit.agreement import agreements
from refusalkit.artifacts import GATE_RATE
from refusalkit.errors import RunError
from refusalkit.report import tables
from refusalkit.report.analyses import parts
from refusalkit.report.chance import chance
from refusalkit.report.charts import own_figures, svg
from refusalkit.report.completions import examples
from refusalkit.report.figure import Figure
from refusalkit.report.finding import sentence
from refusalkit.report.heat_map import BASELINE_STRATEGY
from refusalkit.report.measured import costs_first, interventions, is_control, metrics, without_number
from refusalkit.report.provenance import provenance
from refusalkit.report.theme import config
from refusalkit.report.wording import count, number, token
from refusalkit.run_directory import Run
from refusalkit.store import write_text

# An interval stays on one line with the number it belongs to.
_INTERVAL = re.compile(r" \[([^],]+), ([^]]+)\]")


def render_html(run: Run, *, show_completions: bool = False) -> str:
    """Write the page for a run; completions to harmful prompts are in it only when asked for."""
    return render(
        "template.html.j2",
        kind="report",
        **_found(run),
        **_figures(run),
        **_numbers(run),
        analyses=[(part, [placed(figure) for figure in part.figures]) for part in parts(run)],
        chance=chance(run.evaluation),
        harmless=examples(run, "harmless", show_completions=show_completions),
        over_refusal=examples(run, "over_refusal", show_completions=show_completions),
        harmful=examples(run, "harmful", show_completions=show_completions),
        provenance=provenance(run),
        recipe_yaml=yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True),
    )


def render(template: str, *, package: str = "refusalkit.report", **values: Any) -> str:
    """Fill a template, with the style and the scripts that every page carries in itself.

    One of another `package` can extend and import ours.
    """
    environment = Environment(
        loader=FunctionLoader(lambda name: _packaged(name, package if name == template else "refusalkit.report")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        style=Markup(_packaged("style.css")),
        vega=Markup(_vega()),
        script=Markup(_packaged("page.js")),
        themes={"light": config("light"), "dark": config("dark")},
        **values,
    )


def _packaged(name: str, package: str = "refusalkit.report") -> str:
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


@cache
def _vega() -> str:
    """Return the JavaScript that draws the charts, safe inside a script element.

    To put it together takes seconds, so it is kept for the next process where this user's caches are.
    """
    import platformdirs
    import vl_convert

    kept = platformdirs.user_cache_path("refusalkit") / f"vega-{version('vl-convert-python')}.js"
    with suppress(OSError):
        return kept.read_text(encoding="utf-8")
    # Without a snippet it puts `vegaEmbed` on the window; the stub does not say that it may be left out.
    made = str(vl_convert.javascript_bundle()).replace("</script", "<\\/script")  # type: ignore[call-arg]
    # A home that cannot be written to costs the time alone.
    with suppress(OSError, RunError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_text(kept, made)
    return made


def _found(run: Run) -> dict[str, Any]:
    """Gather what stands at the top of the page."""
    model = str((run.environment.get("model") or {}).get("id") or (run.recipe.get("model") or {}).get("id") or "–")
    choice = run.choice
    tokens = dict(zip(run.prompts.positions, run.prompts.position_tokens, strict=False))
    said = sentence(choice, run.evaluation, repairs=run.candidates.repairs)
    return {
        "name": str(run.recipe.get("name") or run.folder.name),
        "description": run.recipe.get("description"),
        "model": model,
        "toy": model.startswith("tiny:"),
        "started": str(run.environment.get("started") or "")[:10],
        "sentence": _INTERVAL.sub("\N{NO-BREAK SPACE}[\\1,\N{NO-BREAK SPACE}\\2]", said),
        "choice": choice,
        "chosen_token": token(tokens[choice.position]) if choice.position in tokens else None,
        "strategy": run.candidates.strategy,
        "site": run.candidates.site,
        "n_candidates": count(len(choice.scores), "candidate"),
        "baseline_harmful": None if choice.baseline_refusal_score is None else number(choice.baseline_refusal_score),
        "baseline_harmless": number(choice.baseline_harmless_score),
        "cosine": None if run.candidates.strategy == BASELINE_STRATEGY else number(choice.cosine),
        "fates": tables.fates(choice),
    }


def _figures(run: Run) -> dict[str, Any]:
    """Place the figures in the sections of the page."""
    drawn = own_figures(run)
    maps = [figure for figure in drawn if figure.name.startswith("candidates-")]
    return {
        "rate_figures": [placed(figure) for figure in drawn if figure.name.startswith("rate-")],
        "heat_maps": [placed(figure) for figure in maps],
        "heat_maps_side_by_side": all(figure.min_width <= 340 for figure in maps),
        "estimate_figures": [placed(figure) for figure in drawn if figure.name.startswith("estimate-")],
        "separation_figures": [placed(figure) for figure in drawn if figure.name == "separation"],
        "mean_figures": [placed(figure) for figure in drawn if figure.name.startswith("mean-")],
    }


def placed(figure: Figure) -> dict[str, Any]:
    """Add the picture that stands in where nothing is drawn: without scripts, and in print."""
    picture = base64.b64encode(svg(figure).encode()).decode()
    return {
        "name": figure.name,
        "title": figure.title,
        "note": figure.note,
        "description": figure.description,
        "min_width": figure.min_width,
        "specification": figure.specification,
        "picture": f"data:image/svg+xml;base64,{picture}",
    }


def _numbers(run: Run) -> dict[str, Any]:
    """Gather the tables of results."""
    evaluation = run.evaluation
    rates, means = metrics(evaluation, "rate"), costs_first(metrics(evaluation, "mean"))
    return {
        "has_controls": any(map(is_control, interventions(evaluation))),
        "rate_tables": {name: tables.by_intervention(evaluation.results, [name]) for name in rates},
        "refusals_alone": all("refusal" in name for name in rates),
        "mean_table": tables.by_intervention(evaluation.results, means),
        "missing_table": tables.by_intervention(evaluation.results, without_number(evaluation)),
        "gate_table": tables.by_intervention(evaluation.gates, [GATE_RATE]),
        "agreement_rows": tables.agreement_rows(agreements(evaluation.results)),
        "weight_edits": tables.weight_edits(evaluation.weight_edits),
    }
