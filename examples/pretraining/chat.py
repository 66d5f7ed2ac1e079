"""Conversations to train on: what the assistant says is learned, all else is only read.

A line of a .jsonl file is a conversation, ``{"messages": [{"role": "user", "content": "..."}, {"role": "assistant",
"content": "..."}]}``, with ``"tools"`` where there are any. The model's own chat template writes it as text, as
`apply_chat_template` of transformers does. Each conversation is a sequence of its own, so none reads another; the rest
of the sequence is filled up, counts for nothing in the loss, and goes to no expert.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from jaxpipe.deepseek.model import REAL
from pretraining.data import Corpus, permuted
from pretraining.optional import need
from pretraining.text import Tokenizer, check_vocab, json_lines

HELD_OUT = 10
"""One in so many conversations is held out."""

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]] | None


class Render(Protocol):
    """Writes a conversation as text; see `make_render`."""

    def __call__(self, messages: Messages, answer_follows: bool, tools: Tools = None) -> str:
        """The text, with what the model is asked with if an answer is to follow."""
        ...


@dataclasses.dataclass(frozen=True)
class Conversations:
    """Tokens of conversations, and which of them the assistant has said.

    Attributes:
      tokens: of all, one behind the other.
      said: whether each is learned; as long.
      ends: where each conversation ends.
      fill: the token behind a conversation, never a target.
    """

    tokens: np.ndarray
    said: np.ndarray
    ends: np.ndarray
    fill: int

    def __len__(self) -> int:
        """Tokens."""
        return len(self.tokens)

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of a batch's arrays."""
        return "tokens", "targets", "mask", REAL

    @property
    def total(self) -> int:
        """Tokens."""
        return len(self.tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens one behind the other."""
        return self.tokens[start:stop]

    def batch(
        self, seed: int, step: int, batch: int, sequence: int, rows: Sequence[int] | None = None
    ) -> dict[str, np.ndarray]:
        """The batch of a step; see `pretraining.data.make_batch`. Each epoch has an order of its own.

        Its ``"real"``, ``bool[rows, sequence]``, ends with the last target of a sequence: what stands behind it can
        change no loss, and shall not take experts' places.

        >>> part = Conversations(np.array([5, 6, 7, 8]), np.array([False, True, True, True]), np.array([2, 4]), 0)
        >>> found = part.batch(seed=0, step=0, batch=2, sequence=3)
        >>> sorted(map(tuple, found["tokens"].tolist())), found["mask"].sum(1).tolist()
        ([(5, 6, 0), (7, 8, 0)], [1.0, 1.0])
        >>> found["real"].tolist()
        [[True, False, False], [True, False, False]]
        """
        count = len(self.ends)
        rows = range(batch) if rows is None else rows
        tokens = np.full((len(rows), sequence + 1), self.fill, np.int32)
        mask = np.zeros((len(rows), sequence), np.float32)
        for place, row in enumerate(rows):
            epoch, position = divmod(step * batch + row, count)
            chosen = permuted(position, count, (seed, epoch))
            start, stop = int(self.ends[chosen - 1]) if chosen else 0, int(self.ends[chosen])
            size = min(stop - start, sequence + 1)
            tokens[place, :size] = self.tokens[start : start + size]
            mask[place, : size - 1] = self.said[start + 1 : start + size]
        real = np.maximum.accumulate(mask[:, ::-1], axis=1)[:, ::-1] > 0
        return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask, REAL: real}


def are_conversations(paths: Sequence[pathlib.Path]) -> bool:
    """Whether the first line of the first file is one."""
    first = next((value for path in paths if path.suffix == ".jsonl" for _, value in json_lines(path)), {})
    return "messages" in first


def load_conversations(
    paths: Sequence[pathlib.Path], tokenizer: Tokenizer, vocab: int, sequence: int, source: str
) -> Corpus:
    """Conversations of .jsonl files, one in ten held out, or the last one of fewer.

    Those that do not fit into a sequence are cut at its end, and those of which no answer is left are left out; a
    warning says how many.

    Raises:
      ValueError: a line that is no conversation, a template that is missing or refuses one, fewer than two
        conversations, a tokenizer of another model.
      MissingPackage: jinja2 is not installed.
    """
    check_vocab(tokenizer, vocab)
    render = make_render(tokenizer)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    cut = empty = 0
    for path in paths:
        for number, value in json_lines(path):
            try:
                tools = check_tools(value.get("tools"))
                tokens, said = encode(check_messages(value.get("messages")), render, tokenizer, tools)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
            cut += len(tokens) > sequence + 1
            tokens, said = tokens[: sequence + 1], said[: sequence + 1]
            if not said[1:].any():
                empty += 1
                continue
            found.append((tokens, said))
    if cut or empty:
        warnings.warn(
            f"{source}: {cut} conversations are longer than a sequence of {sequence} tokens and cut, {empty} have no "
            "answer within it and are left out; --sequence makes it longer",
            stacklevel=2,
        )
    if len(found) < 2:
        raise ValueError(f"{source} holds {len(found)} conversations with answers: two are needed, one to hold out")
    last = min(HELD_OUT, len(found)) - 1
    parts = [[one for i, one in enumerate(found) if (i % HELD_OUT == last) == held] for held in (False, True)]
    train, held_out = (_joined(part, tokenizer.end) for part in parts)
    return Corpus(train, held_out, f"{len(found)} conversations of {source}")


def encode(
    messages: Messages, render: Render, tokenizer: Tokenizer, tools: Tools = None
) -> tuple[np.ndarray, np.ndarray]:
    """A conversation's tokens, and which of them are learned: those of the assistant's messages and their ends.

    The text up to an answer is that which the model is asked with when it is to answer; what the template adds when the
    answer is there is what it is to learn.

    Raises:
      ValueError: a template that writes the beginning of a conversation in another way than the whole.
    """
    text, spans = render(messages, False, tools), []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, through = render(messages[:index], True, tools), render(messages[: index + 1], False, tools)
        if not through.startswith(before):
            alike = [one == other for one, other in zip(before, through, strict=False)]
            same = [*alike, False].index(False)
            raise ValueError(
                f"the chat template of {tokenizer.path.parent} asks for message {index + 1} with "
                f"{before[same:][:40]!r}, and writes {through[same:][:40]!r} there once it is answered, so nobody can "
                "tell what was answered: put a template for training, which writes both alike, into "
                "chat_template.jinja"
            )
        if not text.startswith(through):
            raise ValueError(
                f"the chat template of {tokenizer.path.parent} writes message {index + 1} in another way when the "
                "conversation goes on, so nobody can tell what was answered; keep the last answer alone"
            )
        spans.append((len(before), len(through)))
    found = tokenizer.model.encode(text, add_special_tokens=False)
    starts = np.array([start for start, _ in found.offsets], np.int64)
    said = np.zeros(len(starts), bool)
    for start, stop in spans:
        said |= (starts >= start) & (starts < stop)
    return np.asarray(found.ids, np.int32), said


def make_render(tokenizer: Tokenizer) -> Render:
    """``render(messages, whether an answer shall follow, tools)``: a conversation's text by the model's chat template.

    The template is run in a sandbox, and given what transformers gives it: the messages, tools (documents are None),
    tokens like ``bos_token``, ``raise_exception``, ``strftime_now``, and a ``tojson`` that writes JSON as it is, where
    Jinja's own escapes it for HTML.

    Raises:
      ValueError: there is none.
      MissingPackage: jinja2 is not installed.
    """
    path = tokenizer.path.with_name("chat_template.jinja")
    template = path.read_text(encoding="utf-8") if path.is_file() else tokenizer.settings.get("chat_template")
    if isinstance(template, list):
        named = {one.get("name"): one.get("template") for one in template}
        template = named.get("default")
    if not isinstance(template, str):
        raise ValueError(
            f"{path.parent} has no chat template: put one into chat_template.jinja, or chat_template of "
            "tokenizer_config.json"
        )
    sandbox = need("jinja2.sandbox", "conversations", "jinja2", extra="text")

    def refuse(message: str) -> None:
        raise ValueError(f"the chat template says: {message}")

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _answers(need("jinja2.ext", "conversations", "jinja2", extra="text"))],
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    environment.filters["tojson"] = _to_json
    tokens = {name: value for name, value in map(_special, tokenizer.settings.items()) if value is not None}
    try:
        compiled = environment.from_string(template)
    except Exception as error:  # jinja's own, of many kinds
        raise ValueError(f"the chat template of {path.parent} is none: {error}") from None

    def render(messages: Messages, answer_follows: bool, tools: Tools = None) -> str:
        given = {"messages": messages, "add_generation_prompt": answer_follows, "tools": tools, "documents": None}
        try:
            return compiled.render(given | tokens)
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(f"the chat template refuses it: {type(error).__name__}: {error}") from None

    return render


def check_messages(value: Any) -> Messages:
    """A conversation.

    Raises:
      ValueError: it is none, or has no answer.
    """
    if not isinstance(value, list) or not value:
        raise ValueError('it has no "messages": a list of {"role": ..., "content": ...}')
    for index, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f'message {index + 1} has no "role": "system", "user" or "assistant"')
        if not isinstance(message.get("content"), str):
            raise ValueError(f'message {index + 1} has no "content" that is a text')
    if not any(message["role"] == "assistant" for message in value):
        raise ValueError('no message is of role "assistant", and answers alone are learned')
    return value


def check_tools(value: Any) -> Tools:
    """The tools of a conversation, as JSON schemas; None: there are none.

    Raises:
      ValueError: something else.
    """
    if value is not None and not (isinstance(value, list) and all(isinstance(one, dict) for one in value)):
        raise ValueError(f'its "tools" are {json.dumps(value)[:60]}: give a list of JSON schemas, or leave them out')
    return value


def _answers(extensions: Any) -> Any:
    """Jinja's extension for ``{% generation %}``, with which templates for training mark answers: read, and left out.

    What is learned follows from the texts alone; see `encode`.
    """

    class Answers(extensions.Extension):
        """Writes what stands within the tags as if they were not there."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            """The statements between the tags."""
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Answers


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _special(item: tuple[str, Any]) -> tuple[str, str | None]:
    """A name like "bos_token" and its text; None for other settings."""
    name, value = item
    value = value.get("content") if isinstance(value, dict) else value
    return name, value if name.endswith("_token") and isinstance(value, str) else None


def _joined(found: Sequence[tuple[np.ndarray, np.ndarray]], fill: int) -> Conversations:
    tokens, said = zip(*found, strict=True)
    ends = np.cumsum([len(one) for one in tokens])
    return Conversations(np.concatenate(tokens), np.concatenate(said), ends, fill)
