// y = x W^T + b for few rows or many, over weights laid out in the order in which they are read.
//
//     packed  [out / 32][in / step][32][step]      step: 1 number of fp32, 2 of bf16
//
// A tile of 32 outputs is one sequential stream, read once for a block of rows. An output is always the same chain of
// multiply-adds over `in`, however many rows there are and whoever computes it, so a row's result depends on nothing
// but the row.

#include <algorithm>
#include <vector>

#include "pool.h"
#include "tiles.h"
#include "vectors.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define HANLIN_AMX 1
#endif

using namespace hanlin;

// The same fields in the same order as `Matrix` in linear.py.
struct Matrix {
    const void* packed;
    const float* bias;  // or null
    int64_t in, out;
};

namespace {

constexpr int64_t TILE = 32;          // outputs
constexpr int64_t DEPTH = 32;         // `in` of bf16 weights is padded to a multiple with zeros
constexpr int64_t NEAR = 256 << 10;   // bytes of weights that stay in the L2 cache while many rows pass
constexpr int64_t WORTH = 128 << 10;  // bytes of weights times blocks of rows, from which threads share
constexpr int64_t LARGE = 1 << 20;    // and from which those that sleep are woken
#if defined(__AVX512F__)
constexpr int BLOCK = 14;  // rows at once: 28 sums, 2 weights and a number of x in 32 registers
#else
constexpr int BLOCK = 3;
#endif

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

struct Sums {
    Floats low, high;
};

template <class T>
void finish(const Matrix& m, int64_t tile, Sums s, T* y) {
    int64_t first = tile * TILE, count = m.out - first;
    if (m.bias) {
        s.low += load_up_to(m.bias + first, count);
        if (count > LANES) s.high += load_up_to(m.bias + first + LANES, count - LANES);
    }
    store_up_to(y + first, s.low, count);
    if (count > LANES) store_up_to(y + first + LANES, s.high, count - LANES);
}

// One tile for R rows. stride: numbers from one row of x to the next.
template <int R>
void multiply(const Matrix& m, int64_t tile, const float* x, int64_t stride, float* y) {
    const float* w = (const float*)m.packed + tile * TILE * m.in;
    Sums s[R] = {};
    for (int64_t i = 0; i < m.in; i++, w += TILE) {
        Floats low = load(w), high = load(w + LANES);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            Floats value = spread(x[r * stride + i]);
            s[r].low += low * value;
            s[r].high += high * value;
        }
    }
    for (int r = 0; r < R; r++) finish(m, tile, s[r], y + r * m.out);
}

inline Floats dot_pairs(Floats s, Words w, Words x) {
#if defined(__AVX512BF16__)
    return (Floats)_mm512_dpbf16_ps((__m512)s, (__m512bh)w, (__m512bh)x);
#else
    s += (Floats)(w << 16) * (Floats)(x << 16);
    return s + (Floats)(w & 0xffff0000u) * (Floats)(x & 0xffff0000u);
#endif
}

template <int R>
void multiply(const Matrix& m, int64_t tile, const bf16* x, int64_t stride, bf16* y) {
    const int64_t pairs = round_up(m.in, DEPTH) / 2;
    const uint32_t* w = (const uint32_t*)m.packed + tile * TILE * pairs;
    Sums s[R] = {};
    for (int64_t i = 0; i < pairs; i++, w += TILE) {
        Words low = (Words)load((const float*)w), high = (Words)load((const float*)(w + LANES));
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            uint32_t pair;
            memcpy(&pair, x + r * stride + 2 * i, sizeof pair);
            Words value = Words{} + pair;
            s[r].low = dot_pairs(s[r].low, low, value);
            s[r].high = dot_pairs(s[r].high, high, value);
        }
    }
    for (int r = 0; r < R; r++) finish(m, tile, s[r], y + r * m.out);
}

template <class T>
struct Job {
    const Matrix* m;
    const T* x;
    int64_t stride;
    T* y;
    int64_t rows, tiles, parts;
};

