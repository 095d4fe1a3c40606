"""What is written is what was read, in every format, whole or not at all."""

import errno
import fcntl
import filecmp
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from alaya_jax.checkpoint import (
    conversion,
    convert,
    hf_write,
    inspect,
    load,
    open_checkpoint,
    orbax,
    read_checkpoint,
    save,
    verify,
)
from alaya_jax.errors import CheckpointError, ConfigError, TokenizerError
from alaya_jax.models.config import LlamaConfig, RopeConfig
from alaya_jax.sharding import ShardingRules, make_mesh

GOLDEN = Path(__file__).parent / "golden"
LLAMA3 = RopeConfig(
    "llama3", 500_000.0, factor=8.0, low_freq_factor=1.0, original_max_position_embeddings=64
)


@pytest.fixture
def hf(make_config, make_tensors, write_hf, tmp_path):
    """Writes a random HF checkpoint into a directory of its own."""

    def make(dtype=np.float32, shards=0, **changes):
        config = make_config(dtype=np.dtype(dtype).name, **changes)
        path = write_hf(config, make_tensors(config, dtype), shards)
        target = tmp_path / "hf"
        target.mkdir()
        for file in path.glob("*.*"):
            file.rename(target / file.name)
        return target

    return make


def run(source, path, **kwargs):
    return convert(source, path, progress=False, **kwargs)


def read(path, **kwargs):
    return read_checkpoint(path, progress=False, **kwargs)


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["hf_shards", "hf_shards_oversize"])
def test_shards_are_byte_equal_to_those_of_transformers(tmp_path, make_tensors, name):
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    config = LlamaConfig(**golden["config"], dtype="bfloat16")
    tensors = make_tensors(config)
    for number, name in enumerate(sorted(tensors)):
        n = tensors[name].size
        values = ((np.arange(n) * 31 + number * 7) % 251 - 125) / 64
        tensors[name] = values.reshape(tensors[name].shape).astype(ml_dtypes.bfloat16)
    (tmp_path / "one").mkdir()
    save_file(tensors, tmp_path / "one" / "model.safetensors")
    (tmp_path / "one" / "config.json").write_text(json.dumps(config.to_hf()))
    run(tmp_path / "one", tmp_path / "many", shard_size=golden["shard_size"])
    written = {p.name: p.read_bytes() for p in (tmp_path / "many").glob("model*")}
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in written.items()}
    assert digests == golden["sha256"]


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        (np.float32, {}),
        (ml_dtypes.bfloat16, {"tie_word_embeddings": True, "rope": LLAMA3}),
        (np.float16, {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 3}),
        (ml_dtypes.bfloat16, {"num_key_value_heads": 4, "num_hidden_layers": 1}),
    ],
    ids=["float32", "tied", "biases", "one layer"],
)
def test_there_and_back_is_byte_equal(hf, tmp_path, dtype, changes):
    source = hf(dtype, **changes)
    (source / "LICENSE").write_text("for all")
    first = run(source, tmp_path / "first", shard_size="20KB")
    there = run(tmp_path / "first", tmp_path / "there", to="orbax")
    back = run(tmp_path / "there", tmp_path / "back", shard_size="20KB")
    assert files(tmp_path / "back") == files(tmp_path / "first")
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    want = read(source)
    assert {r.fingerprint for r in (first, there, back)} == {want.fingerprint}
    assert read(tmp_path / "there").fingerprint == want.fingerprint
    assert sorted(os.listdir(tmp_path)) == ["back", "first", "hf", "there"]  # nothing is left


def test_files_in_the_order_of_modules_come_back_as_they_were(tmp_path):
    """As transformers 4 fills them, and 5 of a model that was never loaded."""
    source = Path(__file__).parents[1] / "data" / "goldens" / "llama3_gqa4_sharded"
    run(source, tmp_path / "orbax", to="orbax")
    shards = {p.name: p.read_bytes() for p in source.glob("model*")}
    assert len(shards) == 4
    for number, start in enumerate((source, tmp_path / "orbax")):
        back = run(start, tmp_path / f"back-{number}", shard_size=107_051).path
        assert {p.name: p.read_bytes() for p in back.glob("model*")} == shards


