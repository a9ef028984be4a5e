"""Generate text with a trained model.

    python sample.py                                         continue an empty document with the newest run
    python sample.py runs/toy-1 --prompt 'def' --n 3         three continuations of a prompt, by a run
    python sample.py runs/toy-1/best.json --temperature 0    the most likely text of a checkpoint, always the same
    python sample.py downloads/Qwen3-0.6B --prompt 'Once '   a published model, in Hugging Face's layout
    python sample.py --interactive                           ask for one prompt after another, until an empty line
    python sample.py --chat                                  talk to a model that was trained on conversations
    echo 'Who are you?' | python sample.py --chat            one question per line, without a terminal

Generation stops after --tokens tokens, before the --stop text, or when the model ends the document or its answer. When
the text outgrows the model's context, the newest half of it is kept; a chat drops its oldest questions and answers.

In a chat, Ctrl-C ends an answer, Ctrl-D the program. A line that begins with a slash is a command:

    /post TEXT      put a text, or the text of a file of this name, before the next question
    /system TEXT    begin a new conversation, and tell the model how to behave in it
    /clear          begin a new conversation
"""

import argparse
import codecs
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

import tiktoken

from prepare import Conversations, Message, encode, end_tokens, fail, render, template_of, token_bytes, tolerate_streams

# torch and model.py are imported by the functions that need them, so that --help does not wait for them.


def parse_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", help="a run, a .json or .pt file in it, or a published model's folder")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--prompt_file", metavar="FILE", help="read the prompt from a file")
    parser.add_argument("--n", type=int, default=1, help="number of continuations (%(default)s)")
    parser.add_argument("--tokens", type=int, default=200, help="maximum number of new tokens (%(default)s)")
    parser.add_argument("--temperature", type=float, help="0 takes the most likely token (0.8; 0 in a chat)")
    parser.add_argument("--top_k", type=int, help="sample from the k most likely tokens")
    parser.add_argument("--top_p", type=float, help="sample from the fewest tokens with this total probability")
    parser.add_argument("--stop", metavar="TEXT", help="stop before this text")
    parser.add_argument("--seed", type=int, help="seed of the random numbers, to repeat a sample")
    parser.add_argument("--device", help="cpu, cuda, mps, ... (default: the accelerator if there is one)")
    parser.add_argument("--int8", action="store_true", help="weights as 8-bit integers: faster on a CPU")
    parser.add_argument("--interactive", action="store_true", help="ask for prompts")
    parser.add_argument("--chat", action="store_true", help="ask for questions, which the model answers")
    args = parser.parse_args()
    if args.temperature is None:
        args.temperature = 0.0 if args.chat else 0.8
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
    if args.chat and (args.prompt or args.prompt_file or args.n > 1 or args.interactive):
        fail("--chat reads questions from stdin: leave out --prompt, --prompt_file, --n and --interactive")
    return args


class Decoder:
    """Turns a stream of tokens into text. A character is returned once its last byte has arrived, and text that could
    be the beginning of the stop text is held back until that is decided."""

    def __init__(self, tokenizer: tiktoken.Encoding, stop: str | None):
        self.tokenizer, self.stop, self.ends = tokenizer, stop, end_tokens(tokenizer)
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held = ""
        self.ended = False

    def feed(self, token: int) -> str:
        """The text that is final after `token`. Sets `ended` at a token that ends the text, or at the stop text."""
        if token in self.ends:
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


def continuations(
    model, tokenizer: tiktoken.Encoding, ids: list[int], n: int, n_tokens: int, stop: str | None = None, **options
) -> Iterator[list[str]]:
    """Yield the new text of each of n continuations of `ids`, one step at a time, until all have ended or n_tokens are
    reached. `options` go to model.generate."""
    import torch

    from model import generate

    tokens = torch.tensor([ids] * n, device=model.embedding.weight.device)
    decoders = [Decoder(tokenizer, stop) for _ in range(n)]
    steps = generate(model, tokens, n_vocab=tokenizer.n_vocab, n_tokens=n_tokens, **options)
    for new in islice(steps, n_tokens):
        yield ["" if d.ended else d.feed(token) for d, token in zip(decoders, new.tolist())]
        if all(d.ended for d in decoders):
            return
    yield ["" if d.ended else d.finish() for d in decoders]


def write(model, tokenizer: tiktoken.Encoding, prompt: str, args, **options) -> None:
    """Print one continuation as it is generated, or several one after the other when all are complete."""
    try:
        ids = [tokenizer.eot_token, *encode(tokenizer, prompt).tolist()]
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


def sample(model, tokenizer: tiktoken.Encoding, seed: int) -> str:
    """200 tokens that the model writes into an empty document, for the end of a training run."""
    import torch

    torch.manual_seed(seed)
    steps = continuations(model.eval(), tokenizer, [tokenizer.eot_token], 1, 200, temperature=0.8)
    return "".join(text for (text,) in steps)


