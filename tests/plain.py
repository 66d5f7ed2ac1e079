"""The plain program that every pipeline is compared with: Python loops over microbatches and stages."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxpipe


def plain_value_and_grad(stage, schedule, *, embed=None, head=None, weight=None):
    """The same signature and result as `jaxpipe.value_and_grad`'s, without a mesh or a pipeline."""
    rows = {s: row for row, s in enumerate(schedule.storage_order)}

    def objective(params, batch, rng):
        losses, weights, aux_losses, metrics = [], [], [], {}
        micro = split_batch(batch, schedule.num_microbatches)
        for m, data in enumerate(micro):
            context = lambda s, m=m, data=data: jaxpipe.Context(  # noqa: E731
                jnp.int32(s), jnp.int32(m), fold(rng, s, m), data
            )
            x = data if embed is None else embed(params.outer, data, context(-1))
            aux_loss = 0.0
            for s in range(schedule.num_stages):
                output = stage(jax.tree.map(lambda leaf, s=s: leaf[rows[s]], params.stages), x, context(s))
                if isinstance(output, jaxpipe.Output):
                    x = output.value
                    aux_loss += 0.0 if output.aux_loss is None else output.aux_loss
                    metrics = add_metrics(metrics, output.metrics)
                else:
                    x = output
            loss = 0.0
            if head is not None:
                loss = head(params.outer, x, data, context(schedule.num_stages))
                if isinstance(loss, jaxpipe.Output):
                    metrics = add_metrics(metrics, loss.metrics)
                    loss = loss.value
            losses.append(loss + aux_loss)
            aux_losses.append(aux_loss)
            weights.append(1.0 if weight is None else weight(data))
        share = [w / sum(weights) for w in weights]
        aux = dict(metrics, aux_loss=sum(s * a for s, a in zip(share, aux_losses, strict=True)))
        return sum(s * loss for s, loss in zip(share, losses, strict=True)), aux

    def value_and_grad(params, batch, rng=None):
        return jax.value_and_grad(objective, has_aux=True)(params, batch, rng)

    return value_and_grad


def split_batch(batch, count):
    """A list of microbatches, contiguous."""
    return [
        jax.tree.map(lambda leaf, m=m: leaf[m * (len(leaf) // count) : (m + 1) * (len(leaf) // count)], batch)
        for m in range(count)
    ]


def fold(rng, stage, microbatch):
    """The key that the library documents for a stage and microbatch."""
    return None if rng is None else jax.random.fold_in(jax.random.fold_in(rng, stage + 1), microbatch)


def add_metrics(total, metrics):
    return {name: total.get(name, 0) + value for name, value in metrics.items()} | {
        name: value for name, value in total.items() if name not in metrics
    }


def cosine_difference(x, y):
    """1 - 2xy / (x^2 + y^2) in float64, DeepSeek's measure."""
    x, y = np.asarray(x, np.float64).ravel(), np.asarray(y, np.float64).ravel()
    norm = (x * x + y * y).sum()
    return 0.0 if norm == 0 else float(1 - 2 * (x * y).sum() / norm)


def assert_trees_close(actual, expected, *, rtol, atol=0.0):
    """Same structure, shapes and dtypes; values within rtol of each leaf's largest magnitude."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), e in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a), np.asarray(e)
        assert a.shape == e.shape and a.dtype == e.dtype, (path, a.shape, e.shape, a.dtype, e.dtype)
        scale = float(np.abs(e).max(initial=0.0))
        np.testing.assert_allclose(a, e, rtol=rtol, atol=rtol * scale + atol, err_msg=jax.tree_util.keystr(path))
