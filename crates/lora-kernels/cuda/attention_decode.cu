// Attention of sequences of one row over the paged cache: bound by reading the cache.
//
// A block takes a share of one sequence's context for all query heads of one kv head, so that the cache is read
// once. Its warps work alone: each has a ring of stages in shared memory that asynchronous copies fill, and a
// running maximum, sum and weighted values of its own. They are merged at the end, and the last block of a
// sequence and head merges the shares. Products run on tensor cores with the tokens as rows, scores^T = K Q^T
// and out^T = V^T P^T, so that up to 8 query heads cost what one costs.
#include "attention.cuh"

struct DecodeArguments {
    Paged paged;
    const bf16* q;          // [rows, q_width]
    bf16* out;              // [rows, heads * head_dim]
    float* partials;        // [sequences, heads, splits, head_dim], then [sequences, heads, splits, 2]
    uint32_t* counters;     // [sequences, gridDim.y], zero between launches
    const uint32_t* count;  // how many sequences are real
    uint32_t q_width, heads;
    uint32_t least;  // tokens that a block takes at least: below, another block costs more than it saves
    float scale;     // of scores, times log2(e)
};

constexpr int WARPS = 4;
// Two blocks of 4 warps with 3 stages of 8 KB keep up to 190 KB of copies in flight on a multiprocessor.
constexpr int STAGES = 3;

__device__ __forceinline__ uint32_t transposed(uint32_t v) {
    uint32_t out;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(out) : "r"(v));
    return out;
}

