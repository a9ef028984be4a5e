"""The checkpoints of a run: written in parts, made valid by one small JSON file, read back whole or row by row.

    runs/toy-1/step-00000720.pt                     weights, optimizer state, settings, tokenizer
    runs/toy-1/step-00000720.json                   the step, and of each file with tensors its bytes and its SHA-256
    runs/big/step-00000720.1-of-2.5b1e0c.pt         with --shard 2, two processes write the rows that they hold: one
    runs/big/step-00000720.2-of-2.5b1e0c.pt         file each, whose name also has a mark of this start of the run
    runs/toy-1/best.json                            the JSON of the checkpoint with the lowest val_loss

Without its JSON, which is written last, a checkpoint does not exist. Old ones are removed after that, so that at each
instant the newest whole one is on disk. Loading never executes code from a file. A run that goes on in any number of
processes, with any --shard, reads what any other number has written: each one the rows that it will hold.

    python -c "import checkpoint; print(checkpoint.load_checkpoint('runs/toy-1')[0]['config'])"
"""

import contextlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
from functools import cache, partial
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prepare import Console, command, fail, sha256_of, shard_hashes, write_json, written_whole

CHECKPOINT = "step-" + 8 * "[0-9]"  # matches how the names of a checkpoint's files begin
HEAD = {"step", "config", "tokenizer", "data"}  # what the first part holds beside tensors

# ---------------------------------------------------------------------------------------------------------------------
# What the processes of a run, its ranks, tell each other. All must call these together, since they wait for each other


def stop_all_ranks(message: str) -> NoReturn:
    """End every rank; rank 0 prints the message."""
    if dist.get_rank() == 0:
        fail(message)
    raise SystemExit(2)


def from_all_ranks(value) -> list:
    """The `value` of every rank, on every rank."""
    box = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def from_rank_0(value):
    """Rank 0's `value`, on every rank."""
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


@contextlib.contextmanager
def rank_0_first() -> Iterator[None]:
    """Rank 0 runs the block before the others do. What would fail on all ranks is reported once, by rank 0."""
    if dist.get_rank() > 0:
        from_rank_0(None)  # waits for it
    yield
    if dist.get_rank() == 0:
        from_rank_0(None)


def sum_over_ranks(*numbers: float) -> list[float]:
    totals = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(totals)
    return totals.tolist()


def any_rank(*conditions) -> list[bool]:
    """Whether each of the conditions holds on any rank."""
    return [total > 0 for total in sum_over_ranks(*map(bool, conditions))]


# ---------------------------------------------------------------------------------------------------------------------
# Tensors in parts


