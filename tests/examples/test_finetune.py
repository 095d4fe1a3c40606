"""Fine-tuning: the loss falls, on any mesh, and a run that was killed ends in the same bits."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from alaya_jax import checkpoint

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "finetune.py"
CONFIG, TEXT = ROOT / "configs" / "llama-tiny.json", ROOT / "tests" / "data" / "declaration.txt"
SMALL = {"--steps": 8, "--every": 3, "--batch": 8, "--length": 32, "--learning-rate": 1e-2}
KINDS = {
    "full": {"--lora-rank": 0, "--mesh": "data=4,tensor=2"},
    "lora": {"--lora-rank": 4, "--learning-rate": 3e-2},
}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("finetune", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["finetune"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def finetune(script):
    def run(model, out, options, *flags, code=0, text=TEXT):
        arguments = command(model, out, options, *flags, text=text)
        result = CliRunner().invoke(script.app, [*arguments, "--json"])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return json.loads(result.stdout) if code == 0 else result.stderr

    return run


def command(model, out, options, *flags, text=TEXT):
    pairs = [str(part) for pair in (SMALL | options).items() for part in pair]
    return [str(model), str(text), "--out", str(out), *pairs, *flags]


KILLED = """
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("finetune", sys.argv[1])
finetune = importlib.util.module_from_spec(spec)
sys.modules["finetune"] = finetune
spec.loader.exec_module(finetune)
batch_of = finetune.batch_of
def dying(tokens, size, length, seed, step):
    if step == 5:
        os._exit(9)
    return batch_of(tokens, size, length, seed, step)
finetune.batch_of = dying
finetune.app(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_is_bit_equal(finetune, tmp_path, kind):
    options = KINDS[kind]
    straight = finetune(CONFIG, tmp_path / "straight", options)
    assert len(straight["losses"]) == 8
    assert np.mean(straight["losses"][-2:]) < np.mean(straight["losses"][:2]) - 0.3
    before, after = straight["held_out_loss"]
    assert after < before - 0.3

    arguments = command(CONFIG, tmp_path / "killed", options)
    child = [sys.executable, "-c", KILLED, str(SCRIPT), *arguments]
    assert subprocess.run(child, check=False).returncode == 9
    assert len((tmp_path / "killed" / "log.jsonl").read_text().splitlines()) == 5
    assert "--resume" in finetune(CONFIG, tmp_path / "killed", options, code=1)
    other = options | {"--learning-rate": 0.5}
    said = finetune(CONFIG, tmp_path / "killed", other, "--resume", code=1)
    assert "learning_rate differ" in said
    resumed = finetune(CONFIG, tmp_path / "killed", options, "--resume")
    assert resumed["resumed_at"] == 3
    assert resumed["losses"] == straight["losses"]
    weights = [tmp_path / run / "model" / "model.safetensors" for run in ("straight", "killed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert sorted(p.name for p in (tmp_path / "killed" / "steps").iterdir()) == ["6", "8"]
    said = finetune(CONFIG, tmp_path / "killed", options, "--resume", code=1)
    assert "complete" in said


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sharding info not provided")  # the test's own look at a step
def test_adapters_on_a_converted_checkpoint(finetune, script, tiny_model, tmp_path):
    """Any format gives the same run; only the named matrices change, by scale * A B."""
    config, params, tokenizer = tiny_model.config, tiny_model.params, tiny_model.tokenizer
    checkpoint.save(tmp_path / "orbax", config, params, tokenizer, to="orbax", progress=False)
    checkpoint.convert(tmp_path / "orbax", tmp_path / "hf", progress=False)
    options = KINDS["lora"] | {"--lora-targets": "q,down,o", "--steps": 3}
    one, two = (finetune(tmp_path / x, tmp_path / f"run-{x}", options) for x in ("orbax", "hf"))
    assert one["losses"] == two["losses"]
    assert one["trained"] == 4 * 2 * ((64 + 4 * 16) + (4 * 16 + 64) + (128 + 64))
    mesh = finetune(tmp_path / "hf", tmp_path / "mesh", options | {"--mesh": "data=2,tensor=2"})
    np.testing.assert_allclose(mesh["losses"], one["losses"], rtol=1e-4)

    old = load_file(tmp_path / "hf" / "model.safetensors")
    new = load_file(Path(one["model"]) / "model.safetensors")
    changed = {name for name in old if not np.array_equal(old[name], new[name])}
    parts = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
    assert changed == {f"model.layers.{i}.{part}.weight" for i in (0, 1) for part in parts}
    with script.checkpointer(tmp_path / "run-hf") as saved:
        down = saved.load()["params"]["layers_1"]["mlp"]["down"]
    want = old["model.layers.1.mlp.down_proj.weight"].T + 4.0 * np.asarray(down["a"] @ down["b"])
    np.testing.assert_allclose(new["model.layers.1.mlp.down_proj.weight"].T, want, atol=1e-5)
    tuned = checkpoint.read_checkpoint(one["model"], progress=False)
    assert tuned.tokenizer.encode("People").tolist() == tiny_model.encode("People").tolist()


@pytest.mark.slow
def test_adapters_on_a_quantized_base(finetune, tiny_model, tmp_path):
    config, params, tokenizer = tiny_model.config, tiny_model.params, tiny_model.tokenizer
    checkpoint.save(tmp_path / "hf", config, params, tokenizer, to="hf", progress=False)
    options = KINDS["lora"] | {"--quantize": "int4", "--lora-targets": "q,down"}
    done = finetune(tmp_path / "hf", tmp_path / "run", options)
    assert np.mean(done["losses"][-2:]) < np.mean(done["losses"][:2]) - 0.1
    old = load_file(tmp_path / "hf" / "model.safetensors")
    new = load_file(Path(done["model"]) / "model.safetensors")
    changed = {name for name in old if not np.array_equal(old[name], new[name])}
    parts = ("self_attn.q_proj", "mlp.down_proj")  # all else is as stored, not as quantized
    assert changed == {f"model.layers.{i}.{part}.weight" for i in (0, 1) for part in parts}


def test_what_cannot_be_done(finetune, tmp_path):
    full = {"--lora-rank": 0, "--quantize": "int4"}
    assert "--lora-rank of 1 or more" in finetune(CONFIG, tmp_path / "a", full, code=1)
    short = tmp_path / "short.txt"
    short.write_text("A few words.")
    assert "--length 32" in finetune(CONFIG, tmp_path / "a", {}, code=1, text=short)
    assert "'qq'" in finetune(CONFIG, tmp_path / "a", {"--lora-targets": "qq"}, code=1)
    assert "needs 16 devices" in finetune(CONFIG, tmp_path / "a", {"--mesh": "data=16"}, code=1)
    assert "no checkpoint" in finetune(tmp_path / "none", tmp_path / "a", {}, code=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    assert "holds no run" in finetune(CONFIG, tmp_path / "mine", {}, code=1)
    assert not (tmp_path / "a").exists()


def test_help_teaches(script):
    shown, listed = CliRunner().invoke(script.app, ["--help"]).stdout.split("\nOptions:")
    assert shown.count("python examples/finetune.py") == 3
    for option in ("--mesh", "--lora-rank", "--resume", "--json"):
        assert option in listed
