// Causal attention of prompts' queries to a paged KV pool, of 16-bit types (sm_90a). Thread blocks that stay take tiles
// of queries one after another: a warp of each fetches queries, keys and values, two warpgroups multiply, and the
// softmax of one runs beside the products of the other. Compiled at run time, behind cuda_hopper.cu, by
// cuda_prefill_attention.py, which defines
//   HEAD_DIM    64 or 128
//   BLOCK_SIZE  tokens of a block of the pool
//   BOX         tokens that are fetched at once: of one block, up to 64
//   TILE_M      queries of a tile: 64 for each of the two warpgroups that multiply
//   KEYS        keys of a tile
//   STAGES      tiles of keys, and of values, on their way to a thread block
//   QK(d, a, b, adds)           products of 64 queries and KEYS keys, on accumulators d and descriptors a and b
//   PV(d, a0, a1, a2, a3, b)    adds those of 64 x 16 probabilities, in registers, and 16 values

constexpr int ROW_BYTES = 128;
constexpr int PARTS = HEAD_DIM / 64;  // of a row of a head: as long as the swizzle
constexpr int Q_PART = TILE_M * ROW_BYTES, KV_PART = KEYS * ROW_BYTES;
constexpr int Q_BYTES = PARTS * Q_PART, KV_BYTES = PARTS * KV_PART;
constexpr int BOXES = KEYS / BOX;
constexpr int NUM_WARPS = 8;  // that multiply

__device__ __forceinline__ void initialize(const u64* barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address_of(barrier)), "r"(count));
}

__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// A tile of keys or values: each of the first lanes fetches its box, from `row` on.
__device__ __forceinline__ void fetch_tile(u32 target, const TensorMap& pool, int row, u32 full, int lane) {
    if (lane == 0) expect(full, KV_BYTES);
    __syncwarp();
    if (lane < BOXES) {
#pragma unroll
        for (int part = 0; part < PARTS; ++part)
            fetch(target + part * KV_PART + lane * BOX * ROW_BYTES, pool, part * 64, row, full);
    }
}

// A matrix as of `rows_descriptor`, and sums are over its rows; the columns behind the first 64 are in the next part.
__device__ __forceinline__ u64 columns_descriptor(u32 address) {
    return static_cast<u64>((address & 0x3FFFF) >> 4) | (static_cast<u64>(KV_PART >> 4) << 16) | (64ull << 32) |
           (1ull << 62);
}

