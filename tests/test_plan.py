"""The plan of a run, against published runs: what they were and what their authors measured."""

import json
import math
import re
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import MACHINE, ROOT, TINY, rows

import plan
import train
from checkpoint import load_checkpoint
from model import GPT, GPT2, PRESETS

MEGASCALE = {**GPT2, "vocab_size": 51200, "seq_len": 2048, "n_layer": 96, "n_head": 96, "n_embd": 12288}
SHAPES = {**PRESETS, "megascale-175b": MEGASCALE}
RUNS = [  # shape, tokens in a step, device, number, published utilisation, published tokens per second
    ("gpt2", 524_288, "H100", 8, 0.40, 3.74e6),  # llm.c, 140 ms a step
    ("gpt2", 491_520, "A100", 8, 0.29, 295e9 / (4 * 86400)),  # nanoGPT, about four days
    ("llama3-405b", 2048 * 8192, "H100", 16384, 400 / 989, 2.50e6),  # Llama 3's paper, 400 TFLOP/s each
    ("megascale-175b", 6144 * 2048, "A100", 12288, 0.552, 1.984e6),
    ("megascale-175b", 6144 * 2048, "A100", 3072, 0.591, 6144 * 2048 / 23.66),
    ("megascale-175b", 768 * 2048, "A100", 256, 0.653, 768 * 2048 / 32.0),
    ("llama3-8b", 8 * 8192, "H100", 8, 0.390, 8 * 6667),  # TorchTitan, FSDP2 and compile
    ("llama3-70b", 64 * 8192, "A100", 64, 0.517, 64 * 331),  # TorchTitan, FSDP2 and recomputation
]


@pytest.mark.parametrize("shape, batch_tokens, device, n, mfu, speed", RUNS)
def test_published_utilisation_and_published_speed_agree(shape, batch_tokens, device, n, mfu, speed):
    config = train.Config(**SHAPES[shape], micro_batch=1, batch_tokens=batch_tokens)
    with torch.device("meta"):
        model = GPT(config)
    seconds = plan.compute_seconds(model, config, device, n, mfu)
    assert batch_tokens / seconds == pytest.approx(speed, rel=0.03)
    utilisation = model.flops_per_token() * speed / (n * train.ACCELERATORS[device].flops)
    assert utilisation == pytest.approx(mfu, abs=0.01)


def test_the_law_is_the_published_fit_and_least_at_the_tokens_that_are_called_optimal():
    """At 10^10 parameters and tokens: 10^3.478 and 10^3.658 are 3006.08 and 4549.88."""
    assert plan.predicted_loss(1e10, 1e10) == pytest.approx(1.8172 + 482.01 / 3006.08 + 2085.43 / 4549.88, abs=1e-5)
    tokens = plan.optimal_tokens(n := 8e9)
    losses = [plan.predicted_loss(n * factor, tokens / factor) for factor in (0.99, 1.0, 1.01)]
    assert losses[1] < min(losses[0], losses[2]) and 15 < tokens / n < 25


def plan_of(call, capsys, flags: str) -> str:
    call(plan, *flags.split())
    return capsys.readouterr().out


def figures(printed: str) -> dict[str, list[float]]:
    """The numbers in each line of a plan, durations in seconds, under the line's first word."""
    lines = {line.split()[0]: line for line in printed.replace(",", "").splitlines()}
    places = r"(?:(?:(\d+):)?(\d+):)?\b(\d+(?:\.\d+)?(?:e[+-]\d+)?)"
    found = {name: re.findall(places, line) for name, line in lines.items()}
    return {name: [3600 * float(h or 0) + 60 * float(m or 0) + float(s) for h, m, s in found[name]] for name in found}


