// Attention of a flat batch over pages. Sequence i brings `count` tokens behind the `start` that it holds; the new keys
// and values are written first, then token t sees the keys 0 … start + t, or the last `window` of them.
//
// A part is one key head of one sequence with up to 256 rows, a row being one query head of one token: whatever is read
// of keys and values serves all of them. Softmax runs in fp32 over blocks of 128 keys and is
// rescaled when a block brings a larger score (arXiv:2205.14135); after every 512 keys it starts anew, and the pieces
// are joined in their order, whether one thread computed them or several (flash decoding). Blocks and pieces are counted
// from the sequence's first key, hidden keys weigh exactly 0, and every sum has one order: a token's result depends
// on nothing but its sequence.

#include <algorithm>
#include <vector>

#include "desk.h"
#include "paged_products.h"
#include "pool.h"
#include "vectors.h"

using namespace hanlin;

struct Sequence {
    int32_t start, count, token, table;  // token: its first in the batch; table: its first entry in `pages`
};

// The same fields in the same order as `Layer` in paged_attention.py.
struct Layer {
    const Sequence* sequences;
    const int32_t* pages;
    int64_t count, page, heads, kv_heads, width, value_width, value_step, keys_page, values_page, window;
    float scale, softcap;
};

namespace {

constexpr int64_t PIECE = 512;        // keys that are summed up on their own
constexpr int64_t ROWS = 256;         // of a part
constexpr int64_t WORTH = 256 << 10;  // bytes of keys and values, from which threads share
constexpr int64_t LARGE = 1 << 20;    // and from which those that sleep are woken

constexpr float NOTHING = -INFINITY;

struct Unit {
    int32_t sequence, head;
    int64_t row, rows, from, to;  // pieces [from, to)
    float* partial;               // where they go if others are needed, or null
};

template <class T>
struct Job {
    const Layer* layer;
    const T *q, *k, *v;
    int64_t q_stride, k_stride, v_stride;
    T *keys, *values;
    const float* sinks;
    float* lse;
    T* out;
    const Unit* units;
};

// Softmax so far: sums (rows, wide_v) of weighted values, and of each row the largest score and the sum of weights.
struct State {
    float *sums, *top, *total;

    static int64_t size(int64_t rows, int64_t wide_v) { return whole(rows) * (wide_v + 2); }
    State(float* memory, int64_t rows, int64_t wide_v)
        : sums(memory), top(memory + whole(rows) * wide_v), total(top + whole(rows)) {}

    void clear(int64_t rows, int64_t wide_v) const {
        memset(sums, 0, whole(rows) * wide_v * sizeof(float));
        std::fill(top, top + rows, NOTHING);
        std::fill(total, total + rows, 0.0f);
    }

    __attribute__((noinline)) void join(const State& other, int64_t rows, int64_t wide_v) const {
        for (int64_t r = 0; r < rows; r++) {
            if (other.total[r] == 0.0f) continue;
            float *a = sums + r * wide_v, *b = other.sums + r * wide_v;
            const float high = std::max(top[r], other.top[r]);
            const float mine = std::exp2(top[r] - high), its = std::exp2(other.top[r] - high);
            for (int64_t i = 0; i < wide_v; i += LANES) store(a + i, load(a + i) * mine + load(b + i) * its);
            total[r] = total[r] * mine + other.total[r] * its;
            top[r] = high;
        }
    }
};

constexpr float LOG2E = 1.44269504088896341f;

inline Floats soft_cap(Floats v, float cap) {  // tanh(x) = 1 - 2 / (e^2x + 1)
    return cap - 2 * cap / (exponential(v * (2 / cap)) + 1.0f);
}

// A row's scores of keys [low, high) become weights 2^(factor * score - top); the other columns weigh nothing. Returns
// what earlier sums shrink to.
template <class W>
__attribute__((noinline)) float weigh(float* scores, W* weights, int64_t columns, int64_t low, int64_t high,
                                      float factor, float cap, float& top, float& total) {
    if (low >= high) {
        for (int64_t i = 0; i < columns; i += LANES) store(weights + i, Floats{});
        return 1.0f;
    }
    if (cap) {
        for (int64_t i = 0; i < columns; i += LANES)
            store(scores + i, soft_cap(load(scores + i) * factor, cap) * LOG2E);
        factor = 1.0f;
    }
    for (int64_t i = 0; i < columns; i += LANES)
        if (i < low || i + LANES > high) {
            const Ints at = lanes() + int32_t(i);
            store(scores + i, ((at >= int32_t(low)) & (at < int32_t(high))) ? load(scores + i) : spread(NOTHING));
        }
    Floats most = spread(NOTHING);
    for (int64_t i = 0; i < columns; i += LANES) most = larger(load(scores + i), most);
    const float before = top, now = std::max(before, factor * largest(most));
    Floats mass = {};
    for (int64_t i = 0; i < columns; i += LANES) {
        const Floats weight = power_of_two<sizeof(W) == 2>(load(scores + i) * factor - now);
        mass += weight;
        store(weights + i, weight);
    }
    const float shrink = before == now || before == NOTHING ? 1.0f : std::exp2(before - now);
    top = now;
    total = total * shrink + sum(mass);
    return shrink;
}

template <class T, class Products>
class Worker {
    using Weight = typename Products::Weight;

