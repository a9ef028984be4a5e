"""Faults, many times each, and what became of them: the table in the README. pytest does not collect this file.

    python tests/faults.py                          all of them, about half an hour on two cores
    python tests/faults.py --kill 50 --fuzz 2000    these two

Each line says how often a fault was caused and how often it ended otherwise than it should; the exit status is the
number of such lines.
"""

import argparse
import contextlib
import hashlib
import io
import json
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
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from conftest import ROOT, TINY, words, workers
from nodes import flaky_nodes, linked_nodes

import prepare
import published
import train
from checkpoint import load_checkpoint
from published import load_model

QUICK = [*TINY, "--data", "set", "--eval_every", "1000000", "--log_every", "1", "--dropout", "0.1"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
RESTARTS = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def start(*arguments, torchrun: list[str] | None = None, node: list[str] | None = None) -> subprocess.Popen:
    launcher = node or ([sys.executable] if torchrun is None else TORCHRUN + torchrun)
    command = [*launcher, str(ROOT / "train.py"), *QUICK, *map(str, arguments)]
    output = open("nodes.log", "ab") if node else subprocess.PIPE
    return subprocess.Popen(command, env=RESTARTS, stdout=output, stderr=subprocess.STDOUT, encoding="utf-8")


def last_step(run: str) -> int:
    try:
        return max(json.loads(row)["step"] for row in Path(run, "metrics.jsonl").read_text().split("\n")[:-1])
    except (OSError, ValueError):
        return 0


def n_ranks() -> int:
    """The number of ranks that the nodes last announced."""
    return int(re.findall(r"^ranks +(\d+) on", Path("nodes.log").read_text(errors="replace"), re.MULTILINE)[-1])


def wait_for_step(process: subprocess.Popen, run: str, step: int) -> None:
    while process.poll() is None and last_step(run) < step:
        time.sleep(0.01)


def newest(run: str) -> dict:
    with contextlib.redirect_stderr(io.StringIO()):
        return load_checkpoint(run)[0]


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[kind][name], b[kind][name]) for kind in ("model", "optimizer") for name in a[kind])


def straight(steps: int) -> dict:
    shutil.rmtree("straight", ignore_errors=True)
    start("--out", "straight", "--steps", steps).communicate()
    return newest("straight")


def kills(n: int) -> tuple[int, str]:
    """kill -9 at random instants of a run that saves at each step, which is resumed each time."""
    lost = step = 0
    for _ in range(n):
        process = start("--out", "killed", "--steps", 100 * n, "--save_every", 1, "--resume", "--stop_at", 100 * n)
        wait_for_step(process, "killed", step + 2)
        time.sleep(random.uniform(0, 0.3))
        process.kill()
        process.communicate()
        lost += newest("killed")["step"] < last_step("killed") - 2  # one is being written, one being computed
        step = newest("killed")["step"]
    start("--out", "killed", "--resume", "--steps", 100 * n, "--stop_at", step + 1).communicate()
    start("--out", "straight", "--steps", 100 * n, "--stop_at", step + 1).communicate()
    equal = same(newest("killed"), newest("straight"))
    return lost + (not equal), f"{n} kills: {lost} checkpoints lost; step {step + 1} bit for bit as without: {equal}"


def resumes(n: int) -> tuple[int, str]:
    """Stop and resume n times, across the end of an epoch."""
    for i in range(n):
        start("--out", "resumed", "--steps", 10 * n, "--stop_at", 10 * (i + 1), "--resume").communicate()
    equal = same(newest("resumed"), straight(10 * n))
    return not equal, f"{n} resumes: same final bits as a straight run: {equal}"


def flips(n: int) -> tuple[int, str]:
    """Flip one bit of the newest checkpoint."""
    start("--out", "flipped", "--steps", 2, "--save_every", 1).communicate()
    path = Path("flipped/step-00000002.pt")
    whole, missed = path.read_bytes(), 0
    for _ in range(n):
        damaged = bytearray(whole)
        damaged[random.randrange(len(whole))] ^= 1 << random.randrange(8)
        path.write_bytes(damaged)
        missed += newest("flipped")["step"] != 1
    return missed, f"{n} flipped bits: {n - missed} noticed, the checkpoint before taken"


def signals(n: int) -> tuple[int, str]:
    """SIGTERM or SIGINT to torchrun, SIGUSR1 to one of two ranks, at random instants."""
    wrong = 0
    for i in range(n):
        shutil.rmtree("signalled", ignore_errors=True)
        process = start("--out", "signalled", "--steps", 10**6, "--save_every", 10**6, torchrun=[])
        wait_for_step(process, "signalled", 3)
        time.sleep(random.uniform(0, 0.2))
        number = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)[i % 3]
        os.kill(workers(process)[i % 2] if number == signal.SIGUSR1 else process.pid, number)
        process.communicate()
        wrong += newest("signalled")["step"] != last_step("signalled")
    return wrong, f"{n} signals: {n - wrong} times all ranks saved the step that they had made"


