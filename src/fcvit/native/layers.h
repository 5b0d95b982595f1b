// The operations of a network: the layers of FCViT on maps of a group of images. Each is called by all threads of a team.
#pragma once

#include <atomic>
#include <cmath>
#include <thread>

#include "depthwise.h"

constexpr float EPS = 1e-5f;  // of all norms and of the similarity's standard deviation

inline int64_t vectors_of(int64_t channels) { return (channels + L - 1) / L; }

// An operation of a network. Maps are given by their offset in the arena, in floats for one image, or -1 for none.
// `within` is the activation of inner channels, and (high, wide) is the size of the result if it is resized.
struct Op {
    int64_t kind, x, y, z, channels, outputs, height, width, kernel, stride, inner, heads, group, activation, within;
    int64_t high, wide;
    const float* weights[10];
};

// Threads that share a group of images.
struct Team {
    int64_t images = 0, first = 0, size = 1;  // images of the group, index of the first one, and number of threads
    float* arena = nullptr;
    std::atomic<int64_t> waiting{0}, round{0};

    void wait() {
        if (size == 1) return;
        const int64_t now = round.load(std::memory_order_acquire);
        if (waiting.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
            waiting.store(0, std::memory_order_relaxed);
            round.store(now + 1, std::memory_order_release);
            return;
        }
        // The others are usually nearly done. On a busy machine they may not even run, and need this core.
        for (int64_t spins = 0; round.load(std::memory_order_acquire) == now; spins++) {
            if (spins > 2000) std::this_thread::yield();
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
    }
};

// What a thread needs to run operations.
struct Worker {
    Team& team;
    int64_t index;  // within the team
    float* scratch;
    const void* input;  // all images
    bool bytes;         // uint8 or float
    float* const* outputs;

