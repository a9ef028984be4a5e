"""Train a GPT.

    python train.py                                             the toy preset on the default corpus
    python train.py --preset shakespeare --data data/shakespeare
    python train.py --n_layer 6 --lr 2e-3 --out runs/deeper     any setting over the preset's
    python train.py --config runs/toy-1/config.json --seed 2    the settings of an earlier run, but one
    python train.py --out runs/toy-1 --resume                   go on where it stopped
    python train.py --init downloads/gpt2 --data data/mine      begin with published weights, or with another run's

A run is a folder: config.json, metrics.jsonl, checkpoints, and TensorBoard's event files where that is installed.
Ctrl-C ends a run at the end of its step, saved. Beside weights and optimizer, the step number is the only state: the
batch and the dropout of a step follow from the seed and the step, so a resumed run goes on bit for bit as if it had
never stopped. The loop is in train(); what it uses stands above it, in the order in which it is used.

Many processes, on CPUs or GPUs, train the same model on the same batches; any number of them can resume any run:

    torchrun --standalone --nproc_per_node=8 train.py --out runs/big             one node
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29400 --rdzv-id=big \\
        train.py --out runs/big                                                  the same line on each of two nodes
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nnodes=1:2 --max-restarts=3 --rdzv-backend=c10d ... \\
        train.py --out runs/big --resume                     begin, and go on by itself after faults, on 1 or 2 nodes
    torchrun ... train.py --preset llama3-8b --shard 8 --out runs/llama          each model spread over 8 GPUs (FSDP2)

Under Slurm, `srun --ntasks-per-node=1 torchrun ...` does the same. `#SBATCH --signal=USR1@120` with torchrun's
`--signals-to-handle=SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout=110` saves the run before its time is up.
"""

import argparse
import gc
import inspect
import json
import math
import os
import re
import signal
import socket
import statistics
import sys
import time
import traceback
import types
import typing
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import prepare
from model import GPT, PRESETS, GPTConfig, generate, load_published, model_with, tie
from prepare import Console, fail

DEFAULT_DATA = "data/stdlib"

# ---------------------------------------------------------------------------------------------------------------------
# Settings: one dataclass is the command line, config.json, and what a checkpoint says of itself


@dataclass
class TrainConfig:
    """How to train. Each field is a flag, and the comment behind it the flag's help. Flags override the file given by
    --config, which overrides the preset, which overrides what stands here; a resumed run's settings are its own."""

    preset: str = "toy"  # settings to begin with, listed below
    data: str = DEFAULT_DATA  # data set made by prepare.py
    out: str | None = None  # folder of the run (default: runs/PRESET-N, the first free N)
    init: str | None = None  # weights to begin with: a run, a checkpoint, or a folder of published weights

    steps: int = 560  # optimizer steps in the schedule
    stop_at: int | None = None  # step to stop at, saved, with the schedule left alone (default: steps)
    batch_tokens: int = 4096  # tokens in one optimizer step
    micro_batch: int = 8  # sequences in one forward and backward pass

    optimizer: Literal["muon", "adamw"] = "muon"  # Muon for matrices in blocks and AdamW for the rest, or all AdamW
    lr: float = 8e-3  # peak learning rate
    warmup: float = 0.02  # share of the steps in which the learning rate rises
    decay: float = 0.5  # share of the steps, at the end, in which it falls to zero
    weight_decay: float = 0.1  # decoupled weight decay of matrices
    momentum: float = 0.8  # Muon's; short runs want less
    grad_clip: float = 1.0  # largest norm of the gradient
    skip_bad_steps: int = 0  # steps without a finite gradient that are left out before the run stops

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; weights stay float32
    compile: bool | None = None  # torch.compile (default: on CUDA)
    device: str | None = None  # cpu, cuda, mps, ... (default: the accelerator where there is one)
    shard: int = 1  # processes that share one copy of the model (FSDP2); 1: each has its own (DDP)
    timeout: float = 600.0  # seconds after which a process that does not answer is given up
    seed: int = 1  # of the weights, the order of the data and dropout

    eval_every: int = 200  # steps between evaluations
    eval_tokens: int = 2**20  # most held-out tokens read by an evaluation
    save_every: int = 200  # steps between checkpoints
    log_every: int = 20  # steps between lines of progress
    keep: int = 2  # newest checkpoints kept, beside the best

    model: GPTConfig = field(default_factory=GPTConfig)

    def __post_init__(self):
        positive = "steps batch_tokens micro_batch eval_every eval_tokens save_every log_every keep shard timeout"
        for name in positive.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is not positive")
        if self.stop_at is not None and not 0 < self.stop_at <= self.steps:
            raise ValueError(f"stop_at {self.stop_at} is not between 1 and steps {self.steps}")
        if min(self.warmup, self.decay) < 0 or self.warmup + self.decay > 1:
            raise ValueError(
                f"warmup {self.warmup} and decay {self.decay} are not shares that leave room for each other"
            )
        unit = self.micro_batch * self.model.seq_len
        if self.batch_tokens % unit:
            below = self.batch_tokens // unit * unit
            legal = " or ".join(str(size) for size in (below, below + unit) if size)
            raise ValueError(
                f"batch_tokens {self.batch_tokens} is not a multiple of micro_batch x seq_len ="
                f" {self.micro_batch} x {self.model.seq_len} = {unit}: use {legal}, or another micro_batch"
            )


# How to train the presets of model.py where it differs from TrainConfig. Those not named here go by PUBLISHED, half a
# million tokens a step as for GPT-2.
PUBLISHED = {"batch_tokens": 524_288, "micro_batch": 1, "steps": 20_000, "lr": 6e-4, "momentum": 0.95, "log_every": 1}
RECIPES: dict[str, dict] = {
    "toy": {},
    "grok-toy": {},
    "shakespeare-quick": {
        "data": "data/shakespeare",
        "batch_tokens": 1536,
        "micro_batch": 24,
        "steps": 180,
        "lr": 1.6e-2,
        "decay": 0.7,
    },
    "shakespeare": {"data": "data/shakespeare", "batch_tokens": 8192, "steps": 480, "weight_decay": 0.4},
    "gpt2": dict(PUBLISHED, data="data/gpt2", micro_batch=16),
}


@cache
def settings(cls: type) -> dict[str, tuple[type, str]]:
    """{name: (type, what it is)} of a config's fields; the second is the comment behind the field."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.MULTILINE))
    hints = typing.get_type_hints(cls)
    return {f.name: (hints[f.name], comments[f.name]) for f in fields(cls) if f.name != "model"}


def add_flags(parser: argparse.ArgumentParser, title: str, cls: type) -> None:
    group = parser.add_argument_group(title)
    for name, (hint, comment) in settings(cls).items():
        if isinstance(hint, types.UnionType):  # int | None: the flag takes an int
            hint = hint.__args__[0]
        if (default := getattr(cls, name)) is not None:
            comment += f" ({default})"
        if hint is bool:
            group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=comment)
        elif typing.get_origin(hint) is Literal:
            group.add_argument(f"--{name}", choices=typing.get_args(hint), help=comment)
        else:
            group.add_argument(f"--{name}", type=hint, metavar=hint.__name__.upper(), help=comment)


def build_config(chosen: dict) -> TrainConfig:
    """The config in which `chosen`, a flat dict, overrides the preset that it names. Ends the program on failure."""
    preset = chosen.get("preset", TrainConfig.preset)
    if preset not in PRESETS:
        fail(f"no preset is called {preset!r}: use {', '.join(PRESETS)}")
    chosen = {**PRESETS[preset], **RECIPES.get(preset, PUBLISHED), **chosen}
    of_model = {name: value for name, value in chosen.items() if name in settings(GPTConfig)}
    of_training = {name: value for name, value in chosen.items() if name not in of_model}
    if unknown := of_training.keys() - settings(TrainConfig).keys():
        fail(f"unknown setting {', '.join(sorted(unknown))}: python train.py --help lists them all")
    try:
        return TrainConfig(**of_training, model=GPTConfig(**of_model))
    except (ValueError, TypeError) as error:
        fail(str(error))


def flatten(config: dict) -> dict:
    """A config as config.json holds it, with the model's fields beside the others."""
    return {name: value for name, value in config.items() if name != "model"} | config.get("model", {})


