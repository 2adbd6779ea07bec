// The schedule of one layer call, and the C ABI.
//
// Tokens come in tiles and experts in groups. Few tokens are one tile, and every thread takes a group of experts; many are a
// tile or more for every thread, which walks through all experts; in between a thread takes one group on one tile. Groups add
// into outputs of their own, which are then summed. Work is divided for the number of threads asked for, however many there
// are: a result depends on the input and that number alone, never on timing or other calls.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

#include "kernels.h"
#include "library.h"
#include "memory.h"
#include "team.h"

#if defined(__x86_64__) && !defined(D2DMOE_NO_VNNI) && !defined(D2DMOE_NO_AMX) && !defined(D2DMOE_NO_AMXINT8)
#define D2DMOE_INT8_TILES
#endif

using namespace d2dmoe;

EXPORT int d2dmoe_abi() { return 13; }

namespace {

const Kernels* const all_kernels[] = {
    &kernels_portable,
#if defined(__x86_64__)
    &kernels_avx2,
    &kernels_avx512,
#if !defined(D2DMOE_NO_AVX512BF16)
    &kernels_avx512bf16,
#if !defined(D2DMOE_NO_AMX)
    &kernels_amx,
#endif
#endif
#endif
};
constexpr int KERNELS = sizeof(all_kernels) / sizeof(*all_kernels);

bool supported(int number) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (number == 1) return avx2;
    if (number == 2) return avx512;
    bool avx512bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    if (number == 3) return avx512bf16;
#if !defined(D2DMOE_NO_AMX)
    if (number == 4) return avx512bf16 && amx_usable();
#endif
#endif
    return number == 0;
}

// The best function for rounded tokens. 32 bits hold the sums of so many products of bytes.
constexpr int64_t DEEPEST = 65536;

bool by_vnni(const Kernels& kernels, int64_t depth) {
#if defined(__x86_64__) && !defined(D2DMOE_NO_VNNI)
    static const bool vnni = __builtin_cpu_supports("avx512vnni");
    return vnni && &kernels == &kernels_avx512 && depth <= DEEPEST;
#else
    return false;
#endif
}

auto expert_rounded(const D2dmoeLayer& l, const Kernels& kernels) {
#if defined(__x86_64__) && !defined(D2DMOE_NO_VNNI)
    if (by_vnni(kernels, std::max(l.d, l.size))) return expert_rounded_vnni;
#endif
    return kernels.expert_rounded;
}

auto columns_rounded(const D2dmoeLayer& l, const Kernels& kernels) {
#if defined(__x86_64__) && !defined(D2DMOE_NO_VNNI)
    if (by_vnni(kernels, l.d)) return columns_rounded_vnni;
#endif
    return kernels.columns_rounded;
}

// Whether rounded tokens go through tiles, several experts at a time.
bool by_tiles(const D2dmoeLayer& l, const Kernels& kernels) {
#if defined(D2DMOE_INT8_TILES)
    return l.rounds && expert_rounded(l, kernels) == expert_rounded_vnni && amx_int8_usable(l.d, l.size);
#else
    return false;
#endif
}

thread_local Buffer shared_buffer, own_buffer;

struct Call {
    const D2dmoeLayer& layer;
    const Kernels& kernels;
    const char* x;     // (tokens, d) of `width` bytes each
    int64_t ld_x;      // bytes from token to token
    const uint8_t* run;  // (tokens, experts) or null
    int64_t tokens;
    char* y;           // (tokens, d_out), contiguous
    int team;          // threads asked for

    bool routed() const { return !run && layer.tau > 0; }
    bool everything() const { return !run && layer.tau <= 0; }
    bool widened() const { return layer.bf16 && !kernels.bf16_inputs; }
    int64_t element() const { return layer.bf16 ? 2 : 4; }
    bool int8() const { return layer.up_scale; }
    bool rounds() const { return layer.rounds; }
    int64_t rounded_row() const { return rounds() ? rounded_bytes(layer.d) : 0; }
    // Bytes of an expert's matrix, and of an element of its biases and constants.
    int64_t matrix(int64_t depth, int64_t width) const {
        return int8() ? round_up(depth, 4) * width : depth * width * element();
    }
    int64_t vector_element() const { return int8() ? 4 : element(); }
    // All experts of a tile of tokens in one go; that keeps its own order of things in the caches.
    bool by_experts() const { return layer.bf16 && !int8() && kernels.experts_bf16; }
    const bool tiled = by_tiles(layer, kernels);
    int64_t padded_out() const { return round_up(layer.d_out, kernels.lanes); }
    // Rows of the router's hidden values and scores.
    int64_t hidden_row() const { return round_up(layer.router_width, MAX_LANES); }
    int64_t score_row() const { return round_up(layer.experts, MAX_LANES); }
    // From so many tokens on the router's weights lie better by input than by output.
    static constexpr int64_t MANY = 8;
    bool packed_router(int64_t tokens) const { return layer.router_down && tokens >= MANY; }
    // Tokens can be added up where they belong if they are fp32 and whole vectors.
    bool in_place() const { return !layer.bf16 && layer.d_out % kernels.lanes == 0; }
};

