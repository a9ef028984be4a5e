"""Generate text with a trained model.

    python sample.py                                         continue an empty document with the newest run
    python sample.py runs/toy-1 --prompt 'def' --n 3         three continuations of a prompt, by a run
    python sample.py runs/toy-1/best.json --temperature 0    the most likely token each time: always the same text
    python sample.py downloads/Qwen3-0.6B --prompt 'Once '   a published model, in Hugging Face's layout
    python sample.py --interactive                           ask for one prompt after another, until Ctrl-D
    python chat.py                                           talk to a model that was trained on conversations

Generation stops after --tokens tokens, before the --stop text, or when the model ends the document. When the text
outgrows the model's context, the model goes on from the newest half of it.
"""

import argparse
import codecs
import gc
import select
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

import torch

from checkpoint import newest_run
from model import GPT, choose_device, generate, has_bfloat16, to_int8
from prepare import exit_on, fail, moved, tolerate_streams
from published import Loaded, load_model
from tokenizer import Tokenizer


def continuations(
    model: GPT, tokenizer: Tokenizer, ids: list[int], n: int, n_tokens: int, stop: str | None = None, **options
) -> Iterator[list[str]]:
    """Yield the new text of each of n continuations of `ids`, one step at a time, until all have ended or n_tokens are
    reached. `options` go to model.generate."""
    tokens = torch.tensor([ids] * n, device=model.embedding.weight.device)
    decoders = [Decoder(tokenizer, stop) for _ in range(n)]
    steps = generate(model, tokens, n_vocab=tokenizer.n_vocab, n_tokens=n_tokens, **options)
    for new in islice(steps, n_tokens):
        yield ["" if d.ended else d.feed(token) for d, token in zip(decoders, new.tolist())]
        if all(d.ended for d in decoders):
            return
    yield ["" if d.ended else d.finish() for d in decoders]


class Decoder:
    """Turns a stream of tokens into text. A character is returned once its last byte has arrived, and text that could
    be the beginning of the stop text is held back until that is decided."""

    def __init__(self, tokenizer: Tokenizer, stop: str | None):
        self.tokenizer, self.stop = tokenizer, stop
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held = ""
        self.ended = False

    def feed(self, token: int) -> str:
        """The text that is final after `token`. Sets `ended` at a token that ends the text, or at the stop text."""
        if token in self.tokenizer.ends:
            return self.finish()
        text = self.held + self.utf8.decode(self.tokenizer.bytes_of(token))
        if not self.stop:
            return text
        final, found, _ = text.partition(self.stop)
        if found:
            self.ended = True
            return final
        overlap = max(n for n in range(len(self.stop)) if text.endswith(self.stop[:n]))  # 0 always qualifies
        final, self.held = text[: len(text) - overlap], text[len(text) - overlap :]
        return final

    def finish(self) -> str:
        """The text held back so far, when no more tokens follow."""
        self.ended = True
        return self.held + self.utf8.decode(b"", final=True)


def sample(model: GPT, tokenizer: Tokenizer, seed: int) -> str:
    """200 tokens that the model writes into an empty document, for the end of a training run."""
    torch.manual_seed(seed)
    steps = continuations(model.eval(), tokenizer, [tokenizer.begin], 1, 200, temperature=0.8)
    return "".join(text for (text,) in steps)


def write(model: GPT, tokenizer: Tokenizer, prompt: str, args: argparse.Namespace, **options) -> None:
    """Print one continuation as it is generated, or several one after the other when all are complete."""
    try:
        ids = [tokenizer.begin, *tokenizer.encode(prompt).tolist()]
    except UnicodeEncodeError:
        fail("the prompt is not UTF-8 text")
    steps = continuations(model, tokenizer, ids, args.n, args.tokens, args.stop, **options)
    if args.n == 1:
        print(prompt, end="", flush=True)
        for (new,) in steps:
            print(new, end="", flush=True)
        print()
    else:
        for i, parts in enumerate(zip(*steps)):
            print(f"--- {i + 1} of {args.n}\n{prompt}{''.join(parts)}")


# ---------------------------------------------------------------------------------------------------------------------
# Terminal and command line, shared with chat.py


