"""Documents of a sequence that do not see each other: batches, and losses equal to those of separate sequences."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.examples.sizes import small  # first: it makes the example importable

from pretraining import corpus as corpora  # isort: skip
from pretraining import chat, data, flags, trainer  # isort: skip
import jaxpipe
from jaxpipe.deepseek import Server, build_model, serve

if jax.device_count() < 4:
    pytest.skip("needs 4 devices", allow_module_level=True)

# Layers of all kinds; a separator, 0, begins each document.
CONFIG = small(layers=2, redundant=0, mtp=True, balance_factor=0.0, bias_update_speed=0.0, sequence=12)
DOCUMENTS = [[0, 7, 8, 9, 3], [0, 5], [0, 11, 12, 13, 60], [0]]


def packed(documents):
    """One sequence, as data makes it."""
    tokens = np.concatenate(documents)
    part = data.Part((np.tile(tokens, 30_000),), False, 0, 64, apart=True)
    batch = part.batch(0, 0, 64, len(tokens) - 1)
    (row,) = np.flatnonzero((batch["tokens"][:, :5] == documents[0]).all(1))[:1]
    return {name: array[[row]] for name, array in batch.items()}


def wide(tree):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf, tree)


def test_a_batch_says_which_document_each_token_is_of():
    batch = packed(DOCUMENTS)
    assert batch["tokens"].tolist() == [np.concatenate(DOCUMENTS)[:-1].tolist()]
    assert batch["segments"].tolist() == [[1] * 5 + [2] * 2 + [3] * 5]
    assert batch["mask"].tolist() == [[1, 1, 1, 1, 0, 1, 0, 1, 1, 1, 1, 0]]
    assert batch["segments"].dtype == np.int32


def test_losses_and_gradients_are_those_of_separate_sequences(x64):
    """Of the model with multi-token prediction, in float64; and another document changes nothing of one's losses."""
    schedule = jaxpipe.schedule.build("1f1b", 1, 1)
    model = build_model(CONFIG, schedule, 0, dtype=jnp.float64)
    params = wide(model.params)
    pipeline = jax.jit(trainer.pipelined(model, schedule, jaxpipe.make_mesh(pp=1)))
    (whole, _), grads = pipeline(params, wide(packed(DOCUMENTS)))
    # Each loss is a mean, so of separate sequences sums are added, by which means are weighted: targets, and those of
    # the targets after them.
    plain = build_model(dataclasses.replace(CONFIG, mtp_weight=1.0), schedule, 0, dtype=jnp.float64, abstract=True)

    @functools.partial(jax.value_and_grad, allow_int=True)
    def part(params, tokens):
        targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
        mask = (targets != 0).astype(jnp.float64)
        ctx = jaxpipe.Context.make(0, jnp.int32(0), None, {}, num_stages=1)
        batch = {"tokens": tokens, "targets": targets, "mask": mask}
        own = jax.tree.map(lambda leaf: leaf[0], params.stages)
        y = plain.stage(own, plain.embed(params.outer, batch, ctx), ctx).value
        told = plain.head(params.outer, y, batch, ctx)
        later = jnp.maximum((mask[:, 1:] * mask[:, :-1]).sum(), 1)
        return told.value * mask.sum() / 9 + CONFIG.mtp_weight * told.aux_loss * later / 6

    each = jax.jit(part)  # compiled for each length
    parts = [each(params, np.array([document], np.int32)) for document in DOCUMENTS[:-1]]
    assert float(whole) == pytest.approx(sum(float(loss) for loss, _ in parts), rel=1e-10)
    for ours, *theirs in zip(*map(jax.tree.leaves, (grads, *(grads for _, grads in parts))), strict=True):
        if ours.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(ours, sum(map(np.asarray, theirs)), rtol=1e-8, atol=1e-10)
    # As one document each would see those before.
    batch = wide(packed(DOCUMENTS))
    batch["segments"] = np.ones_like(batch["segments"])
    assert abs(float(pipeline(params, batch)[0][0]) - float(whole)) > 1e-4


def test_a_pipeline_keeps_documents_apart():
    """Divided backward passes, and two layers' recomputation, against the plain program of the same batch."""
    config = dataclasses.replace(CONFIG, mtp=False, dense_layers=0, remat="layer")
    schedule, mesh = jaxpipe.schedule.build("zb1p", 2, 2), jaxpipe.make_mesh(pp=2)
    model = build_model(config, schedule, 0)
    batch = packed(DOCUMENTS)
    other = packed([DOCUMENTS[0], [0, 1, 2, 3, 4, 5], [0]])
    other = {name: np.pad(array, ((0, 0), (0, 1))) for name, array in other.items()}
    batch = {name: np.concatenate([array, other[name]]).astype(array.dtype) for name, array in batch.items()}
    (loss, _), grads = jax.jit(trainer.pipelined(model, schedule, mesh))(model.params, batch)
    (wanted, _), expected = jax.jit(trainer.plain_value_and_grad(model, parts=2))(model.params, batch)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-6)
    for ours, theirs in zip(*map(jax.tree.leaves, (grads, expected)), strict=True):
        if ours.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_an_evaluation_keeps_documents_apart():
    config = dataclasses.replace(CONFIG, mtp=False)
    model = build_model(config, jaxpipe.schedule.build("1f1b", 1, 1), 0)
    server = Server(config, serve(config, model.to_layers(model.params), dtype=jnp.float32))
    batch = packed(DOCUMENTS)
    found = server.score(*(batch[name] for name in ("tokens", "targets", "mask", "segments")))
    tokens = np.array([[*document, 0, 0, 0][:5] for document in DOCUMENTS[:-1]], np.int32)  # zeros are no targets
    targets = np.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    alone = server.score(tokens, targets, targets != 0)
    assert found.losses[0] == pytest.approx(alone.losses.sum(), rel=1e-5)
    with pytest.raises(ValueError, match=r"segments \(1, 3\): one shape for all"):
        server.score(batch["tokens"], batch["targets"], batch["mask"], np.zeros((1, 3), np.int32))


def test_documents_without_ends_cannot_be_kept_apart(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(200_000) % 50)

    def corpus(*arguments):
        args = flags.train_parser().parse_args(["--data", str(tmp_path / "a.npy"), *arguments])
        return corpora.open_corpus(args, corpora.BYTES, None, 64, 12)

    assert "segments" not in corpus().train.arrays
    found = corpus("--document-mask", "--separator", "3")
    assert found.train.arrays[-1] == found.held_out.arrays[-1] == "segments"
    with pytest.raises(ValueError, match=r"--document-mask: name the token .* with --separator"):
        corpus("--document-mask")
    talks = chat.Conversations(np.arange(4), np.ones(4, bool), np.array([2, 4]), 0)
    with pytest.raises(ValueError, match="are conversations, each in a sequence"):
        data.keep_apart(data.Corpus(talks, talks, "talks"))
