// Causal attention without the matrix of scores, for f32 and bf16 tensors: forward and backward (Dao 2023,
// FlashAttention-2, algorithms 1 and 2), and over a long cache, whose slots several blocks share ("flash decoding",
// Dao et al. 2023).
//
// A block works on one pair of a sequence and a key/value head. It owns a tile of the pair's rows or of its slots, and
// tiles of the other side stream by. A row is a query of one of the `group` query heads that share the keys: row r is
// query r / group of head r % group. So keys are read once for a whole group, and their gradients are sums over rows.
// Each warp owns 16 rows (or slots) of the block's tile.
//
// Products are taken on tensor cores for bf16, and by plain arithmetic for f32. Scores, sums and results are floats.
// Every sum is taken in an order that depends on sizes alone, so that results repeat to the last bit.
//
// This file is compiled once for each WIDTH of a tile (see build.rs). Heads have `width` elements, at most as many; the
// rest of a tile is zero.

#include "numbers.cuh"

// What all kernels need to know.
struct Problem {
    u32 sequences;
    u32 tokens;    // queries of all sequences
    u32 longest;   // queries of the longest one
    u32 key_value; // heads of keys and values
    u32 group;     // query heads that share one of them
    u32 width;
    u32 window; // 0 for none
    float scale;
    float cap; // on scores before they are scaled; 0 for none

    __device__ __forceinline__ u32 heads() const { return key_value * group; }
    __device__ __forceinline__ u32 pairs() const { return sequences * key_value; }
    __device__ __forceinline__ u64 vectors() const { return u64(tokens) * heads(); }

    // How many tiles of so many rows, or of so many slots, the longest sequence has.
    __device__ __forceinline__ u32 row_tiles(u32 size) const { return (longest * group + size - 1) / size; }
    __device__ __forceinline__ u32 slot_tiles(u32 size) const { return (longest + size - 1) / size; }

    // From a vector of [tokens, heads] to its number in [heads, tokens].
    __device__ __forceinline__ u64 number_of(u64 vector) const {
        return vector % heads() * tokens + vector / heads();
    }

    // 1 / cap, or 0.
    __device__ __forceinline__ float inverse_cap() const { return cap > 0.0f ? 1.0f / cap : 0.0f; }
};

// --- Sizes of tiles ---

constexpr u32 W = WIDTH;
constexpr u32 LANES = 32;
constexpr u32 STRIP = 16; // rows that a warp owns

// The most warps of a block, and the rows or slots that stream by at a time, forward and backward. All tiles must fit
// into 99 KiB of shared memory, the limit of compute capability 8.6.
template <typename T> struct Sizes;
template <> struct Sizes<bf16> {
    static constexpr u32 WARPS = 4;
    static constexpr u32 FORWARD = W > 128 ? 32 : 64;
    static constexpr u32 BACKWARD = W > 128 ? 16 : 32;
};
template <> struct Sizes<float> {
    static constexpr u32 WARPS = 2;
    static constexpr u32 FORWARD = 16;
    static constexpr u32 BACKWARD = W > 128 ? 8 : 16;
};

// Elements from one row of a tile to the next: 16 bytes more than the row, so that 8 rows lie in different banks.
template <typename T> constexpr u32 STRIDE = W + 16 / sizeof(T);

// The columns of a key's gradients that a block sums up, in registers.
constexpr u32 PART = W > 128 ? 128 : W;

// The tiles of a block, one behind the other.
extern __shared__ uint4 tiles[];

// --- Products of a warp ---

__device__ __forceinline__ u32 lane() { return threadIdx.x % LANES; }

// 16 rows and N columns, spread over a warp as tensor cores do: at[n][e] is row lane / 4 + 8 (e / 2) and column
// 8 n + 2 (lane % 4) + e % 2.
template <u32 N> struct Strip {
    float at[N / 8][4] = {};
};

__device__ __forceinline__ u32 first_row() { return lane() / 4; }
__device__ __forceinline__ u32 column_of(u32 n, u32 e) { return 8 * n + 2 * (lane() % 4) + e % 2; }

