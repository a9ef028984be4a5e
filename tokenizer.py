"""Text to token ids and back.

A model reads numbers. A tokenizer cuts text into tokens, pieces of text, each with an id in its vocabulary:

    >>> tokenizer = named_tokenizer("gpt2")
    >>> tokenizer.encode("Hello world").tolist(), tokenizer.bytes_of(15496)
    ([15496, 995], b'Hello')

All tokenizers here are byte-pair encoding on bytes, so that any text can be encoded:

    byte         the 256 bytes are the tokens
    bpe:4096     bytes, and pairs of tokens that train_bpe() merges into new ones until there are 4,096
    gpt2, ...    the published ones that the library tiktoken knows by name
    a folder     a run's or a published model's, with its file tokenizer.json

Control tokens, such as the <|endoftext|> between documents, belong to no text: where a text spells one, it is encoded
as ordinary characters. A published tokenizer can have other tokens that are found in any text, as Qwen3's <think> is.
tiktoken does the encoding.
"""

import base64
import heapq
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import regex  # tiktoken's dependency: unlike re, it knows \p{L}, any letter, and \p{N}, any digit
import tiktoken

# ---------------------------------------------------------------------------------------------------------------------
# Learning a vocabulary from text

BYTES = {bytes([byte]): byte for byte in range(256)}
# A tokenizer first splits text into chunks with a regular expression, and no token spans two chunks. GPT-4's chunks are
# words with the space before them, numbers of up to three digits, punctuation, and white space:
# "it's 12345 cats" -> "it", "'s", " ", "123", "45", " cats"
GPT4_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"""
    r"""|\s+(?!\S)|\s"""
)
Progress = Callable[[int], None]  # is told how many tokens have been learned so far


def train_bpe(chunk_counts: Counter[str], vocab_size: int, progress: Progress | None = None) -> dict[bytes, int]:
    """Train byte-pair encoding (Sennrich et al., 2016; on bytes as in GPT-2).

    Start with the 256 bytes as tokens. Then repeat: the most frequent pair of adjacent tokens becomes a new token. Ties
    go to the pair with the smaller ids. `naive_bpe` in tests/test_tokenizer.py does the same in fifteen lines by
    counting all pairs again for every new token; this function only updates the counts that change.

    `chunk_counts` says how often each chunk occurs in the text. Returns {bytes of a token: its id}, with `vocab_size`
    tokens, or fewer if no pair occurs twice any more: {"aaabdaaabac": 1} adds {b"aa": 256, b"ab": 257, b"aaab": 258}.
    """
    chunks = [list(chunk.encode()) for chunk in chunk_counts]  # as token ids
    counts = list(chunk_counts.values())
    pair_counts: Counter[tuple[int, int]] = Counter()
    chunks_with = defaultdict(set)  # pair -> the chunks it occurs in, as indices
    for i, chunk in enumerate(chunks):
        for pair in pairwise(chunk):
            pair_counts[pair] += counts[i]
            chunks_with[pair].add(i)

    tokens, ranks = list(BYTES), dict(BYTES)  # id -> bytes; bytes -> id, which tiktoken calls a rank
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)
    while heap and len(ranks) < vocab_size:
        negative_count, pair = heapq.heappop(heap)
        if -negative_count != pair_counts[pair]:
            continue  # outdated: the heap holds the pair's current count as well
        if pair_counts[pair] < 2:
            break
        token = tokens[pair[0]] + tokens[pair[1]]
        if token not in ranks:  # else another pair spelled the same bytes, and tiktoken has one token for both
            ranks[token] = len(tokens)
            tokens.append(token)
            if progress:
                progress(len(tokens))
        changes: Counter[tuple[int, int]] = Counter()
        for i in chunks_with.pop(pair):
            for old in pairwise(chunks[i]):
                changes[old] -= counts[i]
            chunks[i] = merge(chunks[i], pair, ranks[token])
            for new in pairwise(chunks[i]):
                changes[new] += counts[i]
                chunks_with[new].add(i)
        for changed, change in changes.items():
            if change:
                pair_counts[changed] += change
                heapq.heappush(heap, (-pair_counts[changed], changed))
    return ranks


def merge(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """merge([1, 2, 3, 1, 2], (1, 2), 4) -> [4, 3, 4]"""
    merged = []
    for token in ids:
        if merged and (merged[-1], token) == pair:
            merged[-1] = new
        else:
            merged.append(token)
    return merged


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer

END_OF_TEXT, LLAMA_END, LLAMA_BEGIN = "<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>"
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")  # around each message of a conversation
SPECIAL_TOKENS = (END_OF_TEXT, *CHAT_TOKENS)  # of every tokenizer made here
PROBE = "I'll DON'T we'Ve 1234567 a1b22 naïve 你好吗 🙂🙂 x==y; f(__init__)  \t two\n\n  \r\n 'end' "  # see cuts_like()


def one_of(names: Iterable[str]) -> re.Pattern:
    """Finds these names in a text: where several fit, the longest."""
    return re.compile(f"({'|'.join(map(re.escape, sorted(names, key=len, reverse=True)))})")


class Part(NamedTuple):
    """A piece of what a model is trained on or asked."""

    text: str
    control: bool = False  # control tokens that the text spells are meant as such
    target: bool = True  # the loss counts its tokens


class Tokenizer:
    """Turns text into ids and back. tiktoken does that: it splits the text into chunks, begins with the bytes of each,
    and merges neighbours into the token with the lowest id, as long as two of them spell one.

    pattern         the regular expression that cuts text into chunks
    ranks           {bytes of an ordinary token: its id}; tiktoken calls ids ranks
    special, added  {name: id} of control tokens, and of other tokens that are found in any text
    begin           the token before each text, by default the one that ends the text before it
    template        how to write conversations, see Template; by default CHATML, if it has the tokens; or None
    refusal         why the template of its model cannot be used, in a sentence, or None
    """

    def __init__(
        self,
        name: str,
        pattern: str,
        ranks: dict[bytes, int],
        special: dict[str, int] | None = None,
        added: dict[str, int] | None = None,
        begin: int | None = None,
        template: "Template | str | None" = None,
    ):
        """`special` is SPECIAL_TOKENS by default. A `template` that is a str is the refusal: there is no template."""
        if special is None:
            special = {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
        self.name, self.pattern, self.ranks, self.special, self.added = name, pattern, ranks, special, added or {}
        named = self.special | self.added
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=named)
        self.n_vocab = self.encoding.n_vocab
        self.end_of_text = special[END_OF_TEXT if END_OF_TEXT in special else LLAMA_END]
        self.begin = self.end_of_text if begin is None else begin
        if template is None and special.keys() >= set(CHAT_TOKENS):
            template = CHATML
        self.template, self.refusal = (None, template) if isinstance(template, str) else (template, None)
        self.missing = bytes(byte for byte in range(256) if bytes([byte]) not in ranks)  # see encode_ordinary()
        self.added_tokens = one_of(self.added)
        self.control_tokens = one_of({*special, *CHAT_TOKENS})  # what a text may mean as a control token

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.extends(other) and other.extends(self)

    def extends(self, other: Self) -> bool:
        """Whether this one gives the same ids as the other, and differs by more control tokens at most."""
        same_ids = (self.ranks, self.added, self.begin) == (other.ranks, other.added, other.begin)
        same_texts = self.cuts_like(other.pattern) and other.template in (None, self.template)
        return same_ids and same_texts and other.special.items() <= self.special.items()

    def cuts_like(self, pattern: str) -> bool:
        """Whether this pattern, which may be written in another way, gives the same ids: it cuts PROBE alike, or all
        tokens are bytes."""
        same_chunks = regex.findall(self.pattern, PROBE) == regex.findall(pattern, PROBE)
        return same_chunks or max(map(len, self.ranks)) == 1

    def encode(self, text: str, control: bool = False) -> np.ndarray:
        """The ids [N] of a text. A control token that it spells is encoded as ordinary characters, unless `control`."""
        if control:
            return self.encoding.encode_to_numpy(text, allowed_special="all")
        if not self.added:
            return self.encode_ordinary(text)
        pieces = self.added_tokens.split(text)  # every second one is such a token
        ids = [[self.added[piece]] if i % 2 else self.encode_ordinary(piece) for i, piece in enumerate(pieces)]
        return np.concatenate(ids).astype(np.uint32)

    def encode_ordinary(self, text: str) -> np.ndarray:
        """The ids [N] of a text in ordinary tokens. Bytes without one, such as some control characters in SmolLM2's
        vocabulary, make tiktoken panic. They are left out of their chunks, as in Hugging Face's library."""
        if not self.missing or not set(self.missing) & set(text.encode()):
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        chunks = (chunk.encode().translate(None, self.missing) for chunk in regex.findall(self.pattern, text))
        ids = [token for chunk in chunks if chunk for token in self.encoding._encode_single_piece(chunk)]
        return np.array(ids, np.uint32)

    def encode_parts(self, parts: Iterable[Part]) -> tuple[np.ndarray, np.ndarray]:
        """The ids [N] of parts that are encoded one by one, so that none can change the tokens of another, and which of
        them the loss counts. What a template writes between a text and its next control token belongs to the text."""
        joined: list[Part] = []
        for part in parts:
            if part.control and joined and not joined[-1].control:
                between, *rest = self.control_tokens.split(part.text, maxsplit=1)
                joined[-1] = joined[-1]._replace(text=joined[-1].text + between)
                part = part._replace(text="".join(rest))
            joined.append(part)
        ids = [self.encode(part.text, part.control) for part in joined]
        return np.concatenate(ids), np.repeat([part.target for part in joined], [len(part) for part in ids])

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token, or b"" for an unused id (published vocabularies have a few)."""
        try:
            return self.encoding.decode_single_token_bytes(token)
        except KeyError:
            return b""

    def decode(self, tokens: Iterable[int]) -> str:
        return b"".join(map(self.bytes_of, tokens)).decode(errors="replace")

    @property
    def n_text(self) -> int:
        """One more than the highest id in text: of ordinary and added tokens, and those around documents."""
        return 1 + max(self.end_of_text, self.begin, *self.added.values(), *self.ranks.values())

    @property
    def ends(self) -> set[int]:
        """The tokens at which a model ends a document or an answer."""
        return {self.end_of_text} | ({self.special[self.template.end]} if self.template else set())

    def for_chat(self) -> Self:
        """This tokenizer, with ChatML's control tokens if it has no template. Raises ValueError if it has a refusal."""
        if self.refusal:
            raise ValueError(self.refusal)
        if self.template:
            return self
        special = {token: self.n_vocab + i for i, token in enumerate(CHAT_TOKENS)} | self.special
        return Tokenizer(self.name, self.pattern, self.ranks, special, self.added, self.begin)

    def to_dict(self, chat: bool = False) -> dict:
        """JSON values, for meta.json, a run and its checkpoints. `chat` tells that the data set, or what the model was
        trained on last, consists of conversations."""
        ranks = {base64.b64encode(token).decode(): rank for token, rank in self.ranks.items()}
        plain = {"name": self.name, "pattern": self.pattern, "ranks": ranks, "special_tokens": self.special}
        template = list(self.template) if self.template else self.refusal
        return plain | {"added": self.added, "begin": self.begin, "template": template, "chat": chat}

    @classmethod
    def from_dict(cls, plain: dict) -> Self:
        """The inverse of to_dict. Older ones lack the last settings."""
        ranks = {base64.b64decode(token): rank for token, rank in plain["ranks"].items()}
        more = {name: plain[name] for name in ("added", "begin", "template") if name in plain}
        if isinstance(more.get("template"), list):
            more["template"] = Template(*more["template"])
        elif "template" not in more and plain["special_tokens"].keys() & {"<think>", "<|start_header_id|>"}:
            more["template"] = f"the chat template of {plain['name']} was not stored: tune the published model again"
        return cls(plain["name"], plain["pattern"], ranks, plain["special_tokens"], **more)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers by name

