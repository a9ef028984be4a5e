"""sample.py: from a checkpoint to characters on a terminal."""

import io
import os
import random
import subprocess
import sys

import pytest
from conftest import ROOT, shell

import prepare
import sample
from published import load_model

BYTE = prepare.byte_tokenizer()


def fed(text: bytes, stop: str | None = None) -> list[str]:
    """What a decoder gives out, a byte at a time, as a byte-level model would write it."""
    decoder, out = sample.Decoder(BYTE, stop), []
    for byte in text:
        out.append(decoder.feed(byte))
        if decoder.ended:
            return out
    return [*out, decoder.finish()]


def test_characters_are_streamed_whole():
    text = "naïve 你好 🙂!"
    out = fed(text.encode())
    assert "".join(out) == text
    assert [piece for piece in out if piece] == list(text)


def test_bytes_that_are_no_text_are_marked_and_not_fatal():
    assert "".join(fed(b"a\xff\xf0\x9fb")) == b"a\xff\xf0\x9fb".decode(errors="replace")


def test_text_ends_before_the_stop_text_and_never_shows_a_part_of_it():
    rng = random.Random(0)
    for _ in range(2000):
        text, stop = "".join(rng.choices("aab\nä", k=12)), "".join(rng.choices("aab\nä", k=rng.randrange(1, 4)))
        assert "".join(fed(text.encode(), stop)) == text.split(stop)[0]


def test_text_streams_while_nothing_of_it_could_be_the_stop_text():
    assert fed(b"abc--d", "---") == ["a", "b", "c", "", "", "--d", ""]


def test_text_ends_at_end_of_text():
    decoder = sample.Decoder(BYTE, None)
    assert [decoder.feed(ord("a")), decoder.feed(BYTE.eot_token)] == ["a", ""] and decoder.ended


def test_greedy_text_repeats_and_begins_with_the_prompt(call, run, capsys):
    texts = []
    for _ in range(2):
        capsys.readouterr()
        call(sample, run, "--prompt", "the small", "--temperature", 0, "--tokens", 40)  # context 16: the window slides
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("the small") and len(texts[0]) > 20


def test_a_seed_repeats_a_draw_and_another_seed_does_not(call, run, capsys):
    texts = []
    for seed in (1, 1, 2):
        capsys.readouterr()
        call(sample, run, "--seed", seed, "--n", 3, "--tokens", 40)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert len({text.partition("\n")[2] for text in texts[0].split("--- ")[1:]}) == 3


def test_continuations_in_a_batch_are_those_of_a_model_alone(run):
    """Greedy, so that all three are the one that a batch of one gives."""
    model, tokenizer, _ = load_model(run)
    model.eval()
    texts = {}
    for n in (1, 3):
        steps = sample.continuations(model, tokenizer, [tokenizer.eot_token, *b"one "], n, 30, temperature=0.0)
        texts[n] = ["".join(parts) for parts in zip(*steps)]
    assert texts[3] == texts[1] * 3


def test_the_newest_run_and_the_best_checkpoint_can_be_named(call, run, capsys, monkeypatch):
    run.rename(run.parent / "moved")
    (run.parent / "runs").mkdir()
    (run.parent / "moved").rename(run.parent / "runs" / "mine")
    call(sample, "--tokens", 3)
    assert "runs/mine/step-00000020.json" in capsys.readouterr().err
    for named in ("best.json", "step-00000015.pt", "step-00000015.json"):
        call(sample, f"runs/mine/{named}", "--tokens", 3)
    assert "step-00000015.json" in capsys.readouterr().err


def test_interactive_answers_each_prompt_until_an_empty_line(run):
    printed = shell("sample.py", run, "--interactive", "--tokens", 5, cwd=run, stdin="the \none \n\nnever\n").stdout
    assert "the " in printed and "one " in printed and "never" not in printed


def test_a_prompt_file_is_read_as_utf8_on_any_platform(run, tmp_path):
    (tmp_path / "p.txt").write_bytes("café ".encode())
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, ROOT / "sample.py", run, "--prompt_file", "p.txt", "--tokens", "3"]
    done = subprocess.run(command, cwd=tmp_path, env=ascii_only, capture_output=True, check=True)
    assert done.stdout.decode().startswith("café ")


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["nowhere"], "no checkpoint in nowhere"),
        (["--n", 0], "--n 0"),
        (["--tokens", -1], "--tokens -1"),
        (["--temperature", -1], "--temperature -1.0"),
        (["--temperature", "nan"], "--temperature nan"),
        (["--temperature", "1e-40"], "--temperature 1e-40"),
        (["--seed", 10**23], f"--seed {10**23}"),
        (["--top_k", 0], "--top_k 0"),
        (["--top_p", 1.5], "--top_p 1.5"),
        (["--prompt_file", "nowhere.txt"], "nowhere.txt"),
        (["--prompt", "\ud800"], "not UTF-8"),
    ],
)
def test_bad_input_is_one_sentence(refused, run, arguments, told):
    if arguments != ["nowhere"]:
        arguments = [run, *arguments]
    assert told in refused(sample, *arguments)


def test_without_any_run_it_says_how_to_make_one(refused):
    assert "python train.py" in refused(sample)


def test_a_prompt_in_another_encoding_and_closed_streams_end_nothing(call, run, monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9 \n\n"), encoding="utf-8"))
    call(sample, run, "--interactive", "--tokens", 5)
    assert "caf\ufffd " in capfd.readouterr().out
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(EOFError):  # at which the script ends
        call(sample, run, "--interactive")


def test_help_says_what_the_script_does_without_loading_torch():
    code = "import sys, sample; sys.argv[1:] = ['--help']\ntry: sample.main()\nfinally: print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "--interactive" in printed and printed.endswith("False\n")