__device__ __forceinline__ u32 shared_address(const void* place) { return u32(__cvta_generic_to_shared(place)); }

// Four matrices of 8 by 8, as they lie or transposed; lane i names row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(u32 (&x)[4], const bf16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ __forceinline__ void load_transposed(u32 (&x)[4], const bf16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// c += a b for a of 16 by 16 and b of 16 by 8.
__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 pair_of(float low, float high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// c += a bᵀ for a: [16, W] and b: [N, W], both in tiles.
template <u32 N> __device__ __forceinline__ void multiply_rows(Strip<N>& c, const bf16* a, const bf16* b) {
    constexpr u32 S = STRIDE<bf16>;
    a += lane() % 16 * S + lane() / 16 * 8;
    b += (lane() / 16 * 8 + lane() % 8) * S + lane() / 8 % 2 * 8;
#pragma unroll 4
    for (u32 k = 0; k < W; k += 16) {
        u32 x[4];
        load_matrices(x, a + k);
#pragma unroll
        for (u32 n = 0; n < N; n += 16) {
            u32 y[4];
            load_matrices(y, b + n * S + k);
            multiply(c.at[n / 8], x, y[0], y[1]);
            multiply(c.at[n / 8 + 1], x, y[2], y[3]);
        }
    }
}

template <u32 N> __device__ __forceinline__ void multiply_rows(Strip<N>& c, const float* a, const float* b) {
    constexpr u32 S = STRIDE<float>;
    a += first_row() * S;
    b += column_of(0, 0) * S;
#pragma unroll 1
    for (u32 k = 0; k < W; k += 4) {
        const float4 x[2] = {*reinterpret_cast<const float4*>(a + k), *reinterpret_cast<const float4*>(a + 8 * S + k)};
#pragma unroll
        for (u32 n = 0; n < N / 8; n++) {
#pragma unroll
            for (u32 e = 0; e < 4; e++) {
                const float4 y = *reinterpret_cast<const float4*>(b + (8 * n + e % 2) * S + k);
                float& sum = c.at[n][e];
                sum = fmaf(x[e / 2].x, y.x, sum);
                sum = fmaf(x[e / 2].y, y.y, sum);
                sum = fmaf(x[e / 2].z, y.z, sum);
                sum = fmaf(x[e / 2].w, y.w, sum);
            }
        }
    }
}

// c += a b for a: [16, K] and b: [K, N], which lies in a tile.
template <u32 N, u32 K>
__device__ __forceinline__ void multiply_columns(Strip<N>& c, const Strip<K>& a, const bf16* b) {
    constexpr u32 S = STRIDE<bf16>;
    b += lane() % 16 * S + lane() / 16 * 8;
#pragma unroll
    for (u32 k = 0; k < K; k += 16) {
        const float(&left)[4] = a.at[k / 8];
        const float(&right)[4] = a.at[k / 8 + 1];
        const u32 x[4] = {pair_of(left[0], left[1]), pair_of(left[2], left[3]), pair_of(right[0], right[1]),
                          pair_of(right[2], right[3])};
#pragma unroll
        for (u32 n = 0; n < N; n += 16) {
            u32 y[4];
            load_transposed(y, b + k * S + n);
            multiply(c.at[n / 8], x, y[0], y[1]);
            multiply(c.at[n / 8 + 1], x, y[2], y[3]);
        }
    }
}

template <u32 N, u32 K>
__device__ __forceinline__ void multiply_columns(Strip<N>& c, const Strip<K>& a, const float* b) {
    constexpr u32 S = STRIDE<float>;
    b += column_of(0, 0);
#pragma unroll
    for (u32 k = 0; k < K; k += 8) {
#pragma unroll 1
        for (u32 owner = 0; owner < 4; owner++) {
#pragma unroll
            for (u32 e = 0; e < 2; e++) {
                const u32 from = lane() / 4 * 4 + owner;
                const float x[2] = {__shfl_sync(~0u, a.at[k / 8][e], from), __shfl_sync(~0u, a.at[k / 8][2 + e], from)};
                const float* row = b + (k + 2 * owner + e) * S;
#pragma unroll
                for (u32 n = 0; n < N / 8; n++) {
                    const float2 y = *reinterpret_cast<const float2*>(row + 8 * n);
                    c.at[n][0] = fmaf(x[0], y.x, c.at[n][0]);
                    c.at[n][1] = fmaf(x[0], y.y, c.at[n][1]);
                    c.at[n][2] = fmaf(x[1], y.x, c.at[n][2]);
                    c.at[n][3] = fmaf(x[1], y.y, c.at[n][3]);
                }
            }
        }
    }
}

// Scores bent towards ±cap, if it is not 0: cap tanh(score / cap), with tanh z = 1 − 2 / (1 + e^2z).
template <u32 N> __device__ __forceinline__ void bend(Strip<N>& scores, float cap) {
    if (cap > 0.0f) {
        const float rate = 2.0f / cap;
#pragma unroll
        for (u32 n = 0; n < N / 8; n++) {
#pragma unroll
            for (u32 e = 0; e < 4; e++) {
                scores.at[n][e] = cap - 2.0f * cap / (1.0f + expf(rate * scores.at[n][e]));
            }
        }
    }
}

// The slope of that at a bent score; 1 without a cap.
__device__ __forceinline__ float slope_of_cap(float bent, float inverse_cap) {
    const float part = bent * inverse_cap;
    return 1.0f - part * part;
}

// The sum, or the maximum, over the four lanes that hold a row.
__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

__device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// --- One pair of a sequence and a key/value head ---

// The slots that a row sees.
struct Visible {
    u32 begin;
    u32 end;

    __device__ __forceinline__ bool has(u32 slot) const { return begin <= slot && slot < end; }
    __device__ __forceinline__ Visible before(u32 limit) const { return {begin, min(end, limit)}; }
};

struct Pair {
    const Problem& p;
    u32 head;
    u32 first; // of all queries, the sequence's first
    u32 queries;
    u32 start;  // the position of the first query
    u32 filled; // slots that hold a token, or 1
    u32 keys;   // of all slots, the sequence's first

    // The block's pair; mask: [5, sequences].
    __device__ __forceinline__ Pair(const Problem& p, In<u32> mask) : p(p) {
        const u32 pair = blockIdx.x % p.pairs();
        const u32 sequence = pair / p.key_value;
        head = pair % p.key_value;
        first = mask[sequence];
        queries = mask[p.sequences + sequence];
        start = mask[2 * p.sequences + sequence];
        filled = max(mask[3 * p.sequences + sequence], 1u);
        keys = mask[4 * p.sequences + sequence];
    }

    __device__ __forceinline__ u32 rows() const { return queries * p.group; }

    // A query at position start + q sees the slots up to its own that hold a token, and of these only the last `window`
    // positions unless window is 0. It always sees one slot, so that the row of a padding query is finite. Rows that
    // are none see nothing. Both ends grow with the row.
    __device__ __forceinline__ Visible visible(u32 row) const {
        if (row >= rows()) {
            return {0, 0};
        }
        const u32 seen = start + row / p.group + 1;
        const u32 end = min(seen, filled);
        const u32 begin = p.window > 0 && seen > p.window ? seen - p.window : 0;
        return {min(begin, end - 1), end};
    }

    // What any row of first..first + count sees.
    __device__ __forceinline__ Visible visible_to(u32 first, u32 count) const {
        return {visible(first).begin, visible(min(first + count, rows()) - 1).end};
    }

    // Where the row's elements begin in [tokens, heads · width], and its number in [heads, tokens].
    __device__ __forceinline__ u64 row_at(u32 row) const {
        return ((u64(first + row / p.group) * p.key_value + head) * p.group + row % p.group) * p.width;
    }
    __device__ __forceinline__ u64 number_at(u32 row) const {
        return u64(head * p.group + row % p.group) * p.tokens + first + row / p.group;
    }

    // Where a slot's elements begin in [slots, key/value heads · width].
    __device__ __forceinline__ u64 slot_at(u32 slot) const {
        return ((u64(keys) + slot) * p.key_value + head) * p.width;
    }
};

// --- Tiles ---

// Copies 16 bytes to a tile, or fills them with zeros.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(to)), "l"(__cvta_generic_to_global(from)), "r"(inside ? 16 : 0)
                 : "memory");
}

