import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest

from adaptive.distributed import control_group
from adaptive.distributed.network_interface import interfaces
from adaptive.doctor.checks import dataset, disk, gpu, machine, network, slurm, software, wandb_login
from adaptive.doctor.finding import Check, CheckSettings, Finding, ok, run_check
from adaptive.doctor.findings_table import grouped, print_findings
from adaptive.doctor.programs import RunningProgram
from adaptive.doctor.run_checks import all_checks, choose
from adaptive.training.engine import operators
from tests.helpers.commands import ADAPTIVE, Ended, Forks, start_command
from tests.helpers.disks import small_disk
from tests.helpers.shard_server import serve
from tests.helpers.waiting import wait_until

CHECKS = {check.name: check for check in all_checks()}


def look(name: str, **settings: object) -> Finding:
    """The finding of one check, run as the command does."""
    return run_check(CHECKS[name], replace(CheckSettings(), **settings))


def findings(ended: Ended) -> dict[str, dict]:
    assert ended.err == ""
    return {one["name"]: one for one in json.loads(ended.out)["findings"]}


def test_whatever_is_not_well_has_a_remedy(forks: Forks, tmp_path: Path) -> None:
    ended = forks.run(["doctor", "--quick", "--json", "--run-folder", str(tmp_path / "runs")])
    found = findings(ended)
    assert list(found) == [check.name for check in all_checks() if not check.slow and check.group != "data"]
    for one in found.values():
        assert one["status"] in ("ok", "warning", "error", "skipped")
        assert bool(one["remedy"]) == (one["status"] in ("warning", "error")), one
        assert "could not be checked" not in one["found"]
    assert ended.code == int(any(one["status"] == "error" for one in found.values()))
    assert list(tmp_path.iterdir()) == []  # nothing was left behind, not even the run folder


def test_errors_make_the_exit_code_and_the_table_says_what_to_type(tmp_path: Path) -> None:
    words = ["doctor", "--only", "interfaces,hostname,clock", "--run-folder", str(tmp_path)]
    ended = start_command(words, GLOO_SOCKET_IFNAME="nope")
    assert ended.code == 1, ended
    assert re.search(r"interfaces +│ error +│ .*'nope'.*│\n.*-> export GLOO_SOCKET_IFNAME=", ended.out), ended.out
    assert "│ clock" in ended.out
    assert ended.out.splitlines()[-1] == "2 ok, 0 warnings, 1 errors"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--only", "glo"], ["--only 'glo'", "did you mean gloo?"]),
        (["--only", "zzz"], ["--only 'zzz'", "software", "wandb-server"]),
        (["--only", ","], ["names nothing", "software"]),
        (["--only", "data"], ["--data FOLDER"]),
        (["--patience", "0"], ["--patience 0", "for example 60"]),
    ],
)
def test_wrong_words_are_one_line(words: list[str], parts: list[str], forks: Forks) -> None:
    ended = forks.run(["doctor", *words])
    assert (ended.code, ended.out) == (2, "")
    assert len(ended.err.splitlines()) == 1
    for part in ["adaptive doctor: error: ", *parts]:
        assert part in ended.err


def test_checks_are_chosen_by_name_and_group() -> None:
    assert [check.name for check in choose("gloo, shm", quick=False, with_data=False)] == ["shm", "gloo"]
    assert [check.name for check in choose("slurm", quick=False, with_data=False)] == [
        *("slurm", "partitions", "requeue", "job"),
    ]
    assert [check.name for check in choose("data", quick=True, with_data=True)] == ["shards"]


def test_a_hanging_check_and_a_failing_one_become_findings() -> None:
    release = threading.Event()

    def hang(_: CheckSettings) -> Finding:
        release.wait(60)
        return ok("")

    def fail(_: CheckSettings) -> Finding:
        raise RuntimeError("two\nlines \x1b[31m")

    hanging = run_check(Check("slow", "test", hang, limit=0.2), CheckSettings())
    release.set()
    assert (hanging.name, hanging.status) == ("slow", "error")
    assert "within 0.2 s" in hanging.found
    assert "adaptive doctor --only slow" in hanging.remedy
    failing = run_check(Check("broken", "test", fail), CheckSettings())
    assert (failing.status, failing.remedy) == ("error", "adaptive doctor --only broken")
    assert "RuntimeError: two lines" in failing.found
    assert "\x1b" not in failing.found


