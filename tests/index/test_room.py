"""The account of memory beside pages: what stays, what goes, and who is refused."""

import gc
import re

import pytest

from alaya_jax.errors import CacheFullError
from alaya_jax.index import Sketch
from alaya_jax.index.room import Room, by_name


class Graph:
    """Something in memory."""


def parts(name, size, layers=2):
    return {(name, layer): size for layer in range(layers)}


def test_without_a_bound_everything_stays():
    room = Room()
    assert room.make(parts("a", 1 << 60), parts("b", 1 << 60)) == []
    assert room.fits(parts("b", 1 << 60))


def test_what_nobody_asks_goes_and_no_more_than_has_to():
    room, made = Room(limit=100, pages=60), parts("a", 10)
    mine = room.claim()
    with mine.asking(parts("b", 10)):
        assert room.make(made, parts("b", 10), mine) == []
    assert room.make(made, parts("a", 10)) == [], "both are just as much as there is"
    other = room.claim()
    assert room.make(made, {("c", 0): 5}, other) == [("a", 0)]
    assert room.make(made, parts("c", 5), other) == [("a", 0)]
    assert room.make({("c", 0): 5, **made}, {("c", 0): 5, ("c", 1): 5}, other) == [("a", 0)]
    mine.end()
    assert room.make(made, parts("c", 5), other) == [], "a session that is closed asks nothing"


def test_a_refusal_says_who_holds_what_and_a_budget_that_is_enough():
    room = Room(limit=100, pages=60, setting="Budget(device=100)")
    mine, other = room.claim(), room.claim()
    with other.asking(parts(Sketch(), 10)):
        pass
    with mine.asking(parts("before", 5)):
        pass
    with (
        pytest.raises(CacheFullError) as error,
        mine.asking(parts("b", 15)),
    ):
        room.make({}, parts("b", 15), mine)
    assert mine.parts == parts("before", 5), "as if nothing had been asked"
    said = str(error.value)
    for part in (
        "'b' would take 30 bytes",
        "of the 100 of Budget(device=100) 80 are held",
        "(pages 60, Sketch(bits=4) 20)",
        "close a session",
    ):
        assert part in said
    device, indexes = map(int, re.findall(r"(?:device|indexes)=(\d+)", said)[1:])
    assert device - indexes == 60, "as many pages"
    larger = Room(device, 60)
    larger._claims = room._claims
    assert larger.make({}, parts("b", 15), mine) == []
    with pytest.raises(CacheFullError, match="indexes="):
        Room(device - 1, 60).make({}, parts("b", 15) | parts(Sketch(), 10))


def test_what_a_batch_asked_before_makes_room_for_what_it_asks_now():
    room = Room(limit=100, pages=60)
    mine = room.claim()
    with mine.asking(parts("a", 15)):
        pass
    made = parts("a", 15)
    assert room.make(made, parts("b", 20), mine) == list(made)
    with pytest.raises(CacheFullError):
        room.make(made, parts("b", 20))  # besides


def test_a_graph_counts_while_somebody_refers_to_it():
    graph, kept = Graph(), []
    room = Room(limit=100, pages=60, forget=kept.clear)
    kept.append(graph)
    room.hold(("g", 0), graph, 30)
    assert room.graphs == {("g", 0): 30}
    assert room.graph(("g", 0)) is graph
    with pytest.raises(CacheFullError, match="'g' 30"):
        room.make({}, {("a", 0): 20})
    assert kept == [], "asked to let go of it"
    kept.append(graph)
    del graph
    assert room.make({}, {("a", 0): 20}) == []
    assert room.graphs == {}
    assert room.graph(("g", 0)) is None


def test_sessions_that_nobody_can_reach_are_collected_before_a_refusal():
    room = Room(limit=100, pages=60)
    claim = room.claim()
    with claim.asking(parts("a", 20)):
        pass
    claim.circle = claim
    gc.disable()
    try:
        del claim
        assert room.claimed() == parts("a", 20)
        assert room.make(parts("a", 20), parts("b", 20)) == list(parts("a", 20))
    finally:
        gc.enable()


def test_bytes_by_name():
    found = by_name({**parts(Sketch(), 3), ("g", 0): 2, ("file", 0): 0})
    assert found == {"Sketch(bits=4)": 6, "'g'": 2}
