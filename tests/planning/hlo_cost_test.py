"""Costs of optimised HLO, against figures worked out by hand from a TPU compiler's output."""

import pathlib

import pytest

from mert_jax.planning import hlo_cost, hlo_parser

STEP = (pathlib.Path(__file__).parents[1] / "hlo" / "step.txt").read_text()
# bytes that a trip of the loop writes: [16, 12, 374, 374] float32, in tiles of 8 x 128
SLICE = 16 * 12 * 376 * 384 * 4
WEIGHTS = 2 * 512 * 512 * 2


def run_of(text: str, name: str) -> tuple[hlo_parser.Instruction, int]:
    runs = hlo_parser.executed(hlo_parser.parse(text))
    return next((x, times) for x, times in runs if x.name == name)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        # in place: neither read nor rewritten
        ("bitcast_dynamic-update-slice_fusion.21", 2 * SLICE),
        ("fusion.945", WEIGHTS + 16 * 749 * 512 * 2),  # its other operand is in VMEM
        ("copy-start.160", WEIGHTS),  # into VMEM
        ("slice-start.145", 8 * 938 * 128 * 4),  # 120,000 samples in tiles of 128
        ("slice-done.145", 0),
        ("all-reduce.49", 2 * 1024 * 4),  # 768 in a tile of 1024, read and written
        ("custom-call.8", 0),
        ("while.147", 0),  # the traffic is that of its body
    ],
)
def test_traffic_is_that_of_arrays_in_hbm_with_their_tiles(name, size):
    instruction, times = run_of(STEP, name)
    assert times * hlo_cost.hbm_bytes(instruction) == size


def test_the_summary_counts_loop_bodies_as_often_as_they_run():
    costs = hlo_cost.summary(STEP, inside="/checkout/")
    assert costs["cycles"] == 2 * 395_787 + 100_000
    # of each output's two taps, one meets a sample and one a hole: 374 pairs for each tap
    assert costs["flops"] == 2 * 16 * (2 * 374) * 512 * 512
    traffic = 2 * SLICE + 2 * WEIGHTS + 16 * 749 * 512 * 2 + 8 * 938 * 128 * 4 + 2 * 1024 * 4
    assert costs["hbm_bytes"] == traffic
    assert costs["collectives"] == [
        dict(kind="all-reduce", bytes=768 * 4, group=8, times=1, fused=False)
    ]
    (loop,) = costs["loops"]
    assert loop["trips"] == 2
    first, second = costs["costliest_ops"]
    assert (first["op"], first["times"]) == ("bitcast_dynamic-update-slice_fusion.21", 2)
    assert first["share"] == pytest.approx(0.8878, abs=1e-4)
    # the caller's line in the checkout, not the library's
    assert second["source"] == "mert_jax/model.py:126"


START = "%copy.1093 = s32[]{:T(128)S(6)} copy(%constant.4547.clone)"
BODY = "body=%wide.region_19.45_spmd.sunk"


@pytest.mark.parametrize(
    ("changes", "trips"),
    [
        ({}, 2),
        ({"constant(2)": "constant(24)"}, 24),
        ({"constant(2)": "constant(24)", "constant(1)": "constant(5)"}, 5),  # 0, 5, ..., 20
        ({"constant(2)": "constant(24)", START: START.replace("copy(", "add(")}, None),
        ({BODY: BODY + ', backend_config={"known_trip_count":{"n":"7"}}'}, 7),
        ({"direction=LT": "direction=NE"}, None),
    ],
    ids=["unchanged", "24", "by fives", "unknown start", "written down", "another condition"],
)
def test_trip_counts(changes, trips):
    text = STEP
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    costs = hlo_cost.summary(text)
    assert costs["loops"][0]["trips"] == trips
    assert costs["cycles"] == (1 if trips is None else trips) * 395_787 + 100_000


def test_a_limit_that_the_loop_carries():
    limit = "  %limit = s32[] get-tuple-element(%wide.param.64), index=3\n"
    changes = {
        "6122, %constant.4521.clone.1)": "6122, %limit)",
        "  %get-tuple-element.6122 =": limit + "  %get-tuple-element.6122 =",
        "%custom-call.8, %scores)": "%custom-call.8, %scores, %five)",
        "  %tuple.917 =": "  %five = s32[] constant(5)\n  %tuple.917 =",
    }
    text = STEP
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    assert hlo_cost.summary(text)["loops"][0]["trips"] == 5


CONDITIONAL = """HloModule one

%few (p: f32[8]) -> f32[8] {
  ROOT %p = f32[8]{0} parameter(0)
}

%many (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  ROOT %sum = f32[8]{0} add(%q, %q), backend_config={"estimated_cycles":"70"}
}

ENTRY %main (i: s32[], a: f32[8]) -> f32[8] {
  %i = s32[] parameter(0)
  %a = f32[8]{0} parameter(1)
  ROOT %chosen = f32[8]{0} conditional(%i, %a, %a), BRANCHES
}
"""


@pytest.mark.parametrize(
    "branches",
    ["branch_computations={%few, %many}", "true_computation=%many, false_computation=%few"],
)
def test_the_costliest_branch_of_a_conditional_counts(branches):
    costs = hlo_cost.summary(CONDITIONAL.replace("BRANCHES", branches))
    assert costs["cycles"] == 70


def program(out, left, right, rest):
    return f"""HloModule one

ENTRY %main (a: {left}, b: {right}) -> {out} {{
  %a = {left} parameter(0)
  %b = {right} parameter(1)
  ROOT %product = {out} {rest}
}}
"""


def conv(window: str, rest: str) -> str:
    return f"convolution(%a, %b), window={{{window}}}, dim_labels={rest}"


