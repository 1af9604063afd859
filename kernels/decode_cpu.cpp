// Decode on a CPU: a few queries a row over [prefix of the row's task ; the row's own keys].
//
//     s_j = log2(e) scale q . k_j              part c of the keys gives     r_c = max_j s_j
//     l_c = sum_j 2^(s_j - r_c)                                             o_c = sum_j 2^(s_j - r_c) v_j
//     out = sum_c 2^(r_c - t) o_c / l,         l = sum_c 2^(r_c - t) l_c,   lse = ln(2) (t + log2 l),   t = max_c r_c
//
// A query that sees nothing has out = 0 and lse = -inf. Prefixes and own keys are cut into parts of at most PART keys,
// whose bounds depend on the prefix and on the row alone. A part of a prefix is computed once for all rows of its task.
//
// Where many queries meet a part, each is a SIMD lane: a key element, broadcast, meets all of them, and softmax needs no
// sum across lanes. Where few do, the lanes are the head dim. The first way gives a query the same bits whatever stands
// in the other lanes.
//
// Compiled when it is first called, for one HEAD_DIM and ELEMENT, by prefix_attn/backends/cpu.py.
//
// Source: arXiv:2402.05099 (shared-prefix decomposition), arXiv:1805.02867 (merging partial softmaxes).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include <omp.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define FLOAT32 0
#define BFLOAT16 1
#define FLOAT16 2

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

constexpr int PART = 256;             // keys of a part
constexpr int MOST_QUERIES = 256;     // that share a pass over a part of a prefix
constexpr int FEW_QUERIES = LANES / 2;  // up to which the lanes are the head dim
constexpr int VECTORS = (HEAD_DIM + LANES - 1) / LANES, PADDED = VECTORS * LANES;  // of a head
constexpr float LOG2_E = 1.44269504088896341f, LN_2 = 0.693147180559945309f;
constexpr float NONE = -std::numeric_limits<float>::infinity();

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Shorts __attribute__((vector_size(2 * LANES)));

#if ELEMENT == FLOAT32
typedef float Element;
#else
typedef uint16_t Element;  // its bits
#endif

// --- vectors and elements -------------------------------------------------------------------------------------------

inline Floats splat(float x) { return x - Floats{}; }
inline Ints splat(int x) { return x - Ints{}; }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

inline Floats load(const float* x) {
    Floats y;
    std::memcpy(&y, x, sizeof y);
    return y;
}

inline void store(float* x, Floats y) { std::memcpy(x, &y, sizeof y); }

inline Floats load(const uint16_t* x) {
    Shorts narrow;
    std::memcpy(&narrow, x, sizeof narrow);
#if defined(__AVX512F__)
    const Ints bits = (Ints)_mm512_cvtepu16_epi32((__m256i)narrow);  // GCC makes the same in four instructions
#else
    const Ints bits = __builtin_convertvector(narrow, Ints);
#endif
#if ELEMENT == FLOAT16
    const Ints magnitude = (bits & 0x7fff) << 13, special = (Ints)(magnitude >= 0x0f800000) & 0x70000000;
    const Floats shifted = (Floats)magnitude * 0x1p112f;  // exponents are biased by 15 there, by 127 here
    return (Floats)((Ints)shifted | special | (bits & 0x8000) << 16);
#else
    return (Floats)(bits << 16);
#endif
}

inline float widen(Element x) {
#if ELEMENT == FLOAT32
    return x;
#elif ELEMENT == FLOAT16
    _Float16 half;
    std::memcpy(&half, &x, sizeof half);
    return half;
#else
    const uint32_t bits = (uint32_t)x << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
#endif
}

inline Element narrow(float x) {
#if ELEMENT == FLOAT32
    return x;
#elif ELEMENT == FLOAT16
    const _Float16 half = (_Float16)x;
    Element bits;
    std::memcpy(&bits, &half, sizeof bits);
    return bits;
#else
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
#endif
}

template <int... I>
inline Floats sum_pairs(Floats a, Floats b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (2 * I)...) + __builtin_shufflevector(a, b, (2 * I + 1)...);
}

