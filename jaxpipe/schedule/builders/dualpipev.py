"""DualPipeV: the two halves of a model on one rank; and the eight steps it shares with DualPipe."""

from __future__ import annotations

from collections.abc import Iterator

from jaxpipe.schedule.action import Action, Kind
from jaxpipe.schedule.ints import at_least
from jaxpipe.schedule.schedule import Schedule

Part = tuple[int, Kind, int]
"""(chunk 0 or 1 of the rank, kind, how many of that chunk and kind came before)."""


def dualpipev(num_ranks: int, num_microbatches: int) -> Schedule:
    """DualPipeV: rank r runs stages r and ``2 * num_ranks - 1 - r``, at most ``2 * num_ranks + 1`` stashes a rank.

    Source: https://github.com/deepseek-ai/DualPipe, after the "cut-in-half" of Sea AI Lab.

    Raises:
      ValueError: fewer than ``2 * num_ranks`` microbatches.

    >>> " ".join("&".join(map(str, group)) for group in dualpipev(2, 4).ranks[1])
    '1F0 2F0 1F1 2F1 1F2 2B0 2F2&1B0 1F3&2B1 2F3&1B1 2B2 1B2 2I3 1I3 2W3 1W3'
    """
    num_ranks = at_least("dualpipev", "num_ranks", num_ranks, 1)
    num_microbatches = at_least("dualpipev", "num_microbatches", num_microbatches, 2 * num_ranks)
    last = 2 * num_ranks - 1
    ranks = tuple(
        tuple(
            tuple(Action((rank, last - rank)[chunk], kind, count) for chunk, kind, count in group)
            for group in eight_steps(rank, num_ranks, num_microbatches)
        )
        for rank in range(num_ranks)
    )
    route = tuple(min(stage, last - stage) for stage in range(2 * num_ranks))
    return Schedule("dualpipev", 2 * num_ranks, num_microbatches, ranks, (route,))


def eight_steps(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[tuple[Part, ...]]:
    """The groups of one rank of a V of ``num_ranks`` ranks, in the eight steps of DeepSeek's implementation.

    Chunk 0 sends activations away from rank 0, chunk 1 back towards it. Each half of DualPipe's ranks runs
    such a V with half the microbatches.
    """
    counts: dict[tuple[int, Kind], int] = {}
    below = num_ranks - 1 - rank

    def part(chunk: int, kind: Kind) -> Part:
        # A backward takes the oldest microbatch not yet backed, whether whole or split.
        key = (chunk, Kind.B if kind is Kind.I else kind)
        counts[key] = counts.get(key, 0) + 1
        return chunk, kind, counts[key] - 1

    pending: list[Part] = []

    def input_grad(chunk: int) -> Part:
        grad = part(chunk, Kind.I)
        pending.append(grad)
        return grad

    def weight_grad() -> Part:
        chunk, _, count = pending.pop(0)
        return chunk, Kind.W, count

    # Step 1: nF0
    for _ in range(2 * below):
        yield (part(0, Kind.F),)
    # Step 2: nF0F1
    for _ in range(rank + 1):
        yield (part(0, Kind.F),)
        yield (part(1, Kind.F),)
    # Step 3: nI1W1F1
    for _ in range(below):
        yield (input_grad(1),)
        yield (weight_grad(),)
        yield (part(1, Kind.F),)
    # Step 4, the steady state: nF0B1F1B0, each forward overlapped with a backward
    for i in range(num_microbatches - 2 * num_ranks + rank + 1):
        if i == 0 and below == 0:
            # The last rank of the V hands chunk 0's output to its own chunk 1: nothing to overlap yet.
            yield (part(0, Kind.F),)
            yield (part(1, Kind.B),)
        else:
            yield (part(0, Kind.F), part(1, Kind.B))
        yield (part(1, Kind.F), part(0, Kind.B))
    # Step 5: nB1F1B0
    for _ in range(below):
        yield (part(1, Kind.B),)
        yield (part(1, Kind.F), part(0, Kind.B))
    # Step 6: nB1B0, the second half with weight gradients put off
    grads = [chunk for _ in range(rank + 1) for chunk in (1, 0)]
    for i, chunk in enumerate(grads):
        yield (input_grad(chunk) if i > rank else part(chunk, Kind.B),)
    # Step 7: nW0I0
    for _ in range(below):
        yield (weight_grad(),)
        yield (input_grad(0),)
    # Step 8: nW
    for _ in range(rank + 1):
        yield (weight_grad(),)
