"""Conversations: make a data set of them, and talk to a model that was trained on one.

    python chat.py --prepare --tokenizer runs/toy-1              the default conversations, with a run's tokenizer
    python chat.py --prepare talks.jsonl --tokenizer runs/toy-1  your own, recognised by the keys of their records
    python train.py --init runs/toy-1 --data data/chat           fine-tune the run on them
    python chat.py                                               talk to the newest run
    python chat.py downloads/smollm2 --tokens 100                or to a published chat model
    echo 'Who are you?' | python chat.py runs/chat               one question per line, without a terminal

To a model, a conversation is a text with control tokens around its messages, of which each kind of model expects its
own, its template. The loss counts what the assistant says, with the token that ends it (in braces here):

    <|im_start|>user\\nWho are you?<|im_end|>\\n<|im_start|>assistant\\n{I am a small language model.<|im_end|>}\\n

When the conversation outgrows the model's context, its oldest questions and answers are dropped.

In the terminal, Ctrl-C stops an answer, and Ctrl-D, exit or quit ends the chat. Ask a question, or give a command:

    /post TEXT      put a text, or the text of a file of this name, before the next question
    /system TEXT    begin a new conversation, and tell the model how to behave in it
    /clear          begin a new conversation
    /help           show these lines again
"""

import argparse
import ast
import json
import os
import random
import sys
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from heapq import heappop, heappush
from itertools import cycle
from pathlib import Path

import numpy as np
import regex  # see tokenizer.py

from model import GPT, KVCache
from prepare import DEFAULT_TOKENIZER, SPLITS, NewDataset, Piece, Skipped, Windows, default_out
from prepare import exit_on, fail, is_container, records, split_of, tolerate_streams
from sample import add_flags, continuations, open_model, run, typed
from tokenizer import CHATML, Part, Template, Tokenizer

IGNORED = -100  # torch's number for a target that the loss does not count
CHUNK = 1 << 20  # tokens of a data set that are searched for conversations at a time

# ---------------------------------------------------------------------------------------------------------------------
# A conversation as tokens

# {"role": "system", "user", "assistant" or "tool", "content": text}, and "learned": False for an answer that only is
# context for the next ones
Message = dict[str, str | bool]


def is_learned(message: Message) -> bool:
    return message["role"] == "assistant" and message.get("learned", True)


def parts_of(template: Template, messages: list[Message], ask: bool = False) -> list[Part]:
    """The text of a conversation in parts that are encoded one by one: control tokens count in the template's parts
    only, so that no message can inject one. `ask` adds the beginning of the next answer. Raises ValueError if the
    template refuses the conversation."""
    texts, marked = [], []  # the template is given marks in place of texts, and what it writes is cut at them
    for message in messages:
        answers = message["role"] == "assistant"
        # The spaces that an answer begins with may be the indentation of code.
        text = message["content"].rstrip() if answers else message["content"].strip()
        # Qwen3's looks for a thought in an answer, so these tags remain.
        pieces = regex.split("(\n*</?think>\n*)", text) if answers and "</think>" in template.jinja else [text]
        for n in range(0, len(pieces), 2):
            texts.append(Part(pieces[n], target=is_learned(message)))
            pieces[n] = f"\ue000{len(texts) - 1}\ue001"
        marked.append({"role": message["role"], "content": "".join(pieces)})
    whole = template.write(marked, ask)
    for message in marked:
        if regex.search("\ue000\\d+\ue001$", message["content"])[0] not in whole:  # the text after a thought
            raise ValueError(f"conversations with a message ({message['role']}) that the chat template alters")
    first, *written = regex.split("\ue000(\\d+)\ue001", whole)
    parts = [Part(first, control=True, target=False)]
    for number, own in zip(written[::2], written[1::2]):
        parts.append(text := texts[int(number)])
        if text.target:
            answered, end, own = own.partition(template.end)
            parts.append(Part(answered + end, control=True))
        parts.append(Part(own, control=True, target=False))
    return parts


