"""Names of parameters and buffers: those of the plain timm model, and those of the network that was made of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from adaptive.errors import ModelError


class TimmNames:
    """Translates names of the plain timm model into those of the network, and back.

    A module that a model holds under several names has several entries in a state_dict, on both sides.

    Args:
        own: the network's state_dict, with the tensors themselves (``keep_vars=True``).
        plain: the plain model's, holding the same tensors.
        classifier: prefixes of the plain model's classifier.
        groups: layer of each parameter of the plain model, as timm groups them.
        no_weight_decay: plain names of parameters that should not decay.
    """

    def __init__(
        self,
        own: dict[str, Tensor],
        plain: dict[str, Tensor],
        classifier: tuple[str, ...],
        groups: dict[str, int],
        no_weight_decay: set[str],
    ) -> None:
        own_names: dict[int, list[str]] = {}
        for name, tensor in own.items():
            own_names.setdefault(id(tensor), []).append(name)
        self.own = {name: own_names[id(tensor)] for name, tensor in plain.items()}
        self.plain: dict[str, str] = {}
        for plain_name, names in self.own.items():
            for name in names:
                self.plain.setdefault(name, plain_name)
        self.classifier = classifier
        self.layer_ids = {name: layer for plain_name, layer in groups.items() for name in self.own.get(plain_name, ())}
        self.num_layers = max(groups.values(), default=-1) + 1
        self.no_weight_decay = {name for plain_name in no_weight_decay for name in self.own.get(plain_name, ())}

    def rename(self, network: nn.Module, state: dict[str, Any], prefix: str) -> None:
        """Rename a plain model's state_dict, in place; a complete one also gets the network's values for what it lacks.

        Raises:
            ModelError: the classifier has another number of classes.
        """
        current = network.state_dict()
        keys = {key[len(prefix) :] for key in state if key.startswith(prefix)}
        matching = keys & self.own.keys()
        # Some plain names can also be names here (blocks.0...): the greater overlap tells which model this was.
        if len(matching) <= len(keys & current.keys()):
            return
        values = {name: state.pop(prefix + name) for name in matching}
        for name, value in values.items():
            wanted = current[self.own[name][0]]
            if name.startswith(self.classifier) and value.shape != wanted.shape:
                raise ModelError(
                    f"weights: {name} has shape {tuple(value.shape)}, this network's classifier needs "
                    f"{tuple(wanted.shape)}; build it with num_classes = {value.shape[0]}"
                )
            state.update({prefix + own: value for own in self.own[name]})
        if keys == self.own.keys():
            for name, value in current.items():
                state.setdefault(prefix + name, value)
