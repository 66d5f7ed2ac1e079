"""What a schedule hides: small programs with answers by hand, and programs that XLA scheduled for eight GPUs."""

import pytest

from jaxpipe.planning.chips import Achieved, Chip, chip
from profiling.__main__ import main
from profiling.hlo.hiding import overlap
from profiling.hlo.text import parse

# 1000 bytes take 1 us between devices, a product of two 100 x 100 matrices takes 2 us.
CHIP = Chip("toy", bf16=1e12, fp8=1e12, tf32=1e12, f32=1e12, hbm=1e12, interconnect=1e9, internode=1e9, latency_us=0.0,
            sms=1, memory=1e9)  # fmt: skip
BEST = Achieved(1.0, 1.0, 1.0, 1.0, kernel_us=0.0)
DOT = "dot(w, w), lhs_contracting_dims={1}, rhs_contracting_dims={0}"


def program(lines, computations=""):
    """A scheduled module of two devices: `p` takes 2 us in an all-to-all, 4 us in a permute; `w` is for products."""
    given = ["p = f32[1000] parameter(0)", "w = f32[100,100] parameter(1)"]
    text = "\n".join(f"  {line.strip().replace('DOT', DOT)}" for line in [*given, *lines.strip().splitlines()])
    return f"HloModule m, is_scheduled=true, num_partitions=2\n{computations}\nENTRY e {{\n{text}\n}}\n"


def found(lines, computations="", **options):
    return overlap(program(lines, computations), CHIP, achieved=BEST, **options)


def one_of(result):
    (one,) = (*result.collectives, *result.synchronous)
    return one


def start(name, source="p"):
    return f"{name} = ((f32[1000]), f32[1000]) all-to-all-start({source}), replica_groups={{{{0,1}}}}"


def done(name, of):
    return f"{name} = f32[1000] all-to-all-done({of})"


@pytest.mark.parametrize(
    ("between", "numbers", "hidden", "verdict"),
    [(1, 1000, 2.0, "hidden"), (1, 2500, 2.0, "partial"), (0, 1000, 0.0, "exposed"), (2, 1000, 2.0, "hidden"),
     (1, 10000, 2.0, "exposed")],
)  # fmt: skip
def test_hidden_partial_exposed(between, numbers, hidden, verdict):
    """An all-to-all of two microseconds for each thousand numbers, beside products of 2 us."""
    dots = "\n".join(f'd{i} = f32[100,100] DOT, metadata={{op_name="jit(f)/F/d{i}"}}' for i in range(between))
    result = found(f"""
        q = f32[{numbers}] parameter(2)
        a = ((f32[{numbers}]), f32[{numbers}]) all-to-all-start(q), metadata={{op_name="jit(f)/x/all_to_all"}}
        {dots}
        b = f32[{numbers}] all-to-all-done(a)""")
    one = one_of(result)
    us = numbers * 2 / 1000
    assert (one.us, one.bytes, one.devices, one.kind) == (us, us * 1000, 2, "all-to-all")
    assert one.hidden_us == min(us, hidden) and one.verdict == verdict
    assert (one.between_us, one.between_flops) == (between * 2.0, between * 2e6)
    assert one.products == tuple(f"jit(f)/F/d{i}" for i in range(between))
    assert one.label == "jit(f)/x/all_to_all" and one.is_asynchronous
    assert result.us == max(us, between * 2.0) and result.compute_us == between * 2.0
    assert result.hidden_share("all-to-all") == pytest.approx(one.hidden_us / us)
    assert result.hidden_share("all-reduce") is None


def test_synchronous_ones_are_exposed():
    result = found("""
        a = f32[1000] all-to-all(p)
        d = f32[100,100] DOT
        b = f32[1000] collective-permute(a), source_target_pairs={{0,1}}""")
    assert result.collectives == ()
    assert [(one.us, one.hidden_us, one.verdict) for one in result.synchronous] == [
        (2.0, 0.0, "exposed"), (4.0, 0.0, "exposed")
    ]  # fmt: skip
    assert result.us == 8.0 and result.exposed_us() == 6.0 and result.exposed_us("collective-permute") == 4.0


def test_start_and_done_that_the_compiler_runs_at_once_are_synchronous():
    config = 'backend_config={"collective_backend_config":{"is_sync":true}}'
    result = found(f"""
        {start("a")}, {config}
        d = f32[100,100] DOT
        {done("b", "a")}""")
    assert result.collectives == () and one_of(result).verdict == "exposed"
    assert result.us == 4.0


