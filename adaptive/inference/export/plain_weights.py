"""Writes a trained network's weights as one safetensors file: the backbone's under timm's names, or all of them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from adaptive.errors import ExportError, reason_of
from adaptive.files import let_umask_count, publish_new, sync_folder
from adaptive.locks import LockHeldError, workshop
from adaptive.networks.backbone import build_backbone
from adaptive.networks.multiscale.assemble import is_multi_exit
from adaptive.networks.network import AdaptiveNetwork

SUFFIX = ".safetensors"


def check_destination(file: Path, overwrite: bool) -> None:
    """Refuse a file that cannot or must not be written (raises ExportError)."""
    if file.suffix != SUFFIX:
        raise ExportError(f"{file}: weights are written as safetensors; give a name that ends with {SUFFIX}")
    if not file.parent.is_dir():
        raise ExportError(f"{file}: there is no folder {file.parent}; make it first")
    if file.is_dir():
        raise ExportError(f"{file} is a folder; give the name of a file")
    if file.exists() and not overwrite:
        raise ExportError(f"{file} exists; give another name, or --overwrite")


def plain_state(network: AdaptiveNetwork, name: str, options: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict]:
    """Return the plain timm model's state_dict, and the arguments with which timm.create_model builds that model.

    Early exits and collaboration links are left out: with collaboration off the network's last exit gives what the
    plain model gives.

    Args:
        network: with the trained weights.
        name: the backbone's.
        options: further arguments of timm.create_model that the backbone was built with (model.options).

    Raises:
        ExportError: the state does not fit the plain model.
    """
    given = dict(options) | ({"exits": len(network.exits)} if is_multi_exit(name) else {})
    plain = build_backbone(name, network.input_size, num_classes=network.num_classes, **given)
    state = network.backbone_state_dict()
    try:
        plain.model.load_state_dict(state)
    except RuntimeError as error:
        reason = reason_of(error)
        raise ExportError(f"backbone {name!r}: its state does not fit the plain timm model: {reason}") from error
    return state, plain.arguments


def whole_state(network: AdaptiveNetwork) -> dict[str, Tensor]:
    """Return the network's state_dict, without the collaboration links where it was trained without them.

    Untrained links would change what every exit but the first says as soon as a network is built with them.
    """
    untrained = () if network.collaboration else tuple(f"exits.{i}.link." for i in range(len(network.exits)))
    return {name: tensor for name, tensor in network.state_dict().items() if not name.startswith(untrained)}


def write_weights(tensors: Mapping[str, Tensor], file: Path, about: Mapping[str, Any], overwrite: bool = False) -> None:
    """Write tensors so that the file is whole or not there; ``about`` goes into its header, values as JSON or text.

    Raises:
        ExportError: there is a file, which is not to be replaced; no space or no right to write.
    """
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
    beside = file.with_name(f".{file.name}.exporting")
    temporary = beside / "weights"
    try:
        with workshop(beside, parents=False):
            try:
                # Each with memory of its own: names that a module has twice are written twice, as timm expects them.
                save_file({key: t.detach().cpu().clone().contiguous() for key, t in tensors.items()}, temporary, texts)
                let_umask_count(temporary)
                with temporary.open("rb") as stream:
                    os.fsync(stream.fileno())
                if overwrite:
                    temporary.replace(file)
                    sync_folder(file.parent)
                else:
                    publish_new(temporary, file)
            finally:
                temporary.unlink(missing_ok=True)
    except LockHeldError as held:
        raise ExportError(f"{file} is being written by another export ({held}); wait for it to end") from None
    except FileExistsError:
        check_destination(file, overwrite)
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ExportError(f"{file} cannot be written: {reason}; free space or rights are needed") from error
