"""`Budget(host=...)`: what is kept in memory of contexts that are read where they lie."""

import subprocess
import sys
import textwrap

import pytest

import alaya_jax as aj
from alaya_jax.errors import CacheFullError, RequestError
from alaya_jax.storage.mapped import MappedPages

WINDOW = aj.Window(8, 24)
PLANS = {
    "full": aj.Full(),
    "range": aj.DIPR(beta=8.0, window=WINDOW),
    "sketch": aj.Plan(aj.DIPR(beta=8.0, window=WINDOW), aj.Sketch()),
    "block": aj.Plan(aj.DIPR(beta=8.0, window=WINDOW), aj.Block("bounds"), by="page"),
    "graph": aj.Plan(aj.DIPR(beta=8.0, window=WINDOW), aj.Graph(queries=1.0)),
    "window": WINDOW,
}
PAGE = 2 * 2 * 16 * 16 * 4
"""Bytes of a page in a layer."""


@pytest.fixture
def document(rng):
    return rng.integers(32, 126, 230)


@pytest.fixture
def open_with(open_db, tiny_model):
    """Opens a database of 65 pages that keeps so much of mapped files."""

    def open(host, **options):
        db = open_db(**options)
        db.close()
        budget = aj.Budget(device=db.budget.device, host=host)
        return aj.DB(db.path, tiny_model, budget, **options)

    opened = []
    yield lambda *args, **options: opened.append(open(*args, **options)) or opened[-1]
    for db in opened:
        db.close()


@pytest.fixture
def let_go(monkeypatch):
    """Pages of which memory was given back."""
    real, gone = MappedPages.let_go, []

    def spy(self, layer, pages):
        gone.extend((layer, int(page)) for page in pages)
        real(self, layer, pages)

    monkeypatch.setattr(MappedPages, "let_go", spy)
    return gone


def answer(db, prompt, plan, tier="host", tokens=8):
    """Ids and log-probabilities, all by a plan, and the account of it."""
    session, rest = db.create_session(prompt, tier=tier)
    with session:
        run = aj.generate(session, rest, max_new_tokens=tokens, attention=plan, prefill=plan)
        said = [(t.id, t.logprob) for t in run]
        return said, session.explain()


def test_the_bound_is_a_size():
    assert aj.Budget().host_bytes is None
    assert aj.Budget(host="6GiB").host_bytes == 6 << 30
    assert aj.Budget(host=1000).host_bytes == 1000
    for wrong in ("six", 0, -1, True, 1.5):
        with pytest.raises(RequestError, match=r"Budget\(host="):
            aj.Budget(host=wrong)


SLOW = ("block", "graph", "sketch", "window")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in PLANS],
)
def test_any_plan_answers_as_without_a_bound(open_with, document, rng, name, let_go):
    """Bit by bit, while pages are let go of from step to step."""
    db = open_with(None)
    context = db.import_context(document)
    if name == "graph":
        db.build_index(context, PLANS[name].index, progress=False)
    db.close()
    db = open_with(None)
    prompt = [*document, *rng.integers(32, 126, 5)]
    expected, _ = answer(db, prompt, PLANS[name], "device")
    db.close()
    least = refused(open_with(1), prompt, PLANS[name])
    assert refused(open_with(least - 1), prompt, PLANS[name]) == least
    db = open_with(least)
    let_go.clear()
    said, _ = answer(db, prompt, PLANS[name])
    assert said == expected
    residency = db._catalogue.residency
    assert residency.nbytes <= least
    if name != "window":  # which reads no more than has to be kept
        assert len(let_go) > 15, "nothing was shown"


def refused(db, prompt, plan):
    """The bound that is said to be enough."""
    with db, pytest.raises(CacheFullError, match=r"Budget\(host=\d+\) bounds") as error:
        answer(db, prompt, plan)
    assert db.pool.free_tokens == db.pool.capacity_tokens, "before anything was made room for"
    return int(str(error.value).split("at least ")[1].split(" bytes")[0].replace(",", ""))


