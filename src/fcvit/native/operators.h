// Declarations that the source files of the training operators share.
#pragma once

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

#define EXPORT(name)                                                                          \
    extern "C" int fcvit_##name##_float32(float** t, const int64_t* n, const double* o) {     \
        return guarded(name<float>, t, n, o);                                                 \
    }                                                                                         \
    extern "C" int fcvit_##name##_float64(double** t, const int64_t* n, const double* o) {    \
        return guarded(name<double>, t, n, o);                                                \
    }
