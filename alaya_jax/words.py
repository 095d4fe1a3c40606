"""Plans in a few words, as the command line and the server take them: "recovery:0.95@sketch".

Helps and refusals print what can be said, so jax is imported when something is understood.
"""

from typing import TYPE_CHECKING, Any

from alaya_jax.errors import AlayaError, RequestError

if TYPE_CHECKING:
    from alaya_jax.query.plan import Attention

ATTENTION = (
    "full, window[:SINK,RECENT], topk:K, dipr:BETA, recovery:SHARE, error:SHARE or auto[:SHARE]"
)
INDEXES = "@flat, @sketch, @sketch1, @sketch2, @sketch8, @learnt, @learnt1, @block or @graph"


def attention(text: str) -> "Attention":
    """What such words mean: a query, a plan where an index is named, or `Auto`.

    Raises:
      RequestError: they are not understood.
    """
    from alaya_jax.query import DIPR, TopK
    from alaya_jax.query.plan import Plan

    asked, at, index = text.strip().partition("@")
    kind, _, rest = asked.partition(":")
    try:
        numbers = [float(part) for part in rest.split(",")] if rest else []
        found = _query(kind, numbers)
        if not at:
            return found
        if not isinstance(found, DIPR | TopK):
            raise ValueError(f"{kind} is not looked up in an index")
        return Plan(found, _index(index), by="page" if index == "block" else "key")
    except (ValueError, AlayaError) as error:
        raise RequestError(
            f"{text!r} is no attention policy; use {ATTENTION}, such as dipr:50 ({error})"
        ) from error


def _query(kind: str, numbers: list[float]) -> Any:
    from alaya_jax.query import DIPR, Full, TopK, Window
    from alaya_jax.query.auto import Auto

    match kind, numbers:
        case "full", []:
            return Full()
        case "window", []:
            return Window()
        case "window", [sink, recent]:
            return Window(_whole(sink), _whole(recent))
        case "dipr", [beta]:
            return DIPR(beta=beta)
        case "recovery", [share]:
            return DIPR(recovery=share)
        case "error", [share]:
            return DIPR(error=share)
        case "topk", [k]:
            return TopK(_whole(k))
        case "auto", []:
            return Auto()
        case "auto", [share]:
            return Auto(recovery=share)
        case _:
            raise ValueError("not one of them")


def _index(name: str) -> Any:
    from alaya_jax.index import Block, Flat, Graph, Sketch

    match name:
        case "flat":
            return Flat()
        case "sketch":
            return Sketch()
        case "sketch1" | "sketch2" | "sketch8":
            return Sketch(int(name[-1]))
        case "learnt" | "learnt1":
            return Sketch(1 if name.endswith("1") else 2, "learnt")
        case "block":
            return Block()
        case "graph":
            return Graph()
        case _:
            raise ValueError(f"no index @{name}; use {INDEXES}")


def _whole(number: float) -> int:
    if not number.is_integer():
        raise ValueError(f"{number} is no whole number")
    return int(number)
