"""Sampling against distributions that numpy computes in float64 by sorting."""

import dataclasses
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from scipy import stats

from alaya_jax.errors import RequestError
from alaya_jax.runtime.sampling.params import Greedy, Sampling, StopText
from alaya_jax.runtime.sampling.sampler import init_sampler, kind_of, process_logits, sample

step = jax.jit(sample, static_argnums=0)
process = jax.jit(process_logits, static_argnums=0)


def expected(logits, sampling, prompt=(), output=()):
    """Probabilities [V] after every step, float64: penalties, bias, temperature, k, p, min-p."""
    x = np.array(logits, np.float64)
    for i in {*prompt, *output}:
        x[i] = (
            x[i] / sampling.repetition_penalty if x[i] > 0 else x[i] * sampling.repetition_penalty
        )
    for i in output:
        x[i] -= sampling.frequency_penalty
    for i in set(output):
        x[i] -= sampling.presence_penalty
    for i, b in sampling.logit_bias:
        x[i] += b
    if sampling.temperature == 0:
        return np.eye(len(x))[np.argmax(x)]
    x = x / sampling.temperature
    p = np.exp(x - x.max())
    order = np.argsort(-p, kind="stable")
    if sampling.top_k:
        p[order[sampling.top_k :]] = 0
    p /= p.sum()
    if sampling.top_p < 1:
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= sampling.top_p]] = 0
    p[p < sampling.min_p * p.max()] = 0
    return p / p.sum()


def processed(logits, sampling, prompt=(), output=(), beside=()):
    """The distribution `sample` draws from, after `output` was generated, with others `beside`."""
    batch = 1 + len(beside)
    processors, state = init_sampler([sampling, *beside], [list(prompt)] * batch, len(logits))
    if state.counts is not None:
        counts = np.bincount(np.array(output, int), minlength=len(logits))
        counts = jnp.tile(jnp.asarray(counts, jnp.int32), (batch, 1))
        state = dataclasses.replace(state, counts=counts)
    rows = jnp.tile(jnp.asarray(logits, jnp.float32), (batch, 1))
    scores = process(processors, state, rows)[0]
    if sampling.temperature == 0:
        return np.eye(len(logits))[int(jnp.argmax(scores))]
    return np.asarray(jax.nn.softmax(scores), np.float64)


LOGITS = [2.0, -1.0, 0.5, 3.0, 0.0, -2.5, 1.5, 2.0]
PROMPT, OUTPUT = [3, 5, 3], [0, 6, 0, 0, 4]


@pytest.mark.smoke
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.3),
        Sampling(temperature=7.0),
        Sampling(top_k=1),
        Sampling(top_k=3),  # 2.0 stands at ids 0 and 7
        Sampling(top_k=2),  # ... and here only id 0 is kept
        Sampling(top_k=100),
        Sampling(top_p=0.5),
        Sampling(top_p=0.75),
        Sampling(top_p=1e-6),
        Sampling(min_p=0.1),
        Sampling(min_p=1.0),
        Sampling(repetition_penalty=1.7),
        Sampling(repetition_penalty=0.6),
        Sampling(presence_penalty=1.1),
        Sampling(frequency_penalty=0.7),
        Sampling(frequency_penalty=-0.7, presence_penalty=-2.0),
        Sampling(logit_bias={3: -4.0, 1: 2.5}),
        Sampling(logit_bias={3: -math.inf}),
        Sampling(temperature=0.8, top_k=5, top_p=0.8, min_p=0.05),
        Sampling(temperature=1.6, top_k=6, top_p=0.9, min_p=0.2, repetition_penalty=1.2),
        Sampling(
            temperature=1.3,
            top_k=6,
            top_p=0.93,
            min_p=0.02,
            repetition_penalty=1.3,
            presence_penalty=0.4,
            frequency_penalty=0.2,
            logit_bias={1: 3.0, 2: -math.inf},
        ),
        Greedy(),
        Greedy(repetition_penalty=2.0),
        Greedy(frequency_penalty=2.0, logit_bias={3: -2.0}),
    ],
    ids=repr,
)
def test_distribution(sampling):
    want = expected(LOGITS, sampling, PROMPT, OUTPUT)
    got = processed(LOGITS, sampling, PROMPT, OUTPUT)
    np.testing.assert_array_equal(got > 0, want > 0)
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-9)


