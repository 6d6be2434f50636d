// Causal attention over the paged cache with what sm_90a has: the copy engine follows the block table, a block of
// the cache at a time, into shared memory laid out as the tensor cores read it; warpgroups multiply
// asynchronously. Heads of 128 elements.
//
// A block takes 128 rows of one sequence for one head. Warpgroup 0 brings tiles of 128 tokens; the other two take
// 64 rows each. While a warpgroup turns the scores of one tile into weights, its product of the last tile's weights
// with the values is under way, and so are the other warpgroup's products.
#include <type_traits>

#include "attention.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HOPPER 1
#endif

struct alignas(64) TensorMap {
    uint64_t opaque[16];
};

constexpr int HD = 128;
constexpr int ROWS = 128;
constexpr int KEYS = 128;
constexpr int STAGES = 2;
constexpr int THREADS = 384;
// A tile of 128 rows lies as two halves of 64 elements: a half's rows are 128 bytes, swizzled within 8 rows.
constexpr uint32_t HALF_ROW = 128;
constexpr uint32_t HALF = 128 * HALF_ROW;
constexpr uint32_t TILE = 2 * HALF;

#ifdef HOPPER
__device__ __forceinline__ void barrier_init(uint32_t at, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(at), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t at) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(at) : "memory");
}
// Arrives, and has the phase wait for that many bytes too.
__device__ __forceinline__ void barrier_expect(uint32_t at, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(at), "r"(bytes) : "memory");
}
// Waits for the end of the phase of that parity. Of a fresh barrier the phase of parity 1 has ended.
__device__ __forceinline__ void barrier_wait(uint32_t at, uint32_t parity) {
    uint32_t done;
    do {
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
            : "=r"(done)
            : "r"(at), "r"(parity)
            : "memory");
    } while (!done);
}
// What ordinary stores wrote to shared memory becomes visible to the copy engine and the tensor cores.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// A box of the map's tensor at column x, row y.
__device__ __forceinline__ void copy_box(uint32_t to, const TensorMap* map, uint32_t x, uint32_t y, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];\n" ::"r"(
            to),
        "l"(map), "r"(barrier), "r"(x), "r"(y)
        : "memory");
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(N) : "memory");
}

// Registers that a product under way reads or writes: nothing that uses them may move above the wait before this, and
// nothing else may lie in them until then.
__device__ __forceinline__ void settle(float (&d)[64]) {
#pragma unroll
    for (int j = 0; j < 64; j++) asm volatile("" : "+f"(d[j])::"memory");
}
__device__ __forceinline__ void settle(uint32_t (&a)[32]) {
#pragma unroll
    for (int j = 0; j < 32; j++) asm volatile("" : "+r"(a[j])::"memory");
}

// A matrix in shared memory, swizzled in groups of 8 rows of 128 bytes: bytes between the groups (`stride`), and,
// where rows are the depth, between the halves (`lead`).
__device__ __forceinline__ uint64_t descriptor(uint32_t at, uint32_t lead, uint32_t stride) {
    return uint64_t((at & 0x3ffff) >> 4) | uint64_t(lead >> 4) << 16 | uint64_t(stride >> 4) << 32 | uint64_t(1) << 62;
}

// The accumulators of a product of 64 x 128 over a warpgroup: as the instruction names them, and as operands.
#define ACCUMULATORS                                                                   \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define ACCUMULATED(d)                                                                                      \
    "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),         \
    "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),   \
    "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
    "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), \
    "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
    "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
    "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
    "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])

// d = a * b, or d += a * b: 64 x 128 x 16; a from shared memory, depth along its rows; b too, depth along its rows.
__device__ __forceinline__ void multiply(float (&d)[64], uint64_t a, uint64_t b, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        ACCUMULATORS
        "}, %64, %65, p, 1, 1, 0, 0;\n}\n"
        :
        ACCUMULATED(d)
        : "l"(a), "l"(b), "r"(add));
}

// d += a * b: 64 x 128 x 16; a from registers; b from shared memory, its rows are the depth.
__device__ __forceinline__ void multiply(float (&d)[64], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        ACCUMULATORS
        "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
        :
        ACCUMULATED(d)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}

