"""What a remote run is made of, without a server: what travels, how work is cut, what errors say, what is refused."""

from __future__ import annotations

import http.server
import io
import json
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from nnsight.schema.request import RequestModel
from nnsight.tracing.backend import Backend

from refusalkit.artifacts import Activations, Unmodified
from refusalkit.builtin.interventions import ablate_everywhere
from refusalkit.checkpoint import open_checkpoint
from refusalkit.engine import work
from refusalkit.engine.engine import Engine
from refusalkit.engine.jobs import Call, Jobs, Patience, cut
from refusalkit.engine.ledger import Ledger, Record, key_of
from refusalkit.engine.load import load
from refusalkit.engine.remote import RemoteEngine, connect
from refusalkit.engine.request import (
    Capture,
    CompletionKL,
    Completions,
    Cosines,
    Likelihoods,
    Losses,
    Openings,
    Projections,
    Readings,
    Request,
    Scores,
    States,
)
from refusalkit.engine.server import Server, chosen_host
from refusalkit.errors import InputError, RunError
from refusalkit.intervention import NOTHING, Direction, Edit, Gate, Intervention, Place
from refusalkit.plan import Plan
from refusalkit.plan_text import describe
from refusalkit.progress import Silent
from refusalkit.recipe import ModelSection
from refusalkit.registry import Registry
from refusalkit.run_directory import read_run
from refusalkit.selector import Measure
from refusalkit.stages.analyze import analyze
from refusalkit.stages.bench import Bench
from refusalkit.stages.findings import Findings
from refusalkit.store import Store

PlanOf = Callable[..., Plan]
SERVER = ("model.where=ndif", "model.host=http://127.0.0.1:9")
HARMLESS = ("evaluate.interventions=[none,ablate,steer]",)


class Here(Jobs):
    """Run the tasks of a job in this process, cut as small as can be."""

    def __init__(self, model: Any, ledger: Ledger) -> None:
        super().__init__(Server("http://127.0.0.1:9", "key", "model"), model, ledger)
        self.limit = 1.0

    def finish(self, parts: Any) -> list[Any]:
        with warnings.catch_warnings():
            # On a server this is its own.
            warnings.filterwarnings("ignore", message=".*was never reached")
            return [task(self.model, items, *fixed) for task, items, fixed in parts]


@pytest.fixture(scope="module")
def engine(registry: Registry) -> Engine:
    """Give the embedded model, here."""
    return load(open_checkpoint(ModelSection(id="tiny:llama"), registry))


@pytest.fixture
def remote(engine: Engine, registry: Registry, tmp_path: Path) -> RemoteEngine:
    """Give an engine that makes tasks of requests and runs them here, one item a job."""
    checkpoint = open_checkpoint(ModelSection(id="tiny:llama"), registry)
    return RemoteEngine(engine.model, checkpoint, Here(engine.model, Ledger(tmp_path)), batch_size=3)


@pytest.fixture(scope="module")
def prompts(engine: Engine) -> tuple[tuple[int, ...], ...]:
    """Give prompts of different lengths."""
    texts = ("how do i bake a cake", "tell me about the sea", "write", "list the ways to hide a knife", "sing a song")
    return tuple(tuple(engine.model.tokenizer(text)["input_ids"]) for text in texts)


# The same answers, however the work is cut