def test_orbax_onto_another_mesh(hf, tmp_path, assert_same):
    source = hf(num_attention_heads=8, num_key_value_heads=8, head_dim=4)
    first = read(source, mesh=make_mesh(data=4, tensor=2))
    save(tmp_path / "saved", first.config, first.params, progress=False)
    again = read(tmp_path / "saved", mesh=make_mesh(tensor=8))
    assert_same(again.params, jax.device_get(first.params))
    key = again.params["layers_1"]["attention"]["k"]["kernel"]
    assert key.addressable_shards[0].data.shape == (32, 1, 4)
    assert again.config == first.config
    assert again.fingerprint == first.fingerprint
    alone = read(tmp_path / "saved", dtype=jnp.bfloat16).params
    assert len(alone["norm"]["scale"].sharding.device_set) == 1
    assert_same(alone, jax.tree.map(lambda x: x.astype(jnp.bfloat16), first.params))
    with pytest.raises(ConfigError, match="'heads' of size 8"):
        read(tmp_path / "saved", mesh=make_mesh(tensor=3))
    rules = ShardingRules(kv_heads=None, heads=None, vocab=None, ffn=None)
    assert read(tmp_path / "saved", mesh=make_mesh(tensor=3), rules=rules).config == first.config


def test_orbax_in_the_parts_of_a_mesh(hf, tmp_path, assert_same):
    from orbax.checkpoint import v1 as ocp

    source = hf(ml_dtypes.bfloat16, num_attention_heads=8, num_key_value_heads=8, head_dim=4)
    mesh = make_mesh(tensor=8)
    done = run(source, tmp_path / "parts", to="orbax", mesh=mesh)
    stored = ocp.metadata(tmp_path / "parts" / "params").metadata
    want = read(source)
    spread = read(tmp_path / "parts", mesh=mesh)
    chunks = jax.tree.map(lambda x: x.storage_metadata.chunk_shape, stored)
    shards = jax.tree.map(lambda x: x.sharding.shard_shape(x.shape), spread.params)
    for part in ("embed", "lm_head"):
        assert chunks[part] == shards[part]
    for part in ("attention", "mlp"):  # norms, which all devices hold, are written by all of them
        assert chunks["layers_1"][part] == shards["layers_1"][part]
    assert chunks["layers_1"]["mlp"]["down"]["kernel"] == (8, 32)
    assert_same(spread.params, want.params)
    assert_same(read(tmp_path / "parts", mesh=make_mesh(tensor=2)).params, want.params)
    assert done.fingerprint == spread.fingerprint == want.fingerprint
    run(tmp_path / "parts", tmp_path / "back")
    run(source, tmp_path / "first")
    assert files(tmp_path / "back") == files(tmp_path / "first")
    with pytest.raises(ConfigError, match="'vocab' of size 48"):
        run(source, tmp_path / "out", to="orbax", mesh=make_mesh(tensor=5))
    with pytest.raises(ConfigError, match="leave it out with to='hf'"):
        run(source, tmp_path / "out", mesh=mesh)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mesh", [None, {"data": 2, "tensor": 4}])
@pytest.mark.parametrize("quantize", [None, "int4"])
def test_into_pinned_host_memory(hf, tmp_path, assert_same, mesh, quantize):
    sizes = {"vocab_size": 256, "intermediate_size": 256, "head_dim": 8}  # four tiles, four groups
    source = hf(num_attention_heads=8, num_key_value_heads=8, **sizes)
    run(source, tmp_path / "orbax", to="orbax")
    options = {"mesh": mesh and make_mesh(**mesh), "quantize": quantize}
    want = read(source, **options)
    for path in (source, tmp_path / "orbax"):
        held = read(path, memory="pinned_host", **options)
        leaves = jax.tree.leaves(held.params)
        assert {x.sharding.memory_kind for x in leaves} == {"pinned_host"}
        for one, two in zip(leaves, jax.tree.leaves(want.params), strict=True):
            assert one.sharding.device_set == two.sharding.device_set
            np.testing.assert_array_equal(np.asarray(one), np.asarray(two))
    with pytest.raises(ConfigError, match=r"'hbm'.*device.*pinned_host"):
        read(source, memory="hbm")


