"""prepare.py: documents, shards and windows."""

import gzip
import io
import json
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import sys
from collections import Counter
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from unittest.mock import Mock

import numpy as np
import pytest
import regex
import tiktoken_ext.openai_public
from conftest import ROOT, Ranks, shell, words

import chat
import prepare
import train
from tokenizer import BYTES, END_OF_TEXT, GPT4_PATTERN, Part, Tokenizer, train_bpe

fork = multiprocessing.get_context("fork").Process
BYTES_AND_TAIL = ["--tokenizer", "byte", "--val_tail", "--val_fraction", 0.2]


def decoded(folder: str | Path, *splits: str) -> list[str]:
    """The documents of splits, by default of both, read back through meta.json."""
    meta, shards = prepare.load_dataset(folder)
    ids = np.concatenate([shard for split in splits or ("train", "val") for shard in shards[split]])
    return Tokenizer.from_dict(meta["tokenizer"]).decode(ids.tolist()).split(END_OF_TEXT)[:-1]


def write(files: dict[str, str | bytes | list[dict]]) -> None:
    """Write files, and the folders that they are in, into the current folder. A list of records becomes Parquet."""
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
            parquet.write_table(pyarrow.Table.from_pylist(content), name)
        else:
            Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())


def jsonl(records: list) -> str:
    """A record per line. A string stands for a record of that text."""
    return "\n".join(json.dumps({"text": r} if isinstance(r, str) else r) for r in records) + "\n"


@pytest.mark.parametrize("name", ["ours", "gpt2", "cl100k_base", "o200k_base"])
def test_text_cut_into_pieces_gives_the_same_tokens(name, monkeypatch):
    """With each published pattern, and merges learned under it from the same sort of text, so that every chunk is one
    token and a cut inside a chunk shows. (The published merges would need a network.)"""
    monkeypatch.setattr(tiktoken_ext.openai_public, "load_tiktoken_bpe", lambda *a, **k: {})
    monkeypatch.setattr(tiktoken_ext.openai_public, "data_gym_to_mergeable_bpe_ranks", lambda *a, **k: {})
    pattern = GPT4_PATTERN if name == "ours" else getattr(tiktoken_ext.openai_public, name)()["pat_str"]
    rng = random.Random(0)
    parts = ["the", "model", "it's", "42", "naïve", "__init__", "(x)", "/usr"]
    separators = [" ", "\n", "  ", "\n\n", "_ ", "-\n", "\n/", " '", "é\n", "7 ", "中 "]
    texts = ["".join(rng.choice(parts) + rng.choice(separators) for _ in range(400)) for _ in range(60)]
    ranks = train_bpe(Counter(chunk for text in texts for chunk in regex.findall(pattern, text)), 1000)
    tokenizer = Tokenizer("cut", pattern, ranks)
    monkeypatch.setattr(prepare, "PIECE_BYTES", 500)
    for text in texts:
        pieces = [piece for piece, _ in prepare.read_pieces(io.BytesIO(text.encode()), len(text.encode()))]
        assert len(pieces) > 2 and "".join(pieces) == text
        assert [i for piece in pieces for i in tokenizer.encode(piece).tolist()] == tokenizer.encode(text).tolist()


# ---- documents


