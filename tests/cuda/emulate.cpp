// Runs the kernels of kernels.cu on the host and holds each against a plain double-precision reference.
//
//     g++ -std=c++20 -O1 -pthread emulate.cpp -o emulate && ./emulate
//
// A block is as many threads as on the device; blocks run one after another, so that shared memory can be static.
// Built with -fsanitize=thread this also finds a missing barrier, with -fsanitize=address an access out of bounds.

#include <algorithm>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <limits>
#include <map>
#include <numbers>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

// --- The device, as far as the kernels use it ---

struct Dim {
    unsigned x = 1, y = 1;
};

static thread_local Dim threadIdx, blockIdx;
static Dim blockDim, gridDim;
static std::barrier<>* block_barrier;

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __shared__ static
#define __syncthreads() block_barrier->arrive_and_wait()

static float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
static unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }

#include "../../core/src/tensor/cuda/kernels.cu"

using namespace f32_kernels;
using namespace bf16_kernels;

// The size of the blocks launched.
static unsigned block_size;

template <typename... Parameters, typename... Arguments>
void launch(Dim grid, void (*kernel)(Parameters...), Arguments... arguments) {
    std::barrier barrier(block_size);
    block_barrier = &barrier;
    blockDim = {block_size};
    gridDim = grid;
    std::vector<std::jthread> threads;
    for (unsigned thread = 0; thread < block_size; thread++) {
        threads.emplace_back([=, &barrier] {
            threadIdx = {thread};
            for (unsigned y = 0; y < grid.y; y++) {
                for (unsigned x = 0; x < grid.x; x++) {
                    blockIdx = {x, y};
                    kernel(arguments...);
                    barrier.arrive_and_wait();
                }
            }
        });
    }
}

// --- Test data ---

// Every array ends in a margin of NaNs: one that is read spoils the result, one that is written is noticed.
constexpr size_t MARGIN = 300;
static std::mt19937_64 generator(1);

static double real(float value) { return value; }
static double real(bf16 value) { return b2f(value); }

template <typename T> T rounded(double value) {
    if constexpr (std::is_same_v<T, float>) {
        return float(value);
    } else {
        return f2b(float(value));
    }
}

template <typename T> std::vector<T> output(size_t n) {
    return std::vector<T>(n + MARGIN, rounded<T>(std::numeric_limits<double>::quiet_NaN()));
}

// Independent normal values.
template <typename T> std::vector<T> normal(size_t n, double deviation = 1.0, double mean = 0.0) {
    std::normal_distribution<double> distribution(mean, deviation);
    std::vector<T> values = output<T>(n);
    for (size_t i = 0; i < n; i++) {
        values[i] = rounded<T>(distribution(generator));
    }
    return values;
}

// `Σ f(i)` for i in 0..n.
static double sum(size_t n, const std::function<double(size_t)>& f) {
    double total = 0.0;
    for (size_t i = 0; i < n; i++) {
        total += f(i);
    }
    return total;
}

// --- Results ---

struct Result {
    double error = 0.0;
    double tolerance = 0.0;
};

static std::map<std::string, Result> results;

// Notes what must hold exactly.
static void require(const std::string& kernel, bool holds) {
    Result& result = results[kernel];
    result.error = holds ? result.error : std::numeric_limits<double>::infinity();
}

