"""GGUF files as written here, read by the format's own library and by ours."""

import dataclasses
import errno
import json
import os

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Quant
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from alaya_jax.checkpoint import convert, gguf_write, open_checkpoint, read_checkpoint, save, verify
from alaya_jax.errors import CheckpointError, ConfigError
from alaya_jax.models import bpe
from alaya_jax.models.chat import ChatTemplate
from alaya_jax.models.config import RopeConfig
from alaya_jax.models.tokenizer import Tokenizer
from alaya_jax.sharding import make_mesh

TEXT = "We the People, in 1789 — naïve 你好 <|im_start|>user\n\tend<|im_end|>"


def run(source, path, to="gguf-f32", **kwargs):
    return convert(source, path, to=to, progress=False, **kwargs)


def read(path, **kwargs):
    return read_checkpoint(path, progress=False, **kwargs)


def tensors_of(path):
    reader = gguf.GGUFReader(path)
    return {t.name: (t.tensor_type, t.shape.tolist(), bytes(t.data)) for t in reader.tensors}


@pytest.mark.parametrize(
    ("to", "kind", "changes"),
    [
        ("gguf-f32", Quant.F32, {"attention_bias": True, "mlp_bias": True}),
        ("gguf-f16", Quant.F16, {"tie_word_embeddings": True}),
        ("gguf-bf16", Quant.BF16, {"num_key_value_heads": 4}),
    ],
)
def test_gguf_to_hf_to_gguf_is_bit_equal(
    make_config, make_tensors, write_gguf, tmp_path, to, kind, changes
):
    """The first file is written by the test, its rows of q and k ordered by the test."""
    config = make_config(**changes)
    tensors = make_tensors(config)
    for name, values in tensors.items():  # float32 in the file, but of the model's type, as made
        if values.ndim == 1:
            half = {Quant.F16: np.float16, Quant.BF16: ml_dtypes.bfloat16}.get(kind, np.float32)
            tensors[name] = values.astype(half).astype(np.float32)
    source = write_gguf(config, tensors, kind)
    run(source, tmp_path / "hf", to="hf")
    done = run(tmp_path / "hf", tmp_path / "back.gguf", to=to)
    assert tensors_of(tmp_path / "back.gguf") == tensors_of(source)
    opened = open_checkpoint(tmp_path / "back.gguf")
    assert opened.config == open_checkpoint(source).config
    assert done.fingerprint == read(tmp_path / "back.gguf").fingerprint
    assert done.fingerprint == read(source).fingerprint
    assert sorted(os.listdir(tmp_path)) == ["back.gguf", "hf", source.name]


def test_orbax_and_a_cast(make_config, make_tensors, write_hf, tmp_path):
    config = make_config()
    source = write_hf(config, make_tensors(config))
    run(source, tmp_path / "orbax", to="orbax")
    run(tmp_path / "orbax", tmp_path / "half.gguf", to="gguf-bf16")
    found = verify(source, tmp_path / "half.gguf", logits=False, progress=False)
    assert found.same
    assert {d.relation for d in found.differences} == {"rounded to bfloat16"}
    assert found.equal == 5  # the norms
    types = {name: kind for name, (kind, *_) in tensors_of(tmp_path / "half.gguf").items()}
    assert {k for n, k in types.items() if "norm" in n} == {Quant.F32}
    assert {k for n, k in types.items() if "norm" not in n} == {Quant.BF16}


YARN = RopeConfig("yarn", factor=4.0, original_max_position_embeddings=32)
ROPES = {
    "default": RopeConfig(theta=123_456.0),
    "linear": RopeConfig("linear", factor=4.0),
    "llama3": RopeConfig(
        "llama3", 500_000.0, factor=8.0, low_freq_factor=1.0, original_max_position_embeddings=64
    ),
    "yarn": YARN,
    "yarn that shortens": dataclasses.replace(YARN, factor=0.5, attention_factor=1.0),
    "yarn with a factor": RopeConfig(
        "yarn", factor=4.0, original_max_position_embeddings=32, attention_factor=1.25
    ),
}


