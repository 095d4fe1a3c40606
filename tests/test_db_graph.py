"""Graphs of stored contexts: built, kept on disk, lent to sessions, gone with their context."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax.contexts import graphs
from alaya_jax.errors import ContextError, DatabaseError, RequestError
from alaya_jax.index.graph import build as graph_build
from alaya_jax.models import llama
from alaya_jax.sharding import tree_shardings

WINDOW = aj.Window(sink=2, recent=8)
GRAPH = aj.Graph(degree=8, listed=16, sink=0, l0=512, capacity=512)
"""So long a list takes everything that can be reached, which is every key: neighbours by position
hang together."""

RANGE = aj.DIPR(beta=6.0, window=WINDOW)
THROUGH = aj.Plan(RANGE, index=GRAPH)


@pytest.fixture
def document(rng):
    return rng.integers(3, 256, 70)


@pytest.fixture
def context(db, document):
    return db.build_index(db.import_context(document), GRAPH)


def ids(session, rest, attention, n=6):
    return [t.id for t in aj.generate(session, rest, max_new_tokens=n, attention=attention)]


def answer(db, prompt, attention):
    session, rest = db.create_session(prompt)
    with session:
        return ids(session, rest, attention), session.reused[0]


def directory(db):
    """Where the graph is; there is one."""
    (found,) = (db._catalogue.store.path / "indexes").iterdir()
    return found


def flat_with_the_same_window(session, layer, q, covered):
    """The flat answer where all tokens from `covered` on are in the window."""
    recent = max(WINDOW.recent, session.length - covered)
    query = aj.DIPR(beta=RANGE.beta, window=aj.Window(WINDOW.sink, recent))
    return session.attention(q, layer, aj.Plan(query, index=aj.Flat()))


def compare(session, covered, rng):
    """One query in each layer, by the graph and by the flat scan; scores are tens, in float32."""
    for layer in range(2):
        q = 3 * rng.standard_normal((1, 1, 4, 16), np.float32)
        got = session.attention(q, layer, THROUGH)
        want = flat_with_the_same_window(session, layer, q, covered)
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_long_list_gives_the_flat_answer(db, context, document, rng):
    """Whole and in part: of a context that is reused up to token 41, only those before it count."""
    assert context.indexes == (aj.Graph(degree=8, listed=16, sink=0),)
    for shared in (70, 41):
        prompt = np.concatenate([document[:shared], rng.integers(3, 256, 9)])
        prompt[shared] = (document[shared] + 1) % 256 if shared < 70 else prompt[shared]
        session, rest = db.create_session(prompt)
        assert session.reused == [shared]
        session.prefill(rest)
        compare(session, shared, rng)
        assert [int(g.length) for g in session.batch.cover(THROUGH).layers[1]] == [shared]
        # A fork that has gone further, and its account.
        fork = session.fork()
        fork.prefill([5, 6, 7])
        compare(fork, shared, rng)
        d = session.explain().to_dict()["phases"]["attention"]
        assert d["searches_widened"] == 0
    assert answer(db, [*document, 77], THROUGH)[0] == answer(db, [*document, 77], RANGE)[0]


def test_explain_says_what_was_scored_and_what_overflowed(db, context, document):
    session, rest = db.create_session([*document, 77, 78])
    narrow = aj.Graph(degree=8, listed=16, sink=0, l0=1, capacity=2)
    ids(session, rest, aj.Plan(aj.DIPR(beta=np.inf, window=WINDOW), index=narrow))
    explained = session.explain()
    d = explained.to_dict()["phases"]["decode"]
    assert d["index"] == repr(narrow)
    assert d["searches_widened"] == d["steps"] * 2 * 4  # of each layer and head
    assert d["by_layer"][0]["widened"] == [d["steps"]] * 4
    assert d["keys_attended_per_step"] == d["keys_visible_per_step"]
    assert d["bytes_per_step"] > 0
    assert "raise Graph(capacity=" in str(explained)


@pytest.mark.slow
@pytest.mark.parametrize("capacity", [512, 3])
def test_an_analysis_shows_which_keys_a_graph_found(db, context, document, capacity):
    """Those of the flat plan with the same window, also where a search overflows."""
    session, rest = db.create_session([*document, 77, 78])
    session.prefill(rest)
    index = dataclasses.replace(GRAPH, l0=capacity, capacity=capacity)
    query = aj.DIPR(beta=RANGE.beta, window=aj.Window(2, 8))
    found = session.explain(analyze=True, attention=aj.Plan(query, index=index)).analysis
    want = session.explain(analyze=True, attention=aj.Plan(query, index=aj.Flat())).analysis
    for kept, exact in zip(found.positions, want.positions, strict=True):
        for got, right in zip(kept, exact, strict=True):
            np.testing.assert_array_equal(got, right)
    np.testing.assert_allclose(found.error, want.error, atol=1e-5)


def test_a_graph_is_read_from_disk_and_let_go_with_its_pages(open_db, document, rng):
    db = open_db()
    id = db.build_index(db.import_context(document), GRAPH).id
    db.close()
    again = open_db(read_only=True)
    (context,) = again.contexts
    assert context._graph is None
    session, rest = again.create_session([*document, 9])
    session.prefill(rest)
    compare(session, 70, rng)
    built = context._graph[1][1, None]
    assert built.neighbours.shape == (2, 256, 8)
    assert (np.asarray(built.neighbours)[:, 70:] == -1).all()
    assert again._catalogue.evict()
    assert context._graph is None
    compare(session, 70, rng)  # as its pages, a session keeps its graph
    with pytest.raises(DatabaseError, match="read_only"):
        again.build_index(id, GRAPH)


def test_a_graph_of_a_round_size_stays_in_its_file(open_db, rng, monkeypatch):
    """On a CPU: nothing of it is copied, so that it may be larger than memory."""
    monkeypatch.setattr("alaya_jax.storage.checked.MAPPED", 1)
    db = open_db()
    document = rng.integers(32, 126, 512)
    context = db.import_context(document)
    db.build_index(context, GRAPH, progress=False)
    found = db._catalogue.store.read_index(context.id, "graph", 1)["neighbours"]
    layer = context.graph(GRAPH, db.pool, 1)
    np.testing.assert_array_equal(layer.neighbours, found)
    of_file = Path("/proc/self/maps").read_text().splitlines()
    at = layer.neighbours.unsafe_buffer_pointer()
    spans = ([int(x, 16) for x in line.split()[0].split("-")] for line in of_file if ".npy" in line)
    assert any(first <= at < last for first, last in spans)


def test_a_graph_belongs_to_one_context(db, context, document, rng):
    """Storing the longer session makes a context without one; removing a context ends its own."""
    session, rest = db.create_session([*document, 40, 41, 42])
    ids(session, rest, THROUGH)
    longer = db.store(session)
    assert longer.indexes == ()
    # Until it has one, the graph of a shorter prefix serves, as far as it goes.
    other, rest = db.create_session([*document, 40, 41, 42, 43])
    assert (other.context, other.reused) == (longer, [73])
    other.prefill(rest)
    compare(other, 70, rng)
    place = directory(db)
    assert place.exists()
    db.remove(context)
    assert not place.exists()
    third, _ = db.create_session([*document, 40, 41, 42, 43])
    with pytest.raises(ContextError, match=r"db\.build_index\(context, aj\.Graph"):
        third.attention(np.zeros((1, 1, 4, 16), np.float32), 0, THROUGH)
    session.prefill([4])  # sessions go on
    ids(session, [5], THROUGH, n=2)


def test_sequences_without_a_graph_are_refused_before_anything_runs(db, context, document, rng):
    fresh, rest = db.create_session(rng.integers(3, 256, 9))
    with pytest.raises(RequestError, match="sequence 0 was opened on no stored context"):
        aj.generate(fresh, rest, attention=THROUGH)
    other = aj.Plan(RANGE, index=aj.Graph(degree=16))
    session, rest = db.create_session([*document, 5])
    with pytest.raises(RequestError, match=r"was built with.*'degree': 8.*'degree': 16"):
        aj.generate(session, rest, attention=other)
    batch, rests = db.create_session([[*document, 5], [*document[:50], 6, 7]])
    assert batch.reused == [70, 50]
    both = [t.id for t in aj.generate(batch, rests, max_new_tokens=1, attention=THROUGH)]
    alone = [answer(db, p, THROUGH)[0][0] for p in ([*document, 5], [*document[:50], 6, 7])]
    assert both == alone
    with pytest.raises(RequestError, match=r"only aj\.Graph"):
        db.build_index(context, aj.Sketch())
    with pytest.raises(ContextError, match="no context"):
        db.build_index("nothing", GRAPH)


def test_damage_is_named_and_mended(db, context, document):
    """The context itself stays usable; building again replaces what is damaged."""
    before = {path.name: path.read_bytes() for path in directory(db).iterdir()}
    file = directory(db) / "layer_001_neighbours.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    (problem,) = db.check(context)
    assert "graph index" in problem
    assert "layer_001_neighbours.npy does not match its checksum" in problem
    with pytest.raises(ContextError, match=r"layer_001_neighbours\.npy"):
        answer(db, [*document, 5], THROUGH)
    assert answer(db, [*document, 5], RANGE)[1] == 70
    db.build_index(context, GRAPH)
    assert db.check(context) == []
    assert {p.name: p.read_bytes() for p in directory(db).iterdir()} == before
    (directory(db) / "meta.json").write_text(json.dumps({"version": 99}))
    assert context.indexes == ()
    with pytest.raises(ContextError, match="version 99"):
        answer(db, [*document, 5], THROUGH)


@pytest.mark.slow
def test_heads_are_split_over_a_mesh_and_pages_are_not(open_db, tiny_model, document):
    """What one device built, a mesh reads, and the other way round; a context axis is refused."""
    mesh = aj.make_mesh(tensor=2)
    shardings = tree_shardings(
        mesh, aj.ShardingRules(), llama.logical_axes(tiny_model.config), tiny_model.params
    )
    params = jax.device_put(tiny_model.params, shardings)
    same = tiny_model.fingerprint
    split = dataclasses.replace(tiny_model, params=params, mesh=mesh, fingerprint=same)
    db = open_db(split)
    context = db.build_index(db.import_context(document), GRAPH)
    got, _ = answer(db, [*document, 5], THROUGH)
    (graph,) = {g.neighbours.sharding.spec[0] for g in context._graph[1].values()}
    assert graph == "tensor"
    db.close()
    alone = open_db()
    assert answer(alone, [*document, 5], THROUGH)[0] == got
    alone.close()
    spread = open_db(dataclasses.replace(tiny_model, mesh=aj.make_mesh(context=2)))
    with pytest.raises(RequestError, match="spread over mesh axis 'context'"):
        spread.build_index(context.id, GRAPH)
    with pytest.raises(RequestError, match="spread over mesh axis 'context'"):
        spread.create_session([3, 4])[0].plans(THROUGH, 4)


def test_an_interrupted_build_leaves_the_context_as_it_was(db, context, document, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    free = db.pool.free_tokens
    monkeypatch.setattr("alaya_jax.index.graph.build.link", interrupted)
    with pytest.raises(KeyboardInterrupt):
        db.build_index(context, aj.Graph(degree=4, listed=4))
    assert db.pool.free_tokens == free
    assert context.indexes == (aj.Graph(degree=8, listed=16, sink=0),)
    assert len(list((db._catalogue.store.path / "indexes").iterdir())) == 1


def test_the_model_is_asked_what_it_asked(db, tiny_model, document, monkeypatch):
    """The queries that a graph is built from are those of the prefill, of evenly chosen tokens."""
    seen, kept, real = [], [], graph_build.build

    def build(keys, length, queries, positions, **rest):
        seen.append((keys, queries, positions))
        return real(keys, length, queries, positions, **rest)

    def attend(layer, q, k, v, state):
        kept.append((q, k))
        return llama.causal_attend(layer, q, k, v, state)

    monkeypatch.setattr(graph_build, "build", build)
    db.build_index(db.import_context(document), GRAPH)
    llama.forward(tiny_model.params, tiny_model.config, document[None], np.arange(70)[None], attend)
    tokens = np.arange(4, 70, 5)  # 2 heads of a group, and 0.4 of the tokens: of every fifth
    for (keys, queries, positions), (q, k) in zip(seen, kept, strict=True):
        np.testing.assert_allclose(keys, np.moveaxis(k[0], 0, 1), atol=1e-4)
        np.testing.assert_array_equal(positions, [np.repeat(tokens, 2)] * 2)
        want = np.asarray(q)[0, tokens].reshape(len(tokens), 2, 2, 16)
        np.testing.assert_allclose(queries, np.moveaxis(want, 1, 0).reshape(2, -1, 16), atol=1e-4)


def test_long_documents_are_asked_chunk_by_chunk(open_db, rng, monkeypatch):
    """The same tokens are chosen, and they ask the same, however they are cut."""
    db = open_db()
    document, found = rng.integers(3, 256, 70), []
    context = db.import_context(document)
    for chunk in (512, 16):
        monkeypatch.setattr(graphs, "CHUNK", chunk)
        sequence = db.pool.share(context.resident, 70)
        parts = list(
            graphs._asked(db._catalogue.stack, db.pool, sequence, document, aj.Graph(queries=0.3))
        )
        found.append(
            [np.concatenate(x, axis=-3 if x[0].ndim > 1 else 0) for x in zip(*parts, strict=True)]
        )
        db.pool.release(sequence)
    np.testing.assert_array_equal(found[0][1], np.arange(6, 70, 7))
    np.testing.assert_array_equal(found[0][1], found[1][1])
    np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-4)
