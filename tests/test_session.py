"""Sessions: forks, a model loop of the user's own, what is pending, what was read."""

import jax.numpy as jnp
import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax.errors import CacheFullError, RequestError
from alaya_jax.models import llama

TOLERANCE = 2e-4  # absolute, on logits; float32
ROOM = 1024


@pytest.fixture
def prompt(rng):
    return rng.integers(3, 256, 37)


def opened(db, prompt):
    """A session with the whole prompt in the cache, and the logits of its last token."""
    session, rest = db.create_session(prompt)
    return session, session.prefill(rest)


def continued(session, tokens=(), n=5, **options):
    return [t.id for t in aj.generate(session, tokens, max_new_tokens=n, **options)]


@pytest.mark.smoke
def test_forks_go_their_own_ways(db, greedy, prompt):
    """Pages are shared until one writes; the order of writes and closing does not matter."""
    parent, _ = opened(db, prompt)
    assert db.pool.free_tokens == ROOM - 3 * 16
    children = [parent.fork() for _ in range(2)]
    assert db.pool.free_tokens == ROOM - 3 * 16
    turns = [[7, 8, 9], [10], [11, 12]]
    sessions = [*children, parent]
    running = [aj.generate(s, t, max_new_tokens=20) for s, t in zip(sessions, turns, strict=True)]
    steps = [[t.id for t in step] for step in zip(*running, strict=True)]
    expected = [greedy([*prompt, *turn], 20) for turn in turns]
    assert [list(ids) for ids in zip(*steps, strict=True)] == expected
    parent.close()
    grandchild = children[0].fork()
    children[0].close()
    assert continued(grandchild, n=1) == greedy([*prompt, *turns[0], *expected[0]], 1)
    grandchild.close()
    children[1].close()
    assert db.pool.free_tokens == ROOM


def test_a_fork_of_a_running_generation(db, greedy, prompt):
    """It is at the tokens yielded so far, whatever the device has computed ahead."""
    expected = greedy(prompt, 14)
    session, rest = db.create_session(prompt)
    running = aj.generate(session, rest, max_new_tokens=14)
    got = [next(running).id for _ in range(6)]
    fork = session.fork()
    assert fork.lengths == [37 + 5]
    assert fork.batch.pending == [[expected[5]]]
    other = continued(fork, [3, 4], n=6)
    assert got + [t.id for t in running] == expected
    assert other == greedy([*prompt, *expected[:6], 3, 4], 6)


def test_copied_pages_stay_in_one_run(db, rng):
    """The copy of a shared tail and the new pages behind it are read as one slice."""
    document = rng.integers(3, 256, 70)
    db.import_context(document)
    session, _ = db.create_session([*document, 1])
    shared = session.sequences[0].pages.copy()
    session.batch.make_room([60])
    pages = session.sequences[0].pages
    assert len(pages) == 9
    np.testing.assert_array_equal(pages[:4], shared[:4])
    assert pages[4] != shared[4]
    np.testing.assert_array_equal(np.diff(pages[4:]), 1)


def own_model(model, session, query=None):
    """The model's own loop over layers, with attention by `update` and `attention`."""

    def attend(layer, q, k, v, state):
        session.update(q, k, v, layer)
        return session.attention(q, layer, query), state

    def run(tokens):
        tokens = np.asarray(tokens, np.int32).reshape(session.batch_size, -1)
        positions = np.asarray(session.lengths)[:, None] + np.arange(tokens.shape[1])
        return np.asarray(llama.forward(model.params, model.config, tokens, positions, attend)[0])

    return run


def test_a_model_of_your_own_gives_the_same_logits(db, tiny_model, all_logits, prompt):
    """Behind a reused prefix, many tokens at once and one by one."""
    db.import_context(prompt[:21])
    session, rest = db.create_session(prompt)
    assert session.reused == [21]
    run = own_model(tiny_model, session)
    logits = np.concatenate([run(rest[:13])[0], *(run([token])[0] for token in rest[13:])])
    np.testing.assert_allclose(logits, all_logits(prompt)[21:], rtol=0, atol=TOLERANCE)
    assert session.lengths == [37]
    # The keys and values are those of a prefill, and a generation goes on from them.
    same, _ = opened(db, prompt)
    for layer in range(2):
        for x, y in zip(
            *(db.pool.read(s.sequences[0], layer) for s in (session, same)), strict=True
        ):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-4)
    assert continued(session, [9]) == continued(same, [9])


