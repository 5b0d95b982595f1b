// Convolutions with 3x3 kernels, padding 1 and stride 1, by Winograd's method F(4x4, 3x3): a tile of 4x4 outputs needs
// 36 products for each pair of channels instead of 144. Lavin and Gray, "Fast Algorithms for Convolutional Neural
// Networks", CVPR 2016. The interpolation points are 0, P, -P, Q, -Q and infinity. With P = 5/8 and Q = 3/2, the powers
// are exact, and the rms error is half the error with the usual 1 and 2.
//
// A strip of tiles is transformed to 36 frequencies, [frequency][block of L channels][tile][L]. Each frequency is a
// matrix product with the transformed weights. The output is transformed back. NaN and infinity come through, and may
// spread over the tile of 4x4 outputs.
#pragma once

#include "gemm.h"

// Block `b` of L channels of pixel (y, x) of image `g` is at b block + g image + y row + x pixel. In channels last, pixel
// is the number of channels and block is L. In [C / L][image][H][W][L], pixel is L.
struct Strides {
    int64_t block, image, row, pixel;
};

struct Winograd {
    typedef Floats V;
    static constexpr int64_t PANEL = 2 * L;
    static constexpr int64_t SCRATCH = 600000;  // floats: a strip should not leave the caches
    static constexpr int64_t PIECE = 32;  // channels that are added up before they are added to others, for accuracy
    static constexpr int64_t GAP = 16;          // keeps the frequencies out of the same set of the L1 cache

    int64_t H, W, C, N, blocks, panels, high, wide, tiles, tiles_each, strips, panels_each, groups, tasks;

    // `threads` only determines the number of tasks. C and N are the numbers of channels in memory. In the blocked
    // layout they are multiples of L.
    Winograd(int64_t images, int64_t H, int64_t W, int64_t C, int64_t N, int64_t threads)
        : H(H), W(W), C(C), N(N), blocks((C + L - 1) / L), panels((N + PANEL - 1) / PANEL),
          high((H + 3) / 4), wide((W + 3) / 4), tiles(images * high * wide) {
        const int64_t most = SCRATCH / (36 * (blocks * L + panels * PANEL)) / TILE_POSITIONS * TILE_POSITIONS;
        tiles_each = std::clamp<int64_t>(most, 2 * TILE_POSITIONS, 12 * TILE_POSITIONS);
        strips = (tiles + tiles_each - 1) / tiles_each;
        if (strips) tiles_each = (tiles + strips - 1) / strips;  // strips of equal length
        // Threads share a strip if there are few, and each of them transforms the input.
        const int64_t wanted = threads > 1 && strips ? std::max<int64_t>(2 * threads / strips, 1) : 1;
        panels_each = (panels + wanted - 1) / wanted;
        groups = (panels + panels_each - 1) / panels_each;
        tasks = strips * groups;
    }

    // Numbers of floats of the packed weights, and of the memory that a thread needs.
    static int64_t packed_size(int64_t C, int64_t N) {
        return (N + PANEL - 1) / PANEL * PANEL * (36 * ((C + L - 1) / L * L) + 1);
    }
    int64_t input_step() const { return tiles_each * blocks * L + GAP; }
    int64_t output_step() const { return tiles_each * panels_each * PANEL + GAP; }
    int64_t scratch_size() const { return 36 * (input_step() + output_step()) + 2 * blocks; }

    // Packs the weights of panel `panel` of the outputs, as [frequency][panel][C][PANEL], and the bias (null: 0) behind
    // them. Weight (output, input, tap) is at output * output_step + input * input_step + tap. `flip` rotates the kernels
    // by 180 degrees, which, with exchanged channels, gives the gradient of the input.
    static void pack(const float* weight, int64_t output_step, int64_t input_step, bool flip, const float* bias, int64_t C,
                     int64_t N, int64_t panel, float* packed) {
        const int64_t depth = (C + L - 1) / L * L, panels = (N + PANEL - 1) / PANEL, step = panels * PANEL * depth;
        const int64_t first = panel * PANEL, count = std::min(PANEL, N - first);
        for (int64_t c = 0; c < depth; c++) {
            float taps[9][PANEL] = {};
            for (int64_t n = 0; c < C && n < count; n++) {
                const float* from = weight + (first + n) * output_step + c * input_step;
                for (int tap = 0; tap < 9; tap++) taps[tap][n] = from[flip ? 8 - tap : tap];
            }
            for (int64_t half = 0; half < PANEL; half += L) {
                V g[9], middle[18], u[36];
                for (int tap = 0; tap < 9; tap++) g[tap] = load(taps[tap] + half);
                for (int j = 0; j < 3; j++) weight_transform(g + j, 3, middle + j, 3);
                for (int i = 0; i < 6; i++) weight_transform(middle + 3 * i, 1, u + 6 * i, 1);
                for (int f = 0; f < 36; f++) store(packed + f * step + (panel * depth + c) * PANEL + half, u[f]);
            }
        }
        for (int64_t n = 0; n < PANEL; n++) packed[36 * step + first + n] = bias && n < count ? bias[first + n] : 0;
    }

