"""What a client asks, understood or refused: nothing is accepted and ignored.

A field at null, or at the value that asks for nothing, counts as left out. All others are read, or
refused by name.
"""

import dataclasses
import re
import secrets
from collections.abc import Iterator
from typing import Any

import numpy as np

from alaya_jax import prompts, words
from alaya_jax.contexts.context import Context
from alaya_jax.db import DB
from alaya_jax.errors import RequestError
from alaya_jax.models.rendered import Rendered
from alaya_jax.query.plan import Attention
from alaya_jax.runtime.sampling.constraint import Constraint
from alaya_jax.runtime.sampling.params import Sampling
from alaya_jax.serve.fields import Body, Refusal, kind_of
from alaya_jax.serve.formats import one_call, taken_format
from alaya_jax.serve.messages import Tools, taken_messages, taken_tools

MOST_CHOICES = 128
"""Texts that one request may ask for: prompts times `n`."""
MOST_LOGPROBS = 20
"""Alternatives that may be reported for each token."""


@dataclasses.dataclass(frozen=True)
class Stream:
    """How an answer is streamed.

    Attributes:
      usage: a last event says how many tokens it was.
      continuous_usage: every event does.
    """

    usage: bool = False
    continuous_usage: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """A request for text, understood.

    Attributes:
      chat: of /v1/chat/completions; else of /v1/completions.
      prompts: token ids of each, int32 [n].
      n: texts for each prompt.
      max_new_tokens: at most so many, for each prompt.
      sampling: of the first text of a prompt; the others have the seeds that follow.
      attention: what is asked of the keys, and the words for it.
      stream: None: the answer comes whole.
      logprobs: alternatives to report with each token; None: no log-probabilities.
      echo: the prompt is a part of the text.
      echoed: that text, of each prompt.
      prompt_logprobs: alternatives to report with each token of the prompt; None: none at all.
      tools: names of the functions that the model may call.
      cache_salt: only requests of the same one share what is computed.
      user: whom the client asks for; shown beside the request.
    """

    chat: bool
    prompts: list[np.ndarray]
    n: int
    max_new_tokens: list[int]
    sampling: Sampling
    attention: Attention | None
    plan: str
    stream: Stream | None
    logprobs: int | None
    echo: bool = False
    echoed: tuple[str, ...] = ()
    prompt_logprobs: int | None = None
    tools: frozenset[str] = frozenset()
    cache_salt: str = ""
    user: str = ""

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of the prompt's tokens are asked for."""
        return self.prompt_logprobs is not None or (self.echo and self.logprobs is not None)

    def each(self) -> Iterator[tuple[np.ndarray, int, Sampling]]:
        """Prompt, most new tokens, and sampling of every text, in the order of the choices."""
        for prompt, most in zip(self.prompts, self.max_new_tokens, strict=True):
            for i in range(self.n):
                seed = (self.sampling.seed + i) % 2**32
                yield prompt, most, dataclasses.replace(self.sampling, seed=seed)


