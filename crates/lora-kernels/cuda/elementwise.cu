// Embedding, norms, activations: one block a row, 8 elements a thread at a time. The residual stream is f32,
// what flows into matrix products is bf16. Widths are multiples of 8. Every kernel begins while the one before
// it ends, and waits for it: see common.cuh.
#include "common.cuh"

// out[row] = table[token of row]
extern "C" __global__ void embed(const uint32_t* __restrict__ tokens, const bf16* __restrict__ table,
                                 float* __restrict__ out, uint32_t width, uint32_t vocab) {
    let_next_begin();
    uint32_t row = blockIdx.x;
    uint32_t token = tokens[row];
    // Ids are checked on the host: this keeps a broken one from reading elsewhere.
    if (token >= vocab) token = 0;
    const Bf16x8* from = reinterpret_cast<const Bf16x8*>(table + size_t(token) * width);
    float4* to = reinterpret_cast<float4*>(out + size_t(row) * width);
    wait_for_previous();
    for (uint32_t i = threadIdx.x; i < width / 8; i += blockDim.x) {
        float v[8];
        unpack(from[i], v);
        to[2 * i] = make_float4(v[0], v[1], v[2], v[3]);
        to[2 * i + 1] = make_float4(v[4], v[5], v[6], v[7]);
    }
}

// x[row] += table[position of row + offset]
extern "C" __global__ void add_positions(const uint32_t* __restrict__ positions, const bf16* __restrict__ table,
                                         float* x, uint32_t width, uint32_t offset) {
    let_next_begin();
    uint32_t row = blockIdx.x;
    const Bf16x8* from = reinterpret_cast<const Bf16x8*>(table + size_t(positions[row] + offset) * width);
    float4* to = reinterpret_cast<float4*>(x + size_t(row) * width);
    wait_for_previous();
    for (uint32_t i = threadIdx.x; i < width / 8; i += blockDim.x) {
        float v[8];
        unpack(from[i], v);
        float4 a = to[2 * i], b = to[2 * i + 1];
        to[2 * i] = make_float4(a.x + v[0], a.y + v[1], a.z + v[2], a.w + v[3]);
        to[2 * i + 1] = make_float4(b.x + v[4], b.y + v[5], b.z + v[6], b.w + v[7]);
    }
}

// How many groups of 8 elements one thread of a norm keeps in registers: rows of up to 8 * 1024 * this.
constexpr int KEPT = 2;

__device__ __forceinline__ void load_row(const float* x, uint32_t groups, float (&v)[KEPT][8]) {
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        uint32_t i = threadIdx.x + k * blockDim.x;
        float4 a = make_float4(0, 0, 0, 0), b = a;
        if (i < groups) {
            a = reinterpret_cast<const float4*>(x)[2 * i];
            b = reinterpret_cast<const float4*>(x)[2 * i + 1];
        }
        v[k][0] = a.x, v[k][1] = a.y, v[k][2] = a.z, v[k][3] = a.w;
        v[k][4] = b.x, v[k][5] = b.y, v[k][6] = b.z, v[k][7] = b.w;
    }
}

// out = x / sqrt(mean(x^2) + eps) * weight
extern "C" __global__ void rms_norm(const float* x, const bf16* __restrict__ weight, bf16* out, uint32_t width,
                                    float eps) {
    __shared__ float shared[32];
    let_next_begin();
    uint32_t groups = width / 8;
    float v[KEPT][8], sum = 0;
    Bf16x8 scales[KEPT];
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        uint32_t i = threadIdx.x + k * blockDim.x;
        // By a load that is not moved: it is to be on its way when x is waited for.
        if (i < groups) scales[k].bits = load_fresh(reinterpret_cast<const uint4*>(weight) + i);
    }
    wait_for_previous();
    load_row(x + size_t(blockIdx.x) * width, groups, v);
#pragma unroll
    for (int k = 0; k < KEPT; k++)
