"""Published models: read and write folders in the layout of Hugging Face's transformers, which most tools understand.

    python published.py --export my_model runs/toy-1                    write a run's model, tokenizer included
    python sample.py downloads/Qwen3-0.6B --prompt 'Once upon a time'   sample from a published model
    python train.py --init downloads/Qwen3-0.6B --data data/mine        or fine-tune it

A folder holds config.json (the architecture's settings), model.safetensors (its weights) and tokenizer.json. Each
family of models is one row of FAMILIES: a table from our names to theirs. What has no counterpart is refused by name,
in both directions. Reading and writing model.safetensors needs `pip install safetensors`.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import tiktoken
import torch
from torch import Tensor

from model import GPT, GPT2, GPTConfig, empty_model, load_checkpoint, model_settings, model_with
from prepare import END_OF_TEXT, Template, end_tokens, fail, make_tokenizer, template_of
from prepare import tokenizer_from_dict, tokenizer_to_dict, write_json

# ---------------------------------------------------------------------------------------------------------------------
# Loading any model: a run of ours or a published folder


def load_source(path: str | Path) -> tuple[dict, Path]:
    """The state of a run, a checkpoint or a published folder, and where it was found. A published folder has step 0 and
    no optimizer state. Ends the program if nothing can be loaded."""
    folder = Path(path)
    try:
        published = "model_type" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        published = False
    if not published:
        return load_checkpoint(path)
    try:
        config, weights = load_published(folder)
        chat = has_chat_template(folder)
    except Exception as error:  # noqa: BLE001 - a corrupt file can fail in any way
        fail(f"cannot load {folder}: {(str(error) or type(error).__name__).splitlines()[0]}")
    tokenizer = tokenizer_to_dict(load_published_tokenizer(folder), chat)
    return {"step": 0, "model": weights, "config": asdict(config), "tokenizer": tokenizer}, folder


def has_chat_template(folder: Path) -> bool:
    config = folder / "tokenizer_config.json"
    inside = config.exists() and "chat_template" in json.loads(config.read_text(encoding="utf-8"))
    return inside or (folder / "chat_template.jinja").exists()


def load_tokenizer(path: Path) -> tiktoken.Encoding:
    """The tokenizer of a run, a checkpoint or a published folder. Ends the program on failure."""
    if (path / "tokenizer.json").exists():
        return load_published_tokenizer(path)
    state, source = load_checkpoint(path)
    try:
        return tokenizer_from_dict(state["tokenizer"])
    except Exception as error:  # noqa: BLE001 - as above
        fail(f"{source} holds no tokenizer ({type(error).__name__}: {error})")


def load_model(path: str | Path, chat: bool = False) -> tuple[GPT, tiktoken.Encoding, Path]:
    """The model on the CPU, its tokenizer, and where they were found. Ends the program on failure. With `chat`, warn if
    the model was not trained on conversations."""
    state, source = load_source(path)
    if chat and not state["tokenizer"].get("chat"):
        print(f"{source} was not trained on conversations, so do not expect answers", file=sys.stderr)
    try:
        config = GPTConfig(**model_settings(state["config"]))
        return model_with(config, state["model"]), tokenizer_from_dict(state["tokenizer"]), source
    except Exception as error:  # noqa: BLE001 - as above
        reason = str(error).partition("\n")[0]
        fail(f"{source} holds no model ({type(error).__name__}: {reason})")


# ---------------------------------------------------------------------------------------------------------------------
# Families of models


@dataclass
class Family:
    """How transformers names the settings and weights of an architecture."""

    architecture: str  # its class in transformers
    base: dict  # our settings where its config.json says nothing
    settings: dict[str, str]  # our setting: its name in config.json (several names, separated by spaces, get one value)
    modules: dict[str, str]  # our module: theirs, with * for the number of a layer or an expert
    required: dict  # settings that we have no switch for, and the only value that we can handle
    transposed: bool = False  # weight matrices in blocks are stored as [in, out]

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

FAMILIES: dict[str, Family] = {  # by the model_type in config.json; export takes the first of the best matches
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
            "blocks.*.attention.query": "transformer.h.*.attn.c_attn",  # query, key and value are stacked in one
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
        base={"qk_norm": False, "n_expert": 8, "norm_eps": 1e-5, "rope_base": 1e6},
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
ONLY_IN_TRAINING = ("dropout", "balance_loss", "router_z_loss")  # settings that do not change what a model computes


def layout(family: Family, model: GPT) -> dict[str, list[str]]:
    """{name of a tensor in their file: names of our parameters that are stacked in it}"""
    names = defaultdict(list)
    for name, _ in model.named_parameters():
        module, _, kind = name.rpartition(".")
        theirs = family.modules[re.sub(r"\d+", "*", module)]
        for number in re.findall(r"\d+", module):
            theirs = theirs.replace("*", number, 1)
        names[f"{theirs}.{kind}"].append(name)
    return names


# ---------------------------------------------------------------------------------------------------------------------
# Reading a folder


def open_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors or pytorch_model.bin, or of parts like model-00001-of-00002.safetensors. Files
    are memory mapped: a tensor takes memory only when it is used. Nothing in them is executed."""

    def files_of(stem: str, suffix: str) -> list[Path]:
        whole = folder / f"{stem}.{suffix}"
        return [whole] if whole.exists() else sorted(folder.glob(f"{stem}-*-of-*.{suffix}"))

    if paths := files_of("model", "safetensors"):
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ValueError(f"{paths[0]} needs safetensors: pip install safetensors") from None
        files = [load_file(path) for path in paths]
    elif paths := files_of("pytorch_model", "bin"):
        files = [torch.load(path, map_location="cpu", mmap=True, weights_only=True) for path in paths]
    else:
        raise ValueError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")
    return {name: tensor for file in files for name, tensor in file.items()}


