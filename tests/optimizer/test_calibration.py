"""What heads need, against numpy; where it is kept; `Auto` in a session."""

import dataclasses
import json

import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax.errors import PlanError, RequestError
from alaya_jax.models import llama
from alaya_jax.optimizer import calibration
from alaya_jax.optimizer.calibration import Calibration
from alaya_jax.optimizer.cost import Machine
from alaya_jax.optimizer.prefill import PrefillMachine

WINDOW = aj.Window(sink=4, recent=12)
MACHINE = Machine("paper", 1e10, 1e11, 1e10, 1e-4, 1e-4, 5e-6, 1e-6, 1e-9, 1e-6)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ALAYA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def machine(monkeypatch):
    """Retrieval is always faster here than to read every key."""
    monkeypatch.setattr("alaya_jax.optimizer.situation.machine_for", lambda *_, **__: MACHINE)


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
        in_pages = np.zeros((3, 3, 2, 4))
        within = np.zeros((2, len(found.ranges), 3, 4, 4))  # of a head; of its group
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
                # Pages of 16, whole, by their mass; what either head of a group needs.
                by_page = np.zeros((4, 128))
                by_page[:, : position + 1] = np.where(inside, 0.0, weights)
                by_page = by_page.reshape(4, 8, 16).sum(-1)
                for r, p in enumerate(found.recoveries):
                    wanted = np.zeros((4, 8), bool)
                    for head in range(4):
                        have = weights[head, inside].sum()
                        for page in np.argsort(-by_page[head]):
                            if have >= p:
                                break
                            wanted[head, page] = True
                            have += by_page[head, page]
                    in_pages[r, j, :, i] = 16 * wanted.reshape(2, 2, 8).any(1).sum(-1)
                raw = 4 * scores
                for r, beta in enumerate(found.ranges):
                    kept = (raw >= raw.max(-1, keepdims=True) - beta) & ~inside
                    within[0, r, j, :, i] = kept.sum(-1)
                    union = kept.reshape(2, 2, -1).any(1).sum(-1)
                    within[1, r, j, :, i] = np.repeat(union, 2)
        np.testing.assert_allclose(found.keys[:, :, layer], needs.mean(-1), atol=0.26)
        np.testing.assert_allclose(found.pages[:, :, layer], in_pages.mean(-1), atol=4.1)
        alone, together = within.mean(-1)
        np.testing.assert_allclose(found.in_range[:, :, layer], alone, atol=0.26)
        np.testing.assert_allclose(found.read_in_range[:, :, layer], together[..., ::2], atol=0.26)
        # What is read off between the ranges lies between the counts around them.
        beta = found.beta_near(layer, 0.93)
        kept = found.within(layer, 0.93, 128)
        place = np.searchsorted(found.ranges, beta)  # the first range that is not narrower
        low = np.mean([alone[max(i - 1, 0), -1, h] for h, i in enumerate(place)])
        high = np.mean([alone[min(i, 14), -1, h] for h, i in enumerate(place)])
        assert low - 0.26 <= kept.attended <= high + 0.26
        assert kept.attended <= kept.read + 0.26
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


def test_what_a_reader_sees(calibrated):
    """Not its arrays, a million numbers of a large model."""
    _, found = calibrated
    assert len(repr(found)) < 100
    assert f"{found.lengths[-1]:,}" in repr(found)
    assert str(found) == str(found.table())
    assert found._repr_html_() == found.table().to_html()


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


GRAPH = aj.Graph(degree=8, listed=16, sink=0)
WALKS = dataclasses.replace(MACHINE, sketch=1e-5, walk=1e-6, visit=1e-9)


@pytest.fixture
def walks(monkeypatch):
    """A machine on which a graph is faster than anything else, as long as all is in it."""
    monkeypatch.setattr("alaya_jax.optimizer.situation.machine_for", lambda *_, **__: WALKS)


