// Small kernels that say what the emulator does, for tests/plugins/test_emulator.py.
#include "kernels/primitives.h"
#include "kernels/tensor_maps.h"

using namespace shuntyard;

namespace {

// -- mma.sync: d [16, 8] += a [16, 8 words] * b [8 words of each of 8 columns]

template <Operand kOperand>
__global__ void multiply_once(const uint32_t* a, const uint32_t* b, float* d) {
    const uint32_t g = threadIdx.x / 4, t = threadIdx.x % 4;
    const uint32_t rows[4] = {a[g * 8 + t], a[(g + 8) * 8 + t], a[g * 8 + t + 4], a[(g + 8) * 8 + t + 4]};
    float* const places[4] = {d + g * 8 + 2 * t, d + g * 8 + 2 * t + 1, d + (g + 8) * 8 + 2 * t,
                              d + (g + 8) * 8 + 2 * t + 1};
    float sums[4] = {*places[0], *places[1], *places[2], *places[3]};
    multiply<kOperand>(sums, rows, b[g * 8 + t], b[g * 8 + t + 4]);
    for (int i = 0; i < 4; ++i) {
        *places[i] = sums[i];
    }
}

// -- wgmma: d [64, N] += a [64, K] * b, both brought by TMA in K blocks of 128 bytes through a ring of stages

struct GroupSizes {
    int64_t blocks;  // of K
    int stages;
};

template <Operand kOperand, Major kMajor, int kColumns>
__global__ void multiply_blocks(SHUNTYARD_TABLE(TensorMap) a, SHUNTYARD_TABLE(TensorMap) b, float* d,
                                GroupSizes sizes) {
    constexpr int kNumbers = kOperand == Operand::kE4m3 ? 128 : 64;  // of K in a block
    constexpr uint32_t kBoxes = kMajor == Major::kK ? 1 : ceil_div(kColumns, 64);
    constexpr uint32_t kBytesA = 64 * 128;
    constexpr uint32_t kBytesB = kMajor == Major::kK ? kColumns * 128 : kBoxes * 64 * 128;
    char* const stages = shared_memory();
    uint64_t* const full = reinterpret_cast<uint64_t*>(stages + sizes.stages * (kBytesA + kBytesB));
    uint64_t* const empty = full + sizes.stages;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < sizes.stages; ++stage) {
            barrier_init(&full[stage], 1);
            barrier_init(&empty[stage], 4);
        }
        barrier_init_fence();
    }
    sync_block();
    if (threadIdx.x >= 128) {
        if (threadIdx.x == 128) {
            for (int64_t block = 0; block < sizes.blocks; ++block) {
                const int stage = static_cast<int>(block % sizes.stages);
                char* const place = stages + stage * (kBytesA + kBytesB);
                const int32_t k = static_cast<int32_t>(block * kNumbers);
                barrier_wait(&empty[stage], (block / sizes.stages & 1) ^ 1);
                barrier_arrive_expecting(&full[stage], kBytesA + kBytesB);
                tma_load(place, &a, &full[stage], k, 0);
                for (uint32_t box = 0; box < kBoxes; ++box) {
                    if (kMajor == Major::kK) {
                        tma_load(place + kBytesA, &b, &full[stage], k, 0);
                    } else {
                        tma_load(place + kBytesA + box * 64 * 128, &b, &full[stage], static_cast<int32_t>(64 * box), k);
                    }
                }
            }
        }
        return;
    }
    float sums[kColumns / 2];
    const int thread = static_cast<int>(threadIdx.x);
    const int row = 16 * (thread / 32) + thread % 32 / 4;
    const auto place_of = [&](int i) {
        return (row + 8 * (i / 2 % 2)) * kColumns + 8 * (i / 4) + 2 * (thread % 4) + i % 2;
    };
    for (int i = 0; i < kColumns / 2; ++i) {
        sums[i] = d[place_of(i)];
    }
    for (int64_t block = 0; block < sizes.blocks; ++block) {
        const int stage = static_cast<int>(block % sizes.stages);
        const char* const place = stages + stage * (kBytesA + kBytesB);
        barrier_wait(&full[stage], block / sizes.stages & 1);
        products_begin();
        for (int step = 0; step < 4; ++step) {
            const uint64_t left = descriptor(place + 32 * step, 16, 1024);
            const uint64_t right = kMajor == Major::kK ? descriptor(place + kBytesA + 32 * step, 16, 1024)
                                                       : descriptor(place + kBytesA + 2048 * step, 64 * 128, 1024);
            GroupProduct<kOperand, kMajor, kColumns>::multiply(sums, left, right, true);
        }
        products_commit();
        products_wait<1>();
        // All but this block's products are done: the stage before may be filled again.
        if (block > 0 && thread % 32 == 0) {
            barrier_arrive(&empty[(block - 1) % sizes.stages]);
        }
    }
    products_wait<0>();
    for (int i = 0; i < kColumns / 2; ++i) {
        keep(sums[i]);
        d[place_of(i)] = sums[i];
    }
}