@dataclasses.dataclass(frozen=True)
class Served:
    """What requests are understood against.

    Attributes:
      db: the database; its model, tokenizer and chat template.
      name: of the model, as clients say it.
      attention: words for what is asked of the keys where a request says nothing.
    """

    db: DB
    name: str
    attention: str = "full"

    def check_model(self, body: Body) -> None:
        """Refuses another model than the one that is there."""
        asked = body.take("model", str, self.name)
        if asked != self.name:
            raise Refusal(
                f"there is no model {asked!r} here; this server has {self.name!r}",
                "model",
                status=404,
                code="model_not_found",
            )

    def chat(self, data: Any) -> Asked:
        """A request to /v1/chat/completions.

        Raises:
          Refusal: it is not understood, or not served.
          AlayaError: of the chat template, or the tokenizer.
        """
        body = Body(data)
        self.check_model(body)
        salt = body.take("cache_salt", str, "")
        ids, tools = self.conversation(body, salt)
        call = one_call(tools.forced, self.db.model.chat) if tools.forced else None
        wanted, top = body.take("logprobs", bool, False), body.take("top_logprobs", int, 0)
        if top and not wanted:
            raise Refusal("top_logprobs asks for logprobs: true as well", "top_logprobs")
        newer, older = body.take("max_completion_tokens", int), body.take("max_tokens", int)
        if None not in (newer, older) and newer != older:
            raise Refusal(
                f"max_completion_tokens={newer} and max_tokens={older} contradict; give one",
                "max_tokens",
            )
        most = older if newer is None else newer
        if most is not None and most < 1:
            raise Refusal(f"max_tokens={most}: must be at least 1", "max_tokens")
        more = {"chat": True, "tools": tools.names, "cache_salt": salt}
        return self._asked(body, [ids], most, top if wanted else None, call, **more)

    def completion(self, data: Any) -> Asked:
        """A request to /v1/completions. Raises as `chat`."""
        body = Body(data)
        self.check_model(body)
        pairs = self.texts(body)
        most, top = body.take("max_tokens", int, 16), body.take("logprobs", int)
        echo = body.take("echo", bool, False)
        if most < (0 if echo and top is not None else 1):
            raise Refusal(
                f"max_tokens={most}: must be at least 1, or 0 with echo: true and logprobs",
                "max_tokens",
            )
        rows = [ids for _, ids in pairs]
        echoed = tuple(self._text(given, ids) for given, ids in pairs) if echo else ()
        salt = body.take("cache_salt", str, "")
        more = {"chat": False, "echo": echo, "echoed": echoed, "cache_salt": salt}
        return self._asked(body, rows, most, top, **more)

    def _text(self, given: Any, ids: np.ndarray) -> str:
        """What a prompt says."""
        tokenizer = self.db.model.tokenizer
        return (
            given if isinstance(given, str) else "" if tokenizer is None else tokenizer.decode(ids)
        )

    def _asked(
        self,
        body: Body,
        rows: list[np.ndarray],
        most: int | None,
        logprobs: int | None,
        call: Constraint | None = None,
        **more: Any,
    ) -> Asked:
        """What both endpoints take alike; `call`: the text must be one."""
        n = body.take("n", int, 1)
        if not 1 <= n * len(rows) <= MOST_CHOICES:
            raise Refusal(
                f"n={n} for {len(rows)} prompts: this server takes up to {MOST_CHOICES} texts a "
                "request, and at least one; send several",
                "n",
            )
        of_prompt = body.take("prompt_logprobs", int)
        for name, count in (("logprobs", logprobs), ("prompt_logprobs", of_prompt)):
            if count is not None and not 0 <= count <= MOST_LOGPROBS:
                raise Refusal(f"{name}={count}: must be 0 to {MOST_LOGPROBS}", name)
        plan = body.take("attention", str)
        stream = self._stream(body)
        if stream and (of_prompt is not None or more.get("echo")):
            name = "echo" if more.get("echo") else "prompt_logprobs"
            raise Refusal(f"{name} comes with the whole answer: leave out stream", name)
        form = taken_format(body)
        if form is not None and more.get("tools"):
            raise Refusal(
                "response_format and tools: a text of that format calls no function; leave one of "
                "the two out, or say tool_choice: 'none'",
                "response_format",
            )
        sampling = self._sampling(body, logprobs or 0, call or form)
        user = body.take("user", str, "")
        body.done()
        try:
            attention = words.attention(self.attention if plan is None else plan)
        except RequestError as error:
            raise Refusal(str(error), "attention") from error
        room = [self._room(row, most, more["chat"]) for row in rows]
        if sampling.min_tokens > min(room):
            raise Refusal(
                f"min_tokens={sampling.min_tokens}: at most {min(room)} tokens may come",
                "min_tokens",
            )
        return Asked(
            prompts=rows,
            n=n,
            max_new_tokens=room,
            sampling=sampling,
            attention=attention,
            plan=self.attention if plan is None else plan,
            stream=stream,
            logprobs=logprobs,
            prompt_logprobs=of_prompt,
            user=user[:80],
            **more,
        )

    def _room(self, prompt: np.ndarray, most: int | None, chat: bool) -> int:
        """How many new tokens a prompt may get.

        Raises:
          Refusal: fewer than it asks for.
        """
        limit = self.db.model.length_limit
        left = limit - len(prompt)
        if most is None:
            # The last one that is sampled is never fed, so it needs no room.
            left = min(left, self.db.pool.capacity_tokens - len(prompt) + 1)
            most = max(left, 1)
        if limit < len(prompt) + most:
            raise Refusal(
                f"the prompt has {len(prompt):,} tokens and {most:,} new ones may follow; "
                f"{self.name} takes up to {limit:,} in all. Shorten the prompt, or lower "
                "max_tokens",
                "messages" if chat else "prompt",
                code="context_length_exceeded",
            )
        return most

    def _stream(self, body: Body) -> Stream | None:
        wanted = body.take("stream", bool, False)
        options = body.take("stream_options", dict)
        if options is None:
            return Stream() if wanted else None
        if not wanted:
            raise Refusal("stream_options asks for stream: true as well", "stream_options")
        inner = Body(options)
        found = Stream(
            inner.take("include_usage", bool, False),
            inner.take("continuous_usage_stats", bool, False),
        )
        inner.done()
        return found

    def _sampling(self, body: Body, logprobs: int, constraint: Constraint | None) -> Sampling:
        temperature = body.take("temperature", float, 1.0)
        seed = body.take("seed", int)
        stop, top_k = body.either("stop"), body.take("top_k", int, 0)
        asked: dict[str, Any] = {
            "temperature": temperature,
            "top_p": body.take("top_p", float, 1.0),
            "min_p": body.take("min_p", float, 0.0),
            "top_k": 0 if top_k == -1 else top_k,
            "repetition_penalty": body.take("repetition_penalty", float, 1.0),
            "presence_penalty": body.take("presence_penalty", float, 0.0),
            "frequency_penalty": body.take("frequency_penalty", float, 0.0),
            "logit_bias": _bias(body.take("logit_bias", dict, {})),
            "stop": (stop,) if isinstance(stop, str) else () if stop is None else stop,
            "stop_ids": body.take("stop_token_ids", list, []),
            "ignore_eos": body.take("ignore_eos", bool, False),
            "seed": secrets.randbits(32) if seed is None else seed % 2**32,
            "logprobs": logprobs,
            "min_tokens": body.take("min_tokens", int, 0),
            "constraint": constraint,
        }
        try:
            return Sampling(**asked)
        except RequestError as error:
            said = str(error).replace("stop_ids", "stop_token_ids", 1)
            found = re.match(r"sampling: (\w+)=", said)
            raise Refusal(said, found[1] if found else None) from error

    def conversation(self, body: Body, salt: str = "") -> tuple[np.ndarray, Tools]:
        """The token ids of `messages`, and the functions in `tools`.

        Args:
          body: the request.
          salt: with one, nothing is looked up that is stored.

        Raises:
          Refusal: they are of another form.
          AlayaError: of the chat template, or the tokenizer.
        """
        model = self.db.model
        prompts.tokenizer_of(model)
        messages = taken_messages(body, model.chat)
        if not messages:
            raise Refusal("messages must have at least one {'role', 'content'}", "messages")
        document, context = body.take("document", str), body.take("context", str)
        functions, variables = taken_tools(body), body.take("chat_template_kwargs", dict, {})
        tools = functions.shown
        options = {
            "add_generation_prompt": body.take("add_generation_prompt", bool),
            "continue_final_message": body.take("continue_final_message", bool, False),
            "documents": body.take("documents", list),
        }
        given = {"document": document, "context": context, "tools": tools, **options, **variables}
        said = [name for name, value in given.items() if value not in (None, False, [])]
        if said[:1] in (["document"], ["context"]) and len(said) > 1:
            raise Refusal(f"{said[0]} goes with messages alone, not with {said[1]}", said[0])
        if context is not None:
            if salt:
                raise Refusal("context is stored, and cache_salt reads nothing stored", "context")
            return self._behind(context, messages), functions
        if document is not None:
            if salt:
                return prompts.of(model, None, messages, document, None).ids, functions
            return self.db.prompt(messages=messages, document=document).ids, functions
        own = {"messages", "tools", "date", *options}
        if clash := sorted(own & variables.keys()):
            raise Refusal(
                f"chat_template_kwargs: {clash[0]} is a field of the request itself",
                "chat_template_kwargs",
            )
        for name in ("tools", "documents", "add_generation_prompt"):
            if name in said and not model.chat.reads(name):
                raise Refusal(
                    f"{name}: the chat template of {self.name} reads none, so the model would not "
                    "know; say it in a message",
                    name,
                )
        text = model.chat.render(messages, tools=tools or None, **options, **variables)
        return model.check_tokens(model.encode(text)), functions

    def stored(self, id: str) -> Context:
        """The context of an id.

        Raises:
          Refusal: it is not there.
        """
        for context in self.db.contexts:
            if context.id == id:
                return context
        raise Refusal(
            f"there is no context {id!r}; GET /v1/contexts lists them",
            "context",
            status=404,
            code="context_not_found",
        )

    def _behind(self, id: str, messages: list[dict[str, Any]]) -> np.ndarray:
        """The token ids of messages about a document that is stored.

        Raises:
          Refusal: it is not there, or no document.
          AlayaError: of the chat template, or the tokenizer.
        """
        context = self.stored(id)
        document = prompts.document_in(prompts.tokenizer_of(self.db.model), context.tokens)
        if document is not None:
            ids = self.db.prompt(messages=messages, document=document).ids
            if context.shared(ids, exact=False) == context.num_tokens:
                return ids
        raise Refusal(
            f"context {id!r} is not the beginning of these messages: it goes on with messages that "
            "begin with a user's, if it was stored as a document. Send the whole text, which is "
            "found again all the same",
            "context",
        )

    def texts(self, body: Body) -> list[tuple[Any, np.ndarray]]:
        """The texts or token ids in `prompt`, which is one or a list of them, and the ids of each.

        Raises:
          Refusal: it is of another form.
          AlayaError: of the tokenizer.
        """
        prompt = body.either("prompt")
        rendered = body.take("rendered", bool, False)
        special = body.take("add_special_tokens", bool)
        given: Any
        match prompt:
            case str():
                given = [prompt]
            case [int(), *_]:
                given = [prompt]
            case [_, *_]:
                given = prompt
            case _:
                raise Refusal(
                    "prompt must be a text, a list of token ids, or a list of either", "prompt"
                )
        return [(each, self.ids(each, rendered=rendered, special=special)) for each in given]

    def ids(self, text: Any, *, rendered: bool = False, special: bool | None = None) -> np.ndarray:
        """The ids of one prompt.

        Args:
          text: or token ids.
          rendered: control tokens in it are meant, and nothing is added around it.
          special: whether what the model expects around a text, mostly a BOS, is added; default
            True. Where nothing is and the text begins with a control token's name, it is rendered:
            so do lm-eval and others send what they rendered.

        Raises:
          Refusal, AlayaError: as `texts`.
        """
        model = self.db.model
        if isinstance(text, list):
            if not all(type(i) is int for i in text):
                raise Refusal("prompt: token ids must be whole numbers", "prompt")
            if rendered or special is not None:
                name = "rendered" if rendered else "add_special_tokens"
                raise Refusal(f"{name} is about a text, and the prompt is token ids", name)
            return model.check_tokens(text)
        if not isinstance(text, str):
            raise Refusal(f"prompt: {kind_of(text)} is neither text nor token ids", "prompt")
        tokenizer = prompts.tokenizer_of(model)
        name = tokenizer.control_at_start(text)
        if rendered or (name and special is False):
            if special:
                raise Refusal(
                    "add_special_tokens would put a second BOS in front of a rendered prompt",
                    "add_special_tokens",
                )
            return model.check_tokens(tokenizer.encode(Rendered(text)))
        if name:
            raise Refusal(
                f"the prompt begins with {name!r}, a control token's name, and a prompt is plain "
                "text. If a chat template rendered it, add rendered: true or add_special_tokens: "
                "false; if it is about such tokens, send token ids",
                "prompt",
            )
        found = tokenizer.encode(text, allow_special=False, add_special_tokens=special)
        return model.check_tokens(found)


def _bias(bias: dict[str, Any]) -> dict[int, Any]:
    try:
        return {int(token): value for token, value in bias.items()}
    except ValueError as error:
        raise Refusal(f"logit_bias: names must be token ids ({error})", "logit_bias") from error
