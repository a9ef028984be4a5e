"""sample.py: from a checkpoint to characters on a terminal."""

import io
import itertools
import os
import random
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterable
from shlex import split
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, TINY

import chat
import prepare
import published
import sample
import train
from tokenizer import byte_tokenizer

BYTE = byte_tokenizer()


def fed(ids: Iterable[int], stop: str | None = None) -> list[str]:
    """What a decoder gives out after each token, and at the end. Tokens below 256 are bytes."""
    decoder, out = sample.Decoder(BYTE, stop), []
    for token in ids:
        out.append(decoder.feed(token))
        if decoder.ended:
            return out
    return [*out, decoder.finish()]


@pytest.mark.parametrize("ids, stop, pieces", [
    ("aé你🙂!".encode(), None, ["a", "", "é", "", "", "你", "", "", "", "🙂", "!", ""]),
    (b"a\xff\xf0\x9fb", None, ["a", "\ufffd", "", "", "\ufffdb", ""]),
    (b"abc--d", "---", ["a", "b", "c", "", "", "--d", ""]), ([ord("a"), BYTE.end_of_text, ord("b")], None, ["a", ""]),
], ids=["whole characters", "no text", "not the stop text", "end of text"])
def test_text_is_streamed_as_soon_as_it_is_certain(ids, stop, pieces):
    """Bytes that are no text are marked and not fatal."""
    assert fed(ids, stop) == pieces


def test_text_ends_before_the_stop_text_and_never_shows_a_part_of_it():
    rng = random.Random(0)
    for _ in range(2000):
        text, stop = "".join(rng.choices("aab\nä", k=12)), "".join(rng.choices("aab\nä", k=rng.randrange(1, 4)))
        assert "".join(fed(text.encode(), stop)) == text.split(stop)[0]


def test_a_seed_repeats_a_draw_and_greedy_text_is_the_same_in_a_batch_and_alone(call, run, capsys):
    """Text of the likeliest token alone is greedy, too."""
    texts = []
    hows = "--seed 1", "--seed 1", "--seed 2", "--temperature 0", "--top_k 1", "--top_p 1e-9", "--temperature 0 --n 1"
    for how in hows:
        call(sample, run, "--n", 3, "--prompt", "the small", "--tokens", 40, *how.split())  # beyond the context of 16
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert len({text.partition("\n")[2] for text in texts[0].split("--- ")[1:]}) == 3
    assert texts[3] == texts[4] == texts[5] == "".join(f"--- {i} of 3\n{texts[6]}" for i in (1, 2, 3))
    assert texts[6].startswith("the small") and len(texts[6]) > 20


TEXT, QUESTION = [256, *b"a b"], [257, *b"user\na b", 258, *b"\n", 257, *b"assistant\n"]


@pytest.mark.parametrize("script, way, ids, shown, temperature, n_tokens", [
    (sample, ["--prompt=a b"], TEXT, "a b", 0.8, 200), (sample, ["--interactive"], TEXT, "a b", 0.8, 200),
    (chat, [], QUESTION, "", 0.0, 64 - len(QUESTION)),  # an answer ends with the context
])
def test_every_flag_and_every_default_arrives_where_tokens_are_drawn(
    call, data, monkeypatch, capsys, script, way, ids, shown, temperature, n_tokens
):
    """Here they are digits in turn. The model has 41 ids more than the tokenizer."""
    call(train, *TINY, *split("--vocab_size 300 --seq_len 64 --batch_tokens 256 --steps 1 --out r --data"), data)
    arrived = []

    def digits(model, tokens, n_vocab, generator, cache=None, **options):
        arrived.append((type(model.head).__name__, tokens.tolist(), n_vocab, options, generator.initial_seed()))
        yield from (torch.tensor([ord("0") + i % 10]) for i in itertools.count())

    monkeypatch.setattr(sample, "generate", digits)
    flags = "--temperature 0.7 --top_k 299 --top_p 0.99 --tokens 9 --stop 67 --seed 5 --int8 --device cpu"
    given = {"temperature": 0.7, "top_k": 299, "top_p": 0.99, "n_tokens": 9}
    default = {"temperature": temperature, "top_k": None, "top_p": None, "n_tokens": n_tokens}
    counted = ("0123456789" * 20)[:n_tokens]
    for more, head, options, told in (flags, "Int8Linear", given, "012345"), ("", "Linear", default, counted):
        monkeypatch.setattr("sys.stdin", io.StringIO("a b\n\n"))
        capsys.readouterr()
        call(script, "r", *way, *split(more))
        *found, seed = arrived.pop()
        assert found == [head, [ids], 259, options] and (seed == 5) == (more == flags)
        assert capsys.readouterr().out == f"{shown}{told}\n"


