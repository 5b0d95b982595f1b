// The operators of FCViT's blocks on a CPU, each with its gradient, for float and double.
//
// Activations are channels last, (B, P, C) for B images of P = H x W positions. A 1x1 convolution is then one matrix
// product, and the other operators run along the channels in full registers, for maps of 1x1 as well as 56x56.
// Results do not depend on timing, because the results of threads are always summed in a fixed order.
//
// Each function takes its tensors (inputs first), its sizes and other numbers. `operators.py` passes them.

#include "operators.h"

// The sum over positions and channels of one image, along the channels in T and along the positions in double.
template <class Term>
double sum_all(int64_t positions, int64_t channels, Term term) {
    double total = 0;
    for (int64_t p = 0; p < positions; p++) {
        decltype(term(0, 0)) sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < channels; c++) sum += term(p, c);
        total += sum;
    }
    return total;
}

// x (B, P, C), weight (C), bias (C) -> y (B, P, C), statistics (B, 2): mean and 1 / standard deviation.
template <class T>
void layer_norm(T** t, const int64_t* n, const double* options) {
    const T *x = t[0], *weight = t[1], *bias = t[2];
    T *y = t[3], *statistics = t[4];
    const int64_t B = n[0], P = n[1], C = n[2];
#pragma omp parallel for schedule(static) if (B * P * C > WORTH_SHARING)
    for (int64_t b = 0; b < B; b++) {
        const T* from = x + b * P * C;
        T* to = y + b * P * C;
        const T mean = T(sum_all(P, C, [=](int64_t p, int64_t c) { return from[p * C + c]; }) / (P * C));
        const double square = sum_all(P, C, [=](int64_t p, int64_t c) {
            const T centered = from[p * C + c] - mean;
            return centered * centered;
        });
        const T inverse = T(1 / std::sqrt(square / (P * C) + options[0]));
        statistics[2 * b] = mean;
        statistics[2 * b + 1] = inverse;
        for (int64_t p = 0; p < P; p++) {
#pragma omp simd
            for (int64_t c = 0; c < C; c++) to[p * C + c] = (from[p * C + c] - mean) * inverse * weight[c] + bias[c];
        }
    }
}

// x, weight, statistics, dy -> dx, dweight, dbias. If `more` is not null, it is added to dx.
template <class T>
void layer_norm_backward(T** t, const int64_t* n, const double*) {
    const T *x = t[0], *weight = t[1], *statistics = t[2], *dy = t[3], *more = t[7];
    T *dx = t[4], *dweight = t[5], *dbias = t[6];
    const int64_t B = n[0], P = n[1], C = n[2];
#pragma omp parallel for schedule(static) if (B * P * C > WORTH_SHARING)
    for (int64_t b = 0; b < B; b++) {
        const T *from = x + b * P * C, *g = dy + b * P * C, mean = statistics[2 * b], inverse = statistics[2 * b + 1];
        const T along = T(sum_all(P, C, [=](int64_t p, int64_t c) { return g[p * C + c] * weight[c]; }) / (P * C));
        const T across = T(sum_all(P, C, [=](int64_t p, int64_t c) {
            return g[p * C + c] * weight[c] * ((from[p * C + c] - mean) * inverse);
        }) / (P * C));
        T* to = dx + b * P * C;
        for (int64_t p = 0; p < P; p++) {
#pragma omp simd
            for (int64_t c = 0; c < C; c++) {
                const T normal = (from[p * C + c] - mean) * inverse;
                to[p * C + c] = inverse * (g[p * C + c] * weight[c] - along - normal * across);
            }
            if (!more) continue;
#pragma omp simd
            for (int64_t c = 0; c < C; c++) to[p * C + c] += more[(b * P + p) * C + c];
        }
    }
    column_sums(B * P, C, dbias, [=](int64_t r, int64_t c) { return dy[r * C + c]; });
    column_sums(B * P, C, dweight, [=](int64_t r, int64_t c) {
        const int64_t b = r / P;
        return dy[r * C + c] * ((x[r * C + c] - statistics[2 * b]) * statistics[2 * b + 1]);
    });
}

