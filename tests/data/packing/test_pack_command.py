import argparse
import json

from adaptive.commands import pack as command
from adaptive.data.shards.index import INDEX_NAME, load_index


def run_command(*words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(word) for word in words]))


def test_command_prints_a_summary(photos, tmp_path, capsys):
    (photos / "class0" / "bad.jpg").write_text("hello")
    (photos / "class0" / "notes.txt").write_text("hello")
    assert run_command(photos, tmp_path / "packed", "--max-bad", 1, "--hold-out", 3) == 0
    printed = capsys.readouterr().out
    fingerprint = load_index(tmp_path / "packed").fingerprint
    for expected in ("3 classes", fingerprint[:12], "train", "9 images in 1 shards", "1 other files ignored", "1 bad"):
        assert expected in printed
    assert "bad: class0/bad.jpg: not an image" in printed
    assert f"next: adaptive train CONFIG data.path={tmp_path / 'packed'}" in printed


def test_command_prints_json(photos, tmp_path, capsys):
    assert run_command(photos, tmp_path / "packed", "--json", "--shard-count", 5) == 0
    captured = capsys.readouterr()
    printed = json.loads(captured.out)
    assert captured.err == ""
    assert printed["splits"]["train"]["images"] == 12
    assert printed["splits"]["train"]["shards"] == 3
    assert printed["classes"] == ["class0", "class1", "class2"]
    assert printed["fingerprint"] == json.loads((tmp_path / "packed" / INDEX_NAME).read_text())["fingerprint"]
