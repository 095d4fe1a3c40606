"""Meta's layout: parts joined, RoPE rows reordered, and no pickle ever run.

The files in golden/meta were written by torch, their logits computed by Meta's formulas.
"""

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from alaya_jax.checkpoint import convert, open_checkpoint, read_checkpoint, verify
from alaya_jax.checkpoint.params import match
from alaya_jax.checkpoint.torch_file import read_torch_file
from alaya_jax.errors import AlayaError, CheckpointError, ConfigError
from alaya_jax.models import llama

GOLDEN = Path(__file__).parent / "golden" / "meta"
PART = "consolidated.00.pth"


@pytest.fixture
def meta(tmp_path):
    path = tmp_path / "meta"
    path.mkdir()
    for file in GOLDEN.iterdir():
        shutil.copyfile(file, path / file.name)
    return path


def read(path, **kwargs):
    return read_checkpoint(path, progress=False, **kwargs)


def test_logits_are_metas():
    golden = json.loads((GOLDEN / "logits.json").read_text())
    found = read(GOLDEN, dtype="float32")
    tokens = np.asarray(golden["tokens"])[None]
    positions = np.arange(tokens.size)[None]
    logits, _ = llama.forward(found.params, found.config, tokens, positions, llama.causal_attend)
    np.testing.assert_allclose(logits[0], golden["logits"], atol=2e-5)
    assert found.config.dtype == "bfloat16"
    assert found.config.intermediate_size == 112


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_to_hf_and_back_to_metas_layout(tmp_path, to):
    convert(GOLDEN, tmp_path / "out", to=to, progress=False)
    assert verify(GOLDEN, tmp_path / "out", progress=False).same
    source = open_checkpoint(tmp_path / "out")
    parts = [read_torch_file(GOLDEN / f"consolidated.{i:02}.pth") for i in range(2)]
    for entry, tensor in match(source):
        param = entry.to_params(tensor.read(), source.format)
        stored = np.ascontiguousarray(entry.to_stored(param, "meta"))
        first, second = (part[entry.meta].values() for part in parts)
        axis = next((i for i in range(first.ndim) if first.shape[i] != stored.shape[i]), None)
        want = first if axis is None else np.concatenate([first, second], axis)
        np.testing.assert_array_equal(stored.view(np.uint16), want.view(np.uint16), strict=True)


def test_hf_names_and_split_rows(tmp_path):
    """The joined q projection, permuted by hand as Meta's code pairs neighbours."""
    convert(GOLDEN, tmp_path / "hf", progress=False)
    got = load_file(tmp_path / "hf" / "model.safetensors")
    name = "layers.1.attention.wq.weight"
    parts = [read_torch_file(GOLDEN / f"consolidated.{i:02}.pth")[name].values() for i in (0, 1)]
    rows = [*parts[0].astype(np.float32), *parts[1].astype(np.float32)]
    for head in range(4):
        for d in range(4):
            for half in (0, 1):
                row = got["model.layers.1.self_attn.q_proj.weight"][head * 8 + half * 4 + d]
                want = rows[head * 8 + 2 * d + half]
                np.testing.assert_array_equal(row.astype(np.float32), want)


def edit(path, **changes):
    params = json.loads((path / "params.json").read_text()) | changes
    kept = {key: value for key, value in params.items() if value is not ...}
    (path / "params.json").write_text(json.dumps(kept))


