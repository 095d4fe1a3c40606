"""Contexts: stored once, found by their longest prefix, reused by later processes, never wrong."""

import copy
import dataclasses
import functools
import pickle
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax.budget import Budget
from alaya_jax.errors import CacheFullError, ContextError, DatabaseError, RequestError
from alaya_jax.models import llama
from alaya_jax.runtime.stack import Stack

ROOM = 1024  # tokens, 64 pages


@pytest.fixture
def document(rng):
    return rng.integers(3, 256, 70)


def answer(db, prompt, n=6):
    """Greedy tokens, and how many of the prompt's came from a stored context."""
    session, rest = db.create_session(prompt)
    with session:
        assert session.reused[0] + len(rest) == len(prompt)
        return [t.id for t in aj.generate(session, rest, max_new_tokens=n)], session.reused[0]


def stored(db, context):
    """Keys and values of each layer, from disk, verified."""
    layers = range(db.model.config.num_hidden_layers)
    return [np.array(db._catalogue.store.read_kv(context.id, layer)) for layer in layers]


def flip_a_byte(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.smoke
@pytest.mark.parametrize("shared", [70, 69, 64, 33, 1])
def test_the_longest_prefix_is_reused_at_any_token(db, all_logits, document, rng, shared):
    """Whole, in part, and in the middle of a page; logits as from scratch."""
    db.import_context(document)
    db.import_context(document[: shared // 2 + 1])
    prompt = np.concatenate([document[:shared], rng.integers(3, 256, 20)])
    prompt[shared] = (document[shared] + 1) % 256 if shared < 70 else prompt[shared]
    session, rest = db.create_session(prompt)
    assert session.reused == [shared]
    assert session.context.num_tokens == 70
    np.testing.assert_array_equal(rest, prompt[shared:])
    np.testing.assert_array_equal(session.tokens[0], prompt[:shared])
    logits = session.prefill(rest)[0]
    np.testing.assert_allclose(logits, all_logits(prompt)[-1], rtol=0, atol=2e-4)


def test_something_is_always_left_to_prefill(db, greedy, document):
    """The last token's logits come next, so a prompt stored whole is reused up to that token."""
    db.import_context(document)
    assert answer(db, document) == (greedy(document, 6), 69)
    assert answer(db, document[:1])[1] == 0


def test_writing_behind_a_reused_prefix_leaves_the_context_as_it_is(db, greedy, document, rng):
    """Copy on write of the page in which the prefix ends; two sessions at once."""
    context = db.import_context(document)
    on_disk = stored(db, context)
    prompts = [np.concatenate([document[:n], rng.integers(3, 256, 9)]) for n in (70, 41)]
    running = []
    for prompt in prompts:
        session, rest = db.create_session(prompt)
        running.append(aj.generate(session, rest, max_new_tokens=12))
    mixed = [[t.id for t in step] for step in zip(*running, strict=True)]
    assert [list(ids) for ids in zip(*mixed, strict=True)] == [greedy(p, 12) for p in prompts]
    for before, layer in zip(on_disk, range(2), strict=True):
        np.testing.assert_array_equal(before, db.pool.read(context.resident, layer))
    assert answer(db, document)[0] == greedy(document, 6)


def test_from_disk_equals_from_scratch(open_db, greedy, document):
    db = open_db()
    id = db.import_context(document, title="a document").id
    kept = stored(db, db.contexts[0])
    db.close()
    again = open_db()
    (context,) = again.contexts
    assert (context.id, context.title, context.num_tokens) == (id, "a document", 70)
    np.testing.assert_array_equal(context.tokens, document)
    np.testing.assert_array_equal(kept, stored(again, context))
    prompt = [*document, 77, 78]
    assert answer(again, prompt) == (greedy(prompt, 6), 70)
    assert repr(context).startswith("Context('a document', 70 tokens, in memory")


def test_a_context_that_is_in_memory_in_part_is_read_further(open_db, document):
    """Only the tokens that are reused are read; more of them when a later prompt shares more."""
    db = open_db()
    db.import_context(document)
    db.close()
    again = open_db()
    (context,) = again.contexts
    for shared, pages in ((20, 2), (5, 2), (50, 4), (70, 5), (33, 5)):
        session, _ = again.create_session([*document[:shared], 0])
        assert session.reused == [shared]
        for layer, want in enumerate(stored(again, context)):
            got = np.array(again.pool.read(session.sequences[0], layer))
            np.testing.assert_array_equal(got, want[:, :, :shared])
        session.close()
        assert again.pool.free_tokens == ROOM - 16 * pages


def test_keys_and_values_survive_in_bfloat16(open_db, tiny_model, document):
    """The bits that were computed are the bits that are read; nothing passes by float32."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_model.params)
    model = dataclasses.replace(tiny_model, params=params, fingerprint="tiny-bf16")
    db = open_db(model)
    context = db.import_context(document)
    kept = [np.array(db.pool.read(context.resident, layer)) for layer in range(2)]
    assert kept[0].dtype == jnp.bfloat16
    session, rest = db.create_session([*document, 5])
    before = session.prefill(rest)
    db.close()
    again = open_db(model)
    np.testing.assert_array_equal(stored(again, again.contexts[0]), kept)
    session, rest = again.create_session([*document, 5])
    assert session.reused == [70]
    np.testing.assert_array_equal(session.prefill(rest), before)


def test_contexts_of_others_are_not_reused(open_db, tiny_model, document, rng):
    """Another model, type, page size or namespace: not shown, not reused, and there again later."""
    db = open_db(namespace="a")
    id = db.import_context(document).id
    db.close()
    bf16 = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_model.params)
    others = [
        {"namespace": "b"},
        {"namespace": "a", "model": dataclasses.replace(tiny_model, fingerprint="another")},
        {"namespace": "a", "model": dataclasses.replace(tiny_model, params=bf16)},
        {"namespace": "a", "page_size": 8},
    ]
    for options in others:
        other = open_db(**options)
        assert other.contexts == []
        assert other.create_session(document)[0].reused == [0]
        other.close()
    own = open_db(namespace="a")
    assert [c.id for c in own.contexts] == [id]
    assert own.create_session(document)[0].reused == [69]


def test_dynamic_rope_is_stretched_for_the_length_that_is_served(open_db, rng):
    """Its keys depend on that length: contexts of another are not reused."""
    path = Path(__file__).resolve().parent / "data" / "goldens" / "dynamic_gqa4"
    short, long = (aj.load(path, max_length=n, progress=False) for n in (100, None))
    document = rng.integers(3, 128, 60)
    db = open_db(short)
    session, rest = db.create_session(document)
    logits = session.prefill(rest)[0]

    @functools.partial(jax.jit, static_argnums=0)
    def alone(length):
        args = short.params, short.config, document[None], np.arange(60)[None], llama.causal_attend
        return llama.forward(*args, rope_length=length)[0][0, -1]

    np.testing.assert_allclose(logits, alone(100), rtol=0, atol=2e-4)
    assert np.abs(logits - alone(128)).max() > 0.01
    with pytest.raises(RequestError, match="101 tokens, and dynamic_gqa4 takes up to 100"):
        db.create_session(np.resize(document, 101))
    db.store(session)
    assert db.create_session(document)[0].reused == [59]
    db.close()
    other = open_db(long)
    assert other.contexts == []
    assert other.create_session(np.resize(document, 101))[0].reused == [0]
    for n in (0, 129):
        with pytest.raises(RequestError, match=f"max_length={n}"):
            aj.load(path, max_length=n, progress=False)


def test_importing_twice_stores_once(db, document, monkeypatch):
    context = db.import_context(document)
    monkeypatch.setattr(db.pool, "lend", None)  # nothing may be computed
    assert db.import_context(document.tolist()) is context
    assert len(db.contexts) == 1


def test_importing_more_computes_only_the_rest(db, greedy, document, rng, monkeypatch):
    db.import_context(document)
    longer = np.concatenate([document, rng.integers(3, 256, 30)])
    computed = []
    layers = Stack.layers

    def run(stack, lent, chain, x, passed, fed):
        computed.append(int(fed.count[0]))
        return layers(stack, lent, chain, x, passed, fed)

    monkeypatch.setattr(Stack, "layers", run)
    context = db.import_context(longer)
    assert sum(computed) == 30
    assert (context.num_tokens, len(db.contexts)) == (100, 2)
    assert answer(db, [*longer, 9]) == (greedy([*longer, 9], 6), 100)


def test_text_is_encoded_by_the_model(db, greedy):
    db.import_context("All legislative Powers herein granted")
    tokens = np.frombuffer(b"All legislative Powers shall", np.uint8)
    session, rest = db.create_session("All legislative Powers shall")
    assert session.reused == [len("All legislative Powers ")]
    assert bytes(rest.tolist()) == b"shall"
    got = [t.id for t in aj.generate(session, rest, max_new_tokens=3)]
    assert got == greedy(tokens, 3)


def test_keys_and_values_of_your_own(db, open_db, document, rng):
    """import_context(kv=...) stores what is given; it is what sessions then attend to."""
    source = open_db(path="source")
    kv = stored(source, source.import_context(document))
    context = db.import_context(document, kv=((k, jnp.asarray(v)) for k, v in kv), title="mine")
    np.testing.assert_array_equal(stored(db, context), kv)
    prompt = [*document, 11]
    warm = answer(db, prompt)
    assert warm == answer(source, prompt)
    altered = db.import_context(document[::-1], kv=[(k, -v) for k, v in kv])
    assert answer(db, [*document[::-1], 11]) != answer(source, [*document[::-1], 11])

    shape = [np.zeros((2, 70, 16), np.float32)] * 2
    for bad in (
        [shape],  # a layer is missing
        [shape] * 3,
        [[np.zeros((2, 69, 16), np.float32)] * 2] * 2,
        [[np.zeros((70, 2, 16), np.float32)] * 2] * 2,
        [[np.zeros((2, 70, 16), np.float64)] * 2] * 2,
    ):
        with pytest.raises(RequestError, match=r"kv|layer 0"):
            db.import_context(document + 1 - (document == 255), kv=bad)
    assert {c.id for c in db.contexts} == {context.id, altered.id}
    held = 2 * -(-70 // 16) * 16 * db.token_bytes
    assert db.stats().bytes_held == held, "half a context was left"
    assert db.stats().bytes_on_disk < held + (1 << 20)


def test_a_session_is_stored_with_what_it_generated(open_db, greedy, document):
    db = open_db()
    session, rest = db.create_session(document)
    generation = aj.generate(session, rest, max_new_tokens=40)
    got = [next(generation).id for _ in range(20)]
    context = db.store(session, title="a talk")  # in the middle of a device call
    np.testing.assert_array_equal(context.tokens, [*document, *got[:-1]])
    assert got + [t.id for t in generation] == greedy(document, 40)
    session.close()
    prompt = [*document, *got, 50]
    expected = greedy(prompt, 6)
    assert answer(db, prompt) == (expected, 70 + 19)
    db.close()
    assert answer(open_db(), prompt) == (expected, 70 + 19)


def test_a_session_of_another_database_is_stored_with_its_own_keys(open_db, greedy, document):
    """Of a shared one that is read-only; pages of the two have equal numbers and other contents."""
    shared = open_db(path="shared")
    shared.import_context(document)
    shared.close()
    shared, mine = open_db(path="shared", read_only=True), open_db(path="mine", page_size=8)
    mine.import_context(document[::-1])
    session, rest = shared.create_session([*document, 9])
    session.prefill(rest)
    context = mine.store(session)
    want = [shared.pool.read(session.sequences[0], layer) for layer in range(2)]
    np.testing.assert_array_equal(stored(mine, context), want)
    prompt = [*document, 9, 10]
    assert answer(mine, prompt) == (greedy(prompt, 6), 71)
    session.close()
    shared.close()
    mine.close()
    assert answer(open_db(path="mine", page_size=8), prompt) == (greedy(prompt, 6), 71)


def test_a_session_of_another_model_is_not_stored(open_db, tiny_model, document):
    """Another name, another type, or weights that differ in one row."""
    mine = open_db()
    bf16 = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_model.params)
    embed = tiny_model.params["embed"]
    row = {"embed": {"embedding": embed["embedding"].at[5].add(0.1)}}
    for change in (
        {"fingerprint": "another"},
        {"params": bf16},
        {"params": {**tiny_model.params, **row}},
    ):
        other = open_db(dataclasses.replace(tiny_model, **change), path="other")
        session, rest = other.create_session(document)
        session.prefill(rest)
        with pytest.raises(RequestError, match="opened with the session's model"):
            mine.store(session)
        assert other.store(session).num_tokens == 70
        other.close()
    assert mine.contexts == []


def test_a_context_of_another_database_is_not_taken_for_ones_own(open_db, document):
    """It has the same id, being of the same tokens, and would have been removed."""
    mine, other = open_db(), open_db(path="other")
    own, foreign = mine.import_context(document), other.import_context(document)
    assert own.id == foreign.id
    for call in (mine.remove, mine.check, lambda c: mine.build_index(c, aj.Graph())):
        with pytest.raises(ContextError, match=r"other.*pass its id"):
            call(foreign)
        with pytest.raises(RequestError, match="context of this database, or its id"):
            call(None)
    assert mine.contexts == [own]
    assert mine.check(foreign.id) == []


def test_what_is_no_session_prompt_or_model(db, tmp_path, tiny_model, document):
    """Each an error that says what to write instead."""
    for call, match in (
        (lambda: db.store(document), r"store\(ndarray.*import_context"),
        (lambda: db.store(db.create_session(document)), r"store\(tuple.*takes a session"),
        (lambda: db.create_session(b"text"), r"whole numbers.*model\.encode"),
        (lambda: db.create_session({1, 2}), r"whole numbers.*model\.encode"),
        (lambda: db.create_session(db), r"whole numbers.*model\.encode"),
        (lambda: db.create_session(document, reuse=True), "reuse=True.*'exact', 'any' or None"),
        (lambda: aj.DB(None, tiny_model), r"DB\(None, \.\.\.\).*path of a directory"),
        (lambda: aj.DB(tmp_path / "x", "smollm2-135m"), r"aj\.load"),
        (lambda: aj.DB(tmp_path / "x", tiny_model, "1GiB"), r"aj\.Budget\(device='1GiB'\)"),
        (lambda: aj.DB(tmp_path / "x", tiny_model, page_size=1.5), "page_size=1.5"),
        (lambda: db.create_session(document)[0].prefill("text"), r"model\.encode"),
        (lambda: db.create_session(document)[0].update(None, [1.0], [1.0], 0), "update: k"),
        (lambda: db.create_session(document)[0].attention(np.ones(3), 0), "attention: q"),
    ):
        with pytest.raises(RequestError, match=match):
            call()
    assert not (tmp_path / "x").exists()


def test_copies_and_pickles(db, greedy, document):
    """A copy of a session is a fork; what lives in this process alone says what to pass instead."""
    context = db.import_context(document)
    session, rest = db.create_session([*document, 9])
    copies = [copy.copy(session), copy.deepcopy(session)]
    session.close()
    for one in copies:
        got = [t.id for t in aj.generate(one, rest, max_new_tokens=4)]
        assert got == greedy([*document, 9], 4)
    for thing, match in ((copies[0], r"db\.store"), (db, "pass its path"), (context, context.id)):
        with pytest.raises(RequestError, match=match):
            pickle.dumps(thing)


def test_a_budget_beyond_the_machine_is_refused(tmp_path, tiny_model, monkeypatch):
    """Before a page of it is touched, with both numbers."""
    for size in ("200TiB", "2000TiB"):
        with pytest.raises(
            RequestError, match=rf"Budget\(device='{size}'\) is .* there are [\d,]+"
        ):
            aj.DB(tmp_path / "db", tiny_model, Budget(size))
    monkeypatch.setattr("alaya_jax.budget.memory_of", lambda mesh: 99_999)
    with pytest.raises(RequestError, match="102,400 bytes, and there are 99,999"):
        aj.DB(tmp_path / "db", tiny_model, Budget("100KiB"))
    monkeypatch.setattr(
        "alaya_jax.budget.memory_of", lambda mesh: None
    )  # a device that does not say
    aj.DB(tmp_path / "db", tiny_model, Budget("100KiB")).close()


def test_what_cannot_be_stored(db, document):
    empty, rest = db.create_session(document)
    with pytest.raises(RequestError, match="holds 0 tokens"):
        db.store(empty)
    batch, rest = db.create_session([document, document[:5]])
    batch.prefill(rest)
    with pytest.raises(RequestError, match="batch of 2"):
        db.store(batch)
    batch.close()
    with pytest.raises(RequestError, match="closed"):
        db.store(batch)
    assert db.contexts == []


def test_a_batch_of_prompts_reuses_for_each(db, greedy, document, rng):
    db.import_context(document)
    prompts = [[*document, 7], rng.integers(3, 256, 12).tolist(), document[:40].tolist()]
    session, rest = db.create_session(prompts)
    assert session.reused == [70, 0, 39]
    assert [len(r) for r in rest] == [1, 12, 1]
    generation = aj.generate(session, rest, max_new_tokens=5)
    list(generation)
    assert generation.ids == [greedy(p, 5) for p in prompts]
    one, rest = db.create_session([prompts[0]])  # a batch of one is a batch
    assert isinstance(rest, list)
    assert isinstance(one.prefill(rest), jax.Array)


@pytest.mark.parametrize("kind", [list, tuple, np.asarray, jnp.asarray, np.uint16, np.int64])
def test_prompts_may_be_any_whole_numbers(db, document, kind):
    """Also a list of numpy integers, which is one prompt and no batch."""
    prompt = [kind(t) for t in document] if kind in (np.uint16, np.int64) else kind(document)
    _, rest = db.create_session(prompt)
    assert rest.dtype == np.int32
    np.testing.assert_array_equal(rest, document)


def test_all_pages_come_back(db, document, rng):
    """Sessions, forks, batches, generations, in any order; what is left belongs to the context."""
    db.import_context(document)
    held = ROOM - 16 * 5
    assert db.pool.free_tokens == held
    session, rest = db.create_session([*document, 4, 5])
    session.prefill(rest)
    fork = session.fork()
    next(aj.generate(fork, [9], max_new_tokens=50))
    batch, rest = db.create_session([document[:33], document[:50]])
    list(aj.generate(batch, rest, max_new_tokens=20))
    for one in (session, batch, fork, session):
        one.close()
    assert db.pool.free_tokens == held
    session, rest = db.create_session(document)
    session.prefill(rest)
    del session  # collected: as good as closed
    assert db.pool.free_tokens == held
    for bad in ([], np.zeros(513, int)):
        with pytest.raises(RequestError):
            db.create_session([[*document, 4], bad])
    db.remove(db.contexts[0])
    assert db.pool.free_tokens == ROOM


def test_contexts_are_evicted_and_come_back(db, greedy, rng):
    """Room for two of three: the one used longest ago goes, and is read from disk again."""
    documents = [rng.integers(3, 256, 400) for _ in range(3)]
    contexts = [db.import_context(d) for d in documents]
    assert [c.resident is None for c in contexts] == [True, False, False]
    for i in (1, 0, 2, 1):
        context = contexts[i]
        session, _ = db.create_session([*documents[i], 8])
        assert session.reused == [400]
        for layer, (k, v) in enumerate(stored(db, context)):
            got_k, got_v = db.pool.read(session.sequences[0], layer)
            np.testing.assert_array_equal(k, got_k)
            np.testing.assert_array_equal(v, got_v)
        session.close()
    assert [c.resident is None for c in contexts] == [True, False, False]


def test_exhaustion_is_refused_with_number_and_setting_and_nothing_changes(db, greedy, rng):
    prompts = [rng.integers(3, 256, n) for n in (480, 480, 100)]
    open_sessions = []
    for prompt in prompts[:2]:
        session, rest = db.create_session(prompt)
        session.batch.make_room([len(rest)])
        open_sessions.append(session)
    free = db.pool.free_tokens
    assert free == ROOM - 960
    session, rest = db.create_session(prompts[2])
    with pytest.raises(CacheFullError, match=r"7 pages .* 4 of 64 are free .*Budget\(device=\d+\)"):
        session.prefill(rest)
    with pytest.raises(CacheFullError, match="Budget"):
        aj.generate(session, rest[:20], max_new_tokens=60)
    batch, rests = db.create_session([prompts[0][:40], prompts[1][:40]])
    with pytest.raises(CacheFullError, match="3 pages"):
        batch.prefill(rests)
    assert db.pool.free_tokens == free
    assert (session.length, batch.lengths) == (0, [0, 0])
    open_sessions[0].close()
    prompt = prompts[2]
    assert [t.id for t in aj.generate(session, rest, max_new_tokens=4)] == greedy(prompt, 4)


def test_a_prompt_larger_than_the_cache_names_a_budget_that_is_enough(open_db, tiny_model, rng):
    small = open_db(pages=9, indexes=None)
    prompt = rng.integers(3, 256, 200)
    with pytest.raises(CacheFullError, match="200 tokens, and the KV cache holds 128") as error:
        small.create_session(prompt)
    enough = re.search(r"at least ([\d,]+) bytes", str(error.value))
    assert enough
    budget = Budget(device=int(enough[1].replace(",", "")))
    with aj.DB(small._catalogue.store.path.parent / "enough", tiny_model, budget) as larger:
        session, _ = larger.create_session(prompt)
        session.batch.make_room([200])
        assert larger.pool.free_tokens < 16, "more than was needed"


def test_prompts_that_cannot_be_served(db, rng):
    for prompt, match in (
        ([], "empty"),
        ([[]], "no tokens"),
        ("", "no tokens"),
        ([[1, 2], []], "no tokens"),
        (np.zeros(0, np.int32), "no tokens"),
        ([5, -1], "vocabulary"),
        ([[5], [256]], "vocabulary"),
        ([0.5], "whole numbers"),
        (np.zeros((2, 3), int), "whole numbers"),
        (rng.integers(3, 256, 513), "513 tokens, and tiny takes up to 512"),
        (None, "there is no prompt"),
        ([1, 2**70], "whole numbers"),
    ):
        with pytest.raises(RequestError, match=match):
            db.create_session(prompt)
    assert db.pool.free_tokens == ROOM
    assert db.create_session(rng.integers(3, 256, 512))[1].shape == (512,)


def test_budgets(tmp_path, tiny_model):
    assert Budget("2GiB").device_bytes == 2 << 30
    assert Budget(" 1.5 KB").device_bytes == 1500
    assert Budget("100").device_bytes == 100
    assert Budget(np.int64(7)).device_bytes == 7
    for bad in ("much", "1.2.3GiB", ".", "-1GiB", "0", 0, -5, None, "1 GiBB"):
        with pytest.raises(RequestError, match="Budget"):
            _ = Budget(bad).device_bytes
    with pytest.raises(
        RequestError, match=r"Budget\(device='9KiB'\).*8,192 bytes.*at least 18,240"
    ):
        aj.DB(tmp_path / "db", tiny_model, Budget("9KiB"))
    for page_size in (0, -1):
        with pytest.raises(RequestError, match="page_size"):
            aj.DB(tmp_path / "db", tiny_model, page_size=page_size)
    assert not (tmp_path / "db").exists()


def test_a_damaged_context_is_named_and_the_others_work(open_db, greedy, document, rng):
    other = rng.integers(3, 256, 40)
    db = open_db()
    damaged, healthy = db.import_context(document), db.import_context(other)
    (file,) = db._catalogue.store.path.glob("segments/*/k.001")
    db.close()
    flip_a_byte(file, at=5)  # of the first page, which is its own
    db = open_db()
    free = db.pool.free_tokens
    with pytest.raises(ContextError, match=rf"{damaged.id}.*layer 1.*import it again"):
        db.create_session([*document, 9])
    assert db.pool.free_tokens == free
    (context,) = [c for c in db.contexts if c.problem]
    assert context.id == damaged.id
    assert damaged.id in repr(context)
    assert answer(db, [*other, 9]) == (greedy([*other, 9], 6), 40)
    # Not served again either: computed from the tokens.
    assert answer(db, [*document, 9]) == (greedy([*document, 9], 6), 0)
    assert healthy.id in [c.id for c in db.contexts if not c.problem]
    # Imported again, it is whole again, in this process and the next.
    assert db.import_context(document).problem is None
    assert db.check(damaged.id) == []
    db.close()
    assert answer(open_db(), [*document, 9]) == (greedy([*document, 9], 6), 70)


@pytest.mark.parametrize("what", ["tokens", "row"])
def test_a_context_whose_tokens_are_damaged_is_in_nobodys_way(open_db, greedy, document, rng, what):
    other = rng.integers(3, 256, 40)
    db = open_db()
    damaged, _ = db.import_context(document), db.import_context(other)
    file = db._catalogue.store.path / "catalogue.sqlite"
    db.close()
    found = document.astype("<i4").tobytes() if what == "tokens" else damaged.id.encode()
    flip_a_byte(file, at=file.read_bytes().index(found) + 3)
    db = open_db()
    assert answer(db, [*other, 9]) == (greedy([*other, 9], 6), 40)
    assert answer(db, [*document, 9]) == (greedy([*document, 9], 6), 0)
    (context,) = [c for c in db.contexts if c.problem]
    assert context.id in context.problem
    with pytest.raises(ContextError, match=context.id):
        _ = context.tokens
    again = db.import_context(document)
    assert again.problem is None
    if what == "row":  # whose it is cannot be told
        db.remove(context)
    assert [c.problem for c in db.contexts] == [None, None]
    db.remove(again)
    assert len(db.contexts) == 1


def test_removed_contexts_are_gone_and_their_sessions_go_on(open_db, greedy, document):
    db = open_db()
    context = db.import_context(document)
    session, rest = db.create_session([*document, 9])
    db.remove(context)
    assert db.contexts == []
    assert db.create_session([*document, 9])[0].reused == [0]
    with pytest.raises(ContextError, match=context.id):
        db.remove(context)
    got = [t.id for t in aj.generate(session, rest, max_new_tokens=6)]
    assert got == greedy([*document, 9], 6)
    db.close()
    assert open_db().contexts == []


def test_an_import_tells_of_its_tokens(db, document):
    told = []
    db.import_context(document[:40], progress=told.append)
    assert sum(told) == 40
    told.clear()
    db.import_context(document, progress=told.append)
    assert told[0] == 40
    assert sum(told) == len(document)


def test_an_interrupted_import_stores_nothing(db, document, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(db.pool, "read", interrupt)
    with pytest.raises(KeyboardInterrupt):
        db.import_context(document)
    monkeypatch.undo()
    assert db.contexts == []
    assert list(db._catalogue.store.path.glob("segments/*")) == []
    assert db.pool.free_tokens == ROOM


def test_a_read_only_database(open_db, document, monkeypatch):
    open_db().close()
    reader = open_db(read_only=True)
    monkeypatch.setattr(reader.pool, "lend", None)  # refused before it is computed
    with pytest.raises(DatabaseError, match="read_only"):
        reader.import_context(document)


def test_a_closed_database_says_so(db, document):
    db.import_context(document)
    session, _ = db.create_session([*document, 1])
    session.close()
    db.close()
    db.close()
    assert db.pool.free_tokens == ROOM
    for call in (db.create_session, db.import_context):
        with pytest.raises(DatabaseError, match="closed"):
            call([*document, 1])


def test_another_process_gives_the_same_answer(open_db, greedy, document, tmp_path):
    """The pages were written by a process that is gone: no state but the disk is shared."""
    script = """
import pickle, sys
import alaya_jax as aj
path, file = sys.argv[1:]
config, params, tokens = pickle.load(open(file, "rb"))
with aj.DB(path, aj.Model(config, params, fingerprint="tiny"), aj.Budget("532480")) as db:
    db.import_context(tokens)
"""
    db = open_db()
    model, path = db.model, db.path
    db.close()
    file = tmp_path / "model.pickle"
    params = jax.tree.map(np.asarray, model.params)
    file.write_bytes(pickle.dumps((model.config, params, document)))
    subprocess.run([sys.executable, "-c", script, path, str(file)], check=True, timeout=120)
    prompt = [*document, 9, 10]
    assert answer(open_db(), prompt) == (greedy(prompt, 6), 70)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_keys_that_are_not_finite_are_not_imported(db, bad):
    """One plan would answer NaN for them, another pass them over."""
    c = db.model.config
    shape = (c.num_hidden_layers, 2, c.num_key_value_heads, 20, c.head_dim)
    kv = np.zeros(shape, np.float32)
    kv[1, 1, 0, 7, 3] = bad
    with pytest.raises(RequestError, match=r"values of layer 1 are not finite.*\[0, 7, 3\]"):
        db.import_context(list(range(3, 23)), kv=[(k, v) for k, v in kv])
    assert db.create_session(list(range(3, 23)))[0].length == 0


def test_what_it_holds_is_counted_and_shown(db, document):
    """On disk and in the pool of this process; a notebook shows a table."""
    db.import_context(document)
    found = db.stats()
    assert found.contexts == 1
    assert found.tokens == len(document)
    pages = -(-len(document) // db.pool.page_size)
    assert found.bytes_pool == db.pool.capacity_tokens * db.token_bytes
    assert found.bytes_pool_used == pages * db.pool.page_size * db.token_bytes
    lines = dict(
        line.split(maxsplit=1) for line in str(found).splitlines() if "on disk" not in line
    )
    assert lines["contexts"] == f"1, {len(document)} tokens"
    assert lines["pool"].endswith("are in use")
    shown = found._repr_html_()
    assert shown.count("<tr>") == 1 + len(found.rows())
    assert f"<td>1, {len(document)} tokens</td>" in shown