// Starts to copy the vectors first..first + count to a tile; `at` says where one begins. From `end` on they are zero.
template <typename T, typename At>
__device__ __forceinline__ void copy_tile(T* tile, In<T> x, u32 width, u32 first, u32 count, u32 end, At at) {
    constexpr u32 PIECE = 16 / sizeof(T);
    constexpr u32 PIECES = W / PIECE;
    if (width % PIECE == 0 && reinterpret_cast<u64>(x) % 16 == 0) {
#pragma unroll 4
        for (u32 i = threadIdx.x; i < count * PIECES; i += blockDim.x) {
            const u32 place = i / PIECES;
            const u32 column = i % PIECES * PIECE;
            const bool inside = first + place < end && column < width;
            copy_async(tile + place * STRIDE<T> + column, x + (inside ? at(first + place) + column : 0), inside);
        }
    } else {
        for (u32 i = threadIdx.x; i < count * W; i += blockDim.x) {
            const u32 place = i / W;
            const u32 column = i % W;
            const bool inside = first + place < end && column < width;
            tile[place * STRIDE<T> + column] = inside ? x[at(first + place) + column] : T(0);
        }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <typename T>
__device__ __forceinline__ void copy_rows(T* tile, In<T> x, const Pair& pair, u32 first, u32 count) {
    copy_tile<T>(tile, x, pair.p.width, first, count, pair.rows(), [&](u32 row) { return pair.row_at(row); });
}

template <typename T>
__device__ __forceinline__ void copy_slots(T* tile, In<T> x, const Pair& pair, u32 first, u32 count, u32 end) {
    copy_tile<T>(tile, x, pair.p.width, first, count, end, [&](u32 slot) { return pair.slot_at(slot); });
}

// Waits until all but the last `LEFT` tiles are there: what the thread copies, or what all threads do.
template <u32 LEFT> __device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}
template <u32 LEFT> __device__ __forceinline__ void wait_for_tiles() {
    wait_for_copies<LEFT>();
    __syncthreads();
}

__device__ __forceinline__ void store_two(float* y, float a, float b) { *reinterpret_cast<float2*>(y) = {a, b}; }
__device__ __forceinline__ void store_two(bf16* y, float a, float b) { *reinterpret_cast<u32*>(y) = pair_of(a, b); }

// Writes half a row of a strip, times a factor, from element `at` of y on: its columns below `width`.
template <u32 N, typename T>
__device__ __forceinline__ void store_row(Out<T> y, u64 at, const Strip<N>& x, u32 half, float factor, u32 width) {
#pragma unroll
    for (u32 n = 0; n < N / 8; n++) {
        const u32 column = column_of(n, 0);
        const float two[2] = {x.at[n][2 * half] * factor, x.at[n][2 * half + 1] * factor};
        if (width % 2 == 0 && column < width) {
            store_two(y + at + column, two[0], two[1]);
            continue;
        }
#pragma unroll
        for (u32 e = 0; e < 2; e++) {
            if (column + e < width) {
                store(y, at + column + e, two[e]);
            }
        }
    }
}

// --- Forward ---

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
constexpr float NEVER = -__builtin_huge_valf(); // the score of a slot that is not seen

// y = softmax(scale · q kᵀ) v over the slots that a row sees, and sums = log Σ exp of the scaled scores of each row.
//
// If `parts` is given, slots are divided into chunks, and a block sees one of them. It writes to
// parts: [chunks, tokens, heads · width] and sums: [chunks, heads, tokens]. A row that sees no slot of
// the chunk has the sum −∞, and its part stays unwritten. Without `parts` there is one chunk.
//
// A block owns as many strips of rows as it has warps, WARPS or fewer. The grid is [chunks, tiles of rows, pairs], and
// pairs change from one block to the next.
template <typename T>
__device__ __forceinline__ void forward(const Problem& p, In<u32> mask, In<T> q, In<T> k, In<T> v, Out<float> sums,
                                        Out<T> y, Out<float> parts, u32 chunk) {
    const u32 ROWS = blockDim.x / LANES * STRIP;
    constexpr u32 SLOTS = Sizes<T>::FORWARD;
    T* const q_tile = reinterpret_cast<T*>(tiles);
    T* const k_tile = q_tile + ROWS * STRIDE<T>;
    T* const v_tile = k_tile + SLOTS * STRIDE<T>;

    const Pair pair(p, mask);
    const u32 count = p.row_tiles(ROWS);
    const u32 tile = count - 1 - blockIdx.x / p.pairs() % count; // the longest first
    const u32 part = blockIdx.x / p.pairs() / count;
    const u32 first = tile * ROWS;
    if (first >= pair.rows()) {
        return; // the sequence is shorter than the longest
    }
    const u32 own = first + threadIdx.x / LANES * STRIP + first_row(); // the lane's first row, and 8 on its second

    const Visible seen = pair.visible_to(first, ROWS);
    const u32 begin = max(seen.begin, part * chunk);
    const u32 end = min(seen.end, (part + 1) * chunk);
    const Visible own_seen[2] = {pair.visible(own).before(end), pair.visible(own + 8).before(end)};
    const float scale = p.scale * LOG2_E;

    Strip<W> result;
    float most[2] = {NEVER, NEVER};
    float total[2] = {};
    copy_rows<T>(q_tile, q, pair, first, ROWS);
    copy_slots<T>(k_tile, k, pair, begin, SLOTS, end);
    for (u32 slot = begin; slot < end; slot += SLOTS) {
        wait_for_tiles<0>(); // the keys are there, and the last values no longer needed
        copy_slots<T>(v_tile, v, pair, slot, SLOTS, end);
        Strip<SLOTS> scores;
        multiply_rows(scores, q_tile + threadIdx.x / LANES * STRIP * STRIDE<T>, k_tile);
        bend(scores, p.cap);
        wait_for_tiles<0>(); // now the other way round
        copy_slots<T>(k_tile, k, pair, slot + SLOTS, SLOTS, end);
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            float maximum = most[half];
#pragma unroll
            for (u32 n = 0; n < SLOTS / 8; n++) {
#pragma unroll
                for (u32 e = 0; e < 2; e++) {
                    float& score = scores.at[n][2 * half + e];
                    score = own_seen[half].has(slot + column_of(n, e)) ? score * scale : NEVER;
                    maximum = fmaxf(maximum, score);
                }
            }
            maximum = row_max(maximum);
            const float base = maximum == NEVER ? 0.0f : maximum; // nothing seen yet: all that follow are exp(−∞)
            const float ratio = exp2f(most[half] - base);
            most[half] = maximum;
            total[half] *= ratio;
#pragma unroll
            for (u32 n = 0; n < SLOTS / 8; n++) {
#pragma unroll
                for (u32 e = 0; e < 2; e++) {
                    float& score = scores.at[n][2 * half + e];
                    score = exp2f(score - base);
                    total[half] += score;
                }
            }
#pragma unroll
            for (u32 n = 0; n < W / 8; n++) {
                result.at[n][2 * half] *= ratio;
                result.at[n][2 * half + 1] *= ratio;
            }
        }
        multiply_columns(result, scores, v_tile);
    }
    wait_for_copies<0>(); // none may outlive the block

    sums += part * p.vectors();
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        const u32 row = own + 8 * half;
        const float sum = row_sum(total[half]);
        if (row >= pair.rows()) {
            continue;
        }
        if (lane() % 4 == 0) {
            sums[pair.number_at(row)] = (most[half] + log2f(sum)) * LN_2;
        }
        if (parts == nullptr) {
            store_row(y, pair.row_at(row), result, half, 1.0f / sum, p.width);
        } else if (sum != 0.0f) {
            store_row(parts + part * p.vectors() * p.width, pair.row_at(row), result, half, 1.0f / sum, p.width);
        }
    }
}

