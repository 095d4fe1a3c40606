"""What `Session.explain` puts together."""

from alaya_jax.errors import RequestError
from alaya_jax.explain.account import Account
from alaya_jax.explain.analysis import WANTED, analyze
from alaya_jax.explain.explanation import Explanation
from alaya_jax.explain.reads import planned_rows
from alaya_jax.index import Sketch
from alaya_jax.optimizer.key_bytes import KeyBytes
from alaya_jax.optimizer.prefill import PrefillChoice
from alaya_jax.query.plan import Plans, indexes_of, same_plans
from alaya_jax.runtime.batch import Batch


def last_plans(account: Account) -> Plans | None:
    """What decoding did last, or `attention`, or the prefill; None where nothing has run."""
    reads = account.reads
    ran = next((reads[p] for p in ("decode", "attention", "prefill") if p in reads), None)
    return ran.plans if ran else None


def report(
    batch: Batch,
    account: Account,
    contexts: list[str | None],
    plans: Plans,
    *,
    planned: bool,
    analyzed: int | None,
) -> Explanation:
    """The account of an open session; see `Session.explain`.

    Args:
      batch, account: what it holds, and what was read of it.
      contexts: ids of those that its sequences were opened on.
      plans: that ran, or would.
      planned: shows what would run.
      analyzed: the sequence whose last token is run again; None: none.
    """
    # What `Auto` chose belongs to the plans that it made, and to no others.
    choice = account.choice
    if choice is not None and not same_plans(choice.plans, plans):
        choice = None
    wanted = choice.auto.recovery if choice else WANTED
    in_files = [batch.pool.in_files(sequence) for sequence in batch.sequences]
    tier, size = "host" if any(in_files) else "device", batch.pool.page_size
    rows = planned_rows(plans, batch.pool, size, choice, tier) if planned else None
    analysis = None if analyzed is None else analyze(batch, plans, analyzed, wanted)
    return Explanation(
        tokens=batch.lengths,
        reused=batch.reused,
        contexts=contexts,
        origins=list(batch.origins),
        phases=dict(account.reads),
        planned=rows,
        choice=choice,
        prefill=_prefill_choice(account),
        analysis=analysis,
        in_files=in_files if any(in_files) else None,
        sketch=_sketch(batch, plans),
        bytes_a_key=_bytes_a_key(batch, plans),
        index_bytes=batch.indexes.nbytes(),
        placed=batch.placing.reason if any(in_files) else "",
    )


def _bytes_a_key(batch: Batch, plans: Plans) -> KeyBytes | None:
    found = KeyBytes.of(plans, batch.model.config, batch.pool.page_size, batch.pool.dtype)
    return found if found.indexes else None


def _sketch(batch: Batch, plans: Plans) -> str:
    """In which basis sketches round keys, where plans ask any."""
    asked = indexes_of(plans, batch.model.config.num_hidden_layers)
    bases = {index.basis for index in asked if isinstance(index, Sketch)}
    if not bases:
        return ""
    try:
        learnt = batch.indexes.learnt
    except RequestError as error:  # a damaged file, which these plans do without
        return f"a random rotation ({error})"
    if "learnt" in bases:
        return str(learnt)
    if learnt is None:
        return "a random rotation: no basis was learnt of this model (aj.calibrate)"
    return f"a random rotation, as asked; there is {learnt}"


def _prefill_choice(account: Account) -> PrefillChoice | None:
    """What `Auto` chose for the prefill that ran, where it had a choice."""
    choice, ran = account.prefill, account.reads.get("prefill")
    if choice is None or ran is None or not choice.others:
        return None
    return choice if same_plans(choice.plan, ran.plans) else None