const char* offset(const void* base, int64_t elements, int64_t element) {
    return base ? static_cast<const char*>(base) + elements * element : nullptr;
}

// Where the kernels read token `t`: as it came, or widened to fp32; and once more, rounded, if the layer rounds.
struct Inputs {
    const char* start;
    int64_t stride;
    const char* rounded;
    const void* row(int64_t t) const { return start + t * stride; }
};

// Room for tokens in the forms that they do not come in.
struct Forms {
    float* wide;
    char* rounded;
    void take(const Call& c, Pieces& p, int64_t tokens) {
        wide = p.take<float>(c.widened() ? tokens * c.layer.d : 0);
        rounded = p.take<char>(tokens * c.rounded_row());
    }
    Forms from(const Call& c, int64_t token) const {
        return {wide + token * c.layer.d, rounded + token * c.rounded_row()};
    }
};

// The tokens from `first` on, whose forms begin at `f`.
Inputs inputs_in(const Call& c, int64_t first, const Forms& f) {
    const char* own = c.x + first * c.ld_x;
    Inputs x{own, c.ld_x, f.rounded};
    if (c.widened()) x.start = reinterpret_cast<const char*>(f.wide), x.stride = c.layer.d * 4;
    return x;
}

Inputs inputs_of(const Call& c, int64_t first, int64_t count, const Forms& f) {
    int64_t d = c.layer.d;
    if (c.widened())
        for (int64_t t = 0; t < count; t++)
            c.kernels.widen(reinterpret_cast<const bf16*>(c.x + (first + t) * c.ld_x), d, f.wide + t * d);
    Inputs x = inputs_in(c, first, f);
    for (int64_t t = 0; c.rounds() && t < count; t++)
        c.kernels.round_token(static_cast<const float*>(x.row(t)), d, f.rounded + t * c.rounded_row());
    return x;
}

void router_rows(const Call& c, const Inputs& x, int64_t tokens, int64_t first, int64_t last, float* hidden) {
    const auto& l = c.layer;
    const char* weights = offset(l.router_hidden, first * l.d, c.element());
    const auto* wide = reinterpret_cast<const float*>(x.start);
    float* out = hidden + first;
    if (c.rounds())
        columns_rounded(l, c.kernels)(x.rounded, c.rounded_row(), tokens, static_cast<const uint8_t*>(l.router_hidden),
                                      l.router_scale, l.d, l.router_width, first, last, hidden, c.hidden_row());
    else if (c.packed_router(tokens))
        c.kernels.product_f32(wide, x.stride / 4, tokens, static_cast<const float*>(l.router_up), l.d, l.router_width, first,
                              last, hidden, c.hidden_row(), DOTS_RELU);
    else if (!l.bf16)
        c.kernels.dots_f32(wide, x.stride / 4, tokens, reinterpret_cast<const float*>(weights), last - first, l.d, out,
                           c.hidden_row(), DOTS_RELU);
    else if (c.widened())
        c.kernels.dots_mixed(wide, x.stride / 4, tokens, reinterpret_cast<const bf16*>(weights), last - first, l.d, out,
                             c.hidden_row(), DOTS_RELU);
    else
        c.kernels.dots_bf16(x.start, x.stride / 2, tokens, reinterpret_cast<const bf16*>(weights), last - first, l.d, out,
                            c.hidden_row(), DOTS_RELU);
}