MAX_CHUNK = 256  # characters


def named_tokenizer(name: str) -> Tokenizer | int:
    """The tokenizer that --tokenizer names or, for "bpe:N", the number N, which must be trained first. tiktoken's are
    downloaded once. Raises ValueError, in a sentence, for an unknown name."""
    if name == "byte":
        return byte_tokenizer()
    n_least = len(BYTES) + len(SPECIAL_TOKENS)
    if (match := re.fullmatch("bpe:([0-9]+)", name)) and int(match[1]) > n_least:
        return int(match[1])
    if name not in (published := tiktoken.list_encoding_names()):
        if os.path.exists(name):  # False for names that no file can have
            return load_tokenizer(name)
        choices = f"byte, bpe:N with N above {n_least}, a run, the folder of a published model, or one of"
        raise ValueError(f"unknown tokenizer {name!r}: use {choices} {', '.join(published)}")
    try:
        encoding = tiktoken.get_encoding(name)
    except OSError:  # includes the exceptions of requests, with which tiktoken downloads
        advice = "connect to the internet, or use byte or bpe:N"
        raise ValueError(f"could not download the tokenizer {name!r}: {advice}") from None
    return Tokenizer(name, encoding._pat_str, encoding._mergeable_ranks, encoding._special_tokens)


def train_tokenizer(texts: Iterable[str], vocab_size: int, progress: Progress | None = None) -> Tokenizer:
    """Learn a vocabulary of `vocab_size` tokens, SPECIAL_TOKENS among them, from texts. See train_bpe()."""
    chunk_counts: Counter[str] = Counter()
    for text in texts:
        chunk_counts.update(regex.findall(GPT4_PATTERN, text))
    short: Counter[str] = Counter()  # long ones, as in a genome, would take too long
    for chunk, count in chunk_counts.items():
        for i in range(0, len(chunk), MAX_CHUNK):
            short[chunk[i : i + MAX_CHUNK]] += count
    ranks = train_bpe(short, vocab_size - len(SPECIAL_TOKENS), progress)
    return Tokenizer(f"bpe:{len(ranks) + len(SPECIAL_TOKENS)}", GPT4_PATTERN, ranks)


