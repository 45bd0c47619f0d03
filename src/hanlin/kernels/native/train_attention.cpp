// Softmax attention of whole sequences, forward and backward, for training:
//
//     o = softmax(scale * q k^T + bias) v        dv = p^T do    ds = scale * p (do v^T - do o)    dq = ds k    dk = ds^T q
//
// A part is one key head of one row, with its query heads: all that it touches stays in the cache. A block of 64 queries
// meets all keys it may see at once; probabilities are never kept but made again in the backward pass from the logarithm
// of their sum (arXiv:2205.14135), which costs one product in the cache and saves two visits of O(T^2) memory.

#include <algorithm>

#include "desk.h"
#include "team.h"
#include "tiles.h"
#include "vectors.h"

using namespace hanlin;

// The same fields in the same order as `Shape` in train_attention.py.
struct Shape {
    int64_t rows, length, heads, kv_heads, width, value_width;
    int64_t q_row, q_token, k_row, k_token, v_row, v_token;  // strides in numbers; heads stand behind each other
    int64_t bias_row, bias_head;                             // strides of (rows or 1, heads or 1, length, length)
    float scale;
    int32_t causal;
};

namespace {

constexpr int64_t BLOCK = 64;  // queries

// Rows of `width` numbers, `stride` apart -> (padded, wide), the rest zeros.
template <class T>
void gather(const T* from, int64_t stride, int64_t rows, int64_t width, T* to, int64_t padded, int64_t wide) {
    for (int64_t row = 0; row < rows; row++) {
        memcpy(to + row * wide, from + row * stride, width * sizeof(T));
        if (wide > width) memset((void*)(to + row * wide + width), 0, (wide - width) * sizeof(T));
    }
    if (padded > rows) memset((void*)(to + rows * wide), 0, (padded - rows) * wide * sizeof(T));
}

template <class T>
void scatter(const float* from, int64_t wide, int64_t rows, int64_t width, float factor, T* to, int64_t stride) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < width; i += LANES)
            store_up_to(to + row * stride + i, load(from + row * wide + i) * factor, width - i);
}

// scale * scores + bias of the next lanes, -inf from `count` on.
template <class T>
inline Floats score(const float* s, const T* bias, int64_t i, int64_t count, float scale) {
    Floats v = load(s + i) * scale;
    if (bias) v += load_up_to(bias + i, count - i);
    if (count - i < LANES) v = lanes() < int32_t(count - i) ? v : spread(-INFINITY);
    return v;
}

template <class T>
struct Job {
    const Shape* shape;
    const T *q, *k, *v, *bias;
    T* out;
    float* norms;
    const T* grad;
    T *grad_q, *grad_k, *grad_v;
};

template <class T>
struct Place {  // of a part
    const Shape& s;
    const int64_t row, head, group, D, V, T_, wide, wide_v, padded;

    Place(const Shape& s, int part)
        : s(s), row(part / s.kv_heads), head(part % s.kv_heads), group(s.heads / s.kv_heads), D(s.width),
          V(s.value_width), T_(s.length), wide(whole(D)), wide_v(whole(V)), padded(whole(T_)) {}

    int64_t keys_of(int64_t first, int64_t rows) const { return s.causal ? std::min(padded, first + rows) : padded; }
    int64_t seen(int64_t query) const { return s.causal ? query + 1 : T_; }
    const T* bias_of(const T* bias, int64_t h, int64_t query) const {
        return bias ? bias + row * s.bias_row + h * s.bias_head + query * T_ : nullptr;
    }
};

