"""train.py in several processes: two compute what one computes, and no fault of one of them goes unnoticed."""

import fcntl
import os
import signal
import time
from pathlib import Path
from shlex import split
from textwrap import dedent

import pytest
import torch
from conftest import TINY, TINY_FLOPS, Ranks, assert_same, assert_same_states, kill, rows, state_of, wait_for_step
from conftest import words

import prepare
import train
from checkpoint import load_checkpoint

TORCHRUN = Path(torch.distributed.__file__).with_name("run.py")
SMALL = [*TINY, "--log_every", "1", "--eval_every", "100", "--dropout", "0.1"]


def changed(folder: Path, change: str) -> Path:
    """train.py with a change."""
    (folder / "changed.py").write_text(f"import os, signal, sys, time, train\n{dedent(change)}\ntrain.main()\n")
    return folder / "changed.py"


ON_RANK_1 = """
    forward, calls = train.GPT.forward, []
    def changed(self, *arguments, **more):
        out = forward(self, *arguments, **more)
        calls.append(self.training)
        if os.environ["RANK"] == "1" and self.training and sum(calls) in {calls}:
            {fault}
        return out
    train.GPT.forward = changed
"""


@pytest.fixture(scope="module", autouse=True)
def slow_faults(data, tmp_path_factory):
    """Faults that take long, caused while the other tests run: rank 1 of two stops for good within a step, of a whole
    model or a sharded one; under torchrun it is killed, once. Returns the folder and the processes of each."""
    faults, flags = {}, [*SMALL, "--data", data, "--steps", 30, "--save_every", 5, "--out", "r", "--resume"]
    for shard in (1, 2):
        folder = tmp_path_factory.mktemp("stall")
        script = changed(folder, ON_RANK_1.format(calls=[5], fault="os.kill(os.getpid(), signal.SIGSTOP)"))
        faults[shard] = folder, Ranks(folder, *flags, "--timeout", 2, "--shard", shard, script=script, n=2)
    folder = tmp_path_factory.mktemp("kill")
    die = 'os.path.exists("killed") or os.mkdir("killed") or os.kill(os.getpid(), signal.SIGKILL)'
    script = changed(folder, ON_RANK_1.format(calls=[13], fault=die))
    launcher = split("--standalone --nproc_per_node=2 --max-restarts=2 --run-path --start-method=fork")
    faults["kill"] = folder, Ranks(folder, *launcher, script, *flags, script=TORCHRUN)
    yield faults
    for _, ranks in faults.values():
        kill(ranks.processes)


@pytest.fixture
def start(data, tmp_path):
    """start("--steps 9", 3, change) trains in 3 processes, start("--out r --resume") goes on in two."""

    def start_small(flags: str, n: int = 2, change: str | None = None) -> Ranks:
        new = [] if "--resume" in flags else [*SMALL, "--data", data, "--out", "r"]
        return Ranks(tmp_path, *new, *split(flags), script=change and changed(tmp_path, change), n=n)

    return start_small


def test_a_run_that_moves_between_one_process_ddp_and_fsdp_continues_as_if_it_had_stayed(call, data, start, tmp_path):
    """With experts, dropout and a tied head: DDP; HSDP, two copies of two unequal shards each, which computes
    activations again; three shards, of which the last holds no row of some matrices, and all rows of a rank at once."""
    flags = [*SMALL, "--data", data, *split("--steps 9 --lr 1e-3 --batch_tokens 192 --micro_batch 1 --n_expert 3")]
    flags += split("--n_inner 4 --tied --eval_tokens 224")
    at_once = "--resume --dropout 0 --balance_loss 0"
    call(train, *flags, *split("--out moved --stop_at 2"))
    ranks = start("--out moved --resume --stop_at 4")
    call(train, *flags, *split("--out stayed --stop_at 6"))
    call(train, *split(f"--out stayed {at_once} --micro_batch 12"))
    ranks.finish()
    start("--out moved --resume --stop_at 6 --shard 2 --recompute", 4).finish()
    start(f"--out moved {at_once} --stop_at 8 --shard 3 --micro_batch 4", 3).finish()
    call(train, *split("--out moved --resume --shard 1 --micro_batch 12"))
    stayed, moved = tmp_path / "stayed", tmp_path / "moved"
    for kind in ("model", "optimizer"):
        torch.testing.assert_close(state_of(moved, 9)[kind], state_of(stayed, 9)[kind], atol=1e-5, rtol=1e-5)
    for key in ("loss", "lr", "grad_norm", "val_loss", "val_loss_error", "val_bits_per_byte"):
        expected, found = rows(stayed, key), rows(moved, key)
        assert {step: found[step] for step in expected} == pytest.approx(expected, rel=1e-4), key
    loads = [torch.tensor(rows(run, "expert_load")[8]) for run in (stayed, moved)]
    torch.testing.assert_close(*loads)


