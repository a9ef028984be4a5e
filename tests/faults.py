"""Faults, many times each, and what became of them: the table in the README. pytest does not collect this file.

    python tests/faults.py                          all of them, about half an hour on two cores
    python tests/faults.py --kill 50 --fuzz 2000    these two

Each line says how often a fault was caused, what should follow, and how often something else did; the exit status is
the number of lines with something else.
"""

import argparse
import contextlib
import hashlib
import io
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from shlex import split
from statistics import median

import torch
from conftest import ROOT, TINY, last_step, words
from nodes import flaky_nodes, ip, linked_nodes

import prepare
import published
import train
from checkpoint import files_of, load_checkpoint
from prepare import load_dataset
from published import load_model

QUICK = [*TINY, *split("--data set --steps 1000000 --warmup 0 --dropout 0.1 --log_every 1")]
QUICK += split("--eval_every 1000000 --save_every 1000000")
ALONE = [sys.executable]
TORCHRUN = [*ALONE, *split("-m torch.distributed.run --standalone --nproc_per_node=2")]


def start(run: str, flags: str, launcher: list[str] = ALONE, until: int = 0, output=subprocess.PIPE):
    """Start to train, and wait until the log has step `until`."""
    command = [*launcher, str(ROOT / "train.py"), *QUICK, "--out", run, *split(flags)]
    process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, encoding="utf-8")
    wait_for_step(process, run, until)
    return process


def finish(run: str, flags: str, launcher: list[str] = ALONE) -> dict:
    """Train without a fault. Returns the newest checkpoint."""
    start(run, flags, launcher).communicate()
    return newest(run)


def wait_for_step(process: subprocess.Popen, run: str, step: int) -> float:
    """Returns the seconds that it took."""
    began = time.monotonic()
    while process.poll() is None and last_step(run) < step:
        time.sleep(0.01)
    return time.monotonic() - began


def workers(torchrun: subprocess.Popen) -> list[int]:
    """The process ids of the ranks that a torchrun has started."""
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    return [pid for pid in map(int, children) if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def newest(run: str | Path) -> dict:
    with contextlib.redirect_stderr(io.StringIO()):
        return load_checkpoint(run)[0]


def is_saved(run: str) -> bool:
    """Whether the last step that was logged is on disk."""
    return newest(run)["step"] == last_step(run)


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[kind][name], b[kind][name]) for kind in ("model", "optimizer") for name in a[kind])


# ---- Each fault yields whether what followed was right, at least once each time


def kill_often(n: int, run: str, flags: str, launcher: list[str], victim: Callable, lost: int) -> Iterator[bool]:
    """Kill a process of a run that saves at each step, the one that `victim` names, and resume the run, n times."""
    step, left = 0, 0
    for i in range(n):
        process = start(run, flags, launcher, until=step + 4)
        os.kill(victim(process, i), signal.SIGKILL)
        process.communicate()
        for best in Path(run).glob("best.json"):
            newest(best)  # raises ValueError if it is not whole
        left += bool(strays(run))
        step = newest(run)["step"]
        yield step >= last_step(run) - lost
    print(f"      {left} times files to remove")
    stop = f"{flags} --stop_at {step + 1}"
    yield same(finish(run, stop, launcher), finish(f"not-{run}", stop, launcher)) and not strays(run)


def strays(run: str) -> list[Path]:
    """Files of checkpoints that no JSON names."""
    named = {file["file"] for record in Path(run).glob("step-*.json") for file in files_of(record)}
    return [path for path in Path(run).glob("step-*.pt*") if path.name not in named]


def kills(n: int) -> Iterator[bool]:
    """kill -9 at random instants of a run that saves at each step, which is resumed: no checkpoint is lost, and the
    final bits are those of a run without"""

    def soon(process: subprocess.Popen, i: int) -> int:
        time.sleep(random.uniform(0, 0.3))
        return process.pid

    return kill_often(n, "killed", "--resume --save_every 1", ALONE, soon, lost=2)  # one being written, one computed


def killed_saves(n: int) -> Iterator[bool]:
    """kill -9 of one of two ranks that share a model, in a save: the one before is whole, and what is left goes"""

    def in_a_save(process: subprocess.Popen, i: int) -> int:
        ranks = workers(process)
        while process.poll() is None and not any(Path("parts").glob("*.partial")):
            pass
        return ranks[i % 2]

    return kill_often(n, "parts", "--resume --shard 2 --save_every 1 --eval_every 2", TORCHRUN, in_a_save, lost=3)


