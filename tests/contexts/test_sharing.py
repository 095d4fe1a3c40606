"""Databases that share contexts: what one computed, the other does not."""

import contextlib
import subprocess
import sys
import textwrap
import time
import warnings

import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax.contexts import sharing
from alaya_jax.errors import ContextError, RemoteError, RequestError
from alaya_jax.storage import objects
from alaya_jax.storage.object_store import SharedStore
from alaya_jax.storage.remote import RemoteContexts


@pytest.fixture
def url(tmp_path):
    return f"memory://{tmp_path}/shared/"


@pytest.fixture
def place(url):
    return SharedStore(url)


@pytest.fixture
def document(rng):
    return rng.integers(3, 256, 450).astype(np.int32)


@pytest.fixture
def unreachable(monkeypatch):
    """A block in which no shared store can be reached."""

    @contextlib.contextmanager
    def unreachable():
        def fails(self, key, *_):
            raise RemoteError(f"{self.where}: {key} failed; see that it can be reached")

        with monkeypatch.context() as broken:
            for kind in ("read", "begins", "put", "replace", "keys"):
                broken.setattr(SharedStore, kind, fails)
            yield

    return unreachable


def answer(db, prompt):
    """What follows a prompt, and how much of it was not computed."""
    session, rest = db.create_session(prompt)
    with session:
        (reused,) = session.reused
        assert reused + len(rest) == len(prompt)
        return [t.id for t in aj.generate(session, rest, max_new_tokens=4)], reused


def ids(db):
    return [context.id for context in db.contexts]


@pytest.mark.smoke
def test_what_one_computed_the_other_does_not(open_db, url, document):
    one, other = (open_db(path=path, remote=url) for path in ("one", "other"))
    context = one.import_context(document, title="a document")
    prompt = np.append(document, [7, 8, 9])
    want = answer(one, prompt)
    assert answer(other, prompt) == want == (want[0], 450)
    (found,) = other.contexts
    assert (found.id, found.title, found.num_tokens) == (context.id, "a document", 450)
    alone = open_db(path="alone")
    assert answer(alone, prompt) == (want[0], 0)  # cold = warm
    for layer in range(2):
        kv = [db._catalogue.store.read_kv(context.id, layer) for db in (one, other)]
        np.testing.assert_array_equal(*kv)


def test_an_import_of_what_others_have_computes_nothing(open_db, url, document, monkeypatch):
    one, other = (open_db(path=path, remote=url) for path in ("one", "other"))
    context = one.import_context(document)

    def never(*_, **__):
        raise AssertionError("it is computed")

    monkeypatch.setattr(aj.Session, "prefill", never)
    assert other.import_context(document).id == context.id


def test_a_prefix_is_taken_and_what_is_new_is_given(open_db, url, place, document):
    one, other = (open_db(path=path, remote=url) for path in ("one", "other"))
    one.import_context(document)
    changed = np.append(document[:300], [4, 5, 6])
    before = len(place.keys("chunks/"))
    session, rest = other.create_session(changed)
    assert session.reused == [256]  # a chunk
    assert len(rest) == 47
    session.prefill(rest)
    stored = other.store(session)
    session.close()
    assert len(place.keys("chunks/")) == before + 1
    assert {m.id for m in RemoteContexts(place).contexts()} == {*ids(one), stored.id}
    assert answer(one, np.append(changed, 9))[1] == 303


def test_more_is_taken_only_where_less_is_known(open_db, url, document, monkeypatch):
    one, other = (open_db(path=path, remote=url) for path in ("one", "other"))
    one.import_context(document)
    pulls = []
    pull = RemoteContexts.pull
    monkeypatch.setattr(
        RemoteContexts, "pull", lambda self, *a, **k: pulls.append(a[2]) or pull(self, *a, **k)
    )
    other.import_context(document[:300])
    assert pulls == [256]
    assert answer(other, document[:301])[1] == 300
    assert pulls == [256]  # 300 are known here, 256 there
    assert answer(other, document)[1] == 449
    assert pulls == [256, 450]
    assert answer(other, document)[1] == 449
    assert pulls == [256, 450]


OTHERS = {
    "row 14: namespace": {"namespace": "tenant"},
    "row 19: page size": {"page_size": 8},
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS.keys())
def test_row_14_the_same_hits_and_another_misses(open_db, url, document, options):
    one = open_db(path="one", remote=url)
    one.import_context(document)
    prompt = np.append(document, 9)
    other = open_db(path="other", remote=url, pages=129, **options)
    assert answer(other, prompt)[1] == 0
    assert ids(other) == []
    same = open_db(path="same", remote=url)
    assert answer(same, prompt)[1] == 450


