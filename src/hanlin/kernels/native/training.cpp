// The passes between the products of a training step, forward and backward: SwiGLU, RMS norm, rotary turn, and the
// gradient that is added to a wider one. fp32 inside. Each is one visit of its data by torch's threads, cut into blocks
// of rows that do not depend on how many threads there are; what is summed over rows is summed block by block, in order.

#include <algorithm>
#include <vector>

#include "team.h"
#include "vectors.h"

using namespace hanlin;

namespace {

constexpr int64_t NEAR = 16 << 10;  // numbers of a part: enough to pay for taking it
constexpr int64_t ROWS = 64;        // of a part whose sums are kept apart

// Calls body(first, last) for blocks of rows.
template <class Body>
struct Blocks {
    const Body& body;
    int64_t rows, block;

    static void part(const void* given, int index) {
        const Blocks& b = *(const Blocks*)given;
        b.body(index * b.block, std::min(b.rows, (index + 1) * b.block));
    }
};

template <class Body>
void in_blocks(int64_t rows, int64_t block, const Body& body) {
    const Blocks<Body> job{body, rows, block};
    together(Blocks<Body>::part, &job, int((rows + block - 1) / block));
}

int64_t block_of(int64_t width) { return std::max<int64_t>(1, NEAR / std::max<int64_t>(1, width)); }

inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

// Rows that may be slices of something wider: `inner` rows behind each other, `stride` numbers between their groups.
struct Slice {
    int64_t inner, stride, width;

    int64_t at(int64_t row) const { return row / inner * stride + row % inner * width; }
};

template <class T>
void swiglu(const T* x, int64_t rows, int64_t hidden, T* y) {
    in_blocks(rows, block_of(3 * hidden), [=](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++) {
            const T *gate = x + 2 * row * hidden, *up = gate + hidden;
            T* to = y + row * hidden;
            for (int64_t i = 0; i < hidden; i += LANES) {
                const int64_t n = hidden - i;
                Floats g = load_up_to(gate + i, n);
                store_up_to(to + i, g * sigmoid(g) * load_up_to(up + i, n), n);
            }
        }
    });
}

// With s = sigmoid(g):  d/du = g s,  d/dg = u s (1 + g (1 - s)).
template <class T>
void swiglu_backward(const T* x, const T* grad, int64_t rows, int64_t hidden, T* out) {
    in_blocks(rows, block_of(5 * hidden), [=](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++) {
            const T *gate = x + 2 * row * hidden, *up = gate + hidden, *from = grad + row * hidden;
            T *to_gate = out + 2 * row * hidden, *to_up = to_gate + hidden;
            for (int64_t i = 0; i < hidden; i += LANES) {
                const int64_t n = hidden - i;
                Floats g = load_up_to(gate + i, n), u = load_up_to(up + i, n), d = load_up_to(from + i, n);
                Floats s = sigmoid(g), ds = d * s;
                store_up_to(to_up + i, ds * g, n);
                store_up_to(to_gate + i, ds * u * (1.0f + g * (1.0f - s)), n);
            }
        }
    });
}

// inverse (rows,): 1 / rms of each row, for the backward pass.
template <class T>
void norm(const T* x, int64_t rows, Slice slice, const float* weight, float eps, T* y, float* inverse) {
    const int64_t width = slice.width;
    in_blocks(rows, block_of(2 * width), [=](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++) {
            const T* from = x + slice.at(row);
            T* to = y + row * width;
            Floats squares = {};
            for (int64_t i = 0; i < width; i += LANES) {
                Floats v = load_up_to(from + i, width - i);
                squares += v * v;
            }
            inverse[row] = 1.0f / std::sqrt(sum(squares) / float(width) + eps);
            for (int64_t i = 0; i < width; i += LANES) {
                Floats v = load_up_to(from + i, width - i) * inverse[row];
                if (weight) v *= load_up_to(weight + i, width - i);
                store_up_to(to + i, v, width - i);
            }
        }
    });
}