TWO_PROCESSES = """
import sys
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import numpy as np
from alaya_jax.checkpoint import convert, open_checkpoint, read_checkpoint, save
from alaya_jax.errors import CheckpointError, RequestError
from alaya_jax.sharding import make_mesh
mesh = make_mesh(data=2, tensor=4)
source, orbax, saved, half = (Path(path) for path in sys.argv[3:])
one, two = (read_checkpoint(path, mesh=mesh, progress=False) for path in (source, orbax))
def check(a, b):
    assert len(a.sharding.device_set) == 8 and len(a.addressable_shards) == 4
    for x, y in zip(a.addressable_shards, b.addressable_shards, strict=True):
        assert x.index == y.index
        np.testing.assert_array_equal(x.data, y.data)
jax.tree.map(check, one.params, two.params)
assert one.fingerprint == two.fingerprint

other = read_checkpoint(source, mesh=make_mesh(tensor=8), progress=False)
done = save(saved, other.config, other.params, progress=False)
assert done.fingerprint == one.fingerprint
again = read_checkpoint(saved, mesh=mesh, progress=False)
jax.tree.map(check, one.params, again.params)
save(half, other.config, other.params, dtype="bfloat16", progress=False)
def refused(error, text, call, *args, **kwargs):
    try:
        call(*args, progress=False, **kwargs)
    except error as caught:
        assert text in str(caught), caught
    else:
        raise AssertionError(text)
refused(CheckpointError, "is there already", save, saved, other.config, other.params)
refused(RequestError, "save it as orbax", save, saved, other.config, other.params, to="hf")
refused(RequestError, "in one process", convert, source, saved)
"""


@pytest.mark.slow
def test_two_processes_restore_and_save(hf, tmp_path, assert_same):
    source = hf(num_attention_heads=8, num_key_value_heads=8, head_dim=4)
    run(source, tmp_path / "orbax", to="orbax")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-c", TWO_PROCESSES, address]
    paths = [str(path) for path in (source, *(tmp_path / x for x in ("orbax", "saved", "half")))]
    processes = [
        subprocess.Popen([*command, str(i), *paths], stderr=subprocess.PIPE) for i in range(2)
    ]
    for process in processes:
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said.decode()
    assert sorted(os.listdir(tmp_path)) == ["half", "hf", "orbax", "saved"]
    want = read(source)
    assert_same(read(tmp_path / "saved").params, want.params)
    run(tmp_path / "saved", tmp_path / "back")
    run(source, tmp_path / "first")
    back, first = (load_file(tmp_path / x / "model.safetensors") for x in ("back", "first"))
    assert_same(back, first)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), want.params)
    assert_same(read(tmp_path / "half").params, half)


def test_orbax_is_plain_orbax(hf, tmp_path, assert_same):
    from orbax.checkpoint import v1 as ocp

    source = hf(ml_dtypes.bfloat16)
    run(source, tmp_path / "there", to="orbax")
    want = read(source).params
    leaf = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=leaf), want)
    assert_same(ocp.load(tmp_path / "there" / "params", abstract), want)
    with pytest.raises(CheckpointError, match=r"without alaya_checkpoint\.json.*save"):
        open_checkpoint(tmp_path / "there" / "params")


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_cast_rounds_to_nearest(hf, tmp_path, assert_same, to):
    source = hf()
    done = run(source, tmp_path / "half", to=to, dtype="bfloat16")
    got = read(tmp_path / "half")
    want = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), read(source).params)
    assert_same(got.params, want)
    assert got.config.dtype == done.dtype == "bfloat16"
    assert got.fingerprint == done.fingerprint != read(source).fingerprint


def test_gguf_becomes_hf_that_reads_the_same(
    make_config, make_tensors, write_gguf, tmp_path, assert_same
):
    config = make_config(attention_bias=True)
    source = write_gguf(config, make_tensors(config))
    run(source, tmp_path / "hf", shard_size="20KB")
    got, want = read(tmp_path / "hf"), read(source)
    assert_same(got.params, jax.device_get(want.params))
    assert got.config == want.config


