"""Text of any origin made fit to be shown: one harmless line, without secrets, quoted where a shell will read it.

Names of classes, files and runs come from datasets and run folders of anybody; locations of datasets hold passwords and
signatures. `visible` is for names, `redacted` for text that may hold a location, `shown` does both, and `say` prints.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
from collections.abc import Mapping
from typing import Any, TextIO
from urllib.parse import unquote, urlsplit

PIPE = "pipe:"
REDACTED = "***"
# A password may itself hold @, and in a URL that nothing can read also /, ? or #; digits behind the colon are a port.
# With one slash: what pathlib makes of a URL.
_SCHEME = r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]*://|\b(?:https?|s3a?|gc?s|s?ftp|abfss?|az):/(?!/))"
_USER = re.compile(_SCHEME + r"(?:[^\s/?#]*@|[^\s:/?#\[\]]*:(?!\d+(?:[/?#'\"),;]|\s|$))\S*@)")
# Ends at a space; quotes and the like behind it belong to the sentence around.
_QUERY = re.compile(_SCHEME + r"(?P<path>[^\s?#]*)(?P<mark>[?#])(?!\*\*\*)\S+?(?=['\"`)>\]},;:.]*(?:\s|$))")
# "Broken pipe: ..." is what systems say of something else.
_COMMAND = re.compile(rf"(?m)(?:(?:^|(?<=['\"=(])){PIPE}|\b{PIPE}(?=\S))(?!{re.escape(REDACTED)})[^\n]+")
_HEADER = re.compile(
    r"(?i)(\bauthorization['\"]?\s*[:=]\s*['\"]?(?:(?:bearer|basic|token)\s+)?)(?!\*\*\*|(?:bearer|basic|token)\s)[^\s'\"]+"
)
_VARIABLE = re.compile(r"\b([A-Z][A-Z0-9_]*(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD)[A-Z0-9_]*=)(?!\*\*\*)[^\s'\";&|]+")
_STRUCK_OUT = re.compile(rf"{PIPE}{re.escape(REDACTED)}|(?<=://){re.escape(REDACTED)}@|[?#]{re.escape(REDACTED)}")
_SHORTEST_SECRET = 4  # characters; shorter ones would be found in words


def visible(text: str) -> str:
    """Return text with what is not printable spelt out: one line that does nothing to a terminal, a page or a drawing.

    Control characters, line breaks, characters that turn the direction of writing, and what is no Unicode (bytes of a
    file's name that are not UTF-8) become escapes, as in ``\\x1b``.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def redacted(text: str) -> str:
    """Return text with the secrets in it replaced by ``***``.

    These are user, password, query and fragment of every URL (stores put their signatures there), whole commands as
    data.path may hold them, Authorization headers, and what is assigned to variables such as WANDB_API_KEY.
    """
    if ":/" in text:
        text = _QUERY.sub(rf"\g<scheme>\g<path>\g<mark>{REDACTED}", _USER.sub(rf"\g<scheme>{REDACTED}@", text))
    if PIPE in text:
        text = _COMMAND.sub(f"{PIPE}{REDACTED}", text)
    return _VARIABLE.sub(rf"\1{REDACTED}", _HEADER.sub(rf"\1{REDACTED}", text))


def shown(text: object) -> str:
    """Return any text as one harmless line without secrets."""
    return visible(redacted(str(text)))


def shown_location(location: object) -> str:
    """Return where a dataset lies, a folder, URL or command, as one harmless line without secrets."""
    text = str(location)
    if text.startswith(PIPE):
        return f"{PIPE}{REDACTED}"
    scheme, mark, rest = text.partition("://")
    if not mark or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.:/-]*", scheme):
        return shown(text)
    # The whole text is one URL, so spaces do not end it.
    return visible(redacted(f"{scheme}://{'%20'.join(rest.split())}"))


def is_struck_out(location: str) -> bool:
    """Say whether a location lacks its secrets, because it was written without them."""
    return _STRUCK_OUT.search(location) is not None


def without_secrets(value: Any) -> Any:
    """Return plain values with the secrets in every text replaced by ``***``; see `redacted`."""
    if isinstance(value, Mapping):
        return {key: without_secrets(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(entry) for entry in value]
    if isinstance(value, str):
        return f"{PIPE}{REDACTED}" if value.startswith(PIPE) else redacted(value)
    return value


def without_secrets_of(location: str, text: str) -> str:
    """Return the words of a library about a location with its secrets replaced, also where no URL is around them."""
    text = redacted(text)
    if location.startswith(PIPE):
        return text.replace(location.removeprefix(PIPE), REDACTED)
    try:
        parts = urlsplit(location)
    except ValueError:
        return text
    user = parts.netloc.rpartition("@")[0]
    found = {user, user.partition(":")[2], parts.query, parts.fragment}
    found |= {pair.partition("=")[2] for pair in parts.query.split("&")}
    found |= {unquote(secret) for secret in found}
    for secret in sorted(found, key=len, reverse=True):
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, REDACTED)
    return text


def shell_words(*words: object) -> str:
    """Return words as a shell reads them, for commands that are shown to be pasted.

    What is not printable is written as bash and zsh spell it (``$'\\x1b'``). A path that begins with a dash gets ``./``
    in front, so that no command takes it for an option.
    """
    return " ".join(_shell_word(str(word)) for word in words)


def _shell_word(word: str) -> str:
    if word.startswith("-"):
        word = f"./{word}"
    if word.isprintable():
        return shlex.quote(redacted(word))
    return "$'" + "".join(_spelt(byte) for byte in os.fsencode(word)) + "'"


def _spelt(byte: int) -> str:
    character = chr(byte)
    return f"\\{character}" if character in "\\'" else character if 32 <= byte < 127 else f"\\x{byte:02x}"


def say(*lines: object, file: TextIO | None = None) -> None:
    """Print lines for people: each is `shown`, so a line break in a name makes no line of its own."""
    print("\n".join(map(shown, lines)), file=file or sys.stdout, flush=True)


class HarmlessLog(logging.Formatter):
    """Formats log records as `shown`, the lines of a traceback each by itself."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text."""
        trace = self.formatException(record.exc_info).splitlines() if record.exc_info else []
        return "\n".join(map(shown, [record.getMessage(), *trace]))
