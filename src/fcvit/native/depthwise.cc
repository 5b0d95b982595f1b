// The depthwise convolution and its gradients.

#include "operators.h"

// A depthwise convolution processes one image and one group of channels, two registers wide, at a time. The group is
// copied to (H, W + 2R, GROUP), with R = K / 2 zeros at both ends of a row, so only taps above and below are outside.
// These taps are skipped, and so are taps that see only zeros (a kernel may be larger than the map).
template <class T>
constexpr int64_t GROUP = 2 * LANES<T>;

template <class T>
void copy_group(const T* x, T* to, int64_t H, int64_t W, int64_t C, int64_t R, int64_t count) {
    for (int64_t h = 0; h < H; h++) {
        std::fill(to, to + R * GROUP<T>, T(0));
        to += R * GROUP<T>;
        for (int64_t w = 0; w < W; w++, x += C, to += GROUP<T>) {
            if (count == GROUP<T>) {
                std::memcpy(to, x, GROUP<T> * sizeof(T));
            } else {
                std::memcpy(to, x, count * sizeof(T));
                std::fill(to + count, to + GROUP<T>, T(0));
            }
        }
        std::fill(to, to + R * GROUP<T>, T(0));
        to += R * GROUP<T>;
    }
}

// Computes WIDE adjacent outputs, which share the loaded weights. `weight` is (K, K, GROUP), `bias` is (GROUP).
template <class T, int WIDE>
inline void depthwise_outputs(const T* x, const T* weight, const T* bias, T* y, int64_t h, int64_t w, int64_t H, int64_t W,
                              int64_t C, int64_t K, int64_t count) {
    constexpr int64_t L = LANES<T>, G = GROUP<T>;
    const int64_t R = K / 2;
    const int64_t top = std::max<int64_t>(0, R - h), bottom = std::min(K, H + R - h);
    const int64_t left = std::max<int64_t>(0, R - w - (WIDE - 1)), right = std::min(K, W + R - w);
    Vector<T> sum[WIDE][2];
#pragma GCC unroll 8
    for (int o = 0; o < WIDE; o++) {
        sum[o][0] = load(bias);
        sum[o][1] = load(bias + L);
    }
    for (int64_t i = top; i < bottom; i++) {
        const T *at = x + ((h + i - R) * (W + 2 * R) + w + left) * G, *tap = weight + (i * K + left) * G;
        for (int64_t j = left; j < right; j++, at += G, tap += G) {
            const Vector<T> first = load(tap), second = load(tap + L);
#pragma GCC unroll 8
            for (int o = 0; o < WIDE; o++) {
                sum[o][0] += load(at + o * G) * first;
                sum[o][1] += load(at + o * G + L) * second;
            }
        }
    }
#pragma GCC unroll 8
    for (int o = 0; o < WIDE; o++) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const int64_t some = count - half * L, to = (h * W + w + o) * C + half * L;
            if (some <= 0) break;
            store_some(y + to, sum[o][half], some);
        }
    }
}

// y (H, W, C) = the convolution of a copy of a group.
template <class T>
void convolve_group(const T* x, const T* weight, const T* bias, T* y, int64_t H, int64_t W, int64_t C, int64_t K,
                    int64_t count) {
    for (int64_t h = 0; h < H; h++) {
        int64_t w = 0;
        for (; w + 4 <= W; w += 4) depthwise_outputs<T, 4>(x, weight, bias, y, h, w, H, W, C, K, count);
        for (; w + 2 <= W; w += 2) depthwise_outputs<T, 2>(x, weight, bias, y, h, w, H, W, C, K, count);
        for (; w < W; w++) depthwise_outputs<T, 1>(x, weight, bias, y, h, w, H, W, C, K, count);
    }
}

