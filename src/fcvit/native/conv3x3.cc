// Convolutions of dense heads for training, channels last, by Winograd's method.
#include "matmul.h"
#include "winograd.h"

// x (B, H, W, C), weight (N, C, 3, 3), bias (N) or null -> y (B, H, W, N). With n[5], the gradient of the input instead:
// x is dy, C and N are exchanged, and the weight is (C, N, 3, 3).
extern "C" int fcvit_conv3x3_float32(float** t, const int64_t* n, const double*) try {
    const float *x = t[0], *weight = t[1], *bias = t[2];
    float* y = t[3];
    const int64_t B = n[0], H = n[1], W = n[2], C = n[3], N = n[4];
    const bool gradient = n[5];
    const Winograd winograd(B, H, W, C, N, omp_get_max_threads());
    const int64_t scratch = winograd.scratch_size();
    Buffer<float> packed(winograd.packed_size(C, N)), scratches(omp_get_max_threads() * scratch);
    const Strides from = {winograd.L, H * W * C, W * C, C}, to = {winograd.L, H * W * N, W * N, N};
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < winograd.panels; panel++) {
            winograd.pack(weight, gradient ? 9 : 9 * C, gradient ? 9 * N : 9, gradient, bias, C, N, panel, packed.data);
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < winograd.tasks; task++) {
            winograd.run(task, x, from, packed.data, false, y, to, scratches.data + omp_get_thread_num() * scratch);
        }
    }
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}
