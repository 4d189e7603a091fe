"""The W&B workspace: the library's own model of it, and what its real client sends to a server on this machine."""

import gzip
import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adaptive.commands.dashboard import remedy, run
from adaptive.commands.main import build_parser
from adaptive.doctor.checks.network import free_port
from adaptive.errors import AdaptiveError, MachineError
from adaptive.tracking import wandb_server
from adaptive.tracking.panels import SECTIONS
from tests.helpers.commands import Ended
from tests.tracking.conftest import KEY

pytest.importorskip("wandb_workspaces")
pytestmark = pytest.mark.usefixtures("isolated")


class Views(http.server.ThreadingHTTPServer):
    """The little of W&B's GraphQL that views take: one project of one entity, views by name."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Requests)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.views: dict[str, dict[str, Any]] = {}
        self.saves: list[dict[str, Any]] = []
        self.refuses = self.silent = False
        self.ended = threading.Event()

    def answer(self, query: str, asked: dict[str, Any]) -> dict[str, Any]:
        if "upsertView" in query:
            self.saves.append(asked)
            old = next((view for view in self.views.values() if view["id"] == asked.get("id")), None)
            view = {"id": f"view-{len(self.views)}"} if old is None else old
            self.views[asked["name"]] = view
            view.update({key: asked[key] for key in ("name", "displayName", "spec")})
            return {"upsertView": {"view": view, "inserted": old is None}}
        if "allViews" in query:
            if (asked["entityName"], asked["name"]) != ("team", "exits"):
                return {"project": None}
            found = self.views.get(asked["viewName"])
            return {"project": {"allViews": {"edges": [{"node": found}] if found else []}}}
        return {"viewer": {"id": "user", "entity": "team", "username": "someone"}}


class _Requests(http.server.BaseHTTPRequestHandler):
    server: Views

    def do_GET(self) -> None:
        self.reply(404, b"")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.path != "/graphql":
            return self.reply(404, b"")
        if self.server.silent:
            self.server.ended.wait()
        if self.server.refuses:
            return self.reply(401, b'{"errors": [{"message": "user is not logged in"}]}')
        asked = json.loads(body)
        return self.reply(
            200, json.dumps({"data": self.server.answer(asked["query"], asked.get("variables") or {})}).encode()
        )

    def reply(self, code: int, content: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def views(monkeypatch: pytest.MonkeyPatch) -> Iterator[Views]:
    server = Views()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    yield server
    server.ended.set()
    server.shutdown()
    server.server_close()


def call(capsys: pytest.CaptureFixture[str], *words: str) -> Ended:
    """Run the command in this process; what it refuses is its standard error."""
    arguments = build_parser("dashboard").parse_args(["dashboard", *words])
    try:
        code, told = run(arguments), ""
    except AdaptiveError as error:
        code, told = error.exit_code, error.told("dashboard")
    return Ended(code, capsys.readouterr().out, told)


def panels(spec: str) -> list[dict[str, Any]]:
    sections = json.loads(spec)["section"]["panelBankConfig"]["sections"]
    return [panel for section in sections for panel in section["panels"]]


def test_the_library_takes_every_panel() -> None:
    from wandb_workspaces.reports.v2.interface import UnknownPanel
    from wandb_workspaces.workspaces import Workspace, internal

    from adaptive.tracking.workspace import build

    view = build("team", "exits", "Adaptive")._to_model()
    spec = view.spec.model_dump_json(by_alias=True, exclude_none=True)
    read = view.model_copy(update={"spec": internal.WorkspaceViewspec.model_validate_json(spec)})
    back = Workspace._from_model(read)
    assert [section.name for section in back.sections] == [section.name for section in SECTIONS]
    wanted = [panel for section in SECTIONS for panel in section.panels]
    found = [panel for section in back.sections for panel in section.panels]
    assert len(found) == len(wanted)
    assert not any(isinstance(panel, UnknownPanel) for panel in found)
    assert [panel.metric_regex for panel in found if type(panel).__name__ == "LinePlot"] == [
        panel.regex for panel in wanted if panel.kind == "lines"
    ]
    assert back.settings.x_axis == "step"


def test_saving_again_updates_the_same_view(views: Views, capsys: pytest.CaptureFixture[str]) -> None:
    first = call(capsys, "--project", "exits", "--json")
    assert first.code == 0, first
    created = json.loads(first.out)
    count = sum(len(section.panels) for section in SECTIONS)
    assert created == {"url": created["url"], "created": True, "panels": count}
    assert created["url"].startswith(f"{views.url}/team/exits?nw=")
    [view] = views.views.values()
    assert view["displayName"] == "Adaptive"
    assert len(panels(view["spec"])) == count

    # Somebody removes a panel and looks for runs by a name: the panel comes back, the search stays.
    spec = json.loads(view["spec"])
    spec["section"]["panelBankConfig"]["sections"][0]["panels"].pop()
    spec["section"]["runSets"][0]["search"]["query"] = "ge-"
    view["spec"] = json.dumps(spec)
    second = call(capsys, "--project", "exits", "--entity", "team")
    assert (second.code, second.out) == (0, f"updated, {count} panels: {created['url']}\n"), second
    assert list(views.views.values()) == [view]
    assert [save.get("id") for save in views.saves] == [None, view["id"]]
    assert len(panels(view["spec"])) == count
    assert json.loads(view["spec"])["section"]["runSets"][0]["search"]["query"] == "ge-"

    other = call(capsys, "--project", "exits", "--name", "Of mine", "--json")
    assert json.loads(other.out)["created"] is True
    assert len(views.views) == 2


def test_a_project_that_is_missing_is_named(views: Views, capsys: pytest.CaptureFixture[str]) -> None:
    ended = call(capsys, "--project", "nowhere")
    assert ended.code == 1
    assert "team/nowhere" in ended.err
    assert "tracking.wandb=online" in ended.err
    assert len(ended.err.splitlines()) == 1
    assert views.saves == []


def test_a_refused_login_is_named(views: Views, capsys: pytest.CaptureFixture[str]) -> None:
    views.refuses = True
    ended = call(capsys, "--project", "exits")
    assert ended.code == 1
    assert f"{views.url} refused the login" in ended.err
    assert "wandb login" in ended.err
    assert KEY not in ended.err


def test_a_server_that_falls_silent_costs_the_time_limit(views: Views, capsys: pytest.CaptureFixture[str]) -> None:
    views.silent = True
    begin = time.monotonic()
    ended = call(capsys, "--project", "exits", "--timeout", "2")
    assert time.monotonic() - begin < 60
    assert ended.code == 1
    assert "not done within 2 s" in ended.err
    assert "--timeout" in ended.err


def test_a_dead_server_is_named_at_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("WANDB_BASE_URL", url)
    begin = time.monotonic()
    ended = call(capsys)
    assert time.monotonic() - begin < 30
    assert f"{url} does not answer" in ended.err
    assert "WANDB_BASE_URL" in ended.err
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "does not answer (timed out)" in call(capsys, "--timeout", "1").err


def test_no_login_is_refused_before_anything_is_sent(
    views: Views, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    ended = call(capsys, "--project", "exits")
    assert ended.code == 1
    assert f"wandb login --host {views.url}" in ended.err
    assert "WANDB_API_KEY" in ended.err


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("AuthenticationError: Failed to verify credentials: did not respond in time.", "did not answer in time"),
        ("CommError: HTTP 403: permission denied", "wandb login --relogin"),
        ("ValueError: of another kind", "check --project and --entity"),
        ("no entity", "give one by --entity"),
    ],
)
def test_what_the_client_says_gets_a_remedy(said: str, told: str) -> None:
    assert told in remedy(said, wandb_server.PUBLIC, "exits")


def test_login_and_server_are_those_of_the_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    assert wandb_server.server() == wandb_server.PUBLIC
    with pytest.raises(MachineError, match=r"no W&B login for api\.wandb\.ai; run: wandb login, or"):
        wandb_server.check_login(wandb_server.PUBLIC)
    home = tmp_path / "home"  # of the fixture `isolated`
    (home / ".config" / "wandb").mkdir(parents=True)
    (home / ".config" / "wandb" / "settings").write_text("[default]\nbase_url = https://wandb.lab:8080/\n")
    (home / ".netrc").write_text(f"machine wandb.lab:8080\n  login user\n  password {KEY}\n")
    assert wandb_server.server() == "https://wandb.lab:8080"
    wandb_server.check_login(wandb_server.server())
    with pytest.raises(MachineError):
        wandb_server.check_login(wandb_server.PUBLIC)


def test_a_missing_package_is_named_with_its_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'wandb-workspaces" in call(capsys).err
    assert call(capsys, "--dry-run").code == 0


def test_dry_run_needs_neither_login_nor_network(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    table = call(capsys, "--dry-run").out
    for section in SECTIONS:
        assert section.name in table
        assert all(panel.shows in table for panel in section.panels)
    listed = json.loads(call(capsys, "--dry-run", "--json").out)["sections"]
    assert [len(section["panels"]) for section in listed] == [len(section.panels) for section in SECTIONS]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--sync", "run", "--project", "p"], "--project does not go with --sync"),
        (["--name", " "], "--name ' '"),
        (["--project", "a/b"], "--project 'a/b'"),
        (["--timeout", "0"], "--timeout 0"),
        (["--timeout", "nan"], "--timeout nan"),
    ],
)
def test_wrong_words_are_one_line(words: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    ended = call(capsys, *words)
    assert ended.code == 2
    assert part in ended.err
    assert len(ended.err.splitlines()) == 1