def test_inspect_says_where_each_parameter_is(hf, tmp_path):
    source = hf(ml_dtypes.bfloat16)
    run(source, tmp_path / "a.gguf", to="gguf-bf16")
    there, here = inspect(tmp_path / "a.gguf"), inspect(source)
    assert there["config"] == here["config"]
    assert (
        there["parameters"]
        == here["parameters"]
        == sum(x.size for x in jax.tree.leaves(read(source).params))
    )
    assert here["tensors"].keys() == there["tensors"].keys()
    assert there["tensors"]["layers_1/attention/k/kernel"] == {
        "stored_as": "blk.1.attn_k.weight",
        "stored_shape": [32, 32],
        "stored_dtype": "BF16",
        "file": "a.gguf",
        "shape": [32, 2, 16],
        "axes": ["embed", "kv_heads", "head_dim"],
    }
    assert here["tensors"]["norm/scale"]["stored_as"] == "model.norm.weight"
    assert load(source).fingerprint == here["fingerprint"]


@pytest.mark.parametrize("to", ["hf", "orbax", "gguf-f32"])
def test_paths_may_be_relative(hf, tmp_path, monkeypatch, to):
    """Every verb that takes a path, from two working directories."""
    source = hf()
    want = read(source)
    monkeypatch.chdir(tmp_path)
    done = run("hf", Path("here"), to=to)
    assert done.path == tmp_path / "here"
    elsewhere = tmp_path / "else"
    elsewhere.mkdir()
    opened = open_checkpoint("here")
    monkeypatch.chdir(elsewhere)
    assert opened.read_tokenizer() is None
    run("../here", "back")
    for path in ("../here", "back", Path("../else/back")):
        got = read(path)
        chex.assert_trees_all_equal(got.params, want.params)
        assert got.source.is_absolute()
        assert inspect(path)["parameters"] == inspect(source)["parameters"]
    assert verify("../hf", "../here", progress=False).same
    save("saved", want.config, want.params, to=to, progress=False)
    assert verify("../hf", "saved", progress=False).same


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_named_templates_are_carried_along(hf, tmp_path, to):
    source = hf()
    named = source / "additional_chat_templates"
    named.mkdir()
    (named / "tool_use.jinja").write_text("{{ tools }}")
    run(source, tmp_path / "out", to=to)
    run(tmp_path / "out", tmp_path / "back")
    for path in (tmp_path / "out", tmp_path / "back"):
        assert (path / named.name / "tool_use.jinja").read_text() == "{{ tools }}"


def test_published_spelling(make_config):
    hf = hf_write.published_config(make_config(rope=LLAMA3, eos_token_ids=(1, 2)))
    assert hf["rope_theta"] == 500_000.0
    assert hf["rope_scaling"]["rope_type"] == "llama3"
    assert "rope_parameters" not in hf
    assert LlamaConfig.from_hf(hf) == make_config(rope=LLAMA3, eos_token_ids=(1, 2))
    assert hf_write.published_config(make_config())["rope_scaling"] is None


def test_tokenizer_and_own_files_go_along(tiny_model, hf, tmp_path):
    save(tmp_path / "a", tiny_model.config, tiny_model.params, tiny_model.tokenizer, progress=False)
    run(tmp_path / "a", tmp_path / "b", to="hf")
    text = "Grüße, 世界"
    for path in (tmp_path / "a", tmp_path / "b"):
        assert read(path).tokenizer.encode(text).tolist() == tiny_model.encode(text).tolist()
    source = hf(ml_dtypes.bfloat16)
    own = json.loads((source / "config.json").read_text()) | {"pad_token_id": 7}
    (source / "config.json").write_text(json.dumps(own))
    run(source, tmp_path / "c", dtype="float32")
    assert json.loads((tmp_path / "c" / "config.json").read_text()) == own | {"dtype": "float32"}
    (source / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError):
        run(source, tmp_path / "d")
    assert not (tmp_path / "d").exists()
    assert not list(tmp_path.glob(".*"))