def test_collectives_of_a_lane_queue():
    """The second waits 2 us for the first, which the product hides; nothing is left to hide the second."""
    lines = f"""
        {start("a")}
        c = (f32[1000], f32[1000]) collective-permute-start(p), source_target_pairs={{{{0,1}}}}
        d = f32[100,100] DOT
        {done("b", "a")}
        e = f32[1000] collective-permute-done(c)"""
    queued = found(lines)
    assert [one.hidden_us for one in queued.collectives] == [2.0, 0.0]
    assert queued.us == 2 + 4
    beside = found(lines, lanes=[("permute", "copies")])
    assert [one.hidden_us for one in beside.collectives] == [2.0, 2.0]
    assert beside.us == 4


def test_done_in_another_order():
    """The later one is waited for first: the time that the first takes is not hidden by waiting."""
    result = found(f"""
        {start("a")}
        {start("c")}
        {done("d", "c")}
        {done("b", "a")}""")
    assert [one.hidden_us for one in result.collectives] == [0.0, 0.0] and result.us == 4


def test_what_could_hide_it():
    """`before` is needed, `after` needs it, `beside` does neither; an element of a tuple needs not the others."""
    result = found("""
        before = f32[100,100] DOT
        flat = f32[10000] bitcast(before)
        pair = (f32[10000], f32[100,100]) tuple(flat, w)
        first = f32[10000] get-tuple-element(pair), index=0
        v = f32[100,100] get-tuple-element(pair), index=1
        x = f32[10000] all-to-all(first)
        square = f32[100,100] bitcast(x)
        after = f32[100,100] dot(square, w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
        beside = f32[100,100] dot(v, v), lhs_contracting_dims={1}, rhs_contracting_dims={0}
        last = f32[100,100] all-reduce(after), replica_groups={{0,1}}
        first_of_all = f32[1000] all-to-all(p)""")
    places = {one.name: (one.place, one.could_hide_us) for one in result.synchronous}
    assert places == {"x": ("inner", 2.0), "last": ("last", 2.0), "first_of_all": ("alone", 6.0)}
    result = found("""
        x = f32[1000] all-to-all(p)
        y = f32[10,100] bitcast(x)
        d = f32[10,100] dot(y, w), lhs_contracting_dims={1}, rhs_contracting_dims={0}""")
    assert (one_of(result).place, one_of(result).could_hide_us) == ("first", 0.0)


LOOP = f"""
body {{
  p = f32[1000] parameter(0)
  w = f32[100,100] parameter(1)
  {start("a")}
  d = f32[100,100] {DOT}
  {done("b", "a")}
  c = f32[1000] all-to-all(b)
  t = f32[1000] bitcast(c)
}}
condition {{
  q = f32[1000] parameter(0)
  yes = pred[] constant(true)
}}
"""


def test_loops_count_as_often_as_they_run():
    known = 'while(p), condition=condition, body=body, backend_config={"known_trip_count":{"n":"5"}}'
    result = found(f"loop = f32[1000] {known}", LOOP)
    assert [(one.computation, one.count) for one in (*result.collectives, *result.synchronous)] == [("body", 5)] * 2
    assert result.us == 5 * 4 and result.compute_us == 5 * 2 and result.notes == ()
    assert result.communication_us("all-to-all") == 20 and result.hidden_share() == 0.5
    assert [event.start for event in result.events if event.name == "c"] == [2.0, 6.0, 10.0, 14.0, 18.0]
    unknown = found(f"loop = f32[1000] {known.partition(', backend')[0]}", LOOP)
    assert unknown.us == 4
    assert unknown.notes == ("loops that may run any number of times count as running once: loop",)


@pytest.mark.parametrize(("trips", "us", "drawn"), [(3, 12.0, 3), (0.5, 2.0, 0), (0, 0.0, 0)])
@pytest.mark.parametrize("pattern", ["^loop$", "F/square"])
def test_loops_of_which_the_user_knows_how_often_they_run(trips, us, drawn, pattern):
    """By the loop's name, or by what is in it."""
    labelled = LOOP.replace("rhs_contracting_dims={0}", 'rhs_contracting_dims={0}, metadata={op_name="F/square"}')
    result = found("loop = f32[1000] while(p), condition=condition, body=body", labelled, trips=[(pattern, trips)])
    assert (result.us, result.compute_us, result.notes) == (us, us / 2, ())
    assert [one.count for one in (*result.collectives, *result.synchronous)] == [trips, trips]
    assert sum(event.name == "d" for event in result.events) == drawn