// The sums of LANES vectors, as one vector.
inline Floats sums(Floats* x) {
    for (int count = LANES / 2; count > 0; count /= 2)
        for (int i = 0; i < count; i++)
            x[i] = sum_pairs(x[2 * i], x[2 * i + 1], std::make_integer_sequence<int, LANES>{});
    return x[0];
}

// 2^x for x <= 0; 0 below the normal numbers. NaN stays NaN.
inline Floats exp2_of(Floats x) {
    const Floats clamped = x < -126.0f ? splat(-126.0f) : x;
    const Floats shifted = clamped + 0x1.8p23f;  // the integer nearest to x, in the low bits
    const Floats f = clamped - (shifted - 0x1.8p23f);
    Floats p = splat(1.535336188319500e-4f);
    p = p * f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    p = p * f + 1.0f;
    const Floats power = (Floats)(((Ints)shifted << 23) + 0x3f800000);
    return x < -126.0f ? Floats{} : p * power;
}

inline Floats tanh_of(Floats x) {
    const Floats size = (Floats)((Ints)x & 0x7fffffff), e = exp2_of(-2 * LOG2_E * size), y = x * x;
    const Floats far = (Floats)((Ints)((1 - e) / (1 + e)) | ((Ints)x & (int)0x80000000));
    const Floats near = x + x * y * (-0.333333333f + y * (0.133333333f + y * (-0.0539682540f + y * (0.0218694885f
                        - y * 0.00886323552f))));
    return size < 0.35f ? near : far;
}

// --- a call ---------------------------------------------------------------------------------------------------------

struct Call {  // in the order of backends/cpu.py
    const Element *q, *k, *v, *prefix_k, *prefix_v;
    Element* out;
    float* lse;                                                    // [batch, q_heads, q_len], or null
    const int32_t *starts, *lens, *task_ids, *kv_start, *kv_len;  // the last two may be null
    const float* sinks;                                            // [q_heads], or null
    int64_t batch, kv_heads, group, q_len, capacity, tasks;
    int64_t q_batch, q_head, q_query, q_dim, out_batch, out_head, out_query, out_dim;  // strides, in elements
    int64_t k_batch, k_head, k_token, v_batch, v_head, v_token;
    int64_t prefix_k_head, prefix_k_token, prefix_v_head, prefix_v_token;
    int64_t window, causal, batch_invariant, threads;  // window: 0 for none
    double scale, softcap;                             // softcap: 0 for none
};

// A row's keys and where the results of their parts stand: those of its prefix, then of its own keys.
struct Row {
    int64_t m, first, last, prefix_parts, parts, base;
};

// A part that some rows read: of the prefix of their task, or of one row's own keys.
struct Work {
    int task;  // -1: own keys
    int begin, end;  // of the rows, in `readers`
    int part;
};

struct Results {  // of a part, by query
    float *o, *r, *l;  // [PADDED], [], []
};

// Query rows of one kv head that meet a part. Query i of them sees keys first[i] <= j < last[i].
struct Queries {
    int count = 0;
    const Element* q[MOST_QUERIES];
    int64_t slot[MOST_QUERIES];
    int first[MOST_QUERIES + LANES], last[MOST_QUERIES + LANES];
};

struct Keys {
    const Element *k, *v;
    int64_t k_token, v_token;
};

// What a thread needs for one part.
struct Scratch {
    alignas(64) float q[MOST_QUERIES * PADDED];  // [vectors of queries][HEAD_DIM][LANES], or [queries][PADDED]
    alignas(64) float scores[MOST_QUERIES * PART];  // [vectors of queries][PART][LANES], or [queries][PART]
    alignas(64) float keys[PART * PADDED];
    alignas(64) float o[FEW_QUERIES * PADDED];
    Queries queries;
};

// Keys `from` and on as floats [count][token]; converted into `into` only where they are not that already.
inline const float* as_floats(const Element* x, int64_t& token, int count, float* into) {
#if ELEMENT == FLOAT32
    if (PADDED == HEAD_DIM) return x;
#endif
    for (int j = 0; j < count; j++) {
        const Element* from = x + j * token;
        int d = 0;
        for (; d + LANES <= HEAD_DIM; d += LANES) store(into + j * PADDED + d, load(from + d));
        for (; d < PADDED; d++) into[j * PADDED + d] = d < HEAD_DIM ? widen(from[d]) : 0.0f;
    }
    token = PADDED;
    return into;
}

