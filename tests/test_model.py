"""model.py: the arithmetic of a GPT, each claim against something computed in another way."""
import math
from itertools import islice

import pytest
import torch
import torch.nn.functional as F

import model as models
from model import GPT, GPTConfig, KVCache, generate, rotary_angles, rotate, sample_next

SHAPE = dict(vocab_size=61, seq_len=24, n_layer=2, n_head=4, n_embd=32)
KINDS = {
    "today": dict(SHAPE, n_kv_head=2),
    "tied": dict(SHAPE, tied=True, head_dim=6, n_inner=50),
    "gpt2": {**models.PRESETS["gpt2"], **SHAPE},
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


@every_kind
def test_a_later_token_changes_no_earlier_logit(kind):
    model, tokens = make(kind), random_tokens(1, 24)
    before = model(tokens)
    tokens[0, 15] += 1
    after = model(tokens)
    assert torch.equal(before[:, :15], after[:, :15])
    assert not torch.allclose(before[:, 15], after[:, 15])


@every_kind
def test_cached_logits_equal_uncached_ones(kind):
    model, tokens = make(kind), random_tokens(2, 24)
    cache = KVCache(model.config, 2)
    parts = [model(part, cache=cache) for part in tokens.split([10, 1, 1, 5, 7], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), atol=1e-4, rtol=1e-4)


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
def test_the_first_loss_is_that_of_a_uniform_guess(kind):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**KINDS[kind], "vocab_size": 1000}))
    tokens, targets = torch.randint(1000, (2, 8, 24))
    assert abs(model(tokens, targets).item() - math.log(1000)) < 0.1


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


def test_gpt2_has_as_many_parameters_as_openai_released():
    with torch.device("meta"):
        model = GPT(GPTConfig(**models.PRESETS["gpt2"]))
    assert model.n_params() == 124_439_808


def test_flops_are_six_per_weight_in_a_product_and_twelve_per_attended_channel():
    with torch.device("meta"):
        model = GPT(GPTConfig(**models.PRESETS["gpt2"]))
    attention_and_mlp = 12 * (4 * 768**2 + 2 * 4 * 768**2)
    assert model.flops_per_token() == 6 * (attention_and_mlp + 50257 * 768) + 12 * 12 * 768 * 1024


def test_rotary_scores_depend_on_distance_alone():
    config = GPTConfig(n_embd=32, n_head=2)
    q, k = torch.randn(2, 1, 1, 1, 16).expand(2, 1, 1, 20, 16)
    angles = rotary_angles(torch.arange(20), config)
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
    actual = block(x, rotary_angles(torch.arange(T), model.config), None)[0]
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


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
        (dict(temperature=0), {3}),
        (dict(temperature=1, top_k=2), {3, 0}),
        (dict(temperature=1, top_k=99), {0, 1, 2, 3}),
        (dict(temperature=1, top_p=0.6), {3}),  # 3 alone has 0.64
        (dict(temperature=1, top_p=0.7), {3, 0}),
        (dict(temperature=1, top_p=1.0), {0, 1, 2, 3}),
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
        (dict(n_embd=30, n_head=4), "n_embd 30"),
        (dict(n_head=4, n_kv_head=3), "n_kv_head 3"),
        (dict(n_embd=12, n_head=4), "head_dim 3"),
        (dict(n_layer=0), "n_layer 0"),
        (dict(dropout=1.0), "dropout 1.0"),
    ],
)
def test_sizes_that_do_not_fit_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        GPTConfig(**wrong)
