// The expand of segments of many rows together with what reads its output next: SiLU and product, or positions
// and the cache. On its own an expand reads and writes the whole output, and the kernel after it reads that
// again; here the output is read once. Results are those of the two kernels, to the bit: sums are rounded to
// bf16 in shared memory where the expand would round them in device memory.
//
// Blocks walk covers: tiles that hold every row of the batch, since rows without a large segment's adapter go the same
// way, with nothing added. Those have no matrices; covers of no rows are padding.
#include "lora_tile.cuh"
#include "rope_kv.cuh"

namespace {

constexpr uint32_t COLUMNS = OutTile<bf16>::COLUMNS;
constexpr uint32_t OUT_TILE = ROWS * 16;

// Shared memory of one target's Bt and h, in elements.
__device__ __forceinline__ uint32_t factors(uint32_t pitch) { return pitch * COLUMNS + ROWS * h_tile_pitch(pitch); }

// Whether a cover's rows have an adapter; the targets' layer of it is there then. Every thread of a block calls it, with
// the same cover.
__device__ __forceinline__ bool has_adapter(const Segment& cover, const Targets& targets) {
    if (cover.matrices == nullptr) return false;
    await_arrival(cover, targets);
    return true;
}

}  // namespace

// act[row, column] = silu(gate) * up, where gate and up are `gate_up`'s halves with their adapters' products
// added. Grid: column tiles of `inter`; covers.
extern "C" __global__ void __launch_bounds__(THREADS)
lora_expand_silu_mul(const Segment* covers, const __grid_constant__ Targets targets, uint32_t inputs, uint32_t pitch,
                     size_t plane, const bf16* h, const bf16* gate_up, bf16* act, uint32_t inter) {
    // Gate's tile and up's, then their factors.
    extern __shared__ uint4 shared[];
    bf16* const of_targets = reinterpret_cast<bf16*>(shared + 2 * OUT_TILE);
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Segment cover = covers[blockIdx.y];
    // Blocks without work wait too: what follows this kernel relies on the shrink's being over.
    if (cover.rows == 0) return wait_for_previous();
    const uint32_t column_0 = blockIdx.x * COLUMNS, columns = min(COLUMNS, inter - column_0);
    const bool adapted = has_adapter(cover, targets);
    const bf16* parts[2];
#pragma unroll
    for (int t = 0; t < 2; t++) {
        const Target& target = targets.of[t];
        parts[t] = adapted ? lora_part(cover, target) : nullptr;
        load_out(shared + t * OUT_TILE, gate_up + static_cast<size_t>(cover.start) * 2 * inter + target.column + column_0,
                 cover.rows, columns, 2 * inter);
        if (parts[t] != nullptr) {
            load_bt<bf16>(of_targets + t * factors(pitch), parts[t], cover, inputs, inter, column_0, columns);
        }
    }
    wait_for_previous();
#pragma unroll
    for (int t = 0; t < 2; t++) {
        if (parts[t] == nullptr) continue;
        load_h(of_targets + t * factors(pitch) + pitch * COLUMNS,
               h + t * plane + static_cast<size_t>(cover.start) * pitch, cover.rows, whole_ranks(cover), pitch);
    }
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    bf16* const tiles = reinterpret_cast<bf16*>(shared);
    for (uint32_t column = 0; column < columns; column += 32) {
        Sums sums[2];
#pragma unroll
        for (int t = 0; t < 2; t++) {
            const bf16* bt = of_targets + t * factors(pitch);
            sums[t].load(tiles + t * OUT_TILE * 8, column);
            if (parts[t] != nullptr) sums[t].add<bf16>(bt, bt + pitch * COLUMNS, whole_ranks(cover), column);
        }
#pragma unroll
        for (int n = 0; n < 4; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                // Rounded as the expand's output is.
                const float g = round_bf16(sums[0].of[n][i]), u = round_bf16(sums[1].of[n][i]);
                sums[0].of[n][i] = silu(g) * u;
            }
        }
        sums[0].store(tiles, column);
    }
    // A warp reads only rows that it has worked on itself.
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const uint32_t row = warp * 16 + i * 2 + lane / 16, piece = lane % 16;
        if (row >= cover.rows || piece * 8 >= columns) continue;
        bf16* const to = act + static_cast<size_t>(cover.start + row) * inter + column_0 + piece * 8;
        *reinterpret_cast<uint4*>(to) = shared[OutTile<bf16>::piece(row, piece)];
    }
}

