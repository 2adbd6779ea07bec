// A projection around attention on few tokens: two thin factors, the rows of the input channels that run, or both; or
// one thin product between heads of which some columns are left out.
//
// The caller selects the channels. The threads share the rows of the first factor, wait for each other, and share the
// outputs; so a result depends on the input alone, whatever the number of threads.
#include <algorithm>
#include <cstring>
#include <new>

#include "library.h"
#include "memory.h"
#include "team.h"

using namespace d2dmoe;

extern "C" {

// A part of the outputs with factors of its own: their places in the outputs and among all columns of the first factor.
struct D2dmoeSection {
    const void* second;  // (outputs, rank)
    int64_t first_output, outputs, first_rank, rank;
};

// Mirrored in projection.py. Null pointers stand for what a projection does not have.
struct D2dmoeProjection {
    int32_t bf16, kernels;
    int64_t inputs, outputs, rank, section_count;
    float threshold;
    const void* weight;              // (inputs, outputs), for channels
    const float* norms;              // (inputs,)
    const void* first;               // (rank, inputs)
    const D2dmoeSection* sections;   // all outputs, in their order
    const float* base;               // (outputs,)
    const int32_t* gather;           // (rank,): these inputs are what the first factor would give
    const int32_t* spread;           // (outputs,): their places in what the first factor gives, or -1; no second factor
    const D2dmoeSample* samples;
    int64_t sample_count;
    uint64_t fingerprint;            // of the samples when the projection was prepared
};

}

namespace {

thread_local Buffer buffer;

struct Call {
    const D2dmoeProjection& p;
    const Kernels& kernels;
    const char* x;
    int64_t ld_x, tokens;  // bytes from token to token
    char* y;               // (tokens, outputs), contiguous
    const float* input;    // what the factors get, ld_input floats apart
    int64_t ld_input, running;
    float *wide, *values, *rest, *thin, *sums;
    int32_t* list;         // the `running` channels that any token runs; `values` (tokens, running)
    uint8_t *run, *any;
    Meeting meeting;