// Scores from the router's hidden layer, and the experts that the gate runs for each token. `packed` as the hidden values
// were made, which may have been for more tokens than these.
void score_and_choose(const Call& c, bool packed, const float* hidden, int64_t tokens, float* scores, uint8_t* run,
                      char* scratch) {
    const auto& l = c.layer;
    int64_t from = c.hidden_row(), to = c.score_row();
    if (packed)
        c.kernels.product_f32(hidden, from, tokens, static_cast<const float*>(l.router_down), l.router_width, l.experts, 0,
                              l.experts, scores, to, DOTS_ABS);
    else if (l.bf16)
        c.kernels.dots_mixed(hidden, from, tokens, static_cast<const bf16*>(l.router_score), l.experts, l.router_width, scores,
                             to, DOTS_ABS);
    else
        c.kernels.dots_f32(hidden, from, tokens, static_cast<const float*>(l.router_score), l.experts, l.router_width, scores,
                           to, DOTS_ABS);
    GateCall gate{l.gate, l.tau, l.top, l.min_experts, l.max_experts, l.shared};
    for (int64_t t = 0; t < tokens; t++)
        c.kernels.choose(gate, scores + t * to, l.experts, run + t * l.experts, scratch);
}

// The tokens of every expert: expert e has lists[e * stride] up to lists[e * stride + counts[e]].
void make_lists(const Call& c, const uint8_t* run, int64_t tokens, int32_t* lists, int64_t stride, int32_t* counts) {
    int64_t experts = c.layer.experts;
    std::memset(counts, 0, size_t(experts) * 4);
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t e = 0; e < experts; e++) {
            lists[e * stride + counts[e]] = int32_t(t);
            counts[e] += run[t * experts + e] != 0;
        }
}

// The rows of one tile of tokens, in and out.
struct Rows {
    Inputs x;
    float* y;
    int64_t ld_y;
};

int64_t widest(const D2dmoeLayer& l) { return std::max(l.size, l.linear_rank); }

ExpertCall expert_call(const Call& c, int64_t e, const Rows& rows, const int32_t* list, int64_t count, char* scratch) {
    const auto& l = c.layer;
    int64_t vectors = c.vector_element(), up = c.matrix(l.d, l.size), down = c.matrix(l.size, l.d_out);
    ExpertCall call{};
    call.d = l.d, call.d_out = l.d_out, call.list = list, call.count = count, call.scratch = scratch;
    call.widest = widest(l);
    call.rounded = rows.x.rounded, call.ld_rounded = c.rounded_row();
    call.x = rows.x.start, call.ld_x = rows.x.stride, call.y = rows.y, call.ld_y = rows.ld_y;
    if (e == l.experts) {  // the linear term is one more expert that every token runs
        call.up = l.linear_in, call.down = l.linear_out, call.size = l.linear_rank, call.activation = IDENTITY;
        call.up_scale = l.linear_in_scale, call.down_scale = l.linear_out_scale;
    } else {
        call.up = offset(l.up, e * up, 1), call.up_bias = offset(l.up_bias, e * l.size, vectors);
        call.gate = offset(l.gate_weight, e * up, 1), call.gate_bias = offset(l.gate_bias, e * l.size, vectors);
        call.down = offset(l.down, e * down, 1);
        if (c.int8()) {
            call.up_scale = l.up_scale + e * l.size, call.down_scale = l.down_scale + e * l.size;
            call.gate_scale = l.gate_scale ? l.gate_scale + e * l.size : nullptr;
        }
        int64_t tiles = round_up(l.size, 32);
        call.up_tiles = offset(l.up_tiles, e * tiles * round_up(l.d, 32), 2);
        call.gate_tiles = offset(l.gate_tiles, e * tiles * round_up(l.d, 32), 2);
        call.down_tiles = offset(l.down_tiles, e * tiles * round_up(l.d_out, 32), 2);
        call.constant = offset(l.constants, e * l.d_out, vectors);
        call.size = l.size, call.activation = l.activation;
    }
    return call;
}

// Experts `first` to `last` on `tokens`. Those of the router run for their lists (as of make_lists), where there are any.
void run_experts(const Call& c, int64_t first, int64_t last, const Rows& rows, int64_t tokens, const int32_t* lists,
                 int64_t stride, const int32_t* counts, ExpertCall* calls, char* scratch) {
    int64_t n = 0;
    for (int64_t e = first; e < last; e++) {
        bool listed = lists && e < c.layer.experts;
        int64_t count = listed ? counts[e] : tokens;
        if (count) calls[n++] = expert_call(c, e, rows, listed ? lists + e * stride : nullptr, count, scratch);
    }
    for (int64_t i = 0; i + 1 < n; i++) calls[i].next = calls[i + 1].up;
    if (c.by_experts()) return c.kernels.experts_bf16(calls, n, tokens);
    const ExpertCall* rest = calls;
#if defined(D2DMOE_INT8_TILES)
    if (c.tiled) {
        rest = calls + n - (last > c.layer.experts);  // all but the linear term, which is of another size
        experts_rounded_amx(calls, rest - calls, tokens);
    }
#endif
    const auto plain = c.layer.bf16 ? c.kernels.expert_bf16 : c.kernels.expert_f32;
    const auto int8 = c.rounds() ? expert_rounded(c.layer, c.kernels) : c.kernels.expert_int8;
    for (; rest < calls + n; rest++) (rest->up_scale ? int8 : plain)(*rest);
}