namespace {

// What rope_kv does, of queries, keys and values with their adapters' products added. Grid: column tiles of the
// widest of them; queries, keys, values; covers, padding last. `a.qkv` keeps keys and values as they were.
template <int HD>
__device__ __forceinline__ void expand_rope_kv(const Segment* covers, const Targets& targets, uint32_t inputs,
                                               uint32_t pitch, size_t plane, const bf16* h, const RopeKvArguments& a) {
    // The output's tile, then Bt's and h's.
    extern __shared__ uint4 shared[];
    bf16* const bt_tile = reinterpret_cast<bf16*>(shared + OUT_TILE);
    bf16* const h_tile = bt_tile + pitch * COLUMNS;
    const Target& target = targets.of[blockIdx.y];
    const uint32_t column_0 = blockIdx.x * COLUMNS;
    const Segment cover = covers[blockIdx.z];
    if (column_0 >= target.outputs || cover.rows == 0) return wait_for_previous();
    const uint32_t columns = min(COLUMNS, target.outputs - column_0);
    const uint32_t width = (a.heads + 2 * a.kv_heads) * HD;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    bf16* const out = a.qkv + static_cast<size_t>(cover.start) * width + target.column + column_0;
    const bf16* part = has_adapter(cover, targets) ? lora_part(cover, target) : nullptr;
    load_out(shared, out, cover.rows, columns, width);
    if (part != nullptr) load_bt<bf16>(bt_tile, part, cover, inputs, target.outputs, column_0, columns);
    // Eight lanes take a row: 8 elements of a head's first half each, and the 8 that they pair with.
    constexpr uint32_t UNITS = HD / 16;
    const uint32_t head = lane % 8 / UNITS, i = lane % UNITS, low_piece = head * (HD / 8) + i;
    uint32_t kv_rows[4];
    const float4* angles[4];
#pragma unroll
    for (int turn = 0; turn < 4; turn++) {
        const uint32_t row = warp * 16 + turn * 4 + lane / 8;
        kv_rows[turn] = row < cover.rows && low_piece * 8 < columns ? a.kv_rows[cover.start + row] : a.cache_rows;
        angles[turn] = blockIdx.y < 2 && row < cover.rows ? angles_of<HD>(a, cover.start + row, i) : nullptr;
        if (angles[turn] != nullptr) prefetch(angles[turn]);
    }
    wait_for_previous();
    if (part != nullptr) {
        load_h(h_tile, h + blockIdx.y * plane + static_cast<size_t>(cover.start) * pitch, cover.rows, whole_ranks(cover),
               pitch);
    }
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    if (part != nullptr) add_product(reinterpret_cast<bf16*>(shared), bt_tile, h_tile, whole_ranks(cover), columns);
    __syncwarp();

#pragma unroll
    for (int turn = 0; turn < 4; turn++) {
        const uint32_t row = warp * 16 + turn * 4 + lane / 8, kv_row = kv_rows[turn];
        if (kv_row >= a.cache_rows) continue;
        Bf16x8 low = {shared[OutTile<bf16>::piece(row, low_piece)]};
        Bf16x8 high = {shared[OutTile<bf16>::piece(row, low_piece + UNITS)]};
        if (angles[turn] != nullptr) rotate(angles[turn], low, high);
        bf16* to = out + static_cast<size_t>(row) * width + low_piece * 8;
        if (blockIdx.y > 0) {
            to = in_cache<HD>(a, blockIdx.y == 1 ? a.keys : a.values, kv_row, column_0 / HD + head) + i * 8;
        }
        *reinterpret_cast<Bf16x8*>(to) = low;
        *reinterpret_cast<Bf16x8*>(to + HD / 2) = high;
    }
}

}  // namespace

#define EXPAND_ROPE_KV(HD)                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS) lora_expand_rope_kv_##HD(                               \
        const Segment* covers, const __grid_constant__ Targets targets, uint32_t inputs, uint32_t pitch,          \
        size_t plane, const bf16* h, const __grid_constant__ RopeKvArguments a) {                                 \
        expand_rope_kv<HD>(covers, targets, inputs, pitch, plane, h, a);                                          \
    }
EXPAND_ROPE_KV(32)
EXPAND_ROPE_KV(64)
EXPAND_ROPE_KV(128)
