"""What heads need, against numpy; where it is kept; `Auto` in a session."""

import dataclasses
import json

import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax.errors import PlanError, RequestError
from alaya_jax.models import llama
from alaya_jax.query import calibration
from alaya_jax.query.calibration import Calibration
from alaya_jax.query.cost import Machine

WINDOW = aj.Window(sink=4, recent=12)
MACHINE = Machine("paper", 1e10, 1e11, 1e10, 1e-4, 1e-4, 5e-6, 1e-6, 1e-9, 1e-6)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ALAYA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def machine(monkeypatch):
    """Retrieval is always faster here than to read every key."""
    monkeypatch.setattr("alaya_jax.query.situation.machine_for", lambda *_, **__: MACHINE)


@pytest.fixture(scope="session")
def queries_and_keys(tiny_model):
    """Function: queries [L, H, n, D] and keys [L, H, n, D] of a text, no cache."""

    def of(tokens):
        found = []

        def attend(layer, q, k, v, state):
            found.append([np.moveaxis(np.asarray(x[0], np.float64), 1, 0) for x in (q, k)])
            return llama.causal_attend(layer, q, k, v, state)

        at = np.arange(len(tokens))[None]
        llama.forward(tiny_model.params, tiny_model.config, np.asarray(tokens)[None], at, attend)
        return [(q, np.repeat(k, 2, 0)) for q, k in found]

    return of


@pytest.fixture(scope="session")
def calibrated(tiny_model):
    rng = np.random.default_rng(3)
    tokens = rng.integers(3, 256, 128)
    options = {"queries": 4, "window": WINDOW, "save": False}
    return tokens, aj.calibrate(tiny_model, [tokens], **options)


def test_keys_that_heads_need(calibrated, queries_and_keys):
    """The sampled queries are drawn as the function draws them; the rest is definitions."""
    tokens, found = calibrated
    assert found.lengths == (32, 64, 128)
    assert found.queries == (4, 4, 4)
    rng = np.random.default_rng(0)
    at = {n: np.sort(rng.integers(int(0.9 * n), n, 4)) for n in found.lengths}
    for layer, (q, k) in enumerate(queries_and_keys(tokens)):
        needs = np.zeros((3, 3, 4, 4))  # recoveries, lengths, heads, queries
        for j, n in enumerate(found.lengths):
            for i, position in enumerate(at[n]):
                keys = k[:, : position + 1]
                scores = np.einsum("hd,hsd->hs", q[:, position], keys) / 4
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                weights /= weights.sum(-1, keepdims=True)
                inside = np.arange(position + 1) < 4
                inside |= np.arange(position + 1) > position - 12
                order = np.sort(np.where(inside, -1.0, weights), axis=-1)[:, ::-1]
                order = np.maximum(order, 0)
                mass = weights[:, inside].sum(-1)[:, None] + np.cumsum(order, axis=-1)
                for r, p in enumerate(found.recoveries):
                    enough = weights[:, inside].sum(-1) >= p
                    needs[r, j, :, i] = np.where(enough, 0, 1 + np.argmax(mass >= p, axis=-1))
        np.testing.assert_allclose(found.keys[:, :, layer], needs.mean(-1), atol=0.26)
    # One head's keys at least, both heads' at most.
    by_group = found.keys.reshape(3, 3, 2, 2, 2)
    assert (found.read >= by_group.max(-1)).all()
    assert (found.read <= by_group.sum(-1)).all()
    assert (found.read < by_group.sum(-1)).any()
    assert (np.diff(found.keys, axis=0) >= 0).all(), "more mass takes more keys"
    assert (np.diff(found.beta, axis=0) >= 0).all()