def test_config(meta):
    edit(meta, use_scaled_rope=True, rope_scaling_factor=32)
    config = read(meta).config
    assert (config.rope.rope_type, config.rope.factor) == ("llama3", 32)
    assert config.rope.original_max_position_embeddings == 8192
    assert config.max_position_embeddings == 131_072
    edit(meta, rope_scaling_factor=...)
    with pytest.raises(ConfigError, match=r"params\.json.*dim = 32; add the factor"):
        read(meta)
    edit(meta, use_scaled_rope=False, vocab_size=-1)
    assert read(meta).config.vocab_size == 48
    edit(meta, sliding=4)
    with pytest.raises(ConfigError, match=r"'sliding'.*not understood"):
        read(meta)
    edit(meta, sliding=..., dim=...)
    with pytest.raises(ConfigError, match="'dim' is missing"):
        read(meta)
    edit(meta, dim="32")
    with pytest.raises(ConfigError, match=r"params\.json"):
        read(meta)
    edit(meta, dim=32, multiple_of=64)
    with pytest.raises(CheckpointError, match=r"w1.weight.*intermediate_size.*needs \[128, 32\]"):
        read(meta)
    (meta / "params.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"params\.json cannot be read"):
        read(meta)


def test_parts(meta):
    (meta / "consolidated.01.pth").rename(meta / "consolidated.02.pth")
    with pytest.raises(CheckpointError, match=r"parts 00, 02.*copy the missing"):
        read(meta)
    (meta / "consolidated.02.pth").unlink()
    with pytest.raises(CheckpointError, match=r"wq.weight.*shape \[16, 32\].*needs \[32, 32\]"):
        read(meta)
    (meta / PART).unlink()
    with pytest.raises(CheckpointError, match="no consolidated"):
        read(meta)


def test_copies_that_differ(meta):
    part = meta / "consolidated.01.pth"
    data, norm = part.read_bytes(), read_torch_file(part)["norm.weight"].values().tobytes()
    at = data.index(norm)
    part.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(CheckpointError, match=r"'norm\.weight' should be the same.*part 01"):
        read(meta)


def test_tied(meta, tmp_path):
    """A head that is the embedding, as Llama 3.2 stores it, is the embedding."""
    for i in range(2):
        part = meta / f"consolidated.{i:02}.pth"
        found = read_torch_file(part)
        data = part.read_bytes()
        head, embedding = (
            found[name].values().tobytes() for name in ("output.weight", "tok_embeddings.weight")
        )
        part.write_bytes(data.replace(head, embedding))
    assert read(meta).config.tie_word_embeddings
    assert "lm_head" not in read(meta).params


def rewrite(path, change=lambda name, data: data, compression=zipfile.ZIP_STORED):
    """Writes a zip file again with changed members."""
    with zipfile.ZipFile(path) as archive:
        members = {i.filename: archive.read(i) for i in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, change(name, data))


class Bomb:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickle_bombs_do_not_go_off(meta, tmp_path, protocol):
    target = tmp_path / "exploded"
    bombs = {
        "system": Bomb(os.system, f"touch {target}"),
        "exec": Bomb(exec, f"open({str(target)!r}, 'w')"),
        "mkdir": {"norm.weight": Bomb(os.mkdir, str(target))},
        "getattr": Bomb(getattr, "x", "upper"),
    }
    for what, bomb in bombs.items():
        program = pickle.dumps(bomb, protocol)
        rewrite(meta / PART, lambda name, data, p=program: p if "data.pkl" in name else data)
        with pytest.raises(CheckpointError, match=f"{what}.*not run|instruction"):
            read(meta)
        assert not target.exists()


@pytest.mark.parametrize(
    ("program", "match"),
    [
        (b"(iposix\nsystem\n.", "instruction INST"),
        (b"}cos\nsystem\nb.", "is missing in"),
        (b"cos\nsystem\n}b.", "sets attributes"),
        (b"}(X\x01\x00\x00\x00aK\x01X\x01\x00\x00\x00aK\x02u.", "'a' occurs twice"),
        (b"}X\x01\x00\x00\x00aK\x01s.", "'a' is no tensor but 1"),
        (b"]K\x01a.", "holds a list"),
        (b"}", "damaged|no end"),
        (b"u.", "damaged"),
        (b"h\x07.", "damaged"),
        (b"X\x01\x00\x00\x00aQ.", "no storage"),
        (b"", "damaged"),
        (b"K\x01" + b"q\x00h\x00\x86" * 60 + b"Q.", "no storage"),  # a repr of 2**60 words
    ],
)
def test_programs_that_are_no_tensors(meta, program, match):
    rewrite(meta / PART, lambda name, data: program if "data.pkl" in name else data)
    with pytest.raises(CheckpointError, match=match):
        read(meta)


def test_zip_files_that_are_not_as_torch_writes_them(meta):
    good = (meta / PART).read_bytes()

    def refused(match):
        with pytest.raises(CheckpointError, match=match):
            read(meta)
        (meta / PART).write_bytes(good)

    rewrite(meta / PART, compression=zipfile.ZIP_DEFLATED)
    refused("compressed")
    rewrite(meta / PART, lambda name, data: data[:-2] if "/data/3" in name else data)
    refused("too short")
    rewrite(meta / PART, lambda name, data: b"big" if "byteorder" in name else data)
    refused("big-endian")
    (meta / PART).write_bytes(good[:20_000])
    refused("truncated")
    (meta / PART).write_bytes(b"")
    refused("truncated")
    (meta / PART).write_bytes(pickle.dumps({"old": 1}))
    refused("before 1.6")
    assert read(meta).config.vocab_size == 48


def test_fuzz(meta, rng):
    """Damage of any kind is an error of ours or harmless, and never anything else."""
    good = np.frombuffer((meta / PART).read_bytes(), np.uint8)
    with zipfile.ZipFile(meta / PART) as archive:
        (info,) = (i for i in archive.infolist() if i.filename.endswith("data.pkl"))
    stretches = [
        (info.header_offset, info.header_offset + info.file_size),
        (good.size - 3000, good.size),
    ]
    refused = harmless = 0
    for i in range(120):
        bad = good.copy()
        where = rng.integers(*stretches[i % 2], size=rng.integers(1, 4))
        bad[where] = rng.integers(0, 256, where.size)
        (meta / PART).write_bytes(
            bad[: rng.integers(1, bad.size) if i % 10 == 0 else None].tobytes()
        )
        try:
            match(open_checkpoint(meta))
        except AlayaError as error:
            refused += str(meta) in str(error)
        else:
            harmless += 1
    assert refused + harmless == 120
    assert refused > 40
