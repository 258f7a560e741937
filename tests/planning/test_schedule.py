"""Times by hand, of programs written by hand: on a v5e of 2 x 2 chips a microsecond is 1,500 cycles or 819,000 bytes
of memory, and a group of four sends 100,000 bytes in it over its two links.
"""

import pytest

from gpt1_jax.planning.hlo import parse_program
from gpt1_jax.planning.schedule import Collective, Cost, Device, step_cost
from gpt1_jax.planning.topologies import parse_slice

MICRO = 1e-6
CHIPS = [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)]
PEAK = 197e12


def cost(entry: str, others: str = "", slices: int = 1) -> Cost:
    text = f"HloModule m, is_scheduled=true\n{others}\nENTRY %main (x: f32[]) -> f32[] {{\n{entry}}}\n"
    slice_ = parse_slice("v5e:2x2", slices)
    return step_cost(parse_program(text), Device(slice_.chips, slice_, CHIPS, PEAK))


def fusion(name: str, micros: float, calls: str = "fused", operands: str = "%big") -> str:
    config = f'{{"window_config":{{"estimated_cycles":"{int(1500 * micros)}"}}}}'
    return f"  %{name} = f32[100]{{0}} fusion({operands}), kind=kLoop, calls=%{calls}, backend_config={config}\n"


FUSED = """
%fused (y: f32[100]) -> f32[100] {
  ROOT %y = f32[100]{0} parameter(0)
}
"""
BIG = "  %big = f32[100000]{0} parameter(0)\n"
GATHER = (
    "  %s = (f32[100000]{{0}}, f32[400000]{{0}}) all-gather-start(%big), channel_id=1, replica_groups=[1,4]<=[4]\n"
    "{between}"
    "  %d = f32[400000]{{0}} all-gather-done(%s)\n"
)  # 1.6 MB, three quarters of which go over the links: 12 microseconds


def test_cycles_add_up_and_loops_count_as_often_as_they_run():
    loop = (
        """
%condition (p.1: (s32[])) -> pred[] {
  %p.1 = (s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %limit = s32[] constant(10)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}
%body (p.2: (s32[])) -> (s32[]) {
  %p.2 = (s32[]) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.2), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i.2, %one)
  %big = f32[100000]{0} constant({...})
"""
        + fusion("in_loop", 2)
        + (
            "  %r = f32[100000]{0} all-reduce(%big), channel_id=3, replica_groups={{0,1,2,3}}, to_apply=%fused\n"
            "  ROOT %t = (s32[]) tuple(%next)\n}\n"
        )
    )
    entry = (
        BIG
        + fusion("before", 5)
        + (
            "  %zero = s32[] constant(0)\n  %tuple = (s32[]) tuple(%zero)\n"
            "  %loop = (s32[]) while(%tuple), condition=%condition, body=%body\n"
        )
    )
    found = cost(entry, FUSED + loop)
    assert found.compute == pytest.approx((5 + 10 * 2) * MICRO)
    # 400 kB, three quarters of them twice over the links, nothing beside it, ten times
    assert dict(found.waits) == pytest.approx({"links": 10 * 6 * MICRO})
    assert found.collectives == (Collective("all-reduce", "links", True, 10, 4_000_000, pytest.approx(60 * MICRO)),)
    assert found.seconds == pytest.approx(85 * MICRO, rel=1e-4)
    assert (found.costed, found.unknown) == (2, set())


def test_a_loop_whose_trips_are_not_shown_says_so():
    loop = """
%condition (p.1: (s32[])) -> pred[] {
  %p.1 = (s32[]) parameter(0)
  ROOT %less = pred[] custom-call(%p.1), custom_call_target="decide"
}
%body (p.2: (s32[])) -> (s32[]) {
  ROOT %p.2 = (s32[]) parameter(0)
}
"""
    entry = "  %t = (s32[]) parameter(0)\n  %loop.1 = (s32[]) while(%t), condition=%condition, body=%body\n"
    assert cost(entry, loop).unknown == {"all but one trip of the loop loop.1"}


