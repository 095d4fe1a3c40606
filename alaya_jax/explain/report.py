"""What `Session.explain` puts together."""

from typing import TYPE_CHECKING

from alaya_jax.explain.analysis import WANTED
from alaya_jax.explain.analysis import analyze as analyze_last
from alaya_jax.explain.explanation import Explanation
from alaya_jax.explain.reads import planned_rows
from alaya_jax.optimizer.prefill import PrefillChoice
from alaya_jax.query.plan import Attention, same_plans

if TYPE_CHECKING:
    from alaya_jax.session import Session


def report(
    session: "Session", analyze: bool, attention: Attention | None, sequence: int
) -> Explanation:
    """The account of an open session; see `Session.explain`."""
    reads = session.reads
    ran = next((reads[p] for p in ("decode", "attention", "prefill") if p in reads), None)
    plans = ran.plans if ran else None
    if attention is not None or plans is None:
        plans = session.plans(attention, session.length + 1)
    # What `Auto` chose belongs to the plans that it made, and to no others.
    choice = session.choice
    if choice is not None and not same_plans(choice.plans, plans):
        choice = None
    wanted = choice.auto.recovery if choice else WANTED
    would_run = attention is not None or ran is None
    return Explanation(
        tokens=session.lengths,
        reused=session.reused,
        contexts=[c.id if c else None for c in session.contexts],
        origins=list(session.origins),
        phases=dict(reads),
        planned=planned_rows(plans, session.model, session.pool.page_size, choice)
        if would_run
        else None,
        choice=choice,
        prefill=_prefill_choice(session),
        analysis=analyze_last(session, plans, sequence, wanted) if analyze else None,
    )


def _prefill_choice(session: "Session") -> PrefillChoice | None:
    """What `Auto` chose for the prefill that ran, where it had a choice."""
    choice, ran = session.prefill_choice, session.reads.get("prefill")
    if choice is None or ran is None or not choice.others:
        return None
    return choice if same_plans(choice.plan, ran.plans) else None
