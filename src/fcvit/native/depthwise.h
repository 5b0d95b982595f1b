// Depthwise convolutions for inference, of one vector of channels.
#pragma once

#include "gemm.h"

// Adjacent outputs whose sums are kept in registers, beside a vector of weights.
#if defined(__AVX512F__)
constexpr int WIDEST = 28;
#else
constexpr int WIDEST = 14;
#endif

// Computes WIDE outputs from input rows `from` to `to` of the window. rows[i] points to the leftmost input of the first
// output in row i. `taps` is (kernel, kernel, L).
template <int WIDE>
inline void depthwise_tile(const float* const* rows, int64_t offset, int64_t from, int64_t to, int64_t kernel,
                           const float* taps, Floats bias, float* out) {
    Floats sum[WIDE];
#pragma GCC unroll 32
    for (int o = 0; o < WIDE; o++) sum[o] = bias;
    for (int64_t i = from; i < to; i++) {
        const float *at = rows[i] + offset, *tap = taps + i * kernel * L;
        for (int64_t j = 0; j < kernel; j++, at += L, tap += L) {
            // Without this, the compiler keeps all inputs of the next tap in registers, and has none left for the sums.
            asm volatile("" : "+r"(at));
            const Floats weight = load(tap);
#pragma GCC unroll 32
            for (int o = 0; o < WIDE; o++) sum[o] += load(at + o * L) * weight;
        }
    }
#pragma GCC unroll 32
    for (int o = 0; o < WIDE; o++) store(out + o * L, sum[o]);
}

template <int WIDE>
void depthwise_tiles(const float* const* rows, int64_t offset, int64_t from, int64_t to, int64_t kernel,
                     const float* taps, Floats bias, float* out, int64_t wide) {
    if (wide == WIDE) {
        depthwise_tile<WIDE>(rows, offset, from, to, kernel, taps, bias, out);
    } else if constexpr (WIDE > 1) {
        depthwise_tiles<WIDE == 28 ? 14 : WIDE - 1>(rows, offset, from, to, kernel, taps, bias, out, wide);
    }
}

// Computes a row of `width` outputs. rows[i], from <= i < to, are the input rows of the window that are inside the map,
// each with kernel / 2 zeros at both ends.
inline void depthwise_row(const float* const* rows, int64_t from, int64_t to, int64_t width, int64_t kernel,
                          const float* taps, Floats bias, float* out) {
    for (int64_t w = 0; w < width;) {
        const int64_t rest = width - w;
        const int64_t wide = rest >= WIDEST ? WIDEST : rest > 14 ? rest / 2 : rest;
        depthwise_tiles<WIDEST>(rows, w * L, from, to, kernel, taps, bias, out + w * L, wide);
        w += wide;
    }
}
