"""Published accuracies of early-exit networks, for comparison with a run on the same data set.

Anytime numbers are from the tables of the papers named; budgeted ones were read off published figures, to about 0.2
points. Costs are multiply-adds of one image (on average, for the budgeted ones).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from adaptive.errors import AdaptiveError

CHOICES = ("auto", "cifar100", "imagenet", "none")
TITLES = {"cifar100": "CIFAR-100", "imagenet": "ImageNet"}
_CLASSES = {"cifar100": 100, "imagenet": 1000}
_SPELLINGS = {"cifar100": ("cifar100",), "imagenet": ("imagenet", "ilsvrc")}

_MSDNET = "Huang et al., ICLR 2018, arXiv 1703.09844"
_IMTA = "Li et al., ICCV 2019, arXiv 1908.06294"
_IMAGENET = (340e6, 685e6, 1008e6, 1254e6, 1361e6)
_CIFAR = (56e6, 101e6, 155e6, 198e6, 250e6, 298e6, 341e6)
_BUDGETS = (1.0e9, 1.25e9, 1.5e9, 2.0e9)


@dataclass(frozen=True)
class Reference:
    """One published curve.

    Attributes:
        label: method.
        kind: "anytime" has one point per exit, "budgeted" one per budget.
        macs: multiply-adds of one image, rising.
        top1: accuracy in percent.
        source: paper.
    """

    label: str
    kind: Literal["anytime", "budgeted"]
    macs: tuple[float, ...]
    top1: tuple[float, ...]
    source: str


REFERENCES: dict[str, tuple[Reference, ...]] = {
    "cifar100": (
        Reference("MSDNet", "anytime", _CIFAR, (64.10, 67.46, 70.34, 72.38, 73.06, 73.81, 73.89), _MSDNET),
        Reference("MSDNet + GE", "anytime", _CIFAR, (64.00, 68.41, 71.86, 73.50, 74.46, 75.39, 75.96), _IMTA),
        Reference("Meta-GF", "anytime", _CIFAR, (67.97, 72.27, 75.06, 75.77, 76.38, 77.11, 77.47), "ECCV 2022"),
    ),
    "imagenet": (
        Reference("MSDNet", "anytime", _IMAGENET, (56.64, 65.14, 68.42, 69.77, 71.34), _MSDNET),
        Reference("MSDNet + GE", "anytime", _IMAGENET, (57.28, 66.22, 70.24, 71.71, 72.43), _IMTA),
        Reference("Meta-GF", "anytime", _IMAGENET, (57.43, 64.82, 69.08, 71.67, 73.27), "ECCV 2022"),
        Reference("L2W-DEN", "anytime", _IMAGENET, (61.64, 67.89, 71.61, 73.82, 75.03), "ECCV 2022"),
        Reference("MSDNet", "budgeted", _BUDGETS, (71.6, 72.9, 73.8, 74.4), _MSDNET),
        Reference("IMTA", "budgeted", _BUDGETS, (71.8, 73.4, 74.3, 74.9), _IMTA),
        Reference("RANet", "budgeted", _BUDGETS, (72.2, 73.6, 74.6, 75.1), "CVPR 2020"),
        Reference("BoostNet", "budgeted", _BUDGETS, (72.8, 73.8, 74.8, 75.6), "AAAI 2023"),
        Reference("Dynamic Perceiver", "budgeted", _BUDGETS, (79.8, 80.2, 80.9, 81.2), "ICCV 2023"),
    ),
}


def recognise(classes: int, *names: str) -> str | None:
    """Return the data set by its number of classes and the names of its path, run or configuration; None if unknown."""
    words = ["".join(c for c in name.lower() if c.isalnum()) for name in names]
    for dataset, spellings in _SPELLINGS.items():
        if classes == _CLASSES[dataset] and any(s in word for s in spellings for word in words):
            return dataset
    return None


def choose(asked: str, recognised: Sequence[str | None]) -> str | None:
    """Return the data set whose published numbers a report shows, or None.

    Args:
        asked: a data set's name, ``none``, or ``auto``: the one that every run was recognised as.
        recognised: the result of `recognise` for each run.

    Raises:
        AdaptiveError: there are no published numbers of that name.
    """
    if asked not in CHOICES:
        raise AdaptiveError(f"--published {asked}: no such numbers; give one of {', '.join(CHOICES)}")
    if asked != "auto":
        return None if asked == "none" else asked
    found = set(recognised)
    return found.pop() if len(found) == 1 else None