def signals(n: int) -> Iterator[bool]:
    """SIGTERM or SIGINT to torchrun, SIGUSR1 to one of two ranks: all save the step that they have made"""
    for i in range(n):
        process = start(run := f"signalled{i}", "", TORCHRUN, until=3)
        time.sleep(random.uniform(0, 0.2))
        number = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)[i % 3]
        os.kill(workers(process)[i % 2] if number == signal.SIGUSR1 else process.pid, number)
        process.communicate()
        yield is_saved(run)


def killed_ranks(n: int) -> Iterator[bool]:
    """kill -9 of one rank of two, which torchrun restarts: the run ends with the bits of one without"""
    seconds, wanted, launcher = [], finish("whole", "--steps 120", TORCHRUN), [*TORCHRUN, "--max-restarts=3"]
    for i in range(n):
        process = start(run := f"restarted{i}", "--resume --steps 120 --save_every 5", launcher, until=20)
        os.kill(workers(process)[i % 2], signal.SIGKILL)
        seconds.append(wait_for_step(process, run, last_step(run) + 1))
        process.communicate()
        yield process.returncode == 0 and same(newest(run), wanted)
    print(f"      back at work after {median(seconds):.0f} s")


def orphans(n: int) -> Iterator[bool]:
    """kill -9 of torchrun itself: its ranks save their step and are gone after 10 s"""
    for i in range(n):
        process = start(run := f"orphaned{i}", "", TORCHRUN, until=5)
        ranks = workers(process)
        process.kill()
        time.sleep(10)
        left = [pid for pid in ranks if Path(f"/proc/{pid}").exists()]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        process.communicate()
        yield not left and is_saved(run)


def lost_nodes(n: int) -> Iterator[bool]:
    """one node of two loses its processes and its link, and comes back: the other goes on alone, then both"""
    alone, back, flags = [], [], "--save_every 20 --resume --timeout 10"
    for i in range(n):
        run, log = f"left{i}", Path(f"left{i}.log")

        def n_ranks(log=log) -> int:
            """As last announced."""
            return int(re.findall(r"^ranks +(\d+) on", log.read_text(errors="replace"), re.MULTILINE)[-1])

        with linked_nodes(1e9) as (head, other), log.open("ab") as output:
            launchers = [node.torchrun("1:2", "--max-restarts=3") for node in (head, other)]
            staying, lost = (start(run, flags, launcher, output=output) for launcher in launchers)
            wait_for_step(staying, run, 40)
            for pid in (*workers(lost), lost.pid):
                os.kill(pid, signal.SIGKILL)
            ip(f"-n {other.name} link set link0 down")
            lost.wait()
            time.sleep(2)  # the steps that were being made
            alone.append(2 + wait_for_step(staying, run, last_step(run) + 1))
            yield n_ranks() == 1

            ip(f"-n {other.name} link set link0 up")
            began = time.monotonic()
            returned = start(run, flags, launchers[1], output=output)
            while staying.poll() is None and returned.poll() is None and n_ranks() != 2:
                time.sleep(0.1)
            back.append(time.monotonic() - began)
            wait_for_step(staying, run, last_step(run) + 20)
            for process in (staying, returned):
                process.send_signal(signal.SIGTERM)
                process.wait()
            yield is_saved(run) and n_ranks() == 2
    print(f"      one node alone after {median(alone):.0f} s, both again after {median(back):.0f} s")


def flaky_links(n: int) -> Iterator[bool]:
    """two nodes whose link takes 50 ms and loses one packet of a hundred: the bits are those of a run without it"""
    near = finish("near", "--stop_at 10", TORCHRUN)
    for i in range(n):
        with flaky_nodes(0.05, 0.01) as nodes:
            ranks = [start(f"far{i}", "--stop_at 10", node.torchrun("2")) for node in nodes]
            for rank in ranks:
                rank.communicate()
        yield [rank.returncode for rank in ranks] == [0, 0] and same(newest(f"far{i}"), near)