// The kernels (K, K, GROUP) and biases (GROUP) of each group, from weight (C, K, K) and bias (C) or null. `flip` rotates
// the kernels by 180 degrees, which gives the gradient of the input.
template <class T>
struct Kernels {
    Buffer<T> weights, biases;
    Kernels(const T* weight, const T* bias, int64_t C, int64_t area, bool flip)
        : weights((C + GROUP<T> - 1) / GROUP<T> * GROUP<T> * area), biases((C + GROUP<T> - 1) / GROUP<T> * GROUP<T>) {
        constexpr int64_t G = GROUP<T>;
#pragma omp parallel for schedule(static) if (C * area > WORTH_SHARING)
        for (int64_t group = 0; group < (C + G - 1) / G; group++) {
            for (int64_t lane = 0; lane < G; lane++) {
                const int64_t c = group * G + lane;
                biases.data[c] = bias && c < C ? bias[c] : T(0);
                T* to = weights.data + group * area * G + lane;
                for (int64_t tap = 0; tap < area; tap++) {
                    to[tap * G] = c < C ? weight[c * area + (flip ? area - 1 - tap : tap)] : T(0);
                }
            }
        }
    }
};

// x (B, H, W, C), weight (C, 1, K, K), bias (C) or null -> z (B, H, W, C). If y is not null, y = gelu(z), and gelu'(z)
// replaces z.
template <class T>
void depthwise(T** t, const int64_t* n, const double*) {
    constexpr int64_t G = GROUP<T>;
    const T* x = t[0];
    T *z = t[3], *y = t[4];
    const int64_t B = n[0], H = n[1], W = n[2], C = n[3], K = n[4];
    const int64_t groups = (C + G - 1) / G, area = K * K, slab = H * (W + K - 1) * G;
    const Kernels<T> kernels(t[1], t[2], C, area, false);
    Buffer<T> slabs(omp_get_max_threads() * slab);
#pragma omp parallel if (B * H * W * C > WORTH_SHARING / 4)
    {
        T* from = slabs.data + omp_get_thread_num() * slab;
#pragma omp for collapse(2) schedule(static)
        for (int64_t b = 0; b < B; b++) {
            for (int64_t group = 0; group < groups; group++) {
                const int64_t c = group * G, count = std::min(G, C - c), here = b * H * W * C + c;
                copy_group(x + here, from, H, W, C, K / 2, count);
                convolve_group(from, kernels.weights.data + c * area, kernels.biases.data + c, z + here, H, W, C, K, count);
            }
        }
        // In a pass of its own, because short rows leave most of the time of a GELU waiting for its result.
#pragma omp for schedule(static)
        for (int64_t row = 0; row < (y ? B * H : 0); row++) gelu_row(z + row * W * C, y + row * W * C, W * C);
    }
}

// total (K, K, GROUP) += the gradient of the kernels of a group for some images, from copies of x and dz with the same R.
// Sums TAPS taps of a kernel row at once.
template <class T, int TAPS>
void depthwise_weight_gradient(const T* x, const T* dz, double* total, int64_t images, int64_t H, int64_t W, int64_t K) {
    constexpr int64_t L = LANES<T>, G = GROUP<T>;
    const int64_t R = K / 2, row = (W + 2 * R) * G;
    for (int64_t i = std::max<int64_t>(0, R - H + 1); i < std::min(K, H + R); i++) {
        for (int64_t j = std::max<int64_t>(0, R - W + 1); j < std::min(K, W + R); j += TAPS) {
            for (int64_t half = 0; half < G; half += L) {
                Vector<T> sum[TAPS] = {};
                for (int64_t image = 0; image < images; image++) {
                    for (int64_t h = std::max<int64_t>(0, R - i); h < std::min(H, H + R - i); h++) {
                        const T* at = x + (image * H + h + i - R) * row + j * G + half;
                        const T* g = dz + (image * H + h) * row + R * G + half;
                        for (int64_t w = 0; w < W; w++, at += G, g += G) {
                            const Vector<T> v = load(g);
#pragma GCC unroll 16
                            for (int tap = 0; tap < TAPS; tap++) sum[tap] += v * load(at + tap * G);
                        }
                    }
                }
                double* to = total + (i * K + j) * G + half;
#pragma GCC unroll 16
                for (int tap = 0; tap < TAPS; tap++) {
                    for (int64_t lane = 0; lane < L; lane++) to[tap * G + lane] += sum[tap][lane];
                }
            }
        }
    }
}

