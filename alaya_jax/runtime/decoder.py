"""Many sequences over one pool: slots that jobs are put into, and taken out of, at any time.

A turn is a chunk of somebody's prefill and a step of everybody else. The next step of a group is
dispatched before the tokens of its last one are read, unless these say what may come next: jobs
with a mask are groups of their own, and wait. Pages are reserved block by block; when
there are none left, the sequence that came in last gives its own back (`Preempted`), and is
computed again later: to the same tokens, since what is random in them goes by position.

What is computed for one is shared with others that begin alike: whole pages, of keys and values
that were computed the same way. No page is given back before the newest program that may write to
it was seen to end.
"""

import collections
import dataclasses
from typing import Any

import jax
import numpy as np

from alaya_jax.cache.pool import PagePool
from alaya_jax.compilation import Watch
from alaya_jax.errors import CacheFullError
from alaya_jax.index import Graph
from alaya_jax.prefix import common_prefix
from alaya_jax.query.plan import Plans, of_layer
from alaya_jax.runtime.batch import Batch
from alaya_jax.runtime.group import BLOCK, Failed, Group, New, Slot
from alaya_jax.runtime.job import Job


@dataclasses.dataclass(frozen=True)
class Preempted:
    """A job gave its pages to others; it can be inserted again."""

    job: Job


@dataclasses.dataclass(frozen=True)
class Scored:
    """A job that wants no token has all scores of its prompt."""

    job: Job


Event = New | Failed | Preempted | Scored