// x (R, C), weight, bias -> y, statistics (2, C): mean and 1 / standard deviation of each channel. Updates the running
// mean and the running variance, which is the unbiased one, with the momentum options[1]. If n[2], y is cut off at 0.
template <class T>
void batch_norm(T** t, const int64_t* n, const double* options) {
    const T *x = t[0], *weight = t[1], *bias = t[2];
    T *y = t[3], *mean = t[4], *running_mean = t[5], *running_variance = t[6];
    const int64_t R = n[0], C = n[1];
    const bool relu = n[2];
    T* inverse = mean + C;
    column_sums(R, C, mean, [=](int64_t r, int64_t c) { return x[r * C + c]; });
    for (int64_t c = 0; c < C; c++) mean[c] /= R;
    column_sums(R, C, inverse, [=](int64_t r, int64_t c) {
        const T centered = x[r * C + c] - mean[c];
        return centered * centered;
    });
    for (int64_t c = 0; c < C; c++) {
        running_mean[c] = T(options[1] * running_mean[c] + (1 - options[1]) * mean[c]);
        running_variance[c] = T(options[1] * running_variance[c] + (1 - options[1]) * (double(inverse[c]) / (R - 1)));
        inverse[c] = T(1 / std::sqrt(inverse[c] / double(R) + options[0]));
    }
#pragma omp parallel for schedule(static) if (R * C > WORTH_SHARING)
    for (int64_t r = 0; r < R; r++) {
#pragma omp simd
        for (int64_t c = 0; c < C; c++) {
            const T v = (x[r * C + c] - mean[c]) * inverse[c] * weight[c] + bias[c];
            y[r * C + c] = relu && v < 0 ? T(0) : v;  // keeps NaN
        }
    }
}

// x, weight, y if it was cut off at 0, or null, statistics, dy -> dx, dweight, dbias
template <class T>
void batch_norm_backward(T** t, const int64_t* n, const double*) {
    const T *x = t[0], *weight = t[1], *y = t[2], *mean = t[3], *dy = t[4];
    T *dx = t[5], *dweight = t[6], *dbias = t[7];
    const int64_t R = n[0], C = n[1];
    const T *inverse = mean + C, part = T(1.0 / R), *sign = y ? y : x;
    const bool relu = y;
    const auto passed = [=](int64_t i) {
        const T g = dy[i], s = sign[i];  // loads that depend on a condition would not be vectorized
        return !relu || s > 0 ? g : T(0);
    };
    column_sums(R, C, dbias, [=](int64_t r, int64_t c) { return passed(r * C + c); });
    column_sums(R, C, dweight, [=](int64_t r, int64_t c) {
        return passed(r * C + c) * ((x[r * C + c] - mean[c]) * inverse[c]);
    });
#pragma omp parallel for schedule(static) if (R * C > WORTH_SHARING)
    for (int64_t r = 0; r < R; r++) {
#pragma omp simd
        for (int64_t c = 0; c < C; c++) {
            const T normal = (x[r * C + c] - mean[c]) * inverse[c];
            dx[r * C + c] = weight[c] * inverse[c] * (passed(r * C + c) - part * (dbias[c] + normal * dweight[c]));
        }
    }
}

// The weight is (N, K) as in a convolution, or, if n[3], (K, N) as in Paddle's Linear.
// x (R, K), weight, bias (N) or null -> z (R, N) = x weight + bias. If y (R, N) is not null, y = gelu(z), and gelu'(z)
// replaces z.
template <class T>
void linear(T** t, const int64_t* n, const double*) {
    const T *x = t[0], *weight = t[1], *bias = t[2];
    T *z = t[3], *y = t[4];
    const int64_t R = n[0], K = n[1], N = n[2];
    const Matrix<T> w = n[3] ? Matrix<T>{weight, N, 1} : Matrix<T>{weight, 1, K};
    matmul<T>(R, N, K, {x, K, 1}, w, z, bias, [=](int64_t r, int64_t c, int64_t count) {
        if (y) gelu_row(z + r * N + c, y + r * N + c, count);
    });
}

