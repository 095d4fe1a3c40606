"""EXPLAIN: what would run, what ran, and one token's attention against numpy."""

import dataclasses
import io
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

import alaya_jax as aj
from alaya_jax import show
from alaya_jax.checkpoint import bundled
from alaya_jax.errors import RequestError
from alaya_jax.models import llama
from alaya_jax.optimizer.cost import Machine

WINDOW = aj.Window(sink=2, recent=6)


@pytest.fixture
def prompt(rng):
    return rng.integers(3, 256, 50)


@pytest.fixture
def session(db, prompt):
    session, rest = db.create_session(prompt)
    session.prefill(rest)
    return session


def kv_and_queries(model, tokens):
    """The last token's queries [L, H, D], keys and values [L, K, n, D], without any cache."""
    found = []

    def attend(layer, q, k, v, state):
        found.append((np.asarray(q[0, -1]), np.moveaxis(k[0], 0, 1), np.moveaxis(v[0], 0, 1)))
        return llama.causal_attend(layer, q, k, v, state)

    at = np.arange(len(tokens))[None]
    llama.forward(model.params, model.config, np.asarray(tokens)[None], at, attend)
    q, k, v = zip(*found, strict=True)
    return np.stack(q), np.stack(k), np.stack(v)


def full_attention(q, k, v):
    """Raw scores and weights [H, n], out [H, D] of one layer, in float64."""
    group = len(q) // len(k)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("hd,hnd->hn", q, np.repeat(k, group, 0))
    scaled = scores / np.sqrt(q.shape[-1])
    weights = np.exp(scaled - scaled.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return scores, weights, np.einsum("hn,hnd->hd", weights, np.repeat(v, group, 0))


def in_window(n):
    return (np.arange(n) < WINDOW.sink) | (np.arange(n) >= n - WINDOW.recent)


@pytest.mark.parametrize(
    "plan",
    [
        aj.TopK(5, WINDOW),
        aj.Plan(aj.DIPR(beta=6.0, window=WINDOW), aj.Sketch()),
        aj.Plan(aj.DIPR(beta=6.0, window=WINDOW), aj.Flat(), by="page"),
    ],
    ids=str,
)
def test_the_first_layer_against_numpy(session, tiny_model, prompt, plan):
    """The first layer's queries depend on no attention: all its figures are known."""
    q, k, v = kv_and_queries(tiny_model, prompt)
    scores, weights, out = full_attention(q[0], k[0], v[0])
    n, best = len(prompt), scores.max(-1, keepdims=True)
    inside = np.broadcast_to(in_window(n), scores.shape)
    query = plan.query if isinstance(plan, aj.Plan) else plan
    if isinstance(query, aj.TopK):
        outside = np.where(inside, -np.inf, scores)
        attended = inside | (outside >= np.sort(outside)[:, -5, None])
    else:
        attended = inside | (scores >= best - 6.0)
        if plan.by == "page":
            pages = np.arange(n) // 16
            hit = [np.isin(pages, pages[row & ~in_window(n)]) for row in attended]
            attended = inside | np.stack(hit)
    found = session.explain(analyze=True, attention=plan)
    analysis = found.analysis
    assert analysis.position == 49
    for head in range(4):
        at = np.flatnonzero(attended[head])
        np.testing.assert_array_equal(found.selected(0, head, window=True), at)
        far = at[~inside[head][at]]
        np.testing.assert_array_equal(found.selected(0, head), far)
        assert found.selected_text(0, head) == [
            (i, bytes([prompt[i]]).decode("utf-8", "replace")) for i in far
        ]
        # All keys outside the window whose mass, best first, reaches what was asked.
        order = np.argsort(-np.where(inside[head], -np.inf, scores[head]))
        mass = weights[head][inside[head]].sum() + np.concatenate(
            [[0], np.cumsum(weights[head][order[: n - inside[head].sum()]])]
        )
        needed = int(np.argmax(mass >= 0.95))
        assert analysis.keys_needed[0, head] == needed
        beta = best[head, 0] - scores[head][order[needed - 1]] if needed else 0.0
        assert analysis.beta_needed[0, head] == pytest.approx(beta, abs=1e-3 * max(best.max(), 30))
    np.testing.assert_array_equal(analysis.attended[0], attended.sum(-1))
    mass = np.where(attended, weights, 0).sum(-1)
    np.testing.assert_allclose(analysis.recovery[0], mass, atol=1e-5)
    kept = np.where(attended, weights, 0)
    v = np.repeat(np.asarray(v[0], np.float64), 2, 0)
    got = np.einsum("hn,hnd->hd", kept / kept.sum(-1, keepdims=True), v)
    error = np.linalg.norm(got - out, axis=-1) / np.linalg.norm(out, axis=-1)
    np.testing.assert_allclose(analysis.error[0], error, atol=2e-5)


def test_analysis_writes_nothing(session, prompt, tiny_model):
    before = [session.pool.read(session.sequences[0], layer) for layer in range(2)]
    first = session.explain(analyze=True, attention=aj.TopK(3, WINDOW))
    for layer, pair in enumerate(before):
        for was, now in zip(pair, session.pool.read(session.sequences[0], layer), strict=True):
            np.testing.assert_array_equal(was, now)
    assert session.lengths == [50]
    # Full attention's queries are those of the whole prompt's forward, in all layers.
    q, k, v = kv_and_queries(tiny_model, prompt)
    full = session.explain(analyze=True, attention=aj.Full()).analysis
    assert (full.recovery > 1 - 1e-5).all()
    assert (full.error < 1e-5).all()
    assert (full.seconds > 0).all()
    needed = full.keys_needed[1]
    scores, weights, _ = full_attention(q[1], k[1], v[1])
    assert scores.shape == weights.shape == (4, 50)
    assert (needed == 0).all(), "the default window holds all 50 keys"
    assert first.analysis.position == full.position


@pytest.mark.slow
def test_a_promise_of_the_error_is_shown_beside_the_error(session):
    asked = aj.Plan(aj.DIPR(error=np.asarray([0.02, 0.3, 0.02, 0.3]), window=WINDOW), aj.Sketch())
    list(aj.generate(session, [5], max_new_tokens=3, attention=asked))
    found = session.explain(analyze=True)
    analysis = found.analysis
    np.testing.assert_array_equal(analysis.error_asked, [[0.02, 0.3] * 2] * 2)
    assert (analysis.error_estimated <= analysis.error_asked).all()
    assert found.to_dict()["analysis"]["error_violations"] == analysis.violations.sum()
    assert "error asked for: at most 30.00%; estimated" in str(found)
    row = found.to_dict()["phases"]["decode"]["by_layer"][0]
    assert (np.asarray(row["error_estimated"]) <= [0.02, 0.3] * 2).all()
    assert "error of the output, by estimate" in str(found)
    plain = session.explain(analyze=True, attention=aj.TopK(3, WINDOW))
    assert np.isnan(plain.analysis.error_asked).all()
    assert "error asked for" not in str(plain)


@pytest.mark.slow
@pytest.mark.skipif(
    bundled.find("smollm2-135m") is None, reason="SmolLM2 is not on this machine: `make test`"
)
def test_a_promise_of_the_error_holds_on_a_model_and_a_text(tmp_path):
    """For 99% of heads and tokens, of a text that nothing was fitted to; and with fewer keys than
    the recovery that has as small an error.
    """
    model = aj.load("smollm2-135m", dtype="float32", progress=False)
    text = (Path(__file__).parents[1] / "data" / "declaration.txt").read_text("utf-8")
    tokens, window = model.encode(text)[:1280], aj.Window(16, 128)
    plans = {
        "error": aj.Plan(aj.DIPR(error=0.03, window=window), aj.Sketch()),
        "recovery": aj.Plan(aj.DIPR(recovery=0.98, window=window), aj.Sketch(), tail=True),
    }
    found = {name: [] for name in plans}
    with aj.DB(tmp_path / "db", model) as db:
        session, rest = db.create_session(tokens)
        for part in np.split(rest, [900, 1100]):
            session.prefill(part)
            for name, plan in plans.items():
                found[name].append(session.explain(analyze=True, attention=plan).analysis)
    errors = np.stack([x.error for x in found["error"]])
    stated = np.stack([x.error_estimated for x in found["error"]])
    assert np.mean(errors <= 0.03) >= 0.99
    assert errors.max() < 0.06
    assert stated.max() <= 0.03 * 1.001
    others = np.stack([x.error for x in found["recovery"]])
    assert np.quantile(others, 0.99) > np.quantile(errors, 0.99)
    keys = {name: np.mean([x.attended.mean() for x in each]) for name, each in found.items()}
    assert keys["error"] < keys["recovery"]


@pytest.mark.slow
def test_analysis_takes_what_decoding_did(session, monkeypatch, tmp_path):
    monkeypatch.setenv("ALAYA_CACHE", str(tmp_path))
    flat = Machine("paper", 1e10, 1e11, 1e10, 1e-4, 1e-4, 1e-9, 1e-6, 0.0, 0.0)
    monkeypatch.setattr("alaya_jax.optimizer.situation.machine_for", lambda *_, **__: flat)
    auto = aj.Auto(recovery=0.9, window=WINDOW)
    list(aj.generate(session, [5], max_new_tokens=4, attention=auto))
    asked = aj.DIPR(recovery=0.9, window=WINDOW)
    found = session.explain(analyze=True)
    assert found.choice.plans == found.analysis.plans == aj.Plan(asked, aj.Flat())
    assert "predicted" in str(found)
    assert found.planned is None
    assert found.analysis.wanted == 0.9
    assert (found.analysis.estimated >= 0.9).all()
    np.testing.assert_allclose(found.analysis.recovery, found.analysis.estimated, atol=1e-5)
    assert (found.analysis.attended - 8 >= found.analysis.keys_needed).all()
    # Each kv head reads what any of its heads keeps.
    union = [
        [len(np.union1d(found.selected(i, 2 * g), found.selected(i, 2 * g + 1))) for g in (0, 1)]
        for i in range(2)
    ]
    np.testing.assert_array_equal(found.analysis.read, union)
    row = found.to_dict()["phases"]["decode"]["by_layer"][0]
    assert len(row["keys_read_by_group"]) == 2
    assert np.mean(row["keys_read_by_group"]) == pytest.approx(row["keys_read"] / 2)
    assert (row["tier"], row["implementation"], row["beta"]) == ("device", "xla", None)
    assert "needs a Hopper GPU" in row["passed_over"]["mosaic_gpu"]
    assert "implementation" not in str(found)  # nobody expects kernels for a GPU on a CPU


def test_says_which_implementation_runs(db, prompt):
    session, rest = db.create_session(prompt)
    session.prefill(rest)
    plan = aj.Plan(aj.DIPR(beta=4.0, window=WINDOW), implementation="reference")
    list(aj.generate(session, [5], max_new_tokens=2, attention=plan))
    decoded = session.explain().to_dict()["phases"]["decode"]
    assert decoded["implementation"] == "reference"
    assert decoded["by_layer"][0]["passed_over"] == {}
    named = aj.Plan(aj.DIPR(beta=4.0, window=WINDOW), implementation="mosaic_gpu")
    with pytest.raises(aj.AlayaError, match=r"(?s)mosaic_gpu.*needs a Hopper GPU"):
        session.explain(attention=named)
    with pytest.raises(aj.AlayaError, match="needs a Hopper GPU"):
        list(aj.generate(session, [5], max_new_tokens=2, attention=named))


def test_a_sequence_of_a_batch(db, rng):
    prompts = [rng.integers(3, 256, n) for n in (20, 45)]
    session, rest = db.create_session(prompts)
    session.prefill(rest)
    found = session.explain(analyze=True, attention=WINDOW, sequence=1)
    assert (found.analysis.position, found.analysis.sequence) == (44, 1)
    np.testing.assert_array_equal(found.selected(1, 3, window=True), np.flatnonzero(in_window(45)))
    with pytest.raises(RequestError, match="2 sequences"):
        session.explain(analyze=True, sequence=2)


def test_before_anything_ran(db, prompt):
    session, _ = db.create_session(prompt)
    found = session.explain()
    assert [row["query"] for row in found.planned] == ["Full()"] * 2
    found = session.explain(attention=[aj.Full(), aj.TopK(7)])
    assert [row["index"] for row in found.planned] == [None, "Flat()"]
    assert found.to_dict()["planned"][1]["layer"] == 1
    for shown in (str(found), found._repr_html_(), rich(found)):
        assert "TopK(k=7) @ Flat()" in shown
    with pytest.raises(RequestError, match="there is none"):
        session.explain(analyze=True)


def rich(found):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(found)
    return capture.get()


def test_one_account_in_every_form(session):
    found = session.explain(analyze=True, attention=aj.TopK(3, WINDOW))
    data = json.loads(json.dumps(found.to_dict()))
    assert data["analysis"]["layers"][1]["keys_attended"] == [11] * 4
    assert len(data["analysis"]["retrieved"][0][0]) == 3
    for shown in (str(found), found._repr_html_(), rich(found)):
        for part in ("position 49", "beta needed", "TopK(k=3)", "11"):
            assert part in shown
    for call in (lambda: found.selected(2, 0), lambda: found.selected(0, 4)):
        with pytest.raises(RequestError, match="layers 0 to 1, query heads 0 to 3"):
            call()


def test_what_was_not_analyzed_is_said(session, db):
    found = session.explain()
    for call in (lambda: found.selected(0, 0), lambda: found.plot("recovery")):
        with pytest.raises(RequestError, match="analyze=True"):
            call()
    with pytest.raises(RequestError, match="one of"):
        found.plot("colours")
    with pytest.raises(RequestError, match="Tiles answers for blocks"):
        session.explain(analyze=True, attention=aj.Tiles(beta=5.0))
    session.close()
    assert session.explain().tokens == [50]
    with pytest.raises(RequestError, match="closed"):
        session.explain(analyze=True)


def test_tokens_that_were_not_told(db, prompt):
    session, _ = db.create_session(prompt)
    k = np.zeros((1, 4, 2, 16), np.float32)
    for layer in range(2):
        session.update(None, k, k, layer)
    with pytest.raises(RequestError, match="ids of 0 are known"):
        session.explain(analyze=True)


def test_plots(session):
    pytest.importorskip("matplotlib")
    list(aj.generate(session, [5], max_new_tokens=3, attention=aj.TopK(3, WINDOW)))
    ran = session.explain().plot("attended").axes[0]
    np.testing.assert_array_equal(ran.images[0].get_array(), np.full((2, 4), 11))
    found = session.explain(analyze=True)
    axes = found.plot().axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), found.analysis.recovery)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("query head", "layer")


