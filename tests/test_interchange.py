"""What one format holds another gives back, and readers of others find what they look for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from refusalkit import algebra
from refusalkit.interchange.formats import FORMATS
from refusalkit.pipeline import execute
from refusalkit.plan import Plan
from refusalkit.run_directory import read_run
from tests.conftest import Command, one_hint
from tests.interchange import TARGETS, convert, place, random, refused, vector, write_gguf
from tests.reference import SHARED, needs_shared, read_json


@pytest.fixture(scope="module")
def direction(finished_run: Path) -> Path:
    """Give the direction that the finished run chose."""
    return finished_run / "direction.safetensors"


# There and back


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_every_format_gives_back_the_direction(kind: Any, direction: Path, tmp_path: Path) -> None:
    name, operation = TARGETS[kind.name]
    there = convert(direction, tmp_path / name, kind.name, operation=operation)
    assert (there.source.name, there.target.name) == ("refusalkit", kind.name)
    layer, position = place(direction)
    ask = {} if "layer" in kind.keeps else {"layer": layer}
    back = convert(tmp_path / name, tmp_path / "back.safetensors", **ask)
    assert back.source.name == kind.name
    before, after = vector(direction), vector(tmp_path / "back.safetensors")
    assert after.dtype == torch.float64
    if kind.name in ("glp", "lora"):
        # Of length one in the file; the length stands beside it.
        torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6 * before.abs().max().item())
    else:
        assert torch.equal(after, before if "digits" in kind.keeps else before.float().double())
    assert place(tmp_path / "back.safetensors") == (layer, position if "position" in kind.keeps else None)
    told = "\n".join(there.lost)
    assert ("digits" in told, "position" in told, "where it comes from" in told) == (
        "digits" not in kind.keeps,
        "position" not in kind.keeps,
        "provenance" not in kind.keeps,
    )


@pytest.mark.parametrize("name", ["glp", "lora", "refusalkit"])
def test_a_subspace_comes_back_as_the_subspace_it_was(name: str, tmp_path: Path) -> None:
    rows = random(2, 128)
    save_file({"direction": rows}, tmp_path / "rank2.safetensors", {"layer": "3", "model": "tiny:llama"})
    made = convert(tmp_path / "rank2.safetensors", tmp_path / TARGETS[name][0], name)
    convert(tmp_path / TARGETS[name][0], tmp_path / "back.safetensors")
    before, after = algebra.orthonormal(rows), algebra.orthonormal(vector(tmp_path / "back.safetensors"))
    torch.testing.assert_close(torch.linalg.svdvals(before @ after.T), torch.ones(2, dtype=torch.float64))
    assert ("the lengths of the rows" in made.lost) == (name != "refusalkit")


def test_a_run_in_the_layout_of_the_authors_holds_what_was_found(finished_run: Path, tmp_path: Path) -> None:
    made = convert(finished_run, tmp_path / "authors", "authors")
    assert any("ablate_random" in line for line in made.said)
    run = read_run(finished_run)
    convert(tmp_path / "authors", tmp_path / "ours", "refusalkit", model="tiny:llama")
    back = load_file(tmp_path / "ours" / "candidates.safetensors")["directions"]
    assert torch.equal(back, run.candidates.directions)
    assert torch.equal(vector(tmp_path / "ours" / "direction.safetensors"), run.choice.direction)
    scores = {(row["position"], row["layer"]): row for row in read_json(tmp_path / "ours" / "scores.json")}
    assert len(scores) == len(run.choice.scores)
    for row in run.choice.scores:
        again = scores[row.position, row.layer]
        assert [again[key] for key in ("refusal_score", "induced_score", "kl_nats")] == [
            row.refusal_score,
            row.induced_score,
            row.kl_nats,
        ]
        assert again["status"] == (
            row.status if row.status in ("chosen", "survivor") else "fell to the authors' filters"
        )


def test_the_rates_of_completions_come_back_with_their_intervals(finished_run: Path, tmp_path: Path) -> None:
    convert(finished_run, tmp_path / "authors", "authors")
    convert(tmp_path / "authors", tmp_path / "ours", "refusalkit")
    before, after = read_json(finished_run / "summary.json"), read_json(tmp_path / "ours" / "summary.json")
    assert after.keys() == before.keys()
    assert after["choice"].keys() == before["choice"].keys()
    assert after["choice"]["baseline_refusal_score"] is None
    rates = [row for row in before["evaluation"] if row["metric"] == "refusal_rate"]
    kept = [
        row
        for row in rates
        if row["intervention"] in ("none", "ablate") or (row["intervention"], row["prompts"]) == ("steer", "harmless")
    ]
    order = lambda row: (row["prompts"], row["intervention"])  # noqa: E731
    assert sorted(after["evaluation"], key=order) == sorted(kept, key=order)


def test_completions_and_what_judges_said_are_in_the_authors_form(finished_run: Path, tmp_path: Path) -> None:
    convert(finished_run, tmp_path / "authors", "authors")
    folder = tmp_path / "authors" / "completions"
    run = read_run(finished_run)
    (made,) = (g for g in run.evaluation.generated if (g.intervention, g.prompts) == ("none", "harmful"))
    rows = read_json(folder / "harmful_baseline_completions.json")
    assert rows == [
        {"category": None, "prompt": prompt, "response": text}
        for prompt, text in zip(run.prompts.of("harmful", "test"), made.texts, strict=True)
    ]
    judged = read_json(folder / "harmful_baseline_evaluations.json")
    assert made.refused is not None
    successes = [int(not refused) for refused in made.refused]
    assert [row["is_jailbreak_substring_matching"] for row in judged["completions"]] == successes
    rate = sum(successes) / len(successes)
    assert (judged["substring_matching_success_rate"], judged["substring_matching_per_category"]) == (
        rate,
        {"null": rate},
    )


def test_what_other_judges_said_is_read_and_pooled_over_data_sets(direction: Path, tmp_path: Path) -> None:
    convert(direction, tmp_path / "authors", "authors")
    run = tmp_path / "authors"
    (run / "completions").mkdir()
    layer, position = place(direction)
    scores = {"position": position, "layer": layer, "refusal_score": 1.0, "steering_score": 2.0, "kl_div_score": None}
    (run / "select_direction" / "direction_evaluations.json").write_text(json.dumps([scores]))
    for data, flags in {"jailbreakbench": (1, 1, 0), "harmbench_test": (0,)}.items():
        rows = [
            {
                "category": "a",
                "prompt": "p",
                "response": "I cannot" if not flag else "yes",
                "is_jailbreak_llamaguard2": 0,
            }
            for flag in flags
        ]
        plain = [{key: row[key] for key in ("category", "prompt", "response")} for row in rows]
        (run / "completions" / f"{data}_ablation_completions.json").write_text(json.dumps(plain))
        if data == "jailbreakbench":
            (run / "completions" / f"{data}_ablation_evaluations.json").write_text(json.dumps({"completions": rows}))
    convert(run, tmp_path / "ours", "refusalkit")
    found = {row["metric"]: (row["value"], row["n"]) for row in read_json(tmp_path / "ours/summary.json")["evaluation"]}
    # Where there are no verdicts, refusals are counted.
    assert found == {"llamaguard2_success_rate": (0.0, 3), "refusal_rate": (1.0, 1)}


@needs_shared
def test_the_published_scores_of_the_authors_are_read(tmp_path: Path) -> None:
    source = SHARED / "official_runs" / "gemma-2b-it"
    run = tmp_path / "gemma-2b-it"
    (run / "select_direction").mkdir(parents=True)
    for name in ("direction_evaluations.json", "direction_evaluations_filtered.json"):
        shutil.copy(source / name, run / "select_direction" / name)
    shutil.copy(source / "direction_metadata.json", run)
    torch.save(random(2048), run / "direction.pt")
    convert(run, tmp_path / "ours", "refusalkit", model=None)
    choice = read_json(tmp_path / "ours" / "summary.json")["choice"]
    chosen = read_json(source / "direction_evaluations_filtered.json")[0]
    assert (choice["position"], choice["layer"]) == (-2, 10) == (chosen["position"], chosen["layer"])
    assert choice["refusal_score"] == chosen["refusal_score"]
    assert choice["n_survivors"] == len(read_json(source / "direction_evaluations_filtered.json"))
    assert choice["n_candidates"] == len(read_json(source / "direction_evaluations.json"))


def test_what_is_read_can_be_read_by_a_recipe(direction: Path, tmp_path: Path) -> None:
    convert(direction, tmp_path / "x.gguf", "gguf")
    convert(tmp_path / "x.gguf", tmp_path / "x.safetensors", model="tiny:llama")
    with safe_open(direction, "pt") as ours, safe_open(tmp_path / "x.safetensors", "pt") as theirs:
        assert ours.metadata() == theirs.metadata()
        assert list(ours.keys()) == list(theirs.keys()) == ["direction"]


def test_a_recipe_finds_a_foreign_direction_at_its_layer_and_there_alone(
    tmp_path: Path, plan_of: Callable[..., Plan]
) -> None:
    row = random(128).float()
    source = write_gguf(tmp_path / "x.gguf", {"direction.4": row.numpy()})
    convert(source, tmp_path / "x.safetensors")
    plan = plan_of('find={strategy: from_file, path: "x.safetensors"}', "capture.positions=[-2, -1]")
    execute(plan, tmp_path / "run", until="find")
    found = load_file(tmp_path / "run" / "candidates.safetensors")["directions"]
    assert torch.equal(found[-1, 5], row.double())
    assert found.count_nonzero() == row.count_nonzero()


# What others read


def test_the_gguf_reader_finds_one_direction_a_block_earlier_and_never_direction_0(
    direction: Path, tmp_path: Path
) -> None:
    made = convert(direction, tmp_path / "x.gguf", "gguf")
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    (tensor,) = reader.tensors
    assert (tensor.name, tensor.tensor_type.name, list(tensor.shape)) == (
        f"direction.{place(direction)[0] - 1}",
        "F32",
        [128],
    )
    assert np.array_equal(tensor.data, vector(direction).float().numpy())
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert (fields["controlvector.model_hint"], fields["controlvector.layer_count"]) == ("llama", 1)
    assert any("cannot ablate" in line for line in made.said)


def test_the_gguf_reader_finds_a_unit_direction_in_every_block_but_the_first(direction: Path, tmp_path: Path) -> None:
    made = convert(direction, tmp_path / "x.gguf", "glp")
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert [tensor.name for tensor in reader.tensors] == [f"direction.{block}" for block in range(1, 8)]
    expected = algebra.unit(vector(direction)).float().numpy()
    assert all(np.allclose(tensor.data, expected, atol=1e-7) for tensor in reader.tensors)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert {key: value for key, value in fields.items() if key.startswith("glp.") and "sha" not in key} == {
        "glp.mode": "project",
        "glp.spec_version": 1,
        "glp.alpha_default": 1.0,
        "glp.rank": 1,
        "glp.orthonormal": True,
        "glp.hook_point": "residual_stream_post_layer",
        "glp.derived_at": "residual_stream_post_layer",
        "glp.layer_ids_zero_based": "1,2,3,4,5,6,7",
        "glp.method": "difference_in_means",
    }
    assert fields["general.base_model.0.name"] == "tiny:llama"
    assert any("would add it" in line for line in made.said)


def test_files_of_the_authors_hold_no_more_than_their_tensors(finished_run: Path, tmp_path: Path) -> None:
    convert(finished_run, tmp_path / "run", "authors")
    run = read_run(finished_run)
    for name in ("direction.pt", "generate_directions/mean_diffs.pt"):
        tensor = torch.load(tmp_path / "run" / name, weights_only=True)
        assert tensor.dtype == torch.float64
        assert tensor.untyped_storage().nbytes() == 8 * tensor.numel()
    assert read_json(tmp_path / "run" / "direction_metadata.json") == {
        "pos": run.choice.position,
        "layer": run.choice.layer,
    }


def test_a_steering_vector_has_what_its_readers_look_for(direction: Path, tmp_path: Path) -> None:
    convert(direction, tmp_path / "x.svec")
    document = read_json(tmp_path / "x.svec")
    assert document["model_type"] == "llama"
    assert document["directions"] == {str(place(direction)[0] - 1): vector(direction).tolist()}
    assert {int(key): float(value) for key, value in document["explained_variances"].items()} == {}


# What others write


def test_a_layer_of_a_foreign_control_vector_is_the_block_after(tmp_path: Path) -> None:
    rows = random(7, 128).float()
    source = write_gguf(tmp_path / "x.gguf", {f"direction.{block}": rows[block].numpy() for block in range(1, 7)})
    made = convert(source, tmp_path / "y.safetensors", layer=3)
    assert torch.equal(vector(tmp_path / "y.safetensors").float(), rows[2])
    assert "the directions of the 5 other layers" in made.lost
    refused(lambda: convert(source, tmp_path / "z.safetensors"), "6 layers: 2, 3, 4, 5, 6, 7", "--layer")
    refused(lambda: convert(source, tmp_path / "z.safetensors", layer=1), "no direction of layer 1")


def test_the_users_word_on_the_model_counts_and_is_compared(direction: Path, tmp_path: Path) -> None:
    convert(direction, tmp_path / "x.gguf", "gguf")
    made = convert(tmp_path / "x.gguf", tmp_path / "x.svec", model="tiny:yi")
    assert made.said == ()
    made = convert(tmp_path / "x.gguf", tmp_path / "y.svec", model="tiny:qwen")
    assert made.said == ("the source says that it is for 'llama', and tiny:qwen is 'qwen2'",)
    document = read_json(tmp_path / "y.svec")
    assert (document["model_type"], document["refusalkit"]["model"]) == ("qwen2", "tiny:qwen")


def test_direction_0_of_others_is_read_and_never_written(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "x.gguf", {"direction.0": random(128).float().numpy()})
    convert(source, tmp_path / "x.safetensors", model="tiny:llama")
    assert place(tmp_path / "x.safetensors") == (1, None)
    refused(lambda: convert(tmp_path / "x.safetensors", tmp_path / "y.gguf", "gguf"), "direction.0")


@pytest.mark.parametrize(
    ("name", "back"),
    [("gguf", ("resid_pre", 4)), ("svec", ("resid_pre", 4)), ("glp", ("resid_post", 3)), ("lora", ("resid_post", 3))],
)
def test_the_output_of_a_block_is_the_input_of_the_next(name: str, back: tuple[str, int], tmp_path: Path) -> None:
    about = {"layer": "3", "model": "tiny:llama", "site": "resid_post"}
    save_file({"direction": random(128)}, tmp_path / "x.safetensors", about)
    target = tmp_path / TARGETS[name][0].replace("x", "y")
    convert(tmp_path / "x.safetensors", target, name)
    convert(target, tmp_path / "z.safetensors")
    with safe_open(tmp_path / "z.safetensors", "pt") as file:
        assert (file.metadata()["site"], int(file.metadata()["layer"])) == back


def test_the_strength_of_a_projection_is_left_out_and_said(tmp_path: Path) -> None:
    unit = algebra.unit(random(128)).float().numpy()
    fields = {"glp__mode": "project", "glp__hook_point": "ffn_out_pre_residual", "glp__dir_scales": "4.0"}
    source = write_gguf(tmp_path / "x.gguf", {"direction.3": unit}, glp__spec_version=2, **fields)  # type: ignore[arg-type]
    made = convert(source, tmp_path / "x.safetensors")
    assert any("glp.dir_scales 4.0" in line for line in made.lost)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert (file.metadata()["site"], file.metadata()["layer"]) == ("mlp_out", "3")


def test_rows_of_candidates_are_chosen_by_position_and_layer(finished_run: Path, tmp_path: Path) -> None:
    source = finished_run / "candidates.safetensors"
    directions = load_file(source)["directions"]
    convert(source, tmp_path / "x.safetensors", position=-2, layer=4)
    assert torch.equal(vector(tmp_path / "x.safetensors"), directions[-2, 4])
    assert place(tmp_path / "x.safetensors") == (4, -2)
    convert(finished_run, tmp_path / "authors", "authors")
    diffs = tmp_path / "authors" / "generate_directions" / "mean_diffs.pt"
    convert(diffs, tmp_path / "y.safetensors", position=-2, layer=4)
    assert torch.equal(vector(tmp_path / "y.safetensors"), directions[-2, 4])
    for wanted in ({"layer": 4}, {"position": -2}, {"position": -9, "layer": 4}, {"position": -2, "layer": 99}):
        refused(lambda wanted=wanted: convert(source, tmp_path / "z.safetensors", **wanted))  # type: ignore[misc]
        refused(lambda wanted=wanted: convert(diffs, tmp_path / "z.safetensors", **wanted))  # type: ignore[misc]


def test_scaling_is_kept_where_the_format_has_a_place_for_it_and_multiplied_in_elsewhere(
    direction: Path, tmp_path: Path
) -> None:
    convert(direction, tmp_path / "x.pt", "steered", operation="steer", scale=-2.0)
    (step,) = torch.load(tmp_path / "x.pt", weights_only=True).values()
    assert step["steering_coefficient"] == -2.0
    convert(tmp_path / "x.pt", tmp_path / "x.gguf", "gguf", model="tiny:llama")
    (tensor,) = gguf.GGUFReader(tmp_path / "x.gguf").tensors
    assert np.array_equal(tensor.data, -2 * vector(direction).float().numpy())
    refused(lambda: convert(direction, tmp_path / "y", "lora", scale=2.0), "no scale")


# The command


def test_the_command_prints_the_target_alone_and_says_what_is_lost(
    direction: Path, tmp_path: Path, command: Command
) -> None:
    done = command("convert", direction, "x.gguf", "--to", "gguf", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "x.gguf\n")
    assert done.stderr.startswith("refusalkit -> gguf\n")
    assert "not in gguf: digits beyond float32\n" in done.stderr
    done = command("convert", "x.gguf", "y.gguf", "--to", "glp", "--as", "ablate", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = command("convert", "y.gguf", "z.gguf", "--to", "gguf", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert one_hint(done.stderr.splitlines())