// Returns the function for the number of taps of a kernel row that see more than zeros.
template <class T>
auto weight_gradient_function(int64_t K, int64_t W) {
    switch (std::min(K, 2 * W - 1)) {
        case 11: return depthwise_weight_gradient<T, 11>;
        case 7: return depthwise_weight_gradient<T, 7>;
        case 3: return depthwise_weight_gradient<T, 3>;
        default: return depthwise_weight_gradient<T, 1>;
    }
}

// total (GROUP) += the sum of all positions in copies of a group
template <class T>
void group_sums(const T* x, double* total, int64_t size) {
    constexpr int64_t L = LANES<T>, G = GROUP<T>;
    Vector<T> sum[2] = {};
    for (int64_t at = 0; at < size; at += G) {
        sum[0] += load(x + at);
        sum[1] += load(x + at + L);
    }
    for (int64_t lane = 0; lane < G; lane++) total[lane] += sum[lane / L][lane % L];
}

// x, weight, gelu' of the outputs or null, dy -> dx, dweight, dbias, each or null. For the sums, the images are divided
// into parts, which are added in order. The number of parts does not depend on the number of threads.
template <class T>
void depthwise_backward(T** t, const int64_t* n, const double*) {
    constexpr int64_t G = GROUP<T>;
    const T* x = t[0];
    T *dx = t[4], *dweight = t[5], *dbias = t[6];
    const int64_t B = n[0], H = n[1], W = n[2], C = n[3], K = n[4];
    const Activation<T> activation(t[2], t[3], B * H * W, C);
    const int64_t run = std::clamp<int64_t>(64 / (H * W), 1, B);  // images that are summed in T
    const int64_t groups = (C + G - 1) / G, area = K * K, image = H * (W + K - 1) * G, slab = run * image;
    const int64_t parts = std::clamp<int64_t>(64 / groups, 1, (B + run - 1) / run), sums = (area + 1) * G;
    const auto weight_gradient = weight_gradient_function<T>(K, W);
    const Kernels<T> kernels(t[1], nullptr, C, area, true);
    Buffer<double> totals(groups * parts * sums);
    Buffer<T> slabs(omp_get_max_threads() * 2 * slab);
#pragma omp parallel if (B * H * W * C > WORTH_SHARING / 4)
    {
        T *from = slabs.data + omp_get_thread_num() * 2 * slab, *g = from + slab;
#pragma omp for collapse(2) schedule(static)
        for (int64_t group = 0; group < groups; group++) {
            for (int64_t part = 0; part < parts; part++) {
                double* total = totals.data + (group * parts + part) * sums;
                std::fill(total, total + sums, 0.0);
                const int64_t c = group * G, count = std::min(G, C - c), end = B * (part + 1) / parts;
                for (int64_t b = B * part / parts; b < end; b += run) {
                    const int64_t images = std::min(run, end - b);
                    for (int64_t k = 0; k < images; k++) {
                        const int64_t here = (b + k) * H * W * C + c;
                        if (dweight) copy_group(x + here, from + k * image, H, W, C, K / 2, count);
                        copy_group(activation.gradient + here, g + k * image, H, W, C, K / 2, count);
                        if (!dx) continue;
                        convolve_group(g + k * image, kernels.weights.data + c * area, kernels.biases.data + c, dx + here, H,
                                       W, C, K, count);
                    }
                    if (dweight) weight_gradient(from, g, total, images, H, W, K);
                    if (dbias) group_sums(g, total + area * G, images * image);
                }
            }
        }
#pragma omp for schedule(static)
        for (int64_t group = 0; group < groups; group++) {
            double* total = totals.data + group * parts * sums;
            for (int64_t part = 1; part < parts; part++) {
                for (int64_t at = 0; at < sums; at++) total[at] += total[part * sums + at];
            }
            for (int64_t c = group * G; c < std::min(C, group * G + G); c++) {
                for (int64_t tap = 0; dweight && tap < area; tap++) dweight[c * area + tap] = T(total[tap * G + c - group * G]);
                if (dbias) dbias[c] = T(total[area * G + c - group * G]);
            }
        }
    }
}

EXPORT(depthwise)
EXPORT(depthwise_backward)
