// The device kernels of training and inference, for f32 and bf16 tensors.
//
// Tensors are contiguous and row-major. All arithmetic is in float; bf16 is only a storage format. Every sum is taken
// in an order that depends on the launch's sizes alone, so that results repeat to the last bit.
//
// Launches: blocks are one-dimensional, their size a power of two of at most 256. "One block per row" means a grid of
// exactly that many blocks. The other kernels stride over the grid, which may have any size. Outputs do not overlap
// inputs; a kernel that works in place says so.

#include "numbers.cuh"

using i32 = int;
using u8 = unsigned char;
using i8 = signed char;

constexpr float LOWEST = -3.402823466e38f;

// Defines a device function template, and its kernels NAME_f32 and NAME_bf16. The function's body follows.
#define KERNEL(NAME, PARAMETERS, ARGUMENTS)                                                                            \
    template <typename T> __device__ __forceinline__ void NAME PARAMETERS;                                             \
    namespace f32_kernels {                                                                                            \
    using T = float;                                                                                                   \
    extern "C" __global__ void __launch_bounds__(MAX_BLOCK) NAME##_f32 PARAMETERS { NAME<T> ARGUMENTS; }               \
    }                                                                                                                  \
    namespace bf16_kernels {                                                                                           \
    using T = bf16;                                                                                                    \
    extern "C" __global__ void __launch_bounds__(MAX_BLOCK) NAME##_bf16 PARAMETERS { NAME<T> ARGUMENTS; }              \
    }                                                                                                                  \
    template <typename T> __device__ __forceinline__ void NAME PARAMETERS

// The thread's share of 0..N when the block divides it, and when the whole grid does. Unrolled, so that several loads
// are under way at once.
#define FOR_BLOCK(I, N) _Pragma("unroll 4") for (u32 I = threadIdx.x; I < (N); I += blockDim.x)
#define FOR_GRID(I, N)                                                                                                 \
    _Pragma("unroll 4") for (u64 I = u64(blockIdx.x) * blockDim.x + threadIdx.x; I < (N);                              \
                             I += u64(gridDim.x) * blockDim.x)

__device__ __forceinline__ float sigmoid(float z) { return 1.0f / (1.0f + expf(-z)); }

// Words by value: a row for each tensor of a kernel that works on many.
constexpr u32 TABLE = 240;

struct Table {
    u64 words[TABLE];
};

// --- Element by element ---

// 16 bytes, which a thread reads or writes at once.
template <typename T> struct alignas(16) Pack {
    static constexpr u32 SIZE = 16 / sizeof(T);
    T of[SIZE];
};

// f(x, y) for each of n elements, with x those of all inputs and y those of all outputs. An output may be an input.
template <u32 INS, u32 OUTS, typename T, typename F>
__device__ __forceinline__ void map(const T* const (&ins)[INS], T* const (&outs)[OUTS], u64 n, F f) {
    constexpr u32 SIZE = Pack<T>::SIZE;
    u64 together = n * sizeof(T);
    for (const T* in : ins) {
        together |= reinterpret_cast<u64>(in);
    }
    for (const T* out : outs) {
        together |= reinterpret_cast<u64>(out);
    }
    const bool packed = together % 16 == 0;
    for (u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x; i < (packed ? n / SIZE : n); i += u64(gridDim.x) * blockDim.x) {
        if (!packed) {
            float x[INS], y[OUTS];
            for (u32 k = 0; k < INS; k++) {
                x[k] = load(ins[k], i);
            }
            f(x, y);
            for (u32 k = 0; k < OUTS; k++) {
                store(outs[k], i, y[k]);
            }
            continue;
        }
        Pack<T> from[INS], to[OUTS];
#pragma unroll
        for (u32 k = 0; k < INS; k++) {
            from[k] = reinterpret_cast<const Pack<T>*>(ins[k])[i];
        }
#pragma unroll
        for (u32 e = 0; e < SIZE; e++) {
            float x[INS], y[OUTS];
#pragma unroll
            for (u32 k = 0; k < INS; k++) {
                x[k] = load(from[k].of, e);
            }
            f(x, y);
#pragma unroll
            for (u32 k = 0; k < OUTS; k++) {
                store(to[k].of, e, y[k]);
            }
        }
#pragma unroll
        for (u32 k = 0; k < OUTS; k++) {
            reinterpret_cast<Pack<T>*>(outs[k])[i] = to[k];
        }
    }
}

// --- Reductions ---

struct Sum {
    __device__ float operator()(float a, float b) const { return a + b; }
};

struct Max {
    __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Combines one value of each thread as a binary tree; every thread of the block calls it and gets the result.
template <typename Value, typename Combine> __device__ Value block_reduce(Value value, Combine combine) {
    __shared__ Value values[MAX_BLOCK];
    values[threadIdx.x] = value;
    __syncthreads();
    for (u32 half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) {
            values[threadIdx.x] = combine(values[threadIdx.x], values[threadIdx.x + half]);
        }
        __syncthreads();
    }
    const Value result = values[0];
    __syncthreads(); // all have read it before a next call writes
    return result;
}

__device__ __forceinline__ float block_sum(float value) { return block_reduce(value, Sum()); }

// The maximum of values seen one by one, and Σ exp(value − maximum).
struct LogSum {
    float max = LOWEST;
    float sum = 0.0f;

