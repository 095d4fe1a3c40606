"""The account of a session: which tokens count, and when another account begins."""

import numpy as np

import alaya_jax as aj
from alaya_jax.attention.counts import Counts
from alaya_jax.explain.account import Account


def counts(config, batch, attended):
    shape = config.num_hidden_layers, batch, config.num_attention_heads
    keys = np.full(shape, attended, np.int32)
    zero = np.zeros(shape, np.float32)
    return Counts(keys, keys, keys, zero, 0 * keys, zero)


def test_what_new_tokens_see_is_counted_for_each_sequence(tiny_model):
    account = Account(tiny_model, 16)
    on_read = account.on_read("prefill", aj.Plan(aj.Full()))
    on_read(counts(tiny_model.config, 2, 7), [10, 4], [3, 0], 8)
    reads = account.reads["prefill"]
    assert (reads.queries, reads.visible) == (3, 3 * 10 + 1 + 2 + 3)
    on_read(counts(tiny_model.config, 2, 7), [13, 4], [1, 2], 8)
    assert (reads.queries, reads.visible) == (6, 36 + 14 + 2 * 4 + 3)
    assert (reads.mean("attended") == 2 * 2 * 7 / 6).all()


def test_other_plans_begin_another_account(tiny_model):
    account, seen = Account(tiny_model, 16), counts(tiny_model.config, 1, 5)
    plans = [aj.Plan(aj.Full()), aj.Plan(aj.Full()), aj.Plan(aj.Window(2, 3))]
    totals = []
    for plan in plans:
        account.count("decode", plan, seen, [20], [1])
        totals.append(account.reads["decode"].queries)
    assert totals == [1, 2, 1]
    assert set(account.reads) == {"decode"}
    assert (account.choice, account.prefill) == (None, None)