    const Job<T>& job;
    const Layer& l;
    const Unit& u;
    const Sequence& s;
    const int64_t group = l.heads / l.kv_heads;
    const Sizes n{u.rows, l.width, l.value_width, l.value_step};
    const int64_t room = State::size(u.rows, n.wide_v);
    Desk desk{Products::size(n) + 2 * SOME * KEYS + 2 * room + 512};
    Products products{n, desk};
    Weight* weights = desk.take<Weight>(SOME * KEYS);
    float* scores = desk.take<float>(SOME * KEYS);
    State piece{desk.take<float>(room), u.rows, n.wide_v}, all{desk.take<float>(room), u.rows, n.wide_v};

    int64_t end_of(int64_t row) const { return s.start + (u.row + row) / group + 1; }
    int64_t begin_of(int64_t row) const { return l.window ? std::max<int64_t>(0, end_of(row) - l.window) : 0; }

    void find(int64_t block, int64_t begin, int64_t end, Block<T>& found) const {
        found.low = std::max<int64_t>(0, begin - block), found.high = std::min(KEYS, end - block);
        for (int64_t g = 0; g < KEYS / GRANULE; g++) {
            found.keys[g] = found.values[g] = nullptr;
            if (g < found.low / GRANULE || g * GRANULE >= found.high) continue;
            const int64_t key = block + g * GRANULE, page = l.pages[s.table + key / l.page];
            const int64_t place = u.head * l.page + key % l.page;
            found.keys[g] = job.keys + page * l.keys_page + place * l.width;
            found.values[g] = job.values + page * l.values_page + place * l.value_step;
        }
    }

    void meet(int64_t block, int64_t first) {
        const int64_t rows = std::min(SOME, u.rows - first), last = first + rows - 1;
        const int64_t low = std::max<int64_t>(0, begin_of(first) - block), high = std::min(KEYS, end_of(last) - block);
        if (low >= high) return;
        products.score(first, rows, low, high, scores);
        float* sums = piece.sums + first * n.wide_v;
        for (int64_t r = 0; r < rows; r++) {
            const int64_t row = first + r, from = std::max<int64_t>(0, begin_of(row) - block);
            const int64_t to = std::min(KEYS, end_of(row) - block);
            const float shrink = weigh(scores + r * KEYS, weights + r * KEYS, whole(high), from, to, factor(),
                                       l.softcap, piece.top[row], piece.total[row]);
            if (shrink != 1.0f)
                for (int64_t i = 0; i < n.wide_v; i += LANES)
                    store(sums + r * n.wide_v + i, load(sums + r * n.wide_v + i) * shrink);
        }
        products.add(first, rows, low, high, weights, sums);
    }

    float factor() const { return l.softcap ? l.scale : l.scale * LOG2E; }