def test_a_folder_gives_all_documents_in_it_once_and_what_it_cannot_give_is_named(call, capsys, tmp_path):
    """Links are followed. Nothing that is hidden is read. A record with a text is text, whatever else it has; so are
    tables and control tokens, but no byte order mark. The data set has the own name of the folder."""
    plain, zipped = ([f"{kind} {i} {words(20, i)}" for i in range(40)] for kind in ("plain", "zipped"))
    wrong = '{"text": "\\ud800 lone"}\nnot json\n{"body": 1}\n{"text": 5}\n[]\n{"text": ""}\n'
    write({"in/a.jsonl": jsonl([{"text": text, "answer": "b"} for text in plain]) + wrong})
    write({"in/c.jsonl.gz": gzip.compress(jsonl(zipped).encode())})
    write({"in/deep/b.txt": "from a folder", "elsewhere/d.txt": "from a link"})
    write({"in/table.csv": "\ufeff" + (table := "<|im_end|>,<|im_end|>\n")})
    write({"in/.hidden": "never read", "in/.git/config": "never read", "in/empty.txt": b""})
    write({"in/latin.txt": b"caf\xe9", "in/cut.txt": "é".encode()[:1]})
    write({"in/torn.jsonl.gz": gzip.compress(jsonl(["x"] * 1000).encode())[:-20]})
    for link, target in (("linked", "elsewhere"), ("loop", "in"), ("dangling", "nowhere")):
        Path("in", link).symlink_to(tmp_path / target)
    os.mkfifo("in/fifo")
    call(prepare, "in/deep/..", "in/a.jsonl", "--tokenizer", "byte", "--val_fraction", 0.2)
    expected = [*plain, *zipped, "from a folder", "from a link", table]
    train, val = ([text for text in decoded("data/in", split) if text != "x"] for split in prepare.SPLITS)
    assert sorted(train + val) == sorted(expected)
    assert len(val) > 0 and train == [text for text in expected if text not in val]
    printed = capsys.readouterr().err
    wrong = ["without text in --field 'text'; one has the keys body (4)", "text that is no Unicode", "not valid JSON"]
    wrong += ["latin.txt: not UTF-8", "cut.txt: not UTF-8", "empty.txt: empty", "torn.jsonl.gz", "a.jsonl: given twice"]
    wrong += ["dangling: not a regular file", "fifo: not a regular file"]
    as_text = ["as plain text, not as tables: in/deep/../table.csv\n", "as ordinary characters: <|im_end|> (2); for"]
    for told in (*wrong, *as_text):
        assert told in printed


@pytest.mark.parametrize("fraction, below, above", [([], 10300, 10567), (["--val_fraction", 0.5], 17449, 7711)])
def test_the_split_of_a_document_depends_on_its_text_alone(call, fraction, below, above):
    """Here on the first eight bytes of BLAKE2b(text), as a fraction of 2^64: below the default, 0.01, are "text 62"
    (0.0053) and "text 10300" (0.00992), not "text 10567" (0.01011) and "text 4" (0.78). So on any machine."""
    texts = [f"text {i}" for i in (4, below, 62, above)]
    for name, order in (("a", texts), ("b", texts[::-1] + texts)):
        write({f"{name}.jsonl": jsonl(order)})
        call(prepare, f"{name}.jsonl", "--tokenizer", "byte", *fraction)
        assert decoded(f"data/{name}", "val") == [text for text in order if text in texts[1:3]]
        assert decoded(f"data/{name}", "train") == [text for text in order if text not in texts[1:3]]


@pytest.mark.parametrize("fraction", [None, 0.1, 0.1001, 0.1002, 0.1003])  # cuts in the middle of a character, too
def test_val_tail_holds_out_the_end_of_the_text_and_of_a_single_file_its_last_hundredth(call, fraction):
    write({"t.txt": (text := "你好🙂" * 1000)})
    call(prepare, "t.txt", "--tokenizer", "byte", *(["--val_tail", "--val_fraction", fraction] if fraction else []))
    train, val = decoded("data/t")
    assert train + val == text
    assert abs(len(val.encode()) - len(text.encode()) * (fraction or 0.01)) < 4


