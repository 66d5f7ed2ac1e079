"""Which devices a collective joins, and what each sends; answers by hand."""

import pytest

from jaxpipe.planning.chips import Achieved, Chip
from profiling.hlo.collective import Exchange, exchange, groups, is_asynchronous
from profiling.hlo.text import Instruction, parse

TOY = Chip("toy", 1e12, 1e12, 1e12, 1e12, 1e12, interconnect=1e9, internode=1e8, latency_us=5.0, sms=1, memory=1e9)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("{}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['ep'=8] {'ep'}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("mesh['pp'=2,'ep'=4] {'ep'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['pp'=2,'ep'=4] {'pp'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("mesh['axis_0'=4]", ((0, 1, 2, 3),)),
        # Of an axis of eight, split 2 by 2 by 2, the middle part.
        ("mesh['a'=8] {'a':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['x'=2,'y'=2], device_ids=(0,2,1,3) {'y'}", ((0, 2), (1, 3))),
        ("mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'x'}", ((0, 1), (2, 3))),
    ],
)
def test_every_notation_of_groups(text, expected):
    module = parse(
        f"HloModule m\nENTRY e {{\n  p = f32[4] parameter(0)\n  a = f32[4] all-reduce(p), replica_groups={text}\n}}"
    )
    assert groups(module["e"].root, 8) == expected


def test_no_groups_are_one_of_all():
    assert groups(Instruction("a", "all-reduce", ()), 3) == ((0, 1, 2),)


def sent(line, node_size=8, devices=8):
    module = parse(f"""HloModule m, num_partitions={devices}
ENTRY e {{
  p = f32[1000] parameter(0)
  t = token[] parameter(1)
  {line}
}}""")
    return exchange(module, module["e"], module["e"].root, node_size)


@pytest.mark.parametrize(
    ("line", "local"),
    [
        ("a = f32[1000] all-to-all(p), replica_groups=[2,4]<=[8]", 3000),
        ("a = f32[4000] all-gather(p), replica_groups=[2,4]<=[8]", 12000),
        ("a = ((f32[1000]), f32[4000]) all-gather-start(p), replica_groups=[2,4]<=[8]", 12000),
        ("a = f32[250] reduce-scatter(p), replica_groups=[2,4]<=[8]", 3000),
        ("a = f32[1000] all-reduce(p), replica_groups=[2,4]<=[8]", 6000),
        ("a = f32[2000] all-reduce(p, p), replica_groups=[2,4]<=[8]", 12000),
        ("a = f32[1000] ragged-all-to-all(p, p, p), replica_groups=[2,4]<=[8]", 3000),
        ("a = f32[1000] collective-permute(p), source_target_pairs={{0,1},{1,0}}", 4000),
        ("a = f32[1000] collective-permute(p), source_target_pairs={{0,0},{1,1}}", 0),
        ("a = f32[1000] collective-broadcast(p), replica_groups={{0,1}}", 4000),
        ("a = (f32[1000], u32[], token[]) send(p, t)", 4000),
        ("a = (f32[1000], u32[], token[]) recv(t)", 4000),
    ],
)
def test_bytes_within_a_node(line, local):
    found = sent(line)
    assert (found.local, found.remote, found.bytes) == (local, 0, local)


@pytest.mark.parametrize(
    ("line", "local", "remote"),
    [
        # 8 devices on nodes of 4: an eighth stays, three eighths go to the node, a half leaves it.
        ("a = f32[1000] all-to-all(p)", 1500, 2000),
        # The other node's 4 parts of 4000 bytes come in once, a quarter through each device.
        ("a = f32[8000] all-gather(p)", 24000, 4000),
        ("a = f32[125] reduce-scatter(p)", 3000, 500),
        ("a = f32[1000] all-reduce(p)", 6000, 1000),
        ("a = f32[1000] collective-permute(p), source_target_pairs={{3,4}}", 0, 4000),
        ("a = f32[1000] collective-permute(p), source_target_pairs={{2,3}}", 4000, 0),
        ("a = f32[1000] collective-broadcast(p)", 0, 4000),
    ],
)
def test_bytes_between_nodes(line, local, remote):
    found = sent(line, node_size=4)
    assert (found.local, found.remote) == (local, remote)


def test_time_is_that_of_the_slower_network():
    achieved = Achieved(interconnect=0.5, internode=0.5)
    assert Exchange("all-to-all", 8, local=3000, remote=0).us(TOY, achieved) == pytest.approx(5 + 6)
    assert Exchange("all-to-all", 8, local=3000, remote=1000).us(TOY, achieved) == pytest.approx(5 + 20)
    assert Exchange("collective-permute", 2, 0, 0).us(TOY, achieved) == 0


def test_wrapped_collectives_are_found():
    module = parse("""HloModule m, num_partitions=2
scatter {
  q = f32[1000] parameter(0)
  r = f32[500] reduce-scatter(q), replica_groups={{0,1}}
}
two {
  q = f32[1000] parameter(0)
  f = f32[500] fusion(q), kind=kCustom, calls=scatter
  g = f32[2000] all-gather(q), replica_groups={{0,1}}
  t = (f32[500], f32[2000]) tuple(f, g)
}
ENTRY e {
  p = f32[1000] parameter(0)
  one = ((f32[1000]), f32[500], u32[]) async-start(p), calls=scatter
  both = ((f32[1000]), (f32[500], f32[2000]), u32[]) async-start(p), calls=two
  none = f32[1000] negate(p)
}""")
    entry = module["e"]
    assert exchange(module, entry, entry["one"], 8) == Exchange("reduce-scatter", 2, 2000, 0)
    assert exchange(module, entry, entry["both"], 8) == Exchange("reduce-scatter+all-gather", 2, 6000, 0)
    assert exchange(module, entry, entry["none"], 8) is None


def test_what_counts_as_asynchronous():
    config = '{"collective_backend_config":{"is_sync":true}}'
    assert is_asynchronous(Instruction("a", "all-to-all-start", ()))
    assert is_asynchronous(Instruction("a", "send", ()))
    assert not is_asynchronous(Instruction("a", "all-to-all", ()))
    assert not is_asynchronous(Instruction("a", "all-to-all-start", (), attributes={"backend_config": config}))