# Four layers of Llama-3 8B, by hand, in units of 10^9: parameters of an expert, of a block, outside of blocks, and of
# all; those in the blocks' matrices; FLOP per token; seconds of a step of 524,288 tokens on eight H100s; bytes.
EXPERT, BLOCK, OUTSIDE, N, MATRICES = 0.176161, 0.218112, 1.050677, 4 * 0.218112 + 1.050677, 4 * 0.218104
FLOP = 6 * (MATRICES + 128256 * 4096e-9) + 12 * 4 * 4096 * 8192e-9
STEP = FLOP * 524_288 / 8 / 395.6e3
MUON = 5 * (10 * 4096**3 + 8 * 14336 * 4096**2 + 4 * 4096 * 1024**2 + 2 * 1024**3)  # FLOP of a matrix of each shape
MUON /= 395.6e12  # seconds
OPTIMIZER = 4 * MATRICES + 8 * (N - MATRICES)  # Muon has one number for each parameter, AdamW two
KEPT = 8192e-9 * 2 * 4 * (4 * 14336 + 2 * 3 * 4096 + 3 * 4096 + 3 * 1024)  # MLP; norms; queries, output; keys, values
CAP = 8192e-9 * 4 * 32 * 8192 * (2 + 4 + 2)  # of each score: tanh, softmax in float32, its copy
PART = 2**28 * 1e-9  # logits that exist at a time
LOGITS = PART * (2 + 4 + 4) + 128256 * 4096e-9 * 4  # in bfloat16; softmax, gradient, and the head's gradient in float32
GATHERED, SCATTERED = 2 * 2 * N * 7 / 8 / 450, 4 * N * 7 / 8 / 450  # seconds in a group of eight, for a micro-batch
SHARED = GATHERED + SCATTERED + N * 7 / 8 / 50 + 3.5e-4  # then averaged over eight nodes, whose ranks share a port
UPDATES = 2 * 2 * (4096**2 * 1.25e-9 + 2 * 14336 * 4096e-9) * 7 / 8 / 450 + 2 * MATRICES / 8 / 50 + 17.5e-5  # 4 shapes
SHORT = 2 * (GATHERED + SCATTERED + 2.1e-4) + 2 * (N / 2 * 63 / 64 / 50 + 63e-5)  # of two micro-batches
LLAMA = "--preset llama3-8b --n_layer 4 --gpus "


@pytest.mark.parametrize("flags, line, numbers", [  # number of GPUs, other flags; a line; its (last) numbers
    ("8", "model", [N * 1e9, N * 1e9, FLOP * 1e9]),
    ("8 --n_expert 8", "model", [(N + 28 * EXPERT) * 1e9, (N + 4 * EXPERT) * 1e9, (FLOP + 24 * EXPERT) * 1e9]),
    ("8 --tokens 1e9", "tokens", [1908 * 524_288, 1908, 4.23e10]),
    ("8 --n_expert 8 --steps 50", "tokens", [50 * 524_288, 50, 5.69e10]),
    ("8 --n_expert 8 --tokens 1e12", "loss", [1.8172 + 482.01 / 2.628e9**0.3478 + 2085.43 / 1e12**0.3658]),
    ("8", "compute", [FLOP * 1e9 * 20_000 * 524_288, STEP + MUON]),
    ("8 --recompute", "compute", [STEP * 4 / 3 + MUON]),
    ("16 --gpu a100 --mfu 0.25", "compute", [STEP * 395.6 / 156 + MUON * 395.6 / 78]),
    ("200 --preset gpt2 --n_layer 12 --optimizer adamw", "network", [6.456e-3, 2.881e-3]),  # all but 25 MiB overlap
    ("64 --shard 8 --optimizer adamw", "network", [SHARED, 0]),
    ("64 --shard 8 --optimizer adamw --dtype float32", "network", [SHARED + GATHERED, 0]),
    ("64 --shard 8", "network", [SHARED + UPDATES, UPDATES]),
    ("16 --shard 16 --optimizer adamw", "network", [4 * (8 * N * 15 / 16 / 400 + 4.5e-4), 0]),
    ("512 --shard 8 --seq_len 512 --optimizer adamw", "network", [SHORT, SHORT - 0.02197]),  # seconds of compute
    ("512 --shard 8 --seq_len 512 --optimizer adamw", "time", [SHORT, 524_288 / SHORT, 2e4 * SHORT, 2844 * SHORT]),
    ("8 --optimizer adamw --steps 1000000", "time", [STEP, 524_288 / STEP, STEP * 1e6 / 86400, STEP * 1e6 / 3600 * 8]),
    ("8", "memory", [6 * N + 4 * N + OPTIMIZER + KEPT + LOGITS, 80, 6 * N, 4 * N, OPTIMIZER, KEPT, LOGITS]),
    ("8 --optimizer adamw", "memory", [8 * N, KEPT, LOGITS]),
    ("8 --recompute --attention_cap 9 --micro_batch 2", "memory", [1.074 + (KEPT + CAP) / 2 - LOGITS, LOGITS]),
    ("8 --dtype float32", "memory",
     [4 * N, 4 * N, OPTIMIZER, 2 * KEPT - 8192e-9 * 4 * 4 * 2 * 4096, LOGITS + 2 * PART]),
    ("8 --shard 8", "memory",
     [N / 2 + 4 * BLOCK + 6 * OUTSIDE, N / 2 + 6 * BLOCK + 4 * OUTSIDE, OPTIMIZER / 8, KEPT, LOGITS]),
])
def test_the_figures_of_a_plan_are_those_counted_by_hand(call, capsys, flags, line, numbers):
    seen = figures(plan_of(call, capsys, LLAMA + flags))[line]
    assert seen[-len(numbers) :] == pytest.approx(numbers, rel=0.01)


