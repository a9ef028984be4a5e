"""A GPT, from GPT-2 to the models of today: one implementation, with a switch for each thing that changed.

                   GPT-2 (2019)                  today (Qwen3, 2025)                               taken back
    norm           LayerNorm, with biases        RMSNorm: no mean, no bias                            -0.02
    positions      learned, added to the input   rotary: queries and keys are rotated                 +0.10
    attention      queries and keys as they are  normalised queries and keys                          +0.03
                   a key and value per head      several query heads share a key and value
    MLP            GELU, 4 C wide                SwiGLU: gated, 8/3 C wide, as many parameters        +0.08
                                                 in large models a mixture of experts
    head           the embedding, transposed     a matrix of its own                                  +0.08
    optimizer      AdamW                         Muon for matrices (in train.py)                      +1.22
    biases         everywhere                    none
    dropout        0.1                           none

The last column is how much the validation loss of the toy, 3.35 nats per token after 1.1 million tokens, rises when
one change is taken back (tests/ablation.py: each at the learning rate that suits it, the mean of three seeds). Seeds
differ by 0.03, so believe the optimizer, positions, MLP and head, and of the norm that RMSNorm, which is simpler, does
as well. Runs as short as this reward what learns fast, and the gains depend on each other: do not expect the same ones
in a large model. The defaults of GPTConfig are today's column, except that each query head has its own key and value.
One switch goes beyond both columns: with ngram_rows, the last two and three tokens have embeddings of their own.

Shapes use one alphabet: B batch, T time, C channels, H query heads, K key/value heads, D channels per head, L layers,
S maximum sequence length, E experts, V vocabulary. The file goes from the leaves to the root: norm, positions, cache,
attention, MLP, experts, block, GPT; then how it generates, the presets, and weights made a model again. It needs
torch alone: copy it beside a notebook and import it.

    python model.py        list the presets with their parameters, FLOPs and cache sizes
"""

import argparse
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Literal, Self, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

HUGE = 1e15  # stands for "no upper limit" in the table of legal ranges


@dataclass
class GPTConfig:
    """The shape of a model. Sizes left at None are derived from the others. Each field is also a flag of train.py, and
    the comment after it is the flag's help text. A new field must default to what older checkpoints, which lack it,
    computed. Raises ValueError for illegal values and for sizes that do not fit together."""

    vocab_size: int | None = None  # number of token ids (default: the data set's)
    seq_len: int = 128  # maximum sequence length in tokens
    n_layer: int = 2  # number of blocks
    n_head: int = 4  # query heads
    n_kv_head: int | None = None  # key/value heads, each shared by n_head / n_kv_head query heads (default: n_head)
    n_embd: int = 128  # channels
    head_dim: int | None = None  # channels per head (default: n_embd / n_head)
    n_inner: int | None = None  # channels inside the MLP (default: 4 n_embd; gated 8/3 n_embd, in multiples of 64)
    norm: Literal["rms", "layer"] = "rms"  # RMSNorm or LayerNorm
    norm_eps: float = 1e-6  # added to the variance in norms
    position: Literal["rope", "learned"] = "rope"  # rotary or learned positions
    rope_base: float = 10_000.0  # rotary wavelengths range from 2 pi to about 2 pi times this, in tokens
    rope_factor: float | None = None  # slow rotations are this much slower, as in Llama 3.1 (default: no slower)
    qk_norm: bool = True  # normalise the queries and keys of each head
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"  # activation function of the MLP
    gated: bool = True  # multiply the MLP's activation by a second projection
    bias: bool = False  # biases in linear layers and LayerNorms
    qkv_bias: bool = False  # biases of queries, keys and values, as in Qwen2
    n_expert: int | None = None  # experts, MLPs side by side in each block (default: a single MLP)
    n_expert_active: int = 2  # experts per token
    renormalise: bool = True  # scale the gates of a token's experts to sum to one
    balance_loss: float = 0.01  # weight of the loss that balances the load of the experts
    router_z_loss: float = 0.001  # weight of the loss that keeps the router's logits small
    post_norm: bool = False  # a second norm after attention and after the MLP, before they are added to x
    attention_cap: float | None = None  # soft cap: limit attention scores to (-cap, cap) by cap tanh(score / cap)
    embedding_scale: float = 1.0  # multiplies token embeddings
    logit_scale: float = 1.0  # multiplies logits
    tied: bool = False  # use the token embedding as the output matrix
    ngram_rows: int | None = None  # rows of the tables of embeddings of the last two and three tokens (default: none)
    dropout: float = 0.0  # fraction of activations set to zero in training

    RANGES = {  # noqa: RUF012 - smallest and largest legal value of each number, where that is not (1, HUGE)
        **dict.fromkeys(("balance_loss", "router_z_loss"), (0, HUGE)),
        **dict.fromkeys(("norm_eps", "rope_base", "attention_cap", "embedding_scale", "logit_scale"), (1e-30, HUGE)),
        "dropout": (0, 0.99),
    }

    def __post_init__(self):
        self.given = asdict(self)  # before sizes are derived, so that another n_embd can derive them again
        for name, hint in get_type_hints(type(self)).items():
            value, legal = getattr(self, name), get_args(hint) or (hint,)  # types, or the values of a Literal
            least, most = self.RANGES.get(name, (1, HUGE))
            if get_origin(hint) is Literal:
                if value not in legal:
                    raise ValueError(f"{name} {value!r} is none of {', '.join(legal)}")
            elif type(value) not in legal and not (type(value) is int and float in legal):
                raise ValueError(f"{name} {value!r} is not of type {' or '.join(kind.__name__ for kind in legal)}")
            elif type(value) in (int, float) and not least <= value <= most:
                raise ValueError(f"{name} {value} is not between {least:g} and {most:g}")

        if self.head_dim is None and self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.n_kv_head = self.n_kv_head or self.n_head
        self.n_inner = self.n_inner or (math.ceil(8 * self.n_embd / 3 / 64) * 64 if self.gated else 4 * self.n_embd)
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}")
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"rotary positions rotate pairs of channels, but head_dim {self.head_dim} is odd")
        if self.n_expert is not None and self.n_expert_active > self.n_expert:
            raise ValueError(f"n_expert_active {self.n_expert_active} is larger than n_expert {self.n_expert}")

    def changed(self, **settings) -> Self:
        """This config with other settings. Unlike dataclasses.replace, it derives sizes again that were derived."""
        return type(self)(**{**self.given, **settings})