// -- TMA: a box as it lies in shared memory

__global__ void copy_box(SHUNTYARD_TABLE(TensorMap) map, int32_t column, int32_t row, int32_t bytes, char* out) {
    char* const box = shared_memory();
    uint64_t* const full = reinterpret_cast<uint64_t*>(box + bytes);
    if (threadIdx.x == 0) {
        barrier_init(full, 1);
        barrier_init_fence();
        barrier_arrive_expecting(full, static_cast<uint32_t>(bytes));
        tma_load(box, &map, full, column, row);
    }
    sync_block();
    barrier_wait(full, 0);
    for (int32_t i = static_cast<int32_t>(threadIdx.x) * 16; i < bytes; i += 32 * 16) {
        store(out + i, load(box + i));
    }
}

// -- what a warp does together: of each lane's number, all results one after the other, 32 of each

__global__ void exchange(const uint32_t* values, const int32_t* lanes, uint32_t* out) {
    const uint32_t lane = threadIdx.x, value = values[lane];
    const float number = static_cast<float>(value);
    const uint32_t results[] = {
        shuffle(value, lanes[lane]),
        bits_of(shuffle(number, lanes[lane])),
        shuffle_xor(value, 5),
        bits_of(shuffle_xor(number, 16)),
        static_cast<uint32_t>(shuffle_up(static_cast<int32_t>(value), 3)),
        ballot(value % 3 == 0),
        match_any(value % 7),
        reduce_max(value),
        reduce_min(value),
        permute_bytes(value, ~value, lane * 0x1111u ^ value >> 16),
        pack<Half>(number, -number),
        pack<Bfloat>(number, -number),
    };
    for (uint32_t i = 0; i < sizeof(results) / sizeof(*results); ++i) {
        out[i * 32 + lane] = results[i];
    }
}

// d [64, N] += a [64, 64] * b [N, 64], `a` in registers.
template <Operand kOperand, int kColumns>
__global__ void multiply_registers(const uint32_t* a, SHUNTYARD_TABLE(TensorMap) b, float* d) {
    char* const box = shared_memory();
    uint64_t* const full = reinterpret_cast<uint64_t*>(box + kColumns * 128);
    const int thread = static_cast<int>(threadIdx.x);
    if (thread == 0) {
        barrier_init(full, 1);
        barrier_init_fence();
        barrier_arrive_expecting(full, kColumns * 128);
        tma_load(box, &b, full, 0, 0);
    }
    sync_block();
    const int row = 16 * (thread / 32) + thread % 32 / 4, t = thread % 4;
    uint32_t left[4][4];
    for (int step = 0; step < 4; ++step) {
        for (int i = 0; i < 4; ++i) {
            left[step][i] = a[(row + 8 * (i % 2)) * 32 + 8 * step + t + 4 * (i / 2)];
        }
    }
    float sums[kColumns / 2];
    const auto place_of = [&](int i) { return (row + 8 * (i / 2 % 2)) * kColumns + 8 * (i / 4) + 2 * t + i % 2; };
    for (int i = 0; i < kColumns / 2; ++i) {
        sums[i] = d[place_of(i)];
    }
    barrier_wait(full, 0);
    products_begin();
    for (int step = 0; step < 4; ++step) {
        RegisterProduct<kOperand, kColumns>::multiply(sums, left[step], descriptor(box + 32 * step, 16, 1024), true);
    }
    products_commit();
    products_wait<0>();
    for (int i = 0; i < kColumns / 2; ++i) {
        d[place_of(i)] = sums[i];
    }
}

template <Operand kOperand, int kColumns>
int run_registers(const uint32_t* a, const void* b, float* d) {
    TensorMap right;
    SHUNTYARD_TRY(encode_tensor_map(right, 2, b, 64, kColumns, 128, 64, kColumns));
    Shape shape{dim3(1), dim3(128)};
    shape.shared = kColumns * 128 + sizeof(uint64_t);
    return launch(multiply_registers<kOperand, kColumns>, shape, nullptr, a, right, d);
}