@pytest.mark.parametrize("kind", ["a100 312 80 300", "h100 989 80 450", "h200 989 141 450", "b200 2250 192 900"])
def test_a_gpu_has_its_published_figures(call, capsys, kind):
    """And eight average their gradients: 2 n (g - 1) / g bytes leave each one."""
    gpu, peak, memory, link = kind.split()
    seen = figures(plan_of(call, capsys, f"{LLAMA} 8 --optimizer adamw --mfu 1 --gpu {gpu}"))
    assert seen["machine"] == [8, float(peak), 100] and seen["memory"][1] == float(memory)
    assert seen["network"][0] == pytest.approx(2 * 4 * N * 7 / 8 / float(link) + 1.4e-4, rel=0.01)


def test_meta_s_run_is_planned_at_meta_s_pace(call, capsys):
    """With 16 times as many tokens in a step, to hide the network, which Meta shared out in more ways than this program
    knows. Published: 30.84 million GPU-hours, of which over 90% were training, and 419 unexpected interruptions in 54
    days."""
    flags = f"--preset llama3-405b --gpus 16384 --mfu {400 / 989} --batch_tokens {16 * 2048 * 8192} --tokens 15.6e12"
    seen = figures(plan_of(call, capsys, f"{flags} --shard 128"))
    assert 0.9 * 30.84e6 < seen["time"][3] < 30.84e6
    assert seen["failures"][0] == pytest.approx(419 / 54, rel=0.01)


@pytest.mark.parametrize("shard", [1, 8])
def test_checkpoints_are_saved_as_often_as_loses_the_least_time(call, capsys, shard):
    """By trying: copying at 20 GB/s takes time, and a failure costs ten minutes and half of an interval. Writing takes
    a second per GB."""
    seen, state = figures(plan_of(call, capsys, f"{LLAMA} 16384 --shard {shard}")), 4 * N + OPTIMIZER
    lost = {t: state / shard / 20 / t + 16384 * 4.74e-4 / 86400 * (600 + t / 2) for t in range(10, 3600)}
    best = min(lost, key=lost.get)
    parts = [shard] if shard > 1 else []
    assert seen["save"] == pytest.approx([state, *parts, best, best / seen["time"][0]], rel=0.02)
    assert seen["failures"] == pytest.approx([7.8, 600, 100 * lost[best]], rel=0.01)
    seen = figures(plan_of(call, capsys, f"{LLAMA} {2**24} --shard {shard}"))
    assert seen["save"][-2] == pytest.approx(state / shard, abs=0.5)  # no more often than it can be written


