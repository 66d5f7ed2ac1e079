"""A Hugging Face folder read into memory, for one device."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np

import jaxpipe
from jaxpipe.deepseek.config import ModelConfig
from jaxpipe.deepseek.hf_config import from_hf_config
from jaxpipe.deepseek.hf_files import open_folder, read_json
from jaxpipe.deepseek.hf_load import as_held, find_sources
from jaxpipe.deepseek.model import build_model


def read_folder(folder: pathlib.Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The model of a folder with ``config.json`` and safetensors files, all of it in memory.

    Args:
      folder: as transformers' ``save_pretrained`` writes it, or DeepSeek's, in FP8 too.

    Returns:
      The config, and parameters as `DeepSeekModel.to_layers` has them, float32 on the host. Where the files hold
      nothing of multi-token prediction, as transformers leaves it out, the model is without.

    Raises:
      ValueError: no files; a config that is not understood; tensors that are missing, unexpected or of other shapes;
        files that are not what their checksums say.
    """
    config = as_held(from_hf_config(read_json(folder / "config.json")), open_folder(folder))
    # Before memory is taken for what a config claims.
    sources = find_sources(folder, config)
    model = build_model(config, jaxpipe.schedule.build("1f1b", 1, 1), 0, abstract=True)
    tree = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(model.to_layers, model.params))
    for stored in sources.values():
        array = stored.rows(0, stored.tensor.shape[0])
        for part in stored.tensor.parts:
            leaf = tree
            for key in part.path:
                leaf = leaf[key]
            leaf[part.index] = part.from_file(array)
    return config, tree
