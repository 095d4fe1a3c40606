"""The script that another Python runs, with torch and transformers played by stand-ins."""

import ast
import contextlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from alaya_jax.checkpoint import transformers_logits


def test_it_imports_nothing_of_this_library():
    tree = ast.parse(Path(transformers_logits.__file__).read_text())
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not any(name.startswith("alaya_jax") for name in names)


class Tensor:
    def __init__(self, values):
        self.values = np.asarray(values)

    def float(self):
        return self

    def numpy(self):
        return self.values


class Model:
    """Logits of a token are the token and its double."""

    def float(self):
        return self

    eval = float

    def __call__(self, batch):
        return SimpleNamespace(logits=[Tensor(np.stack([t, 2 * t], -1)) for t in batch.values])


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_it_writes_the_logits_and_says_ids_and_versions(
    has_tokenizer, tmp_path, monkeypatch, capsys
):
    torch = SimpleNamespace(__version__="9.1", tensor=Tensor, inference_mode=contextlib.nullcontext)

    def pretrained(made):
        return SimpleNamespace(from_pretrained=lambda path, local_files_only: made)

    transformers = SimpleNamespace(
        __version__="5.7",
        AutoModelForCausalLM=pretrained(Model()),
        AutoTokenizer=pretrained(lambda text: {"input_ids": range(len(text))}),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "transformers", transformers)
    if has_tokenizer:
        (tmp_path / "tokenizer.json").write_text("{}")
    request, logits = tmp_path / "request.json", tmp_path / "logits.npy"
    request.write_text(json.dumps({"tokens": [3, 5], "text": "abc"}))
    transformers_logits.main(str(tmp_path), str(request), str(logits))
    np.testing.assert_array_equal(np.load(logits), [[3, 6], [5, 10]])
    assert json.loads(capsys.readouterr().out) == {
        "versions": {"transformers": "5.7", "torch": "9.1"},
        "ids": [0, 1, 2] if has_tokenizer else None,
    }