def test_a_sharded_run_holds_the_whole_model_on_no_rank_and_knows_the_peak_of_two(start, tmp_path):
    """In bfloat16. forked.py says that each rank makes 1024^3 products and sums in 0.01 s."""
    change = """
        draw = train.initial_rows
        def told(config, name, shape, rows, seed):
            print("rank", os.environ["RANK"], "draws", rows, "of", name, file=sys.stderr)
            return draw(config, name, shape, rows, seed)
        train.initial_rows = told
    """
    printed = start("--steps 2 --shard 2 --dtype bfloat16", change=change).finish().printed
    assert "rank 0 draws range(0, 130) of head.weight" in printed and "rank 1 draws range(130, 259) of head" in printed
    assert printed.count(" draws ") == 2 * len(state_of(tmp_path / "r", 2)["model"]) and "a sample:" not in printed
    speeds, seconds = (rows(tmp_path / "r", key) for key in ("tokens_per_second", "seconds"))
    shares = {step: speed * TINY_FLOPS / (2 * 2 * 1024**3 / 0.01) for step, speed in speeds.items()}
    assert rows(tmp_path / "r", "mfu") == pytest.approx(shares)
    assert speeds[2] >= 128 / (seconds[2] - seconds[1])  # which hold the time of the log as well


RESAVE = """
    import checkpoint, torch
    checkpoint.Tensors.__getitem__ = None  # no rank joins the parts of a tensor
    train.Muon.step = torch.optim.AdamW.step = lambda self: None  # a step changes nothing
"""


def test_any_number_of_ranks_loads_what_any_other_has_saved(call, data, start, tmp_path):
    """Bit for bit: of one process, 3 shards, 2 copies of 2 shards each, and again of one. The newest checkpoint of the
    3 shards has a damaged part, which one rank finds and all skip."""
    flags = "--n_layer 1 --n_expert 3 --n_inner 20 --steps 9 --stop_at 2 --batch_tokens 768 --eval_tokens 16"
    call(train, *SMALL, "--data", data, *split(f"{flags} --save_every 1 --keep 9 --out r"))
    for step, n, shard in (4, 3, 3), (5, 4, 2), (6, 1, 1):
        printed = start(f"--out r --resume --stop_at {step} --shard {shard}", n, RESAVE).finish().printed
        assert printed.count("damaged: r/step-00000004.json (step-00000004.2-of-3") == (step == 5)
        if step == 4:
            (part,) = tmp_path.glob("r/step-00000004.2-of-3.*")
            part.write_bytes(part.read_bytes()[:-1])
    states = [state_of(tmp_path / "r", step) for step in (2, 3, 6)]
    first, *others = [[state["model"], state["optimizer"]] for state in states]
    assert_same(others, [first, first])


def test_a_part_that_one_rank_cannot_write_takes_its_checkpoint_with_it_and_no_other(start, tmp_path):
    """Of two parts in each checkpoint; a start of the run marks its parts, so that no other start can replace them."""
    change = """
        import checkpoint
        write_part = checkpoint.write_part
        def full(run, step, state, part, *more):
            if (step, part) in ((2, 1), (3, 0)):
                raise OSError("no space")
            return write_part(run, step, state, part, *more)
        checkpoint.write_part = full
    """
    ranks = start("--steps 5 --save_every 1 --keep 9 --shard 2 --stop_at 4", change=change)
    assert ranks.finish().stdout.count("cannot save in r (no space); trying again") == 2
    assert not [*tmp_path.glob("r/step-0000000[23]*")]
    start("--out r --resume").finish()
    parts = [path.name.split(".") for path in tmp_path.glob("r/*.pt")]
    assert sorted(name[:2] for name in parts) == [[f"step-0000000{n}", f"{k}-of-2"] for n in (1, 4, 5) for k in (1, 2)]
    assert len({mark for name, _, mark, _ in parts if name != "step-00000005"}) == 1
    assert len({mark for _, _, mark, _ in parts}) == 2


def test_a_signal_to_one_rank_saves_the_same_step_on_all_without_another_evaluation(start, tmp_path):
    ranks = start(f"--steps {10**6} --eval_every 1")
    wait_for_step(tmp_path / "r", 5)
    for number in (signal.SIGUSR1, signal.SIGTERM):  # torchrun passes on what a terminal has sent to each rank
        os.kill(ranks.pid(1), number)
    printed = ranks.finish().printed
    step = max(rows(tmp_path / "r", "loss"))
    assert max(rows(tmp_path / "r", "val_loss")) == step - 1
    assert printed.count(f"stopped at step {step} and saved; to continue: torchrun ... ") == 1
    assert load_checkpoint(tmp_path / "r")[0]["step"] == step


def test_a_process_that_computes_for_ever_answers_a_signal_and_ends_with_the_second(start, tmp_path):
    """It waits in C, in a lock that it holds itself, so that Python cannot run a signal's function."""
    change = """
        import ctypes
        def backward(self):
            lock = ctypes.create_string_buffer(64)
            open("waits", "w")
            while True:
                ctypes.CDLL(None).pthread_mutex_lock(lock)
        train.Tensor.backward = backward
    """
    process = start("", 1, change)
    told = process.outputs[0][0]
    for happened in (lambda: (tmp_path / "waits").exists(), lambda: "stopping and saving" in told.read_text()):
        while not happened() and process.processes[0].is_alive():
            time.sleep(0.01)
        os.kill(process.pid(0), signal.SIGINT)
    process.finish(128 + signal.SIGINT)