@pytest.mark.parametrize("inputs, content, told", [
    (["nowhere.txt"], b"", "no such file or folder: nowhere.txt"), (["a.txt"], b"", "a.txt: empty"),
    *((["a.txt", "--val_fraction", n], b"text", f"{n} is not between 0 and 1") for n in ("0.0", "1.0")),
    (["a.txt", "--out", "."], b"text", "--out ."),
    (["a.txt", "b.txt"], b"t", "none of 2 documents fell into the train split: add some that"),
    (["http://127.0.0.1:9/x.txt"], b"", "could not fetch"),
    (["a.txt", "--out", "photos"], b"text", "choose another --out"),  # a user's folder
    (["a.txt", "--out", "other"], b"text", "choose another --out"),  # for which other.partial is needed
    (["a.txt"], b"%PDF-1.7", "a PDF: pdftotext FILE"), (["a.txt"], b"PK\3\4", "docx"),
    (["a.txt"], gzip.compress(b"x", mtime=0), "a compressed file: unpack"), (["a.txt"], b"\x80\0\1", "a binary file"),
    (["a.txt"], "x".encode("utf-16"), "iconv -f UTF-16 -t UTF-8 FILE"),
    (["a.txt"], b"caf\xe9", "iconv -f LATIN1 -t UTF-8 FILE"),
    (["-"], b"%PDF-1.7", "nothing to read: stdin: not UTF-8"),  # not by the name of its copy
    (["a.txt/x"], b"text", "no such file or folder: a.txt/x"), (["x" * 300], b"text", "x" * 300),
    *((["a.txt", "--out", "x" * n], b"text", "File name too long") for n in (250, 300)),
    (["a.txt", "--out", "a.txt/x"], b"text", "File exists"),
    *((["a.txt", "--tokenizer", name], b"text", f"unknown tokenizer {name!r}") for name in ("a.txt/x", "x" * 300)),
])
def test_input_that_gives_no_data_set_is_refused(refused, monkeypatch, tmp_path, inputs, content, told):
    """What cannot be used is named once."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    monkeypatch.setattr(prepare.Skipped, "say", lambda skipped: skipped and pytest.fail("it is named twice"))
    write({"a.txt": content, "b.txt": content, "photos/train-images.npy": "mine", "other.partial/a.npy": "mine"})
    assert told in refused(prepare, "--tokenizer", "byte", *inputs)
    assert not list(tmp_path.glob("data/*/meta.json"))
    assert {path.read_text() for path in tmp_path.glob("*/*.npy")} == {"mine"}


def test_a_preparation_that_is_interrupted_or_killed_leaves_no_data_set(refused, call, capsys, monkeypatch, tmp_path):
    """And can be repeated: what a killed one has left is in nobody's way."""
    write({"a.txt": words(200)})
    flags = ["a.txt", *BYTES_AND_TAIL]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", Mock(side_effect=KeyboardInterrupt))  # when the first shard is whole
        assert "interrupted: there is no data set in data/a yet" in refused(prepare, *flags)
        assert not list(tmp_path.glob("data/*"))
        patch.setattr(os, "fsync", lambda file: signal.raise_signal(signal.SIGKILL))
        (process := fork(target=call, args=(prepare, *flags))).start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    Path("data/a.partial/train-00000.npy").rename("data/a.partial/train-00009.npy")
    pytest.raises(SystemExit, prepare.load_dataset, "data/a")
    assert "data/a is no data set" in capsys.readouterr().err and not Path("data/a").exists()
    call(prepare, *flags)
    assert "".join(decoded("data/a")) == words(200) and os.listdir("data") == ["a"]
    assert sorted(os.listdir("data/a")) == ["meta.json", "train-00000.npy", "val-00000.npy"]


def test_a_second_preparation_writes_the_bytes_that_the_report_counts(refused, call, capsys, monkeypatch, tmp_path):
    """The second one in another process, whose hash() is another. Neither overwrites a data set. A text of several
    pieces is one document."""
    monkeypatch.setattr(prepare, "PIECE_BYTES", 10_000)  # here, not in the other process
    texts = [words(600, i) for i in range(60)] + [words(6000)]
    flags = ["--tokenizer", "bpe:300", "--val_fraction", 0.2, "--out"]
    write({"a.jsonl": jsonl(texts)})
    call(prepare, "a.jsonl", *flags, "out/1")
    printed = " ".join(capsys.readouterr().err.split())
    shell("prepare.py", "a.jsonl", *flags, "out/2", cwd=tmp_path)
    assert "out/1 already exists" in refused(prepare, "a.jsonl", *flags, "out/1")
    files, again = ({path.name: path.read_bytes() for path in Path("out", n).iterdir()} for n in "12")
    assert files == again

    meta, megabytes = json.loads(files["meta.json"]), sum(len(text.encode()) for text in texts) / 1e6
    assert f"the tokenizer: {megabytes:.1f} MB in" in printed and f"encoding: {megabytes:.1f} MB in" in printed
    for split in ("train", "val"):
        documents, tokens = decoded("out/1", split), np.load(f"out/1/{split}-00000.npy")
        sizes = len(documents), sum(len(text.encode()) for text in documents), len(tokens)
        assert tuple(meta[split][key] for key in ("documents", "bytes", "tokens")) == sizes
        line = "{} {:,} documents {:,} bytes {:,} tokens, {:.2f} bytes per token"
        assert line.format(split, *sizes, sizes[1] / sizes[2]) in printed
    first = [Tokenizer.from_dict(meta["tokenizer"]).decode([token]) for token in tokens[:30].tolist()]
    assert f"held-out text begins, with | between tokens: {'|'.join(first)!r}" in printed
    assert printed.endswith("out/1 is ready: vocabulary of 300 (bpe:300)")


