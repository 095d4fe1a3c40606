"""`alaya generate`: a model continues or answers a prompt."""

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from alaya_jax.cli import options
from alaya_jax.cli.ask import read_document, write
from alaya_jax.cli.terminal import Interrupted, note, report
from alaya_jax.errors import TokenizerError


def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="In quotes; without it, stdin is read."),
    ] = None,
    model: options.Model = options.MODEL,
    quantize: options.Quantize = None,
    rope: options.Rope = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Put the prompt into the model's chat template, or have the model continue it.",
            show_default="--chat if the model has a template",
        ),
    ] = None,
    attention: options.Attention = "full",
    db: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Start from the longest prefix stored in this database."),
    ] = None,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = 0,
    stop: options.Stop = None,
    date: options.Day = None,
    memory: options.Memory = None,
    host_memory: options.HostMemory = None,
    json: options.Json = False,
) -> None:
    """Generate text from a prompt.

    The text goes to stdout as it comes, what it took to stderr. Without a chat template, or with
    --raw, the model goes on with the prompt's own text.

    Examples:
      alaya generate "Name three rivers of Europe."
      alaya generate --raw "The capital of France is" --max-new-tokens 16
      alaya generate --temperature 0.8 --top-p 0.95 --seed 7 "Tell me a story."
      git diff | alaya generate --model ~/models/Llama-3.2-3B-Instruct --json
    """
    policy = options.attention(attention)
    chosen = options.sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed, stop)
    if prompt is None and sys.stdin is not None and sys.stdin.isatty():
        raise typer.BadParameter("give a prompt in quotes, or pipe one in", param_hint="PROMPT")
    text = read_document(Path("-"), "a prompt") if prompt is None else prompt
    if not text:
        raise typer.BadParameter("the prompt is empty; give one in quotes", param_hint="PROMPT")

    from alaya_jax import prompts
    from alaya_jax.cli import runtime
    from alaya_jax.db import DB

    loaded = runtime.load_model(model, options.value(quantize), options.rope(rope))
    tokenizer = prompts.tokenizer_of(loaded)
    as_chat = tokenizer.chat is not None if chat is None else chat
    if as_chat and tokenizer.chat is None:
        raise TokenizerError(
            "this model has no chat template; use --raw to have it continue the text"
        )
    if date is not None and not as_chat:
        raise typer.BadParameter("only a chat template prints it", param_hint="--date")
    if as_chat:
        ids = prompts.prompt(tokenizer, [{"role": "user", "content": text}], date=date).ids
    else:
        ids = tokenizer.encode(text, allow_special=False)
    room, indexes = len(ids) + max_new_tokens, runtime.indexes_of(policy, memory)
    budget = runtime.budget_for(loaded, room, memory, host_memory, indexes)
    with (
        tempfile.TemporaryDirectory(prefix="alaya-") as scratch,
        DB(db or Path(scratch) / "db", loaded, budget, read_only=db is not None) as database,
    ):
        result = runtime.answer(
            database,
            ids,
            attention=policy,
            sampling=chosen,
            max_new_tokens=max_new_tokens,
            on_text=(lambda text: None) if json else write,
        )
    if json:
        report(
            {
                "prompt": text,
                "format": "chat" if as_chat else "raw",
                **result.to_dict(),
                "attention": repr(policy),
                "model": loaded.name,
            }
        )
    else:
        write("\n")
        note(str(result))
    if result.finish_reason == "interrupted":
        raise Interrupted("The text so far is complete on stdout.")
