"""Turn text into the token shards that train.py reads.

    python prepare.py                                    the default corpus: Python's own standard library
    python prepare.py book.txt notes/ --out data/mine    files and folders, combined into one data set
    python prepare.py pile.jsonl.gz --tokenizer gpt2     one document per record (field "text"), GPT-2's tokenizer
    zcat dump.gz | python prepare.py - --out data/dump   text from a pipe
    python prepare.py play.txt --tokenizer byte --val_tail --val_fraction 0.1

A data set is a folder:

    data/mine/train-00000.npy ...   token ids in a one-dimensional array: uint16 if the vocabulary fits, else uint32
    data/mine/val-00000.npy ...     the same for the val split, the text held out from training
    data/mine/meta.json             the tokenizer, the sizes, and the SHA-256 of each shard

A document is a text file, or one record of a .jsonl, .json (also with .gz) or .parquet file. In the shards, each one is
followed by the token <|endoftext|>, and by the one that begins the next where that is another, as in Llama 3. Where the
loss does not count all tokens (conversations, see chat.py), train-mask-00000.npy and so on tell which. The folder gets
its name when it is complete; until then it is called data/mine.partial, and only one process at a time can make it.

Text is read in pieces of about a megabyte, so memory use stays small (but a list in a .json file is read whole). One
process does it all, and begins anew after an interruption:
files -> documents -> pieces of text, each for one split -> token ids -> shards -> windows.
"""

import argparse
import atexit
import codecs
import errno
import gzip
import hashlib
import io
import json
import math
import os
import shlex
import shutil
import sys
import sysconfig
import tempfile
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NoReturn, TextIO

import numpy as np
import regex  # see tokenizer.py

from tokenizer import Part, Tokenizer, named_tokenizer, train_tokenizer

SPLITS = ("train", "val")
DEFAULT_TOKENIZER = "bpe:4096"
# Files of these kinds hold one document per record. Each other file is one document, in plain text.
CONTAINERS = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz", ".parquet")
NO_TEXT = {  # how files begin that hold text in another form, and how to get at it
    b"%PDF": "a PDF: pdftotext FILE NEW.txt",
    b"PK\3\4": "a zip archive, as docx, odt and epub are: unpack it, or save the document as plain text",
    **dict.fromkeys((b"\xd0\xcf\x11\xe0", b"{\\rtf"), "a word processor's document: save it as plain text"),
    **dict.fromkeys((b"\xff\xfe", b"\xfe\xff"), "UTF-16: iconv -f UTF-16 -t UTF-8 FILE > NEW.txt"),
    **dict.fromkeys((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"BZh"), "a compressed file: unpack it first"),
}
PIECE_BYTES = 1 << 20
SHARD_TOKENS = 1 << 27
BPE_SAMPLE_BYTES = 1 << 26  # a BPE tokenizer is trained on about this much text, sampled evenly from the input
OUR_FILES = r"(train|val)(-mask)?-\d{5}\.npy|meta\.json(\.partial)?"  # in a data set; others are a user's

CHAT_KEYS = {"messages", "conversations", "completion", "answer", "output"}  # of the records that chat.py reads

Piece = tuple[str, list[Part], bool]  # a split, what to add to it, and whether a document ends with that
# The same encoded: the split, bytes of text, tokens, which of these are targets, and whether a document ends
Encoded = tuple[str, int, np.ndarray, np.ndarray, bool]


