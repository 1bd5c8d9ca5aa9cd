"""Compiles every Triton kernel for a GPU that need not be there. Run as a program, outside of Triton's interpreter.

The interpreter accepts what the compiler refuses; only the latter knows of types that must not change within a loop.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.tsl import triton_backward, triton_forward

POINTERS = {
    "boxes_ptr": "*fp32",
    "cosine_ptr": "*fp32",
    "count_ptr": "*i64",
    "empty_ptr": "*i1",
    "loss_ptr": "*fp32",
    "order_ptr": "*i64",
    "sample_ptr": "*i64",
    "start_ptr": "*i64",
    "target_ptr": "*fp32",
}
# What is in the tokens' dtype; all other pointers are float32, all other numbers int32.
TOKEN_DTYPE = ("tokens_ptr", "y_ptr", "y_grad_ptr", "grad_ptr", "feature_ptr", "feature_grad_ptr")


def compile_kernel(kernel, token_dtype: str, capability: int, warps: int, **constants) -> None:
    """Compiles one specialisation; `constants` holds constexprs and arguments that are None or 1."""

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name.endswith("_ptr"):
            return POINTERS.get(name, f"*{token_dtype if name in TOKEN_DTYPE else 'fp32'}")
        return "fp32" if name == "eps" else "i32"

    signature = {name: kind(name) for name in kernel.arg_names}
    aligned = [n for n, name in enumerate(kernel.arg_names) if name.endswith("_ptr") and name not in constants]
    source = ASTSource(
        kernel,
        signature,
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        {(n,): [["tt.divisibility", 16]] for n in aligned},
    )
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    assert binary.asm["cubin"]
    print(kernel.__name__, token_dtype, constants)


def main(token_dtype: str, capability: int) -> None:
    """Every kernel, with and without its optional arguments."""
    forward, backward = triton_forward, triton_backward
    for touch, missing in ((True, {}), (False, {"weight_ptr": None, "bias_ptr": None})):
        tile = {"stride_d": 1, "TOUCH": touch, "ROWS": 8, "BLOCK_D": 1024}
        compile_kernel(forward.pool_normalise_kernel, token_dtype, capability, forward.WARPS, **tile, **missing)
    rows = {"feature_stride_e": 1, "target_stride_e": 1, "TINY": 1e-12, "BLOCK_E": 1024}
    compile_kernel(forward.cosine_kernel, token_dtype, capability, 4, **rows)
    compile_kernel(forward.mean_error_kernel, token_dtype, capability, 4, BLOCK_M=1024)
    for missing in ("loss_grad_ptr", "cosine_grad_ptr"):
        compile_kernel(backward.cosine_backward_kernel, token_dtype, capability, 4, **rows, **{missing: None})
    compile_kernel(backward.normalise_backward_kernel, token_dtype, capability, 8, BLOCK_D=1024)
    compile_kernel(backward.normalise_backward_kernel, token_dtype, capability, 8, BLOCK_D=1024, weight_ptr=None)
    for number, tile in enumerate(backward.TILES):
        settings = {**tile.kwargs, "stride_d": 1, "TOUCH": number % 2 == 0}
        compile_kernel(backward.pool_backward_kernel.fn, token_dtype, capability, tile.num_warps, **settings)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