// The largest error of `got`, relative to the size of the value expected plus the root mean square of all of them (an
// element that cancels to nearly 0 has no relative precision of its own).
template <typename T>
void check(const std::string& kernel, const std::vector<T>& got, size_t n, const std::function<double(size_t)>& want) {
    const double scale = std::sqrt(sum(n, [&](size_t i) { return want(i) * want(i); }) / n);
    // A bf16 kernel may have f32 outputs too, which are held to the tolerance of f32.
    const double tolerance = std::is_same_v<T, bf16> ? 1e-2 : 1e-5;
    Result& result = results[kernel];
    result.tolerance = std::max(result.tolerance, tolerance);
    for (size_t i = 0; i < n; i++) {
        const double error = std::abs(real(got[i]) - want(i)) / (std::abs(want(i)) + scale + 1e-30);
        if (!(error <= tolerance)) {
            std::printf("%s: element %zu is %g, not %g\n", kernel.c_str(), i, real(got[i]), want(i));
            return require(kernel, false);
        }
        result.error = std::max(result.error, error);
    }
    const bool intact = std::all_of(got.begin() + n, got.end(), [](T value) { return std::isnan(real(value)); });
    require(kernel, intact);
}

template <typename T> std::string named(const char* kernel) {
    return std::string(kernel) + (std::is_same_v<T, float> ? "_f32" : "_bf16");
}

template <typename T, typename F32, typename Bf16> auto of_type(F32 f32, Bf16 bf16) {
    if constexpr (std::is_same_v<T, float>) {
        return f32;
    } else {
        return bf16;
    }
}

#define RUN(T, GRID, NAME, ...) launch(GRID, of_type<T>(NAME##_f32, NAME##_bf16), __VA_ARGS__)

// --- The tests ---

static double silu(double z) { return z / (1.0 + std::exp(-z)); }

// The slope of f at z, by central differences of higher order.
static double slope(double (*f)(double), double z) {
    const double h = 1e-3;
    return (8.0 * (f(z + h) - f(z - h)) - (f(z + 2.0 * h) - f(z - 2.0 * h))) / (12.0 * h);
}

static void conversions() {
    for (u32 bits = 0; bits < 0x10000; bits++) {
        const float value = b2f(bf16(bits));
        const bool same = std::isnan(value) ? std::isnan(b2f(f2b(value))) : f2b(value) == bits;
        require("b2f, f2b", same);
    }
    const auto expect = [](u32 bits, u32 want) { require("b2f, f2b", f2b(__uint_as_float(bits)) == want); };
    expect(0x3f808000, 0x3f80); // ties go to the even neighbour
    expect(0x3f818000, 0x3f82);
    expect(0x3f808001, 0x3f81);
    expect(0x3f807fff, 0x3f80);
    expect(0x7f7fffff, 0x7f80); // the largest float rounds to infinity
    expect(0x00008000, 0x0000); // subnormal
    expect(0x80018000, 0x8002);
    expect(0x7f800001, 0x7fc0); // NaNs whose mantissa would be lost
    expect(0xffffffff, 0xffff);
}

template <typename T> void rms_norm(u32 rows, u32 width) {
    const float eps = 1e-5f;
    const size_t n = size_t(rows) * width;
    const auto x = normal<T>(n), w = normal<T>(width), g = normal<T>(n);
    auto y = output<T>(n), dx = output<T>(n);
    auto r = output<float>(rows), dw = output<float>(width);
    RUN(T, Dim{rows}, rms_norm_fwd, x.data(), w.data(), y.data(), width, eps);
    RUN(T, Dim{rows}, rms_norm_bwd, x.data(), w.data(), g.data(), dx.data(), r.data(), width, eps);
    RUN(T, Dim{2}, rms_norm_dw, x.data(), g.data(), r.data(), dw.data(), rows, width);

    std::vector<double> inverse(rows), slopes(rows);
    for (u32 row = 0; row < rows; row++) {
        const auto at = [&](size_t i) { return row * size_t(width) + i; };
        const double squares = sum(width, [&](size_t i) { return real(x[at(i)]) * real(x[at(i)]); });
        inverse[row] = 1.0 / std::sqrt(squares / width + eps);
        slopes[row] = sum(width, [&](size_t i) { return real(g[at(i)]) * real(w[i]) * real(x[at(i)]); }) / width;
    }
    check(named<T>("rms_norm_fwd"), y, n, [&](size_t i) { return real(w[i % width]) * real(x[i]) * inverse[i / width]; });
    check(named<T>("rms_norm_bwd"), dx, n, [&](size_t i) {
        const double r = inverse[i / width];
        return r * real(g[i]) * real(w[i % width]) - real(x[i]) * r * r * r * slopes[i / width];
    });
    check(named<T>("rms_norm_bwd"), r, rows, [&](size_t row) { return inverse[row]; });
    check(named<T>("rms_norm_dw"), dw, width, [&](size_t c) {
        return sum(rows, [&](size_t row) { return real(g[row * width + c]) * real(x[row * width + c]) * inverse[row]; });
    });
}

