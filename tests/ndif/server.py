"""Install and run a real NDIF server on this machine, for tests: `python -m tests.ndif.server install` or `run`.

Everything listens on 127.0.0.1. The server has an environment of its own, without refusalkit: what a job needs has to
travel with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).parent
#: Where the server is installed, unless `REFUSALKIT_NDIF_SERVER` says otherwise.
DEFAULT = HERE.parent.parent / ".ndif-server"
LOCAL = "127.0.0.1"
SERVICES = (
    "redis",
    "store",
    "gcs",
    "client",
    "dashboard",
    "objects",
    "nodes",
    "agent",
    "agent_http",
    "runtime",
    "metrics",
)

#: ndif asks for Python 3.12 and runs on 3.11. It is written against nnsight 0.8.0, and a client of 0.8.1 can use it.
PACKAGES = (
    "nnsight==0.8.0", "transformers>=5.15,<5.23", "accelerate", "numpy", "zstandard", "peft", "pydantic", "redis",
    "click", "python-dotenv", "pyyaml", "boto3", "fastapi", "uvicorn[standard]", "gunicorn", "python-multipart",
    "ray[default]", "psutil", "moto[s3]", "flask", "flask-cors",
)  # fmt: skip


def environment() -> Path:
    """Return the folder of the server's environment."""
    return Path(os.environ.get("REFUSALKIT_NDIF_SERVER", DEFAULT))


def missing() -> str | None:
    """Say why the server cannot be run here, or return None."""
    if not (environment() / "bin" / "gunicorn").exists():
        return f"no NDIF server in {environment()}: python -m tests.ndif.server install"
    if shutil.which("redis-server") is None:
        return "the NDIF server needs redis-server: apt-get install redis-server"
    return None


def install() -> None:
    """Install the server from the package index."""
    folder = environment()
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "pip", "--disable-pip-version-check", "install", "-q"]
    # First, so that what needs torch finds it and takes no CUDA build.
    subprocess.run([*pip, "torch==2.13.0"], check=True)
    subprocess.run([*pip, "--no-deps", "--ignore-requires-python", "ndif==0.1.2"], check=True)
    subprocess.run([*pip, *PACKAGES], check=True)


