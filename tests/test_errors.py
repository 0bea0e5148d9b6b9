"""What cannot be used or could mean nothing is refused with what, where and one hint, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from refusalkit import tiny
from refusalkit.errors import InputError, RefusalkitError, RunError
from refusalkit.pipeline import execute
from refusalkit.plan import Plan
from tests.conftest import Copy, one_hint

PlanOf = Callable[..., Plan]


def refused(kind: type[RefusalkitError], act: Callable[[], object]) -> RefusalkitError:
    """Return the error that `act` raises, after checking what holds for every error."""
    with pytest.raises(RefusalkitError) as caught:
        act()
    error = caught.value
    assert type(error) is kind, error
    assert error.exit_status == {InputError: 2, RunError: 1}[kind]
    assert error.where
    assert one_hint(str(error).splitlines()), str(error)
    return error


def config(**changed: object) -> str:
    """Return the embedded model's configuration, changed."""
    return json.dumps({**json.loads((tiny.checkpoint("llama") / "config.json").read_text()), **changed})


# The model


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("tiny:lama", "no such embedded model", "did you mean 'tiny:llama'?"),
        ("nobody/such-model", "the configuration cannot be read", "an embedded model such as tiny:llama"),
        ("./nowhere", "there is no such folder", "an embedded model such as tiny:llama"),
        ("~nobody-of-that-name/x", "there is no such folder", "an embedded model such as tiny:llama"),
        ("recipes", "the folder has no config.json", "name a checkpoint's folder"),
    ],
)
def test_a_model_that_is_not_there(
    plan_of: PlanOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str, hint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    error = refused(InputError, lambda: plan_of(f'model.id="{name}"'))
    assert error.where == f"model.id {name!r}"
    assert message in error.message
    assert hint in str(error.hint)


@pytest.mark.parametrize(
    ("files", "message", "hint"),
    [
        ({"config": "{"}, "is not a valid JSON file", "config.json"),
        ({"config": "{}"}, "Unrecognized model", "config.json"),
        ({"config": config(model_type="zebra")}, "does not recognize this architecture", "config.json"),
        (
            {"config": config(model_type="zebra", auto_map={"AutoConfig": "configuration_zebra.Zebra"})},
            "contains custom code",
            "set `model.trust_remote_code: true`",
        ),
        ({"tokenizer": "{}"}, "the tokenizer cannot be read", "config.json"),
        ({"chat_template": None}, "the tokenizer has no chat template", "take the chat (instruct) checkpoint"),
        ({"chat_template": "{% for %}"}, "line 1 of the chat template is not Jinja", "repair the checkpoint's"),
    ],
)
def test_a_checkpoint_that_cannot_be_read(
    plan_of: PlanOf, checkpoint: Copy, files: dict[str, str | None], message: str, hint: str
) -> None:
    folder = checkpoint(**files)
    error = refused(InputError, lambda: plan_of(f"model.id={folder}"))
    assert error.where == f"model.id {str(folder)!r}"
    assert message in error.message
    assert hint in str(error.hint)


def test_an_unsupported_architecture_lists_the_known_and_how_to_add_one(plan_of: PlanOf, checkpoint: Copy) -> None:
    folder = checkpoint(config=config(architectures=["BloomForCausalLM"], model_type="bloom"))
    error = refused(InputError, lambda: plan_of(f"model.id={folder}"))
    assert error.message == "no adapter is for the architecture BloomForCausalLM"
    for known in ("LlamaForCausalLM", "Gemma2ForCausalLM", "Qwen2ForCausalLM", "docs/how-to/write-a-plugin.md"):
        assert known in str(error.hint)


def test_an_adapter_is_known_and_fits_the_model(plan_of: PlanOf) -> None:
    error = refused(InputError, lambda: plan_of("model.adapter=lama"))
    assert (error.message, error.hint) == ("no adapter is called 'lama'", "did you mean 'llama'?")
    error = refused(InputError, lambda: plan_of("model.adapter=gemma2"))
    assert "'gemma2' does not fit LlamaForCausalLM, which has no model.layers.0.post_" in error.message
    assert plan_of("model.adapter=yi").checkpoint.adapter.name == "yi"


# The chat template


NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
TURNS = "{% for m in messages if m.role == 'user' %}<|start_header_id|>{{ m.content }}<|eot_id|>{% endfor %}assistant"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (NO_SYSTEM + TURNS, "the chat template refuses this: System role not supported"),
        (TURNS, "the chat template drops the system prompt"),
    ],
)
def test_a_system_prompt_the_template_does_not_take(
    plan_of: PlanOf, checkpoint: Copy, template: str, message: str
) -> None:
    folder = checkpoint(chat_template=template)
    plan_of(f"model.id={folder}")
    error = refused(InputError, lambda: plan_of(f"model.id={folder}", "prompts.system=Be kind"))
    assert (error.where, error.message) == ("prompts.system", message)