def test_row_17_one_weight_that_differs_misses(open_db, url, document, tiny_model):
    import jax

    one = open_db(path="one", remote=url)
    one.import_context(document)
    params = jax.tree.map(lambda x: x, tiny_model.params)
    params["embed"]["embedding"] = params["embed"]["embedding"].at[9, 9].add(1e-3)
    models = [
        aj.Model(tiny_model.config, p, tiny_model.tokenizer, name="other")
        for p in (params, tiny_model.params)
    ]
    dbs = [open_db(model, f"other{i}", remote=url) for i, model in enumerate(models)]
    prompt = np.append(document, 9)
    assert answer(dbs[1], prompt)[1] == 0  # "tiny" was given as a fingerprint, this is a digest
    dbs[1].import_context(document)
    again = open_db(models[1], "again", remote=url)
    assert answer(again, prompt)[1] == 450
    assert answer(dbs[0], prompt)[1] == 0


def test_sessions_of_a_batch_take_each_their_own(open_db, url, document, rng):
    one, other = (open_db(path=path, remote=url) for path in ("one", "other"))
    second = rng.integers(3, 256, 300).astype(np.int32)
    one.import_context(document[:300])
    one.import_context(second)
    session, _ = other.create_session([np.append(document[:300], 5), np.append(second, 5)])
    assert session.reused == [300, 300]
    session.close()


def test_what_a_plan_left_out_is_taken_only_when_asked(open_db, url, document):
    one, other = (open_db(path=path, remote=url) for path in ("one", "other"))
    session, rest = one.create_session(document)
    session.prefill(rest, attention=aj.Window(4, 32))
    one.store(session)
    (context,) = one.contexts
    assert context.exact_tokens < 256
    assert answer(other, document)[1] == 0
    assert ids(other) == []
    session, _ = other.create_session(document, reuse="any")
    assert session.reused == [449]
    assert context.id in ids(other)
    session.close()


def test_a_graph_is_shared(open_db, url, document):
    one, other = (open_db(path=path, remote=url) for path in ("one", "other"))
    context = one.import_context(document[:300])
    one.build_index(context, aj.Graph(), progress=False)
    answer(other, np.append(document[:300], 5))
    (found,) = other.contexts
    assert found.indexes == context.indexes != ()
    store = other._catalogue.store
    assert store.check(found.id) == []


def test_a_store_that_fails_loses_nothing(open_db, url, place, document, unreachable):
    """Imported, stored and answered here, each with a warning that says what to do."""
    db = open_db(remote=url)
    with unreachable():
        with pytest.warns(aj.RemoteWarning) as said:
            context = db.import_context(document[:300])
        looked, stored = (str(warning.message) for warning in said)
        assert {warning.filename for warning in said} == {__file__}
        assert looked.startswith(f"{url}: the prompt was looked up here only: ")
        assert "asked again in 60 s" in looked
        assert f"context {context.id} was stored here only" in stored
        assert f"alaya db push {url} {context.id}" in stored
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert answer(db, np.append(document[:300], 5))[1] == 300  # it is left alone now
        with pytest.warns(aj.RemoteWarning, match="stored here only"):
            db.import_context(document[:310])
    db._sharing._rest_until = 0.0
    db.import_context(document[:300])  # is there already, and is given now
    assert [m.id for m in RemoteContexts(place).contexts()] == [context.id]


def test_a_directory_that_cannot_be_written(open_db, document):
    db = open_db(remote="file:///proc/shared/")
    with pytest.warns(aj.RemoteWarning, match="stored here only.*file:///proc/shared/"):
        context = db.import_context(document[:300])
    assert answer(db, np.append(document[:300], 5))[1] == 300
    assert db.check(context) == []


def test_no_room_here_computes_the_prompt(open_db, url, document, monkeypatch):
    one, other = (open_db(path=path, remote=url) for path in ("one", "other"))
    one.import_context(document)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("alaya_jax.storage.pull.os.posix_fallocate", full)
        with pytest.warns(aj.RemoteWarning, match="make room"):
            assert answer(other, document)[1] == 0
    assert answer(other, document)[1] == 449


