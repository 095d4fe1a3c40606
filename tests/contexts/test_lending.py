"""Whose graph a sequence asks, with contexts that only say what they have."""

import contextlib
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax.contexts.lending import Lending
from alaya_jax.errors import RequestError
from alaya_jax.index import GraphLayer
from alaya_jax.index.room import Room
from alaya_jax.query.origin import Origin

GRAPH = aj.Graph()
TOKENS = np.arange(3, 63, dtype=np.int32)


def context(*indexes, origin=None, asked=None):
    def graph(wanted, model, layer):
        if asked is not None:
            asked.append(layer)
        empty = jnp.zeros((1, 64, 2), jnp.int32)
        return GraphLayer(empty, empty[:, 0], jnp.asarray(64, jnp.int32))

    name = object()  # each context's graph is another
    return SimpleNamespace(
        has_graph=bool(indexes),
        indexes=indexes,
        origin=origin or Origin(),
        graph=graph,
        graph_part=lambda wanted, pool, layer: {(name, layer): 512},
    )


def lending(contexts, reused, lend=lambda *_: (None, 0), room=None):
    pool = SimpleNamespace(
        mesh=None,
        rules=aj.ShardingRules(),
        lock=contextlib.nullcontext(),
        here=contextlib.nullcontext,
    )
    return Lending(pool, contexts, reused, lend, room or Room())


def test_a_sequence_knows_as_much_of_a_graph_as_it_reuses():
    asked = []
    graphs = lending([context(GRAPH, asked=asked)], [TOKENS[:40]])
    assert int(graphs.layer(0, GRAPH, 1).length) == 40
    assert graphs.known() == (GRAPH, 40)
    graphs.layer(0, GRAPH, 1)
    assert int(graphs.fork().layer(0, GRAPH, 1).length) == 40
    assert asked == [1], "kept, and by forks too"


def test_another_context_lends_its_graph_to_exact_keys():
    wanted = []

    def lend(tokens, index):
        wanted.append((len(tokens), index))
        return context(GRAPH), min(len(tokens), 30)

    part = context(origin=Origin(((20, "a plan"),)))
    graphs = lending([context(), part], [TOKENS, TOKENS], lend)
    assert [int(graphs.layer(b, GRAPH, 0).length) for b in range(2)] == [30, 20]
    assert wanted == [(60, GRAPH), (20, GRAPH)]
    assert graphs.known() == (GRAPH, 20)


def test_what_has_no_context_has_no_graph():
    graphs = lending([context(GRAPH), None], [TOKENS, TOKENS[:0]])
    with pytest.raises(RequestError, match="sequence 1 was opened on no stored context"):
        graphs.layer(1, GRAPH, 0)
    assert graphs.known() == (None, 0)
    other = lending([context(GRAPH), context(aj.Graph(degree=8))], [TOKENS, TOKENS])
    assert other.known() == (None, 60), "not the same graph"
