"""Side effects of a stage: what runs once for each microbatch, what JAX repeats, and what cannot be supported.

A node with an effect has one more result, a flag that nothing reads: what must run is what makes these flags. So
effects are divided, and stacked by loops, like any other value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from jaxpipe._jax import NEW_REF_EFFECT, REF_EFFECTS, ClosedJaxpr, Jaxpr, JaxprEqn, Literal, discharge_refs
from jaxpipe.stage.branches import restricted
from jaxpipe.stage.flops import subjaxprs
from jaxpipe.stage.graph import Cond, Node, Value, eqn_node, has_effect, has_side_effects


def effects_of(nodes: Iterable[Node]) -> tuple[Value, ...]:
    """The results that stand for effects."""
    return tuple(value for node in nodes for value in node.outs if value.effect)


def without_refs(closed: ClosedJaxpr) -> ClosedJaxpr:
    """The jaxpr with `jax.new_ref` and what reads and writes it as plain values.

    Raises:
      ValueError: it uses refs that are made elsewhere, or in a way that JAX cannot turn into values.
    """
    kinds = {type(effect).__name__ for effect in closed.jaxpr.effects}
    if kinds & REF_EFFECTS:
        raise ValueError(
            f"a stage uses a ref that was made outside of it ({', '.join(sorted(kinds & REF_EFFECTS))}): the schedule "
            "decides which stage and microbatch comes first, so what it holds is not defined; make the ref inside the "
            "stage with jax.new_ref, or pass the array as a parameter and return what changes as a metric"
        )
    if NEW_REF_EFFECT not in kinds:
        return closed
    try:
        return discharge_refs(closed)
    except (NotImplementedError, ValueError) as error:
        raise ValueError(
            f"a stage uses a ref within a function that JAX cannot turn into one of plain values: {error}; there, pass "
            "the array as an argument and a result instead"
        ) from error


def check_effects(effects: Iterable[Any], what: str) -> None:
    """Refuses effects that JAX can order on one device alone, where the mesh has several.

    Raises:
      ValueError: there is such an effect.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1 and any(type(effect).__name__ == "OrderedDebugEffect" for effect in effects):
        raise ValueError(
            f"{what} has an ordered debug callback or print, and the mesh has {mesh.size} devices {dict(mesh.shape)}, "
            "among which JAX knows no order: pass ordered=False and tell the lines apart by ctx.stage and "
            "ctx.microbatch, or use jax.experimental.io_callback(..., ordered=True), which each device orders by itself"
        )


def without_repeated(
    backward: Sequence[Node], forward: Sequence[Node], cotangents: Iterable[Value]
) -> tuple[Node, ...]:
    """A backward pass without those effects of the forward that `jax.checkpoint` repeats.

    An effect is a repetition if it runs in a recomputation, depends on no cotangent, and stands in the forward too. The
    effects of a custom derivative itself stay.
    """
    known = frozenset().union(*(_kinds(node.eqn) for node in flat(forward)))
    depends = dependents(backward, set(cotangents))

    def is_repeated(node: Node) -> bool:
        return node.recomputed and _kinds(node.eqn) <= known and depends.isdisjoint(node.ins)

    return _silence(backward, is_repeated)


