"""What errors say of where they happened, and of what the operating system refuses."""

import errno
import socket
from pathlib import Path

import pytest

from adaptive.errors import DataError, refusal, told_refusals


def test_a_rank_s_error_names_its_node() -> None:
    node = socket.gethostname().partition(".")[0]
    assert DataError("no index").told("train", rank=3) == f"adaptive train: error (rank 3 on {node}): no index"
    assert DataError("no index").told("train") == "adaptive train: error: no index"


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EROFS, "choose another place"),
        (errno.EMFILE, "ulimit -n 65536"),
        (errno.EACCES, "; "),
    ],
)
def test_a_refusal_of_the_operating_system_names_the_file_and_the_remedy(number: int, remedy: str) -> None:
    with pytest.raises(DataError) as told, told_refusals(DataError):
        raise OSError(number, "refused", "/data/x")
    assert str(told.value).startswith("/data/x: refused")
    assert remedy in str(told.value)


def test_a_colleague_s_lock_is_a_refusal(tmp_path: Path) -> None:
    error = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / ".lock"))
    assert str(refusal(error)).startswith(f"{tmp_path / '.lock'}: Permission denied; allow it: chmod -R u+rwX ")
    assert refusal(OSError(errno.ENOENT, "No such file or directory", "x")) is None


def test_a_name_that_is_too_long_is_cut() -> None:
    error = OSError(errno.ENAMETOOLONG, "File name too long", "x" * 5000)
    assert str(refusal(error)) == f"{'x' * 100}...: File name too long; check the path"