@pytest.mark.parametrize(("beside", "waits"), [(0, 12), (5, 7), (20, 0)])
def test_what_goes_on_beside_arithmetic_is_waited_for_only_as_long_as_it_takes_longer(beside, waits):
    found = cost(BIG + GATHER.format(between=fusion("f", beside)), FUSED)
    assert found.waits.get("links", 0) == pytest.approx(waits * MICRO)
    assert found.seconds == pytest.approx((beside + waits) * MICRO)
    assert found.collectives == (Collective("all-gather", "links", False, 1, 1_600_000, pytest.approx(12 * MICRO)),)


def test_what_uses_the_same_links_goes_one_after_another_and_memory_goes_beside_it():
    second = "  %s2 = f32[100000]{0} all-reduce-start(%big), channel_id=2, replica_groups=[1,4]<=[4], to_apply=%fused\n"
    copies = "  %c = (f32[409500]{0}, f32[409500]{0}, u32[]) copy-start(%more)\n"  # 1.638 MB: 2 microseconds
    done = "  %d2 = f32[100000]{0} all-reduce-done(%s2)\n"
    entry = BIG + "  %more = f32[409500]{0} parameter(1)\n" + second + copies
    entry += GATHER.format(between=fusion("f", 1) + "  %dc = f32[409500]{0} copy-done(%c)\n") + done
    found = cost(entry, FUSED)
    assert found.waits["memory"] == pytest.approx(1 * MICRO)
    assert found.waits["links"] == pytest.approx((6 + 12 - 2) * MICRO)


def test_an_exchange_in_pieces_inside_fusions_is_one():
    piece = """
%{name} (y.{name}: f32[100000]) -> f32[400000] {{
  %y.{name} = f32[100000]{{0}} parameter(0)
  ROOT %g.{name} = f32[400000]{{0}} all-gather(%y.{name}), channel_id=9, replica_groups=mesh['a'=4] {{'a'}}
}}
"""
    entry = BIG + fusion("f.1", 2, "one") + fusion("f.2", 3) + fusion("f.3", 4, "two") + fusion("f.4", 5)
    found = cost(entry, FUSED + piece.format(name="one") + piece.format(name="two"))
    assert [(c.kind, c.count, c.bytes) for c in found.collectives] == [("all-gather", 1, 1_600_000)]
    assert found.waits["links"] == pytest.approx((12 - 2 - 3 - 4) * MICRO)
    assert found.compute == pytest.approx(14 * MICRO)


def test_an_all_reduce_of_which_each_chip_keeps_its_part_is_a_reduce_scatter():
    fused = """
%all-reduce-scatter.1 (y.1: f32[100000]) -> f32[25000] {
  %y.1 = f32[100000]{0} parameter(0)
  %r.1 = f32[100000]{0} all-reduce(%y.1), channel_id=4, replica_groups={{0,1,2,3}}, to_apply=%fused
  ROOT %part = f32[25000]{0} slice(%r.1), slice={[0:25000]}
}
"""
    entry = BIG + "  %f = f32[25000]{0} fusion(%big), kind=kCustom, calls=%all-reduce-scatter.1\n"
    found = cost(entry, FUSED + fused)
    assert found.collectives == (Collective("reduce-scatter", "links", False, 1, 400_000, pytest.approx(3 * MICRO)),)
    assert found.seconds == pytest.approx(3 * MICRO)


def test_slices_exchange_over_the_network_of_their_hosts():
    attributes = (
        'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
        '_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    entry = (
        BIG + "  %token = token[] after-all()\n"
        f"  %send.1 = (f32[100000]{{0}}, u32[], token[]) send(%big, %token), channel_id=1, {attributes}\n"
        f"  %recv.1 = (f32[100000]{{0}}, u32[], token[]) recv(%token), channel_id=2, {attributes}\n"
        "  %sent = token[] send-done(%send.1), channel_id=1\n"
        + fusion("f", 28)
        + "  %got = (f32[100000]{0}, token[]) recv-done(%recv.1), channel_id=2\n"
    )
    found = cost(entry, FUSED, slices=2)
    # 400 kB at 3.125 GB/s are 128 microseconds, the clock being at 28 when they are needed
    assert found.waits["slices"] == pytest.approx(100 * MICRO)
    assert found.collectives == (Collective("all-reduce", "slices", False, 1, 400_000, pytest.approx(128 * MICRO)),)


