"""Every command with names that are markup, escape sequences or commands, and with a location that holds secrets."""

import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
import xml.dom.minidom
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest

from adaptive.commands.main import COMMANDS, main
from adaptive.data.shards.index import load_index, write_index
from tests.helpers.commands import Ended, Forks
from tests.helpers.hostile import CLASSES, FOLDER, HEADER, IMAGES, OWNED, SECRETS, harmless, leaks, with_secrets
from tests.helpers.shard_server import serve

pytestmark = pytest.mark.end_to_end

QUICK = ["--device", "cpu", "--workers", "0"]


@dataclass
class Place:
    """A dataset with hostile class names behind a URL with secrets, and a run that was trained on it."""

    root: Path
    url: str
    data: Path
    config: Path
    trained: Ended
    capfd: pytest.CaptureFixture[str] | None = None

    @property
    def run(self) -> Path:
        return self.root / FOLDER

    def call(self, *words: str | Path) -> Ended:
        """Call a command here and look at all that it prints."""
        assert self.capfd is not None
        self.capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        found = Ended(ended.value.code or 0, *self.capfd.readouterr())
        self.look_at(found, str(words))
        return found

    def look_at(self, ended: Ended, what: str) -> None:
        for text in (ended.out, ended.err):
            assert not [secret for secret in SECRETS if secret in text], (what, text)
            assert harmless(text), (what, text)
            assert "Traceback" not in text, (what, text)
        if ended.code and ended.err:
            assert ended.err.splitlines()[-1].startswith("adaptive "), (what, ended.err)
        assert not list(self.root.rglob(OWNED)), what


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, digits: Path, config_file: Path, forks: Forks) -> Iterator[Place]:
    """Trained with W&B offline, under a plain name, which YAML and command lines demand."""
    root = tmp_path_factory.mktemp("hostile")
    shutil.copytree(digits, root / "data", copy_function=os.link)
    (root / "data" / "index.json").unlink()
    write_index(root / "data", CLASSES, load_index(digits).splits)
    with serve(root / "data") as server:
        url = with_secrets(server.url)
        words = [f"data.path={url}", f"data.cache={root / 'cache'}", f"train.run_folder={root / 'run'}"]
        fork = forks.start(["train", str(config_file), *words, "tracking.wandb=offline"], cwd=root)
        yield Place(root, url, root / "data", config_file, fork.wait())


