"""Text by a tokenizer, and conversations of which only the answers are learned."""

import dataclasses
import json
import sys
import types

import jax
import numpy as np
import pytest

import tests.examples.sizes  # noqa: F401  # first: it makes the example importable

from pretraining import chat, flags, text  # isort: skip
from pretraining import corpus as corpora  # isort: skip
from pretraining.data import STRETCH, global_batch, make_batch  # isort: skip
from pretraining.optional import MissingPackage  # isort: skip

import jaxpipe

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}A: {{ m.content }}{{ eos_token }}"
    "{% else %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
)
SETTINGS = {"bos_token": "<", "eos_token": {"content": ">"}, "chat_template": TEMPLATE}
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4, I think"},
]


class Letters:
    """A tokenizer of letters, with what is used of the package's."""

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return types.SimpleNamespace(ids=[ord(c) for c in text], offsets=[(i, i + 1) for i in range(len(text))])

    def encode_batch(self, texts, add_special_tokens):
        return [self.encode(text, add_special_tokens) for text in texts]

    def get_vocab_size(self, with_added_tokens):
        return 128


@pytest.fixture
def letters(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    return text.Tokenizer(tmp_path / "tokenizer.json", Letters(), ord(">"), SETTINGS)


def write_lines(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def learned(tokens, said):
    return "".join(chr(token) if one else "_" for token, one in zip(tokens, said, strict=True))


def test_answers_alone_are_learned(letters):
    pytest.importorskip("jinja2", reason="needs the package jinja2")
    tokens, said = chat.encode(TALK, chat.make_render(letters), letters)
    assert "".join(map(chr, tokens)) == "<system: Be kind.\nuser: 1 + 1?\nA: 2>user: 2 + 2?\nA: 4, I think>"
    assert learned(tokens, said).strip("_").replace("_", "") == "2>4, I think>"
    assert learned(tokens, said).endswith("____4, I think>")


def test_conversations_are_sequences_of_their_own(letters, tmp_path):
    pytest.importorskip("jinja2", reason="needs the package jinja2")
    path = write_lines(
        tmp_path / "a.jsonl", [{"messages": [*TALK[:2], {"role": "assistant", "content": str(i)}]} for i in range(12)]
    )
    assert chat.are_conversations([path])
    corpus = chat.load_conversations([path], letters, 128, 64, "a.jsonl")
    assert (len(corpus.train.ends), len(corpus.held_out.ends)) == (11, 1)
    batch = make_batch(corpus.train, 0, 0, 11, 64)
    assert sorted(batch["mask"].sum(1)) == [2.0] * 9 + [3.0] * 2  # the answer and its end
    answers = {learned(row, mask).replace("_", "") for row, mask in zip(batch["targets"], batch["mask"], strict=True)}
    assert answers == {f"{i}>" for i in range(12) if i != 9}
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    # What follows the last target is no token to experts.
    assert batch["real"].dtype == bool and set(batch) == set(corpus.train.arrays)
    assert batch["real"].sum(1).tolist() == [int(np.flatnonzero(row)[-1]) + 1 for row in batch["mask"]]
    assert (np.diff(batch["real"].astype(int)) <= 0).all()
    one = jax.sharding.NamedSharding(jaxpipe.make_mesh(pp=1), jax.sharding.PartitionSpec())
    made = global_batch(corpus.train, 0, 0, 11, 64, one)
    jax.tree.map(np.testing.assert_array_equal, made, batch)
    # Any rows of any step, and another order in another epoch.
    some = make_batch(corpus.train, 0, 3, 4, 64, rows=[2, 3])
    np.testing.assert_array_equal(some["tokens"], make_batch(corpus.train, 0, 3, 4, 64)["tokens"][2:])
    assert not np.array_equal(batch["tokens"], make_batch(corpus.train, 0, 1, 11, 64)["tokens"])


def test_conversations_that_are_too_long_are_counted(letters, tmp_path):
    pytest.importorskip("jinja2", reason="needs the package jinja2")
    short, long = TALK[1:3], [*TALK[1:3], {"role": "user", "content": "x" * 99}, TALK[4]]
    late = [{"role": "user", "content": "x" * 99}, TALK[4]]
    path = write_lines(tmp_path / "a.jsonl", [{"messages": one} for one in (short, long, late, short)])
    with pytest.warns(UserWarning, match="2 conversations are longer than a sequence of 32 .* 1 have no answer"):
        corpus = chat.load_conversations([path], letters, 128, 32, "a.jsonl")
    assert len(corpus.train.ends) + len(corpus.held_out.ends) == 3


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"messages": []}, 'line 2: it has no "messages"'),
        ({"messages": [{"content": "a"}]}, 'line 2: message 1 has no "role"'),
        ({"messages": [{"role": "user", "content": None}]}, 'message 1 has no "content" that is a text'),
        ({"messages": TALK[:2]}, 'no message is of role "assistant"'),
        ({"messages": TALK, "tools": "[]"}, 'line 2: its "tools" are "\\[\\]": give a list of JSON schemas'),
        ([1], "line 2 is JSON of list"),
        (
            {"messages": [{"role": "user", "content": "\ud83d!"}]},
            r"a\.jsonl, line 2 holds the surrogate '\\ud83d' alone",
        ),
    ],
)
def test_lines_that_are_no_conversations_are_told(letters, tmp_path, value, message):
    pytest.importorskip("jinja2", reason="needs the package jinja2")
    path = write_lines(tmp_path / "a.jsonl", [{"messages": TALK}, value])
    with pytest.raises(ValueError, match=message):
        chat.load_conversations([path], letters, 128, 64, "a.jsonl")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('no systems') }}", "the chat template says: no systems"),
        ("{% for %}", "is none"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "the chat template refuses it: SecurityError"),
        ("{{ messages | length }}", r"asks for message 3 with '2', and writes '3' there once it is answered"),
        # As DeepSeek-R1's, which opens the thoughts that it leaves out of what was said.
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}",
            r"asks for message 3 with '<think>', and writes '2' there .* a template for training",
        ),
        (
            "{% for m in messages %}{{ m.content }}{{ '.' if loop.last and m.role == 'assistant' }}{% endfor %}",
            "writes message 3 in another way",
        ),
    ],
)
def test_templates_that_do_not_serve_are_told(letters, template, message):
    pytest.importorskip("jinja2", reason="needs the package jinja2")
    letters = dataclasses.replace(letters, settings={"chat_template": template})
    with pytest.raises(ValueError, match=message):
        chat.encode(TALK, chat.make_render(letters), letters)


