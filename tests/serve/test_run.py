"""A server in a process of its own: how it starts, and what signals do."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from alaya_jax.errors import RequestError
from alaya_jax.serve import run

from .conftest import HELLO, TEMPLATE

LONG = {"messages": HELLO, "temperature": 0, "ignore_eos": True, "stream": True}


class Served:
    """`alaya serve` in a process.

    Attributes:
      process: it.
      url: where it answers.
      said: what it wrote to stderr so far.
    """

    def __init__(self, *arguments: object, place: Path):
        command = [sys.executable, "-m", "alaya_jax.cli", "serve", *map(str, arguments)]
        self.process = subprocess.Popen(
            [*command, "--port", "0"],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            cwd=place,  # of an installed package the repository is not the one to import
            env=os.environ | {"ALAYA_CACHE": str(place / "cache")},
        )
        self.said = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.url = self.until(r"(http://\S+) answers")

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said += line

    def until(self, pattern: str) -> str:
        """Waits until it has written that."""
        deadline = time.monotonic() + 120
        while not (found := re.search(pattern, self.said)):
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.05)
        return found[len(found.groups())]

    def ready(self) -> None:
        """Waits until /health says so; before that, it says that it is starting."""
        deadline = time.monotonic() + 120
        while (answer := httpx.get(f"{self.url}/health", timeout=60)).status_code != 200:
            assert answer.json() == {"status": "starting"}, self.said
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def ends(self) -> int:
        """Waits for its end; its exit code."""
        code = self.process.wait(60)
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code


@pytest.fixture
def serve(llama3, tmp_path) -> Iterator[Callable[..., Served]]:
    started = []
    path = llama3(TEMPLATE, tmp_path / "tiny")

    def start(*arguments: object) -> Served:
        started.append(
            Served(
                path,
                "--db",
                tmp_path / "db",
                "--memory",
                "32MiB",
                *arguments,
                place=tmp_path,
            )
        )
        return started[-1]

    yield start
    for served in started:
        served.process.kill()
        served.ends()


def test_sigterm_lets_what_runs_end_and_takes_nothing_new(serve):
    served = serve(
        "--name", "small", "--attention", "window", "--warmup", "--slots", 1, "--chunk", 8
    )
    served.ready()
    assert int(served.until(r"Warm: (\d+) programs")) >= 3
    httpx.post(f"{served.url}/v1/completions", json={"prompt": "a", "max_tokens": 3}, timeout=60)
    (first,) = httpx.get(f"{served.url}/v1/requests").json()["data"]
    assert (first["completion_tokens"], first["programs"]) == (3, 0)
    assert httpx.get(f"{served.url}/v1/models").json()["data"][0]["id"] == "small"
    events: list[dict[str, Any]] = []
    stopping = False
    with httpx.stream(
        "POST", f"{served.url}/v1/chat/completions", json=LONG | {"max_tokens": 400}, timeout=60
    ) as answer:
        for line in answer.iter_lines():
            if len(events) == 3 and not stopping:
                stopping = True
                served.process.send_signal(signal.SIGTERM)
                served.until("Stopping when what runs has ended")
                time.sleep(0.3)
                with pytest.raises(httpx.ConnectError):
                    httpx.get(f"{served.url}/health")
            if line.startswith("data: {"):
                events.append(json.loads(line.removeprefix("data: ")))
    assert line == "" or line == "data: [DONE]"
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert served.ends() == 0
    assert "Traceback" not in served.said


@pytest.mark.slow
def test_a_second_signal_ends_what_runs(serve):
    served = serve()
    served.ready()
    ended, said = threading.Event(), []

    def ask() -> None:
        body = {"prompt": "a", "max_tokens": 8000, "ignore_eos": True}
        answer = httpx.post(f"{served.url}/v1/completions", json=body, timeout=60)
        said.append(answer.status_code)
        ended.set()

    thread = threading.Thread(target=ask)
    thread.start()
    while httpx.get(f"{served.url}/v1/requests", timeout=60).json()["engine"]["running"] == 0:
        time.sleep(0.02)
    served.process.send_signal(signal.SIGTERM)
    served.until("once more ends it now")
    assert not ended.wait(0.5)
    served.process.send_signal(signal.SIGTERM)
    assert served.ends() == 0
    thread.join()
    assert ended.is_set()
    assert said == [503]


def test_a_signal_while_it_starts_ends_it(serve):
    served = serve()
    served.process.send_signal(signal.SIGINT)
    assert served.ends() == 0
    assert "Traceback" not in served.said


def test_a_model_that_cannot_be_loaded_ends_the_server(serve, tmp_path):
    (tmp_path / "tiny" / "config.json").write_text("{")
    served = serve()
    assert served.ends() == 1
    assert re.search(r"^error: .*config\.json", served.said, re.MULTILINE)
    assert "Traceback" not in served.said


def test_an_address_that_is_taken_is_refused_at_once():
    with run.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RequestError, match=rf"127\.0\.0\.1:{port}.*--port"):
            run.listen("127.0.0.1", port)
    with pytest.raises(RequestError, match="nowhere"):
        run.listen("nowhere.invalid", 0)