__device__ __forceinline__ float exp2_of(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// The same value in all lanes, and the compiler knows it.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(~0u, value, 0); }

// Registers that a product may still read or write are not touched across this.
template <int N>
__device__ __forceinline__ void pin(float (&registers)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void await_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

__device__ __forceinline__ void multiply_keys(float (&scores)[KEYS / 2], u32 queries, u32 keys) {
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
#pragma unroll
        for (int place = 0; place < ROW_BYTES; place += 32)
            QK(scores, rows_descriptor(queries + part * Q_PART + place), rows_descriptor(keys + part * KV_PART + place),
               part > 0 || place > 0);
}

__device__ __forceinline__ void multiply_values(float (&sums)[HEAD_DIM / 2], const u32 (&p)[KEYS / 4], u32 values) {
#pragma unroll
    for (int step = 0; step < KEYS / 16; ++step)
        PV(sums, p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3],
           columns_descriptor(values + step * 16 * ROW_BYTES));
}

// Maximum and sum of each of the two rows that a thread has.
struct Softmax {
    float maximum[2], total[2];
};

// Scores become probabilities, not yet divided by their sum. If they are masked, keys behind `last`, counted from the
// thread's first one, are hidden from its first row, and those behind `last` + 8 from its second.
template <bool FIRST>
__device__ __forceinline__ void exponentiate(bool masked, float (&scores)[KEYS / 2], Softmax& softmax,
                                             float (&correction)[2], float scale, int last) {
    if (masked) {
#pragma unroll
        for (int i = 0; i < KEYS / 2; ++i)
            if (i / 4 * 8 + i % 2 > last + (i / 2 % 2) * 8) scores[i] = __int_as_float(0xFF800000);
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        float highest = scores[2 * row], other = scores[2 * row + 1];
#pragma unroll
        for (int i = 4; i < KEYS / 2; i += 4) {
            highest = fmaxf(highest, scores[i + 2 * row]);
            other = fmaxf(other, scores[i + 2 * row + 1]);
        }
        highest = fmaxf(highest, other);
        if (!FIRST) highest = fmaxf(highest, softmax.maximum[row]);
        highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
        if (!FIRST) correction[row] = exp2_of((softmax.maximum[row] - highest) * scale);
        softmax.maximum[row] = highest;
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        const float offset = softmax.maximum[row] * scale;
        float sum = 0.0f, other = 0.0f;
#pragma unroll
        for (int i = 0; i < KEYS / 2; i += 4) {
            float& low = scores[i + 2 * row];
            float& high = scores[i + 2 * row + 1];
            low = exp2_of(fmaf(low, scale, -offset));
            high = exp2_of(fmaf(high, scale, -offset));
            sum += low;
            other += high;
        }
        sum += other;
        softmax.total[row] = FIRST ? sum : fmaf(softmax.total[row], correction[row], sum);
    }
}

__device__ __forceinline__ void round_all(u32 (&p)[KEYS / 4], const float (&scores)[KEYS / 2]) {
#pragma unroll
    for (int i = 0; i < KEYS / 4; ++i) p[i] = rounded(scores[2 * i], scores[2 * i + 1]);
}

// Four lanes have four words each; lane i gets the i-th of all.
__device__ __forceinline__ uint4 exchanged(u32 a, u32 b, u32 c, u32 d, int lane) {
    const bool odd = lane & 1, upper = lane & 2;
    u32 got = __shfl_xor_sync(~0u, odd ? a : b, 1), got_2 = __shfl_xor_sync(~0u, odd ? c : d, 1);
    (odd ? a : b) = got;
    (odd ? c : d) = got_2;
    got = __shfl_xor_sync(~0u, upper ? a : c, 2), got_2 = __shfl_xor_sync(~0u, upper ? b : d, 2);
    (upper ? a : c) = got;
    (upper ? b : d) = got_2;
    return make_uint4(a, b, c, d);
}

// Two rows of a tile, from `row` on, times their factors: full sectors of 32 bytes at a time.
__device__ __forceinline__ void store(unsigned char* output, const float (&sums)[HEAD_DIM / 2],
                                      const float (&factor)[2], int first_row, int num_queries, int num_heads, int head,
                                      int row, int lane) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const long long place = static_cast<long long>(first_row + row + i * 8) * num_heads + head;
        uint4* target = reinterpret_cast<uint4*>(output + place * (HEAD_DIM * 2)) + lane % 4;
#pragma unroll
        for (int column = 0; column < HEAD_DIM / 2; column += 16) {
            u32 words[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const float* pair = sums + column + 4 * k + 2 * i;
                words[k] = rounded(pair[0] * factor[i], pair[1] * factor[i]);
            }
            const uint4 values = exchanged(words[0], words[1], words[2], words[3], lane);
            if (row + i * 8 < num_queries) target[column / 4] = values;
        }
    }
}

struct Barriers {
    u64 q_full, q_empty, k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
};

// Shared memory of a thread block; `work` is the head, and of a tile the first row, the number of queries and the end.
struct Shared {
    Barriers* barriers;
    int4* work;
    u32 q_tile, k_tiles, v_tiles;
};

