"""Parameters from tensors: copies that a CPU need not copy again, and threads that read ahead."""

import threading

import chex
import jax
import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax.checkpoint import save
from alaya_jax.checkpoint.params import _ahead, copy_as


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_copy_is_used_as_it_is(rng, dtype, transposed):
    stored = rng.normal(size=(37, 53)).astype(np.float32)
    view = stored.T if transposed else stored
    copy = copy_as(view, np.dtype(jax.numpy.dtype(dtype)))
    np.testing.assert_array_equal(copy, view.astype(copy.dtype))
    placed = jax.device_put(copy)
    assert placed.unsafe_buffer_pointer() == copy.ctypes.data
    assert copy_as(np.zeros((0, 3), np.float32), copy.dtype).shape == (0, 3)


def test_results_come_in_order_and_few_are_under_way():
    under_way, most, lock = 0, 0, threading.Lock()

    def work(i):
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        with lock:
            under_way -= 1
        return i

    assert list(_ahead(work, range(100))) == list(range(100))
    assert most <= 2


def test_what_one_raises_ends_the_rest():
    done = []

    def work(i):
        if i == 3:
            raise ValueError("the third")
        done.append(i)
        return i

    with pytest.raises(ValueError, match="the third"):
        list(_ahead(work, range(100)))
    assert len(done) < 8


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_threads_place_parameters_where_the_caller_has_its_default(tiny_model, tmp_path, quantize):
    save(tmp_path / "model", tiny_model.config, tiny_model.params, to="hf", progress=False)
    device = jax.local_devices()[3]
    with jax.default_device(device), jax.enable_x64(True):
        model = aj.load(tmp_path / "model", quantize=quantize, progress=False)
    chex.assert_tree_is_on_device(model.params, device=device)
    plain = aj.load(tmp_path / "model", quantize=quantize, progress=False)
    for there, here in zip(
        jax.tree.leaves(model.params), jax.tree.leaves(plain.params), strict=True
    ):
        assert there.dtype == here.dtype
        np.testing.assert_array_equal(there, here)