template <typename T> void layer_norm(u32 rows, u32 width) {
    const float eps = 1e-5f;
    const size_t n = size_t(rows) * width;
    const auto x = normal<T>(n, 1.0, 0.5), w = normal<T>(width), b = normal<T>(width), g = normal<T>(n);
    auto y = output<T>(n), dx = output<T>(n);
    auto stats = output<float>(2 * rows), dw = output<float>(width), db = output<float>(width);
    RUN(T, Dim{rows}, layer_norm_fwd, x.data(), w.data(), b.data(), y.data(), width, eps);
    RUN(T, Dim{rows}, layer_norm_bwd, x.data(), w.data(), g.data(), dx.data(), stats.data(), width, eps);
    RUN(T, Dim{2}, layer_norm_dwdb, x.data(), g.data(), stats.data(), dw.data(), db.data(), rows, width);

    std::vector<double> expected(2 * rows), shifts(rows), slopes(rows);
    const auto normed = [&](size_t i) { return (real(x[i]) - expected[i / width * 2]) * expected[i / width * 2 + 1]; };
    for (u32 row = 0; row < rows; row++) {
        const auto at = [&](size_t i) { return row * size_t(width) + i; };
        const double mean = sum(width, [&](size_t i) { return real(x[at(i)]); }) / width;
        const double variance = sum(width, [&](size_t i) { return std::pow(real(x[at(i)]) - mean, 2); }) / width;
        expected[2 * row] = mean;
        expected[2 * row + 1] = 1.0 / std::sqrt(variance + eps);
        shifts[row] = sum(width, [&](size_t i) { return real(g[at(i)]) * real(w[i]); }) / width;
        slopes[row] = sum(width, [&](size_t i) { return real(g[at(i)]) * real(w[i]) * normed(at(i)); }) / width;
    }
    check(named<T>("layer_norm_fwd"), y, n, [&](size_t i) { return real(w[i % width]) * normed(i) + real(b[i % width]); });
    check(named<T>("layer_norm_bwd"), dx, n, [&](size_t i) {
        const size_t row = i / width;
        return expected[2 * row + 1] * (real(g[i]) * real(w[i % width]) - shifts[row] - normed(i) * slopes[row]);
    });
    check(named<T>("layer_norm_bwd"), stats, 2 * rows, [&](size_t i) { return expected[i]; });
    check(named<T>("layer_norm_dwdb"), dw, width, [&](size_t c) {
        return sum(rows, [&](size_t row) { return real(g[row * width + c]) * normed(row * width + c); });
    });
    check(named<T>("layer_norm_dwdb"), db, width, [&](size_t c) {
        return sum(rows, [&](size_t row) { return real(g[row * width + c]); });
    });
}

template <typename T> void rotation() {
    const u32 tokens = 7, heads = 3, half = 13;
    const size_t n = tokens * heads * 2 * half;
    const auto x = normal<T>(n);
    auto cosines = output<float>(tokens * half), sines = output<float>(tokens * half);
    for (size_t i = 0; i < tokens * half; i++) {
        const double angle = (i / half + 1.0) * std::pow(100.0, -double(i % half) / half);
        cosines[i] = float(std::cos(angle));
        sines[i] = float(std::sin(angle));
    }
    for (const float direction : {1.0f, -1.0f}) {
        auto y = output<T>(n);
        RUN(T, Dim{3}, rope, x.data(), y.data(), cosines.data(), sines.data(), tokens, heads, half, direction);
        check(named<T>("rope"), y, n, [&](size_t i) {
            const size_t angle = i / (heads * 2 * half) * half + i % half;
            const bool first = i % (2 * half) < half;
            const double other = first ? -real(x[i + half]) : real(x[i - half]);
            return real(x[i]) * cosines[angle] + direction * other * sines[angle];
        });
    }
}

