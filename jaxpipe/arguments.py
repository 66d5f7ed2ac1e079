"""What `value_and_grad` and `forward` are given, checked: functions, schedule, mesh, and options as one record."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpipe.params import Params, stage_of_rows
from jaxpipe.runtime.model import Model
from jaxpipe.runtime.offload import HOST_MEMORY
from jaxpipe.runtime.options import AUTOMATIC, DISPATCHERS, Axes, Options
from jaxpipe.runtime.program import Program
from jaxpipe.schedule.ints import at_least
from jaxpipe.schedule.schedule import Schedule
from jaxpipe.schedule.simulator import Costs
from jaxpipe.stage.exchanged import MAX_GROWTH, check_growth
from jaxpipe.trainable import check_trainable

_CALLS = {
    "stage": ("params", "x", "ctx"),
    "embed": ("outer", "data", "ctx"),
    "head": ("outer", "y", "data", "ctx"),
    "weight": ("data",),
    "prepare": ("outer",),
}


def check_options(
    schedule: Schedule,
    mesh: Any,
    *,
    axis: Any,
    data_axes: Any,
    replicated_axes: Any,
    specs: Any,
    batch_spec: Any,
    compute_dtype: Any,
    costs: Any,
    dispatch: Any,
    shared_ends: bool,
    order: Any,
    fsdp_axis: Any,
    zero1_axis: Any,
    zero1_parameters: bool,
    min_shard_size: Any,
    trainable: Any = None,
    example_mask: Any = None,
    grad_dtype: Any = None,
    stash: Any = None,
    offload: Any = 0,
    max_growth: Any = MAX_GROWTH,
) -> Options:
    """The options of `jaxpipe.value_and_grad` as one record, with defaults filled in.

    Raises:
      ValueError: an option is not what it is documented to be, or does not fit the schedule or the mesh.
    """
    axes = check_mesh(schedule, mesh, axis, data_axes, replicated_axes)
    stage_of_rows(schedule, order)
    if zero1_parameters and zero1_axis is None:
        raise ValueError(
            "zero1_parameters=True without zero1_axis: name the axes over which parameters are to be divided, such as "
            f"zero1_axis={axes.data!r}"
        )
    return Options(
        axes=axes,
        specs=check_specs_given(specs, axis),
        batch_spec=_check_batch_spec(batch_spec, axes, mesh),
        compute_dtype=_check_dtype("compute_dtype", compute_dtype),
        costs=_check_costs(costs),
        dispatch=_check_dispatch(dispatch, schedule),
        shared_ends=shared_ends,
        order=order,
        trainable=check_trainable(trainable),
        example_mask=_check_example_mask(example_mask),
        grad_dtype=_check_grad_dtype(grad_dtype),
        fsdp_axes=_check_sharding_axis("fsdp_axis", fsdp_axis, axes),
        zero1_axes=_check_sharding_axis("zero1_axis", zero1_axis, axes),
        zero1_parameters=zero1_parameters,
        min_shard_size=at_least("a pipeline", "min_shard_size", min_shard_size, 0),
        stash=None if stash is None else at_least("a pipeline", "stash", stash, 0),
        offload=_check_offload(offload, mesh),
        max_growth=check_growth("a pipeline", max_growth),
    )


def _check_offload(offload: Any, mesh: Any) -> int:
    """The bytes; raises ValueError unless they are a number and the mesh's devices reach pinned memory of the host."""
    offload = at_least("a pipeline", "offload", offload, 0)
    if offload and isinstance(mesh, Mesh):
        check_host_memory(offload, mesh.devices.flat[0])
    return offload


def check_host_memory(offload: int, device: Any) -> None:
    """Raises ValueError if a device has no pinned memory of the host for ``offload`` bytes."""
    kinds = sorted(memory.kind for memory in device.addressable_memories())
    if kinds and HOST_MEMORY not in kinds:  # devices that are only compiled for tell none
        raise ValueError(
            f"offload={offload:,}: devices of {device.platform} have memories {kinds} and not {HOST_MEMORY!r}, where "
            "residuals would go; leave offload out, and give a smaller stash= where memory is short"
        )


def _check_sharding_axis(argument: str, given: Any, axes: Axes) -> tuple[str, ...]:
    """Axes of fsdp_axis or zero1_axis; raises ValueError unless the batch is divided over them by hand."""
    names = () if given is None else _names(argument, given)
    if not set(names) <= set(axes.data) or len(set(names)) < len(names):
        wanted = tuple(dict.fromkeys((*axes.data, *names)))
        raise ValueError(
            f"{argument}={given!r}: name axes of data_axes, {list(axes.data)} here, each once, since the pipeline "
            f"itself gathers and sums over axes that divide the batch by hand; such as data_axes={wanted!r}"
        )
    return names


