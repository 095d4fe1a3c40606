"""What has to be kept in memory of mapped pages, at least."""

import numpy as np

import alaya_jax as aj
from alaya_jax.runtime.reading import least

WINDOW = aj.Window(8, 24)
PAGE = 2 * 2 * 16 * 16 * 4
"""Bytes in a layer: keys and values, 2 heads, 16 tokens of 16 numbers."""


def need(config, *plans, counts=(14,), **options):
    return least(plans, config, 16, np.float32, counts, **options)


def test_a_plan_that_reads_everything_needs_a_layer(tiny_model):
    config = tiny_model.config
    full, lazy = aj.Plan(aj.Full()), aj.Plan(aj.DIPR(beta=1.0, window=WINDOW), aj.Graph())
    found = need(config, lazy, full)
    assert (found.leaves, found.data, found.plan) == (0, 14 * PAGE, full)
    assert need(config, full, full, counts=(14, 14), together=15).data == 15 * PAGE
    assert need(config, full, full, page_bytes=10).data == 140
    assert found.problem(14 * PAGE) is None
    problem = found.problem(14 * PAGE - 1)
    assert f"{14 * PAGE:,} bytes of mapped pages for all keys and values of a layer" in problem
    assert f"give at least {14 * PAGE:,} bytes (57.3 kB), or ask a plan that reads few" in problem


def test_one_that_reads_few_needs_its_window_and_its_leaves(tiny_model):
    config = tiny_model.config
    sketch = aj.Plan(aj.DIPR(beta=1.0, window=WINDOW), aj.Sketch())
    window = aj.Plan(WINDOW)
    page = sketch.index.page_bytes(config, 16, np.float32)
    found = need(config, sketch, window)
    assert (found.leaves, found.data) == (14 * page, 4 * PAGE), "1 and 2, and one that is cut"
    assert need(config, sketch, sketch).leaves == 2 * 14 * page
    assert need(config, window, window, counts=(14, 3)).data == 7 * PAGE
    assert need(config, window, window, counts=(14, 14), together=5).data == 5 * PAGE
    problem = found.problem(0)
    assert f"for its window in a layer and {14 * page:,} for what its index knows" in problem
    assert problem.endswith("kB)")


def test_a_scan_of_keys_reads_them_all(tiny_model):
    flat = aj.Plan(aj.DIPR(beta=1.0, window=WINDOW), aj.Flat())
    assert need(tiny_model.config, flat, flat).data == 14 * PAGE
