"""Messages and tools as chat templates read them."""

import json
from typing import Any, NamedTuple

from alaya_jax.models.chat import ChatTemplate
from alaya_jax.serve.fields import Body, Refusal, brief

_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")


def taken_messages(body: Body, template: ChatTemplate) -> list[dict[str, Any]]:
    """The `messages` of a request, as a chat template reads them.

    Raises:
      Refusal: one is of another form, not served, or says what the template does not read.
    """
    found = [_message(i, message) for i, message in enumerate(body.take("messages", list, []))]
    for number, message in enumerate(found):
        for key in message.keys() - {"role", "content", "tool_call_id"}:
            if not any(key in source for source in template.sources.values()):
                at = f"messages[{number}].{key}"
                raise Refusal(
                    f"{at}: the model's chat template reads no {key}; say it in the content", at
                )
    return found


class Tools(NamedTuple):
    """Functions that a model may call.

    Attributes:
      shown: as the chat template prints them; none where `tool_choice` asks for none.
      forced: of these, those one of which must be called; none: the model may as well write text.
    """

    shown: list[dict[str, Any]]
    forced: list[dict[str, Any]]

    @property
    def names(self) -> frozenset[str]:
        """Of all that are shown."""
        return frozenset(tool["function"]["name"] for tool in self.shown)


def taken_tools(body: Body) -> Tools:
    """The `tools` of a request, and what `tool_choice` asks of them.

    Raises:
      Refusal: they are of another form.
    """
    tools, choice = body.take("tools", list, []), body.either("tool_choice")
    for tool in tools:
        match tool:
            case {"type": "function", "function": {"name": str()}}:
                continue
        raise Refusal(
            "tools must be a list of {'type': 'function', 'function': {'name': ...}}", "tools"
        )
    match choice:
        case None | "auto":
            return Tools(tools, [])
        case "none":
            return Tools([], [])
        case "required":
            forced = tools
        case {"type": "function", "function": {"name": str(name), **more}, **others} if not (
            more or others
        ):
            forced = [tool for tool in tools if tool["function"]["name"] == name][:1]
        case _:
            raise Refusal(
                f"tool_choice={brief(choice)} is not served; use 'auto', 'none', 'required' or "
                "{'type': 'function', 'function': {'name': ...}}",
                "tool_choice",
            )
    if not forced:
        raise Refusal(
            f"tool_choice={brief(choice)}: there is no such function among the tools", "tool_choice"
        )
    body.take("parallel_tool_calls", bool)  # it is one call, whatever this says
    return Tools(tools, forced)


def _message(number: int, message: Any) -> dict[str, Any]:
    """A message as chat templates read it."""
    at = f"messages[{number}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise Refusal(f"{at} must be an object with a role and mostly a content", at)
    said = {key: value for key, value in message.items() if value not in (None, [])}
    if unknown := sorted(said.keys() - set(_KEYS)):
        raise Refusal(
            f"{at}: {unknown[0]} is not served; use {', '.join(_KEYS)}", f"{at}.{unknown[0]}"
        )
    if said["role"] == "developer":  # the newer name
        said["role"] = "system"
    if isinstance(content := said.get("content"), list):
        said["content"] = "\n".join(_part(at, part) for part in content)
    elif not isinstance(content, str | None):
        raise Refusal(f"{at}.content must be text", f"{at}.content")
    if (calls := said.get("tool_calls")) is not None:
        if not isinstance(calls, list):
            raise Refusal(f"{at}.tool_calls must be a list", f"{at}.tool_calls")
        said["tool_calls"] = [_call(at, call) for call in calls]
    return said


def _part(at: str, part: Any) -> str:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": str(kind)}:
            raise Refusal(
                f"{at}.content: {kind} is not served, this model reads text", f"{at}.content"
            )
    raise Refusal(f"{at}.content: parts must be {{'type': 'text', 'text': ...}}", f"{at}.content")


def _call(at: str, call: Any) -> dict[str, Any]:
    """A call as templates read it: its arguments are an object, not a text of JSON."""
    match call:
        case {"function": {"name": str(name), "arguments": arguments}}:
            try:
                read = json.loads(arguments) if isinstance(arguments, str) else arguments
            except (ValueError, RecursionError) as error:
                raise Refusal(
                    f"{at}.tool_calls: the arguments of {name} are not JSON ({error})",
                    f"{at}.tool_calls",
                ) from error
            return {**call, "function": {**call["function"], "arguments": read}}
    raise Refusal(
        f"{at}.tool_calls must be {{'function': {{'name', 'arguments'}}}}", f"{at}.tool_calls"
    )
