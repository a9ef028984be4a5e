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
from collections import defaultdict
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model import GPT, GPT2, GPTConfig, empty_model, load_checkpoint, model_settings, model_with
from prepare import exit_on, fail, write_json
from tokenizer import END_OF_TEXT, Template, Tokenizer, load_tokenizer, to_tokenizer_json

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
        chat = has_chat_template(folder)
    except Exception as error:  # noqa: BLE001 - a corrupt file can fail in any way
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot load {folder}: {reason}") from error
    tokenizer = load_tokenizer(folder).to_dict(chat)
    return {"step": 0, "model": weights, "config": asdict(config), "tokenizer": tokenizer}, folder


def has_chat_template(folder: Path) -> bool:
    config = folder / "tokenizer_config.json"
    inside = config.exists() and "chat_template" in json.loads(config.read_text(encoding="utf-8"))
    return inside or (folder / "chat_template.jinja").exists()


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


def save_published_tokenizer(folder: Path, tokenizer: Tokenizer, chat: bool = False) -> None:
    """Write tokenizer.json and tokenizer_config.json, and for a chat model its template."""
    write_json(folder / "tokenizer.json", to_tokenizer_json(tokenizer))
    template = tokenizer.template if chat else None
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
        f"{{{{- message['content'].rstrip() if message['role'] == 'assistant' else message['content'] | trim }}}}"
        f"{{{{- {end} + {gap} }}}}{{%- endfor -%}}"
        f"{{%- if add_generation_prompt -%}}{{{{- {before} + 'assistant' + {after} + {opening} }}}}{{%- endif -%}}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def export(folder: Path, run: Path) -> None:
    """Write the newest checkpoint of a run as a published model with its tokenizer."""
    with exit_on(ValueError, OSError):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            fail(f"{folder} is not an empty folder: choose another one to export to")
        state, record = load_checkpoint(run)
    try:
        tokenizer, chat = Tokenizer.from_dict(state["tokenizer"]), state["tokenizer"].get("chat", False)
        stops = sorted(tokenizer.ends, reverse=True) if chat else tokenizer.end_of_text
        ends = {"bos_token_id": tokenizer.end_of_text, "eos_token_id": stops}
        save_published(folder, GPTConfig(**model_settings(state["config"])), state["model"], ends)
        save_published_tokenizer(folder, tokenizer, chat)
    except Exception as error:  # noqa: BLE001 - safetensors has exceptions of its own
        fail(f"cannot export {record.with_suffix('')}: {error}")
    names = ", ".join(sorted(path.name for path in folder.iterdir()))
    print(f"exported step {state['step']} of {record.parent} to {folder}: {names}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", nargs=2, type=Path, metavar=("DIR", "RUN"), required=True, help="write a model")
    export(*parser.parse_args().export)


if __name__ == "__main__":
    main()