def model_settings(settings: dict) -> dict:
    """The settings of GPTConfig in a flat dict that may also hold those of training, such as a checkpoint's."""
    return {f.name: settings[f.name] for f in fields(GPTConfig) if f.name in settings}


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps), scaled (Zhang & Sennrich, 2019)."""

    def forward(self, x: Tensor) -> Tensor:  # weight and x in one dtype, for which torch has a fused kernel
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def make_norm(config: GPTConfig, size: int) -> nn.Module:
    if config.norm == "layer":
        return nn.LayerNorm(size, config.norm_eps, bias=config.bias)
    return RMSNorm(size, config.norm_eps)


Angles = tuple[Tensor, Tensor]  # their cosines and sines [B, 1, T, D]


def rotary_frequencies(config: GPTConfig, device="cpu") -> Tensor:
    """Radians per token [D/2] of each pair of channels. With rope_factor (Llama 3.1), a pair that turns less than once
    in 8,192 tokens, the length of Llama 3's sequences, is slowed down by this factor; one that turns more than four
    times is not; in between, they are mixed."""
    frequencies = config.rope_base ** (-torch.arange(0, config.head_dim, 2, device=device) / config.head_dim)
    if config.rope_factor is None:
        return frequencies
    kept = ((8192 * frequencies / (2 * math.pi) - 1) / 3).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / config.rope_factor)


def rotary_angles(positions: Tensor, config: GPTConfig) -> Angles:
    """Cosine and sine [B, 1, T, D] of the angles by which RoPE (Su et al., 2021) rotates the channels of all heads at
    positions [B, T]. Channels i and i + D/2 are a point in the plane, rotated once every 2 pi base^(2i/D) tokens."""
    angles = (positions[:, None, :, None] * rotary_frequencies(config, positions.device)).repeat(1, 1, 1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """Rotate each pair of channels of x [B, heads, T, D]."""
    cos, sin = (a.to(x.dtype) for a in angles)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Left to GPT.init_weights. On the meta device, torch's own would import its compiler, which takes a second."""


