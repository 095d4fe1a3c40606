"""RULER's tasks against what the published generators made; see `make_ruler_goldens.py`."""

import hashlib
import json
from pathlib import Path

import pytest

from alaya_jax.errors import RequestError
from alaya_jax.evaluation.tasks import ruler
from tests.evaluation import ruler_source

GOLDENS = json.loads((Path(__file__).parent / "ruler_goldens.json").read_text())


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("ruler")
    (path / "squad.json").write_text(ruler_source.squad())
    (path / "hotpotqa.json").write_text(ruler_source.hotpotqa())
    return ruler.Source(
        ruler_source.count,
        essay=ruler_source.TEXT,
        sentences=ruler_source.sentences,
        squad=path / "squad.json",
        hotpotqa=path / "hotpotqa.json",
    )


@pytest.mark.parametrize("length", [1024, 4096])
@pytest.mark.parametrize("task", ruler.NAMES)
def test_items_are_those_of_the_published_generators(source, task, length):
    items = list(ruler.items(task, source, length, 3))
    found = [
        hashlib.sha256(json.dumps([item.text, item.answers]).encode()).hexdigest()[:16]
        for item in items
    ]
    assert found == GOLDENS[f"{task} {length}"]
    for item in items:
        assert item.score(" ".join(item.answers)) == 1
        assert item.score("nothing") == 0


def test_every_task_has_goldens():
    assert {name.split()[0] for name in GOLDENS} == set(ruler.NAMES)


@pytest.mark.parametrize("task", ruler.NAMES)
def test_another_seed_makes_other_items(source, task):
    first, second = (next(ruler.items(task, source, 1024, 1, seed)) for seed in (1, 2))
    assert first != second


def test_the_depth_is_where_the_answer_stands(source):
    for item in ruler.items("niah_single_1", source, 1024, 3):
        assert item.depth is not None
        at = item.context.index(f"is: {item.answers[0]}")
        assert item.depth == pytest.approx(at / len(item.context), abs=0.1)


@pytest.mark.parametrize(
    ("task", "missing"), [("niah_single_2", "essay"), ("qa_1", "squad"), ("qa_2", "hotpotqa")]
)
def test_what_a_task_is_made_from_is_missing(task, missing):
    source = ruler.Source(ruler_source.count)
    assert not source.has(task)
    with pytest.raises(RequestError, match=rf"give Source\({missing}="):
        ruler.items(task, source, 1024, 1)


def test_what_is_not_to_be_had(source):
    with pytest.raises(RequestError, match="use one of niah_single_1, "):
        ruler.items("niah", source, 1024, 1)
    for task in ("niah_single_1", "qa_1", "fwe"):
        with pytest.raises(RequestError, match=f"{task}: no item of 60 tokens"):
            list(ruler.items(task, source, 60, 1))