    // Computes one of the tasks, in any order and by any thread. Results do not depend on the division into tasks.
    void run(int64_t task, const float* x, Strides from, const float* packed, bool positive, float* y, Strides to,
             float* scratch) const {
        const int64_t first = task / groups * tiles_each, count = std::min(tiles_each, tiles - first);
        const int64_t panel0 = task % groups * panels_each, panel1 = std::min(panels, panel0 + panels_each);
        const int64_t depth = blocks * L;
        float *inputs = scratch, *outputs = scratch + 36 * input_step();
        for (int64_t t = 0; t < count; t++) input_tile(first + t, x, from, inputs + t * L);
        int64_t* offsets = (int64_t*)(outputs + 36 * output_step());
        for (int64_t b = 0; b < blocks; b++) offsets[b] = b * tiles_each * L;
        for (int64_t f = 0; f < 36; f++) {
            for (int64_t panel = panel0; panel < panel1; panel++) {
                const float* u = packed + (f * panels + panel) * depth * PANEL;
                float* m = outputs + f * output_step() + (panel - panel0) * tiles_each * PANEL;
                Product t = {offsets, blocks, L, u, nullptr, m, tiles_each * L, 2, false};
                t.piece = PIECE;
                multiply<L>(t, inputs + f * input_step(), count);
            }
        }
        const float* bias = packed + 36 * panels * PANEL * depth;
        for (int64_t t = 0; t < count; t++) {
            for (int64_t b = panel0 * 2; b * L < std::min(N, panel1 * PANEL); b++) {
                const float* m = outputs + (b - panel0 * 2) * tiles_each * L + t * L;
                output_tile(first + t, b, m, load(bias + b * L), positive, y, to);
            }
        }
    }

    static constexpr float P = 0.625f, Q = 1.5f, PP = P * P, QQ = Q * Q;
    static constexpr float ORIGIN = float(1 / (double(PP) * QQ));  // factors that belong to the points 0, P and Q
    static constexpr float NEAR = float(0.5 / (double(PP) * (PP - QQ))), FAR = float(0.5 / (double(QQ) * (QQ - PP)));

    static inline void weight_transform(const V* g, int step, V* u, int to) {
        const V near = NEAR * g[0] + NEAR * PP * g[2 * step], far = FAR * g[0] + FAR * QQ * g[2 * step];
        const V near_odd = NEAR * P * g[step], far_odd = FAR * Q * g[step];
        u[0] = ORIGIN * g[0];
        u[to] = near + near_odd;
        u[2 * to] = near - near_odd;
        u[3 * to] = far + far_odd;
        u[4 * to] = far - far_odd;
        u[5 * to] = g[2 * step];
    }

    static inline void input_transform(const V* d, V* v, int step) {
        const V near = d[4] - QQ * d[2], near_odd = d[3] - QQ * d[1], far = d[4] - PP * d[2], far_odd = d[3] - PP * d[1];
        v[0] = PP * QQ * d[0] - (PP + QQ) * d[2] + d[4];
        v[step] = near + P * near_odd;
        v[2 * step] = near - P * near_odd;
        v[3 * step] = far + Q * far_odd;
        v[4 * step] = far - Q * far_odd;
        v[5 * step] = PP * QQ * d[1] - (PP + QQ) * d[3] + d[5];
    }

    static inline void output_transform(const V* m, V* y, int step) {
        const V near = m[1] + m[2], far = m[3] + m[4], near_odd = m[1] - m[2], far_odd = m[3] - m[4];
        y[0] = m[0] + near + far;
        y[step] = P * near_odd + Q * far_odd;
        y[2 * step] = PP * near + QQ * far;
        y[3 * step] = P * PP * near_odd + Q * QQ * far_odd + m[5];
    }

