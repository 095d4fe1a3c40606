"""A run on the tiny model: policies at equal keys, measured beside full attention, and resumed."""

import dataclasses
import json

import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax.errors import RequestError
from alaya_jax.evaluation import compared, report
from alaya_jax.evaluation.measure import Asked
from alaya_jax.evaluation.run import Run
from alaya_jax.evaluation.suite import SUITES, Source, Suite, prompt_ids, shared_ids, texts
from alaya_jax.evaluation.summary import summarize
from alaya_jax.evaluation.tasks import retrieval

SUITE = Suite("tiny", (1100,), (), 1, 0, 0, 2)


@pytest.fixture(scope="module")
def answered(tiny_model, tmp_path_factory):
    """A whole run, and where it is."""
    out = tmp_path_factory.mktemp("run") / "out"
    model = dataclasses.replace(tiny_model, max_length=2048, fingerprint="tiny")
    run = Run(model, SUITE, names=("recovery", "infllm"), keys=0.1)
    return run, out, run.into(out)


@pytest.fixture
def asked(db, rng):
    """A question whose prompt is in the cache, but for its last token."""
    item = retrieval.passkey(len, 600, 1, 3)[0]
    ids = prompt_ids(db.model, item)
    session, rest = db.create_session(ids)
    with session:
        session.prefill(rest[:-1])
        asked = Asked(session, int(rest[-1]), item)
        yield asked, ids, item
        asked.close()
    assert db.pool.free_tokens == 1024


def test_full_attention_beside_itself(asked, greedy, all_logits, db):
    asked, ids, item = asked
    expected = asked.expected()
    found = asked.under(aj.Full(), expected)
    assert found.mass == np.ones_like(found.mass).tolist()
    assert max(found.kl) < 1e-5
    assert found.top1 == 1
    assert found.keys == found.keys_all == pytest.approx(found.visible)
    assert found.visible == pytest.approx(len(ids) + (item.most - 1) / 2, abs=0.01)


def test_the_distributions_are_the_models_own(tiny_model, db, rng, all_logits):
    item = dataclasses.replace(retrieval.passkey(len, 600, 1, 3)[0], context="Once upon a time")
    ids = prompt_ids(db.model, item)
    session, rest = db.create_session(ids)
    with session:
        session.prefill(rest[:-1])
        asked = Asked(session, int(rest[-1]), item)
        expected = asked.expected()
        asked.close()
    logits = all_logits([*ids, *expected.ids[:-1]])[len(ids) - 1 :]
    logits = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    np.testing.assert_allclose(expected.logprobs, logits, atol=1e-3)


def test_a_window_reads_less_and_differs(asked):
    asked, _ids, _item = asked
    found = asked.under(aj.Window(sink=4, recent=8), asked.expected())
    assert found.keys == 12
    assert np.mean(found.mass) < 0.9
    assert np.mean(found.kl) > 0.01
    assert np.mean(found.error) > 0.05


def test_policies_read_about_equally_many_keys(answered):
    _, _, (_answers, summary) = answered
    rows = {row["policy"]: row for row in summary.policies}
    assert list(rows) == ["full", "infllm", "recovery"]
    assert rows["full"]["keys_share"] == 1
    want = (80 + 112) / 1000
    assert rows["infllm"]["keys_share"] == pytest.approx(want, rel=0.1)
    assert want / 2 < rows["recovery"]["keys_share"] < want * 2, "found on another text"
    assert rows["recovery"]["mass"] > rows["infllm"]["mass"]
    assert (summary.questions, summary.done, summary.total) == (2, 6, 6)


def test_a_share_is_found_that_reads_so_many_keys(db):
    session, rest = db.create_session(prompt_ids(db.model, retrieval.passkey(len, 600, 1, 3)[0]))
    with session:
        session.prefill(rest)
        steps = []
        found = compared.settings_of(("full", "infllm", "recovery"), [session], 0.2, steps.append)
        keys = compared.keys_of(0.2, session.length, 16)
        assert found["full"] == {}
        assert found["infllm"] == {"keys": keys}
        asked = compared.compared("recovery", db.model.config, found["recovery"]).attention
        read = session.explain(analyze=True, attention=asked).analysis.attended.mean()
    assert read - 80 == pytest.approx(keys, rel=0.2), "it grows by steps"
    assert sum(steps) == compared.steps_of(tuple(found))


