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
    // Its layer.
    uint32_t layer;
};

struct Targets {
    Target of[LORA_TARGETS];
};

// A copy that takes longer has failed; the wait must end for the process to.
constexpr uint64_t LONGEST_WAIT_NS = 60'000'000'000;

// Whether the layer of a call's targets, all of one, is in the adapter's slot, which is being copied into.
__device__ __forceinline__ bool has_arrived(const Segment& segment, const Targets& targets) {
    uint32_t copied;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];\n" : "=r"(copied) : "l"(segment.arrival) : "memory");
    return static_cast<int32_t>(copied - (segment.copied_before + targets.of[0].layer + 1)) >= 0;
}

// Sleeps until it is, and says how long that was.
__device__ __forceinline__ void sleep_until_arrival(const Segment& segment, const Targets& targets) {
    if (has_arrived(segment, targets)) return;
    const uint64_t begun = nanoseconds();
    uint64_t waited;
    do {
        __nanosleep(200);
        waited = nanoseconds() - begun;
        if (waited > LONGEST_WAIT_NS) __trap();
    } while (!has_arrived(segment, targets));
    // Blocks wait for the same moment: the first of them waits longest.
    atomicMax(segment.arrival + 1 + targets.of[0].layer, static_cast<uint32_t>(min(waited, uint64_t{0xffffffffu})));
}

// Waits until the layer of a call's targets, all of one, is in the adapter's slot, where it is still on its way.
// Every thread of a block calls it, with the same segment, and reads nothing of the adapter before.
//
// A wait in the kernels and not between them, so that steps which wait can be graphs as others are: what is waited
// for is data. Spinning blocks hold back nothing that they wait for, since copies are not made by
// multiprocessors.
__device__ __forceinline__ void await_arrival(const Segment& segment, const Targets& targets) {
    if (segment.arrival == nullptr) return;
    // Mostly it is, and the block goes on with what does not depend on what runs before it.
    if (__syncthreads_or(threadIdx.x == 0 && has_arrived(segment, targets))) return;
    // Before time is taken, so that it is what the step lost.
    wait_for_previous();
    if (threadIdx.x == 0) sleep_until_arrival(segment, targets);
    __syncthreads();
}

// The same for one thread, which reads nothing of the adapter before, nor does any that it lets read.
__device__ __forceinline__ void await_arrival_alone(const Segment& segment, const Targets& targets) {
    if (segment.arrival == nullptr || has_arrived(segment, targets)) return;
    wait_for_previous();
    sleep_until_arrival(segment, targets);
}

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
