"""Turn text into the token shards that train.py reads.

    python prepare.py                                    the default corpus: Python's own standard library
    python prepare.py book.txt notes/ --out data/mine    files and folders, combined into one data set
    python prepare.py pile.jsonl.gz --tokenizer gpt2     one document per record (field "text"), GPT-2's tokenizer
    zcat dump.gz | python prepare.py - --out data/dump   text from a pipe
    python prepare.py play.txt --tokenizer byte --val_tail --val_fraction 0.1
    python prepare.py --chat --tokenizer runs/toy-1      the default conversations, with the tokenizer of a run
    python prepare.py chats.jsonl --tokenizer runs/toy-1 conversations, recognised by their keys

A data set is a folder:

    data/mine/train-00000.npy ...   token ids in a one-dimensional array: uint16 if the vocabulary fits, else uint32
    data/mine/val-00000.npy ...     the same for the val split, the text held out from training
    data/mine/meta.json             the tokenizer, the sizes, and the SHA-256 of each shard

The folder gets its name when it is complete; until then it is called data/mine.partial. In the shards, each document is
followed by the token <|endoftext|>. A document is a text file, or one record of a .jsonl, .jsonl.gz, .json or .parquet
file: a text, or a conversation with the control tokens of its template, see parts().

Text is read in pieces of about a megabyte, so memory use stays small however large the input is:
files -> documents -> pieces of text, each for one split -> token ids -> shards.
"""

import argparse
import ast
import atexit
import base64
import codecs
import gzip
import hashlib
import heapq
import io
import json
import math
import os
import random
import shutil
import sys
import sysconfig
import tempfile
import time
import zlib
from bisect import bisect_left, insort
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from itertools import groupby, pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn, TextIO

import numpy as np
import regex  # tiktoken's dependency: unlike re, it knows \p{L}, any letter, and \p{N}, any digit
import tiktoken

END_OF_TEXT = "<|endoftext|>"
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")  # around each message of a conversation, see parts()
SPECIAL_TOKENS = (END_OF_TEXT, *CHAT_TOKENS)  # of every tokenizer made here
SPLITS = ("train", "val")
IGNORED = -100  # torch's number for a target that the loss does not count
DEFAULT_TOKENIZER = "bpe:4096"
CONTAINERS = (".jsonl", ".ndjson", ".jsonl.gz", ".json", ".parquet")  # one document per record, else one per file
PIECE_BYTES = 1 << 20
SHARD_TOKENS = 1 << 27
BPE_SAMPLE_BYTES = 1 << 26  # a BPE tokenizer is trained on about this much text, sampled evenly from the input
OUR_FILES = r"(train|val)-\d{5}\.npy|meta\.json(\.partial)?"  # names in an unfinished data set; others are a user's

Piece = tuple[str, str | None]  # a split and some text for it; None in place of text marks the end of a document


def prepare(
    inputs: list[str],
    out: str | Path,
    tokenizer: str = DEFAULT_TOKENIZER,
    val_fraction: float | None = None,
    val_tail: bool = False,
    field: str = "text",
    chat: bool = False,
) -> None:
    """Make the data set `out` from files, folders and URLs, or from the default corpus if `inputs` is empty.

    The val split gets about `val_fraction` of the documents, or with `val_tail` that fraction of each document. `field`
    is the field of .jsonl, .json and .parquet records that holds their text. With `chat` the records are conversations,
    by default questions about the default corpus. Files of conversations are recognised without it.
    """
    out, say = Path(out), Console(sys.stderr).line
    if not out.name:
        fail(f"--out {out} does not name a folder for the data set")
    partial = out.with_name(out.name + ".partial")
    if val_fraction is None:
        val_fraction = 0.01 if inputs else 0.05  # the default corpus is small
    if out.exists():
        advice = ", or remove it first" if (out / "meta.json").exists() else ""  # else it may be a user's
        fail(f"{out} already exists: choose another --out{advice}")
    if foreign := [path for path in partial.glob("*") if not regex.fullmatch(OUR_FILES, path.name)]:
        fail(f"{partial} is needed for unfinished data, but it holds {foreign[0].name}: choose another --out")
    if not 0 < val_fraction < 1:
        fail(f"--val_fraction {val_fraction} is not between 0 and 1")
    encoding = named_tokenizer(tokenizer)  # for bpe:N the number N: that tokenizer is trained below

    skipped: Counter[str] = Counter()  # what was skipped and why -> how often
    files = find_files(inputs, out.parent, skipped)
    if not files:
        fail(f"found no text to read: {'; '.join(skipped) or 'the folders hold no files'}")
    chat = chat or holds_conversations(files[0], field)  # the others are then expected to hold the same
    if chat and val_tail:
        fail("--val_tail is for text: of conversations, whole ones are held out")
    if chat and not isinstance(encoding, int):
        encoding = with_chat_tokens(encoding)
    if len(files) == 1 and not is_container(files[0]) and not val_tail and not chat:
        say(f"{files[0]} is a single document: its last {val_fraction:.0%} is held out, as with --val_tail")
        val_tail = True
    total_bytes = sum(path.stat().st_size for path in files)

    def pieces(counts: Counter[str]) -> Iterator[Piece]:
        if not chat:
            return split_pieces(files, field, val_fraction, val_tail, counts)
        template = CHATML if isinstance(encoding, int) else template_of(encoding)
        talks = conversations(files, val_fraction, counts) if inputs else stdlib_conversations(files, val_fraction)
        return ((split, part) for split, *_, messages in talks for part in (*parts(template, messages), None))

    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
        partial.mkdir(parents=True)
        if isinstance(encoding, int):  # this reads all text, which is then read again to encode it
            encoding = train_tokenizer(encoding, pieces(Counter()), total_bytes)
        splits = write_shards(partial, encoding, pieces(skipped), total_bytes)

        for what, count in skipped.most_common(20):
            say(f"skipped {what}" + (f" ({count:,})" if count > 1 else ""))
        if len(skipped) > 20:
            say(f"skipped in total: {skipped.total():,}")
        if not any(sizes["documents"] for sizes in splits.values()):
            fail(f"found no {'conversations' if chat else 'text'}: {'; '.join(list(skipped)[:3])}")
        for split, sizes in splits.items():
            if not sizes["tokens"]:
                advice = "" if chat else ", or give --val_tail to hold out the end of each document"
                fail(f"none of the documents fell into the {split} split: raise --val_fraction{advice}")
        meta = {"tokenizer": tokenizer_to_dict(encoding, chat), "vocab_size": encoding.n_vocab, **splits}
        write_json(partial / "meta.json", meta | {"sources": inputs or ["the Python standard library"]})
        partial.rename(out)
    except OSError as error:
        fail(f"cannot make the data set {out}: {error}")
    except KeyboardInterrupt:
        fail(f"interrupted: there is no data set in {out} yet; run the same command again")
    finally:
        shutil.rmtree(partial, ignore_errors=True)

    tokens = np.load(out / "val-00000.npy", mmap_mode="r")[:30]
    texts = [token_bytes(encoding, token).decode(errors="replace") for token in tokens.tolist()]
    if chat:  # in braces what the loss counts
        texts = [f"{{{text}}}" if counts else text for text, counts in zip(texts, answer_mask(encoding, tokens))]
    say(f"held-out text begins, with | between tokens: {repr('|'.join(texts))}")
    line = "{:5} {documents:9,} documents {bytes:13,} bytes {tokens:13,} tokens, {:.2f} bytes per token"
    for split, sizes in splits.items():
        say(line.format(split, sizes["bytes"] / sizes["tokens"], **sizes))
    say(f"{out} is ready: vocabulary of {encoding.n_vocab:,} ({encoding.name})")


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers. Every tokenizer is a tiktoken.Encoding: bytes, BPE trained here, or a published one.

