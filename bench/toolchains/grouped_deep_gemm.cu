// A grouped FP8 product by DeepGEMM's headers: 16 experts one after the other in memory, gate and up as one matrix of
// [16384, 5120], scales of 1 x 128 and 128 x 128. Compiled only; docs/toolchains.md has the command and what came out.
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <deep_gemm/impls/sm90_fp8_gemm_1d2d.cuh>

using deep_gemm::GemmType;

const void* const kernel = reinterpret_cast<const void*>(
    &deep_gemm::sm90_fp8_gemm_1d2d_impl<cute::UMMA::Major::K, 0, 16384, 5120, 16, 128, 128, 128, 128, 128, 128, 6, 128,
                                        256, 1, false, 132, GemmType::MGroupedContiguous, cutlass::bfloat16_t>);
