"""Prompts end where the answer starts, whatever a family's template does before it: think, date or instruct itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from refusalkit.artifacts import PromptSplits
from refusalkit.checkpoint import open_checkpoint
from refusalkit.engine.load import load
from refusalkit.errors import RunError
from refusalkit.plan import Plan
from refusalkit.plan_text import describe
from refusalkit.progress import Silent
from refusalkit.recipe import ModelSection, recipe_type
from refusalkit.registry import Registry
from refusalkit.stages.bench import Bench
from refusalkit.stages.evaluate import complete
from refusalkit.store import Store
from refusalkit.template import ChatTemplate, Thinking
from refusalkit.testing import tiny_tokenizer
from tests.conftest import Copy

USER = "{% for m in messages if m.role == 'user' %}<|im_start|> user \n {{ m.content }} <|im_end|> \n {% endfor %}"
OPEN = USER + "{{ '<|im_start|>assistant\\n' }}"
#: The hybrid models are told not to think with an empty thought, and open a thought by themselves.
QWEN3 = OPEN + "{% if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
#: The template opens the thought.
QWEN3_5 = OPEN + "{{ '<think>\\n' }}{% if not enable_thinking %}{{ '\\n</think>\\n\\n' }}{% endif %}"
DEEPSEEK_V3_1 = USER + "<｜Assistant｜>{% if thinking %}<think>{% else %}</think>{% endif %}"
DEEPSEEK_R1 = USER + "{{ '<｜Assistant｜><think>\\n' }}"
GPT_OSS = (
    "<|start|>system<|message|>Current date: {{ strftime_now('%Y-%m-%d') }}<|end|>"
    "{% for m in messages %}<|start|>user<|message|>{{ m.content }}<|end|>{% endfor %}<|start|>assistant"
)
FINAL = "<|channel|>final<|message|>"
LLAMA_3_2 = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ date_string }}\n\n{{ system }}<|eot_id|>"
    "{% for m in messages if m.role == 'user' %}{{ m.content }}<|eot_id|>{% endfor %}assistant"
)
QWEN2_5 = (
    "<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}"
    "{% else %}You are Qwen, created by Alibaba Cloud.{% endif %}<|im_end|>\n" + OPEN
)


@pytest.mark.parametrize(
    ("template", "variable", "header", "off", "on"),
    [
        (QWEN3, "enable_thinking", "", ("<think>\n\n</think>\n\n", ""), ("<think>\n\n</think>\n\n", "")),
        (QWEN3_5, "enable_thinking", "", ("<think>\n\n</think>\n\n", ""), ("<think>\n\n</think>\n\n", "<think>\n")),
        (DEEPSEEK_V3_1, "thinking", "", ("<｜Assistant｜></think>", ""), ("<｜Assistant｜><think></think>", "<think>")),
        (DEEPSEEK_R1, None, "", ("<think>\n\n</think>\n\n", ""), ("<think>\n\n</think>\n\n", "<think>\n")),
        (GPT_OSS, None, FINAL, (f"assistant{FINAL}", ""), (f"assistant{FINAL}", "<|start|>assistant")),
    ],
    ids=["qwen3", "qwen3.5", "deepseek-v3.1", "deepseek-r1", "gpt-oss"],
)
def test_a_prompt_ends_behind_a_closed_thought_and_writing_starts_before_it_only_in_the_thinking_mode(
    template: str, variable: str | None, header: str, off: tuple[str, str], on: tuple[str, str]
) -> None:
    for thinks, (end, opening) in ((False, off), (True, on)):
        options = {} if variable is None else {variable: thinks}
        made = ChatTemplate(tiny_tokenizer(template), None, options, Thinking(thinks, variable, header))
        text = made.text("Name a colour")
        assert made.thinks
        assert text.endswith(end)
        assert text.count(end) == 1
        assert made.opening("Name a colour") == text if not thinks else text.startswith(made.opening("Name a colour"))
        if opening:
            assert made.opening("Name a colour").endswith(opening)
        assert made.positions(("post_instruction",))


def test_a_template_without_thoughts_is_left_as_it_is() -> None:
    made = ChatTemplate(tiny_tokenizer())
    assert not made.thinks
    assert made.opening("w1") == made.text("w1") == made.around()[0] + "w1" + made.around()[1]
    assert made.answer((5, 6)) == (5, 6)


def test_an_answer_begins_behind_the_last_thought() -> None:
    tokenizer = tiny_tokenizer(QWEN3)
    tokenizer.add_tokens(["<think>", "</think>"])
    start, end = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    made = ChatTemplate(tokenizer, None, {"enable_thinking": True}, Thinking(True, "enable_thinking"))
    assert made.answer((start, 20, end, 21, 22)) == (21, 22)
    assert made.answer((start, 20, 21)) is None
    calm = ChatTemplate(tokenizer, None, {"enable_thinking": False}, Thinking(False, "enable_thinking"))
    assert calm.answer((20, end, 21)) == (20, end, 21)


@pytest.mark.parametrize(("template", "day"), [(LLAMA_3_2, "26 Jul 2024"), (GPT_OSS, "2024-07-26")])
def test_templates_that_ask_for_today_get_a_pinned_day(template: str, day: str) -> None:
    made = ChatTemplate(tiny_tokenizer(template))
    assert made.is_dated
    assert day in made.text("Name a colour")


def test_the_day_can_be_set() -> None:
    made = ChatTemplate(tiny_tokenizer(LLAMA_3_2), options={"date_string": "01 Jan 2026"})
    assert "Today Date: 01 Jan 2026\n" in made.text("Name a colour")


@pytest.mark.parametrize(
    ("template", "system", "found"),
    [
        (QWEN2_5, None, "You are Qwen, created by Alibaba Cloud."),
        (QWEN2_5, "Be kind", None),
        (LLAMA_3_2, None, None),
        (QWEN3, None, None),
    ],
    ids=["qwen2.5", "qwen2.5-own", "llama3.2", "drops-system"],
)
def test_the_system_prompt_that_a_template_brings_is_found(template: str, system: str | None, found: str) -> None:
    assert ChatTemplate(tiny_tokenizer(template), system).default_system() == found


@pytest.mark.parametrize(
    ("template", "adapter", "thinking", "options", "said"),
    [
        (QWEN3, "qwen3", None, {"enable_thinking": False}, "thinking  off"),
        (QWEN3, "qwen3", "true", {"enable_thinking": True}, "thinking  on"),
        (DEEPSEEK_R1, "llama", None, {}, "thinking  off"),
        (DEEPSEEK_R1, "llama", "true", {}, "thinking  on"),
        (QWEN2_5, "qwen2", None, {}, "You are Qwen, created by Alibaba Cloud."),
        (LLAMA_3_2, "llama", None, {}, "26 Jul 2024, whenever it runs"),
    ],
)
def test_the_plan_shows_what_the_template_does_by_itself(
    template: str,
    adapter: str,
    thinking: str | None,
    options: dict[str, Any],
    said: str,
    plan_of: Callable[..., Plan],
    checkpoint: Copy,
    tmp_path: Path,
) -> None:
    settings = [f"model.id={checkpoint(chat_template=template)}", f"model.adapter={adapter}"]
    made = plan_of(*settings, *([] if thinking is None else [f"prompts.thinking={thinking}"]))
    assert made.template.options == options
    assert said in describe(made, tmp_path)


def test_thoughts_that_are_longer_than_completions_are_an_error(finished_run: Path, registry: Registry) -> None:
    store = Store(finished_run)
    checkpoint = open_checkpoint(ModelSection(id="tiny:llama"), registry)
    template = ChatTemplate(checkpoint.tokenizer, thinking=Thinking(on=True, header="never written"))
    splits = store.load(PromptSplits)
    assert splits is not None
    sources = {"harmful": "tiny:harmful", "harmless": "tiny:harmless"}
    recipe = recipe_type(registry).model_validate({"name": "x", "model": {"id": "tiny:llama"}, "prompts": sources})
    with pytest.raises(RunError, match="no completion comes to an answer"):
        complete(recipe.evaluate, splits, Bench(load(checkpoint), template, Silent()))