def byte_tokenizer() -> Tokenizer:
    """Each byte is a token. Nothing is merged, so the pattern only has to make short chunks, which are encoded fast."""
    return Tokenizer("byte", r"(?s:.{1,64})", BYTES)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a run or of a published model, from the tokenizer.json in its folder: ours or Hugging Face's.
    Raises ValueError, in a sentence, if that is impossible."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent  # a checkpoint may be named, too
    file = folder / "tokenizer.json"
    try:
        if not file.exists() and (checkpoints := sorted(folder.glob("step-*.pt"))):  # an earlier version's run
            import torch

            state = torch.load(file := checkpoints[-1], map_location="cpu", weights_only=True, mmap=True)
            return Tokenizer.from_dict(state["tokenizer"])
        plain = json.loads(file.read_text(encoding="utf-8"))
        return Tokenizer.from_dict(plain) if "ranks" in plain else from_tokenizer_json(plain, folder)
    except FileNotFoundError:
        raise ValueError(f"there is no tokenizer in {path}: it holds neither tokenizer.json nor a checkpoint") from None
    except Exception as error:  # noqa: BLE001 - a damaged file can make tiktoken fail in any way
        raise ValueError(f"cannot use {file}: {error}") from error


# ---------------------------------------------------------------------------------------------------------------------
# tokenizer.json, the format of Hugging Face's library tokenizers

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
QWEN_PATTERN = GPT4_PATTERN.replace("{1,3}+", "")  # each digit on its own
DIGITS_PATTERN = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?[^\s\p{L}\p{N}]++|\s++(?=\p{N})|\s++$|\s+(?!\S)|\s"


