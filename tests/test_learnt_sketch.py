"""A learnt basis in use: calibrated, found by a database, named in reports, everywhere the same."""

import dataclasses

import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax.errors import RequestError
from alaya_jax.index import Sketch
from alaya_jax.index import learnt as learning
from alaya_jax.models import llama
from alaya_jax.models.rope import inverse_frequencies
from alaya_jax.query.plan import SKETCH_FROM, plan_for

WINDOW = aj.Window(8, 24)
LEARNT = Sketch(2, "learnt")  # 16 channels: a word of 32 signs a key
RANGE = aj.DIPR(beta=8.0, window=WINDOW)


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(5)
    return [rng.integers(32, 126, 500) for _ in range(5)]


@pytest.fixture(scope="module")
def calibrated(tiny_model, texts):
    return aj.calibrate(tiny_model, texts, window=WINDOW, save=False, progress=False)


@pytest.fixture
def known(calibrated, tmp_path, monkeypatch):
    """What was learnt of the tiny model is there to be found."""
    monkeypatch.setenv("ALAYA_CACHE", str(tmp_path / "cache"))
    return learning.keep(calibrated.learnt, None)


@pytest.fixture
def prompt():
    return np.random.default_rng(6).integers(32, 126, 300)


def answered(db, prompt, plan, **options):
    session, rest = db.create_session(prompt, **options)
    with session:
        tokens = list(aj.generate(session, rest, max_new_tokens=5, attention=plan))
        return [t.id for t in tokens], [t.logprob for t in tokens], session.explain()


