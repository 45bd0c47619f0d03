// The cross-entropy of rows of logits and its slope, written over the logits: one visit of each row while it is in the
// cache, where a chain of operations makes eight passes over memory.
//
//     L = log sum exp z      cost = L - (1 - e) z_y - e mean(z) + c L^2      slope = p (1 + 2 c L) - (1 - e) [y] - e / V

#include <vector>

#include "team.h"
#include "vectors.h"

using namespace hanlin;

namespace {

template <class T>
struct Job {
    T* z;
    const int64_t* targets;
    int64_t vocabulary, wanted;
    float smoothing, z_loss;
    float* cost;
};

template <class T>
void row(const void* given, int index) {
    const Job<T>& job = *(const Job<T>*)given;
    const int64_t V = job.vocabulary, target = job.targets[index], whole = V / LANES * LANES;
    T* z = job.z + index * V;
    static thread_local std::vector<float> scratch;
    if (int64_t(scratch.size()) < V) scratch.resize(V);
    float* powers = scratch.data();
    Floats high = spread(-INFINITY), high2 = high, total = {}, total2 = {};
    int64_t i = 0;
    for (; i + 2 * LANES <= V; i += 2 * LANES) {
        Floats a = load(z + i), b = load(z + i + LANES);
        high = a > high ? a : high;
        high2 = b > high2 ? b : high2;
        if (job.smoothing) total += a, total2 += b;
    }
    float top = largest(high > high2 ? high : high2), tail = 0;
    for (; i < V; i++) {
        const float value = load_part(z + i, 1)[0];
        top = value > top ? value : top;
        tail += value;
    }
    const float mean = job.smoothing ? (sum(total + total2) + tail) / float(V) : 0.0f;
    const float at_target = load_part(z + target, 1)[0];
    Floats mass = {};
    for (i = 0; i < whole; i += LANES) {
        Floats power = exponential(load(z + i) - top);
        mass += power;
        store(powers + i, power);
    }
    float norm = sum(mass);
    for (; i < V; i++) norm += powers[i] = exponential(spread(load_part(z + i, 1)[0] - top))[0];
    const float log_norm = std::log(norm) + top;
    job.cost[index] = log_norm - at_target + job.smoothing * (at_target - mean) + job.z_loss * log_norm * log_norm;
    if (!job.wanted) return;
    const float factor = (1.0f + 2.0f * job.z_loss * log_norm) / norm, even = job.smoothing / float(V);
    const float own = powers[target] * factor - even + (job.smoothing - 1.0f);
    for (i = 0; i < V; i += LANES) store_up_to(z + i, load_up_to(powers + i, V - i) * factor - even, V - i);
    store_part(z + target, spread(own), 1);
}

template <class T>
void all(T* z, const int64_t* targets, int64_t rows, int64_t vocabulary, float smoothing, float z_loss, int64_t wanted,
         float* cost) {
    const Job<T> job{z, targets, vocabulary, wanted, smoothing, z_loss, cost};
    together(row<T>, &job, int(rows));
}

}  // namespace

extern "C" {

// z (rows, vocabulary), contiguous, becomes the slope if it is wanted; targets (rows,) in the vocabulary -> cost (rows,).
void hanlin_cross_entropy_f32(float* z, const int64_t* targets, int64_t rows, int64_t vocabulary, float smoothing,
                              float z_loss, int64_t wanted, float* cost) {
    all(z, targets, rows, vocabulary, smoothing, z_loss, wanted, cost);
}
void hanlin_cross_entropy_bf16(bf16* z, const int64_t* targets, int64_t rows, int64_t vocabulary, float smoothing,
                               float z_loss, int64_t wanted, float* cost) {
    all(z, targets, rows, vocabulary, smoothing, z_loss, wanted, cost);
}
}
