"""Published models: read and write folders in the layout of Hugging Face's transformers, which most tools understand,
and write GGUF, the format of llama.cpp, Ollama and LM Studio.

    python published.py --export my_model runs/toy-1                    write a run's model, tokenizer included
    python published.py --export my_model.gguf runs/toy-1               the same as a GGUF file
    python sample.py downloads/Qwen3-0.6B --prompt 'Once upon a time'   sample from a published model
    python train.py --init downloads/Qwen3-0.6B --data data/mine        or fine-tune it

A folder holds config.json (the architecture's settings), model.safetensors (its weights) and tokenizer.json. Each
family of models is one row of FAMILIES: a table from our names to theirs. What has no counterpart is refused by name,
in both directions. Reading and writing model.safetensors needs `pip install safetensors`, writing GGUF needs
`pip install gguf`.
"""

import argparse
import json
import re
from collections import defaultdict
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from checkpoint import Tensors, load_checkpoint, open_part, tensors_of
from model import GPT, GPT2, GPTConfig, empty_model, model_settings, model_with, rotary_frequencies
from prepare import exit_on, fail, write_json, written_whole
from tokenizer import DIGITS_PATTERN, GPT2_PATTERN, GPT4_PATTERN, QWEN_PATTERN
from tokenizer import Tokenizer, load_tokenizer, published_jinja, to_tokenizer_json

# ---------------------------------------------------------------------------------------------------------------------
# Loading any model: a run of ours or a published folder


def load_source(path: str | Path) -> tuple[dict, Path]:
    """The state of a run, a checkpoint or a published folder, and where it was found. A published folder has step 0 and
    no optimizer state. Raises ValueError, in a sentence, if nothing can be loaded."""
    folder = Path(path)
    try:
        published = "model_type" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        published = False
    if not published:
        return load_checkpoint(path)
    try:
        config, weights = load_published(folder)
        chat = published_jinja(folder)[0] is not None
    except Exception as error:  # noqa: BLE001 - a corrupt file can fail in any way
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot load {folder}: {reason}") from error
    tokenizer = load_tokenizer(folder).to_dict(chat)
    tensors = Tensors("model", [lambda: {"model": weights}])
    return {"step": 0, "config": asdict(config), "tokenizer": tokenizer, "model": tensors}, folder


def tensors_at(source: Path) -> dict[str, Tensors]:
    """The tensors of what load_source has found, for another process. They are opened when they are needed."""
    if source.suffix == ".json":
        return tensors_of(source)
    return {"model": Tensors("model", [cache(lambda: {"model": load_published(source)[1]})])}


class Loaded(NamedTuple):
    """A model on the CPU with its tokenizer, where they were found, and whether it was trained on conversations."""

    model: GPT
    tokenizer: Tokenizer
    source: Path
    chat: bool


def load_model(path: str | Path) -> Loaded:
    """Load a run, a checkpoint or a published folder. Raises ValueError, in a sentence, if that is impossible."""
    state, source = load_source(path)
    try:
        model = model_with(GPTConfig(**model_settings(state["config"])), state["model"])
        return Loaded(model, Tokenizer.from_dict(state["tokenizer"]), source, state["tokenizer"].get("chat", False))
    except Exception as error:  # noqa: BLE001 - as above
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{source} holds no model ({type(error).__name__}: {reason})") from error


# ---------------------------------------------------------------------------------------------------------------------
# Families of models


@dataclass
class Family:
    """How transformers names the settings and weights of an architecture."""

    architecture: str  # its class in transformers
    gguf: str  # its name in llama.cpp
    base: dict  # our settings where its config.json says nothing
    settings: dict[str, str]  # our setting: its name in config.json, or several that all get its value; the last counts
    modules: dict[str, str]  # our module: theirs, with * for the number of a layer or an expert
    required: dict  # settings that we have no switch for, and the only value that we can handle
    transposed: bool = False  # weight matrices in blocks are stored as [in, out]

    def turned(self, tensor: Tensor, ours: str) -> Tensor:
        """Our parameter as they store it, and theirs as we do."""
        return tensor.T if self.transposed and tensor.ndim == 2 and ours.startswith("blocks") else tensor


