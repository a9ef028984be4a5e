"""What each step from GPT-2 to today's model bought, at equal tokens: the last column in model.py's docstring.

    python tests/ablation.py            about an hour on two cores; --steps 20 to see it run

One row adds one change to the row above it and keeps all others. Each row tries a few learning rates with seed 1, then
trains the best one with three seeds: an optimizer or a norm is judged at the rate that suits it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
GPT2 = "--norm layer --norm_eps 1e-5 --bias --position learned --no-gated --activation gelu_tanh --no-qk_norm --tied"
STEPS_TO_TODAY = [
    ("GPT-2", f"{GPT2} --n_kv_head 4 --optimizer adamw"),
    ("RMSNorm, no biases", "--norm rms --norm_eps 1e-6 --no-bias"),
    ("rotary positions", "--position rope"),
    ("SwiGLU", "--gated --activation silu"),
    ("QK-norm", "--qk_norm"),
    ("untied head", "--no-tied"),
    ("Muon", "--optimizer muon --momentum 0.95"),
]
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
SEEDS = (1, 2, 3)


def train(out: Path, flags: list[str]) -> tuple[float, str]:
    """Train on one thread, or take the result of an earlier try. Returns val_loss and the printed parameter count."""
    if not (out / "printed.txt").exists():
        command = [sys.executable, str(ROOT / "train.py"), "--out", str(out), *flags]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        printed = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout
        (out / "printed.txt").write_text(printed, encoding="utf-8")
    rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    printed = (out / "printed.txt").read_text(encoding="utf-8")
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    return losses[-1], printed.partition("model    ")[2].partition(" parameters")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=280, help="optimizer steps of each run (%(default)s)")
    parser.add_argument("--data", default="data/stdlib", help="data set, prepared where need be (%(default)s)")
    parser.add_argument("--out", default="runs/ablation", help="folder of the runs (%(default)s)")
    args = parser.parse_args()
    if not Path(args.data, "meta.json").exists():
        subprocess.run([sys.executable, str(ROOT / "prepare.py"), "--out", args.data], check=True)
    common = ["--data", args.data, "--steps", str(args.steps), "--eval_every", str(args.steps)]

    def run(row: int, rate: float, seed: int) -> tuple[float, str]:
        changes = " ".join(flags for _, flags in STEPS_TO_TODAY[: row + 1]).split()
        flags = [*common, *changes, "--lr", str(rate), "--seed", str(seed), "--save_every", str(args.steps)]
        return train(Path(args.out, f"{row}-{rate}-{seed}"), flags)

    print("| added | parameters | lr | val_loss, mean | worst - best seed | bought |\n|---|---|---|---|---|---|")
    before = None
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for row, (name, _) in enumerate(STEPS_TO_TODAY):
            tried = list(pool.map(lambda rate, row=row: run(row, rate, SEEDS[0])[0], RATES))
            rate = RATES[tried.index(min(tried))]
            results = list(pool.map(lambda seed, row=row, rate=rate: run(row, rate, seed), SEEDS))
            losses = [loss for loss, _ in results]
            mean, spread = statistics.mean(losses), max(losses) - min(losses)
            bought = f"{before - mean:.3f}" if before is not None else ""
            print(f"| {name} | {results[0][1]} | {rate:g} | {mean:.3f} | {spread:.3f} | {bought} |", flush=True)
            before = mean


if __name__ == "__main__":
    main()
