"""The indexes of other papers that benchmarks/index_bytes.py compares score as they are defined."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
HEADS, GROUP, QUERIES, N, DIM = 2, 3, 4, 160, 16


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    yield importlib.import_module("key_indexes")
    sys.modules.pop("key_indexes")


@pytest.fixture
def q(rng):
    return rng.standard_normal((HEADS, GROUP, QUERIES, DIM)).astype(np.float32)


@pytest.fixture
def layer(peers, rng):
    k = rng.standard_normal((HEADS, N, DIM)).astype(np.float32)
    frequencies = 100.0 ** -np.linspace(0, 1, DIM // 2)
    return peers.Layer(k, frequencies, rng.random((HEADS, DIM)))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_quest_bounds_every_score_by_its_page(peers, q, layer):
    true = peers.dot(q, layer.k)
    bound = peers.Quest(16).scores(q, layer)
    assert (bound >= true - 1e-5).all()
    # Channel by channel the larger of both ends' products, but for float16.
    page = layer.k[1, 32:48]
    ends = np.maximum(q[1, 2, 3] * page.min(0), q[1, 2, 3] * page.max(0))
    np.testing.assert_allclose(bound[1, 2, 3, 32:48], ends.sum(), rtol=2e-3)
    # Of pages of one key the bound is the score; one more token than whole pages is a page.
    np.testing.assert_allclose(peers.Quest(1).scores(q, layer), true, atol=0.03)
    assert peers.Quest(16).scores(q, peers.Layer(layer.k[:, :33], None, None)).shape[-1] == 33
    assert peers.Quest(16).bytes_a_key(HEADS, N, 64) == 16


def test_landmarks_are_means(peers, q, layer):
    scores = peers.Landmarks(8).scores(q, layer)
    wanted = peers.dot(q, layer.k).reshape(HEADS, GROUP, QUERIES, -1, 8).mean(-1)
    np.testing.assert_allclose(scores[..., ::8], wanted, atol=0.05)
    np.testing.assert_array_equal(scores[..., ::8], scores[..., 7::8])
    assert peers.Landmarks(8).bytes_a_key(HEADS, N, 64) == 16


@pytest.mark.parametrize("bits", [8, 16])
def test_keys_of_low_rank_before_rope_are_restored(peers, q, layer, rng, bits):
    """Of all heads of a layer together; after RoPE they are of full rank."""
    rank, angle = 5, np.outer(np.arange(N), layer.frequencies)
    flat = rng.standard_normal((N, rank)) @ rng.standard_normal((rank, HEADS * DIM))
    before = flat.reshape(N, HEADS, DIM).transpose(1, 0, 2).astype(np.float32)
    turned = peers.turned(before, angle)
    assert np.linalg.matrix_rank(turned[0], tol=1e-2) > rank
    low = peers.Layer(turned, layer.frequencies, None)
    true = peers.dot(q, turned)
    off = peers.LowRank(rank, bits).scores(q, low) - true
    assert np.std(off) < 0.015 * np.std(true)
    less = peers.LowRank(rank - 2, bits).scores(q, low) - true
    assert np.std(less) > 0.1 * np.std(true)


def test_bytes_of_low_rank_and_products(peers):
    # What a context shares: 2 * 27 * 3 * 64 numbers of the basis, 2**8 * 64 of centroids.
    assert peers.LowRank(27, 16).bytes_a_key(3, 8192, 64) == 18 + 2 * 27 * 3 * 64 / 8192 / 3
    assert peers.LowRank(54, 8).bytes_a_key(3, 8192, 64) == 56 / 3 + 2 * 54 * 3 * 64 / 8192 / 3
    assert peers.Product(16, 8).bytes_a_key(3, 8192, 64) == 16 + 4
    assert peers.Product(2, 6).bytes_a_key(3, 8192, 64) == 1.5 + 1


def test_products_are_with_the_centroids_of_parts(peers, q, rng):
    """Of keys whose parts are of few kinds, hardly moved: scores are exact up to these moves."""
    kinds = 4 * rng.standard_normal((HEADS, 4, 2, DIM // 2))
    drawn = rng.integers(4, size=(HEADS, N, 2))
    at = np.arange(HEADS)[:, None, None], drawn, np.arange(2)
    k = kinds[at].reshape(HEADS, N, DIM).astype(np.float32)
    k += 1e-3 * rng.standard_normal(k.shape).astype(np.float32)
    layer, true = peers.Layer(k, None, None), peers.dot(q, k)
    many = peers.Product(2, 4).scores(q, layer)
    np.testing.assert_allclose(many, true, atol=0.1)
    # With one centroid all keys are alike.
    one = peers.Product(2, 0).scores(q, layer)
    np.testing.assert_allclose(one, np.broadcast_to(one[..., :1], one.shape))


def test_k_means_lessens_the_distance(peers, rng):
    x = rng.standard_normal((500, 3)).astype(np.float32)
    far = []
    for rounds in (0, 1, 100):
        centroids, code = peers.k_means(x, 16, rounds)
        distance = ((x[:, None] - centroids) ** 2).sum(-1)
        np.testing.assert_array_equal(code, distance.argmin(-1))
        far.append(distance.min(-1).mean())
    assert far[0] > far[1] > far[2]
    for i in range(16):
        np.testing.assert_allclose(centroids[i], x[code == i].mean(0), atol=1e-4)


@pytest.mark.parametrize(("bits", "size", "off"), [(16, 8, 0.005), (4, 6, 0.6)])
def test_labels_are_the_heaviest_channels(peers, q, layer, bits, size, off):
    labels = peers.Labels(4, bits)
    channels = np.argsort(-layer.weight, axis=-1)[:, :4]
    wanted = np.stack([q[h][..., c] @ layer.k[h][:, c].T for h, c in enumerate(channels)])
    assert 0 < np.abs(labels.scores(q, layer) - wanted).max() < off
    assert labels.bytes_a_key(HEADS, N, DIM) == size


def test_the_weight_of_a_channel_is_that_of_its_products(peers, q, layer):
    weight = peers.weight_of(q, layer.k)
    one = np.abs(q[1, ..., 5, None] * layer.k[1, :, 5]).mean()
    np.testing.assert_allclose(weight[1, 5], one, rtol=1e-5)


def test_indexes_are_named(peers):
    assert peers.named("quest16") == peers.Quest(16)
    assert peers.named("rank54x8") == peers.LowRank(54, 8)
    assert peers.named("pq16x8") == peers.Product(16, 8)
    with pytest.raises(ValueError, match="one of quest, landmarks"):
        peers.named("tree4")


@pytest.mark.usefixtures("peers")
def test_what_has_to_be_read_to_find_a_share():
    module = importlib.import_module("index_bytes")
    critical = np.zeros((3, 10), bool)
    critical[:2, :4] = True
    scores = np.array([np.arange(10, 0, -1), [9, 8, 7, 1, 7, 2, 1, 0, 0, 0], np.arange(10)])
    # Two of four: the best two. Three: those that are as good as the third too. All: as the fourth.
    np.testing.assert_allclose(module.to_find(scores, critical, 0.5), [0.2, 0.2, 0])
    np.testing.assert_allclose(module.to_find(scores, critical, 0.75), [0.3, 0.4, 0])
    np.testing.assert_allclose(module.to_find(scores, critical, 0.99), [0.4, 0.7, 0])
