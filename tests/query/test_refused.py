"""What is no query, plan or goal is refused by name, with what to write instead."""

import jax
import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax.errors import AlayaError
from alaya_jax.index import Graph
from alaya_jax.query.plan import of_layer, plan_for

WRONG = {
    "TopK(k=10.5)": lambda: aj.TopK(10.5),
    "TopK(k='5')": lambda: aj.TopK("5"),
    "TopK(window=3)": lambda: aj.TopK(5, window=3),
    "DIPR(beta='x')": lambda: aj.DIPR(beta="x"),
    "DIPR(beta=nan)": lambda: aj.DIPR(beta=float("nan")),
    "DIPR(recovery='x')": lambda: aj.DIPR(recovery="x"),
    "DIPR(error='x')": lambda: aj.DIPR(error="x"),
    "DIPR(error=-0.1)": lambda: aj.DIPR(error=-0.1),
    "DIPR(error=1)": lambda: aj.DIPR(error=1),
    "DIPR(recovery=..., error=...)": lambda: aj.DIPR(recovery=0.9, error=0.1),
    "give beta=..., recovery=... or error=...": aj.DIPR,
    "Plan(DIPR(error=...), index=Flat()": lambda: aj.Plan(aj.DIPR(error=0.1), aj.Flat()),
    "Plan(DIPR(error=...), index=None, by='page'": lambda: aj.Plan(aj.DIPR(error=0.1), by="page"),
    "Plan(DIPR(error=...), index=Graph(": lambda: aj.Plan(aj.DIPR(error=0.1), Graph()),
    "DIPR(before=1.5)": lambda: aj.DIPR(beta=1.0, before=1.5),
    "Window(sink='a')": lambda: aj.Window("a"),
    "Window(recent=1.5)": lambda: aj.Window(1, 1.5),
    "Tiles(q_block=1.5)": lambda: aj.Tiles(q_block=1.5),
    "Auto(tpot='x')": lambda: aj.Auto(tpot="x"),
    "Auto(recovery='x')": lambda: aj.Auto(recovery="x"),
    "Auto(window=3)": lambda: aj.Auto(window=3),
    "Plan('full')": lambda: aj.Plan("full"),
    "Plan(<class": lambda: aj.Plan(aj.Full),
    "Sketch(bits='4')": lambda: aj.Sketch("4"),
    "Sketch(bits=[4])": lambda: aj.Sketch([4]),
    "Block(summary=['mean'])": lambda: aj.Block(["mean"]),
    "Graph(degree='x')": lambda: Graph(degree="x"),
    "Graph(queries='x')": lambda: Graph(queries="x"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_number_is_named(name):
    with pytest.raises(AlayaError) as caught:
        WRONG[name]()
    assert name in str(caught.value)


@pytest.mark.parametrize("asked", ["full", aj.Full, None, 5, {"a": 1}, ["full"] * 2], ids=repr)
def test_what_is_no_attention_is_told_what_is(asked, tiny_model):
    with pytest.raises(AlayaError, match=r"attention=.*use Full\(\)"):
        plan_for(asked, tiny_model.config, 10)


def test_a_query_where_a_plan_is_wanted():
    with pytest.raises(AlayaError, match=r"write Plan\(Full\(\)\)"):
        of_layer(aj.Full(), 0)


def test_an_error_is_one_number_or_one_a_head(tiny_model):
    config = tiny_model.config
    with pytest.raises(AlayaError, match=r"DIPR\(error of shape \(3,\)\): the model has 4"):
        plan_for(aj.DIPR(error=np.full(3, 0.1)), config, 10)
    plan = plan_for(aj.DIPR(error=np.full(config.num_attention_heads, 0.1)), config, 10)
    assert plan.tail  # it counts on it
    assert plan.index == aj.Sketch()


def test_trees_of_queries_may_hold_anything():
    """JAX puts placeholders in the place of numbers."""
    window = aj.Window(1, 2)
    plans = (
        aj.Plan(aj.DIPR(beta=1.0, window=window), aj.Flat()),
        aj.Plan(aj.DIPR(error=0.1, window=window), aj.Sketch()),
    )
    for placeholder in (object(), jax.ShapeDtypeStruct((), "float32")):
        jax.tree.map(lambda _, x=placeholder: x, plans)