    __device__ __forceinline__ void see(float value) {
        const float difference = value - max;
        const float ratio = expf(-fabsf(difference));
        sum = difference > 0.0f ? sum * ratio + 1.0f : sum + ratio;
        max = fmaxf(max, value);
    }

    // What the threads of the block saw together.
    __device__ __forceinline__ LogSum over_block() const {
        LogSum all;
        all.max = block_reduce(max, Max());
        all.sum = block_sum(sum * expf(max - all.max));
        return all;
    }
};

// --- Normalisation of rows x: [rows, width] by w, b: [width] ---
//
// Forward, x may be a residual connection: with a branch, what is normalised is x + branch, which is stored in sum, and
// without one branch and sum are null. Backward, the gradient before, if it isn't null, is that of what is normalised so
// far: dx is added to it.

// The block's row of x, or of x + branch: each thread writes the elements that it reads later on.
template <typename T>
__device__ __forceinline__ const T* row_of(const T* x, const T* branch, T* sum, u32 width) {
    const u64 start = u64(blockIdx.x) * width;
    if (branch == nullptr) {
        return x + start;
    }
    FOR_BLOCK(i, width) {
        store(sum, start + i, load(x, start + i) + load(branch, start + i));
    }
    return sum + start;
}

// 1 / √(mean(x²) + ε) of one row.
template <typename T> __device__ __forceinline__ float inverse_rms(const T* x, u32 width, float eps) {
    float squares = 0.0f;
    FOR_BLOCK(i, width) {
        const float value = load(x, i);
        squares += value * value;
    }
    return 1.0f / sqrtf(block_sum(squares) / width + eps);
}

// y = w ∘ x r with r = 1 / √(mean(x²) + ε). One block per row.
KERNEL(rms_norm_fwd, (const T* x, const T* branch, T* sum, In<T> w, Out<T> y, u32 width, float eps),
       (x, branch, sum, w, y, width, eps)) {
    const T* row = row_of(x, branch, sum, width);
    const float r = inverse_rms(row, width, eps);
    FOR_BLOCK(i, width) {
        store(y, u64(blockIdx.x) * width + i, load(w, i) * (load(row, i) * r));
    }
}

// dx = r h − x r³ mean(h ∘ x) with h = g ∘ w; also stores r: [rows]. One block per row.
KERNEL(rms_norm_bwd, (In<T> x, In<T> w, In<T> g, In<T> before, Out<T> dx, Out<float> r, u32 width, float eps),
       (x, w, g, before, dx, r, width, eps)) {
    const u64 start = u64(blockIdx.x) * width;
    const float inverse = inverse_rms(x + start, width, eps);
    float dot = 0.0f;
    FOR_BLOCK(i, width) {
        dot += load(g, start + i) * load(w, i) * load(x, start + i);
    }
    const float slope = inverse * inverse * (block_sum(dot) / width);
    FOR_BLOCK(i, width) {
        const float h = load(g, start + i) * load(w, i);
        store(dx, start + i, load_if(before, start + i) + inverse * (h - load(x, start + i) * slope));
    }
    if (threadIdx.x == 0) {
        r[blockIdx.x] = inverse;
    }
}

// dw[c] = Σ g x r over the rows, with r: [rows] of rms_norm_bwd. One thread per column.
KERNEL(rms_norm_dw, (In<T> x, In<T> g, In<float> r, Out<float> dw, u64 rows, u32 width), (x, g, r, dw, rows, width)) {
    FOR_GRID(column, width) {
        float sum = 0.0f;
#pragma unroll 8
        for (u64 row = 0; row < rows; row++) {
            const u64 at = row * width + column;
            sum += load(g, at) * load(x, at) * r[row];
        }
        dw[column] = sum;
    }
}

struct Moments {
    float mean;
    float inverse; // 1 / √(variance + ε)
};

template <typename T> __device__ __forceinline__ Moments moments(const T* x, u32 width, float eps) {
    float sum = 0.0f;
    FOR_BLOCK(i, width) {
        sum += load(x, i);
    }
    const float mean = block_sum(sum) / width;
    float squares = 0.0f;
    FOR_BLOCK(i, width) {
        const float centred = load(x, i) - mean;
        squares += centred * centred;
    }
    return {mean, 1.0f / sqrtf(block_sum(squares) / width + eps)};
}

// y = w ∘ n + b with n = (x − mean(x)) r and r = 1 / √(var(x) + ε). One block per row.
KERNEL(layer_norm_fwd,
       (const T* x, const T* branch, T* sum, In<T> w, In<T> b, Out<T> y, u32 width, float eps),
       (x, branch, sum, w, b, y, width, eps)) {
    const T* row = row_of(x, branch, sum, width);
    const Moments of = moments(row, width, eps);
    FOR_BLOCK(i, width) {
        store(y, u64(blockIdx.x) * width + i, load(w, i) * ((load(row, i) - of.mean) * of.inverse) + load(b, i));
    }
}

