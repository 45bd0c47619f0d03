// The two products of paged attention, scores = q k^T and sums += weights v, over a block of keys that stand in pages.
//
// With fp32 lanes: scores are sums over lanes of the width, so that keys are read where they are; sixteen such sums, of
// four rows with four keys, become one vector by fifteen additions. Values, too, are read where they are.
//
// With bf16 tiles: up to 16 rows let the keys be the left-hand side, which tiles read where they are; for more rows keys
// are packed once. Values are packed, two keys beside each other.
//
// In both, a sum has one order, whatever the number of rows.
#pragma once

#include <algorithm>

#include "desk.h"
#include "tiles.h"
#include "vectors.h"

namespace hanlin {

constexpr int64_t KEYS = 128;    // in a block
constexpr int64_t GRANULE = 16;  // keys that stand one behind the other
constexpr int64_t SOME = 32;     // rows that meet a block at once
#if defined(__AVX512F__)
constexpr bool ROOMY = true;  // 32 registers of 16 lanes
#else
constexpr bool ROOMY = false;
#endif

// Keys [low, high) of it are there. A key has `width` numbers, a value `value_width`, `value_step` apart.
template <class T>
struct Block {
    const T *keys[KEYS / GRANULE], *values[KEYS / GRANULE];
    int64_t low, high;
};

struct Sizes {
    int64_t rows, width, value_width, value_step;
    int64_t wide = whole(width), wide_v = whole(value_width);
};

// `bytes` from a place are soon read, or none from null. Pages lie anywhere, which the CPU does not foresee. Into the
// second cache: a block of keys and values is larger than the first.
inline void expect(const void* from, int64_t bytes) {
    if (from)
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)from + i, 0, 2);
}

template <int S>
constexpr int half(int j, int upper) {  // of lanes of (a, b): those of a whose bit S is `upper`, then those of b
    return (j / 8) * 16 + j % 8 / S * 2 * S + j % S + upper * S;
}

template <int S, size_t... J>
inline Floats fold(Floats a, Floats b, std::index_sequence<J...>) {
    if constexpr (S >= 4)
        return __builtin_shufflevector(a, b, half<S>(J, 0)...) + __builtin_shufflevector(a, b, half<S>(J, 1)...);
    else  // within 128 bits, which is one instruction
        return __builtin_shufflevector(
                   a, b, (int(J) / 4 * 4 + (int(J) % 4 / 2) * 16 + (S == 2 ? int(J) % 2 : int(J) % 2 * 2))...) +
               __builtin_shufflevector(
                   a, b, (int(J) / 4 * 4 + (int(J) % 4 / 2) * 16 + (S == 2 ? int(J) % 2 + 2 : int(J) % 2 * 2 + 1))...);
}

// Lane i becomes the sum of x[i]'s lanes, added as `sum` does.
inline Floats sums_of(const Floats* x) {
    constexpr auto lanes = std::make_index_sequence<16>{};
    Floats p[4];
    for (int j = 0; j < 4; j++)
        p[j] = fold<4>(fold<8>(x[j], x[4 + j], lanes), fold<8>(x[8 + j], x[12 + j], lanes), lanes);
    return fold<1>(fold<2>(p[0], p[1], lanes), fold<2>(p[2], p[3], lanes), lanes);
}

template <class T>
class Vectors {
    const Sizes n;
    float* q;
    const Block<T>*block = nullptr, *next = nullptr;

    // R rows with 16 keys.
    template <int R>
    void dots(const float* rows, const T* keys, float* scores) const {
        constexpr int K = R == 1 ? 16 : R == 2 ? 8 : 4;
        for (int first = 0; first < GRANULE; first += K, keys += K * n.width) {
            Floats x[16] = {};
#pragma GCC unroll 4
            for (int some = 0; some < K; some += ROOMY ? K : K / 4) {
                int64_t i = 0;
                for (; i + LANES <= n.width; i += LANES)
#pragma GCC unroll 16
                    for (int k = some; k < some + (ROOMY ? K : K / 4); k++) {
                        const Floats key = load(keys + k * n.width + i);
#pragma GCC unroll 4
                        for (int r = 0; r < R; r++) x[r * K + k] += key * load(rows + r * n.wide + i);
                    }
                if (i < n.width)
#pragma GCC unroll 16
                    for (int k = some; k < some + (ROOMY ? K : K / 4); k++) {
                        const Floats key = load_part(keys + k * n.width + i, n.width - i);
#pragma GCC unroll 4
                        for (int r = 0; r < R; r++) x[r * K + k] += key * load(rows + r * n.wide + i);
                    }
            }
            const Floats found = sums_of(x);
            for (int r = 0; r < R; r++) memcpy(scores + r * KEYS + first, (const float*)&found + r * K, K * 4);
        }
    }