// The barriers, behind the tiles.
struct Barriers {
    uint32_t at;
    __device__ __forceinline__ uint32_t q() const { return at; }
    // The copies of the last values where zeros must follow them.
    __device__ __forceinline__ uint32_t tail() const { return at + 8; }
    __device__ __forceinline__ uint32_t full_keys(uint32_t slot) const { return at + 16 + slot * 8; }
    __device__ __forceinline__ uint32_t full_values(uint32_t slot) const { return at + 32 + slot * 8; }
    __device__ __forceinline__ uint32_t free_keys(uint32_t slot) const { return at + 48 + slot * 8; }
    __device__ __forceinline__ uint32_t free_values(uint32_t slot) const { return at + 64 + slot * 8; }
};

// One warp: copies of all tiles, two ahead of their use.
__device__ __forceinline__ void bring(const Paged& paged, const TensorMap* key_map, const TensorMap* value_map,
                                      const uint32_t* table, uint32_t kv_head, uint32_t context, uint32_t tiles,
                                      uint32_t keys, uint32_t values, const Barriers& barriers) {
    const uint32_t lane = threadIdx.x & 31;
    for (uint32_t tile = 0; tile < tiles; tile++) {
        const uint32_t slot = tile % STAGES, parity = (tile / STAGES & 1) ^ 1;
        // Blocks of the tile that hold something: a lane brings one, half a row at a time.
        const uint32_t limit = min(context, (tile + 1) * KEYS);
        const uint32_t first = tile * KEYS >> paged.block_shift;
        const uint32_t count = ((limit - 1) >> paged.block_shift) + 1 - first;
        const uint32_t bytes = (count << paged.block_shift) * (HD * 2);
        const uint32_t block = lane < count ? __ldg(table + first + lane) : 0;
        const uint32_t row = paged.row(block, kv_head, 0);
        const uint32_t offset = slot * TILE + (lane << paged.block_shift) * HALF_ROW;

        barrier_wait(barriers.free_keys(slot), parity);
        uint32_t full = barriers.full_keys(slot);
        if (lane == 0) barrier_expect(full, bytes);
        __syncwarp();
        if (lane < count) {
            copy_box(keys + offset, key_map, 0, row, full);
            copy_box(keys + offset + HALF, key_map, HD / 2, row, full);
        }

        barrier_wait(barriers.free_values(slot), parity);
        const bool tail = limit < (tile + 1) * KEYS;
        full = tail ? barriers.tail() : barriers.full_values(slot);
        if (lane == 0) barrier_expect(full, bytes);
        __syncwarp();
        if (lane < count) {
            copy_box(values + offset, value_map, 0, row, full);
            copy_box(values + offset + HALF, value_map, HD / 2, row, full);
        }
        if (tail) {
            // Behind the context lies anything, and a weight of zero times that must be zero. Only the last
            // tile can have such a tail.
            barrier_wait(full, 0);
            const uint32_t from = limit - tile * KEYS;
            for (uint32_t i = lane; i < (KEYS - from) * 16; i += 32) {
                uint32_t at = values + slot * TILE + (i & 8 ? HALF : 0) + (from + i / 16) * HALF_ROW + (i & 7) * 16;
                asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};\n" ::"r"(at), "r"(0) : "memory");
            }
            fence_async();
            __syncwarp();
            if (lane == 0) barrier_arrive(barriers.full_values(slot));
        }
    }
}

// Scores to weights, in place. Element j of a lane: row g + 8 * (j / 2 % 2), key 8 * (j / 4) + 2t + j % 2. The
// maximum is that of the row, the sum that of the lane's part of it.
__device__ __forceinline__ bool weigh(float (&s)[64], float (&maximum)[2], float (&sum)[2], float (&factor)[2],
                                      float scale) {
    bool grew = false;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float top = maximum[h];
        const float before = top;
#pragma unroll
        for (int n = 0; n < 16; n++) top = fmaxf(top, fmaxf(s[4 * n + 2 * h], s[4 * n + 2 * h + 1]));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        factor[h] = exp2_fast((before - top) * scale);
        maximum[h] = top;
        const float scaled = top * scale;
        float total = 0.f;
#pragma unroll
        for (int n = 0; n < 16; n++)
#pragma unroll
            for (int j = 4 * n + 2 * h; j < 4 * n + 2 * h + 2; j++) {
                s[j] = exp2_fast(fmaf(s[j], scale, -scaled));
                total += s[j];
            }
        sum[h] = sum[h] * factor[h] + total;
        // A sum of powers is never negative. Asking has the vote, which stays before the wait for the gather, need
        // all of them: the compiler would put half of them behind the wait.
        grew |= top > before || !(total >= 0.f);
    }
    return __any_sync(0xffffffffu, grew);
}

