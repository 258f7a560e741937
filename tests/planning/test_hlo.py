import numpy as np
import pytest

from gpt1_jax.planning.hlo import parse_program, replica_groups, shapes, type_bytes

LOOP = """HloModule step, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias), {1}: (2, {}, must-alias) }

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%condition (p.1: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  %p.1 = (s32[]{:T(128)}, f32[8]{0:T(256)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT, metadata={op_name="while/cond/lt"}
}

%body (p.2: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p.2 = (s32[]{:T(128)}, f32[8]{0:T(256)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  %copied = s32[]{:T(128)S(6)} copy(%i.2)
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%copied, %two)
  %x = f32[8]{0:T(256)} get-tuple-element(%p.2), index=1
  %reduced = f32[8]{0:T(256)} all-reduce(%x), channel_id=7, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %t = (s32[]{:T(128)}, /*index=1*/f32[8]{0:T(256)}) tuple(%next, %reduced)
}

ENTRY %main (x.1: f32[8]) -> f32[8] {
  %x.1 = f32[8]{0:T(256)} parameter(0)
  %begin = s32[]{:T(128)} constant(3)
  %start = s32[]{:T(128)} copy(%begin)
  %tuple = (s32[]{:T(128)}, f32[8]{0:T(256)}) tuple(%start, %x.1)
  %loop = (s32[]{:T(128)}, f32[8]{0:T(256)}) while(%tuple), condition=%condition, body=%body
  %kernel = f32[8]{0:T(256)} custom-call(%x.1), custom_call_target="tpu_custom_call", frontend_attributes={metadata={
"blocks":"{\\"q\\": 128}"
}}, backend_config={"custom_call_config":{"cost_estimate":{"flops":7}}}
  ROOT %out = f32[8]{0:T(256)} get-tuple-element(%loop), index=1
}
"""


def test_a_program_is_read_as_it_is_written():
    program = parse_program(LOOP)
    assert program.entry.name == "main"
    assert program.aliases == 2
    assert [i.opcode for i in program.entry.instructions][:5] == ["parameter", "constant", "copy", "tuple", "while"]
    reduced = program.computations["body"].by_name["reduced"]
    assert (reduced.operands, reduced.attribute("channel_id"), reduced.bytes) == (("x",), "7", 32)
    kernel = program.entry.by_name["kernel"]  # over three lines
    assert kernel.attribute("custom_call_target") == "tpu_custom_call"
    assert '"flops":7' in kernel.attributes
    assert program.entry.root.name == "out"


def test_trips_are_read_from_the_counter_of_the_loop():
    program = parse_program(LOOP)
    assert program.trips(program.entry.by_name["loop"], program.entry) == 5  # 3, 5, 7, 9, 11


@pytest.mark.parametrize(
    ("old", "new", "trips"),
    [
        ("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"9"}}', 9),
        ("direction=LT", "direction=NE", None),
        ("constant(12)", "parameter(1)", None),
        ("constant(3)", "parameter(1)", None),
        ("add(%copied, %two)", "multiply(%copied, %two)", None),
        ("constant(12)", "constant(0)", 0),
    ],
)
def test_trips_are_not_guessed(old, new, trips):
    assert old in LOOP
    program = parse_program(LOOP.replace(old, new))
    assert program.trips(program.entry.by_name["loop"], program.entry) == trips


def test_what_is_not_a_program_is_refused():
    with pytest.raises(ValueError, match="no entry"):
        parse_program("nothing")
    with pytest.raises(ValueError, match="known form"):
        parse_program(LOOP.replace("copy(%begin)", "Copy(%begin)"))


def test_bytes_of_types():
    assert type_bytes("f32[4,512]{1,0:T(8,128)}") == 8192
    assert type_bytes("(bf16[3]{0}, pred[5]{0}, token[], /*index=3*/u32[])") == 6 + 5 + 4
    assert type_bytes("s4[16]") == 8
    assert shapes("f8e4m3fn[2,2]{1,0}") == [(8, (2, 2))]


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("{}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=8] {'a'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ],
)
def test_replica_groups(text, groups):
    attributes = f", channel_id=1, replica_groups={text}, use_global_device_ids=true"
    np.testing.assert_array_equal(replica_groups(attributes, 8), groups)
    np.testing.assert_array_equal(replica_groups(f", replica_groups={text}", 8), groups)


def test_unknown_replica_groups_are_refused():
    with pytest.raises(ValueError, match="unknown form"):
        replica_groups(", replica_groups=new<form>, channel_id=1", 8)
