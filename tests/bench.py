"""Speed on this machine, a row at a time; pytest does not collect this file. Machines are noisy: rows compare what ran
side by side, or set a measurement beside the limit or the prediction of the same run.

    python tests/bench.py                          our own rows, about an hour on two cores
    python tests/bench.py --nanogpt DIR            beside a checkout of nanoGPT (its README's settings are for 3adf61e)
    python tests/bench.py --only quick start       some of them
    python tests/bench.py --only gpu               the row for a machine with an accelerator
    python tests/bench.py --nanogpt DIR --plot tests/curve.png    a picture of held-out loss against seconds instead

Rows about Shakespeare read data/shakespeare, which the README prepares.
"""

import argparse
import json
import multiprocessing
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
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

QUIET = "--eval_every 1000000 --eval_tokens 128 --save_every 1000000 --log_every 10".split()
THREE_MINUTES = "--preset shakespeare --batch_tokens 4096 --steps 490 --weight_decay 0.1 --decay 0.8 --compile"
NO_OUTPUT = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}

# ---------------------------------------------------------------------------------------------------------------------
# Processes


def watch(command: list[str], cwd: Path, threads: int | None = None) -> tuple[list[tuple[float, str]], float]:
    """Run a command. Returns what it printed, each line with the second it came at, and its seconds."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(threads or os.cpu_count())}
    start = time.monotonic()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "encoding": "utf-8", "errors": "replace"}
    process = subprocess.Popen(list(map(str, command)), cwd=cwd, env=env, **pipes)
    lines = [(time.monotonic() - start, line) for line in process.stdout]
    if process.wait():
        sys.exit(f"{' '.join(map(str, command))} failed: run it by hand to see why")
    return lines, time.monotonic() - start


def metrics(run: Path) -> list[dict]:
    return [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]


def ours(*arguments, processes=1, threads=None) -> tuple[list[dict], list, float]:
    """Train in a folder of its own. Returns the rows of its metrics, and what watch() returns."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *launcher, ROOT / "train.py", "--out", f"{folder}/run", *arguments]
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/compiled"  # with --compile, each run compiles anew
        lines, seconds = watch(command, ROOT, threads)
        return metrics(Path(folder, "run")), lines, seconds


def speed(rows: list[dict]) -> float:
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

    def train(self, *arguments: str) -> tuple[list[tuple[float, str]], float]:
        command = [sys.executable, "train.py", "config/train_shakespeare_char.py", "--device=cpu", *arguments]
        return watch(command, self.folder)

    def readme_on_a_cpu(self) -> tuple[list[tuple[float, str]], float]:
        flags = "--compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4"
        flags += " --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
        return self.train(*flags.split())


def curve(lines: list[tuple[float, str]]) -> list[tuple[float, float]]:
    """(seconds, held-out loss) at each evaluation, from either program's output."""
    found = [(seconds, re.search(r"step.* val[_ ]loss ([\d.]+)", line)) for seconds, line in lines]
    return [(seconds, float(match[1])) for seconds, match in found if match]


# ---------------------------------------------------------------------------------------------------------------------
# Rows: each returns what nanoGPT did ("" without it), what ours did, and the ratio, limit or prediction to hold it to


def to_loss(*flags: str) -> tuple[float, str]:
    """The median seconds of whole processes, one for each seed, and in words what they came to."""
    runs = [ours(*flags, "--seed", seed) for seed in (1, 2, 3)]
    losses = sorted([row["val_loss"] for row in rows if "val_loss" in row][-1] for rows, *_ in runs)
    seconds = statistics.median(seconds for _, _, seconds in runs)
    return seconds, f"{losses[1]:.4f} after {seconds:.1f} s ({losses[0]:.4f} to {losses[2]:.4f} for three seeds)"


def quick(nano) -> tuple[str, str, str]:
    """Shakespeare to a held-out loss of 1.8857, whole process"""
    seconds, told = to_loss("--preset", "shakespeare-quick")
    if not nano:
        return "", told, ""
    lines, theirs = nano.readme_on_a_cpu()
    return f"{curve(lines)[-1][1]:.4f} after {theirs:.1f} s", told, f"{seconds / theirs:.3f} of its time"


def minutes(nano) -> tuple[str, str, str]:
    """Shakespeare to a held-out loss of 1.4697, whole process"""
    return "1.4697 after 3 minutes on an A100, says its README", to_loss(*THREE_MINUTES.split())[1], "target: 180 s"


def shakespeare(nano) -> tuple[str, str, str]:
    """Shakespeare within ten minutes, whole process"""
    return "", to_loss("--preset", "shakespeare", "--compile")[1], "target: 1.40 after 600 s"


