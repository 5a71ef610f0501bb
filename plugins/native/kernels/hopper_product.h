// A product over all experts on Hopper: tiles of rows and weights come by TMA, warp groups multiply them, blocks stay
// and take tile after tile.
//
// A block is three warp groups. One thread of the first keeps a ring of stages filled: a stage holds one K block, 128
// bytes of every row of a tile, as boxes of 64 rows by 128 bytes. The other two warp groups multiply what has arrived
// and give the stage back. How they share a tile, and how wide it is, follows from the number of rows:
//
//   rows  columns  each warp group  for
//   64    256      128 columns      few rows an expert: more weights on their way, less multiplied in vain
//   128   128      64 rows          E4M3 codes
//   128   256      64 rows          the same with more rows, and 16-bit operands: least traffic from L2
//
// For gate and up, boxes of 64 columns of gate and of up take turns: a thread then holds both parts of a hidden value,
// and SwiGLU needs no exchange.
//
// Sums of E4M3 products move on to fp32 registers every 128 of K, since Hopper's units keep about 14 bits while they
// add up products of FP8 (DeepSeek-V3, arXiv 2412.19437, section 3.3.2). They are made 128 columns at a time for that,
// so that no more registers than these are needed twice.
#pragma once

#include "kernels/hopper.h"
#include "kernels/rows.h"

namespace shuntyard {

constexpr int kBoxRows = 64;
constexpr uint32_t kBoxBytes = kBoxRows * 128;
constexpr uint32_t kGroupThreads = 128;
constexpr uint32_t kHopperThreads = 3 * kGroupThreads;
constexpr uint32_t kStageSpace = 200 * 1024;  // of the 227 KiB that a block may have
constexpr uint32_t kTallest = 16;             // tiles of rows that go through all columns together, and stay in L2

template <typename X_, Operand kOperand_, Major kMajor_, int kRows_, int kColumns_, bool kPair_, bool kGiven_ = false>
struct HopperConfig {
    using X = X_;
    static constexpr Operand kOperand = kOperand_;
    static constexpr Major kMajor = kMajor_;
    static constexpr int kRows = kRows_, kColumns = kColumns_;
    static constexpr bool kPair = kPair_;
    static constexpr bool kCodes = kOperand == Operand::kE4m3;
    static constexpr bool kMoreRows = kGiven_ && kPair;  // up's rows are not gate's
    static constexpr bool kEncode = kGiven_ && kPair;    // what comes out is codes
    using Scales = std::conditional_t<kCodes, CodeScales, NoScales>;

    static constexpr int kBlock = kCodes ? 128 : 64;  // of K
    static constexpr int kOfByte = 1, kRowBlocks = 1;
    static constexpr int kRowBoxes = kRows / kBoxRows;
    static constexpr int kColumnBoxes = kColumns / kBoxRows;
    static constexpr uint32_t kStageBytes = (kRowBoxes * (kMoreRows ? 2 : 1) + kColumnBoxes) * kBoxBytes;
    static constexpr uint32_t kStages = kStageSpace / kStageBytes;

    static constexpr bool kShareRows = kRows == 128;  // warp groups split the rows, else the columns
    static constexpr int kGroupColumns = kShareRows ? kColumns : kColumns / 2;
    static constexpr int kSums = kGroupColumns / 2;               // of a thread
    static constexpr int kAtOnce = kCodes ? 128 : kGroupColumns;  // columns of a product
    static constexpr size_t kScaleSpace = kCodes ? 2 * kGroupColumns * sizeof(float) : 0;
    static constexpr size_t kShared = kStages * (kStageBytes + 2 * sizeof(uint64_t)) + kScaleSpace;
    static constexpr int kOutColumns = kPair ? kColumns / 2 : kColumns;
};

// The place of a tile.
struct HopperTilePlace {
    int32_t expert;
    int32_t row, end;  // the tile's first row, and where the expert's rows end
    int32_t column;    // of the result
};

// Goes through the tiles of all experts in order, one expert after the other. Within one, up to kTallest tiles of rows
// take turns before the next column. All numbers of tiles fit 32 bits: launch_hopper refuses more.
template <class C>
struct HopperWalk {
    const HopperProduct& product;
    uint32_t column_tiles;
    int32_t expert = -1;
    uint32_t first_tile = 0, tiles = 0, row_tiles = 0;
    int32_t begin = 0, end;  // of the expert's rows, as owner_of has them

