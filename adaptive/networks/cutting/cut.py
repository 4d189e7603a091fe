"""Cuts a timm model into blocks at branch points, with its own end as the last exit's head."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.errors import ModelError, reason_of
from adaptive.networks.backbone import Backbone, build_backbone, configuration
from adaptive.networks.cutting.block import Block
from adaptive.networks.cutting.branch_points import BranchPoint, Survey, backbone_end, spread
from adaptive.networks.cutting.graphs import Emitter, TraceError, batch_dim, merge
from adaptive.networks.cutting.recording import FORWARD_FEATURES, Op, Recording, Ref, refs
from adaptive.networks.cutting.runs import NeedsNumbersError, Runs, without_numbers_if_possible
from adaptive.networks.state import BatchDim

ATTEMPTS = 8  # choices of branch points to try before giving up, when a model's own code forbids some


@dataclass
class Cut:
    """A backbone in pieces.

    Attributes:
        blocks: k blocks; each maps the tensors that cross its beginning to those that cross its end.
        head: what follows the last block, up to the logits.
        branch_points: where the k - 1 early exits branch off.
        batch_dims: per block, where the batch is in each tensor that crosses its end.
        overwritten: per early exit, whether what it reads is changed in place later on, so that a copy is needed.
    """

    blocks: list[Block]
    head: Block
    branch_points: list[BranchPoint]
    batch_dims: list[tuple[BatchDim | None, ...]]
    overwritten: list[bool]


def survey(model: nn.Module, size: int, channels: int = 3) -> Survey:
    """Record everything a model does with images of one size, and find where it can be cut.

    Raises:
        ModelError: the model does not run on such images.
        NeedsNumbersError: it cannot be told of a model on the meta device.
    """
    return without_numbers_if_possible(_survey, model, size, channels)


def _survey(runs: Runs) -> Survey:
    with telling_of_images(runs.model, runs.size):
        return Survey(runs.model, runs.survey())


@contextmanager
def telling_of_images(model: nn.Module, size: int) -> Iterator[None]:
    """Turn what a model raises on images of a size that does not suit it into a ModelError."""
    try:
        yield
    except (RuntimeError, AssertionError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = reason_of(error, 200)
        _, height, width = configuration(model).get("input_size", (3, 224, 224))
        raise ModelError(
            f"the backbone does not run on images of {size} x {size} pixels: {reason}; "
            f"it was made for {height} x {width}, and takes other sizes only as far as its windows and strides fit"
        ) from error


def branch_points(
    model: nn.Module | str, input_size: int | None = None, **backbone: Any
) -> list[tuple[str, float, tuple[int, ...]]]:
    """List a model's branch points: module name, share of the backbone's MACs, feature shape without the batch.

    Args:
        model: a timm model on the CPU, or a timm name.
        input_size: side of the square input in pixels; by default the model's own (224 if it has none).
        backbone: further arguments of timm.create_model, for a name.

    Raises:
        ModelError: timm has no such model, or it does not run on such images.
    """
    if isinstance(model, str):
        _, surveyed = survey_by_name(model, input_size, **backbone)
    else:
        channels, own_size, _ = configuration(model).get("input_size", (3, 224, 224))
        with torch.random.fork_rng(devices=[]):
            surveyed = survey(model, input_size or own_size, channels)
    return [(point.name, point.share, point.shape) for point in surveyed.branch_points()]


def survey_by_name(name: str, input_size: int | None = None, **arguments: Any) -> tuple[Backbone, Survey]:
    """Build a plain timm model, without numbers where its code allows that, and survey it; see `survey`."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                plain = build_backbone(name, input_size, **arguments)
            return plain, survey(plain.model, plain.size, plain.channels)
        except (NeedsNumbersError, ModelError):  # mistakes are told of what is built below
            plain = build_backbone(name, input_size, **arguments)
            return plain, survey(plain.model, plain.size, plain.channels)


def cut(model: nn.Module, exits: int | list[str], size: int, channels: int = 3) -> Cut:
    """Cut a timm model into blocks. The pieces hold the model's own modules: use the model itself no more.

    Args:
        model: on the CPU; put into eval mode.
        exits: number of exits, or the names of the modules after which the early ones branch off.
        size: side of the square input in pixels.
        channels: of the input.

    A model on the meta device is cut as well: what comes out is an outline, on that device.

    Raises:
        NeedsNumbersError: the model is on the meta device, and its code asks for values.
        ModelError: there is no such branch point, or the model's code cannot be recorded there.
    """
    with torch.random.fork_rng(devices=[]):
        return without_numbers_if_possible(lambda runs: _cut(runs, exits), model, size, channels)