def rows_of_part(n: int, part: int, parts: int) -> range:
    """The rows of a tensor with n of them that one of `parts` equal parts holds, as FSDP2 and torch.chunk divide it:
    the last ones may have fewer, or none. rows_of_part(5, 1, 3) -> range(2, 4)"""
    share = -(-n // parts)
    return range(min(n, share * part), min(n, share * (part + 1)))


class Tensors(Mapping):
    """Tensors by name, of one kind: "model" (weights) or "optimizer". Each part of a checkpoint has some rows of each;
    `parts` are functions that open one, and return {kind: {name: rows}}."""

    def __init__(self, kind: str, parts: list[Callable[[], dict]]):
        self.kind, self.parts = kind, parts

    def part(self, number: int) -> dict[str, Tensor]:
        """What a part has of each tensor."""
        return self.parts[number]()[self.kind]

    def __iter__(self) -> Iterator[str]:
        return iter(self.part(0))

    def __len__(self) -> int:
        return len(self.part(0))

    def __getitem__(self, name: str) -> Tensor:
        """The whole tensor."""
        first = self.part(0)[name]
        if len(self.parts) == 1 or first.ndim == 0:  # a number is in all parts
            return first
        return torch.cat([self.part(number)[name] for number in range(len(self.parts))])

    def rows(self, name: str, wanted: range, n: int) -> Tensor:
        """These rows of a tensor that has n, or the number if it is one. Opens only the parts that hold them."""
        first = self.part(0)[name]
        if first.ndim == 0:
            return first
        pieces = [first[:0]]
        for number in range(len(self.parts)):
            held = rows_of_part(n, number, len(self.parts))
            if overlap := range(max(held.start, wanted.start), min(held.stop, wanted.stop)):
                pieces.append(self.part(number)[name][overlap.start - held.start : overlap.stop - held.start])
        return torch.cat(pieces) if len(pieces) > 2 else pieces[-1]


def held(tensor: Tensor) -> Tensor:
    """The rows of a tensor that this rank holds: all, or those of its part if it is a DTensor, FSDP2's kind of tensor.
    (To import that name would take sample.py half a second.)"""
    return tensor.detach().to_local() if hasattr(tensor, "to_local") else tensor.detach()


def fill(tensor: Tensor, read: Callable[[range], Tensor]) -> None:
    """Set a tensor to what `read` returns. Each rank of the first copy of the model reads the rows that it holds, and
    sends them to those that hold the same rows of other copies: no rank ever has the whole model of --shard."""
    rows, group = range(len(tensor) if tensor.ndim else 0), None
    if mesh := getattr(tensor, "device_mesh", None):
        rows = rows_of_part(len(tensor), mesh.get_local_rank("shard"), mesh.size(1))
        group = mesh.get_group("replicate")
    if dist.get_rank(group) == 0:
        held(tensor).copy_(read(rows))
    if dist.get_world_size(group) > 1:  # a single rank may be on a device without a backend, such as mps
        dist.broadcast(held(tensor), group=group, group_src=0)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_part(run: Path, step: int, state: dict, part: int, parts: int, mark: str) -> dict:
    """Write a file of a checkpoint, and return what the JSON says of it."""
    name = f".{part + 1}-of-{parts}.{mark}" if parts > 1 else ""
    path = run / f"step-{step:08d}{name}.pt"
    with written_whole(path) as file:
        torch.save(state, file)
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def commit(run: Path, step: int, parts: list[dict], keep: int, best_loss: float | None = None) -> None:
    """Make a checkpoint valid, and the best if it has this validation loss. Then remove all but the newest `keep` and
    the best."""
    record = {"step": step, "parts": parts}
    write_json(run / f"step-{step:08d}.json", record)
    if best_loss is not None:
        write_json(run / "best.json", {**record, "val_loss": best_loss})
    best = read_best(run).get("step", 0)
    for old in sorted(run.glob(f"{CHECKPOINT}.json"))[:-keep]:
        if old.stem != f"step-{best:08d}":
            old.unlink()
            for file in run.glob(f"{old.stem}*.pt"):
                file.unlink()
    for damaged in run.glob(f"{CHECKPOINT}.*.damaged"):
        damaged.unlink()


def optimizer_states(weights: dict[str, Tensor], optimizers: list[torch.optim.Optimizer]) -> dict[str, dict]:
    """{name of a parameter: what its optimizer keeps for it}"""
    names = {parameter: name for name, parameter in weights.items()}
    groups = ((optimizer, group) for optimizer in optimizers for group in optimizer.param_groups)
    return {names[p]: optimizer.state[p] for optimizer, group in groups for p in group["params"]}


class Saver:
    """Writes the checkpoints of a run while training continues: each rank of the first copy of the model its part, in a
    thread, then rank 0 the JSON. `config` and `verification` are those of train.py, `meta` is the data's meta.json."""

    def __init__(self, config, meta: dict, model: nn.Module, optimizers: list, log: Console, verification):
        self.config, self.meta, self.optimizers, self.log = config, meta, optimizers, log
        self.verification = verification
        self.weights = dict(model.named_parameters())  # FSDP2 puts whole ones in their place while it computes
        self.thread = futures.ThreadPoolExecutor(1)
        self.pending = None  # what this rank writes, the step that is saved, and its val_loss if it is the best so far
        self.best_loss = self.best_on_disk()
        self.mark = from_rank_0(os.urandom(3).hex())  # no late part of an earlier start can replace one of this

    def save(self, step: int, val_loss: float = math.inf) -> None:
        """Begin to save the state after `step` steps, as the best if its `val_loss` is the lowest so far. Training
        waits only for the previous save and for a copy of the state in main memory."""
        start, config = time.monotonic(), self.config
        self.verification.check(wait=True)
        if problem := self.wait():
            self.log.line(f"{problem}; trying again")
        best_loss = val_loss if val_loss < self.best_loss else None
        self.best_loss = min(self.best_loss, val_loss)
        if dist.get_rank() < config.shard:
            states = optimizer_states(self.weights, self.optimizers)
            moments = {f"{name}.{key}": tensor for name, kept in states.items() for key, tensor in kept.items()}
            copies = [{n: held(t).to("cpu", copy=True) for n, t in kind.items()} for kind in (self.weights, moments)]
            state = {"step": step, "config": config.given, "model": copies[0], "optimizer": copies[1]}
            if dist.get_rank() == 0:
                state |= {"tokenizer": self.meta["tokenizer"], "data": shard_hashes(self.meta, "train")}
            place = dist.get_rank(), config.shard, self.mark
            part = self.thread.submit(write_part, Path(config.out), step, state, *place)
        else:  # it has a copy of what another rank writes
            part = self.thread.submit(lambda: None)
        self.pending = part, step, best_loss
        self.log.record(step=step, save_stall=time.monotonic() - start)

    def best_on_disk(self) -> float:
        return from_rank_0(read_best(Path(self.config.out)).get("val_loss", math.inf))

    def is_writing(self) -> bool:
        return self.pending is not None and not self.pending[0].done()

    def commit(self) -> str | None:
        """Make the pending checkpoint valid, if there is one; no rank is still writing. Returns what went wrong, if
        anything."""
        if self.pending is None:
            return None
        (part, step, best_loss), self.pending, run = self.pending, None, Path(self.config.out)
        error = part.exception()
        problem = error and (str(error) or type(error).__name__)
        written = None if problem else part.result()
        parts, problems = zip(*from_all_ranks((written, problem)))
        problem, is_valid = next(filter(None, problems), None), False
        if problem is None and dist.get_rank() == 0:
            try:
                for named in parts[: self.config.shard]:
                    if not (run / named["file"]).exists():
                        raise OSError(f"rank 0 does not see {named['file']}: all nodes must share the folder of --out")
                commit(run, step, parts[: self.config.shard], self.config.keep, best_loss)
            except OSError as error:
                problem = str(error)
            is_valid = (run / f"step-{step:08d}.json").exists()
        problem, is_valid = from_rank_0((problem, is_valid))
        if written and not is_valid:
            (run / written["file"]).unlink()
        if problem is None:
            return None
        self.best_loss = self.best_on_disk()
        return f"cannot save in {run} ({problem})"

    def wait(self) -> str | None:
        """Wait on all ranks until the pending checkpoint is valid. Returns what went wrong, if anything."""
        while any(any_rank(self.is_writing())):  # one long wait could reach --timeout
            futures.wait([self.pending[0]], timeout=0.1)
        return self.commit()


def read_best(run: Path) -> dict:
    """The contents of best.json, or {} if there is none. clear_folder has made sure that it is whole."""
    return json.loads(path.read_text(encoding="utf-8")) if (path := run / "best.json").exists() else {}


def clear_folder(run: Path, step: int, best_is_damaged: bool) -> None:
    """Remove from a run's folder, before it goes on from `step`, what processes that were killed have left. Damaged
    checkpoints that were skipped get another name, until the next one is whole."""
    if best_is_damaged:
        (run / "best.json").unlink(missing_ok=True)  # so that the next evaluation counts as the best
    named = set()
    for record in run.glob(f"{CHECKPOINT}.json"):
        try:
            named |= {file["file"] for file in files_of(record)}
        except (ValueError, KeyError, TypeError, AttributeError):  # damaged: it may have named any file of its step
            named |= {path.name for path in run.glob(f"{record.stem}*.pt")}
    for path in run.glob(f"{CHECKPOINT}.*"):
        if path.suffix == ".partial" or (path.suffix == ".pt" and path.name not in named):
            path.unlink()
        elif path.suffix in (".pt", ".json") and int(path.name[5:13]) > step:
            path.rename(f"{path}.damaged")


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def files_of(record: Path) -> list[dict]:
    """What a checkpoint's JSON says of its files. Can raise any exception."""
    named = json.loads(record.read_text(encoding="utf-8"))
    return named["parts"] if "parts" in named else [named]  # older ones have one file


def open_part(path: Path) -> dict:
    """A file of tensors, such as a part of a checkpoint. They are memory-mapped: they take memory only where used."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def damage(record: Path, first: int = 0, every: int = 1, known: Iterable[dict] = ()) -> str | None:
    """What is wrong with a checkpoint, or None. Reads some of its files: those number `first`, `first + every`, ...
    What its JSON says of a file may be `known` from another one that is whole."""
    try:
        for number, named in list(enumerate(files_of(record)))[first::every]:
            if named in known:
                continue
            path = record.with_name(Path(named["file"]).name)
            if not path.exists():
                return f"it names {path.name}, which is not beside it: give its files their own names again"
            if sha256_of(path) != named["sha256"]:
                return f"{path.name} does not match its SHA-256"
            if missing := {"model", "optimizer", *(HEAD if number == 0 else ())} - open_part(path).keys():
                return f"{path.name} lacks {', '.join(sorted(missing))}"
    except Exception as error:  # noqa: BLE001 - a damaged file can fail in any way
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def tensors_of(record: Path) -> dict[str, Tensors]:
    """The weights ("model") and the optimizer state of a checkpoint. Its files are opened when they are needed."""
    parts = [cache(partial(open_part, record.with_name(Path(named["file"]).name))) for named in files_of(record)]
    return {kind: Tensors(kind, parts) for kind in ("model", "optimizer")}


def read_checkpoint(record: Path) -> dict:
    """The state of a checkpoint, of which damage() has made sure that it is whole: its step, config, tokenizer, hashes
    of the data, and tensors."""
    tensors = tensors_of(record)
    first = tensors["model"].parts[0]()
    config = first["config"] | first["config"].get("model", {})  # older ones nest the settings of the model
    config.pop("model", None)
    return {**{name: first[name] for name in HEAD}, "config": config, **tensors}


def is_whole(record: Path, known: Iterable[dict] = ()) -> bool:
    """Whether a checkpoint is whole, of which each rank reads some files. Rank 0 names a damaged one."""
    problems = from_all_ranks(damage(record, dist.get_rank(), dist.get_world_size(), known))
    if any(problems) and dist.get_rank() == 0:
        print(f"damaged: {record} ({next(filter(None, problems))})", file=sys.stderr)
    return not any(problems)


def newest_whole(run: Path) -> Path:
    """The JSON of the newest checkpoint of a run that is whole."""
    for record in from_rank_0(sorted(run.glob(f"{CHECKPOINT}.json"), reverse=True)):
        if is_whole(record):
            return record
    stop_all_ranks(f"there is no intact checkpoint left in {run}")


def restore_optimizers(model: nn.Module, optimizers: list[torch.optim.Optimizer], state: dict | None) -> None:
    """Load the optimizer state of a checkpoint. Hyperparameters stay those of the command line."""
    parameters = dict(model.named_parameters())
    states = optimizer_states(parameters, optimizers)
    saved = state["optimizer"].part(0) if state and dist.get_rank() == 0 else {}
    for name, ndim in from_rank_0([(name, tensor.ndim) for name, tensor in saved.items()]):
        parameter_name, _, key = name.rpartition(".")
        parameter = parameters[parameter_name]
        moment = torch.zeros_like(parameter) if ndim else torch.zeros((), device=parameter.device)  # AdamW's count
        fill(moment, partial(state["optimizer"].rows, name, n=len(parameter)))
        states[parameter_name][key] = moment


def written_at(paths: Iterable[Path]) -> dict[Path, int]:
    """When each of these files was written, without those that do not exist, or no longer."""
    times = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            times[path] = path.stat().st_mtime_ns
    return times


def load_checkpoint(path: str | Path) -> tuple[dict, Path]:
    """The state of a checkpoint (named by its JSON or by a file of tensors), or of the newest whole one in a run's
    folder, and the path of its JSON. Names each damaged one that it skips. Raises ValueError if none is left."""
    path = Path(path)
    json_name = re.sub(r"(\.\d+-of-\d+\.\w+)?\.\w+$", ".json", path.name)
    paths = [path.with_name(json_name)] if path.is_file() else sorted(path.glob(f"{CHECKPOINT}.json"), reverse=True)
    records = written_at(paths)
    if not records and path.is_file():
        raise ValueError(f"{json_name} is not beside {path}: a checkpoint consists of both files")
    if not records:
        raise ValueError(f"there is no checkpoint in {path}: make one with {command('train.py')}")
    for record in records:
        if (problem := damage(record)) is None:
            return read_checkpoint(record), record
        if written_at(paths) != records:
            return load_checkpoint(path)  # a run that goes on has replaced it: look again
        print(f"damaged: {record} ({problem})", file=sys.stderr)
    raise ValueError(f"there is no intact checkpoint left in {path}")


def newest_run() -> Path:
    """The folder in runs/ with the newest checkpoint. Raises ValueError if there is none."""
    records = written_at(Path("runs").glob(f"*/{CHECKPOINT}.json"))
    if not records:
        raise ValueError(f"there is no checkpoint in runs/ yet: make one with {command('train.py')}")
    return max(records, key=records.get).parent
