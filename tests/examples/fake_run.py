"""A run of the pretraining loop whose model is a few numbers: the loop, checkpoints and metrics are the real ones.

As a program it trains until it is done or killed: python -m tests.examples.fake_run OUT STEPS,
with flags of `pretraining.flags` that name its processes.
"""

import functools
import os
import pathlib
import sys
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples"))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from pretraining import hosts
from pretraining.checkpoint import Checkpoints, last_checkpoint
from pretraining.flags import train_parser as flags_parser
from pretraining.layout import Layout, describe
from pretraining.loop import LoopConfig, TrainFunctions, train
from pretraining.observe import Observer, Throughput

import jaxpipe

LAYERS, WIDTH = 8, 16
THROUGHPUT = Throughput(tokens=8, flops=1.0, peak=1e12)


class State(NamedTuple):
    """What `pretraining.trainer.TrainState` has, of any model."""

    params: Any
    opt_state: Any
    step: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array


class Fake:
    """Linear regression with one weight matrix a layer, on a mesh, layers in the rows that a schedule would choose."""

    def __init__(self, pp=4, order=tuple(range(LAYERS))):
        self.mesh = jaxpipe.make_mesh(pp=pp)
        self.order = np.array(order)
        self.optimizer = optax.adam(1e-2)
        self.rng = jax.random.key(0)
        self.step = jax.jit(self._step)

    def init(self):
        weights = jax.random.normal(self.rng, (LAYERS, WIDTH, WIDTH)) / WIDTH
        stages = jax.device_put({"w": weights[self.order]}, NamedSharding(self.mesh, P("pp")))
        outer = jax.device_put({"b": jnp.zeros(WIDTH)}, NamedSharding(self.mesh, P()))
        params = jaxpipe.Params(stages, outer)
        zeros = (jnp.zeros((), jnp.int32) for _ in range(3))
        with jax.numpy_dtype_promotion("standard"):
            return State(params, self.optimizer.init(params), *zeros)

    @functools.cached_property
    def layout(self):
        inverse = np.argsort(self.order)
        return Layout(
            lambda p: {"layers": jax.tree.map(lambda x: x[inverse], p.stages), "outer": p.outer},
            lambda c: jaxpipe.Params(jax.tree.map(lambda x: x[self.order], c["layers"]), c["outer"]),
            self.mesh,
            describe(self.init()),
        )

    def program(self, poison=(), **options):
        def batch(step):
            x = np.random.default_rng((7, step)).normal(size=(WIDTH,)).astype(np.float32)
            return x * np.float32("nan") if step in poison else x

        return TrainFunctions(self.step, batch, self.rng, **options)

    def _step(self, state, x, rng):
        noise = jax.random.normal(jax.random.fold_in(rng, state.step), (WIDTH,)) / 100

        def loss(params):
            # The sum over layers in the model's order, whatever row they are in.
            layers = params.stages["w"][np.argsort(self.order)]
            for weight in layers:
                x_ = jnp.tanh(weight @ x)
            return ((x_ + layers.mean((0, 1)) + params.outer["b"] - x[::-1] + noise) ** 2).mean()

        value, grads = jax.value_and_grad(loss)(state.params)
        finite = jnp.isfinite(value)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = self.optimizer.update(grads, state.opt_state)
            params = optax.apply_updates(state.params, updates)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        bad = jnp.where(finite, 0, 1).astype(jnp.int32)
        row = (state.skipped_in_a_row + bad) * bad
        metrics = {"loss": value, "skipped_in_a_row": row, "loads": jnp.ones((2, 4), jnp.int32)}
        return State(params, opt_state, state.step + 1, state.skipped + bad, row), metrics


def run(fake, out, steps, *, save_every=5, keep=3, max_skipped=3, stop=lambda step: False, **options):
    """(result, the step it began after) of a run that continues what is in ``out``."""
    checkpoints = Checkpoints(out / "checkpoints", fake.layout, keep)
    restored = checkpoints.restore()
    state = fake.init() if restored is None else restored.state
    start = int(state.step)
    config = LoopConfig(steps, save_every, eval_every=4, max_skipped=max_skipped)
    with Observer(out if hosts.is_first() else None, steps, start, THROUGHPUT) as observer:
        facts = {"seed": 0}
        program = fake.program(**options)
        result = train(config, program, state, observer, checkpoints=checkpoints, facts=facts, stop=stop)
    checkpoints.close()
    return result, start


def main():
    args, flags = sys.argv[1:3], flags_parser().parse_args(sys.argv[3:])
    out, steps = pathlib.Path(args[0]), int(args[1])
    processes = hosts.detect(os.environ, flags.coordinator, flags.num_processes, flags.process_id)
    peers = hosts.join(processes, resume=lambda: last_checkpoint(out / "checkpoints"))
    try:
        fake = Fake(pp=jax.device_count())
        result, start = run(fake, out, steps, save_every=1, stop=hosts.stop_signal(0))
    except RuntimeError as error:
        message = f"{type(error).__name__}: {error}"
        hosts.fail(peers, 1, message)
        print(message, file=sys.stderr)
        hosts.leave(1)
        raise
    if hosts.is_first():
        print(f"began after {start}, ended after {int(result.state.step)}, loss {result.losses[-1]!r}")
    hosts.finish(peers)
    hosts.leave(0)


if __name__ == "__main__":
    main()
