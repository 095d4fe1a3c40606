"""Names: no two things have the same encoding (row 15)."""

import dataclasses

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from alaya_jax.storage.identity import digest, encoded

PLAIN = st.recursive(
    st.text(st.characters(), max_size=6) | st.integers(-(2**70), 2**70),
    lambda inner: st.lists(inner, max_size=4).map(tuple),
    max_leaves=8,
)


@given(PLAIN, PLAIN)
@example(("org_1", "2345"), ("org_12345", ""))
@example(("a", ("b",)), ("a", "b"))
@example((), "")
@example(1, "1")
@example((("", ""),), ("", ("",)))
@example("i\x01\x00", ("i", "\x01"))
def test_the_encoding_is_injective(one, other):
    assert (encoded(one) == encoded(other)) == (one == other)


@given(st.lists(st.binary(max_size=5), max_size=4), st.lists(st.binary(max_size=5), max_size=4))
@example([b"ab", b"c"], [b"a", b"bc"])
def test_parts_of_a_digest_are_framed(one, other):
    assert (digest(*one) == digest(*other)) == (one == other)


@given(st.text(max_size=5), st.text(max_size=5), st.text(max_size=5), st.text(max_size=5))
def test_a_header_names_what_changes_numbers_and_nothing_else(kit, a, b, c, d):
    tokens = np.arange(5, dtype=np.int32)
    one = dataclasses.replace(kit.HEADER, fingerprint=a, namespace=b)
    other = dataclasses.replace(kit.HEADER, fingerprint=c, namespace=d)
    assert (one.context_id(tokens) == other.context_id(tokens)) == ((a, b) == (c, d))
    assert (one.family == other.family) == ((a, b) == (c, d))
    titled = dataclasses.replace(one, title=c)
    assert titled.context_id(tokens) == one.context_id(tokens)
    later = dataclasses.replace(one, origin=((3, d),))
    assert later.context_id(tokens) != one.context_id(tokens)
    assert later.family == one.family


def test_tokens_are_named_as_numbers(kit):
    names = {kit.HEADER.context_id(np.array(x, np.int32)) for x in ([1], [1, 0], [0, 1], [256])}
    assert len(names) == 4
    assert kit.HEADER.context_id(np.array([1, 2], np.int64).astype(np.int32)) == (
        kit.HEADER.context_id(np.array([[1, 2], [3, 4]], np.int32)[0])
    )
