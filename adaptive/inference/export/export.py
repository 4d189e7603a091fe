"""`export`: writes one file per block and format and a manifest, into a folder that is published by one rename."""

from __future__ import annotations

import copy
import errno
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from adaptive.errors import ExportError, reason_of
from adaptive.files import sync_folder
from adaptive.inference.checks import check_answers, check_images, check_policy, refuse_broken_images
from adaptive.inference.export.export_manifest import BlockEntry, FileEntry, Format, Manifest, file_entry, require
from adaptive.inference.export.pieces import Piece, pieces_of, with_plain_attention
from adaptive.inference.export.preprocess import Preprocess
from adaptive.inference.policy import Policy
from adaptive.locks import LockHeldError, workshop
from adaptive.networks.network import AdaptiveNetwork
from adaptive.networks.weights.fingerprint import fingerprint

OPSET = 20  # by default: the first with GELU; onnxruntime reads it from 1.17 on
LOWEST_OPSET = 18  # the first that torch's exporter writes
LARGEST_FILE = 1_900_000_000  # bytes of weights; an ONNX file is one protobuf message, which ends at 2 GiB
TOLERANCE = 1e-4  # of the largest logit
BATCHES = (1, 3)  # that are verified
ELSEWHERE = "place the exits elsewhere, or take another backbone"


def export(
    network: AdaptiveNetwork,
    folder: str | Path,
    *,
    backbone: str,
    classes: Sequence[str],
    preprocess: Preprocess,
    policy: Policy,
    formats: Sequence[Format] = ("onnx", "torch"),
    images: Tensor | None = None,
    opset: int = OPSET,
) -> Manifest:
    """Write a network as one file per block, weights in float32, for any number of images.

    A block's file holds block i, exit i and the link that feeds it. Its inputs are the tensors in front of the block
    and, where the exit collaborates, the previous exit's logits; its outputs the tensors behind it and the logits.

    Args:
        network: is copied, and stays as it is.
        folder: to write; must not exist, or be empty.
        backbone: name of the plain model.
        classes: names of the C classes.
        preprocess: what makes the network's input of an image.
        policy: who leaves where.
        formats: ``onnx`` (``block_1.onnx``, which `OnnxClassifier` runs), ``torch`` (``block_1.pt2``, for
            torch.export.load), or both.
        images: (N, C, H, W) float32, on which the files are verified besides random ones.
        opset: version of ONNX's operators, from 18 to the newest that the installed onnx knows; what runs the files
            has to know it, too.

    Returns:
        The manifest, as it was written.

    Raises:
        ExportError: the folder is taken, a package is missing, a block cannot be exported, the files answer other than
            the network, or what was given does not belong to the network.
        PolicyError: the policy is for another number of exits, or was calibrated for other weights.
        DataError: images of another type, shape or size, or that hold NaN or infinite values.
        ModelError: the network's answers are NaN or infinite.
    """
    folder = Path(folder)
    own = fingerprint(network)
    _check(network, own, folder, classes, preprocess, policy, formats, opset)
    plain = copy.deepcopy(network).cpu().float().to(memory_format=torch.contiguous_format).eval()
    # A part's gradient fork has nothing to do here, and recomputing would only be in a recorder's way.
    plain.equilibrium, plain.checkpointing = False, False
    batches = _batches(plain, images)
    with _written_aside(folder) as aside, torch.no_grad(), _quiet():
        pieces = pieces_of(plain)
        files: list[FileEntry] = []
        for piece in pieces:
            files += _write(piece, f"block {piece.number} of {backbone}", formats, aside, opset)
        blocks = [piece.entry(formats) for piece in pieces]
        for kind in formats:
            _verify(plain, blocks, kind, aside, backbone, batches)
        manifest = Manifest(
            backbone=backbone,
            exits=network.exit_names,
            fingerprint=own,
            classes=list(classes),
            input_size=network.input_size,
            channels=network.channels,
            preprocess=preprocess,
            policy=policy,
            costs=[cost.macs for cost in plain.costs()],
            blocks=blocks,
            files=files,
        )
        manifest.write(aside)
    return manifest


