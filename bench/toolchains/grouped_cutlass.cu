// A grouped FP8 product by CUTLASS's CollectiveBuilder: pointers per expert, scales by row and by channel through an
// epilogue visitor tree, sums promoted. Compiled only; docs/toolchains.md has the command and what came out.
#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/operations.hpp"
#include "cutlass/epilogue/fusion/sm90_visitor_load_tma_warpspecialized.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/dispatch_policy.hpp"
#include "cutlass/gemm/group_array_problem_shape.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"

using cute::_0;
using cute::_1;
using cute::_128;
using cute::Shape;
using cute::Stride;
namespace fusion = cutlass::epilogue::fusion;
using Problem = cutlass::gemm::GroupProblemShape<Shape<int, int, int>>;
using Fp8 = cutlass::float_e4m3_t;
using D = cutlass::bfloat16_t;
using Block = Shape<_128, _128, _128>;
using Cluster = Shape<_1, _1, _1>;
using MainSchedule = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperative;
using EpiSchedule = cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative;
using Rows = fusion::Sm90ColBroadcast<0, Block, float*, float, Stride<_1, _0, _0>>;
using Cols = fusion::Sm90RowBroadcast<0, Block, float*, float, Stride<_0, _1, _0>>;
using Mul = fusion::Sm90Compute<cutlass::multiplies, float, float, cutlass::FloatRoundStyle::round_to_nearest>;
using MulOut = fusion::Sm90Compute<cutlass::multiplies, D, float, cutlass::FloatRoundStyle::round_to_nearest>;
using Tree = fusion::Sm90EVT<MulOut, Cols, fusion::Sm90EVT<Mul, Rows, fusion::Sm90AccFetch>>;
using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<cutlass::arch::Sm90,
    cutlass::arch::OpClassTensorOp, Block, Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float, float, void,
    cutlass::layout::RowMajor*, 8, D, cutlass::layout::RowMajor*, 8, EpiSchedule, Tree>::CollectiveOp;
using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<cutlass::arch::Sm90,
    cutlass::arch::OpClassTensorOp, Fp8, cutlass::layout::RowMajor*, 16, Fp8, cutlass::layout::ColumnMajor*, 16, float,
    Block, Cluster,
    cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
    MainSchedule>::CollectiveOp;
using GemmKernel = cutlass::gemm::kernel::GemmUniversal<Problem, Mainloop, Epilogue>;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<GemmKernel>;

int run(typename Gemm::Arguments const& arguments, void* workspace, cudaStream_t stream) {
    Gemm gemm;
    if (gemm.initialize(arguments, workspace, stream) != cutlass::Status::kSuccess) {
        return 1;
    }
    return gemm.run(stream) != cutlass::Status::kSuccess;
}
