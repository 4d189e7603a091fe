"""Class folders that can be read in several ways, and files that are easily lost, packed by the command."""

import json
import os
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from adaptive.commands.main import main
from adaptive.data.shards.index import load_index


def picture(path: Path, shade: int = 0, kind: str = "jpeg") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), (shade, 9, 9)).save(path, kind)
    return path


def fill(root: Path, *folders: str) -> Path:
    """Two different images in each folder."""
    for number, folder in enumerate(folders):
        for one in (1, 2):
            picture(root / folder / f"{one}.jpg", 20 * number + one)
    return root


@pytest.fixture
def pack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """The command: its exit code, and what it printed."""

    def call(source: Path, *words: str) -> tuple[int, str]:
        shutil.rmtree(tmp_path / "packed", ignore_errors=True)
        with pytest.raises(SystemExit) as ended:
            main(["pack", str(source), str(tmp_path / "packed"), "--workers", "1", *words])
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out + printed.err

    call.folder = tmp_path / "packed"  # type: ignore[attr-defined]
    return call


def counts(pack: Any) -> dict[str, int]:
    return {name: split.count for name, split in load_index(pack.folder).splits.items()}


@pytest.mark.parametrize(
    "names",
    [
        ("training", "validation", "testing"),
        ("Train", "VALID", "Test"),
        ("TRAINING", "dev", "eval"),
        ("trn", "val", "test_set"),
        ("train2017", "val2017", "evaluation"),
    ],
)
def test_the_usual_names_of_splits_in_any_case(tmp_path: Path, pack: Any, names: tuple[str, ...]) -> None:
    source = fill(tmp_path / "source", *(f"{name}/{label}" for name in names for label in "ab"))
    code, printed = pack(source)
    assert (code, load_index(pack.folder).classes) == (0, ["a", "b"]), printed
    assert counts(pack) == {"train": 4, "val": 4, "test": 4}
    assert f"{names[2]} is split test" in printed


@pytest.mark.parametrize(
    ("folders", "message", "flag"),
    [
        (["seg_train/a", "seg_train/b", "seg_test/a", "seg_test/b"], "look like splits", "--no-splits"),
        (["train/a", "train/b", "val/a", "extra/a", "extra/b"], "beside them extra", "--leave-out extra"),
        (["train", "boat", "car"], "beside them boat", "--no-splits"),
        (["cat", "dog", "test"], "called like a split", "--no-splits"),
        (["train/a", "training/b"], "train and training, which all mean split train", "--leave-out training"),
        (["train/a", "val/a", "dev/a"], "which all mean split val", "--no-splits"),
        (["photos/train/a", "photos/val/a"], "which look like splits", "--no-splits --classes-as-named"),
        (["photos/a", "photos/b"], "which look like class folders", "--classes-as-named"),
        (["pets/cat", "pets/dog", "wild/fox"], "if these are the classes, move them up", "--classes-as-named"),
        (["Cat", "cat"], "differ only in case", "--classes-as-named"),
        (["train/a", "train/b", "val"], "not sorted into class folders", "--leave-out val"),
        (["train/a", "test"], "not sorted into class folders", "--leave-out test"),
    ],
)
def test_a_guess_is_asked_back_and_the_flag_that_is_named_answers(
    tmp_path: Path, pack: Any, folders: list[str], message: str, flag: str
) -> None:
    source = fill(tmp_path / "source", *folders)
    code, printed = pack(source)
    assert code == 1, printed
    assert message in printed
    assert flag.split()[-1] in printed
    assert len(printed.splitlines()) == 1
    code, printed = pack(source, *flag.split())
    assert code == 0, printed
    answers = {"--no-splits": len({folder.split("/")[0] for folder in folders})}
    assert len(load_index(pack.folder).classes) == answers.get(flag, len(load_index(pack.folder).classes))


def test_a_class_of_val_that_train_spells_otherwise(tmp_path: Path, pack: Any) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    source = fill(tmp_path / "source", f"train/{composed}", "train/Dog", f"val/{decomposed}")
    code, printed = pack(source)
    assert (code, counts(pack)) == (0, {"train": 4, "val": 2}), printed
    assert "compose accents otherwise" in printed
    fill(source, "val/dog")
    code, printed = pack(source)
    assert (code, "dog (train has Dog)" in printed) == (1, True)
    shutil.rmtree(source / "val")
    fill(source, f"train/{decomposed}")
    code, printed = pack(source)
    assert (code, "composition of accents" in printed) == (1, True)