def parse_command_line() -> tuple[dict, bool, argparse.Namespace]:
    """The settings given by flags and by --config's file, flat; whether to resume; and what is asked of a plan."""
    parser = argparse.ArgumentParser(
        usage="train.py [--preset NAME] [--SETTING VALUE ...] [--resume]",
        description=__doc__,
        epilog=f"presets: {', '.join(PRESETS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # what is not given leaves no trace
        allow_abbrev=False,
    )
    parser.add_argument(
        "--resume", action="store_true", default=False, help="go on with the run in --out, or the newest"
    )
    parser.add_argument("--config", metavar="FILE.json", help="settings from a file, such as a run's config.json")
    add_flags(parser, "training", TrainConfig)
    add_flags(parser, "model", GPTConfig)
    planning = parser.add_argument_group("planning")
    planning.add_argument("--plan", action="store_true", default=False, help="say what the run will take, and stop")
    planning.add_argument("--gpus", type=int, metavar="INT", default=None, help="plan for a cluster of so many")
    planning.add_argument("--gpu", choices=ACCELERATORS, default="H100", type=str.upper, help="of this kind (H100)")
    planning.add_argument("--mfu", type=float, metavar="FLOAT", default=0.4, help="at this share of their peak (0.4)")
    planning.add_argument("--tokens", type=float, metavar="FLOAT", default=None, help="for so many tokens, not --steps")
    given = vars(parser.parse_args())
    asked = argparse.Namespace(**{name: given.pop(name) for name in ("plan", "gpus", "gpu", "mfu", "tokens")})
    if not asked.plan and (asked.gpus or asked.tokens):
        parser.error("--gpus and --tokens are for --plan")
    resume, file = given.pop("resume"), given.pop("config", None)
    if file is not None:
        try:
            from_file = flatten(json.loads(Path(file).read_text(encoding="utf-8")))
        except (OSError, ValueError, AttributeError, TypeError) as error:
            fail(f"cannot read settings from {file}: {error}")
        from_file.pop("out", None)  # its folder is that run's alone
        given = {**from_file, **given}
    if asked.tokens:
        given["steps"] = math.ceil(asked.tokens / build_config(given).batch_tokens)
    return given, resume, asked


# ---------------------------------------------------------------------------------------------------------------------
# Processes: as many as torchrun started, each with a number, its rank, or one, which is a group of one. What talks to
# other ranks waits for them, so all must call it


def start_processes(timeout: float) -> dist.Store:
    """Join the process group: CPU tensors travel by gloo, GPU tensors by NCCL. Returns the store that all ranks share.
    Rank 0 speaks for all: what the others print goes nowhere."""
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


def stop_all_ranks(message: str) -> NoReturn:
    """End every rank with one sentence, said once."""
    if dist.get_rank() == 0:
        fail(message)
    raise SystemExit(2)


def from_rank_0(value):
    """Rank 0's `value`, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_all(value) -> list:
    """Every rank's `value`, on every rank."""
    box = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def summed(*numbers: float) -> list[float]:
    """Each number's sum over all ranks."""
    totals = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(totals)
    return totals.tolist()


def anywhere(holds: bool) -> bool:
    """Whether something holds on any rank."""
    return summed(holds) != [0]


def agree(what: str, mine: dict) -> None:
    """Stop unless `mine` is the same on every rank."""
    first, *others = from_all(mine)
    for rank, theirs in enumerate(others, start=1):
        for name in sorted(first.keys() | theirs.keys()):
            if (other := theirs.get(name)) != first.get(name):
                told = f"{name} is {other}, not {first.get(name)}"
                stop_all_ranks(f"rank {rank} has another {what} than rank 0: {told}")


def roll_call(store: dist.Store, rank: int, world: int) -> list[int]:
    """The ranks that do not answer, after an operation between ranks failed and the connections were closed."""
    try:
        store.set(f"alive/{rank}", "yes")
        time.sleep(3)
        silent = [other for other in range(world) if not store.check([f"alive/{other}"])]
        time.sleep(2)  # rank 0 may hold the store in which the others look
        return silent
    except dist.DistError:
        return [0]


class StopRequest:
    """Whether the run is to end early: after Ctrl-C, SIGTERM or SIGUSR1 to any rank, or when torchrun is gone."""

    def __init__(self, parent: int):
        self.signalled, self.parent = False, parent
        for name in {"SIGINT", "SIGTERM", "SIGUSR1"} & set(dir(signal)):  # Windows lacks the third
            signal.signal(getattr(signal, name), self.note)

    def note(self, *_) -> None:
        self.signalled = True

    def made(self) -> bool:
        """The same answer on every rank."""
        orphaned = "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self.parent
        return anywhere(self.signalled or orphaned)


def describe_processes(device: torch.device) -> str:
    """How many ranks on which hosts, and the speed of an all-reduce of 16 MiB, timed once."""
    hosts = from_all(socket.gethostname())
    text = f"{len(hosts)} on {', '.join(sorted(set(hosts)))}"
    if len(hosts) > 1:
        tensor = torch.zeros(2**22, device=device)
        for _ in range(2):  # the first one sets up connections
            start = time.perf_counter()
            dist.all_reduce(tensor)
            float(tensor[0])  # waits for the device
        moved = 2 * (len(hosts) - 1) / len(hosts) * tensor.nbytes  # what each rank sends and receives
        text += f", all-reduce at {moved / (time.perf_counter() - start) / 1e9:.2f} GB/s"
    return text


def spread(model: GPT, config: TrainConfig, device: torch.device) -> nn.Module:
    """The model on its device, so that a backward pass leaves the mean gradient of all ranks: with a copy of it on each
    (DDP), or with each block's parameters in pieces over groups of --shard ranks (FSDP2)."""
    world = dist.get_world_size()
    if config.shard == 1:
        model.to(device)
        return DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model
    ranks = torch.arange(world).view(-1, config.shard)  # each row shares one copy of the model
    timeout = timedelta(seconds=config.timeout)
    columns, rows = (dist.new_subgroups_by_enumeration(r.tolist(), timeout)[0] for r in (ranks.T, ranks))
    mesh = DeviceMesh.from_group([columns, rows], device.type, ranks, mesh_dim_names=("replicate", "shard"))
    gathered_as = getattr(torch, config.dtype)  # by autocast they would stay whole until the backward pass
    policy = MixedPrecisionPolicy(param_dtype=gathered_as, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh)


def sync_gradients(parallel: nn.Module, now: bool) -> None:
    """Whether the next backward pass averages gradients over the copies of the model, as only the last of a step needs
    to. Over the ranks that share a copy it always does, so that each keeps only its piece of them."""
    if isinstance(parallel, FSDPModule):
        parallel.set_requires_all_reduce(now)
    elif isinstance(parallel, DistributedDataParallel):
        parallel.require_backward_grad_sync = now


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each rank may hold a piece, in one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def piece(tensor: Tensor, like: Tensor) -> Tensor:
    """The inverse of whole: this rank's piece of a tensor of the size of `like`."""
    if isinstance(like, DTensor) and tensor.shape == like.shape:
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return tensor


# ---------------------------------------------------------------------------------------------------------------------
# The machine: device, number format, speed


@dataclass
class Accelerator:
    """What its maker publishes."""

    flops: float  # dense bfloat16 products per second
    memory: float  # bytes
    link: float  # bytes per second to the others in its node, each way


