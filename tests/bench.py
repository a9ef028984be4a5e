"""Speed on this machine, a row at a time; pytest does not collect this file. Machines are noisy: rows compare what ran
side by side, or set a measurement beside the limit or the prediction of the same run.

    python tests/bench.py                          our own figures, about an hour on two cores
    python tests/bench.py --nanogpt DIR            beside a checkout of nanoGPT (its README's settings are for 3adf61e)
    python tests/bench.py --only quick start       some of them
    python tests/bench.py --only gpu               the row for a machine with an accelerator
    python tests/bench.py --nanogpt DIR --plot tests/curve.png    a picture of held-out loss against seconds instead

Rows about Shakespeare read data/shakespeare, which the README prepares.
"""

import argparse
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from nodes import flaky_nodes, linked_nodes

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import plan
import prepare
import train
from checkpoint import commit, load_checkpoint, write_part
from model import GPT, PRESETS, GPTConfig, generate, to_int8

QUIET = "--eval_every 1000000 --eval_tokens 128 --save_every 1000000 --log_every 1".split()
THREE_MINUTES = "--preset shakespeare --batch_tokens 4096 --steps 490 --weight_decay 0.1 --decay 0.8 --compile"
NANO = "config/train_shakespeare_char.py --device=cpu --dropout=0.0"
NANO_README = f"{NANO} --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4"
NANO_README += " --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000"
Figure = tuple[str, float, float | None]

# ---------------------------------------------------------------------------------------------------------------------
# Processes


def watch(command: list, cwd: Path = ROOT, threads: int | None = None) -> tuple[list[tuple[float, str]], float]:
    """Run a command. Returns what it printed, each line with the second it came at, and its seconds."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(threads or os.cpu_count())}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "encoding": "utf-8", "errors": "replace"}
    command, start = list(map(str, command)), time.monotonic()
    process = subprocess.Popen(command, cwd=cwd, env=env, **pipes)
    lines = [(time.monotonic() - start, line) for line in process.stdout]
    if process.wait():
        sys.exit(f"{' '.join(command)} failed: run it by hand to see why")
    return lines, time.monotonic() - start


def metrics(run: Path) -> list[dict]:
    return [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]


def ours(*arguments, processes=1, threads=None) -> tuple[list[dict], list, float]:
    """Train in a folder of its own. Returns the rows of its metrics, and what watch() returns."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/compiled"  # with --compile, each run compiles anew
        command = [sys.executable, *launcher, "train.py", "--out", f"{folder}/run", *arguments]
        lines, seconds = watch(command, threads=threads)
        return metrics(Path(folder, "run")), lines, seconds


def tokens_per_second(rows: list[dict]) -> float:
    """Median tokens per second, without the first rows."""
    return statistics.median([row["tokens_per_second"] for row in rows if "loss" in row][2:])


class NanoGPT:
    """A copy of a checkout, with Shakespeare prepared as its README says; the text is taken from our data set."""

    def __init__(self, checkout: Path, folder: Path):
        self.folder = shutil.copytree(checkout, folder / "nanogpt")
        _, shards = prepare.load_dataset(ROOT / "data/shakespeare")
        tokens = np.concatenate([*shards["train"], *shards["val"]])
        here = self.folder / "data/shakespeare_char"
        (here / "input.txt").write_bytes(tokens[tokens < 256].astype(np.uint8).tobytes())
        watch([sys.executable, "prepare.py"], here)

    def train(self, flags: str) -> tuple[list[tuple[float, str]], float]:
        return watch([sys.executable, "train.py", *flags.split()], self.folder)

    def speed(self, batch_tokens: int, flags: str) -> float:
        """Median tokens per second, without the first steps."""
        lines, _ = self.train(f"{flags} --eval_iters=1 --eval_interval=1000000 --log_interval=1")
        times = [float(found[1]) / 1000 for _, line in lines if (found := re.search(r"time ([\d.]+)ms", line))]
        return batch_tokens / statistics.median(times[2:])


def curve(lines: list[tuple[float, str]]) -> list[tuple[float, float]]:
    """(seconds, held-out loss) at each evaluation, from either program's output."""
    found = [(seconds, re.search(r"step.* val[_ ]loss ([\d.]+)", line)) for seconds, line in lines]
    return [(seconds, float(match[1])) for seconds, match in found if match]


# ---------------------------------------------------------------------------------------------------------------------
# Rows: each yields its figures, (what was measured, here, and there: by nanoGPT, planned, wanted, or None)


