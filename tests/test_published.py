"""Weights of published models, in and out: each family against what transformers computes.

Where transformers is installed, it is asked itself. Everywhere, golden/FAMILY.npz says what it computed from small
random weights; `python tests/test_published.py` writes those files anew.
"""

import json
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import regex
import torch
from conftest import TINY, rows

import model as models
import prepare
import published
import sample
import train
from model import GPTConfig, generate, load_checkpoint, model_with
from published import load_model, load_published, save_published

GOLDEN = Path(__file__).with_name("golden")
LLAMA = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 24,
}
GPT2 = {"vocab_size": 61, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 4}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN3_MOE = dict(LLAMA, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
VARIANTS = {  # the first of each family is the golden one
    "gpt2": dict(GPT2),
    "gpt2-exact-gelu-narrow-untied": dict(
        GPT2, n_head=2, n_inner=24, activation_function="gelu", tie_word_embeddings=False, layer_norm_epsilon=1e-3
    ),
    "llama": dict(LLAMA, rope_theta=500_000.0, rms_norm_eps=1e-5),
    "llama-tied-full-heads": dict(LLAMA, num_key_value_heads=4, tie_word_embeddings=True),
    "llama-biases-wide-heads": dict(LLAMA, attention_bias=True, mlp_bias=True, head_dim=12, hidden_act="gelu"),
    "qwen3": dict(LLAMA, head_dim=16, tie_word_embeddings=True),
    "qwen3-untied-one-kv-head": dict(LLAMA, head_dim=6, num_key_value_heads=1, rms_norm_eps=1e-3),
    "qwen3_moe": dict(QWEN3_MOE, norm_topk_prob=True),
    "qwen3_moe-not-renormalised-tied": dict(QWEN3_MOE, norm_topk_prob=False, tie_word_embeddings=True),
    "mixtral": dict(LLAMA, **EXPERTS),
    "mixtral-three-of-six-full-heads": dict(
        LLAMA, num_local_experts=6, num_experts_per_tok=3, num_key_value_heads=4, rms_norm_eps=1e-3
    ),
}
FAMILIES = ("gpt2", "llama", "qwen3", "qwen3_moe", "mixtral")


def theirs(variant: str):
    """A model of transformers with random weights, large enough for its logits to differ clearly."""
    transformers = pytest.importorskip("transformers")
    family = published.FAMILIES[variant.partition("-")[0]]
    cls = getattr(transformers, family.architecture)
    torch.manual_seed(sum(variant.encode()))
    model = cls(cls.config_class(**VARIANTS[variant])).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p.normal_(std=0.3) + (p.ndim == 1)).half())  # exact in half the bytes
    return model