class Skipped(Counter):
    """(file or folder, reason why it or some of its records were skipped) -> how often. Also counts what has been read,
    but is not used as its author may have meant it."""

    def __init__(self):
        super().__init__()
        self.examples: dict[tuple, str] = {}
        self.unused = Counter()  # key -> of how many records it was not used
        self.spelled = Counter()  # control token -> how often the text spells it

    def record(self, path: Path, reason: str, record: object = None) -> None:
        """Count a record. The message will name the keys of the first one."""
        self[path, reason] += 1
        if isinstance(record, dict):
            self.examples.setdefault((path, reason), f"; one has the keys {', '.join(map(str, record))}")

    def messages(self) -> list[str]:
        """One for each file and reason, the most frequent first."""
        listed = ((*what, self.examples.get(what, ""), count) for what, count in self.most_common())
        return [f"{path}: {why}{keys}" + (f" ({n:,})" if n > 1 else "") for path, why, keys, n in listed]

    def say(self) -> None:
        """Print the messages, and what was not used or meant something else."""
        for message in self.messages()[:20]:
            say(f"skipped {message}")
        if len(self) > 20:
            say(f"skipped in total: {self.total():,}")
        if self.unused:
            say(f"not used: {', '.join(f'key {key} in {n:,} records' for key, n in sorted(self.unused.items()))}")
        if self.spelled:
            spelled = ", ".join(f"{token} ({n:,})" for token, n in sorted(self.spelled.items()))
            say(f"read as ordinary characters: {spelled}; for conversations there is {command('chat.py', '--prepare')}")


def prepare(
    inputs: list[str],
    out: str | Path,
    tokenizer: str = DEFAULT_TOKENIZER,
    val_fraction: float | None = None,
    val_tail: bool = False,
    field: str = "text",
    wait: bool = False,
) -> None:
    """Make the data set `out` from files, folders and URLs, or from the default corpus if `inputs` is empty.

    The val split gets about `val_fraction` of the documents; with `val_tail`, or if these would be fewer than two, that
    fraction of each document, its end. `field` is the field of .jsonl, .json and .parquet records that holds their
    text. With `wait`, another process may be making the same data set: then this one waits for it.
    """
    with exit_on(ValueError, OSError):
        new = NewDataset(inputs, out, tokenizer, val_fraction, wait=wait)
    if tables := [path for path in new.files if path.suffix.lower() in (".csv", ".tsv")]:
        say(f"read as plain text, not as tables: {tables[0]}" + (f" and {len(tables) - 1} more" if tables[1:] else ""))
    if not val_tail and are_few(new.files, field, new.val_fraction):
        say(f"too few documents to hold out some of them: the last {new.val_fraction:.0%} of each is held out")
        val_tail = True
    new.write(lambda skipped: split_pieces(new.files, field, new.val_fraction, val_tail, skipped))


