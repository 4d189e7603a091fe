"""S3 and GCS: the real clients against servers that speak their protocols."""

import os
from pathlib import Path

import pytest
import torch

from adaptive.config.sections import DataConfig
from adaptive.data.reading.stream import EvaluationStream, LoaderOptions
from adaptive.data.remote import transfer
from adaptive.data.shards.index import check_shards, load_index
from adaptive.errors import DataError

boto3 = pytest.importorskip("boto3")
moto = pytest.importorskip("moto.server")
gcs = pytest.importorskip("gcp_storage_emulator.server")
requests = pytest.importorskip("requests")

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(scope="module")
def s3(digits: Path):
    """The digits in a bucket."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "y"), ("DEFAULT_REGION", "us-east-1")):
            patch.setenv(f"AWS_{name}", value)
        server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        for path in digits.iterdir():
            client.upload_file(str(path), "bucket", f"sets/digits/{path.name}")
        yield "s3://bucket/sets/digits"
        server.stop()


@pytest.fixture(scope="module")
def gs(digits: Path, tmp_path_factory: pytest.TempPathFactory):
    """The digits in a bucket of the other kind."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("gcs"))  # the emulator keeps its files in the working folder
    server = gcs.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    url = f"http://127.0.0.1:{server._api._httpd.server_address[1]}"
    for path in digits.iterdir():
        words = {"uploadType": "media", "name": f"sets/digits/{path.name}"}
        requests.post(f"{url}/upload/storage/v1/b/bucket/o", params=words, data=path.read_bytes()).raise_for_status()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        yield "gs://bucket/sets/digits"
    server.stop()
    os.chdir(before)


@pytest.mark.parametrize("store", ["s3", "gs"])
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_those_of_the_folder(store, workers, digits, tmp_path, request, monkeypatch):
    monkeypatch.setattr(transfer, "FIRST_PAUSE", 0.01)
    url = request.getfixturevalue(store)
    data = DataConfig(path=url, cache=str(tmp_path / "cache"), image_size=8, shuffle_window=2, attempts=2, timeout=10)
    index = load_index(url, data)
    assert index == load_index(digits)
    check_shards(index, url, "val", settings=data)

    def batches(where):
        there = data.model_copy(update={"path": str(where)})
        return list(EvaluationStream(index, there, "val", LoaderOptions(workers=workers), batch=50))

    for one, other in zip(batches(url), batches(digits), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    with pytest.raises(DataError, match=rf"{url}/none/index\.json does not exist"):
        load_index(f"{url}/none", data)
    bucket = f"{store}://no-such-bucket/x"
    with pytest.raises(DataError, match=rf"{bucket}/index\.json does not exist"):
        load_index(bucket, data)


def test_without_credentials_it_is_not_tried_again(s3, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    with pytest.raises(DataError, match=r"Unable to locate credentials; 1 attempt in \d+ s\); check the URL and"):
        load_index(s3, DataConfig(path=s3))
