"""Chat templates: messages in, the text a chat model was trained to read out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from alaya_jax.errors import RequestError, TokenizerError

if TYPE_CHECKING:
    from jinja2 import Environment, Template

Message = Mapping[str, Any]


class ChatTemplate:
    """A model's chat template (Jinja), rendered with the variables and filters of Hugging Face.

    Templates come with checkpoints and are therefore run in Jinja's immutable sandbox and are shown
    nothing but plain JSON values.

    Args:
        source: The template, or named templates of which one is called "default". A template named
            "tool_use" is taken when tools are passed.
        special_tokens: Texts the template may print by name, such as `{"bos_token": "<s>"}`.
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
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Renders a conversation.

        The text already holds the control tokens, often a BOS too: encode it with
        `add_special_tokens=False`. What a message says is printed as it is, so a message that
        contains a control token's text will be read as that token.

        Args:
            messages: The turns, oldest first: mappings with a "role", and mostly "content".
            add_generation_prompt: Whether to end with the header of the assistant's next turn.
            tools: JSON schemas of the functions the model may call.
            documents: Documents for templates that know them, as mappings.
            **variables: Anything else the template reads, such as `date_string`.

        Raises:
            RequestError: A message has no role, or an argument is not plain JSON data.
            TokenizerError: The template refuses the conversation, in its own words, or fails, or is
                not valid Jinja; or there are named templates and none is the default.
        """
        from jinja2 import TemplateError

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
        values = {
            **self.special_tokens,
            "messages": _plain("messages", list(map(dict, messages))),
            "tools": _plain("tools", tools),
            "documents": _plain("documents", documents),
            "add_generation_prompt": add_generation_prompt,
            **{name: _plain(name, value) for name, value in variables.items()},
        }
        name = "tool_use" if tools is not None and "tool_use" in self.sources else "default"
        if name not in self.sources:
            raise TokenizerError(
                f"none of the chat templates ({', '.join(self.sources)}) is named 'default'; "
                "name one so in tokenizer_config.json"
            )
        try:
            return _compile(name, self.sources[name]).render(values)
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


class _Refusal(Exception):
    """What a template raises by `raise_exception`."""


def _raise_exception(message: str) -> None:
    raise _Refusal(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


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
    from jinja2 import TemplateSyntaxError

    try:
        return _environment().from_string(source)
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
    environment.globals["strftime_now"] = _strftime_now
    return environment
