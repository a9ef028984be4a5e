"""model.py: the arithmetic of a GPT, each claim against something computed in another way."""

import dataclasses
import json
import math
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model as models
import published
from model import GPT, GPTConfig, KVCache, NgramEmbedding, generate, rotary_angles, rotate, sample_next, to_int8

SHAPE = {"vocab_size": 61, "seq_len": 24, "n_layer": 2, "n_head": 4, "n_embd": 32}
KINDS = {
    "today": dict(SHAPE, n_kv_head=2),
    "ngrams": dict(SHAPE, ngram_rows=50),
    "tied": dict(SHAPE, tied=True, head_dim=6, n_inner=50),
    "gpt2": {**models.PRESETS["gpt2"], **SHAPE},
    "mixtral": {**models.PRESETS["mixtral-8x7b"], **SHAPE, "n_kv_head": 2, "n_inner": 24},
    "grok": {**models.PRESETS["grok-1"], **SHAPE, "n_kv_head": 2, "n_inner": 24, "embedding_scale": 3.0},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind: str) -> GPT:
    """A model with weights large enough for its outputs to differ clearly."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**KINDS[kind])).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(1))


def test_each_switch_is_set_in_some_kind():
    """So that a new one can't be forgotten in what follows. Sizes and what only training knows are left out."""
    configs = [GPTConfig(**settings) for settings in KINDS.values()]
    names = {f.name for f in dataclasses.fields(GPTConfig) if not f.name.startswith("n_")}
    for name in names - {*published.ONLY_IN_TRAINING}:
        assert any(getattr(config, name) != getattr(GPTConfig, name) for config in configs), name


@every_kind
def test_a_later_token_changes_no_earlier_logit(kind):
    model, tokens = make(kind), random_tokens(1, 24)
    before = model(tokens)
    tokens[0, 15] += 1
    after = model(tokens)
    torch.testing.assert_close(before[:, :15], after[:, :15], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before[:, 15], after[:, 15], atol=1e-2)


@every_kind
def test_cached_logits_equal_uncached_ones(kind):
    model, tokens = make(kind), random_tokens(2, 24)
    cache = KVCache(model.config, 2)
    parts = [model(part, cache=cache) for part in tokens.split([10, 1, 1, 5, 7], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), atol=1e-4, rtol=1e-4)


def test_only_the_last_logits_are_those_of_the_last_token():
    model, tokens = make("today"), random_tokens(2, 24)
    torch.testing.assert_close(model(tokens, only_last=True), model(tokens)[:, -1:], atol=1e-5, rtol=1e-5)


@every_kind
def test_a_sequence_beyond_the_positions_is_refused(kind):
    model, tokens = make(kind), random_tokens(1, 20)
    cache = KVCache(model.config, 1)
    model(tokens, cache=cache)
    for refuse in (lambda: model(random_tokens(1, 25)), lambda: model(tokens[:, :5], cache=cache)):
        with pytest.raises(ValueError, match="25 tokens is longer than seq_len 24"):
            refuse()


@every_kind
def test_greedy_text_is_the_same_without_a_cache_and_beyond_the_context(kind):
    model, tokens = make(kind), random_tokens(1, 10)
    cached = [ids.item() for ids in islice(generate(model, tokens, temperature=0), 60)]
    window, uncached = tokens, []
    for _ in range(60):
        if window.size(1) > 24:
            window = window[:, -12:]
        uncached.append(model(window)[0, -1].argmax().item())
        window = torch.cat((window, torch.tensor([uncached[-1:]])), dim=1)
    assert cached == uncached


@every_kind
def test_int8_weights_compute_nearly_the_same_for_a_prompt_and_for_single_tokens(kind):
    model, tokens = make(kind), random_tokens(1, 24)
    exact, cache = model(tokens), KVCache(model.config, 1)
    to_int8(model)
    steps = torch.cat([model(token, cache=cache) for token in tokens.split(1, dim=1)], dim=1)
    for logits in (model(tokens), steps):
        assert 0 < (logits - exact).norm() / exact.norm() < 0.06


@every_kind
def test_the_first_loss_is_that_of_a_uniform_guess(kind):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**KINDS[kind], "vocab_size": 1000}))
    tokens, targets = torch.randint(1000, (2, 8, 24))
    assert abs(model(tokens, targets).item() - math.log(1000)) < 0.1


@every_kind
def test_each_block_begins_as_the_identity(kind):
    model = GPT(GPTConfig(**KINDS[kind])).eval()
    x = torch.randn(1, 24, 32)
    assert torch.equal(model.blocks[0](x, rotary_angles(torch.arange(24)[None], model.config), None, None), x)


