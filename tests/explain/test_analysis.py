"""What one token read, put into other forms: arithmetic on figures made by hand."""

import json

import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax.errors import RequestError
from alaya_jax.explain.analysis import Analysis
from alaya_jax.explain.explanation import Explanation
from alaya_jax.query.origin import Origin
from alaya_jax.query.plan import Plan


@pytest.fixture
def analysis():
    """Two layers, two heads over one kv head, at position 5."""
    keys = np.array([[1, 2], [3, 4]])
    shares = np.array([[0.5, 0.75], [1.0, 0.25]])
    at = tuple(tuple(np.arange(n) for n in row) for row in keys)
    return Analysis(
        plans=Plan(aj.Full()),
        sequence=0,
        position=5,
        wanted=0.95,
        seconds=np.array([0.25, 0.5]),
        seconds_full=np.array([1.0, 2.0]),
        attended=keys,
        keys_needed=keys + 1,
        scored=keys + 2,
        read=np.array([[3], [7]]),
        estimated=np.array([[0.5, np.nan], [0.5, 0.5]]),
        recovery=shares,
        error=1 - shares,
        error_estimated=np.array([[0.3, np.nan], [0.0, 0.5]]),
        error_asked=np.array([[np.nan, np.nan], [0.1, 0.5]]),
        beta=shares,
        beta_needed=shares,
        positions=at,
        retrieved=tuple(tuple(x[1:] for x in row) for row in at),
        tokens=np.array([7, 8, 9, 10, 11, 12]),
        decode=lambda ids: f"<{ids[0]}>",
    )


def test_sums_means_and_the_least(analysis):
    told = analysis.to_dict()
    assert json.loads(json.dumps(told)) == told
    assert (told["seconds"], told["seconds_full"]) == (0.75, 3.0)
    assert told["recovery_mean"] == pytest.approx(2.5 / 4)
    assert told["recovery_least"] == 0.25
    assert told["error_violations"] == 1
    assert told["layers"][0]["error_asked"] is None
    assert told["layers"][1]["error_asked"] == [0.1, 0.5]
    assert told["layers"][1]["error_estimated"] == [0.0, 0.5]
    assert told["retrieved"] == [[[], [1]], [[1, 2], [1, 2, 3]]]


def test_a_layer_whose_mass_was_not_estimated_throughout_says_none(analysis):
    assert analysis.layer(0)["mass_estimated"] is None
    assert analysis.layer(1)["mass_estimated"] == [0.5, 0.5]
    assert analysis.layer(0)["keys_visible"] == 6


@pytest.fixture
def explanation(analysis):
    return Explanation([6], [0], [None], [Origin(((4, "TopK"),))], {}, analysis=analysis)


def test_positions_with_and_without_the_window(explanation):
    np.testing.assert_array_equal(explanation.selected(1, 1), [1, 2, 3])
    np.testing.assert_array_equal(explanation.selected(1, 1, window=True), [0, 1, 2, 3])
    assert explanation.selected_text(1, 0) == [(1, "<8>"), (2, "<9>")]
    assert explanation.to_dict()["exact"] == [4]
    assert explanation.to_dict()["origins"] == [[{"from": 4, "plan": "TopK"}]]


@pytest.mark.parametrize(("layer", "head"), [(2, 0), (-1, 0), (0, 2)])
def test_a_layer_or_head_that_is_not_there(explanation, layer, head):
    with pytest.raises(RequestError, match="layers 0 to 1, query heads 0 to 1"):
        explanation.selected(layer, head)


def test_a_figure_that_is_none(explanation):
    with pytest.raises(RequestError, match="use one of"):
        explanation.plot("colour")