def silence(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """The nodes without side effects, but for those that make results."""
    return _silence(nodes, lambda _: True)


def _silence(nodes: Iterable[Node], chosen: Callable[[Node], bool]) -> tuple[Node, ...]:
    kept = []
    for node in nodes:
        if node.scan is not None and has_effect(node):
            inner = _silence(node.scan.nodes, chosen)
            gone = {*effects_of(node.scan.nodes)} - {*effects_of(inner)}
            ys = tuple(pair for pair in node.scan.ys if pair[0] not in gone)
            if ys or node.scan.carries:
                kept.append(dataclasses.replace(node.scan, nodes=inner, ys=ys).node())
        elif node.cond is not None and has_effect(node):
            bodies = [_silence(body, chosen) for body in node.bodies]
            left = {value for body in bodies for value in effects_of(body)}
            rows = zip(node.cond.results, zip(*(b.outputs for b in node.cond.branches), strict=True), strict=True)
            results = {result for result, row in rows if not result.effect or not left.isdisjoint(row)}
            if results:
                kept.append(restricted(node.cond, bodies, results).node())
        elif not has_effect(node) or not chosen(node):
            kept.append(node)
        elif node.eqn and (outs := tuple(value for value in node.outs if not value.effect)):
            quiet = eqn_node(_silent_eqn(node.eqn), node.ins, outs, node.context)
            kept.append(dataclasses.replace(quiet, recompute=node.recompute, recomputed=node.recomputed))
    return tuple(kept)


def _silent_eqn(eqn: JaxprEqn) -> JaxprEqn:
    """An equation without the effects of the computations inside."""

    def silent(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(map(silent, value))
        if isinstance(value, ClosedJaxpr) and not isinstance(value, Jaxpr):
            return value.replace(jaxpr=_silent_jaxpr(value.jaxpr))
        return _silent_jaxpr(value) if isinstance(value, Jaxpr) else value

    quiet = eqn.replace(params={name: silent(value) for name, value in eqn.params.items()})
    inside = frozenset().union(*(sub.effects for sub in subjaxprs(quiet)))
    return quiet.replace(effects=eqn.effects & inside) if subjaxprs(eqn) else eqn


def _silent_jaxpr(jaxpr: Jaxpr) -> Jaxpr:
    """Without equations whose side effects are all that they do; what is done to refs stays."""
    used = {atom for atom in jaxpr.outvars if not isinstance(atom, Literal)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if has_side_effects(eqn.effects) and not _of_refs(eqn.effects):
            if used.isdisjoint(eqn.outvars):
                continue
            eqn = _silent_eqn(eqn)
        used.update(atom for atom in eqn.invars if not isinstance(atom, Literal))
        kept.append(eqn)
    left = frozenset().union(*(eqn.effects for eqn in kept))
    return jaxpr.replace(eqns=kept[::-1], effects={e for e in jaxpr.effects if e in left or _of_refs([e])})


def _of_refs(effects: Iterable[Any]) -> bool:
    return any(type(effect).__name__ in {*REF_EFFECTS, NEW_REF_EFFECT} for effect in effects)


def _kinds(eqn: JaxprEqn | None) -> frozenset[Any]:
    """The side effects of an equation and of the computations inside; the same for an effect and its repetition."""
    if eqn is None or not has_side_effects(eqn.effects):
        return frozenset()
    inner = frozenset().union(*(_kinds(sub) for jaxpr in subjaxprs(eqn) for sub in jaxpr.eqns))
    return inner or frozenset({(eqn.primitive.name, str(sorted((k, repr(v)) for k, v in eqn.params.items())))})


def flat(nodes: Iterable[Node]) -> Iterable[Node]:
    """The nodes, and those of bodies and branches."""
    for node in nodes:
        yield node
        for body in node.bodies:
            yield from flat(body)


def dependents(nodes: Sequence[Node], values: set[Value]) -> set[Value]:
    """Values, and all that depend on them, in bodies and branches, too."""
    found = set(values)
    for node in nodes:
        if node.cond is not None:
            _spread(node.cond, found)
            continue
        scan = node.scan
        if scan is None:
            if not found.isdisjoint(node.ins):
                found.update(node.outs)
            continue
        found.update(inner for outer, inner in (*scan.consts, *scan.xs) if outer in found)
        found.update(carry.entering for carry in scan.carries if carry.initial in found)
        while True:
            found |= dependents(scan.nodes, found)
            grown = {carry.entering for carry in scan.carries if carry.leaving in found} - found
            if not grown:
                break
            found |= grown
        found.update(carry.final for carry in scan.carries if carry.entering in found or carry.leaving in found)
        found.update(stacked for inner, stacked in scan.ys if inner in found)
    return found


def _spread(cond: Cond, found: set[Value]) -> None:
    """Adds what depends on found values in a conditional: all results where the index does."""
    for branch in cond.branches:
        pairs = zip(cond.operands, branch.inputs, strict=True)
        found.update(value for operand, value in pairs if value is not None and operand in found)
        if cond.index in found:
            found.update(value for node in branch.nodes for value in (*node.ins, *node.outs))
        found |= dependents(branch.nodes, found)
        pairs = zip(cond.results, branch.outputs, strict=True)
        found.update(result for result, value in pairs if value in found or cond.index in found)
