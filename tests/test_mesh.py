"""A database whose pages are spread over a mesh answers as on one device, and reads as much."""

import dataclasses

import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax import DIPR, Sketch, TopK, Window
from alaya_jax.compilation import by_name
from alaya_jax.errors import CacheFullError, ConfigError, RequestError
from alaya_jax.query.plan import Plan

WINDOW = Window(2, 6)
ATTENTION = (Plan(DIPR(beta=3.0, window=WINDOW), Sketch()), Plan(TopK(5, WINDOW)))
"""One plan for each of the two layers."""

OPTIONS = {"page_size": 4, "pages": 65}


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setattr("alaya_jax.cache.tables.TABLE_WIDTH", 32)


@pytest.fixture
def laid_on(tiny_model, on_mesh):
    """The tiny model on a mesh; by none, itself."""

    def lay(**axes):
        return on_mesh(tiny_model, aj.make_mesh(**axes)) if axes else tiny_model

    return lay


def generate(session, tokens, n):
    return [t.id for t in aj.generate(session, tokens, max_new_tokens=n, attention=ATTENTION)]


def explained(session):
    """All that `explain` says."""
    said = session.explain().to_dict()
    assert said["phases"]["decode"]["keys_read_per_step"] > 0
    return said["phases"]


def scenario(db, documents):
    """Import, reuse, generation, two branches that write into one page, eviction, return."""
    said = []
    for document in documents[:3]:
        db.import_context(document, progress=False)
    for document in documents[:2]:
        session, rest = db.create_session([*document, 5, 6])
        assert session.reused == [len(document)]
        said.append(generate(session, rest, 9))
        branch = session.fork()
        said += [generate(session, [7], 4), generate(branch, [8], 4)]
        said += [explained(session), explained(branch)]
        kept = db.store(branch)
        branch.close()
        session.close()
    # The pool holds no more: the context used longest ago goes, and comes back from disk.
    for document in documents[3:]:
        db.import_context(document, progress=False)
    assert any(c.resident is None for c in db.contexts)
    session, rest = db.create_session([*documents[0], 5, 6])
    said.append(generate(session, rest, 9))
    assert said[-1] == said[0]
    session.close()
    return said, kept.tokens


@pytest.fixture
def documents(rng):
    return [rng.integers(3, 256, n) for n in (41, 58, 30, 59, 55)]


@pytest.mark.slow
def test_a_session_s_whole_life_on_eight_shards(open_db, laid_on, documents):
    """Pages of every sequence on eight devices; stored there, read on one device and on 2x2x2."""
    want, tokens = scenario(open_db(path="one", **OPTIONS), documents)
    compiled = by_name.copy()
    db = open_db(laid_on(context=8), path="mesh", **OPTIONS)
    got, there = scenario(db, documents)
    # As many programs as on one device: nothing is laid one way in this call, another in the next.
    # Two layers of unlike plans: two programs of a step, one of each of a prefill's two widths.
    assert by_name["end"] - compiled["end"] == 1
    assert by_name["layers"] - compiled["layers"] == 4
    assert db.pool.kv.k[0].sharding.shard_shape((2, 64, 4, 16)) == (2, 8, 4, 16)
    assert got == want
    np.testing.assert_array_equal(there, tokens)

    db.close()
    prompts = [[*documents[0], 5, 6], [*documents[1][:33], 9]]

    def batch(**axes):
        """Two of what eight devices stored, reused at once: one whole, one in part."""
        with aj.DB(db.path, laid_on(**axes), db.budget, page_size=4) as other:
            session, rest = other.create_session(prompts)
            assert session.reused == [len(documents[0]) + 1, 33]
            new = aj.generate(session, rest, max_new_tokens=9, attention=ATTENTION)
            list(new)
            return new.ids, explained(session)

    want = batch()
    assert want[0][0] == got[0]
    assert batch(data=2, tensor=2, context=2) == want


def test_budgets_of_a_split_pool(open_db, laid_on):
    model = laid_on(context=8)
    options = {"page_size": 4, "indexes": None}

    def least(pages):
        return f"least {aj.Budget.for_pages(model, pages, 4).device:,} bytes"

    with pytest.raises(RequestError, match=rf"no page for each of 8 devices.*{least(16)}"):
        open_db(model, path="a", pages=15, **options)
    db = open_db(model, path="b", pages=23, **options)  # 16 of them: one of each device is used
    assert db.pool.capacity_tokens == 8 * 4
    with pytest.raises(CacheFullError, match=rf"33 tokens.* holds 32;.* {least(24)}"):
        db.create_session(range(3, 36))
    assert open_db(model, path="c", pages=24, **options).pool.capacity_tokens >= 33
    room = db._catalogue.indexes.room
    assert room.pages == 16 * 4 * db.token_bytes, "over all devices, whole parts"
    session, rest = db.create_session(range(3, 30))
    session.batch.make_room([len(rest)])
    with pytest.raises(CacheFullError, match="1 of 8 are free"):
        db.create_session([5])[0].batch.make_room([8])


def test_a_pool_whose_heads_do_not_divide_is_refused(open_db, tiny_model):
    """By the cache too, where the parameters lie on no mesh that would have refused them."""
    model = dataclasses.replace(tiny_model, mesh=aj.make_mesh(tensor=4, context=2))
    with pytest.raises(ConfigError, match=r"'kv_heads' of size 2 .*'tensor' of size 4.*kv_heads="):
        open_db(model, page_size=4).pool.kv  # noqa: B018