def test_values_that_are_not_finite_are_counted(hf, tmp_path):
    source = hf()
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][:3] = np.nan, np.inf, 1e30
    save_file(tensors, source / "model.safetensors")
    assert run(source, tmp_path / "a").nonfinite == {"model.norm.weight": 2}
    for to in ("hf", "orbax"):
        done = run(source, tmp_path / f"half-{to}", to=to, dtype="float16")  # 1e30 does not fit
        assert done.nonfinite == {"model.norm.weight": 3}


KILLED = """
import os, sys
from alaya_jax import checkpoint
from alaya_jax.checkpoint import weights
assert "orbax.checkpoint" not in sys.modules
layout, left = weights.Weight.layout, 14
def dying(self, fmt):
    global left
    left -= 1
    if left < 0:
        os._exit(9)
    return layout(self, fmt)
weights.Weight.layout = dying
checkpoint.orbax._GROUP = 1
checkpoint.convert(sys.argv[1], sys.argv[2], to=sys.argv[3], shard_size="20KB")
"""


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_resume_after_a_kill(hf, tmp_path, to, monkeypatch, assert_same):
    source, path = hf(), tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(source), str(path), to]
    assert subprocess.run(command, check=False).returncode == 9
    unfinished = tmp_path / ".out.unfinished"
    assert not path.exists()
    with pytest.raises(CheckpointError, match="--resume"):
        run(source, path, to=to, shard_size="20KB")
    if to == "orbax":
        with pytest.raises(CheckpointError, match="was another one: mesh differ"):
            run(source, path, to=to, shard_size="20KB", mesh=make_mesh(tensor=2), resume=True)
    with pytest.raises(CheckpointError, match="was another one: dtypes differ"):
        run(source, path, to=to, shard_size="20KB", dtype="float16", resume=True)
    if to == "hf":
        kept = {p: p.stat().st_mtime_ns for p in unfinished.glob("*.safetensors")}
        assert kept
        assert list(unfinished.glob("*.part"))
    else:
        kept = {}
        (half,) = (p for p in unfinished.glob("params.*") if not p.name.endswith("-tmp"))
        (half / "params.pending_1_torn").mkdir()  # a save that was cut off before it was whole
        saved = len(orbax._recover(unfinished))
        assert 0 < saved < 21
    done = run(source, path, to=to, shard_size="20KB", resume=True)
    assert not unfinished.exists()
    for file, time in kept.items():
        assert (path / file.name).stat().st_mtime_ns == time  # not written again
    if to == "hf":
        run(source, tmp_path / "unbroken", shard_size="20KB")
        assert files(path) == files(tmp_path / "unbroken")
    assert_same(read(path).params, jax.device_get(read(source).params))
    assert done.fingerprint == read(source).fingerprint


