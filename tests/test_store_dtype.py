"""Contexts that rest in 8 bits: fewer bytes, close to exact, and never taken for it."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax.errors import RequestError

WINDOW = aj.Window(8, 24)
PLANS = {
    "full": aj.Full(),
    "range": aj.DIPR(beta=8.0, window=WINDOW),
    "graph": aj.Plan(aj.DIPR(beta=8.0, window=WINDOW), aj.Graph(queries=1.0)),
    "sketch": aj.Plan(aj.DIPR(beta=8.0, window=WINDOW), aj.Sketch()),
}


@pytest.fixture
def document(rng):
    return rng.integers(32, 126, 230)


def answers(db, prompt, attention=None, **options):
    """Token ids, the logits of the last prompt token, and how many tokens were reused."""
    session, rest = db.create_session(prompt, **options)
    with session:
        fork = session.fork()
        logits = np.asarray(fork.prefill(rest))
        ids = [t.id for t in aj.generate(session, rest, max_new_tokens=4, attention=attention)]
    return ids, logits, session.reused[0]


PAIRS = [("int8", "full"), ("int8", "graph"), ("int8", "sketch"), ("fp8", "range")]


@pytest.mark.parametrize(
    ("kind", "name"), [*PAIRS, pytest.param("int8", "range", marks=pytest.mark.slow)]
)
def test_any_plan_answers_where_it_lies_as_in_the_pool(open_db, document, rng, kind, name):
    db = open_db(store_dtype=kind)
    context = db.import_context(document)
    if name == "graph":
        db.build_index(context, aj.Graph(queries=1.0), progress=False)
    prompt = [*document, *rng.integers(32, 126, 5)]
    expected, logits, reused = answers(db, prompt, PLANS[name], tier="device")
    assert reused == 230
    db.close()
    db = open_db(store_dtype=kind)
    for tier in ("host", "device"):
        ids, at, again = answers(db, prompt, PLANS[name], tier=tier)
        assert (ids, again) == (expected, reused)
        np.testing.assert_array_equal(at, logits)
    assert db.check(db.contexts[0]) == []


def test_it_is_never_taken_for_exact(open_db, document, rng):
    db = open_db(store_dtype="int8")
    context = db.import_context(document)
    assert (context.exact_tokens, str(context.origin)) == (
        0,
        "not exact, from token 0 on by storage in int8",
    )
    assert "the first 0 exact" in repr(context)
    assert db.import_context(document) is context, "and not computed again"
    prompt = [*document, *rng.integers(32, 126, 5)]
    assert answers(db, prompt, reuse="exact")[2] == 0
    session, rest = db.create_session(prompt)
    with session:
        session.prefill(rest)
        assert "not exact, from token 0 on by storage in int8" in str(session.explain())
        longer = db.store(session)
    runs = [run[0] for run in longer.origin.runs]
    assert runs == [0, 230]
    assert db.stats().bytes_shared == 230 // 16 * 16 * token_bytes(db)
    db.close()

    db = open_db()  # which computes and stores exactly, beside them
    assert {c.id for c in db.contexts} == {context.id, longer.id}
    exact, logits, reused = answers(db, prompt)
    assert reused == 0
    assert answers(db, prompt, reuse="any")[2] == 234
    beside = db.import_context(document)
    assert beside.exact_tokens == 230
    assert beside.nbytes == 230 * db.token_bytes == pytest.approx(context.nbytes * 4, rel=0.2)
    again, at, reused = answers(db, prompt)
    assert (again, reused) == (exact, 230)
    np.testing.assert_allclose(at, logits, rtol=1e-4, atol=1e-4)
    # Of equally long ones the exact one is taken, whatever will do.
    assert db.create_session(document, reuse="any")[0].origins[0].runs == ()
    with pytest.raises(RequestError, match="use 'exact', 'any' or None"):
        db.create_session(prompt, reuse="most")


def token_bytes(db):
    """Of a token at rest in 8 bits."""
    c = db.model.config
    return 2 * c.num_hidden_layers * c.num_key_value_heads * (c.head_dim + 2)


def test_it_answers_at_once_as_after_the_next_start(open_db, document, rng):
    """The exact numbers that are still in the pool when it is stored do not answer for it."""
    db = open_db(store_dtype="fp8")
    prompt = [*document, 40, 41]
    db.import_context(document)
    now = answers(db, prompt)
    db.close()
    ids, logits, reused = answers(open_db(store_dtype="fp8"), prompt)
    assert (ids, reused) == (now[0], now[2]) == (now[0], 230)
    np.testing.assert_array_equal(logits, now[1])


def test_shared_stores_move_codes(open_db, document, tmp_path):
    url = f"memory://{tmp_path}/shared/"
    one, other = (open_db(path=path, remote=url, store_dtype="int8") for path in ("one", "other"))
    context = one.import_context(document)
    prompt = [*document, 40, 41]
    want = answers(one, prompt)
    assert answers(other, prompt)[0] == want[0]
    (found,) = other.contexts
    assert (found.id, found.origin) == (context.id, context.origin)
    for layer in range(2):
        rows = [db._catalogue.store.read_kv(context.id, layer)[0] for db in (one, other)]
        np.testing.assert_array_equal(*rows)
    exact = open_db(path="exact", remote=url)
    assert answers(exact, prompt)[2] == 0
    assert exact.contexts == []


def test_what_cannot_be_stored_so_is_refused(open_db, document):
    with pytest.raises(RequestError, match=r"store_dtype='int4'\): use one of int8, fp8, or None"):
        open_db(store_dtype="int4")
    db = open_db(store_dtype="int8")
    c = db.model.config
    shape = c.num_key_value_heads, len(document), c.head_dim
    kv = [(np.full(shape, 3.4e38, np.float32),) * 2] * c.num_hidden_layers
    with pytest.raises(RequestError, match="cannot be stored in int8"):
        db.import_context(document, kv)
    with pytest.raises(RequestError, match=r"k of layer 0 is"):
        db.import_context(document, [(k[:, 1:] / 1e38, v[:, 1:] / 1e38) for k, v in kv])
    assert db.contexts == []


@pytest.mark.slow
def test_it_is_close_to_exact_on_a_real_model(tmp_path, monkeypatch):
    """The figures of docs/storage.md, of a shorter text."""
    folder = Path(__file__).parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    spec = importlib.util.spec_from_file_location("store_dtype", folder / "store_dtype.py")
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "store_dtype", benchmark)
    spec.loader.exec_module(benchmark)
    model = aj.load("smollm2-135m", progress=False)
    int8, fp8 = benchmark.compare(model, 300, 6, tmp_path)
    assert int8["bytes"] == fp8["bytes"] == round(66 / 256, 4)
    assert 0 < int8["kl_mean"] < 0.003 < fp8["kl_most"] < 0.2
    assert int8["mass_mean"] > 0.985 > fp8["mass_mean"] > 0.95
    assert int8["output_mean"] < 0.03 < 2 * fp8["output_mean"] < 0.15