  public:
    Worker(const Job<T>& job, const Unit& u) : job(job), l(*job.layer), u(u), s(l.sequences[u.sequence]) {}

    void run() {
        const int64_t begin = begin_of(0), end = end_of(u.rows - 1);
        for (int64_t r = 0; r < u.rows; r++) {
            const int64_t row = u.row + r, head = u.head * group + row % group;
            products.take_query(r, job.q + (s.token + row / group) * job.q_stride + head * l.width);
        }
        products.ready();
        int64_t block = std::max(begin, u.from * PIECE) / KEYS * KEYS;
        Block<T> blocks[2], *now = blocks, *then = blocks + 1;
        find(block, begin, end, *now);
        for (int64_t p = u.from; p < u.to; p++) {
            if (u.partial) piece = State(u.partial + (p - u.from) * room, u.rows, n.wide_v);
            piece.clear(u.rows, n.wide_v);
            const int64_t stop = std::min(end, (p + 1) * PIECE);
            for (; block < stop; block += KEYS, std::swap(now, then)) {
                const bool more = block + KEYS < end;
                if (more) find(block + KEYS, begin, end, *then);
                products.take_block(*now, more ? then : nullptr);
                for (int64_t first = 0; first < u.rows; first += SOME) meet(block, first);
            }
            if (u.partial) continue;
            if (p == u.from)
                std::swap(piece, all);
            else
                all.join(piece, u.rows, n.wide_v);
        }
        if (!u.partial) finish(all);
    }

    void finish(const State& state) {
        for (int64_t r = 0; r < u.rows; r++) {
            const int64_t row = u.row + r, head = u.head * group + row % group;
            const int64_t place = (s.token + row / group) * l.heads + head;
            float shrink = 1.0f, total = state.total[r], top = state.top[r];
            if (job.sinks) {
                const float sink = job.sinks[head] * LOG2E, high = std::max(top, sink);
                shrink = std::exp2(top - high);
                total = total * shrink + std::exp2(sink - high);
                top = high;
            }
            if (job.lse) job.lse[place] = top / LOG2E + std::log(total);
            float* sums = state.sums + r * n.wide_v;
            products.in_order(sums);
            for (int64_t i = 0; i < n.value_width; i += LANES)
                store_up_to(job.out + place * n.value_width + i, load(sums + i) * (shrink / total), n.value_width - i);
        }
    }

