// A whole block in one call each way. All intermediate results that the gradient needs are in one piece of memory, the
// arena. The operators are those of `operators.cc`.

#include <initializer_list>

#include "operators.h"

// The sizes of a block. Each of heads, bottleneck, K[2] and scaled is 0 if the block lacks this part.
struct Sizes {
    int64_t B, H, W, C, mixes, K[3], heads, inner, bottleneck, hidden, scaled, P, R;
    explicit Sizes(const int64_t* n)
        : B(n[0]), H(n[1]), W(n[2]), C(n[3]), mixes(n[4]), K{n[5], n[6], n[7]}, heads(n[8]), inner(n[9]),
          bottleneck(n[10]), hidden(n[11]), scaled(n[12]), P(H * W), R(B * P) {}
};

// The parameters of a block, or their gradients, in the order of `_parameters` in network.py.
template <class T>
struct Parameters {
    struct Layer {
        T *weight = nullptr, *bias = nullptr;
    };
    struct Mix {
        T* context[6];
        Layer depthwise, inner, outer;
    };
    Layer norm[2], fc1, depthwise, fc2;
    Mix mix[2];
    T* scale[2] = {};

    Parameters(T** t, const Sizes& s) {
        const auto layer = [&t](bool exists) {
            if (!exists) return Layer{};
            t += 2;
            return Layer{t[-2], t[-1]};
        };
        norm[0] = layer(true);
        for (int64_t i = 0; i < s.mixes; i++) {
            for (int64_t j = 0; j < (s.heads ? 6 : 0); j++) mix[i].context[j] = *t++;
            mix[i].depthwise = layer(true);
            mix[i].inner = layer(s.bottleneck);
            mix[i].outer = layer(true);
        }
        norm[1] = layer(true);
        fc1 = layer(true);
        depthwise = layer(s.K[2]);
        fc2 = layer(true);
        if (s.scaled) scale[0] = t[0], scale[1] = t[1];
    }
};

// The intermediate results. A slope is the derivative of a GELU.
template <class T>
struct Arena {
    struct Mix {
        T *context, *mixed, *filtered, *inner_slope, *inner, *slope, *y;  // `mixed` includes the context
    };
    T *statistics[2], *normal[2], *middle, *wide, *slope, *active, *branch;
    Mix mix[2];
    int64_t size = 0;

    Arena(T* memory, const Sizes& s) {
        const auto take = [&](int64_t count) {
            T* at = memory ? memory + size : nullptr;
            size += (count + 15) / 16 * 16;  // aligned to a cache line
            return at;
        };
        for (int i = 0; i < 2; i++) statistics[i] = take(2 * s.B), normal[i] = take(s.R * s.C);
        for (int64_t i = 0; i < s.mixes; i++) {
            Mix& m = mix[i];
            m.context = take(s.heads ? s.B * (2 * s.C + 3 * s.inner + s.P * s.heads + 1) : 0);
            m.mixed = s.heads ? take(s.R * s.C) : i ? mix[i - 1].y : normal[0];
            m.filtered = take(s.R * s.C);
            m.inner_slope = take(s.R * s.bottleneck);
            m.inner = s.bottleneck ? take(s.R * s.bottleneck) : m.filtered;
            m.slope = take(s.R * s.C);
            m.y = take(s.R * s.C);
        }
        middle = take(s.R * s.C);
        wide = take(s.K[2] ? s.R * s.hidden : 0);
        slope = take(s.R * s.hidden);
        active = take(s.R * s.hidden);
        branch = take(s.R * s.C);
    }
};

template <class T>
void call(Operator<T>* operation, std::initializer_list<const T*> tensors, std::initializer_list<int64_t> sizes,
          double option = 0) {
    T* t[16] = {};
    std::transform(tensors.begin(), tensors.end(), t, [](const T* p) { return const_cast<T*>(p); });
    operation(t, sizes.begin(), &option);
}

// x, arena, factor of each image for the first and second branch or null, y, parameters
template <class T>
void block(T** t, const int64_t* n, const double* options) {
    const Sizes s(n);
    const T* x = t[0];
    const Arena<T> a(t[1], s);
    const Parameters<T> p(t + 5, s);
    call<T>(layer_norm, {x, p.norm[0].weight, p.norm[0].bias, a.normal[0], a.statistics[0]}, {s.B, s.P, s.C}, options[0]);
    const T* from = a.normal[0];
    for (int64_t i = 0; i < s.mixes; i++) {
        const auto& m = a.mix[i];
        const auto& q = p.mix[i];
        if (s.heads) {
            const auto c = q.context;
            call<T>(context, {from, c[0], c[1], c[2], c[3], c[4], c[5], m.mixed, m.context},
                 {s.B, s.P, s.C, s.heads, s.inner}, options[1]);
        }
        call<T>(depthwise, {m.mixed, q.depthwise.weight, q.depthwise.bias, m.filtered, nullptr},
             {s.B, s.H, s.W, s.C, s.K[i]});
        if (s.bottleneck) {
            call<T>(linear, {m.filtered, q.inner.weight, q.inner.bias, m.inner_slope, m.inner},
                 {s.R, s.C, s.bottleneck, 0});
        }
        call<T>(linear, {m.inner, q.outer.weight, q.outer.bias, m.slope, m.y},
             {s.R, s.bottleneck ? s.bottleneck : s.C, s.C, 0});
        from = m.y;
    }
    call<T>(residual, {x, from, p.scale[0], t[2], a.middle}, {s.B, s.P, s.C});
    call<T>(layer_norm, {a.middle, p.norm[1].weight, p.norm[1].bias, a.normal[1], a.statistics[1]}, {s.B, s.P, s.C},
         options[0]);
    if (s.K[2]) {
        call<T>(linear, {a.normal[1], p.fc1.weight, p.fc1.bias, a.wide, nullptr}, {s.R, s.C, s.hidden, 0});
        call<T>(depthwise, {a.wide, p.depthwise.weight, p.depthwise.bias, a.slope, a.active},
             {s.B, s.H, s.W, s.hidden, s.K[2]});
    } else {
        call<T>(linear, {a.normal[1], p.fc1.weight, p.fc1.bias, a.slope, a.active}, {s.R, s.C, s.hidden, 0});
    }
    call<T>(linear, {a.active, p.fc2.weight, p.fc2.bias, a.branch, nullptr}, {s.R, s.hidden, s.C, 0});
    call<T>(residual, {a.middle, a.branch, p.scale[1], t[3], t[4]}, {s.B, s.P, s.C});
}

