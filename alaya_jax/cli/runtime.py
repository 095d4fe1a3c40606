"""What the verbs that run a model share: compiled programs on disk, the document, the answer."""

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alaya_jax.cli.terminal import load_jax, note
from alaya_jax.errors import CacheFullError

if TYPE_CHECKING:
    from datetime import date as Date

    import numpy as np
    from jax.sharding import Mesh

    from alaya_jax.at_rest import StoreDtype
    from alaya_jax.budget import Budget, Indexes
    from alaya_jax.contexts.context import Context
    from alaya_jax.db import DB
    from alaya_jax.model import Model
    from alaya_jax.models.quantized import Scheme
    from alaya_jax.query.plan import Attention
    from alaya_jax.rope import Rope
    from alaya_jax.runtime.sampling.params import Sampling

_LEAST_ROOM = 8192
"""Tokens that any command has room for: one compiled program serves most prompts."""

_SLACK = 64
"""Tokens that the pages of several sequences may leave unused."""


def start_jax() -> None:
    """Has JAX keep compiled programs in the cache directory, so that later commands start sooner.

    What the user has set (JAX_COMPILATION_CACHE_DIR) is left alone.
    """
    load_jax()
    from alaya_jax.compilation import keep_programs

    try:
        keep_programs()
    except OSError as error:
        note(f"Compiled programs are not kept: {error}.")


def cpu_mesh(text: str) -> "Mesh":
    """A mesh of virtual CPU devices, as many as the text asks for: "tensor=8".

    Raises:
      ConfigError: it is not understood, or this process has fewer CPU devices already.
    """
    import contextlib
    import math

    import jax

    from alaya_jax.sharding import make_mesh, parse_axes

    axes = parse_axes(text)
    with contextlib.suppress(RuntimeError):  # JAX runs already: with the devices it has
        jax.config.update("jax_num_cpu_devices", math.prod(axes.values()))
    return make_mesh(devices=jax.devices("cpu"), **axes)


def load_model(name: str, quantize: "Scheme | None" = None, rope: "Rope | None" = None) -> "Model":
    """Loads a model, with a progress bar, ready to run."""
    start_jax()
    from alaya_jax.model import load

    return load(name, quantize=quantize, rope=rope)


def budget_for(
    model: "Model",
    tokens: int,
    memory: str | None = None,
    host_memory: str | None = None,
    indexes: "Indexes" = None,
) -> "Budget":
    """Memory for prompts of so many tokens, unless a size is given; for indexes of them; and for
    what is read in files.

    A power of two, because programs are compiled anew for another size.
    """
    from alaya_jax.budget import Budget

    if memory is not None:
        return Budget(device=memory, host=host_memory, indexes=indexes)
    room = max(_LEAST_ROOM, 1 << (tokens + _SLACK - 1).bit_length())
    pages = room // 16  # of a database's default size
    return Budget.for_pages(model, pages, host=host_memory, indexes=indexes)


def indexes_of(attention: "Attention", memory: str | None) -> "Indexes":
    """What a budget has to have room for beside pages: the index that is asked; or what `Auto` may
    choose, which keeps within a size that is given. None: what it has room for anyway.
    """
    from alaya_jax.index import Graph, Sketch
    from alaya_jax.query.auto import Auto
    from alaya_jax.query.plan import Plan

    if isinstance(attention, Auto) and attention.graph and memory is None:
        return Sketch(), Graph()
    return attention.index if isinstance(attention, Plan) else None


def with_option(error: CacheFullError) -> CacheFullError:
    """The same, naming the command line's option."""
    option = "--host-memory" if "Budget(host=" in str(error) else "--memory"
    return CacheFullError(f"{error} (on the command line: {option} SIZE)")


def open_for_document(
    path: Path,
    model: "Model",
    budget: "Budget",
    document: str,
    date: "Date | None" = None,
    store_dtype: "StoreDtype | None" = None,
) -> tuple["DB", "np.ndarray"]:
    """Opens a database; where it may not be written, for reading.

    Returns:
      the database, and the ids that begin every question about the document.
    """
    from alaya_jax.db import DB

    read_only = (path / "alaya_db.json").exists() and not os.access(path, os.W_OK)
    db = DB(path, model, budget, read_only=read_only, store_dtype=store_dtype)
    return db, db.prompt(document=document, date=date, to_store=True).ids


