// Attention on a CPU, over [prefix of the row's task ; the row's own keys].
//
// Prefixes and own keys are cut into parts of at most PART keys, whose bounds depend on the prefix and the row alone.
// Part c gives r_c, l_c and o_c (part.h), and
//
//     out = sum_c 2^(r_c - t) o_c / l,     l = sum_c 2^(r_c - t) l_c,     lse = ln(2) (t + log2 l),     t = max_c r_c
//
// A query that sees nothing has out = 0 and lse = -inf.
//
// In decode a part of a prefix meets the queries of all rows of its task at once; the results of all parts are kept,
// and merged in the end. In prefill, and where no two rows share a prefix, a block of a row's queries meets one part
// after the other, and keeps one result. Both join parts in one order: a row's bits do not tell which it was.
//
// Compiled when it is first called, for one HEAD_DIM and ELEMENT, by prefix_attn/backends/compile_cpu.py.
//
// Source: arXiv:2402.05099 (shared-prefix decomposition), arXiv:1805.02867 (merging partial softmaxes).

#include <memory>
#include <new>
#include <vector>

#include <omp.h>

#include "part.h"

constexpr int DECODED_QUERIES = 64;  // of a row and kv head, up to which it is decoded

// A row's keys: m of its prefix, own ones first..last. Its parts are those of the prefix, then the own.
struct Row {
    int64_t b, task, m, first, last, prefix_parts, parts;
    int64_t base;  // parts of the rows before it
};

// Part n of a row's keys, for one kv head.
Part part_of(const Call& call, const Row& row, int64_t n, int64_t head) {
    if (n < row.prefix_parts) {
        const int64_t start = call.starts[row.task];
        return {call.prefix_k + head * call.prefix_k_head + start * call.prefix_k_token,
                call.prefix_v + head * call.prefix_v_head + start * call.prefix_v_token,
                call.prefix_k_token, call.prefix_v_token,
                (int)n * PART, (int)std::min<int64_t>((n + 1) * PART, row.m), false};
    }
    const int64_t from = row.first + (n - row.prefix_parts) * PART;
    return {call.k + row.b * call.k_batch + head * call.k_head, call.v + row.b * call.v_batch + head * call.v_head,
            call.k_token, call.v_token, (int)from, (int)std::min(from + PART, row.last), true};
}

// Adds queries begin..end of each of the kv head's heads, whose results go to `slot` and on.
void add(const Call& call, const Row& row, const Part& part, int64_t head, int begin, int end, int64_t slot,
         Queries& queries) {
    const int64_t end_of_row = call.kv_len ? call.kv_len[row.b] : call.capacity, shift = part.own ? 0 : row.m;
    for (int64_t g = 0; g < call.group; g++)
        for (int64_t i = begin; i < end; i++) {
            const int n = queries.count++;
            const int64_t h = head * call.group + g, place = end_of_row - call.q_len + i;
            int64_t first = part.from, last = part.to;
            if (part.own && call.causal) last = std::min(last, place + 1);
            if (call.window) first = std::max(first, shift + place - call.window + 1);
            first = std::min<int64_t>(first, part.to);
            queries.q[n] = call.q + row.b * call.q_batch + h * call.q_head + i * call.q_query;
            queries.slot[n] = slot++;
            queries.first[n] = first, queries.last[n] = std::max(first, last);
            if (!call.bias) continue;
            queries.bias[n] = call.bias + h * (2 * call.reach + 1) + call.reach;
            queries.place[n] = shift + (call.causal ? place : call.capacity - call.q_len + i);
        }
}

inline bool along_head(const Call& call, const Queries& queries) {
    return queries.count <= FEW_QUERIES && !call.batch_invariant;
}

