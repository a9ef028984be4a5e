"""Estimate what a run will take before it starts: time, memory, network traffic, failures.

    python plan.py                                                       this machine, from measured micro-batches
    python plan.py --preset llama3-8b --gpus 8 --shard 8 --recompute     a cluster, from published figures

All settings of train.py are flags here too. Nothing else in the project needs this file.
"""

import contextlib
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

import train
from model import GPT, rows_at_once
from prepare import clock, fail, load_dataset, tolerate_streams
from train import ACCELERATORS, Config, muon_matrices

# Assumptions about clusters: nodes of eight GPUs with a 400 Gbit/s port each, and as many failures as Meta reported for
# the training of Llama 3.
NODE_GPUS, NODE_LINK = 8, 400e9  # bytes per second out of a node, all ports together
HOP_SECONDS = 10e-6  # latency of a message
FAILURES_PER_GPU_DAY, RESTART_SECONDS = 4.74e-4, 600.0
COPY_BYTES_PER_SECOND = 20e9  # from a GPU to main memory, for a checkpoint
WRITE_BYTES_PER_SECOND = 1e9  # from there to a disk, by one thread of each rank that also computes the SHA-256

# ---------------------------------------------------------------------------------------------------------------------
# Formulas


def predicted_loss(n_params: float, tokens: float) -> float:
    """Nats per token of web text (Hoffmann et al., 2022, with the fit corrected by Besiroglu et al. in 2404.10102)."""
    return 1.8172 + 482.01 / n_params**0.3478 + 2085.43 / tokens**0.3658


def optimal_tokens(n_params: float) -> float:
    """The number of tokens at which that loss needs the least compute, 6 x parameters x tokens."""
    return (0.3658 * 2085.43 / (0.3478 * 482.01) * n_params**0.3478) ** (1 / 0.3658)


def product_bytes(config: Config) -> int:
    """Size of a number in matrix products, and so in activations."""
    return 4 if config.dtype == "float32" else 2