def test_images_are_known_by_their_content_and_the_account_adds_up(tmp_path: Path, pack: Any) -> None:
    source = fill(tmp_path / "source", "train/a", "train/b", "val/a")
    folder = source / "train" / "a"
    for number, name in enumerate(("x.jfif", "plain", "UPPER.JPG", "wrong.dat", "photo.heic")):
        picture(folder / name, 100 + number)
    picture(folder / "bitmap.bmp", 120, "bmp")
    (folder / "notes.txt").write_text("BM and RIFF are no magic words")
    (folder / "real.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    (folder / "void").write_bytes(b"")
    (folder / "bad.jpg").write_text("hello")
    (folder / "lost").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.jpg")
    picture(source / "train" / "loose.jpg")
    picture(source / "beside.jpg")
    code, printed = pack(source, "--max-bad", "1", "--json")
    assert code == 0
    told = json.loads(printed)
    account = told["account"]
    assert counts(pack) == {"train": 10, "val": 2}
    assert {name: account[name] for name in ("found", "packed", "converted", "bad", "ignored")} == {
        "found": 20,
        "packed": 11,
        "converted": 1,
        "bad": 1,
        "ignored": 7,
    }
    for row in account["files"]:
        assert row["found"] == row["packed"] + row["converted"] + row["bad"] + row["ignored"]
    reasons = {row["example"]: row["reason"] for row in account["left_out"]}
    assert reasons["train/a/notes.txt"] == "not an image"
    assert "(HEIC)" in reasons["train/a/real.heic"]
    assert reasons["train/a/lost"] == "link that leads nowhere"
    assert reasons["train/a/pipe.jpg"] == "no regular file"
    assert reasons["train/loose.jpg"] == reasons["beside.jpg"] == "image in no class folder"
    code, printed = pack(source, "--max-bad", "1")
    assert "20 files found = 11 packed as they are + 1 converted + 1 bad + 7 other files ignored" in printed
    assert "1 .txt: not an image, for example train/a/notes.txt" in printed
    assert "note: 1 images of split train lie in no class folder" in printed


def test_links_are_followed_without_endless_loops(tmp_path: Path, pack: Any) -> None:
    source = fill(tmp_path / "source", "a", "b")
    fill(tmp_path / "elsewhere", "deep/er")
    (source / "a" / "batch2").symlink_to(tmp_path / "elsewhere")
    (source / "a" / "up").symlink_to("..")
    (source / "b" / "self").symlink_to(source / "b")
    (tmp_path / "elsewhere" / "zagain").symlink_to(tmp_path / "elsewhere" / "deep")
    code, printed = pack(source)
    assert (code, counts(pack)) == (0, {"train": 6}), printed
    assert "3 (none): link to a folder that is read already" in printed
    assert "2 images lie in folders inside of class folders and are of that class: a/batch2" in printed


def test_a_folder_that_cannot_be_listed_is_told(tmp_path: Path, pack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = fill(tmp_path / "source", "a", "b", "a/locked")
    real = os.scandir

    def scandir(path: Any) -> Any:  # root may list everything
        if not isinstance(path, int) and Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    code, printed = pack(source)
    assert (code, "a/locked: Permission denied" in printed) == (1, True), printed
    code, printed = pack(source, "--leave-out", "a/locked")
    assert (code, counts(pack)) == (0, {"train": 4})


def test_copies_that_tools_make_are_left_out_and_told(tmp_path: Path, pack: Any) -> None:
    source = fill(tmp_path / "source", "train/a", "train/b")
    whole = (source / "train/a/1.jpg").read_bytes()
    copies = (
        *(".ipynb_checkpoints/1-checkpoint.jpg", "@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg", "__MACOSX/._1.jpg", "Thumbs.db"),
        *("1 (1).jpg", "1 copy.jpg", "1 - Copy.jpg", "Copy of 1.jpg", "1.jpg~", ".1.jpg", "1.jpg.part"),
    )
    for copy in copies:
        path = source / "train" / "a" / copy
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(whole)
    picture(source / "train" / "a" / "2 (1).jpg", 200)  # is called a copy, and is none
    for folder in ("__MACOSX/train/a", ".git/objects", ".Trash-1000/files"):
        (source / folder).mkdir(parents=True)
        (source / folder / "x.jpg").write_bytes(whole)
    code, printed = pack(source, "--json")
    assert code == 0, printed
    told = json.loads(printed)
    assert (told["classes"], counts(pack)) == (["a", "b"], {"train": 5})
    assert (told["account"]["found"], told["ignored"]) == (5 + len(copies) + 3, len(copies) + 3)
    reasons = {row["reason"] for row in told["account"]["left_out"]}
    assert {"left by a tool (.ipynb_checkpoints)", "backup copy", "hidden"} <= reasons


def test_empty_classes_are_told(tmp_path: Path, pack: Any) -> None:
    source = fill(tmp_path / "source", "train/a", "train/b", "val/a")
    (source / "val" / "b").mkdir()
    assert "split val has no image of 1 of 2 classes: b" in pack(source)[1]
    for name in ("1.jpg", "2.jpg"):
        (source / "train" / "b" / name).write_text("no image")
    code, printed = pack(source, "--max-bad", "2")
    assert (code, "1 of 2 classes have no readable training image left: b" in printed) == (1, True)


def test_a_path_to_leave_out_that_is_not_there(tmp_path: Path, pack: Any) -> None:
    code, printed = pack(fill(tmp_path / "source", "a", "b"), "--leave-out", "c")
    assert (code, "--leave-out c: there is no such file or folder" in printed) == (1, True)