// dx = r (h − mean(h) − n mean(h ∘ n)) with h = g ∘ w; also stores the mean and r in stats: [rows, 2]. One block per
// row.
KERNEL(layer_norm_bwd, (In<T> x, In<T> w, In<T> g, In<T> before, Out<T> dx, Out<float> stats, u32 width, float eps),
       (x, w, g, before, dx, stats, width, eps)) {
    const u64 start = u64(blockIdx.x) * width;
    const Moments row = moments(x + start, width, eps);
    float sum = 0.0f;
    float dot = 0.0f;
    FOR_BLOCK(i, width) {
        const float h = load(g, start + i) * load(w, i);
        sum += h;
        dot += h * ((load(x, start + i) - row.mean) * row.inverse);
    }
    const float shift = block_sum(sum) / width;
    const float slope = block_sum(dot) / width;
    FOR_BLOCK(i, width) {
        const float h = load(g, start + i) * load(w, i);
        const float normal = (load(x, start + i) - row.mean) * row.inverse;
        store(dx, start + i, load_if(before, start + i) + row.inverse * (h - shift - normal * slope));
    }
    if (threadIdx.x == 0) {
        stats[2 * u64(blockIdx.x)] = row.mean;
        stats[2 * u64(blockIdx.x) + 1] = row.inverse;
    }
}

// dw[c] = Σ g n and db[c] = Σ g over the rows, with stats: [rows, 2] of layer_norm_bwd. One thread per column.
KERNEL(layer_norm_dwdb, (In<T> x, In<T> g, In<float> stats, Out<float> dw, Out<float> db, u64 rows, u32 width),
       (x, g, stats, dw, db, rows, width)) {
    FOR_GRID(column, width) {
        float weight = 0.0f;
        float bias = 0.0f;
#pragma unroll 8
        for (u64 row = 0; row < rows; row++) {
            const u64 at = row * width + column;
            const float gradient = load(g, at);
            weight += gradient * ((load(x, at) - stats[2 * row]) * stats[2 * row + 1]);
            bias += gradient;
        }
        dw[column] = weight;
        db[column] = bias;
    }
}

// --- Rotary positions ---

// Rotates the pairs (i, half + i) of q and k: [tokens, heads, 2 half], each with heads of its own, by the angles in the
// rows of cos, sin: [any, half] that positions: [tokens] name; the direction is 1, or −1 for the inverse (the backward
// pass).
KERNEL(rope,
       (In<T> q, In<T> k, Out<T> to_q, Out<T> to_k, In<float> cos, In<float> sin, In<u32> positions, u64 tokens,
        u32 q_heads, u32 k_heads, u32 half, float direction),
       (q, k, to_q, to_k, cos, sin, positions, tokens, q_heads, k_heads, half, direction)) {
    const u32 heads = q_heads + k_heads;
    FOR_GRID(pair, tokens * heads * half) {
        const u64 all = pair / half;
        const u64 i = pair - all * half;
        const u64 token = all / heads;
        const u32 head = u32(all - token * heads);
        const bool query = head < q_heads;
        const T* x = query ? q : k;
        T* y = query ? to_q : to_k;
        const u64 angle = u64(positions[token]) * half + i;
        const u64 first = (query ? token * q_heads + head : token * k_heads + (head - q_heads)) * half * 2 + i;
        const u64 second = first + half;
        const float c = cos[angle];
        const float s = direction * sin[angle];
        const float a = load(x, first);
        const float b = load(x, second);
        store(y, first, a * c - b * s);
        store(y, second, b * c + a * s);
    }
}

// --- Activations, element by element ---

constexpr u32 RELU = 0;
constexpr u32 GELU_TANH = 1;
constexpr u32 GELU_ERF = 2;
constexpr u32 TANH = 4;
// Any other kind is silu, 3.

constexpr float GELU_SLOPE = 1.5957691216057308f; // 2 √(2/π)
constexpr float GELU_CUBIC = 0.044715f;

// The share of z that GELU's tanh form lets through: ½ (1 + tanh(u)) = sigmoid(2u), u = √(2/π) (z + 0.044715 z³).
__device__ __forceinline__ float gelu_share(float z) { return sigmoid(GELU_SLOPE * z * (1.0f + GELU_CUBIC * z * z)); }

// The normal distribution function, without cancellation for negative z.
__device__ __forceinline__ float normal_share(float z) { return 0.5f * erfcf(-0.7071067811865476f * z); }

__device__ __forceinline__ float activation(float z, u32 kind) {
    switch (kind) {
    case RELU: return z < 0.0f ? 0.0f : z; // a NaN stays one
    case GELU_TANH: return z * gelu_share(z);
    case GELU_ERF: return z * normal_share(z);
    case TANH: return tanhf(z);
    default: return z * sigmoid(z);
    }
}

__device__ __forceinline__ float activation_slope(float z, u32 kind) {
    switch (kind) {
    case RELU: return z > 0.0f ? 1.0f : 0.0f;
    case GELU_TANH: {
        const float s = gelu_share(z);
        return s + z * s * (1.0f - s) * GELU_SLOPE * (1.0f + 3.0f * GELU_CUBIC * z * z);
    }
    case GELU_ERF: return normal_share(z) + z * 0.3989422804014327f * expf(-0.5f * z * z); // the density: e^(−z²/2) / √2π
    case TANH: {
        const float t = tanhf(z);
        return 1.0f - t * t;
    }
    default: {
        const float s = sigmoid(z);
        return s * (1.0f + z * (1.0f - s));
    }
    }
}

// y = f(gate) ∘ up.
KERNEL(gated_fwd, (In<T> gate, In<T> up, Out<T> y, u64 n, u32 kind), (gate, up, y, n, kind)) {
    const T* const ins[] = {gate, up};
    T* const outs[] = {y};
    map(ins, outs, n, [kind](const float(&x)[2], float(&y)[1]) { y[0] = activation(x[0], kind) * x[1]; });
}