class NewDataset:
    """A data set that is being made, of text or of conversations (`chat`). Ends the program if it cannot be made, or
    raises ValueError or OSError if the input allows none."""

    def __init__(
        self, inputs: list[str], out: str | Path, tokenizer: str, val_fraction: float | None, chat=False, wait=False
    ):
        self.out, self.chat, self.wait = Path(out), chat, wait
        self.sources = inputs or ["the Python standard library"]
        if not self.out.name:
            fail(f"--out {out} does not name a folder for the data set")
        if self.out.exists() and not wait:
            advice = ", or remove it first" if (self.out / "meta.json").exists() else ""  # else it may be a user's
            fail(f"{out} already exists: choose another --out{advice}")
        self.partial = self.out.with_name(self.out.name + ".partial")
        if foreign := [path for path in self.partial.glob("*") if not regex.fullmatch(OUR_FILES, path.name)]:
            fail(f"{self.partial} is needed for unfinished data, but it holds {foreign[0].name}: choose another --out")
        default = 0.01 if inputs else 0.05  # the default corpus is small
        self.val_fraction = default if val_fraction is None else val_fraction
        if not 0 < self.val_fraction < 1:
            fail(f"--val_fraction {val_fraction} is not between 0 and 1")
        self.tokenizer = named_tokenizer(tokenizer)  # for bpe:N the number N, until write() trains it
        if chat and isinstance(self.tokenizer, Tokenizer):
            self.tokenizer = self.tokenizer.for_chat()
        self.skipped = Skipped()
        self.files = find_files(inputs, self.out.parent, self.skipped)
        self.total_bytes = sum(path.stat().st_size for path in self.files)

    def write(self, pieces: Callable[[Skipped], Iterator[Piece]]) -> None:
        """Write all that pieces(skipped) yields, and report on it."""
        try:
            with unfinished(self.partial, f"preparing {self.out}", self.wait):
                if self.wait and self.out.exists():
                    return
                splits = self.encode(pieces)
                self.partial.rename(self.out)
        except OSError as error:
            fail(f"cannot make the data set {self.out}: {error}")
        except KeyboardInterrupt:
            fail(f"interrupted: there is no data set in {self.out} yet; run the same command again")
        self.report(splits)

    def encode(self, pieces: Callable[[Skipped], Iterator[Piece]]) -> dict:
        """Write the shards and meta.json, and return what that says of each split."""
        if isinstance(self.tokenizer, int):  # this reads all text, which is then read again to encode it
            self.tokenizer = tokenizer_for(pieces(Skipped()), self.tokenizer, self.total_bytes)
        watched = watched_for_control_tokens(pieces(self.skipped), self.tokenizer, self.skipped.spelled)
        end, begin = self.tokenizer.end_of_text, self.tokenizer.begin
        ends = [end] if self.chat or begin == end else [end, begin]  # the template begins a conversation
        items = with_progress(encoded(self.tokenizer, watched, ends), "encoding", self.total_bytes)
        splits = write_shards(self.partial, self.tokenizer.n_vocab, items, masked=self.chat)
        n_documents = sum(sizes["documents"] for sizes in splits.values())
        if not n_documents:
            fail(f"found nothing to read: {'; '.join(self.skipped.messages()[:3])}")
        self.skipped.say()
        for split, change in (("train", "lower"), ("val", "raise")):
            if not splits[split]["tokens"]:
                none = f"none of {n_documents:,} {'conversations' if self.chat else 'documents'}"
                fail(f"{none} fell into the {split} split: add some that begin otherwise, or {change} --val_fraction")
        meta = {"tokenizer": self.tokenizer.to_dict(self.chat), "vocab_size": self.tokenizer.n_vocab, **splits}
        write_json(self.partial / "meta.json", meta | {"sources": self.sources})
        return splits

    def report(self, splits: dict) -> None:
        """Print how the held-out text begins, in braces what the loss counts of conversations, and all sizes."""
        shards = load_dataset(self.out, verify=False)[1]
        texts = [self.tokenizer.decode([token]) for token in shards["val"][0][:30].tolist()]
        if self.chat:
            texts = [f"{{{text}}}" if counts else text for text, counts in zip(texts, shards["val-mask"][0])]
        say(f"held-out text begins, with | between tokens: {repr('|'.join(texts))}")
        line = "{:5} {documents:9,} documents {bytes:13,} bytes {tokens:13,} tokens, {:.2f} bytes per token"
        for split, sizes in splits.items():
            say(line.format(split, sizes["bytes"] / sizes["tokens"], **sizes))
        say(f"{self.out} is ready: vocabulary of {self.tokenizer.n_vocab:,} ({self.tokenizer.name})")


def tokenizer_for(pieces: Iterable[Piece], vocab_size: int, total_bytes: int) -> Tokenizer:
    """Train a tokenizer on text of the train split, of which it takes at most about BPE_SAMPLE_BYTES, or
    a few times as much where the files are compressed."""
    sample_every, console = math.ceil(total_bytes / BPE_SAMPLE_BYTES), Console(sys.stderr, log_every=10)
    texts = ((split, part.text) for split, parts, _ in pieces for part in parts if not part.control)
    sized = ((split, len(text.encode()), text) for split, text in texts)
    read = enumerate(with_progress(sized, "reading for the tokenizer", total_bytes))
    sample = (text for i, (split, _, text) in read if split == "train" and i % sample_every == 0)
    return train_tokenizer(sample, vocab_size, lambda n: console.glimpse(f"learning tokens: {n:,} of {vocab_size:,}"))


# ---------------------------------------------------------------------------------------------------------------------
# Documents: from file names to pieces of text, each assigned to a split


