"""A Hugging Face folder read into memory, for one device."""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
from typing import Any

import jax
import numpy as np

import jaxpipe
from jaxpipe.deepseek.config import ModelConfig
from jaxpipe.deepseek.hf_config import from_hf_config, read_config
from jaxpipe.deepseek.hf_names import check_shapes, tensors
from jaxpipe.deepseek.model import build_model


def read_folder(folder: pathlib.Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The model of a folder with ``config.json`` and safetensors files, all of it in memory.

    Args:
      folder: as transformers' ``save_pretrained`` writes it; FP8 is not read.

    Returns:
      The config, and parameters as `DeepSeekModel.to_layers` has them, float32 on the host. Where the files hold
      nothing of multi-token prediction, as transformers leaves it out, the model is without.

    Raises:
      ValueError: no files; a config that is not understood; tensors that are missing, unexpected or of other shapes.
      ImportError: safetensors is not installed.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} holds no config.json: name a Hugging Face folder")
    config = from_hf_config(read_config(file.read_bytes()))
    read = importlib.import_module("safetensors.flax").load_file  # optional
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= read(path)
    if not found:
        raise ValueError(f"{folder} holds no .safetensors files: pickled weights are not read")
    table = tensors(config)
    if config.mtp and not any(tensor.mtp and name in found for name, tensor in table.items()):
        config = dataclasses.replace(config, mtp=False)
        table = tensors(config)
    check_shapes(config, {name: array.shape for name, array in found.items()})
    model = build_model(config, jaxpipe.schedule.build("1f1b", 1, 1), 0, abstract=True)
    tree = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(model.to_layers, model.params))
    for name, tensor in table.items():
        array = np.asarray(found[name]).astype(np.float32)
        for part in tensor.parts:
            leaf = tree
            for key in part.path:
                leaf = leaf[key]
            leaf[part.index] = part.from_file(array)
    return config, tree