def test_pinned_contexts_are_let_go_of_last(open_with, document, let_go, rng):
    """Asked by turns, an unpinned one is read from the disk each time; a pinned one stays."""
    db = open_with(None)
    contexts = [db.import_context(rng.integers(32, 126, 230)) for _ in range(3)]
    prompts = [[*context.tokens, 40] for context in contexts]
    contexts[0].pin()
    db.close()
    db = open_with(2 * 2 * 15 * PAGE + 2 * PAGE)
    where = []
    for _ in range(2):
        for prompt in prompts:
            _, found = answer(db, prompt, aj.Full(), tokens=2)
            where.append(found.phases["prefill"].met)
    assert where[0].disk.tolist() == [28, 28], "of two heads; the last page was copied"
    assert where[0].pool.tolist() == [2, 2]
    assert where[3].memory.tolist() == [28, 28]
    assert [met.disk.sum() > 0 for met in where] == [True, True, True, False, True, True]


def test_what_another_wrote_into_the_place_is_read_anew(open_with, rng, let_go):
    """Indexed, let go of, removed, and its pages taken by another context; and by one of another
    namespace, which nobody else finds.
    """
    db, plan = open_with(None), PLANS["sketch"]
    least = 15 * 928 + 4 * PAGE
    slots = []
    for namespace in ("", "", "other"):
        db.close()
        db = open_with(least, namespace=namespace)
        document = rng.integers(32, 126, 230)
        context = db.import_context(document)
        prompt = [*document, 40, 41]
        expected, _ = answer(db, prompt, plan, "device", tokens=3)
        said, found = answer(db, prompt, plan, tokens=3)
        assert said == expected
        assert found.in_files == [224]
        slots.append(db._catalogue._mapped.popitem()[1][context.id][1].tolist())
        db.remove(context.id)
    assert slots[0] == slots[1] == slots[2], "else nothing was shown"
    assert let_go


def test_a_generation_that_is_dropped_leaves_the_account_right(open_with, document, let_go):
    db = open_with(15 * PAGE)
    db.import_context(document)
    db.close()
    db = open_with(15 * PAGE)
    prompt = [*document, 40, 41]
    expected, _ = answer(db, prompt, aj.Full(), "device", tokens=3)
    session, rest = db.create_session(prompt, tier="host")
    run = aj.generate(session, rest, max_new_tokens=50)
    next(run)
    next(run)
    del run
    session.close()
    residency = db._catalogue.residency
    assert residency.nbytes <= 15 * PAGE
    assert let_go
    said, _ = answer(db, prompt, aj.Full(), tokens=3)
    assert said == expected
    assert residency.nbytes <= 15 * PAGE


def test_damage_behind_what_was_let_go_of_is_refused(open_with, document, tmp_path):
    """A layer is compared with its checksums when its turn comes, and nothing is lost then."""
    db = open_with(15 * PAGE)
    context = db.import_context(document)
    db.close()
    path = sorted((tmp_path / "db" / "segments").rglob("v.*"))[1]
    with path.open("r+b") as file:
        file.seek(100)
        byte = file.read(1)
        file.seek(100)
        file.write(bytes([byte[0] ^ 1]))
    db = open_with(15 * PAGE)
    session, rest = db.create_session([*document, 40], tier="host")
    with session, pytest.raises(aj.errors.ContextError, match=context.id):
        session.prefill(rest)
    session, rest = db.create_session([*document, 40])
    assert session.reused == [0]
    session.prefill(rest)


