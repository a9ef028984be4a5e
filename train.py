"""Train a GPT.

    python train.py                                             the toy preset on the default corpus
    python train.py --preset shakespeare --data data/shakespeare
    python train.py --n_layer 6 --lr 2e-3 --out runs/deeper     any setting overrides the preset's
    python train.py --config runs/toy-1/config.json --seed 2    the settings of an earlier run, with another seed
    python train.py --out runs/toy-1 --resume                   continue a run that was stopped
    python train.py --init downloads/gpt2 --data data/mine      start from published weights, or from another run's
    python train.py --init runs/toy-1 --data data/chat          fine-tune it on conversations (chat.py --prepare)
    torchrun --standalone --nproc_per_node=8 train.py           train in 8 processes, on CPUs or GPUs
    torchrun ... train.py --preset llama3-8b --shard 8 --recompute          share each copy of the model (FSDP2)

A run is a folder with config.json, tokenizer.json, metrics.jsonl and checkpoints. Ctrl-C stops it and saves it. Apart
from weights and optimizer state, the number of steps done is a run's only state: the batch and the dropout of the next
step depend on the seed and that number alone, so that a resumed run gives the same bits as one that was never stopped.
Several processes train one model on the same batches, and any number of them can resume any run. The README has the
commands for several nodes and for restarts after faults; these start two nodes of eight GPUs under Slurm, with five
minutes to save before the job ends. To continue, submit the job again; Slurm itself requeues one that was preempted.
torchrun ends with status 1 after a signal, so Slurm calls the job failed although all is saved:

    #!/bin/bash
    #SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64
    #SBATCH --time=24:00:00 --signal=USR1@300 --requeue --open-mode=append
    HOST=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -1)
    srun --cpus-per-task=64 torchrun --nnodes=$SLURM_NNODES --nproc_per_node=8 \\
        --rdzv-backend=c10d --rdzv-endpoint=$HOST:29400 --rdzv-id=$SLURM_JOB_ID \\
        --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout=280 \\
        train.py --preset gpt2 --out runs/big --resume

Read train() and backward() first. The sections after them: opening a run, data, machine, model and
optimizers, evaluation, log, processes, command line.
"""

import gc

if __name__ == "__main__":
    gc.disable()  # until main() begins: a search for garbage among what torch imports takes half a second

import argparse
import contextlib
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import shlex
import signal
import socket
import sys
import threading
import time
import timeit
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recomputed

import prepare
from chat import IGNORED, Conversations, dialogues
from checkpoint import CHECKPOINT, Saver, any_rank, clear_folder, files_of, fill, from_all_ranks, from_rank_0, held
from checkpoint import is_whole, newest_run, newest_whole, rank_0_first, read_checkpoint, restore_optimizers
from checkpoint import rows_of_part, stop_all_ranks, sum_over_ranks
from model import GPT, HUGE, PRESETS, GPTConfig, choose_device, document_blocks, empty_model, has_bfloat16
from model import initial_rows, model_settings
from prepare import Console, Windows, clock, exit_on, fail, lock, moved, shard_hashes
from published import ONLY_IN_TRAINING, load_source, tensors_at, why_not_exportable
from sample import sample
from tokenizer import Tokenizer


@dataclass
class Config(GPTConfig):
    """The settings of a run: those of the model, and how to train it. Each field is a flag, and the comment after it is
    the flag's help text. Flags override the file given by --config, which overrides the preset, which overrides the
    defaults here. A resumed run keeps its own settings, except for those given again."""

    preset: str = "toy"  # settings to start from, listed below
    data: str = "data/stdlib"  # data set made by prepare.py
    out: str | None = None  # folder of the run (default: runs/PRESET-N with the first free N)
    init: str | None = None  # initial weights: a run, a checkpoint, or a published model's folder

    steps: int = 720  # optimizer steps in the schedule
    epochs: float | None = None  # passes over the data, instead of steps
    stop_at: int | None = None  # stop and save at this step, without changing the schedule (default: steps)
    batch_tokens: int | None = 4096  # tokens per optimizer step
    micro_batch: int = 8  # sequences per forward and backward pass
    document_mask: bool = False  # keep attention and positions inside each document (of conversations: always)

    optimizer: Literal["muon", "adamw"] = "muon"  # Muon for the blocks' matrices and AdamW for the rest, or only AdamW
    lr: float = 8e-3  # peak learning rate
    warmup: float = 0.02  # fraction of the steps in which the learning rate rises
    decay: float = 0.5  # fraction of the steps, at the end, in which it falls to zero
    weight_decay: float = 0.1  # decoupled weight decay of matrices
    momentum: float = 0.8  # Muon's momentum; short runs need less
    grad_clip: float = 1.0  # maximum norm of the gradient; 0: no clipping
    skip_bad_steps: int = 0  # steps with a non-finite gradient to skip before the run stops

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; auto: bfloat16 if the processor has it
    recompute: bool = False  # activation checkpointing: keep each block's input only, compute the rest again backwards
    compile: bool | None = None  # torch.compile (default: on CUDA only)
    device: str | None = None  # cpu, cuda, mps, ... (default: the accelerator if there is one)
    shard: int = 1  # processes that share one copy of the model (FSDP2); 1: each has its own (DDP)
    timeout: float = 600.0  # seconds to wait for a process that does not answer
    seed: int = 1  # of the weights, the order of the data and dropout

    eval_every: int = 200  # steps between evaluations
    eval_tokens: int = 2**20  # maximum number of held-out tokens in an evaluation
    save_every: int = 200  # steps between checkpoints; an evaluation that is the best so far saves one too
    log_every: int = 20  # steps between lines of progress
    keep: int = 2  # newest checkpoints to keep, besides the best
    # No flags, since no comment follows them. context: that of the model of --init, for exports. shift: before a step,
    # step x batch_tokens + shift tokens were drawn; it changes if a resume changes the size of a step.
    context: int | None = None
    shift: int = 0

    RANGES = {  # noqa: RUF012
        **GPTConfig.RANGES,
        **dict.fromkeys(("lr", "weight_decay", "grad_clip", "skip_bad_steps"), (0, HUGE)),
        "epochs": (1e-30, HUGE),
        **dict.fromkeys(("warmup", "decay", "momentum"), (0, 1)),
        "timeout": (1, 1e6),
        "seed": (0, 2**63 - 1),
        "shift": (-HUGE, HUGE),
    }

    def __post_init__(self):
        super().__post_init__()
        if self.epochs is None and self.stop_at is not None and self.stop_at > self.steps:
            raise ValueError(f"stop_at {self.stop_at} is larger than steps {self.steps}")
        self.stop_at = min(self.stop_at or self.steps, self.steps)
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup {self.warmup} and decay {self.decay} together exceed 1")
        unit = self.micro_batch * self.seq_len
        if self.batch_tokens and self.batch_tokens % unit:
            below = self.batch_tokens // unit * unit
            legal = f"{below} or {below + unit}" if below else unit
            raise ValueError(f"batch_tokens {self.batch_tokens} is no multiple of micro_batch x seq_len: use {legal}")


# How to train the presets of model.py, where it differs from the defaults above. A preset that is not listed uses
# FROM_SCRATCH, with half a million tokens per step as for GPT-2.
FROM_SCRATCH = dict(batch_tokens=524_288, micro_batch=1, steps=20_000, lr=6e-4, momentum=0.95, log_every=1)
SHAKESPEARE = {"data": "data/shakespeare"}
RECIPES: dict[str, dict] = {
    "toy": {},
    "grok-toy": {},
    "shakespeare-quick": dict(SHAKESPEARE, batch_tokens=1536, micro_batch=24, steps=80, lr=3.2e-2, decay=0.7),
    "shakespeare": dict(SHAKESPEARE, batch_tokens=8192, steps=480, weight_decay=0.4),
    "gpt2": dict(FROM_SCRATCH, data="data/gpt2", micro_batch=16),
}
# How to fine-tune (--init), at the learning rate of the run that it starts from; published models do not tell theirs
FINE_TUNING = {"epochs": 3.0, "batch_tokens": 8192, "weight_decay": 0.0}
PUBLISHED_LR = 2e-5

