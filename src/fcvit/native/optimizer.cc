// AdamW and EMA weights: one call updates all parameters.

#include "operators.h"

// For each parameter: its values, gradient (null: the parameter is skipped), first and second moment. Sizes: the number
// of parameters, then their sizes. Options: beta1, beta2, epsilon, highest norm of all gradients together (0: none),
// then for each parameter its learning rate, weight decay, 1 - beta1^t and 1 - beta2^t.
template <class T>
void adamw(T** t, const int64_t* n, const double* options) {
    const int64_t count = n[0];
    const T beta1 = T(options[0]), rest1 = T(1 - options[0]), beta2 = T(options[1]), rest2 = T(1 - options[1]);
    const T eps = T(options[2]);
    T scale = 1;
    if (const double highest = options[3]) {
        std::vector<double> squares(count, 0.0);
#pragma omp parallel for schedule(dynamic)
        for (int64_t i = 0; i < count; i++) {
            const T* g = t[4 * i + 1];
            double sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < (g ? n[1 + i] : 0); j++) sum += double(g[j]) * g[j];
            squares[i] = sum;
        }
        double total = 0;
        for (const double square : squares) total += square;
        const double norm = std::sqrt(total);
        if (!(norm <= highest)) scale = T(highest / norm);  // NaN stays NaN
    }
#pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < count; i++) {
        T *p = t[4 * i], *m = t[4 * i + 2], *v = t[4 * i + 3];
        const T* gradient = t[4 * i + 1];
        if (!gradient) continue;
        const double* own = options + 4 + 4 * i;
        const T keep = T(1 - own[0] * own[1]), step = T(own[0] / own[2]), inverse = T(1 / std::sqrt(own[3]));
#pragma omp simd
        for (int64_t j = 0; j < n[1 + i]; j++) {
            const T g = gradient[j] * scale;
            m[j] = beta1 * m[j] + rest1 * g;
            v[j] = beta2 * v[j] + rest2 * g * g;
            p[j] = p[j] * keep - step * m[j] / (std::sqrt(v[j]) * inverse + eps);
        }
    }
}

// For each tensor: its values and its target. Moves it by the share options[0] of the distance to the target.
template <class T>
void lerp(T** t, const int64_t* n, const double* options) {
    const T share = T(options[0]);
#pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < n[0]; i++) {
        T* x = t[2 * i];
        const T* target = t[2 * i + 1];
#pragma omp simd
        for (int64_t j = 0; j < n[1 + i]; j++) x[j] += share * (target[j] - x[j]);
    }
}

EXPORT(adamw)
EXPORT(lerp)
