"""tokenizer.py: text to ids and back, against other trainers and other encoders."""

import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import regex
import tiktoken
from conftest import words

import model as models
import prepare
import published
import sample
import train
from tokenizer import BYTES, CHAT_TOKENS, END_OF_TEXT, GPT2_PATTERN, GPT4_PATTERN, MAX_CHUNK, Part, Template, Tokenizer
from tokenizer import byte_tokenizer, load_tokenizer, merge, named_tokenizer, to_tokenizer_json, train_bpe

CUTS = "12345678 " * 99 + "end \n\n\n  \n" * 99
LEARNED = Counter(regex.findall(GPT4_PATTERN, words(3000))) + Counter(["12345678", " \n\n\n  \n"] * 99)
TRAINED = Tokenizer("bpe:400", GPT4_PATTERN, train_bpe(LEARNED, 399))
TEXTBOOK = Tokenizer("textbook", GPT4_PATTERN, train_bpe(Counter({"aaabdaaabac": 1}), 300))
NORMALIZER, MERGES = '"normalizer": {"type": "%s"}, "version"', '"a a", "a b"'
OF_MODELS = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
TEXT = Path(models.__file__).read_text() + " naïve 你好🙂🙂 don't I'LL  12345678 \n\n\t x'7 8  9 x'\n "
SWITCHES = ("lstrip", "rstrip", "single_word", "invert", "use_regex", "add_prefix_space")


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), TRAINED], ids=lambda t: t.name)
def test_any_text_survives_encoding_and_decoding(tokenizer):
    """So does the tokenizer as JSON. No text can spell the control token. Byte tokens are the bytes."""
    again = Tokenizer.from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert (again, again.n_vocab, again.end_of_text) == (tokenizer, tokenizer.n_vocab, tokenizer.end_of_text)
    alphabet, rng = [*"abZé中🙂\0\n \t7'_-…\u200d", "\r\n", "  ", "'s", END_OF_TEXT], random.Random(0)
    for _ in range(500):
        text = "".join(rng.choices(alphabet, k=rng.randrange(200))) + chr(rng.randrange(0xE000, 0x10FFFF))
        ids = tokenizer.encode(text).tolist()
        assert b"".join(map(tokenizer.bytes_of, ids)) == text.encode() and again.encode(text).tolist() == ids
        assert tokenizer.end_of_text not in ids and (tokenizer is TRAINED or bytes(ids) == text.encode())


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
        words = {tuple(merge(list(w), pair, len(tokens))): n for w, n in words.items()}
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
    return tokens


@pytest.mark.parametrize("seed", range(5))
def test_bpe_learns_the_merges_of_a_naive_reference(seed):
    counts = Counter(regex.findall(GPT4_PATTERN, words(300, seed) + "aaaa aaa abababab" * seed))
    assert list(train_bpe(counts, 450)) == naive_bpe(counts, 450)


def test_bpe_learns_the_textbook_example():
    """Gage's of 1994. In aaabdaaabac the pair a a is seen four times: aa is token 256. Then a b and aa a are seen twice
    each, and the one with smaller ids comes first: ab is 257. Then aa ab is seen twice: 258. No other pair is."""
    assert list(TEXTBOOK.ranks)[256:] == [b"aa", b"ab", b"aaab"]
    assert TEXTBOOK.encode("aaabdaaabac").tolist() == [258, ord("d"), 258, ord("a"), ord("c")]


def test_bpe_learns_the_merges_of_a_published_trainer():
    rustbpe = pytest.importorskip("rustbpe", reason="pip install rustbpe to compare with a published trainer")
    texts = [path.read_text(encoding="utf-8") for path in prepare.default_corpus()[:25]]
    published = rustbpe.Tokenizer()
    published.train_from_iterator(iter(texts), 1500, pattern=GPT4_PATTERN)
    counts = Counter(chunk for text in texts for chunk in regex.findall(GPT4_PATTERN, text))
    assert list(train_bpe(counts, 1500)) == [bytes(token) for token, _ in published.get_mergeable_ranks()]


