"""Chat templates: messages in, the text a chat model was trained to read out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, datetime
from functools import cache, lru_cache, partial
from typing import TYPE_CHECKING, Any

from alaya_jax.errors import RequestError, TokenizerError
from alaya_jax.models.rendered import Rendered

if TYPE_CHECKING:
    from jinja2 import Environment, Template

Message = Mapping[str, Any]


class ChatTemplate:
    """A model's chat template (Jinja), rendered with the variables and filters of Hugging Face.

    Templates come with checkpoints and are therefore run in Jinja's immutable sandbox and are shown
    nothing but plain JSON values.

    Args:
      source: the template, or named templates of which one is called "default". A template named
        "tool_use" is taken when tools are passed.
      special_tokens: texts the template may print by name, such as `{"bos_token": "<s>"}`.
    """

    def __init__(
        self, source: str | Mapping[str, str], special_tokens: Mapping[str, str] | None = None
    ):
        self.sources = {"default": source} if isinstance(source, str) else dict(source)
        self.special_tokens = dict(special_tokens or {})

    def __repr__(self) -> str:
        return f"ChatTemplate({', '.join(f'{n}: {len(s)} chars' for n, s in self.sources.items())})"

    def render(
        self,
        /,
        messages: Sequence[Message],
        add_generation_prompt: bool | None = None,
        *,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        date: date | None = None,
        **variables: Any,
    ) -> Rendered:
        """Renders a conversation.

        The text holds its control tokens already, often a BOS too, and what encodes it knows that:
        nothing is added, and a control token's name inside a message is plain characters.

        Args:
          messages: the turns, oldest first: mappings with a "role", and mostly "content".
          add_generation_prompt: whether to end with the header of the assistant's next turn;
            default True, unless the final message is to be continued.
          continue_final_message: end inside the last message, for the model to go on with it.
          tools: JSON schemas of the functions the model may call.
          documents: documents for templates that know them, as mappings.
          date: of the conversation, for templates that print one; default now.
          **variables: what else this template reads, such as `enable_thinking`.

        Raises:
          RequestError: a message has no role, an argument is not plain JSON data, or the template
            reads no such variable, or no date.
          TokenizerError: the template refuses the conversation, in its own words, or fails, or is
            not valid Jinja; or there are named templates and none is the default.
        """
        if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
            raise RequestError(
                "messages must be a list of {'role': ..., 'content': ...}, "
                f"not a {type(messages).__name__}"
            )
        for number, message in enumerate(messages):
            if not isinstance(message, Mapping) or "role" not in message:
                raise RequestError(
                    f"message {number} must be a mapping with a 'role' (and 'content'), "
                    f"got {message!r:.80}"
                )
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "render: continue_final_message=True ends inside the last message, and "
                "add_generation_prompt=True behind it; leave one of them out"
            )
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        # Services write `"content": None`; templates print that as "None", and know a missing key.
        said = [{k: v for k, v in message.items() if v is not None} for message in messages]
        turns = _plain("messages", said)
        if continue_final_message:
            _mark_end(turns)
        values = {
            "messages": turns,
            "tools": _plain("tools", tools),
            "documents": _plain("documents", documents),
            "add_generation_prompt": bool(add_generation_prompt),
            **{name: _plain(name, value) for name, value in variables.items()},
        }
        name = "tool_use" if tools is not None and "tool_use" in self.sources else "default"
        if name not in self.sources:
            raise TokenizerError(
                f"none of the chat templates ({', '.join(self.sources)}) is named 'default'; "
                "name one so in tokenizer_config.json"
            )
        read = _read_by(name, self.sources[name])
        if unknown := variables.keys() - read:
            given = {*values, *self.special_tokens, *_environment().globals, "strftime_now"}
            own = sorted(read - given)
            raise RequestError(
                f"render: this chat template reads no {', '.join(sorted(unknown))}; "
                f"beside render's own arguments it reads {', '.join(own) or 'nothing'}"
            )
        if date is not None and "strftime_now" not in read:
            if "date_string" not in read:
                raise RequestError(
                    f"date={date}: this chat template prints no date; leave it out, or say it in a "
                    "message"
                )
            values.setdefault("date_string", date.strftime("%d %b %Y"))
        return self._rendered(name, values, (date or datetime.now()).strftime)

    def reads(self, variable: str) -> bool:
        """Whether any of the templates reads such a variable, such as "tools".

        Raises:
          TokenizerError: one is not valid Jinja.
        """
        return any(variable in _read_by(name, text) for name, text in self.sources.items())

    def at(self, prompt: Rendered, clock: Callable[[str], str]) -> Rendered:
        """A prompt of `render` with what `clock` says for each format of the time it prints."""
        ((printer, values),) = prompt.parts
        assert isinstance(printer, partial)
        return self._rendered(printer.args[0], values, clock)

    def _rendered(self, name: str, values: dict[str, Any], clock: Callable[[str], str]) -> Rendered:
        stamps: list[str] = []

        def recorded(format: str) -> str:
            stamps.append(clock(format))
            return stamps[-1]

        text = self._print(name, recorded, values)
        # Printed again, it is at the same time.
        return Rendered(text, [(partial(self._again, name, tuple(stamps)), values)], stamps)

    def _again(self, name: str, stamps: tuple[str, ...], values: dict[str, Any]) -> str:
        told = iter(stamps)
        return self._print(name, lambda format: next(told, ""), values)

    def _print(self, name: str, clock: Callable[[str], str], values: dict[str, Any]) -> str:
        from jinja2 import TemplateError

        template = _compile(name, self.sources[name])
        try:
            text = template.render({**self.special_tokens, **values, "strftime_now": clock})
        except TokenizerError:
            raise
        except _Refusal as error:
            raise TokenizerError(f"the chat template refuses these messages: {error}") from error
        except TemplateError as error:
            raise TokenizerError(f"the chat template failed: {error}") from error
        except Exception as error:  # a template is foreign code: any operation in it may fail
            raise TokenizerError(
                f"the chat template failed on these messages: {type(error).__name__}: {error}; "
                "check that each message's content has the form this model's template expects"
            ) from error
        return _up_to_mark(text) if any(map(_is_marked, values["messages"][-1:])) else text


_END = "\ue0a1end\ue0a2 "
"""Behind the message to be continued: private-use characters, which no template has."""


def _mark_end(messages: list[dict[str, Any]]) -> None:
    """Puts `_END` behind the last message."""
    last: Any = messages[-1] if messages else {}
    if isinstance(content := last.get("content"), list) and content:
        last = content[-1]
        key = "text"
    else:
        key = "content"
    if not isinstance(last, dict) or not isinstance(last.get(key), str):
        raise RequestError("continue_final_message: the last message has no text to go on with")
    last[key] += _END


def _is_marked(message: dict[str, Any]) -> bool:
    content = message.get("content")
    last = content[-1] if isinstance(content, list) and content else {"text": content}
    return isinstance(last, dict) and str(last.get("text")).endswith(_END)


def _up_to_mark(text: str) -> str:
    at = text.rfind(_END.strip())
    if at < 0:
        raise TokenizerError(
            "continue_final_message: the chat template does not print the last message as it is, "
            "so it cannot be continued"
        )
    # A template that trims what a message says would have trimmed it before the mark too.
    return text[:at] if text.startswith(_END, at) else text[:at].rstrip()


class _Refusal(Exception):
    """What a template raises by `raise_exception`."""


def _raise_exception(message: str) -> None:
    raise _Refusal(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML; models were trained on plain JSON.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _plain(name: str, value: Any) -> Any:
    """A copy of `value` made of JSON types only: a template gets no object with methods to call."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(
            f"{name} must be plain JSON data (text, numbers, lists, mappings): {error}"
        ) from error


@lru_cache(maxsize=32)
def _compile(name: str, source: str) -> Template:
    with _syntax_of(name):
        return _environment().from_string(source)


@lru_cache(maxsize=32)
def _read_by(name: str, source: str) -> frozenset[str]:
    """The variables that a template reads and does not set."""
    from jinja2.meta import find_undeclared_variables

    with _syntax_of(name):
        return frozenset(find_undeclared_variables(_environment().parse(source)))


@contextmanager
def _syntax_of(name: str) -> Iterator[None]:
    from jinja2 import TemplateSyntaxError

    try:
        yield
    except TemplateSyntaxError as error:
        raise TokenizerError(
            f"chat template '{name}' is not valid Jinja: line {error.lineno}: {error.message}"
        ) from error


@cache
def _environment() -> Environment:
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's words for training; here it prints them."""

        tags = {"generation"}  # noqa: RUF012 (Jinja declares it so)

        def parse(self, parser: Parser) -> nodes.Node:
            lineno = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=lineno)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment
