"""model.py: the arithmetic of a GPT, each claim against something computed in another way."""

import dataclasses
import math
from functools import partial
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model as models
import published
from model import GPT, GPTConfig, KVCache, NgramEmbedding, generate, rotary_angles, sample_next, to_int8

SHAPE = {"vocab_size": 61, "seq_len": 24, "n_layer": 2, "n_head": 4, "n_embd": 32}
KINDS = {
    "today": dict(SHAPE, n_kv_head=2),
    "ngrams": dict(SHAPE, ngram_rows=50),
    "tied": dict(SHAPE, tied=True, head_dim=6, n_inner=50, qkv_bias=True, rope_factor=8.0),
    "gpt2": {**models.PRESETS["gpt2"], **SHAPE},
    "mixtral": {**models.PRESETS["mixtral-8x7b"], **SHAPE, "n_kv_head": 2, "n_inner": 24},
    "grok": {**models.PRESETS["grok-1"], **SHAPE, "n_kv_head": 2, "n_inner": 24, "embedding_scale": 3.0},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind: str, std: float = 0.3) -> GPT:
    """A model with weights large enough for its outputs to differ clearly."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**KINDS[kind])).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    return model


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(1))


def test_rows_of_a_new_model_are_drawn_alike_in_any_parts_and_differ_from_all_others():
    rows = []
    for seed, name in [(1, "a.weight"), (1, "b.weight"), (2, "a.weight")]:
        draw = partial(models.initial_rows, GPTConfig(**SHAPE), name, torch.Size([300, 4]), seed=seed)
        rows += (whole := draw(range(300))).tolist()
        assert torch.equal(torch.cat([draw(range(5)), draw(range(5, 200)), draw(range(200, 300))]), whole)
    assert len(set(map(tuple, rows))) == 900


def test_each_switch_is_set_in_some_kind():
    """So that a new one can't be forgotten in what follows. Sizes and what only training knows are left out."""
    configs = [GPTConfig(**settings) for settings in KINDS.values()]
    names = {f.name for f in dataclasses.fields(GPTConfig) if not f.name.startswith("n_")}
    for name in names - {*published.ONLY_IN_TRAINING}:
        assert any(getattr(config, name) != getattr(GPTConfig, name) for config in configs), name


@every_kind
def test_cached_logits_equal_uncached_ones_up_to_the_last_position(kind):
    """So no token changes an earlier logit: the cache holds none of those that follow."""
    model, tokens = make(kind), random_tokens(2, 24)
    cache = KVCache(model.config, 2)
    parts = [model(part, cache=cache) for part in tokens.split([10, 1, 1, 5, 7], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(tokens, only_last=True), parts[-1][:, -1:], atol=1e-4, rtol=1e-4)
    for refuse in (lambda: model(random_tokens(1, 25)), lambda: model(tokens[:, :1], cache=cache)):
        with pytest.raises(ValueError, match="25 tokens is longer than seq_len 24"):
            refuse()


@every_kind
def test_greedy_text_is_the_same_without_a_cache_and_beyond_the_context(kind):
    model, tokens = make(kind), random_tokens(1, 10)
    cached = [ids.item() for ids in islice(generate(model, tokens, n_vocab=50, temperature=0), 40)]
    window, uncached = tokens, []
    for _ in range(40):
        if window.size(1) > 24:
            window = window[:, -12:]
        uncached.append(model(window)[0, -1, :50].argmax().item())
        window = torch.cat((window, torch.tensor([uncached[-1:]])), dim=1)
    assert cached == uncached


@every_kind
def test_int8_weights_compute_nearly_the_same_for_a_prompt_and_for_single_tokens(kind):
    model, tokens = make(kind), random_tokens(1, 24)
    exact, cache = model(tokens), KVCache(model.config, 1)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    to_int8(model)
    for name, layer in layers.items():
        if not (name.endswith("router") or layer.in_features % 16):
            int8, step = model.get_submodule(name), layer.weight.abs().amax(1, keepdim=True) / 126.5
            assert ((int8.weight.float() * int8.scale[:, None] - layer.weight).abs() <= step / 2).all()
    steps = torch.cat([model(token, cache=cache) for token in tokens.split(1, dim=1)], dim=1)
    for logits in (model(tokens), steps):
        assert 0 < (logits - exact).norm() / exact.norm() < 0.06


@every_kind
def test_a_new_model_guesses_uniformly_and_each_of_its_blocks_is_the_identity(kind):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**KINDS[kind], "vocab_size": 1000})).eval()
    tokens, targets = torch.randint(1000, (2, 8, 24))
    assert abs(model(tokens, targets).item() - math.log(1000)) < 0.1
    x, angles = torch.randn(1, 24, 32), rotary_angles(torch.arange(24)[None], model.config)
    for block in model.blocks:
        assert torch.equal(block(x, angles, None, None), x)


