// Depthwise convolutions for inference, of one vector of channels.
#pragma once

#include "gemm.h"

// Adjacent outputs whose sums are kept in registers.
constexpr int WIDEST = 14;

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

// The same with a row of weights in registers, so that each input is loaded only once. This needs 32 registers. With
// WHOLE, the outputs are a whole row, and the zeros at its ends are left out.
template <int WIDE, int KERNEL, bool WHOLE>
inline void sliding_tile(const float* const* rows, int64_t offset, int64_t from, int64_t to, const float* taps, Floats bias,
                         float* out) {
    constexpr int FIRST = WHOLE ? KERNEL / 2 : 0, LAST = WHOLE ? KERNEL / 2 + WIDE : KERNEL - 1 + WIDE;
    Floats sum[WIDE];
#pragma GCC unroll 32
    for (int o = 0; o < WIDE; o++) sum[o] = bias;
    for (int64_t i = from; i < to; i++) {
        const float *at = rows[i] + offset, *tap = taps + i * KERNEL * L;
        Floats weight[KERNEL];
#pragma GCC unroll 16
        for (int j = 0; j < KERNEL; j++) weight[j] = load(tap + j * L);
#pragma GCC unroll 32
        for (int x = FIRST; x < LAST; x++) {
            const Floats input = load(at + x * L);
#pragma GCC unroll 16
            for (int j = 0; j < KERNEL; j++) {
                if (x - j >= 0 && x - j < WIDE) sum[x - j] += input * weight[j];
            }
        }
    }
#pragma GCC unroll 32
    for (int o = 0; o < WIDE; o++) store(out + o * L, sum[o]);
}

// Calls a tile for a number of outputs that is known only when the program runs.
template <int WIDE>
void depthwise_tiles(const float* const* rows, int64_t offset, int64_t from, int64_t to, int64_t kernel,
                     const float* taps, Floats bias, float* out, int64_t wide, bool whole) {
    if (wide == WIDE) {
#if defined(__AVX512F__)
        if (kernel == 11 && whole) return sliding_tile<WIDE, 11, true>(rows, offset, from, to, taps, bias, out);
        if (kernel == 11) return sliding_tile<WIDE, 11, false>(rows, offset, from, to, taps, bias, out);
        if (kernel == 3) return sliding_tile<WIDE, 3, false>(rows, offset, from, to, taps, bias, out);
#endif
        depthwise_tile<WIDE>(rows, offset, from, to, kernel, taps, bias, out);
    } else if constexpr (WIDE > 1) {
        depthwise_tiles<WIDE - 1>(rows, offset, from, to, kernel, taps, bias, out, wide, whole);
    }
}

// Computes a row of `width` outputs. rows[i], from <= i < to, are the input rows of the window that are inside the map,
// each with kernel / 2 zeros at both ends.
inline void depthwise_row(const float* const* rows, int64_t from, int64_t to, int64_t width, int64_t kernel,
                          const float* taps, Floats bias, float* out) {
    const int64_t tiles = (width + WIDEST - 1) / WIDEST;
    for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t w = width * tile / tiles, wide = width * (tile + 1) / tiles - w;
        depthwise_tiles<WIDEST>(rows, w * L, from, to, kernel, taps, bias, out + w * L, wide, tiles == 1);
    }
}
