// Small matrix products over numbers that lie in the cache, columns and depth multiples of 32: bf16 by matrix tiles
// (Intel AMX) or by pairs (AVX-512), fp32 by multiply-adds. The right-hand side is packed in panels of 16 columns,
//
//     packed  [columns / 16][depth / step][16][step]      step: 1 number of fp32, 2 of bf16
#pragma once

#include <algorithm>
#include <utility>

#include "vectors.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define HANLIN_TILES 1
#endif

namespace hanlin {

template <class T>
constexpr int64_t STEP = 4 / sizeof(T);

inline Floats dot_words(Floats s, Words w, Words x, bf16) {
#if defined(__AVX512BF16__)
    return (Floats)_mm512_dpbf16_ps((__m512)s, (__m512bh)w, (__m512bh)x);
#else
    s += (Floats)(w << 16) * (Floats)(x << 16);
    return s + (Floats)(w & 0xffff0000u) * (Floats)(x & 0xffff0000u);
#endif
}

inline Floats dot_words(Floats s, Words w, Words x, float) { return s + (Floats)w * (Floats)x; }

#if defined(HANLIN_TILES)

inline bool has_tiles() {
    static const bool granted = !syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */);
    return granted;
}

// While it lives, this thread's tiles are eight of 16 x 64 bytes; afterwards they are as whoever came before had them.
// rows < 16: those that `multiply_few_tiles` uses for a and c have so many.
class Tiles {
    alignas(64) uint8_t before[64] = {};

  public:
    explicit Tiles(int rows = 16) {
        if (!has_tiles()) return;
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shape;
        shape.rows[0] = shape.rows[1] = shape.rows[4] = rows;
        _tile_storeconfig(before);
        asm volatile("" : : "r"(&shape), "r"(before) : "memory");  // GCC 12 believes that only 8 bytes of them are used
        _tile_loadconfig(&shape);
    }
    ~Tiles() {
        if (!has_tiles()) return;
        asm volatile("" : : "r"(before) : "memory");
        before[0] ? _tile_loadconfig(before) : _tile_release();
    }
};