inline Floats to_log2(Floats dot, const Call& call) {
    if (call.softcap == 0) return dot;  // which the scale of q did
    return tanh_of(dot / (float)call.softcap) * (float)(call.softcap * LOG2_E);
}

inline float scale_of_q(const Call& call) { return (float)(call.softcap == 0 ? call.scale * LOG2_E : call.scale); }

// --- queries in lanes -----------------------------------------------------------------------------------------------

template <int N>
inline void dots(const float* k, int64_t token, const float* q, Floats* scores) {
    constexpr int BLOCK = 32;  // dims added up apart: a long chain of sums would round more than a matrix product
    for (int j = 0; j < N; j++) scores[j] = Floats{};
    for (int begin = 0; begin < HEAD_DIM; begin += BLOCK) {
        Floats sum[N] = {};
        for (int d = begin; d < std::min(begin + BLOCK, HEAD_DIM); d++) {
            const Floats queries = load(q + d * LANES);
            for (int j = 0; j < N; j++) sum[j] += k[j * token + d] * queries;
        }
        for (int j = 0; j < N; j++) scores[j] += sum[j];
    }
}

template <int N>
inline void weighted(const float* v, int64_t token, int count, const float* p, Floats* sum) {
    for (int i = 0; i < N; i++) sum[i] = Floats{};
    for (int j = 0; j < count; j++) {
        const Floats weights = load(p + j * LANES);
        for (int i = 0; i < N; i++) sum[i] += v[j * token + i] * weights;
    }
}

void attend_in_lanes(const Call& call, const Keys& keys, int from, int to, Scratch& s, const Results& results) {
    Queries& queries = s.queries;
    const int vectors = (queries.count + LANES - 1) / LANES, count = to - from;
    const float scale = scale_of_q(call);
    for (int i = 0; i < vectors * LANES; i++) {
        const int source = std::min(i, queries.count - 1);  // lanes to spare repeat the last query
        float* q = s.q + (i / LANES) * HEAD_DIM * LANES + i % LANES;
        for (int d = 0; d < HEAD_DIM; d++) q[d * LANES] = widen(queries.q[source][d * call.q_dim]) * scale;
        queries.first[i] = queries.first[source], queries.last[i] = queries.last[source];
    }

    int64_t token = keys.k_token;
    const float* k = as_floats(keys.k + from * keys.k_token, token, count, s.keys);
    for (int j = 0; j < count;) {
        constexpr int MANY = LANES == 4 ? 8 : 12;  // sums that the registers hold
        const int step = count - j >= MANY ? MANY : count - j >= 4 ? 4 : 1;
        for (int i = 0; i < vectors; i++) {
            Floats found[MANY];
            const float* q = s.q + i * HEAD_DIM * LANES;
            if (step == MANY) dots<MANY>(k + j * token, token, q, found);
            else if (step == 4) dots<4>(k + j * token, token, q, found);
            else dots<1>(k + j * token, token, q, found);
            for (int n = 0; n < step; n++) store(s.scores + (i * PART + j + n) * LANES, to_log2(found[n], call));
        }
        j += step;
    }

    float most[MOST_QUERIES], total[MOST_QUERIES];
    for (int i = 0; i < vectors; i++) {
        float* scores = s.scores + i * PART * LANES;
        Ints first, last;
        std::memcpy(&first, queries.first + i * LANES, sizeof first);
        std::memcpy(&last, queries.last + i * LANES, sizeof last);
        Floats r = splat(NONE), l = {};
        for (int j = 0; j < count; j++) {
            const Ints visible = (first <= from + j) & (last > from + j);
            const Floats score = visible ? load(scores + j * LANES) : splat(NONE);
            store(scores + j * LANES, score);
            r = larger(score, r);
        }
        const Floats base = r == NONE ? Floats{} : r;
        for (int j = 0; j < count; j++) {
            const Floats p = exp2_of(load(scores + j * LANES) - base);
            store(scores + j * LANES, p);
            l += p;
        }
        store(most + i * LANES, r), store(total + i * LANES, l);
    }

    token = keys.v_token;
    const float* v = as_floats(keys.v + from * keys.v_token, token, count, s.keys);
    constexpr int BLOCK = LANES == 4 ? 8 : 16;  // dims
    for (int d = 0; d < HEAD_DIM; d += BLOCK)
        for (int i = 0; i < vectors; i++) {
            Floats sum[BLOCK];
            const float* p = s.scores + i * PART * LANES;
            const int dims = std::min(BLOCK, HEAD_DIM - d);
            if (dims == BLOCK) weighted<BLOCK>(v + d, token, count, p, sum);
            else for (int n = 0; n < dims; n++) weighted<1>(v + d + n, token, count, p, sum + n);
            for (int lane = 0; lane < std::min(LANES, queries.count - i * LANES); lane++) {
                float* o = results.o + queries.slot[i * LANES + lane] * PADDED + d;
                for (int n = 0; n < dims; n++) o[n] = sum[n][lane];
            }
        }
    for (int i = 0; i < queries.count; i++) {
        results.r[queries.slot[i]] = most[i];
        results.l[queries.slot[i]] = total[i];
    }
}