def to_loss(target: float, *flags: str, seconds: float | None = None) -> Iterator[Figure]:
    """Whole processes, one for each of three seeds."""
    runs = [ours(*flags, "--seed", seed) for seed in (1, 2, 3)]
    for loss in sorted([row["val_loss"] for row in rows if "val_loss" in row][-1] for rows, *_ in runs):
        yield "held-out loss", loss, target
    yield "seconds, median", statistics.median(seconds for _, _, seconds in runs), seconds


def quick(nano) -> Iterator[Figure]:
    """Shakespeare to the loss of the CPU command in nanoGPT's README"""
    lines, seconds = nano.train(NANO_README) if nano else ([], None)
    yield from to_loss(curve(lines)[-1][1] if nano else 1.8857, "--preset", "shakespeare-quick", seconds=seconds)


def minutes(nano) -> Iterator[Figure]:
    """Shakespeare to the loss of nanoGPT's README after three minutes on an A100"""
    yield from to_loss(1.4697, *THREE_MINUTES.split(), seconds=180)


def training(rows: list[dict], theirs: dict[str, float]) -> Iterator[Figure]:
    """The speed of a run beside others, and its share of the machine's peak."""
    for name, speed in theirs.items() or [("", None)]:
        yield f"tokens per second{name}", tokens_per_second(rows), speed
    if shares := [row["mfu"] for row in rows if "mfu" in row]:
        yield "share of the peak", statistics.median(shares), None


def throughput(nano) -> Iterator[Figure]:
    """Training GPT-2's shape: 6 layers, 384 channels, context 256, batch 64"""
    shape = "--n_layer 6 --n_head 6 --n_embd 384 --seq_len 256 --norm layer --norm_eps 1e-5 --position learned"
    shape += " --no-qk_norm --no-gated --activation gelu --tied --data data/shakespeare --optimizer adamw"
    rows = ours(*shape.split(), "--batch_tokens", 64 * 256, "--steps", 6, *QUIET)[0]
    config = f"{NANO} --max_iters=6 --compile="
    kinds = {"": "False", ", there compiled": "True"} if nano else {}
    yield from training(rows, {name: nano.speed(64 * 256, config + compiled) for name, compiled in kinds.items()})


NANO_SAMPLES = """
import timeit, torch
from model import GPT, GPTConfig
model, prompt = GPT(GPTConfig()).eval(), torch.zeros(1, 16, dtype=torch.long)
model.generate(prompt, 2)
print(256 / timeit.timeit(lambda: model.generate(prompt, 256), number=1))
"""


def sampled(model: GPT, streams: int) -> float:
    """Tokens per second, all streams together."""
    tokens = generate(model, torch.zeros(streams, 16, dtype=torch.long, device=model.embedding.weight.device))
    next(tokens)
    start = time.perf_counter()
    for ids in islice(tokens, 255):
        ids.tolist()  # waits for an accelerator, as whoever prints them does
    return 255 * streams / (time.perf_counter() - start)


def sampling(nano) -> Iterator[Figure]:
    """Sampling GPT-2 124M, 256 tokens after 16: tokens per second"""
    theirs = float(watch([sys.executable, "-c", NANO_SAMPLES], nano.folder)[0][-1][1]) if nano else None
    model = GPT(GPTConfig(**PRESETS["gpt2"])).eval()
    matrices = [p.detach() for name, p in model.named_parameters() if p.ndim == 2 and "positions" not in name]
    products = [(matrix, torch.ones(matrix.size(1))) for matrix in matrices]  # each reads its matrix once
    reading = statistics.median(timeit.repeat(lambda: [m @ v for m, v in products], number=1, repeat=9))
    one = sampled(model, 1)
    yield "one stream, beside the speed of reading the weights", one, 1 / reading
    yield "one stream", one, theirs
    yield "8 streams", sampled(model, 8), theirs
    to_int8(model)
    yield "one stream, --int8", sampled(model, 1), theirs


def gpu(nano) -> Iterator[Figure]:
    """GPT-2 124M on an accelerator in bfloat16, compiled; then Shakespeare to 1.4697"""
    if not torch.accelerator.is_available():
        sys.exit("the row gpu needs an accelerator, and torch finds none here")
    device, theirs = torch.accelerator.current_accelerator(), {}
    if nano:
        (folder := nano.folder / "data/random").mkdir()
        for split in ("train", "val"):
            np.random.default_rng(0).integers(0, 50257, 10**7).astype(np.uint16).tofile(folder / f"{split}.bin")
        flags = f"--dataset=random --wandb_log=False --max_iters=12 --device={device.type} --block_size=1024"
        theirs[""] = nano.speed(524_288, f"{flags} --batch_size=32 --gradient_accumulation_steps=16")
    flags = "--preset gpt2 --data data/stdlib --dtype bfloat16 --compile --micro_batch 32 --steps 12"
    yield from training(ours(*flags.split(), *QUIET)[0], theirs)
    model = GPT(GPTConfig(**PRESETS["gpt2"])).to(device, torch.bfloat16).eval()
    for streams in (1, 8):
        yield f"tokens sampled per second, streams: {streams}", sampled(model, streams), None
    yield from minutes(nano)


