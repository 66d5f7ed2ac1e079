"""What a traced program consists of."""

from jaxpipe.stage.flops import subjaxprs


def equations(jaxpr, around=()):
    """(equation, primitives around it) of a jaxpr and all within it, from the outermost on."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn, around
        for inner in subjaxprs(eqn):
            yield from equations(inner, (*around, eqn.primitive.name))


def primitives(jaxpr):
    """The names of all primitives, each once for each of its equations."""
    return [eqn.primitive.name for eqn, _ in equations(jaxpr)]
