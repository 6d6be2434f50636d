// The expand of segments of many rows together with what reads its output next: SiLU and product, or positions
// and the cache. On its own an expand reads and writes the whole output, and the kernel after it reads that
// again; here the output is read once. Results are those of the two kernels, to the bit: sums are rounded to
// bf16 in shared memory where the expand would round them in device memory.
//
// Blocks walk a list that covers every row of the batch, since rows without a large segment's adapter go the
// same way, with nothing added.
#include "lora_tile.cuh"
#include "rope_kv.cuh"

namespace {

// Rows of a batch, 64 at most, that have one large segment's adapter, or none's; a cover of no rows is padding.
struct Cover {
    uint32_t segment;  // NONE for none
    uint32_t row;      // the first, in the batch
    uint32_t rows;
};
constexpr uint32_t NONE = 0xffffffffu;

constexpr uint32_t COLUMNS = OutTile<bf16>::COLUMNS;
constexpr uint32_t OUT_TILE = ROWS * 16;

// Shared memory of one target's Bt and h, in elements.
__device__ __forceinline__ uint32_t factors(uint32_t pitch) { return pitch * COLUMNS + ROWS * h_tile_pitch(pitch); }

// A target's adapter, or null.
__device__ __forceinline__ const bf16* part_of(const Segment* segments, const Cover& cover, const Target& target,
                                               Segment& segment) {
    if (cover.segment == NONE) return nullptr;
    segment = segments[cover.segment];
    await_arrival(segment, target);
    return lora_part(segment, target);
}

}  // namespace

// act[row, column] = silu(gate) * up, where gate and up are `gate_up`'s halves with their adapters' products
// added. Grid: column tiles of `inter`; covers.
extern "C" __global__ void __launch_bounds__(THREADS)
lora_expand_silu_mul(const Segment* segments, const Cover* covers, const __grid_constant__ Targets targets,
                     uint32_t inputs, uint32_t pitch, size_t plane, const bf16* h, const bf16* gate_up, bf16* act,
                     uint32_t inter) {
    // Gate's tile and up's, then their factors.
    extern __shared__ uint4 shared[];
    bf16* const of_targets = reinterpret_cast<bf16*>(shared + 2 * OUT_TILE);
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Cover cover = covers[blockIdx.y];
    // Blocks without work wait too: what follows this kernel relies on the shrink's being over.
    if (cover.rows == 0) return wait_for_previous();
    const uint32_t column_0 = blockIdx.x * COLUMNS, columns = min(COLUMNS, inter - column_0);
    Segment segment;
    const bf16* parts[2];
#pragma unroll
    for (int t = 0; t < 2; t++) {
        const Target& target = targets.of[t];
        parts[t] = part_of(segments, cover, target, segment);
        load_out(shared + t * OUT_TILE, gate_up + static_cast<size_t>(cover.row) * 2 * inter + target.column + column_0,
                 cover.rows, columns, 2 * inter);
        if (parts[t] != nullptr) {
            load_bt<bf16>(of_targets + t * factors(pitch), parts[t], segment, inputs, inter, column_0, columns);
        }
    }
    wait_for_previous();
#pragma unroll
    for (int t = 0; t < 2; t++) {
        if (parts[t] == nullptr) continue;
        load_h(of_targets + t * factors(pitch) + pitch * COLUMNS,
               h + t * plane + static_cast<size_t>(cover.row) * pitch, cover.rows, whole_ranks(segment), pitch);
    }
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int t = 0; t < 2; t++) {
        if (parts[t] == nullptr) continue;
        const bf16* bt = of_targets + t * factors(pitch);
        add_product(reinterpret_cast<bf16*>(shared + t * OUT_TILE), bt, bt + pitch * COLUMNS, whole_ranks(segment), columns);
    }
    // A warp reads only rows that it has worked on itself.
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const uint32_t row = warp * 16 + i * 2 + lane / 16, piece = lane % 16;
        if (row >= cover.rows || piece * 8 >= columns) continue;
        const uint32_t at = OutTile<bf16>::piece(row, piece);
        float g[8], u[8];
        unpack({shared[at]}, g);
        unpack({shared[OUT_TILE + at]}, u);