@pytest.mark.parametrize("n, flags, told", [
    (2, ["--out", "taken"], "taken already holds a run"),
    (2, ["--seed", lambda rank: rank], "rank 1 has another version or setting than rank 0: seed is 1, not 0"),
    (2, ["--data", "set"], "rank 1 has another data set than rank 0"),
    (2, ["--out", "r", "--resume"], "rank 0 does not see step-00000005.json in r: all nodes must share that folder"),
    (2, ["--data", "nowhere"], "nowhere is no data set"), (2, ["--device", "abacus"], "--device abacus cannot be used"),
    (2, ["--vocab_size", "100"], "a vocabulary of 100 is too small"),
    (2, ["--seq_len", "4096", "--batch_tokens", "32768"], "4096 tokens: use --seq_len 1024, or add text"),
    (2, ["--out", "parts", "--shard", 2, "--steps", 1], "rank 0 does not see step-00000001.2-of-2"),
    (3, [], "cannot share 2 micro-batches equally: use 1, 2, another --micro_batch, or --batch_tokens 192"),
])
def test_ranks_that_cannot_train_say_so_once_and_end(call, data, tmp_path, n, flags, told):
    """Each on a node of its own. Without the fourth refusal, rank 0 would start from step 0 where its node does not see
    the checkpoints of the run."""
    for rank in range(n):
        node = tmp_path / f"node{rank}"
        for folder in ("taken", "parts", "r"):
            (node / folder).mkdir(parents=True)
        (node / "taken" / "config.json").touch()
        (node / "text.txt").write_text(words(500, seed=rank))
        call(prepare, node / "text.txt", "--tokenizer", "byte", "--val_fraction", 0.1, "--out", node / "set")
    (node / "r" / "step-00000005.json").touch()
    ranks = Ranks(lambda rank: tmp_path / f"node{rank}", *SMALL, "--data", data, *flags, n=n)
    for process in ranks.processes:
        process.join(60)
    assert {process.exitcode for process in ranks.processes} == {2}
    printed = ranks.finish(status=2).printed
    assert printed.count("error") == printed.count(told) == 1 and not list(tmp_path.glob("*/runs"))


@pytest.mark.parametrize("allowed, calls", [(0, [10]), (2, [10, 15])])
def test_a_step_with_nan_on_one_rank_is_made_on_none(start, tmp_path, allowed, calls):
    """The micro-batch with NaN is the second of its step, of four: two on each rank."""
    flags = f"--batch_tokens 256 --steps 9 --save_every 1 --keep 9 --skip_bad_steps {allowed}"
    ranks = start(flags, change=ON_RANK_1.format(calls=calls, fault="out = out * float('nan')"))
    printed = ranks.finish(status=0 if allowed else 2).printed
    assert "step 5: the gradient norm is nan, the loss is not finite on ranks [1]" in printed
    newest = load_checkpoint(tmp_path / "r")[0]
    assert all(tensor.isfinite().all() for kind in ("model", "optimizer") for tensor in newest[kind].values())
    if allowed:
        assert_same(state_of(tmp_path / "r", 4)["model"], state_of(tmp_path / "r", 5)["model"])
        assert rows(tmp_path / "r", "skipped")[9] == 2
    else:
        assert newest["step"] == 4


def test_ranks_whose_torchrun_is_killed_save_and_end(start, tmp_path):
    """A process in place of torchrun starts the rank and is killed, or else the rank would make 300 steps."""
    change = """
        if os.fork():
            while not os.path.exists("r/metrics.jsonl"):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        os.environ["TORCHELASTIC_RUN_ID"] = "1"
    """
    start(f"--steps 300 --save_every {10**6}", 1, change).finish(-signal.SIGKILL)
    with open(tmp_path / "r" / ".lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)  # waits for the rank
    assert load_checkpoint(tmp_path / "r")[0]["step"] < 300


@pytest.mark.parametrize("shard", [1, 2])
def test_a_stalled_rank_is_named_within_the_timeout(slow_faults, shard):
    _, ranks = slow_faults[shard]
    ranks.processes[0].join(60)
    kill(ranks.processes)
    assert "rank 1 of 2 does not answer" in ranks.finish(status=None).stderr


def test_torchrun_restarts_a_killed_rank_and_the_run_ends_as_if_nothing_had_happened(slow_faults, data):
    folder, launcher = slow_faults["kill"]
    Ranks(folder, *SMALL, "--data", data, "--steps", 30, "--out", "straight", n=2).finish()
    assert "resuming r/step-" in launcher.finish().printed and (folder / "killed").exists()
    assert_same_states(folder / "straight", folder / "r", 30)
    assert rows(folder / "r", "loss") == rows(folder / "straight", "loss")