// dgate = g ∘ up ∘ f'(gate) and dup = g ∘ f(gate).
KERNEL(gated_bwd, (In<T> gate, In<T> up, In<T> g, Out<T> dgate, Out<T> dup, u64 n, u32 kind),
       (gate, up, g, dgate, dup, n, kind)) {
    const T* const ins[] = {gate, up, g};
    T* const outs[] = {dgate, dup};
    map(ins, outs, n, [kind](const float(&x)[3], float(&y)[2]) {
        y[0] = x[2] * x[1] * activation_slope(x[0], kind);
        y[1] = x[2] * activation(x[0], kind);
    });
}

// y = f(x).
KERNEL(activation_fwd, (In<T> x, Out<T> y, u64 n, u32 kind), (x, y, n, kind)) {
    const T* const ins[] = {x};
    T* const outs[] = {y};
    map(ins, outs, n, [kind](const float(&x)[1], float(&y)[1]) { y[0] = activation(x[0], kind); });
}

// dx = g ∘ f'(x).
KERNEL(activation_bwd, (In<T> x, In<T> g, Out<T> dx, u64 n, u32 kind), (x, g, dx, n, kind)) {
    const T* const ins[] = {x, g};
    T* const outs[] = {dx};
    map(ins, outs, n, [kind](const float(&x)[2], float(&y)[1]) { y[0] = x[1] * activation_slope(x[0], kind); });
}

// --- Dropout ---

// The random words of the numbers 4 counter .. 4 counter + 3 of a layer, by Philox4x32-10 (Salmon et al. 2011), as
// core/kernels/src/dropout.rs computes them on the host.
struct Words {
    u32 of[4];
};

__device__ __forceinline__ Words philox(u32 key0, u32 key1, u32 layer, u64 counter) {
    Words state = {{u32(counter), u32(counter >> 32), layer, 0}};
#pragma unroll
    for (u32 round = 0; round < 10; round++) {
        const u64 even = u64(state.of[0]) * 0xd2511f53u;
        const u64 odd = u64(state.of[2]) * 0xcd9e8d57u;
        state = {{u32(odd >> 32) ^ state.of[1] ^ key0, u32(odd), u32(even >> 32) ^ state.of[3] ^ key1, u32(even)}};
        key0 += 0x9e3779b9u;
        key1 += 0xbb67ae85u;
    }
    return state;
}

// A dropout mask as kernels are given it: 0 for numbers whose random word is less than the threshold, else `factor`.
#define MASK u32 key0, u32 key1, u32 layer, u32 threshold, float factor
#define MASK_OF key0, key1, layer, threshold, factor

struct Mask {
    u32 key0, key1, layer, threshold;
    float factor;
    // Of the four numbers that were asked for last.
    u64 counter;
    Words words;

    __device__ __forceinline__ Mask(MASK)
        : key0(key0), key1(key1), layer(layer), threshold(threshold), factor(factor), counter(~0ull), words() {}

    // The mask of number i.
    __device__ __forceinline__ float at(u64 i) {
        if (threshold == 0) {
            return factor;
        }
        if (i / 4 != counter) {
            counter = i / 4;
            words = philox(key0, key1, layer, counter);
        }
        const u32 even = i & 2 ? words.of[2] : words.of[0];
        const u32 odd = i & 2 ? words.of[3] : words.of[1];
        return (i & 1 ? odd : even) < threshold ? 0.0f : factor;
    }
};

// y = m ∘ x.
KERNEL(dropout, (In<T> x, Out<T> y, u64 n, MASK), (x, y, n, MASK_OF)) {
    Mask mask(MASK_OF);
    FOR_GRID(counter, (n + 3) / 4) {
#pragma unroll
        for (u32 word = 0; word < 4; word++) {
            const u64 i = 4 * counter + word;
            if (i < n) {
                store(y, i, load(x, i) * mask.at(i));
            }
        }
    }
}

// --- Low-rank adapters of several layers, each a member of a launch ---

// Ranks that a thread works on at a time.
constexpr u32 RANKS = 16;

// Rows of a block of `adapter_narrow`, and those that a thread of `adapter_widen` goes through.
constexpr u32 NARROW_ROWS = 4;
constexpr u32 WIDEN_ROWS = 8;

// A row of the table, as adapter.rs writes it. The factor F is A: [rank, width], or B: [width, rank] if `by_column`.
struct Member {
    u64 x;          // [rows, width]; what is multiplied with the mask
    u64 narrow;     // [rows, rank]
    u64 factor;     // F, which is read or, by its gradient, written
    u64 width;
    u64 rank;
    u64 by_column;
    u64 key;        // of the mask: two words
    u64 layer;      // of the mask, and its threshold
    u64 factors;    // of the mask, and the scale, as bits of floats
    u64 columns;    // blocks that share the columns of a row
    u64 more;       // adapter_widen: members that add to the same x; adapter_outer: numbers from one segment to the next
    u64 segment;    // adapter_outer: rows of a segment
};

__device__ __forceinline__ u32 lower(u64 words) { return u32(words); }
__device__ __forceinline__ u32 upper(u64 words) { return u32(words >> 32); }

__device__ __forceinline__ Mask mask_of(const Member& own) {
    return Mask(lower(own.key), upper(own.key), lower(own.layer), upper(own.layer), __uint_as_float(lower(own.factors)));
}

template <typename T> struct alignas(4 * sizeof(T)) Four {
    T of[4];
};