def test_it_learns_what_the_definition_says(tiny_model, texts, calibrated):
    """Moments in float64 of each text's queries and keys, turned back one by one."""
    config = tiny_model.config
    inv, _ = inverse_frequencies(config)
    kv_heads, dim = config.num_key_value_heads, config.head_dim

    def back(x, by):  # [T, heads, D]
        angle = -np.asarray(by, np.float64)[:, None, None] * inv
        first, second = x[..., : dim // 2], x[..., dim // 2 :]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    parts = []
    for text in texts:
        found, n = [], len(text)

        def attend(layer, q, k, v, state, found=found):
            found.append([np.asarray(x[0], np.float64) for x in (q, k)])
            return llama.causal_attend(layer, q, k, v, state)

        at = np.arange(n)
        llama.forward(tiny_model.params, config, text[None], at[None], attend)
        of_layers = []
        for q, k in found:
            rows = back(q, at).reshape(n, kv_heads, -1, dim)
            whole = n // 16 * 16
            keys = back(k[:whole], at[:whole] // 16 * 16).reshape(-1, 16, kv_heads, dim)
            centre = keys.mean(1)
            rest, apart = keys - centre[:, None], centre - centre.mean(0)
            of_layers.append(
                (
                    np.einsum("tkgd,tkge->kde", rows, rows) / (n * rows.shape[2]),
                    np.einsum("nzkd,nzke->kde", rest, rest) / whole,
                    np.einsum("nkd,nke->kde", apart, apart) / len(centre),
                    centre.mean(0),
                )
            )
        parts.append((learning.Moments(*map(np.stack, zip(*of_layers, strict=True))), n))
    want = learning.Learnt.of(parts, inv, tiny_model.length_limit, "tiny")
    got = calibrated.learnt
    assert (got.tokens, got.length) == (2500, tiny_model.length_limit)
    for one, other in zip(got.layers, want.layers, strict=True):
        np.testing.assert_allclose(one.spread, other.spread, rtol=2e-3)
        np.testing.assert_array_equal(one.grain, other.grain)
        # Each row is known up to its sign.
        np.testing.assert_allclose(
            np.abs(np.einsum("ked,ked->ke", one.rows, other.rows)),
            np.linalg.norm(one.rows, axis=-1) * np.linalg.norm(other.rows, axis=-1),
            rtol=2e-2,
        )


@pytest.mark.parametrize("share", ["head", pytest.param("group", marks=pytest.mark.slow)])
@pytest.mark.parametrize("bits", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_it_answers_as_a_scan_of_all_keys(open_db, known, prompt, share, bits):
    db = open_db()
    plan = aj.Plan(RANGE, Sketch(bits, "learnt"), share=share)
    ids, logprobs, explained = answered(db, prompt, plan)
    if share == "head":
        expected, at, _ = answered(db, prompt, aj.Plan(RANGE, aj.Flat()))
        assert ids == expected
        np.testing.assert_allclose(logprobs, at, atol=1e-4)
    assert "a basis learnt from 2,500 tokens, for 512 positions" in str(explained)
    assert explained.to_dict()["sketch"].startswith("a basis learnt")


@pytest.mark.slow
def test_other_plans_run_through_it(open_db, known, prompt):
    db = open_db()
    by_page = aj.Plan(RANGE, LEARNT, by="page", share="group")
    tail = aj.Plan(aj.DIPR(recovery=0.9, window=WINDOW), LEARNT, tail=True)
    for plan in (by_page, tail, aj.Plan(aj.TopK(20, window=WINDOW), LEARNT)):
        assert len(answered(db, prompt, plan)[0]) == 5


def test_a_stored_context_in_any_tier(open_db, known, prompt):
    """Also where another database finds what sketches know in a file."""
    db = open_db()
    db.import_context(prompt)
    longer = [*prompt, 40, 41]
    plan = aj.Plan(RANGE, LEARNT)
    expected = answered(db, longer, plan, tier="device")[:2]
    for tier in ("host", "device"):
        assert answered(db, longer, plan, tier=tier)[:2] == expected
    db.close()
    assert answered(open_db(), longer, plan, tier="host")[:2] == expected


def test_without_one_the_rotation_is_random_and_that_is_said(
    open_db, prompt, tmp_path, monkeypatch
):
    monkeypatch.setenv("ALAYA_CACHE", str(tmp_path / "none"))
    db = open_db()
    ids, _, explained = answered(db, prompt, aj.Plan(RANGE, LEARNT))
    assert "a random rotation: no basis was learnt of this model (aj.calibrate)" in str(explained)
    assert "Sketch(bits=2)" in str(explained)
    assert ids == answered(db, prompt, aj.Plan(RANGE, Sketch(2)))[0]
    half = answered(db, prompt, aj.Plan(RANGE, Sketch(1.5, "learnt")))[2]
    assert "Sketch(bits=2)" in str(half)


def test_it_is_found_once_it_was_learnt_and_stays(
    open_db, calibrated, prompt, tmp_path, monkeypatch
):
    """A database that found none looks again; one that found one goes on with it."""
    monkeypatch.setenv("ALAYA_CACHE", str(tmp_path / "cache"))
    db = open_db()
    assert "random" in answered(db, prompt, aj.Plan(RANGE, LEARNT))[2].sketch
    place = learning.keep(calibrated.learnt, None)
    assert "learnt from 2,500" in answered(db, prompt, aj.Plan(RANGE, LEARNT))[2].sketch
    first = answered(db, prompt, aj.Plan(RANGE, LEARNT))[:2]
    place.unlink()
    assert answered(db, prompt, aj.Plan(RANGE, LEARNT))[:2] == first


@pytest.mark.usefixtures("known")
def test_a_plan_without_an_index_takes_it(open_db, prompt, monkeypatch):
    monkeypatch.setattr("alaya_jax.query.plan.SKETCH_FROM", 256)
    ids, _, explained = answered(open_db(), prompt, aj.DIPR(recovery=0.9, window=WINDOW))
    assert "learnt from 2,500" in explained.sketch
    assert repr(LEARNT) in str(explained)
    named = aj.Plan(aj.DIPR(recovery=0.9, window=WINDOW), LEARNT)
    assert ids == answered(open_db(), prompt, named)[0]


@pytest.mark.parametrize(
    ("dim", "there", "expected"),
    [
        (16, True, LEARNT),
        (16, False, Sketch()),
        (8, True, Sketch()),
        (128, True, LEARNT),
    ],
)
def test_the_default_is_learnt_where_it_can_be(tiny_model, dim, there, expected):
    config = dataclasses.replace(tiny_model.config, head_dim=dim)
    query = aj.DIPR(beta=8.0)
    assert plan_for(query, config, SKETCH_FROM, learnt=lambda: there).index == expected
    assert plan_for(query, config, SKETCH_FROM).index == Sketch()
    assert plan_for(query, config, SKETCH_FROM - 1, learnt=lambda: there).index == aj.Flat()


def test_bits_have_one_spelling():
    """Names of indexes and of their files are made of it."""
    assert repr(Sketch(2.0, "learnt")) == repr(LEARNT)
    assert repr(Sketch(0.5, "learnt")) == "Sketch(bits=0.5, basis='learnt')"


def test_a_damaged_file_is_named(open_db, known, prompt):
    """By plans that need it; others do without, and say so."""
    known.write_bytes(known.read_bytes()[:100])
    db = open_db()
    with pytest.raises(RequestError, match=known.name):
        answered(db, prompt, aj.Plan(RANGE, LEARNT))
    ids, _, explained = answered(db, prompt, aj.Plan(RANGE, Sketch(2)))
    assert known.name in explained.sketch
    assert ids == answered(db, prompt, aj.Plan(RANGE, aj.Flat()))[0]
    assert len(answered(db, prompt, aj.Full())[0]) == 5


def test_another_basis_reads_no_file_of_the_first(open_db, calibrated, known, prompt, tmp_path):
    """Learnt anew, sketches are made anew: codes of one basis mean nothing in another."""
    db = open_db()
    db.import_context(prompt)
    plan, longer = aj.Plan(RANGE, LEARNT), [*prompt, 40]
    expected = answered(db, longer, plan, tier="host")[:2]
    db.close()
    other = [
        type(x)(x.rows[:, ::-1].copy(), x.spread[:, ::-1].copy(), x.offset, x.grain)
        for x in calibrated.learnt.layers
    ]
    learning.keep(learning.Learnt("tiny", 512, 9999, tuple(other)), None)
    ids, logprobs, explained = answered(open_db(), longer, plan, tier="host")
    assert "learnt from 9,999" in explained.sketch
    assert ids == expected[0]
    np.testing.assert_allclose(logprobs, expected[1], atol=1e-4)


@pytest.mark.parametrize("axes", [{"tensor": 2}, {"context": 2}, {"data": 2}])
def test_on_a_mesh(tiny_model, on_mesh, open_db, known, prompt, axes):
    plan = aj.Plan(RANGE, LEARNT)
    expected, at, _ = answered(open_db(), prompt, plan)
    mesh = aj.make_mesh(**axes)
    ids, logprobs, _ = answered(open_db(path="mesh", model=on_mesh(tiny_model, mesh)), prompt, plan)
    assert ids == expected
    np.testing.assert_allclose(logprobs, at, atol=1e-4)
