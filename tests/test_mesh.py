"""A database whose pages are spread over a mesh answers as on one device, and says it read the same."""

import dataclasses

import jax
import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax import DIPR, Sketch, TopK, Window, programs
from alaya_jax.errors import CacheFullError, ConfigError, RequestError
from alaya_jax.models import llama
from alaya_jax.query.plan import Plan
from alaya_jax.sharding import tree_shardings

WINDOW = Window(2, 6)
ATTENTION = (Plan(DIPR(beta=3.0, window=WINDOW), Sketch()), Plan(TopK(5, WINDOW)))
"""One plan for each of the two layers."""

OPTIONS = {"page_size": 4, "pages": 65}


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setattr("alaya_jax.pool.TABLE_WIDTH", 32)


@pytest.fixture
def laid_on(tiny_model):
    """The tiny model on a mesh; by none, itself."""

    def lay(**axes):
        if not axes:
            return tiny_model
        mesh, rules = aj.make_mesh(**axes), aj.ShardingRules()
        shardings = tree_shardings(
            mesh, rules, llama.logical_axes(tiny_model.config), tiny_model.params
        )
        params = jax.tree.map(jax.device_put, tiny_model.params, shardings)
        return dataclasses.replace(tiny_model, params=params, mesh=mesh, rules=rules)

    return lay


def generate(session, tokens, n):
    return [t.id for t in aj.generate(session, tokens, max_new_tokens=n, attention=ATTENTION)]


def explained(session):
    """All numbers of `explain`; the estimated mass is no whole number, and rounded."""
    phases = session.explain().to_dict()["phases"]
    assert phases["decode"]["keys_read_per_step"] > 0

    def round_mass(phase):
        rows = [{**r, "mass_estimated": str(np.round(r["mass_estimated"] or 0, 4))} for r in phase]
        return rows

    return {
        name: {**phase, "by_layer": round_mass(phase["by_layer"]), "mass_estimated": None}
        for name, phase in phases.items()
    }


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
    assert any(c._resident is None for c in db.contexts)
    session, rest = db.create_session([*documents[0], 5, 6])
    said.append(generate(session, rest, 9))
    assert said[-1] == said[0]
    session.close()
    return said, kept.tokens


@pytest.fixture
def documents(rng):
    return [rng.integers(3, 256, n) for n in (41, 58, 30, 59, 55)]


def test_a_session_s_whole_life_on_eight_shards(open_db, laid_on, documents):
    """Pages of every sequence on eight devices; stored there, read on one device and on 2x2x2."""
    want, tokens = scenario(open_db(path="one", **OPTIONS), documents)
    compiled = programs.decode._cache_size(), programs.extend._cache_size()
    db = open_db(laid_on(context=8), path="mesh", **OPTIONS)
    got, there = scenario(db, documents)
    # As many programs as on one device: nothing is laid one way in this call, another in the next.
    assert programs.decode._cache_size() - compiled[0] == 1
    assert programs.extend._cache_size() - compiled[1] == 2
    assert db.pool.kv.k[0].sharding.shard_shape((2, 64, 4, 16)) == (2, 8, 4, 16)
    assert got == want
    np.testing.assert_array_equal(there, tokens)
