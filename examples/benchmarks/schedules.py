"""All schedules on a mesh of several GPUs of one host, the same model in each: what a step takes, and what it should.

    python examples/benchmarks/schedules.py [--mesh pp=4,ep=1] [--microbatches 8,16,32] [--model dense] [--tiny]

Masters and gradients are float32, arithmetic is bfloat16. First F, I, W (added to float32 sums), a whole B and an
overlapped F&B are measured on the devices of one rank; each schedule is packed with these costs, compiled and timed,
one number of microbatches after the other.

* "of ideal": step / (microbatches x (F + I + W) of a rank's whole share of the model, as one stage).
* "simulated": where ranks wait for their inputs alone, at the measured costs. "packed": what the program's ticks,
  without messages, say of that.
* "bubble": 1 - busy / step; busy is microbatches x (F + I + W) of the rank's stages, even where whole or overlapped
  backwards run, whose gain may take it below 0. "simulated bubble": 1 - busy / simulated.
* "idlest rank": what it waits, simulated; "form": DeepSeek's form of that, if any. Shares of simulated.
* "in flight": microbatches stashed on a rank, simulated. "slots": all slots, float32 sums and working copies of a GPU,
  as the schedule says; "temporaries" and "arguments": as the compiler says.

With --choose `jaxpipe.choose` then chooses among them, by what it measures itself, and the time of its choice is
compared with the fastest's.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # of a GPU; the rest is for NCCL and code

import jax
import jax.numpy as jnp
from chunks import Chunk, dense_chunk, gib, moe_chunk, nbytes
from executor_overhead import embed, head
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from record import Recorder, command_line, machine, make_parser, medians_ms, write_records

import jaxpipe
from jaxpipe.compiling import CUBLAS
from jaxpipe.planning.mesh import mesh_sizes
from jaxpipe.schedule import Costs, Schedule, build, simulate
from jaxpipe.schedule.simulator import closed_form_bubble
from jaxpipe.stage import split_stage

SCHEDULES = "gpipe,1f1b,zb1p,zbv,interleaved,dualpipe,dualpipev"
FORMS = ("gpipe", "1f1b", "zb1p", "dualpipe", "dualpipev")
HALVED = ("zbv", "interleaved", "dualpipev")  # two stages a rank, of half the layers each
COLUMNS = (
    "schedule", "microbatches", "step ms", "of ideal", "simulated ms", "step / simulated", "packed", "bubble %",
    "simulated bubble %", "idlest rank, simulated %", "form %", "in flight", "slots GiB", "temporaries GiB",
    "arguments GiB", "tokens/s",
)  # fmt: skip


class Layers:
    """The model: equal layers in a row. A stage's parameters are a tuple of the chunk's, stacked in rows for a mesh."""

    def __init__(self, chunk: Chunk, mesh: Mesh) -> None:
        self.chunk, self.mesh = chunk, mesh
        leaves, self.tree = jax.tree.flatten(chunk.init(jax.random.key(0)))
        self.leaves = [(leaf.shape, float(leaf.std())) for leaf in leaves]

    def stage(self, params: Any, x: jax.Array, ctx: jaxpipe.Context) -> jax.Array:
        """The stage of `jaxpipe.value_and_grad`, whatever the number of layers."""
        for i, layer in enumerate(params):
            with jax.named_scope(f"layer_{i}"):
                x = self.chunk.stage(layer, x, ctx)
        return x

    def specs(self, layers: int) -> Any:
        """PartitionSpecs of stages of so many layers."""
        return jax.tree.map(lambda spec: P("pp", *spec), (self.chunk.specs,) * layers)


@functools.cache
def masters(model: Layers, layers: int, order: tuple[int, ...], mesh: Mesh) -> Callable[[], Any]:
    """Makes stages stacked in this order, as by `jaxpipe.stack_stages`, each device its own; layers differ by place."""

    def layer(index: jax.Array) -> Any:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), index), len(model.leaves))
        made = [jax.random.normal(key, shape) * std for key, (shape, std) in zip(keys, model.leaves, strict=True)]
        return model.tree.unflatten(made)

    make = jax.vmap(lambda stage: tuple(layer(stage * layers + i) for i in range(layers)))
    shardings = jax.tree.map(functools.partial(NamedSharding, mesh), model.specs(layers))
    rows = jax.device_put(jnp.asarray(order, jnp.int32), NamedSharding(mesh, P("pp")))
    return functools.partial(jax.jit(make, out_shardings=shardings), rows)


def start(pool: ThreadPoolExecutor, name: str, lowered: Any) -> Future[Any]:
    """The program, later, compiled as `jaxpipe.compiler_options` would have it; standard error hears of it."""
    future = pool.submit(lowered.compile, CUBLAS)
    future.add_done_callback(lambda _: print(f"compiled {name}", file=sys.stderr, flush=True))
    return future


def measure_stage(model: Layers, layers: int, pool: ThreadPoolExecutor, repeats: int) -> tuple[Costs, int, list[int]]:
    """Of a stage on the first rank: times in ms; on a device, parameters and bytes of each kind of slot."""
    mesh = Mesh(model.mesh.devices[:1], model.mesh.axis_names, axis_types=(AxisType.Auto,) * 2)
    whole, ctx = NamedSharding(mesh, P()), jaxpipe.Context(jnp.int32(0), jnp.int32(0), None, None)
    shape = (1, model.chunk.tokens, model.chunk.width)
    x, ct = (jax.device_put(jax.random.normal(jax.random.key(i), shape, jnp.bfloat16), whole) for i in range(2))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), masters(model, layers, (0,), mesh)())
    splits: list[Any] = []

    def local(function: Callable[..., Any], **options: Any) -> Any:
        """A program of these devices, each with its own values of whatever is not a parameter."""

        def body(params: Any, held: Any, totals: Any) -> Any:
            one = jax.tree.map(lambda leaf: leaf[0], params)
            splits.append(split_stage(lambda params, x: model.stage(params, x, ctx), one, x))
            return function(splits[-1], *held, totals) if held else function(splits[-1], one)

        specs = (model.specs(layers), P(), P())
        mapped = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
        return jax.jit(mapped, in_shardings=(None, whole, whole), **options)

    def adds(grads: Any, totals: Any) -> Any:
        return jax.tree.map(lambda total, grad: total + grad.astype(total.dtype), totals, grads)

    wide = {"summands": True, "wide_products": mesh.devices.flat[0].platform != "cpu"}  # as the executor does

    def backward(split: Any, prepared: Any, kept: Any, ct: Any, totals: Any) -> Any:
        grads, x_ct = split.backward(prepared, kept, ct, **wide)
        return x_ct, adds(grads, totals)

    def pair(split: Any, prepared: Any, kept: Any, ct: Any, x: Any, totals: Any) -> Any:
        x_ct, totals = backward(split, prepared, kept, ct, totals)
        return (split.forward(prepared, x), x_ct), totals

    def arguments(kept: Any, crossing: Any) -> Any:
        both = (prepared, kept, ct)
        return (prepared, x), both, (prepared, kept.weight, crossing), both, (*both, x)

    functions = {
        "F": lambda split, *held: (split.forward(*held[:-1]), held[-1]),
        "I": lambda split, *held: (split.backward_input(*held[:-1]), held[-1]),
        "W": lambda split, *held: ((), adds(split.backward_weight(*held[:-1], **wide), held[-1])),
        "B": backward,
        "F&B": pair,
    }
    prepared = local(lambda split, params: split.prepare(params))(params, (), ())
    totals = local(lambda split, _: tuple(jnp.zeros(leaf.shape) for leaf in split.summands))(params, (), ())
    shapes = arguments(splits[-1].residuals, splits[-1].crossing)
    programs = [
        start(pool, f"{name} of {layers} layers", local(function, donate_argnums=2).lower(params, held, totals))
        for (name, function), held in zip(functions.items(), shapes, strict=True)
    ]
    sums = [totals]  # which every call writes over

    def run(program: Any, held: Any) -> Any:
        out, sums[0] = program(params, held, sums[0])
        return out, sums[0]

    (_, kept), _ = run(programs[0].result(), (prepared, x))
    (_, crossing), _ = run(programs[1].result(), (prepared, kept, ct))
    held = zip(programs, arguments(kept, crossing), strict=True)
    calls = [functools.partial(run, program.result(), each) for program, each in held]
    ring = [(rank, (rank + 1) % model.mesh.shape["pp"]) for rank in range(model.mesh.shape["pp"])]
    send = functools.partial(jax.lax.ppermute, axis_name="pp", perm=ring)
    send = jax.jit(jax.shard_map(send, mesh=model.mesh, in_specs=P(), out_specs=P(), check_vma=False))
    calls.append(functools.partial(send, jax.device_put(x, NamedSharding(model.mesh, P()))))
    costs = Costs(*medians_ms(calls, repeats))
    slots = [nbytes(each) for each in (kept.input, kept.weight, crossing, x)]
    print(f"{layers} layers: {costs} ms; a stash, weight stash, cross and message slot: {slots} bytes\n", flush=True)
    return costs, nbytes(totals) // 4, slots


def batch_shape(model: Layers, count: int) -> jax.ShapeDtypeStruct:
    """Of a step of so many microbatches."""
    shape = (count * model.mesh.shape["ep"], model.chunk.tokens, model.chunk.width)
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def make_pipeline(model: Layers, schedule: Schedule, layers: int, **options: Any) -> tuple[Any, Any]:
    """A schedule's step, and the shapes of its parameters; options are of `jaxpipe.value_and_grad`."""
    specs = jaxpipe.Params(model.specs(layers), P())
    step = jaxpipe.value_and_grad(
        model.stage, schedule, model.mesh, embed=embed, head=head, data_axes=("ep",),
        specs=specs, compute_dtype=jnp.bfloat16, order="storage", **options,
    )  # fmt: skip
    shapes = jax.eval_shape(masters(model, layers, schedule.storage_order, model.mesh))
    return step, jaxpipe.Params(shapes)


