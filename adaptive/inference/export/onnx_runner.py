"""Runs an exported network on onnxruntime, only as deep as each image needs; no torch, torchvision or timm here."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adaptive.data.images.decode import decode_image
from adaptive.errors import DataError, ExportError, reason_of
from adaptive.inference.checks import check_finite, check_images, check_policy, checksum
from adaptive.inference.drift.seen import Seen, Watch, kept
from adaptive.inference.export.export_manifest import AGAIN, Manifest, StateTensor, require
from adaptive.inference.observer import Observer, tell
from adaptive.inference.policy import Policy

Array = NDArray[Any]


class ArrayPredictions(NamedTuple):
    """Answers to N images, each of which left at the exit that the policy chose.

    Attributes:
        labels: (N,) int64, indices into ``classes``.
        confidences: (N,) float32, probability of the label, at the exit's temperature.
        exits: (N,) int64, where the image left, from 1 to k.
    """

    labels: Array
    confidences: Array
    exits: Array


class OnnxClassifier:
    """An exported network with its policy.

    Blocks are run for the images that are still in, and not at all where none is; where the policy can let nobody
    leave, no decision is made.

    Args:
        folder: what ``adaptive export`` wrote; the manifest and every ONNX file are checked first.
        threads: of onnxruntime inside one block; by default as many as there are cores.
        providers: of onnxruntime, the best first, each by its name or as (name, options); by default the CPU.
        session_options: an onnxruntime.SessionOptions for every block, instead of ``threads``.
        decide_everywhere: decide also where the policy can let nobody leave, to measure what decisions cost.
        seen: count where images leave, and how sure the exits are of them; or counts of this policy to go on from.

    Attributes:
        manifest: what the folder holds.
        classes: names of the classes.
        preprocess: RGB image -> what `predict` takes, for one image.

    Raises:
        ExportError: the folder is none of an export, a file is missing or was changed, onnxruntime is missing, or has
            no such providers or options.
        PolicyError: ``seen`` holds counts of another policy.
    """

    def __init__(
        self,
        folder: str | Path,
        threads: int | None = None,
        providers: Sequence[str | tuple[str, Mapping[str, Any]]] | None = None,
        session_options: Any = None,
        decide_everywhere: bool = False,
        seen: Seen | bool = False,
    ) -> None:
        folder = Path(folder)
        self.manifest = Manifest.read(folder)
        self.manifest.check_files(folder, "onnx")
        self.classes, self.preprocess = self.manifest.classes, self.manifest.preprocess
        self._watch = Watch.asked(self.manifest.policy, seen)
        self.set_policy(self.manifest.policy, decide_everywhere)
        chosen, options = _providers(providers), _options(threads, session_options)
        self._sessions = [_session(folder / str(block.onnx), chosen, options) for block in self.manifest.blocks]

    @property
    def policy(self) -> Policy:
        """Who leaves where; `set_policy` changes it."""
        return self._policy

    def set_policy(self, policy: Policy, decide_everywhere: bool = False) -> None:
        """Let another policy decide; what is counted begins anew.

        Args:
            policy: of this network.
            decide_everywhere: see the class.

        Raises:
            PolicyError: it is for another number of exits, or was calibrated for other weights.
        """
        exits = len(self.manifest.blocks)
        check_policy(policy, self.manifest.exits, lambda: self.manifest.fingerprint)
        if self._watch is not None and policy is not self.manifest.policy:
            self._watch = Watch(policy)
        self._policy = policy
        self._fires = [decide_everywhere or policy.can_fire(i) for i in range(exits - 1)] + [True]
        # A score that depends on the exits before needs their answers, also where nobody can leave.
        remembers = policy.needs_every_exit and any(self._fires[:-1])
        self._decides = [fires or remembers for fires in self._fires]

    @property
    def seen(self) -> Seen:
        """The counts of all images answered so far (raises PolicyError where they are not kept)."""
        return kept(self._watch)

    def with_policy(self, policy: Policy, decide_everywhere: bool = False) -> OnnxClassifier:
        """Return a runner of the same files, read once, in which another policy decides; see `set_policy`."""
        other = copy.copy(self)
        other._watch = None  # it counts nothing
        other.set_policy(policy, decide_everywhere)
        return other

    def predict(self, images: Array) -> ArrayPredictions:
        """Images (N, C, H, W), floats as `preprocess` makes them -> labels, confidences and exits, (N,) each.

        Raises:
            DataError: images of another type, shape or size, or that hold NaN or infinite values.
            ModelError: an answer is NaN or infinite.
        """
        probabilities, exits = self.run(images)
        return ArrayPredictions(probabilities.argmax(axis=1), probabilities.max(axis=1), exits)

    def run(self, images: Array, observe: Observer | None = None) -> tuple[Array, Array]:
        """Images (N, C, H, W), floats -> probabilities (N, classes) float32, and exits (N,) int64 from 1 to k.

        Args:
            images: as `preprocess` makes them; an empty batch is allowed.
            observe: told what was done, part by part.

        Raises:
            DataError: images of another type, shape or size, or that hold NaN or infinite values.
            ModelError: an answer is NaN or infinite.
            ExportError: the files are not what the manifest says they are.
        """
        check_images(images, self.manifest.channels, self.manifest.input_size)
        images = _float32(images)
        total, exits = len(images), len(self._sessions)
        probabilities = np.zeros((total, len(self.classes)), np.float32)
        left_at = np.full(total, exits, np.int64)
        inside = np.arange(total)
        with _as_export_error(0):
            values: dict[str, Array] = {self.manifest.blocks[0].inputs[0]: images}
        memory = None
        last = 0
        for i, block in enumerate(self.manifest.blocks):
            if not len(inside):
                break
            values, last = self._block(i, values, len(inside)), i
            tell(observe, "block", i, len(inside))
            if not self._decides[i]:
                continue
            chances = self._policy.probabilities(i, values[block.logits])
            decision = self._policy.decide(i, chances, memory)
            memory, leaves = decision.memory, decision.leaves
            tell(observe, "decision", i, len(inside))
            if not self._fires[i]:
                continue
            probabilities[inside[leaves]] = chances[leaves]
            left_at[inside[leaves]] = i + 1
            stays = np.flatnonzero(~leaves)
            if 0 < len(stays) < len(inside):
                tensors = [*block.next_state, StateTensor(name=block.logits, batch=(0, 1))]
                with _as_export_error(i):
                    values = select(values, tensors, stays, len(inside))
                memory = None if memory is None else memory[stays]
            inside = inside[stays]
            tell(observe, "compaction", i, len(inside))
        check_finite(checksum(images) + checksum(probabilities), lambda: images, probabilities)
        if self._watch is not None:
            self._watch.add(left_at, probabilities.max(axis=1))
        if total:
            tell(observe, "finish", last, total)
        return probabilities, left_at

    def _block(self, i: int, values: Mapping[str, Array], images: int) -> dict[str, Array]:
        """Run a block on what crosses in front of it; returns its outputs by name (raises ExportError)."""
        block = self.manifest.blocks[i]
        with _as_export_error(i):
            found = self._sessions[i].run(block.outputs, {name: values[name] for name in block.inputs})
            outputs = dict(zip(block.outputs, found, strict=True))
            if outputs[block.logits].shape != (images, len(self.classes)):
                raise ValueError(f"logits of shape {outputs[block.logits].shape} for {len(self.classes)} classes")
        return outputs

    def open_images(self, sources: Iterable[str | Path | bytes]) -> NDArray[np.float32]:
        """Paths of image files, or their bytes -> what `predict` takes, (N, 3, H, W).

        Raises:
            DataError: an image cannot be read; the message names it.
        """
        opened = [self.preprocess(_open(i, source)) for i, source in enumerate(sources)]
        shape = (0, self.manifest.channels, self.manifest.input_size, self.manifest.input_size)
        return np.stack(opened) if opened else np.zeros(shape, np.float32)


@contextmanager
def _as_export_error(i: int) -> Iterator[None]:
    """Say in one line that block i, from 0, is not what its manifest says; onnxruntime raises whatever it likes."""
    try:
        yield
    except Exception as error:
        reason = reason_of(f"{type(error).__name__}: {error}", 200)
        raise ExportError(f"block {i + 1} does not fit the export's manifest ({reason}); {AGAIN}") from None


def select(values: Mapping[str, Array], tensors: Iterable[StateTensor], kept: Array, batch: int) -> dict[str, Array]:
    """Select some images of the tensors that cross from one block to the next.

    Args:
        values: tensors by name, of ``batch`` images.
        tensors: which of them, and where the batch is in each.
        kept: (M,) indices of the images to keep.
        batch: N.
    """
    selected = {}
    for tensor in tensors:
        value = values[tensor.name]
        if tensor.batch is not None:
            dim, multiple = tensor.batch
            before, after = value.shape[:dim], value.shape[dim + 1 :]
            parts = value.reshape(*before, batch, multiple, *after).take(kept, axis=dim)
            value = parts.reshape(*before, len(kept) * multiple, *after)
        selected[tensor.name] = value
    return selected


def _float32(images: Any) -> Array:
    """Images of any float type, a numpy array or a torch tensor, as onnxruntime takes them."""
    if not isinstance(images, np.ndarray):
        images = images.detach().cpu().float().numpy()
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(images, np.float32)


def _providers(given: Sequence[Any] | None) -> dict[str, Mapping[str, Any]]:
    """Options by the provider's name, in order (raises ExportError where onnxruntime lacks one)."""
    pairs = [(one, {}) if isinstance(one, str) else one for one in given or ("CPUExecutionProvider",)]
    sound = not isinstance(given, str) and all(isinstance(one, tuple | list) and len(one) == 2 for one in pairs)
    if not sound or not all(isinstance(name, str) and isinstance(options, Mapping) for name, options in pairs):
        example = "['CPUExecutionProvider'], or [('CPUExecutionProvider', {})] with options"
        raise ExportError(f"providers = {given!r}: give a list, such as {example}")
    have = require("onnxruntime").get_available_providers()
    missing = sorted({name for name, _ in pairs} - set(have))
    if missing:
        raise ExportError(f"providers = {', '.join(missing)}: this onnxruntime has {', '.join(have)}")
    return dict(pairs)


