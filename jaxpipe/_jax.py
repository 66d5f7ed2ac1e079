"""Every use of JAX beyond its documented interface, and what is known of its primitives: for jax 0.10 to 0.12."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer as Tracer
from jax.extend import source_info_util as source_info_util
from jax.extend.core import ClosedJaxpr as ClosedJaxpr
from jax.extend.core import Effect as Effect
from jax.extend.core import Jaxpr as Jaxpr
from jax.extend.core import JaxprEqn as JaxprEqn
from jax.extend.core import Literal as Literal
from jax.extend.core import Primitive as Primitive
from jax.interpreters import ad as ad
from jax.interpreters import batching as batching
from jax.interpreters import mlir as mlir

logger = logging.getLogger(__name__)

CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "custom_vmap_call": "call",
    "checkpoint": "jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "accumulable_product": "jaxpr",
}
"""Primitives that are inlined, and the parameter that holds their jaxpr."""

ACCUMULABLE = "accumulable"
"""Parameter of a call that makes a product: an object that can add it to a sum in place; see `jaxpipe.stage.addend`."""

CUSTOM_RULES = frozenset({"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"})
"""Primitives whose derivative rules are new functions in each trace; a jaxpr that has been differentiated ran them."""

TRANSFER = "transfer"
"""Stands for a primitive where it moves an array between the memories of a device and its host."""

ELEMENTWISE = frozenset({
    "abs", "acos", "add", "add_any", "and", "asin", "atan", "atan2", "bitcast_convert_type", "cbrt", "ceil", "clamp",
    "convert_element_type", "copy", "cos", "cosh", "div", "eq", "erf", "erfc", "exp", "exp2", "expm1", "floor",
    "ge", "gt", "integer_pow", "is_finite", "le", "log", "log1p", "log2", "logistic", "lt", "max", "min", "mul",
    "ne", "neg", "nextafter", "not", "one_minus_square", "or", "pow", "reduce_precision", "rem", "round", "rsqrt",
    "select_n", "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt",
    "square", "stop_gradient", "sub", "tan", "tanh", "xor",
})  # fmt: skip
MOVING = frozenset({
    "broadcast_in_dim", "concatenate", "expand_dims", "iota", "name", "pad", "reshape", "rev", "slice", "split",
    "squeeze", "tile", "transpose", "pcast", "pvary",
})  # fmt: skip
REDUCING = frozenset({"reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_sum"})
LIGHT = ELEMENTWISE | MOVING | REDUCING
"""Primitives that a compiler fuses into what reads them."""

CHEAP = frozenset({
    "acosh", "all_gather", "all_gather_invariant", "all_gather_reduced", "all_to_all", "approx_top_k", "argmax",
    "argmin", "asinh", "atanh", "axis_index", "bessel_i0e", "bessel_i1e", "broadcast_to",
    "clz", "complex", "conj", "cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum", "device_put",
    "digamma", "dynamic_slice", "dynamic_update_slice", "empty", "empty2", "eq_to", "erf_inv", "from_edtype",
    "gather", "igamma", "igamma_grad_a", "igammac", "imag", "iota_2x32_shape", "layout_constraint", "le_to", "lgamma",
    "lt_to", "mulhi", "optimization_barrier", "pbroadcast", "philox2x32", "philox4x32", "platform_index", "pmax",
    "pmin", "polygamma", "population_count", "ppermute", "preduced", "psum", "psum_invariant", "ragged_all_to_all",
    "random_bits", "random_clone", "random_fold_in", "random_gamma", "random_seed", "random_split", "random_unwrap",
    "random_wrap", "real", "reciprocal", "reduce", "reduce_prod", "reduce_scatter", "reduce_window",
    "reduce_window_max", "reduce_window_min", "reduce_window_sum", "reduce_xor", "reduced_vary_cast_p",
    "regularized_incomplete_beta", "reshard", "rng_bit_generator", "rng_uniform", "scatter", "scatter-add",
    "scatter-max", "scatter-min", "scatter-mul", "scatter-sub", "scatter_add", "scatter_max", "scatter_min",
    "scatter_mul", "scatter_sub", "select_and_gather_add", "select_and_scatter", "select_and_scatter_add",
    "shard_alike", "sharding_constraint", "sort", "stack", "threefry2x32", "threefry4x32", "to_edtype", "top_k",
    "unreduced_psum", "unreduced_reduce_scatter", "unstack", "vary_unreduced_cast_p", "with_memory_space_constraint",
    "zeros_like", "zeta",
})  # fmt: skip
"""Primitives that are not fused, but may be run once more for each microbatch where only parameters go in."""

OPAQUE = frozenset({"cond", "while", "shard_map", "custom_call", "pure_callback", "pallas_call"})
"""Primitives with computations inside that are not divided; a cond is, unless its branches are for platforms."""

HEAVY = frozenset({
    "accumulable_product", "cholesky", "conv_general_dilated", "cudnn_fusion", "custom_linear_solve", "dot_general",
    "dot_product_attention_bwd_wrapper", "dot_product_attention_fwd_wrapper", "eig", "eigh", "ffi_call", "fft",
    "geqrf", "householder_product", "lu", "mpmd_map", "qr", "ragged_dot", "ragged_dot_general", "scaled_dot",
    "scaled_matmul_wrapper", "scan", "svd", "triangular_solve", "tridiagonal_solve", *OPAQUE, TRANSFER,
})  # fmt: skip
"""Primitives that are never computed a second time."""

VIEWS = frozenset({
    "reshape", "squeeze", "expand_dims", "transpose", "copy", "stop_gradient", "sharding_constraint",
})  # fmt: skip
"""Primitives whose result is their operand in other words."""

SAME_ORDER = (VIEWS - {"transpose", "sharding_constraint"}) | {"name"}
"""Primitives whose result has the numbers of their operand in the same order."""

WRITES_IN_PLACE = frozenset({"dynamic_update_slice"})
"""Primitives that write into their first operand."""

ADDS_ROWS = frozenset({"scatter-add", "scatter_add"})
"""Primitives that add rows to their first operand, in its place where it is carried by a loop."""

READS_PART = frozenset({"dynamic_slice", "slice"})
"""Primitives that read only that part of their operand which they return."""

READS_WHOLE = frozenset({
    "dot_general", "ragged_dot", "ragged_dot_general", "conv_general_dilated", "sort", "top_k", "gather", "scatter",
    "scatter-add", "scatter_add", "cumsum", "cumlogsumexp", "argmax", "argmin", "all_to_all", "all_gather", "pmax",
    "psum", "psum_invariant", "reduce_scatter", "ppermute", "while", "scan", "cond", "pallas_call", "ffi_call",
    "custom_call", TRANSFER,
})  # fmt: skip
"""Primitives that need their operands whole in memory and make a whole result."""

REDUCTIONS = REDUCING | {"reduce_prod"}
"""Primitives that make a whole result of operands computed on the way."""

COMPUTED_ONCE = frozenset({
    "cbrt", "cos", "div", "erf", "exp", "exp2", "expm1", "log", "log1p", "logistic", "pow", "rsqrt", "sin", "sqrt",
    "tan", "tanh",
})  # fmt: skip
"""Elementwise primitives that XLA computes once for several readers; cheaper ones it repeats in each, on GPUs."""

WITHOUT_KERNEL = VIEWS | {"optimization_barrier", "axis_index", "platform_index", "pvary", "pcast", "iota", "name"}
"""Primitives that compute nothing."""

PRODUCTS = frozenset({"dot_general", "ragged_dot", "ragged_dot_general", "conv_general_dilated"})
"""Primitives that multiply matrices."""

ATTENTION_PRODUCTS = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}
"""Primitives of attention, and how many products of the scores' size each computes."""

