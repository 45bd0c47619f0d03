// What happens to each row between the products: RMS norm, rotary turn, gate. fp32 inside; a row knows no other row.
//
// x may be a slice of something wider (queries in the packed projection): `outer` groups of `inner` rows, the rows of a
// group one behind the other, `stride` numbers from one group to the next. Results are contiguous.

#include "vectors.h"

using namespace hanlin;

namespace {

// weight: or null for 1.
template <class T>
void rms_norm(const T* x, int64_t outer, int64_t inner, int64_t stride, int64_t width, const T* weight, float eps,
              T* y) {
    for (int64_t row = 0; row < outer * inner; row++, y += width) {
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
void rotate(const T* x, int64_t outer, int64_t inner, int64_t stride, int64_t width, const T* cos, const T* sin,
            int64_t turned, int64_t period, T* y) {
    const int64_t half = turned / 2;
    for (int64_t group = 0; group < outer; group++) {
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
        rms_norm(x, outer, inner, stride, width, weight, eps, y);                                                     \
    }                                                                                                                 \
    void hanlin_rotate_##NAME(const T* x, int64_t outer, int64_t inner, int64_t stride, int64_t width, const T* cos,  \
                              const T* sin, int64_t turned, int64_t period, T* y) {                                   \
        rotate(x, outer, inner, stride, width, cos, sin, turned, period, y);                                          \
    }                                                                                                                 \
    void hanlin_swiglu_##NAME(const T* x, int64_t rows, int64_t hidden, T* y) { swiglu(x, rows, hidden, y); }

HANLIN_ROWS(f32, float)
HANLIN_ROWS(bf16, bf16)
}