void start_row(const Call& c, float* y) {
    if (c.layer.base)
        std::memcpy(y, c.layer.base, size_t(c.layer.d_out) * 4);
    else
        std::memset(y, 0, size_t(c.layer.d_out) * 4);
    for (int64_t i = c.layer.d_out; i < c.padded_out(); i++) y[i] = 0;
}

void write_row(const Call& c, const float* from, int64_t t) {
    char* to = c.y + t * c.layer.d_out * c.element();
    if (c.layer.bf16)
        c.kernels.narrow(from, c.layer.d_out, reinterpret_cast<bf16*>(to));
    else if (reinterpret_cast<const char*>(from) != to)
        std::memcpy(to, from, size_t(c.layer.d_out) * 4);
}

int64_t experts_in_all(const D2dmoeLayer& l) { return l.experts + (l.linear_in && l.tau > 0); }

int64_t scratch_for(const Call& c, int64_t tokens) {
    int64_t one = expert_scratch(tokens, widest(c.layer));
#if defined(D2DMOE_INT8_TILES)
    if (c.tiled) one = std::max(one, experts_rounded_scratch(tokens, c.layer.d, c.layer.size));
#endif
    if (c.by_experts())
        one = std::max(one, c.kernels.experts_scratch(tokens, c.layer.d, widest(c.layer), c.layer.d_out));
    return one;
}

// ---- groups of experts

// Tiles of tokens, and groups of experts on each of them.
struct Grid {
    int64_t tiles, groups;
};

// What sharing costs, in parts of the work. A tile of so many tokens takes twice as long for each of them as a large one: all
// weights are read for it, and experts have few tokens of it. Groups need barriers, equal parts, and sums of their outputs.
// Measured with a quarter of 96 experts of 32 neurons at width 768, recipes/bench_threads.py.
struct Costs {
    double tile, groups, group;
};

Costs costs_of(const Call& c) {
    if (c.by_experts()) return {45, 0.1, 0.07};
    return c.tiled ? Costs{18, 0.1, 0.05} : Costs{22, 0.1, 0.05};
}

int64_t weight_bytes(const Call& c) {
    const auto& l = c.layer;
    return l.experts * (c.matrix(l.d, l.size) * (l.gate_weight ? 2 : 1) + c.matrix(l.size, l.d_out));
}

// The cheapest division for a team. The outputs of all groups are no more bytes than the weights.
Grid grid_of(const Call& c) {
    const int64_t team = c.team;
    if (c.tokens <= c.layer.few) return {1, team};
    if (std::getenv("D2DMOE_TILE")) return {team, 1};
    if (const char* forced = std::getenv("D2DMOE_GROUPS")) {
        int64_t groups = std::clamp<int64_t>(std::atoll(forced), 1, team);
        return {team / groups, groups};
    }
    constexpr int64_t ALWAYS = int64_t(8) << 20;
    int64_t most = std::min(team, std::max(ALWAYS, weight_bytes(c)) / (c.tokens * c.padded_out() * 4));
    const Costs costs = costs_of(c);
    Grid best{team, 1};
    double least = 1 + costs.tile * double(team) / double(c.tokens);
    for (int64_t groups = 2; groups <= most; groups++) {
        int64_t tiles = team / groups;
        double cost = 1 + costs.tile * double(tiles) / double(c.tokens) + costs.groups + costs.group * double(groups - 1);
        cost *= double(team) / double(tiles * groups);  // threads that have nothing to do
        if (cost < least) least = cost, best = {tiles, groups};
    }
    return best;
}