#pragma unroll
        for (int j = 0; j < 8; j++) g[j] = g[j] / (1.f + __expf(-g[j])) * u[j];
        *reinterpret_cast<Bf16x8*>(act + static_cast<size_t>(cover.row + row) * inter + column_0 + piece * 8) = pack(g);
    }
}

namespace {

// What rope_kv does, of queries, keys and values with their adapters' products added. Grid: column tiles of the
// widest of them; covers; queries, keys, values. `a.qkv` keeps keys and values as they were.
template <int HD>
__device__ __forceinline__ void expand_rope_kv(const Segment* segments, const Cover* covers, const Targets& targets,
                                               uint32_t inputs, uint32_t pitch, size_t plane, const bf16* h,
                                               const RopeKvArguments& a) {
    // The output's tile, then Bt's and h's.
    extern __shared__ uint4 shared[];
    bf16* const bt_tile = reinterpret_cast<bf16*>(shared + OUT_TILE);
    bf16* const h_tile = bt_tile + pitch * COLUMNS;
    const Target& target = targets.of[blockIdx.z];
    const uint32_t column_0 = blockIdx.x * COLUMNS;
    const Cover cover = covers[blockIdx.y];
    if (column_0 >= target.outputs || cover.rows == 0) return wait_for_previous();
    const uint32_t columns = min(COLUMNS, target.outputs - column_0);
    const uint32_t width = (a.heads + 2 * a.kv_heads) * HD;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    bf16* const out = a.qkv + static_cast<size_t>(cover.row) * width + target.column + column_0;
    Segment segment;
    const bf16* part = part_of(segments, cover, target, segment);
    load_out(shared, out, cover.rows, columns, width);
    if (part != nullptr) load_bt<bf16>(bt_tile, part, segment, inputs, target.outputs, column_0, columns);
    wait_for_previous();
    if (part != nullptr) {
        load_h(h_tile, h + blockIdx.z * plane + static_cast<size_t>(cover.row) * pitch, cover.rows, whole_ranks(segment),
               pitch);
    }
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    if (part != nullptr) add_product(reinterpret_cast<bf16*>(shared), bt_tile, h_tile, whole_ranks(segment), columns);
    __syncwarp();

    // Eight lanes take a row: 8 elements of a head's first half each, and the 8 that they pair with.
    constexpr uint32_t UNITS = HD / 16;
    const uint32_t head = lane % 8 / UNITS, i = lane % UNITS, low_piece = head * (HD / 8) + i;
    if (low_piece * 8 >= columns) return;
#pragma unroll
    for (int turn = 0; turn < 4; turn++) {
        const uint32_t row = warp * 16 + turn * 4 + lane / 8;
        if (row >= cover.rows) continue;
        const uint32_t kv_row = a.kv_rows[cover.row + row];
        if (kv_row >= a.cache_rows) continue;
        Bf16x8 low = {shared[OutTile<bf16>::piece(row, low_piece)]};
        Bf16x8 high = {shared[OutTile<bf16>::piece(row, low_piece + UNITS)]};
        if (blockIdx.z < 2) rotate<HD>(a, cover.row + row, i, low, high);
        bf16* to = out + static_cast<size_t>(row) * width + low_piece * 8;
        if (blockIdx.z > 0) {
            to = in_cache<HD>(a, blockIdx.z == 1 ? a.keys : a.values, kv_row, column_0 / HD + head) + i * 8;
        }
        *reinterpret_cast<Bf16x8*>(to) = low;
        *reinterpret_cast<Bf16x8*>(to + HD / 2) = high;
    }
}

}  // namespace

#define EXPAND_ROPE_KV(HD)                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS) lora_expand_rope_kv_##HD(                               \
        const Segment* segments, const Cover* covers, const __grid_constant__ Targets targets, uint32_t inputs,   \
        uint32_t pitch, size_t plane, const bf16* h, const __grid_constant__ RopeKvArguments a) {                 \
        expand_rope_kv<HD>(segments, covers, targets, inputs, pitch, plane, h, a);                                \
    }
EXPAND_ROPE_KV(32)
EXPAND_ROPE_KV(64)
EXPAND_ROPE_KV(128)
