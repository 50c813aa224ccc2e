// The sum of every rank's numbers, on each rank (sm_90). Every rank writes its numbers into the memory of all others
// ("inboxes") and adds up what it finds in its own, in the order of ranks, so that all of them get the same bits.
// The LL protocol, as NCCL calls it: a packet of 16 bytes carries 8 bytes of numbers, and beside each 4-byte word a
// sequence flag, so the receiver detects arrival without a fence. Compiled at run time by cuda_all_reduce.py, which
// defines
//   RANKS, RANK   how many there are, and which one this is
//   THREADS       of a thread block
//   PIECES        that a thread adds up where there are no flags
//   MAX_BLOCKS   for which there is room in an inbox
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
    asm("{ .reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
        : "=f"(low), "=f"(high) : "r"(bits));
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

// Before it counts a sum, a thread block waits for the kernel before this one. All threads call it.
__device__ u32 begin(u32* rounds) {
    asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
    const u32 round = rounds[blockIdx.x] + 1;
    __syncthreads();
    if (threadIdx.x == 0) rounds[blockIdx.x] = round;
    return round;
}

__device__ void add_piece(Sums& sums, uint4 piece) {
    add(sums, 0, piece.x);
    add(sums, 1, piece.y);
    add(sums, 2, piece.z);
    add(sums, 3, piece.w);
}

__device__ uint4 rounded_piece(const Sums& sums) {
    return make_uint4(rounded(sums, 0), rounded(sums, 1), rounded(sums, 2), rounded(sums, 3));
}

// An inbox has a part for LL packets, [2][RANKS][MAX_BLOCKS][2][THREADS], one for pieces without flags,
// [2][RANKS][MAX_BLOCKS][PIECES][THREADS], and what thread blocks of other ranks have come to, [RANKS][MAX_BLOCKS].
// A thread block counts its sums, of both kernels, and has places of its own, one half for odd rounds and one for even
// ones: when a rank is at one round, all others have ended the one before the last, so nothing is overwritten that is
// still to be read. That holds as long as all sums of a rank are on one stream, and every kernel between two of them
// waits for the one before it has ended.
constexpr u64 LABELLED = 2ull * RANKS * MAX_BLOCKS * 2 * THREADS;
constexpr u64 PLAIN = 2ull * RANKS * MAX_BLOCKS * PIECES * THREADS;

__device__ u64 place_of(u32 round, int rank, int pieces) {
    return (((round & 1) * RANKS + rank) * static_cast<u64>(MAX_BLOCKS) + blockIdx.x) * pieces * THREADS + threadIdx.x;
}

// `x`, whose place the sums take, has `num_pieces` of 16 bytes; a thread adds up one of them.
extern "C" __global__ void __launch_bounds__(THREADS)
all_reduce_ll(uint4* x, uint4* const* inboxes, u32* rounds, const volatile u32* given_up, int num_pieces) {
    const int place = blockIdx.x * THREADS + threadIdx.x;
    uint4* inbox[RANKS];
#pragma unroll
    for (int rank = 0; rank < RANKS; ++rank) inbox[rank] = inboxes[rank];
    const u32 round = begin(rounds);
    if (place >= num_pieces) return;
    const uint4 mine = x[place];
    const u64 sent = place_of(round, RANK, 2);
#pragma unroll
    for (int rank = 0; rank < RANKS; ++rank) {
        if (rank == RANK) continue;
        send(inbox[rank] + sent, mine.x, mine.y, round);
        send(inbox[rank] + sent + THREADS, mine.z, mine.w, round);
    }
    Sums sums = {};
#pragma unroll
    for (int rank = 0; rank < RANKS; ++rank) {
        if (rank == RANK) {
            add_piece(sums, mine);
            continue;
        }
        const uint4* from = inbox[RANK] + place_of(round, rank, 2);
        const uint2 head = received(from, round, given_up), tail = received(from + THREADS, round, given_up);
        add_piece(sums, make_uint4(head.x, head.y, tail.x, tail.y));
    }
    x[place] = rounded_piece(sums);
}

// The same for more numbers, where a fence costs less than labels: a thread adds up PIECES of them.
extern "C" __global__ void __launch_bounds__(THREADS)
all_reduce_plain(uint4* x, uint4* const* inboxes, u32* rounds, const volatile u32* given_up, int num_pieces) {
    const int place = blockIdx.x * PIECES * THREADS + threadIdx.x;
    const u32 round = begin(rounds);
    uint4 mine[PIECES];
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece)
        if (place + piece * THREADS < num_pieces) mine[piece] = x[place + piece * THREADS];
#pragma unroll
    for (int rank = 0; rank < RANKS; ++rank) {
        if (rank == RANK) continue;
        uint4* to = inboxes[rank] + LABELLED + place_of(round, RANK, PIECES);
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece)
            if (place + piece * THREADS < num_pieces) to[piece * THREADS] = mine[piece];
    }
    __syncthreads();
    if (threadIdx.x < RANKS && threadIdx.x != RANK) {
        u32* theirs = reinterpret_cast<u32*>(inboxes[threadIdx.x] + LABELLED + PLAIN) + RANK * MAX_BLOCKS + blockIdx.x;
        u32* here = reinterpret_cast<u32*>(inboxes[RANK] + LABELLED + PLAIN) + threadIdx.x * MAX_BLOCKS + blockIdx.x;
        asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(theirs), "r"(round) : "memory");
        for (u32 tries = 1;; ++tries) {
            u32 reached;
            asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(reached) : "l"(here) : "memory");
            if (static_cast<int>(reached - round) >= 0) break;  // it may have gone on to the next
            if (tries % TRIES_TO_LOOK_UP == 0 && *given_up) break;
        }
    }
    __syncthreads();
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
        if (place + piece * THREADS >= num_pieces) break;
        Sums sums = {};
#pragma unroll
        for (int rank = 0; rank < RANKS; ++rank) {
            const uint4* from = inboxes[RANK] + LABELLED + place_of(round, rank, PIECES) + piece * THREADS;
            add_piece(sums, rank == RANK ? mine[piece] : *from);
        }
        x[place + piece * THREADS] = rounded_piece(sums);
    }
}
