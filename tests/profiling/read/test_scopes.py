"""From scope paths to places in a step, and the modules that a profile carries."""

import pytest

from profiling.read.scopes import Place, action_of, place
from profiling.read.wire import fields, integer, integers, messages, text
from profiling.read.xplane_modules import ModuleInstruction, read_modules


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("", Place("", None, None, None)),
        ("jit(step)/broadcast", Place("other", None, None, None)),
        ("jit(step)/shard_map/while/body/closed_call/F/read/dynamic_slice", Place("F", None, None, None)),
        ("jit(f)/while/body/branch_7/B/transpose(jvp(layer_0))/mlp/add_any", Place("mlp(B)", 0, None, 7)),
        ("jit(f)/cond/branch_1_fun/F/layer_2/attention/dot", Place("attn(F)", 2, None, None)),
        ("jit(f)/F/layer_1/microbatch_1/dispatch/all_to_all", Place("dispatch(F)", 1, 1, None)),
        ("jit(f)/I/transpose(jvp(layer_3))/combine/all_to_all", Place("combine(I)", 3, None, None)),
        ("jit(f)/W/transpose(jvp(layer_3))/mlp/shared_expert/dot", Place("mlp(W)", 3, None, None)),
        ("jit(f)/jvp(block_4)/attention/mul", Place("attn(F)", 4, None, None)),
        ("jit(f)/transpose(jvp(layers_5))/mul", Place("B", 5, None, None)),
        ("jit(f)/checkpoint/transpose(jvp(jit(silu)))/mul", Place("B", None, None, None)),
        ("jit(F)/mul", Place("other", None, None, None)),  # a function of the user's that happens to be called F
        (
            "jit(f)/branch_9/W/(transpose(jvp(layer_0))/mlp/dot:transpose(jvp(layer_1))/mlp/dot)",
            Place("mlp(W)", 0, None, 9),
        ),
        ("jit(f)/mlp/mul", Place("mlp", None, None, None)),
        ("jit(f)/send/ppermute", Place("send", None, None, None)),
    ],
)
def test_place(scope, expected):
    assert place(scope) == expected


def test_parts_are_the_users_to_name():
    assert place("jit(f)/F/mixer/dot", {"mixer": "ssm"}).phase == "ssm(F)"


def test_action_of_a_phase():
    assert [action_of(phase) for phase in ("attn(F)", "attn_0(W)", "F", "other", "")] == ["F", "W", "F", "other", ""]


def varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def test_wire_format():
    data = field(1, 300) + field(2, "name") + field(3, varint(7) + varint(8)) + field(3, 9) + field(2, "last")
    assert integer(data, 1) == 300 and integer(data, 9) == 0
    assert text(data, 2) == "last" and text(data, 9) == ""
    assert integers(data, 3) == [7, 8, 9]
    assert len(messages(data, 2)) == 2


@pytest.mark.parametrize("data", [field(2, "name")[:-1], bytes([0x80]), bytes([0x0F, 1])])
def test_broken_messages_are_refused(data):
    with pytest.raises(ValueError, match=r"cut off|no protocol buffer"):
        list(fields(data))


def hlo_instruction(name, opcode, op_name="", called=()):
    metadata = field(7, field(2, op_name)) if op_name else b""
    return field(2, field(1, name) + field(2, opcode) + metadata + b"".join(field(38, c) for c in called))


def test_instructions_without_a_scope_take_that_of_what_they_fuse_or_of_their_computation():
    fused = field(3, field(5, 1) + hlo_instruction("inner", "add", "jit(f)/F/mlp/add"))
    entry = field(
        3,
        field(5, 2)
        + hlo_instruction("params.w", "parameter", "params['w']")
        + hlo_instruction("fusion.1", "fusion", "", [1])
        + hlo_instruction("dot.1", "dot", "jit(f)/F/attention/dot")
        + hlo_instruction("copy.1", "copy"),
    )
    program = field(2, "jit_f(7)") + field(5, field(1, 4) + field(6, field(1, fused + entry)))
    stat = field(5, field(1, 4) + field(2, field(1, 4) + field(2, "Hlo Proto")))
    plane = field(2, "/host:metadata") + stat + field(4, field(1, 1) + field(2, program))
    found = read_modules(field(1, plane))["jit_f(7)"]
    assert found["fusion.1"] == ModuleInstruction("fusion", "jit(f)/F/mlp/add")
    assert found["dot.1"].scope == "jit(f)/F/attention/dot"
    assert found["copy.1"] == ModuleInstruction("copy", "jit(f)/F")


def test_a_profile_without_modules():
    assert read_modules(field(1, field(2, "/host:CPU"))) == {}