    // R rows with all keys, C vectors of the values.
    template <int R, int C>
    void add(const float* weights, int64_t low, int64_t high, int64_t column, float* sums) const {
        Floats s[R][C];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) s[r][c] = load(sums + r * n.wide_v + column + c * LANES);
        for (int64_t key = low, stop; key < high; key = stop) {
            stop = std::min(high, (key / GRANULE + 1) * GRANULE);
            const T* v = block->values[key / GRANULE] + key % GRANULE * n.value_step + column;
            const float* w = weights + key;
            for (int64_t left = stop - key; left; left--, v += n.value_step, w++) {
                Floats value[C];
#pragma GCC unroll 8
                for (int c = 0; c < C; c++)
                    value[c] = C > 1 ? load(v + c * LANES) : load_up_to(v, n.value_width - column);
#pragma GCC unroll 8
                for (int r = 0; r < R; r++)
#pragma GCC unroll 8
                    for (int c = 0; c < C; c++) s[r][c] += w[r * KEYS] * value[c];
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) store(sums + r * n.wide_v + column + c * LANES, s[r][c]);
    }

    template <int R>
    void add_rows(const float* weights, int64_t low, int64_t high, float* sums) const {
        constexpr int C = ROOMY ? (R == 1 ? 8 : R <= 4 ? 4 : 2) : (R == 1 ? 4 : 2);
        int64_t column = 0;
        for (; column + C * LANES <= n.value_width; column += C * LANES) add<R, C>(weights, low, high, column, sums);
        if constexpr (C > 4)
            for (; column + 4 * LANES <= n.value_width; column += 4 * LANES)
                add<R, 4>(weights, low, high, column, sums);
        for (; column < n.value_width; column += LANES) add<R, 1>(weights, low, high, column, sums);
    }

    template <int R>
    void add_last_rows(int64_t rows, const float* weights, int64_t low, int64_t high, float* sums) const {
        if (rows == R) return add_rows<R>(weights, low, high, sums);
        if constexpr (R > 1) add_last_rows<R - 1>(rows, weights, low, high, sums);
    }

  public:
    using Weight = float;

    static int64_t size(const Sizes& n) { return whole(n.rows) * n.wide; }
    Vectors(const Sizes& n, Desk& desk) : n(n), q(desk.take<float>(size(n))) {}

    void take_query(int64_t row, const T* from) {
        float* to = q + row * n.wide;
        for (int64_t i = 0; i < n.wide; i += LANES)
            store(to + i, load_up_to(from + i, std::max<int64_t>(0, n.width - i)));
    }
    void ready() {}

    void take_block(const Block<T>& now, const Block<T>* then) { block = &now, next = then; }

    void score(int64_t first, int64_t rows, int64_t low, int64_t high, float* scores) const {
        for (int64_t g = low / GRANULE; g * GRANULE < high; g++) {
            if (next && first == 0) {
                expect(next->keys[g], GRANULE * n.width * sizeof(T));
                if (next->values[g] != next->keys[g]) expect(next->values[g], GRANULE * n.value_step * sizeof(T));
            }
            for (int64_t r = 0; r < rows; r += 4) {
                const float* from = q + (first + r) * n.wide;
                float* to = scores + r * KEYS + g * GRANULE;
                switch (rows - r) {
                    case 1: dots<1>(from, block->keys[g], to); break;
                    case 2: dots<2>(from, block->keys[g], to); break;
                    case 3: dots<3>(from, block->keys[g], to); break;
                    default: dots<4>(from, block->keys[g], to);
                }
            }
        }
    }

    void add(int64_t, int64_t rows, int64_t low, int64_t high, const float* weights, float* sums) const {
        constexpr int R = ROOMY ? 8 : 2;
        for (int64_t r = 0; r < rows; r += R)
            add_last_rows<R>(std::min<int64_t>(R, rows - r), weights + r * KEYS, low, high, sums + r * n.wide_v);
    }

    void in_order(float*) const {}
};

#if defined(HANLIN_TILES)

class TileProducts {
    const Sizes n;
    const bool few;
    bf16 *q, *packed_q, *keys, *values;
    float* turned;
    const Block<bf16>*block = nullptr, *next = nullptr;
    Tiles tiles;

