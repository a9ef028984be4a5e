"""train.py: batches, schedule, evaluation, checkpoints, and the command line."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
from functools import partial
from pathlib import Path
from shlex import split
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, Ranks, assert_same, rows, shell, state_of, wait_for_step, words

import prepare
import train
from model import GPT, Block, GPTConfig, load_checkpoint, newest_run
from published import load_model


@pytest.fixture
def alone():
    """A process group of one, as main() makes it."""
    train.start_processes(10)
    yield
    torch.distributed.destroy_process_group()


# ---- batches


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 1000, 4097])
def test_the_shuffle_visits_everything_once(n):
    shuffled = train.permute(np.arange(n), n, (1, 0))
    assert sorted(shuffled.tolist()) == list(range(n))
    if n > 60:
        other = train.permute(np.arange(n), n, (1, 1))
        assert np.mean(shuffled == np.arange(n)) < 0.1 and np.mean(shuffled == other) < 0.1
        neighbours = np.abs(np.diff(shuffled)).mean() / n
        assert 0.25 < neighbours < 0.42  # a third, where neighbours have nothing to do with each other


def test_each_epoch_visits_each_window_once():
    order = np.concatenate([train.batch_indices(100, seed=5, step=s, rows=8) for s in range(25)])  # two epochs
    assert sorted(order[:100]) == sorted(order[100:]) == list(range(100))
    assert order[:100].tolist() != order[100:].tolist()
    other_seed = np.concatenate([train.batch_indices(100, seed=6, step=s, rows=8) for s in range(13)])
    assert order[:100].tolist() != other_seed[:100].tolist()


def test_each_micro_batch_has_its_own_dropout_whatever_the_size_of_a_step(call, data, monkeypatch):
    seeds, forward = [], GPT.forward

    def recorded(self, *arguments, **more):
        if self.training:
            seeds.append(torch.initial_seed())
        return forward(self, *arguments, **more)

    monkeypatch.setattr(GPT, "forward", recorded)
    flags = [*TINY, "--data", data, "--steps", 3, "--batch_tokens", 256]
    call(train, *flags, "--out", "a")
    assert len(set(seeds)) == 3 * 4
    call(train, *flags, "--out", "b", "--stop_at", 2)
    call(train, "--out", "b", "--resume")
    assert seeds[12:] == seeds[:12]


def test_each_step_is_made_at_its_learning_rate(call, data, tmp_path, monkeypatch):
    rates, step = [], torch.optim.AdamW.step

    def recorded(self, *arguments):
        rates.extend({group["lr"] for group in self.param_groups})
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    call(train, *TINY, "--data", data, "--out", "r", "--steps", 6, "--warmup", 0.5, "--log_every", 1)
    config = train.Config(steps=6, warmup=0.5)
    assert rates == [train.lr_at(i, config) for i in range(6)] == [*rows(tmp_path / "r", "lr").values()]


def test_the_gradient_is_clipped_to_its_maximum_norm_and_not_at_all_with_zero(call, data, tmp_path, monkeypatch):
    norms, step = [], torch.optim.AdamW.step

    def recorded(self, *arguments):
        norms.append(math.sqrt(sum(p.grad.square().sum() for g in self.param_groups for p in g["params"])))
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    flags = [*TINY, "--data", data, "--steps", 2, "--log_every", 1, "--optimizer", "adamw"]
    for limit in (0.25, 0):
        call(train, *flags, "--out", f"clip{limit}", "--grad_clip", limit)
    before = [*rows(tmp_path / "clip0.25", "grad_norm").values(), *rows(tmp_path / "clip0", "grad_norm").values()]
    assert min(before) > 0.5
    assert norms == pytest.approx([0.25, 0.25, *before[2:]], rel=1e-4)


def test_the_learning_rate_rises_stays_and_falls_to_zero():
    config = train.Config(steps=100, lr=2.0, warmup=0.1, decay=0.5)
    rates = [train.lr_at(step, config) for step in range(101)]
    assert rates[:3] == pytest.approx([0.2, 0.4, 0.6])
    assert rates[9:51] == [2.0] * 42
    assert rates[75] == pytest.approx(1.0) and rates[100] == 0.0


def test_recomputed_activations_change_no_bit_and_each_block_runs_twice(call, data, tmp_path, monkeypatch):
    """With dropout and experts, whose routing is computed twice as well."""
    forward, calls = Block.forward, []
    monkeypatch.setattr(
        Block, "forward", lambda self, *inputs: calls.append(torch.is_grad_enabled()) or forward(self, *inputs)
    )
    flags = [*TINY, "--data", data, "--steps", 3, "--dropout", 0.2, "--n_expert", 4, "--lr", 1e-2]
    counts = []
    for out, more in (("kept", ()), ("again", ("--recompute",))):
        calls.clear()
        call(train, *flags, "--out", out, *more)
        counts.append(sum(calls))
    assert counts[1] == 2 * counts[0]
    for key in ("loss", "grad_norm", "val_loss"):
        assert rows(tmp_path / "kept", key) == rows(tmp_path / "again", key)
    assert_same(state_of(tmp_path / "kept", 3)["model"], state_of(tmp_path / "again", 3)["model"])


@pytest.mark.parametrize("more", [(), ("--recompute",)])
def test_all_blocks_are_compiled_once_to_train_and_once_to_evaluate(call, data, tmp_path, monkeypatch, more):
    """The counting backend runs what dynamo has captured, so the losses are those of a run without compilation."""
    graphs = []
    monkeypatch.setattr(
        torch, "compile", partial(torch.compile, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    )
    flags = [*TINY, "--n_layer", 4, "--data", data, "--steps", 3, "--eval_every", 1, *more]
    call(train, *flags, "--out", "plain")
    call(train, *flags, "--out", "compiled", "--compile")
    assert len(graphs) == 2
    for key in ("loss", "grad_norm", "val_loss"):
        assert rows(tmp_path / "plain", key) == rows(tmp_path / "compiled", key)


def test_accumulated_micro_batches_equal_one_batch(call, data, tmp_path):
    flags = [*TINY, "--data", data, *split("--steps 5 --dtype float32 --lr 1e-3")]
    for micro in (1, 8):
        call(train, *flags, "--out", f"m{micro}", "--micro_batch", micro)
    one, eight = state_of(tmp_path / "m1", 5)["model"], state_of(tmp_path / "m8", 5)["model"]
    for name in one:
        torch.testing.assert_close(one[name], eight[name], atol=1e-4, rtol=0)
    a, b = rows(tmp_path / "m1", "loss"), rows(tmp_path / "m8", "loss")
    assert a == pytest.approx(b, abs=1e-5)


@pytest.mark.parametrize("optimizer, names", [("muon", ["Muon", "AdamW"]), ("adamw", ["AdamW"])])
def test_every_parameter_has_one_optimizer_and_only_matrices_of_blocks_have_muon(optimizer, names, alone):
    model = GPT(GPTConfig(vocab_size=50, bias=True))
    optimizers = train.make_optimizers(model, train.Config(optimizer=optimizer, dtype="float32"))
    assert [type(o).__name__ for o in optimizers] == names
    for group in optimizers[-1].param_groups:  # AdamW's: norms and biases do not decay
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] > 0}
    held = [[id(p) for group in o.param_groups for p in group["params"]] for o in optimizers]
    assert sorted(itertools.chain(*held)) == sorted(id(p) for p in model.parameters())
    if optimizer == "muon":
        assert set(held[0]) == {id(p) for name, p in model.named_parameters() if "blocks" in name and p.ndim == 2}


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.0), (torch.float32, 2e-3)])
def test_muon_makes_the_steps_of_torch_s_muon(alone, dtype, tolerance):
    """Which works in bfloat16 on one matrix after the other; float32 differs by what that rounds."""
    ours = [torch.randn(shape, requires_grad=True) for shape in [(32, 64), (64, 32), (32, 64), (32, 32)]]
    theirs = [matrix.detach().clone().requires_grad_() for matrix in ours]
    how = {"lr": 0.02, "weight_decay": 0.5, "momentum": 0.9}
    optimizers = train.Muon(ours, dtype, **how), torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **how)
    for _ in range(4):
        for a, b in zip(ours, theirs):
            a.grad = b.grad = torch.randn(a.shape)
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def test_the_loss_falls_below_that_of_guessing_by_letter_frequency(call, data, tmp_path):
    call(train, *TINY, "--data", data, "--out", "r", "--steps", 150, "--eval_every", 150)
    _, shards = prepare.load_dataset(data)
    frequencies = np.bincount(np.concatenate(shards["train"]), minlength=257) / sum(map(len, shards["train"]))
    entropy = -sum(f * math.log(f) for f in frequencies if f)
    assert rows(tmp_path / "r", "val_loss")[150] < 0.8 * entropy


# ---- evaluation


def test_evaluation_leaves_training_as_it_is(call, data, tmp_path):
    for every in (3, 1000):
        call(train, *TINY, "--data", data, "--out", f"e{every}", "--steps", 10, "--eval_every", every, "--dropout", 0.2)
    assert_same(state_of(tmp_path / "e3", 10)["model"], state_of(tmp_path / "e1000", 10)["model"])
    assert_same(state_of(tmp_path / "e3", 10)["optimizer"], state_of(tmp_path / "e1000", 10)["optimizer"])


def test_the_validation_loss_is_that_of_the_saved_model_on_the_held_out_text(run, data):
    meta, shards = prepare.load_dataset(data)
    tokens = torch.tensor(np.concatenate(shards["val"]).astype(np.int64))
    n = (len(tokens) - 1) // 16
    model = load_model(run / "step-00000020.pt")[0].eval()
    with torch.no_grad():
        loss = model(tokens[: n * 16].view(n, 16), tokens[1 : n * 16 + 1].view(n, 16)).item()
    assert rows(run, "val_loss")[20] == pytest.approx(loss, abs=1e-5)
    bits = loss / math.log(2) * meta["val"]["tokens"] / meta["val"]["bytes"]
    assert rows(run, "val_bits_per_byte")[20] == pytest.approx(bits, abs=1e-5)


def test_a_short_evaluation_is_spread_over_the_held_out_text(alone, data):
    _, shards = prepare.load_dataset(data)
    windows, seen = prepare.Windows(shards["val"], 16), []
    get = windows.get
    windows.get = lambda indices: seen.extend(indices) or get(indices)
    config = train.Config(seq_len=16, vocab_size=257, n_layer=1, eval_tokens=160, dtype="float32")
    train.evaluate(GPT(config), windows, config, torch.device("cpu"), contextlib.nullcontext())
    seen = np.unique(seen)  # the last one is repeated, to fill its micro-batch
    assert len(seen) == 10 and min(np.diff(seen)) >= windows.n_windows // 10 and max(seen) > 0.8 * windows.n_windows


# ---- resume


def test_a_resumed_run_equals_one_that_never_stopped(call, data, tmp_path):
    """Twenty steps against ten, and ten more: parameters, optimizers, losses; across an epoch's edge, with dropout."""
    flags = [*TINY, "--data", data, "--steps", 20, "--dropout", 0.1, "--log_every", 3]
    flags += ["--batch_tokens", 1024, "--micro_batch", 32]
    call(train, *flags, "--out", "straight")
    call(train, *flags, "--out", "halves", "--stop_at", 10)
    call(train, "--out", "halves", "--resume")
    n_tokens = sum(len(shard) for shard in prepare.load_dataset(data)[1]["train"])
    assert 10 * 1024 < n_tokens < 20 * 1024
    assert_same(state_of(tmp_path / "straight", 20)["model"], state_of(tmp_path / "halves", 20)["model"])
    assert_same(state_of(tmp_path / "straight", 20)["optimizer"], state_of(tmp_path / "halves", 20)["optimizer"])
    straight, halves = rows(tmp_path / "straight", "loss"), rows(tmp_path / "halves", "loss")
    assert {step: halves[step] for step in straight} == straight


