import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from alaya_jax.errors import KernelError
from alaya_jax.pallas_kernels.dispatch import H100, INTERPRET
from alaya_jax.pallas_kernels.paged_decode import choose, mosaic_gpu, paged_decode

from .paged_decode_cases import KINDS, VARIANTS, Sizes, dtype_of, make, truth


@functools.partial(jax.jit, static_argnames=("implementation", "target"))
def run(arrays, implementation, target=None):
    return paged_decode(**arrays, want_kept=True, implementation=implementation, target=target)


RUNS = {
    "reference": functools.partial(run, implementation="reference"),
    "xla": functools.partial(run, implementation="xla"),
    "xla for a GPU": functools.partial(run, implementation="xla", target=H100),
    "mosaic_gpu": functools.partial(run, implementation="mosaic_gpu", target=INTERPRET),
}


def each(cases, simulated):
    """All cases of each implementation; of the simulator, only some are fast."""
    assert {*simulated} < {*cases}
    return [
        pytest.param(
            name,
            case,
            marks=pytest.mark.slow if name == "mosaic_gpu" and case not in simulated else [],
        )
        for name in RUNS
        for case in cases
    ]


def rounded(arrays, sizes):
    """The arrays in the types of a call, and the same as numpy sees them."""
    typed = {name: jnp.asarray(x, dtype_of(name, sizes)) for name, x in arrays.items()}
    floats = ("q", "k_pages", "v_pages")
    seen = {n: np.asarray(x, np.float32) if n in floats else arrays[n] for n, x in typed.items()}
    return typed, seen


def check(got, expected, exact):
    out, lse, best, kept = expected
    # Weights are rounded to the pages' type before they meet the values; values are about 1.
    np.testing.assert_allclose(got.out, out, atol=1e-5 if exact else 1e-2, rtol=1e-5)
    np.testing.assert_allclose(got.lse, lse, atol=2e-5, rtol=2e-6)
    np.testing.assert_allclose(got.best, best, atol=1e-4, rtol=2e-6)
    np.testing.assert_array_equal(got.kept, kept)


# The simulator multiplies in numpy: padded heads are 0, and 0 * -inf warns there.
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize(("name", "kind"), each(KINDS, ("plain", "threshold", "mask")))
def test_every_kind_of_case(name, kind, rng):
    sizes = Sizes()
    arrays, seen = rounded(make(sizes, kind, rng), sizes)
    check(RUNS[name](arrays), truth(seen, sizes.lists), exact=name in ("reference", "xla"))


@pytest.mark.parametrize(("name", "variant"), each(VARIANTS, ("D 96, Z 32, float16", "int8")))
def test_every_size(name, variant, rng):
    sizes = VARIANTS[variant]
    arrays, seen = rounded(make(sizes, "plain", rng), sizes)
    check(RUNS[name](arrays), truth(seen, sizes.lists), exact=name in ("reference", "xla"))


@pytest.mark.slow
def test_lists_in_one_order_or_another_split_or_not_give_the_same(rng):
    sizes = dataclasses.replace(Sizes(), batch=1, kv_heads=1, lists=1, features=("starts",))
    arrays, seen = rounded(make(sizes, "plain", rng), sizes)
    expected = truth(seen, 1)
    order = rng.permutation(sizes.listed)
    for name in ("page_ids", "starts"):
        arrays[name] = arrays[name][:, :, order]
    for splits, stages in ((1, 2), (3, 4)):
        tuning = mosaic_gpu.Tuning(splits=splits, stages=stages)
        got = jax.jit(functools.partial(tuned, tuning=tuning))(arrays)
        check(got, expected, exact=False)


