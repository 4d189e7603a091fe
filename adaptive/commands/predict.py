"""``adaptive predict RUN IMAGE...``: classify images: label, confidence, exit and time, as a table or JSON lines."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptive.commands.run_options import (
    add_device,
    add_weights,
    choose_device,
    load_run,
    network_for_inference,
    no_policy_notice,
    prepare_tables,
)
from adaptive.foreign_text import say, visible

if TYPE_CHECKING:
    from adaptive.data.images.image_files import ImageFile
    from adaptive.inference.drift.seen import Watch
    from adaptive.inference.policy import Policy

BATCH = 64
SKIPPED_LISTED = 10  # kinds of skipped files that are told


@dataclass(frozen=True)
class Model:
    """A classifier of images: a trained run, or an exported network.

    Attributes:
        classes: their names.
        prepare: an image file -> an array (3, H, W) (raises DataError).
        answer: arrays -> per image its exit, from 1, and the probability of every class.
        exits: how many there are.
        notice: a line for the user, or nothing.
        policy: who leaves where.
        watch: counts them, if asked to.
    """

    classes: list[str]
    prepare: Callable[[ImageFile], Any]
    answer: Callable[[list[Any]], tuple[list[int], list[list[float]]]]
    exits: int
    notice: str = ""
    policy: Policy | None = None
    watch: Watch | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("model", metavar="RUN", help="run folder, or a folder that `adaptive export` wrote")
    parser.add_argument(
        "images",
        metavar="IMAGE",
        nargs="+",
        help="files, folders, patterns in quotes, or - for stdin (one image, or names of files, one a line)",
    )
    parser.add_argument(
        "--policy", metavar="FILE", help="who leaves where; by default RUN/policy.json; none: everybody goes to the end"
    )
    parser.add_argument(
        "--seen",
        metavar="FILE",
        help="add to this file where the images left, and how sure the exits were, for `adaptive policy check`",
    )
    parser.add_argument("--top", type=int, default=1, metavar="K", help="likeliest classes to name (default 1)")
    parser.add_argument("--batch", type=int, default=BATCH, help=f"images at a time (default {BATCH})")
    parser.add_argument("--threads", type=int, help="threads that decode images (default: what Python chooses)")
    add_weights(parser)
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object per image")


def run(arguments: argparse.Namespace) -> int:
    """Carry out the command; 1 if an image got no answer, which does not keep the others from theirs."""
    from adaptive.data.images.image_files import Skipped, find_images
    from adaptive.errors import AdaptiveError
    from adaptive.files import json_text

    for name in ("top", "batch", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise AdaptiveError(f"--{name} {value} is too small; give 1 or more")
    prepare_tables(arguments)
    skipped = Skipped()
    images = find_images(arguments.images, sys.stdin.buffer, skipped)
    for line in skipped.files.lines(SKIPPED_LISTED):
        say(f"adaptive predict: skipped {line}", file=sys.stderr)
    is_export = (Path(arguments.model) / "manifest.json").is_file()
    model = open_export(arguments) if is_export else open_run(arguments)
    if arguments.seen is not None:
        model = replace(model, watch=_watch(model, arguments.seen))
    if model.notice:
        say(f"adaptive predict: {model.notice}", file=sys.stderr)
    bad = [f"folder {folder}; the images in it have no answer" for folder in skipped.folders]
    rows = answers(model, images, arguments.batch, min(arguments.top, len(model.classes)), arguments.threads, bad)
    answered: list[dict[str, Any]] = []
    try:
        for row in rows:
            if arguments.json:
                print(json_text(row), flush=True)
            else:
                answered.append(row)
    finally:  # what was answered before something failed, or the user stopped it, is shown as well
        _print_table(answered, model.exits)
        if model.watch is not None:
            own = model.watch.seen
            total = own.add_to(arguments.seen)
            say(f"counted {own.images:,} images: {arguments.seen} holds {total.images:,}", file=sys.stderr)
    for message in bad:
        say(f"adaptive predict: error: {message}", file=sys.stderr)
    return 1 if bad else 0


def _watch(model: Model, path: str) -> Watch:
    """Refuse a file that cannot take the counts, before anything is answered (raises PolicyError)."""
    import importlib

    from adaptive.errors import PolicyError
    from adaptive.inference.drift.seen import Seen, Watch

    importlib.import_module("adaptive.locks")  # if its package is missing, nothing was answered in vain
    assert model.policy is not None
    if not Path(path).absolute().parent.is_dir():
        raise PolicyError(f"--seen {path}: there is no such folder; make it, or choose another file")
    if Path(path).exists():
        Seen.load(path).check(model.policy, f"--seen {path}", "the one in use")
    return Watch(model.policy)


def answers(
    model: Model, images: list[ImageFile], batch: int, top: int, threads: int | None, bad: list[str]
) -> Iterator[dict[str, Any]]:
    """Yield a record per image that is answered, in order; the messages about others go to ``bad``.

    While one batch is being answered the next one is decoded.
    """
    from concurrent.futures import ThreadPoolExecutor

    from adaptive.errors import DataError, ModelError

    def prepare(image: ImageFile) -> Any:
        try:
            return model.prepare(image)
        except DataError as error:
            return error
        except MemoryError:
            return DataError(f"{image.name}: there is not enough memory to prepare it; use fewer --threads")

    chunks = [images[start : start + batch] for start in range(0, len(images), batch)]
    with ThreadPoolExecutor(threads) as pool:
        coming = [pool.submit(prepare, image) for image in chunks[0]]
        warm = False
        for number, chunk in enumerate(chunks):
            arrays = [future.result() for future in coming]
            coming = [pool.submit(prepare, image) for image in chunks[number + 1]] if number + 1 < len(chunks) else []
            bad += [str(array) for array in arrays if isinstance(array, DataError)]
            ready = [(i, a) for i, a in zip(chunk, arrays, strict=True) if not isinstance(a, DataError)]
            if not ready:
                continue
            if not warm:  # the first call sets things up; its time belongs to no image
                with contextlib.suppress(DataError, ModelError):
                    model.answer([ready[0][1]])
                warm = True
            start = time.perf_counter()
            found = _answered(model, ready, bad)
            each = 1000 * (time.perf_counter() - start) / len(ready)
            for image, exit_, chances in found:
                yield _record(image.name, model.classes, exit_, chances, top, each)


def _answered(
    model: Model, ready: list[tuple[ImageFile, Any]], bad: list[str]
) -> Iterator[tuple[ImageFile, int, list[float]]]:
    """Answer a batch; where that fails, image by image, so that one of them does not cost the others their answers."""
    import numpy as np

    from adaptive.errors import DataError, ModelError

    images, arrays = zip(*ready, strict=True)
    try:
        exits, chances = model.answer(list(arrays))
        if model.watch is not None:  # not the runner's own counts: it has answered the first image twice
            model.watch.add(np.asarray(exits), np.asarray([max(each) for each in chances], np.float32))
        return zip(images, exits, chances, strict=True)
    except (DataError, ModelError) as error:
        if len(ready) > 1:
            return chain.from_iterable([list(_answered(model, [one], bad)) for one in ready])
        bad.append(f"{images[0].name}: {error}")
        return iter(())


def _record(
    name: str, classes: list[str], exit_: int, chances: list[float], top: int, milliseconds: float
) -> dict[str, Any]:
    order = sorted(range(len(chances)), key=lambda c: (-chances[c], c))[:top]
    record = {
        "image": name,
        "label": classes[order[0]],
        "confidence": round(chances[order[0]], 6),
        "exit": exit_,
        "ms": round(milliseconds, 3),
    }
    if top > 1:
        record["top"] = [{"label": classes[c], "confidence": round(chances[c], 6)} for c in order]
    return record


def open_run(arguments: argparse.Namespace) -> Model:
    """Open a run folder (raises AdaptiveError)."""
    import torch

    from adaptive.inference.runner import DynamicClassifier
    from adaptive.runs import load_policy

    trained = load_run(arguments.model, arguments.checkpoint, arguments.weights)
    own = trained.folder / "policy.json"
    policy: Policy | None = None
    notice = ""
    if arguments.policy is None and not own.is_file():
        notice = no_policy_notice(trained, "every image goes to the last exit")
    elif arguments.policy != "none":
        policy = load_policy(arguments.policy or str(own), trained)
    device = choose_device(arguments.device)
    network = network_for_inference(trained, device)
    classifier = DynamicClassifier(network, policy, trained.config.train.precision)

    def answer(tensors: list[Any]) -> tuple[list[int], list[list[float]]]:
        probabilities, exits = classifier.run(torch.stack(tensors))
        return exits.tolist(), probabilities.tolist()

    return Model(
        trained.classes,
        lambda image: trained.transform(image.open()),
        answer,
        len(trained.network.exits),
        notice,
        classifier.policy,
    )


def open_export(arguments: argparse.Namespace) -> Model:
    """Open an export folder; neither torch nor timm is imported (raises AdaptiveError)."""
    import numpy as np

    from adaptive.errors import ExportError
    from adaptive.inference.checks import read_policy
    from adaptive.inference.export.onnx_runner import OnnxClassifier
    from adaptive.inference.policy import EVERYBODY, NOBODY, Policy

    if arguments.device == "cuda":
        raise ExportError("--device cuda: an export runs on the CPU here; use auto, or OnnxClassifier's providers")
    classifier = OnnxClassifier(Path(arguments.model))
    if arguments.policy == "none":
        classifier.set_policy(Policy(thresholds=[NOBODY] * (classifier.policy.exits - 1) + [EVERYBODY]))
    elif arguments.policy is not None:
        classifier.set_policy(read_policy(arguments.policy, classifier.policy.exits))

    def answer(arrays: list[Any]) -> tuple[list[int], list[list[float]]]:
        probabilities, exits = classifier.run(np.stack(arrays))
        return exits.tolist(), probabilities.tolist()

    return Model(
        classifier.classes,
        lambda image: classifier.preprocess(image.open()),
        answer,
        classifier.policy.exits,
        policy=classifier.policy,
    )


def _print_table(rows: list[dict[str, Any]], exits: int) -> None:
    from rich.table import Table

    from adaptive.reporting.tables import print_table

    if not rows:
        return
    table = Table()
    for name in ("image", "label", "confidence", "exit", "ms"):
        table.add_column(name, justify="left" if name in ("image", "label") else "right", overflow="fold")
    for row in rows:
        others = row.get("top", [])[1:]
        labels = [visible(label) for label in (row["label"], *(other["label"] for other in others))]
        sure = [f"{value:.1%}" for value in (row["confidence"], *(other["confidence"] for other in others))]
        table.add_row(
            visible(row["image"]), "\n".join(labels), "\n".join(sure), f"{row['exit']} of {exits}", f"{row['ms']:.2f}"
        )
    print_table(table)
    if len(rows) > 1:
        left = [sum(row["exit"] == i + 1 for row in rows) for i in range(exits)]
        shares = ", ".join(f"exit {i + 1}: {count}" for i, count in enumerate(left) if count)
        mean = sum(row["ms"] for row in rows) / len(rows)
        say(f"{len(rows)} images, {mean:.2f} ms each without reading them ({shares})")
