// The product of two matrices of any layout. Paddle's matrix product comes from a library that takes a slow path on
// processors of other vendors, and whose second thread pool spins and competes with the threads here.
//
// Every element of the result is summed in the same order for any number of threads.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <new>

#include "simd.h"

// Uninitialized memory that is freed at the end of the scope.
template <class T>
struct Buffer {
    T* data;
    explicit Buffer(int64_t count) : data((T*)std::aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64)) {
        if (!data) throw std::bad_alloc();
    }
    ~Buffer() { std::free(data); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
};

// Element (i, j) is at data[i * row + j * column]. One of the two steps is 1.
template <class T>
struct Matrix {
    const T* data;
    int64_t row, column;
};

// The tile that one run of the innermost loop computes in registers: 6 rows of two vectors use 12 of 16 registers.
#if defined(__AVX512F__)
constexpr int TILE_ROWS = 12;
#else
constexpr int TILE_ROWS = 6;
#endif
template <class T>
constexpr int64_t TILE_COLUMNS = 2 * LANES<T>;
constexpr int64_t DEPTH = 256;  // depth of a piece, so that a panel of b, DEPTH x TILE_COLUMNS, stays in the L1 cache

constexpr int64_t STRIP = TILE_ROWS * DEPTH + 16;  // a copied strip of a; strips do not share sets of the L1 cache