def test_what_the_compiler_gives_no_cost_is_estimated_from_bytes():
    entry = (
        "  %big = f32[204750]{0} parameter(0)\n  %small = f32[102375]{0} parameter(1)\n  %at = s32[] constant(0)\n"
        "  %g = f32[204750]{0} fusion(%big), kind=kCustom, calls=%fused\n"  # 819 kB read, 819 kB written
        "  %u = f32[204750]{0} dynamic-update-slice(%big, %small, %at)\n"  # half of it, in place
        '  %free = f32[204750]{0} custom-call(%big), custom_call_target="ConcatBitcast"\n'
    )
    found = cost(entry, FUSED)
    assert found.uncosted == pytest.approx(3 * MICRO)
    assert (found.compute, found.costed) == (0, 0)


KERNEL = '  %{name} = f32[204750]{{0}} custom-call({operands}), custom_call_target="tpu_custom_call"{rest}\n'


def test_a_kernel_takes_as_long_as_its_arithmetic_or_its_bytes():
    says = ', backend_config={"custom_call_config":{"cost_estimate":{"flops":591000000,"transcendentals":0}}}'
    arithmetic = KERNEL.format(name="k.1", operands="%big", rest=says)  # at 0.3 of the peak: 10 microseconds
    found = cost("  %big = f32[204750]{0} parameter(0)\n" + arithmetic)
    assert found.kernels == pytest.approx(10 * MICRO)
    found = cost("  %big = f32[204750]{0} parameter(0)\n" + arithmetic.replace("591000000", "5"))
    assert found.kernels == pytest.approx(2 * MICRO)
    assert not found.unknown
    found = cost("  %big = f32[204750]{0} parameter(0)\n" + KERNEL.format(name="k.1", operands="%big", rest=""))
    assert found.kernels == pytest.approx(2 * MICRO)
    assert found.unknown == {"the arithmetic of the kernel k"}


@pytest.mark.parametrize(
    ("name", "result", "products"),
    [
        ("fwd_residuals", "bf16[3,12,512,64]{3,2,1,0}", 2),
        ("dq_no_residuals", "bf16[3,12,512,64]{3,2,1,0}", 3),
        ("dkv_no_residuals", "bf16[3,12,1024,64]{3,2,1,0}", 4),
        ("dkv_no_residuals", "(bf16[3,2,12,512,64]{4,3,2,1,0}, bf16[3,12,1024,64]{3,2,1,0})", 5),  # dq in two parts
    ],
)
def test_an_attention_kernel_is_known_by_its_name(name, result, products):
    entry = (
        "  %mask = s8[1,2,2]{2,1,0} parameter(0)\n"
        "  %q = bf16[3,12,512,64]{3,2,1,0} parameter(1)\n  %k = bf16[3,12,1024,64]{3,2,1,0} parameter(2)\n"
    ) + KERNEL.format(name=f"splash_mha_{name}.1", operands="%mask, %mask, %q, %k", rest="")
    flops = products * 2 * 3 * 12 * 512 * 1024 * 64 * 3 / 4  # of 2 x 2 blocks one is masked
    assert cost(entry.replace("f32[204750]{0}", result)).kernels == pytest.approx(flops / (0.3 * PEAK))


def test_of_branches_the_longest_counts():
    branch = "%{name} (z.{name}: f32[100000]) -> f32[100] {{\n  %big = f32[100000]{{0}} parameter(0)\n{body}}}\n"
    others = branch.format(name="short", body=fusion("a", 1)) + branch.format(name="long", body=fusion("b", 3))
    entry = BIG + "  %c = f32[100]{0} conditional(%big, %big, %big), branch_computations={%short, %long}\n"
    assert cost(entry, FUSED + others).seconds == pytest.approx(3 * MICRO)


def test_devices_without_published_figures_have_exchanges_but_no_times():
    text = f"HloModule m\n{FUSED}\nENTRY %main (x: f32[]) -> f32[] {{\n{BIG}{GATHER.format(between='')}}}\n"
    found = step_cost(parse_program(text), Device(4))
    assert found.collectives == (Collective("all-gather", "links", False, 1, 1_600_000, None),)
    assert (found.seconds, found.costed) == (0, 0)