def test_templates_are_given_what_transformers_gives_them(letters, tmp_path):
    pytest.importorskip("jinja2", reason="needs the package jinja2")
    template = (
        "{% if tools is not none %}{{ tools | tojson }} {{ tools | tojson(indent=1) }}{% endif %}"
        "{{ documents is none }} {{ strftime_now('%Y') | length }} {{ messages[0].content | tojson }}"
    )
    render = chat.make_render(dataclasses.replace(letters, settings={"chat_template": template}))
    said = [{"role": "user", "content": "a<b> & 'ü'"}]
    assert render(said, False) == "True 4 \"a<b> & 'ü'\""
    assert render(said, False, [{"name": "x"}]).startswith('[{"name": "x"}] [\n {\n  "name": "x"\n }\n]True')
    # A template for training marks answers; the text is the same.
    marked = TEMPLATE.replace("A: {{ m.content }}", "A: {% generation %}{{ m.content }}{% endgeneration %}")
    assert marked != TEMPLATE
    marked = chat.make_render(dataclasses.replace(letters, settings=SETTINGS | {"chat_template": marked}))
    assert marked(TALK, True) == chat.make_render(letters)(TALK, True)
    template = "{{ (tools or []) | length }}:{% for m in messages %}{{ m.content }}{% endfor %}"
    letters = dataclasses.replace(letters, settings={"chat_template": template})
    path = write_lines(tmp_path / "a.jsonl", [{"messages": TALK[1:3], "tools": [{}] * i} for i in range(2)])
    corpus = chat.load_conversations([path], letters, 128, 64, "a.jsonl")
    for part, first in ((corpus.train, "0:"), (corpus.held_out, "1:")):
        assert "".join(map(chr, part.tokens)) == first + "1 + 1?2"


def test_documents_become_a_file_of_tokens_once(letters, tmp_path):
    lines = write_lines(tmp_path / "a.jsonl", [{"text": "ab"}, {"text": "c"}])
    plain = tmp_path / "b.txt"
    plain.write_bytes(b"one\r\ntwo\n" * 20_000)
    (tmp_path / "c.txt").write_text("")
    paths = [lines, plain, tmp_path / "c.txt"]
    corpus = text.load_texts(paths, letters, 128, tmp_path / "cache", "files")
    (kept,) = (tmp_path / "cache").iterdir()
    wanted = "ab>c>" + "one\r\ntwo\n" * 20_000 + ">>"
    assert np.fromfile(kept, np.uint32).tolist() == [ord(c) for c in wanted]
    assert (corpus.train.total, corpus.train.separator) == (len(wanted), ord(">"))
    before = kept.stat().st_mtime_ns
    text.load_texts(paths, letters, 128, tmp_path / "cache", "files")
    assert kept.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="has 128 tokens, the model a vocabulary of 100"):
        text.load_texts(paths, letters, 100, tmp_path / "cache", "files")
    with pytest.raises(ValueError, match=rf"hold 5 tokens: at least {2 * STRETCH} are needed"):
        text.load_texts([lines], letters, 128, tmp_path / "cache", "files")
    with pytest.raises(ValueError, match=r"line 1: \['other'\] without \"text\""):
        list(text.documents([write_lines(tmp_path / "d.jsonl", [{"other": 1}])]))
    with pytest.raises(ValueError, match=r"line 1 holds the surrogate '\\udc00' alone"):
        list(text.documents([write_lines(tmp_path / "d.jsonl", [{"text": "a\udc00"}])]))
    # Nothing is left of a file that could not be written to its end.
    with pytest.raises(ValueError, match="line 1 holds"):
        text.load_texts([plain, tmp_path / "d.jsonl"], letters, 128, tmp_path / "other", "files")
    assert not list((tmp_path / "other").iterdir())
    (tmp_path / "e.txt").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(ValueError, match=r"e\.txt is no text in UTF-8"):
        list(text.documents([tmp_path / "e.txt"]))