// x, weight, gelu' of the inputs or null, which dx is multiplied by, dy -> dx, dweight, dbias, each or null
template <class T>
void linear_backward(T** t, const int64_t* n, const double*) {
    const T *x = t[0], *weight = t[1], *slope = t[2], *dy = t[3];
    T *dx = t[4], *dweight = t[5], *dbias = t[6];
    const int64_t R = n[0], K = n[1], N = n[2];
    const Matrix<T> w = n[3] ? Matrix<T>{weight, 1, N} : Matrix<T>{weight, K, 1};
    matmul<T>(R, K, N, {dy, N, 1}, w, dx, nullptr, [=](int64_t r, int64_t c, int64_t count) {
        if (!slope) return;
#pragma omp simd
        for (int64_t i = r * K + c; i < r * K + c + count; i++) dx[i] *= slope[i];
    });
    if (n[3]) matmul<T>(K, N, R, {x, 1, K}, {dy, N, 1}, dweight);
    if (!n[3]) matmul<T>(N, K, R, {dy, 1, N}, {x, K, 1}, dweight);
    column_sums(R, N, dbias, [=](int64_t r, int64_t c) { return dy[r * N + c]; });
}

// x, y -> x y, of n[0] elements
template <class T>
void multiply(T** t, const int64_t* n, const double*) {
    const T *x = t[0], *y = t[1];
    T* product = t[2];
#pragma omp parallel for simd schedule(static) if (n[0] > WORTH_SHARING)
    for (int64_t i = 0; i < n[0]; i++) product[i] = x[i] * y[i];
}

// The mean over positions: x (P, C) -> (C).
template <class T>
void mean_positions(const T* x, T* mean, double* total, int64_t P, int64_t C) {
    std::fill(total, total + C, 0.0);
    for (int64_t p = 0; p < P; p++) {
#pragma omp simd
        for (int64_t c = 0; c < C; c++) total[c] += x[p * C + c];
    }
    for (int64_t c = 0; c < C; c++) mean[c] = T(total[c] / P);
}

// The weighted global context with competition and its residual connection, with h heads of C / h channels and inner
// width I.
// x (B, P, C), fc1 weight (C, 2I) and bias, fc2 weight (I, C) and bias, rescale weight and bias (h)
//   -> y (B, P, C), and the intermediate results for the gradient
template <class T>
struct Kept {
    T *context, *halves, *winner, *value;  // (B, C), (B, 2I), (B, I), (B, C)
    T *centered, *deviation;                // the centered similarity (B, P, h) and its standard deviation (B)
    Kept(T* memory, int64_t B, int64_t P, int64_t C, int64_t h, int64_t I)
        : context(memory), halves(context + B * C), winner(halves + B * 2 * I), value(winner + B * I),
          centered(value + B * C), deviation(centered + B * P * h) {}
};

// sums[k] = the sum of the d channels of head k. Heads are too narrow for vectors.
template <class T>
inline void head_sums(const T* row, int64_t h, int64_t d, T* sums) {
    for (int64_t k = 0; k < h; k++, row += d) {
        T sum = row[0];
        for (int64_t c = 1; c < d; c++) sum += row[c];
        sums[k] = sum;
    }
}

// Writes the value of head k to its d channels.
template <class T>
inline void spread_heads(const T* values, int64_t h, int64_t d, T* row) {
    for (int64_t k = 0; k < h; k++, row += d) std::fill(row, row + d, values[k]);
}

