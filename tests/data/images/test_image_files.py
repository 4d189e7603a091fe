import io
import os
from pathlib import Path

import pytest
from PIL import Image

from adaptive.data.images import image_files
from adaptive.data.images.image_files import find_images
from adaptive.errors import DataError


def picture(kind: str = "png") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (5, 4), "red").save(stream, kind)
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.png", "a.jpg", "deep/er/c.webp", ".hidden.png", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture() if path.suffix != ".txt" else b"text")
    return tmp_path


def names(found: list[str], stdin: bytes = b"") -> list[str]:
    return [image.name for image in find_images(found, io.BytesIO(stdin))]


def test_folders_patterns_and_files_in_the_order_given(folder: Path) -> None:
    inside = [str(folder / name) for name in ("a.jpg", "b.png", "deep/er/c.webp")]
    assert names([str(folder)]) == inside
    assert names([str(folder / "*.png")]) == inside[1:2]
    assert sorted(names([str(folder / "**" / "*")])) == inside
    assert names([inside[2], str(folder / "notes.txt"), inside[0]]) == [inside[2], str(folder / "notes.txt"), inside[0]]


def test_a_file_with_the_name_of_a_pattern_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "[1].png").write_bytes(picture())
    assert names([str(tmp_path / "[1].png")]) == [str(tmp_path / "[1].png")]


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp", "webp", "tiff", "ppm"])
def test_stdin_holds_an_image(kind: str) -> None:
    [found] = find_images(["-"], io.BytesIO(picture(kind)))
    assert found.name == "stdin"
    assert found.open().size == (5, 4)


def test_stdin_holds_names(folder: Path) -> None:
    lines = f"{folder / 'b.png'}\r\n\n  {folder / 'a.jpg'}\n".encode()
    assert names(["-"], lines) == [str(folder / "b.png"), str(folder / "a.jpg")]


@pytest.mark.parametrize("name", ["BMW_1.png", "RIFF 2.png", "GIF89a.png", "P5 12 34.png", "II*.png", "bad\udce9.png"])
def test_a_list_is_one_however_its_first_name_begins(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    Path(name).write_bytes(picture())
    assert names(["-"], os.fsencode(f"{name}\na.jpg\n")) == [name, "a.jpg"]
    if "P5" not in name:  # which may also be an image as text
        Path(name).unlink()
        with pytest.raises(DataError, match=r"does not exist|matches no image|neither an image nor names"):
            names(["-"], os.fsencode(f"{name}\na.jpg\n"))


@pytest.mark.parametrize("line", ["x" * 300, "deep/" * 2000, "x" * 10_000_000, "x\x85y", "*" * 300])
def test_a_line_that_no_file_can_be_called_is_one_short_message(line: str) -> None:
    for words, stdin in ([["-"], f"{line}\n".encode()], [[line], b""]):
        with pytest.raises(DataError, match=r"does not exist|matches no image") as caught:
            find_images(words, io.BytesIO(stdin))
        assert len(str(caught.value)) < 800


class Endless(io.RawIOBase):
    """Standard input that goes on for ever; it counts what was read."""

    def __init__(self, line: bytes) -> None:
        self.line, self.count = line, 0

    def read(self, size: int = -1) -> bytes:
        assert 0 <= size < 2 << 30, "all of it"
        self.count += size
        return (self.line * (size // len(self.line) + 1))[:size]


@pytest.mark.parametrize(
    ("start", "message"), [(b"a.jpg\n", "bytes of names"), (picture("bmp"), "an image of more than")]
)
def test_an_endless_stdin_is_not_read_to_its_end(
    start: bytes, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(image_files, "LONGEST_LIST", 1 << 20)
    monkeypatch.setattr(image_files, "LARGEST_IMAGE", 1 << 22)
    endless = Endless(start)
    with pytest.raises(DataError, match=message):
        find_images(["-"], endless)  # type: ignore[arg-type]
    assert endless.count <= (1 << 22) + 2


@pytest.mark.parametrize(
    ("words", "stdin", "message"),
    [
        (["nothing.png"], b"", "nothing.png does not exist"),
        (["*.nothing"], b"", "matches no image"),
        (["-"], b" \n", "stdin (-) is empty"),
        (["-"], b"\xfa\xfb\xfc", "neither an image nor names"),
        (["-"], b"nothing.png\n", "nothing.png does not exist"),
    ],
)
def test_what_leads_nowhere_is_named(words: list[str], stdin: bytes, message: str) -> None:
    with pytest.raises(DataError) as caught:
        find_images(words, io.BytesIO(stdin))
    assert message in str(caught.value)


def test_empty_folders_and_files_that_are_no_image(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no images"):
        find_images([str(tmp_path)], io.BytesIO())
    (tmp_path / "text.png").write_text("text")
    [found] = find_images([str(tmp_path)], io.BytesIO())
    with pytest.raises(DataError, match=r"text.png: not an image"):
        found.open()
    (tmp_path / "text.png").unlink()
    with pytest.raises(DataError, match=r"text.png: No such file"):
        found.open()


def test_content_decides_in_a_folder_and_what_is_skipped_is_told(folder: Path) -> None:
    for name in ("deep/d.jfif", "e", "f.dat", "__MACOSX/g.png", "notes (1).txt", "b copy.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(picture() if "notes" not in name else b"BM")
    (folder / "deep" / "up").symlink_to("..")
    (folder / "linked").symlink_to(folder.parent / "elsewhere")
    (folder.parent / "elsewhere").mkdir()
    (folder.parent / "elsewhere" / "h.png").write_bytes(picture())
    inside = ["a.jpg", "b.png", "e", "f.dat", "deep/d.jfif", "deep/er/c.webp", "linked/h.png"]
    assert names([str(folder)]) == [str(folder / name) for name in inside]
    skipped = image_files.Skipped()
    find_images([str(folder)], io.BytesIO(), skipped)
    told = "\n".join(skipped.files.lines(10))
    assert f"2 .txt: not an image, for example {folder}/notes (1).txt" in told
    for part in (
        "left by a tool (__MACOSX)",
        "hidden",
        "link to a folder that is read already",
        "copy of a file beside",
    ):
        assert part in told
    assert skipped.files.total == 6
