"""What is given to be stored is looked at before it is believed; what is refused leaves nothing."""

import numpy as np
import pytest

from alaya_jax.errors import RequestError
from alaya_jax.storage.given import token_ids

WRONG = {
    "fewer layers": (lambda t, kv: (t, kv[:2]), "kv ended after 2 layers; the header says 3"),
    "more layers": (lambda t, kv: (t, kv + kv[:1]), "goes on after the 3 layers"),
    "fewer tokens": (
        lambda t, kv: (t, [(k[:, 1:], v[:, 1:]) for k, v in kv]),
        r"k of layer 0 is float32 \[2, 19, 8\]",
    ),
    "dtype": (
        lambda t, kv: (t, [(k, v.astype(np.float16)) for k, v in kv]),
        "v of layer 0 is float16",
    ),
    "no tokens": (lambda t, kv: (t[:0], kv), r"tokens are int32 \[0\]"),
    "floats": (lambda t, kv: (t * 1.0, kv), r"tokens are float64 \[20\]"),
    "two axes": (lambda t, kv: (t[None], kv), r"tokens are int32 \[1, 20\]"),
    "negative": (lambda t, kv: (t - 5000, kv), "token ids reach from -"),
    "too large": (lambda t, kv: (t.astype(np.int64) + 2**31, kv), "use 0 to 2"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_is_refused_and_leaves_nothing(kit, store, wrong):
    change, message = WRONG[wrong]
    tokens, kv = change(*kit.make(20))
    with pytest.raises(RequestError, match=message):
        store.write(kit.HEADER, tokens, kit.source(kv))
    nothing_is_left(store)


@pytest.mark.parametrize("given", [[(1, 2, 3)] * 3, [5] * 3])
def test_what_is_no_pair_is_refused(kit, store, given):
    with pytest.raises(RequestError, match="layer 0 is no pair"):
        store.write(kit.HEADER, np.arange(20), lambda start: given)
    nothing_is_left(store)


def nothing_is_left(store):
    assert store.list() == []
    for folder in ("segments", "leases", "indexes"):
        assert list((store.path / folder).iterdir()) == []


def test_token_ids_are_whole_numbers():
    assert token_ids([1, 2]).dtype == np.int32
    assert token_ids(np.array([2**31 - 1], np.uint64)).tolist() == [2**31 - 1]