ACCELERATORS = {
    "A100": Accelerator(312e12, 80e9, 300e9),
    "H100": Accelerator(989e12, 80e9, 450e9),
    "H200": Accelerator(989e12, 141e9, 450e9),
    "B200": Accelerator(2250e12, 192e9, 900e9),
}


def choose_device(name: str | None) -> tuple[torch.device, str]:
    """The device, and the reason."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator and name in (None, accelerator.type):  # ranks of a node take one each
        index = int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count()
        torch.accelerator.set_device_index(index)
        return torch.device(accelerator.type, index), "found" if name is None else "as set"
    if name is None:
        return torch.device("cpu"), "no accelerator found"
    try:
        torch.empty(1, device=name)
        return torch.device(name), "as set"
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {name} can't be used here: {str(error).splitlines()[0]}")


def has_bfloat16(device: torch.device) -> bool:
    """Whether it has instructions for products in bfloat16, or only imitates them, slowly."""
    if device.type == "cpu":
        return torch.cpu.get_capabilities().get("avx512_bf16", False)
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


@cache
def peak_of(device: torch.device, dtype: str) -> float | None:
    """FLOP/s that matrix products could reach: published for a GPU in bfloat16, None for other accelerators; on a CPU
    the best that a product of two 1024 x 1024 matrices gets in a few."""
    if device.type != "cpu":
        name = torch.cuda.get_device_name(device) if device.type == "cuda" and dtype == "bfloat16" else ""
        return next((gpu.flops for kind, gpu in ACCELERATORS.items() if kind in name), None)
    a, b = torch.randn(2, 1024, 1024).to(getattr(torch, dtype))
    best = math.inf
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


def choose_dtype(name: str, device: torch.device) -> tuple[str, str]:
    """The dtype of matrix products, and the reason."""
    if name != "auto":
        return name, "as set"
    if not has_bfloat16(device):
        return "float32", "no bfloat16 instructions here"
    if device.type != "cpu":
        return "bfloat16", "bfloat16 units found"
    peak32, peak16 = peak_of(device, "float32"), peak_of(device, "bfloat16")
    reason = f"products measured at {peak32 / 1e9:.0f} GFLOP/s in float32, {peak16 / 1e9:.0f} in bfloat16"
    # Half of a step is not products but casts, norms and the optimizer, so bfloat16 must be much faster to pay.
    return "bfloat16" if peak16 > 1.5 * peak32 else "float32", reason


def autocast(device: torch.device, config: TrainConfig) -> torch.autocast:
    """In which matrix products are computed in the run's dtype, while weights and sums stay float32."""
    return torch.autocast(device.type, getattr(torch, config.dtype), enabled=config.dtype != "float32")


# ---------------------------------------------------------------------------------------------------------------------
# Batches: the windows of step s follow from (seed, s), and nothing else


def permute(numbers: np.ndarray, n: int, key: tuple[int, ...]) -> np.ndarray:
    """Where each of `numbers` lands when 0 .. n-1 are shuffled, without storing the shuffle. A Feistel network does it:
    cut a number of 2 h bits into halves, and six times swap them and mix the one into the other, which can be undone,
    so that no two numbers meet. What lands outside 0 .. n-1 goes through again until it is inside."""
    half = max(1, math.ceil(math.log2(max(n, 2)) / 2))
    mask = np.uint64(2**half - 1)
    rounds = np.random.SeedSequence(key).generate_state(6, np.uint64)
    numbers = numbers.astype(np.uint64)
    outside = np.ones(len(numbers), bool)
    while outside.any():
        left, right = numbers[outside] >> np.uint64(half), numbers[outside] & mask
        for salt in rounds:
            mixed = (right ^ salt) * np.uint64(0x9E3779B97F4A7C15)  # wraps around; its high bits depend on all of right
            left, right = right, left ^ (mixed >> np.uint64(40) & mask)
        numbers[outside] = left << np.uint64(half) | right
        outside = numbers >= n
    return numbers.astype(np.int64)


