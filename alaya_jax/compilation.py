"""Compiling: kept on disk for later processes, counted, timed, and told to whoever waits.

JAX keeps compiled programs where `jax_compilation_cache_dir` says, which is a setting of the whole
process: once it is set, programs of the user's own are kept there as well. So a setting of the
user's is left alone, and `ALAYA_COMPILATION_CACHE=off`, or `aj.load(..., compilation_cache=False)`,
leaves JAX as it is.
"""

import collections
import contextlib
import dataclasses
import hashlib
import os
import platform
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jaxlib.version

from alaya_jax.checkpoint.bundled import cache_directory
from alaya_jax.settings import for_other_threads

VARIABLE = "ALAYA_COMPILATION_CACHE"
"""Environment variable: "off", or the directory that compiled programs are kept in."""

LEAST_SECONDS = 0.05
"""Programs that compile faster are not kept."""

PATIENCE = 2.0
"""Seconds of compiling after which it is told."""

_JAX_LEAST_SECONDS = 1.0
"""What JAX's setting is where nobody has set it."""


def keep_programs(where: bool | str | os.PathLike[str] | None = None) -> Path | None:
    """Has JAX keep compiled programs on disk, so that later processes start sooner.

    Args:
      where: a directory; False: JAX is left as it is; None or True: what the environment variable
        `ALAYA_COMPILATION_CACHE` says, else a directory of this machine and this version of JAX in
        the user's cache folder. What the user has set for JAX (`JAX_COMPILATION_CACHE_DIR`) comes
        first.

    Returns:
      where they are kept, or None.

    Raises:
      OSError: the directory cannot be written.
    """
    asked = os.environ.get(VARIABLE, "") if where is None or where is True else where
    set_already = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    off = asked is False or str(asked).lower() in ("off", "0", "false", "no")
    if off or set_already is not None:
        return Path(set_already) if set_already else None
    place = Path(asked) if asked else default_directory()
    place.mkdir(parents=True, exist_ok=True)
    if not os.access(place, os.W_OK):
        raise PermissionError(13, "not writable", str(place))
    jax.config.update("jax_compilation_cache_dir", str(place))
    least = "jax_persistent_cache_min_compile_time_secs"
    if getattr(jax.config, least) == _JAX_LEAST_SECONDS:
        jax.config.update(least, LEAST_SECONDS)
    return place


def default_directory() -> Path:
    """Of this version of JAX and this kind of CPU: machine code of another CPU may not run here."""
    cpu = hashlib.sha256(_cpu().encode()).hexdigest()[:12]
    return cache_directory() / "xla" / f"jax-{jax.__version__}-{jaxlib.version.__version__}-{cpu}"


def _cpu() -> str:
    """What the CPU can do, as far as the system says."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    told = [line for name in named for line in lines if line.startswith(name)]
    return "\n".join(
        [platform.system(), platform.machine(), platform.processor(), *sorted({*told})]
    )


class Compilations(NamedTuple):
    """Programs that JAX made ready in this process, the user's own included.

    Attributes:
      programs: how many.
      read: of those, read from disk instead of compiled.
    """

    programs: int = 0
    read: int = 0

    def __sub__(self, earlier: "Compilations") -> "Compilations":
        """Since an earlier moment."""
        return Compilations(self.programs - earlier.programs, self.read - earlier.read)


def compilations() -> Compilations:
    """How many programs JAX has compiled, or read from disk, in this process so far."""
    return Compilations(by_name.total(), _read)


by_name: collections.Counter[str] = collections.Counter()
"""How often programs were compiled or read, by the name of what was jitted."""

_read, _lock = 0, threading.Lock()


class _Thread(threading.local):
    """Of one thread: seconds of compiling so far; programs so far; whether a block is timed."""

    seconds, programs, timed = 0.0, 0, False


_thread = _Thread()


def _on_duration(event: str, duration_secs: float, **of: str | int) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        with _lock:
            name = str(of.get("fun_name", ""))
            by_name[name.removeprefix("jit(").removesuffix(")")] += 1
        _thread.programs += 1
        if not _thread.timed:
            _thread.seconds += duration_secs


def _on_event(event: str, **_: str | int) -> None:
    global _read
    if event == "/jax/compilation_cache/cache_hits":
        with _lock:
            _read += 1


jax.monitoring.register_event_duration_secs_listener(_on_duration)
jax.monitoring.register_event_listener(_on_event)


def seconds() -> float:
    """What this thread has spent on compiling so far: tracing, compiling, reading from disk."""
    return _thread.seconds


@dataclasses.dataclass
class Watch:
    """What was compiled since it was made, in this thread.

    Attributes:
      started: of `seconds`.
      programs: of this thread.
    """

    started: float = dataclasses.field(default_factory=seconds)
    programs: int = dataclasses.field(default_factory=lambda: _thread.programs)

    def read(self) -> tuple[float, int]:
        """Seconds, and programs."""
        return _thread.seconds - self.started, _thread.programs - self.programs


class Ahead:
    """Programs that a thread of its own makes ready, one after another, before they are called.

    It begins after `delay` seconds: what comes first is over by then, unless it is compiled too or
    takes long, and would be slowed down by Python's lock.
    """

    def __init__(self, delay: float):
        self._thread = ThreadPoolExecutor(1, "compile ahead")
        self._ended = threading.Event()
        self._starts = time.monotonic() + delay

    def add(self, make: Callable[[], object]) -> "Coming":
        """One that is to be made ready; what `make` raises is left to whoever calls the program."""
        make = for_other_threads(make)

        def run() -> int:
            if self._ended.wait(max(0, self._starts - time.monotonic())):
                return 0
            before = _thread.programs
            with contextlib.suppress(Exception):
                make()
            return _thread.programs - before

        return Coming(self._thread.submit(run))

    def end(self) -> None:
        """What has not begun is left out: it will be called now."""
        self._ended.set()
        self._thread.shutdown(wait=False)


@dataclasses.dataclass(frozen=True)
class Coming:
    """A program that another thread makes ready, or leaves out."""

    programs: Future[int]

    def wait(self) -> None:
        """Until it is; what was compiled counts for the thread that waits."""
        _thread.programs += self.programs.result()


@contextlib.contextmanager
def compiling(what: Callable[[], str], coming: Coming | None = None) -> Iterator[None]:
    """Around the first call of a program: times it if it compiles, and says so when that is long.

    Args:
      what: says what is compiled.
      coming: another thread does it already.
    """
    if _thread.timed:
        yield
        return
    before, started = _thread.programs, time.perf_counter()
    teller = threading.Timer(PATIENCE, lambda: _tell(what()))
    teller.daemon = True
    _thread.timed = True
    teller.start()
    try:
        if coming is not None:
            coming.wait()
        yield
    finally:
        teller.cancel()
        _thread.timed = False
        if _thread.programs > before:
            _thread.seconds += time.perf_counter() - started


def _tell(what: str) -> None:
    """A line on stderr, for terminals and notebooks."""
    from rich.console import Console

    console = Console(stderr=True)
    if jax.process_index() or not (console.is_terminal or console.is_jupyter):
        return
    place = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    kept = f"; kept in {place}" if place else ""
    line = f"compiling {what}, once{kept}"
    line = textwrap.fill(line, console.width, break_long_words=False, break_on_hyphens=False)
    print(line, file=sys.stderr, flush=True)
