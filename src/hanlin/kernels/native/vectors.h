// Sixteen fp32 numbers at a time, by the vector extension of GCC and Clang: one zmm with AVX-512, two ymm with AVX2,
// four registers with NEON or SSE. bf16 is the upper half of an fp32; everything is computed in fp32.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace hanlin {

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

constexpr int64_t LANES = 16;

struct bf16 {
    uint16_t bits;
};

inline Floats spread(float x) { return x - Floats{}; }
inline Ints lanes() { return Ints{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

inline Floats load(const float* from) {
    Floats v;
    memcpy(&v, from, sizeof v);
    return v;
}

inline Floats load(const bf16* from) {
    Halves h;
    memcpy(&h, from, sizeof h);
    return (Floats)(__builtin_convertvector(h, Words) << 16);
}

inline void store(float* to, Floats v) { memcpy(to, &v, sizeof v); }

inline void store(bf16* to, Floats v) {  // to nearest, ties to even; NaN stays NaN
#if defined(__AVX512BF16__)
    __m256bh h = _mm512_cvtneps_pbh((__m512)v);
    memcpy(to, &h, sizeof h);
#else
    Words w = (Words)v;
    w = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
    w = v == v ? w : Words{} + 0x7fc0;
    Halves h = __builtin_convertvector(w, Halves);
    memcpy(to, &h, sizeof h);
#endif
}

// The first n < 16 numbers; the other lanes are 0.
template <class T>
inline Floats load_part(const T* from, int64_t n) {
    T padded[LANES] = {};
    memcpy(padded, from, n * sizeof(T));
    return load(padded);
}

template <class T>
inline void store_part(T* to, Floats v, int64_t n) {
    T padded[LANES];
    store(padded, v);
    memcpy(to, padded, n * sizeof(T));
}

#if defined(__AVX512BW__) && defined(__AVX512VL__)
inline Floats load_part(const float* from, int64_t n) { return (Floats)_mm512_maskz_loadu_ps((1u << n) - 1, from); }
inline Floats load_part(const bf16* from, int64_t n) {
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16((1u << n) - 1, from)), 16);
}
#endif

template <class T>
inline Floats load_up_to(const T* from, int64_t n) {
    return n >= LANES ? load(from) : load_part(from, n);
}

template <class T>
inline void store_up_to(T* to, Floats v, int64_t n) {
    n >= LANES ? store(to, v) : store_part(to, v, n);
}

inline float sum(Floats v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float parts[LANES];
    store(parts, v);
    for (int64_t half = LANES / 2; half; half /= 2)
        for (int64_t i = 0; i < half; i++) parts[i] += parts[i + half];
    return parts[0];
#endif
}

inline float largest(Floats v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float parts[LANES], top = v[0];
    store(parts, v);
    for (float part : parts) top = part > top ? part : top;
    return top;
#endif
}

// The larger of each; b where a is not a number.
inline Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
    return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}

// 2^x for x <= 0, and 0 below -127; relative error under 1e-7, or with `rough` 1e-4, which bf16 cannot see.
template <bool rough>
inline Floats power_of_two(Floats x) {
    x = larger(spread(-127.0f), x);
    const Floats shift = spread(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    const Floats shifted = x + shift, r = x - (shifted - shift);
    Floats p;
    if constexpr (rough) {
        p = 5.500890508e-02f * r + 2.422109900e-01f;
        p = p * r + 6.932829349e-01f;
    } else {
        p = 1.326472423e-03f * r + 9.671513245e-03f;
        p = p * r + 5.550733757e-02f;
        p = p * r + 2.402224207e-01f;
        p = p * r + 6.931469776e-01f;
    }
    p = p * r + 1.0f;  // exactly 1 at whole numbers, so that 2^-127 is 0
    return (Floats)((Ints)p + ((Ints)shifted << 23));
}

// e^x = 2^n e^r with |r| <= ln(2)/2 and a polynomial for e^r; relative error under 2e-7. Below -87 it stays at e^-87.
inline Floats exponential(Floats x) {
    x = x < -87.0f ? spread(-87.0f) : x;
    x = x > 88.0f ? spread(88.0f) : x;
    const Floats shift = spread(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    Floats shifted = x * 1.44269504088896341f + shift;
    Ints n = (Ints)shifted - (Ints)shift;
    Floats whole = shifted - shift;
    Floats r = x - whole * 0.693359375f;
    r = r + whole * 2.12194440e-4f;
    Floats p = spread(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * (Floats)((n + 127) << 23);
}

}  // namespace hanlin