template <typename T> void activations() {
    const size_t n = 1237;
    const auto gate = normal<T>(n, 3.0), up = normal<T>(n), g = normal<T>(n);
    auto y = output<T>(n), dgate = output<T>(n), dup = output<T>(n);
    RUN(T, Dim{3}, swiglu_fwd, gate.data(), up.data(), y.data(), n);
    RUN(T, Dim{3}, swiglu_bwd, gate.data(), up.data(), g.data(), dgate.data(), dup.data(), n);
    check(named<T>("swiglu_fwd"), y, n, [&](size_t i) { return silu(real(gate[i])) * real(up[i]); });
    check(named<T>("swiglu_bwd"), dgate, n, [&](size_t i) { return real(g[i]) * real(up[i]) * slope(silu, real(gate[i])); });
    check(named<T>("swiglu_bwd"), dup, n, [&](size_t i) { return real(g[i]) * silu(real(gate[i])); });

    using Function = double (*)(double);
    const Function functions[] = {
        [](double z) { return std::max(z, 0.0); },
        [](double z) {
            return 0.5 * z * (1.0 + std::tanh(std::sqrt(2.0 / std::numbers::pi) * (z + 0.044715 * z * z * z)));
        },
        [](double z) { return 0.5 * z * std::erfc(-z / std::numbers::sqrt2); },
        silu,
    };
    for (u32 kind = 0; kind < 4; kind++) {
        const Function f = functions[kind];
        auto x = gate;
        for (size_t i = 0; i < n; i++) { // no difference may reach across relu's kink
            x[i] = std::abs(real(x[i])) < 0.01 ? rounded<T>(0.5) : x[i];
        }
        auto fx = output<T>(n), dx = output<T>(n);
        RUN(T, Dim{3}, activation_fwd, x.data(), fx.data(), n, kind);
        RUN(T, Dim{3}, activation_bwd, x.data(), g.data(), dx.data(), n, kind);
        check(named<T>("activation_fwd"), fx, n, [&](size_t i) { return f(real(x[i])); });
        check(named<T>("activation_bwd"), dx, n, [&](size_t i) { return real(g[i]) * slope(f, real(x[i])); });
    }
}

template <typename T> void entropy(double deviation) {
    const u32 rows = 6, vocabulary = 1031;
    const float scale = 0.25f;
    const size_t n = rows * vocabulary;
    const std::vector<u32> targets = {0, 1030, 512, 7, 31, 64};
    auto logits = normal<T>(n, deviation);
    logits[3] = rounded<T>(-std::numeric_limits<double>::infinity()); // a token that is ruled out
    std::vector<double> sums(rows);
    for (size_t row = 0; row < rows; row++) {
        double max = -1e300;
        for (size_t i = 0; i < vocabulary; i++) {
            max = std::max(max, real(logits[row * vocabulary + i]));
        }
        const auto term = [&](size_t i) { return std::exp(real(logits[row * vocabulary + i]) - max); };
        sums[row] = max + std::log(sum(vocabulary, term));
    }
    for (const u32 gradient : {0u, 1u}) {
        auto z = logits;
        auto loss = output<float>(rows);
        RUN(T, Dim{rows}, cross_entropy, z.data(), targets.data(), loss.data(), vocabulary, scale, gradient);
        check(named<T>("cross_entropy"), loss, rows, [&](size_t row) {
            return sums[row] - real(logits[row * vocabulary + targets[row]]);
        });
        if (gradient == 0) {
            require(named<T>("cross_entropy"), std::equal(z.begin(), z.begin() + n, logits.begin()));
            continue;
        }
        check(named<T>("cross_entropy"), z, n, [&](size_t i) {
            const size_t row = i / vocabulary;
            return (std::exp(real(logits[i]) - sums[row]) - (i % vocabulary == targets[row])) * scale;
        });
    }
}