def test_distribution_by_hand():
    """The reference above, on numbers small enough to do in the head."""
    thirds = np.log([4.0, 2.0, 1.0, 1.0])
    np.testing.assert_allclose(
        processed(thirds, Sampling(top_k=2)), [2 / 3, 1 / 3, 0, 0], rtol=1e-6
    )
    np.testing.assert_allclose(
        processed(thirds, Sampling(top_p=0.7)), [2 / 3, 1 / 3, 0, 0], rtol=1e-6
    )
    np.testing.assert_allclose(
        processed(thirds, Sampling(top_p=0.8)), [4 / 7, 2 / 7, 1 / 7, 0], rtol=1e-6
    )
    np.testing.assert_allclose(
        processed(thirds, Sampling(min_p=0.4)), [2 / 3, 1 / 3, 0, 0], rtol=1e-6
    )
    # top-k first leaves 2/3 and 1/3, so p = 0.6 needs one token; alone it would need two.
    np.testing.assert_allclose(processed(thirds, Sampling(top_k=2, top_p=0.6)), [1, 0, 0, 0])
    np.testing.assert_allclose(
        processed(thirds, Sampling(temperature=0.5)), np.array([16, 4, 1, 1]) / 22, rtol=1e-6
    )
    np.testing.assert_allclose(
        processed(thirds, Sampling(frequency_penalty=math.log(2)), output=[0, 0]),
        np.array([1, 2, 1, 1]) / 5,
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(seed=1),
        Sampling(temperature=0.7, top_k=5, seed=2),
        Sampling(temperature=1.5, top_p=0.8, min_p=0.1, seed=3),
        Sampling(logit_bias={3: -2.0}, seed=4),
    ],
    ids=repr,
)
def test_samples_follow_the_distribution(sampling):
    """Pearson's chi-square; a right sampler fails with probability 1e-6 over the seeds."""
    batch, steps = 2000, 10
    each = [dataclasses.replace(sampling, seed=sampling.seed * batch + i) for i in range(batch)]
    processors, state = init_sampler(each, [[]] * batch, len(LOGITS))
    logits = jnp.tile(jnp.asarray(LOGITS), (batch, 1))
    seen = np.zeros(len(LOGITS))
    for _ in range(steps):
        token, *_, state = step(processors, state, logits)
        seen += np.bincount(np.asarray(token), minlength=len(LOGITS))
    want = expected(LOGITS, sampling) * batch * steps
    assert not seen[want == 0].any()
    assert want[want > 0].min() >= 5, "too few samples for the chi-square approximation"
    statistic = ((seen - want)[want > 0] ** 2 / want[want > 0]).sum()
    assert statistic < stats.chi2.isf(1e-6, (want > 0).sum() - 1)


def test_steps_of_one_sequence_are_independent():
    """Pairs of consecutive tokens: chi-square with failure probability 1e-6 over the seed."""
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.2]]))
    processors, state = init_sampler(Sampling(seed=11), [[]], 3)

    def body(state, _):
        token, *_, state = sample(processors, state, logits)
        return state, token[0]

    tokens = np.asarray(lax.scan(body, state, length=6000)[1]).reshape(-1, 2)
    seen = np.bincount(tokens @ [3, 1], minlength=9)
    want = np.outer([0.5, 0.3, 0.2], [0.5, 0.3, 0.2]).ravel() * len(tokens)
    assert ((seen - want) ** 2 / want).sum() < stats.chi2.isf(1e-6, 8)


