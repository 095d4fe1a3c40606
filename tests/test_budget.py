"""`Budget(device=...)`: pages, and what indexes and graphs take beside them."""

import dataclasses
import gc
import re

import jax
import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax.cli import runtime
from alaya_jax.contexts import graphs
from alaya_jax.errors import CacheFullError, RequestError

WINDOW = aj.Window(sink=2, recent=8)
RANGE = aj.DIPR(beta=6.0, window=WINDOW)
USUAL = aj.Plan(RANGE, aj.Sketch())
LIGHTER = aj.Plan(RANGE, aj.Sketch(2))
BOUNDS = aj.Plan(aj.TopK(32, window=WINDOW), aj.Block(), by="page")
GRAPH = aj.Graph(degree=8, listed=16, sink=0)
LAYERS, HEADS, DIM, PAGE = 2, 2, 16, 16
KV = 2 * LAYERS * HEADS * DIM * 4
"""Bytes of a token's keys and values."""


def size(plan, db):
    """Bytes of a plan's index, in all layers of all pages."""
    config, pool = db.model.config, db.pool
    return LAYERS * pool.num_pages * plan.index.page_bytes(config, pool.page_size, pool.dtype)


def held(db):
    """Bytes of the arrays that indexes are in."""
    states = db._catalogue.indexes._indexes.values()
    return sum(x.nbytes for state in states for x in jax.tree.leaves(state.index))


@pytest.fixture
def tight(open_db):
    """A database of 64 pages, with room for the index of plans that name none."""
    return open_db(indexes=None)


@pytest.fixture
def document(rng):
    return rng.integers(3, 256, 70)


def answer(db, prompt, plan, tokens=3):
    session, rest = db.create_session(prompt)
    with session:
        return ids(session, rest, plan, tokens)


def ids(session, rest, plan, tokens=3):
    return [t.id for t in aj.generate(session, rest, max_new_tokens=tokens, attention=plan)]


def test_pages_and_the_usual_index_are_one_budget(tiny_model):
    sketch = LAYERS * aj.Sketch().page_bytes(tiny_model.config, PAGE, np.float32)
    for count in (2, 3, 65, 4096):
        budget = aj.Budget.for_pages(tiny_model, count)
        assert budget.device == count * (PAGE * KV + sketch)
        assert budget.pages(tiny_model, PAGE) == count
    assert aj.Budget(budget.device - 1).pages(tiny_model, PAGE) == 4095
    # What fitted when pages had all of it still opens, with fewer of them.
    assert aj.Budget(65 * PAGE * KV).pages(tiny_model, PAGE) == 65 * PAGE * KV // (
        PAGE * KV + sketch
    )
    given = aj.Budget.for_pages(tiny_model, 65, indexes="1MiB", host="1GiB")
    assert given == aj.Budget(65 * PAGE * KV + (1 << 20), "1GiB", "1MiB")
    assert given.pages(tiny_model, PAGE) == 65
    assert aj.Budget.for_pages(tiny_model, 9, 4, indexes=1).pages(tiny_model, 4) == 9


def test_a_model_whose_keys_fill_no_words_needs_no_room_for_a_sketch(tiny_model):
    config = dataclasses.replace(tiny_model.config, head_dim=2)

    class Other:
        dtype = np.dtype(np.float32)

    Other.config = config
    assert aj.Budget.for_pages(Other, 10).device == 10 * PAGE * config.kv_width * 4


