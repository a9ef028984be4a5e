"""The plan of a run, against published runs: what they were and what their authors measured."""

import json
import math
import re
import statistics
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import TINY, rows

import plan
import train
from model import GPT, PRESETS, load_checkpoint

# fmt: off
MEGASCALE = {
    "vocab_size": 51200, "seq_len": 2048, "n_layer": 96, "n_head": 96, "n_embd": 12288, "norm": "layer",
    "position": "learned", "qk_norm": False, "activation": "gelu", "gated": False, "bias": True, "tied": True,
}
PALM = {
    "vocab_size": 256000, "seq_len": 2048, "n_layer": 118, "n_head": 48, "n_kv_head": 1, "head_dim": 256,
    "n_embd": 18432, "n_inner": 73728, "tied": True, "qk_norm": False,
}
# fmt: on
SHAPES = {**PRESETS, "megascale-175b": MEGASCALE, "palm-540b": PALM}
RUNS = [  # shape, tokens in a step, device, number, published utilisation, published tokens per second
    ("gpt2", 524_288, "H100", 8, 0.40, 3.74e6),  # llm.c, 140 ms a step
    ("gpt2", 491_520, "A100", 8, 0.29, 295e9 / (4 * 86400)),  # nanoGPT, about four days
    ("llama3-405b", 2048 * 8192, "H100", 16384, 400 / 989, 2.50e6),  # Llama 3's paper, 400 TFLOP/s each
    ("megascale-175b", 6144 * 2048, "A100", 12288, 0.552, 1.984e6),
    ("megascale-175b", 6144 * 2048, "A100", 3072, 0.591, 6144 * 2048 / 23.66),
    ("megascale-175b", 768 * 2048, "A100", 256, 0.653, 768 * 2048 / 32.0),
    ("palm-540b", 2048 * 2048, "TPUv4", 6144, 0.462, 238.3e3),
    ("llama3-8b", 8 * 8192, "H100", 8, 0.390, 8 * 6667),  # TorchTitan, FSDP2 and compile
]


PRINTED: dict[tuple, str] = {}


@cache
def on_paper(shape: str, batch_tokens: int = 0) -> tuple[GPT, train.Config]:
    shape = SHAPES[shape]
    config = train.Config(**shape, micro_batch=1, batch_tokens=batch_tokens or shape["seq_len"])
    with torch.device("meta"):
        return GPT(config), config


@pytest.fixture(autouse=True)
def tpu(monkeypatch):
    monkeypatch.setitem(train.ACCELERATORS, "TPUv4", train.Accelerator(275e12, 32e9, 300e9))


@pytest.mark.parametrize("shape, batch_tokens, device, n, mfu, tokens_per_second", RUNS)
def test_published_utilisation_gives_the_published_speed_and_the_reverse(
    shape, batch_tokens, device, n, mfu, tokens_per_second
):
    model, config = on_paper(shape, batch_tokens)
    seconds = plan.compute_seconds(model, config, device, n, mfu)
    assert batch_tokens / seconds == pytest.approx(tokens_per_second, rel=0.03)
    utilisation = model.flops_per_token() * tokens_per_second / (n * train.ACCELERATORS[device].flops)
    assert utilisation == pytest.approx(mfu, abs=0.01)


def test_palm_has_as_many_parameters_as_its_authors_say():
    assert on_paper("palm-540b")[0].n_params() == pytest.approx(540.35e9, rel=1e-4)


def test_the_law_is_least_at_the_tokens_that_are_called_optimal():
    n = 8e9
    compute = n * (tokens := plan.optimal_tokens(n))
    losses = [plan.predicted_loss(n * factor, compute / (n * factor)) for factor in (0.95, 1.0, 1.05)]
    assert losses[1] < min(losses[0], losses[2]) and 15 < tokens / n < 25


def plan_of(call, capsys, *arguments) -> str:
    if arguments not in PRINTED:  # large models take a second
        capsys.readouterr()
        call(train, "--plan", *arguments)
        PRINTED[arguments] = capsys.readouterr().out
    return PRINTED[arguments]


def test_meta_s_run_is_planned_at_meta_s_pace(call, capsys):
    """Without the network, which Meta shared out in more ways than this program knows."""
    flags = ["--gpus", 16384, "--mfu", 400 / 989, "--batch_tokens", 2048 * 8192, "--tokens", 15.6e12, "--shard", 128]
    printed = plan_of(call, capsys, "--preset", "llama3-405b", *flags)
    seconds = float(re.search(r"FLOP, ([\d.]+) s per step", printed)[1])
    assert seconds == pytest.approx(6.7, rel=0.03)
    assert 186 == pytest.approx(24 * 60 / float(re.search(r"failures +([\d.]+)", printed)[1]), rel=0.01)


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--preset", "llama3-8b", "--gpus", 8, "--recompute"], "does not fit: use --shard 2"),
        (["--preset", "grok-1", "--gpus", 100_000, "--shard", 160], "cannot share 64 micro-batches"),
        (["--preset", "llama3-8b", "--gpus", 512, "--shard", 8, "--seq_len", 512], "do not hide the traffic"),
        (["--preset", "gpt2", "--gpus", 8, "--batch_tokens", 12_288_000, "--steps", 1000], "above the critical size"),
        (["--preset", "grok-1", "--gpus", 100_000, "--shard", 160], "failures take"),
    ],
)
def test_what_speaks_against_a_run_is_said(call, capsys, arguments, told):
    assert told in plan_of(call, capsys, *arguments)