MIXED = [
    Sampling(temperature=0.9, seed=7),
    Greedy(frequency_penalty=0.5, logprobs=3),
    Sampling(temperature=1.4, top_p=0.9, repetition_penalty=1.2, seed=8),
    Sampling(top_k=20, min_p=0.01, logit_bias={4: 5.0}, presence_penalty=0.3, seed=9),
    Greedy(),
]


@pytest.mark.slow
@pytest.mark.smoke
def test_batch_independence():
    """A sequence alone gives the tokens it gives beside four others with other controls."""
    steps, vocab = 12, 1000
    logits = np.random.default_rng(0).normal(0, 3, (steps, len(MIXED), vocab)).astype(np.float32)
    prompts = [np.arange(i, 3 * i + 1) for i in range(len(MIXED))]

    def run(rows):
        processors, state = init_sampler(
            [MIXED[i] for i in rows], [prompts[i] for i in rows], vocab
        )
        tokens, logprobs = [], []
        for t in range(steps):
            token, logprob, _, state = step(processors, state, logits[t, rows])
            tokens.append(np.asarray(token))
            logprobs.append(np.asarray(logprob))
        return np.stack(tokens), np.stack(logprobs)

    tokens, logprobs = run([0, 1, 2, 3, 4])
    for i in range(len(MIXED)):
        alone_tokens, alone_logprobs = run([i])
        np.testing.assert_array_equal(alone_tokens[:, 0], tokens[:, i])
        np.testing.assert_allclose(alone_logprobs[:, 0], logprobs[:, i], rtol=0, atol=2e-6)
    moved, _ = run([3, 0, 2])
    np.testing.assert_array_equal(moved, tokens[:, [3, 0, 2]])


def test_seeds_matter():
    processors, state = init_sampler([Sampling(seed=s) for s in (1, 2, 1)], [[]] * 3, 1000)
    token, *_ = step(processors, state, jnp.zeros((3, 1000)))
    assert token[0] == token[2] != token[1]


def test_decode_loop_carries_the_state():
    """A frequency penalty of 1 on fixed logits, inside lax.while_loop, against a count by hand."""
    logits = jnp.asarray([[3.0, 2.5, 1.2, 0.0], [0.0, 0.1, 0.2, 9.0]])
    processors, state = init_sampler(Greedy(frequency_penalty=1.0), [[1], []], 4)

    @jax.jit
    def decode(state):
        def body(carry):
            i, out, state = carry
            token, *_, state = sample(processors, state, logits)
            return i + 1, out.at[:, i].set(token), state

        start = (0, jnp.zeros((2, 6), jnp.int32), state)
        return lax.while_loop(lambda carry: carry[0] < 6, body, start)[1:]

    out, state = decode(state)
    # Row 0: 3.0 | 2.0 2.5 -> 1 | 2.0 1.5 -> 0 | 1.0 1.5 -> 1 | 1.0 .5 1.2 -> 2 | 1.0 .5 .2 -> 0
    np.testing.assert_array_equal(out, [[0, 1, 0, 1, 2, 0], [3] * 6])
    np.testing.assert_array_equal(state.counts, [[3, 2, 1, 0], [0, 0, 0, 6]])
    np.testing.assert_array_equal(state.step, [6, 6])


def test_prompt_counts_for_repetition_only():
    logits = jnp.asarray([[2.0, 1.9, -5.0]])
    for sampling, want in [
        (Greedy(repetition_penalty=1.2), 1),
        (Greedy(presence_penalty=1.0), 0),
        (Greedy(frequency_penalty=1.0), 0),
    ]:
        processors, state = init_sampler(sampling, [[0, 0]], 3)
        assert step(processors, state, logits)[0][0] == want


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_logprobs_are_of_the_raw_distribution(dtype):
    logits = jnp.asarray([LOGITS], dtype)
    sampling = Greedy(logit_bias={5: 100.0}, logprobs=3, repetition_penalty=1.5)
    processors, state = init_sampler(sampling, [[3]], len(LOGITS))
    token, logprob, alternatives, _ = step(processors, state, logits)
    x = np.asarray(logits[0], np.float64)
    want = x - np.log(np.exp(x).sum())
    assert token.dtype == jnp.int32
    assert logprob.dtype == jnp.float32
    assert token[0] == 5
    np.testing.assert_allclose(logprob[0], want[5], rtol=1e-6)
    np.testing.assert_array_equal(alternatives.ids[0], [3, 0, 7])
    np.testing.assert_allclose(alternatives.logprobs[0], want[[3, 0, 7]], rtol=1e-6)


