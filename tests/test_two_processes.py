"""Two processes, four devices each, one mesh whose context axis runs across both."""

import contextlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax import DIPR, Sketch, TopK, Window
from alaya_jax.query.plan import Plan

CHILD = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
address, rank, folder = sys.argv[1:]
jax.distributed.initialize(address, 2, int(rank))
import jax.numpy as jnp
import numpy as np
import alaya_jax as aj
from alaya_jax import DIPR, Full, Sketch, TopK, Window, configs
from alaya_jax.cache import tables
from alaya_jax.cache.pool import PagePool, PagedSequence
from alaya_jax.compilation import by_name
from alaya_jax.index.pages import PageIndexes
from alaya_jax.models import LlamaConfig, llama
from alaya_jax.query.plan import Plan, indexes_of
from alaya_jax.runtime.programs import Fed
from alaya_jax.runtime.stack import Stack
from alaya_jax.sharding import tree_shardings

mesh, rules = aj.make_mesh(context=4, tensor=2), aj.ShardingRules()
assert {d.process_index for d in mesh.devices[:, 0]} == {0, 1}
config = LlamaConfig.from_hf(configs.load("llama-tiny"))
shapes = llama.abstract_params(config)
with np.load(folder + "/model.npz") as file:
    leaves = [file[str(i)] for i in range(len(file.files))]
params = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
shardings = tree_shardings(mesh, rules, llama.logical_axes(config), shapes)
params = jax.tree.map(
    lambda x, s: jax.make_array_from_callback(x.shape, s, x.__getitem__), params, shardings
)
model = aj.Model(config, params, fingerprint="tiny", name="tiny", mesh=mesh, rules=rules)
tables.TABLE_WIDTH = 32
said = {}

# The functions alone: pages, a table, a chunk.
tokens = np.load(folder + "/tokens.npy")
pool = PagePool(config, model.dtype, 64, 4, "", where=mesh, rules=rules)
indexes = PageIndexes(pool)
sequence = PagedSequence()
pool.reserve(sequence, len(tokens))
chunk = np.pad(tokens, (0, 64 - len(tokens)))[None].astype(np.int32)
stack, plan = Stack(params, model.frame), Plan(Full())
fed = stack.put(Fed(chunk, np.asarray([len(tokens)], np.int32), pool.table([sequence])))
chain = stack.chain(plan, stack.put(indexes.cover(indexes_of(plan, 2), [sequence])))
with pool.lend() as lent:
    _, passed = stack.layers(lent, chain, stack.between(1, 64), stack.start(1), fed)
    kv = lent.kv
logits, counts = stack.logits(passed), stack.counts(passed)
assert len(kv.k[0].addressable_shards) == 4 and not kv.k[0].is_fully_addressable
said["logits"] = np.asarray(logits)[0]
said["attended"] = np.asarray(counts.attended)

# The database: every process does the same.
window = Window(2, 6)
attention = (Plan(DIPR(beta=3.0, window=window), Sketch()), Plan(TopK(5, window)))
with aj.DB(folder + "/db" + rank, model, aj.Budget.for_pages(model, 65, 4), page_size=4) as db:
    session, rest = db.create_session(tokens)
    new = aj.generate(session, rest, max_new_tokens=9, attention=attention)
    said["ids"] = np.asarray([t.id for t in new])
    said["read"] = np.asarray(session.explain().phases["decode"].read)
    # The last token once more, against full attention, its pages spread over both.
    analysis = session.explain(analyze=True).analysis
    assert (analysis.seconds > 0).all()
    said["recovery"], said["error"] = analysis.recovery, analysis.error
    said["needed"], said["chosen"] = analysis.keys_needed, analysis.attended
    said["positions"] = np.concatenate([np.concatenate(x) for x in analysis.positions])
    # Both store what both hold, each in its own place; read back, it is in the pool once more.
    context = db.store(session)
    session.close()
    db._catalogue.drop(context)
    again, _ = db.create_session([*context.tokens, 5], reuse="any")
    assert again.reused == [context.num_tokens]
    said["k"] = db.pool.read(again.sequences[0], 1)[0]
# Of a prefill, and of a step with two plans; and one end of a step.
compiled = by_name["layers"], by_name["end"]
assert compiled == (3, 1), compiled
np.savez(folder + f"/said{rank}.npz", **said)
"""


@pytest.mark.slow
def test_two_processes_give_the_answer_of_one(
    open_db, tiny_model, all_logits, tmp_path, rng, monkeypatch
):
    tokens = rng.integers(3, 256, 47).astype(np.int32)
    np.save(tmp_path / "tokens.npy", tokens)
    leaves = map(np.asarray, jax.tree.leaves(tiny_model.params))
    np.savez(tmp_path / "model.npz", **{str(i): x for i, x in enumerate(leaves)})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-c", CHILD, address]
    processes = [
        subprocess.Popen([*command, str(i), str(tmp_path)], stderr=subprocess.PIPE)
        for i in range(2)
    ]
    monkeypatch.setattr("alaya_jax.cache.tables.TABLE_WIDTH", 32)
    window = Window(2, 6)
    attention = (Plan(DIPR(beta=3.0, window=window), Sketch()), Plan(TopK(5, window)))
    db = open_db(page_size=4)
    session, rest = db.create_session(tokens)
    new = aj.generate(session, rest, max_new_tokens=9, attention=attention)
    want = [t.id for t in new]
    with contextlib.ExitStack() as stack:
        for process in processes:
            stack.enter_context(process)
            stack.callback(process.kill)  # one may wait for another that failed
        for process in processes:
            _, wrong = process.communicate(timeout=240)
            assert process.returncode == 0, wrong.decode()[-3000:]
    for rank in range(2):
        with np.load(tmp_path / f"said{rank}.npz") as said:
            np.testing.assert_allclose(said["logits"], all_logits(tokens)[-1], rtol=0, atol=2e-4)
            n = len(tokens)
            assert np.all(said["attended"] == n * (n + 1) // 2)
            assert said["ids"].tolist() == want
            k = db.pool.read(session.sequences[0], 1)[0]
            np.testing.assert_allclose(said["k"], k, rtol=0, atol=1e-4)
            found = session.explain(analyze=True)
            one = found.analysis
            np.testing.assert_array_equal(said["read"], found.phases["decode"].read)
            np.testing.assert_allclose(said["recovery"], one.recovery, rtol=0, atol=1e-5)
            np.testing.assert_allclose(said["error"], one.error, rtol=0, atol=1e-4)
            np.testing.assert_array_equal(said["needed"], one.keys_needed)
            np.testing.assert_array_equal(said["chosen"], one.attended)
            at = np.concatenate([np.concatenate(x) for x in one.positions])
            np.testing.assert_array_equal(said["positions"], at)
