"""Pretrains a small language model on real text through a pipeline.

    python examples/pretrain.py                         # DualPipeV on 8 fake CPU devices, about three minutes
    python examples/pretrain.py --schedule zb1p --mesh pp=2,dp=2 --steps 50 --data 'books/*.txt'

Ends with two checks: the first three steps equal a run without a pipeline, and, if there were enough steps, the
loss is below the entropy of the text's byte frequencies.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import pathlib
import sys


def parse_mesh(text: str) -> dict[str, int]:
    """``"pp=4,dp=2"`` as a dict."""
    try:
        sizes = {name: int(size) for name, size in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a mesh; write sizes by axis, as in pp=4,dp=2") from None
    if "pp" not in sizes or not set(sizes) <= {"pp", "dp"} or min(sizes.values()) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a mesh needs axis pp, may have dp, and no other")
    return sizes


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedule", default="dualpipev", help="a name that jaxpipe.schedule.build knows")
    parser.add_argument("--mesh", type=parse_mesh, default="pp=4,dp=2", help="sizes of the mesh axes pp and dp")
    parser.add_argument("--microbatches", type=int, help="default: twice the pipeline ranks")
    parser.add_argument("--microbatch-size", type=int, default=4, help="sequences of a microbatch, over all dp shards")
    parser.add_argument("--steps", type=int, default=70)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the computation")
    parser.add_argument("--data", help="glob of text files; default: the Python standard library's source")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Trains and checks."""
    args = parse_arguments()
    count = math.prod(args.mesh.values())
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        # Fake devices share the machine's cores and may wait long for each other.
        os.environ["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
            " --xla_cpu_collective_call_terminate_timeout_seconds=1200"
        )

    # jax reads the number of devices when it is imported.
    import jax  # noqa: PLC0415
    import jax.numpy as jnp  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415

    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
    from pretraining import data, model, trainer  # noqa: PLC0415

    import jaxpipe  # noqa: PLC0415

    ranks = args.mesh["pp"]
    schedule = jaxpipe.schedule.build(args.schedule, ranks, args.microbatches or 2 * ranks)
    mesh = jaxpipe.make_mesh(**args.mesh)
    config = model.ModelConfig(
        width=args.width,
        heads=max(1, args.width // 32),
        hidden=3 * args.width,
        layers=args.layers,
        sequence=args.sequence,
    )
    functions, params = model.build_model(config, schedule, args.seed)
    value_and_grad = jaxpipe.value_and_grad(
        functions.stage,
        schedule,
        mesh,
        embed=functions.embed,
        head=functions.head,
        weight=functions.weight,
        data_axes=("dp",) if "dp" in args.mesh else (),
        compute_dtype=jnp.dtype(args.dtype),
    )
    corpus = data.load_corpus(args.data)
    entropy = data.unigram_entropy(corpus.train)
    batch_size = schedule.num_microbatches * args.microbatch_size
    make_batch = functools.partial(data.make_batch, corpus.train, args.seed, batch=batch_size, sequence=args.sequence)
    leaves = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(
        f"{args.schedule} on {dict(mesh.shape)} {jax.devices()[0].platform} devices: {schedule.num_stages} stages, "
        f"{schedule.num_microbatches} microbatches, {leaves / 1e6:.1f}M parameters, "
        f"{batch_size * args.sequence} tokens a step\n"
        f"{len(corpus.train) / 1e6:.1f}M tokens of {corpus.source}, unigram entropy {entropy:.3f} nats a token"
    )

    train_config = trainer.TrainConfig(steps=args.steps, learning_rate=args.learning_rate)
    optimizer = trainer.make_optimizer(train_config)
    rng = jax.random.key(args.seed)
    copy = jax.tree.map(jnp.copy, params)
    step = trainer.make_step(value_and_grad, optimizer)
    state = trainer.init_state(trainer.place(params, mesh), optimizer)
    _, losses = trainer.train(step, state, make_batch, rng, args.steps)

    checked = min(3, args.steps)
    plain_step = trainer.make_step(trainer.plain_value_and_grad(functions, schedule), optimizer)
    state, plain_losses = trainer.init_state(copy, optimizer), []
    for index in range(checked):
        state, metrics = plain_step(state, make_batch(index), rng)
        plain_losses.append(float(metrics["loss"]))
    print("with a pipeline   ", *(f"{loss:.6f}" for loss in losses[:checked]))
    print("without a pipeline", *(f"{loss:.6f}" for loss in plain_losses))
    tolerance = 1e-4 if args.dtype == "float32" else 2e-2
    np.testing.assert_allclose(losses[:checked], plain_losses, rtol=tolerance)

    final = float(np.mean(losses[-5:]))
    if args.steps >= 60:
        assert final < entropy, f"loss {final:.3f} is not below the unigram entropy {entropy:.3f}"
        print(f"final loss {final:.3f} < unigram entropy {entropy:.3f}")


if __name__ == "__main__":
    main()
