// LoRA on segments of 1 to 16 rows: what a decode step has. Bound by reading the adapters once.
//
// The shrink multiplies by tensor cores not for their speed but because 16 rows by 16 ranks then need no
// reduction within a warp. It leaves sums over parts of the inputs; the expand adds them up in a fixed order
// when it loads them, so that a result does not depend on which block was first.
#include <type_traits>

#include "lora.cuh"

namespace {

constexpr int ROWS = 16;

constexpr int SHRINK_WARPS = 8;
// Ranks of a block.
constexpr int SHRINK_RANKS = 16;
// Inputs that a warp reads of each row at once.
constexpr int STEP = 32;
// Steps whose loads are in flight together; two neighbours make a line of 128 bytes.
constexpr int UNROLL = 4;
// Keeps a warp's sums in different banks.
constexpr int SUM_PITCH = 24;

constexpr int EXPAND_THREADS = 128;
constexpr int EXPAND_COLUMNS = 2 * EXPAND_THREADS;
// On a multiprocessor at once: so q, k and v of sixteen adapters all are.
constexpr int EXPAND_BLOCKS = 6;
// Ranks in shared memory at once.
constexpr int EXPAND_RANKS = 64;

// Of an adapter, which a copy may write while the kernel waits for it.
__device__ __forceinline__ uint4 load_16(const bf16* p, bool valid) {
    return valid ? load_fresh(reinterpret_cast<const uint4*>(p)) : make_uint4(0, 0, 0, 0);
}

}  // namespace

// partial[segment][target][split][row][rank] = x[row, part of the inputs] . A[rank, part of the inputs]
//
// Grid: splits; targets x rank tiles; an upper bound of segments. Ranks up to the next multiple of 16 are
// written, as zeros past the adapter's own.
extern "C" __global__ void __launch_bounds__(SHRINK_WARPS * 32, 2)
lora_shrink_small(const Segment* segments, const uint32_t* count, const __grid_constant__ Targets targets,
                  const bf16* x, uint32_t inputs, uint32_t split_steps, uint32_t rank_tiles, uint32_t pitch,
                  float* partial) {
    __shared__ float sums[SHRINK_WARPS][ROWS][SUM_PITCH];
    let_next_begin();
    // Blocks without work wait too: see common.cuh.
    if (blockIdx.z >= *count) return wait_for_previous();
    const Segment segment = segments[blockIdx.z];
    const uint32_t target = blockIdx.y / rank_tiles;
    const uint32_t rank_0 = blockIdx.y % rank_tiles * SHRINK_RANKS;
    if (rank_0 >= segment.rank) return wait_for_previous();
    await_arrival(segment, targets);
    const bf16* a = lora_part(segment, targets.of[target]);
    if (a == nullptr) return wait_for_previous();

    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t group = lane / 4, quad = lane % 4;
    const bool row_valid[2] = {group < segment.rows, group + 8 < segment.rows};
    const bool rank_valid[2] = {rank_0 + group < segment.rank, rank_0 + group + 8 < segment.rank};
    const bf16* x_row = x + static_cast<size_t>(segment.start + group) * inputs + quad * 8;
    const bf16* a_row = a + static_cast<size_t>(rank_0 + group) * inputs + quad * 8;
    const size_t down_8 = static_cast<size_t>(8) * inputs;

    const uint32_t steps = (inputs + STEP - 1) / STEP;
    const uint32_t begin = blockIdx.x * split_steps;
    const uint32_t end = min(begin + split_steps, steps);
    float c[2][4] = {};
    if (begin >= end) wait_for_previous();
    for (uint32_t base = begin; base < end; base += SHRINK_WARPS * UNROLL) {
        uint4 vx[UNROLL][2], va[UNROLL][2];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const uint32_t step = base + u / 2 * (SHRINK_WARPS * 2) + warp * 2 + u % 2;
            const uint32_t k = step * STEP;
            const bool valid = step < end && k + quad * 8 < inputs;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                va[u][half] = load_16(a_row + half * down_8 + k, valid && rank_valid[half]);
            }
        }
        // The first of A is on its way when x is waited for.
        if (base == begin) wait_for_previous();
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const uint32_t step = base + u / 2 * (SHRINK_WARPS * 2) + warp * 2 + u % 2;
            const uint32_t k = step * STEP;
            const bool valid = step < end && k + quad * 8 < inputs;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                vx[u][half] = make_uint4(0, 0, 0, 0);
                if (valid && row_valid[half]) {
                    vx[u][half] = load_fresh(reinterpret_cast<const uint4*>(x_row + half * down_8 + k));
                }
            }
        }
        // A lane has 8 neighbouring inputs where the product wants pairs 8 apart: the same reordering of the
        // inputs on both sides, which a sum over them does not notice.
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const uint32_t first[4] = {vx[u][0].x, vx[u][1].x, vx[u][0].y, vx[u][1].y};
            const uint32_t second[4] = {vx[u][0].z, vx[u][1].z, vx[u][0].w, vx[u][1].w};
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint32_t b_first[2] = {va[u][half].x, va[u][half].y};
                const uint32_t b_second[2] = {va[u][half].z, va[u][half].w};
                mma_16816(c[half], first, b_first);
                mma_16816(c[half], second, b_second);
            }
        }
    }