@pytest.fixture
def place(trained: Place, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Place:
    """The same, under the hostile name."""
    monkeypatch.chdir(trained.root)
    monkeypatch.setenv("XDG_CACHE_HOME", str(trained.root / "own-cache"))
    trained.capfd = capfd
    if not trained.run.exists():
        (trained.root / "run").rename(trained.run)
        assert trained.call("calibrate", trained.run, "--budget", "0.5", *QUICK).code == 0
    return trained


def test_training_keeps_secrets_to_itself(trained: Place) -> None:
    assert trained.trained.code == 0, trained.trained
    trained.look_at(trained.trained, "train")
    assert leaks([trained.root]) == []


def test_the_secret_is_kept_where_its_owner_alone_reads_it(place: Place) -> None:
    """config.yaml is for everybody, and the run can still be measured by its owner without giving the secret again."""
    assert "://***@127.0.0.1" in (place.run / "config.yaml").read_text()
    private = place.run / "config.private.yaml"
    assert place.url in private.read_text()
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    words = ["calibrate", place.run, "--budget", "0.5", *QUICK]  # the fixture did it with the secret that is kept
    private.rename(place.root / "aside")
    try:
        line = place.call(*words).error_line("calibrate")
        assert "--data" in line
        assert "config.private.yaml" in line
        assert place.call(*words, "--data", place.url).code == 0
    finally:
        (place.root / "aside").rename(private)


def test_the_report_shows_names_as_they_are(place: Place) -> None:
    ended = place.call("report", place.run, "--wall", "2", *QUICK)
    assert ended.code == 0, ended
    page = (place.run / "report.html").read_text(encoding="utf-8")
    assert leaks([place.run]) == []
    assert "<script>alert" not in page
    assert harmless(page.replace("\t", ""))
    tags = Tags(page)
    assert tags.scripts == 2
    assert all(xml.dom.minidom.parseString(svg) for svg in tags.drawings(page))
    data = json.loads(page.split('id="report-data">')[1].split("</script>")[0])
    assert [one["class"] for one in data["runs"][0]["policy"]["classes"]][:4] == CLASSES[:4]
    assert data["runs"][0]["dataset"] == "data"
    for shown in ("[red]x[/]", "$x^", "\\x1b[31mred\\x07", "line\\nbreak\\r", "\\u202egnp.exe"):
        assert shown in page, shown


class Tags(HTMLParser):
    """Counts a page's scripts and refuses handlers of events."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.scripts = 0
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        assert not [name for name, _ in attrs if name.startswith("on")], attrs

    def drawings(self, page: str) -> list[str]:
        return [f"<svg{part.split('</svg>')[0]}</svg>" for part in page.split("<svg")[1:]]


@pytest.fixture
def images(place: Place) -> list[Path]:
    from PIL import Image

    folder = place.root / "images" / "[a] $(touch OWNED)"
    folder.mkdir(parents=True, exist_ok=True)
    for name in IMAGES:
        Image.new("RGB", (32, 32)).save(folder / name, format="png")
    (folder / "bad\x1b[31m\u202e.png").write_bytes(b"no image")
    return sorted(folder.iterdir())


def test_predict_shows_names_as_they_are(place: Place, images: list[Path]) -> None:
    ended = place.call("predict", place.run, "--device", "cpu", "--top", "10", *images)
    assert ended.code == 1
    for shown in ("[a].png", "$x^ <b>.png", "esc\\x1b[2J\\u202e.png", "line\\nbreak.png", "\\udcff.png", "[red]x[/]"):
        assert shown in ended.out, ended.out
    assert len(ended.err.splitlines()) == 1
    ended = place.call("predict", place.run, "--device", "cpu", "--json", *images)
    answered = {json.loads(line)["image"] for line in ended.out.splitlines()}
    assert answered == {str(path) for path in images if "bad" not in path.name}


def commands_in(text: str) -> list[str]:
    """Return the commands that a user would paste from what was printed."""
    starts = [text[i:].splitlines()[0] for i in range(len(text)) if text.startswith("adaptive ", i)]
    return [start for start in starts if start.split()[1] in COMMANDS and "CONFIG" not in start]


@pytest.mark.full
def test_what_is_to_be_pasted_is_quoted(place: Place, images: list[Path]) -> None:
    printed = place.call("calibrate", place.run, "--budget", "0.5", *QUICK).out
    printed += place.call("predict", place.run, "--device", "cpu", "--policy", "none", images[0]).out
    (place.run / "policy.json").rename(place.root / "policy")
    try:
        printed += place.call("predict", place.run, "--device", "cpu", images[0]).err
        printed += place.call("bench", "inference", place.run, "--device", "cpu").err
        printed += place.call("report", place.run, "--wall", "0", *QUICK).out
        page = (place.run / "report.html").read_text(encoding="utf-8")
    finally:
        (place.root / "policy").rename(place.run / "policy.json")
    assert "adaptive calibrate &#39;" in page or "adaptive calibrate $&#39;" in page
    found = commands_in(printed)
    assert len(found) >= 4
    for line in found:
        line = line.partition(" IMAGE")[0]
        shown = "import os, sys; print(os.fsencode(sys.argv[2]).hex())"
        words = line.replace("adaptive ", f"{shlex.quote(sys.executable)} -c {shlex.quote(shown)} ", 1)
        ended = subprocess.run(["bash", "-c", words], capture_output=True, text=True, cwd=place.root, check=True)
        assert bytes.fromhex(ended.stdout.strip()) == os.fsencode(place.run), line
    assert not list(place.root.rglob(OWNED))


def walk(place: Place, images: list[Path]) -> dict[str, list[list[str | Path]]]:
    """Words for every command, with hostile names or a location with secrets wherever it takes one."""
    run, url, odd, config = place.run, place.url, place.root / "images", place.config
    nowhere = url.replace("/data?", "/nothing?")
    pipe = f"pipe:curl -H 'Authorization: Bearer {HEADER}' http://127.0.0.1:1/{{}}"
    there = f"train.run_folder={place.root / 'other'}"
    return {
        "pack": [
            [odd, place.root / "packed", "--max-bad", "1", "--workers", "1"],
            [odd, place.root / "[b] <b> $(touch OWNED)\x1b\n", "--max-bad", "1", "--workers", "1"],
            ["--verify", url, "--workers", "1"],
            ["--verify", url, "--workers", "1", "--json"],
            ["--verify", nowhere],
            ["--verify", pipe],
            ["--index", odd / "[a] $(touch OWNED)"],
            [url, place.root / "elsewhere"],
        ],
        "train": [
            [config, f"data.path={nowhere}", there],
            [config, f"data.path={pipe}", there],
            [config, f"data.path={url}", "data.val_split=[red]x[/]\x1b", there],
            [config, f"data.path={url}", f"train.run_folder={run}"],
            [config, f"data.path={url}", "--print-config"],
            [config, f"data.path={pipe}", "--print-config"],
            [config, f"{url}"],
            [config, f"data.cache={url}", "data.attempts=x", f"data.path={url}"],
            [odd / images[0].name],
        ],
        "evaluate": [
            [run, "--no-timing", *QUICK],
            [run, "--json", "--no-timing", *QUICK],
            [run, "--split", "[red]x[/]\x1b[31m"],
            [run, "--data", nowhere],
            [run, "--data", pipe],
            [run, "--data", pipe, "data.pipe=true", "data.attempts=1"],
            [run, "--checkpoint", "[a]\x1b"],
            [odd],
        ],
        "calibrate": [
            [run, "--budget", "0.5", "--out", odd / "[p]\x1b.json", *QUICK],
            [run, "--budget", "0.5", "--data", nowhere],
            [run, "--max-loss", "1", "--json", *QUICK],
            [run, "--budget", "[red]\x1b"],
        ],
        "predict": [[run, *images, "--device", "cpu"], [odd, *images], [run, odd / "none [a]\x1b"]],
        "policy": [
            ["check", run, "--seen", odd / "[s]\x1b.json"],
            ["check", odd, "--seen", odd / "[s]\x1b.json", "--json"],
            ["check", run, "--seen", run / "config.yaml"],
        ],
        "report": [
            [run, "--wall", "0", *QUICK],
            [run, "--wall", "0", "--json", *QUICK],
            [run, "--data", nowhere],
            [run, "--published", "[red]\x1b"],
        ],
        "dashboard": [["--dry-run"], ["--sync", run], ["--sync", odd], ["--project", "[red]/\x1b"]],
        "export": [[run, run], [run, place.root / "export [e]\x1b", "--formats", "[red]\x1b"]],
        "checkpoint": [
            [run],
            [run, "--json"],
            [run, "--export", place.root / "-[w] $(touch OWNED)\x1b"],
            [run, "--export-all", place.root / "all.safetensors", "--which", "[a]\x1b"],
            [odd],
        ],
        "submit": [
            [config, f"data.path={url}", there, "--cpu", "--dry-run", "--name", "[red]x[/] $(touch OWNED)"],
            [config, f"data.path={url}", there, "--cpu", "--evaluate"],
            [config, f"data.path={url}", f"train.run_folder={run}", "--cpu", "--dry-run"],
            [config, f"data.path={nowhere}", there, "--cpu", "--dry-run"],
        ],
        "models": [["[red]x[/]\x1b"], ["test_resnet", "--exits", "[red]x[/]\x1b"]],
        "plan": [
            [config, f"data.path={url}", there],
            [config, f"data.path={nowhere}", there],
            [config, f"data.path={url}", there, "--gpus-per-node", "8", "--json"],
        ],
        "bench": [
            ["inference", run, "--batch", "1", "--rounds", "1", "--device", "cpu"],
            ["inference", run, "--batch", "1", "--rounds", "1", "--device", "cpu", "--json"],
            ["inference", run, "--data", nowhere],
        ],
        "doctor": [
            ["--only", "shards", "--data", url],
            ["--only", "shards", "--data", nowhere, "--json"],
            ["--only", "shards,reading", "--data", pipe],
            ["--only", "[red]\x1b"],
        ],
    }


CORE = ("predict", "checkpoint", "dashboard")  # the walk's quick ones, whose ways of printing the others share


def accept_jobs(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put an sbatch first on the PATH that takes any job."""
    bin_folder = place.root / "bin"
    bin_folder.mkdir(exist_ok=True)
    (bin_folder / "sbatch").write_text("#!/bin/sh\necho 42\n")
    (bin_folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    "command", [name if name in CORE else pytest.param(name, marks=pytest.mark.full) for name in COMMANDS]
)
def test_every_command(
    command: str, place: Place, images: list[Path], monkeypatch: pytest.MonkeyPatch, forks: Forks
) -> None:
    """Nothing that it prints or writes holds a secret or does anything; it works, or ends in one line."""
    accept_jobs(place, monkeypatch)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(place.root / "no-netrc"))
    for words in walk(place, images)[command]:
        if command == "train" and "--print-config" not in words:
            ended = forks.start([command, *map(str, words)], cwd=place.root).wait()
            place.look_at(ended, str(words))
        else:
            place.call(command, *words)
    assert leaks([place.root]) == []