// NT: groups of 8 query heads of one block.
template <int HD, int NT>
__device__ __forceinline__ void decode(const DecodeArguments& a) {
    constexpr int PIECES = HD / 8;         // of 16 bytes, in a row
    constexpr int TOKENS = 2048 / HD;      // of a stage: 4 KB of keys, 4 KB of values
    constexpr int TILES = TOKENS / 16;     // of a stage
    constexpr int PER_COPY = 32 / PIECES;  // rows that one copy of a warp takes
    constexpr int COPIES = TOKENS / PER_COPY;
    constexpr int OWN = (TOKENS + 31) / 32;  // rows of a stage whose place one lane keeps
    constexpr int STEP = WARPS * TOKENS;
    constexpr int STAGE = TOKENS * HD;
    constexpr int STEPS = HD / 16;
    constexpr int QUERIES = 8 * NT;
    extern __shared__ __align__(128) unsigned char shared[];

    let_next_begin();
    const Paged& paged = a.paged;
    const uint32_t lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const uint32_t split = blockIdx.x, sequence = blockIdx.z;
    const uint32_t group = a.heads / paged.kv_heads;
    const uint32_t parts = (group + QUERIES - 1) / QUERIES;
    const uint32_t kv_head = blockIdx.y / parts;
    const uint32_t first_query = blockIdx.y % parts * QUERIES;
    const uint32_t queries = min(group - first_query, uint32_t(QUERIES));
    const uint32_t first_head = kv_head * group + first_query;

    const uint32_t real = *a.count;
    const uint32_t context = paged.context(sequence);
    const uint32_t* table = paged.table(sequence);
    // Blocks without work wait too: see common.cuh.
    if (sequence >= real) return wait_for_previous();
    uint32_t share = max((context + gridDim.x - 1) / gridDim.x, a.least);
    share = (share + STEP - 1) / STEP * STEP;
    const uint32_t shares = (context + share - 1) / share;
    if (split >= shares) return wait_for_previous();
    const uint32_t end = min(context, (split + 1) * share);
    // This warp's stage i holds the tokens from first + i * STEP.
    const uint32_t first = split * share + warp * TOKENS;
    const uint32_t stages = first < end ? (end - first + STEP - 1) / STEP : 0;

    bf16* ring = reinterpret_cast<bf16*>(shared) + warp * (STAGES * 2 * STAGE);

    // The blocks of a stage's tokens: lane l keeps those of rows l, l + 32, ... (of 16 rows, all lanes keep some).
    auto blocks_of = [&](uint32_t stage, uint32_t(&blocks)[OWN]) {
#pragma unroll
        for (int k = 0; k < OWN; k++) {
            uint32_t token = min(first + stage * STEP + (lane & (TOKENS - 1)) + k * 32, end - 1);
            blocks[k] = __ldg(table + (token >> paged.block_shift));
        }
    };
    auto rows_of = [&](uint32_t stage, const uint32_t(&blocks)[OWN], uint32_t(&rows)[OWN]) {
#pragma unroll
        for (int k = 0; k < OWN; k++) {
            uint32_t token = min(first + stage * STEP + (lane & (TOKENS - 1)) + k * 32, end - 1);
            rows[k] = paged.row(blocks[k], kv_head, token);
        }
    };
    // Rows past the end are zeros: a masked weight times whatever lies there must be zero.
    auto copy = [&](const bf16* from, bf16* to, uint32_t stage, const uint32_t(&rows)[OWN]) {
#pragma unroll
        for (int c = 0; c < COPIES; c++) {
            uint32_t r = c * PER_COPY + lane / PIECES, piece = lane % PIECES;
            uint32_t row = __shfl_sync(0xffffffffu, rows[c * PER_COPY / 32], r & 31);
            copy_async_16(to + swizzled<HD>(r, piece), from + size_t(row) * HD + piece * 8,
                          first + stage * STEP + r < end);
        }
    };

    uint32_t blocks[STAGES + 1][OWN], rows[OWN];
#pragma unroll
    for (int i = 0; i <= STAGES; i++) blocks_of(i, blocks[i]);
    uint32_t next[OWN];
#pragma unroll
    for (int k = 0; k < OWN; k++) next[k] = blocks[STAGES][k];
    // Only the context's last token is of this step; what comes before it is asked for before the wait.
#pragma unroll
    for (int i = 0; i < STAGES; i++) {
        if (first + i * STEP + TOKENS >= context) wait_for_previous();
        rows_of(i, blocks[i], rows);
        if (i < stages) copy(paged.keys, ring + i * 2 * STAGE, i, rows);
        copy_async_commit();
        if (i < stages) copy(paged.values, ring + i * 2 * STAGE + STAGE, i, rows);
        copy_async_commit();
    }

    wait_for_previous();
    // Queries as the right operand: lane holds elements 2t, 2t+1 and 8 further of query g, t = lane % 4, g = lane / 4.
    uint32_t q[NT][STEPS][2];
#pragma unroll
    for (int n = 0; n < NT; n++) {
        uint32_t query = n * 8 + (lane >> 2);
        const bf16* from = a.q + size_t(sequence) * a.q_width + (first_head + query) * HD + 2 * (lane & 3);
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
            bool is = query < queries;
            q[n][k][0] = is ? *reinterpret_cast<const uint32_t*>(from + k * 16) : 0u;
            q[n][k][1] = is ? *reinterpret_cast<const uint32_t*>(from + k * 16 + 8) : 0u;
        }
    }

    // Of queries 8n + 2t and 8n + 2t + 1: the maximum of all lanes' scores, this lane's sum of weights.
    float maximum[NT][2], sum[NT][2], o[NT][STEPS][4];
#pragma unroll
    for (int n = 0; n < NT; n++) {
        maximum[n][0] = maximum[n][1] = MINUS_INFINITY;
        sum[n][0] = sum[n][1] = 0.f;
#pragma unroll
        for (int k = 0; k < STEPS; k++)
#pragma unroll
            for (int j = 0; j < 4; j++) o[n][k][j] = 0.f;
    }

    uint32_t slot = 0;
    for (uint32_t i = 0; i < stages; i++) {
        bf16* keys = ring + slot * 2 * STAGE;
        bf16* values = keys + STAGE;
        slot = slot + 1 == STAGES ? 0 : slot + 1;
        rows_of(i + STAGES, next, rows);
        blocks_of(i + STAGES + 1, next);

        // Groups in flight: K and V of STAGES stages, this stage's keys first.
        copy_async_wait<2 * STAGES - 1>();
        __syncwarp();
        // Two sums each, for shorter chains.
        float s[2][NT][TILES][4] = {};
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
#pragma unroll
            for (int m = 0; m < TILES; m++) {
                uint32_t left[4];
                load_matrix_x4(left, keys + swizzled<HD>(m * 16 + (lane & 15), 2 * k + (lane >> 4)));
#pragma unroll
                for (int n = 0; n < NT; n++) mma_16816(s[k & 1][n][m], left, q[n][k]);
            }
        }
        __syncwarp();
        if (i + STAGES < stages) copy(paged.keys, keys, i + STAGES, rows);
        copy_async_commit();

        uint32_t base = first + i * STEP;
        uint32_t p[NT][TILES][2];
        float factor[NT][2];
        bool grew = false;
