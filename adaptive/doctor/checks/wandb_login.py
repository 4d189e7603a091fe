"""Checks of the W&B login: a key, and a server that accepts it. Training works without, so nothing is an error."""

from __future__ import annotations

import base64
import json
import os
import urllib.error
import urllib.request

from adaptive.doctor.finding import Check, CheckSettings, Finding, ok, skipped, warning
from adaptive.foreign_text import shell_words
from adaptive.tracking.wandb_server import find_key, server

SECONDS = 8.0
OFFLINE = "tracking.wandb=offline needs none"


def _mode() -> str:
    return os.environ.get("WANDB_MODE", "").lower()


def login(_: CheckSettings) -> Finding:
    """Check for a key in the environment or in the netrc file."""
    if _mode() in ("offline", "disabled", "dryrun"):
        return ok(f"WANDB_MODE={_mode()}: no login needed")
    key, where = find_key(server())
    if not key:
        return warning(f"no key for {server()}; {OFFLINE}", f"wandb login --host {shell_words(server())}")
    if len(key.rpartition("-")[2]) < 40:
        return warning(f"the key in {where} is too short", f"wandb login --relogin --host {shell_words(server())}")
    return ok(f"a key for {server()} in {where}")


def answers(_: CheckSettings) -> Finding:
    """Check that the server answers, and knows the key."""
    if _mode() in ("offline", "disabled", "dryrun"):
        return skipped(f"WANDB_MODE={_mode()}: no server needed")
    key, where = find_key(server())
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Basic {base64.b64encode(f'api:{key}'.encode()).decode()}"
    query = json.dumps({"query": "query Viewer { viewer { username } }"}).encode()
    reach = f"curl -sSI {shell_words(server())}   # or {OFFLINE.removesuffix(' needs none')}"
    try:
        request = urllib.request.Request(f"{server()}/graphql", data=query, headers=headers)
        with urllib.request.urlopen(request, timeout=SECONDS) as reply:
            viewer = (json.loads(reply.read(100_000)).get("data") or {}).get("viewer")
    except urllib.error.HTTPError as problem:
        if problem.code in (401, 403):
            viewer = None
        else:
            return warning(f"{server()} answers {problem.code} {problem.reason}", reach)
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "reason", problem)
        return warning(f"{server()} does not answer: {reason}; runs are logged to metrics.jsonl alone", reach)
    if not key:
        return ok(f"{server()} answers")
    if not viewer:
        return warning(
            f"{server()} does not know the key in {where}", f"wandb login --relogin --host {shell_words(server())}"
        )
    return ok(f"{server()} knows the key of {viewer.get('username') or 'this account'}")


CHECKS = [
    Check("wandb", "wandb", login),
    Check("wandb-server", "wandb", answers, slow=True, limit=3 * SECONDS),
]
