"""A query that is a user's function: equal to TopK and DIPR where it says the same."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax.attention.engine import attend
from alaya_jax.cache import PageTable
from alaya_jax.errors import RequestError
from alaya_jax.index.memory import LayerMemory
from alaya_jax.query.functions import function_name
from alaya_jax.query.origin import Way
from alaya_jax.query.plan import Plan, plan_for

WINDOW = aj.Window(sink=3, recent=5)


def best(scores, positions, k=4):
    """TopK(4): of equal scores the earlier."""
    del positions
    _, columns = jax.lax.top_k(scores, k)
    return jax.nn.one_hot(columns, scores.shape[-1], dtype=bool).any(-2)


def in_range(scores, positions, *, window_best, beta=3.0):
    """DIPR(beta=3.0)."""
    del positions
    top = jnp.maximum(window_best, scores.max(-1))
    return scores >= (top - beta)[..., None]


PAIRS = {
    "TopK": (aj.TopK(4, WINDOW), aj.Custom(best, WINDOW)),
    "DIPR": (aj.DIPR(beta=3.0, window=WINDOW), aj.Custom(in_range, WINDOW)),
    "before": (aj.TopK(4, WINDOW, 20), aj.Custom(best, WINDOW, 20)),
    "all": (
        aj.DIPR(beta=float("inf"), window=WINDOW),
        aj.Custom(lambda scores, positions: jnp.ones(scores.shape, bool), WINDOW),
    ),
}


@pytest.fixture
def batch(rng):
    """Two sequences, scattered over a pool of which the rest is NaN."""
    k, g, d, z, pages, n = 2, 3, 8, 4, 40, 14
    lengths, t = np.asarray([30, 47]), 3
    pool = np.full((2, k, pages, z, d), np.nan, np.float32)
    ids = rng.permutation(np.arange(1, pages))[: 2 * n].reshape(2, n)
    for b in range(2):
        for j in range(lengths[b] + t):
            pool[:, :, ids[b, j // z], j % z] = rng.standard_normal((2, k, d))
    q = jnp.asarray(2 * rng.standard_normal((2, t, k * g, d)), jnp.float32)
    table = PageTable(jnp.asarray(ids, jnp.int32), jnp.asarray(lengths, jnp.int32))
    return q, *map(jnp.asarray, pool), table


@pytest.mark.parametrize("share", ["head", "group"])
@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_says_what_a_query_says(pair, share, batch):
    if share == "group" and isinstance(pair[0], aj.TopK):
        pytest.skip("TopK's group shares its best keys, not the union of each head's")
    q, k, v, table = batch
    memory = LayerMemory(k, v, table)
    count = jnp.asarray([3, 2], jnp.int32)
    theirs, ours = (attend(Plan(query, aj.Flat(), share=share), q, memory, count) for query in pair)
    np.testing.assert_array_equal(ours[0], theirs[0])
    for one, other in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(theirs[1]), strict=True):
        np.testing.assert_array_equal(one, other)


def test_definition_in_float64(batch):
    """Against numpy: the mask of scores outside the window, then softmax over what is kept."""

    def early_or_large(scores, positions):
        return (positions < 12) | (scores > 4.0)

    q, k, v, table = batch
    memory = LayerMemory(k, v, table)
    count = jnp.asarray([3, 3], jnp.int32)
    out, counts = attend(Plan(aj.Custom(early_or_large, WINDOW)), q, memory, count)
    for b in range(2):
        keys, values = (
            np.asarray(x, np.float64)[:, table.pages[b]].reshape(2, -1, 8) for x in (k, v)
        )
        for i in range(3):
            n = int(table.length[b]) + i + 1
            for h in range(6):
                s = keys[h // 3, :n] @ np.asarray(q, np.float64)[b, i, h]
                j = np.arange(n)
                keep = (j < 3) | (j >= n - 5) | (j < 12) | (s > 4.0)
                w = np.exp((s - s[keep].max()) / np.sqrt(8)) * keep
                expected = w @ values[h // 3, :n] / w.sum()
                np.testing.assert_allclose(out[b, i, h], expected, rtol=1e-4, atol=1e-5)
                assert counts.attended[b, i, h] == keep.sum()


@pytest.mark.slow
def test_by_the_kernels_reference_too(batch):
    q, k, v, table = batch
    memory = LayerMemory(k, v, table)
    count = jnp.ones(2, jnp.int32)
    for query in (pair[1] for pair in PAIRS.values()):
        one = attend(Plan(query, aj.Flat()), q[:, :1], memory, count)
        kernels = Plan(query, aj.Flat(), implementation="reference")
        other = attend(kernels, q[:, :1], memory, count)
        np.testing.assert_allclose(one[0], other[0], rtol=2e-5, atol=2e-6)
        np.testing.assert_array_equal(one[1].attended, other[1].attended)


def mixing(scores, positions):
    """Looks from one kv head at the others: the keys best for any head of all."""
    del positions
    least = jax.lax.top_k(scores.max((0, 1)), 5)[0][..., -1:]
    return jnp.broadcast_to(scores.max((0, 1)) >= least, scores.shape) & (scores > -jnp.inf)


def test_on_a_mesh_the_function_sees_all_heads(batch):
    q, k, v, table = batch
    memory = LayerMemory(k, v, table)
    count = jnp.asarray([3, 3], jnp.int32)
    run = functools.partial(attend, Plan(aj.Custom(mixing, WINDOW)), q, memory, count)
    mesh = aj.make_mesh(tensor=2, data=2)
    (out, counts), (sharded, others) = run(), run(mesh=mesh, rules=aj.ShardingRules())
    np.testing.assert_allclose(sharded, out, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(others.attended, counts.attended)


def test_pages_on_several_devices_are_refused(batch):
    q, k, v, table = batch
    spread = PageTable(
        jnp.pad(table.pages, ((0, 0), (0, 2))), table.length, jnp.zeros((2, 16), jnp.int32)
    )
    with pytest.raises(RequestError, match=r"Custom\(mixing.*mesh axis 'context'"):
        attend(
            Plan(aj.Custom(mixing, WINDOW)), q, LayerMemory(k, v, spread), jnp.ones(2, jnp.int32),
            mesh=aj.make_mesh(context=2), rules=aj.ShardingRules(),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "select"),
    [
        (r"gave float32 \(2, 3, 3, 56\), and must give a bool mask", lambda s, p: s),
        (r"gave bool \(2, 3, 3\)", lambda s, p: s.max(-1) > 0),
        (r"gave .*int.* None", lambda s, p: 1),
    ],
)
def test_what_is_no_mask_is_refused(words, select, batch):
    q, k, v, table = batch
    memory = LayerMemory(k, v, table)
    with pytest.raises(RequestError, match=words):
        attend(Plan(aj.Custom(select, WINDOW)), q, memory, jnp.ones(2, jnp.int32))


def test_refused_when_it_is_made():
    for wrong in (5, None, "best"):
        with pytest.raises(RequestError, match="give a function of scores and positions"):
            aj.Custom(wrong)
    with pytest.raises(RequestError, match=r"called with \(scores, positions\)"):
        aj.Custom(lambda scores: scores > 0)
    with pytest.raises(RequestError, match="window_best, window_lse that it has"):
        aj.Custom(lambda scores, positions, beta: scores > beta)
    for options in ({"index": aj.Sketch()}, {"by": "page"}, {"tail": True}, {"index": aj.Graph()}):
        with pytest.raises(RequestError, match="chooses keys by exact scores"):
            Plan(aj.Custom(best), **options)


def test_every_key_is_scored_however_long_the_context(tiny_model):
    assert plan_for(aj.Custom(best), tiny_model.config, 10**6).index == aj.Flat()


def test_a_function_compiles_once(batch):
    q, k, v, table = batch
    memory = LayerMemory(k, v, table)
    count = jnp.ones(2, jnp.int32)
    run = jax.jit(chex.assert_max_traces(lambda plan: attend(plan, q[:, :1], memory, count), n=1))
    for recent in (5, 6, 7):
        run(Plan(aj.Custom(mixing, aj.Window(2, recent))))


def test_names_tell_functions_apart():
    def made(k):
        return lambda scores, positions: best(scores, positions, k)

    named = [function_name(f) for f in (made(3), made(4), best, functools.partial(best, k=2))]
    assert len(set(named)) == 4
    assert function_name(made(3)) == named[0]
    assert named[2].startswith("best#")
    assert repr(aj.Custom(best, name="mine")).startswith("Custom(mine, ")
    weights = np.arange(4.0)
    first = function_name(lambda s, p: s > weights[0])
    weights[0] = 7
    assert function_name(lambda s, p: s > weights[0]) != first


def test_is_approximate_beyond_its_window():
    way = Way.of(Plan(aj.Custom(best, WINDOW)))
    assert way.exact_until == 8
    assert way.name.startswith("Custom(best#")
    assert way.name != Way.of(Plan(aj.Custom(in_range, WINDOW))).name


@pytest.mark.slow
def test_generates_explains_and_is_marked(db, rng):
    prompt = rng.integers(32, 127, 300)
    db.import_context(prompt[:250])
    texts, explained = [], []
    for query in (aj.TopK(4, WINDOW), aj.Custom(best, WINDOW)):
        session, rest = db.create_session(prompt)
        tokens = list(
            aj.generate(session, rest, max_new_tokens=5, attention=Plan(query, aj.Flat()))
        )
        texts.append([token.id for token in tokens])
        explained.append(session.explain(analyze=True))
        ((start, made_by),) = session.origins[0].runs
        assert start == 300
        assert made_by.startswith(type(query).__name__)
    assert texts[0] == texts[1]
    one, other = (e.to_dict() for e in explained)
    assert "Custom(best#" in str(explained[1])
    assert one["analysis"]["recovery_mean"] == other["analysis"]["recovery_mean"]
    assert one["phases"]["decode"]["layers"] == other["phases"]["decode"]["layers"]
    with pytest.raises(RequestError, match="Custom"):
        aj.generate(session, [5], attention=aj.Custom)


def test_a_function_of_no_module_has_a_name():
    """As of code that was run by `exec`."""
    names = {}
    exec("def every(scores, positions):\n    return scores > limit\nlimit = -1.0", names)
    assert names["every"].__module__ in (None, "builtins")
    first = str(aj.Custom(names["every"]))
    names["limit"] = -2.0
    assert "every" in first
    assert str(aj.Custom(names["every"])) != first  # what it refers to is part of it