def find_files(inputs: list[str], downloads: Path, skipped: Skipped) -> list[Path]:
    """Return the usable files among the inputs, each once, without hidden ones, folders in sorted order. Download URLs
    and copy pipes. End the program if there is none."""
    paths, pipes = [] if inputs else default_corpus(), {}
    for name in inputs:
        path = download(name, downloads) if name.startswith(("http://", "https://")) else Path(name)
        if name == "-" or path.is_fifo():
            paths.append(copy_of_pipe(sys.stdin.buffer if name == "-" else open(path, "rb")))
            pipes[paths[-1]] = "stdin" if name == "-" else path
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
            skipped[pipes.get(path, path), reason] += 1
        else:
            usable[real] = path
    if not usable:
        fail(f"found nothing to read: {'; '.join(skipped.messages()) or 'the folders hold no files'}")
    return list(usable.values())


def files_below(folder: Path, skipped: Skipped) -> Iterator[Path]:
    """Yield the files in a folder and in its subfolders. Follows links, but enters no folder twice."""
    entered, unreadable = set(), []
    for here, folders, names in os.walk(folder, followlinks=True, onerror=unreadable.append):
        if (real := os.path.realpath(here)) in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = (name for name in folders if not name.startswith("."))
        yield from (Path(here, name) for name in names if not name.startswith("."))
    skipped.update((error.filename, error.strerror) for error in unreadable)


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
            if not (head := file.peek(1)):
                return "empty"
            if not is_container(path):
                if looks := [look for beginning, look in NO_TEXT.items() if file.peek(8).startswith(beginning)]:
                    return f"not UTF-8 text, but {looks[0]}"
                for _ in codecs.iterdecode(iter(lambda: file.read(PIECE_BYTES), b""), "utf-8"):
                    pass
    except UnicodeDecodeError:
        if b"\0" in head:
            return "a binary file"
        return "not UTF-8, but perhaps Latin-1: iconv -f LATIN1 -t UTF-8 FILE > NEW.txt"
    except OSError as error:
        return error.strerror or str(error)


def is_container(path: Path) -> bool:
    return path.name.lower().endswith(CONTAINERS)


def documents(path: Path, field: str, skipped: Skipped) -> Iterator[tuple[BinaryIO, int]]:
    """Yield each document of a file as a stream of UTF-8 and its size in bytes."""
    if not is_container(path):
        with open(path, "rb") as file:
            yield file, os.fstat(file.fileno()).st_size
        return
    for record in records(path, field, skipped):
        try:
            text = record[field].encode()
        except UnicodeEncodeError:
            skipped.record(path, "records with text that is no Unicode")
            continue
        except (TypeError, KeyError, AttributeError):  # another sort of record, or no text in it
            text = b""
        if text:
            yield io.BytesIO(text), len(text)
        elif isinstance(record, list | dict) and CHAT_KEYS.intersection(record):
            skipped.record(path, "conversations, of which python chat.py --prepare makes a data set", record)
        else:
            skipped.record(path, f"records without text in --field {field!r}", record)


def records(path: Path, field: str | None, skipped: Skipped) -> Iterator[object]:
    """Yield the lines of a .jsonl file that are not blank, or the rows of a .parquet file. A .json file is read like a
    .jsonl file if its first line is an object by itself, and else whole: as a list of records."""
    name = path.name.lower()
    try:
        if name.endswith(".parquet"):
            try:
                import pyarrow.parquet
            except ImportError:
                fail(f"{path} needs pyarrow: pip install pyarrow")
            file = pyarrow.parquet.ParquetFile(path)
            columns = [field] if field in file.schema_arrow.names else None  # all, to list them in the message
            for batch in file.iter_batches(batch_size=256, columns=columns):
                yield from batch.to_pylist()
            return
        with gzip.open(path) if name.endswith(".gz") else open(path, "rb") as file:
            lines = filter(bytes.strip, file)
            first = next(lines, b"")
            if name.endswith((".json", ".json.gz")) and not regex.fullmatch(rb"(\xef\xbb\xbf)?\s*\{.*\}\s*", first):
                value = json.loads(first + file.read())
                yield from value if isinstance(value, list) else [value]
                return
            for line in chain([first], lines):
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    skipped.record(path, "records that are not valid JSON in UTF-8")
                else:
                    yield record
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:  # a damaged file
        skipped.record(path, f"unreadable from some record on ({error})")