def test_metrics_hold_each_step_once_after_a_step_back(run, call):
    losses = rows(run, "loss")
    for name in ("step-00000020.json", "step-00000015.json"):  # as if the run had died before these were saved
        (run / name).unlink()
    call(train, "--out", run, "--resume")
    assert rows(run, "loss") == losses


def test_a_run_that_died_before_its_first_checkpoint_begins_anew(run, call):
    """Whether it had come to make its folder, or was about to save for the first time."""
    losses = rows(run, "loss")
    for path in [*run.glob("step-*"), run / "best.json"]:
        path.unlink()
    (run / "step-00000005.pt").write_bytes(b"half of it")
    call(train, "--config", run / "config.json", "--out", run, "--resume")
    assert rows(run, "loss") == losses


def test_resuming_says_what_the_command_line_changes(run, call, capsys):
    call(train, "--out", run, "--resume", "--steps", 25, "--lr", 1e-3)
    printed = capsys.readouterr().out
    assert "steps from 20 to 25" in printed and "lr from 0.008 to 0.001" in printed
    assert (run / "step-00000025.json").exists()


def test_resuming_past_the_end_of_the_schedule_says_that_the_learning_rate_rises(run, call, capsys):
    call(train, "--out", run, "--resume", "--steps", 40)
    assert "the new schedule raises the learning rate to 0.008" in capsys.readouterr().out
    call(train, "--out", run, "--resume", "--steps", 41)  # ended at 40, where it was almost zero
    assert "raises the learning rate" not in capsys.readouterr().out