def test_a_plot_without_matplotlib(session, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RequestError, match=r"pip install 'alaya_jax\[plot\]'"):
        session.explain(analyze=True, attention=WINDOW).plot()


@pytest.mark.slow
def test_a_mesh_gives_the_analysis_of_one_device(session, open_db, tiny_model, prompt):
    """Pages over the context axis, heads over tensor."""
    mesh = aj.make_mesh(context=2, tensor=2, devices=jax.devices()[:4])
    spread = dataclasses.replace(tiny_model, mesh=mesh)
    other, rest = open_db(spread, path="spread", pages=64).create_session(prompt)
    other.prefill(rest)
    query = aj.Plan(aj.DIPR(beta=6.0, window=WINDOW), aj.Sketch())
    one, many = (s.explain(analyze=True, attention=query) for s in (session, other))
    for layer in range(2):
        for head in range(4):
            np.testing.assert_array_equal(one.selected(layer, head), many.selected(layer, head))
    np.testing.assert_allclose(many.analysis.recovery, one.analysis.recovery, atol=1e-5)
    np.testing.assert_allclose(many.analysis.error, one.analysis.error, atol=1e-4)
    np.testing.assert_array_equal(many.analysis.attended, one.analysis.attended)


def test_tables_fit_a_terminal_of_80_columns():
    """What is wider goes on below, each part with the first column."""
    row = ("0-3", "DIPR(recovery=0.95) @ Sketch(bits=4)", *["1,203 to 4,096"] * 7)
    table = show.Table("title", ("layer", "<plan", *"abcdefg"), [row], ("a note",))
    console = Console(width=80, file=io.StringIO())
    console.print(table.to_rich(80))
    for text in (str(table), console.file.getvalue()):
        lines = text.splitlines()
        assert max(map(len, lines)) <= 80
        assert "1,203 to 4,096" in text
        assert text.count("0-3") == text.count("layer") > 1
        assert text.count("title") == text.count("a note") == 1
        assert "DIPR(recovery=0.95) @ Sketch(bits=4)" in text