struct GridShared {
    const Call* call;
    Grid grid;
    float *hidden, *scores, *partial;
    Forms forms;
    uint8_t* run;
    Barrier* barrier;
    std::atomic<bool>* failed;
    // Everything in a phase is there before the next one begins.
    enum Phase { INPUTS, ROUTER, CHOICE, EXPERTS, SUM, PHASES };
    // With so many tokens for every thread, it does all of them as far as the choice; with fewer, threads share the router.
    static constexpr int64_t OWN = 16;
    bool by_tokens() const { return call->routed() && call->tokens >= OWN * call->team; }
    bool has(int phase) const {
        if (phase == INPUTS) return !by_tokens() && (call->widened() || call->rounds());
        if (phase == ROUTER) return call->routed() && !by_tokens();
        return phase == CHOICE ? call->routed() : true;
    }
    int waits() const {
        int count = -1;
        for (int phase = 0; phase < PHASES; phase++) count += has(phase);
        return count;
    }
    void take(Pieces& p) {
        const auto& l = call->layer;
        int64_t n = call->tokens;
        hidden = p.take<float>(call->routed() ? n * call->hidden_row() : 0);
        scores = p.take<float>(call->routed() ? n * call->score_row() : 0);
        run = p.take<uint8_t>(call->routed() ? n * l.experts : 0);
        forms.take(*call, p, n);
        partial = p.take<float>(n * call->padded_out() * grid.groups);
    }
};

// From list to list: an odd number of cache lines, so that the ends of all lists find room in the first cache.
int64_t list_stride(int64_t tokens) { return (round_up(tokens, 16) / 16 | 1) * 16; }

struct GridOwn {
    const Call* call;
    int64_t tile;  // tokens, at most
    int32_t *lists, *counts;
    ExpertCall* calls;
    char *room, *scratch;
    void take(Pieces& p) {
        const auto& l = call->layer;
        lists = p.take<int32_t>(l.experts * list_stride(tile));
        counts = p.take<int32_t>(l.experts + 1);
        calls = p.take<ExpertCall>(l.experts + 1);
        room = p.take<char>(scratch_for(*call, tile));
        scratch = p.take<char>(l.experts * 8);
    }
};

std::pair<int64_t, int64_t> share(int64_t n, int64_t id, int64_t team) { return {n * id / team, n * (id + 1) / team}; }

// The same in whole units, but the last.
std::pair<int64_t, int64_t> share(int64_t n, int64_t id, int64_t team, int64_t unit) {
    auto [first, last] = share((n + unit - 1) / unit, id, team);
    return {std::min(n, first * unit), std::min(n, last * unit)};
}

// A contiguous range of experts with about the same cost for each group: reading an expert's weights costs as much as
// `READING` tokens. The last one is the linear term, if there is one.
constexpr int64_t READING = 3;

std::pair<int64_t, int64_t> share_experts(const D2dmoeLayer& l, const int32_t* counts, int64_t id, int64_t groups) {
    int64_t whole = 0, before = 0, experts = experts_in_all(l), first = experts, last = 0;
    auto cost = [&](int64_t e) { return counts[e] ? (counts[e] + READING) * (e < l.experts ? l.size : l.linear_rank) : 0; };
    for (int64_t e = 0; e < experts; e++) whole += cost(e);
    for (int64_t e = 0; e < experts; e++) {
        int64_t middle = 2 * before + cost(e);  // an expert belongs to the group in whose part its middle lies
        before += cost(e);
        if (whole && std::min<int64_t>(middle * groups / (2 * whole), groups - 1) == id) {
            first = std::min(first, e);
            last = e + 1;
        }
    }
    return {first, std::max(first, last)};
}

// The experts of one group on the tokens of one tile.
void group_on_tile(GridShared& s, GridOwn& own, int64_t group, int64_t tile) {
    const Call& c = *s.call;
    const auto& l = c.layer;
    auto [first, last] = share(c.tokens, tile, s.grid.tiles);
    int64_t n = last - first, ld_y = c.padded_out(), stride = list_stride(own.tile);
    const uint8_t* run = c.routed() ? s.run : c.run;
    if (run)
        make_lists(c, run + first * l.experts, n, own.lists, stride, own.counts);
    else
        std::fill(own.counts, own.counts + l.experts, int32_t(n));
    own.counts[l.experts] = int32_t(n);
    float* y = s.partial + (group * c.tokens + first) * ld_y;
    for (int64_t t = 0; t < n; t++)
        group == 0 ? start_row(c, y + t * ld_y) : (void)std::memset(y + t * ld_y, 0, size_t(ld_y) * 4);
    Inputs x = inputs_in(c, first, s.forms.from(c, first));
    auto [begin, end] = share_experts(l, own.counts, group, s.grid.groups);
    run_experts(c, begin, end, {x, y, ld_y}, n, run ? own.lists : nullptr, stride, own.counts, own.calls, own.room);
}