def tuned(arrays, tuning):
    from alaya_jax.pallas_kernels.paged_decode.keys import Keys

    names = ("page_ids", "count", "starts", "low", "length", "gap_low", "gap_high", "threshold")
    return mosaic_gpu.paged_decode(
        arrays["q"], arrays["k_pages"], arrays["v_pages"],
        Keys(*(arrays.get(name) for name in (*names, "key_mask"))), None, None,
        scale=arrays["q"].shape[-1] ** -0.5, want_kept=True, target=INTERPRET, tuning=tuning,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["xla", "mosaic_gpu"])
def test_runs_inside_a_sharded_program(name, rng):
    """kv heads over two devices, as the engine lays them out.

    The simulator ends its barriers when the first of several devices is done, so there is one;
    `benchmarks/decode_step_aot.py` compiles the kernel for eight.
    """
    devices = 1 if name == "mosaic_gpu" else 2
    sizes = dataclasses.replace(Sizes(), features=("starts",))
    arrays, seen = rounded(make(sizes, "plain", rng), sizes)
    mesh = jax.make_mesh((devices,), ("tensor",), (AxisType.Auto,), devices=jax.devices()[:devices])
    by_head = PartitionSpec(None, "tensor")
    specs = {
        **dict.fromkeys(("q", "page_ids", "count", "starts"), by_head),
        **dict.fromkeys(("k_pages", "v_pages"), PartitionSpec("tensor")),
        "length": PartitionSpec(),
    }
    sharded = jax.shard_map(RUNS[name], mesh=mesh, in_specs=(specs,), out_specs=by_head)
    check(jax.jit(sharded)(arrays), truth(seen, sizes.lists), exact=name == "xla")


def test_what_cannot_run_says_why():
    arrays = {
        n: jax.ShapeDtypeStruct(x.shape, x.dtype)
        for n, x in rounded(make(Sizes(), "plain", np.random.default_rng(0)), Sizes())[0].items()
    }
    assert choose(**arrays, target=H100).implementation == "mosaic_gpu"
    assert choose(**arrays).implementation == "xla"
    assert "needs a Hopper" in str(choose(**arrays))
    cases = {
        "head_dim is 80": {"q": (2, 6, 80), "k_pages": (2, 37, 16, 80), "v_pages": (2, 37, 16, 80)},
        "page size is 8 tokens": {"k_pages": (2, 37, 8, 64), "v_pages": (2, 37, 8, 64)},
    }
    for reason, shapes in cases.items():
        changed = {n: jax.ShapeDtypeStruct(s, jnp.bfloat16) for n, s in shapes.items()}
        changed["key_mask"] = None
        assert reason in str(choose(**{**arrays, **changed}, target=H100))
        with pytest.raises(KernelError, match=reason):
            choose(**{**arrays, **changed}, implementation="mosaic_gpu", target=H100)
    wide = jax.ShapeDtypeStruct((2, 37, 16, 64), jnp.float32)
    assert "float32" in str(choose(**{**arrays, "k_pages": wide, "v_pages": wide}, target=H100))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("q", (2, 5, 64)),
        ("v_pages", (2, 37, 16, 32)),
        ("page_ids", (2, 3, 9)),
        ("count", (2, 1)),
        ("starts", (2, 2, 9)),
        ("length", (3,)),
        ("threshold", (2, 5)),
        ("gap_low", None),
    ],
)
def test_shapes_that_contradict_each_other_are_refused(name, shape):
    arrays = dict(rounded(make(Sizes(), "plain", np.random.default_rng(0)), Sizes())[0])
    arrays[name] = None if shape is None else jax.ShapeDtypeStruct(shape, arrays[name].dtype)
    with pytest.raises(KernelError, match=name if name != "q" else "does not fit"):
        choose(**arrays)


def test_eight_bit_pages_without_scales_are_refused():
    arrays = dict(rounded(make(Sizes(), "plain", np.random.default_rng(0)), Sizes())[0])
    pages = jax.ShapeDtypeStruct(arrays["k_pages"].shape, jnp.int8)
    with pytest.raises(KernelError, match="k_scale"):
        choose(**{**arrays, "k_pages": pages, "v_pages": pages})