    float* map(int64_t offset) const { return team.arena + offset * team.images; }
    // Calls work(i) for this thread's share of the tasks 0 to count - 1.
    template <class Work>
    void share(int64_t count, Work work) const {
        for (int64_t i = count * index / team.size; i < count * (index + 1) / team.size; i++) work(i);
    }
};

inline int64_t padded(int64_t count) { return (count + 15) / 16 * 16; }

// Adds up term(p) over positions, in float for at most 64 positions, then in double.
template <class Term>
inline void sum_positions(int64_t positions, double* totals, Term term) {
    std::fill(totals, totals + L, 0.0);
    for (int64_t begin = 0; begin < positions; begin += 64) {
        Floats sum[4] = {};
        const int64_t end = std::min(positions, begin + 64);
        int64_t p = begin;
        for (; p + 4 <= end; p += 4) {
            for (int k = 0; k < 4; k++) sum[k] += term(p + k);
        }
        for (; p < end; p++) sum[0] += term(p);
        const Floats all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        for (int64_t lane = 0; lane < L; lane++) totals[lane] += all[lane];
    }
}

// Statistics of each image: the mean of each channel and the sum of squares of each vector of channels, around the mean
// of the image.
struct Statistics {
    int64_t vectors, channels, positions;
    float* data;
    Statistics(float* memory, int64_t C, int64_t P) : vectors(vectors_of(C)), channels(C), positions(P), data(memory) {}
    static int64_t size(int64_t C) { return padded(vectors_of(C) * L + vectors_of(C)); }
    float* means(int64_t image) const { return data + image * size(channels); }
    float* squares(int64_t image) const { return means(image) + vectors * L; }
    float mean(int64_t image) const {
        double total = 0;
        for (int64_t c = 0; c < channels; c++) total += means(image)[c];
        return float(total / channels);
    }
    float factor(int64_t image) const {  // 1 / standard deviation
        double total = 0;
        for (int64_t v = 0; v < vectors; v++) total += squares(image)[v];
        return float(1 / std::sqrt(total / (double(channels) * positions) + EPS));
    }
};

inline void collect(const Worker& w, const Statistics& s, const float* x, bool squares) {
    const int64_t all = w.team.images * s.positions * L;
    w.share(w.team.images * s.vectors, [&](int64_t task) {
        const int64_t image = task / s.vectors, v = task % s.vectors;
        const float* from = x + v * all + image * s.positions * L;
        double totals[L];
        sum_positions(s.positions, totals, [=](int64_t p) { return load(from + p * L); });
        for (int64_t lane = 0; lane < L; lane++) s.means(image)[v * L + lane] = float(totals[lane] / s.positions);
    });
    w.team.wait();
    if (!squares) return;
    int64_t known = -1;
    float mean = 0;
    w.share(w.team.images * s.vectors, [&](int64_t task) {
        const int64_t image = task / s.vectors, v = task % s.vectors;
        if (image != known) known = image, mean = s.mean(image);
        const float* from = x + v * all + image * s.positions * L;
        double totals[L], total = 0;
        sum_positions(s.positions, totals, [=](int64_t p) {
            const Floats centered = load(from + p * L) - mean;
            return centered * centered;
        });
        for (int64_t lane = 0; lane < std::min(L, s.channels - v * L); lane++) total += totals[lane];
        s.squares(image)[v] = float(total);
    });
    w.team.wait();
}

// Images (B, 3, H, W) -> y (G, H + 2R, W + 2R, 3), padded with R = kernel / 2 zeros. Bytes are normalized with
// weights[0] (3) and weights[1] (3): scale and shift.
inline void image(const Op& o, const Worker& w) {
    const int64_t H = o.height, W = o.width, R = o.kernel / 2, row = (W + 2 * R) * 3;
    w.share(w.team.images * (H + 2 * R), [&](int64_t task) {
        const int64_t g = task / (H + 2 * R), h = task % (H + 2 * R) - R;
        float* to = w.map(o.y) + task * row;
        std::fill(to, to + row, 0.0f);
        if (h < 0 || h >= H) return;
        for (int64_t c = 0; c < 3; c++) {
            const int64_t from = (((w.team.first + g) * 3 + c) * H + h) * W;
            float* pixel = to + 3 * R + c;
            const auto fill = [=](const auto* numbers, float scale, float shift) {
                for (int64_t x = 0; x < W; x++) pixel[3 * x] = numbers[x] * scale + shift;
            };
            if (w.bytes) fill((const uint8_t*)w.input + from, o.weights[0][c], o.weights[1][c]);
            if (!w.bytes) fill((const float*)w.input + from, 1.0f, 0.0f);
        }
    });
}

// Computes output rows of a strided convolution. x is padded and has `row` floats for a row and `image` for an image.
template <int STEP>
inline void convolve_rows(const Op& o, const Worker& w, Product product, const float* x, int64_t row, int64_t image) {
    const int64_t high = (o.height - 1) / o.stride + 1, wide = (o.width - 1) / o.stride + 1, G = w.team.images;
    const int64_t vectors = vectors_of(o.outputs), panels = (vectors + 1) / 2;
    const int64_t depth = product.blocks * product.depth, rows = G * high;
    const int64_t parts = std::min(rows, (4 * w.team.size + panels - 1) / panels);  // of the rows, to share them
    product.block = rows * wide * L;
    w.share(panels * parts, [&](int64_t task) {
        const int64_t panel = task / parts, part = task % parts;
        product.weights = o.weights[0] + panel * depth * 2 * L;
        product.bias = o.weights[1] + panel * 2 * L;
        product.vectors = int(std::min<int64_t>(2, vectors - 2 * panel));
        for (int64_t r = rows * part / parts; r < rows * (part + 1) / parts; r++) {
            product.out = w.map(o.y) + 2 * panel * product.block + r * wide * L;
            multiply<STEP>(product, x + r / high * image + r % high * o.stride * row, wide);
        }
    });
}

// The first convolution, from the output of `image`: kernel 7, stride 4. weights: packed, bias.
inline void stem(const Op& o, const Worker& w) {
    const int64_t row = (o.width + 6) * 3;
    int64_t offsets[7];
    for (int64_t i = 0; i < 7; i++) offsets[i] = i * row;
    Product product = {offsets, 7, 21};
    convolve_rows<12>(o, w, product, w.map(o.x), row, (o.height + 6) * row);
}

// A convolution with kernel 3 and stride 2, from x through the padded copy z (C / L, G, H + 2, W + 2, L).
inline void downsample(const Op& o, const Worker& w) {
    const int64_t H = o.height, W = o.width, G = w.team.images, row = (W + 2) * L, image = (H + 2) * row;
    const int64_t vectors = vectors_of(o.channels);
    float* copy = w.map(o.z);
    w.share(vectors * G, [&](int64_t task) {
        const float* from = w.map(o.x) + task * H * W * L;
        float* to = copy + task * image;
        std::fill(to, to + image, 0.0f);
        for (int64_t h = 0; h < H; h++) std::copy(from + h * W * L, from + (h + 1) * W * L, to + (h + 1) * row + L);
    });
    w.team.wait();
    int64_t* offsets = (int64_t*)w.scratch;
    for (int64_t k = 0; k < vectors * 9; k++) offsets[k] = k / 9 * G * image + k / 3 % 3 * row + k % 3 * L;
    Product product = {offsets, vectors * 9, L};
    convolve_rows<2 * L>(o, w, product, copy, row, image);
}

// Fills the offsets of the vectors of channels in a map of so many positions.
inline int64_t* vector_offsets(float*& scratch, int64_t vectors, int64_t positions) {
    int64_t* offsets = (int64_t*)scratch;
    for (int64_t v = 0; v < vectors; v++) offsets[v] = v * positions * L;
    scratch += padded(2 * vectors);
    return offsets;
}

// 1x1 convolutions of x: one, or two with `inner` channels and the activation `within` between them. The activation
// follows. With a residual z, y = z + scale activation(...). weights: first, bias, second, bias, scale.
constexpr int64_t STRIP = 56;  // positions that are computed together

inline void pointwise(const Op& o, const Worker& w) {
    const int64_t P = w.team.images * o.height * o.width, C = vectors_of(o.channels), N = vectors_of(o.outputs);
    const int64_t I = vectors_of(o.inner), panels = (N + 1) / 2;
    const int64_t strips = std::max((P + STRIP - 1) / STRIP, I ? std::min(w.team.size, P) : 1);
    const int64_t parts = I ? 1 : std::clamp<int64_t>(w.team.size / strips, 1, panels);  // of the outputs, to share them
    const int64_t longest = (P + strips - 1) / strips;
    float* scratch = w.scratch;
    const int64_t* offsets = vector_offsets(scratch, C, P);
    const int64_t* inner_offsets = vector_offsets(scratch, I, longest);
    w.share(strips * parts, [&](int64_t task) {
        const int64_t strip = task / parts, part = task % parts;
        const int64_t first = P * strip / strips, count = P * (strip + 1) / strips - first;
        const float* x = w.map(o.x) + first * L;
        Product t = {offsets, C, L, nullptr, nullptr, nullptr, longest * L, 2, false, Nonlinearity(o.within)};
        for (int64_t v = 0; v < I; v += 2) {
            t.weights = o.weights[0] + v * C * L * L, t.bias = o.weights[1] + v * L;
            t.out = scratch + v * longest * L, t.vectors = int(std::min<int64_t>(2, I - v));
            multiply<L>(t, x, count);
        }
        if (I) t.offsets = inner_offsets, t.blocks = I, x = scratch;
        t.block = P * L, t.activation = Nonlinearity(o.activation);
        for (int64_t v = 2 * (panels * part / parts); v < std::min(N, 2 * (panels * (part + 1) / parts)); v += 2) {
            t.weights = o.weights[I ? 2 : 0] + v * t.blocks * L * L, t.bias = o.weights[I ? 3 : 1] + v * L;
            t.out = w.map(o.y) + (v * P + first) * L, t.vectors = int(std::min<int64_t>(2, N - v));
            if (o.z >= 0) t.residual = w.map(o.z) + (v * P + first) * L, t.scale = o.weights[4] + v * L;
            multiply<L>(t, x, count);
        }
    });
}

// x -> y, normalized over channels and positions, then scaled and shifted with weights[0] and weights[1] unless null.
inline void norm(const Op& o, const Worker& w) {
    const int64_t P = o.height * o.width, vectors = vectors_of(o.channels), G = w.team.images;
    const Statistics s(w.map(o.z), o.channels, P);
    const float* x = w.map(o.x);
    collect(w, s, x, true);
    int64_t known = -1;
    float mean = 0, factor = 0;
    w.share(w.team.size * G * vectors, [&](int64_t task) {
        const int64_t part = task / (G * vectors), g = task / vectors % G, v = task % vectors, at = (v * G + g) * P * L;
        if (g != known) known = g, mean = s.mean(g), factor = s.factor(g);
        const float* from = x + at;
        float* to = w.map(o.y) + at;
        const Floats scale = o.weights[0] ? load(o.weights[0] + v * L) * factor : Floats{} + factor;
        const Floats shift = o.weights[1] ? load(o.weights[1] + v * L) : Floats{};
        for (int64_t p = P * part / w.team.size; p < P * (part + 1) / w.team.size; p++) {
            store(to + p * L, (load(from + p * L) - mean) * scale + shift);
        }
    });
}

// The mean over positions of the normalized x -> y (C / L, G, L).
inline void pool(const Op& o, const Worker& w) {
    const int64_t G = w.team.images;
    const Statistics s(w.map(o.z), o.channels, o.height * o.width);
    collect(w, s, w.map(o.x), true);
    w.share(G, [&](int64_t g) {
        const float mean = s.mean(g), factor = s.factor(g);
        for (int64_t c = 0; c < s.vectors * L; c++) {
            w.map(o.y)[(c / L * G + g) * L + c % L] = (s.means(g)[c] - mean) * factor;
        }
    });
}

// x -> output number `inner`, channels last if `kernel` is 0. Otherwise it is channels first, and x has every
// `kernel`-th row and column of it, from row `stride` / `kernel` and column `stride` % `kernel`.
inline void output(const Op& o, const Worker& w) {
    const int64_t P = o.height * o.width, C = o.channels, G = w.team.images, K = o.kernel;
    float* all = w.outputs[o.inner] + w.team.first * C * P * std::max<int64_t>(1, K * K);
    w.share(vectors_of(C) * G, [&](int64_t task) {
        const int64_t v = task / G, g = task % G, count = std::min(L, C - v * L);
        const float* from = w.map(o.x) + task * P * L;
        if (!K) {
            for (int64_t p = 0; p < P; p++) std::copy(from + p * L, from + p * L + count, all + (g * P + p) * C + v * L);
            return;
        }
        for (int64_t c = 0; c < count; c++) {
            float* plane = all + (g * C + v * L + c) * P * K * K;
            for (int64_t h = 0; h < o.height; h++) {
                float* to = plane + ((h * K + o.stride / K) * o.width) * K + o.stride % K;
                for (int64_t x = 0; x < o.width; x++) to[x * K] = from[(h * o.width + x) * L + c];
            }
        }
    });
}

// weights (rows, vectors x L) times x -> y (rows)
inline void times(const float* weights, const float* bias, const float* x, float* y, int64_t rows, int64_t vectors) {
    for (int64_t r = 0; r < rows; r++, weights += vectors * L) {
        Floats sum = {};
        for (int64_t v = 0; v < vectors; v++) sum += load(weights + v * L) * load(x + v * L);
        float total = bias[r];
        for (int64_t lane = 0; lane < L; lane++) total += sum[lane];
        y[r] = total;
    }
}

// The parts of the token mixer before its 1x1 convolutions: the norm (if there are weights), the global context (if
// there are heads) and the depthwise convolution, x -> y. z has memory for `Mixing`.
// weights: norm scale and shift; fc1, bias, fc2, bias of the bottleneck; rescale weight and bias (or null if the context
// is not weighted); depthwise taps and bias. `inner` is the width of the bottleneck, and `activation` is GELU for a
// plain bottleneck and LINEAR for competition.
struct Mixing {
    Statistics statistics;
    int64_t width, heads;  // in floats
    float *similarity, *scale, *shift, *value, *head_matrix, *head_bias;
    float *slope, *start;  // the weight of the context is slope * similarity + start
    // Every thread of a team has its own copy of the small vectors, which is faster than waiting for another thread.
    Mixing(const Op& o, float* shared, float* own, int64_t G)
        : statistics(shared, o.channels, o.height * o.width), width(statistics.vectors * L), heads(vectors_of(o.heads) * L) {
        similarity = shared + G * Statistics::size(o.channels);
        scale = own;
        shift = scale + G * width;
        value = shift + G * width;
        head_matrix = value + G * width;
        head_bias = head_matrix + G * 2 * width * heads;
        slope = head_bias + G * heads;
        start = slope + G * heads;
    }
    static int64_t size(const Op& o) {
        const int64_t heads = vectors_of(o.heads) * L;
        return vectors_of(o.channels) * L * (3 + 2 * heads) + 3 * heads;
    }
};

// Computes what the token mixer applies to every position of an image: the scale and shift of the norm, the value of the
// context, and the matrix that gives the similarity with the context for each head.
inline void similarity_weights(const Op& o, const Mixing& m, int64_t g, float* scratch) {
    const int64_t C = o.channels, I = o.inner, vectors = m.statistics.vectors;
    float *scale = m.scale + g * m.width, *shift = m.shift + g * m.width, *value = m.value + g * m.width;
    std::fill(value, value + m.width, 0.0f);
    if (o.weights[0]) {
        const float mean = m.statistics.mean(g), factor = m.statistics.factor(g);
        for (int64_t c = 0; c < m.width; c++) {
            scale[c] = o.weights[0][c] * factor;
            shift[c] = o.weights[1][c] - mean * scale[c];
        }
    } else {
        std::fill(scale, scale + m.width, 1.0f);
        std::fill(shift, shift + m.width, 0.0f);
    }
    if (!o.heads) return;
    float *context = scratch, *halves = context + m.width, *winner = halves + padded(2 * I);
    const int64_t winners = vectors_of(I);
    for (int64_t c = 0; c < m.width; c++) context[c] = scale[c] * m.statistics.means(g)[c] + shift[c];
    std::fill(winner, winner + winners * L, 0.0f);
    if (o.activation == GELU) {
        times(o.weights[2], o.weights[3], context, winner, I, vectors);
        for (int64_t v = 0; v < winners; v++) store(winner + v * L, gelu(load(winner + v * L)));
    } else {
        times(o.weights[2], o.weights[3], context, halves, 2 * I, vectors);
        for (int64_t i = 0; i < I; i++) {
            const float first = halves[i], second = halves[I + i];
            winner[i] = second > first || second != second ? second : first;  // NaN wins
        }
    }
    times(o.weights[4], o.weights[5], winner, value, C, winners);
    if (!o.weights[6]) {
        for (int64_t c = 0; c < C; c++) shift[c] += value[c];
        return;
    }
    const int64_t share = C / o.heads;
    const float root = float(1 / std::sqrt(double(share)));
    float* matrix = m.head_matrix + g * m.heads * 2 * m.width;  // (heads / L, width, 2 L), of which L are used
    std::fill(matrix, matrix + m.heads * 2 * m.width, 0.0f);
    for (int64_t h = 0; h < m.heads; h++) {
        double total = 0;
        for (int64_t c = h * share; h < o.heads && c < (h + 1) * share; c++) {
            matrix[(h / L * m.width + c) * 2 * L + h % L] = scale[c] * context[c] * root;
            total += double(shift[c]) * context[c] * root;
        }
        m.head_bias[g * m.heads + h] = float(total);
    }
}

inline void tokens(const Op& o, const Worker& w) {
    const int64_t H = o.height, W = o.width, P = H * W, G = w.team.images, K = o.kernel, R = K / 2;
    const float* x = w.map(o.x);
    const Mixing m(o, w.map(o.z), w.scratch, G);
    float* scratch = w.scratch + G * Mixing::size(o);
    const int64_t vectors = m.statistics.vectors, share = o.heads ? o.channels / o.heads : 1;
    const bool weighted = o.heads && o.weights[6];
    if (o.heads || o.weights[0]) collect(w, m.statistics, x, o.weights[0]);
    for (int64_t g = 0; g < G; g++) similarity_weights(o, m, g, scratch);
    if (weighted) {
        float* rest = scratch;
        const int64_t* offsets = vector_offsets(rest, vectors, G * P);
        const int64_t strips = (P + STRIP - 1) / STRIP;
        w.share(G * strips, [&](int64_t task) {
            const int64_t g = task / strips, first = P * (task % strips) / strips;
            const int64_t count = P * (task % strips + 1) / strips - first;
            for (int64_t v = 0; v < m.heads; v += L) {
                const float* matrix = m.head_matrix + (g * m.heads + v) * 2 * m.width;
                Product t = {offsets, vectors, L, matrix, m.head_bias + g * m.heads + v,
                             m.similarity + v * G * P + (g * P + first) * L, G * P * L, 1, false};
                multiply<L>(t, x + (g * P + first) * L, count);
            }
        });
        w.team.wait();
        for (int64_t g = 0; g < G; g++) {
            const double count = double(o.heads) * P;
            const auto sum = [&](auto term) {  // of a function of all similarities
                double totals[L], all = 0;
                for (int64_t v = 0; v < m.heads; v += L) {
                    const float* from = m.similarity + v * G * P + g * P * L;
                    sum_positions(P, totals, [=](int64_t p) { return term(load(from + p * L)); });
                    for (int64_t lane = 0; lane < std::min(L, o.heads - v); lane++) all += totals[lane];
                }
                return all;
            };
            const float middle = float(sum([](Floats s) { return s; }) / count);
            const double squares = sum([=](Floats s) { return (s - middle) * (s - middle); });
            // A single value has no deviation.
            const float inverse = float(1 / (std::sqrt(squares / std::max(count - 1, 1.0)) + EPS));
            for (int64_t h = 0; h < o.heads; h++) {
                m.slope[g * m.heads + h] = o.weights[6][h] * inverse;
                m.start[g * m.heads + h] = o.weights[7][h] - middle * m.slope[g * m.heads + h];
            }
        }
    }
    // A thread copies rows of a vector of channels, padded at both sides, while it applies norm and context. The threads
    // of a team take different rows in all operations, because reading what another core wrote is slow.
    const int64_t parts = std::min(w.team.size, (H + 7) / 8);
    const int64_t row = (W + 2 * R) * L;
    w.share(G * vectors * parts, [&](int64_t task) {
        const int64_t part = task / (G * vectors), v = task / G % vectors, g = task % G;
        const int64_t begin = H * part / parts, end = H * (part + 1) / parts;
        const int64_t above = std::max<int64_t>(0, begin - R), below = std::min(H, end + R);
        const float* from = x + (v * G + g) * P * L;
        const Floats scale = load(m.scale + g * m.width + v * L), shift = load(m.shift + g * m.width + v * L);
        float* plane = scratch;
        // The heads of these channels, and the value of each with zeros at the channels of other heads.
        const int64_t head = v * L / share, last = std::min(o.heads, (v * L + L - 1) / share + 1);
        Floats values[L];
        for (int64_t h = head; h < last; h++) {
            for (int64_t c = v * L; c < (v + 1) * L; c++) {
                values[h - head][c % L] = c / share == h ? m.value[g * m.width + c] : 0.0f;
            }
        }
        for (int64_t h = above; h < below; h++) {
            float* to = plane + (h - above) * row;
            std::fill(to, to + R * L, 0.0f);
            std::fill(to + row - R * L, to + row, 0.0f);
            to += R * L;
            for (int64_t p = h * W; p < (h + 1) * W; p++, to += L) {
                Floats y = load(from + p * L) * scale + shift;
                for (int64_t k = head; weighted && k < last; k++) {
                    const float* similarity = m.similarity + (k / L * G * P + g * P + p) * L + k % L;
                    y += (*similarity * m.slope[g * m.heads + k] + m.start[g * m.heads + k]) * values[k - head];
                }
                store(to, y);
            }
        }
        const Floats bias = load(o.weights[9] + v * L);
        const float* rows[256];
        for (int64_t h = begin; h < end; h++) {
            const int64_t top = std::max<int64_t>(0, R - h), bottom = std::min(K, H + R - h);
            for (int64_t i = top; i < bottom; i++) rows[i] = plane + (h + i - R - above) * row;
            depthwise_row(rows, top, bottom, W, K, o.weights[8] + v * K * K * L, bias,
                          w.map(o.y) + ((v * G + g) * P + h * W) * L);
        }
    });
}

// The channel mixer: x += fc2(gelu(depthwise(fc1(y)))), where y is the normalized x. `inner` is the hidden width.
// weights: fc1, bias, depthwise taps, bias, fc2, bias.
//
// Hidden channels never leave the cache, because only `group` of them are computed at a time. Small maps are computed as
// a whole, with the hidden maps in z. Large maps are computed row by row: a ring keeps the rows of fc1 that the
// depthwise convolution still needs.
constexpr int64_t WIDE = 72;  // columns of a large map that are computed together

struct Mixer {
    const Op& o;
    const Worker& w;
    int64_t H = o.height, W = o.width, K = o.kernel, R = K / 2, C = vectors_of(o.channels), I = vectors_of(o.inner);
    int64_t P = w.team.images * H * W, group = std::min(I, o.group / L);