def test_a_branch_within_a_loop():
    result = found(
        'loop = f32[1000] while(p), condition=condition, body=outer, backend_config={"known_trip_count":{"n":"3"}}',
        f"""{LOOP}
outer {{
  p = f32[1000] parameter(0)
  c = f32[1000] conditional(p, p, p), branch_computations={{body, condition}}
}}""",
    )
    assert result.us == 3 * 4 and [event.start for event in result.events if event.name == "d"] == [0.0, 4.0, 8.0]


def test_a_loop_hides_what_runs_beside_it():
    known = 'while(w), condition=condition, body=body, backend_config={"known_trip_count":{"n":"5"}}'
    result = found(
        f"""
        {start("a")}
        loop = f32[1000] {known}
        {done("b", "a")}""",
        LOOP,
    )
    outer = next(one for one in result.collectives if one.computation == "e")
    assert outer.between_us == 10.0 and outer.between_flops == 5 * 2e6
    # It holds the lane for 2 us, so the loop's own all-to-alls come later: 2 us of the first product hide it.
    assert outer.hidden_us == 2.0


def test_branches_are_separate_and_the_longest_counts():
    result = found(
        "c = f32[1000] conditional(p, p, p), branch_computations={long, short}",
        f"""
long {{
  p = f32[1000] parameter(0)
  w = f32[100,100] parameter(1)
  {start("a")}
  d = f32[100,100] {DOT}
  {done("b", "a")}
}}
short {{
  p = f32[1000] parameter(0)
  a = f32[250] all-to-all(p)
}}""",
    )
    assert [one.computation for one in (*result.collectives, *result.synchronous)] == ["long", "short"]
    assert result.us == 2 and [event.name for event in result.events] == ["a", "d"]
    assert result.hidden_share() == 0.5
    assert result.notes == ("of conditionals the branch that takes longest counts: c",)
    assert result.select(computation="long").hidden_share() == 1.0
    assert result.select(kind="all-reduce").collectives == ()


def test_command_buffers_are_looked_into():
    result = found(
        "c = f32[1000] call(p, w), to_apply=command_buffer",
        f"""
command_buffer {{
  p = f32[1000] parameter(0)
  w = f32[100,100] parameter(1)
  {start("a")}
  d = f32[100,100] {DOT}
  {done("b", "a")}
}}""",
    )
    assert one_of(result).verdict == "hidden" and one_of(result).computation == "command_buffer" and result.us == 2


def test_generic_asynchronous_wrappers():
    result = found(
        """
        a = ((f32[1000]), f32[500], u32[]) async-start(p), calls=wrapped
        u = ((f32[1000]), f32[500], u32[]) async-update(a)
        d = f32[100,100] DOT
        b = f32[500] async-done(u)
        f = ((f32[100,100]), f32[100,100], u32[]) async-start(w), calls=computing
        g = f32[100,100] async-done(f)
        h = ((f32[100,100]), f32[100,100], u32[]) call-start(g), to_apply=computing
        i = f32[100,100] call-done(h)""",
        f"""
wrapped {{
  q = f32[1000] parameter(0)
  r = f32[500] reduce-scatter(q), replica_groups={{{{0,1}}}}
}}
computing {{
  w = f32[100,100] parameter(0)
  x = f32[100,100] {DOT}
}}""",
    )
    one = one_of(result)
    assert (one.kind, one.us, one.hidden_us, one.between_us) == ("reduce-scatter", 2.0, 2.0, 2.0)
    assert result.us == 6


def test_what_is_not_waited_for_runs_on():
    result = found(f"""
        {start("a")}
        d = f32[50,100] dot(w, w), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}""")
    assert one_of(result).hidden_us == 1.0 and one_of(result).between_us == 0


def test_measured_times_come_first():
    result = found(
        f"""
        {start("a")}, metadata={{op_name="jit(f)/dispatch/all_to_all"}}
        k = f32[100,100] custom-call(w), custom_call_target="mosaic_gpu_v2"
        {done("b", "a")}""",
        times=[("dispatch", 100.0), ("^k$", lambda instruction: 30.0 * len(instruction.operands))],
    )
    one = one_of(result)
    assert (one.us, one.hidden_us, one.products, result.notes) == (100.0, 30.0, (), ())
    guessed = found('k = f32[100,100] custom-call(w), custom_call_target="mosaic_gpu_v2"')
    assert guessed.notes == ("of mosaic_gpu_v2 kernels only the bytes are known, give their times: k",)


def test_only_scheduled_programs():
    text = program("a = f32[1000] all-to-all(p)")
    assert overlap(parse(text), CHIP).module == "m"
    with pytest.raises(ValueError, match="module 'm' is not scheduled, so the order of its text"):
        overlap(text.replace("is_scheduled=true", "is_scheduled=false"), CHIP)


