"""A database that shares its contexts with others: what it takes from them and gives to them.

Local work comes first. Whatever a shared store does (it cannot be reached, refuses, or holds
something damaged), a prompt is answered from what is here, at worst by computing it, and what was
stored here stays; a `RemoteWarning` says what was not shared, and what to do. One that failed to
answer is left alone for a minute, so that it does not slow down every prompt.
"""

import time
import warnings
from pathlib import Path

import numpy as np

from alaya_jax.contexts.catalogue import Catalogue
from alaya_jax.contexts.context import Context
from alaya_jax.errors import ContextError, DatabaseError, RemoteError, RemoteWarning
from alaya_jax.progress import progress_bar
from alaya_jax.storage.objects import MovedContext
from alaya_jax.storage.remote import RemoteContexts

REST = 60.0
"""Seconds that a shared store which failed is left alone."""

_PACKAGE = str(Path(__file__).parents[1])


class Sharing:
    """Keeps a catalogue and a shared store in step, a context at a time. Threads may share it.

    Args:
      catalogue: of the contexts here; only those of its model and namespace are shared.
      remote: the contexts there.
    """

    def __init__(self, catalogue: Catalogue, remote: RemoteContexts):
        self._catalogue, self._remote = catalogue, remote
        self._rest_until = 0.0
        self._damaged: set[str] = set()  # ids there, which are not tried again

    def fetch(self, tokens: np.ndarray, *, exact: bool = True) -> None:
        """Takes what others know of a prompt's beginning, where it is more than is known here.

        Args:
          tokens: the prompt, [n].
          exact: see `Catalogue.match`.
        """
        if time.monotonic() < self._rest_until or len(tokens) < 2:
            return
        try:
            while True:
                _, here = self._catalogue.match(tokens, exact=exact)
                if here == len(tokens) - 1:
                    return
                header, without = self._catalogue.header, self._damaged
                moved, there = self._remote.match(header, tokens, exact=exact, without=without)
                if moved is None or min(there, len(tokens) - 1) <= here:
                    return
                try:
                    self._take(moved, there)
                    return
                except ContextError as error:
                    self._damaged.add(moved.id)
                    self._warn(f"context {moved.id} was left out: {error}")
        except RemoteError as error:
            self._rest_until = time.monotonic() + REST
            self._warn(
                f"the prompt was looked up here only: {error}; it is asked again in {REST:.0f} s"
            )
        except DatabaseError as error:
            self._warn(f"what it knows of the prompt was not stored here: {error}")

    def push(self, context: Context) -> None:
        """Gives others a context and its indexes, as far as they do not have them."""
        again = f"push it later (alaya db push {self._remote.where} {context.id})"
        if time.monotonic() < self._rest_until:
            self._warn(f"context {context.id} was stored here only: it has just failed; {again}")
            return
        try:
            with progress_bar("sharing", context.nbytes, "bytes") as advance:
                self._remote.push(self._catalogue.store, context.id, advance=advance)
        except RemoteError as error:
            self._rest_until = time.monotonic() + REST
            self._warn(f"context {context.id} was stored here only: {error}; {again}")
        except ContextError as error:
            self._warn(f"context {context.id} was not shared: {error}")

    def _take(self, moved: MovedContext, length: int) -> None:
        store = self._catalogue.store
        anew = self._catalogue.is_damaged(moved.id)
        nbytes = moved.of_prefix(length).nbytes
        with progress_bar("taking what others computed", nbytes, "bytes") as advance:
            taken = self._remote.pull(store, moved, length, anew=anew, advance=advance)
        self._catalogue.adopt(taken.record)
        if length == moved.num_tokens:
            try:
                self._remote.pull_indexes(store, moved)
            except ContextError as error:
                self._warn(f"an index of context {moved.id} was left out: {error}")

    def _warn(self, what: str) -> None:
        text = f"{self._remote.where}: {what}"
        warnings.warn(text, RemoteWarning, skip_file_prefixes=(_PACKAGE,))  # at the user's line
