"""Reading a Hugging Face checkpoint of real size: one process's share of it, its time and its memory.

A made-up checkpoint of the model's names, shapes and sizes is written tensor by tensor. Then as many processes as the
mesh has devices form one run, of which the first reads what its device keeps; the others wait. The peak is that
process's, as the operating system counts it; pages of files that the system caches are not in it. What was read is
compared with what was written, some rows of each tensor. The files are deleted afterwards.

With --holes the files have their names, headers and sizes, and nothing in them: they take no room on a disk, whatever
the model, and what is read is zero. So of that the peak means something, and the time does not. The other devices of
the mesh are those of one more process.

    python examples/benchmarks/hf_load.py --tiny
    python examples/benchmarks/hf_load.py --holes --config dsv3-671b --mesh pp=16,ep=64 --formats fp8
    python examples/benchmarks/hf_load.py [--config moe-16b] [--layers 27] [--mesh pp=4,ep=2] [--folder FOLDER]
        [--formats bfloat16,fp8] [--dtype float32]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import pathlib
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import ml_dtypes
import numpy as np
from record import Recorder, make_parser, processor

from jaxpipe.deepseek.hf_names import Tensor

POOL = (1 << 25) + 3
"""Random numbers that all tensors are made of, each from a place of its own on."""


def pool() -> np.ndarray:
    """Numbers that bfloat16 holds exactly."""
    return np.random.default_rng(0).normal(size=POOL).astype(ml_dtypes.bfloat16).astype(np.float32)


def made_up(name: str, numbers: np.ndarray, start: int, count: int) -> np.ndarray:
    """Some elements of a tensor, in the order of its rows."""
    places = (zlib.crc32(name.encode()) + start + np.arange(count)) % POOL
    return numbers[places]


def write(args: argparse.Namespace, folder: pathlib.Path, kind: str) -> float:
    """Writes the checkpoint; returns seconds."""
    from jaxpipe.deepseek.hf_write import write_folder  # noqa: PLC0415

    numbers, config = pool(), sized(args)
    doubled = np.concatenate([numbers, numbers])

    def blocks(table: Mapping[str, Tensor]) -> Iterator[tuple[str, int, np.ndarray]]:
        for name, tensor in table.items():
            start, left = zlib.crc32(name.encode()) % POOL, math.prod(tensor.shape)
            if left <= POOL:
                yield name, 0, doubled[start : start + left].reshape(tensor.shape)
                continue
            if tensor.quantised:  # its scales need all of it
                yield name, 0, made_up(name, numbers, 0, left).reshape(tensor.shape)
                continue
            row, step = 0, POOL // tensor.shape[1]
            while row < tensor.shape[0]:
                rows = min(step, tensor.shape[0] - row)
                begin = (start + row * tensor.shape[1]) % POOL
                yield name, row, doubled[begin : begin + rows * tensor.shape[1]].reshape(rows, -1)
                row += rows

    begin = time.perf_counter()
    write_folder(folder, config, blocks, dtype=kind)
    return time.perf_counter() - begin


def write_holes(args: argparse.Namespace, folder: pathlib.Path, kind: str) -> float:
    """Writes the checkpoint's headers, and gives the files their sizes; returns seconds."""
    from jaxpipe.deepseek.hf_config import to_hf_config  # noqa: PLC0415
    from jaxpipe.deepseek.hf_files import INDEX, encode_header  # noqa: PLC0415
    from jaxpipe.deepseek.hf_names import tensors  # noqa: PLC0415
    from jaxpipe.deepseek.hf_write import plan_files  # noqa: PLC0415

    begin, config = time.perf_counter(), sized(args)
    places = plan_files(tensors(config), kind)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_hf_config(config)), encoding="utf-8")
    names = {name: place.file for name, place in places.items()}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}), encoding="utf-8")
    groups: dict[str, dict[str, Any]] = {}
    for name, place in places.items():
        groups.setdefault(place.file, {})[name] = place
    for name, group in groups.items():
        with open(folder / name, "wb") as file:
            header = encode_header({tensor: (place.dtype, place.shape) for tensor, place in group.items()})
            file.write(header)
            file.truncate(len(header) + sum(place.nbytes for place in group.values()))
    return time.perf_counter() - begin


def sized(args: argparse.Namespace) -> Any:
    """The model."""
    from jaxpipe.deepseek import model_config  # noqa: PLC0415

    config = model_config(args.config)
    # Files of models with this router mean rotations of neighbours; it changes nothing about sizes.
    rope = dataclasses.replace(config.rope, interleaved=True)
    bias = config.moe.router.scoring == "sigmoid"
    return dataclasses.replace(config, layers=args.layers or config.layers, rope=rope, selection_bias=bias)


def sizes(args: argparse.Namespace) -> dict[str, int]:
    """The mesh's axes."""
    return {name: int(size) for name, size in (part.split("=") for part in args.mesh.split(","))}


def processes(args: argparse.Namespace) -> int:
    """One a device; with --holes the first device's, and one that has all others."""
    return 2 if args.holes else math.prod(sizes(args).values())


