"""Expert-parallel load balancing, and the mixture-of-experts layer that it feeds.

`rebalance_experts` is DeepSeek's balancer, bit for bit; `eplb_jax.policies` go beyond it; `eplb_jax.load` counts the
tokens that they plan for, `eplb_jax.metrics` say what a plan is worth, ``python -m eplb_jax plan`` does it from files.
`eplb_jax.moe` is the layer, `eplb_jax.flax` has it as modules, `eplb_jax.live` changes placements while it trains.
"""

from eplb_jax import bounds as bounds
from eplb_jax import live as live
from eplb_jax import load as load
from eplb_jax import metrics as metrics
from eplb_jax import moe as moe
from eplb_jax import policies as policies
from eplb_jax import router as router
from eplb_jax.files import read_loads as read_loads
from eplb_jax.files import read_placement as read_placement
from eplb_jax.files import read_sizes as read_sizes
from eplb_jax.files import save_loads as save_loads
from eplb_jax.files import save_placement as save_placement
from eplb_jax.packing import balanced_packing as balanced_packing
from eplb_jax.packing import replicate_experts as replicate_experts
from eplb_jax.placement import Placement as Placement
from eplb_jax.rebalance import rebalance_experts as rebalance_experts