def check_opset(opset: int) -> None:
    """Refuse a version of ONNX's operators that cannot be written (ExportError)."""
    newest = require("onnx").defs.onnx_opset_version()
    if isinstance(opset, bool) or not isinstance(opset, int) or not LOWEST_OPSET <= opset <= newest:
        raise ExportError(f"opset = {opset!r}: give a whole number from {LOWEST_OPSET} to {newest}, {OPSET} by default")


def _write(piece: Piece, name: str, formats: Sequence[Format], folder: Path, opset: int) -> list[FileEntry]:
    """Write a piece's files; ``name`` is for messages."""
    entry = piece.entry(formats)
    with _one_line(name, "torch.export"):
        program = _without_origin(piece.record())
        if entry.torch is not None:
            torch.export.save(program, folder / entry.torch)
    files = [] if entry.torch is None else [file_entry(folder / entry.torch, "torch")]
    if entry.onnx is not None:
        with _one_line(name, "ONNX"):
            onnx = torch.onnx.export(
                with_plain_attention(program),
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=entry.inputs,
                output_names=entry.outputs,
            )
            assert onnx is not None
            _strip(onnx.model)
            weights = sum(t.numel() * t.element_size() for t in piece.part.state_dict().values())
            onnx.save(folder / entry.onnx, external_data=weights > LARGEST_FILE)
        written = onnx.model.opset_imports[""]
        if written != opset:  # the exporter keeps its own where it cannot convert
            raise ExportError(f"opset = {opset}: torch writes {name} with {written} alone; give that, or {OPSET}")
        files += [file_entry(path, "onnx") for path in sorted(folder.glob(f"{entry.onnx}*"))]
    return files


def _without_origin(program: ExportedProgram) -> ExportedProgram:
    """Remove where each operation was called: files of the exporter's machine, which are nobody else's business."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program


def _strip(model: Any) -> None:
    """Remove the exporter's remarks (names of its files and classes) from an ONNX model and all that it is made of."""
    for part in (model, model.graph, *model.functions.values()):
        part.metadata_props.clear()
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node in graph.all_nodes():
            node.metadata_props.clear()
            for value in (*node.outputs, *(value for value in node.inputs if value is not None)):
                value.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' remarks about their own internals from the user."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _one_line(name: str, target: str) -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # the exporters raise whatever they like
        reason = reason_of(_root(error))
        raise ExportError(f"{name} cannot be exported to {target}: {reason}; {ELSEWHERE}") from error