# A tokenizer first splits text into chunks with a regular expression, and no token spans two chunks. GPT-4's chunks are
# words with the space before them, numbers of up to three digits, punctuation, and white space:
# "it's 12345 cats" -> "it", "'s", " ", "123", "45", " cats"
GPT4_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"""
    r"""|\s+(?!\S)|\s"""
)
MAX_CHUNK = 256  # characters; longer chunks, as in a genome, are cut before training, which would take too long
BYTES = {bytes([byte]): byte for byte in range(256)}


def named_tokenizer(name: str) -> tiktoken.Encoding | int:
    """Return the tokenizer that --tokenizer names, or for "bpe:N" the vocabulary size N of the one to train.

    "byte" and "bpe:N" need no download. Other names ("gpt2", "cl100k_base", ...) are tiktoken's, which downloads the
    tokenizer once. A run or the folder of a published model stands for its tokenizer.
    """
    if name == "byte":
        return byte_tokenizer()
    n_least = len(BYTES) + len(SPECIAL_TOKENS)
    if (match := regex.fullmatch("bpe:([0-9]+)", name)) and int(match[1]) > n_least:
        return int(match[1])
    if Path(name).exists():
        from published import load_tokenizer  # loads torch, so not at the top

        return load_tokenizer(Path(name))
    if name not in tiktoken.list_encoding_names():
        choices = f"byte, bpe:N with N above {n_least}, a run, the folder of a published model, or one of"
        fail(f"unknown tokenizer {name!r}: use {choices} {', '.join(tiktoken.list_encoding_names())}")
    try:
        return tiktoken.get_encoding(name)
    except OSError:  # includes the exceptions of requests, with which tiktoken downloads
        fail(f"could not download the tokenizer {name!r}: connect to the internet, or use byte or bpe:N")


def make_tokenizer(name: str, pattern: str, ranks: dict[bytes, int], special: dict | None = None) -> tiktoken.Encoding:
    """Make a tokenizer from {bytes of a token: its id}. tiktoken calls ids ranks, since it merges the lowest first."""
    if special is None:
        special = {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def byte_tokenizer() -> tiktoken.Encoding:
    """Each byte is a token. Nothing is merged, so the pattern only has to make short chunks, which are encoded fast."""
    return make_tokenizer("byte", r"(?s:.{1,64})", BYTES)


def train_tokenizer(vocab_size: int, pieces: Iterable[Piece], total_bytes: int) -> tiktoken.Encoding:
    """Train a BPE tokenizer on text of the train split. Its `vocab_size` tokens include SPECIAL_TOKENS."""
    sample_every = math.ceil(total_bytes / BPE_SAMPLE_BYTES)
    chunk_counts: Counter[str] = Counter()
    texts = (piece for piece in pieces if type(piece[1]) is str)
    for i, (split, text) in enumerate(with_progress(texts, "reading for the tokenizer", total_bytes)):
        if split == "train" and i % sample_every == 0:
            chunk_counts.update(regex.findall(GPT4_PATTERN, text))
    for chunk in [chunk for chunk in chunk_counts if len(chunk) > MAX_CHUNK]:
        count = chunk_counts.pop(chunk)
        for i in range(0, len(chunk), MAX_CHUNK):
            chunk_counts[chunk[i : i + MAX_CHUNK]] += count
    ranks = train_bpe(chunk_counts, vocab_size - len(SPECIAL_TOKENS))
    return make_tokenizer(f"bpe:{len(ranks) + len(SPECIAL_TOKENS)}", GPT4_PATTERN, ranks)


def train_bpe(chunk_counts: Counter[str], vocab_size: int) -> dict[bytes, int]:
    """Train byte-pair encoding (Sennrich et al., 2016; on bytes as in GPT-2).

    Start with the 256 bytes as tokens. Then repeat: the most frequent pair of adjacent tokens becomes a new token. Ties
    go to the pair with the smaller ids. `naive_bpe` in tests/test_prepare.py does the same in fifteen lines by counting
    all pairs again for every new token; this function only updates the counts that change.

    `chunk_counts` says how often each chunk occurs in the text. Returns {bytes of a token: its id}, with `vocab_size`
    tokens, or fewer if no pair occurs twice any more.
    """
    chunks = [list(chunk.encode()) for chunk in chunk_counts]  # as token ids
    counts = list(chunk_counts.values())
    pair_counts: Counter[tuple[int, int]] = Counter()
    chunks_with = defaultdict(set)  # pair -> the chunks it occurs in, as indices
    for i, chunk in enumerate(chunks):
        for pair in pairwise(chunk):
            pair_counts[pair] += counts[i]
            chunks_with[pair].add(i)

    tokens, ranks = list(BYTES), dict(BYTES)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)
    console = Console(sys.stderr, log_every=10)
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
            console.glimpse(f"learning tokens: {len(tokens):,} of {vocab_size:,}")
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


class Control(str):
    """Text in which control tokens such as <|im_start|> are meant as such."""


def encode(tokenizer: tiktoken.Encoding, text: str) -> np.ndarray:
    """Return the token ids [N] of text. If the text spells a control token, that is encoded as ordinary characters,
    unless the text is Control.

    Bytes without a token, such as some control characters in SmolLM2's vocabulary, make tiktoken panic. They are left
    out of their chunks, as in Hugging Face's library.
    """
    if isinstance(text, Control):
        return tokenizer.encode_to_numpy(text, allowed_special="all")
    missing = missing_bytes(tokenizer)
    if not missing or not set(missing) & set(text.encode()):
        return tokenizer.encode_to_numpy(text, disallowed_special=())
    chunks = (chunk.encode().translate(None, missing) for chunk in regex.findall(tokenizer._pat_str, text))
    return np.array([token for chunk in chunks if chunk for token in tokenizer._encode_single_piece(chunk)], np.uint32)


@cache
def missing_bytes(tokenizer: tiktoken.Encoding) -> bytes:
    return bytes(byte for byte in range(256) if bytes([byte]) not in tokenizer._mergeable_ranks)


def token_bytes(tokenizer: tiktoken.Encoding, token: int) -> bytes:
    """Return the bytes of a token, or b"" for an unused id (published vocabularies have a few)."""
    try:
        return tokenizer.decode_single_token_bytes(token)
    except KeyError:
        return b""


def tokenizer_to_dict(tokenizer: tiktoken.Encoding, chat: bool = False) -> dict:
    """Return the tokenizer as JSON values, for meta.json and for every checkpoint. `chat` tells that the data set, or
    what the model was trained on last, consists of conversations."""
    return {
        "name": tokenizer.name,
        "pattern": tokenizer._pat_str,
        "ranks": {base64.b64encode(token).decode(): rank for token, rank in tokenizer._mergeable_ranks.items()},
        "special_tokens": tokenizer._special_tokens,
        "chat": chat,
    }


def tokenizer_from_dict(plain: dict) -> tiktoken.Encoding:
    """The inverse of tokenizer_to_dict."""
    ranks = {base64.b64decode(token): rank for token, rank in plain["ranks"].items()}
    return make_tokenizer(plain["name"], plain["pattern"], ranks, plain["special_tokens"])


# ---------------------------------------------------------------------------------------------------------------------
# Conversations as tokens

Message = dict[str, str]  # {"role": "system", "user", "assistant" or "tool", "content": text}


class Template(NamedTuple):
    """What a chat model expects around the messages of a conversation."""

    header: str  # before each message, with the role filled in
    end: str  # after each message: the token with which the model ends its answer
    gap: str = "\n"  # between messages
    begin: str = ""  # before the first message
    opening: str = ""  # what the last answer begins with, so that the model need not write it


CHATML = Template("<|im_start|>{role}\n", "<|im_end|>")
TEMPLATES = (  # a tokenizer uses the first one whose tokens it has, so special cases come first
    CHATML._replace(opening="<think>\n\n</think>\n\n"),  # Qwen3, which then answers without thinking
    CHATML,  # all models trained here, and SmolLM2
    Template(
        "<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", gap="", begin="<|begin_of_text|>"
    ),  # Llama 3
)


@cache
def template_of(tokenizer: tiktoken.Encoding) -> Template | None:
    """The template of a tokenizer, which follows from its control tokens."""
    for template in TEMPLATES:
        if set(regex.findall("<[^<>]+>", "".join(template))) <= tokenizer.special_tokens_set:
            return template


def with_chat_tokens(tokenizer: tiktoken.Encoding) -> tiktoken.Encoding:
    """The tokenizer, with ChatML's control tokens if it has none for conversations."""
    if template_of(tokenizer):
        return tokenizer
    special = {token: tokenizer.n_vocab + i for i, token in enumerate(CHAT_TOKENS)} | tokenizer._special_tokens
    return make_tokenizer(tokenizer.name, tokenizer._pat_str, tokenizer._mergeable_ranks, special)


