"""Hugging Face folders into shards and back: bit for bit, from any mesh to any other."""

import dataclasses
import math
import os
import pathlib
import socket
import subprocess
import sys
import tarfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxpipe
from jaxpipe.deepseek import LayerCosts, hf_load, hf_write
from jaxpipe.deepseek.hf_config import from_hf_config
from jaxpipe.deepseek.hf_files import INDEX, SINGLE, TensorEntry, encode_header, open_folder, read_json
from jaxpipe.deepseek.hf_fp8 import dequantise, quantise
from jaxpipe.deepseek.hf_load import load, load_params
from jaxpipe.deepseek.hf_names import tensors
from jaxpipe.deepseek.hf_save import save, save_params
from jaxpipe.deepseek.hf_write import write_folder
from jaxpipe.deepseek.model import build_model
from jaxpipe.deepseek.rope import Rope
from tests.jaxpipe.deepseek.models import small

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "golden"
NAMES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn}
V3 = small(mtp=True)
COSTS = LayerCosts(dense=1.0, moe=2.0, mtp=3.0)
SOFTMAX = dataclasses.replace(V3.moe.router, scoring="softmax", normalise=False)

if jax.device_count() < 4:
    pytest.skip("needs 4 devices", allow_module_level=True)


@pytest.fixture(scope="module")
def goldens(tmp_path_factory):
    """Folders that transformers saved."""
    folder = tmp_path_factory.mktemp("goldens")
    for path in sorted(GOLDEN.glob("hf_*.tar.gz")):
        with tarfile.open(path) as tar:
            tar.extractall(folder, filter="data")
    return folder


def setting(config, name, **axes):
    """A mesh, a schedule and the model for them, of shapes alone."""
    schedule = jaxpipe.schedule.build(name, axes["pp"], 2 * axes["pp"])
    axis = "ep" if "ep" in axes else None
    return jaxpipe.make_mesh(**axes), schedule, build_model(config, schedule, 0, axis=axis, abstract=True)