template <class T>
void forward(const void* given, int part) {
    const Job<T>& job = *(const Job<T>*)given;
    const Shape& s = *job.shape;
    const Place<T> p(s, part);
    const int64_t wide = p.wide, wide_v = p.wide_v, padded = p.padded, most = std::max(wide, wide_v);
    Desk desk(padded * (2 * most + 2 * BLOCK) + padded * most + BLOCK * (2 * most + 1));
    T *flat = desk.take<T>(padded * most), *keys = desk.take<T>(padded * wide), *values = desk.take<T>(padded * wide_v);
    T *queries = desk.take<T>(BLOCK * wide), *weights = desk.take<T>(BLOCK * padded);
    float *scores = desk.take<float>(BLOCK * padded), *sums = desk.take<float>(BLOCK * wide_v);
    float inverse[BLOCK];
    [[maybe_unused]] Tiles tiles;
    gather(job.k + p.row * s.k_row + p.head * p.D, s.k_token, p.T_, p.D, flat, padded, wide);
    pack_rows(flat, padded, wide, keys);
    gather(job.v + p.row * s.v_row + p.head * p.V, s.v_token, p.T_, p.V, flat, padded, wide_v);
    pack_columns(flat, padded, wide_v, values);
    for (int64_t h = p.head * p.group; h < (p.head + 1) * p.group; h++)
        for (int64_t first = 0; first < p.T_; first += BLOCK) {
            const int64_t rows = std::min(BLOCK, padded - first), real = std::min(rows, p.T_ - first);
            const int64_t end = p.keys_of(first, rows);
            gather(job.q + p.row * s.q_row + first * s.q_token + h * p.D, s.q_token, real, p.D, queries, rows, wide);
            multiply(queries, wide, keys, wide, scores, padded, rows, end, wide, false);
            for (int64_t r = 0; r < rows; r++) {
                T* weight = weights + r * padded;
                if (r >= real) {
                    memset((void*)weight, 0, end * sizeof(T));
                    continue;
                }
                float* score_row = scores + r * padded;
                const int64_t count = p.seen(first + r);
                const T* bias = p.bias_of(job.bias, h, first + r);
                Floats high = spread(-INFINITY);
                for (int64_t i = 0; i < count; i += LANES) {
                    Floats v = score(score_row, bias, i, count, s.scale);
                    store(score_row + i, v);
                    high = v > high ? v : high;
                }
                const float top = largest(high);
                Floats mass = {};
                int64_t i = 0;
                for (; i < count; i += LANES) {
                    Floats v = load(score_row + i), power = exponential(v - top);
                    power = v == -INFINITY ? Floats{} : power;
                    mass += power;
                    store(weight + i, power);
                }
                for (; i < end; i += LANES) store(weight + i, Floats{});
                const float total = sum(mass);
                inverse[r] = 1.0f / total;
                job.norms[(p.row * s.heads + h) * p.T_ + first + r] = top + std::log(total);
            }
            multiply(weights, padded, values, padded, sums, wide_v, rows, wide_v, end, false);
            T* to = job.out + ((p.row * p.T_ + first) * s.heads + h) * p.V;
            for (int64_t r = 0; r < real; r++)
                scatter(sums + r * wide_v, wide_v, 1, p.V, inverse[r], to + r * s.heads * p.V, 0);
        }
}

// Probabilities and slopes of a query, or of two below each other, for both orders in which products read them.
inline void keep(bf16* panel, int64_t r, Floats upper, Floats lower) {
    store((float*)(panel + r * 16), (Floats)(narrow(upper) | narrow(lower) << 16));
}

