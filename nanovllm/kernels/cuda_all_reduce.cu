// The sum of every rank's numbers, on each rank (sm_90). Every rank writes its numbers into the memory of all others
// ("inboxes") and adds up what it finds in its own, in the order of ranks, so that all of them get the same bits.
// A packet of 16 bytes is 8 bytes of numbers, each half beside the number of the sum that it is of: who reads it sees
// whether it is there, and nobody waits for a fence. Compiled at run time by cuda_all_reduce.py, which defines
//   RANKS, RANK   how many there are, and which one this is
//   THREADS       of a thread block
//   MOST_BLOCKS   for which there is room in an inbox
//   KIND          of the numbers: 0 float32, 1 float16, 2 bfloat16

using u32 = unsigned int;
using u64 = unsigned long long;

constexpr u32 TRIES_TO_LOOK_UP = 1024;

struct Sums {  // of 16 bytes of numbers
    float of[KIND == 0 ? 4 : 8];
};

__device__ void add(Sums& sums, int word, u32 bits) {
#if KIND == 0
    sums.of[word] += __uint_as_float(bits);
#elif KIND == 1
    float low, high;
    asm("{ .reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }" : "=f"(low), "=f"(high) : "r"(bits));
    sums.of[2 * word] += low;
    sums.of[2 * word + 1] += high;
#else
    sums.of[2 * word] += __uint_as_float(bits << 16);
    sums.of[2 * word + 1] += __uint_as_float(bits & 0xFFFF0000);
#endif
}

__device__ u32 rounded(const Sums& sums, int word) {
#if KIND == 0
    return __float_as_uint(sums.of[word]);
#else
    u32 both;
#if KIND == 1
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(sums.of[2 * word + 1]), "f"(sums.of[2 * word]));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(sums.of[2 * word + 1]), "f"(sums.of[2 * word]));
#endif
    return both;
#endif
}

__device__ void send(uint4* place, u32 first, u32 second, u32 round) {
    asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %2};" ::"l"(place), "r"(first), "r"(round), "r"(second)
                 : "memory");
}

// Waits for a packet; gives up when the host says that it will not come.
__device__ uint2 received(const uint4* place, u32 round, const volatile u32* given_up) {
    u32 first, of_first, second, of_second;
    for (u32 tries = 1;; ++tries) {
        asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(first), "=r"(of_first), "=r"(second), "=r"(of_second) : "l"(place) : "memory");
        if (of_first == round && of_second == round) break;
        if (tries % TRIES_TO_LOOK_UP == 0 && *given_up) break;
    }
    return make_uint2(first, second);
}

// `x`, whose place the sums take, has `num_pieces` of 16 bytes, one for a thread. A thread block counts its own sums, and
// has places of its own in an inbox, [2][RANKS][MOST_BLOCKS][2][THREADS]: one half for odd rounds and one for even ones.
// When a rank is at one round, all others have ended the one before the last, so nothing is overwritten that is still to
// be read.
extern "C" __global__ void __launch_bounds__(THREADS)
all_reduce(uint4* x, const u64* inboxes, u32* rounds, const volatile u32* given_up, int num_pieces) {
    const int piece = blockIdx.x * THREADS + threadIdx.x;
    uint4* inbox[RANKS];
#pragma unroll
    for (int rank = 0; rank < RANKS; ++rank) inbox[rank] = reinterpret_cast<uint4*>(inboxes[rank]);
    asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");

    const u32 round = rounds[blockIdx.x] + 1;
    const uint4 mine = piece < num_pieces ? x[piece] : make_uint4(0, 0, 0, 0);
    __syncthreads();  // all threads know the round
    if (threadIdx.x == 0) rounds[blockIdx.x] = round;
    if (piece >= num_pieces) return;
    const u64 half = (round & 1) * RANKS, block = blockIdx.x;
    const u64 sent = ((half + RANK) * MOST_BLOCKS + block) * 2 * THREADS + threadIdx.x;
#pragma unroll
    for (int rank = 0; rank < RANKS; ++rank) {
        if (rank == RANK) continue;
        send(inbox[rank] + sent, mine.x, mine.y, round);
        send(inbox[rank] + sent + THREADS, mine.z, mine.w, round);
    }
    Sums sums = {};
#pragma unroll
    for (int rank = 0; rank < RANKS; ++rank) {
        uint4 theirs = mine;
        if (rank != RANK) {
            const uint4* from = inbox[RANK] + ((half + rank) * MOST_BLOCKS + block) * 2 * THREADS + threadIdx.x;
            const uint2 head = received(from, round, given_up), tail = received(from + THREADS, round, given_up);
            theirs = make_uint4(head.x, head.y, tail.x, tail.y);
        }
        add(sums, 0, theirs.x);
        add(sums, 1, theirs.y);
        add(sums, 2, theirs.z);
        add(sums, 3, theirs.w);
    }
    x[piece] = make_uint4(rounded(sums, 0), rounded(sums, 1), rounded(sums, 2), rounded(sums, 3));
}
