import io
import json
import os
import tarfile

import pytest
import torch
from PIL import Image

from adaptive.commands.main import main
from adaptive.config.sections import DataConfig
from adaptive.data.packing import index_tars
from adaptive.data.packing.verify import verify
from adaptive.data.reading.stream import EvaluationStream
from adaptive.data.shards.index import load_index


def write(path, samples, extension="jpg"):
    """A tar of (label, number) samples as other tools write them."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for label, number in samples:
            image = io.BytesIO()
            Image.new("RGB", (9, 8), (40 * number % 256, 0, 0)).save(image, "jpeg" if extension != "png" else "png")
            parts = {extension: image.getvalue(), "json": b"{}"} | (
                {} if label is None else {"cls": str(label).encode()}
            )
            for name, data in parts.items():
                info = tarfile.TarInfo(f"n0{label}/img_{number}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "imagenet1k-train-0000.tar", [(0, 1), (2, 2), (1, 3)])
    write(tmp_path / "imagenet1k-train-0001.tar", [(2, 4)], "jpeg")
    write(tmp_path / "imagenet1k-validation-03.tar", [(1, 5), (0, 6)], "png")
    return tmp_path


def run(words):
    with pytest.raises(SystemExit) as ended:
        main(words)
    return ended.value.code


def test_an_index_beside_what_is_there(folder, capsys):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert run(["pack", "--index", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {name: split["images"] for name, split in told["splits"].items()} == {"train": 4, "val": 2}
    assert {name: (folder / name).read_bytes() for name in before} == before
    index = load_index(folder)
    assert index.classes == ["0", "1", "2"]
    assert verify(str(folder), workers=1, progress=False).faults == []
    config = DataConfig(path=str(folder), image_size=8)
    batches = list(EvaluationStream(index, config, "train", batch=4))
    assert torch.equal(batches[0].labels, torch.tensor([0, 2, 1, 2]))
    assert run(["pack", "--index", str(folder)]) == 1
    assert "has an index.json already" in capsys.readouterr().err


def test_names_of_classes(folder, capsys):
    (folder / "classes.txt").write_text("cat\ndog\n")
    assert run(["pack", "--index", str(folder)]) == 1
    assert "names 2 classes, but label 2 occurs" in capsys.readouterr().err
    (folder / "classes.txt").write_text("cat\ndog\nä\n")
    assert run(["pack", "--index", str(folder)]) == 0
    assert load_index(folder).classes == ["cat", "dog", "ä"]


@pytest.mark.parametrize(
    ("name", "samples", "part"),
    [
        ("images-0001.tar", [(0, 1)], "no word of its name says which split"),
        ("train 1.tar", [(0, 1)], "rename it; a shard's name has letters"),
        ("train-2.tar", [(None, 1)], "sample n0None/img_1: has no label"),
        ("train-2.tar", [(-4, 1)], "label -4 is below 0"),
    ],
)
def test_what_cannot_be_indexed(folder, capsys, name, samples, part):
    write(folder / name, samples)
    assert run(["pack", "--index", str(folder)]) == 1
    assert part in capsys.readouterr().err
    assert not (folder / "index.json").exists()


def test_no_tars(tmp_path, capsys):
    assert run(["pack", "--index", str(tmp_path)]) == 1
    assert "holds no .tar files" in capsys.readouterr().err


def test_an_index_that_appears_meanwhile_stays(folder, capsys, monkeypatch):
    """Of two that index one folder the second is refused, also late."""

    def late(*arguments):
        (folder / "index.json").write_text("another's")
        return classes_of(*arguments)

    classes_of = index_tars.classes_of
    monkeypatch.setattr(index_tars, "classes_of", late)
    assert run(["pack", "--index", str(folder)]) == 1
    assert "has an index.json already" in capsys.readouterr().err
    assert (folder / "index.json").read_text() == "another's"


def test_a_pipe_named_like_a_shard_is_refused_and_not_waited_for(folder, capsys):
    os.mkfifo(folder / "imagenet1k-train-0002.tar")
    with pytest.raises(SystemExit) as ended:
        main(["pack", "--index", str(folder)])
    assert ended.value.code == 1
    assert "imagenet1k-train-0002.tar is no regular file or a link that leads nowhere; remove it" in (
        capsys.readouterr().err
    )
