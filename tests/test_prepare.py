"""prepare.py: tokenizers, documents and shards."""

import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
import tiktoken_ext.openai_public
from conftest import ROOT, Ranks, words

import prepare

BYTES_AND_TAIL = ["--tokenizer", "byte", "--val_tail", "--val_fraction", 0.2]
TRAINED = prepare.make_tokenizer(
    "bpe:400", prepare.GPT4_PATTERN, prepare.train_bpe(Counter(regex.findall(prepare.GPT4_PATTERN, words(3000))), 399)
)


def decoded(folder: Path, split: str) -> list[str]:
    """The documents of a split, read back through meta.json."""
    meta, shards = prepare.load_dataset(folder)
    ids = np.concatenate([np.empty(0, np.uint16), *shards[split]])
    text = prepare.tokenizer_from_dict(meta["tokenizer"]).decode(ids.tolist())
    return text.split(prepare.END_OF_TEXT)[:-1]


def fuzzed(rng: random.Random) -> str:
    alphabet = [*"abZé中🙂\0\n \t7'_-…\u200d", "\r\n", "  ", "'s"]
    return "".join(rng.choices(alphabet, k=rng.randrange(200))) + chr(rng.randrange(0xE000, 0x10FFFF))


# ---- tokenizers


@pytest.mark.parametrize("tokenizer", [prepare.byte_tokenizer(), TRAINED], ids=lambda t: t.name)
def test_any_text_survives_encoding_and_decoding(tokenizer):
    rng = random.Random(0)
    for _ in range(500):
        text = fuzzed(rng)
        assert tokenizer.decode_bytes(prepare.encode(tokenizer, text).tolist()) == text.encode()


def test_byte_tokens_are_the_bytes():
    text = "naïve\0🙂" * 50
    assert bytes(prepare.encode(prepare.byte_tokenizer(), text).tolist()) == text.encode()


def test_a_tokenizer_survives_json():
    again = prepare.tokenizer_from_dict(json.loads(json.dumps(prepare.tokenizer_to_dict(TRAINED))))
    assert again.encode_ordinary(words(500, seed=9)) == TRAINED.encode_ordinary(words(500, seed=9))
    assert (again.n_vocab, again.eot_token) == (TRAINED.n_vocab, TRAINED.eot_token)


def test_text_cannot_spell_the_control_token():
    for tokenizer in (prepare.byte_tokenizer(), TRAINED):
        assert tokenizer.eot_token not in prepare.encode(tokenizer, f"a{prepare.END_OF_TEXT}b")


def naive_bpe(counts: dict[str, int], vocab_size: int) -> list[bytes]:
    """The definition: count all pairs anew, merge the most frequent, the one of smaller ids among equals."""
    words, tokens = {tuple(w.encode()): n for w, n in counts.items()}, [bytes([b]) for b in range(256)]
    while len(tokens) < vocab_size:
        pairs = Counter()
        for word, n in words.items():
            for pair in pairwise(word):
                pairs[pair] += n
        pair, n = min(pairs.items(), key=lambda item: (-item[1], item[0]), default=(None, 0))
        if n < 2:
            break
        words = {tuple(prepare.merge(list(w), pair, len(tokens))): n for w, n in words.items()}
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
    return tokens


@pytest.mark.parametrize("seed", range(5))
def test_bpe_learns_the_merges_of_a_naive_reference(seed):
    counts = Counter(regex.findall(prepare.GPT4_PATTERN, words(300, seed) + "aaaa aaa abababab" * seed))
    assert list(prepare.train_bpe(counts, 450)) == naive_bpe(counts, 450)


def test_bpe_learns_the_textbook_example():
    """Gage's of 1994. In aaabdaaabac the pair a a is seen four times: aa is token 256. Then a b and aa a are seen twice
    each, and the one with smaller ids comes first: ab is 257. Then aa ab is seen twice: 258. No other pair is."""
    ranks = prepare.train_bpe(Counter({"aaabdaaabac": 1}), 300)
    assert list(ranks)[256:] == [b"aa", b"ab", b"aaab"]
    tokenizer = prepare.make_tokenizer("textbook", prepare.GPT4_PATTERN, ranks)
    assert prepare.encode(tokenizer, "aaabdaaabac").tolist() == [258, ord("d"), 258, ord("a"), ord("c")]