class NgramEmbedding(nn.Module):
    """Adds embeddings of the last two and of the last three tokens to x [B, T, C], so that the first block already sees
    them (Huang et al., 2025). The row of an n-gram is a hash of its tokens, so that different ones may share a row. A
    look-up costs no matrix product."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.tables = nn.ModuleList(Embedding(config.ngram_rows, config.n_embd) for _ in (2, 3))

    def forward(self, x: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
        """`tokens` end with those of x, and may begin with earlier ones. Those before position 0 count as missing."""
        T, hashed = x.size(1), tokens[:, -x.size(1) :]
        for back, table in enumerate(self.tables, start=1):
            earlier = F.pad(tokens, (back, 0))[:, -T - back : -back]  # [B, T], the token `back` places before
            hashed = hashed * 0x9E3779B1 + torch.where(positions >= back, earlier + 1, 0)  # wraps around
            x = x + table((hashed ^ (hashed >> 15)) % table.num_embeddings)
        return x


class KVCache:
    """The keys and values of up to `size` past tokens (default: S), so that generation computes them only once."""

    def __init__(self, config: GPTConfig, batch_size: int, device="cpu", dtype=torch.float32, size: int | None = None):
        size = min(size or config.seq_len, config.seq_len)
        shape = (config.n_layer, batch_size, config.n_kv_head, size, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty_like(self.keys)
        # The cached tokens. GPT.forward adds new ones after all layers have appended; dropping some shortens the cache.
        self.tokens = torch.empty(batch_size, 0, dtype=torch.long, device=device)

    @property
    def length(self) -> int:
        """The number of cached tokens."""
        return self.tokens.size(1)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B, K, T, D] after the entries of `layer`, and return all its keys and values [B, K, .., D]."""
        end = self.length + k.size(2)
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


Mask = Tensor | BlockMask  # which tokens each token sees


def document_mask(documents: Tensor) -> Tensor:
    """Which tokens [B, 1, T, T] each token sees, given the number of each one's document [B, T]: those of its own
    document up to itself."""
    return (documents[:, None, :, None] == documents[:, None, None, :]).tril()


def document_blocks(documents: Tensor) -> BlockMask:
    """The same for FlexAttention (Dong et al., 2024). Its kernel, compiled on CUDA, skips what no token sees, where the
    kernels that take a mask compute all of it."""

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (documents[batch, query] == documents[batch, key]) & (query >= key)

    B, T = documents.shape
    return create_block_mask(sees, B, None, T, T, device=documents.device)


def attention(q, k, v, attn_mask, dropout_p, is_causal, enable_gqa) -> Tensor:
    """scaled_dot_product_attention, by the kernels that are fast on each device."""
    if isinstance(attn_mask, BlockMask):
        return flex_attention(q.to(v.dtype), k.to(v.dtype), v, block_mask=attn_mask, enable_gqa=enable_gqa)
    if enable_gqa and attn_mask is not None and q.device.type == "cuda":  # no kernel there takes a mask and groups
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
        enable_gqa = False
    with torch.autocast("cpu", enabled=False):  # which would cast to bfloat16 what forward() has cast to float32
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, enable_gqa=enable_gqa)


def capped_attention(q, k, v, attn_mask, dropout_p, is_causal, enable_gqa, cap: float) -> Tensor:
    """scaled_dot_product_attention with scores limited to (-cap, cap) before the mask (Gemma 2, Grok-1)."""
    if enable_gqa:  # each key and value serves a group of query heads
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    scores = cap * torch.tanh(q @ k.transpose(2, 3) / math.sqrt(q.size(3)) / cap)
    if is_causal:
        attn_mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    return F.dropout(weights, dropout_p) @ v