def make_arrays(config, seed=0):
    """Random tensors of a model by name; what repeats another is the same."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, tensor in tensors(config).items():
        found[name] = rng.normal(size=tensor.shape).astype(np.float32)
    return found | {name: found[one.copy_of] for name, one in tensors(config).items() if one.copy_of}


def write_file(path, arrays):
    kinds = {np.dtype(dtype): name for name, dtype in NAMES.items()}
    header = encode_header({name: (kinds[array.dtype], array.shape) for name, array in arrays.items()})
    path.write_bytes(header + b"".join(array.tobytes() for array in arrays.values()))


def same_bits(first, second):
    first, second = open_folder(first), open_folder(second)
    assert first.keys() == second.keys()
    for name, entry in first.items():
        other = second[name]
        assert (entry.dtype, entry.shape) == (other.dtype, other.shape), name
        assert entry.rows().tobytes() == other.rows().tobytes(), name


def as_numpy(tree):
    return jax.tree.map(np.asarray, tree)


@pytest.mark.filterwarnings("ignore:.*holds nothing of the multi-token prediction:UserWarning")
@pytest.mark.parametrize(("name", "kind"), [("v3", "dualpipev"), ("v3_yarn_noq", "zb1p"), ("v2_lite", "dualpipev")])
def test_goldens_come_back_bit_for_bit(goldens, tmp_path, name, kind):
    schedule = jaxpipe.schedule.build(kind, 2, 4)
    config, params = load(goldens / name, jaxpipe.make_mesh(pp=2, ep=2), schedule)
    (goldens / name / "tokenizer.json").write_text("{}")
    said = save(
        tmp_path / "out", params, config, schedule, dtype="float32", max_shard_size=100_000, like=goldens / name
    )
    assert said.startswith(f"{len(open_folder(goldens / name))} tensors")
    same_bits(goldens / name, tmp_path / "out")
    files = set(read_json(tmp_path / "out" / INDEX)["weight_map"].values())
    assert {path.name for path in (tmp_path / "out").iterdir()} == files | {
        INDEX, "config.json", "generation_config.json", "tokenizer.json"
    }  # fmt: skip
    assert from_hf_config(read_json(tmp_path / "out" / "config.json")) == config
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.filterwarnings("ignore:.*holds nothing of the multi-token prediction:UserWarning")
@pytest.mark.parametrize(
    ("name", "layer", "router", "message"),
    [
        ("v3", {"rope": Rope()}, {}, r"rope=Rope\(theta=10000.0, interleaved=False.*where it says .*interleaved=True"),
        ("v3", {"norm_eps": 1e-5}, {}, "norm_eps=1e-05, where it says 1e-06: leave the config"),
        ("v3", {"content": 24, "value": 8}, {}, "content=24, where it says 16; value=8, where it says 16"),
        ("v3", {}, {"top_k": 2}, "top_k=2, where it says 3"),
        ("v3", {}, {"scale": 1.0}, "scale=1.0, where it says 2.5"),
        ("v3", {}, {"normalise": False}, "normalise=False, where it says True"),
        ("v3", {}, {"scoring": "softmax"}, "scoring='softmax', where it says 'sigmoid'"),
        ("v3", {}, {"num_groups": 8, "top_groups": 4, "group_best": 1}, "group_best=1, where it says"),
        ("v2_lite", {}, {"num_groups": 4, "top_groups": 4, "group_best": 2}, None),
        ("v2_lite", {"redundant": 4, "sequence": 32}, {}, None),
    ],
)
def test_a_config_that_computes_something_else_than_the_folders_is_refused(goldens, name, layer, router, message):
    config = from_hf_config(read_json(goldens / name / "config.json"), mtp=False)
    moe = dataclasses.replace(config.moe, router=dataclasses.replace(config.moe.router, **router))
    config = dataclasses.replace(config, moe=moe, **layer)
    if message is None:
        assert hf_load.folder_config(goldens / name, config) == config
        return
    with pytest.raises(ValueError, match=f"the config is not that of .*{message}"):
        hf_load.folder_config(goldens / name, config)


def test_every_mesh_loads_and_saves_the_same(tmp_path):
    """From files of one kind through meshes of several kinds, with multi-token prediction and padded experts."""
    arrays = {name: array.astype(NAMES["BF16"]) for name, array in make_arrays(V3).items()}
    for name, tensor in tensors(V3).items():
        if tensor.exact:
            arrays[name] = arrays[name].astype(np.float32)
    write_file(tmp_path / SINGLE, arrays)
    masters = dataclasses.replace(V3, moe=dataclasses.replace(V3.moe, masters=6))
    before = None
    for config, name, axes, dtype in [
        (V3, "dualpipev", {"pp": 2, "ep": 2}, "float32"),
        (V3, "1f1b", {"pp": 1}, "bfloat16"),
        (masters, "1f1b", {"pp": 4, "ep": 2}, "bfloat16"),
        (dataclasses.replace(V3, shard_outer=True, shared_ends=False), "dualpipe", {"pp": 2, "ep": 4}, "float32"),
    ]:
        mesh, _, model = setting(config, name, **axes)
        params = load_params(tmp_path, model, mesh, dtype=dtype)
        layers = model.to_layers(as_numpy(params))
        if config is not masters:
            before = before or layers
            assert jax.tree.all(jax.tree.map(np.array_equal, before, layers))
        else:
            assert not layers["layers"]["moe"]["w_in"][:, config.experts :].any()
        for leaf, spec, one in zip(*map(jax.tree.leaves, (params, model.specs, model.params)), strict=True):
            assert leaf.sharding == jax.sharding.NamedSharding(mesh, spec)
            assert leaf.shape == one.shape and leaf.dtype in (one.dtype, dtype)
        if mesh.size > 1:
            save_params(tmp_path / f"{name}{axes['pp']}", params, model)
            same_bits(tmp_path, tmp_path / f"{name}{axes['pp']}")


def test_shards_hold_what_the_models_order_says(tmp_path):
    """Places in stages are those of `from_layers`, slots without a layer hold zeros, placements are a new model's."""
    config = small(redundant=4, layers=6)
    arrays = make_arrays(config)
    write_file(tmp_path / SINGLE, arrays)
    mesh, _, model = setting(config, "dualpipev", pp=2, ep=2)
    # Of a new model the placements alone are made.
    fresh = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), model.params)
    new = jax.jit(lambda: [leaf for leaf in jax.tree.leaves(model.init(0)) if leaf.dtype == jnp.int32])()
    new = iter(as_numpy(new))
    fresh = model.to_layers(jax.tree.map(lambda leaf: next(new) if leaf.dtype == np.int32 else leaf, fresh))
    for name, tensor in tensors(config).items():
        for part in tensor.parts:
            holder, leaf = None, fresh
            for key in part.path:
                holder, leaf = leaf, leaf[key]
            holder[part.path[-1]] = leaf = np.array(leaf)
            leaf[part.index] = part.from_file(arrays[name])
    wanted = model.from_layers(fresh)
    assert jax.tree.all(jax.tree.map(np.array_equal, wanted, as_numpy(load_params(tmp_path, model, mesh))))


