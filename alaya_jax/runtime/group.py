"""Sequences that decode together, one program call for all of them, in slots of a batch.

Which sequences run together changes all the time, and what a program is compiled for must not: so a
batch has 1, 4, 16, 64, ... rows, and those without a sequence are fed nothing. A group is made
anew when its members change, from what the host knows of them; that is exact, because the
randomness of a sequence goes by its positions.
"""

import dataclasses
from typing import Any

import numpy as np

from alaya_jax.cache.pool import PagedSequence, PagePool
from alaya_jax.cache.tables import bucket
from alaya_jax.errors import AlayaError
from alaya_jax.query.plan import indexes_of
from alaya_jax.runtime.batch import Batch
from alaya_jax.runtime.decoding import Decoding, read
from alaya_jax.runtime.job import Job
from alaya_jax.runtime.programs import Fed, Passed, Row
from alaya_jax.runtime.sampling.constraint import masks
from alaya_jax.runtime.sampling.params import Greedy
from alaya_jax.runtime.sampling.sampler import init_sampler, kind_of
from alaya_jax.runtime.stack import Chain

BLOCK = 32
"""Tokens that pages are reserved for at once, behind those of the prompt."""

ENDS = 8
"""Ids that may end a sequence, at least: a program is compiled for this times a power of two."""


@dataclasses.dataclass(eq=False)
class Slot:
    """A job's place in a decoder.

    Attributes:
      job: what is asked.
      batch: its one sequence and its pages.
      key: of jobs that may decode together.
      order: of those that came in later it is larger.
      flying: tokens that were dispatched for it and not read yet.
      leaving: why it is to leave, as soon as no program that may write to its pages is under way:
        "removed", "preempted" or "failed".
      passed, fed: the last chunk of its prefill.
      mask: ids that may come next, where not all may; see `Allowed.mask`.
    """

    job: Job
    batch: Batch
    key: Any
    order: int
    flying: int = 0
    leaving: str | None = None
    passed: Passed | None = None
    fed: Fed | None = None
    mask: np.ndarray | None = None

    @property
    def sequence(self) -> PagedSequence:
        """Where it is in the pool."""
        return self.batch.sequences[0]

    @property
    def left(self) -> int:
        """Tokens that may still be dispatched."""
        return self.job.most - len(self.job.generated) - self.flying

    def grow(self, pool: PagePool) -> bool:
        """Reserves pages for the token that a next step feeds, where there are none, and for some
        more.

        Returns:
          whether the table changed.

        Raises:
          CacheFullError: there are none left.
        """
        sequence = self.sequence
        need = min(sequence.length + self.flying + 1, self.job.total)
        if need <= len(sequence.pages) * pool.page_size:
            return False
        most = min(need + BLOCK - 1, self.job.total)
        pool.reserve(sequence, most - sequence.length, collect=False)
        return True


@dataclasses.dataclass(frozen=True)
class New:
    """What a step chose for a sequence.

    Attributes:
      slot: whose.
      id: token id; negative: its logits were not finite.
      logprob: of the model's own distribution.
      alternatives: the likeliest (id, logprob), as many as its sampling asks for.
    """

    slot: Slot
    id: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Failed:
    """A job cannot go on; its pages were, or will be, given back."""

    job: Job
    error: Exception


