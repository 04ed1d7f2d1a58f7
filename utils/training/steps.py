"""The steps of a stage: batches, cut into what each process takes and what goes through the model at once."""

import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from dataset.loading import AnomalyDataset, Batch, SeededSampler, make_loader
from dataset.records import Record
from forward_utils_cross_attention import Part, Sight
from utils import processes


class Piece(NamedTuple):
    """What goes through the model at once, which part of a batch it is, and, where it was seen before, its `sight`."""

    batch: Batch
    part: Part
    sight: Sight | None = None


class Step(NamedTuple):
    """A step: the records of its whole batch, how many of them each process takes, and the pieces for this one."""

    records: list[Record]
    lengths: list[int]
    pieces: list[Piece]


class Steps:
    """The steps of an epoch over a data set, in order, or in that of `sampler`.

    A process takes its part of each batch in up to `pieces` pieces. Where a batch, the last one, has fewer images than
    there are processes, one that is left out takes an image that counts for nothing: all must take part in what the
    processes do together.
    """

    def __init__(
        self,
        dataset: AnomalyDataset,
        batch_size: int,
        num_workers: int,
        device: torch.device,
        sampler: SeededSampler | None = None,
        pieces: int = 1,
    ):
        self.dataset, self.batch_size, self.pieces = dataset, batch_size, pieces
        self.sampler = sampler
        take = partial(_own_pieces, pieces=pieces)
        self.loader = make_loader(dataset, batch_size, num_workers, sampler, device, take)

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / self.batch_size)

    def epoch(self, number: int = 0, skip: int = 0) -> Iterator[Step]:
        """The steps of an epoch but for the first `skip`."""
        if self.sampler is not None:
            self.sampler.set_epoch(number, skip * self.batch_size)
        order = [index for index, _ in self.sampler] if self.sampler is not None else range(len(self.dataset))
        batches = iter(self.loader)
        for start in range(0, len(order), self.batch_size):
            records = [self.dataset.records[index] for index in order[start : start + self.batch_size]]
            own = [next(batches) for _ in _own_pieces([records], self.pieces)]
            lengths = [_length(len(records), number) for number in range(processes.count())]
            yield Step(records, lengths, [Piece(batch, self._part(batch, records, lengths)) for batch in own])

    def _part(self, batch: Batch, records: list[Record], lengths: list[int]) -> Part:
        stands_in = lengths[processes.number()] == 0
        masks = sum(record.has_mask for record in records)
        own = 0 if stands_in else int(batch["has_mask"].sum())
        return Part(
            images=0 if stands_in else len(batch["path"]) / len(records),
            masks=own / masks if masks else 1,
            total=processes.total,
        )


def _length(length: int, number: int) -> int:
    first, last = processes.bounds(length, number, processes.count())
    return last - first


def _own_pieces(batches: Iterable[list], pieces: int) -> Iterator[list]:
    """What this process takes of each batch, piece by piece."""
    for batch in batches:
        first, last = processes.bounds(len(batch), processes.number(), processes.count())
        own = batch[first:last] or batch[:1]
        many = min(pieces, len(own))
        for piece in range(many):
            yield own[slice(*processes.bounds(len(own), piece, many))]
