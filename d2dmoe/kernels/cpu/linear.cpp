// A linear map with weights in int8. The threads share its outputs in panels of `panel` of them, whose weights lie one
// panel after the other as int8.h has those of an expert; so a result depends on the input alone. It may read some columns of
// its tokens only, and its outputs may lie apart in y, with zeros between them, as those of heads of less width do.
#include <algorithm>
#include <cstring>
#include <new>

#include "library.h"
#include "memory.h"
#include "team.h"

using namespace d2dmoe;

extern "C" {

// Outputs `from` to `from + count` and their place in a row of y; zeros there, if `from` is -1.
struct D2dmoeRun {
    int64_t from, to, count;
};

// Mirrored in linear.py.
struct D2dmoeLinear {
    int32_t bf16, kernels, rounds;   // `rounds`: tokens are rounded as well
    int64_t inputs, outputs, panel;
    int64_t width;                   // of the rows of y
    const uint8_t* weight;           // (panels, ceil(inputs / 4), panel, 4)
    const float* scale;              // (panels, panel)
    const float* bias;               // (outputs,), or null
    const int32_t* gather;           // (inputs,): their columns in x, or null if they are all of them
    const D2dmoeRun* runs;           // those of panel p are from `first_run[p]` to `first_run[p + 1]`; null: y is the outputs
    const int64_t* first_run;        // (panels + 1,)
    const D2dmoeSample* samples;
    int64_t sample_count;
    uint64_t fingerprint;            // of the samples when the map was prepared
};

}

namespace {

constexpr int64_t TILE = 192;  // tokens whose values stay in the cache while panels pass

constexpr int64_t MANY = 48;   // tokens from which weights are widened once for all of them

thread_local Buffer buffer;

struct Call {
    const D2dmoeLinear& l;
    const Kernels& kernels;
    const char* x;
    int64_t ld_x, tokens;  // bytes from token to token
    char* y;               // (tokens, width), contiguous
    int threads;
    float* wide;           // tokens in fp32 and one piece, where they are not
    char* rounded;         // tokens rounded, from the first of them on
    const char** rows;     // one list of TILE tokens for each thread, what the products read
    float* sums;           // TILE rows of a panel for each thread
    float** outs;
    float* widened;        // weights of a panel for each thread
    Meeting meeting;

    bool copies() const { return l.bf16 || l.gather; }
    bool widens() const { return !l.rounds && tokens >= MANY; }
    int64_t panel_values() const { return l.inputs * l.panel; }