def typed() -> Iterator[str]:
    """Yield the texts that a user types, or the lines of a pipe, without blank ones. On a terminal, lines that arrive
    together are one text, Ctrl-C gives up a text, and Ctrl-D, exit or quit ends them."""
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        with suppress(ImportError):  # Windows
            import readline  # lets input() edit a line, and find earlier ones

            readline.parse_and_bind("set enable-bracketed-paste on")
    while True:
        try:
            text = input("> " if on_terminal else "")
            with suppress(EOFError):
                while on_terminal and more_is_waiting():
                    text += f"\n{input()}"
        except EOFError:
            break
        except KeyboardInterrupt:
            print("\n(Ctrl-D ends the program)", file=sys.stderr)
            continue
        if on_terminal and text.strip() in ("exit", "quit"):
            return
        if text.strip():
            yield text
    if on_terminal:
        print()


def more_is_waiting() -> bool:
    """Whether another line arrives on stdin at once, as the next one of a pasted text does."""
    try:
        return bool(select.select([sys.stdin], [], [], 0.05)[0])
    except OSError:  # on Windows, where only sockets can be asked
        return False


def add_flags(parser: argparse.ArgumentParser, temperature: float) -> None:
    """Add the flags that choose a model's next tokens, with this default temperature."""
    add = parser.add_argument
    add("--tokens", type=int, default=200, help="maximum number of new tokens (%(default)s)")
    add("--temperature", type=float, default=temperature, help="0 takes the most likely token (%(default)s)")
    add("--top_k", type=int, help="sample from the k most likely tokens")
    add("--top_p", type=float, help="sample from the fewest tokens with this total probability")
    add("--stop", metavar="TEXT", help="stop before this text")
    add("--seed", type=int, help="seed of the random numbers, to repeat a sample")
    add("--device", help="cpu, cuda, mps, ... (default: the accelerator if there is one)")
    add("--int8", action="store_true", help="weights as 8-bit integers: faster on a CPU")


def open_model(source: str | None, args: argparse.Namespace) -> tuple[Loaded, dict]:
    """The model, by default of the newest run, on its device, and the options of generate() that the flags give."""
    for name, legal, is_legal in (
        ("tokens", "positive", lambda n: n > 0),
        ("temperature", "0, or between 0.001 and 1000", lambda t: t == 0 or 1e-3 <= t <= 1e3),
        ("top_k", "positive", lambda k: k is None or k > 0),
        ("top_p", "in (0, 1]", lambda p: p is None or 0 < p <= 1),
        ("seed", "between 0 and 2^63 - 1", lambda s: s is None or 0 <= s < 2**63),
    ):
        if not is_legal(getattr(args, name)):
            fail(f"--{name} {getattr(args, name)} is not {legal}")
    with exit_on(ValueError, OSError):
        if source and not Path(source).exists():
            fail(f"there is no file or folder {source}")
        loaded = load_model(source or newest_run())
        device, _ = choose_device(args.device)
    if not has_bfloat16(device):  # many published weights are in bfloat16
        loaded.model.float()
    loaded.model.to(device).eval()
    if args.int8:
        if device.type != "cpu":
            fail(f"--int8 is for the CPU: leave it out on {device.type}, or add --device cpu")
        to_int8(loaded.model)
    generator = torch.Generator(device).manual_seed(torch.seed() if args.seed is None else args.seed)
    options = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "generator": generator}
    print(loaded.source, file=sys.stderr)
    return loaded, options


def run(main) -> None:
    """Call main(). Ctrl-C, Ctrl-D and a reader that leaves, such as head, end the program."""
    try:
        main()
    except (KeyboardInterrupt, EOFError):
        print()
    except BrokenPipeError:
        sys.stderr.close()
    gc.freeze()  # skips a search through all of torch for garbage, which would delay the exit


def main() -> None:
    tolerate_streams()
    sys.stdout.reconfigure(encoding="utf-8")
    moved("--chat", "chat.py")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", help="a run, a .json or .pt file in it, or a published model's folder")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--n", type=int, default=1, help="number of continuations (%(default)s)")
    parser.add_argument("--interactive", action="store_true", help="ask for prompts")
    add_flags(parser, temperature=0.8)
    args = parser.parse_args()
    if args.n < 1:
        fail(f"--n {args.n} is not positive")
    (model, tokenizer, *_), options = open_model(args.source, args)
    if args.interactive:
        if sys.stdin.isatty():
            print("Type a text to continue. Ctrl-C stops the answer; Ctrl-D, exit or quit ends.", file=sys.stderr)
        for prompt in typed():
            try:
                write(model, tokenizer, prompt, args, **options)
            except KeyboardInterrupt:
                print()
    else:
        write(model, tokenizer, args.prompt, args, **options)


if __name__ == "__main__":
    run(main)
