// Queries of one kv head over at most PART keys:
//
//     s_j = log2(e) scale q . k_j       r = max_j s_j       l = sum_j 2^(s_j - r)       o = sum_j 2^(s_j - r) v_j
//
// Where many queries meet a part, each is a SIMD lane: a key element, broadcast, meets all of them, and softmax needs
// no sum across lanes. Where few do, the lanes are the head dim. The first way gives a query the same bits whatever
// stands in the other lanes.

#pragma once

#include "vectors.h"

constexpr int PART = 256;               // keys
constexpr int MOST_QUERIES = 256;       // that meet a part together
constexpr int FEW_QUERIES = LANES / 2;  // up to which the lanes are the head dim

struct Call {  // in the order of backends/cpu.py
    const Element *q, *k, *v, *prefix_k, *prefix_v;
    Element* out;
    float* lse;                                                   // [batch, q_heads, q_len], or null
    const int32_t *starts, *lens, *task_ids, *kv_start, *kv_len;  // the last two may be null
    const float *sinks, *bias;                                    // [q_heads], [q_heads, 2 reach + 1]; may be null
    int64_t batch, kv_heads, group, q_len, capacity, tasks, reach;
    int64_t q_batch, q_head, q_query, q_dim, out_batch, out_head, out_query, out_dim;  // strides, in elements
    int64_t k_batch, k_head, k_token, v_batch, v_head, v_token;
    int64_t prefix_k_head, prefix_k_token, prefix_v_head, prefix_v_token;
    int64_t window, causal, batch_invariant, threads;  // window: 0 for none
    double scale, softcap;                             // softcap: 0 for none
};

// What a part gives, by query: o [PADDED], r and l. Where l is 0, o may not be written. A NaN among the scores makes l
// and o NaN; r passes over it, and is -inf where all are NaN.
struct Results {
    float *o, *r, *l;
};

// Queries of one kv head that meet a part. Query i sees keys first[i] <= j < last[i]; its result goes to slot[i].
struct Queries {
    int count = 0;
    const Element* q[MOST_QUERIES];
    int64_t slot[MOST_QUERIES];
    int first[MOST_QUERIES], last[MOST_QUERIES];
    const float* bias[MOST_QUERIES];  // of its head, at distance 0
    int64_t place[MOST_QUERIES];      // from which distances to keys are counted
};

// Keys from..to of a prefix or of a row.
struct Part {
    const Element *k, *v;
    int64_t k_token, v_token;
    int from, to;
    bool own;
};

// What a thread needs. Vectors are those of queries.
struct Scratch {
    alignas(64) float q[MOST_QUERIES * PADDED];     // [vectors][HEAD_DIM][LANES], or [queries][PADDED]
    alignas(64) float scores[MOST_QUERIES * PART];  // [vectors][PART][LANES], or [queries][PART]
    alignas(64) float keys[PART * PADDED];
    alignas(64) float o[2 * MOST_QUERIES * PADDED], r[2 * MOST_QUERIES], l[2 * MOST_QUERIES];
    Queries queries;
};

// Keys as floats [count][token]; converted into `into` only where they are not that already.
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

// The scale of the queries: in base 2, unless a softcap comes between.
inline float scale_of(const Call& call) { return (float)(call.softcap == 0 ? call.scale * LOG2_E : call.scale); }

// What a relative bias adds to the scaled score of query i.
inline float bias_of(const Call& call, const Queries& queries, int i, int64_t key) {
    const float bias = queries.bias[i][std::clamp(key - queries.place[i], -call.reach, call.reach)];
    return call.softcap == 0 ? bias * LOG2_E : bias;
}

inline Floats to_log2(Floats score, const Call& call) {
    if (call.softcap == 0) return score;
    return tanh_of(score / (float)call.softcap) * (float)(call.softcap * LOG2_E);
}

