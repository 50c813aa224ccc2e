// output = x weight^T of 16-bit types for a part of a GPU's SMs (sm_90a): clusters of thread blocks that stay, one
// thread of each fetching tiles, two warpgroups multiplying. Compiled at run time, behind cuda_hopper.cu, by
// cuda_gemm.py, which defines
//   WIDTH    weight rows of a tile, up to 256; a multiple of 8 for each box that they are fetched in
//   CLUSTER  thread blocks side by side in tokens: each fetches a part of the weights for all of them
//   STAGES   tiles on their way to a thread block
//   GATED    whether a tile is WIDTH / 2 rows of a gate and the WIDTH / 2 that it gates
//   WGMMA(d, a, b, adds)   the instruction of this width, on accumulators d and descriptors a and b

constexpr int TILE_M = 128, TILE_K = 64, HALF = WIDTH / 2;
constexpr int ROW_BYTES = TILE_K * 2, X_BYTES = TILE_M * ROW_BYTES, STAGE_BYTES = X_BYTES + WIDTH * ROW_BYTES;
// A box of weights lies in one half of the tile, and each thread block of a cluster fetches as many as the others.
constexpr int BOXES = CLUSTER > 2 ? CLUSTER : 2, BOX_ROWS = WIDTH / BOXES;
constexpr int ROW_PITCH = 64 * 2 + 16;  // of 64 outputs, and no two rows of a group of eight in the same banks
constexpr int OUTPUTS = GATED ? HALF : WIDTH;

__device__ void arrive_at(u32 barrier, u32 rank) {
    asm volatile(
        "{ .reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote]; }" ::"r"(barrier), "r"(rank) : "memory");
}

__device__ void fetch_for_all(u32 target, const TensorMap& map, int column, int row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(target), "l"(&map), "r"(column), "r"(row), "r"(barrier),
        "h"(static_cast<unsigned short>((1 << CLUSTER) - 1)) : "memory");
}

__device__ void sync_cluster() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

__device__ float2 widened(u32 both) {
#if BF16
    return make_float2(__uint_as_float(both << 16), __uint_as_float(both & 0xFFFF0000));
#else
    float low, high;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
        : "=f"(low), "=f"(high) : "r"(both));
    return make_float2(low, high);
#endif
}

// silu(gate) * up, rounded where kernels of their own would round.
__device__ u32 gated(float gate_low, float gate_high, float up_low, float up_high) {
    float2 gate = widened(rounded(gate_low, gate_high)), up = widened(rounded(up_low, up_high));
    float2 silu = widened(rounded(gate.x / (1.0f + __expf(-gate.x)), gate.y / (1.0f + __expf(-gate.y))));
    return rounded(silu.x * up.x, silu.y * up.y);
}

