// Numbers and tensors of the device kernels.

#pragma once

using u32 = unsigned int;
using u64 = unsigned long long;
using bf16 = unsigned short; // the upper half of a float's bits

// Tensors that a kernel reads, and those that it writes (or changes in place).
template <typename T> using In = const T* __restrict__;
template <typename T> using Out = T* __restrict__;

constexpr u32 MAX_BLOCK = 256; // threads

__device__ __forceinline__ float b2f(bf16 value) { return __uint_as_float(u32(value) << 16); }

// Rounds to nearest, ties to even. A NaN stays one: its mantissa could be cut to zero or carried away, so it is made
// quiet instead of rounded.
__device__ __forceinline__ bf16 f2b(float value) {
    const u32 bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return bf16(bits >> 16 | 0x40u);
    }
    return bf16((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

__device__ __forceinline__ float load(const float* x, u64 at) { return x[at]; }
__device__ __forceinline__ float load(const bf16* x, u64 at) { return b2f(x[at]); }
// 0 where there is no tensor.
template <typename T> __device__ __forceinline__ float load_if(const T* x, u64 at) { return x ? load(x, at) : 0.0f; }

__device__ __forceinline__ void store(float* y, u64 at, float value) { y[at] = value; }
__device__ __forceinline__ void store(bf16* y, u64 at, float value) { y[at] = f2b(value); }