// x, arena, factors, dy -> dx. Then the parameters and their gradients.
template <class T>
void block_backward(T** t, const int64_t* n, const double* options) {
    const Sizes s(n);
    const T *x = t[0], *dy = t[4];
    T* dx = t[5];
    const Arena<T> a(t[1], s);
    const Parameters<T> p(t + 6, s), d(t + 6 + n[13], s);
    Buffer<T> wide(s.R * s.hidden), wider(s.K[2] ? s.R * s.hidden : 0), narrow(s.R * std::max(s.bottleneck, s.C));
    Buffer<T> first(s.R * s.C), second(s.R * s.C), middle(s.R * s.C);
    call<T>(residual_backward, {a.branch, p.scale[1], t[3], dy, first.data, d.scale[1]}, {s.B, s.P, s.C});
    call<T>(linear_backward,
         {a.active, p.fc2.weight, nullptr, first.data, wide.data, d.fc2.weight, d.fc2.bias, a.slope},
         {s.R, s.hidden, s.C, 0});
    const T* g = wide.data;
    if (s.K[2]) {
        call<T>(depthwise_backward,
             {a.wide, p.depthwise.weight, nullptr, g, wider.data, d.depthwise.weight, d.depthwise.bias},
             {s.B, s.H, s.W, s.hidden, s.K[2]});
        g = wider.data;
    }
    call<T>(linear_backward, {a.normal[1], p.fc1.weight, nullptr, g, first.data, d.fc1.weight, d.fc1.bias, nullptr},
         {s.R, s.C, s.hidden, 0});
    call<T>(layer_norm_backward,
         {a.middle, p.norm[1].weight, a.statistics[1], first.data, middle.data, d.norm[1].weight, d.norm[1].bias, dy},
         {s.B, s.P, s.C});
    call<T>(residual_backward, {a.mix[s.mixes - 1].y, p.scale[0], t[2], middle.data, first.data, d.scale[0]},
         {s.B, s.P, s.C});
    for (int64_t i = s.mixes - 1; i >= 0; i--) {
        const auto& m = a.mix[i];
        const auto &q = p.mix[i], &e = d.mix[i];
        const int64_t depth = s.bottleneck ? s.bottleneck : s.C;
        const T* slope = s.bottleneck ? m.inner_slope : nullptr;
        call<T>(linear_backward,
             {m.inner, q.outer.weight, m.slope, first.data, narrow.data, e.outer.weight, e.outer.bias, slope},
             {s.R, depth, s.C, 0});
        g = narrow.data;
        if (s.bottleneck) {
            call<T>(linear_backward,
                 {m.filtered, q.inner.weight, nullptr, g, first.data, e.inner.weight, e.inner.bias, nullptr},
                 {s.R, s.C, s.bottleneck, 0});
            g = first.data;
        }
        call<T>(depthwise_backward,
             {m.mixed, q.depthwise.weight, nullptr, g, second.data, e.depthwise.weight, e.depthwise.bias},
             {s.B, s.H, s.W, s.C, s.K[i]});
        if (s.heads) {
            const auto c = q.context, dc = e.context;
            call<T>(context_backward,
                 {i ? a.mix[i - 1].y : a.normal[0], c[0], c[2], c[4], c[5], m.context, second.data, first.data, dc[0],
                  dc[1], dc[2], dc[3], dc[4], dc[5]},
                 {s.B, s.P, s.C, s.heads, s.inner}, options[1]);
        } else {
            std::swap(first.data, second.data);
        }
    }
    call<T>(layer_norm_backward,
         {x, p.norm[0].weight, a.statistics[0], first.data, dx, d.norm[0].weight, d.norm[0].bias, middle.data},
         {s.B, s.P, s.C});
}

EXPORT(block)
EXPORT(block_backward)

// Returns the number of elements in the arena.
extern "C" int64_t fcvit_block_memory(const int64_t* n) { return Arena<float>(nullptr, Sizes(n)).size; }
