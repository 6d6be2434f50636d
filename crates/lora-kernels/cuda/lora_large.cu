// LoRA on segments of more than 16 rows: what a prefill has. Blocks work on tiles, segments of up to 64 rows that the
// host cuts them into, so that the cost follows the rows and not the number of adapters or slots.
//
// The shrink is bound by reading x, the expand by reading and writing the output; both multiply on tensor
// cores, with ranks padded to a multiple of 16 inside a tile only.
#include "lora_tile.cuh"

namespace {

// Units of a shrinking block; inputs of a stage.
constexpr int UNITS = 4;
constexpr int INPUTS = 64;
// Stages in flight.
constexpr int STAGES = 4;
// In a cluster: teams of `THREADS` of a block at most, each with stages of its own, and how many of those are in
// flight. One team alone leaves most of a multiprocessor idle: a stage takes it 900 cycles of latencies, one after
// another.
constexpr int MAX_TEAMS = 4, TEAM_STAGES = 3;
// Blocks of a cluster at most, as every device that has clusters can run.
constexpr uint32_t MAX_CLUSTER = 8;
constexpr uint32_t X_STAGE = ROWS * INPUTS;
constexpr uint32_t UNIT_STAGE = UNIT * INPUTS;
// Vectors of four sums that a thread keeps.
constexpr int SUMS = UNITS * 2;

// A row of a stage is 8 pieces of 16 bytes; neighbouring rows keep them in a different order, so that a column
// of pieces lies in different banks.
__device__ __forceinline__ uint32_t stage_at(uint32_t row, uint32_t piece) {
    return row * INPUTS + (piece ^ row % 8) * 8;
}

__device__ __forceinline__ void add(float4& to, const float4& v) { to.x += v.x, to.y += v.y, to.z += v.z, to.w += v.w; }

// What a shrinking block works on: a tile's rows, and up to four units, a unit being 16 ranks of one target.
struct Work {
    // This thread's number in its team of `THREADS`, which is all of the block but in clusters.
    uint32_t thread;
    Segment tile;
    // Units of a target.
    uint32_t rank_units;
    // The first unit; units.
    uint32_t unit_0, units;
    // Where this thread's pieces of A's units begin; null for zeros.
    const bf16* a_from[UNITS];

    // False where there is nothing to do, for all blocks of a tile and group alike.
    __device__ __forceinline__ bool find(const Segment* tiles, const uint32_t* count, const Targets& targets,
                                         uint32_t target_count, uint32_t inputs) {
        thread = threadIdx.x % THREADS;
        tile = tiles[blockIdx.x];
        if (blockIdx.x >= *count) return false;
        rank_units = (tile.rank + UNIT - 1) / UNIT;
        unit_0 = blockIdx.y * UNITS;
        if (unit_0 >= target_count * rank_units) return false;
        units = min(static_cast<uint32_t>(UNITS), target_count * rank_units - unit_0);
        // A thread copies one piece of every 16th row.
        const uint32_t copy_row = thread / 8, piece = thread % 8;
        bool adapted = false;
        await_arrival(tile, targets);
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
            a_from[u] = nullptr;
            if (u >= units) continue;
            const Target& target = targets.of[(unit_0 + u) / rank_units];
            const bf16* a = lora_part(tile, target);
            adapted |= a != nullptr;
            const uint32_t rank = (unit_0 + u) % rank_units * UNIT + copy_row;
            if (a != nullptr && rank < tile.rank) a_from[u] = a + static_cast<size_t>(rank) * inputs + piece * 8;
        }
        return adapted;
    }