    // fc1 for `count` positions and the hidden vectors 2 panel and 2 panel + 1.
    void expand(const int64_t* offsets, int64_t panel, int64_t position, int64_t count, float* out, int64_t block) const {
        Product t = {offsets, C, L, o.weights[0] + panel * C * L * 2 * L, o.weights[1] + panel * 2 * L, out, block,
                     int(std::min<int64_t>(2, I - 2 * panel)), false};
        multiply<L>(t, w.map(o.y) + position * L, count);
    }

    // The depthwise convolution and GELU for row h of a hidden vector. Row r of its input is row r % ring of `plane`.
    void mix(int64_t v, const float* plane, int64_t ring, int64_t h, int64_t width, float* out) const {
        const int64_t top = std::max<int64_t>(0, R - h), bottom = std::min(K, H + R - h);
        const float* rows[256];
        for (int64_t i = top; i < bottom; i++) rows[i] = plane + (h + i - R) % ring * (width + 2 * R) * L;
        depthwise_row(rows, top, bottom, width, K, o.weights[2] + v * K * K * L, load(o.weights[3] + v * L), out);
        for (int64_t at = 0; at < width * L; at += L) store(out + at, gelu(load(out + at)));
    }

    // x += fc2 of hidden vectors `first` to `first + blocks`, for output vectors 2 panel and 2 panel + 1.
    void contract(const int64_t* offsets, int64_t first, int64_t blocks, int64_t panel, const float* hidden, int64_t position,
                  int64_t count) const {
        Product t = {offsets, blocks, L, o.weights[4] + (panel * I + first) * L * 2 * L,
                     first ? nullptr : o.weights[5] + panel * 2 * L, w.map(o.x) + (2 * panel * P + position) * L, P * L,
                     int(std::min<int64_t>(2, C - 2 * panel)), true};
        multiply<L>(t, hidden, count);
    }

