"""Parameters on a mesh as a Hugging Face folder: each process writes what its devices keep."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe.deepseek.config import ModelConfig
from jaxpipe.deepseek.hf_names import Path, Tensor, TensorPart
from jaxpipe.deepseek.hf_places import in_stages
from jaxpipe.deepseek.hf_write import FORMATS, LARGEST, Written, write_folder
from jaxpipe.deepseek.model import DeepSeekModel, build_model, names


def save(
    folder: str | os.PathLike[str],
    params: jaxpipe.Params,
    config: ModelConfig,
    schedule: jaxpipe.schedule.Schedule,
    *,
    dtype: str = "bfloat16",
    max_shard_size: int = LARGEST,
    like: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Writes parameters as a Hugging Face folder, which transformers and vLLM read.

    The folder appears whole or not at all. Processes of one run call this together, on a file system that all share.

    Args:
      folder: to write.
      params: as `load` returns them and training changes them. Adapters are merged into their matrices.
      config: of the model.
      schedule: that the parameters are arranged for.
      dtype: of the weights in the files: "float32", "bfloat16", "float16", or "fp8", DeepSeek's: matrices in 8 bits
        with ``weight_scale_inv`` for blocks of 128 x 128, all else in bfloat16. Selection biases are always float32.
      max_shard_size: bytes of tensors in a file, beyond which another is begun.
      like: a Hugging Face folder whose tokenizer and generation_config.json go with the weights.
      overwrite: whether to replace a folder that is there.
      progress: called with bytes that this process has written, and those of the whole folder.

    Returns:
      A line that says what was written.

    Raises:
      ValueError: an unknown dtype; parameters of another model or schedule; a folder that is there; numbers that FP8
        or float16 cannot hold.
      OSError: the files cannot be written.

    >>> save("out", params, config, schedule, like="DeepSeek-V3")  # doctest: +SKIP
    """
    sharding = jax.tree.leaves(params)[0].sharding
    axes = sharding.mesh.axis_names if isinstance(sharding, NamedSharding) else ()
    # Of the model only the places of its parameters are asked for, and those do not depend on the axis' name.
    axis = next((str(name) for name in axes if name != "pp"), None)
    model = build_model(config, schedule, 0, axis=axis, abstract=True)
    return save_params(
        folder,
        params,
        model,
        dtype=dtype,
        max_shard_size=max_shard_size,
        like=like,
        overwrite=overwrite,
        progress=progress,
    )


def save_params(
    folder: str | os.PathLike[str],
    params: jaxpipe.Params,
    model: DeepSeekModel,
    *,
    dtype: str = "bfloat16",
    **options: Any,
) -> str:
    """`save` of parameters of a model from `build_model`, which says where each is.

    Args:
      folder, dtype, options: see `save`.
      params: of the model.
      model: with or without parameters.

    Raises:
      ValueError, OSError: see `save`.
    """
    _check_params(params, model)
    if dtype not in FORMATS:
        raise ValueError(f"dtype={dtype!r}: weights are written in {', '.join(FORMATS)}")
    model, params = model.merged(params)
    leaves = {names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    # What float16 and FP8 cannot hold is found on the host.
    kind = jnp.dtype(jnp.float32 if dtype in ("fp8", "float16") else dtype)
    blocks = functools.partial(_blocks, leaves, model, kind)
    return write_folder(folder, model.config, blocks, dtype=dtype, **options)


def _check_params(params: jaxpipe.Params, model: DeepSeekModel) -> None:
    """Refuses parameters of another model or schedule."""
    leaves = {names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    wanted = {names(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(model.params)}
    if (found := {path: leaf.shape for path, leaf in leaves.items()}) != wanted:
        wrong = sorted(path for path in found | wanted if found.get(path) != wanted.get(path))
        raise ValueError(
            f"{len(wrong)} parameters are not of this model and schedule, the first is {'/'.join(wrong[0])}: "
            f"{found.get(wrong[0])} instead of {wanted.get(wrong[0])}; give config and schedule that they are "
            "trained with"
        )


def _blocks(
    leaves: Mapping[Path, jax.Array], model: DeepSeekModel, dtype: np.dtype, table: Mapping[str, Tensor]
) -> Iterator[Written]:
    """What this process writes of each tensor. All processes go through the same tensors, as some are gathered."""
    slot: Path = ()
    whole: dict[Path, jax.Array] = {}
    for name, tensor in table.items():
        parts = [in_stages(part, model.arrangement) for part in tensor.parts]
        kind = np.dtype(np.float32) if tensor.exact else dtype
        if parts[0].path[:2] != slot:
            slot, whole = parts[0].path[:2], {}
        for part in parts:
            if part.path not in whole:
                whole[part.path] = _with_tensors_whole(leaves[part.path], part)
        if not parts[0].index:
            # Of the model itself, in files as it is here: rows may be anywhere.
            for shard in _own_shards(whole[parts[0].path]):
                row = (shard.index[0].indices(tensor.shape[0])[0]) if shard.index else 0
                yield name, row, np.asarray(shard.data.astype(kind))
        elif (found := [_block(whole[part.path], part, kind) for part in parts])[0] is not None:
            array = np.empty(tensor.shape, kind)
            for part, block in zip(parts, found, strict=True):
                part.to_file(block, array)
            yield name, 0, array


def _with_tensors_whole(leaf: jax.Array, part: TensorPart) -> jax.Array:
    """The leaf with every tensor on one device: rows of stages and experts, or rows of the vocabulary, stay apart."""
    if not isinstance(leaf.sharding, NamedSharding):
        return leaf
    apart = max(1, sum(isinstance(place, int) for place in part.index))
    spec = tuple(leaf.sharding.spec)
    if not any(spec[apart:]):
        return leaf
    return jax.device_put(leaf, NamedSharding(leaf.sharding.mesh, P(*spec[:apart])))


def _own_shards(leaf: jax.Array) -> list[Any]:
    """The shards that this process is to write: one device has to, of those that keep the same."""
    return [shard for shard in leaf.addressable_shards if shard.replica_id == 0]


def _block(leaf: jax.Array, part: TensorPart, dtype: np.dtype) -> np.ndarray | None:
    """``leaf[part.index]`` from the shard that has it; None: another process writes it."""
    for shard in _own_shards(leaf):
        starts = []
        for place, cut, size in zip(part.index, shard.index, leaf.shape, strict=False):
            low, high, _ = cut.indices(size)
            if isinstance(place, int):
                if not low <= place < high:
                    break
                starts.append(place - low)
            else:
                starts.append(place.indices(size)[0])
        else:
            starts += [0] * (leaf.ndim - len(starts))
            sizes = (1,) * (leaf.ndim - len(part.shape)) + part.shape
            return np.asarray(_cut(shard.data, tuple(starts), sizes, dtype)).reshape(part.shape)
    return None


@functools.partial(jax.jit, static_argnums=(2, 3))
def _cut(shard: jax.Array, starts: Sequence[Any], sizes: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    """TensorPart of a shard, on its device, in another dtype."""
    return jax.lax.dynamic_slice(shard, starts, sizes).astype(dtype)