// y = what the chunks of `forward` make together. The grid may have any size.
template <typename T>
__device__ __forceinline__ void combine(const Problem& p, In<float> parts, In<float> sums, Out<T> y, u32 chunks) {
    const u64 count = p.vectors() * p.width;
    for (u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += u64(gridDim.x) * blockDim.x) {
        const u64 at = p.number_of(i / p.width);
        float most = NEVER;
        for (u32 part = 0; part < chunks; part++) {
            most = fmaxf(most, sums[part * p.vectors() + at]);
        }
        float total = 0.0f;
        float result = 0.0f;
        for (u32 part = 0; part < chunks; part++) {
            const float weight = expf(sums[part * p.vectors() + at] - most);
            if (weight != 0.0f) {
                total += weight;
                result += weight * parts[part * count + i];
            }
        }
        store(y, i, result / total);
    }
}

// --- Backward ---
//
// With P = exp(scale · S − sums) and D = rows of Σ g ∘ y: dV = Pᵀ g, dS = P ∘ (g Vᵀ − D), dQ = scale · dS K,
// dK = scale · dSᵀ Q. Where scores are capped, dS is multiplied by the slope of that.

// dots = Σ g y of each vector of y and g: [tokens, heads · width], in [heads, tokens]. A warp for each;
// the grid may have any size.
template <typename T>
__device__ __forceinline__ void row_dots(const Problem& p, In<T> y, In<T> g, Out<float> dots) {
    const u64 warps = u64(gridDim.x) * blockDim.x / LANES;
    for (u64 at = (u64(blockIdx.x) * blockDim.x + threadIdx.x) / LANES; at < p.vectors(); at += warps) {
        float sum = 0.0f;
        for (u32 i = lane(); i < p.width; i += LANES) {
            sum += load(y, at * p.width + i) * load(g, at * p.width + i);
        }
#pragma unroll
        for (u32 step = LANES / 2; step > 0; step /= 2) {
            sum += __shfl_xor_sync(~0u, sum, step);
        }
        if (lane() == 0) {
            dots[p.number_of(at)] = sum;
        }
    }
}

