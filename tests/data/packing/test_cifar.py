"""Archives of the layout of CIFAR's binary versions, with a few records each."""

import io

import numpy as np
import pytest
from PIL import Image

from adaptive.data.packing.recognise import open_source
from adaptive.errors import DataError
from tests.data.conftest import content, report
from tests.data.packing.test_archives import tar_of
from tests.data.packing.test_pack import samples

NAMES_10 = ("airplane", "automobile", "bird")
NAMES_100 = ("apple", "aquarium_fish", "baby", "bear")


def records(generator, labels, coarse=False):
    """Return records of random pixels: red, green and blue planes behind the label, as CIFAR stores them."""
    pixels = generator.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
    columns = [np.zeros((len(labels), 1), np.uint8)] if coarse else []
    return np.hstack([*columns, np.array(labels, np.uint8)[:, None], pixels])


def cifar10(generator):
    files = {f"data_batch_{n}.bin": records(generator, [n % 3, 2, 0, 1]) for n in range(1, 6)}
    return files | {"test_batch.bin": records(generator, [2, 1, 0])}


def cifar100(generator):
    labels = [3, 0, 1, 2, 0, 0]
    return {"train.bin": records(generator, labels, True), "test.bin": records(generator, [0, 3], True)}


def write(folder, files, names, inside):
    meta = {10: "batches.meta.txt", 100: "fine_label_names.txt"}[inside]
    top = {10: "cifar-10-batches-bin", 100: "cifar-100-binary"}[inside]
    data = {f"{top}/{meta}": ("\n".join(names) + "\n\n").encode()}
    data |= {
        f"{top}/{name}": array.tobytes() if isinstance(array, np.ndarray) else array for name, array in files.items()
    }
    path = folder / f"cifar-{inside}-binary.tar.gz"
    path.write_bytes(tar_of(data, "w:gz"))
    return path


@pytest.mark.parametrize(("kind", "names", "make"), [(10, NAMES_10, cifar10), (100, NAMES_100, cifar100)])
def test_pixels_and_labels_arrive_unchanged(tmp_path, kind, names, make):
    files = make(np.random.default_rng(0))
    path = write(tmp_path, files, names, kind)
    result = report(path, tmp_path / "packed")
    assert result.index.classes == list(names)
    assert (result.converted, result.bad, result.notes) == (0, [], [])
    expected = {}
    for file, array in files.items():
        for number, record in enumerate(array):
            label = int(record[-3073])
            split = "test" if file.startswith("test") else "train"
            name = f"{split}/{names[label]}/{file.removesuffix('.bin')}_{number:05d}.png"
            expected[name] = (label, record[-3072:].reshape(3, 32, 32))
    found = samples(tmp_path / "packed") | samples(tmp_path / "packed", "test")
    assert set(found) == set(expected)
    for name, (_, extension, data, label, _) in found.items():
        assert (extension, label) == ("png", expected[name][0])
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))).transpose(2, 0, 1), expected[name][1])


def test_images_are_held_out_by_the_flag_alone(tmp_path):
    path = write(tmp_path, cifar10(np.random.default_rng(0)), NAMES_10, 10)
    one = report(path, tmp_path / "one", hold_out=5)
    report(path, tmp_path / "two", hold_out=5)
    assert {name: split.count for name, split in one.index.splits.items()} == {"train": 15, "val": 5, "test": 3}
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert set(report(path, tmp_path / "none").index.splits) == {"train", "test"}


def test_archives_that_are_not_taken(tmp_path):
    files = cifar10(np.random.default_rng(0))
    python = tmp_path / "cifar-10-python.tar.gz"
    python.write_bytes(tar_of({"cifar-10-batches-py/data_batch_1": b"\x80\x04."}, "w:gz"))
    with pytest.raises(DataError, match=r"pickles .* can run code; take the binary version, cifar-10-binary\.tar\.gz"):
        open_source(python)
    other = tmp_path / "photos.tar.gz"
    other.write_bytes(tar_of({"photos/a.jpg": b"x"}, "w:gz"))
    with pytest.raises(DataError, match=r"neither CIFAR-10 nor CIFAR-100 in binary"):
        open_source(other)
    (tmp_path / "tiny.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match="is a zip file; unpack it"):
        open_source(tmp_path / "tiny.zip")
    for change, message in [
        ({"data_batch_3.bin": None}, r"lacks data_batch_3\.bin of CIFAR-10"),
        ({"data_batch_3.bin": files["data_batch_3.bin"].tobytes()[:-1]}, r"12291 bytes, no multiple of 3073"),
        ({"test_batch.bin": records(np.random.default_rng(0), [0, 3])}, r"record 1 has label 3, .* names 3 classes"),
        ({"test_batch.bin": b""}, r"split test .* holds no images"),
    ]:
        changed = {name: data for name, data in (files | change).items() if data is not None}
        with pytest.raises(DataError, match=message):
            open_source(write(tmp_path, changed, NAMES_10, 10))


def test_a_download_that_is_no_archive_is_one_line(tmp_path):
    path = tmp_path / "cifar-10-binary.tar.gz"
    path.write_bytes(b"x")
    with pytest.raises(DataError, match="download it again") as caught:
        open_source(path)
    assert "\n" not in str(caught.value)
