"""A model's fingerprint covers every byte of its weights, wherever they are."""

import copy
import dataclasses
import json
import os
import pickle
import shutil

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import alaya_jax as aj
from alaya_jax.checkpoint import convert, identity, inspect, open_checkpoint, read_checkpoint, save
from alaya_jax.errors import RequestError
from alaya_jax.models.config import RopeConfig
from alaya_jax.models.quantized import QuantizedMatrix

EMBEDDING = "model.embed_tokens.weight"


def read(path, **kwargs):
    return read_checkpoint(path, progress=False, **kwargs)


def change_a_row(file, row=1000):
    """One row of the embedding, far from the ends and the middle of its bytes."""
    tensors = load_file(file)
    tensors[EMBEDDING][row] *= -1
    save_file(tensors, file)


@pytest.fixture
def wide(make_config, make_tensors, write_hf, tmp_path):
    """An HF checkpoint whose embedding has 4096 rows."""

    def make(name="wide", dtype=np.float32, **changes):
        config = make_config(vocab_size=4096, num_hidden_layers=1, **changes)
        tensors = {k: v.astype(dtype) for k, v in make_tensors(config).items()}
        path = write_hf(config, tensors)
        target = tmp_path / name
        target.mkdir()
        for file in ("config.json", "model.safetensors"):
            (path / file).rename(target / file)
        return target

    return make


@pytest.mark.parametrize("to", ["hf", "orbax", "gguf-f32"])
def test_a_changed_row_makes_another_model(wide, tmp_path, to):
    source = wide()
    tuned = tmp_path / "tuned"
    shutil.copytree(source, tuned)
    change_a_row(tuned / "model.safetensors")
    done = [convert(x, tmp_path / f"{x.name}-{to}", to=to, progress=False) for x in (source, tuned)]
    first, second = (read(x.path).fingerprint for x in done)
    assert first != second
    assert [first, second] == [x.fingerprint for x in done]
    assert [first, second] == [inspect(x.path)["fingerprint"] for x in done]


