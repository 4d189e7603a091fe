"""What a recorded forward pass must not freeze: batch size, mode, precision, constants."""

from __future__ import annotations

import inspect
import re
import textwrap
from itertools import groupby
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from adaptive.errors import ModelError
from adaptive.networks import cutting
from adaptive.networks.cutting.cut import Cut, cut


class Awkward(nn.Module):
    """No forward_features; constants of every kind in the top-level code."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.fc = nn.Linear(8, 5)
        self.shift = [torch.arange(8.0)]  # neither parameter nor buffer

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        batch, width, height, side = x.shape
        x = x.reshape(batch, width, height * side).transpose(1, 2)
        x = torch.cat([self.token.expand(batch, -1, -1), x], dim=1)
        scale = torch.linspace(0, 1, 8, dtype=x.dtype, device=x.device)
        x = self.first(x * scale)
        x = functional.dropout(x, 0.5, training=self.training)
        windows = x[:, 1:].reshape(batch * 4, 4, 8)
        windows = self.second(windows + self.token.mean())
        x = (2 - windows).reshape(batch, 16, 8)
        x[:, 0] = 0
        return self.fc(x.mean(1) + self.shift[0].to(x.dtype))


def _run(pieces: Cut, x: Tensor) -> Tensor:
    state: tuple[Tensor, ...] = (x,)
    for block in pieces.blocks:
        state = block(*state)
    return pieces.head(*state)


def test_batch_precision_and_constants_stay_free() -> None:
    model = Awkward()
    pieces = cut(model, ["first"], 16)
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 16, 16)
        torch.testing.assert_close(_run(pieces, x), model(x), rtol=0, atol=1e-6)
    model.double()
    for part in (*pieces.blocks, pieces.head):
        part.double()
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(_run(pieces, x), model(x), rtol=0, atol=1e-12)


def test_mode_is_each_blocks_own() -> None:
    model = Awkward()
    pieces = cut(model, ["first"], 16)
    x = torch.randn(3, 3, 16, 16)
    evaluated = _run(pieces, x)
    for block in pieces.blocks:
        block.train()
    torch.manual_seed(0)
    trained = _run(pieces, x)
    torch.manual_seed(0)
    torch.testing.assert_close(trained, model.train()(x))
    assert not torch.allclose(trained, evaluated)


def test_a_parameter_read_on_both_sides_has_one_home_and_crosses() -> None:
    pieces = cut(Awkward(), ["first"], 16)
    assert "token" in dict(pieces.blocks[0].named_parameters())
    assert all("token" not in name for part in (pieces.blocks[1], pieces.head) for name, _ in part.named_parameters())
    assert pieces.batch_dims[0] == ((0, 1), None)


def test_the_last_exit_is_at_least_the_last_weights() -> None:
    assert set(cut(Awkward(), 2, 16).head.state_dict()) == {"fc.weight", "fc.bias"}


class Forked(nn.Module):
    """Its steps depend on the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x.mean(1).mean(1)[:, :4])
        return self.fc(self.b(x * 2 if self.training else x))


def test_steps_that_depend_on_the_mode_are_refused() -> None:
    with pytest.raises(ModelError, match="depend"):
        cut(Forked(), ["a"], 8)


def test_recording_leaves_buffers_and_methods_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2)).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    call, state = nn.Module.__call__, torch.get_rng_state()
    cut(model, 2, 8)
    assert nn.Module.__call__ is call
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())


def test_the_example_that_explains_cutting() -> None:
    """The page on top of the package: its model, cut as it says, gives the code that it shows."""
    lines = str(inspect.getdoc(cutting)).splitlines(keepends=True)
    parts = ["".join(part) for code, part in groupby(lines, lambda line: line[:4].isspace() or line == "\n") if code]
    model, methods = (textwrap.dedent(part).strip() for part in parts if "def " in part)
    names: dict[str, Any] = {"nn": nn}
    exec(model, names)
    found = cut(names["Plain"](), ["first.conv"], 8)
    sources = [re.sub(r";.*", "", block._source).strip() for block in [*found.blocks, found.head]]
    assert "\n\n".join(sources) == methods