def make_step(model: Layers, schedule: Schedule, layers: int, costs: Costs, **options: Any) -> tuple[Any, Any]:
    """A schedule's step, and the same lowered; options are further ones of `jaxpipe.value_and_grad`."""
    step, params = make_pipeline(model, schedule, layers, costs=costs, **options)
    specs = (jaxpipe.Params(model.specs(layers)), P("ep"))
    shardings = jax.tree.map(functools.partial(NamedSharding, model.mesh), specs)
    return step, jax.jit(step, in_shardings=shardings).lower(params, batch_shape(model, schedule.num_microbatches))


def choose(model: Layers, layers_of: dict[str, int], steps: dict[str, float], count: int, repeats: int) -> float:
    """How long the schedule takes that `jaxpipe.choose` takes for these, over the fastest; steps are measured ms."""

    def make(schedule: Schedule) -> tuple[Any, Any]:
        return make_pipeline(model, schedule, layers_of[schedule.name])

    batch = batch_shape(model, count)
    found = jaxpipe.choose_pipeline(
        make, batch, model.mesh, schedules=list(steps), microbatches=count, repeats=repeats
    )  # fmt: skip
    print(f"\n{found}")
    name, best = found.schedule.name, min(steps, key=lambda name: steps[name])
    print(f"chosen of {count} microbatches: {name}, {steps[name]:.1f} ms; the fastest: {best}, {steps[best]:.1f} ms")
    return steps[name] / steps[best]


