// The operations of the necks and heads of dense tasks.
#pragma once

#include "layers.h"
#include "winograd.h"

// Features of RoIs (B, C, H, W), which are the input of the network, -> y.
inline void features(const Op& o, const Worker& w) {
    constexpr int64_t TOGETHER = 4;  // vectors, so that what is read and written is next to each other
    const int64_t P = o.height * o.width, C = o.channels, G = w.team.images, vectors = vectors_of(C);
    w.share((vectors + TOGETHER - 1) / TOGETHER, [&](int64_t task) {
        for (int64_t i = 0; i < TOGETHER * G; i++) {
            const int64_t g = i / TOGETHER, v = task * TOGETHER + i % TOGETHER, count = std::min(L, C - v * L);
            if (v >= vectors) continue;
            const float* from = (const float*)w.input + ((w.team.first + g) * C + v * L) * P;
            float* to = w.map(o.y) + (v * G + g) * P * L;
            if (P == 1) store(to, load_some(from, count));
            for (int64_t p = 0; P > 1 && p < P; p++) {
                for (int64_t lane = 0; lane < L; lane++) to[p * L + lane] = lane < count ? from[lane * P + p] : 0.0f;
            }
        }
    });
}

// A convolution with kernel 3, followed by the activation: x -> y. weights: packed by Winograd::pack, with the bias.
inline Winograd winograd(const Op& o, int64_t images, int64_t threads) {
    return {images, o.height, o.width, vectors_of(o.channels) * L, vectors_of(o.outputs) * L, threads};
}

inline void convolution(const Op& o, const Worker& w) {
    const Winograd problem = winograd(o, w.team.images, w.team.size);
    const int64_t P = o.height * o.width * L;
    const Strides strides = {w.team.images * P, P, o.width * L, L};
    w.share(problem.tasks, [&](int64_t task) {
        problem.run(task, w.map(o.x), strides, o.weights[0], o.activation == RELU, w.map(o.y), strides, w.scratch);
    });
}

// Where an output of a resized axis is in the input: at a[low] + weight (a[high] - a[low]).
struct Place {
    int64_t low, high;
    float weight;
};

inline Place linear_place(int64_t i, int64_t before, int64_t after) {
    const double at = std::max((i + 0.5) * before / after - 0.5, 0.0);  // centers of pixels
    const int64_t low = std::min(int64_t(at), before - 1);
    return {low, std::min(low + 1, before - 1), float(at - low)};
}

constexpr int64_t PLACE = sizeof(Place) / sizeof(float);  // in floats

// x -> y of size (high, wide), plus z if there is one. kernel 2: bilinear. kernel 1: the nearest position above and to
// the left, or every position that is a multiple of `stride` if that is not 0.
inline void resize(const Op& o, const Worker& w) {
    const int64_t row = o.width * L;
    const auto place = [&o](int64_t i, int64_t before, int64_t after) {
        const int64_t at = o.stride ? i * o.stride : i * before / after;
        return o.kernel == 2 ? linear_place(i, before, after) : Place{at, at, 0.0f};
    };
    Place* columns = (Place*)w.scratch;
    for (int64_t i = 0; i < o.wide; i++) columns[i] = place(i, o.width, o.wide);
    w.share(vectors_of(o.channels) * w.team.images * o.high, [&](int64_t task) {
        const Place p = place(task % o.high, o.height, o.high);
        const float* map = w.map(o.x) + task / o.high * o.height * row;
        const float *top = map + p.low * row, *bottom = map + p.high * row;
        const float* more = o.z >= 0 ? w.map(o.z) + task * o.wide * L : nullptr;
        float* to = w.map(o.y) + task * o.wide * L;
        for (int64_t i = 0; i < o.wide; i++) {
            const int64_t low = columns[i].low * L, high = columns[i].high * L;
            const float right = columns[i].weight, left = 1 - right;
            Floats y = load(top + low);
            if (o.kernel == 2) {
                y = y * left + load(top + high) * right;
                y = y * (1 - p.weight) + (load(bottom + low) * left + load(bottom + high) * right) * p.weight;
            }
            store(to + i * L, more ? y + load(more + i * L) : y);
        }
    });
}

// x -> output number `inner` (B, C, high, wide), resized bilinearly.
inline void enlarge(const Op& o, const Worker& w) {
    const int64_t C = o.channels, G = w.team.images, wide = o.wide, row = o.width * L;
    Place* columns = (Place*)w.scratch;
    float* rows = w.scratch + padded(wide * PLACE);  // two rows of the input, resized; row r is number r % 2
    for (int64_t i = 0; i < wide; i++) columns[i] = linear_place(i, o.width, wide);
    const int64_t parts = (2 * w.team.size - 1) / (C * G) + 1;
    w.share(C * G * parts, [&](int64_t task) {
        const int64_t c = task / parts % C, g = task / parts / C, part = task % parts;
        const float* from = w.map(o.x) + (c / L * G + g) * o.height * row + c % L;
        float* to = w.outputs[o.inner] + ((w.team.first + g) * C + c) * o.high * wide;
        int64_t known[2] = {-1, -1};
        for (int64_t h = o.high * part / parts; h < o.high * (part + 1) / parts; h++) {
            const Place p = linear_place(h, o.height, o.high);
            for (int64_t r : {p.low, p.high}) {
                if (known[r % 2] == r) continue;
                known[r % 2] = r;
                for (int64_t i = 0; i < wide; i++) {
                    const float right = columns[i].weight;
                    const float* at = from + r * row;
                    rows[r % 2 * wide + i] = at[columns[i].low * L] * (1 - right) + at[columns[i].high * L] * right;
                }
            }
            const float *top = rows + p.low % 2 * wide, *bottom = rows + p.high % 2 * wide, weight = p.weight;
            for (int64_t i = 0; i < wide; i++) to[h * wide + i] = top[i] * (1 - weight) + bottom[i] * weight;
        }
    });
}