// What the backward pass knows of a row.
struct Row {
    Visible seen;
    float sum; // in units of log 2
    float dot;

    // The probability of a slot.
    __device__ __forceinline__ float probability(float score, float scale, u32 slot) const {
        return seen.has(slot) ? exp2f(score * scale - sum) : 0.0f;
    }

    // The row of another lane.
    __device__ __forceinline__ Row of_lane(u32 from) const {
        return {{__shfl_sync(~0u, seen.begin, from), __shfl_sync(~0u, seen.end, from)},
                __shfl_sync(~0u, sum, from),
                __shfl_sync(~0u, dot, from)};
    }
};

__device__ __forceinline__ Row row_of(const Pair& pair, u32 row, In<float> sums, In<float> dots) {
    if (row >= pair.rows()) {
        return {{0, 0}, 0.0f, 0.0f};
    }
    const u64 at = pair.number_at(row);
    return {pair.visible(row), sums[at] * LOG2_E, dots[at]};
}

// The tiles of a block of the backward pass. It owns two; of those that stream by, two are in use while the next two
// are on their way.
template <typename T> struct Tiles {
    static constexpr u32 OWN = Sizes<T>::WARPS * STRIP;
    static constexpr u32 COUNT = Sizes<T>::BACKWARD;

    __device__ __forceinline__ static T* own(u32 tile) {
        return reinterpret_cast<T*>(tiles) + tile * OWN * STRIDE<T>;
    }
    __device__ __forceinline__ static T* streamed(u32 turn, u32 tile) {
        return own(2) + (turn % 2 * 2 + tile) * COUNT * STRIDE<T>;
    }
};

