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

#define EXPORT_AS(name, suffix, T)                                                                \
    template void name<T>(T**, const int64_t*, const double*); /* for other source files */      \
    extern "C" int fcvit_##name##_##suffix(T** tensors, const int64_t* sizes, const double* options) { \
        return guarded(name<T>, tensors, sizes, options);                                         \
    }
#define EXPORT(name) EXPORT_AS(name, float32, float) EXPORT_AS(name, float64, double)

// Defined in operators.cc, for float and double.
template <class T>
void layer_norm(T**, const int64_t*, const double*);
template <class T>
void layer_norm_backward(T**, const int64_t*, const double*);
template <class T>
void linear(T**, const int64_t*, const double*);
template <class T>
void linear_backward(T**, const int64_t*, const double*);
template <class T>
void depthwise(T**, const int64_t*, const double*);
template <class T>
void depthwise_backward(T**, const int64_t*, const double*);
template <class T>
void context(T**, const int64_t*, const double*);
template <class T>
void context_backward(T**, const int64_t*, const double*);
template <class T>
void residual(T**, const int64_t*, const double*);
template <class T>
void residual_backward(T**, const int64_t*, const double*);
