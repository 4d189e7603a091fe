from __future__ import annotations

import pytest
import torch
from torch import nn

from adaptive import create_model
from adaptive.errors import ModelError
from adaptive.networks.collaboration import CollaborationLink
from tests.networks.conftest import build, images


@pytest.mark.parametrize("family", ["resnet", "swin", "deit"])
@pytest.mark.parametrize("late", [1, 2])
def test_no_gradient_flows_back(family: str, late: int) -> None:
    net = build(family).train()
    net.exits[late].link.projection.weight.data.normal_()
    net(images(net, 3))[late].square().sum().backward()
    for i in range(late):
        assert all(p.grad is None for p in net.exits[i].parameters())
    assert all(p.grad is not None for p in net.exits[late].link.parameters())


def test_is_a_linear_layer_on_the_concatenation() -> None:
    link, classifier = CollaborationLink(5, 8).eval(), nn.Linear(8, 5)
    feature, previous = torch.randn(3, 8), torch.randn(3, 5)
    whole = nn.Linear(16, 5)
    whole.weight.data = torch.cat([classifier.weight, link.projection.weight], dim=1).detach()
    whole.bias.data = classifier.bias.detach()
    inner = torch.relu(link.norm(link.linear(previous)))
    expected = whole(torch.cat([feature, inner], dim=1))
    torch.testing.assert_close(classifier(feature) + link(previous), expected)


def test_prediction_reaches_the_next_exit() -> None:
    net = build("resnet").eval()
    net.exits[2].link.projection.weight.data.normal_()
    x = images(net, 1)
    with torch.no_grad():
        together = net(x)
        net.collaboration = False
        alone = net(x)
    assert torch.equal(together[0], alone[0])
    assert not torch.allclose(together[1], alone[1])
    assert not torch.allclose(together[2], alone[2])


def test_the_backbones_own_end_starts_unchanged() -> None:
    net = create_model("resnet10t", 5, 2, input_size=32).eval()
    x = images(net, 2)
    with torch.no_grad():
        together = net(x)[-1]
        net.collaboration = False
        assert torch.equal(net(x)[-1], together)


def test_without_links_it_cannot_be_switched_on() -> None:
    net = build("vit", collaboration=False)
    assert all(exit_.link is None for exit_ in net.exits)
    with pytest.raises(ModelError, match="collaboration = True"):
        net.collaboration = True


def test_run_exit_asks_for_the_previous_logits() -> None:
    net = build("vit").eval()
    state = net.run_block(1, net.run_block(0, net.start(images(net, 1))))
    with pytest.raises(ModelError, match="exit 0's logits"):
        net.run_exit(1, state)