def test_room_for_the_indexes_that_are_named(tiny_model, open_db, document):
    config, pages = tiny_model.config, 65
    lighter, bounds = (
        pages * LAYERS * x.index.page_bytes(config, PAGE, np.float32) for x in (LIGHTER, BOUNDS)
    )
    for indexes, beside in (
        (aj.Flat(), 0),
        (aj.Sketch(2), lighter),
        ((aj.Sketch(2), aj.Block()), lighter + bounds),
        ((), 0),
    ):
        budget = aj.Budget.for_pages(tiny_model, pages, indexes=indexes)
        assert budget.device == pages * PAGE * KV + beside
        assert budget.indexes == indexes
        assert budget.pages(tiny_model, PAGE) == pages
    db = open_db(indexes=(aj.Sketch(2), aj.Block()))
    one, rest = db.create_session(document)
    two, more = db.create_session(document)
    assert ids(one, rest, LIGHTER)
    assert ids(two, more, BOUNDS)
    with pytest.raises(CacheFullError, match=r"Sketch\(bits=4\) would"):
        db.create_session(document)[0].prefill([5], USUAL)
    plain = open_db(path="plain", indexes=aj.Flat())
    assert ids(*plain.create_session(document), RANGE)
    with pytest.raises(CacheFullError, match=r"Sketch\(bits=1\) would"):
        plain.create_session(document)[0].prefill([5], aj.Plan(RANGE, aj.Sketch(1)))


