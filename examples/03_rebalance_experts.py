"""Placements of experts: DeepSeek's own example, then the loads of a router that this script trains.

    python examples/03_rebalance_experts.py [--save LOADS.npz] [--plot LOADS.png]

The router is part of a small mixture-of-experts language model, 256 experts of which each byte takes 8, trained on the
Python standard library's source. Plans are made from the loads of one part of the run and judged by those of the next.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from pretraining.data import load_corpus, make_batch
from pretraining.tables import markdown_head, markdown_row

import eplb_jax
import eplb_jax.plan.plot
from eplb_jax import balanced, balancedness, count_tokens, duplicates, moved, no_duplicate, sticky
from jaxpipe.deepseek import causal_attention, rms_norm

LAYERS, EXPERTS, TOP_K, WIDTH, HIDDEN = 4, 256, 8, 64, 16
BATCH, SEQUENCE = 8, 128
SIZES = {"num_replicas": 288, "num_groups": 8, "num_nodes": 4, "num_gpus": 32}


def deepseek_example() -> None:
    """The example of github.com/deepseek-ai/EPLB, which prints these two rows."""
    weight = np.array(
        [
            [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
            [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
        ]
    )
    phy2log, _, _ = eplb_jax.rebalance_experts(weight, num_replicas=16, num_groups=4, num_nodes=2, num_gpus=8)
    print(phy2log)
    assert phy2log.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]


def initial_params(key: jax.Array) -> dict[str, jax.Array]:
    """Normal values, scaled by the width that they sum over."""
    shapes = {
        "embedding": (256, WIDTH),
        "qkv": (LAYERS, WIDTH, 3 * WIDTH),
        "router": (LAYERS, WIDTH, EXPERTS),
        "up": (LAYERS, WIDTH, EXPERTS, HIDDEN),
        "down": (LAYERS, EXPERTS, HIDDEN, WIDTH),
    }
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
    return {name: jax.random.normal(keys[name], shape) / WIDTH**0.5 for name, shape in shapes.items()}


def layer(x: jax.Array, params: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Attention, then a mixture of experts, computed densely; and how many bytes chose each expert."""
    q, k, v = (part[:, :, None] for part in jnp.split(rms_norm(x) @ params["qkv"], 3, -1))
    x = x + causal_attention(q, k, v)[:, :, 0]
    scores = jax.nn.sigmoid(rms_norm(x) @ params["router"])
    best, chosen = jax.lax.top_k(scores, TOP_K)
    shares = (jax.nn.one_hot(chosen, EXPERTS) * (best / best.sum(-1, keepdims=True))[..., None]).sum(-2)
    hidden = jax.nn.silu(jnp.einsum("btd,deh->bteh", rms_norm(x), params["up"])) * shares[..., None]
    return x + jnp.einsum("bteh,ehd->btd", hidden, params["down"]), count_tokens(chosen, EXPERTS)


def loss_and_loads(params: dict[str, jax.Array], data: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy in nats a byte, and the loads [layers, experts] of its batch."""
    layers = {name: value for name, value in params.items() if name != "embedding"}
    x, loads = jax.lax.scan(layer, params["embedding"][data["tokens"]], layers)
    losses = optax.softmax_cross_entropy_with_integer_labels(rms_norm(x) @ params["embedding"].T, data["targets"])
    return (losses * data["mask"]).sum() / data["mask"].sum(), loads


def record_loads(steps: int = 96) -> np.ndarray:
    """Trains, and returns the loads of every step; int32 [steps, layers, experts]."""
    optimizer = optax.adam(optax.cosine_decay_schedule(6e-3, steps))

    @functools.partial(jax.jit, donate_argnums=0)
    def train(state, data):
        params, moments = state
        (loss, loads), grads = jax.value_and_grad(loss_and_loads, has_aux=True)(params, data)
        updates, moments = optimizer.update(grads, moments)
        return (optax.apply_updates(params, updates), moments), loss, loads

    text = load_corpus(max_tokens=2_000_000).train
    params = initial_params(jax.random.key(0))
    state, recorded, losses = (params, optimizer.init(params)), [], []
    for step in range(steps):
        state, loss, loads = train(state, make_batch(text, 0, step, BATCH, SEQUENCE))
        recorded.append(np.asarray(loads))
        losses.append(float(loss))
    print(f"\ntrained a router for {steps} steps: loss {losses[0]:.2f} -> {np.mean(losses[-8:]):.2f} nats a byte")
    assert np.mean(losses[-8:]) < losses[0] - 1
    return np.stack(recorded)


def main() -> None:
    """Prints DeepSeek's example and a table of plans for the recorded loads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", help="npz to write the recorded loads into, for `python -m eplb_jax plan`")
    parser.add_argument("--plot", help="picture to write: load per GPU of each plan")
    arguments = parser.parse_args()
    deepseek_example()

    recorded = record_loads()
    if arguments.save:
        eplb_jax.save_loads(arguments.save, recorded.sum(0))
    earlier, now, later = (part.sum(0) for part in np.split(recorded[-72:], 3))
    sizes, gpus = SIZES, SIZES["num_gpus"]
    before = balanced(earlier, **sizes)
    in_order = np.tile(np.arange(EXPERTS, dtype=np.int32), (LAYERS, 1))
    plans = {
        "in order, 256 slots": eplb_jax.Placement.from_phy2log(in_order, EXPERTS),
        "24 steps old": before,
        "deepseek": eplb_jax.rebalance_experts(now, **sizes),
        "balanced": balanced(now, **sizes),
        "no-duplicate": no_duplicate(now, **sizes),
        "sticky": sticky(now, before, *list(sizes.values())[1:]),
    }
    print(f"\n{SIZES}\n")
    columns = "plan", "mean / max of GPUs: planned steps", "next 24 steps", "duplicates", "moved from 24 steps ago"
    print(markdown_head(columns))
    figures = {}
    for name, plan in plans.items():
        figures[name] = [balancedness(plan, loads, gpus).mean() for loads in (now, later)]
        moves = moved(before, plan, gpus).sum()
        shares = (f"{share:.4f}" for share in figures[name])
        print(markdown_row([name, *shares, duplicates(plan, gpus).sum(), moves]))
    if arguments.plot:
        eplb_jax.draw_loads(now, {name: plans[name] for name in ("24 steps old", "deepseek", "balanced")}, gpus,
                                 arguments.plot)  # fmt: skip

    assert figures["balanced"][0] >= figures["deepseek"][0] > figures["in order, 256 slots"][0]
    assert figures["sticky"][0] >= figures["balanced"][0] * 0.985
    assert duplicates(plans["no-duplicate"], gpus).sum() == 0


if __name__ == "__main__":
    main()
