"""GGUF files, against llama.cpp itself: the same ids, the same greedy text, the same answers."""

import json
import random
from collections import Counter
from contextlib import contextmanager
from functools import cache
from itertools import islice, takewhile
from unittest.mock import Mock
from urllib.request import Request, urlopen

import pytest
import regex
import torch
from conftest import words

import chat
import model as models
import published
import tokenizer as tokenizers
from model import GPT, GPTConfig, generate
from tokenizer import GPT4_PATTERN, Tokenizer, byte_tokenizer, train_bpe

SHAPE = {"seq_len": 128, "n_layer": 2, "n_head": 4, "n_embd": 64}
FAMILIES = {
    "gpt2": {**models.GPT2, **SHAPE},
    "llama-3.2": {**models.LLAMA, **SHAPE, "n_kv_head": 2, "n_inner": 96, "tied": True, "rope_factor": 8.0},
    "llama-biases-wide-heads": {**models.LLAMA, **SHAPE, "n_kv_head": 4, "n_inner": 96, "bias": True, "head_dim": 24},
    "qwen2": {**models.QWEN25, **SHAPE, "n_kv_head": 2, "n_inner": 96},
    "qwen3": {**SHAPE, "n_kv_head": 1, "head_dim": 32},
    "qwen3_moe": {**SHAPE, "n_kv_head": 2, "n_inner": 96, "n_expert": 4},
    "mixtral": {**models.MIXTRAL, **SHAPE, "n_kv_head": 2, "n_inner": 96, "n_expert": 6, "n_expert_active": 3},
}


@cache
def trained(pattern: str) -> Tokenizer:
    counts = Counter(regex.findall(pattern, words(3000) + " 1234 \n\n don't DON'T\n" * 99))
    ranks = train_bpe(counts, 400)
    special = {name: len(ranks) + i for i, name in enumerate((*tokenizers.SPECIAL_TOKENS, "<|begin_of_text|>"))}
    added = {"<think>": len(ranks) + 4, "</think>": len(ranks) + 5}
    return Tokenizer("trained", pattern, ranks, special, added=added, begin=special["<|begin_of_text|>"])