// Begins to load keys or values where they are so short that the processor would notice too late that they follow each
// other: two cache lines at most, and 8 KiB of them.
inline void fetch(const Element* x, int64_t token, int64_t count) {
    constexpr int64_t LINE = 64 / sizeof(Element), LINES = (HEAD_DIM + LINE - 1) / LINE, MOST = 128 / LINES;
    if constexpr (LINES <= 2)
        for (int64_t j = 0; j < std::min(count, MOST); j++)
            for (int64_t line = 0; line < LINES; line++) __builtin_prefetch(x + j * token + line * LINE);
}

// Writes the results of the queries that were added, and cuts the part to the keys that one of them sees; false where
// none sees any.
bool attend(const Call& call, Part& part, Scratch& s, const Results& results) {
    const Queries& queries = s.queries;
    int from = part.to, to = part.from;
    for (int i = 0; i < queries.count; i++)
        if (queries.first[i] < queries.last[i])
            from = std::min(from, queries.first[i]), to = std::max(to, queries.last[i]);
    if (from >= to) {
        for (int i = 0; i < queries.count; i++) results.r[queries.slot[i]] = NONE, results.l[queries.slot[i]] = 0;
        return false;
    }
    part.from = from, part.to = to;
    fetch(part.k + from * part.k_token, part.k_token, to - from);
    fetch(part.v + from * part.v_token, part.v_token, to - from);
    if (along_head(call, queries)) attend_along_head(call, part, s, results);
    else attend_in_lanes(call, part, s, results);
    return true;
}

// Sums again, over the keys that its query sees, each element that is NaN: 0 times an infinite value, in a key that a
// window hides from this row and not from another.
void sum_what_is_seen(const Call& call, const Part& part, const Scratch& s, const Results& results) {
    const Queries& queries = s.queries;
    const bool along = along_head(call, queries);
    for (int i = 0; i < queries.count; i++) {
        if (queries.first[i] == part.from) continue;
        float* o = results.o + queries.slot[i] * PADDED;
        int found = 0;  // by a loop without branches: this is looked up at every call
        for (int d = 0; d < HEAD_DIM; d++) found |= o[d] != o[d];
        if (!found) continue;
        const float* p = s.scores + (along ? i * PART : i / LANES * PART * LANES + i % LANES);
        for (int d = 0; d < HEAD_DIM; d++) {
            if (o[d] == o[d]) continue;
            o[d] = 0;
            for (int j = queries.first[i]; j < queries.last[i]; j++)
                o[d] += p[(j - part.from) * (along ? 1 : LANES)] * widen(part.v[j * part.v_token + d]);
        }
    }
}

void start(const Results& all, int64_t i) {
    std::memset(all.o + i * PADDED, 0, sizeof(float) * PADDED);
    all.r[i] = NONE, all.l[i] = 0;
}

// Joins what query i has seen with what query j of `other` saw of one more part.
void join(const Results& all, int64_t i, const Results& other, int64_t j) {
    if (other.r[j] == NONE && other.l[j] == 0) return;  // l is NaN where all scores are
    const float r = std::max(all.r[i], other.r[j]);
    const float before = std::exp2(all.r[i] - r), now = std::exp2(other.r[j] - r);
    for (int d = 0; d < PADDED; d += LANES) {
        const Floats sum = before * load(all.o + i * PADDED + d);
        store(all.o + i * PADDED + d, sum + now * load(other.o + j * PADDED + d));
    }
    all.l[i] = before * all.l[i] + now * other.l[j];
    all.r[i] = r;
}

void finish(const Call& call, int64_t b, int64_t h, int64_t query, const Results& all, int64_t i) {
    float r = all.r[i], l = all.l[i], scale = 1;
    if (call.sinks && call.sinks[h] != NONE) {
        const float sink = call.sinks[h] * LOG2_E;
        r = std::max(r, sink);
        scale = std::exp2(all.r[i] - r);
        l = scale * l + std::exp2(sink - r);
    }
    scale = l == 0 ? 0 : scale / l;
    Element* out = call.out + b * call.out_batch + h * call.out_head + query * call.out_query;
    for (int d = 0; d < HEAD_DIM; d++) out[d * call.out_dim] = narrow(all.o[i * PADDED + d] * scale);
    if (call.lse) call.lse[(b * call.kv_heads * call.group + h) * call.q_len + query] = LN_2 * (r + std::log2(l));
}

