"""The reader of HLO text, on lines as XLA prints them for CPUs and GPUs, and on a program compiled here."""

import gzip

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import jaxpipe
from profiling.hlo_text import Array, arrays, parse, read, split

SMALL = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[4]{0}, /*index=1*/s32[])->f32[4]{0}}, \
num_partitions=8

FileNames
1 "a {file}.py"

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0), metadata={op_name="x"}
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  ROOT %p = (s32[], f32[4]{0}) parameter(0)
}

%condition (p.1: (s32[], f32[4])) -> pred[] {
  %p.1 = (s32[], f32[4]{0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}, execution_thread="main"

ENTRY %main.1_spmd (x: f32[4], n: s32[]) -> f32[4] {
  %x = f32[4]{0:T(128)S(1)} parameter(0), sharding={replicated}
  %n = s32[] parameter(1)
  %init = (s32[], f32[4]{0}) tuple(%n, /*index=1*/%x)
  %loop = (s32[], f32[4]{0}) while(%init), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %y = f32[4]{0} get-tuple-element(%loop), index=1
  %start = ((f32[4]{0}), f32[4]{0}) all-reduce-start(f32[4]{0} %y), replica_groups={{0,1},{2,3}}, to_apply=%add, \
control-predecessors={%loop, %n}, metadata={op_name="jit(f)/a \\"b\\" {c, (d/psum" stack_frame_id=3}, \
backend_config={"collective_backend_config":{"is_sync":true}}
  %done = f32[4]{0} all-reduce-done(%start)
  %kernel = f32[4]{0} custom-call(%done), custom_call_target="mosaic_gpu_v2", \
backend_config={module = "a\\22,{b", n = 3}
  ROOT %moved = f32[4]{0} collective-permute(%kernel), source_target_pairs={{0,1},{1,0}}
}
"""


def test_shapes():
    assert Array("pred", (3,)).bytes == 3
    assert Array("bf16", (2, 3)).bytes == 12
    assert Array("f8e4m3fn", (5,)).bytes == 5
    assert Array("s4", (5,)).bytes == 3
    assert Array("f64", ()).bytes == 8
    assert Array("c64", (2,)).bytes == 16
    assert Array("token", ()).bytes == 0
    entry = parse(SMALL)["main.1_spmd"]
    assert entry["x"].shape == Array("f32", (4,), "0:T(128)S(1)")
    assert entry["start"].shape == ((Array("f32", (4,), "0"),), Array("f32", (4,), "0"))
    assert [array.dtype for array in arrays(entry["loop"].shape)] == ["s32", "f32"]


def test_module_and_computations():
    module = parse(SMALL)
    assert (module.name, module.is_scheduled, module.devices, module.entry) == ("jit_f", True, 8, "main.1_spmd")
    assert list(module.computations) == ["add", "body", "condition", "main.1_spmd"]
    assert module["add"].root.name == "sum"
    entry = module["main.1_spmd"]
    assert [i.name for i in entry.instructions][:4] == ["x", "n", "init", "loop"]
    assert [user.name for user in entry.users["n"]] == ["init"]
    assert [operand.name for operand in entry.operands(entry["init"])] == ["n", "x"]


def test_instructions():
    module = parse(SMALL)
    entry = module["main.1_spmd"]
    loop, start = entry["loop"], entry["start"]
    assert loop.trip_count == 5 and start.trip_count is None
    assert sorted(loop.called) == ["body", "condition"] and start.called == ("add",)
    assert start.operands == ("y",)
    assert start.op_name == 'jit(f)/a \\"b\\" {c, (d/psum'
    assert start.control_predecessors == ("loop", "n")
    assert start.config["collective_backend_config"] == {"is_sync": True}
    assert start.attributes["replica_groups"] == "{{0,1},{2,3}}"
    assert entry["kernel"].target == "mosaic_gpu_v2" and entry["kernel"].config == {}
    assert entry["moved"].pairs == ((0, 1), (1, 0)) and entry["moved"].is_root
    assert entry["n"].literal == "1" and entry["n"].operands == () and entry["n"].op_name == ""
    assert module["condition"]["yes"].literal == "true"


def test_other_printers():
    """Names without percent signs, no program shapes, no ROOT, branches, bounded sizes, a send's pairs."""
    module = parse("""HloModule m, replica_count=2
one {
  p = f32[<=8,2] parameter(0)
}
ENTRY e {
  i = s32[] parameter(0)
  x = f32[<=8,2] parameter(1)
  t = token[] after-all()
  c = f32[<=8,2] conditional(i, x, x), branch_computations={one, one}
  s = (f32[<=8,2], u32[], token[]) send(c, t), frontend_attributes={_xla_send_recv_source_target_pairs={{0,1},{1,2}}}
}""")
    assert not module.is_scheduled and module.devices == 2
    assert module["one"].root.arrays[0].dims == (8, 2)
    assert module["e"]["c"].called == ("one", "one") and module["e"]["c"].operands == ("i", "x", "x")
    assert module["e"].root.pairs == ((0, 1), (1, 2))


def test_split_leaves_brackets_and_quotes_whole():
    assert split('a={1,2}, b="x,(y", c=mesh[\'p\'=2,\'q\'=4] {\'q\'}') == [
        "a={1,2}", ' b="x,(y"', " c=mesh['p'=2,'q'=4] {'q'}"
    ]  # fmt: skip
    assert split("") == [] and split(" ") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no HLO module in the text ''"),
        ("module @jit_f {}", "give what compiled.as_text"),
        ("HloModule m\n", "module 'm' has no ENTRY computation"),
        (SMALL[:-3], "computation 'main.1_spmd' has no end"),
        (SMALL.replace("add(%a, %b)", "add(%a, %b"), "no bracket closes"),
        (SMALL.replace("= f32[] add(", "= what add("), "is no instruction"),
        (SMALL.replace("(s32[], f32[4]{0}) tuple", "(s32[], ???) tuple"), "is no type"),
    ],
)
def test_damaged_texts(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_files(tmp_path):
    plain, packed = tmp_path / "a.hlo", tmp_path / "a.hlo.gz"
    plain.write_text(SMALL)
    packed.write_bytes(gzip.compress(SMALL.encode()))
    assert read(plain) == read(packed) == parse(SMALL)
    packed.write_bytes(packed.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"a\.hlo\.gz: "):
        read(packed)


def compiled_loop():
    """A scan with every collective, a conditional and products, on a mesh of 2 by 4."""
    mesh = jaxpipe.make_mesh(pp=2, ep=4)

    def step(x, w):
        with jax.named_scope("dispatch"):
            y = jax.lax.all_to_all(jnp.tanh(x @ w), "ep", 0, 0, tiled=True)
        y = jax.lax.ppermute(y, "pp", [(0, 1), (1, 0)])
        y = jax.lax.cond(y[0, 0] > 0, lambda y: jax.lax.psum(y @ w, "ep"), lambda y: y, y)
        return jax.lax.psum_scatter(jax.lax.all_gather(y, "ep", tiled=True), "ep", tiled=True), None

    mapped = jax.shard_map(
        lambda w, x: jax.lax.scan(step, x, w)[0],
        mesh=mesh,
        in_specs=(P(), P(("pp", "ep"))),
        out_specs=P(("pp", "ep")),
        check_vma=False,
    )
    shapes = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32), jax.ShapeDtypeStruct((512, 64), jnp.float32)
    return jax.jit(mapped).lower(*shapes).compile().as_text()


def test_what_this_jax_prints():
    if jax.device_count() < 8:
        pytest.skip(f"8 devices are needed, there are {jax.device_count()}")
    text = compiled_loop()
    module = parse(text)
    assert module.is_scheduled and module.devices == 8
    found = [i for computation in module.computations.values() for i in computation.instructions]
    assert len(found) == sum(" = " in line and line.startswith("  ") for line in text.splitlines())
    for computation in module.computations.values():
        assert sum(i.is_root for i in computation.instructions) == 1
        for instruction in computation.instructions:
            assert all(name in computation.index for name in instruction.operands), instruction
            assert all(name in module.computations for name in instruction.called), instruction
    assert any("dispatch" in i.op_name for i in found)
    if jax.default_backend() == "cpu":
        (loop,) = (i for i in found if i.opcode == "while")
        assert loop.trip_count == 5
