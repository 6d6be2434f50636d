// Products of a few rows with a weight, out = x . weight^T: bound by reading the weight once.
//
// A block stays for the whole launch. Its 16 warps share out one slice of the inputs, up to 256 each, and keep
// x's part of their own inputs in registers, so that shared memory is for the weight alone. The block goes
// through its range of outputs in tiles of 8; each warp has a ring of tiles (8 rows of its inputs) in shared
// memory that copies fill, and waits for nobody else. The warps' sums of a tile meet in shared memory. Where
// the inputs need more than one slice, a range's blocks leave their sums in memory, and the last one to
// finish adds them up in the order of the slices: a result does not depend on which block that was.
//
// The weight is no other kernel's output, so the ring is filled before the kernel ahead has ended.
//
// A product may do the shrink of its rows' adapters too: A's rows are further rows of the weight, of which each block takes
// a share behind its own tiles. A kernel for that would start when the weight has been read, and wait for memory again.
#include "lora.cuh"

struct GemmSmallArguments {
    const bf16* weight;  // [outputs, inputs]
    const bf16* x;       // [n, inputs]
    void* out;           // [n, outputs]
    const float* bias;   // [outputs], or null
    float* partials;     // [tiles, slices, values of a tile], where there are several slices
    uint32_t* counters;  // [gridDim.x], zero between launches
    uint32_t n, outputs, inputs, kind;
};

// A shrink that a product does: see lora_shrink_small, whose sums these are, with slices for splits. Ranks past an
// adapter's own are left as they are.
struct GemmSmallShrink {
    const Segment* segments;
    const uint32_t* count;
    float* partial;  // [segments, targets, slices, 16, pitch]
    Targets targets;
    uint32_t target_count, pitch;
};

// And 2: add. SILU_MUL: of outputs that are gate's and then up's, silu(gate) * up, to the bit what silu_mul makes of what
// STORE stores.
constexpr uint32_t STORE = 0, STORE_WIDE = 1, SILU_MUL = 3;

constexpr int WARPS = 16;
// Outputs of a tile.
constexpr int TILE = 8;
// Of the values of a tile, how far behind a column's the one lies that is four columns on: of gate, up's.
constexpr int UP = 8;
// Of a small segment, as in src/lora/layout.rs.
constexpr uint32_t SHRINK_ROWS = 16;
// What the inputs are shared out by: a line of 128 bytes.
constexpr int UNIT = 64;

// What a product does besides.
enum class Extra { NOTHING, SILU, SHRINK };

// A row of A that is one of a block's.
struct Carried {
    // Null where the adapter has no such row.
    const bf16* a;
    // Where its first row's sum goes.
    uint32_t out;
    // The rows of x that have the adapter.
    uint16_t start, rows;
};
static_assert(sizeof(Carried) == 16, "as in src/gemm_small.rs");

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void barrier_init(uint64_t* barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\n" ::"r"(shared_address(barrier)) : "memory");
}
// The one arrival of a phase, which then waits for `bytes` of copies too.
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t phase) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(shared_address(barrier)),
        "r"(phase)
        : "memory");
}
// `bytes`, a multiple of 16, by the copy engine. A weight is not read again before all others have been.
__device__ __forceinline__ void copy_bulk(void* to, const void* from, uint32_t bytes, uint64_t* barrier,
                                          uint64_t policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;\n" ::
            "r"(shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
        : "memory");
}
// Asks for `bytes`, a multiple of 16, to be in the cache soon.
__device__ __forceinline__ void prefetch_bulk(const void* from, uint32_t bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;\n" ::"l"(from), "r"(bytes) : "memory");
}
// What this thread has seen in memory, copies by the engine that others ask for after a barrier see too.
__device__ __forceinline__ void fence_copies() { asm volatile("fence.proxy.async.global;\n" ::: "memory"); }
__device__ __forceinline__ uint64_t evict_first() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;\n" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ void finish(const GemmSmallArguments& a, uint32_t row, uint32_t column, float sum,
                                       float old) {
    if (a.bias != nullptr) sum += __ldg(a.bias + column);
    const size_t at = size_t(row) * a.outputs + column;
    if (a.kind == STORE) {
        static_cast<bf16*>(a.out)[at] = __float2bfloat16_rn(sum);
    } else {
        // Of what is not added to, `old` is 0.
        static_cast<float*>(a.out)[at] = old + sum;
    }
}