def test_bpe_learns_the_merges_of_a_published_trainer():
    rustbpe = pytest.importorskip("rustbpe", reason="pip install rustbpe to compare with a published trainer")
    texts = [path.read_text(encoding="utf-8") for path in prepare.default_corpus()[:150]]
    published = rustbpe.Tokenizer()
    published.train_from_iterator(iter(texts), 1500, pattern=prepare.GPT4_PATTERN)
    counts = Counter(chunk for text in texts for chunk in regex.findall(prepare.GPT4_PATTERN, text))
    assert list(prepare.train_bpe(counts, 1500)) == [bytes(token) for token, _ in published.get_mergeable_ranks()]


def test_bpe_ends_where_no_pair_is_seen_twice():
    assert list(prepare.train_bpe(Counter({"abc": 1}), 1000)) == list(prepare.BYTES)


@pytest.mark.parametrize("name", ["ours", "gpt2", "cl100k_base", "o200k_base"])
def test_text_cut_into_pieces_gives_the_same_tokens(name, monkeypatch):
    """With each published pattern, and merges learned under it from the same sort of text, so that every chunk is one
    token and a cut inside a chunk shows. (The published merges would need a network.)"""
    monkeypatch.setattr(tiktoken_ext.openai_public, "load_tiktoken_bpe", lambda *a, **k: {})
    monkeypatch.setattr(tiktoken_ext.openai_public, "data_gym_to_mergeable_bpe_ranks", lambda *a, **k: {})
    pattern = prepare.GPT4_PATTERN if name == "ours" else getattr(tiktoken_ext.openai_public, name)()["pat_str"]
    rng = random.Random(0)
    parts = ["the", "model", "it's", "42", "naïve", "__init__", "(x)", "/usr"]
    separators = [" ", "\n", "  ", "\n\n", "_ ", "-\n", "\n/", " '", "é\n", "7 ", "中 "]
    texts = ["".join(rng.choice(parts) + rng.choice(separators) for _ in range(400)) for _ in range(200)]
    ranks = prepare.train_bpe(Counter(chunk for text in texts for chunk in regex.findall(pattern, text)), 1000)
    tokenizer = prepare.make_tokenizer("cut", pattern, ranks)
    monkeypatch.setattr(prepare, "PIECE_BYTES", 500)
    n_cuts = 0
    for text in texts:
        pieces = list(prepare.read_pieces(io.BytesIO(text.encode()), len(text.encode())))
        n_cuts += len(pieces) - 1
        assert "".join(pieces) == text
        assert [i for piece in pieces for i in tokenizer.encode_ordinary(piece)] == tokenizer.encode_ordinary(text)
    assert n_cuts > 500