# ---------------------------------------------------------------------------------------------------------------------
# The training loop


def train(given: dict, resume: bool) -> None:
    """A whole run, on every rank. `given` are the settings on the command line; `step` is the number of steps done."""
    started, parent = time.monotonic(), os.getppid()
    config, step, state = open_run(given, resume)
    config, meta, train_data, val_data = open_data(config)
    verification = Verification(config.data, meta)
    say_what_changes(config, given, step, state)
    if step >= config.stop_at:
        print(f"{config.out} is already at step {step}: give more --steps, or a later --stop_at, to continue")
        return
    config, machine = choose_machine(config)
    model = build_model(config, machine, first_weights(config, meta, step, state))  # to evaluate, save and sample
    parallel = data_parallel(model, config)  # the same model, as training calls it
    optimizers = make_optimizers(model, config)
    restore_optimizers(model, optimizers, state if step > 0 else None)
    del state  # closes its files
    config = open_folder(config, meta, step)  # the last change to the config
    log = Log(config, machine, model, step, started)
    log.header(train_data, val_data)
    saver, stop = Saver(config, meta, model, optimizers, log, verification), Stop(parent, log)
    n_skipped, saved, stopping, finished = 0, step, False, False
    with contextlib.suppress(KeyboardInterrupt):  # from stop.watched, which drops the step or evaluation in progress
        if step == 0 and config.init:  # where fine-tuning starts
            log.evaluation(0, *evaluate(model, val_data, config, machine, stop.watched), meta)
        while step < config.stop_at and not stopping:
            # 1. The gradient of the mean loss over this step's targets. Its batch follows from (seed, step) alone.
            loss = backward(parallel, train_data, config, machine, step, stop.watched)
            grad_norm = whole(nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf))

            # 2. One optimizer step, on all ranks or on none.
            if grad_norm.isfinite():  # the same number on all ranks
                for optimizer in optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = lr_at(step, config)
                    optimizer.step()
            else:
                n_skipped += 1
                problem = log.bad_step(step, loss, grad_norm)
                if n_skipped > config.skip_bad_steps:
                    stop_all_ranks(saver.wait() or problem)  # a save that failed matters more
            model.zero_grad()
            step += 1

            # 3. Log, evaluate and save, when they are due.
            stopping, val_loss = agree(stop, saver, verification), math.inf
            log.progress(step)
            if step % config.log_every == 0 or step in (1, config.stop_at) or stopping:
                log.step(step, loss, grad_norm, n_skipped)
            if step == config.stop_at or (step % config.eval_every == 0 and not stopping):
                val_loss = log.evaluation(step, *evaluate(model, val_data, config, machine, stop.watched), meta)
            if step % config.save_every == 0 or val_loss < saver.best_loss:
                saver.save(step, val_loss)
                saved = step
        finished = step == config.steps  # not reached if a signal ends the last evaluation
    if step > saved:
        saver.save(step)
    if problem := saver.wait():
        stop_all_ranks(f"{problem}: the checkpoint before it is intact; free some space and --resume")
    text = closing_text(model, config, machine, meta, val_data) if finished else None
    log.end(step, finished, text, isinstance(val_data, Conversations))


def backward(parallel: nn.Module, data: "Data", config: Config, machine: "Machine", step: int, watched) -> Tensor:
    """Run forward and backward on this rank's part of a step, micro-batch by micro-batch: this leaves the gradient of
    the mean loss over all targets of the batch. Returns a loss whose mean over the ranks is that of the step. `watched`
    yields the micro-batches, or raises KeyboardInterrupt after a signal."""
    rank, world = dist.get_rank(), dist.get_world_size()
    n_drawn = (step * config.batch_tokens + config.shift) // config.seq_len
    n_rows = config.batch_tokens // config.seq_len  # windows of the whole step
    indices = batch_indices(data.n_windows, config.seed, n_drawn, n_rows)
    n_targets = data.count(indices)
    first, end = rank * n_rows // world, (rank + 1) * n_rows // world  # this rank's
    loss = torch.zeros((), device=machine.device)
    for row in watched(range(first, end, config.micro_batch), f"step {step + 1:,}"):
        dropout_seed = np.random.SeedSequence((config.seed, step, row))  # the same on any rank
        torch.manual_seed(int(dropout_seed.generate_state(1)[0]))
        chosen = indices[row : row + config.micro_batch]
        inputs, targets, documents = on_device(data.get(chosen), machine.device)
        sync_gradients(parallel, row + config.micro_batch == end)
        # The mean loss of these targets, times their share of the step's. Times the number of ranks, too: DDP and FSDP2
        # average gradients over the ranks, and this makes the average a sum.
        weight = data.count(chosen) * world / n_targets
        with machine.autocast:
            weighted = parallel(inputs, targets, documents) * weight
        weighted.backward()
        loss += weighted.detach()
    return loss


def agree(stop: "Stop", saver: Saver, verification: "Verification") -> bool:
    """Whether to stop: the same answer on every rank. In the same message the ranks tell each other whether they still
    write the last checkpoint, which is valid when none does, and whether they have found damaged data."""
    stopping, is_writing, is_damaged = any_rank(stop.requested(), saver.is_writing(), verification.damage)
    if is_damaged:
        verification.check()
    if not is_writing and (problem := saver.commit()):
        saver.log.line(f"{problem}; trying again at the next save")
    return stopping


def closing_text(model: GPT, config: Config, machine: "Machine", meta: dict, val_data: "Data") -> str | None:
    """What the finished model writes: a sample, or its answers to held-out questions. With --shard nothing, since the
    whole model would be sent for each token: sample.py is quicker."""
    if config.shard > 1:
        return None
    tokenizer = Tokenizer.from_dict(meta["tokenizer"])
    with machine.autocast, torch.compiler.set_stance("force_eager"):  # compiled, each new length would be a new graph
        if isinstance(val_data, Conversations):
            return dialogues(model, tokenizer, val_data)
        return sample(model, tokenizer, config.seed)


# ---------------------------------------------------------------------------------------------------------------------
# Opening a run


def open_run(given: dict, resume: bool) -> tuple[Config, int, dict | None]:
    """Return the config, the number of steps already done, and the state to start from: None for new weights; on rank 0
    all of it, on the others only its tensors, which are opened when a rank needs some. Without a checkpoint in its
    folder, even --resume starts a new run."""
    check_same("version or setting", {"torch": torch.__version__, "resume": resume, **given})
    with exit_on(ValueError, OSError):  # OSError: a name that is too long, a folder that may not be read
        out = given.get("out")
        newest = max((path.name for path in Path(out).glob(f"{CHECKPOINT}.json")), default="") if resume and out else ""
        seen = from_all_ranks(newest)  # nodes that do not share the folder would each see their own checkpoints
        if max(seen) > seen[0]:
            stop_all_ranks(f"rank 0 does not see {max(seen)} in {out}: all nodes must share that folder")
        is_first = dist.get_rank() == 0
        run = from_rank_0(run_to_resume(out, resume, newest) if is_first else None)
        source = newest_whole(run) if run else None
        config = state = step = None
        if is_first:
            config, source, state = find_start(given, run, source)
            step = state["step"] if run else 0
        config, source, step = from_rank_0((config, source, step))
        return config, step, state or (tensors_at(source) if source else None)