// What one warp does: fetches the queries of each unit of work that the thread block takes, and its keys and values.
__device__ __forceinline__ void fetch_all(const TensorMap& query, const TensorMap& pool, const int* block_tables,
                                          int* plan, int table_stride, int block_rows, int num_heads, int num_kv_heads,
                                          const Shared& shared, int lane) {
    const u32 q_full = address_of(&shared.barriers->q_full), q_empty = address_of(&shared.barriers->q_empty);
    const int num_tiles = plan[1], heads_at_a_time = plan[2], group = num_heads / num_kv_heads;
    const int total = num_tiles * num_heads, at_a_time = num_tiles * heads_at_a_time;
    int turn = 0, tile_turn = 0;
    for (int unit = blockIdx.x; unit < total; ++tile_turn) {
        const int head = unit / at_a_time * heads_at_a_time + unit % heads_at_a_time, kv_head = head / group;
        const int rank = unit % at_a_time / heads_at_a_time;
        const int4 tile = reinterpret_cast<const int4*>(plan)[1 + rank];
        const int* table = block_tables + static_cast<long long>(tile.x) * table_stride;
        const int end = tile.w, num_steps = (end + KEYS - 1) / KEYS;
        int token = lane * BOX;
        int block = lane < BOXES && token < end ? table[token / BLOCK_SIZE] : 0;

        wait(q_empty, (tile_turn & 1) ^ 1);
        if (lane == 0) {
            *shared.work = make_int4(head, tile.y, tile.z, end);
            expect(q_full, Q_BYTES);
#pragma unroll
            for (int part = 0; part < PARTS; ++part)
                fetch(shared.q_tile + part * Q_PART, query, head * HEAD_DIM + part * 64, tile.y, q_full);
        }
        int v_row = 0, next = 0;
        for (int step = 0; step <= num_steps; ++step) {
            // Beyond the end there is no block; a box of rows that do not exist is filled with zeros.
            const int row = token < end ? block * block_rows + kv_head * BLOCK_SIZE + token % BLOCK_SIZE : -BOX;
            token += KEYS;
            if (lane < BOXES && token < end) block = table[token / BLOCK_SIZE];
            // Not earlier: whoever is done with its own first takes the next one.
            if (step == num_steps - 1 && lane == 0) {
                const int taken = atomicAdd(plan, 1);
                if (taken == total - 1) atomicExch(plan, 0);  // for the next layer
                next = taken + gridDim.x;
            }
            if (step < num_steps) {
                const int stage = (turn + step) % STAGES, round = (turn + step) / STAGES;
                const u32 full = address_of(shared.barriers->k_full + stage);
                wait(address_of(shared.barriers->k_empty + stage), (round & 1) ^ 1);
                fetch_tile(shared.k_tiles + stage * KV_BYTES, pool, row, full, lane);
            }
            if (step > 0) {
                const int stage = (turn + step - 1) % STAGES, round = (turn + step - 1) / STAGES;
                const u32 full = address_of(shared.barriers->v_full + stage);
                wait(address_of(shared.barriers->v_empty + stage), (round & 1) ^ 1);
                fetch_tile(shared.v_tiles + stage * KV_BYTES, pool, v_row, full, lane);
            }
            v_row = row < 0 ? row : row + num_kv_heads * BLOCK_SIZE;
        }
        turn += num_steps;
        unit = __shfl_sync(~0u, next, 0);
    }
    wait(q_empty, (tile_turn & 1) ^ 1);
    if (lane == 0) {
        *shared.work = make_int4(0, 0, 0, 0);
        arrive(q_full);
    }
}