def test_options_that_make_no_sense():
    with pytest.raises(ValueError, match="node_size=0: a node has at least one device"):
        found("a = f32[1000] all-to-all(p)", node_size=0)
    with pytest.raises(ValueError, match=r"trips=\('x', -1\): a loop does not run less than 0 times"):
        found("a = f32[1000] all-to-all(p)", trips=[("x", -1)])


def test_the_trace_says_the_same():
    result = found(f"""
        {start("a")}, metadata={{op_name="jit(f)/shard_map/dispatch/all_to_all"}}
        d = f32[50,100] dot(w, w), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
        {done("b", "a")}
        c = f32[1000] all-to-all(b)""")
    trace = result.trace()
    assert trace.source == "simulated" and trace.window == (0.0, result.us) and trace.devices == (0,)
    times = [(event.name, event.lane, event.group, event.start, event.end) for event in trace.events]
    assert times == [
        ("a", "communication", "transfer", 0.0, 2.0),
        ("d", "compute", "compute", 0.0, 1.0),
        ("c", "communication", "transfer", 2.0, 4.0),
    ]
    assert trace.events[0].scope == "jit(f)/shard_map/dispatch/all_to_all"
    collectives, kinds, links = result.tables()
    assert [row[:3] for row in collectives.rows] == [
        ("partial", "async", "all-to-all"),
        ("exposed", "sync", "all-to-all"),
    ]
    assert [row[-1] for row in collectives.rows] == ["dispatch/all_to_all", "c"]
    assert kinds.rows == (("all-to-all", 2, 4.0, 3.0, 0.25), ("all", 2, 4.0, 3.0, 0.25))
    source = "1 GB/s of toy by the chip given, 100% of it reached"
    assert links.rows == (("all-to-all", 2, "0, 1", "0", 0.0, 0.0, "within nodes", 1.0, source),)
    assert "Collectives of m on toy\n4 us from start to end, 1 us of them compute" in result.table()


def test_links_between_nodes_and_where_their_rates_come_from():
    """On nodes of two, an exchange of four devices keeps 1000 of 3000 bytes in the node; a permute's pair crosses."""
    lines = """
        a = f32[1000] all-to-all(p), replica_groups={{0,1,2,3}}
        b = f32[1000] collective-permute(a), source_target_pairs={{0,1},{1,2}}
        c = f32[1000] all-to-all(b), replica_groups={{0,1},{2,3}}"""
    one_node = found(lines)
    assert [(link.kind, link.nodes, link.decides) for link in one_node.links] == [
        ("all-to-all", (0,), "within nodes"),
        ("collective-permute", (0,), "within nodes"),
    ]
    result = found(lines, node_size=2, internode=0.5e9)
    assert [(link.kind, link.places, link.group, link.nodes, link.local, link.remote) for link in result.links] == [
        ("all-to-all", 1, (0, 1, 2, 3), (0, 1), 1000.0, 2000.0),
        ("collective-permute", 1, (1, 2), (0, 1), 0.0, 4000.0),
        ("all-to-all", 1, (0, 1), (0,), 2000.0, 0.0),
    ]
    given = "0.5 GB/s as given"
    assert [link.source for link in result.links] == [
        given, given, "1 GB/s of toy by the chip given, 100% of it reached"
    ]  # fmt: skip
    assert [one.us for one in result.synchronous] == [4.0, 8.0, 2.0]
    with pytest.raises(ValueError, match="-1 bytes/s between nodes: give a positive rate"):
        found(lines, internode=-1)


def test_the_chip_table_and_the_share_of_it_are_named():
    result = overlap(program("a = f32[1000] all-to-all(p), replica_groups={{0,1}}"), chip("H100"))
    assert [link.source for link in result.links] == ["450 GB/s of H100 by its data sheet, 80% of it reached"]


def test_the_command_line_takes_links_and_names_the_file(tmp_path, capsys):
    file = tmp_path / "program.hlo"
    file.write_text(program("a = f32[1000] all-to-all(p), replica_groups={{0,1}}"))
    assert main(["overlap", str(file), "--per-node", "1", "--internode", "40"]) == 0
    shown = capsys.readouterr().out
    assert "between nodes" in shown and "40 GB/s as given" in shown
    assert main(["overlap", str(file), "--per-node", "0"]) == 2
    assert f"{file}: node_size=0" in capsys.readouterr().err
    file.write_text(file.read_text().replace("is_scheduled=true", "is_scheduled=false"))
    assert main(["overlap", str(file)]) == 2
    assert f"{file}: module 'm' is not scheduled" in capsys.readouterr().err
    assert main(["overlap", str(tmp_path)]) == 2
    assert "after_optimizations.txt" in capsys.readouterr().err
