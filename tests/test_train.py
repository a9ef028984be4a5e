"""train.py: batches, schedule, evaluation, checkpoints, and the command line."""

import itertools
import json
import math
import multiprocessing
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
from threading import Event
from types import SimpleNamespace
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import torch
from conftest import MACHINE, TINY, TINY_FLOPS, Ranks, assert_same_states, rows, shell, state_of, wait_for_step, words
from test_gguf import drawn

import checkpoint
import prepare
import train
from checkpoint import load_checkpoint
from model import GPT, Block, GPTConfig
from published import load_model


@pytest.fixture
def trained(call, data, tmp_path, monkeypatch):
    """trained("r", "--steps 3") trains a tiny model, trained("r", "--resume") goes on. Returns the run's folder."""
    monkeypatch.setattr(train, "sample", lambda *_: "")  # it would take longer than these runs

    def train_tiny(out: str, flags: str) -> Path:
        new = [] if "--resume" in flags else [*TINY, "--data", data, "--eval_tokens", 256]
        call(train, *new, "--out", out, *split(flags))
        return tmp_path / out

    return train_tiny


# ---- steps and evaluations


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 1000, 4097])
def test_each_epoch_visits_each_window_once_in_an_order_of_its_own(n):
    steps = [train.batch_indices(n, seed=1, n_drawn=8 * s, rows=8) for s in range(math.ceil(2 * n / 8))]
    one, other = np.concatenate(steps)[: 2 * n].reshape(2, n)
    another = train.batch_indices(n, seed=2, n_drawn=0, rows=n)
    assert sorted(one) == sorted(other) == list(range(n))
    if n > 60:
        assert all(np.mean(one == order) < 0.1 for order in (other, another, np.arange(n)))
        neighbours = np.abs(np.diff(one)).mean() / n
        assert 0.25 < neighbours < 0.42  # a third, where neighbours have nothing to do with each other