void sum_groups(const GridShared& s, int id, int team) {
    const Call& c = *s.call;
    int64_t n = c.tokens, ld_y = c.padded_out();
    auto [first, last] = share(n, id, team);
    if (n == 1) {
        if (id) return;
        first = 0, last = 1;
    }
    for (int64_t t = first; t < last; t++) {
        float* sum = s.partial + t * ld_y;
        for (int64_t other = 1; other < s.grid.groups; other++) {
            const float* part = s.partial + (other * n + t) * ld_y;
            for (int64_t i = 0; i < ld_y; i++) sum[i] += part[i];
        }
        write_row(c, sum, t);
    }
}

// The tokens `first` to `last` as far as the choice of their experts.
void choose_of(GridShared& s, GridOwn& own, int64_t first, int64_t last) {
    const Call& c = *s.call;
    float* hidden = s.hidden + first * c.hidden_row();
    bool packed = c.packed_router(c.tokens);
    if (s.by_tokens()) {
        Inputs x = inputs_of(c, first, last - first, s.forms.from(c, first));
        router_rows(c, x, last - first, 0, c.layer.router_width, hidden);
        packed = c.packed_router(last - first);
    }
    score_and_choose(c, packed, hidden, last - first, s.scores + first * c.score_row(), s.run + first * c.layer.experts,
                     own.scratch);
}

// Part `id` of a phase.
void grid_part(GridShared& s, GridOwn& own, int phase, int id, int team) {
    const Call& c = *s.call;
    if (phase == GridShared::INPUTS) {
        auto [first, last] = share(c.tokens, id, team);
        inputs_of(c, first, last - first, s.forms.from(c, first));
    } else if (phase == GridShared::ROUTER) {
        auto [first, last] = share(c.layer.router_width, id, team);  // whole vectors, but the last
        int64_t width = c.layer.router_width;
        first = std::min(width, round_up(first, MAX_LANES)), last = std::min(width, round_up(last, MAX_LANES));
        router_rows(c, inputs_in(c, 0, s.forms), c.tokens, first, last, s.hidden);
    } else if (phase == GridShared::CHOICE) {
        auto [first, last] = share(c.tokens, id, team, s.by_tokens() ? GridShared::OWN : 1);
        if (first < last) choose_of(s, own, first, last);
    } else if (phase == GridShared::EXPERTS) {
        auto [tiles, groups] = s.grid;
        if (id < tiles * groups) group_on_tile(s, own, id % groups, id / groups);
    } else {
        sum_groups(s, id, team);
    }
}

struct GridStart {
    GridShared* shared;
    Meeting meeting;
    std::atomic<bool> failed;
};

GridOwn grid_own(const GridShared& s) {
    int64_t tile = (s.call->tokens + s.grid.tiles - 1) / s.grid.tiles;
    return lay_out(own_buffer, GridOwn{s.call, tile, {}, {}, {}, {}, {}});
}

void grid_enter(void* context, int id, int team) {
    auto& start = *static_cast<GridStart*>(context);
    if (id == 0) {
        start.shared->failed = &start.failed;
        start.shared->barrier = &start.meeting.open(team);
    } else {
        start.meeting.join();
    }
    GridOwn own;
    try {
        own = grid_own(*start.shared);
    } catch (const std::bad_alloc&) {  // must not leave a thread of the team; the others do not wait in vain
        start.failed.store(true);
        for (int i = 0; i < start.shared->waits(); i++) start.shared->barrier->wait();
        return;
    }
    int left = start.shared->waits();
    for (int phase = 0; phase < GridShared::PHASES; phase++) {
        if (!start.shared->has(phase)) continue;
        for (int part = id; part < start.shared->call->team; part += team)
            grid_part(*start.shared, own, phase, part, start.shared->call->team);
        if (left-- > 0) start.shared->barrier->wait();
    }
}

// One phase, by threads that may take their parts one after the other.
struct GridPhase {
    GridShared* shared;
    std::atomic<bool>* failed;
    int phase;
};

void grid_phase(void* context, int id, int team) {
    auto& step = *static_cast<GridPhase*>(context);
    try {
        GridOwn own = grid_own(*step.shared);
        grid_part(*step.shared, own, step.phase, id, team);
    } catch (const std::bad_alloc&) {
        step.failed->store(true);
    }
}

// ---- all experts for each tile

