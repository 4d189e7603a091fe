"""The commands on a dataset at a URL."""

import json
from pathlib import Path

import pytest

from tests.helpers.commands import Forks
from tests.helpers.shard_server import serve

pytestmark = pytest.mark.end_to_end


def test_every_command_takes_a_url(config_file: Path, digits: Path, tmp_path: Path, forks: Forks) -> None:
    run, words = tmp_path / "run", ["--device", "cpu", "--workers", "0"]
    with serve(digits) as server:
        cached = [f"data.path={server.url}", f"data.cache={tmp_path / 'cache'}", "data.shuffle_window=2"]
        ended = forks.run(["train", str(config_file), f"train.run_folder={run}", *cached])
        assert ended.code == 0, ended
        assert ended.err.count("bad data") == 0
        # The run's own data.cache does not count, for the run may be anybody's.
        words += [f"data.cache={tmp_path / 'cache'}"]
        ended = forks.run(["evaluate", str(run), "--json", "--no-timing", *words])
        assert ended.code == 0, ended
        assert json.loads(ended.out)["images"] == 300
        ended = forks.run(["calibrate", str(run), "--budget", "0.5", "--data", server.url, *words])
        assert ended.code == 0, ended
        ended = forks.run(["report", str(run), "--wall", "2", "--data", server.url, *words])
        assert ended.code == 0, ended
        assert (run / "report.html").is_file()
        bench = ["bench", "inference", str(run), "--batch", "2", "--rounds", "1", "--data", server.url]
        ended = forks.run([*bench, "--device", "cpu", words[-1]])
        assert ended.code == 0, ended
        assert {count for name, count in server.gets().items() if name.endswith(".tar")} == {1}
        line = forks.run(["evaluate", str(run), "--data", f"{server.url}/nothing"]).error_line("evaluate")
        assert f"{server.url}/nothing/index.json does not exist; check" in line
        line = forks.run(["evaluate", str(run), "--data", f"pipe:cat {digits}/{{}}"]).error_line("evaluate")
        assert "data.pipe=true" in line