template <class T>
void context(T** t, const int64_t* n, const double* options) {
    const T *x = t[0], *fc1 = t[1], *bias1 = t[2], *fc2 = t[3], *bias2 = t[4], *weight = t[5], *bias = t[6];
    T* y = t[7];
    const int64_t B = n[0], P = n[1], C = n[2], h = n[3], I = n[4], d = C / h;
    const Kept<T> kept(t[8], B, P, C, h, I);
    T *context = kept.context, *halves = kept.halves, *winner = kept.winner, *value = kept.value;
    T *centered = kept.centered, *deviation = kept.deviation;
    Buffer<double> totals(B * C);
#pragma omp parallel for schedule(static) if (B * P * C > WORTH_SHARING)
    for (int64_t b = 0; b < B; b++) mean_positions(x + b * P * C, context + b * C, totals.data + b * C, P, C);
    matmul<T>(B, 2 * I, C, {context, C, 1}, {fc1, 2 * I, 1}, halves, bias1);
    for (int64_t b = 0; b < B; b++) {
        for (int64_t i = 0; i < I; i++) {
            const T first = halves[b * 2 * I + i], second = halves[b * 2 * I + I + i];
            winner[b * I + i] = second > first || second != second ? second : first;  // NaN wins
        }
    }
    matmul<T>(B, C, I, {winner, I, 1}, {fc2, C, 1}, value, bias2);
    const T scale = T(1 / std::sqrt(double(d)));
    const double count = double(h * P), others = std::max(count - 1, 1.0);  // a single value has no deviation
    Buffer<T> rows(omp_get_max_threads() * (C + h));
#pragma omp parallel for schedule(static) if (B * P * C > WORTH_SHARING)
    for (int64_t b = 0; b < B; b++) {
        const T *from = x + b * P * C, *mean = context + b * C, *v = value + b * C;
        T *to = y + b * P * C, *s = centered + b * P * h;
        T *row = rows.data + omp_get_thread_num() * (C + h), *gate = row + C;
        for (int64_t p = 0; p < P; p++) {
#pragma omp simd
            for (int64_t c = 0; c < C; c++) row[c] = from[p * C + c] * mean[c] * scale;
            head_sums(row, h, d, s + p * h);
        }
        const T middle = T(sum_all(P, h, [=](int64_t p, int64_t k) { return s[p * h + k]; }) / count);
#pragma omp simd
        for (int64_t i = 0; i < P * h; i++) s[i] -= middle;
        const double square = sum_all(P, h, [=](int64_t p, int64_t k) { return s[p * h + k] * s[p * h + k]; });
        deviation[b] = T(std::sqrt(square / others));
        const T inverse = T(1 / (std::sqrt(square / others) + options[0]));
        for (int64_t p = 0; p < P; p++) {
            for (int64_t k = 0; k < h; k++) gate[k] = s[p * h + k] * inverse * weight[k] + bias[k];
            spread_heads(gate, h, d, row);
#pragma omp simd
            for (int64_t c = 0; c < C; c++) to[p * C + c] = from[p * C + c] + row[c] * v[c];
        }
    }
}

