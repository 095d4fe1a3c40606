"""A tiny random chat model on disk, and the command line in this process."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from typer.testing import CliRunner, Result

from alaya_jax.models.chat import ChatTemplate
from alaya_jax.models.config import LlamaConfig
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
def tiny_model(tmp_path_factory, make_tokenizer) -> Path:
    """A checkpoint directory: two layers, random weights, and never the end of a turn."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    path.mkdir()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=8000,
        eos_token_ids=(1,),
    )
    rng = np.random.default_rng(7)
    e, f = config.hidden_size, config.intermediate_size
    q, kv = 4 * 16, 2 * 16
    shapes = {"model.embed_tokens": (VOCABULARY, e), "lm_head": (VOCABULARY, e)}
    for layer in ("model.layers.0", "model.layers.1"):
        shapes |= {f"{layer}.self_attn.{n}_proj": (kv, e) for n in "kv"}
        shapes |= {f"{layer}.self_attn.q_proj": (q, e), f"{layer}.self_attn.o_proj": (e, q)}
        shapes |= {f"{layer}.mlp.{n}_proj": (f, e) for n in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj": (e, f)}
    tensors = {
        f"{name}.weight": (rng.standard_normal(shape) / np.sqrt(shape[1])).astype(np.float32)
        for name, shape in shapes.items()
    }
    tensors["lm_head.weight"][:2] = 0  # the likeliest token always beats one of logit 0
    norms = [f"model.layers.{i}.{n}_layernorm" for i in (0, 1) for n in ("input", "post_attention")]
    for norm in ["model.norm", *norms]:
        tensors[f"{norm}.weight"] = np.ones(e, np.float32)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config.to_hf()))
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