# fmt: off
LLAMA_SETTINGS = {
    "vocab_size": "vocab_size", "seq_len": "max_position_embeddings", "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size",
    "head_dim": "head_dim", "n_inner": "intermediate_size", "norm_eps": "rms_norm_eps", "rope_base": "rope_theta",
    "rope_factor": "factor", "activation": "hidden_act", "tied": "tie_word_embeddings",
}
QWEN3_SETTINGS = LLAMA_SETTINGS | {"n_layer": "max_window_layers num_hidden_layers"}
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
LLAMA31 = {  # how rotary positions are scaled with rope_factor: the only way that we can handle
    "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}

FAMILIES: dict[str, Family] = {  # by the model_type in config.json; export takes the first of the best matches
    "gpt2": Family(
        "GPT2LMHeadModel", "gpt2",
        base=GPT2,
        settings={
            "vocab_size": "vocab_size", "seq_len": "n_ctx n_positions", "n_layer": "n_layer", "n_head": "n_head",
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
        "LlamaForCausalLM", "llama",
        base={"qk_norm": False},
        settings=LLAMA_SETTINGS | {"bias": "attention_bias mlp_bias"},
        modules=LLAMA_MODULES,
        required=LLAMA_REQUIRED,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM", "qwen2",
        base={"qk_norm": False, "qkv_bias": True},
        settings=QWEN3_SETTINGS,
        modules=LLAMA_MODULES,
        required={"rope_type": "default", "type": "default", "use_sliding_window": False},
    ),
    "qwen3": Family("Qwen3ForCausalLM", "qwen3", {}, QWEN3_SETTINGS, LLAMA_MODULES, LLAMA_REQUIRED),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", "qwen3moe",
        base={"renormalise": False},
        settings=QWEN3_SETTINGS | {
            "n_inner": "intermediate_size moe_intermediate_size", "n_expert": "num_experts num_local_experts",
            "n_expert_active": "num_experts_per_tok", "renormalise": "norm_topk_prob",
        },
        modules=LLAMA_MODULES,
        required=LLAMA_REQUIRED | {"decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "mixtral": Family(
        "MixtralForCausalLM", "llama",
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
NOT_WEIGHTS = re.compile(r".*\.attn\.(masked_)?bias|.*\.rotary_emb\.inv_freq")  # masks and angles, in older files
ONLY_IN_TRAINING = ("dropout", "balance_loss", "router_z_loss")  # settings that do not change what a model computes


def layout(modules: dict[str, str], model: GPT) -> dict[str, list[str]]:
    """{name of a tensor in their file: names of our parameters that are stacked in it}"""
    names = defaultdict(list)
    for name, _ in model.named_parameters():
        module, _, kind = name.rpartition(".")
        theirs = modules[re.sub(r"\d+", "*", module)]
        for number in re.findall(r"\d+", module):
            theirs = theirs.replace("*", number, 1)
        names[f"{theirs}.{kind}"].append(name)
    return names


# ---------------------------------------------------------------------------------------------------------------------
# Reading a folder


def open_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors or pytorch_model.bin, or of parts like model-00001-of-00002.safetensors. Files
    are memory mapped: a tensor takes memory only when it is used. Nothing in them is executed."""
    if paths := [*folder.glob("model.safetensors")] or sorted(folder.glob("model-*-of-*.safetensors")):
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ValueError(f"{paths[0]} needs safetensors: pip install safetensors") from None
        files = [load_file(path) for path in paths]
    elif paths := [*folder.glob("pytorch_model.bin")] or sorted(folder.glob("pytorch_model-*-of-*.bin")):
        files = [open_part(path) for path in paths]
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
    if LLAMA31.items() <= theirs.items():
        theirs["rope_type"] = "default"
    else:
        theirs.pop("factor", None)  # of no scaling
    for name, value in family.required.items():
        if theirs.get(name, value) != value:
            raise ValueError(f"the {name} of {folder} is {theirs[name]!r}, for which there is no switch here")
    chosen = dict(family.base)
    for ours, names in family.settings.items():
        for name in names.split():
            if theirs.get(name) is not None:
                chosen[ours] = theirs[name]
    if chosen.get("activation") in ("gelu_new", "gelu_pytorch_tanh"):
        chosen["activation"] = "gelu_tanh"
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
    names = layout(family.modules, model)
    if missing := names.keys() - tensors.keys():
        raise ValueError(f"{folder} misses {min(missing)} and {len(missing) - 1} other tensors")
    if extra := tensors.keys() - names.keys():
        raise ValueError(f"{folder} also holds {min(extra)} and {len(extra) - 1} other tensors")
    weights = {}
    for theirs, ours in names.items():
        tensor = tensors.pop(theirs)
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{theirs} in {folder} has the dtype {tensor.dtype}, which is not supported")
        for name, part in zip(ours, family.turned(tensor, ours[0]).chunk(len(ours))):
            shape = model.get_parameter(name).shape
            if part.shape != shape:
                raise ValueError(f"{theirs} in {folder} gives {name} the shape {list(part.shape)}, not {list(shape)}")
            weights[name] = part
    return config, weights


# ---------------------------------------------------------------------------------------------------------------------
# Writing a folder


def family_of(config: GPTConfig) -> tuple[str, Family]:
    """The family that can express `config`, and its model_type. Raises ValueError if there is none."""
    missing = {}  # from each family: the settings that it cannot express
    for model_type, family in FAMILIES.items():
        expressed = {name: getattr(config, name) for name in (*family.settings, *ONLY_IN_TRAINING)}
        nearest = GPTConfig(**{**family.base, **expressed})
        names = (field.name for field in fields(GPTConfig))
        missing[model_type] = [name for name in names if getattr(nearest, name) != getattr(config, name)]
    model_type = min(missing, key=lambda name: len(missing[name]))
    if missing[model_type]:
        listed = ", ".join(f"{name} {getattr(config, name)}" for name in missing[model_type])
        raise ValueError(f"no published family has this combination: the nearest, {model_type}, lacks {listed}")
    return model_type, FAMILIES[model_type]


def save_published(
    folder: Path, config: GPTConfig, weights: dict[str, Tensor], begin: int | None = None, end: int | list | None = None
) -> None:
    """The inverse of load_published: write config.json, generation_config.json and model.safetensors. `begin` and `end`
    are the tokens at which a text does so. Raises ValueError if no family can express `config`."""
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise ValueError("writing model.safetensors needs safetensors: pip install safetensors") from None
    model_type, family = family_of(config)
    ids = {"bos_token_id": begin, "eos_token_id": end}
    theirs = {"architectures": [family.architecture], "model_type": model_type, "dtype": "float32", **ids}
    theirs |= {name: value for name, value in family.required.items() if name not in ("rope_type", "type")}
    for ours, names in family.settings.items():
        value = "gelu_new" if getattr(config, ours) == "gelu_tanh" else getattr(config, ours)
        theirs |= dict.fromkeys(names.split(), value)
    if factor := theirs.pop("factor", None):
        theirs["rope_scaling"] = {**LLAMA31, "factor": factor}
    tensors = {}
    for name, ours in layout(family.modules, model_with(config, weights)).items():
        name = name.removeprefix("transformer.")  # as in OpenAI's own files of GPT-2, the only ones that mlx-lm reads
        tensors[name] = family.turned(torch.cat([weights[part] for part in ours]), ours[0]).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", theirs)
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)  # not the owner's alone
    write_json(folder / "generation_config.json", ids)


def why_not_exportable(config: GPTConfig) -> str | None:
    """A sentence for a model that no published family can express."""
    try:
        family_of(config)
    except ValueError as error:
        return str(error)


def save_published_tokenizer(folder: Path, tokenizer: Tokenizer, chat: bool = False) -> None:
    """Write tokenizer.json and tokenizer_config.json, and for a chat model its template. For others, each text begins
    as in sample.py."""
    write_json(folder / "tokenizer.json", to_tokenizer_json(tokenizer, begin=not chat))
    template = tokenizer.template if chat else None
    named = {token: name for name, token in tokenizer.special.items()}
    begin, end = named[tokenizer.begin], named[tokenizer.end_of_text]
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "pad_token": end, "unk_token": end}
    names |= {"eos_token": template.end if template else end, "add_bos_token": not chat}
    write_json(folder / "tokenizer_config.json", names)
    if template:
        (folder / "chat_template.jinja").write_text(template.jinja, encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Writing GGUF

# The names there of the patterns that cut text
GGUF_PATTERNS = {"llama-bpe": GPT4_PATTERN, "gpt-2": GPT2_PATTERN, "smollm": DIGITS_PATTERN, "qwen2": QWEN_PATTERN}
NORMAL, CONTROL, IN_TEXT, UNUSED = 1, 3, 4, 5  # kinds of tokens there


def save_gguf(
    path: Path, config: GPTConfig, weights: dict[str, Tensor], tokenizer: Tokenizer, chat: bool, half: bool
) -> None:
    """Write a model with its tokenizer as one GGUF file, with `half` its matrices in float16. Raises ValueError, by
    name, for what llama.cpp cannot express."""
    try:
        from gguf import MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map
    except ImportError:
        raise ValueError("writing GGUF needs gguf: pip install gguf") from None
    _, family = family_of(config)
    is_gpt2 = family.gguf == "gpt2"
    computed = {"activation": "gelu_tanh" if is_gpt2 else "silu"} | ({"renormalise": True} if config.n_expert else {})
    for name, value in computed.items():  # by its code, whatever a file says
        if getattr(config, name) != value:
            raise ValueError(f"llama.cpp computes {family.gguf} with {name} {value}, not {getattr(config, name)}")
    pattern = next((name for name, pattern in GGUF_PATTERNS.items() if tokenizer.cuts_like(pattern)), None)
    if pattern is None:
        raise ValueError(f"llama.cpp has no name for the pattern of the tokenizer {tokenizer.name}")
    writer = GGUFWriter(path, family.gguf)
    writer.add_name(path.name.partition(".gguf")[0])  # until it is complete, another ending follows
    writer.add_file_type(1 if half else 0)
    writer.add_context_length(config.seq_len)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_inner)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    if is_gpt2:
        writer.add_layer_norm_eps(config.norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.norm_eps)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_base)
    if config.rope_factor is not None:
        slower = rotary_frequencies(config.changed(rope_factor=None)) / rotary_frequencies(config)
        writer.add_tensor("rope_freqs.weight", slower.numpy())
    if config.n_expert:
        writer.add_expert_count(config.n_expert)
        writer.add_expert_used_count(config.n_expert_active)
        writer.add_expert_feed_forward_length(config.n_inner)

    architecture = next(number for number, name in MODEL_ARCH_NAMES.items() if name == family.gguf)
    names = get_tensor_name_map(architecture, config.n_layer)  # from those in transformers
    modules = {ours: theirs.replace("experts.*", "experts") for ours, theirs in family.modules.items()}  # stacked there
    for name, ours in layout(modules, model_with(config, weights)).items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        parts = [weights[name].float() for name in ours]
        tensor = torch.stack(parts) if ".experts." in ours[0] else torch.cat(parts)
        if family.gguf == "llama" and re.search(r"attn_[qk]\.", theirs):  # pairs of channels stand side by side there
            tensor = tensor.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        if half and tensor.ndim > 1 and not re.search("position_embd|ffn_gate_inp", theirs):
            tensor = tensor.half()
        writer.add_tensor(theirs, tensor.contiguous().numpy())

    plain = to_tokenizer_json(tokenizer)["model"]
    tokens, kinds = [f"<|unused_{i}|>" for i in range(config.vocab_size)], [UNUSED] * config.vocab_size
    for kind, ids in ((NORMAL, plain["vocab"]), (CONTROL, tokenizer.special), (IN_TEXT, tokenizer.added)):
        for text, i in ids.items():
            if i < config.vocab_size:  # models of plain text can lack the control tokens of conversations
                tokens[i], kinds[i] = text, kind
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pattern)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(plain["merges"] or ["ÿ ÿ"])  # there must be one: of a byte that no text has
    writer.add_bos_token_id(tokenizer.begin)
    writer.add_eos_token_id(tokenizer.special[tokenizer.template.end] if chat else tokenizer.end_of_text)
    writer.add_add_bos_token(not chat)  # the template of a chat begins it
    if chat:
        writer.add_chat_template(tokenizer.template.jinja)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def export(target: Path, run: Path, half: bool = False) -> None:
    """Write the newest checkpoint of a run with its tokenizer, as a GGUF file if the name says so, else as a folder."""
    is_gguf = target.suffix == ".gguf"
    if half and not is_gguf:
        fail("--half is for GGUF: name a file that ends with .gguf")
    with exit_on(ValueError, OSError):
        if target.exists() and (is_gguf or not target.is_dir() or any(target.iterdir())):
            fail(f"{target} is not an empty folder or a new .gguf file: choose another name to export to")
        state, record = load_checkpoint(run)
    try:
        config, chat = GPTConfig(**model_settings(state["config"])), state["tokenizer"].get("chat", False)
        tokenizer = Tokenizer.from_dict(state["tokenizer"])
        tokenizer = tokenizer.for_chat() if chat else tokenizer  # ValueError if its template was not stored
        if config.position == "rope":  # fine-tuning with a shorter --seq_len does not shorten the context
            config = config.changed(seq_len=max(config.seq_len, state["config"].get("context") or 0))
        if is_gguf:
            with written_whole(target) as file:  # which save_gguf opens by its name
                save_gguf(Path(file.name), config, state["model"], tokenizer, chat, half)
        else:
            end = sorted(tokenizer.ends, reverse=True) if chat else tokenizer.end_of_text
            save_published(target, config, state["model"], tokenizer.begin, end)
            save_published_tokenizer(target, tokenizer, chat)
    except Exception as error:  # noqa: BLE001 - safetensors has exceptions of its own
        fail(f"cannot export {record.with_suffix('')}: {error}")
    names = "" if is_gguf else f": {', '.join(sorted(path.name for path in target.iterdir()))}"
    print(f"exported step {state['step']} of {record.parent} to {target}{names}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--export", nargs=2, type=Path, metavar=("NAME", "RUN"), required=True, help="write a folder, or NAME.gguf")
    add("--half", action="store_true", help="write the matrices of a GGUF file in float16")
    args = parser.parse_args()
    export(*args.export, args.half)


if __name__ == "__main__":
    main()
