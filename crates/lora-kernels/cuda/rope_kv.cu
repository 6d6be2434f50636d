// Positions into queries and keys, keys and values into the paged cache: one pass over `qkv`.
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

// One thread takes 8 elements of a head's first half and the 8 that they pair with: i with i + head_dim / 2.
// blockIdx.x is the row. Without rotation queries stay as they are, so those threads are not launched.
template <int HD, bool ROTATE>
__device__ __forceinline__ void rope_kv(const RopeKvArguments& a) {
    constexpr uint32_t UNITS = HD / 16;
    let_next_begin();
    uint32_t row = blockIdx.x;
    uint32_t unit = blockIdx.y * blockDim.x + threadIdx.x;
    uint32_t head = unit / UNITS + (ROTATE ? 0 : a.heads), i = unit % UNITS;
    uint32_t kv_row = a.kv_rows[row];
    // Threads without work wait too: see common.cuh.
    wait_for_previous();
    if (head >= a.heads + 2 * a.kv_heads || kv_row >= a.cache_rows) return;
    bf16* from = a.qkv + size_t(row) * (a.heads + 2 * a.kv_heads) * HD + head * HD + i * 8;
    Bf16x8 low = *reinterpret_cast<const Bf16x8*>(from);
    Bf16x8 high = *reinterpret_cast<const Bf16x8*>(from + HD / 2);
    if (ROTATE && head < a.heads + a.kv_heads) {
        // Positions are checked on the host: this keeps a broken one from reading elsewhere.
        uint32_t position = min(a.positions[row], a.table_rows - 1);
        const float4* angles = reinterpret_cast<const float4*>(a.table + size_t(position) * HD) + i * 4;
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
    bf16* to = from;
    if (head >= a.heads) {
        uint32_t kv_head = head - a.heads;
        bf16* cache = a.keys;
        if (kv_head >= a.kv_heads) kv_head -= a.kv_heads, cache = a.values;
        uint32_t block = kv_row >> a.block_shift, offset = kv_row & ((1u << a.block_shift) - 1);
        size_t at = ((size_t(block) * a.kv_heads + kv_head) << a.block_shift) + offset;
        to = cache + at * HD + i * 8;
    }
    *reinterpret_cast<Bf16x8*>(to) = low;
    *reinterpret_cast<Bf16x8*>(to + HD / 2) = high;
}

#define ROPE_KV(HD)                                                                                        \
    extern "C" __global__ void rope_kv_##HD(const RopeKvArguments a) { rope_kv<HD, true>(a); }             \
    extern "C" __global__ void store_kv_##HD(const RopeKvArguments a) { rope_kv<HD, false>(a); }
ROPE_KV(32)
ROPE_KV(64)
ROPE_KV(128)