def test_a_second_process_in_the_same_folder_is_refused_until_the_first_has_ended(data, refused, call, tmp_path):
    first = Ranks(tmp_path, *TINY, "--data", data, "--out", "r", "--steps", 10**6, "--save_every", 5)
    wait_for_step(tmp_path / "r", 12)
    assert "another process is training in r" in refused(train, "--out", "r", "--resume", "--steps", 9)
    os.kill(first.pid(0), signal.SIGKILL)
    first.finish(-signal.SIGKILL)
    step = load_checkpoint("r")[0]["step"]
    call(train, "--out", "r", "--resume", "--stop_at", step + 1, "--eval_tokens", 16)
    assert not list(Path("r").glob("*.damaged"))


def test_a_run_whose_folder_cannot_be_written_is_refused(run, refused):
    (run / ".lock").unlink()
    (run / ".lock").mkdir()
    assert "cannot write to" in refused(train, "--out", run, "--resume", "--steps", 25)


def test_another_weight_decay_takes_effect_on_resume(run, call, tmp_path):
    shutil.copytree(run, tmp_path / "other")
    call(train, "--out", run, "--resume", "--steps", 22)
    call(train, "--out", "other", "--resume", "--steps", 22, "--weight_decay", 50)
    a, b = (state_of(folder, 22)["model"]["blocks.0.mlp.up.weight"].norm() for folder in (run, tmp_path / "other"))
    assert b < 0.9 * a