@every_kind
def test_one_batch_is_learned_by_heart(kind):
    torch.manual_seed(0)
    model, tokens = GPT(GPTConfig(**KINDS[kind])), random_tokens(2, 25)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2  # below 4.1 for a guess; the first token of a sequence alone can't be known for sure


@pytest.mark.parametrize("rows, training, dtype, tolerance", [
    (7, False, torch.float32, 1e-6), (100, True, torch.float32, 1e-6), (7, True, torch.bfloat16, 0.01),
])
@every_kind
def test_loss_and_gradients_are_those_of_the_mean_cross_entropy(kind, rows, training, dtype, tolerance, monkeypatch):
    """In training, with the routers' losses. However many tokens are taken at once; two thirds of the targets count."""
    monkeypatch.setattr(models, "rows_at_once", lambda *_: rows)
    model, tokens = make(kind, std=0.1).train(training), random_tokens(2, 24)
    counted = tokens % 3 > 0
    targets = torch.where(counted, tokens // 2, -100)
    logs = model(tokens).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    mean = training * sum(layer.router_loss for layer in model.expert_layers()) - logs[counted].mean()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        each, loss = model(tokens, targets, reduction="none"), model(tokens, targets)
    gradients = (torch.autograd.grad(0.5 * value, [*model.parameters()]) for value in (mean, loss))
    for a, b in ((torch.where(counted, -logs, 0.0), each), (mean, loss), *zip(*gradients)):
        assert (a - b).norm() <= tolerance * (a.norm() + 0.01)  # some gradients are zero but for rounding


RELEASED = {  # parameters, layers, channels of all keys in a layer, and active parameters where they are fewer
    "toy": (1_442_560, 2, 64), "gpt2": (124_439_808, 12, 768), "gpt2-medium": (354_823_168, 24, 1024),
    "gpt2-large": (774_030_080, 36, 1280), "gpt2-xl": (1_557_611_200, 48, 1600),
    "llama3-8b": (8_030_261_248, 32, 1024), "llama3-70b": (70_553_706_496, 80, 1024),
    "llama3-405b": (405_853_388_800, 126, 1024), "qwen3-0.6b": (596_049_920, 28, 1024),
    "qwen3-1.7b": (1_720_574_976, 28, 1024), "qwen3-4b": (4_022_468_096, 36, 1024),
    "qwen3-8b": (8_190_735_360, 36, 1024), "qwen3-14b": (14_768_307_200, 40, 1024),
    "qwen3-32b": (32_762_123_264, 64, 1024), "mixtral-8x7b": (46_702_792_704, 32, 1024, 12_879_925_248),
    "grok-1": (315_684_820_992, 64, 1024, 83_756_587_008), "llama3.2-1b": (1_235_814_400, 16, 512),
    "llama3.2-3b": (3_212_749_824, 28, 1024), "qwen2.5-0.5b": (494_032_768, 24, 128),
    "qwen2.5-1.5b": (1_543_714_304, 28, 256), "qwen2.5-7b": (7_615_616_512, 28, 512),
}


def test_a_published_model_has_as_many_parameters_as_its_authors_released(call, capsys):
    """And the cache and FLOPs that follow from its sizes, in the table that python model.py prints."""
    call(models)
    lines = [line.replace(",", "").split() for line in capsys.readouterr().out.splitlines()[1:-1]]
    table = {name: tuple(map(int, numbers)) for name, *numbers in lines}
    assert [*table] == [*models.PRESETS]
    for name, (total, n_layer, channels, *active) in RELEASED.items():  # keys and values of two bytes
        assert table[name][:2] + table[name][3:] == (total, *(active or [total]), 2 * 2 * n_layer * channels), name
    # 6 per active weight in a product, which are all but vectors and embeddings, and 12 per attended channel
    assert table["gpt2"][2] == 6 * (12 * 12 * 768**2 + 50257 * 768) + 12 * 12 * 768 * 1024
    assert table["qwen3-0.6b"][2] == 6 * (596_049_920 - 28 * 2 * (1024 + 128) - 1024) + 12 * 28 * 16 * 128 * 40960
    assert table["mixtral-8x7b"][2] == 6 * (12_879_925_248 - (32000 + 65) * 4096) + 12 * 32 * 4096 * 32768


GROK_LAYER = {"attn_norm_in": "attention_norm", "attn_norm_out": "attention_post_norm", "ffn_norm_in": "mlp_norm",
              "ffn_norm_out": "mlp_post_norm", "q": "attention.query", "k": "attention.key", "v": "attention.value",
              "o": "attention.out", "router": "mlp.router"}


def test_grok_computes_what_the_code_that_xai_released_computes_with_and_without_a_cache():
    golden = np.load(Path(__file__).with_name("golden") / "grok1_tiny_a.npz")
    sizes = {"vocab_size": 96, "seq_len": 24, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 64, "n_inner": 344}
    model = GPT(GPTConfig(**{**models.PRESETS["grok-1"], **sizes})).eval()

    def tensor(name):
        return torch.from_numpy(golden[name].astype(np.float32))

    state = {f"{name}.weight": tensor("embedding") for name in ("embedding", "head")}
    state["norm.weight"] = tensor("final_norm")
    for i in range(2):
        for theirs, ours in GROK_LAYER.items():
            state[f"blocks.{i}.{ours}.weight"] = tensor(f"layers.{i}.{theirs}").t()  # which leaves vectors as they are
        for e in range(8):
            for part in ("gate", "up", "down"):
                state[f"blocks.{i}.mlp.experts.{e}.{part}.weight"] = tensor(f"layers.{i}.expert_{part}")[e].T
    model.load_state_dict(state)
    tokens, cache = torch.from_numpy(golden["tokens"]).long(), KVCache(model.config, 2)
    parts = [model(part, cache=cache) for part in tokens.split([7, 1, 1, 15], dim=1)]
    for logits in (model(tokens), torch.cat(parts, dim=1)):
        assert (logits - tensor("logits")).abs().max() < 1e-4


@pytest.mark.parametrize("renormalise", [True, False])
def test_experts_equal_the_sum_over_all_experts_with_the_gates_of_the_unchosen_at_zero(renormalise):
    """And their losses equal the published formulas, also where products are in bfloat16."""
    torch.manual_seed(0)
    shape = dict(n_embd=16, n_inner=8, n_expert=6, n_expert_active=3, renormalise=renormalise)
    experts = models.Experts(GPTConfig(**shape, balance_loss=2.0, router_z_loss=0.5))
    x = torch.randn(2, 10, 16)
    logits = x @ experts.router.weight.T
    gates = probabilities = logits.softmax(-1)
    gates = gates * (gates >= gates.sort(descending=True).values[..., 2:3])
    if renormalise:
        gates = gates / gates.sum(-1, keepdim=True)
    expected = sum(gates[..., e, None] * expert(x) for e, expert in enumerate(experts.experts))
    torch.testing.assert_close(experts(x), expected)
    balance = 6 * ((gates > 0).sum((0, 1)) / 60 * probabilities.mean((0, 1))).sum()
    losses = 2.0 * balance + 0.5 * logits.exp().sum(-1).log().pow(2).mean()
    torch.testing.assert_close(experts.router_loss, losses)
    with torch.autocast("cpu", torch.bfloat16):  # which must not change what is chosen
        experts(x)
    torch.testing.assert_close(experts.router_loss, losses)


def test_the_work_of_experts_grows_with_the_visited_ones_only_and_all_have_gradients():
    """The unvisited ones of zero: data parallelism waits for every parameter's gradient."""
    experts, seen = models.Experts(GPTConfig(n_embd=16, n_inner=8, n_expert=64, n_expert_active=2)), []
    for expert in experts.experts:
        expert.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    experts(torch.randn(2, 10, 16)).sum().backward()
    assert sum(seen) == 2 * 10 * 2 and 0 in seen  # every visit is served, none twice
    torch.testing.assert_close(experts.load, torch.tensor(seen) / 40)
    assert all(p.grad is not None for p in experts.experts.parameters())


def test_ngram_embeddings_tell_the_last_three_tokens_and_nothing_else():
    """Table by table: the first tells the last two apart, both together the last three."""
    ngrams, tokens = NgramEmbedding(GPTConfig(**SHAPE, ngram_rows=10_000)), random_tokens(1, 100) % 3
    for table in ngrams.tables:
        torch.nn.init.normal_(table.weight)
    for n, tables in ((3, ngrams.tables), (2, ngrams.tables[:1])):
        ngrams.tables = tables
        added = ngrams(torch.zeros(1, 100, 32), tokens, torch.arange(100)[None])[0]
        seen = [tuple(tokens[0, max(0, t - n + 1) : t + 1].tolist()) for t in range(100)]
        for one, other in combinations(range(100), 2):
            assert torch.equal(added[one], added[other]) == (seen[one] == seen[other])


@pytest.mark.parametrize("cap", [None, 30.0])
def test_dropout_acts_on_embeddings_attention_weights_and_what_blocks_add_in_training_only(cap):
    """A quarter becomes zero, the rest grows by a third. Without it all would be 3, and what an MLP adds 30."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**KINDS["gpt2"], "dropout": 0.25, "attention_cap": cap}))
    (block, other), inputs = model.blocks, []
    block.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    model.embedding.weight.data.fill_(3.0)
    block.attention.value.weight.data.fill_(3 / 32)
    block.attention.out.weight.data.copy_(torch.eye(32))
    other.attention.forward = lambda x, *_: torch.full_like(x, 3.0)
    other.mlp.forward = lambda x: torch.full_like(x, 30.0)
    for training in (True, False):
        model.train(training)(random_tokens(200, 24))
        weights = block.attention(torch.ones(2000, 1, 32), None, None, None)  # a single token attends to itself alone
        added, once = other(torch.zeros(200, 24, 32), None, None, None), {0: 1 / 4, 4: 3 / 4}
        twice = {0: 1 / 16, 4: 3 / 16, 40: 3 / 16, 44: 9 / 16}
        for x, shares, kept in ((inputs.pop(), once, 3), (weights, once, 3), (added, twice, 33)):
            values, counts = x.round().unique(return_counts=True)
            found = dict(zip(values.tolist(), (counts / x.numel()).tolist()))
            assert found == pytest.approx(shares if training else {kept: 1}, abs=0.02)


@pytest.mark.parametrize("temperature, limit, possible, possible_of_another_row", [
    (0, {}, [3], [1]), (2, {}, [0, 1, 2, 3], [0, 1, 2, 3]), (1, {"top_k": 2}, [0, 3], [1, 2]),
    (1, {"top_k": 99}, [0, 1, 2, 3], [0, 1, 2, 3]), (1, {"top_p": 1.0}, [0, 1, 2, 3], [0, 1, 2, 3]),
    (1, {"top_p": 0.6}, [3], [1, 2]),  # 3 alone has 0.64; in the other row 1 and 2 have 0.70
    (1, {"top_p": 0.7}, [0, 3], [1, 2, 3]),
    (0.5, {"top_p": 0.7}, [3], [1, 2]),  # lower temperatures make 3 likelier: 0.86
])
def test_samples_follow_the_softmax_of_the_likeliest_alone(temperature, limit, possible, possible_of_another_row):
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0], [4.0, 9.0, 8.9, 8.8]])
    generator = torch.Generator().manual_seed(0)
    drawn = sample_next(logits.repeat(20_000, 1), temperature, **limit, generator=generator).view(20_000, 2)
    for row, ids in enumerate([possible, possible_of_another_row]):
        expected = F.softmax(logits[row, ids] / (temperature or 1), dim=0)
        assert drawn[:, row].unique().tolist() == ids
        torch.testing.assert_close(drawn[:, row].bincount()[ids] / 20_000, expected, atol=0.015, rtol=0)