// What a warpgroup does: attends with its half of each tile of queries.
__device__ __forceinline__ void attend_all(unsigned char* output, int num_heads, float scale, const Shared& shared,
                                           int half, int lane) {
    const int row = half * 64 + threadIdx.x / 32 % 4 * 16 + lane / 4;
    const u32 queries = shared.q_tile + half * 64 * ROW_BYTES;
    const int my_turn = 1 + half, other_turn = 2 - half;
    auto await_turn = [&] { asm volatile("bar.sync %0, 256;" ::"r"(my_turn) : "memory"); };
    auto pass_turn = [&] { asm volatile("bar.arrive %0, 256;" ::"r"(other_turn) : "memory"); };
    auto release = [&](u64* barrier) {
        if (lane == 0) arrive(address_of(barrier));
    };
    if (half == 1) pass_turn();

    int turn = 0;
    for (int tile_turn = 0;; ++tile_turn) {
        wait(address_of(&shared.barriers->q_full), tile_turn & 1);
        const int4 mine = *shared.work;
        const int head = uniform(mine.x), num_queries = uniform(mine.z), end = uniform(mine.w);
        const int num_steps = (end + KEYS - 1) / KEYS;
        if (num_queries == 0) break;
        const int position = end - num_queries + row;
        // Tiles that all queries of this half attend to as a whole come before these.
        const int num_full = (end - num_queries + half * 64 + 1) / KEYS;
        const int last = position - lane % 4 * 2;

        float scores[KEYS / 2], sums[HEAD_DIM / 2], correction[2];
        u32 p[KEYS / 4];
        Softmax softmax;
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; ++i) sums[i] = 0.0f;

        wait(address_of(shared.barriers->k_full + turn % STAGES), turn / STAGES & 1);
        begin_products();
        multiply_keys(scores, queries, shared.k_tiles + turn % STAGES * KV_BYTES);
        end_products();
        await_products<0>();
        pin(scores);
        release(shared.barriers->k_empty + turn % STAGES);
        if (num_full > 0)
            exponentiate<true>(false, scores, softmax, correction, scale, 0);
        else
            exponentiate<true>(true, scores, softmax, correction, scale, last);
        round_all(p, scores);

        // The products of this step's queries and keys, and of the probabilities and values of the step before.
        auto attend = [&](int step, bool masked) {
            const int k_turn = turn + step, v_turn = k_turn - 1;
            wait(address_of(shared.barriers->k_full + k_turn % STAGES), k_turn / STAGES & 1);
            await_turn();
            begin_products();
            multiply_keys(scores, queries, shared.k_tiles + k_turn % STAGES * KV_BYTES);
            end_products();
            wait(address_of(shared.barriers->v_full + v_turn % STAGES), v_turn / STAGES & 1);
            begin_products();
            multiply_values(sums, p, shared.v_tiles + v_turn % STAGES * KV_BYTES);
            end_products();
            pass_turn();
            await_products<1>();
            pin(scores);
            release(shared.barriers->k_empty + k_turn % STAGES);
            exponentiate<false>(masked, scores, softmax, correction, scale, last - step * KEYS);
            await_products<0>();
            pin(sums);
            release(shared.barriers->v_empty + v_turn % STAGES);
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 2; ++i) sums[i] *= correction[i / 2 % 2];
            round_all(p, scores);
        };
        int step = 1;
        for (; step < num_full; ++step) attend(step, false);
        for (; step < num_steps; ++step) attend(step, true);
        release(&shared.barriers->q_empty);

        const int v_turn = turn + num_steps - 1;
        wait(address_of(shared.barriers->v_full + v_turn % STAGES), v_turn / STAGES & 1);
        begin_products();
        multiply_values(sums, p, shared.v_tiles + v_turn % STAGES * KV_BYTES);
        end_products();
        float factor[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float total = softmax.total[i];
            total += __shfl_xor_sync(~0u, total, 1);
            total += __shfl_xor_sync(~0u, total, 2);
            factor[i] = 1.0f / total;
        }
        await_products<0>();
        pin(sums);
        release(shared.barriers->v_empty + v_turn % STAGES);
        turn += num_steps;

        store(output, sums, factor, mine.y, num_queries, num_heads, head, row, lane);
    }
}