def test_large_shards_are_put_together_slab_by_slab(tmp_path, monkeypatch):
    """No more of a shard is in the host's memory than a slab; what comes of it is the same."""
    config = small(redundant=4, layers=6)
    write_file(tmp_path / SINGLE, make_arrays(config))
    mesh, _, model = setting(config, "dualpipev", pp=2, ep=2)
    whole = load_params(tmp_path, model, mesh)
    sizes, original = [], jax.device_put

    def device_put(block, device):
        sizes.append(block.nbytes)
        return original(block, device)

    monkeypatch.setattr(jax, "device_put", device_put)
    monkeypatch.setattr(hf_load, "SLAB", 1000)
    slabs = load_params(tmp_path, model, mesh)
    assert max(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(whole)) > 2000
    assert 500 < max(sizes) <= 1000
    for ours, theirs in zip(*map(jax.tree.leaves, (slabs, whole)), strict=True):
        assert ours.sharding == theirs.sharding and ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_matrices_in_fp8_are_read_and_written(tmp_path):
    config = small(
        moe=dataclasses.replace(small().moe, width=144, hidden=136), dense_hidden=132, latent=130, content=40, value=72
    )
    arrays = make_arrays(config)
    stored, whole = {}, {}
    for name, tensor in tensors(config).items():
        array = arrays[name]
        if tensor.quantised:
            numbers, scales = quantise(array)
            stored |= {name: numbers, f"{name}_scale_inv": scales}
            whole[name] = dequantise(numbers, scales)
        else:
            kind = np.float32 if tensor.exact else NAMES["BF16"]
            stored[name] = array.astype(kind)
            whole[name] = stored[name].astype(np.float32)
    (tmp_path / "fp8").mkdir()
    (tmp_path / "f32").mkdir()
    write_file(tmp_path / "fp8" / SINGLE, stored)
    write_file(tmp_path / "f32" / SINGLE, whole)
    mesh, _, model = setting(config, "dualpipev", pp=2, ep=2)
    loaded = [load_params(tmp_path / kind, model, mesh) for kind in ("fp8", "f32")]
    assert jax.tree.all(jax.tree.map(np.array_equal, *map(as_numpy, loaded)))
    save_params(tmp_path / "out", loaded[0], model, dtype="fp8")
    same_bits(tmp_path / "fp8", tmp_path / "out")
    settings = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert settings["quant_method"] == "fp8" and settings["weight_block_size"] == [128, 128]
    del stored["model.layers.0.self_attn.o_proj.weight_scale_inv"]
    write_file(tmp_path / "fp8" / SINGLE, stored)
    with pytest.raises(ValueError, match=r"layers.0.self_attn.o_proj.weight in .* is F8_E4M3, and .* is missing"):
        load_params(tmp_path / "fp8", model, mesh)


def test_bytes_of_files_are_read_once_and_in_pieces(tmp_path, monkeypatch):
    """A shard reads its own rows; replicas share them; pieces are small."""
    config = small(vocab=128)
    write_file(tmp_path / SINGLE, make_arrays(config))
    read, original = [], TensorEntry.rows

    def rows(entry, start=0, stop=None):
        found = original(entry, start, stop)
        read.append((entry.name, found.nbytes))
        return found

    monkeypatch.setattr(TensorEntry, "rows", rows)
    monkeypatch.setattr(hf_load, "PIECE", 512)
    mesh, _, model = setting(config, "dualpipev", pp=2, ep=2)
    seen = []
    load_params(tmp_path, model, mesh, progress=lambda done, total: seen.append((done, total)))
    sizes = {name: 4 * math.prod(tensor.shape) for name, tensor in tensors(config).items()}
    spread = "layers.0.mlp"  # rows of its matrices, which are columns of files, are in parts over two devices
    for name, size in sizes.items():
        total = sum(count for other, count in read if other == name)
        times = 2 if "kv_b_proj" in name or spread in name else 1
        assert total == times * size, name
    assert max(count for _, count in read) <= 1024
    assert seen[-1][0] == seen[-1][1] and sorted(seen) == seen


