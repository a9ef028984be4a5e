"""Weights of published models, in and out: each family against what transformers computes.

Where transformers is installed, it is asked itself. Everywhere, golden/FAMILY.npz says what it computed from small
random weights; `python tests/test_published.py` writes those files anew.
"""

import json
import re
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import rows
from test_model import random_tokens

import model as models
import published
import sample
import train
from model import GPTConfig, generate, model_with
from published import load_model, load_published, save_published

GOLDEN = Path(__file__).with_name("golden")
LLAMA = dict(vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
LLAMA |= {"num_key_value_heads": 2, "max_position_embeddings": 24}
GPT2 = {"vocab_size": 61, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 4}
QWEN3_MOE = dict(LLAMA, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
del QWEN3_MOE["intermediate_size"]
VARIANTS = {  # the first of each family is the golden one
    "gpt2": dict(GPT2),
    "gpt2-exact-gelu-narrow-untied": dict(GPT2, n_head=2, n_inner=24, activation_function="gelu",
                                          tie_word_embeddings=False, layer_norm_epsilon=1e-3),
    "llama": dict(LLAMA, rope_theta=500_000.0, rms_norm_eps=1e-5),
    "llama-tied-full-heads": dict(LLAMA, num_key_value_heads=4, tie_word_embeddings=True),
    "llama-biases-wide-heads": dict(LLAMA, attention_bias=True, mlp_bias=True, head_dim=12, hidden_act="gelu"),
    "llama-3.1": dict(LLAMA, rope_parameters={**published.LLAMA31, "rope_theta": 1e4, "factor": 8.0}),
    "qwen2": dict(LLAMA, tie_word_embeddings=True),
    "qwen3": dict(LLAMA, head_dim=16, tie_word_embeddings=True),
    "qwen3-untied-one-kv-head": dict(LLAMA, head_dim=6, num_key_value_heads=1, rms_norm_eps=1e-3),
    "qwen3_moe": dict(QWEN3_MOE, norm_topk_prob=True),
    "qwen3_moe-not-renormalised-tied": dict(QWEN3_MOE, norm_topk_prob=False, tie_word_embeddings=True),
    "mixtral": dict(LLAMA, num_local_experts=4, num_experts_per_tok=2),
    "mixtral-3-of-6": dict(LLAMA, num_local_experts=6, num_experts_per_tok=3, num_key_value_heads=4, rms_norm_eps=1e-3),
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


@pytest.fixture
def golden(tmp_path):
    """golden("llama") unpacks a golden file into a folder as it could be downloaded; returns it, tokens and logits."""

    def unpack(family: str, dtype: torch.dtype = torch.float32) -> tuple[Path, torch.Tensor, torch.Tensor]:
        file = np.load(GOLDEN / f"{family}.npz")
        weights = {name: torch.from_numpy(file[name]).to(dtype) for name in file if "." in name}
        torch.save(weights, tmp_path / "pytorch_model.bin")
        (tmp_path / "config.json").write_text(str(file["config"]))
        return tmp_path, torch.from_numpy(file["tokens"]).long(), torch.from_numpy(file["logits"])

    return unpack


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-4), (torch.float16, 1e-4), (torch.bfloat16, 1.5)])
def test_the_logits_of_the_golden_file_are_computed(golden, family, dtype, error):
    """From half precision too (exact in float16), and then from a config.json that leaves out defaults, and has a
    factor for a scaling that is none."""
    folder, tokens, logits = golden(family, dtype)
    if dtype != torch.float32:
        scaling = {} if family == "gpt2" else {"rope_scaling": {"type": "default", "factor": 4.0}}
        (folder / "config.json").write_text(json.dumps({"model_type": family, **VARIANTS[family], **scaling}))
    assert logits.std() > 0.1
    model = model_with(*load_published(folder)).eval()
    assert (model.float()(tokens) - logits).abs().max() < error


