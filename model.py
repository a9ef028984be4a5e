"""A GPT, from the one of 2019 to the ones of today: one model, with a switch for each thing that changed.

                   GPT-2 (2019)                  today (Qwen3, 2025)                                   bought
    norm           LayerNorm                     RMSNorm: no mean, no bias                               -0.07
    positions      learned, added once           rotary: queries and keys turn as position grows          0.51
    attention      every head has its own k, v   queries and keys are normalised                          0.05
                                                 several query heads share a k, v: a smaller cache
    MLP            GELU, 4 C wide                SwiGLU: a gate, 8/3 C wide, for as many parameters      -0.20
                                                 in large models many of them, of which a token visits few
    head           the embedding, transposed     a matrix of its own                                     -0.42
    optimizer      AdamW                         Muon for matrices (in train.py)                          1.11
    biases         everywhere                    nowhere
    dropout        0.1                           none

What a change bought is by how much it lowered the loss on held-out text, in nats per token, of a model that had read
1.1 million tokens (tests/ablation.py). So early only positions, head and Muon stand far out from the spread of seeds.
Today's column is what GPTConfig gives, except that there each head has its own k, v.

Shapes are written in one alphabet: B batch, T time, C channels, H query heads, K key/value heads, D channels of a head,
S longest sequence, E experts, V vocabulary. A switch is resolved when the model is built, so that each forward reads
like its equation; what a switch that is off leaves in its place is called `unchanged`.

    python model.py                             what each preset costs
    python model.py --export DIR runs/toy-1     a run's model for transformers, and for all that reads its format
"""

import argparse
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class GPTConfig:
    """The shape of a model. What is left None is derived from the rest. Raises ValueError where sizes do not fit. Each
    field is a flag of train.py, and the comment behind it the flag's help. The default of a new one must be what older
    checkpoints, which do not name it, computed."""

    vocab_size: int | None = None  # number of token ids (default: the data set's)
    seq_len: int = 128  # longest sequence, in tokens
    n_layer: int = 2  # number of blocks
    n_head: int = 4  # query heads
    n_kv_head: int | None = None  # key/value heads, each shared by n_head / n_kv_head queries (default: n_head)
    n_embd: int = 128  # channels
    head_dim: int | None = None  # channels of a head (default: n_embd / n_head)
    n_inner: int | None = None  # channels inside the MLP (default: 4 n_embd; gated 8/3 n_embd, in multiples of 64)
    norm: Literal["rms", "layer"] = "rms"  # RMSNorm or LayerNorm
    norm_eps: float = 1e-6  # added to the variance in norms
    position: Literal["rope", "learned"] = "rope"  # rotary or learned positions
    rope_base: float = 10_000.0  # rotary wavelengths run from 2 pi to about 2 pi times this, in tokens
    qk_norm: bool = True  # RMSNorm of each head's queries and keys
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"  # in the MLP
    gated: bool = True  # multiply the MLP's activation by a second projection
    bias: bool = False  # biases in linear layers and LayerNorms
    n_expert: int | None = None  # MLPs side by side in each block, experts (default: one MLP that serves every token)
    n_expert_active: int = 2  # experts that a token visits
    renormalise: bool = True  # scale the gates of the visited experts to sum to one
    balance_loss: float = 0.01  # weight of the loss that spreads tokens over experts
    router_z_loss: float = 0.001  # weight of the loss that keeps the router's logits small
    post_norm: bool = False  # a second norm, behind attention and MLP
    attention_cap: float | None = None  # squash attention scores into (-cap, cap) by cap tanh(score / cap)
    embedding_scale: float = 1.0  # multiplies token embeddings
    logit_scale: float = 1.0  # multiplies logits
    tied: bool = False  # the output matrix is the token embedding
    dropout: float = 0.0  # share of activations zeroed in training

    def __post_init__(self):
        if self.head_dim is None:
            if self.n_embd % self.n_head:
                raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
            self.head_dim = self.n_embd // self.n_head
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.n_inner is None:
            self.n_inner = math.ceil(8 * self.n_embd / 3 / 64) * 64 if self.gated else 4 * self.n_embd
        for name in ("norm", "position", "activation"):
            if getattr(self, name) not in (legal := get_args(self.__annotations__[name])):
                raise ValueError(f"{name} {getattr(self, name)!r} is none of {', '.join(legal)}")
        for name in ("vocab_size", "seq_len", "n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "n_inner"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is not positive")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}")
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"rotary positions turn pairs of channels, but head_dim {self.head_dim} is odd")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is not in [0, 1)")
        if self.n_expert is not None and not 1 <= self.n_expert_active <= self.n_expert:
            raise ValueError(f"n_expert_active {self.n_expert_active} is not between 1 and n_expert {self.n_expert}")