// --- the head dim in lanes ------------------------------------------------------------------------------------------

void attend_along_head(const Call& call, const Keys& keys, int from, int to, Scratch& s, const Results& results) {
    const Queries& queries = s.queries;
    const float scale = scale_of_q(call);
    for (int i = 0; i < queries.count; i++)
        for (int d = 0; d < PADDED; d++)
            s.q[i * PADDED + d] = d < HEAD_DIM ? widen(queries.q[i][d * call.q_dim]) * scale : 0.0f;

    Ints lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    for (int j = from; j < to; j += LANES) {
        const int count = std::min(LANES, to - j);
        int64_t token = keys.k_token;
        const float* k = as_floats(keys.k + j * keys.k_token, token, count, s.keys);
        for (int i = 0; i < queries.count; i++) {
            Floats q[VECTORS], sum[LANES];
            for (int d = 0; d < VECTORS; d++) q[d] = load(s.q + i * PADDED + d * LANES);
            for (int n = 0; n < LANES; n++) {
                const float* key = k + std::min(n, count - 1) * token;
                sum[n] = q[0] * load(key);
                for (int d = 1; d < VECTORS; d++) sum[n] += q[d] * load(key + d * LANES);
            }
            const Ints at = j + lane, visible = (at >= queries.first[i]) & (at < queries.last[i]);
            store(s.scores + i * PART + j - from, visible ? to_log2(sums(sum), call) : splat(NONE));
        }
    }

    for (int i = 0; i < queries.count; i++) {
        float* scores = s.scores + i * PART;
        Floats r = splat(NONE), l = {};
        for (int j = 0; j < to - from; j += LANES) r = larger(load(scores + j), r);
        float most = NONE, total = 0;
        for (int n = 0; n < LANES; n++) most = std::max(most, r[n]);
        const float base = most == NONE ? 0 : most;
        for (int j = 0; j < to - from; j += LANES) {
            const Floats p = exp2_of(load(scores + j) - base);
            store(scores + j, p);
            l += p;
        }
        for (int n = 0; n < LANES; n++) total += l[n];
        results.r[queries.slot[i]] = most;
        results.l[queries.slot[i]] = total;
        std::memset(s.o + i * PADDED, 0, sizeof(float) * PADDED);
    }

    for (int j = from; j < to; j += LANES) {
        const int count = std::min(LANES, to - j);
        int64_t token = keys.v_token;
        const float* v = as_floats(keys.v + j * keys.v_token, token, count, s.keys);
        for (int i = 0; i < queries.count; i++) {
            const float* p = s.scores + i * PART + j - from;
            Floats sum[VECTORS];
            for (int d = 0; d < VECTORS; d++) sum[d] = load(s.o + i * PADDED + d * LANES);
            for (int n = 0; n < count; n++)
                for (int d = 0; d < VECTORS; d++) sum[d] += p[n] * load(v + n * token + d * LANES);
            for (int d = 0; d < VECTORS; d++) store(s.o + i * PADDED + d * LANES, sum[d]);
        }
    }
    for (int i = 0; i < queries.count; i++)
        std::memcpy(results.o + queries.slot[i] * PADDED, s.o + i * PADDED, sizeof(float) * PADDED);
}