def start(nano) -> Iterator[Figure]:
    """From the command to the first step made"""
    runs = [ours("--steps", 1, *QUIET)[1] for _ in range(3)]
    steps = [next(seconds for seconds, line in lines if re.match(r"step +1/", line)) for lines in runs]
    yield "seconds", statistics.median(steps), 3
    imports = [watch([sys.executable, "-c", "import torch"])[1] for _ in range(3)]
    yield "seconds to import torch", statistics.median(imports), None


def network(nano) -> Iterator[Figure]:
    """Two nodes behind a bad link, seconds of a step, beside the plan (needs root and iproute2)"""
    flags = ["--steps", "12", "--log_every", "1", "--eval_tokens", "128", "--dtype", "float32"]
    config = train.build_config({"vocab_size": 4096, "dtype": "float32"})
    compute = config.batch_tokens / tokens_per_second(ours(*flags, processes=2, threads=1)[0])
    yield "without the link", compute, None
    with torch.device("meta"):
        model = GPT(config)
    for name, bits, link, delay in (
        ("100 Mbit/s", 1e8, linked_nodes(1e8), plan.HOP_SECONDS),
        ("1 Gbit/s", 1e9, linked_nodes(1e9), plan.HOP_SECONDS),
        ("50 ms and 1% of packets lost", 1e9, flaky_nodes(0.05, 0.01), 0.05),
    ):
        with link as nodes, tempfile.TemporaryDirectory() as folder:
            commands = [[*node.torchrun("2"), ROOT / "train.py", "--out", f"{folder}/run", *flags] for node in nodes]
            with ThreadPoolExecutor(2) as both:
                list(both.map(partial(watch, threads=1), commands))
            measured = config.batch_tokens / tokens_per_second(metrics(Path(folder, "run")))
        plan.HOP_SECONDS = delay
        yield name, measured, compute + plan.traffic_seconds(model, config, 2, bits / 8, compute)[1]


def checkpoint(nano) -> Iterator[Figure]:
    """A checkpoint of 4.3 GB"""
    state = dict.fromkeys(("config", "optimizer", "tokenizer", "data"), {}) | {"step": 1}
    state["model"] = {f"layer {i}": torch.ones(2**24) for i in range(64)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # no other row takes as much
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        commit(Path(folder), 1, [write_part(Path(folder), 1, state, 0, 1, "")], keep=1)
        yield "seconds to save", time.monotonic() - start, None
        yield "MB of memory to save", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3, None
        start = time.monotonic()
        load_checkpoint(folder)
        yield "seconds to read and verify", time.monotonic() - start, None


ROWS = {row.__name__: row for row in (start, quick, throughput, sampling, network, checkpoint, minutes, gpu)}


def plot(path: Path, nano: NanoGPT | None) -> None:
    """Held-out loss against seconds since the command was given, evaluations included."""
    import matplotlib.pyplot as plt

    runs = {"nanoGPT, its README on a CPU": nano.train(NANO_README)[0]} if nano else {}
    for preset, every in (("shakespeare-quick", 10), ("shakespeare", 40)):
        runs[f"nanofactory, --preset {preset}"] = ours("--preset", preset, "--eval_every", every)[1]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, lines in runs.items():
        seconds, losses = zip(*curve(lines))
        axes.plot(seconds, losses, marker=".", label=name)
        print(f"{name}: {losses[-1]:.4f} after {seconds[-1]:.1f} s, with {len(losses)} evaluations")
    axes.set(xscale="log", xlabel="seconds, whole process", ylabel="held-out loss, nats per byte", ylim=(None, 2.6))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=ROWS, default=list(ROWS)[:-1], help="rows (all but gpu)")
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="a checkout of nanoGPT to run beside ours")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw curves (needs matplotlib)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        nano = NanoGPT(args.nanogpt.resolve(), Path(folder)) if args.nanogpt else None
        if args.plot:
            return plot(args.plot, nano)
        print("| work | nanofactory | nanoGPT, plan, limit or target | ratio |\n|---|---|---|---|")
        for name in args.only:
            for what, here, there in ROWS[name](nano):
                beside = f"{there:,.5g} | {here / there:.3g}" if there else " | "
                print(f"| {ROWS[name].__doc__}: {what} | {here:,.5g} | {beside} |", flush=True)


if __name__ == "__main__":
    main()