@pytest.mark.parametrize("flags, beyond, within, told", [
    ("8 --micro_batch 7 --batch_tokens 458752", "", "--shard 2", "it does not fit: use --shard 2"),
    ("8 --micro_batch 10 --batch_tokens 655360", "", "--recompute",
     "fit: it takes 85 GB with any --shard; with --recompute 47 GB less"),
    ("48", "", "--gpus 32", "48 processes cannot share 64 micro-batches"),
    ("64 --shard 8 --seq_len 512 --optimizer adamw", "--micro_batch 5 --batch_tokens 163840",
     "--micro_batch 6 --batch_tokens 196608", "2,560 tokens per GPU and step do not hide the traffic; about 2,9"),
    ("128", "", "--gpus 64", "data parallelism ends here"),
    ("8 --preset gpt2 --n_layer 12 --tokens 1e10", "--batch_tokens 1064960", "--batch_tokens 1048576",
     "above the critical size, about 1,04"),
    ("25600", "", "--gpus 25100", "failures take 10%"),
    ("8 --vocab_size", "1847000", "1846000", "extrapolated above 16B"),
    ("7", "", "--gpus 8", "warning"),
])
def test_what_speaks_against_a_run_is_said_from_a_threshold_on(call, capsys, flags, beyond, within, told):
    seen = [plan_of(call, capsys, f"{LLAMA} {flags} {more}") for more in (beyond, within)]
    assert told in seen[0] and told not in seen[1]


@pytest.mark.parametrize("flags, told", [
    ("--gpus 0", "--gpus 0"), ("--resume", "unrecognized arguments: --resume"), ("--gpus 8 --mfu 0", "--mfu 0.0"),
    ("--gpus 3 --shard 2", "--gpus 3 is not a multiple of --shard 2"), ("--gpus 8 --mfu 1.5", "--mfu 1.5"),
    ("--gpus 8 --tokens nan", "--tokens nan"), ("--gpus 8 --tokens inf", "--tokens inf"), ("--tokens 0", "--tokens 0"),
    ("--gpus 8 --epochs 1", "data/gpt2, which is missing: give --steps or --tokens"),
    ("--gpus 8 --preset toy", "data/stdlib is missing: give --vocab_size"),
])
def test_a_plan_for_nothing_is_refused(refused, flags, told):
    assert told in refused(plan, "--preset", "gpt2", *flags.split())


def test_epochs_are_counted_in_the_data_set_which_runs_out_after_four(call, capsys, data):
    n_tokens = json.loads((Path(data) / "meta.json").read_text())["train"]["tokens"]
    Path("c.json").write_text(json.dumps({"data": str(data), "batch_tokens": 1024}))
    printed = plan_of(call, capsys, "--config c.json --gpus 1 --epochs 3.9")
    assert figures(printed)["tokens"][1] == (steps := math.ceil(3.9 * n_tokens / 1024)) and "runs out" not in printed
    assert figures(printed)["data"] == pytest.approx([n_tokens, steps * 1024 / n_tokens], rel=0.01)
    assert "the data runs out" in plan_of(call, capsys, "--config c.json --gpus 1 --epochs 4.1")


