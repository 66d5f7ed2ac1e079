"""The parameters of a pipelined model: stages as rows of stacked leaves, in one of two orders, and what is outside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.schedule.schedule import Schedule

ORDERS = ("model", "storage")
"""Which stage a row of stacked parameters belongs to: row i to stage i, or to stage ``schedule.storage_order[i]``."""


class Params(NamedTuple):
    """The parameters of a pipelined model, and its gradients.

    Attributes:
      stages: pytree whose leaves are ``[num_stages, ...]``, row i holding the parameters of stage i, or with
        ``order="storage"`` those of stage ``schedule.storage_order[i]``; sharded over the pipeline axis by rows. See
        `jaxpipe.stack_stages`.
      outer: pytree of everything outside the stages: embedding, head, tied or not. One copy a rank, or
        with ``shared_ends`` sharded over ranks as ``specs.outer`` says; ``embed`` and ``head`` both receive all of
        it, so using a leaf in both needs nothing else.

    Leaves may be integers, bools and keys; see `jaxpipe.floating_only` for optimizers.
    """

    stages: Any
    outer: Any = None


def stage_of_rows(schedule: Schedule, order: str) -> tuple[int, ...]:
    """``[num_stages]``: the stage in each row of stacked parameters.

    Raises:
      ValueError: an unknown order.
    """
    if order not in ORDERS:
        raise ValueError(f"order={order!r}; choose one of {ORDERS}")
    return schedule.storage_order if order == "storage" else tuple(range(schedule.num_stages))


def stack_stages(stages: Any, schedule: Schedule, order: str = "model") -> Any:
    """Stacks the parameters of stages 0, 1, ... into rows.

    Args:
      stages: a list, tuple or iterator of the parameters of each stage, in the order of the forward pass; or these
        stacked already, a pytree whose leaves are ``[num_stages, ...]`` with stage i in row i.
      schedule: gives the number of stages and, for storage order, their rows.
      order: that of the result and of the pipeline that it is for: "model", row i is stage i; "storage", row i is stage
        ``schedule.storage_order[i]``.

    Raises:
      ValueError: another number of stages than the schedule's, or stages that are not alike.

    >>> from jaxpipe.schedule import build
    >>> import numpy as np
    >>> stack_stages([np.float32(stage) for stage in range(4)], build("dualpipev", 2, 4)).tolist()
    [0.0, 1.0, 2.0, 3.0]
    >>> stack_stages(np.arange(4), build("dualpipev", 2, 4), order="storage").tolist()
    [0, 3, 1, 2]
    """
    rows = stage_of_rows(schedule, order)
    if isinstance(stages, Iterator):
        stages = list(stages)
    if isinstance(stages, (list, tuple)) and not hasattr(stages, "_fields"):
        check_alike(stages, schedule)
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(stages[stage] for stage in rows))
    check_rows(stages, schedule, "stacked")
    return stages if rows == tuple(range(len(rows))) else jax.tree.map(lambda leaf: leaf[np.asarray(rows)], stages)


def unstack_stages(stacked: Any, schedule: Schedule, order: str = "model") -> list[Any]:
    """The inverse of `stack_stages`: the parameters (or gradients) of stages 0, 1, ... as a list.

    >>> import jaxpipe, numpy as np
    >>> schedule = jaxpipe.schedule.build("dualpipev", 2, 4)
    >>> unstack_stages({"w": np.asarray([0, 3, 1, 2])}, schedule, order="storage")[1]["w"].item()
    1
    """
    check_rows(stacked, schedule, "stacked")
    row_of = {stage: row for row, stage in enumerate(stage_of_rows(schedule, order))}
    return [jax.tree.map(lambda leaf, row=row_of[stage]: leaf[row], stacked) for stage in range(schedule.num_stages)]


def check_rows(stages: Any, schedule: Schedule, name: str) -> None:
    """Raises ValueError unless all leaves are ``[num_stages, ...]``."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(stages):
        if np.ndim(leaf) == 0 or np.shape(leaf)[0] != schedule.num_stages:
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} has shape {np.shape(leaf)}, but schedule {schedule.name!r} has "
                f"{schedule.num_stages} stages: stack the parameters of all stages in rows, "
                f"[{schedule.num_stages}, ...], with jaxpipe.stack_stages"
            )


def check_alike(stages: Sequence[Any], schedule: Schedule) -> None:
    """Raises ValueError unless there is one tree for each stage, all of the same structure, shapes and dtypes."""
    if len(stages) != schedule.num_stages:
        raise ValueError(f"{len(stages)} stages for schedule {schedule.name!r}, which has {schedule.num_stages}")
    check_same_structure(stages)


def check_same_structure(params: Sequence[Any]) -> None:
    """Raises ValueError where parameters of a stage or layer differ from the first one's, naming the leaves."""
    first = _describe(params[0])
    for index, other in enumerate(map(_describe, params)):
        paths = [path for path in {**first, **other} if first.get(path) != other.get(path)]
        if paths or jax.tree.structure(params[index]) != jax.tree.structure(params[0]):
            here, there = ({path or "all": leaves.get(path) for path in paths} for leaves in (other, first))
            raise ValueError(
                f"parameters {index} have shapes {here or other}, parameters 0 {there or first} (None: not there): all "
                "stages (or layers) must be alike; put what differs into embed or head, or pad it"
            )


def dtype_of(leaf: Any) -> Any:
    """The dtype of an array, a shape or a Python number; keys have one of their own.

    >>> dtype_of(2.0).name
    'float32'
    """
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def _describe(tree: Any) -> dict[str, str]:
    """Shape and dtype of each leaf, by path."""
    return {
        jax.tree_util.keystr(path): f"{jnp.result_type(leaf)}{list(np.shape(leaf))}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