// dq. A block owns a tile of rows, and slots stream by; the grid is [tiles, pairs].
template <typename T>
__device__ __forceinline__ void queries_backward(const Problem& p, In<u32> mask, In<T> q, In<T> k, In<T> v, In<T> g,
                                                 In<float> sums, In<float> dots, Out<T> dq) {
    using At = Tiles<T>;
    const Pair pair(p, mask);
    const u32 first = (p.row_tiles(At::OWN) - 1 - blockIdx.x / p.pairs()) * At::OWN; // the longest first
    if (first >= pair.rows()) {
        return; // the sequence is shorter than the longest
    }
    const u32 strip = threadIdx.x / LANES * STRIP;
    const u32 own = first + strip + first_row();

    const Row rows[2] = {row_of(pair, own, sums, dots), row_of(pair, own + 8, sums, dots)};
    const Visible seen = pair.visible_to(first, At::OWN);
    const float scale = p.scale * LOG2_E;
    const float inverse_cap = p.inverse_cap();
    const auto copy = [&](u32 slot, u32 turn) {
        copy_slots<T>(At::streamed(turn, 0), k, pair, slot, At::COUNT, seen.end);
        copy_slots<T>(At::streamed(turn, 1), v, pair, slot, At::COUNT, seen.end);
    };

    Strip<W> result;
    copy_rows<T>(At::own(0), q, pair, first, At::OWN);
    copy_rows<T>(At::own(1), g, pair, first, At::OWN);
    copy(seen.begin, 0);
    for (u32 slot = seen.begin, turn = 0; slot < seen.end; slot += At::COUNT, turn++) {
        wait_for_tiles<0>(); // these are there, and the last ones no longer needed
        copy(slot + At::COUNT, turn + 1);
        Strip<At::COUNT> scores;
        Strip<At::COUNT> slopes;
        multiply_rows(scores, At::own(0) + strip * STRIDE<T>, At::streamed(turn, 0));
        bend(scores, p.cap);
        multiply_rows(slopes, At::own(1) + strip * STRIDE<T>, At::streamed(turn, 1));
#pragma unroll
        for (u32 n = 0; n < At::COUNT / 8; n++) {
#pragma unroll
            for (u32 e = 0; e < 4; e++) {
                const Row& row = rows[e / 2];
                const float score = scores.at[n][e];
                slopes.at[n][e] = row.probability(score, scale, slot + column_of(n, e)) *
                                  (slopes.at[n][e] - row.dot) * slope_of_cap(score, inverse_cap);
            }
        }
        multiply_columns(result, slopes, At::streamed(turn, 0));
    }
    wait_for_copies<0>(); // none may outlive the block
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        if (own + 8 * half < pair.rows()) {
            store_row(dq, pair.row_at(own + 8 * half), result, half, p.scale, p.width);
        }
    }
}

