// Dummy values, bit for bit those that the host draws: 16 bits each from a ChaCha8 stream, uniform in a bound.
#include "common.cuh"

__device__ __forceinline__ uint32_t rotate(uint32_t v, int by) { return v << by | v >> (32 - by); }

__device__ __forceinline__ void quarter(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
    a += b, d = rotate(d ^ a, 16);
    c += d, b = rotate(b ^ c, 12);
    a += b, d = rotate(d ^ a, 8);
    c += d, b = rotate(b ^ c, 7);
}

struct Key {
    uint32_t words[8];
};

// Each thread makes one 64-byte block of the stream, 32 values; `skip` values of the stream come before `out`.
extern "C" __global__ void draw(Key key, unsigned long long skip, bf16* __restrict__ out, unsigned long long count,
                                float scale, float centre) {
    unsigned long long counter = skip / 32 + blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x;
    if (counter * 32 >= skip + count) return;
    uint32_t start[16] = {0x61707865u, 0x3320646eu, 0x79622d32u, 0x6b206574u};
#pragma unroll
    for (int i = 0; i < 8; i++) start[4 + i] = key.words[i];
    start[12] = (uint32_t)counter;
    start[13] = (uint32_t)(counter >> 32);
    start[14] = start[15] = 0;
    uint32_t s[16];
#pragma unroll
    for (int i = 0; i < 16; i++) s[i] = start[i];
#pragma unroll
    for (int round = 0; round < 4; round++) {
        quarter(s[0], s[4], s[8], s[12]);
        quarter(s[1], s[5], s[9], s[13]);
        quarter(s[2], s[6], s[10], s[14]);
        quarter(s[3], s[7], s[11], s[15]);
        quarter(s[0], s[5], s[10], s[15]);
        quarter(s[1], s[6], s[11], s[12]);
        quarter(s[2], s[7], s[8], s[13]);
        quarter(s[3], s[4], s[9], s[14]);
    }
    // Where the block's first value goes: before `out` in a first block that is used in part.
    long long at = (long long)(counter * 32) - (long long)skip;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        uint32_t word = s[i] + start[i];
        float low = __fadd_rn(__fmul_rn((float)(int16_t)(word & 0xffffu) + 0.5f, scale), centre);
        float high = __fadd_rn(__fmul_rn((float)(int16_t)(word >> 16) + 0.5f, scale), centre);
        long long j = at + 2 * i;
        if (j >= 0 && j < (long long)count) out[j] = __float2bfloat16_rn(low);
        if (j + 1 >= 0 && j + 1 < (long long)count) out[j + 1] = __float2bfloat16_rn(high);
    }
}
