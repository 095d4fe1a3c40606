"""`aj.chat`: ids of earlier turns stay, and each turn is what the template prints of it."""

import datetime

import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax.conversation import Chat
from alaya_jax.errors import RequestError, TokenizerError

DATED = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\n"
    "Today: {{ strftime_now('%d %b %Y') }}\n<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


@pytest.fixture(scope="module")
def model(llama3):
    return aj.load(llama3(DATED), progress=False)


@pytest.fixture
def db(open_db, model):
    return open_db(model)


def expected(model, chat, answers):
    """The template's text cut at the answers, each part encoded; the answers' own ids between."""
    marks = [f"\ue000{i}\ue001" for i in range(len(answers))]
    told = iter(marks)
    turns = [
        m if m["role"] != "assistant" else {**m, "content": next(told, "")} for m in chat.messages
    ]
    day = datetime.date(2026, 11, 27)
    text, ids = str(model.chat.render(turns[:-1], date=day)), []
    for mark, answer in zip(marks, answers, strict=False):
        before, _, text = text.partition(mark)
        ids += [*model.encode(before, add_special_tokens=False), *answer]
    return [*ids, *model.encode(text, add_special_tokens=False)]


def test_turns_keep_ids_and_the_template(db, model):
    chat = aj.chat(
        db, system="Be brief.", date=datetime.date(2026, 11, 27), max_new_tokens=6,
        attention=aj.Full(),
    )  # fmt: skip
    answers = []
    first = chat.say("Name a river.")
    answers.append([token.id for token in first])
    assert first.text == chat.messages[-1]["content"] == first.generation.text
    before = chat.ids
    for token in chat.say("Another?"):  # left after two tokens
        answers.append([*(answers.pop() if len(answers) == 2 else []), token.id])
        if len(answers[-1]) == 2:
            break
    np.testing.assert_array_equal(chat.ids[: len(before)], before)
    chat.say("never read")
    answers.append([])
    third = chat.say("And now?")
    answers.append([token.id for token in third])
    assert [m["role"] for m in chat.messages] == ["system", *["user", "assistant"] * 4]
    assert chat.ids.tolist() == [*expected(model, chat, answers[:3]), *answers[3]]
    assert (chat.ids == model.tokenizer.bos_id).sum() == 1
    # What was said to say() is what a session of those very ids goes on with.
    session, rest = db.create_session(chat.ids[: -len(answers[3])])
    again = list(aj.generate(session, rest, max_new_tokens=6))
    assert [token.id for token in again] == answers[3]

    other = chat.fork()
    more = [token.id for token in chat.go_on(max_new_tokens=2)]
    same = [token.id for token in other.go_on(max_new_tokens=2)]
    assert more == same
    assert len(more) == 2
    assert chat.messages == other.messages
    assert chat.messages[-1]["content"].startswith(third.generation.text)
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    assert chat.say("Name a river.").read() == first.generation.text
    chat.close()
    assert other.say("Still there?", max_new_tokens=1).read() == other.messages[-1]["content"]


def test_an_end_of_turn_comes_once(db, model):
    """The id that ended an answer is the template's own then: it is not said twice."""
    chat = aj.chat(db, max_new_tokens=3)
    chat.say("One.").read()
    end = model.tokenizer.eos_ids[0]
    chat.session.batch.pending[0] = [end]  # as if the model had ended here
    with pytest.raises(RequestError, match="the answer has ended"):
        chat.go_on()
    with pytest.raises(RequestError, match="exceed"):
        chat.say("Two.", max_new_tokens=100_000)
    assert chat.session.batch.pending[0] == [end]
    assert len(chat.messages) == 2
    turns = (chat.ids == end).sum()
    chat.say("Two <|eot_id|>.").read()
    assert (chat.ids == end).sum() == turns + 1  # the user's own turn has one too


def test_a_model_gets_a_database_that_goes_with_the_chat(model):
    from pathlib import Path

    chat = aj.chat(model, budget=aj.Budget(device="2MiB"))
    place = Path(chat._home.db.path)
    assert place.is_dir()
    assert isinstance(chat, Chat)
    fork = chat.fork()
    del chat
    assert place.is_dir()
    del fork
    assert not place.exists()


def test_what_is_refused(db, tiny_model):
    for wrong in ("db", None):
        with pytest.raises(RequestError, match="give a model"):
            aj.chat(wrong)
    with pytest.raises(RequestError, match="has its budget"):
        aj.chat(db, budget=aj.Budget(device="2MiB"))
    with pytest.raises(TokenizerError, match="no chat template"):
        aj.chat(tiny_model)
    chat = aj.chat(db)
    with pytest.raises(RequestError, match="nothing was said"):
        chat.go_on()
    with pytest.raises(RequestError, match="takes a text"):
        chat.say(["Hi"])
    assert chat.messages == []
    assert len(chat.ids) == 0