class Attention(nn.Module):
    """Causal self-attention. In each head every token has a query (what it looks for), a key (what it offers) and a
    value (what it passes on). Its output is the average of the values of all tokens up to itself, weighted by how well
    their keys match its query: softmax(q k^T / sqrt(D)) v, written out in capped_attention. Query head h uses key/value
    head h // (H / K), known as grouped-query attention (Ainslie et al., 2023)."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        C, H, K, D = config.n_embd, config.n_head, config.n_kv_head, config.head_dim
        self.layer, self.head_dim, self.dropout, self.grouped = layer, D, config.dropout, H != K
        self.query = nn.Linear(C, H * D, bias=config.bias or config.qkv_bias)
        self.key = nn.Linear(C, K * D, bias=config.bias or config.qkv_bias)
        self.value = nn.Linear(C, K * D, bias=config.bias or config.qkv_bias)
        self.out = nn.Linear(H * D, C, bias=config.bias)
        self.query_norm = make_norm(config, D) if config.qk_norm else nn.Identity()
        self.key_norm = make_norm(config, D) if config.qk_norm else nn.Identity()
        cap = config.attention_cap
        self.attend = partial(capped_attention, cap=cap) if cap else attention

    def forward(self, x: Tensor, angles: Angles | None, mask: Mask | None, cache: KVCache | None) -> Tensor:
        """`angles`: of rotary positions. `mask`: which tokens each token sees, by default all up to itself."""
        B, T, _ = x.shape
        q, k, v = self.query(x), self.key(x), self.value(x)
        if torch.is_autocast_enabled("cpu"):  # attention's backward pass in bfloat16 takes three times as long there
            q, k, v = q.float(), k.float(), v.float()
        q, k, v = (heads.view(B, T, -1, self.head_dim) for heads in (q, k, v))  # [B, T, H, D], twice [B, T, K, D]
        q, k, v = self.query_norm(q).transpose(1, 2), self.key_norm(k).transpose(1, 2), v.transpose(1, 2)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)  # [B, H, T, D], [B, K, T, D]
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        dropout = self.dropout if self.training else 0.0
        causal = mask is None and T > 1  # a single new token sees all that are cached
        y = self.attend(q, k, v, mask, dropout, is_causal=causal, enable_gqa=self.grouped)  # [B, H, T, D]
        return self.out(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with an activation between them, applied to each token on its own. With a third layer as a gate
    it is SwiGLU, if the activation is SiLU, or GeGLU, if it is GELU (Shazeer, 2020)."""

    ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}  # noqa: RUF012

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.up = nn.Linear(config.n_embd, config.n_inner, bias=config.bias)
        self.down = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)
        self.gate = nn.Linear(config.n_embd, config.n_inner, bias=config.bias) if config.gated else None
        self.activation = self.ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    """A mixture of E experts, MLPs of which a router picks a few for each token, so that compute grows with those few
    only (Shazeer et al., 2017). Two auxiliary losses keep the router healthy in training: one is smallest when tokens
    and probability are spread evenly over the experts (Switch Transformer, Fedus et al., 2021), the other keeps the
    router's logits near zero (ST-MoE, Zoph et al., 2022)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.router = nn.Linear(config.n_embd, config.n_expert, bias=False)
        self.experts = nn.ModuleList(MLP(config) for _ in range(config.n_expert))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)  # [N, C] with N = B T
        with torch.autocast(x.device.type, enabled=False):  # route in float32
            logits = F.linear(tokens.float(), self.router.weight.float())  # [N, E]
        probabilities = logits.softmax(-1)
        gates, chosen = probabilities.topk(self.config.n_expert_active)  # [N, active]
        if self.config.renormalise:
            gates = gates / gates.sum(-1, keepdim=True)

        assigned = chosen.flatten()  # [N * active]: the expert of each token's first choice, second choice, ...
        by_expert = assigned.argsort(stable=True)  # the choices, grouped by expert
        sources = by_expert // self.config.n_expert_active  # the token that made each choice
        counts = assigned.bincount(minlength=len(self.experts))  # [E]
        parts = tokens[sources].split(counts.tolist())
        outputs = torch.cat([expert(part) for expert, part in zip(self.experts, parts)])
        outputs = outputs * gates.flatten()[by_expert, None]

        self.load = counts / counts.sum()  # each expert's share of the tokens
        balance = len(self.experts) * (self.load * probabilities.mean(0)).sum()
        z = logits.logsumexp(-1).square().mean()
        self.router_loss = self.config.balance_loss * balance + self.config.router_z_loss * z
        return torch.zeros_like(tokens).index_add(0, sources, outputs.to(tokens.dtype)).view_as(x)


class Block(nn.Module):
    """Attention, which moves information between tokens, then an MLP. Each reads x through a norm and adds to it."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attention_norm = make_norm(config, config.n_embd)
        self.attention = Attention(config, layer)
        self.mlp_norm = make_norm(config, config.n_embd)
        self.mlp = Experts(config) if config.n_expert else MLP(config)
        self.attention_post_norm = make_norm(config, config.n_embd) if config.post_norm else nn.Identity()
        self.mlp_post_norm = make_norm(config, config.n_embd) if config.post_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, angles: Angles | None, mask: Mask | None, cache: KVCache | None) -> Tensor:
        x = x + self.dropout(self.attention_post_norm(self.attention(self.attention_norm(x), angles, mask, cache)))
        return x + self.dropout(self.mlp_post_norm(self.mlp(self.mlp_norm(x))))


