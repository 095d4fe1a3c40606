"""What benchmarks/peer.py makes of the rounds of both sides, and how it speaks to a peer."""

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def imported(monkeypatch):
    """Imports a module of benchmarks/, which is no package; forgets it afterwards."""
    monkeypatch.syspath_prepend(FOLDER)
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(FOLDER)):
            del sys.modules[name]


def run(prefill: float, decode: float, *tokens: list[int]) -> dict:
    return {"prefill_s": prefill, "decode_s": decode, "tokens": list(tokens)}


def test_a_row_has_the_median_of_the_ratios_and_the_least(imported):
    ours = [run(1.0, 2.0, [1, 2, 3], [4, 5, 6]) for _ in range(3)]
    peer = [run(s, 1.0, [1, 2, 9], [7, 5, 6]) for s in (0.5, 4.0, 2.0)]
    case = {"context": 10, "batch": 2, "peer": "other"}
    chosen = {"prefill": "a", "decode": "b"}
    prefill, decode = imported("peer").rows_of(case, 3, chosen, ours, peer)
    assert prefill["ratio_each_round"] == [0.5, 4.0, 2.0]
    assert (prefill["ratio"], prefill["ratio_least"]) == (2.0, 0.5)
    assert (prefill["peer_variant"], decode["peer_variant"]) == ("a", "b")
    assert prefill["peer"] == "other"
    assert (prefill["ours_tokens_per_s"], decode["ours_tokens_per_s"]) == (20.0, 3.0)
    assert (prefill["peer_s"], decode["ratio"]) == (2.0, 0.5)
    assert prefill["same_tokens"] == 4 / 6
    assert prefill["same_start"] == 1.0  # two tokens of one answer, none of the other


def test_the_median_of_the_ratios_is_not_the_ratio_of_the_medians(imported):
    """A slow spell of the machine that both sides of a round share takes nothing from either."""
    ours = [run(s, 1.0, [1]) for s in (1.0, 10.0, 3.0)]
    peer = [run(s, 1.0, [1]) for s in (2.0, 20.0, 3.0)]
    case = {"context": 1, "batch": 1}
    chosen = {"prefill": "", "decode": ""}
    prefill, _ = imported("peer").rows_of(case, 1, chosen, ours, peer)
    assert prefill["ratio"] == 2.0
    assert prefill["peer_s"] / prefill["ours_s"] == 1.0


def test_answers_share_what_comes_before_they_differ(imported):
    same_start = imported("peer").same_start
    assert same_start([1, 2, 3], [1, 2, 3]) == 3
    assert same_start([1, 2, 3], [1, 5, 3]) == 1
    assert same_start([1], [2]) == 0


def test_stored_types_are_parts_of_the_elements(imported):
    tensors = [("Q8_0", 25), ("Q4_1", 70), ("Q4_1", 5)]
    assert imported("peer").stored_types(tensors) == "Q4_1 75%, Q8_0 25%"


def test_weights_are_a_dtype_or_a_scheme(imported):
    settings = imported("ours").load_settings
    assert settings("bfloat16") == {"dtype": "bfloat16"}
    assert settings("stored") == {"dtype": "float32", "quantize": "stored"}


ENGINE = """
from protocol import serve

class Engine:
    def __init__(self, gguf):
        print("a library prints this")
        self.facts = {"gguf": gguf}

    def measure(self, ids):
        if not ids:
            raise SystemExit("no ids at all")
        return {"tokens": [ids[0] // ids[1]]}

serve(Engine)
"""


@pytest.fixture
def process(imported, monkeypatch, tmp_path):
    environment = imported("peers.environment")
    script = tmp_path / "engine_peer.py"
    script.write_text(ENGINE)
    monkeypatch.setenv("PYTHONPATH", str(FOLDER / "peers"))
    with environment.PeerProcess(Path(sys.executable), tmp_path / "log", script) as process:
        yield process, environment.PeerUnavailable


def test_a_peer_answers_and_survives_what_fails(process):
    peer, unavailable = process
    with pytest.raises(unavailable, match="first request must be 'load'"):
        peer.ask("measure", ids=[4, 2])
    assert peer.ask("load", gguf="x") == {"gguf": "x"}
    with pytest.raises(unavailable, match="ZeroDivisionError"):
        peer.ask("measure", ids=[1, 0])
    with pytest.raises(unavailable, match="'greet': load or measure"):
        peer.ask("greet")
    assert peer.ask("measure", ids=[4, 2]) == {"tokens": [2]}


def test_a_peer_that_ended_says_its_last_words(process):
    peer, unavailable = process
    peer.ask("load", gguf="x")
    with pytest.raises(unavailable, match=r"exit code 1:(?s:.)*no ids at all"):
        peer.ask("measure", ids=[])
    with pytest.raises(unavailable, match="exit code 1"):
        peer.ask("measure", ids=[4, 2])


@pytest.mark.parametrize("name", ["transformers", "openvino", "llamacpp"])
def test_every_peer_has_its_files(imported, name):
    environment = imported("peers.environment")
    peer = environment.PEERS[name]
    assert peer.name == name
    assert "serve(Engine)" in (environment.FOLDER / peer.script).read_text()
    pinned = (environment.FOLDER / peer.requirements).read_text().splitlines()
    assert all("==" in line for line in pinned if not line.startswith("#"))
    assert len({p.folder for p in environment.PEERS.values()}) == len(environment.PEERS)
