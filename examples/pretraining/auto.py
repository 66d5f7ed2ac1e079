"""``--schedule auto``: the schedule that is fastest for this model on these devices, which the run then keeps."""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import jaxpipe
from jaxpipe.deepseek import DeepSeekModel
from pretraining import hosts, trainer

AUTO = "auto"
"""The value of ``--schedule`` that stands for a choice."""

FILE = "schedule.json"
"""In the folder of a run: what was chosen for it."""

_CHOSEN = ("schedule", "microbatches", "microbatch_size")


def settle(
    args: argparse.Namespace,
    mesh: Mesh,
    make_model: Callable[[jaxpipe.schedule.Schedule], DeepSeekModel],
    train_config: trainer.TrainConfig,
    batch_of: Callable[[int], Any],
) -> None:
    """Puts the chosen schedule, and its number and size of microbatches, in place of ``auto`` in ``args``.

    A run that continues keeps what was chosen when it began; otherwise times are measured, and the table is printed.
    Without ``--microbatches`` a step has as many sequences as it has by default, in whatever number of microbatches is
    fastest.

    Args:
      args: of the run; ``out`` is its folder.
      mesh: of its devices.
      make_model: makes the model, without parameters, for a schedule.
      train_config: of its optimizer.
      batch_of: the first batch, of so many sequences.

    Raises:
      ValueError: a stored choice of another mesh; all that `jaxpipe.choose` refuses.
    """
    stored = _read(args, mesh)
    if stored is not None:
        if stored["mesh"] != dict(mesh.shape):
            raise ValueError(
                f"{args.out / FILE} was chosen for the mesh {stored['mesh']}, this run has {dict(mesh.shape)}: name a "
                f"--schedule, such as {stored['schedule']}, or remove the file to choose anew"
            )
        for name in _CHOSEN:
            setattr(args, name, stored[name])
        return
    count = args.microbatches or 2 * mesh.shape["pp"]
    sequences = count * args.microbatch_size

    def make(schedule: jaxpipe.schedule.Schedule) -> tuple[jaxpipe.Pipeline, Callable[[], jaxpipe.Params], Any]:
        model = make_model(schedule)
        how: dict[str, Any] = dict(grad_dtype=jnp.dtype(args.grad_dtype), stash=args.stash, offload=args.offload)
        pipeline = trainer.pipelined(model, schedule, mesh, **how)
        state = trainer.abstract_state(model, trainer.make_optimizer(train_config, model), mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state.params)
        params = jax.jit(functools.partial(model.init, model.seed), out_shardings=shardings)
        return pipeline, params, state.opt_state

    choice = jaxpipe.choose_pipeline(
        make, batch_of(sequences), mesh, microbatches=args.microbatches, rng=jax.random.key(args.seed)
    )
    args.schedule, args.microbatches = choice.schedule.name, choice.schedule.num_microbatches
    args.microbatch_size = sequences // args.microbatches
    if hosts.is_first():
        print(choice, flush=True)
        args.out.mkdir(parents=True, exist_ok=True)
        chosen = {name: getattr(args, name) for name in _CHOSEN}
        _write(args.out / FILE, {**chosen, "mesh": dict(mesh.shape), "table": str(choice).splitlines()})


def _read(args: argparse.Namespace, mesh: Mesh) -> dict[str, Any] | None:
    """What was chosen for the run that is to continue; of another run that this one begins with, for the same mesh."""
    if args.resume == "never":
        return None
    own = args.out / FILE
    if args.resume == "auto" or own.exists():
        return json.loads(own.read_text(encoding="utf-8")) if own.exists() else None
    other = pathlib.Path(args.resume) / FILE
    stored = json.loads(other.read_text(encoding="utf-8")) if other.exists() else None
    return stored if stored is not None and stored["mesh"] == dict(mesh.shape) else None


def _write(path: pathlib.Path, value: dict[str, Any]) -> None:
    """Writes a file, whole or not at all."""
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, path)
