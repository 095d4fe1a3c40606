"""The queue: who may go before whom, and how often."""

from alaya_jax.runtime.waiting import Waiting


def test_the_first_may_be_passed_so_often_and_no_more():
    queue = Waiting(passes=2, look=10)
    for name in "abcdef":
        queue.add(name)
    assert queue.candidates() == list("abcdef")
    queue.take("c")
    queue.take("e")
    assert queue.candidates() == ["a"], "passed twice"
    queue.take("a")
    assert queue.candidates() == ["b"], "passed twice too"
    queue.take("b")
    assert queue.candidates() == ["d", "f"]
    queue.take("f")
    assert list(queue) == ["d"]
    assert queue.candidates() == ["d"]


def test_nobody_goes_before_one_further_behind_that_was_passed_so_often():
    queue = Waiting(passes=1, look=10)
    for name in "abc":
        queue.add(name)
    queue.take("c")
    queue.add_first("x")
    assert queue.candidates() == ["x", "a"]
    queue.add("d")
    assert "d" not in queue.candidates()


def test_only_those_that_wait_longest_are_looked_at():
    queue = Waiting(passes=9, look=2)
    for name in "abc":
        queue.add(name)
    assert queue.candidates() == ["a", "b"]
    queue.remove("a")
    assert queue.candidates() == ["b", "c"]
    assert "a" not in queue
    assert len(queue) == 2


def test_who_is_removed_has_passed_nobody():
    queue = Waiting(passes=1, look=10)
    for name in "abc":
        queue.add(name)
    queue.remove("b")
    assert queue.candidates() == ["a", "c"]