// The activation of gate's and up's sums.
__device__ __forceinline__ void finish_silu(const GemmSmallArguments& a, uint32_t row, uint32_t column, float gate,
                                            float up) {
    const float act = silu(round_bf16(gate)) * round_bf16(up);
    static_cast<bf16*>(a.out)[size_t(row) * (a.outputs / 2) + column] = __float2bfloat16_rn(act);
}

// The segments' ranks, each lane's and those before it, of one to a row, which are 32 at most. A warp calls it.
__device__ __forceinline__ uint32_t ranks_until(const GemmSmallShrink& s) {
    const uint32_t lane = threadIdx.x & 31;
    uint32_t ranks = lane < *s.count ? s.segments[lane].rank : 0;
#pragma unroll
    for (int o = 1; o < 32; o *= 2) {
        const uint32_t before = __shfl_up_sync(0xffffffffu, ranks, o);
        if (lane >= o) ranks += before;
    }
    return ranks;
}

// Where the `row`-th of all rows of A is, by segment, target and rank. A warp calls it.
struct Place {
    uint32_t segment, target, rank;
};
__device__ __forceinline__ Place place_of(const GemmSmallShrink& s, uint32_t row, uint32_t until) {
    uint32_t segment = 0, before = 0;
#pragma unroll 8
    for (int lane = 0; lane < 32; lane++) {
        const uint32_t ranks = __shfl_sync(0xffffffffu, until, lane);
        if (ranks * s.target_count <= row) segment = lane + 1, before = ranks;
    }
    const uint32_t next = __shfl_sync(0xffffffffu, until, segment & 31);
    const uint32_t rank = next - before, at = row - before * s.target_count;
    return {segment, rank > 0 ? at / rank : 0, rank > 0 ? at % rank : 0};
}

// That row, and the row of Bt that its sums are multiplied by next is asked for.
__device__ __forceinline__ Carried carried_row(const GemmSmallShrink& s, const Segment& segment, const Place& place,
                                               uint32_t inputs) {
    const Target& target = s.targets.of[place.target];
    const bf16* part = lora_part(segment, target);
    if (part == nullptr) return {nullptr, 0, 0, 0};
    const bf16* bt = part + static_cast<size_t>(segment.rank) * inputs;
    if (blockIdx.y == 0) {
        prefetch_bulk(bt + static_cast<size_t>(place.rank) * target.outputs, target.outputs * sizeof(bf16));
    }
    const uint32_t plane = (place.segment * s.target_count + place.target) * gridDim.y + blockIdx.y;
    return {part + static_cast<size_t>(place.rank) * inputs, plane * SHRINK_ROWS * s.pitch + place.rank,
            static_cast<uint16_t>(segment.start), static_cast<uint16_t>(segment.rows)};
}

// Lists this block's rows of A into `carried`, a thread each, and asks for what the expand reads of them, once their
// adapters are there: mostly they are, since a decode's sequences have been prefilled. How many there are. All threads of
// the block call it.
__device__ __forceinline__ uint32_t list_carried(const GemmSmallShrink& s, Carried* carried, uint32_t inputs) {
    const uint32_t until = ranks_until(s);
    const uint32_t rows = __shfl_sync(0xffffffffu, until, 31) * s.target_count;
    const uint32_t first = rows * blockIdx.x / gridDim.x, count = rows * (blockIdx.x + 1) / gridDim.x - first;
    if ((threadIdx.x & ~31u) >= count) return count;
    const Place place = place_of(s, first + threadIdx.x, until);
    if (threadIdx.x >= count) return count;
    const Segment segment = s.segments[place.segment];
    if (segment.arrival != nullptr) {
        await_arrival_alone(segment, s.targets);
        fence_copies();
    }
    carried[threadIdx.x] = carried_row(s, segment, place, inputs);
    return count;
}

