"""Recorded operations -> torch.fx graphs that run at any batch size, in training and in evaluation.

A constant that differs between two recordings depends on what differed between them: batch size, mode, or precision.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from adaptive.networks.cutting.recording import Constant, Op, Recording, Ref, map_tree, refs
from adaptive.networks.state import BatchDim


class TraceError(Exception):
    """The model's own code, in the named module, cannot be written as a graph."""

    def __init__(self, module: str, reason: str) -> None:
        super().__init__(f"{module or 'the top level'}: {reason}")
        self.module = module


@dataclass(frozen=True)
class BatchInteger:
    """An integer that is linear in the batch size."""

    slope: int
    intercept: int


@dataclass(frozen=True)
class ByMode:
    """A constant that differs between training and evaluation."""

    training: Any
    evaluating: Any


class InputDtype:
    """A dtype that is the input's own."""


class InputDevice:
    """A device that is the input's own."""


def merge(two: Recording, three: Recording, training: Recording) -> list[Op]:
    """Combine recordings at batch 2, at batch 3, and at batch 2 in training mode and another precision.

    Raises:
        TraceError: the runs differ in what was done, not only in constants.
    """
    for i, ops in enumerate(zip(two.ops, three.ops, training.ops, strict=False)):
        if len({(op.kind, str(op.target)) for op in ops}) > 1:
            raise TraceError(ops[0].owner, f"its steps depend on batch size, mode or precision (step {i})")
    if not len(two.ops) == len(three.ops) == len(training.ops):
        raise TraceError("", "its number of steps depends on batch size, mode or precision")
    merged = []
    for a, b, t in zip(two.ops, three.ops, training.ops, strict=True):
        args, kwargs = _merge_tree(a.args, b.args, t.args, a.owner), _merge_tree(a.kwargs, b.kwargs, t.kwargs, a.owner)
        merged.append(Op(a.kind, a.target, args, kwargs, a.output, a.owner))
    if not refs(two.result) == refs(three.result) == refs(training.result):
        raise TraceError("", "what it returns depends on batch size or mode")
    return merged


def _merge_tree(a: Any, b: Any, t: Any, owner: str) -> Any:
    if isinstance(a, slice):
        return slice(
            *(_merge_tree(getattr(a, e), getattr(b, e), getattr(t, e), owner) for e in ("start", "stop", "step"))
        )
    if isinstance(a, list | tuple):
        if not len(a) == len(b) == len(t):
            raise TraceError(owner, "the length of a list depends on batch size or mode")
        return type(a)(_merge_tree(*items, owner) for items in zip(a, b, t, strict=True))
    if isinstance(a, dict):
        return {key: _merge_tree(a[key], b[key], t[key], owner) for key in a}
    if isinstance(a, torch.device):
        return InputDevice()
    if isinstance(a, Constant):
        if not (isinstance(b, Constant) and a.tensor.shape == b.tensor.shape and torch.equal(a.tensor, b.tensor)):
            raise TraceError(owner, "it reads a tensor that was made outside of what is recorded")
        return a
    if isinstance(a, int) and not isinstance(a, bool) and a != b and a == t:
        return BatchInteger(b - a, a - 2 * (b - a))
    if a is not b and a != b:
        raise TraceError(owner, f"a value depends on the batch size: {a} against {b}")
    if a is t or a == t:
        return a
    if isinstance(a, torch.dtype):
        return InputDtype()
    if isinstance(a, Ref) or isinstance(t, Ref):
        raise TraceError(owner, "which tensors it reads depends on the mode")
    return ByMode(t, a)


def choose(training: bool, in_training: Any, in_evaluation: Any) -> Any:
    """Return the constant for the mode; graphs call it."""
    return in_training if training else in_evaluation


def batch_dim(index: int, two: Recording, three: Recording) -> BatchDim | None:
    """Where the batch is in a tensor of the recordings; None if it is not there.

    Raises:
        TraceError: several dimensions depend on the batch, or one does so but not as a multiple.
    """
    shape, other = two.shapes[index], three.shapes[index]
    different = [d for d, (m, n) in enumerate(zip(shape, other, strict=True)) if m != n]
    if not different:
        return None
    dim = different[0]
    multiple = other[dim] - shape[dim]
    if len(different) > 1 or shape[dim] != 2 * multiple:
        raise TraceError("", f"a tensor that crosses has shape {shape} for 2 samples and {other} for 3")
    return dim, multiple


