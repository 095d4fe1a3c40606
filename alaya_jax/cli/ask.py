"""`alaya ask`: a question about a document."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from alaya_jax.cli import options
from alaya_jax.cli.terminal import Interrupted, note, on_interrupt, report
from alaya_jax.errors import ContextError, GraphError, RequestError
from alaya_jax.units import nbytes


def ask(
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="In quotes.")],
    context: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="The document: a text file in UTF-8; - reads stdin.",
        ),
    ],
    model: options.Model = options.MODEL,
    quantize: options.Quantize = None,
    rope: options.Rope = None,
    attention: options.Attention = "full",
    db: options.Database = None,
    store_dtype: options.StoreDtype = None,
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
    """Answer a question about a document.

    The first question about a document reads it and stores the model's work on it; every later
    question, about the same text with the same model, starts from there. The answer goes to stdout
    as it comes; what it took (tokens reused and computed, seconds, keys read) to stderr.

    Examples:
      alaya ask --context contract.txt "Who is the registered agent?"
      alaya ask --context contract.txt --attention dipr:50 "What is the notice?"
      alaya ask --context contract.txt --model ~/models/Llama-3.2-1B --json "Who?"
      pdftotext paper.pdf - | alaya ask --context - "What is the main result?"

    Document and question become one user's message in the model's chat template. Names of control
    tokens in them (such as <|im_end|>) are plain characters to the model. Where the template prints
    today's date, later questions keep the date of the first, or the document would be read again
    each day; --date names another. Documents are found again by content, not by file name.
    `alaya db ls` lists them; `alaya db rm` gives their space back.
    """
    if str(context) != "-" and not context.is_file():
        what = "a directory" if context.is_dir() else "not there"
        raise typer.BadParameter(f"{context} is {what}; name a text file", param_hint="--context")
    policy = options.attention(attention)
    chosen = options.sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed, stop)
    document = read_document(context)
    path = options.database_path(db)

    from alaya_jax import prompts
    from alaya_jax.cli import runtime

    loaded = runtime.load_model(model, options.value(quantize), options.rope(rope))
    asked = [{"role": "user", "content": question}]
    now = prompts.prompt(prompts.tokenizer_of(loaded), asked, document, date)
    room, indexes = len(now.ids) + max_new_tokens, runtime.indexes_of(policy, memory)
    budget = runtime.budget_for(loaded, room, memory, host_memory, indexes)
    database, start = runtime.open_for_document(
        path, loaded, budget, document, date, options.value(store_dtype)
    )
    with database:
        with on_interrupt("The document was not stored, and nothing half-written is left."):
            imported = runtime.import_document(
                database, start, title="stdin" if str(context) == "-" else context.name
            )
        stored = imported.context
        if imported.new:
            note(
                f"Read {stored.num_tokens:,} tokens of {context} in {imported.seconds:.1f} s; "
                f"stored in {database.path} ({nbytes(stored.nbytes)})."
            )
        prompt = database.prompt(messages=asked, document=document, date=date)
        if prompt.dated != now.dated:
            note(f"The document was read on {prompt.dated}, which the model takes for today.")
        try:
            result = runtime.answer(
                database,
                prompt.ids,
                attention=policy,
                sampling=chosen,
                max_new_tokens=max_new_tokens,
                on_text=(lambda text: None) if json else write,
            )
        except GraphError as error:
            raise GraphError(
                f"{error} (alaya db index {stored.id} --graph --db {database.path}, then ask again)"
            ) from error
        except ContextError as error:
            raise ContextError(
                f"{error} (alaya db rm {stored.id} --db {database.path}, then ask again)"
            ) from error
        if json:
            report(
                {
                    "question": question,
                    "answer": result.text,
                    **result.to_dict(),
                    "attention": repr(policy),
                    "model": loaded.name,
                    "database": database.path,
                    "context": {
                        "id": stored.id,
                        "title": stored.title,
                        "tokens": stored.num_tokens,
                        "bytes": stored.nbytes,
                        "imported": imported.new,
                        "import_s": imported.seconds,
                    },
                }
            )
        else:
            write("\n")
            note(str(result))
        if result.finish_reason == "length":
            note(f"The answer was cut at {max_new_tokens} tokens; --max-new-tokens allows more.")
        if result.finish_reason == "interrupted":
            raise Interrupted("The answer so far is complete on stdout; the document stays stored.")


def write(text: str) -> None:
    """Puts a piece of the answer on stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def read_document(path: Path, what: str = "the document's text") -> str:
    """The text of a file, or of stdin for `-`.

    Raises:
      RequestError: it is empty, or not UTF-8.
      OSError: it cannot be read.
    """
    if str(path) == "-":
        if sys.stdin is None:  # closed, as by <&-
            raise RequestError(f"stdin is closed; pipe {what} in")
        data, name = sys.stdin.buffer.read(), "stdin"
    else:
        data, name = path.read_bytes(), str(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{name} is not text in UTF-8 (byte {error.start} is {data[error.start]:#04x}); "
            f"convert it, such as by: iconv -f latin1 -t utf-8 {path}, or pdftotext for a PDF"
        ) from error
    if not text.strip():
        way_out = f"pipe {what} in" if name == "stdin" else f"give a file with {what}"
        raise RequestError(f"{name} is empty; {way_out}")
    return text
