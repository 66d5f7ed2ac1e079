"""One stage of a pipeline, its backward pass divided.

What `__all__` names is public; all modules below are internal and may change without notice.

`split_stage` makes a `SplitStage` of a function: its forward, and its backward in the halves for the input and for the
weights. `vjp_once` is `jax.vjp` for functions with side effects, `check_effects` refuses those that JAX cannot order,
and `matmul_flops` counts products.
"""

from jaxpipe.stage.effects import check_effects
from jaxpipe.stage.flops import matmul_flops
from jaxpipe.stage.split import split_stage
from jaxpipe.stage.stage import Residuals, SplitStage
from jaxpipe.stage.vjp import vjp_once

__all__ = [
    "Residuals",
    "SplitStage",
    "check_effects",
    "matmul_flops",
    "split_stage",
    "vjp_once",
]