def test_a_store_that_fails_is_asked_again(open_db, url, document, unreachable, monkeypatch):
    one, other = (open_db(path=path, remote=url) for path in ("one", "other"))
    one.import_context(document)
    monkeypatch.setattr(sharing, "REST", 0.2)
    with unreachable(), pytest.warns(aj.RemoteWarning):
        assert answer(other, document)[1] == 0
    time.sleep(0.25)
    assert answer(other, document)[1] == 449


@pytest.mark.parametrize("how", ["damaged", "gone"])
def test_rows_6_and_24_what_is_damaged_there_is_computed_here(open_db, url, place, document, how):
    """And is no hit: neither by what is reused, nor by what is stored."""
    one, other = (open_db(path=path, remote=url) for path in ("one", "other"))
    one.import_context(document)
    prompt = np.append(document, [7, 8])
    want = answer(one, prompt)[0]
    remote = RemoteContexts(place)
    (moved,) = remote.contexts()
    key = objects.chunk_key(moved.chunks[1])
    if how == "gone":
        place._kv.write(key, None).result()
    else:
        found = place.read(key)
        place.replace(key, found.data[:-50] + b"x" + found.data[-49:], found.version)
    with pytest.warns(aj.RemoteWarning, match=f"{moved.id} was left out.*{key}.*--repair"):
        assert answer(other, prompt) == (want, 0)
    assert ids(other) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert answer(other, prompt) == (want, 0)  # not tried again


def test_a_shorter_context_serves_where_the_longest_is_damaged(open_db, url, place, document):
    one, other = (open_db(path=path, remote=url) for path in ("one", "other"))
    one.import_context(document[:300])
    longest = one.import_context(document)
    (moved,) = [m for m in RemoteContexts(place).contexts() if m.id == longest.id]
    place._kv.write(objects.chunk_key(moved.chunks[1]), None).result()
    with pytest.warns(aj.RemoteWarning, match=longest.id):
        assert answer(other, document)[1] == 300


def test_damage_here_is_mended_from_there(open_db, url, document, tmp_path):
    """Who meets it is told, as ever; then the context is taken anew."""
    db = open_db(remote=url)
    context = db.import_context(document)
    want = answer(db, document)[0]
    db.close()
    file = next((tmp_path / "db" / "segments").glob("*/k.001"))
    with file.open("r+b") as data:
        data.seek(data.seek(0, 3))  # SEEK_DATA: the file has holes
        data.write(b"damaged!")
    db = open_db(remote=url)
    with pytest.raises(ContextError, match="damaged"):
        answer(db, document)
    assert answer(db, document) == (want, 449)
    (found,) = db.contexts
    assert (found.id, found.problem) == (context.id, None)
    assert db.check(found) == []


def test_what_remote_may_be(open_db, url):
    with pytest.raises(RequestError, match="begins with file://"):
        open_db(path="a", remote="http://x/")
    open_db(path="a").close()
    with pytest.raises(RequestError, match="leave out one of the two"):
        open_db(path="a", remote=url, read_only=True)


HOST = """
    import sys
    import numpy as np
    import alaya_jax as aj
    from alaya_jax import configs
    from alaya_jax.models import LlamaConfig, llama
    import jax

    path, url, n = sys.argv[1:]
    config = LlamaConfig.from_hf(configs.load("llama-tiny"))
    rng = np.random.default_rng(0)
    shapes = llama.abstract_params(config)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) / 16, shapes)
    model = aj.Model(config, params, name="tiny")
    prompt = np.arange(500) % 250 + 3
    computed = []
    prefill = aj.Session.prefill

    def counted(self, rest, **options):
        computed.append(len(rest))
        return prefill(self, rest, **options)

    aj.Session.prefill = counted
    with aj.DB(path, model, aj.Budget.for_pages(model, 65), remote=url) as db:
        context = db.import_context(prompt[:int(n)])
        print(context.id, sum(computed))
        k, _ = db._catalogue.store.read_kv(context.id, 1)
        print(float(np.abs(k).sum()))
"""


@pytest.mark.slow
def test_two_hosts_that_share_a_prefix_compute_it_once(tmp_path):
    """Two processes that have nothing in common but a directory."""

    def host(name, n):
        arguments = [tmp_path / name, f"file://{tmp_path}/shared", n]
        command = [sys.executable, "-c", textwrap.dedent(HOST), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        (id, computed), (total,) = map(str.split, done.stdout.splitlines())
        return id, int(computed), total

    id, computed, total = host("one", 400)
    assert computed == 400
    assert host("two", 400) == (id, 0, total)
    assert host("three", 500)[1] == 100
    assert host("two", 500)[1] == 0