class Windows:
    """A split's tokens, end to end, seen as windows of seq_len inputs and their targets, the tokens one further on."""

    def __init__(self, shards: list[np.ndarray], seq_len: int):
        self.shards, self.seq_len = shards, seq_len
        self.starts = np.cumsum([0] + [len(shard) for shard in shards])
        self.n_tokens = int(self.starts[-1])
        self.n_windows = (self.n_tokens - 1) // seq_len

    def window(self, index: int) -> np.ndarray:
        """Tokens [seq_len + 1] of window `index`, which may lie in several shards."""
        begin, end = index * self.seq_len, (index + 1) * self.seq_len + 1
        first = np.searchsorted(self.starts, begin, side="right") - 1
        parts = []
        for start, shard in zip(self.starts[first:], self.shards[first:]):
            if start >= end:
                break
            parts.append(shard[max(begin - start, 0) : end - start])
        return np.concatenate(parts)

    def get(self, indices: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
        """Inputs and targets [len(indices), seq_len] of these windows."""
        windows = torch.from_numpy(np.stack([self.window(i) for i in indices]).astype(np.int64))
        return windows[:, :-1].to(device), windows[:, 1:].to(device)

    def batch_indices(self, seed: int, step: int, rows: int) -> np.ndarray:
        """The windows [rows] of a step: each epoch visits every window once, in an order of its own."""
        position = np.arange(step * rows, (step + 1) * rows)
        epochs, places = position // self.n_windows, position % self.n_windows
        indices = np.empty(rows, np.int64)
        for epoch in np.unique(epochs):
            indices[epochs == epoch] = permute(places[epochs == epoch], self.n_windows, (seed, int(epoch)))
        return indices


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers and schedule


def orthogonalised(matrices: Tensor) -> Tensor:
    """Matrices [N, R, C] with their singular vectors kept and their singular values drawn towards one, by five rounds
    of Newton and Schulz's iteration with the coefficients of Jordan et al. (2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315  # steep at zero; values end between about 0.7 and 1.2
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)  # (a + b gram + c gram^2) x
    return x.mT if tall else x


class Muon(torch.optim.Muon):
    """Steps along the mean of past gradients in which all directions of a matrix learn equally fast: the singular
    values of a step are made one (Jordan et al., 2024), times a factor for the size of AdamW's steps, so that one
    learning rate serves both (Liu et al., 2025).

    Differs from torch's in how it gets there. Torch's takes one matrix after the other, on each rank all of them, and
    always in bfloat16, which is slow on most CPUs. Here those of one shape go together, in `dtype`, dealt out over the
    ranks."""

    def __init__(self, matrices: list[Tensor], dtype: torch.dtype, **how):
        super().__init__(matrices, **how)
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        """Apply the gradients. All ranks must come here."""
        rank, world = dist.get_rank(), dist.get_world_size()
        (group,) = self.param_groups
        same_shape = defaultdict(list)
        for matrix in group["params"]:
            same_shape[matrix.shape].append(matrix)
        for shape, matrices in same_shape.items():  # the i-th of them is the work of rank i % world
            mine = []
            for i, matrix in enumerate(matrices):
                if not self.state[matrix]:
                    self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
                mean = self.state[matrix]["momentum_buffer"]
                mean.lerp_(matrix.grad, 1 - group["momentum"])
                ahead = matrix.grad.lerp(mean, group["momentum"])  # Nesterov's: where the mean is going
                ahead = whole(ahead.to(self.dtype))
                if i % world == rank:
                    mine.append(ahead)
            updates = orthogonalised(torch.stack(mine)) if mine else None
            for i, matrix in enumerate(matrices):
                if i % world == rank:
                    update = updates[i // world].contiguous()
                else:
                    update = torch.empty(shape, dtype=self.dtype, device=matrix.device)
                if world > 1:  # a single rank may be on a device that no backend serves, such as mps
                    dist.broadcast(update, src=i % world)
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(piece(update, matrix), alpha=-group["lr"] * 0.2 * math.sqrt(max(shape)))


def muon_matrices(model: GPT, config: TrainConfig) -> list[Tensor]:
    """The matrices in blocks, where Muon is the optimizer."""
    return [p for p in model.blocks.parameters() if p.ndim == 2] if config.optimizer == "muon" else []


def make_optimizers(model: GPT, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices in blocks, where a gradient's directions matter more than their sizes; AdamW for the
    rest."""
    matrices = muon_matrices(model, config)
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    if not matrices:
        return [adamw]
    muon = Muon(
        matrices, getattr(torch, config.dtype), lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum
    )
    return [muon, adamw]


def lr_at(step: int, config: TrainConfig) -> float:
    """Learning rate of step 0, 1, ...: a linear rise, a plateau, a linear fall that would reach zero at `steps`."""
    rise = (step + 1) / max(1, config.warmup * config.steps)
    fall = (config.steps - step) / max(1, config.decay * config.steps)
    return config.lr * min(rise, 1.0, fall)


# ---------------------------------------------------------------------------------------------------------------------
# A step


class Trainer:
    """A model that all ranks train together. `model` is the plain one, to save and to sample; `parallel` wraps it, and
    averages gradients over ranks; `compiled` is what is called."""

    def __init__(self, model: GPT, config: TrainConfig, device: torch.device, windows: Windows):
        for parameter in model.parameters():  # rank 0's, for all
            dist.broadcast(parameter.detach(), src=0)
        self.model, self.config, self.device, self.windows = model, config, device, windows
        self.parallel = spread(model, config, device)
        self.compiling = device.type == "cuda" if config.compile is None else config.compile
        self.compiled = torch.compile(self.parallel) if self.compiling else self.parallel
        self.optimizers = make_optimizers(model, config)

    def gradients(self, step: int) -> tuple[Tensor, Tensor]:
        """Leave the mean gradient of a step's batch, clipped, in the parameters. Returns this rank's mean loss, and the
        norm of the gradient before it was clipped."""
        seed, size = self.config.seed, self.config.micro_batch
        rank, world = dist.get_rank(), dist.get_world_size()
        rows = self.config.batch_tokens // self.windows.seq_len // world  # of each rank
        indices = self.windows.batch_indices(seed, step, rows * world)
        loss = torch.zeros((), device=self.device)
        for row in range(rank * rows, (rank + 1) * rows, size):
            # Dropout follows from the place in the batch, whichever rank has it.
            torch.manual_seed(int(np.random.SeedSequence((seed, step, row)).generate_state(1)[0]))
            inputs, targets = self.windows.get(indices[row : row + size], self.device)
            sync_gradients(self.parallel, row + size == (rank + 1) * rows)
            with autocast(self.device, self.config):
                micro_loss = self.compiled(inputs, targets) * (size / rows)
            micro_loss.backward()
            loss += micro_loss.detach()
        return loss, whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip))

    def update(self, step: int) -> None:
        """Apply the gradient, and clear it."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, self.config)
            optimizer.step()
        self.model.zero_grad()


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(model: GPT, windows: Windows, config: TrainConfig, device: torch.device) -> tuple[float, float]:
    """Mean loss in nats per token over fixed held-out windows, and its standard error. Draws no random numbers, so that
    training goes on as if it had not been."""
    n = min(windows.n_windows, max(1, config.eval_tokens // windows.seq_len))
    chosen = np.linspace(0, windows.n_windows, n, endpoint=False).astype(np.int64)
    share = math.ceil(n / dist.get_world_size())  # of each rank; the last may repeat a window, which is not counted
    mine = dist.get_rank() * share + np.arange(share)
    indices, counted = chosen[np.minimum(mine, n - 1)], torch.from_numpy(mine < n)
    model.eval()
    losses = []
    for i in range(0, share, config.micro_batch):
        inputs, targets = windows.get(indices[i : i + config.micro_batch], device)
        with autocast(device, config):
            logits = model(inputs)
        each = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        losses.append(each.view_as(targets).mean(1).cpu().double())
    model.train()
    losses = torch.cat(losses)[counted]
    (total,) = summed(losses.sum())
    (squares,) = summed((losses - total / n).square().sum())
    return total / n, math.sqrt(squares / (n - 1) / n) if n > 1 else math.nan


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: a tensor file, and a small JSON that names it, written last


def snapshot(model: GPT, optimizers: list[torch.optim.Optimizer]) -> dict[str, dict[str, Tensor]]:
    """Weights and optimizer state by name, whole, copied to the CPU on rank 0. All ranks must come here."""
    copies = {"model": {}, "optimizer": {}}
    if isinstance(model, FSDPModule):
        model.reshard()  # an evaluation leaves the root's parameters whole

    def copy(kind: str, name: str, tensor: Tensor) -> None:
        tensor = whole(tensor.detach())
        if dist.get_rank() == 0:
            copies[kind][name] = tensor.to("cpu", copy=True)

    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, name in names.items():
        copy("model", name, parameter)
    for optimizer in optimizers:
        for parameter, tensors in optimizer.state.items():
            for key, tensor in tensors.items():
                copy("optimizer", f"{names[parameter]}.{key}", tensor)
    return copies


def restore_optimizers(model: GPT, optimizers: list[torch.optim.Optimizer], state: dict | None) -> None:
    """Put an optimizer state that rank 0 has read into the optimizers of all ranks, a tensor at a time."""
    tensors = state["optimizer"] if dist.get_rank() == 0 else {}
    sizes = from_rank_0({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
    found = defaultdict(dict)
    mine = {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, (shape, dtype) in sizes.items():
        tensor = tensors[name].clone() if tensors else torch.empty(shape, dtype=dtype)
        dist.broadcast(tensor, src=0)
        parameter_name, _, key = name.rpartition(".")
        if (parameter := model.get_parameter(parameter_name)) in mine:
            found[parameter][key] = piece(tensor, parameter)
    for optimizer in optimizers:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        numbered = {i: found[p] for i, p in enumerate(parameters) if p in found}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": numbered})


def save_checkpoint(run: Path, step: int, state: dict, keep: int) -> None:
    """Write step-N.pt beside its final name, rename it, then write step-N.json, which makes it count. Prune last, so
    that at every instant the newest whole checkpoint is on disk."""
    path = run / f"step-{step:08d}.pt"
    with prepare.written_whole(path) as file:
        torch.save(state, file)
    record = {"step": step, "file": path.name, "bytes": path.stat().st_size, "sha256": prepare.sha256_of(path)}
    prepare.write_json(path.with_suffix(".json"), record)
    prune(run, keep)


def mark_best(run: Path, step: int, val_loss: float) -> None:
    """Make best.json a copy of a checkpoint's JSON, with the loss that earned it."""
    record = json.loads((run / f"step-{step:08d}.json").read_text(encoding="utf-8"))
    prepare.write_json(run / "best.json", {**record, "val_loss": val_loss})


