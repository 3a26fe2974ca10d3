// The device kernels of training and inference, for f32 and bf16 tensors.
//
// Tensors are contiguous and row-major. All arithmetic is in float; bf16 is only a storage format. Every sum is taken
// in an order that depends on the launch's sizes alone, so that results repeat to the last bit.
//
// Launches: blocks are one-dimensional, their size a power of two of at most 256. "One block per row" means a grid of
// exactly that many blocks. The other kernels stride over the grid, which may have any size. Outputs do not overlap
// inputs; a kernel that works in place says so.

#include "numbers.cuh"

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

// --- Reductions ---

struct Sum {
    __device__ float operator()(float a, float b) const { return a + b; }
};

struct Max {
    __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Combines one value of each thread as a binary tree; every thread of the block calls it and gets the result.
template <typename Combine> __device__ float block_reduce(float value, Combine combine) {
    __shared__ float values[MAX_BLOCK];
    values[threadIdx.x] = value;
    __syncthreads();
    for (u32 half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) {
            values[threadIdx.x] = combine(values[threadIdx.x], values[threadIdx.x + half]);
        }
        __syncthreads();
    }
    const float result = values[0];
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

// 1 / √(mean(x²) + ε) of one row.
template <typename T> __device__ __forceinline__ float inverse_rms(In<T> x, u32 width, float eps) {
    float squares = 0.0f;
    FOR_BLOCK(i, width) {
        const float value = load(x, i);
        squares += value * value;
    }
    return 1.0f / sqrtf(block_sum(squares) / width + eps);
}

// y = w ∘ x r with r = 1 / √(mean(x²) + ε). One block per row.
KERNEL(rms_norm_fwd, (In<T> x, In<T> w, Out<T> y, u32 width, float eps), (x, w, y, width, eps)) {
    const u64 start = u64(blockIdx.x) * width;
    const float r = inverse_rms<T>(x + start, width, eps);
    FOR_BLOCK(i, width) {
        store(y, start + i, load(w, i) * (load(x, start + i) * r));
    }
}

// dx = r h − x r³ mean(h ∘ x) with h = g ∘ w; also stores r: [rows]. One block per row.
KERNEL(rms_norm_bwd, (In<T> x, In<T> w, In<T> g, Out<T> dx, Out<float> r, u32 width, float eps),
       (x, w, g, dx, r, width, eps)) {
    const u64 start = u64(blockIdx.x) * width;
    const float inverse = inverse_rms<T>(x + start, width, eps);
    float dot = 0.0f;
    FOR_BLOCK(i, width) {
        dot += load(g, start + i) * load(w, i) * load(x, start + i);
    }
    const float slope = inverse * inverse * (block_sum(dot) / width);
    FOR_BLOCK(i, width) {
        const float h = load(g, start + i) * load(w, i);
        store(dx, start + i, inverse * (h - load(x, start + i) * slope));
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

template <typename T> __device__ __forceinline__ Moments moments(In<T> x, u32 width, float eps) {
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
KERNEL(layer_norm_fwd, (In<T> x, In<T> w, In<T> b, Out<T> y, u32 width, float eps), (x, w, b, y, width, eps)) {
    const u64 start = u64(blockIdx.x) * width;
    const Moments row = moments<T>(x + start, width, eps);
    FOR_BLOCK(i, width) {
        store(y, start + i, load(w, i) * ((load(x, start + i) - row.mean) * row.inverse) + load(b, i));
    }
}

// dx = r (h − mean(h) − n mean(h ∘ n)) with h = g ∘ w; also stores the mean and r in stats: [rows, 2]. One block per
// row.
KERNEL(layer_norm_bwd, (In<T> x, In<T> w, In<T> g, Out<T> dx, Out<float> stats, u32 width, float eps),
       (x, w, g, dx, stats, width, eps)) {
    const u64 start = u64(blockIdx.x) * width;
    const Moments row = moments<T>(x + start, width, eps);
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
        store(dx, start + i, row.inverse * (h - shift - normal * slope));
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

// Rotates the pairs (i, half + i) of x: [tokens, heads, 2 half] by the angles of cos, sin: [tokens, half]; the
// direction is 1, or −1 for the inverse (the backward pass).
KERNEL(rope,
       (In<T> x, Out<T> y, In<float> cos, In<float> sin, u64 tokens, u32 heads, u32 half, float direction),
       (x, y, cos, sin, tokens, heads, half, direction)) {
    FOR_GRID(pair, tokens * heads * half) {
        const u64 head = pair / half;
        const u64 i = pair - head * half;
        const u64 angle = head / heads * half + i;
        const u64 first = head * half * 2 + i;
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

// y = silu(gate) ∘ up, with silu(z) = z / (1 + e⁻ᶻ).
KERNEL(swiglu_fwd, (In<T> gate, In<T> up, Out<T> y, u64 n), (gate, up, y, n)) {
    FOR_GRID(i, n) {
        const float z = load(gate, i);
        store(y, i, z * sigmoid(z) * load(up, i));
    }
}

// dgate = g ∘ up ∘ silu'(gate) and dup = g ∘ silu(gate).
KERNEL(swiglu_bwd, (In<T> gate, In<T> up, In<T> g, Out<T> dgate, Out<T> dup, u64 n), (gate, up, g, dgate, dup, n)) {
    FOR_GRID(i, n) {
        const float z = load(gate, i);
        const float s = sigmoid(z);
        const float gradient = load(g, i);
        store(dgate, i, gradient * load(up, i) * (s * (1.0f + z * (1.0f - s))));
        store(dup, i, gradient * (z * s));
    }
}

constexpr u32 RELU = 0;
constexpr u32 GELU_TANH = 1;
constexpr u32 GELU_ERF = 2;
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
    default: {
        const float s = sigmoid(z);
        return s * (1.0f + z * (1.0f - s));
    }
    }
}

// y = f(x).
KERNEL(activation_fwd, (In<T> x, Out<T> y, u64 n, u32 kind), (x, y, n, kind)) {
    FOR_GRID(i, n) {
        store(y, i, activation(load(x, i), kind));
    }
}

// dx = g ∘ f'(x).
KERNEL(activation_bwd, (In<T> x, In<T> g, Out<T> dx, u64 n, u32 kind), (x, g, dx, n, kind)) {
    FOR_GRID(i, n) {
        store(dx, i, load(g, i) * activation_slope(load(x, i), kind));
    }
}

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

// --- Sums and copies ---

// y += x.
KERNEL(add_assign, (Out<T> y, In<T> x, u64 n), (y, x, n)) {
    FOR_GRID(i, n) {
        store(y, i, load(y, i) + load(x, i));
    }
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

// cache[cache_rows[b], starts[b] + q] = fresh[b, q] for fresh: [batch, queries, width] and cache: [rows, capacity,
// width]; what lies past the capacity is dropped. One block per row of fresh.
KERNEL(cache_write,
       (Out<T> cache, In<T> fresh, In<u32> cache_rows, In<u32> starts, u32 queries, u32 capacity, u64 width),
       (cache, fresh, cache_rows, starts, queries, capacity, width)) {
    const u32 batch = blockIdx.x / queries;
    const u64 slot = u64(starts[batch]) + blockIdx.x % queries;
    if (slot >= capacity) {
        return;
    }
    const u64 from = blockIdx.x * width;
    const u64 to = (u64(cache_rows[batch]) * capacity + slot) * width;
    FOR_BLOCK(i, width) {
        cache[to + i] = fresh[from + i];
    }
}

// --- The optimiser, over many f32 tensors at once: blockIdx.y is the tensor, the grid's x divides its elements ---

// partials[tensor, chunk] = Σ x² over the chunk, with pointers, lengths: [tensors] and a grid of [chunks, tensors].
extern "C" __global__ void __launch_bounds__(MAX_BLOCK)
    sum_squares_many(In<u64> pointers, In<u64> lengths, Out<float> partials) {
    const In<float> x = reinterpret_cast<const float*>(pointers[blockIdx.y]);
    float squares = 0.0f;
    FOR_GRID(i, lengths[blockIdx.y]) {
        squares += x[i] * x[i];
    }
    squares = block_sum(squares);
    if (threadIdx.x == 0) {
        partials[u64(blockIdx.y) * gridDim.x + blockIdx.x] = squares;
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

// One step of AdamW in place: g = grad · factor[0], m += (g − m) (1 − β₁), v = v β₂ + g² (1 − β₂),
// w = w decay − rate · m / (√v / root + ε). With step size η at step t, decay = 1 − η λ, rate = η / (1 − β₁ᵗ) and
// root = √(1 − β₂ᵗ). table: [tensors, 4] holds the addresses of w, grad, m and v.
extern "C" __global__ void __launch_bounds__(MAX_BLOCK)
    adamw_many(In<u64> table, In<u64> lengths, In<float> factor, float decay, float rate, float root, float beta1,
               float beta2, float eps) {
    const u64* row = table + 4 * u64(blockIdx.y);
    const Out<float> w = reinterpret_cast<float*>(row[0]);
    const In<float> grad = reinterpret_cast<const float*>(row[1]);
    const Out<float> m = reinterpret_cast<float*>(row[2]);
    const Out<float> v = reinterpret_cast<float*>(row[3]);
    const float clip = factor[0];
    FOR_GRID(i, lengths[blockIdx.y]) {
        const float g = grad[i] * clip;
        const float mean = m[i] + (g - m[i]) * (1.0f - beta1);
        const float square = v[i] * beta2 + g * g * (1.0f - beta2);
        m[i] = mean;
        v[i] = square;
        w[i] = w[i] * decay - rate * (mean / (sqrtf(square) / root + eps));
    }
}
