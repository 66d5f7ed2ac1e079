"""Random stages, and whether their divided backward pass is what jax.vjp gives.

    python -m tests.jaxpipe.stage.fuzz --seeds 2000 [--start 0]  how many of these programs are wrong or crash
    python -m tests.jaxpipe.stage.fuzz --seeds 1 --start 17 --show  one: its pieces, its jaxpr, what went wrong

A program is made of `tests.jaxpipe.stage.pieces`. Its plain gradient and the divided one are compared as
expressions of the inputs (`tests.jaxpipe.stage.expressions`), which holds in every dtype and for any numbers, and with
``--numbers`` the float64 programs also by numbers, compiled.
"""

import argparse
import collections
import dataclasses
import functools
import os
import random
import re
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.stage import matmul_flops, split_stage
from jaxpipe.stage.split import Divisible
from tests.jaxpipe.stage.expressions import Book, expressions
from tests.jaxpipe.stage.leaves import COLUMNS, ROWS, Context
from tests.jaxpipe.stage.pieces import Maker
from tests.plain import assert_trees_close

DTYPES = ("float64", "float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Program:
    """A random stage with its arguments; ``x`` holds activations and integers, ``pieces`` names what it is made of."""

    seed: int
    dtype: str
    stage: Callable[..., Any]
    params: Any
    x: Any
    context: Context
    has_aux: bool
    pieces: tuple[str, ...]


def dtype_of(seed: int) -> str:
    return DTYPES[seed % len(DTYPES)]


def make_program(seed: int, *, longest: int = 5) -> Program:
    """The program of a seed, of two to ``longest`` pieces in a row; float64 needs `jax.enable_x64`."""
    rng, dtype = random.Random(seed), dtype_of(seed)
    maker = Maker(rng)
    body = maker.chain(rng.randint(2, longest), depth=2)
    ends = rng.choice(["plain", "tree", "tree"])
    has_aux = rng.random() < 0.3
    maker.shapes["unused"] = (3,)

    def stage(params: Any, x: Any, context: Context) -> Any:
        if ends == "plain":
            out = body(params, x, context)
            return (out, {"largest": jax.lax.stop_gradient(out).max()}) if has_aux else out
        h, extra = x["h"], x["extra"]
        context = context._replace(position=context.position + x["count"])
        out = body(params, h + extra, context)
        result = {"h": out, "extra": extra * 2, "count": x["count"] + 1}
        return (result, {"count": x["count"].sum(), "mean": out.mean()}) if has_aux else result

    numbers = np.random.default_rng(seed)
    wide = rng.random() < 0.3  # masters are wider than activations

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(numbers.normal(size=shape) * 0.6, dtype)

    def param(shape: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(numbers.normal(size=shape) * 0.6, "float32" if wide and dtype == "bfloat16" else dtype)

    params = jax.tree.map(param, maker.shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    params["offset"] = jnp.int32(1)
    x: Any = normal(ROWS, COLUMNS)
    if ends == "tree":
        x = {"h": x, "extra": normal(ROWS, COLUMNS), "count": jnp.asarray(numbers.integers(0, 3, ROWS), jnp.int32)}
    context = Context(
        mask=jnp.asarray(numbers.random(ROWS) < 0.6),
        position=jnp.asarray(numbers.integers(0, ROWS, ROWS), jnp.int32),
        index=jnp.int32(numbers.integers(0, 3)),
        key=jax.random.key(seed),
    )
    return Program(seed, dtype, stage, params, x, context, has_aux, tuple(maker.names))


def check(program: Program, *, budgets: bool = False) -> None:
    """Raises an AssertionError where a divided stage computes anything else than the plain one.

    With ``budgets`` also within one that is drawn for the program, from the least that works to all that it can keep.
    """
    args = program.params, program.x, program.context
    check_split(program, split_stage(program.stage, *args, has_aux=program.has_aux, recompute=program.seed % 4 != 0))
    if budgets:
        check_within(program)


def check_within(program: Program) -> None:
    """The same of a stage within the least budget, and within a random one above it, which it keeps to."""
    args = program.params, program.x, program.context
    stage = Divisible(program.stage, *args, has_aux=program.has_aux)
    most = kept_bytes(stage.within(1 << 60))
    try:
        least = kept_bytes(stage.within(0))
    except ValueError as error:
        least = int(re.search(r"can be, is ([\d,]+)", str(error))[1].replace(",", ""))
    for stash in {least, random.Random(program.seed).randint(least, max(least, most))}:
        split = stage.within(stash)
        assert least <= kept_bytes(split) <= stash
        check_split(program, split, again=True)


def kept_bytes(split: Any) -> int:
    """Bytes of residuals and of what crosses."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((split.residuals, split.crossing)))


def check_split(program: Program, split: Any, *, again: bool = False) -> None:
    """Raises an AssertionError where a divided stage is not the plain one; ``again``: it may run products twice."""
    args = program.params, program.x, program.context
    book = Book()
    numbers = tuple(book.inputs(name, tree) for name, tree in zip(("params", "x", "context"), args, strict=True))
    out_ct = cotangents(program, split.out)
    ct_numbers = book.inputs("cotangent", out_ct)
    (out, aux, *cts), like = expressions(
        book, functools.partial(plain, program), (*args, out_ct), (*numbers, ct_numbers)
    )

    prepared, prepared_like = expressions(book, split.prepare, args[:1], numbers[:1])
    found, found_like = expressions(book, split.forward, (prepared_like, *args[1:]), (prepared, *numbers[1:]))
    assert_same((found[0], [*found[1:-1]]), (out, aux), "forward")
    assert (found_like[0], [*found_like[1:-1]]) == like[:2]
    residuals, residuals_like = found[-1], found_like[-1]
    given = (prepared, residuals, ct_numbers), (prepared_like, residuals_like, out_ct)
    (x_ct, crossing), (_, crossing_like) = expressions(book, split.backward_input, given[1], given[0])
    assert_floating_same(program.x, x_ct, cts[1], "I: x's cotangent")
    params_ct, _ = expressions(
        book,
        split.backward_weight,
        (prepared_like, residuals_like.weight, crossing_like),
        (prepared, residuals.weight, crossing),
    )
    assert_floating_same(program.params, params_ct, cts[0], "W: parameters' cotangent")
    whole, whole_like = expressions(book, split.backward, given[1], given[0])
    assert_floating_same(args[:2], whole, tuple(cts), "whole B")
    summed, _ = expressions(book, functools.partial(by_sums, split), given[1], given[0])
    assert_floating_same(program.params, summed, cts[0], "whole B, of sums")
    assert whole_like == like[2:] == jax.tree.map(shape_of, args[:2])
    assert (split.residuals, split.crossing) == (residuals_like, crossing_like)
    if not again:
        check_first_half(program, split, given[1])


def check_first_half(program: Program, split: Any, given: Any) -> None:
    """No product of the weights' gradient is in the first half, whichever branches its conditionals take.

    It has no more products than the plain gradient of the input alone, unless heavy work is computed again by name.
    """
    if "light_by_name" in program.pieces and program.seed % 4 != 0:
        return

    def plain_vjp(params: Any, x: Any, context: Context) -> Any:
        diff, rest = partition(x)

        def call(diff: Any) -> Any:
            result = program.stage(params, merge(diff, rest), context)
            return partition(result[0] if program.has_aux else result)[0]

        return jax.vjp(call, diff)[1]

    vjp = jax.eval_shape(plain_vjp, program.params, program.x, program.context)
    plain_x = jax.make_jaxpr(lambda vjp, ct: vjp(ct))(vjp, partition(given[-1])[0])
    first = jax.make_jaxpr(split.backward_input)(*given)
    for branch in range(3):
        found, least = (matmul_flops(jaxpr, branch=branch) for jaxpr in (first, plain_x))
        assert found <= least, f"I, branch {branch}: {found} FLOPs, {least} for the input's gradient alone"


def by_sums(split: Any, prepared: Any, residuals: Any, out_ct: Any) -> Any:
    """The parameters' cotangent as a step makes it of sums, here of one microbatch, in the dtypes of the parameters."""
    summands, _ = split.backward(prepared, residuals, out_ct, summands=True)
    sums = [value.astype(aval.dtype) for value, aval in zip(summands, split.summands, strict=True)]
    return split.gradients(prepared, sums)


def check_numbers(program: Program, stash: int | None = None) -> None:
    """The same by numbers, compiled; of float64 programs, whose rounding hides no mistake."""
    args = program.params, program.x, program.context
    split = split_stage(program.stage, *args, has_aux=program.has_aux, stash=stash)
    out_ct = cotangents(program, split.out)

    @jax.jit
    def both(params: Any, x: Any, context: Context, out_ct: Any) -> tuple[Any, Any, Any]:
        prepared = split.prepare(params)
        out, *aux, residuals = split.forward(prepared, x, context)
        x_ct, crossing = split.backward_input(prepared, residuals, out_ct)
        halves = split.backward_weight(prepared, residuals.weight, crossing), x_ct
        return (
            plain(program, params, x, context, out_ct),
            (out, aux, *halves),
            (out, aux, *split.backward(prepared, residuals, out_ct)),
        )

    expected, halves, whole = both(*args, out_ct)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected[2:]))
    assert np.isfinite(largest)
    for found in (halves, whole):
        assert_trees_close(found, expected, rtol=1e-10, atol=1e-12 * largest)


def plain(program: Program, params: Any, x: Any, context: Context, out_ct: Any = None) -> Any:
    """(out, [aux], params' cotangent, x's cotangent) by `jax.vjp`, zeros for what is not floating."""
    diff_p, rest_p = partition(params)
    diff_x, rest_x = partition(x)

    def call(diff_p: Any, diff_x: Any) -> Any:
        result = program.stage(merge(diff_p, rest_p), merge(diff_x, rest_x), context)
        out, *aux = result if program.has_aux else (result,)
        return partition(out)[0], (out, aux)

    _, vjp, (out, aux) = jax.vjp(call, diff_p, diff_x, has_aux=True)
    params_ct, x_ct = vjp(partition(jax.tree.map(jnp.zeros_like, out) if out_ct is None else out_ct)[0])
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    return out, aux, merge(params_ct, zeros(rest_p)), merge(x_ct, zeros(rest_x))


def cotangents(program: Program, out: Any) -> Any:
    """Random cotangents of an output."""
    numbers = np.random.default_rng((program.seed, 1))
    return jax.tree.map(
        lambda leaf: jnp.asarray(numbers.normal(size=leaf.shape), leaf.dtype) if inexact(leaf) else leaf, out
    )


def inexact(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def partition(tree: Any) -> tuple[Any, Any]:
    """(floating leaves, others), None in the others' places."""
    return tuple(jax.tree.map(lambda leaf, w=w: leaf if inexact(leaf) == w else None, tree) for w in (True, False))


def merge(left: Any, right: Any) -> Any:
    return jax.tree.map(lambda a, b: b if a is None else a, left, right, is_leaf=lambda leaf: leaf is None)


def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def assert_same(found: Any, expected: Any, what: str) -> None:
    """The same expressions in the same structure."""
    assert jax.tree.structure(found) == jax.tree.structure(expected), what
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert a == b, f"{what}{jax.tree_util.keystr(path)} is another expression"


def assert_floating_same(like: Any, found: Any, expected: Any, what: str) -> None:
    """`assert_same` of the leaves that are floating in ``like``; the others' cotangents are zeros."""
    pick = functools.partial(jax.tree.map, lambda leaf, value: value if inexact(leaf) else None, like)
    assert_same(pick(found), pick(expected), what)


def run_seed(seed: int, *, numbers: bool = False, show: bool = False, budgets: bool = False) -> None:
    """Makes and checks one program."""
    with jax.enable_x64(dtype_of(seed) == "float64"):
        program = make_program(seed)
        if show:
            print(f"seed {seed}, {program.dtype}: {', '.join(program.pieces)}")
            print(jax.make_jaxpr(program.stage)(program.params, program.x, program.context))
        check(program, budgets=budgets)
        if numbers and program.dtype == "float64":
            check_numbers(program)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.jaxpipe.stage.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=150, help="how many programs")
    parser.add_argument("--start", type=int, default=0, help="the first one's seed")
    parser.add_argument("--numbers", action="store_true", help="run float64 programs, too")
    parser.add_argument("--budgets", action="store_true", help="divide within budgets of bytes, too")
    parser.add_argument("--show", action="store_true", help="print pieces, jaxprs and tracebacks")
    options = parser.parse_args(argv)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    failures: dict[str, list[int]] = collections.defaultdict(list)
    begin = time.perf_counter()
    for seed in range(options.start, options.start + options.seeds):
        try:
            run_seed(seed, numbers=options.numbers, show=options.show, budgets=options.budgets)
        except Exception as error:
            kind = "wrong" if isinstance(error, AssertionError) else "crashed"
            failures[kind].append(seed)
            print(f"seed {seed} {kind}: {type(error).__name__}: {str(error)[:200]}", flush=True)
            if options.show:
                traceback.print_exc()
    seconds = time.perf_counter() - begin
    print(f"{options.seeds} programs from seed {options.start} in {seconds:.0f} s:", end=" ")
    print(", ".join(f"{len(failures[kind])} {kind} {failures[kind]}" for kind in ("wrong", "crashed")))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