#pragma unroll
        for (int j = 0; j < 8; j++) sum += v[k][j] * v[k][j];
    float scale = rsqrtf(block_sum(sum, shared) / width + eps);
    Bf16x8* to = reinterpret_cast<Bf16x8*>(out + size_t(blockIdx.x) * width);
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        uint32_t i = threadIdx.x + k * blockDim.x;
        if (i >= groups) break;
        float w[8];
        unpack(scales[k], w);
#pragma unroll
        for (int j = 0; j < 8; j++) w[j] *= v[k][j] * scale;
        to[i] = pack(w);
    }
}

// out = (x - mean) / sqrt(variance + eps) * weight + bias
extern "C" __global__ void layer_norm(const float* x, const bf16* __restrict__ weight,
                                      const bf16* __restrict__ bias, bf16* out, uint32_t width, float eps) {
    __shared__ float shared[32];
    let_next_begin();
    wait_for_previous();
    uint32_t groups = width / 8;
    float v[KEPT][8], sum = 0;
    load_row(x + size_t(blockIdx.x) * width, groups, v);
#pragma unroll
    for (int k = 0; k < KEPT; k++)
#pragma unroll
        for (int j = 0; j < 8; j++) sum += v[k][j];
    float mean = block_sum(sum, shared) / width;
    sum = 0;
#pragma unroll
    for (int k = 0; k < KEPT; k++)
        if (threadIdx.x + k * blockDim.x < groups)
#pragma unroll
            for (int j = 0; j < 8; j++) sum += (v[k][j] - mean) * (v[k][j] - mean);
    float scale = rsqrtf(block_sum(sum, shared) / width + eps);
    Bf16x8* to = reinterpret_cast<Bf16x8*>(out + size_t(blockIdx.x) * width);
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        uint32_t i = threadIdx.x + k * blockDim.x;
        if (i >= groups) break;
        float w[8], b[8];
        unpack(reinterpret_cast<const Bf16x8*>(weight)[i], w);
        unpack(reinterpret_cast<const Bf16x8*>(bias)[i], b);
#pragma unroll
        for (int j = 0; j < 8; j++) w[j] = (v[k][j] - mean) * scale * w[j] + b[j];
        to[i] = pack(w);
    }
}

// out = silu(gate) * up; a row of gate_up is gate, then up. blockIdx.y takes parts of a row.
extern "C" __global__ void silu_mul(const bf16* gate_up, bf16* out, uint32_t width) {
    let_next_begin();
    wait_for_previous();
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= width / 8) return;
    size_t row = blockIdx.y;
    const Bf16x8* from = reinterpret_cast<const Bf16x8*>(gate_up + row * 2 * width);
    float g[8], u[8];
    unpack(from[i], g);
    unpack(from[width / 8 + i], u);
#pragma unroll
    for (int j = 0; j < 8; j++) g[j] = silu(g[j]) * u[j];
    reinterpret_cast<Bf16x8*>(out + row * width)[i] = pack(g);
}

// x = max(x, 0), over groups of 8.
extern "C" __global__ void relu(bf16* x, uint32_t groups) {
    let_next_begin();
    wait_for_previous();
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= groups) return;
    float v[8];
    unpack(reinterpret_cast<Bf16x8*>(x)[i], v);
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = fmaxf(v[j], 0.f);
    reinterpret_cast<Bf16x8*>(x)[i] = pack(v);
}

// out[j] = x[rows[j]]
extern "C" __global__ void gather(const uint32_t* __restrict__ rows, const float* x, float* out,
                                  uint32_t width) {
    let_next_begin();
    const float4* from = reinterpret_cast<const float4*>(x + size_t(rows[blockIdx.x]) * width);
    float4* to = reinterpret_cast<float4*>(out + size_t(blockIdx.x) * width);
    wait_for_previous();
    for (uint32_t i = threadIdx.x; i < width / 4; i += blockDim.x) to[i] = from[i];
}
