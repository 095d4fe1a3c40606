"""Eight virtual CPU devices for every test; must run before jax starts."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import numpy as np
import pytest


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers that differ by test and are the same in every run of it."""
    return np.random.default_rng(list(request.node.nodeid.encode()))
