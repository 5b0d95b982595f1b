// Declarations that the source files of the training operators share.
#pragma once

#include <vector>

#include "matmul.h"

// Number of elements from which an elementwise operation uses several threads. Threads wait for the slowest at the
// end, which on a busy machine takes far longer than the work itself.
constexpr int64_t WORTH_SHARING = 1 << 15;

// Each operator takes its tensors (inputs first), its sizes and other numbers.
template <class T>
using Operator = void(T**, const int64_t*, const double*);

// The entry point from Python. Returns 0, or 1 if memory ran out.
template <class T>
int guarded(Operator<T>* operation, T** tensors, const int64_t* sizes, const double* options) {
    try {
        operation(tensors, sizes, options);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

#define EXPORT_AS(name, suffix, T)                                                                     \
    extern "C" int fcvit_##name##_##suffix(T** tensors, const int64_t* sizes, const double* options) { \
        return guarded(name<T>, tensors, sizes, options);                                              \
    }
#define EXPORT(name) EXPORT_AS(name, float32, float) EXPORT_AS(name, float64, double)

// out[c] = sum over rows r of term(r, c), unless out is null. Runs of 64 rows are summed in T, and the runs in double.
template <class T, class Term>
void column_sums(int64_t rows, int64_t columns, T* out, Term term) {
    if (!out) return;
    constexpr int64_t RUN = 64;
    const int64_t runs = (rows + RUN - 1) / RUN, parts = std::clamp<int64_t>(runs, 1, 16);  // for any thread count
    std::vector<double> totals(parts * columns, 0.0);
    const int threads = omp_get_max_threads();
    std::vector<T> sums(threads * columns);
#pragma omp parallel for schedule(static) if (rows * columns > WORTH_SHARING)
    for (int64_t part = 0; part < parts; part++) {
        T* sum = sums.data() + omp_get_thread_num() * columns;
        double* total = totals.data() + part * columns;
        for (int64_t run = runs * part / parts; run < runs * (part + 1) / parts; run++) {
            std::fill(sum, sum + columns, T(0));
            for (int64_t r = run * RUN; r < std::min(rows, (run + 1) * RUN); r++) {
#pragma omp simd
                for (int64_t c = 0; c < columns; c++) sum[c] += term(r, c);
            }
            for (int64_t c = 0; c < columns; c++) total[c] += sum[c];
        }
    }
    for (int64_t part = 1; part < parts; part++) {
        for (int64_t c = 0; c < columns; c++) totals[c] += totals[part * columns + c];
    }
    for (int64_t c = 0; c < columns; c++) out[c] = T(totals[c]);
}
