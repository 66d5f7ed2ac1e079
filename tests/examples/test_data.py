"""Data of the pretraining example: parts, order, hosts, files."""

import itertools
import pathlib
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples"))

from pretraining import data
from pretraining.data import STRETCH, Part


def make_part(length, *, held_out=False, separator=None, vocab=1 << 21, files=1):
    """A part whose tokens are their own places."""
    cuts = np.linspace(0, length, files + 1).astype(int)
    arrays = tuple(np.arange(a, b) for a, b in itertools.pairwise(cuts))
    return Part(arrays, held_out, separator, vocab)


def test_corpus_is_deterministic_and_held_out_text_is_apart():
    a, b = data.load_corpus(max_tokens=2_000_000), data.load_corpus(max_tokens=2_000_000)
    np.testing.assert_array_equal(a.train.read(0, len(a.train)), b.train.read(0, len(b.train)))
    assert len(a.train) + len(a.held_out) == 2_000_000
    assert 0 < len(a.held_out) < 0.15 * len(a.train)
    assert 2.5 < data.unigram_entropy(a.train) < 4


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize(
    ("stretches", "extra", "held_out"),
    [(2, 0, [1]), (2, 1, [1]), (9, 5, [8]), (10, 0, [9]), (11, 7, [9]), (19, 3, [9, 19]), (20, 3, [9, 19])],
)
def test_whole_stretches_are_held_out(stretches, extra, held_out, files):
    """Both parts have at least one whole stretch, and a long text's last piece goes where a whole one would."""
    length = stretches * STRETCH + extra
    is_held = np.isin(np.arange(length) // STRETCH, held_out)
    for part, places in (
        (make_part(length, files=files), ~is_held),
        (make_part(length, held_out=True, files=files), is_held),
    ):
        assert len(part) == places.sum()
        np.testing.assert_array_equal(part.read(0, len(part)), np.flatnonzero(places))
        np.testing.assert_array_equal(part.read(5, len(part) - 7), np.flatnonzero(places)[5:-7])


def test_batches_depend_on_seed_and_step_alone():
    part = make_part(2 * STRETCH)
    first, again = (data.make_batch(part, 1, 2, 4, 8) for _ in range(2))
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    for other in (data.make_batch(part, 1, 3, 4, 8), data.make_batch(part, 2, 2, 4, 8)):
        assert not np.array_equal(first["tokens"], other["tokens"])
    some = data.make_batch(part, 1, 2, 4, 8, rows=[3, 1])
    np.testing.assert_array_equal(some["targets"], first["targets"][[3, 1]])


def test_an_epoch_sees_every_window_once_in_an_order_of_its_own():
    part, sequence = make_part(2 * STRETCH), 1000
    windows = (len(part) - 1) // sequence - 1
    epochs = []
    for epoch in range(2):
        rows = range(epoch * windows, (epoch + 1) * windows)
        starts = [int(data.make_batch(part, 0, row, 1, sequence)["tokens"][0, 0]) for row in rows]
        assert len({start // sequence for start in starts}) == windows
        assert len({start % sequence for start in starts}) == 1
        epochs.append(starts)
    assert np.abs(np.corrcoef(epochs[0], range(windows))[0, 1]) < 0.5
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("count", [1, 2, 3, 64, 1000, 4097])
def test_permutations(count):
    assert sorted(data.permuted(index, count, (3, 4)) for index in range(count)) == list(range(count))


def test_separators_are_no_targets():
    part = Part((np.arange(2 * STRETCH) % 5,), held_out=False, separator=3, vocab=5)
    batch = data.make_batch(part, 0, 0, 4, 32)
    np.testing.assert_array_equal(batch["mask"], batch["targets"] != 3)
    whole = Part(part.files, held_out=False, separator=None, vocab=5)
    assert data.make_batch(whole, 0, 0, 4, 32)["mask"].all()


@pytest.mark.parametrize("shape", [(8, 1), (4, 2), (1, 8)])
def test_devices_read_their_own_rows(shape):
    """The global batch is the same on any mesh, and no row is read that no device holds."""
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    part = make_part(2 * STRETCH)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(shape), ("pp", "dp"))
    batch = data.global_batch(part, 0, 7, 16, 8, NamedSharding(mesh, P("dp")))
    expected = data.make_batch(part, 0, 7, 16, 8)
    for name, value in expected.items():
        np.testing.assert_array_equal(batch[name], value)
        assert {shard.data.shape for shard in batch[name].addressable_shards} == {(16 // shape[1], 8)}


def test_files_are_read_in_order_and_kept_apart(tmp_path):
    for name in "ba":
        (tmp_path / f"{name}.txt").write_bytes(name.encode() * STRETCH + b"\0")
    corpus = data.load_corpus(str(tmp_path / "*.txt"))
    train, held_out = (part.read(0, len(part)) for part in (corpus.train, corpus.held_out))
    assert train[0] == ord("a") and set(held_out.tolist()) == {data.SEPARATOR, ord("b")}
    assert int((held_out == data.SEPARATOR).sum() + (train == data.SEPARATOR).sum()) == 2


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_tokens_are_mapped(tmp_path, dtype):
    tokens = (np.arange(3 * STRETCH) % 50_000).astype(dtype)
    tokens.tofile(tmp_path / "a.bin")
    np.save(tmp_path / "a.npy", tokens)
    for pattern in ("*.bin", "*.npy"):
        corpus = data.load_corpus(str(tmp_path / pattern), vocab=50_000, token_dtype=dtype, separator=7)
        assert isinstance(corpus.train.files[0], np.memmap) and corpus.train.separator == 7
        np.testing.assert_array_equal(corpus.train.read(5, 50), tokens[5:50])


def test_entropy_of_known_frequencies():
    for tokens, expected in (([0], 0), (range(256), np.log(256)), ([1, 1, 1, 2], 0.562335)):
        part = Part((np.resize(np.array(tokens), 2 * STRETCH),), False, None, 256)
        assert data.unigram_entropy(part) == pytest.approx(expected, abs=1e-6)


def test_too_little_text_is_an_error():
    with pytest.raises(ValueError, match=r"cut at 65536 tokens, hold 65536 tokens: at least 131072"):
        data.load_corpus(max_tokens=65536)
    with pytest.raises(ValueError, match=r"65536 tokens have no two windows of sequence \+ 1 = 40001"):
        data.make_batch(make_part(2 * STRETCH), 0, 0, 2, 40_000)


def test_files_that_cannot_be_read_as_tokens(tmp_path):
    def load(name, **options):
        return data.load_corpus(str(tmp_path / name), **options)

    with pytest.raises(ValueError, match=r"no files match .*nothing.txt: check the path"):
        load("nothing.txt")
    (tmp_path / "odd.bin").write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"odd.bin has 3 bytes, not a whole number of uint16 tokens"):
        load("odd.bin")
    np.save(tmp_path / "floats.npy", np.ones(4))
    with pytest.raises(ValueError, match=r"floats.npy holds float64\[4\]: tokens are integers"):
        load("floats.npy")
    (tmp_path / "text.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"text.npy is no .npy file"):
        load("text.npy")
    with pytest.raises(ValueError, match=r"kinds .bin, .npy: train on one kind"):
        load("*.*")
    with pytest.raises(ValueError, match=r"needs a vocabulary of 256, the model's is 100"):
        data.load_corpus(vocab=100)


def test_tokens_beyond_the_vocabulary_are_an_error(tmp_path):
    np.full(2 * STRETCH, 300, np.uint16).tofile(tmp_path / "a.bin")
    corpus = data.load_corpus(str(tmp_path / "a.bin"), vocab=256)
    with pytest.raises(ValueError, match=r"tokens from 300 to 300 and the model has a vocabulary of 256"):
        data.make_batch(corpus.train, 0, 0, 1, 8)