def unchanged(x, *_):
    """What a switch that is off puts in place of the thing it would switch on."""
    return x


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps), scaled (Zhang & Sennrich, 2019)."""

    def forward(self, x: Tensor) -> Tensor:  # in one dtype, since torch has no fused code for two
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def make_norm(config: GPTConfig, size: int) -> nn.Module:
    if config.norm == "layer":
        return nn.LayerNorm(size, config.norm_eps, bias=config.bias)
    return RMSNorm(size, config.norm_eps)


def rotary_angles(positions: Tensor, config: GPTConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine [T, D] of the angles by which positions [T] turn the channels of a head (RoPE, Su et al., 2021):
    channel i and channel i + D/2 are the two coordinates of a point that turns once in 2 pi base^(2i/D) tokens."""
    D = config.head_dim
    frequencies = config.rope_base ** (-torch.arange(0, D, 2, device=positions.device) / D)
    angles = torch.outer(positions, frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair of channels of x [B, heads, T, D]."""
    cos, sin = (a.to(x.dtype) for a in angles)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class LearnedPositions(nn.Embedding):
    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + super().forward(positions)


class KVCache:
    """Keys and values of the tokens seen so far, so that each is computed once when tokens come one at a time."""

    def __init__(self, config: GPTConfig, batch_size: int, device: torch.device | str = "cpu", dtype=torch.float32):
        shape = (config.n_layer, batch_size, config.n_kv_head, config.seq_len, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)  # takes up memory as it fills
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # positions filled; GPT.forward moves it on when all layers have appended

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B, K, T, D] behind what `layer` holds, and return all of its keys and values [B, K, .., D]."""
        end = self.length + k.size(2)
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


def capped_attention(q, k, v, attn_mask, dropout_p, is_causal, enable_gqa, cap: float) -> Tensor:
    """scaled_dot_product_attention, arguments and all, with scores squashed into (-cap, cap) before the mask (Gemma 2
    and Grok-1)."""
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))  # whether enable_gqa says so or not
    scores = cap * torch.tanh(q @ k.transpose(2, 3) / math.sqrt(q.size(3)) / cap)
    if is_causal:
        attn_mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    return F.dropout(weights, dropout_p) @ v