def check_model(model: Model, schedule: Schedule) -> None:
    """Raises ValueError unless the model's functions can be called as they will be."""
    if model.kind_of is not None and len(model.kind_of) != schedule.num_stages:
        raise ValueError(
            f"kind_of={list(model.kind_of)} has {len(model.kind_of)} stages, schedule {schedule.name!r} "
            f"{schedule.num_stages}: give each stage its kind"
        )
    stages = [("stage", function, _CALLS["stage"]) for function in model.stages]
    ends = [(name, getattr(model, name), arguments) for name, arguments in _CALLS.items() if name != "stage"]
    for name, function, arguments in (*stages, *ends):
        call = f"{name}({', '.join(arguments)})"
        if function is None and name != "stage":
            continue
        if not callable(function):
            raise ValueError(f"{name} is {function!r:.80}: pass a function, to be called as {call}")
        if not _takes(function, len(arguments)):
            raise ValueError(
                f"{name} takes {_signature(function)}, but is called as {call}: give it these arguments, "
                "whether it uses them or not"
            )


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def _takes(function: Callable[..., Any], count: int) -> bool:
    """Whether a function takes this many positional arguments; True where it has no signature."""
    signature = _signature(function)
    if signature is None:
        return True
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def check_schedule(schedule: Any) -> None:
    """Raises ValueError unless this is a Schedule."""
    if isinstance(schedule, Program):
        raise ValueError("schedule is a Program, which is a schedule lowered: pass its .schedule")
    if not isinstance(schedule, Schedule):
        name = schedule if isinstance(schedule, str) else "1f1b"
        raise ValueError(
            f"schedule is {schedule!r:.80}: pass a Schedule, such as jaxpipe.schedule.build({name!r}, num_ranks, "
            "num_microbatches)"
        )


def _check_costs(costs: Any) -> Costs:
    """The costs, or the default; raises ValueError where they are something else."""
    if costs is not None and not isinstance(costs, Costs):
        raise ValueError(f"costs={costs!r:.80}: pass jaxpipe.schedule.Costs(forward, backward_input, weight), or None")
    return costs or Costs()


def _check_dtype(argument: str, dtype: Any) -> Any:
    """The dtype, or None; raises ValueError unless it is floating."""
    if dtype is None:
        return None
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise ValueError(f"{argument}={dtype!r}: give a floating dtype, such as jnp.bfloat16, or None")
    return dtype


def _check_grad_dtype(dtype: Any) -> Any:
    """The dtype of sums, or None; raises ValueError unless it is floating, of 16 bits at least, and there."""
    if _check_dtype("grad_dtype", dtype) is None:
        return None
    if jnp.finfo(dtype).bits < 16:
        raise ValueError(
            f"grad_dtype={dtype!r}: sums in {jnp.finfo(dtype).bits} bits lose what is added to them; give "
            "jnp.bfloat16, jnp.float32 or None, which is float32"
        )
    if jax.dtypes.canonicalize_dtype(dtype) != jnp.dtype(dtype):
        raise ValueError(
            f"grad_dtype={dtype!r}: without 64-bit numbers JAX would sum in {jax.dtypes.canonicalize_dtype(dtype)}; "
            'call jax.config.update("jax_enable_x64", True), or give jnp.float32'
        )
    return jnp.dtype(dtype)


def _check_example_mask(name: Any) -> str | None:
    """The name; raises ValueError unless it is one, or None."""
    if name is not None and not isinstance(name, str):
        raise ValueError(f"example_mask={name!r:.80}: give the name that the mask has in the batch, such as 'real'")
    return name


def _check_dispatch(dispatch: Any, schedule: Schedule) -> str:
    """The way to run branches; `AUTOMATIC` of None."""
    if dispatch is None:
        return AUTOMATIC
    if dispatch not in DISPATCHERS:
        raise ValueError(f"dispatch={dispatch!r}; choose one of {DISPATCHERS}")
    return dispatch


