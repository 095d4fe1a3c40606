"""Prompts from texts that are not trusted: the model's chat template around them, as token ids.

What a document or a user writes can never become a control token: it is encoded apart from the
template, with `allow_special=False`. For a text without control tokens' names the ids are those of
the template rendered with that text.
"""

import numpy as np

from alaya_jax.errors import TokenizerError
from alaya_jax.model import Model
from alaya_jax.models.tokenizer import Tokenizer

_SLOT = "\ue0a1text\ue0a2"  # private-use characters: no template has them


def tokenizer_of(model: Model) -> Tokenizer:
    """The tokenizer of a model.

    Raises:
        TokenizerError: It has none.
    """
    if model.tokenizer is None:
        raise TokenizerError(
            f"{model.name} has no tokenizer, so it cannot be given text; put tokenizer.json and "
            "tokenizer_config.json of the same model beside its weights"
        )
    return model.tokenizer


def chat_ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Ids of a conversation that begins with `text` as the user's turn; the assistant speaks next.

    Raises:
        TokenizerError: There is no chat template, or it does not print the user's text once.
    """
    if tokenizer.chat is None:
        raise TokenizerError(
            "this model has no chat template; use `alaya generate --raw` to have it continue a text"
        )
    # Templates may strip a message, so the slot stands where the text's first and last letters do.
    core = text.strip()
    start = text.find(core)
    message = {"role": "user", "content": text[:start] + _SLOT + text[start + len(core) :]}
    parts = tokenizer.chat.render([message]).split(_SLOT)
    if len(parts) != 2:
        raise TokenizerError(
            "this model's chat template does not print the user's message exactly once; use "
            "`alaya generate --raw` with a prompt of your own"
        )
    # The template's plain words beside the text are encoded together with it: a tokenizer joins
    # characters up to the next control token.
    controls = [tokenizer.decode([i]) for i in tokenizer.special_ids]
    before, after = parts
    cut = max((at + len(c) for c in controls if (at := before.rfind(c)) >= 0), default=0)
    end = min((at for c in controls if (at := after.find(c)) >= 0), default=len(after))
    pieces = [
        tokenizer.encode(before[:cut], add_special_tokens=False),
        tokenizer.encode(
            before[cut:] + core + after[:end], add_special_tokens=False, allow_special=False
        ),
        tokenizer.encode(after[end:], add_special_tokens=False),
    ]
    return np.concatenate(pieces)


def plain_ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Ids of a text to continue, with what the model expects before one (mostly a BOS)."""
    return tokenizer.encode(text, allow_special=False)


def question_ids(tokenizer: Tokenizer, document: str, question: str) -> np.ndarray:
    """Ids of a question about a document: one user's turn, the document first.

    A model without a chat template is asked in plain text.
    """
    if tokenizer.chat is None:
        return plain_ids(tokenizer, f"{document}\n\nQuestion: {question}\nAnswer:")
    return chat_ids(tokenizer, f"{document}\n\n{question}")


def document_ids(tokenizer: Tokenizer, document: str) -> np.ndarray:
    """The ids that begin every question about a document: what is worth storing."""
    one, other = (question_ids(tokenizer, document, question) for question in ("A", "1"))
    n = min(len(one), len(other))
    differ = one[:n] != other[:n]
    return one[: int(np.argmax(differ)) if differ.any() else n]
