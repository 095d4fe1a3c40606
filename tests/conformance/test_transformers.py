"""The same weights give transformers' logits; make_goldens.py, beside this, made the goldens."""

import functools
import json
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax.checkpoint import bundled, read_checkpoint
from alaya_jax.models import llama, rope
from alaya_jax.models.config import LlamaConfig, RopeType

GOLDENS = Path(__file__).resolve().parents[1] / "data" / "goldens"
TOLERANCE = 2e-4  # absolute, on logits; float32

# Every golden directory must be named here: one that is lost, or added and not tested, fails.
FLOAT32 = [
    "biases_gqa3",
    "default_gqa1",
    "dynamic_gqa4",
    "head_dim_gqa2_tied",
    "linear_gqa3_tied",
    "llama3_gqa4_sharded",
    "yarn_gqa8",
    "yarn_mscale_tied",
]
BF16 = "bf16_gqa4"


@functools.partial(jax.jit, static_argnums=(1, 3))
def forward(params, config, tokens, rope_length):
    """Logits [B,T,V] of whole sequences, by full causal attention."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return llama.forward(
        params, config, tokens, positions, llama.causal_attend, rope_length=rope_length
    )[0]


def logits_of(checkpoint, ids: np.ndarray) -> np.ndarray:
    # transformers works dynamic frequencies out for the length it is given in one call.
    logits = forward(checkpoint.params, checkpoint.config, jnp.asarray(ids), ids.shape[1])
    assert logits.dtype == jnp.float32
    return np.asarray(logits)


def load(name: str, dtype=None):
    return read_checkpoint(GOLDENS / name, dtype=dtype, progress=False)


def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / name / "logits.npz") as file:
        return dict(file)


def read_json(*path: str):
    return json.loads(GOLDENS.joinpath(*path).read_text())


def test_all_goldens_are_tested() -> None:
    found = {path.parent.name for path in GOLDENS.glob("*/config.json")}
    assert found == {*FLOAT32, BF16}


def test_goldens_cover_what_is_promised() -> None:
    """RoPE types beyond their original length, ratios H/K, tied and untied, biases."""
    configs = {name: LlamaConfig.from_hf(read_json(name, "config.json")) for name in FLOAT32}
    assert {c.rope.rope_type for c in configs.values()} == set(get_args(RopeType))
    assert {1, 3, 4, 8} <= {c.group_size for c in configs.values()}
    assert {c.tie_word_embeddings for c in configs.values()} == {True, False}
    assert any(c.attention_bias and c.mlp_bias for c in configs.values())
    assert any(c.head_dim * c.num_attention_heads != c.hidden_size for c in configs.values())
    lost = {name: line.get("if_rope_scaling_were_lost") for name, line in sanity()["tiny"].items()}
    for name, config in configs.items():
        if config.rope.rope_type == "default":
            continue
        length = arrays(name)["ids"].shape[1]
        original = {"dynamic": config.max_position_embeddings, "linear": 64}.get(
            config.rope.rope_type, config.rope.original_max_position_embeddings
        )
        assert length > 2 * original
        assert lost[name] > 1.0, "the golden would not notice a lost RoPE scaling"


def sanity() -> dict:
    return read_json("sanity.json")


@pytest.mark.smoke
@pytest.mark.parametrize("name", FLOAT32)
def test_float32_logits_equal(name: str) -> None:
    golden = arrays(name)
    logits = logits_of(load(name), golden["ids"])
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", [*FLOAT32, BF16])
def test_both_spellings_of_a_config_mean_the_same(name: str) -> None:
    """`rope_parameters`, or `rope_theta` with `rope_scaling`: transformers gave equal logits."""
    spellings = [read_json(name, file) for file in ("config.json", "config.other.json")]
    assert sorted("rope_parameters" in spelling for spelling in spellings) == [False, True]
    first, second = (LlamaConfig.from_hf(spelling) for spelling in spellings)
    assert first == second


def test_bf16_weights_in_float32_equal() -> None:
    golden = arrays(BF16)
    logits = logits_of(load(BF16, jnp.float32), golden["ids"])
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=TOLERANCE)


def test_bf16_logits_within_bf16_rounding() -> None:
    """The bf16 run is as far from the float32 run of the same weights as rounding makes it.

    transformers' own bf16 run is a sample of that rounding: its distance from float32 (root mean
    square and largest of all T x V logits) is the yardstick. A run that rounds at as many places
    draws its errors from the same distribution, and the errors of a row are correlated, so that
    there are some hundred independent draws: a factor 1.5 covers what two root mean squares differ
    by, and 2 the largest. The yardstick is checked too: bfloat16 keeps 8 significant bits (one
    rounding: relative error up to 2**-9, evenly spread, so rms 2**-9 / sqrt(3)), and some 30
    roundings lie between a token and its logits in two layers, so it must be near sqrt(30) times
    that of the logits' standard deviation, within a factor 4.
    """
    golden = arrays(BF16)
    checkpoint = load(BF16)
    assert {leaf.dtype for leaf in jax.tree.leaves(checkpoint.params)} == {jnp.dtype(jnp.bfloat16)}
    ours = logits_of(checkpoint, golden["ids"]) - golden["logits"]
    theirs = golden["logits_bf16"] - golden["logits"]

    def rms(x):
        return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))

    expected = np.sqrt(30) * 2**-9 / np.sqrt(3) * golden["logits"].std()
    assert expected / 4 < rms(theirs) < expected * 4
    assert rms(ours) < 1.5 * rms(theirs)
    assert np.abs(ours).max() < 2 * np.abs(theirs).max()


@pytest.mark.smoke
@pytest.mark.parametrize("golden", read_json("rope.json"), ids=lambda golden: golden["name"])
def test_rope_frequencies_equal(golden: dict) -> None:
    fields = {"vocab_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, **golden["config"]}
    config = LlamaConfig.from_hf(fields)
    inv_freq, attention_factor = rope.inverse_frequencies(config, golden["sequence_length"])
    assert inv_freq.dtype == np.float32
    # theirs are computed in float32: a power of theta is off by some units in the last place
    np.testing.assert_allclose(inv_freq, golden["inv_freq"], rtol=2e-6)
    assert attention_factor == pytest.approx(golden["attention_factor"], rel=1e-12)


@pytest.fixture(scope="module")
def smollm2():
    if bundled.find("smollm2-135m") is None:
        pytest.skip("SmolLM2 is not on this machine: `make install`, or `alaya fetch smollm2-135m`")
    return read_checkpoint("smollm2-135m", dtype=jnp.float32, progress=False)


@pytest.mark.slow
def test_smollm2_logits_equal_at_1024_tokens(smollm2) -> None:
    """At every position: 64 columns, the largest logit and where it is, log-sum-exp of all 49,152.

    The log-sum-exp cannot move by more than the largest change of a logit. Four positions in full.
    """
    golden = arrays("smollm2")
    logits = logits_of(smollm2, golden["ids"][None])[0]
    assert logits.shape == (1024, 49152)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=TOLERANCE)
    close(logits[:, golden["columns"]], golden["logits_columns"])
    close(logits.max(axis=1), golden["max"])
    close(logits[golden["positions"]], golden["logits"])
    close(np.logaddexp.reduce(logits.astype(np.float64), axis=1), golden["logsumexp"])
    # two logits may each move by the tolerance; where the best leads by more, it must stay the best
    sure = golden["margin"] > 2 * TOLERANCE
    assert sure.mean() > 0.99
    np.testing.assert_array_equal(logits.argmax(axis=1)[sure], golden["argmax"][sure])


@pytest.mark.slow
@pytest.mark.parametrize("golden", read_json("smollm2", "greedy.json"), ids=lambda g: g["name"])
def test_smollm2_greedy_tokens_equal(smollm2, golden: dict) -> None:
    """Fed transformers' greedy continuation, every next best token is its next token."""
    assert min(golden["margins"]) > 2 * TOLERANCE, "a tie: the golden decides nothing"
    ids, tokens = golden["ids"], golden["tokens"]
    sequence = np.array([ids + tokens[:-1]])
    length = -(-sequence.shape[1] // 128) * 128  # few shapes to compile; what follows is not seen
    logits = logits_of(smollm2, np.pad(sequence, ((0, 0), (0, length - sequence.shape[1]))))[0]
    best = logits[len(ids) - 1 : sequence.shape[1]].argmax(axis=1)
    assert best.tolist() == tokens
    if golden["stops_at_eos"] and len(tokens) < golden["max_new_tokens"]:
        assert tokens[-1] in smollm2.config.eos_token_ids


@pytest.fixture(scope="module")
def database(smollm2, tmp_path_factory):
    model = aj.Model(smollm2.config, smollm2.params, smollm2.tokenizer, smollm2.fingerprint)
    return aj.DB(tmp_path_factory.mktemp("db"), model, aj.Budget(device="128MiB"))


@pytest.mark.slow
@pytest.mark.parametrize("golden", read_json("smollm2", "greedy.json"), ids=lambda g: g["name"])
def test_smollm2_generates_the_same_tokens(database, golden: dict) -> None:
    """Through the database: prefill in chunks, paged cache, many decode steps a device call."""
    assert min(golden["margins"]) > 2 * TOLERANCE, "a tie: the golden decides nothing"
    sampling = aj.Greedy(ignore_eos=not golden["stops_at_eos"])
    session, rest = database.create_session(golden["ids"])
    with session:
        count = golden["max_new_tokens"]
        generation = aj.generate(session, rest, max_new_tokens=count, sampling=sampling)
        ids = [token.id for token in generation]
    at_eos = golden["stops_at_eos"] and len(golden["tokens"]) < count
    assert ids == (golden["tokens"][:-1] if at_eos else golden["tokens"])
    assert generation.finish_reason == ("eos" if at_eos else "length")


@pytest.mark.slow
@pytest.mark.parametrize("golden", read_json("smollm2", "greedy.json"), ids=lambda g: g["name"])
def test_smollm2_prompts_are_tokenized_and_rendered_alike(smollm2, golden: dict) -> None:
    tokenizer = smollm2.tokenizer
    text = golden.get("text")
    if text is None:
        text = tokenizer.chat.render(golden["messages"])
        assert text == golden["rendered"]
    ids = tokenizer.encode(text, add_special_tokens="messages" not in golden)
    assert ids.tolist() == golden["ids"]
    assert tokenizer.decode(golden["tokens"]) == golden["continuation"]
