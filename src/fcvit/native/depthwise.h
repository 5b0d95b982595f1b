// Depthwise convolutions of one vector of channels, for inference and training.
#pragma once

#include "gemm.h"

// Adjacent outputs whose sums are kept in registers.
constexpr int WIDEST = 14;

// Computes WIDE outputs from input rows `from` to `to` of the window. rows[i] points to the leftmost input of the first
// output in row i. `taps` is (kernel, kernel, L). With `whole`, the outputs are a whole row, and taps that see only the
// zeros at its ends are left out.
template <int WIDE, class T>
inline void depthwise_tile(const T* const* rows, int64_t offset, int64_t from, int64_t to, int64_t kernel,
                           const T* taps, Vector<T> bias, T* out, int64_t step, bool whole) {
    constexpr int64_t L = LANES<T>;
    const int64_t left = whole ? std::max<int64_t>(0, kernel / 2 + 1 - WIDE) : 0;
    const int64_t right = whole ? std::min(kernel, kernel / 2 + WIDE) : kernel;
    Vector<T> sum[WIDE];
#pragma GCC unroll 32
    for (int o = 0; o < WIDE; o++) sum[o] = bias;
    for (int64_t i = from; i < to; i++) {
        const T *at = rows[i] + offset + left * L, *tap = taps + (i * kernel + left) * L;
        for (int64_t j = left; j < right; j++, at += L, tap += L) {
            // Without this, the compiler keeps all inputs of the next tap in registers, and has none left for the sums.
            asm volatile("" : "+r"(at));
            const Vector<T> weight = load(tap);
#pragma GCC unroll 32
            for (int o = 0; o < WIDE; o++) sum[o] += load(at + o * L) * weight;
        }
    }
#pragma GCC unroll 32
    for (int o = 0; o < WIDE; o++) store(out + o * step, sum[o]);
}

// The same with a row of weights in registers, so that each input is loaded only once. This needs 32 registers. With
// WHOLE, the outputs are a whole row, and the zeros at its ends are left out.
template <int WIDE, int KERNEL, bool WHOLE, class T>
inline void sliding_tile(const T* const* rows, int64_t offset, int64_t from, int64_t to, const T* taps, Vector<T> bias,
                         T* out, int64_t step) {
    constexpr int64_t L = LANES<T>;
    constexpr int FIRST = WHOLE ? KERNEL / 2 : 0, LAST = WHOLE ? KERNEL / 2 + WIDE : KERNEL - 1 + WIDE;
    Vector<T> sum[WIDE];
#pragma GCC unroll 32
    for (int o = 0; o < WIDE; o++) sum[o] = bias;
    for (int64_t i = from; i < to; i++) {
        const T *at = rows[i] + offset, *tap = taps + i * KERNEL * L;
        Vector<T> weight[KERNEL];
#pragma GCC unroll 16
        for (int j = 0; j < KERNEL; j++) weight[j] = load(tap + j * L);
#pragma GCC unroll 32
        for (int x = FIRST; x < LAST; x++) {
            const Vector<T> input = load(at + x * L);
#pragma GCC unroll 16
            for (int j = 0; j < KERNEL; j++) {
                if (x - j >= 0 && x - j < WIDE) sum[x - j] += input * weight[j];
            }
        }
    }
#pragma GCC unroll 32
    for (int o = 0; o < WIDE; o++) store(out + o * step, sum[o]);
}

// Calls a tile for a number of outputs that is known only when the program runs.
template <int WIDE, class T>
void depthwise_tiles(const T* const* rows, int64_t offset, int64_t from, int64_t to, int64_t kernel, const T* taps,
                     Vector<T> bias, T* out, int64_t step, int64_t wide, bool whole) {
    if (WIDE > 5 && wide <= 4) {  // finding the tile of a short row would take as long as computing it
        depthwise_tiles<4>(rows, offset, from, to, kernel, taps, bias, out, step, wide, whole);
    } else if (wide == WIDE) {
#if defined(__AVX512F__)
        if (kernel == 11 && whole) return sliding_tile<WIDE, 11, true>(rows, offset, from, to, taps, bias, out, step);
        if (kernel == 11) return sliding_tile<WIDE, 11, false>(rows, offset, from, to, taps, bias, out, step);
        if (kernel == 3) return sliding_tile<WIDE, 3, false>(rows, offset, from, to, taps, bias, out, step);
#endif
        depthwise_tile<WIDE>(rows, offset, from, to, kernel, taps, bias, out, step, whole);
    } else if constexpr (WIDE > 1) {
        depthwise_tiles<WIDE - 1>(rows, offset, from, to, kernel, taps, bias, out, step, wide, whole);
    }
}

// Computes a row of `width` outputs. rows[i], from <= i < to, are the input rows of the window that are inside the map,
// each with kernel / 2 zeros at both ends. Outputs are `step` elements apart.
template <class T>
inline void depthwise_row(const T* const* rows, int64_t from, int64_t to, int64_t width, int64_t kernel, const T* taps,
                          Vector<T> bias, T* out, int64_t step = LANES<T>) {
    constexpr int64_t L = LANES<T>, WIDE = sizeof(T) == sizeof(float) ? WIDEST : 2;  // doubles need not be fast
    const int64_t tiles = (width + WIDE - 1) / WIDE;
    for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t w = width * tile / tiles, wide = width * (tile + 1) / tiles - w;
        depthwise_tiles<WIDE>(rows, w * L, from, to, kernel, taps, bias, out + w * step, step, wide, tiles == 1);
    }
}