@pytest.mark.parametrize("name", ROPES)
def test_config_is_read_back(make_config, make_tensors, write_hf, tmp_path, name):
    config = make_config(
        rope=ROPES[name], rms_norm_eps=1e-6, bos_token_id=3, eos_token_ids=(5, 7), head_dim=32
    )
    source = write_hf(config, make_tensors(config))
    run(source, tmp_path / "a.gguf")
    got = open_checkpoint(tmp_path / "a.gguf").config
    assert got == config


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope": RopeConfig("dynamic", factor=2.0)}, "rope = "),
        (
            {
                "rope": RopeConfig(
                    "llama3", factor=8.0, low_freq_factor=2.0, original_max_position_embeddings=64
                )
            },
            "no llama3 scaling",
        ),
        (
            {
                "rope": RopeConfig(
                    "yarn", factor=4.0, original_max_position_embeddings=32, mscale=0.7
                )
            },
            "rope = .*mscale=0.7",
        ),
        ({"rope": dataclasses.replace(YARN, beta_fast=16.0)}, "rope = .*beta_fast=16.0"),
        ({"rope": dataclasses.replace(YARN, beta_slow=2.0)}, "rope = .*beta_slow=2.0"),
        ({"rope": dataclasses.replace(YARN, truncate=False)}, "rope = .*truncate=False"),
        ({"eos_token_ids": (1, 2, 3, 4)}, r"room for 3 ids.*\[1, 2, 3, 4\]"),
    ],
    ids=["dynamic", "llama3", "mscale", "beta_fast", "beta_slow", "truncate", "ends"],
)
def test_what_gguf_cannot_say(make_config, make_tensors, write_hf, tmp_path, changes, said):
    config = make_config(**changes)
    source = write_hf(config, make_tensors(config))
    with pytest.raises(ConfigError, match=rf"(?s)GGUF .*{said}.*--to hf"):
        run(source, tmp_path / "a.gguf")
    assert not list(tmp_path.glob("*.gguf"))
    assert not list(tmp_path.glob(".*"))


def test_the_factor_of_yarn_is_where_llama_cpp_looks(make_config, make_tensors, write_hf, tmp_path):
    """It multiplies `attn_factor` with what YaRN computes, and reads no `yarn_*` key of a llama."""
    config = make_config(rope=ROPES["yarn with a factor"])
    run(write_hf(config, make_tensors(config)), tmp_path / "a.gguf")
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    assert not [key for key in fields if "yarn_" in key]
    factor = fields["llama.rope.scaling.attn_factor"].contents()
    assert factor * (0.1 * np.log(4.0) + 1.0) == pytest.approx(1.25, rel=1e-6)


@pytest.mark.parametrize("to", ["gguf-f16", "gguf-bf16"])
def test_biases_do_not_hide_the_type_of_the_matrices(
    make_config, make_tensors, write_hf, tmp_path, to
):
    config = make_config(attention_bias=True, mlp_bias=True)
    source = write_hf(config, make_tensors(config))
    assert run(source, tmp_path / "a.gguf", to=to).dtype == gguf_write.matrix_dtype(to)
    assert verify(source, tmp_path / "a.gguf", logits=False, progress=False).same
    for made in ("hf", "orbax"):
        done = run(source, tmp_path / made, to=made, dtype="bfloat16")
        assert done.dtype == read(tmp_path / made).config.dtype == "bfloat16"


def make_tokenizer(cut, *, normalizer=None, ignore_merges=False, template=None):
    backend = Backend(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = cut
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(x, special=True) for x in ("<|im_start|>", "<|im_end|>")],
        show_progress=False,
    )
    backend.train_from_iterator(["We the People of 1789, the end"] * 9, trainer)
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    chat = template and ChatTemplate(template)
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    return Tokenizer(backend, named_tokens=named, chat=chat)


@pytest.fixture
def with_tokenizer(make_config, make_tensors, as_params, tmp_path):
    def make(tokenizer, vocab_size, **changes):
        config = make_config(vocab_size=vocab_size, **changes)
        params = as_params(config, make_tensors(config))
        save(tmp_path / "hf", config, params, tokenizer, to="hf", progress=False)
        return tmp_path / "hf"

    return make