def test_the_readme_shows_what_the_plan_prints(call, capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    flags, shown = re.search(r"\n\$ python \w+\.py (.* --gpus .*)\n((?:.*\n)+?)\.\.\.\n", readme).groups()
    assert set(shown.splitlines()) <= set(plan_of(call, capsys, flags).splitlines())
    flags, *told = re.search(r"`(--preset grok-1 .*?)`.*? ([\d.]+) of 80 GB .*? ([\d.]+)% of the time", readme).groups()
    seen = figures(plan_of(call, capsys, flags))
    assert [seen["memory"][0], seen["failures"][2]] == [float(number) for number in told]


def test_a_plan_for_this_machine_leaves_no_trace_and_comes_close(call, capsys, data, tmp_path):
    """Seconds within wide bounds, since the machine may be busy; the memory of a tiny model is that of the program."""
    resource = pytest.importorskip("resource")
    flags = f"{' '.join(TINY)} --data {data} --batch_tokens 2048 --micro_batch 128 --epochs 2 --log_every 1"
    seen = figures(plan_of(call, capsys, f"{flags} --device cpu"))
    assert not list(tmp_path.iterdir())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    assert seen["memory"][0] == pytest.approx(peak / 1e9, rel=0.1)
    call(train, *flags.split(), "--out", "r")
    speeds = rows(tmp_path / "r", "tokens_per_second")
    assert seen["time"][1] == max(speeds)
    assert 1 / 4 < seen["time"][2] * statistics.median(speeds.values()) / 2048 < 4


@pytest.mark.parametrize("more, evaluated", [("", 2), ("--init run --eval_tokens 600", 1800)])
def test_the_plan_of_a_run_here_adds_its_parts_up(call, capsys, data, run, monkeypatch, more, evaluated):
    """At 20 tokens/s."""
    monkeypatch.setattr(plan, "step_here", lambda model, data, config, machine: (config.batch_tokens / 20, config))
    n_val = json.loads((Path(data) / "meta.json").read_text())["val"]["tokens"]
    flags = f"--data {data} --device cpu --dtype float32 --batch_tokens 16384 --tokens 65000 --eval_every 3 {more}"
    seen = figures(plan_of(call, capsys, flags))
    seconds = evaluated * (n_val if evaluated < 4 else 1) / 20 / 3
    assert seen["plan"] == [1] and seen["tokens"][0] == pytest.approx(65536, rel=0.01)
    assert seen["time"] == pytest.approx([65536 / 20 + seconds, 4, 16384 / 20, seconds], abs=1)
    total, *parts = seen["memory"]  # weights, gradients, optimizer, ..., program, checkpoint
    assert [total, parts[-1]] == pytest.approx([sum(parts), parts[0] + parts[2]], abs=0.03)


@pytest.mark.parametrize("slow, measured", [(0.01, [1, 1, 2, 4, 8]), (0.3, [1, 1, 2, 4]), (5, [1])])
def test_a_plan_measures_rows_until_they_take_a_second(alone, monkeypatch, slow, measured):
    """Each of a step's 64 rows takes `slow` seconds, and the optimizers 3."""
    now, config = [0.0], train.Config(vocab_size=50, seq_len=16, batch_tokens=64 * 16)

    def passing(seconds):
        now.append(now[-1] + seconds)
        return torch.zeros(())

    monkeypatch.setattr(plan, "time", SimpleNamespace(perf_counter=lambda: now[-1]))
    monkeypatch.setattr(train, "backward", lambda _, data, config, *more: passing(slow * config.batch_tokens / 16))
    monkeypatch.setattr(train, "make_optimizers", lambda *_: [SimpleNamespace(step=lambda: passing(3))])
    seconds, last = plan.step_here(GPT(config), None, config, MACHINE)
    assert seconds == pytest.approx(64 * slow + 3) and last.micro_batch == measured[-1]
    assert np.diff(now)[::2] == pytest.approx([slow * rows for rows in measured])


@pytest.mark.parametrize("changes", [
    {}, {"n_kv_head": 2, "qk_norm": False}, {"attention_cap": 30.0, "head_dim": 16},
    PRESETS["grok-toy"], {**PRESETS["gpt2"], "n_layer": 2},
])
def test_activations_are_counted_as_autograd_keeps_them(changes):
    """Against the bytes that a forward pass saves for the backward pass, in float32."""
    sizes = {"vocab_size": 64, "seq_len": 128, "micro_batch": 8, "n_embd": 256, "n_head": 4}
    config = train.Config(**{"dtype": "float32", **changes, **sizes})
    model, saved = GPT(config), {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        logits = model(torch.randint(64, (8, 128)))
    assert logits.requires_grad
    for weight in model.parameters():
        saved.pop(weight.untyped_storage().data_ptr(), None)
    planned = plan.product_bytes(config) * 8 * 128 * plan.activations_per_token(config)
    assert planned == pytest.approx(sum(saved.values()), rel=0.2)


@pytest.mark.parametrize("how", [{"dtype": "float32"}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "shard": 4}])
def test_a_checkpoint_has_the_bytes_that_are_planned_however_it_is_trained(run, how):
    state, _ = load_checkpoint(run)
    tensors = [*state["model"].values(), *state["optimizer"].values()]
    written = sum(tensor.nbytes for tensor in tensors if tensor.ndim)  # AdamW also counts its steps
    config = train.build_config({**state["config"], **how})
    assert plan.checkpoint_bytes(GPT(config), config) == written
