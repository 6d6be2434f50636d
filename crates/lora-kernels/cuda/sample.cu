// The likeliest token of each row of logits, the lowest id on ties.
#include "common.cuh"

// A float's order as an unsigned integer's; adding zero makes one of both zeros, which are as likely.
__device__ __forceinline__ uint32_t ordered(float v) {
    uint32_t bits = __float_as_uint(v + 0.f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// best[row] = max over the row of (logit, lowest id first), packed; several blocks share a row. `best` must be
// zero before. `allowed` has a bit for each id that may come out, or is null.
extern "C" __global__ void argmax_rows(const float* logits, const uint32_t* __restrict__ allowed,
                                       unsigned long long* best, uint32_t vocab) {
    let_next_begin();
    wait_for_previous();
    const float* row = logits + size_t(blockIdx.y) * vocab;
    unsigned long long mine = 0;
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < vocab; i += gridDim.x * blockDim.x) {
        float v = row[i];
        bool may = !allowed || (allowed[i >> 5] >> (i & 31) & 1);
        if (may && v == v) {
            unsigned long long key = (unsigned long long)ordered(v) << 32 | (0xffffffffu - i);
            mine = key > mine ? key : mine;
        }
    }
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
        unsigned long long other = __shfl_xor_sync(0xffffffffu, mine, o);
        mine = other > mine ? other : mine;
    }
    if ((threadIdx.x & 31) == 0 && mine) atomicMax(best + blockIdx.y, mine);
}

// ids[j] = the id in best[j], which is cleared for the next step.
extern "C" __global__ void take_tokens(unsigned long long* best, uint32_t* ids, uint32_t rows) {
    let_next_begin();
    wait_for_previous();
    uint32_t j = blockIdx.x * blockDim.x + threadIdx.x;
    if (j >= rows) return;
    ids[j] = 0xffffffffu - (uint32_t)best[j];
    best[j] = 0;
}