def test_a_batch_in_a_model_of_your_own(db, tiny_model, all_logits, rng):
    prompts = [rng.integers(3, 256, n) for n in (30, 12)]
    session, rest = db.create_session(prompts)
    session.prefill([r[:-2] for r in rest])
    run = own_model(tiny_model, session)
    logits = np.concatenate([run([r[i] for r in rest]) for i in (-2, -1)], axis=1)
    for row, tokens in zip(logits, prompts, strict=True):
        np.testing.assert_allclose(row, all_logits(tokens)[-2:], rtol=0, atol=TOLERANCE)


def test_update_gives_keys_and_values_back(db, tiny_model, rng):
    session, rest = db.create_session(np.arange(5, 15))
    session.prefill(rest)
    k, v = rng.standard_normal((2, 1, 4, 2, 16)).astype(np.float32)
    before = db.pool.read(session.sequences[0], 1)
    assert session.update(None, k, v, 1) == (None, None)
    got = session.update(None, k + 1, v + 1, 1, return_kv=True)
    for have, old, new in zip(got, before, (k, v), strict=True):
        new = new[0].swapaxes(0, 1)
        np.testing.assert_array_equal(have, np.concatenate([old, new, new + 1], axis=1))
    assert session.lengths == [10], "layer 0 has not got its tokens"
    for call in (session.fork, lambda: session.prefill([1]), lambda: aj.generate(session, [1])):
        with pytest.raises(RequestError, match="some layers only"):
            call()
    session.update(None, k, v, 0)
    assert session.lengths == [10 + 4]
    session.update(None, k, v, 0)
    assert session.lengths == [10 + 8]  # in the second page
    # Token ids are not known this way.
    with pytest.raises(RequestError, match="holds 18 tokens and the ids of 10"):
        db.store(session)
    context = db.store(session, tokens=np.arange(5, 23))
    assert db.create_session(np.arange(5, 29))[0].reused == [18]
    for layer, kv in enumerate((k, k)):
        stored = db._catalogue.store.read_kv(context.id, layer, 10, 14)[0]
        np.testing.assert_array_equal(stored, kv[0].swapaxes(0, 1))


def test_update_and_attention_need_no_layers_of_ours(tiny_model, tmp_path, rng):
    """A user's own model has its weights; the database's need be none but the embedding."""
    c = tiny_model.config
    bare = aj.Model(c, {"embed": tiny_model.params["embed"]}, fingerprint="bare")
    q = rng.standard_normal((1, 3, c.num_attention_heads, c.head_dim), np.float32)
    k, v = rng.standard_normal((2, 1, 3, c.num_key_value_heads, c.head_dim), np.float32)
    outs = []
    for model in (tiny_model, bare):
        with aj.DB(tmp_path / model.fingerprint, model, budget=aj.Budget(device="1MiB")) as db:
            session, _ = db.create_session([5, 6])
            session.update(q, k, v, 0)
            outs.append(np.asarray(session.attention(q, 0)))
    np.testing.assert_array_equal(*outs)


def test_update_and_attention_refuse_what_does_not_fit(db, rng):
    session, rest = db.create_session([5, 6, 7])
    k = np.zeros((1, 4, 2, 16), np.float32)
    q = np.zeros((1, 4, 4, 16), np.float32)
    for bad_k, layer in (
        (k[:, :, :1], 0),
        (k[..., :8], 0),
        (np.concatenate([k, k]), 0),
        (k, 2),
        (k, -1),
    ):
        with pytest.raises(RequestError, match=r"update: .*layers 0 to 1"):
            session.update(None, bad_k, bad_k, layer)
    with pytest.raises(RequestError, match="call update"):
        session.attention(q, 0)
    session.update(None, k, k, 0)
    for bad_q, layer in ((q[:, :, :2], 0), (q[..., :8], 0), (q, 1), (q, 2), (q, -1)):
        with pytest.raises(RequestError, match="attention: "):
            session.attention(bad_q, layer)
    with pytest.raises(RequestError, match="query heads"):
        session.attention(q, 0, aj.DIPR(beta=jnp.ones(2)))
    assert session.attention(q, 0).shape == q.shape
    session.close()
    for call in (lambda: session.update(None, k, k, 0), lambda: session.attention(q, 0)):
        with pytest.raises(RequestError, match="closed"):
            call()
    generated, rest = db.create_session([5, 6, 7])
    assert len(continued(generated, rest, n=2)) == 2
    with pytest.raises(RequestError, match=r"prefill\(\(\)\)"):
        generated.update(None, k, k, 0)
    batch, _ = db.create_session([[5], [6]])
    both = np.concatenate([k, k])
    with pytest.raises(RequestError, match="one sequence"):
        batch.update(None, both, both, 0, return_kv=True)
    assert db.pool.free_tokens == ROOM - 16, "room was taken for nothing"