    void whole() const {
        float* scratch = w.scratch;
        const int64_t G = w.team.images, row = (W + 2 * R) * L, panels = (C + 1) / 2;
        const int64_t* offsets = vector_offsets(scratch, std::max(C, group), P);
        float *planes = scratch, *dense = planes + 2 * G * H * row;
        std::fill(planes, dense, 0.0f);
        float* hidden = w.map(o.z);
        for (int64_t first = 0; first < I; first += group) {
            const int64_t count = std::min(group, I - first);
            w.share((count + 1) / 2, [&](int64_t panel) {
                const int64_t v0 = first + 2 * panel, v1 = std::min(v0 + 2, first + count);
                expand(offsets, v0 / 2, 0, P, dense, P * L);
                for (int64_t h = 0; h < (v1 - v0) * G * H; h++) {
                    std::copy(dense + h * W * L, dense + (h + 1) * W * L, planes + h * row + R * L);
                }
                for (int64_t h = 0; h < (v1 - v0) * G * H; h++) {
                    mix(v0 + h / (G * H), planes + h / H * H * row, H, h % H, W, hidden + ((v0 - first) * P + h * W) * L);
                }
            });
            w.team.wait();
            w.share(panels, [&](int64_t panel) { contract(offsets, first, count, panel, hidden, 0, P); });
            w.team.wait();
        }
    }