#pragma unroll
        for (int n = 0; n < NT; n++) {
            float top[2] = {MINUS_INFINITY, MINUS_INFINITY};
#pragma unroll
            for (int m = 0; m < TILES; m++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    // Token g of the tile, or g + 8; query 2t, or 2t + 1.
                    uint32_t token = base + m * 16 + (lane >> 2) + 8 * (j >> 1);
                    float v = (s[0][n][m][j] + s[1][n][m][j]) * a.scale;
                    v = token < end ? v : MINUS_INFINITY;
                    s[0][n][m][j] = v;
                    top[j & 1] = fmaxf(top[j & 1], v);
                }
#pragma unroll
            for (int h = 0; h < 2; h++) {
#pragma unroll
                for (int x = 4; x < 32; x *= 2) top[h] = fmaxf(top[h], __shfl_xor_sync(0xffffffffu, top[h], x));
                // A stage has a token, so this is a number.
                top[h] = fmaxf(top[h], maximum[n][h]);
                grew |= top[h] > maximum[n][h];
                factor[n][h] = exp2_fast(maximum[n][h] - top[h]);
                maximum[n][h] = top[h];
                sum[n][h] *= factor[n][h];
            }
#pragma unroll
            for (int m = 0; m < TILES; m++) {
                float w[4];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    w[j] = exp2_fast(s[0][n][m][j] - maximum[n][j & 1]);
                    sum[n][j & 1] += w[j];
                }
                // From tokens as rows to tokens as the right operand's depth.
                p[n][m][0] = transposed(pack2(w[0], w[1]));
                p[n][m][1] = transposed(pack2(w[2], w[3]));
            }
        }
        if (__any_sync(0xffffffffu, grew)) {
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int k = 0; k < STEPS; k++)
#pragma unroll
                    for (int j = 0; j < 4; j++) o[n][k][j] *= factor[n][j & 1];
        }

        copy_async_wait<2 * STAGES - 1>();
        __syncwarp();
#pragma unroll
        for (int m = 0; m < TILES; m++) {
#pragma unroll
            for (int k = 0; k < STEPS; k++) {
                uint32_t left[4];
                uint32_t row = m * 16 + (lane & 7) + ((lane >> 4) << 3);
                load_matrix_x4_trans(left, values + swizzled<HD>(row, 2 * k + ((lane >> 3) & 1)));
#pragma unroll
                for (int n = 0; n < NT; n++) mma_16816(o[n][k], left, p[n][m]);
            }
        }
        __syncwarp();
        if (i + STAGES < stages) copy(paged.values, values, i + STAGES, rows);
        copy_async_commit();
    }

    // The warps' results over the rings, which all have left. A row is 4 longer than a head: no bank conflicts.
    constexpr int WIDTH = HD + 4;
    float* merged = reinterpret_cast<float*>(shared);          // [WARPS, QUERIES, WIDTH]
    float* stats = merged + WARPS * QUERIES * WIDTH;           // [WARPS, QUERIES, 2]: maximum, sum
    uint32_t* last = reinterpret_cast<uint32_t*>(stats + WARPS * QUERIES * 2);
    __syncthreads();
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            uint32_t query = n * 8 + 2 * (lane & 3) + h;
            float* to = merged + (warp * QUERIES + query) * WIDTH;
#pragma unroll
            for (int k = 0; k < STEPS; k++) {
                to[k * 16 + (lane >> 2)] = o[n][k][h];
                to[k * 16 + (lane >> 2) + 8] = o[n][k][2 + h];
            }
            float total = sum[n][h];
