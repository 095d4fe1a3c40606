"""A mesh gives the answer of one device; rules that do not fit are refused by name."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import alaya_jax as aj
from alaya_jax import configs
from alaya_jax.cache import PagedKV, PageTable
from alaya_jax.errors import ConfigError
from alaya_jax.frame import Frame
from alaya_jax.index.memory import Memory
from alaya_jax.models import LlamaConfig, llama
from alaya_jax.models.matrices import take_rows
from alaya_jax.models.quantized import QuantizedMatrix, quantize, tiled
from alaya_jax.runtime import programs
from alaya_jax.sharding import memory_of, parse_axes, tree_shardings

TOLERANCE = 2e-4  # absolute, on logits; float32


@pytest.mark.parametrize(
    "axes",
    [{"data": 2, "tensor": 2}, {"tensor": 2, "data": 4}, {"data": 8}],
    ids=str,
)
def test_forward_on_a_mesh(tiny_model, all_logits, rng, axes, on_mesh):
    """Parameters by the rules, a batch over "data"."""
    mesh = aj.make_mesh(**axes)
    model = on_mesh(tiny_model, mesh)
    tokens = rng.integers(3, 256, (8, 12))
    batch = jax.device_put(tokens, jax.NamedSharding(mesh, model.rules.spec(mesh, ("batch", None))))
    positions = np.broadcast_to(np.arange(12), (8, 12))
    forward = jax.jit(llama.forward, static_argnums=(1, 4))
    logits, _ = forward(model.params, model.config, batch, positions, llama.causal_attend)
    for row, ids in zip(np.asarray(logits), tokens, strict=True):
        np.testing.assert_allclose(row, all_logits(ids), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kept", ["float32", "bfloat16", "int8", "int4"])
def test_rows_of_a_split_vocabulary(rng, kept):
    """Bit for bit those of one device, at the borders of the parts too, for any shape of ids."""
    table = rng.normal(size=(256, 32)).astype(np.float32)
    if kept in ("int8", "int4"):
        values, *scales = quantize(table.T, kept, 0)
        parts = (x if x is None else jnp.asarray(x) for x in (tiled(values, 1, 0), *scales))
        table = QuantizedMatrix(*parts, 1, 0, True, "float32")
        look_up = jax.jit(QuantizedMatrix.rows)
    else:
        table, look_up = jnp.asarray(table, kept), jax.jit(take_rows)
    mesh = aj.make_mesh(data=2, tensor=4)
    quantized = isinstance(table, QuantizedMatrix)  # which lies as [E, V]
    along = PartitionSpec(None, "tensor") if quantized else PartitionSpec("tensor")
    spread = jax.device_put(table, jax.NamedSharding(mesh, along))
    by_batch = jax.NamedSharding(mesh, PartitionSpec("data"))
    every = np.arange(256).reshape(2, 128)  # both sides of each border among them
    asked = [every, np.array(255), np.array([[64]]), jax.device_put(every[:, 63:65], by_batch)]
    for ids in asked:
        bits = [np.asarray(look_up(x, ids)).view(np.uint8) for x in (table, spread)]
        np.testing.assert_array_equal(*bits)
    dense = table.dense() if quantized else table
    np.testing.assert_array_equal(look_up(spread, every), dense[every])


def test_a_split_vocabulary_is_trained(rng):
    """Of a row asked for alone, and of rows asked for twice, in several parts."""
    table = rng.normal(size=(64, 32)).astype(np.float32)
    place = jax.NamedSharding(aj.make_mesh(tensor=8), PartitionSpec("tensor"))
    gradient = jax.grad(lambda table, ids: jnp.sum(take_rows(table, ids) ** 2))
    gradient = jax.jit(gradient, out_shardings=place)
    for ids in (np.array([[8]]), np.array([[7, 8, 63, 8]])):
        wanted = np.zeros_like(table)
        np.add.at(wanted, ids, 2 * table[ids])
        got = gradient(jax.device_put(table, place), ids)
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.slow
def test_a_database_on_a_mesh(open_db, tiny_model, greedy, rng, on_mesh):
    """Prefill, many decode steps a call, copy on write, a context from disk: as on one device."""
    mesh = aj.make_mesh(data=2, tensor=2)
    model = on_mesh(tiny_model, mesh)
    document = rng.integers(3, 256, 37)
    prompts = [[*document, 5, 6], [*document[:20], 9]]
    expected = [greedy(p, 12) for p in prompts]
    db = open_db(model)
    db.import_context(document)
    for _ in range(2):
        for prompt, want in zip(prompts, expected, strict=True):
            session, rest = db.create_session(prompt)
            assert session.reused[0] > 0
            kv = db.pool.kv
            where = [x.sharding for x in jax.tree.leaves(kv)]
            assert where[0].is_equivalent_to(
                jax.NamedSharding(mesh, PartitionSpec("tensor")), kv.k[0].ndim
            )
            assert [t.id for t in aj.generate(session, rest, max_new_tokens=12)] == want
            # Laid out as before, and donated: nowhere was it gathered or copied.
            assert all(x.is_deleted() for x in jax.tree.leaves(kv))
            for x, sharding in zip(jax.tree.leaves(db.pool.kv), where, strict=True):
                assert x.sharding.is_equivalent_to(sharding, x.ndim)
            session.close()
        db.close()
        db = open_db(model)
    # What a mesh wrote, one device reads.
    db.close()
    single = open_db(tiny_model)
    session, rest = single.create_session(prompts[0])
    assert session.reused == [37]
    assert [t.id for t in aj.generate(session, rest, max_new_tokens=12)] == expected[0]


def test_rules_say_where_each_parameter_lies(tiny_model, on_mesh):
    mesh = aj.make_mesh(data=2, tensor=2)
    params = on_mesh(tiny_model, mesh).params
    specs = {
        ("embed", "embedding"): ("tensor", None),
        ("layers_0", "attention", "q", "kernel"): (None, "tensor", None),
        ("layers_1", "attention", "v", "kernel"): (None, "tensor", None),
        ("layers_1", "attention", "o", "kernel"): ("tensor", None, None),
        ("layers_0", "mlp", "gate", "kernel"): (None, "tensor"),
        ("layers_0", "mlp", "down", "kernel"): ("tensor", None),
        ("lm_head", "kernel"): (None, "tensor"),
        ("norm", "scale"): (None,),
    }
    for path, spec in specs.items():
        leaf = params
        for name in path:
            leaf = leaf[name]
        wanted = jax.NamedSharding(mesh, PartitionSpec(*spec))
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), path
    replicated = on_mesh(tiny_model, mesh, aj.ShardingRules(vocab=None)).params["embed"][
        "embedding"
    ]
    assert replicated.sharding.is_fully_replicated


def test_large_models_fit_the_meshes_they_are_for():
    """No parameter of the published architectures is left without a place, on paper."""
    for name, tensor in (("llama-3-8b", 8), ("llama-3.2-1b", 4)):
        config = LlamaConfig.from_hf(configs.load(name))
        mesh = aj.make_mesh(tensor=tensor)
        axes, shapes = llama.logical_axes(config), llama.abstract_params(config)
        shardings = jax.tree.leaves(tree_shardings(mesh, aj.ShardingRules(), axes, shapes))
        split = sum(
            np.prod(leaf.shape) / np.prod(s.shard_shape(leaf.shape)) == tensor
            for s, leaf in zip(shardings, jax.tree.leaves(shapes), strict=True)
        )
        norms = 2 * config.num_hidden_layers + 1
        assert split == len(shardings) - norms


def test_rules_that_do_not_fit_are_named(open_db, tiny_model, on_mesh):
    mesh = aj.make_mesh(data=2, tensor=4)
    with pytest.raises(
        ConfigError, match=r"'kv_heads' of size 2 .*'tensor' of size 4.*kv_heads=None"
    ):
        on_mesh(tiny_model, mesh)
    rules = aj.ShardingRules(kv_heads=None)
    model = on_mesh(tiny_model, mesh, rules)
    assert open_db(model).pool.kv.k[0].sharding.is_fully_replicated
    with pytest.raises(ConfigError, match=r"two axes .*'embed'.* one mesh axis"):
        on_mesh(tiny_model, mesh, aj.ShardingRules(embed="tensor", kv_heads=None))
    with pytest.raises(ConfigError, match="needs 16 devices, 8 are there"):
        aj.make_mesh(data=4, tensor=4)


def test_an_axis_that_the_mesh_lacks_is_ignored():
    mesh = aj.make_mesh(data=2)
    spec = aj.ShardingRules().spec(mesh, ("batch", "kv_heads", None))
    assert spec == PartitionSpec("data", None, None)


def test_axes_of_a_text():
    assert parse_axes("data=2, tensor=4") == {"data": 2, "tensor": 4}
    for text in ("", "tensor", "tensor=", "tensor=0", "tensor=x", "tensor=2;data=2"):
        with pytest.raises(ConfigError, match="write it as data=2,tensor=4"):
            parse_axes(text)
    with pytest.raises(ConfigError, match=r"no sharding rule uses heads; name its axes .*tensor"):
        parse_axes("heads=2")


def test_memory_of_devices():
    """Of this machine once, however many CPU devices it plays; of GPUs the sum, where all say."""
    assert 1 << 28 < memory_of(None) == memory_of(aj.make_mesh(tensor=8)) < 1 << 50

    def gpus(*limits):
        devices = [
            SimpleNamespace(
                platform="gpu", process_index=0, memory_stats=lambda n=n: n and {"bytes_limit": n}
            )
            for n in limits
        ]
        return SimpleNamespace(devices=np.array(devices))

    assert memory_of(gpus(70, 80)) == 150
    assert memory_of(gpus(70, None)) is None


def test_an_axis_that_nothing_lies_on_is_refused():
    """Its devices would all do the same, in silence."""
    mesh = aj.make_mesh(tp=4)
    with pytest.raises(ConfigError, match=r"tp=4: no sharding rule uses tp.*tensor.*heads='tp'"):
        aj.load("smollm2-135m", mesh=mesh)
    aj.ShardingRules(heads="tp", kv_heads="tp").require_used(mesh.shape)
    aj.ShardingRules().require_used({"tensor": 2, "spare": 1})


def test_a_step_on_a_mesh_whose_axes_are_explicit():
    """As `jax.make_mesh` makes them: in a program of the user's, and outside of one."""
    config = dataclasses.replace(
        LlamaConfig.from_hf(configs.load("llama-tiny")), num_hidden_layers=1
    )
    rules, params = (
        aj.ShardingRules(),
        jax.jit(llama.init_params, static_argnums=0)(config, jax.random.key(0)),
    )
    table = PageTable(jnp.arange(1, 9, dtype=jnp.int32)[None], jnp.zeros(1, jnp.int32))
    tokens, five, full = jnp.arange(5)[None], jnp.full(1, 5, jnp.int32), aj.Plan(aj.Full())

    def logits(params, kv, mesh):
        frame = Frame(config, mesh=mesh)
        return programs.step(params, Memory(kv, table), tokens, five, full, frame)[0]

    in_program = jax.jit(logits, static_argnums=2)
    want = in_program(params, PagedKV.create(config, 9, 4, jnp.float32), None)
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(AxisType.Explicit,))
    shardings = tree_shardings(mesh, rules, llama.logical_axes(config), params)
    placed = jax.device_put(params, shardings)
    kv = PagedKV.create(config, 9, 4, jnp.float32, mesh=mesh)
    for run in (logits, in_program):
        np.testing.assert_allclose(np.asarray(run(placed, kv, mesh)), want, atol=1e-5)
