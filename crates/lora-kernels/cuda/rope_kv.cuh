// Rotation and places in the paged cache: what both kernels share that write keys and values.
#pragma once
#include "common.cuh"

struct RopeKvArguments {
    bf16* qkv;                  // [n, (heads + 2 * kv_heads) * head_dim]: queries, keys, values
    bf16* keys;                 // [blocks, kv_heads, block_size, head_dim]
    bf16* values;               // the same
    const float* table;         // [positions, head_dim / 2, 2]: cosine, sine; unused without rotation
    const uint32_t* positions;  // [n]
    const uint32_t* kv_rows;    // [n]: block * block_size + offset; what is past the cache is padding
    uint32_t heads, kv_heads, block_shift, cache_rows, table_rows;
};

// Cosines and sines for 8 elements of a row's heads, from their `8 * i`th on.
template <int HD>
__device__ __forceinline__ const float4* angles_of(const RopeKvArguments& a, uint32_t row, uint32_t i) {
    // Positions are checked on the host: this keeps a broken one from reading elsewhere.
    uint32_t position = min(a.positions[row], a.table_rows - 1);
    return reinterpret_cast<const float4*>(a.table + size_t(position) * HD) + i * 4;
}

// Rotates 8 elements of a head's first half by their angles, and the 8 that they pair with.
__device__ __forceinline__ void rotate(const float4* angles, Bf16x8& low, Bf16x8& high) {
    float x[8], y[8];
    unpack(low, x);
    unpack(high, y);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float4 f = angles[j];  // cosine and sine of pair 2j, then of pair 2j + 1
        float x0 = x[2 * j], y0 = y[2 * j], x1 = x[2 * j + 1], y1 = y[2 * j + 1];
        x[2 * j] = x0 * f.x - y0 * f.y;
        y[2 * j] = y0 * f.x + x0 * f.y;
        x[2 * j + 1] = x1 * f.z - y1 * f.w;
        y[2 * j + 1] = y1 * f.z + x1 * f.w;
    }
    low = pack(x);
    high = pack(y);
}

// Where a row's head begins in `cache`, which is the keys or the values.
template <int HD>
__device__ __forceinline__ bf16* in_cache(const RopeKvArguments& a, bf16* cache, uint32_t kv_row, uint32_t kv_head) {
    uint32_t block = kv_row >> a.block_shift, offset = kv_row & ((1u << a.block_shift) - 1);
    return cache + (((size_t(block) * a.kv_heads + kv_head) << a.block_shift) + offset) * HD;
}
