"""What today's model loses when one thing is taken back to GPT-2's way: the last column in model.py's docstring.

    python tests/ablation.py            about 50 minutes on two cores; --steps 20 to see it run

A norm or an optimizer is judged at the learning rate that suits it: from the default, each row doubles and halves the
rate with seed 1 for as long as that helps, then trains at the best rate with three seeds.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from train import Config  # noqa: E402

TAKEN_BACK = [
    ("nothing", ""), ("norm: LayerNorm, biases", "--norm layer --norm_eps 1e-5 --bias"),
    ("positions: learned", "--position learned"), ("attention: no QK-norm", "--no-qk_norm"),
    ("MLP: GELU, not gated", "--no-gated --activation gelu_tanh"), ("head: tied", "--tied"),
    ("optimizer: AdamW", "--optimizer adamw"),
]
SEEDS = (1, 2, 3)


def train(out: Path, flags: list[str]) -> tuple[float, str]:
    """Train on one thread, or take the result of an earlier try. Returns val_loss and the printed parameter count."""
    if not (out / "printed.txt").exists():
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, str(ROOT / "train.py"), "--out", str(out), *flags]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        printed = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout
        (out / "printed.txt").write_text(printed, encoding="utf-8")
    rows = map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    n_params = (out / "printed.txt").read_text(encoding="utf-8").partition("model    ")[2].partition(" parameters")[0]
    return [row["val_loss"] for row in rows if "val_loss" in row][-1], n_params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=280, help="optimizer steps of each run (%(default)s)")
    parser.add_argument("--data", default="data/stdlib", help="data set, prepared where need be (%(default)s)")
    parser.add_argument("--out", default="runs/ablation", help="folder of the runs (%(default)s)")
    args = parser.parse_args()
    if not Path(args.data, "meta.json").exists():
        subprocess.run([sys.executable, str(ROOT / "prepare.py"), "--out", args.data], check=True)
    common = ["--data", args.data, *(f"--{name}={args.steps}" for name in ("steps", "eval_every", "save_every"))]

    def measure(row: int) -> tuple[str, float, list[float]]:
        """The number of parameters, the best learning rate, and the loss with each seed."""

        def run(rate: float, seed: int) -> tuple[float, str]:
            flags = [*common, *TAKEN_BACK[row][1].split(), "--lr", str(rate), "--seed", str(seed)]
            return train(Path(args.out, f"{row}-{rate}-{seed}"), flags)

        tried = {Config.lr: run(Config.lr, SEEDS[0])[0]}
        for factor in (2, 0.5):
            rate, helps = Config.lr, True
            while helps:
                before, rate = rate, rate * factor
                tried[rate] = run(rate, SEEDS[0])[0]
                helps = tried[rate] < tried[before]
        best = min(tried, key=tried.get)
        results = [run(best, seed) for seed in SEEDS]
        return results[0][1], best, [loss for loss, _ in results]

    print("| taken back | parameters | lr | val_loss, mean | worst - best seed | lost |\n|---|---|---|---|---|---|")
    default = None
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (name, _), (n_params, rate, losses) in zip(TAKEN_BACK, pool.map(measure, range(len(TAKEN_BACK)))):
            mean, spread = statistics.mean(losses), max(losses) - min(losses)
            default = default or mean
            print(f"| {name} | {n_params} | {rate:g} | {mean:.3f} | {spread:.3f} | {mean - default:.3f} |", flush=True)


if __name__ == "__main__":
    main()