// `plan`: how many units of work were taken, a tile of queries and a head each; how many tiles there are; how many
// heads are computed at a time; then of each tile its request, its first row in the step, its number of queries, and
// the end of what the last of them attends to.
extern "C" __global__ void __launch_bounds__(384, 1)
prefill_attention(const __grid_constant__ TensorMap query, const __grid_constant__ TensorMap pool,
                  unsigned char* output, const int* block_tables, int* plan, int table_stride, int block_rows,
                  int num_heads, int num_kv_heads, float scale) {
    extern __shared__ unsigned char dynamic[];
    __shared__ Barriers barriers;
    __shared__ int4 work;
    const u32 q_tile = (address_of(dynamic) + 1023) / 1024 * 1024;
    const u32 k_tiles = q_tile + Q_BYTES, v_tiles = k_tiles + STAGES * KV_BYTES;
    const Shared shared{&barriers, &work, q_tile, k_tiles, v_tiles};
    const int lane = threadIdx.x % 32, warpgroup = uniform(threadIdx.x / 128);

    if (threadIdx.x == 0) {
        initialize(&barriers.q_full, 1);
        initialize(&barriers.q_empty, NUM_WARPS);
        for (int stage = 0; stage < STAGES; ++stage) {
            initialize(barriers.k_full + stage, 1);
            initialize(barriers.v_full + stage, 1);
            initialize(barriers.k_empty + stage, NUM_WARPS);
            initialize(barriers.v_empty + stage, NUM_WARPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");

    if (warpgroup == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x < 32) {
            fetch_all(query, pool, block_tables, plan, table_stride, block_rows, num_heads, num_kv_heads, shared, lane);
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        attend_all(output, num_heads, scale, shared, warpgroup - 1, lane);
    }
}

// One thread block makes the plan: tiles that attend to most come first. As many heads are computed at a time as have
// keys and values that stay in the L2 cache, but no fewer than there is work in for all SMs.
extern "C" __global__ void __launch_bounds__(1024)
plan_prefill_attention(const int* context_lens, const int* query_starts, int* plan, int num_requests, int num_heads,
                       int num_kv_heads, int cached_bytes, int least_units) {
    extern __shared__ int shared[];
    int* tile_starts = shared;                 // [num_requests + 1]
    int* lengths = shared + num_requests + 1;  // of what each tile attends to, in tiles of keys
    __shared__ int warp_sums[32];
    __shared__ long long warp_contexts[32];
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
    long long contexts = 0;
    int before = 0;
    for (int first = 0; first < num_requests; first += 1024) {
        const int request = first + thread;
        int count = 0;
        if (request < num_requests) {
            const int length = query_starts[request + 1] - query_starts[request];
            count = (length + TILE_M - 1) / TILE_M;
            contexts += length > 0 ? context_lens[request] : 0;
        }
        int sum = count;
        for (int distance = 1; distance < 32; distance *= 2) {
            const int other = __shfl_up_sync(~0u, sum, distance);
            if (lane >= distance) sum += other;
        }
        if (lane == 31) warp_sums[warp] = sum;
        __syncthreads();
        if (warp == 0) {
            int of_warp = warp_sums[lane];
            for (int distance = 1; distance < 32; distance *= 2) {
                const int other = __shfl_up_sync(~0u, of_warp, distance);
                if (lane >= distance) of_warp += other;
            }
            warp_sums[lane] = of_warp;
        }
        __syncthreads();
        if (request < num_requests) tile_starts[request] = before + sum - count + (warp > 0 ? warp_sums[warp - 1] : 0);
        before += warp_sums[31];
        __syncthreads();
    }
    for (int distance = 16; distance > 0; distance /= 2) contexts += __shfl_xor_sync(~0u, contexts, distance);
    if (lane == 0) warp_contexts[warp] = contexts;
    const int num_tiles = before;
    if (thread == 0) tile_starts[num_requests] = num_tiles;
    __syncthreads();

    auto request_of = [&](int tile) {
        int low = 0, high = num_requests;  // tile_starts[low] <= tile < tile_starts[high]
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            (tile_starts[middle] <= tile ? low : high) = middle;
        }
        return low;
    };
    auto tile_of = [&](int tile) {
        const int request = request_of(tile), start = query_starts[request];
        const int length = query_starts[request + 1] - start, first = (tile - tile_starts[request]) * TILE_M;
        const int num_queries = length - first < TILE_M ? length - first : TILE_M;
        return make_int4(request, start + first, num_queries, context_lens[request] - length + first + num_queries);
    };
    for (int tile = thread; tile < num_tiles; tile += 1024) lengths[tile] = (tile_of(tile).w + KEYS - 1) / KEYS;
    __syncthreads();
    for (int tile = thread; tile < num_tiles; tile += 1024) {
        int rank = 0;
        const int length = lengths[tile];
        for (int other = 0; other < num_tiles; ++other)
            rank += lengths[other] > length || (lengths[other] == length && other < tile);
        reinterpret_cast<int4*>(plan)[1 + rank] = tile_of(tile);
    }
    if (thread == 0) {
        long long bytes = 0;
        for (int i = 0; i < 32; ++i) bytes += warp_contexts[i] * (2 * 2 * HEAD_DIM);
        const int group = num_heads / num_kv_heads;
        int kv_heads = num_kv_heads;
        while (kv_heads % 2 == 0 && kv_heads * bytes > cached_bytes &&
               num_tiles * (kv_heads / 2 * group) >= least_units)
            kv_heads /= 2;
        plan[0] = 0;
        plan[1] = num_tiles;
        plan[2] = kv_heads * group;
    }
}