// Four numbers of a row of `length` from `at` on, and zeros beyond its end. All rows of x have this length.
template <typename T> __device__ __forceinline__ void load4(const T* x, u64 row, u64 length, u64 at, float (&out)[4]) {
    const T* from = x + row * length + at;
    if ((reinterpret_cast<u64>(x) | length * sizeof(T)) % sizeof(Four<T>) == 0) {
        const Four<T> four = *reinterpret_cast<const Four<T>*>(from);
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            out[i] = load(four.of, i);
        }
        return;
    }
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        out[i] = at + i < length ? load(from, i) : 0.0f;
    }
}

// RANKS numbers of row `row` of narrow: [rows, rank], from `first` on, and zeros beyond.
template <typename T>
__device__ __forceinline__ void load_ranks(const T* narrow, u64 row, u64 rank, u64 first, float (&out)[RANKS]) {
#pragma unroll
    for (u32 j = 0; j < RANKS; j += 4) {
        float four[4] = {};
        if (first + j < rank) {
            load4(narrow, row, rank, first + j, four);
        }
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            out[j + i] = four[i];
        }
    }
}

// Ranks from `first` on of four columns of the factor, and zeros beyond both.
template <typename T>
__device__ __forceinline__ void load_factor(const Member& own, u64 first, u64 column, float (&out)[RANKS][4]) {
    const T* factor = reinterpret_cast<const T*>(own.factor);
    if (own.by_column) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            float ranks[RANKS] = {};
            if (column + i < own.width) {
                load_ranks(factor, column + i, own.rank, first, ranks);
            }
#pragma unroll
            for (u32 j = 0; j < RANKS; j++) {
                out[j][i] = ranks[j];
            }
        }
        return;
    }
#pragma unroll
    for (u32 j = 0; j < RANKS; j++) {
        if (first + j < own.rank) {
            load4(factor, first + j, own.width, column, out[j]);
        } else {
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                out[j][i] = 0.0f;
            }
        }
    }
}

// Defines a device function template of one member, and its kernels NAME_f32 and NAME_bf16 on a grid of
// [blocks, members]. The function's body follows.
#define ADAPTER_KERNEL(NAME)                                                                                           \
    template <typename T> __device__ __forceinline__ void NAME(const Member* members, u32 rows);                       \
    extern "C" __global__ void __launch_bounds__(MAX_BLOCK)                                                            \
        NAME##_f32(const __grid_constant__ Table table, u32 rows) {                                                    \
        NAME<float>(reinterpret_cast<const Member*>(table.words), rows);                                               \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(MAX_BLOCK)                                                            \
        NAME##_bf16(const __grid_constant__ Table table, u32 rows) {                                                   \
        NAME<bf16>(reinterpret_cast<const Member*>(table.words), rows);                                                \
    }                                                                                                                  \
    template <typename T> __device__ __forceinline__ void NAME(const Member* members, u32 rows)

// narrow = scale · (m ∘ x) Fᵀ. A block has NARROW_ROWS rows, which share what is read of F.
ADAPTER_KERNEL(adapter_narrow) {
    constexpr u32 SUMS = NARROW_ROWS * RANKS;
    __shared__ float of_warps[MAX_BLOCK / 32][SUMS];
    const Member& own = members[blockIdx.y];
    const T* x = reinterpret_cast<const T*>(own.x);
    const u64 start = u64(blockIdx.x) * NARROW_ROWS;
    const u32 lane = threadIdx.x % 32;
    const u32 warp = threadIdx.x / 32;
    Mask mask = mask_of(own);
    for (u64 first = 0; first < own.rank; first += RANKS) {
        float sums[SUMS] = {};
        for (u64 column = 4 * threadIdx.x; column < own.width; column += 4 * blockDim.x) {
            float factor[RANKS][4];
            load_factor<T>(own, first, column, factor);
#pragma unroll
            for (u32 at = 0; at < NARROW_ROWS; at++) {
                const u64 row = start + at;
                if (row >= rows) {
                    break;
                }
                float kept[4];
                load4(x, row, own.width, column, kept);
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    kept[i] *= mask.at(row * own.width + column + i);
#pragma unroll
                    for (u32 j = 0; j < RANKS; j++) {
                        sums[at * RANKS + j] += kept[i] * factor[j][i];
                    }
                }
            }
        }
#pragma unroll
        for (u32 k = 0; k < SUMS; k++) {
            if (first + k % RANKS < own.rank) {
#pragma unroll
                for (u32 distance = 16; distance > 0; distance /= 2) {
                    sums[k] += __shfl_xor_sync(~0u, sums[k], distance);
                }
            }
            if (lane == 0) {
                of_warps[warp][k] = sums[k];
            }
        }
        __syncthreads();
        const u64 row = start + threadIdx.x / RANKS;
        const u64 rank = first + threadIdx.x % RANKS;
        if (threadIdx.x < SUMS && row < rows && rank < own.rank) {
            float sum = 0.0f;
            for (u32 other = 0; other < blockDim.x / 32; other++) {
                sum += of_warps[other][threadIdx.x];
            }
            const float scale = __uint_as_float(upper(own.factors));
            store(reinterpret_cast<T*>(own.narrow), row * own.rank + rank, scale * sum);
        }
        __syncthreads(); // all have read the sums before the next ones are written
    }
}

