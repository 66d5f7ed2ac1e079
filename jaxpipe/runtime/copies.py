"""Working copies of stage parameters on each rank, and the way back for their gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe.schedule.schedule import Schedule


def rows_per_rank(schedule: Schedule) -> int:
    """Stages whose master parameters a rank owns."""
    return schedule.num_stages // schedule.num_ranks


def mirrored_chunks(schedule: Schedule) -> tuple[tuple[int, tuple[tuple[int, int], ...]], ...]:
    """For each local chunk that ranks do not own: its row on the owner, and (owner, holder) pairs.

    >>> from jaxpipe.schedule import build
    >>> mirrored_chunks(build("dualpipe", 4, 8))
    ((0, ((3, 0), (2, 1), (1, 2), (0, 3))),)
    >>> mirrored_chunks(build("dualpipev", 4, 8))
    ()
    """
    rows = rows_per_rank(schedule)
    mirrored = []
    for chunk in range(rows, len(schedule.rank_stages[0])):
        stages = [held[chunk] for held in schedule.rank_stages]
        owners = [schedule.routes[0][stage] for stage in stages]
        owner_rows = {schedule.rank_stages[owner].index(stage) for owner, stage in zip(owners, stages, strict=True)}
        if len(owner_rows) != 1 or sorted(owners) != list(range(schedule.num_ranks)):
            raise ValueError(
                f"schedule {schedule.name!r} mirrors stages {stages} of owners {owners} in chunk {chunk}: a second "
                "direction must place the stages of one row of owners on the ranks, each exactly once"
            )
        mirrored.append((owner_rows.pop(), tuple(zip(owners, range(schedule.num_ranks), strict=True))))
    return tuple(mirrored)


def cast(tree: Any, dtype: Any) -> Any:
    """Floating leaves in another dtype; the tree itself if dtype is None."""
    if dtype is None:
        return tree
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree)


def working_copies(stages: Any, schedule: Schedule, axis: str, dtype: Any) -> tuple[Any, ...]:
    """The parameters of every local chunk in a dtype, from leaves ``[rows, ...]`` of the stages this rank owns.

    Rows are cast one by one: whole leaves in both dtypes would be held beside them. DualPipe's second chunk is fetched
    from its owner by one ppermute.
    """
    rows = range(rows_per_rank(schedule))
    owned = [cast(jax.tree.map(lambda leaf, row=row: leaf[row], stages), dtype) for row in rows]
    fetched = [lax.ppermute(owned[row], axis, pairs) for row, pairs in mirrored_chunks(schedule)]
    return (*owned, *fetched)


def gather_grads(grads: tuple[Any, ...], schedule: Schedule, axis: str) -> Any:
    """Leaves ``[rows, ...]``: the gradients of the stages this rank owns, mirrored copies' added in."""
    rows = rows_per_rank(schedule)
    owned = list(grads[:rows])
    for copy, (row, pairs) in zip(grads[rows:], mirrored_chunks(schedule), strict=True):
        returned = lax.ppermute(copy, axis, [(holder, owner) for owner, holder in pairs])
        owned[row] = jax.tree.map(jnp.add, owned[row], returned)
    # Behind a barrier, or an optimizer's every output would be computed from the parts by a kernel of its own.
    return lax.optimization_barrier(jax.tree.map(lambda *leaves: jnp.stack(leaves), *owned))
