"""Let a trained model write.

    python sample.py                                         the newest run goes on from an empty document
    python sample.py runs/toy-1 --prompt 'def ' --n 3        a run, a beginning, three continuations of it
    python sample.py runs/toy-1/best.json --temperature 0    a checkpoint, its likeliest text, always the same
    python sample.py downloads/Qwen3-0.6B --prompt 'Once '   published weights, in Hugging Face's layout
    python sample.py --interactive                           a prompt at a time, until an empty line

The text ends with --tokens, with --stop, or where the model ends the document. A text that outgrows the model's context
goes on with the newest half of it in view.
"""

import argparse
import codecs
import gc
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import tiktoken
import torch

from model import GPT, generate
from prepare import encode, fail, token_bytes
from train import choose_device, has_bfloat16, load_model, newest_run


def parse_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", help="a run, a .json or .pt in it, or a folder of published weights")
    parser.add_argument("--prompt", default="", help="text to go on from")
    parser.add_argument("--prompt_file", metavar="FILE", help="the same, from a file")
    parser.add_argument("--n", type=int, default=1, help="continuations (%(default)s)")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to write at most (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (%(default)s)")
    parser.add_argument("--top_k", type=int, help="draw from the k likeliest tokens")
    parser.add_argument("--top_p", type=float, help="draw from the fewest tokens that reach this probability together")
    parser.add_argument("--stop", metavar="TEXT", help="end before this text")
    parser.add_argument("--seed", type=int, help="to draw the same text again")
    parser.add_argument("--device", help="cpu, cuda, mps, ... (default: the accelerator where there is one)")
    parser.add_argument("--interactive", action="store_true", help="ask for prompts")
    args = parser.parse_args()
    for name, legal, is_legal in (
        ("n", "positive", lambda n: n > 0),
        ("tokens", "positive", lambda n: n > 0),
        ("temperature", "0 or more", lambda t: 0 <= t < float("inf")),
        ("top_k", "positive", lambda k: k is None or k > 0),
        ("top_p", "in (0, 1]", lambda p: p is None or 0 < p <= 1),
    ):
        if not is_legal(getattr(args, name)):
            fail(f"--{name} {getattr(args, name)} is not {legal}")
    return args


class Decoder:
    """The text of a stream of tokens: a character is given out when its last byte has come, and nothing is given out
    that may yet turn out to be the beginning of the stop text."""

    def __init__(self, tokenizer: tiktoken.Encoding, stop: str | None):
        self.tokenizer, self.stop = tokenizer, stop
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held = ""
        self.ended = False

    def feed(self, token: int) -> str:
        """The text that `token` makes certain. Ends at end-of-text and before the stop text."""
        if token == self.tokenizer.eot_token:
            return self.finish()
        text = self.held + self.utf8.decode(token_bytes(self.tokenizer, token))
        if not self.stop:
            return text
        certain, found, _ = text.partition(self.stop)
        if found:
            self.ended = True
            return certain
        overlap = max(n for n in range(len(self.stop)) if text.endswith(self.stop[:n]))  # 0, if nothing else
        certain, self.held = text[: len(text) - overlap], text[len(text) - overlap :]
        return certain

    def finish(self) -> str:
        """What was held back, now that no more tokens come."""
        self.ended = True
        return self.held + self.utf8.decode(b"", final=True)


def continuations(model: GPT, tokenizer: tiktoken.Encoding, prompt: str, args, generator) -> Iterator[list[str]]:
    """What is new in each of the args.n texts, a step at a time, until all have ended."""
    device = model.embedding.weight.device
    try:
        ids = [tokenizer.eot_token, *encode(tokenizer, prompt).tolist()]
    except UnicodeEncodeError:
        fail("the prompt is not UTF-8 text")
    tokens = torch.tensor([ids] * args.n, device=device)
    decoders = [Decoder(tokenizer, args.stop) for _ in range(args.n)]
    how = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "generator": generator}
    for new in islice(generate(model, tokens, n_vocab=tokenizer.n_vocab, **how), args.tokens):
        yield ["" if d.ended else d.feed(token) for d, token in zip(decoders, new.tolist())]
        if all(d.ended for d in decoders):
            return
    yield ["" if d.ended else d.finish() for d in decoders]


def write(model: GPT, tokenizer: tiktoken.Encoding, prompt: str, args, generator) -> None:
    """One continuation streams as it is decoded; several are decoded together, and printed one after the other."""
    steps = continuations(model, tokenizer, prompt, args, generator)
    if args.n == 1:
        print(prompt, end="", flush=True)
        for (new,) in steps:
            print(new, end="", flush=True)
        print()
    else:
        for i, parts in enumerate(zip(*steps)):
            print(f"--- {i + 1} of {args.n}\n{prompt}{''.join(parts)}")


def main() -> None:
    args = parse_command_line()
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    if args.prompt_file:
        try:
            args.prompt = Path(args.prompt_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            fail(f"cannot read --prompt_file {args.prompt_file}: {error}")
    model, tokenizer, source = load_model(args.source or newest_run())
    device, _ = choose_device(args.device)
    if not has_bfloat16(device):  # in which weights may be published
        model.float()
    model.to(device).eval()
    generator = torch.Generator(device)
    if args.seed is None:
        generator.seed()
    else:
        generator.manual_seed(args.seed)
    print(source, file=sys.stderr)

    if not args.interactive:
        write(model, tokenizer, args.prompt, args, generator)
        return
    while prompt := input("> "):
        write(model, tokenizer, prompt, args, generator)


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, EOFError):  # Ctrl-C and Ctrl-D are ways to leave
        print()
    except BrokenPipeError:  # the reader, head say, has seen enough
        sys.stderr.close()
    gc.freeze()  # as in train.py, for a quick exit