@pytest.mark.parametrize("variant", VARIANTS)
def test_here_and_in_transformers_the_same_weights_give_the_same_logits_and_greedy_text(variant, tmp_path):
    """Those that transformers saved, and then saved by us."""
    transformers, reference, tokens = pytest.importorskip("transformers"), theirs(variant), random_tokens(2, 20)
    reference.save_pretrained(tmp_path / "in")
    config, weights = load_published(tmp_path / "in")
    model = model_with(config, weights).eval()
    save_published(tmp_path / "out", config, weights)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(read) is type(reference)
    with torch.no_grad():
        logits = reference(tokens).logits
        assert (model(tokens) - logits).abs().max() < 1e-4
        assert (read(tokens).logits - logits).abs().max() < 1e-4
        text = reference.generate(tokens[:1, :4], max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert [ids.item() for ids in islice(generate(model, tokens[:1, :4], temperature=0), 20)] == text[0, 4:].tolist()
    plain = read.config.to_dict()
    plain |= plain.get("rope_parameters") or {}
    assert all(plain.get(name, getattr(read.config, name, None)) == value for name, value in VARIANTS[variant].items())


@pytest.mark.parametrize("family, stored", [
    # As OpenAI released them: with shorter names, and masks among them.
    ("gpt2", lambda weights: {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
     | {"h.0.attn.bias": torch.ones(1, 1, 24, 24).tril(), "h.0.attn.masked_bias": torch.tensor(-1e4)}),
    ("llama", lambda weights: weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
    ("qwen3", lambda weights: weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}),  # tied, all the same
])
def test_weights_are_found_in_older_files_and_in_several(golden, family, stored):
    save_file = pytest.importorskip("safetensors.torch").save_file
    folder, tokens, logits = golden(family)
    weights = stored(torch.load(folder / "pytorch_model.bin"))
    for i in (0, 1):
        part = {name: weights[name].clone() for name in sorted(weights)[i::2]}
        save_file(part, folder / f"model-0000{i + 1}-of-00002.safetensors")
    model = model_with(*load_published(folder)).eval()
    assert (model(tokens) - logits).abs().max() < 1e-4
    assert (model.head.weight is model.embedding.weight) == model.config.tied


@pytest.mark.parametrize("family, config, weights, told", [
    *((family, {name: value}, {}, f"{name} of .* is {re.escape(repr(value))}") for family, name, value in (
        ("gpt2", "scale_attn_weights", False), ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("gpt2", "add_cross_attention", True), ("llama", "sliding_window", 4096),
        ("qwen3", "use_sliding_window", True), ("qwen3_moe", "decoder_sparse_step", 2),
        ("qwen3_moe", "mlp_only_layers", [1]),
    )),
    *((family, {"rope_scaling": {"type": "x"}}, {}, "type of .* is 'x'") for family in FAMILIES if family != "gpt2"),
    ("llama", {"rope_parameters": {"rope_type": "llama3"}}, {}, "rope_type of .* is 'llama3'"),
    ("llama", {"model_type": "bert"}, {}, "'bert', none of gpt2, llama"),
    ("llama", {"hidden_act": "relu"}, {}, "activation 'relu'"),
    ("llama", {"num_hidden_layers": 10**9}, {}, "1000000000 layers cannot be filled from 21 tensors"),
    ("llama", {"num_hidden_layers": 3}, {}, "misses model.layers.2.* and 8 other tensors"),
    ("llama", {"num_hidden_layers": 1}, {}, "also holds model.layers.1.* and 8 other tensors"),
    ("llama", {"hidden_size": 64}, {}, r"model.embed_tokens.weight .* the shape \[61, 32\], not \[61, 64\]"),
    ("llama", {}, {"model.norm.weight": torch.ones(32, dtype=torch.int8)}, "model.norm.weight .* torch.int8"),
    ("llama", {}, {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, "also holds .*q_proj.bias"),
])
def test_what_cannot_be_taken_over_is_named(golden, family, config, weights, told):
    folder, _, _ = golden(family)
    before = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(before | config))
    torch.save(torch.load(folder / "pytorch_model.bin") | weights, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=told):
        load_published(folder)


@pytest.mark.parametrize("switch, told", [
    ({"post_norm": True, "attention_cap": 30.0}, "qwen3, lacks post_norm True, attention_cap 30.0"),
    ({"position": "learned"}, "lacks position learned"), (dict(models.GPT2, bias=False), "gpt2, lacks bias False"),
])
def test_a_combination_without_a_counterpart_is_named(switch, told, tmp_path):
    pytest.importorskip("safetensors")
    config = GPTConfig(**{**switch, "vocab_size": 61, "seq_len": 24})
    with pytest.raises(ValueError, match=told):
        save_published(tmp_path, config, models.GPT(config).state_dict())
    assert not any(tmp_path.iterdir()) and re.search(told, published.why_not_exportable(config))
    assert published.why_not_exportable(GPTConfig(vocab_size=61)) is None


def test_an_exported_run_opens_in_transformers_and_writes_the_same(call, run, tmp_path):
    transformers = pytest.importorskip("transformers")
    call(published, "--export", "out", "run")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    encoding = load_model("run").tokenizer
    for text in ("the model learns,", "naïve  café\n\n 你好🙂 it's 12345 \t\r\n x\n", " \n  "):
        assert ours(text)["input_ids"] == [encoding.end_of_text, *encoding.encode(text).tolist()]  # as in sample.py
        assert ours.decode(ours(text)["input_ids"], skip_special_tokens=True) == text
    for settings in (ours, model.config, model.generation_config):
        assert settings.bos_token_id == settings.eos_token_id == encoding.end_of_text
    assert ours.pad_token == ours.unk_token == "<|endoftext|>"
    assert json.loads(Path("out/tokenizer_config.json").read_text())["add_bos_token"]  # which transformers 5 forgets


def test_an_exported_run_samples_and_trains_on_as_the_run_does(call, refused, run, data, tmp_path, capsys):
    safetensors = pytest.importorskip("safetensors.torch")
    call(published, "--export", "out", "run")
    files = "config.json, generation_config.json, model.safetensors, tokenizer.json, tokenizer_config.json"
    assert capsys.readouterr().out == f"exported step 20 of run to out: {files}\n"
    assert {tensor.dtype for tensor in safetensors.load_file("out/model.safetensors").values()} == {torch.float32}
    kind = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "dtype": "float32"}
    assert kind.items() <= json.loads(Path("out/config.json").read_text()).items()
    assert "out is not an empty folder" in refused(published, "--export", "out", "nowhere")
    assert "no checkpoint" in refused(published, "--export", "new", "nowhere") and not Path("new").exists()
    texts = []
    for source in (run, "out"):
        call(sample, source, "--prompt", "the ", "--tokens", 30, "--temperature", 0)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    flags = ["--out", "on", "--steps", 1, "--lr", 0, "--batch_tokens", 128, "--dtype", "float32"]
    call(train, "--init", "out", "--data", data, *flags)
    assert rows(tmp_path / "on", "val_loss")[1] == pytest.approx(rows(run, "val_loss")[20], abs=1e-6)


def test_a_published_folder_that_cannot_be_loaded_is_one_sentence(golden, refused):
    malicious = type("", (), {"__reduce__": lambda self: (Path.touch, (Path("executed"),))})
    folder, _, _ = golden("llama")
    (folder / "tokenizer.json").write_text('{"model": {"type": "Unigram"}, "pre_tokenizer": null}')
    assert "not byte-level BPE" in refused(sample, folder)
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json" in refused(sample, folder)
    torch.save({"x": malicious()}, folder / "pytorch_model.bin")
    assert f"cannot load {folder}" in refused(sample, folder) and not (folder / "executed").exists()
    (folder / "pytorch_model.bin").unlink()
    assert "neither model.safetensors nor pytorch_model.bin" in refused(train, "--init", folder)


if __name__ == "__main__":
    for family in FAMILIES:
        reference, tokens = theirs(family), random_tokens(2, 20)
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            reference.save_pretrained(folder)
            weights = {name: tensor.half().numpy() for name, tensor in published.open_tensors(Path(folder)).items()}
            weights |= {"config": Path(folder, "config.json").read_text(), "tokens": tokens}
            np.savez_compressed(GOLDEN / family, logits=reference(tokens).logits, **weights)