def run_to_resume(out: str | None, resume: bool, newest: str) -> Path | None:
    """The folder of the run that goes on, locked for this process; `newest` is the name of its newest checkpoint. Ends
    the program if a new run would be in the way of another."""
    if out == "":
        fail("--out is empty")
    if out and any([*Path(out).glob("*.json"), *Path(out).glob("metrics.jsonl")]):
        if not (resume and (newest or Path(out, "config.json").exists())):
            fail(f"{out} already holds a run: continue it with {how_to_resume(out)}, or choose another --out")
    if not resume:
        return None
    if out and not newest:
        print(f"there is no checkpoint in {out} yet: starting from step 0")
        return None
    run = Path(out) if out else newest_run()
    lock(run / ".lock", f"training in {run}")
    return run


def how_to_resume(out: str) -> str:
    """The command that continues a run, alone or in several processes."""
    resume = prepare.command("train.py", "--out", out, "--resume")
    return resume.replace("python", "torchrun ...", 1) if dist.get_world_size() > 1 else resume


def find_start(given: dict, run: Path | None, source: Path | None) -> tuple[Config, Path | None, dict | None]:
    """The config, and the source and the state of the weights, as rank 0 finds them; `source` is the checkpoint with
    which `run` goes on, if it does. Raises ValueError, or ends the program, if the settings allow no start."""
    state, base = None, {}  # the settings that `given` ones override
    if run:
        state = read_checkpoint(source)
        print(f"resuming {source.with_suffix('')}, step {state['step']}")
        base = {**state["config"], "stop_at": None, "out": str(run)}
    else:
        if given.get("out") and (written := Path(given["out"], "config.json")).exists():  # a run without a checkpoint
            given = {**read_settings(written), **given}
        if given.get("init"):
            state, source = load_source(given["init"])
            base = fine_tuning(given, state["config"])
    config = build_config({**base, **given})
    if state:
        check_shape(config, state["config"], bool(run))
    if run:  # the data goes on where it was
        before = build_config(base)
        n_drawn = (state["step"] * before.batch_tokens + before.shift) // config.seq_len  # windows of the new length
        config = config.changed(shift=n_drawn * config.seq_len - state["step"] * config.batch_tokens)
    world, n_micro = dist.get_world_size(), (config.batch_tokens or 0) // (config.micro_batch * config.seq_len)
    if n_micro % world:
        legal = ", ".join(str(n) for n in range(1, n_micro + 1) if n_micro % n == 0)
        tokens = math.ceil(n_micro / world) * world * config.micro_batch * config.seq_len
        advice = f"use {legal}, another --micro_batch, or --batch_tokens {tokens}"
        fail(f"{world} processes cannot share {n_micro} micro-batches equally: {advice}")
    if world % config.shard:
        fail(f"{world} processes cannot be divided into groups of --shard {config.shard}")
    return config, source, state


def fine_tuning(given: dict, trained: dict) -> dict:
    """The settings of a model that is fine-tuned, where none are `given`: its shape, but not how it was `trained`."""
    shape = model_settings(trained)
    recipe = {**FINE_TUNING, "lr": trained.get("lr", PUBLISHED_LR), "seq_len": min(shape["seq_len"], 1024)}
    recipe |= {"dropout": Config.dropout, "context": trained.get("context") or shape["seq_len"]}
    if "micro_batch" not in given:
        recipe["batch_tokens"] = None  # fine_tuning_batch() will choose
    return {**shape, **recipe}


def check_shape(config: Config, trained: dict, resumed: bool) -> None:
    """End the program if `config` changes the shape of the weights that were `trained` with other settings. A resumed
    run must also keep its optimizer and its --init."""
    shape = asdict(GPTConfig(**model_settings(trained)))
    if resumed:
        what, shape = f"the run in {config.out}", shape | {name: trained[name] for name in ("optimizer", "init")}
    else:  # it can have more tokens than before, and fewer positions
        what = f"the model of --init {config.init}"
        shape["vocab_size"] = max(shape["vocab_size"], config.vocab_size)
        shape["seq_len"] = min(shape["seq_len"], config.seq_len)
    free = {*ONLY_IN_TRAINING} | ({"seq_len"} if config.position == "rope" else set())
    for name in sorted(shape.keys() - free):
        if shape[name] != (other := getattr(config, name)):
            fail(f"{what} has {name} {shape[name]}, not {other}: leave that setting out")


def say_what_changes(config: Config, given: dict, step: int, state: dict | None) -> None:
    """Print on rank 0 how a resume changes its run: the settings `given`, the order of the data, and a rise of the
    learning rate, which undoes what was learned in its decay. Also what was written into config.json in vain."""
    if step == 0 or dist.get_rank() > 0:
        return
    saved, before = state["config"], build_config(state["config"])
    written = read_settings(path) if (path := Path(config.out, "config.json")).exists() else {}
    for name in sorted(saved.keys() - {"out"}):
        if name in given and given[name] != saved[name]:
            print(f"changed by the command line: {name} from {saved[name]} to {given[name]}")
        if name not in ("stop_at", *given) and written.get(name, saved[name]) != saved[name]:
            print(f"--resume ignores {name} {written[name]} in config.json, for {saved[name]}: give it as --{name}")
    if (before.seq_len, before.seed) != (config.seq_len, config.seed):
        print("the order of the data changes: in this epoch some text may come twice, and some not at all")
    if (rate := lr_at(step, config)) > max(config.lr / 10, 2 * lr_at(step, before)):
        print(f"the new schedule raises the learning rate to {rate:.2g}: set it with --lr and --warmup")


def first_weights(config: Config, meta: dict, step: int, state: dict | None) -> Callable[..., Tensor]:
    """A function that returns the first values of rows of a parameter, given its name, its shape and the rows: those of
    `state`, or new ones. Ends the program on rank 0 if the state does not fit: a model only understands the tokens that
    it was trained on, and a resumed run needs its own data and optimizer."""
    if state is None:
        return lambda name, shape, rows: initial_rows(config, name, shape, rows, config.seed)
    lengths = from_rank_0(check_fit(config, meta, step, state) if dist.get_rank() == 0 else None)

    def read(name: str, shape: torch.Size, rows: range) -> Tensor:
        n = lengths[name]  # less than shape[0] where the vocabulary has grown
        known = state["model"].rows(name, range(min(rows.start, n), min(rows.stop, n)), n)
        if rows.stop <= n:
            return known
        mean = state["model"][name].mean(0, keepdim=True)
        return torch.cat([known, mean.expand(rows.stop - max(rows.start, n), -1)])

    return read


def check_fit(config: Config, meta: dict, step: int, state: dict) -> dict[str, int]:
    """The rows of each tensor of `state`. Ends the program if a model of this config cannot start with it."""
    try:
        if not Tokenizer.from_dict(meta["tokenizer"]).extends(Tokenizer.from_dict(state["tokenizer"])):
            wrong = f"{config.data} was prepared with {meta['tokenizer']['name']}, not with the checkpoint's tokenizer"
            fail(f"{wrong}: prepare it with --tokenizer {shlex.quote(config.init or config.out)}")
        if step > 0 and state["data"] != shard_hashes(meta, "train")[: len(state["data"])]:  # older ones lack masks
            fail(f"{config.data} is not the data set that this run started with: prepare it again, or start a new run")
        weights, trained = state["model"], GPTConfig(**model_settings(state["config"]))
        parameters = dict(empty_model(trained, len(weights)).named_parameters())
        if only_in_one := parameters.keys() ^ weights.keys():
            raise ValueError(f"{min(only_in_one)} is not in both it and the model")
        for name, parameter in parameters.items():
            n_rows = len(rows_of_part(len(parameter), 0, len(weights.parts)))  # of the first part
            if weights.part(0)[name].shape != (n_rows, *parameter.shape[1:]):
                raise ValueError(f"{name} has another shape")
        if n_new := config.vocab_size - trained.vocab_size:
            print(f"{n_new} new tokens: their embeddings begin as the mean of the others")
        return {name: len(parameter) for name, parameter in parameters.items()}
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        fail(f"the checkpoint does not fit: {' '.join(str(error).split())[:300]}")