def killed_ranks(n: int) -> tuple[int, str]:
    """kill -9 one rank of two; torchrun restarts both."""
    wrong, seconds, wanted = 0, [], straight(120)
    flags = ["--out", "restarted", "--steps", 120, "--save_every", 5, "--resume"]
    for i in range(n):
        shutil.rmtree("restarted", ignore_errors=True)
        process = start(*flags, torchrun=["--max-restarts=3"])
        wait_for_step(process, "restarted", 20)
        os.kill(workers(process)[i % 2], signal.SIGKILL)
        began = time.monotonic()
        wait_for_step(process, "restarted", last_step("restarted") + 1)
        seconds.append(time.monotonic() - began)
        process.communicate()
        state = newest("restarted")
        close = [torch.allclose(state["model"][name], wanted["model"][name], atol=0.1) for name in wanted["model"]]
        wrong += process.returncode != 0 or state["step"] != 120 or not all(close)
    return wrong, f"{n} killed ranks: {n - wrong} runs completed; back at work after {sorted(seconds)[n // 2]:.0f} s"


def orphans(n: int) -> tuple[int, str]:
    """kill -9 torchrun itself: its ranks save and leave."""
    left = 0
    for _ in range(n):
        shutil.rmtree("orphaned", ignore_errors=True)
        process = start("--out", "orphaned", "--steps", 10**6, torchrun=[])
        wait_for_step(process, "orphaned", 5)
        ranks = workers(process)
        process.kill()
        time.sleep(10)
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                left += 1
        process.communicate()
        left += newest("orphaned")["step"] != last_step("orphaned")
    return left, f"{n} killed torchruns: {left} ranks left after 10 s, or steps lost"


def lost_nodes(n: int) -> tuple[int, str]:
    """Kill all processes of one node of two and cut its link; later start it again (needs root and iproute2)."""
    flags = ["--out", "left", "--steps", 10**6, "--save_every", 20, "--resume", "--timeout", 10]
    wrong, alone, back = 0, [], []
    for _ in range(n):
        shutil.rmtree("left", ignore_errors=True)
        with linked_nodes(1e9) as (head, other):
            launchers = [node.torchrun("1:2", "--max-restarts=3") for node in (head, other)]
            Path("nodes.log").unlink(missing_ok=True)
            staying, lost = (start(*flags, node=launcher) for launcher in launchers)
            wait_for_step(staying, "left", 40)
            for pid in (*workers(lost), lost.pid):
                os.kill(pid, signal.SIGKILL)
            other.ip("-n {name} link set link0 down")
            lost.wait()
            began = time.monotonic()
            time.sleep(2)  # the steps that were being made
            wait_for_step(staying, "left", last_step("left") + 1)
            alone.append(time.monotonic() - began)
            wrong += n_ranks() != 1

            other.ip("-n {name} link set link0 up")
            began = time.monotonic()
            returned = start(*flags, node=launchers[1])
            while staying.poll() is None and returned.poll() is None and n_ranks() != 2:
                time.sleep(0.1)
            back.append(time.monotonic() - began)
            wait_for_step(staying, "left", last_step("left") + 20)
            for process in (staying, returned):
                process.send_signal(signal.SIGTERM)
                process.wait()
            wrong += newest("left")["step"] != last_step("left") or n_ranks() != 2
    times = f"one node alone after {sorted(alone)[n // 2]:.0f} s, both again after {sorted(back)[n // 2]:.0f} s"
    return wrong, f"{n} lost nodes: {times}"


def flaky_links(n: int) -> tuple[int, str]:
    """Train on two nodes whose link takes 50 ms and loses one packet of a hundred (needs root and iproute2)."""
    start("--out", "near", "--steps", 10, torchrun=[]).communicate()
    wrong = 0
    for _ in range(n):
        shutil.rmtree("far", ignore_errors=True)
        with flaky_nodes(0.05, 0.01) as nodes:
            ranks = [start("--out", "far", "--steps", 10, node=node.torchrun("2")) for node in nodes]
            statuses = [rank.wait() for rank in ranks]
        wrong += statuses != [0, 0] or not same(newest("far"), newest("near"))
    return wrong, f"{n} runs over a link of 50 ms that loses 1%: {n - wrong} ended with the bits of one without it"