def throughput(nano) -> tuple[str, str, str]:
    """Training GPT-2's shape: 6 layers, 384 channels, context 256, batch 64"""
    shape = "--n_layer 6 --n_head 6 --n_embd 384 --seq_len 256 --norm layer --norm_eps 1e-5 --position learned"
    shape += " --no-qk_norm --no-gated --activation gelu --tied --data data/shakespeare --optimizer adamw"
    flags = [*shape.split(), "--batch_tokens", 64 * 256, "--steps", 6, *QUIET, "--log_every", 1]
    rows = ours(*flags)[0]
    reached = speed(rows)
    share = f"{statistics.median(row['mfu'] for row in rows if 'mfu' in row):.0%} of the peak of products"
    if not nano:
        return "", f"{reached:,.0f} tokens/s", share
    theirs = []
    for compiled in (False, True):
        how = ["--dropout=0.0", "--eval_iters=1", "--eval_interval=1000000", "--log_interval=1", "--max_iters=6"]
        lines, _ = nano.train(f"--compile={compiled}", *how)
        times = [float(found[1]) / 1000 for _, line in lines if (found := re.search(r"time ([\d.]+)ms", line))]
        theirs.append(64 * 256 / statistics.median(times[2:]))
    eager, compiled = theirs
    told = f"{eager:,.0f} tokens/s, compiled {compiled:,.0f}"
    return told, f"{reached:,.0f} tokens/s", f"{reached / eager:.2f} x, {reached / compiled:.2f} x compiled; {share}"


NANO_SAMPLES = """
import time, torch
from model import GPT, GPTConfig
model = GPT(GPTConfig()).eval()
model.generate(torch.zeros(1, 16, dtype=torch.long), 2)
start = time.perf_counter()
model.generate(torch.zeros(1, 16, dtype=torch.long), 256)
print(256 / (time.perf_counter() - start))
"""


def sampled(model: GPT, streams: int) -> float:
    """Tokens per second, all streams together."""
    tokens = generate(model, torch.zeros(streams, 16, dtype=torch.long, device=model.embedding.weight.device))
    next(tokens)
    start = time.perf_counter()
    for ids in islice(tokens, 255):
        ids.tolist()  # waits for an accelerator, as whoever prints them does
    return 255 * streams / (time.perf_counter() - start)


def sampling(nano) -> tuple[str, str, str]:
    """Sampling GPT-2 124M: 256 tokens after 16"""
    model = GPT(GPTConfig(**PRESETS["gpt2"])).eval()
    weights = [p.detach() for name, p in model.named_parameters() if p.ndim == 2 and "positions" not in name]
    vectors = [torch.ones(1, weight.size(1)) for weight in weights]
    passes, rates = [], {}
    for _ in range(9):  # a matrix times a vector reads the matrix once
        start = time.perf_counter()
        for vector, weight in zip(vectors, weights):
            torch.nn.functional.linear(vector, weight)
        passes.append(time.perf_counter() - start)
    limit = 1 / statistics.median(passes)
    for kind, streams in (("float32", 1), ("float32", 8), ("int8", 1)):
        if kind == "int8":
            to_int8(model)
        rates[kind, streams] = sampled(model, streams)
    one, eight, int8 = rates.values()
    told = f"{one:.1f} tokens/s, 8 streams {eight:.1f}; with --int8 {int8:.1f}"
    share = f"{one / limit:.0%} of the speed of reading its weights"
    if not nano:
        return "", told, share
    theirs = float(watch([sys.executable, "-c", NANO_SAMPLES], nano.folder)[0][-1][1])
    ratios = f"{one / theirs:.1f} x, 8 streams {eight / theirs:.1f} x; with --int8 {int8 / theirs:.1f} x; {share}"
    return f"{theirs:.1f} tokens/s", told, ratios


def gpu(nano) -> tuple[str, str, str]:
    """GPT-2 124M on an accelerator in bfloat16, compiled: training, and sampling; then Shakespeare to 1.4697"""
    if not torch.accelerator.is_available():
        sys.exit("the row gpu needs an accelerator, and torch finds none here")
    shape = "--preset gpt2 --data data/stdlib --dtype bfloat16 --compile --micro_batch 32 --steps 12".split()
    rows = ours(*shape, *QUIET[:-1], 1)[0]
    reached, shares = speed(rows), [row["mfu"] for row in rows if "mfu" in row]
    share = f"{statistics.median(shares):.0%} of the peak" if shares else "peak unknown"
    device = torch.accelerator.current_accelerator()
    model = GPT(GPTConfig(**PRESETS["gpt2"])).to(device, torch.bfloat16).eval()
    one, eight = sampled(model, 1), sampled(model, 8)
    told = f"{reached:,.0f} tokens/s; sampling {one:.0f}, 8 streams {eight:.0f}; {to_loss(*THREE_MINUTES.split())[1]}"
    if not nano:
        return "", told, share
    (folder := nano.folder / "data/random").mkdir()
    for split in ("train", "val"):
        np.random.default_rng(0).integers(0, 50257, 10**7).astype(np.uint16).tofile(folder / f"{split}.bin")
    how = "--dataset=random --wandb_log=False --eval_iters=1 --log_interval=1 --max_iters=12 --batch_size=32"
    how += f" --gradient_accumulation_steps=16 --block_size=1024 --device={device.type}"
    lines, _ = watch([sys.executable, "train.py", *how.split()], nano.folder)
    times = [float(found[1]) / 1000 for _, line in lines if (found := re.search(r"time ([\d.]+)ms", line))]
    theirs = 524_288 / statistics.median(times[2:])
    return f"{theirs:,.0f} tokens/s", told, f"{reached / theirs:.2f} x; {share}"