// x, fc1, fc2, rescale weight and bias, kept, dy
//   -> dx, dfc1, dbias1, dfc2, dbias2, dweight, dbias
template <class T>
void context_backward(T** t, const int64_t* n, const double* options) {
    const T *x = t[0], *fc1 = t[1], *fc2 = t[2], *weight = t[3], *bias = t[4], *dy = t[6];
    T *dx = t[7], *dfc1 = t[8], *dbias1 = t[9], *dfc2 = t[10], *dbias2 = t[11], *dweight = t[12], *dbias = t[13];
    const int64_t B = n[0], P = n[1], C = n[2], h = n[3], I = n[4], d = C / h;
    const Kept<T> kept(t[5], B, P, C, h, I);
    const T *context = kept.context, *halves = kept.halves, *winner = kept.winner, *value = kept.value;
    const T *centered = kept.centered, *deviation = kept.deviation;
    const T scale = T(1 / std::sqrt(double(d)));
    const double count = double(h * P), others = std::max(count - 1, 1.0);
    Buffer<T> gates(B * P * h), slopes(B * P * h), dcontext(B * C), dvalue(B * C), dwinner(B * I), dhalves(B * 2 * I);
    Buffer<double> totals(B * 2 * C);
    Buffer<T> rows(omp_get_max_threads() * (2 * C + h));
#pragma omp parallel for schedule(static) if (B * P * C > WORTH_SHARING)
    for (int64_t b = 0; b < B; b++) {
        const T *from = x + b * P * C, *g = dy + b * P * C, *v = value + b * C, *s = centered + b * P * h;
        T *dgate = gates.data + b * P * h, *slope = slopes.data + b * P * h, *to = dx + b * P * C;
        double *to_value = totals.data + b * 2 * C, *to_context = to_value + C;
        std::fill(to_value, to_value + 2 * C, 0.0);
        const T inverse = T(1 / (deviation[b] + options[0]));
        T *row = rows.data + omp_get_thread_num() * (2 * C + h), *product = row + C, *values = product + C;
        for (int64_t p = 0; p < P; p++) {
            for (int64_t k = 0; k < h; k++) values[k] = s[p * h + k] * inverse * weight[k] + bias[k];
            spread_heads(values, h, d, row);
#pragma omp simd
            for (int64_t c = 0; c < C; c++) {
                product[c] = g[p * C + c] * v[c];
                to_value[c] += g[p * C + c] * row[c];
            }
            head_sums(product, h, d, dgate + p * h);
            for (int64_t k = 0; k < h; k++) slope[p * h + k] = dgate[p * h + k] * weight[k];
        }
        // The gradient through the mean and the deviation, which has no gradient if all values are equal.
        const double mean = sum_all(P, h, [=](int64_t p, int64_t k) { return slope[p * h + k]; }) / count;
        const double along = sum_all(P, h, [=](int64_t p, int64_t k) { return slope[p * h + k] * s[p * h + k]; });
        const double by_deviation = deviation[b] > 0 ? along * inverse / (others * deviation[b]) : along * 0;
        for (int64_t p = 0; p < P; p++) {
            for (int64_t k = 0; k < h; k++) {
                values[k] = T((slope[p * h + k] - mean - s[p * h + k] * by_deviation) * inverse) * scale;
            }
            spread_heads(values, h, d, row);
#pragma omp simd
            for (int64_t c = 0; c < C; c++) {
                to[p * C + c] = g[p * C + c] + row[c] * context[b * C + c];
                to_context[c] += row[c] * from[p * C + c];
            }
        }
        for (int64_t c = 0; c < C; c++) dvalue.data[b * C + c] = T(to_value[c]);
    }
    // The gradient of the bottleneck. If both halves are equal, the second wins, as in Paddle.
    matmul<T>(B, I, C, {dvalue.data, C, 1}, {fc2, 1, C}, dwinner.data);
    matmul<T>(I, C, B, {winner, 1, I}, {dvalue.data, C, 1}, dfc2);
    for (int64_t b = 0; b < B; b++) {
        for (int64_t i = 0; i < I; i++) {
            const T first = halves[b * 2 * I + i], second = halves[b * 2 * I + I + i], g = dwinner.data[b * I + i];
            dhalves.data[b * 2 * I + i] = first > second ? g : T(0);
            dhalves.data[b * 2 * I + I + i] = first > second ? T(0) : g;
        }
    }
    matmul<T>(B, C, 2 * I, {dhalves.data, 2 * I, 1}, {fc1, 1, 2 * I}, dcontext.data);
    matmul<T>(C, 2 * I, B, {context, 1, C}, {dhalves.data, 2 * I, 1}, dfc1);
    const T *to_halves = dhalves.data, *to_value = dvalue.data, *dgate = gates.data;
    column_sums(B, 2 * I, dbias1, [=](int64_t b, int64_t i) { return to_halves[b * 2 * I + i]; });
    column_sums(B, C, dbias2, [=](int64_t b, int64_t c) { return to_value[b * C + c]; });
    column_sums(B * P, h, dbias, [=](int64_t r, int64_t k) { return dgate[r * h + k]; });
    column_sums(B * P, h, dweight, [=](int64_t r, int64_t k) {
        return dgate[r * h + k] * (centered[r * h + k] * T(1 / (deviation[r / P] + options[0])));
    });
#pragma omp parallel for schedule(static) if (B * P * C > WORTH_SHARING)
    for (int64_t b = 0; b < B; b++) {
        T* mean = dcontext.data + b * C;
        for (int64_t c = 0; c < C; c++) mean[c] = T((mean[c] + totals.data[b * 2 * C + C + c]) / P);
        for (int64_t p = 0; p < P; p++) {
            for (int64_t c = 0; c < C; c++) dx[(b * P + p) * C + c] += mean[c];
        }
    }
}