def test_resume_and_init_exclude_each_other(run, refused):
    assert "leave out one of them" in refused(train, "--out", run, "--resume", "--init", run)


def test_another_optimizer_is_refused_on_resume(run, refused):
    assert "--optimizer" in refused(train, "--out", run, "--resume", "--steps", 22, "--optimizer", "adamw")


def test_a_run_without_a_checkpoint_resumes_with_its_own_settings(call, data, tmp_path):
    """As after a step that was not finite, before the first save."""
    call(train, *TINY, "--data", data, "--out", "r", "--steps", 3)
    for path in (tmp_path / "r").glob("step-*"):
        path.unlink()
    call(train, "--out", "r", "--resume", "--lr", 1e-3)
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert (config["data"], config["n_embd"], config["steps"], config["lr"]) == (str(data), 32, 3, 1e-3)


def test_changed_sizes_derive_the_others_again(run, call, tmp_path):
    call(train, "--config", run / "config.json", "--out", "wide", "--n_embd", 64, "--steps", 1, "--stop_at", 1)
    shape = state_of(tmp_path / "wide", 1)["model"]["blocks.0.mlp.up.weight"].shape
    assert shape == (GPTConfig(n_embd=64).n_inner, 64)


def test_a_signal_between_steps_is_not_lost(call, data, tmp_path, monkeypatch):
    """One that comes after the step asked for it, in an evaluation: the next step ends the run, saved."""
    evaluate = train.evaluate

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return evaluate(*arguments)

    monkeypatch.setattr(train, "evaluate", interrupted)
    call(train, *TINY, "--data", data, "--out", "r", "--steps", 50, "--eval_every", 7, "--save_every", 100)
    assert max(rows(tmp_path / "r", "loss")) == 8
    assert load_checkpoint(tmp_path / "r")[0]["step"] == 8


