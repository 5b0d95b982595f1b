// The forward pass of a network on a CPU, from folded and packed weights.
//
// `fcvit.inference.native_network` writes a network as a list of operations on maps in an arena, and this file runs it.
// A thread computes a group of images alone. If there are fewer groups than threads, several threads form a team that
// shares a group. They divide the work of every operation and wait for each other between operations. All sums are
// added in an order that does not depend on the number of threads.

#include <chrono>
#include <stdexcept>
#include <vector>

#include "heads.h"

namespace {

// The operations by the number in `Op::kind`, and the floats of scratch memory that a thread needs for each, or null.
struct Kind {
    void (*run)(const Op&, const Worker&);
    int64_t (*scratch)(const Op&, int64_t images);
};

const Kind KINDS[] = {
    {image},
    {stem},
    {downsample, [](const Op& o, int64_t) { return 2 * 9 * vectors_of(o.channels); }},
    {tokens,
     [](const Op& o, int64_t images) {
         const int64_t width = vectors_of(o.channels) * L, row = (o.width + o.kernel) * L;
         return images * Mixing::size(o) + std::max(2 * width + 6 * padded(o.inner) + 4 * L, o.height * row);
     }},
    {pointwise,
     [](const Op& o, int64_t) {
         return padded(2 * vectors_of(o.channels)) + padded(2 * vectors_of(o.inner)) + (vectors_of(o.inner) + 1) * STRIP * L;
     }},
    {norm},
    {mixer,
     [](const Op& o, int64_t images) {
         const int64_t C = vectors_of(o.channels), I = std::min(o.inner, o.group) / L + 1, P = images * o.height * o.width;
         if (o.z >= 0) return padded(2 * std::max(C, I)) + 2 * L * (P + images * o.height * (o.width + o.kernel));
         const int64_t width = std::min(o.width, WIDE), step = std::max<int64_t>(1, STRIP / ((width + 1) / 2));
         return padded(2 * C) + padded(2 * I) + (I + 1) * L * ((step + o.kernel) * (width + o.kernel) + step * width);
     }},
    {pool},
    {output},
    {features},
    {convolution,
     [](const Op& o, int64_t images) {
         int64_t most = 0;  // not always that for the most images
         for (int64_t i = 1; i <= images; i++) most = std::max(most, winograd(o, i, 1).scratch_size());
         return most;
     }},
    {resize, [](const Op& o, int64_t) { return o.wide * PLACE; }},
    {enlarge, [](const Op& o, int64_t) { return padded(o.wide * PLACE) + 2 * o.wide; }},
};

struct Run {
    const Op* ops;
    int64_t count, floats;  // number of operations, and size of the arena for one image
    float* memory;
    const void* input;
    bool bytes;
    float* const* outputs;
    double* seconds;  // of each operation, or null

    int64_t scratch(int64_t group) const {
        int64_t most = 0;
        for (const Op* op = ops; op < ops + count; op++) {
            if (KINDS[op->kind].scratch) most = std::max(most, KINDS[op->kind].scratch(*op, group));
        }
        return padded(most);
    }

    // Computes the images `first` to `first + images` in groups, with `teams` teams of `size` threads.
    void compute(int64_t first, int64_t images, int64_t group, int64_t teams, int64_t size) const {
        const int64_t arena = padded(floats * group), own = scratch(group);
        std::vector<Team> all(teams);
        for (int64_t i = 0; i < teams; i++) all[i].size = size, all[i].arena = memory + i * (arena + size * own);
        const int64_t groups = (images + group - 1) / group;
        std::atomic<int64_t> next{0};
        auto work = [&](int64_t thread) {
            Team& team = all[thread / size];
            const int64_t index = thread % size;
            const Worker w = {team, index, team.arena + arena + index * own, input, bytes, outputs};
            while (true) {
                team.wait();
                if (index == 0) {
                    const int64_t g = next.fetch_add(1);
                    team.first = first + images * g / groups;
                    team.images = g < groups ? first + images * (g + 1) / groups - team.first : 0;
                }
                team.wait();
                if (team.images == 0) return;
                for (int64_t i = 0; i < count; i++) {
                    const auto start = std::chrono::steady_clock::now();
                    KINDS[ops[i].kind].run(ops[i], w);
                    team.wait();
                    if (seconds && thread == 0) {
                        seconds[i] += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
                    }
                }
            }
        };
        std::atomic<int> state{0};  // 0: threads are being created, 1: all exist, -1: one could not be created
        std::vector<std::thread> threads;
        try {
            for (int64_t thread = 1; thread < teams * size; thread++) {
                threads.emplace_back([&, thread] {
                    while (!state) std::this_thread::yield();
                    if (state > 0) work(thread);
                });
            }
            state = 1;
            work(0);
        } catch (const std::exception&) {
            state = -1;
        }
        for (std::thread& thread : threads) thread.join();
        if (state < 0) throw std::runtime_error("no thread");
    }
};

}  // namespace

extern "C" int64_t fcvit_lanes() { return L; }

// Returns the number of floats of memory for a run.
extern "C" int64_t fcvit_engine_memory(const Op* ops, int64_t count, int64_t floats, int64_t group, int64_t threads) {
    return threads * (padded(floats * group) + Run{ops, count}.scratch(group));
}

// Runs operations on a batch, in memory that begins at a cache line. `group` images are computed together. Returns 0,
// or 1 if threads could not be created.
extern "C" int fcvit_engine_run(const Op* ops, int64_t count, int64_t floats, float* memory, const void* input, int64_t bytes,
                     int64_t images, int64_t group, int64_t threads, float* const* outputs, double* seconds) {
    try {
        const Run run = {ops, count, floats, memory, input, bytes != 0, outputs, seconds};
        const int64_t groups = (images + group - 1) / group, rest = groups % threads;
        // Whole rounds with a group for each thread, then teams for the rest.
        const int64_t alone = std::min(images, (groups - rest) * group);
        if (alone) run.compute(0, alone, group, threads, 1);
        if (images > alone) run.compute(alone, images - alone, group, rest, threads / rest);
        return 0;
    } catch (const std::exception&) {
        return 1;
    }
}
