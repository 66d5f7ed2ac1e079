"""The plain program that every pipeline is compared with: a loop over microbatches and one over stages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxpipe


def plain_value_and_grad(stage, schedule, *, embed=None, head=None, weight=None, rows=None):
    """The same signature and result as `jaxpipe.value_and_grad`'s, without a mesh or a pipeline; jitted.

    ``rows[s]`` is the row of stage s in the stacked parameters; by default s.
    """
    rows = range(schedule.num_stages) if rows is None else rows

    def run_microbatch(params, data, m, rng):
        """(weighted loss, weighted auxiliary loss, weight, metrics) of one microbatch."""

        def context(s):
            layer = -2 if s == schedule.num_stages else s
            of_microbatch = None if rng is None else jax.random.fold_in(rng, m)
            return jaxpipe.Context(jnp.int32(s), m, fold(rng, layer, m), data, jnp.int32(s), of_microbatch)

        x = data if embed is None else embed(params.outer, data, context(-1))
        aux_loss = jnp.zeros(())
        metrics = {}
        for s in range(schedule.num_stages):
            output = stage(jax.tree.map(lambda leaf, s=s: leaf[rows[s]], params.stages), x, context(s))
            if not isinstance(output, jaxpipe.Output):
                output = jaxpipe.Output(output)
            x = output.value
            aux_loss += 0.0 if output.aux_loss is None else output.aux_loss.astype(aux_loss.dtype)
            metrics = add_metrics(metrics, output.metrics)
        loss = jnp.zeros(())
        if head is not None:
            output = head(params.outer, x, data, context(schedule.num_stages))
            if isinstance(output, jaxpipe.Output):
                metrics = add_metrics(metrics, output.metrics)
                output = output.value
            loss = output
        w = (jnp.ones(()) if weight is None else weight(data)).astype(loss.dtype)
        return w * (loss + aux_loss.astype(loss.dtype)), w * aux_loss.astype(loss.dtype), w, metrics

    def objective(params, batch, rng):
        count = schedule.num_microbatches
        micro = jax.tree.map(lambda leaf: leaf.reshape(count, len(leaf) // count, *leaf.shape[1:]), batch)

        def body(_, inputs):
            return None, run_microbatch(params, *inputs, rng)

        # Rematerialised, or the residuals of all microbatches would be kept at once.
        _, sums = jax.lax.scan(jax.checkpoint(body), None, (micro, jnp.arange(count, dtype=jnp.int32)))
        loss, aux_loss, total, metrics = jax.tree.map(lambda leaf: leaf.sum(0, dtype=leaf.dtype), sums)
        return loss / total, dict(metrics, aux_loss=aux_loss / total)

    def value_and_grad(params, batch, rng=None):
        return jax.value_and_grad(objective, has_aux=True, allow_int=True)(params, batch, rng)

    return jax.jit(value_and_grad)


@functools.cache
def compiled_plain(stage, num_stages, num_microbatches, **functions):
    """The same: one program for all schedules of so many stages and microbatches."""
    schedule = jaxpipe.schedule.build("gpipe", num_stages, num_microbatches)
    return plain_value_and_grad(stage, schedule, **functions)


def split_batch(batch, count):
    """A list of microbatches, contiguous."""
    return [
        jax.tree.map(lambda leaf, m=m: leaf[m * (len(leaf) // count) : (m + 1) * (len(leaf) // count)], batch)
        for m in range(count)
    ]


def fold(rng, layer, microbatch):
    """The key that the library documents for a layer and microbatch; layer -1 is embed, -2 the head."""
    return None if rng is None else jax.random.fold_in(jax.random.fold_in(rng, microbatch), jnp.uint32(layer % 2**32))


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
        if e.dtype == jax.dtypes.float0:
            continue
        scale = float(np.abs(e).max(initial=0.0))
        np.testing.assert_allclose(a, e, rtol=rtol, atol=rtol * scale + atol, err_msg=jax.tree_util.keystr(path))
