// In training a product of torch stands before and behind every pass, and torch's OpenMP threads still spin for the
// next one. Threads of our own would fight them for the cores; so these passes run on them. The entry is handed in from
// Python (`library.py`), because the copy of OpenMP that torch brings must be the one that is called. Without it the
// pool of pool.cpp does the same.

#include "team.h"

#include <atomic>

namespace hanlin {
namespace {

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel, which LLVM's OpenMP has too
std::atomic<Parallel> parallel{nullptr};

struct Round {
    Part run;
    const void* job;
    int parts;
    std::atomic<int> next{0};
};

void take(void* given) {
    Round& round = *(Round*)given;
    for (int part; (part = round.next.fetch_add(1, std::memory_order_relaxed)) < round.parts;)
        round.run(round.job, part);
}

}  // namespace

void together(Part run, const void* job, int parts) {
    const Parallel start = parallel.load(std::memory_order_relaxed);
    if (!start || parts < 2) return share(run, job, parts, true);
    Round round{run, job, parts};
    start(take, &round, 0, 0);  // 0: as many threads as torch takes
}

}  // namespace hanlin

extern "C" void hanlin_team(void* start) { hanlin::parallel = (hanlin::Parallel)start; }