template <typename T> void sums_and_copies() {
    const u32 rows = 37, width = 53;
    const size_t n = rows * width;
    const auto x = normal<T>(n), y = normal<T>(n), b = normal<T>(width);

    auto added = y;
    RUN(T, Dim{3}, add_assign, added.data(), x.data(), n);
    check(named<T>("add_assign"), added, n, [&](size_t i) { return real(y[i]) + real(x[i]); });

    auto biased = y;
    RUN(T, Dim{3}, add_bias, biased.data(), b.data(), rows, width);
    check(named<T>("add_bias"), biased, n, [&](size_t i) { return real(y[i]) + real(b[i % width]); });

    auto summed = output<float>(width);
    RUN(T, Dim{1}, sum_rows, x.data(), summed.data(), rows, width);
    check(named<T>("sum_rows"), summed, width, [&](size_t c) {
        return sum(rows, [&](size_t row) { return real(x[row * width + c]); });
    });

    // Scattered over twice as many rows; those that are not hit keep their value.
    std::vector<u32> index(2 * rows);
    std::iota(index.begin(), index.end(), 0);
    std::shuffle(index.begin(), index.end(), generator);
    const auto before = normal<T>(2 * n);
    auto scattered = before, expected = before;
    for (size_t i = 0; i < n; i++) {
        expected[index[i / width] * width + i % width] = x[i];
    }
    RUN(T, Dim{3}, scatter_rows, scattered.data(), x.data(), index.data(), rows, width);
    check(named<T>("scatter_rows"), scattered, 2 * n, [&](size_t i) { return real(expected[i]); });
}

template <typename T> void cache() {
    const u32 batch = 3, queries = 4, rows = 5, capacity = 9, width = 71;
    // The last two queries of the last row are dropped.
    const std::vector<u32> cache_rows = {4, 0, 2}, starts = {0, 5, 7};
    const auto before = normal<T>(rows * capacity * width), fresh = normal<T>(batch * queries * width);
    auto written = before, expected = before;
    for (size_t b = 0; b < batch; b++) {
        for (size_t q = 0; q < queries && starts[b] + q < capacity; q++) {
            for (size_t i = 0; i < width; i++) {
                expected[(cache_rows[b] * capacity + starts[b] + q) * width + i] = fresh[(b * queries + q) * width + i];
            }
        }
    }
    RUN(T, Dim{batch * queries}, cache_write, written.data(), fresh.data(), cache_rows.data(), starts.data(), queries,
        capacity, width);
    check(named<T>("cache_write"), written, rows * capacity * width, [&](size_t i) { return real(expected[i]); });
}

