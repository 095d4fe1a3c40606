"""A model class for lm-eval: every task of that harness, under any plan.

    python -m alaya_jax.evaluation.lm_eval --tasks arc_easy --batch_size auto
        --model alaya_jax --model_args pretrained=smollm2-135m,attention=recovery:0.95@sketch

It is lm-eval's own command line, which knows one more model. lm-eval finds models by importing the
modules that register them, so `lm_eval --model alaya_jax` alone does not. Needs
`pip install 'alaya_jax[eval]'`.
"""

import contextlib
import sys
import tempfile
import weakref
from typing import Any

from alaya_jax import words
from alaya_jax.budget import Budget
from alaya_jax.db import DB
from alaya_jax.engine import Engine
from alaya_jax.errors import AlayaError, RequestError, TokenizerError
from alaya_jax.evaluation.answering import Answering, AnswerSettings
from alaya_jax.model import load

try:
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError(
        f"lm-eval cannot be imported ({error}); pip install 'alaya_jax[eval]'"
    ) from error


@register_model("alaya_jax")
class AlayaLM(TemplateLM):
    """A Llama through `aj.Engine`, under one plan.

    Texts are encoded as lm-eval's `hf` model does it: control tokens in them are such, since a chat
    template may have written them. Contexts that are too long lose their beginning, with a
    warning.

    Args:
      pretrained: of `aj.load`: a directory, a GGUF file, or a bundled name.
      attention: what an answer's tokens ask of the keys, in the words of `alaya ask --attention`.
      dtype, quantize: of `aj.load`.
      max_length: tokens of prompt and answer at most; None: what the model takes.
      max_gen_toks: tokens of an answer at most, where a task does not say.
      memory: for keys and values, such as "8GiB"; None: enough for two of the longest sequences.
      db: a database whose stored contexts are used; None: an empty one, deleted at the end.
      batch_size: requests at once, `--batch_size` of lm-eval, which says 1 by itself; "auto" is 16.
      max_batch_size: of lm-eval; not used, since memory is shared out as it is needed.
      device: of lm-eval, which says "cuda:0" by itself whatever there is. JAX chooses it, so beside
        that only JAX's own is taken.

    Raises:
      RequestError: a setting is none of these.
    """

    def __init__(  # noqa: PLR0913 - its keywords are its settings
        self,
        pretrained: str = "smollm2-135m",
        attention: str = "full",
        dtype: str | None = None,
        quantize: Any = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        memory: str | None = None,
        db: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        del max_batch_size
        _require_device(device)
        plan = words.attention(attention)
        slots = 16 if str(batch_size).startswith("auto") else int(batch_size)
        self._model = load(pretrained, dtype=dtype, quantize=quantize)
        if self._model.tokenizer is None:
            raise TokenizerError(f"{pretrained} has no tokenizer, and lm-eval's tasks are texts")
        self._tokenizer = self._model.tokenizer
        longest = self._model.length_limit if max_length is None else int(max_length)
        budget = Budget(memory) if memory else Budget.for_pages(self._model, longest // 8 + 64)
        held = contextlib.ExitStack()
        path = db or held.enter_context(tempfile.TemporaryDirectory(prefix="alaya-eval-"))
        database = held.enter_context(DB(path, self._model, budget))
        engine = held.enter_context(Engine(database, slots=slots))
        self.close = weakref.finalize(self, held.close)
        """Ends the engine, and deletes the database if it was made here; at exit at the latest."""
        self._answering = Answering(engine, plan, max_length and int(max_length))
        self._most = int(max_gen_toks)
        self.batch_size = slots

    @property
    def max_length(self) -> int:
        """Tokens of prompt and answer at most."""
        return self._answering.max_length

    @property
    def max_gen_toks(self) -> int:
        """Tokens of an answer at most, where a task does not say."""
        return self._most

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text.

        Raises:
          TokenizerError: the checkpoint names none.
        """
        if not self._model.eos_ids:
            raise TokenizerError(f"{self._model.name} names no token that ends a text")
        return self._model.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What the first token of a text follows: BOS, or the end of another text."""
        bos = self._tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """By which lm-eval keeps prompts apart that it has cached."""
        return f"alaya_jax:{self._model.name}:{self._model.fingerprint}".replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids of a text; a BOS is put in front where the model expects one and none is there."""
        if add_special_tokens is None and string.startswith(self._text(self.prefix_token_id)):
            add_special_tokens = False
        encoded = self._tokenizer.encode(
            str(string), add_special_tokens=add_special_tokens, allow_special=True
        )
        return encoded.tolist()

    def _text(self, token: int) -> str:
        return self._tokenizer.decode([token], skip_special_tokens=False)

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        """Of (texts, ids before, ids) the log-probability, and whether greedy decoding says it."""
        found = self._answering.scores([(before, ids) for _, before, ids in requests])
        for request, one in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request[0], one)
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts."""
        del disable_tqdm
        found = []
        for (text,) in (request.args for request in requests):
            found.append(self._answering.rolling(self.tok_encode(text), self.prefix_token_id))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Answers, each up to a stop string of its task."""
        asked = [request.args for request in requests]
        prompts = [self.tok_encode(text) for text, _ in asked]
        wanted = [AnswerSettings.of(settings, self._most) for _, settings in asked]
        found = self._answering.answers(prompts, wanted, progress=not disable_tqdm)
        for arguments, text in zip(asked, found, strict=True):
            self.cache_hook.add_partial("generate_until", arguments, text)
        return found

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the model's chat template prints it."""
        rendered = self._model.chat.render(
            chat_history,
            add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(rendered)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source, by which lm-eval names it; None where none is asked for.

        Raises:
          RequestError: one of several is asked for by name.
        """
        if not chat_template:
            return None
        if isinstance(chat_template, str):
            raise RequestError(
                f"--apply_chat_template {chat_template}: give no name; the model's own is taken"
            )
        return "\n".join(self._model.chat.sources.values())


def _require_device(device: str | None) -> None:
    import jax

    if device not in (None, "cuda:0", jax.default_backend()):
        raise RequestError(
            f"device={device!r}: JAX runs on {jax.default_backend()} here; leave it out, or choose "
            "with JAX_PLATFORMS"
        )


def main() -> None:
    """lm-eval's command line; what is refused here is one paragraph, and exit code 1."""
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    try:
        cli_evaluate()
    except AlayaError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
