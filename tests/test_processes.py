"""train.py in several processes: two compute what one computes, and no fault of one of them goes unnoticed."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, Ranks, assert_same, rows, state_of, wait_for_step, workers

import train
from model import load_checkpoint

SMALL = [*TINY, "--log_every", "1", "--eval_every", "100", "--dropout", "0.1"]


@pytest.fixture(scope="module", autouse=True)
def slow_faults(data, tmp_path_factory):
    """Two faults that take long because of waiting, caused while the other tests run."""
    with ThreadPoolExecutor() as pool:
        causes = {
            cause: pool.submit(cause, data, tmp_path_factory.mktemp("fault")) for cause in (kill_rank, stall_rank)
        }
        yield causes


def kill_rank(data: Path, folder: Path) -> tuple[Path, str]:
    """Kill one of two ranks under torchrun in a run of 30 steps, beside a run without a fault. Returns the folder of
    both, and what torchrun printed."""
    flags = [*SMALL, "--data", data, "--steps", 30, "--save_every", 5]
    straight = Ranks(folder, *flags, "--out", "straight", n=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=2"]
    command += [ROOT / "train.py", *flags, "--out", "r", "--resume"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    process = subprocess.Popen(list(map(str, command)), cwd=folder, env=env, start_new_session=True, **pipes)
    try:
        wait_for_step(folder / "r", 12)
        os.kill(workers(process)[1], signal.SIGKILL)
        printed = process.communicate(timeout=60)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    straight.finish()
    assert process.returncode == 0, printed
    return folder, printed


def stall_rank(data: Path, folder: Path) -> tuple[float, str]:
    """Stop rank 1 of two for good. Returns the seconds until rank 0 gives up, and what it printed."""
    ranks = Ranks(folder, *SMALL, "--data", data, "--out", "r", "--steps", 10**6, "--timeout", 2, n=2)
    wait_for_step(folder / "r", 3)
    os.kill(ranks.pid(1), signal.SIGSTOP)
    began = time.monotonic()
    ranks.processes[0].join(60)
    seconds = time.monotonic() - began
    ranks.processes[1].kill()
    return seconds, ranks.finish(status=None).stderr


def assert_close(one: Path, other: Path, step: int, tolerance: float) -> None:
    """Losses, weights and optimizer state are equal except for rounding."""
    a, b = state_of(one, step), state_of(other, step)
    for kind in ("model", "optimizer"):
        assert a[kind].keys() == b[kind].keys()
        for name, tensor in a[kind].items():
            torch.testing.assert_close(tensor, b[kind][name], atol=tolerance, rtol=tolerance, msg=name)
    assert rows(one, "loss") == pytest.approx(rows(other, "loss"), abs=tolerance)
    assert rows(one, "val_loss")[step] == pytest.approx(rows(other, "val_loss")[step], abs=tolerance)
    assert len(rows(one, "loss")) == step


def test_a_run_that_moves_between_one_process_ddp_and_fsdp_continues_as_if_it_had_stayed(call, data, tmp_path):
    """With experts, dropout and a tied head."""
    flags = [*SMALL, "--data", data, "--steps", 12, "--lr", 1e-3]
    flags += ["--batch_tokens", 256, "--n_expert", 4, "--n_inner", 32, "--tied"]
    call(train, *flags, "--out", "stayed")
    call(train, *flags, "--out", "moved", "--stop_at", 3)
    Ranks(tmp_path, "--out", "moved", "--resume", "--stop_at", 6, n=2).finish()
    Ranks(tmp_path, "--out", "moved", "--resume", "--stop_at", 9, "--shard", 2, n=2).finish()
    call(train, "--out", "moved", "--resume", "--shard", 1)
    assert_close(tmp_path / "stayed", tmp_path / "moved", 12, 1e-5)


def test_groups_of_shards_compute_what_one_process_computes(call, data, tmp_path):
    """HSDP: two copies of the model, each sharded over two processes. These also recompute activations."""
    flags = [*SMALL, "--data", data, "--batch_tokens", 256, "--steps", 3, "--lr", 1e-3]
    call(train, *flags, "--out", "one")
    Ranks(tmp_path, *flags, "--out", "four", "--shard", 2, "--recompute", n=4).finish()
    assert_close(tmp_path / "one", tmp_path / "four", 3, 1e-5)


@pytest.fixture(scope="module")
def sharded(data, tmp_path_factory):
    """What a sharded run in bfloat16 prints, and how many models each rank builds outside the meta device."""
    folder = tmp_path_factory.mktemp("sharded")
    script = f"""
        import os, sys
        sys.path[:0] = [{str(ROOT)!r}]
        import train
        init, real = train.GPT.__init__, 0
        def counted(self, config):
            global real
            init(self, config)
            real += not next(self.parameters()).is_meta
        train.GPT.__init__ = counted
        train.main()
        print("rank", os.environ["RANK"], "built", real, file=sys.stderr)
    """
    (folder / "counting.py").write_text(textwrap.dedent(script))
    flags = [*SMALL, "--data", data, "--out", "r", "--steps", 2, "--shard", 2, "--dtype", "bfloat16"]
    return Ranks(folder, *flags, n=2, script=folder / "counting.py").finish()


def test_a_sharded_run_in_bfloat16_ends_with_a_sample(sharded):
    assert "a sample:" in sharded.stdout


def test_with_shards_no_rank_but_the_first_ever_builds_the_model_in_memory(sharded):
    assert "rank 0 built 1" in sharded.stderr and "rank 1 built 0" in sharded.stderr


def test_a_signal_to_one_rank_saves_the_same_step_on_all(data, tmp_path):
    ranks = Ranks(tmp_path, *SMALL, "--data", data, "--out", "r", "--steps", 10**6, n=2)
    wait_for_step(tmp_path / "r", 5)
    os.kill(ranks.pid(1), signal.SIGUSR1)
    printed = ranks.finish().printed
    step = max(rows(tmp_path / "r", "loss"))
    assert f"stopped at step {step} and saved" in printed
    assert load_checkpoint(tmp_path / "r")[0]["step"] == step


def test_a_rank_that_refuses_its_input_speaks_for_all(data, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").touch()
    ranks = Ranks(tmp_path, *SMALL, "--data", data, "--out", "taken", n=2)
    for process in ranks.processes:
        process.join(20)
    assert [process.exitcode for process in ranks.processes] == [2, 2]
    printed = ranks.finish(status=None).printed
    assert printed.count("error") == 1 and "already holds a run" in printed


def test_ranks_with_different_settings_are_named(data, tmp_path):
    ranks = Ranks(tmp_path, *SMALL, "--data", data, "--seed", lambda rank: rank, n=2)
    printed = ranks.finish(status=2).printed
    assert printed.count("rank 1 has another version or setting than rank 0: seed is 1, not 0") == 1
    assert not (tmp_path / "runs").exists()


def test_nodes_that_do_not_share_the_folder_of_a_run_are_told(data, tmp_path):
    """Otherwise a new rank 0, on a node without checkpoints, would start from step 0."""
    (tmp_path / "node0").mkdir()
    (tmp_path / "node1" / "r").mkdir(parents=True)
    (tmp_path / "node1" / "r" / "step-00000005.json").touch()
    ranks = Ranks(lambda rank: tmp_path / f"node{rank}", *SMALL, "--data", data, "--out", "r", "--resume", n=2)
    assert "rank 0 does not see step-00000005.json in r: all nodes must share that folder" in ranks.finish(2).stderr


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
    """The micro-batch with NaN is the second of its step, of four: two on each rank."""
    (tmp_path / "poisoned.py").write_text(textwrap.dedent(NAN_ON_RANK_1.format(root=str(ROOT), calls=calls)))
    flags = [*SMALL, "--data", data, "--batch_tokens", 256, "--out", "r", "--steps", 9, "--save_every", 1, "--keep", 9]
    ranks = Ranks(tmp_path, *flags, "--skip_bad_steps", allowed, script=tmp_path / "poisoned.py", n=2)
    printed = ranks.finish(status=0 if allowed else 2).printed
    assert "step 5: the gradient norm is nan, the loss is not finite on ranks [1]" in printed
    newest = load_checkpoint(tmp_path / "r")[0]
    assert all(tensor.isfinite().all() for kind in ("model", "optimizer") for tensor in newest[kind].values())
    if allowed:
        assert_same(state_of(tmp_path / "r", 4)["model"], state_of(tmp_path / "r", 5)["model"])
        assert rows(tmp_path / "r", "skipped")[9] == 2
    else:
        assert newest["step"] == 4


def test_a_number_of_processes_that_does_not_divide_the_batch_is_refused(data, tmp_path):
    printed = Ranks(tmp_path, *SMALL, "--data", data, n=3).finish(status=2).printed
    assert "3 processes cannot share 2 micro-batches equally: use 1, 2, or another micro_batch" in printed
    assert not (tmp_path / "runs").exists()


def test_a_stalled_rank_is_named_within_the_timeout(slow_faults):
    seconds, printed = slow_faults[stall_rank].result()
    assert "rank 1 of 2 does not answer" in printed and seconds < 30


def test_torchrun_restarts_a_killed_rank_and_the_run_ends_as_if_nothing_had_happened(slow_faults):
    folder, printed = slow_faults[kill_rank].result()
    assert "resuming r/step-" in printed
    assert_same(state_of(folder / "straight", 30)["model"], state_of(folder / "r", 30)["model"])
    assert_same(state_of(folder / "straight", 30)["optimizer"], state_of(folder / "r", 30)["optimizer"])
    assert rows(folder / "r", "loss") == rows(folder / "straight", "loss")
