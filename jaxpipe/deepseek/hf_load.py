"""Weights of a Hugging Face folder, read straight into the shards that training uses.

Each process reads what its devices keep, one leaf after the other and a slab of a shard at a time, so beside the shards
themselves its memory holds one slab and a few pieces of files, whatever the size of the model.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

import jaxpipe
from jaxpipe.deepseek.block import first_placement
from jaxpipe.deepseek.config import ModelConfig
from jaxpipe.deepseek.hf_config import from_hf_config
from jaxpipe.deepseek.hf_files import DTYPES, TensorEntry, check_sums, listed, open_folder, read_json
from jaxpipe.deepseek.hf_fp8 import dequantise
from jaxpipe.deepseek.hf_names import Tensor, TensorPart, scale_name, tensors
from jaxpipe.deepseek.hf_places import in_stages
from jaxpipe.deepseek.lora import is_adapter
from jaxpipe.deepseek.model import DeepSeekModel, build_model, names

PIECE = 8 << 20
"""Bytes of a file that are read at once."""

SLAB = 1 << 28
"""Bytes of a shard that are put together in the host's memory before they go to its device."""

TRANSPOSED = 64
"""Rows of a file that are transposed at once: then both sides stay in the processor's caches."""

COMPUTED = ("rotary_emb.inv_freq",)
"""Ends of names of tensors that follow from the config, which older files hold."""

Box = tuple[tuple[int, int], ...]
"""Of every axis of an array a start and an end."""

FLOATS = tuple(name for name in DTYPES if name != "F8_E4M3")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of the model in the files.

    Attributes:
      tensor: its shape and places.
      entry: its place in a file.
      scales: of FP8, whole.
    """

    tensor: Tensor
    entry: TensorEntry
    scales: TensorEntry | None = None

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Some rows, in float32 where the file has another dtype of fewer bits than the masters."""
        found = self.entry.rows(start, stop)
        if self.scales is not None:
            return dequantise(found, self.scales.rows(), start)
        if self.entry.dtype == "BF16":
            # Several times as fast as a cast, and as exact.
            wide = np.empty(found.shape, np.uint32)
            np.left_shift(found.view(np.uint16), 16, out=wide, dtype=np.uint32, casting="unsafe")
            return wide.view(np.float32)
        return found


