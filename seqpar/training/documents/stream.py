"""Steps of packed documents, read ahead by a thread; where they stand is a few numbers."""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from seqpar.training.documents.packing import Packer, Packing, Piece, Place
from seqpar.training.documents.source import Source


@dataclass(frozen=True)
class Batch:
    """One sequence: what a wrapped model is called with.

    ``tokens [1, s]`` and ``labels [1, s]`` int64, -100 where nothing is predicted; ``lengths`` of the pieces of
    documents in it; ``num_targets``: how many tokens have something to predict.
    """

    tokens: Tensor
    labels: Tensor
    lengths: tuple[int, ...]
    num_targets: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Step:
    """My sequences of one step: as many for every replica, without a token where there are not enough.

    ``place``: where the next step begins, the same for every replica.
    """

    batches: tuple[Batch, ...]
    place: Place

    @property
    def num_targets(self) -> int:
        return sum(batch.num_targets for batch in self.batches)

    @property
    def num_tokens(self) -> int:
        return sum(sum(batch.lengths) for batch in self.batches)


Planned = tuple[list[list[Piece]], Place]


class Documents(IterableDataset[Step]):
    """Iterate over steps of ``sequences`` sequences: mine are those of replica ``replica`` of ``replicas``.

    Law: over an epoch every token of every document comes once, in an order that follows from ``seed`` and the epoch
    alone; stopped after any step and resumed from :meth:`state_dict` with any number of replicas, sequences and ranks,
    no document is lost and none comes twice.

    ``packing``: see :class:`Packing`. ``seed``: of the order, another one in every epoch; None: as the source has them.
    ``epochs``: end after so many (None: never); the last step may have fewer sequences. ``prefetch``: steps that a
    thread reads ahead; what it raises is raised where the step is taken. Ranks that share a sequence make this with the
    same arguments, and read the same. As a ``torch.utils.data.DataLoader`` takes it (``batch_size=None``, any number of
    workers), an item is a :class:`Step`; the state is then :meth:`state_after` the step that was used last.

    Raises ``ValueError`` for arguments that do not fit.
    """

    def __init__(
        self,
        source: Source,
        packing: Packing,
        *,
        seed: int | None = 0,
        epochs: int | None = None,
        sequences: int = 1,
        replica: int = 0,
        replicas: int = 1,
        prefetch: int = 2,
    ) -> None:
        if sequences < 1 or not 0 <= replica < replicas or prefetch < 0:
            raise ValueError(
                f"expected at least 1 sequence, one of the replicas, and 0 or more steps ahead, got {sequences} "
                f"sequences, replica {replica} of {replicas}, {prefetch} steps"
            )
        self._source, self._packing, self._seed, self._epochs = source, packing, seed, epochs
        self._sequences, self._replica, self._replicas, self._prefetch = sequences, replica, replicas, prefetch
        self._place = Place()

    @property
    def place(self) -> Place:
        """Where the next step begins."""
        return self._place

    def state_dict(self) -> dict[str, Any]:
        """After the step that was handed out last; plain numbers and words, the same on every rank."""
        return self._state(self._place)

    def state_after(self, step: Step) -> dict[str, Any]:
        """The state with which the step after this one comes next."""
        return self._state(step.place)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, at once. Raises ``ValueError`` for the state of other documents or another packing."""
        mine = self._state(self._place)
        if set(state) != set(mine) or len(state["place"]) != 3:
            raise ValueError(f"no state of documents: expected {', '.join(mine)}, got {', '.join(map(str, state))}")
        for name in ("data", "packing", "seed"):
            if state[name] != mine[name]:
                raise ValueError(f"the state is of other documents: its {name} is {state[name]}, here {mine[name]}")
        self._place = Place(*map(int, state["place"]))

    def __iter__(self) -> Generator[Step]:
        worker = get_worker_info()
        if worker is not None:
            yield from self._in_worker(worker.id, worker.num_workers)
            return
        moved = True
        while moved:
            moved = False
            with closing(self._ahead(self._place)) as steps:
                for step in steps:
                    self._place = step.place
                    yield step
                    if moved := self._place is not step.place:  # a state was loaded meanwhile
                        break

    def _state(self, place: Place) -> dict[str, Any]:
        return {
            "place": list(astuple(place)),
            "data": self._source.fingerprint,
            "packing": str(self._packing),
            "seed": self._seed,
        }

    def _ahead(self, place: Place) -> Generator[Step]:
        """All steps from a place on, read by a thread that ends with this iterator, or with the interpreter."""
        coming: deque[Future[Step | None]] = deque()
        following = self._reader(place)
        pool = ThreadPoolExecutor(1, "documents") if self._prefetch else None
        try:
            while True:
                while pool is not None and len(coming) <= self._prefetch:
                    coming.append(pool.submit(following))
                step = coming.popleft().result() if coming else following()
                if step is None:
                    return
                yield step
        finally:
            if pool is not None:
                pool.shutdown(cancel_futures=True)

    def _reader(self, place: Place) -> Callable[[], Step | None]:
        packer = Packer(self._source, self._packing, self._seed, self._epochs)

        def following() -> Step | None:
            nonlocal place
            planned = self._planned(packer, place)
            if planned is None:
                return None
            step = self._read(planned)
            place = step.place
            return step

        return following

    def _in_worker(self, worker: int, workers: int) -> Iterator[Step]:
        """Every ``workers``-th step. The state of a worker is that before the round of all workers' next steps."""
        packer, place = Packer(self._source, self._packing, self._seed, self._epochs), self._place
        while True:
            mine = None
            for number in range(workers):
                planned = self._planned(packer, place)
                if planned is not None:
                    place = planned[1]
                mine = planned if number == worker else mine
            if mine is None:
                return
            self._place = place
            yield self._read(mine)

    def _planned(self, packer: Packer, place: Place) -> Planned | None:
        """My sequences of the step at a place, and the place after it; None where there are no more."""
        mine: list[list[Piece]] = []
        for number in range(self._sequences):
            pieces, place = packer.next(place)
            if not pieces:
                if not number:
                    return None
                break
            if number % self._replicas == self._replica:
                mine.append(pieces)
        each = -(-self._sequences // self._replicas)
        return mine + [[] for _ in range(each - len(mine))], place

    def _read(self, planned: Planned) -> Step:
        pieces, place = planned
        return Step(tuple(batch_of(self._source, each) for each in pieces), place)


def batch_of(source: Source, pieces: Sequence[Piece]) -> Batch:
    """The tokens of pieces of documents, one behind the other."""
    parts = [source.tokens(piece.document, piece.start, piece.stop).astype(np.int64) for piece in pieces]
    return batch_from(torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0, dtype=torch.int64), pieces)


def batch_from(tokens: Tensor, pieces: Sequence[Piece]) -> Batch:
    """The batch whose pieces hold these ``tokens [s]``."""
    labels, begin = tokens.clone(), 0
    for piece in pieces:
        labels[begin : begin + piece.context] = -100
        begin += piece.size
    targets = sum(piece.size - max(1, piece.context) for piece in pieces)
    return Batch(tokens[None], labels[None], tuple(piece.size for piece in pieces), targets, tuple(pieces))
