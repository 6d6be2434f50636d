// Reads words that lie in page-locked host memory.
#include "common.cuh"

// to[i] = from[i], 16 bytes a thread; `from` is host memory, and is read past the caches: the host writes it anew
// for every step.
extern "C" __global__ void read_host_words(const uint4* from, uint4* to, uint32_t count) {
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) to[i] = __ldcv(from + i);
}
