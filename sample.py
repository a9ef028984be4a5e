"""Generate text with a trained model.

    python sample.py                                         continue an empty document with the newest run
    python sample.py runs/toy-1 --prompt 'def ' --n 3        three continuations of a prompt, by a run
    python sample.py runs/toy-1/best.json --temperature 0    the most likely text of a checkpoint, always the same
    python sample.py downloads/Qwen3-0.6B --prompt 'Once '   a published model, in Hugging Face's layout
    python sample.py --interactive                           ask for one prompt after another, until an empty line

Generation stops after --tokens, before the text --stop, or when the model ends the document. When the text outgrows the
model's context, the newest half of the context is kept.
"""

import argparse
import codecs
import gc
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import tiktoken

from prepare import encode, fail, token_bytes, tolerate_streams

# torch and model.py are imported by the functions that need them, so that --help does not wait for them.


def parse_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", help="a run, a .json or .pt file in it, or a published model's folder")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--prompt_file", metavar="FILE", help="read the prompt from a file")
    parser.add_argument("--n", type=int, default=1, help="number of continuations (%(default)s)")
    parser.add_argument("--tokens", type=int, default=200, help="maximum number of new tokens (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token (%(default)s)")
    parser.add_argument("--top_k", type=int, help="sample from the k most likely tokens")
    parser.add_argument("--top_p", type=float, help="sample from the fewest tokens with this total probability")
    parser.add_argument("--stop", metavar="TEXT", help="stop before this text")
    parser.add_argument("--seed", type=int, help="seed of the random numbers, to repeat a sample")
    parser.add_argument("--device", help="cpu, cuda, mps, ... (default: the accelerator if there is one)")
    parser.add_argument("--interactive", action="store_true", help="ask for prompts")
    args = parser.parse_args()
    for name, legal, is_legal in (
        ("n", "positive", lambda n: n > 0),
        ("tokens", "positive", lambda n: n > 0),
        ("temperature", "0, or between 0.001 and 1000", lambda t: t == 0 or 1e-3 <= t <= 1e3),
        ("top_k", "positive", lambda k: k is None or k > 0),
        ("top_p", "in (0, 1]", lambda p: p is None or 0 < p <= 1),
        ("seed", "between 0 and 2^63 - 1", lambda s: s is None or 0 <= s < 2**63),
    ):
        if not is_legal(getattr(args, name)):
            fail(f"--{name} {getattr(args, name)} is not {legal}")
    return args


class Decoder:
    """Turns a stream of tokens into text. A character is returned once its last byte has arrived, and text that could
    be the beginning of the stop text is held back until that is decided."""

    def __init__(self, tokenizer: tiktoken.Encoding, stop: str | None):
        self.tokenizer, self.stop = tokenizer, stop
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held = ""
        self.ended = False

    def feed(self, token: int) -> str:
        """The text that is final after `token`. Sets `ended` at end-of-text or at the stop text."""
        if token == self.tokenizer.eot_token:
            return self.finish()
        text = self.held + self.utf8.decode(token_bytes(self.tokenizer, token))
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


def continuations(model, tokenizer: tiktoken.Encoding, prompt: str, args, generator) -> Iterator[list[str]]:
    """Yield the new text of each of args.n continuations, one step at a time, until all have ended."""
    import torch

    from model import generate

    try:
        ids = [tokenizer.eot_token, *encode(tokenizer, prompt).tolist()]
    except UnicodeEncodeError:
        fail("the prompt is not UTF-8 text")
    tokens = torch.tensor([ids] * args.n, device=model.embedding.weight.device)
    decoders = [Decoder(tokenizer, args.stop) for _ in range(args.n)]
    options = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "generator": generator}
    for new in islice(generate(model, tokens, n_vocab=tokenizer.n_vocab, **options), args.tokens):
        yield ["" if d.ended else d.feed(token) for d, token in zip(decoders, new.tolist())]
        if all(d.ended for d in decoders):
            return
    yield ["" if d.ended else d.finish() for d in decoders]


def write(model, tokenizer: tiktoken.Encoding, prompt: str, args, generator) -> None:
    """Print one continuation as it is generated, or several one after the other when all are complete."""
    steps = continuations(model, tokenizer, prompt, args, generator)
    if args.n == 1:
        print(prompt, end="", flush=True)
        for (new,) in steps:
            print(new, end="", flush=True)
        print()
    else:
        for i, parts in enumerate(zip(*steps)):
            print(f"--- {i + 1} of {args.n}\n{prompt}{''.join(parts)}")


def sample(model, tokenizer: tiktoken.Encoding, seed: int) -> str:
    """200 tokens that the model writes into an empty document, for the end of a training run."""
    import torch

    from model import generate

    torch.manual_seed(seed)
    prompt = torch.tensor([[tokenizer.eot_token]], device=model.embedding.weight.device)
    tokens = islice(generate(model.eval(), prompt, n_vocab=tokenizer.n_vocab), 200)
    return b"".join(token_bytes(tokenizer, ids.item()) for ids in tokens).decode(errors="replace")


def main() -> None:
    tolerate_streams()
    args = parse_command_line()
    if args.prompt_file:
        try:
            args.prompt = Path(args.prompt_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            fail(f"cannot read --prompt_file {args.prompt_file}: {error}")

    import torch

    from model import choose_device, has_bfloat16, newest_run
    from published import load_model

    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    model, tokenizer, source = load_model(args.source or newest_run())
    device, _ = choose_device(args.device)
    if not has_bfloat16(device):  # many published weights are in bfloat16
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
    except (KeyboardInterrupt, EOFError):  # Ctrl-C and Ctrl-D end the program
        print()
    except BrokenPipeError:  # a reader such as head has closed the pipe
        sys.stderr.close()
    gc.freeze()  # skips a search through all of torch for garbage, which would delay the exit