class Group:
    """Slots whose jobs ask the same of their keys, and all of which have a mask, or none. One
    thread at a time may use it.
    """

    def __init__(self, members: list[Slot], most_rows: int):
        """Args: slots of one key; rows of the largest batch."""
        first = members[0]
        batch = first.batch
        self.members, self.key = members, first.key
        self.is_masked = first.job.allowed is not None
        self._pool = batch.pool
        self._flight: tuple[Row, list[Slot | None]] | None = None
        self._grown = False
        rows = max(min(bucket(len(members), 1, 4), most_rows), len(members))
        self._empty = [PagedSequence() for _ in range(rows - len(members))]
        jobs = [slot.job for slot in members]
        none: list[int] = []
        each = [job.sampling for job in jobs] + [Greedy()] * len(self._empty)
        prompts = [job.prompt for job in jobs] + [none] * len(self._empty)
        outputs = [job.generated for job in jobs] + [none] * len(self._empty)
        vocab = batch.model.config.vocab_size
        kind = kind_of(each, vocab)
        processors, sampler = init_sampler(each, prompts, vocab, outputs, kind)
        # Randomness goes by position.
        at = self._column([len(job.prompt) + len(job.generated) for job in jobs])
        sampler = dataclasses.replace(sampler, step=batch.stack.put(at))
        ends = bucket(max(len(job.end_ids) for job in jobs), ENDS, 2)
        end_ids = np.full((rows, ends), -1, np.int32)
        for row, job in zip(end_ids, jobs, strict=False):
            row[: len(job.end_ids)] = job.end_ids
        self._decoding = Decoding(
            batch.stack, batch.pool, self._chain, end_ids, (processors, sampler)
        )

    def _column(self, numbers: list[int]) -> np.ndarray:
        """Of all rows, int32 [B]."""
        return np.asarray(numbers + [0] * len(self._empty), np.int32)

    @property
    def _sequences(self) -> list[PagedSequence]:
        return [slot.sequence for slot in self.members] + self._empty

    def _chain(self) -> Chain:
        """The layers, with what indexes know of the members' keys."""
        batch, plans = self.members[0].batch, self.members[0].job.attention
        if len(self.members) == 1 and not self._empty:
            return batch.chain(plans)
        layers = batch.model.config.num_hidden_layers
        indexed = batch.indexes.cover(indexes_of(plans, layers), self._sequences)
        return batch.stack.chain(plans, batch.stack.at_cache(indexed))

    @property
    def is_flying(self) -> bool:
        """Whether a step is under way whose tokens were not read."""
        return self._flight is not None

    @property
    def wants(self) -> bool:
        """Whether any member may get another token."""
        return any(slot.left > 0 for slot in self.members)

    def begin(self, passed: Passed, fed: Fed) -> None:
        """Behind the prefill of the only member: its first token is under way then."""
        self._allow()
        self._learn(self.members[0])
        self._mask()
        self._flies(self._decoding.first(passed, fed, self._pool.table(self._sequences)))

    def resume(self) -> None:
        """Behind tokens that are known, the last one of each to be fed."""
        for slot in self.members:
            self._learn(slot)
        token = self._column([slot.job.generated[-1] for slot in self.members])
        running = self._column([slot.left > 0 for slot in self.members]) > 0
        self._decoding.resume(token, running, self._pool.table(self._sequences))

    def grow(self) -> None:
        """Has pages for all tokens that a next step feeds.

        Raises:
          CacheFullError: there are none left.
        """
        for slot in self.members:  # should one fail, those before it have grown
            self._grown |= slot.left > 0 and slot.grow(self._pool)
        if self._grown:
            self._decoding.place(self._pool.table(self._sequences))
            self._grown = False

    def step(self) -> None:
        """Dispatches one step of all that may go on; does not wait for it. With masks, the tokens
        of the step before were read.
        """
        assert not (self.is_masked and self.is_flying)
        self._allow()
        self._mask()
        self._flies(self._decoding.step())

    def _allow(self) -> None:
        """Who may go on behind the step that comes: it takes one of what is left."""
        self._decoding.allow(self._column([slot.left > 1 for slot in self.members]) > 0)

    def _learn(self, slot: Slot) -> None:
        """What may come next of a slot of which that is not known yet."""
        if slot.mask is None and slot.job.allowed is not None:
            slot.mask = slot.job.allowed.mask()

    def _mask(self) -> None:
        if self.is_masked:
            each = [slot.mask for slot in self.members] + [None] * len(self._empty)
            self._decoding.mask(masks(each, self.members[0].batch.model.config.vocab_size))

    def _flies(self, row: Row) -> None:
        taking = [slot if slot.left > 0 else None for slot in self.members]
        for slot in filter(None, taking):
            slot.flying += 1
        self._flight = row, taking

    def land(self) -> Any:
        """What is under way, if anything is: to be given to `read`; nothing is, then."""
        flight, self._flight = self._flight, None
        return flight

    def read(self, flight: tuple[Row, list[Slot | None]]) -> list[New | Failed]:
        """The tokens of a step, which join the jobs; waits for it.

        A slot that is leaving gets none: only its place in the step is waited for.
        """
        row, taking = flight
        for slot in filter(None, taking):
            slot.flying -= 1
        ids, logprobs, alternatives, _, count = read(row)
        attended = np.asarray(row.counts.attended).mean((0, 2))
        found: list[New | Failed] = []
        for b, slot in enumerate(taking):
            # On the device it had ended before.
            if slot is None or not count[b] or slot.leaving in ("removed", "failed"):
                continue
            job, id = slot.job, int(ids[b])
            if id < 0:
                slot.leaving = "failed"  # nobody is to share its keys
            else:
                job.attended += float(attended[b]) if job.generated else 0
                slot.batch.accept(0, id, job.ways[1])
                job.generated.append(id)
                if job.allowed is not None:
                    try:
                        job.allowed.accept(id)
                        slot.mask = job.allowed.mask()
                    except AlayaError as error:
                        slot.leaving = "failed"
                        found.append(Failed(job, error))
                        continue
            wanted = job.sampling.logprobs
            likely = zip(*(a[b, :wanted].tolist() for a in alternatives or ()), strict=True)
            found.append(New(slot, id, float(logprobs[b]), tuple(likely)))
        return found
