"""train.py under torchrun: two processes compute what one computes, and no fault of one of them is silent."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, assert_same, ranks, rows, state_of

import train

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
SMALL = [*TINY, "--dtype", "float32", "--log_every", "1", "--eval_every", "100", "--dropout", "0.1"]


def start(cwd: Path, *arguments, script=ROOT / "train.py", launcher=(), n: int = 2) -> subprocess.Popen:
    command = [*TORCHRUN, f"--nproc_per_node={n}", *launcher, str(script), *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    return subprocess.Popen(command, cwd=cwd, env=env, start_new_session=True, **pipes)


def finish(process: subprocess.Popen, status: int = 0) -> str:
    """What it printed, after it ended as expected; no process stays behind, whatever happens."""
    try:
        printed = process.communicate(timeout=60)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == status, printed
    return printed


def wait_for_step(run: Path, step: int) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        path = run / "metrics.jsonl"
        if path.exists() and any(json.loads(row)["step"] >= step for row in path.read_text().split("\n")[:-1]):
            return
        time.sleep(0.02)
    pytest.fail(f"step {step} was not reached")


def assert_close(one: Path, other: Path, step: int, tolerance: float) -> None:
    """Losses, weights and optimizer state, the same but for rounding."""
    a, b = state_of(one, step), state_of(other, step)
    for kind in ("model", "optimizer"):
        assert a[kind].keys() == b[kind].keys()
        for name, tensor in a[kind].items():
            torch.testing.assert_close(tensor, b[kind][name], atol=tolerance, rtol=tolerance, msg=name)
    assert rows(one, "loss") == pytest.approx(rows(other, "loss"), abs=tolerance)
    assert rows(one, "val_loss")[step] == pytest.approx(rows(other, "val_loss")[step], abs=tolerance)
    assert len(rows(one, "loss")) == step


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_run_that_moves_between_one_process_ddp_and_fsdp_goes_on_as_if_it_had_stayed(call, data, tmp_path, optimizer):
    """With experts, dropout and a tied head."""
    flags = [*SMALL, "--data", data, "--optimizer", optimizer, "--steps", 12, "--lr", 1e-3]
    flags += ["--batch_tokens", 256, "--n_expert", 4, "--n_inner", 32, "--tied"]
    call(train, *flags, "--out", "stayed")
    call(train, *flags, "--out", "moved", "--stop_at", 3)
    finish(start(tmp_path, "--out", "moved", "--resume", "--stop_at", 6))
    finish(start(tmp_path, "--out", "moved", "--resume", "--stop_at", 9, "--shard", 2))
    call(train, "--out", "moved", "--resume", "--shard", 1)
    assert_close(tmp_path / "stayed", tmp_path / "moved", 12, 1e-5)


def test_a_signal_to_one_rank_saves_the_same_step_on_all(data, tmp_path):
    process = start(tmp_path, *SMALL, "--data", data, "--out", "r", "--steps", 10**6)
    wait_for_step(tmp_path / "r", 5)
    os.kill(ranks(process)[1], signal.SIGUSR1)
    printed = finish(process)
    step = max(rows(tmp_path / "r", "loss"))
    assert f"stopped at step {step} and saved" in printed
    assert train.load_checkpoint(tmp_path / "r")[0]["step"] == step


def test_a_killed_rank_is_restarted_and_the_run_ends_as_if_nothing_had_been(data, tmp_path):
    flags = [*SMALL, "--data", data, "--steps", 30, "--save_every", 5]
    straight = start(tmp_path, *flags, "--out", "straight")
    finish(straight)
    process = start(tmp_path, *flags, "--out", "r", "--resume", launcher=["--max-restarts=2"])
    wait_for_step(tmp_path / "r", 12)
    os.kill(ranks(process)[1], signal.SIGKILL)
    assert "resuming r/step-" in finish(process)
    assert_same(state_of(tmp_path / "straight", 30)["model"], state_of(tmp_path / "r", 30)["model"])
    assert_same(state_of(tmp_path / "straight", 30)["optimizer"], state_of(tmp_path / "r", 30)["optimizer"])
    assert rows(tmp_path / "r", "loss") == rows(tmp_path / "straight", "loss")


def test_a_stalled_rank_is_named_within_the_timeout(data, tmp_path):
    process = start(tmp_path, *SMALL, "--data", data, "--out", "r", "--steps", 10**6, "--timeout", 3)
    wait_for_step(tmp_path / "r", 3)
    os.kill(stalled := ranks(process)[1], signal.SIGSTOP)
    began = time.monotonic()
    for line in process.stdout:
        if "rank 1 of 2 does not answer" in line:
            break
    assert time.monotonic() - began < 20
    os.kill(stalled, signal.SIGKILL)  # torchrun waits 30 s for it
    finish(process, status=1)


def test_ranks_that_were_started_differently_are_named(data, tmp_path):
    script = f"{sys.executable} {ROOT / 'train.py'} {' '.join(SMALL)} --data {data} --seed $RANK"
    printed = finish(start(tmp_path, "-c", script, script="bash", launcher=["--no-python"]), status=1)
    assert printed.count("rank 1 has another version or setting than rank 0: seed is 1, not 0") == 1
    assert not (tmp_path / "runs").exists()


def test_nodes_that_do_not_share_the_folder_of_a_run_are_told(data, tmp_path):
    """Else a new rank 0, on a node without checkpoints, would begin anew."""
    (tmp_path / "node0").mkdir()
    (tmp_path / "node1" / "r").mkdir(parents=True)
    (tmp_path / "node1" / "r" / "step-00000005.json").touch()
    script = f"cd node$RANK && {sys.executable} {ROOT / 'train.py'} {' '.join(SMALL)} --data {data} --out r --resume"
    printed = finish(start(tmp_path, "-c", script, script="bash", launcher=["--no-python"]), status=1)
    assert "rank 0 does not see step-00000005.json in r: it must lie on a disk that all nodes share" in printed


NAN_ON_RANK_1 = """
    import sys, os
    sys.path[:0] = [{root!r}]
    import train, torch
    forward = train.GPT.forward
    def poisoned(self, *arguments, **more):
        out = forward(self, *arguments, **more)
        poisoned.calls += self.training
        return out * float("nan") if poisoned.calls in {calls} and os.environ["RANK"] == "1" else out
    poisoned.calls = 0
    train.GPT.forward = poisoned
    train.main()