def from_tokenizer_json(plain: dict, folder: Path) -> Tokenizer:
    """The tokenizer in the contents of a folder's tokenizer.json, with the template beside it. Raises ValueError for
    another kind than byte-level BPE, and by name for what would change ids."""
    pattern, added, special = published_pattern(plain), {}, {}
    for token in plain["added_tokens"]:  # no text may inject the tokens of SPECIAL_TOKENS, whatever the file says
        is_control = token["special"] or token["content"] in SPECIAL_TOKENS
        (special if is_control else added)[token["content"]] = token["id"]
    if not special.keys() & {END_OF_TEXT, LLAMA_END}:
        raise ValueError("it has no token that marks the end of a document")
    bytes_of = {letter: byte for byte, letter in byte_letters().items()}
    named = special | added
    vocab = {token: rank for token, rank in plain["model"]["vocab"].items() if token not in named}
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in plain["model"]["merges"]]
    merged = [vocab[left + right] for left, right in merges]
    if merged != sorted(merged):
        raise ValueError("its merges are not in the order of their ids, which tiktoken requires")
    reached = {token for token in vocab if len(token) == 1}  # the library does not produce those that no merge leads to
    for left, right in merges:
        if {left, right} <= reached:
            reached.add(left + right)
    if len(reached) < len(vocab) and plain["model"].get("ignore_merges"):
        raise ValueError("ignore_merges is not supported where no merges lead to some tokens")
    ranks = {bytes(bytes_of[letter] for letter in token): vocab[token] for token in vocab if token in reached}
    begin, template = published_beginning(plain, special), published_template(folder, special)
    return Tokenizer(folder.name, pattern, ranks, special, added, begin, template)