// x += Σ m ∘ (narrow F) over the members that add to the same x. Blocks are [row chunks · columns, such groups]; a thread
// has four columns.
ADAPTER_KERNEL(adapter_widen) {
    const u64 together = members->more;
    const Member* group = members + blockIdx.y * together;
    const u64 width = group->width;
    const u64 column = 4 * (blockIdx.x % group->columns * blockDim.x + threadIdx.x);
    const u64 start = blockIdx.x / group->columns * WIDEN_ROWS;
    if (column >= width) {
        return;
    }
    T* x = reinterpret_cast<T*>(group->x);
    float sums[WIDEN_ROWS][4] = {};
    for (u64 member = 0; member < together; member++) {
        const Member& own = group[member];
        const T* narrow = reinterpret_cast<const T*>(own.narrow);
        Mask mask = mask_of(own);
        for (u64 first = 0; first < own.rank; first += RANKS) {
            float factor[RANKS][4];
            load_factor<T>(own, first, column, factor);
#pragma unroll
            for (u32 at = 0; at < WIDEN_ROWS; at++) {
                if (start + at >= rows) {
                    break;
                }
                float slopes[RANKS];
                load_ranks(narrow, start + at, own.rank, first, slopes);
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    float sum = 0.0f;
#pragma unroll
                    for (u32 j = 0; j < RANKS; j++) {
                        sum += slopes[j] * factor[j][i];
                    }
                    sums[at][i] += mask.at((start + at) * width + column + i) * sum;
                }
            }
        }
    }
#pragma unroll
    for (u32 at = 0; at < WIDEN_ROWS; at++) {
        if (start + at >= rows) {
            break;
        }
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            if (column + i < width) {
                const u64 place = (start + at) * width + column + i;
                store(x, place, load(x, place) + sums[at][i]);
            }
        }
    }
}

// The gradient of F: narrowᵀ (m ∘ x) over a segment of rows, in float. Blocks are [segments · columns, members]; a thread
// has four columns.
ADAPTER_KERNEL(adapter_outer) {
    const Member& own = members[blockIdx.y];
    const u64 column = 4 * (blockIdx.x % own.columns * blockDim.x + threadIdx.x);
    const u64 segment = blockIdx.x / own.columns;
    if (column >= own.width) {
        return;
    }
    const T* x = reinterpret_cast<const T*>(own.x);
    const T* narrow = reinterpret_cast<const T*>(own.narrow);
    float* gradient = reinterpret_cast<float*>(own.factor) + segment * own.more;
    const u64 end = min(u64(rows), (segment + 1) * own.segment);
    Mask mask = mask_of(own);
    for (u64 first = 0; first < own.rank; first += RANKS) {
        float sums[RANKS][4] = {};
        for (u64 row = segment * own.segment; row < end; row++) {
            float kept[4], slopes[RANKS];
            load4(x, row, own.width, column, kept);
            load_ranks(narrow, row, own.rank, first, slopes);
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                kept[i] *= mask.at(row * own.width + column + i);
#pragma unroll
                for (u32 j = 0; j < RANKS; j++) {
                    sums[j][i] += slopes[j] * kept[i];
                }
            }
        }
#pragma unroll
        for (u32 j = 0; j < RANKS; j++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                if (first + j < own.rank && column + i < own.width) {
                    const u64 rank = first + j;
                    const u64 place = own.by_column ? (column + i) * own.rank + rank : rank * own.width + column + i;
                    gradient[place] = sums[j][i];
                }
            }
        }
    }
}

// --- Quantized weights: blocks as llama.cpp lays them out ---

