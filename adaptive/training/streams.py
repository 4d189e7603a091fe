"""The batches of a run: training and validation, from shards or from memory that the ranks of a machine share."""

from __future__ import annotations

import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from adaptive.data.images.crop_flip import DrawnBy
from adaptive.data.reading.in_memory import DecodedSplit, Offer
from adaptive.data.reading.stream import EvaluationStream, LoaderOptions, TrainStream
from adaptive.errors import AdaptiveError
from adaptive.networks.precision import memory_format
from adaptive.training.checkpoints.store import Checkpoint
from adaptive.training.engine.group import gather_objects
from adaptive.training.preflight import recorded_draws
from adaptive.training.prepared_run import Prepared


@dataclass(frozen=True)
class Streams:
    """Where a run's batches come from; ``drawn_by`` is how crop and flip are drawn, which checkpoints record."""

    train: TrainStream
    validation: EvaluationStream
    drawn_by: DrawnBy

    @classmethod
    def open(cls, prepared: Prepared, checkpoint: Checkpoint | None = None) -> Streams:
        """Open both splits; with data.in_memory they are decoded first (collective).

        Raises:
            CheckpointError: the run to be continued draws crop and flip in an unknown way.
            DataError: a split cannot be read.
            MachineError: there is not enough memory.
        """
        config, batch, index = prepared.config, prepared.batch, prepared.index
        data, drawn_by = config.data, recorded_draws(checkpoint)
        training = validation = None
        if data.in_memory:
            splits = _decode_once_per_machine(prepared)
            training, validation = splits.training, splits.validation
        layout = memory_format(config.train.channels_last)
        loader = LoaderOptions(prepared.ranks.rank, batch.world, data.workers, prepared.device, layout)
        train = TrainStream(
            index, data, data.train_split, loader, seed=config.train.seed, global_batch=batch.global_batch,
            micro_batch=batch.micro_batch, decoded=training, drawn_by=drawn_by,
        )  # fmt: skip
        stream = EvaluationStream(index, data, data.val_split, loader, batch=config.evaluate.batch, decoded=validation)
        return cls(train, stream, drawn_by)


class _Splits(NamedTuple):
    training: DecodedSplit
    validation: DecodedSplit


def _decode_once_per_machine(prepared: Prepared) -> _Splits:
    """Let one rank of every machine decode the splits, and the others map its memory (collective)."""
    places = gather_objects(_memory_place())
    first = places.index(places[prepared.ranks.rank])
    own: _Splits | None = None
    sent: list[Offer] | AdaptiveError | None = None
    if first == prepared.ranks.rank:
        try:
            own = _decode(prepared, workers=prepared.config.data.workers * places.count(places[first]))
            sent = [split.offer() for split in own]
        except AdaptiveError as error:
            sent = error
    answers = gather_objects(sent)
    for answer in answers:
        if isinstance(answer, AdaptiveError):
            raise answer
    splits = own or _attach(prepared, answers[first])
    gather_objects(None)  # everybody has mapped the memory
    for split in splits:
        split.close_handle()
    return splits


def _decode(prepared: Prepared, workers: int) -> _Splits:
    data, index = prepared.config.data, prepared.index
    training = DecodedSplit.decode(index, data, data.train_split, training=True, workers=workers)
    return _Splits(training, DecodedSplit.decode(index, data, data.val_split, training=False, workers=workers))


def _attach(prepared: Prepared, offers: list[Offer]) -> _Splits:
    if not all(offer.path for offer in offers):  # a system without anonymous files
        return _decode(prepared, prepared.config.data.workers)
    training, validation = map(DecodedSplit.attach, offers)
    return _Splits(training, validation)


def _memory_place() -> tuple[str, int]:
    """Return what is the same for processes that can reach each other's memory: host and namespace of processes."""
    namespace = 0
    with suppress(OSError):
        namespace = Path("/proc/self/ns/pid").stat().st_ino
    return platform.node(), namespace
