import io
import logging
import re

import pytest

from adaptive.tracking.console import Console

TRAIN = {
    "step": 120,
    "epoch": 3,
    "samples": 7680,
    "train/loss": 1.2341,
    "train/exit_2/top1": 52.3,
    "train/exit_1/top1": 45.1,
    "train/exit_10/top1": 60.2,
    "train/lr": 0.05,
    "train/images_per_second": 1234.4,
}
VALIDATION = {
    "step": 120,
    "epoch": 3,
    "val/exit_1/top1": 44.0,
    "val/exit_2/top1": 51.25,
    "val/exit_1/top5": 80.0,
    "val/exit_2/top5": 90.0,
    "val/exit_1/loss": 1.5,
    "val/exit_2/loss": float("nan"),
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_plain_lines_hold_every_figure():
    stream = io.StringIO()
    console = Console(1200, True, stream, epochs=30)
    console.update(100)
    console.train(TRAIN)
    console.validation(VALIDATION)
    console.message("saved [checkpoint] 120")
    console.close()
    train, validation, message = stream.getvalue().splitlines()
    assert re.fullmatch(
        r"epoch 3/30 step 120/1200 loss 1\.234 top1 45\.1/52\.3/60\.2 lr 0\.05 1234 images/s eta \d+:\d\d:\d\d", train
    )
    assert validation == ("validation epoch 3/30 step 120/1200 loss 1.500/nan top1 44.0/51.2 top5 80.0/90.0")
    assert message == "saved [checkpoint] 120"


def test_a_terminal_that_nobody_watches_gets_plain_lines():
    """mpirun gives its processes one, and writes their output to its own, which may be a file."""
    stream = Terminal()
    console = Console(1200, True, stream, epochs=30, watched=False)
    console.update(100)
    console.train(TRAIN)
    console.close()
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("epoch 3/30 step 120/1200 loss 1.234 ")
    assert "\x1b" not in line


def test_a_record_with_little_in_it_is_still_a_line():
    stream = io.StringIO()
    Console(10, True, stream).train({"step": 5})
    assert stream.getvalue() == "step 5/10 eta -:--:--\n"


def test_eta_comes_from_the_pace_since_the_first_update(monkeypatch):
    clock = iter([100.0, 160.0, 160.0, 160.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    console = Console(1000, True, stream)
    console.update(400)
    console.train({"step": 460})
    assert stream.getvalue().endswith("eta 0:09:00\n")


def test_a_terminal_gets_a_bar_and_a_table(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    console = Console(1200, True, stream, epochs=30)
    console.update(100)
    console.train(TRAIN)
    console.validation(VALIDATION)
    console.message("saved [checkpoint] 120")
    console.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "120/1200" in text
    assert "10%" in text
    assert "epoch 3/30  loss 1.234  top1 60.2  1234 images/s" in text
    assert re.search(r"exit . top-1 % . top-5 % . +loss", text)
    assert re.search(r"2 │ +51\.25 │ +90\.00 │ +nan", text)
    assert "saved [checkpoint] 120" in text


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_other_ranks_print_nothing(stream):
    console = Console(1200, False, stream)
    console.update(1)
    console.train(TRAIN)
    console.validation(VALIDATION)
    console.message("hello")
    console.close()
    assert stream.getvalue() == ""


def test_a_broken_output_is_reported_once_and_harms_nothing(caplog):
    console = Console(1200, True, Broken())
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            console.train(TRAIN)
            console.validation(VALIDATION)
        console.close()
    assert len(caplog.records) == 1
    assert "Broken pipe" in caplog.text