template <Operand kOperand, Major kMajor, int kColumns>
int run_blocks(const void* a, const void* b, float* d, int64_t depth, int stages) {
    constexpr int kBytes = kOperand == Operand::kE4m3 ? 1 : 2;
    TensorMap left, right;
    SHUNTYARD_TRY(encode_tensor_map(left, kBytes, a, depth, 64, depth * kBytes, 128 / kBytes, 64));
    if (kMajor == Major::kK) {
        SHUNTYARD_TRY(encode_tensor_map(right, kBytes, b, depth, kColumns, depth * kBytes, 128 / kBytes, kColumns));
    } else {
        SHUNTYARD_TRY(encode_tensor_map(right, kBytes, b, kColumns, depth, kColumns * kBytes, 64, 64));
    }
    const uint32_t bytes_b = kMajor == Major::kK ? kColumns * 128 : ceil_div(kColumns, 64) * 64 * 128;
    Shape shape{dim3(1), dim3(160)};
    shape.shared = stages * (64 * 128 + bytes_b + 2 * sizeof(uint64_t));
    return launch(multiply_blocks<kOperand, kMajor, kColumns>, shape, nullptr, left, right, d,
                  GroupSizes{ceil_div(depth * kBytes, 128), stages});
}

}  // namespace

extern "C" {

SHUNTYARD_API int test_multiply(int operand, const uint32_t* a, const uint32_t* b, float* d) {
    constexpr void (*kKernels[])(const uint32_t*, const uint32_t*, float*) = {
        multiply_once<Operand::kHalf>, multiply_once<Operand::kBfloat>, multiply_once<Operand::kE4m3>};
    return launch(kKernels[operand], Shape{dim3(1), dim3(32)}, nullptr, a, b, d);
}

SHUNTYARD_API int test_register_product(int operand, int columns, const uint32_t* a, const void* b, float* d) {
    switch (1000 * operand + columns) {
        case 64: return run_registers<Operand::kHalf, 64>(a, b, d);
        case 128: return run_registers<Operand::kHalf, 128>(a, b, d);
        case 1064: return run_registers<Operand::kBfloat, 64>(a, b, d);
        case 1128: return run_registers<Operand::kBfloat, 128>(a, b, d);
        default: return -1;
    }
}

// A box [box_rows, 128 bytes] from (row, column) on, in the swizzle that it lies in.
SHUNTYARD_API int test_tma_load(int element_bytes, const void* matrix, int64_t columns, int64_t rows, int64_t pitch,
                                int box_rows, int32_t column, int32_t row, char* out) {
    TensorMap map;
    SHUNTYARD_TRY(encode_tensor_map(map, element_bytes, matrix, columns, rows, pitch, 128 / element_bytes, box_rows));
    Shape shape{dim3(1), dim3(32)};
    shape.shared = box_rows * 128 + sizeof(uint64_t);
    return launch(copy_box, shape, nullptr, map, column, row, box_rows * 128, out);
}

SHUNTYARD_API int test_exchange(const uint32_t* values, const int32_t* lanes, uint32_t* out) {
    return launch(exchange, Shape{dim3(1), dim3(32)}, nullptr, values, lanes, out);
}

// What a launch of so many blocks and threads returns.
SHUNTYARD_API int test_launch(unsigned grid, unsigned block, unsigned cluster, int64_t shared) {
    Shape shape{dim3(grid), dim3(block)};
    shape.cluster = cluster;
    shape.shared = static_cast<size_t>(shared);
    return launch(+[]() { sync_cluster(); }, shape, nullptr);
}

// The operand types, then 0 for [out, in] and 1 for [in, out], then N: d [64, N] += a [64, K] * b.
SHUNTYARD_API int test_group_product(int operand, int major, int columns, const void* a, const void* b, float* d,
                                     int64_t depth, int stages) {
    switch (1000 * (2 * operand + major) + columns) {
        case 128: return run_blocks<Operand::kHalf, Major::kK, 128>(a, b, d, depth, stages);
        case 256: return run_blocks<Operand::kHalf, Major::kK, 256>(a, b, d, depth, stages);
        case 1128: return run_blocks<Operand::kHalf, Major::kN, 128>(a, b, d, depth, stages);
        case 1256: return run_blocks<Operand::kHalf, Major::kN, 256>(a, b, d, depth, stages);
        case 2128: return run_blocks<Operand::kBfloat, Major::kK, 128>(a, b, d, depth, stages);
        case 2256: return run_blocks<Operand::kBfloat, Major::kK, 256>(a, b, d, depth, stages);
        case 3128: return run_blocks<Operand::kBfloat, Major::kN, 128>(a, b, d, depth, stages);
        case 3256: return run_blocks<Operand::kBfloat, Major::kN, 256>(a, b, d, depth, stages);
        case 4064: return run_blocks<Operand::kE4m3, Major::kK, 64>(a, b, d, depth, stages);
        case 4128: return run_blocks<Operand::kE4m3, Major::kK, 128>(a, b, d, depth, stages);
        default: return -1;
    }
}
}