// WINDOWS: 32s of inputs that a warp takes at most; HALVES: 8s of rows of x; BULK: whether the copy engine
// copies, or the threads do; STAGES: tiles of a warp's ring; EXTRA: SILU if `kind` is SILU_MUL, SHRINK with a `shrink`.
// Grid: ranges of outputs; slices of the inputs.
template <int WINDOWS, int HALVES, int STAGES, bool BULK, Extra EXTRA>
__device__ __forceinline__ void gemm_small(const GemmSmallArguments& a, const GemmSmallShrink* shrink = nullptr) {
    constexpr bool SILU = EXTRA == Extra::SILU, SHRINK = EXTRA == Extra::SHRINK;
    constexpr int SEGMENT = WINDOWS * 64;  // bytes of a row of a stage
    // Odd rows lie 64 bytes further on: a quarter of a warp reads 64 bytes of two rows, from all banks.
    constexpr int PAIR = 2 * SEGMENT + 64;
    constexpr int STAGE = TILE / 2 * PAIR;
    constexpr int PIECES = SEGMENT / 16;
    constexpr int ROW_TILES = (HALVES + 1) / 2;
    constexpr int VALUES = ROW_TILES * 16 * TILE;
    constexpr int REDUCERS = VALUES / 32;  // warps that add up a tile's sums; all take turns
    static_assert(WARPS % REDUCERS == 0 && WINDOWS % 2 == 0, "warps and windows come out even");
    extern __shared__ __align__(128) unsigned char shared[];

    let_next_begin();
    const uint32_t lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const uint32_t group = lane >> 2, quad = lane & 3;
    unsigned char* ring = shared + warp * (STAGES * STAGE);
    float* sums = reinterpret_cast<float*>(shared + WARPS * STAGES * STAGE);  // [2][WARPS][VALUES]
    uint64_t* barriers = reinterpret_cast<uint64_t*>(sums + 2 * WARPS * VALUES);
    uint64_t* full = barriers + warp * STAGES;
    uint32_t* last = reinterpret_cast<uint32_t*>(barriers + WARPS * STAGES);
    Carried* carried = reinterpret_cast<Carried*>(last + 4);

    // This warp's inputs, [k_0, k_0 + length), and this block's tiles.
    const uint32_t slices = gridDim.y, slice = blockIdx.y;
    const uint32_t units = (a.inputs + UNIT - 1) / UNIT;
    const uint32_t part = slice * WARPS + warp, parts = slices * WARPS;
    const uint32_t k_0 = units * part / parts * UNIT;
    const uint32_t k_end = min(units * (part + 1) / parts * UNIT, a.inputs);
    const uint32_t length = k_end > k_0 ? k_end - k_0 : 0;
    const uint32_t all_tiles = (a.outputs + TILE - 1) / TILE;
    const uint32_t tile_0 = all_tiles * blockIdx.x / gridDim.x;
    const uint32_t tiles = all_tiles * (blockIdx.x + 1) / gridDim.x - tile_0;

    // How far behind a tile's first of the weight's rows its `row`-th lies: eight follow one another, or four of gate's and
    // the same four of up's.
    auto behind = [&](uint32_t row) {
        return SILU ? row % (TILE / 2) + (row < TILE / 2 ? 0 : a.outputs / 2) : row;
    };
    auto row_at = [&](uint32_t row) { return (row >> 1) * PAIR + (row & 1) * (SEGMENT + 64); };
    uint64_t policy = 0;
    auto fill = [&](uint32_t i, uint32_t slot) {
        const uint32_t rows = min(uint32_t(TILE), a.outputs - (tile_0 + i) * TILE);
        unsigned char* to = ring + slot * STAGE;
        const bf16* from = a.weight + size_t(tile_0 + i) * (SILU ? TILE / 2 : TILE) * a.inputs + k_0;
        if constexpr (BULK) {
            if (length == 0) return;
            if (lane == 0) barrier_expect(full + slot, rows * length * 2);
            __syncwarp();
            if (lane < rows) {
                copy_bulk(to + row_at(lane), from + size_t(behind(lane)) * a.inputs, length * 2, full + slot, policy);
            }
        } else {
#pragma unroll
            for (int c = 0; c < TILE * PIECES / 32; c++) {
                const uint32_t row = (c * 32 + lane) / PIECES, piece = (c * 32 + lane) % PIECES;
                const bool valid = row < rows && piece * 8 < length;
                copy_async_16(to + row_at(row) + piece * 16,
                              valid ? from + size_t(behind(row)) * a.inputs + piece * 8 : a.weight, valid);
            }
        }
    };

    // Tiles of the weight, then of A; rows of A.
    uint32_t all = tiles, carried_count = 0;
    auto fill_carried = [&](uint32_t i, uint32_t slot) {
        unsigned char* to = ring + slot * STAGE;
        auto row_of_a = [&](uint32_t row) -> const bf16* {
            const uint32_t at = (i - tiles) * TILE + row;
            return at < carried_count ? carried[at].a : nullptr;
        };
        if constexpr (BULK) {
            if (length == 0) return;
            const bf16* from = lane < TILE ? row_of_a(lane) : nullptr;
            const uint32_t rows = __popc(__ballot_sync(0xffffffffu, from != nullptr));
            if (lane == 0) barrier_expect(full + slot, rows * length * 2);
            __syncwarp();
            if (from != nullptr) copy_bulk(to + row_at(lane), from + k_0, length * 2, full + slot, policy);
        } else {
#pragma unroll
            for (int c = 0; c < TILE * PIECES / 32; c++) {
                const uint32_t row = (c * 32 + lane) / PIECES, piece = (c * 32 + lane) % PIECES;
                const bf16* from = row_of_a(row);
                const bool valid = from != nullptr && piece * 8 < length;
                copy_async_16(to + row_at(row) + piece * 16, valid ? from + k_0 + piece * 8 : a.weight, valid);
            }
        }
    };

    if constexpr (BULK) {
        policy = evict_first();
        if (lane == 0) {
#pragma unroll
            for (int s = 0; s < STAGES; s++) barrier_init(full + s);
            asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
            asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
        }
        // What no copy ever writes must be numbers: x is zero there, and zero times NaN is not.
        if (length * 2 < SEGMENT) {
            for (uint32_t i = lane; i < STAGES * TILE * PIECES; i += 32) {
                const uint32_t piece = i % PIECES, row = i / PIECES % TILE, slot = i / (PIECES * TILE);
                if (piece * 8 < length) continue;
                *reinterpret_cast<uint4*>(ring + slot * STAGE + row_at(row) + piece * 16) = make_uint4(0, 0, 0, 0);
            }
        }
        __syncwarp();
    }
#pragma unroll
    for (int s = 0; s < STAGES; s++) {
        if (s < tiles) fill(s, s);
        // Those of A's tiles come with them.
        if constexpr (!BULK && !SHRINK) copy_async_commit();
        if constexpr (!BULK && SHRINK) {
            if (s < tiles) copy_async_commit();
        }
    }
    if constexpr (SHRINK) {
        // Behind the first of the weight: what this reads depends on one another.
        carried_count = list_carried(*shrink, carried, a.inputs);
        all += (carried_count + TILE - 1) / TILE;
        __syncthreads();
#pragma unroll 1
        for (uint32_t s = tiles; s < STAGES; s++) {
            if (s < all) fill_carried(s, s);
            if constexpr (!BULK) copy_async_commit();
        }
    }

    wait_for_previous();
    // x as the left operand. A lane has 8 neighbouring inputs where the product wants pairs 8 apart: the same
    // reordering of the inputs on both sides, which a sum over them does not notice.
    uint4 x[WINDOWS][HALVES];
#pragma unroll
    for (int w = 0; w < WINDOWS; w++) {
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
            const uint32_t row = h * 8 + group, k = w * 32 + quad * 8;
            x[w][h] = make_uint4(0, 0, 0, 0);
            if (row < a.n && k < length) x[w][h] = load_fresh(reinterpret_cast<const uint4*>(a.x + size_t(row) * a.inputs + k_0 + k));
        }
    }

    const unsigned char* own = ring + row_at(group) + quad * 16;
    // The value that this thread adds up when it is its warp's turn, as the product lays values out.
    const uint32_t value = warp % REDUCERS * 32 + lane;
    const uint32_t value_row = value / 128 * 16 + value % 128 / 16 + (value & 2) * 4;
    const uint32_t value_column = value / 4 % 4 * 2 + (value & 1);
    const float* added = static_cast<const float*>(a.out);
    const bool adds = !SILU && a.kind > STORE_WIDE;
    uint32_t slot = 0, phase = 0;
    for (uint32_t i = 0; i < all; i++) {
        if constexpr (BULK) {
            if (length > 0) barrier_wait(full + slot, phase);
        } else {
            copy_async_wait<STAGES - 1>();
            __syncwarp();
        }
        float c[ROW_TILES][2][4] = {};
#pragma unroll
        for (int w = 0; w < WINDOWS; w++) {
            const uint4 v = *reinterpret_cast<const uint4*>(own + slot * STAGE + w * 64);
            const uint32_t b_first[2] = {v.x, v.y}, b_second[2] = {v.z, v.w};
#pragma unroll
            for (int t = 0; t < ROW_TILES; t++) {
                const uint4 low = x[w][2 * t];
                const uint4 high = 2 * t + 1 < HALVES ? x[w][(2 * t + 1) % HALVES] : make_uint4(0, 0, 0, 0);
                const uint32_t first[4] = {low.x, high.x, low.y, high.y};
                const uint32_t second[4] = {low.z, high.z, low.w, high.w};
                mma_16816(c[t][0], first, b_first);
                mma_16816(c[t][1], second, b_second);
            }
        }
        // All lanes have read the stage.
        __syncwarp();
        if (i + STAGES < tiles) {
            fill(i + STAGES, slot);
        } else if (SHRINK && i + STAGES < all) {
            fill_carried(i + STAGES, slot);
        }
        if constexpr (!BULK) copy_async_commit();
        if (++slot == STAGES) slot = 0, phase ^= 1;

        float* tile_sums = sums + (i & 1) * (WARPS * VALUES);
#pragma unroll
        for (int t = 0; t < ROW_TILES; t++) {
            *reinterpret_cast<float4*>(tile_sums + warp * VALUES + t * 128 + lane * 4) =
                make_float4(c[t][0][0] + c[t][1][0], c[t][0][1] + c[t][1][1], c[t][0][2] + c[t][1][2],
                            c[t][0][3] + c[t][1][3]);
        }
        const uint32_t column = (tile_0 + i) * TILE + value_column;
        const bool of_a = SHRINK && i >= tiles;
        const bool mine =
            warp / REDUCERS == i % (WARPS / REDUCERS) && value_row < a.n && (of_a || column < a.outputs);
        float old = 0.f;
        if (mine && adds && !of_a && slices == 1) old = load_fresh(added + size_t(value_row) * a.outputs + column);
        // The sums of the tile before last were read before the last such meeting.
        __syncthreads();
        if (!mine) continue;
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += tile_sums[w * VALUES + value];
        if (of_a) {
            const uint32_t at = (i - tiles) * TILE + value_column;
            if (at >= carried_count) continue;
            const Carried row_of_a = carried[at];
            // Of rows before the first a large number.
            const uint32_t row = value_row - row_of_a.start;
            if (row < row_of_a.rows) __stcg(shrink->partial + row_of_a.out + row * shrink->pitch, sum);
        } else if (SILU && slices == 1) {
            if (value_column >= TILE / 2) continue;
            float up = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) up += tile_sums[w * VALUES + value + UP];
            finish_silu(a, value_row, (tile_0 + i) * (TILE / 2) + value_column, sum, up);
        } else if (slices == 1) {
            finish(a, value_row, column, sum, old);
        } else {
            __stcg(a.partials + (size_t(tile_0 + i) * slices + slice) * VALUES + value, sum);
        }
    }
    if (slices == 1) return;

    // Each thread's writes are made visible before the count.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        const uint32_t before = atomicAdd(a.counters + blockIdx.x, 1u);
        *last = before == slices - 1;
        // Ready for the next launch: no block of this one counts any more.
        if (before == slices - 1) atomicExch(a.counters + blockIdx.x, 0u);
        __threadfence();
    }
    __syncthreads();
    if (!*last) return;
    for (uint32_t i = threadIdx.x; i < tiles * VALUES; i += WARPS * 32) {
        const uint32_t tile = tile_0 + i / VALUES, v = i % VALUES;
        const uint32_t row = v / 128 * 16 + v % 128 / 16 + (v & 2) * 4;
        const uint32_t column = tile * TILE + v / 4 % 4 * 2 + (v & 1);
        if (row >= a.n || column >= a.outputs) continue;
        const float old = adds ? load_fresh(added + size_t(row) * a.outputs + column) : 0.f;
        const float* from = a.partials + size_t(tile) * slices * VALUES + v;
        auto sum_at = [&](uint32_t place) {
            float sum = 0.f;
#pragma unroll 4
            for (uint32_t s = 0; s < slices; s++) sum += load_fresh(from + s * VALUES + place);
            return sum;
        };
        if (!SILU) {
            finish(a, row, column, sum_at(0), old);
        } else if (column % TILE < TILE / 2) {
            finish_silu(a, row, tile * (TILE / 2) + column % TILE, sum_at(0), sum_at(UP));
        }
    }
}
#endif