def test_long_documents_are_cut_at_lines(monkeypatch, tmp_path):
    monkeypatch.setattr(text, "PIECE", 10)
    path = tmp_path / "a.txt"
    path.write_text("12345\n" * 4)
    assert list(text.documents([path])) == [("12345\n" * 2, False), ("12345\n" * 2, True)]


def test_tokenizers_of_the_package_are_opened(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="needs the package tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.add_special_tokens(["<end>"])
    model.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"nothing beside .* says which token ends a document"):
        text.open_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": [1, 2]}')
    assert text.open_tokenizer(tmp_path).end == 1
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<end>"}}')
    opened = text.open_tokenizer(tmp_path / "tokenizer.json")
    assert opened.end == 3
    assert [one.tolist() for one in opened.encode(["a b c", ""])] == [[0, 1, 2], []]
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<unknown>"}')
    assert text.open_tokenizer(tmp_path).end == 1
    # Documents are whole, whatever the tokenizer was last saved for.
    model.enable_truncation(2)
    model.enable_padding(length=6)
    model.save(str(tmp_path / "tokenizer.json"))
    assert [one.tolist() for one in text.open_tokenizer(tmp_path).encode(["a b c", ""])] == [[0, 1, 2], []]
    assert text.open_tokenizer(tmp_path, 2).end == 2
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer"):
        text.open_tokenizer(tmp_path)


def test_a_missing_package_names_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingPackage, match=r"jaxpipe\[text\]"):
        text.open_tokenizer(tmp_path)


def test_what_a_run_reads(letters, tmp_path, monkeypatch):
    def corpus(*arguments, vocab=256):
        args = flags.train_parser().parse_args(list(map(str, arguments)))
        return corpora.open_corpus(args, corpora.reader_of_training(args, vocab), args.weights, vocab, 64)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(text, "open_tokenizer", lambda path, end: letters)
    (tmp_path / "b.txt").write_text("some words\n" * 20_000)
    assert corpus("--data", tmp_path / "b.txt").train.separator == 0
    assert corpus("--data", tmp_path / "b.txt", "--tokenizer", tmp_path).train.separator == ord(">")
    assert list((tmp_path / "runs" / "tokens").iterdir())
    assert corpus("--data", tmp_path / "b.txt", "--from", tmp_path).train.separator == ord(">")
    lines = write_lines(tmp_path / "a.jsonl", [{"text": "ab"}])
    with pytest.raises(ValueError, match=r"a\.jsonl holds documents or conversations: name"):
        corpus("--data", lines)
    # Of a folder without a tokenizer only a model of bytes is known to read text.
    bare = tmp_path / "bare"
    assert corpus("--data", tmp_path / "b.txt", "--from", bare).train.separator == 0
    with pytest.raises(ValueError, match=r"b\.txt is text, and no tokenizer\.json says .* of it: name .* --tokenizer"):
        corpus("--data", tmp_path / "b.txt", "--from", bare, vocab=128)
    for folder in (bare, tmp_path):
        with pytest.raises(ValueError, match=r"--data is missing: .* nothing to .*; name texts, with --tokenizer"):
            corpus("--from", folder, vocab=128)
    with pytest.raises(ValueError, match="without --data"):
        corpus("--tokenizer", tmp_path)
    with pytest.raises(ValueError, match="no files match"):
        corpus("--data", tmp_path / "none*", "--tokenizer", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "facts", "wanted"),
    [
        ([], {}, "bytes"),
        (["--data", "*.txt"], {}, "bytes"),
        (["--data", "*.txt", "--tokenizer", "t.json"], {}, "t.json"),
        (["--data", "*.npy", "--tokenizer", "t.json"], {}, "t.json"),
        (["--data", "*.npy", "--from", "own"], {}, "own/tokenizer.json"),
        # Of tokens nobody knows what text they are, unless the folder that the run began with does.
        (["--data", "*.npy"], {}, None),
        (["--data", "*.npy"], {"hugging_face": {"folder": "own"}}, "own/tokenizer.json"),
    ],
)
def test_an_evaluation_reads_text_as_its_run_did(tmp_path, monkeypatch, arguments, facts, wanted):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    for name in ("a.txt", "a.npy", "t.json", "own/tokenizer.json"):
        (tmp_path / name).write_text("{}")
    fact = corpora.reader_fact(flags.train_parser().parse_args(arguments), 1000)
    reader = corpora.reader_of_run({**facts, "reader": fact}, 1000)
    assert (reader if reader in (None, "bytes") else (tmp_path / reader).relative_to(tmp_path).as_posix()) == wanted