@dataclasses.dataclass(frozen=True)
class Imported:
    """What `import_document` did.

    Attributes:
      context: the stored document.
      new: it was computed now, and not found in the database.
      seconds: how long that took, storing it included.
    """

    context: "Context"
    new: bool
    seconds: float


def import_document(db: "DB", tokens: "np.ndarray", title: str) -> Imported:
    """Stores a document if it is not there, with a progress bar.

    Raises:
      CacheFullError: it does not fit; the message names the command line's option.
    """
    started = time.perf_counter()
    before = {context.id for context in db.contexts if context.problem is None}
    try:
        context = db.import_context(tokens, title=title)
    except CacheFullError as error:
        raise with_option(error) from error
    return Imported(context, context.id not in before, time.perf_counter() - started)


@dataclasses.dataclass
class Answer:
    """A generated text and what it took.

    Attributes:
      text: without control tokens.
      ids: its tokens.
      finish_reason: "eos", "stop", "length" or "interrupted".
      prompt_tokens: all tokens before the first new one: reused and prefilled.
      reused: of those, taken from a stored context.
      prefilled: of those, computed now.
      first_token_s: from the request to the first new token, reading from disk included; seconds.
      tokens_per_s: of the tokens after the first.
      keys_per_step: mean over steps, layers and heads, while decoding: keys that were there
        ("visible"), scored to choose among them ("scanned"), and used ("attended").
    """

    text: str = ""
    ids: list[int] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    prompt_tokens: int = 0
    reused: int = 0
    prefilled: int = 0
    first_token_s: float = 0.0
    tokens_per_s: float = 0.0
    compile_s: float = 0.0
    keys_per_step: dict[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {**dataclasses.asdict(self), "generated": len(self.ids)}

    def __str__(self) -> str:
        line = (
            f"{self.reused:,} tokens reused, {self.prefilled:,} prefilled; "
            f"first token after {self.first_token_s:.2f} s"
        )
        if self.tokens_per_s:
            line += f", then {self.tokens_per_s:.1f} tokens/s"
        if self.compile_s >= 0.1:
            line += f"; {self.compile_s:.1f} s of it all compiling, once"
        if keys := self.keys_per_step:
            line += f"; keys read per step: {keys['attended']:,.0f} of {keys['visible']:,.0f}"
            if keys["scanned"] > keys["attended"]:
                line += f" ({keys['scanned']:,.0f} scored to choose them)"
        return line


def answer(
    db: "DB",
    prompt: "np.ndarray",
    *,
    attention: "Attention",
    sampling: "Sampling",
    max_new_tokens: int,
    on_text: Callable[[str], None] = lambda text: None,
) -> Answer:
    """Continues a prompt, from its longest stored prefix. Ctrl-C ends it and keeps what is there.

    Args:
      db: where stored contexts are looked for.
      prompt: token ids [n].
      attention: what decoding asks of the keys; prefill is exact.
      sampling: how tokens are chosen.
      max_new_tokens: at most so many.
      on_text: takes new text as it comes.

    Raises:
      RequestError: prompt and answer are longer than the model allows.
      CacheFullError: they do not fit; the message names the command line's option.
    """
    from alaya_jax.generation import generate

    started = time.perf_counter()
    result = Answer(prompt_tokens=len(prompt))
    try:
        session, rest = db.create_session(prompt)
        result.reused, result.prefilled = session.reused[0], len(rest)
        with session:
            opened = time.perf_counter() - started
            run = generate(
                session,
                rest,
                max_new_tokens=max_new_tokens,
                attention=attention,
                sampling=sampling,
                progress=True,
            )
            interrupted = False
            try:
                for token in run:
                    on_text(token.text)
            except KeyboardInterrupt:
                interrupted = True
            result.text, result.ids = "".join(run.text), list(run.ids[0])
            result.finish_reason = "interrupted" if interrupted else run.finish_reason
            result.first_token_s = opened + run.timing.first_token_s
            result.tokens_per_s = run.timing.tokens_per_s
            result.compile_s = run.timing.compile_s
            decode = session.explain().to_dict()["phases"].get("decode")
    except CacheFullError as error:
        raise with_option(error) from error
    if decode:
        result.keys_per_step = {
            name: decode[f"keys_{name}_per_step"] for name in ("visible", "scanned", "attended")
        }
    return result