def free_ports(n: int) -> list[int]:
    """Find ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for each in sockets:
            each.bind((LOCAL, 0))
        return [each.getsockname()[1] for each in sockets]


class Server:
    """Run the services of one NDIF server; `start` again after `kill` is a server that was restarted."""

    def __init__(self, actor: str, **settings: str) -> None:
        self.actor = actor
        self.settings = settings
        ports = free_ports(len(SERVICES) + 1)
        self.ports = dict(zip(SERVICES, ports[1:], strict=True))
        self.host = f"http://{LOCAL}:{ports[0]}"
        # A path to a socket may have 107 letters, and Ray adds most of them.
        self.folder = Path(tempfile.mkdtemp(prefix="nd", dir="/tmp"))
        self.processes: list[subprocess.Popen[bytes]] = []

    def _variables(self) -> dict[str, str]:
        ports, address = self.ports, f"http://{LOCAL}:{self.ports['store']}"
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
        return {
            **kept,
            "PATH": f"{environment() / 'bin'}:{kept.get('PATH', '')}",
            "PYTHONPATH": str(HERE),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "NDIF_REDIS_URL": f"redis://{LOCAL}:{ports['redis']}",
            "NDIF_RAY_ADDRESS": f"ray://{LOCAL}:{ports['client']}",
            "NDIF_OBJECT_STORE_URL": address,
            "NDIF_OBJECT_STORE_PUBLIC_URL": address,
            "NDIF_OBJECT_STORE_ACCESS_KEY": "test",
            "NDIF_OBJECT_STORE_SECRET_KEY": "testtest",
            "NDIF_MODEL_IMPORT_PATH": f"cpu_actors.{self.actor}",
            "NDIF_SANDBOX_POOL_SIZE": "1",
            "NDIF_DEFAULT_DTYPE": "float32",
            "NDIF_DEFAULT_PADDING_BIAS": "0",
            "NDIF_MINIMUM_DEPLOYMENT_TIME_SECONDS": "0",
            "NDIF_AUTOSCALING_MAX_REPLICAS": "1",
            "NDIF_STATUS_TTL_S": "1",
            "NDIF_QUEUE_FETCH_TIMEOUT_S": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            # Ray then listens on this address alone.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_ADDRESS": f"{LOCAL}:{ports['gcs']}",
            "NO_PROXY": f"{LOCAL},localhost",
            "NNSIGHT_CONFIG": str(self._config()),
            **self.settings,
        }

    def _config(self) -> Path:
        # nnsight gives every object a method `save`, on which larger uploads fail. The server has no use for it.
        path = self.folder / "nnsight.yaml"
        path.write_text("APP: {PYMOUNT: false}\n")
        return path

    def _run(self, name: str, *command: object, **more: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [str(part) for part in command],
                env={**self._variables(), **more},
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def start(self) -> Server:
        """Start every service and wait until requests are accepted."""
        ports, python = self.ports, environment() / "bin" / "python"
        self._run("redis", "redis-server", "--bind", LOCAL, "--port", ports["redis"], "--save", "")
        self._run("store", python, "-m", "moto.server", "-H", LOCAL, "-p", ports["store"])
        memory = 4 << 30
        resources = {"head": 10, "cuda_memory_bytes": memory, "cpu_memory_bytes": memory}
        ray = {
            "node-ip-address": LOCAL,
            "num-cpus": 4,
            "num-gpus": 1,
            "resources": json.dumps(resources),
            "object-store-memory": 256 << 20,
            "temp-dir": self.folder / "ray",
            "port": ports["gcs"],
            "ray-client-server-port": ports["client"],
            "include-dashboard": "true",
            "dashboard-host": LOCAL,
            "dashboard-port": ports["dashboard"],
            "object-manager-port": ports["objects"],
            "node-manager-port": ports["nodes"],
            "dashboard-agent-grpc-port": ports["agent"],
            "dashboard-agent-listen-port": ports["agent_http"],
            "runtime-env-agent-port": ports["runtime"],
            "metrics-export-port": ports["metrics"],
        }
        options = [f"--{name}={value}" for name, value in ray.items()]
        self._run("ray", environment() / "bin" / "ray", "start", "--head", "--block", "--disable-usage-stats", *options)
        for name in ("redis", "store", "gcs", "client"):
            self._wait(name, lambda name=name: _listens(ports[name]))
        self._wait("dashboard", lambda: _answers(f"http://{LOCAL}:{ports['dashboard']}/api/version"))
        controller = self._run("controller", python, "-m", "ndif.services.ray.deployments.controller.controller")
        assert controller.wait(90) == 0, self._tail("controller")
        self.api(self.host)
        return self

    def api(self, host: str, **settings: str) -> None:
        """Serve the API at an address of its own, with settings of its own; the first also runs the queue."""
        gunicorn = [
            environment() / "bin" / "gunicorn",
            "ndif.services.api.app:app",
            "--bind",
            host.removeprefix("http://"),
        ]
        if host == self.host:
            gunicorn += ["--config", "python:ndif.services.api.gunicorn_conf"]
        else:
            gunicorn += ["--worker-class", "uvicorn.workers.UvicornWorker"]
        self._run(f"api-{host[-5:]}", *gunicorn, **settings)
        self._wait(f"api-{host[-5:]}", lambda: _answers(f"{host}/connected"))

    def _wait(self, name: str, ready: Callable[[], bool]) -> None:
        end = time.monotonic() + 120
        while not ready():
            assert time.monotonic() < end, f"{name} does not start: {self._tail(name)}"
            time.sleep(0.2)

    def _tail(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace")[-2000:] if path.exists() else "it wrote nothing"

    def kill(self) -> None:
        """End every service at once, as a power cut would."""
        for group in [process.pid for process in self.processes] + self._workers():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)
        for process in self.processes:
            process.wait()
        self.processes.clear()
        shutil.rmtree(self.folder / "ray", ignore_errors=True)

    def _workers(self) -> list[int]:
        """Find the groups of the processes that Ray started below ours; each is in a session of its own."""
        script = (
            "import os, psutil, sys\n"
            "for pid in map(int, sys.argv[1:]):\n"
            "    for child in psutil.Process(pid).children(recursive=True) if psutil.pid_exists(pid) else ():\n"
            "        print(os.getpgid(child.pid))\n"
        )
        pids = [str(process.pid) for process in self.processes]
        command = [environment() / "bin" / "python", "-c", script, *pids]
        said = subprocess.run(command, capture_output=True, text=True).stdout
        return sorted(set(map(int, said.split())) - {os.getpgid(0)})

    def stop(self) -> None:
        """End the server and remove what it wrote."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((LOCAL, port), timeout=1):
        return True
    return False


def _answers(url: str) -> bool:
    with contextlib.suppress(OSError, urllib.error.URLError), urllib.request.urlopen(url, timeout=5):
        return True
    return False


@contextlib.contextmanager
def running(actor: str, **settings: str) -> Iterator[Server]:
    """Run a server for the length of a block."""
    server = Server(actor, **settings)
    try:
        yield server.start()
    finally:
        server.stop()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["install"]:
            install()
        case ["run", *rest]:
            if reason := missing():
                sys.exit(reason)
            # Ended by a signal, it ends the server.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit())
            with contextlib.suppress(KeyboardInterrupt), running(rest[0] if rest else "Plain") as found:
                print(f"export NDIF_HOST={found.host}", flush=True)
                signal.pause()
        case _:
            sys.exit("python -m tests.ndif.server install | run [Plain|Sandbox]")