def split_cut(pattern):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


# As the models' own tokenizer.json spell them.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + _WORDS + r"\p{N}{1,3}" + _REST
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + _WORDS + r"\p{N}" + _REST
CUTS = {
    "gpt-2": lambda: (pre_tokenizers.ByteLevel(add_prefix_space=False), {}),
    "smollm": lambda: (
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        {},
    ),
    "llama-bpe": lambda: (split_cut(LLAMA3), {"ignore_merges": True}),
    "qwen2": lambda: (split_cut(QWEN2), {"normalizer": normalizers.NFC()}),
}


@pytest.mark.parametrize("pre", CUTS)
def test_tokenizer_goes_along(with_tokenizer, tmp_path, pre):
    cut, options = CUTS[pre]()
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer = make_tokenizer(cut, template=template, **options)
    size = tokenizer.vocab_size
    hf = with_tokenizer(tokenizer, size, bos_token_id=0, eos_token_ids=(1,))
    run(hf, tmp_path / "a.gguf")
    opened = open_checkpoint(tmp_path / "a.gguf")
    assert opened.gguf_tokenizer["tokenizer.ggml.pre"] == pre
    got = opened.read_tokenizer()
    assert got.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
    plain = {"allow_special": False}
    assert got.encode(TEXT, **plain).tolist() == tokenizer.encode(TEXT, **plain).tolist()
    assert got.chat.sources == tokenizer.chat.sources
    assert got.special_ids == tokenizer.special_ids
    found = verify(hf, tmp_path / "a.gguf", logits=False, progress=False)
    assert found.same, str(found)
    # And on to another file as it is, with the name it was given there.
    run(tmp_path / "a.gguf", tmp_path / "b.gguf", gguf_pre="refact" if pre == "smollm" else None)
    again = open_checkpoint(tmp_path / "b.gguf").gguf_tokenizer
    assert again["tokenizer.ggml.pre"] == ("refact" if pre == "smollm" else pre)
    assert again | {"tokenizer.ggml.pre": pre} == opened.gguf_tokenizer


def test_every_known_name_is_found_again():
    for name in bpe.PRES:
        letters = list(bpe.byte_alphabet())
        tokenizer = Tokenizer(bpe.byte_level_bpe(letters, [], name))
        state = json.loads(tokenizer.to_json())
        found = bpe.known_pre(
            state["pre_tokenizer"],
            state["normalizer"],
            ignore_merges=state["model"]["ignore_merges"],
        )
        cut = {n: bpe._PRE_TOKENIZERS[n] for n in (found, name)}
        assert cut[found] is cut[name]


@pytest.mark.parametrize(
    ("cut", "options"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=True), {}),
        (pre_tokenizers.ByteLevel(add_prefix_space=False), {"ignore_merges": True}),
        (pre_tokenizers.ByteLevel(add_prefix_space=False), {"normalizer": normalizers.NFC()}),
        (split_cut(LLAMA3.replace("1,3", "1,2")), {"ignore_merges": True}),
    ],
    ids=["prefix", "merges", "nfc", "pattern"],
)
def test_a_cut_without_a_name(with_tokenizer, tmp_path, cut, options):
    tokenizer = make_tokenizer(cut, **options)
    hf = with_tokenizer(tokenizer, tokenizer.vocab_size)
    with pytest.raises(ConfigError, match=r"(?s)no name that is known.*--gguf-pre NAME.*llama-bpe"):
        run(hf, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()
    run(hf, tmp_path / "a.gguf", gguf_pre="mine")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert reader.fields["tokenizer.ggml.pre"].contents() == "mine"


def test_bos_ends_and_ids_without_a_token(with_tokenizer, tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False))
    backend = Backend.from_str(tokenizer.to_json())
    backend.post_processor = TemplateProcessing(
        single=["<|im_start|>", "$A"], pair=["$A", "$B"], special_tokens=[("<|im_start|>", 0)]
    )
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    tokenizer = Tokenizer(backend, named_tokens=named, eos_ids=[4])
    size = tokenizer.vocab_size + 3
    hf = with_tokenizer(tokenizer, size, bos_token_id=0, eos_token_ids=(9, 1))
    run(hf, tmp_path / "a.gguf")
    opened = open_checkpoint(tmp_path / "a.gguf")
    got = opened.read_tokenizer()
    assert got.encode("the end").tolist() == [0, *tokenizer.encode("the end").tolist()[1:]]
    assert opened.config.eos_token_ids == got.eos_ids == (1, 9, 4)
    kept = opened.gguf_tokenizer
    assert kept["tokenizer.ggml.tokens"][-1] == f"[PAD{size - 1}]"
    assert kept["tokenizer.ggml.token_type"][-1] == bpe.TokenType.UNUSED