    // Transforms all channels of a tile, with zeros outside the image.
    void input_tile(int64_t tile, const float* x, Strides s, float* to) const {
        const int64_t top = tile / wide % high * 4 - 1, left = tile % wide * 4 - 1;
        const int64_t i0 = top < 0, i1 = std::min<int64_t>(6, H - top), j0 = left < 0, j1 = std::min<int64_t>(6, W - left);
        const bool inside = i0 == 0 && i1 == 6 && j0 == 0 && j1 == 6;
        const float* corner = x + tile / wide / high * s.image + top * s.row + left * s.pixel;
        for (int64_t b = 0; b < blocks; b++, corner += s.block, to += tiles_each * L) {
            V middle[36];
            const int64_t some = C - b * L;
            if (inside && some >= L) {
                for (int i = 0; i < 6; i++) {
                    V d[6];
#pragma GCC unroll 6
                    for (int j = 0; j < 6; j++) d[j] = load(corner + i * s.row + j * s.pixel);
                    input_transform(d, middle + i, 6);
                }
            } else {
                for (int i = 0; i < 6; i++) {
                    V d[6] = {};
                    for (int64_t j = j0; j < j1 && i >= i0 && i < i1; j++) d[j] = load_some(corner + i * s.row + j * s.pixel, some);
                    input_transform(d, middle + i, 6);
                }
            }
            for (int j = 0; j < 6; j++) {
                V v[6];
                input_transform(middle + 6 * j, v, 1);
#pragma GCC unroll 6
                for (int i = 0; i < 6; i++) store(to + (6 * i + j) * input_step(), v[i]);
            }
        }
    }

    void output_tile(int64_t tile, int64_t block, const float* m, V bias, bool positive, float* y, Strides s) const {
        const int64_t top = tile / wide % high * 4, left = tile % wide * 4, step = output_step(), some = N - block * L;
        float* corner = y + block * s.block + tile / wide / high * s.image + top * s.row + left * s.pixel;
        V middle[24];
        for (int i = 0; i < 6; i++) {
            V row[6];
#pragma GCC unroll 6
            for (int j = 0; j < 6; j++) row[j] = load(m + (6 * i + j) * step);
            output_transform(row, middle + i, 6);
        }
        for (int j = 0; j < std::min<int64_t>(4, W - left); j++) {
            V out[4];
            output_transform(middle + 6 * j, out, 1);
            for (int i = 0; i < std::min<int64_t>(4, H - top); i++) {
                out[i] += bias;
                if (positive) out[i] = relu(out[i]);
                store_some(corner + i * s.row + j * s.pixel, out[i], some);
            }
        }
    }

    // For the gradient of the weights: transforms the gradient of all outputs of a tile by the adjoint of the output
    // transform, to `to` with `step` between the frequencies.
    void gradient_tile(int64_t tile, const float* dy, Strides s, float* to, int64_t step) const {
        const int64_t top = tile / wide % high * 4, left = tile % wide * 4;
        const float* corner = dy + tile / wide / high * s.image + top * s.row + left * s.pixel;
        for (int64_t b = 0; b < 2 * panels; b++, corner += s.block, to += tiles_each * L) {
            V middle[24];
            const int64_t some = N - b * L;
            for (int i = 0; i < 4; i++) {
                V d[4] = {};
                if (some >= L && i < H - top && W - left >= 4) {
#pragma GCC unroll 4
                    for (int j = 0; j < 4; j++) d[j] = load(corner + i * s.row + j * s.pixel);
                } else if (some > 0 && i < H - top) {
                    for (int j = 0; j < std::min<int64_t>(4, W - left); j++) {
                        d[j] = load_some(corner + i * s.row + j * s.pixel, some);
                    }
                }
                gradient_transform(d, middle + i, 4);
            }
            for (int j = 0; j < 6; j++) {
                V m[6];
                gradient_transform(middle + 4 * j, m, 1);
#pragma GCC unroll 6
                for (int i = 0; i < 6; i++) store(to + (6 * i + j) * step, m[i]);
            }
        }
    }

    // The adjoint of the weight transform: the gradient of L kernels from those of their 36 frequencies.
    static void kernel_gradient(const float* from, int64_t step, V* kernel) {
        V middle[18];
        for (int j = 0; j < 6; j++) {
            V u[6];
            for (int i = 0; i < 6; i++) u[i] = load(from + (6 * i + j) * step);
            kernel_transform(u, middle + j, 6);
        }
        for (int i = 0; i < 3; i++) kernel_transform(middle + 6 * i, kernel + 3 * i, 1);
    }

    static inline void gradient_transform(const V* d, V* m, int step) {
        const V near = d[0] + PP * d[2], near_odd = P * d[1] + P * PP * d[3];
        const V far = d[0] + QQ * d[2], far_odd = Q * d[1] + Q * QQ * d[3];
        m[0] = d[0];
        m[step] = near + near_odd;
        m[2 * step] = near - near_odd;
        m[3 * step] = far + far_odd;
        m[4 * step] = far - far_odd;
        m[5 * step] = d[3];
    }

    static inline void kernel_transform(const V* u, V* g, int step) {
        const V near = NEAR * (u[1] + u[2]), far = FAR * (u[3] + u[4]);
        g[0] = ORIGIN * u[0] + near + far;
        g[step] = NEAR * P * (u[1] - u[2]) + FAR * Q * (u[3] - u[4]);
        g[2 * step] = PP * near + QQ * far + u[5];
    }
};