inline void multiply_tiles(const bf16* a, int64_t stride, const bf16* b, int64_t b_depth, float* c, int64_t c_stride,
                           int64_t depth, bool add) {  // 32 x 32
    const int64_t bytes = stride * 2, c_bytes = c_stride * 4;
    const bf16 *below = a + 16 * stride, *right = b + 16 * b_depth;
    float* c_below = c + 16 * c_stride;
    if (add) {
        _tile_loadd(0, c, c_bytes);
        _tile_loadd(1, c + 16, c_bytes);
        _tile_loadd(2, c_below, c_bytes);
        _tile_loadd(3, c_below + 16, c_bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < depth; k += 32) {
        _tile_loadd(4, a + k, bytes);
        _tile_loadd(6, b + 16 * k, 64);
        _tile_loadd(7, right + 16 * k, 64);
        _tile_loadd(5, below + k, bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, c + 16, c_bytes);
    _tile_stored(2, c_below, c_bytes);
    _tile_stored(3, c_below + 16, c_bytes);
}

inline void multiply_few_tiles(const bf16* a, int64_t stride, const bf16* b, int64_t b_depth, float* c,
                               int64_t c_stride, int64_t depth, bool add) {  // 16 x 32
    const int64_t bytes = stride * 2, c_bytes = c_stride * 4;
    const bf16* right = b + 16 * b_depth;
    if (add) {
        _tile_loadd(0, c, c_bytes);
        _tile_loadd(1, c + 16, c_bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
    }
    for (int64_t k = 0; k < depth; k += 32) {
        _tile_loadd(4, a + k, bytes);
        _tile_loadd(6, b + 16 * k, 64);
        _tile_loadd(7, right + 16 * k, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, c + 16, c_bytes);
}

#else

inline bool has_tiles() { return false; }
struct Tiles {
    explicit Tiles(int = 16) {}
};

#endif

template <int R, class T>
void multiply_rows(const T* a, int64_t stride, const T* b, const T* right, float* c, int64_t c_stride, int64_t depth,
                   bool add) {
    Floats low[R], high[R];  // in registers only if every loop over them is unrolled
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        low[r] = add ? load(c + r * c_stride) : Floats{};
        high[r] = add ? load(c + r * c_stride + LANES) : Floats{};
    }
    for (int64_t k = 0; k < depth; k += STEP<T>) {
        const Words w = (Words)load((const float*)(b + 16 * k)), w2 = (Words)load((const float*)(right + 16 * k));
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            uint32_t word;
            memcpy(&word, a + r * stride + k, 4);
            const Words x = Words{} + word;
            low[r] = dot_words(low[r], w, x, T{});
            high[r] = dot_words(high[r], w2, x, T{});
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        store(c + r * c_stride, low[r]);
        store(c + r * c_stride + LANES, high[r]);
    }
}

template <int R, class T>
void multiply_last_rows(int64_t rows, const T* a, int64_t stride, const T* b, const T* right, float* c,
                        int64_t c_stride, int64_t depth, bool add) {
    if (rows == R) return multiply_rows<R>(a, stride, b, right, c, c_stride, depth, add);
    if constexpr (R > 1) multiply_last_rows<R - 1>(rows, a, stride, b, right, c, c_stride, depth, add);
}

// c (rows, columns) = or += a (rows, depth) times b (depth, columns). b_depth: the depth that b was packed with. Tiles
// read and write whole sixteens of rows. A row's sums do not depend on how many rows there are.
template <class T>
void multiply(const T* a, int64_t stride, const T* b, int64_t b_depth, float* c, int64_t c_stride, int64_t rows,
              int64_t columns, int64_t depth, bool add) {
#if defined(__AVX512F__)
    constexpr int R = 8;
#else
    constexpr int R = 2;
#endif
    for (int64_t column = 0; column < columns; column += 32, b += 32 * b_depth, c += 32) {
        int64_t row = 0;
#if defined(HANLIN_TILES)
        if constexpr (sizeof(T) == 2)
            if (has_tiles()) {
                for (; row + 16 < rows; row += 32)
                    multiply_tiles(a + row * stride, stride, b, b_depth, c + row * c_stride, c_stride, depth, add);
                if (row < rows)
                    multiply_few_tiles(a + row * stride, stride, b, b_depth, c + row * c_stride, c_stride, depth, add);
                continue;
            }
#endif
        const T* right = b + 16 * b_depth;
        for (; row + R <= rows; row += R)
            multiply_rows<R>(a + row * stride, stride, b, right, c + row * c_stride, c_stride, depth, add);
        if (row < rows)
            multiply_last_rows<R - 1>(rows - row, a + row * stride, stride, b, right, c + row * c_stride, c_stride,
                                      depth, add);
    }
}

template <int S, size_t... J>
inline void swap_blocks(Words* r, std::index_sequence<J...>) {
    for (int i = 0; i < 16; i++)
        if (!(i & S)) {
            const Words a = r[i], b = r[i + S];
            r[i] = __builtin_shufflevector(a, b, (int(J) & S ? 16 + int(J) - S : int(J))...);
            r[i + S] = __builtin_shufflevector(a, b, (int(J) & S ? 16 + int(J) : int(J) + S)...);
        }
}

// Sixteen rows of sixteen words become columns.
inline void transpose(Words* r) {
    constexpr auto lanes = std::make_index_sequence<16>{};
    swap_blocks<8>(r, lanes);
    swap_blocks<4>(r, lanes);
    swap_blocks<2>(r, lanes);
    swap_blocks<1>(r, lanes);
}

// x (rows, columns), both multiples of 32 -> (columns, rows).
template <class T>
void transpose(const T* x, int64_t rows, int64_t columns, T* y) {
    Words block[16];
    for (int64_t row = 0; row < rows; row += 16)
        for (int64_t column = 0; column < columns; column += 16) {
            for (int i = 0; i < 16; i++) block[i] = (Words)load(x + (row + i) * columns + column);
            transpose(block);
            for (int i = 0; i < 16; i++) store(y + (column + i) * rows + row, (Floats)block[i]);
        }
}

// The first n < 16 * STEP numbers as words, the rest zeros.
template <class T>
inline Words load_words(const T* from, int64_t n) {
    T padded[LANES * STEP<T>] = {};
    memcpy(padded, from, n * sizeof(T));
    return (Words)load((const float*)padded);
}

// What `multiply` reads as b = x^T: sixteen rows of x, `stride` apart, become a panel of `wide` >= width depth.
template <class T>
void pack_rows(const T* x, int64_t stride, int64_t width, int64_t wide, T* b) {
    constexpr int64_t each = 16 * STEP<T>;
    Words block[16];
    for (int64_t k = 0; k < wide; k += each) {
        for (int i = 0; i < 16; i++)
            block[i] = k + each <= width ? (Words)load((const float*)(x + i * stride + k))
                                         : load_words(x + i * stride + k, std::max<int64_t>(0, width - k));
        transpose(block);
        for (int i = 0; i < 16; i++) store((float*)(b + k * 16) + i * 16, (Floats)block[i]);
    }
}

// All rows: x (columns, depth), so that a row of x becomes a column of b.
template <class T>
void pack_rows(const T* x, int64_t columns, int64_t depth, T* b) {
    for (int64_t column = 0; column < columns; column += 16)
        pack_rows(x + column * depth, depth, depth, depth, b + column * depth);
}

inline Words narrow(Floats v) {  // bf16 in the lower half of each word
    bf16 bits[LANES];
    store(bits, v);
    return (Words)load(bits) >> 16;
}

// What `multiply` reads as b = x: x (depth, columns).
inline void pack_columns(const bf16* x, int64_t depth, int64_t columns, bf16* b) {
    for (int64_t k = 0; k < depth; k += 2)
        for (int64_t column = 0; column < columns; column += 16) {
            const Words upper = (Words)load(x + k * columns + column) >> 16;
            const Words lower = (Words)load(x + (k + 1) * columns + column);
            store((float*)(b + column * depth + k * 16), (Floats)(upper | lower));
        }
}

inline void pack_columns(const float* x, int64_t depth, int64_t columns, float* b) {
    for (int64_t k = 0; k < depth; k++)
        for (int64_t column = 0; column < columns; column += 16)
            store(b + column * depth + k * 16, load(x + k * columns + column));
}

}  // namespace hanlin
