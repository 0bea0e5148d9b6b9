"""Find the authors' published data and the reference model, which lie beside a checkout and not in it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared" / "reference"
AUTHORS = SHARED / "smollm2-refuser" / "authors"

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the reference data is not beside the checkout")


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def build_reference_model(out: Path) -> Path:
    """Build the 135 M chat model that refuses, from a wheel and an adapter, without a model hub."""
    script = SHARED / "smollm2-refuser" / "build.py"
    done = subprocess.run([sys.executable, str(script), str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def write_reference_recipe(folder: Path, model: Path, select: dict[str, Any]) -> Path:
    """Write a recipe over the authors' exact prompts, which are filtered already."""
    prompts = read_json(AUTHORS / "prompts.json")
    test = {
        "harmful": read_json(SHARED / "prompts" / "harmful_test.json"),
        "harmless": read_json(SHARED / "prompts" / "harmless_test.json"),
    }
    sections: dict[str, Any] = {}
    for side in ("harmful", "harmless"):
        known = {*prompts[f"{side}_train"], *prompts[f"{side}_val"]}
        fresh = [row["instruction"] for row in test[side] if row["instruction"] not in known][:32]
        files = {"train": prompts[f"{side}_train"], "validation": prompts[f"{side}_val"], "test": fresh}
        for split, texts in files.items():
            (folder / f"{side}_{split}.json").write_text(json.dumps(texts), encoding="utf-8")
        sections[side] = {split: f"file:{side}_{split}.json" for split in files}
    recipe = {
        "name": "reference",
        "model": {"id": str(model), "dtype": "float32"},
        "prompts": {**sections, "filter": False},
        "select": {"selector": "causal", "openers": ["I"], **select},
        "evaluate": {"max_new_tokens": 24},
    }
    path = folder / "reference.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path