def test_greedy_ties_pick_the_lowest_id():
    processors, state = init_sampler(Greedy(), [[]] * 2, 4)
    token, *_ = step(processors, state, jnp.asarray([[1.0, 5.0, 5.0, 5.0], [-0.0, 0.0, -1.0, 0.0]]))
    np.testing.assert_array_equal(token, [1, 0])


@pytest.mark.parametrize("sampling", [Greedy(), Greedy(frequency_penalty=1), Sampling(top_p=0.5)])
def test_broken_logits_are_reported_and_stay_alone(sampling):
    nan, inf = math.nan, math.inf
    rows = [[0.0, nan, 1.0], [-inf] * 3, [0.0, inf, 1.0], [-inf, 2.0, -inf]]
    processors, state = init_sampler(sampling, [[]] * 4, 3)
    token, logprob, _, state = step(processors, state, jnp.asarray(rows))
    np.testing.assert_array_equal(token, [-1, -1, -1, 1])
    np.testing.assert_array_equal(np.isnan(logprob), [True, True, True, False])
    assert logprob[3] == 0
    if state.counts is not None:
        np.testing.assert_array_equal(state.counts.sum(-1), [0, 0, 0, 1])


def test_no_token_left():
    """The bias forbids all that the logits allow."""
    processors, state = init_sampler(Greedy(logit_bias={1: -math.inf}), [[]], 3)
    token, logprob, _, _ = step(processors, state, jnp.asarray([[-math.inf, 2.0, -math.inf]]))
    assert token[0] == -1
    assert np.isnan(logprob[0])


