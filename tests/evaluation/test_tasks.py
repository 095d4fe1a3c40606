"""Items, how answers are judged, and tasks that have several questions about a text."""

import json

import pytest

from alaya_jax.errors import RequestError
from alaya_jax.evaluation.tasks import legal, retrieval, vocabulary
from alaya_jax.evaluation.tasks.item import score


@pytest.mark.parametrize(
    ("scorer", "said", "answers", "expected"),
    [
        ("all", "The PARIS of old", ["Paris"], 1),
        ("all", "red and blue", ["red", "green", "blue", "white"], 0.5),
        ("any", "red and blue", ["green", "blue"], 1),
        ("any", "red", ["green"], 0),
        ("first", " 4 and 12", ["4"], 1),
        ("first", " 12, not 4", ["4"], 0),
        ("first", " 4.2.", ["4.2"], 1),
        ("first", "", ["4"], 0),
    ],
)
def test_scores(scorer, said, answers, expected):
    assert score(scorer, said, answers) == expected


def test_an_unknown_scorer():
    with pytest.raises(RequestError, match="use 'all', 'any' or 'first'"):
        score("some", "", ["a"])  # type: ignore[arg-type]


def test_words_are_different_and_enough():
    words = vocabulary.own()
    assert min(len(words.nouns), len(words.adjectives), len(words.verbs)) > 80
    assert len(words.pairs) == len(set(words.nouns)) * len(set(words.adjectives))
    assert all(word.isalpha() and word.islower() for word in words.all)


@pytest.mark.parametrize("task", [retrieval.passkey, retrieval.key_values])
@pytest.mark.parametrize("length", [1200, 5000])
def test_facts_stand_in_a_text_of_the_length_once(task, length):
    items = task(len, length, 4, 3)
    assert len(items) == 4
    (context,) = {item.context for item in items}
    assert length - 400 < len(items[0].text) + items[0].most <= length
    for item in items:
        (answer,) = item.answers
        assert context.count(answer) == 1
        assert item.depth == pytest.approx(context.index(answer) / len(context), abs=0.05)
        assert item.score(f"{answer}, I think") == 1
        assert item.score("I do not know") == 0
    depths = sorted(item.depth for item in items)
    assert depths[-1] - depths[0] > 0.5
    assert items == task(len, length, 4, 3) != task(len, length, 4, 4)


def test_the_fact_that_is_asked_for_is_the_one_that_is_told():
    for item in retrieval.passkey(len, 2000, 6, 5):
        name = item.question.removeprefix("What is the ").removesuffix("?")
        assert f"The {name} is {item.answers[0]}. Remember it." in item.context
        assert item.opening == f" The {name} is"
    for item in retrieval.key_values(len, 2000, 3, 5):
        pairs = json.loads(item.context.split("\n\n", 1)[1])
        key = item.question.split('"')[1]
        assert pairs[key] == item.answers[0]


@pytest.mark.parametrize("task", [retrieval.passkey, retrieval.key_values])
def test_a_length_that_holds_nothing(task):
    with pytest.raises(RequestError, match="no item of 150 tokens"):
        task(len, 150, 1, 0)


@pytest.mark.parametrize("questions", [0, 7])
def test_more_questions_than_facts(questions):
    with pytest.raises(RequestError, match="from 1 to 6"):
        retrieval.passkey(len, 2000, questions, 0)


LICENSE = """---
key: {key}
name: {name}
{more}---

Copyright (c) 2001, 2003 {owner}. All rights reserved.

1. Definitions.

“Work” means any thing that a person has made and that is set down here.

2. Grant of rights

Whoever takes the {key} may use it, as Section 3 allows.

3. Termination.

It ends where a term is broken. {key}
"""


@pytest.fixture
def licenses(tmp_path):
    """Four licenses, one of them in French, and one with nothing to ask about."""
    owners = {"ash": "Ash Works", "birch": "Birch and Sons", "cedar": "Cedar Trust"}
    for key, owner in owners.items():
        text = LICENSE.format(key=key, name=f"{key.title()} License", owner=owner, more="")
        (tmp_path / f"{key}.LICENSE").write_text(text)
    french = LICENSE.format(key="x", name="Licence", owner="Moi Meme", more="language: fr\n")
    (tmp_path / "french.LICENSE").write_text(french)
    (tmp_path / "short.LICENSE").write_text("---\nname: Short\n---\nDo as you like.")
    return tmp_path


def test_legal_questions_have_their_answers_where_they_say(licenses):
    items = legal.items(licenses, len, 4000, 40, 1)
    assert {item.task for item in items} == {f"legal_{kind}" for kind in legal.KINDS}
    (context,) = {item.context for item in items}
    assert context.count("===") == 6
    asked = {(item.question, *item.answers) for item in items}
    assert asked >= {
        ("In the Ash License, what is the title of section 3?", "Termination"),
        ("How does the Birch License define “Work”?", "any thing that a person has made and"),
        ("Who holds the copyright according to the Cedar License?", "Cedar Trust"),
        (
            "In the Ash License, to which other section does section 2 (Grant of rights) refer?",
            "3",
        ),
    }
    assert len(items) == 3 * (3 + 1 + 1 + 1)
    for item in items:
        at = int(item.depth * len(context))
        assert item.answers[0] in context[at : at + 160]
        owner = item.question.split(" License")[0].split()[-1]
        assert context.rindex("===", 0, at) > context.index(f"=== {owner}")


def test_kinds_of_legal_questions_take_turns(licenses):
    items = legal.items(licenses, len, 4000, 4, 1)
    assert [item.task for item in items] == [f"legal_{kind}" for kind in legal.KINDS]
    one = legal.items(licenses, len, 700, 9, 1)
    assert one[0].context.count("===") == 2


def test_no_legal_texts(tmp_path, licenses):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match=r"no English \*\.LICENSE file"):
        legal.items(tmp_path / "empty", len, 4000, 4, 1)
    with pytest.raises(RequestError, match="no item of 200 tokens"):
        legal.items(licenses, len, 200, 4, 1)