def measure(model: Layers, plan: Any, stage: Any, whole: Costs, repeats: int, losses: dict[int, float]) -> Any:
    """A row of the table without its first two columns; plan is a step, its program and layers of a stage."""
    (step, compiled, layers), (costs, params, sizes) = plan, stage
    program, schedule, memory = step.program, step.program.schedule, compiled.memory_analysis()
    arguments, temp = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    needed = arguments + temp + memory.output_size_in_bytes - memory.alias_size_in_bytes
    limit = (model.mesh.devices.flat[0].memory_stats() or {}).get("bytes_limit", needed)
    if needed > limit:
        raise MemoryError(f"needs {gib(needed):.1f} GiB a GPU of {gib(limit):.1f}, {gib(temp):.1f} of it temporary")
    count, split = schedule.num_microbatches, schedule.num_stages // schedule.num_ranks
    held = jaxpipe.Params(masters(model, layers, schedule.storage_order, model.mesh)())
    shape = batch_shape(model, count).shape
    normal = functools.partial(jax.random.normal, shape=shape, dtype=jnp.bfloat16)
    batch = jax.jit(normal, out_shardings=NamedSharding(model.mesh, P("ep")))(jax.random.key(2))
    loss = float(compiled(held, batch)[0][0])
    assert abs(loss / losses.setdefault(count, loss) - 1) <= 2e-2, f"loss {loss}, of the first {losses[count]}"
    (step_ms,) = medians_ms([lambda: compiled(held, batch)], repeats)
    busy, ideal = (count * (times.forward + times.backward_input + times.weight) for times in (costs, whole))
    timeline = simulate(schedule, costs)
    form = closed_form_bubble(schedule.name, schedule.num_ranks, costs) if schedule.name in FORMS else float("nan")
    pools = (
        program.num_stash_slots,
        program.num_weight_stash_slots,
        program.num_cross_slots,
        program.num_message_slots,
    )
    slots = sum((number + 1) * size for number, size in zip(pools, sizes, strict=True))
    values = (
        step_ms, step_ms / ideal, timeline.makespan, step_ms / timeline.makespan, program.makespan / timeline.makespan,
        100 * (1 - split * busy / step_ms), 100 * (1 - split * busy / timeline.makespan),
        100 * max(timeline.bubble) / timeline.makespan, 100 * form / timeline.makespan, max(timeline.peak_live) / split,
        gib(slots + len(schedule.rank_stages[0]) * params * (4 + 2)), gib(temp), gib(arguments),
        round(shape[0] * shape[1] / step_ms * 1e3),
    )  # fmt: skip
    return dict(zip(COLUMNS[2:], values, strict=True))


