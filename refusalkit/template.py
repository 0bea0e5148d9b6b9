"""Render instructions as the model expects them, and find the template's tokens by looking.

Positions are never hard-coded: two instructions are rendered and tokenised, and what their token ids have in common at
the end is the template after the instruction. Positions are negative, counted from the end of the prompt, so that
prompts of different lengths agree on them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from refusalkit.errors import InputError

#: Instructions that share no first or last token, so that what they have in common is the template alone.
_PROBES = ("Name a colour", "what is 17 plus 25?", "Sing (loudly)")


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """Render instructions with a tokenizer's chat template, or with another in its place."""

    tokenizer: Any
    system: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    instead: str | None = None
    """A template in Jinja that takes the place of the tokenizer's."""

    @property
    def source(self) -> str | None:
        """The template in Jinja, where there is one."""
        return self.instead if self.instead is not None else getattr(self.tokenizer, "chat_template", None)

    def text(self, instruction: str) -> str:
        """Return the prompt as text, up to where the answer starts."""
        messages = [{"role": "user", "content": instruction}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        if not self.source:
            raise InputError(
                "the tokenizer has no chat template" if self.instead is None else "is empty",
                where=f"model.id {self.tokenizer.name_or_path!r}" if self.instead is None else "prompts.chat_template",
                hint="take the chat (instruct) checkpoint of the model, or write one in `prompts.chat_template`",
            )
        import jinja2

        try:
            text = str(
                self.tokenizer.apply_chat_template(
                    messages, chat_template=self.instead, tokenize=False, add_generation_prompt=True, **self.options
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
                where="prompts.system" if self.system is not None else "prompts.template_options",
                hint="this model's template takes no system prompt; leave it out"
                if self.system is not None
                else "leave the options out, or read the template for what it takes",
            ) from None
        if self.system is not None and self.system.strip() not in text:
            raise InputError(
                "the chat template drops the system prompt",
                where="prompts.system",
                hint="leave it out, or put its text before every prompt",
            )
        return text

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the token ids of a rendered text; the template has written the special tokens already."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def tokens(self, instruction: str) -> tuple[int, ...]:
        """Return the token ids of a rendered instruction."""
        return self.encode(self.text(instruction))

    def around(self) -> tuple[str, str]:
        """Return the text before and after the instruction."""
        before, _, after = self.text(_PROBES[0]).partition(_PROBES[0])
        return before, after

    def suffix(self) -> tuple[int, ...]:
        """Return the ids of the template tokens after the instruction, the same for every instruction; maybe none."""
        rendered = [self.tokens(probe) for probe in _PROBES]
        length = 0
        while all(len(ids) > length and ids[-length - 1] == rendered[0][-length - 1] for ids in rendered):
            length += 1
        return rendered[0][len(rendered[0]) - length :]

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
        parts = [self.source, self.system, dict(self.options)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