def outcome(read: Callable) -> str:
    """"read", "refused" with one sentence and status 2, or what happened instead."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
            with prepare.exit_on(ValueError):  # as the scripts do
                read()
        return "read"
    except SystemExit as end:
        last = told.getvalue().strip().rpartition("\n")[2]
        return "refused" if end.code == 2 and last.count(": error: ") == 1 else f"status {end.code}: {last}"
    except BaseException as error:  # noqa: BLE001
        return f"{type(error).__name__}: {str(error)[:200]}"


def mutants(whole: bytes, n: int) -> Iterator[bytes]:
    """Random bytes, the file cut short, bytes and numbers in it changed."""
    digits = [i for i in range(len(whole)) if whole[i : i + 1].isdigit()] or [0]
    for i in range(n):
        changed, at = bytearray(whole), random.choice(digits)
        for _ in range(random.randrange(1, 8)):
            changed[random.randrange(len(whole))] = random.randrange(256)
        number = random.choice([b"99999999999999", b"-1", b"null", b'"x"', b"1e99", b"[]"])
        cut, noise = whole[: random.randrange(len(whole))], random.randbytes(random.randrange(2000))
        yield (noise, cut, bytes(changed), whole[:at] + number + whole[at + 1 :])[i % 4]


def fuzz(n: int) -> Iterator[bool]:
    """a file that is read is damaged, and its SHA-256 made to match: it is read, or refused with one sentence"""
    finish("fuzzed", "--stop_at 1")
    model, tokenizer, *_ = load_model("fuzzed")
    Path("published").mkdir()
    published.save_published(Path("published"), model.config, model.state_dict())
    published.save_published_tokenizer(Path("published"), tokenizer)
    shutil.copy("fuzzed/config.json", "config.json")
    run, folder, data = partial(load_model, "fuzzed"), partial(load_model, "published"), partial(load_dataset, "set")
    readers = [  # a file, what reads it, and the file that holds its SHA-256
        ("fuzzed/step-00000001.pt", run, "fuzzed/step-00000001.json"),
        ("set/train-00000.npy", data, "set/meta.json"),
        ("fuzzed/step-00000001.json", run, os.devnull), ("set/meta.json", data, os.devnull),
        ("config.json", lambda: train.build_config(train.read_settings("config.json")), os.devnull),
        *((f"published/{name}", folder, os.devnull) for name in ("config.json", "model.safetensors", "tokenizer.json")),
    ]
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    counts = Counter()
    for path, read, record in ((Path(name), read, Path(record)) for name, read, record in readers):
        whole, signed = path.read_bytes(), record.read_text()
        for mutant in mutants(whole, -(-n // len(readers))):
            path.write_bytes(mutant)
            digest = f'"{hashlib.sha256(mutant).hexdigest()}"'
            record.write_text(re.sub('"[0-9a-f]{64}"', digest, signed, count=1))
            counts[found := outcome(read)] += 1
            if wrong := found not in ("read", "refused"):
                print(f"      {path}: {found}")
            yield not wrong
        path.write_bytes(whole)
        record.write_text(signed)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"      {counts['read']} harmless, at most {peak:.1f} GB of memory")


FAULTS = {
    "kill": (kills, 50), "save": (killed_saves, 10), "signal": (signals, 20), "rank": (killed_ranks, 3),
    "orphan": (orphans, 3), "node": (lost_nodes, 3), "link": (flaky_links, 3), "fuzz": (fuzz, 2000),
}
ROOT_ONLY = {"node", "link"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (cause, n) in FAULTS.items():
        needs = "; needs root and iproute2" if name in ROOT_ONLY else ""
        what = cause.__doc__.split(":")[0]
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"{what} ({n} times{needs})")
    asked = {name: n for name, n in vars(parser.parse_args()).items() if n is not None}
    bad = 0
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        random.seed(1)
        Path("text.txt").write_text(words(3000))
        with contextlib.redirect_stderr(io.StringIO()):
            prepare.prepare(["text.txt"], "set", "byte", 0.1)
        for name, n in (asked or {name: n for name, (_, n) in FAULTS.items()}).items():
            if name in ROOT_ONLY and (os.geteuid() or not shutil.which("ip")):
                print(f"--{name} needs root and iproute2: left out")
                continue
            cause = FAULTS[name][0]
            wrong = [*cause(n)].count(False)
            told = " ".join(cause.__doc__.split())
            print(f"{'WRONG' if wrong else 'ok   '} {n} x {told}. Otherwise: {wrong}", flush=True)
            bad += bool(wrong)
    sys.exit(bad)


if __name__ == "__main__":
    main()
