"""What the processes of one program do together when they write a checkpoint."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from alaya_jax.errors import AlayaError, CheckpointError

_TEXT = 4096  # bytes of an error's text that the others get


def first_does(action: Callable[[], Any]) -> None:
    """Has the first process do something; the others wait for it, and fail when it fails.

    Raises:
      CheckpointError: in the others, with the text of what the first one raised.
    """
    if jax.process_count() == 1:
        action()
        return
    from jax.experimental import multihost_utils

    said = np.zeros(_TEXT, np.uint8)
    failed: BaseException | None = None
    if jax.process_index() == 0:
        try:
            action()
        except (AlayaError, OSError) as error:
            failed = error
            text = (str(error) or repr(error)).encode()[:_TEXT]
            said[: len(text)] = np.frombuffer(text, np.uint8)
    said = np.asarray(multihost_utils.broadcast_one_to_all(said))
    if failed is not None:
        raise failed
    if said.any():
        text = said.tobytes().rstrip(b"\0").decode(errors="replace")
        raise CheckpointError(f"the first process could not go on: {text}")


def first_says(ask: Callable[[], str]) -> str:
    """A text, at most `_TEXT` bytes, that the first process finds out and tells the others.

    Raises:
      CheckpointError: in the others, with the text of what the first one raised.
    """
    found = [""]

    def answer() -> None:
        found[0] = ask()

    first_does(answer)
    if jax.process_count() == 1:
        return found[0]
    from jax.experimental import multihost_utils

    said = np.zeros(_TEXT, np.uint8)
    text = found[0].encode()
    said[: len(text)] = np.frombuffer(text, np.uint8)
    said = np.asarray(multihost_utils.broadcast_one_to_all(said))
    return said.tobytes().rstrip(b"\0").decode()


def whole(array: jax.Array) -> np.ndarray:
    """All values of an array that may lie on devices of several processes; all must call it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