def start(nano) -> tuple[str, str, str]:
    """From the command to the first step made"""
    imports, steps = [], []
    for _ in range(3):
        imports.append(watch([sys.executable, "-c", "import torch"], ROOT)[1])
        lines = ours("--steps", 1, *QUIET)[1]
        steps.append(next(seconds for seconds, line in lines if re.match(r"step +1/", line)))
    median = statistics.median
    return "", f"{median(steps):.1f} s, {median(imports):.1f} of them to import torch", "target: 3 s"


def network(nano) -> tuple[str, str, str]:
    """Two nodes behind a bad link: seconds of a step as planned and as measured (needs root and iproute2)"""
    flags = ["--steps", "12", "--log_every", "1", "--eval_tokens", "128", "--dtype", "float32"]
    config = train.build_config({"vocab_size": 4096, "dtype": "float32"})
    compute = config.batch_tokens / speed(ours(*flags, processes=2, threads=1)[0])
    with torch.device("meta"):
        model = GPT(config)
    told, ratios = [], []
    for name, bits, link, delay in (
        ("100 Mbit/s", 1e8, linked_nodes(1e8), plan.HOP_SECONDS),
        ("1 Gbit/s", 1e9, linked_nodes(1e9), plan.HOP_SECONDS),
        ("50 ms and 1% of packets lost", 1e9, flaky_nodes(0.05, 0.01), 0.05),
    ):
        with link as nodes, tempfile.TemporaryDirectory() as folder:
            script = [str(ROOT / "train.py"), "--out", f"{folder}/run", *flags]
            head, other = ([*node.torchrun("2"), *script] for node in nodes)
            with subprocess.Popen(other, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, **NO_OUTPUT):
                watch(head, ROOT, threads=1)
            measured = config.batch_tokens / speed(metrics(Path(folder, "run")))
        plan.HOP_SECONDS = delay
        planned = compute + plan.traffic_seconds(model, config, 2, bits / 8, compute)[1]
        told.append(f"{name}: planned {planned:.2f}, took {measured:.2f}")
        ratios.append(f"{planned / measured:.2f}")
    return "", "; ".join(told), f"{', '.join(ratios)} of the time; {compute:.2f} without the link"


def checkpoint(nano) -> tuple[str, str, str]:
    """Saving and reading a checkpoint of 4.3 GB"""
    state = dict.fromkeys(("config", "optimizer", "tokenizer", "data"), {}) | {"step": 1}
    state["model"] = {f"layer {i}": torch.ones(2**24) for i in range(64)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        commit(Path(folder), 1, [write_part(Path(folder), 1, state, 0, 1, "")], keep=1)
        saved, more = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        load_checkpoint(folder)
        told = f"saved in {saved - start:.1f} s, read and verified in {time.monotonic() - saved:.1f} s"
    return "", told, f"{more / 1e3:.0f} MB of memory to save"


ROWS = {row.__name__: row for row in (
    start, quick, throughput, sampling, network, checkpoint, minutes, shakespeare, gpu,
)}


def plot(path: Path, nano: NanoGPT) -> None:
    """Held-out loss against seconds since the command was given, evaluations included."""
    import matplotlib.pyplot as plt

    runs = {
        "nanoGPT, its README on a CPU": nano.readme_on_a_cpu()[0],
        "nanofactory, --preset shakespeare-quick": ours("--preset", "shakespeare-quick", "--eval_every", 10)[1],
        "nanofactory, --preset shakespeare": ours("--preset", "shakespeare", "--eval_every", 40)[1],
    }
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
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw curves (needs matplotlib, --nanogpt)")
    args = parser.parse_args()
    if args.plot and not args.nanogpt:
        parser.error("--plot draws nanoGPT's curve too: give --nanogpt")
    os.chdir(ROOT)
    if not Path("data/stdlib/meta.json").exists():
        watch([sys.executable, "prepare.py"], ROOT)
    with tempfile.TemporaryDirectory() as folder:
        nano = NanoGPT(args.nanogpt.resolve(), Path(folder)) if args.nanogpt else None
        if args.plot:
            return plot(args.plot, nano)
        print("| work | nanoGPT, or others | nanofactory | ratio, limit or target |\n|---|---|---|---|")
        fresh = {"mp_context": multiprocessing.get_context("spawn"), "max_tasks_per_child": 1}
        with ProcessPoolExecutor(1, **fresh) as pool:  # so that no row's memory counts for the next
            for name in args.only:
                cells = pool.submit(ROWS[name], nano).result()
                print(f"| {ROWS[name].__doc__} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