def _cut(runs: Runs, exits: int | list[str]) -> Cut:
    surveyed = _survey(runs)
    if isinstance(exits, list):
        named = surveyed.named(exits)
        try:
            return _cut_at(runs, surveyed, named)
        except TraceError as error:
            raise ModelError(f"exits = {exits}: cannot cut there; {error}; name other modules") from error
    unopenable: set[str] = set()
    for _ in range(ATTEMPTS):
        chosen = spread(surveyed.branch_points(unopenable), exits)
        try:
            return _cut_at(runs, surveyed, chosen)
        except TraceError as error:
            if not error.module or error.module in unopenable:
                raise ModelError(
                    f"exits = {exits}: cannot cut this backbone; {error}; "
                    "name modules that `adaptive models BACKBONE` lists, or take another backbone"
                ) from error
            unopenable.add(error.module)
    raise ModelError(
        f"exits = {exits}: found no cut; cannot open {', '.join(sorted(unopenable))}; name modules outside of these"
    )


def _cut_at(runs: Runs, surveyed: Survey, points: list[BranchPoint]) -> Cut:
    model = runs.model
    opened = {parent for point in points for parent in point.parents}
    opened |= set(_parents_of_end(surveyed))
    two, three, training = runs.evaluating(2, opened), runs.evaluating(3, opened), runs.training(2, opened)
    ops = merge(two, three, training)
    ends = [_end_of(two, point.name) for point in points]
    ends.append(backbone_end(model, two))
    if any(a >= b for a, b in itertools.pairwise(ends)):
        raise TraceError("", "an exit lies behind the backbone's own end")
    if not isinstance(two.result, Ref):
        raise ModelError(
            f"the backbone returns {type(two.result).__name__}, not one tensor of logits; "
            "give the argument that makes timm return logits alone, or take another backbone"
        )
    taps = [_tap(two, point.name) for point in points]
    crossings = [_crossing(two, ops, end) for end in ends]
    for tap, crossing in zip(taps, crossings, strict=False):
        crossing.sort(key=lambda index: index != tap)  # stable: the exit's own feature first
    constants: dict[str, Tensor] = {}
    emitter = Emitter(ops, two, three, constants)
    bounds, inputs = [0, *ends, len(ops)], [[0], *crossings]
    outputs = [tuple(Ref(index) for index in crossing) for crossing in crossings]
    graphs = [
        emitter.graph(bounds[i], bounds[i + 1], inputs[i], [*outputs, two.result][i]) for i in range(len(ends) + 1)
    ]
    for name, tensor in constants.items():
        model.register_buffer(name, tensor, persistent=False)
    blocks = [Block(model, graph) for graph in graphs]
    head = Block(model, graphs[-1], _unreached(model, blocks))
    dims = [tuple(batch_dim(index, two, three) for index in crossing) for crossing in crossings]
    return Cut(blocks[:-1], head, points, dims, [tap in two.changed for tap in taps])


def _parents_of_end(surveyed: Survey) -> tuple[str, ...]:
    """The modules around the backbone's own end."""
    features = surveyed.recording.span(FORWARD_FEATURES)
    if features and not features.parents:
        return ()
    op = surveyed.recording.ops[surveyed.end]
    return next((s.parents for s in surveyed.recording.spans if s.name == op.target), ())


def _end_of(recording: Recording, name: str) -> int:
    span = recording.span(name)
    if span is None:
        raise TraceError("", f"module {name} is not called once")
    return span.end


def _tap(recording: Recording, name: str) -> int:
    span = recording.span(name)
    tensor = span.tensor() if span else None
    if tensor is None:
        raise TraceError("", f"module {name} does not return one tensor")
    return tensor.index


def _crossing(recording: Recording, ops: list[Op], end: int) -> list[int]:
    """Tensors that the first ``end`` operations make and later ones need, the input-independent ones included."""
    born = {0} | {index for op in ops[:end] for index in refs(op.output)}
    needed = {index for op in ops[end:] for index in refs((op.args, op.kwargs))} | refs(recording.result)
    return sorted(born & needed)


def _unreached(model: nn.Module, blocks: list[Block]) -> tuple[str, ...]:
    """Names of what no block holds: it stays with the backbone's own end, for its state_dict."""
    held = {id(tensor) for block in blocks for tensor in block.state_dict(keep_vars=True).values()}
    return tuple(name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) not in held)
