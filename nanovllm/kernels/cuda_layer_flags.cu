// Flags by which one GPU tells another that a layer's KV of a chunk has arrived in its memory. The flag of a layer is
// the number of the last chunk whose KV of that layer is there; numbers only grow, so that a flag that has gone on is as
// good as the one that is waited for. The numbers of a step are read from its inputs, since a CUDA graph serves many
// steps. Compiled at run time by cuda_layer_flags.py, which defines
//   NUM_LAYERS    of the model

using i64 = long long;

// The inputs of a step: the number that it raises flags to and the one that it waits for, 0 for none; and its report.
enum { RAISES, WAITS_FOR, REPORT };

constexpr int TRIES_TO_LOOK_UP = 64;
constexpr i64 NS_PER_MS = 1000000;

__device__ i64 now_ns() {
    i64 ns;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
    return ns;
}

// One thread, on the GPU that has pushed the layer's KV, after the kernel that did. `flags` are in the other's memory.
extern "C" __global__ void raise_flag(i64* flags, const i64* numbers, int layer) {
    const i64 number = numbers[RAISES];
    if (number == 0) return;
    // What the kernels before this one stored in the other's memory is there before the flag is.
    asm volatile("fence.acq_rel.sys;\nst.release.sys.global.s64 [%0], %1;" ::"l"(flags + layer), "l"(number) : "memory");
}

// One thread, on the GPU whose step attends to the layer; `flags` are in its own memory. It runs beside the step, since
// what it waits for may come long before the layer is computed. Gives up after `limit_ms`, or when the host says that
// nothing will come: what is computed then means nothing, and the report says so.
//   missed      the last number that did not come
//   arrived_ns  for each layer when its wait ended, 0 if there was none
//   reports     for each step a layer, counted from 1, whose KV did not come; what `report_waits` adds
extern "C" __global__ void wait_for_flag(const i64* flags, const i64* numbers, i64* missed, i64* arrived_ns,
                                         i64* reports, const volatile int* given_up, int layer, int limit_ms) {
    const i64 number = numbers[WAITS_FOR];
    bool waited = false;
    if (number != 0 && *missed == number) {
        // It did not come for an earlier layer, perhaps of the step before, which waited for the same chunk.
        i64* report = reports + 2 * numbers[REPORT];
        if (report[0] == 0) report[0] = layer + 1;
    } else if (number != 0) {
        const i64 began_ns = now_ns();
        for (int tries = 1;; ++tries) {
            i64 reached;
            asm volatile("ld.acquire.sys.global.s64 %0, [%1];" : "=l"(reached) : "l"(flags + layer) : "memory");
            if (reached >= number) break;
            waited = true;
            if (tries % TRIES_TO_LOOK_UP == 0 && (*given_up || now_ns() - began_ns > limit_ms * NS_PER_MS)) {
                *missed = number;
                reports[2 * numbers[REPORT]] = layer + 1;
                break;
            }
        }
    }
    arrived_ns[layer] = waited ? now_ns() : 0;
}

// One thread, behind the kernels that store the layer's KV of the step and push that of the layer before.
extern "C" __global__ void note_stored(i64* stored_ns, int layer) { stored_ns[layer] = now_ns(); }

// One thread, behind the last layer's push: the nanoseconds by which flags came after the step's own KV was stored.
extern "C" __global__ void report_waits(const i64* numbers, const i64* stored_ns, const i64* arrived_ns, i64* reports) {
    i64 waited_ns = 0;
    for (int layer = 0; layer < NUM_LAYERS; ++layer) {
        const i64 late_ns = arrived_ns[layer] - stored_ns[layer];
        if (late_ns > 0) waited_ns += late_ns;
    }
    reports[2 * numbers[REPORT] + 1] = waited_ns;
}
