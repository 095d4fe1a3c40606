"""The fields of a request's JSON: read one by one, and what is left refused by name."""

import json
from collections.abc import Mapping
from typing import Any

from alaya_jax.errors import RequestError

_NOTHING: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "function_call": (),
    "functions": (),
    "guided_json": (),
    "logits_processors": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "prediction": (),
    "priority": (0,),
    "prompt_cache_key": (),
    "reasoning_effort": ("none",),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (False,),
    "store": (False,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields that are not served, and the values of each that ask for nothing."""

_INSTEAD = {
    "best_of": "ask for n choices and take the best by their logprobs",
    "chat_template": "render it yourself and send the text to /v1/completions with rendered=true",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "skip_special_tokens": "control tokens that a model writes are shown",
}


class Refusal(RequestError):
    """An answer that is an error.

    Attributes:
      status: of HTTP.
      param: the field at fault.
      code: for programs, such as "model_not_found".
      headers: more of the answer's headers.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})


class Body:
    """A JSON object whose fields are taken one by one; `done` refuses those that nobody took.

    Args:
      data: the object.
      within: the field that it is in, which errors name too.
    """

    def __init__(self, data: Any, within: str = ""):
        if not isinstance(data, dict):
            raise Refusal(f"the body must be a JSON object, not {kind_of(data)}")
        self._within = within
        self._left = {name: value for name, value in data.items() if value is not None}

    def take(self, name: str, kind: type, default: Any = None, what: str = "") -> Any:
        """A field of a kind (`float` takes whole numbers too), or what it is when left out.

        Raises:
          Refusal: it is of another kind.
        """
        value = self._left.pop(name, None)
        if value is None:
            return default
        if kind is float and type(value) is int:
            try:
                value = float(value)
            except OverflowError as error:
                raise Refusal(f"{name} has {len(str(value)):,} digits", name) from error
        if type(value) is not kind:
            words = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
            words |= {list: "a list", dict: "an object"}
            said = f"{name} must be {what or words[kind]}, not {kind_of(value)}"
            raise self._refusal(said, name)
        return value

    def has(self, name: str) -> bool:
        """Whether a field is there, and not taken yet."""
        return name in self._left

    def either(self, name: str) -> Any:
        """A field of several kinds, or None."""
        return self._left.pop(name, None)

    def done(self) -> None:
        """Refuses what is left and asks for something.

        Raises:
          Refusal: by name.
        """
        for name, value in self._left.items():
            if name not in _NOTHING:
                raise self._refusal(f"{name}: this server has no such field; leave it out", name)
            if not any(type(value) is type(v) and value == v for v in _NOTHING[name]):
                instead = _INSTEAD.get(name, "leave it out")
                raise self._refusal(f"{name}={brief(value)} is not served; {instead}", name)

    def _refusal(self, said: str, name: str) -> Refusal:
        if not self._within:
            return Refusal(said, name)
        return Refusal(f"{self._within}: {said}", self._within)


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return f"the number {value}"
        case str():
            return f"the text {brief(value)}"
        case list():
            return "a list"
        case _:
            return "an object"


def brief(value: Any) -> str:
    """The beginning of a JSON value."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