def read_config(folder: Path) -> tuple[GPTConfig, Family]:
    """Our config for their config.json. Raises ValueError for a setting that we have no switch for."""
    theirs = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for nested in ("rope_parameters", "rope_scaling"):  # rotary settings in newer and older files
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
    if chosen.get("activation") in THEIR_GELU:
        chosen["activation"] = THEIR_GELU[chosen["activation"]]
    return GPTConfig(**chosen), family


def load_published(folder: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The config and the weights, under our names, of a model in Hugging Face's layout. Raises ValueError if it belongs
    to none of FAMILIES, or if a tensor is missing, left over or of another shape."""
    config, family = read_config(folder)
    tensors = {name: tensor for name, tensor in open_tensors(folder).items() if not NOT_WEIGHTS.fullmatch(name)}
    if "wte.weight" in tensors:  # GPT-2 as OpenAI's own files name it
        tensors = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    if config.tied:
        tensors.pop("lm_head.weight", None)  # some files store a tied head as well
    model = empty_model(config, len(tensors))
    names = layout(family, model)
    if missing := names.keys() - tensors.keys():
        raise ValueError(f"{folder} misses {min(missing)} and {len(missing) - 1} other tensors")
    if extra := tensors.keys() - names.keys():
        raise ValueError(f"{folder} also holds {min(extra)} and {len(extra) - 1} other tensors")
    weights = {}
    for theirs, ours in names.items():
        tensor = tensors.pop(theirs)
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{theirs} in {folder} has the dtype {tensor.dtype}, which is not supported")
        if family.is_transposed(tensor, ours[0]):
            tensor = tensor.T.contiguous()
        for name, part in zip(ours, tensor.chunk(len(ours))):
            shape = model.get_parameter(name).shape
            if part.shape != shape:
                raise ValueError(f"{theirs} in {folder} gives {name} the shape {list(part.shape)}, not {list(shape)}")
            weights[name] = part
    return config, weights


# ---------------------------------------------------------------------------------------------------------------------
# Writing a folder


def missing_in(family: Family, config: GPTConfig) -> list[str]:
    """The settings of `config` that the family cannot express."""
    expressed = {name: getattr(config, name) for name in (*family.settings, *ONLY_IN_TRAINING)}
    nearest = GPTConfig(**{**family.base, **expressed})
    return [f.name for f in fields(GPTConfig) if getattr(nearest, f.name) != getattr(config, f.name)]


def save_published(folder: Path, config: GPTConfig, weights: dict[str, Tensor], ends: dict | None = None) -> None:
    """Write config.json, generation_config.json and model.safetensors for the family that can express `config`, with
    `ends` as the ids at which generation begins and stops. Raises ValueError if no family can. The inverse of
    load_published."""
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise ValueError("writing model.safetensors needs safetensors: pip install safetensors") from None
    model_type = min(FAMILIES, key=lambda name: len(missing_in(FAMILIES[name], config)))
    family = FAMILIES[model_type]
    if missing := missing_in(family, config):
        listed = ", ".join(f"{name} {getattr(config, name)}" for name in missing)
        raise ValueError(f"no published family has this combination: the nearest, {model_type}, lacks {listed}")
    ends = ends or {"bos_token_id": None, "eos_token_id": None}
    theirs = {"architectures": [family.architecture], "model_type": model_type, "dtype": "float32", **ends}
    for ours, names in family.settings.items():
        value = "gelu_new" if getattr(config, ours) == "gelu_tanh" else getattr(config, ours)
        theirs |= dict.fromkeys(names.split(), value)
    tensors = {}
    for name, ours in layout(family, model_with(config, weights)).items():
        tensor = torch.cat([weights[part] for part in ours])
        if family.is_transposed(tensor, ours[0]):
            tensor = tensor.T
        tensors[name] = tensor.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", theirs)
    write_json(folder / "generation_config.json", ends)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
DIGITS_PATTERN = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?[^\s\p{L}\p{N}]++|\s++(?=\p{N})|\s++$|\s+(?!\S)|\s"


def load_published_tokenizer(folder: Path) -> tiktoken.Encoding:
    """Load a published model's tokenizer.json, Hugging Face's format. Only byte-level BPE is supported."""
    path = folder / "tokenizer.json"
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        pattern = published_pattern(plain)
        special = {token["content"]: token["id"] for token in plain["added_tokens"]}
        ends = [name for name in (END_OF_TEXT, "<|end_of_text|>") if name in special]  # the second is Llama 3's
        if not ends:
            raise ValueError("it has no token that marks the end of a document")
        bytes_of = {letter: byte for byte, letter in byte_letters().items()}
        vocab = {token: rank for token, rank in plain["model"]["vocab"].items() if token not in special}
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in plain["model"]["merges"]]
        merged = [vocab[left + right] for left, right in merges]
        if merged != sorted(merged):
            raise ValueError("its merges are not in the order of their ids, which tiktoken requires")
        ranks = {bytes(bytes_of[letter] for letter in token): rank for token, rank in vocab.items()}
        return make_tokenizer(folder.name, pattern, ranks, {END_OF_TEXT: special.pop(ends[0]), **special})
    except Exception as error:  # noqa: BLE001 - a damaged file can make tiktoken fail in any way
        fail(f"cannot use {path}: {error}")


def published_pattern(plain: dict) -> str:
    """The pattern that splits text as the pre-tokenizer of a tokenizer.json does. Raises ValueError, by name, for what
    would change ids and is not supported."""
    model, first = plain["model"], plain["pre_tokenizer"] or {}
    steps = first.get("pretokenizers", [first])  # a sequence of steps, or one step on its own
    if model["type"] != "BPE" or "ByteLevel" not in [step.get("type") for step in steps]:
        raise ValueError("it is not byte-level BPE, the only kind that is supported")
    if (normalizer := (plain.get("normalizer") or {"type": "NFC"})["type"]) != "NFC":  # nearly all text is in NFC
        raise ValueError(f"the normalizer {normalizer} is not supported")
    refused = [(model, "dropout unk_token continuing_subword_prefix end_of_word_suffix byte_fallback")]
    refused += [(token, "lstrip rstrip single_word") for token in plain["added_tokens"]]
    for settings, names in refused:
        for name in names.split():
            if settings.get(name):
                raise ValueError(f"{name} {settings[name]} is not supported ({settings.get('content', 'model')})")
    match steps:
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            return pattern
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]:
            return r"(?s:.+)"
        case [{"type": "ByteLevel", "add_prefix_space": False}]:
            return GPT2_PATTERN
        case [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "add_prefix_space": False} as last]:
            if last.get("use_regex", True):
                return DIGITS_PATTERN
    raise ValueError(f"the pre-tokenizer {json.dumps(steps)} is not supported")


def byte_letters() -> dict[int, str]:
    """The letter for each byte in tokenizer.json: the byte's own character if printable, else one from 256 up."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def save_published_tokenizer(folder: Path, tokenizer: tiktoken.Encoding, chat: bool = False) -> None:
    """Write tokenizer.json and tokenizer_config.json, with which Hugging Face's libraries produce the same ids, and for
    a chat model its template."""
    letters = byte_letters()
    vocab = {"".join(letters[byte] for byte in token): rank for token, rank in tokenizer._mergeable_ranks.items()}
    # tiktoken merges any two neighbours that spell a token, so every way to split a token is a merge.
    pairs = ((token[:i], token[i:]) for token in sorted(vocab, key=vocab.get) for i in range(1, len(token)))
    merges = [pair for pair in pairs if vocab.keys() >= set(pair)]
    # The regular expressions there (Oniguruma) read {1,3}+ as a repetition and $ as the end of a line.
    pattern = tokenizer._pat_str.replace("}+", "}").replace("$", r"\z")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    plain = {
        "version": "1.0",
        "added_tokens": [
            {"id": token, "content": text, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for text, token in tokenizer._special_tokens.items()
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level] if merges else [byte_level]},
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    write_json(folder / "tokenizer.json", plain)
    template = template_of(tokenizer) if chat else None
    end = template.end if template else END_OF_TEXT
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_TEXT, "eos_token": end}
    write_json(folder / "tokenizer_config.json", names)
    if template:
        (folder / "chat_template.jinja").write_text(jinja_of(template), encoding="utf-8")


def jinja_of(template: Template) -> str:
    """The template in the language of Hugging Face's chat_template.jinja."""
    before, after = map(json.dumps, template.header.split("{role}"))
    end, gap, begin, opening = map(json.dumps, template[1:])
    return (
        f"{{{{- {begin} }}}}{{%- for message in messages -%}}{{{{- {before} + message['role'] + {after} }}}}"
        f"{{%- if loop.last and message['role'] == 'assistant' -%}}{{{{- {opening} }}}}{{%- endif -%}}"
        f"{{{{- message['content'] | trim + {end} + {gap} }}}}{{%- endfor -%}}"
        f"{{%- if add_generation_prompt -%}}{{{{- {before} + 'assistant' + {after} + {opening} }}}}{{%- endif -%}}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def export(folder: Path, run: Path) -> None:
    """Write the newest checkpoint of a run as a published model with its tokenizer."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        fail(f"{folder} is not an empty folder: choose another one to export to")
    state, record = load_checkpoint(run)
    try:
        tokenizer = tokenizer_from_dict(state["tokenizer"])
        chat = state["tokenizer"].get("chat", False)
        stops = sorted(end_tokens(tokenizer), reverse=True) if chat else tokenizer.eot_token
        ends = {"bos_token_id": tokenizer.eot_token, "eos_token_id": stops}
        save_published(folder, GPTConfig(**model_settings(state["config"])), state["model"], ends)
        save_published_tokenizer(folder, tokenizer, chat)
    except (ValueError, OSError) as error:
        fail(f"cannot export {record.with_suffix('')}: {error}")
    names = ", ".join(sorted(path.name for path in folder.iterdir()))
    print(f"exported step {state['step']} of {record.parent} to {folder}: {names}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--export", nargs=2, type=Path, metavar=("DIR", "RUN"), required=True, help="write a run's model"
    )
    export(*parser.parse_args().export)


if __name__ == "__main__":
    main()