def test_thinking_on_a_model_without_it(plan_of: PlanOf, checkpoint: Copy) -> None:
    error = refused(InputError, lambda: plan_of("prompts.thinking=true"))
    assert (error.where, error.message) == ("prompts.thinking", "the family 'llama' has no thinking mode to switch")
    folder = checkpoint()
    settings = (f"model.id={folder}", "model.adapter=qwen3", "prompts.thinking=false")
    error = refused(InputError, lambda: plan_of(*settings))
    assert error.message == "the chat template has no variable 'enable_thinking' to set"
    (folder / "chat_template.jinja").write_text(TURNS + "{% if not enable_thinking %}none{% endif %}")
    assert plan_of(*settings).template.options == {"enable_thinking": False}


def test_an_intervention_that_this_model_has_no_place_for(plan_of: PlanOf, checkpoint: Copy) -> None:
    window = "evaluate.interventions=[{intervention: conditional, apply: {intervention: steer, layers: [5, 8]}}]"
    error = refused(InputError, lambda: plan_of(window))
    assert (error.where, error.message) == ("evaluate.interventions: steer(layers=[5, 8])", "layer 8 of 8")
    folder = checkpoint(chat_template=TURNS + "{% if not enable_thinking %}none{% endif %}")
    gate = (f"model.id={folder}", "model.adapter=qwen3", "evaluate.interventions=[conditional]")
    plan_of(*gate)
    error = refused(InputError, lambda: plan_of(*gate, "prompts.thinking=true"))
    assert error.message == "its gate is read where the answer starts, and completions start with a thought"


@pytest.mark.parametrize("name", ["no_such_variable", "tokenize", "messages", "add_generation_prompt", "chat_template"])
def test_an_option_the_template_never_reads(plan_of: PlanOf, name: str) -> None:
    error = refused(InputError, lambda: plan_of(f"prompts.template_options={{{name}: true}}"))
    assert error.where == f"prompts.template_options.{name}"
    assert error.message == f"the chat template has no variable {name!r} to set"


def test_positions_by_name_need_tokens_after_the_instruction(plan_of: PlanOf, checkpoint: Copy) -> None:
    folder = checkpoint(chat_template="{{ messages[0].content }}")
    error = refused(InputError, lambda: plan_of(f"model.id={folder}"))
    assert (error.where, error.hint) == ("capture.positions", "give `capture.positions` as numbers, such as -1")
    plan = plan_of(f"model.id={folder}", "capture.positions=[-1, instruction_end]")
    assert plan.prompts.positions == (-1,)
    assert plan.template.labels((-1,)) == ("…",)


@pytest.mark.parametrize("openers", ["[]", '[""]'])
def test_openers_that_are_no_tokens(plan_of: PlanOf, openers: str) -> None:
    error = refused(InputError, lambda: plan_of(f"select.openers={openers}"))
    assert error.where == "select.openers"


# Prompts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompts"),
        (b"\xfcber\n", "byte 0 is not UTF-8"),
        (b"one\ntwo\nthree\n", "3 different prompts, but 32 are asked for (16 train + 8 validation + 8 test)"),
    ],
)
@pytest.mark.parametrize("side", ["harmful", "harmless"])
def test_a_prompt_file_that_cannot_be_used_names_the_side(
    plan_of: PlanOf, tmp_path: Path, side: str, content: bytes, message: str
) -> None:
    (tmp_path / "p.txt").write_bytes(content)
    error = refused(InputError, lambda: plan_of(f'prompts.{side}="file:p.txt"'))
    assert str(error.where).startswith(f"prompts.{side}")
    assert error.message == message


@pytest.mark.parametrize(
    ("address", "message", "hint"),
    [
        ("file:nowhere.txt", "no such file", "paths start at the recipe's folder"),
        ("p.txt", "'p.txt' names no prompt source", "such as file:p.txt"),
        ("fil:p.txt", "'fil:p.txt' names no prompt source", "did you mean 'file'?"),
        ("builtin:harmfull", "no such built-in set", "did you mean 'harmful'?"),
    ],
)
def test_an_address_without_prompts(plan_of: PlanOf, address: str, message: str, hint: str) -> None:
    error = refused(InputError, lambda: plan_of(f'prompts.harmful="{address}"'))
    assert str(error.where).startswith("prompts.harmful")
    assert error.message == message
    assert hint in str(error.hint)