def test_its_beta_keeps_the_recovery(calibrated, queries_and_keys):
    """Of the text that it was measured on, nearly always: all queries, not only those sampled."""
    tokens, found = calibrated
    held = []
    for layer, (q, k) in enumerate(queries_and_keys(tokens)):
        beta = found.beta_for(layer, 0.9)[:, None]
        for position in range(28, 128):
            scores = np.einsum("hd,hsd->hs", q[:, position], k[:, : position + 1])
            weights = np.exp((scores - scores.max(-1, keepdims=True)) / 4)
            at = np.arange(position + 1)
            kept = (at < 4) | (at > position - 12) | (scores >= scores.max(-1)[:, None] - beta)
            held.append(np.where(kept, weights, 0).sum(-1) / weights.sum(-1))
    assert np.mean(np.array(held) >= 0.9) > 0.85
    assert np.mean(np.array(held) >= 0.97) < 0.85, "it keeps more than it was asked to"


def test_texts_that_are_too_short(tiny_model):
    with pytest.raises(RequestError, match=r"longest text has 100 tokens .* need 1,280"):
        aj.calibrate(tiny_model, [np.full(100, 5)])
    with pytest.raises(RequestError, match="recoveries"):
        aj.calibrate(tiny_model, [np.full(100, 5)], recoveries=(0.9, 1.0))


def test_where_it_is_kept(calibrated, tmp_path):
    _, found = calibrated
    beside, cached = calibration.places("tiny", tmp_path)
    assert beside.parent == tmp_path
    assert calibration.places("tiny", None) == [cached]
    assert calibration.find("tiny", tmp_path) is None
    assert calibration.keep(found, None) == cached
    assert calibration.find("tiny", tmp_path).to_dict() == found.to_dict()
    other = dataclasses.replace(found, queries=(1, 1, 1))
    assert calibration.keep(other, tmp_path) == beside
    assert calibration.find("tiny", tmp_path).queries == (1, 1, 1)
    assert calibration.find("another", tmp_path) is None
    # A directory of others' is left alone.
    file = tmp_path / "file"
    file.write_text("")
    assert calibration.keep(found, file) == cached
    beside.write_text("{}")
    with pytest.raises(RequestError, match=beside.name):
        calibration.find("tiny", tmp_path)
    assert "keys for 0.95" in str(Calibration.load(cached).table())


def test_auto_in_a_session(db, machine, calibrated, rng):
    """Generation by `Auto` is generation by the plans that it chose; it says why."""
    prompt = rng.integers(3, 256, 100)
    auto = aj.Auto(recovery=0.9, window=WINDOW)
    session, rest = db.create_session(prompt)
    before = session.explain(attention=auto)
    assert "SmolLM2" in before.choice.basis
    assert before.planned[0]["predicted_seconds"] == before.choice.layers[0].seconds
    tokens = [
        t.id for t in aj.generate(session, rest, max_new_tokens=4, attention=auto, prefill=auto)
    ]
    found = session.explain()
    chosen = aj.Plan(aj.DIPR(recovery=0.9, window=WINDOW), aj.Sketch())
    assert found.phases["decode"].plans == chosen
    assert found.phases["prefill"].plans == aj.Plan(aj.Full())
    assert found.choice.plans == chosen
    json.dumps(found.to_dict())
    other, rest = db.create_session(prompt)
    assert tokens == [t.id for t in aj.generate(other, rest, max_new_tokens=4, attention=chosen)]
    # With a calibration, another basis.
    calibration.keep(calibrated[1], None)
    assert "calibrated on 12 queries" in other.explain(attention=auto).choice.basis
    # What was chosen once says nothing of another plan.
    assert other.explain(attention=aj.TopK(3)).choice is None


def test_auto_in_a_model_of_your_own_and_refused(db, machine, rng):
    session, rest = db.create_session(rng.integers(3, 256, 40))
    session.prefill(rest)
    k, q = np.zeros((1, 1, 2, 16), np.float32), np.zeros((1, 1, 4, 16), np.float32)
    session.update(None, k, k, 0)
    out = session.attention(q, 0, aj.Auto(window=WINDOW))
    assert out.shape == q.shape
    assert isinstance(session.choice.plans.query, aj.DIPR)
    free = db.pool.free_tokens
    session.update(None, k, k, 1)
    with pytest.raises(PlanError, match=r"Auto\(tpot=1e-06.*Nearest"):
        aj.generate(session, [5], attention=aj.Auto(tpot=1e-6))
    assert db.pool.free_tokens == free