    __device__ explicit HopperWalk(const HopperProduct& product_)
        : product(product_),
          column_tiles(static_cast<uint32_t>(ceil_div(product_.columns, C::kOutColumns))),
          end(clamped(product_.expert_offsets[0], static_cast<int32_t>(product_.all_rows))) {}

    // False behind the last tile. Tiles must be asked for in order.
    __device__ bool find(uint32_t tile, HopperTilePlace& place) {
        while (tile >= first_tile + tiles) {
            if (++expert >= product.experts) {
                return false;
            }
            first_tile += tiles;
            begin = end;
            const int32_t offset = clamped(product.expert_offsets[expert + 1], static_cast<int32_t>(product.all_rows));
            end = offset > begin ? offset : begin;
            row_tiles = (static_cast<uint32_t>(end - begin) + C::kRows - 1) / C::kRows;
            tiles = row_tiles * column_tiles;
        }
        const uint32_t own = tile - first_tile;
        const uint32_t of_group = kTallest * column_tiles;
        const uint32_t group = own / of_group, within = own % of_group;
        const uint32_t left = row_tiles - group * kTallest;
        const uint32_t height = left < kTallest ? left : kTallest;
        place.expert = expert;
        place.row = begin + static_cast<int32_t>((group * kTallest + within % height) * C::kRows);
        place.end = end;
        place.column = static_cast<int32_t>(within / height * C::kOutColumns);
        return true;
    }
};

// The ring of stages: `full` ends a phase when a stage's bytes have arrived, `empty` when all eight warps have read it.
template <class C>
struct HopperRing {
    char* stages;
    uint64_t* full;
    uint64_t* empty;
    uint32_t stage = 0, parity = 0;

    __device__ HopperRing()
        : stages(shared_memory()),
          full(reinterpret_cast<uint64_t*>(stages + C::kStages * C::kStageBytes)),
          empty(full + C::kStages) {}

    __device__ char* current() const { return stages + stage * C::kStageBytes; }