LARGE = """
    import sys, threading, time
    import jax, numpy as np
    import alaya_jax as aj
    from alaya_jax.models import LlamaConfig, llama

    folder = sys.argv[1]
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=8192,
        eos_token_ids=(1,),
    )
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jax.numpy.asarray(random.standard_normal(x.shape, np.float32) / 6),
        llama.abstract_params(config),
    )
    model = aj.Model(config, params, fingerprint="large", layers_per_program=1)
    tokens = random.integers(2, 64, 4097)
    shape = 2, 4097, 64
    kv = [[random.standard_normal(shape, np.float32) for _ in "kv"] for _ in range(6)]
    layer = 257 * 16 * 2 * 2 * 64 * 4
    host = layer + layer // 2

    def kept():
        total, ours = 0, False
        for line in open("/proc/self/smaps"):
            if "-" in line.split(" ")[0]:
                ours = "/segments/" in line
            elif ours and line.startswith("Rss:"):
                total += 1024 * int(line.split()[1])
        return total

    def watch():
        while not done:
            most.append(kept())
            time.sleep(0.01)

    answers = []
    budget = aj.Budget(device=8 * layer, host=host)
    with aj.DB(folder, model, budget) as db:
        db.import_context(tokens, kv)
    for tier in ("device", "host"):
        with aj.DB(folder, model, budget) as db:
            session, rest = db.create_session([*tokens, 5, 6], tier=tier)
            done, most = False, []
            thread = threading.Thread(target=watch)
            thread.start()
            run = aj.generate(session, rest, max_new_tokens=6)
            answers.append([(t.id, t.logprob) for t in run])
            done = True
            thread.join()
    assert answers[0] == answers[1] and len(answers[1]) == 6
    print(6 * layer, host, max(most), len(most))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_context_several_times_the_bound_streams_within_it(tmp_path):
    """What of the files this process really has in memory, looked at every few milliseconds."""
    code = [sys.executable, "-c", textwrap.dedent(LARGE), str(tmp_path / "db")]
    said = subprocess.run(code, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    context, host, most, looked = map(int, said.stdout.split())
    assert looked > 3
    assert context == 4 * host
    assert 0.6 * host < most <= host + (64 << 10)


def test_explain_and_stats_say_what_was_met_and_where_it_was(open_with, document):
    """A window of 8 and 24 tokens: of 14 mapped pages it meets the first and the last one or two,
    each of two heads; the one behind them was copied into the pool, and is met there.
    """
    db = open_with(None)
    db.import_context(document)
    db.close()
    db = open_with("1MiB")
    prompt = [*document, 40, 41]
    said, found = answer(db, prompt, WINDOW, "device", tokens=4)
    phase = found.to_dict()["phases"]["decode"]
    assert (phase["tier"], phase["pages"], phase["by_layer"][0]["pages"]) == ("device", None, None)
    assert "met" not in db.stats().rows()
    again, found = answer(db, prompt, WINDOW, tokens=4)
    assert again == said
    first, then = (found.to_dict()["phases"][name] for name in ("prefill", "decode"))
    for layer in range(2):
        pages = first["by_layer"][layer]["pages"]
        assert pages["met"] == pages["pool"] + pages["memory"] + pages["disk"]
        assert (pages["pool"], pages["disk"]) == (2, 6), "pages 0, 12 and 13"
        assert (pages["bytes_read"], pages["hit_rate"]) == (3 * PAGE + PAGE, 0.0), "one was copied"
        assert pages["bytes_verified"] == 4 * PAGE
        pages = then["by_layer"][layer]["pages"]
        assert (pages["pool"], pages["memory"], pages["disk"]) == (6, 12, 0)
        assert (pages["hit_rate"], pages["bytes_read"], pages["bytes_verified"]) == (1.0, 0, 0)
    assert then["pages"]["met"] == 36
    assert then["tier"] == then["by_layer"][0]["tier"] == "host"
    assert "decode: pages of a kv head, each time it was met, 3 query tokens" in str(found)
    assert "100.0%" in str(found)
    row = found.to_dataframe().set_index(["phase", "layer"]).loc[("decode", 1)]
    assert (row["pages_met"], row["pages_disk"], row["hit_rate"]) == (18, 0, 1)
    stats = db.stats()
    assert (stats.host_limit, stats.pages_disk, stats.pages_memory) == (1 << 20, 12, 24)
    assert stats.hit_rate == 2 / 3
    assert stats.bytes_host == stats.bytes_read == stats.bytes_verified == 8 * PAGE
    assert stats.bytes_host_leaves == 0
    assert "36 mapped pages, 66.7% were in memory" in str(stats)
    assert "at most 1.0 MB" in stats._repr_html_()
    answer(db, prompt, PLANS["sketch"], tokens=2)
    stats = db.stats()
    assert stats.bytes_host_leaves == 14 * 928