def test_a_changed_byte_of_metas_files(tmp_path):
    from tests.checkpoint.test_meta import GOLDEN

    shutil.copytree(GOLDEN, tmp_path / "meta")
    before = read(tmp_path / "meta").fingerprint
    assert before == read(GOLDEN).fingerprint  # wherever it lies
    file = tmp_path / "meta" / "consolidated.01.pth"
    source = open_checkpoint(tmp_path / "meta")
    piece = next(p for p in source.pieces if p.name == "01/layers.0.feed_forward.w2.weight")
    data, found = bytearray(file.read_bytes()), bytes(piece.data)
    data[data.find(found) + len(found) // 3] ^= 1
    file.write_bytes(data)
    assert read(tmp_path / "meta").fingerprint != before


def test_orbax_holds_what_its_manifest_states(wide, tmp_path):
    """The fingerprint is that of an HF checkpoint while the files are those it was made for."""
    source = wide(dtype=ml_dtypes.bfloat16)
    want = read(source)
    there, other = tmp_path / "there", tmp_path / "other"
    convert(source, there, to="orbax", progress=False)
    assert read(there).fingerprint == want.fingerprint
    shutil.copytree(there, tmp_path / "copied")
    assert read(tmp_path / "copied").fingerprint == want.fingerprint
    tuned = want.params | {"norm": {"scale": want.params["norm"]["scale"] + 1}}
    save(other, want.config, tuned, progress=False)
    assert read(other).fingerprint != want.fingerprint
    shutil.rmtree(there / "params")
    (other / "params").rename(there / "params")  # written over, the manifest left as it was
    assert read(there).fingerprint not in (want.fingerprint, read(tmp_path / "copied").fingerprint)
    manifest = json.loads((tmp_path / "copied" / "alaya_checkpoint.json").read_text())
    del manifest["seal"]  # as earlier versions wrote it
    (tmp_path / "copied" / "alaya_checkpoint.json").write_text(json.dumps(manifest))
    old = read(tmp_path / "copied").fingerprint
    assert old not in (want.fingerprint, read(there).fingerprint)


def test_weights_of_several_types_and_a_cast(wide):
    """The type of the keys does not tell whether the layers were rounded."""
    source = wide()
    tensors = load_file(source / "model.safetensors")
    tensors[EMBEDDING] = tensors[EMBEDDING].astype(ml_dtypes.bfloat16)
    save_file(tensors, source / "model.safetensors")
    own, cast = read(source), read(source, dtype="bfloat16")
    assert own.params["embed"]["embedding"].dtype == cast.params["embed"]["embedding"].dtype
    assert own.fingerprint != cast.fingerprint


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """Digests of the smallest and youngest files are kept; counts how often they are made."""
    made = []
    monkeypatch.setenv("ALAYA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(identity, "_WORTH", 1)
    monkeypatch.setattr(identity, "_SETTLED", -1.0)
    digest_pieces = identity.digest_pieces
    monkeypatch.setattr(
        identity, "digest_pieces", lambda *args: made.append(1) or digest_pieces(*args)
    )
    return made


def test_digests_are_kept_until_a_file_changes(wide, kept, tmp_path):
    source = wide()
    file = source / "model.safetensors"
    first = read(source).fingerprint
    assert (read(source).fingerprint, len(kept)) == (first, 1)
    (cached,) = (tmp_path / "cache" / "fingerprints").iterdir()
    before = file.stat()
    data = bytearray(file.read_bytes())
    data[-300_001] ^= 1
    with file.open("r+b") as same:  # in place: the same inode, size and times
        same.write(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = read(source).fingerprint
    assert (second != first, len(kept)) == (True, 2)
    cached.write_text("{")
    assert (read(source).fingerprint, len(kept)) == (second, 3)
    shutil.copytree(source, tmp_path / "copy")
    assert (read(tmp_path / "copy").fingerprint, len(kept)) == (second, 4)


def test_a_cache_that_cannot_be_written_and_a_young_file(wide, kept, monkeypatch, tmp_path):
    source = wide()
    monkeypatch.setattr(identity, "_SETTLED", 60.0)
    first = read(source).fingerprint
    assert not (tmp_path / "cache").exists()  # it may be written again within a tick of its clock
    monkeypatch.setattr(identity, "_SETTLED", -1.0)
    (tmp_path / "cache").write_text("no directory")
    assert read(source).fingerprint == first
    assert len(kept) == 2


def test_a_file_that_is_put_in_place_of_an_open_one(wide, kept, tmp_path):
    """What is read is the old one; its digest must not be kept as the new one's."""
    source = wide()
    opened = open_checkpoint(source)
    opened = dataclasses.replace(opened, opened=opened.opened - 1.0)  # and seconds go by
    shutil.copyfile(source / "model.safetensors", tmp_path / "new")
    change_a_row(tmp_path / "new")
    (tmp_path / "new").replace(source / "model.safetensors")
    old = identity.identify(opened, opened.tensors.values())
    assert read(source).fingerprint != old


def test_loading_that_fails_ends_the_reading(wide, monkeypatch):
    from alaya_jax import checkpoint

    source, stopped = wide(), []

    def identify(source, tensors, *, stop):
        stopped.append(stop.wait(10))

    monkeypatch.setattr(identity, "identify", identify)
    monkeypatch.setattr(checkpoint, "load_params", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        read(source)
    assert stopped == [True]


# In memory: `aj.Model`.


def other_params(params):
    key = params["layers_1"]["attention"]["k"]["kernel"]
    changed = key.at[3, 0, 0].add(1e-3)
    layer = params["layers_1"]
    attention = layer["attention"] | {"k": {"kernel": changed}}
    return params | {"layers_1": layer | {"attention": attention}}


def test_other_parameters_have_another_fingerprint(tiny_model):
    tuned = other_params(tiny_model.params)
    replaced = dataclasses.replace(tiny_model, params=tuned)
    bare = aj.Model(tiny_model.config, tiny_model.params)
    prints = [tiny_model.fingerprint, replaced.fingerprint, bare.fingerprint]
    assert prints[0] == "tiny"
    assert len(set(prints)) == 3
    assert aj.Model(tiny_model.config, jax.device_get(tuned)).fingerprint == prints[1]
    assert aj.Model(tiny_model.config, jax.tree.map(jnp.copy, tuned)).fingerprint == prints[1]
    assert dataclasses.replace(replaced, params=tiny_model.params).fingerprint == prints[2]
    stated = dataclasses.replace(tiny_model, params=tuned, fingerprint="tuned")
    assert stated.fingerprint == dataclasses.replace(stated, name="other").fingerprint == "tuned"
    assert dataclasses.replace(tiny_model, fingerprint="another").fingerprint == "another"


def test_a_fingerprint_is_made_once_and_only_when_asked_for(tiny_model, monkeypatch):
    from alaya_jax import model as module

    made = []
    monkeypatch.setattr(module, "identify_arrays", lambda *args: made.append(args) or "made")
    tuned = dataclasses.replace(tiny_model, params=other_params(tiny_model.params))
    again = dataclasses.replace(dataclasses.replace(tuned, name="b"), params=tuned.params)
    assert not made
    assert (again.fingerprint, again.fingerprint, len(made)) == ("made", "made", 1)
    assert dataclasses.replace(again, name="c").fingerprint == "made"
    assert len(made) == 1


def test_parameters_that_are_put_in_place_are_noticed(tiny_model):
    model = aj.Model(tiny_model.config, dict(tiny_model.params), fingerprint="mine")
    assert model.fingerprint == "mine"
    model.params["norm"] = {"scale": tiny_model.params["norm"]["scale"] * 2}
    assert model.fingerprint not in ("mine", "tiny")


def test_a_copy_has_the_same(tiny_model):
    bare = aj.Model(tiny_model.config, tiny_model.params)
    for model in (tiny_model, bare):
        for made in (copy.copy(model), pickle.loads(pickle.dumps(model))):
            assert made.fingerprint == model.fingerprint
    tuned = other_params(tiny_model.params)
    assert pickle.loads(pickle.dumps(dataclasses.replace(bare, params=tuned))).fingerprint != (
        bare.fingerprint
    )


def test_rope_as_loaded_is_part_of_it(tiny_model):
    other = dataclasses.replace(tiny_model.config, rope=RopeConfig("linear", factor=2.0))
    assert dataclasses.replace(tiny_model, config=other).fingerprint != "tiny"
    dynamic = dataclasses.replace(tiny_model.config, rope=RopeConfig("dynamic", factor=4.0))
    model = aj.Model(dynamic, tiny_model.params, fingerprint="tiny", max_length=300)
    longer = dataclasses.replace(model, max_length=400)
    assert len({"tiny", model.fingerprint, longer.fingerprint}) == 3
    assert dataclasses.replace(longer, max_length=300).fingerprint == model.fingerprint


def test_quantized_and_adapted_kernels_are_part_of_it(wide, tiny_model):
    found = read(wide(), quantize="int8")
    model = aj.Model(found.config, found.params)
    down = found.params["layers_0"]["mlp"]["down"]["kernel"]
    assert isinstance(down, QuantizedMatrix)
    layer = found.params["layers_0"]
    prints = {model.fingerprint}
    for kernel in (
        dataclasses.replace(down, scale=down.scale * 2),
        dataclasses.replace(down, compute="bfloat16"),
    ):
        mlp = layer["mlp"] | {"down": {"kernel": kernel}}
        params = found.params | {"layers_0": layer | {"mlp": mlp}}
        prints.add(dataclasses.replace(model, params=params).fingerprint)
    assert len(prints) == 3


def test_on_any_mesh_the_same(tiny_model):
    from alaya_jax.checkpoint.names import entries
    from alaya_jax.checkpoint.params import placement

    mesh, rules = aj.make_mesh(tensor=2), aj.ShardingRules()
    spread = tiny_model.params
    for entry in entries(tiny_model.config):
        *parents, last = entry.path
        node = spread = jax.tree.map(lambda x: x, spread)
        for key in parents:
            node = node[key]
        where = placement(mesh, rules, entry.logical_axes, entry.shape, "device")
        node[last] = jax.device_put(node[last], where)
    model = aj.Model(tiny_model.config, spread, mesh=mesh, rules=rules)
    assert model.fingerprint == aj.Model(tiny_model.config, tiny_model.params).fingerprint


def test_contexts_of_other_weights_are_not_reused(open_db, tiny_model):
    text = "a document that is read once, and asked"
    tuned = dataclasses.replace(tiny_model, params=other_params(tiny_model.params))
    with open_db() as db:
        db.import_context(text, progress=False)
    with open_db(tuned) as db:
        assert not db.contexts
        assert db.create_session(text + " things")[0].reused[0] == 0
        db.import_context(text, progress=False)
    again = aj.Model(tiny_model.config, tuned.params, tiny_model.tokenizer)
    with open_db(again) as db:
        assert db.create_session(text + " things")[0].reused[0] > 0


def test_contexts_under_a_fingerprint_of_samples_are_named(open_db, tiny_model):
    """An earlier version stored them; a longer one of today does not hide them."""
    text, old = (
        "a document that is read once",
        dataclasses.replace(tiny_model, fingerprint="0f" * 32),
    )
    with open_db(old) as db:
        id = db.import_context(text, progress=False).id
        assert db.create_session(text + ", and")[0].reused[0] > 0  # who states such a one has it
    with open_db() as db:
        (context,) = db.contexts
        assert context.id == id
        assert "earlier version" in context.problem
        assert "import the document again" in repr(context)
        assert db.create_session(text + ", and")[0].reused[0] == 0
        db.import_context(text, progress=False)
        db.remove(id)
        assert db.create_session(text + ", and")[0].reused[0] > 0
    with open_db(old, namespace="other") as db:
        assert not db.contexts


def test_spread_over_processes_it_must_be_given(tiny_model, monkeypatch):
    model = dataclasses.replace(tiny_model, params=other_params(tiny_model.params))
    array = type(jax.tree.leaves(model.params)[0])
    monkeypatch.setattr(array, "is_fully_addressable", property(lambda self: False))
    with pytest.raises(RequestError, match=r"several processes.*fingerprint="):
        _ = model.fingerprint


def test_quantized_gguf_is_read_whole(make_config, make_tensors, write_gguf):
    config = make_config(vocab_size=4096, num_hidden_layers=1)
    tensors = make_tensors(config)
    first = read(write_gguf(config, tensors, gguf.GGMLQuantizationType.Q8_0)).fingerprint
    tensors[EMBEDDING][1000] *= -1
    assert read(write_gguf(config, tensors, gguf.GGMLQuantizationType.Q8_0)).fingerprint != first