def test_training_goes_on_when_the_reader_of_its_output_leaves(data, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    flags = [*TINY, "--data", data, "--out", "r", "--steps", 9, "--log_every", 1]
    process = Ranks(tmp_path, *flags, stdout=tmp_path / "pipe")
    with open(tmp_path / "pipe") as reader:
        reader.readline()
    assert process.finish().stderr == ""
    assert load_checkpoint(tmp_path / "r")[0]["step"] == 9


def test_init_begins_with_the_weights_of_a_run_and_a_new_schedule(run, call, data, tmp_path):
    flags = split("--out tuned --steps 1 --lr 0 --batch_tokens 64 --micro_batch 4 --dtype float32")
    call(train, "--init", run, "--data", data, *flags)
    assert rows(tmp_path / "tuned", "val_loss")[1] == pytest.approx(rows(run, "val_loss")[20], abs=1e-6)
    assert state_of(tmp_path / "tuned", 1)["optimizer"]["embedding.weight.step"] == 1  # AdamW counts its steps


def test_ctrl_c_saves_at_the_end_of_the_step_and_says_how_to_go_on(data, tmp_path):
    flags = [*TINY, "--data", data, *split("--out r --steps 1000000 --log_every 1")]
    process = Ranks(tmp_path, *flags)
    wait_for_step(tmp_path / "r", 5)
    os.kill(process.pid(0), signal.SIGINT)
    printed = process.finish().stdout
    (record,) = (tmp_path / "r").glob("step-*.json")
    step = json.loads(record.read_text())["step"]
    assert step == max(rows(tmp_path / "r", "loss")) and step >= 5
    assert f"stopped at step {step} and saved; to continue: python train.py --out r --resume" in printed


# ---- checkpoints


def test_the_newest_and_the_best_checkpoints_are_kept(run):
    assert [r.name for r in sorted(run.glob("step-*.json"))] == [f"step-{s:08d}.json" for s in (10, 15, 20)]
    losses = rows(run, "val_loss")
    best = json.loads((run / "best.json").read_text())
    assert best["val_loss"] == min(losses.values()) == losses[best["step"]]


def test_a_worse_evaluation_never_replaces_the_best_even_after_a_resume(call, data, tmp_path, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.4, 2.2])
    monkeypatch.setattr(train, "evaluate", lambda *_: (next(losses), 0.1))
    flags = [*TINY, "--data", data, "--out", "r", "--steps", 5, "--eval_every", 1, "--keep", 1]
    call(train, *flags, "--stop_at", 3)
    call(train, "--out", "r", "--resume")
    assert load_checkpoint("r/best.json")[0]["step"] == 2 and train.read_best(Path("r"))["val_loss"] == 2.0
    assert load_checkpoint("r")[0]["step"] == 5
    assert sorted(p.name for p in Path("r").glob("*.pt")) == ["step-00000002.pt", "step-00000005.pt"]


def test_what_is_saved_is_a_copy_of_the_weights_and_of_the_optimizer_state(alone, tmp_path, monkeypatch):
    config = train.Config(vocab_size=50, dtype="float32", out=str(tmp_path))
    model = GPT(config)
    optimizers = train.make_optimizers(model, config)
    model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long)).backward()
    for optimizer in optimizers:
        optimizer.step()
    live = {t.data_ptr() for t in model.parameters()}
    live |= {t.data_ptr() for o in optimizers for state in o.state.values() for t in state.values()}
    saved = []
    monkeypatch.setattr(train, "save_checkpoint", lambda run, step, state, *more: saved.append(state))
    log = train.Log(train.Config(out=str(tmp_path)), model, 0, None, 0.0)
    saver = train.Saver(config, {"tokenizer": {}, "train": {"shards": []}}, log, model, optimizers)
    saver.save(1)
    saver.wait()
    copies = [t.data_ptr() for kind in ("model", "optimizer") for t in saved[0][kind].values()]
    assert len(live) > 20 and len(copies) > 20 and not live & set(copies)


def test_weights_of_half_precision_travel_in_the_dtype_of_the_parameters(alone):
    """The other ranks wait for numbers of that size."""
    sent = train.from_rank_0_like(torch.zeros(3), torch.full((3,), 1.5, dtype=torch.bfloat16))
    assert sent.dtype == torch.float32 and sent.tolist() == [1.5] * 3


