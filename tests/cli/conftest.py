"""A tiny random chat model on disk, and the command line in this process."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from typer.testing import CliRunner, Result

from alaya_jax.models.chat import ChatTemplate
from alaya_jax.models.tokenizer import Tokenizer

CONTROLS = ("<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 290  # bytes, control tokens and 32 merges


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[[str | None], Tokenizer]:
    """Makes a byte-level BPE that has learnt some joins, with a chat template."""

    def make(template: str | None) -> Tokenizer:
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[AddedToken(text, special=True) for text in CONTROLS],
            show_progress=False,
        )
        lines = [
            "We the People\n\n of the United States: ",
            "user\n\nuser\nassistant\n\nQuestion: Who?",
        ]
        backend.train_from_iterator(lines * 9, trainer)
        chat = None if template is None else ChatTemplate(template)
        return Tokenizer(backend, named_tokens={"eos_token": CONTROLS[1]}, chat=chat)

    return make


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, make_tokenizer, tiny_checkpoint) -> Path:
    """A checkpoint directory: two layers, random weights, and never the end of a turn."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    path.mkdir()
    tiny_checkpoint(path, VOCABULARY, 8000, seed=7, never=2)
    tokenizer = make_tokenizer(TEMPLATE)
    (path / "tokenizer.json").write_text(tokenizer.to_json())
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer.to_config()))
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache directory in place of the user's."""
    place = tmp_path / "cache"
    monkeypatch.setenv("ALAYA_CACHE", str(place))
    return place


@pytest.fixture
def alaya(cache, monkeypatch) -> Callable[..., Result]:
    """Runs a command in this process and checks its exit code."""
    from alaya_jax.cli import app, runtime

    monkeypatch.setattr(runtime, "start_jax", lambda: None)  # jax belongs to all tests

    def run(*arguments: object, code: int = 0, stdin: str | None = None) -> Result:
        texts: Sequence[str] = [str(a) for a in arguments]
        result = CliRunner().invoke(app, texts, input=stdin)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result

    return run
