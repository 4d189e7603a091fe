"""Options that the commands on a trained run share (--checkpoint, --device, --data, ...), and what they select."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from adaptive.foreign_text import shell_words

if TYPE_CHECKING:
    import torch

    from adaptive.inference.outputs import Outputs
    from adaptive.networks.network import AdaptiveNetwork
    from adaptive.runs import TrainedRun


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Declare the options that select which weights of a run are taken."""
    parser.add_argument("--checkpoint", default="best", metavar="WHICH", help="best (default), last, or a step number")
    parser.add_argument("--weights", choices=("auto", "plain", "ema"), default="auto", help="auto: ema where kept")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Declare the option that selects the device."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Declare the options that say how images are read and run."""
    parser.add_argument("--data", metavar="FOLDER", help="packed dataset or its URL; by default the run's")
    parser.add_argument("--batch", type=int, help="images per forward pass; by default evaluate.batch of the run")
    parser.add_argument("--workers", type=int, help="loader processes; by default data.workers of the run")
    add_device(parser)


def check_loading(arguments: argparse.Namespace) -> None:
    """Refuse sizes that make no sense, before anything is loaded (raises AdaptiveError)."""
    from adaptive.errors import AdaptiveError

    for name in ("batch", "workers"):
        value = getattr(arguments, name)
        if value is not None and value < (name == "batch"):
            raise AdaptiveError(f"--{name} {value} is too small; give {int(name == 'batch')} or more")


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Declare the words that say how a run's data is read; what the run itself permits does not count."""
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="how the run's data is read here: data.pipe=true allows a command as data.path, data.cache=DIR, ...",
    )


def load_run(folder: str, checkpoint: str, weights: str, overrides: Sequence[str] = ()) -> TrainedRun:
    """Load a run's network, as ``--checkpoint``, ``--weights`` and overrides say (raises AdaptiveError)."""
    from adaptive.runs import load

    return load(folder, checkpoint, {"auto": None, "plain": False, "ema": True}[weights], overrides)


def choose_device(name: str) -> torch.device:
    """Return the device that ``--device`` names (raises MachineError)."""
    import torch

    from adaptive.errors import MachineError

    usable = torch.cuda.is_available()
    if name == "cuda" and not usable:
        raise MachineError(f"--device {name}: this machine has no usable GPU; use cpu or auto")
    return torch.device("cuda" if usable and name != "cpu" else "cpu")


def network_for_inference(trained: TrainedRun, device: torch.device) -> AdaptiveNetwork:
    """Return the run's network on a device, in the memory format that it was trained in."""
    from adaptive.networks.precision import memory_format

    return trained.network.to(device).to(memory_format=memory_format(trained.config.train.channels_last))


def no_policy_notice(trained: TrainedRun, consequence: str) -> str:
    """Return the words on a run without a policy; none where there is one exit, and nothing to calibrate."""
    if len(trained.network.exits) == 1:
        return ""
    return (
        f"{trained.folder} has no policy.json, {consequence}; make one with: adaptive calibrate "
        f"{shell_words(trained.folder)} --budget 0.5"
    )


def one_exit_words(trained: TrainedRun) -> str:
    """Return what to say of a run with one exit that is to be calibrated: what to train, and how to compare."""
    folder = trained.folder if trained.folder.name not in ("", "..") else trained.folder.resolve()
    other = folder.with_name(f"{folder.name}-exits")
    train = shell_words("adaptive", "train", folder / "config.yaml", "model.exits=4", f"train.run_folder={other}")
    compare = shell_words("adaptive", "bench", "inference", folder, other)
    return (
        f"{folder} has one exit, where everybody leaves: there is nothing to calibrate; to let images leave early "
        f"train with exits: {train}; then calibrate that, and compare: {compare}"
    )


def prepare_tables(arguments: argparse.Namespace) -> None:
    """Import what prints tables, unless JSON is asked for: if it is missing, nothing was computed in vain."""
    if not arguments.json:
        importlib.import_module("adaptive.reporting.tables")


def split_outputs(trained: TrainedRun, arguments: argparse.Namespace, split: str, flag: str) -> Outputs:
    """Run every exit over a split, as the options of `add_loading` say.

    Args:
        trained: the network; it is moved to the device.
        arguments: of the command.
        split: its name.
        flag: flag or key that gave the split, for messages.

    Raises:
        DataError: no such dataset or split, other classes than the run's, or images that cannot be read.
        MachineError: no such device.
    """
    from adaptive.runs import collect_outputs

    device = choose_device(arguments.device)
    return collect_outputs(trained, split, arguments.data, arguments.batch, arguments.workers, device, flag)


def left_out_words(by_kind: Mapping[str, int]) -> str:
    """Return what to append to a number of images where bad ones are not among them."""
    from adaptive.data.faults import counted

    if not by_kind:
        return ""
    return f"; {sum(by_kind.values())} bad ones left out ({counted(by_kind)})"
