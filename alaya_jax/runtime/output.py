"""What a sequence says: its ids, the text that they complete, and where that ends."""

import dataclasses
from collections.abc import Iterable

from alaya_jax.errors import TokenizerError
from alaya_jax.model import Model
from alaya_jax.models.tokenizer import Tokenizer, TokenStream
from alaya_jax.runtime.sampling.params import Sampling, StopText


def require_text(model: Model, each: Iterable[Sampling]) -> None:
    """Raises TokenizerError where stop strings are asked for, and the model has no tokenizer."""
    if model.tokenizer is None and any(sampling.stop for sampling in each):
        raise TokenizerError(f"{model.name} has no tokenizer, so stop strings cannot be found")


@dataclasses.dataclass
class Output:
    """What a sequence has said since it was last given tokens: one output, over all calls.

    Attributes:
      ids: token ids, those that end a text too.
      stream, stop: of the text that is being written; None before its first token, and where
        there is no tokenizer.
    """

    ids: list[int] = dataclasses.field(default_factory=list)
    stream: TokenStream | None = None
    stop: StopText = dataclasses.field(default_factory=lambda: StopText(()))

    def copy(self) -> "Output":
        """An independent copy."""
        stream = self.stream and self.stream.copy()
        return Output(list(self.ids), stream, self.stop.going_on(self.stop.stop))

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
            self.stream, self.stop = None, StopText(())
        return text, reason
