"""Our side of a comparison, through the public API only."""

import time
from pathlib import Path

import alaya_jax as aj
from alaya_jax.checkpoint import locate


def load_settings(weights: str) -> dict[str, str]:
    """What `aj.load` is told to hold these weights: a dtype, or a scheme with float32 around it."""
    if weights in ("float32", "bfloat16"):
        return {"dtype": weights}
    return {"dtype": "float32", "quantize": weights}


class Ours:
    """SmolLM2 (or another GGUF), and a database with room for the largest request.

    Args:
      model: bundled name or path.
      weights: "float32", "bfloat16", or a scheme of `aj.load(quantize=...)`.
      scratch: an empty directory.
      batch: largest number of sequences at once.
      length: longest sequence, tokens.
    """

    def __init__(self, model: str, weights: str, scratch: Path, batch: int, length: int):
        started = time.perf_counter()
        self.gguf = locate(model)
        self.model = aj.load(self.gguf, **load_settings(weights), progress=False)
        # A page of every sequence may be partly used.
        page_size = 16
        pages = batch * (-(-length // page_size) + 2)
        room = pages * page_size * self.model.token_bytes  # for one index after another
        budget = aj.Budget.for_pages(self.model, pages, page_size, indexes=room)
        self.db = aj.DB(scratch / "contexts.db", self.model, budget, page_size=page_size)
        self.facts = {
            "load_s": time.perf_counter() - started,
            "model": repr(self.model),
            "attention": repr(aj.Full()),
            "page_size": page_size,
        }

    def tokenize(self, text: str) -> list[int]:
        return self.model.encode(text).tolist()

    def measure(self, ids: list[list[int]], new_tokens: int) -> dict:
        """Seconds from ids [B,T] to the first token, then of `new_tokens` further greedy steps."""
        tokens: list[list[int]] = [[] for _ in ids]
        sampling = aj.Greedy(ignore_eos=True)
        started = time.perf_counter()
        session, rest = self.db.create_session(ids)
        with session:
            assert [len(row) for row in rest] == [len(row) for row in ids], "something was reused"
            first = 0.0
            stream = aj.generate(session, rest, max_new_tokens=new_tokens + 1, sampling=sampling)
            for token in stream:
                first = first or time.perf_counter()
                tokens[token.sequence].append(token.id)
            finished = time.perf_counter()
        assert all(len(row) == new_tokens + 1 for row in tokens)
        return {"prefill_s": first - started, "decode_s": finished - first, "tokens": tokens}
