// Attention of one new token a sequence over a cache (slots, kv_heads, room, width), where each sequence has its own
// length. The new key and value are written first.
//
// The query heads of a key head go through the keys together, 64 keys at a time, so keys and values are read once; the
// softmax runs in fp32 and is rescaled when a block brings a larger score (arXiv:2205.14135). Blocks are counted from
// the first visible key: a sequence's result depends on nothing but itself.

#include <algorithm>
#include <limits>
#include <vector>

#include "pool.h"
#include "vectors.h"

using namespace hanlin;

// The same fields in the same order as `Decode` in attention.py.
struct Decode {
    const int64_t* lengths;  // (rows,) tokens held before this one
    int64_t rows, slot, room, heads, kv_heads, width, value_width, window;  // slot: of row 0; window 0: all
    float scale;
};

namespace {

constexpr int64_t KEYS = 64;          // in a block
constexpr int64_t WORTH = 256 << 10;  // bytes of keys and values, from which threads share
constexpr int64_t LARGE = 1 << 20;    // and from which those that sleep are woken

template <class T>
struct Job {
    const Decode* d;
    const T *q, *k, *v;
    int64_t q_stride, k_stride, v_stride;
    T *keys, *values, *out;
};

template <class T>
float dot(const float* q, const T* k, int64_t width) {
    Floats s = {};
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) s += load(q + i) * load(k + i);
    if (i < width) s += load(q + i) * load_part(k + i, width - i);
    return sum(s);
}

// sums (width) += weights (count) times values (count, width), four vectors at a time.
template <int N, class T>
void gather(float* sums, const float* weights, const T* values, int64_t count, int64_t width) {
    Floats s[N];
    for (int i = 0; i < N; i++) s[i] = load(sums + i * LANES);
    for (int64_t key = 0; key < count; key++) {
        const Floats w = spread(weights[key]);
        for (int i = 0; i < N; i++) s[i] += w * load(values + key * width + i * LANES);
    }
    for (int i = 0; i < N; i++) store(sums + i * LANES, s[i]);
}

template <class T>
void gather_all(float* sums, const float* weights, const T* values, int64_t count, int64_t width) {
    int64_t i = 0;
    for (; i + 4 * LANES <= width; i += 4 * LANES) gather<4>(sums + i, weights, values + i, count, width);
    for (; i + LANES <= width; i += LANES) gather<1>(sums + i, weights, values + i, count, width);
    if (i < width) {
        Floats s = load(sums + i);
        for (int64_t key = 0; key < count; key++)
            s += spread(weights[key]) * load_part(values + key * width + i, width - i);
        store(sums + i, s);
    }
}

template <class T>
void attend(const void* given, int part) {
    const Job<T>& job = *(const Job<T>*)given;
    const Decode& d = *job.d;
    const int64_t row = part / d.kv_heads, head = part % d.kv_heads, group = d.heads / d.kv_heads;
    const int64_t D = d.width, V = d.value_width, place = ((d.slot + row) * d.kv_heads + head) * d.room;
    const int64_t end = d.lengths[row] + 1, begin = d.window ? std::max<int64_t>(0, end - d.window) : 0;
    T *keys = job.keys + place * D, *values = job.values + place * V;
    memcpy(keys + (end - 1) * D, job.k + row * job.k_stride + head * D, D * sizeof(T));
    memcpy(values + (end - 1) * V, job.v + row * job.v_stride + head * V, V * sizeof(T));

    const int64_t wide = (D + LANES - 1) / LANES * LANES, wide_v = (V + LANES - 1) / LANES * LANES;
    static thread_local std::vector<float> scratch;
    scratch.assign(group * (wide + wide_v + KEYS + 2), 0.0f);
    float *q = scratch.data(), *sums = q + group * wide, *scores = sums + group * wide_v;
    float *top = scores + group * KEYS, *total = top + group;
    const T* from = job.q + row * job.q_stride + head * group * D;
    for (int64_t g = 0; g < group; g++) {
        for (int64_t i = 0; i < D; i += LANES)
            store(q + g * wide + i, load_up_to(from + g * D + i, D - i) * d.scale);
        top[g] = -std::numeric_limits<float>::infinity();
    }
    for (int64_t first = begin; first < end; first += KEYS) {
        const int64_t count = std::min(KEYS, end - first);
        for (int64_t key = 0; key < count; key++)
            for (int64_t g = 0; g < group; g++)
                scores[g * KEYS + key] = dot(q + g * wide, keys + (first + key) * D, D);
        for (int64_t g = 0; g < group; g++) {
            float *s = scores + g * KEYS, before = top[g];
            for (int64_t key = count; key < KEYS; key++) s[key] = -std::numeric_limits<float>::infinity();
            Floats high = load(s);
            for (int64_t i = LANES; i < KEYS; i += LANES) high = load(s + i) > high ? load(s + i) : high;
            top[g] = std::max(before, largest(high));
            Floats mass = {};
            for (int64_t i = 0; i < KEYS; i += LANES) {
                Floats weight = exponential(load(s + i) - top[g]);
                mass += load(s + i) == -std::numeric_limits<float>::infinity() ? Floats{} : weight;
                store(s + i, weight);
            }
            const float shrink = first == begin ? 0.0f : std::exp(before - top[g]);
            total[g] = total[g] * shrink + sum(mass);
            if (shrink != 1.0f)
                for (int64_t i = 0; i < wide_v; i += LANES)
                    store(sums + g * wide_v + i, load(sums + g * wide_v + i) * shrink);
            gather_all(sums + g * wide_v, s, values + first * V, count, V);
        }
    }
    T* out = job.out + (row * d.heads + head * group) * V;
    for (int64_t g = 0; g < group; g++)
        for (int64_t i = 0; i < V; i += LANES)
            store_up_to(out + g * V + i, load(sums + g * wide_v + i) / total[g], V - i);
}

template <class T>
void attend_all(const Job<T>& job) {
    const Decode& d = *job.d;
    int64_t held = 0;
    for (int64_t row = 0; row < d.rows; row++) {
        const int64_t length = d.lengths[row] + 1;
        held += d.window ? std::min(d.window, length) : length;
    }
    const int parts = int(d.rows * d.kv_heads);
    const int64_t bytes = held * d.kv_heads * (d.width + d.value_width) * int64_t(sizeof(T));
    if (bytes >= WORTH) return share(attend<T>, &job, parts, bytes >= LARGE);
    for (int part = 0; part < parts; part++) attend<T>(&job, part);
}

}  // namespace

extern "C" {

// q (rows, heads, width), k (rows, kv_heads, width), v (rows, kv_heads, value_width): heads one behind the other, rows
// by their strides in numbers -> out (rows, heads, value_width), contiguous.
#define HANLIN_ATTEND(NAME, T)                                                                                        \
    void hanlin_attend_##NAME(const Decode* d, const T* q, int64_t q_stride, const T* k, int64_t k_stride,            \
                              const T* v, int64_t v_stride, T* keys, T* values, T* out) {                             \
        attend_all(Job<T>{d, q, k, v, q_stride, k_stride, v_stride, keys, values, out});                              \
    }

HANLIN_ATTEND(f32, float)
HANLIN_ATTEND(bf16, bf16)
}