class Attention(nn.Module):
    """Causal self-attention: in each head every token looks for something (its query), says what it is (its key) and
    what it can tell (its value). It gets the mean of the values of all tokens up to itself, weighted by how well their
    keys k answer its query q: softmax(q k^T / sqrt(D)) v. Query head h uses key/value head h // (H / K) (GQA, Ainslie
    et al., 2023)."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        C, H, K, D = config.n_embd, config.n_head, config.n_kv_head, config.head_dim
        self.layer, self.head_dim, self.dropout, self.grouped = layer, D, config.dropout, H != K
        self.query = nn.Linear(C, H * D, bias=config.bias)
        self.key = nn.Linear(C, K * D, bias=config.bias)
        self.value = nn.Linear(C, K * D, bias=config.bias)
        self.out = nn.Linear(H * D, C, bias=config.bias)
        self.query_norm = make_norm(config, D) if config.qk_norm else unchanged
        self.key_norm = make_norm(config, D) if config.qk_norm else unchanged
        self.rotate = rotate if config.position == "rope" else unchanged
        cap = config.attention_cap
        self.attend = partial(capped_attention, cap=cap) if cap else F.scaled_dot_product_attention

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        q = self.query(x).view(B, T, -1, self.head_dim)  # [B, T, H, D]
        k = self.key(x).view(B, T, -1, self.head_dim)  # [B, T, K, D]
        v = self.value(x).view(B, T, -1, self.head_dim)
        q, k, v = self.query_norm(q).transpose(1, 2), self.key_norm(k).transpose(1, 2), v.transpose(1, 2)
        q, k = self.rotate(q, angles), self.rotate(k, angles)  # [B, H, T, D], [B, K, T, D]

        mask = None
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
            if T > 1:  # token i of these T sees what was cached before them, and up to itself; a single one sees all
                mask = torch.ones(T, k.size(2), dtype=torch.bool, device=x.device).tril(k.size(2) - T)
        dropout = self.dropout if self.training else 0.0
        how = {"attn_mask": mask, "dropout_p": dropout, "is_causal": cache is None, "enable_gqa": self.grouped}
        y = self.attend(q, k, v, **how)  # [B, H, T, D]
        return self.out(y.transpose(1, 2).flatten(2))


ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


class MLP(nn.Module):
    """Works on each token alone."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.up = nn.Linear(config.n_embd, config.n_inner, bias=config.bias)
        self.down = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class GatedMLP(MLP):
    """SwiGLU with SiLU as activation, GeGLU with GELU (Shazeer, 2020)."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.gate = nn.Linear(config.n_embd, config.n_inner, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))


def make_mlp(config: GPTConfig) -> nn.Module:
    return GatedMLP(config) if config.gated else MLP(config)


class Experts(nn.Module):
    """E MLPs, of which a router chooses a few for each token: work grows with the few (Shazeer et al., 2017). In
    training two losses keep the router healthy: one is least when all experts get equal shares of tokens and of
    probability (Switch Transformer, Fedus et al., 2021), one keeps its logits near zero (ST-MoE, Zoph et al., 2022)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_active, self.renormalise = config.n_expert_active, config.renormalise
        self.balance_weight, self.z_weight = config.balance_loss, config.router_z_loss
        self.router = nn.Linear(config.n_embd, config.n_expert, bias=False)
        self.experts = nn.ModuleList(make_mlp(config) for _ in range(config.n_expert))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)  # [N, C] with N = B T
        with torch.autocast(x.device.type, enabled=False):  # routing is decided in float32
            logits = F.linear(tokens.float(), self.router.weight.float())  # [N, E]
        probabilities = logits.softmax(-1)
        gates, chosen = probabilities.topk(self.n_active)  # [N, active]
        if self.renormalise:
            gates = gates / gates.sum(-1, keepdim=True)

        visits = chosen.flatten()  # [N * active]: the expert of each visit; visit i is one of token i // active
        by_expert = visits.argsort(stable=True)  # those to the same expert together
        visitors = by_expert // self.n_active
        counts = visits.bincount(minlength=len(self.experts))  # [E]
        parts = tokens[visitors].split(counts.tolist())
        outputs = torch.cat([expert(part) for expert, part in zip(self.experts, parts)])
        outputs = outputs * gates.flatten()[by_expert, None]

        self.load = counts / counts.sum()  # each expert's share of the visits, for the log
        balance = len(self.experts) * (self.load * probabilities.mean(0)).sum()
        self.router_loss = self.balance_weight * balance + self.z_weight * logits.logsumexp(-1).square().mean()
        return torch.zeros_like(tokens).index_add(0, visitors, outputs.to(tokens.dtype)).view_as(x)


