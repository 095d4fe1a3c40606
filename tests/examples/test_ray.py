"""Replicas and batches by Ray, on two CPUs of this machine; where Ray is installed."""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import httpx
import pytest

ray = pytest.importorskip("ray", reason="pip install 'alaya_jax[ray]'")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

EXAMPLES = Path(__file__).parents[2] / "examples"
PORT = 8765
LONG = {"temperature": 0, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def cluster():
    path = f"{EXAMPLES}:{os.environ.get('PYTHONPATH', '')}"
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}},
    )
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))
    ray.shutdown()


@pytest.fixture(scope="module")
def served(cluster, llama3, tmp_path_factory):
    """Two replicas on one database, and a client."""
    from ray import serve
    from serve_ray import application

    path = tmp_path_factory.mktemp("ray") / "db"
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    settings = {"path": str(path)}
    serve.run(application(str(llama3()), 2, settings, {"num_cpus": 0.5}))
    with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=120) as client:
        yield client
    serve.shutdown()


def chat(client, content, **more):
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 5, "temperature": 0}
    answer = client.post("/v1/chat/completions", json=body | more)
    assert answer.status_code == 200, answer.text
    return answer


def process_of(replica):
    """The process of a replica, by the title that Ray gives it."""
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"ServeReplica:default:replica-{replica}" in place.read_text():
                return int(place.parent.name)
    raise AssertionError(f"no process of replica {replica}")


def test_both_answer_alike(served):
    """And requests with nothing stored go by what is to do."""
    assert served.get("/health").json()["status"] == "ready"
    (one,) = chat(served, "Hello").json()["choices"]
    (two,) = chat(served, "Hello").json()["choices"]
    assert one == two
    refused = served.post("/v1/completions", json={"prompt": "a", "nothing": 1})
    assert refused.status_code == 400
    assert "nothing" in refused.json()["error"]["message"]


def test_a_stream_whose_replica_is_killed_says_so_and_others_answer(served):
    body = {"prompt": "Once", "max_tokens": 8000, **LONG}
    with served.stream("POST", "/v1/completions", json=body) as answer:
        replica = answer.headers["x-replica"]
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        os.kill(process_of(replica), signal.SIGKILL)
        told = [json.loads(x.removeprefix("data: ")) for x in lines if x.startswith("data: {")]
    assert told[-1]["error"]["code"] == "replica_lost"
    # Whoever comes meanwhile is answered by the other one, or by the one that was started anew.
    assert chat(served, "Hello").json()["usage"]["completion_tokens"] == 5


def test_a_batch_reads_what_is_stored(cluster, llama3, tmp_path):
    import batch_ray

    import alaya_jax as aj

    path, text = llama3(), "We hold these truths to be self-evident. " * 4
    model = aj.load(path, progress=False)
    with aj.DB(tmp_path / "db", model) as db:
        db.import_context(model.encode(text), progress=False)
    lines = [{"prompt": text + f"And {i}", "n": i} for i in range(6)]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, lines)))
    batch_ray.main(
        str(tmp_path / "asked.jsonl"),
        str(tmp_path / "out"),
        str(tmp_path / "db"),
        str(path),
        max_new_tokens=4,
        block=3,
    )
    said = [
        json.loads(line)
        for file in (tmp_path / "out").glob("*.json")
        for line in file.read_text().splitlines()
    ]
    assert sorted(x["n"] for x in said) == list(range(6))
    assert all(x["cached_tokens"] > 20 and x["answer"] for x in said)