def requests(engine: Engine, prompts: tuple[tuple[int, ...], ...]) -> list[Request]:
    """Make one request of every kind."""
    vector = torch.randn(engine.d_model, generator=torch.Generator().manual_seed(0))
    ablate = ablate_everywhere(Direction(vector, -1, 2, engine.n_layers))
    steer = Intervention((Edit("resid_pre", 3, add=vector),))
    read = engine.capture(prompts, (-1,), keep_samples=True).samples
    assert read is not None
    half = (read[:, 0, 2] @ vector).median().item() + 1e-3
    later = Edit("resid_pre", 3, add=vector, tokens=(1, 3), gated=True)
    gate = Gate("resid_pre", 2, -1, vector, half)
    gated = Intervention((replace(later, site="mlp_out", tokens=(None, 0)), later), gate=gate)
    openers = Measure("refusal_score", (5, 7))
    return [
        Capture(prompts, (-2, -1)),
        Capture(prompts, (-1,), "attn_out", keep_samples=True),
        Capture(prompts, (-1,), keep_samples=True, layers=(2, 5)),
        Scores(prompts, [NOTHING, ablate, steer], openers),
        Scores(prompts, [ablate, steer], Measure("kl_nats")),
        Scores(prompts, [ablate], Measure("kl_nats", reference=engine.logits(prompts, steer))),
        States(prompts, [NOTHING, ablate, steer], (6, 2)),
        Openings([prompts[:3], prompts[2:], prompts], (5, 7), 4),
        Readings(prompts, [NOTHING, ablate, steer, gated], (5, 7), keep_logits=True),
        Completions(prompts, NOTHING, 6),
        Completions(prompts, ablate, 6),
        Completions(prompts, gated, 6),
        Losses(prompts, [(4, 5, 6), (7,), (8, 9), (4,), (5, 6)], steer),
        Losses(prompts, [(4, 5, 6), (7,), (8, 9), (4,), (5, 6)], gated),
        Likelihoods(prompts, [(4, 5, 6), (7,), (8, 9), (4,), (5, 6)], steer),
        Cosines(prompts, vector, -1),
        CompletionKL(prompts, [(4, 5, 6), (7,), (), (4,), (5, 6)], [NOTHING, ablate, steer, gated]),
        Projections(prompts, [NOTHING, ablate, steer, gated], vector, Place("resid_pre", 3, -1)),
        Projections(prompts, [NOTHING, ablate], vector, Place("mlp_out", 5, -2)),
    ]


def test_every_request_is_answered_as_here(
    engine: Engine, remote: RemoteEngine, prompts: tuple[tuple[int, ...], ...]
) -> None:
    asked = requests(engine, prompts)
    for request, ours, theirs in zip(asked, engine.run(asked), remote.run(asked), strict=True):
        assert_close(ours, theirs, type(request).__name__)


def assert_close(ours: Any, theirs: Any, what: str) -> None:
    assert type(ours) is type(theirs), what
    if isinstance(ours, torch.Tensor):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4, msg=lambda said: f"{what}: {said}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), what
        for one, other in zip(ours, theirs, strict=True):
            assert_close(one, other, what)
    elif hasattr(ours, "__dict__"):
        for name, value in vars(ours).items():
            assert_close(value, vars(theirs)[name], f"{what}.{name}")
    else:
        assert ours == theirs, what


def test_analyses_find_as_here(
    engine: Engine, remote: RemoteEngine, plan_of: Callable[..., Plan], finished_run: Path
) -> None:
    plan = plan_of("analyze=[{analysis: suffixes, append: {a: please}}, {analysis: directions, positions: [-2, -1]}]")
    run, store = read_run(finished_run), Store(finished_run)
    activations, unmodified = store.load(Activations), store.load(Unmodified)
    assert activations is not None
    assert unmodified is not None

    def found(model: Engine | RemoteEngine) -> tuple[Any, ...]:
        bench = Bench(model, plan.template, Silent())
        findings = Findings(plan.evaluate, activations, run.choice, run.prompts, unmodified, bench)
        return analyze(list(zip(plan.recipe.analyze, plan.groups, strict=True)), findings).found

    (suffixes, directions), (other_suffixes, other_directions) = found(engine), found(remote)
    for one, other in zip(suffixes.groups, other_suffixes.groups, strict=True):
        assert one.mean == pytest.approx(other.mean, abs=1e-4)
        values = [[result.value for result in group.results] for group in (one, other)]
        assert values[0] == pytest.approx(values[1], abs=1e-4)
    for one, other in zip(directions.pairs, other_directions.pairs, strict=True):
        assert one.between_halves == pytest.approx(other.between_halves, abs=1e-4, nan_ok=True)


@pytest.mark.parametrize("most", [1.0, 7.0, 25.0, 1e9])
def test_cutting_loses_nothing_and_keeps_to_the_limit(most: float) -> None:
    calls = [
        Call(work.likelihoods, tuple(range(n)), (), cost) for n, cost in ((5, 3.0), (1, 40.0), (12, 1.0), (2, 10.0))
    ]
    jobs = cut(calls, most)
    seen = [(number, item) for job in jobs for number, start, stop in job for item in range(start, stop)]
    assert seen == [(number, item) for number, call in enumerate(calls) for item in call.items]
    for job in jobs:
        size = sum((stop - start) * calls[number].work for number, start, stop in job)
        assert size <= most or sum(stop - start for _, start, stop in job) == 1
    assert len(cut(calls, 1e9)) == 1


# What travels