#pragma unroll
    for (int half = 0; half < 2; half++) {
        float* to = &sums[warp][group][half * 8 + quad * 2];
        *reinterpret_cast<float2*>(to) = make_float2(c[half][0], c[half][1]);
        *reinterpret_cast<float2*>(to + 8 * SUM_PITCH) = make_float2(c[half][2], c[half][3]);
    }
    __syncthreads();
    const uint32_t row = threadIdx.x / SHRINK_RANKS, rank = threadIdx.x % SHRINK_RANKS;
    static_assert(SHRINK_WARPS * 32 == ROWS * SHRINK_RANKS, "a thread for each sum");
    if (row >= segment.rows) return;
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < SHRINK_WARPS; w++) sum += sums[w][row][rank];
    const uint32_t target_count = gridDim.y / rank_tiles;
    const size_t part = (static_cast<size_t>(blockIdx.z) * target_count + target) * gridDim.x + blockIdx.x;
    partial[(part * ROWS + row) * pitch + rank_0 + rank] = sum;
}

namespace {

// Adds Bt's columns, weighted by `h [rank][16 rows]`, to up to 4 * GROUPS rows; a thread has two columns.
template <int GROUPS, typename T>
__device__ __forceinline__ void expand_rows(const Segment& segment, const bf16* bt, uint32_t outputs,
                                            uint32_t column_0, uint32_t splits, uint32_t pitch,
                                            const float* partial, bf16* tile, float* h, T* out, size_t width) {
    const uint32_t thread = threadIdx.x;
    auto load_ranks = [&](uint32_t first) {
        const uint32_t pieces = min(static_cast<uint32_t>(EXPAND_RANKS), segment.rank - first) * (EXPAND_COLUMNS / 8);
        for (uint32_t i = thread; i < pieces; i += EXPAND_THREADS) {
            const uint32_t rank = i / (EXPAND_COLUMNS / 8), column = i % (EXPAND_COLUMNS / 8) * 8;
            const bool valid = column_0 + column < outputs;
            const bf16* from = bt + static_cast<size_t>(first + rank) * outputs + (valid ? column_0 + column : 0);
            copy_async_16(tile + rank * EXPAND_COLUMNS + column, from, valid);
        }
        copy_async_commit();
    };
    // The adapter is asked for before what other kernels write is waited for: the shrink's sums, and the output,
    // whose product may not be over when the shrink has begun.
    load_ranks(0);
    wait_for_previous();
    const bool column_valid = column_0 + thread * 2 < outputs;
    float2 old[4];
#pragma unroll
    for (int row = 0; row < 4; row++) {
        if (column_valid && row < segment.rows) old[row] = load_pair(out + row * width);
    }

    const uint32_t quads = (segment.rank + 15) / 16 * 4;
    for (uint32_t i = thread; i < quads * (4 * GROUPS); i += EXPAND_THREADS) {
        const uint32_t row = i / quads, rank = i % quads * 4;
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
        if (row < segment.rows) {
#pragma unroll 4
            for (uint32_t split = 0; split < splits; split++) {
                const float4 v = load_fresh(reinterpret_cast<const float4*>(
                    partial + (static_cast<size_t>(split) * ROWS + row) * pitch + rank));
                sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
            }
        }
        float* to = h + rank * ROWS + row;
        to[0] = sum.x * segment.scale;
        to[ROWS] = sum.y * segment.scale;
        to[2 * ROWS] = sum.z * segment.scale;
        to[3 * ROWS] = sum.w * segment.scale;
    }

    float2 add[4 * GROUPS] = {};
    for (uint32_t first = 0; first < segment.rank; first += EXPAND_RANKS) {
        if (first > 0) {
            __syncthreads();
            load_ranks(first);
        }
        copy_async_wait<0>();
        __syncthreads();
        const uint32_t ranks = min(static_cast<uint32_t>(EXPAND_RANKS), segment.rank - first);
#pragma unroll 4
        for (uint32_t rank = 0; rank < ranks; rank++) {
            const float2 b = load_pair(tile + rank * EXPAND_COLUMNS + thread * 2);
#pragma unroll
            for (int g = 0; g < GROUPS; g++) {
                const float4 w = *reinterpret_cast<const float4*>(h + (first + rank) * ROWS + g * 4);
                add[g * 4].x += w.x * b.x, add[g * 4].y += w.x * b.y;
                add[g * 4 + 1].x += w.y * b.x, add[g * 4 + 1].y += w.y * b.y;
                add[g * 4 + 2].x += w.z * b.x, add[g * 4 + 2].y += w.z * b.y;
                add[g * 4 + 3].x += w.w * b.x, add[g * 4 + 3].y += w.w * b.y;
            }
        }
    }
    if (!column_valid) return;
    // Of more than four rows the rest now, since registers are free only now; all before the first is stored. A load behind
    // a store would wait for what that stores: the compiler cannot know that rows are different places.
#pragma unroll
    for (int row = 0; row < 4 * GROUPS; row++) {
        if (row >= segment.rows) continue;
        const float2 base = row < 4 ? old[row & 3] : load_pair(out + row * width);
        add[row].x += base.x, add[row].y += base.y;
    }
#pragma unroll
    for (int row = 0; row < 4 * GROUPS; row++) {
        if (row < segment.rows) store_pair(out + row * width, add[row]);
    }
}

// out[row, column] += scale * h[row] . Bt[:, column]; grid: column tiles of the widest target; targets; an
// upper bound of segments.
template <typename T>
__device__ __forceinline__ void expand_small(const Segment* segments, const uint32_t* count, const Targets& targets,
                                             uint32_t inputs, uint32_t splits, uint32_t pitch, const float* partial,
                                             T* out, uint32_t width) {
    // Bt's tile, then h: `[pitch][ROWS]`.
    extern __shared__ uint4 shared[];
    bf16* tile = reinterpret_cast<bf16*>(shared);
    float* h = reinterpret_cast<float*>(tile + min(pitch, static_cast<uint32_t>(EXPAND_RANKS)) * EXPAND_COLUMNS);

    let_next_begin();
    // Blocks without work wait too: what follows this kernel relies on the shrink's being over.
    const Target& target = targets.of[blockIdx.y];
    const uint32_t column_0 = blockIdx.x * EXPAND_COLUMNS;
    if (blockIdx.z >= *count || column_0 >= target.outputs) return wait_for_previous();
    const Segment segment = segments[blockIdx.z];
    await_arrival(segment, targets);
    const bf16* part = lora_part(segment, target);
    if (part == nullptr) return wait_for_previous();

    const bf16* bt = part + static_cast<size_t>(segment.rank) * inputs;
    partial += (static_cast<size_t>(blockIdx.z) * gridDim.y + blockIdx.y) * splits * ROWS * pitch;
    out += static_cast<size_t>(segment.start) * width + target.column + column_0 + threadIdx.x * 2;
    auto run = [&](auto groups) {
        expand_rows<decltype(groups)::value>(segment, bt, target.outputs, column_0, splits, pitch, partial, tile, h,
                                             out, width);
    };
    if (segment.rows <= 4) {
        run(std::integral_constant<int, 1>());
    } else if (segment.rows <= 8) {
        run(std::integral_constant<int, 2>());
    } else {
        run(std::integral_constant<int, 4>());
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(EXPAND_THREADS, EXPAND_BLOCKS)
lora_expand_small_bf16(const Segment* segments, const uint32_t* count, const __grid_constant__ Targets targets,
                       uint32_t inputs, uint32_t splits, uint32_t pitch, const float* partial, bf16* out,
                       uint32_t width) {
    expand_small(segments, count, targets, inputs, splits, pitch, partial, out, width);
}

extern "C" __global__ void __launch_bounds__(EXPAND_THREADS, EXPAND_BLOCKS)
lora_expand_small_f32(const Segment* segments, const uint32_t* count, const __grid_constant__ Targets targets,
                      uint32_t inputs, uint32_t splits, uint32_t pitch, const float* partial, float* out,
                      uint32_t width) {
    expand_small(segments, count, targets, inputs, splits, pitch, partial, out, width);
}

namespace {

// Ranks whose Bt a thread of the expand with SiLU asks for at once.
constexpr int SILU_RANKS = 16;
// As in src/lora/mod.rs.
constexpr int MAX_RANK = 128;
constexpr uint32_t NONE = 0xffffffffu;

__device__ __forceinline__ float2 pair_of(float bits) {
    const uint32_t v = __float_as_uint(bits);
    return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u));
}

}  // namespace

// act[row, column] = silu(gate) * up, where gate and up are `gate_up`'s halves with their adapters' products added: to
// the bit what expand_small and silu_mul are, one after the other. Grid: column tiles of `inter`; rows.
//
// A block has one row, since rows without an adapter go the same way. Rows that share an adapter read its matrices from
// the cache, but the first; and a thread, which has no more than two columns of each, needs no shared memory for them.
extern "C" __global__ void __launch_bounds__(EXPAND_THREADS)
lora_expand_silu_mul_small(const Segment* segments, const uint32_t* count, const __grid_constant__ Targets targets,
                           uint32_t inputs, uint32_t splits, uint32_t pitch, const float* partial, const bf16* gate_up,
                           bf16* act, uint32_t inter) {
    __shared__ uint32_t found;
    __shared__ float h[2][MAX_RANK];
    let_next_begin();
    const uint32_t thread = threadIdx.x, row = blockIdx.y;
    const uint32_t column = blockIdx.x * EXPAND_COLUMNS + thread * 2;
    const bool valid = column < inter;
    if (thread == 0) found = NONE;
    __syncthreads();
    const uint32_t segment_count = *count;
    for (uint32_t i = thread; i < segment_count; i += EXPAND_THREADS) {
        // Below the first row this is a large number.
        if (row - segments[i].start < segments[i].rows) found = i;
    }
    __syncthreads();
    const uint32_t at = found;
    const bf16* bt[2] = {nullptr, nullptr};
    uint32_t rank = 0, first_row = 0;
    float scale = 0.f;
    if (at != NONE) {
        const Segment segment = segments[at];
        await_arrival(segment, targets);
        rank = segment.rank, first_row = segment.start, scale = segment.scale;
#pragma unroll
        for (int t = 0; t < 2; t++) {
            const bf16* part = lora_part(segment, targets.of[t]);
            if (part != nullptr) bt[t] = part + static_cast<size_t>(rank) * inputs + column;
        }
    }
    const bool adapted[2] = {bt[0] != nullptr, bt[1] != nullptr};
    float b[2][SILU_RANKS];
    auto load_ranks = [&](uint32_t first) {
#pragma unroll
        for (int t = 0; t < 2; t++) {
#pragma unroll
            for (int k = 0; k < SILU_RANKS; k++) {
                b[t][k] = 0.f;
                if (valid && adapted[t] && first + k < rank) {
                    b[t][k] = load_fresh(reinterpret_cast<const float*>(bt[t] + static_cast<size_t>(first + k) * inter));
                }
            }
        }
    };
    // The adapter is asked for before what other kernels write is waited for.
    load_ranks(0);
    wait_for_previous();
    float2 values[2];
#pragma unroll
    for (int t = 0; t < 2; t++) {
        values[t] = make_float2(0.f, 0.f);
        if (valid) values[t] = load_pair(gate_up + (static_cast<size_t>(row) * 2 + t) * inter + column);
    }
    for (uint32_t i = thread; i < 2 * rank; i += EXPAND_THREADS) {
        const uint32_t t = i >= rank, k = t ? i - rank : i;
        if (!(t ? adapted[1] : adapted[0])) continue;
        const float* from =
            partial + ((static_cast<size_t>(at) * 2 + t) * splits * ROWS + (row - first_row)) * pitch + k;
        float sum = 0.f;
#pragma unroll 8
        for (uint32_t split = 0; split < splits; split++) {
            sum += load_fresh(from + static_cast<size_t>(split) * ROWS * pitch);
        }
        h[t][k] = sum * scale;
    }
    __syncthreads();
    if (!valid) return;
    float2 add[2] = {};
    for (uint32_t first = 0; first < rank; first += SILU_RANKS) {
        if (first > 0) load_ranks(first);
#pragma unroll
        for (int k = 0; k < SILU_RANKS; k++) {
            if (first + k >= rank) break;
#pragma unroll
            for (int t = 0; t < 2; t++) {
                if (!adapted[t]) continue;
                const float w = h[t][first + k];
                const float2 of_b = pair_of(b[t][k]);
                add[t].x += w * of_b.x, add[t].y += w * of_b.y;
            }
        }
    }
#pragma unroll
    for (int t = 0; t < 2; t++) {
        // Rounded as the expand's output is; what is not adapted keeps the sign of a zero.
        if (!adapted[t]) continue;
        values[t].x = round_bf16(values[t].x + add[t].x), values[t].y = round_bf16(values[t].y + add[t].y);
    }
    store_pair(act + static_cast<size_t>(row) * inter + column,
               make_float2(silu(values[0].x) * values[1].x, silu(values[0].y) * values[1].y));
}
