"""A pass key in a long dull text (arXiv 2305.16300) beside other facts, and values by key in a JSON
object (arXiv 2307.03172): several questions about each text.
"""

import json
import random
import uuid
from collections.abc import Callable

from alaya_jax.errors import RequestError
from alaya_jax.evaluation.tasks.item import Count, Item, too_short
from alaya_jax.evaluation.tasks.ruler import NOISE

_ROOM = 96
"""Tokens for a question and its answer, beside the text."""


def _number(draw: random.Random) -> str:
    return str(draw.randint(10000, 99999))


FACTS: tuple[tuple[str, Callable[[random.Random], str]], ...] = (
    ("pass key", _number),
    ("name of the captain", lambda draw: draw.choice(["Amelia", "Boris", "Clara", "Edgar"])),
    ("price of the ticket", lambda draw: f"{draw.randint(101, 999)} dollars"),
    ("colour of the front door", lambda draw: draw.choice(["orange", "purple", "silver"])),
    ("number of the bus", lambda draw: str(draw.randint(101, 999))),
    ("capital of the island", lambda draw: draw.choice(["Arvel", "Bonmar", "Corvina"])),
)
"""What is hidden in a text, and what its value is drawn from."""


def passkey(count: Count, length: int, questions: int, seed: int) -> list[Item]:
    """A pass key and other such facts in a dull text, evenly spread and in random order.

    Args:
      count: tokens of a text.
      length: tokens of an item and its answer at most.
      questions: facts in the text, at most six, each asked for.
      seed: of the draws.

    Raises:
      RequestError: the length has no room for them, or there are more questions than facts.
    """
    if not 1 <= questions <= len(FACTS):
        raise RequestError(f"passkey: {questions} questions; from 1 to {len(FACTS)}")
    draw = random.Random(seed)
    facts = [(name, value(draw)) for name, value in FACTS[:questions]]
    draw.shuffle(facts)
    shift = draw.random()

    def text(size: int) -> str:
        lines = [NOISE] * size
        for i in reversed(range(questions)):
            name, value = facts[i]
            place = int((i + shift) / questions * size)
            lines.insert(place, f"The {name} is {value}. Remember it.")
        return "There are facts in this text. Remember them.\n\n" + "\n".join(lines) + "\n\n"

    context = _largest(text, count, length, _ROOM, "passkey")
    return [
        Item(
            task="passkey" if name == "pass key" else "fact",
            context=context,
            question=f"What is the {name}?",
            opening=f" The {name} is",
            answers=(value,),
            scorer="all",
            most=12,
            depth=context.index(f"The {name} is") / len(context),
        )
        for name, value in facts
    ]


def key_values(count: Count, length: int, questions: int, seed: int) -> list[Item]:
    """Random identifiers by random identifiers; those asked for are evenly spread.

    Args:
      count: tokens of a text.
      length: tokens of an item and its answer at most.
      questions: about the one object.
      seed: of the draws.

    Raises:
      RequestError: the length has no room for them.
    """

    def pairs(size: int) -> list[tuple[str, str]]:
        draw = random.Random(seed)
        return [
            (str(uuid.UUID(int=draw.getrandbits(128))), str(uuid.UUID(int=draw.getrandbits(128))))
            for _ in range(size)
        ]

    def text(size: int) -> str:
        return f"A JSON object:\n\n{json.dumps(dict(pairs(size)), indent=0)}\n\n"

    context = _largest(text, count, length, 2 * _ROOM, "kv")  # a key is long
    found = pairs(context.count('": "'))
    if questions > len(found):
        raise too_short("kv", length)
    places = [int((i + 0.5) / questions * len(found)) for i in range(questions)]
    return [
        Item(
            task="kv",
            context=context,
            question=f'What is the value of the key "{found[at][0]}"?',
            opening=f' The value of the key "{found[at][0]}" is "',
            answers=(found[at][1],),
            scorer="all",
            most=48,
            depth=context.index(found[at][1]) / len(context),
        )
        for at in places
    ]


def _largest(text: Callable[[int], str], count: Count, length: int, beside: int, task: str) -> str:
    """The longest text that leaves so many tokens beside it: sizes by halving."""
    room = length - beside
    if room < 1 or count(text(1)) > room:
        raise too_short(task, length)
    low, high = 1, 2
    while count(text(high)) <= room:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(text(middle)) <= room else (low, middle)
    return text(low)