// With n = x / rms and h = grad * weight:  grad_x = (h - n mean(h n)) / rms,  grad_weight = sum of grad * n over rows.
template <class T>
void norm_backward(const T* x, int64_t rows, Slice slice, const T* grad, const float* weight, const float* inverse,
                   T* grad_x, float* grad_weight) {
    const int64_t width = slice.width, padded = (width + LANES - 1) / LANES * LANES;
    std::vector<float> sums(grad_weight ? (rows + ROWS - 1) / ROWS * padded : 0);
    float* kept = sums.data();
    in_blocks(rows, ROWS, [=](int64_t first, int64_t last) {
        float* own = kept + first / ROWS * padded;
        for (int64_t row = first; row < last; row++) {
            const T *from = x + slice.at(row), *arrived = grad + row * width;
            T* to = grad_x + row * width;
            const float scale = inverse[row];
            Floats dot = {};
            for (int64_t i = 0; i < width; i += LANES) {
                Floats normal = load_up_to(from + i, width - i) * scale, d = load_up_to(arrived + i, width - i);
                d *= normal;
                if (grad_weight) store(own + i, load(own + i) + d);
                dot += weight ? d * load_up_to(weight + i, width - i) : d;
            }
            const float slope = sum(dot) / float(width);
            for (int64_t i = 0; i < width; i += LANES) {
                Floats normal = load_up_to(from + i, width - i) * scale, d = load_up_to(arrived + i, width - i);
                if (weight) d *= load_up_to(weight + i, width - i);
                store_up_to(to + i, (d - normal * slope) * scale, width - i);
            }
        }
    });
    if (!grad_weight) return;
    for (int64_t i = 0; i < width; i += LANES) {
        Floats total = {};
        for (int64_t block = 0; block * ROWS < rows; block++) total += load(kept + block * padded + i);
        store_up_to(grad_weight + i, total, width - i);
    }
}

// As `rotate` of rows.cpp; sign -1 turns back.
template <class T>
void turn(const T* x, int64_t groups, Slice slice, const T* cos, const T* sin, int64_t turned, int64_t period,
          float sign, T* y) {
    const int64_t half = turned / 2, width = slice.width;
    in_blocks(groups, block_of(2 * slice.inner * width), [=](int64_t first, int64_t last) {
        for (int64_t group = first; group < last; group++) {
            const T *c = cos + group % period * turned, *s = sin + group % period * turned;
            for (int64_t row = 0; row < slice.inner; row++) {
                const T* from = x + group * slice.stride + row * width;
                T* to = y + (group * slice.inner + row) * width;
                for (int64_t i = 0; i < half; i += LANES) {
                    const int64_t n = half - i;
                    Floats a = load_up_to(from + i, n), b = load_up_to(from + half + i, n);
                    Floats sa = load_up_to(s + i, n) * sign, sb = load_up_to(s + half + i, n) * sign;
                    store_up_to(to + i, a * load_up_to(c + i, n) + b * sa, n);
                    store_up_to(to + half + i, b * load_up_to(c + half + i, n) + a * sb, n);
                }
                if (turned < width) memcpy(to + turned, from + turned, (width - turned) * sizeof(T));
            }
        }
    });
}

// wide += low, or wide = low.
template <class T>
void widen(const T* low, int64_t count, bool add, float* wide) {
    const int64_t block = 4 * NEAR;
    in_blocks((count + block - 1) / block, 1, [=](int64_t first, int64_t) {
        const int64_t stop = std::min(count, (first + 1) * block);
        for (int64_t i = first * block; i < stop; i += LANES) {
            Floats v = load_up_to(low + i, stop - i);
            store_up_to(wide + i, add ? load_up_to(wide + i, stop - i) + v : v, stop - i);
        }
    });
}

}  // namespace

extern "C" {

#define HANLIN_TRAINING(NAME, T)                                                                                      \
    void hanlin_train_swiglu_##NAME(const T* x, int64_t rows, int64_t hidden, T* y) { swiglu(x, rows, hidden, y); }   \
    void hanlin_train_swiglu_backward_##NAME(const T* x, const T* grad, int64_t rows, int64_t hidden, T* out) {       \
        swiglu_backward(x, grad, rows, hidden, out);                                                                  \
    }                                                                                                                 \
    void hanlin_train_norm_##NAME(const T* x, int64_t outer, int64_t inner, int64_t stride, int64_t width,            \
                                  const float* weight, float eps, T* y, float* inverse) {                             \
        norm(x, outer * inner, Slice{inner, stride, width}, weight, eps, y, inverse);                                 \
    }                                                                                                                 \
    void hanlin_train_norm_backward_##NAME(const T* x, int64_t outer, int64_t inner, int64_t stride, int64_t width,   \
                                           const T* grad, const float* weight, const float* inverse, T* grad_x,       \
                                           float* grad_weight) {                                                      \
        norm_backward(x, outer * inner, Slice{inner, stride, width}, grad, weight, inverse, grad_x, grad_weight);     \
    }                                                                                                                 \
    void hanlin_train_turn_##NAME(const T* x, int64_t outer, int64_t inner, int64_t stride, int64_t width,            \
                                  const T* cos, const T* sin, int64_t turned, int64_t period, float sign, T* y) {     \
        turn(x, outer, Slice{inner, stride, width}, cos, sin, turned, period, sign, y);                               \
    }                                                                                                                 \
    void hanlin_train_widen_##NAME(const T* low, int64_t count, int64_t add, float* wide) {                           \
        widen(low, count, add != 0, wide);                                                                            \
    }

HANLIN_TRAINING(f32, float)
HANLIN_TRAINING(bf16, bf16)
}
