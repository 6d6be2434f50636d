// A tile of 64 rows of an output in shared memory, and what adds an adapter's product to it: what the kernels
// share that expand segments of many rows, on their own or with what follows them.
#pragma once
#include "lora.cuh"

constexpr int ROWS = 64;
// A warp for each 16 rows.
constexpr int THREADS = 128;
// Ranks of a product.
constexpr int UNIT = 16;

// An output's tile in shared memory: rows of 256 bytes, 16 pieces. Pieces are reordered so that the products'
// pairs, 4 bytes of 8 rows or 8 bytes of 4 rows at once, lie in different banks.
template <typename T>
struct OutTile {
    static constexpr uint32_t COLUMNS = 256 / sizeof(T);
    static constexpr uint32_t PIECE = 16 / sizeof(T);
    // Pieces of 8 columns in a row of Bt's tile.
    static constexpr uint32_t BT_PIECES = COLUMNS / 8;
    static __device__ __forceinline__ uint32_t piece(uint32_t row, uint32_t piece) {
        return row * 16 + (piece ^ row % 8 * (sizeof(T) / 2));
    }
    static __device__ __forceinline__ uint32_t element(uint32_t row, uint32_t column) {
        return piece(row, column / PIECE) * PIECE + column % PIECE;
    }
    static __device__ __forceinline__ uint32_t bt(uint32_t rank, uint32_t piece) {
        return rank * COLUMNS + (piece ^ rank % 8) * 8;
    }
};

// Ranks of a segment in whole products.
__device__ __forceinline__ uint32_t whole_ranks(const Segment& segment) { return (segment.rank + UNIT - 1) / UNIT * UNIT; }

// Elements between rows of h's tile: an odd number of pieces, so that neighbouring rows lie in different banks.
__device__ __forceinline__ uint32_t h_tile_pitch(uint32_t ranks) { return ranks + 8; }

// Asks for `rows` rows of `columns` columns of the output. Each warp copies the 16 rows that it works on.
template <typename T>
__device__ __forceinline__ void load_out(uint4* tile, const T* out, uint32_t rows, uint32_t columns, uint32_t width) {
    using Shape = OutTile<T>;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const uint32_t row = warp * 16 + i * 2 + lane / 16, piece = lane % 16;
        const bool valid = row < rows && piece * Shape::PIECE < columns;
        if (valid) copy_async_16(tile + Shape::piece(row, piece), out + row * static_cast<size_t>(width) + piece * Shape::PIECE);
    }
}

// Asks for Bt's columns from `column_0` on, of `part`, which is A and then Bt.
template <typename T>
__device__ __forceinline__ void load_bt(bf16* tile, const bf16* part, const Segment& segment, uint32_t inputs,
                                        uint32_t outputs, uint32_t column_0, uint32_t columns) {
    using Shape = OutTile<T>;
    const bf16* bt = part + static_cast<size_t>(segment.rank) * inputs + column_0;
    for (uint32_t i = threadIdx.x; i < whole_ranks(segment) * Shape::BT_PIECES; i += THREADS) {
        const uint32_t rank = i / Shape::BT_PIECES, piece = i % Shape::BT_PIECES;
        const bool valid = rank < segment.rank && piece * 8 < columns;
        copy_async_16(tile + Shape::bt(rank, piece), valid ? bt + static_cast<size_t>(rank) * outputs + piece * 8 : part,
                      valid);
    }
}

// Asks for `rows` rows of h `[rows, pitch]`.
__device__ __forceinline__ void load_h(bf16* tile, const bf16* h, uint32_t rows, uint32_t ranks, uint32_t pitch) {
    const uint32_t pieces = ranks / 8, tile_pitch = h_tile_pitch(ranks);
    for (uint32_t i = threadIdx.x; i < ROWS * pieces; i += THREADS) {
        const uint32_t row = i / pieces, piece = i % pieces;
        const bool valid = row < rows;
        copy_async_16(tile + row * tile_pitch + piece * 8, h + (valid ? row * static_cast<size_t>(pitch) : 0) + piece * 8,
                      valid);
    }
}

// A thread's sums of 32 columns of its warp's 16 rows, as products leave them: for each 8 columns two of row `lane / 4` and
// two of the row 8 below.
struct Sums {
    float of[4][4];

    // From a tile of the output.
    template <typename T>
    __device__ __forceinline__ void load(const T* tile, uint32_t column) {
        using Shape = OutTile<T>;
        const uint32_t lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4, pair = column + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < 4; n++) {
            const float2 top = load_pair(tile + Shape::element(row, pair + n * 8));
            const float2 low = load_pair(tile + Shape::element(row + 8, pair + n * 8));
            of[n][0] = top.x, of[n][1] = top.y, of[n][2] = low.x, of[n][3] = low.y;
        }
    }

    // Into it.
    template <typename T>
    __device__ __forceinline__ void store(T* tile, uint32_t column) const {
        using Shape = OutTile<T>;
        const uint32_t lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4, pair = column + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < 4; n++) {
            store_pair(tile + Shape::element(row, pair + n * 8), make_float2(of[n][0], of[n][1]));
            store_pair(tile + Shape::element(row + 8, pair + n * 8), make_float2(of[n][2], of[n][3]));
        }
    }

    // sums += h . Bt; `T`: the output's type, by which Bt's tile is laid out.
    template <typename T>
    __device__ __forceinline__ void add(const bf16* bt_tile, const bf16* h_tile, uint32_t ranks, uint32_t column) {
        const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, tile_pitch = h_tile_pitch(ranks);
        for (uint32_t rank = 0; rank < ranks; rank += UNIT) {
            uint32_t a[4];
            load_matrix_x4(a, h_tile + (warp * 16 + lane % 16) * tile_pitch + rank + lane / 16 * 8);
#pragma unroll
            for (int pair = 0; pair < 2; pair++) {
                uint32_t b[4];
                load_matrix_x4_trans(b, bt_tile + OutTile<T>::bt(rank + lane % 16, column / 8 + pair * 2 + lane / 16));
                const uint32_t b_first[2] = {b[0], b[1]}, b_second[2] = {b[2], b[3]};
                mma_16816(of[pair * 2], a, b_first);
                mma_16816(of[pair * 2 + 1], a, b_second);
            }
        }
    }
};

// out += h . Bt for the 16 rows of each warp: the sums start from the tile and end in it.
template <typename T>
__device__ __forceinline__ void add_product(T* out_tile, const bf16* bt_tile, const bf16* h_tile, uint32_t ranks,
                                            uint32_t columns) {
    for (uint32_t column = 0; column < columns; column += 32) {
        Sums sums;
        sums.load(out_tile, column);
        sums.add<T>(bt_tile, h_tile, ranks, column);
        sums.store(out_tile, column);
    }
}
