"""What a format cannot say is refused, and so are broken files and those that cannot be meant."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from refusalkit import algebra
from refusalkit.interchange.content import Operation
from refusalkit.interchange.formats import NAMES
from tests.interchange import TARGETS, convert, random, refused, write_gguf
from tests.reference import read_json


@pytest.fixture(scope="module")
def direction(finished_run: Path) -> Path:
    """Give the direction that the finished run chose."""
    return finished_run / "direction.safetensors"


# What cannot be said


def test_ablation_does_not_turn_into_addition_by_accident(direction: Path, tmp_path: Path) -> None:
    convert(direction, tmp_path / "glp.gguf", "glp")
    for source, wanted in ((direction, {"operation": "ablate"}), (tmp_path / "glp.gguf", {})):
        refused(lambda s=source, w=wanted: convert(s, tmp_path / "x.gguf", "gguf", **w), "cannot say 'ablate'")  # type: ignore[misc]
    convert(direction, tmp_path / "add.gguf", "gguf")
    refused(lambda: convert(tmp_path / "add.gguf", tmp_path / "x.gguf", "glp"), "cannot say 'steer'")
    refused(lambda: convert(tmp_path / "add.gguf", tmp_path / "x", "lora"), "cannot say 'steer'")
    assert not (tmp_path / "x.gguf").exists()
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("name", "lowest"), [("gguf", 2), ("svec", 1), ("steered", 1), ("authors", 0), ("glp", 0), ("lora", 0)]
)
def test_the_first_layers_are_refused_where_no_output_is_their_input(name: str, lowest: int, tmp_path: Path) -> None:
    operation = "ablate" if name in ("glp", "lora") else "steer"
    for layer in range(3):
        source = tmp_path / f"{layer}.safetensors"
        about = {"layer": str(layer), "position": "-1", "model": "tiny:llama"}
        save_file({"direction": random(128)}, source, about)
        target = (tmp_path / f"{layer}").with_suffix(Path(TARGETS[name][0]).suffix)
        target = target if target.suffix else tmp_path / f"folder-{layer}"
        if layer < lowest:
            refused(lambda s=source, t=target: convert(s, t, name, operation=operation), str(layer))  # type: ignore[misc]
        else:
            convert(source, target, name, operation=operation)


@pytest.mark.parametrize("name", ["authors", "gguf", "steered", "svec"])
def test_a_subspace_is_refused_where_there_is_room_for_one_direction(name: str, tmp_path: Path) -> None:
    save_file({"direction": random(3, 128)}, tmp_path / "x.safetensors", {"layer": "3", "model": "tiny:llama"})
    target = tmp_path / ("y" + Path(TARGETS[name][0]).suffix)
    refused(
        lambda: convert(tmp_path / "x.safetensors", target, name, operation="ablate"), "rank 3", "refusalkit, glp, lora"
    )


@pytest.mark.parametrize(
    ("about", "name", "words"),
    [
        ({}, "authors", ("names a position and a layer", "--position")),
        ({"layer": "4", "model": "tiny:llama", "site": "mlp_out"}, "gguf", ("mlp_out", "capture.site")),
        ({"layer": "4", "model": "tiny:llama", "site": "mlp_out", "position": "-1"}, "authors", ("mlp_out",)),
        ({"model": "tiny:llama"}, "gguf", ("layer", "--layer")),
        ({}, "refusalkit", ("layer", "--layer")),
        ({"layer": "4"}, "gguf", ("model", "--model")),
        ({"layer": "4"}, "lora", ("model", "--model")),
        ({"layer": "4", "model": "tiny:gemma"}, "lora", ("equals ablation", "norm", "--to steered")),
        ({"layer": "8", "model": "tiny:llama"}, "gguf", ("layer 8", "8 blocks")),
        ({"layer": "4", "model": "tiny:lama"}, "gguf", ("tiny:llama",)),
        ({"layer": "four"}, "refusalkit", ("four",)),
        ({"layer": "4", "site": "mlp"}, "refusalkit", ("mlp",)),
    ],
)
def test_what_is_not_known_is_asked_for(
    about: dict[str, str], name: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    save_file({"direction": random(128)}, tmp_path / "x.safetensors", about)
    target = tmp_path / ("y" + Path(TARGETS[name][0]).suffix)
    refused(lambda: convert(tmp_path / "x.safetensors", target, name), *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.safetensors"]


def test_positions_that_are_not_the_last_are_refused(finished_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    artifact = run / "find" / "artifact.json"
    document = read_json(artifact)
    document["value"]["positions"][0] = -9
    artifact.write_text(json.dumps(document))
    refused(lambda: convert(run, tmp_path / "x", "authors"), "(-9, -4, -3, -2, -1)", "direction.safetensors")
    convert(run / "direction.safetensors", tmp_path / "x", "authors")
    assert not (tmp_path / "x" / "generate_directions" / "mean_diffs.pt").exists()


@pytest.mark.parametrize("operation", ["ablate", None])
def test_a_direction_of_another_width_is_refused(operation: Operation | None, tmp_path: Path) -> None:
    save_file({"direction": random(64)}, tmp_path / "x.safetensors", {"layer": "4"})
    for target, name in (("y.gguf", "glp"), ("y", "lora"), ("y.safetensors", None)):
        refused(
            lambda t=target, n=name: convert(  # type: ignore[misc]
                tmp_path / "x.safetensors", tmp_path / t, n, operation=operation, model="tiny:llama"
            ),
            "64 numbers",
            "128 wide",
        )


def test_nothing_is_overwritten_and_names_decide_where_they_can(direction: Path, tmp_path: Path) -> None:
    (tmp_path / "x.svec").write_text("mine")
    refused(lambda: convert(direction, tmp_path / "x.svec"), "there already")
    assert (tmp_path / "x.svec").read_text() == "mine"
    refused(lambda: convert(direction, tmp_path / "x.gguf"), "gguf, glp", "--to")
    refused(lambda: convert(direction, tmp_path / "x.pt"), "authors, steered", "--to")
    refused(lambda: convert(direction, tmp_path / "x"), "refusalkit, authors, lora", "--to")
    # A point does not make a file.
    refused(lambda: convert(direction, tmp_path / "llama-3.1"), "a folder may be one of refusalkit, authors, lora")
    refused(lambda: convert(direction, tmp_path / "x.gguf", "lora"), "lora is a folder")
    refused(lambda: convert(direction, tmp_path / "x.bin", "gguf"), "gguf is a file that ends in .gguf")
    refused(lambda: convert(direction, tmp_path / "x.gguf", "ggf"), "did you mean 'gguf'?")
    refused(lambda: convert(direction, tmp_path / "x.pt", "steered"), "--as ablate or --as steer")
    refused(lambda: convert(tmp_path / "nowhere", tmp_path / "y.svec"), "not there")
    refused(lambda: convert(direction.parent, tmp_path / "copy", "refusalkit"), "is refusalkit already")
    refused(lambda: convert(direction, tmp_path / "no" / "x.svec"), "folder that is not there")
    (tmp_path / "x.txt").write_text("hello")
    refused(lambda: convert(tmp_path / "x.txt", tmp_path / "y.svec"), "none of the known formats", ", ".join(NAMES))
    refused(lambda: convert(direction, tmp_path / "y.svec", layer=99), "its layer is ", "not 99")


def test_gguf_files_need_a_package_that_is_named(
    direction: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(lambda: convert(direction, tmp_path / "x.gguf", "gguf"), "pip install 'refusalkit[gguf]'")
    (tmp_path / "y.gguf").write_bytes(b"GGUF")
    refused(lambda: convert(tmp_path / "y.gguf", tmp_path / "x.svec"), "pip install 'refusalkit[gguf]'")


# Broken files


@pytest.mark.parametrize("name", [*TARGETS, "mean_diffs"])
def test_a_file_that_ends_early_is_an_error_and_nothing_else(name: str, finished_run: Path, tmp_path: Path) -> None:
    if name == "mean_diffs":
        convert(finished_run, tmp_path / "run", "authors")
        whole = tmp_path / "run" / "generate_directions" / "mean_diffs.pt"
    else:
        ends, operation = TARGETS[name]
        whole = tmp_path / ends
        convert(finished_run / "direction.safetensors", whole, name, operation=operation)
        whole = {"authors": whole / "direction.pt", "lora": whole / "adapter_model.safetensors"}.get(name, whole)
    payload = whole.read_bytes()
    source = whole.parent if name == "lora" else whole
    for share in (0, 1, 3, 17, 50, 90, 99):
        whole.write_bytes(payload[: len(payload) * share // 100])
        refused(lambda: convert(source, tmp_path / "y.safetensors", layer=4, position=-1))
    assert not (tmp_path / "y.safetensors").exists()


@pytest.mark.parametrize(
    ("tensors", "fields", "words"),
    [
        ({"direction.1": np.ones(8, np.float16)}, {}, ("direction.1 is F16",)),
        ({"direction.1": np.ones((2, 4), np.float32)}, {}, ("[2, 4]",)),
        ({"direction.one": np.ones(8, np.float32)}, {}, ("direction.one",)),
        ({"token_embd.weight": np.ones((2, 4), np.float32)}, {}, ("token_embd.weight",)),
        ({"direction.1": np.ones(8, np.float32), "direction.2": np.ones(4, np.float32)}, {}, ("differ in length",)),
        ({"direction.1": np.full(8, np.nan, np.float32)}, {}, ("not finite",)),
        ({"direction.1": np.zeros(8, np.float32)}, {}, ("zero",)),
        ({"direction.1": np.ones(8, np.float32), "direction.1.1": np.ones(8, np.float32)}, {}, ("several",)),
        ({"direction.1": np.ones(8, np.float32)}, {"glp__mode": "rotate"}, ("'rotate'",)),
        ({"direction.1": np.ones(8, np.float32)}, {"glp__mode": "project"}, ("spec_version",)),
    ],
)
def test_control_vectors_that_cannot_be_meant_are_refused(
    tensors: dict[str, Any], fields: dict[str, str], words: tuple[str, ...], tmp_path: Path
) -> None:
    source = write_gguf(tmp_path / "x.gguf", tensors, **fields)
    refused(lambda: convert(source, tmp_path / "y.safetensors"), *words)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"glp__spec_version": 3}, ("spec_version",)),
        ({"glp__hook_point": "compressed_kv"}, ("compressed_kv",)),
        ({"glp__layer_ids_zero_based": "2,3"}, ("2,3",)),
        ({"glp__content_sha256": "0" * 64}, ("content_sha256",)),
    ],
)
def test_projections_that_readers_must_refuse_are_refused(
    changed: dict[str, Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    unit = algebra.unit(random(8)).float().numpy()
    right = {"glp__mode": "project", "glp__spec_version": 1, "glp__hook_point": "residual_stream_post_layer"}
    convert(write_gguf(tmp_path / "x.gguf", {"direction.1": unit}, **right), tmp_path / "x.safetensors")  # type: ignore[arg-type]
    wrong = write_gguf(tmp_path / "y.gguf", {"direction.1": unit}, **{**right, **changed})
    refused(lambda: convert(wrong, tmp_path / "y.safetensors"), *words)
    longer = write_gguf(tmp_path / "z.gguf", {"direction.1": 2 * unit}, **right)  # type: ignore[arg-type]
    refused(lambda: convert(longer, tmp_path / "y.safetensors"), "not orthonormal")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.ones(2, 3), ("[2, 3]",)),
        (torch.ones(8, dtype=torch.int64), ("int64", "floating point")),
        (torch.full((8,), torch.inf), ("not finite",)),
        ([1, 2], ("none of the known formats",)),
        ({}, ("no steps",)),
        ({"layers.3": 1}, ("no steering_vector",)),
        ({"layers.3": {"steering_vector": torch.ones(8), "action": "spin"}}, ("'spin'",)),
        ({"layers.3": {"steering_vector": torch.ones(2, 4), "action": "add"}}, ("[2, 4]",)),
        ({"layers.3.mlp": {"steering_vector": torch.ones(8), "action": "add"}}, ("layers.3.mlp", "outputs of blocks")),
        ({"layers.3.mlp.experts.1": {"steering_vector": torch.ones(8), "action": "add"}}, ("outputs of blocks",)),
        (
            {"layers.3": {"steering_vector": torch.ones(8), "action": "add", "steering_coefficient": torch.nan}},
            ("coefficient nan",),
        ),
        ({"layers.3": {"steering_vector": torch.ones(8), "action": "clamp"}}, ("clamps to 1.0",)),
        ({"layers.3": {"steering_vector": torch.ones(8), "action": "add", "bias": torch.ones(8)}}, ("bias",)),
        (
            {
                "layers.3": {"steering_vector": torch.ones(8), "action": "add"},
                "layers.4": {"steering_vector": torch.ones(8), "action": "clamp", "steering_coefficient": 0},
            },
            ("add and clamp",),
        ),
        (
            {
                f"layers.{n}": {"steering_vector": torch.eye(8)[n], "action": "clamp", "steering_coefficient": 0.0}
                for n in (3, 4)
            },
            ("another direction at layers.4",),
        ),
    ],
)
def test_torch_files_that_cannot_be_meant_are_refused(value: Any, words: tuple[str, ...], tmp_path: Path) -> None:
    torch.save(value, tmp_path / "x.pt")
    refused(lambda: convert(tmp_path / "x.pt", tmp_path / "y.safetensors", layer=4), *words)


class Trap:
    """Run something when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_code_in_a_file_of_others_is_never_run(tmp_path: Path) -> None:
    torch.save({"layers.3": {"steering_vector": Trap(tmp_path / "sprung")}}, tmp_path / "x.pt")
    refused(lambda: convert(tmp_path / "x.pt", tmp_path / "y.safetensors"), "never loaded")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ("cannot be read",)),
        ("[]", ("holds list",)),
        ("{}", ("directions",)),
        ('{"model_type": "llama", "directions": {"a": [1.0]}}', ("'a'",)),
        ('{"model_type": "llama", "directions": {"3": ["a"]}}', ("ValueError",)),
        ('{"model_type": "llama", "directions": {"3": [[1.0, 2.0], [3.0, 4.0]]}}', ("2 rows", "does not say")),
        ('{"model_type": "llama", "directions": {"3": [0.0, 0.0]}}', ("zero",)),
        ('{"model_type": "llama", "directions": {"3": [1.0], "4": [1.0]}}', ("2 layers: 4, 5",)),
    ],
)
def test_steering_vectors_that_cannot_be_meant_are_refused(text: str, words: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "x.svec").write_text(text)
    refused(lambda: convert(tmp_path / "x.svec", tmp_path / "y.safetensors"), *words)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("direction_metadata.json", "{}", ("pos, layer",)),
        ("direction_metadata.json", "[]", ("holds list",)),
        ("select_direction/direction_evaluations.json", "[{}]", ("KeyError",)),
        ("select_direction/direction_evaluations.json", "[]", ("which direction_metadata.json names",)),
        ("completions/harmful_baseline_evaluations.json", "{}", ("KeyError",)),
        ("completions/harmful_spin_completions.json", "[]", ("'spin'", "ablation, actadd, baseline")),
        ("generate_directions/mean_diffs.pt", "x", ("cannot be read",)),
    ],
)
def test_a_broken_run_of_the_authors_is_refused(
    name: str, text: str, words: tuple[str, ...], finished_run: Path, tmp_path: Path
) -> None:
    convert(finished_run, tmp_path / "run", "authors")
    (tmp_path / "run" / name).write_text(text)
    refused(lambda: convert(tmp_path / "run", tmp_path / "y", "refusalkit"), *words)