def load(
    folder: str | os.PathLike[str],
    mesh: Mesh,
    schedule: jaxpipe.schedule.Schedule,
    *,
    dtype: Any = jnp.float32,
    config: ModelConfig | None = None,
    axis: str = "ep",
    strict: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[ModelConfig, jaxpipe.Params]:
    """The model of a Hugging Face folder: its config and its parameters, on the devices that training keeps them on.

    Args:
      folder: with config.json and safetensors files, one or many with their index, in float32, float16, bfloat16 or
        DeepSeek's FP8 with ``weight_scale_inv``.
      mesh: with axis "pp", and the experts' axis or not.
      schedule: that the parameters are arranged for.
      dtype: of the parameters; float32 for training. Selection biases are float32 whatever it is.
      config: of the model, where it should differ from config.json in what changes no result, such as redundant slots
        of experts; None: `from_hf_config` of config.json.
      axis: the mesh axis over which experts are spread, where the mesh has it.
      strict: refuse files with tensors that the model does not have; otherwise they are warned of and left out.
      progress: called with bytes of parameters that this process has read, and will have.

    Returns:
      The config and ``jaxpipe.Params``. Where config.json asks for multi-token prediction and the files hold none of
      it, as those that transformers writes, a warning says so, and the config is without.

    Raises:
      ValueError: a config that is not understood, or that computes other results than config.json says; missing,
        unexpected, truncated or damaged files and tensors; tensors of another shape or dtype.

    >>> config, params = load("DeepSeek-V3", mesh, schedule)  # doctest: +SKIP
    """
    config = folder_config(folder, config)
    expert_axis = axis if axis in mesh.axis_names else None
    model = build_model(config, schedule, 0, axis=expert_axis, abstract=True)
    return config, load_params(folder, model, mesh, dtype=dtype, strict=strict, progress=progress)


def folder_config(folder: str | os.PathLike[str], config: ModelConfig | None = None) -> ModelConfig:
    """The config of a Hugging Face folder, without multi-token prediction where its files hold none; see `load`.

    Args:
      folder: with config.json, unless a config is given, and safetensors files.
      config: that is thought to be the folder's; where the folder has config.json too, they are compared.

    Raises:
      ValueError: a config that is not understood, or that computes other results than config.json says; missing or
        damaged files.
    """
    folder = pathlib.Path(folder)
    path = folder / "config.json"
    if config is None:
        config = from_hf_config(read_json(path))
    elif path.is_file():
        _check_results(path, config)
    found = as_held(config, open_folder(folder))
    if found != config:
        warnings.warn(
            f"{folder} holds nothing of the multi-token prediction that its config names: the model is without it",
            stacklevel=3,
        )
    return found


def _check_results(path: pathlib.Path, config: ModelConfig) -> None:
    """Compares a config with a config.json in what changes results but, not always, the shapes of tensors."""
    given, told = _of_results(config), _of_results(from_hf_config(read_json(path)))
    wrong = [f"{name}={value!r}, where it says {told[name]!r}" for name, value in given.items() if value != told[name]]
    if wrong:
        raise ValueError(
            f"the config is not that of {path}: {'; '.join(wrong)}: leave the config (--config) out, or correct the "
            "file"
        )


def _of_results(config: ModelConfig) -> dict[str, Any]:
    found = {name: getattr(config, name) for name in ("rope", "norm_eps", "heads", "content", "rotary", "value")}
    router = config.moe.router
    found |= {name: getattr(router, name) for name in ("top_k", "scoring", "normalise", "scale")}
    # Where all groups are allowed, they change nothing.
    some = router.top_groups < router.num_groups
    fields = ("num_groups", "top_groups", "group_best")
    return found | {name: getattr(router, name) if some else None for name in fields}


def as_held(config: ModelConfig, entries: Mapping[str, TensorEntry]) -> ModelConfig:
    """The config without multi-token prediction where files hold nothing of it, as those that transformers writes.

    Raises:
      ValueError: more experts than the files can hold.
    """
    _check_count(config, entries)
    held = config.mtp and any(tensor.mtp and name in entries for name, tensor in tensors(config).items())
    costs = config.layer_costs
    if costs is not None and not held:
        costs = dataclasses.replace(costs, mtp=None)
    return dataclasses.replace(config, mtp=held, layer_costs=costs)


def _check_count(config: ModelConfig, entries: Mapping[str, TensorEntry]) -> None:
    """Refuses a config of far more layers or experts than files hold, before a table of them fills the memory."""
    least = 3 * (config.moe_layers * config.experts + config.dense_layers)
    if least > len(entries):
        raise ValueError(
            f"the files hold {len(entries)} tensors, and {config.layers} layers, {config.moe_layers} of them with "
            f"{config.experts} experts, have {least} or more: are config.json and files of one model?"
        )


def load_params(
    folder: str | os.PathLike[str],
    model: DeepSeekModel,
    mesh: Mesh,
    *,
    dtype: Any = None,
    strict: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> jaxpipe.Params:
    """The parameters of a model from a Hugging Face folder; see `load`.

    Args:
      folder: with safetensors files.
      model: from `build_model`, ``abstract``; it says where each parameter is. Its adapters are new ones.
      mesh: of the model's axes.
      dtype: see `load`; None: that which each parameter has in the model, float32, or of a model with adapters that of
        its activations where nothing is trained.
      strict, progress: see `load`.

    Raises:
      ValueError: see `load`.
    """
    folder, dtype = pathlib.Path(folder), None if dtype is None else jnp.dtype(dtype)
    if dtype is not None and (not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2):
        raise ValueError(f"dtype={dtype}: parameters are float32, bfloat16 or float16")
    sources = find_sources(folder, model.config, strict=strict)
    pieces: dict[tuple[str, ...], list[tuple[StoredTensor, TensorPart]]] = {}
    for source in sources.values():
        for part in source.tensor.parts:
            moved = in_stages(part, model.arrangement)
            pieces.setdefault(moved.path, []).append((source, moved))
    leaves, structure = jax.tree_util.tree_flatten_with_path(model.params)
    shardings = [NamedSharding(mesh, spec) for spec in jax.tree.leaves(model.specs)]
    kinds = [_dtype_of(leaf.dtype, pieces.get(names(path), ()), dtype) for path, leaf in leaves]
    sizes = [
        len(_shards(leaf.shape, sharding)) * math.prod(sharding.shard_shape(leaf.shape)) * kind.itemsize
        for (_, leaf), sharding, kind in zip(leaves, shardings, kinds, strict=True)
    ]
    adapters = _new_adapters(model, shardings)
    done, arrays = 0, []
    with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for (path, leaf), sharding, kind, size in zip(leaves, shardings, kinds, sizes, strict=True):
            if (adapter := adapters.get(names(path))) is not None:
                arrays.append(adapter)
            else:
                made = _made_here(model.config, names(path)[-1], leaf)
                arrays.append(_fill(leaf.shape, kind, sharding, pieces.get(names(path), ()), made, pool))
            done += size
            if progress is not None:
                progress(done, sum(sizes))
    return jax.tree.unflatten(structure, arrays)


def find_sources(folder: pathlib.Path, config: ModelConfig, *, strict: bool = True) -> dict[str, StoredTensor]:
    """The tensors of a model in the files of a folder, by name; copies are left out.

    Files' checksums are compared, where there are any; processes share the work.

    Raises:
      ValueError: missing and unexpected names, other shapes and dtypes, files that are not what their checksums say.
    """
    entries = open_folder(folder)
    _check_count(config, entries)
    table = tensors(config)
    known = set(table) | {scale_name(name) for name, tensor in table.items() if tensor.quantised}
    missing = [name for name, tensor in table.items() if name not in entries and tensor.copy_of is None]
    unexpected = [name for name in entries if name not in known and not name.endswith(COMPUTED)]
    if missing:
        extra = f"; and {listed(unexpected)} that the model does not have" if unexpected else ""
        raise ValueError(f"{folder} lacks {listed(missing)}{extra}: are config.json and files of one model?")
    if unexpected:
        text = f"{folder} holds {listed(unexpected)} that the model does not have"
        if strict:
            raise ValueError(f"{text}: are config.json and files of one model? strict=False leaves them out")
        warnings.warn(f"{text}: they are left out", stacklevel=3)
    found = {}
    for name, tensor in table.items():
        if name not in entries:
            continue
        entry, scales = entries[name], entries.get(scale_name(name)) if tensor.quantised else None
        _check_shape(entry, tensor.shape, (*FLOATS, "F8_E4M3") if tensor.quantised else FLOATS)
        if (entry.dtype == "F8_E4M3") != (scales is not None):
            other = f"{scale_name(name)} is missing" if scales is None else f"there is {scales.name} beside it"
            raise ValueError(f"{name} in {entry.path} is {entry.dtype}, and {other}: FP8 alone has scales")
        if scales is not None:
            _check_shape(scales, tensor.scale_shape, ("F32",))
        if tensor.copy_of is None:
            found[name] = StoredTensor(tensor, entry, scales)
    files = sorted({stored.entry.path.name for stored in found.values()})
    check_sums(folder, files[jax.process_index() :: jax.process_count()])
    return found


def _check_shape(entry: TensorEntry, shape: tuple[int, ...], dtypes: Sequence[str]) -> None:
    if entry.shape != shape:
        raise ValueError(f"{entry.name} in {entry.path} has shape {list(entry.shape)}: the config says {list(shape)}")
    if entry.dtype not in dtypes:
        raise ValueError(f"{entry.name} in {entry.path} is {entry.dtype}: it should be {' or '.join(dtypes)}")


def _dtype_of(declared: Any, pieces: Sequence[tuple[StoredTensor, TensorPart]], wanted: np.dtype | None) -> np.dtype:
    """Of a leaf: integers and biases as the model declares them, otherwise as wanted, if anything is."""
    exact = any(source.tensor.exact for source, _ in pieces) or not jnp.issubdtype(declared, jnp.floating)
    return np.dtype(declared) if wanted is None or exact else wanted


def _new_adapters(model: DeepSeekModel, shardings: Sequence[NamedSharding]) -> dict[tuple[str, ...], jax.Array]:
    """Adapters as a new model has them, by path, each on the devices that keep it; nothing else is made for them."""
    paths = [names(path) for path, _ in jax.tree_util.tree_leaves_with_path(model.params)]
    chosen = [place for place, path in enumerate(paths) if is_adapter(path[-1])]
    if not chosen:
        return {}

    def make() -> list[jax.Array]:
        leaves = jax.tree.leaves(model.init(model.seed))
        return [leaves[place] for place in chosen]

    made = jax.jit(make, out_shardings=[shardings[place] for place in chosen])()
    return {paths[place]: leaf for place, leaf in zip(chosen, made, strict=True)}


def _made_here(config: ModelConfig, name: str, leaf: Any) -> np.ndarray | None:
    """What a leaf holds where files say nothing: a placement, one for all rows; None: zeros."""
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return None
    return np.asarray(getattr(first_placement(config.experts, config.redundant), name), leaf.dtype)


def _shards(shape: tuple[int, ...], sharding: NamedSharding) -> dict[Box, list[Any]]:
    """The devices of this process that keep each part of an array."""
    found: dict[Box, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        cuts = index or (slice(None),) * len(shape)
        box = tuple(cut.indices(size)[:2] for cut, size in zip(cuts, shape, strict=True))
        found.setdefault(box, []).append(device)
    return found


def _fill(
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: NamedSharding,
    pieces: Sequence[tuple[StoredTensor, TensorPart]],
    made: np.ndarray | None,
    pool: concurrent.futures.Executor,
) -> jax.Array:
    """A leaf, shard by shard, large ones slab by slab."""
    arrays = []
    for box, devices in _shards(shape, sharding).items():
        slabs = _slabs(box, SLAB // dtype.itemsize)
        wholes: list[jax.Array] = []
        if len(slabs) > 1:
            sizes = [high - low for low, high in box]
            wholes = [jnp.zeros(sizes, dtype, device=device) for device in devices]
        for slab in slabs:
            block = np.zeros([high - low for low, high in slab], dtype)
            if made is not None:
                block[...] = made
            # The list is made so that errors are raised.
            list(pool.map(lambda copy: copy(), _copies(block, slab, pieces)))
            parts = [jax.device_put(block, device) for device in devices]
            if len(slabs) > 1:
                start = tuple(np.int32(low - first) for (low, _), (first, _) in zip(slab, box, strict=True))
                wholes = [_put(whole, part, start) for whole, part in zip(wholes, parts, strict=True)]
            else:
                wholes = parts
            jax.block_until_ready(wholes)
        arrays += wholes
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


@functools.partial(jax.jit, donate_argnums=0)
def _put(whole: jax.Array, part: jax.Array, start: tuple[np.int32, ...]) -> jax.Array:
    """A shard with a slab in its place, in the memory of the one without."""
    return jax.lax.dynamic_update_slice(whole, part, start)


def _slabs(box: Box, most: int) -> list[Box]:
    """A box in halves of halves, along the first axes first, until none has more elements than ``most``.

    >>> _slabs(((0, 2), (4, 7)), 3)
    [((0, 1), (4, 7)), ((1, 2), (4, 7))]
    >>> _slabs(((5, 6), (4, 7)), 2)
    [((5, 6), (4, 5)), ((5, 6), (5, 7))]
    """
    if math.prod(high - low for low, high in box) <= max(1, most):
        return [box]
    axis, (low, high) = next((axis, ends) for axis, ends in enumerate(box) if ends[1] - ends[0] > 1)
    middle = (low + high) // 2
    halves = (low, middle), (middle, high)
    return [slab for half in halves for slab in _slabs((*box[:axis], half, *box[axis + 1 :]), most)]


def _copies(
    shard: np.ndarray, box: Box, pieces: Sequence[tuple[StoredTensor, TensorPart]]
) -> Iterator[Callable[[], None]]:
    """What copies pieces of files into a shard, to be called in any order."""
    for source, part in pieces:
        within = _intersect(part, box)
        if within is None:
            continue
        there, block = within
        # The file's first axis, in parts of `split`: rows in one stretch.
        region, first = shard[there], part.order.index(0)
        start, stop = block[first]
        step = max(1, PIECE // max(1, source.entry.nbytes // part.split[0]))
        for begin in range(start, stop, step):
            end = min(stop, begin + step)
            own = region[(slice(None),) * first + (slice(begin - start, end - start),)]
            yield functools.partial(_copy, source, part, (begin, end), block, own)


def _intersect(part: TensorPart, box: Box) -> tuple[tuple[int | slice, ...], Box] | None:
    """Where in a shard a part's elements are, and which of the part's own they are; None: none.

    Returns:
      An index of the shard, integers and slices; and for every axis of ``part.shape`` a start and an end.
    """
    there: list[int | slice] = []
    block: list[tuple[int, int]] = []
    sizes = iter(part.shape)
    for axis, (first, last) in enumerate(box):
        place = part.index[axis] if axis < len(part.index) else slice(None)
        if isinstance(place, int):
            if not first <= place < last:
                return None
            there.append(place - first)
            continue
        begin = place.start or 0
        size = next(sizes)
        low, high = max(first, begin), min(last, begin + size)
        if low >= high:
            return None
        there.append(slice(low - first, high - first))
        block.append((low - begin, high - begin))
    return tuple(there), tuple(block)


def _copy(source: StoredTensor, part: TensorPart, rows: tuple[int, int], block: Box, target: np.ndarray) -> None:
    """Some of a file's rows, divided as `TensorPart.split` says, to their places in a shard."""
    height = part.split[0]
    low, high = (row + (part.take[0].start or 0) for row in rows)
    each = source.tensor.shape[0] // height
    found = source.rows(low * each, high * each).reshape(high - low, *part.split[1:])
    cuts = [slice(None)] * found.ndim
    for axis, (start, stop) in zip(part.order, block, strict=True):
        if axis:
            origin = part.take[axis].start or 0
            cuts[axis] = slice(origin + start, origin + stop)
    found, first = found[tuple(cuts)].transpose(part.order), part.order.index(0)
    step = max(1, TRANSPOSED // each)
    for begin in range(0, high - low, step):
        some = (slice(None),) * first + (slice(begin, begin + step),)
        target[some] = found[some]