def initial_rows(config: GPTConfig, name: str, shape: torch.Size, rows: range, seed: int) -> Tensor:
    """These rows of a parameter of a new model, whose whole shape is `shape`. Each block starts as the identity, and
    all tokens start equally likely: the first loss is ln V (tied: about ln V). Each 128 rows have random numbers of
    their own, so that a process that holds a part of the model need not draw the rest."""
    # The last weights of a block's two branches: at zero, the block adds nothing to x.
    zeroed = ("post_norm.weight",) if config.post_norm else (".out.weight", ".down.weight")
    if name.endswith(("bias", "head.weight", *zeroed)) or name.startswith("ngrams"):
        return torch.zeros(len(rows), *shape[1:])
    if len(shape) == 1:  # the other norms start as plain normalisation
        return torch.ones(len(rows))
    chunks = [torch.empty(0, *shape[1:])]
    for start in range(rows.start // 128 * 128, rows.stop, 128):
        chunk_seed = hashlib.sha256(f"{seed} {name} {start}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(chunk_seed[:7]))
        chunk = torch.empty(min(128, shape[0] - start), *shape[1:])
        chunks.append(chunk.normal_(std=0.02, generator=generator))  # as in GPT-2; the norms make up for the scale
    return torch.cat(chunks)[rows.start % 128 :][: len(rows)]


def token_losses(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy [N] in nats of each target [N], from the last norm's outputs x [N, C] and the head [V, C]."""
    return F.cross_entropy(F.linear(x, head).float(), targets, reduction="none")


def rows_at_once(device: str, vocab_size: int) -> int:
    """For how many tokens to compute logits at once: they fit into a CPU's caches, or into a GB of an accelerator."""
    return max(256, 2 ** (20 if device == "cpu" else 28) // vocab_size)


class TotalLoss(torch.autograd.Function):
    """The sum of token_losses. Computes its gradients already in forward(), part by part, so that the logits of all
    tokens, which would be the largest tensor of a model with a large vocabulary, never exist together."""

    @staticmethod
    def forward(ctx, x: Tensor, head: Tensor, targets: Tensor, losses_of: Callable) -> Tensor:
        rows = rows_at_once(x.device.type, len(head))
        parts, head, total = x.detach().split(rows), head.detach().requires_grad_(), x.new_zeros(())
        for part, part_targets in zip(parts, targets.split(rows)):
            with torch.enable_grad():
                loss = losses_of(part.requires_grad_(), head, part_targets).sum()
            loss.backward()
            total += loss.detach()
        ctx.save_for_backward(torch.cat([part.grad for part in parts]), head.grad)
        return total

    @staticmethod
    def backward(ctx, scale: Tensor) -> tuple:
        dx, d_head = ctx.saved_tensors
        return dx * scale, d_head * scale, None, None


class GPT(nn.Module):
    """Maps tokens to the logits of the token after each of them: tokens [B, T] -> embeddings x [B, T, C] -> blocks, of
    which each adds to x -> norm -> head -> logits [B, T, V]. The rest of forward() is for packed documents and a
    cache."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.n_embd)
        self.ngrams = NgramEmbedding(config) if config.ngram_rows else None
        self.positions = Embedding(config.seq_len, config.n_embd) if config.position == "learned" else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = make_norm(config, config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.token_losses, self.document_mask = token_losses, document_mask  # train.py has faster ones for CUDA
        self.tie_head()
        if not self.head.weight.is_meta:
            self.init_weights()

    def tie_head(self) -> None:
        """Make a tied head share the embedding's weights. Needed again after a move that creates new parameters."""
        if self.config.tied:
            self.head.weight = self.embedding.weight

    @torch.no_grad()
    def init_weights(self) -> None:
        seed = int(torch.randint(2**62, ()))
        for name, parameter in self.named_parameters():  # lists a tied head as the embedding
            parameter.copy_(initial_rows(self.config, name, parameter.shape, range(len(parameter)), seed))

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        documents: Tensor | None = None,
        cache: KVCache | None = None,
        only_last: bool = False,
        reduction: Literal["mean", "none"] = "mean",
    ) -> Tensor:
        """Return the logits [B, T, V] of the token after each of `tokens` [B, T], or after the last one only [B, 1, V].
        With `targets` [B, T], return their mean cross-entropy in nats instead, in training plus the routers' losses, or
        with reduction "none" that of each [B, T]; a target of -100 does not count. `documents` [B, T] numbers the
        document of each token, in rising order: attention and positions then stay inside a document. With a cache,
        `tokens` continue its sequence and are added to it. Raises ValueError beyond S positions."""
        T = tokens.size(1)
        start = cache.length if cache is not None else 0
        if (end := start + T) > self.config.seq_len:
            raise ValueError(f"a sequence of {end} tokens is longer than seq_len {self.config.seq_len}")
        positions = torch.arange(start, end, device=tokens.device)[None]  # [1, T]
        mask = None  # each token sees all tokens up to itself
        if documents is not None:
            starts = torch.searchsorted(documents, documents)  # [B, T]: the first place of the same document number
            positions = positions - starts
            mask = self.document_mask(documents)
        elif start > 0 and T > 1:  # several new tokens after cached ones
            mask = torch.ones(T, end, dtype=torch.bool, device=tokens.device).tril(start)
        so_far = tokens if cache is None else torch.cat((cache.tokens, tokens), dim=1)

        x = self.embedding(tokens) * self.config.embedding_scale
        if self.ngrams is not None:
            x = self.ngrams(x, so_far, positions)
        if self.positions is not None:
            x = x + self.positions(positions)
        x = self.dropout(x)
        angles = rotary_angles(positions, self.config) if self.config.position == "rope" else None
        for block in self.blocks:
            x = block(x, angles, mask, cache)
        if cache is not None:
            cache.tokens = so_far
        x = self.norm(x[:, -1:] if only_last else x) * self.config.logit_scale  # [B, T, C], smaller than the logits
        if targets is None:
            return self.head(x)
        x, head = x.flatten(0, 1), self.head.weight
        if reduction == "none":
            rows = rows_at_once(x.device.type, len(head))
            parts = zip(x.split(rows), targets.flatten().split(rows))
            losses = [self.token_losses(part, head, part_targets) for part, part_targets in parts]
            return torch.cat(losses).view_as(targets)
        loss = TotalLoss.apply(x, head, targets.flatten(), self.token_losses) / (targets != -100).sum()
        if self.training:
            loss = loss + sum(layer.router_loss for layer in self.expert_layers())
        return loss

    def expert_layers(self) -> list[Experts]:
        """The mixtures of experts, one per block; none in a dense model."""
        return [block.mlp for block in self.blocks if isinstance(block.mlp, Experts)]

    def n_params(self) -> int:
        """Number of parameters. A tied head counts once."""
        return sum(p.numel() for p in self.parameters())

    def n_active_params(self) -> int:
        """Number of parameters that a single token uses: all but those of the experts that it skips."""
        skipped = [expert for layer in self.expert_layers() for expert in layer.experts[self.config.n_expert_active :]]
        return self.n_params() - sum(p.numel() for expert in skipped for p in expert.parameters())

    def flops_per_token(self) -> int:
        """Training FLOPs per token of a full sequence: 6 per weight in a matrix product (2 forward, 4 backward), plus
        12 L H D S for attention (PaLM, appendix B)."""
        c = self.config
        linear = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        skipped = self.n_params() - self.n_active_params()
        return 6 * (linear - skipped) + 12 * c.n_layer * c.n_head * c.head_dim * c.seq_len


def sample_next(
    logits: Tensor, temperature: float = 0.8, top_k: int | None = None, top_p: float | None = None, generator=None
) -> Tensor:
    """Draw a token id [B] for each row of logits [B, V]. Temperature 0 takes the most likely token. `top_k` limits the
    draw to the k most likely tokens, `top_p` to the fewest that together have that probability (nucleus sampling,
    Holtzman et al., 2019)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        smallest_kept = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -math.inf)
    if top_p is not None:
        probabilities, ids = logits.softmax(-1).sort(descending=True)
        likelier = probabilities.cumsum(-1) - probabilities  # total probability of the more likely tokens
        dropped = (likelier >= top_p).gather(-1, ids.argsort(-1))  # back in the order of ids
        logits = logits.masked_fill(dropped, -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@torch.no_grad()
def generate(
    model: GPT,
    tokens: Tensor,
    n_vocab: int | None = None,
    cache: KVCache | None = None,
    n_tokens: int | None = None,
    **options,
) -> Iterator[Tensor]:
    """Yield the ids [B] that continue tokens [B, T], one step at a time, without end. `options` go to sample_next.
    `n_vocab` is the size of the tokenizer's vocabulary, where the model pads it with ids that have no meaning. A cache
    from an earlier call saves computing again what both sequences begin with. `n_tokens`, if it is known how many will
    be drawn, keeps a new cache small.

    The first step computes the whole prompt (prefill), and each later one a single token (decoding), which takes as
    long as reading all weights and the cache. When the sequence outgrows the model's S positions, only its newest S / 2
    tokens are kept."""
    S = model.config.seq_len
    size = tokens.size(1) + n_tokens if n_tokens else S
    cache = cache or KVCache(model.config, len(tokens), tokens.device, model.embedding.weight.dtype, size)
    n = min(cache.length, tokens.size(1) - 1)  # at least the last token is computed, for its logits
    n_common = int((cache.tokens[:, :n] == tokens[:, :n]).all(0).cumprod(0).sum())
    cache.tokens = cache.tokens[:, :n_common]
    unseen = tokens[:, n_common:]  # the prompt at first, later the newest token alone
    while True:
        if cache.length + unseen.size(1) > S:
            unseen = torch.cat((cache.tokens, unseen), dim=1)[:, -max(1, S // 2) :]
            cache.tokens = cache.tokens[:, :0]
        logits = model(unseen, cache=cache, only_last=True)[:, -1, :n_vocab]
        unseen = sample_next(logits, **options)[:, None]
        yield unseen[:, 0]


class Int8Linear(nn.Module):
    """A linear layer for sampling on a CPU, with 8-bit integers as weights and a scale for each output channel. A new
    token reads every weight once, so a quarter of the bytes takes about a third of the time."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight, self.bias = linear.weight.detach().float(), linear.bias
        self.scale = (weight.abs().amax(1) / 127).clamp(min=1e-30).bfloat16()
        self.weight = (weight / self.scale[:, None].float()).round().clamp(-127, 127).to(torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        if 0 < len(rows) <= 64:  # new tokens; the kernel is slow for many at once and crashes on zero rows
            parts = rows.bfloat16().split(16)
            y = torch.cat([torch._weight_int8pack_mm(part, self.weight, self.scale) for part in parts]).to(x.dtype)
        else:  # a prompt
            y = F.linear(rows, self.weight.to(x.dtype) * self.scale[:, None].to(x.dtype))
        y = y.unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


def to_int8(model: GPT) -> None:
    """Replace the model's linear layers by Int8Linear: all but routers, which are not called as layers, and those whose
    inputs are no multiple of 16, which the kernel reads at a time."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and name != "router" and child.in_features % 16 == 0:
                setattr(module, name, Int8Linear(child))


# ---------------------------------------------------------------------------------------------------------------------
# Presets: each lists what differs from the defaults of GPTConfig. How to train them is in the RECIPES of train.py

# fmt: off
GPT2 = dict(vocab_size=50257, seq_len=1024, norm="layer", norm_eps=1e-5, position="learned", qk_norm=False,
            activation="gelu_tanh", gated=False, bias=True, tied=True)
LLAMA = dict(vocab_size=128256, seq_len=8192, n_kv_head=8, norm_eps=1e-5, rope_base=500_000.0, qk_norm=False)
LLAMA32 = dict(LLAMA, seq_len=131072, rope_factor=32.0, tied=True)
QWEN25 = dict(vocab_size=151936, seq_len=32768, rope_base=1_000_000.0, qk_norm=False, qkv_bias=True)
QWEN3 = dict(vocab_size=151936, seq_len=40960, n_kv_head=8, head_dim=128, rope_base=1_000_000.0)
MIXTRAL = dict(LLAMA, vocab_size=32000, seq_len=32768, rope_base=1_000_000.0, n_expert=8)
GROK = dict(norm_eps=1e-5, qk_norm=False, activation="gelu_tanh", n_expert=8, renormalise=False, post_norm=True,
            attention_cap=30.0, tied=True)

PRESETS: dict[str, dict] = {
    "toy": dict(n_kv_head=2),
    "grok-toy": dict(GROK, n_kv_head=2, n_inner=192),
    "shakespeare-quick": dict(seq_len=64, n_layer=1, n_head=2, n_kv_head=1, n_embd=64, n_inner=128, ngram_rows=16384),
    "shakespeare": dict(seq_len=256, n_layer=4, n_head=3, n_embd=192),
    "gpt2": dict(GPT2, n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(GPT2, n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(GPT2, n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(GPT2, n_layer=48, n_head=25, n_embd=1600),
    "llama3-8b": dict(LLAMA, n_layer=32, n_head=32, n_embd=4096, n_inner=14336),
    "llama3-70b": dict(LLAMA, n_layer=80, n_head=64, n_embd=8192, n_inner=28672),
    "llama3-405b": dict(LLAMA, n_layer=126, n_head=128, n_embd=16384, n_inner=53248),
    "llama3.2-1b": dict(LLAMA32, n_layer=16, n_head=32, n_embd=2048, n_inner=8192),
    "llama3.2-3b": dict(LLAMA32, n_layer=28, n_head=24, n_embd=3072, n_inner=8192),
    "qwen2.5-0.5b": dict(QWEN25, n_layer=24, n_head=14, n_kv_head=2, n_embd=896, n_inner=4864, tied=True),
    "qwen2.5-1.5b": dict(QWEN25, n_layer=28, n_head=12, n_kv_head=2, n_embd=1536, n_inner=8960, tied=True),
    "qwen2.5-7b": dict(QWEN25, vocab_size=152064, n_layer=28, n_head=28, n_kv_head=4, n_embd=3584, n_inner=18944),
    "qwen3-0.6b": dict(QWEN3, n_layer=28, n_head=16, n_embd=1024, n_inner=3072, tied=True),
    "qwen3-1.7b": dict(QWEN3, n_layer=28, n_head=16, n_embd=2048, n_inner=6144, tied=True),
    "qwen3-4b": dict(QWEN3, n_layer=36, n_head=32, n_embd=2560, n_inner=9728, tied=True),
    "qwen3-8b": dict(QWEN3, n_layer=36, n_head=32, n_embd=4096, n_inner=12288),
    "qwen3-14b": dict(QWEN3, n_layer=40, n_head=40, n_embd=5120, n_inner=17408),
    "qwen3-32b": dict(QWEN3, n_layer=64, n_head=64, n_embd=5120, n_inner=25600),
    "mixtral-8x7b": dict(MIXTRAL, n_layer=32, n_head=32, n_embd=4096, n_inner=14336),
    "grok-1": dict(GROK, vocab_size=131072, seq_len=8192, n_layer=64, n_head=48, n_kv_head=8, n_embd=6144,
                   n_inner=32768, embedding_scale=6144**0.5, logit_scale=3**-0.5),
}
# fmt: on


# ---------------------------------------------------------------------------------------------------------------------
# From weights to a model on a device


def empty_model(config: GPTConfig, n_tensors: int) -> GPT:
    """The model on the meta device, without memory for its weights. Raises ValueError if `n_tensors` cannot fill its
    layers, since a damaged config could ask for millions of them."""
    if config.n_layer * (config.n_expert or 1) > n_tensors:
        raise ValueError(f"{config.n_layer} layers cannot be filled from {n_tensors} tensors")
    with torch.device("meta"):
        return GPT(config)


def model_with(config: GPTConfig, weights: dict[str, Tensor]) -> GPT:
    """The model with the tensors of `weights` as its parameters, neither copied nor converted."""
    model = empty_model(config, len(weights))
    if config.tied:  # files hold a tied head once, as the embedding
        weights = {**weights, "head.weight": weights["embedding.weight"]}
    model.load_state_dict(weights, assign=True)
    model.tie_head()
    return model


def choose_device(name: str | None, local_rank: int = 0) -> tuple[torch.device, str]:
    """The device called `name`, by default the accelerator if there is one, and the reason for the choice. Raises
    ValueError if the device cannot be used."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator and name in (None, accelerator.type):
        index = local_rank % torch.accelerator.device_count()
        torch.accelerator.set_device_index(index)
        return torch.device(accelerator.type, index), "found" if name is None else "as set"
    if name is None:
        return torch.device("cpu"), "no accelerator found"
    try:
        float(torch.ones((), device=name))
        return torch.device(name), "as set"
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0][:200]}") from error


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for products in bfloat16, instead of emulating them slowly."""
    if device.type == "cpu":
        return torch.cpu.get_capabilities().get("avx512_bf16", False)
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def main() -> None:
    """Print the size of each preset. Models are built on the meta device, which allocates no memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    print(f"{'preset':17}{'parameters':>17}{'active':>17}{'FLOP/token':>20}{'cache bytes/token':>19}")
    for name, preset in PRESETS.items():
        config = GPTConfig(**{"vocab_size": 4096, **preset})
        with torch.device("meta"):
            model, cache = GPT(config), KVCache(config, 1, "meta", torch.bfloat16)
        cache_bytes = (cache.keys.nbytes + cache.values.nbytes) // config.seq_len
        counts = f"{model.n_params():17,}{model.n_active_params():17,}{model.flops_per_token():20,}"
        print(f"{name:17}{counts}{cache_bytes:19,}")
    print("Presets without a vocabulary of their own are counted with 4,096 tokens.")


if __name__ == "__main__":
    main()