// A part that rows readers[begin..end] meet together.
struct Work {
    int begin, end;
    int64_t part;
};

struct Batch {
    std::vector<Row> rows;
    int64_t parts = 0, products = 0;
    bool shared = false;  // whether two rows have the same prefix
    std::vector<int> readers;
    std::vector<Work> work;
};

// False where a task id or a key bound is out of range.
bool read(const Call& call, Batch& batch) {
    std::vector<bool> has_reader(call.tasks);
    batch.rows.reserve(call.batch);
    for (int64_t b = 0; b < call.batch; b++) {
        Row row = {};
        row.b = b, row.task = call.task_ids[b];
        row.first = call.kv_start ? call.kv_start[b] : 0, row.last = call.kv_len ? call.kv_len[b] : call.capacity;
        if (row.task < -1 || row.task >= call.tasks || (row.task >= 0 && call.lens[row.task] < 0)) return false;
        if (std::min(row.first, row.last) < 0 || std::max(row.first, row.last) > call.capacity) return false;
        const int64_t own = std::max<int64_t>(row.last - row.first, 0);
        row.m = row.task < 0 ? 0 : call.lens[row.task];
        if (row.m > 0) batch.shared = batch.shared || has_reader[row.task], has_reader[row.task] = true;
        row.prefix_parts = (row.m + PART - 1) / PART;
        row.parts = row.prefix_parts + (own + PART - 1) / PART;
        row.base = batch.parts;
        batch.parts += row.parts;
        batch.products += (row.m + own) * call.kv_heads * call.group * call.q_len * HEAD_DIM;
        batch.rows.push_back(row);
    }
    return true;
}

// The work of decode: the prefixes' parts, with the rows of a task side by side, then each row's own.
void share(const Call& call, Batch& batch) {
    std::vector<std::vector<int>> readers_of(call.tasks);
    for (const Row& row : batch.rows)
        if (row.m > 0) readers_of[row.task].push_back(row.b);
    const size_t together = MOST_QUERIES / (call.group * call.q_len);
    for (const std::vector<int>& readers : readers_of)
        for (size_t at = 0; at < readers.size(); at += together) {
            const int begin = batch.readers.size();
            batch.readers.insert(batch.readers.end(), readers.begin() + at,
                                 readers.begin() + std::min(at + together, readers.size()));
            for (int64_t part = 0; part < batch.rows[readers[0]].prefix_parts; part++)
                batch.work.push_back({begin, (int)batch.readers.size(), part});
        }
    for (const Row& row : batch.rows) {
        const int begin = batch.readers.size();
        batch.readers.push_back(row.b);
        for (int64_t part = row.prefix_parts; part < row.parts; part++) batch.work.push_back({begin, begin + 1, part});
    }
}

inline int64_t slot_of(const Call& call, const Row& row, int64_t head, int64_t part) {
    return (row.base * call.kv_heads + head * row.parts + part) * call.group * call.q_len;
}

void decode_part(const Call& call, const Batch& batch, const Work& work, int64_t head, Scratch& s,
                 const Results& results) {
    Part part = part_of(call, batch.rows[batch.readers[work.begin]], work.part, head);
    s.queries.count = 0;
    for (int i = work.begin; i < work.end; i++) {
        const Row& row = batch.rows[batch.readers[i]];
        add(call, row, part, head, 0, call.q_len, slot_of(call, row, head, work.part), s.queries);
    }
    const bool seen = attend(call, part, s, results);
    if (seen && call.window && work.end - work.begin > 1) sum_what_is_seen(call, part, s, results);
}