def test_the_newest_run_is_the_one_that_was_saved_last(tmp_path):
    for age, name in enumerate(("b", "c", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "step-00000001.json").touch()
        os.utime(tmp_path / name / "step-00000001.json", (age, age))
    assert newest_run(tmp_path) == tmp_path / "a"


@pytest.mark.parametrize("call_number", range(18))
def test_a_kill_at_any_call_of_a_save_loses_nothing(run, call_number):
    """The process is killed when it is about to make its n-th call that changes the disk. Two checkpoints are kept."""
    state = state_of(run, 20)
    if not (child := os.fork()):
        calls = iter(range(call_number))
        for name in ("fsync", "replace", "unlink", "open", "write"):
            real = getattr(os, name)

            def counted(*arguments, real=real, **more):
                if next(calls, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **more)

            setattr(os, name, counted)
        train.save_checkpoint(run, 25, {**state, "step": 25}, keep=2, best_loss=0.1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    whole = [step for step in (5, 10, 15, 20, 25) if (run / f"step-{step:08d}.json").exists() and state_of(run, step)]
    assert len(whole) >= 2 and whole[-1] == load_checkpoint(run)[0]["step"] >= 20
    assert load_checkpoint(run / "best.json")[0]["step"] in (20, 25)
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL


def test_a_full_disk_ends_the_run_with_a_sentence_and_the_checkpoint_before_is_whole(run, refused):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        told = refused(train, "--out", run, "--resume", "--steps", 30)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot save in" in told and "free some space and --resume" in told
    assert load_checkpoint(run)[0]["step"] == 20
    assert not list(run.glob("*.partial"))


def test_a_save_that_fails_is_tried_again_at_the_next(call, data, tmp_path, monkeypatch, capsys):
    save_checkpoint, steps = train.save_checkpoint, []

    def once_without_room(run, step, *more):
        steps.append(step)
        if step == 5:
            raise OSError("no room")
        save_checkpoint(run, step, *more)

    monkeypatch.setattr(train, "save_checkpoint", once_without_room)
    call(train, *TINY, "--data", data, "--out", "r", "--steps", 15, "--save_every", 5)
    assert "cannot save in r (no room); trying again" in capsys.readouterr().out
    assert steps == [5, 10, 15] and [state_of(tmp_path / "r", step)["step"] for step in (10, 15)] == [10, 15]


def test_metrics_that_cannot_be_written_do_not_stop_a_run(alone, tmp_path, capsys):
    log = train.Log(train.Config(out=str(tmp_path)), None, 0, None, 0.0)
    log.path = Path("/dev/full")
    log.record(step=7, loss=1.0)
    assert "the metrics of step 7 are lost: [Errno 28]" in capsys.readouterr().err


def test_a_second_signal_during_the_save_does_not_break_it(call, data, tmp_path, monkeypatch):
    save_checkpoint = train.save_checkpoint

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        save_checkpoint(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train, "save_checkpoint", interrupted)
    call(train, *TINY, "--data", data, "--out", "r", "--steps", 50, "--save_every", 7)
    step = max(rows(tmp_path / "r", "loss"))
    assert step < 50 and load_checkpoint(tmp_path / "r")[0]["step"] == step


def damage(path: Path, how: str) -> None:
    whole = path.read_bytes()
    offset = random.Random(how).randrange(len(whole))
    flipped = whole[:offset] + bytes([whole[offset] ^ 1]) + whole[offset + 1 :]
    cut = {"empty": b"", "100 bytes": whole[:100], "half": whole[: len(whole) // 2], "all but one": whole[:-1]}
    path.write_bytes(cut.get(how, flipped))


@pytest.mark.parametrize("how", ["empty", "100 bytes", "half", "all but one", "bit 1", "bit 2", "bit 3"])
def test_a_damaged_checkpoint_is_passed_over_by_name(run, capsys, how):
    damage(run / "step-00000020.pt", how)
    state, _ = load_checkpoint(run)
    assert state["step"] == 15
    assert "damaged:" in (printed := capsys.readouterr().err) and "step-00000020" in printed


@pytest.mark.parametrize("damaged", [b"\xff{", b'{"file": "step-00000020.pt", "val_loss": "low"}'])
def test_a_damaged_best_json_is_replaced_and_harms_nothing(run, call, damaged):
    (run / "best.json").write_bytes(damaged)
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + "garbage}\n")
    call(train, "--out", run, "--resume", "--steps", 30)
    assert load_checkpoint(run / "best.json")[0]["step"] == 30


@pytest.mark.parametrize(
    "record", [b"", b"[]", b"{}", b'{"file": 5}', b"\xff", b'{"file": "nowhere.pt", "sha256": ""}']
)
def test_a_damaged_json_makes_a_checkpoint_not_exist(run, capsys, record):
    (run / "step-00000020.json").write_bytes(record)
    assert load_checkpoint(run)[0]["step"] == 15


def test_a_checkpoint_whose_json_was_not_written_does_not_exist(run):
    (run / "step-00000020.json").unlink()
    assert load_checkpoint(run)[0]["step"] == 15


def test_a_run_whose_every_checkpoint_is_damaged_stops(run, refused):
    for path in run.glob("*.pt"):
        damage(path, "half")
    assert "no intact checkpoint left" in refused(train, "--out", run, "--resume")


def test_a_checkpoint_never_executes_anything(run, refused, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    pickle.loads(pickle.dumps(Bomb()))  # it would work
    (tmp_path / "executed").rmdir()
    for name, payload in (("pickle", pickle.dumps(Bomb())), ("torch", None)):
        for record in run.glob("step-*.json"):
            path = record.with_suffix(".pt")
            path.write_bytes(payload) if payload else torch.save({"model": Bomb()}, path)
            digest = prepare.sha256_of(path)
            record.write_text(json.dumps({"step": 1, "file": path.name, "sha256": digest}))
        assert "no intact checkpoint" in refused(train, "--out", run, "--resume")
    assert not (tmp_path / "executed").exists()


# ---- the command line


def test_help_explains_every_setting(capsys, call):
    with pytest.raises(SystemExit):
        call(train, "--help")
    printed = capsys.readouterr().out
    for f in dataclasses.fields(train.Config):
        assert re.search(rf"^  --{f.name}[ ,].*\n? +\w", printed, re.MULTILINE), f.name


def test_the_config_of_a_run_makes_the_same_run(run, call, tmp_path):
    call(train, "--config", run / "config.json", "--out", "again")
    a, b = (json.loads((folder / "config.json").read_text()) for folder in (run, tmp_path / "again"))
    assert a | {"out": None} == b | {"out": None}
    assert_same(state_of(run, 20)["model"], state_of(tmp_path / "again", 20)["model"])


def test_flags_override_the_file_which_overrides_the_preset(call, data, tmp_path):
    settings = {"steps": 7, "seed": 5, "model": {"n_layer": 1}}
    (tmp_path / "c.json").write_text(json.dumps(settings))
    call(train, *TINY[2:], "--config", "c.json", "--seed", 6, "--steps", 2, "--data", data, "--out", "r")
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert (config["steps"], config["seed"], config["n_layer"], config["n_embd"]) == (2, 6, 1, 32)


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--no_such_flag", 1], "--no_such_flag"),
        (["--steps", "many"], "--steps"),
        (["--steps", 0], "steps 0"),
        (["--momentum", 1.5], "momentum 1.5"),
        (["--skip_bad_steps", -1], "skip_bad_steps -1"),
        (["--warmup", "nan"], "warmup nan"),
        (["--lr", "nan"], "lr nan"),
        (["--lr", "inf"], "lr inf"),
        (["--lr", -1], "lr -1.0"),
        (["--seed", -1], "seed -1"),
        (["--seed", 10**23], f"seed {10**23}"),
        (["--grad_clip", -1], "grad_clip -1.0"),
        (["--timeout", "nan"], "timeout nan"),
        (["--device", "meta"], "--device meta"),
        (["--stop_at", 99, "--steps", 5], "stop_at 99"),
        (["--preset", "gpt9"], "gpt9"),
        (["--data", "data/nowhere"], "data/nowhere"),
        (["--config", "nowhere.json"], "nowhere.json"),
        (["--resume"], "there is no checkpoint in runs/"),
        (["--init", "nowhere"], "no checkpoint"),
        (["--batch_tokens", 100], "use 64 or 128"),
        (["--batch_tokens", 10], "use 64"),
        (["--n_embd", 30, "--n_head", 4], "n_embd 30 is not divisible by n_head 4"),
        (["--vocab_size", 100], "vocabulary of 100"),
        (["--seq_len", 4096, "--batch_tokens", 16384], "shorter than a window"),
        (["--warmup", 0.7, "--decay", 0.7], "warmup 0.7"),
        (["--device", "abacus"], "--device abacus"),
        (["--out", "/proc/nowhere"], "/proc/nowhere"),
        (["--out", ""], "--out is empty"),
    ],
)
def test_bad_input_is_one_sentence_before_the_first_step(refused, data, tmp_path, arguments, told):
    assert told in refused(train, *TINY, "--data", data, *arguments)
    assert not list(tmp_path.glob("**/step-*"))


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"optimizer": "Muon"}, "optimizer 'Muon' is none of muon, adamw"),
        ({"n_layer": 2.5}, "n_layer 2.5 is not of type int"),
        ({"gated": "false"}, "gated 'false' is not of type bool"),
        ({"steps": True}, "steps True is not of type int"),
        ({"lr": "fast"}, "lr 'fast' is not of type float"),
        ({"preset": ["toy"]}, "['toy']"),
        ({"data": 5}, "data 5 is not of type str"),
        ({"model": {"n_head": None}}, "n_head None is not of type int"),
        ({"lr": 1e400}, "lr inf"),
    ],
)
def test_a_settings_file_is_checked_as_flags_are(refused, tmp_path, settings, told):
    (tmp_path / "c.json").write_text(json.dumps(settings))
    assert told in refused(train, "--config", "c.json")


