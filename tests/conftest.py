"""Shared by the tests: a small data set, a small run, and ways to run the scripts."""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import time
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from shlex import split
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
os.environ["OMP_NUM_THREADS"] = "1"  # enough for tiny models, and much faster than two threads on a busy machine
os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # for a torchrun that restarts
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["forked"])
forkserver.ensure_running()  # it imports torch while this process does

import torch

import prepare
import train
from checkpoint import read_checkpoint
from forked import run_script
from halves import pytest_runtestloop  # noqa: F401 - pytest calls it

WORDS = ["the", "a", "small", "model", "learns", "to", "write", "what", "it", "has", "read,", "one", "token", "after",
         "another;", "naïve", "café", "你好", "🙂\n"]
TINY = split("--n_layer 2 --n_head 2 --n_kv_head 1 --n_embd 32 --seq_len 16 --batch_tokens 128 --micro_batch 4")
TINY += ["--dtype", "float32"]  # so that results do not depend on the machine
TINY_FLOPS = 6 * (2 * (3 * 32 * 32 + 3 * 32 * 128) + 32 * 259) + 12 * 2 * 32 * 16  # per token of `data`, by hand

MACHINE = train.Machine(torch.device("cpu"), contextlib.nullcontext(), False, None, {})


def words(n: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=n))


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A byte-level data set of about 14 kB, a tenth of it held out."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text(words(3000), encoding="utf-8")
    prepare.prepare([str(folder / "text.txt")], folder / "set", "byte", 0.1)
    return folder / "set"


@pytest.fixture
def call(monkeypatch, tmp_path):
    """call(train, "--steps", 5) runs a script's main() in this process, in an empty folder."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(tmp_path)

    def call_main(script, *arguments):
        monkeypatch.setattr(sys, "argv", [Path(script.__file__).name, *map(str, arguments)])
        try:
            script.main()
        finally:
            for path in filter(Path.is_file, tmp_path.rglob(".lock")):
                path.open().close()  # releases the lock on a run, as the end of a process does
            if (descriptor := signal.set_wakeup_fd(-1)) >= 0:  # ends the thread that waits for signals
                socket.socket(fileno=os.dup(descriptor)).shutdown(socket.SHUT_RDWR)

    yield call_main
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def alone():
    """A process group of one, as main() of train.py makes it."""
    train.start_processes(10)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def refused(call, capsys):
    """refused(train, "--steps", 0) returns the one sentence with which a script refuses its input."""

    def refuse(script, *arguments) -> str:
        with pytest.raises(SystemExit) as end:
            call(script, *arguments)
        assert end.value.code == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert ": error: " in last
        return last

    return refuse


def kill(processes: list) -> None:
    for process in processes:
        process.kill()
        process.join()


@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    """Or else a run of a million steps would go on after a failure."""
    around = multiprocessing.active_children()  # of fixtures of a module
    yield
    kill([process for process in multiprocessing.active_children() if process not in around])


class Ranks:
    """`n` processes that run train.py or a script as torchrun would start them, or a single one as python would. The
    folder and each argument may be functions of the rank. The output goes to files, or to an existing pipe `stdout`."""

    def __init__(self, folder, *arguments, script: str | Path | None = None, n: int = 1, stdin: str = "", stdout=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(n)}
        self.processes, self.outputs = [], []
        for rank in range(n):
            place = Path(folder(rank) if callable(folder) else folder)
            env = address | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if n > 1 else {}
            files = [place / f".{name}-{os.getpid()}-{time.monotonic_ns()}" for name in ("in", "out", "err")]
            files[0].write_text(stdin)
            files[1] = stdout or files[1]
            given = [str(a(rank) if callable(a) else a) for a in arguments]
            work = (script, given, place, env, files)
            self.processes.append(FORKS.Process(target=run_script, args=work, daemon=True))  # ends with pytest
            self.processes[-1].start()
            self.outputs.append([path for path in files[1:] if path != stdout])

    def pid(self, rank: int) -> int:
        return self.processes[rank].pid

    def finish(self, status: int | None = 0) -> SimpleNamespace:
        """Wait for the end. Once a rank has failed, the others are terminated, as torchrun does it. Returns the exit
        status of the first that ended with another than 0, and what all printed."""
        end = time.monotonic() + 60
        while any(p.exitcode is None for p in self.processes) and time.monotonic() < end:
            if any(p.exitcode for p in self.processes):
                time.sleep(0.3)
                for p in self.processes:
                    p.terminate()
                break
            time.sleep(0.01)
        for p in self.processes:
            p.join(10)
        kill(self.processes)
        first = next((p.exitcode for p in self.processes if p.exitcode), 0)
        stdout, stderr = ("".join(files[i].read_text(encoding="utf-8") for files in self.outputs) for i in (0, -1))
        assert status is None or first == status, stdout + stderr
        return SimpleNamespace(status=first, stdout=stdout, stderr=stderr, printed=stdout + stderr)


def shell(script: str, *arguments, cwd: Path, stdin: str = "") -> SimpleNamespace:
    """Run a script to its end in a process of its own."""
    return Ranks(cwd, *arguments, script=ROOT / script, stdin=stdin).finish()


def last_step(run: str | Path) -> int:
    """The newest that is in the log, or 0."""
    try:
        return max(json.loads(row)["step"] for row in Path(run, "metrics.jsonl").read_text().split("\n")[:-1])
    except (OSError, ValueError):
        return 0


def wait_for_step(run: Path, step: int) -> None:
    end = time.monotonic() + 60
    while last_step(run) < step:
        assert time.monotonic() < end, f"step {step} was not reached"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def finished_run(data, tmp_path_factory) -> Path:
    """A run of 20 steps with dropout and a checkpoint every 5."""
    folder = tmp_path_factory.mktemp("finished")
    flags = [*TINY, "--dropout", 0.1, "--steps", 20, "--save_every", 5, "--eval_every", 10, "--keep", 3]
    shell("train.py", *flags, "--data", data, "--out", "run", cwd=folder)
    return folder / "run"


@pytest.fixture
def run(finished_run, tmp_path, monkeypatch) -> Path:
    """A copy of it, in this test's folder."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(finished_run, tmp_path / "run")


def rows(run: Path, key: str) -> dict[int, float]:
    """{step: value} from metrics.jsonl; a step that appears twice is an error, and so is NaN, which is no JSON."""
    found = [json.loads(line, parse_constant=pytest.fail) for line in (run / "metrics.jsonl").read_text().splitlines()]
    pairs = [(row["step"], row[key]) for row in found if key in row]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def state_of(run: Path, step: int) -> dict:
    """The state of a checkpoint, with whole tensors."""
    state = read_checkpoint(run / f"step-{step:08d}.json")
    return {**state, "model": dict(state["model"]), "optimizer": dict(state["optimizer"])}


assert_same = partial(torch.testing.assert_close, rtol=0, atol=0)  # of tensors by name: bit for bit


def assert_same_states(one: Path, other: Path, step: int) -> None:
    """Two runs have the same weights and optimizer state at a step."""
    a, b = state_of(one, step), state_of(other, step)
    assert_same([a["model"], a["optimizer"]], [b["model"], b["optimizer"]])
