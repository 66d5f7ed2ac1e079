"""Linen models as pipelines: `from_linen`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax.linen.spmd import logical_to_mesh
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxpipe.cutting import BlockCall, call_block
from jaxpipe.nnx_function import fold_name
from jaxpipe.params import Params
from jaxpipe.runtime.model import Context
from jaxpipe.schedule.schedule import Schedule
from jaxpipe.trainable import choose
from jaxpipe.whole import ParameterAnnotation, PipelinedModel, call_loss, pipelined, stack_rows, takes


def from_linen(
    params: Any,
    schedule: Schedule,
    mesh: Mesh,
    *,
    blocks: str | Sequence[str],
    loss: Callable[..., Any],
    specs: Params | None = None,
    trainable: Any = None,
    layer_costs: Sequence[float] | None = None,
    **options: Any,
) -> PipelinedModel:
    """Makes a pipeline of a Linen model and the loss function that it is trained with.

    As `from_nnx`, which says how the model is cut.

    Args:
      params: the model's parameters, what ``module.init(...)["params"]`` gives; or a function without arguments that
        makes them, which then runs under `jax.jit` so that each device makes its own parameters alone.
      schedule: from one of the builders.
      mesh: as for `jaxpipe.value_and_grad`.
      blocks: where ``params`` has the blocks' parameters: "Block" stands for ``Block_0``, ``Block_1``, ..., "layers" of
        ``setup`` for ``layers_0``, ...; or for one entry of that name with a row for each block, as `nn.scan` makes it.
        "decoder.layers" is within "decoder". Where blocks have names of several beginnings, a list of these or of whole
        names in the order in which they are called: ``["Dense", "Experts"]`` stands for ``Dense_0``, ``Dense_1``, ...
        and then ``Experts_0``, ...
      loss: ``loss(params, batch)`` or, for a model that draws random numbers, ``loss(params, batch, key)``, which calls
        the module's ``apply``. It returns a scalar, or a scalar and a flat dict of metrics. Where the step is given
        ``step_inputs``, it is called with ``step_inputs=...`` besides.
      specs: as for `from_nnx`; None: as the model annotates its parameters (`nn.with_partitioning`, or
        `nn.with_logical_partitioning` under `nn.logical_axis_rules`), and whole where it does not.
      trainable: which parameters are trained; the others are frozen, as `jaxpipe.value_and_grad` says: a tree like
        ``params``, or a prefix of it, with bools; or ``(path, leaf) -> bool`` of a path in ``params`` such as
        "['Dense_0']['kernel']". It must say the same of all blocks. None: all are trained.
      layer_costs: what each block costs, as for `from_nnx`.
      **options: further arguments of `jaxpipe.value_and_grad`.

    Raises:
      ValueError: as `from_nnx`.

    >>> import jaxpipe
    >>> import jax.numpy as jnp
    >>> class Model(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, tokens):
    ...         x = nn.Embed(16, 8)(tokens)
    ...         for _ in range(4):
    ...             x = nn.Dense(8)(x)
    ...         return nn.LayerNorm()(x)
    >>> model, tokens = Model(), jnp.zeros((8, 3), jnp.int32)
    >>> def loss(params, batch):
    ...     return (model.apply({"params": params}, batch) ** 2).mean()
    >>> params = model.init(jax.random.key(0), tokens)["params"]
    >>> mesh, schedule = jaxpipe.make_mesh(pp=2), jaxpipe.schedule.build("1f1b", 2, 4)
    >>> pipe = from_linen(params, schedule, mesh, blocks="Dense", loss=loss)
    >>> (value, aux), grads = jax.jit(pipe)(pipe.params, tokens)
    >>> sorted(pipe.merge(grads))
    ['Dense_0', 'Dense_1', 'Dense_2', 'Dense_3', 'Embed_0', 'LayerNorm_0']
    """
    make = params if callable(params) else lambda: params
    shapes = jax.eval_shape(make)
    model = _LinenModel.of(nn.unbox(shapes), blocks, loss, _annotations_of(shapes))
    if trainable is not None and not isinstance(trainable, Params):
        trainable = model.take(choose(trainable, model.shapes))
    return pipelined(
        model,
        lambda: nn.unbox(make()),
        schedule,
        mesh,
        made=not callable(params),
        specs=specs,
        trainable=trainable,
        layer_costs=layer_costs,
        options=options,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _LinenModel:
    """A Linen model by its parameters; a `jaxpipe.whole.CutModel`.

    Attributes:
      shapes: of the parameters.
      path: of the module that has the blocks.
      entries: of that module's parameters, those of the blocks in order; one where blocks are rows of it.
      stacked: whether they are.
      names: of the blocks.
      user_loss: ``loss(params, data)`` or ``loss(params, data, key)``.
      specs: `ParameterAnnotation` of each parameter.
    """

    shapes: Any
    path: tuple[str, ...]
    entries: tuple[str, ...]
    stacked: bool
    names: list[str]
    user_loss: Callable[..., Any]
    specs: Any

    @classmethod
    def of(cls, shapes: Any, blocks: str | Sequence[str], loss: Callable[..., Any], specs: Any) -> _LinenModel:
        """The blocks found in the parameters."""
        paths = [tuple(name.split(".")) for name in ([blocks] if isinstance(blocks, str) else blocks)]
        outside = {path[:-1] for path in paths}
        if len(outside) != 1:
            raise ValueError(f"blocks={blocks!r}: name the blocks of one module, with the same path before their names")
        inside = outside.pop()
        where = _at(shapes, inside, paths[0])
        found = [_entries(where, path[-1], alone=isinstance(blocks, str)) for path in paths]
        if all(found):
            entries = tuple(entry for each in found for entry in each)
            return cls(shapes, inside, entries, False, [".".join((*inside, entry)) for entry in entries], loss, specs)
        name = paths[found.index(())][-1]
        lengths = {leaf.shape[:1] for leaf in jax.tree.leaves(where.get(name, {}))}
        if len(lengths) != 1 or () in lengths:
            raise ValueError(
                f"blocks={blocks!r}: there are neither {name}_0, {name}_1, ... nor an entry {name} with a row for each "
                f"block; there are {', '.join(sorted(where))}"
            )
        names = [f"{blocks}[{index}]" for index in range(lengths.pop()[0])]
        return cls(shapes, inside, (name,), True, names, loss, specs)

    @property
    def outer(self) -> Any:
        """Parameters outside of the blocks."""
        return self.take(self.shapes)[0]

    @property
    def blocks(self) -> Any:
        """The blocks' parameters."""
        return self.take(self.shapes)[1]

    @property
    def annotated(self) -> tuple[Any, Any]:
        """`ParameterAnnotation` of each parameter in (outer, blocks)."""
        return self.take(self.specs)

    def loss(self, outer: Any, blocks: Any, key: Any, data: Any, step_inputs: Any) -> Any:
        """The user's loss, each block an opaque equation."""
        inside = Context.make(0, 0, key, data, num_stages=len(self.names))
        shapes = [
            jax.tree.map(lambda leaf: leaf.shape[1 if self.stacked else 0 :], block)
            for block in ([self.blocks] if self.stacked else self.blocks)
        ]
        index_of = {(*self.path, entry): index for index, entry in enumerate(self.entries)}

        def intercept(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module = context.module
            index = index_of.get(tuple(module.path))
            if context.method_name != "__call__" or index is None:
                return next_call(*args, **kwargs)
            params = module.variables["params"]
            if jax.tree.map(lambda leaf: leaf.shape, params) != shapes[index]:
                return next_call(*args, **kwargs)  # the scan over all blocks
            others = sorted(set(module.variables) - {"params"})
            if others:
                raise ValueError(
                    f"{self.names[index]} has variables in {others}: a stage of a pipeline changes nothing"
                )
            call = module.clone(parent=None, name=None), tuple(sorted(module.scope.rngs))

            def run(params: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
                return _apply(call, params, inside, (x, *args), kwargs)

            return call_block(run, self.names[index], params, args, kwargs, call)

        whole = self.put_blocks(outer, blocks)
        with nn.intercept_methods(intercept):
            given = {} if step_inputs is None else {"step_inputs": step_inputs}
            args = (whole, data, key) if takes(self.user_loss, whole, data, key, **given) else (whole, data)
            return call_loss(self.user_loss, *args, step_inputs=step_inputs)

    def kind(self, index: int, call: BlockCall) -> Any:
        """The block's module and streams."""
        return call.tag

    def run(
        self, call: BlockCall, members: Sequence[int], row: Any, params: Any, ctx: Context, args: Any, kwargs: Any
    ) -> Any:
        """Calls a block."""
        return _apply(call.tag, params, ctx, args, kwargs)

    def take(self, params: Any) -> tuple[Any, Any]:
        """(outer, blocks) of parameters."""
        where = _at(params, self.path, self.path)
        blocks = [where[entry] for entry in self.entries]
        rest = {name: value for name, value in where.items() if name not in self.entries}
        return _replaced(params, self.path, rest), blocks[0] if self.stacked else blocks

    def variant(self, model: Any, loss: Callable[..., Any] | None) -> _LinenModel:
        """The same with another loss."""
        if model is not None:
            raise ValueError(
                "a Linen model is what the loss calls: pass loss=, a function that calls the module for evaluation"
            )
        return dataclasses.replace(self, user_loss=loss or self.user_loss)

    def put_blocks(self, outer: Any, blocks: Any) -> Any:
        """Parameters with blocks as the model keeps them."""
        found = dict(zip(self.entries, [blocks] if self.stacked else blocks, strict=True))
        return _replaced(outer, self.path, {**_at(outer, self.path, self.path), **found})

    def put_state(self, outer: Any, blocks: Sequence[Any]) -> Any:
        """As `put`."""
        return self.put(outer, blocks)

    def put(self, outer: Any, blocks: Sequence[Any]) -> Any:
        """Parameters with each block's in place."""
        rows = stack_rows(blocks) if self.stacked else list(blocks)
        return self.put_blocks(outer, rows)


def _annotations_of(shapes: Any) -> Any:
    """How boxes annotate parameters, P() of those without; logical names as the rules around translate them."""

    def of(leaf: Any) -> P:
        if isinstance(leaf, nn.LogicallyPartitioned):
            rules = leaf.rules or nn.get_logical_axis_rules()
            if not rules:
                raise ValueError(
                    f"the model names dimensions of parameters {leaf.names}, and no rules say which axes of the mesh "
                    "these are: make the pipeline under flax.linen.logical_axis_rules(rules), or pass specs"
                )
            return logical_to_mesh(P(*leaf.names), rules)
        return leaf.get_partition_spec() if isinstance(leaf, nn.Partitioned) else P()

    return jax.tree.map(
        lambda leaf: ParameterAnnotation(of(leaf)), shapes, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned)
    )


def _apply(call: tuple[nn.Module, tuple[str, ...]], params: Any, ctx: Context, args: Any, kwargs: Any) -> Any:
    module, streams = call
    keys = {} if ctx.rng is None else {name: fold_name(ctx.rng, name) for name in streams}
    return module.apply({"params": params}, *args, rngs=keys, **kwargs)


def _entries(where: Mapping[str, Any], name: str, *, alone: bool) -> tuple[str, ...]:
    """The entries of blocks that a name stands for: numbered ones, or among others (not ``alone``) its own."""
    numbered = {int(m[1]): key for key in where if (m := re.fullmatch(re.escape(name) + r"_(\d+)", key))}
    if numbered and sorted(numbered) == list(range(len(numbered))):
        return tuple(numbered[index] for index in range(len(numbered)))
    return (name,) if name in where and not alone else ()


def _at(params: Any, path: Sequence[str], blocks: Sequence[str]) -> Any:
    for name in path:
        if not isinstance(params, Mapping) or name not in params:
            raise ValueError(f"blocks={'.'.join(blocks)!r}: the parameters have no {name}; they have {sorted(params)}")
        params = params[name]
    return params


def _replaced(params: Any, path: Sequence[str], value: Any) -> Any:
    if not path:
        return value
    return {**params, path[0]: _replaced(params[path[0]], path[1:], value)}