@pytest.mark.parametrize(
    ("out", "left", "right", "rest", "flops"),
    [
        (
            "bf16[16,23999,512]{2,0,1}", "bf16[16,120000,1]{1,0,2}", "bf16[10,1,512]{2,1,0}",
            conv("size=10 stride=5", "b0f_0io->b0f"), 2 * 16 * 23999 * 10 * 512,
        ),
        (  # its gradient by the kernel: as much work
            "bf16[10,1,512]{2,1,0}", "bf16[16,120000,1]{1,0,2}", "bf16[16,23999,512]{2,0,1}",
            conv("size=23999 rhs_dilate=5", "f0b_i0o->0bf"), 2 * 16 * 23999 * 10 * 512,
        ),
        (  # scores of attention, whose batch and heads are the diagonal of a convolution
            "bf16[16,12,374,374]{2,3,1,0}",
            "bf16[16,374,12,64]{1,3,2,0}", "bf16[16,374,12,64]{1,3,2,0}",
            conv("size=16x12 stride=15x11 lhs_dilate=16x12", "0b1f_0o1i->01bf"),
            2 * 16 * 12 * 374 * 374 * 64,
        ),
        (  # positions at the edges see padding: 64 + 63 + ... and 63 + 62 + ... taps fewer
            "f32[2,374,32]{2,1,0}", "f32[2,374,32]{2,1,0}", "f32[128,8,32]{2,1,0}",
            conv("size=128 pad=64_63", "b0f_0io->b0f, feature_group_count=4"),
            2 * 2 * (374 * 128 - 64 * 65 // 2 - 63 * 64 // 2) * 8 * 32,
        ),
        (
            "f32[3,8,32]{2,1,0}", "f32[32,10,8]{2,1,0}", "f32[32,8,32]{2,1,0}",
            conv("size=8", "f0b_i0o->0bf, batch_group_count=4"), 2 * (8 // 4) * 3 * 8 * 32 * 32,
        ),
        (
            "f32[4,7]{1,0}", "f32[4,6]{1,0}", "f32[6,7]{1,0}",
            "convolution(%a, %b), dim_labels=bf_io->bf", 2 * 4 * 6 * 7,
        ),
        (
            "f32[4,5,7]{2,1,0}", "f32[4,5,6]{2,1,0}", "f32[4,6,7]{2,1,0}",
            "dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, "
            "rhs_contracting_dims={1}", 2 * 4 * 5 * 6 * 7,
        ),
    ],
    ids="forward kernel attention grouped batch_groups matrix dot".split(),
)  # fmt: skip
def test_flops_of_products(out, left, right, rest, flops):
    product, _ = run_of(program(out, left, right, rest), "product")
    assert hlo_cost.flops(product) == flops


@pytest.mark.parametrize(
    ("shape", "size", "padded", "in_hbm"),
    [
        ("f32[2,16,374,1]{2,1,3,0:T(8,128)}", 47_872, 2 * 16 * 384 * 4, True),
        ("pred[2,374,768]{2,1,0:T(8,128)(4,1)S(1)}", 2 * 374 * 768, 2 * 376 * 768, False),
        ("s32[]{:T(128)S(6)}", 4, 4, False),
        ("u4[3]{0}", 2, 2, True),
        ("token[]", 0, 0, False),
    ],
)  # fmt: skip
def test_shapes(shape, size, padded, in_hbm):
    text = f"HloModule one\n\nENTRY %main () -> {shape} {{\n  ROOT %x = {shape} custom-call()\n}}\n"
    (parsed,) = hlo_parser.parse(text).root.shapes
    assert (parsed.size, parsed.padded, parsed.in_hbm) == (size, padded, in_hbm)


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("mesh['data'=4,'fsdp'=2] {'fsdp'}", 2),
        ("mesh['data'=4,'fsdp'=2] {'data', 'fsdp'}", 8),
        ("[4,2]<=[8]", 2),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("{}", None),
    ],
)
def test_group_sizes(groups, size):
    assert hlo_cost.group_size(f", channel_id=1, replica_groups={groups}, dimensions={{0}}") == size


def test_a_collective_in_pieces_counts_once():
    piece = "f32[64,768]{1,0:T(8,128)}"
    array = "f32[512,768]{1,0:T(8,128)}"
    body = "\n".join(
        f"""%piece.{i} (p: {piece}, q: {array}) -> ({piece}, {array}) {{
  %p = {piece} parameter(0)
  %q = {array} parameter(1)
  %gathered = {array} all-gather(%p), channel_id=164, replica_groups=[1,8]<=[8], dimensions={{0}}
  ROOT %both = ({piece}, {array}) tuple(%p, %gathered)
}}
"""
        for i in range(2)
    )
    text = f"""HloModule pieces

{body}
ENTRY %main (a: {piece}, b: {array}) -> ({piece}, {array}) {{
  %a = {piece} parameter(0)
  %b = {array} parameter(1)
  %first = ({piece}, {array}) fusion(%a, %b), kind=kCustom, calls=%piece.0
  %x = {piece} get-tuple-element(%first), index=0
  %y = {array} get-tuple-element(%first), index=1
  ROOT %second = ({piece}, {array}) fusion(%x, %y), kind=kCustom, calls=%piece.1
}}
"""
    costs = hlo_cost.summary(text)
    size = 512 * 768 * 4
    assert costs["collectives"] == [
        dict(kind="all-gather", bytes=size, group=8, times=1, fused=True)
    ]
    assert costs["hbm_bytes"] == size


def test_a_text_that_is_not_hlo_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo_cost.summary("some other text")