def test_the_walk_knows_every_command(place: Place, images: list[Path]) -> None:
    assert set(walk(place, images)) == set(COMMANDS)


@pytest.mark.full
def test_an_export_with_hostile_names(place: Place, images: list[Path]) -> None:
    folder = place.root / "export [e] $(touch OWNED)\x1b"
    assert place.call("export", place.run, folder, "--formats", "onnx").code == 0
    assert place.call("predict", folder, *images).code == 1
    for path in folder.iterdir():
        assert str(Path(__file__).parents[2]).encode() not in path.read_bytes(), path
        assert str(place.root).encode() not in path.read_bytes(), path
    assert leaks([folder]) == []


@pytest.mark.full
def test_the_configuration_of_a_job_is_its_owners_alone(
    place: Place, monkeypatch: pytest.MonkeyPatch, forks: Forks
) -> None:
    """What is submitted keeps the secret, which the job needs; nobody else reads it."""
    from adaptive.config.loading import load_config

    accept_jobs(place, monkeypatch)
    folder = place.root / "job"
    words = [f"data.path={place.url}", f"train.run_folder={folder}", "--cpu", "--seeds", "0-1"]
    ended = place.call("submit", place.config, *words)
    assert ended.code == 0, ended
    assert leaks([folder]) == []
    for name in ("config-0.yaml", "config-1.yaml"):
        assert load_config(folder / "submitted" / name).data.path == place.url