def split_pieces(files: list[Path], field: str, val_fraction: float, tail: bool, skipped: Skipped) -> Iterator[Piece]:
    """Yield all text, piece by piece. Whole documents are held out, or with `tail` the end of each document."""
    for path in files:
        for stream, size in documents(path, field, skipped):
            if tail:
                cut = int(size * (1 - val_fraction))
                stream.seek(cut)
                after = stream.read(3)
                cut += len(after) - len(after.lstrip(bytes(range(0x80, 0xC0))))  # past UTF-8's continuation bytes
                shares = [("train", cut), ("val", size - cut)]
            else:
                shares = [(split_of_document(stream, val_fraction), size)]
            stream.seek(0)
            for split, share in shares:
                for text, is_last in read_pieces(stream, share):
                    yield split, [Part(text)], is_last


def are_few(files: list[Path], field: str, val_fraction: float) -> bool:
    """Whether a split would have fewer than two whole documents. Reads on until that is known."""
    counts = Counter()
    for path in files:
        for stream, _ in documents(path, field, Skipped()):
            counts[split_of_document(stream, val_fraction)] += 1
            if all(counts[split] >= 2 for split in SPLITS):
                return False
    return bool(counts)


def split_of_document(stream: BinaryIO, val_fraction: float) -> str:
    """By a hash of its text: the order of documents doesn't matter, and copies share a split."""
    beginning = stream.read(PIECE_BYTES).decode(errors="ignore").encode()  # ends with a whole character
    return split_of(beginning, val_fraction)


def split_of(key: bytes, val_fraction: float) -> str:
    hashed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")
    return "val" if hashed < val_fraction * 2**64 else "train"


