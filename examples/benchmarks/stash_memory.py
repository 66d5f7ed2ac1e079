"""Memory of the compiled pipeline against what the schedule predicts, and copies of stash buffers in its HLO.

    python examples/benchmarks/stash_memory.py [--width 2048] [--layers 4] [--ranks 1,4,8] [--chip H200]

Compiles DualPipeV training steps of a stage of residual MLP layers in bfloat16; nothing runs. Ranks beyond the devices
present are compiled for as many GPUs that are not there (`profiling.topology`); where JAX has no CUDA, they need fake
CPU devices. The prediction is the sum of all slot pools, the gradient accumulators, the working copies, and the
temporaries of the largest branch compiled alone.
"""

import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from chunks import nbytes
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from record import Recorder, make_parser

import jaxpipe
from jaxpipe.runtime.model import Context, Model
from jaxpipe.stage import split_stage
from profiling.hlo.topologies import has_cuda, topology


def stage(params, x, ctx):
    """Residual MLP layers."""
    for layer in range(params["up"].shape[0]):
        x = x + jax.nn.gelu(x @ params["up"][layer]) @ params["down"][layer]
    return x


def embed(outer, data, ctx):
    """The batch is already bfloat16 activations."""
    return data


def head(outer, y, data, ctx):
    """Mean square."""
    return jnp.mean(y.astype(jnp.float32) ** 2)


def make_mesh(ranks: int, chip: str) -> Mesh:
    """A mesh over real GPUs, over as many of a kind to compile for where there are fewer, or over CPU devices."""
    if has_cuda() and (jax.default_backend() != "gpu" or ranks > len(jax.devices())):
        return Mesh(np.array(topology(chip, ranks).devices), ("pp",), axis_types=(AxisType.Auto,))
    return jaxpipe.make_mesh(pp=ranks)


def measure(mesh: Mesh, microbatches: int, layers: int, width: int, tokens: int) -> dict[str, Any]:
    """One row of the table."""
    ranks = mesh.size
    schedule = jaxpipe.schedule.build("dualpipev", ranks, microbatches)
    step = jaxpipe.value_and_grad(
        stage, schedule, mesh, embed=embed, head=head, compute_dtype=jnp.bfloat16, order="storage"
    )
    shape = jax.ShapeDtypeStruct
    one = {
        "up": shape((layers, width, 4 * width), jnp.bfloat16),
        "down": shape((layers, 4 * width, width), jnp.bfloat16),
    }
    rows = NamedSharding(mesh, P("pp"))
    masters = jax.tree.map(lambda s: shape((schedule.num_stages, *s.shape), jnp.float32, sharding=rows), one)
    batch = shape((microbatches, tokens, width), jnp.bfloat16, sharding=NamedSharding(mesh, P()))
    compiled = jax.jit(step).lower(jaxpipe.Params(masters), batch).compile()

    x = shape((1, tokens, width), jnp.bfloat16)
    index = shape((), jnp.int32)
    ctx = Context(index, index, None, x)
    split = split_stage(Model(stage).run_stage, one, x, ctx, has_aux=True)
    program = step.program
    pools = {
        "stash": (program.num_stash_slots, split.residuals.input),
        "weight stash": (program.num_weight_stash_slots, split.residuals.weight),
        "cross": (program.num_cross_slots, split.crossing),
        "in_flight": (program.num_message_slots, x),
    }
    slots = sum((count + 1) * nbytes(value) for count, value in pools.values())
    chunks = len(schedule.rank_stages[0])
    copies = chunks * nbytes(one)
    accumulators = 2 * chunks * nbytes(one)

    def pair(prepared, residuals, dy, x, ctx):
        return split.forward(prepared, x, ctx), split.backward(prepared, residuals, (dy, None))

    alone = NamedSharding(Mesh(mesh.devices[:1], ("pp",), axis_types=(AxisType.Auto,)), P())
    arguments = (jax.eval_shape(split.prepare, one), split.residuals, x, x, ctx)
    arguments = jax.tree.map(lambda leaf: shape(leaf.shape, leaf.dtype, sharding=alone), arguments)
    branch = jax.jit(pair).lower(*arguments).compile().memory_analysis()
    memory = compiled.memory_analysis()
    assert branch is not None and memory is not None, "this backend does not report memory"
    working = branch.temp_size_in_bytes + branch.output_size_in_bytes
    temp = memory.temp_size_in_bytes
    text = compiled.as_text() or ""
    shapes = {
        f"{_hlo_dtype(leaf)}[{','.join(map(str, (count + 1, *leaf.shape)))}]"
        for count, value in pools.values()
        for leaf in jax.tree.leaves(value)
    }
    # A copy of a broadcast is how a buffer is first filled with zeros.
    whole = sum(len(re.findall(rf"= {re.escape(s)}\S* copy(?:-start)?\((?!%?broadcast)", text)) for s in shapes)
    return {
        "ranks": ranks,
        "microbatches": microbatches,
        "stash slots": program.num_weight_stash_slots,
        "simulated peak": max(jaxpipe.schedule.simulate(schedule).peak_live),
        "stash MiB": slots / 2**20,
        "accumulators MiB": accumulators / 2**20,
        "copies MiB": copies / 2**20,
        "working MiB": working / 2**20,
        "predicted MiB": (slots + copies + accumulators + working) / 2**20,
        "temp MiB": temp / 2**20,
        "temp / predicted": temp / (slots + copies + accumulators + working),
        "whole-buffer copies": whole,
    }


def _hlo_dtype(leaf) -> str:
    names = {"bfloat16": "bf16", "float32": "f32", "bool": "pred", "int32": "s32", "uint32": "u32"}
    return names[leaf.dtype.name]


def main() -> None:
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--width", type=int, default=2048, help="of the activations")
    parser.add_argument("--layers", type=int, default=4, help="of the model's share")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a microbatch")
    parser.add_argument("--ranks", default="1,4,8", help="of the pipeline")
    parser.add_argument("--chip", default="H200", help="GPUs that are not there")
    args = parser.parse_args()
    kind = make_mesh(1, args.chip).devices[0].device_kind
    size = f"{args.layers} layers of width {args.width}, {args.tokens} tokens"

    def rows() -> Iterator[dict[str, Any]]:
        for ranks in map(int, args.ranks.split(",")):
            for factor in (2, 4):
                mesh = make_mesh(ranks, args.chip)
                yield measure(mesh, factor * ranks + 2, args.layers, args.width, args.tokens)

    machine = f"compiled for {kind}, jax {jax.__version__}"
    Recorder.begin(args, machine, size).table(rows(), labels=2, formats={"temp / predicted": ".2f"})


if __name__ == "__main__":
    main()