def read(args: argparse.Namespace) -> None:
    """Is one of the processes; the first prints what it found as JSON."""
    import jax  # noqa: PLC0415

    jax.distributed.initialize(args.coordinator, processes(args), args.process)
    from jaxpipe import make_mesh, schedule  # noqa: PLC0415
    from jaxpipe.deepseek import build_model  # noqa: PLC0415
    from jaxpipe.deepseek.hf_load import find_sources, load_params  # noqa: PLC0415
    from jaxpipe.deepseek.hf_names import tensors  # noqa: PLC0415
    from jaxpipe.deepseek.hf_places import in_stages  # noqa: PLC0415
    from jaxpipe.deepseek.model import names  # noqa: PLC0415

    mesh, config = make_mesh(**sizes(args)), sized(args)
    if args.process:
        # Until the first has read its part.
        sys.stdin.read()
        return
    order = schedule.build("1f1b", sizes(args)["pp"], 2 * sizes(args)["pp"])
    model = build_model(config, order, 0, axis="ep" if "ep" in sizes(args) else None, abstract=True)
    before = peak()
    start = time.perf_counter()
    params = load_params(args.folder, model, mesh, dtype=args.dtype)
    seconds, most = time.perf_counter() - start, peak()
    numbers, compared = pool(), 0
    parts = [sum(shard.data.nbytes for shard in leaf.addressable_shards) for leaf in jax.tree.leaves(params)]
    leaves = {names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    sources = {} if args.holes else find_sources(args.folder, config)
    for name, source in sources.items():
        for part in (in_stages(part, model.arrangement) for part in source.tensor.parts):
            shard = leaves[part.path].addressable_shards[0]
            place = [int(place) if isinstance(place, int) else place for place in part.index]
            cuts = [cut.indices(size)[:2] for cut, size in zip(shard.index, leaves[part.path].shape, strict=True)]
            whole = all(not isinstance(a, int) or low <= a < high for a, (low, high) in zip(place, cuts, strict=False))
            if not whole or not part.index or len(source.tensor.shape) < 2 or "expert" not in name:
                continue
            place = [a - low if isinstance(a, int) else a for a, (low, _) in zip(place, cuts, strict=False)]
            block = np.asarray(shard.data[tuple(place)])
            shape = source.tensor.shape
            wanted = part.from_file(made_up(name, numbers, 0, math.prod(shape)).reshape(shape))
            if args.exact:
                assert np.array_equal(block.astype(np.float32), wanted), name
            else:
                assert np.abs(block.astype(np.float32) - wanted).max() < 0.5, name
            compared += 1
            break
        if compared == 20:
            break
    files = [path.stat().st_size for path in pathlib.Path(args.folder).glob("*.safetensors")]
    assert len(tensors(config)) and (compared or args.holes), compared
    found = {"read s": seconds, "before GB": before, "peak GB": most, "files GB": sum(files) / 1e9, "files": len(files)}
    found |= {"part GB": sum(parts) / 1e9, "largest shard GB": max(parts) / 1e9, "compared": compared}
    print(json.dumps(found), flush=True)
    # Until it is ended: a process that ends by itself waits for the others, or ends them.
    sys.stdin.read()


def peak() -> float:
    """The most memory that this process has had, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure(args: argparse.Namespace, folder: pathlib.Path, kind: str) -> dict[str, Any]:
    """A row: the checkpoint is written, read and deleted."""
    try:
        written = (write_holes if args.holes else write)(args, folder, kind)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, __file__, "--config", args.config, "--mesh", args.mesh, "--dtype", args.dtype]
        command += ["--layers", str(args.layers or 0), "--folder", str(folder), "--coordinator", f"127.0.0.1:{port}"]
        command += ["--exact"] if kind != "fp8" else []
        command += ["--holes"] if args.holes else []
        others = (math.prod(sizes(args).values()) - 1) // (processes(args) - 1)
        counts = [f"--xla_force_host_platform_device_count={count}" for count in (1, others)]
        started = [
            subprocess.Popen(
                [*command, "--process", str(index)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL if index else None,
                text=True,
                env=os.environ | {"XLA_FLAGS": counts[min(index, 1)]},
            )
            for index in range(processes(args))
        ]
        try:
            line = started[0].stdout.readline() if started[0].stdout else ""
        finally:
            for process in reversed(started):
                process.kill()
                process.communicate()
        if not line:
            raise RuntimeError("the first process has failed, see above")
        found = json.loads(line)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    over = found["peak GB"] - found["part GB"]
    return {
        "files": f"{args.config}, {args.mesh}, {kind}" if args.holes else kind,
        "size GB": found["files GB"],
        "number": found["files"],
        "written in s": math.nan if args.holes else written,
        "part GB": found["part GB"],
        "largest shard GB": found["largest shard GB"],
        "read in s": math.nan if args.holes else found["read s"],
        "peak GB": found["peak GB"],
        "peak - part GB": over,
        "before reading GB": found["before GB"],
    }


def main() -> None:
    """Prints the table, or is one of the processes."""
    parser = make_parser(__doc__)
    parser.add_argument("--config", default="moe-16b", help="a name that `jaxpipe.deepseek.model_config` knows")
    parser.add_argument("--layers", type=int, help="of the model; default: the configuration's")
    parser.add_argument("--mesh", default="pp=4,ep=2", help="of which one device's part is read")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the parameters")
    parser.add_argument("--formats", default="bfloat16,fp8", help="of the files")
    parser.add_argument(
        "--folder", type=pathlib.Path, help="for the files; a new one in it is made; default: where scratch files are"
    )
    parser.add_argument("--holes", action="store_true", help="files of their sizes with nothing in them: memory alone")
    parser.add_argument("--tiny", action="store_true", help="a small model: whether it works")
    parser.add_argument("--coordinator", help=argparse.SUPPRESS)
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--exact", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.process is not None:
        try:
            read(args)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        return
    if args.tiny:
        args.config, args.mesh = "tiny", "pp=2,ep=2"
    report = Recorder.begin(args, processor(), f"{args.config}, one process of {args.mesh}, parameters in {args.dtype}")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        report.table(measure(args, pathlib.Path(folder) / kind, kind) for kind in args.formats.split(","))


if __name__ == "__main__":
    main()