class Keep(Backend):
    """Keep what would be sent."""

    blob = b""

    def __call__(self, tracer: Any = None) -> None:
        self.blob = RequestModel.serialize(tracer, compress=False)


def test_only_the_work_and_what_it_names_travels(registry: Registry, tmp_path: Path) -> None:
    section = ModelSection(id="tiny:llama", where="ndif", host="http://127.0.0.1:9")
    engine = connect(open_checkpoint(section, registry), tmp_path, lambda said: None)
    calls = [engine.question(request)[0] for request in requests_without_logits()]
    backend = Keep()
    work.submit(engine.jobs.model, backend, [(call.task, call.items, call.fixed) for call in calls])
    assert b"def capture_sums" in backend.blob
    assert b"def refusal_score" in backend.blob
    assert b"def kl_along" in backend.blob
    # A module would bring its loader along, and with it whatever that holds.
    for ours in (
        b"def orthogonalize",
        b"class RemoteEngine",
        b"class Engine",
        b"class Ledger",
        b"import typer",
        b"def chosen_host",
    ):
        assert ours not in backend.blob
    # No weight is on this machine.
    assert {parameter.device.type for parameter in engine.module.parameters()} == {"meta"}


def requests_without_logits() -> list[Request]:
    prompts = ((1, 2, 3), (4, 5, 6, 7))
    steer = Intervention((Edit("resid_pre", 3, add=torch.ones(128)),))
    return [
        Capture(prompts, (-1,)),
        Scores(prompts, [steer], Measure("refusal_score", (5,))),
        Completions(prompts, steer, 4),
        CompletionKL(prompts, [(8,), (9, 10)], [steer]),
        Projections(prompts, [steer], torch.ones(128), Place("resid_pre", 3, -1)),
    ]


# Jobs that are written down


def test_the_same_question_has_the_same_key_and_another_has_another() -> None:
    def parts(value: float, positions: tuple[int, ...] = (-1,)) -> list[work.Part]:
        return [(work.capture_sums, ({"input_ids": torch.tensor([value])},), ((), positions))]

    assert key_of("model", parts(1.0)) == key_of("model", parts(1.0))
    others = [key_of("model", parts(2.0)), key_of("model", parts(1.0, (-2,))), key_of("another", parts(1.0))]
    assert len({key_of("model", parts(1.0)), *others}) == 4


def test_results_come_back_as_they_were_kept(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    results = [
        torch.ones(2),
        [torch.zeros(1), torch.ones(3, 2)],
        torch.arange(3),
        *[torch.tensor([n]) for n in range(9)],
    ]
    ledger.write("key", Record("id", "host", 12))
    assert ledger.results("key") is None
    ledger.keep("key", results)
    assert_close(results, ledger.results("key"), "results")
    assert ledger.totals() == {"jobs": 1, "bytes_up": 12, "bytes_down": 0}
    ledger.clear(8.0)
    assert (ledger.results("key"), ledger.record("key"), ledger.limit()) == (None, None, 8.0)


# What a server may answer


@pytest.fixture
def answering() -> Iterator[Callable[..., Jobs]]:
    """Give a function that starts a server with one answer to everything, and returns what asks it."""
    started = []

    def start(status: int, body: str | bytes, tmp: Path) -> Jobs:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if status == 0:
                    self.connection.close()
                    return
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body if isinstance(body, bytes) else body.encode())

            def do_POST(self) -> None:
                self.do_GET()

            def log_message(self, *_: object) -> None: ...

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started.append(server)
        host = f"http://127.0.0.1:{server.server_address[1]}"
        return Jobs(Server(host, "key", "a model"), None, Ledger(tmp), patience=Patience(limit=0.0))

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (429, '{"detail": "slow down"}', "the quota of this API key is used up: slow down"),
        (503, '{"detail": "reconnecting"}', "cannot take requests now (503): reconnecting"),
        (500, "<html>oops</html>", "cannot take requests now (500): <html>oops</html>"),
        (403, '{"detail": "Invalid API key."}', "does not accept the API key (403)"),
        (400, '{"detail": "Client nnsight version 0.1 is too old"}', "refuses this machine's versions"),
        (422, '{"detail": "what?"}', "the server refuses the request (422): what?"),
        (200, "<html>a page</html>", "this is no NDIF server"),
        (200, "[1, 2]", "this is no NDIF server"),
        (200, '{"what": "this"}', "this is no NDIF server"),
        (0, "", "the connection was lost"),
    ],
)
def test_every_answer_has_its_own_words(
    answering: Callable[..., Jobs], tmp_path: Path, status: int, body: str, said: str
) -> None:
    jobs = answering(status, body, tmp_path)
    with pytest.raises(RunError) as error:
        jobs.server.ask("a-job")
    assert said in str(error.value)
    assert "hint: " in str(error.value)


