"""`AdaptiveNetwork`: k blocks and k exits, run to the end at once or block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adaptive.errors import ModelError, reason_of
from adaptive.networks.cost import ExitCost, MacCounter
from adaptive.networks.cutting.block import Block
from adaptive.networks.equilibrium import Equilibrium, branch, equilibrium_scope
from adaptive.networks.exits import Exit
from adaptive.networks.fake_copy import cheap_to_run, is_outline, is_recurrent, outline
from adaptive.networks.multiscale.lazy_evaluation import LazyBlock
from adaptive.networks.state import BatchDim, State
from adaptive.networks.timm_names import TimmNames


class AdaptiveNetwork(nn.Module):
    """A backbone in k blocks with k exits; calling it gives the list of k logits, first exit first.

    Attributes:
        blocks: the k blocks, in order.
        exits: the k exits, in order; the link that feeds an exit belongs to it (``exits[i].link``).
        exit_names: the modules of the backbone after which the k - 1 early exits branch off.
        equilibrium: ``"crossing"``, ``"tap"`` or False; may be changed between forward passes.
        checkpointing: recompute each block in the backward pass; may be changed between forward passes.
        layer_ids: layer of the plain model (0 at the input) that a parameter belongs to, by this network's names; what
            the network adds to the backbone is absent.
        num_layers: number of those layers.
        input_size: side in pixels of the square images that the backbone was cut for.
        channels: of those images.
        untrained: names of the tensors that hold the random values that they were made with; whoever loads others
            takes them out.
    """

    def __init__(
        self,
        blocks: list[nn.Module],
        exits: Sequence[Exit],
        *,
        exit_names: list[str],
        batch_dims: list[tuple[BatchDim | None, ...]],
        overwritten: list[bool],
        names: TimmNames,
        input_size: int,
        channels: int,
        num_classes: int,
        equilibrium: bool | str,
        collaboration: bool | str,
    ) -> None:
        super().__init__()
        if collaboration not in (True, False, "attached"):
            raise ModelError(f"collaboration = {collaboration!r}: use True, False or 'attached'")
        self.blocks = nn.ModuleList(blocks)
        self.exits = nn.ModuleList(exits)
        self.exit_names = exit_names
        self.batch_dims = batch_dims
        self.overwritten = overwritten
        self.names = names
        self.layer_ids, self.num_layers = names.layer_ids, names.num_layers
        self.input_size, self.channels, self.num_classes = input_size, channels, num_classes
        self.equilibrium: Equilibrium = equilibrium_scope(equilibrium)
        self._has_links = self._collaboration = bool(collaboration)
        for exit_ in exits:
            if exit_.link is not None:
                exit_.link.attached = collaboration == "attached"
        self.checkpointing = False
        self.untrained = set(self.state_dict())
        self.register_load_state_dict_pre_hook(_accept_timm_names)

    @property
    def collaboration(self) -> bool:
        """Whether exits read the previous exit's prediction; may be changed between forward passes."""
        return self._collaboration

    @collaboration.setter
    def collaboration(self, value: bool) -> None:
        if value and not self._has_links:
            raise ModelError("collaboration = True: this network was built without links; pass it to create_model")
        self._collaboration = bool(value)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, C, H, W) images -> k logits of (N, classes)."""
        state: tuple[Tensor, ...] = (images,)
        logits: list[Tensor] = []
        last = len(self.blocks) - 1
        for i in range(last + 1):
            state = self._advance(i, state)
            tap = state
            if i < last:
                feature, state = self._branch(i, state)
                tap = (feature,)
            previous = logits[-1] if logits and self._collaboration else None
            logits.append(self.exits[i](*tap, previous_logits=previous))
        return logits

    def _advance(self, i: int, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        block = self.blocks[i]
        if self.checkpointing and torch.is_grad_enabled():
            if torch.compiler.is_compiling():  # the compiler recomputes operations, not side effects
                return checkpoint(block, *state, use_reentrant=False)
            return checkpoint(block, *state, use_reentrant=False, context_fn=_Recomputing(block))
        return block(*state)

    def _branch(self, i: int, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        feature, onward = state[0], state
        if self.equilibrium and torch.is_grad_enabled():
            feature, onward = branch(state, len(self.blocks) - i, self.equilibrium)
        if self.overwritten[i]:
            onward = (onward[0].clone(), *onward[1:])
        return feature, onward

    def start(self, images: Tensor) -> State:
        """(N, C, H, W) images -> the state in front of the first block."""
        return State.of((images,), ((0, 1),))

    def run_block(self, i: int, state: tuple[Tensor, ...], lazy: bool = False) -> State:
        """State in front of block i (from 0) -> state behind it.

        With ``lazy`` only what exit i needs is computed; the rest of the block follows when the next one is run with
        the state that is left by then. It saves something in networks of several scales (MSDNet).
        """
        block = self.blocks[i]
        if isinstance(state, State) and state.partial:
            state = cast(LazyBlock, self.blocks[i - 1]).complete(*state)
        if lazy and isinstance(block, LazyBlock):
            kept = block.to_exit(*state)
            return State.of(kept, ((0, 1),) * len(kept), partial=True)
        return State.of(tuple(self._advance(i, tuple(state))), self.batch_dims[i])

    def run_exit(self, i: int, state: tuple[Tensor, ...], previous_logits: Tensor | None = None) -> Tensor:
        """Logits (N, classes) of exit i (from 0), from the state behind block i and the previous exit's logits.

        Raises:
            ModelError: the exit collaborates and the previous exit's logits are missing.
        """
        if i > 0 and self._collaboration and previous_logits is None:
            raise ModelError(f"run_exit({i}, ...): pass exit {i - 1}'s logits, or set collaboration = False")
        previous = previous_logits if self._collaboration else None
        last = i == len(self.exits) - 1
        feature = state[0].clone() if not last and self.overwritten[i] else state[0]
        tap = tuple(state) if last else (feature,)
        return self.exits[i](*tap, previous_logits=previous)

    @torch.no_grad()
    def costs(self, input_size: int | None = None, lazy: bool = False) -> list[ExitCost]:
        """Cumulative cost of every exit for one image, with every earlier head and collaboration link.

        Args:
            input_size: side of the square image in pixels; by default the one that the backbone was cut for.
            lazy: count for an image that stops there only what was needed on the way (see run_block).

        Raises:
            ModelError: the backbone does not run on images of that size.
        """
        size = input_size or self.input_size
        if not (cheap_to_run(self, size) or is_outline(self) or is_recurrent(self)):
            with suppress(Exception):  # its code asks for values: it is run for real then, and told of its own errors
                return outline(self)._counted_costs(size, lazy)
        return self._counted_costs(size, lazy)

    def _counted_costs(self, size: int, lazy: bool) -> list[ExitCost]:
        like = next(self.parameters())
        images = torch.zeros(1, self.channels, size, size, device=like.device, dtype=like.dtype)
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        costs, parameters, previous = [], 0, None
        try:
            with MacCounter() as counter:
                state: State = self.start(images)
                for i, (block, exit_) in enumerate(zip(self.blocks, self.exits, strict=True)):
                    state = self.run_block(i, state, lazy)
                    previous = self.run_exit(i, state, previous)
                    parameters += _size(block) + _size(exit_)
                    if isinstance(exit_.link, nn.Module) and not self._collaboration:
                        parameters -= _size(exit_.link)
                    costs.append(ExitCost(counter.macs, parameters))
        except RuntimeError as error:
            reason = reason_of(error, 200)
            raise ModelError(f"costs: input_size = {size} does not fit this backbone ({reason})") from error
        finally:
            for module, mode in modes:
                module.training = mode
        return costs

    def backbone_state_dict(self) -> dict[str, Tensor]:
        """The plain timm model's state_dict: its names, this network's values."""
        own = self.state_dict()
        return {plain: own[names[0]] for plain, names in self.names.own.items()}

    def direct_parameters(self, i: int) -> list[nn.Parameter]:
        """Parameters that block i's graph reads by itself from inside its (never called) containers."""
        block = self.blocks[i]
        return block.direct_parameters() if isinstance(block, Block) else []

    def block_parameters(self, i: int) -> Iterator[nn.Parameter]:
        """Parameters of block i (from 0), without its exit."""
        return self.blocks[i].parameters()

    def classifiers(self) -> list[nn.Module]:
        """Of every exit the last linear layer (or what timm names as classifier) and the link."""
        found: list[nn.Module] = []
        for exit_ in self.exits:
            found += cast(Exit, exit_).classifiers()
        return found

    def no_weight_decay(self) -> set[str]:
        """Names, in this network, of the parameters that timm says should not decay."""
        return self.names.no_weight_decay


def _size(module: nn.Module) -> int:
    return sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in module.parameters())


class _Recomputing:
    """Contexts for torch.utils.checkpoint, so that recomputing a block does not update BatchNorm's statistics again."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __call__(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _frozen_statistics(self.block)


@contextmanager
def _frozen_statistics(block: nn.Module) -> Iterator[None]:
    """Let every BatchNorm of a block update copies of its statistics, which are thrown away."""
    norms = [m for m in block.modules() if getattr(m, "track_running_stats", False) and m.training]
    kept = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        norm._buffers.update({name: t.clone() for name, t in norm._buffers.items() if t is not None})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)


def _accept_timm_names(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    assert isinstance(module, AdaptiveNetwork)
    module.names.rename(module, state, prefix)