def main() -> None:
    """Prints the table."""
    begin = time.monotonic()
    parser = make_parser(__doc__)
    parser.add_argument("--mesh", default="pp=4,ep=1", help="ranks, and devices of an expert group")
    parser.add_argument("--microbatches", help="default: 2, 4 and 8 times the ranks")
    parser.add_argument("--schedules", default=SCHEDULES, help="which, in this order")
    parser.add_argument("--model", choices=["moe", "dense"], default="moe", help="the layers")
    parser.add_argument("--layers", type=int, default=2, help="of a rank's share; even, as two stages halve it")
    parser.add_argument("--tokens", type=int, help="of a microbatch on a device; default: 4096")
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the median counts")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after so many")
    parser.add_argument("--choose", action="store_true", help="have `jaxpipe.choose` choose among them, too")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that the script runs")
    args = parser.parse_args()
    if args.layers < 2 or args.layers % 2:
        parser.error(f"--layers {args.layers}: two stages of a rank halve it, so take an even number")
    axes = {"ep": 1} | mesh_sizes(args.mesh)
    mesh, tokens = jaxpipe.make_mesh(pp=axes["pp"], ep=axes["ep"]), args.tokens or (64 if args.tiny else 4096)
    experts = Mesh(mesh.devices[0], ("ep",), axis_types=(AxisType.Auto,))
    moe = moe_chunk(1, "tiny" if args.tiny else "dsv3", tokens, experts)
    model = Layers(moe if args.model == "moe" else dense_chunk(1, 64 if args.tiny else 4096, tokens), mesh)
    args.record_as = args.record_as or f"schedules {args.model} {args.mesh}"
    size = (
        f"{axes['pp'] * args.layers} times {model.chunk.name}, {model.chunk.tokens} tokens of a microbatch on a device"
    )
    report = Recorder.begin(args, machine(mesh.size), args.mesh, size)
    jax.config.update("jax_disable_most_optimizations", args.tiny)
    layers_of = {name: args.layers // (2 if name in HALVED else 1) for name in args.schedules.split(",")}
    with ThreadPoolExecutor(8) as pool:
        stages = {n: measure_stage(model, n, pool, args.repeats) for n in sorted({args.layers, *layers_of.values()})}
    default = ",".join(str(factor * axes["pp"]) for factor in ((2,) if args.tiny else (2, 4, 8)))
    losses: dict[int, float] = {}

    def compiled(count: int) -> list[tuple[str, Any, Any]]:
        """Each schedule with its step and its program, or an error and None; nothing runs meanwhile."""
        plans: list[tuple[str, Any, Any]] = []
        with ThreadPoolExecutor(8) as pool:
            for name, layers in layers_of.items():
                try:
                    step, lowered = make_step(model, build(name, axes["pp"], count), layers, stages[layers][0])
                    plans.append((name, step, start(pool, f"{name} of {count}", lowered)))
                except Exception as error:
                    plans.append((name, error, None))
        return plans

    def rows() -> Iterator[dict[str, Any]]:
        for count in map(int, (args.microbatches or default).split(",")):
            if time.monotonic() - begin > args.seconds:
                return
            for name, step, program in compiled(count):
                if time.monotonic() - begin > args.seconds:
                    return
                row, layers = dict.fromkeys(COLUMNS, "") | {"schedule": name, "microbatches": count}, layers_of[name]
                try:
                    if program is None:
                        raise step
                    plan = step, program.result(), layers
                    row |= measure(model, plan, stages[layers], stages[args.layers][0], args.repeats, losses)
                    ratios.append(row["step / simulated"])
                    steps.setdefault(count, {})[name] = row["step ms"]
                except Exception as error:
                    row["step ms"] = f"{type(error).__name__}: {error}".splitlines()[0]
                yield row

    ratios: list[float] = []
    steps: dict[int, dict[str, float]] = {}
    report.table(rows(), labels=2, formats={"in flight": "g"})
    keys = {f"worst_step_over_simulated_{args.model}": max(ratios)} if ratios else {}
    if args.choose and steps:
        chosen = [choose(model, layers_of, found, count, args.repeats) for count, found in steps.items()]
        keys[f"worst_choice_over_fastest_{args.model}"] = max(chosen)
    for key, value in keys.items():
        print(f"\n{key}: {value:.3f}")
    if report.file and keys and not args.tiny:
        found = {key: (value, "") for key, value in keys.items()}
        write_records(report.file, found, command=command_line(), machine=report.machine)


if __name__ == "__main__":
    main()
