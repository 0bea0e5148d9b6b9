"""Read and write the completions of the authors' layout, and what judges said of them.

`completions/<data set>_<label>_completions.json` lists `{category, prompt, response}`;
`..._evaluations.json` adds `is_jailbreak_<judge>` to each, and rates over all and by category. The labels are
`baseline`, `ablation` and `actadd`: the last subtracts the direction on harmful prompts and adds it on harmless ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refusalkit.interchange.content import Completions, read_json, unreadable
from refusalkit.interchange.own import SUBSTRINGS, judged_by_substrings
from refusalkit.metric import Side
from refusalkit.store import write_json

FOLDER = "completions"
#: Their labels, by side and our label.
LABELS: Mapping[tuple[Side, str], str] = {
    ("harmful", "none"): "baseline",
    ("harmful", "ablate"): "ablation",
    ("harmful", "steer(scale=-1.0)"): "actadd",
    ("harmless", "none"): "baseline",
    ("harmless", "ablate"): "ablation",
    ("harmless", "steer"): "actadd",
}
JUDGED = "is_jailbreak_"


def read_completions(folder: Path) -> tuple[Completions, ...]:
    """Read every set of completions with what judges said; where no judge did, the paper's substrings are counted."""
    found = []
    for path in sorted((folder / FOLDER).glob("*_completions.json")):
        name = path.name.removesuffix("_completions.json")
        data, _, label = name.rpartition("_")
        side: Side = "harmless" if data.startswith("harmless") else "harmful"
        ours = next((mine for (of, mine), theirs in LABELS.items() if (of, theirs) == (side, label)), None)
        if ours is None:
            raise unreadable(path, f"its label is {label!r}, and not one of {', '.join(sorted(set(LABELS.values())))}")
        judged = path.with_name(f"{name}_evaluations.json")
        found.append(_completions(judged if judged.is_file() else path, side, ours))
    return tuple(found)


def _completions(path: Path, side: Side, intervention: str) -> Completions:
    document = read_json(path, list if path.name.endswith("_completions.json") else dict)
    try:
        rows = document if isinstance(document, list) else document["completions"]
        prompts = tuple(str(row["prompt"]) for row in rows)
        texts = tuple(str(row["response"]) for row in rows)
        judges = [key.removeprefix(JUDGED) for key in rows[0] if key.startswith(JUDGED)] if rows else []
        successes = {judge: tuple(float(row[f"{JUDGED}{judge}"]) for row in rows) for judge in judges}
    except (ValueError, KeyError, TypeError) as error:
        raise unreadable(path, f"{type(error).__name__}: {error}") from None
    return Completions(
        side, intervention, prompts, texts, successes or {SUBSTRINGS: judged_by_substrings(side, prompts, texts)}
    )


def write_completions(folder: Path, completions: Sequence[Completions]) -> list[str]:
    """Write the completions that have a label there; the data sets are called `harmful` and `harmless`.

    Returns what was left out, in words.
    """
    left_out = []
    for made in completions:
        label = LABELS.get((made.side, made.intervention))
        if label is None:
            left_out.append(f"{made.intervention} on {made.side} prompts")
            continue
        (folder / FOLDER).mkdir(exist_ok=True)
        stem = f"{made.side}_{label}"
        pairs = zip(made.prompts, made.texts, strict=True)
        rows: list[dict[str, Any]] = [{"category": None, "prompt": prompt, "response": text} for prompt, text in pairs]
        write_json(folder / FOLDER / f"{stem}_completions.json", rows)
        write_json(folder / FOLDER / f"{stem}_evaluations.json", _judged(rows, made.successes))
    first = left_out[0] if left_out else ""
    said = f"{len(left_out)} of {len(completions)} sets of completions have no label there, such as {first}"
    return [said] if left_out else []


def _judged(rows: Sequence[Mapping[str, Any]], successes: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    rates: dict[str, Any] = {}
    for judge, values in successes.items():
        rate = sum(values) / len(values)
        # Every prompt is of the one category that JSON writes a missing one as.
        rates |= {f"{judge}_success_rate": rate, f"{judge}_per_category": {"null": rate}}
    judged = [
        {**row, **{f"{JUDGED}{judge}": int(values[index]) for judge, values in successes.items()}}
        for index, row in enumerate(rows)
    ]
    return {**rates, "completions": judged}