class Block(nn.Module):
    """Attention, in which tokens learn of each other, then an MLP. Both read x through a norm, and add to it."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attention_norm = make_norm(config, config.n_embd)
        self.attention = Attention(config, layer)
        self.mlp_norm = make_norm(config, config.n_embd)
        self.mlp = Experts(config) if config.n_expert else make_mlp(config)
        self.attention_post_norm = make_norm(config, config.n_embd) if config.post_norm else unchanged
        self.mlp_post_norm = make_norm(config, config.n_embd) if config.post_norm else unchanged
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], cache: KVCache | None) -> Tensor:
        x = x + self.dropout(self.attention_post_norm(self.attention(self.attention_norm(x), angles, cache)))
        x = x + self.dropout(self.mlp_post_norm(self.mlp(self.mlp_norm(x))))
        return x


class GPT(nn.Module):
    """Tokens in, for each of them the logits of the next one out."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        learned = config.position == "learned"
        self.positions = LearnedPositions(config.seq_len, config.n_embd) if learned else unchanged
        self.angles = unchanged if learned else partial(rotary_angles, config=config)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = make_norm(config, config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Each block begins as the identity, and no token is preferred: the first loss is ln V (tied, about ln V)."""
        # The last weights on the way to what a block adds to its input: while they are zero it adds nothing.
        last = ("post_norm.weight",) if self.config.post_norm else (".out.weight", ".down.weight")
        for name, weight in self.named_parameters():  # in which a tied head is the embedding
            if name.endswith(("bias", "head.weight", *last)):
                weight.zero_()
            elif weight.ndim == 1:  # the other norms only normalise
                weight.fill_(1.0)
            else:
                weight.normal_(std=0.02)  # as in GPT-2; the norms make up for the scale

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        cache: KVCache | None = None,
        only_last: bool = False,
    ) -> Tensor:
        """Logits [B, T, V] of the token after each of `tokens` [B, T], or with `only_last` [B, 1, V] after the last;
        with `targets` [B, T] their mean cross-entropy in nats, in training plus the routers' losses. With a cache,
        `tokens` continue the sequence that it holds, and are added to it. Raises ValueError beyond S positions."""
        start = cache.length if cache is not None else 0
        if (end := start + tokens.size(1)) > self.config.seq_len:
            raise ValueError(f"a sequence of {end} tokens is longer than seq_len {self.config.seq_len}")
        t = torch.arange(start, end, device=tokens.device)
        x = self.dropout(self.positions(self.embedding(tokens) * self.config.embedding_scale, t))
        angles = self.angles(t)
        for block in self.blocks:
            x = block(x, angles, cache)
        if cache is not None:
            cache.length = end
        if only_last:
            x = x[:, -1:]
        logits = self.head(self.norm(x)) * self.config.logit_scale
        if targets is None:
            return logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        if self.training:
            loss = loss + sum(layer.router_loss for layer in self.expert_layers())
        return loss

    def expert_layers(self) -> list[Experts]:
        """One of each block, for what it tells of the last forward pass; none in a dense model."""
        return [block.mlp for block in self.blocks if isinstance(block.mlp, Experts)]

    def n_params(self) -> int:
        """Number of parameters; a tied head counts once."""
        return sum(p.numel() for p in self.parameters())

    def n_active_params(self) -> int:
        """Number of parameters that one token meets: all but those of the experts it does not visit."""
        idle = 0
        for layer in self.expert_layers():
            size = sum(p.numel() for p in layer.experts[0].parameters())
            idle += (len(layer.experts) - layer.n_active) * size
        return self.n_params() - idle

    def activations_per_token(self) -> int:
        """How many numbers a forward pass keeps of a token of a full sequence for the backward pass, without logits."""
        c = self.config
        heads, kv_heads = c.n_head * c.head_dim, 2 * c.n_kv_head * c.head_dim
        attention = 2 * c.n_embd + 2 * heads + kv_heads  # both sides of the norm; queries, keys, values, and the output
        attention += (c.qk_norm + (c.position == "rope")) * (heads + kv_heads // 2)  # queries and keys at each stage
        if c.attention_cap:
            attention += 5 * c.n_head * c.seq_len  # scores, which the capped attention holds at each stage
        mlp = c.n_embd + (4 if c.gated else 2) * c.n_inner  # input; gate, up, activation, product, or up, activation
        visits = c.n_expert_active if c.n_expert else 1
        experts = 2 * c.n_embd * visits if c.n_expert else 0  # tokens gathered, and their outputs before the gates
        return c.n_layer * (attention + c.n_embd + visits * mlp + experts + 2 * c.n_embd * c.post_norm)

    def flops_per_token(self) -> int:
        """Training FLOPs per token of a full sequence: 6 for each weight in a matrix product (2 forward, 4 backward),
        and 12 L H D S for attention (PaLM, appendix B). An embedding that is only looked up costs nothing."""
        c = self.config
        looked_up = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Embedding))
        vectors = sum(p.numel() for p in self.parameters() if p.ndim == 1)
        head_again = c.tied * self.head.weight.numel()
        matmul = self.n_active_params() - looked_up - vectors + head_again
        return 6 * matmul + 12 * c.n_layer * c.n_head * c.head_dim * c.seq_len


def sample_next(
    logits: Tensor,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A token id [B] for each row of logits [B, V]: the likeliest at temperature 0, else drawn, from the `top_k`
    likeliest, and of these from the fewest that together have probability `top_p` (nucleus sampling, Holtzman et al.,
    2019)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        smallest_kept = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -math.inf)
    if top_p is not None:
        probabilities, ids = logits.softmax(-1).sort(descending=True)
        likelier = probabilities.cumsum(-1) - probabilities  # what the tokens before each one sum to
        left_out = (likelier >= top_p).gather(-1, ids.argsort(-1))  # in the order of ids again
        logits = logits.masked_fill(left_out, -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@torch.no_grad()
def generate(model: GPT, tokens: Tensor, n_vocab: int | None = None, **how) -> Iterator[Tensor]:
    """The ids [B] that follow tokens [B, T], one step after the other without end; `how` goes to sample_next. Where the
    model has more ids than the tokenizer, as published ones do, `n_vocab` is the number of those that mean something.

    When the sequence outgrows the model's S positions, the window slides: the newest S / 2 tokens are kept.
    """
    S = model.config.seq_len
    while True:
        window = tokens[:, -max(1, S // 2) :] if tokens.size(1) > S else tokens
        cache = KVCache(model.config, len(tokens), tokens.device, model.embedding.weight.dtype)
        unseen = window  # all of it first, then each time the newest token
        while cache.length + unseen.size(1) <= S:
            logits = model(unseen, cache=cache, only_last=True)[:, -1, :n_vocab]
            unseen = sample_next(logits, **how)[:, None]
            window = torch.cat((window, unseen), dim=1)
            yield unseen[:, 0]
        tokens = window  # S + 1 of them


# ---------------------------------------------------------------------------------------------------------------------
# Presets: a row holds what differs from GPTConfig's defaults. How each is trained stands in train.py's RECIPES

# fmt: off
GPT2 = {
    "vocab_size": 50257, "seq_len": 1024, "norm": "layer", "norm_eps": 1e-5, "position": "learned", "qk_norm": False,
    "activation": "gelu_tanh", "gated": False, "bias": True, "tied": True,
}
LLAMA = {"n_kv_head": 8, "norm_eps": 1e-5, "qk_norm": False}
LLAMA3 = dict(LLAMA, vocab_size=128256, seq_len=8192, rope_base=500_000.0)
MIXTRAL = dict(LLAMA, vocab_size=32000, seq_len=32768, rope_base=1_000_000.0, n_expert=8)
QWEN3 = {"vocab_size": 151936, "seq_len": 40960, "n_kv_head": 8, "head_dim": 128, "rope_base": 1_000_000.0}
GROK = {
    "norm_eps": 1e-5, "qk_norm": False, "activation": "gelu_tanh", "n_expert": 8, "renormalise": False,
    "post_norm": True, "attention_cap": 30.0, "tied": True,
}

PRESETS: dict[str, dict] = {
    "toy": {"n_kv_head": 2},
    "grok-toy": dict(GROK, n_kv_head=2, n_inner=192),
    "shakespeare-quick": {"seq_len": 64, "n_head": 2, "n_kv_head": 1, "n_embd": 64, "n_inner": 128},
    "shakespeare": {"seq_len": 256, "n_layer": 4, "n_head": 3, "n_embd": 192},
    "gpt2": dict(GPT2, n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(GPT2, n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(GPT2, n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(GPT2, n_layer=48, n_head=25, n_embd=1600),
    "llama3-8b": dict(LLAMA3, n_layer=32, n_head=32, n_embd=4096, n_inner=14336),
    "llama3-70b": dict(LLAMA3, n_layer=80, n_head=64, n_embd=8192, n_inner=28672),
    "llama3-405b": dict(LLAMA3, n_layer=126, n_head=128, n_embd=16384, n_inner=53248),
    "qwen3-0.6b": dict(QWEN3, n_layer=28, n_head=16, n_embd=1024, n_inner=3072, tied=True),
    "qwen3-1.7b": dict(QWEN3, n_layer=28, n_head=16, n_embd=2048, n_inner=6144, tied=True),
    "qwen3-4b": dict(QWEN3, n_layer=36, n_head=32, n_embd=2560, n_inner=9728, tied=True),
    "qwen3-8b": dict(QWEN3, n_layer=36, n_head=32, n_embd=4096, n_inner=12288),
    "qwen3-14b": dict(QWEN3, n_layer=40, n_head=40, n_embd=5120, n_inner=17408),
    "qwen3-32b": dict(QWEN3, n_layer=64, n_head=64, n_embd=5120, n_inner=25600),
    "mixtral-8x7b": dict(MIXTRAL, n_layer=32, n_head=32, n_embd=4096, n_inner=14336),
    "grok-1": dict(GROK, vocab_size=131072, seq_len=8192, n_layer=64, n_head=48, n_kv_head=8, n_embd=6144,
                   n_inner=32768, embedding_scale=78.38367176906169, logit_scale=0.5773502691896257),
}
# fmt: on


# ---------------------------------------------------------------------------------------------------------------------
# Weights of published models, in and out: folders in the layout of Hugging Face's transformers, which most tools read


@dataclass
class Family:
    """What transformers calls an architecture, its settings and its weights."""

    architecture: str  # the class there
    base: dict  # our settings where its config.json is silent
    settings: dict[str, str]  # our setting: its name in config.json, or several
    modules: dict[str, str]  # our module: theirs, with * for the number of a layer or an expert
    required: dict  # what its config.json must say where it says it, since there is no switch for it here
    transposed: bool = False  # matrices in blocks are stored [in, out]

    def is_transposed(self, tensor: Tensor, ours: str) -> bool:
        return self.transposed and tensor.ndim == 2 and ours.startswith("blocks")


# fmt: off
LLAMA_SETTINGS = {
    "vocab_size": "vocab_size", "seq_len": "max_position_embeddings", "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size",
    "head_dim": "head_dim", "n_inner": "intermediate_size", "norm_eps": "rms_norm_eps", "rope_base": "rope_theta",
    "activation": "hidden_act", "tied": "tie_word_embeddings",
}
LLAMA_MODULES = {
    "embedding": "model.embed_tokens",
    "blocks.*.attention_norm": "model.layers.*.input_layernorm",
    "blocks.*.attention.query": "model.layers.*.self_attn.q_proj",
    "blocks.*.attention.key": "model.layers.*.self_attn.k_proj",
    "blocks.*.attention.value": "model.layers.*.self_attn.v_proj",
    "blocks.*.attention.out": "model.layers.*.self_attn.o_proj",
    "blocks.*.attention.query_norm": "model.layers.*.self_attn.q_norm",
    "blocks.*.attention.key_norm": "model.layers.*.self_attn.k_norm",
    "blocks.*.mlp_norm": "model.layers.*.post_attention_layernorm",
    "blocks.*.mlp.gate": "model.layers.*.mlp.gate_proj",
    "blocks.*.mlp.up": "model.layers.*.mlp.up_proj",
    "blocks.*.mlp.down": "model.layers.*.mlp.down_proj",
    "blocks.*.mlp.router": "model.layers.*.mlp.gate",
    "blocks.*.mlp.experts.*.gate": "model.layers.*.mlp.experts.*.gate_proj",
    "blocks.*.mlp.experts.*.up": "model.layers.*.mlp.experts.*.up_proj",
    "blocks.*.mlp.experts.*.down": "model.layers.*.mlp.experts.*.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
LLAMA_REQUIRED = {"rope_type": "default", "type": "default", "sliding_window": None, "use_sliding_window": False}

FAMILIES: dict[str, Family] = {  # by the model_type in config.json; the dense ones first
    "gpt2": Family(
        "GPT2LMHeadModel",
        base=GPT2,
        settings={
            "vocab_size": "vocab_size", "seq_len": "n_positions", "n_layer": "n_layer", "n_head": "n_head",
            "n_embd": "n_embd", "n_inner": "n_inner", "norm_eps": "layer_norm_epsilon",
            "activation": "activation_function", "tied": "tie_word_embeddings",
        },
        modules={
            "embedding": "transformer.wte",
            "positions": "transformer.wpe",
            "blocks.*.attention_norm": "transformer.h.*.ln_1",
            "blocks.*.attention.query": "transformer.h.*.attn.c_attn",  # the three are stacked in one
            "blocks.*.attention.key": "transformer.h.*.attn.c_attn",
            "blocks.*.attention.value": "transformer.h.*.attn.c_attn",
            "blocks.*.attention.out": "transformer.h.*.attn.c_proj",
            "blocks.*.mlp_norm": "transformer.h.*.ln_2",
            "blocks.*.mlp.up": "transformer.h.*.mlp.c_fc",
            "blocks.*.mlp.down": "transformer.h.*.mlp.c_proj",
            "norm": "transformer.ln_f",
            "head": "lm_head",
        },
        required={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        transposed=True,
    ),
    "llama": Family(
        "LlamaForCausalLM",
        base={"qk_norm": False},
        settings=LLAMA_SETTINGS | {"bias": "attention_bias mlp_bias"},
        modules=LLAMA_MODULES,
        required=LLAMA_REQUIRED,
    ),
    "qwen3": Family("Qwen3ForCausalLM", {}, LLAMA_SETTINGS, LLAMA_MODULES, LLAMA_REQUIRED),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        base={"renormalise": False},
        settings=LLAMA_SETTINGS | {
            "n_inner": "moe_intermediate_size", "n_expert": "num_experts num_local_experts",
            "n_expert_active": "num_experts_per_tok", "renormalise": "norm_topk_prob",
        },
        modules=LLAMA_MODULES,
        required=LLAMA_REQUIRED | {"decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        base={"qk_norm": False, "n_expert": 8},
        settings=LLAMA_SETTINGS | {"n_expert": "num_local_experts", "n_expert_active": "num_experts_per_tok"},
        modules=LLAMA_MODULES | {
            "blocks.*.mlp.router": "model.layers.*.block_sparse_moe.gate",
            "blocks.*.mlp.experts.*.gate": "model.layers.*.block_sparse_moe.experts.*.w1",
            "blocks.*.mlp.experts.*.up": "model.layers.*.block_sparse_moe.experts.*.w3",
            "blocks.*.mlp.experts.*.down": "model.layers.*.block_sparse_moe.experts.*.w2",
        },
        required=LLAMA_REQUIRED,
    ),
}
# fmt: on
THEIR_GELU = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
NOT_WEIGHTS = re.compile(r".*\.attn\.(masked_)?bias|.*\.rotary_emb\.inv_freq")  # masks and angles, in older files
ONLY_IN_TRAINING = ("dropout", "balance_loss", "router_z_loss")  # settings that change nothing of what a model computes


def meta_model(config: GPTConfig, n_tensors: int) -> GPT:
    """The model without memory for its weights. Raises ValueError where `n_tensors` are too few for its layers: a
    damaged config could ask for millions."""
    if config.n_layer * (config.n_expert or 1) > n_tensors:
        raise ValueError(f"{config.n_layer} layers can't be filled from {n_tensors} tensors")
    with torch.device("meta"):
        return GPT(config)


def tie(config: GPTConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights as load_state_dict wants them. Files hold a tied head once, as the embedding."""
    return {**state, "head.weight": state["embedding.weight"]} if config.tied else state


def model_with(config: GPTConfig, state: dict[str, Tensor]) -> GPT:
    """The model with the tensors of `state` as its weights, not copied, in whatever dtype they are."""
    model = meta_model(config, len(state))
    model.load_state_dict(tie(config, state), assign=True)
    if config.tied:
        model.head.weight = model.embedding.weight
    return model


def layout(family: Family, model: GPT) -> dict[str, list[str]]:
    """{name of a tensor in their file: the parameters of ours that are stacked in it}"""
    names = defaultdict(list)
    for name, _ in model.named_parameters():
        module, _, kind = name.rpartition(".")
        theirs = family.modules[re.sub(r"\d+", "*", module)]
        for number in re.findall(r"\d+", module):
            theirs = theirs.replace("*", number, 1)
        names[f"{theirs}.{kind}"].append(name)
    return names


def open_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors or pytorch_model.bin, or of the parts that their index names. The files are
    mapped into memory, not read: a tensor costs memory when it is used. Nothing in them is executed."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        paths = [folder / name]
        if (index := folder / f"{name}.index.json").exists():
            parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            paths = sorted({folder / Path(part).name for part in parts})
        if not paths[0].exists():
            continue
        if name == "pytorch_model.bin":
            files = [torch.load(path, map_location="cpu", mmap=True, weights_only=True) for path in paths]
        else:
            try:
                from safetensors.torch import load_file
            except ImportError:
                raise ValueError(f"{paths[0]} needs safetensors: pip install safetensors") from None
            files = [load_file(path) for path in paths]
        return {name: tensor for file in files for name, tensor in file.items()}
    raise ValueError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")


def load_published(folder: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The config and, by our names, the weights of a model in Hugging Face's layout. Raises ValueError where it is not
    one of FAMILIES, and where a tensor is missing, left over or of another shape."""
    theirs = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for nested in ("rope_parameters", "rope_scaling"):  # where newer and older files keep the rotary settings
        theirs |= theirs.get(nested) or {}
    family = FAMILIES.get(theirs["model_type"])
    if family is None:
        raise ValueError(f"{folder} holds a {theirs['model_type']!r}, none of {', '.join(FAMILIES)}")
    for name, value in family.required.items():
        if theirs.get(name, value) != value:
            raise ValueError(f"the {name} of {folder} is {theirs[name]!r}, for which there is no switch here")
    chosen = dict(family.base)
    for ours, names in family.settings.items():
        for name in names.split():
            if theirs.get(name) is not None:
                chosen[ours] = theirs[name]
    chosen["activation"] = THEIR_GELU.get(chosen["activation"], chosen["activation"])
    config = GPTConfig(**chosen)

    tensors = {name: tensor for name, tensor in open_tensors(folder).items() if not NOT_WEIGHTS.fullmatch(name)}
    if "wte.weight" in tensors:  # GPT-2 as OpenAI's files have it, without its head
        tensors = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    if config.tied:
        tensors.pop("lm_head.weight", None)  # some files hold it a second time
    model = meta_model(config, len(tensors))
    names = layout(family, model)
    for which, difference in (("misses", names.keys() - tensors.keys()), ("also holds", tensors.keys() - names.keys())):
        if difference:
            raise ValueError(f"{folder} {which} {min(difference)} and {len(difference) - 1} other tensors")
    state = {}
    for theirs_name, ours_names in names.items():
        tensor = tensors.pop(theirs_name)
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{theirs_name} in {folder} is of {tensor.dtype}, not of plain floating-point numbers")
        if family.is_transposed(tensor, ours_names[0]):
            tensor = tensor.T.contiguous()
        for ours, part in zip(ours_names, tensor.chunk(len(ours_names))):
            shape = model.get_parameter(ours).shape
            if part.shape != shape:
                raise ValueError(f"{theirs_name} in {folder} fills {ours} by {list(part.shape)}, not {list(shape)}")
            state[ours] = part
    return config, state


def no_counterpart(config: GPTConfig, family: Family) -> list[str]:
    """The settings of `config` that the family cannot express."""
    said = {name: getattr(config, name) for name in (*family.settings, *ONLY_IN_TRAINING)}
    same = GPTConfig(**{**family.base, **said})
    return [f.name for f in fields(GPTConfig) if getattr(same, f.name) != getattr(config, f.name)]


def save_published(folder: Path, config: GPTConfig, state: dict[str, Tensor]) -> None:
    """Write config.json and model.safetensors as the family that can express `config` has them. Raises ValueError where
    none can. The inverse of load_published."""
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise ValueError("writing model.safetensors needs safetensors: pip install safetensors") from None
    model_type = min(FAMILIES, key=lambda name: len(no_counterpart(config, FAMILIES[name])))
    family = FAMILIES[model_type]
    if lacking := no_counterpart(config, family):
        which = ", ".join(f"{name} {getattr(config, name)}" for name in lacking)
        raise ValueError(f"no published family has this combination: the nearest, {model_type}, lacks {which}")
    theirs = {"architectures": [family.architecture], "model_type": model_type, "dtype": "float32"}
    for ours, names in family.settings.items():
        value = "gelu_new" if getattr(config, ours) == "gelu_tanh" else getattr(config, ours)
        theirs |= dict.fromkeys(names.split(), value)
    tensors = {}
    for theirs_name, ours_names in layout(family, model_with(config, state)).items():
        tensor = torch.cat([state[name] for name in ours_names])
        if family.is_transposed(tensor, ours_names[0]):
            tensor = tensor.T
        tensors[theirs_name] = tensor.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(theirs, indent=1), encoding="utf-8")


def export(folder: Path, run: Path) -> None:
    """Write the newest checkpoint of a run as a published model with its tokenizer."""
    from prepare import fail, save_published_tokenizer, tokenizer_from_dict
    from train import load_checkpoint  # it imports this file, so not above

    if folder.exists() and any(folder.iterdir()):
        fail(f"{folder} is not empty: choose another folder to export to")
    state, record = load_checkpoint(run)
    try:
        save_published(folder, GPTConfig(**state["config"]["model"]), state["model"])
        save_published_tokenizer(folder, tokenizer_from_dict(state["tokenizer"]))
    except (ValueError, OSError) as error:
        fail(f"cannot export {record.with_suffix('')}: {error}")
    names = ", ".join(sorted(path.name for path in folder.iterdir()))
    print(f"{folder} holds step {state['step']} of {record.parent} as {names}")


def main() -> None:
    """Export, or print what each preset comes to; for that nothing is allocated: models stand on the meta device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--export", nargs=2, type=Path, metavar=("DIR", "RUN"), help="write a run's model for other tools"
    )
    args = parser.parse_args()
    if args.export:
        return export(*args.export)
    print(f"{'preset':17}{'parameters':>17}{'active':>17}{'FLOP/token':>20}{'cache bytes/token':>19}")
    assumed = {"vocab_size": 4096}
    for name, preset in PRESETS.items():
        config = GPTConfig(**{**assumed, **preset})
        with torch.device("meta"):
            model, cache = GPT(config), KVCache(config, 1, "meta", torch.bfloat16)
        cache_bytes = (cache.keys.nbytes + cache.values.nbytes) // config.seq_len
        counts = f"{model.n_params():17,}{model.n_active_params():17,}{model.flops_per_token():20,}{cache_bytes:19,}"
        print(f"{name:17}{counts}")
    print(f"Presets that take the vocabulary of their data set are counted with {assumed['vocab_size']:,} tokens.")


if __name__ == "__main__":
    main()
