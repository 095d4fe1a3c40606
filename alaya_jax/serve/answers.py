"""Results in the words of OpenAI's API."""

import dataclasses
import math
import time
import uuid
from collections.abc import Sequence
from typing import Any

from alaya_jax.engine import Result
from alaya_jax.generation import Token
from alaya_jax.models.tokenizer import Tokenizer
from alaya_jax.serve.protocol import Asked
from alaya_jax.serve.tools import Call, Calls

_LEAST = -9999.0
"""Stands for a log-probability of minus infinity, which JSON has not."""

_REASONS = {"eos": "stop", "stop": "stop", "length": "length", "cancelled": "cancelled"}


class Answers:
    """Says what comes of one request.

    Args:
      asked: the request.
      model: its name.
      tokenizer: None where the model has none; tokens then have no text.
      id: of the request.
    """

    def __init__(self, asked: Asked, model: str, tokenizer: Tokenizer | None, id: str):
        self._asked, self._tokenizer = asked, tokenizer
        self.id = ("chatcmpl-" if asked.chat else "cmpl-") + id
        self._head = {"id": self.id, "created": int(time.time()), "model": model}
        self._said = [_Text(Calls(asked.tools)) for _ in asked.each()]

    def whole(self, results: Sequence[Result]) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [self._choice(i, result) for i, result in enumerate(results)]
        kind = "chat.completion" if self._asked.chat else "text_completion"
        return {
            **self._head,
            "object": kind,
            "choices": choices,
            "usage": self.usage(results),
        }

    def token(self, number: int, token: Token) -> list[dict[str, Any]]:
        """The events of a token."""
        said = self._said[number]
        said.tokens += 1
        text = said.calls.put(token.text)
        logprobs = self._logprobs([token], said)
        said.length += len(token.text)
        events = self._opened(number)
        if text or logprobs is not None:
            events.append(self._event(number, {"content": text}, None, logprobs))
        return events

    def end(self, number: int, result: Result) -> list[dict[str, Any]]:
        """The events at the end of a text."""
        said = self._said[number]
        rest, calls = said.calls.finish()
        events = self._opened(number)
        if rest:
            events.append(self._event(number, {"content": rest}, None))
        if calls:
            said_calls = [{"index": i, **_call(call)} for i, call in enumerate(calls)]
            events.append(self._event(number, {"tool_calls": said_calls}, None))
        reason = "tool_calls" if calls else _REASONS[result.finish_reason]
        return [*events, self._event(number, {}, reason)]

    def _opened(self, number: int) -> list[dict[str, Any]]:
        """The event that says who speaks, the first time."""
        said = self._said[number]
        if said.opened or not self._asked.chat:
            return []
        said.opened = True
        return [self._event(number, {"role": "assistant", "content": ""}, None)]

    def usage_event(self, results: Sequence[Result]) -> dict[str, Any]:
        """The last event, where it is asked for."""
        event = self._event(0, {}, None)
        return {**event, "choices": [], "usage": self.usage(results)}

    def usage(self, results: Sequence[Result]) -> dict[str, Any]:
        """Tokens, and what was read for them. A prompt counts once, however many texts it gets."""
        asked = self._asked
        prompt = sum(len(ids) for ids in asked.prompts)
        new = sum(len(result.ids) for result in results)
        return {
            **_counted(prompt, new),
            "prompt_tokens_details": {
                "cached_tokens": sum(r.cached_tokens for r in results[:: asked.n])
            },
            "attention": asked.plan,
            "keys_read": _mean([r.keys_read for r in results]),
        }

    def _choice(self, number: int, result: Result) -> dict[str, Any]:
        asked, said = self._asked, self._said[number]
        text, tokens = result.text, list(result.tokens)
        reason = _REASONS[result.finish_reason]
        choice: dict[str, Any] = {"index": number}
        if asked.chat:
            content = said.calls.put(text)
            rest, calls = said.calls.finish()
            message: dict[str, Any] = {"role": "assistant", "content": content + rest}
            if calls:
                message |= {
                    "content": message["content"].strip() or None,
                    "tool_calls": [_call(call) for call in calls],
                }
                reason = "tool_calls"
            choice |= {"message": message, "logprobs": self._logprobs(tokens, said)}
        else:
            before: list[Token] = []
            if asked.echo:
                text = asked.echoed[number // asked.n] + text
                before = self._of_prompt(number, result)
            choice |= {"text": text, "logprobs": self._logprobs([*before, *tokens], said)}
        if asked.prompt_logprobs is not None:
            choice["prompt_logprobs"] = self._prompt_logprobs(number, result)
        return {**choice, "finish_reason": reason}

    def _event(
        self, number: int, delta: dict[str, Any], reason: str | None, logprobs: Any = None
    ) -> dict[str, Any]:
        asked = self._asked
        choice: dict[str, Any] = {"index": number}
        if asked.chat:
            choice |= {"delta": delta}
        else:
            choice |= {"text": delta.get("content", "")}
        choice |= {"logprobs": logprobs, "finish_reason": reason}
        event = {
            **self._head,
            "object": "chat.completion.chunk" if asked.chat else "text_completion",
            "choices": [choice],
        }
        if asked.stream is not None and asked.stream.continuous_usage:
            prompt, new = sum(map(len, asked.prompts)), sum(s.tokens for s in self._said)
            event["usage"] = _counted(prompt, new)
        return event

    def _of_prompt(self, number: int, result: Result) -> list[Token]:
        """The tokens of a prompt as those of a text; the first has no log-probability."""
        asked, at = self._asked, number // self._asked.n
        ids = asked.prompts[at].tolist()
        logprobs = result.prompt_logprobs or [None] * len(ids)
        likely = result.prompt_alternatives or [None] * len(ids)
        texts = [""] * len(ids)
        if self._tokenizer is not None:
            # A text that was given has no BOS in it.
            whole = asked.echo and asked.echoed[at] == self._tokenizer.decode(ids)
            stream = self._tokenizer.stream(skip_special_tokens=not whole)
            texts = [stream.put(id) for id in ids]
        return [
            Token(id, text, math.nan if p is None else p, 0, best or ())
            for id, text, p, best in zip(ids, texts, logprobs, likely, strict=True)
        ]

    def _prompt_logprobs(self, number: int, result: Result) -> list[dict[str, Any] | None]:
        """As vLLM says them: by token id, what follows its beginning."""
        most = self._asked.prompt_logprobs
        rows: list[dict[str, Any] | None] = [None]
        for token in self._of_prompt(number, result)[1:]:
            rows.append(
                {
                    str(id): {"logprob": _number(p), "decoded_token": self._named(id)[0]}
                    for id, p in _likely(token, most or 0)
                }
            )
        return rows

    def _logprobs(self, tokens: Sequence[Token], said: "_Text") -> dict[str, Any] | None:
        most = self._asked.logprobs
        if most is None:
            return None
        if self._asked.chat:
            return {"content": [self._chat_logprob(token, most) for token in tokens]}
        offsets, at = [], said.length
        for token in tokens:
            offsets.append(at)
            at += len(token.text)
        top = [
            None
            if math.isnan(token.logprob)
            else {self._named(id)[0]: _number(p) for id, p in reversed(_likely(token, most))}
            for token in tokens
        ]
        return {
            "tokens": [self._named(token.id)[0] for token in tokens],
            "token_logprobs": [_number(token.logprob) for token in tokens],
            "top_logprobs": top,
            "text_offset": offsets,
        }

    def _chat_logprob(self, token: Token, most: int) -> dict[str, Any]:
        said = self._scored(token.id, token.logprob)
        top = token.alternatives[:most]
        return {**said, "top_logprobs": [self._scored(id, p) for id, p in top]}

    def _scored(self, id: int, logprob: float) -> dict[str, Any]:
        name, piece = self._named(id)
        return {"token": name, "logprob": _number(logprob), "bytes": list(piece)}

    def _named(self, id: int) -> tuple[str, bytes]:
        r"""A token's text and bytes; `bytes:\xe2` where they are a part of a character."""
        piece = b"" if self._tokenizer is None else self._tokenizer.piece(id)
        try:
            return piece.decode(), piece
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece), piece


def _counted(prompt: int, new: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
    }


def _mean(numbers: Sequence[float]) -> float | None:
    """Of those that are known."""
    known = [x for x in numbers if not math.isnan(x)]
    return sum(known) / len(known) if known else None


@dataclasses.dataclass
class _Text:
    """How far one text is."""

    calls: Calls
    tokens: int = 0
    length: int = 0
    opened: bool = False


def _likely(token: Token, most: int) -> list[tuple[int, float]]:
    """The token and its likeliest alternatives, best first, the token's own number its own."""
    others = [(id, p) for id, p in token.alternatives[:most] if id != token.id]
    return sorted([(token.id, token.logprob), *others], key=lambda pair: -pair[1])


def _number(logprob: float) -> float | None:
    return None if math.isnan(logprob) else max(logprob, _LEAST)


def _call(call: Call) -> dict[str, Any]:
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }
