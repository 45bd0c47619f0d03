// What happens to each row between the products: RMS norm, rotary turn, gate. fp32 inside; a row knows no other row.
//
// x may be a slice of something wider (queries in the packed projection): `outer` groups of `inner` rows, the rows of a
// group one behind the other, `stride` numbers from one group to the next. Results are contiguous. Threads share what is
// long: a prompt's rows, which would otherwise take a fifth of its time.

#include <algorithm>

#include "pool.h"
#include "vectors.h"

using namespace hanlin;

namespace {

constexpr int64_t WORTH = 64 << 10;  // bytes, from which threads share
constexpr int64_t LARGE = 1 << 20;   // and from which those that sleep are woken

// run(first, last) for all rows, in parts.
template <class Run>
void in_parts(int64_t rows, int64_t bytes, const Run& run) {
    struct Job {
        const Run& run;
        int64_t rows, parts;
    };
    if (bytes < WORTH || threads() < 2) return run(0, rows);
    const Job job{run, rows, std::min<int64_t>(rows, 4 * threads())};
    const Part part = [](const void* given, int part) {
        const Job& job = *(const Job*)given;
        job.run(job.rows * part / job.parts, job.rows * (part + 1) / job.parts);
    };
    share(part, &job, int(job.parts), bytes >= LARGE);
}

// weight: or null for 1.
template <class T>
void rms_norm(const T* x, int64_t first, int64_t last, int64_t inner, int64_t stride, int64_t width, const T* weight,
              float eps, T* y) {
    y += first * width;
    for (int64_t row = first; row < last; row++, y += width) {
        const T* from = x + row / inner * stride + row % inner * width;
        Floats squares = {};
        for (int64_t i = 0; i < width; i += LANES) {
            Floats v = load_up_to(from + i, width - i);
            squares += v * v;
        }
        const Floats inverse = spread(1.0f / std::sqrt(sum(squares) / float(width) + eps));
        for (int64_t i = 0; i < width; i += LANES) {
            Floats v = load_up_to(from + i, width - i) * inverse;
            if (weight) v *= load_up_to(weight + i, width - i);
            store_up_to(y + i, v, width - i);
        }
    }
}

// tables (outer or 1 of them, see `period`): cos and signed sin of `turned` numbers; what is behind them is copied.
template <class T>
void rotate(const T* x, int64_t first, int64_t last, int64_t inner, int64_t stride, int64_t width, const T* cos,
            const T* sin, int64_t turned, int64_t period, T* y) {
    const int64_t half = turned / 2;
    y += first * inner * width;
    for (int64_t group = first; group < last; group++) {
        const T *c = cos + group % period * turned, *s = sin + group % period * turned;
        for (int64_t row = 0; row < inner; row++, y += width) {
            const T* from = x + group * stride + row * width;
            for (int64_t i = 0; i < half; i += LANES) {
                const int64_t n = half - i;
                Floats a = load_up_to(from + i, n), b = load_up_to(from + half + i, n);
                store_up_to(y + i, a * load_up_to(c + i, n) + b * load_up_to(s + i, n), n);
                store_up_to(y + half + i, b * load_up_to(c + half + i, n) + a * load_up_to(s + half + i, n), n);
            }
            if (turned < width) memcpy(y + turned, from + turned, (width - turned) * sizeof(T));
        }
    }
}

template <class T>
void swiglu(const T* x, int64_t rows, int64_t hidden, T* y) {
    for (int64_t row = 0; row < rows; row++, x += 2 * hidden, y += hidden)
        for (int64_t i = 0; i < hidden; i += LANES) {
            const int64_t n = hidden - i;
            Floats gate = load_up_to(x + i, n), up = load_up_to(x + hidden + i, n);
            store_up_to(y + i, gate / (1.0f + exponential(-gate)) * up, n);
        }
}

}  // namespace

extern "C" {

#define HANLIN_ROWS(NAME, T)                                                                                          \
    void hanlin_rms_norm_##NAME(const T* x, int64_t outer, int64_t inner, int64_t stride, int64_t width,              \
                                const T* weight, float eps, T* y) {                                                   \
        in_parts(outer * inner, outer * inner * width * int64_t(sizeof(T)), [=](int64_t first, int64_t last) {        \
            rms_norm(x, first, last, inner, stride, width, weight, eps, y);                                           \
        });                                                                                                           \
    }                                                                                                                 \
    void hanlin_rotate_##NAME(const T* x, int64_t outer, int64_t inner, int64_t stride, int64_t width, const T* cos,  \
                              const T* sin, int64_t turned, int64_t period, T* y) {                                   \
        in_parts(outer, outer * inner * width * int64_t(sizeof(T)), [=](int64_t first, int64_t last) {                \
            rotate(x, first, last, inner, stride, width, cos, sin, turned, period, y);                                \
        });                                                                                                           \
    }                                                                                                                 \
    void hanlin_swiglu_##NAME(const T* x, int64_t rows, int64_t hidden, T* y) {                                       \
        in_parts(rows, 2 * rows * hidden * int64_t(sizeof(T)), [=](int64_t first, int64_t last) {                     \
            swiglu(x + first * 2 * hidden, last - first, hidden, y + first * hidden);                                 \
        });                                                                                                           \
    }

HANLIN_ROWS(f32, float)
HANLIN_ROWS(bf16, bf16)
}