    // sums = the rows of x by the units of A, over stages `begin` to `end` of the inputs. `stages` holds
    // `COUNT` of them, or as many as there are, each x's tile and then A's `group_units`.
    template <int COUNT, bool TEAMS>
    __device__ __forceinline__ void multiply(const bf16* x, uint32_t inputs, uint32_t begin, uint32_t end,
                                             uint32_t group_units, bf16* stages, float (&sums)[SUMS][4]) const {
        const uint32_t warp = thread / 32, lane = thread % 32;
        const uint32_t copy_row = thread / 8, piece = thread % 8;
        const bf16* x_from = x + (tile.start + static_cast<size_t>(copy_row)) * inputs + piece * 8;
        const uint32_t stage_size = X_STAGE + group_units * UNIT_STAGE;
        auto load = [&](uint32_t at) {
            if (at < end) {
                bf16* to = stages + (at - begin) % COUNT * stage_size + stage_at(copy_row, piece);
                const uint32_t k = at * INPUTS;
                const bool inside = k + piece * 8 < inputs;
#pragma unroll
                for (int i = 0; i < ROWS / 16; i++) {
                    const bool valid = inside && copy_row + i * 16 < tile.rows;
                    copy_async_16(to + i * 16 * INPUTS, valid ? x_from + static_cast<size_t>(i * 16) * inputs + k : x,
                                  valid);
                }
#pragma unroll
                for (int u = 0; u < UNITS; u++) {
                    const bool valid = inside && a_from[u] != nullptr;
                    if (u < units) copy_async_16(to + X_STAGE + u * UNIT_STAGE, valid ? a_from[u] + k : x, valid);
                }
            }
            // Empty groups keep the count that is waited for.
            copy_async_commit();
        };
#pragma unroll
        for (int i = 0; i < SUMS; i++) {
            sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0.f;
        }
#pragma unroll
        for (int i = 0; i < COUNT - 1; i++) load(begin + i);
        for (uint32_t at = begin; at < end; at++) {
            copy_async_wait<COUNT - 2>();
            // This stage is there for all, and all have left the one before it, which is loaded anew.
            sync<TEAMS>();
            load(at + COUNT - 1);
            const bf16* stage = stages + (at - begin) % COUNT * stage_size;
#pragma unroll
            for (int step = 0; step < INPUTS / 16; step++) {
                uint32_t a[4];
                load_matrix_x4(a, stage + stage_at(warp * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
                for (int u = 0; u < UNITS; u++) {
                    if (u >= units) continue;
                    uint32_t b[4];
                    load_matrix_x4(b, stage + X_STAGE + u * UNIT_STAGE +
                                          stage_at(lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
                    const uint32_t b_first[2] = {b[0], b[1]}, b_second[2] = {b[2], b[3]};
                    mma_16816(sums[u * 2], a, b_first);
                    mma_16816(sums[u * 2 + 1], a, b_second);
                }
            }
        }
    }

    // Waits for the threads of this one's team.
    template <bool TEAMS>
    static __device__ __forceinline__ void sync() {
        if (!TEAMS) return __syncthreads();
        asm volatile("bar.sync %0, %1;\n" ::"r"(1 + threadIdx.x / THREADS), "n"(THREADS) : "memory");
    }

    // Writes sums vector `i` of the thread that has number `thread` in its block.
    __device__ __forceinline__ void store(uint32_t i, uint32_t thread, const float4& v, uint32_t pitch, size_t plane,
                                          bf16* h) const {
        const uint32_t warp = thread / 32, lane = thread % 32, row = warp * 16 + lane / 4, unit = unit_0 + i / 2;
        bf16* to = h + unit / rank_units * plane + (tile.start + static_cast<size_t>(row)) * pitch + unit % rank_units * UNIT + i % 2 * 8 +
                   lane % 4 * 2;
        const float scale = tile.scale;
        if (row < tile.rows) store_pair(to, make_float2(v.x * scale, v.y * scale));
        if (row + 8 < tile.rows) store_pair(to + static_cast<size_t>(8) * pitch, make_float2(v.z * scale, v.w * scale));
    }
};

}  // namespace

// h[target][row][rank] = scale * x[row] . A[rank], rounded to bf16.
//
// Grid: an upper bound of tiles; groups of 4 units; parts of the inputs.
// Where the inputs are split, `partial [tile][group][split]` takes the parts' sums in the registers' own order,
// and the last of a tile's blocks adds them up in a fixed order; `arrived [tile][group]` is zero before and after.
extern "C" __global__ void __launch_bounds__(THREADS)
lora_shrink_large(const Segment* tiles, const uint32_t* count, const __grid_constant__ Targets targets,
                  uint32_t target_count, const bf16* x, uint32_t inputs, uint32_t split_stages, uint32_t group_units,
                  uint32_t pitch, size_t plane, float* partial, uint32_t* arrived, bf16* h) {
    extern __shared__ uint4 shared[];
    __shared__ uint32_t is_last;
    let_next_begin();
    Work work;
    if (!work.find(tiles, count, targets, target_count, inputs)) return;
    const uint32_t thread = work.thread, units = work.units;
    const uint32_t begin = blockIdx.z * split_stages;
    const uint32_t end = min(begin + split_stages, (inputs + INPUTS - 1) / INPUTS);
    float sums[SUMS][4];
    work.multiply<STAGES, false>(x, inputs, begin, end, group_units, reinterpret_cast<bf16*>(shared), sums);

    if (gridDim.z > 1) {
        const size_t group = static_cast<size_t>(blockIdx.x) * gridDim.y + blockIdx.y;
        float4* of_group = reinterpret_cast<float4*>(partial) + group * gridDim.z * (SUMS * THREADS) + thread;
        float4* mine = of_group + blockIdx.z * (SUMS * THREADS);
#pragma unroll
        for (int i = 0; i < SUMS; i++) {
            if (i < units * 2) mine[i * THREADS] = make_float4(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
        }
        __threadfence();
        __syncthreads();
        if (thread == 0) is_last = atomicAdd(arrived + group, 1) == gridDim.z - 1;
        __syncthreads();
        if (!is_last) return;
        __threadfence();
        if (thread == 0) arrived[group] = 0;
#pragma unroll
        for (int i = 0; i < SUMS; i++) {
            sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0.f;
        }
#pragma unroll 2
        for (uint32_t split = 0; split < gridDim.z; split++) {
            float4 v[SUMS];
#pragma unroll
            for (int i = 0; i < SUMS; i++) {
                if (i < units * 2) v[i] = load_fresh(of_group + split * (SUMS * THREADS) + i * THREADS);
            }
#pragma unroll
            for (int i = 0; i < SUMS; i++) {
                if (i < units * 2) sums[i][0] += v[i].x, sums[i][1] += v[i].y, sums[i][2] += v[i].z, sums[i][3] += v[i].w;
            }
        }
    }
#pragma unroll
    for (int i = 0; i < SUMS; i++) {
        if (i < units * 2) {
            work.store(i, thread, make_float4(sums[i][0], sums[i][1], sums[i][2], sums[i][3]), pitch, plane, h);
        }
    }
}

// The same on devices whose blocks form clusters: the blocks of a tile and group are one, and add their sums up out of
// each other's shared memory. Through device memory that takes longer than the products: a fence, an atomic, and one
// block that reads what all have written.
extern "C" __global__ void __launch_bounds__(THREADS * MAX_TEAMS)
lora_shrink_cluster(const Segment* tiles, const uint32_t* count, const __grid_constant__ Targets targets,
                    uint32_t target_count, const bf16* x, uint32_t inputs, uint32_t team_stages,
                    uint32_t group_units, uint32_t pitch, size_t plane, bf16* h) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ uint4 shared[];
    let_next_begin();
    Work work;
    // All of a cluster return, or none.
    if (!work.find(tiles, count, targets, target_count, inputs)) return;
    const uint32_t teams = blockDim.x / THREADS, team = threadIdx.x / THREADS;
    const uint32_t vectors = work.units * 2 * THREADS;
    const uint32_t begin = (blockIdx.z * teams + team) * team_stages;
    const uint32_t end = min(begin + team_stages, (inputs + INPUTS - 1) / INPUTS);
    float sums[SUMS][4];
    const uint32_t in_flight = min(team_stages, static_cast<uint32_t>(TEAM_STAGES));
    bf16* const stages = reinterpret_cast<bf16*>(shared) + team * in_flight * (X_STAGE + group_units * UNIT_STAGE);
    work.multiply<TEAM_STAGES, true>(x, inputs, begin, end, group_units, stages, sums);

    // The sums take the stages' place, in the registers' own order: team by team, then all teams' in the first's.
    copy_async_wait<0>();
    __syncthreads();
    float4* const mine = reinterpret_cast<float4*>(shared);
#pragma unroll
    for (int i = 0; i < SUMS; i++) {
        if (i < work.units * 2) {
            mine[team * vectors + i * THREADS + work.thread] = make_float4(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
        }
    }
    __syncthreads();
    for (uint32_t at = threadIdx.x; teams > 1 && at < vectors; at += blockDim.x) {
        float4 sum = mine[at];
#pragma unroll
        for (int i = 1; i < MAX_TEAMS; i++) {
            if (i < teams) add(sum, mine[i * vectors + at]);
        }
        mine[at] = sum;
    }
    cluster_sync();
    // Each block adds up a part of the vectors, of all blocks.
    const uint32_t share = vectors / gridDim.z, last = (blockIdx.z + 1) * share;
    for (uint32_t at = blockIdx.z * share + threadIdx.x; at < last; at += blockDim.x) {
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
        for (uint32_t block = 0; block < MAX_CLUSTER; block++) {
            if (block < gridDim.z) add(sum, load_cluster(mine + at, block));
        }
        // Here before this block says that it is done with the others' memory, rows that are not stored too.
        asm volatile("" ::"f"(sum.x), "f"(sum.y), "f"(sum.z), "f"(sum.w));
        work.store(at / THREADS, at % THREADS, sum, pitch, plane, h);
    }
    // What others read must not be gone.
    cluster_leave();
#endif
}

namespace {

// out[row, column] += h[row] . Bt[:, column]; grid: column tiles of the widest target; an upper bound of tiles;
// targets.
//
// The output's tile goes through shared memory: in by asynchronous copies, which keep a block's 16 KiB in
// flight without registers, and out by 16 bytes a thread; the products start from it and end in it.
template <typename T>
__device__ __forceinline__ void expand_large(const Segment* tiles, const uint32_t* count, const Targets& targets,
                                             uint32_t inputs, uint32_t pitch, size_t plane, const bf16* h, T* out, uint32_t width) {
    using Shape = OutTile<T>;
    // The output's tile, then Bt's `[pitch][COLUMNS]`, then h's `[ROWS][h_pitch]`.
    extern __shared__ uint4 shared[];
    // Blocks without work wait too: what follows this kernel relies on the shrink's being over.
    const Target& target = targets.of[blockIdx.z];
    const uint32_t column_0 = blockIdx.x * Shape::COLUMNS;
    if (column_0 >= target.outputs) return wait_for_previous();
    const Segment segment = tiles[blockIdx.y];
    if (blockIdx.y >= *count) return wait_for_previous();
    await_arrival(segment, targets);
    const bf16* part = lora_part(segment, target);
    if (part == nullptr) return wait_for_previous();

    const uint32_t rows = segment.rows;
    const uint32_t columns = min(Shape::COLUMNS, target.outputs - column_0);
    const uint32_t ranks = whole_ranks(segment);
    const size_t row_0 = segment.start;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    out += row_0 * width + target.column + column_0;
    bf16* bt_tile = reinterpret_cast<bf16*>(shared + ROWS * 16);
    bf16* h_tile = bt_tile + pitch * Shape::COLUMNS;

    // Everything that does not depend on the shrink is asked for before its results are waited for.
    load_out(shared, out, rows, columns, width);
    load_bt<T>(bt_tile, part, segment, inputs, target.outputs, column_0, columns);
    wait_for_previous();
    load_h(h_tile, h + blockIdx.z * plane + row_0 * pitch, rows, ranks, pitch);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();

    add_product(reinterpret_cast<T*>(shared), bt_tile, h_tile, ranks, columns);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const uint32_t row = warp * 16 + i * 2 + lane / 16, piece = lane % 16;
        if (row < rows && piece * Shape::PIECE < columns) {
            *reinterpret_cast<uint4*>(out + row * static_cast<size_t>(width) + piece * Shape::PIECE) =
                shared[Shape::piece(row, piece)];
        }
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, 8)
lora_expand_large_bf16(const Segment* tiles, const uint32_t* count, const __grid_constant__ Targets targets,
                       uint32_t inputs, uint32_t pitch, size_t plane, const bf16* h, bf16* out, uint32_t width) {
    expand_large(tiles, count, targets, inputs, pitch, plane, h, out, width);
}

extern "C" __global__ void __launch_bounds__(THREADS, 8)
lora_expand_large_f32(const Segment* tiles, const uint32_t* count, const __grid_constant__ Targets targets,
                      uint32_t inputs, uint32_t pitch, size_t plane, const bf16* h, float* out, uint32_t width) {
    expand_large(tiles, count, targets, inputs, pitch, plane, h, out, width);
}