#pragma unroll
            for (int x = 4; x < 32; x *= 2) total += __shfl_xor_sync(0xffffffffu, total, x);
            if (lane < 4) {
                stats[(warp * QUERIES + query) * 2] = maximum[n][h];
                stats[(warp * QUERIES + query) * 2 + 1] = total;
            }
        }
    __syncthreads();

    const size_t slots = size_t(gridDim.z) * a.heads * gridDim.x;
    float* partial_stats = a.partials + slots * HD;
    for (uint32_t item = threadIdx.x; item < queries * PIECES; item += WARPS * 32) {
        uint32_t query = item / PIECES, piece = item % PIECES;
        // A warp that had nothing to do has -inf, 0 and zeros; warp 0 always has something.
        float top = MINUS_INFINITY, total = 0.f, v[8] = {};
#pragma unroll
        for (int w = 0; w < WARPS; w++) top = fmaxf(top, stats[(w * QUERIES + query) * 2]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float weight = exp2_fast(stats[(w * QUERIES + query) * 2] - top);
            total += weight * stats[(w * QUERIES + query) * 2 + 1];
            const float* from = merged + (w * QUERIES + query) * WIDTH + piece * 8;
#pragma unroll
            for (int j = 0; j < 8; j++) v[j] += weight * from[j];
        }
        size_t head = size_t(sequence) * a.heads + first_head + query;
        if (shares == 1) {
            float inverse = 1.f / total;
#pragma unroll
            for (int j = 0; j < 8; j++) v[j] *= inverse;
            reinterpret_cast<Bf16x8*>(a.out + head * HD)[piece] = pack(v);
        } else {
            size_t at = head * gridDim.x + split;
            float4* to = reinterpret_cast<float4*>(a.partials + at * HD) + 2 * piece;
            __stcg(to, make_float4(v[0], v[1], v[2], v[3]));
            __stcg(to + 1, make_float4(v[4], v[5], v[6], v[7]));
            if (piece == 0) __stcg(reinterpret_cast<float2*>(partial_stats) + at, make_float2(top, total));
        }
    }
    if (shares == 1) return;

    // The block that finishes last merges the shares. Each thread's writes are made visible before the count.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        uint32_t* counter = a.counters + size_t(sequence) * gridDim.y + blockIdx.y;
        uint32_t before = atomicAdd(counter, 1u);
        *last = before == shares - 1;
        // Ready for the next launch: no block of this one counts any more.
        if (before == shares - 1) atomicExch(counter, 0u);
        __threadfence();
    }
    __syncthreads();
    if (!*last) return;
    for (uint32_t item = threadIdx.x; item < queries * PIECES; item += WARPS * 32) {
        uint32_t query = item / PIECES, piece = item % PIECES;
        size_t head = size_t(sequence) * a.heads + first_head + query;
        const float2* s = reinterpret_cast<const float2*>(partial_stats) + head * gridDim.x;
        const float4* from = reinterpret_cast<const float4*>(a.partials + head * gridDim.x * HD) + 2 * piece;
        float top = MINUS_INFINITY, total = 0.f, v[8] = {};
#pragma unroll 8
        for (uint32_t i = 0; i < shares; i++) top = fmaxf(top, __ldcg(s + i).x);
#pragma unroll 4
        for (uint32_t i = 0; i < shares; i++) {
            float2 f = __ldcg(s + i);
            float4 x = __ldcg(from + i * (HD / 4)), y = __ldcg(from + i * (HD / 4) + 1);
            float weight = exp2_fast(f.x - top);
            total += weight * f.y;
            v[0] += weight * x.x, v[1] += weight * x.y, v[2] += weight * x.z, v[3] += weight * x.w;
            v[4] += weight * y.x, v[5] += weight * y.y, v[6] += weight * y.z, v[7] += weight * y.w;
        }
        float inverse = 1.f / total;
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] *= inverse;
        reinterpret_cast<Bf16x8*>(a.out + head * HD)[piece] = pack(v);
    }
}

#define DECODE(HD, NT)                                                                                  \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)                                         \
        attention_decode_##HD##_##NT(const __grid_constant__ DecodeArguments a) {                       \
        decode<HD, NT>(a);                                                                              \
    }
DECODE(32, 1)
DECODE(32, 2)
DECODE(64, 1)
DECODE(64, 2)
DECODE(128, 1)
DECODE(128, 2)
