// The limit that other speeds are compared with: a loop of nothing but fused multiply-adds.

#include <chrono>
#include <cstdint>

#include "simd.h"

// Runs `rounds` rounds of FMAs on one thread. Writes the seconds and the number of floating-point operations, of which
// an FMA counts two, to `result`. Enough independent accumulators hide the latency of the unit: 4 to 5 cycles, two units.
extern "C" void fcvit_fma_peak(int64_t rounds, double* result) {
    constexpr int ACCUMULATORS = 12;
    Vector<float> sums[ACCUMULATORS];
    for (int i = 0; i < ACCUMULATORS; i++) sums[i] = Vector<float>{} + (2.0f + i);  // equal ones would be computed once
    const Vector<float> factor = Vector<float>{} + 0.999f, term = Vector<float>{} + 0.001f;
    const auto began = std::chrono::steady_clock::now();
    for (int64_t round = 0; round < rounds; round++) {
#pragma GCC unroll 12
        for (int i = 0; i < ACCUMULATORS; i++) sums[i] = sums[i] * factor + term;
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - began;
    result[0] = seconds.count();
    result[1] = 2.0 * ACCUMULATORS * LANES<float> * double(rounds);
    for (const Vector<float>& sum : sums) result[1] += sum[0] < 0;  // never, but the compiler must compute all sums
}