def test_a_program_that_hangs_ends_with_all_that_it_started() -> None:
    ended = RunningProgram(["sh", "-c", "sleep 1000 & echo $!; wait"]).wait(3.0)
    assert ended.code is None
    assert ended.reason == "no answer within 3 s"
    child = int(ended.out)
    wait_until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE)


def overlay(folder: Path, name: str, version: str) -> str:
    """A folder for PYTHONPATH with a package's metadata."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])


def test_packages_too_old_and_packages_twice(tmp_path: Path) -> None:
    from importlib.metadata import version

    words = ["doctor", "--only", "packages", "--json"]
    old = start_command(words, PYTHONPATH=overlay(tmp_path / "old", "filelock", "0.1"))
    assert old.code == 1
    assert "filelock 0.1, needed >=" in findings(old)["packages"]["found"]
    assert findings(old)["packages"]["remedy"].startswith("pip install 'filelock>=")
    twice = start_command(words, PYTHONPATH=overlay(tmp_path / "twice", "filelock", version("filelock")))
    found = findings(twice)["packages"]
    assert (twice.code, found["status"]) == (0, "warning")
    assert "filelock is installed 2 times" in found["found"]
    assert str(tmp_path / "twice") in found["found"]
    assert found["remedy"].startswith("pip uninstall -y filelock && pip install 'filelock>=")


def test_python_and_libraries_of_these_tests_are_well() -> None:
    assert look("python").status == "ok"
    import setuptools  # noqa: F401  (it puts its own copies of packages on the path)

    assert look("packages").status == "ok", look("packages")
    assert look("torchvision").status == "ok", software.torch_facts()


def test_a_torch_that_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so.99: cannot open')\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    ended = start_command(["doctor", "--only", "torchvision,deepspeed", "--json"], PYTHONPATH=path)
    assert ended.code == 1
    assert "torch cannot be imported: ImportError: libcudart.so.99" in findings(ended)["torchvision"]["found"]
    assert "libcudart.so.99" in findings(ended)["deepspeed"]["found"]


def test_compiler_and_ninja_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    assert look("compiler").status == "ok"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "operators"))
    ninja = shutil.which("ninja")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = look("compiler")
    assert (found.status, "ninja is not on PATH" in found.found) == ("error", True)
    assert found.remedy in (f'export PATH="{Path(sys.prefix) / "bin"}:$PATH"', "pip install ninja")
    (tmp_path / "ninja").symlink_to(str(ninja))
    found = look("compiler")
    assert (found.status, "no C++ compiler c++" in found.found) == ("error", True)
    assert "apt-get install -y g++" in found.remedy
    built = tmp_path / "operators" / "deepspeed_shm_comm"
    built.mkdir(parents=True)
    (built / "deepspeed_shm_comm.so").touch()
    assert look("compiler").status == "warning"


def test_compiled_operators_and_their_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert "not compiled yet" in look("extensions").found
    built = tmp_path / "deepspeed_shm_comm"
    built.mkdir()
    (built / "deepspeed_shm_comm.so").touch()
    lock = built / "lock"
    lock.touch()
    monkeypatch.setattr(operators, "_existence_locks", lambda: False)
    assert look("extensions") == Finding("extensions", "ok", f"{tmp_path}: DeepSpeed's operator is compiled")
    with lock.open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "is held: another process compiles" in look("extensions").found
    monkeypatch.setattr(operators, "_existence_locks", lambda: True)
    assert look("extensions").remedy == f"rm {lock}   # if none does"
    os.utime(lock, (1, 1))
    found = look("extensions")
    assert (found.status, found.remedy) == ("warning", f"rm {lock}")
    assert "a compilation that was killed" in found.found


def test_a_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 8) as folder:
        for name, words in (("space", "only 8 MiB free"), ("writing", "no space")):
            found = look(name, run_folder=folder / "runs" / "mine")
            assert (found.status, words in found.found) == ("error", True), found
            assert f"df -h {folder}" in found.remedy
        assert look("renames", run_folder=folder).status == "ok"
        assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(tmp_path / "disk", 8) as folder:
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        for name in ("renames", "locks", "clock"):
            found = look(name, run_folder=folder / "runs")
            assert (found.status, found.found) == ("error", f"{folder} cannot be written: Read-only file system")
            assert found.remedy == disk.ELSEWHERE
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "operators"))
        found = look("extensions")
        assert (found.status, "cannot be written" in found.found) == ("error", True)
        assert found.remedy.startswith("export TORCH_EXTENSIONS_DIR=")


def test_a_sound_disk(tmp_path: Path) -> None:
    for name in ("space", "writing", "renames", "locks", "clock"):
        finding = look(name, run_folder=tmp_path)
        assert finding.status in ("ok", "warning"), finding
    assert list(tmp_path.iterdir()) == []


def test_a_file_server_whose_clock_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = disk.time.time
    monkeypatch.setattr(disk.time, "time", lambda: now() + 100)
    found = look("clock", run_folder=tmp_path)
    assert (found.status, "differs by 1" in found.found) == ("warning", True)
    assert "timedatectl set-ntp true" in found.remedy


def test_shared_memory_of_a_container(tmp_path: Path) -> None:
    with small_disk(tmp_path / "shm", 64) as folder:
        found = machine.shm(CheckSettings(), str(folder))
        assert (found.status, "a container's default" in found.found) == ("warning", True)
        assert found.remedy.startswith("docker run --shm-size=8g")
    assert machine.shm(CheckSettings(), str(tmp_path / "none")).status == "error"
    assert look("shm").status in ("ok", "warning")


@pytest.mark.parametrize(
    ("limit", "name", "code", "parts"),
    [
        ("-S -n 100", "open-files", 1, ["only 100 open files", "ulimit -n"]),
        ("-S -n 1000", "open-files", 0, ["only 1000 open files", "ulimit -n"]),
        ("-v 30000000", "address-space", 0, ["limited to 28.6 GiB", "ulimit -v unlimited"]),
        ("-S -u 200", "processes", 0, ["only 200 processes", "ulimit -u 1024"]),
    ],
)
def test_low_limits(limit: str, name: str, code: int, parts: list[str]) -> None:
    script = f"ulimit {limit} && exec {ADAPTIVE} doctor --only {name} --json"
    ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert ended.returncode == code, ended
    found = json.loads(ended.stdout)["findings"][0]
    assert found["status"] == ("error" if code else "warning")
    assert parts[0] in found["found"]
    assert parts[1] in found["remedy"]


def test_what_a_control_group_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_group, "CGROUP", tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert look("cores").status == "ok"
    assert look("cores", local_ranks=8).remedy == "adaptive train CONFIG data.workers=1"
    assert look("cores", local_ranks=32).remedy == "deepspeed --num_gpus 16 ..."
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    (tmp_path / "memory.current").write_text(f"{2**29}\n")
    (tmp_path / "cpu.max").write_text("400000 100000\n")
    found = look("memory")
    assert (found.status, "may use 1.0 GiB and has 512 MiB left" in found.found) == ("warning", True)
    found = look("cores")
    assert "but only the time of 4" in found.found
    assert found.remedy == "export OMP_NUM_THREADS=4"
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert look("cores").status == "ok"
    first = tmp_path / "memory"  # version 1
    first.mkdir()
    (first / "memory.limit_in_bytes").write_text(f"{3 * 2**30}\n")
    (first / "memory.usage_in_bytes").write_text("0\n")
    assert "may use 3.0 GiB" in look("memory").found


GPU = {"name": "H100", "capability": [9, 0], "free": 80 * 2**30, "total": 80 * 2**30, "ms": 0.1, "error": ""}
TORCH = {
    "torch": "2.15.0",
    "cuda_build": "13.2",
    "nccl": "2.30.1",
    "architectures": ["sm_80", "sm_90"],
    "devices": [GPU],
}


@pytest.mark.parametrize(
    ("facts", "status", "words"),
    [
        (TORCH, "ok", "1 x H100 with 80 GiB"),
        ({"error": "no such library"}, "error", "torch does not start: no such library"),
        ({**TORCH, "cuda_build": None}, "error", "built without CUDA"),
        ({**TORCH, "cuda_error": "driver too old", "devices": []}, "error", "CUDA 13.2: driver too old"),
        ({**TORCH, "devices": []}, "error", "torch sees no GPU"),
        ({**TORCH, "devices": [{**GPU, "capability": [12, 0]}]}, "error", "has capability 120"),
        ({**TORCH, "devices": [GPU, {**GPU, "error": "ECC"}]}, "error", "GPU 1, H100: ECC"),
        ({**TORCH, "devices": [{**GPU, "free": 2**30}]}, "warning", "only 1 of 80 GiB are free"),
    ],
)
def test_what_torch_says_of_gpus(facts: dict, status: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "has_gpu", lambda: True)
    monkeypatch.setattr(gpu, "torch_facts", lambda: facts)
    found = look("cuda")
    assert (found.status, words in found.found) == (status, True), found
    assert bool(found.remedy) == (status != "ok")


def test_processes_that_were_left_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "has_gpu", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert look("gpu-processes").status == "skipped"
    programs(tmp_path, **{"nvidia-smi": f"echo {os.getpid()}; echo 999999999"})
    found = look("gpu-processes")
    assert (found.status, found.remedy) == ("warning", f"kill {os.getpid()}")
    programs(tmp_path, **{"nvidia-smi": ""})
    assert look("gpu-processes").status == "ok"


def test_interfaces_that_are_named_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    found = look("interfaces")
    assert (found.status, "lo 127.0.0.1" in found.found) == ("ok", True)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "=nothing")
    found = look("interfaces")
    assert (found.status, "NCCL_SOCKET_IFNAME" in found.found) == ("error", True)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "^docker")
    assert look("interfaces").status == "ok"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nope")
    for name in ("interfaces", "gloo"):
        found = look(name)
        assert (found.status, "'nope'" in found.found) == ("error", True)
        assert found.remedy.startswith(f"export GLOO_SOCKET_IFNAME={network.likely_interface()}")
    assert network.likely_interface() in interfaces()


def test_two_processes_meet_over_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    found = look("gloo")
    assert found.status == "ok", found
    assert re.fullmatch(r"2 processes reduce over gloo on lo: \d+ us a number, \d+ MB/s", found.found)


def test_a_host_name_that_leads_nowhere() -> None:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("another host name needs root and unshare")
    script = f"hostname nowhere.invalid && exec {ADAPTIVE} doctor --only hostname --json"
    environment = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
    words = ["unshare", "--uts", "sh", "-c", script]
    ended = subprocess.run(words, capture_output=True, text=True, env=environment)
    if "unshare" in ended.stderr or not ended.stdout:
        pytest.skip(f"no namespaces here: {ended.stderr.strip()}")
    [found] = json.loads(ended.stdout)["findings"]
    assert found["status"] == "warning"
    assert "nowhere.invalid does not resolve" in found["found"]
    assert found["remedy"].startswith("export GLOO_SOCKET_IFNAME=")


@pytest.mark.parametrize("address", ["127.0.1.1", "198.51.100.7"])
def test_a_host_name_that_leads_elsewhere(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(socket, "gethostname", lambda: address)  # resolves to itself
    assert look("hostname").status == "warning"
    found = look("hostname", nodes=2)
    assert found.status == "error"
    assert "loopback" in found.found if address.startswith("127.") else "no address of this host" in found.found
    assert found.remedy.startswith(f"export GLOO_SOCKET_IFNAME={network.likely_interface()}")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert look("hostname", nodes=2).status == "ok"


def test_a_dataset_in_a_folder_and_at_a_url(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "SLOW_READING", 0)  # this machine may do other things
    with serve(digits) as server:
        for path in (str(digits), server.url):
            for name in ("shards", "reading", "decoding"):
                found = look(name, data=path)
                assert found.status == "ok", found
            assert "images of 10 classes" in look("shards", data=path).found


def test_a_dataset_that_lacks_something(other_digits: Path, tmp_path: Path) -> None:
    shard = next(other_digits.glob("*train*.tar"))
    shard.unlink()
    found = look("shards", data=str(other_digits))
    assert (found.status, shard.name in found.found) == ("error", True)
    assert found.remedy == "copy them or pack again"
    found = look("shards", data=str(tmp_path / "none"))
    assert (found.status, found.remedy) == ("error", f"create it with: adaptive pack SOURCE {tmp_path / 'none'}")


def programs(folder: Path, **scripts: str) -> None:
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)


def test_slurm_absent_incomplete_and_hanging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    alone = {"environment": {}}
    assert look("slurm", **alone) == Finding("slurm", "skipped", "no Slurm here")
    assert look("slurm", environment={"SLURM_JOB_ID": "1"}).status == "warning"
    programs(tmp_path, sbatch="", srun="", scontrol="exec /bin/sleep 1000")
    monkeypatch.setattr(slurm, "SECONDS", 0.5)
    found = look("slurm", **alone)
    assert (found.status, "no answer within 0.5 s" in found.found) == ("warning", True)
    assert look("slurm", environment={"SLURM_JOB_ID": "1"}).status == "error"
    assert look("partitions", **alone).status == "skipped"


def test_a_job_whose_environment_contradicts_itself() -> None:
    given = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    assert look("job", environment=given).status == "ok"
    found = look("job", environment={**given, "RANK": "0", "WORLD_SIZE": "1"})
    assert (found.status, "RANK=0, but SLURM_PROCID=1" in found.found) == ("error", True)
    assert found.remedy.startswith("unset RANK")
    found = look("job", environment={**given, "SLURM_GPUS_ON_NODE": "2", "SLURM_NTASKS_PER_NODE": "4"})
    assert (found.status, found.remedy) == ("error", "sbatch --ntasks-per-node 2 ...")
    found = look("job", environment={**given, "SLURM_GPUS_ON_NODE": "1", "CUDA_VISIBLE_DEVICES": "0,1"})
    assert (found.status, found.remedy) == ("warning", "unset CUDA_VISIBLE_DEVICES")


KEY = "1234567890" * 4


@pytest.fixture
def no_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No key anywhere, and a server that is not there; returns the place of the netrc file."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{network.free_port()}")
    return tmp_path / "netrc"


def test_wandb_login(no_wandb: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = wandb_login.server()
    found = look("wandb")
    assert (found.status, found.remedy) == ("warning", f"wandb login --host {server}")
    no_wandb.write_text(f"machine {server.removeprefix('http://')}\n  login user\n  password {KEY}\n")
    found = look("wandb")
    assert (found.status, found.found) == ("ok", f"a key for {server} in {no_wandb}")
    monkeypatch.setenv("WANDB_API_KEY", "short")
    assert look("wandb").remedy.startswith("wandb login --relogin")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert (look("wandb").status, look("wandb-server").status) == ("ok", "skipped")


@contextmanager
def graphql(known: str) -> Iterator[str]:
    """A server that knows one key."""
    import base64

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            wanted = f"Basic {base64.b64encode(f'api:{known}'.encode()).decode()}"
            viewer = {"username": "me"} if self.headers.get("Authorization") == wanted else None
            content = json.dumps({"data": {"viewer": viewer}}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def test_wandb_server(no_wandb: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = look("wandb-server")
    assert (found.status, "does not answer" in found.found) == ("warning", True)
    assert found.remedy.startswith(f"curl -sSI {wandb_login.server()}")
    with graphql(KEY) as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        assert look("wandb-server").found == f"{url} answers"
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        assert look("wandb-server").found == f"{url} knows the key of me"
        monkeypatch.setenv("WANDB_API_KEY", KEY[::-1])
        found = look("wandb-server")
        assert (found.status, found.found) == ("warning", f"{url} does not know the key in WANDB_API_KEY")
        assert KEY[::-1] not in found.found + found.remedy
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(wandb_login, "SECONDS", 0.3)
        found = look("wandb-server")
        assert (found.status, "timed out" in found.found) == ("warning", True)


def test_the_table_of_several_nodes_details_only_what_differs(capsys: pytest.CaptureFixture[str]) -> None:
    nodes = ["a", "b", "c"]
    every = [(node, Finding("shm", "ok", f"{i} GiB")) for i, node in enumerate(nodes)]
    every += [(node, Finding("space", "ok", "much")) for node in "ab"]
    every += [("c", Finding("space", "error", "no space", "df -h"))]
    every += [(node, Finding("slurm", "warning", "down", "scontrol ping")) for node in nodes]
    rows = [(where, one.name, one.status) for where, one in grouped(every)]
    assert rows == [
        (["a", "b", "c"], "shm", "ok"),
        (["a", "b"], "space", "ok"),
        (["c"], "space", "error"),
        (["a", "b", "c"], "slurm", "warning"),
    ]
    print_findings(every, nodes)
    shown = capsys.readouterr().out
    assert re.search(r"space +│ error +│ c +│ no space", shown)
    assert re.search(r"slurm +│ warning +│ all ", shown)
    assert "-> df -h" in shown
    assert shown.splitlines()[-1] == "5 ok, 3 warnings, 1 errors"
