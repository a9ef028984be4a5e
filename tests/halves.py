"""Runs the tests in two processes, this one and a second pytest. Whichever is free takes the largest file that is left.
The second process sends its reports, which the first prints among its own."""

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable
from itertools import chain, pairwise
from pathlib import Path

import pytest


def run_files(session: pytest.Session, queue, after_each: Callable = lambda: None) -> bool:
    """Run the tests of each file that `queue` gives, until it gives None."""
    tests = (item for path in iter(queue.get, None) for item in session.items if item.path == path)
    for item, following in pairwise(chain(tests, [None])):  # pytest keeps the fixtures that the next test needs, too
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        after_each()
        if session.shouldfail:  # --exitfirst, --maxfail
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)
    return True


class Second:
    """The plugin of the second pytest."""

    def __init__(self, queue, reports):
        self.queue, self.reports = queue, reports

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.config = session.config
        return run_files(session, self.queue)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.send(self.config.hook.pytest_report_to_serializable(config=self.config, report=report))


def run_second(arguments: tuple[str, ...], folder: Path, queue, reports) -> None:
    """A second pytest with the arguments of the first, in the same folder, which prints nothing."""
    multiprocessing.current_process()._config["daemon"] = False  # since its tests start processes
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout = open(1, "w", closefd=False)
    sys.exit(pytest.main([*arguments], plugins=[Second(queue, reports)]))


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Run the tests of a session. Returns None, which leaves them to pytest itself, if it has only a few files."""
    config, paths = session.config, {item.path for item in session.items}
    if len(paths) < 4 or session.testsfailed or config.option.collectonly or config.option.usepdb:
        return None
    forks = multiprocessing.get_context("forkserver")  # from the server of conftest.py, which has imported torch
    queue, (received, reports) = forks.SimpleQueue(), forks.Pipe(duplex=False)
    for path in [*sorted(paths, key=lambda path: -path.stat().st_size), None, None]:
        queue.put(path)
    given = config.invocation_params
    second = forks.Process(target=run_second, args=(given.args, given.dir, queue, reports), daemon=True)
    second.start()
    reports.close()

    def log_reports(wait: bool = False) -> None:
        with contextlib.suppress(EOFError):
            while wait or received.poll():
                report = config.hook.pytest_report_from_serializable(config=config, data=received.recv())
                config.hook.pytest_runtest_logreport(report=report)

    run_files(session, queue, log_reports)
    log_reports(wait=True)
    second.join()
    if second.exitcode not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        pytest.exit(f"the second pytest ended with status {second.exitcode}", pytest.ExitCode.INTERNAL_ERROR)
    return True
