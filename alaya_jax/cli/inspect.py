"""`alaya inspect`: what a model or a database is, without loading it."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from alaya_jax.cli import database, options
from alaya_jax.cli.terminal import report, say
from alaya_jax.units import nbytes


def inspect(
    what: Annotated[
        str,
        typer.Argument(metavar="MODEL|DB", help="A model, as --model takes it, or a database."),
    ],
    json: options.Json = False,
) -> None:
    """Show what a model or a database is; no weights are loaded.

    Of a model: architecture, parameters, stored types, RoPE, and the memory its weights and the
    keys and values of each token take. Its files are checked as for loading. Of a database: its
    contexts, their sizes, and what is wrong with them.

    Examples:
      alaya inspect smollm2-135m
      alaya inspect ~/models/Llama-3.1-8B-Instruct --json
      alaya inspect contexts.db
    """
    path = Path(what).expanduser()
    if (path / "alaya_db.json").exists():
        from alaya_jax.storage import PoolStore

        with PoolStore(path, read_only=True) as store:
            data = database.describe(store)
        text = database.table(data)
    else:
        from alaya_jax import checkpoint

        data = {"kind": "model"} | checkpoint.inspect(what)
        text = _table(data)
    if json:
        report(data)
    else:
        say(text)


def _table(data: dict[str, Any]) -> str:
    c, rope, memory = data["config"], data["config"]["rope"], data["bytes"]
    types = sorted(data["parameters_by_stored_type"].items(), key=lambda item: -item[1])
    settings = "".join(f", {name} {value:g}" for name, value in _rope_settings(rope).items())
    tokenizer = data["tokenizer"]
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    rows = {
        "path": f"{data['path']} ({data['format']})",
        "parameters": f"{data['parameters']:,}",
        "stored as": ", ".join(f"{name} {count / data['parameters']:.1%}" for name, count in types)
        + f"; {nbytes(memory['stored'])}",
        "layers": f"{c['num_hidden_layers']}, model dimension {c['hidden_size']}, "
        f"ffn {c['intermediate_size']}",
        "heads": f"{heads}, kv heads {kv_heads} (1 for {heads // kv_heads}), of {c['head_dim']}",
        "vocabulary": f"{c['vocab_size']:,}, embeddings "
        + ("tied" if c["tie_word_embeddings"] else "not tied"),
        "RoPE": f"{rope['rope_type']}, theta {rope['theta']:,.0f}{settings}",
        "context": f"up to {data['max_length']:,} tokens",
        "tokenizer": "none"
        if tokenizer is None
        else f"{tokenizer['vocab_size']:,} ids, "
        + ("with" if tokenizer["chat_template"] else "without")
        + " a chat template",
        "weights": ", ".join(f"{nbytes(n)} in {dtype}" for dtype, n in memory["weights"].items()),
        "KV a token": ", ".join(
            f"{nbytes(n)} in {dtype}" for dtype, n in memory["kv_per_token"].items()
        ),
        "KV in full": ", ".join(
            f"{nbytes(n * data['max_length'])} in {dtype}"
            for dtype, n in memory["kv_per_token"].items()
        ),
        "fingerprint": data["fingerprint"],
    }
    return "\n".join(f"{name:<12} {value}" for name, value in rows.items())


def _rope_settings(rope: dict[str, Any]) -> dict[str, float]:
    """The fields of this RoPE type that are set, beside theta."""
    from alaya_jax.models.config import RopeConfig

    plain = dataclasses.asdict(RopeConfig())
    return {
        name: value
        for name, value in rope.items()
        if name not in ("rope_type", "theta") and value is not None and value != plain[name]
    }
