"""Text of any origin: what a terminal, a page, a drawing and a shell make of it, and which secrets are struck out."""

import logging
import os
import subprocess

import pytest

from adaptive.errors import ConfigError, reason_of
from adaptive.foreign_text import (
    HarmlessLog,
    is_struck_out,
    redacted,
    say,
    shell_words,
    shown_location,
    visible,
    without_secrets,
    without_secrets_of,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:pw@host/set?sig=SIG", "https://***@host/set?***"),
        ("https://me:p@ss@host/set#token=T", "https://***@host/set#***"),
        ("http://me:p/w@host/x", "http://***@host/x"),
        ("http://me:p?w@host/x", "http://***@host/x"),
        ("http://me@host:80/x", "http://***@host:80/x"),
        ("http://host:8000/a@b", "http://host:8000/a@b"),
        ("http://[::1]:80/x?q=1", "http://[::1]:80/x?***"),
        ("s3://KEY:SE/CRET@bucket/x", "s3://***@bucket/x"),
        ("http:/me:pw@host/set?sig=S", "http:/***@host/set?***"),
        (
            "data.path = 'http://me:pw@host/s?sig=a'b&c': no such file",
            "data.path = 'http://***@host/s?***': no such file",
        ),
        ("see <http://host/?a=b>, and http://u:v@h.", "see <http://host/?***>, and http://***@h."),
        ("[Errno 32] Broken pipe: 'x'", "[Errno 32] Broken pipe: 'x'"),
        ("override 'data.path=pipe: curl K {}': no", "override 'data.path=pipe:***"),
        ("pipe:curl -H 'Authorization: Bearer K' {}", "pipe:***"),
        ("header Authorization: Bearer KEY', then", "header Authorization: Bearer ***', then"),
        ("export WANDB_API_KEY=abc; train", "export WANDB_API_KEY=***; train"),
        ("cls_token: size mismatch, key=1, a token: b", "cls_token: size mismatch, key=1, a token: b"),
        ("C:/x@y, lib:/a@b, /data/a?b", "C:/x@y, lib:/a@b, /data/a?b"),
    ],
)
def test_secrets_are_struck_out(text: str, expected: str) -> None:
    assert redacted(text) == expected
    assert redacted(expected) == expected
    assert str(ConfigError(text)) == expected
    assert reason_of(OSError(text)) == expected
    assert without_secrets({"a": [{"b": text}]}) == {"a": [{"b": expected}]}


def test_a_location_with_spaces_is_one_location() -> None:
    assert shown_location("http://host/a b?sig=x y") == "http://host/a%20b?***"
    assert shown_location("pipe:cat {}\nsecret") == "pipe:***"
    assert shown_location("/data/a b?c") == "/data/a b?c"


@pytest.mark.parametrize("location", ["https://me:p%40ss@host/s?X-Sig=a%2Fbc", "pipe:curl -u me:p%40ss {}"])
def test_the_words_of_a_library_lose_the_secrets_of_the_location(location: str) -> None:
    for words in (f"cannot read {location}", "login me:p%40ss failed", "password p%40ss", "signature a%2Fbc or a/bc"):
        told = without_secrets_of(location, words)
        if location.startswith("https") or location in words:
            assert not [secret for secret in ("p%40ss", "a%2Fbc", "a/bc") if secret in told], told


def test_what_was_struck_out_is_recognised() -> None:
    for location in ("https://me:pw@host/set?sig=SIG", "https://host/x?q", "pipe:cat {}", "s3://a:b@c"):
        assert not is_struck_out(location)
        assert is_struck_out(shown_location(location))


def test_names_do_nothing_to_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    name = "\x1b[31m a\nb\r\u202e\u2066\x00\udcff\ufffe\x9b \u00e9\u6f22"
    assert visible(name) == "\\x1b[31m a\\nb\\r\\u202e\\u2066\\x00\\udcff\\ufffe\\x9b \u00e9\u6f22"
    say("one", name)
    record = logging.LogRecord("x", logging.WARNING, "", 0, "%s at http://u:v@h", (name,), None)
    assert HarmlessLog().format(record) == f"{visible(name)} at http://***@h"
    assert capsys.readouterr().out == f"one\n{visible(name)}\n"


@pytest.mark.parametrize(
    "word", ["-x", "a b", "$(touch OWNED) `x` \\ '\"!", "\x1b[31m\n\u202e", os.fsdecode(b"\xff'\\")]
)
def test_commands_can_be_pasted(word: str) -> None:
    shown = shell_words("printf", "%s", word)
    assert shown.isprintable()
    ended = subprocess.run(["bash", "-c", shown], capture_output=True, check=True)
    assert ended.stdout == os.fsencode(f"./{word}" if word.startswith("-") else word)
