"""Parameters of a run as a folder that transformers, vLLM and `pretrain.py --from` read."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxpipe.deepseek.hf_config import from_hf_config
from jaxpipe.deepseek.hf_load import find_sources, folder_config
from jaxpipe.deepseek.hf_names import Tensor
from jaxpipe.deepseek.hf_write import LARGEST, Written, write_folder
from jaxpipe.deepseek.lora import A, B, LoRA, merged
from pretraining import export
from pretraining.progress import amount


def export_folder(
    run: pathlib.Path,
    to: pathlib.Path,
    dtype: str = "bfloat16",
    *,
    like: pathlib.Path | None = None,
    max_shard_size: int = LARGEST,
) -> str:
    """Writes the parameters of a run's newest whole checkpoint as a Hugging Face folder, adapters merged into them.

    Of all layers' experts one matrix is read at a time, which is what this process' memory must hold. A run that is a
    Hugging Face folder itself is converted to another dtype, tensor by tensor.

    Args:
      run: the run's folder, or that of its checkpoints; or a Hugging Face folder.
      to: the folder to write; there must be none.
      dtype: "float32", "bfloat16" or "fp8"; see `jaxpipe.deepseek.save`.
      like: a Hugging Face folder whose tokenizer and other texts go with the weights; None: that which the run began
        with, if it still is there.
      max_shard_size: bytes of a file.

    Returns:
      A line that says what was written.

    Raises:
      ValueError: there is no checkpoint, or one of a model that Hugging Face's files cannot describe; ``to`` is there
        already; numbers that FP8 cannot hold.
      DamagedError: no checkpoint can be read.
      OSError: the files cannot be written.
      MissingPackage: orbax is not installed.
    """
    if (run / "config.json").is_file():
        return _convert(run, to, dtype, like, max_shard_size)
    write = functools.partial(_write, to=to, dtype=dtype, like=like, max_shard_size=max_shard_size)
    return export.newest_checkpoint(run, write)


def _write(
    manager: Any, step: int, *, to: pathlib.Path, dtype: str, like: pathlib.Path | None, max_shard_size: int
) -> str:
    body = export.read_body(manager, step)
    facts = body["facts"].get("hugging_face")
    if facts is None:
        raise ValueError("its checkpoint does not describe the model: export it as a .safetensors file")
    if "config" not in facts:
        raise ValueError(f"{facts['refused']}; or export it as a .safetensors file")
    if like is None and facts["folder"] is not None and (pathlib.Path(facts["folder"]) / "config.json").is_file():
        like = pathlib.Path(facts["folder"])
    read = functools.partial(export.read_arrays, manager, step, body)
    config = from_hf_config(facts["config"])
    said = write_folder(
        to,
        config,
        functools.partial(_blocks, read, export.lora_of(body["facts"])),
        dtype=dtype,
        max_shard_size=max_shard_size,
        like=like,
        progress=amount(f"writing {to}"),
    )
    return f"step {step}: {said}"


def _convert(run: pathlib.Path, to: pathlib.Path, dtype: str, like: pathlib.Path | None, max_shard_size: int) -> str:
    config = folder_config(run)
    stored = find_sources(run, config)
    return write_folder(
        to,
        config,
        lambda table: ((name, 0, stored[name].rows(0, tensor.shape[0])) for name, tensor in table.items()),
        dtype=dtype,
        max_shard_size=max_shard_size,
        like=like or run,
        progress=amount(f"writing {to}"),
    )


def _blocks(
    read: Callable[[list[str]], Mapping[str, Any]], lora: LoRA | None, table: Mapping[str, Tensor]
) -> Iterator[Written]:
    """All tensors, those of one array, or of some that share tensors, after each other."""
    together: dict[tuple[str, ...], list[str]] = {}
    for name, tensor in table.items():
        together.setdefault(tuple(sorted({_name(part.path) for part in tensor.parts})), []).append(name)
    for arrays, tensors in together.items():
        adapted = [name for name in arrays if lora is not None and name.rsplit("/", 1)[-1] in lora.targets]
        every = [*arrays, *(name + end for name in adapted for end in (A, B))]
        found = {name: np.asarray(array) for name, array in read(every).items()}
        for name in adapted:
            assert lora is not None
            found[name] = merged(found[name], found[name + A], found[name + B], lora)
        for name in tensors:
            array = np.empty(table[name].shape, np.float32)
            for part in table[name].parts:
                part.to_file(found[_name(part.path)][part.index], array)
            yield name, 0, array
        # Before the next ones are read.
        del found


def _name(path: tuple[str, ...]) -> str:
    """A parameter's name in a checkpoint."""
    return "/".join(("params", *path))
