"""The structure of a tar that somebody else wrote: what packing's own shards have by construction."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from adaptive.data.faults import BadDataError
from adaptive.data.images.image_kinds import folder_left_behind
from adaptive.data.images.image_tree import NO_FILE
from adaptive.data.shards.reader import (
    IMAGE_EXTENSIONS,
    LABEL_BYTES,
    group_samples,
    is_apple_double,
    lacking,
    split_name,
)
from adaptive.data.shards.tar_headers import BROKEN, HeaderReader, members, open_tar
from adaptive.data.shards.tar_members import Member, members_of

Sample = tuple[str, dict[str, tuple[int, int]]]  # key, and offset and size of the members by extension

LEFT_BY_MACOS = "attributes that macOS adds"
NO_SAMPLE = "member of no sample"
_HEADER = tarfile.BLOCKSIZE
_CHECKSUM = slice(148, 156)  # of a header, counted as blanks in its own sum (POSIX ustar)
_READ = 1 << 20  # bytes at a time
_LABEL = re.compile(rb"\s*[+-]?[0-9]+\s*")


@dataclass
class TarContents:
    """What a tar holds: its samples, the members left out by reason, and faults: key (or nothing) and sentence."""

    samples: list[Sample] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)


def examine(path: Path) -> TarContents:
    """Scan a tar of samples; a fault is a sentence with its remedy, and all of them are found (raises OSError)."""
    contents = TarContents()
    with path.open("rb") as file:
        found = _plain_members(file.fileno())
    if found is None:
        with path.open("rb") as file:  # anew: the descriptor was read on
            found = _scan(file, contents)
    for name, _, _ in found:
        if is_apple_double(name):
            contents.left_out.append((LEFT_BY_MACOS, name))
        elif split_name(name)[0] is None:
            contents.left_out.append((NO_SAMPLE, name))
    contents.samples = group_samples(found)
    contents.faults += _member_faults(name for name, _, _ in found if not is_apple_double(name))
    contents.faults += sample_faults(contents.samples)
    return contents


def _plain_members(descriptor: int) -> list[Member] | None:
    """Return the members of a whole tar that holds nothing but regular files, one behind the other; None of others."""
    try:
        found = members_of("", descriptor)
    except BadDataError:
        return None
    end = 0
    for _, offset, size in found:
        if offset != end + _HEADER or not _is_sound(os.pread(descriptor, _HEADER, end)):
            return None
        end = offset + -(-size // _HEADER) * _HEADER
    return None if _end_faults(descriptor, end, os.fstat(descriptor).st_size) else found


def _is_sound(header: bytes) -> bool:
    """Say whether a header's checksum is right, which a reader of plain tars does not look at."""
    stated = header[_CHECKSUM].strip(b" \0")
    return bool(re.fullmatch(rb"[0-7]+", stated)) and int(stated, 8) == sum(header) - sum(header[_CHECKSUM]) + 8 * ord(
        " "
    )


def _scan(file: IO[bytes], contents: TarContents) -> list[Member]:
    """Return the members of any tar; enter those that are left out, and the faults of the tar itself."""
    found: list[Member] = []
    size = os.fstat(file.fileno()).st_size
    try:
        with open_tar(HeaderReader(file)) as tar:
            for member in members(tar):
                if member.isreg() and not member.issparse():
                    found.append((member.name, member.offset_data, member.size))
                elif not member.isdir():
                    contents.left_out.append((NO_FILE, member.name))
            end = tar.offset
    except BROKEN as error:
        contents.faults.append(("", f"is cut off, damaged or no tar file ({error}); copy or make it again"))
    else:
        contents.faults += _end_faults(file.fileno(), min(end, size), size)
    return found


def read_label(descriptor: int, offset: int, size: int) -> int | str:
    """Return a sample's label, or the sentence that says why it has none (raises OSError)."""
    text = os.pread(descriptor, min(size, LABEL_BYTES), offset)
    if size > LABEL_BYTES or not _LABEL.fullmatch(text):
        shown = text[:20].decode("utf-8", "replace")
        return f"label {shown!r} is no number; a member cls holds the number of the class, in digits"
    return int(text)


def _end_faults(descriptor: int, end: int, size: int) -> list[tuple[str, str]]:
    """Look for the end mark, a block of zeros: without it a tar was cut off, and data behind it are never read."""
    mark = os.pread(descriptor, _HEADER, end)
    if not mark:
        return [("", "has no end mark: it was cut off between two members; copy or make it again")]
    if mark.strip(b"\0"):
        return [("", f"is damaged at byte {end}, where a header should be; copy or make it again")]
    for offset in range(end, size, _READ):
        if os.pread(descriptor, _READ, offset).strip(b"\0"):
            what = "holds data behind its end mark, as if tars had been joined, which no reader reaches; "
            return [("", what + "join them with: tar --concatenate")]
    return []


def _member_faults(names: Iterable[str]) -> list[tuple[str, str]]:
    """Find members of one name, and keys that come back after another one: a reader would make one or two of them."""
    faults, last = [], None
    keys: set[str] = set()
    parts: set[str] = set()
    for name in names:
        key, extension = split_name(name)
        if key is None or extension is None:
            continue
        if key != last:
            if key in keys:
                faults.append(
                    (key, "has members that do not lie together, others are in between; sort the members by name")
                )
            keys.add(key)
            last, parts = key, set()
        if extension.lower() in parts:
            faults.append((key, f"has two members {extension}, one of which would be lost; give each sample a key"))
        parts.add(extension.lower())
    return faults


def sample_faults(samples: Iterable[Sample]) -> list[tuple[str, str]]:
    """Find samples that lack an image or a label, have several images, or are copies that tools made."""
    faults = []
    for key, parts in samples:
        if tool := next((part for part in key.split("/")[:-1] if part.strip(".") and folder_left_behind(part)), None):
            faults.append((key, f"is a copy that a tool made, in {tool}; remove it from the tar"))
            continue
        images = sorted(IMAGE_EXTENSIONS & parts.keys())
        if len(images) > 1:
            faults.append((key, f"has {len(images)} images ({', '.join(images)}); keep one of them"))
        if not images or "cls" not in parts:
            faults.append((key, lacking(bool(images), parts)))
    return faults