def render(tokenizer: Tokenizer, messages: list[Message], ask: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The tokens [N] of a conversation, and which of them the loss counts."""
    return tokenizer.encode_parts(parts_of(tokenizer.template, messages, ask))


# ---------------------------------------------------------------------------------------------------------------------
# A data set of conversations


def prepare(inputs: list[str], out: str | Path, tokenizer: str, val_fraction: float | None = None) -> None:
    """Make the data set `out` from files of conversations, or of questions about the default corpus if `inputs` is
    empty. The val split gets about `val_fraction` of them."""
    with exit_on(ValueError, OSError):
        new = NewDataset(inputs, out, tokenizer, val_fraction, chat=True)
    template = CHATML if isinstance(new.tokenizer, int) else new.tokenizer.template

    def pieces(skipped: Skipped) -> Iterator[Piece]:
        if inputs:
            return conversations(new.files, new.val_fraction, template, skipped)
        default = stdlib_conversations(new.files, new.val_fraction)
        return ((split, parts_of(template, messages), True) for split, _, messages in default)

    new.write(pieces)


ROLES = {  # by the names that are in use for them
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
# Keys of records and messages, beside those of their layout. All others are named in the report.
WEIGHTS = {"weight", "train", "trainable", "loss"}  # 0 or false: the loss does not count these answers
LABELS = {"label", "kto_tag", "desirable", "correct", "is_correct"}  # false: the answers are bad examples
DECISIVE = set(  # answers mean something else without them, and no template here has a place for them
    "tools functions tool_calls function_call reasoning_content thinking image images image_url video videos audio"
    " audios context contexts document documents passage choices options instruction input chosen train_detail".split()
)
HARMLESS = regex.compile(  # they describe a record, as do "source_url" and "n_tokens"
    r"(?i)(.*[_-])?(ids?|uuid|hash|index|idx|source|origin|dataset|url|link|licen[cs]e|category|topic|domain|subject"
    r"|task|type|tags?|title|date|time|timestamp|created(_at)?|updated(_at)?|language|lang|locale|model|generator"
    r"|author|split|subset|version|meta|metadata|tokens|length|turns?)"
)
NOTHING = (None, "", [], {}, "[]")  # values of a key that is only there because other records use it
TEXT_PARTS = (None, "text", "input_text", "output_text")


def conversations(files: list[Path], val_fraction: float, template: Template, skipped: Skipped) -> Iterator[Piece]:
    """Yield the split and the parts of each conversation. Equal first questions share a split."""
    for path in files:
        if not is_container(path):
            skipped[path, "not a file of conversations"] += 1
            continue
        for record in records(path, None, skipped):
            try:
                messages, unused = messages_in(record)
                parts = parts_of(template, messages)
            except ValueError as reason:
                skipped.record(path, str(reason), record)
                continue
            written, said = (part.text for part in parts if not part.control), (turn["content"] for turn in messages)
            n_written, n_said = (len(regex.sub(r"\s|</?think>", "", "".join(texts))) for texts in (written, said))
            if n_written < n_said:
                unused.add("content (thoughts that the chat template leaves out)")
            skipped.unused.update(unused)
            roles = [message["role"] for message in messages]
            asked = messages[: roles.index("assistant", roles.index("user"))] if "user" in roles else messages
            yield split_of(json.dumps(asked).encode(), val_fraction), parts, True


def taking_turns(texts: list[str]) -> list[Message]:
    """A conversation of texts: a question, its answer, the next question, and so on."""
    return [{"role": role, "content": text} for role, text in zip(cycle(["user", "assistant"]), texts)]


def turns_in(record: object) -> tuple[list, dict]:
    """The messages of a record in one of the usual layouts, as they are there, and its other keys. Raises ValueError
    for other records."""
    match {"messages": record} if isinstance(record, list) else record:
        case {"messages": list(turns), **keys} | {"conversations": list(turns), **keys}:
            pass
        case {"prompt": list(asked), "completion": list(answered), **keys}:
            turns = asked + answered
        case {"instruction": str(asked), "output": answered, **keys} if isinstance(keys.get("input") or "", str):
            turns = [f"{asked}\n\n{keys.pop('input', None) or ''}".strip(), answered]
        case (
            {"prompt": asked, "completion": answered, **keys}
            | {"question": asked, "answer": answered, **keys}
            | {"input": asked, "output": answered, **keys}
        ):
            turns = [asked, answered]
        case _:
            raise ValueError("records that are not conversations")
    if all(isinstance(turn, str) for turn in turns):
        turns = taking_turns(turns)
    match keys.pop("history", None) or []:
        case list(pairs) if all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            turns = [*taking_turns(sum(pairs, [])), *turns]
        case _:
            raise ValueError("conversations with a history that is no list of [question, answer]")
    if system := keys.pop("system", None):
        turns = [{"role": "system", "content": system}, *turns]
    return turns, keys


def meaning_of(keys: dict) -> tuple[bool, set[str]]:
    """Whether answers with these keys are to be learned, and which of the keys are not used. Raises ValueError if
    answers mean something else than they seem to."""
    said = {key: value for key, value in keys.items() if value not in NOTHING}
    if any(said.get(key) in (False, "false", "False") for key in LABELS):
        raise ValueError("answers that are bad examples, by their label")
    weights = [said[key] for key in WEIGHTS & said.keys()]
    if not all(weight in (0, 1) for weight in weights):
        raise ValueError("conversations with weights other than 0 and 1")
    if decisive := DECISIVE & said.keys():
        raise ValueError(f"conversations whose answers depend on {', '.join(sorted(decisive))}")
    used = WEIGHTS | {key for key in LABELS if said.get(key) in (True, "true", "True")}
    return all(weights), {key for key in said.keys() - used if not HARMLESS.fullmatch(key)}


def messages_in(record: object) -> tuple[list[Message], set[str]]:
    """The messages of a record up to the last answer to be learned, and the keys that are not used. Messages of one
    role in a row become one. Raises ValueError, with the reason."""
    turns, keys = turns_in(record)
    all_learned, unused = meaning_of(keys)
    messages = []
    for turn in turns:
        match turn:
            case {"role": str(name), **keys}:
                content = keys.pop("content", None)
            case {"from": str(name), **keys}:
                content = keys.pop("value", None)
            case _:
                raise ValueError("conversations with a message that is not text")
        if not (role := ROLES.get(name.lower())):
            raise ValueError(f"conversations with the unknown role {name[:40]!r}")
        learned, more = meaning_of(keys)
        unused |= more
        if isinstance(content, list):  # of parts, which may also be images
            texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") in TEXT_PARTS]
            is_text = len(texts) == len(content) and all(isinstance(text, str) for text in texts)
            content = "".join(texts) if is_text else None
        if not isinstance(content, str) or regex.search(r"\p{Surrogate}", content):
            raise ValueError("conversations with a message that is not text")
        message = {"role": role, "content": content}
        if role == "assistant" and not (learned and all_learned):
            message["learned"] = False
        if messages and messages[-1] | {"content": content} == message:
            messages[-1]["content"] += f"\n{content}"
        else:
            messages.append(message)
    while messages and not is_learned(messages[-1]):
        messages.pop()
    if not messages or not all(message["content"].strip() for message in messages if message["role"] == "assistant"):
        raise ValueError("conversations without an answer to learn, or with an empty one")
    return messages, unused


# ---------------------------------------------------------------------------------------------------------------------
# The default conversations: questions about the source of Python's standard library

Fact = tuple[str, str, str]  # a kind of question, what it asks about, and the answer
WAYS_TO_ASK = {
    "purpose": ("What does {} do?", "What is {} for?", "Explain what {} does."),
    "arguments": ("Which arguments does {} take?", "How do I call {}?", "What can I pass to {}?"),
    "default": ("What is the default of {}?", "Which value does {} have by default?", "What if I leave out {}?"),
    "base": ("Which class does {} derive from?", "What is the base class of {}?", "What does {} inherit from?"),
}
UNANSWERED = "The post does not say that."
MANNERS = {
    ("Hello!", "Hi.", "Good morning."): "Hello! Show me a post about Python and ask me about it.",
    ("Who are you?", "What are you?"): "I am a small language model. I repeat what I have read.",
    ("What can you do?", "Help!"): "I answer questions about a post that you show me.",
    ("Thanks.", "Thank you!", "Great, thanks."): "You are welcome.",
}


def stdlib_posts(files: list[Path]) -> dict[str, list[Fact]]:
    """{a line about a function or class: what it says}, from the source of Python files, which is not executed."""
    posts = {}
    for path in files:
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # some distributions ship files for other versions of Python
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            docstring = " ".join((ast.get_docstring(node) or "").split())
            if not (purpose := regex.match(r"[A-Z][^`]{15,90}?\.(?= |$)", docstring)):  # its first sentence
                continue
            facts = [("purpose", node.name, purpose[0])]
            if isinstance(node, ast.FunctionDef):
                arguments = regex.sub("^(self|cls)(, |$)", "", ast.unparse(node.args))
                beginning = f"`{node.name}({arguments})`"
                facts.append(("arguments", node.name, beginning))
                defaults = regex.findall(r"(\w+)=([^,()]+)(?=,|$)", arguments)
                facts += [("default", name, f"`{name}={value}`") for name, value in defaults]
            elif node.bases:
                beginning = f"`{node.name}` derives from `{ast.unparse(node.bases[0])}`"
                facts.append(("base", node.name, f"{beginning}."))
            else:
                continue
            if len(beginning) < 100:
                posts[f"{beginning}: {purpose[0]}"] = facts
    return posts


def ask(rng: random.Random, fact: Fact, subject: str | None = None) -> str:
    """A question for a fact, with the `subject` in place of the name that the fact is about."""
    return rng.choice(WAYS_TO_ASK[fact[0]]).format(subject or f"`{fact[1]}`")


def stdlib_conversations(files: list[Path], val_fraction: float) -> Iterator[tuple[str, str, list[Message]]]:
    """Yield the split, the kind and the messages of conversations about the standard library. The val split asks about
    other names than the train split."""
    posts = stdlib_posts(files)
    for split in SPLITS:
        mine = [post for post in posts.items() if split_of(post[1][0][1].encode(), val_fraction) == split]
        rng = random.Random(split)
        for post, facts in mine:
            for fact in facts[:3]:
                yield split, "reading", taking_turns([f"{post}\n\n{ask(rng, fact)}", fact[2]])
            fact, later = rng.sample(facts, 2)
            follow_up = ask(rng, later, None if later[0] == "default" else "it")
            turns = [f"{post}\n\n{ask(rng, fact)}", fact[2], follow_up, later[2], "Thanks.", "You are welcome."]
            yield split, "follow-ups", taking_turns(turns[: rng.choice([4, 6])])
            other, others = rng.choice(mine)
            if not {about for _, about, _ in facts} & {about for _, about, _ in others}:
                both = "\n".join(rng.sample([post, other], 2))
                yield split, "two posts", taking_turns([f"{both}\n\n{ask(rng, fact)}", fact[2]])
                if rng.random() < 0.4:
                    yield split, "unanswered", taking_turns([f"{post}\n\n{ask(rng, others[-1])}", UNANSWERED])
            if split == "train":
                yield split, "knowing", taking_turns([ask(rng, facts[0]), facts[0][2]])
            if rng.random() < 0.2:
                questions, answer = rng.choice(list(MANNERS.items()))
                yield split, "manners", taking_turns([rng.choice(questions), answer])


# ---------------------------------------------------------------------------------------------------------------------
# Rows of conversations, to train on


class Conversations:
    """A split of conversations, packed into rows of seq_len inputs and their targets. A conversation that is longer
    than a row is cut after an answer; without an answer that fits, it is left out. Tokens and masks stay in their
    memory-mapped files: an index tells where the conversations of each row are."""

    def __init__(self, shards: list[np.ndarray], masks: list[np.ndarray], seq_len: int, separator: int):
        self.tokens, self.masks = Windows(shards, seq_len), Windows(masks, seq_len)
        self.seq_len, self.separator, stops, flips, previous = seq_len, separator, [], [], False
        # In u u a a # u a # (# separates conversations, a is learned) conversations stop at 4 and 7. The mask flips at
        # 2, 4, 6 and 7, where answers begin and end in turn.
        for begin in range(0, self.tokens.n_tokens, CHUNK):
            tokens, mask = (data.window(begin, begin + CHUNK) for data in (self.tokens, self.masks))
            stops.append(begin + np.flatnonzero(tokens == separator))
            flips.append(begin + np.flatnonzero(np.diff(mask, prepend=previous)))
            previous = mask[-1]
        stops, flips = np.concatenate(stops), np.concatenate(flips)
        begins, ends = flips[:-1:2], flips[1::2]  # as many of each, whatever the mask
        n_learned = np.append(0, np.cumsum(ends - begins))  # in the first answer, in the first two, ...
        starts = np.append(0, stops + 1)[:-1]
        limits = np.minimum(stops, starts + seq_len + 1)
        # How many answers end before each conversation begins, before it stops, and before the limit of what fits
        before, last, fitting = (np.searchsorted(ends, places, side="right") for places in (starts, stops, limits))
        fits = fitting > before
        self.n_cut, self.n_left_out = int(np.sum(fits & (fitting < last))), int(np.sum(~fits))
        spans = np.stack([starts[fits], ends[fitting[fits] - 1]], axis=1)
        rows = pack(lengths := spans[:, 1] - spans[:, 0], seq_len + 1)
        self.counts = np.bincount(rows, (n_learned[fitting] - n_learned[before])[fits]).astype(np.int64)  # targets
        self.n_tokens, self.n_windows = int(lengths.sum()), len(self.counts)
        order = np.lexsort((-lengths, rows))  # row by row, the longest first
        self.spans, self.bounds = spans[order], np.searchsorted(rows[order], np.arange(self.n_windows + 1))

    def count(self, indices: np.ndarray) -> int:
        """How many targets of these rows the loss counts."""
        return int(self.counts[indices].sum())

    def get(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The inputs and targets [len(indices), seq_len] of these rows, and the number of each input's conversation."""
        shape = len(indices), self.seq_len + 1
        tokens, mask, numbers = np.full(shape, self.separator), np.zeros(shape, bool), np.full(shape, self.seq_len)
        for row, index in enumerate(indices):
            at = 0
            for number, (begin, end) in enumerate(self.spans[slice(*self.bounds[index : index + 2])]):
                here = np.s_[row, at : (at := at + end - begin)]
                tokens[here], mask[here] = self.tokens.window(begin, end), self.masks.window(begin, end)
                numbers[here] = number  # padding keeps the highest
        targets = np.where(mask, tokens, IGNORED)
        return tokens[:, :-1], targets[:, 1:], numbers[:, :-1].copy()


def pack(lengths: np.ndarray, size: int) -> np.ndarray:
    """Pack items into rows by best fit: the longest first, each into the fullest row that has room for it. Returns the
    row of each item: pack([3, 5, 1, 2], 6) -> [1, 0, 0, 1]"""
    rows = np.empty(len(lengths), np.int64)
    rooms = [size]  # that rows have left, sorted
    having = defaultdict(list, {size: [0]})  # each of these rooms: a heap of the rows that have it
    for item in np.argsort(-lengths, kind="stable").tolist():
        room = rooms[at := bisect_left(rooms, lengths[item])]
        rows[item] = row = heappop(having[room])
        if room == size:
            having[size] = [row + 1]  # there is always one more empty row
        elif not having[room]:
            del rooms[at]
        if not having[left := room - int(lengths[item])]:
            insort(rooms, left)
        heappush(having[left], row)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# The terminal

HELP = __doc__[__doc__.index("In the terminal") :].rstrip()


def talk(model: GPT, tokenizer: Tokenizer, args: argparse.Namespace, **options) -> None:
    """Read questions and commands from stdin until it ends, and print each answer as it is generated. The cache keeps
    the keys and values of the conversation, so that each turn computes those of its own tokens only."""
    weight = model.embedding.weight
    cache = KVCache(model.config, 1, weight.device, weight.dtype)
    messages, post = [], ""
    if sys.stdin.isatty():
        print(HELP, file=sys.stderr)
    for line in map(str.strip, typed()):
        command, rest = regex.fullmatch(r"(?s)(\S+)\s*(.*)", line).groups()
        if command == "/clear" and not rest:
            messages, post = [], ""
            print("(a new conversation)", file=sys.stderr)
        elif command == "/system" and rest:
            messages, post = [{"role": "system", "content": rest}], ""
            print(f"(a new conversation, in which the model is told: {rest})", file=sys.stderr)
        elif command == "/post" and rest:
            try:
                text = Path(rest).read_text(encoding="utf-8-sig").strip() if os.path.isfile(rest) else rest
                post = f"{text}\n\n"
                print(f"(a post of {len(text):,} characters stands before the next question)", file=sys.stderr)
            except (OSError, ValueError) as error:
                print(f"cannot read {rest}: {error}", file=sys.stderr)
        elif command.startswith("/"):
            print(HELP, file=sys.stderr)
        else:
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


def fitting_prompt(tokenizer: Tokenizer, messages: list[Message], seq_len: int, n_tokens: int) -> list[int]:
    """The tokens of the conversation up to the next answer, which gets room for n_tokens or a quarter of the context.
    The oldest questions and answers are removed to make room. A last question that does not fit alone is removed too,
    and the result is empty."""
    n_system = int(messages[0]["role"] == "system")  # these stay
    limit, before = seq_len - min(n_tokens, seq_len // 4), len(messages)
    if len(render(tokenizer, [*messages[:n_system], messages[-1]], ask=True)[0]) > limit:
        print(f"this is too long for the model's context of {seq_len} tokens", file=sys.stderr)
        messages.pop()
        return []
    while len(ids := render(tokenizer, messages, ask=True)[0].tolist()) > limit:
        del messages[n_system : n_system + 2]
    if dropped := (before - len(messages)) // 2:
        print(f"(the context is full; questions dropped, oldest first: {dropped})", file=sys.stderr)
    return ids


def dialogues(model: GPT, tokenizer: Tokenizer, data: Conversations) -> str:
    """Three held-out conversations up to the first answer, control tokens included, and what the model answers, for the
    end of a training run."""
    texts = []
    for row in sorted({0, data.n_windows // 2, data.n_windows - 1}):
        inputs, targets, _ = (array[0] for array in data.get(np.array([row])))
        ids = inputs[: (targets != IGNORED).argmax() + 1].tolist()
        steps = continuations(model.eval(), tokenizer, ids, 1, model.config.seq_len - len(ids), temperature=0)
        texts.append(tokenizer.decode(ids) + "".join(text for (text,) in steps))
    return "\n\n".join(texts)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def main() -> None:
    tolerate_streams()
    sys.stdout.reconfigure(encoding="utf-8")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.allow_abbrev = False  # --prep would not be seen in the next lines
    add = parser.add_argument
    add("--prepare", action="store_true", help="make a data set; with --help: the flags for that")
    if "--prepare" in sys.argv[1:]:
        add("inputs", nargs="*", metavar="INPUT", help="conversations (default: questions about Python's library)")
        add("--out", help="folder for the data set (data/NAME, from the first input's name; data/chat)")
        add("--tokenizer", default=DEFAULT_TOKENIZER, help="that of the model to fine-tune (%(default)s)")
        add("--val_fraction", type=float, help="fraction to hold out (0.01; 0.05 of the default conversations)")
        args = parser.parse_args()
        out = args.out if args.out is not None else default_out(args.inputs, "chat")
        return prepare(args.inputs, out, args.tokenizer, args.val_fraction)
    add("source", nargs="?", help="a run, a .json or .pt file in it, or a published model's folder (the newest run)")
    add_flags(parser, temperature=0.0)
    args = parser.parse_args()
    (model, tokenizer, source, was_trained), options = open_model(args.source, args)
    if not tokenizer.template:
        advice = "fine-tune it on some first, see python chat.py --help"
        fail(tokenizer.refusal or f"{source} has no tokens for conversations: {advice}")
    if not was_trained:
        print(f"{source} was not trained on conversations, so do not expect answers", file=sys.stderr)
    talk(model, tokenizer, args, **options)


if __name__ == "__main__":
    run(main)
