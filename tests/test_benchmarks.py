"""The benchmark measures what runs do: its two ways agree before their times are compared."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


def test_the_benchmark_times_both_ways_and_finds_them_equal(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    options = ["--repeats", "1", "--threads", "1", "--share", "0.2", "--no-whole", "--json", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", str(recipe_file), *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text(encoding="utf-8"))
    assert figures["largest_score_difference_nats"] < 1e-3
    assert figures["same_choice_when_screened"]
    assert {row["what"] for row in figures["rows"]} >= {"capture", "select", "capture + select"}
    assert all(row["ours"] > 0 and row["plain"] > 0 for row in figures["rows"])
