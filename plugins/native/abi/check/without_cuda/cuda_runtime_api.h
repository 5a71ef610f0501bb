// For the check alone, where CUDA is not installed: TensorRT's headers name these types and look no further into them.
#pragma once

typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;
