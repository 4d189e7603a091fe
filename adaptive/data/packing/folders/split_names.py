"""The names by which folders and shards say which split they are."""

from __future__ import annotations

import re
from collections.abc import Iterable

_WORDS = {
    "train": ("train", "training", "trn", "trainval"),
    "val": ("val", "valid", "validation", "validate", "dev", "devel", "development"),
    "test": ("test", "testing", "tst", "eval", "evaluation"),
}
_SPLITS = {word: split for split, words in _WORDS.items() for word in words}
# What people append to it: train2017, test_set, "Training images".
_NAME = re.compile(r"(?P<word>[a-z]+?)[ _-]?(?:set|data|dataset|split|images|imgs|folder|dir)?[ _-]?[0-9]*")


def split_of(name: str) -> str | None:
    """Return the split (train, val or test) that a folder's name or a word stands for, None of any other name."""
    found = _NAME.fullmatch(name.strip().lower())
    return _SPLITS.get(found["word"]) if found else None


def splits_in(name: str) -> set[str]:
    """Return the splits that the words of a longer name stand for: train of ``imagenet1k-train-0007``."""
    return {split for word in re.split(r"[\W_]+", name.lower()) if (split := split_of(word))}


def usual_names(splits: Iterable[str] = _WORDS) -> str:
    """Return the names of splits for a message."""
    return "; ".join(f"{split}: {', '.join(_WORDS[split])}" for split in splits)
