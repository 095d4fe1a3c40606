"""Requests alone, by `aj.generate`, and what an engine leaves behind."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import alaya_jax as aj


@pytest.fixture
def alone(db: Any) -> Callable[..., tuple[tuple[int, ...], str, str]]:
    """Ids, text and finish reason of a request that runs alone, in a session of its own."""

    def run(request: aj.Request, db: Any = db) -> tuple[tuple[int, ...], str, str]:
        session, rest = db.create_session(request.prompt)
        with session:
            generation = aj.generate(
                session,
                rest,
                max_new_tokens=request.max_new_tokens,
                attention=request.attention,
                prefill=request.prefill,
                sampling=request.sampling,
            )
            for _ in generation:
                pass
        return tuple(generation.ids[0]), generation.text, generation.finish_reason

    return run


def said(result: Any) -> tuple[tuple[int, ...], str, str]:
    """The same of a request that an engine has run."""
    assert [t.id for t in result.tokens][: len(result.ids)] == list(result.ids)
    assert "".join(t.text for t in result.tokens) == result.text, "streamed, and not said"
    return result.ids, result.text, result.finish_reason


@pytest.fixture
def engines(db: Any) -> Iterator[Callable[..., aj.Engine]]:
    """Opens engines; at the end of a test that passed every page is where it belongs."""
    opened = []

    def open(db: Any = db, **settings: Any) -> aj.Engine:
        opened.append(aj.Engine(db, **settings))
        return opened[-1]

    yield open
    for engine in opened:
        engine.close()
        stats = engine.stats()
        assert stats.running == stats.waiting == 0
        assert stats.pages_free + stats.pages_contexts == stats.pages, "pages were lost"
        assert stats.requests == stats.finished + stats.failed