// The number of 16 bits at any place in memory.
__device__ __forceinline__ float half_at(const u8* bytes) {
    const unsigned short bits = bytes[0] | bytes[1] << 8;
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// Number i of 32 of 4 bits: the lower half of each byte, then the upper ones.
__device__ __forceinline__ i32 nibble(const u8* bytes, u32 i) { return i < 16 ? bytes[i] & 15 : bytes[i - 16] >> 4; }

// Each encoding: the numbers of a block, its bytes, and number i of it.
struct Q8_0 {
    static constexpr u32 NUMBERS = 32, BYTES = 34;
    __device__ static float at(const u8* block, u32 i) { return half_at(block) * i8(block[2 + i]); }
};

struct Q4_0 {
    static constexpr u32 NUMBERS = 32, BYTES = 18;
    __device__ static float at(const u8* block, u32 i) { return half_at(block) * (nibble(block + 2, i) - 8); }
};

struct Q4_1 {
    static constexpr u32 NUMBERS = 32, BYTES = 20;
    __device__ static float at(const u8* block, u32 i) {
        return half_at(block) * nibble(block + 4, i) + half_at(block + 2);
    }
};

// Eight groups of 32, each with a scale and a minimum of 6 bits, packed into 12 bytes.
struct Q4K {
    static constexpr u32 NUMBERS = 256, BYTES = 144;
    __device__ static float at(const u8* block, u32 i) {
        const u32 group = i / 32;
        const u8* packed = block + 4;
        u32 scale, least;
        if (group < 4) {
            scale = packed[group] & 63;
            least = packed[group + 4] & 63;
        } else {
            scale = (packed[group + 4] & 15) | packed[group - 4] >> 6 << 4;
            least = packed[group + 4] >> 4 | packed[group] >> 6 << 4;
        }
        const u8 both = block[16 + i / 64 * 32 + i % 32];
        const u32 number = group % 2 == 0 ? both & 15 : both >> 4;
        return half_at(block) * scale * number - half_at(block + 2) * least;
    }
};

// Two halves of 128, each of four quarters: 4 lower bits here, 2 upper ones there, a scale for each 16.
struct Q6K {
    static constexpr u32 NUMBERS = 256, BYTES = 210;
    __device__ static float at(const u8* block, u32 i) {
        const u32 half = i / 128;
        const u32 quarter = i % 128 / 32;
        const u32 l = i % 32;
        const u8 both = block[64 * half + 32 * (quarter % 2) + l];
        const u32 lower = quarter < 2 ? both & 15 : both >> 4;
        const u32 upper = block[128 + 32 * half + l] >> 2 * quarter & 3;
        const i8 scale = block[192 + 8 * half + l / 16 + 2 * quarter];
        return half_at(block + 208) * scale * (i32(lower | upper << 4) - 32);
    }
};

template <typename Encoding, typename T> __device__ __forceinline__ void decode(In<u8> blocks, Out<T> y, u64 n) {
    FOR_GRID(i, n) {
        const u64 block = i / Encoding::NUMBERS;
        store(y, i, Encoding::at(blocks + block * Encoding::BYTES, u32(i - block * Encoding::NUMBERS)));
    }
}

// y = the numbers of the blocks.
KERNEL(decode_q8_0, (In<u8> blocks, Out<T> y, u64 n), (blocks, y, n)) { decode<Q8_0>(blocks, y, n); }
KERNEL(decode_q4_0, (In<u8> blocks, Out<T> y, u64 n), (blocks, y, n)) { decode<Q4_0>(blocks, y, n); }
KERNEL(decode_q4_1, (In<u8> blocks, Out<T> y, u64 n), (blocks, y, n)) { decode<Q4_1>(blocks, y, n); }
KERNEL(decode_q4k, (In<u8> blocks, Out<T> y, u64 n), (blocks, y, n)) { decode<Q4K>(blocks, y, n); }
KERNEL(decode_q6k, (In<u8> blocks, Out<T> y, u64 n), (blocks, y, n)) { decode<Q6K>(blocks, y, n); }

// --- Cross-entropy ---

// loss = log Σ exp(logits) − logits[target] for each row of logits: [rows, vocabulary]. Unless gradient is 0, the
// logits are replaced by (softmax − onehot(target)) · scale. Each target is less than the vocabulary. One block per row.
KERNEL(cross_entropy,
       (Out<T> logits, In<u32> targets, Out<float> loss, u32 vocabulary, float scale, u32 gradient),
       (logits, targets, loss, vocabulary, scale, gradient)) {
    const u64 start = u64(blockIdx.x) * vocabulary;
    const u32 target = targets[blockIdx.x];
    const float chosen = load(logits, start + target);
    LogSum own;
    FOR_BLOCK(i, vocabulary) {
        own.see(load(logits, start + i));
    }
    const LogSum row = own.over_block(); // from here on all threads have read `chosen`
    if (threadIdx.x == 0) {
        loss[blockIdx.x] = logf(row.sum) + (row.max - chosen);
    }
    if (gradient != 0) {
        const float inverse = 1.0f / row.sum;
        FOR_BLOCK(i, vocabulary) {
            const float probability = expf(load(logits, start + i) - row.max) * inverse;
            store(logits, start + i, (i == target ? probability - 1.0f : probability) * scale);
        }
    }
}

// A number and its place; the place is NOWHERE if one is not finite.
struct Best {
    float value;
    u32 place;
};

constexpr u32 NOWHERE = ~0u;

// The greater one, and of equal ones the first.
struct Better {
    __device__ Best operator()(Best a, Best b) const {
        if (a.place == NOWHERE || b.place == NOWHERE) {
            return {0.0f, NOWHERE};
        }
        return b.value > a.value || (b.value == a.value && b.place < a.place) ? b : a;
    }
};

// places[row] = where the greatest number of the row of x: [rows, width] is, the first of them, or NOWHERE if one is not
// finite. One block per row.
KERNEL(argmax, (In<T> x, Out<u32> places, u32 width), (x, places, width)) {
    const u64 start = u64(blockIdx.x) * width;
    Best best = {LOWEST, 0};
    FOR_BLOCK(i, width) {
        const float value = load(x, start + i);
        best = Better()(best, {value, fabsf(value) <= -LOWEST ? i : NOWHERE});
    }
    best = block_reduce(best, Better());
    if (threadIdx.x == 0) {
        places[blockIdx.x] = best.place;
    }
}

// --- Sums and copies ---

// y += x.
KERNEL(add_assign, (Out<T> y, In<T> x, u64 n), (y, x, n)) {
    const T* const ins[] = {y, x};
    T* const outs[] = {y};
    map(ins, outs, n, [](const float(&x)[2], float(&y)[1]) { y[0] = x[0] + x[1]; });
}

// y *= by[0].
KERNEL(scale, (Out<T> y, In<float> by, u64 n), (y, by, n)) {
    const T* const ins[] = {y};
    T* const outs[] = {y};
    const float factor = by[0];
    map(ins, outs, n, [factor](const float(&x)[1], float(&y)[1]) { y[0] = x[0] * factor; });
}

// dst[index[r]] = src[r] for the rows of src: [rows, width]; no index occurs twice.
KERNEL(scatter_rows, (Out<T> dst, In<T> src, In<u32> index, u64 rows, u32 width), (dst, src, index, rows, width)) {
    FOR_GRID(i, rows * width) {
        const u64 row = i / width;
        dst[index[row] * u64(width) + (i - row * width)] = src[i];
    }
}

// y += b in every row of y: [rows, width].
KERNEL(add_bias, (Out<T> y, In<T> b, u64 rows, u32 width), (y, b, rows, width)) {
    FOR_GRID(i, rows * width) {
        store(y, i, load(y, i) + load(b, i % width));
    }
}

// out[c] = Σ x over the rows of x: [rows, width]. One thread per column.
KERNEL(sum_rows, (In<T> x, Out<float> out, u64 rows, u32 width), (x, out, rows, width)) {
    FOR_GRID(column, width) {
        float sum = 0.0f;
#pragma unroll 8
        for (u64 row = 0; row < rows; row++) {
            sum += load(x, row * width + column);
        }
        out[column] = sum;
    }
}

// Puts the rows of fresh: [tokens, width] behind those of their sequences in cache: [slots, width], where the mask of
// attention.cu says. A block for each query that a sequence may have.
KERNEL(cache_write,
       (Out<T> cache, In<T> fresh, In<u32> mask, u32 sequences, u32 longest, u64 width),
       (cache, fresh, mask, sequences, longest, width)) {
    const u32 sequence = blockIdx.x / longest;
    const u32 query = blockIdx.x % longest;
    if (query >= mask[sequences + sequence]) {
        return;
    }
    const u64 from = (u64(mask[sequence]) + query) * width;
    const u64 to = (u64(mask[4 * sequences + sequence]) + mask[2 * sequences + sequence] + query) * width;
    FOR_BLOCK(i, width) {
        cache[to + i] = fresh[from + i];
    }
}

// --- Many f32 tensors at once: blockIdx.y is the tensor, the grid's x divides its elements ---

// partials[tensor, chunk] = Σ x² over the chunk for a grid of [chunks, tensors]. Rows are address and length.
extern "C" __global__ void __launch_bounds__(MAX_BLOCK) sum_squares_many(const __grid_constant__ Table table, Out<float> partials) {
    const u64* row = table.words + 2 * blockIdx.y;
    const In<float> x = reinterpret_cast<const float*>(row[0]);
    float squares = 0.0f;
    FOR_GRID(i, row[1]) {
        squares += x[i] * x[i];
    }
    squares = block_sum(squares);
    if (threadIdx.x == 0) {
        partials[u64(blockIdx.y) * gridDim.x + blockIdx.x] = squares;
    }
}

// y = x in bf16. Rows are the addresses of x and y, and the length.
extern "C" __global__ void __launch_bounds__(MAX_BLOCK) to_bf16_many(const __grid_constant__ Table table) {
    const u64* row = table.words + 3 * blockIdx.y;
    const In<float> x = reinterpret_cast<const float*>(row[0]);
    const Out<bf16> y = reinterpret_cast<bf16*>(row[1]);
    FOR_GRID(i, row[2]) {
        y[i] = f2b(x[i]);
    }
}

// x or the limit if it is less. A number that is not one stays so, unlike in fminf.
__device__ __forceinline__ float limited(float x, float limit) { return x > limit ? limit : x; }

// y = min(x, limit) for one number.
extern "C" __global__ void __launch_bounds__(MAX_BLOCK) at_most(In<float> x, Out<float> y, float limit) {
    if (threadIdx.x == 0) {
        y[0] = limited(x[0], limit);
    }
}

// out[0] = √Σ partials, the norm of all tensors; out[1] = min(1, max_norm / (norm + 10⁻⁶)), the factor that clips it.
// A single block.
extern "C" __global__ void __launch_bounds__(MAX_BLOCK)
    norm_finish(In<float> partials, u64 n, float max_norm, Out<float> out) {
    float sum = 0.0f;
    for (u64 i = threadIdx.x; i < n; i += blockDim.x) {
        sum += partials[i];
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) {
        const float norm = sqrtf(sum);
        out[0] = norm;
        out[1] = limited(max_norm / (norm + 1e-6f), 1.0f);
    }
}

// One step of AdamW in place: g = grad · factor[0], m += (g − m) share1, v = v β₂ + g² share2,
// w = w decay − rate · m / (√v / root + ε). With step size η at step t, decay = 1 − η λ, rate = η / (1 − β₁ᵗ),
// root = √(1 − β₂ᵗ), and the shares are 1 − β₁ and 1 − β₂. Rows are the addresses of w, grad, m and v, and the length.
extern "C" __global__ void __launch_bounds__(MAX_BLOCK)
    adamw_many(const __grid_constant__ Table table, In<float> factor, float decay, float rate, float root, float beta2,
               float share1, float share2, float eps) {
    const u64* row = table.words + 5 * blockIdx.y;
    const Out<float> w = reinterpret_cast<float*>(row[0]);
    const In<float> grad = reinterpret_cast<const float*>(row[1]);
    const Out<float> m = reinterpret_cast<float*>(row[2]);
    const Out<float> v = reinterpret_cast<float*>(row[3]);
    const float clip = factor[0];
    FOR_GRID(i, row[4]) {
        const float g = grad[i] * clip;
        const float mean = m[i] + (g - m[i]) * share1;
        const float square = v[i] * beta2 + g * g * share2;
        m[i] = mean;
        v[i] = square;
        w[i] = w[i] * decay - rate * (mean / (sqrtf(square) / root + eps));
    }
}