@pytest.mark.slow
def test_auto_asks_the_graph_of_a_context(db, walks, calibrated, rng):
    document = rng.integers(3, 256, 90)
    context = db.build_index(db.import_context(document), GRAPH)
    auto = aj.Auto(recovery=0.9, window=WINDOW)
    session, rest = db.create_session([*document, 77])
    asked = session.explain(attention=auto).choice
    assert "no calibration" in asked.graph
    assert asked.plans.index == aj.Flat()
    calibration.keep(calibrated[1], None)
    tokens = [t.id for t in aj.generate(session, rest, max_new_tokens=4, attention=auto)]
    found = session.explain(analyze=True)
    plans = found.choice.plans
    for layer, plan in enumerate(plans):
        assert plan.index == GRAPH
        beta = calibrated[1].beta_for(layer, 0.9)
        np.testing.assert_allclose(plan.query.beta, beta, atol=1e-3)
    assert found.analysis.wanted == 0.9
    assert "estimates no mass" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["choice"]["graph"]
    other, rest = db.create_session([*document, 77])
    assert tokens == [t.id for t in aj.generate(other, rest, max_new_tokens=4, attention=plans)]
    # A stored session has no graph of its own and is lent one, which knows its beginning only.
    stored = db.store(session)
    session.close()
    again, _ = db.create_session([*stored.tokens, 5])
    assert again.context is stored
    assert again.batch.graphs.known() == (GRAPH, 90)
    assert {x.index for x in again.explain(attention=auto).choice.plans} == {GRAPH}
    assert again.explain(
        attention=aj.Auto(recovery=0.9, window=WINDOW, graph=False)
    ).choice.plans == aj.Plan(aj.DIPR(recovery=0.9, window=WINDOW), aj.Flat())
    assert db.create_session([7, 8, 9])[0].batch.graphs.known() == (None, 0)
    # Of a batch all must have one; it knows as much as it knows of each.
    both, _ = db.create_session([[*document, 5], [*document[:60], 5]])
    assert both.batch.graphs.known() == (GRAPH, 60)
    one, _ = db.create_session([[*document, 5], [7, 8, 9]])
    assert one.batch.graphs.known() == (None, 0)
    assert context.indexes == (GRAPH,)


@pytest.mark.slow
def test_only_layers_that_ask_a_graph_have_it_in_memory(db, rng):
    document = rng.integers(3, 256, 90)
    context = db.build_index(db.import_context(document), GRAPH)
    through = aj.Plan(aj.DIPR(beta=5.0, window=WINDOW), GRAPH)
    session, rest = db.create_session([*document, 77])
    list(aj.generate(session, rest, max_new_tokens=2, attention=[aj.Full(), through]))
    assert list(context._graph[1]) == [(1, None)]


@pytest.mark.slow
def test_a_prefill_by_auto(db, machine, monkeypatch, rng):
    prompt = rng.integers(3, 256, 100)
    fast = PrefillMachine("paper", full=1e-6, tile=1e-6, select=1e-9)
    calls = []
    monkeypatch.setattr(
        "alaya_jax.optimizer.situation.prefill_for", lambda *_, **__: calls.append(1) or fast
    )
    monkeypatch.setattr("alaya_jax.optimizer.prefill._DENSITY", ((0.1, 0.1, 0.1),) * 4)
    chosen = {}
    for kind in ("dense", "sparse"):
        session, rest = db.create_session(prompt)
        auto = aj.Auto(recovery=0.9, window=WINDOW, prefill=kind)
        list(aj.generate(session, rest, max_new_tokens=2, attention=auto))
        found = session.explain()
        chosen[kind] = found.phases["prefill"].plans
        told = json.loads(json.dumps(found.to_dict()))["prefill_choice"]
        if kind == "dense":
            assert told is None
            assert calls == []
        else:
            assert told["others"].keys() == {"Full()", "Tiles()"}
            assert "predicted attention" in str(found)
            # What was chosen once says nothing of another prefill.
            session.prefill([5, 6], aj.Tiles(recovery=0.5))
            assert session.explain().prefill is None
    assert chosen == {"dense": aj.Plan(aj.Full()), "sparse": aj.Plan(aj.Tiles(recovery=0.9))}


def test_auto_in_a_model_of_your_own_and_refused(db, machine, rng):
    session, rest = db.create_session(rng.integers(3, 256, 40))
    session.prefill(rest)
    k, q = np.zeros((1, 1, 2, 16), np.float32), np.zeros((1, 1, 4, 16), np.float32)
    session.update(None, k, k, 0)
    out = session.attention(q, 0, aj.Auto(window=WINDOW))
    assert out.shape == q.shape
    assert isinstance(session.account.choice.plans.query, aj.DIPR)
    free = db.pool.free_tokens
    session.update(None, k, k, 1)
    with pytest.raises(PlanError, match=r"Auto\(tpot=1e-06.*Nearest"):
        aj.generate(session, [5], attention=aj.Auto(tpot=1e-6))
    assert db.pool.free_tokens == free