def read_best(run: Path) -> dict:
    """What best.json says; nothing where it is missing or damaged."""
    try:
        return dict(json.loads((run / "best.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and the best one."""
    best = read_best(run).get("file")
    for record in sorted(run.glob("step-*.json"))[:-keep]:
        if (tensors := record.with_suffix(".pt")).name != best:
            record.unlink()
            tensors.unlink(missing_ok=True)


class Saver:
    """Writes checkpoints in order, in a thread beside training. Has work on rank 0 only."""

    def __init__(self, run: Path, keep: int):
        self.run, self.keep = run, keep
        self.thread, self.writing = ThreadPoolExecutor(1), []

    def save(self, state: dict) -> None:
        self.writing.append(self.thread.submit(save_checkpoint, self.run, state["step"], state, self.keep))

    def mark_best(self, step: int, val_loss: float) -> None:
        self.writing.append(self.thread.submit(mark_best, self.run, step, val_loss))

    def finish(self) -> str | None:
        """Wait on all ranks until all is on disk, or return what went wrong. They ask each other again and again, so
        that none takes a long save for a rank that has died."""
        while anywhere(any(not task.done() for task in self.writing)):
            time.sleep(0.1)
        errors = [str(task.exception()) for task in self.writing if task.exception()]
        self.writing.clear()
        return from_rank_0(f"cannot save in {self.run} ({errors[0]})" if errors else None)


class Damaged(Exception):
    """A checkpoint that is not whole."""


def read_checkpoint(record: Path) -> dict:
    """The state that a checkpoint's JSON names, on the CPU, after its SHA-256 is found right. Nothing in the file is
    executed. Raises Damaged."""
    try:
        named = json.loads(record.read_text(encoding="utf-8"))
        path = record.with_name(Path(named["file"]).name)
        if prepare.sha256_of(path) != named["sha256"]:
            raise Damaged(f"{path} does not match the SHA-256 in {record.name}")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if missing := {"step", "config", "model", "optimizer", "tokenizer", "data"} - state.keys():
            raise Damaged(f"{path} lacks {', '.join(sorted(missing))}")
        return state
    except Damaged:
        raise
    except Exception as error:  # noqa: BLE001 - a file that is not what it says can break torch.load in any way
        raise Damaged(f"{record} can't be read ({type(error).__name__}: {str(error).splitlines()[0]})") from None


def load_checkpoint(path: str | Path) -> tuple[dict, Path]:
    """The state of a checkpoint (its .json or .pt), or of the newest whole one in a run's folder, and its JSON's path.
    Names each damaged one that it passes over. Ends the program where none is left."""
    path = Path(path)
    if path.is_dir():
        records = sorted(path.glob("step-*.json"), reverse=True)
    else:
        records = [path.with_suffix(".json")] if path.exists() else []
    if not records:
        fail(f"there is no checkpoint in {path}: make one with python train.py")
    for record in records:
        try:
            return read_checkpoint(record), record
        except Damaged as error:
            print(f"damaged: {error}", file=sys.stderr)
    fail(f"no whole checkpoint is left in {path}")


def newest_run(runs: str | Path = "runs") -> Path:
    """The folder in `runs` with the newest checkpoint."""
    records = list(Path(runs).glob("*/step-*.json"))
    if not records:
        fail(f"there is no run in {runs}/: make one with python train.py")
    return max(records, key=lambda record: record.stat().st_mtime).parent


def load_source(path: str | Path) -> tuple[dict, Path]:
    """What load_checkpoint returns, of a run, a checkpoint, or a folder of published weights (without optimizer)."""
    folder = Path(path)
    try:
        published = "model_type" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        published = False
    if not published:
        return load_checkpoint(path)
    try:
        config, weights = load_published(folder)
    except Exception as error:  # noqa: BLE001 - as in read_checkpoint
        fail(f"cannot load {folder}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
    tokenizer = prepare.tokenizer_to_dict(prepare.load_published_tokenizer(folder))
    return {"step": 0, "model": weights, "config": {"model": asdict(config)}, "tokenizer": tokenizer}, folder


def load_model(path: str | Path) -> tuple[GPT, tiktoken.Encoding, Path]:
    """The model on the CPU, its tokenizer, and the file or folder that they came from. Ends the program on failure."""
    state, source = load_source(path)
    try:
        model = model_with(GPTConfig(**state["config"]["model"]), state["model"])
        return model, prepare.tokenizer_from_dict(state["tokenizer"]), source
    except Exception as error:  # noqa: BLE001 - as in read_checkpoint
        fail(f"{source} holds no model ({type(error).__name__}: {str(error).splitlines()[0]})")


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


class Metrics:
    """metrics.jsonl, and TensorBoard's files where that is installed. Rows after `step`, of steps that were lost with a
    killed process, are dropped."""

    def __init__(self, run: Path, step: int):
        path = run / "metrics.jsonl"
        rows = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        rows = [row for row in rows if row.endswith("}") and json.loads(row)["step"] <= step]
        path.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(run, purge_step=step + 1)
        except ImportError:
            self.board = None

    def write(self, **row) -> None:
        try:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        except OSError as error:  # a full disk, say, which may have room again for the next checkpoint
            print(f"the metrics of step {row['step']} are lost: {error}", file=sys.stderr)
        if self.board:
            for name, value in row.items():
                if isinstance(value, float):
                    self.board.add_scalar(name, value, row["step"])


def clock(seconds: float) -> str:
    """4000 -> 1:06:40"""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


# ---------------------------------------------------------------------------------------------------------------------
# The run


def check_disk(out: str) -> None:
    """Stop where another node has a newer checkpoint than rank 0, which reads and writes them."""
    newest = max((record.name for record in Path(out).glob("step-*.json")), default="")
    first, *others = from_all(newest)
    if missed := [other for other in others if other > first]:
        stop_all_ranks(f"rank 0 does not see {missed[0]} in {out}: it must lie on a disk that all nodes share")


def check_processes(config: TrainConfig) -> None:
    """End the program where its number of processes can't share the work."""
    world, n_micro = dist.get_world_size(), config.batch_tokens // (config.micro_batch * config.model.seq_len)
    if n_micro % world:
        legal = ", ".join(str(n) for n in range(1, n_micro + 1) if n_micro % n == 0)
        fail(
            f"{world} processes can't share the {n_micro} micro-batches of {config.batch_tokens} batch_tokens equally:"
            f" use {legal} of them, or another micro_batch"
        )
    if world % config.shard:
        fail(f"{world} processes can't be divided into groups of --shard {config.shard}")


def open_run(given: dict, resume: bool) -> tuple[TrainConfig, Path, dict | None, bool]:
    """The config, the run's folder, the state to begin with (None for a new model), and whether it goes on with a run:
    where there is no checkpoint yet, even --resume begins anew."""
    state = None
    if not resume and given.get("out") and any(Path(given["out"]).glob("*.json")):
        out = given["out"]
        fail(f"{out} already holds a run: go on with it by --out {out} --resume, or choose another --out")
    if resume and given.get("out") and not any(Path(given["out"]).glob("step-*.json")):
        print(f"there is no checkpoint in {given['out']} yet: a new run begins")
        resume = False
    if resume:
        run = Path(given["out"]) if given.get("out") else newest_run()
        state, record = load_checkpoint(run)
        print(f"resuming {record.with_suffix('')}, step {state['step']}")
        try:
            saved = flatten(state["config"]) | {"stop_at": None, "out": str(run)}
        except (AttributeError, TypeError):
            fail(f"{record} holds no settings")
        for name, value in given.items():
            if name in saved and saved[name] != value:
                print(f"changed by the command line: {name} from {saved[name]} to {value}")
        given = {**saved, **given}
    elif given.get("init"):  # its shape, but our way to train
        state, _ = load_source(given["init"])
        given = {**state["config"]["model"], "dropout": GPTConfig.dropout, **given}
    config = build_config(given)
    if config.out is None:
        numbered = (f"runs/{config.preset}-{n}" for n in range(1, 10**6))
        config.out = next(name for name in numbered if not Path(name).exists())
    check_processes(config)
    return config, Path(config.out), state, resume


def load_data(config: TrainConfig) -> tuple[dict, Windows, Windows]:
    """The data set's meta.json, and the windows of its two splits. Prepares the default data set where need be, and
    gives the model the data's vocabulary where it has none."""
    first_on_node = os.environ.get("LOCAL_RANK", "0") == "0"
    for my_turn in (dist.get_rank() == 0, first_on_node):  # where nodes share no disk, each prepares its own
        if my_turn and config.data == DEFAULT_DATA and not Path(DEFAULT_DATA, "meta.json").exists():
            print(f"preparing the default corpus in {DEFAULT_DATA}, once", flush=True)
            prepare.prepare([], DEFAULT_DATA)
        dist.barrier()
    meta, shards = prepare.load_dataset(config.data, verify=first_on_node)
    splits = [Windows(shards[split], config.model.seq_len) for split in prepare.SPLITS]
    for split, windows in zip(prepare.SPLITS, splits):
        if windows.n_windows < 1:
            fail(
                f"the {split} split of {config.data} has {windows.n_tokens} tokens, fewer than a window of"
                f" {config.model.seq_len} and its target: use a smaller --seq_len, more text, or another --val_fraction"
            )
    if config.model.vocab_size is None:
        config.model.vocab_size = meta["vocab_size"]
    elif config.model.vocab_size < meta["vocab_size"]:
        fail(
            f"the model's vocabulary of {config.model.vocab_size} is smaller than that of {config.data}, which has"
            f" {meta['vocab_size']}: leave --vocab_size out, or prepare the text with the model's tokenizer"
        )
    return meta, *splits


def hashes(meta: dict, split: str) -> list[str]:
    return [shard["sha256"] for shard in meta[split]["shards"]]


def take_over(model: GPT, state: dict, meta: dict, config: TrainConfig, resume: bool) -> None:
    """Load a checkpoint's weights, after making sure that all of it fits. A model only understands the tokens it was
    trained on, and a resumed run goes on with its data and optimizer."""
    try:
        if state["tokenizer"]["ranks"] != meta["tokenizer"]["ranks"]:
            fail(f"{config.data} was prepared with {meta['tokenizer']['name']}, not with the checkpoint's tokenizer")
        model.load_state_dict(tie(config.model, state["model"]))
        if not resume:
            return
        if state["data"] != hashes(meta, "train"):
            fail(f"{config.data} is not the data set that this run began with: prepare that again, or start a new run")
        if state["config"]["optimizer"] != config.optimizer:
            fail(f"{config.out} was trained with --optimizer {state['config']['optimizer']}, whose state it needs")
        for name, tensor in state["optimizer"].items():
            parameter = model.get_parameter(name.rpartition(".")[0])
            if tensor.shape not in (parameter.shape, ()):
                raise ValueError(f"{name} has shape {list(tensor.shape)}")
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        fail(f"the checkpoint does not fit: {' '.join(str(error).split())}")


def open_folder(run: Path, config: TrainConfig, step: int, may_exist: bool) -> Metrics:
    """Make the run's folder, or clear it of what stands in the way of going on from `step`. Returns its metrics."""
    try:
        run.mkdir(parents=True, exist_ok=may_exist)
        for unfinished in run.glob("*.partial"):  # by a process that was killed
            unfinished.unlink()
        for record in run.glob("step-*.json"):  # those that were passed over
            if record.name > f"step-{step:08d}.json":
                record.rename(f"{record}.damaged")
        prepare.write_json(run / "config.json", asdict(config))
        return Metrics(run, step)
    except OSError as error:
        fail(f"cannot write to {run}: {error.strerror}")


def what_is_wrong(loss: Tensor, grad_norm: Tensor) -> str:
    """With a gradient that is not finite, and on which ranks. All ranks must come here."""
    finite = enumerate(from_all(loss.isfinite().item()))
    ranks = ", ".join(str(rank) for rank, is_finite in finite if not is_finite) or "none"
    return f"the gradient's norm is {grad_norm}, the loss not finite on rank {ranks}"


def specimen(model: GPT, tokenizer: tiktoken.Encoding, device: torch.device, seed: int) -> str:
    """200 tokens that the model writes into an empty document."""
    torch.manual_seed(seed)
    model.eval()
    prompt = torch.tensor([[tokenizer.eot_token]], device=device)
    written = islice(generate(model, prompt, n_vocab=tokenizer.n_vocab), 200)
    return b"".join(prepare.token_bytes(tokenizer, ids.item()) for ids in written).decode(errors="replace")


def train(given: dict, resume: bool, plan_only: bool = False) -> None:
    """All of a run, on each rank: open it, build, resume; then step, log, save and evaluate to the end."""
    started, parent = time.monotonic(), os.getppid()
    rank, world = dist.get_rank(), dist.get_world_size()
    agree("version or setting", {"torch": torch.__version__, "resume": resume, **given})
    if resume and "out" in given:
        check_disk(given["out"])
    config, run, state, resume = open_run(given, resume) if rank == 0 else (None, None, None, None)
    config, run, resume = from_rank_0((config, run, resume))
    meta, train_windows, val_windows = load_data(config)
    agree("data set", {f"SHA-256 of {split}": hashes(meta, split) for split in prepare.SPLITS})

    # build
    device, device_reason = choose_device(config.device)
    config.dtype, dtype_reason = from_rank_0(choose_dtype(config.dtype, device))
    peak_flops = peak_of(device, config.dtype)
    torch.manual_seed(config.seed)
    model = GPT(config.model)
    if state:  # on rank 0, which gives it to the others
        take_over(model, state, meta, config, resume)
    trainer = Trainer(model, config, device, train_windows)
    step = 0
    if resume:
        restore_optimizers(model, trainer.optimizers, state)
        step = from_rank_0(state and state["step"])
    del state
    ranks = describe_processes(device)
    if plan_only:
        print(f"plan for {config.preset} on this machine: {ranks}, {device}, {config.dtype}")
        print("\n".join(local_plan(trainer, val_windows.n_tokens)))
        return

    # open
    stop_at = config.stop_at or config.steps
    if step >= stop_at:
        stop_all_ranks(f"{run} is at step {step} already: give more --steps, or a later --stop_at, to go on")
    metrics = open_folder(run, config, step, may_exist="out" in given or resume) if rank == 0 else None
    tokens, n_bytes = config.steps * config.batch_tokens, sum(memory_parts(model, config, config.shard).values())
    print(
        f"run      {run}\n"
        f"data     {config.data}: {train_windows.n_tokens:,} tokens to train on, {val_windows.n_tokens:,} held out\n"
        f"model    {model.n_params():,} parameters, {model.flops_per_token() / 1e6:,.1f} MFLOP per token\n"
        f"steps    {config.steps:,} of {config.batch_tokens:,} tokens: {tokens / train_windows.n_tokens:.2f} epochs\n"
        f"plan     {tokens * model.flops_per_token():.3g} FLOP, {n_bytes / 1e9:.2f} GB beside the program\n"
        f"ranks    {ranks}\n"
        f"device   {device} ({device_reason})\n"
        f"dtype    {config.dtype} ({dtype_reason})\n"
        f"compile  {'on' if trainer.compiling else 'off'} (it pays on CUDA, only in long runs elsewhere)",
        flush=True,
    )
    saver, stop_request, console = Saver(run, config.keep), StopRequest(parent), Console(sys.stdout)
    best_loss = from_rank_0(read_best(run).get("val_loss", math.inf))

    def save() -> None:
        """Copy the state after `step` steps off the device, for the saver to write while training goes on."""
        start = time.monotonic()
        if trouble := saver.finish():
            console.line(f"{trouble}; trying again")
        state = {"step": step, "config": asdict(config), **snapshot(model, trainer.optimizers)}
        state |= {"tokenizer": meta["tokenizer"], "data": hashes(meta, "train")}
        if rank == 0:
            saver.save(state)
            metrics.write(step=step, save_stall=time.monotonic() - start)

    first_step, loop_started = step, time.monotonic()
    last_step, last_log = step, loop_started
    skipped, leaving = 0, False
    while not leaving:
        # step
        loss, grad_norm = trainer.gradients(step)
        if grad_norm.isfinite():
            trainer.update(step)
        else:
            skipped += 1
            wrong = f"step {step + 1}: {what_is_wrong(loss, grad_norm)}"
            if skipped > config.skip_bad_steps:
                saver.finish()
                stop_all_ranks(f"{wrong}; the step was not made: --resume with a lower --lr, or with --skip_bad_steps")
            console.line(f"{wrong}; skipped")
            model.zero_grad()
        step += 1
        leaving = stop_request.made() or step == stop_at

        # log
        now = time.monotonic()
        left = clock((now - loop_started) / (step - first_step) * (stop_at - step))
        console.glimpse(f"step {step:,}/{config.steps:,}  {left} left")
        if step % config.log_every == 0 or step == 1 or leaving:
            (mean_loss,) = summed(loss.item() / world)
            speed = (step - last_step) * config.batch_tokens / (now - last_log)
            row = {"step": step, "loss": mean_loss, "lr": lr_at(step - 1, config), "grad_norm": grad_norm.item()}
            row |= {"seconds": now - started, "tokens_per_second": speed, "skipped": skipped}
            line = f"step {step:5,}/{config.steps:,}  loss {mean_loss:.4f}  {speed:9,.0f} tokens/s"
            if layers := model.expert_layers():
                loads = torch.stack([layer.load for layer in layers])
                row["expert_load"] = (torch.tensor(summed(*loads.flatten())).view_as(loads) / world).tolist()
            if peak_flops:
                row["mfu"] = speed * model.flops_per_token() / (peak_flops * world)
                line += f"  {row['mfu']:4.0%} of peak"
            console.line(f"{line}  {left} left")
            if metrics:
                metrics.write(**row)
            last_step, last_log = step, time.monotonic()

        # save
        saving = step % config.save_every == 0 or leaving
        if saving:
            save()

        # evaluate
        if step == stop_at or (step % config.eval_every == 0 and not leaving):
            val_loss, val_error = evaluate(model, val_windows, config, device)
            bits = val_loss / math.log(2) * meta["val"]["tokens"] / meta["val"]["bytes"]
            line = f"val_loss {val_loss:.4f} +- {val_error:.4f}  {bits:.4f} bits per byte"
            console.line(f"step {step:5,}/{config.steps:,}  {line}")
            if metrics:
                metrics.write(step=step, val_loss=val_loss, val_loss_error=val_error, val_bits_per_byte=bits)
            if val_loss < best_loss:
                best_loss = val_loss
                if not saving:
                    save()
                if rank == 0:
                    saver.mark_best(step, val_loss)
            last_step, last_log = step, time.monotonic()

    if trouble := saver.finish():
        stop_all_ranks(f"{trouble}: the checkpoint before is whole; make room and --resume")
    go_on = f"to go on: {'torchrun ... ' if world > 1 else 'python '}train.py --out {run} --resume"
    if step < stop_at:
        print(f"stopped at step {step} and saved; {go_on}")
        return
    text = specimen(model, prepare.tokenizer_from_dict(meta["tokenizer"]), device, config.seed)
    seconds = clock(time.monotonic() - started)
    print(
        f"\nwhat it writes:\n{text}\n\n"
        f"val_loss {val_loss:.4f} nats per token, {bits:.4f} bits per byte, after {seconds}\n"
        f"the run lies in {run}"
    )
    if step < config.steps:
        print(go_on)
    print(f"next: python sample.py {run} --interactive")


# ---------------------------------------------------------------------------------------------------------------------
# The plan: what a run will take, before it takes it. Nothing of it is needed to train

# Assumed of clusters. Nodes of eight GPUs with a 400 Gbit/s port each; failures as Meta reported for Llama 3.
NODE_GPUS, NODE_LINK, HOP_SECONDS = 8, 400e9, 10e-6
FAILURES_PER_GPU_DAY, RESTART_SECONDS, COPY_BYTES_PER_SECOND = 4.74e-4, 600.0, 20e9


def predicted_loss(n_params: float, tokens: float) -> float:
    """Nats per token of web text (Hoffmann et al., 2022, as Besiroglu et al. corrected the fit in 2404.10102)."""
    return 1.8172 + 482.01 / n_params**0.3478 + 2085.43 / tokens**0.3658


def optimal_tokens(n_params: float) -> float:
    """Where that loss is least for its compute, 6 x parameters x tokens."""
    return (0.3658 * 2085.43 / (0.3478 * 482.01) * n_params**0.3478) ** (1 / 0.3658)


def product_bytes(config: TrainConfig) -> int:
    """Of a number in matrix products, hence in activations."""
    return 4 if config.dtype == "float32" else 2


def memory_parts(model: GPT, config: TrainConfig, shard: int) -> dict[str, float]:
    """Bytes on each device, by part."""
    n, tokens, size = model.n_params(), config.micro_batch * config.model.seq_len, product_bytes(config)
    matrices = sum(p.numel() for p in muon_matrices(model, config))
    block = sum(p.numel() for p in model.blocks[0].parameters())
    # Beside what is trained: sharded, a block's weights whole, and the next one's; else autocast's copies of all.
    copies = 2 * size * block if shard > 1 else size * n if config.dtype != "float32" else 0
    return {
        "weights": 4 * n / shard + copies,
        "gradients": 4 * n / shard,
        "optimizer": (4 * matrices + 8 * (n - matrices)) / shard,
        "activations": size * tokens * model.activations_per_token(),
        "logits": (8 + size) * tokens * config.model.vocab_size,  # themselves, their softmax, their gradient
    }


def checkpoint_bytes(model: GPT, config: TrainConfig) -> float:
    """All weights and all of the optimizer's state, however they are laid out over devices."""
    return 4 * model.n_params() + memory_parts(model, config, shard=1)["optimizer"]


def traffic_seconds(model: GPT, config: TrainConfig, gpus: int, link: float, compute: float) -> tuple[float, float]:
    """Seconds in which what a step sends passes the narrowest link, and how many of them do not hide behind `compute`
    seconds of work. Sent are weights in the run's dtype, gradients in float32, and Muon's updates one by one."""
    shard, n, size = config.shard, model.n_params(), product_bytes(config)
    n_micro = max(1, config.batch_tokens / gpus / (config.micro_batch * config.model.seq_len))
    muon_bytes = size * sum(p.numel() for p in muon_matrices(model, config))
    inside = link if shard <= NODE_GPUS else NODE_LINK
    across = link if gpus <= NODE_GPUS else NODE_LINK / min(shard, NODE_GPUS)  # the ranks of a node share its ports

    def ring(payload: float, members: int, width: float) -> float:  # an all-gather or a reduce-scatter
        return payload * (members - 1) / members / width + (members - 1) * HOP_SECONDS

    gathered = 2 * n_micro * ring(size * n, shard, inside)  # forwards and backwards
    averaged = n_micro * ring(4 * n, shard, inside) + 2 * ring(4 * n / shard, gpus // shard, across)
    updates = ring(muon_bytes, shard, inside) + (gpus > 1) * muon_bytes / (link if gpus <= NODE_GPUS else NODE_LINK)
    last_backward = compute * 2 / 3 / n_micro  # when DDP averages, in buckets of 25 MiB, of which one comes too late
    hides = compute if shard > 1 else last_backward * max(0.0, 1 - 25 * 2**20 / (4 * n))
    return gathered + averaged + updates, max(0.0, gathered + averaged - hides) + updates


def compute_seconds(model: GPT, config: TrainConfig, gpu: str, gpus: int, mfu: float) -> float:
    """Seconds of a step at a share `mfu` of the published peak."""
    return model.flops_per_token() * config.batch_tokens / (gpus * ACCELERATORS[gpu].flops * mfu)


def cluster_plan(config: TrainConfig, gpu: str, gpus: int, mfu: float, data_tokens: int | None) -> Iterator[str]:
    """What a run will take on a cluster, from published peaks; then what speaks against it. Each line of the plan comes
    behind the formulas that it rests on."""
    with torch.device("meta"):
        model = GPT(config.model)
    device, shard, against = ACCELERATORS[gpu], config.shard, []
    n, active, flops = model.n_params(), model.n_active_params(), model.flops_per_token()
    yield f"machine    {gpus:,} x {gpu}, {device.flops * mfu / 1e12:,.0f} TFLOP/s each: {mfu:.0%} of the peak, assumed"
    yield f"model      {n:,} parameters, {active:,} active; {flops:,} FLOP per token"

    tokens = config.steps * config.batch_tokens
    loss, optimal = predicted_loss(active, tokens), optimal_tokens(active)
    critical = 2e8 / loss**4.76  # Kaplan et al., 2020
    yield f"tokens     {tokens:.3g} in {config.steps:,} steps; {optimal:.3g} would take least compute for their loss"
    yield f"loss       {loss:.2f} by the law for web text: extrapolated above 16B parameters, for experts a guess from"
    yield "           the active ones, for other text no prediction"
    if config.batch_tokens > critical:
        against.append(f"batches above the critical size, about {critical:,.0f} tokens at this loss, buy little")
    if data_tokens:
        yield f"data       {data_tokens:,} tokens: {tokens / data_tokens:.2f} epochs"
        if tokens > 4 * data_tokens:  # Muennighoff et al., 2023
            against.append("the data runs out: beyond about four epochs, text seen again teaches little")

    compute = compute_seconds(model, config, gpu, gpus, mfu)
    traffic, waited = traffic_seconds(model, config, gpus, device.link, compute)
    seconds = compute + waited
    days = config.steps * seconds / 86400
    yield f"compute    {flops * tokens:.3g} FLOP, {compute:,.3g} s a step"
    yield f"network    {traffic:,.3g} s a step on the narrowest link, of which {waited:,.3g} s do not hide"
    speed = f"{seconds:,.3g} s a step, {config.batch_tokens / seconds:,.0f} tokens/s"
    yield f"time       {speed}: {days:,.1f} days, {days * 24 * gpus:,.0f} GPU-hours"
    sequences, per_gpu = config.batch_tokens // config.model.seq_len, config.batch_tokens / gpus
    if gpus > sequences:
        against.append(f"{gpus:,} GPUs share {sequences:,} sequences a step, so some have none: data parallelism ends")
    if traffic > compute:
        enough = f"which takes about {per_gpu * traffic / compute:,.0f}"
        against.append(f"{per_gpu:,.0f} tokens a GPU and step do not hide the traffic, {enough}")
    if gpus > sequences or traffic > compute:
        against.append("larger clusters add tensor, pipeline and expert parallelism, which this program does not have")

    parts = memory_parts(model, config, shard)
    used, listed = sum(parts.values()), ", ".join(f"{name} {size / 1e9:,.1f}" for name, size in parts.items())
    yield f"memory     {used / 1e9:,.1f} of {device.memory / 1e9:,.0f} GB per GPU: {listed}"
    if used > device.memory:
        divisors = (s for s in range(shard + 1, gpus + 1) if gpus % s == 0)
        smallest = next((s for s in divisors if sum(memory_parts(model, config, s).values()) <= device.memory), None)
        too_large = f"activations of a micro-batch take {parts['activations'] / 1e9:,.0f} GB on whatever --shard"
        against.append("it does not fit: " + (f"use --shard {smallest}" if smallest else too_large))

    failures, state = FAILURES_PER_GPU_DAY * gpus, checkpoint_bytes(model, config)
    between, stall = 86400 / failures, state / COPY_BYTES_PER_SECOND
    interval = clock(math.sqrt(2 * stall * between))  # Young, 1974
    lost = min(1.0, math.sqrt(2 * stall / between) + RESTART_SECONDS / between)
    yield f"failures   {failures:,.2g} a day, assumed; {lost:.1%} of the time lost, at best, with a checkpoint of"
    yield f"           {state / 1e9:,.1f} GB every {interval} and restarts of {clock(RESTART_SECONDS)}, assumed"
    if state > 1e12:
        against.append(f"a checkpoint of {state / 1e12:.1f} TB is gathered on rank 0; others write it in pieces")
    if lost > 0.1:
        against.append(f"failures take {lost:.0%} of the time")
    yield from (f"warning    {reason}" for reason in against)


def print_cluster_plan(given: dict, asked: argparse.Namespace) -> None:
    """Print the plan of a run on GPUs that are not here, for the data set where it is."""
    config = build_config(given)
    if asked.gpus < 1 or asked.gpus % config.shard:
        fail(f"--gpus {asked.gpus} is not a multiple of --shard {config.shard}")
    if not 0 < asked.mfu <= 1:
        fail(f"--mfu {asked.mfu} is not in (0, 1]")
    meta = {}
    if Path(config.data, "meta.json").exists():
        meta, _ = prepare.load_dataset(config.data, verify=False)
    config.model.vocab_size = config.model.vocab_size or meta.get("vocab_size")
    if config.model.vocab_size is None:
        fail(f"{config.preset} has the vocabulary of its data set, which is not in {config.data}: give --vocab_size")
    print(f"plan for {config.preset}")
    data_tokens = meta["train"]["tokens"] if meta and "data" in given else None
    print("\n".join(cluster_plan(config, asked.gpu, asked.gpus, asked.mfu, data_tokens)))


def resident_bytes() -> float:
    """Main memory that this process has used at most so far."""
    try:
        import resource
    except ImportError:  # on Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def local_plan(trainer: Trainer, n_val: int) -> Iterator[str]:
    """What a run will take on this machine, from a few measured steps; `n_val` is the number of held-out tokens."""
    model, config, seconds = trainer.model, trainer.config, []
    for step in range(4):
        start = time.perf_counter()
        trainer.gradients(step)
        trainer.update(step)
        if trainer.device.type != "cpu":
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - start)
    step_seconds = statistics.median(seconds[1:])  # the first one warms up
    evaluated = min(config.eval_tokens, n_val) * math.ceil(config.steps / config.eval_every)
    evaluation = evaluated * step_seconds / config.batch_tokens / 3  # forward is a third of a step
    parts = memory_parts(model, config, config.shard)
    if trainer.device.type == "cpu":  # the program, and the copy that a checkpoint is written from
        parts["program"] = max(0.0, resident_bytes() - sum(parts.values()))
        parts["checkpoint"] = checkpoint_bytes(model, config)
    tokens = config.steps * config.batch_tokens
    optimal, total = optimal_tokens(model.n_active_params()), config.steps * step_seconds + evaluation
    yield f"tokens   {tokens:.3g}; {optimal:.3g} would need the least compute for their loss, by the law for web text"
    yield f"time     {clock(total)}: {config.steps:,} steps of {step_seconds:.3g} s, {clock(evaluation)} of evaluation"
    memory = ", ".join(f"{name} {size / 1e9:,.2f}" for name, size in parts.items())
    yield f"memory   {sum(parts.values()) / 1e9:,.2f} GB: {memory}"


def main() -> None:
    given, resume, asked = parse_command_line()
    if asked.gpus is not None:
        return print_cluster_plan(given, asked)
    store = start_processes(given.get("timeout", TrainConfig.timeout))
    rank, world = dist.get_rank(), dist.get_world_size()
    status, trace = 0, None
    try:
        train(given, resume, asked.plan)
        dist.barrier()  # no rank hangs up while another has something to say
    except SystemExit as end:
        status = end.code
    except Exception as error:
        if world == 1:
            raise
        trace, reason = traceback.format_exc(), str(error).split(". ")[0]
    # Not in the except: there the traceback still holds the model, which holds the connections that are closed here.
    dist.destroy_process_group()
    if trace:
        status, silent = 1, roll_call(store, rank, world)
        if silent:
            names = ", ".join(map(str, silent))
            print(f"train.py: error: rank {names} of {world} does not answer ({reason})", file=sys.stderr)
        else:
            print(trace, file=sys.stderr)
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
    gc.freeze()  # or Python looks through all of torch for garbage on its way out
