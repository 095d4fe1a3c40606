"""The account that a session keeps: what new tokens could see, and when another account begins."""

import jax.numpy as jnp

import alaya_jax as aj
from alaya_jax.attention.counts import Counts
from alaya_jax.explain.account import Account
from alaya_jax.query.plan import Plan


def counts():
    """Of llama-tiny's 2 layers, two sequences and 4 heads."""
    return Counts.of((2, 2, 4), jnp.int32(5), jnp.int32(5))


def test_each_new_token_sees_those_before_it_and_itself(tiny_model):
    account = Account(tiny_model, 16)
    account.on_read("prefill", Plan(aj.Full()))(counts(), [10, 0], [3, 2])
    reads = account.reads["prefill"]
    assert reads.queries == 5
    assert reads.visible == (11 + 12 + 13) + (1 + 2)


def test_other_plans_begin_another_account_and_equal_ones_go_on(tiny_model):
    account = Account(tiny_model, 16)
    for beta in (3.0, 3.0, 4.0):
        plans = Plan(aj.DIPR(beta=beta, window=aj.Window(2, 6)))
        account.count("decode", plans, counts(), [10, 10], [1, 1])
        if beta == 3.0:
            kept = account.reads["decode"]
    assert kept.queries == 4
    assert account.reads["decode"] is not kept
    assert account.reads["decode"].queries == 2
    assert account.choice is account.prefill is None