def test_a_leak_is_refused_between_splits_and_between_sides(plan_of: PlanOf, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n".join(f"Say {number}" for number in range(8)), encoding="utf-8")
    split = "{train: 'file:p.txt', validation: 'tiny:harmful', test: 'file:p.txt'}"
    error = refused(InputError, lambda: plan_of(f"prompts.harmful={split}"))
    assert "'Say 0' in harmful.train and harmful.test" in error.message
    assert "(and 5 more)" in error.message
    error = refused(InputError, lambda: plan_of('prompts.harmless="tiny:harmful"'))
    assert "in harmful.train and harmless.train" in error.message


# Runs that could not mean anything


@pytest.mark.parametrize(
    ("settings", "where", "message", "hint"),
    [
        (
            ("select.openers=[Zebra]",),
            "prompts.harmful",
            "the model refuses only 0 of 16 harmful train prompts",
            "set `prompts.filter: false`",
        ),
        (
            ("select.min_induced_score=99",),
            "select",
            "induced score below 99; ",
            "lower `select.min_induced_score`",
        ),
        (("select.max_kl_nats=0",), "select", "is above 0 nats", "raise `select.max_kl_nats`"),
        (("select={selector: fixed, layer: 0}",), "select", "layer 0 is zero", "choose another place"),
        (
            ("evaluate.interventions=[{intervention: steer, scale: 1e40}]",),
            "evaluate.interventions: steer(scale=1e+40)",
            "the logits on harmful and harmless test prompts are not numbers",
            "use a smaller scale",
        ),
        (
            ("evaluate.interventions=[{intervention: steer, scale: 0}]",),
            "evaluate.interventions: steer(scale=0.0)",
            "changes nothing",
            "a scale of 0 changes nothing",
        ),
        (
            ("evaluate.interventions=[{intervention: conditional, threshold: 50}]",),
            "evaluate.interventions: conditional(threshold=50.0)",
            "changes nothing",
            "its gate opens for no test prompt",
        ),
        (
            ("evaluate.interventions=[{intervention: ablate, where: generated}]", "evaluate.metrics=[kl]"),
            "evaluate.interventions: ablate(where=generated)",
            "changes nothing",
            "it acts on generated tokens alone: measure completions",
        ),
    ],
)
def test_a_run_that_could_not_mean_anything_says_why(
    plan_of: PlanOf, tmp_path: Path, settings: tuple[str, ...], where: str, message: str, hint: str
) -> None:
    plan = plan_of(*settings)
    error = refused(RunError, lambda: execute(plan, tmp_path / "out"))
    assert error.where == where
    assert message in error.message
    assert hint in str(error.hint)
    assert not (tmp_path / "out" / "summary.json").exists()
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_nothing_survives_counts_every_reason_and_names_the_nearest_miss(plan_of: PlanOf, tmp_path: Path) -> None:
    plan = plan_of("select.min_induced_score=99")
    message = refused(RunError, lambda: execute(plan, tmp_path / "out")).message
    assert message.startswith(f"none of {plan.n_candidates} candidates survives: ")
    reasons = message[message.index(": ") + 2 : message.index(". Nearest")].split("; ")
    assert sum(int(reason.split()[0]) for reason in reasons) == plan.n_candidates
    assert "Nearest miss: position -" in message
    assert "has the highest induced score, " in message


@pytest.mark.parametrize("settings", [(), ("select.openers=[I]", "prompts.filter=false")])
def test_a_damaged_weight_is_found_at_once(
    plan_of: PlanOf, checkpoint: Copy, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    folder = checkpoint()
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.3.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    plan = plan_of(f"model.id={folder}", *settings)
    error = refused(RunError, lambda: execute(plan, tmp_path / "out"))
    assert error.message == "the model's logits on harmful train prompts are not numbers"
    assert sorted(os.listdir(tmp_path / "out")) == [".lock", "recipe.yaml"]


# Places that cannot be written


def test_an_output_folder_that_cannot_be_one(plan_of: PlanOf, tmp_path: Path) -> None:
    plan = plan_of()
    (tmp_path / "file").write_text("kept")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("kept")
    error = refused(InputError, lambda: execute(plan, tmp_path / "file"))
    assert error.message == "this is a file, not a folder"
    error = refused(InputError, lambda: execute(plan, tmp_path / "full"))
    assert error.message == "the folder is not empty and holds no run"
    error = refused(RunError, lambda: execute(plan, tmp_path / "file" / "below"))
    assert error.message == "cannot be written: Not a directory"
    error = refused(RunError, lambda: execute(plan, tmp_path / ("x" * 300)))
    assert error.message == "cannot be written: File name too long"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full", "small.yaml"]
    assert [path.read_text() for path in (tmp_path / "file", tmp_path / "full" / "notes.txt")] == ["kept", "kept"]


def test_a_full_disk_stops_the_run_and_leaves_whole_stages(recipe_file: Path) -> None:
    out = recipe_file.with_name("out")

    def little_room() -> None:
        # No file can grow past this: enough for the prompts, not for the activations.
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    line = [sys.executable, "-m", "refusalkit", "run", str(recipe_file), "--out", str(out)]
    done = subprocess.run(line, preexec_fn=little_room, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    error = done.stderr[done.stderr.index("error: ") :].splitlines()
    assert error[0] == f"error: {out / 'capture'}: cannot be written: File too large"
    assert one_hint(error)
    left = {path.name for path in out.iterdir()}
    assert left == {".lock", "recipe.yaml", "environment.json", "prompts"}


def test_a_recipe_that_cannot_be_read_in_the_folder_is_not_overwritten(plan_of: PlanOf, tmp_path: Path) -> None:
    plan = plan_of()
    execute(plan, tmp_path / "out", until="prompts")
    for content in (b"{", b"\xff"):
        (tmp_path / "out" / "recipe.yaml").write_bytes(content)
        error = refused(InputError, lambda: execute(plan, tmp_path / "out"))
        assert error.message == "cannot be read, so whose run this is cannot be known"
        assert (tmp_path / "out" / "recipe.yaml").read_bytes() == content