    __device__ void next() {
        if (++stage == C::kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

#if SHUNTYARD_ON_HOPPER

// One thread: everything that the other warp groups multiply.
template <class C>
__device__ inline void hopper_fill(const HopperProduct& product) {
    HopperRing<C> ring;
    HopperWalk<C> walk(product);
    HopperTilePlace place;
    const int32_t inner = static_cast<int32_t>(product.inner);
    int32_t acquired = -1;
    for (uint32_t tile = blockIdx.x; walk.find(tile, place); tile += gridDim.x) {
        const TensorMap* const first = product.maps + place.expert;
        const TensorMap* const second = C::kPair ? first + product.experts : first;
        if (acquired != place.expert) {
            acquired = place.expert;
            tensor_map_acquire(first);
            if (C::kPair) {
                tensor_map_acquire(second);
            }
        }
        for (int32_t k = 0; k < inner; k += C::kBlock) {
            barrier_wait(&ring.empty[ring.stage], ring.parity ^ 1);  // at first, the phase before the first: it passes
            uint64_t* const full = &ring.full[ring.stage];
            barrier_arrive_expecting(full, C::kStageBytes);
            char* to = ring.current();
            for (int box = 0; box < C::kRowBoxes * C::kRowBlocks; ++box, to += kBoxBytes) {
                tma_load(to, &product.rows, full, k + box / C::kRowBoxes * 64,
                         place.row + box % C::kRowBoxes * kBoxRows);
            }
            for (int box = 0; box < (C::kMoreRows ? C::kRowBoxes : 0); ++box, to += kBoxBytes) {
                tma_load(to, &product.more_rows, full, k, place.row + box * kBoxRows);
            }
            for (int box = 0; box < C::kColumnBoxes; ++box, to += kBoxBytes) {
                const TensorMap* const map = C::kPair && box % 2 == 1 ? second : first;
                const int32_t column = place.column + box / (C::kPair ? 2 : 1) * kBoxRows;
                const bool along_k = C::kMajor == Major::kK;
                tma_load(to, map, full, along_k ? k / C::kOfByte : column, along_k ? column : k);
            }
            ring.next();
        }
    }
}

// Multiplies kAtOnce columns of a stage, from column `first` of the warp group's on: sums = or += rows * columns, as
// one group of products.
template <class C>
__device__ inline void hopper_multiply(const char* stage, int group, int first, float (&sums)[C::kAtOnce / 2],
                                       bool accumulate) {
    const char* const rows = stage + (C::kShareRows ? group * kBoxBytes : 0);
    const char* const columns = stage + C::kStageBytes - C::kColumnBoxes * kBoxBytes + first / kBoxRows * kBoxBytes +
                                (C::kShareRows ? 0 : group * (C::kColumnBoxes / 2) * kBoxBytes);
    for (float& sum : sums) {
        keep(sum);
    }
    products_begin();
    for (int step = 0; step < 4; ++step) {
        const bool add = accumulate || step > 0;
        const uint64_t left = descriptor(rows + step * 32, 16, 1024);
        if constexpr (C::kMoreRows) {
            // Gate and up have rows of their own, so each half of the columns is a product of its own.
            static_assert(C::kAtOnce == 128, "a box of gate and one of up");
            const uint64_t up_left = descriptor(rows + C::kRowBoxes * kBoxBytes + step * 32, 16, 1024);
            GroupProduct<C::kOperand, C::kMajor, 64>::multiply(sums, left, descriptor(columns + step * 32, 16, 1024),
                                                               add);
            GroupProduct<C::kOperand, C::kMajor, 64>::multiply(
                sums + 32, up_left, descriptor(columns + kBoxBytes + step * 32, 16, 1024), add);
        } else {
            const uint64_t right = C::kMajor == Major::kK ? descriptor(columns + step * 32, 16, 1024)
                                                          : descriptor(columns + step * 2048, kBoxBytes, 1024);
            GroupProduct<C::kOperand, C::kMajor, C::kAtOnce>::multiply(sums, left, right, add);
        }
    }
    products_commit();
}

// The sums of one tile.
template <class C>
__device__ inline void hopper_sum(const HopperProduct& product, HopperRing<C>& ring, int group,
                                  float (&sums)[C::kSums]) {
    const bool speaks = threadIdx.x % 32 == 0;  // for its warp
    const int32_t inner = static_cast<int32_t>(product.inner);
    if constexpr (C::kCodes) {
        for (float& sum : sums) {
            sum = 0;
        }
        for (int32_t k = 0; k < inner; k += C::kBlock) {
            barrier_wait(&ring.full[ring.stage], ring.parity);
#pragma unroll
            for (int first = 0; first < C::kGroupColumns; first += C::kAtOnce) {
                float fresh[C::kAtOnce / 2];
                hopper_multiply<C>(ring.current(), group, first, fresh, false);
                products_wait<0>();
                if (speaks && first + C::kAtOnce == C::kGroupColumns) {
                    barrier_arrive(&ring.empty[ring.stage]);
                }
                for (int i = 0; i < C::kAtOnce / 2; ++i) {
                    keep(fresh[i]);
                    sums[first / 2 + i] += fresh[i];
                }
            }
            ring.next();
        }
    } else {
        uint64_t* last = nullptr;
        for (int32_t k = 0; k < inner; k += C::kBlock) {
            barrier_wait(&ring.full[ring.stage], ring.parity);
            hopper_multiply<C>(ring.current(), group, 0, sums, k > 0);
            products_wait<1>();  // the stage before this one has been read
            if (speaks && last != nullptr) {
                barrier_arrive(last);
            }
            last = &ring.empty[ring.stage];
            ring.next();
        }
        products_wait<0>();
        if (speaks) {
            barrier_arrive(last);
        }
        for (float& sum : sums) {
            keep(sum);
        }
    }
}

// The scales of a warp group's columns, in the order of its sums: in shared memory, since each thread needs many.
template <class C>
__device__ inline float* hopper_scales(int group) {
    HopperRing<C> ring;
    return reinterpret_cast<float*>(ring.empty + C::kStages) + group * C::kGroupColumns;
}

// Brings them there while the tile's products are still to come.
template <class C>
__device__ inline void hopper_bring_scales(const HopperProduct& product, const typename C::Scales& scales,
                                           const HopperTilePlace& place, int group) {
    if constexpr (C::kCodes) {
        constexpr int kParts = C::kPair ? 2 : 1;
        constexpr int kOwn = C::kGroupColumns / kGroupThreads;  // columns of a thread
        const int thread = static_cast<int>(threadIdx.x % kGroupThreads);
        float own[kOwn];
        for (int i = 0; i < kOwn; ++i) {
            const int box = (i * static_cast<int>(kGroupThreads) + thread) / kBoxRows;
            const int32_t column = place.column + (C::kShareRows ? 0 : group * C::kGroupColumns / kParts) +
                                   box / kParts * kBoxRows + thread % kBoxRows;
            own[i] = column < product.columns ? scale_at(scales.weights[box % kParts][place.expert], scales.weight_type,
                                                         column * scales.stride)
                                              : 0.0f;
        }
        sync_some(1 + group, kGroupThreads);  // the last tile's have been read
        for (int i = 0; i < kOwn; ++i) {
            hopper_scales<C>(group)[i * kGroupThreads + thread] = own[i];
        }
    }
}

// What sums of one row are multiplied with.
template <class C>
__device__ inline float hopper_factor(const HopperProduct& product, const typename C::Scales& scales, int32_t expert,
                                      int part, int32_t row) {
    if constexpr (C::kCodes) {
        return product.factors != nullptr ? product.factors[row]
                                          : scale_at(scales.rows[part][expert], scales.row_type, 0);
    } else {
        return 1.0f;
    }
}

// Two neighbouring values of the result.
template <class C>
__device__ inline void hopper_store(const HopperProduct& product, int32_t row, int32_t column, float first,
                                    float second, float next_scale) {
    using X = typename C::X;
    const int64_t place = int64_t{row} * product.columns + column;
    if constexpr (C::kEncode) {
        const uint32_t low = from_float<E4m3>(first / next_scale).bits;
        const uint32_t high = from_float<E4m3>(second / next_scale).bits;
        reinterpret_cast<uint16_t*>(product.out)[place / 2] = static_cast<uint16_t>(low | high << 8);
    } else {
        reinterpret_cast<uint32_t*>(product.out)[place / 2] = pack<X>(first, second);
    }
}

template <class C>
__device__ inline void hopper_finish(const HopperProduct& product, const typename C::Scales& scales,
                                     const HopperTilePlace& place, int group, const float (&sums)[C::kSums]) {
    using X = typename C::X;
    const int thread = static_cast<int>(threadIdx.x % kGroupThreads);
    const int32_t first_row = place.row + (C::kShareRows ? group * 64 : 0) + thread / 32 * 16 + thread % 32 / 4;
    constexpr int kParts = C::kPair ? 2 : 1;
    constexpr int kBlocks = C::kGroupColumns / 64 / kParts;  // of 64 columns of the result
    const int32_t first_column = place.column + (C::kShareRows ? 0 : group * kBlocks * 64) + thread % 4 * 2;
    float next_scale = 1.0f;
    if constexpr (C::kEncode) {
        next_scale = scale_at(scales.next[place.expert], scales.row_type, 0);
    }
    const float* column_scales = nullptr;
    if constexpr (C::kCodes) {
        sync_some(1 + group, kGroupThreads);
        column_scales = hopper_scales<C>(group);
    }
    const bool has[2] = {first_row < place.end, first_row + 8 < place.end};
    float factors[kParts][2] = {};
    for (int part = 0; part < kParts; ++part) {
        for (int h = 0; h < 2; ++h) {
            factors[part][h] = has[h] ? hopper_factor<C>(product, scales, place.expert, part, first_row + 8 * h) : 0.0f;
        }
    }
#pragma unroll
    for (int i = 0; i < kBlocks * 8; ++i) {  // 8 columns each, of which the thread has two
        const int32_t column = first_column + i * 8;
        if (column >= product.columns) {
            continue;
        }
        for (int h = 0; h < 2; ++h) {
            float values[kParts][2];
            for (int part = 0; part < kParts; ++part) {
                for (int l = 0; l < 2; ++l) {
                    const int block = i / 8 * kParts + part;
                    const float sum = sums[block * 32 + i % 8 * 4 + 2 * h + l];
                    values[part][l] = sum;
                    if constexpr (C::kCodes) {
                        const int own = block * 64 + i % 8 * 8 + thread % 4 * 2 + l;
                        values[part][l] = sum * factors[part][h] * column_scales[own];
                    }
                }
            }
            if (!has[h]) {
                continue;
            }
            if constexpr (C::kPair) {
                hopper_store<C>(product, first_row + 8 * h, column, swiglu_of<X, true>(values[0][0], values[1][0]),
                                swiglu_of<X, true>(values[0][1], values[1][1]), next_scale);
            } else {
                hopper_store<C>(product, first_row + 8 * h, column, values[0][0], values[0][1], next_scale);
            }
        }
    }
}

// The ring's barriers, before anybody uses them.
template <class C>
__device__ inline void hopper_begin(const HopperRing<C>& ring) {
    if (threadIdx.x == 0) {
        for (uint32_t stage = 0; stage < C::kStages; ++stage) {
            barrier_init(&ring.full[stage], 1);
            barrier_init(&ring.empty[stage], 8);
        }
        barrier_init_fence();
    }
    sync_block();
}

// A block's whole work: one thread fills the ring, the warp groups behind it call compute(ring, place) for every tile.
template <class C, typename Compute>
__device__ inline void hopper_block(const HopperProduct& product, const Compute& compute) {
    HopperRing<C> ring;
    hopper_begin<C>(ring);
    if (threadIdx.x < kGroupThreads) {
        fewer_registers();
        if (threadIdx.x == 0) {
            hopper_fill<C>(product);
        }
        return;
    }
    more_registers();
    HopperWalk<C> walk(product);
    HopperTilePlace place;
    for (uint32_t tile = blockIdx.x; walk.find(tile, place); tile += gridDim.x) {
        compute(ring, place);
    }
}

#endif  // SHUNTYARD_ON_HOPPER

template <class C>
__global__ void __launch_bounds__(kHopperThreads, 1)
    hopper_product([[maybe_unused]] SHUNTYARD_TABLE(HopperProduct) product,
                   [[maybe_unused]] SHUNTYARD_TABLE(typename C::Scales) scales) {
#if SHUNTYARD_ON_HOPPER
    const int group = static_cast<int>(threadIdx.x / kGroupThreads) - 1;
    hopper_block<C>(product, [&](HopperRing<C>& ring, const HopperTilePlace& place) {
        float sums[C::kSums];
        hopper_bring_scales<C>(product, scales, place, group);
        hopper_sum<C>(product, ring, group, sums);
        hopper_finish<C>(product, scales, place, group, sums);
    });
#elif defined(__CUDA_ARCH__)
    __trap();  // never launched there
#endif
}

template <class C, typename Kernel, typename Scales>
int launch_hopper_kernel(Kernel kernel, const HopperProduct& product, const Scales& scales, int multiprocessors,
                         void* stream) {
    // No expert's last tile is counted twice: at most one more than whole tiles for each expert that has rows.
    const int64_t with_rows = product.experts < product.all_rows ? product.experts : product.all_rows;
    const int64_t tiles = (product.all_rows / C::kRows + with_rows) * ceil_div(product.columns, C::kOutColumns);
    if (tiles > INT_MAX || product.inner > INT_MAX - 256 || product.columns > INT_MAX - 256) {
        return SHUNTYARD_UNSUPPORTED_TACTIC;
    }
    Shape shape{grid_of(tiles < multiprocessors ? tiles : multiprocessors), dim3(kHopperThreads)};
    shape.shared = C::kShared;
    return launch(kernel, shape, stream, product, scales);
}

template <class C>
int launch_hopper(const HopperProduct& product, const typename C::Scales& scales, int multiprocessors, void* stream) {
    return launch_hopper_kernel<C>(hopper_product<C>, product, scales, multiprocessors, stream);
}

}  // namespace shuntyard