extern "C" __global__ void __launch_bounds__(384, 1)
shared_linear(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, uint4* output,
              int num_tokens, int num_steps, int num_outputs, int second_offset) {
    extern __shared__ unsigned char dynamic[];
    __shared__ alignas(8) u64 full[STAGES], empty[STAGES];
    const u32 tiles = (address_of(dynamic) + 1023) / 1024 * 1024;
    const int warpgroup = threadIdx.x / 128;
    const int rank = blockIdx.x % CLUSTER;
    const int rows_of_tiles = (num_tokens + TILE_M * CLUSTER - 1) / (TILE_M * CLUSTER);
    const int num_tiles = rows_of_tiles * ((num_outputs + OUTPUTS - 1) / OUTPUTS);
    const int first_tile = blockIdx.x / CLUSTER, stride = gridDim.x / CLUSTER;

    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address_of(full + stage)));
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address_of(empty + stage)), "r"(2 * CLUSTER));
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    sync_cluster();
    asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");

    if (warpgroup == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0) {
            int turn = 0;
            for (int tile = first_tile; tile < num_tiles; tile += stride) {
                const int token = (tile % rows_of_tiles * CLUSTER + rank) * TILE_M, row = tile / rows_of_tiles * OUTPUTS;
                for (int step = 0; step < num_steps; ++step, ++turn) {
                    const int stage = turn % STAGES;
                    const u32 filled = address_of(full + stage), target = tiles + stage * STAGE_BYTES;
                    wait(address_of(empty + stage), (turn / STAGES & 1) ^ 1);
                    expect(filled, STAGE_BYTES);
                    fetch(target, x, step * TILE_K, token, filled);
                    for (int box = rank; box < BOXES; box += CLUSTER) {
                        const int place = box * BOX_ROWS;
                        const int from = row + place + (place < HALF ? 0 : second_offset - HALF);
                        const u32 to = target + X_BYTES + place * ROW_BYTES;
                        if (CLUSTER == 1) fetch(to, weight, step * TILE_K, from, filled);
                        else fetch_for_all(to, weight, step * TILE_K, from, filled);
                    }
                }
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
        const u32 staged = tiles + STAGES * STAGE_BYTES + (threadIdx.x / 32 - 4) * 16 * ROW_PITCH;
        float sums[WIDTH / 2];
        int turn = 0;
        for (int tile = first_tile; tile < num_tiles; tile += stride) {
            for (int step = 0; step < num_steps; ++step, ++turn) {
                const int stage = turn % STAGES;
                wait(address_of(full + stage), turn / STAGES & 1);
                const u32 mine = tiles + stage * STAGE_BYTES + (warpgroup - 1) * (X_BYTES / 2);
                const u32 shared = tiles + stage * STAGE_BYTES + X_BYTES;
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
                for (int place = 0; place < ROW_BYTES; place += 32)
                    WGMMA(sums, rows_descriptor(mine + place), rows_descriptor(shared + place),
                          step > 0 || place > 0);
                asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;" ::: "memory");
                // What the step before this one read may be overwritten, here and by the others of the cluster.
                if (step > 0 && threadIdx.x % 128 < CLUSTER)
                    arrive_at(address_of(empty + (turn - 1) % STAGES), threadIdx.x % 128);
            }
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
            if (threadIdx.x % 128 < CLUSTER) arrive_at(address_of(empty + (turn - 1) % STAGES), threadIdx.x % 128);

            // By way of shared memory, of each warp its own: a warp then writes whole lines of the output.
            const int token = (tile % rows_of_tiles * CLUSTER + rank) * TILE_M + (warpgroup - 1) * 64 + warp * 16;
            const int first = tile / rows_of_tiles * OUTPUTS;
#pragma unroll
            for (int chunk = 0; chunk < OUTPUTS; chunk += 64) {
#pragma unroll
                for (int column = chunk; column < chunk + 64 && column < OUTPUTS; column += 8) {
#pragma unroll
                    for (int low = 0; low < 2; ++low) {
                        const float *sum = sums + column / 2 + low * 2, *up = sum + (GATED ? WIDTH / 4 : 0);
                        const u32 both = GATED ? gated(sum[0], sum[1], up[0], up[1]) : rounded(sum[0], sum[1]);
                        const u32 place = (lane / 4 + low * 8) * ROW_PITCH + (column - chunk) * 2 + lane % 4 * 4;
                        asm volatile("st.shared.u32 [%0], %1;" ::"r"(staged + place), "r"(both) : "memory");
                    }
                }
                __syncwarp();
#pragma unroll
                for (int place = lane; place < 16 * 8; place += 32) {
                    const int row = place / 8, column = chunk + place % 8 * 8;
                    uint4 values;
                    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                        : "=r"(values.x), "=r"(values.y), "=r"(values.z), "=r"(values.w)
                        : "r"(staged + row * ROW_PITCH + place % 8 * 16) : "memory");
                    if (token + row < num_tokens && column < OUTPUTS && first + column < num_outputs)
                        output[(static_cast<u64>(token + row) * num_outputs + first + column) / 8] = values;
                }
                __syncwarp();
            }
        }
    }
    sync_cluster();  // nobody leaves while others may still write to it
}
