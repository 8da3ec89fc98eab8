"""FLOPs of compiled products by hand: loops multiply, padding and dilation do not, kernels by their shapes."""

from laep_jax.preflight.flops import products

PROGRAM = """HloModule step

%fused (p: bf16[4,96,8], q: bf16[4,96,16]) -> bf16[4,8,16] {
  %p = bf16[4,96,8]{2,1,0} parameter(0)
  %q = bf16[4,96,16]{2,1,0} parameter(1)
  ROOT %dense = bf16[4,8,16]{2,1,0} convolution(%p, %q), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0fb_0io->0bf, metadata={op_name="jit(step)/experts/dw"}
}

%body (x: (s32[], bf16[96,8])) -> (s32[], bf16[96,8]) {
  %x = bf16[96,8]{1,0} parameter(0)
  %w = bf16[8,32]{1,0} parameter(1)
  %plain.1 = bf16[96,32]{1,0} convolution(%x, %w), dim_labels=bf_io->bf, metadata={op_name="jit(step)/attention/dot"}
  %plain.2 = bf16[96,32]{1,0} convolution(%x, %w), dim_labels=bf_io->bf, metadata={op_name="jit(step)/attention/dot"}
  %heads = bf16[96,4,8]{1,0} convolution(%x.3, %w.3), window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=bf0_i0o->b0f
  %gmm.7 = bf16[96,16]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", operand_layout_constraints={s32[5]{0}, bf16[96,8]{1,0}, bf16[4,8,16]{2,1,0}}, frontend_attributes={}
  %tgmm.8 = bf16[4,8,16]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[96,8]{1,0}, bf16[96,16]{1,0}}, frontend_attributes={}
  %splash_mha_dkv_no_residuals.1 = (f32[512,128]{1,0}, bf16[2,64,128]{2,1,0}, bf16[2,64,128]{2,1,0}) custom-call(%x), custom_call_target="tpu_custom_call"
}

%condition (x: (s32[], f32[8,4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %x.3 = bf16[96,8,1]{1,0} parameter(0)
  %w.3 = bf16[8,4,8]{1,0} parameter(1)
  %loop = (s32[], f32[8,4]) while(%init), condition=%condition, body=%body
  %dw = bf16[4,8,16]{2,1,0} fusion(%a, %b), kind=kOutput, calls=%fused
}
"""  # noqa: E501


def test_products_of_a_program_by_hand():
    found = {(product.name, product.result): product.flops for product in products(PROGRAM, rows=50)}
    assert found == {
        ("attention/dot", "bf16[96,32]"): 3 * 2 * (2 * 96 * 8 * 32),  # in a loop, twice
        ("heads", "bf16[96,4,8]"): 3 * (2 * 96 * 8 * 8) * 4,  # each of four results from one value, the rest is padding
        ("experts/dw", "bf16[4,8,16]"): 4 * (2 * 96 * 8 * 16),  # every row for every expert: the dense weight gradient
        ("gmm.7", "bf16[96,16]"): 3 * (2 * 50 * 8 * 16),  # the rows in use, not those of the buffer
        ("tgmm.8", "bf16[4,8,16]"): 3 * (2 * 50 * 8 * 16),
        ("splash_mha_dkv_no_residuals.1", "bf16[2,64,128]"): 3
        * 4
        * (2 * 64 * 64 * 128),  # two heads; four products, half of each
    }


def test_the_largest_comes_first():
    flops = [product.flops for product in products(PROGRAM, rows=50)]
    assert flops == sorted(flops, reverse=True)
