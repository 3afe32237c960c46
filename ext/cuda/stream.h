// The type of a CUDA stream, for headers that are read without a CUDA toolkit. The same declaration as NVIDIA's.
#pragma once

struct CUstream_st;
typedef struct CUstream_st* cudaStream_t;