def test_each_answer_has_a_line_that_says_what_was_found(answered):
    _, out, (answers, _) = answered
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == len(answers.rows) == 6
    line = next(line for line in lines if line["policy"] == "infllm")
    assert line["settings"] == {"keys": 112}
    assert np.shape(line["mass"]) == np.shape(line["error"])
    assert 0 < line["keys"] < line["visible"]
    assert not (out / "contexts.db").exists()


def test_a_run_that_lost_some_answers_asks_only_these(answered, monkeypatch):
    run, out, (answers, _) = answered
    lines = (out / "answers.jsonl").read_bytes().splitlines(keepends=True)
    (out / "answers.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:20])
    under, counted = Asked.under, []

    def counting(self, *arguments):
        counted.append(arguments)
        return under(self, *arguments)

    monkeypatch.setattr(Asked, "under", counting)
    again, summary = run.into(out)
    assert len(counted) == 2
    for key, row in answers.rows.items():
        known = {name: value for name, value in row.items() if name != "seconds"}
        assert {n: v for n, v in again.rows[key].items() if n != "seconds"} == known
    assert (summary.done, summary.total) == (6, 6)


def test_the_page_is_one_file_with_all_of_it(answered):
    _run, _, (answers, summary) = answered
    page = report.page(summary, answers.rows.values(), answers.settings)
    assert page.count("<svg") == 2
    for name in ("full", "infllm", "recovery", "passkey", "McNemar"):
        assert name in page
    assert "<script" not in page
    assert 'src="' not in page
    assert page == report.page(summary, answers.rows.values(), answers.settings)


def test_another_run_is_not_mixed_in(answered):
    run, out, _ = answered
    with pytest.raises(RequestError, match=r"other settings \(questions, seed\)"):
        dataclasses.replace(run, seed=2).into(out)


def test_texts_without_sources_are_left_out(answered):
    run, _, _ = answered
    suite = Suite("tiny", (1400,), (("niah_single_1", 1), ("niah_single_2", 1)), 1, 0, 1, 2)
    found = texts(suite, run.model, Source(), 1)
    assert [text.name for text in found] == ["passkey-1400-0", "niah_single_1-1400-0"]
    with_essay = texts(suite, run.model, Source(essay="It rains. " * 400), 1)
    assert [text.name for text in with_essay][-1] == "niah_single_2-1400-0"


def test_prompts_about_a_text_share_it(answered):
    run, _, _ = answered
    (text, *_) = texts(run.suite, run.model, Source(), 1)
    rows = [prompt_ids(run.model, item) for item in text.items]
    shared = shared_ids(rows)
    assert len(shared) >= len(text.items[0].context)
    for row in rows:
        assert row[: len(shared)].tolist() == shared.tolist()
        assert len(row) - len(shared) >= 2


def test_what_comes_to_the_same_is_asked_once(asked):
    asked, *_ = asked
    expected = asked.expected()
    full = asked.under(aj.Full(), expected)
    assert asked.under(aj.Plan(aj.Full()), expected) is full
    assert asked.under(aj.Window(sink=4, recent=8), expected) is not full


def test_what_is_not_to_be_had(tiny_model):
    model = dataclasses.replace(tiny_model, max_length=2048, fingerprint="tiny")
    with pytest.raises(RequestError, match=r"policies best: use some of full, streaming_llm"):
        Run(model, SUITE, names=("best",))
    with pytest.raises(RequestError, match=r"keys=1\.5"):
        Run(model, SUITE, keys=1.5)
    with pytest.raises(RequestError, match=r"shortest items have 4,096 tokens"):
        Run(model, SUITES["full"])


@pytest.mark.parametrize("name", compared.NAMES)
def test_every_policy_has_the_window_of_all(name, tiny_model):
    settings = {"alayadb": {"beta": 9.0}, "recovery": {"recovery": 0.8}}
    given = settings.get(name, {} if name in ("full", "auto") else {"keys": 32})
    found = compared.compared(name, tiny_model.config, given)
    plans = found.attention if isinstance(found.attention, tuple) else [found.attention]
    for plan in plans:
        query = getattr(plan, "query", plan)
        if name == "streaming_llm":
            assert query == aj.Window(16, 96)
        elif not isinstance(query, aj.Full):
            assert query.window == compared.WINDOW


def test_no_such_policy(tiny_model):
    with pytest.raises(RequestError, match="policy 'best': use some of full"):
        compared.compared("best", tiny_model.config, {})


def test_keys_are_whole_pages():
    assert compared.keys_of(0.05, 2000, 16) == 96
    assert compared.keys_of(0.001, 2000, 16) == 16
    assert summarize([], compared.NAMES, 0).done == 0