def parts(template: Template, messages: list[Message], ask: bool = False) -> Iterator[str]:
    """Yield the text of a conversation in parts that are encoded one by one: control tokens count in the template's
    parts only, so that no message can inject one. `ask` adds the beginning of the next answer."""
    yield Control(template.begin)
    for i, message in enumerate(messages):
        yield Control(template.header.format(role=message["role"]))
        if message["role"] == "assistant" and i == len(messages) - 1:
            yield Control(template.opening)
        yield message["content"].strip()
        yield Control(template.end + template.gap)
    if ask:
        yield Control(template.header.format(role="assistant") + template.opening)


def render(tokenizer: tiktoken.Encoding, messages: list[Message], ask: bool = False) -> np.ndarray:
    """The tokens [N] of a conversation."""
    return np.concatenate([encode(tokenizer, part) for part in parts(template_of(tokenizer), messages, ask)])


def answer_mask(tokenizer: tiktoken.Encoding, tokens: np.ndarray) -> np.ndarray:
    """Which of the rendered tokens [N] are those of answers, with their ends: what a chat model learns to write."""
    template = template_of(tokenizer)
    header = encode(tokenizer, Control(template.header.format(role="assistant")))
    end = tokenizer.encode_single_token(template.end)
    mask, ends = np.zeros(len(tokens), bool), np.append(np.flatnonzero(tokens == end), len(tokens))
    headers = (np.lib.stride_tricks.sliding_window_view(tokens, len(header)) == header).all(1)
    begins = np.flatnonzero(headers) + len(header)
    for begin, last in zip(begins, ends[np.searchsorted(ends, begins)]):
        mask[begin : last + 1] = True
    return mask