def test_what_is_pending_is_fed_first(db, all_logits, greedy, prompt):
    session, rest = db.create_session(prompt)
    (first,) = continued(session, rest, n=1)
    assert (session.batch.pending, session.length) == ([[first]], 37)
    logits = session.prefill(())
    assert (session.batch.pending, session.length) == ([[]], 38)
    np.testing.assert_allclose(logits[0], all_logits([*prompt, first])[-1], rtol=0, atol=TOLERANCE)
    with pytest.raises(RequestError, match="no tokens"):
        session.prefill(())
    continued(session, [5, 6], n=3)
    np.testing.assert_array_equal(session.tokens[0][:40], [*prompt, first, 5, 6])


def test_a_batch_with_an_empty_row(db, all_logits, rng):
    """Nothing new for one sequence: it stays as it was, and the other gets its logits."""
    prompts = [rng.integers(3, 256, n) for n in (20, 75)]
    session, rest = db.create_session(prompts)
    session.prefill([rest[0], rest[1][:9]])
    seen = []
    logits = session.prefill([[], rest[1][9:]], on_chunk=seen.append)
    assert sum(seen) == 66
    assert session.lengths == [20, 75]
    np.testing.assert_allclose(logits[1], all_logits(prompts[1])[-1], rtol=0, atol=TOLERANCE)
    logits = session.prefill([[7], ()])
    want = all_logits([*prompts[0], 7])[-1]
    np.testing.assert_allclose(logits[0], want, rtol=0, atol=TOLERANCE)
    for wrong in ([[1]], [[1], [2], [3]], [1, 2, 3]):
        with pytest.raises(RequestError, match="2 sequences"):
            session.prefill(wrong)


def test_each_sequence_of_a_batch_gets_the_logits_of_its_own_end(db, all_logits, rng, monkeypatch):
    """Two chunks, and a sequence that ends in the first."""
    monkeypatch.setattr("alaya_jax.runtime.batch.CHUNKS", (8, 64))
    prompts = [rng.integers(3, 256, n) for n in (20, 75)]
    session, rest = db.create_session(prompts)
    logits = session.prefill(rest)
    for row, tokens in zip(logits, prompts, strict=True):
        np.testing.assert_allclose(row, all_logits(tokens)[-1], rtol=0, atol=TOLERANCE)


def test_chunks_of_unequal_size(db, all_logits, rng, monkeypatch):
    """However a prompt is cut, the logits are those of one forward."""
    tokens = rng.integers(3, 256, 75)
    monkeypatch.setattr("alaya_jax.runtime.batch.CHUNKS", (8, 64))
    session, rest = db.create_session(tokens)
    seen = []
    logits = session.prefill(rest, on_chunk=seen.append)
    assert seen == [64, 11]
    np.testing.assert_allclose(logits[0], all_logits(tokens)[-1], rtol=0, atol=TOLERANCE)


def test_room_for_a_batch_is_for_all_or_none(db, rng):
    blocker, _ = db.create_session(rng.integers(3, 256, 500))
    blocker.batch.make_room([500])
    batch, rest = db.create_session([rng.integers(3, 256, 300) for _ in range(2)])
    free = db.pool.free_tokens
    with pytest.raises(CacheFullError):
        batch.prefill(rest)
    assert db.pool.free_tokens == free
    assert batch.prefill([r[:60] for r in rest]).shape == (2, 256)


def window_keys(position, sink, recent):
    keys = position + 1
    return min(keys, sink + recent) if keys > sink else keys


