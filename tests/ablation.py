"""What today's model loses when one thing is taken back to GPT-2's way: the last column in model.py's docstring.

    python tests/ablation.py            about 50 minutes on two cores; --steps 20 to see it run

A norm or an optimizer is judged at the learning rate that suits it: from the default, each row doubles and halves the
rate with seed 1 for as long as that helps, then trains at the best rate with three seeds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from published import load_model  # noqa: E402
from train import Config  # noqa: E402

TAKEN_BACK = [
    ("nothing", ""), ("norm: LayerNorm, biases", "--norm layer --norm_eps 1e-5 --bias"),
    ("positions: learned", "--position learned"), ("attention: no QK-norm", "--no-qk_norm"),
    ("MLP: GELU, not gated", "--no-gated --activation gelu_tanh"), ("head: tied", "--tied"),
    ("optimizer: AdamW", "--optimizer adamw"),
]


@cache
def val_loss(out: Path, *flags: str) -> float:
    """Train on one thread, or go on with an earlier try."""
    command = [sys.executable, ROOT / "train.py", "--resume", "--out", out, *flags]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.DEVNULL)
    rows = map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [row["val_loss"] for row in rows if "val_loss" in row][-1]


def measure(args: argparse.Namespace, row: int) -> tuple[int, float, list[float]]:
    """The number of parameters, the best learning rate, and the loss with each seed."""
    flags = [f"--{name}={args.steps}" for name in ("steps", "eval_every", "save_every")] + TAKEN_BACK[row][1].split()

    def out(rate: float, seed: int) -> Path:
        return Path(args.out, f"{row}-{rate}-{seed}-{args.steps}")

    def loss(rate: float, seed: int = 1) -> float:
        return val_loss(out(rate, seed), *flags, "--lr", str(rate), "--seed", str(seed))

    best = Config.lr
    for factor in (2, 0.5):
        while loss(best * factor) < loss(best):
            best *= factor
    return load_model(out(best, 1))[0].n_params(), best, [loss(best, seed) for seed in (1, 2, 3)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=280, help="optimizer steps of each run (%(default)s)")
    parser.add_argument("--out", default="runs/ablation", help="folder of the runs (%(default)s)")
    args = parser.parse_args()
    print("| taken back | parameters | lr | val_loss, mean | worst - best seed | lost |\n|---|---|---|---|---|---|")
    default, rows = None, range(len(TAKEN_BACK))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (name, _), (size, rate, losses) in zip(TAKEN_BACK, pool.map(partial(measure, args), rows)):
            mean, spread = statistics.mean(losses), max(losses) - min(losses)
            default = default or mean
            print(f"| {name} | {size:,} | {rate:g} | {mean:.3f} | {spread:.3f} | {mean - default:.3f} |", flush=True)


if __name__ == "__main__":
    main()