// Hides the keys behind each row's own. `own` is the position of the lane's first row.
__device__ __forceinline__ void hide(float (&s)[64], uint32_t first_key, uint32_t own) {
#pragma unroll
    for (int j = 0; j < 64; j++) {
        uint32_t key = first_key + 8 * (j / 4) + (j & 1);
        if (key > own + 8 * (j / 2 % 2)) s[j] = MINUS_INFINITY;
    }
}

// One warpgroup: its 64 rows of queries over all tiles.
__device__ __forceinline__ void attend(const PrefillArguments& a, uint32_t head, uint32_t first_row, uint32_t live,
                                       uint32_t position, uint32_t tiles, uint32_t q, uint32_t keys, uint32_t values,
                                       unsigned char* q_tile, const Barriers& barriers) {
    const uint32_t lane = threadIdx.x & 31, warp = threadIdx.x / 32 % 4, part = threadIdx.x / 128 - 1;
    const uint32_t part_position = position + part * 64;
    const uint32_t own = part_position + warp * 16 + (lane >> 2);
    const uint32_t lane_key = 2 * (lane & 3);
    float s[64], o[64];
    uint32_t p[32];
    float maximum[2] = {MINUS_INFINITY, MINUS_INFINITY}, sum[2] = {0.f, 0.f}, factor[2];
#pragma unroll
    for (int j = 0; j < 64; j++) o[j] = 0.f;

    const uint64_t q_at = descriptor(q + part * 64 * HALF_ROW, 0, 8 * HALF_ROW);
    const uint64_t keys_at = descriptor(keys, 0, 8 * HALF_ROW);
    const uint64_t values_at = descriptor(values, HALF, 8 * HALF_ROW);
    // Descriptors count in 16 bytes. A step takes 32 bytes of a half's rows, or 16 rows of both halves.
    auto score = [&](uint32_t slot) {
#pragma unroll
        for (int k = 0; k < 8; k++) {
            uint32_t step = (k / 4 * HALF + k % 4 * 32) >> 4;
            multiply(s, q_at + step, keys_at + (slot * TILE >> 4) + step, k > 0);
        }
        wgmma_commit();
    };
    auto gather = [&](uint32_t slot) {
#pragma unroll
        for (int k = 0; k < 8; k++)
            multiply(o, p[4 * k], p[4 * k + 1], p[4 * k + 2], p[4 * k + 3],
                     values_at + ((slot * TILE + k * 16 * HALF_ROW) >> 4));
        wgmma_commit();
    };
    // What came out of the first product is laid out as the second one's left operand.
    auto round = [&] {
#pragma unroll
        for (int j = 0; j < 32; j++) p[j] = pack2(s[2 * j], s[2 * j + 1]);
    };
    auto release = [&](uint32_t barrier) {
        if (lane == 0) barrier_arrive(barrier);
    };

    barrier_wait(barriers.q(), 0);
    barrier_wait(barriers.full_keys(0), 0);
    wgmma_fence();
    score(0);
    wgmma_wait<0>();
    settle(s);
    release(barriers.free_keys(0));
    if (KEYS > part_position + 1) hide(s, lane_key, own);
    weigh(s, maximum, sum, factor, a.scale);
    round();

    // Tiles that need no hiding first: a branch around it would have the compiler wait for the values before it.
    auto next = [&](uint32_t tile, auto hidden) {
        const uint32_t slot = tile % STAGES, parity = tile / STAGES & 1;
        const uint32_t last = tile - 1;
        barrier_wait(barriers.full_keys(slot), parity);
        wgmma_fence();
        score(slot);
        barrier_wait(barriers.full_values(last % STAGES), last / STAGES & 1);
        wgmma_fence();
        gather(last % STAGES);
        wgmma_wait<1>();
        settle(s);
        release(barriers.free_keys(slot));
        if (hidden) hide(s, tile * KEYS + lane_key, own);
        // While the values are gathered.
        bool grew = weigh(s, maximum, sum, factor, a.scale);
        settle(s);
        wgmma_wait<0>();
        settle(o);
        settle(p);
        release(barriers.free_values(last % STAGES));
        if (grew) {
#pragma unroll
            for (int j = 0; j < 64; j++) o[j] *= factor[j / 2 % 2];
        }
        round();
    };
    // The first tile that reaches behind the first row's position.
    const uint32_t hidden = min((part_position + 1) / KEYS, tiles);
    uint32_t tile = 1;
    for (; tile < hidden; tile++) next(tile, std::false_type());
    for (; tile < tiles; tile++) next(tile, std::true_type());
    const uint32_t last = tiles - 1;
    barrier_wait(barriers.full_values(last % STAGES), last / STAGES & 1);
    wgmma_fence();
    gather(last % STAGES);
    wgmma_wait<0>();
    settle(o);

    // Through the warpgroup's own rows of the queries, which all its warps have left, so that what leaves does so
    // 16 bytes a thread. Pieces are permuted so that rows lie in different banks.
    asm volatile("bar.sync %0, 128;\n" ::"r"(1 + part) : "memory");
    bf16* staged = reinterpret_cast<bf16*>(q_tile + (part * 4 + warp) * 16 * HALF_ROW);
    auto staged_at = [&](uint32_t row, uint32_t piece) {
        return staged + (piece / 8 * HALF + row * HALF_ROW) / 2 + ((piece ^ row) & 7) * 8;
    };
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float total = sum[h];
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        const float inverse = 1.f / total;
#pragma unroll
        for (int n = 0; n < 16; n++)
            *reinterpret_cast<uint32_t*>(staged_at(h * 8 + (lane >> 2), n) + 2 * (lane & 3)) =
                pack2(o[4 * n + 2 * h] * inverse, o[4 * n + 2 * h + 1] * inverse);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const uint32_t row = i * 2 + lane / 16, piece = lane % 16, at = part * 64 + warp * 16 + row;
        if (at >= live) continue;
        bf16* to = a.out + (size_t(first_row + at) * a.heads + head) * HD + piece * 8;
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(staged_at(row, piece));
    }
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_prefill_hopper(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap key_map,
                             const __grid_constant__ TensorMap value_map, const __grid_constant__ PrefillArguments a) {
#ifdef HOPPER
    extern __shared__ unsigned char shared[];
    // Swizzling goes by addresses: tiles begin at multiples of 1024.
    const uint32_t base = shared_address(shared), q = (base + 1023) & ~1023u;
    unsigned char* q_tile = shared + (q - base);
    const uint32_t keys = q + TILE, values = keys + STAGES * TILE;
    const Barriers barriers{values + STAGES * TILE};

    const uint32_t head = blockIdx.x, kv_head = head / (a.heads / a.paged.kv_heads);
    const uint32_t sequence = a.tiles[2 * blockIdx.y], tile_first = a.tiles[2 * blockIdx.y + 1];
    // Asked for with the tile, of which there are as many as blocks.
    if (blockIdx.y >= *a.count) return;
    const uint32_t start = a.starts[sequence], len = a.starts[sequence + 1] - start;
    const uint32_t context = a.paged.context(sequence);
    const uint32_t* table = a.paged.table(sequence);
    // Rows outside the batch: a broken list of tiles.
    if (tile_first >= len || start + len > a.rows || context < len) return;
    const uint32_t first_row = start + tile_first;
    const uint32_t live = min(len - tile_first, uint32_t(ROWS));
    // The first row's position: it sees the keys up to its own.
    const uint32_t position = context - len + tile_first;
    const uint32_t tiles = (position + live + KEYS - 1) / KEYS;

    if (threadIdx.x == 0) {
        barrier_init(barriers.q(), 1);
        barrier_init(barriers.tail(), 1);
        for (int slot = 0; slot < STAGES; slot++) {
            barrier_init(barriers.full_keys(slot), 1);
            barrier_init(barriers.full_values(slot), 1);
            // The warps of two warpgroups.
            barrier_init(barriers.free_keys(slot), 8);
            barrier_init(barriers.free_values(slot), 8);
        }
        asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
        fence_async();
    }
    __syncthreads();

    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;\n");
        if (threadIdx.x >= 32) return;
        if (threadIdx.x == 0) {
            // Rows behind the sequence's are another's, or zeros behind the batch: nobody sees what they give.
            barrier_expect(barriers.q(), TILE);
            copy_box(q, &q_map, head * HD, first_row, barriers.q());
            copy_box(q + HALF, &q_map, head * HD + HD / 2, first_row, barriers.q());
        }
        __syncwarp();
        bring(a.paged, &key_map, &value_map, table, kv_head, context, tiles, keys, values, barriers);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;\n");
        attend(a, head, first_row, live, position, tiles, q, keys, values, q_tile, barriers);
    }
#endif
}
