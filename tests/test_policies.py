"""Every policy is an attention that the engine runs, and reads about the keys that it was given."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alaya_jax import policies
from alaya_jax.attention.engine import attend
from alaya_jax.cache import PageTable
from alaya_jax.errors import RequestError
from alaya_jax.index import Block, Flat, Sketch
from alaya_jax.index.memory import LayerMemory
from alaya_jax.query import DIPR, Full, TopK, Window
from alaya_jax.query.plan import of_layer, plan_for

PAGE, KEYS, LENGTH = 16, 64, 400
SMALL = Window(sink=8, recent=24)


@pytest.fixture(scope="module")
def layer(tiny_model):
    """Pages of one layer of the tiny model's shape, the query of the last token."""
    rng = np.random.default_rng(5)
    c = tiny_model.config
    pages = LENGTH // PAGE
    shape = (c.num_key_value_heads, pages + 1, PAGE, c.head_dim)
    k, v = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(2))
    q = 3 * jnp.asarray(rng.standard_normal((1, 1, c.num_attention_heads, c.head_dim)), jnp.float32)
    return q, k, v, jnp.arange(1, pages + 1)


def with_small_window(plan):
    """The same plan; the papers' windows hold all of a small test's keys."""
    query = plan.query
    if isinstance(query, TopK):
        query = TopK(query.k, SMALL)
    elif isinstance(query, DIPR):
        query = DIPR(query.beta, SMALL, query.recovery)
    return type(plan)(query, plan.index, plan.by, plan.share, plan.tail)


@pytest.mark.parametrize("name", policies.NAMES)
def test_policy_runs_on_every_layer(name, layer, tiny_model):
    policy, config = policies.get(name), tiny_model.config
    options = {"keys": KEYS} if "keys" in inspect.signature(policy).parameters else {}
    if "index" in inspect.signature(policy).parameters:
        options["index"] = Flat()
    plans = plan_for(policy(config, **options), config, LENGTH)
    q, k, v, ids = layer
    table = PageTable(ids[None], jnp.full(1, LENGTH - 1, jnp.int32))
    for plan in {repr(p): p for p in (of_layer(plans, i) for i in range(2))}.values():
        plan = with_small_window(plan)
        index = None
        if isinstance(plan.index, Sketch | Block):
            empty = plan.index.create(config, len(ids) + 1, PAGE, jnp.float32)
            index = jax.jit(type(empty).build)(empty, k, v, ids, jnp.full(len(ids), PAGE))
        one = jnp.ones(1, jnp.int32)
        memory = LayerMemory(k, v, table, index, jnp.full(1, LENGTH - PAGE))
        out, counts = attend(plan, q, memory, one)
        assert np.isfinite(out).all()
        attended = np.asarray(counts.attended)
        if isinstance(plan.query, TopK):
            pages = plan.by == "page"
            least, most = (KEYS - 2 * PAGE, KEYS) if pages else (KEYS, KEYS)
            assert np.all((attended - 32 >= least) & (attended - 32 <= most))
        elif isinstance(plan.query, Full):
            assert np.all(attended == LENGTH)
        else:
            assert np.all((attended >= 32) & (attended <= LENGTH))


def test_layers_of_policies(tiny_model):
    config = tiny_model.config
    quest = policies.get("quest")(config, keys=KEYS)
    assert [isinstance(p.query, Full) for p in quest] == [True, True]
    first, second = policies.get("alayadb")(config, beta=7.0, index=Sketch())
    assert (first.index, second.index) == (Flat(), Sketch())
    assert first.query == second.query == DIPR(7.0)


def test_unknown_policy_is_refused():
    with pytest.raises(RequestError, match="'snapkv': use one of streaming_llm, infllm"):
        policies.get("snapkv")


def test_numbers_of_a_policy_do_not_compile_anew(layer, tiny_model):
    q, k, v, ids = layer
    table, one = PageTable(ids[None], jnp.full(1, LENGTH - 1, jnp.int32)), jnp.ones(1, jnp.int32)
    config = tiny_model.config
    plans = [
        plan_for(policies.get("alayadb")(config, beta=beta, index=Flat()), config, LENGTH)[0]
        for beta in (1.0, 2.0)
    ]
    memory = LayerMemory(k, v, table)
    run = jax.jit(chex.assert_max_traces(lambda plan: attend(plan, q, memory, one), n=1))
    for plan in plans:
        run(plan)
    assert jax.tree.structure(plans[0]) == jax.tree.structure(plans[1])
