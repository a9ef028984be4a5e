"""What several test files share: a small data set, a small run, and ways to call the scripts."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from shlex import split

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import prepare
import train

# fmt: off
WORDS = ["the", "a", "small", "model", "learns", "to", "write", "what", "it", "has", "read,", "one", "token", "after",
         "another;", "naïve", "café", "你好", "🙂\n"]
# fmt: on
TINY = split("--n_layer 2 --n_head 2 --n_kv_head 1 --n_embd 32 --seq_len 16 --batch_tokens 128 --micro_batch 4")


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
        script.main()

    yield call_main
    for number, handler in handlers.items():
        signal.signal(number, handler)


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


def shell(script: str, *arguments, cwd: Path, **more) -> subprocess.CompletedProcess:
    """A script run as a user runs it."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, encoding="utf-8", check=False, **more)


@pytest.fixture(scope="session")
def finished_run(data, tmp_path_factory) -> Path:
    """A run of 20 steps with dropout and a checkpoint every 5."""
    folder = tmp_path_factory.mktemp("finished")
    flags = [*TINY, "--dropout", 0.1, "--steps", 20, "--save_every", 5, "--eval_every", 10, "--keep", 3]
    assert shell("train.py", *flags, "--data", data, "--out", "run", cwd=folder).returncode == 0
    return folder / "run"


@pytest.fixture
def run(finished_run, tmp_path, monkeypatch) -> Path:
    """A copy of it, in this test's folder."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(finished_run, tmp_path / "run")


def rows(run: Path, key: str) -> dict[int, float]:
    """{step: value} from metrics.jsonl; a step that stands there twice is an error."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    pairs = [(row["step"], row[key]) for row in found if key in row]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def state_of(run: Path, step: int) -> dict:
    return train.read_checkpoint(run / f"step-{step:08d}.json")


def assert_same(a, b):
    """Bit for bit, through dicts, lists and tensors."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def ranks(process: subprocess.Popen) -> list[int]:
    """The process ids of the ranks that a torchrun has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [pid for pid in map(int, children) if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, **more}
