// What the attention kernels share: the paged cache and its rows in shared memory.
#pragma once
#include "common.cuh"

// One layer's cache and the step's sequences, as src/attention.rs lays it out.
struct Paged {
    const bf16* keys;          // [blocks, kv_heads, block_size, head_dim]
    const bf16* values;        // the same
    const uint32_t* places;    // [sequences]
    const uint32_t* contexts;  // [sequences] tokens in the cache, this step's included
    const uint32_t* tables;    // [place_count, blocks_per_seq]
    uint32_t blocks, kv_heads, block_shift, blocks_per_seq, place_count;

    // Tables, places and contexts are the scheduler's: the three bounds keep a broken one from reading
    // outside the cache.
    __device__ __forceinline__ uint32_t context(uint32_t sequence) const {
        return min(contexts[sequence], blocks_per_seq << block_shift);
    }
    __device__ __forceinline__ const uint32_t* table(uint32_t sequence) const {
        return tables + size_t(min(places[sequence], place_count - 1)) * blocks_per_seq;
    }
    // Where `token` lies, in rows of head_dim elements, when its block is `block`.
    __device__ __forceinline__ uint32_t row(uint32_t block, uint32_t kv_head, uint32_t token) const {
        uint32_t offset = token & ((1u << block_shift) - 1);
        return ((min(block, blocks - 1) * kv_heads + kv_head) << block_shift) + offset;
    }
};

// Of both prefill kernels.
struct PrefillArguments {
    Paged paged;
    const bf16* q;           // [rows, q_width]
    bf16* out;               // [rows, heads * head_dim]
    const uint32_t* starts;  // [sequences + 1] first rows
    const uint32_t* tiles;   // [gridDim.y, 2]: sequence, first row within it
    const uint32_t* count;   // how many tiles are real
    uint32_t q_width, heads, rows;
    float scale;  // of scores, times log2(e)
};

// Element offset of the 16-byte piece `piece` of row `row` in a tile of rows of HD elements. Pieces are
// permuted within a row so that the 8 rows that one ldmatrix phase reads at one piece lie in different banks.
template <int HD>
__device__ __forceinline__ uint32_t swizzled(uint32_t row, uint32_t piece) {
    // Rows of 128 bytes or more begin at bank 0; two rows of 64 bytes share the banks.
    uint32_t turn = HD >= 64 ? row & 7 : (row >> 1) & 3;
    return row * HD + ((piece ^ turn) << 3);
}

__device__ __forceinline__ uint32_t pack2(float low, float high) {
    __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&v);
}

// 2^x; -inf gives 0.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
    return y;
}

constexpr float MINUS_INFINITY = -__builtin_huge_valf();