def test_a_resume_with_other_sizes_goes_on_where_the_data_was_left(trained, monkeypatch, capsys):
    """In windows of 16 tokens, an epoch has 916 of them: 10 steps of 32, 5 of 64, then 5 of 64 to its end."""
    drawn, draw = [], train.batch_indices
    monkeypatch.setattr(train, "batch_indices", lambda *given: drawn.append((given, draw(*given))) or drawn[-1][1])
    trained("r", "--epochs 1 --batch_tokens 512 --stop_at 10 --n_layer 1")
    trained("r", "--resume --batch_tokens 1024 --stop_at 15")
    trained("r", "--resume")
    assert sorted(np.concatenate([indices for _, indices in drawn])[:916]) == list(range(916)) and len(drawn) == 20
    assert "20 of 1,024 tokens: 1.05 epochs" in (printed := capsys.readouterr().out) and "come twice" not in printed
    trained("r", "--resume --epochs 3 --seq_len 32 --stop_at 21")
    assert drawn[-1][0] == (458, 1, 960 * 16 // 32, 32)  # windows, seed, those before, those of the step
    assert "in this epoch some text may come twice" in capsys.readouterr().out


def test_each_micro_batch_has_a_dropout_of_its_own_with_each_seed(trained, monkeypatch):
    seeds = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    for seed in (1, 2):
        trained(f"r{seed}", f"--steps 3 --batch_tokens 256 --seed {seed}")
    assert len(set(seeds)) == len(seeds) == 2 * 3 * 256 // (4 * 16)


@pytest.mark.parametrize("optimizer, clip", [("muon", 0), ("adamw", 0.25)])
def test_a_run_makes_the_steps_that_papers_define(trained, data, monkeypatch, optimizer, clip):
    """Matrices of blocks those of torch's Muon, here without bfloat16; all else those of AdamW (Loshchilov & Hutter,
    2019) with GPT-3's betas of 0.9 and 0.95. Only matrices decay. A resume changes how much, and the batches."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    flags = f"--optimizer {optimizer} --lr 0.015625 --warmup 0.5 --decay 0.25 --weight_decay 3 --momentum 0.6"
    flags += f" --grad_clip {clip} --bias --position learned --log_every 1 --seed 2 --steps 8 --stop_at 7"
    run = trained("r", flags)
    trained("r", "--resume --weight_decay 4 --seed 3")
    config, windows = train.build_config(config_of(run)), prepare.Windows(prepare.load_dataset(data)[1]["train"], 16)
    model, rates, norms = GPT(config), rows(run, "lr"), rows(run, "grad_norm")
    weights = dict(model.named_parameters())
    for name, tensor in weights.items():
        tensor.data = train.initial_rows(config, name, tensor.shape, range(len(tensor)), seed=2)
    of_muon = {name: p for name, p in weights.items() if optimizer == "muon" and "blocks" in name and p.ndim == 2}
    muon = of_muon and torch.optim.Muon(of_muon.values(), momentum=0.6, adjust_lr_fn="match_rms_adamw")
    m, v = ({name: torch.zeros_like(tensor) for name, tensor in weights.items()} for _ in range(2))
    for step, share in enumerate([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.5], 1):
        seed, decay = (2, 3) if step < 8 else (3, 4)
        inputs, targets, _ = windows.get(train.batch_indices(windows.n_windows, seed, 8 * (step - 1), 8))
        model(torch.from_numpy(inputs), torch.from_numpy(targets)).backward()
        rate, norm = share * 0.015625, math.sqrt(sum(tensor.grad.square().sum() for tensor in weights.values()))
        assert rates[step] == rate and norms[step] == pytest.approx(norm, rel=1e-4) and norm > 0.25
        for name, tensor in weights.items():
            g = tensor.grad.mul_(clip / norm if clip else 1)
            m[name], v[name] = 0.9 * m[name] + 0.1 * g, 0.95 * v[name] + 0.05 * g**2
            if name not in of_muon:
                tensor.data *= 1 - rate * decay * (tensor.ndim == 2)
                tensor.data -= rate * m[name] / (1 - 0.9**step) / ((v[name] / (1 - 0.95**step)).sqrt() + 1e-8)
        if muon:
            muon.param_groups[0] |= {"lr": rate, "weight_decay": decay}
            muon.step()
        model.zero_grad()
    torch.testing.assert_close(weights, state_of(run, 8)["model"], atol=1e-4, rtol=1e-4)


def test_recomputed_activations_change_no_bit_and_each_block_runs_twice(trained, monkeypatch):
    """With dropout and experts, whose routing is computed twice as well."""
    forward, calls = Block.forward, []
    monkeypatch.setattr(Block, "forward", lambda *given: calls.append(torch.is_grad_enabled()) or forward(*given))
    flags = "--steps 3 --dropout 0.2 --n_expert 4 --lr 1e-2"
    kept, once = trained("kept", flags), sum(calls)
    again = trained("again", flags + " --recompute")
    assert sum(calls) == 3 * once
    assert_same_states(kept, again, 3)


def test_all_blocks_are_compiled_once_to_train_and_once_to_evaluate(trained, monkeypatch):
    """Into graphs, which a backend counts and runs as they are: the steps are those of a run without compilation."""
    flags, graphs = "--steps 2 --eval_every 1", []
    counted = partial(torch.compile, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    monkeypatch.setattr(torch, "compile", counted)
    plain = trained("plain", flags)
    for out, more, n_graphs in ("kept", " --compile", 2), ("again", " --compile --recompute", 4):
        assert_same_states(plain, trained(out, flags + more), 2)
        assert len(graphs) == n_graphs


def test_an_evaluation_has_the_mean_loss_of_windows_that_are_spread_over_the_held_out_text(trained, data, monkeypatch):
    """In bits per byte, too; tokens from 256 on are no bytes. Numbers become float64 on the CPU: MPS has none."""
    double = torch.Tensor.double
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: setattr(tensor, "left", True) or tensor)
    monkeypatch.setattr(torch.Tensor, "double", lambda tensor: double(tensor) if tensor.left else None)
    tokens = torch.tensor(np.concatenate(prepare.load_dataset(data)[1]["val"]).astype(np.int64))
    n = (len(tokens) - 1) // 16
    for k in (n, 10, 1):
        run = trained(f"r{k}", f"--steps 2 --eval_tokens {16 * k}")
        model = load_model(run)[0].eval()
        windows = (tokens[16 * (i * n // k) :][:17].unfold(0, 16, 1)[:, None] for i in range(k))
        with torch.no_grad():
            losses = [model(inputs, targets).item() for inputs, targets in windows]
        error = np.std(losses, ddof=1) / math.sqrt(k) if k > 1 else None
        bits = np.mean(losses) / math.log(2) * len(tokens) / (tokens < 256).sum().item()
        for key, value in {"val_loss": np.mean(losses), "val_loss_error": error, "val_bits_per_byte": bits}.items():
            assert rows(run, key) == {2: pytest.approx(value, abs=1e-5)}, key


# ---- resume


def test_a_resumed_run_equals_one_that_never_stopped_and_evaluations_change_neither(trained, data):
    """Twenty steps against ten, and ten more: parameters, optimizers, losses; across an epoch's edge, with dropout."""
    flags = "--steps 20 --dropout 0.1 --log_every 3 --batch_tokens 1024 --micro_batch 32"
    straight, halves = trained("straight", flags + " --eval_every 3"), trained("halves", flags + " --stop_at 10")
    trained("halves", "--resume")
    assert 10 * 1024 < sum(map(len, prepare.load_dataset(data)[1]["train"])) < 20 * 1024
    assert_same_states(straight, halves, 20)
    assert rows(straight, "loss").items() <= rows(halves, "loss").items()


@pytest.mark.parametrize("lost, more", [((15, 20), " --config run/config.json"), ((10, 15, 20), "")])
def test_a_run_whose_last_saves_are_lost_makes_its_steps_again_and_logs_each_once(run, trained, lost, more):
    """With its own settings. Without any checkpoint as well: it stopped before the first, or while that was saved."""
    losses = rows(run, "loss")
    for step in lost:
        (run / f"step-{step:08d}.json").unlink()
    (run / "step-00000005.pt").write_bytes(b"half of it")
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + "garbage}\n")
    trained("run", "--resume --keep 4" + more)
    assert rows(run, "loss") == losses and config_of(run)["keep"] == 4


def test_a_resume_reads_the_newest_checkpoint_once_although_it_is_the_best_as_well(run, trained, monkeypatch):
    read, sha256_of = [], checkpoint.sha256_of
    monkeypatch.setattr(checkpoint, "sha256_of", lambda path: read.append(path.name) or sha256_of(path))
    trained("run", "--resume --steps 21")
    assert read == ["step-00000020.pt", "step-00000021.pt"]


