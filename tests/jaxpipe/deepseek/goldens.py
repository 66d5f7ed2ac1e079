"""Small random models saved by transformers 5.17 with its logits, losses and greedy tokens, read without our reader."""

import json
import pathlib
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe.deepseek import build_model, from_hf_config
from jaxpipe.deepseek.hf_names import tensors

FOLDER = pathlib.Path(__file__).parents[2] / "golden"
NAMES = ("v3", "v3_yarn_noq", "v2_lite")


def unpack(name, to):
    """The folder of a golden."""
    with tarfile.open(FOLDER / f"hf_{name}.tar.gz") as archive:
        archive.extractall(to, filter="data")
    return to / name


def read_golden(name, to):
    """(folder, values of config.json, tensors, references)."""
    folder = unpack(name, to)
    load_file = pytest.importorskip("safetensors.numpy", reason="needs the package safetensors").load_file
    values = json.loads((folder / "config.json").read_text())
    return folder, values, load_file(folder / "model.safetensors"), dict(np.load(folder / "reference.npz"))


def place(config, found):
    """Parameters in the order of the model, by the table of names."""
    model = build_model(config, jaxpipe.schedule.build("1f1b", 1, 1), 0, abstract=True)
    tree = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(model.to_layers, model.params))
    for name, tensor in tensors(config).items():
        for part in tensor.parts:
            leaf = tree
            for key in part.path:
                leaf = leaf[key]
            leaf[part.index] = part.from_file(found[name])
    return model, jax.tree.map(jnp.asarray, tree)


def load_golden(name, to):
    """(config, model, parameters in the order of the model, references)."""
    _, values, found, reference = read_golden(name, to)
    config = from_hf_config(values, mtp=False)
    return config, *place(config, found), reference
