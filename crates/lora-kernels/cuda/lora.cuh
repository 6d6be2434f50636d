// What the LoRA kernels share: where an adapter's matrices lie, and the order of a shrink and its expand.
#pragma once
#include "common.cuh"

constexpr int LORA_TARGETS = 3;

// A projection that gets an adapter's product added, as src/lora/mod.rs lays it out.
struct Target {
    // Elements per rank of the parts before it, where an adapter adapts every module.
    uint64_t before;
    // Its place in an adapter's table of offsets.
    uint32_t index;
    // Its first column in the output, and its width.
    uint32_t column;
    uint32_t outputs;
    uint32_t unused;
};

struct Targets {
    Target of[LORA_TARGETS];
};

// A tile of a large segment.
struct Tile {
    uint32_t segment;
    // Its first row in the segment.
    uint32_t row;
};

// `A [rank, inputs]` of a target, `Bt [rank, outputs]` behind it; null where the adapter leaves it alone.
__device__ __forceinline__ const bf16* lora_part(const Segment& segment, const Target& target) {
    if (segment.offsets == nullptr) return segment.matrices + segment.rank * target.before;
    int32_t at = segment.offsets[target.index];
    return at < 0 ? nullptr : segment.matrices + static_cast<int64_t>(at) * 8;
}

// Two neighbours of an output.
__device__ __forceinline__ float2 load_pair(const bf16* p) {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(p));
}
__device__ __forceinline__ float2 load_pair(const float* p) { return *reinterpret_cast<const float2*>(p); }
__device__ __forceinline__ void store_pair(bf16* p, float2 v) {
    *reinterpret_cast<__nv_bfloat162*>(p) = __floats2bfloat162_rn(v.x, v.y);
}
__device__ __forceinline__ void store_pair(float* p, float2 v) { *reinterpret_cast<float2*>(p) = v; }
