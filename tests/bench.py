"""Speed on this machine, a row at a time; pytest does not collect this file. Machines are noisy: rows compare what ran
side by side, or set a measurement beside the limit or the prediction of the same run.

    python tests/bench.py               all rows, about half an hour on two cores
    python tests/bench.py --only plan   one of them
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train

QUIET = ["--eval_every", "1000000", "--eval_tokens", "128", "--save_every", "1000000", "--log_every", "10"]
DENSE = [
    "--n_expert",
    "1",
    "--n_expert_active",
    "1",
    "--n_inner",
    "384",
]  # grok-toy with one expert, of the active size


def run(*arguments: str, processes: int = 1, threads: int = os.cpu_count()) -> tuple[list[dict], float, str]:
    """Train in a folder of its own. Returns the rows of its metrics, the seconds of the process, and its output."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        data = [] if "--data" in arguments else ["--data", str(ROOT / "data/stdlib")]
        command = [sys.executable, *launcher, str(ROOT / "train.py"), *data, "--out", f"{folder}/run", *arguments]
        start = time.monotonic()
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(
            command, env=env, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        seconds = time.monotonic() - start
        path = Path(folder, "run/metrics.jsonl")
        rows = path.read_text().splitlines() if path.exists() else []
        return [json.loads(row) for row in rows], seconds, done.stdout


def speed(rows: list[dict]) -> float:
    """Median tokens per second, without the first rows."""
    return statistics.median([row["tokens_per_second"] for row in rows if "loss" in row][2:])


def limits() -> str:
    peaks = [f"{train.measured_peak(dtype) / 1e9:.0f} GFLOP/s in {dtype}" for dtype in (torch.float32, torch.bfloat16)]
    return f"matrix products on {torch.get_num_threads()} threads: {', '.join(peaks)}"


def start() -> str:
    times = [run("--steps", "1", *QUIET)[1] for _ in range(3)]
    return f"python train.py --steps 1, whole process, with its text at the end: {statistics.median(times):.1f} s"


def plan() -> str:
    """What --plan says of the main job beside what it then takes."""
    said = run("--plan")[2]
    minutes, seconds = re.search(r"time +(\d+):(\d+)", said).groups()
    planned, memory = 60 * int(minutes) + int(seconds), float(re.search(r"memory +([\d.]+)", said)[1])
    taken = run()[1]
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    return (
        f"main job: planned {planned} s, took {taken:.0f} s ({planned / taken:.2f});"
        f" planned {memory:.2f} GB, took {used:.2f} GB ({memory / used:.2f})"
    )


def processes() -> str:
    """Two processes of one thread against one process of two, with the same global batch."""
    flags, ratios = ["--steps", "60", *QUIET], []
    for _ in range(3):
        one, two = run(*flags, threads=2)[0], run(*flags, processes=2, threads=1)[0]
        ratios.append(speed(two) / speed(one))
    return f"2 processes x 1 thread beside 1 x 2: {statistics.median(ratios):.2f} of the tokens/s (3 pairs: {ratios})"


def experts() -> str:
    """Eight experts, two active, against a dense model of the same active size."""
    flags, ratios = ["--preset", "grok-toy", "--steps", "60", *QUIET], []
    for _ in range(3):
        ratios.append(speed(run(*flags)[0]) / speed(run(*flags, *DENSE)[0]))
    return f"8 experts of which 2 run, beside one of their size: {statistics.median(ratios):.2f} of the tokens/s"


def saves() -> str:
    """The share of time in which the loop waits, when it saves about every ten seconds."""
    rows, _, _ = run("--steps", "200", *QUIET, "--save_every", "40")
    stalls = [row["save_stall"] for row in rows if "save_stall" in row]
    seconds = max(row["seconds"] for row in rows if "seconds" in row)
    every = seconds / len(stalls)
    stall = 1000 * statistics.mean(stalls)
    return f"saving every {every:.0f} s: {stall:.0f} ms of stall each, {sum(stalls) / seconds:.2%} of the time"


ROWS = {"limits": limits, "start": start, "plan": plan, "processes": processes, "experts": experts, "saves": saves}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=ROWS, default=list(ROWS), help="rows (all)")
    args = parser.parse_args()
    if not (ROOT / "data/stdlib/meta.json").exists():
        subprocess.run([sys.executable, "prepare.py"], cwd=ROOT, check=True)
    for name in args.only:
        print(f"{name:10} {ROWS[name]()}", flush=True)


if __name__ == "__main__":
    main()