@every_kind
def test_bfloat16_autocast_changes_logits_little(kind):
    torch.manual_seed(0)
    model, tokens = GPT(GPTConfig(**KINDS[kind])), random_tokens(2, 24)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    exact = model.eval()(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(tokens)
    assert (rounded - exact).norm() < 0.05 * exact.norm()


@every_kind
def test_one_batch_is_learned_by_heart(kind):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**KINDS[kind], "dropout": 0.0}))
    tokens = random_tokens(4, 25)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(100):
        optimizer.zero_grad()
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2  # below 4.1 for a guess; the first token of a sequence alone can't be known for sure


def test_loss_is_the_mean_cross_entropy_of_the_logits():
    model, tokens, targets = make("today"), random_tokens(2, 24), random_tokens(2, 24) // 2
    expected = -model(tokens).log_softmax(-1).gather(-1, targets[..., None]).mean()
    torch.testing.assert_close(model(tokens, targets), expected)


@pytest.mark.parametrize(
    "preset, total, active",
    [
        ("gpt2", 124_439_808, None),
        ("gpt2-medium", 354_823_168, None),
        ("gpt2-large", 774_030_080, None),
        ("gpt2-xl", 1_557_611_200, None),
        ("llama3-8b", 8_030_261_248, None),
        ("llama3-70b", 70_553_706_496, None),
        ("llama3-405b", 405_853_388_800, None),
        ("qwen3-0.6b", 596_049_920, None),
        ("qwen3-1.7b", 1_720_574_976, None),
        ("qwen3-4b", 4_022_468_096, None),
        ("qwen3-8b", 8_190_735_360, None),
        ("qwen3-14b", 14_768_307_200, None),
        ("qwen3-32b", 32_762_123_264, None),
        ("mixtral-8x7b", 46_702_792_704, 12_879_925_248),
        ("grok-1", 315_684_820_992, 83_756_587_008),
    ],
)
def test_a_published_model_has_as_many_parameters_as_its_authors_released(preset, total, active):
    with torch.device("meta"):
        model = GPT(GPTConfig(**models.PRESETS[preset]))
    assert (model.n_params(), model.n_active_params()) == (total, active or total)


def grok_golden() -> tuple[GPT, torch.Tensor, torch.Tensor]:
    """Our model with the weights of the golden file, and its tokens [B, T] and logits [B, T, V]."""
    golden = np.load(Path(__file__).with_name("golden") / "grok1_tiny_a.npz")
    c = json.loads(str(golden["config"]))
    shape = {
        "vocab_size": c["vocab_size"],
        "seq_len": 24,
        "n_layer": c["n_layers"],
        "n_head": c["n_q_heads"],
        "n_kv_head": c["n_kv_heads"],
        "n_embd": c["d_model"],
        "head_dim": c["key_size"],
        "n_inner": c["d_ff"],
    }
    model = GPT(GPTConfig(**{**models.PRESETS["grok-1"], **shape})).eval()

    def tensor(name):
        return torch.from_numpy(golden[name].astype(np.float32))

    state = {
        "embedding.weight": tensor("embedding"),
        "head.weight": tensor("embedding"),
        "norm.weight": tensor("final_norm"),
    }
    norms = {
        "attention_norm": "attn_norm_in",
        "attention_post_norm": "attn_norm_out",
        "mlp_norm": "ffn_norm_in",
        "mlp_post_norm": "ffn_norm_out",
    }
    matrices = {
        "attention.query": "q",
        "attention.key": "k",
        "attention.value": "v",
        "attention.out": "o",
        "mlp.router": "router",
    }
    for i in range(c["n_layers"]):
        for ours, theirs in norms.items():
            state[f"blocks.{i}.{ours}.weight"] = tensor(f"layers.{i}.{theirs}")
        for ours, theirs in matrices.items():
            state[f"blocks.{i}.{ours}.weight"] = tensor(f"layers.{i}.{theirs}").T
        for e in range(c["n_experts"]):
            for part in ("gate", "up", "down"):
                state[f"blocks.{i}.mlp.experts.{e}.{part}.weight"] = tensor(f"layers.{i}.expert_{part}")[e].T
    model.load_state_dict(state)
    return model, torch.from_numpy(golden["tokens"]).long(), tensor("logits")


def test_grok_computes_what_the_code_that_xai_released_computes():
    model, tokens, logits = grok_golden()
    assert (model(tokens) - logits).abs().max() < 1e-4


