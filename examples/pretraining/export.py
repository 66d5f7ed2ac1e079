"""Parameters of a run as plain arrays, one for each layer, in safetensors files."""

from __future__ import annotations

import json
import math
import os
import pathlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.deepseek.lora import LoRA
from pretraining.checkpoint import BadCheckpoint, DamagedError, Json, open_body, orbax, short
from pretraining.layout import fingerprint
from pretraining.optional import need

LARGEST = 4 << 30
"""Bytes of arrays in a file, beyond which another is begun."""

LAYERS, OUTER = "params/layers/", "params/outer/"
PLACEMENT = frozenset({"phy2log", "log2phy", "logcnt"})
"""Where copies of experts are, which says nothing about the model."""


def export_run(run: pathlib.Path, to: pathlib.Path, dtype: str = "float32", largest: int = LARGEST) -> str:
    """Writes the parameters of a run's newest whole checkpoint.

    Layers are counted through the whole model, "layers.0.attention.out" and so on. What does not fit into one file goes
    into several, with an index beside them, as other tools expect it. Adapters are arrays of their own here.

    Args:
      run: the run's folder, or that of its checkpoints.
      to: a name that ends in ``.safetensors``.
      dtype: of floating-point arrays in the file.
      largest: bytes of a file.

    Returns:
      A line that says what was written.

    Raises:
      ValueError: there is no checkpoint, another ending, or a file of that name already.
      DamagedError: no checkpoint can be read.
      OSError: the file cannot be written.
      MissingPackage: safetensors or orbax is not installed.
    """
    save_file = need("safetensors.flax", "exports", "safetensors").save_file
    if to.suffix != ".safetensors":
        raise ValueError(f"--to {to}: the name must end in .safetensors")
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype {dtype}: plain arrays are float32 or bfloat16; fp8 is for folders, --to {to.stem}")
    for path in (to, _index_of(to)):
        _refuse_existing(path)
    return newest_checkpoint(
        run, lambda manager, step: _export(manager, save_file, step, to, jnp.dtype(dtype), largest)
    )


def newest_checkpoint(run: pathlib.Path, write: Callable[[Any, int], str]) -> str:
    """Has the newest whole checkpoint of a run written.

    Args:
      run: the run's folder, or that of its checkpoints.
      write: given orbax's manager of the checkpoints and a step. What it reads with `read_body` and `read_arrays` may
        be damaged, and then it is called with the step before. Other errors are not the checkpoint's, and end it.

    Returns:
      What ``write`` does.

    Raises:
      ValueError: there is no checkpoint; of ``write``.
      DamagedError: no checkpoint can be read.
      OSError: of ``write``.
      MissingPackage: orbax is not installed.
    """
    folder = (run / "checkpoints" if (run / "checkpoints").is_dir() else run).absolute()
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: name the --out folder of a run, or its checkpoints")
    options = orbax().CheckpointManagerOptions(read_only=True, create=False)
    with orbax().CheckpointManager(folder, options=options) as manager:
        steps = sorted(manager.all_steps())
        if not steps:
            raise ValueError(f"there is no checkpoint in {folder}")
        for step in reversed(steps):
            try:
                return write(manager, step)
            except BadCheckpoint as error:
                warnings.warn(
                    f"the checkpoint of step {step} in {folder} is damaged ({error}); older ones are tried",
                    stacklevel=2,
                )
    raise DamagedError(f"all {len(steps)} checkpoints in {folder} are damaged")


def lora_of(facts: Json) -> LoRA | None:
    """The adapters of a checkpoint's model; None where it has none.

    >>> lora_of({"lora": {"rank": 4, "alpha": None, "targets": ["out"]}})
    LoRA(rank=4, alpha=None, targets=('out',))
    """
    told = facts.get("lora")
    return None if told is None else LoRA(told["rank"], told["alpha"], tuple(told["targets"]))


def plain_names(name: str, layers: int | None, dense_layers: int) -> list[str]:
    """The exported names of a checkpoint's array: one, or one for each layer.

    >>> plain_names("params/layers/moe/w_in", 2, 1)
    ['layers.1.moe.w_in', 'layers.2.moe.w_in']
    >>> plain_names("params/outer/layer_0/attention/out", None, 1)
    ['layers.0.attention.out']
    """
    if layers is not None:
        rest = name.removeprefix(LAYERS).replace("/", ".")
        return [f"layers.{dense_layers + layer}.{rest}" for layer in range(layers)]
    first, *rest = name.removeprefix(OUTER).split("/")
    if first.startswith("layer_"):
        first = f"layers.{first.removeprefix('layer_')}"
    return [".".join([first, *rest])]


