// What the memory gives: reads everything once.
#include "common.cuh"

// Sums 16-byte words of `from` so that nothing is left out; `out` gets one number a block.
extern "C" __global__ void read_all(const uint4* __restrict__ from, unsigned long long count,
                                    uint32_t* __restrict__ out) {
    uint32_t sum = 0;
    unsigned long long step = (unsigned long long)gridDim.x * blockDim.x;
    unsigned long long i = blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x;
    for (; i + 3 * step < count; i += 4 * step) {
        uint4 a = from[i], b = from[i + step], c = from[i + 2 * step], d = from[i + 3 * step];
        sum += a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w;
        sum += c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^ d.w;
    }
    for (; i < count; i += step) {
        uint4 a = from[i];
        sum += a.x ^ a.y ^ a.z ^ a.w;
    }
    if (sum == 0x9e3779b9u) out[blockIdx.x] = sum;
}
