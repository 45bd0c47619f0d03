// Threads for products that are worth sharing.
//
// Nobody is handed a piece: the caller and the helpers take parts from one counter, so a helper that sleeps, or whose
// core does something else, costs nothing. Helpers spin for a moment after a job, because the next product of a token
// comes soon, and then sleep; to wake one costs the caller 25 us (measured in a virtual machine). A forked process begins
// without helpers, and its callers do all parts.
//
// OpenMP's pool is not used: it waits at a barrier for every thread, and libgomp stops spinning when the threads of all
// its pools (each calling thread has one) outnumber the cores.

#include "pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hanlin {
namespace {

constexpr auto SPIN = std::chrono::milliseconds(2);  // a step's sampling and Python lie between two products

// Waiting for microseconds. Now and then the core is offered to whoever else wants it: to the very thread that is
// waited for, when other programs keep the cores busy.
inline void breathe(unsigned spins) {
#if defined(__x86_64__)
    _mm_pause();
#endif
    if (spins % 64 == 63) std::this_thread::yield();
}

struct Pool {
    std::atomic<uint64_t> ticket{0};  // job number << 32 | parts nobody has taken
    std::atomic<int> unfinished{0};
    Part run = nullptr;  // these two change only while no part is taken or unfinished
    const void* job = nullptr;
    std::atomic<int> helpers{0}, asleep{0};
    std::mutex owner, mutex;
    std::condition_variable wake;

    // Takes a part of the current job and computes it; false where none is left.
    bool help() {
        uint64_t seen = ticket.load(std::memory_order_acquire);
        do {
            if (!uint32_t(seen)) return false;
        } while (!ticket.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel, std::memory_order_acquire));
        run(job, int(uint32_t(seen)) - 1);  // holding an unfinished part, so `run` and `job` stay
        unfinished.fetch_sub(1, std::memory_order_release);
        return true;
    }

    void serve() {
        auto last = std::chrono::steady_clock::now();
        for (unsigned spins = 0;; spins++) {
            if (help()) {
                last = std::chrono::steady_clock::now();
            } else if (spins % 64 == 0 && std::chrono::steady_clock::now() - last > SPIN) {
                std::unique_lock<std::mutex> lock(mutex);
                asleep++;
                wake.wait(lock, [&] { return uint32_t(ticket.load()) != 0; });
                asleep--;
            } else {
                breathe(spins);
            }
        }
    }
};

Pool*& current() {
    static Pool* only = new Pool;  // never destroyed: helpers may still look at it when the process ends
    return only;
}

Pool& pool() { return *current(); }

void forget() { current() = new Pool; }  // in a forked process: locks may be held by threads that do not exist there

}  // namespace

int threads() { return pool().helpers + 1; }

void share(Part run, const void* job, int parts, bool large) {
    Pool& p = pool();
    std::unique_lock<std::mutex> alone(p.owner, std::defer_lock);
    if (parts < 2 || !p.helpers || !alone.try_lock()) {
        for (int part = 0; part < parts; part++) run(job, part);
        return;
    }
    p.run = run, p.job = job;
    p.unfinished.store(parts, std::memory_order_relaxed);
    p.ticket.store(((p.ticket.load(std::memory_order_relaxed) >> 32) + 1) << 32 | uint32_t(parts));
    if (large && p.asleep.load()) {
        { std::lock_guard<std::mutex> lock(p.mutex); }
        p.wake.notify_all();
    }
    while (p.help()) {
    }
    for (unsigned spins = 0; p.unfinished.load(std::memory_order_acquire); spins++) breathe(spins);
}

}  // namespace hanlin

// At least `count` threads share a job from now on, the calling one included.
extern "C" void hanlin_threads(int count) {
    hanlin::Pool& p = hanlin::pool();
    std::lock_guard<std::mutex> alone(p.owner);
#if defined(__unix__) || defined(__APPLE__)
    static const int registered = pthread_atfork(nullptr, nullptr, hanlin::forget);
    (void)registered;
#endif
    for (; p.helpers < count - 1; p.helpers++) std::thread([&p] { p.serve(); }).detach();
}
