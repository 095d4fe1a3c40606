"""The cost model and what is chosen by it, for a machine whose constants are written down."""

import dataclasses
import itertools
import json
import re

import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax import units
from alaya_jax.errors import PlanError, RequestError
from alaya_jax.index import Block
from alaya_jax.models import LlamaConfig
from alaya_jax.optimizer.calibration import Calibration, assumed
from alaya_jax.optimizer.choose import choose
from alaya_jax.optimizer.cost import KeysKept, Machine, Workload, cost, step_seconds, visited
from alaya_jax.optimizer.prefill import PrefillMachine, choose_prefill, density
from alaya_jax.optimizer.rules import alayadb_rules
from alaya_jax.query.auto import Auto
from alaya_jax.query.plan import plan_for

CONFIG = LlamaConfig(
    vocab_size=1000,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=4,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=131072,
)
MACHINE = Machine(
    device="paper",
    copy=1e10,
    matmul=1e11,
    weights=1e10,
    call=1e-4,
    full=1e-6,
    flat=5e-7,
    sketch=1e-7,
    select=5e-8,
    gather=2e-6,
)
PAGED = dataclasses.replace(
    MACHINE, page_scan=2e-8, page_select=1e-9, page_gather=1e-6, page_find=1e-5
)
KEEPS = aj.DIPR(recovery=0.95)
KEY = 8 * 64 * 4  # bytes of a layer's key, float32


def work(length, **fields):
    return Workload(CONFIG, np.dtype(np.float32), length, **fields)


@pytest.fixture
def calibration():
    """Layer 0 needs half of all keys, the others a hundredth."""
    lengths = (4096, 8192)
    share = np.array([0.5, 0.01, 0.01, 0.01])[None, None, :, None]
    keys = (
        np.array(lengths)[None, :, None, None]
        * share
        * np.array([0.5, 1.0, 2.0])[:, None, None, None]
    )
    return Calibration(
        model="paper",
        fingerprint="f",
        window=aj.Window(),
        recoveries=(0.9, 0.95, 0.99),
        lengths=lengths,
        queries=(8, 8),
        keys=np.broadcast_to(keys / 2, (3, 2, 4, 32)),
        read=np.broadcast_to(keys, (3, 2, 4, 8)),
        pages=np.broadcast_to(3 * keys, (3, 2, 4, 8)),
        beta=np.broadcast_to(np.array([10.0, 20.0, 30.0])[:, None, None], (3, 4, 32)),
        ranges=(0.0, 40.0),
        in_range=np.broadcast_to(np.array([0.0, 100.0])[:, None, None, None], (2, 2, 4, 32)),
        read_in_range=np.broadcast_to(np.array([0.0, 300.0])[:, None, None, None], (2, 2, 4, 8)),
    )


@pytest.mark.parametrize("plan", [aj.Full(), aj.Window(), aj.TopK(100), KEEPS], ids=repr)
@pytest.mark.parametrize("index", [aj.Flat(), aj.Sketch()], ids=repr)
def test_longer_contexts_and_more_keys_cost_more(plan, index):
    plan = aj.Plan(plan, index) if isinstance(plan, aj.TopK | aj.DIPR) else aj.Plan(plan)
    room = {"pool_tokens": 2**18}
    costs = [
        cost(plan, work(n, **room), MACHINE, KeysKept(50, 100)) for n in (700, 5000, 9000, 131072)
    ]
    for less, more in itertools.pairwise(costs):
        if isinstance(plan.query, aj.Window):
            assert less == more
        else:
            assert less.seconds < more.seconds
            assert less.read < more.read
    twice = cost(plan, work(9000, batch=2, **room), MACHINE, KeysKept(50, 100))
    assert twice.seconds == pytest.approx(2 * costs[2].seconds)
    many = cost(plan, work(9000, **room), MACHINE, KeysKept(500, 1000))
    assert (many.seconds > costs[2].seconds) == plan.retrieves


