"""Ask an OpenAI-compatible chat endpoint, patiently and within limits."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from refusalkit.errors import InputError, RunError

if TYPE_CHECKING:
    import httpx

#: Asking again may help.
PASSING = {408, 425, 429, 500, 502, 503, 504}
#: Every other request would be answered the same.
HOPELESS = {
    401: "the key is not accepted",
    403: "the key may not be used for this",
    404: "there is no such model or address",
}
#: No wait is longer, whatever the endpoint asks for.
LONGEST_WAIT_S = 60.0


@dataclass(frozen=True)
class Endpoint:
    """Say where to ask, with what patience. The key is read when it is used, and kept nowhere."""

    base_url: str
    key_variable: str | None
    timeout_s: float
    retries: int
    where: str
    """What errors name."""

    @property
    def host(self) -> str:
        """The host and port that requests go to."""
        return urlsplit(self.base_url).netloc

    def key(self) -> str | None:
        """Return the key; raises `InputError` where the variable that should hold it is not set."""
        if self.key_variable is None:
            return None
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            raise InputError(
                f"the environment variable that `key_variable` names is not set, and {self.host} wants a key",
                where=self.where,
                hint="set it, or leave `key_variable` out; a key itself has no place in a recipe",
            )
        if not (key.isascii() and key.isprintable()):
            raise InputError("the key holds characters that no key has", where=self.where, hint="copy it again")
        return key

    def greet(self) -> None:
        """Ask for the list of models, which says whether the endpoint is there and takes the key; nothing else is sent.

        Raises `RunError` where it is not, or does not. An endpoint without a list is taken on trust.
        """
        import httpx

        try:
            with httpx.Client(headers=self._headers(), timeout=self.timeout_s) as client:
                status = client.get(f"{self.base_url}/models").status_code
        except httpx.TransportError as error:
            raise RunError(
                f"{self.host} cannot be reached: {type(error).__name__}",
                where=self.where,
                hint="start it, or correct `base_url`; finished stages are kept",
            ) from None
        if status in (401, 403):
            raise self._hopeless(status)

    def _headers(self) -> dict[str, str]:
        key = self.key()
        return {} if key is None else {"Authorization": f"Bearer {key}"}

    def _hopeless(self, status: int) -> RunError:
        # What the endpoint says may repeat the key, so it is not shown.
        return RunError(
            f"{self.host} answers {status}: {HOPELESS[status]}",
            where=self.where,
            hint="correct `model`, `base_url` or the key; verdicts so far are kept",
        )

    def replies(self, bodies: Sequence[Mapping[str, Any]], concurrency: int) -> Iterator[tuple[int, str | None]]:
        """Yield the index and the text of every reply as they come; None where there is none to be had.

        Raises `RunError` where the endpoint answers nothing, or would answer everything in the same bad way.
        """
        import httpx

        none = 0
        with httpx.Client(headers=self._headers(), timeout=self.timeout_s) as client:
            pool, stop = ThreadPoolExecutor(concurrency), Event()
            try:
                waiting = {pool.submit(self._reply, client, body, stop): index for index, body in enumerate(bodies)}
                for done in as_completed(waiting):
                    text = done.result()
                    none += text is None
                    yield waiting[done], text
            finally:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
        if none == len(bodies):
            raise RunError(
                f"{self.host} gave no reply to any of {len(bodies)} requests",
                where=self.where,
                hint="see whether it runs and takes requests, then run the recipe again",
            )

    def _reply(self, client: httpx.Client, body: Mapping[str, Any], stop: Event) -> str | None:
        """Return the text of one reply, asking again until there is one, patience ends or `stop` is set."""
        import httpx

        for attempt in range(self.retries + 1):
            asked_to_wait = None
            try:
                response = client.post(f"{self.base_url}/chat/completions", json=body)
            except httpx.TransportError:
                pass
            else:
                if response.status_code in HOPELESS:
                    raise self._hopeless(response.status_code)
                if response.status_code not in PASSING:
                    return _text(response)
                asked_to_wait = response.headers.get("retry-after")
            if attempt < self.retries and stop.wait(_wait(attempt, asked_to_wait)):
                break
        return None


def _wait(attempt: int, asked: str | None) -> float:
    """Return the seconds to wait: what the endpoint asks for, else twice as long each time, not in step with others."""
    try:
        seconds = float(asked) if asked is not None else None
    except ValueError:
        seconds = None
    return min(LONGEST_WAIT_S, random.uniform(0.5, 1) * 2**attempt if seconds is None else max(0.0, seconds))


def _text(response: httpx.Response) -> str | None:
    """Return what the model wrote; None where it was kept from writing, or the response is no reply."""
    try:
        content = response.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        return None
    return content if isinstance(content, str) else None
