// Causal attention of sequences of many rows over the paged cache: bound by the tensor cores.
//
// A block takes 128 rows of one sequence for one head, a warp 32 of them, so that what it reads from shared
// memory feeds two products. Keys and values come in tiles of 64 tokens, each twice, so that the next tile's
// copies run beside this tile's products. Scores, weights and the output stay in registers; the running maximum
// makes one pass enough. Tiles come from the front, so that the first one gives every row a finite maximum.
#include "attention.cuh"

constexpr int ROWS = 128;
constexpr int KEYS = 64;
constexpr int WARPS = 4;
constexpr int THREADS = WARPS * 32;

template <int HD>
__device__ __forceinline__ void prefill(const PrefillArguments& a) {
    constexpr int PIECES = HD / 8;               // of 16 bytes, in a row
    constexpr int STEPS = HD / 16;               // of depth 16, in a row
    constexpr int PER_PASS = THREADS / PIECES;   // rows that the block copies at once
    constexpr int PASSES = KEYS / PER_PASS;
    extern __shared__ __align__(128) unsigned char shared[];
    bf16* q_tile = reinterpret_cast<bf16*>(shared);  // [ROWS, HD]
    bf16* key_tiles = q_tile + ROWS * HD;            // [2, KEYS, HD]
    bf16* value_tiles = key_tiles + 2 * KEYS * HD;   // [2, KEYS, HD]

    const Paged& paged = a.paged;
    const uint32_t lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const uint32_t head = blockIdx.x, kv_head = head / (a.heads / paged.kv_heads);
    const uint32_t sequence = a.tiles[2 * blockIdx.y], tile_first = a.tiles[2 * blockIdx.y + 1];
    // Asked for with the tile, of which there are as many as blocks.
    if (blockIdx.y >= *a.count) return;
    const uint32_t start = a.starts[sequence], len = a.starts[sequence + 1] - start;
    const uint32_t context = paged.context(sequence);
    const uint32_t* table = paged.table(sequence);
    // Rows outside the batch: a broken list of tiles.
    if (tile_first >= len || start + len > a.rows || context < len) return;
    const uint32_t first_row = start + tile_first;
    const uint32_t live = min(len - tile_first, uint32_t(ROWS));
    // The first row's position: it sees the keys up to its own.
    const uint32_t position = context - len + tile_first;
    const uint32_t end = position + live;
    const uint32_t tiles = (end + KEYS - 1) / KEYS;

    const uint32_t copy_row = threadIdx.x / PIECES, copy_piece = threadIdx.x % PIECES;
#pragma unroll
    for (int i = 0; i < ROWS / PER_PASS; i++) {
        uint32_t r = i * PER_PASS + copy_row;
        const bf16* from = a.q + size_t(first_row + min(r, live - 1)) * a.q_width + head * HD + copy_piece * 8;
        copy_async_16(q_tile + swizzled<HD>(r, copy_piece), from, r < live);
    }

    // The blocks of a tile's tokens, eight at most: lane l keeps the (l % 8)-th.
    auto blocks_of = [&](uint32_t tile) {
        uint32_t block = (tile * KEYS >> paged.block_shift) + (lane & 7);
        return __ldg(table + min(block, (end - 1) >> paged.block_shift));
    };
    // Rows past the end are zeros: a masked weight times whatever lies there must be zero.
    auto copy = [&](const bf16* from, bf16* to, uint32_t tile, uint32_t blocks) {
#pragma unroll
        for (int i = 0; i < PASSES; i++) {
            uint32_t r = i * PER_PASS + copy_row, token = tile * KEYS + r;
            uint32_t block = __shfl_sync(0xffffffffu, blocks, r >> paged.block_shift);
            copy_async_16(to + swizzled<HD>(r, copy_piece),
                          from + size_t(paged.row(block, kv_head, token)) * HD + copy_piece * 8, token < end);
        }
    };

    uint32_t blocks = blocks_of(0);
    copy(paged.keys, key_tiles, 0, blocks);
    copy_async_commit();
    copy(paged.values, value_tiles, 0, blocks);
    copy_async_commit();
    blocks = blocks_of(1);

    // Of rows g and g + 8 of the warp's two groups of 16, g = lane / 4: the maximum of all lanes' scores, this
    // lane's sum of weights.
    float maximum[2][2], sum[2][2], o[2][2 * STEPS][4];
#pragma unroll
    for (int m = 0; m < 2; m++) {
        maximum[m][0] = maximum[m][1] = MINUS_INFINITY;
        sum[m][0] = sum[m][1] = 0.f;
#pragma unroll
        for (int n = 0; n < 2 * STEPS; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) o[m][n][j] = 0.f;
    }
    const uint32_t warp_position = position + warp * 32;

    for (uint32_t tile = 0; tile < tiles; tile++) {
        const bf16* keys = key_tiles + (tile & 1) * KEYS * HD;
        const bf16* values = value_tiles + (tile & 1) * KEYS * HD;
        // Whether a row of this warp sees a key of this tile. The first tile is seen by all.
        const bool seen = tile * KEYS < warp_position + 32;
        uint32_t p[2][KEYS / 16][4];

        // Keys have come; values may be under way. Behind the barrier nobody reads the other pair of tiles.
        copy_async_wait<1>();
        __syncthreads();
        if (tile + 1 < tiles) copy(paged.keys, key_tiles + ((tile + 1) & 1) * KEYS * HD, tile + 1, blocks);
        copy_async_commit();

        if (seen) {
            float s[2][KEYS / 8][4];
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (int j = 0; j < 4; j++) s[m][n][j] = 0.f;
#pragma unroll
            for (int k = 0; k < STEPS; k++) {
                uint32_t left[2][4];
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    uint32_t row = warp * 32 + m * 16 + (lane & 15);
                    load_matrix_x4(left[m], q_tile + swizzled<HD>(row, 2 * k + (lane >> 4)));
                }
#pragma unroll
                for (int n = 0; n < KEYS / 16; n++) {
                    uint32_t right[4];
                    uint32_t row = n * 16 + (lane & 7) + ((lane >> 4) << 3);
                    load_matrix_x4(right, keys + swizzled<HD>(row, 2 * k + ((lane >> 3) & 1)));
                    uint32_t low[2] = {right[0], right[1]}, high[2] = {right[2], right[3]};
#pragma unroll
                    for (int m = 0; m < 2; m++) {
                        mma_16816(s[m][2 * n], left[m], low);
                        mma_16816(s[m][2 * n + 1], left[m], high);
                    }
                }
            }
            if ((tile + 1) * KEYS > warp_position + 1) {
#pragma unroll
                for (int m = 0; m < 2; m++)
#pragma unroll
                    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            uint32_t key = tile * KEYS + n * 8 + 2 * (lane & 3) + (j & 1);
                            uint32_t own = warp_position + m * 16 + (lane >> 2) + 8 * (j >> 1);
                            if (key > own) s[m][n][j] = MINUS_INFINITY;
                        }
            }

            float factor[2][2];
            bool grew = false;
#pragma unroll
            for (int m = 0; m < 2; m++) {
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    float top = MINUS_INFINITY;
#pragma unroll
                    for (int n = 0; n < KEYS / 8; n++) top = fmaxf(top, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
                    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
                    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
                    // Finite from the first tile on.
                    top = fmaxf(top, maximum[m][h]);
                    grew |= top > maximum[m][h];
                    factor[m][h] = exp2_fast((maximum[m][h] - top) * a.scale);
                    maximum[m][h] = top;
                    const float scaled = top * a.scale;
                    float total = 0.f;
#pragma unroll
                    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                        for (int j = 2 * h; j < 2 * h + 2; j++) {
                            s[m][n][j] = exp2_fast(fmaf(s[m][n][j], a.scale, -scaled));
                            total += s[m][n][j];
                        }
                    sum[m][h] = sum[m][h] * factor[m][h] + total;
                }
                // What came out of the first product is laid out as the second one's left operand.
#pragma unroll
                for (int k = 0; k < KEYS / 16; k++) {
                    p[m][k][0] = pack2(s[m][2 * k][0], s[m][2 * k][1]);
                    p[m][k][1] = pack2(s[m][2 * k][2], s[m][2 * k][3]);
                    p[m][k][2] = pack2(s[m][2 * k + 1][0], s[m][2 * k + 1][1]);
                    p[m][k][3] = pack2(s[m][2 * k + 1][2], s[m][2 * k + 1][3]);
                }
            }
            if (__any_sync(0xffffffffu, grew)) {
#pragma unroll
                for (int m = 0; m < 2; m++)
#pragma unroll
                    for (int n = 0; n < 2 * STEPS; n++)
#pragma unroll
                        for (int j = 0; j < 4; j++) o[m][n][j] *= factor[m][j >> 1];
            }
        }

        copy_async_wait<1>();
        __syncthreads();
        if (tile + 1 < tiles) copy(paged.values, value_tiles + ((tile + 1) & 1) * KEYS * HD, tile + 1, blocks);
        copy_async_commit();
        blocks = blocks_of(tile + 2);

        if (seen) {
#pragma unroll
            for (int k = 0; k < KEYS / 16; k++)
#pragma unroll
                for (int n = 0; n < STEPS; n++) {
                    uint32_t right[4];
                    load_matrix_x4_trans(right, values + swizzled<HD>(k * 16 + (lane & 15), 2 * n + (lane >> 4)));
                    uint32_t low[2] = {right[0], right[1]}, high[2] = {right[2], right[3]};
#pragma unroll
                    for (int m = 0; m < 2; m++) {
                        mma_16816(o[m][2 * n], p[m][k], low);
                        mma_16816(o[m][2 * n + 1], p[m][k], high);
                    }
                }
        }
    }

    // Through the warp's own rows of the queries' tile, so that what leaves does so 16 bytes a thread.
    __syncwarp();
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float total = sum[m][h];
            total += __shfl_xor_sync(0xffffffffu, total, 1);
            total += __shfl_xor_sync(0xffffffffu, total, 2);
            float inverse = 1.f / total;
            uint32_t row = warp * 32 + m * 16 + h * 8 + (lane >> 2);
#pragma unroll
            for (int n = 0; n < 2 * STEPS; n++)
                *reinterpret_cast<uint32_t*>(q_tile + swizzled<HD>(row, n) + 2 * (lane & 3)) =
                    pack2(o[m][n][2 * h] * inverse, o[m][n][2 * h + 1] * inverse);
        }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        uint32_t row = warp * 32 + i * (32 / PIECES) + lane / PIECES, piece = lane % PIECES;
        if (row >= live) continue;
        bf16* to = a.out + (size_t(first_row + row) * a.heads + head) * HD + piece * 8;
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(q_tile + swizzled<HD>(row, piece));
    }
}

#define PREFILL(HD)                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                 \
        attention_prefill_##HD(const __grid_constant__ PrefillArguments a) {                 \
        prefill<HD>(a);                                                                      \
    }
PREFILL(32)
PREFILL(64)
PREFILL(128)
