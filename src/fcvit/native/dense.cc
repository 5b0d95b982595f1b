// Operators of dense heads for training, each with its gradient. Activations are channels last, as in operators.cc.
#include "operators.h"
#include "winograd.h"

constexpr int64_t PANEL = Winograd::PANEL;

Strides channels_last(int64_t H, int64_t W, int64_t C) { return {L, H * W * C, W * C, C}; }

// x (B, H, W, C), weight (N, C, 3, 3), bias (N) or null -> y (B, H, W, N). If `adjoint`, y is the gradient of the input
// for x = dy and the weight (C, N, 3, 3).
void convolve(const float* x, const float* weight, const float* bias, float* y, int64_t B, int64_t H, int64_t W, int64_t C,
              int64_t N, bool adjoint, bool relu) {
    const Winograd winograd(B, H, W, C, N, omp_get_max_threads());
    const int64_t scratch = winograd.scratch_size();
    Buffer<float> packed(winograd.packed_size(C, N)), scratches(omp_get_max_threads() * scratch);
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < winograd.panels; panel++) {
            winograd.pack(weight, adjoint ? 9 : 9 * C, adjoint ? 9 * N : 9, adjoint, bias, C, N, panel, packed.data);
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < winograd.tasks; task++) {
            winograd.run(task, x, channels_last(H, W, C), packed.data, relu, y, channels_last(H, W, N),
                         scratches.data + omp_get_thread_num() * scratch);
        }
    }
}

// x, weight, bias or null -> y = x convolved with weight, plus bias, and max(y, 0) if n[5]
void conv3x3(float** t, const int64_t* n, const double*) {
    convolve(t[0], t[1], t[2], t[3], n[0], n[1], n[2], n[3], n[4], false, n[5]);
}

// dweight (N, C, 3, 3) by the adjoint of Winograd's method. For each frequency, the gradient of the transformed weights
// is the product of the transposed inputs, transformed, and the gradients of the outputs, transformed.
void weight_gradient(const float* x, const float* dy, float* dweight, int64_t B, int64_t H, int64_t W, int64_t C, int64_t N) {
    constexpr int HEIGHT = L / 2;
    Winograd w(B, H, W, C, N, 1);
    const int64_t depth = w.blocks * L, width = w.panels * PANEL;
    // The sums are read and written once for this number of tiles, the tiles are written and read once.
    w.tiles_each = std::max<int64_t>(2 * depth * width / (depth + width), 96);
    const int64_t step = w.tiles_each * width + w.GAP;
    Buffer<float> inputs(36 * w.input_step()), gradients(36 * step), total(36 * depth * width);
    std::fill(total.data, total.data + 36 * depth * width, 0.0f);
#pragma omp parallel
    {
        for (int64_t first = 0; first < w.tiles; first += w.tiles_each) {
            const int64_t count = std::min(w.tiles_each, w.tiles - first);
#pragma omp for schedule(static)
            for (int64_t t = 0; t < count; t++) {
                w.input_tile(first + t, x, channels_last(H, W, C), inputs.data + t * L);
                w.gradient_tile(first + t, dy, channels_last(H, W, N), gradients.data + t * L, step);
            }
#pragma omp for collapse(2) schedule(static)
            for (int64_t f = 0; f < 36; f++) {
                for (int64_t c = 0; c < depth; c += HEIGHT) {
                    for (int64_t panel = 0; panel < w.panels; panel++) {
                        const float* v = inputs.data + f * w.input_step() + c / L * w.tiles_each * L + c % L;
                        const float* m = gradients.data + f * step + panel * w.tiles_each * PANEL;
                        Vector<float> sum[HEIGHT][2] = {};
                        for (int64_t t = 0; t < count; t++, v += L, m += L) {
                            const Vector<float> left = load(m), right = load(m + w.tiles_each * L);
#pragma GCC unroll 8
                            for (int r = 0; r < HEIGHT; r++) {
                                sum[r][0] += v[r] * left;
                                sum[r][1] += v[r] * right;
                            }
                        }
#pragma GCC unroll 8
                        for (int r = 0; r < HEIGHT; r++) {
                            float* to = total.data + (f * depth + c + r) * width + panel * PANEL;
                            store(to, load(to) + sum[r][0]);
                            store(to + L, load(to + L) + sum[r][1]);
                        }
                    }
                }
            }
        }
#pragma omp for schedule(static)
        for (int64_t c = 0; c < C; c++) {
            for (int64_t n = 0; n < N; n += L) {
                Vector<float> kernel[9];
                w.kernel_gradient(total.data + c * width + n, depth * width, kernel);
                for (int64_t lane = 0; lane < std::min(L, N - n); lane++) {
                    for (int tap = 0; tap < 9; tap++) dweight[((n + lane) * C + c) * 9 + tap] = kernel[tap][lane];
                }
            }
        }
    }
}

// x, weight, y if it was cut off at 0, or null, dy -> dx, dweight, dbias, each or null
void conv3x3_backward(float** t, const int64_t* n, const double*) {
    const float *x = t[0], *weight = t[1], *y = t[2], *g = t[3];
    float *dx = t[4], *dweight = t[5], *dbias = t[6];
    const int64_t B = n[0], H = n[1], W = n[2], C = n[3], N = n[4], rows = B * H * W;
    const Buffer<float> passed(y ? rows * N : 0);
    if (y) {
#pragma omp parallel for simd schedule(static) if (rows * N > WORTH_SHARING)
        for (int64_t i = 0; i < rows * N; i++) {
            const float v = g[i];
            passed.data[i] = y[i] > 0 ? v : 0;
        }
        g = passed.data;
    }
    if (dx) convolve(g, weight, nullptr, dx, B, H, W, N, C, true, false);
    if (dweight) weight_gradient(x, g, dweight, B, H, W, C, N);
    if (dbias) column_sums(rows, N, dbias, [=](int64_t r, int64_t c) { return g[r * N + c]; });
}

extern "C" int fcvit_conv3x3_float32(float** t, const int64_t* n, const double* o) { return guarded(conv3x3, t, n, o); }
extern "C" int fcvit_conv3x3_backward_float32(float** t, const int64_t* n, const double* o) {
    return guarded(conv3x3_backward, t, n, o);
}