// c += a b for one tile, of which `rows` x `columns` are inside the matrix and `columns` is at most HALVES vectors.
// Row k of b begins at b + k * step. If `first`, c = bias + a b.
template <int HALVES, class T>
__attribute__((always_inline)) inline void tile(int64_t depth, Matrix<T> a, const T* b, int64_t step, T* c,
                                                int64_t stride, int64_t rows, int64_t columns, bool first,
                                                const T* bias) {
    constexpr int64_t L = LANES<T>;
    const T* from[TILE_ROWS];
    Vector<T> sum[TILE_ROWS][HALVES] = {};
#pragma GCC unroll 16
    for (int r = 0; r < TILE_ROWS; r++) from[r] = a.data + std::min<int64_t>(r, rows - 1) * a.row;
    for (int64_t k = 0; k < depth; k++, b += step) {
        Vector<T> right[HALVES];
#pragma GCC unroll 2
        for (int half = 0; half < HALVES; half++) right[half] = load(b + half * L);
#pragma GCC unroll 16
        for (int r = 0; r < TILE_ROWS; r++) {
            const T factor = from[r][k * a.column];
#pragma GCC unroll 2
            for (int half = 0; half < HALVES; half++) sum[r][half] += factor * right[half];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < TILE_ROWS; r++) {
        if (r >= rows) return;
        T* to = c + r * stride;
#pragma GCC unroll 2
        for (int half = 0; half < HALVES; half++) {
            const int64_t count = columns - half * L;
            if (count <= 0) break;
            Vector<T> start = {};
            if (!first) start = load_some(to + half * L, count);
            if (first && bias) start = load_some(bias + half * L, count);
            store_some(to + half * L, start + sum[r][half], count);
        }
    }
}

struct Nothing {
    void operator()(int64_t, int64_t, int64_t) const {}
};

// c (rows x columns, dense) = a (rows x depth) b (depth x columns) + bias (columns, or null), unless c is null.
// `finish(row, column, count)` is called for every finished piece of a row while the piece is in the cache.
template <class T, class Finish = Nothing>
void matmul(int64_t rows, int64_t columns, int64_t depth, Matrix<T> a, Matrix<T> b, T* c, const T* bias = nullptr,
            Finish finish = {}) {
    if (!c) return;
    constexpr int64_t N = TILE_COLUMNS<T>;
    const int64_t panels = (columns + N - 1) / N, strips = (rows + TILE_ROWS - 1) / TILE_ROWS;
    const bool direct = strips <= 4 && b.column == 1 && columns % N == 0;  // too few rows to pack b
    const bool gather = a.row == 1 && a.column != 1;  // a is transposed: copy the rows of a strip together
    // Computing the transposed product may take less time than packing b.
    const bool transposed = b.row == 1 && b.column != 1;
    if (transposed ? columns * depth > rows * (columns + depth) : gather && !direct && columns > 2 * rows && depth > 8 * rows) {
        Buffer<T> turned(rows * columns);
        matmul<T>(columns, rows, depth, {b.data, b.column, b.row}, {a.data, a.column, a.row}, turned.data);
#pragma omp parallel for schedule(static) if (rows * columns > 50000)
        for (int64_t i0 = 0; i0 < rows; i0 += 16) {
            const int64_t i1 = std::min(rows, i0 + 16);
            for (int64_t j0 = 0; j0 < columns; j0 += 16) {
                const int64_t j1 = std::min(columns, j0 + 16);
                for (int64_t i = i0; i < i1; i++) {
                    for (int64_t j = j0; j < j1; j++) c[i * columns + j] = turned.data[j * rows + i] + (bias ? bias[j] : T(0));
                }
            }
            for (int64_t i = i0; i < i1; i++) finish(i, 0, columns);
        }
        return;
    }
    const int64_t step = direct ? b.row : N;
    // A task is a group of row strips times a group of column panels. Every thread gets a few tasks.
    const int64_t threads = omp_get_max_threads(), wanted = 4 * threads;
    const int64_t strips_each = std::clamp<int64_t>(strips * std::min(panels, wanted) / wanted, 1, 16);
    const int64_t row_tasks = (strips + strips_each - 1) / strips_each;
    const int64_t panels_each = std::clamp<int64_t>(panels * row_tasks / wanted, 1, panels);
    const int64_t column_tasks = (panels + panels_each - 1) / panels_each;
    Buffer<T> packed(direct ? 0 : panels * N * depth), strips_packed(gather ? threads * strips_each * STRIP : 0);
#pragma omp parallel if (rows * columns * depth > 500000)  // about 20 microseconds, as long as synchronizing
    {
        // Pack b in panels of depth x N, padded with zeros, in pieces of DEPTH rows.
        const int64_t pieces = (depth + DEPTH - 1) / DEPTH;
#pragma omp for collapse(2) schedule(static)
        for (int64_t panel = 0; panel < (direct ? 0 : panels); panel++) {
            for (int64_t piece = 0; piece < pieces; piece++) {
                const int64_t j0 = panel * N, count = std::min(N, columns - j0);
                const int64_t k0 = piece * DEPTH, k1 = std::min(depth, k0 + DEPTH);
                T* to = packed.data + panel * N * depth;
                if (b.column == 1) {
                    for (int64_t k = k0; k < k1; k++) {
                        for (int64_t half = 0; half < N; half += LANES<T>) {
                            Vector<T> v = {};
                            if (count > half) v = load_some(b.data + k * b.row + j0 + half, count - half);
                            store(to + k * N + half, v);
                        }
                    }
                } else {
                    for (int64_t j = 0; j < N; j++) {
                        const T* from = b.data + (j0 + std::min(j, count - 1)) * b.column;
                        for (int64_t k = k0; k < k1; k++) to[k * N + j] = from[k * b.row];
                    }
                }
            }
        }
        T* strip = strips_packed.data + omp_get_thread_num() * strips_each * STRIP;
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t row_task = 0; row_task < row_tasks; row_task++) {
            for (int64_t column_task = 0; column_task < column_tasks; column_task++) {
                const int64_t i0 = row_task * strips_each * TILE_ROWS;
                const int64_t i1 = std::min(rows, i0 + strips_each * TILE_ROWS);
                const int64_t first = column_task * panels_each, last = std::min(panels, first + panels_each);
                for (int64_t k0 = 0; k0 < depth; k0 += DEPTH) {
                    const int64_t length = std::min(DEPTH, depth - k0);
                    if (gather) {
                        for (int64_t k = 0; k < length; k++) {
                            const T* from = a.data + (k0 + k) * a.column;
                            T* to = strip + k * TILE_ROWS;
                            int64_t i = i0;
                            for (; i + TILE_ROWS <= i1; i += TILE_ROWS, to += STRIP) {
                                std::memcpy(to, from + i, TILE_ROWS * sizeof(T));  // of a size that the compiler knows
                            }
                            if (i < i1) std::memcpy(to, from + i, (i1 - i) * sizeof(T));
                        }
                    }
                    for (int64_t panel = first; panel < last; panel++) {
                        const int64_t j = panel * N;
                        const T* right = direct ? b.data + k0 * step + j : packed.data + panel * N * depth + k0 * N;
                        for (int64_t i = i0; i < i1; i += TILE_ROWS) {
                            Matrix<T> part = {a.data + i * a.row + k0 * a.column, a.row, a.column};
                            if (gather) part = {strip + (i - i0) / TILE_ROWS * STRIP, 1, TILE_ROWS};
                            const int64_t height = std::min<int64_t>(TILE_ROWS, i1 - i), width = columns - j;
                            T* to = c + i * columns + j;
                            const T* start = bias ? bias + j : nullptr;
                            if (width > LANES<T>) {
                                tile<2>(length, part, right, step, to, columns, height, width, k0 == 0, start);
                            } else {
                                tile<1>(length, part, right, step, to, columns, height, width, k0 == 0, start);
                            }
                        }
                    }
                }
                const int64_t left = first * N, right = std::min(columns, last * N);
                for (int64_t i = i0; i < i1; i++) finish(i, left, right - left);
            }
        }
    }
}
