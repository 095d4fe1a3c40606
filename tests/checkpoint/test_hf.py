"""HF directories: what is written is what is read, and every kind of damage is named."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from alaya_jax.checkpoint import convert, open_checkpoint, read_checkpoint
from alaya_jax.checkpoint.params import match
from alaya_jax.errors import AlayaError, CheckpointError, ConfigError, TokenizerError
from alaya_jax.sharding import ShardingRules, make_mesh

INDEX = "model.safetensors.index.json"


def read(path, **kwargs):
    return read_checkpoint(path, progress=False, **kwargs)


@pytest.mark.parametrize("shards", [0, 1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_round_trip(make_config, make_tensors, write_hf, as_params, assert_same, shards, dtype):
    config = make_config(dtype=np.dtype(dtype).name)
    tensors = make_tensors(config, dtype)
    checkpoint = read(write_hf(config, tensors, shards))
    assert checkpoint.config == config
    assert checkpoint.tokenizer is None
    assert_same(checkpoint.params, as_params(config, tensors))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_biases(make_config, make_tensors, write_hf, as_params, assert_same, tied):
    config = make_config(tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    tensors = make_tensors(config)
    assert_same(read(write_hf(config, tensors)).params, as_params(config, tensors))


def test_cast(make_config, make_tensors, write_hf, as_params, assert_same):
    config = make_config(dtype="bfloat16")
    tensors = make_tensors(config, ml_dtypes.bfloat16)
    path = write_hf(config, tensors)
    wide = {name: x.astype(np.float32) for name, x in tensors.items()}
    assert_same(read(path, dtype=jnp.float32).params, as_params(config, wide))
    with pytest.raises(ConfigError, match=r"int8.*float32"):
        read(path, dtype="int8")


def test_config_dtype_is_what_is_stored(make_config, make_tensors, write_hf):
    config = make_config(dtype="bfloat16")
    assert read(write_hf(config, make_tensors(config, np.float16))).config.dtype == "float16"


def test_harmless_extras(make_config, make_tensors, write_hf, as_params, assert_same):
    config = make_config(tie_word_embeddings=True)
    tensors = make_tensors(config)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    extra["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    assert_same(read(write_hf(config, tensors | extra)).params, as_params(config, tensors))


@pytest.mark.parametrize("axes", [{"tensor": 8}, {"data": 4, "tensor": 2}])
def test_sharded_equals_single(make_config, make_tensors, write_hf, as_params, assert_same, axes):
    config = make_config(num_attention_heads=8, num_key_value_heads=8, head_dim=4)
    tensors = make_tensors(config)
    params = read(write_hf(config, tensors, 2), mesh=make_mesh(**axes)).params
    assert_same(params, as_params(config, tensors))
    query = params["layers_1"]["attention"]["q"]["kernel"]
    assert len(query.sharding.device_set) == 8
    assert query.addressable_shards[0].data.shape == (32, 8 // axes["tensor"], 4)
    for leaf in jax.tree.leaves(params):
        assert len(leaf.sharding.device_set) == 8


def test_rules_and_mesh_that_do_not_fit(make_config, make_tensors, write_hf):
    config = make_config()  # 2 kv heads
    path, mesh = write_hf(config, make_tensors(config)), make_mesh(tensor=4)
    with pytest.raises(ConfigError, match="'kv_heads' of size 2"):
        read(path, mesh=mesh)
    key = read(path, mesh=mesh, rules=ShardingRules(kv_heads=None)).params["layers_0"]["attention"]
    assert key["k"]["kernel"].sharding.is_fully_replicated
    assert not key["q"]["kernel"].sharding.is_fully_replicated


def test_fingerprint(make_config, make_tensors, write_hf):
    config = make_config(vocab_size=4096)
    tensors = make_tensors(config)
    one = read(write_hf(config, tensors))
    again = read(write_hf(config, tensors, 3), dtype=jnp.bfloat16)
    assert one.fingerprint == again.fingerprint  # neither shards nor the run's dtype matter
    assert len(one.fingerprint) == 64
    tensors["lm_head.weight"][-1, -1] += 1
    other = read(write_hf(config, tensors))
    longer = read(write_hf(make_config(vocab_size=4096, max_position_embeddings=256), tensors))
    assert len({one.fingerprint, other.fingerprint, longer.fingerprint}) == 3


def resave(path, change):
    file = next(path.glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_every_mismatch_in_one_error(make_config, make_tensors, write_hf):
    path = write_hf(make_config(), make_tensors(make_config()))

    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.0.mlp.gate.weight"] = np.zeros((2, 2), np.float32)
        tensors["lm_head.weight"] = np.zeros((47, 32), np.float32)
        tensors["model.embed_tokens.weight"] = np.zeros((48, 32), np.int8)

    resave(path, change)
    with pytest.raises(CheckpointError) as error:
        read(path)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{path} cannot be loaded, 4 problems:"
    for words in (
        ["'model.norm.weight' [32] is missing"],
        ["'model.layers.0.mlp.gate.weight'", "belongs to no parameter"],
        ["'lm_head.weight' in model.safetensors", "[47, 32]", "vocab_size", "[48, 32]"],
        ["'model.embed_tokens.weight'", "stored as I8", "F32, F16 or BF16"],
    ):
        assert any(all(word in line for word in words) for line in lines), (words, lines)


def test_long_lists_are_cut(make_config, make_tensors, write_hf):
    config = make_config(num_hidden_layers=5)
    path = write_hf(config, make_tensors(config))
    gone = tuple(f"model.layers.{i}." for i in (1, 2, 3))
    resave(path, lambda t: [t.pop(name) for name in list(t) if name.startswith(gone)])
    with pytest.raises(CheckpointError, match=r"(?s)27 problems.*and 7 more") as error:
        read(path)
    assert len(str(error.value).splitlines()) == 22


def test_too_many_layers_to_list(make_config, make_tensors, write_hf):
    path = write_hf(make_config(), make_tensors(make_config()), num_hidden_layers=10**9)
    with pytest.raises(CheckpointError, match="1000000000 layers"):
        read(path)


def test_tied_head_that_differs(make_config, make_tensors, write_hf):
    config = make_config(tie_word_embeddings=True)
    tensors = make_tensors(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    with pytest.raises(CheckpointError, match=r"'lm_head.weight'.*differs.*tie_word_embeddings"):
        read(write_hf(config, tensors))


def test_missing_head_says_how_to_tie(make_config, make_tensors, write_hf):
    tensors = make_tensors(make_config())
    del tensors["lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"'lm_head.weight'.*set tie_word_embeddings"):
        read(write_hf(make_config(), tensors))


FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))


def edit_index(path, change):
    index = json.loads((path / INDEX).read_text())
    change(index["weight_map"])
    (path / INDEX).write_text(json.dumps(index))


def truncate(path, size):
    data = path.read_bytes()
    path.write_bytes(data[:size])


def rewrite_header(path, change):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def copy_tensor(source, target):
    name, value = next(iter(load_file(source).items()))
    save_file(load_file(target) | {name: value}, target)


def shift(header):
    last = max((k for k in header if k != "__metadata__"), key=lambda k: header[k]["data_offsets"])
    header[last]["data_offsets"][1] += 8


DAMAGE = {
    "shard missing": (lambda p: (p / SECOND).unlink(), f"{SECOND}: cannot be opened.*tensors"),
    "shard cut in the data": (lambda p: truncate(p / FIRST, -16), f"{FIRST}: is truncated: .* of "),
    "shard cut in the header": (lambda p: truncate(p / FIRST, 99), f"{FIRST}: .*in the header"),
    "shard of 5 bytes": (lambda p: truncate(p / FIRST, 5), f"{FIRST}: is truncated: 5 bytes"),
    "shard empty": (lambda p: truncate(p / FIRST, 0), f"{FIRST}: is truncated: 0 bytes"),
    "git-lfs pointer": (
        lambda p: (p / FIRST).write_text("version 1 of a pointer\noid sha256:0"),
        f"{FIRST}: .*git lfs pull",
    ),
    "header is no JSON": (
        lambda p: (p / FIRST).write_bytes((4).to_bytes(8, "little") + b"{]}{"),
        f"{FIRST}: has a damaged header",
    ),
    "header of petabytes": (
        lambda p: (p / FIRST).write_bytes(b"\xff" * 64),
        f"{FIRST}: is no safetensors file",
    ),
    "length contradicts shape": (
        lambda p: rewrite_header(p / FIRST, shift),
        f"{FIRST}: has a damaged header .*contradicts its shape",
    ),
    "trailing bytes": (
        lambda p: (p / FIRST).write_bytes((p / FIRST).read_bytes() + b"1234567"),
        f"{FIRST}: has 7 bytes after",
    ),
    "index names an absent tensor": (
        lambda p: edit_index(p, lambda m: m.update({"model.extra.weight": FIRST})),
        f"places tensor 'model.extra.weight' in {FIRST}, which lacks it",
    ),
    "index leaves the directory": (
        lambda p: edit_index(p, lambda m: m.update({"model.norm.weight": f"../{FIRST}"})),
        "places tensor 'model.norm.weight' in '../.*same directory",
    ),
    "index is no JSON": (lambda p: (p / INDEX).write_text("{"), f"{INDEX} cannot be read as JSON"),
    "index without a map": (lambda p: (p / INDEX).write_text("{}"), "has no 'weight_map'"),
    "tensor in two shards": (
        lambda p: copy_tensor(p / FIRST, p / SECOND),
        f"is in both {FIRST} and {SECOND}",
    ),
    "no config": (lambda p: (p / "config.json").unlink(), "no config.json"),
    "config is no JSON": (
        lambda p: (p / "config.json").write_text("nope"),
        "config.json cannot be read as JSON",
    ),
    "config is a list": (lambda p: (p / "config.json").write_text("[]"), "must hold a JSON object"),
    "no weights": (
        lambda p: [f.unlink() for f in p.glob("model*")],
        "has neither model.safetensors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(make_config, make_tensors, write_hf, damage):
    path = write_hf(make_config(), make_tensors(make_config()), 2)
    harm, message = DAMAGE[damage]
    harm(path)
    with pytest.raises(CheckpointError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)
    assert len(str(error.value).splitlines()) <= 4  # one cause, not every tensor it hits


def test_damaged_single_file_is_one_problem(make_config, make_tensors, write_hf):
    path = write_hf(make_config(), make_tensors(make_config()))
    truncate(path / "model.safetensors", -1)
    with pytest.raises(CheckpointError, match="is truncated") as error:
        read(path)
    assert len(str(error.value).splitlines()) == 2


def test_config_errors_name_the_file(make_config, make_tensors, write_hf):
    path = write_hf(make_config(), make_tensors(make_config()), rope_scaling={"type": "spiral"})
    with pytest.raises(ConfigError, match=r"config\.json: .*"):
        read(path)
    path = write_hf(make_config(), make_tensors(make_config()), hidden_size="wide", head_dim=None)
    with pytest.raises(ConfigError, match=r"config\.json: .*'hidden_size' = 'wide'"):
        read(path)


def test_two_sets_of_weights(make_config, make_tensors, write_hf):
    """Loaders differ in which they take, so neither is."""
    path = write_hf(make_config(), make_tensors(make_config()), 3)
    save_file(make_tensors(make_config()), path / "model.safetensors")
    both = r"two sets of weights, model\.safetensors and .*model\.safetensors\.index\.json"
    with pytest.raises(CheckpointError, match=both):
        read(path)
    (path / INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"two sets.*model-00001-of-00003.*and.*model\.saf"):
        read(path)


def test_orbax_and_safetensors_in_one_folder(make_config, make_tensors, write_hf, tmp_path):
    path = write_hf(make_config(), make_tensors(make_config()))
    convert(path, tmp_path / "orbax", to="orbax", progress=False)
    (path / "model.safetensors").rename(tmp_path / "orbax" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"two sets of weights, params/ and model\.saf"):
        read(tmp_path / "orbax")


def test_an_adapter_is_no_model(make_config, make_tensors, write_hf):
    path = write_hf(make_config(), make_tensors(make_config()))
    (path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    merge = r"LoRA adapter.*some/base.*merge_and_unload"
    with pytest.raises(CheckpointError, match=merge):  # leaving it out would be another model
        read(path)
    (path / "model.safetensors").rename(path / "adapter_model.safetensors")
    (path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=merge):
        read(path)


def test_pickles_are_pointed_out(make_config, make_tensors, write_hf):
    path = write_hf(make_config(), make_tensors(make_config()))
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"holds pytorch_model\.bin.*save_pretrained"):
        read(path)


def test_damaged_tokenizer_is_refused(make_config, make_tensors, write_hf):
    path = write_hf(make_config(), make_tensors(make_config()))
    (path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        read(path)


def test_fuzzed_headers_never_escape(make_config, make_tensors, write_hf, rng):
    config = make_config(num_hidden_layers=1)
    path = write_hf(config, make_tensors(config))
    file = path / "model.safetensors"
    good = file.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    refused = 0
    for _ in range(300):
        data = bytearray(good)
        for at in rng.integers(0, header, rng.integers(1, 4)):
            data[at] = rng.integers(256)
        file.write_bytes(data)
        try:
            match(open_checkpoint(path))
        except AlayaError:
            refused += 1
    assert refused > 200
