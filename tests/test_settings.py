"""JAX's settings are the user's: whatever they are, everything runs, and says the same."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax.attention import engine
from alaya_jax.cache import PageTable
from alaya_jax.index.memory import LayerMemory
from alaya_jax.settings import own_settings

SETTINGS = {
    "x64": lambda: jax.enable_x64(True),
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "no rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "transfer guard": lambda: jax.transfer_guard("disallow"),
    "debug nans": lambda: jax.debug_nans(True),
}
WINDOW = aj.Window(4, 16)
PLAN = (
    aj.Plan(aj.DIPR(recovery=0.9, window=WINDOW), aj.Sketch(), tail=True),
    aj.Plan(aj.DIPR(error=0.2, window=WINDOW), aj.Sketch()),
)
PROMPT = [int(t) for t in np.random.default_rng(5).integers(3, 120, 90)]


def answered(db):
    """What a context that is read, asked and stored again says: tokens, keys, ids."""
    db.import_context(PROMPT[:80])
    session, rest = db.create_session(PROMPT)
    with session:
        sampling = aj.Sampling(temperature=0.8, top_p=0.9, top_k=20, seed=3)
        run = aj.generate(session, rest, max_new_tokens=4, attention=PLAN, sampling=sampling)
        tokens = [token.id for token in run]
        reads = session.explain().to_dict()["phases"]["decode"]["by_layer"][0]["keys_attended"]
        stored = db.store(session)
    return tokens, reads, stored.num_tokens


@pytest.fixture(scope="module")
def expected(tiny_model, tmp_path_factory):
    budget = aj.Budget(device="2MiB")
    with aj.DB(tmp_path_factory.mktemp("settings") / "db", tiny_model, budget) as db:
        return answered(db)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_of_jax_changes_nothing(name, expected, tiny_model, tmp_path):
    with SETTINGS[name](), aj.DB(tmp_path / "db", tiny_model, aj.Budget(device="2MiB")) as db:
        assert answered(db) == expected


@pytest.mark.parametrize("name", ["x64", "strict promotion", "no rank promotion", "debug nans"])
def test_the_core_in_a_program_of_the_users(name):
    rng = np.random.default_rng(1)
    pool = jnp.asarray(rng.standard_normal((2, 2, 9, 4, 8)), jnp.float32)
    q = jnp.asarray(rng.standard_normal((1, 1, 4, 8)), jnp.float32)
    table = PageTable(jnp.arange(1, 9, dtype=jnp.int32)[None], jnp.full(1, 30, jnp.int32))
    one = jnp.ones(1, jnp.int32)
    plan = aj.Plan(aj.DIPR(recovery=0.8, window=aj.Window(2, 4)))

    def program(q):
        return engine.attend(plan, q, LayerMemory(pool[0], pool[1], table), one)[0]

    want = jax.jit(program)(q)
    with SETTINGS[name]():
        got = jax.jit(program)(q)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_settings_are_the_users_again():
    with contextlib.ExitStack() as held:
        for setting in SETTINGS.values():
            held.enter_context(setting())
        with own_settings():
            assert not jax.config.jax_enable_x64
            assert jax.config.jax_numpy_dtype_promotion == "standard"
        assert jax.config.jax_enable_x64
        assert jax.config.jax_numpy_dtype_promotion == "strict"
        assert jax.config.jax_numpy_rank_promotion == "raise"