template <int R, class T>
void multiply_rest(const Job<T>& job, int64_t tile, int64_t row, int64_t left) {
    if constexpr (R > 0) {
        if (left < R) return multiply_rest<R - 1>(job, tile, row, left);
        multiply<R>(*job.m, tile, job.x + row * job.stride, job.stride, job.y + row * job.m->out);
    }
}

template <class T>
void multiply_tiles(const Job<T>& job, int64_t first, int64_t last) {
    for (int64_t row = 0; row < job.rows; row += BLOCK)
        for (int64_t tile = first; tile < last; tile++) multiply_rest<BLOCK>(job, tile, row, job.rows - row);
}

#if defined(HANLIN_AMX)

// Matrix tiles (Intel AMX): sums 0–3 = rows 4, 5 (16 each) times weights 6, 7 (16 outputs each), 32 of `in` at once.
bool has_amx() {
    static const bool granted = !syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */);
    return granted;
}

void shape_tiles(int upper, int lower) {
    struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    } shape;
    const int rows[8] = {upper, upper, lower, lower, upper, lower, 16, 16};
    for (int tile = 0; tile < 8; tile++) {
        shape.rows[tile] = rows[tile];
        shape.bytes[tile] = rows[tile] ? 64 : 0;
    }
    asm volatile("" : : "r"(&shape) : "memory");  // GCC 12 believes that only 8 bytes of it are read
    _tile_loadconfig(&shape);
}