def test_grok_with_a_cache_computes_the_same():
    model, tokens, logits = grok_golden()
    cache = KVCache(model.config, 2)
    parts = [model(part, cache=cache) for part in tokens.split([7, 1, 1, 15], dim=1)]
    assert (torch.cat(parts, dim=1) - logits).abs().max() < 1e-4


@pytest.mark.parametrize("renormalise", [True, False])
def test_experts_equal_the_sum_over_all_experts_with_the_gates_of_the_unchosen_at_zero(renormalise):
    torch.manual_seed(0)
    experts = models.Experts(GPTConfig(n_embd=16, n_inner=8, n_expert=6, n_expert_active=3, renormalise=renormalise))
    x = torch.randn(2, 10, 16)
    gates = (x @ experts.router.weight.T).softmax(-1)
    gates = gates * (gates >= gates.sort(descending=True).values[..., 2:3])
    if renormalise:
        gates = gates / gates.sum(-1, keepdim=True)
    expected = sum(gates[..., e, None] * expert(x) for e, expert in enumerate(experts.experts))
    torch.testing.assert_close(experts(x), expected)


def test_the_work_of_experts_grows_with_the_visited_ones_only():
    experts = models.Experts(GPTConfig(n_embd=16, n_inner=8, n_expert=16, n_expert_active=2))
    seen = []
    for expert in experts.experts:
        expert.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    experts(torch.randn(2, 50, 16))
    assert sum(seen) == 2 * 50 * 2  # every visit is served, none twice
    torch.testing.assert_close(experts.load, torch.tensor(seen) / 200)


def test_an_expert_that_no_token_visits_has_a_gradient_of_zero():
    """Data parallelism waits for every parameter's gradient."""
    experts = models.Experts(GPTConfig(n_embd=16, n_inner=8, n_expert=64, n_expert_active=1))
    experts(torch.randn(1, 3, 16)).sum().backward()
    assert all(p.grad is not None for p in experts.experts.parameters())


def test_the_balance_loss_is_least_for_an_even_load():
    config = GPTConfig(
        n_head=1, n_embd=4, n_inner=8, n_expert=4, n_expert_active=1, balance_loss=1.0, router_z_loss=0.0
    )
    experts, losses = models.Experts(config), []
    tokens = torch.eye(4)[None]
    for router in (torch.eye(4), torch.eye(4)[:1].expand(4, 4) + torch.arange(4)[:, None]):
        experts.router.weight.data = 5.0 * router.clone()
        experts(tokens)
        losses.append(experts.router_loss.item())
    assert losses[0] == pytest.approx(1.0) and losses[1] > 2.0


def test_only_the_training_loss_holds_the_routers_losses():
    model, tokens = make("mixtral"), random_tokens(2, 24)
    plain = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    torch.testing.assert_close(model(tokens, tokens), plain)
    model.train()
    routers = sum(layer.router_loss for layer in model.expert_layers())
    torch.testing.assert_close(model(tokens, tokens), plain + routers)


def test_flops_are_six_per_weight_in_a_product_and_twelve_per_attended_channel():
    with torch.device("meta"):
        model = GPT(GPTConfig(**models.PRESETS["gpt2"]))
    attention_and_mlp = 12 * (4 * 768**2 + 2 * 4 * 768**2)
    assert model.flops_per_token() == 6 * (attention_and_mlp + 50257 * 768) + 12 * 12 * 768 * 1024


def test_rotary_scores_depend_on_distance_alone():
    config = GPTConfig(n_embd=32, n_head=2)
    q, k = torch.randn(2, 1, 1, 1, 16).expand(2, 1, 1, 20, 16)
    angles = rotary_angles(torch.arange(20)[None], config)
    scores = rotate(q, angles)[0, 0] @ rotate(k, angles)[0, 0].T
    for distance in range(-19, 20):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=1e-4)
    assert scores[0].std() > 0.1


def test_grouped_heads_equal_full_heads_with_repeated_keys_and_values():
    grouped = make("today")
    full = GPT(GPTConfig(**SHAPE)).eval()
    state = grouped.state_dict()
    for name in state:
        if ".key." in name or ".value." in name:
            state[name] = state[name].view(2, 8, 32).repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    tokens = random_tokens(2, 24)
    torch.testing.assert_close(grouped(tokens), full(tokens), atol=1e-4, rtol=1e-4)


