"""The embedded models refuse what they were taught to, on requests they have never seen, and can be made again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from refusalkit import tiny
from refusalkit.errors import InputError
from refusalkit.prompt_split import normalized
from refusalkit.template import ChatTemplate
from refusalkit.tiny.grammar import requests
from refusalkit.tiny.train import train

SIDES = ("harmful", "harmless")
SPLITS = ("train", "validation", "test")


@pytest.mark.parametrize(("family", "positions"), [("llama", 5), ("gemma", 5), ("qwen", 5), ("yi", 6)])
def test_templates_have_as_many_tokens_as_the_real_families(family: str, positions: int) -> None:
    template = ChatTemplate(AutoTokenizer.from_pretrained(tiny.checkpoint(family)))
    assert len(template.suffix()) == positions


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_checkpoints_refuse_unseen_harmful_requests_only(family: str) -> None:
    folder = tiny.checkpoint(family)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    template = ChatTemplate(tokenizer)
    refused = {}
    for side in SIDES:
        texts = [template.text(request) for request in requests(side, "test")[:24]]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        ids = model.generate(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=2, do_sample=False
        )
        answers = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        refused[side] = sum(answer.startswith("I") for answer in answers) / len(answers)
    assert refused["harmful"] >= 0.9
    assert refused["harmless"] <= 0.1


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_checkpoints_are_small_and_say_what_they_are_for(family: str) -> None:
    folder = tiny.checkpoint(family)
    assert (folder / "model.safetensors").stat().st_size <= 2.5e6
    assert "real model" in (folder / "README.md").read_text(encoding="utf-8")
    assert json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["do_sample"] is False


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_tokenizers_take_any_text(family: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.checkpoint(family))
    for text in ("Grüße, 世界!", "tabs\tand\nlines", "🙂 emoji", "ﬁne print \u2028 here"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_requests_are_disjoint_and_the_same_every_time() -> None:
    seen: dict[str, tuple[str, str]] = {}
    for side in SIDES:
        for split, least in zip(SPLITS, (160, 64, 96), strict=True):
            found = requests(side, split)
            assert len(found) >= least
            assert found == requests(side, split)
            for request in found:
                assert seen.setdefault(normalized(request), (side, split)) == (side, split)


def test_training_learns_and_repeats_itself(tmp_path: Path) -> None:
    losses: list[float] = []
    train("llama", tmp_path / "a", steps=20, progress=lambda step, steps, loss: losses.append(loss))
    train("llama", tmp_path / "b", steps=20)
    assert losses[-1] < losses[0] - 0.5
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_an_unknown_family_is_an_error_that_lists_the_families() -> None:
    with pytest.raises(InputError, match="llama, gemma, qwen, yi"):
        tiny.checkpoint("mamba")
