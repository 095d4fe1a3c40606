"""What one process does for all; with the others played by stand-ins (see test_convert for two)."""

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec

import alaya_jax as aj
from alaya_jax.checkpoint.processes import first_does, first_says, whole
from alaya_jax.errors import CheckpointError


def test_a_process_that_is_alone_does_it_itself():
    done = []
    first_does(lambda: done.append(1))
    assert done == [1]
    assert first_says(lambda: "a name") == "a name"
    with pytest.raises(CheckpointError, match="as it was"):
        first_does(lambda: (_ for _ in ()).throw(CheckpointError("as it was")))


@pytest.fixture
def two(monkeypatch):
    """Two processes, of which this is one: `say` is what the first one broadcasts to the second."""
    said = []

    def play(index, text=""):
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "process_index", lambda: index)

        def broadcast(x):
            said.append(bytes(x).rstrip(b"\0").decode())
            if index == 0:
                return x
            told = np.zeros_like(x)
            told[: len(text)] = np.frombuffer(text.encode(), np.uint8)
            return told

        monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", broadcast)
        return said

    return play


def test_the_second_does_nothing_and_fails_with_the_words_of_the_first(two):
    two(1, "disk full")
    with pytest.raises(CheckpointError, match="the first process could not go on: disk full"):
        first_does(lambda: pytest.fail("the first does this"))


def test_the_first_raises_its_own_error_after_it_told_the_others(two):
    said = two(0)
    with pytest.raises(OSError, match="disk full"):
        first_does(lambda: (_ for _ in ()).throw(OSError("disk full")))
    assert said == ["disk full"]


def test_the_second_hears_a_text_of_two_broadcasts(two, monkeypatch):
    two(1)
    answers = [b"", b"a name"]

    def broadcast(x):
        told = np.zeros_like(x)
        text = answers.pop(0)
        told[: len(text)] = np.frombuffer(text, np.uint8)
        return told

    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", broadcast)
    assert first_says(lambda: pytest.fail("the first finds it out")) == "a name"
    assert answers == []


def test_a_sharded_array_is_put_together():
    values = np.arange(16, dtype=np.float32).reshape(8, 2)
    mesh = aj.make_mesh(tensor=8)
    laid = jax.device_put(values, jax.sharding.NamedSharding(mesh, PartitionSpec("tensor")))
    np.testing.assert_array_equal(whole(laid), values)