    void join_partials(float* first, int64_t pieces) {
        const State joined(first, u.rows, n.wide_v);
        for (int64_t p = 1; p < pieces; p++)
            joined.join(State(first + p * room, u.rows, n.wide_v), u.rows, n.wide_v);
        finish(joined);
    }
};

template <class T, class Run>
void with_products(const Job<T>& job, const Unit& u, Run run) {
#if defined(HANLIN_TILES)
    if constexpr (sizeof(T) == 2)
        if (has_tiles()) return run(Worker<T, TileProducts>(job, u));
#endif
    run(Worker<T, Vectors<T>>(job, u));
}

template <class T>
void attend(const void* given, int part) {
    const Job<T>& job = *(const Job<T>*)given;
    with_products(job, job.units[part], [](auto&& worker) { worker.run(); });
}

template <class T>
void write(const void* given, int head) {
    const Job<T>& job = *(const Job<T>*)given;
    const Layer& l = *job.layer;
    const int64_t D = l.width, V = l.value_width;
    for (int64_t i = 0; i < l.count; i++) {
        const Sequence& s = l.sequences[i];
        for (int64_t t = 0; t < s.count; t++) {
            const int64_t key = s.start + t, page = l.pages[s.table + key / l.page];
            const int64_t place = head * l.page + key % l.page, token = s.token + t;
            memcpy(job.keys + page * l.keys_page + place * D, job.k + token * job.k_stride + head * D, D * sizeof(T));
            if (job.v)
                memcpy(job.values + page * l.values_page + place * V, job.v + token * job.v_stride + head * V,
                       V * sizeof(T));
        }
    }
}

// All is written before any of it is read: a sequence may read pages that another one fills in this very step.
template <class T>
void write_all(const Job<T>& job) {
    const Layer& l = *job.layer;
    int64_t tokens = 0;
    for (int64_t i = 0; i < l.count; i++) tokens += l.sequences[i].count;
    const int heads = int(l.kv_heads);
    if (tokens * heads * (l.width + l.value_width) * int64_t(sizeof(T)) >= LARGE)
        return share(write<T>, &job, heads, true);
    for (int head = 0; head < heads; head++) write<T>(&job, head);
}

template <class T>
void attend_all(Job<T> job) {
    const Layer& l = *job.layer;
    write_all(job);
    static thread_local std::vector<Unit> units, divided;
    static thread_local std::vector<float> partials;
    units.clear();
    const int64_t group = l.heads / l.kv_heads, wide_v = whole(l.value_width);
    int64_t bytes = 0, pieces = 0, room = 0;
    for (int64_t i = 0; i < l.count; i++) {
        const Sequence& s = l.sequences[i];
        for (int64_t row = 0; row < s.count * group; row += ROWS) {
            const int64_t rows = std::min(ROWS, s.count * group - row), end = s.start + (row + rows - 1) / group + 1;
            const int64_t begin = l.window ? std::max<int64_t>(0, s.start + row / group + 1 - l.window) : 0;
            const int64_t from = begin / PIECE, to = (end + PIECE - 1) / PIECE;
            for (int64_t head = 0; head < l.kv_heads; head++)
                units.push_back(Unit{int32_t(i), int32_t(head), row, rows, from, to, nullptr});
            bytes += (end - begin) * l.kv_heads * (l.width + l.value_width) * int64_t(sizeof(T));
            pieces += (to - from) * l.kv_heads;
            room += (to - from) * l.kv_heads * State::size(rows, wide_v);
        }
    }
    job.units = units.data();
    const int count = int(units.size());
    if (bytes < WORTH || threads() < 2) {
        for (int part = 0; part < count; part++) attend<T>(&job, part);
    } else if (count >= 4 * threads() || pieces == count) {
        share(attend<T>, &job, count, bytes >= LARGE);
    } else {  // too few units: a thread takes a piece
        divided.clear();
        if (int64_t(partials.size()) < room) partials.resize(room);
        float* next = partials.data();
        for (const Unit& u : units)
            for (int64_t p = u.from; p < u.to; p++, next += State::size(u.rows, wide_v))
                divided.push_back(Unit{u.sequence, u.head, u.row, u.rows, p, p + 1, next});
        job.units = divided.data();
        share(attend<T>, &job, int(divided.size()), bytes >= LARGE);
        next = partials.data();
        for (const Unit& u : units) {
            with_products(job, u, [&](auto&& worker) { worker.join_partials(next, u.to - u.from); });
            next += (u.to - u.from) * State::size(u.rows, wide_v);
        }
    }
}

}  // namespace

extern "C" {

// q (tokens, heads, width), k (tokens, kv_heads, width), v (tokens, kv_heads, value_width) or null: heads one behind the
// other, tokens by their strides in numbers. sinks (heads,), lse (tokens, heads): or null. out (tokens, heads,
// value_width), contiguous.
#define HANLIN_PAGED(NAME, T)                                                                                         \
    void hanlin_paged_write_##NAME(const Layer* l, const T* k, int64_t k_stride, const T* v, int64_t v_stride,        \
                                   T* keys, T* values) {                                                              \
        write_all(Job<T>{l, k, k, v, 0, k_stride, v_stride, keys, values, nullptr, nullptr, nullptr, nullptr});       \
    }                                                                                                                 \
    void hanlin_paged_attend_##NAME(const Layer* l, const T* q, int64_t q_stride, const T* k, int64_t k_stride,       \
                                    const T* v, int64_t v_stride, T* keys, T* values, const float* sinks, float* lse, \
                                    T* out) {                                                                         \
        attend_all(Job<T>{l, q, k, v, q_stride, k_stride, v_stride, keys, values, sinks, lse, out, nullptr});         \
    }

HANLIN_PAGED(f32, float)
HANLIN_PAGED(bf16, bf16)
}
