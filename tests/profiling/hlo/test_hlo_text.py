"""The reader of HLO text, on lines as XLA prints them for CPUs and GPUs, and on a program compiled here."""

import contextlib
import gzip
import random

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe.planning.chips import chip
from profiling.hlo.hiding import overlap
from profiling.hlo.lines import find_text
from profiling.hlo.text import Array, arrays, parse, read, split

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


WRAPPED = """HloModule wrapped, is_scheduled=true,
  entry_computation_layout={(f32[4,4]{1,0},
  f32[4,4]{1,0})->f32[4,4]{1,0}}, num_partitions=4

FileNames
1 "a.py"

StackFrames
1 {file_location_id=1 parent_frame_id=1}

fused (p: f32[4,4],
    q: f32[4,4]) -> f32[4,4] {
  p = f32[4,4]{1,0:T(8,128)S(5)} parameter(0)
  q = f32[4,4]{1,0} parameter(1)
  ROOT dot = f32[4,4]{1,0} dot(
    f32[4,4]{1,0:T(8,128)S(5)} p, /*index=1*/
    f32[4,4]{1,0} q),
    lhs_contracting_dims={1}, // the columns
    rhs_contracting_dims={0},
    metadata={op_type="dot" op_name="jit(f)/a{b}/(c
      d" source_file="x /* y */ z.py"}
} // fused

ENTRY %main {
  %a = f32[4,4]{1,0} parameter(0)
  %b = f32[4,4]{1,0} parameter(1)
  %table = s32[2,2]{1,0} constant({
    { 1, 2 },
    { 3, 4 }
})
  %start = (f32[4,4]{1,0}, f32[4,4]{1,0}) collective-permute-start(%a),
    source_target_pairs={{0,1},
    {1,2}}
  %product = f32[4,4]{1,0} fusion(%a, %b), kind=kOutput,
    calls=fused
  %done = f32[4,4]{1,0} collective-permute-done(%start)
  ROOT %sum = f32[4,4]{1,0} add(%product,
    %done)
}
"""


def test_statements_that_span_lines():
    module = parse(WRAPPED)
    assert module.devices == 4 and list(module.computations) == ["fused", "main"]
    dot, entry = module["fused"]["dot"], module["main"]
    assert dot.operands == ("p", "q") and dot.attributes["rhs_contracting_dims"] == "{0}"
    assert dot.op_name.startswith("jit(f)/a{b}/(c") and "x /* y */ z.py" in dot.attributes["metadata"]
    assert entry["start"].pairs == ((0, 1), (1, 2)) and entry["product"].called == ("fused",)
    assert entry["table"].literal.split() == ["{", "{", "1,", "2", "},", "{", "3,", "4", "}", "}"]
    assert entry.root.operands == ("product", "done") and len(entry.instructions) == 7


def test_a_text_that_is_indented_as_in_a_test_of_xlas():
    indented = "\n".join(f"    {line}" if line else "" for line in SMALL.split("\n"))
    assert list(parse(f"\n{indented}").computations) == list(parse(SMALL).computations)


def test_reductions_may_be_left_out():
    """Excerpts of programs do so, and no figure needs them."""
    module = parse(SMALL.replace("to_apply=%add", "to_apply=%elsewhere"))
    assert module.called(module["main.1_spmd"]["start"]) == ()