def read_pieces(stream: BinaryIO, size: int) -> Iterator[tuple[str, bool]]:
    """Read `size` bytes of UTF-8. Yield them as text, in pieces of about PIECE_BYTES, and whether each is the last.

    Pieces end between a letter or digit and white space. No published pattern has both in one chunk, so this does not
    change the tokens.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()  # leaves out the byte order mark that some editors write
    rest = ""
    while size > 0 and (block := stream.read(min(size, PIECE_BYTES))):
        size -= len(block)
        rest += decoder.decode(block)
        cut = regex.search(r"(?r)[\p{L}\p{N}](?=\s)", rest) if size > 0 else None  # (?r): the last in the text
        end = cut.end() if cut else len(rest)  # if there is no good place to cut, cut anywhere
        yield rest[:end], size <= 0
        rest = rest[end:]
    if size > 0:  # the file became shorter while it was read
        yield rest, True


def watched_for_control_tokens(pieces: Iterable[Piece], tokenizer: Tokenizer, counts: Counter) -> Iterator[Piece]:
    """Yield the pieces, and count how often their text spells each control token."""
    for piece in pieces:
        yield piece
        for part in piece[1]:
            if not part.control:
                counts.update(tokenizer.control_tokens.findall(part.text))


def encoded(tokenizer: Tokenizer, pieces: Iterable[Piece], ends: list[int]) -> Iterator[Encoded]:
    """Encode each piece, in order. The tokens `ends` follow each document.

    tiktoken releases Python's global lock (the GIL), so threads encode on all cores. Each gets a batch of about a
    megabyte at a time, so that short documents are encoded as fast as long ones.
    """
    end, no_target = np.array(ends, np.uint32), np.zeros(len(ends), bool)

    def encode(piece: Piece) -> Encoded:
        split, parts, is_last = piece
        tokens, targets = tokenizer.encode_parts(parts)
        if is_last:
            tokens, targets = np.concatenate([tokens, end]), np.concatenate([targets, no_target])
        return split, sum(len(part.text.encode()) for part in parts), tokens, targets, is_last

    def batches() -> Iterator[list[Piece]]:
        batch, n_chars = [], 0
        for piece in pieces:
            batch.append(piece)
            n_chars += sum(len(part.text) for part in piece[1])
            if n_chars >= PIECE_BYTES:
                yield batch
                batch, n_chars = [], 0
        yield batch

    n_threads = os.cpu_count()
    with ThreadPoolExecutor(n_threads) as pool:
        pending = deque()
        for batch in batches():
            pending.append(pool.submit(lambda batch: [encode(piece) for piece in batch], batch))
            if len(pending) > 2 * n_threads:  # without a bound, text read in advance would fill the memory
                yield from pending.popleft().result()
        for future in pending:
            yield from future.result()


# ---------------------------------------------------------------------------------------------------------------------
# Shards: written and read only here, so that the format is defined in one place


SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
MADE_BY = {  # the data sets that presets and the README use
    "shakespeare": f"prepare.py {SHAKESPEARE} --tokenizer byte --val_tail --val_fraction 0.1",
    "gpt2": "prepare.py --tokenizer gpt2",
    "chat": "chat.py --prepare --tokenizer runs/toy-1",
}


class ShardWriter:
    """Writes numbers to the files NAME-00000.npy, NAME-00001.npy, ... of a folder, SHARD_TOKENS to each."""

    def __init__(self, folder: Path, name: str, dtype: type):
        self.folder, self.name, self.dtype, self.records, self.file = folder, name, np.dtype(dtype), [], None

    def append(self, numbers: np.ndarray) -> None:
        while len(numbers):
            if self.file is None:
                self.records.append({"file": f"{self.name}-{len(self.records):05d}.npy", "tokens": 0})
                self.file = open(self.folder / self.records[-1]["file"], "wb")  # noqa: SIM115
                np.save(self.file, np.empty(0, self.dtype))  # a header, which NumPy pads so that the length can grow
            part, numbers = np.split(numbers, [SHARD_TOKENS - self.records[-1]["tokens"]])
            self.file.write(part.astype(self.dtype).data)
            self.records[-1]["tokens"] += len(part)
            if self.records[-1]["tokens"] == SHARD_TOKENS:
                self.finish()

    def finish(self) -> list[dict]:
        """Close the file, safely on disk, with its length in the header. Returns what meta.json says of all files."""
        if self.file is not None:
            record = self.records[-1]
            with self.file:
                self.file.seek(0)
                header = {"descr": self.dtype.str, "fortran_order": False, "shape": (record["tokens"],)}
                np.lib.format.write_array_header_1_0(self.file, header)
                self.file.flush()
                os.fsync(self.file.fileno())
            record["sha256"] = sha256_of(self.folder / record["file"])
            self.file = None
        return self.records


def write_shards(folder: Path, n_vocab: int, items: Iterable[Encoded], masked: bool) -> dict:
    """Append all items to the shards of their split, and return what meta.json says of each split. If `masked`, shards
    beside those of the tokens tell which of them are targets."""
    dtype = np.uint16 if n_vocab <= 2**16 else np.uint32
    splits = {split: {"tokens": 0, "bytes": 0, "documents": 0} for split in SPLITS}
    shards = {split: ShardWriter(folder, split, dtype) for split in SPLITS}
    masks = {split: ShardWriter(folder, f"{split}-mask", np.bool_) for split in SPLITS if masked}
    for split, n_bytes, tokens, mask, ends in items:
        splits[split]["tokens"] += len(tokens)
        splits[split]["bytes"] += n_bytes
        splits[split]["documents"] += ends
        shards[split].append(tokens)
        if masked:
            masks[split].append(mask)
    for kind, writers in (("shards", shards), ("masks", masks)):
        for split, writer in writers.items():
            splits[split][kind] = writer.finish()
    return splits


def load_dataset(folder: str | Path, verify: bool = True) -> tuple[dict, dict[str, list[np.ndarray]]]:
    """Return meta.json and the shards of "train" and "val", memory-mapped, and of conversations also those of
    "train-mask" and "val-mask". End the program if the data set is damaged.

    `verify` reads all of it to compare the SHA-256. Turn that off where it is done elsewhere.
    """
    folder, shards = Path(folder), {}

    def open_shard(record: dict, dtypes: tuple[type, ...]) -> np.ndarray:
        path = folder / Path(record["file"]).name
        try:
            numbers = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error
        if numbers.ndim != 1 or numbers.dtype not in dtypes:
            raise ValueError(f"{path.name} has dtype {numbers.dtype} and shape {numbers.shape}")
        return numbers

    if not os.path.exists(folder / "meta.json"):
        made_by, out = MADE_BY.get(folder.name, "prepare.py").split(), folder
        if os.path.exists(folder):  # a text, perhaps
            made_by, out = ["prepare.py", folder], default_out([str(folder)], "")
        offer = command(*made_by, "--out", out)
        fail(f"{folder} is no data set: make one with {offer} (and your own files, if any, before --out)")
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if Tokenizer.from_dict(meta["tokenizer"]).n_vocab != meta["vocab_size"]:
            raise ValueError("vocab_size in meta.json is not the size of its tokenizer")
        for split in SPLITS:
            shards[split] = [open_shard(record, (np.uint16, np.uint32)) for record in meta[split]["shards"]]
            masks = [open_shard(record, (np.bool_,)) for record in meta[split].get("masks", [])]
            if masks:
                shards[f"{split}-mask"] = masks
            for arrays in (shards[split], masks or shards[split]):
                if meta[split]["tokens"] != sum(map(len, arrays)) or meta[split]["bytes"] < 1:
                    raise ValueError(f"the sizes of the {split} split in meta.json are wrong")
    except OSError as error:
        fail(f"cannot read {error.filename or folder}: {error.strerror or error}")
    except Exception as error:  # noqa: BLE001 - damaged files can make NumPy and tiktoken fail in any way
        fail(f"the data set {folder} is damaged ({error}): remove it and prepare it again")
    if verify and (problem := damaged_shard(folder, meta)):
        fail(problem)
    return meta, shards


def damaged_shard(folder: Path, meta: dict, first: int = 0, every: int = 1) -> str | None:
    """Read some of the shards, those number `first`, `first + every`, ..., and say which of them differs from what
    meta.json says, if any does."""
    records = [record for split in SPLITS for kind in ("shards", "masks") for record in meta[split].get(kind, [])]
    try:
        for record in records[first::every]:
            path = folder / Path(record["file"]).name
            if sha256_of(path) != record["sha256"]:
                raise ValueError(f"the SHA-256 of {path.name} differs from the one in meta.json")
            numbers = np.load(path, mmap_mode="r")
            if numbers.max(initial=0) >= meta["vocab_size"]:
                raise ValueError(f"token {numbers.argmax()} of {path.name} is {numbers.max()}, beyond the vocabulary")
    except (OSError, ValueError) as error:
        return f"the data set {folder} is damaged ({error}): remove it and prepare it again"


def shard_hashes(meta: dict, split: str) -> list[str]:
    """The SHA-256 of each shard, those of masks last, which together identify a split."""
    return [record["sha256"] for record in (*meta[split]["shards"], *meta[split].get("masks", []))]


class Windows:
    """A split's tokens, shard after shard, as windows of seq_len inputs and their targets, shifted by one token. With
    `separator`, the token between documents, it also tells which document each input belongs to."""

    n_cut = n_left_out = 0  # of conversations that are too long, see chat.py

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
        starts = indices * self.seq_len
        tokens = np.stack([self.window(start, start + self.seq_len + 1) for start in starts]).astype(np.int64)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        return inputs, targets, None if self.separator is None else (inputs == self.separator).cumsum(1)

    def window(self, begin: int, end: int) -> np.ndarray:
        """The tokens begin .. end - 1, which may span several shards."""
        first, last = np.searchsorted(self.starts, [begin, end - 1], side="right") - 1
        parts = zip(self.starts[first : last + 1], self.shards[first : last + 1])
        return np.concatenate([shard[max(begin - start, 0) : end - start] for start, shard in parts])


# ---------------------------------------------------------------------------------------------------------------------
# Helpers, most of them shared by all scripts


def fail(message: str) -> NoReturn:
    """End the program because of a mistake that its user can correct: one sentence on stderr, exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def exit_on(*kinds: type[Exception]) -> Iterator[None]:
    """End the program with the message of such an exception: the sentence is for its user."""
    try:
        yield
    except kinds as error:
        fail(f"cannot use {error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error))


def moved(flag: str, new: str) -> None:
    """If the command line has this flag, which is now the command `new`, name that command and end the program."""
    if flag in sys.argv[1:]:
        rest = (argument for argument in sys.argv[1:] if argument != flag)
        fail(f"this is another command now: {command(*new.split(), *rest)}")


def command(script: str, *arguments: object) -> str:
    """What to type to run a script of the folder that holds the running one."""
    return shlex.join(["python", os.path.join(os.path.dirname(sys.argv[0]), script), *map(str, arguments)])


def tolerate_streams() -> None:
    """Print "?" for characters that the terminal's encoding lacks, and treat a closed stream as an empty one."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name) or open(os.devnull, mode)  # noqa: SIM115
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
        setattr(sys, name, stream)


def lock(path: Path, task: str, wait: bool = False) -> int | None:
    """Lock a file until it is closed or the process ends, however that ends. If another process holds the lock, wait
    for it or end the program."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            fail(f"another process is {task}: wait for its end, or choose another --out")
        say(f"another process is {task}: waiting for its end")
        fcntl.lockf(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):  # a file system without locks
            raise
        say(f"{path.parent} has no file locks: see to it that only one process writes there")
    return file


@contextmanager
def unfinished(folder: Path, task: str, wait: bool) -> Iterator[None]:
    """Create an empty folder for unfinished data, which one process at a time can have: what is there already is left
    by a killed one. At the end the folder is removed, unless it has been renamed."""
    beside = folder.with_name(f".{folder.name}.lock")  # the folder itself will be renamed
    beside.parent.mkdir(parents=True, exist_ok=True)
    while (file := lock(beside, task, wait)) is not None and os.fstat(file).st_nlink == 0:
        os.close(file)  # another process has removed the file while this one waited for it
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        beside.unlink(missing_ok=True)
        if file is not None:
            os.close(file)


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


def say(text: str) -> None:
    """Print a line on stderr."""
    Console(sys.stderr).line(text)


def clock(seconds: float) -> str:
    """4000 -> 1:06:40"""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def with_progress(items: Iterable[tuple], task: str, total_bytes: int) -> Iterator[tuple]:
    """Yield the items (split, bytes, ...) and report on stderr how many bytes are done and how long the rest takes."""
    console, start, done = Console(sys.stderr, log_every=10), time.perf_counter(), 0
    for item in items:
        yield item
        done += item[1]
        rate = done / (time.perf_counter() - start)
        left = f", about {(total_bytes - done) / rate:,.0f} s left" if 0 < done < total_bytes else ""  # or compressed
        console.glimpse(f"{task}: {done / 1e6:,.1f} MB, {rate / 1e6:.1f} MB/s{left}")
    console.line(f"{task}: {done / 1e6:,.1f} MB in {time.perf_counter() - start:.1f} s")


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def main() -> None:
    tolerate_streams()
    moved("--chat", "chat.py --prepare")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="text file, folder, .jsonl[.gz], .json, .parquet, URL, - for stdin")
    add("--out", help="folder for the data set (data/NAME, from the first input's name)")
    add("--tokenizer", default=DEFAULT_TOKENIZER, help="byte, bpe:N, a tiktoken name or a model's folder (%(default)s)")
    add("--val_fraction", type=float, help="fraction of the text to hold out (0.01; 0.05 of the default corpus)")
    add("--val_tail", action="store_true", help="hold out the end of each document (always, if there are few)")
    add("--field", default="text", help="field that holds the text of a record (%(default)s)")
    args = parser.parse_args()
    args.out = args.out if args.out is not None else default_out(args.inputs, "stdlib")
    prepare(**vars(args))


def default_out(inputs: list[str], name: str) -> Path:
    """data/NAME, after the first of the inputs if there is one."""
    if inputs:
        name = "pipe" if inputs[0] == "-" else regex.match("[^.:]*", Path(inputs[0]).resolve().name)[0] or "text"
    return Path("data", name)


if __name__ == "__main__":
    main()
