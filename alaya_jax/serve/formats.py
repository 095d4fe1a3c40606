"""What a text must be, as OpenAI's API says it: `response_format`, and calls that are forced."""

import json
import re
from collections.abc import Sequence
from typing import Any

from alaya_jax.errors import RequestError
from alaya_jax.models.chat import ChatTemplate
from alaya_jax.runtime.sampling.constraint import JSON_OPTIONS, Constraint
from alaya_jax.serve.fields import Body, Refusal, brief

_ANY_OBJECT = {"type": "object"}
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


def taken_format(body: Body) -> Constraint | None:
    """The `response_format` of a request; None where that is text.

    Raises:
      Refusal: it is of another form, or asks for what is not supported.
    """
    given = body.take("response_format", dict)
    if given is None:
        return None
    inner = Body(given, "response_format")
    kind, schema = inner.take("type", str), inner.take("json_schema", dict)
    inner.done()
    if kind not in ("text", "json_object", "json_schema"):
        raise Refusal(
            f"response_format: type={brief(kind)} is not served; use text, json_object or "
            "json_schema",
            "response_format",
        )
    if (schema is None) == (kind == "json_schema"):
        raise Refusal(
            "response_format: json_schema={'name': ..., 'schema': {...}} goes with type "
            "'json_schema', and with no other",
            "response_format",
        )
    if kind == "text":
        return None
    return _kept(_ANY_OBJECT if schema is None else _schema(schema), "response_format")


def _schema(given: dict[str, Any]) -> dict[str, Any]:
    """The schema itself. It is kept in full, whether `strict` says so or not."""
    inner = Body(given, "response_format")
    inner.take("name", str)
    inner.take("strict", bool)
    found = inner.take("schema", dict)
    inner.done()
    if found is None:
        raise Refusal("response_format: json_schema has no schema", "response_format")
    return found


def _kept(schema: Any, field: str) -> Constraint:
    try:
        return Constraint(json_schema=schema)
    except RequestError as error:
        raise Refusal(f"{field}: {error}", field) from error


def one_call(tools: Sequence[dict[str, Any]], template: ChatTemplate) -> Constraint:
    """A text that is a call of one of these functions, its arguments of the function's schema.

    The form is one that the model was trained for, as far as its template tells: the name of what
    holds the arguments, and the marks of Qwen's form if it likes. `Calls` reads them all.

    Raises:
      Refusal: a schema is not supported.
    """
    sources = " ".join(template.sources.values())
    quoted = re.compile(r"""\\?["'](arguments|parameters)\\?["']\s*:""")
    named = {found[1] for found in quoted.finditer(sources)}
    key = "parameters" if named == {"parameters"} else "arguments"
    each, rules = [], []
    for i, tool in enumerate(tools):
        function = tool["function"]
        schema = function.get("parameters") or _NO_ARGUMENTS
        _kept(schema, f"tools[{i}]")
        begins = f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "{key}": '
        told = json.dumps({**schema, "x-guidance": JSON_OPTIONS})
        each.append(f"call{i}")
        rules.append(f'call{i}: {json.dumps(begins)} arguments{i} "}}"')
        rules.append(f"arguments{i}: %json {told}")
    call = "(" + " | ".join(each) + ")"
    if "<tool_call>" in sources:
        call = rf'("<tool_call>" "\n")? {call} ("\n" "</tool_call>")?'
    return Constraint(lark="\n".join([f"start: {call}", *rules]))
