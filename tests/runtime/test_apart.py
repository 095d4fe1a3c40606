"""A cache on the CPU beside the model's devices answers as one that lies with the weights."""

import chex
import jax
import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax.contexts import catalogue
from alaya_jax.errors import CacheFullError, RequestError
from alaya_jax.sharding import cpu_beside

WINDOW = aj.Window(8, 24)
PLANS = {
    "full": aj.Full(),
    "best": aj.TopK(20, window=WINDOW),
    "graph": aj.Plan(aj.DIPR(beta=8.0, window=WINDOW), aj.Graph(queries=1.0)),
    "sketch": aj.Plan(aj.DIPR(recovery=0.9, window=WINDOW), aj.Sketch()),
}


@pytest.fixture
def document(rng):
    return rng.integers(32, 126, 230)


@pytest.fixture
def elsewhere(monkeypatch):
    """The model's device cannot read files: a CPU that plays the part."""
    home = jax.devices("cpu")[3]
    monkeypatch.setattr(catalogue, "cpu_beside", lambda mesh: home)
    return home


def stored(open_db, document):
    with open_db() as db:
        context = db.import_context(document, progress=False)
        db.build_index(context, aj.Graph(queries=1.0), progress=False)


def answers(db, prompt, tier, plan, tokens=6):
    session, rest = db.create_session(prompt, tier=tier)
    with session:
        fork = session.fork()
        logits = np.asarray(fork.prefill(rest))
        stream = aj.generate(session, rest, max_new_tokens=tokens, attention=plan)
        ids = [token.id for token in stream]
        told = session.explain().to_dict()
    return ids, logits, told


@pytest.mark.parametrize("name", PLANS)
def test_any_plan_answers_as_beside_the_weights(open_db, document, rng, elsewhere, name):
    stored(open_db, document)
    prompt, db = [*document, *rng.integers(32, 126, 5)], open_db()
    expected, logits, told = answers(db, prompt, "device", PLANS[name])
    ids, found, again = answers(db, prompt, "host", PLANS[name])
    assert ids == expected
    np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-4)
    reads, theirs = (x["phases"]["decode"]["keys_attended_per_step"] for x in (again, told))
    assert reads == pytest.approx(theirs, rel=0.02)


def test_nothing_of_the_cache_is_with_the_weights(open_db, document, rng, elsewhere):
    stored(open_db, document)
    db = open_db()
    session, rest = db.create_session([*document, 33, 34], tier="host")
    list(aj.generate(session, rest, max_new_tokens=3, attention=PLANS["sketch"]))
    assert not db.pool.allocated or session.pool is not db.pool
    host = session.sequences[0].host
    assert host is not None
    pages = [(one.k, one.v) for one in host.layers]
    known = session.batch.cover(PLANS["sketch"]).layers
    chex.assert_tree_is_on_device((session.pool.kv, pages, known), device=elsewhere)


@pytest.mark.parametrize("axes", [{"data": 2, "tensor": 2}, {"context": 2}], ids=str)
def test_a_mesh_reads_files_on_the_cpu(open_db, tiny_model, document, rng, on_mesh, axes):
    stored(open_db, document)
    prompt = [*document, *rng.integers(32, 126, 5)]
    expected, logits, _ = answers(open_db(), prompt, "device", PLANS["sketch"])
    db = open_db(on_mesh(tiny_model, aj.make_mesh(**axes)))
    ids, found, _ = answers(db, prompt, "host", PLANS["sketch"])
    assert ids == expected
    np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-4)


def test_a_session_goes_on_is_stored_and_layers_may_be_asked(open_db, document, rng, elsewhere):
    stored(open_db, document)
    db, c = open_db(), open_db().model.config
    session, rest = db.create_session([*document, 33, 34], tier="host")
    list(aj.generate(session, rest, max_new_tokens=20))
    session.prefill(())  # the token that was generated last
    longer = db.store(session)
    assert longer.num_tokens == len(session.tokens[0])
    shape = (1, 1, c.num_key_value_heads, c.head_dim)
    k, v = (np.asarray(rng.standard_normal(shape), np.float32) for _ in range(2))
    q = jax.numpy.asarray(rng.standard_normal((1, 1, c.num_attention_heads, c.head_dim)), "float32")
    plain, _ = db.create_session([*session.tokens[0].tolist(), 33], tier="device")
    outs = []
    for one in (session, plain):
        for layer in range(c.num_hidden_layers):
            one.update(q, k, v, layer)
            outs.append(np.asarray(one.attention(q, layer)))
    half = len(outs) // 2
    assert session.batch.lengths == plain.batch.lengths
    np.testing.assert_allclose(outs[:half], outs[half:], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_is_refused(open_db, document, rng, elsewhere, monkeypatch):
    stored(open_db, document)
    db = open_db()
    monkeypatch.setattr(catalogue, "HOME_TOKENS", 64)
    with pytest.raises(CacheFullError, match="on the CPU"):
        db.create_session([*document, *rng.integers(32, 126, 200)], tier="host")
    assert cpu_beside(None) is None
    with db.create_session([*document, 33], tier="host")[0] as session:
        session.prefill([33])
    for tier, other in (("device", "host"), ("host", "device")):
        session, rest = db.create_session([*document, 33], tier=None if tier == "device" else tier)
        plan = aj.Plan(aj.Full(), tier=other)
        with (
            session,
            pytest.raises(RequestError, match=f"create_session\\(tier='?{other}|leave one"),
        ):
            next(iter(aj.generate(session, rest, max_new_tokens=1, attention=plan)))


def test_graphs_and_indexes_there_are_a_part_of_the_hosts_budget(
    open_db, tiny_model, document, elsewhere
):
    stored(open_db, document)
    path = open_db().path

    def ask(host):
        budget = aj.Budget.for_pages(tiny_model, 65, host=host, indexes="64MiB")
        with aj.DB(path, tiny_model, budget) as db:
            session, rest = db.create_session([*document, 33], tier="host")
            with session:
                list(aj.generate(session, rest, max_new_tokens=2, attention=PLANS["graph"]))
                return db.stats()

    stats = ask(250_000)
    graph = 2 * 4 * 2 * (256 * 32 + 64)
    assert stats.bytes_beside == {}
    assert list(stats.bytes_beside_host.values()) == [graph]
    assert 0 < stats.bytes_host <= 250_000 - graph
    assert "; beside them 132.1 kB of indexes: the graph of" in stats.rows()["host"]
    with pytest.raises(CacheFullError, match=r"100,000 of Budget\(host=100000\) 0 are held"):
        ask(100_000)
    with pytest.raises(CacheFullError, match="may be kept"):  # pages, beside the graph
        ask(150_000)