def end_tokens(tokenizer: tiktoken.Encoding) -> set[int]:
    """The tokens at which a model ends a document or an answer."""
    template = template_of(tokenizer)
    return {tokenizer.eot_token} | ({tokenizer.encode_single_token(template.end)} if template else set())


# ---------------------------------------------------------------------------------------------------------------------
# Documents: from file names to pieces of text, each assigned to a split


def find_files(inputs: list[str], downloads: Path, skipped: Counter[str]) -> list[Path]:
    """Return the usable files among the inputs, each once, without hidden ones, folders in sorted order. Download URLs
    and copy pipes."""
    paths = [] if inputs else default_corpus()
    for name in inputs:
        path = download(name, downloads) if name.startswith(("http://", "https://")) else Path(name)
        if name == "-" or path.is_fifo():
            paths.append(copy_of_pipe(sys.stdin.buffer if name == "-" else open(path, "rb")))
        elif path.is_dir():
            paths += sorted(files_below(path, skipped))
        elif path.exists():
            paths.append(path)
        else:
            fail(f"no such file or folder: {name}")
    usable = {}
    for path in paths:
        reason = "given twice" if (real := os.path.realpath(path)) in usable else why_unusable(path)
        if reason:
            skipped[f"{path}: {reason}"] += 1
        else:
            usable[real] = path
    return list(usable.values())


def files_below(folder: Path, skipped: Counter[str]) -> Iterator[Path]:
    """Yield the files in a folder and in its subfolders. Follows links, but enters no folder twice."""
    entered = set()

    def unreadable(error: OSError) -> None:
        skipped[f"{error.filename}: {error.strerror}"] += 1

    for here, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        if (real := os.path.realpath(here)) in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = (name for name in folders if not name.startswith("."))
        yield from (Path(here, name) for name in names if not name.startswith("."))


def copy_of_pipe(pipe: BinaryIO) -> Path:
    """Copy a pipe, which can be read only once, to a file that is deleted when the program ends."""
    descriptor, path = tempfile.mkstemp(suffix=".txt")
    atexit.register(os.unlink, path)
    with pipe, open(descriptor, "wb") as file:
        shutil.copyfileobj(pipe, file)
    return Path(path)


def default_corpus() -> list[Path]:
    """The standard library of the Python that runs this: real text, on every machine, without a download."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "__pycache__"}
    paths = (path for path in root.rglob("*.py") if not left_out & set(path.relative_to(root).parts))
    return sorted(path for path in paths if path.is_file() and path.stat().st_size > 0)


def download(url: str, folder: Path) -> Path:
    """Download a URL into `folder`, unless that was done before, and return the file's path."""
    from http.client import HTTPException  # slow to import
    from urllib.parse import urlparse
    from urllib.request import urlopen

    name = Path(urlparse(url).path).name or "download.txt"
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"  # URLs can share a name
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with urlopen(url, timeout=60) as response, written_whole(path) as file:
                shutil.copyfileobj(response, file)
                if response.length:  # what is left of the announced length: http.client does not object
                    raise OSError(f"it broke off {response.length:,} bytes before its end")
        except (OSError, ValueError, HTTPException) as error:
            fail(f"could not fetch {url} ({error}): check the address and the network, or give a local file")
    return path


def why_unusable(path: Path) -> str | None:
    """Return the reason why a file cannot be used, or None. Text files are read through once to check their UTF-8."""
    try:
        if not path.is_file():
            return "not a regular file"
        with open(path, "rb") as file:
            if not file.peek(1):
                return "empty"
            if not is_container(path):
                for _ in codecs.iterdecode(iter(lambda: file.read(PIECE_BYTES), b""), "utf-8"):
                    pass
    except UnicodeDecodeError:
        return "not UTF-8"
    except OSError as error:
        return error.strerror or str(error)


def is_container(path: Path) -> bool:
    return path.name.lower().endswith(CONTAINERS)


def documents(path: Path, field: str, skipped: Counter[str]) -> Iterator[tuple[BinaryIO, int]]:
    """Yield each document of a file as a stream of UTF-8 and its size in bytes."""

    def text_in(record: object) -> bytes:
        text = record.get(field) if isinstance(record, dict) else None
        if not text or not isinstance(text, str):
            raise Unusable(f"records without text in --field {field!r}")
        return text.encode()

    if is_container(path):
        for data in usable_records(path, field, text_in, skipped):
            yield io.BytesIO(data), len(data)
    else:
        with open(path, "rb") as file:
            yield file, os.fstat(file.fileno()).st_size


class Unusable(Exception):
    """The reason why a record cannot be used."""