struct ManyOwn {
    const Call* call;
    int64_t tile;
    float *hidden, *scores, *sums;
    Forms forms;
    uint8_t* run;
    int32_t *lists, *counts;
    ExpertCall* calls;
    char *room, *scratch;
    void take(Pieces& p) {
        const auto& l = call->layer;
        hidden = p.take<float>(call->routed() ? tile * call->hidden_row() : 0);
        scores = p.take<float>(call->routed() ? tile * call->score_row() : 0);
        run = p.take<uint8_t>(call->routed() ? tile * l.experts : 0);
        forms.take(*call, p, tile);
        sums = p.take<float>(call->in_place() ? 0 : tile * call->padded_out());
        lists = p.take<int32_t>(l.experts * list_stride(tile));
        counts = p.take<int32_t>(l.experts);
        calls = p.take<ExpertCall>(l.experts + 1);
        room = p.take<char>(scratch_for(*call, tile));
        scratch = p.take<char>(l.experts * 8);
    }
};

struct ManyShared {
    const Call* call;
    int64_t tile;
    std::atomic<int64_t> next;
    std::atomic<bool> failed;
};

void run_tile(const Call& c, int64_t first, int64_t n, ManyOwn& own) {
    const auto& l = c.layer;
    Inputs x = inputs_of(c, first, n, own.forms);
    const uint8_t* run = c.run ? c.run + first * l.experts : nullptr;
    if (c.routed()) {
        router_rows(c, x, n, 0, l.router_width, own.hidden);
        score_and_choose(c, c.packed_router(n), own.hidden, n, own.scores, own.run, own.scratch);
        run = own.run;
    }
    if (run) make_lists(c, run, n, own.lists, list_stride(own.tile), own.counts);
    int64_t ld_y = c.padded_out();
    float* y = c.in_place() ? reinterpret_cast<float*>(c.y) + first * l.d_out : own.sums;
    for (int64_t t = 0; t < n; t++) start_row(c, y + t * ld_y);
    run_experts(c, 0, experts_in_all(l), {x, y, ld_y}, n, run ? own.lists : nullptr, list_stride(own.tile), own.counts, own.calls,
                own.room);
    for (int64_t t = 0; t < n; t++) write_row(c, y + t * ld_y, first + t);
}

void many_body(void* context, int, int) {
    auto& s = *static_cast<ManyShared*>(context);
    ManyOwn own{s.call, s.tile, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
    try {
        own = lay_out(own_buffer, own);
    } catch (const std::bad_alloc&) {
        s.failed.store(true);
        return;
    }
    int64_t tiles = (s.call->tokens + s.tile - 1) / s.tile;
    for (int64_t i; (i = s.next.fetch_add(1)) < tiles;) {
        int64_t first = s.call->tokens * i / tiles, last = s.call->tokens * (i + 1) / tiles;
        run_tile(*s.call, first, last - first, own);
    }
}

// Tiles of equal size, a whole number of rounds for the team. Every tile reads all weights once: where these fit into the
// last cache, tokens and outputs of a tile should fit into the second one; where they do not, reading them less often
// is worth more.
constexpr int64_t LAST_CACHE = int64_t(32) << 20, SECOND_CACHE = 800 * 1024;

int64_t tile_size(const Call& c) {
    const char* forced = std::getenv("D2DMOE_TILE");
    int64_t bytes = c.layer.d * (c.widened() ? 4 : c.element()) + c.layer.d_out * 4;
    bool fit = weight_bytes(c) <= LAST_CACHE && !c.by_experts() && !c.tiled;
    int64_t most = forced ? std::atoll(forced) : fit ? std::clamp<int64_t>(SECOND_CACHE / bytes, 128, 256) : 512;
    int64_t rounds = (c.tokens + most * c.team - 1) / (most * c.team);
    return (c.tokens + rounds * c.team - 1) / (rounds * c.team);
}

}  // namespace

namespace d2dmoe {
std::atomic<int> allocations_left{-1};
const Kernels& kernels_number(int number) { return *all_kernels[number]; }

Panel panel_rounded(const Kernels& kernels, int64_t depth) {
#if defined(D2DMOE_INT8_TILES)
    if (by_vnni(kernels, depth) && amx_int8_usable(depth, depth)) return panel_rounded_amx;
#endif
#if defined(__x86_64__) && !defined(D2DMOE_NO_VNNI)
    if (by_vnni(kernels, depth)) return panel_rounded_vnni;
#endif
    return kernels.panel_rounded;
}
}  // namespace d2dmoe

EXPORT int d2dmoe_kernels() { return KERNELS; }
EXPORT const char* d2dmoe_kernels_name(int number) { return all_kernels[number]->name; }
EXPORT int d2dmoe_kernels_supported(int number) { return supported(number); }
EXPORT int d2dmoe_kernels_bf16(int number) { return all_kernels[number]->bf16_inputs; }
EXPORT int d2dmoe_kernels_tiles(int number) { return all_kernels[number]->experts_bf16 != nullptr; }