static void optimiser() {
    const std::vector<u64> lengths = {1, 777, 64, 2049};
    const u32 tensors = u32(lengths.size()), chunks = 3;
    std::vector<std::vector<float>> w, grad, m, v;
    std::vector<u64> pointers, table;
    const auto address = [](const std::vector<float>& values) { return u64(reinterpret_cast<uintptr_t>(values.data())); };
    for (const u64 n : lengths) {
        w.push_back(normal<float>(n));
        grad.push_back(normal<float>(n));
        m.push_back(normal<float>(n, 0.1));
        v.push_back(normal<float>(n, 0.1));
        for (u64 i = 0; i < n; i++) {
            v.back()[i] = std::abs(v.back()[i]);
        }
        pointers.push_back(address(grad.back()));
        table.insert(table.end(), {address(w.back()), address(grad.back()), address(m.back()), address(v.back())});
    }

    auto partials = output<float>(tensors * chunks);
    launch({chunks, tensors}, sum_squares_many, pointers.data(), lengths.data(), partials.data());
    check("sum_squares_many", partials, tensors * chunks, [&](size_t at) {
        return sum(lengths[at / chunks], [&](size_t i) {
            const double x = grad[at / chunks][i];
            return i / block_size % chunks == at % chunks ? x * x : 0.0;
        });
    });

    double squares = 0.0;
    for (u32 tensor = 0; tensor < tensors; tensor++) {
        squares += sum(lengths[tensor], [&](size_t i) { return std::pow(double(grad[tensor][i]), 2); });
    }
    const double norm = std::sqrt(squares);
    auto clip = output<float>(2);
    for (const float max_norm : {0.0f, 1000.0f, 1.0f}) {
        launch({1}, norm_finish, partials.data(), tensors * chunks, max_norm, clip.data());
        const double factor = std::min(1.0, max_norm / norm);
        // Each by itself: the norm is far larger than the factor.
        check("norm_finish", std::vector<float>{clip[0]}, 1, [&](size_t) { return norm; });
        check("norm_finish", std::vector<float>{clip[1]}, 1, [&](size_t) { return factor; });
    }

    // What is not a number stays so: a clipped gradient must not look sound.
    const float nan = std::numeric_limits<float>::quiet_NaN();
    auto broken = output<float>(2);
    launch({1}, norm_finish, &nan, u64(1), 1.0f, broken.data());
    require("norm_finish", std::isnan(broken[0]) && std::isnan(broken[1]));
    for (const float x : {nan, 0.5f, 3.0f}) {
        float y = -1.0f;
        launch({1}, at_most, &x, &y, 1.0f);
        require("at_most", std::isnan(x) ? std::isnan(y) : y == std::min(x, 1.0f));
    }

    const float decay = 0.999f, rate = 0.01f, root = 0.3f, beta1 = 0.9f, beta2 = 0.95f, eps = 1e-8f;
    const auto w0 = w, m0 = m, v0 = v;
    launch({chunks, tensors}, adamw_many, table.data(), lengths.data(), clip.data() + 1, decay, rate, root, beta1, beta2,
           eps);
    for (u32 t = 0; t < tensors; t++) {
        const auto g = [&](size_t i) { return double(grad[t][i]) * clip[1]; };
        const auto mean = [&](size_t i) { return m0[t][i] + (g(i) - m0[t][i]) * (1.0 - beta1); };
        const auto square = [&](size_t i) { return double(v0[t][i]) * beta2 + g(i) * g(i) * (1.0 - beta2); };
        check("adamw_many", m[t], lengths[t], mean);
        check("adamw_many", v[t], lengths[t], square);
        check("adamw_many", w[t], lengths[t], [&](size_t i) {
            return double(w0[t][i]) * decay - rate * (mean(i) / (std::sqrt(square(i)) / root + eps));
        });
    }
}

template <typename T> void all() {
    for (const u32 width : {5u, 31u, 203u}) {
        rms_norm<T>(9, width);
        layer_norm<T>(9, width + 1);
    }
    rotation<T>();
    activations<T>();
    entropy<T>(2.0);
    entropy<T>(100.0);
    sums_and_copies<T>();
    cache<T>();
}

int main() {
    conversions();
    for (const unsigned size : {32u, 64u, 1u}) {
        block_size = size;
        all<float>();
        all<bf16>();
        optimiser();
    }
    bool passed = true;
    for (const auto& [kernel, result] : results) {
        const bool within = result.error <= result.tolerance;
        passed = passed && within;
        std::printf("%-24s %.2e %s\n", kernel.c_str(), result.error, within ? "ok" : "FAILED");
    }
    std::printf("%zu lines, %s\n", results.size(), passed ? "all within tolerance" : "FAILED");
    return passed ? 0 : 1;
}