@pytest.mark.parametrize("size", [8, 31, 32, 70])
@pytest.mark.parametrize("sampling", [Greedy(), Sampling(top_p=0.7, top_k=9, temperature=2.0)])
def test_only_what_the_mask_allows_is_chosen(size, sampling):
    """Against the choice among logits of which the others are -inf; logprobs are without a mask."""
    rng = np.random.default_rng(size)
    logits = rng.normal(size=(5, size)).astype(np.float32)
    allowed = rng.random((5, size)) < 0.4
    allowed[:, 3] = True
    allowed[4] = False
    bits = np.zeros((5, -(-size // 32) * 32), bool)
    bits[:, :size] = allowed
    masked = dataclasses.replace(sampling, min_tokens=1)
    processors, state = init_sampler(masked, [[]] * 5, size)
    blank, *_ = step(processors, state, jnp.asarray(logits))
    np.testing.assert_array_equal(blank, [-1] * 5, "without a mask none is allowed")
    words = np.packbits(bits, axis=1, bitorder="little").view(np.uint32)
    given = dataclasses.replace(state, mask=jnp.asarray(words))
    token, logprob, _, after = step(processors, given, jnp.asarray(logits))
    plain = init_sampler(sampling, [[]] * 5, size)
    want, *_ = step(*plain, jnp.asarray(np.where(allowed, logits, -np.inf)))
    np.testing.assert_array_equal(token, want)
    assert token[4] == -1
    x = np.asarray(logits, np.float64)
    own = x - np.log(np.exp(x).sum(-1, keepdims=True))
    np.testing.assert_allclose(logprob[:4], own[range(4), token[:4]], atol=1e-5)
    assert not after.mask.any()


def test_new_numbers_do_not_recompile():
    run = jax.jit(chex.assert_max_traces(sample, n=1), static_argnums=0)
    rng = np.random.default_rng(0)
    for i in range(6):
        sampling = [
            Sampling(
                temperature=float(rng.uniform(0.1, 2)),
                top_k=int(rng.integers(1, 30)),
                top_p=float(rng.uniform(0.1, 0.99)),
                min_p=float(rng.uniform(0.01, 0.5)),
                repetition_penalty=float(rng.uniform(1.1, 2)),
                frequency_penalty=float(rng.uniform(0.1, 2)),
                logit_bias={int(rng.integers(50)): float(rng.normal())},
                seed=i,
            ),
            Greedy(),
        ]
        prompts = [rng.integers(0, 50, i), rng.integers(0, 50, 2 * i)]
        processors, state = init_sampler(sampling, prompts, 50)
        for _ in range(2):
            *_, state = run(processors, state, jnp.asarray(rng.normal(size=(2, 50))))


def primitives(jaxpr):
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for sub in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns")):
            sub = getattr(sub, "jaxpr", sub)
            if hasattr(sub, "eqns"):
                yield from primitives(sub)


def test_greedy_costs_an_argmax():
    processors, state = init_sampler(Greedy(top_k=5, top_p=0.5, min_p=0.1, seed=3), [[1]], 50)
    assert all(leaf.shape == (1,) for leaf in jax.tree.leaves(state))
    trace = jax.make_jaxpr(sample, static_argnums=0)
    found = set(primitives(trace(processors, state, jnp.zeros((1, 50))).jaxpr))
    assert "argmax" in found
    assert not found & {"sort", "while", "scan", "cumsum", "top_k", "random_bits", "scatter-add"}

    processors, state = init_sampler(Sampling(top_k=5, top_p=0.5, min_p=0.1), [[1]], 50)
    found = set(primitives(trace(processors, state, jnp.zeros((1, 50))).jaxpr))
    assert "random_bits" in found
    assert "sort" not in found


# Beside a sequence that needs every step, one compilation serves all cases of a vocabulary; the
# steps that a case does not ask for must then change nothing.
EVERYTHING = Sampling(
    top_k=1, top_p=0.5, min_p=0.5, repetition_penalty=2, presence_penalty=1, logit_bias={0: 1}
)


@st.composite
def cases(draw):
    vocab = draw(st.sampled_from([1, 2, 9, 40]))
    # A coarse grid makes ties common; temperatures and penalties keep them exact in float32.
    logits = draw(st.lists(st.integers(-40, 40), min_size=vocab, max_size=vocab))
    ids = st.lists(st.integers(0, vocab - 1), max_size=8)
    bias = st.dictionaries(st.integers(0, vocab - 1), st.sampled_from([-9.0, 0.5]), max_size=2)
    sampling = Sampling(
        temperature=draw(st.sampled_from([0.0, 0.25, 1.0, 4.0])),
        top_k=draw(st.integers(0, vocab + 2)),
        top_p=draw(st.sampled_from([1.0, 0.05, 0.33, 0.61, 0.97])),
        min_p=draw(st.sampled_from([0.0, 0.013, 0.3])),
        repetition_penalty=draw(st.sampled_from([1.0, 2.0])),
        presence_penalty=draw(st.sampled_from([0.0, 0.5])),
        frequency_penalty=draw(st.sampled_from([0.0, -0.25])),
        logit_bias=draw(bias),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
    return np.array(logits) / 4, sampling, draw(ids), draw(ids)


@pytest.mark.slow
@settings(max_examples=300, derandomize=True)
@given(cases())
def test_distribution_holds_everywhere(case):
    """Equal to the float64 reference, but for an edge of top-p or min-p that float32 may round."""
    logits, sampling, prompt, output = case
    got = processed(logits, sampling, prompt, output, beside=[EVERYTHING])
    right = []  # the answer, and those on either side of an edge that float32 cannot tell apart
    for nudge in (1, 1 - 3e-6, 1 + 3e-6):
        moved = dataclasses.replace(
            sampling,
            top_p=sampling.top_p * nudge if sampling.top_p < 1 else 1,
            min_p=sampling.min_p * nudge,
        )
        right.append(expected(logits, moved, prompt, output))
    assert any(np.array_equal(got > 0, p > 0) and np.allclose(got, p, rtol=1e-5) for p in right)


@settings(max_examples=100, derandomize=True)
@given(cases())
def test_sampled_tokens_are_allowed(case):
    logits, sampling, prompt, _ = case
    processors, state = init_sampler([sampling, EVERYTHING], [prompt] * 2, len(logits))
    rows = jnp.tile(jnp.asarray(logits, jnp.float32), (2, 1))
    allowed = np.asarray(process(processors, state, rows)) > -math.inf
    token, logprob, _, _ = step(processors, state, rows)
    assert allowed[[0, 1], np.asarray(token)].all()
    assert (np.asarray(logprob) <= 0).all()


@settings(max_examples=100, derandomize=True)
@given(cases())
def test_top_k_one_is_greedy(case):
    logits, sampling, prompt, _ = case
    pair = [
        dataclasses.replace(sampling, temperature=4.0, top_k=1),
        dataclasses.replace(sampling, temperature=0.0),
        EVERYTHING,
    ]
    processors, state = init_sampler(pair, [prompt] * 3, len(logits))
    token, *_ = step(processors, state, jnp.tile(jnp.asarray(logits, jnp.float32), (3, 1)))
    assert token[0] == token[1]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 2),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.5),
        ("frequency_penalty", None),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: math.inf}),
        ("logit_bias", {"a": 1.0}),
        ("logit_bias", ((1, 1.0), (1, 2.0))),
        ("logit_bias", 3),
        ("seed", -1),
        ("seed", 2**32),
        ("logprobs", -1),
        ("stop", ("",)),
        ("stop", (3,)),
        ("stop", None),
        ("stop_ids", (-1,)),
        ("stop_ids", ("x",)),
        ("stop_ids", 5),
        ("ignore_eos", 1),
    ],
)
def test_refused_values(field, value):
    with pytest.raises(RequestError, match=rf"{field}=.* is not allowed; use "):
        Sampling(**{field: value})


