"""Takes a network apart for export: block i with exit i as one module, with examples of its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from adaptive.inference.export.export_manifest import BlockEntry, Format, StateTensor
from adaptive.networks.network import AdaptiveNetwork
from adaptive.networks.state import BatchDim, State

EXAMPLES = 3  # images that a graph is recorded with


class _BlockWithExit(nn.Module):
    """Block i and exit i as one module, in the way `AdaptiveNetwork.run_block` and ``run_exit`` join them."""

    def __init__(self, network: AdaptiveNetwork, i: int) -> None:
        super().__init__()
        self.block, self.exit = network.blocks[i], network.exits[i]
        self.last = i == len(network.blocks) - 1
        self.overwritten = not self.last and network.overwritten[i]

    def forward(self, state: tuple[Tensor, ...], previous_logits: Tensor | None) -> tuple[Tensor, ...]:
        """State in front of the block, and the previous exit's logits or None -> state behind it, logits."""
        state = tuple(self.block(*state))
        if self.last:
            return (self.exit(*state, previous_logits=previous_logits),)
        feature = state[0].clone() if self.overwritten else state[0]
        return (*state, self.exit(feature, previous_logits=previous_logits))


@dataclass(frozen=True)
class Piece:
    """A block with its exit, and examples of its inputs; ``number`` counts from 1."""

    number: int
    part: _BlockWithExit
    state: State
    previous_logits: Tensor | None
    behind: tuple[BatchDim | None, ...]

    def entry(self, formats: Sequence[Format]) -> BlockEntry:
        """Describe it for the manifest."""
        i, names = self.number, [f"state_{self.number}_{j}" for j in range(len(self.behind))]
        before = ["images"] if i == 1 else [f"state_{i - 1}_{j}" for j in range(len(self.state))]
        return BlockEntry(
            onnx=f"block_{i}.onnx" if "onnx" in formats else None,
            torch=f"block_{i}.pt2" if "torch" in formats else None,
            state=[StateTensor(name=n, batch=b) for n, b in zip(before, self.state.batch_dims, strict=True)],
            previous_logits=None if self.previous_logits is None else f"logits_{i - 1}",
            next_state=[StateTensor(name=n, batch=b) for n, b in zip(names, self.behind, strict=True)],
            logits=f"logits_{i}",
        )

    def record(self) -> ExportedProgram:
        """Record it with torch.export."""
        batch = Dim("batch")
        shapes = tuple(
            {} if where is None else {where[0]: batch if where[1] == 1 else where[1] * batch}
            for where in self.state.batch_dims
        )
        logits_shape = None if self.previous_logits is None else {0: batch}
        inputs = (tuple(self.state), self.previous_logits)
        return torch.export.export(self.part, inputs, dynamic_shapes=(shapes, logits_shape))


def pieces_of(network: AdaptiveNetwork) -> list[Piece]:
    """Take a network apart: on the CPU, in float32, in eval mode."""
    size, last = network.input_size, len(network.blocks) - 1
    state = network.start(torch.zeros(EXAMPLES, network.channels, size, size))
    logits: Tensor | None = None
    pieces = []
    for i in range(last + 1):
        reads = network.collaboration and network.exits[i].link is not None
        behind = network.batch_dims[i] if i < last else ()
        pieces.append(Piece(i + 1, _BlockWithExit(network, i).eval(), state, logits if reads else None, behind))
        state = network.run_block(i, state)
        logits = network.run_exit(i, state, logits)
    return pieces


def with_plain_attention(program: ExportedProgram) -> ExportedProgram:
    """Write attention over windows (five dimensions) as products and a softmax: ONNX's operator takes four only."""
    fused = torch.ops.aten.scaled_dot_product_attention.default
    calls = [node for node in program.graph.nodes if node.target is fused]
    if all(node.args[0].meta["val"].dim() == 4 for node in calls):
        return program
    plain = torch.ops.aten._scaled_dot_product_attention_math.default
    return program.run_decompositions({fused: lambda *args, **kwargs: plain(*args, **kwargs)[0]})