def usable_records(path: Path, field: str | None, use: Callable, skipped: Counter[str]) -> Iterator:
    """Yield use(record) for each record of a file. Those for which it raises Unusable, and those that are no JSON, are
    counted as skipped."""
    reasons, examples = Counter(), {}
    try:
        for record in records(path, field):
            try:
                record = json.loads(record) if isinstance(record, bytes) else record
                used = use(record)
            except (ValueError, RecursionError):
                reasons["records that are not valid JSON"] += 1
            except Unusable as error:
                reasons[str(error)] += 1
                if isinstance(record, dict):
                    examples.setdefault(str(error), f"; one has the keys {', '.join(map(str, record))}")
            else:
                yield used
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:  # a damaged file
        skipped[f"{path}: unreadable from some record on ({error})"] += 1
    for reason, count in reasons.items():
        skipped[f"{path}: {reason}{examples.get(reason, '')}"] += count


def records(path: Path, field: str | None) -> Iterator[bytes | object]:
    """Yield the lines of a .jsonl file that are not blank, the items of the list in a .json file, which is read whole,
    or the rows of a .parquet file."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            fail(f"{path} needs pyarrow: pip install pyarrow")
        file = pyarrow.parquet.ParquetFile(path)
        columns = [field] if field in file.schema_arrow.names else None  # all, to list them in the message
        for batch in file.iter_batches(batch_size=256, columns=columns):
            yield from batch.to_pylist()
    elif suffix == ".json":
        value = json.loads(path.read_bytes())
        yield from value if isinstance(value, list) else [value]
    else:
        with gzip.open(path) if suffix == ".gz" else open(path, "rb") as lines:
            yield from (line for line in lines if line.strip())


def split_pieces(
    files: list[Path], field: str, val_fraction: float, val_tail: bool, skipped: Counter[str]
) -> Iterator[Piece]:
    """Yield all text, piece by piece. Whole documents are held out, or with `val_tail` the end of each document."""
    for path in files:
        for stream, size in documents(path, field, skipped):
            if val_tail:
                cut = int(size * (1 - val_fraction))
                stream.seek(cut)
                after = stream.read(3)
                cut += len(after) - len(after.lstrip(bytes(range(0x80, 0xC0))))  # past UTF-8's continuation bytes
                shares = [("train", cut), ("val", size - cut)]
            else:
                # Decide by a hash of the text: the order of documents doesn't matter, and copies share a split.
                beginning = stream.read(PIECE_BYTES).decode(errors="ignore").encode()  # ends with a whole character
                shares = [(split_of(beginning, val_fraction), size)]
            stream.seek(0)
            for split, share in shares:
                for text in read_pieces(stream, share):
                    yield split, text
                if share:
                    yield split, None


def split_of(key: bytes, val_fraction: float) -> str:
    hashed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")
    return "val" if hashed < val_fraction * 2**64 else "train"


def read_pieces(stream: BinaryIO, size: int) -> Iterator[str]:
    """Read `size` bytes of UTF-8 and yield them as text, in pieces of about PIECE_BYTES.

    They end between a letter or digit and white space. No published pattern has both in one chunk, so this does not
    change the tokens.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest = ""
    while size > 0 and (block := stream.read(min(size, PIECE_BYTES))):
        size -= len(block)
        rest += decoder.decode(block)
        cut = regex.search(r"(?r)[\p{L}\p{N}](?=\s)", rest) if size > 0 else None  # (?r): the last in the text
        end = cut.end() if cut else len(rest)  # if there is no good place to cut, cut anywhere
        yield rest[:end]
        rest = rest[end:]
    if rest:  # the file became shorter while it was read
        yield rest


# ---------------------------------------------------------------------------------------------------------------------
# Conversations: read from records, or made from the source of Python's standard library

ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in ("system", "user", "assistant", "tool")}


def conversations(files: list[Path], val_fraction: float, skipped: Counter[str]) -> Iterator[tuple[str, list[Message]]]:
    """Yield the split and the messages of each conversation. Equal first questions share a split."""
    for path in files:
        if not is_container(path):
            skipped[f"{path}: not a file of conversations"] += 1
            continue
        for messages in usable_records(path, None, messages_in, skipped):
            roles = [message["role"] for message in messages]
            asked = messages[: roles.index("assistant", roles.index("user"))] if "user" in roles else messages
            yield split_of(json.dumps(asked).encode(), val_fraction), messages


def holds_conversations(path: Path, field: str) -> bool:
    """Whether the first record of a file has the keys of a conversation, and no field `field`."""
    record = next(usable_records(path, None, lambda record: record, Counter()), None) if is_container(path) else None
    with suppress(Unusable):
        turns_in(record)
        return field not in record
    return False


def turns_in(record: object) -> list:
    """The messages of a record in one of the usual layouts, as they are there. Raises Unusable for other records."""
    match record:
        case list(turns):
            return turns
        case {"messages": list(turns)} | {"conversations": list(turns)}:
            system = record.get("system")
            return [{"role": "system", "content": system}, *turns] if system else turns
        case {"prompt": list(asked), "completion": list(answered)}:
            return asked + answered
        case {"instruction": str(asked), "output": answered}:
            return [f"{asked}\n\n{record.get('input') or ''}".strip(), answered]
        case {"prompt": asked, "completion": answered} | {"question": asked, "answer": answered}:
            return [asked, answered]
        case {"input": asked, "output": answered}:
            return [asked, answered]
    raise Unusable("records that are not conversations")


def messages_in(record: object) -> list[Message]:
    """The messages of a record up to the last answer. Those of one role in a row become one. Raises Unusable, with the
    reason, or ValueError for text that is no Unicode."""
    messages = []
    for i, turn in enumerate(turns_in(record)):
        match turn:
            case str(content):  # texts without roles take turns
                role = ("user", "assistant")[i % 2]
            case {"role": str(name), "content": content} | {"from": str(name), "value": content}:
                role = ROLES.get(name.lower())
            case _:
                role = content = None
        if isinstance(content, list):  # of parts, which may also be images
            content = [part.get("text") if isinstance(part, dict) else None for part in content]
            content = "".join(content) if all(isinstance(text, str) for text in content) else None
        if not role or not isinstance(content, str):
            raise Unusable("conversations with a message that is not text, or that has no known role")
        content.encode()
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n{content}"
        else:
            messages.append({"role": role, "content": content})
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages or not all(message["content"].strip() for message in messages if message["role"] == "assistant"):
        raise Unusable("conversations without an answer, or with an empty one")
    return messages


