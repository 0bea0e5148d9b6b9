"""Talk to an NDIF server: hand in a job, ask after it, fetch its result, and say what went wrong in words.

A job is handed in without waiting and asked after by its id, so that the process that handed it in may die. Results
are read as plain tensors. The API key comes from nnsight's configuration (or `NDIF_API_KEY`) and is taken out of
whatever the server says.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import torch
from nnsight.intervention.backends.remote import RemoteBackend, RemoteError
from nnsight.schema.config import CONFIG, _read_yaml, _user_config_path
from nnsight.schema.request import RequestModel
from nnsight.schema.response import ResponseModel
from pydantic import ValidationError

from refusalkit.engine.work import Part, submit
from refusalkit.errors import InputError, RunError

_STATUS = "`refusalkit ndif status` shows what the server runs and hosts"
_TIMEOUT = httpx.Timeout(10.0, read=600.0)


class UnavailableError(RunError):
    """The server cannot be reached or cannot take a request now; trying again may help."""


class LostError(RunError):
    """The server no longer has the job, or ended it through no fault of the job's."""


class TooMuchError(RunError):
    """The job ran longer, or needed more memory, than the server allows."""


@dataclass(frozen=True)
class Update:
    """Hold what the server last said of a job."""

    state: str
    """`queued`, `running`, `completed` ..."""
    said: str
    url: str | None = None
    """Where the result lies, once it is there."""


def chosen_host(recipe_host: str | None) -> str:
    """Return the server the user chose: in the recipe, by `NDIF_HOST`, or in nnsight's configuration file.

    Raises `InputError` when none was chosen: nnsight would then talk to the public service.
    """
    settings = _read_yaml(_user_config_path()).get("API") or {}
    host = recipe_host or os.environ.get("NDIF_HOST") or settings.get("HOST")
    if not host:
        raise InputError(
            "no NDIF server is chosen",
            where="model.where 'ndif'",
            hint="set `model.host`, NDIF_HOST, or API.HOST in nnsight's configuration; the public service is "
            "https://api.ndif.us",
        )
    if not re.fullmatch(r"https?://[^/\s@]+(/[^\s@]*)?", host):
        raise InputError(
            f"{without_key(host)!r} is no address", where="model.host", hint="for example http://127.0.0.1:8001"
        )
    return str(host).rstrip("/")


def without_key(text: str) -> str:
    """Take the API key out of a text that may be shown or kept."""
    key = CONFIG.API.APIKEY
    return text.replace(key, "[API key]") if key else text


class _Request(RequestModel):  # type: ignore[misc]
    """Ask for isolation: nothing sent from here needs the server's trust."""

    trusted: bool = False


class _Transport(RemoteBackend):  # type: ignore[misc]
    """Send a block without waiting, and count the bytes both ways."""

    def __init__(self, host: str, model_key: str) -> None:
        super().__init__(model_key, host=host, blocking=False)
        self.display.enabled = False
        self.bytes_up = 0

    def __call__(self, tracer: Any = None) -> None:
        # Unlike nnsight's own, which offers every module of the working directory to the pickler.
        blob = RequestModel.serialize(tracer, self.compress)
        self.bytes_up = len(blob)
        request = _Request(model_key=self.model_key, compress=self.compress, env=self.env)
        self.job_id = self._post(request, blob).id