// x (B, P, C), branch (B, P, C), scale (C), factor (B), slope (B, P, C) -> x + branch scale factor slope, each but the
// branch may be null
template <class T>
void residual(T** t, const int64_t* n, const double*) {
    const T *x = t[0], *branch = t[1], *scale = t[2], *factor = t[3], *slope = t[4];
    T* y = t[5];
    const int64_t B = n[0], P = n[1], C = n[2];
#pragma omp parallel for schedule(static) if (B * P * C > WORTH_SHARING)
    for (int64_t r = 0; r < B * P; r++) {
        const T times = factor ? factor[r / P] : T(1);
        for (int64_t i = r * C, c = 0; c < C; c++, i++) {
            y[i] = (x ? x[i] : T(0)) + branch[i] * (scale ? scale[c] * times : times) * (slope ? slope[i] : T(1));
        }
    }
}

// branch, factor or null, dy -> dscale or null. The other gradients are dy, and `residual` of dy.
template <class T>
void residual_scale(T** t, const int64_t* n, const double*) {
    const T *branch = t[0], *factor = t[1], *dy = t[2];
    const int64_t P = n[1], C = n[2];
    column_sums(n[0] * P, C, t[3], [=](int64_t r, int64_t c) {
        return dy[r * C + c] * branch[r * C + c] * (factor ? factor[r / P] : T(1));
    });
}

// x (B, H, W, C) -> patches (B, H', W', C, K, K) of a convolution with kernel K, padded by K / 2 zeros. Sizes: B,
// H, W, C, K, the stride, and whether to write x instead, as the gradient for the gradient in `patches`.
template <class T>
void patches(T** t, const int64_t* n, const double*) {
    const int64_t B = n[0], H = n[1], W = n[2], C = n[3], K = n[4], stride = n[5], R = K / 2, area = K * K;
    const int64_t high = (H - 1) / stride + 1, wide = (W - 1) / stride + 1;
    const bool adjoint = n[6];
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < B; b++) {
        T *image = t[0] + b * H * W * C, *patch = t[1] + b * high * wide * C * area;
        if (adjoint) std::fill(image, image + H * W * C, T(0));
        for (int64_t p = 0; p < high * wide; p++, patch += C * area) {
            for (int64_t tap = 0; tap < area; tap++) {
                const int64_t h = p / wide * stride + tap / K - R, w = p % wide * stride + tap % K - R;
                const bool inside = h >= 0 && h < H && w >= 0 && w < W;
                T *pixel = image + (h * W + w) * C, *to = patch + tap;
                if (adjoint) {
                    for (int64_t c = 0; inside && c < C; c++) pixel[c] += to[c * area];
                } else {
                    for (int64_t c = 0; c < C; c++) to[c * area] = inside ? pixel[c] : T(0);
                }
            }
        }
    }
}

EXPORT(layer_norm)
EXPORT(layer_norm_backward)
EXPORT(batch_norm)
EXPORT(batch_norm_backward)
EXPORT(linear)
EXPORT(linear_backward)
EXPORT(context)
EXPORT(context_backward)
EXPORT(residual)
EXPORT(residual_scale)
EXPORT(multiply)
EXPORT(patches)