def test_the_terms_of_a_cost():
    full = cost(aj.Plan(aj.Full()), work(10_000), MACHINE)
    assert full.seconds == pytest.approx(1e-4 + 1e-6 * 10_000)
    assert (full.read, full.memory) == (2 * KEY * 10_000, 0)
    plan = aj.Plan(KEEPS, aj.Sketch())
    found = cost(plan, work(10_000, pool_tokens=100_000), MACHINE, KeysKept(100, 300))
    # 640 keys in the window; a table of 2,048 pages; a page of codes, scales, two means, spread.
    want = 1e-4 + 1e-6 * 640 + 1e-7 * 9360 + 5e-8 * 32768 + 2e-6 * 300
    assert found.seconds == pytest.approx(want)
    page = 8 * (16 * (64 // 2 + 4) + 2 * (64 + 2) + 4)
    assert found.memory == 6250 * page
    assert found.read == pytest.approx(page / 16 * 9360 + 2 * KEY * (300 + 640))
    # A table is no wider than the pool.
    small = cost(plan, work(10_000), MACHINE, KeysKept(100, 300))
    assert small.memory == 625 * page
    assert small.seconds == pytest.approx(want - 5e-8 * (32768 - 10_000))
    split = cost(plan, work(10_000, context=2), MACHINE, KeysKept(100, 300)).seconds
    assert split == pytest.approx(1e-4 + 1e-6 * 640 + 1e-7 * 4360 + 5e-8 * 5008 + 2e-6 * 150)
    assert step_seconds(work(1, weight_bytes=4 * 10**9, tensor=2), MACHINE) == pytest.approx(0.2)


def test_the_terms_of_pages():
    plan = aj.Plan(KEEPS, aj.Sketch(), by="page", share="group")
    found = cost(plan, work(10_000, pool_tokens=100_000), PAGED, KeysKept(800, 900))
    want = 1e-4 + 1e-6 * 640 + 2e-8 * 9360 + 1e-9 * 32768 + 1e-6 * 900 + 1e-5
    assert found.seconds == pytest.approx(want)
    by_key = cost(
        aj.Plan(KEEPS, aj.Sketch()), work(10_000, pool_tokens=100_000), PAGED, KeysKept(9, 9)
    )
    assert found.memory == by_key.memory
    assert found.read - by_key.read == 2 * KEY * (900 - 9)
    with pytest.raises(RequestError, match="not measured"):
        cost(plan, work(10_000), MACHINE, KeysKept(800, 900))


def test_auto_takes_pages_where_they_are_faster(calibration):
    """As on a device whose scan is a kernel: all layers but the one that needs every page."""
    found = choose(Auto(), work(65536), PAGED, calibration)
    assert [str(x.plan.index) for x in found.layers[1:]] == ["Sketch(bits=4)"] * 3
    assert [x.plan.by for x in found.layers[1:]] == ["page"] * 3
    assert "Sketch(bits=4) by page" in found.layers[0].others
    kept = calibration.kept(1, 0.96, 65536, by="page")
    assert found.layers[1].kept == kept
    assert kept.read == pytest.approx(3 * calibration.kept(1, 0.96, 65536).read, rel=0.03)
    assert "by page" in str(found.table())
    # Pages hold more than what is needed of them: with dear reading it is keys that are chosen.
    dear = dataclasses.replace(PAGED, page_gather=2e-5)
    assert {x.plan.by for x in choose(Auto(), work(65536), dear, calibration).layers} == {"key"}
    # And it is no choice on a machine where it was not measured.
    unknown = choose(Auto(), work(65536), MACHINE, calibration)
    assert not [name for x in unknown.layers for name in x.others if "page" in name]


def test_costs_that_are_not_known():
    with pytest.raises(RequestError, match="no cost model"):
        cost(aj.Plan(aj.TopK(5), Block("mean"), by="page"), work(9000), MACHINE, KeysKept(1, 1))
    with pytest.raises(RequestError, match="how many keys"):
        cost(aj.Plan(KEEPS, aj.Flat()), work(9000), MACHINE)


def test_auto_reads_every_key_when_short_and_few_when_long():
    short, long = (choose(Auto(), work(n), MACHINE) for n in (1000, 100_000))
    assert short.plans == aj.Plan(aj.Full())
    assert long.plans == aj.Plan(KEEPS, aj.Sketch())
    assert long.attention_seconds < 4 * (1e-4 + 1e-6 * 100_000)
    for choice in (short, long):
        for layer in choice.layers:
            assert all(layer.seconds <= t for t in layer.others.values())
    below = short.full_below
    assert below == long.full_below
    assert choose(Auto(), work(below + 1), MACHINE).plans != aj.Plan(aj.Full())
    assert choose(Auto(), work(int(below / 1.05)), MACHINE).plans == aj.Plan(aj.Full())
    assert choose(Auto(recovery=1.0), work(100_000), MACHINE).plans == aj.Plan(aj.Full())
    slow = dataclasses.replace(MACHINE, select=1.0)
    assert choose(Auto(), work(100_000), slow).full_below is None
    # A slower scan of few bits, and the keys themselves are scored.
    flat = dataclasses.replace(MACHINE, sketch=1e-6)
    assert choose(Auto(), work(100_000), flat).plans == aj.Plan(KEEPS, aj.Flat())


def test_auto_goes_by_layer_where_a_calibration_says_so(calibration):
    found = choose(Auto(), work(8192), MACHINE, calibration)
    first, *rest = found.plans
    assert first == aj.Plan(aj.Full())
    assert rest == [aj.Plan(KEEPS, aj.Sketch())] * 3
    assert "as calibrated on 16 queries at 4,096, 8,192 tokens" in found.basis
    assert "alaya calibrate" in choose(Auto(), work(8192), MACHINE).basis
    assert calibration.wants_full(0.95) == [0]
    # The window of what is asked, not that of the calibration, is in the plan.
    window = aj.Window(4, 64)
    plans = choose(Auto(window=window), work(8192), MACHINE, calibration).plans
    assert plans[1].query.window == window


def test_memory_goes_to_the_layers_that_gain_most(calibration):
    """Layer 2 is made to need more keys than 1 and 3, so it gains least by its index."""
    machine = dataclasses.replace(MACHINE, flat=1e-6)  # without one it reads every key
    read = calibration.read.copy()
    read[:, :, 2] *= 3
    calibration = dataclasses.replace(calibration, read=read)
    free = choose(Auto(), work(8192), machine, calibration)
    one = free.layers[1].cost.memory
    base = work(8192).kv_bytes
    assert free.memory == base + 3 * one
    for room, sketched in ((3 * one, [1, 2, 3]), (2 * one, [1, 3]), (one - 1, [])):
        found = choose(Auto(device_memory=base + room), work(8192), machine, calibration)
        assert found.memory <= base + room
        assert [i for i, x in enumerate(found.layers) if x.plan.index == aj.Sketch()] == sketched
    # The memory that a refusal names is that of the fewest indexes.
    tpot = choose(Auto(device_memory=base + 2 * one), work(8192), machine, calibration).seconds
    with pytest.raises(PlanError, match=rf"device_memory={base + 2 * one} "):
        choose(Auto(tpot=1.001 * tpot, device_memory=base), work(8192), machine, calibration)
    assert "no memory left" in found.layers[2].reason
    assert "no memory" not in found.layers[0].reason
    # The device's own limit counts where none is given.
    assert choose(Auto(), work(8192), machine, calibration, memory=base).memory == base
    with pytest.raises(PlanError, match=r"keys and values of 8,192 tokens alone take 134\.2 MB"):
        choose(Auto(device_memory=base - 1), work(8192), machine, calibration)


def test_a_goal_that_cannot_be_reached_names_those_that_can(calibration):
    """Each way out that the message names is tried."""
    free = choose(Auto(), work(8192, weight_bytes=10**7), MACHINE, calibration)
    base = work(8192).kv_bytes
    everything = work(8192, weight_bytes=10**7)
    squeezed = choose(Auto(device_memory=base), everything, MACHINE, calibration)
    assert free.seconds < squeezed.seconds
    tpot = (free.seconds + squeezed.seconds) / 2
    with pytest.raises(PlanError) as refused:
        choose(Auto(tpot=tpot, device_memory=base), everything, MACHINE, calibration)
    said = str(refused.value)
    ways = dict(re.findall(r"(tpot|recovery|device_memory)=([0-9.]+)", said.split("Nearest")[1]))
    assert set(ways) >= {"tpot", "device_memory"}
    slower = Auto(tpot=1.01 * float(ways["tpot"]), device_memory=base)
    assert choose(slower, everything, MACHINE, calibration).seconds <= slower.tpot
    larger = Auto(tpot=tpot, device_memory=int(ways["device_memory"]))
    assert choose(larger, everything, MACHINE, calibration).seconds <= tpot
    less = Auto(tpot=tpot, device_memory=int(ways["device_memory"]) - 1)
    with pytest.raises(PlanError):
        choose(less, everything, MACHINE, calibration)


def test_the_largest_recovery_within_a_time():
    """Half of the time goes into keys that are kept, so that less recovery helps."""
    machine = dataclasses.replace(MACHINE, select=0.0, gather=5e-6)
    at = {p: choose(Auto(recovery=p), work(100_000), machine).seconds for p in (0.95, 0.9, 0.85)}
    assert at[0.95] > at[0.9] > at[0.85]
    tpot = (at[0.9] + at[0.95]) / 2
    with pytest.raises(PlanError, match=r"recovery=0\.93|recovery=0\.9\b") as refused:
        choose(Auto(tpot=tpot, recovery=0.95), work(100_000), machine)
    best = float(re.search(r", or recovery=([0-9.]+)", str(refused.value))[1])
    assert choose(Auto(tpot=tpot, recovery=best), work(100_000), machine).seconds <= tpot
    hopeless = work(100_000, weight_bytes=10**11)
    with pytest.raises(PlanError, match="weights alone takes 10 s") as refused:
        choose(Auto(tpot=1.0), hopeless, machine)
    assert "recovery=" not in str(refused.value).split("Nearest")[1]


WALKS = dataclasses.replace(MACHINE, walk=1e-3, visit=1e-7)
GRAPH = aj.Graph(degree=16)


def with_graph(length, tail=600, **fields):
    return work(length, graph=GRAPH, graph_length=length - tail, **fields)


def test_the_terms_of_a_walk():
    """What the graph does not know is in the window; keys scored follow those listed."""
    plan = aj.Plan(aj.DIPR(beta=5.0), GRAPH)
    at = with_graph(100_000, tail=2000)
    found = cost(plan, at, WALKS, KeysKept(100, 300))
    inside = 128 + 2000
    met = visited(GRAPH, 100_000 - inside, 300)
    assert 300 < met < 16 * 300
    marks = 2 * 8 * 98_000 / WALKS.copy
    want = 1e-4 + 1e-6 * inside + 1e-3 + 1e-7 * met + marks
    assert found.seconds == pytest.approx(want)
    assert found.memory == 8 * 4 * 16 * 98_000
    assert visited(GRAPH, 500, 300) <= 500
    assert visited(GRAPH, 10**6, 600) > visited(GRAPH, 10**6, 300)
    assert visited(aj.Graph(degree=32), 10**6, 300) > visited(GRAPH, 10**6, 300)
    # More than a list can hold: the flat scan answers, which reads all keys.
    over = cost(plan, at, WALKS, KeysKept(2000, GRAPH.capacity + 1)).seconds
    assert over > cost(plan, at, WALKS, KeysKept(2000, GRAPH.capacity)).seconds + 5e-7 * 90_000
    two = cost(plan, with_graph(100_000, tail=2000, batch=2), WALKS, KeysKept(100, 300))
    assert (two.seconds, two.memory) == pytest.approx((2 * found.seconds, 2 * found.memory))
    with pytest.raises(RequestError, match="not measured"):
        cost(plan, at, MACHINE, KeysKept(100, 300))


def test_a_graph_wins_where_it_is_faster(calibration):
    """Each way: by its own times, by what it does not cover, by who asks."""
    auto = Auto()
    through = lambda choice: [x.plan.index == GRAPH for x in choice.layers]  # noqa: E731
    found = choose(auto, with_graph(100_000), WALKS, calibration)
    assert through(found) == [True] * 4
    assert found.plans.query.window == auto.window
    np.testing.assert_array_equal(found.plans.query.beta, np.full(32, 20, np.float32))
    # Keys within that range, half of 100 a head and 300 a group, in logarithms, grown.
    assert 9 < found.layers[0].kept.attended < 30
    assert "estimates no mass" in found.graph
    assert "beta=20" in str(found.table())
    assert "estimates no mass" in json.loads(json.dumps(found.to_dict()))["graph"]
    slow = dataclasses.replace(WALKS, walk=1.0)
    lost = choose(auto, with_graph(100_000), slow, calibration)
    assert not any(through(lost))
    assert lost.layers[0].others["Graph()"] > 1.0
    # Nearly all of the session came after the graph: those keys are all attended to.
    late = choose(auto, with_graph(100_000, tail=90_000), WALKS, calibration)
    assert through(late)[1:] == [False] * 3
    for other in (Auto(graph=False), Auto(recovery=1.0)):
        off = choose(other, with_graph(100_000), WALKS, calibration)
        assert not any(through(off))
        assert off.graph == ""
    assert choose(Auto(graph=False), with_graph(100_000), WALKS, calibration).full_below


def test_a_graph_needs_a_calibration_of_its_range(calibration):
    bare = choose(Auto(), with_graph(100_000), WALKS)
    assert {str(x.plan.index) for x in bare.layers} == {"Sketch(bits=4)"}
    assert "no calibration says which range" in bare.graph
    high = choose(Auto(recovery=0.999), with_graph(100_000), WALKS, calibration)
    assert not any(x.plan.index == GRAPH for x in high.layers)
    assert "more than was calibrated (0.99" in high.graph
    # Between those calibrated: interpolated; below: the least one's.
    for recovery, low, most in ((0.93, 10, 20), (0.97, 20, 30), (0.5, 10, 10), (0.99, 30, 30)):
        beta = calibration.beta_near(1, recovery)
        assert np.all((low <= beta) & (beta <= most))
        assert recovery in (0.5, 0.99) or np.all((low < beta) & (beta < most))
    assert calibration.beta_near(1, 0.995) is None


def test_a_graph_is_refused_for_memory(calibration):
    """Its neighbours take more than a sketch; where only that fits, the sketch stays."""
    at = with_graph(100_000)
    machine = dataclasses.replace(WALKS, flat=1e-6)
    free = choose(Auto(), at, machine, calibration)
    graph, base = free.layers[1].cost.memory, at.kv_bytes
    sketch = cost(aj.Plan(KEEPS, aj.Sketch()), at, machine, KeysKept(10, 30)).memory
    assert free.memory == base + 4 * graph
    assert sketch != graph
    two = choose(Auto(device_memory=base + 2 * graph), at, machine, calibration)
    assert two.memory <= base + 2 * graph
    assert 0 < sum(x.plan.index == GRAPH for x in two.layers) <= 2
    assert "no memory left" in next(x.reason for x in two.layers if x.plan.index != GRAPH)
    none = choose(Auto(device_memory=base), at, machine, calibration)
    assert none.plans == aj.Plan(aj.Full())
    # And a time that only the graph reaches is refused with the memory that it takes.
    tpot = 1.01 * free.seconds
    with pytest.raises(PlanError) as refused:
        choose(Auto(tpot=tpot, device_memory=base), at, machine, calibration)
    nearest = str(refused.value).split("Nearest")[1]
    least = int(re.search(r"device_memory=(\d+)", nearest)[1])
    assert least == base + 4 * graph
    assert choose(Auto(tpot=tpot, device_memory=least), at, machine, calibration).seconds <= tpot


def test_what_a_graph_would_save_is_said(calibration):
    stored = work(100_000, graph_length=99_400)
    found = choose(Auto(), stored, WALKS, calibration)
    built = choose(
        Auto(), dataclasses.replace(stored, graph=aj.Graph()), WALKS, calibration
    ).seconds
    assert built < 0.9 * found.seconds
    assert "alaya db index ID" in found.graph
    assert units.seconds(built) in found.graph
    assert "alaya db index" in str(found.table())
    # Nothing to say: it would not help, or what it would do is not known.
    slow = dataclasses.replace(WALKS, walk=1.0)
    for at, machine, known in (
        (stored, slow, calibration),
        (stored, MACHINE, calibration),
        (stored, WALKS, None),
        (work(100_000), WALKS, calibration),
        (dataclasses.replace(stored, context=2), WALKS, calibration),
    ):
        assert choose(Auto(), at, machine, known).graph == ""
    assert choose(Auto(graph=False), stored, WALKS, calibration).graph == ""


PREFILLS = PrefillMachine("paper", full=1e-8, tile=1e-8, select=1e-9)


def test_a_prefill_takes_blocks_only_where_that_is_faster():
    auto = Auto(prefill="sparse")

    def plan(known, length, machine=PREFILLS, auto=auto):
        return choose_prefill(auto, 4, machine, known, length).plan.query

    assert plan(0, 400) == aj.Full()
    assert plan(0, 8192) == aj.Tiles(recovery=0.95)
    assert plan(0, 600) == aj.Full()
    assert plan(7000, 8192) == aj.Tiles(recovery=0.95)
    # All keys, by lists: exact, and on some devices faster.
    fast = dataclasses.replace(PREFILLS, tile=5e-9, select=5e-8)
    assert plan(0, 400, fast) == plan(0, 8192, fast) == aj.Tiles()
    assert plan(0, 8192, dataclasses.replace(PREFILLS, select=1e-8)) == aj.Full()
    assert plan(0, 8192, auto=Auto(prefill="sparse", recovery=1.0)) == aj.Full()
    found = choose_prefill(auto, 4, PREFILLS, 0, 512)
    seen = 512 * 512 / 2
    assert found.seconds == pytest.approx(4 * seen * 1e-8)
    assert json.dumps(found.to_dict())
    assert "against" in found.reason
    with pytest.raises(RequestError, match="prefill='thin'"):
        Auto(prefill="thin")


def test_the_density_of_a_prefill():
    assert density(0.95, 4096) == pytest.approx(0.365)
    assert density(0.9, 8192) == pytest.approx(0.16)
    along = [density(0.95, n) for n in (128, 1024, 3000, 8192, 65536)]
    assert along == sorted(along, reverse=True)
    assert along[0] == 1.0
    up = [density(p, 4096) for p in (0.5, 0.85, 0.95, 0.97, 0.999)]
    assert up == sorted(up)
    assert density(1.0, 8192) == 1.0


def test_the_lighter_sketch_is_taken_for_its_memory(calibration):
    usual, lighter = aj.Sketch(2, "learnt"), aj.Sketch(1, "learnt")
    asked = work(100_000, sketches=(usual, lighter))
    free = choose(aj.Auto(), asked, MACHINE, calibration)
    assert usual in {plan.index for plan in free.plans}
    assert lighter not in {plan.index for plan in free.plans}
    token_bytes = usual.page_bytes(CONFIG, 16, asked.dtype) / 16
    saved = asked.held * CONFIG.head_dim * CONFIG.num_key_value_heads / 8
    taken = sum(plan.index == usual for plan in free.plans) * token_bytes * asked.held
    room = int(asked.kv_bytes + taken - saved)
    tight = choose(aj.Auto(), asked, MACHINE, calibration, room)
    assert lighter in {plan.index for plan in tight.plans}
    assert tight.seconds == free.seconds


def test_what_auto_refuses():
    for bad in ({"tpot": 0}, {"recovery": 0}, {"recovery": 1.1}, {"device_memory": "much"}):
        with pytest.raises(RequestError, match=r"Auto\(" + next(iter(bad))):
            Auto(**bad)
    for asked in (Auto(), [Auto()] * 4):
        with pytest.raises(RequestError, match="Auto"):
            plan_for(asked, CONFIG, 100)


def test_a_choice_as_data_and_as_a_table(calibration):
    found = choose(Auto(tpot=1.0), work(8192), MACHINE, calibration)
    data = json.loads(json.dumps(found.to_dict()))
    assert data["seconds"] == pytest.approx(sum(x["predicted_seconds"] for x in data["layers"]))
    assert data["layers"][0]["plan"] == "Full()"
    text = str(found.table())
    for part in ("8,192 tokens", "DIPR(recovery=0.95) @ Sketch(bits=4)", "against Full()", "paper"):
        assert part in text


def test_calibrations_are_interpolated(calibration):
    at = [calibration.kept(1, p, 8192).read for p in (0.5, 0.9, 0.92, 0.95, 0.99, 0.999)]
    assert at == sorted(at)
    assert at[1] == pytest.approx(0.005 * 8192, rel=1e-6)
    assert calibration.kept(1, 0.95, 4096).attended == pytest.approx(0.005 * 4096, rel=1e-6)
    between = calibration.kept(1, 0.95, 6000).read
    assert calibration.kept(1, 0.95, 4096).read < between < calibration.kept(1, 0.95, 8192).read
    # Counts in proportion to the length go on so.
    assert calibration.kept(1, 0.95, 65536).read == pytest.approx(0.01 * 65536, rel=0.05)
    assert calibration.kept(0, 0.99, 8192).read <= 8192
    assert calibration.kept(0, 1.0, 8192) == KeysKept(8192, 8192)
    again = Calibration.from_dict(json.loads(json.dumps(calibration.to_dict())))
    assert again.to_dict() == calibration.to_dict()
    with pytest.raises(RequestError, match="recoveries="):
        calibration.beta_for(0, 0.97)


def test_what_is_assumed_grows_with_recovery_and_length():
    keys = [assumed(p, 4096, 1).attended / 4096 for p in (0.9, 0.95, 0.98)]
    np.testing.assert_allclose(keys, [0.041, 0.074, 0.13], rtol=0.08)  # DESIGN, section 3
    assert assumed(0.9, 4096, 1).attended < assumed(0.9, 65536, 1).attended < 0.041 * 65536
    assert assumed(0.95, 4096, 3).read == pytest.approx(3 * assumed(0.95, 4096, 1).attended)
    assert assumed(0.999999, 1000, 4) == KeysKept(1000, 1000) == assumed(1.0, 1000, 4)


def test_the_rules_of_alayadb():
    window = aj.Window()
    assert alayadb_rules(4, 1000) == aj.Plan(aj.Full())
    first, *rest = alayadb_rules(4, 10_000, reused=9000, stored=9000, fine=aj.Sketch())
    assert first == aj.Plan(aj.DIPR(beta=50.0), aj.Flat())
    assert rest == [aj.Plan(aj.DIPR(beta=50.0), aj.Sketch())] * 3
    coarse = alayadb_rules(4, 10_000, memory_high=True, k=320)
    assert coarse.index == Block("leaders")
    assert (coarse.by, coarse.query) == ("page", aj.TopK(320))
    partly = alayadb_rules(4, 10_000, reused=6000, stored=9000)[2].query
    assert partly.before == 6000
    assert partly.window == dataclasses.replace(window, recent=4000)
    assert plan_for(alayadb_rules(4, 10_000), CONFIG, 10_000)[0].index == aj.Flat()
