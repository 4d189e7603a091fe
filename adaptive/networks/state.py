"""The state between two blocks: all tensors that the later blocks need, so that samples can leave in between."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BatchDim = tuple[int, int]  # the batch's dimension in a tensor, and how many entries of it belong to one sample


class State(tuple[Tensor, ...]):
    """The tensors that cross a branch point, the exit's feature first, and where the batch is in each (None: not)."""

    batch_dims: tuple[BatchDim | None, ...]
    partial: bool = False  # only what the exit here needs has been computed, and what the rest is made from

    @classmethod
    def of(cls, tensors: tuple[Tensor, ...], batch_dims: tuple[BatchDim | None, ...], partial: bool = False) -> State:
        """Make a state of tensors and where the batch is in each."""
        state = cls(tensors)
        state.batch_dims, state.partial = batch_dims, partial
        return state

    def select(self, indices: Tensor, batch: int) -> State:
        """The state of some samples only.

        Args:
            indices: (M,) numbers of the samples to keep.
            batch: N, the number of samples in this state.
        """
        kept = []
        for tensor, where in zip(self, self.batch_dims, strict=True):
            if where is None:
                kept.append(tensor)
                continue
            dim, multiple = where
            if multiple == 1:
                kept.append(_index_select(tensor, dim, indices))
            else:  # a sample's entries (windows, patches) lie together
                parts = tensor.unflatten(dim, (batch, multiple)).index_select(dim, indices)
                kept.append(parts.flatten(dim, dim + 1))
        return State.of(tuple(kept), self.batch_dims, self.partial)

    @classmethod
    def join(cls, states: Sequence[State]) -> State:
        """One state of several at the same cut, their samples one after another."""
        first = states[0]
        tensors = tuple(
            first[j] if where is None else torch.cat([state[j] for state in states], dim=where[0])
            for j, where in enumerate(first.batch_dims)
        )
        return cls.of(tensors, first.batch_dims, first.partial)


def _index_select(tensor: Tensor, dim: int, indices: Tensor) -> Tensor:
    """Select, and keep channels-last memory, which torch's own index_select gives up."""
    if tensor.dim() == 4 and dim == 0 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1).index_select(0, indices).permute(0, 3, 1, 2)
    return tensor.index_select(dim, indices)
