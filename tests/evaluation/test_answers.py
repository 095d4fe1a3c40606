"""Answers on disk: what was killed goes on, what is another run is refused."""

import json

import pytest

from alaya_jax.errors import RequestError
from alaya_jax.evaluation.answers import Answers


def test_rows_are_there_again(tmp_path):
    first = Answers(tmp_path / "run", {"seed": 1, "lengths": (3, 4)})
    first.add({"item": "a-0", "policy": "full", "said": "fünf\n"})
    first.add({"item": "a-0", "policy": "quest", "said": ""})
    first.keep("policies", {"3": {"keys": 16}})
    again = Answers(tmp_path / "run", {"seed": 1, "lengths": (3, 4)})
    assert again.rows == first.rows
    assert list(again.rows) == [("a-0", "full"), ("a-0", "quest")]
    assert again.kept("policies") == {"3": {"keys": 16}}
    assert again.kept("nothing") is None


@pytest.mark.parametrize("end", ["", '{"item": "a-1", "pol', '{"item": "a-1", "policy": "full"}'])
def test_a_line_that_was_cut_off_is_dropped(tmp_path, end):
    Answers(tmp_path, {}).add({"item": "a-0", "policy": "full"})
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write(end)
    again = Answers(tmp_path, {})
    assert list(again.rows) == [("a-0", "full")]
    again.add({"item": "a-1", "policy": "full"})
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["item"] for line in lines] == ["a-0", "a-1"]


def test_another_run_is_refused_by_what_differs(tmp_path):
    Answers(tmp_path, {"model": "a", "seed": 1, "keys": 0.05})
    with pytest.raises(RequestError, match=r"other settings \(keys, seed\); name another"):
        Answers(tmp_path, {"model": "a", "seed": 2, "keys": 0.1})
