"""A block: a stretch of a recorded forward pass as a module of its own, made of the backbone's own modules."""

from __future__ import annotations

import importlib
import linecache
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor, fx, nn


class Block(nn.Module):
    """Runs a torch.fx graph over modules and parameters taken from a root module, under their own names.

    The graph's ``get_attr`` of ``training`` reads this block's mode. In contrast to torch.fx.GraphModule,
    non-persistent buffers stay non-persistent, and a copy shares the generated code.

    Args:
        root: the module that holds everything the graph names.
        graph: what to run.
        extra: names of further modules or parameters to hold although the graph does not use them.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, extra: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.training = root.training
        named = [str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")]
        for name in [*named, *extra]:
            if name != "training":
                _graft(root, self, name)
        self._read = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
        code = graph.python_code("self")
        self._source = code.src
        # Modules by name: they can be neither copied nor pickled.
        self._globals = {k: _Import(v.__name__) if isinstance(v, ModuleType) else v for k, v in code.globals.items()}
        self._run = _compiled(self._source, self._globals)

    def forward(self, *state: Tensor) -> Any:
        """The crossing tensors before this block -> the ones behind it."""
        return self._run(self, *state)

    def direct_parameters(self) -> list[nn.Parameter]:
        """Parameters that the graph reads by itself from inside containers, which are never called as modules."""
        parameters = dict(self.named_parameters(remove_duplicate=False))
        return [parameters[name] for name in self._read if "." in name and name in parameters]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_run"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._run = _compiled(self._source, self._globals)


@dataclass(frozen=True)
class _Import:
    """A module that the generated code refers to."""

    name: str


def _graft(root: nn.Module, block: nn.Module, name: str) -> None:
    """Give the block what the root has under a dotted name, with empty modules on the way there."""
    *path, last = name.split(".")
    for part in path:
        root = getattr(root, part)
        if part not in block._modules:
            block.add_module(part, nn.Module())
        block = getattr(block, part)
        if block is root:  # a module that contains this one is already here
            return
    if last in root._buffers:
        block.register_buffer(last, root._buffers[last], persistent=last not in root._non_persistent_buffers_set)
    elif last in root._parameters:
        block.register_parameter(last, root._parameters[last])
    else:
        block._modules[last] = root._modules[last]


def _compiled(source: str, names: dict[str, Any]) -> Any:
    filename = f"<adaptive block {hash(source):x}>"
    # Tracebacks (and torch.compile's messages) can then show the generated lines.
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    scope = {k: importlib.import_module(v.name) if isinstance(v, _Import) else v for k, v in names.items()}
    exec(compile(source, filename, "exec"), scope)
    return scope["forward"]
