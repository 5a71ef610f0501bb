// In place of the kernels in a library that is built without nvcc: it parses, builds and serialises, and says why it
// does not run. Workspaces are 0 bytes; nothing would use them.
#include "shuntyard_plugins.h"

size_t shuntyard_moe_routing_workspace(int64_t, int64_t, int64_t) { return 0; }

int shuntyard_moe_routing(const float*, float*, int32_t*, int32_t*, int64_t, int64_t, int64_t, void*, size_t, void*) {
    return SHUNTYARD_NO_KERNELS;
}

size_t shuntyard_moe_experts_workspace(int, int, int64_t, int64_t, int64_t, int64_t) { return 0; }

int shuntyard_moe_experts(int, const shuntyard_expert_weights*, const void*, const float*, const int32_t*,
                          const int32_t*, void*, int64_t, int64_t, int64_t, int64_t, int64_t, int, void*, size_t,
                          void*) {
    return SHUNTYARD_NO_KERNELS;
}

int shuntyard_moe_experts_tactics(int, const shuntyard_expert_weights*, int64_t, int64_t, int64_t, int64_t, int64_t,
                                  int32_t*) {
    return SHUNTYARD_NO_KERNELS;
}

const char* shuntyard_tactic_name(int) { return "none: there are no kernels"; }

size_t shuntyard_moe_scatter_add_workspace(int64_t, int64_t) { return 0; }

int shuntyard_moe_scatter_add(int, const void*, const void*, const int32_t*, void*, int64_t, int64_t, int64_t, void*,
                              size_t, void*) {
    return SHUNTYARD_NO_KERNELS;
}