@pytest.mark.parametrize(
    ("sampling", "prompts", "message"),
    [
        ([Greedy()], [[], []], "1 Sampling for 2 prompts"),
        ([], [], "0 Sampling for 0 prompts"),
        (Greedy(repetition_penalty=2), [[10]], "prompt has token ids 10 to 10"),
        (Greedy(repetition_penalty=2), [[-1, 3]], "prompt has token ids -1 to 3"),
        (Greedy(logit_bias={10: 1}), [[]], "logit_bias=10 .* below the vocabulary, 10"),
        (Greedy(stop_ids=(11,)), [[]], "stop_ids=11 .* below the vocabulary, 10"),
        (Greedy(logprobs=11), [[]], "logprobs=11 .* at most the vocabulary, 10"),
        (Greedy(logit_bias=dict.fromkeys(range(10), -math.inf)), [[]], "for fewer tokens"),
    ],
)
def test_refused_batches(sampling, prompts, message):
    with pytest.raises(RequestError, match=message):
        init_sampler(sampling, prompts, 10)


def test_sampling_is_a_short_hashable_value():
    sampling = Sampling(
        logit_bias={7: 1, 2: -1.5}, stop="\n", stop_ids=[np.int32(3)], top_k=np.int64(4)
    )
    assert sampling == Sampling(
        logit_bias=((2, -1.5), (7, 1.0)), stop=("\n",), stop_ids=(3,), top_k=4
    )
    assert len({sampling, Sampling(), Sampling(temperature=1)}) == 2
    assert repr(Sampling()) == "Sampling()"
    assert repr(Greedy(top_k=3)) == "Sampling(temperature=0.0, top_k=3)"
    assert Greedy(seed=5) == Sampling(temperature=0, seed=5)
    assert sampling.end_ids([2, 9]) == (2, 3, 9)
    assert dataclasses.replace(sampling, ignore_eos=True).end_ids([2, 9]) == (3,)