class Emitter:
    """Writes stretches of a merged recording as torch.fx graphs.

    Args:
        ops: the merged operations.
        two, three: the recordings at batch 2 and 3.
        constants: tensors that the graphs will read are added here, by attribute name.
    """

    def __init__(self, ops: list[Op], two: Recording, three: Recording, constants: dict[str, torch.Tensor]) -> None:
        self.ops, self.two, self.three, self.constants = ops, two, three, constants

    def graph(self, start: int, end: int, inputs: list[int], output: Any) -> fx.Graph:
        """Write the operations start..end as a graph from input tensors to a tree of output tensors."""
        graph = fx.Graph()
        nodes = {index: graph.placeholder(f"state_{i}") for i, index in enumerate(inputs)}
        scope = _Scope(self, graph, nodes, inputs)
        for op in self.ops[start:end]:
            args, kwargs = map_tree(op.args, scope.value), map_tree(op.kwargs, scope.value)
            node = graph.create_node(op.kind, op.target, args, kwargs)
            if op.target is operator.setitem:  # it returns nothing; from here on its first argument is the new value
                node = args[0]
            scope.unpack(node, op.output)
        graph.output(map_tree(output, scope.value))
        return graph


class _Scope:
    """The nodes of one graph under construction."""

    def __init__(self, emitter: Emitter, graph: fx.Graph, nodes: dict[int, fx.Node], inputs: list[int]) -> None:
        self.emitter, self.graph, self.nodes, self.inputs = emitter, graph, nodes, inputs
        self.shared: dict[str, fx.Node] = {}

    def unpack(self, node: fx.Node, output: Any) -> None:
        if isinstance(output, Ref):
            self.nodes[output.index] = node
        elif isinstance(output, dict | list | tuple):
            items = output.items() if isinstance(output, dict) else enumerate(output)
            for key, item in items:
                if refs(item):
                    self.unpack(self.graph.call_function(operator.getitem, (node, key)), item)

    def value(self, leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            return self.nodes[leaf.index]
        if isinstance(leaf, Constant):
            return self._constant(leaf.tensor)
        if isinstance(leaf, BatchInteger):
            product = self.graph.call_function(operator.mul, (self._batch(), leaf.slope)) if leaf.slope != 1 else None
            scaled = product or self._batch()
            return self.graph.call_function(operator.add, (scaled, leaf.intercept)) if leaf.intercept else scaled
        if isinstance(leaf, ByMode):
            training = self._once("training", lambda: self.graph.get_attr("training"))
            if (leaf.training, leaf.evaluating) == (True, False):
                return training
            return self.graph.call_function(choose, (training, leaf.training, leaf.evaluating))
        if isinstance(leaf, InputDevice):
            return self._once("device", lambda: self.graph.call_function(getattr, (self._input(), "device")))
        if isinstance(leaf, InputDtype):
            floating = next(i for i in self.inputs if self.emitter.two.floating[i])
            return self._once("dtype", lambda: self.graph.call_function(getattr, (self.nodes[floating], "dtype")))
        return leaf

    def _once(self, key: str, make: Any) -> fx.Node:
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def _input(self) -> fx.Node:
        return self.nodes[self.inputs[0]]

    def _batch(self) -> fx.Node:
        return self._once("batch", self._batch_size)

    def _batch_size(self) -> fx.Node:
        for index in self.inputs:
            where = batch_dim(index, self.emitter.two, self.emitter.three)
            if where is not None:
                size = self.graph.call_method("size", (self.nodes[index], where[0]))
                return size if where[1] == 1 else self.graph.call_function(operator.floordiv, (size, where[1]))
        raise TraceError("", "no tensor that crosses carries the batch")

    def _constant(self, tensor: torch.Tensor) -> fx.Node:
        known = self.emitter.constants
        name = next((n for n, t in known.items() if t is tensor), None)
        if name is None:
            name = f"_constant_{len(known)}"
            known[name] = tensor
        return self._once(name, lambda: self.graph.get_attr(name))
