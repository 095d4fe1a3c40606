"""What a sequence says: its ids, the text that they complete, and where that ends."""

import dataclasses
from collections.abc import Iterable

from alaya_jax.errors import TokenizerError
from alaya_jax.model import Model
from alaya_jax.models.tokenizer import Tokenizer, TokenStream
from alaya_jax.runtime.sampling.constraint import Allowed
from alaya_jax.runtime.sampling.params import Sampling, StopText


def require_text(model: Model, each: Iterable[Sampling]) -> None:
    """Raises TokenizerError where stop strings are asked for, and the model has no tokenizer."""
    if model.tokenizer is None and any(sampling.stop for sampling in each):
        raise TokenizerError(f"{model.name} has no tokenizer, so stop strings cannot be found")


def allowed(model: Model, sampling: Sampling) -> Allowed | None:
    """Which ids an output may begin with, and then go on with; None: all.

    Raises:
      RequestError: its constraint is not understood, or nothing could end its text.
      TokenizerError: it has a constraint, and the model has no tokenizer.
    """
    if not sampling.is_masked:
        return None
    ends = sampling.end_ids(model.eos_ids)
    asked = sampling.constraint, sampling.min_tokens, ends
    return Allowed(*asked, model.tokenizer, model.config.vocab_size)


@dataclasses.dataclass
class Output:
    """What a sequence has said since it was last given tokens: one output, over all calls.

    Attributes:
      ids: token ids, those that end a text too.
      stream, stop: of the text that is being written; None before its first token, and where
        there is no tokenizer.
      begun: where in `ids` this text begins: a call may go on behind one that has ended.
    """

    ids: list[int] = dataclasses.field(default_factory=list)
    stream: TokenStream | None = None
    stop: StopText = dataclasses.field(default_factory=lambda: StopText(()))
    begun: int = 0
    _asked: tuple[int, tuple[str, ...]] = (0, ())

    def copy(self) -> "Output":
        """An independent copy."""
        stream = self.stream and self.stream.copy()
        stop = self.stop.going_on(self.stop.stop)
        return Output(list(self.ids), stream, stop, self.begun, self._asked)

    def ask(self, sampling: Sampling) -> None:
        """From here on the text ends at these stop strings."""
        self._asked = sampling.min_tokens, sampling.stop
        self.stop = self.stop.going_on(() if sampling.min_tokens else sampling.stop)

    def open(self, tokenizer: Tokenizer | None, vocab_size: int) -> None:
        """Begins a text, where none is being written and there is a tokenizer.

        Args:
          tokenizer: of the model.
          vocab_size: V; ids behind those of the tokenizer stand for no text.
        """
        if self.stream is None and tokenizer is not None:
            self.stream = tokenizer.stream(padded_to=vocab_size)

    def take(self, id: int, *, ends: bool, last: bool) -> tuple[str, str | None]:
        """Takes a token, which is in `ids` already.

        Args:
          id: the token.
          ends: whether it is one of those that end the output.
          last: whether no more may come.

        Returns:
          the text that it completes; and "eos", "stop" (a stop string), "length", or None where the
          output goes on.
        """
        least, strings = self._asked
        if strings and not self.stop.stop and len(self.ids) - self.begun >= least:
            self.stop = self.stop.going_on(strings)
        stream, stop = self.stream, self.stop
        text, reason = "", None
        if ends:
            reason = "eos"
            if stream is not None:
                text = stop.put(stream.flush()) + stop.flush()
        else:
            if stream is not None:
                text = stop.put(stream.put(id))
            if stop.stopped:
                reason = "stop"
            elif last:
                # What may begin a stop string is said. Half a character waits for its other half.
                reason = "length"
                text += stop.flush()
        if reason in ("eos", "stop"):  # whatever follows is another text
            self.stream, self.stop, self.begun = None, StopText(()), len(self.ids)
        return text, reason