def dialogues(model, tokenizer: tiktoken.Encoding, data: Conversations) -> str:
    """Three held-out conversations up to the first answer, control tokens included, and what the model answers, for the
    end of a training run."""
    texts = []
    for row in sorted({0, data.n_windows // 2, data.n_windows - 1}):
        ids = data.tokens[row, : max(1, data.mask[row].argmax())].tolist()
        steps = continuations(model.eval(), tokenizer, ids, 1, model.config.seq_len - len(ids), temperature=0)
        texts.append(tokenizer.decode(ids) + "".join(text for (text,) in steps))
    return "\n\n".join(texts)


# ---------------------------------------------------------------------------------------------------------------------
# Chat


def chat(model, tokenizer: tiktoken.Encoding, args, **options) -> None:
    """Read questions and commands from stdin until it ends, and print each answer as it is generated. The cache keeps
    the keys and values of the conversation, so that each turn computes those of its own tokens only."""
    from model import KVCache

    weight = model.embedding.weight
    cache = KVCache(model.config, 1, weight.device, weight.dtype)
    messages, post = [], ""
    if sys.stdin.isatty():
        print("Ask a question, or type /post TEXT, /system TEXT or /clear. Ctrl-D ends the chat.", file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        command, _, rest = line.partition(" ")
        if command == "/clear":
            messages.clear()
        elif command == "/system":
            messages[:] = [{"role": "system", "content": rest}]
        elif command == "/post" and rest:
            try:
                text = Path(rest).read_text(encoding="utf-8").strip() if os.path.isfile(rest) else rest
                post = f"{text}\n\n"
                print(f"(a post of {len(text):,} characters stands before the next question)", file=sys.stderr)
            except (OSError, ValueError) as error:
                print(f"cannot read {rest}: {error}", file=sys.stderr)
        elif command.startswith("/"):
            print("the commands are /post TEXT, /system TEXT and /clear", file=sys.stderr)
        elif line:
            messages.append({"role": "user", "content": post + line})
            post = ""
            if not (ids := fitting_prompt(tokenizer, messages, model.config.seq_len, args.tokens)):
                continue
            messages.append({"role": "assistant", "content": ""})
            n_tokens = min(args.tokens, model.config.seq_len - len(ids))
            with suppress(KeyboardInterrupt):
                for (text,) in continuations(model, tokenizer, ids, 1, n_tokens, args.stop, cache=cache, **options):
                    print(text, end="", flush=True)
                    messages[-1]["content"] += text
            print()


def fitting_prompt(tokenizer: tiktoken.Encoding, messages: list[Message], seq_len: int, n_tokens: int) -> list[int]:
    """The tokens of the conversation up to the next answer, which gets room for n_tokens or a quarter of the context.
    The oldest questions and answers are removed to make room. A last question that does not fit alone is removed too,
    and the result is empty."""
    n_system = int(messages[0]["role"] == "system")  # these stay
    limit, before = seq_len - min(n_tokens, seq_len // 4), len(messages)
    if len(render(tokenizer, [*messages[:n_system], messages[-1]], ask=True)) > limit:
        print(f"this is too long for the model's context of {seq_len} tokens", file=sys.stderr)
        messages.pop()
        return []
    while len(ids := render(tokenizer, messages, ask=True).tolist()) > limit:
        del messages[n_system : n_system + 2]
    if dropped := (before - len(messages)) // 2:
        print(f"(the context is full; questions dropped, oldest first: {dropped})", file=sys.stderr)
    return ids


def main() -> None:
    tolerate_streams()
    args = parse_command_line()
    if args.prompt_file:
        try:
            args.prompt = Path(args.prompt_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            fail(f"cannot read --prompt_file {args.prompt_file}: {error}")

    import torch

    from model import choose_device, has_bfloat16, newest_run, to_int8
    from published import load_model

    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    model, tokenizer, source = load_model(args.source or newest_run(), args.chat)
    device, _ = choose_device(args.device)
    if not has_bfloat16(device):  # many published weights are in bfloat16
        model.float()
    model.to(device).eval()
    if args.int8:
        if device.type != "cpu":
            fail(f"--int8 is for the CPU: leave it out on {device.type}, or add --device cpu")
        to_int8(model)
    generator = torch.Generator(device).manual_seed(torch.seed() if args.seed is None else args.seed)
    options = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "generator": generator}
    print(source, file=sys.stderr)

    if args.chat and not template_of(tokenizer):
        fail(f"{source} has no tokens for conversations: fine-tune it on some first, see python prepare.py --help")
    if args.chat:
        chat(model, tokenizer, args, **options)
    elif args.interactive:
        while prompt := input("> " if sys.stdin.isatty() else ""):
            write(model, tokenizer, prompt, args, **options)
    else:
        write(model, tokenizer, args.prompt, args, **options)


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, EOFError):  # Ctrl-C and Ctrl-D end the program
        print()
    except BrokenPipeError:  # a reader such as head has closed the pipe
        sys.stderr.close()
    gc.freeze()  # skips a search through all of torch for garbage, which would delay the exit