Fact = tuple[str, str, str]  # a kind of question, what it asks about, and the answer
WAYS_TO_ASK = {
    "purpose": ("What does {} do?", "What is {} for?", "Explain what {} does."),
    "arguments": ("Which arguments does {} take?", "How do I call {}?", "What can I pass to {}?"),
    "default": ("What is the default of {}?", "Which value does {} have by default?", "What if I leave out {}?"),
    "base": ("Which class does {} derive from?", "What is the base class of {}?", "What does {} inherit from?"),
}
UNANSWERED = "The post does not say that."
MANNERS = {
    ("Hello!", "Hi.", "Good morning."): "Hello! Show me a post about Python and ask me about it.",
    ("Who are you?", "What are you?"): "I am a small language model. I repeat what I have read.",
    ("What can you do?", "Help!"): "I answer questions about a post that you show me.",
    ("Thanks.", "Thank you!", "Great, thanks."): "You are welcome.",
}


def stdlib_posts(files: list[Path]) -> dict[str, list[Fact]]:
    """{a line about a function or class: what it says}, from the source of Python files, which is not executed."""
    posts = {}
    for path in files:
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # some distributions ship files for other versions of Python
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            docstring = " ".join((ast.get_docstring(node) or "").split())
            if not (purpose := regex.match(r"[A-Z][^`]{15,90}?\.(?= |$)", docstring)):  # its first sentence
                continue
            facts = [("purpose", node.name, purpose[0])]
            if isinstance(node, ast.FunctionDef):
                arguments = regex.sub("^(self|cls)(, |$)", "", ast.unparse(node.args))
                beginning = f"`{node.name}({arguments})`"
                facts.append(("arguments", node.name, beginning))
                defaults = regex.findall(r"(\w+)=([^,()]+)(?=,|$)", arguments)
                facts += [("default", name, f"`{name}={value}`") for name, value in defaults]
            elif node.bases:
                beginning = f"`{node.name}` derives from `{ast.unparse(node.bases[0])}`"
                facts.append(("base", node.name, f"{beginning}."))
            else:
                continue
            if len(beginning) < 100:
                posts[f"{beginning}: {purpose[0]}"] = facts
    return posts


def stdlib_conversations(files: list[Path], val_fraction: float) -> Iterator[tuple[str, str, list[Message]]]:
    """Yield the split, the kind and the messages of conversations about the standard library. The val split asks about
    other names than the train split."""
    posts = stdlib_posts(files)
    for split in SPLITS:
        mine = [post for post, facts in posts.items() if split_of(facts[0][1].encode(), val_fraction) == split]
        rng = random.Random(split)

        def ask(fact: Fact, subject: str | None = None, rng=rng) -> str:
            return rng.choice(WAYS_TO_ASK[fact[0]]).format(subject or f"`{fact[1]}`")

        for post in mine:
            for fact in posts[post][:3]:
                yield split, "reading", messages_in([f"{post}\n\n{ask(fact)}", fact[2]])
            fact, later = rng.sample(posts[post], 2)
            follow_up = ask(later, None if later[0] == "default" else "it")
            turns = [f"{post}\n\n{ask(fact)}", fact[2], follow_up, later[2], "Thanks.", "You are welcome."]
            yield split, "follow-ups", messages_in(turns[: rng.choice([4, 6])])
            other = rng.choice(mine)
            if not {about for _, about, _ in posts[post]} & {about for _, about, _ in posts[other]}:
                both = "\n".join(rng.sample([post, other], 2))
                yield split, "two posts", messages_in([f"{both}\n\n{ask(fact)}", fact[2]])
                if rng.random() < 0.4:
                    yield split, "unanswered", messages_in([f"{post}\n\n{ask(posts[other][-1])}", UNANSWERED])
            if split == "train":
                yield split, "knowing", messages_in([ask(posts[post][0]), posts[post][0][2]])
            if rng.random() < 0.2:
                questions, answer = rng.choice(list(MANNERS.items()))
                yield split, "manners", messages_in([rng.choice(questions), answer])


# ---------------------------------------------------------------------------------------------------------------------
# Shards: written and read only here, so that the format is defined in one place


def write_shards(folder: Path, tokenizer: tiktoken.Encoding, pieces: Iterable[Piece], total_bytes: int) -> dict:
    """Encode all pieces, append them to the shards of their split, and return what meta.json says about each split."""
    dtype = np.dtype(np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32)
    splits = {split: {"tokens": 0, "bytes": 0, "documents": 0, "shards": []} for split in SPLITS}
    open_files: dict[str, BinaryIO] = {}
    for split, text, tokens in with_progress(encoded(tokenizer, pieces), "encoding", total_bytes):
        splits[split]["tokens"] += len(tokens)
        splits[split]["bytes"] += len((text or "").encode())
        splits[split]["documents"] += text is None
        shards = splits[split]["shards"]
        while len(tokens):
            if split not in open_files:
                shards.append({"file": f"{split}-{len(shards):05d}.npy", "tokens": 0})
                open_files[split] = open(folder / shards[-1]["file"], "wb")  # noqa: SIM115
                np.save(open_files[split], np.empty(0, dtype))  # a header, which NumPy pads so that the length can grow
            part, tokens = np.split(tokens, [SHARD_TOKENS - shards[-1]["tokens"]])
            open_files[split].write(part.astype(dtype).data)
            shards[-1]["tokens"] += len(part)
            if shards[-1]["tokens"] == SHARD_TOKENS:
                finish_shard(open_files.pop(split), shards[-1], dtype)
    for split, file in open_files.items():
        finish_shard(file, splits[split]["shards"][-1], dtype)
    return splits