"""


@pytest.mark.parametrize("allowed, calls", [(0, [10]), (2, [10, 15])])
def test_a_step_with_nan_on_one_rank_is_made_on_none(data, tmp_path, allowed, calls):
    """The micro-batch with NaN is the second of its step, of four: two of each rank."""
    (tmp_path / "poisoned.py").write_text(textwrap.dedent(NAN_ON_RANK_1.format(root=str(ROOT), calls=calls)))
    flags = [*SMALL, "--data", data, "--batch_tokens", 256, "--out", "r", "--steps", 9, "--save_every", 1, "--keep", 9]
    process = start(tmp_path, *flags, "--skip_bad_steps", allowed, script=tmp_path / "poisoned.py")
    printed = finish(process, status=0 if allowed else 1)
    assert "step 5: the gradient's norm is nan, the loss not finite on rank 1" in printed
    newest = train.load_checkpoint(tmp_path / "r")[0]
    assert all(tensor.isfinite().all() for kind in ("model", "optimizer") for tensor in newest[kind].values())
    if allowed:
        assert_same(state_of(tmp_path / "r", 4)["model"], state_of(tmp_path / "r", 5)["model"])
        assert rows(tmp_path / "r", "skipped")[9] == 2
    else:
        assert newest["step"] == 4


def test_a_number_of_processes_that_does_not_divide_the_batch_is_refused(data, tmp_path):
    printed = finish(start(tmp_path, *SMALL, "--data", data, n=3), status=1)
    assert "3 processes can't share the 2 micro-batches of 128 batch_tokens equally: use 1, 2 of them" in printed
    assert not (tmp_path / "runs").exists()