def test_room_for_a_graph_of_all_that_fits(open_db):
    """Also where its rows are padded most."""
    for tokens in (1025, 1280, 2049):
        db = open_db(path=str(tokens), pages=-(-tokens // PAGE) + 1, indexes=aj.Graph())
        parts = [graphs.part("a", tokens, aj.Graph(), db.pool, layer) for layer in range(LAYERS)]
        assert len(parts[0] | parts[1]) == 2
        assert db._catalogue.indexes.room.fits(parts[0] | parts[1])


def test_budgets_that_are_none(tmp_path, tiny_model):
    for wrong in ("much", 0, -1, (aj.Sketch(), 5), aj.Sketch):
        with pytest.raises(RequestError, match=r"Budget\(indexes="):
            aj.Budget(indexes=wrong)
    with pytest.raises(RequestError, match=r"indexes get '1MiB' of it.* at least 1,064,960 bytes"):
        aj.DB(tmp_path / "db", tiny_model, aj.Budget("1MiB", indexes="1MiB"))
    assert aj.Budget(1_064_960, indexes="1MiB").pages(tiny_model, PAGE) == 2
    with pytest.raises(RequestError, match="least") as error:
        aj.DB(tmp_path / "db", tiny_model, aj.Budget(2 * PAGE * KV))
    least = int(re.search(r"at least ([\d,]+)", str(error.value))[1].replace(",", ""))
    assert aj.Budget(least).pages(tiny_model, PAGE) == 2
    assert not (tmp_path / "db").exists()


def test_a_plan_that_names_no_index_always_has_room(tight, document):
    """And what it takes is what the account says."""
    room = tight._catalogue.indexes.room
    assert room.limit == room.pages + size(USUAL, tight)
    session, rest = tight.create_session(document)
    with session:
        ids(session, rest, aj.Plan(RANGE, tail=True))
        assert held(tight) == size(USUAL, tight)
        found = session.explain()
    assert found.index_bytes == {"Sketch(bits=4)": size(USUAL, tight)}
    assert found.to_dict()["index_bytes"] == found.index_bytes
    assert "beside the pages of all sessions: Sketch(bits=4)" in str(found)
    stats = tight.stats()
    assert stats.bytes_beside == found.index_bytes
    assert stats.device_limit == tight.budget.device_bytes
    assert "of indexes: Sketch(bits=4)" in stats.rows()["beside"]
    assert stats.bytes_beside_host == {}


def test_an_index_that_no_session_asks_makes_room_for_another(tight, open_db, document):
    """It is made anew where it is asked again; answers are the same."""
    roomy = open_db(path="roomy")
    for plan in (USUAL, LIGHTER, BOUNDS, USUAL):
        assert answer(tight, document, plan) == answer(roomy, document, plan)
        assert size(plan, tight) <= held(tight) <= size(USUAL, tight)
    session, rest = tight.create_session(document)
    forms = {
        plan.index: ids(session, rest if i == 0 else [9], plan)
        for i, plan in enumerate((USUAL, LIGHTER, BOUNDS))
    }  # one session asks one after another
    assert len(forms) == 3
    beside = tight.stats().bytes_beside
    assert beside["Block(summary='bounds')"] == size(BOUNDS, tight)
    assert held(tight) == sum(beside.values()) <= size(USUAL, tight)


def test_two_sessions_that_ask_different_indexes(tight, tiny_model, document):
    """The second is refused before it runs, and goes on as if it had not asked."""
    one, rest = tight.create_session(document)
    said = ids(one, rest, USUAL)
    two, rest = tight.create_session(document)
    before = two.lengths, tight.pool.free_tokens, held(tight)
    for ask in (
        lambda: aj.generate(two, [9], attention=LIGHTER, max_new_tokens=2),
        lambda: two.prefill([9], LIGHTER),
        lambda: two.prefill([9], [aj.Full(), LIGHTER]),
    ):
        with pytest.raises(CacheFullError, match=r"Sketch\(bits=2\) would take .*close a ses") as e:
            ask()
        assert (two.lengths, tight.pool.free_tokens, held(tight)) == before
    asked = two.explain(attention=LIGHTER)  # which asks for nothing yet
    assert set(asked.index_bytes) == {"Sketch(bits=4)"}
    assert ids(two, rest, USUAL) == said, "an index that is there serves both"
    with pytest.raises(CacheFullError, match=r"Sketch\(bits=2\) would"):
        two.explain(analyze=True, attention=LIGHTER)
    numbers = re.findall(r"[\d,]{4,}", str(e.value))
    taken, limit, _, used, pages = (int(x.replace(",", "")) for x in numbers[:5])
    assert taken == size(LIGHTER, tight) // 2, "of the one layer that asks"
    assert limit == tight.budget.device_bytes
    assert used == pages + size(USUAL, tight)
    device, indexes = map(int, re.search(r"device=(\d+), indexes=(\d+)\)", str(e.value)).groups())
    assert aj.Budget(device, indexes=indexes).pages(tiny_model, PAGE) == tight.pool.num_pages
    one.close()
    two.close()
    assert answer(tight, document, LIGHTER)
    three, rest = tight.create_session(document)
    ids(three, rest, USUAL)
    del three, rest
    gc.collect()
    assert answer(tight, document, LIGHTER), "one that was dropped holds nothing"


def test_a_fork_asks_for_itself(tight, document):
    session, rest = tight.create_session(document)
    said = ids(session, rest, USUAL, 2)
    fork = session.fork()
    session.close()
    assert tight._catalogue.indexes.room.claimed() == {}
    other, more = tight.create_session(document)
    assert ids(other, more, LIGHTER, 2)
    with pytest.raises(CacheFullError, match=r"Sketch\(bits=4\) would take"):
        ids(fork, [said[-1]], USUAL)
    other.close()
    assert ids(fork, [], USUAL)


def test_a_model_of_the_users_own_is_refused_in_its_first_layer(tight, document, rng):
    one, rest = tight.create_session(document)
    ids(one, rest, USUAL)
    two, rest = tight.create_session(document)
    two.prefill(rest)
    q = rng.standard_normal((1, 1, 4, DIM), np.float32)
    with pytest.raises(CacheFullError, match=r"Sketch\(bits=2\)"):
        two.attention(q, 0, LIGHTER)
    one.close()
    # Each layer asks for itself and those behind it: the second asks another index.
    for _ in range(2):
        for layer, plan in enumerate((LIGHTER, BOUNDS)):
            two.attention(q, layer, plan)
    assert set(tight._catalogue.indexes.room.claimed()) == {
        (LIGHTER.index, 0),
        (BOUNDS.index, 1),
    }


def test_graphs_are_counted_and_refused_before_they_are_built(open_db, document, monkeypatch):
    db = open_db(indexes=2000)
    context = db.import_context(document)
    monkeypatch.setattr("alaya_jax.contexts.graphs.build_layers", None)  # is not called
    with pytest.raises(CacheFullError, match=rf"the graph of context {context.id} would") as error:
        db.build_index(context, GRAPH)
    assert context.indexes == ()
    monkeypatch.undo()
    indexes = int(re.search(r"indexes=(\d+)\)", str(error.value))[1])
    db.close()
    db = open_db(indexes=indexes)
    (context,) = db.contexts
    db.build_index(context, GRAPH)
    through = aj.Plan(RANGE, GRAPH)
    session, rest = db.create_session([*document, 9])
    assert session.explain(attention=through).index_bytes == {}
    ids(session, rest, through)
    graph = list(context._graph[1].values())
    there = sum(x.neighbours.nbytes + x.starts.nbytes for x in graph)
    assert db.stats().bytes_beside == {f"the graph of context {context.id}": there}
    assert there == indexes, "the estimate was exact"
    other, rest = db.create_session([*document, 9])
    assert ids(other, rest, through), "a graph that is there serves all"
    with pytest.raises(CacheFullError, match=rf"the graph of context {context.id} {there:,}"):
        db.create_session(document)[0].prefill([5], BOUNDS)
    del graph
    session.close()
    other.close()
    assert answer(db, document, BOUNDS)
    assert context._graph is None, "let go of"
    assert answer(db, [*document, 9], through), "and read again"
    db.close()
    db = open_db(indexes=indexes - 1)
    with pytest.raises(CacheFullError, match="would take"):
        answer(db, [*document, 9], through)
    assert db.stats().bytes_beside == {}


def test_auto_takes_what_fits_beside_what_others_ask(open_db, document, monkeypatch):
    from alaya_jax.optimizer import situation

    given = []
    monkeypatch.setattr(situation, "machine_for", lambda *_, **__: None)
    monkeypatch.setattr(situation, "choose", lambda *args: given.append(args[-1]))
    db = open_db(indexes=None)
    one, rest = db.create_session(document)
    two, _ = db.create_session(document)
    situation.choose_for(aj.Auto(), two.batch, 100)
    ids(one, rest, BOUNDS)
    situation.choose_for(aj.Auto(), two.batch, 100)
    with one:
        pass
    three, rest = db.create_session(document)
    ids(three, rest, USUAL)  # one that it may choose too
    situation.choose_for(aj.Auto(), two.batch, 100)
    limit = db.budget.device_bytes
    assert given == [limit, limit - size(BOUNDS, db), limit]


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"data": 2, "tensor": 2}, {"tensor": 2, "context": 2}], ids=str)
def test_a_mesh_counts_what_all_its_devices_hold_once(open_db, tiny_model, on_mesh, document, axes):
    db = open_db(on_mesh(tiny_model, aj.make_mesh(**axes)), indexes=None)
    one, rest = db.create_session(document)
    ids(one, rest, USUAL)
    assert held(db) == size(USUAL, db) <= db._catalogue.indexes.room.limit - 64 * PAGE * KV
    two, rest = db.create_session(document)
    with pytest.raises(CacheFullError, match=r"Sketch\(bits=2\) would take"):
        ids(two, rest, LIGHTER)
    one.close()
    assert ids(two, rest, LIGHTER)


def test_the_command_has_room_for_the_index_that_it_is_asked(tiny_model):
    """Though it is heavier than the one of plans that name none."""
    plan = aj.Plan(RANGE, aj.Sketch(8))
    page = PAGE * KV + LAYERS * plan.index.page_bytes(tiny_model.config, PAGE, np.float32)
    for memory in (None, "4MiB"):
        indexes = runtime.indexes_of(plan, memory)
        budget = runtime.budget_for(tiny_model, 100, memory, indexes=indexes)
        count = budget.pages(tiny_model, PAGE)
        assert count * page <= budget.device_bytes < (count + 1) * page
    assert runtime.budget_for(tiny_model, 100).pages(tiny_model, PAGE) == 512, "as ever"
    assert runtime.indexes_of(aj.Full(), None) is None
    assert runtime.indexes_of(aj.Auto(), "4MiB") is None
    assert runtime.indexes_of(aj.Auto(), None) == (aj.Sketch(), aj.Graph())