def test_every_setting_is_a_flag():
    flags = {action.dest for action in train.make_parser()._actions}
    assert {f.name for f in dataclasses.fields(train.Config)} <= flags


def test_the_plot_of_a_run_spans_its_losses(tmp_path):
    written = [{"step": 1, "loss": 9.0}, {"step": 50, "loss": 3.0}, {"step": 75, "loss": float("nan")}]
    written += [{"step": 100, "loss": 1.0}, {"step": 100, "val_loss": 2.0}]
    torn = '{"step": 80, "lo'
    (tmp_path / "metrics.jsonl").write_text("\n".join([*map(json.dumps, written), torn]))
    log = train.Log.__new__(train.Log)
    log.path, log.config = tmp_path / "metrics.jsonl", SimpleNamespace(steps=100)
    assert log.plot(width=5, height=3).splitlines() == [
        "  3.00 |^ .  ",
        "       |    o",
        "  1.00 |    .",
        "       +----- 100 steps",
    ]


def test_an_unknown_key_in_a_settings_file_is_refused(refused, tmp_path):
    (tmp_path / "c.json").write_text('{"steps": 5, "model": {"n_layers": 3}}')
    assert "n_layers" in refused(train, "--config", "c.json")
    (tmp_path / "c.json").write_text('["steps"]')
    assert "c.json" in refused(train, "--config", "c.json")


