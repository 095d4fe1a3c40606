"""What a table says of answers, reckoned by hand."""

import pytest

from alaya_jax.evaluation.summary import summarize


def row(item, policy, score, *, keys=10.0, mass=0.5, kl=0.1, task="t"):
    return {
        "item": item,
        "policy": policy,
        "task": task,
        "text": item[0],
        "score": score,
        "keys": keys,
        "keys_all": 2 * keys,
        "visible": 100.0,
        "mass": [[mass, 1.0]],
        "error": [[0.1, 0.3]],
        "kl": [kl, 3 * kl],
        "top1": 0.5,
        "seconds": 1.0,
    }


@pytest.fixture
def rows():
    scores = {
        "full": [1, 1, 1, 0.5, 0],
        "quest": [1, 0, 0, 1, 1],
        "recovery": [1, 1, 0, 0, 0],
    }
    return [
        row(f"{'aabbc'[i]}{i}", name, score, task="t" if i < 3 else "u")
        for name, found in scores.items()
        for i, score in enumerate(found)
    ]


def test_what_full_attention_fails_is_left_out(rows):
    summary = summarize(rows, ("full", "quest", "recovery"), 20)
    assert (summary.questions, summary.answered) == (5, 3)
    assert (summary.done, summary.total) == (15, 20)
    full, quest, recovery = summary.policies
    assert full["score"] == full["retention"] == 1
    assert quest["score"] == pytest.approx(1 / 3)
    assert quest["score_all"] == pytest.approx(3 / 5)
    assert quest["retention"] == pytest.approx(3 / 3.5)
    assert quest["difference"] == pytest.approx(-0.1)
    assert quest["difference_95"][0] <= -0.1 <= quest["difference_95"][1]
    assert (quest["lost_to_reference"], quest["gained_on_reference"], quest["p"]) == (1, 0, 1.0)
    assert recovery["score"] == pytest.approx(2 / 3)
    assert recovery["p"] is None
    assert summary.tasks == [
        {
            "task": "t",
            "questions": 3,
            "answered": 3,
            "score": {"full": 1.0, "quest": pytest.approx(1 / 3), "recovery": pytest.approx(2 / 3)},
        },
        {
            "task": "u",
            "questions": 2,
            "answered": 0,
            "score": {"full": None, "quest": None, "recovery": None},
        },
    ]


def test_what_was_read(rows):
    quest = summarize(rows, ("full", "quest"), 10).policies[1]
    assert quest["keys_share"] == pytest.approx(0.1)
    assert quest["keys_all_share"] == pytest.approx(0.2)
    assert quest["mass"] == pytest.approx(0.75)
    assert quest["mass_worst"] == pytest.approx(0.5)
    assert quest["error"] == pytest.approx(0.2)
    assert quest["kl"] == pytest.approx(0.2)
    assert quest["kl_worst"] == pytest.approx(0.3)
    assert quest["top1"] == 0.5
    assert quest["p"] is None, "there is nothing to compare with"


def test_a_run_that_has_just_begun():
    summary = summarize([row("a0", "full", 0.0)], ("full", "quest"), 8)
    assert [p["policy"] for p in summary.policies] == ["full"]
    assert summary.policies[0]["score"] is None
    assert "1 that it fails are left out" in str(summary.table())
    assert summarize([], ("full",), 8).policies == []


def test_the_table_fits_a_terminal(rows):
    lines = str(summarize(rows, ("full", "quest", "recovery"), 20).table()).splitlines()
    table = lines[: next(i for i, line in enumerate(lines) if line.startswith("keys:"))]
    assert len(table) == 5
    assert max(map(len, table)) <= 80
