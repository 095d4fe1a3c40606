"""What plans left out is known of the keys and values that they made, and stored with them."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax.errors import RequestError
from alaya_jax.query.origin import Origin, Way
from alaya_jax.query.plan import plan_for

SMALL = aj.Window(4, 12)
SPARSE = aj.Plan(aj.DIPR(beta=1.0, window=SMALL), aj.Sketch())
UNTIL = 16  # of which every token sees all keys
PER_HEAD = (aj.DIPR(beta=jnp.asarray([3.0, math.inf, 9.0, 5.0]), window=SMALL), UNTIL)

PLANS = [
    (aj.Full(), math.inf),
    (SMALL, UNTIL),
    (aj.TopK(2, window=SMALL), UNTIL),
    (aj.DIPR(beta=1.0, window=SMALL), UNTIL),
    (SPARSE, UNTIL),
    PER_HEAD,
    (aj.DIPR(recovery=0.3, window=SMALL), UNTIL),
    (aj.DIPR(beta=math.inf, window=SMALL, before=3), UNTIL),
    (aj.Tiles(beta=0.1, window=SMALL, q_block=8), UNTIL),
    (aj.Tiles(recovery=0.3, window=SMALL, q_block=8), UNTIL),
    (aj.DIPR(beta=math.inf, window=SMALL), math.inf),
    (aj.DIPR(recovery=1.0, window=SMALL), math.inf),
    (aj.DIPR(recovery=jnp.ones(4), window=SMALL), math.inf),
    (aj.DIPR(error=jnp.asarray([0.0, 0.1, 0.0, 0.0]), window=SMALL), UNTIL),
    (aj.DIPR(error=0.0, window=SMALL), math.inf),
    (aj.Plan(aj.DIPR(beta=math.inf, window=SMALL), aj.Sketch()), math.inf),
    (aj.Plan(aj.DIPR(beta=math.inf, window=SMALL), aj.Block(), by="page"), math.inf),
    (aj.Tiles(window=SMALL), math.inf),
    (aj.Tiles(recovery=1.0, window=SMALL), math.inf),
    ([aj.Full(), SMALL], UNTIL),
]


@pytest.fixture
def document(rng):
    return rng.integers(3, 256, 70)


def filled(db, tokens, attention, **options):
    session, rest = db.create_session(tokens, **options)
    for part in np.split(rest, [33, 49]):  # so that pages of the first parts are indexed
        if len(part):
            session.prefill(part, attention)
    return session


@pytest.mark.parametrize(("attention", "until"), PLANS, ids=[str(p)[:60] for p, _ in PLANS])
def test_how_far_a_plan_reads_every_key(tiny_model, attention, until):
    assert Way.of(plan_for(attention, tiny_model.config, 70)).exact_until == until


@pytest.mark.parametrize(
    ("attention", "until"),
    [
        (SMALL, UNTIL),
        (SPARSE, UNTIL),
        (aj.Tiles(recovery=0.3, window=SMALL, q_block=8), UNTIL),
        (aj.Plan(aj.DIPR(beta=math.inf, window=SMALL), aj.Sketch()), 70),
        (aj.Tiles(beta=math.inf, recovery=1.0, window=SMALL, q_block=8), 70),
    ],
)
def test_keys_are_exact_so_far_and_no_further(db, document, attention, until):
    """Held against keys and values of full attention."""
    session, exact = filled(db, document, attention), filled(db, document, None)
    assert session.origins[0].exact(70) == until
    for layer in range(2):
        for got, want in zip(
            db.pool.read(session.sequences[0], layer),
            db.pool.read(exact.sequences[0], layer),
            strict=True,
        ):
            np.testing.assert_allclose(got[:, :until], want[:, :until], rtol=0, atol=1e-4)
            if layer == 1 and until < 70:
                assert np.abs(got[:, until:] - want[:, until:]).max() > 1e-3


@pytest.mark.slow
@pytest.mark.smoke
@pytest.mark.parametrize("where", ["prefill", "decode"])
def test_an_exact_session_reuses_what_is_exact(open_db, all_logits, document, where):
    """Up to the first token that a plan has changed, in this process and the next; all of it when
    asked to.
    """
    db = open_db()
    session, rest = db.create_session(document if where == "prefill" else document[:40])
    if where == "prefill":
        session.prefill(rest, SPARSE)
        exact = UNTIL
    else:
        list(aj.generate(session, rest, max_new_tokens=30, attention=SPARSE))
        exact = 40
    context, held = db.store(session), session.length
    tokens = np.concatenate([session.tokens[0], document[:5]])
    session.close()
    assert (context.exact_tokens, context.num_tokens) == (exact, held)
    assert f"the first {exact} exact" in repr(context)
    for _ in range(2):
        with db.create_session(tokens)[0] as own:
            assert own.reused == [exact]
            logits = own.prefill(tokens[exact:])[0]
            np.testing.assert_allclose(logits, all_logits(tokens)[-1], rtol=0, atol=3e-4)
            assert own.origins == [Origin()]
        asked, rest = db.create_session(tokens, reuse="any")
        assert asked.reused == [held]
        assert np.abs(asked.prefill(rest)[0] - logits).max() > 1e-3
        assert asked.origins[0].exact(99) == exact, "full attention to keys that are not exact"
        asked.close()
        db.close()
        db = open_db()
    with pytest.raises(RequestError, match=r"reuse='all'.*'exact', 'any' or None"):
        db.create_session(tokens, reuse="all")


def test_a_document_is_never_imported_from_keys_that_are_not_exact(db, all_logits, document):
    sparse = db.store(filled(db, document, SPARSE))
    exact = db.import_context(document)
    assert exact.id != sparse.id
    assert exact.exact_tokens == 70
    for reuse in ("exact", "any"):  # of equally long ones the exact
        session, rest = db.create_session([*document, 9], reuse=reuse)
        assert (session.context, session.reused) == (exact, [70])
        logits = session.prefill(rest)[0]
        np.testing.assert_allclose(logits, all_logits([*document, 9])[-1], rtol=0, atol=3e-4)


@pytest.mark.slow
def test_other_plans_make_other_contexts(db, document):
    """Also by a number of one head; the same plan again is the same context."""
    betas = np.array([3.0, 4.0, 9.0, 5.0])
    others = betas + np.array([0.0, 1.0, 0.0, 0.0])
    plans = [
        None,
        SMALL,
        aj.Window(4, 11),
        aj.DIPR(beta=1.0, window=SMALL),
        aj.DIPR(beta=jnp.asarray(betas), window=SMALL),
        aj.DIPR(beta=jnp.asarray(others), window=SMALL),
        [SMALL, aj.Full()],
        [aj.Full(), SMALL],
    ]
    ids = [db.store(filled(db, document, plan)).id for plan in plans]
    assert len(set(ids)) == len(plans)
    assert db.store(filled(db, document, aj.DIPR(beta=jnp.asarray(betas), window=SMALL))).id in ids
    assert len(db.contexts) == len(plans)


def test_what_is_built_on_inexact_keys_stays_so(db, document):
    """By a fork, a store, a session that took them, and the next store."""
    first = filled(db, document[:50], SMALL)
    origin = first.origins[0]
    assert first.fork().origins == [origin]
    db.store(first)
    second = filled(db, document, None, reuse="any")
    assert second.reused == [50]
    assert [start for start, _ in second.origins[0].runs] == [UNTIL, 50]
    context = db.store(second)
    assert context.exact_tokens == UNTIL
    assert context.origin == second.origins[0]
    third, _ = db.create_session(document[:30], reuse="any")
    assert (third.reused, third.origins) == ([29], [origin])


def test_a_batch_keeps_them_apart(db, document):
    db.store(filled(db, document, SMALL))
    session, rest = db.create_session([document[:30], document[10:30]], reuse="any")
    session.prefill(rest)
    assert [origin.exact(30) for origin in session.origins] == [UNTIL, 30]


def test_a_model_of_ones_own_is_believed_until_it_asks_a_plan(db, rng):
    session, _ = db.create_session([5])
    k, q = np.zeros((1, 20, 2, 16), np.float32), np.zeros((1, 20, 4, 16), np.float32)
    for query, exact in ((None, 20), (SMALL, 20), (SMALL, 20)):
        for layer in range(2):
            session.update(None, k, k, layer)
            session.attention(q, layer, query)
        assert session.origins[0].exact(session.length) == exact
    context = db.store(session, tokens=np.arange(5, 65))
    assert context.exact_tokens == 20
    assert db.create_session(np.arange(5, 70))[0].reused == [20]


def test_explain_and_repr_say_it(db, document):
    session = filled(db, document, SMALL)
    found = session.explain()
    assert "exact up to token 16, from token 16 on by Window(sink=4, recent=12)" in str(found)
    data = found.to_dict()
    assert data["exact"] == [16]
    assert data["origins"] == [[{"from": 16, "plan": "Window(sink=4, recent=12)"}]]
    exact = filled(db, document, None).explain()
    assert "exact" not in exact.heading
    assert (exact.to_dict()["exact"], exact.to_dict()["origins"]) == ([70], [[]])


def test_graphs_are_lent_to_exact_keys_only(db, document):
    lender = db.store(filled(db, document, SMALL))
    db.build_index(lender, aj.Graph())
    db.import_context(document)
    session, _ = db.create_session([*document, 9])
    assert session.batch.graphs.known()[1] == UNTIL, "further on its keys are others"


def test_how_far_two_are_alike():
    window, other = Way("window", 8), Way("other", 8)
    exact, one = Origin(), Origin().then(0, 40, window)
    assert exact.alike(exact, 30) == 30
    assert exact.alike(one, 30) == one.alike(exact, 30) == 8
    assert exact.alike(one, 5) == 5
    assert one.alike(Origin().then(0, 90, window), 30) == 30
    assert one.alike(Origin().then(0, 90, other), 30) == 8
    assert one.then(40, 60, other).alike(one, 60) == 40
    assert one.alike(exact, 0) == 0
