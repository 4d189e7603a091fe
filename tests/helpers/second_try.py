"""A pytest plugin that gives tests that wait for other processes a second try, where nothing else failed.

On a busy machine such a test can fail although the code is right. Where every failure of a call is of this kind, pytest
is called once more for these tests, one after another; the last line names them, so that they can be mended. Whatever
else fails, fails, and nothing is repeated. ``-p tests.helpers.second_try`` turns it on.
"""

import argparse
import subprocess
import sys
from collections.abc import Generator

import pytest

WAITING = {"chaos", "cluster", "ranks", "end_to_end", "browser"}


class Outcomes:
    """How every test of a call ended, and whether the call came to its end."""

    def __init__(self) -> None:
        self.passed: set[str] = set()
        self.failed: dict[str, bool] = {}  # whether the test is one of those that wait
        self.whole = True

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.whole &= not report.failed

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed[report.nodeid] = not WAITING.isdisjoint(report.keywords)
            self.passed.discard(report.nodeid)
        elif report.passed and report.when == "call":
            self.passed.add(report.nodeid)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.whole &= not (session.shouldstop or session.shouldfail)  # by --exitfirst, for instance


def pytest_addoption(parser: pytest.Parser) -> None:
    # How many tests the second call has to bring to a good end.
    parser.addoption("--second-try", type=int, metavar="TESTS", help=argparse.SUPPRESS)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> Generator[None, int, int]:
    if hasattr(config, "workerinput"):  # of pytest-xdist; its controller is told everything
        return (yield)
    outcomes = Outcomes()
    config.pluginmanager.register(outcomes)
    code = yield
    if (tests := config.option.second_try) is not None:
        return _tell(outcomes, tests, code)
    if code == pytest.ExitCode.TESTS_FAILED and outcomes.whole and all(outcomes.failed.values()):
        print(
            f"\nOnly tests that wait for other processes failed ({len(outcomes.failed)}): once more, alone", flush=True
        )
        again = ["-n", "0", "--last-failed", "--last-failed-no-failures", "none"]
        words = [*config.invocation_params.args, *again, f"--second-try={len(outcomes.failed)}"]
        return subprocess.run([sys.executable, "-m", "pytest", *map(str, words)], check=False).returncode
    return code


def _tell(outcomes: Outcomes, tests: int, code: int) -> int:
    """Name the tests of the second call; a test that was skipped or not found in it has not passed."""
    if outcomes.failed:
        print(f"Failed twice: {', '.join(sorted(outcomes.failed))}", flush=True)
    if outcomes.passed:
        print(f"Passed at the second try alone, to be mended: {', '.join(sorted(outcomes.passed))}", flush=True)
    if code == 0 and len(outcomes.passed) != tests:
        print(f"{tests} tests had failed, and {len(outcomes.passed)} passed at the second try", flush=True)
        return int(pytest.ExitCode.TESTS_FAILED)
    return code