@dataclass(frozen=True)
class Server:
    """Hold the address of a server and the key of the model it is asked for."""

    host: str
    model_key: str
    model_name: str

    def hand_in(self, model: Any, parts: Sequence[Part]) -> tuple[str, int]:
        """Hand in a job and return its id and the bytes sent; raises what `failure` makes of an error."""
        transport = _Transport(self.host, self.model_key)
        try:
            submit(model, transport, parts)
        except RemoteError as error:
            raise _refused(error.__cause__ or error, self.host) from None
        except httpx.HTTPError as error:
            raise _refused(error, self.host) from None
        except ValidationError:
            raise _stranger(self.host) from None
        return str(transport.job_id), transport.bytes_up

    def ask(self, job: str) -> Update | None:
        """Return what became of a job, or None when the server knows nothing of it (yet, or any more)."""
        response = self.get(f"/response/{job}", missing=True)
        if response is None:
            return None
        try:
            found = ResponseModel.model_validate(response)
        except ValidationError:
            raise _stranger(self.host) from None
        if found.status.value == "ERROR":
            raise self.failure(without_key(found.description))
        state = found.status.value.lower()
        return Update(state, without_key(found.description), found.data if state == "completed" else None)

    def fetch(self, url: str) -> tuple[list[Any], int]:
        """Download a result: one tensor or list of tensors a part, and the bytes received."""
        try:
            response = httpx.get(url, timeout=_TIMEOUT)
            response.raise_for_status()
        except httpx.HTTPStatusError:
            raise LostError("the server no longer has the result", where=self.host) from None
        except httpx.HTTPError as error:
            raise _refused(error, self.host) from None
        return _results_in(response.content, self.host), len(response.content)

    def get(self, path: str, *, missing: bool = False) -> Any:
        """Return the JSON mapping at `path`; None where there is none and that is allowed."""
        headers = {"ndif-api-key": CONFIG.API.APIKEY} if CONFIG.API.APIKEY else None
        try:
            response = httpx.get(f"{self.host}{path}", headers=headers, timeout=_TIMEOUT)
            if missing and response.status_code == 404:
                return None
            response.raise_for_status()
            found = response.json()
        except httpx.HTTPError as error:
            raise _refused(error, self.host) from None
        except ValueError:
            raise _stranger(self.host) from None
        if not isinstance(found, dict):
            raise _stranger(self.host)
        return found

    def failure(self, said: str) -> RunError:
        """Turn what the server says of a failed job into an error of ours."""
        last = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "no reason given")
        for pattern, kind, message, hint in _FAILURES:
            if re.search(pattern, said, re.IGNORECASE):
                return kind(message.format(model=self.model_name, said=last), where=self.host, hint=hint)
        return RunError(f"the job failed on the server: {last}", where=self.host, hint=_STATUS)


#: (what the server says of a job, our error, our words, the hint)
_FAILURES: tuple[tuple[str, type[RunError], str, str | None], ...] = (
    (r"exceeded the execution timeout of", TooMuchError, "{said}", None),
    (r"out of memory", TooMuchError, "the job needs more memory than the server has: {said}", None),
    (r"could not deploy this model", RunError, "the server does not host {model}: {said}", _STATUS),
    (
        r"doesn't match the one your|payload could not be read",
        RunError,
        "the server's versions do not fit this machine's: {said}",
        _STATUS,
    ),
    (r"cancelled or preempted", RunError, "the server's operator stopped the job", "ask before you run it again"),
    (
        r"evicted|critical server error|error (submitting|starting|provisioning)",
        LostError,
        "the server lost the job: {said}",
        None,
    ),
)


def _refused(error: BaseException, host: str) -> RunError:
    """Turn an error of the connection, or the status of an answer, into an error of ours."""
    if not isinstance(error, httpx.HTTPStatusError):
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return UnavailableError(
                "the server cannot be reached", where=host, hint="is it running, and is this its address?"
            )
        if isinstance(error, httpx.HTTPError):
            return UnavailableError(f"the connection was lost: {type(error).__name__}", where=host, hint=_RESUME)
        return RunError(f"the request cannot be sent: {without_key(str(error))}", where=host, hint="check the address")
    status, said = error.response.status_code, _detail(error.response)
    if status in (401, 403) or "API key" in said:
        return RunError(
            f"the server does not accept the API key ({status})",
            where=host,
            hint="set NDIF_API_KEY, or run `nnsight login`",
        )
    if status == 429 or "quota" in said.lower():
        return UnavailableError(f"the quota of this API key is used up: {said}", where=host, hint=_RESUME)
    if status >= 500:
        return UnavailableError(f"the server cannot take requests now ({status}): {said}", where=host, hint=_RESUME)
    if "version" in said.lower():
        return RunError(f"the server refuses this machine's versions: {said}", where=host, hint=_STATUS)
    return RunError(f"the server refuses the request ({status}): {said}", where=host, hint=_STATUS)


_RESUME = "run the same command later: finished jobs are kept, and running ones are found again"


def _stranger(host: str) -> RunError:
    return RunError("this is no NDIF server", where=host, hint="check the address")


def _results_in(content: bytes, host: str) -> list[Any]:
    """Read what a job saved; a server is not trusted with more than tensors."""
    import zstandard
    from torch.serialization import pickle  # type: ignore[attr-defined]

    try:
        if CONFIG.API.COMPRESS:
            content = zstandard.ZstdDecompressor().decompress(content)
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return list(saved["results"])
    except (zstandard.ZstdError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
        said = str(error).partition("\n")[0]
        raise RunError(f"the result cannot be read: {said}", where=host, hint=_STATUS) from None


def _detail(response: httpx.Response) -> str:
    try:
        body = response.json()
    except ValueError:
        body = response.text
    said = body.get("detail") if isinstance(body, dict) else body
    return without_key(str(said))[:500]
