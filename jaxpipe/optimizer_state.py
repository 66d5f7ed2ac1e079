"""States of optimizers: trees like the parameters, and what is beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpipe._jax import Tracer
from jaxpipe.params import Params

if TYPE_CHECKING:
    import optax


def init_optimizer(optimizer: optax.GradientTransformation, params: Params) -> Any:
    """An optimizer's first state where a step will leave it: averages where their parameters are, counts everywhere.

    ``optimizer.init(params)`` leaves counts on one device, and under `jax.jit` averages too. A step is compiled for
    that, and once more for the state that it returns. No device ever holds a whole average here.

    Args:
      optimizer: of optax.
      params: sharded over a mesh, such as `jaxpipe.flax.PipelinedModel.params`.

    Raises:
      ValueError: parameters that are not sharded over a mesh.

    >>> import jaxpipe, optax
    >>> import jax.numpy as jnp
    >>> sharding = NamedSharding(jaxpipe.make_mesh(pp=2), P("pp"))
    >>> params = jax.device_put(Params({"w": jnp.ones((2, 3))}), sharding)
    >>> state = init_optimizer(optax.adam(1e-3), params)
    >>> tuple(state[0].mu.stages["w"].sharding.spec), len(state[0].count.devices())
    (('pp',), 2)
    """
    shardings = shardings_of_state(optimizer.init, params)
    if shardings is None:
        raise ValueError(
            "the parameters are not arrays on a mesh: place them first, "
            "jax.device_put(params, jax.sharding.NamedSharding(mesh, spec)), or take PipelinedModel.params"
        )
    return jax.jit(optimizer.init, out_shardings=shardings)(params)


def map_params(function: Callable[[Params], Any], state: Any, others: Callable[[Any], Any] = lambda leaf: leaf) -> Any:
    """A state with ``function`` of each tree in it that has the form of the parameters, and ``others`` of other leaves.

    Optimizers keep averages as trees like the parameters, masked or not; these are `Params` then.
    """

    def is_params(node: Any) -> bool:
        return isinstance(node, Params)

    return jax.tree.map(lambda node: function(node) if is_params(node) else others(node), state, is_leaf=is_params)


def shardings_of_state(init: Callable[[Params], Any], params: Params) -> Any:
    """Shardings of a state, of which a leaf lies where its parameter does; None where that is not known.

    Of a leaf of another shape, such as sums over rows, the leading dimensions that are as the parameter's are sharded.
    """
    known = dict(jax.tree_util.tree_leaves_with_path(params))
    if not known or not all(map(_is_placed, known.values())):
        return None
    mesh = next(iter(known.values())).sharding.mesh

    def of_leaf(path: Any, leaf: Any) -> NamedSharding:
        param = known.get(path)
        if param is None:
            return NamedSharding(mesh, P())
        same = [mine == its for mine, its in zip(leaf.shape, param.shape, strict=False)]
        kept = same.index(False) if False in same else len(same)
        return NamedSharding(mesh, P(*param.sharding.spec[:kept]))

    def of_tree(tree: Params) -> Params:
        return jax.tree_util.tree_map_with_path(of_leaf, tree)

    return map_params(of_tree, jax.eval_shape(init, params), lambda _: NamedSharding(mesh, P()))


def _is_placed(leaf: Any) -> bool:
    return not isinstance(leaf, Tracer) and isinstance(getattr(leaf, "sharding", None), NamedSharding)