def test_a_tuple_of_hundreds_of_elements():
    kinds = ", ".join(("/*index=5*/" if i % 5 == 0 and i else "") + "f32[2]{0}" for i in range(400))
    names = ", ".join(("/*index=5*/" if i % 5 == 0 and i else "") + "%p" for i in range(400))
    text = f"HloModule m\nENTRY e {{\n  %p = f32[2]{{0}} parameter(0)\n  ROOT %t = ({kinds}) tuple({names})\n}}"
    assert len(parse(text)["e"].root.arrays) == len(parse(text)["e"].root.operands) == 400


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"module @jit_f attributes {mhlo.num = 1 : i32} {", r"MLIR text, StableHLO .*compiled\.as_text\(\)"),
        (b"#loc = loc(unknown)\nmodule @jit_f {", "MLIR text"),
        (b"\x0a\x05jit_f\x12\x04main\x00\x01\x02" * 9, r"binary data; if it is a dump such as \*\.hlo\.pb"),
        (b'{"traceEvents": []}', "traces are for `python -m profiling report`"),
        (b"<html><body>", "a page of HTML; give what compiled"),
        (b"", "but empty"),
        (b"hello", "but plain text"),
        ((SMALL + SMALL).encode(), "2 HLO modules in one text"),
        (SMALL.replace("%done = ", "%kernel = ").encode(), "two instructions of one name|not there before"),
        (SMALL.replace("body=%body", "body=%bodi").encode(), "needs 'bodi', which is not there"),
        (SMALL.replace("num_partitions=8", "num_partitions=eight").encode(), "'eight' .*no number of devices"),
        (gzip.compress(SMALL.encode(), mtime=0)[:90], "damaged or cut short"),
    ],
    ids=lambda value: value if isinstance(value, str) else "text",
)  # fmt: skip
def test_files_that_are_no_module_are_named_and_told_what_they_are(tmp_path, content, message):
    file = tmp_path / "program.hlo"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read(file)
    assert str(file) in str(caught.value)


def test_of_a_folder_of_dumps_the_largest_compiled_program_is_read(tmp_path):
    with pytest.raises(ValueError, match=r"has no \*after_optimizations\.txt: dump .*--xla_dump_to"):
        read(tmp_path)
    (tmp_path / "module_0001.jit_f.sm_9.0_gpu_after_optimizations.txt").write_text(SMALL)
    (tmp_path / "module_0002.jit_g.cpu_after_optimizations.txt").write_text(WRAPPED[WRAPPED.index("ENTRY") :])
    (tmp_path / "module_0001.jit_f.before_optimizations.txt").write_text(SMALL * 2)
    (tmp_path / "module_0001.jit_f.gpu_after_optimizations-buffer-assignment.txt").write_text(SMALL * 2)
    assert read(tmp_path) == parse(SMALL)
    file, why = find_text(tmp_path)
    assert file.name == "module_0001.jit_f.sm_9.0_gpu_after_optimizations.txt" and "largest of 2" in why
    with pytest.raises(ValueError, match="no such file"):
        read(tmp_path / "nothing")


def test_an_unclosed_quote_ends_soon():
    """Its pattern must not try every way to divide what follows."""
    with pytest.raises(ValueError, match="closes"):
        parse(SMALL.replace('op_name="x"', 'op_name="x') + "z" * 100_000)


def damaged(text, rng):
    for _ in range(rng.choice((1, 1, 3))):
        at = rng.randrange(len(text))
        kind = rng.randrange(5)
        if kind == 0:
            text = text[:at] + rng.choice('(){}[],"=% \n0x') + text[at + 1 :]
        elif kind == 1:
            text = text[:at] + text[at + rng.randrange(1, 30) :]
        elif kind == 2:
            text = text[:at] + text[at : at + rng.randrange(1, 80)] + text[at:]
        elif kind == 3:
            lines = text.split("\n")
            rng.shuffle(lines) if rng.random() < 0.1 else lines.pop(rng.randrange(len(lines)))
            text = "\n".join(lines)
        else:
            text = text[: max(at, 30)]
    return text


def test_damaged_programs_end_in_figures_or_in_a_sentence(tmp_path):
    rng = random.Random(18)
    file = tmp_path / "program.hlo"
    ends = {True: 0, False: 0}
    for i in range(200):
        file.write_text(damaged((SMALL, WRAPPED)[i % 2], rng))
        try:
            module = read(file)
        except ValueError as error:
            assert str(file) in str(error)
            ends[False] += 1
            continue
        with contextlib.suppress(ValueError):
            overlap(module, chip("H200")).table()
        ends[True] += 1
    assert min(ends.values()) > 10, ends