template <int N>
inline void dots(const float* k, int64_t token, const float* q, Floats* scores) {
    constexpr int BLOCK = 16;  // dims added up apart: a long chain of sums would round more than a matrix product
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

void attend_in_lanes(const Call& call, const Part& part, Scratch& s, const Results& results) {
    const Queries& queries = s.queries;
    const int vectors = (queries.count + LANES - 1) / LANES, count = part.to - part.from;
    const float scale = scale_of(call);
    Ints first[MOST_QUERIES / LANES], last[MOST_QUERIES / LANES];          // the keys that each lane sees,
    int lowest[MOST_QUERIES / LANES], highest[MOST_QUERIES / LANES] = {};  // and all that one of a vector's does
    std::fill_n(lowest, vectors, count);
    for (int i = 0; i < vectors * LANES; i++) {
        const int source = std::min(i, queries.count - 1), vector = i / LANES;  // lanes to spare repeat the last query
        float* q = s.q + vector * HEAD_DIM * LANES + i % LANES;
        for (int d = 0; d < HEAD_DIM; d++) q[d * LANES] = widen(queries.q[source][d * call.q_dim]) * scale;
        const int from = queries.first[source] - part.from, to = queries.last[source] - part.from;
        first[vector][i % LANES] = from, last[vector][i % LANES] = to;
        if (from < to) lowest[vector] = std::min(lowest[vector], from), highest[vector] = std::max(highest[vector], to);
    }

    int64_t token = part.k_token;
    const float* k = as_floats(part.k + part.from * part.k_token, token, count, s.keys);
    for (int j = 0; j < count;) {
        constexpr int MANY = LANES == 4 ? 8 : 12;  // sums that the registers hold
        const int step = count - j >= MANY ? MANY : count - j >= 4 ? 4 : 1;
        for (int i = 0; i < vectors; i++) {
            if (j + step <= lowest[i] || j >= highest[i]) continue;
            Floats found[MANY];
            const float* q = s.q + i * HEAD_DIM * LANES;
            if (step == MANY) dots<MANY>(k + j * token, token, q, found);
            else if (step == 4) dots<4>(k + j * token, token, q, found);
            else dots<1>(k + j * token, token, q, found);
            for (int n = 0; n < step; n++) {
                if (call.bias)
                    for (int lane = 0; lane < std::min(LANES, queries.count - i * LANES); lane++)
                        found[n][lane] += bias_of(call, queries, i * LANES + lane, part.from + j + n);
                store(s.scores + (i * PART + j + n) * LANES, to_log2(found[n], call));
            }
        }
        j += step;
    }

    for (int i = 0; i < vectors; i++) {
        float* scores = s.scores + i * PART * LANES;
        Floats r = splat(NONE), l = {};
        for (int j = lowest[i]; j < highest[i]; j++) {
            const Ints visible = (first[i] <= j) & (last[i] > j);
            const Floats score = visible ? load(scores + j * LANES) : splat(NONE);
            store(scores + j * LANES, score);
            r = larger(score, r);
        }
        const Floats base = r == NONE ? Floats{} : r;
        for (int j = lowest[i]; j < highest[i]; j++) {
            const Floats p = exp2_of(load(scores + j * LANES) - base);
            store(scores + j * LANES, p);
            l += p;
        }
        for (int lane = 0; lane < std::min(LANES, queries.count - i * LANES); lane++) {
            results.r[queries.slot[i * LANES + lane]] = r[lane];
            results.l[queries.slot[i * LANES + lane]] = l[lane];
        }
    }

    token = part.v_token;
    const float* v = as_floats(part.v + part.from * part.v_token, token, count, s.keys);
    constexpr int BLOCK = LANES == 4 ? 8 : 16;  // dims
    for (int d = 0; d < HEAD_DIM; d += BLOCK)
        for (int i = 0; i < vectors; i++) {
            if (lowest[i] >= highest[i]) continue;
            Floats sum[BLOCK];
            const float* p = s.scores + (i * PART + lowest[i]) * LANES;
            const float* values = v + lowest[i] * token + d;
            const int dims = std::min(BLOCK, HEAD_DIM - d), seen = highest[i] - lowest[i];
            if (dims == BLOCK) weighted<BLOCK>(values, token, seen, p, sum);
            else for (int n = 0; n < dims; n++) weighted<1>(values + n, token, seen, p, sum + n);
            for (int lane = 0; lane < std::min(LANES, queries.count - i * LANES); lane++) {
                float* o = results.o + queries.slot[i * LANES + lane] * PADDED + d;
                for (int n = 0; n < dims; n++) o[n] = sum[n][lane];
            }
        }
}

void attend_along_head(const Call& call, const Part& part, Scratch& s, const Results& results) {
    const Queries& queries = s.queries;
    const float scale = scale_of(call);
    const int count = part.to - part.from;
    for (int i = 0; i < queries.count; i++)
        for (int d = 0; d < PADDED; d++)
            s.q[i * PADDED + d] = d < HEAD_DIM ? widen(queries.q[i][d * call.q_dim]) * scale : 0.0f;

    for (int j = 0; j < count; j += LANES) {
        const int some = std::min(LANES, count - j);
        int64_t token = part.k_token;
        const float* k = as_floats(part.k + (part.from + j) * part.k_token, token, some, s.keys);
        for (int i = 0; i < queries.count; i++) {
            Floats q[VECTORS], sum[LANES];
            for (int d = 0; d < VECTORS; d++) q[d] = load(s.q + i * PADDED + d * LANES);
            for (int n = 0; n < LANES; n++) {
                const float* key = k + std::min(n, some - 1) * token;
                sum[n] = q[0] * load(key);
                for (int d = 1; d < VECTORS; d++) sum[n] += q[d] * load(key + d * LANES);
            }
            Floats found = sums(sum);
            if (call.bias)
                for (int n = 0; n < some; n++) found[n] += bias_of(call, queries, i, part.from + j + n);
            const Ints key = part.from + j + counted();
            const Ints visible = (key >= queries.first[i]) & (key < queries.last[i]);
            store(s.scores + i * PART + j, visible ? to_log2(found, call) : splat(NONE));
        }
    }

    for (int i = 0; i < queries.count; i++) {
        float* scores = s.scores + i * PART;
        Floats r = splat(NONE), l = {};
        for (int j = 0; j < count; j += LANES) r = larger(load(scores + j), r);
        float most = NONE, total = 0;
        for (int n = 0; n < LANES; n++) most = std::max(most, r[n]);
        const float base = most == NONE ? 0 : most;
        for (int j = 0; j < count; j += LANES) {
            const Floats p = exp2_of(load(scores + j) - base);
            store(scores + j, p);
            l += p;
        }
        for (int n = 0; n < LANES; n++) total += l[n];
        results.r[queries.slot[i]] = most;
        results.l[queries.slot[i]] = total;
        std::memset(results.o + queries.slot[i] * PADDED, 0, sizeof(float) * PADDED);
    }

    for (int j = 0; j < count; j += LANES) {
        const int some = std::min(LANES, count - j);
        int64_t token = part.v_token;
        const float* v = as_floats(part.v + (part.from + j) * part.v_token, token, some, s.keys);
        for (int i = 0; i < queries.count; i++) {
            const float* p = s.scores + i * PART + j;
            float* o = results.o + queries.slot[i] * PADDED;
            Floats sum[VECTORS];
            for (int d = 0; d < VECTORS; d++) sum[d] = load(o + d * LANES);
            for (int n = 0; n < some; n++)
                for (int d = 0; d < VECTORS; d++) sum[d] += p[n] * load(v + n * token + d * LANES);
            for (int d = 0; d < VECTORS; d++) store(o + d * LANES, sum[d]);
        }
    }
}