def open_folder(config: Config, meta: dict, step: int) -> Config:
    """Let rank 0 create the run's folder, by default runs/PRESET-N with the first free N, or remove from it what is in
    the way of continuing from `step`. Returns the config with the folder, on all ranks."""
    best, newest = (Path(config.out or "", name) for name in ("best.json", f"step-{step:08d}.json"))  # newest is whole
    best_is_damaged = step > 0 and from_rank_0(best.exists()) and not is_whole(best, files_of(newest))
    if dist.get_rank() == 0:
        try:
            Path(config.out or "runs").mkdir(parents=True, exist_ok=True)
            numbers = itertools.count(1)
            while config.out is None:  # another run may take the same number at the same time
                with contextlib.suppress(FileExistsError):
                    Path(out := f"runs/{config.preset}-{next(numbers)}").mkdir()
                    config = config.changed(out=out)
            run = Path(config.out)
            lock(run / ".lock", f"training in {run}")
            if step > 0 or (run / "config.json").exists():  # else the files in it are a user's
                clear_folder(run, step, best_is_damaged)
            prepare.write_json(run / "config.json", config.given)
            prepare.write_json(run / "tokenizer.json", meta["tokenizer"])  # for --tokenizer
        except OSError as error:
            fail(f"cannot write to {config.out or 'runs'}: {error.strerror}")
    return from_rank_0(config)


# ---------------------------------------------------------------------------------------------------------------------
# Data: the batch of a step is a function of (seed, step)

Data = Windows | Conversations  # of a split


def permute(numbers: np.ndarray, n: int, key: tuple[int, ...]) -> np.ndarray:
    """Map each of `numbers` to its place in a shuffle of 0 .. n-1 that depends on `key`, without storing the shuffle.
    This is a Feistel network: split a number of 2h bits into halves, and six times swap them and XOR a hash of one into
    the other. Each round can be undone, so no two numbers collide. Results outside 0 .. n-1 go through it again."""
    half = (max(n - 1, 1).bit_length() + 1) // 2  # of the bits that a number below n needs
    mask = np.uint64(2**half - 1)
    rounds = np.random.SeedSequence(key).generate_state(6, np.uint64)
    numbers = numbers.astype(np.uint64)
    outside = np.ones(len(numbers), bool)
    while outside.any():
        left, right = numbers[outside] >> np.uint64(half), numbers[outside] & mask
        for salt in rounds:
            mixed = (right ^ salt) * np.uint64(0x9E3779B97F4A7C15)  # wraps around; the high bits depend on all of right
            left, right = right, left ^ (mixed >> np.uint64(40) & mask)
        numbers[outside] = left << np.uint64(half) | right
        outside = numbers >= n
    return numbers.astype(np.int64)


def batch_indices(n_windows: int, seed: int, n_drawn: int, rows: int) -> np.ndarray:
    """The windows [rows] of a step, after n_drawn others. Each epoch visits every window once, in its own order."""
    position = np.arange(n_drawn, n_drawn + rows)
    epochs, places = position // n_windows, position % n_windows
    indices = np.empty(rows, np.int64)
    for epoch in np.unique(epochs):
        indices[epochs == epoch] = permute(places[epochs == epoch], n_windows, (seed, int(epoch)))
    return indices


def open_data(config: Config) -> tuple[Config, dict, Data, Data]:
    """The config with what follows from the data set (the number of steps, if epochs are given, and the vocabulary and
    the batch, if they are open), the data set's meta.json, and the windows of its two splits. Prepares the default data
    set if it does not exist."""
    with rank_0_first():
        if config.data == Config.data and not Path(Config.data, "meta.json").exists():  # on this node
            print(f"preparing the default corpus in {Config.data}, once", flush=True)
            prepare.prepare([], Config.data, wait=True)
        meta, shards = prepare.load_dataset(config.data, verify=False)  # see Verification
    compared = json.dumps({**meta, "sources": None}, sort_keys=True)  # these may be at another place on each node
    check_same("data set", {"SHA-256 of meta.json": hashlib.sha256(compared.encode()).hexdigest()})
    tokenizer, is_chat = Tokenizer.from_dict(meta["tokenizer"]), meta["tokenizer"].get("chat", False)
    train_data, val_data = (windows_of(split, shards, config, tokenizer, is_chat) for split in prepare.SPLITS)

    if config.batch_tokens is None:
        config = fine_tuning_batch(config, train_data.n_windows)
    steps, vocab_size = config.steps, config.vocab_size or meta["vocab_size"]
    if config.epochs:
        n_tokens = config.epochs * train_data.n_windows * config.seq_len - config.shift
        steps = max(1, math.ceil(n_tokens / config.batch_tokens))
    n_used = meta["vocab_size"] if is_chat else tokenizer.n_text
    if is_chat and config.init:
        vocab_size = max(vocab_size, n_used)  # first_weights adds rows for the control tokens of conversations
    if vocab_size < n_used:
        used = f"text of {config.data} uses {n_used:,} of its tokenizer's {meta['vocab_size']:,} tokens"
        advice = f"leave --vocab_size out, or prepare {config.data} with the model's tokenizer"
        stop_all_ranks(f"a vocabulary of {vocab_size:,} is too small, since {used}: {advice}")
    return config.changed(steps=steps, vocab_size=vocab_size), meta, train_data, val_data


class Verification:
    """Compares the data set with the SHA-256 in its meta.json, in a thread of each rank. Ranks that see the same
    files, of a node or of a shared disk, read a share each. Training begins meanwhile, but nothing is saved before all
    is read: no damaged text gets in."""

    def __init__(self, folder: str, meta: dict):
        file, rank = os.stat(Path(folder, "meta.json")), dist.get_rank()
        seen = from_all_ranks((file.st_ino, file.st_ctime_ns))  # this names a file, also on a shared disk
        sharing = [other for other, theirs in enumerate(seen) if theirs == seen[rank]]
        share = sharing.index(rank), len(sharing)
        self.damage = None
        self.thread = threading.Thread(target=self.read, args=(Path(folder), meta, *share), daemon=True)
        self.thread.start()
        self.thread.join(2)  # so that a damaged data set that is small leaves no folder of a run
        self.check()

    def read(self, *given) -> None:
        self.damage = prepare.damaged_shard(*given)

    def check(self, wait: bool = False) -> None:
        """Stop all ranks if one has found damage, or else wait until all have read their share, if that is wanted."""
        for tries in itertools.count():
            is_reading, is_damaged = any_rank(self.thread.is_alive(), self.damage)
            if is_damaged:
                stop_all_ranks(next(filter(None, from_all_ranks(self.damage))))
            if not (wait and is_reading):
                return
            if tries == 0:
                print("saving waits for the end of reading the data, of which the SHA-256 is compared", flush=True)
            self.thread.join(0.1)