def activations_per_token(config: Config) -> int:
    """Numbers that a forward pass keeps for the backward pass per token of a full sequence, without the logits."""
    c, wide = config, 4 // product_bytes(config)  # a number in float32 counts as `wide` numbers
    heads, kv_heads = c.n_head * c.head_dim, 2 * c.n_kv_head * c.head_dim
    norm = (wide + 1) * c.n_embd  # its input, in float32, and its output
    attention = norm + 2 * heads + kv_heads  # queries, keys, values, attention output
    attention += (c.qk_norm + (c.position == "rope")) * (heads + kv_heads // 2)  # queries and keys at each stage
    if c.attention_cap is not None:  # of the scores: tanh, softmax in float32, and its copy in bfloat16
        attention += 2 * wide * c.n_head * c.seq_len
    mlp = (4 if c.gated else 2) * c.n_inner  # gate, up, activation, product; or up, activation
    if c.n_expert:
        mlp = c.n_expert_active * (mlp + 3 * c.n_embd)  # gathered tokens, each expert's, and outputs before the gates
    return c.n_layer * (attention + norm + mlp + 2 * c.n_embd * c.post_norm)


def memory_parts(model: GPT, config: Config, shard: int) -> dict[str, float]:
    """Bytes on each device, by part."""
    n, tokens, size = model.n_params(), config.micro_batch * config.seq_len, product_bytes(config)
    matrices = sum(p.numel() for p in muon_matrices(model, config))
    block = sum(p.numel() for p in model.blocks[0].parameters())
    root = n - sum(p.numel() for p in model.blocks.parameters())
    autocast = size if config.dtype != "float32" else 0  # its copy of a weight
    copies, whole = autocast * n, 0  # in addition to the float32 weights and their gradients
    if shard > 1:  # two blocks are gathered in the run's dtype, and the root stays gathered in float32
        copies = 2 * size * block + (4 + autocast) * root
        whole = (4 + size) * block + 4 * root  # gradients of a block, before and in their reduction, and of the root
    activations = size * tokens * activations_per_token(config)
    rows, head = min(tokens, rows_at_once("cuda", config.vocab_size)), 4 * config.vocab_size * config.n_embd
    logits = (8 + size) * rows * config.vocab_size  # those of a part of the tokens, their softmax, their gradient
    logits = head + max(logits, head)  # the head's gradient is known before the backward pass, which scales a copy
    if config.recompute:  # the blocks' inputs, and what one block needs beyond the space of the logits, free by then
        activations = 4 * tokens * config.n_layer * config.n_embd + max(0, activations / config.n_layer - logits)
    return {
        "weights": 4 * n / shard + copies,
        "gradients": 4 * n / shard + whole,
        "optimizer": (4 * matrices + 8 * (n - matrices)) / shard,
        "activations": activations,
        "logits": logits,
    }


def checkpoint_bytes(model: GPT, config: Config) -> float:
    """Size of the weights and the whole optimizer state, however they are sharded."""
    return 4 * model.n_params() + memory_parts(model, config, shard=1)["optimizer"]


def compute_seconds(model: GPT, config: Config, gpu: str, gpus: int, mfu: float) -> float:
    """Seconds of computation per step at a share `mfu` of the published peak. A forward pass is a third of it, and
    recomputation makes another one."""
    passes = 4 / 3 if config.recompute else 1
    return passes * model.flops_per_token() * config.batch_tokens / (gpus * ACCELERATORS[gpu].flops * mfu)


def muon_seconds(model: GPT, config: Config, gpu: str, gpus: int, mfu: float) -> float:
    """Seconds in which the busiest rank orthogonalises its share of Muon's matrices, in five iterations."""
    flops = 0
    for shape, count in Counter(p.shape for p in muon_matrices(model, config)).items():
        short, long = sorted(shape)
        flops += math.ceil(count / gpus) * 5 * (4 * short**2 * long + 2 * short**3)
    return flops / (ACCELERATORS[gpu].flops * mfu)


def traffic_seconds(model: GPT, config: Config, gpus: int, link: float, compute: float) -> tuple[float, float]:
    """Seconds that a step's traffic takes on the slowest link, and how many of them do not overlap with `compute`
    seconds of computation. Weights and Muon's matrices travel in the run's dtype, gradients in float32."""
    shard, n, size = config.shard, model.n_params(), product_bytes(config)
    n_micro = max(1, config.batch_tokens / gpus / (config.micro_batch * config.seq_len))
    matrices = muon_matrices(model, config)
    muon_bytes = size * sum(p.numel() for p in matrices)
    busiest = size * sum(math.prod(s) * math.ceil(k / gpus) for s, k in Counter(p.shape for p in matrices).items())
    inside = link if shard <= NODE_GPUS else NODE_LINK
    across = link if gpus <= NODE_GPUS else NODE_LINK / min(shard, NODE_GPUS)  # the ranks of a node share its ports

    def ring(payload: float, members: int, width: float) -> float:  # an all-gather or a reduce-scatter
        return payload * (members - 1) / members / width + (members - 1) * HOP_SECONDS

    gathered = 2 * n_micro * ring(size * n, shard, inside)  # in forward and in backward
    averaged = n_micro * ring(4 * n, shard, inside) + 2 * ring(4 * n / shard, gpus // shard, across)
    updates = 2 * ring(busiest, shard, inside) if matrices else 0.0  # whole matrices to a rank, and back
    if gpus > shard:  # then the parts to all copies
        updates += muon_bytes / shard / across + len(matrices) / shard * HOP_SECONDS
    last_backward = compute * 2 / 3 / n_micro  # DDP averages in this one, all but the last bucket of 25 MiB
    overlap = compute if shard > 1 else last_backward * max(0.0, 1 - 25 * 2**20 / (4 * n))
    return gathered + averaged + updates, max(0.0, gathered + averaged - overlap) + updates


# ---------------------------------------------------------------------------------------------------------------------
# Plans


def cluster_plan(given: dict, gpu: str, gpus: int, mfu: float) -> Iterator[str]:
    """The plan of a run on a cluster, line by line, then warnings."""
    config = train.build_config(given)
    if gpus < 1 or gpus % config.shard:
        fail(f"--gpus {gpus} is not a multiple of --shard {config.shard}")
    meta = load_dataset(config.data, verify=False)[0] if Path(config.data, "meta.json").exists() else {}
    if config.epochs:
        if not meta:
            fail(f"the steps of --epochs follow from {config.data}, which is missing: give --steps or --tokens")
        config = config.changed(steps=math.ceil(config.epochs * meta["train"]["tokens"] / config.batch_tokens))
    config = config.changed(vocab_size=config.vocab_size or meta.get("vocab_size"))
    if config.vocab_size is None:
        fail(f"{config.preset} takes its vocabulary from its data set, but {config.data} is missing: give --vocab_size")
    with torch.device("meta"):
        model = GPT(config)

    device, shard, warnings = ACCELERATORS[gpu], config.shard, []
    n, active, flops = model.n_params(), model.n_active_params(), model.flops_per_token()
    yield f"plan for {config.preset}"
    yield f"machine    {gpus:,} x {gpu}, {device.flops * mfu / 1e12:,.0f} TFLOP/s each: {mfu:.0%} of the peak, assumed"
    yield f"model      {n:,} parameters, {active:,} active; {flops:,} FLOP per token"

    tokens = config.steps * config.batch_tokens
    loss, optimal = predicted_loss(active, tokens), optimal_tokens(active)
    critical = 2e8 / loss**4.76  # Kaplan et al., 2020
    yield f"tokens     {tokens:.3g} in {config.steps:,} steps; compute-optimal are {optimal:.3g}"
    beyond = ", extrapolated above 16B parameters" if active > 16e9 else ""
    yield f"loss       {loss:.2f} by the scaling law of dense models on web text{beyond}"
    if config.batch_tokens > critical:
        warnings.append(f"batches above the critical size, about {critical:,.0f} tokens at this loss, gain little")
    if meta and "data" in given:
        data_tokens = meta["train"]["tokens"]
        yield f"data       {data_tokens:,} tokens: {tokens / data_tokens:.2f} epochs"
        if tokens > 4 * data_tokens:  # Muennighoff et al., 2023
            warnings.append("the data runs out: after about four epochs, repeated text teaches little")

    compute = compute_seconds(model, config, gpu, gpus, mfu)
    traffic, waiting = traffic_seconds(model, config, gpus, device.link, compute)
    muon = muon_seconds(model, config, gpu, gpus, mfu)  # in which no gradient travels
    seconds = compute + muon + waiting
    days = config.steps * seconds / 86400
    yield f"compute    {flops * tokens:.3g} FLOP, {compute + muon:,.3g} s per step"
    yield f"network    {traffic:,.3g} s per step on the slowest link; {waiting:,.3g} s do not overlap with compute"
    speed = f"{seconds:,.3g} s per step, {config.batch_tokens / seconds:,.0f} tokens/s"
    duration = f"{days:,.1f} days" if days > 1 else clock(days * 86400)
    yield f"time       {speed}: {duration} without failures, {days * 24 * gpus:,.0f} GPU-hours"
    n_micro, per_gpu = config.batch_tokens // (config.micro_batch * config.seq_len), config.batch_tokens / gpus
    if n_micro % gpus:
        warnings.append(f"{gpus:,} processes cannot share {n_micro:,} micro-batches equally: train.py will refuse")
    if traffic > compute:
        enough = f"about {per_gpu * traffic / compute:,.0f} would"
        warnings.append(f"{per_gpu:,.0f} tokens per GPU and step do not hide the traffic; {enough}")
    if gpus > n_micro or traffic > compute:
        warnings.append("data parallelism ends here; larger clusters add tensor, pipeline and expert parallelism")

    parts = memory_parts(model, config, shard)
    used, listed = sum(parts.values()), ", ".join(f"{name} {size / 1e9:,.1f}" for name, size in parts.items())
    yield f"memory     {used / 1e9:,.1f} of {device.memory / 1e9:,.0f} GB per GPU: {listed}"
    if used > device.memory:
        needed = {s: sum(memory_parts(model, config, s).values()) for s in range(shard, gpus + 1) if gpus % s == 0}
        smallest = next((s for s, size in needed.items() if size <= device.memory), None)
        too_large = f"it takes {min(needed.values()) / 1e9:,.0f} GB with any --shard"
        if not config.recompute:
            kept = memory_parts(model, config.changed(recompute=True), shard)["activations"]
            too_large += f"; with --recompute {(parts['activations'] - kept) / 1e9:,.0f} GB less"
        warnings.append("it does not fit: " + (f"use --shard {smallest}" if smallest else too_large))

    failures, state = FAILURES_PER_GPU_DAY * gpus, checkpoint_bytes(model, config)
    between, part = 86400 / failures, state / shard  # of the first copy of the model, each rank saves a part
    stall = part / COPY_BYTES_PER_SECOND
    interval = max(math.sqrt(2 * stall * between), part / WRITE_BYTES_PER_SECOND)  # Young, 1974
    lost = min(1.0, stall / interval + interval / (2 * between) + RESTART_SECONDS / between)
    restarts = f"{failures:,.2g} per day with restarts of {clock(RESTART_SECONDS)}, assumed"
    yield f"failures   {restarts}: {lost:.1%} of the time is lost"
    in_parts = f" in {shard:,} parts" if shard > 1 else ""
    every = f"{clock(interval)}, --save_every {max(1, round(interval / seconds))}"
    yield f"save       {state / 1e9:,.1f} GB{in_parts} every {every}"
    if lost > 0.1:
        warnings.append(f"failures take {lost:.0%} of the time")
    yield from (f"warning    {warning}" for warning in warnings)


def step_here(model: GPT, data: train.Data, config: Config, machine: train.Machine) -> tuple[float, Config]:
    """Seconds of a step on this machine: those of its micro-batches and of the optimizers. The first measurement warms
    up. A CPU begins with one row and doubles them until they take a second. Also returns the last config measured."""
    parallel, optimizers = train.data_parallel(model, config), train.make_optimizers(model, config)
    doubled = [2**i for i in range(config.micro_batch.bit_length())]
    for rows in [1, *doubled] if machine.device.type == "cpu" else [config.micro_batch] * 3:
        small = config.changed(micro_batch=rows, batch_tokens=rows * dist.get_world_size() * config.seq_len)
        start = time.perf_counter()
        train.backward(parallel, data, small, machine, 0, lambda rows, what: rows).item()  # waits for the device
        middle = time.perf_counter()
        for optimizer in optimizers:
            optimizer.step()
        train.whole(model.norm.weight)[0].item()  # waits as well
        times = middle - start, time.perf_counter() - middle
        passes, updates = map(max, zip(*train.from_all_ranks(times)))  # of the slowest ranks
        if passes > 1:
            break
    return config.batch_tokens / small.batch_tokens * passes + updates, small


def local_plan(given: dict) -> None:
    """Print what the whole run will take on this machine, from a few micro-batches, without a folder for it."""
    given = {name: value for name, value in given.items() if name not in ("out", "stop_at")}
    config, _, state = train.open_run(given, resume=False)
    config, meta, train_data, _ = train.open_data(config)
    config, machine = train.choose_machine(config)
    model = train.build_model(config, machine, train.first_weights(config, meta, 0, state))
    seconds, measured = step_here(model, train_data, config, machine)
    evaluations = math.ceil(config.steps / config.eval_every) + bool(config.init)
    tokens = min(config.eval_tokens, meta["val"]["tokens"]) * evaluations
    evaluation = tokens / config.batch_tokens * seconds / 3  # a forward pass is a third of a step
    parts = memory_parts(model, config, config.shard)
    if config.device == "cpu" or not torch.accelerator.is_available():  # main memory holds more than the model
        with contextlib.suppress(ImportError):  # Windows has no such module
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            parts["program"] = max(0.0, peak - sum(memory_parts(model, measured, config.shard).values()))
        parts["checkpoint"] = checkpoint_bytes(model, config) / config.shard  # a copy, for the thread that writes it
    memory = ", ".join(f"{name} {size / 1e9:,.2f}" for name, size in parts.items())
    tokens, total = config.steps * config.batch_tokens, config.steps * seconds + evaluation
    print(f"plan for {config.preset} on this machine, processes: {dist.get_world_size()}, dtype: {config.dtype}")
    print(f"tokens   {tokens:.3g}; compute-optimal are {optimal_tokens(model.n_active_params()):.3g}, on web text")
    print(f"time     {clock(total)}: {config.steps:,} steps of {seconds:.3g} s, {clock(evaluation)} of evaluation")
    print(f"memory   {sum(parts.values()) / 1e9:,.2f} GB: {memory}")


def main() -> None:
    tolerate_streams()
    parser = train.make_parser(__doc__)
    add = parser.add_argument_group("planning").add_argument
    add("--gpus", type=int, metavar="INT", help="plan for a cluster with this number of GPUs")
    add("--gpu", choices=ACCELERATORS, type=str.upper, default="H100", help="their kind (%(default)s)")
    add("--mfu", type=float, metavar="FLOAT", default=0.4, help="share of their peak to assume (%(default)s)")
    add("--tokens", type=float, metavar="FLOAT", help="tokens to train on, instead of --steps")
    given = train.parse(parser)
    gpus, gpu, mfu, tokens = given.pop("gpus", None), given.pop("gpu"), given.pop("mfu"), given.pop("tokens", None)
    if not 0 < mfu <= 1:
        fail(f"--mfu {mfu} is not in (0, 1]")
    if tokens is not None:
        if not 1 <= tokens < 1e18:
            fail(f"--tokens {tokens} is not between 1 and 1e18")
        given |= {"steps": math.ceil(tokens / train.build_config(given).batch_tokens), "epochs": None}
    if gpus is None:
        train.launch(local_plan, given)
    else:
        print("\n".join(cluster_plan(given, gpu, gpus, mfu)))


if __name__ == "__main__":
    main()