    int64_t element() const { return p.bf16 ? 2 : 4; }
    void take(Pieces& pieces) {
        int64_t n = tokens * p.inputs, chosen = p.weight ? n : 0;
        wide = pieces.take<float>(p.bf16 ? n : 0);
        values = pieces.take<float>(chosen);
        rest = pieces.take<float>(p.rank ? chosen : 0);
        run = pieces.take<uint8_t>(chosen);
        any = pieces.take<uint8_t>(p.weight ? p.inputs : 0);
        list = pieces.take<int32_t>(p.weight ? p.inputs : 0);
        thin = pieces.take<float>(tokens * p.rank);
        sums = pieces.take<float>(p.bf16 ? tokens * p.outputs : 0);
    }
};

// Which channels run. A value that is not a number, or infinite times 0, runs: it has to be seen in the output.
void select(Call& c) {
    const auto& p = c.p;
    int64_t n = p.inputs;
    std::memset(c.any, 0, size_t(n));
    for (int64_t t = 0; t < c.tokens; t++) {
        const float* x = c.input + t * c.ld_input;
        uint8_t* run = c.run + t * n;
        c.kernels.keep(x, p.norms, p.threshold, n, p.bf16, run);
        for (int64_t j = 0; j < n; j++) c.any[j] |= run[j] | !(x[j] * 0.0f == 0.0f);
    }
    c.running = 0;
    for (int64_t j = 0; j < n; j++) {
        c.list[c.running] = int32_t(j);
        c.running += c.any[j];
    }
    for (int64_t t = 0; t < c.tokens; t++) {
        const float* x = c.input + t * c.ld_input;
        const uint8_t* run = c.run + t * n;
        float *values = c.values + t * c.running, *rest = c.rest + t * n;
        for (int64_t i = 0; i < c.running; i++) values[i] = x[c.list[i]] * float(run[c.list[i]]);
        for (int64_t j = 0; p.rank && j < n; j++) rest[j] = x[j] - x[j] * float(run[j]);
    }
    if (p.rank) c.input = c.rest, c.ld_input = n;
}

void dots(const Call& c, const float* x, int64_t ld_x, const void* w, int64_t first, int64_t rows, int64_t depth, float* out,
          int64_t ld_out) {
    if (c.p.bf16)
        c.kernels.dots_mixed(x, ld_x, c.tokens, static_cast<const bf16*>(w) + first * depth, rows, depth, out, ld_out,
                             DOTS_PLAIN);
    else
        c.kernels.dots_f32(x, ld_x, c.tokens, static_cast<const float*>(w) + first * depth, rows, depth, out, ld_out,
                           DOTS_PLAIN);
}

// Parts of whole cache lines, but the last.
int64_t part(int64_t n, int id, int team) { return std::min(n, round_up(n * id / team, 16)); }

void outputs(const Call& c, int64_t first, int64_t last) {
    const auto& p = c.p;
    float* sums = p.bf16 ? c.sums : reinterpret_cast<float*>(c.y);
    for (int64_t t = 0; p.spread && t < c.tokens; t++) {
        const float* thin = c.thin + t * p.rank;
        float* y = sums + t * p.outputs;
        for (int64_t i = first; i < last; i++) y[i] = (p.spread[i] < 0 ? 0.0f : thin[p.spread[i]]) + (p.base ? p.base[i] : 0.0f);
    }
    for (int64_t s = 0; !p.spread && s < p.section_count; s++) {
        const auto& section = p.sections[s];
        int64_t from = std::max(first, section.first_output), to = std::min(last, section.first_output + section.outputs);
        if (from >= to) continue;
        if (section.rank)
            dots(c, c.thin + section.first_rank, p.rank, section.second, from - section.first_output, to - from, section.rank,
                 sums + from, p.outputs);
        for (int64_t t = 0; t < c.tokens; t++) {
            float* y = sums + t * p.outputs;
            for (int64_t i = from; i < to; i++) y[i] = (section.rank ? y[i] : 0.0f) + (p.base ? p.base[i] : 0.0f);
        }
    }
    int64_t width = last - first;
    if (c.running && p.bf16)
        c.kernels.add_rows_mixed(c.values, c.running, c.tokens, static_cast<const bf16*>(p.weight) + first, p.outputs, c.list,
                                 c.running, width, sums + first, p.outputs);
    else if (c.running)
        c.kernels.add_rows_f32(c.values, c.running, c.tokens, static_cast<const float*>(p.weight) + first, p.outputs, c.list,
                               c.running, width, sums + first, p.outputs);
    for (int64_t t = 0; p.bf16 && t < c.tokens; t++)
        c.kernels.narrow(sums + t * p.outputs + first, width, reinterpret_cast<bf16*>(c.y) + t * p.outputs + first);
}

void body(void* context, int id, int team) {
    auto& c = *static_cast<Call*>(context);
    if (c.p.rank && !c.p.gather) {
        Barrier& barrier = id == 0 ? c.meeting.open(team) : c.meeting.join();
        int64_t first = part(c.p.rank, id, team), last = part(c.p.rank, id + 1, team);
        if (last > first) dots(c, c.input, c.ld_input, c.p.first, first, last - first, c.p.inputs, c.thin + first, c.p.rank);
        barrier.wait();
    }
    int64_t first = part(c.p.outputs, id, team), last = part(c.p.outputs, id + 1, team);
    if (last > first) outputs(c, first, last);
}

}  // namespace

// y (tokens, outputs) from x (tokens, inputs), rows `ld_x` elements apart. Returns 0, 1 if there is no memory, or 2
// if a source has changed and y is worth nothing.
EXPORT int d2dmoe_project(const D2dmoeProjection* p, const void* x, int64_t ld_x, int64_t tokens, void* y, int threads) {
    if (tokens == 0) return 0;
    fetch_samples(p->samples, p->sample_count);
    Call c{*p, kernels_number(p->kernels), static_cast<const char*>(x), ld_x * (p->bf16 ? 2 : 4), tokens, static_cast<char*>(y)};
    try {
        Pieces measure(nullptr);
        c.take(measure);
        Pieces pieces(buffer.at_least(size_t(measure.used())));
        c.take(pieces);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    c.input = static_cast<const float*>(x), c.ld_input = ld_x;
    if (p->bf16) {
        for (int64_t t = 0; t < tokens; t++)
            c.kernels.widen(reinterpret_cast<const bf16*>(c.x + t * c.ld_x), p->inputs, c.wide + t * p->inputs);
        c.input = c.wide, c.ld_input = p->inputs;
    }
    if (p->weight) select(c);
    for (int64_t t = 0; p->gather && t < tokens; t++)
        for (int64_t i = 0; i < p->rank; i++) c.thin[t * p->rank + i] = c.input[t * c.ld_input + p->gather[i]];
    run_team(std::max(threads, 1), body, &c);
    return stale(p->samples, p->sample_count, p->fingerprint) ? 2 : 0;
}

EXPORT int d2dmoe_projection_bytes() { return sizeof(D2dmoeProjection); }