def test_a_folder_that_holds_a_run_is_refused_without_resume(run, refused):
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    assert "--resume" in refused(train, "--out", run)
    assert before == {path.name: path.stat().st_mtime_ns for path in run.iterdir()}


def test_a_damaged_shard_is_refused(refused, data, tmp_path):
    shutil.copytree(data, tmp_path / "set")
    damage(tmp_path / "set" / "train-00000.npy", "half")
    assert "SHA-256 of train-00000.npy" in refused(train, *TINY, "--data", "set")


def test_other_data_or_another_tokenizer_is_refused(refused, call, run, tmp_path):
    for name, seed, tokenizer in (("other", 3, "byte"), ("bpe", 0, "bpe:300")):
        (tmp_path / f"{name}.txt").write_text(words(3000, seed))
        call(prepare, f"{name}.txt", "--tokenizer", tokenizer)
    assert "not the data set that this run started with" in refused(
        train, "--out", run, "--resume", "--steps", 25, "--data", "data/other"
    )
    assert "not with the checkpoint's tokenizer" in refused(
        train, "--init", run, "--data", "data/bpe", "--vocab_size", 300
    )


def test_the_whole_way_from_the_shell(tmp_path):
    """Text, data set, run, resumed run and text again, as a user would type it."""
    (tmp_path / "my.txt").write_text(words(3000), encoding="utf-8")
    tiny = [*TINY, "--data", "data/my"]
    for script, arguments, told in (
        ("prepare.py", ["my.txt", "--tokenizer", "bpe:300"], "vocabulary of 300"),
        ("train.py", [*tiny, "--steps", 4, "--stop_at", 2], "to continue: python train.py --out runs/toy-1 --resume"),
        ("train.py", ["--resume"], "bits per byte"),
        ("train.py", [*tiny, "--steps", 2], "the run is in runs/toy-2"),
        ("sample.py", ["runs/toy-1", "--prompt", "the small ", "--tokens", 20, "--seed", 1], "the small "),
    ):
        assert told in shell(script, *arguments, cwd=tmp_path).printed


def test_a_run_of_an_earlier_version_resumes_bit_for_bit(call, data, tmp_path):
    """golden/run-2026-11 stopped at step 4 of 10. losses.json has what the version that made it went on to compute."""
    shutil.copytree(Path(__file__).with_name("golden") / "run-2026-11", tmp_path / "old")
    call(train, "--out", "old", "--resume", "--data", data)
    expected = {int(step): loss for step, loss in json.loads((tmp_path / "old" / "losses.json").read_text()).items()}
    assert rows(tmp_path / "old", "loss") == pytest.approx(expected, abs=1e-5)