def _options(threads: int | None, given: Any) -> Any:
    onnxruntime = require("onnxruntime")
    if given is None:
        if threads is not None and threads < 1:
            raise ExportError(f"threads = {threads}: give 1 or more, or None for as many as there are cores")
        given = onnxruntime.SessionOptions()
        given.intra_op_num_threads = threads or 0
    elif threads is not None:
        raise ExportError(f"threads = {threads} and session_options: set session_options.intra_op_num_threads")
    elif not isinstance(given, onnxruntime.SessionOptions):
        raise ExportError(f"session_options is a {type(given).__name__}; give an onnxruntime.SessionOptions")
    return given


def _session(path: Path, providers: Mapping[str, Mapping[str, Any]], options: Any) -> Any:
    onnxruntime = require("onnxruntime")
    try:
        found = onnxruntime.InferenceSession(path, options, providers=[(n, dict(o)) for n, o in providers.items()])
    except Exception as error:  # onnxruntime's exceptions have no base of their own
        reason = reason_of(error, 200)
        settings = "; check the options of providers" if any(providers.values()) else ""
        raise ExportError(
            f"{path} cannot be loaded by onnxruntime {onnxruntime.__version__} ({reason}){settings}; {AGAIN}"
        ) from None
    lacking = [name for name in providers if name not in found.get_providers()]
    if lacking:  # onnxruntime would go on with what is left, several times slower
        raise ExportError(
            f"providers = {', '.join(lacking)}: onnxruntime {onnxruntime.__version__} cannot start it on this machine; "
            "install the libraries that it takes, or leave it out"
        )
    return found


def _open(number: int, source: str | Path | bytes) -> Any:
    name = f"image {number}" if isinstance(source, bytes) else str(source)
    try:
        return decode_image(source if isinstance(source, bytes) else Path(source).read_bytes())
    except OSError as error:
        raise DataError(f"{name} cannot be read ({error.strerror}); check the path") from None
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