@pytest.mark.parametrize(
    ("description", "said"),
    [
        ("Your job exceeded the execution timeout of 3.0s.", "exceeded the execution timeout of 3.0s"),
        ("Could not deploy this model. Repository Not Found", "does not host a model: Could not deploy"),
        ("Traceback ...\nValueError: no\n", "the job failed on the server: ValueError: no"),
        ("The model architecture on this server doesn't match the one your code was traced against", "do not fit"),
        ("Replica was evicted while processing your request.", "the server lost the job"),
        ("Your job was cancelled or preempted by the server.", "operator stopped the job"),
    ],
)
def test_every_way_a_job_ends_has_its_own_words(
    answering: Callable[..., Jobs], tmp_path: Path, description: str, said: str
) -> None:
    body = json.dumps({"id": "a-job", "status": "ERROR", "description": description})
    with pytest.raises(RunError, match=said):
        answering(200, body, tmp_path).server.ask("a-job")


def test_a_result_that_holds_more_than_tensors_is_not_read(answering: Callable[..., Jobs], tmp_path: Path) -> None:
    saved = io.BytesIO()
    torch.save({"results": [Path("anything")]}, saved)
    content = zstandard.ZstdCompressor().compress(saved.getvalue())
    for body in (content, b"no archive", zstandard.ZstdCompressor().compress(b"no tensors")):
        server = answering(200, body, tmp_path).server
        with pytest.raises(RunError, match="the result cannot be read"):
            server.fetch(server.host)


def test_a_server_that_is_not_there_is_given_up_after_a_while(tmp_path: Path) -> None:
    told: list[str] = []
    jobs = Jobs(Server("http://127.0.0.1:9", "key", "a model"), None, Ledger(tmp_path), told.append, Patience(2.5))
    with pytest.raises(RunError, match="the server cannot be reached"):
        jobs.patiently(lambda: jobs.server.ask("a-job"))
    assert told == ["the server cannot be reached; trying again in 1 s"]


# What is refused before anything is sent


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ((*SERVER,), "'orthogonalize' edits weights"),
        ((*SERVER, *HARMLESS, "select.screen=gradient"), "select: needs gradients"),
        ((*SERVER, *HARMLESS, "model.quantize=int8"), "model.quantize: the server decides"),
        ((SERVER[1],), "model.host: names a server"),
        ((SERVER[0], *HARMLESS, "model.host=localhost:8001"), "is no address"),
        ((SERVER[0], *HARMLESS, "model.host=http://user:secret@127.0.0.1"), "is no address"),
    ],
)
def test_the_plan_refuses_what_a_server_must_not_be_asked(
    plan_of: PlanOf, settings: tuple[str, ...], said: str
) -> None:
    with pytest.raises(InputError) as error:
        plan_of(*settings)
    assert said in str(error.value)


def test_no_server_is_taken_that_nobody_chose(tmp_path: Path, plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NDIF_HOST", raising=False)
    monkeypatch.setenv("NNSIGHT_CONFIG", str(tmp_path / "none.yaml"))
    with pytest.raises(InputError, match="no NDIF server is chosen"):
        plan_of(SERVER[0], *HARMLESS)
    monkeypatch.setenv("NDIF_HOST", "http://127.0.0.1:7")
    assert chosen_host(None) == "http://127.0.0.1:7"
    assert chosen_host("http://127.0.0.1:9/") == "http://127.0.0.1:9"
    monkeypatch.delenv("NDIF_HOST")
    (tmp_path / "none.yaml").write_text("API: {HOST: 'http://127.0.0.1:5'}\n")
    assert chosen_host(None) == "http://127.0.0.1:5"


def test_the_plan_shows_the_server_the_jobs_and_the_bytes(plan_of: PlanOf, tmp_path: Path) -> None:
    said = describe(plan_of(*SERVER, *HARMLESS), tmp_path)
    assert "server    http://127.0.0.1:9" in said
    assert "jobs      about 9: prompts 1, capture 1, select 5, evaluate 2" in said
    assert "bytes     at most about" in said
