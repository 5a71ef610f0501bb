// The C interface of the plugin library: each kernel on raw device pointers and a stream, without TensorRT.
//
// Shapes and arithmetic: plugins/contract.py. All tensors are dense and row-major. Launches only enqueue work: they
// allocate nothing, wait for nothing, and report what the launch itself reports. They return 0, a positive CUDA error
// code, or one of the negative codes below. With no tokens (T = 0) routing still writes its offsets (all 0); the other
// two have nothing to write and launch nothing.
//
// T * K is at most 2^31 - 1, H and F at most 8,388,480. Tensors are on the device that is current, and the stream is
// one of its; pointers to them are not looked at, but that a list of weights is there.
//
// Index inputs are made by the routing op and trusted to be so, but only so far: whatever they hold, no kernel touches
// memory outside its tensors (TensorRT times plugins on inputs of arbitrary content), and a row or token that broken
// indices leave without a value is NaN, never stale memory.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SHUNTYARD_API __attribute__((visibility("default")))

// Of this header. A library is of the same if its shuntyard_build_info() says so, as "abi_version".
#define SHUNTYARD_ABI_VERSION 4

enum shuntyard_type {
    SHUNTYARD_FP32 = 0,
    SHUNTYARD_FP16 = 1,
    SHUNTYARD_BF16 = 2,
    SHUNTYARD_E4M3 = 3,  // FP8; weights of experts only
    SHUNTYARD_INT4 = 4,  // 8 in an int32, the lowest nibble first, stored as value + 8; weights of experts only
};

enum shuntyard_status {
    SHUNTYARD_OK = 0,
    SHUNTYARD_INVALID_ARGUMENT = -1,  // an extent, a type, a form of weights or a top_k that cannot be
    SHUNTYARD_WORKSPACE_TOO_SMALL = -2,
    SHUNTYARD_NO_KERNELS = -3,          // the library was built without nvcc
    SHUNTYARD_UNSUPPORTED_TACTIC = -4,  // the kernels asked for do not take such weights or extents, or this device
};

// A JSON object: version, abi_version, cuda (the version of nvcc, or null), cuda_source, architectures: the compute
// capabilities that there is code for. The last one's runs on newer devices, too; no other device runs any kernel.
SHUNTYARD_API const char* shuntyard_build_info(void);

// What a status says, in words. Never null.
SHUNTYARD_API const char* shuntyard_status_text(int status);

// logits f32 [T, E] -> scores f32 [T*K], expert_offsets i32 [E+1], permutation i32 [T*K].
// A NaN logit breaks the contract; it ranks behind every number.
SHUNTYARD_API size_t shuntyard_moe_routing_workspace(int64_t tokens, int64_t experts, int64_t top_k);
SHUNTYARD_API int shuntyard_moe_routing(const float* logits, float* scores, int32_t* expert_offsets,
                                        int32_t* permutation, int64_t tokens, int64_t experts, int64_t top_k,
                                        void* workspace, size_t workspace_size, void* stream);

// How the weights of the experts are cut: contract.LAYOUTS.
enum shuntyard_layout {
    SHUNTYARD_FUSED = 0,   // gate_up [E, H, 2F] (gate first), down [E, F, H]
    SHUNTYARD_SPLIT = 1,   // E times gate_up [H, 2F], E times down [F, H]
    SHUNTYARD_LINEAR = 2,  // E times gate [F, H], E times up [F, H], E times down [H, F]
};

// What becomes of the rows before a product: contract.ACTIVATIONS. Quantised ones need weights of E4M3.
enum shuntyard_activations {
    SHUNTYARD_AS_THEY_ARE = 0,  // multiplied as they are
    SHUNTYARD_STATIC = 1,       // E4M3 numbers; a scale is given for each weight in the list
    SHUNTYARD_DYNAMIC = 2,      // E4M3 numbers; each row makes its own scale
};

// What one scale belongs to: contract.QUANTIZATIONS.
enum shuntyard_scaling {
    SHUNTYARD_UNSCALED = 0,     // weights of FP32, FP16 or BF16
    SHUNTYARD_PER_TENSOR = 1,   // E4M3; one scale for each weight in the list
    SHUNTYARD_PER_CHANNEL = 2,  // E4M3; one for each out channel, and each expert
    SHUNTYARD_PER_GROUP = 3,    // INT4 of layout LINEAR; scales [out, in / group_size]; in is a multiple of 8, too
};