def _root(error: BaseException) -> str:
    """The first cause of an error: the exporters wrap an error in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _verify(
    network: AdaptiveNetwork, blocks: list[BlockEntry], kind: Format, folder: Path, backbone: str, batches: list[Tensor]
) -> None:
    """Compare every block's logits with the network's (raises ExportError)."""
    runs = [_opened(folder, block, kind) for block in blocks]
    for batch in batches:
        values = {blocks[0].inputs[0]: batch}
        for i, (block, expected) in enumerate(zip(blocks, network(batch), strict=True)):
            try:
                found = runs[i]([values[name] for name in block.inputs])
            except Exception as error:  # as the runtimes raise whatever they like
                reason = reason_of(_root(error))
                raise ExportError(
                    f"block {i + 1} of {backbone} does not run as {kind} on {len(batch)} images: {reason}; {ELSEWHERE}"
                ) from error
            values = dict(zip(block.outputs, found, strict=True))
            logits, largest = values[block.logits], float(expected.abs().max())
            difference = float((logits - expected).abs().max()) if logits.shape == expected.shape else float("inf")
            if not difference <= TOLERANCE * largest:
                raise ExportError(
                    f"block {i + 1} of {backbone} answers other as {kind} than in the network: logits differ by "
                    f"{difference:.2g}, the largest is {largest:.2g}; {ELSEWHERE}"
                )


@torch.no_grad()
def _batches(network: AdaptiveNetwork, images: Tensor | None) -> list[Tensor]:
    """What the files are verified on: noise, and the first of the images, if any; to which the network has answers."""
    size, generator = network.input_size, torch.Generator().manual_seed(0)
    batches = [torch.randn(n, network.channels, size, size, generator=generator) for n in BATCHES]
    if images is not None:
        check_images(images, network.channels, size)
        refuse_broken_images(images)
        batches += [images[:n].float().cpu() for n in BATCHES]
    for batch in batches:
        check_answers(network(batch))
    return batches


def _opened(folder: Path, block: BlockEntry, kind: Format) -> Callable[[list[Tensor]], list[Tensor]]:
    """A block's file as a function of its inputs."""
    if kind == "torch":
        module = torch.export.load(folder / str(block.torch)).module()
        count = len(block.state)
        return lambda inputs: list(module(tuple(inputs[:count]), inputs[count] if len(inputs) > count else None))
    session = require("onnxruntime").InferenceSession(folder / str(block.onnx), providers=["CPUExecutionProvider"])

    def run(inputs: list[Tensor]) -> list[Tensor]:
        arrays = {name: tensor.numpy() for name, tensor in zip(block.inputs, inputs, strict=True)}
        return [torch.from_numpy(array) for array in session.run(block.outputs, arrays)]

    return run


def _check(
    network: AdaptiveNetwork,
    own: str,
    folder: Path,
    classes: Sequence[str],
    preprocess: Preprocess,
    policy: Policy,
    formats: Sequence[Format],
    opset: int,
) -> None:
    """Refuse what cannot become an export, before anything is written (raises ExportError)."""
    if not formats or set(formats) - {"onnx", "torch"}:
        raise ExportError(f"formats = {','.join(formats)!r}: use onnx, torch or onnx,torch")
    if "onnx" in formats:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            require(package)
        check_opset(opset)
    if (folder.exists() and not folder.is_dir()) or (folder.is_dir() and any(folder.iterdir())):
        raise ExportError(f"{folder} exists and is not empty; give another folder, or remove it first")
    try:
        str(folder).encode()
    except UnicodeEncodeError:  # torch and onnxruntime open no such file
        raise ExportError(f"{folder} is not UTF-8; give a folder whose name is") from None
    if len(classes) != network.num_classes:
        raise ExportError(f"{len(classes)} classes were given, the network has {network.num_classes}; give its own")
    if preprocess.crop != network.input_size:
        raise ExportError(
            f"preprocess makes images of {preprocess.crop} pixels, the network was built for {network.input_size}; "
            "give that of its configuration"
        )
    check_policy(policy, network.exit_names, lambda: own)


@contextmanager
def _written_aside(folder: Path) -> Iterator[Path]:
    """Give a folder beside the destination, which takes its place when everything went well (raises ExportError)."""
    beside = folder.absolute().with_name(f".{folder.absolute().name}.exporting")
    aside = beside / "export"
    try:
        with workshop(beside) as lock:
            shutil.rmtree(aside, ignore_errors=True)  # a killed export's
            aside.mkdir()
            try:
                yield aside
                sync_folder(aside)
                if lock.lost:
                    raise ExportError(f"{lock.lost}: this export stood still for too long; run it again")
                aside.replace(folder)
                sync_folder(folder.absolute().parent)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    except LockHeldError as held:
        raise ExportError(f"{folder} is being written by another export ({held}); wait for it to end") from None
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise ExportError(f"{folder} exists and is not empty; give another folder, or remove it first") from None
        raise ExportError(
            f"{folder} cannot be written ({error.strerror or error}); free space or give another folder"
        ) from error