def strays(run: str) -> list[Path]:
    """Files of checkpoints that no JSON names."""
    records = [json.loads(path.read_text()) for path in Path(run).glob("step-*.json")]
    named = {part["file"] for record in records for part in record.get("parts", [record])}
    return [path for path in Path(run).glob("step-*.pt*") if path.name not in named]


def wait_for_save(process: subprocess.Popen, run: str, step: int) -> list[int]:
    """Wait until a checkpoint after `step` is being written. Returns the process ids of the ranks."""
    wait_for_step(process, run, step)
    ranks = workers(process)
    while process.poll() is None and not any(Path(run).glob("*.partial")):
        pass
    return ranks


def killed_saves(n: int) -> tuple[int, str]:
    """kill -9 one of two ranks that share a model in a save: the one before is whole, and what is left goes."""
    flags = ["--shard", 2, "--steps", 10**6, "--save_every", 1, "--eval_every", 2]
    lost = step = left = 0
    for i in range(n):
        process = start("--out", "parts", *flags, "--resume", torchrun=[])
        os.kill(wait_for_save(process, "parts", step + 4)[i % 2], signal.SIGKILL)
        process.communicate()
        lost += newest("parts")["step"] < last_step("parts") - 3
        newest("parts/best.json")  # raises ValueError if it is not whole
        left += bool(strays("parts"))
        step = newest("parts")["step"]
    for run in ("parts", "whole"):
        start("--out", run, *flags, "--resume", "--stop_at", step + 1, torchrun=[]).communicate()
    equal = same(newest("parts"), newest("whole")) and not strays("parts")
    told = f"{lost} checkpoints lost, {left} times files to remove; step {step + 1} bit for bit as without: {equal}"
    return lost + (not equal), f"{n} ranks killed in a save: {told}"


def full_disks(n: int) -> tuple[int, str]:
    """One of two ranks that share a model cannot write: no checkpoint counts until it can."""
    wrong = 0
    for _ in range(n):
        shutil.rmtree("full", ignore_errors=True)
        process = start("--out", "full", "--shard", 2, "--steps", 10**6, "--save_every", 5, torchrun=[])
        wait_for_step(process, "full", 12)
        rank = workers(process)[1]  # not 0, which also writes the log
        resource.prlimit(rank, resource.RLIMIT_FSIZE, (1000, -1))
        wait_for_step(process, "full", (step := last_step("full")) + 20)
        wrong += not 5 <= newest("full")["step"] <= step + 1
        resource.prlimit(rank, resource.RLIMIT_FSIZE, (-1, -1))
        wait_for_step(process, "full", last_step("full") + 10)
        wrong += newest("full")["step"] <= step + 1
        process.terminate()
        process.communicate()
        wrong += newest("full")["step"] != last_step("full") or bool(strays("full"))
    return wrong, f"{n} disks that were full for one of two ranks: {wrong} checkpoints with a missing or torn part"


def old_parts(n: int) -> tuple[int, str]:
    """Stop one of two ranks in a save, go on without it, then let it finish: no part of another attempt counts."""
    wrong, flags = 0, ["--out", "old", "--shard", 2, "--steps", 10**6, "--save_every", 1, "--resume", "--stop_at"]
    for _ in range(n):
        shutil.rmtree("old", ignore_errors=True)
        process = start(*flags, 10**6, torchrun=[])
        others, stopped = wait_for_save(process, "old", 5)
        os.kill(stopped, signal.SIGSTOP)
        for pid in (process.pid, others):
            os.kill(pid, signal.SIGKILL)
        stop_at = newest("old")["step"] + 5
        start(*flags, stop_at, torchrun=[]).communicate()
        state = newest("old")
        for i, part in enumerate(Path("old").glob(f"step-{stop_at - 1:08d}*.pt"), 1):  # as if of the newest step
            shutil.copy(part, f"old/step-{stop_at:08d}.{i}-of-2.0123abcd.pt")
        os.kill(stopped, signal.SIGCONT)
        process.communicate()  # which ends with the last that holds the pipe
        wrong += state["step"] != stop_at or not same(newest("old"), state)
        start(*flags, stop_at + 1, torchrun=[]).communicate()
        wrong += newest("old")["step"] != stop_at + 1 or bool(strays("old"))
    return wrong, f"{n} ranks that came back with parts of another attempt: {wrong} times one of them counted or stayed"


def prepares(n: int) -> tuple[int, str]:
    """kill -9 prepare.py at random instants: no data set, or a whole one."""
    Path("long.txt").write_text(Path("text.txt").read_text() * 200)
    command, half = [sys.executable, str(ROOT / "prepare.py"), "long.txt", "--out", "cut", "--tokenizer", "byte"], 0
    for _ in range(n):
        shutil.rmtree("cut", ignore_errors=True)
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        time.sleep(random.uniform(0.2, 2))
        process.kill()
        process.wait()
        if Path("cut/meta.json").exists():
            prepare.load_dataset("cut")
        else:
            half += not refused(lambda: prepare.load_dataset("cut"))
    return half, f"{n} killed preparations: {half} half data sets accepted"