// dk and dv. A block owns a tile of slots, and rows stream by; the grid is [parts of W, tiles, pairs]. Scores are
// transposed, so that they lie in registers as the products with them need them.
template <typename T>
__device__ __forceinline__ void keys_backward(const Problem& p, In<u32> mask, In<T> q, In<T> k, In<T> v, In<T> g,
                                              In<float> sums, In<float> dots, Out<T> dk, Out<T> dv) {
    using At = Tiles<T>;
    const Pair pair(p, mask);
    const u32 count = p.slot_tiles(At::OWN);
    const u32 first = blockIdx.x / p.pairs() % count * At::OWN;
    const u32 part = blockIdx.x / p.pairs() / count * PART; // the first column
    if (first >= pair.queries) {
        return; // the sequence is shorter than the longest
    }
    const u32 strip = threadIdx.x / LANES * STRIP;
    const u32 own = first + strip + first_row();
    const float scale = p.scale * LOG2_E;
    const float inverse_cap = p.inverse_cap();
    // The next tile of rows that see any of the block's slots, from this one on.
    const auto next = [&](u32 row) {
        while (row < pair.rows()) {
            const Visible seen = pair.visible_to(row, At::COUNT);
            if (seen.end > first && seen.begin < first + At::OWN) {
                break;
            }
            row += At::COUNT;
        }
        return row;
    };
    const auto copy = [&](u32 row, u32 turn) {
        copy_rows<T>(At::streamed(turn, 0), q, pair, row, At::COUNT);
        copy_rows<T>(At::streamed(turn, 1), g, pair, row, At::COUNT);
    };

    Strip<PART> keys;
    Strip<PART> values;
    u32 row = next(0);
    copy_slots<T>(At::own(0), k, pair, first, At::OWN, pair.filled);
    copy_slots<T>(At::own(1), v, pair, first, At::OWN, pair.filled);
    copy(row, 0);
    for (u32 turn = 0; row < pair.rows(); turn++) {
        const Row mine = row_of(pair, row + lane() % At::COUNT, sums, dots);
        row = next(row + At::COUNT);
        wait_for_tiles<0>(); // these are there, and the last ones no longer needed
        copy(row, turn + 1);
        Strip<At::COUNT> scores;
        Strip<At::COUNT> slopes;
        multiply_rows(scores, At::own(0) + strip * STRIDE<T>, At::streamed(turn, 0));
        bend(scores, p.cap);
        multiply_rows(slopes, At::own(1) + strip * STRIDE<T>, At::streamed(turn, 1));
#pragma unroll
        for (u32 n = 0; n < At::COUNT / 8; n++) {
#pragma unroll
            for (u32 e = 0; e < 2; e++) {
                const Row its = mine.of_lane(column_of(n, e));
#pragma unroll
                for (u32 half = 0; half < 2; half++) {
                    float& score = scores.at[n][2 * half + e];
                    float& slope = slopes.at[n][2 * half + e];
                    const float bent = score;
                    score = its.probability(score, scale, own + 8 * half);
                    slope = score * (slope - its.dot) * slope_of_cap(bent, inverse_cap);
                }
            }
        }
        multiply_columns(values, scores, At::streamed(turn, 1) + part);
        multiply_columns(keys, slopes, At::streamed(turn, 0) + part);
    }
    wait_for_copies<0>(); // none may outlive the block
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        const u32 slot = own + 8 * half;
        if (slot < pair.queries && part < p.width) {
            store_row(dk, pair.slot_at(slot) + part, keys, half, p.scale, p.width - part);
            store_row(dv, pair.slot_at(slot) + part, values, half, 1.0f, p.width - part);
        }
    }
}

