// Vectors as wide as the registers of this machine, and the exact GELU for them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#if defined(__AVX512F__)
constexpr int REGISTER_BYTES = 64;
#elif defined(__AVX__)
constexpr int REGISTER_BYTES = 32;
#else
constexpr int REGISTER_BYTES = 16;
#endif

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
    typedef float type __attribute__((vector_size(REGISTER_BYTES)));
};
template <>
struct VectorOf<double> {
    typedef double type __attribute__((vector_size(REGISTER_BYTES)));
};
template <class T>
using Vector = typename VectorOf<T>::type;

// Number of elements in a register.
template <class T>
constexpr int64_t LANES = REGISTER_BYTES / sizeof(T);

template <class T>
inline Vector<T> load(const T* from) {
    Vector<T> v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <class T>
inline void store(T* to, Vector<T> v) {
    std::memcpy(to, &v, sizeof v);
}

// Loads the first `count` lanes and sets the others to 0.
template <class T>
inline Vector<T> load_some(const T* from, int64_t count) {
    if (count >= LANES<T>) return load(from);
    Vector<T> v = {};
    std::memcpy(&v, from, count * sizeof(T));
    return v;
}

template <class T>
inline void store_some(T* to, Vector<T> v, int64_t count) {
    if (count >= LANES<T>) return store(to, v);
    std::memcpy(to, &v, count * sizeof(T));
}

// The normal distribution function Phi and its density phi: gelu(x) = x Phi(x), gelu'(x) = Phi(x) + x phi(x).
template <class T>
struct Normal {
    Vector<T> distribution, density;
};

// With z = |x|, Phi(-z) = exp(-z^2/2) R(z). R(z) (z + 3.5) is so smooth that a polynomial in t = (z - 3.5) / (z + 3.5),
// fitted at Chebyshev points against erfc, approximates it to 6e-9. This form has no cancellation in the lower tail,
// where 1 + erf(x / sqrt 2) loses all digits.
inline Normal<float> normal(Vector<float> x) {
    typedef int32_t Bits __attribute__((vector_size(REGISTER_BYTES)));
    const Vector<float> zero = {};
    const Vector<float> size = (Vector<float>)((Bits)x & 0x7fffffff);
    const Vector<float> z = size > 13.0f ? zero + 13.0f : size;  // infinity would give NaN
    const Vector<float> u = 1.0f / (z + 3.5f);
    const Vector<float> t = (z - 3.5f) * u;
    Vector<float> r = zero + 1.190133640e-04f;
    for (const float coefficient : {4.364448615e-04f, -4.948383859e-04f, -3.185141468e-03f, 6.491014296e-03f,
                                    1.740856627e-02f, -1.160526058e-01f, 3.154248807e-01f, -5.655617622e-01f,
                                    7.444160763e-01f}) {
        r = r * t + coefficient;
    }

    // exp(-z^2/2) = 2^n exp(rest). The square of the upper half of z is exact, so the tail keeps its relative accuracy.
    const Vector<float> upper = (Vector<float>)((Bits)z & (int32_t)0xfffff000);
    const Vector<float> high = -0.5f * upper * upper;
    const Vector<float> low = -0.5f * (z - upper) * (z + upper);
    const Vector<float> rounder = zero + 0x1.8p23f;  // adding it rounds to an integer, in the lowest bits
    const Vector<float> shifted = high * 0x1.715476p0f + rounder;
    const Vector<float> n = shifted - rounder;
    const Vector<float> rest = (high - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f + low;
    Vector<float> e = zero + 1.0f / 5040;
    for (const float factorial : {720, 120, 24, 6, 2, 1, 1}) e = e * rest + 1 / factorial;
    e = (Vector<float>)((Bits)e + (((Bits)shifted - (Bits)rounder) << 23));
    e = size > 13.0f ? zero : e;  // the result is below the smallest normal number

    const Vector<float> tail = e * u * r;
    return {x > 0.0f ? 1.0f - tail : tail, e * 0.3989422804f};
}

// Doubles serve the float64 equivalence check, where speed does not matter, so they use the C library.
inline Normal<double> normal(Vector<double> x) {
    Normal<double> result;
    for (int i = 0; i < LANES<double>; i++) {
        result.distribution[i] = 0.5 * std::erfc(-x[i] * M_SQRT1_2);
        result.density[i] = std::exp(-0.5 * x[i] * x[i]) * (0.5 * M_SQRT1_2 * M_2_SQRTPI);
    }
    return result;
}

// y = gelu(z), and gelu'(z) replaces z.
template <class T>
inline void gelu_row(T* z, T* y, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES<T>) {
        const Vector<T> v = load_some(z + i, count - i);
        const Normal<T> n = normal(v);
        store_some(y + i, v * n.distribution, count - i);
        store_some(z + i, n.distribution + v * n.density, count - i);
    }
}
