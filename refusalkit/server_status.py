"""Write what an NDIF server hosts and runs, and whether a recipe's model can run there."""

from __future__ import annotations

from refusalkit.engine.remote import model_key
from refusalkit.engine.status import Status
from refusalkit.plan import Plan


def status_text(status: Status, plan: Plan | None) -> str:
    """Return the status as text."""
    key = "set" if status.has_key else "none (NDIF_API_KEY, or `nnsight login`)"
    rows = [("server", f"{status.host}, reachable"), ("API key", key)]
    models = [f"{hosted.name}  {hosted.state}" for hosted in status.hosted] or ["none"]
    rows += [("models" if number == 0 else "", text) for number, text in enumerate(models)]
    for number, (name, (here, there)) in enumerate(status.versions.items()):
        differs = "" if here == there else f", here {here}"
        rows.append(("versions" if number == 0 else "", f"{name} {there}{differs}"))
    if plan is not None:
        rows.append(("recipe", f"{plan.recipe.name}: {verdict(status, plan)}"))
    return "\n".join(f"{name:<9} {text}" for name, text in rows)


def verdict(status: Status, plan: Plan) -> str:
    """Say whether the model of a plan can run on the server."""
    model = plan.checkpoint.section.id
    states = [hosted.state for hosted in status.hosted if hosted.same_model(model_key(plan.checkpoint))]
    if not states:
        return f"{model} is not hosted now; a server that deploys on request loads it at the first job"
    return f"{model} can run" if "RUNNING" in states else f"{model} cannot run yet: {states[0]}"