def test_traffic_that_takes_longer_than_compute_is_waited_for(call, capsys):
    flags = ["--preset", "llama3-8b", "--gpus", 512, "--shard", 8, "--seq_len", 512]
    printed = plan_of(call, capsys, *flags)
    compute = float(re.search(r"FLOP, ([\d.]+) s per step", printed)[1])
    traffic, waiting = map(float, re.search(r"network +([\d.]+) s .*; ([\d.]+) s do not", printed).groups())
    total = float(re.search(r"time +([\d.]+) s per step", printed)[1])
    assert (
        traffic > compute
        and waiting >= traffic - compute - 0.01
        and total == pytest.approx(compute + waiting, rel=0.01)
    )


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--gpus", 0], "--gpus 0"),
        (["--resume"], "leave out --resume"),
        (["--gpus", 3, "--shard", 2], "--gpus 3 is not a multiple of --shard 2"),
        (["--gpus", 8, "--tokens", "nan"], "--tokens nan"),
        (["--gpus", 8, "--tokens", "inf"], "--tokens inf"),
        (["--gpus", 8, "--mfu", 0], "--mfu 0.0"),
    ],
)
def test_a_plan_for_nothing_is_refused(refused, arguments, told):
    assert told in refused(train, "--plan", "--preset", "gpt2", *arguments)


def test_a_sound_plan_has_no_warning(call, capsys):
    printed = plan_of(call, capsys, "--preset", "gpt2", "--gpus", 8, "--tokens", 10e9, "--mfu", 0.4)
    assert "warning" not in printed


def test_too_little_data_is_said(call, capsys, data):
    assert "the data runs out" in plan_of(call, capsys, "--gpus", 1, "--data", data, "--steps", 100)


def test_the_smallest_shard_that_fits_is_named(call, capsys):
    run = ["--preset", "llama3-8b", "--gpus", 8, "--recompute", "--shard"]
    fits = [shard for shard in (1, 2, 4, 8) if "does not fit" not in plan_of(call, capsys, *run, shard)]
    assert fits and f"use --shard {fits[0]}" in plan_of(call, capsys, *run, 1)


def test_epochs_are_counted_in_the_data_set(call, capsys, data):
    n_tokens = json.loads((Path(data) / "meta.json").read_text())["train"]["tokens"]
    printed = plan_of(call, capsys, "--data", data, "--gpus", 1, "--epochs", 3)
    assert f"in {math.ceil(3 * n_tokens / train.Config.batch_tokens):,} steps" in printed


def test_a_plan_for_this_machine_leaves_no_trace(call, capsys, data, tmp_path):
    printed = plan_of(call, capsys, "--data", data, "--seq_len", 16, "--batch_tokens", 256)
    assert re.search(r"time +\d+:\d\d", printed) and re.search(r"memory +[\d.]+ GB", printed)
    assert not list(tmp_path.glob("run*"))


def test_activations_are_counted_as_autograd_keeps_them():
    """Against the bytes that a forward pass saves for the backward pass, in float32."""
    for changes in (
        {},
        {"n_kv_head": 2, "qk_norm": False},
        {"attention_cap": 30.0, "head_dim": 16},
        dict(PRESETS["grok-toy"]),
        dict(PRESETS["gpt2"], n_layer=2),
    ):
        sizes = {"vocab_size": 64, "seq_len": 128, "micro_batch": 8, "n_embd": 256, "n_head": 4}
        config = train.Config(**{"dtype": "float32", **changes, **sizes})
        model, saved = GPT(config), {}
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(tensor, saved=saved, weights=weights):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            logits = model(torch.randint(64, (8, 128)))
        assert logits.requires_grad
        planned = plan.product_bytes(config) * 8 * 128 * plan.activations_per_token(config)
        assert planned == pytest.approx(sum(saved.values()), rel=0.2), changes


def test_seconds_planned_for_this_machine_are_about_those_taken(call, capsys, data, tmp_path):
    """With wide bounds, since the machine may be busy: a plan that were off by a batch or an epoch is off by more."""
    flags = [*TINY, "--data", data, "--batch_tokens", 2048, "--micro_batch", 128, "--steps", 12, "--log_every", 1]
    planned = float(re.search(r"12 steps of ([\d.e-]+) s", plan_of(call, capsys, *flags))[1])
    call(train, *flags, "--out", "r")
    taken = 2048 / statistics.median(rows(tmp_path / "r", "tokens_per_second").values())
    assert 1 / 4 < planned / taken < 4


@pytest.mark.parametrize("how", [{"dtype": "float32"}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "shard": 4}])
def test_a_checkpoint_has_the_bytes_that_are_planned_however_it_is_trained(run, how):
    state, _ = load_checkpoint(run)
    tensors = [*state["model"].values(), *state["optimizer"].values()]
    written = sum(tensor.nbytes for tensor in tensors if tensor.ndim)  # AdamW also counts its steps
    config = train.build_config({**state["config"], **how})
    assert plan.checkpoint_bytes(GPT(config), config) == written
