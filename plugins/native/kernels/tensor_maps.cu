// Maps of matrices, made by the driver: what stands in their 128 bytes is its affair.
#include "kernels/tensor_maps.h"

#include <cudaTypedefs.h>

#include <atomic>

namespace shuntyard {
namespace {

using Encode = PFN_cuTensorMapEncodeTiled_v12000;

// The driver's function, asked for at run time: the library must load where there is no driver.
int find_encode(Encode& encode) {
    static std::atomic<Encode> known{nullptr};
    encode = known;
    if (encode != nullptr) {
        return cudaSuccess;
    }
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const int status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    if (status != cudaSuccess) {
        return status;
    }
    if (found != cudaDriverEntryPointSuccess || function == nullptr) {
        return cudaErrorSymbolNotFound;
    }
    known = encode = reinterpret_cast<Encode>(function);
    return cudaSuccess;
}

}  // namespace

int encode_tensor_map(TensorMap& map, int element_bytes, const void* matrix, int64_t columns, int64_t rows,
                      int64_t pitch_bytes, int box_columns, int box_rows) {
    static_assert(sizeof(TensorMap) == sizeof(CUtensorMap), "a map's size is given");
    if ((element_bytes != 1 && element_bytes != 2) || box_columns * element_bytes != 128 || box_rows < 1 ||
        columns < 1 || rows < 1 || pitch_bytes < columns * element_bytes) {
        return cudaErrorInvalidValue;
    }
    Encode encode = nullptr;
    SHUNTYARD_TRY(find_encode(encode));
    // The driver asks more of its type's alignment than of the address it is given.
    alignas(128) CUtensorMap made;
    const cuuint64_t extents[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t pitches[] = {static_cast<cuuint64_t>(pitch_bytes)};
    const cuuint32_t box[] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
    const cuuint32_t steps[] = {1, 1};
    const CUtensorMapDataType type =
        element_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16;
    const CUresult status =
        encode(&made, type, 2, const_cast<void*>(matrix), extents, pitches, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    memcpy(&map, &made, sizeof(map));
    return status;  // the driver's numbers are the runtime's
}

}  // namespace shuntyard