def _export(manager: Any, save_file: Callable[..., None], step: int, to: pathlib.Path, dtype: Any, largest: int) -> str:
    body = read_body(manager, step)
    names = [
        name for name in body["arrays"] if name.startswith((LAYERS, OUTER)) and name.rsplit("/", 1)[-1] not in PLACEMENT
    ]
    shapes = {name: _parse(body["arrays"][name]) for name in names}
    groups = _groups({name: math.prod(shape) * kind.itemsize for name, (kind, shape) in shapes.items()}, largest)
    targets = [to.with_name(f"{to.stem}-{i + 1:05}-of-{len(groups):05}{to.suffix}") for i in range(len(groups))]
    targets = [to] if len(groups) == 1 else targets
    for target in targets:
        _refuse_existing(target)
    files: dict[str, str] = {}
    size = 0
    # They get their names when all are whole, and the index, which tells of them, last.
    scratch = [target.with_name(f"{target.name}.{os.getpid()}.tmp") for target in targets]
    try:
        for group, file, target in zip(groups, scratch, targets, strict=True):
            plain: dict[str, jax.Array] = {}
            for name, array in read_arrays(manager, step, body, group).items():
                if jnp.issubdtype(array.dtype, jnp.floating):
                    array = array.astype(dtype)
                layers = array.shape[0] if name.startswith(LAYERS) else None
                parts = [array] if layers is None else list(array)
                plain |= dict(zip(plain_names(name, layers, body["facts"]["dense_layers"]), parts, strict=True))
            try:
                save_file(plain, file, {"format": "flax", "step": str(step)})
            except Exception as error:  # safetensors has its own for a full disk
                raise OSError(f"{target} cannot be written: {error}") from error
            files |= dict.fromkeys(plain, target.name)
            size += sum(array.nbytes for array in plain.values())
        for file, target in zip(scratch, targets, strict=True):
            os.replace(file, target)
    finally:
        for file in scratch:
            file.unlink(missing_ok=True)
    if len(groups) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": files}
        file = _index_of(to).with_suffix(f".{os.getpid()}.tmp")
        file.write_text(json.dumps(index, indent=1), encoding="utf-8")
        os.replace(file, _index_of(to))
    return f"step {step}: {len(files)} arrays, {size / 1e6:.1f} MB in {len(groups)} files, {to}"


def _index_of(to: pathlib.Path) -> pathlib.Path:
    return to.with_name(f"{to.name}.index.json")


def _refuse_existing(path: pathlib.Path) -> None:
    if path.exists():
        raise ValueError(f"{path} is there already: choose another name, or remove it")


def read_body(manager: Any, step: int) -> Json:
    """What a checkpoint says of itself: its facts, and shapes and fingerprints of its arrays.

    Raises:
      BadCheckpoint: it is damaged.
    """
    args = orbax().args
    try:
        return open_body(manager.restore(step, args=args.Composite(meta=args.JsonRestore()))["meta"])
    except BadCheckpoint:
        raise
    except Exception as error:  # of many kinds, as files may lack anything
        raise BadCheckpoint(short(error)) from error


def read_arrays(manager: Any, step: int, body: Json, names: Sequence[str]) -> dict[str, jax.Array]:
    """Some arrays alone, on one device, checked.

    Raises:
      BadCheckpoint: they are damaged.
      ValueError: the checkpoint, which is whole, has none of such a name.
    """
    if missing := [name for name in names if name not in body["arrays"]]:
        raise ValueError(f"the checkpoint of step {step} holds no array {missing[0]}: its model is another")
    shapes, sums = {name: _parse(body["arrays"][name]) for name in names}, body["fingerprints"]
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = {name: jax.ShapeDtypeStruct(shape, kind, sharding=here) for name, (kind, shape) in shapes.items()}
    ocp = orbax()
    restore = ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=True,
    )
    try:
        arrays = manager.restore(step, args=ocp.args.Composite(state=restore))["state"]
    except Exception as error:  # of many kinds, as files may lack anything
        raise BadCheckpoint(short(error)) from error
    for name in shapes:
        if int(fingerprint(arrays[name])) != sums[name]:
            raise BadCheckpoint(f"array {name} does not match its checksum")
    return {name: arrays[name] for name in shapes}


def _groups(sizes: dict[str, int], largest: int) -> list[list[str]]:
    """Names in order, as many in a group as fit."""
    groups: list[list[str]] = [[]]
    left = largest
    for name, size in sizes.items():
        if size > left and groups[-1]:
            groups.append([])
            left = largest
        groups[-1].append(name)
        left -= size
    return groups


def _parse(text: str) -> tuple[np.dtype, tuple[int, ...]]:
    """Dtype and shape of "float32[2, 3]"."""
    kind, _, shape = text.rstrip("]").partition("[")
    return jnp.dtype(kind), tuple(int(size) for size in shape.split(",") if size)
