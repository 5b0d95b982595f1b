// Matrix products for inference, with weights that are packed once.
//
// A map of G images is stored as [C / L][G x H x W][L], with L = LANES<float> channels in a vector. The channels of a
// position are then scalars to broadcast, and its outputs are vectors. Channels are padded with zeros to full vectors.
#pragma once

#include <algorithm>

#include "simd.h"

using Floats = Vector<float>;
constexpr int64_t L = LANES<float>;

// Positions of a tile. Its accumulators and two vectors of weights fill the registers.
#if defined(__AVX512F__)
constexpr int TILE_POSITIONS = 14;
#else
constexpr int TILE_POSITIONS = 6;
#endif
constexpr int64_t PIECE = 256;  // inputs summed before they are added to the output, for accuracy and for the cache

enum Activation : int64_t { LINEAR, GELU, RELU };

inline Floats smaller(Floats a, Floats b) {  // the compiler does not turn `a < b ? a : b` into one instruction
#if defined(__AVX512F__)
    return (Floats)__builtin_ia32_minps512_mask(a, b, a, (unsigned short)-1, 4);
#elif defined(__AVX__)
    return (Floats)__builtin_ia32_minps256(a, b);
#else
    return a < b ? a : b;
#endif
}

// max(0, x), and NaN if x is NaN.
inline Floats relu(Floats x) {
#if defined(__AVX512F__)
    return (Floats)__builtin_ia32_maxps512_mask(Floats{}, x, x, (unsigned short)-1, 4);
#elif defined(__AVX__)
    return (Floats)__builtin_ia32_maxps256(Floats{}, x);
#else
    return x < 0.0f ? Floats{} : x;
#endif
}

// gelu(x) = max(0, x) - z Phi(-z) with z = |x|. The last term is a bump, which a polynomial in u = 2 z / 5.5 - 1
// approximates to 1.2e-7 (minimax fit). For larger z, its value is below 1.1e-7. The error of the result is at most
// 4e-7. Apply it to stored rows: the compiler would serialize calls on registers, and each is a long chain.
inline Floats gelu(Floats x) {
    typedef int32_t Bits __attribute__((vector_size(REGISTER_BYTES)));
    const Floats z = smaller((Floats)((Bits)x & 0x7fffffff), Floats{} + 5.5f);
    const Floats u = z * (2 / 5.5f) - 1.0f, square = u * u;
    Floats even = square * -1.517692384e-02f + 9.689633617e-02f;
    Floats odd = square * -8.052401930e-04f - 3.640844218e-02f;
    even = even * square - 2.537061094e-01f;
    odd = odd * square + 2.308412621e-01f;
    even = even * square + 2.695967513e-01f;
    odd = odd * square - 5.440991828e-01f;
    even = even * square + 1.525604623e-01f;
    odd = odd * square + 4.592229255e-01f;
    even = even * square - 6.286077893e-01f;
    odd = odd * square + 2.605161214e-01f;
    even = even * square + 1.789810463e-01f;
    odd = odd * square - 3.086897621e-01f;
    even = even * square + 1.912618982e-01f;
    odd = odd * square - 6.057774963e-02f;
    even = even * square + 8.194380510e-03f;
    return relu(x) - (odd * u + even);
}

// A product of positions with a panel of weights, which has 2 L outputs for every input, and their biases (or null).
// Input k of position p is at data[offsets[k / depth] + p * STEP + k % depth]. Output vector v of position p is at
// out[v * block + p * L].
struct Product {
    const int64_t* offsets;
    int64_t blocks, depth;
    const float *weights, *bias;
    float* out;
    int64_t block;
    int vectors;      // 1 or 2
    bool accumulate;  // add to `out` instead of overwriting it
    Activation activation = LINEAR;
    const float *scale = nullptr, *residual = nullptr;  // out = residual + scale activation(sums), with strides of out
};

// Sums up inputs in registers for one tile, and adds them to what is there already.
template <int POSITIONS, int VECTORS, int STEP>
inline void product_tile(const Product& t, const float* data, int64_t begin, int64_t end, float* out) {
    Floats sum[POSITIONS][VECTORS] = {};
    const float* weights = t.weights + begin * t.depth * 2 * L;
    for (int64_t block = begin; block < end; block++) {
        const float* from = data + t.offsets[block];
#pragma GCC unroll 4
        for (int64_t k = 0; k < t.depth; k++, from++, weights += 2 * L) {
            Floats w[VECTORS];
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++) w[v] = load(weights + v * L);
#pragma GCC unroll 16
            for (int p = 0; p < POSITIONS; p++) {
#pragma GCC unroll 2
                for (int v = 0; v < VECTORS; v++) sum[p][v] += from[p * STEP] * w[v];
            }
        }
    }
    const bool last = end == t.blocks, keep = begin || t.accumulate;
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++) {
        const Floats bias = begin || !t.bias ? Floats{} : load(t.bias + v * L);
        float* to = out + v * t.block;
#pragma GCC unroll 16
        for (int p = 0; p < POSITIONS; p++) {
            Floats y = sum[p][v] + bias;
            if (keep) y += load(to + p * L);
            store(to + p * L, last && t.activation == RELU ? relu(y) : y);
        }
    }
    if (!last || (t.activation != GELU && !t.residual)) return;
    for (int v = 0; v < VECTORS; v++) {
        float* row = out + v * t.block;
        const float* other = t.residual ? t.residual + (row - t.out) : nullptr;
        for (int64_t at = 0; at < POSITIONS * L; at += L) {
            Floats y = load(row + at);
            if (t.activation == GELU) y = gelu(y);
            if (other) y = load(other + at) + y * load(t.scale + v * L);
            store(row + at, y);
        }
    }
}

// Calls product_tile for a number of positions that is known only when the program runs.
template <int POSITIONS, int STEP>
void product_tiles(const Product& t, const float* data, int64_t begin, int64_t end, float* out, int64_t positions) {
    if (positions == POSITIONS) {
        if (t.vectors == 2) {
            product_tile<POSITIONS, 2, STEP>(t, data, begin, end, out);
        } else {
            product_tile<POSITIONS, 1, STEP>(t, data, begin, end, out);
        }
    } else if constexpr (POSITIONS > 1) {
        product_tiles<POSITIONS - 1, STEP>(t, data, begin, end, out, positions);
    }
}

// Computes the product for `positions` positions, in tiles of almost equal size.
template <int STEP>
void multiply(const Product& t, const float* data, int64_t positions) {
    const int64_t tiles = (positions + TILE_POSITIONS - 1) / TILE_POSITIONS, step = std::max<int64_t>(1, PIECE / t.depth);
    for (int64_t begin = 0; begin < t.blocks; begin += step) {
        for (int64_t tile = 0; tile < tiles; tile++) {
            const int64_t first = positions * tile / tiles, next = positions * (tile + 1) / tiles;
            product_tiles<TILE_POSITIONS, STEP>(t, data + first * STEP, begin, std::min(t.blocks, begin + step),
                                                t.out + first * L, next - first);
        }
    }
}