def test_resume_counts_what_the_first_run_wrote(hf, tmp_path, monkeypatch):
    source = hf()
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"][0, 0] = np.nan
    save_file(tensors, source / "model.safetensors")
    stop_after(monkeypatch, 6, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(CheckpointError, match=r"disk is full.*--resume"):
        run(source, tmp_path / "out", shard_size="20KB")
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    done = run(source, tmp_path / "out", shard_size="20KB", resume=True)
    assert done.nonfinite == {"model.embed_tokens.weight": 1}


def test_orbax_on_a_full_disk(hf, tmp_path, monkeypatch):
    """What tensorstore says when it happens, and the half-written directory it leaves."""
    from orbax.checkpoint import v1 as ocp

    source, unfinished = hf(), tmp_path / ".out.unfinished"
    said = 'RESOURCE_EXHAUSTED: Failed writing "d/f5": No space left on device [os_error_code]'

    def full(path, tree):
        (unfinished / "params.partial_save.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
        raise ValueError(said)

    monkeypatch.setattr(ocp.partial, "save_async", full)
    with pytest.raises(CheckpointError, match=r"disk is full.*--resume"):
        run(source, tmp_path / "out", to="orbax")
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    run(source, tmp_path / "out", to="orbax", resume=True)
    assert sorted(os.listdir(tmp_path)) == ["hf", "out"]
    assert read(tmp_path / "out").fingerprint == read(source).fingerprint


def stop_after(monkeypatch, count, error):
    left = [count]

    def blocks(view, dtype):
        left[0] -= 1
        if left[0] < 0:
            raise error
        return conversion_blocks(view, dtype)

    conversion_blocks = hf_write.blocks
    monkeypatch.setattr(hf_write, "blocks", blocks)


def test_a_wrong_write_is_noticed(hf, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_write, "blocks", lambda view, dtype: [np.zeros(view.shape, dtype)])
    with pytest.raises(CheckpointError, match="differ from what was written"):
        run(hf(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refused_before_anything_is_written(hf, tmp_path, monkeypatch):
    source = hf()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="is there already"):
        run(source, tmp_path / "file")
    with pytest.raises(CheckpointError, match="is there already"):
        run(source, source)
    with pytest.raises(CheckpointError, match="was not written"):
        run(source, tmp_path / "file" / "out")
    with pytest.raises(ConfigError, match=r"'pickle'.*hf.*orbax"):
        run(source, tmp_path / "out", to="pickle")
    for size in ("5 apples", "0", "-3GB"):
        with pytest.raises(ConfigError, match="shard size"):
            run(source, tmp_path / "out", shard_size=size)
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"needs 111,232 bytes.*100 free"):
        run(source, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["file", "hf"]
    assert (tmp_path / "file").read_text() == "mine"


def test_one_conversion_at_a_time(hf, tmp_path):
    source = hf()
    (tmp_path / ".out.unfinished").mkdir()
    job = tmp_path / ".out.unfinished" / ".conversion.json"
    with job.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        pairs = open_checkpoint(source)
        wanted = {
            "source": str(source),
            "fingerprint": read(source).fingerprint,
            "to": "hf",
            "dtypes": ["float32"],
            "shard_size": 5_000_000_000,
        }
        assert pairs.format == "hf"
        file.write(json.dumps(wanted))
        file.flush()
        with pytest.raises(CheckpointError, match="another process"):
            run(source, tmp_path / "out", resume=True)
    run(source, tmp_path / "out", resume=True)


# When its manifest is damaged, Orbax leaves its other reads to a loop that is closed by then.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_orbax(hf, tmp_path):
    path = tmp_path / "there"
    run(hf(), path, to="orbax")

    def damaged(name, text, error, match):
        good = (path / name).read_bytes()
        (path / name).write_bytes(text)
        with pytest.raises(error, match=match):
            read(path)
        (path / name).write_bytes(good)

    damaged("alaya_checkpoint.json", b"{", CheckpointError, "damaged")
    damaged(
        "alaya_checkpoint.json",
        b'{"version": 9, "fingerprint": "", "dtype": ""}',
        CheckpointError,
        "version 9",
    )
    config = json.loads((path / "config.json").read_text())
    other = json.dumps(config | {"dtype": "float16"}).encode()
    damaged("config.json", other, ConfigError, "float16.*float32")
    wider = json.dumps(config | {"intermediate_size": 65}).encode()
    damaged("config.json", wider, CheckpointError, r"layers_0/mlp/gate/kernel.*needs \[32, 65\]")
    damaged("params/state/manifest.ocdbt", b"torn", CheckpointError, "cannot be restored")
    damaged("params/state/_METADATA", b"{", CheckpointError, "cannot be restored")
    assert read(path).config.vocab_size == 48


def test_save_checks_what_it_is_given(tiny_model, tmp_path):
    params = dict(tiny_model.params)
    del params["norm"]
    with pytest.raises(CheckpointError, match=r"'norm/scale'.*missing"):
        save(tmp_path / "out", tiny_model.config, params, progress=False)
    assert not list(tmp_path.iterdir())


def test_same_files_are_the_same(hf, tmp_path):
    """The progress bar changes nothing, and an existing empty directory may be filled."""
    source = hf()
    (tmp_path / "a").mkdir()
    convert(source, tmp_path / "a")
    run(source, tmp_path / "b")
    compared = filecmp.dircmp(tmp_path / "a", tmp_path / "b")
    assert not compared.diff_files + compared.left_only + compared.right_only
