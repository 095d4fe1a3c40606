"""`Session.kv`: what is in the cache, against the model run without one."""

import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax.errors import RequestError
from alaya_jax.models import llama


def test_reads_what_the_model_computes(db, tiny_model, rng):
    prompts = [rng.integers(32, 127, n) for n in (37, 20)]
    session, rest = db.create_session(prompts)
    session.prefill(rest)
    expected = []

    def attend(layer, q, k, v, state):
        expected.append((np.asarray(k[0]), np.asarray(v[0])))
        return llama.causal_attend(layer, q, k, v, state)

    for b, prompt in enumerate(prompts):
        expected.clear()
        positions = np.arange(len(prompt))[None]
        llama.forward(tiny_model.params, tiny_model.config, prompt[None], positions, attend)
        for layer, pair in enumerate(expected):
            for ours, theirs in zip(session.kv(layer)[b], pair, strict=True):
                assert ours.dtype == tiny_model.dtype
                assert ours.shape == (2, len(prompt), ours.shape[2])
                np.testing.assert_allclose(ours, theirs.swapaxes(0, 1), rtol=1e-4, atol=1e-4)


def test_one_sequence_and_what_is_refused(db, rng):
    session, rest = db.create_session(rng.integers(32, 127, 20))
    for _ in aj.generate(session, rest, max_new_tokens=3):
        pass
    k, v = session.kv(0)
    assert k.shape == v.shape
    assert k.shape[1] == session.length == 22
    for layer in (-1, 99, "0", 1.0):
        with pytest.raises(RequestError, match=r"the model has layers 0 to"):
            session.kv(layer)
    session.close()
    with pytest.raises(RequestError, match="closed"):
        session.kv(0)
