// Writes when each kernel, copy and fill of a process begins and ends on the device, those inside CUDA graphs too: what
// events between operations cannot see. The driver loads it; the program needs no change. kernel_trace.py reads it.
//
//   pip download --no-deps nvidia-cuda-cupti==13.0.*   # headers and libcupti.so.13; unzip the wheel
//   gcc -O2 -shared -fPIC -o inject.so inject.c -I"$CUPTI/include" -I"$CUDA_HOME/include" "$CUPTI/lib/libcupti.so.13"
//   export LD_LIBRARY_PATH=$CUPTI/lib:$LD_LIBRARY_PATH CUDA_INJECTION64_PATH=$PWD/inject.so KERNEL_TRACE=trace.tsv
//   lora-hbm bench engine --device cuda --model meta-llama/Llama-2-7b-hf --prompts 512 --adapters 0,1 --runs 5 …
//
// A line: begin and end in ns, grid, threads of a block, registers, bytes of shared memory, stream, graph, name.
#include <cupti.h>
#include <stdio.h>
#include <stdlib.h>

static FILE *out;

static void check(CUptiResult result, const char *what) {
    if (result == CUPTI_SUCCESS) return;
    const char *why = "?";
    cuptiGetResultString(result, &why);
    fprintf(stderr, "kernel trace: %s: %s\n", what, why);
    exit(1);
}

static void give_buffer(uint8_t **buffer, size_t *size, size_t *most_records) {
    *size = 8 << 20;
    *buffer = aligned_alloc(64, *size);
    *most_records = 0;
}

static void line(uint64_t start, uint64_t end) { fprintf(out, "%llu\t%llu\t", (unsigned long long)start, (unsigned long long)end); }

static void take_buffer(CUcontext context, uint32_t stream, uint8_t *buffer, size_t size, size_t valid) {
    CUpti_Activity *record = NULL;
    while (cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) {
        if (record->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
            const CUpti_ActivityKernel10 *k = (const void *)record;
            line(k->start, k->end);
            fprintf(out, "%dx%dx%d\t%d\t%d\t%d\t%u\t%u\t%s\n", k->gridX, k->gridY, k->gridZ, k->blockX, k->registersPerThread,
                    k->staticSharedMemory + k->dynamicSharedMemory, k->streamId, k->graphId, k->name);
        } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMSET) {
            const CUpti_ActivityMemset4 *m = (const void *)record;
            line(m->start, m->end);
            fprintf(out, "%llu bytes\t0\t0\t0\t%u\t%u\tfill\n", (unsigned long long)m->bytes, m->streamId, m->graphId);
        } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
            const CUpti_ActivityMemcpy5 *m = (const void *)record;
            line(m->start, m->end);
            fprintf(out, "%llu bytes\t0\t0\t0\t%u\t%u\tcopy\n", (unsigned long long)m->bytes, m->streamId, m->graphId);
        }
    }
    free(buffer);
}

static void finish(void) {
    cuptiActivityFlushAll(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED);
    fclose(out);
}

int InitializeInjection(void) {
    const char *path = getenv("KERNEL_TRACE");
    out = fopen(path ? path : "kernel_trace.tsv", "w");
    if (!out) return perror(path ? path : "kernel_trace.tsv"), 0;
    check(cuptiActivityRegisterCallbacks(give_buffer, take_buffer), "callbacks");
    check(cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL), "kernels");
    check(cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMSET), "fills");
    check(cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMCPY), "copies");
    atexit(finish);
    return 1;
}