template <class T>
void backward(const void* given, int part) {
    const Job<T>& job = *(const Job<T>*)given;
    const Shape& s = *job.shape;
    const Place<T> p(s, part);
    const int64_t wide = p.wide, wide_v = p.wide_v, padded = p.padded, most = std::max(wide, wide_v);
    Desk desk(padded * (5 * most + 2 * (wide + wide_v) + 5 * BLOCK) + BLOCK * 8 * most);
    T *flat = desk.take<T>(padded * most), *keys = desk.take<T>(padded * wide), *values = desk.take<T>(padded * wide_v);
    T *flat_keys = desk.take<T>(padded * wide);
    T *queries = desk.take<T>(BLOCK * wide), *turned_q = desk.take<T>(BLOCK * wide);
    T *grads = desk.take<T>(BLOCK * wide_v), *turned_g = desk.take<T>(BLOCK * wide_v);
    T *weights = desk.take<T>(BLOCK * padded), *slopes = desk.take<T>(BLOCK * padded);
    T* slope_rows = desk.take<T>(BLOCK * padded);
    float *scores = desk.take<float>(BLOCK * padded), *of_weights = desk.take<float>(BLOCK * padded);
    float *sums_q = desk.take<float>(BLOCK * wide), *transposed = desk.take<float>(padded * most);
    float *sums_k = desk.take<float>(padded * wide), *sums_v = desk.take<float>(padded * wide_v);
    [[maybe_unused]] Tiles tiles;
    memset(sums_k, 0, padded * wide * sizeof(float));
    memset(sums_v, 0, padded * wide_v * sizeof(float));
    gather(job.v + p.row * s.v_row + p.head * p.V, s.v_token, p.T_, p.V, flat, padded, wide_v);
    pack_rows(flat, padded, wide_v, values);
    gather(job.k + p.row * s.k_row + p.head * p.D, s.k_token, p.T_, p.D, flat, padded, wide);
    pack_rows(flat, padded, wide, keys);
    pack_columns(flat, padded, wide, flat_keys);
    const int64_t token = s.heads * p.V;  // of out and grad
    for (int64_t h = p.head * p.group; h < (p.head + 1) * p.group; h++)
        for (int64_t first = 0; first < p.T_; first += BLOCK) {
            const int64_t rows = std::min(BLOCK, padded - first), real = std::min(rows, p.T_ - first);
            const int64_t end = p.keys_of(first, rows), at = (p.row * p.T_ + first) * token + h * p.V;
            gather(job.q + p.row * s.q_row + first * s.q_token + h * p.D, s.q_token, real, p.D, queries, rows, wide);
            gather(job.grad + at, token, real, p.V, grads, rows, wide_v);
            transpose(queries, rows, wide, turned_q);
            transpose(grads, rows, wide_v, turned_g);
            multiply(queries, wide, keys, wide, scores, padded, rows, end, wide, false);
            multiply(grads, wide_v, values, wide_v, of_weights, padded, rows, end, wide_v, false);
            float norm[BLOCK], dot[BLOCK];
            for (int64_t r = 0; r < real; r++) {
                const T *o = job.out + at + r * token, *d = job.grad + at + r * token;
                Floats total = {};
                for (int64_t i = 0; i < p.V; i += LANES) total += load_up_to(o + i, p.V - i) * load_up_to(d + i, p.V - i);
                dot[r] = sum(total);
                norm[r] = job.norms[(p.row * s.heads + h) * p.T_ + first + r];
            }
            for (int64_t r = 0; r < rows; r += STEP<T>) {
                for (int64_t i = 0; i < end; i += LANES) {
                    Floats weight[2] = {}, slope[2] = {};
                    for (int64_t j = 0; j < STEP<T> && r + j < real; j++) {
                        const int64_t n = r + j, count = p.seen(first + n);
                        if (i >= count) continue;
                        Floats v = score(scores + n * padded, p.bias_of(job.bias, h, first + n), i, count, s.scale);
                        weight[j] = exponential(v - norm[n]);
                        weight[j] = v == -INFINITY ? Floats{} : weight[j];
                        slope[j] = weight[j] * (load(of_weights + n * padded + i) - dot[n]) * s.scale;
                    }
                    const int64_t panel = i * rows + r * 16;
                    if constexpr (sizeof(T) == 2) {
                        keep(weights + i * rows, r, weight[0], weight[1]);
                        keep(slopes + i * rows, r, slope[0], slope[1]);
                        store(slope_rows + (r + 1) * padded + i, slope[1]);
                    } else {
                        store(weights + panel, weight[0]);
                        store(slopes + panel, slope[0]);
                    }
                    store(slope_rows + r * padded + i, slope[0]);
                }
            }
            multiply(slope_rows, padded, flat_keys, padded, sums_q, wide, rows, wide, end, false);
            scatter(sums_q, wide, real, p.D, 1.0f, job.grad_q + ((p.row * p.T_ + first) * s.heads + h) * p.D,
                    s.heads * p.D);
            multiply(turned_g, rows, weights, rows, sums_v, padded, wide_v, end, rows, true);
            multiply(turned_q, rows, slopes, rows, sums_k, padded, wide, end, rows, true);
        }
    const int64_t start = p.row * p.T_ * s.kv_heads + p.head;
    transpose(sums_k, wide, padded, transposed);
    scatter(transposed, wide, p.T_, p.D, 1.0f, job.grad_k + start * p.D, s.kv_heads * p.D);
    transpose(sums_v, wide_v, padded, transposed);
    scatter(transposed, wide_v, p.T_, p.V, 1.0f, job.grad_v + start * p.V, s.kv_heads * p.V);
}

}  // namespace

extern "C" {

// Whether bf16 has units here: without them torch's products are faster.
int hanlin_train_attention_pays([[maybe_unused]] int bytes) {
#if defined(__AVX512BF16__)
    return 1;
#elif defined(__AVX512F__)
    return bytes == 4 || has_tiles();
#else
    return 0;
#endif
}

// q (rows, length, heads, width), k, v (…, kv_heads, …) by their strides, bias or null -> out (rows, length, heads,
// value_width), contiguous; norms (rows, heads, length).
#define HANLIN_TRAIN_ATTENTION(NAME, T)                                                                               \
    void hanlin_train_attention_##NAME(const Shape* s, const T* q, const T* k, const T* v, const T* bias, T* out,     \
                                       float* norms) {                                                                \
        const Job<T> job{s, q, k, v, bias, out, norms, nullptr, nullptr, nullptr, nullptr};                           \
        together(forward<T>, &job, int(s->rows * s->kv_heads));                                                       \
    }                                                                                                                 \
    void hanlin_train_attention_backward_##NAME(const Shape* s, const T* q, const T* k, const T* v, const T* bias,    \
                                                const T* out, const float* norms, const T* grad, T* grad_q,           \
                                                T* grad_k, T* grad_v) {                                               \
        const Job<T> job{s, q, k, v, bias, (T*)out, (float*)norms, grad, grad_q, grad_k, grad_v};                     \
        together(backward<T>, &job, int(s->rows * s->kv_heads));                                                      \
    }

HANLIN_TRAIN_ATTENTION(f32, float)
HANLIN_TRAIN_ATTENTION(bf16, bf16)
}