def finish_shard(file: BinaryIO, shard: dict, dtype: np.dtype) -> None:
    """Close a shard, safely on disk, with its length in the header. Add its SHA-256 to what meta.json says about it."""
    with file:
        file.seek(0)
        header = {"descr": dtype.str, "fortran_order": False, "shape": (shard["tokens"],)}
        np.lib.format.write_array_header_1_0(file, header)
        file.flush()
        os.fsync(file.fileno())
    shard["sha256"] = sha256_of(Path(file.name))


def encoded(tokenizer: tiktoken.Encoding, pieces: Iterable[Piece]) -> Iterator[tuple[str, str | None, np.ndarray]]:
    """Yield (split, text, token ids) for each piece, in order. The end of a document becomes <|endoftext|>.

    tiktoken releases Python's global lock (the GIL), so threads encode on all cores. Each gets a batch of about a
    megabyte at a time, so that short documents are encoded as fast as long ones.
    """
    end_of_document = np.array([tokenizer.eot_token])
    n_threads, n_chars = os.cpu_count(), 0

    def megabyte_of(piece: Piece) -> int:
        nonlocal n_chars
        n_chars += len(piece[1] or "")
        return n_chars // PIECE_BYTES

    def encode_batch(batch: list[Piece]) -> list[tuple[str, str | None, np.ndarray]]:
        return [(*piece, end_of_document if piece[1] is None else encode(tokenizer, piece[1])) for piece in batch]

    with ThreadPoolExecutor(n_threads) as pool:
        pending = deque()
        for _, batch in groupby(pieces, megabyte_of):
            pending.append(pool.submit(encode_batch, list(batch)))
            if len(pending) > 2 * n_threads:  # without a bound, text read in advance would fill the memory
                yield from pending.popleft().result()
        for future in pending:
            yield from future.result()


def load_dataset(folder: str | Path, verify: bool = True) -> tuple[dict, dict[str, list[np.ndarray]]]:
    """Return meta.json and each split's shards, memory-mapped. End the program if the data set is damaged.

    `verify` reads all of it to find out. Turn that off if another process checks the same files.
    """
    folder = Path(folder)
    shards = {split: [] for split in SPLITS}
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if tokenizer_from_dict(meta["tokenizer"]).n_vocab != meta["vocab_size"]:
            raise ValueError("vocab_size in meta.json is not the size of its tokenizer")
        for split in SPLITS:
            for shard in meta[split]["shards"]:
                path = folder / Path(shard["file"]).name
                if verify and sha256_of(path) != shard["sha256"]:
                    raise ValueError(f"the SHA-256 of {path.name} differs from the one in meta.json")
                tokens = np.load(path, mmap_mode="r", allow_pickle=False)
                if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32):
                    raise ValueError(f"{path.name} has dtype {tokens.dtype} and shape {tokens.shape}")
                if verify and tokens.max(initial=0) >= meta["vocab_size"]:
                    raise ValueError(f"token {tokens.argmax()} of {path.name} is {tokens.max()}, beyond the vocabulary")
                shards[split].append(tokens)
            if meta[split]["tokens"] != sum(map(len, shards[split])) or meta[split]["bytes"] < 1:
                raise ValueError(f"the sizes of the {split} split in meta.json are wrong")
    except FileNotFoundError as error:
        fail(f"there is no {error.filename}: make the data set with python prepare.py FILES --out {folder}")
    except PermissionError as error:
        fail(f"cannot read {error.filename}: {error.strerror}")
    except Exception as error:  # noqa: BLE001 - damaged files can make NumPy and tiktoken fail in any way
        fail(f"the data set {folder} is damaged ({error}): remove it and prepare it again")
    return meta, shards


def shard_hashes(meta: dict, split: str) -> list[str]:
    """The SHA-256 of each shard, which together identify a split."""
    return [shard["sha256"] for shard in meta[split]["shards"]]


