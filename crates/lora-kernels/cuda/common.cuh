// What all kernels share: number conversions, reductions, asynchronous copies, tensor-core products.
#pragma once
#include <cuda_bf16.h>
#include <stdint.h>

using bf16 = __nv_bfloat16;

// Consecutive rows that use one adapter, or none's, as src/lora/layout.rs lays it out.
struct Segment {
    // The adapter's matrices in its slot; null in a cover of rows without one.
    const bf16* matrices;
    // `[layers * modules]` where each module's part begins, in units of 8 elements, or -1 where the adapter
    // leaves it alone; null where it adapts all, so that a part begins at rank times a constant.
    const int32_t* offsets;
    uint32_t start;
    uint32_t rows;
    uint32_t rank;
    float scale;
    // Where the adapter is still being copied into its slot while the step runs: how many layers have been, in a
    // count that goes on over all copies into the slot, and behind it `[layers]` how long the step waited for each,
    // in ns. Null where it is there already.
    uint32_t* arrival;
    // The count before this copy's first layer.
    uint32_t copied_before;
    uint32_t unused;
};

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
    return v;
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, o));
    return v;
}

// The sum over a block of at most 1024 threads; `shared` holds 32 floats.
__device__ __forceinline__ float block_sum(float v, float* shared) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    v = warp_sum(v);
    __syncthreads();
    if (lane == 0) shared[warp] = v;
    __syncthreads();
    v = lane < (blockDim.x + 31) / 32 ? shared[lane] : 0.f;
    return warp_sum(v);
}

// Eight bf16 in a 16-byte register quad. Not an array of pairs: those are copied one by one, by 4 bytes.
struct alignas(16) Bf16x8 {
    uint4 bits;
};

__device__ __forceinline__ void unpack(const Bf16x8& p, float (&out)[8]) {
    const uint32_t v[4] = {p.bits.x, p.bits.y, p.bits.z, p.bits.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        out[2 * i] = __uint_as_float(v[i] << 16);
        out[2 * i + 1] = __uint_as_float(v[i] & 0xffff0000u);
    }
}

__device__ __forceinline__ Bf16x8 pack(const float (&in)[8]) {
    uint32_t v[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        __nv_bfloat162 pair = __floats2bfloat162_rn(in[2 * i], in[2 * i + 1]);
        v[i] = *reinterpret_cast<uint32_t*>(&pair);
    }
    return {make_uint4(v[0], v[1], v[2], v[3])};
}

__device__ __forceinline__ float round_bf16(float v) { return __bfloat162float(__float2bfloat16_rn(v)); }

// x * sigmoid(x). A division that keeps the last bit takes ten instructions, more than all else.
__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }

// The device's clock.
__device__ __forceinline__ uint64_t nanoseconds() {
    uint64_t now;
    asm volatile("mov.u64 %0, %globaltimer;\n" : "=l"(now) :: "memory");
    return now;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory, past the L1 cache; zeros where `valid` is false.
__device__ __forceinline__ void copy_async_16(void* to, const void* from, bool valid = true) {
    int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)), "l"(from), "r"(bytes));
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;\n"); }
template <int N>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(N));
}

// c += a * b, 16 x 8 x 16, bf16 in, f32 out.
__device__ __forceinline__ void mma_16816(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], const void* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(p)));
}
__device__ __forceinline__ void load_matrix_x4_trans(uint32_t (&r)[4], const void* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(p)));
}

// A kernel may be launched so that it begins while the one before it ends (programmatic dependent launch). The
// first says when its successor may begin; the second waits until all of its predecessor is over and visible.
// Where the kernels were launched one after the other, neither does anything.
//
// The rule for a kernel that is launched so (`Stream::launch_next`): before its wait it reads only what no
// kernel of the step writes (weights, adapters that are there, what the host has sent, cached tokens of earlier
// steps), and it writes nothing at all. And every block waits, those without work too: a kernel that is over then says that its
// predecessor is over, and the predecessor's predecessor by the same argument, so that after one wait
// everything launched earlier is over. Without that, C after B after A could miss A's results, since C begins
// when B has begun, which may be before A has ended. Kernels that are not launched so (libraries', copies)
// begin when everything before them is over, and fit in anywhere.
//
// What another kernel has written is read through pointers without __restrict__, or by load_fresh: the
// compiler may move loads of memory that it takes for constant to before the wait.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// Asks for a line of what will be read soon.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];\n" ::"l"(p)); }

// Memory that other blocks or kernels write while this kernel runs: from L2, and never moved before a fence or
// a wait.
__device__ __forceinline__ float4 load_fresh(const float4* p) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];\n"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}
__device__ __forceinline__ uint4 load_fresh(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}
__device__ __forceinline__ float load_fresh(const float* p) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];\n" : "=f"(v) : "l"(p) : "memory");
    return v;
}

#if __CUDA_ARCH__ >= 900
// Waits until all threads of the block's cluster are here, and sees what they have written to their shared memory.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n" ::: "memory");
}

// Waits until all threads of the cluster are here, before a block ends that others may have read from. Orders nothing
// else: what has been read has arrived, and the kernel's end publishes what it has written.
__device__ __forceinline__ void cluster_leave() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;\n" ::: "memory");
}

// What lies at `p`, in this block's shared memory, in that of the cluster's block `rank`.
__device__ __forceinline__ float4 load_cluster(const float4* p, uint32_t rank) {
    uint32_t at;
    float4 v;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(at) : "r"(shared_address(p)), "r"(rank));
    asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];\n"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(at)
                 : "memory");
    return v;
}
#endif
