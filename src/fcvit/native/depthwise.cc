// The depthwise convolution and its gradients.

#include "depthwise.h"
#include "operators.h"

// A depthwise convolution processes one image and two vectors of channels at a time, because pixels are far apart. Each
// vector is copied to a map (H, W + 2R, L), which has R = K / 2 zeros at both ends of a row already, so only taps above
// and below are outside. Those are skipped. The second map begins after `size` elements.
template <class T>
void copy_maps(const T* x, T* to, int64_t size, int64_t H, int64_t W, int64_t C, int64_t R, int64_t count) {
    constexpr int64_t L = LANES<T>;
    for (int64_t h = 0; h < H; h++, to += 2 * R * L) {
        for (int64_t w = 0; w < W; w++, x += C, to += L) {
            const bool whole = count == 2 * L;
            store(to + R * L, whole ? load(x) : load_some(x, count));
            store(to + R * L + size, whole ? load(x + L) : load_some(x + L, std::max<int64_t>(count - L, 0)));
        }
    }
}

// y = x convolved with weight (C, K, K), plus bias unless null. x and y are (B, H, W, C). `flip` rotates the kernels by
// 180 degrees, which gives the gradient of the input.
template <class T>
void convolve_depthwise(const T* x, const T* weight, const T* bias, T* y, int64_t B, int64_t H, int64_t W, int64_t C,
                        int64_t K, bool flip) {
    constexpr int64_t L = LANES<T>, PAIR = 2 * L;
    const int64_t pairs = (C + PAIR - 1) / PAIR, area = K * K, row = (W + K - 1) * L, each = 2 * H * row + W * L;
    const int64_t first = std::max<int64_t>(0, K / 2 + 1 - H) * K, last = std::min(K, K / 2 + H) * K;  // taps in use
    Buffer<T> weights(pairs * area * PAIR), biases(pairs * PAIR), scratch(omp_get_max_threads() * each);
#pragma omp parallel if (B * H * W * C > WORTH_SHARING / 4)
    {
#pragma omp for schedule(static)
        for (int64_t c = 0; c < pairs * PAIR; c++) {
            const int64_t channel = std::min(c, C - 1);  // outputs after the last channel are left out
            T* to = weights.data + c / L * area * L + c % L;
            const T* from = weight + channel * area + (flip ? area - 1 : 0);
            for (int64_t k = first; k < last; k++) to[k * L] = from[flip ? -k : k];
            biases.data[c] = bias ? bias[channel] : T(0);
        }
        T *maps = scratch.data + omp_get_thread_num() * each, *out = maps + 2 * H * row;
        std::fill(maps, out, T(0));
        std::vector<const T*> rows(K);
#pragma omp for collapse(2) schedule(static)
        for (int64_t b = 0; b < B; b++) {
            for (int64_t pair = 0; pair < pairs; pair++) {
                const int64_t c = pair * PAIR, count = std::min(PAIR, C - c);
                copy_maps(x + b * H * W * C + c, maps, H * row, H, W, C, K / 2, count);
                for (int64_t h = 0; h < H; h++) {
                    const int64_t top = std::max<int64_t>(0, K / 2 - h), bottom = std::min(K, H + K / 2 - h);
                    for (int64_t half = 0; half < 2 && half * L < count; half++) {
                        for (int64_t i = top; i < bottom; i++) rows[i] = maps + (half * H + h + i - K / 2) * row;
                        const int64_t channel = c + half * L, some = count - half * L;
                        const T *taps = weights.data + channel * area, *start = biases.data + channel;
                        T* to = y + (b * H + h) * W * C + channel;
                        if (some >= L) {
                            depthwise_row<T>(rows.data(), top, bottom, W, K, taps, load(start), to, C);
                        } else {
                            depthwise_row<T>(rows.data(), top, bottom, W, K, taps, load(start), out);
                            for (int64_t w = 0; w < W; w++) store_some(to + w * C, load(out + w * L), some);
                        }
                    }
                }
            }
        }
    }
}

// x (B, H, W, C), weight (C, 1, K, K), bias (C) or null -> z (B, H, W, C). If y is not null, y = gelu(z), and gelu'(z)
// replaces z.
template <class T>
void depthwise(T** t, const int64_t* n, const double*) {
    const int64_t rows = n[0] * n[1], row = n[2] * n[3];
    convolve_depthwise<T>(t[0], t[1], t[2], t[3], n[0], n[1], n[2], n[3], n[4], false);
    // In a pass of its own, because short rows leave most of the time of a GELU waiting for its result.
#pragma omp parallel for schedule(static) if (rows * row > WORTH_SHARING)
    for (int64_t r = 0; r < (t[4] ? rows : 0); r++) gelu_row(t[3] + r * row, t[4] + r * row, row);
}