def refused(read: Callable) -> bool:
    """Whether a reader ends the program with one sentence and status 2."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
            with prepare.exit_on(ValueError):  # as the scripts do
                read()
    except SystemExit as end:
        return end.code == 2 and told.getvalue().splitlines()[-1].count(": error: ") == 1
    return False


def mutants(whole: bytes, n: int) -> Iterator[bytes]:
    """Random bytes, the file cut short, bytes and numbers in it changed."""
    digits = [i for i in range(len(whole)) if whole[i : i + 1].isdigit()] or [0]
    for i in range(n):
        cut = random.randrange(len(whole))
        if i % 4 == 0:
            yield random.randbytes(random.randrange(2000))
        elif i % 4 == 1:
            yield whole[:cut]
        elif i % 4 == 2:
            changed = bytearray(whole)
            for _ in range(random.randrange(1, 8)):
                changed[random.randrange(len(whole))] = random.randrange(256)
            yield bytes(changed)
        else:
            at = random.choice(digits)
            other = random.choice([b"99999999999999", b"-1", b"null", b'"x"', b"1e99", b"[]"])
            yield whole[:at] + other + whole[at + 1 :]


def fuzz(n: int) -> tuple[int, str]:
    """Damage each file that is read, its SHA-256 made to match again: it is read, or refused with one sentence."""
    start("--out", "fuzzed", "--steps", 1).communicate()
    model, tokenizer, *_ = load_model("fuzzed")
    Path("published").mkdir()
    published.save_published(Path("published"), model.config, model.state_dict())
    published.save_published_tokenizer(Path("published"), tokenizer)
    shutil.copy("fuzzed/config.json", "config.json")
    data = partial(prepare.load_dataset, "set")
    run, folder = partial(load_model, "fuzzed"), partial(load_model, "published")
    readers = [  # a file, what reads it, and the file that holds its SHA-256
        ("fuzzed/step-00000001.pt", run, "fuzzed/step-00000001.json"), ("fuzzed/step-00000001.json", run, None),
        ("set/train-00000.npy", data, "set/meta.json"), ("set/meta.json", data, None),
        ("config.json", lambda: train.build_config(train.read_settings("config.json")), None),
        *((f"published/{name}", folder, None) for name in ("config.json", "model.safetensors", "tokenizer.json")),
    ]
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    wrong = accepted = 0
    for name, read, record in readers:
        path, whole, signed = Path(name), Path(name).read_bytes(), record and Path(record).read_text()
        for mutant in mutants(whole, -(-n // len(readers))):
            path.write_bytes(mutant)
            if record:
                digest = f'"{hashlib.sha256(mutant).hexdigest()}"'
                Path(record).write_text(re.sub('"[0-9a-f]{64}"', digest, signed, count=1))
            try:
                accepted += not refused(read)
            except BaseException as error:  # noqa: BLE001
                wrong += 1
                print(f"  {path}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
        path.write_bytes(whole)
        if record:
            Path(record).write_text(signed)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return wrong, f"{n} damaged files: {wrong} tracebacks, {accepted} harmless, at most {peak:.1f} GB of memory"


FAULTS = {
    "kill": (kills, 50), "resume": (resumes, 10), "flip": (flips, 100), "signal": (signals, 20),
    "rank": (killed_ranks, 3), "orphan": (orphans, 3), "node": (lost_nodes, 3), "link": (flaky_links, 3),
    "save": (killed_saves, 10), "full": (full_disks, 3), "old": (old_parts, 3),
    "prepare": (prepares, 20), "fuzz": (fuzz, 2000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (cause, n) in FAULTS.items():
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"{cause.__doc__.split(':')[0]} ({n} times)")
    asked = {name: n for name, n in vars(parser.parse_args()).items() if n is not None}
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        random.seed(1)
        Path("text.txt").write_text(words(3000))
        with contextlib.redirect_stderr(io.StringIO()):
            prepare.prepare(["text.txt"], "set", "byte", 0.1)
        for name, n in (asked or {name: n for name, (_, n) in FAULTS.items()}).items():
            if name in ("node", "link") and (os.geteuid() or not shutil.which("ip")):
                print(f"--{name} needs root and iproute2: left out")
                continue
            wrong, told = FAULTS[name][0](n)
            print(f"{'WRONG ' if wrong else 'ok    '}{told}", flush=True)
            bad += bool(wrong)
        os.chdir(ROOT)
    sys.exit(bad)


if __name__ == "__main__":
    main()