@settings(max_examples=200, derandomize=True)
@given(
    st.text("abc", max_size=20),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 20), max_size=6),
)
def test_stop_text_does_not_depend_on_pieces(text, stop, cuts):
    matcher, out = StopText(stop), ""
    edges = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    for a, b in itertools.pairwise(edges):
        out += matcher.put(text[a:b])
        assert not any(s in out for s in stop)
    out += matcher.flush()
    # The shortest beginning of the text that ends with a stop string, without the longest of them.
    ends = [(n, -len(s)) for s in stop for n in range(len(text) + 1) if text[:n].endswith(s)]
    end, length = min(ends, default=(len(text), 0))
    assert out == text[: end + length]
    assert matcher.stopped == bool(ends)


@pytest.mark.parametrize("bias", [1e39, -1e39, 3.5e38, math.inf, math.nan])
def test_a_bias_beyond_float32_is_refused(bias):
    with pytest.raises(RequestError, match=r"logit_bias.*-3e38 to 3e38"):
        Sampling(logit_bias={3: bias})


def test_the_largest_biases_still_choose():
    for sampling in (Greedy, Sampling):
        processors, state = init_sampler(sampling(logit_bias={2: 3e38, 1: -3e38}), [[]], 4)
        token, logprob, _, _ = sample(processors, state, jnp.asarray([[1.0, 9.0, 0.0, 2.0]]))
        assert token.tolist() == [2]
        assert np.isfinite(logprob).all()


def test_kinds_are_a_chain():
    """Whoever joins leads to a kind that one of them needs alone."""
    each = [
        Greedy(),
        Greedy(top_p=0.5),
        Sampling(temperature=0.7),
        Sampling(top_p=0.9),
        Sampling(temperature=0.7, top_k=5, min_p=0.1),
        Greedy(frequency_penalty=0.5),
        Sampling(logprobs=3),
        Greedy(logit_bias={3: 1.0}),
        Greedy(logprobs=21),
    ]
    alone = [kind_of([s], 1000) for s in each]
    for i, one in enumerate(each):
        for j, other in enumerate(each):
            assert kind_of([one, other], 1000) == max(alone[i], alone[j], key=_much)
    assert [_much(kind) for kind in alone] == sorted(map(_much, alone))
    assert alone[0] == alone[1]
    assert len(set(alone)) == 3, "one serves all temperatures and filters"
    assert alone[-1].processors.logprobs == 80
    assert kind_of([Greedy(logprobs=3)], 10).processors.logprobs == 10


def _much(kind):
    p = kind.processors
    return p.random, p.top_p, kind.arrays, p.logprobs


@pytest.mark.parametrize(
    "neighbour",
    [
        pytest.param(Sampling(), marks=pytest.mark.slow),
        pytest.param(Sampling(top_p=0.5), marks=pytest.mark.slow),
        Greedy(logprobs=2),
    ],
)
def test_a_kind_that_others_need_changes_no_token(neighbour):
    each = [Greedy(), Sampling(temperature=0.8, seed=3), Sampling(top_k=4, seed=9), neighbour]
    prompts, outputs = [[1, 2]] * 4, [[3]] * 4
    logits = np.random.default_rng(1).standard_normal((4, 50)).astype(np.float32) * 3
    for i, one in enumerate(each):
        processors, state = init_sampler(each, prompts, 50, outputs, kind_of(each, 50))
        token, logprob, *_ = sample(processors, state, logits)
        alone, its = init_sampler(one, prompts[:1], 50, outputs[:1])
        expected, its_logprob, *_ = sample(alone, its, logits[i : i + 1])
        assert int(token[i]) == int(expected[0])
        assert float(logprob[i]) == pytest.approx(float(its_logprob[0]), abs=1e-6)