    void by_rows() const {
        const int64_t columns = (W + WIDE - 1) / WIDE;
        const int64_t parts = std::min((w.team.size + columns - 1) / columns, (H + 7) / 8);
        w.share(w.team.images * columns * parts, [&](int64_t task) {
            const int64_t g = task / parts / columns, column = task / parts % columns, part = task % parts;
            for (int64_t first = 0; first < I; first += group) {
                part_of_image(g, W * column / columns, W * (column + 1) / columns, H * part / parts, H * (part + 1) / parts,
                              first, std::min(group, I - first));
            }
        });
    }

    // Computes the columns c0 to c1 and rows r0 to r1 of image g with `count` hidden vectors.
    void part_of_image(int64_t g, int64_t c0, int64_t c1, int64_t r0, int64_t r1, int64_t first, int64_t count) const {
        float* scratch = w.scratch;
        const int64_t width = c1 - c0, row = (width + 2 * R) * L;
        const int64_t S = std::clamp<int64_t>(STRIP / width, 1, H), ring = S + 2 * R;  // rows that are finished at once
        const int64_t low = std::max<int64_t>(0, c0 - R), high = std::min(W, c1 + R), base = g * H * W;
        const int64_t* offsets = vector_offsets(scratch, C, P);
        const int64_t* hidden_offsets = vector_offsets(scratch, count, S * width);
        float *rings = scratch, *hidden = rings + (count + 1) / 2 * 2 * ring * row;
        std::fill(rings, hidden, 0.0f);
        for (int64_t h = r0, next = std::max<int64_t>(0, r0 - R); h < r1; h += S) {
            const int64_t end = std::min(r1, h + S), need = std::min(H, end + R);
            for (int64_t v = 0; v < count; v++) {
                float* own = rings + v * ring * row;
                for (int64_t r = next; r < need && v % 2 == 0; r++) {
                    expand(offsets, (first + v) / 2, base + r * W + low, high - low,
                           own + r % ring * row + (low - c0 + R) * L, ring * row);
                }
                for (int64_t r = h; r < end; r++) mix(first + v, own, ring, r, width, hidden + (v * S + r - h) * width * L);
            }
            next = need;
            for (int64_t panel = 0; panel < (C + 1) / 2; panel++) {
                if (width == W) {
                    contract(hidden_offsets, first, count, panel, hidden, base + h * W, (end - h) * W);
                    continue;
                }
                for (int64_t r = h; r < end; r++) {
                    contract(hidden_offsets, first, count, panel, hidden + (r - h) * width * L, base + r * W + c0, width);
                }
            }
        }
    }
};

inline void mixer(const Op& o, const Worker& w) { o.z >= 0 ? Mixer{o, w}.whole() : Mixer{o, w}.by_rows(); }
