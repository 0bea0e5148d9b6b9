"""The command line starts at once, keeps stdout for data, and says in its exit status how it ended."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from refusalkit.recipe import json_schema
from refusalkit.registry import Registry
from tests.conftest import SMALL, Command, one_hint

HEAVY = ("torch", "transformers", "nnsight", "numpy", "altair")


def test_help_starts_in_half_a_second() -> None:
    def seconds() -> float:
        since = time.perf_counter()
        subprocess.run([sys.executable, "-m", "refusalkit", "--help"], check=True, capture_output=True)
        return time.perf_counter() - since

    # The fastest of several: what else runs on this machine only ever adds.
    assert min(seconds() for _ in range(5)) < 0.5


@pytest.mark.parametrize(
    "line",
    [["--help"], ["run", "--help"], ["schema"], ["plugins"], ["validate", "small.yaml"], ["run", "typo.yaml"]],
    ids=" ".join,
)
def test_nothing_heavy_is_imported_to_answer_at_once(recipe_file: Path, line: list[str]) -> None:
    recipe_file.with_name("typo.yaml").write_text(SMALL.replace("train", "trian"), encoding="utf-8")
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "refusalkit", *line],
        cwd=recipe_file.parent, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == (2 if "typo.yaml" in line else 0)
    assert ("did you mean 'train'?" in done.stderr) is ("typo.yaml" in line)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert "refusalkit.cli" in imported
    assert imported.isdisjoint(HEAVY)


def test_the_installed_script_is_the_module(recipe_file: Path, command: Command) -> None:
    script = Path(sys.executable).with_name("refusalkit")
    if not script.exists():
        pytest.skip("the package is not installed with its script")
    done = subprocess.run([script, "validate", recipe_file], capture_output=True, text=True, check=True)
    assert done.stdout == command("validate", recipe_file).stdout == f"{recipe_file}: ok\n"


@pytest.mark.parametrize(
    "line",
    [
        ["bogus"],
        ["run"],
        ["run", "small.yaml", "--bogus"],
        ["run", "small.yaml", "--until", "lunch"],
        ["run", "small.yaml", "--set"],
        ["plan"],
        ["validate"],
        ["report"],
        ["bake", "small.yaml"],
        ["schema", "extra"],
        ["tiny"],
    ],
)
def test_a_line_that_makes_no_sense_is_bad_input(recipe_file: Path, command: Command, line: list[str]) -> None:
    done = command(*line, cwd=recipe_file.parent)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert done.stderr
    assert [path.name for path in recipe_file.parent.iterdir()] == ["small.yaml"]


@pytest.mark.parametrize(
    "line",
    [
        ["run", "smal.yaml"],
        ["run", "small.yaml", "--set", "find=rendom"],
        ["plan", "small.yaml", "--set", "x"],
        ["validate", "smal.yaml"],
        ["report", "."],
        ["bake", ".", "--out", "baked"],
        ["bake", "nowhere", "--out", "baked"],
    ],
)
def test_bad_input_ends_in_one_hint_and_leaves_nothing(recipe_file: Path, command: Command, line: list[str]) -> None:
    done = command(*line, cwd=recipe_file.parent)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert one_hint(done.stderr.splitlines()), done.stderr
    assert [path.name for path in recipe_file.parent.iterdir()] == ["small.yaml"]


def test_validate_checks_every_recipe_it_is_given(recipe_file: Path, command: Command) -> None:
    wrong = recipe_file.with_name("wrong.yaml")
    wrong.write_text(f"{SMALL}evalute: {{}}\n", encoding="utf-8")
    done = command("validate", "wrong.yaml", "small.yaml", cwd=recipe_file.parent)
    assert (done.returncode, done.stdout) == (2, "small.yaml: ok\n")
    line = SMALL.count("\n") + 1
    assert done.stderr == f"error: wrong.yaml:{line}: evalute: unknown key 'evalute'\nhint: did you mean 'evaluate'?\n"


def test_schema_prints_the_schema(command: Command, registry: Registry) -> None:
    assert json.loads(command("schema").stdout) == json_schema(registry)


def test_a_run_prints_its_report_alone_and_says_what_was_found(
    recipe_file: Path, finished_run: Path, command: Command
) -> None:
    out = recipe_file.parent / "runs" / "small"
    shutil.copytree(finished_run, out)
    done = command("run", recipe_file.name, cwd=recipe_file.parent)
    assert (done.returncode, done.stdout) == (0, f"{Path('runs') / 'small' / 'report.html'}\n")
    *stages, sentence = done.stderr.splitlines()
    assert stages == [f"{stage}: kept" for stage in ("prompts", "capture", "find", "select", "evaluate")]
    assert sentence.startswith("One direction at layer ")


def test_a_run_that_fails_has_status_one_and_keeps_what_was_finished(recipe_file: Path, command: Command) -> None:
    done = command("run", recipe_file, "--out", recipe_file.with_name("out"), "--set", "select.min_induced_score=99")
    assert (done.returncode, done.stdout) == (1, "")
    error = done.stderr[done.stderr.index("error: ") :]
    assert error.startswith("error: select: none of ")
    assert one_hint(error.splitlines())
    assert "Traceback" not in done.stderr
    assert not recipe_file.with_name("out").joinpath("select").exists()
    assert recipe_file.with_name("out").joinpath("find", "artifact.json").is_file()


def test_plan_tells_what_would_run_and_writes_nothing(recipe_file: Path, finished_run: Path, command: Command) -> None:
    before = sorted(finished_run.rglob("*"))
    done = command("plan", recipe_file, "--out", finished_run, "--set", "select.max_kl_nats=0.2")
    assert (done.returncode, done.stderr) == (0, "")
    said = {line.split()[0]: line for line in done.stdout.splitlines() if line[:1].strip()}
    assert "llama, from refusalkit" in said["adapter"]
    assert "candidates" in said["find"]
    assert said["done"].split(maxsplit=1)[1] == "prompts, capture, find"
    assert said["to"].endswith("select, evaluate, report")
    assert sorted(finished_run.rglob("*")) == before


def test_a_baked_run_loads_as_a_checkpoint_without_its_prompts(
    finished_run: Path, tmp_path: Path, command: Command
) -> None:
    shutil.copytree(finished_run, tmp_path / "run")
    recipe = tmp_path / "run" / "recipe.yaml"
    # As after a run whose prompt files lay beside the recipe.
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("tiny:harmful", "file:elsewhere.txt"))
    done = command("bake", "run", "--out", "baked", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "baked\n")
    assert "altered for research" in (tmp_path / "baked" / "README.md").read_text(encoding="utf-8")
    record = json.loads((tmp_path / "baked" / "refusalkit.json").read_text(encoding="utf-8"))
    assert f"{len(record['edited_parameters'])} parameters changed" in done.stderr
    direction = load_file(finished_run / "direction.safetensors")["direction"].float()
    weight = AutoModelForCausalLM.from_pretrained(tmp_path / "baked").model.layers[0].mlp.down_proj.weight
    assert (direction @ weight).abs().max() < 1e-5 * direction.norm() * weight.norm()


def test_adapters_are_listed_with_owner_claim_and_refusals(command: Command) -> None:
    done = command("adapters")
    assert done.returncode == 0
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line}
    assert "refusalkit " in lines["gpt2"]
    assert lines["gpt2"].endswith("equal to ablation      GPT2LMHeadModel")
    assert "AltUp" in lines["gemma3n"]
    assert "hidden_size_per_layer_input is not zero" in lines["gemma4"]


def test_the_adapter_of_a_model_is_checked_on_its_weights(command: Command) -> None:
    done = command("adapters", "tiny:gemma")
    assert (done.returncode, done.stderr) == (0, "")
    assert "adapter      gemma2, from refusalkit" in done.stdout
    assert "BROKEN" not in done.stdout
    done = command("adapters", "tiny:gemma", "--adapter", "gemma")
    assert done.returncode == 1
    assert "BROKEN: resid_pre + attn_out + mlp_out == resid_post" in done.stdout
