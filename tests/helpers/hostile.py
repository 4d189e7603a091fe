"""Names and locations as an attacker would choose them, and what must never come of them."""

import os
import stat
from collections.abc import Iterable
from pathlib import Path

OWNED = "OWNED"
PASSWORD, SIGNATURE, HEADER = "pa55w0rd", "f00d5ec2e7", "c0ffeebeef"
SECRETS = (PASSWORD, SIGNATURE, HEADER)
RUNS_A_COMMAND = f"$(touch {OWNED}) `touch {OWNED}`; touch {OWNED}"
# One for each of the ten digits.
CLASSES = [
    "[red]x[/]",
    "[a]",
    "$x^",
    "<script>alert(1)</script>",
    "\"'&amp;<b>",
    "\x1b[31mred\x07",
    "line\nbreak\r",
    "\u202egnp.exe",
    f"-dash {RUNS_A_COMMAND}",
    "_nul\x00\ufffe",
]
FOLDER = f"-[red]x[a] $x^ {RUNS_A_COMMAND} <script>&'\" \x1b[31m\u202e\n_"
IMAGES = ["[a].png", "$x^ <b>.png", "-n.png", "esc\x1b[2J\u202e.png", "line\nbreak.png", os.fsdecode(b"\xff.png")]


def with_secrets(url: str) -> str:
    """Return a store's URL with user, password and signature."""
    return f"{url.replace('://', f'://me:{PASSWORD}@')}?X-Signature={SIGNATURE}"


def harmless(text: str) -> bool:
    """Say whether text does nothing to a terminal that shows it: its lines hold printable characters only."""
    return all(line.isprintable() for line in text.split("\n"))


def leaks(folders: Iterable[Path]) -> list[str]:
    """Return which files hold a secret, but those that their owner alone may read."""
    found = []
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        if stat.S_IMODE(path.stat().st_mode) & 0o077 and any(s.encode() in path.read_bytes() for s in SECRETS):
            found.append(str(path))
    return found
