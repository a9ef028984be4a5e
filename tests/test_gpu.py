"""What an accelerator computes, against what a CPU computes. Skipped without one; NANOFACTORY_TEST_DEVICE=cpu runs the
same tests on the CPU, to see that they are right themselves."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, rows
from forked import ACCELERATOR, ENVIRONMENT

import plan
import train
from model import GPT

DEVICE = os.environ.get("NANOFACTORY_TEST_DEVICE", ACCELERATOR and ACCELERATOR.type)
pytestmark = pytest.mark.skipif(not DEVICE, reason="no accelerator here")
EAGER = [*TINY, "--log_every", 1, "--no-compile"]


def start(folder: Path, *command, device: str | None = DEVICE) -> str:
    """Run a Python command on the device, in a process of its own. Returns what it printed."""
    command = [sys.executable, *map(str, command), "--device", device]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """trained("name", *flags) is a run of 20 steps with these settings, made once."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name: str, *flags, device: str = DEVICE, launcher: tuple = ()) -> Path:
        if not (folder / name).exists():
            flags = ["--data", data, "--out", name, *EAGER, "--steps", 20, *flags]
            start(folder, *launcher, ROOT / "train.py", *flags, device=device)
        return folder / name

    return run


KINDS = {
    "today": [], "recompute": ["--recompute"], "experts": ["--n_expert", 4], "documents": ["--document_mask"],
    "cap": ["--attention_cap", 30], "adamw": ["--optimizer", "adamw"],
    "gpt2": "--norm layer --position learned --no-qk_norm --no-gated --activation gelu --bias --tied".split(),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_the_cpu(trained, kind):
    here, there = (trained(f"{kind}-{device}", *KINDS[kind], device=device) for device in (DEVICE, "cpu"))
    for key in ("loss", "val_loss"):
        assert rows(here, key) == pytest.approx(rows(there, key), abs=1e-3)


@pytest.mark.parametrize("how, kind, flags, tolerance", [
    ("compiled", "today", "--compile", 1e-2), ("bfloat16", "today", "--compile --dtype bfloat16", 5e-2),
    ("packed", "documents", "--compile", 1e-2), ("packed, recomputed", "documents", "--compile --recompute", 1e-2),
    ("torchrun", "today", "", 1e-3),  # on CUDA its one rank talks to itself by NCCL
])
def test_losses_are_those_of_an_eager_run_alone_however_it_is_run(trained, how, kind, flags, tolerance):
    launcher = "-m torch.distributed.run --standalone --nproc_per_node 1".split() if how == "torchrun" else ()
    losses = rows(trained(how, *KINDS[kind], *flags.split(), launcher=tuple(launcher)), "loss")
    assert losses == pytest.approx(rows(trained(f"{kind}-{DEVICE}", *KINDS[kind]), "loss"), abs=tolerance)


def test_a_resumed_run_has_the_losses_of_one_that_was_never_stopped(trained):
    half = trained("half", "--stop_at", 10)
    start(half.parent, ROOT / "train.py", "--resume", "--out", half)
    assert rows(half, "loss") == pytest.approx(rows(trained(f"today-{DEVICE}"), "loss"), abs=1e-4)


def test_greedy_text_is_that_of_the_cpu(trained):
    run, flags = trained(f"today-{DEVICE}"), ["--temperature", 0, "--tokens", 40]
    here, there = (start(run.parent, ROOT / "sample.py", run, *flags, device=device) for device in (DEVICE, "cpu"))
    assert here == there != "\n"


@pytest.mark.skipif(DEVICE == "cpu", reason="torch does not count the memory of a CPU")
@pytest.mark.parametrize("more", [[], ["--recompute"]])
def test_the_peak_of_memory_is_the_planned_one(data, tmp_path, more):
    flags = "--preset gpt2 --n_layer 4 --micro_batch 8 --batch_tokens 16384 --dtype bfloat16 --steps 3".split() + more
    config = train.build_config(vars(train.make_parser("").parse_args(flags)))
    with torch.device("meta"):
        planned = sum(plan.memory_parts(GPT(config), config, 1).values())
    code = "import torch, train; train.main(); print('peak', torch.accelerator.max_memory_allocated())"
    printed = start(tmp_path, "-c", code, *flags, "--data", data, "--out", "run")
    assert int(re.search(r"peak (\d+)", printed)[1]) == pytest.approx(planned, rel=0.2)