def test_what_files_lack_or_hold_besides_is_told(tmp_path):
    arrays = make_arrays(V3)
    mesh, schedule, model = setting(V3, "1f1b", pp=1)

    def refused(message, changed, **options):
        write_file(tmp_path / SINGLE, changed)
        with pytest.raises(ValueError, match=message):
            load_params(tmp_path, model, mesh, **options)

    experts = [name for name in arrays if ".experts." in name]
    refused(
        rf"lacks {len(experts)} tensors: {', '.join(experts[:10])}, \.\.\.: are config.json",
        {name: array for name, array in arrays.items() if name not in experts},
    )
    refused("holds 1 tensors: other.weight that the model", arrays | {"other.weight": np.zeros(3, np.float32)})
    refused("dtype=int32: parameters are", arrays, dtype=jnp.int32)
    name = "model.layers.1.mlp.gate.weight"
    refused(rf"{name} in .* has shape \[16, 4\]: the config says \[4, 16\]", arrays | {name: arrays[name].T.copy()})
    numbers, _ = quantise(arrays[name])
    refused(f"{name} in .* is F8_E4M3: it should be F32 or F16 or BF16", arrays | {name: numbers})
    name = "model.layers.1.self_attn.o_proj.weight"
    refused(
        f"{name} in .* is F32, and there is {name}_scale_inv",
        arrays | {f"{name}_scale_inv": np.ones((1, 1), np.float32)},
    )
    write_file(tmp_path / SINGLE, arrays | {"other.weight": np.zeros(3, np.float32)})
    with pytest.warns(UserWarning, match="holds 1 tensors: other.weight"):
        load_params(tmp_path, model, mesh, strict=False)
    write_file(tmp_path / SINGLE, {name: array for name, array in arrays.items() if not tensors(V3)[name].mtp})
    with pytest.warns(UserWarning, match="nothing of the multi-token prediction"):
        config, _ = load(tmp_path, mesh, schedule, config=dataclasses.replace(V3, layer_costs=COSTS))
    assert config == dataclasses.replace(V3, mtp=False, layer_costs=dataclasses.replace(COSTS, mtp=None))
    # Copies may be missing, and frequencies that old files hold are known.
    copies = {name: array for name, array in arrays.items() if tensors(V3)[name].copy_of is None}
    write_file(tmp_path / SINGLE, copies | {"model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)})
    load_params(tmp_path, model, mesh)


def test_what_cannot_be_saved_is_told_and_nothing_is_left(tmp_path):
    config = small()
    mesh, schedule, model = setting(config, "1f1b", pp=1)
    write_file(tmp_path / SINGLE, make_arrays(config))
    params = load_params(tmp_path, model, mesh)
    for options, message in [
        ({"dtype": "int8"}, "dtype='int8': weights are written in float32, bfloat16, float16, fp8"),
        ({"max_shard_size": 0}, "max_shard_size=0"),
        ({"folder": tmp_path}, "is there already"),
        ({"like": tmp_path / "no"}, "no file .*no/config.json"),
    ]:
        folder = options.pop("folder", tmp_path / "out")
        with pytest.raises(ValueError, match=message):
            save(folder, params, config, schedule, **options)
    with pytest.raises(ValueError, match=r"parameters are not of this model and schedule, the first is stages/"):
        save(tmp_path / "out", params, config, jaxpipe.schedule.build("1f1b", 2, 4))
    bad = params._replace(outer=params.outer | {"embedding": params.outer["embedding"] * jnp.nan})
    save(tmp_path / "out", bad, config, schedule, dtype="fp8")
    save(tmp_path / "out", params, config, schedule, overwrite=True)
    assert np.isfinite(open_folder(tmp_path / "out")["model.embed_tokens.weight"].rows().astype(np.float32)).all()
    softmax = dataclasses.replace(config, moe=dataclasses.replace(config.moe, router=SOFTMAX))
    with pytest.raises(ValueError, match="scoring='softmax'"):
        save(tmp_path / "bad", params, softmax, schedule)
    slot = params.stages["layer_0"]["attention"]
    slot = params.stages["layer_0"] | {"attention": slot | {"out": slot["out"] * jnp.inf}}
    with pytest.raises(ValueError, match=r"layers.0.self_attn.o_proj.weight cannot be written in FP8: .* not finite"):
        save(tmp_path / "bad", params._replace(stages=params.stages | {"layer_0": slot}), config, schedule, dtype="fp8")
    large = params._replace(outer=params.outer | {"embedding": params.outer["embedding"].at[3, 5].set(-70_000)})
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight .* float16, .* holds 70000; take bfloat16"):
        save(tmp_path / "bad", large, config, schedule, dtype="float16")
    assert not list(tmp_path.glob("bad*"))
    save(tmp_path / "half", params, config, schedule, dtype="float16")
    embedding = open_folder(tmp_path / "half")["model.embed_tokens.weight"].rows()
    np.testing.assert_array_equal(embedding, np.asarray(params.outer["embedding"]).astype(np.float16))


def fails(*_, **__):
    raise OSError("no space left")


@pytest.mark.parametrize("step", ["_prepare", "_put", "_write_texts", "rename", "rmtree"])
def test_a_folder_is_replaced_whole_or_stays_whatever_fails(tmp_path, monkeypatch, step):
    config = small()
    arrays, out = make_arrays(config), tmp_path / "out"

    def blocks(table):
        return ((name, 0, arrays[name]) for name in table)

    write_folder(out, config, blocks, dtype="float32")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (tmp_path / "link").symlink_to(out)
    rename = pathlib.Path.rename
    with monkeypatch.context() as patch:
        if step == "rename":
            patch.setattr(pathlib.Path, step, lambda path, to: (fails if "partial" in path.name else rename)(path, to))
        else:
            patch.setattr(hf_write.shutil if step == "rmtree" else hf_write, step, fails)
        if step == "rmtree":
            with pytest.warns(UserWarning, match=r"out\..*\.old, which .*out was before, cannot be removed: no space"):
                write_folder(tmp_path / "link", config, blocks, dtype="bfloat16", overwrite=True)
            return
        with pytest.raises(OSError, match="no space left"):
            write_folder(out, config, blocks, dtype="bfloat16", overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", "link"}
    write_folder(tmp_path / "link", config, blocks, dtype="bfloat16", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "link"} and (tmp_path / "link").is_symlink()
    assert open_folder(out)["model.norm.weight"].dtype == "BF16"


def test_what_is_somebody_elses_stays(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("")
    with pytest.raises(ValueError, match=r"out\.partial is there already, .*: choose another name, or remove it"):
        write_folder(tmp_path / "out", small(), iter)
    assert (tmp_path / "out.partial" / "mine").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is no folder: choose another name"):
        write_folder(tmp_path / "file", small(), iter, overwrite=True)


def test_a_step_that_fails_on_one_process_fails_on_all(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hf_write.multihost_utils, "process_allgather", lambda good: np.array([1, good]))
    with hf_write._all_or_none("write"):
        pass
    with pytest.raises(KeyError), hf_write._all_or_none("write"):
        raise KeyError
    monkeypatch.setattr(hf_write.multihost_utils, "process_allgather", lambda good: np.array([good, 0]))
    with pytest.raises(OSError, match=r"could not write: processes \[1\] failed"), hf_write._all_or_none("write"):
        pass


PROCESS = """
import sys, warnings
import jax
import numpy as np
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
warnings.simplefilter("ignore")
import jaxpipe
from jaxpipe.deepseek import load, save
schedule = jaxpipe.schedule.build("dualpipev", 2, 4)
# Experts, and rows of dense layers, over both processes.
mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2).T, ("pp", "ep"))
config, params = load(sys.argv[3], mesh, schedule)
save(sys.argv[4], params, config, schedule, dtype="float32", max_shard_size=200_000)


def fails(*_):
    raise OSError("no space left")


from jaxpipe.deepseek import hf_write
for step in ("_prepare", "_put"):
    original = getattr(hf_write, step)
    if jax.process_index() == (step == "_put"):
        setattr(hf_write, step, fails)
    try:
        save(sys.argv[4], params, config, schedule, overwrite=True)
    except OSError as error:
        assert ("no space" in str(error)) == (jax.process_index() == (step == "_put")), error
    else:
        raise AssertionError(step)
    setattr(hf_write, step, original)
"""


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="makes CPU devices of its own")
def test_processes_read_and_write_their_parts(goldens, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROCESS, address]
    processes = [
        subprocess.Popen([*command, str(index), str(goldens / "v3"), str(tmp_path / "out")], env=os.environ | flags)
        for index in range(2)
    ]
    assert [process.wait(300) for process in processes] == [0, 0]
    same_bits(goldens / "v3", tmp_path / "out")
    assert not list(tmp_path.glob("*.partial"))