// The weights of all experts. The lists are on the host, what they point to is on the device. A kernel gets them by
// value, so they may be gone when the call returns.
struct shuntyard_expert_weights {
    int layout;
    int type;
    int scaling;
    int scale_type;              // FP32, FP16 or BF16; of no meaning if unscaled
    int64_t group_size;          // of no meaning but per group
    const void* const* weights;  // 2, 2E or 3E, by the layout
    const void* const* scales;   // as many; of no meaning if unscaled
    int activations;
    int activation_scale_type;             // FP32, FP16 or BF16; of no meaning but if static
    const void* const* activation_scales;  // as many as weights, of 1 element each; of no meaning but if static
};

enum {
    SHUNTYARD_MAX_EXPERTS = 512
};

// Which kernels compute the experts. All give what contract.py says, to the tolerance of the format.
enum shuntyard_tactic {
    SHUNTYARD_BY_SHAPE = 0,  // one of the others, by a table
    SHUNTYARD_PLAIN = 1,     // any form and extents, any device that the library has code for
    SHUNTYARD_DIRECT_8 =
        2,  // mma, compute capability 8.9 and later; weights go straight into registers; so many tokens a tile
    SHUNTYARD_DIRECT_16 = 3,
    SHUNTYARD_DIRECT_32 = 4,
    SHUNTYARD_DIRECT_64 = 5,
    SHUNTYARD_HOPPER_64 = 6,  // TMA and wgmma, compute capability 9.0; so many rows a tile
    SHUNTYARD_HOPPER_128 = 7,
    SHUNTYARD_HOPPER_WIDE = 8,  // 128 rows, and of quantised activations twice the columns
    SHUNTYARD_LAST_TACTIC = SHUNTYARD_HOPPER_WIDE,
};

// What a tactic is called. Never null.
SHUNTYARD_API const char* shuntyard_tactic_name(int tactic);

// The tactics that compute such a call on the current device, if all pointers are multiples of 16: at most
// SHUNTYARD_LAST_TACTIC of them are written to `tactics`, and counted. Lists of weights are not looked at. A negative
// status for a call that cannot be; 0 if there is no device.
SHUNTYARD_API int shuntyard_moe_experts_tactics(int x_type, const struct shuntyard_expert_weights* weights,
                                                int64_t tokens, int64_t experts, int64_t top_k, int64_t hidden,
                                                int64_t intermediate, int32_t* tactics);

// x [T, H], scores f32 [T*K], expert_offsets i32 [E+1], permutation i32 [T*K], weights -> rows [T*K, H] of x's type.
// SHUNTYARD_UNSUPPORTED_TACTIC if the tactic does not compute such a call; BY_SHAPE always does.
// The workspace is on the device and a multiple of 256. It holds these arrays, each padded to a multiple of 256 bytes:
// scaled inputs [T*K, H] of x's type, unless activations are quantised; hidden rows [T*K, F] of x's type; if
// activations are quantised, the E4M3 codes of both, of 1 byte each; codes of the inputs once more if static, for up
// (gate and up may have scales of their own); f32 [T*K], the factors, if dynamic; unless x is fp32, 192 KiB of
// descriptors. 0 bytes for extents or activations that cannot be.
SHUNTYARD_API size_t shuntyard_moe_experts_workspace(int x_type, int activations, int64_t tokens, int64_t top_k,
                                                     int64_t hidden, int64_t intermediate);
SHUNTYARD_API int shuntyard_moe_experts(int x_type, const struct shuntyard_expert_weights* weights, const void* x,
                                        const float* scores, const int32_t* expert_offsets, const int32_t* permutation,
                                        void* rows, int64_t tokens, int64_t experts, int64_t top_k, int64_t hidden,
                                        int64_t intermediate, int tactic, void* workspace, size_t workspace_size,
                                        void* stream);

// base [T, H], rows [T*K, H], permutation i32 [T*K] -> out [T, H]. out may be base.
SHUNTYARD_API size_t shuntyard_moe_scatter_add_workspace(int64_t tokens, int64_t top_k);
SHUNTYARD_API int shuntyard_moe_scatter_add(int type, const void* base, const void* rows, const int32_t* permutation,
                                            void* out, int64_t tokens, int64_t top_k, int64_t hidden, void* workspace,
                                            size_t workspace_size, void* stream);

#ifdef __cplusplus
}
#endif