def test_a_sentencepiece_tokenizer_is_carried_or_refused(with_tokenizer, tmp_path):
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "t", "h", "▁t"]
    kinds = [2, 3, 3, *[6] * 256, 1, 1, 1, 1]
    scores = [0.0] * 259 + [-1.0, -2.0, -3.0, -4.0]
    backend = bpe.sentencepiece_bpe(pieces, scores, kinds, unk="<unk>")
    hf = with_tokenizer(Tokenizer(backend), len(pieces))
    with pytest.raises(ConfigError, match=r"(?s)sentencepiece.*from a GGUF file.*--to hf"):
        run(hf, tmp_path / "a.gguf")


def test_refused(make_config, make_tensors, write_hf, tmp_path):
    config = make_config()
    source = write_hf(config, make_tensors(config))
    with pytest.raises(ConfigError, match="dtype is in the name"):
        run(source, tmp_path / "a.gguf", dtype="float16")
    with pytest.raises(ConfigError, match="gguf_pre belongs to GGUF"):
        run(source, tmp_path / "a", to="hf", gguf_pre="gpt-2")
    with pytest.raises(ConfigError, match=r"--gguf-pre gpt-2 .* there is none"):
        run(source, tmp_path / "a.gguf", gguf_pre="gpt-2")
    mesh = make_mesh(tensor=2)
    with pytest.raises(ConfigError, match="mesh is for Orbax"):
        run(source, tmp_path / "a.gguf", mesh=mesh)


def test_whole_or_not_at_all(make_config, make_tensors, write_hf, tmp_path, monkeypatch):
    config = make_config(dtype="float32")
    source = write_hf(config, make_tensors(config))
    run(source, tmp_path / "unbroken.gguf")
    left = [10]

    def full(view, dtype):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return cast(view, dtype)

    cast = gguf_write.cast
    monkeypatch.setattr(gguf_write, "cast", full)
    with pytest.raises(CheckpointError, match=r"disk is full.*--resume"):
        run(source, tmp_path / "out.gguf")
    monkeypatch.undo()
    assert not (tmp_path / "out.gguf").exists()
    run(source, tmp_path / "out.gguf", resume=True)
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "unbroken.gguf").read_bytes()
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(CheckpointError, match="is there already"):
        run(source, tmp_path / "out.gguf")
    monkeypatch.setattr(gguf_write, "cast", lambda view, dtype: np.zeros(view.shape, dtype))
    with pytest.raises(CheckpointError, match="differ from what was written"):
        run(source, tmp_path / "wrong.gguf")
    assert not (tmp_path / "wrong.gguf").exists()


def test_values_that_do_not_fit_are_counted(make_config, make_tensors, write_hf, tmp_path):
    config = make_config()
    tensors = make_tensors(config)
    tensors["lm_head.weight"][:2, 0] = 1e30, np.nan
    done = run(write_hf(config, tensors), tmp_path / "a.gguf", to="gguf-f16")
    assert done.nonfinite == {"lm_head.weight": 2}
    params = read(tmp_path / "a.gguf").params
    assert params["lm_head"]["kernel"].dtype == jax.numpy.float16
    assert ml_dtypes.bfloat16 not in {x.dtype for x in jax.tree.leaves(params)}