    // Sixteen keys, padded where a tile would read past their ends.
    const bf16* padded(const bf16* from) {
        if (n.width == n.wide) return from;
        for (int64_t k = 0; k < GRANULE; k++) memcpy(keys + k * n.wide, from + k * n.width, n.width * sizeof(bf16));
        return keys;
    }

    static __m512i some(const bf16* from, int64_t left) {
        return left >= 32 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16((1ull << left) - 1, from);
    }

    void pack_values(int64_t low, int64_t high) {
        for (int64_t k = 0; k < whole(high); k += 2) {
            const bool first = k >= low && k < high, second = k + 1 >= low && k + 1 < high;
            const bf16* x = block->values[k / GRANULE] + k % GRANULE * n.value_step;
            for (int64_t c = 0; c < n.wide_v; c += 32) {
                const int64_t left = n.value_width - c;
                const __m512i a = first ? some(x + c, left) : _mm512_setzero_si512();
                const __m512i b = second ? some(x + n.value_step + c, left) : _mm512_setzero_si512();
                bf16* to = values + c * KEYS + k * 16;
                _mm512_store_si512(to, _mm512_unpacklo_epi16(a, b));
                _mm512_store_si512(to + 16 * KEYS, _mm512_unpackhi_epi16(a, b));
            }
        }
    }

  public:
    using Weight = bf16;

    static int64_t size(const Sizes& n) {
        return (whole(n.rows) * n.wide + 16 * n.wide + KEYS * (n.wide + n.wide_v)) / 2 + 256;
    }
    TileProducts(const Sizes& n, Desk& desk)
        : n(n), few(n.rows <= 16), q(desk.take<bf16>(whole(n.rows) * n.wide)), packed_q(desk.take<bf16>(16 * n.wide)),
          keys(desk.take<bf16>(KEYS * n.wide)), values(desk.take<bf16>(KEYS * n.wide_v)),
          turned(desk.take<float>(256)), tiles(few ? int(n.rows) : 16) {
        memset((void*)q, 0, whole(n.rows) * n.wide * sizeof(bf16));
        if (few && n.width != n.wide) memset((void*)keys, 0, GRANULE * n.wide * sizeof(bf16));
    }

    void take_query(int64_t row, const bf16* from) { memcpy(q + row * n.wide, from, n.width * sizeof(bf16)); }
    void ready() {
        if (few) pack_rows(q, n.wide, n.wide, n.wide, packed_q);
    }

    void take_block(const Block<bf16>& now, const Block<bf16>* then) {
        block = &now, next = then;
        if (!few)
            for (int64_t g = now.low / GRANULE; g * GRANULE < now.high; g++)
                pack_rows(now.keys[g], n.width, n.width, n.wide, keys + g * GRANULE * n.wide);
        pack_values(now.low, now.high);
    }

    void score(int64_t first, int64_t rows, int64_t low, int64_t high, float* scores) {
        if (!few) {
            multiply(q + first * n.wide, n.wide, keys, n.wide, scores, KEYS, rows, whole(high), n.wide, false);
            return;
        }
        Words column[16];
        for (int64_t g = low / GRANULE; g * GRANULE < high; g++) {
            if (next) {
                expect(next->keys[g], GRANULE * n.width * 2);
                if (next->values[g] != next->keys[g]) expect(next->values[g], GRANULE * n.value_step * 2);
            }
            const bf16* k = padded(block->keys[g]);
            _tile_zero(2);
            for (int64_t i = 0; i < n.wide; i += 32) {
                _tile_loadd(5, k + i, n.wide * 2);
                _tile_loadd(6, packed_q + 16 * i, 64);
                _tile_dpbf16ps(2, 5, 6);
            }
            _tile_stored(2, turned, 64);
            for (int i = 0; i < 16; i++) column[i] = (Words)load(turned + 16 * i);
            transpose(column);
            for (int64_t r = 0; r < rows; r++) store(scores + r * KEYS + g * GRANULE, (Floats)column[r]);
        }
    }

    void add(int64_t, int64_t rows, int64_t, int64_t high, const bf16* weights, float* sums) const {
        multiply(weights, KEYS, values, KEYS, sums, n.wide_v, rows, n.wide_v, whole(high), true);
    }

    // Columns as the values have them: packing took every other four of 32 first.
    void in_order(float* sums) const {
        for (int64_t c = 0; c < n.wide_v; c += 32) {
            const Floats a = load(sums + c), b = load(sums + c + LANES);
            store(sums + c, __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23));
            store(sums + c + LANES,
                  __builtin_shufflevector(a, b, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31));
        }
    }
};

#endif

}  // namespace hanlin
