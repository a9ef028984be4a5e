"""Turn text into the token shards that train.py reads.

    python prepare.py                                    the default corpus: this Python's standard library
    python prepare.py book.txt notes/ --out data/mine    files and folders, one data set
    python prepare.py pile.jsonl.gz --tokenizer gpt2     documents in the field "text", GPT-2's tokens
    python prepare.py play.txt --tokenizer byte --val_tail --val_fraction 0.1

A data set is a folder:

    data/mine/train-00000.npy ...   one-dimensional token ids, uint16 where the vocabulary fits, else uint32
    data/mine/val-00000.npy ...     the same for held-out text
    data/mine/meta.json             tokenizer, sizes, each shard's SHA-256; written last: without it, no data set

Documents follow each other, each ended by the token <|endoftext|>. A document is a text file, or one record of a
.jsonl, .jsonl.gz or .parquet file. Text is read as a stream, so memory stays small however large the input is.
"""

import argparse
import base64
import codecs
import gzip
import hashlib
import heapq
import io
import json
import os
import shutil
import sys
import sysconfig
import time
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NoReturn, TextIO

import numpy as np
import regex  # what tiktoken itself uses for \p{L}
import tiktoken

END_OF_TEXT = "<|endoftext|>"
SPLITS = ("train", "val")
DEFAULT_TOKENIZER = "bpe:4096"
PIECE_BYTES = 1 << 20  # text is read, cut and encoded in pieces of about this size
SHARD_TOKENS = 1 << 27
BPE_SAMPLE_BYTES = 1 << 26  # a BPE tokenizer learns from about this much text, spread evenly over the input


def fail(message: str) -> NoReturn:
    """End the program because of something its user can mend: one sentence on stderr, exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


class Console:
    """Lines of progress on a stream; on a terminal also a live line, which the next line replaces."""

    def __init__(self, stream: TextIO):
        self.stream, self.live = stream, stream.isatty()
        self.shown = 0.0

    def line(self, text: str) -> None:
        print(f"\r\033[K{text}" if self.live else text, file=self.stream, flush=True)

    def glimpse(self, text: str) -> None:
        if self.live and time.monotonic() - self.shown > 0.2:
            print(f"\r\033[K{text}", end="", file=self.stream, flush=True)
            self.shown = time.monotonic()


# ---------------------------------------------------------------------------------------------------------------------
# Files that are whole or not there, for data sets and for checkpoints


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that gets its name when all of it is on disk; where anything fails it leaves no trace."""
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


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers: always a tiktoken.Encoding, whether bytes, trained here, or published

