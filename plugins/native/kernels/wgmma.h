// Warp-group products, one instruction each. Included by kernels/primitives.h, where they are explained.
//
// An instruction names every register that it works on, so the lists are written out once for each width.
#define SHUNTYARD_D8(i)                                                                                         \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define SHUNTYARD_D32(i) SHUNTYARD_D8(i), SHUNTYARD_D8(i + 8), SHUNTYARD_D8(i + 16), SHUNTYARD_D8(i + 24)

#define SHUNTYARD_NAMES_32                                                   \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15," \
    " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"

#define SHUNTYARD_NAMES_64                                                             \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"           \
    " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31," \
    " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47," \
    " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"

#define SHUNTYARD_NAMES_128                                                                        \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"                       \
    " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31,"             \
    " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47,"             \
    " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63,"             \
    " %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79,"             \
    " %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95,"             \
    " %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111," \
    " %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}"

// d = a * b, or d += a * b.
template <Operand kOperand, Major kMajor, int kColumns>
struct GroupProduct;

#define SHUNTYARD_WGMMA(kind, major, columns, instruction, names, a, b, p, tail, ...)                                \
    template <>                                                                                                      \
    struct GroupProduct<Operand::kind, Major::major, columns> {                                                      \
        __device__ static void multiply(float* d, uint64_t left, uint64_t right, bool accumulate) {                  \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " p                                                       \
                         ", 0;\n"                                                                                    \
                         "wgmma.mma_async.sync.aligned." instruction " " names ", " a ", " b ", p, 1, 1" tail ";\n}" \
                         : __VA_ARGS__                                                                               \
                         : "l"(left), "l"(right), "r"(static_cast<int32_t>(accumulate)));                            \
        }                                                                                                            \
    };

SHUNTYARD_WGMMA(kE4m3, kK, 64, "m64n64k32.f32.e4m3.e4m3", SHUNTYARD_NAMES_32, "%32", "%33", "%34", "", SHUNTYARD_D32(0))
SHUNTYARD_WGMMA(kE4m3, kK, 128, "m64n128k32.f32.e4m3.e4m3", SHUNTYARD_NAMES_64, "%64", "%65", "%66", "",
                SHUNTYARD_D32(0), SHUNTYARD_D32(32))
SHUNTYARD_WGMMA(kHalf, kK, 128, "m64n128k16.f32.f16.f16", SHUNTYARD_NAMES_64, "%64", "%65", "%66", ", 0, 0",
                SHUNTYARD_D32(0), SHUNTYARD_D32(32))
SHUNTYARD_WGMMA(kHalf, kN, 128, "m64n128k16.f32.f16.f16", SHUNTYARD_NAMES_64, "%64", "%65", "%66", ", 0, 1",
                SHUNTYARD_D32(0), SHUNTYARD_D32(32))
SHUNTYARD_WGMMA(kHalf, kK, 256, "m64n256k16.f32.f16.f16", SHUNTYARD_NAMES_128, "%128", "%129", "%130", ", 0, 0",
                SHUNTYARD_D32(0), SHUNTYARD_D32(32), SHUNTYARD_D32(64), SHUNTYARD_D32(96))
SHUNTYARD_WGMMA(kHalf, kN, 256, "m64n256k16.f32.f16.f16", SHUNTYARD_NAMES_128, "%128", "%129", "%130", ", 0, 1",
                SHUNTYARD_D32(0), SHUNTYARD_D32(32), SHUNTYARD_D32(64), SHUNTYARD_D32(96))
SHUNTYARD_WGMMA(kBfloat, kK, 128, "m64n128k16.f32.bf16.bf16", SHUNTYARD_NAMES_64, "%64", "%65", "%66", ", 0, 0",
                SHUNTYARD_D32(0), SHUNTYARD_D32(32))
SHUNTYARD_WGMMA(kBfloat, kN, 128, "m64n128k16.f32.bf16.bf16", SHUNTYARD_NAMES_64, "%64", "%65", "%66", ", 0, 1",
                SHUNTYARD_D32(0), SHUNTYARD_D32(32))
SHUNTYARD_WGMMA(kBfloat, kK, 256, "m64n256k16.f32.bf16.bf16", SHUNTYARD_NAMES_128, "%128", "%129", "%130", ", 0, 0",
                SHUNTYARD_D32(0), SHUNTYARD_D32(32), SHUNTYARD_D32(64), SHUNTYARD_D32(96))
SHUNTYARD_WGMMA(kBfloat, kN, 256, "m64n256k16.f32.bf16.bf16", SHUNTYARD_NAMES_128, "%128", "%129", "%130", ", 0, 1",
                SHUNTYARD_D32(0), SHUNTYARD_D32(32), SHUNTYARD_D32(64), SHUNTYARD_D32(96))

#undef SHUNTYARD_WGMMA

// The same with the left operand [64, 16] in registers: those of each warp as multiply() has them, for its 16 rows.
// They must stay as they are until the product has been waited for (keep_operands).
template <Operand kOperand, int kColumns>
struct RegisterProduct;

#define SHUNTYARD_WGMMA(kind, columns, instruction, names, a, b, p, ...)                                        \
    template <>                                                                                                 \
    struct RegisterProduct<Operand::kind, columns> {                                                            \
        __device__ static void multiply(float* d, const uint32_t (&left)[4], uint64_t right, bool accumulate) { \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " p                                                  \
                         ", 0;\n"                                                                               \
                         "wgmma.mma_async.sync.aligned." instruction " " names ", " a ", " b ", p, 1, 1, 0;\n}" \
                         : __VA_ARGS__                                                                          \
                         : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right),                  \
                           "r"(static_cast<int32_t>(accumulate)));                                              \
        }                                                                                                       \
    };
SHUNTYARD_WGMMA(kHalf, 64, "m64n64k16.f32.f16.f16", SHUNTYARD_NAMES_32, "{%32, %33, %34, %35}", "%36", "%37",
                SHUNTYARD_D32(0))
SHUNTYARD_WGMMA(kHalf, 128, "m64n128k16.f32.f16.f16", SHUNTYARD_NAMES_64, "{%64, %65, %66, %67}", "%68", "%69",
                SHUNTYARD_D32(0), SHUNTYARD_D32(32))
SHUNTYARD_WGMMA(kBfloat, 64, "m64n64k16.f32.bf16.bf16", SHUNTYARD_NAMES_32, "{%32, %33, %34, %35}", "%36", "%37",
                SHUNTYARD_D32(0))
SHUNTYARD_WGMMA(kBfloat, 128, "m64n128k16.f32.bf16.bf16", SHUNTYARD_NAMES_64, "{%64, %65, %66, %67}", "%68", "%69",
                SHUNTYARD_D32(0), SHUNTYARD_D32(32))

#undef SHUNTYARD_WGMMA
#undef SHUNTYARD_NAMES_32
#undef SHUNTYARD_NAMES_64
#undef SHUNTYARD_NAMES_128
#undef SHUNTYARD_D32
#undef SHUNTYARD_D8