// total (K, K, L) += the gradient of the kernels of a vector for some images, from copies of x and dz with the same R.
// Sums TAPS taps of a kernel row at once.
template <class T, int TAPS>
void depthwise_weight_gradient(const T* x, const T* dz, double* total, int64_t images, int64_t H, int64_t W,
                               int64_t K) {
    constexpr int64_t L = LANES<T>;
    const int64_t R = K / 2, row = (W + 2 * R) * L;
    for (int64_t i = std::max<int64_t>(0, R - H + 1); i < std::min(K, H + R); i++) {
        for (int64_t j = std::max<int64_t>(0, R - W + 1); j < std::min(K, W + R); j += TAPS) {
            Vector<T> sum[TAPS] = {};
            for (int64_t image = 0; image < images; image++) {
                for (int64_t h = std::max<int64_t>(0, R - i); h < std::min(H, H + R - i); h++) {
                    const T *at = x + (image * H + h + i - R) * row + j * L, *g = dz + (image * H + h) * row + R * L;
                    for (int64_t w = 0; w < W; w++, at += L, g += L) {
                        const Vector<T> v = load(g);
#pragma GCC unroll 16
                        for (int tap = 0; tap < TAPS; tap++) sum[tap] += v * load(at + tap * L);
                    }
                }
            }
            for (int tap = 0; tap < TAPS; tap++) {
                for (int64_t lane = 0; lane < L; lane++) total[(i * K + j + tap) * L + lane] += sum[tap][lane];
            }
        }
    }
}

// dweight (C, K, K). The images are divided into parts, and the parts are added in order. The number of parts does not
// depend on the number of threads.
template <class T>
void depthwise_weights(const T* x, const T* dz, T* dweight, int64_t B, int64_t H, int64_t W, int64_t C, int64_t K) {
    constexpr int64_t L = LANES<T>, PAIR = 2 * L;
    const int64_t run = std::clamp<int64_t>(64 / (H * W), 1, B);  // images that are summed in T
    const int64_t pairs = (C + PAIR - 1) / PAIR, area = K * K, map = H * (W + K - 1) * L, size = run * map;
    const int64_t parts = std::clamp<int64_t>(64 / pairs, 1, (B + run - 1) / run);
    const int64_t taps = std::min(K, 2 * W - 1);  // of a kernel row, that see more than zeros
    const auto gradient = taps == 11  ? depthwise_weight_gradient<T, 11>
                          : taps == 7 ? depthwise_weight_gradient<T, 7>
                          : taps == 3 ? depthwise_weight_gradient<T, 3>
                                      : depthwise_weight_gradient<T, 1>;
    Buffer<double> totals(parts * pairs * area * PAIR);
    Buffer<T> scratch(omp_get_max_threads() * 4 * size);
#pragma omp parallel if (B * H * W * C > WORTH_SHARING / 4)
    {
        T *maps = scratch.data + omp_get_thread_num() * 4 * size, *gradients = maps + 2 * size;
        std::fill(maps, maps + 4 * size, T(0));
#pragma omp for collapse(2) schedule(static)
        for (int64_t part = 0; part < parts; part++) {
            for (int64_t pair = 0; pair < pairs; pair++) {
                double* total = totals.data + (part * pairs + pair) * area * PAIR;
                std::fill(total, total + area * PAIR, 0.0);
                const int64_t end = B * (part + 1) / parts, count = std::min(PAIR, C - pair * PAIR);
                for (int64_t b = B * part / parts; b < end; b += run) {
                    const int64_t images = std::min(run, end - b);
                    for (int64_t k = 0; k < images; k++) {
                        const int64_t here = (b + k) * H * W * C + pair * PAIR;
                        copy_maps(x + here, maps + k * map, size, H, W, C, K / 2, count);
                        copy_maps(dz + here, gradients + k * map, size, H, W, C, K / 2, count);
                    }
                    gradient(maps, gradients, total, images, H, W, K);
                    gradient(maps + size, gradients + size, total + area * L, images, H, W, K);
                }
            }
        }
#pragma omp for schedule(static)
        for (int64_t c = 0; c < C; c++) {
            for (int64_t tap = 0; tap < area; tap++) {
                const double* at = totals.data + (c / L * area + tap) * L + c % L;
                double total = 0;
                for (int64_t part = 0; part < parts; part++) total += at[part * pairs * area * PAIR];
                dweight[c * area + tap] = T(total);
            }
        }
    }
}

// x, weight, dy -> dx, dweight, dbias, each or null
template <class T>
void depthwise_backward(T** t, const int64_t* n, const double*) {
    const T *x = t[0], *weight = t[1], *dy = t[2];
    const int64_t B = n[0], H = n[1], W = n[2], C = n[3], K = n[4];
    if (t[3]) convolve_depthwise<T>(dy, weight, nullptr, t[3], B, H, W, C, K, true);
    if (t[4]) depthwise_weights(x, dy, t[4], B, H, W, C, K);
    column_sums(B * H * W, C, t[5], [=](int64_t r, int64_t c) { return dy[r * C + c]; });
}

EXPORT(depthwise)
EXPORT(depthwise_backward)