def test_explain_counts_what_was_read(db, prompt):
    db.import_context(prompt[:30])
    session, rest = db.create_session(prompt)
    window = aj.Window(sink=4, recent=6)
    before = session.explain().to_dict()
    assert before["phases"] == {}
    assert len(continued(session, rest, n=10, attention=window, prefill=window)) == 10
    found = session.explain().to_dict()
    assert (found["tokens"], found["reused"]) == ([46], [30])
    assert found["contexts"] == [db.contexts[0].id]
    for phase, positions in (("prefill", range(30, 37)), ("decode", range(37, 46))):
        account = found["phases"][phase]
        assert account["steps"] == len(positions)
        assert account["query"] == "Window(sink=4, recent=6)"
        assert account["index"] is None
        visible = np.mean([p + 1 for p in positions])
        assert account["keys_visible_per_step"] == pytest.approx(visible)
        attended = np.mean([window_keys(p, 4, 6) for p in positions])
        assert account["keys_attended_per_step"] == pytest.approx(attended)
        assert account["layers"] == pytest.approx([attended] * 2)


def test_explain_counts_what_was_retrieved(db, prompt):
    session, rest = db.create_session(prompt)
    query = aj.TopK(k=3, window=aj.Window(sink=1, recent=2))
    continued(session, rest, n=6, attention=query)
    account = session.explain().to_dict()["phases"]["decode"]
    assert account["index"] == "Flat()"
    assert account["keys_attended_per_step"] == 6  # 1 + 2 + 3, at every position
    assert account["keys_scanned_per_step"] == account["keys_visible_per_step"] == 40
    text = str(session.explain())
    for part in ("TopK", "40.0 visible", "40.0 scored", "6.0 attended", "15.0%"):
        assert part in text
    continued(session, n=3, attention=aj.Window(sink=1, recent=2))
    kept = session.explain().to_dict()
    account = kept["phases"]["decode"]
    assert (account["query"], account["steps"]) == ("Window(sink=1, recent=2)", 2), "another query"
    assert account["keys_attended_per_step"] == 3
    session.close()
    assert session.explain().to_dict() == kept, "closing lost the account"


@pytest.mark.parametrize("end", ["id", "string"])
def test_explain_counts_every_sequence_of_a_batch_while_it_runs(db, greedy, rng, end):
    """Under Full the keys attended to are those visible.

    An end id ends a sequence on the device at once; a stop string is seen by the host only, when
    some tokens more may have been computed.
    """
    prompts = [rng.integers(3, 256, n) for n in (20, 9)]
    expected = [greedy(p, 20) for p in prompts]
    stop = bytes(expected[0][3:6]).decode()
    by_id = aj.Greedy(stop_ids=[expected[0][5]])
    fed = expected[0].index(expected[0][5])
    sampling = [by_id if end == "id" else aj.Greedy(stop=stop), aj.Greedy()]
    session, rest = db.create_session(prompts)
    generation = aj.generate(session, rest, max_new_tokens=20, sampling=sampling)
    list(generation)
    assert generation.finish_reasons == ["eos" if end == "id" else "stop", "length"]
    account = session.explain().to_dict()["phases"]["decode"]
    assert account["keys_attended_per_step"] == account["keys_visible_per_step"]
    if end == "id":
        assert account["steps"] == 19 + fed
    else:
        assert 19 + 5 <= account["steps"] <= 19 + 19


def test_explain_of_a_model_of_your_own(db, tiny_model, prompt):
    session, rest = db.create_session(prompt[:13])
    own_model(tiny_model, session, aj.Window(2, 3))(rest)
    account = session.explain().to_dict()["phases"]["attention"]
    attended = np.mean([window_keys(p, 2, 3) for p in range(13)])
    assert account["keys_attended_per_step"] == pytest.approx(attended)
    assert account["keys_visible_per_step"] == 7
    assert account["steps"] == 13


def test_a_closed_session_says_so(db, prompt):
    session, _ = opened(db, prompt)
    assert repr(session) == "Session(tiny, lengths [37], reused [0])"
    session.close()
    session.close()
    assert repr(session) == "Session(closed)"
    for call in (
        lambda: session.length,
        lambda: session.lengths,
        session.fork,
        lambda: session.prefill([1]),
        lambda: db.store(session),
        lambda: aj.generate(session, [1]),
    ):
        with pytest.raises(RequestError, match="closed"):
            call()
