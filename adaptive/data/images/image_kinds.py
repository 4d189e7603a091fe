"""Which files are images, by their names and first bytes, and which are copies and litter that tools leave behind."""

from __future__ import annotations

import os
import re

# Names that say "image": torchvision's list, further names of JPEG and PNM, and GIF, of which single frames are taken.
EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jif", ".jfif", ".jfi", ".png", ".apng", ".bmp", ".dib", ".webp", ".gif"}
    | {".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"}
)
HEAD_BYTES = 64  # of a file, by which `kind_of` knows its format

# Names of images that are not read. Camera raw files begin as TIFF does and hold a preview.
_UNREAD = {
    **dict.fromkeys((".heic", ".heif", ".hif"), "HEIC"),
    **dict.fromkeys((".jp2", ".j2k", ".jpx", ".jpf"), "JPEG 2000"),
    **dict.fromkeys((".dng", ".nef", ".cr2", ".cr3", ".crw", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw"), "raw"),
    **{".avif": "AVIF", ".jxl": "JPEG XL", ".psd": "PSD", ".svg": "SVG", ".eps": "EPS", ".exr": "OpenEXR"},
    **{".ico": "ICO", ".tga": "TGA", ".dcm": "DICOM"},
}
_READ_HEADS = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
)
_UNREAD_HEADS = (
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"8BPS\0\x01", "PSD"),
    (b"\x76\x2f\x31\x01", "OpenEXR"),
)
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"hevc": "HEIC", b"mif1": "HEIC"}
_BITMAP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)  # sizes in bytes that the header behind a BMP's first 14 can have
_PORTABLE = re.compile(rb"P[1-6]\s(?:\s|#[^\n]*\n)*[0-9]+\s")

_TOOL_FOLDERS = {
    *("__macosx", "@eadir", "#recycle", "@recycle", "$recycle.bin", "system volume information", "lost+found"),
    *("__pycache__", "recycler", ".ipynb_checkpoints", ".git", ".svn", ".hg", ".appledouble", ".thumbnails", ".cache"),
}
_TOOL_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
_BACKUPS = (".bak", ".orig", ".old", ".swp")
_UNFINISHED = (".part", ".partial", ".crdownload", ".filepart", ".download")
# How file managers name a copy. Whether it is one the bytes decide: cameras and exports number files so as well.
_COPY = re.compile(
    r"(?P<copied>.+?)(?: ?\(\d+\)|[ _-]+cop(?:y|ie|ia)(?: \(?\d+\)?)?| - Kopie(?: \(\d+\))?"
    r"| \((?:\w+ )?copy(?: \d+)?\))"
    r"|(?:Copy of|Kopie von|Copie de|Copia de) (?P<of>.+)",
    re.IGNORECASE,
)

NOT_AN_IMAGE = "not an image"
HIDDEN = "hidden"
OF_A_TOOL = "left by a tool"
BACKUP = "backup copy"
UNFINISHED = "unfinished download"


def extension_of(name: str) -> str:
    """Return a file's extension in lower case with its dot, empty where it has none."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 (a million names: five times as fast as a Path)


def is_image(name: str) -> bool:
    """Say whether a file's name is that of an image, and of none that a tool left behind."""
    return extension_of(name) in EXTENSIONS and left_behind(name) is None


def kind_of(head: bytes) -> str | None:
    """Return the format of an image by the first `HEAD_BYTES` of its file, None where it is none that is read."""
    for start, kind in _READ_HEADS:
        if head.startswith(start):
            return kind
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BITMAP_HEADERS:
        return "BMP"
    return "PPM" if _PORTABLE.match(head) else None


def unread_kind(name: str, head: bytes = b"") -> str | None:
    """Return the format of an image that is not read, by its file's name or first bytes; None of all other files."""
    if kind := _UNREAD.get(extension_of(name)):
        return kind
    for start, kind in _UNREAD_HEADS:
        if head.startswith(start):
            return kind
    return _BRANDS.get(head[8:12]) if head[4:8] == b"ftyp" else None


def left_behind(name: str) -> str | None:
    """Return why a file is no part of a data set though it may hold an image, None where its name is a usual one."""
    if name.startswith("."):
        return HIDDEN
    lower = name.lower()
    if lower in _TOOL_FILES:
        return OF_A_TOOL
    if lower.endswith(_BACKUPS) or name[-1:] == "~" or name[:1] == name[-1:] == "#":
        return BACKUP
    return UNFINISHED if lower.endswith(_UNFINISHED) else None


def folder_left_behind(name: str) -> str | None:
    """Return why a folder is no part of a data set: it is hidden, or a trash, cache or index of a tool; else None."""
    if name.lower() in _TOOL_FOLDERS or name.startswith(".Trash"):
        return f"{OF_A_TOOL} ({name})"
    return f"in a hidden folder ({name})" if name.startswith(".") else None


def copied_name(name: str) -> str | None:
    """Return the name of the file of which this one is a copy by its name: x.jpg of `x (1).jpg` and `Copy of x.jpg`."""
    stem, extension = os.path.splitext(name)  # noqa: PTH122
    found = _COPY.fullmatch(stem)
    return (found["copied"] or found["of"]) + extension if found else None
