import argparse
import io
import json

import numpy as np
import pytest
from PIL import Image

from adaptive.commands import pack as command
from adaptive.data.shards.index import INDEX_NAME, load_index
from adaptive.errors import DataError


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


def noise():
    stream = io.BytesIO()
    values = np.random.default_rng(0).integers(0, 256, (25, 25, 3), dtype=np.uint8)
    Image.fromarray(values).resize((200, 200), Image.Resampling.BICUBIC).save(stream, "jpeg")
    return stream.getvalue()


def test_an_image_that_decodes_in_part_is_bad_and_a_fault(photos, tmp_path, capsys):
    whole = noise()
    half = whole[: len(whole) // 2] + bytes(len(whole) // 2) + whole[-2:]
    (photos / "class0" / "half.jpg").write_bytes(half)
    with pytest.raises(DataError, match=r"class0/half\.jpg: damaged, a part of the image is lost"):
        run_command(photos, tmp_path / "packed")
    assert run_command(photos, tmp_path / "packed", "--max-bad", 1) == 0
    assert "class0/half.jpg: damaged" in capsys.readouterr().out
    (photos / "class0" / "half.jpg").write_bytes(whole)
    assert run_command(photos, tmp_path / "packed", "--overwrite") == 0
    [shard] = (tmp_path / "packed").glob("*.tar")
    content = shard.read_bytes()
    shard.write_bytes(
        content.replace(whole, whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2 - 2) + whole[-2:])
    )
    (tmp_path / "packed" / INDEX_NAME).unlink()
    (tmp_path / "packed" / "classes.txt").write_text("a\nb\nc\n")
    assert run_command("--index", tmp_path / "packed") == 0
    assert run_command("--verify", tmp_path / "packed") == 1
    assert "damaged image: shard" in capsys.readouterr().out


def test_a_few_bytes_that_no_pixel_used_are_told(photos, tmp_path, capsys):
    whole = noise()
    (photos / "class0" / "more.jpg").write_bytes(whole[:-2] + bytes(30) + whole[-2:])
    assert run_command(photos, tmp_path / "packed") == 0
    printed = capsys.readouterr().out
    assert "suspect, but packed: class0/more.jpg: Corrupt JPEG data: " in printed
    assert "extraneous bytes before marker" in printed
    assert run_command("--verify", tmp_path / "packed") == 0
    assert "suspect, but counted as fine" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [("--hold-out", 3), ("--hold-out-test", 3), ("--leave-out", "x"), ("--no-splits",), ("--max-bad", 1)]
)
def test_what_says_how_to_pack_is_not_passed_over(tmp_path, words):
    for mode in ("--index", "--verify"):
        with pytest.raises(DataError, match=f"{mode} packs nothing; leave out {words[0]}"):
            run_command(mode, tmp_path, *words)


def test_command_holds_out_for_all_three(photos, tmp_path, capsys):
    assert run_command(photos, tmp_path / "packed", "--hold-out", 3, "--hold-out-test", 4, "--json") == 0
    splits = json.loads(capsys.readouterr().out)["splits"]
    assert {name: split["images"] for name, split in splits.items()} == {"train": 5, "val": 3, "test": 4}