class Decoder:
    """Slots of sequences over one pool. One thread at a time may use it.

    Attributes:
      slots: sequences at most.
      chunk: tokens of a turn's prefill at most.
      preemptions: how often a sequence gave its pages to others.
      prefilled: tokens that the model was run over before it decoded.
      generated: tokens that were chosen.
      steps: of groups.
    """

    def __init__(self, pool: PagePool, slots: int, chunk: int):
        """Args: where the sequences are; see the attributes."""
        self._pool = pool
        self.slots, self.chunk = slots, chunk
        self.preemptions = self.prefilled = self.generated = self.steps = 0
        self._prefilling: collections.deque[Slot] = collections.deque()
        self._groups: list[Group] = []
        self._done: list[Slot] = []
        """Whose prompt is scored: others may share its pages until the next turn."""
        self._inserted = 0
        self._short = False
        """Whether pages ran out, and a slot is to leave its own."""

    @property
    def held(self) -> list[Slot]:
        """All slots that are taken, in the order in which they were."""
        members = [slot for group in self._groups for slot in group.members]
        slots = [*self._prefilling, *members, *self._done]
        return sorted(slots, key=lambda slot: slot.order)

    @property
    def is_idle(self) -> bool:
        """Whether none is taken."""
        return not self._prefilling and not self._groups and not self._done

    @property
    def prefilling(self) -> int:
        """How many are not decoding yet."""
        return len(self._prefilling)

    def shared(self, job: Job) -> tuple[int, Slot | None]:
        """How many of a job's first tokens a slot has that were computed in the job's way, and
        which slot has most: whole pages.
        """
        most, best = 0, None
        row = job.row[: job.reusable]
        for slot in self.held:
            if slot.leaving == "failed":
                continue
            found = self._alike(job, slot, row[: slot.sequence.length])
            if found > most:
                most, best = found, slot
        return most, best

    def coming(self, job: Job) -> int:
        """How many of them a slot will have when its prefill is over."""
        row = job.row[: job.reusable]
        slots = [slot for slot in self._prefilling if slot.leaving is None]
        return max((self._alike(job, slot, row) for slot in slots), default=0)

    def _alike(self, job: Job, slot: Slot, row: np.ndarray) -> int:
        if slot.job.salt != job.salt:
            return 0
        n = common_prefix(slot.job.row, row)
        theirs = slot.batch.origins[0] if n <= slot.sequence.length else slot.job.origin
        n = theirs.alike(job.origin, n)
        return n - n % self._pool.page_size

    def insert(self, job: Job, batch: Batch) -> None:
        """Puts a job into a slot; its turns come.

        Args:
          job: new, or preempted.
          batch: of one sequence, which holds some of the job's first tokens, `Job.reusable` at
            most; taken over.

        Raises:
          CacheFullError: there are no pages for its prompt and a block of new tokens, or no room
            for an index that it asks.
          RequestError, ContextError: it asks for a graph, and there is none. Whatever is raised,
            the batch is the caller's.
        """
        assert len(self.held) < self.slots
        row = job.row
        n, slot = self.shared(job)
        if slot is not None and n > batch.lengths[0]:
            batch.share(slot.batch, n)
        length = batch.lengths[0]
        count = min(len(row) + BLOCK, job.total) - length
        batch.make_room([count], job.prefill, job.attention)
        if job.reused is None:
            job.reused = length
        if not job.generated:
            job.scores.clear()
        self._inserted += 1
        key = self._inserted if asks_graph(job.attention) else alike(job.attention)
        key = key, job.allowed is not None
        self._prefilling.append(Slot(job, batch, key, self._inserted))

    def remove(self, job: Job) -> None:
        """Takes a job out; what is under way for it counts no more."""
        for slot in self.held:
            if slot.job is job and slot.leaving != "failed":
                slot.leaving = "removed"

    def clear(self) -> None:
        """Takes all out; waits for what is under way."""
        for slot in self.held:
            slot.leaving = "removed"
        while not self.is_idle:
            self.turn()

    def turn(self) -> list[Event]:
        """Part of everybody's work: waits for what the turn before dispatched, and not for what
        this one does.
        """
        events: list[Event] = []
        self._settle(events)
        stays = [self._stays(group) for group in self._groups]
        flights = [(group, group.land()) for group in self._groups]
        ahead = [group for group, may in zip(self._groups, stays, strict=True) if may]
        for group in ahead:
            if not group.is_masked:
                self._step(group, events)
        for group, flight in flights:
            if group.is_masked:
                self._read(group, flight, events)
        for group in ahead:
            if group.is_masked and self._stays(group):
                self._step(group, events)
        if all(stays):  # else their tokens come first: they need not wait for a chunk
            self._prefill(events)
        for group, flight in flights:
            if not group.is_masked:
                self._read(group, flight, events)
        return events

    def _stays(self, group: Group) -> bool:
        """Whether the group's members are to be the same in the next step."""
        beside = any(g is not group and g.key == group.key for g in self._groups)
        return not beside and all(slot.leaving is None for slot in group.members)

    def _settle(self, events: list[Event]) -> None:
        """Lets those leave that may, and makes groups anew where members changed, if nothing of
        theirs is under way.
        """
        gone = [slot for slot in self._prefilling if slot.leaving]
        self._prefilling = collections.deque(s for s in self._prefilling if not s.leaving)
        done, self._done = self._done, []
        for slot in [*gone, *done]:
            if slot.passed is not None:
                jax.block_until_ready(slot.passed.last)
            self._leave(slot, events)
        by_key: dict[Any, list[Group]] = {}
        for group in self._groups:
            by_key.setdefault(group.key, []).append(group)
        self._groups = []
        for groups in by_key.values():
            if any(g.is_flying for g in groups) or (
                len(groups) == 1 and all(slot.leaving is None for slot in groups[0].members)
            ):
                self._groups += groups
                continue
            members = sorted((s for g in groups for s in g.members), key=lambda slot: slot.order)
            for slot in members:
                if slot.leaving:
                    self._leave(slot, events)
            stay = [slot for slot in members if not slot.leaving]
            if stay:
                try:
                    made = Group(stay, self.slots)
                    made.resume()
                    self._groups.append(made)
                except Exception as error:
                    for slot in stay:
                        self._leave(slot, events)
                        events.append(Failed(slot.job, error))

    def _leave(self, slot: Slot, events: list[Event]) -> None:
        slot.batch.release()
        self._short = False
        if slot.leaving == "preempted":
            events.append(Preempted(slot.job))

    def _prefill(self, events: list[Event]) -> None:
        """A chunk of the slot that came in first; of more of them, where they fit in whole."""
        budget = self.chunk
        while self._prefilling and budget > 0:
            slot = self._prefilling[0]
            left = len(slot.job.row) - slot.sequence.length
            if budget < self.chunk and left > budget:
                break
            watch = Watch()
            try:
                budget -= self._feed(slot, budget)
                if slot.sequence.length == len(slot.job.row):
                    self._prefilling.popleft()
                    self._begin(slot, events)
            except Exception as error:
                if slot in self._prefilling:
                    self._prefilling.remove(slot)
                slot.batch.release()
                events.append(Failed(slot.job, error))
            slot.job.programs += watch.read()[1]

    def _feed(self, slot: Slot, budget: int) -> int:
        """Runs the model over the next tokens of a slot, of which it returns the number."""
        job, start = slot.job, slot.sequence.length
        end = min(start + budget, len(job.row))
        if start < job.split < end and job.ways[0] != job.ways[1]:
            end = job.split
        if start == end:
            return 0
        at = start

        def score(x: Any, fed: Any) -> None:
            nonlocal at
            width = fed.tokens.shape[1]
            last = min(at + width, end)
            targets = np.zeros((1, width), np.int32)
            known = job.prompt[at + 1 : last + 1]
            targets[0, : len(known)] = known
            if len(known) and at + len(known) >= job.scored:
                best = max(1, job.sampling.logprobs)
                job.scores.append((at + 1, len(known), slot.batch.stack.scores(x, targets, best)))
            at = last

        wants = job.scored > 0 and not job.generated
        plans = job.prefill if start < job.split else job.attention
        slot.passed, slot.fed = slot.batch.feed(
            [job.row[start:end]], plans, lambda *_: None, on_output=score if wants else None
        )
        job.prefilled += end - start
        self.prefilled += end - start
        return end - start

    def _begin(self, slot: Slot, events: list[Event]) -> None:
        """A slot whose prefill is over decodes from now on."""
        job = slot.job
        if job.most == 0:
            slot.leaving = "removed"
            self._done.append(slot)
            events.append(Scored(job))
            return
        group = Group([slot], self.slots)
        if job.generated:
            slot.batch.pending[0] = [job.generated[-1]]
            group.resume()
        else:
            assert slot.passed is not None
            assert slot.fed is not None
            group.begin(slot.passed, slot.fed)
        slot.passed = slot.fed = None
        self._groups.append(group)

    def _step(self, group: Group, events: list[Event]) -> None:
        """Dispatches a step, if one is wanted and there are pages for it."""
        if not group.wants or self._short:
            return
        try:
            group.grow()
        except CacheFullError:
            self._preempt()
            return
        watch = Watch()
        try:
            group.step()
            self.steps += 1
        except Exception as error:
            self._fail(group, error, events)
        if compiled := watch.read()[1]:
            for slot in group.members:
                slot.job.programs += compiled

    def _read(self, group: Group, flight: Any, events: list[Event]) -> None:
        if flight is None:
            return
        try:
            found = group.read(flight)
            self.generated += sum(isinstance(new, New) and new.id >= 0 for new in found)
            events += found
        except Exception as error:
            self._fail(group, error, events)

    def _fail(self, group: Group, error: Exception, events: list[Event]) -> None:
        for slot in group.members:
            if slot.leaving is None:
                slot.leaving = "failed"
                events.append(Failed(slot.job, error))

    def _preempt(self) -> None:
        """The slot that came in last is to give its pages back, if none does so already."""
        held = self.held
        self._short = True
        if all(slot.leaving is None for slot in held):
            held[-1].leaving = "preempted"
            self.preemptions += 1


def asks_graph(plans: Plans) -> bool:
    """Whether a layer walks a graph: of graphs each sequence has one of its own size, so that no
    other can run in the same program.
    """
    each = plans if isinstance(plans, tuple) else (plans,)
    return any(isinstance(of_layer(plan, 0).index, Graph) for plan in each)


def alike(plans: Plans) -> Any:
    """A key that equal plans have, and others have not; a beta may be an array."""
    leaves, tree = jax.tree.flatten(plans)
    numbers = [np.asarray(x) for x in leaves]
    return tree, tuple((x.shape, x.dtype.str, x.tobytes()) for x in numbers)
