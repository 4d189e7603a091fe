"""A network's fingerprint: a checksum of its weights, by which a policy or an export knows its network."""

from __future__ import annotations

import hashlib
import json

import torch

from adaptive.networks.network import AdaptiveNetwork


def fingerprint(network: AdaptiveNetwork) -> str:
    """Return the sha256, in hexadecimal, of everything learned and of whether the exits collaborate.

    It covers name, shape, dtype and bytes of every tensor in the state_dict, in the order of their names, and depends
    neither on the device nor on the memory format.
    """
    digest = hashlib.sha256(json.dumps({"collaboration": network.collaboration}).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        plain = tensor.detach().cpu().contiguous()  # channels-last weights lie in another order
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