// --- Kernels ---

#define KERNEL(NAME, THREADS) extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_##NAME

#define KERNELS(NAME, T)                                                                                               \
    KERNEL(fwd_##NAME, LANES* Sizes<T>::WARPS)                                                                         \
    (Problem p, In<u32> mask, In<T> q, In<T> k, In<T> v, Out<float> sums, Out<T> y, Out<float> parts, u32 chunk) {     \
        forward<T>(p, mask, q, k, v, sums, y, parts, chunk);                                                           \
    }                                                                                                                  \
    KERNEL(combine_##NAME, MAX_BLOCK)(Problem p, In<float> parts, In<float> sums, Out<T> y, u32 chunks) {              \
        combine<T>(p, parts, sums, y, chunks);                                                                         \
    }                                                                                                                  \
    KERNEL(dots_##NAME, MAX_BLOCK)(Problem p, In<T> y, In<T> g, Out<float> dots) { row_dots<T>(p, y, g, dots); }       \
    KERNEL(dq_##NAME, LANES* Sizes<T>::WARPS)                                                                          \
    (Problem p, In<u32> mask, In<T> q, In<T> k, In<T> v, In<T> g, In<float> sums, In<float> dots, Out<T> dq) {         \
        queries_backward<T>(p, mask, q, k, v, g, sums, dots, dq);                                                      \
    }                                                                                                                  \
    KERNEL(dkdv_##NAME, LANES* Sizes<T>::WARPS)                                                                        \
    (Problem p, In<u32> mask, In<T> q, In<T> k, In<T> v, In<T> g, In<float> sums, In<float> dots, Out<T> dk,           \
     Out<T> dv) {                                                                                                      \
        keys_backward<T>(p, mask, q, k, v, g, sums, dots, dk, dv);                                                     \
    }

KERNELS(f32, float)
KERNELS(bf16, bf16)