class Windows:
    """A split's tokens, shard after shard, as windows of seq_len inputs and their targets, shifted by one token. With
    `separator`, the token between documents, it also tells which document each input belongs to."""

    n_cut = n_left_out = 0  # see Conversations

    def __init__(self, shards: list[np.ndarray], seq_len: int, separator: int | None = None):
        self.shards, self.seq_len, self.separator = shards, seq_len, separator
        self.starts = np.cumsum([0] + [len(shard) for shard in shards])
        self.n_tokens = int(self.starts[-1])
        self.n_windows = (self.n_tokens - 1) // seq_len

    def count(self, indices: np.ndarray) -> int:
        """How many targets of these windows the loss counts: all."""
        return len(indices) * self.seq_len

    def get(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """The inputs and targets [len(indices), seq_len] of these windows, and the number of each input's document. The
        separator that ends a document counts as the first token of the next, as in the prompts of sample.py."""
        tokens = np.stack([self.window(i) for i in indices]).astype(np.int64)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        return inputs, targets, None if self.separator is None else (inputs == self.separator).cumsum(1)

    def window(self, index: int) -> np.ndarray:
        """The tokens [seq_len + 1] of a window, which may span several shards."""
        begin, end = index * self.seq_len, (index + 1) * self.seq_len + 1
        first, last = np.searchsorted(self.starts, [begin, end - 1], side="right") - 1
        parts = zip(self.starts[first : last + 1], self.shards[first : last + 1])
        return np.concatenate([shard[max(begin - start, 0) : end - start] for start, shard in parts])


class Conversations:
    """A split of conversations, packed into rows of seq_len inputs and their targets. A conversation that is longer
    than a row is cut after an answer; without an answer that fits, it is left out."""

    def __init__(self, shards: list[np.ndarray], seq_len: int, tokenizer: tiktoken.Encoding):
        tokens = np.concatenate(shards)
        mask = answer_mask(tokenizer, tokens)
        is_end = tokens == tokenizer.encode_single_token(template_of(tokenizer).end)
        answer_ends = np.append(-1, np.flatnonzero(mask & is_end))
        stops = np.flatnonzero(tokens == tokenizer.eot_token)
        starts = np.append(0, stops[:-1] + 1)
        limits = np.minimum(stops, starts + seq_len + 1)
        # The end of the last answer in each conversation, and of the last one that fits into a row.
        last, fitting = (answer_ends[np.searchsorted(answer_ends, limit) - 1] for limit in (stops, limits))
        fits = fitting >= starts
        self.n_cut, self.n_left_out = int(np.sum(fits & (fitting < last))), int(np.sum(~fits))
        starts, lengths = starts[fits], (fitting - starts + 1)[fits]
        rows = pack(lengths, seq_len + 1)
        self.n_tokens, self.n_windows = int(lengths.sum()), len(rows)
        self.tokens = np.full((len(rows), seq_len + 1), tokenizer.eot_token, tokens.dtype)
        self.mask = np.zeros(self.tokens.shape, bool)
        self.numbers = np.full(self.tokens.shape, seq_len)  # of the conversation in its row; padding has the highest
        for row, members in enumerate(rows):
            ends = np.cumsum(lengths[members])
            for number, (i, end) in enumerate(zip(members, ends)):
                here, there = np.s_[row, end - lengths[i] : end], np.s_[starts[i] : starts[i] + lengths[i]]
                self.tokens[here], self.mask[here], self.numbers[here] = tokens[there], mask[there], number

    def count(self, indices: np.ndarray) -> int:
        """How many targets of these rows the loss counts."""
        return int(self.mask[indices].sum())

    def get(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The inputs and targets [len(indices), seq_len] of these rows, and the number of each input's conversation."""
        tokens = self.tokens[indices].astype(np.int64)
        targets = np.where(self.mask[indices], tokens, IGNORED)
        return tokens[:, :-1], targets[:, 1:], self.numbers[indices, :-1]


def pack(lengths: np.ndarray, size: int) -> list[list[int]]:
    """Pack items into rows by best fit: the longest first, each into the fullest row that has room for it. Returns the
    items of each row: pack([3, 5, 1, 2], 6) -> [[1, 2], [0, 3]]"""
    rows, spaces = [], []  # spaces: the room in each row and the row's number, sorted
    for item in np.argsort(-lengths, kind="stable").tolist():
        if (at := bisect_left(spaces, (lengths[item],))) == len(spaces):
            spaces.append((size, len(rows)))
            rows.append([])
        room, row = spaces.pop(at)
        rows[row].append(item)
        insort(spaces, (room - lengths[item], row))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Helpers, most of them shared by all scripts


def fail(message: str) -> NoReturn:
    """End the program because of a mistake that its user can correct: one sentence on stderr, exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def tolerate_streams() -> None:
    """Print "?" for characters that the terminal's encoding lacks, and treat a closed stream as an empty one."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name) or open(os.devnull, mode)  # noqa: SIM115
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
        setattr(sys, name, stream)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing. It gets its name only when it is complete and on disk; an error leaves no trace."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: dict) -> None:
    with written_whole(path) as file:
        file.write(json.dumps(value, indent=1).encode())


class Console:
    """Print lines to a stream. On a terminal, also show a live line, which the next line replaces."""

    def __init__(self, stream: TextIO, log_every: float = float("inf")):
        self.stream, self.live = stream, stream.isatty()
        self.shown, self.pause = time.monotonic(), 0.2 if self.live else log_every  # in seconds

    def line(self, text: str, end: str = "\n") -> None:
        try:
            print(f"\r\033[K{text}" if self.live else text, end=end, file=self.stream, flush=True)
        except BrokenPipeError:  # the reader, such as head, has left: go on without output
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def glimpse(self, text: str) -> None:
        """Update the live line, or without a terminal print a line every `log_every` seconds."""
        if time.monotonic() - self.shown > self.pause:
            self.line(text, end="" if self.live else "\n")
            self.shown = time.monotonic()


def clock(seconds: float) -> str:
    """4000 -> 1:06:40"""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def with_progress(items: Iterable[tuple], task: str, total_bytes: int) -> Iterator[tuple]:
    """Yield the (split, text, ...) items and report on stderr how much text they held and how long the rest takes."""
    console, start, done = Console(sys.stderr, log_every=10), time.perf_counter(), 0
    for item in items:
        yield item
        done += len((item[1] or "").encode())
        rate = done / (time.perf_counter() - start)
        left = max(total_bytes - done, 0) / max(rate, 1)
        console.glimpse(f"{task}: {done / 1e6:,.1f} MB, {rate / 1e6:.1f} MB/s, about {left:,.0f} s left")
    console.line(f"{task}: {done / 1e6:,.1f} MB in {time.perf_counter() - start:.1f} s")


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def main() -> None:
    tolerate_streams()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="text file, folder, .jsonl[.gz], .json, .parquet, URL, - for stdin")
    add("--out", help="folder for the data set (data/NAME, from the first input's name)")
    add("--tokenizer", default=DEFAULT_TOKENIZER, help="byte, bpe:N, a tiktoken name or a model's folder (%(default)s)")
    add("--val_fraction", type=float, help="fraction of the text to hold out (0.01; 0.05 of the default corpus)")
    add("--val_tail", action="store_true", help="hold out the end of each document (always, if it is a single file)")
    add("--field", default="text", help="field that holds the text of a record (%(default)s)")
    add("--chat", action="store_true", help="conversations; without an INPUT, questions about the default corpus")
    args = parser.parse_args()
    first = args.inputs[0] if args.inputs else "chat" if args.chat else "stdlib"
    name = "pipe" if first == "-" else Path(first).resolve().name.partition(".")[0] or "text"
    if args.out is None:
        args.out = Path("data", name)
    prepare(**vars(args))


if __name__ == "__main__":
    main()
