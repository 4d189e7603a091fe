"""Records a forward pass: runs a model and notes what it does, module by module or operation by operation.

A module that is not opened is one operation, whatever it does inside; of an opened one every tensor operation is noted.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from adaptive.networks.cost import MacCounter

FORWARD_FEATURES = "forward_features()"  # not a module name: the end of the backbone proper
REFLECTED = {
    "__rsub__": operator.sub,
    "__rdiv__": operator.truediv,
    "__rtruediv__": operator.truediv,
    "__rfloordiv__": operator.floordiv,
    "__rmod__": operator.mod,
    "__rpow__": operator.pow,
    "__rmatmul__": operator.matmul,
}


@dataclass(frozen=True)
class Ref:
    """A tensor of the recording, by number: 0 is the input, the others are outputs of operations."""

    index: int


@dataclass(frozen=True)
class Constant:
    """A tensor that is neither the input, nor a parameter or buffer, nor the output of a recorded operation."""

    tensor: Tensor = field(compare=False)


@dataclass
class Op:
    """One operation: kind and target as in torch.fx, arguments and outputs with a Ref in place of every tensor."""

    kind: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    owner: str


@dataclass
class Span:
    """One call of a module: its operations start..end, what it returned, the modules around it, the MACs at its end."""

    name: str
    start: int
    end: int
    output: Any
    parents: tuple[str, ...]
    macs: int

    def tensor(self) -> Ref | None:
        """The tensor that was returned, alone or beside sizes and the like; None if there were none or several."""
        found = refs(self.output)
        return Ref(found.pop()) if len(found) == 1 else None


@dataclass
class Recording:
    """What a model did with one batch."""

    ops: list[Op] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    floating: list[bool] = field(default_factory=list)
    changed: set[int] = field(default_factory=set)
    result: Any = None
    macs: int = 0

    def span(self, name: str) -> Span | None:
        """Return the only call of a module, None if it was called never or several times."""
        found = [s for s in self.spans if s.name == name]
        return found[0] if len(found) == 1 else None


def map_tree(value: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to every leaf of nested lists, tuples, dicts and slices."""
    if isinstance(value, torch.Size):
        return tuple(value)
    if isinstance(value, tuple | list):
        items = [map_tree(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: map_tree(item, function) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(map_tree(part, function) for part in (value.start, value.stop, value.step)))
    return function(value)


def leaves(value: Any) -> list[Any]:
    """Every leaf of nested lists, tuples, dicts and slices."""
    found: list[Any] = []
    map_tree(value, found.append)
    return found


def refs(value: Any) -> set[int]:
    """Indices of the tensors in a tree."""
    return {leaf.index for leaf in leaves(value) if isinstance(leaf, Ref)}


def record(model: nn.Module, images: Tensor, opened: set[str] | None = None, count: bool = True) -> Recording:
    """Run a model on a batch and write down what it does.

    Args:
        model: any module; its mode (train or eval) is left as it is.
        images: (N, C, H, W).
        opened: names of the modules to run through besides the model itself; None opens all that have children.
        count: whether multiply-adds are counted, which looks at every operation inside of every module.
    """
    if opened is None:
        opened = {name for name, module in model.named_modules() if next(module.children(), None) is not None}
    # The counter looks at dispatched operations, the recorder at Python calls: they do not see each other.
    counter = MacCounter()
    recorder = _Recorder(model, opened, lambda: counter.macs)
    counting = counter if count else nullcontext()
    with torch.no_grad(), _recorded_calls(recorder), _marked_features(model, recorder), counting, recorder:
        recorder.tag(images, Ref(0))
        recorder.note(images)
        result = model(images)
    recorder.recording.result = recorder.resolve(map_tree(result, recorder.hold))
    recorder.recording.macs = counter.macs
    return recorder.recording


class _Held:
    """A tensor among the arguments, with what it was before the operation ran."""

    def __init__(self, tensor: Tensor, ref: Ref | None) -> None:
        self.tensor = tensor
        self.ref = ref
        self.version = tensor._version


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module, opened: set[str], macs: Callable[[], int]) -> None:
        super().__init__()
        self.recording = Recording()
        self.modules = {id(module): name for name, module in model.named_modules()}
        self.attributes = {id(t): n for n, t in [*model.named_parameters(), *model.named_buffers()]}
        self.attribute_refs: dict[int, Ref] = {}
        self.opened = opened | {""}
        self.stack: list[str] = []
        self.closed = False
        self.macs = macs
        self.aliases: dict[int, list[int]] = {}

    def tag(self, tensor: Tensor, ref: Ref) -> None:
        # A tag on the tensor itself, not a table of ids: an id is used again when its tensor is gone.
        if id(tensor) in self.attributes:
            self.attribute_refs[id(tensor)] = ref
        else:
            tensor._adaptive_tag = (self, ref)  # type: ignore[attr-defined]

    def ref(self, tensor: Tensor) -> Ref | None:
        if id(tensor) in self.attributes:
            return self.attribute_refs.get(id(tensor))
        owner, ref = getattr(tensor, "_adaptive_tag", (None, None))
        return ref if owner is self else None

    def note(self, tensor: Tensor) -> None:
        self.recording.shapes.append(tuple(tensor.shape))
        self.recording.floating.append(tensor.is_floating_point())

    def hold(self, value: Any) -> Any:
        return _Held(value, self.ref(value)) if isinstance(value, Tensor) else value

    def resolve(self, tree: Any) -> Any:
        return map_tree(tree, lambda leaf: self._reference(leaf) if isinstance(leaf, _Held) else leaf)

    def _reference(self, held: _Held) -> Ref | Constant:
        if held.ref is not None:
            return held.ref
        known = self.ref(held.tensor)  # the same parameter twice among the arguments
        if known is not None:
            return known
        if id(held.tensor) not in self.attributes:
            return Constant(held.tensor)
        name = self.attributes[id(held.tensor)]
        output = self._new(held.tensor)
        self.recording.ops.append(Op("get_attr", name, (), {}, output, self.stack[-1] if self.stack else ""))
        return output

    def _new(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        ref = Ref(len(self.recording.shapes))
        self.tag(value, ref)
        self.note(value)
        return ref

    def _track_changes(self, held: list[_Held], outputs: list[Any], mutated: list[Tensor]) -> None:
        """Mark every tensor that shares memory with one that was changed in place; learn new sharing."""
        before = {_memory(h.tensor) for h in held}
        for tensor in [h.tensor for h in held if h.tensor._version != h.version] + mutated:
            self.recording.changed.update(self.aliases.get(_memory(tensor), ()))
        for tensor in outputs:
            ref = self.ref(tensor)
            if ref is None:
                continue
            memory = _memory(tensor)
            if memory not in before:  # fresh memory: whoever had this address before is gone
                self.aliases[memory] = []
            before.add(memory)
            self.aliases.setdefault(memory, []).append(ref.index)

    def add(self, kind: str, target: Any, run: Callable[[], Any], args: Any, kwargs: Any, changes_first: bool) -> Any:
        """Run one operation and write it down, unless it gives no tensor (a shape, a device, a check)."""
        held_args, held_kwargs = map_tree(tuple(args), self.hold), map_tree(dict(kwargs), self.hold)
        result = run()
        outputs = [leaf for leaf in leaves(result) if isinstance(leaf, Tensor)]
        if not outputs and not changes_first:
            return result
        held = [leaf for leaf in leaves((held_args, held_kwargs)) if isinstance(leaf, _Held)]
        owner = self.stack[-1] if self.stack else ""
        resolved = self.resolve(held_args), self.resolve(held_kwargs)
        mutated = [args[0]] if changes_first else []
        output = self._new(args[0]) if changes_first else map_tree(result, self._new)
        self.recording.ops.append(Op(kind, target, *resolved, output, owner))
        self._track_changes(held, mutated or outputs, mutated)
        return result

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.closed:
            return func(*args, **kwargs)
        kind, target, arguments = _as_graph_call(func, args)
        return self.add(kind, target, lambda: func(*args, **kwargs), arguments, kwargs, func is Tensor.__setitem__)

    def call(self, module: nn.Module, run: Callable[[], Any], args: Any, kwargs: Any) -> Any:
        name = self.modules.get(id(module))
        if self.closed or name is None:
            return run()
        start, parents = len(self.recording.ops), tuple(self.stack)
        if name in self.opened:
            self.stack.append(name)
            try:
                result = run()
            finally:
                self.stack.pop()
        else:
            self.closed = True
            try:
                result = self.add("call_module", name, run, args, kwargs, False)
            finally:
                self.closed = False
        self.end_span(name, start, parents, result)
        return result

    def end_span(self, name: str, start: int, parents: tuple[str, ...], result: Any) -> None:
        output = map_tree(result, lambda leaf: self.ref(leaf) if isinstance(leaf, Tensor) else leaf)
        end = len(self.recording.ops)
        self.recording.spans.append(Span(name, start, end, output, parents, self.macs()))


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _as_graph_call(func: Any, args: Any) -> tuple[str, Any, Any]:
    """Translate an intercepted function into kind, target and arguments of a graph node."""
    name = getattr(func, "__name__", "")
    if name == "__get__":  # a property such as x.T
        return "call_function", getattr, (args[0], func.__self__.__name__)
    if name in REFLECTED:
        return "call_function", REFLECTED[name], (args[1], args[0])
    if name.startswith("__") and hasattr(operator, name) and getattr(Tensor, name, None) is func:
        return "call_function", getattr(operator, name), args
    if getattr(Tensor, name, None) is func:
        return "call_method", name, args
    return "call_function", func, args


@contextmanager
def _recorded_calls(recorder: _Recorder) -> Iterator[None]:
    original = nn.Module.__call__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return recorder.call(module, lambda: original(module, *args, **kwargs), args, kwargs)

    nn.Module.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]


@contextmanager
def _marked_features(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Note where the model's forward_features ends, if it has one."""
    original = getattr(model, "forward_features", None)
    if original is None:
        yield
        return

    def forward_features(*args: Any, **kwargs: Any) -> Any:
        start, parents = len(recorder.recording.ops), tuple(recorder.stack)
        result = original(*args, **kwargs)
        recorder.end_span(FORWARD_FEATURES, start, parents, result)
        return result

    model.__dict__["forward_features"] = forward_features
    try:
        yield
    finally:
        del model.__dict__["forward_features"]
