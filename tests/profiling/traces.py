"""Small traces that the writers' and the reports' tests share."""

from profiling.event import Event, Step, Trace


def layer_trace(title="measured", layers=2, slower=1.0, start=1000.0):
    """Two devices, each with a compute and a communication stream: per layer, a dispatch half under an MLP."""
    events = []
    for device in (0, 1):
        for layer in range(layers):
            t = start + layer * 100 * slower
            facts = {"layer": layer, "microbatch": 0}
            events += [
                Event(device, "stream 7", t, t + 40 * slower, "attention_kernel", kind="attention core",
                      group="compute", phase="attn(F)", scope=f"step/layer_{layer}/attn", **facts),
                Event(device, "stream 23", t + 40 * slower, t + 45 * slower, "notify_dispatch", kind="barrier",
                      group="wait", phase="dispatch(F)", blocks=20, **facts),
                Event(device, "stream 23", t + 45 * slower, t + 65 * slower, "dispatch", kind="dispatch kernel",
                      group="transfer", phase="dispatch(F)", blocks=20, hlo_op="all-to-all.1", **facts),
                Event(device, "stream 7", t + 55 * slower, t + 60 * slower, "shared", kind="dense GEMM",
                      group="compute", phase="shared(F)", **facts),
                Event(device, "stream 7", t + 65 * slower, t + (95 + device) * slower, "grouped_gemm",
                      kind="grouped GEMM", group="compute", phase="mlp(F)", blocks=112, **facts),
            ]  # fmt: skip
    return Trace(
        title, "kineto", tuple(sorted(events, key=lambda event: event.start)),
        steps=(Step("train", 7, start - 10, start + 100 * layers * slower),),
        ranks={0: 1, 1: 0}, metadata={"chip": "H800", "SMs": 132}, notes=("clocks are integer microseconds",),
    )  # fmt: skip


HOSTILE = '</script><script>document.title="broken"</script><img src=x onerror="document.title=1">&amp;\u2028 "\'`é'
"""A name that breaks pages and files that do not escape it."""


def tangled_trace():
    """One lane whose events are nested, overlap, touch, and take no time."""
    spans = [
        (0, 10, "outer"),
        (1, 4, "inner"),
        (2, 2, "instant"),
        (3, 12, "across"),
        (10, 11, "touching"),
        (10, 10, ""),
    ]
    events = tuple(Event(5, "lane", float(start), float(end), name or HOSTILE) for start, end, name in spans)
    return Trace(HOSTILE, "xplane", events, notes=(HOSTILE,))