# ---- shards


def test_shards_follow_each_other_and_read_back(call, monkeypatch):
    monkeypatch.setattr(prepare, "SHARD_TOKENS", 1000)
    write({"t.txt": words(2000)})
    call(prepare, "t.txt", "--tokenizer", "byte", "--val_fraction", 0.1)
    _, shards = prepare.load_dataset("data/t")
    assert len(shards["train"]) > 5 and {len(s) for s in shards["train"][:-1]} == {1000}
    assert "".join(decoded("data/t")) == words(2000)


def test_windows_run_through_shards_as_if_they_were_one_to_the_last_target():
    for n_tokens, n_windows in ((100, 9), (101, 10), (110, 10), (111, 11)):
        tokens = np.random.default_rng(0).integers(0, 60_000, n_tokens).astype(np.uint16)
        windows = prepare.Windows(np.split(tokens, [3, 4, 50, 77]), seq_len=10)
        inputs, targets = (taken.flatten().tolist() for taken in windows.get(np.arange(n_windows))[:2])
        assert windows.n_windows == n_windows
        assert inputs == tokens[: 10 * n_windows].tolist() and targets == tokens[1 : 10 * n_windows + 1].tolist()


@pytest.mark.parametrize("size, dtype", [(65_536, np.uint16), (65_537, np.uint32)])
def test_a_vocabulary_beyond_16_bits_is_stored_in_32(tmp_path, size, dtype):
    ranks = BYTES | {i.to_bytes(3, "big"): i for i in range(256, size - 1)}
    tokenizer = Tokenizer("w", GPT4_PATTERN, ranks, {END_OF_TEXT: size - 1})
    items = prepare.encoded(tokenizer, [("train", [Part("a")], True)], [size - 1])
    splits = prepare.write_shards(tmp_path, size, items, masked=False)
    tokens = np.load(tmp_path / splits["train"]["shards"][0]["file"])
    assert tokens.dtype == dtype and tokens.tolist() == [ord("a"), size - 1]


def test_a_data_set_with_the_right_hashes_can_still_be_wrong(data, tmp_path, capsys):
    path, meta = shutil.copytree(data, tmp_path / "set") / "val-00000.npy", json.loads((data / "meta.json").read_text())
    wrong = [([0, 259], "uint16", "token 1 of val-00000.npy is 259, beyond"), ([0, 258], "int64", "dtype int64")]
    wrong += [([[0], [1]], "uint16", "shape (2, 1)"), ([0], "uint16", "the sizes of the val split")]
    for tokens, dtype, told in wrong:
        np.save(path, np.array(tokens, dtype))
        meta["val"] |= {"tokens": 2, "shards": [{"file": path.name, "sha256": prepare.sha256_of(path)}]}
        path.with_name("meta.json").write_text(json.dumps(meta))
        pytest.raises(SystemExit, prepare.load_dataset, tmp_path / "set")
        assert told in capsys.readouterr().err


def test_memory_stays_small_however_large_the_input(tmp_path):
    """Of 20 MB of text, one token a byte: reading it whole would take over 250 MB for text and tokens."""
    (tmp_path / "big.txt").write_text(words(50_000)[:200_000] * 100, encoding="utf-8")
    code = "import prepare, resource\npeak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
    code += "before = peak()\nprepare.main()\nprint(peak() - before)"
    (tmp_path / "measure.py").write_text(code)
    grown = int(shell(tmp_path / "measure.py", "big.txt", "--tokenizer", "byte", cwd=tmp_path).stdout)
    assert os.path.getsize(tmp_path / "big.txt") >= 20_000_000
    assert grown * (1 if sys.platform == "darwin" else 1024) < 150e6


