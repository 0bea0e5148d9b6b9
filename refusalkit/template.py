"""Render instructions as the model expects them, and find the template's tokens by looking.

Positions are never hard-coded: two instructions are rendered and tokenised, and what their token ids have in common at
the end is the template after the instruction. Positions are negative, counted from the end of the prompt, so that
prompts of different lengths agree on them.

A prompt ends where the answer starts. Where a model thinks first, that is behind a thought which is closed and empty:
what a thinking model writes next says nothing of whether it will refuse.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from refusalkit.errors import InputError

#: Instructions that share no first or last token, so that what they have in common is the template alone.
_PROBES = ("Name a colour", "what is 17 plus 25?", "Sing (loudly)")
#: Templates that ask for today get this day (which Llama's own falls back to), so that a run can be repeated.
PINNED = datetime.date(2024, 7, 26)
#: transformers hands templates a clock; a macro of its name goes before it.
_PINNING = "{{% macro strftime_now(format) %}}{{{{ format{} }}}}{{% endmacro %}}".format(
    "".join(f" | replace('%{code}', '{PINNED.strftime('%' + code)}')" for code in "aAbBdHjmMSyY")
)
_THOUGHT, _THOUGHT_END = "<think>", "</think>"
#: An instruction, or a conversation that ends with the user's turn: messages with `role` and `content`.
Prompt = str | Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Thinking:
    """Say how a model thinks before it answers, and whether it is let."""

    on: bool = False
    variable: str | None = None
    """The chat-template variable that switches it."""
    header: str = ""
    """What stands between a thought and the answer in families that mark the answer, not the thought (GPT-OSS)."""


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """Render instructions with a tokenizer's chat template, or with another in its place."""

    tokenizer: Any
    system: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    thinking: Thinking = Thinking()
    instead: str | None = None
    """A template in Jinja that takes the place of the tokenizer's."""

    @property
    def source(self) -> str | None:
        """The template in Jinja, where there is one."""
        return self.instead if self.instead is not None else getattr(self.tokenizer, "chat_template", None)

    def text(self, instruction: Prompt) -> str:
        """Return the prompt as text, up to where the answer starts: a thought before it is closed and empty."""
        rendered = self._rendered(instruction, self.options)
        return rendered + self._no_thought(rendered, instruction)

    def opening(self, instruction: str) -> str:
        """Return the prompt up to where the model writes: before its thought where it thinks, else as `text`."""
        return self._rendered(instruction, self.options) if self.thinking.on else self.text(instruction)

    @property
    def thinks(self) -> bool:
        """Whether the model thinks before it answers unless the prompt closes the thought."""
        tail = self._rendered(_PROBES[0], self.options).rpartition(_PROBES[0])[2]
        return bool(self.thinking.variable or self.thinking.header or _is_open(tail))

    def _no_thought(self, rendered: str, instruction: Prompt) -> str:
        """Return what closes the thought that `rendered` opens, or lets the model open."""
        last = instruction if isinstance(instruction, str) else instruction[-1]["content"]
        # Templates may take the white space around a text away.
        tail = rendered.rpartition(last.strip())[2]
        if self.thinking.header:
            return "" if tail.endswith(self.thinking.header) else self.thinking.header
        if _is_open(tail):
            return f"\n{_THOUGHT_END}\n\n" if tail.endswith("\n") else _THOUGHT_END
        if self.thinking.on and self.thinking.variable:
            # The model opens the thought itself; the template writes an empty one when it is told not to think.
            closed = self._rendered(instruction, {**self.options, self.thinking.variable: False})
            return closed.removeprefix(rendered) if closed.startswith(rendered) else ""
        return ""

    def answer(self, completion: Sequence[int]) -> tuple[int, ...] | None:
        """Return the part of a completion of `opening` that is the answer, or None where the thought does not end."""
        if not (self.thinking.on and self.thinks):
            return tuple(completion)
        end = self.encode(self.thinking.header or _THOUGHT_END)
        starts = [place for place in range(len(completion)) if tuple(completion[place : place + len(end)]) == end]
        return tuple(completion[starts[-1] + len(end) :]) if starts else None

    def default_system(self) -> str | None:
        """Return the system prompt that the template puts in by itself, found by putting in another."""
        probe = dataclasses.replace(self, system=_PROBES[1])
        try:
            before, _, after = probe.around()[0].partition(_PROBES[1])
        except InputError:
            return None
        found = self.around()[0]
        if self.system is not None or not (found.startswith(before) and found.endswith(after)):
            return None
        return found[len(before) : len(found) - len(after)].strip() or None

    @property
    def is_dated(self) -> bool:
        """Whether the template asks what day it is."""
        return "strftime_now" in str(self.source)

    def _rendered(self, instruction: Prompt, options: Mapping[str, Any]) -> str:
        messages = (
            [{"role": "user", "content": instruction}]
            if isinstance(instruction, str)
            else [dict(message) for message in instruction]
        )
        if self.system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system})
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        if not self.source:
            raise InputError(
                "the tokenizer has no chat template" if self.instead is None else "is empty",
                where=f"model.id {self.tokenizer.name_or_path!r}" if self.instead is None else "prompts.chat_template",
                hint="take the chat (instruct) checkpoint of the model, or write one in `prompts.chat_template`",
            )
        import jinja2

        try:
            source = self.instead
            if self.is_dated:
                source = _PINNING + self.tokenizer.get_chat_template(self.instead)
            text = str(
                self.tokenizer.apply_chat_template(
                    messages, chat_template=source, tokenize=False, add_generation_prompt=True, **options
                )
            )
        except jinja2.TemplateSyntaxError as error:
            raise InputError(
                f"line {error.lineno} of the chat template is not Jinja: {error}",
                where="prompts.chat_template" if self.instead else f"model.id {self.tokenizer.name_or_path!r}",
                hint="correct it"
                if self.instead
                else "repair the checkpoint's chat_template.jinja, or download it again",
            ) from None
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise InputError(
                f"the chat template refuses this: {error}",
                where="prompts.system" if system is not None else "prompts.template_options",
                hint="this model's template takes no system prompt; leave it out"
                if system is not None
                else "leave the options out, or read the template for what it takes",
            ) from None
        if system is not None and system.strip() not in text:
            raise InputError(
                "the chat template drops the system prompt",
                where="prompts.system",
                hint="leave it out, or put its text before every prompt",
            )
        return text

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the token ids of a rendered text; the template has written the special tokens already."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def tokens(self, instruction: Prompt) -> tuple[int, ...]:
        """Return the token ids of a rendered instruction or conversation."""
        return self.encode(self.text(instruction))

    def plain(self, text: str) -> tuple[int, ...]:
        """Return the token ids of a text that no template goes around, with what the tokenizer puts before any text."""
        return tuple(self.tokenizer(text, verbose=False)["input_ids"])

    def answered(self, instruction: str, answer: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the token ids of a rendered instruction, and those of an answer that follows it.

        They are tokenised as one text: a token that the end of the prompt and the answer share belongs to the answer.
        """
        prompt = self.text(instruction)
        alone, whole = self.encode(prompt), self.encode(prompt + answer)
        shared = _in_common([alone, whole])
        return shared, whole[len(shared) :]

    def around(self) -> tuple[str, str]:
        """Return the text before and after the instruction."""
        before, _, after = self.text(_PROBES[0]).partition(_PROBES[0])
        return before, after

    def suffix(self) -> tuple[int, ...]:
        """Return the ids of the template tokens after the instruction, the same for every instruction; maybe none."""
        return _in_common([self.tokens(probe)[::-1] for probe in _PROBES])[::-1]

    def prefix(self) -> tuple[int, ...]:
        """Return the ids of the template tokens before the instruction, in the same way."""
        return _in_common([self.tokens(probe) for probe in _PROBES])

    def positions(self, wanted: Sequence[str | int]) -> tuple[int, ...]:
        """Resolve position names and numbers to ascending negative positions.

        Raises `InputError` for `post_instruction` when prompts have no token in common at the end.
        """
        length = len(self.suffix())
        if length == 0 and "post_instruction" in wanted:
            raise InputError(
                "the chat template puts no token after the instruction",
                where="capture.positions",
                hint="give `capture.positions` as numbers, such as -1",
            )
        found: set[int] = set()
        for item in wanted:
            if item == "post_instruction":
                found.update(range(-length, 0))
            elif item == "instruction_end":
                found.add(-length - 1)
            else:
                found.add(int(item))
        return tuple(sorted(found))

    def labels(self, positions: Sequence[int]) -> tuple[str, ...]:
        """Return the token at each position, or `…` where it differs from prompt to prompt."""
        suffix = self.suffix()
        return tuple(
            self.tokenizer.decode([suffix[position]]) if -position <= len(suffix) else "…" for position in positions
        )

    def opener_ids(self, openers: Sequence[str | int]) -> tuple[int, ...]:
        """Return the first token id of each opener as it is written at the start of an answer, without repeats.

        A number is a token id already. Raises `InputError` for one the tokenizer does not have.
        """
        text = self.text(_PROBES[0])
        prompt = self.encode(text)
        ids: list[int] = []
        for opener in openers:
            if isinstance(opener, int):
                self._check_known(opener)
                ids.append(opener)
                continue
            full = self.encode(text + opener)
            if full[: len(prompt)] != prompt or len(full) == len(prompt):
                raise InputError(
                    f"the opener {opener!r} merges with the end of the prompt in this tokenizer",
                    where="select.openers",
                    hint="write the opener without leading white space, or give the token's id",
                )
            ids.append(full[len(prompt)])
        return tuple(dict.fromkeys(ids))

    def _check_known(self, token: int) -> None:
        if token >= len(self.tokenizer):
            raise InputError(
                f"there is no token {token}", where="select.openers", hint=f"ids are below {len(self.tokenizer)}"
            )

    def digest(self) -> str:
        """Return a hash of everything that decides how an instruction is rendered."""
        parts: list[Any] = [self.source, self.system, dict(self.options), dataclasses.astuple(self.thinking)]
        if self.is_dated:
            parts.append(PINNED)
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _in_common(rendered: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return what token sequences begin with, all of them."""
    length = 0
    while all(len(ids) > length and ids[length] == rendered[0][length] for ids in rendered):
        length += 1
    return rendered[0][:length]


def _is_open(text: str) -> bool:
    return _THOUGHT in text and _THOUGHT_END not in text.rpartition(_THOUGHT)[2]