def test_resuming_says_what_the_command_line_changes_and_whether_the_learning_rate_rises(run, trained, capsys):
    trained("run", "--resume --steps 40 --lr 4e-3 --eval_tokens 16")
    printed = capsys.readouterr().out
    assert "steps from 20 to 40" in printed and "lr from 0.008 to 0.004" in printed
    assert "the new schedule raises the learning rate to 0.004" in printed
    trained("run", "--resume --steps 41")  # ended at 40, where it was almost zero
    assert "raises the learning rate" not in capsys.readouterr().out
    written = (run / "config.json").read_text()
    (run / "config.json").write_text(written.replace('"dropout": 0.1', '"dropout": 0.5'))
    trained("run", "--resume --epochs 1 --stop_at 42")  # of 115 steps
    printed = capsys.readouterr().out
    assert "--resume ignores dropout 0.5 in config.json, for 0.1" in printed and printed.count("ignores") == 1
    assert "raises the learning rate to 0.004" in printed


def test_a_second_process_in_the_same_folder_is_refused_until_the_first_has_ended(data, refused, call, tmp_path):
    first = Ranks(tmp_path, *TINY, "--data", data, "--out", "r", "--steps", 10**6, "--save_every", 5)
    wait_for_step(tmp_path / "r", 12)
    assert "another process is training in r" in refused(train, "--out", "r", "--resume", "--steps", 9)
    os.kill(first.pid(0), signal.SIGKILL)
    first.finish(-signal.SIGKILL)
    step = load_checkpoint("r")[0]["step"]
    call(train, "--out", "r", "--resume", "--stop_at", step + 1, "--eval_tokens", 16)
    assert state_of(Path("r"), step)
    Path("r/.lock").unlink()
    Path("r/.lock").mkdir()
    assert "r/.lock: Is a directory" in refused(train, "--out", "r", "--resume", "--steps", 10**6)


@pytest.mark.parametrize("flags, told", [
    ("--out run", "--resume"), ("--out run --resume --init run", "init None, not run: leave that setting out"),
    ("--out run --resume --steps 22 --optimizer adamw", "the run in run has optimizer muon, not adamw"),
    ("--out run --resume --vocab_size 300", "vocab_size 259, not 300"),
    ("--init run --vocab_size 258", "vocab_size 259, not 258"),
    ("--init run --n_layer 2 --n_inner 64", "the model of --init run has n_inner 128, not 64: leave that setting out"),
])
def test_what_a_run_does_not_allow_is_refused_by_name_and_leaves_it_as_it_is(run, refused, data, flags, told):
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir() if path.name != ".lock"}
    assert told in refused(train, *split(flags), "--data", data)
    assert before == {path.name: path.stat().st_mtime_ns for path in run.iterdir() if path.name != ".lock"}


def test_ctrl_c_gives_up_a_step_or_an_evaluation_and_saves(trained, monkeypatch, capsys):
    """In the first of a step's two micro-batches, and in the evaluation after step 3. Nothing of it is left behind."""
    flags, calls, forward = "--steps 5 --eval_every 3", [], GPT.forward
    straight = trained("straight", flags)

    def interrupted(self, *given, **more):
        calls.append(self.training)
        if calls.count(training) == at and self.training == training:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, *given, **more)

    monkeypatch.setattr(GPT, "forward", interrupted)
    for training, at, out in (True, 7, "r"), (False, 3, "s"):
        calls.clear()
        run, told = trained(out, flags), f"at step 3 and saved; to continue: python train.py --out {out} --resume\n"
        assert calls.count(training) == at and load_checkpoint(out)[0]["step"] == 3
        assert f"stopped {told}" in capsys.readouterr().out
        trained(out, "--resume")
        assert_same_states(straight, run, 5)


def test_a_long_step_shows_how_far_it_has_come(monkeypatch):
    shown, stop = [], train.Stop.__new__(train.Stop)
    stop.alone, stop.received, stop.log = True, [], SimpleNamespace(glimpse=shown.append)
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=itertools.count(0, 0.4).__next__))
    assert list(stop.watched(range(8, 16, 2), "step 3")) == [8, 10, 12, 14]
    assert shown == ["step 3: 2 of 4 micro-batches", "step 3: 3 of 4 micro-batches"]