// Whether `int8-dynamic` layers of these widths go through tiles where enough tokens come at once.
EXPORT int d2dmoe_int8_tiles(int64_t d, int64_t size) {
#if defined(D2DMOE_INT8_TILES)
    return amx_int8_usable(d, size);
#else
    return 0;
#endif
}

EXPORT void d2dmoe_use_openmp(void* parallel, void* thread_number, void* team_size) {
    use_openmp(parallel, thread_number, team_size);
}

// Where to look for changes of a tensor of `bytes`: one word in every of SAMPLES equal parts, at a place that looks random,
// so that neither a change of most of it nor one with a regular pattern is missed. Returns how many, at most SAMPLES.
constexpr int64_t SAMPLES = 32;

EXPORT int64_t d2dmoe_samples(const void* start, int64_t bytes, D2dmoeSample* samples) {
    const auto* halves = static_cast<const uint16_t*>(start);
    int64_t n = bytes / 4, count = std::min(n, SAMPLES);
    if (n == 0 && bytes >= 2) samples[count++] = {halves, 1};
    for (int64_t i = 0; i < std::min(n, SAMPLES); i++) {
        int64_t first = i * n / count, last = (i + 1) * n / count;
        uint64_t random = uint64_t(i + 1) * 0x9e3779b97f4a7c15ull;
        samples[i] = {halves + 2 * (first + int64_t((random >> 33) % uint64_t(last - first))), 2};
    }
    return count;
}

EXPORT uint64_t d2dmoe_fingerprint(const D2dmoeSample* samples, int64_t count) {
    uint64_t hash = 0x9e3779b97f4a7c15ull;
    for (int64_t i = 0; i < count; i++) {
        uint32_t word = samples[i].at[0];
        if (samples[i].halves == 2) std::memcpy(&word, samples[i].at, 4);
        hash = (hash ^ word) * 0x100000001b3ull;
        hash ^= hash >> 29;
    }
    return hash;
}

EXPORT int d2dmoe_forward_by(const D2dmoeLayer* layer, const void* x, int64_t ld_x, const uint8_t* run, int64_t tokens,
                             void* y, int threads, D2dmoeParts parts) {
    if (tokens == 0) return 0;
    if (stale(layer->samples, layer->sample_count, layer->fingerprint)) return 2;
    Call call{*layer, *all_kernels[layer->kernels], static_cast<const char*>(x), ld_x * (layer->bf16 ? 2 : 4), run, tokens,
              static_cast<char*>(y), std::max(threads, 1)};
    try {
        Grid grid = grid_of(call);
        if (grid.groups > 1 || tokens <= layer->few) {
            GridShared shared = lay_out(shared_buffer, GridShared{&call, grid, {}, {}, {}, {}, {}, nullptr, nullptr});
            GridStart start{&shared, {}, {false}};
            if (!parts) run_team(call.team, grid_enter, &start);
            for (int phase = 0; parts && phase < GridShared::PHASES && !start.failed.load(); phase++) {
                GridPhase step{&shared, &start.failed, phase};
                if (shared.has(phase)) parts(call.team, grid_phase, &step);
            }
            return start.failed.load() ? 1 : 0;
        }
        ManyShared shared{&call, tile_size(call), {0}, {false}};
        parts ? parts(call.team, many_body, &shared) : run_team(call.team, many_body, &shared);
        return shared.failed.load() ? 1 : 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

EXPORT int d2dmoe_forward(const D2dmoeLayer* layer, const void* x, int64_t ld_x, const uint8_t* run, int64_t tokens, void* y,
                   int threads) {
    return d2dmoe_forward_by(layer, x, ld_x, run, tokens, y, threads, nullptr);
}

EXPORT void d2dmoe_limit_allocations(int left) { allocations_left.store(left); }

// The gate alone, for tests: run (tokens, experts) from scores.
EXPORT void d2dmoe_choose(const D2dmoeLayer* layer, const float* scores, int64_t tokens, uint8_t* run) {
    const auto& l = *layer;
    GateCall gate{l.gate, l.tau, l.top, l.min_experts, l.max_experts, l.shared};
    std::vector<char> scratch(size_t(l.experts) * 8);
    for (int64_t t = 0; t < tokens; t++)
        all_kernels[l.kernels]->choose(gate, scores + t * l.experts, l.experts, run + t * l.experts, scratch.data());
}

EXPORT int d2dmoe_layer_bytes() { return sizeof(D2dmoeLayer); }
