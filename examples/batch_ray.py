"""Questions about stored documents, many of them, by Ray Data: an engine in each actor.

    pip install "alaya_jax[ray]"
    python examples/batch_ray.py QUESTIONS.jsonl OUT --model PATH --db PATH --actors 2

A line of QUESTIONS.jsonl has "prompt", and anything else, which stays with it. Lines are handed to
actors in blocks; an actor that dies is started again and its block is computed anew. Contexts are
opened read-only, so that any number of actors of a machine share one database.
"""

import json
from typing import Annotated, Any

import numpy as np
import ray
import typer


class Answers:
    """An engine on what Ray gave this actor.

    Args:
      model: name or path.
      db: folder of the database.
      attention: words for a plan.
      most: new tokens of an answer.
    """

    def __init__(self, model: str, db: str, attention: str, most: int):
        import alaya_jax as aj
        from alaya_jax import words

        self._db = aj.DB(db, aj.load(model, progress=False), read_only=True)
        self._engine = aj.Engine(self._db)
        self._most, self._plan = most, words.attention(attention)

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, Any]:
        """Adds `answer`, `finish_reason`, `cached_tokens` and `keys_read` to a block of lines."""
        import alaya_jax as aj

        asked = [aj.Request(str(p), self._most, self._plan) for p in block["prompt"]]
        results = list(self._engine.run(asked, progress=False))
        added = {
            "answer": [r.text for r in results],
            "finish_reason": [r.finish_reason for r in results],
            "cached_tokens": [r.cached_tokens for r in results],
            "keys_read": [r.keys_read for r in results],
        }
        return block | {name: np.asarray(column) for name, column in added.items()}


def main(
    questions: Annotated[str, typer.Argument(help='JSON lines with "prompt".')],
    out: Annotated[str, typer.Argument(help="A folder for JSON lines.")],
    db: Annotated[str, typer.Option(help="The folder of the database.")],
    model: Annotated[str, typer.Option(help="Name or path.")] = "smollm2-135m",
    attention: Annotated[str, typer.Option(help='A plan, as "recovery:0.95".')] = "full",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 64,
    actors: Annotated[int, typer.Option(min=1, help="With an engine each.")] = 1,
    block: Annotated[int, typer.Option(min=1, help="Lines that an actor takes at once.")] = 64,
    cpus: Annotated[float, typer.Option(help="Of each actor.")] = 1,
    gpus: Annotated[float, typer.Option(help="Of each actor.")] = 0,
) -> None:
    """Answers them all."""
    answered = ray.data.read_json(questions, lines=True).map_batches(
        Answers,
        fn_constructor_args=(model, db, attention, max_new_tokens),
        batch_size=block,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=cpus,
        num_gpus=gpus,
    )
    answered.write_json(out)
    print(json.dumps({"questions": answered.count(), "out": out}))


if __name__ == "__main__":
    typer.run(main)
