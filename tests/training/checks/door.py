"""The checks of a run's start, called as the run calls them, over networks that are built once."""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

from adaptive.data.shards.index import load_index
from adaptive.networks.from_config import build_network
from adaptive.training.batch import batch_sizes
from adaptive.training.preflight import check_training
from tests.training.setups import RESNET, config


def checked(data: Path, ranks: int = 1, /, begun: bool = False, **sections: Any) -> list[str]:
    """Check a small run on the digits for so many ranks; returns what its user is told."""
    tree = config(data, **sections)
    index = load_index(data, tree.data)
    as_built = {key: value for key, value in tree.model.model_dump().items() if key != "pretrained"}
    if tree.model.pretrained:
        as_built["backbone"] = RESNET["backbone"]
    network = copy.copy(_network(data, json.dumps(as_built)))
    return check_training(tree, batch_sizes(tree, ranks), index, network, begun=begun)


@cache
def _network(data: Path, model: str) -> Any:
    return build_network(config(data, model={**RESNET, **json.loads(model)}, train={"device": "auto"}), 10)