@contextmanager
def llama_cpp(path):
    """Serve a file. Yields post("/tokenize", content="text"), which returns the answer to a request."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="pip install xllamacpp to compare with llama.cpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(path), 0, 1
    params.warmup, params.use_jinja, params.cpuparams.n_threads = False, True, 1
    params.cache_type_k = params.cache_type_v = type(params.cache_type_k)(0)  # float32: near ties fall as here
    params.flash_attn_type = type(params.flash_attn_type)(0)  # off
    server = xllamacpp.Server(params)

    def post(where: str, **body) -> dict:
        headers = {"Content-Type": "application/json"}
        request = Request(server.listening_address + where, json.dumps(body).encode(), headers)
        with urlopen(request, timeout=30) as response:
            return json.loads(response.read())

    yield post


def wild_model(**settings) -> GPT:
    """Random weights, large enough for its logits to differ clearly."""
    torch.manual_seed(3)
    model = GPT(GPTConfig(**settings)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.15)
    return model


def saved(path, tokenizer: Tokenizer, settings: dict, is_chat=False, half=False) -> GPT:
    """A wild model and its file."""
    pytest.importorskip("gguf")
    model = wild_model(**{**settings, "vocab_size": tokenizer.n_vocab})
    model = model.half().float() if half else model
    published.save_gguf(path, model.config, model.state_dict(), tokenizer, is_chat, half)
    return model


def drawn(model: GPT, tokenizer: Tokenizer, ids: list[int], n: int, temperature: float = 0) -> list[int]:
    """At most n tokens that follow `ids`, until one ends the text."""
    tokens = (new.item() for new in islice(generate(model, torch.tensor([ids]), temperature=temperature), n))
    return list(takewhile(lambda token: token not in tokenizer.ends, tokens))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_continues_a_text_as_sample_py_does(tmp_path, family, half):
    tokenizer = trained(GPT4_PATTERN)
    model = saved(tmp_path / "m.gguf", tokenizer, FAMILIES[family], half=half)
    with llama_cpp(tmp_path / "m.gguf") as post:
        for prompt in ("the small model", "naïve café 你好", "x"):
            n = 10 if half else 30  # llama.cpp rounds what it multiplies with float16, so that near ties may fall apart
            tokens = post("/completion", prompt=prompt, n_predict=n, top_k=1, return_tokens=True)["tokens"]
            ids = [tokenizer.begin, *tokenizer.encode(prompt).tolist()]
            assert [token for token in tokens if token not in tokenizer.ends] == drawn(model, tokenizer, ids, n)


@pytest.mark.parametrize("name", ["GPT4_PATTERN", "GPT2_PATTERN", "DIGITS_PATTERN", "QWEN_PATTERN", "byte"])
def test_llama_cpp_gives_text_the_same_ids(tmp_path, name):
    tokenizer = byte_tokenizer() if name == "byte" else trained(getattr(tokenizers, name))
    saved(tmp_path / "m.gguf", tokenizer, FAMILIES["qwen3"])
    rng, parts = random.Random(0), [*"abZé中🙂\n \t7'_-…\u200d", "\r\n", "  ", "'s", "DON'T", "the", " small", "12345"]
    parts += ["<think>", "</think>", "<|im_end"]
    with llama_cpp(tmp_path / "m.gguf") as post:
        for _ in range(500):
            text = "".join(rng.choices(parts, k=rng.randrange(1, 40)))
            ids = post("/tokenize", content=text, add_special=False)["tokens"]
            assert ids == tokenizer.encode(text).tolist(), repr(text)


def test_llama_cpp_renders_a_conversation_and_begins_it_with_no_other_token(tmp_path):
    tokenizer = trained(GPT4_PATTERN)
    model = saved(tmp_path / "m.gguf", tokenizer, FAMILIES["qwen3"], is_chat=True)
    turns = [("system", "Be brief."), ("user", " the small "), ("assistant", "model\n"), ("user", "what?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    with llama_cpp(tmp_path / "m.gguf") as post:
        prompt = post("/apply-template", messages=messages)["prompt"]
        answer = post("/completion", prompt=prompt, n_predict=20, top_k=1, return_tokens=True)
    ids = chat.render(tokenizer, messages, ask=True)[0].tolist()
    told = [token for token in answer["tokens"] if token not in tokenizer.ends]
    assert told == drawn(model, tokenizer, ids, 20) and answer["tokens_evaluated"] == len(ids)


def test_an_exported_file_gets_its_name_when_it_is_whole(call, refused, monkeypatch, run, tmp_path):
    gguf = pytest.importorskip("gguf")
    call(published, "--export", "mine.gguf", run)
    assert gguf.GGUFReader("mine.gguf").get_field("general.name").contents() == "mine"
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", Mock(side_effect=OSError("the disk is full")))
    assert "the disk is full" in refused(published, "--export", "other.gguf", run)
    assert [path.name for path in tmp_path.glob("*.gguf*")] == ["mine.gguf"]


@pytest.mark.parametrize("settings, pattern, told", [
    ({**FAMILIES["qwen3_moe"], "renormalise": False}, GPT4_PATTERN, "qwen3moe with renormalise True, not False"),
    ({**FAMILIES["llama-3.2"], "activation": "gelu"}, GPT4_PATTERN, "llama with activation silu, not gelu"),
    ({**FAMILIES["qwen3"], "post_norm": True}, GPT4_PATTERN, "no published family has this combination"),
    (FAMILIES["qwen3"], r"\p{L}+|.", "no name for the pattern of the tokenizer trained"),
])
def test_what_llama_cpp_computes_in_another_way_is_refused_by_name(tmp_path, settings, pattern, told):
    with pytest.raises(ValueError, match=told):
        saved(tmp_path / "m.gguf", trained(pattern), settings)