template <bool TWO>
void multiply_block(const Job<bf16>& job, int64_t tile, int64_t row, int upper, int lower) {
    const Matrix& m = *job.m;
    const int64_t depth = round_up(m.in, DEPTH), bytes = job.stride * sizeof(bf16);
    const char* w = (const char*)m.packed + tile * TILE * depth * sizeof(bf16);
    const bf16 *x = job.x + row * job.stride, *below = x + 16 * job.stride;
    _tile_zero(0);
    _tile_zero(1);
    if (TWO) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t i = 0; i < depth; i += DEPTH, w += TILE * DEPTH * sizeof(bf16)) {
        _tile_loadd(6, w, 128);
        _tile_loadd(7, w + 64, 128);
        _tile_loadd(4, x + i, bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (TWO) {
            _tile_loadd(5, below + i, bytes);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    alignas(64) float sums[32][TILE];
    _tile_stored(0, sums[0], sizeof sums[0]);
    _tile_stored(1, sums[0] + LANES, sizeof sums[0]);
    if (TWO) {
        _tile_stored(2, sums[16], sizeof sums[0]);
        _tile_stored(3, sums[16] + LANES, sizeof sums[0]);
    }
    for (int r = 0; r < upper + lower; r++)
        finish(m, tile, Sums{load(sums[r]), load(sums[r] + LANES)}, job.y + (row + r) * m.out);
}

void multiply_tiles(const Job<bf16>& job, int64_t first, int64_t last) {
    if (!has_amx()) return multiply_tiles<bf16>(job, first, last);
    const int64_t full = job.rows / 32 * 32, rest = job.rows - full;
    if (full) {
        shape_tiles(16, 16);
        for (int64_t row = 0; row < full; row += 32)
            for (int64_t tile = first; tile < last; tile++) multiply_block<true>(job, tile, row, 16, 16);
    }
    if (rest) {
        const int upper = rest < 16 ? rest : 16, lower = rest - upper;
        shape_tiles(upper, lower);
        for (int64_t tile = first; tile < last; tile++)
            lower ? multiply_block<true>(job, tile, full, upper, lower)
                  : multiply_block<false>(job, tile, full, upper, 0);
    }
    _tile_release();  // the state is 8 KB that every change of context would save
}

#endif

template <class T>
void multiply_part(const void* given, int part) {
    const Job<T>& job = *(const Job<T>*)given;
    const int64_t group = std::max<int64_t>(1, NEAR / (job.m->in * TILE * int64_t(sizeof(T))));
    const int64_t last = job.tiles * (part + 1) / job.parts;
    for (int64_t tile = job.tiles * part / job.parts; tile < last; tile += group)
        multiply_tiles(job, tile, std::min(last, tile + group));
}

template <class T>
void multiply_all(const Matrix* m, const T* x, T* y, int64_t rows) {
    Job<T> job{m, x, m->in, y, rows, (m->out + TILE - 1) / TILE, 1};
    static thread_local std::vector<T> padded;
    if (sizeof(T) == 2 && m->in % DEPTH) {  // the zeros of the weights must not meet what lies behind a row
        job.stride = round_up(m->in, DEPTH);
        padded.assign(rows * job.stride, T{});
        for (int64_t r = 0; r < rows; r++) memcpy(&padded[r * job.stride], x + r * m->in, m->in * sizeof(T));
        job.x = padded.data();
    }
    const int64_t work = m->out * m->in * int64_t(sizeof(T)) * ((rows + BLOCK - 1) / BLOCK);
    if (work >= WORTH && threads() > 1) job.parts = job.tiles < 4 * threads() ? job.tiles : 4 * threads();
    share(multiply_part<T>, &job, int(job.parts), work >= LARGE);
}

template <class T>
struct Packing {
    const T* weight;
    int64_t in, out;
    T* packed;
    int64_t depth, parts;
};

// Tiles of 32 outputs. Sixteen rows of sixteen words (a word is one fp32 number, or two of bf16) are turned at once; what
// reaches over an edge goes number by number.
template <class T>
void pack_part(const void* given, int part) {
    const Packing<T>& p = *(const Packing<T>*)given;
    constexpr int64_t step = 4 / sizeof(T), each = LANES * step;
    const int64_t tiles = (p.out + TILE - 1) / TILE;
    for (int64_t tile = tiles * part / p.parts; tile < tiles * (part + 1) / p.parts; tile++) {
        T* to = p.packed + tile * TILE * p.depth;
        const int64_t whole = (tile + 1) * TILE <= p.out ? p.in / each * each : 0;
        Words block[LANES];
        for (int64_t i = 0; i < whole; i += each)
            for (int64_t o = 0; o < TILE; o += LANES) {
                for (int r = 0; r < LANES; r++)
                    block[r] = (Words)load((const float*)(p.weight + (tile * TILE + o + r) * p.in + i));
                transpose(block);
                for (int r = 0; r < LANES; r++) store((float*)(to + (i + r * step) * TILE + o * step), (Floats)block[r]);
            }
        to += whole * TILE;
        for (int64_t i = whole; i < p.depth; i += step)
            for (int64_t o = tile * TILE; o < (tile + 1) * TILE; o++)
                for (int64_t s = i; s < i + step; s++) *to++ = o < p.out && s < p.in ? p.weight[o * p.in + s] : T{};
    }
}

template <class T>
void pack(const T* weight, int64_t in, int64_t out, T* packed, int64_t depth) {
    const Packing<T> job{weight, in, out, packed, depth, 4 * threads()};
    share(pack_part<T>, &job, int(job.parts), true);
}

}  // namespace

extern "C" {

// Numbers that the packed weights take.
int64_t hanlin_packed_size(int64_t in, int64_t out, int bytes) {
    return round_up(out, TILE) * (bytes == 2 ? round_up(in, DEPTH) : in);
}

// weight (out, in) row-major -> packed.
void hanlin_pack_f32(const float* weight, int64_t in, int64_t out, float* packed) {
    pack(weight, in, out, packed, in);
}
void hanlin_pack_bf16(const bf16* weight, int64_t in, int64_t out, bf16* packed) {
    pack(weight, in, out, packed, round_up(in, DEPTH));
}

// Asks for pages of 2 MB, which read up to twice as fast as pages of 4 KB. To be called before the first write.
void hanlin_huge_pages(void* start, int64_t bytes) {
#if defined(__linux__)
    const uintptr_t page = 2 << 20, first = ((uintptr_t)start + page - 1) / page * page;
    const uintptr_t last = ((uintptr_t)start + bytes) / page * page;
    if (last > first) madvise((void*)first, last - first, MADV_HUGEPAGE);
#endif
}

// x (rows, in), y (rows, out), both contiguous.
void hanlin_linear_f32(const Matrix* m, const float* x, float* y, int64_t rows) { multiply_all(m, x, y, rows); }
void hanlin_linear_bf16(const Matrix* m, const bf16* x, bf16* y, int64_t rows) { multiply_all(m, x, y, rows); }
}