def published_beginning(plain: dict, special: dict[str, int]) -> int | None:
    """The token that the post-processor of a tokenizer.json puts before each text. Llama 3's early ones lack theirs."""
    last = plain.get("post_processor") or {"type": "ByteLevel"}
    begin = special.get(LLAMA_BEGIN)
    for step in last.get("processors", [last]):
        match step:
            case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": name}}, {"Sequence": _}]}:
                begin = special[name]
            case {"type": "ByteLevel"} | {"type": "TemplateProcessing", "single": [{"Sequence": _}]}:
                pass
            case _:
                raise ValueError(f"the post-processor {json.dumps(step)} is not supported")
    return begin


def published_pattern(plain: dict) -> str:
    """The pattern that splits text as the pre-tokenizer of a tokenizer.json does."""
    model, first = plain["model"], plain["pre_tokenizer"] or {}
    steps = first.get("pretokenizers", [first])  # a sequence of steps, or one step on its own
    if model["type"] != "BPE" or "ByteLevel" not in [step.get("type") for step in steps]:
        raise ValueError("it is not byte-level BPE, the only kind that is supported")
    normalizer = (plain.get("normalizer") or {"type": "NFC"})["type"]
    if normalizer != "NFC":  # which nearly all text is in
        raise ValueError(f"the normalizer {normalizer} is not supported")
    refused = "dropout unk_token continuing_subword_prefix end_of_word_suffix byte_fallback lstrip rstrip single_word"
    for settings in (model, *plain["added_tokens"]):
        for name in refused.split():
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


def to_tokenizer_json(tokenizer: Tokenizer, begin: bool = False) -> dict:
    """The inverse of from_tokenizer_json: with this, Hugging Face's libraries produce the same ids, and with `begin`
    the token that begins a text before them."""
    letters = byte_letters()
    vocab = {"".join(letters[byte] for byte in token): rank for token, rank in tokenizer.ranks.items()}
    # tiktoken merges any two neighbours that spell a token, so every way to split a token is a merge.
    pairs = ((token[:i], token[i:]) for token in sorted(vocab, key=vocab.get) for i in range(1, len(token)))
    merges = [" ".join(pair) for pair in pairs if vocab.keys() >= set(pair)]
    # The regular expressions there (Oniguruma) read {1,3}+ as a repetition and $ as the end of a line.
    pattern = tokenizer.pattern.replace("}+", "}").replace("$", r"\z")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    name = next(name for name, token in tokenizer.special.items() if token == tokenizer.begin)
    first, text = {"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    named = {name: {"id": name, "ids": [tokenizer.begin], "tokens": [name]}}
    beginning = {"single": [first, text], "pair": [first, text, first, text], "special_tokens": named}
    added, off = tokenizer.special | tokenizer.added, ("single_word", "lstrip", "rstrip", "normalized")
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": token, "content": name, "special": name in tokenizer.special, **dict.fromkeys(off, False)}
            for name, token in added.items()
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level] if merges else [byte_level]},
        "post_processor": {"type": "TemplateProcessing", **beginning} if begin else None,
        "decoder": byte_level,
        # Added tokens stand here too: where they do not, the library gives them other ids than those above.
        "model": {"type": "BPE", "vocab": vocab | added, "merges": merges},
    }