// --- parts ----------------------------------------------------------------------------------------------------------

void attend(const Call& call, const Work& work, int64_t head, const std::vector<Row>& rows, const int* readers,
            Scratch& s, const Results& results) {
    Queries& queries = s.queries;
    const int64_t per_row = call.group * call.q_len;
    const bool own = work.task < 0;
    Keys keys;
    int from, to;
    if (own) {
        const int64_t b = readers[work.begin];
        from = rows[b].first + work.part * PART, to = std::min<int64_t>(from + PART, rows[b].last);
        keys = {call.k + b * call.k_batch + head * call.k_head, call.v + b * call.v_batch + head * call.v_head,
                call.k_token, call.v_token};
    } else {
        from = work.part * PART, to = std::min(from + PART, call.lens[work.task]);
        const int64_t start = call.starts[work.task];
        keys = {call.prefix_k + head * call.prefix_k_head + start * call.prefix_k_token,
                call.prefix_v + head * call.prefix_v_head + start * call.prefix_v_token,
                call.prefix_k_token, call.prefix_v_token};
    }

    int lowest = to, highest = from;
    queries.count = 0;
    for (int reader = work.begin; reader < work.end; reader++) {
        const int64_t b = readers[reader];
        const Row& row = rows[b];
        const int64_t part = own ? row.prefix_parts + work.part : work.part;
        const int64_t slot = (row.base * call.kv_heads + head * row.parts + part) * per_row;
        const int64_t past = (call.kv_len ? call.kv_len[b] : call.capacity) - call.q_len;
        for (int64_t g = 0; g < call.group; g++)
            for (int64_t i = 0; i < call.q_len; i++) {
                const int n = queries.count++;
                int64_t first = from, last = to;
                if (own && call.causal) last = std::min(last, past + i + 1);
                if (call.window) first = std::max(first, (own ? 0 : row.m) + past + i - call.window + 1);
                last = std::max(first = std::min<int64_t>(first, to), last);
                queries.q[n] = call.q + b * call.q_batch + (head * call.group + g) * call.q_head + i * call.q_query;
                queries.slot[n] = slot + g * call.q_len + i;
                queries.first[n] = first, queries.last[n] = last;
                if (first < last) lowest = std::min<int>(lowest, first), highest = std::max<int>(highest, last);
            }
    }
    if (lowest >= highest) {
        for (int i = 0; i < queries.count; i++) results.r[queries.slot[i]] = NONE, results.l[queries.slot[i]] = 0;
    } else if (queries.count <= FEW_QUERIES && !call.batch_invariant) {
        attend_along_head(call, keys, lowest, highest, s, results);
    } else {
        attend_in_lanes(call, keys, lowest, highest, s, results);
    }
}

void merge(const Call& call, int64_t b, int64_t h, const Row& row, const Results& results) {
    const int64_t per_row = call.group * call.q_len, head = h / call.group, g = h % call.group;
    for (int64_t i = 0; i < call.q_len; i++) {
        const int64_t slot = (row.base * call.kv_heads + head * row.parts) * per_row + g * call.q_len + i;
        float most = call.sinks ? call.sinks[h] * LOG2_E : NONE;
        for (int64_t p = 0; p < row.parts; p++) most = std::max(most, results.r[slot + p * per_row]);
        const float base = most == NONE ? 0 : most;
        float total = call.sinks ? std::exp2(call.sinks[h] * LOG2_E - base) : 0;
        Floats sum[VECTORS] = {};
        for (int64_t p = 0; p < row.parts; p++) {
            const int64_t at = slot + p * per_row;
            if (results.r[at] == NONE) continue;  // it saw nothing, and has no o
            const float weight = std::exp2(results.r[at] - base);
            total += weight * results.l[at];
            for (int d = 0; d < VECTORS; d++) sum[d] += weight * load(results.o + at * PADDED + d * LANES);
        }
        alignas(64) float out[PADDED];
        for (int d = 0; d < VECTORS; d++) store(out + d * LANES, total == 0 ? Floats{} : sum[d] / total);
        Element* to = call.out + b * call.out_batch + h * call.out_head + i * call.out_query;
        for (int d = 0; d < HEAD_DIM; d++) to[d * call.out_dim] = narrow(out[d]);
        if (call.lse) call.lse[(b * call.kv_heads * call.group + h) * call.q_len + i] = LN_2 * (most + std::log2(total));
    }
}

