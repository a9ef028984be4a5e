"""How often a model answers the held-out default conversations exactly, by kind of question: the README's table.

    python tests/answers.py runs/chat            a model that was fine-tuned on `python chat.py --prepare`
    python tests/answers.py runs/chat --cache    tokens per second of a chat, with and without the kept cache

An answer counts as exact if it equals the expected one to the last character, and as ended if the model ends it by
itself. The questions of the kind "knowing" are about names of the train split, asked in another way than in training.
"""

import argparse
import random
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from chat import WAYS_TO_ASK, render, stdlib_conversations, taking_turns
from model import KVCache
from prepare import default_corpus
from published import load_model
from sample import continuations


def held_out() -> dict[str, list]:
    """The conversations of each kind."""
    found = defaultdict(list)
    for split, kind, messages in stdlib_conversations(default_corpus(), 0.05):
        if kind == "knowing":  # of one name, the train split has one way to ask
            before, name, after = messages[0]["content"].split("`")
            other = next(way for way in WAYS_TO_ASK["purpose"] if way != f"{before}{{}}{after}")
            found[kind].append(taking_turns([other.format(f"`{name}`"), messages[1]["content"]]))
        elif split == "val":
            found[kind].append(messages)
    return found


def report(model, tokenizer, n: int) -> None:
    results, rng = defaultdict(list), random.Random(0)  # kind -> (is exact, has ended) of each answer
    for kind, conversations in held_out().items():
        for messages in rng.sample(conversations, min(n, len(conversations))):
            for i in range(1, len(messages), 2):
                ids = render(tokenizer, messages[:i], ask=True)[0].tolist()
                n_tokens = min(80, model.config.seq_len - len(ids))
                if n_tokens > 0:
                    steps = list(continuations(model, tokenizer, ids, 1, n_tokens, temperature=0))
                    answer = "".join(text for (text,) in steps)
                    results[kind].append((answer == messages[i]["content"], len(steps) <= n_tokens))
    print("| kind | answers | exact | ended |\n|---|---|---|---|")
    for kind, rows in sorted(results.items()):
        exact, ended = (sum(column) / len(rows) for column in zip(*rows))
        print(f"| {kind} | {len(rows)} | {exact:.0%} | {ended:.0%} |")


def time_cache(model, tokenizer) -> None:
    """A chat of 40 turns with answers of 16 tokens: new tokens per second of the first and of the last turn."""
    for name, cache in (("kept", KVCache(model.config, 1)), ("cold", None)):
        messages, speeds = [], []
        for turn in range(40):
            messages.append({"role": "user", "content": f"Tell me about number {turn}, please, in a short sentence."})
            ids = render(tokenizer, messages, ask=True)[0].tolist()
            if len(ids) + 16 > min(model.config.seq_len, 2048):
                break
            start = time.perf_counter()
            steps = continuations(model, tokenizer, ids, 1, 16, temperature=0, cache=cache)
            messages.append({"role": "assistant", "content": "".join(text for (text,) in steps)})
            speeds.append(16 / (time.perf_counter() - start))
        print(f"{name} cache: {speeds[0]:.1f} tokens/s in the first turn, {speeds[-1]:.1f} in turn {len(speeds)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--n", type=int, default=200, help="conversations of each kind (%(default)s)")
    parser.add_argument("--cache", action="store_true", help="time the cache")
    args = parser.parse_args()
    model, tokenizer, *_ = load_model(args.source)
    model.float().eval()
    with torch.no_grad():
        time_cache(model, tokenizer) if args.cache else report(model, tokenizer, args.n)