def fine_tuning_batch(config: Config, n_windows: int) -> Config:
    """The config with the usual batch, or a smaller one, so that a pass over few rows still has about 16 steps."""
    world = dist.get_world_size()
    share = max(1, min(FINE_TUNING["batch_tokens"] // config.seq_len, n_windows // 16) // world)  # rows of each rank
    micro_batch = min(config.micro_batch, share)
    rows = share // micro_batch * micro_batch * world
    print(f"fine-tuning with {rows} of {n_windows:,} rows per step: --batch_tokens {rows * config.seq_len}")
    return config.changed(batch_tokens=rows * config.seq_len, micro_batch=micro_batch)


def windows_of(split: str, shards: dict, config: Config, tokenizer: Tokenizer, is_chat: bool) -> Data:
    """The windows of a split, or the rows into which its conversations are packed. Ends the program if it has none."""
    if is_chat:
        if f"{split}-mask" not in shards:
            stop_all_ranks(f"{config.data} is of an earlier version: prepare it again with python chat.py --prepare")
        windows = Conversations(shards[split], shards[f"{split}-mask"], config.seq_len, tokenizer.end_of_text)
        problem = f"has no conversation with an answer that ends within {config.seq_len} tokens: raise --seq_len"
    else:
        windows = Windows(shards[split], config.seq_len, tokenizer.begin if config.document_mask else None)
        n_tokens, in_both = windows.n_tokens, sum(map(len, shards["train"] + shards["val"]))
        advice = f"use --seq_len {1 << (n_tokens - 1).bit_length() - 1}, or add text" if n_tokens > 16 else "add text"
        if in_both > 11 * config.seq_len and split == "val":
            advice = "prepare the text again with --val_tail --val_fraction 0.1"
        problem = f"is shorter than a window of {config.seq_len} tokens: {advice}"
    if windows.n_windows < 1:
        stop_all_ranks(f"the {split} split of {config.data} {problem}")
    return windows


# ---------------------------------------------------------------------------------------------------------------------
# The machine


class Accelerator(NamedTuple):  # published figures
    flops: float  # dense bfloat16 products per second
    memory: float  # bytes
    link: float  # bytes per second to the other GPUs of its node, in each direction


ACCELERATORS = {
    "A100": Accelerator(312e12, 80e9, 300e9),
    "H100 PCIE": Accelerator(756e12, 80e9, 300e9),
    "H100": Accelerator(989e12, 80e9, 450e9),
    "H200": Accelerator(989e12, 141e9, 450e9),
    "B200": Accelerator(2250e12, 192e9, 900e9),
}


class Machine(NamedTuple):
    """What a rank computes on, and how."""

    device: torch.device
    autocast: torch.autocast  # computes matrix products in the run's dtype; weights and sums stay in float32
    compile: bool
    peak_flops: float | None  # of a device in that dtype
    lines: dict[str, str]  # for the log


def choose_machine(config: Config) -> tuple[Config, Machine]:
    """The config with the dtype chosen if it was open, and the machine."""
    with rank_0_first(), exit_on(ValueError):
        device, reason = choose_device(config.device, int(os.environ.get("LOCAL_RANK", "0")))
    dtype = config.dtype
    if dtype == "auto":  # by a rule, not by a measurement, so that a command has the same result each time
        dtype = "bfloat16" if from_rank_0(has_bfloat16(device)) else "float32"
    compiled = device.type == "cuda" if config.compile is None else config.compile
    hosts = from_all_ranks(socket.gethostname())
    on, off = "on (the first step may take a minute)", "off (--compile pays on CUDA, and in long runs elsewhere)"
    lines = {
        "ranks": f"{len(hosts)} on {', '.join(sorted(set(hosts)))}",
        "device": f"{device} ({reason})",
        "dtype": dtype,
        "compile": on if compiled else off,
    }
    autocast = torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")
    return config.changed(dtype=dtype), Machine(device, autocast, compiled, peak_flops(device, dtype), lines)


@cache
def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Peak FLOP/s of matrix products: published for a GPU in bfloat16, unknown (None) for other accelerators; on a CPU
    the best of a few products of 1024 x 1024 matrices."""
    if device.type != "cpu":
        name = torch.cuda.get_device_name(device) if device.type == "cuda" and dtype == "bfloat16" else ""
        return next((gpu.flops for kind, gpu in ACCELERATORS.items() if kind in name.upper()), None)
    a, b = torch.randn(2, 1024, 1024).to(getattr(torch, dtype))
    return 2 * 1024**3 / min(timeit.repeat(lambda: a @ b, number=1, repeat=8))


# ---------------------------------------------------------------------------------------------------------------------
# Model and optimizers


def build_model(config: Config, machine: Machine, read: Callable[..., Tensor]) -> GPT:
    """The model on its device, with the weights that `read` returns (see first_weights)."""
    with torch.device("meta"):
        model = GPT(config)
    for block in model.blocks:
        if config.recompute:
            block.forward = partial(recomputed, block.forward, use_reentrant=False)
        if machine.compile:  # one graph serves all dense blocks; FSDP2's work around each stays outside
            block.forward = torch.compile(block.forward)
    if machine.compile and machine.device.type == "cuda":  # elsewhere it takes longer than short runs gain by it
        model.token_losses = torch.compile(model.token_losses)
        if config.head_dim >= 16 and not (config.dropout or config.attention_cap):  # FlexAttention has none of these
            model.document_mask = torch.compile(document_blocks)
    if config.shard > 1:
        shard_model(model, config, machine.device)
    model.to_empty(device=machine.device)
    model.tie_head()
    for name, parameter in model.named_parameters():
        fill(parameter, partial(read, name, parameter.shape))
    return model


def data_parallel(model: GPT, config: Config) -> nn.Module:
    """The model, such that a backward pass averages gradients over the ranks: DDP wraps it; FSDP2's does so itself."""
    if dist.get_world_size() > 1 and config.shard == 1:
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    return model


def shard_model(model: GPT, config: Config, device: torch.device) -> None:
    """Let groups of `shard` ranks share a copy of the model: each keeps a part of every tensor, and a block's parts are
    gathered while it is computed (FSDP2)."""
    ranks = torch.arange(dist.get_world_size()).view(-1, config.shard)
    timeout = timedelta(seconds=config.timeout)
    # Columns of `ranks` hold the same shard, rows share one copy. The groups are made here, since those that
    # init_device_mesh makes have a timeout of 30 minutes, whatever --timeout says.
    columns, rows = (dist.new_subgroups_by_enumeration(r.tolist(), timeout)[0] for r in (ranks.T, ranks))
    mesh = DeviceMesh.from_group([columns, rows], device.type, ranks, mesh_dim_names=("replicate", "shard"))
    param_dtype = getattr(torch, config.dtype)  # autocast's copies would keep whole weights until the backward pass
    policy = MixedPrecisionPolicy(param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)


def sync_gradients(parallel: nn.Module, now: bool) -> None:
    """Average gradients over copies of the model in the next backward pass only if `now`: once per step is enough. The
    ranks that share a copy always exchange gradients, so that each keeps only its shard of them."""
    if isinstance(parallel, FSDPModule):
        parallel.set_requires_all_reduce(now)
    elif isinstance(parallel, DistributedDataParallel):
        parallel.require_backward_grad_sync = now


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, if each rank holds a part of it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def orthogonalised(matrices: Tensor) -> Tensor:
    """Matrices [N, R, C] with the same singular vectors and singular values near one, by five Newton-Schulz iterations
    with the coefficients of Jordan et al. (2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315  # steep at zero; singular values end between about 0.7 and 1.2
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)  # (a + b gram + c gram^2) x
    return x.mT.contiguous() if tall else x


def swapped(parts: Tensor, ranks: dist.ProcessGroup) -> Tensor:
    """Send parts[i] to the i-th of `ranks`. Returns what each of them has sent to this one."""
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=ranks)
    return received


def orthogonalised_by(ranks: dist.ProcessGroup, parts: Tensor, n_rows: int) -> Tensor:
    """Orthogonalise matrices [n_rows, C] that are divided among `ranks`, which take them in turn. parts[i] [share, C]
    is what this rank has of the i-th, and padding if the ranks have unequal parts. The result has the same layout."""
    x = swapped(parts.unflatten(0, (-1, ranks.size())).transpose(0, 1).contiguous(), ranks)
    x = x.transpose(0, 1).flatten(1, 2)  # the matrices on which this rank works
    x[:, :n_rows] = orthogonalised(x[:, :n_rows].contiguous())
    x = swapped(x.unflatten(1, (ranks.size(), -1)).transpose(0, 1).contiguous(), ranks)
    return x.transpose(0, 1).flatten(0, 1)


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonalised momentum, so that all directions of a matrix learn equally fast (Jordan et al.,
    2024). A factor gives the steps the size of AdamW's, so that both can share a learning rate (Liu et al., 2025).

    torch.optim.Muon takes one matrix after the other, all of them on every rank, in bfloat16, which most CPUs emulate
    slowly. This one batches matrices of equal shape, works in `dtype`, and divides the work between the ranks."""

    def __init__(self, matrices: list[Tensor], dtype: torch.dtype, **options):
        super().__init__(matrices, options)
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        """Apply the gradients. Every rank must call it. The ranks that share a copy of the model update some of the
        matrices together. Each sends its parts of these to the ranks that hold the same parts in other copies."""
        rank, world, (group,) = dist.get_rank(), dist.get_world_size(), self.param_groups
        mesh = getattr(group["params"][0], "device_mesh", None)
        same_part, same_copy = mesh.get_all_groups() if mesh else (None, None)
        n_shards = mesh.size(1) if mesh else 1
        same_shape = defaultdict(list)
        for matrix in group["params"]:
            same_shape[matrix.shape].append(matrix)
        for shape, matrices in same_shape.items():
            by_copy = defaultdict(list)  # rank i % world works on the i-th of them
            for i, matrix in enumerate(matrices):
                if not self.state[matrix]:
                    self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
                held(self.state[matrix]["momentum_buffer"]).lerp_(held(matrix.grad), 1 - group["momentum"])
                by_copy[i % world // n_shards].append(matrix)
            # In a single process, all matrices are `mine`, and nothing is sent.
            mine, n_slots = by_copy.get(rank // n_shards, []), math.ceil(len(by_copy[0]) / n_shards) * n_shards
            size = n_slots, math.ceil(shape[0] / n_shards), shape[1]
            ahead = torch.zeros(size, dtype=self.dtype, device=matrices[0].device)
            for slot, matrix in zip(ahead, mine):
                nesterov = held(matrix.grad).lerp(held(self.state[matrix]["momentum_buffer"]), group["momentum"])
                slot[: len(nesterov)] = nesterov
            if mine:
                ahead = orthogonalised_by(same_copy, ahead, shape[0]) if mesh else orthogonalised(ahead[: len(mine)])
            for copy, work in by_copy.items():
                updates = ahead[: len(work)] if work is mine else ahead.new_empty(len(work), *size[1:])
                if world > n_shards:  # a single rank may be on a device without a backend, such as mps
                    dist.broadcast(updates, src=copy * n_shards + rank % n_shards, group=same_part)
                for update, matrix in zip(updates, work):
                    weights = held(matrix).mul_(1 - group["lr"] * group["weight_decay"])
                    weights.add_(update[: len(weights)], alpha=-group["lr"] * 0.2 * math.sqrt(max(shape)))


def muon_matrices(model: GPT, config: Config) -> list[Tensor]:
    """The parameters that Muon trains: the matrices of the blocks."""
    return [p for p in model.blocks.parameters() if p.ndim == 2] if config.optimizer == "muon" else []


def make_optimizers(model: GPT, config: Config) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for all other parameters."""
    matrices = muon_matrices(model, config)
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    decayed, vectors = [p for p in rest if p.ndim >= 2], [p for p in rest if p.ndim < 2]
    groups = [{"params": decayed}, {"params": vectors, "weight_decay": 0.0}]
    shared = {"lr": config.lr, "weight_decay": config.weight_decay}
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True, **shared)
    if not matrices:
        return [adamw]
    return [Muon(matrices, getattr(torch, config.dtype), momentum=config.momentum, **shared), adamw]


def lr_at(step: int, config: Config) -> float:
    """Learning rate of step 0, 1, ...: linear warm-up, constant, then a linear decay that reaches zero at `steps`."""
    rise = (step + 1) / max(1, config.warmup * config.steps)
    fall = (config.steps - step) / max(1, config.decay * config.steps)
    return config.lr * min(rise, 1.0, fall)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(model: GPT, data: Data, config: Config, machine: Machine, watched: Callable) -> tuple[float, float]:
    """Mean loss in nats per token over fixed held-out windows, and its standard error (NaN of a single one). Draws no
    random numbers, so that training continues as if there had been no evaluation."""
    n = min(data.n_windows, max(1, config.eval_tokens // config.seq_len))
    chosen = np.linspace(0, data.n_windows, n, endpoint=False).astype(np.int64)
    # Whole micro-batches per rank, for which one compiled graph is enough. The last windows repeat and do not count.
    share = math.ceil(n / dist.get_world_size() / config.micro_batch) * config.micro_batch
    mine = dist.get_rank() * share + np.arange(share)
    indices, counted = chosen[np.minimum(mine, n - 1)], torch.from_numpy(mine < n)
    model.eval()
    losses, counts = [], []
    for i in watched(range(0, share, config.micro_batch), "evaluation"):
        inputs, targets, documents = on_device(data.get(indices[i : i + config.micro_batch]), machine.device)
        with machine.autocast:
            losses.append(model(inputs, targets, documents, reduction="none"))
        counts.append((targets != IGNORED).sum(1))
    model.train()
    losses = torch.cat(losses).cpu().double().sum(1)[counted]  # once, since it waits; mps has no float64
    counts = torch.cat(counts).cpu()[counted]
    total, n_targets = sum_over_ranks(losses.sum(), counts.sum())
    mean = total / n_targets
    (squares,) = sum_over_ranks((losses - mean * counts).square().sum())
    return mean, math.sqrt(squares * n / (n - 1)) / n_targets if n > 1 else math.nan


def on_device(arrays: tuple, device: torch.device) -> list[Tensor | None]:
    """What Windows.get returns, as tensors on the device."""
    tensors = [None if array is None else torch.from_numpy(array) for array in arrays]
    if device.type == "cuda":  # from pinned memory, a copy does not wait for what the device computes
        return [None if t is None else t.contiguous().pin_memory().to(device, non_blocking=True) for t in tensors]
    return [None if t is None else t.to(device) for t in tensors]


# ---------------------------------------------------------------------------------------------------------------------
# The log


class Log(Console):
    """Prints progress, and records it in metrics.jsonl and for TensorBoard if that is installed. Rank 0 writes; every
    rank takes part in the sums. Rows after `step`, of steps that were lost with a killed process, are dropped."""

    def __init__(self, config: Config, machine: Machine, model: GPT, step: int, started: float):
        super().__init__(sys.stdout)
        self.config, self.machine, self.model, self.started = config, machine, model, started
        self.path, self.board = Path(config.out, "metrics.jsonl"), None
        self.first = self.last = (step, time.monotonic())  # at the start, and at the previous line
        if dist.get_rank() == 0:
            rows = [row for row in self.rows() if row["step"] <= step and step > 0]
            with prepare.written_whole(self.path) as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(config.out, purge_step=step + 1)
                threading.excepthook = lambda failed: None  # its thread's, when the disk is full: record() tells

    def rows(self) -> list[dict]:
        """The rows of metrics.jsonl, without those that a full disk has torn."""
        rows = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []:
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line, parse_constant=lambda nan: None))
        return rows

    def record(self, **row) -> None:
        """Append a row to metrics.jsonl and to TensorBoard."""
        if dist.get_rank() > 0:
            return
        row = json.loads(json.dumps(row), parse_constant=lambda nan: None)  # JSON has no NaN
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:  # such as a full disk, which may have room again for the next checkpoint
            print(f"the metrics of step {row['step']} are lost: {error}", file=sys.stderr)
        if self.board is None:
            return
        try:
            for name, value in row.items():
                if isinstance(value, float):
                    self.board.add_scalar(name, value, row["step"])
            self.board.flush()  # or else an error would come up at another time
        except OSError as error:
            print(f"TensorBoard's curves end at step {row['step']}: {error}", file=sys.stderr)
            with contextlib.suppress(OSError):
                self.board.file_writer.close()
            self.board = None

    def header(self, train_data: Data, val_data: Data) -> None:
        config, flops = self.config, self.model.flops_per_token()
        tokens = config.steps * config.batch_tokens + config.shift
        n_cut, n_left_out = train_data.n_cut, train_data.n_left_out
        cut = f"; cut to seq_len: {n_cut:,}, left out: {n_left_out:,}" if n_cut or n_left_out else ""
        n_epochs = tokens / (train_data.n_windows * config.seq_len)
        sizes = f"{n_epochs:.2f} epochs, {tokens * flops:.3g} FLOP"
        lines = {
            "run": config.out,
            "data": f"{config.data}: {train_data.n_tokens:,} training tokens, {val_data.n_tokens:,} held out{cut}",
            "model": f"{self.model.n_params():,} parameters, {flops / 1e6:,.1f} MFLOP per token",
            "steps": f"{config.steps:,} of {config.batch_tokens:,} tokens: {sizes}",
            **self.machine.lines,
        }
        if reason := why_not_exportable(config):
            lines["export"] = f"not possible: {reason}"
        if n_epochs > 10:
            lines["warning"] = f"{n_epochs:.0f} epochs teach it the text by heart: give --epochs 10, or more text"
        self.line("\n".join(f"{name:8} {text}" for name, text in lines.items()))

    def progress(self, step: int) -> None:
        """Estimate the time left, and show it in the live line of a terminal."""
        first_step, start = self.first
        self.left = clock((time.monotonic() - start) / (step - first_step) * (self.config.stop_at - step))
        self.glimpse(f"step {step:,}/{self.config.steps:,}  {self.left} left")

    def step(self, step: int, loss: Tensor, grad_norm: Tensor, skipped: int) -> None:
        """Log a step: its loss, averaged over the ranks, and the throughput since the previous line."""
        now, world = time.monotonic(), dist.get_world_size()
        (mean_loss,) = sum_over_ranks(loss.item() / world)
        last_step, last_time = self.last
        speed = (step - last_step) * self.config.batch_tokens / (now - last_time)
        row = {"step": step, "loss": mean_loss, "lr": lr_at(step - 1, self.config), "grad_norm": grad_norm.item()}
        row |= {"seconds": now - self.started, "tokens_per_second": speed, "skipped": skipped}
        if layers := self.model.expert_layers():
            loads = torch.stack([layer.load for layer in layers]).cpu()
            row["expert_load"] = (torch.tensor(sum_over_ranks(*loads.flatten())).view_as(loads) / world).tolist()
        text = f"step {step:5,}/{self.config.steps:,}  loss {mean_loss:.4f}  {speed:9,.0f} tokens/s"
        if self.machine.compile and last_step == self.first[0]:
            text += f"  (compiled in {now - last_time:.0f} s)"
        if peak := self.machine.peak_flops:
            row["mfu"] = speed * self.model.flops_per_token() / (peak * world)
            text += f"  {row['mfu']:4.0%} of peak"
        self.line(f"{text}  {self.left} left")
        self.record(**row)
        self.last = (step, time.monotonic())

    def bad_step(self, step: int, loss: Tensor, grad_norm: Tensor) -> str:
        """Log where a gradient that is not finite comes from, and return that with advice."""
        bad = [rank for rank, is_finite in enumerate(from_all_ranks(loss.isfinite().item())) if not is_finite]
        where = f"the loss is not finite on ranks {bad}" if bad else "the loss is finite on all ranks"
        problem = f"step {step + 1}: the gradient norm is {grad_norm}, {where}; no rank applied it"
        self.line(problem)
        return f"{problem}: continue with {how_to_resume(self.config.out)} --lr LOWER"

    def evaluation(self, step: int, val_loss: float, val_error: float, meta: dict) -> float:
        """Log an evaluation in nats per token, and in bits per byte where all tokens count. Returns val_loss."""
        self.result = f"val_loss {val_loss:.4f}" + ("" if math.isnan(val_error) else f" +- {val_error:.4f}")
        row = {"step": step, "val_loss": val_loss, "val_loss_error": val_error}
        if not meta["tokenizer"].get("chat"):
            row["val_bits_per_byte"] = val_loss / math.log(2) * meta["val"]["tokens"] / meta["val"]["bytes"]
            self.result += f"  {row['val_bits_per_byte']:.4f} bits per byte"
        self.line(f"step {step:5,}/{self.config.steps:,}  {self.result}")
        self.record(**row)
        self.last = (step, time.monotonic())
        if step == 0:  # the time left counts from the first step
            self.first = self.last
        return val_loss

    def end(self, step: int, finished: bool, text: str | None, is_chat: bool) -> None:
        """Print `text`, a sample from the finished model, or how to continue a run that stopped early."""
        if dist.get_rank() > 0:  # or else all would read metrics.jsonl for the plot
            return
        script = ("chat.py", self.config.out) if is_chat else ("sample.py", self.config.out, "--interactive")
        use = prepare.command(*script)
        if finished:
            if text:
                self.line(f"\n{'answers to held-out questions' if is_chat else 'a sample'}:\n{text}")
            self.line(f"\n{self.plot()}\n{self.result} after {clock(time.monotonic() - self.started)}")
            self.line(f"the run is in {self.config.out}; next: {use}")
        elif step == self.config.steps:
            self.line(f"stopped in the last evaluation, after the last step was saved; next: {use}")
        else:
            how = how_to_resume(self.config.out)
            self.line(f"stopped at step {step}{' and saved' if step else ''}; to continue: {how}")

    def plot(self, width: int = 64, height: int = 12) -> str:
        """The losses of the run in characters, or nothing if there are fewer than ten."""
        rows, kinds = self.rows(), {"loss": ".", "val_loss": "o"}
        marks = [(r["step"], r[kind], mark) for kind, mark in kinds.items() for r in rows if r.get(kind) is not None]
        if len(marks) < 10:
            return ""
        losses = [loss for _, loss, _ in marks]
        high, low = max(losses), min(losses)
        lines = [[" "] * width for _ in range(height)]
        for step, loss, mark in marks:
            depth = (high - loss) / max(high - low, 1e-9)
            lines[round(depth * (height - 1))][round(step / self.config.steps * (width - 1))] = mark
        labels = [f"{high:.2f}", *[""] * (height - 2), f"{low:.2f}"]
        drawn = [f"{label:>6} |{''.join(line)}" for label, line in zip(labels, lines)]
        legend = f"{'':8}{self.config.steps:,} steps; . training loss, o held-out loss\n"
        return "\n".join([*drawn, f"{'':6} +{'-' * width}", legend])


# ---------------------------------------------------------------------------------------------------------------------
# Processes. torchrun starts one per rank; without it there is one, a group of size 1


def start_processes(timeout: float) -> dist.Store:
    """Join the process group: CPU tensors travel by gloo, GPU tensors by NCCL. Returns the store that the ranks share.
    Only rank 0 prints."""
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")  # or else each rank would connect to all others at once
    shared_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shared_store and os.environ["TORCHELASTIC_MAX_RESTARTS"] != "0":  # pytorch issue 135712: stale addresses
        fail("restarts by torchrun hang unless TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is in its environment: set it")
    if "RANK" in os.environ:
        store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
    else:
        store, rank, world = dist.HashStore(), 0, 1
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
    if rank > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    return store


def check_same(what: str, mine: dict) -> None:
    """Stop unless `mine` is the same on every rank. All must call it."""
    first, *others = from_all_ranks(mine)
    for rank, other in enumerate(others, 1):
        for name in sorted(first | other):
            if repr(first.get(name)) != repr(value := other.get(name)):  # nan differs from itself, but not in its repr
                stop_all_ranks(f"rank {rank} has another {what} than rank 0: {name} is {value}, not {first.get(name)}")


class Stop:
    """Stops a run early: after Ctrl-C, SIGTERM or SIGUSR1 to any rank, or when torchrun, the process `parent`, is dead.
    Ranks finish their step; a process that was started alone gives it up, and ends at once with a second signal."""

    def __init__(self, parent: int, log: Log):
        self.parent, self.log, self.received, self.alone = parent, log, [], "RANK" not in os.environ
        self.sender, receiver = socket.socketpair()
        self.sender.setblocking(False)
        signal.set_wakeup_fd(self.sender.fileno())
        threading.Thread(target=self.answer, args=(receiver,), daemon=True).start()
        for name in {"SIGINT", "SIGTERM", "SIGUSR1"} & set(dir(signal)):  # Windows lacks the third
            signal.signal(getattr(signal, name), lambda number, frame: self.received.append(number))

    def answer(self, receiver: socket.socket) -> None:
        """In a thread, since the main one may be computing for minutes before it calls the handler."""
        if receiver.recv(1):
            how = "without an unfinished step; a second signal ends the program" if self.alone else "after this step"
            self.log.line(f"stopping and saving, {how}")
        if self.alone and (number := receiver.recv(1)):
            os._exit(128 + number[0])  # what is on disk is whole

    def requested(self) -> bool:
        """Whether this rank should stop at the end of its step."""
        return bool(self.received) or ("TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self.parent)

    def watched(self, micro_batches: range, what: str) -> Iterator[int]:
        """Yield the micro-batches, unless a signal ends it. Shows on a terminal how far a long step has come."""
        start = time.monotonic()
        for done, micro_batch in enumerate(micro_batches):
            if time.monotonic() > start + 1:
                self.log.glimpse(f"{what}: {done} of {len(micro_batches)} micro-batches")
            yield micro_batch
            if self.alone and self.received:
                raise KeyboardInterrupt


def roll_call(store: dist.Store, refused: bool) -> list[int] | None:
    """After this rank has ended with a message (`refused`), or an operation between ranks has failed: the ranks that do
    not answer within five seconds, or None if one of them has ended with a message, so that the others need none."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        store.append("refused", "yes" if refused else "")
        store.append("here", f"{rank} ")
        end, known, here = time.monotonic() + 5, b"", []
        while len(here) < world and time.monotonic() < end and not (known and rank > 0):
            time.sleep(0.1)
            known, here = store.get("refused"), store.get("here").split()
        store.append("left", f"{rank} ")
        while rank == 0 and len(store.get("left").split()) < len(here) and time.monotonic() < end + 1:
            time.sleep(0.1)  # rank 0 may host the store, and leaves last
        return None if known else [other for other in range(world) if str(other).encode() not in here]
    except dist.DistError:  # the store is gone
        return None if refused else [0]


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def make_parser(description: str) -> argparse.ArgumentParser:
    """A flag for each field of Config, with the field's type and the comment after it as help text."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--preset NAME] [--SETTING VALUE ...]",
        description=description,
        epilog=f"presets: {', '.join(PRESETS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # flags that are not given do not appear in the result
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=read_settings, metavar="FILE.json", help="read settings from a config.json")
    hints = get_type_hints(Config)
    for title, cls in (("training", Config), ("model", GPTConfig)):
        group = parser.add_argument_group(title)
        source = Path(inspect.getfile(cls)).read_text(encoding="utf-8")  # inspect.getsource would parse all of it
        lines = re.split(r"\n(?=\S)", source.partition(f"\nclass {cls.__name__}")[2], maxsplit=1)[0]
        for name, text in re.findall(r"^    (\w+): .*?  # (.*)$", lines, re.MULTILINE):
            legal, default = get_args(hints[name]) or (hints[name],), getattr(cls, name)
            text += f" ({default})" if default is not None else ""
            if isinstance(legal[0], str):  # Literal["muon", "adamw"]
                group.add_argument(f"--{name}", choices=legal, help=text)
            elif legal[0] is bool:
                group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=text)
            else:  # int, or int | None, of which the flag takes the int
                group.add_argument(f"--{name}", type=legal[0], metavar=legal[0].__name__.upper(), help=text)
    return parser


def read_settings(path: str | Path) -> dict:
    """The settings in a JSON file, except for a run's folder and what it was given by its data and its --init."""
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
        settings |= settings.pop("model", {})  # older files nest the settings of the model
    except (OSError, ValueError, AttributeError, TypeError) as error:
        fail(f"cannot read settings from {path}: {error}")
    return {name: value for name, value in settings.items() if name not in ("out", "shift", "context")}


def build_config(given: dict) -> Config:
    """The config with the settings `given`, over those of the preset that they name. Ends the program on failure."""
    preset = given.get("preset", Config.preset)
    if preset not in list(PRESETS):  # a list: JSON can give a value that no dict can look up
        fail(f"no preset is called {preset!r}: use {', '.join(PRESETS)}")
    settings = {**PRESETS[preset], **RECIPES.get(preset, FROM_SCRATCH), **given}
    if unknown := settings.keys() - {f.name for f in fields(Config)}:
        fail(f"unknown setting {', '.join(sorted(unknown))}: python train.py --help lists all of them")
    with exit_on(ValueError):
        return Config(**settings)


def parse(parser: argparse.ArgumentParser) -> dict:
    """The settings on the command line, over those of a file given by --config."""
    given = vars(parser.parse_args())
    if "steps" in given and "epochs" in given:
        fail("give --steps or --epochs, not both")
    if "steps" in given:
        given["epochs"] = None
    return {**given.pop("config", {}), **given}


def launch(work: Callable, given: dict, *more) -> None:
    """Join the process group and call work(given, *more) in it. Ends every rank with a fitting message and status."""
    store = start_processes(build_config({"timeout": given.get("timeout", Config.timeout)}).timeout)
    world, status, trace = dist.get_world_size(), 0, None
    try:
        work(given, *more)
        dist.barrier()  # no rank hangs up while another has something to say
    except SystemExit as end:
        status = end.code
    except KeyboardInterrupt:
        status = f"{Path(sys.argv[0]).name}: interrupted before the first step"
    except Exception as error:
        if world == 1 or torch.cuda.is_initialized():
            raise
        trace, reason = traceback.format_exc(), str(error).split(". ")[0]
    if status and torch.cuda.is_initialized():  # destroying an NCCL group would wait for the other ranks
        sys.exit(status)
    # Outside of the except blocks, since the exception keeps the model alive, and with it the connections.
    dist.destroy_process_group()
    if world > 1 and (status or trace):
        silent = roll_call(store, refused=not trace)
        if trace:
            status = 2 if silent is None else trace
        if trace and silent:
            status = f"train.py: error: rank {', '.join(map(str, silent))} of {world} does not answer ({reason})"
    if status:
        sys.exit(status)


def main() -> None:
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages: fewer page faults on Linux
    prepare.tolerate_streams()
    moved("--plan", "plan.py")
    parser = make_parser(__doc__)
    parser.add_argument("--resume", action="store_true", help="continue the run in --out, or the newest")
    given = parse(parser)
    resume = given.pop("resume", False)
    launch(train, given, resume)


if __name__ == "__main__":
    gc.freeze()  # what has been imported is no garbage
    gc.enable()
    main()