# ---------------------------------------------------------------------------------------------------------------------
# Templates of conversations, which chat.py writes


class Template(NamedTuple):
    """How a chat model expects a conversation."""

    jinja: str  # a program in the language that Hugging Face uses for this
    end: str  # the token with which the model ends its answer

    def write(self, messages: list[dict], ask: bool) -> str:
        """The text of messages {"role", "content"}. `ask` adds the beginning of the next answer. Raises ValueError if
        the program fails."""
        try:
            return compiled(self.jinja).render(messages=messages, add_generation_prompt=ask, tools=None)
        except Exception as error:  # noqa: BLE001 - a program can fail in any way
            raise ValueError(f"its program ends with {type(error).__name__}: {error}") from error


@cache
def compiled(jinja: str):
    """A program, as transformers runs it. It may be a stranger's, but in this sandbox it can only write text, at worst
    without end, until Ctrl-C."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # torch installs it

    options = {"trim_blocks": True, "lstrip_blocks": True, "extensions": ["jinja2.ext.loopcontrols"]}
    return ImmutableSandboxedEnvironment(**options).from_string(jinja)


CHATML = Template(  # all models trained here
    "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{{- message['content'].rstrip() if message['role'] == 'assistant' else message['content'] | trim -}}"
    "{{- '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}",
    "<|im_end|>",
)


def published_jinja(folder: Path) -> tuple[str | None, dict]:
    """The chat template of a published model, if it has one, and the settings of its tokenizer."""
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    return file.read_text(encoding="utf-8") if file.exists() else settings.get("chat_template"), settings


def published_template(folder: Path, special: dict[str, int]) -> Template | str | None:
    """The template of a published model, or a sentence that tells why it cannot be used, or None if there is none. What
    it asks for besides messages is fixed: Qwen3 does not think first, and Llama 3.2 gets the date of its fallback."""
    source, settings = published_jinja(folder)
    if source is None:
        return None
    if isinstance(source, list):  # several, for several purposes
        source = {each["name"]: each["template"] for each in source}.get("default")
        if source is None:
            return f"none of the chat templates of {folder.name} is the default one"
    fixed = {name: settings.get(name) for name in ("bos_token", "eos_token")}
    for name, value in (fixed | {"enable_thinking": False, "date_string": "26 Jul 2024"}).items():
        value = value["content"] if isinstance(value, dict) else value  # a token with its settings
        line = f"{{%- set {name} = {json.dumps(value)} -%}}\n"
        if value is not None and name in source and line not in source:
            source = line + source
    roles, contents = ("system", *("user", "assistant") * 2), ("Be brief.", "Hi.", "Hello.", "2+2?", "Four.")
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents)]
    try:
        Template(source, "").write(messages[1:2], ask=True)
        text = Template(source, "").write(messages, ask=False)
        places = [text.find(content) for content in contents]
        after = text.partition(contents[-1])[2]
        if -1 in places or places != sorted(places):
            raise ValueError("it does not write all messages in their order")
        if not (ends := [name for name in special if after.startswith(name)]):
            raise ValueError(f"no control token ends an answer, but {after[:20]!r}")
        return Template(source, max(ends, key=len))
    except ValueError as error:
        return f"the chat template of {folder.name} cannot be used: {error}"