void merge_parts(const Call& call, const Row& row, int64_t h, const Results& results) {
    alignas(64) float o[PADDED];
    float r, l;
    const Results all = {o, &r, &l};
    const int64_t head = h / call.group, g = h % call.group;
    for (int64_t query = 0; query < call.q_len; query++) {
        start(all, 0);
        for (int64_t part = 0; part < row.parts; part++)
            join(all, 0, results, slot_of(call, row, head, part) + g * call.q_len + query);
        finish(call, row.b, h, query, all, 0);
    }
}

void attend_block(const Call& call, const Row& row, int64_t head, int begin, int end, Scratch& s) {
    const Results all = {s.o, s.r, s.l};
    const Results one = {s.o + MOST_QUERIES * PADDED, s.r + MOST_QUERIES, s.l + MOST_QUERIES};
    const int queries = (end - begin) * call.group;
    for (int i = 0; i < queries; i++) start(all, i);
    for (int64_t n = 0; n < row.parts; n++) {
        Part part = part_of(call, row, n, head);
        s.queries.count = 0;
        add(call, row, part, head, begin, end, 0, s.queries);
        if (!attend(call, part, s, one)) continue;
        for (int i = 0; i < queries; i++) join(all, i, one, i);
    }
    for (int i = 0; i < queries; i++)
        finish(call, row.b, head * call.group + i / (end - begin), begin + i % (end - begin), all, i);
}

enum Status { DONE, OUT_OF_RANGE, NO_MEMORY };

extern "C" int attention(const Call* pointer) try {
    const Call& call = *pointer;
    static thread_local std::vector<float> memory;  // kept: fresh pages would cost more than the products
    static thread_local std::vector<std::unique_ptr<Scratch>> scratch;
    Batch batch;
    if (!read(call, batch)) return OUT_OF_RANGE;
    constexpr int64_t WORTH_A_THREAD = 1 << 14;  // products; a thread takes microseconds to wake
    const int threads = std::max<int64_t>(1, std::min(call.threads, batch.products / WORTH_A_THREAD));
    while ((int)scratch.size() < threads) scratch.push_back(std::make_unique<Scratch>());
    const std::unique_ptr<Scratch>* const scratches = scratch.data();  // of this thread, for all of them

    const bool prefill = call.q_len > 1 && call.group * call.q_len > DECODED_QUERIES;
    if (prefill || (!batch.shared && call.batch * call.kv_heads >= 4 * threads)) {
        const int block = MOST_QUERIES / call.group, blocks = (call.q_len + block - 1) / block;
        const int64_t jobs = call.batch * call.kv_heads * blocks;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
        for (int64_t job = 0; job < jobs; job++) {
            const int begin = (blocks - 1 - job % blocks) * block;  // the last see most keys: they come first
            attend_block(call, batch.rows[job / blocks / call.kv_heads], job / blocks % call.kv_heads, begin,
                          std::min<int64_t>(begin + block, call.q_len), *scratches[omp_get_thread_num()]);
        }
        return DONE;
    }

    share(call, batch);
    const int64_t slots = batch.parts * call.kv_heads * call.group * call.q_len;
    if ((int64_t)memory.size() < slots * (PADDED + 2)) memory.resize(slots * (PADDED + 2));
    const Results results = {memory.data(), memory.data() + slots * PADDED, memory.data() + slots * (PADDED + 1)};
    const int64_t jobs = batch.work.size() * call.kv_heads, heads = call.kv_heads * call.group;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(dynamic)
        for (int64_t job = 0; job < jobs; job++)
            decode_part(call, batch, batch.work[job / call.kv_heads], job % call.kv_heads,
                        *scratches[omp_get_thread_num()], results);
#pragma omp for
        for (int64_t job = 0; job < call.batch * heads; job++)
            merge_parts(call, batch.rows[job / heads], job % heads, results);
    }
    return DONE;
} catch (const std::bad_alloc&) {
    return NO_MEMORY;
}