def test_training_goes_on_when_the_reader_of_its_output_leaves(data, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    flags = [*TINY, "--data", data, "--out", "r", "--steps", 9, "--log_every", 1]
    process = Ranks(tmp_path, *flags, stdout=tmp_path / "pipe")
    with open(tmp_path / "pipe") as reader:
        reader.readline()
    assert process.finish().stderr == ""
    assert load_checkpoint(tmp_path / "r")[0]["step"] == 9


def test_init_begins_with_weights_and_a_recipe_of_its_own_and_ends_with_a_sample(run, call, data, tmp_path, capsys):
    """Its seed draws the sample. It takes settings of its model again, others that fit, and steps instead of epochs."""
    flags, tuned = ["--init", run, "--data", data, *split("--stop_at 1 --dtype float32 --seed 7")], tmp_path / "tuned"
    call(train, *flags, "--out", "tuned")
    assert rows(tuned, "val_loss")[0] == pytest.approx(rows(run, "val_loss")[20], abs=1e-6)
    assert state_of(tuned, 1)["optimizer"]["embedding.weight.step"] == 1  # AdamW counts its steps
    recipe = {"epochs": 3, "batch_tokens": 56 * 16, "weight_decay": 0, "lr": 8e-3, "micro_batch": 8}  # of 916 rows
    assert (recipe | {"dropout": 0}).items() <= config_of(tuned).items()
    capsys.readouterr()
    call(train, *split("--resume --out tuned --steps 2"))
    assert max(rows(tuned, "val_loss")) == 2
    model, tokenizer, *_ = load_model(tuned)
    torch.manual_seed(7)
    text = tokenizer.decode(drawn(model.eval(), tokenizer, [tokenizer.end_of_text], 200, temperature=0.8))
    assert f"a sample:\n{text}\n\n" in capsys.readouterr().out
    call(train, *flags, *split("--n_inner 128 --dropout 0.2 --seq_len 8 --micro_batch 16 --batch_tokens 256"))


@pytest.mark.parametrize("n", [1, 12, 100, 1000, 10**6])
@pytest.mark.parametrize("world", [1, 3])
def test_fine_tuning_makes_about_16_steps_of_few_rows(monkeypatch, n, world):
    monkeypatch.setattr(train.dist, "get_world_size", lambda: world)
    config = train.fine_tuning_batch(train.Config(batch_tokens=None, seq_len=100), n)
    rows = config.batch_tokens / 100
    assert rows % (world * config.micro_batch) == 0 and rows <= 81
    assert rows == world if n < 32 * world else n / rows >= 16 and rows > min(n // 16, 81) * 0.7


# ---- checkpoints


def test_the_newest_and_the_best_checkpoints_are_kept_and_a_worse_one_is_never_the_best(trained, monkeypatch):
    """What was in the folder before is a user's."""
    Path("r").mkdir()
    Path("r/step-00000009.pt.partial").touch()
    monkeypatch.setattr(train, "evaluate", Mock(side_effect=[(loss, 0.1) for loss in (3.0, 2.0, 2.5, 2.4, 2.2, 2.1)]))
    run = trained("r", "--steps 6 --eval_every 1 --save_every 1 --keep 3 --stop_at 3")
    assert (run / "step-00000009.pt.partial").exists()
    trained("r", "--resume")
    assert load_checkpoint(run / "best.json")[0]["step"] == 2 and checkpoint.read_best(run)["val_loss"] == 2.0
    assert {path.stem for path in run.glob("step-*.pt")} == {f"step-{step:08d}" for step in (2, 4, 5, 6)}


def test_weights_of_half_precision_travel_in_the_dtype_of_the_parameters(alone):
    """The other ranks wait for numbers of that size."""
    checkpoint.fill(sent := torch.zeros(3), lambda rows: torch.full((len(rows),), 1.5, dtype=torch.bfloat16))
    assert sent.dtype == torch.float32 and sent.tolist() == [1.5] * 3


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_rows_of_a_tensor_come_from_the_parts_that_torch_would_divide_it_into(parts):
    for n in range(1, 12):
        tensor, number = torch.arange(2 * n).view(n, 2), torch.tensor(7.0)
        pieces = [*tensor.chunk(parts), *[tensor[:0]] * parts][:parts]
        opened = []
        held = [lambda p=p: opened.append(p) or {"model": {"t": p, "n": number}} for p in pieces]
        tensors = checkpoint.Tensors("model", held)
        assert torch.equal(tensors["t"], tensor) and tensors["n"] == tensors.rows("n", range(0), 0) == 7
        for first, end in itertools.combinations_with_replacement(range(n + 1), 2):
            opened.clear()
            assert torch.equal(tensors.rows("t", range(first, end), n), tensor[first:end])
            needed = [p for p in pieces if set(p.flatten().tolist()) & set(tensor[first:end].flatten().tolist())]
            assert len(opened) == 1 + len(needed)  # the first one tells what there is


def config_of(run: Path) -> dict:
    return json.loads((run / "config.json").read_text())


def save(run: Path, step: int, state: dict, parts: int = 1, **more) -> None:
    state = {**state, "step": step}
    written = [checkpoint.write_part(run, step, state, part, parts, "mark") for part in range(parts)]
    checkpoint.commit(run, step, written, **more)


def test_a_rank_reads_its_share_of_the_parts_to_find_damage(tmp_path):
    parts = []
    for part, state in enumerate([dict.fromkeys(checkpoint.HEAD | {"model", "optimizer"}, {}), {"model": {}}]):
        parts.append(checkpoint.write_part(tmp_path, 1, state, part, 2, "mark"))
    checkpoint.commit(tmp_path, 1, parts, keep=1)
    found = [checkpoint.damage(tmp_path / "step-00000001.json", first, 3) for first in range(3)]
    assert found == [None, "step-00000001.2-of-2.mark.pt lacks optimizer", None]


@pytest.mark.parametrize("call_number", range(17))
def test_a_kill_at_any_call_of_a_save_loses_nothing(run, call_number):
    """The process is killed when it is about to make its n-th call that changes the disk. Two checkpoints are kept."""
    state, calls = state_of(run, 20), iter(range(call_number))

    def save_until_killed():
        for name in ("fsync", "replace", "unlink", "open", "write"):

            def counted(*arguments, real=getattr(os, name), **more):
                if next(calls, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **more)

            setattr(os, name, counted)
        save(run, 25, state, parts=2, keep=2, best_loss=0.1)

    (process := multiprocessing.get_context("fork").Process(target=save_until_killed)).start()
    process.join()
    assert process.exitcode == (0 if call_number == 16 else -signal.SIGKILL)
    whole = [step for step in (5, 10, 15, 20, 25) if (run / f"step-{step:08d}.json").exists() and state_of(run, step)]
    assert len(whole) >= 2 and whole[-1] == load_checkpoint(run)[0]["step"] >= 20
    assert load_checkpoint(run / "best.json")[0]["step"] in (20, 25)
    checkpoint.clear_folder(run, whole[-1], best_is_damaged=False)
    assert {int(path.name[5:13]) for path in run.glob("step-*.*")} == set(whole)


def test_a_full_disk_ends_the_run_with_a_sentence_and_the_checkpoint_before_is_whole(run):
    process = Ranks(run.parent, "--out", run, "--resume", "--steps", 30)
    resource.prlimit(process.pid(0), resource.RLIMIT_FSIZE, (100_000, -1))
    told = process.finish(2).stderr
    assert "cannot save in" in told and "free some space and --resume" in told
    assert load_checkpoint(run)[0]["step"] == 20 and not list(run.glob("*.partial"))


@pytest.mark.parametrize("error, told", [(OSError("no room"), "no room"), (MemoryError(), "MemoryError")])
def test_a_save_that_fails_is_tried_again_at_the_next_and_is_not_the_best(trained, monkeypatch, capsys, error, told):
    write_part = Mock(wraps=checkpoint.write_part, side_effect=[error, DEFAULT, DEFAULT])
    monkeypatch.setattr(checkpoint, "write_part", write_part)
    monkeypatch.setattr(train, "evaluate", Mock(side_effect=[(1.0, 0.1), (2.0, 0.1), (3.0, 0.1)]))
    run = trained("r", "--steps 15 --save_every 5 --eval_every 5")
    assert json.loads((run / "best.json").read_text())["step"] == 10
    assert f"cannot save in r ({told}); trying again" in capsys.readouterr().out
    assert [call.args[1] for call in write_part.call_args_list] == [5, 10, 15]
    assert [state_of(run, step)["step"] for step in (10, 15)] == [10, 15]


def test_training_goes_on_while_a_checkpoint_is_written_which_counts_before_the_next_save(trained, monkeypatch):
    """It holds a copy of the weights and of the optimizer state, which go on to change."""
    straight = trained("straight", "--steps 20 --stop_at 10")
    write_part, progress, begin, written, valid = checkpoint.write_part, train.Log.progress, Event(), Event(), []

    def write_late(*given):
        assert begin.wait(30)
        record = write_part(*given)
        written.set()
        return record

    def watched(log, step):
        progress(log, step)
        valid.append(Path("r/step-00000010.json").exists())
        if step == 12:
            begin.set()
            assert written.wait(30)

    monkeypatch.setattr(checkpoint, "write_part", write_late)
    monkeypatch.setattr(train.Log, "progress", watched)
    run = trained("r", "--steps 20 --save_every 10")
    assert not any(valid[:12]) and valid[-1]
    assert_same_states(straight, run, 10)


def test_metrics_that_cannot_be_written_do_not_stop_a_run(alone, tmp_path, capsys, monkeypatch):
    """A full disk ends TensorBoard's curves, which is said once, and no row that was written is called lost."""
    log = train.Log(train.Config(out=str(tmp_path)), MACHINE, None, 0, 0.0)
    if log.board:
        writer = type(log.board.file_writer.event_writer._async_writer._writer)
        monkeypatch.setattr(writer, "write", lambda *_: open("/dev/full", "w", 1).write("\n"))
        for step in (1, 2):
            log.record(step=step, loss=1.0)
        told = "TensorBoard's curves end at step 1: [Errno 28] No space left on device\n"
        assert capsys.readouterr().err == told and len(rows(tmp_path, "loss")) == 2
    log.path = Path("/dev/full")
    log.record(step=7, loss=1.0)
    assert "the metrics of step 7 are lost: [Errno 28]" in capsys.readouterr().err


def damage(path: Path, how: bytes | int | str) -> None:
    """Replace a file by other bytes, cut it short, or flip the one of its bits that the name of a bit says."""
    whole = path.read_bytes()
    at = random.Random(how).randrange(len(whole))
    flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    path.write_bytes(flipped if isinstance(how, str) else whole[:how] if isinstance(how, int) else how)


@pytest.mark.parametrize("suffix, how", [
    *(("pt", how) for how in (b"", 100, 240_000, -1, "bit 1", "bit 2", "bit 3")),
    *(("json", held) for held in (b"", b"[]", b"{}", b'{"file": 5}', b"\xff", b'{"file": "no.pt", "sha256": ""}')),
])
def test_a_damaged_checkpoint_is_passed_over_by_name(run, capsys, suffix, how):
    damage(run / f"step-00000020.{suffix}", how)
    assert load_checkpoint(run)[0]["step"] == 15
    assert "damaged:" in (printed := capsys.readouterr().err) and "step-00000020" in printed


def test_a_checkpoint_that_a_run_replaces_at_that_moment_is_not_called_damaged(run, monkeypatch, capsys):
    damage, state = checkpoint.damage, state_of(run, 20)
    (run / "best.json").unlink()

    def replaced(record):
        monkeypatch.setattr(checkpoint, "damage", damage)
        save(run, 25, state, keep=1)
        return damage(record)

    monkeypatch.setattr(checkpoint, "damage", replaced)
    assert load_checkpoint(run)[0]["step"] == 25 and capsys.readouterr().err == ""


def test_a_checkpoint_without_its_other_file_names_it(run, capsys):
    for suffix in (".pt", ".json"):
        (run / f"step-00000020{suffix}").rename(run / f"mine{suffix}")
    with pytest.raises(ValueError, match="no intact checkpoint left"):
        load_checkpoint(run / "mine.pt")
    assert "it names step-00000020.pt, which is not beside it" in capsys.readouterr().err
    (run / "mine.json").unlink()
    with pytest.raises(ValueError, match="mine.json is not beside"):
        load_checkpoint(run / "mine.pt")


@pytest.mark.parametrize("best", [None, b"\xff{", b'{"file": "step-00000020.pt", "val_loss": "low"}'])
def test_damaged_checkpoints_are_gone_when_a_new_one_is_whole(run, trained, best):
    """And do not count among those that are kept, nor as the best. Damage of best.json itself harms nothing either."""
    assert checkpoint.read_best(run)["step"] == 20
    users = {"film.mkv.partial", "film.damaged", "step-by-step.pt", "step-by-step.json.partial"}
    damage(run / "step-00000020.pt", 1000)
    (run / "best.json").write_bytes(best or (run / "best.json").read_bytes())
    for name in ("step-00000025.pt", "step-00000005.pt.partial", *users):  # of a process that was killed, and a user's
        (run / name).write_bytes(b"half of it")
    trained("run", "--resume --keep 1 --stop_at 16")
    left = {path.name for path in run.iterdir() if path.name.startswith("step-") or path.name in users}
    assert left == {"step-00000016.json", "step-00000016.pt", *users}
    assert load_checkpoint(run)[0]["step"] == load_checkpoint(run / "best.json")[0]["step"] == 16


def test_a_run_without_an_intact_checkpoint_stops_and_never_executes_anything(run, refused):
    bomb = type("Bomb", (), {"__reduce__": lambda self: (os.mkdir, ("executed",))})()
    pickle.loads(pickle.dumps(bomb))  # it would work
    Path("executed").rmdir()
    for write in (lambda path: path.write_bytes(pickle.dumps(bomb)), partial(torch.save, {"model": bomb})):
        for path in run.glob("step-*.pt"):
            write(path)
            record = {"step": 1, "file": path.name, "sha256": prepare.sha256_of(path)}
            path.with_suffix(".json").write_text(json.dumps(record))
        assert "no intact checkpoint left" in refused(train, "--out", run, "--resume")
    assert not Path("executed").exists()


# ---- the command line


def test_help_explains_every_setting(capsys, call):
    pytest.raises(SystemExit, call, train, "--help")
    printed = capsys.readouterr().out
    for f in train.fields(train.Config)[:-2]:  # the last two, context and shift, are no flags
        assert re.search(rf"^  --{f.name}[ ,].*\n? +\w", printed, re.MULTILINE), f.name


def test_the_config_of_a_run_makes_the_same_run_in_a_folder_of_its_own(run, call, tmp_path, monkeypatch):
    """Although another process takes the first number while this one builds its model."""
    build = train.build_model
    monkeypatch.setattr(train, "build_model", lambda *_: (tmp_path / "runs" / "toy-1").mkdir(parents=True) or build(*_))
    call(train, "--config", run / "config.json")
    new = tmp_path / "runs" / "toy-2"
    assert config_of(run) | {"out": "runs/toy-2"} == config_of(new)
    assert_same_states(run, new, 20)


def test_flags_override_the_file_which_overrides_the_preset(call, data, tmp_path):
    settings = {"steps": 7, "seed": 5, "shift": 64, "context": 9, "model": {"n_layer": 1}}
    (tmp_path / "c.json").write_text(json.dumps(settings))
    call(train, *TINY[2:], "--config", "c.json", "--seed", 6, "--steps", 2, "--data", data, "--out", "r")
    config = config_of(tmp_path / "r")
    assert {"steps": 2, "seed": 6, "n_layer": 1, "n_embd": 32, "shift": 0, "context": None}.items() <= config.items()
    assert train.build_config(config | {"n_embd": 64}).n_inner == GPTConfig(n_embd=64).n_inner  # derived again


WRONG = ["steps 0", "momentum 1.5", "skip_bad_steps -1", "warmup nan", "lr nan", "lr inf", "lr -1.0", "seed -1"]
WRONG += [f"seed {10**23}", "grad_clip -1.0", "timeout nan", "stop_at 999", "device meta", "device abacus"]
WRONG += ["n_layer 0", "dropout 1.0", "n_kv_head 3", "head_dim 3"]


@pytest.mark.parametrize("flags, told", [
    *((f"--{wrong}", wrong) for wrong in WRONG), ("--no_such_flag 1", "--no_such_flag"), ("--steps many", "--steps"),
    ("--preset gpt9", "gpt9"), ("--data data/nowhere", "data/nowhere"), ("--config nowhere.json", "nowhere.json"),
    ("--resume", "there is no checkpoint in runs/"), ("--init nowhere", "no checkpoint"),
    ("--batch_tokens 100", "use 64 or 128"), ("--batch_tokens 10", "use 64"), ("--steps 2 --epochs 1", "not both"),
    ("--n_embd 30 --n_head 4", "n_embd 30 is not divisible by n_head 4"), ("--warmup 0.7 --decay 0.7", "warmup 0.7"),
    ("--n_expert 4 --n_expert_active 5", "n_expert_active 5 is larger than n_expert 4"),
    *((name + "x" * 300, "File name too long") for name in ("--out ", "--resume --out ", "--init ")),
    ("--out /proc/nowhere", "/proc/nowhere"), ("--out ''", "--out is empty"),
    ("--shard 2", "1 processes cannot be divided into groups of --shard 2"),
])
def test_bad_input_is_one_sentence_before_the_first_step(refused, data, tmp_path, flags, told):
    assert told in refused(train, *TINY, "--data", data, *split(flags))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("settings, told", [
    ({"optimizer": "Muon"}, "optimizer 'Muon' is none of muon, adamw"),
    ({"n_layer": 2.5}, "n_layer 2.5 is not of type int"), ({"gated": "false"}, "gated 'false' is not of type bool"),
    ({"steps": True}, "steps True is not of type int"), ({"lr": "fast"}, "lr 'fast' is not of type float"),
    ({"preset": ["toy"]}, "['toy']"), ({"data": 5}, "data 5 is not of type str"),
    ({"model": {"n_head": None}}, "n_head None is not of type int"), ({"lr": 1e400}, "lr inf"),
    ({"steps": 5, "model": {"n_layers": 3}}, "unknown setting n_layers"),
    (["steps"], "cannot read settings from c.json"),
])
def test_a_settings_file_is_checked_as_flags_are(refused, tmp_path, settings, told):
    (tmp_path / "c.json").write_text(json.dumps(settings))
    assert told in refused(train, "--config", "c.json")


DEFAULTS = {
    "data": "data/stdlib", "steps": 720, "epochs": None, "batch_tokens": 4096, "micro_batch": 8, "document_mask": False,
    "optimizer": "muon", "lr": 8e-3, "warmup": 0.02, "decay": 0.5, "weight_decay": 0.1, "momentum": 0.8, "grad_clip": 1,
    "skip_bad_steps": 0, "dtype": "auto", "recompute": False, "compile": None, "device": None, "shard": 1, "seed": 1,
    "timeout": 600, "eval_every": 200, "eval_tokens": 2**20, "save_every": 200, "log_every": 20, "keep": 2,
}
GPT2 = {"batch_tokens": 2**19, "micro_batch": 16, "steps": 20_000, "lr": 6e-4, "momentum": 0.95, "log_every": 1}


@pytest.mark.parametrize("preset, settings", [
    ("shakespeare", {"data": "data/shakespeare", "batch_tokens": 8192, "steps": 480, "weight_decay": 0.4}),
    ("shakespeare-quick", {"batch_tokens": 1536, "micro_batch": 24, "steps": 80, "lr": 3.2e-2, "decay": 0.7,
                           "data": "data/shakespeare"}),
    ("toy", {}), ("gpt2", GPT2 | {"data": "data/gpt2"}), ("gpt2-xl", GPT2 | {"micro_batch": 1}),
])
def test_a_preset_trains_as_the_readme_help_and_for_gpt2_the_paper_of_gpt3_say(preset, settings):
    assert (DEFAULTS | settings).items() <= train.build_config({"preset": preset}).given.items()


@pytest.mark.parametrize("found, dtype", [(False, "float32"), (True, "bfloat16")])
def test_products_are_in_bfloat16_where_the_processor_has_it(call, data, tmp_path, monkeypatch, found, dtype):
    seen, linear, product = set(), torch.nn.functional.linear, torch.baddbmm  # which Muon uses
    monkeypatch.setattr(train, "has_bfloat16", lambda device: found)
    monkeypatch.setattr(train, "peak_flops", lambda device, dtype: 2e9 if dtype == "bfloat16" else 1e9)
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *given: seen.add((y := linear(*given)).dtype) or y)
    monkeypatch.setattr(torch, "baddbmm", lambda x, *given, **more: seen.add(x.dtype) or product(x, *given, **more))
    call(train, *TINY[:-2], "--data", data, "--out", "r", "--steps", 2, "--stop_at", 1)
    assert config_of(tmp_path / "r")["dtype"] == dtype and seen == {getattr(torch, dtype)}


def test_without_a_data_set_the_default_corpus_is_prepared(call, tmp_path, monkeypatch):
    prepared = prepare.prepare
    (tmp_path / "my.txt").write_text(words(500))
    monkeypatch.setattr(prepare, "prepare", lambda _, out, wait: prepared(["my.txt"], out, "byte", 0.1))
    call(train, *TINY, "--steps", 1)
    assert json.loads((tmp_path / "data" / "stdlib" / "meta.json").read_text())["sources"] == ["my.txt"]


def test_restarts_by_torchrun_that_would_hang_are_refused(refused, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert "unless TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is in its environment" in refused(train, "--data", "nowhere")


def test_the_log_reports_what_a_clock_and_the_data_say(trained, data, monkeypatch, capsys):
    """Each of a step's two micro-batches takes a second, an evaluation 100, and the product that gives the peak 100."""
    now, forward = [0], GPT.forward

    def timed(self, *arguments, **more):
        now[0] += 1 if self.training else 100
        return forward(self, *arguments, **more)

    monkeypatch.setattr(GPT, "forward", timed)
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("timeit.repeat", lambda *_, **__: [300, 100, 200])
    monkeypatch.setattr(train, "peak_flops", train.peak_flops.__wrapped__)  # without its cache
    run = trained("r", "--epochs 0.08 --eval_every 5 --eval_tokens 64 --log_every 4 --ngram_rows 8")
    share = 64 * TINY_FLOPS / (2 * 1024**3 / 100)
    for key, values in {"seconds": [2, 8, 116, 120], "tokens_per_second": [64] * 4, "mfu": [share] * 4}.items():
        assert rows(run, key) == pytest.approx(dict(zip((1, 4, 8, 10), values))), key
    printed = capsys.readouterr().out
    for told in (
        f"{data}: 14,671 training tokens, 1,631 held out\n",
        f"{2 * 32 * (259 + 8) + 2 * (15360 + 96) + 32:,} parameters, {TINY_FLOPS / 1e6:.1f} MFLOP per token\n",
        f"10 of 128 tokens: {1280 / (916 * 16):.2f} epochs, {1280 * TINY_FLOPS:.3g} FLOP\n",  # in windows of 16 tokens
        f" 64 tokens/s  {share:4.0%} of peak  0:18 left\n",  # after the first step, of 10 that take two seconds
        f" 64 tokens/s  {share:4.0%} of peak  0:29 left\n",  # after 8, which took 116 seconds
        "bits per byte after 3:40\n", "export   not possible: no published family has this combination",
    ):
        assert told in printed


def test_the_plot_of_a_run_spans_its_losses(tmp_path):
    written = [{"step": 1, "loss": 5.0}, {"step": 50, "loss": 3.0}, {"step": 75, "loss": float("nan")}]
    written += [{"step": 100, "loss": 1.0}, {"step": 100, "val_loss": 2.8}, *[{"step": 26, "loss": 3.2}] * 6]
    lines = [*map(json.dumps, written), '{"step": 80, "lo']  # a torn one
    log = train.Log.__new__(train.Log)
    log.path, log.config = tmp_path / "metrics.jsonl", SimpleNamespace(steps=100)
    log.path.write_text("\n".join(lines))
    assert log.plot(width=5, height=3).splitlines() == [
        "  5.00 |.    ",
        "       | .. o",
        "  1.00 |    .",
        "       +-----",
        "        100 steps; . training loss, o held-out loss",
    ]
    log.path.write_text("\n".join(lines[2:]))
    assert log.plot() == ""  # a plot of so few losses shows nothing


@pytest.mark.parametrize("how, told", [(1000, "damaged (train-00000.npy: "), ("bit 1", "SHA-256 of train-00000.npy")])
def test_a_damaged_shard_is_refused(refused, data, tmp_path, how, told):
    shutil.copytree(data, tmp_path / "set")
    damage(tmp_path / "set" / "train-00000.npy", how)
    assert told in refused(train, *TINY, "--data", "set") and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("save_every", [1, 10**6])
def test_damage_found_in_training_stops_it_before_a_save(refused, data, tmp_path, monkeypatch, save_every):
    monkeypatch.setattr(prepare, "damaged_shard", lambda *_: wait_for_step(tmp_path / "r", 1) or "it is damaged")
    monkeypatch.setattr(train.threading.Thread, "join", lambda *_: None)
    flags = [*TINY, "--data", data, "--steps", 2000, "--save_every", save_every, "--eval_every", 10**6]
    assert "it is damaged" in refused(train, *flags, "--out", "r")
    assert max(rows(tmp_path / "r", "loss")) < 2000 and not list(tmp_path.glob("r/step-*"))


def test_ranks_that_see_the_same_data_verify_a_share_each(alone, data, monkeypatch):
    """This one is the second of three that do; a fourth has a copy of its own."""
    monkeypatch.setattr(train, "from_all_ranks", lambda value: [value, (0, 0), value, value])
    monkeypatch.setattr(train.dist, "get_rank", lambda: 2)
    monkeypatch.setattr(prepare, "damaged_shard", Mock(return_value=None))
    train.Verification(data, {})
    prepare.damaged_shard.assert_called_once_with(data, {}, 1, 3)


def test_another_tokenizer_is_refused(refused, call, run, tmp_path):
    (tmp_path / "bpe.txt").write_text(words(3000))
    call(prepare, "bpe.txt", "--tokenizer", "bpe:300")
    told = refused(train, "--init", run, "--data", "data/bpe", "--vocab_size", 300)
    assert told.endswith(f"not with the checkpoint's tokenizer: prepare it with --tokenizer {run}")


def test_the_whole_way_from_the_shell(tmp_path):
    """Text, data set, run, resumed run and text again, as a user would type it."""
    (tmp_path / "my.txt").write_text(words(3000), encoding="utf-8")
    tiny = [*TINY, "--data", "data/my"]
    for script, arguments, told in (
        ("prepare.py", ["my.txt", "--tokenizer", "bpe:300"], "vocabulary of 300"),
        ("train.py", [*tiny, "--steps", 700, "--stop_at", 2], "11 epochs teach it the text by heart"),
        ("train.py", [*tiny, "--steps", 2], "the run is in runs/toy-2"),
        ("train.py", split("--out runs/toy-1 --resume --steps 4 --stop_at 3"), "resuming runs/toy-1/step-00000002"),
        ("train.py", ["--resume"], "resuming runs/toy-1/step-00000003"),  # the newest is the one that was saved last
        ("sample.py", ["runs/toy-1", "--prompt", "the small ", "--tokens", 20, "--seed", 1], "the small "),
    ):
        assert told in shell(script, *arguments, cwd=tmp_path).printed


def test_a_run_of_an_earlier_version_resumes_bit_for_bit(trained, data, tmp_path):
    """golden/run-2026-11 stopped at step 4 of 10. losses.json has what the version that made it went on to compute. Its
    checkpoint, here the best as well, is one file that the JSON names by itself, and nests the model's settings."""
    old = shutil.copytree(Path(__file__).with_name("golden") / "run-2026-11", tmp_path / "old")
    (old / "best.json").write_text(json.dumps(json.loads((old / "step-00000004.json").read_text()) | {"val_loss": 0.5}))
    trained("old", f"--resume --keep 1 --data {data}")
    expected = {int(step): loss for step, loss in json.loads((old / "losses.json").read_text()).items()}
    assert rows(old, "loss") == pytest.approx(expected, abs=1e-5)
    assert {path.name for path in old.glob("*.pt")} == {"step-00000004.pt", "step-00000010.pt"}  # the best, the newest