def test_the_newest_run_and_the_best_checkpoint_can_be_named(call, run, capsys):
    (run.parent / "runs").mkdir()
    run.rename(run.parent / "runs" / "mine")
    call(sample, "--tokens", 3)
    assert "runs/mine/step-00000020.json" in capsys.readouterr().err
    for named in ("best.json", "step-00000015.pt", "step-00000015.json"):
        call(sample, f"runs/mine/{named}", "--tokens", 3)
    assert "step-00000015.json" in capsys.readouterr().err


def test_interactive_answers_each_line_of_a_pipe_that_is_not_blank_in_any_encoding(call, run, monkeypatch, capfd):
    """Ctrl-C ends a text alone, and closed streams end nothing."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the \n\ncaf\xe9 \nexit\n"), encoding="utf-8"))
    call(sample, run, "--interactive", "--tokens", 5)
    assert re.match("(?s)the .*\ncaf\ufffd .*\nexit", capfd.readouterr().out)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n \n\ntwo\n"))
    monkeypatch.setattr(sample, "continuations", Mock(side_effect=KeyboardInterrupt))
    call(sample, run, "--interactive")
    assert sample.continuations.call_count == 2
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "stdout", None)
    call(sample, run, "--interactive")


@pytest.mark.parametrize("how", ["without readline", "dumb", "xterm"])
def test_on_a_terminal_a_paste_is_one_text_and_exit_ends(how):
    """Be the lines edited by readline, and the paste marked by the terminal (xterm) or not. Ctrl-C gives up a line."""
    code = "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    code += "sys.modules['readline'] = None\n" if how == "without readline" else ""
    code += "import sample\nfor text in sample.typed(): print('<', repr(text), '>')"
    terminal, child = os.openpty()
    streams, env = dict.fromkeys(("stdin", "stdout", "stderr"), child), {**os.environ, "TERM": how}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, start_new_session=True, **streams)
    os.close(child)
    paste = b"\033[200~one\n\ntwo\033[201~\r" if how == "xterm" else b"one\n\ntwo\n"
    shown, end = b"", time.monotonic() + 60
    try:
        for typed in (paste, b"give up\3", b"again\n", b"exit\n"):
            while not shown.endswith(b"> "):
                if select.select([terminal], [], [], 1)[0]:
                    shown += os.read(terminal, 1000)
                elif shown.endswith((b"\3", b"^C")):  # which came before the program waited for it
                    os.write(terminal, b"\3")
                assert time.monotonic() < end, shown
            shown += typed
            os.write(terminal, typed)
        assert process.wait(30) == 0
    finally:
        process.kill()
        os.close(terminal)
    assert re.findall("< (.*?) >", shown.decode()) == [repr("one\n\ntwo"), "'again'"]


def test_text_is_written_in_utf8_on_any_platform(run, tmp_path):
    """Here U+FFFD, in place of random bytes that are none."""
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, ROOT / "sample.py", run, *"--tokens 50 --temperature 1000 --seed 1".split()]
    done = subprocess.run(command, cwd=tmp_path, env=ascii_only, capture_output=True, check=True)
    assert "\ufffd" in done.stdout.decode()


WRONG = ["--n 0", "--tokens -1", "--temperature -1.0", "--temperature nan", "--temperature 1e-40", f"--seed {10**23}"]
WRONG += ["--top_k 0", "--top_p 1.5", "--device nowhere"]


@pytest.mark.parametrize("arguments, told", [
    *((f"run {wrong}", wrong) for wrong in WRONG), ("run --prompt \ud800", "not UTF-8"), ("", "python train.py"),
    ("nowhere", "no file or folder nowhere"), ("x" * 300, "File name too long"),
])
def test_bad_input_is_one_sentence(refused, run, arguments, told):
    assert told in refused(sample, *split(arguments))


@pytest.mark.parametrize("folder, told", [("x" * 300, "too long"), ("file/x", "Not a directory"), ("full", "no space")])
def test_an_export_that_cannot_be_written_is_one_sentence(refused, run, monkeypatch, tmp_path, folder, told):
    safetensors = pytest.importorskip("safetensors")
    (tmp_path / "file").write_text("")
    error = safetensors.SafetensorError("no space")
    monkeypatch.setattr("safetensors.torch.save_file", Mock(side_effect=error))
    assert told in refused(published, "--export", folder, run)


@pytest.mark.parametrize("script, flag", [(sample, "--int8"), (chat, "--int8"), (prepare, "--val_tail")])
def test_help_says_what_the_script_does(call, capsys, script, flag):
    with pytest.raises(SystemExit):
        call(script, "--help")
    assert script.__doc__.strip().splitlines()[-1] in (printed := capsys.readouterr().out) and flag in printed