// Few registers leave room on a multiprocessor for a block of the small kernel that follows: the expand with SiLU has 72 for
// each of 128 threads, which 104 for each of 512 let in. With 32 rows none fits.
#define WITH_SHRINK(REGISTERS) (REGISTERS < 104 ? REGISTERS + 8 : REGISTERS)
#if __CUDA_ARCH__ >= 900
#define BODY(ARGUMENTS, ...) gemm_small<__VA_ARGS__> ARGUMENTS
#else
#define BODY(...)
#endif
#define GEMM_SMALL(NAME, REGISTERS, ...)                                                \
    extern "C" __global__ void __maxnreg__(REGISTERS)                                   \
        gemm_small_##NAME(const __grid_constant__ GemmSmallArguments a) {               \
        BODY((a), __VA_ARGS__, Extra::NOTHING);                                         \
    }                                                                                   \
    extern "C" __global__ void __maxnreg__(REGISTERS + 8)                               \
        gemm_small_##NAME##_silu(const __grid_constant__ GemmSmallArguments a) {        \
        BODY((a), __VA_ARGS__, Extra::SILU);                                            \
    }                                                                                   \
    extern "C" __global__ void __maxnreg__(WITH_SHRINK(REGISTERS))                      \
        gemm_small_##NAME##_shrink(const __grid_constant__ GemmSmallArguments a,        \
                                   const __grid_constant__ GemmSmallShrink shrink) {    \
        BODY((a, &shrink), __VA_ARGS__, Extra::SHRINK);                                 \
    }
// As in src/gemm_small.rs.
GEMM_SMALL(8_bulk, 104, 8, 1, 3, true)
GEMM_SMALL(8_async, 104, 8, 1, 3, false)
GEMM_SMALL(16_bulk, 96, 8, 2, 3, true)
GEMM_SMALL(16_async, 96, 8, 2, 3, false)
GEMM_SMALL(16_narrow_bulk, 96, 4, 2, 5, true)
GEMM_SMALL(32_bulk, 120, 4, 4, 5, true)
GEMM_SMALL(32_async, 120, 4, 4, 5, false)
