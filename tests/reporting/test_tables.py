import io

import pytest
from rich.console import Console

from adaptive.reporting.tables import exit_table, human, print_table


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (1000, "1.00 k"),
        (999_960, "1.00 M"),
        (9_996_000, "10.0 M"),
        (99_960_000, "100 M"),
        (25_557_032, "25.6 M"),
        (1_820_000_000, "1.82 G"),
        (-1_820_000_000, "-1.82 G"),
        (4e12, "4.00 T"),
        (5e15, "5000 T"),
    ],
)
def test_human_numbers(number, text):
    assert human(number) == text


def test_the_table_shows_what_the_rows_hold():
    rows = [
        {"exit": 1, "module": "layer1.1", "macs": 3.1e8, "share": 0.17, "parameters": 2.1e5, "top1": 52.123},
        {"exit": 2, "module": "layer4.1", "macs": 1.819e9, "share": 1.0, "parameters": 11.69e6, "top1": None},
    ]
    stream = io.StringIO()
    Console(file=stream, width=100).print(exit_table(rows, title="resnet18"))
    text = stream.getvalue()
    for part in ("resnet18", "after", "layer1.1", "310 M", "17.0 %", "210 k", "52.12", "1.82 G", "100.0 %", "11.7 M"):
        assert part in text
    assert "top-5" not in text
    assert "None" not in text


def test_no_column_is_cut_where_the_output_is_a_pipe(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    module = "stages.3.blocks.2.downsample"
    row = {"exit": 1, "module": module, "macs": 3.1e8, "parameters": 2e5, "top1": 52.1, "loss": 1}
    print_table(exit_table([row]))
    written = capsys.readouterr().out
    assert module in written
    assert "1.000" in written
