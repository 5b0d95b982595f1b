// Loops of single kernels of the native engine, for `native_kernels.py`. Each writes its seconds and number of vectors.

#include <chrono>

#include "layers.h"

using Clock = std::chrono::steady_clock;

static void write(double* result, Clock::time_point began, double vectors) {
    result[0] = std::chrono::duration<double>(Clock::now() - began).count();
    result[1] = vectors;
}

// Depthwise convolutions with kernel 11 of a map that stays in the cache. Its vectors are those of the multiply-adds.
extern "C" void depthwise(int64_t rounds, double* result) {
    constexpr int64_t KERNEL = 11, WIDTH = 28, ROW = WIDTH + KERNEL - 1;
    static float input[KERNEL * ROW * L], taps[KERNEL * KERNEL * L], out[WIDTH * L];
    const float* rows[KERNEL];
    for (int64_t i = 0; i < KERNEL; i++) rows[i] = input + i * ROW * L;
    const auto began = Clock::now();
    for (int64_t round = 0; round < rounds; round++) {
        depthwise_row(rows, 0, KERNEL, WIDTH, KERNEL, taps, Floats{}, out);
        asm volatile("" ::"r"(out) : "memory");
    }
    write(result, began, double(rounds) * KERNEL * KERNEL * WIDTH);
}

// Rows of the channel mixer: a depthwise convolution with kernel 3, then GELU.
extern "C" void mixer_row(int64_t rounds, double* result) {
    constexpr int64_t KERNEL = 3, WIDTH = 56, ROW = WIDTH + KERNEL - 1;
    static float input[KERNEL * ROW * L], taps[KERNEL * KERNEL * L], bias[L], out[WIDTH * L];
    for (int64_t i = 0; i < KERNEL * ROW * L; i++) input[i] = float(i % 17) / 4 - 2;
    for (float& tap : taps) tap = 0.3f;
    const float* rows[KERNEL];
    for (int64_t i = 0; i < KERNEL; i++) rows[i] = input + i * ROW * L;
    Op op = {};
    op.kernel = KERNEL;
    op.weights[2] = taps;
    op.weights[3] = bias;
    Team team;
    const Worker worker = {team, 0, nullptr, nullptr, false, nullptr};
    const Mixer mixer = {op, worker};
    const auto began = Clock::now();
    for (int64_t round = 0; round < rounds; round++) {
        mixer.mix(0, rows, 0, KERNEL, WIDTH, out);
        asm volatile("" ::"r"(out) : "memory");
    }
    write(result, began, double(rounds) * WIDTH);
}

// The smaller of |x| and a limit for vectors in registers, as in GELU.
extern "C" void minimum(int64_t rounds, double* result) {
    typedef int32_t Bits __attribute__((vector_size(REGISTER_BYTES)));
    constexpr int VECTORS = 12;
    Floats values[VECTORS] = {};
    const auto began = Clock::now();
    for (int64_t round = 0; round < rounds; round++) {
#pragma GCC unroll 12
        for (int i = 0; i < VECTORS; i++) {
            values[i] = smaller((Floats)((Bits)values[i] & 0x7fffffff), Floats{} + 5.5f);
#if defined(__x86_64__)
            asm volatile("" : "+v"(values[i]));
#else
            asm volatile("" : "+w"(values[i]));
#endif
        }
    }
    write(result, began, double(rounds) * VECTORS);
}