def test_a_tokenizer_that_cannot_be_fetched_is_one_sentence(refused, monkeypatch, tmp_path):
    def offline(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    (tmp_path / "a.txt").write_text("text")
    message = refused(prepare, "a.txt", "--tokenizer", "gpt2")
    assert "byte" in message and "bpe:N" in message


@pytest.mark.parametrize("name", ["gpt5000", "bpe:", "bpe:x", "bpe:257", "bpe:-1"])
def test_a_tokenizer_that_does_not_exist_is_refused(refused, tmp_path, name):
    (tmp_path / "a.txt").write_text("text")
    assert name in refused(prepare, "a.txt", "--tokenizer", name)


# ---- documents


def test_every_kind_of_file_gives_its_documents(call, tmp_path):
    records = [{"text": f"record {i} {words(20, i)}"} for i in range(40)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "b.txt").write_text("from a folder")
    (tmp_path / "in" / ".hidden").write_text("never read")
    (tmp_path / "in" / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "in" / "c.jsonl.gz", "wt") as file:
        file.write(lines.replace("record", "zipped"))
    call(prepare, "in", "--tokenizer", "byte", "--val_fraction", 0.2)
    texts = [record["text"] for record in records]
    expected = texts + [t.replace("record", "zipped") for t in texts] + ["from a folder"]
    train, val = decoded(Path("data/in"), "train"), decoded(Path("data/in"), "val")
    assert sorted(train + val) == sorted(expected)
    assert len(val) > 0 and train == [text for text in expected if text not in val]


def test_parquet_gives_its_documents(call, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pip install pyarrow to read parquet files")
    parquet = pytest.importorskip("pyarrow.parquet")

    texts = [words(20, i) for i in range(30)]
    parquet.write_table(pyarrow.table({"text": texts, "id": range(30)}), tmp_path / "x.parquet")
    call(prepare, "x.parquet", "--tokenizer", "byte", "--val_fraction", 0.3)
    assert sorted(decoded(Path("data/x"), "train") + decoded(Path("data/x"), "val")) == sorted(texts)


def test_the_split_of_a_document_depends_on_its_text_alone(call, tmp_path):
    texts = [words(10, i) for i in range(60)]
    for name, order in (("a", texts), ("b", texts[::-1] + texts[:5])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in order))
        call(prepare, f"{name}.jsonl", "--tokenizer", "byte", "--val_fraction", 0.2)
    assert set(decoded(Path("data/a"), "val")) == set(decoded(Path("data/b"), "val"))
    assert 4 <= len(decoded(Path("data/a"), "val")) <= 20


@pytest.mark.parametrize("fraction", [0.1, 0.1001, 0.1002, 0.1003])  # cuts in the middle of a character, too
def test_val_tail_holds_out_the_end_of_the_text(call, tmp_path, fraction):
    text = "你好🙂" * 1000
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    call(prepare, "t.txt", "--tokenizer", "byte", "--val_tail", "--val_fraction", fraction)
    (train,), (val,) = decoded(Path("data/t"), "train"), decoded(Path("data/t"), "val")
    assert train + val == text
    assert abs(len(val.encode()) - len(text.encode()) * fraction) < 4


def test_held_out_text_does_not_reach_the_tokenizer(call, tmp_path):
    (tmp_path / "t.txt").write_text(words(2000) + " xyzzy" * 200)
    call(prepare, "t.txt", "--tokenizer", "bpe:500", "--val_tail", "--val_fraction", 0.1)
    meta, _ = prepare.load_dataset("data/t")
    assert not any(b"xyz" in token for token in prepare.tokenizer_from_dict(meta["tokenizer"]).token_byte_values())


def test_files_without_usable_text_are_named_and_left_out(call, capsys, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.jsonl").write_text(
        "".join(json.dumps({"text": words(9, i)}) + "\n" for i in range(30))
        + '{"text": "\\ud800 lone"}\nnot json\n{"body": 1}\n{"text": 5}\n[]\n{"text": ""}\n'
    )
    (tmp_path / "in" / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "in" / "cut.txt").write_bytes("é".encode()[:1])
    (tmp_path / "in" / "empty.txt").write_bytes(b"")
    (tmp_path / "in" / "torn.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000)[:-20])
    call(prepare, "in", "--tokenizer", "byte", "--val_fraction", 0.2)
    printed = capsys.readouterr().err
    for told in (
        "latin.txt: not UTF-8",
        "cut.txt: not UTF-8",
        "empty.txt: empty",
        "without text in --field 'text'; one has the keys body (4)",
        "records that are not valid JSON",
        "torn.jsonl.gz",
    ):
        assert told in printed
    documents = decoded(Path("data/in"), "train") + decoded(Path("data/in"), "val")
    assert set(documents) - {"x"} == {words(9, i) for i in range(30)}


@pytest.mark.parametrize(
    "inputs, content, told",
    [
        (["nowhere.txt"], None, "no such file or folder: nowhere.txt"),
        (["a.txt"], b"", "a.txt: empty"),
        (["a.txt"], b"\xff\xfe", "a.txt: not UTF-8"),
        (["a.txt", "--val_fraction", "1.5"], b"text", "--val_fraction 1.5"),
        (["a.txt", "--out", "."], b"text", "--out ."),
        (["a.txt", "b.txt"], b"text", "raise --val_fraction, or give --val_tail"),
        (["http://127.0.0.1:9/x.txt"], None, "could not fetch"),
    ],
)
def test_input_that_gives_no_data_set_is_refused(refused, tmp_path, inputs, content, told):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
        (tmp_path / "b.txt").write_bytes(content)
    assert told in refused(prepare, *inputs, "--tokenizer", "byte")
    assert not list(tmp_path.glob("data/*/meta.json"))


def test_a_data_set_is_never_overwritten(refused, call, tmp_path):
    (tmp_path / "a.txt").write_text(words(200))
    call(prepare, "a.txt", "--tokenizer", "byte", "--val_fraction", 0.1)
    before = Path("data/a/train-00000.npy").read_bytes()
    assert "data/a already exists" in refused(prepare, "a.txt", "--tokenizer", "byte")
    assert Path("data/a/train-00000.npy").read_bytes() == before


# ---- shards


def test_shards_follow_each_other_and_read_back(call, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SHARD_TOKENS", 1000)
    (tmp_path / "t.txt").write_text(words(2000), encoding="utf-8")
    call(prepare, "t.txt", "--tokenizer", "byte", "--val_fraction", 0.1)
    meta, shards = prepare.load_dataset("data/t")
    assert len(shards["train"]) > 5 and {len(s) for s in shards["train"][:-1]} == {1000}
    assert sum(len(s) for s in shards["train"]) == meta["train"]["tokens"]
    assert "".join(decoded(Path("data/t"), "train") + decoded(Path("data/t"), "val")) == words(2000)
    plain = np.load("data/t/train-00001.npy")  # NumPy's own format: no mapping, no reader of ours
    assert plain.dtype == np.uint16 and np.array_equal(plain, shards["train"][1])


def test_windows_run_through_shards_as_if_they_were_one():
    tokens = np.random.default_rng(0).integers(0, 60_000, 500).astype(np.uint16)
    windows = prepare.Windows(np.split(tokens, [3, 4, 100, 333]), seq_len=7)
    inputs, targets = (taken.flatten() for taken in windows.get(np.arange(windows.n_windows))[:2])
    assert inputs.tolist() == tokens[: len(inputs)].tolist()
    assert targets.tolist() == tokens[1 : len(targets) + 1].tolist()
    assert 500 - len(targets) - 1 < 7


def test_the_last_window_has_its_last_target():
    for n_tokens, n_windows in ((100, 9), (101, 10), (110, 10), (111, 11)):
        windows = prepare.Windows([np.arange(n_tokens, dtype=np.uint16)], seq_len=10)
        assert windows.n_windows == n_windows and windows.get(np.array([n_windows - 1]))[1][0, -1] == 10 * n_windows


def test_a_vocabulary_beyond_16_bits_is_stored_in_32(tmp_path):
    ranks = prepare.BYTES | {i.to_bytes(3, "big"): i for i in range(256, 70_000)}
    tokenizer = prepare.make_tokenizer("wide", prepare.GPT4_PATTERN, ranks)
    pieces = [("train", (69_999).to_bytes(3, "big").decode("latin-1")), ("train", None)]
    splits = prepare.write_shards(tmp_path, tokenizer, pieces, 3)
    tokens = np.load(tmp_path / splits["train"]["shards"][0]["file"])
    assert tokens.dtype == np.uint32 and tokens[-1] == tokenizer.eot_token == 70_000


def test_every_flipped_bit_of_a_shard_is_found(data, tmp_path, capsys):
    for file in data.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = tmp_path / "train-00000.npy"
    whole = shard.read_bytes()
    for offset in random.Random(0).sample(range(len(whole)), 30):
        damaged = bytearray(whole)
        damaged[offset] ^= 1 << offset % 8
        shard.write_bytes(damaged)
        with pytest.raises(SystemExit) as end:
            prepare.load_dataset(tmp_path)
        assert end.value.code == 2 and "SHA-256 of train-00000.npy" in capsys.readouterr().err


def test_a_killed_preparation_leaves_no_data_set_and_can_be_repeated(tmp_path, capsys):
    (tmp_path / "big.txt").write_text(words(1_500_000), encoding="utf-8")
    out = tmp_path / "data" / "big"
    command = [sys.executable, str(ROOT / "prepare.py"), "big.txt", "--tokenizer", "byte", "--val_fraction", "0.1"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    while not list(out.with_name("big.partial").glob("train-*.npy")):
        time.sleep(0.001)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(SystemExit):
        prepare.load_dataset(out)
    assert "meta.json: make the data set" in capsys.readouterr().err and not out.exists()
    subprocess.run(command, cwd=tmp_path, stderr=subprocess.DEVNULL, check=True)
    assert "".join(decoded(out, "train") + decoded(out, "val")) == words(1_500_000)


def test_memory_stays_small_however_large_the_input(tmp_path):
    """Of 100 MB of text, one token a byte: reading it whole would take over 300 MB for text and tokens."""
    megabyte = (words(200_000).encode()[: 10**6]).decode(errors="ignore")
    with open(tmp_path / "big.txt", "w", encoding="utf-8") as file:
        file.writelines(megabyte for _ in range(100))
    measure = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-c", measure, sys.executable, ROOT / "prepare.py", "big.txt", "--tokenizer", "byte"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    peak = int(done.stdout) * (1 if sys.platform == "darwin" else 1024)
    assert os.path.getsize(tmp_path / "big.txt") >= 100_000_000 and peak < 200e6


def test_help_says_what_the_script_does():
    printed = subprocess.run(
        [sys.executable, ROOT / "prepare.py", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "--val_tail" in printed and "meta.json" in printed


def test_the_default_corpus_is_the_standard_library():
    names = [path.as_posix() for path in prepare.default_corpus()]
    assert any(name.endswith("/json/decoder.py") for name in names) and len(names) > 300
    assert not any(f"/{part}/" in name for name in names for part in ("test", "site-packages", "idlelib"))


@pytest.mark.skipif(
    "TIKTOKEN_CACHE_DIR" not in os.environ, reason="set TIKTOKEN_CACHE_DIR to where tiktoken keeps gpt2"
)
def test_gpt2_text_has_the_ids_that_openai_published(call, tmp_path):
    (tmp_path / "t.txt").write_text("Hello world")
    call(prepare, "t.txt", "--tokenizer", "gpt2", "--val_fraction", 0.5)
    _, shards = prepare.load_dataset("data/t")
    assert shards["train"][0].tolist() + shards["val"][0].tolist() == [15496, 50256, 995, 50256]


# ---- what users bring


def test_a_folder_that_is_not_ours_is_refused_and_its_files_stay(refused, tmp_path):
    (tmp_path / "a.txt").write_text(words(100))
    for folder, out in (("photos", "photos"), ("other.partial", "other")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train-images.npy").write_bytes(b"mine")
        assert "choose another --out" in refused(prepare, "a.txt", "--tokenizer", "byte", "--out", out)
        assert (tmp_path / folder / "train-images.npy").read_bytes() == b"mine"


def test_records_are_read_from_the_field_that_is_asked_for(refused, call, tmp_path, capsys):
    texts = [words(9, i) for i in range(30)]
    records = [{"content": text, "id": i} for i, text in enumerate(texts)]
    lines = "\n\n".join(map(json.dumps, records)) + "\n" + "[" * 100_000 + "\n"
    (tmp_path / "a.JSONL").write_text(lines)
    (tmp_path / "b.ndjson").write_text(lines)
    (tmp_path / "c.json").write_text(json.dumps(records))
    for name in ("a.JSONL", "b.ndjson", "c.json"):
        told = refused(prepare, name, "--tokenizer", "byte")
        assert "one has the keys content, id" in told and "--field" in told
        call(prepare, name, "--tokenizer", "byte", "--field", "content", "--val_fraction", 0.2)
        folder = Path("data", name[0])
        assert sorted(decoded(folder, "train") + decoded(folder, "val")) == sorted(texts)
        skipped = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped")]
        assert len(skipped) == (name != "c.json") and not any("(" in line for line in skipped)  # the one nested line


def test_links_are_followed_once_and_what_cannot_be_read_is_named(call, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in" / "a.txt").write_text("first " + words(50))
    (tmp_path / "elsewhere" / "b.txt").write_text("second " + words(50))
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "in" / "fifo")
    call(prepare, "in", "in/a.txt", "--tokenizer", "byte", "--val_tail")
    printed = capsys.readouterr().err
    assert "a.txt: given twice" in printed
    assert "dangling: not a regular file" in printed and "fifo: not a regular file" in printed
    assert [text.split()[0] for text in decoded(Path("data/in"), "train")] == ["first", "second"]


def test_the_current_folder_gives_the_data_set_its_name(call, tmp_path):
    (tmp_path / "a.txt").write_text(words(100))
    call(prepare, ".", "--tokenizer", "byte", "--val_tail")
    assert (tmp_path / "data" / tmp_path.name / "meta.json").exists()


def test_a_pipe_is_read_as_a_file_is(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    os.mkfifo(tmp_path / "fifo")
    process = Ranks(tmp_path, "-", "fifo", "b.txt", *BYTES_AND_TAIL, script=ROOT / "prepare.py", stdin="first")
    (tmp_path / "fifo").write_text("piped")
    process.finish()
    folder = tmp_path / "data" / "pipe"
    texts = [a + b for a, b in zip(decoded(folder, "train"), decoded(folder, "val"))]
    assert texts == ["first", "piped", "second"]


def test_long_chunks_are_cut_before_a_tokenizer_learns_from_them(monkeypatch):
    """Otherwise a genome in one line takes time that grows with the square of its length."""
    seen = Counter()
    monkeypatch.setattr(prepare, "train_bpe", lambda counts, size: seen.update(counts) or dict(prepare.BYTES))
    prepare.train_tokenizer(300, [("train", "ACGT" * 10_000 + " the end")], 40_000)
    assert max(map(len, seen)) <= prepare.MAX_CHUNK and seen["ACGT" * (prepare.MAX_CHUNK // 4)] > 100
    assert sum(len(chunk) * count for chunk, count in seen.items()) == 40_008


def test_a_file_has_its_name_only_when_it_is_complete(tmp_path):
    with prepare.written_whole(tmp_path / "a") as file:
        file.write(b"half")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_bytes() == b"half"