def test_a_block_of_today_computes_its_equations():
    """Attention and MLP written out head by head from the published formulas."""
    model, T = make("today"), 24
    block = model.blocks[0]
    x = torch.randn(1, T, 32)

    def rms(x, norm):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight

    def turned(x):
        out = x.clone()
        for t in range(T):
            for i in range(4):
                a = t / 10_000 ** (2 * i / 8)
                out[t, i] = x[t, i] * math.cos(a) - x[t, i + 4] * math.sin(a)
                out[t, i + 4] = x[t, i + 4] * math.cos(a) + x[t, i] * math.sin(a)
        return out

    h = rms(x[0], block.attention_norm)
    heads = []
    for head in range(4):
        rows, kv_rows = slice(8 * head, 8 * head + 8), slice(8 * (head // 2), 8 * (head // 2) + 8)
        q = turned(rms(h @ block.attention.query.weight[rows].T, block.attention.query_norm))
        k = turned(rms(h @ block.attention.key.weight[kv_rows].T, block.attention.key_norm))
        v = h @ block.attention.value.weight[kv_rows].T
        scores = (q @ k.T / math.sqrt(8)).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ v)
    expected = x[0] + torch.cat(heads, dim=1) @ block.attention.out.weight.T
    h = rms(expected, block.mlp_norm)
    gate = h @ block.mlp.gate.weight.T
    expected = expected + (gate * torch.sigmoid(gate) * (h @ block.mlp.up.weight.T)) @ block.mlp.down.weight.T
    actual = block(x, rotary_angles(torch.arange(T)[None], model.config), None, None)[0]
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_ngram_embeddings_tell_the_last_three_tokens_and_nothing_else():
    """Table by table: the first tells the last two apart, both together the last three."""
    ngrams = NgramEmbedding(GPTConfig(**SHAPE, ngram_rows=10_000))
    for table in ngrams.tables:
        torch.nn.init.normal_(table.weight)
    tokens = torch.randint(3, (1, 100), generator=torch.Generator().manual_seed(1))
    for n, tables in ((3, ngrams.tables), (2, ngrams.tables[:1])):
        ngrams.tables = tables
        added = ngrams(torch.zeros(1, 100, 32), tokens, torch.arange(100)[None])[0]
        seen = [tuple(tokens[0, max(0, t - n + 1) : t + 1].tolist()) for t in range(100)]
        for one in range(100):
            for other in range(one):
                assert torch.equal(added[one], added[other]) == (seen[one] == seen[other])


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**KINDS["gpt2"], "dropout": 0.5}))
    tokens = random_tokens(1, 24)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_samples_follow_the_softmax_of_the_logits():
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]]).expand(20_000, 4)
    drawn = sample_next(logits, temperature=0.5, generator=torch.Generator().manual_seed(0))
    expected = F.softmax(logits[0] / 0.5, dim=0)
    torch.testing.assert_close(drawn.bincount(minlength=4) / 20_000, expected, atol=0.015, rtol=0)


@pytest.mark.parametrize(
    "how, possible",
    [
        ({"temperature": 0}, {3}),
        ({"temperature": 1, "top_k": 2}, {3, 0}),
        ({"temperature": 1, "top_k": 99}, {0, 1, 2, 3}),
        ({"temperature": 1, "top_p": 0.6}, {3}),  # 3 alone has 0.64
        ({"temperature": 1, "top_p": 0.7}, {3, 0}),
        ({"temperature": 1, "top_p": 1.0}, {0, 1, 2, 3}),
    ],
)
def test_top_k_and_top_p_keep_just_the_likeliest(how, possible):
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]]).expand(5000, 4)
    drawn = sample_next(logits, generator=torch.Generator().manual_seed(0), **how)
    assert set(drawn.tolist()) == possible


def test_ids_of_a_padded_vocabulary_are_never_drawn():
    model = make("today")
    drawn = islice(generate(model, random_tokens(1, 4), n_vocab=5, temperature=5.0), 200)
    assert {ids.item() for ids in drawn} == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"n_embd": 30, "n_head": 4}, "n_embd 30"),
        ({"n_head": 4, "n_kv_head": 3}, "n_kv_head 3"),
        ({"n_embd": 12, "n_head": 4}, "head_dim 3"),
        ({"n_layer": 0}, "n_layer 0"),
        ({"n_expert": 4, "n_expert_active": 5}, "n_expert_active 5"),
        ({"dropout": 1.0}, "dropout 1.0"),
    ],
)
def test_sizes_that_do_not_fit_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        GPTConfig(**wrong)