// 0; 1 where a task id or a key bound is out of range; 2 where memory runs out.
extern "C" int decode(const Call* pointer) {
    const Call& call = *pointer;
    static thread_local std::vector<float> memory;  // kept: fresh pages would cost more than the products
    static thread_local std::vector<std::unique_ptr<Scratch>> scratch;
    try {
        std::vector<Row> rows(call.batch);
        std::vector<std::vector<int>> readers_of(call.tasks);
        const int64_t per_row = call.group * call.q_len;
        int64_t parts = 0;
        for (int64_t b = 0; b < call.batch; b++) {
            Row& row = rows[b];
            const int task = call.task_ids[b];
            row.first = call.kv_start ? call.kv_start[b] : 0, row.last = call.kv_len ? call.kv_len[b] : call.capacity;
            if (task < -1 || task >= call.tasks || (task >= 0 && call.lens[task] < 0)) return 1;
            if (std::min(row.first, row.last) < 0 || std::max(row.first, row.last) > call.capacity) return 1;
            row.m = task < 0 ? 0 : call.lens[task];
            if (row.m > 0) readers_of[task].push_back(b);
            row.prefix_parts = (row.m + PART - 1) / PART;
            row.parts = row.prefix_parts + (std::max<int64_t>(row.last - row.first, 0) + PART - 1) / PART;
            row.base = parts;
            parts += row.parts;
        }

        std::vector<Work> works;
        std::vector<int> readers;
        int64_t products = 0;
        for (int task = 0; task < call.tasks; task++) {
            const int begin = readers.size(), most = std::max<int64_t>(1, MOST_QUERIES / per_row);
            readers.insert(readers.end(), readers_of[task].begin(), readers_of[task].end());
            for (int at = begin; at < (int)readers.size(); at += most)
                for (int part = 0; part * PART < call.lens[task]; part++)
                    works.push_back({task, at, std::min<int>(at + most, readers.size()), part});
            products += (int64_t)(readers.size() - begin) * std::max(call.lens[task], 0);
        }
        for (int64_t b = 0; b < call.batch; b++) {
            const int begin = readers.size();
            readers.push_back(b);
            for (int part = 0; part < rows[b].parts - rows[b].prefix_parts; part++)
                works.push_back({-1, begin, begin + 1, part});
            products += std::max<int64_t>(rows[b].last - rows[b].first, 0);
        }
        products *= call.kv_heads * per_row * HEAD_DIM;

        const int64_t slots = parts * call.kv_heads * per_row;
        if ((int64_t)memory.size() < slots * (PADDED + 2)) memory.resize(slots * (PADDED + 2));
        const Results results = {memory.data(), memory.data() + slots * PADDED, memory.data() + slots * (PADDED + 1)};
        constexpr int64_t WORTH_A_THREAD = 1 << 17;  // products; a thread takes microseconds to wake
        const int threads = std::max<int64_t>(1, std::min(call.threads, products / WORTH_A_THREAD));
        while ((int)scratch.size() < threads) scratch.push_back(std::make_unique<Scratch>());

        const int64_t jobs = works.size() * call.kv_heads, heads = call.batch * call.kv_heads * call.group;
        const std::unique_ptr<Scratch>* const scratches = scratch.data();  // of this thread, for all of them
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            Scratch& s = *scratches[omp_get_thread_num()];
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < jobs; i++)
                attend(call, works[i / call.kv_heads], i % call.kv_heads, rows, readers.data(), s, results);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < heads; i++)
                merge(call, i / (call.kv_heads * call.group), i % (call.kv_heads * call.group),
                      rows[i / (call.kv_heads * call.group)], results);
        }
    } catch (const std::bad_alloc&) {
        return 2;
    }
    return 0;
}