def load(folder: Path) -> models.GPT:
    return model_with(*load_published(folder)).eval()


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def golden(tmp_path):
    """golden("llama") unpacks a golden file into a folder as it could be downloaded; returns it, tokens and logits."""

    def unpack(family: str) -> tuple[Path, torch.Tensor, torch.Tensor]:
        file = np.load(GOLDEN / f"{family}.npz")
        weights = {name: torch.from_numpy(file[name].astype(np.float32)) for name in file if "." in name}
        torch.save(weights, tmp_path / "pytorch_model.bin")
        (tmp_path / "config.json").write_text(str(file["config"]))
        return tmp_path, torch.from_numpy(file["tokens"]).long(), torch.from_numpy(file["logits"])

    return unpack


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_of_the_golden_file_are_computed(golden, family):
    folder, tokens, logits = golden(family)
    assert logits.std() > 0.1
    assert (load(folder)(tokens) - logits).abs().max() < 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_that_transformers_saved_give_its_logits_and_its_greedy_text(variant, tmp_path):
    reference = theirs(variant)
    reference.save_pretrained(tmp_path)
    model, tokens = load(tmp_path), random_tokens(2, 20)
    with torch.no_grad():
        assert (model(tokens) - reference(tokens).logits).abs().max() < 1e-4
        text = reference.generate(tokens[:1, :4], max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert [ids.item() for ids in islice(generate(model, tokens[:1, :4], temperature=0), 20)] == text[0, 4:].tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_computes_the_logits_of_weights_that_we_saved(variant, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs(variant).save_pretrained(tmp_path / "in")
    config, _ = load_published(tmp_path / "in")
    torch.manual_seed(0)
    model, tokens = models.GPT(config).eval(), random_tokens(2, 20)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
        save_published(tmp_path / "out", config, model.state_dict())
        read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        assert type(read).__name__ == published.FAMILIES[variant.partition("-")[0]].architecture
        assert (read(tokens).logits - model(tokens)).abs().max() < 1e-4


def test_gpt2_as_openai_released_it_has_shorter_names_and_masks_among_its_tensors(golden):
    folder, tokens, logits = golden("gpt2")
    weights = torch.load(folder / "pytorch_model.bin")
    old = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    torch.save(old | {"h.0.attn.bias": torch.ones(1, 1, 24, 24).tril()}, folder / "pytorch_model.bin")
    assert (load(folder)(tokens) - logits).abs().max() < 1e-4


def test_weights_in_several_files_are_put_together(golden):
    save_file = pytest.importorskip("safetensors.torch").save_file
    folder, tokens, logits = golden("llama")
    weights = torch.load(folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").unlink()
    for part in (1, 2):
        names = sorted(weights)[part - 1 :: 2]
        save_file({name: weights[name] for name in names}, folder / f"model-0000{part}-of-00002.safetensors")
    assert (load(folder)(tokens) - logits).abs().max() < 1e-4


def test_a_second_copy_of_a_tied_head_is_passed_over(golden):
    folder, tokens, logits = golden("qwen3")
    weights = torch.load(folder / "pytorch_model.bin")
    torch.save({**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}, folder / "pytorch_model.bin")
    model = load(folder)
    assert (model(tokens) - logits).abs().max() < 1e-4
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize(
    "config, weights, told",
    [
        ({"model_type": "bert"}, {}, "'bert', none of gpt2, llama"),
        ({"rope_scaling": {"rope_type": "llama3"}}, {}, "rope_type of .* is 'llama3'"),
        ({"sliding_window": 4096}, {}, "sliding_window of .* is 4096"),
        ({"hidden_act": "relu"}, {}, "activation 'relu'"),
        ({"num_hidden_layers": 10**9}, {}, "1000000000 layers cannot be filled from 21 tensors"),
        ({"num_hidden_layers": 3}, {}, "misses model.layers.2.* and 8 other tensors"),
        ({"num_hidden_layers": 1}, {}, "also holds model.layers.1.* and 8 other tensors"),
        ({"hidden_size": 64}, {}, "model.embed_tokens.weight .* the shape \\[61, 32\\], not \\[61, 64\\]"),
        ({}, {"model.norm.weight": torch.ones(32, dtype=torch.int8)}, "model.norm.weight .* torch.int8"),
        ({}, {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, "also holds .*q_proj.bias"),
    ],
)
def test_what_cannot_be_taken_over_is_named(golden, config, weights, told):
    folder, _, _ = golden("llama")
    before = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(before | config))
    torch.save(torch.load(folder / "pytorch_model.bin") | weights, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=told):
        load_published(folder)


@pytest.mark.parametrize(
    "switch, told",
    [
        ({"post_norm": True, "attention_cap": 30.0}, "qwen3, lacks post_norm True, attention_cap 30.0"),
        ({"position": "learned"}, "lacks position learned"),
        (dict(models.GPT2, bias=False), "gpt2, lacks bias False"),
        (dict(models.PRESETS["grok-toy"]), "post_norm True, attention_cap 30.0"),
    ],
)
def test_a_combination_without_a_counterpart_is_named(switch, told, tmp_path):
    pytest.importorskip("safetensors")
    config = GPTConfig(**{**switch, "vocab_size": 61, "seq_len": 24})
    with pytest.raises(ValueError, match=told):
        save_published(tmp_path, config, models.GPT(config).state_dict())
    assert not any(tmp_path.iterdir())


# ---- the whole way: a run out, a published folder in


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:300"])
def test_an_exported_run_opens_in_transformers_and_writes_the_same(call, tokenizer, tmp_path, data):
    transformers = pytest.importorskip("transformers")
    call(prepare, data.parent / "text.txt", "--tokenizer", tokenizer, "--out", "set")
    call(train, *TINY, "--data", "set", "--out", "run", "--steps", 5)
    call(published, "--export", "out", "run")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    state, _ = load_checkpoint("run")
    encoding = prepare.tokenizer_from_dict(state["tokenizer"])
    for text in ("the model learns,", "naïve  café\n\n 你好🙂 it's 12345 \t\r\n x\n", " \n  "):
        assert ours(text)["input_ids"] == prepare.encode(encoding, text).tolist()
        assert ours.decode(ours(text)["input_ids"]) == text
    assert ours.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id == encoding.eot_token
    tokens = torch.tensor([prepare.encode(encoding, "the small model").tolist()])
    with torch.no_grad():
        expected = load_model("run")[0](tokens)
        assert (model(tokens).logits - expected).abs().max() < 1e-4


def test_an_exported_run_samples_and_trains_on_as_the_run_does(call, run, data, tmp_path, capsys):
    pytest.importorskip("safetensors")
    call(published, "--export", "out", run)
    texts = []
    for source in (run, "out"):
        capsys.readouterr()
        call(sample, source, "--prompt", "the ", "--tokens", 30, "--temperature", 0)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    flags = ["--out", "on", "--steps", 1, "--lr", 0, "--batch_tokens", 128, "--dtype", "float32"]
    call(train, "--init", "out", "--data", data, *flags)
    assert rows(tmp_path / "on", "val_loss")[1] == pytest.approx(rows(run, "val_loss")[20], abs=1e-6)


def test_a_tokenizer_json_holds_the_tokenizer_of_gpt2(tmp_path):
    """Written by us, read by Hugging Face's tokenizers and by us, against tiktoken."""
    tokenizers = pytest.importorskip("tokenizers")
    try:
        encoding = prepare.named_tokenizer("gpt2")
    except SystemExit:
        pytest.skip("tiktoken has not fetched it here")
    published.save_published_tokenizer(tmp_path, encoding)
    text = Path(models.__file__).read_text() + " naïve 你好🙂🙂  12345678 \n\n\t x' I'LL don't\n "
    ids = prepare.encode(encoding, text).tolist()
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids == ids
    read = published.load_published_tokenizer(tmp_path)
    assert prepare.encode(read, text).tolist() == ids
    assert read.eot_token == encoding.eot_token


def test_the_tokenizer_that_transformers_writes_for_gpt2_is_read(tmp_path):
    """Its tokenizer.json holds no pattern: ByteLevel itself knows how GPT-2 cuts text."""
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator([Path(prepare.__file__).read_text()], 600, special_tokens=["<|endoftext|>"])
    theirs.save(str(tmp_path / "tokenizer.json"))
    text = "def train_bpe(counts):  # don't 12345\n    return naïve 你好"
    read = published.load_published_tokenizer(tmp_path)
    assert prepare.encode(read, text).tolist() == theirs.encode(text).ids


def test_digits_and_missing_bytes_are_handled_as_hugging_face_does(tmp_path):
    """As in SmolLM2's tokenizer: each digit on its own, and no token for some control characters."""
    tokenizers = pytest.importorskip("tokenizers")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([tokenizers.pre_tokenizers.Digits(True), byte_level])
    text = Path(models.__file__).read_text() + " 你好🙂🙂 don't  12345 \n\n\t x'7 8  9"
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=700, special_tokens=["<|endoftext|>"], show_progress=False)
    theirs.train_from_iterator([text], trainer)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = published.load_published_tokenizer(tmp_path)
    for start in ("", "a\x04b \x1d", "\x04"):
        assert prepare.encode(ours, start + text).tolist() == theirs.encode(start + text).ids


def test_numbers_and_line_ends_are_split_alike_after_export(tmp_path):
    """Regular expressions there mean something else by {1,3}+ and $."""
    tokenizers = pytest.importorskip("tokenizers")
    text = "12345678 " * 99 + "end \n\n\n  \n" * 99
    counts = Counter(regex.findall(prepare.GPT4_PATTERN, text) + ["12345678", " \n\n\n  \n"] * 99)
    ours = prepare.make_tokenizer("digits", prepare.GPT4_PATTERN, prepare.train_bpe(counts, 300))
    published.save_published_tokenizer(tmp_path, ours)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode(text).ids == prepare.encode(ours, text).tolist()


@pytest.mark.parametrize(
    "change, told",
    [
        ({"normalizer": {"type": "Lowercase"}}, "the normalizer Lowercase is not supported"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "the pre-tokenizer"),
        ({"pre_tokenizer": {"pretokenizers": [{"type": "Punctuation"}, {"type": "ByteLevel"}]}}, '"Punctuation"'),
        ({"added_tokens": [{"content": "<|endoftext|>", "id": 256, "lstrip": True}]}, "lstrip True is not supported"),
    ],
)
def test_what_would_change_ids_in_a_tokenizer_json_is_refused_by_name(refused, tmp_path, change, told):
    published.save_published_tokenizer(tmp_path, prepare.byte_tokenizer())
    plain = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain | change))
    (tmp_path / "a.txt").write_text("text")
    assert told in refused(prepare, "a.txt", "--tokenizer", tmp_path)


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--export", "new", "nowhere"], "no checkpoint"),
        (["--export", "full", "nowhere"], "full is not an empty folder"),
    ],
)
def test_an_export_that_cannot_be_is_refused(refused, tmp_path, arguments, told):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert told in refused(published, *arguments)
    assert not (tmp_path / "new").exists()


def test_a_published_folder_that_cannot_be_loaded_is_one_sentence(golden, refused):
    folder, _, _ = golden("llama")
    (folder / "tokenizer.json").write_text('{"model": {"type": "Unigram"}, "pre_tokenizer": null}')
    assert "not byte-level BPE" in refused(sample, folder)
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json" in refused(sample, folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02garbage")
    assert f"cannot load {folder}" in refused(sample, folder)
    (folder / "pytorch_model.bin").unlink()
    assert "neither model.safetensors nor pytorch_model.bin" in refused(train, "--init", folder)


if __name__ == "__main__":
    for family in FAMILIES:
        reference, tokens = theirs(family), random_tokens(2, 20)
        with torch.no_grad():
            logits = reference(tokens).logits
        folder = Path(f"{family}.tmp")
        reference.save_pretrained(folder)
        weights = {name: tensor.half().numpy() for name, tensor in published.open_tensors(folder).items()}
        config = (folder / "config.json").read_text()
        np.savez_compressed(GOLDEN / family, config=config, tokens=tokens, logits=logits, **weights)
        shutil.rmtree(folder)
