// Positions into queries and keys, keys and values into the paged cache: one pass over `qkv`.
#include "rope_kv.cuh"

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
    if (ROTATE && head < a.heads + a.kv_heads) rotate(angles_of<HD>(a, row, i), low, high);
    bf16* to = from;
    if (head >= a.heads) {
        uint32_t kv_head = head - a.heads;
        bf16* cache = a.keys;
        if (kv_head >= a.kv_heads) kv_head -= a.kv_heads, cache = a.values;
        to = in_cache<HD>(a, cache, kv_row, kv_head) + i * 8;
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
