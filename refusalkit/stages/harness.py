"""Let EleutherAI's lm-evaluation-harness ask an engine, so that its tasks measure a model under an intervention.

The tasks, their prompts, filters and scores are the harness's own; here are the answers it asks a model for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lm_eval
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from refusalkit.engine.engine import Engine
from refusalkit.engine.remote import RemoteEngine
from refusalkit.engine.request import Completions, Likelihoods
from refusalkit.errors import RunError
from refusalkit.intervention import Intervention
from refusalkit.selector import Advance

Tokens = tuple[int, ...]


class EngineLM(TemplateLM):  # type: ignore[misc]
    """Answer the harness with an engine and an intervention.

    Tokens are counted and cut as the harness's own adapter of transformers does it: special tokens are those that the
    tokenizer adds, and what is longer than the model reads loses its front.
    """

    def __init__(
        self, engine: Engine | RemoteEngine, tokenizer: Any, intervention: Intervention, advance: Advance | None = None
    ) -> None:
        super().__init__()
        self.engine = engine
        self.tokenizer = tokenizer
        self.intervention = intervention
        self.advance = advance
        self.max_length = int(engine.module.config.get_text_config().max_position_embeddings)

    @property
    def tokenizer_name(self) -> str:
        """Name the tokenizer, where the harness keeps requests that a chat template has gone over."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:
            # A chat template may have written it already.
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        if not requests:
            return []
        contexts, continuations = [], []
        for _, context, continuation in requests:
            continuations.append(tuple(continuation[-(self.max_length - 1) :]))
            contexts.append(tuple(context[-(self.max_length - len(continuations[-1])) :]))
        asked = Likelihoods(contexts, continuations, self.intervention)
        ((sums, greedy),) = self.engine.run([asked], self.advance)
        return list(zip(sums.tolist(), greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        windows = []
        for number, request in enumerate(requests):
            (text,) = request.args
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            windows += [(number, *make_disjoint_window(window)) for window in cut]
        sums = [0.0] * len(requests)
        for (number, _, _), (sum_, _) in zip(windows, self._loglikelihood_tokens(windows), strict=True):
            sums[number] += sum_
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        grouped: dict[int, list[tuple[int, Tokens, list[str]]]] = {}
        for number, request in enumerate(requests):
            context, options = request.args
            wanted = _greedy(normalize_gen_kwargs(options, 256))
            most = wanted["max_gen_toks"]
            stops = handle_stop_sequences(wanted["until"], eos=self.tokenizer.decode(self.eot_token_id))
            ids = tuple(self.tok_encode(context)[-max(1, self.max_length - most) :])
            grouped.setdefault(most, []).append((number, ids, stops))
        texts = [""] * len(requests)
        for most, group in grouped.items():
            asked = Completions([ids for _, ids, _ in group], self.intervention, most)
            (written,) = self.engine.run([asked], self.advance)
            for (number, _, stops), ids in zip(group, written, strict=True):
                texts[number] = _cut(self.tokenizer.decode(ids, skip_special_tokens=True), stops)
        return texts


def _greedy(options: Mapping[str, Any]) -> Mapping[str, Any]:
    if options.get("do_sample"):
        raise RunError(
            "a task asks for sampled completions, and these are greedy",
            where="analyze: capability",
            hint="name a task that scores likelihoods or greedy completions",
        )
    return options


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        if stop:
            text = text.split(stop)[0]
    return text


def ask(model: EngineLM, tasks: Sequence[str], folder: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Let the harness run `tasks`, of its own or from YAML files in `folder`, and return its results and samples.

    `options` are `num_fewshot`, `limit` and `apply_chat_template`. Raises `RunError` for a task that is not known.
    """
    known = TaskManager(include_path=folder)
    missing = [task for task in tasks if task not in known.all_tasks]
    if missing:
        raise RunError(
            f"the harness knows no task {', '.join(missing)}",
            where="analyze: capability",
            hint="`lm_eval ls tasks` lists them; `folder` may hold tasks of your own",
        )
    found = lm_eval.simple_evaluate(
        model=model, tasks=list(tasks), task_manager=known, log_samples=True, bootstrap_iters=1000, **options
    )
    return dict(found)