    int64_t ld_rounded() const { return RoundedRows(l.inputs, tokens).stride; }
    void take(Pieces& pieces) {
        wide = pieces.take<float>(copies() ? tokens * l.inputs : 0);
        const RoundedRows rows_of(l.inputs, tokens);
        rounded = pieces.take<char>(l.rounds ? (rows_of.rows + 1) * rows_of.stride : 0);
        if (rounded) rounded += rows_of.start;
        int64_t tile = std::min(tokens, TILE);
        rows = pieces.take<const char*>(threads * tile);
        outs = pieces.take<float*>(threads * tile);
        sums = pieces.take<float>(threads * tile * l.panel);
        widened = pieces.take<float>(widens() ? threads * panel_values() : 0);
    }
};

// The tokens as the products read them.
void prepare(const Call& c, int64_t first, int64_t last) {
    const auto& l = c.l;
    for (int64_t t = first; t < last; t++) {
        auto* x = reinterpret_cast<const float*>(c.x + t * c.ld_x);
        float* wide = c.wide + t * l.inputs;
        if (l.bf16) {
            auto* narrow = reinterpret_cast<const bf16*>(c.x + t * c.ld_x);
            if (l.gather)
                for (int64_t i = 0; i < l.inputs; i++) c.kernels.widen(narrow + l.gather[i], 1, wide + i);
            else
                c.kernels.widen(narrow, l.inputs, wide);
        } else if (l.gather) {
            for (int64_t i = 0; i < l.inputs; i++) wide[i] = x[l.gather[i]];
        }
        if (c.copies()) x = wide;
        if (l.rounds) c.kernels.round_token(x, l.inputs, c.rounded + t * c.ld_rounded());
    }
}

// Outputs `from` and on to the place `to` of a row of y.
void store(const Call& c, float* sums, int64_t token, int64_t from, int64_t to, int64_t count) {
    const auto& l = c.l;
    int64_t at = token * l.width + to;
    float* out = l.bf16 ? sums : reinterpret_cast<float*>(c.y) + at;
    c.kernels.scale(sums, l.scale + from, l.bias ? l.bias + from : nullptr, count, out);
    if (l.bf16) c.kernels.narrow(sums, count, reinterpret_cast<bf16*>(c.y) + at);
}

void store_panel(const Call& c, float* sums, int64_t token, int64_t panel) {
    const auto& l = c.l;
    int64_t first = panel * l.panel, element = l.bf16 ? 2 : 4;
    if (!l.runs) return store(c, sums, token, first, first, std::min(l.panel, l.outputs - first));
    for (int64_t i = l.first_run[panel]; i < l.first_run[panel + 1]; i++) {
        auto [from, to, count] = l.runs[i];
        if (from < 0)
            std::memset(c.y + (token * l.width + to) * element, 0, size_t(count * element));
        else
            store(c, sums + (from - first), token, from, to, count);
    }
}

void body(void* context, int id, int team) {
    auto& c = *static_cast<Call*>(context);
    const auto& l = c.l;
    if (c.copies() || l.rounds) {
        Barrier& barrier = id == 0 ? c.meeting.open(team) : c.meeting.join();
        prepare(c, c.tokens * id / team, c.tokens * (id + 1) / team);
        barrier.wait();
    }
    int64_t panels = (l.outputs + l.panel - 1) / l.panel, bytes = round_up(l.inputs, 4) * l.panel;
    int64_t from = panels * id / team, to = panels * (id + 1) / team, tile = std::min(c.tokens, TILE);
    const char** rows = c.rows + id * tile;
    float** outs = c.outs + id * tile;
    float* sums = c.sums + id * tile * l.panel;
    auto product = l.rounds ? panel_rounded(c.kernels, l.inputs) : c.kernels.panel_int8;
    float* widened = c.widens() ? c.widened + id * c.panel_values() : nullptr;
    int64_t ld_rows = c.copies() ? l.inputs : c.ld_x / 4;
    for (int64_t t = 0; t < tile; t++) outs[t] = sums + t * l.panel;
    for (int64_t start = 0; start < c.tokens; start += tile) {
        int64_t count = std::min(tile, c.tokens - start);
        for (int64_t t = 0; t < count; t++) {
            int64_t token = start + t;
            rows[t] = l.rounds ? c.rounded + token * c.ld_rounded()
                      : c.copies() ? reinterpret_cast<const char*>(c.wide + token * l.inputs)
                                   : c.x + token * c.ld_x;
        }
        for (int64_t p = from; p < to; p++) {
            if (widened && count >= MANY) {
                c.kernels.unpack(l.weight + p * bytes, l.inputs, l.panel, widened);
                c.kernels.product_f32(reinterpret_cast<const float*>(rows[0]), ld_rows, count, widened, l.inputs, l.panel, 0,
                                      l.panel, sums, l.panel, DOTS_PLAIN);
            } else {
                product(rows, count, l.weight + p * bytes, l.inputs, l.panel, outs);
            }
            for (int64_t t = 0; t < count; t++) store_panel(c, outs[t], start + t, p);
        }
    }
}

}  // namespace

// y (tokens, width) from x, rows `ld_x` elements apart. Returns 0, 1 if there is no memory, or 2
// if a source has changed and y is worth nothing.
EXPORT int d2dmoe_linear(const D2dmoeLinear* l, const void* x, int64_t ld_x, int64_t tokens, void* y, int threads) {
    if (tokens == 0) return 0;
    fetch_samples(l->samples, l->sample_count);
    threads = std::max(threads, 1);
    Call c{*l, kernels_number(l->kernels), static_cast<const char*>(x), ld_x * (l->bf16 ? 2 : 4), tokens, static_cast<char*>(y),
           threads};
    try {
        Pieces measure(nullptr);
        c.take(measure);
        Pieces pieces(buffer.at_least(size_t(measure.used())));
        c.take(pieces);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    run_team(threads, body, &c);
    return stale(l->samples, l->sample_count, l->fingerprint) ? 2 : 0;
}

EXPORT int d2dmoe_linear_bytes() { return sizeof(D2dmoeLinear); }