def check_mesh(schedule: Schedule, mesh: Any, axis: Any, data_axes: Any, replicated_axes: Any) -> Axes:
    """The axes handled by hand; raises ValueError where mesh, axes and schedule do not fit together."""
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise ValueError(
            f"mesh is {mesh!r:.80}: pass a jax.sharding.Mesh, such as jaxpipe.make_mesh(pp={schedule.num_ranks})"
        )
    sizes = dict(mesh.shape)
    data, replicated = _names("data_axes", data_axes), _names("replicated_axes", replicated_axes)
    if not isinstance(axis, str):
        raise ValueError(f"axis={axis!r}: give the name of the mesh axis of the pipeline ranks, one of {list(sizes)}")
    manual = (axis, *data, *replicated)
    missing = [name for name in manual if name not in sizes]
    if missing:
        raise ValueError(f"the mesh has axes {sizes} and not {missing}: name its axes, or make it with these")
    if len(set(manual)) != len(manual):
        raise ValueError(f"axes {list(manual)} of pipeline, data_axes and replicated_axes must be distinct")
    if sizes[axis] != schedule.num_ranks:
        raise ValueError(
            f"schedule {schedule.name!r} is for {schedule.num_ranks} ranks, but mesh axis {axis!r} has size "
            f"{sizes[axis]}: build the schedule for {sizes[axis]} ranks, or the mesh with {axis}={schedule.num_ranks}"
        )
    if schedule.num_stages % schedule.num_ranks:
        fewer = schedule.num_stages - schedule.num_stages % schedule.num_ranks
        raise ValueError(
            f"schedule {schedule.name!r} has {schedule.num_stages} stages on {schedule.num_ranks} ranks: the rows of "
            "stage parameters are divided evenly over ranks, so divide the model into a multiple of "
            f"{schedule.num_ranks} stages, such as {fewer + schedule.num_ranks}; how many each rank runs is free"
        )
    not_auto = [str(name) for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Auto]
    if not_auto:
        raise ValueError(
            f"mesh axes {not_auto} are not Auto: make the mesh with axis_types=(AxisType.Auto,) * {len(sizes)}, "
            "or with jaxpipe.make_mesh"
        )
    complete = all(size == 1 for name, size in sizes.items() if name not in manual)
    return Axes(axis, data, replicated, {name: sizes[name] for name in manual}, complete)


def _names(argument: str, axes: Any) -> tuple[str, ...]:
    """Names of axes; a single one may be a str."""
    names = (axes,) if isinstance(axes, str) else axes
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{argument}={axes!r}: give names of mesh axes, such as ('dp',)")
    return tuple(names)


def check_specs_given(specs: Any, axis: str) -> Params:
    """The specs, or the default: stages by rows, the others whole."""
    default = Params(P(axis), P())
    if specs is None:
        return default
    if not isinstance(specs, Params):
        raise ValueError(f"specs is {specs!r:.80}: pass jaxpipe.Params(stages=..., outer=...) of PartitionSpecs")
    return Params(*(given if given is not None else other for given, other in zip(specs, default, strict=True)))


def _check_batch_spec(batch_spec: Any, axes: Axes, mesh: Any) -> P:
    """The batch's spec, or the default: the leading dimension over the data axes."""
    if batch_spec is None:
        return P(axes.data or None)
    spec = to_spec(batch_spec, mesh, "batch_spec")
    check_names(spec, mesh, "batch_spec")
    for entry in spec:
        wrong = {name for name in entry_axes(entry) if name in axes.names and name not in axes.data}
        if wrong:
            raise ValueError(
                f"batch_spec is {spec}, but the batch is the same on all devices of {sorted(wrong)}: "
                f"it may be divided over data_axes, {list(axes.data)} here, and over the compiler's axes"
            )
    return spec


def to_spec(given: Any, mesh: Any, name: str) -> P:
    """A PartitionSpec, of itself or of a NamedSharding on the same mesh."""
    if isinstance(given, NamedSharding):
        if dict(given.mesh.shape) != dict(mesh.shape):
            raise ValueError(
                f"{name} is sharded over a mesh of {dict(given.mesh.shape)}, the pipeline over one of "
                f"{dict(mesh.shape)}: pass PartitionSpecs, or shardings on the pipeline's mesh"
            )
        return given.spec
    if not isinstance(given, P):
        raise ValueError(f"{name} is {given!r:.80}, not a PartitionSpec such as jax.sharding.PartitionSpec('pp')")
    return given


def check_names(spec: P, mesh: Any, name: str) -> None:
    """Raises ValueError unless a spec names axes of the mesh, each once."""
    names = [each for entry in spec for each in entry_axes(entry)]
    if len(set(names)) < len(names) or not set(names) <= set(mesh.shape):
        raise ValueError(f"{name} is {spec}: name axes of the mesh, {dict(mesh.shape)}, each at most once")


def entry_axes(entry: Any) -> tuple[str, ...]:
    """The mesh axes that one entry of a PartitionSpec names."""
    return tuple(name for name in (entry if isinstance(entry, tuple) else (entry,)) if isinstance(name, str))
