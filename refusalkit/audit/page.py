"""Write an audit as a page: one HTML file that needs nothing else. It holds no completion of any model."""

from __future__ import annotations

import altair as alt

from refusalkit.audit.findings import ABLATION, Findings
from refusalkit.audit.outcome import Outcome
from refusalkit.metric import SIDES
from refusalkit.report.figure import Figure
from refusalkit.report.intervals import chart
from refusalkit.report.measured import BASELINE, controls_of, interventions
from refusalkit.report.page import placed, render
from refusalkit.report.wording import number
from refusalkit.run_directory import Run


def render_audit(outcome: Outcome, run: Run) -> str:
    """Write the page, which lies beside the run's own report."""
    found = outcome.findings
    return render(
        "audit.html.j2",
        kind="audit",
        name=run.recipe["name"],
        model=outcome.model,
        toy=outcome.model.startswith("tiny:"),
        started=str(run.environment.get("started") or "")[:10],
        verdict=outcome.verdict,
        checks=outcome.checks,
        removal=placed(_removal(run)),
        layers=placed(_layers(found)),
        max_kl_nats=f"{found.max_kl_nats:g}",
        refused=found.over_refused,
        n_look_alikes=found.over_refusal.n,
    )


def _removal(run: Run) -> Figure:
    """Draw the refusal rate of harmful requests: unmodified, and with the direction or control directions removed."""
    shown = (BASELINE, ABLATION, *controls_of(ABLATION, interventions(run.evaluation)))
    results = [row for row in run.evaluation.results if row.intervention in shown and row.prompts == "harmful"]
    return Figure(
        name="removal",
        title="Refusal of harmful requests with one direction removed",
        note="Paler rows remove a control direction of the same norm: a random one, or that of shuffled labels.",
        description="Refusal rate of held-out harmful requests with 95% intervals, by what is removed.",
        chart=chart(results, "refusal_rate", "share of held-out requests"),
        min_width=320,
    )


def _layers(found: Findings) -> Figure:
    """Draw the lowest refusal score that removing one direction leaves, by the layer of the direction."""
    rows = [
        {
            "side": "harmful",
            "layer": each.layer,
            "score": each.row.refusal_score if each.row else None,
            "position": each.row.position if each.row else None,
            "kl": each.row.kl_nats if each.row else None,
        }
        for each in found.layers
    ]
    base = alt.Chart(alt.InlineData(rows))
    x = alt.X("layer:O").title("layer of the direction").axis(labelAngle=0, labelOverlap=True)
    y = alt.Y("score:Q").title("refusal score, nats").axis(tickCount=5)
    tips = [
        alt.Tooltip("layer:O"),
        alt.Tooltip("position:O"),
        alt.Tooltip("score:Q", title="refusal score", format=".2f"),
        alt.Tooltip("kl:Q", title="KL in nats", format=".3f"),
    ]
    zero = alt.Chart(alt.InlineData([{"score": 0}])).mark_rule(style="reference").encode(y="score:Q")
    colour = alt.Color("side:N").scale(domain=list(SIDES), range="category").legend(None)
    dots = base.mark_point(filled=True, size=80, invalid="filter").encode(x=x, y=y, color=colour, tooltip=tips)
    return Figure(
        name="layers",
        title="Refusal score left when the best direction of a layer is removed",
        note=f"Mean over harmful validation requests; {number(found.choice.baseline_refusal_score)} with nothing "
        "removed.",
        description="The lowest mean refusal score that removing one direction leaves, by layer, with a line at 0.",
        chart=alt.layer(zero, dots).properties(width="container", height=220),
        min_width=320,
    )
