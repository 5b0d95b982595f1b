// Matrix products for inference, with weights that are packed once.
//
// A map of G images is stored as [C / L][G x H x W][L], with L = LANES<float> channels in a vector. The channels of a
// position are then scalars to broadcast, and its outputs are vectors. Channels are padded with zeros to full vectors.
#pragma once

#include <algorithm>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "simd.h"

using Floats = Vector<float>;
constexpr int64_t L = LANES<float>;

// Positions of a tile. Its accumulators and two vectors of weights fill the registers.
#if defined(__AVX512F__)
constexpr int TILE_POSITIONS = 14;
#else
constexpr int TILE_POSITIONS = 6;
#endif

enum Nonlinearity : int64_t { LINEAR, GELU, RELU };

// min(a, b), for which the compiler does not use one instruction, and max(0, x), which is NaN if x is NaN.
#if defined(__AVX512F__)
inline Floats smaller(Floats a, Floats b) { return (Floats)_mm512_min_ps((__m512)a, (__m512)b); }
inline Floats relu(Floats x) { return (Floats)_mm512_max_ps(__m512{}, (__m512)x); }
#elif defined(__AVX__)
inline Floats smaller(Floats a, Floats b) { return (Floats)_mm256_min_ps((__m256)a, (__m256)b); }
inline Floats relu(Floats x) { return (Floats)_mm256_max_ps(__m256{}, (__m256)x); }
#else
inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
inline Floats relu(Floats x) { return x < 0.0f ? Floats{} : x; }
#endif

// gelu(x) = max(0, x) - bump(|x|) with bump(z) = z Phi(-z), which is below 1.1e-7 for z > 5.5. The bump is approximated by
// polynomials (minimax fits). The error of the result is at most 4e-7. Apply it to stored rows: the compiler would
// serialize calls on registers, and each is a long chain.
#if defined(__AVX512F__)
// 16 polynomials of degree 4, around the multiples of 1 / 2.816. One register has a coefficient of all of them.
inline Floats bump(Floats z) {
    static const float TABLE[5][16] = {
        {-1.82182225e-09f, 1.28275111e-01f, 1.69587508e-01f, 1.52741611e-01f, 1.10446513e-01f, 6.73225820e-02f,
         3.52987610e-02f, 1.60783883e-02f, 6.39645895e-03f, 2.22950545e-03f, 6.82157115e-04f, 1.83443961e-04f,
         4.33932219e-05f, 9.03407999e-06f, 1.65600261e-06f, 2.67347701e-07f},
        {1.77534059e-01f, 8.10538605e-02f, 6.62328722e-03f, -3.46436873e-02f, -4.57670279e-02f, -3.85469757e-02f,
         -2.53161807e-02f, -1.37428772e-02f, -6.32138224e-03f, -2.49557593e-03f, -8.51908699e-04f, -2.52652681e-04f,
         -6.53031675e-05f, -1.47430228e-05f, -2.91193351e-06f, -5.03783724e-07f},
        {-5.02983928e-02f, -4.42458689e-02f, -2.92311534e-02f, -1.23402951e-02f, 1.57062095e-04f, 5.99055039e-03f,
         6.60023605e-03f, 4.78630699e-03f, 2.70100171e-03f, 1.25160848e-03f, 4.88041900e-04f, 1.62287921e-04f,
         4.63973374e-05f, 1.14659360e-05f, 2.45844944e-06f, 4.58596588e-07f},
        {1.22341853e-05f, 3.81163182e-03f, 5.70106413e-03f, 5.12721529e-03f, 3.05747217e-03f, 9.41332488e-04f,
         -3.38518876e-04f, -7.26058264e-04f, -6.07087801e-04f, -3.59194353e-04f, -1.67880979e-04f, -6.46320041e-05f,
         -2.09292466e-05f, -5.77031869e-06f, -1.36511142e-06f, -2.78596673e-07f},
        {1.03604828e-03f, 7.71918043e-04f, 1.50117339e-04f, -3.92107322e-04f, -5.78731531e-04f, -4.42656368e-04f,
         -1.97001413e-04f, -1.47198625e-05f, 5.79662883e-05f, 5.86262031e-05f, 3.61805178e-05f, 1.68526349e-05f,
         6.32241154e-06f, 1.96770702e-06f, 5.16420073e-07f, 1.15459414e-07f},
    };
    const Floats rounder = Floats{} + 0x1.8p23f, shifted = z * 2.8163636f + rounder;  // rounded, in the lowest bits
    const Floats t = z * 2.8163636f - (shifted - rounder);
    Floats y = (Floats)_mm512_permutexvar_ps((__m512i)shifted, (__m512)load(TABLE[4]));
#pragma GCC unroll 4
    for (int k = 3; k >= 0; k--) y = y * t + (Floats)_mm512_permutexvar_ps((__m512i)shifted, (__m512)load(TABLE[k]));
    return y;
}
#else
// One polynomial of degree 16 in u = 2 z / 5.5 - 1, as its even and its odd part.
inline Floats bump(Floats z) {
    static const float TABLE[17] = {
        8.194380510e-03f,  -6.057774963e-02f, 1.912618982e-01f,  -3.086897621e-01f, 1.789810463e-01f,  2.605161214e-01f,
        -6.286077893e-01f, 4.592229255e-01f,  1.525604623e-01f,  -5.440991828e-01f, 2.695967513e-01f,  2.308412621e-01f,
        -2.537061094e-01f, -3.640844218e-02f, 9.689633617e-02f,  -8.052401930e-04f, -1.517692384e-02f,
    };
    const Floats u = z * (2 / 5.5f) - 1.0f, square = u * u;
    Floats even = square * TABLE[16] + TABLE[14], odd = square * TABLE[15] + TABLE[13];
#pragma GCC unroll 6
    for (int k = 12; k > 0; k -= 2) {
        even = even * square + TABLE[k];
        odd = odd * square + TABLE[k - 1];
    }
    return odd * u + (even * square + TABLE[0]);
}
#endif

inline Floats gelu(Floats x) {
    typedef int32_t Bits __attribute__((vector_size(REGISTER_BYTES)));
    return relu(x) - bump(smaller((Floats)((Bits)x & 0x7fffffff), Floats{} + 5.5f));
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
    Nonlinearity activation = LINEAR;
    int64_t piece = 256;  // inputs that are added up before they are added to the output, for accuracy and the cache
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
    const int64_t tiles = (positions + TILE_POSITIONS - 1) / TILE_POSITIONS, step = std::max<int64_t>(1, t.piece / t.depth);
    for (int64_t begin = 0; begin < t.blocks; begin += step) {
        for (int64_t tile = 0; tile < tiles; tile++) {
            const int64_t first = positions * tile / tiles, next = positions * (tile + 1) / tiles;
            product_tiles<TILE_POSITIONS, STEP>(t, data + first * STEP, begin, std::min(t.blocks, begin + step),
                                                t.out + first * L, next - first);
        }
    }
}
