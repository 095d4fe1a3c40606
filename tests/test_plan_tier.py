"""`Plan(tier=...)`: where stored pages are read is said by the plan that reads them."""

import dataclasses

import jax
import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax.errors import CacheFullError, RequestError
from alaya_jax.query.origin import Way
from alaya_jax.query.plan import plan_for, tier_of

FULL = aj.Plan(aj.Full())
ON_HOST, ON_DEVICE = (dataclasses.replace(FULL, tier=tier) for tier in ("host", "device"))


@pytest.fixture
def prompt(open_db, rng):
    """Of which a database holds 230 tokens."""
    document = rng.integers(32, 126, 230)
    db = open_db()
    db.import_context(document)
    db.close()
    return [*document, 40, 41]


def decoded(session, rest, plan, tokens=4):
    """Ids and log-probabilities, all by a plan."""
    run = aj.generate(session, rest, max_new_tokens=tokens, attention=plan, prefill=plan)
    return [(t.id, t.logprob) for t in run], run.timing.programs


def test_it_is_a_part_of_the_plan(tiny_model):
    assert (FULL.tier, ON_HOST.tier) == (None, "host")
    leaves, tree = jax.tree.flatten(ON_HOST)
    assert jax.tree.unflatten(tree, leaves) == ON_HOST != FULL
    assert "tier='host'" in repr(ON_HOST)
    assert plan_for(ON_HOST, tiny_model.config, 10) == ON_HOST
    assert plan_for(aj.Plan(aj.DIPR(beta=1.0), tier="host"), tiny_model.config, 10).tier == "host"
    assert str(ON_HOST) == str(FULL)
    dipr = aj.Plan(aj.DIPR(beta=1.0), aj.Flat())
    assert Way.of(dipr) == Way.of(dataclasses.replace(dipr, tier="host")), "no other numbers"
    with pytest.raises(RequestError, match=r"Plan\(tier='disk'\): use one of"):
        aj.Plan(aj.Full(), tier="disk")
    assert tier_of(FULL, (FULL, ON_HOST)) == "host"
    assert tier_of(FULL, (FULL, FULL)) is None
    with pytest.raises(RequestError, match="in one place for all layers"):
        tier_of((ON_DEVICE, ON_HOST))


def test_pages_go_where_a_plan_reads_them(open_db, prompt):
    """There and back in one session; each time the same bits, by the same programs."""
    db = open_db()
    session, rest = db.create_session(prompt)
    expected, _ = decoded(session, rest, None)
    assert session.explain().in_files is None
    session.close()
    session, rest = db.create_session(prompt)
    fork = session.fork()
    free = db.pool.free_tokens
    said, _ = decoded(session, rest, ON_HOST)
    assert said == expected
    found = session.explain()
    assert (found.in_files, found.placed) == ([224], "Plan(tier='host')")
    assert "files [224] (Plan(tier='host'))" in str(found)
    assert found.to_dict()["phases"]["decode"]["tier"] == "host"
    assert db.pool.free_tokens == free - 16, "its tail is its own; the rest is of the context"
    assert fork.explain().in_files is None, "each goes for itself"
    here, _ = decoded(fork, rest, FULL)
    assert here == expected
    again, _ = decoded(session, [42, 43], ON_DEVICE)
    assert session.explain().in_files is None
    there, programs = decoded(fork, [42, 43], FULL)
    assert again == there
    assert programs == 0
    with fork.fork() as other:
        decoded(other, [44], ON_HOST, tokens=2)
        assert other.explain().in_files == [224]
    session.close()
    fork.close()


def test_what_was_mapped_comes_into_the_pool_if_it_fits(open_db, prompt, tmp_path):
    db = open_db()
    session, rest = db.create_session(prompt, tier="device")
    expected, _ = decoded(session, rest, FULL)
    small = open_db(pages=8)
    session, rest = small.create_session(prompt)
    assert session.explain().placed.startswith("the prompt does not fit into Budget(device=")
    free = small.pool.free_tokens
    with pytest.raises(CacheFullError):
        decoded(session, rest, ON_DEVICE)
    assert small.pool.free_tokens == free
    said, _ = decoded(session, rest, FULL)
    assert said == expected, "nothing changed"


def test_two_that_say_otherwise_are_refused(open_db, prompt):
    db = open_db()
    for tier, plan in (("host", ON_DEVICE), ("device", ON_HOST)):
        session, rest = db.create_session(prompt, tier=tier)
        with session:
            says = rf"Plan\(tier='{plan.tier}'\): .* create_session\(tier='{tier}'\)"
            with pytest.raises(RequestError, match=says):
                aj.generate(session, rest, max_new_tokens=2, attention=plan)
            assert session.lengths == [230]
    session, rest = db.create_session(prompt)
    with session, pytest.raises(RequestError, match="name one"):
        aj.generate(session, rest, max_new_tokens=2, attention=ON_HOST, prefill=ON_DEVICE)


def test_a_model_of_ones_own_and_batches(open_db, prompt, tiny_model):
    """A batch of which one sequence is of no context; layer by layer."""
    db, c = open_db(), tiny_model.config
    rows = [prompt, [50, 51, 52], prompt[:130]]
    expected, rest = db.create_session(rows)
    run = aj.generate(expected, rest, max_new_tokens=3)
    list(run)
    session, rest = db.create_session(rows)
    mapped = aj.generate(session, rest, max_new_tokens=3, attention=ON_HOST)
    list(mapped)
    assert mapped.ids == run.ids
    assert session.explain().in_files == [224, 0, 128]
    outs = []
    for plan in (FULL, ON_HOST):
        session, _ = db.create_session(prompt)
        random = np.random.default_rng(3)
        q = random.standard_normal((1, 1, c.num_attention_heads, c.head_dim), np.float32)
        k, v = random.standard_normal((2, 1, 1, c.num_key_value_heads, c.head_dim), np.float32)
        for layer in range(c.num_hidden_layers):
            session.update(None, k, v, layer)
            outs.append(np.asarray(session.attention(q, layer, plan)))
        assert session.explain().in_files == (None if plan is FULL else [224])
    np.testing.assert_array_equal(outs[:2], outs[2:])


def test_a_plan_moves_no_cache_from_a_mesh_to_the_cpu(open_db, tiny_model, rng, on_mesh):
    """It is refused by name, with the way out: a session on the CPU, see runtime/test_apart.py."""
    db = open_db(on_mesh(tiny_model, aj.make_mesh(tensor=2)))
    c, document = tiny_model.config, rng.integers(32, 126, 40)
    shape = c.num_hidden_layers, 2, c.num_key_value_heads, 40, c.head_dim
    kv = rng.standard_normal(shape).astype(np.float32)
    db.import_context(document, [(k, v) for k, v in kv])
    session, rest = db.create_session([*document, 40])
    with session:
        with pytest.raises(RequestError, match=r"open another with create_session\(tier='host'\)"):
            aj.generate(session, rest, max_new_tokens=2, attention=ON_HOST)
        np.testing.assert_array_equal(session.kv(1)[0], kv[1, 0])
        assert session.explain().in_files is None