def test_without_an_input_the_standard_library_becomes_data_stdlib_or_data_chat(call, monkeypatch, tmp_path):
    """A made-up one, which is not executed. Held out are 0.05 of its files, by their hashes as above and of copies all,
    or functions."""
    assert any(path.match("json/decoder.py") for path in prepare.default_corpus())
    names = ["".join(random.Random(i).choices("abcdefghijklmnopqrstuvwxyz", k=12)) for i in range(540)]
    functions = "".join(f'def {name}(a, b=1):\n    """Returns the {name} of all."""\n' for name in names)
    functions = f"raise SystemExit\n{functions}"
    files = {"a.py": "text 2921", "b.py": "text 4152", "c/c.py": functions, "empty.py": "", "no.txt": "not Python"}
    left_out = ("test", "c/tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "c/__pycache__")
    files |= {f"{folder}/x.py": "left out" for folder in left_out} | {"d.py": "text 2921"}
    write({f"lib/{name}": text for name, text in files.items()})
    monkeypatch.setattr(prepare.sysconfig, "get_path", {"stdlib": str(tmp_path / "lib")}.get)
    call(prepare)
    call(chat, "--prepare", "--tokenizer", "byte")
    assert prepare.load_dataset("data/stdlib")[0]["vocab_size"] == 4096
    assert decoded("data/stdlib", "val") == ["text 2921"] * 2
    assert decoded("data/stdlib", "train") == ["text 4152", functions]
    posts = regex.findall(r"`(\w+)\(a, b=1\)`: Returns the \1 of all\.", "".join(decoded("data/chat", "val")))
    assert 14 < len(set(posts)) < 40


# ---- what users bring


RECORDS = [{"content": words(9, i), "id": i} for i in range(30)]
LINES = "\n\n".join(map(json.dumps, RECORDS))


@pytest.mark.parametrize("name, content, is_nested", [
    *((name, f"{LINES}\n{'[' * 100_000}\n", True) for name in ("a.JSONL", "a.ndjson")),
    ("a.ndjson.gz", LINES, False), ("a.json", f"\ufeff{LINES}", False), ("a.json.gz", LINES, False),
    ("a.json", f"\n{json.dumps(RECORDS)}", False), ("a.json.gz", json.dumps(RECORDS, indent=1), False),
    ("a.parquet", RECORDS, False),
], ids=["lines", "ndjson", "ndjson.gz", "json of lines", "json.gz of lines", "list", "indented list", "parquet"])
def test_records_are_read_from_the_field_that_is_asked_for(refused, call, capsys, name, content, is_nested):
    """A record per line, or one value, which may begin on any line."""
    write({name: gzip.compress(content.encode()) if name.endswith("gz") else content})
    told = refused(prepare, name, "--tokenizer", "byte")
    assert "one has the keys content, id" in told and "--field" in told
    call(prepare, name, "--tokenizer", "byte", "--field", "content", "--val_fraction", 0.2)
    assert sorted(decoded("data/a")) == sorted(record["content"] for record in RECORDS)
    skipped = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped")]
    assert len(skipped) == is_nested and not any("(" in line for line in skipped)  # the one nested line


class Site(BaseHTTPRequestHandler):
    """Its files have 30 bytes, which begin with their paths. Of torn ones it sends less than it announces."""

    def do_GET(self):
        torn = {"/torn.txt": "Content-Length: 31", "/torn-chunk.txt": "Transfer-Encoding: chunked"}
        length = torn.get(self.path, "Content-Length: 30")
        self.wfile.write(f"HTTP/1.1 200 OK\r\n{length}\r\n\r\n{self.path:30}".encode())


def test_each_url_gives_a_file_of_its_own_whole_and_fetched_once(call, refused, monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        site = f"http://127.0.0.1:{server.server_port}"
        for name in ("torn.txt", "torn-chunk.txt"):
            assert f"could not fetch {site}/{name}" in refused(prepare, f"{site}/{name}", "--tokenizer", "byte")
            assert not list(tmp_path.glob("data/*"))
        urls = [f"{site}/{path}" for path in ("a/input.txt", "b/input.txt", "b/input.txt?page=2", "")]
        call(prepare, *urls, *BYTES_AND_TAIL)
        server.shutdown()
    call(prepare, *urls, *BYTES_AND_TAIL, "--out", "data/again")
    for folder in ("data/input", "data/again"):
        assert [site + text.split()[0] for text in decoded(folder, "train")] == urls


def test_a_pipe_is_read_as_a_file_is(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    os.mkfifo(tmp_path / "fifo")
    process = Ranks(tmp_path, "-", "fifo", "b.txt", *BYTES_AND_TAIL, script=ROOT / "prepare.py", stdin="first")
    (tmp_path / "fifo").write_text("piped")
    process.finish()
    train, val = (decoded(tmp_path / "data" / "pipe", split) for split in ("train", "val"))
    assert [a + b for a, b in zip(train, val)] == ["first", "piped", "second"]


def test_files_are_on_disk_before_anything_gets_a_name(call, data, monkeypatch, tmp_path):
    """Else a power cut could leave a name that leads to half a file."""
    events = []

    def fsync(file: int) -> None:
        events.extend(path.read_bytes() for path in tmp_path.rglob("*") if path.stat().st_ino == os.fstat(file).st_ino)

    def name(rename, source, target) -> None:
        events.append(Path(target).name)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", partial(name, os.rename))
    monkeypatch.setattr(os, "replace", partial(name, os.replace))
    call(prepare, data.parent / "text.txt", *BYTES_AND_TAIL)
    with prepare.written_whole(tmp_path / "a") as file:
        file.write(b"bytes")
    found = {path.read_bytes(): f"all of {path.name}" for path in Path("data/text").iterdir()}
    synced = ["all of train-00000.npy", "all of val-00000.npy", "all of meta.json"]
    assert [found.get(event, event) for event in events] == [*synced, "meta.json", "text", b"bytes", "a"]


def test_of_few_documents_the_end_of_each_is_held_out(call, capsys):
    """Few are those of which a split would have one or none. By the hashes above, "text 62" alone is held out here."""
    texts = ["text 62", *(f"{i} {words(200, i)}" for i in range(4))]
    write({"few.jsonl": jsonl(texts), "enough.jsonl": jsonl([*texts, "text 62"])})
    call(prepare, "enough.jsonl", "--tokenizer", "byte")
    assert decoded("data/enough") == [*texts[1:], "text 62", "text 62"] and "too few" not in capsys.readouterr().err
    call(prepare, "few.jsonl", "--tokenizer", "byte")
    assert "the last 1% of each is held out" in capsys.readouterr().err
    assert [train + val for train, val in zip(decoded("data/few", "train"), decoded("data/few", "val"))] == texts


@pytest.mark.parametrize("offered", ["'my notes' --out 'data/my notes'", "--out my", "'a b.txt' --out 'data/a b'"])
def test_without_a_data_set_a_command_is_offered_that_makes_it(refused, call, monkeypatch, offered):
    monkeypatch.setattr(prepare, "default_corpus", lambda: [Path("a b.txt")])
    write({"my notes/a.txt": words(500), "a b.txt": words(500)})
    *text, _, out = shlex.split(offered)
    assert f"python prepare.py {offered}" in refused(train, "--data", *text or [out])
    call(prepare, *shlex.split(offered), "--tokenizer", "byte")
    prepare.load_dataset(out)


def test_one_process_at_a_time_makes_a_data_set(data, monkeypatch, tmp_path):
    """Others are refused, or wait until it is made or given up. One that comes too late leaves nothing."""
    monkeypatch.chdir(tmp_path)
    text, out, half = str(data.parent / "text.txt"), Path("data/text"), Path("data/text.partial/train-00009.npy")
    late, make = prepare.NewDataset([text], out, "byte", 0.1), partial(prepare.prepare, [text], out, "byte", wait=True)
    waiting = fork(target=make)
    with prepare.unfinished(half.parent, "", wait=False):
        half.write_bytes(b"half")
        waiting.start()
        refused = Ranks(tmp_path, text, *BYTES_AND_TAIL, script=ROOT / "prepare.py").finish(2).stderr
        assert "another process is preparing data/text: wait for its end" in refused
        assert half.exists() and waiting.is_alive()
    waiting.join()
    assert waiting.exitcode == 0 and decoded(out, "train")
    make()  # which finds it
    pytest.raises(SystemExit, late.write, lambda skipped: iter([]))
    assert os.listdir("data") == ["text"]
