"""Reading compiled programs: loops multiply, branches not taken count nothing, bytes and groups by hand."""

import pytest

from laep_jax.preflight import hlo

PROGRAM = """HloModule step

%body (x: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %x = (s32[], f32[8,4]{1,0:T(8,128)}) parameter(0)
  %gathered = bf16[1,8,16]{2,1,0:T(8,128)(2,1)} all-gather(%x), replica_groups={{0,2},{1,3}}, dimensions={1}
  %splash_mha_fwd.2 = bf16[8,16]{1,0} custom-call(%gathered), custom_call_target="tpu_custom_call", config={"a": {
}}, metadata={op_name="splash"}
  %choice = (f32[8]{0}, (bf16[2]{0}, u32[])) conditional(%p, %x, %x), branch_computations={%rarely, %usually}
  ROOT %next = (s32[], f32[8,4]) tuple(%i, %x)
}

%condition (x: (s32[], f32[8,4])) -> pred[] {
  %x = (s32[], f32[8,4]) parameter(0)
  %limit = s32[]{:T(128)} constant(12)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%rarely (x: f32[8]) -> f32[8] {
  %moved.1 = bf16[64,2]{1,0} ragged-all-to-all(%x, %x), replica_groups={{0,1,2,3}}
}

%usually (x: f32[8]) -> f32[8] {
  %moved.2 = bf16[16,2]{1,0} ragged-all-to-all(%x, %x), replica_groups={{0,1,2,3}}
  %ragged-dot-none.3 = bf16[8,16]{1,0} custom-call(%moved.2), custom_call_target="tpu_custom_call"
}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %loop = (s32[], f32[8,4]) while(%init), condition=%condition, body=%body
  %sum = (f32[8]{0}, f32[]{:T(128)}) all-reduce(%a, %b), replica_groups=[2,4]<=[8], to_apply=%add
}
"""


def test_operations_in_a_loop_count_as_often_as_it_runs():
    found = hlo.collectives(PROGRAM)
    assert found["all-gather"] == hlo.Collective(12, 12 * 256, 12 * 128)
    assert found["all-reduce"] == hlo.Collective(1, 36, int(36 * 2 * 3 / 4))


def test_of_a_conditional_the_true_branch_counts():
    assert hlo.collectives(PROGRAM)["ragged-all-to-all"] == hlo.Collective(12, 12 * 64, 12 * 48)


def test_kernels_are_those_of_every_branch():
    assert hlo.kernels(PROGRAM) == {"splash attention": 1, "ragged-all-to-all": 2, "ragged-dot-none": 1}


def test_operations_are_counted_as_they_run():
    assert hlo.num_operations(PROGRAM) == 12 * 4 + 1  # two in the loop, two in the branch taken; one outside


@pytest.mark.parametrize(
    ("result", "size"),
    [("f32[]", 4), ("bf16[3,5]{1,0}", 30), ("(pred[7], (s32[2], u8[3]))", 18), ("token[]", 0)],
)
def test_bytes_of_a_type(result, size):
    assert hlo.array_bytes(result) == size


def test_collectives_on_the_sparse_cores_of_tpu7x_count():
    """They run beside the program, in a computation of their own."""
    text = """%called (p: bf16[16,256]) -> bf16[128,256] {
  ROOT %gathered = bf16[128,256]{1,0} all-gather(%p), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (a: bf16[16,256]) -> bf16[128,256] {
  %begun = ((bf16[16,256]{1,0:T(8,128)}), bf16[128,256]{1,0}, u32[]) call-start(%a), to_apply=%called
  ROOT %done = bf16[128,256]{1,0} call-done(%begun)
}
"""
    assert hlo.collectives(text)["all-gather"] == hlo.Collective(1, 65536, 57344, 1, 57344)


def test_a_reduce_scatter_receives_from_all_others():
    text = "ENTRY %main (a: f32[8]) -> f32[2] {\n  %s = f32[2]{0} reduce-scatter(%a), replica_groups={{0,1,2,3}}\n}\n"
    assert hlo.collectives(text)["reduce-scatter"] == hlo.Collective(1, 8, 24)


def test_a_reduce_scatter_as_tpu_has_it_counts_as_one():
    text = """%all-reduce-scatter.1 (p: bf16[16,8]) -> bf16[2,8] {
  %p = bf16[16,8]{1,0} parameter(0)
  %all = bf16[16,8]{1,0} all-reduce(%p), replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %part = bf16[2,8]{1,0} dynamic-slice(%all, %i), dynamic_slice_sizes={2,8}
}

ENTRY %main (a: bf16[16,8]) -> bf16[2,8] {
  ROOT %s = bf16[2,8]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    assert hlo.collectives(text) == {"reduce-scatter": hlo.Collective(1, 32, 7 * 32)}


def test_what_is_permuted_arrives_and_its_operand_does_not_count():
    text = """ENTRY %main (a: bf16[16,8]) -> bf16[16,8] {
  %begun = (bf16[16,8]{1,0}, bf16[16,8]{1,0}, u32[]{:S(2)}) collective-permute-start(%a), source_target_pairs={{0,1},{1,0}}
  ROOT %done = bf16[16,8]{1,0} collective-permute-done(%begun)
}
"""  # noqa: E501
    assert hlo.collectives(text) == {"collective-permute": hlo.Collective(1, 256, 256, 1, 256)}


def test_what_runs_in_pieces_beside_products_counts_once_and_is_asynchronous():
    """As XLA:TPU has an all-gather that products hide: whole in each fusion that it passes."""
    fused = """%fused.N (p: bf16[8,16]) -> bf16[8,64] {
  %gathered.N = bf16[8,64]{1,0} all-gather(%p), replica_groups=[2,4]<=[8], dimensions={1}
}

"""
    text = "".join(fused.replace("N", str(i)) for i in range(3))
    text += """ENTRY %main (a: bf16[8,16]) -> bf16[8,64] {
  %async-collective-start.1 = (bf16[8,16]{1,0}, bf16[8,64]{1,0}, u32[]{:S(2)}) fusion(%a), calls=%fused.0
  %fusion.5 = (bf16[32,32]{1,0}, bf16[8,64]{1,0}) fusion(%async-collective-start.1), calls=%fused.1
  ROOT %async-collective-done.1 = bf16[8,64]{1,0} fusion(%fusion.5), calls=%fused.2
}
"""
    assert hlo.collectives(text) == {"all-gather": hlo.Collective(1, 1024, 768, 1, 768)}