# Text is first cut into chunks, as GPT-4 does it: words with the space before them, numbers of up to three digits,
# punctuation, white space. "it's 12345 cats" -> "it", "'s", " ", "123", "45", " cats". No token crosses an edge.
GPT4_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"""
    r"""|\s+(?!\S)|\s"""
)
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
BYTES = {bytes([byte]): byte for byte in range(256)}


def make_tokenizer(name: str, pattern: str, ranks: dict[bytes, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)})


def byte_tokenizer() -> tiktoken.Encoding:
    """Each byte is a token. The pattern only has to cut text into short chunks, in which nothing is ever merged."""
    return make_tokenizer("byte", r"(?s:.{1,64})", BYTES)


def named_tokenizer(name: str) -> tiktoken.Encoding | int:
    """byte; gpt2, cl100k_base, ... as tiktoken knows them and fetches them once; the one in a published model's folder;
    for bpe:N the N tokens to learn."""
    kind, _, size = name.partition(":")
    if name == "byte":
        return byte_tokenizer()
    if kind == "bpe" and size.isascii() and size.isdigit() and int(size) > len(BYTES) + 1:
        return int(size)
    if Path(name).is_dir():
        return load_published_tokenizer(Path(name))
    if name not in tiktoken.list_encoding_names():
        legal = f"byte, bpe:N with N above {len(BYTES) + 1}, a published model's folder, or one of"
        fail(f"no tokenizer is called {name!r}: use {legal} {', '.join(tiktoken.list_encoding_names())}")
    try:
        return tiktoken.get_encoding(name)
    except OSError:  # what requests raises without a network
        fail(f"tiktoken could not fetch the tokenizer {name!r}, which it does once, online: use byte or bpe:N offline")


def merge(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """merge([1, 2, 3, 1, 2], (1, 2), 4) -> [4, 3, 4]"""
    merged, i = [], 0
    while i < len(ids):
        if ids[i] == pair[0] and i + 1 < len(ids) and ids[i + 1] == pair[1]:
            merged.append(new)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


def train_bpe(chunk_counts: Counter[str], vocab_size: int) -> dict[bytes, int]:
    """Byte-pair encoding (Sennrich et al., 2016, on bytes as in GPT-2): from the 256 bytes on, the pair of adjacent
    tokens seen most often becomes the next token. Of equally frequent pairs the one with smaller ids comes first.
    (naive_bpe in tests/test_prepare.py does the same in fifteen lines, which count everything anew for each token.)

    `chunk_counts` says how often each chunk stands in the text. Returns {bytes of a token: its id, or rank}, at most
    `vocab_size` of them: it ends early where no pair is seen twice.
    """
    chunks = [list(chunk.encode()) for chunk in chunk_counts]  # as token ids
    counts = list(chunk_counts.values())
    pair_counts: Counter[tuple[int, int]] = Counter()
    chunks_with = defaultdict(set)
    for i, chunk in enumerate(chunks):
        for pair in pairwise(chunk):
            pair_counts[pair] += counts[i]
            chunks_with[pair].add(i)

    tokens = list(BYTES)
    ranks = dict(BYTES)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)
    while heap and len(ranks) < vocab_size:
        negative, pair = heapq.heappop(heap)
        if -negative != pair_counts[pair]:  # counts only fall after they are pushed; back with the true one
            heapq.heappush(heap, (-pair_counts[pair], pair))
            continue
        if pair_counts[pair] < 2:
            break
        token = tokens[pair[0]] + tokens[pair[1]]
        if token not in ranks:  # else another pair spells the same bytes, and tiktoken merges both into one token
            ranks[token] = len(tokens)
            tokens.append(token)
        touched = set()
        for i in chunks_with.pop(pair):  # only these change
            before, chunks[i] = chunks[i], merge(chunks[i], pair, ranks[token])
            for old in pairwise(before):
                pair_counts[old] -= counts[i]
            for new in pairwise(chunks[i]):
                pair_counts[new] += counts[i]
                if ranks[token] in new:
                    chunks_with[new].add(i)
                    touched.add(new)
        for new in touched:
            heapq.heappush(heap, (-pair_counts[new], new))
    return ranks


def tokenizer_to_dict(tokenizer: tiktoken.Encoding) -> dict:
    """The tokenizer as plain JSON values, for meta.json and for every checkpoint."""
    return {
        "name": tokenizer.name,
        "pattern": tokenizer._pat_str,
        "ranks": {base64.b64encode(token).decode(): rank for token, rank in tokenizer._mergeable_ranks.items()},
        "special_tokens": tokenizer._special_tokens,
    }


def tokenizer_from_dict(plain: dict) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        plain["name"],
        pat_str=plain["pattern"],
        mergeable_ranks={base64.b64decode(token): rank for token, rank in plain["ranks"].items()},
        special_tokens=plain["special_tokens"],
    )


def encode(tokenizer: tiktoken.Encoding, text: str) -> np.ndarray:
    """Token ids [N] of ordinary text: <|endoftext|> inside it becomes the tokens of its letters, not the token."""
    return tokenizer.encode_to_numpy(text, disallowed_special=())


def token_bytes(tokenizer: tiktoken.Encoding, token: int) -> bytes:
    """The bytes of a token; none for an id that stands for nothing, as a few in published vocabularies do."""
    try:
        return tokenizer.decode_single_token_bytes(token)
    except KeyError:
        return b""


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers of published models, in and out: tokenizer.json in the layout of Hugging Face


def byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in tokenizer.json: itself where it is printable, else one above 255."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def save_published_tokenizer(folder: Path, tokenizer: tiktoken.Encoding) -> None:
    """Write tokenizer.json and tokenizer_config.json, from which Hugging Face's libraries make the same ids."""
    letters = byte_letters()
    vocab = {"".join(letters[byte] for byte in token): rank for token, rank in tokenizer._mergeable_ranks.items()}
    # tiktoken joins two neighbours whenever they spell a token, so each way to split a token is a merge.
    pairs = ((token[:i], token[i:]) for token in sorted(vocab, key=vocab.get) for i in range(1, len(token)))
    merges = [pair for pair in pairs if vocab.keys() >= set(pair)]
    # Oniguruma, which reads the pattern there, takes {1,3}+ for a repetition and $ for the end of a line.
    pattern = tokenizer._pat_str.replace("}+", "}").replace("$", r"\z")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    plain = {
        "version": "1.0",
        "added_tokens": [
            {"id": token, "content": text, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for text, token in tokenizer._special_tokens.items()
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, byte_level] if merges else [byte_level]},
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    write_json(folder / "tokenizer.json", plain)
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    write_json(folder / "tokenizer_config.json", names)


def load_published_tokenizer(folder: Path) -> tiktoken.Encoding:
    """The tokenizer in a published model's folder. Ends the program where there is none that tiktoken could do."""
    try:
        return tokenizer_from_published(folder / "tokenizer.json")
    except OSError as error:
        fail(f"cannot read {error.filename}: {error.strerror}")
    except Exception as error:  # noqa: BLE001 - tiktoken can fail in any way
        fail(f"cannot use the tokenizer in {folder}: {error}")


def tokenizer_from_published(path: Path) -> tiktoken.Encoding:
    """The tokenizer of a tokenizer.json. Raises ValueError where it is not byte-level BPE."""
    plain = json.loads(path.read_text(encoding="utf-8"))
    first = plain["pre_tokenizer"] or {"pretokenizers": []}
    steps = first.get("pretokenizers", [first])  # several, or it is one itself
    if plain["model"]["type"] != "BPE" or "ByteLevel" not in [step["type"] for step in steps]:
        raise ValueError(f"{path} is not byte-level BPE, the one kind of tokenizer that can be taken over")
    patterns = [step["pattern"]["Regex"] for step in steps if step["type"] == "Split"]
    special = {token["content"]: token["id"] for token in plain["added_tokens"]}
    ends = [name for name in (END_OF_TEXT, "<|end_of_text|>") if name in special]  # the second is Llama-3's
    if not ends:
        raise ValueError(f"{path} has no token that ends a document")
    vocab = {token: rank for token, rank in plain["model"]["vocab"].items() if token not in special}
    bytes_of = {letter: byte for byte, letter in byte_letters().items()}
    return tiktoken.Encoding(
        path.parent.name,
        pat_str=patterns[0] if patterns else GPT2_PATTERN,
        mergeable_ranks={bytes(bytes_of[letter] for letter in token): rank for token, rank in vocab.items()},
        special_tokens={END_OF_TEXT: special.pop(ends[0]), **special},
    )


# ---------------------------------------------------------------------------------------------------------------------
# Documents: from what the user names to pieces of text, each for one split


def default_corpus() -> list[Path]:
    """The source of the standard library of the Python that runs this: real text, on every disk, without a network."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "__pycache__"}
    return sorted(path for path in root.rglob("*.py") if not left_out & set(path.relative_to(root).parts))


def download(url: str, folder: Path) -> Path:
    """Save a URL as a file in `folder`, once."""
    import urllib.parse
    import urllib.request

    name = Path(urllib.parse.urlparse(url).path).name or "download.txt"
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"  # other addresses have the same name
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with urllib.request.urlopen(url, timeout=60) as response, written_whole(path) as file:
                shutil.copyfileobj(response, file)
        except (OSError, ValueError) as error:
            fail(f"could not fetch {url} ({error}): check the address and the network, or give a local file")
    return path


def find_files(inputs: list[str], downloads: Path) -> list[Path]:
    """The files that the inputs name, folders walked in sorted order without hidden entries."""
    files = []
    for name in inputs:
        path = download(name, downloads) if name.startswith(("http://", "https://")) else Path(name)
        if path.is_dir():
            visible = (
                p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts)
            )
            files += sorted(p for p in visible if p.is_file())
        elif path.exists():
            files.append(path)
        else:
            fail(f"no such file or folder: {name}")
    return files


def is_container(path: Path) -> bool:
    return path.name.endswith((".jsonl", ".jsonl.gz", ".parquet"))


def why_unusable(path: Path) -> str | None:
    """What keeps a file from being read as text, found before anything of it is written."""
    try:
        with open(path, "rb") as stream:
            if not stream.peek(1):
                return "empty"
            if not is_container(path):
                decoder = codecs.getincrementaldecoder("utf-8")()
                while block := stream.read(PIECE_BYTES):
                    decoder.decode(block)
                decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return "not UTF-8"
    except OSError as error:
        return error.strerror or str(error)
    return None


def records(path: Path) -> Iterator[object]:
    """The field "text" of each record of a .jsonl, .jsonl.gz or .parquet file; None where it cannot be had."""
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            fail(f"{path} needs pyarrow: pip install pyarrow")
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256, columns=["text"]):
            yield from batch.column("text").to_pylist()
    else:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as lines:
            for line in lines:
                try:
                    record = json.loads(line)
                except ValueError:
                    record = None
                yield record.get("text") if isinstance(record, dict) else None


def documents(path: Path, skipped: Counter[str]) -> Iterator[tuple[BinaryIO, int]]:
    """Each document of a file as a stream of UTF-8, and its size in bytes. Counts in `skipped` what holds no text."""
    if not is_container(path):
        with open(path, "rb") as stream:
            yield stream, os.fstat(stream.fileno()).st_size
        return
    try:
        for text in records(path):
            try:
                data = text.encode() if isinstance(text, str) else b""
            except UnicodeEncodeError:  # a lone surrogate, which JSON can spell and UTF-8 cannot
                data = b""
            if data:
                yield io.BytesIO(data), len(data)
            else:
                skipped[f"{path}: records without usable text"] += 1
    except (OSError, EOFError, KeyError, zlib.error, ValueError) as error:  # how gzip and parquet files break
        skipped[f"{path}: unreadable from some record on ({error})"] += 1


# Where text may be cut so that its tokens stay the same: between a letter or digit and white space, which no published
# pattern has in one chunk. Searched from the end, hence (?r).
CUT = regex.compile(r"(?r)[\p{L}\p{N}](?=\s)")


def read_pieces(stream: BinaryIO, size: int) -> Iterator[str]:
    """The next `size` bytes of a stream as text, a piece at a time."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest = ""
    while size > 0 and (block := stream.read(min(size, PIECE_BYTES))):
        size -= len(block)
        rest += decoder.decode(block)
        cut = CUT.search(rest) if size > 0 else None
        end = cut.end() if cut else len(rest)  # a megabyte without one is cut anywhere
        yield rest[:end]
        rest = rest[end:]
    if rest:  # the file has become shorter since its size was read
        yield rest


def tail_offset(stream: BinaryIO, size: int, fraction: float) -> int:
    """The byte where the last `fraction` of a document begins, moved to the start of a character."""
    offset = int(size * (1 - fraction))
    stream.seek(offset)
    while (byte := stream.read(1)) and byte[0] & 0xC0 == 0x80:  # UTF-8's continuation bytes are 10xxxxxx
        offset += 1
    stream.seek(0)
    return offset


def is_held_out(text: str, fraction: float) -> bool:
    """Chosen by content, so that the choice survives reordering and copies of a document stay on one side."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") < fraction * 2**64


Piece = tuple[str, str | None]  # the split, and some text for it, or None where a document ends


def split_pieces(files: list[Path], val_fraction: float, val_tail: bool, skipped: Counter[str]) -> Iterator[Piece]:
    """All text, a piece at a time. Held out are whole documents, chosen by hash, or the tail of each document."""
    for path in files:
        for stream, size in documents(path, skipped):
            if val_tail:
                offset = tail_offset(stream, size, val_fraction)
                parts = [("train", offset), ("val", size - offset)]
            else:
                beginning = next(read_pieces(stream, min(size, PIECE_BYTES)))  # of a document, which is never empty
                stream.seek(0)
                parts = [("val" if is_held_out(beginning, val_fraction) else "train", size)]
            for split, part_size in parts:
                for text in read_pieces(stream, part_size):
                    yield split, text
                if part_size:
                    yield split, None


# ---------------------------------------------------------------------------------------------------------------------
# Shards: written and read here, so that the format stands in one place


class ShardWriter:
    """Appends tokens to one split's .npy files. NumPy leaves room in a header for the length to grow, so the header
    is written first with length 0 and once more when the shard is full."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype):
        self.folder, self.split, self.dtype = folder, split, dtype
        self.shards: list[dict] = []
        self.file: BinaryIO | None = None

    def write(self, tokens: np.ndarray) -> None:
        while len(tokens):
            if self.file is None:
                self.file = open(self.folder / f"{self.split}-{len(self.shards):05d}.npy", "wb")  # noqa: SIM115
                self.length = 0
                self._write_header()
            part, tokens = np.split(tokens, [SHARD_TOKENS - self.length])
            self.file.write(part.astype(self.dtype).data)
            self.length += len(part)
            if self.length == SHARD_TOKENS:
                self.close()

    def _write_header(self) -> None:
        self.file.seek(0)
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def close(self) -> None:
        """Finish the open shard, on disk for good before anything names it."""
        if self.file is not None:
            self._write_header()
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            path = Path(self.file.name)
            self.shards.append({"file": path.name, "tokens": self.length, "sha256": sha256_of(path)})
            self.file = None


def load_dataset(folder: str | Path, verify: bool = True) -> tuple[dict, dict[str, list[np.ndarray]]]:
    """A data set's meta.json, and per split its memory-mapped shards. Ends the program where it is not whole. All of it
    is read for that, but for what `verify` says another process checks."""
    folder = Path(folder)
    shards = {split: [] for split in SPLITS}
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if tokenizer_from_dict(meta["tokenizer"]).n_vocab != meta["vocab_size"]:
            raise ValueError("the tokenizer in meta.json has another vocabulary than the data")
        for split in SPLITS:
            for shard in meta[split]["shards"]:
                path = folder / Path(shard["file"]).name
                if verify and sha256_of(path) != shard["sha256"]:
                    raise ValueError(f"the SHA-256 of {path.name} is not the one in meta.json")
                tokens = np.load(path, mmap_mode="r", allow_pickle=False)
                if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32):
                    raise ValueError(
                        f"{path.name} holds {tokens.dtype} of shape {tokens.shape}, not a row of token ids"
                    )
                if verify and len(tokens) and tokens.max() >= meta["vocab_size"]:
                    offset = tokens.argmax()
                    raise ValueError(f"token {offset} of {path.name} is {tokens[offset]}, beyond the vocabulary")
                shards[split].append(tokens)
    except FileNotFoundError as error:
        fail(f"there is no {error.filename}: make the data set with python prepare.py FILES --out {folder}")
    except Exception as error:  # noqa: BLE001 - what is damaged can break NumPy and tiktoken in any way
        fail(f"the data set {folder} is damaged ({error}): remove it and prepare it again")
    return meta, shards