@pytest.mark.parametrize("name", ["gpt5000", "bpe:", "bpe:x", "bpe:259", "bpe:-1", "gpt2"])
def test_a_tokenizer_that_does_not_exist_or_cannot_be_fetched_is_refused(refused, monkeypatch, tmp_path, name):
    monkeypatch.setattr(tiktoken, "get_encoding", Mock(side_effect=ConnectionError("no network")))
    (tmp_path / "a.txt").write_text("text")
    told = refused(prepare, "a.txt", "--tokenizer", name)
    assert ("could not download" in told) == (name == "gpt2") and repr(name) in told and "bpe:N" in told


def test_long_chunks_are_cut_before_a_tokenizer_learns_from_them(monkeypatch):
    """Otherwise a genome in one line takes time that grows with the square of its length. (And of a large input it
    learns from a sample, here from every second piece, and never from text that is held out.)"""
    seen, texts = Counter(), ["ACGT" * 10_000, " not this", " the end", " nor this", " held out"]
    monkeypatch.setattr(prepare, "BPE_SAMPLE_BYTES", 20_000)
    monkeypatch.setattr("tokenizer.train_bpe", lambda counts, size, progress: seen.update(counts) or dict(BYTES))
    pieces = [(split, [Part(text)], True) for split, text in zip(["train"] * 4 + ["val"], texts)]
    prepare.tokenizer_for(pieces, 300, 40_000)
    assert max(map(len, seen)) <= MAX_CHUNK and seen["ACGT" * (MAX_CHUNK // 4)] > 100
    assert sum(len(chunk) * count for chunk, count in seen.items()) == 40_008


def test_tokenizers_are_equal_that_give_equal_ids_and_one_extends_another_with_more_control_tokens():
    def like_trained(pattern=GPT4_PATTERN, ranks=TRAINED.ranks, special=TRAINED.special) -> Tokenizer:
        return Tokenizer("other name", pattern, ranks, special)

    fewer = like_trained(special={END_OF_TEXT: TRAINED.end_of_text})
    assert TRAINED.extends(fewer) and not fewer.extends(TRAINED) and TRAINED != fewer
    for more in {"added": {"<think>": 402}}, {"begin": TRAINED.n_vocab - 1}, {"template": Template("", "x")}:
        other = Tokenizer(TRAINED.name, GPT4_PATTERN, TRAINED.ranks, TRAINED.special, **more)
        assert not other.extends(TRAINED) and not TRAINED.extends(other)
        assert Tokenizer.from_dict(json.loads(json.dumps(other.to_dict()))) == other
    assert TRAINED == like_trained() == like_trained(f"(?:{GPT4_PATTERN})") != like_trained(GPT2_PATTERN)
    swapped = dict(zip(TRAINED.special, reversed(TRAINED.special.values())))
    other = {**TRAINED.ranks, b"zqx": TRAINED.ranks[(last := max(TRAINED.ranks, key=TRAINED.ranks.get))]}
    del other[last]
    assert not TRAINED.extends(like_trained(ranks=other))
    assert not TRAINED.extends(like_trained(special=swapped)) and not TRAINED.extends(byte_tokenizer())


def test_a_run_lends_its_tokenizer_without_its_checkpoints(run):
    for path in run.glob("step-*"):
        path.unlink()
    lent = named_tokenizer(str(run))
    assert lent == byte_tokenizer() and set(CHAT_TOKENS) < set(lent.special)
    (run / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="it holds neither tokenizer.json nor a checkpoint"):
        named_tokenizer(str(run))


def theirs_in(folder: Path):
    """What Hugging Face's tokenizers make of tokenizer.json."""
    return pytest.importorskip("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_a_tokenizer_json_holds_the_tokenizer_of_gpt2(tmp_path):
    """Written by us, read by Hugging Face's tokenizers and by us, against tiktoken."""
    try:
        encoding = named_tokenizer("gpt2")
    except ValueError:
        pytest.skip("tiktoken has not fetched it here")
    assert [*encoding.encode("Hello world"), encoding.end_of_text] == [15496, 995, 50256]  # as OpenAI published
    published.save_published_tokenizer(tmp_path, encoding)
    ids, read = encoding.encode(TEXT).tolist(), load_tokenizer(tmp_path)
    assert (read.encode(TEXT).tolist(), read.end_of_text) == (ids, 50256)
    assert theirs_in(tmp_path).encode(TEXT).ids == [50256, *ids]  # as sample.py begins a text


@pytest.mark.parametrize("digits", [False, True])
def test_tokenizers_of_hugging_face_are_read(refused, tmp_path, digits):
    """As for GPT-2: ByteLevel itself knows how to cut text. As SmolLM2's: each digit on its own, and no token for some
    control characters."""
    tokenizers = pytest.importorskip("tokenizers")
    steps = tokenizers.pre_tokenizers
    theirs, byte_level = tokenizers.Tokenizer(tokenizers.models.BPE()), steps.ByteLevel(add_prefix_space=False)
    theirs.pre_tokenizer = steps.Sequence([steps.Digits(True), byte_level]) if digits else byte_level
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=700, special_tokens=["<|endoftext|>"], show_progress=False)
    theirs.train_from_iterator([TEXT], trainer)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    for start in ("", "a\x04b \x1d", "\x04"):
        assert ours.encode(start + TEXT).tolist() == theirs.encode(start + TEXT).ids
    plain = (tmp_path / "tokenizer.json").read_text()
    for name in ("individual_digits", "use_regex") if digits else ():
        (tmp_path / "tokenizer.json").write_text(plain.replace(f'"{name}": true', f'"{name}": false'))
        assert f'"{name}": false' in refused(prepare, "--tokenizer", tmp_path)


@pytest.mark.parametrize("place", [0, 300, 399], ids=["first", "in the middle", "last"])
def test_control_tokens_keep_their_ids_wherever_they_stand_in_the_vocabulary(tmp_path, place):
    """So do tokens that are found in any text, the longest first, and the one that begins a text. Numbers are cut as
    here, although {1,3}+ has another meaning in the regular expressions there."""
    ranks = {token: rank + 5 * (rank >= place) for token, rank in TRAINED.ranks.items()}
    special = {token: place + i for i, token in enumerate(TRAINED.special)}
    added = {"<think>": place + 3, "<think>the": place + 4}
    ours = Tokenizer("moved", GPT4_PATTERN, ranks, special, added=added, begin=place + 1)
    text, plain = "<|im_start|>user\nthe small<|im_end|>\n<|endoftext|>model", to_tokenizer_json(ours, begin=True)
    begins = plain["post_processor"]
    as_llama3 = {"type": "Sequence", "processors": [plain["decoder"], begins]}  # since its authors mended it
    for begin, steps in ([], None), ([ours.begin], begins), ([ours.begin], as_llama3):
        (tmp_path / "tokenizer.json").write_text(json.dumps(plain | {"post_processor": steps}))
        theirs = theirs_in(tmp_path)
        assert theirs.encode(text).ids == begin + ours.encode(text, control=True).tolist()
        for found in ("the <think> small<think>the 12 <thin", "<think>", CUTS):
            assert theirs.encode(found).ids == begin + ours.encode(found).tolist()
        assert (load_tokenizer(tmp_path) == ours) == bool(begin)
    assert not {*ours.special.values()} & {*ours.encode(text).tolist()}


def test_each_document_begins_with_the_token_that_begins_a_text(call, monkeypatch, tmp_path):
    """As a prompt does. A document mask counts it to the document."""
    special = {token: 256 + i for i, token in enumerate((END_OF_TEXT, "<|end_of_text|>", "<|begin_of_text|>"))}
    del special[END_OF_TEXT]
    published.save_published_tokenizer(tmp_path, Tokenizer("x", byte_tokenizer().pattern, BYTES, special, begin=258))
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["bos_token"] == "<|begin_of_text|>"
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": f"<think>{i}"}) for i in range(40)))
    call(prepare, "t.jsonl", "--tokenizer", tmp_path, "--out", "set", "--val_fraction", 0.3)
    meta, shards = prepare.load_dataset("set")
    tokenizer, tokens = Tokenizer.from_dict(meta["tokenizer"]), np.concatenate(shards["train"])
    documents = tokenizer.decode(tokens).split("<|end_of_text|><|begin_of_text|>")
    assert {f"<think>{i}" for i in range(40)} > {*documents[:-1]} and len(documents) > 20 and not documents[-1]
    assert train.windows_of("train", shards, train.Config(document_mask=True), tokenizer, False).separator == 258
    prompts = Mock(return_value=[])
    monkeypatch.setattr(sample, "continuations", prompts)
    sample.write(None, tokenizer, "a", SimpleNamespace(n=2, tokens=1, stop=None))
    sample.sample(Mock(), tokenizer, 0)
    assert [call.args[2] for call in prompts.call_args_list] == [[258, ord("a")], [258]]


def textbook(folder: Path, old: str, new: str) -> None:
    """Write the tokenizer of the textbook's example, with a change in tokenizer.json."""
    published.save_published_tokenizer(folder, TEXTBOOK)
    plain = json.dumps(json.loads((folder / "tokenizer.json").read_text()))
    assert old in plain
    (folder / "tokenizer.json").write_text(plain.replace(old, new))


@pytest.mark.parametrize("old, new", [
    ('"version"', NORMALIZER % "NFC"), ("<|endoftext|>", "<|end_of_text|>"),
    (f'{MERGES}, "aa ab"', '["a", "a"], ["a", "b"], ["aa", "ab"]'),
    ('"<|im_end|>", "special": true', '"<|im_end|>", "special": false'),  # no text may inject it, all the same
    ('"a a", ', ""), ('"a b", ', ""), (', "aa ab"', ""),
])
def test_a_tokenizer_json_can_be_written_in_several_ways(tmp_path, old, new):
    """Without one of its merges, too: a token that no merge leads to is not produced."""
    textbook(tmp_path, old, new)
    read, theirs = load_tokenizer(tmp_path), theirs_in(tmp_path)
    for text in ("aaabdaaabac", "aaab", "aa", "ab aab"):
        assert read.encode(text).tolist() == theirs.encode(text, add_special_tokens=False).ids
    assert read.end_of_text == 259 and not read.added and read.template


@pytest.mark.parametrize("old, new, told", [
    *(('"BPE"', f'"BPE", "{name}": 1', f"{name} 1 is not supported (model)") for name in OF_MODELS),
    *((f'"{name}": false', f'"{name}": true', name) for name in SWITCHES),
    *(('"Isolated"', f'"{name}"', name) for name in ("Removed", "MergedWithPrevious", "Contiguous")),
    ('"Split"', '"Punctuation"', '"Punctuation"'), ('"Regex"', '"String"', '"String"'),
    ('"BPE"', '"WordPiece"', "not byte-level BPE"),
    ('"pre_tokenizer"', '"pre_tokenizer": null, "x"', "not byte-level BPE"),
    ('"pre_tokenizer"', '"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": true}, "x"', "pre-tokenizer"),
    ('"version"', NORMALIZER % "Lowercase", "the normalizer Lowercase is not supported"),
    ("<|endoftext|>", "<|end|>", "no token that marks the end of a document"),
    (MERGES, '"a b", "a a"', "its merges are not in the order of their ids"),
    (f'"merges": [{MERGES}', '"ignore_merges": true, "merges": ["a b"', "ignore_merges is not supported where"),
    ('"single": [', '"single": [{"Sequence": {"id": "A", "type_id": 0}}, ', "the post-processor"),
])
def test_what_would_change_ids_in_a_tokenizer_json_is_refused_by_name(refused, tmp_path, old, new, told):
    textbook(tmp_path, old, new)
    (tmp_path / "a.txt").write_text("text")
    assert told in refused(prepare, "a.txt", "--tokenizer", tmp_path)
