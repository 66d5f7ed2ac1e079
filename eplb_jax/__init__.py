"""Expert-parallel load balancing: which GPU holds which replica of which expert."""

from eplb_jax.packing import balanced_packing as balanced_packing
from eplb_jax.packing import replicate_experts as replicate_experts
from eplb_jax.placement import Placement as Placement
from eplb_jax.rebalance import rebalance_experts as rebalance_experts
