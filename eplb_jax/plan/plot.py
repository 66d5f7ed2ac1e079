"""Load of each GPU, before and after."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Num

from eplb_jax.plan.metrics import gpu_loads
from eplb_jax.plan.placement import Array, Placement

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_loads(
    weight: Num[Array, "layers experts"],
    plans: dict[str, Placement],
    num_gpus: int,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draws each plan's loads as a heat map of layers and GPUs, in units of the layer's mean; all in one colour scale.

    Args:
      weight: load of each expert.
      plans: placements by title, at least one.
      num_gpus: GPUs that the slots divide over.
      path: where to write the picture, in the format of its ending.

    Raises:
      ImportError: without matplotlib, which the extra ``plot`` installs.
      ValueError: no plan, or one that does not fit the loads.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'jaxpipe[plot]'") from error
    if not plans:
        raise ValueError("plans is empty: give at least one placement by its title")
    shares = {}
    for title, placement in plans.items():
        loads = gpu_loads(placement, weight, num_gpus)
        mean = loads.sum(1, keepdims=True) / (loads > 0).sum(1, keepdims=True).clip(1)
        shares[title] = loads / np.where(mean > 0, mean, 1)
    most = max(1.0, max(float(share.max()) for share in shares.values()))

    figure = Figure(figsize=(1.5 + 4.5 * len(plans), 5.5), layout="constrained")
    axes = figure.subplots(2, len(plans), squeeze=False, sharey="row", height_ratios=(3, 1))
    image = None
    for (title, share), upper, lower in zip(shares.items(), *axes, strict=True):
        image = upper.imshow(share, aspect="auto", cmap="magma", vmin=0, vmax=most, interpolation="nearest")
        heaviest = share.max(1)
        upper.set(title=f"{title}\nheaviest GPU: {heaviest.mean():.3f} of the mean, at worst {heaviest.max():.3f}")
        lower.plot(np.sort(share, axis=1)[:, ::-1].mean(0), color="black")
        lower.set(xlabel="GPU (below: heaviest first, mean of layers)", ylim=(0, most * 1.05))
        lower.axhline(1, color="gray", linewidth=0.8)
    axes[0, 0].set_ylabel("layer")
    axes[0, 0].yaxis.get_major_locator().set_params(integer=True)
    axes[1, 0].set_ylabel("load / mean")
    if image is not None:
        figure.colorbar(image, ax=axes[0], label="load / mean")
    if path is not None:
        figure.savefig(path, dpi=100)
    return figure