# ---------------------------------------------------------------------------------------------------------------------
# The whole way


class Progress:
    """How far a stage is, on stderr: where that is no terminal, in a line every ten seconds."""

    def __init__(self, verb: str, total_bytes: int):
        self.verb, self.total, self.done = verb, total_bytes, 0
        self.console = Console(sys.stderr)
        self.start = self.told = time.monotonic()

    def advance(self, n_bytes: int) -> None:
        self.done += n_bytes
        now = time.monotonic()
        rate = self.done / (now - self.start)
        left = max(self.total - self.done, 0) / max(rate, 1)
        text = f"{self.verb} {self.done / 1e6:,.1f} MB, {rate / 1e6:.1f} MB/s, about {left:,.0f} s left"
        self.console.glimpse(text)
        if now - self.told > 10 and not self.console.live:
            self.console.line(text)
            self.told = now

    def finish(self) -> None:
        self.console.line(f"{self.verb} {self.done / 1e6:,.1f} MB in {time.monotonic() - self.start:.1f} s")


def learn_tokenizer(vocab_size: int, pieces: Iterable[Piece], total_bytes: int) -> tiktoken.Encoding:
    """A BPE tokenizer with `vocab_size` tokens, <|endoftext|> among them, from text that is not held out."""
    every = -(-total_bytes // BPE_SAMPLE_BYTES)
    progress = Progress("learning tokens from", total_bytes)
    chunks: Counter[str] = Counter()
    texts = ((split, text) for split, text in pieces if text is not None)
    for i, (split, text) in enumerate(texts):
        if split == "train" and i % every == 0:
            chunks.update(regex.findall(GPT4_PATTERN, text))
        progress.advance(len(text.encode()))
    ranks = train_bpe(chunks, vocab_size - 1)
    progress.finish()
    return make_tokenizer(f"bpe:{len(ranks) + 1}", GPT4_PATTERN, ranks)


def in_megabytes(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces in lists of about a megabyte, so that short documents cost no more than long ones."""
    batch, size = [], 0
    for split, text in pieces:
        batch.append((split, text))
        size += len(text or "")
        if size >= PIECE_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def write_shards(folder: Path, tokenizer: tiktoken.Encoding, pieces: Iterable[Piece], total_bytes: int) -> dict:
    """Encode all pieces on all cores (tiktoken works outside Python's lock), in order. Returns meta.json's splits."""
    progress = Progress("encoding", total_bytes)
    dtype = np.dtype(np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32)
    writers = {split: ShardWriter(folder, split, dtype) for split in SPLITS}
    totals = {split: Counter(tokens=0, bytes=0, documents=0) for split in SPLITS}
    end_of_document = np.array([tokenizer.eot_token], dtype)

    def encode_batch(batch: list[Piece]) -> list[tuple[str, np.ndarray, Counter]]:
        encoded = []
        for split, text in batch:
            if text is None:
                encoded.append((split, end_of_document, Counter(tokens=1, documents=1)))
            else:
                tokens = encode(tokenizer, text)
                encoded.append((split, tokens, Counter(tokens=len(tokens), bytes=len(text.encode()))))
        return encoded

    def write_batch(encoded: list[tuple[str, np.ndarray, Counter]]) -> None:
        for split, tokens, sizes in encoded:
            writers[split].write(tokens)
            totals[split].update(sizes)
            progress.advance(sizes["bytes"])

    n_threads = os.cpu_count()
    with ThreadPoolExecutor(n_threads) as pool:
        pending = deque()
        for batch in in_megabytes(pieces):
            pending.append(pool.submit(encode_batch, batch))
            if len(pending) > 2 * n_threads:  # reading must not run away from encoding, or memory fills
                write_batch(pending.popleft().result())
        for future in pending:
            write_batch(future.result())
    for writer in writers.values():
        writer.close()
    progress.finish()
    return {split: {**totals[split], "shards": writers[split].shards} for split in SPLITS}


def prepare(
    inputs: list[str],
    out: str | Path,
    tokenizer: str = DEFAULT_TOKENIZER,
    val_fraction: float | None = None,
    val_tail: bool = False,
) -> None:
    """Make the data set `out` from files, folders and URLs, or from the default corpus where none is named."""
    out = Path(out)
    if val_fraction is None:
        val_fraction = 0.01 if inputs else 0.05  # the default corpus is small
    if (out / "meta.json").exists():
        fail(f"{out} already holds a data set: remove it first, or choose another --out")
    if not 0 < val_fraction < 1:
        fail(f"--val_fraction {val_fraction} is not between 0 and 1")
    encoding = named_tokenizer(tokenizer)  # or how many tokens to learn

    skipped: Counter[str] = Counter()
    files = []
    for path in find_files(inputs, out.parent) if inputs else default_corpus():
        if reason := why_unusable(path):
            skipped[f"{path}: {reason}"] += 1
        else:
            files.append(path)
    if not files:
        fail(f"nothing to read is left: {'; '.join(skipped) or 'the folders hold no files'}")
    if len(files) == 1 and not is_container(files[0]) and not val_tail:
        print(f"{files[0]} is one document: its last {val_fraction:.0%} is held out, as by --val_tail", file=sys.stderr)
        val_tail = True
    total_bytes = sum(path.stat().st_size for path in files)

    try:
        out.mkdir(parents=True, exist_ok=True)
        for stale in [*out.glob("train-*.npy"), *out.glob("val-*.npy")]:  # of an interrupted preparation
            stale.unlink()
        if isinstance(encoding, int):  # all text is read twice, and what is skipped counted at the second time
            encoding = learn_tokenizer(encoding, split_pieces(files, val_fraction, val_tail, Counter()), total_bytes)
        splits = write_shards(out, encoding, split_pieces(files, val_fraction, val_tail, skipped), total_bytes)
        for what, count in skipped.most_common(20):
            print(f"skipped {what}" + (f" ({count:,})" if count > 1 else ""), file=sys.stderr)
        if len(skipped) > 20:
            print(f"skipped in all: {skipped.total():,}", file=sys.stderr)
        for split in SPLITS:
            if not splits[split]["tokens"]:
                n_documents = sum(splits[split]["documents"] for split in SPLITS)
                fail(
                    f"none of the {n_documents} documents fell to the {split} split: raise --val_fraction, or give"
                    " --val_tail to hold out the end of each document"
                )
        meta = {"tokenizer": tokenizer_to_dict(encoding), "vocab_size": encoding.n_vocab, **splits}
        write_json(out / "meta.json", meta | {"sources": inputs or ["the Python standard library"]})
    except OSError as error:
        fail(f"cannot make the data set {out}: {error}")
    except KeyboardInterrupt:
        fail(f"interrupted: there is no data set in {out} yet")
    for split in SPLITS:
        tokens, n_bytes = splits[split]["tokens"], splits[split]["bytes"]
        print(
            f"{split:5} {splits[split]['documents']:9,} documents {n_bytes:13,} bytes {tokens:13,} tokens of"
            f" {n_bytes / tokens:.2f} bytes",
            file=sys.stderr,
        )
    print(f"{out} is ready: vocabulary of {encoding.n_vocab:,} ({encoding.name})", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="text file, folder, .jsonl[.gz], .parquet or URL")
    parser.add_argument("--out", help="the data set's folder (default: data/ and the first input's name)")
    parser.add_argument(
        "--tokenizer",
        default=DEFAULT_TOKENIZER,
        help="byte, bpe:N, a name of tiktoken's, or a published model's folder (%(default)s)",
    )
    parser.add_argument("--val_fraction", type=float, help="share of text held out (0.01; 0.05 of the default corpus)")
    parser.add_argument("--val_tail", action="store_true", help="hold out the end of each document, as of one file")
    args = parser.parse_args()
    name = Path(args.inputs[0]).name.partition(".")[0] if args.inputs else "stdlib"
    prepare(args.inputs, args.out or Path("data", name), args.tokenizer, args.val_fraction, args.val_tail)


if __name__ == "__main__":
    main()