WITH_BODIES = frozenset({"scan", "while", "cond", "shard_map"})
"""Primitives that run jaxprs of their own, never inlined."""

COLLECTIVES = {
    "psum": "all-reduce", "psum_invariant": "all-reduce", "pmax": "all-reduce", "pmin": "all-reduce",
    "all_gather": "all-gather", "all_gather_invariant": "all-gather", "all_gather_reduced": "all-gather",
    "reduce_scatter": "reduce-scatter", "unreduced_psum": "all-reduce", "unreduced_reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all", "ragged_all_to_all": "all-to-all", "ppermute": "permute",
}  # fmt: skip
"""What each primitive makes devices do together."""

BODY_PARAMETERS = tuple(dict.fromkeys(CALLS.values()))
"""Parameters that hold a call's jaxpr."""

SILENT = ("axis_index", "pvary", "pcast")
"""Primitives that name a mesh axis and wait for no other device."""

HARMLESS_EFFECTS = frozenset({"NamedAxisEffect"})
"""Effects of equations that only compute their results."""

REF_EFFECTS = frozenset({"ReadEffect", "WriteEffect", "AccumEffect"})
NEW_REF_EFFECT = "InternalMutableArrayEffect"
"""The effect of making and freezing a ref."""


def is_heavy(name: str) -> bool:
    """Whether a primitive is never computed a second time. One that no table knows never is, and the log names it.

    >>> is_heavy("dot_general"), is_heavy("sort"), is_heavy("a_primitive_of_tomorrow")
    (True, False, True)
    """
    if name in LIGHT or name in CHEAP:
        return False
    if name not in HEAVY:
        _log_unknown(name)
    return True


@functools.cache
def _log_unknown(name: str) -> None:
    """Logs a name once."""
    logger.warning("the primitive %r is not known here: what it computes is kept, never computed a second time", name)


def is_on_host(atom: Any) -> bool:
    """Whether a variable of a jaxpr is in the memory of the host, where it was put from a device."""
    return getattr(atom.aval, "memory_space", None) == jax.memory.Space.Host


def is_transfer(eqn: JaxprEqn) -> bool:
    """Whether an equation moves one array between the memories of a device and its host."""
    return eqn.primitive.name == "device_put" and is_on_host(eqn.invars[0]) != is_on_host(eqn.outvars[0])


def discharge_refs(closed: ClosedJaxpr) -> ClosedJaxpr:
    """A jaxpr that makes refs, as one of plain values; public JAX does so only when it lowers.

    Raises:
      NotImplementedError, ValueError: JAX cannot.
    """
    from jax._src.state.discharge import discharge_state  # noqa: PLC0415

    return discharge_state(closed)


def causal_attention_of_cudnn() -> Callable[..., Any]:
    """Attention of cuDNN below `jax.nn.dot_product_attention`, which checks widths.

    Raises:
      ImportError: JAX has moved it.
    """
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention  # noqa: PLC0415

    return functools.partial(dot_product_attention, mask_type=MaskType.CAUSAL)


def has_backends() -> bool:
    """Whether JAX has started any backend, which it does when it is first asked for devices."""
    from jax._src.xla_bridge import backends_are_initialized  # noqa: PLC0415

    return backends_are_initialized()


def distributed_state() -> Any:
    """What `jax.distributed` knows of the processes, and their store of texts; None where JAX keeps it elsewhere."""
    try:
        from jax._src.distributed import global_state  # noqa: PLC0415
    except ImportError:
        return None
    needed = "process_id", "num_processes", "client", "coordinator_address"
    return global_state if all(hasattr(global_state, name) for name in needed) else None
