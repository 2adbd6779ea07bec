// As isa_avx512bf16.cpp, and tiles of 16 x 16 sums for experts that enough tokens run.
//
// A tile product takes rows of 32 bf16 from the left, and from the right 16 rows of 16 pairs: weights (k, n) become
// (k / 2, n, 2). A plan keeps them like that (native.py, `in_tiles`); where it does not, they are interleaved here, once per
// expert and call.
//
// Experts are taken in groups: first the hidden values of a whole group, then its outputs, block of columns after block
// of columns, so that neither leaves the second cache.
#define D2DMOE_ISA amx
#define D2DMOE_LANES 16
#define D2DMOE_32_REGISTERS
#define D2DMOE_BF16_PAIRS
#define D2DMOE_OWN_TABLE
#include "microkernels.h"

#include <cpuid.h>

#include <vector>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace d2dmoe {
namespace amx {
namespace {

#include "tiles.h"

constexpr int64_t DEPTH = 32;
constexpr int64_t TILE = SIDE * LINE, PAIR = 2 * TILE;

// Bytes from row to row of left operands: whole tiles, and an odd number of lines so that rows fall into different sets.
int64_t row_bytes(int64_t depth) { return (tiles(depth, DEPTH) | 1) * LINE; }
int64_t hidden_bytes(int64_t count, int64_t size) { return round_up(count, BLOCK) * row_bytes(size); }

// Right operands: for every BLOCK columns the pairs of tiles from the first rows of weights to the last, `next` bytes from
// one BLOCK to the next. Zeros where tiles reach beyond the weights.
struct Right {
    const char* start;
    int64_t next, deep;
    const char* block(int64_t column) const { return start + column / BLOCK * next; }
};

// The line of scratch in between keeps the blocks out of each other's cache sets.
int64_t right_bytes(int64_t depth, int64_t width) { return tiles(width, BLOCK) * (tiles(depth, DEPTH) * PAIR + LINE); }

// (depth, width) weights, rows `stride` apart.
Right interleave(const bf16* w, int64_t stride, int64_t depth, int64_t width, char* out) {
    alignas(64) uint16_t low[32], high[32];
    for (int i = 0; i < 16; i++) {
        low[2 * i] = uint16_t(i), low[2 * i + 1] = uint16_t(32 + i);
        high[2 * i] = uint16_t(16 + i), high[2 * i + 1] = uint16_t(48 + i);
    }
    const __m512i low_half = _mm512_load_si512(low), high_half = _mm512_load_si512(high);
    int64_t deep = tiles(depth, DEPTH), next = deep * PAIR + LINE;
    for (int64_t k = 0; k < deep * DEPTH; k += 2) {
        char* to = out + k / DEPTH * PAIR + k % DEPTH / 2 * LINE;
        const bf16* row = w + k * stride;
        for (int64_t n = 0; n < width; n += 32, to += next) {
            __mmask32 mask = width - n >= 32 ? ~0u : (1u << (width - n)) - 1;
            __m512i first = _mm512_maskz_loadu_epi16(k < depth ? mask : 0, row + n);
            __m512i second = _mm512_maskz_loadu_epi16(k + 1 < depth ? mask : 0, row + stride + n);
            _mm512_store_si512(to, _mm512_permutex2var_epi16(first, low_half, second));
            _mm512_store_si512(to + TILE, _mm512_permutex2var_epi16(first, high_half, second));
        }
    }
    return {out, next, deep};
}

// Columns from `first` on (a multiple of BLOCK) as they are stored in tiles, or put there now.
Right right(const void* w, const void* stored, int64_t stride, int64_t first, int64_t depth, int64_t width, char* scratch) {
    if (!stored) return interleave(static_cast<const bf16*>(w) + first, stride, depth, width, scratch);
    int64_t deep = tiles(depth, DEPTH);
    return {static_cast<const char*>(stored) + first / BLOCK * deep * PAIR, deep * PAIR, deep};
}

struct Nothing {
    void operator()(int64_t, int64_t) const {}
};

// The sums of M x N tiles in tiles 0 to 3: `a` rows `stride` bytes apart, `b` as of `interleave`. `meanwhile` is called with
// every step and the number of steps: vectors can work while tiles multiply.
template <int M, int N, class Meanwhile>
inline void multiply(const char* a, int64_t stride, const char* b, int64_t deep, const Meanwhile& meanwhile) {
    asm volatile("" ::: "memory");  // the compiler does not know that tile loads read memory
    for (int64_t k = 0; k < deep; k++) {
        _tile_loadd(4, a + k * LINE, stride);
        _tile_loadd(6, b + k * PAIR, LINE);
        _tile_dpbf16ps(0, 4, 6);
        if (N > 1) {
            _tile_loadd(7, b + k * PAIR + TILE, LINE);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (M > 1) {
            _tile_loadd(5, a + SIDE * stride + k * LINE, stride);
            _tile_dpbf16ps(2, 5, 6);
            if (N > 1) _tile_dpbf16ps(3, 5, 7);
        }
        meanwhile(k, deep);
    }
}

// BLOCK x BLOCK sums, or fewer where there are fewer rows or columns.
template <class Meanwhile = Nothing>
inline void block(const char* a, int64_t stride, const char* b, int64_t deep, int64_t rows, int64_t cols, float* sums,
                  const Meanwhile& meanwhile = {}) {
    no_sums();
    by_size(rows, cols, [&](auto m, auto n) {
        multiply<m, n>(a, stride, b, deep, meanwhile);
        store_sums<m, n>(sums, BLOCK);
    });
}

struct Room {
    char *rows, *up, *gate, *down, *hidden;
    float *sums, *gates;
};

Room rooms(char* scratch, int64_t d, int64_t size, int64_t d_out) {
    Room r;
    r.sums = take<float>(scratch, 2 * BLOCK * BLOCK);
    r.gates = take<float>(scratch, 2 * BLOCK * BLOCK);
    r.rows = take<char>(scratch, 2 * BLOCK * row_bytes(d));
    r.up = take<char>(scratch, right_bytes(d, size));
    r.gate = take<char>(scratch, right_bytes(d, size));
    r.down = take<char>(scratch, right_bytes(size, d_out));
    r.hidden = scratch;
    return r;
}

int64_t experts_scratch(int64_t tokens, int64_t d, int64_t size, int64_t d_out) {
    char* start = reinterpret_cast<char*>(LINE);  // only distances count
    return rooms(start, d, size, d_out).hidden - start + std::max(HIDDEN, hidden_bytes(tokens, size));
}

// Rows of the tokens from `first` on of an expert, one after the other: the rows `begin` to `end`.
void gather(const ExpertCall& c, int64_t first, int64_t begin, int64_t end, char* to) {
    int64_t stride = row_bytes(c.d), whole = tiles(c.d, DEPTH) * LINE;
    for (int64_t t = begin; t < end; t++) {
        const char* from = c.x + c.token(first + t) * c.ld_x;
        char* row = to + t * stride;
        int64_t i = 0;
        for (; i + LINE <= c.d * 2; i += LINE) _mm512_store_si512(row + i, _mm512_loadu_si512(from + i));
        if (i < whole) _mm512_store_si512(row + i, _mm512_maskz_loadu_epi16((1u << (c.d - i / 2)) - 1, from + i));
    }
}

// A block of hidden values that waits for bias and activation.
struct Waiting {
    const float *sums, *gates;
    vf add[2], add_gate[2];
    int64_t rows, cols, stride;
    char* to;
};

inline void finish(const Waiting& w, int32_t activation, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
        vf h[2] = {};
        for (int v = 0; v < 2; v++) {
            if (v * SIDE >= w.cols) break;
            h[v] = load(w.sums + r * BLOCK + v * LANES) + w.add[v];
            if (w.gates)
                h[v] *= activate(load(w.gates + r * BLOCK + v * LANES) + w.add_gate[v], activation);
            else
                h[v] = activate(h[v], activation);
        }
        _mm512_store_si512(w.to + r * w.stride, (__m512i)_mm512_cvtne2ps_pbh((__m512)h[1], (__m512)h[0]));
    }
}

// Hidden values of one expert in bf16, as left operands of the down product. While a block is multiplied, the one before
// gets its activation and the rows of the next are gathered.
void hidden_of(const ExpertCall& c, const Room& room, char* hidden) {
    const bf16 *up_bias = static_cast<const bf16*>(c.up_bias), *gate_bias = static_cast<const bf16*>(c.gate_bias);
    int64_t to = row_bytes(c.size);
    Right up = right(c.up, c.up_tiles, c.size, 0, c.d, c.size, room.up), gate{};
    if (c.gate) gate = right(c.gate, c.gate_tiles, c.size, 0, c.d, c.size, room.gate);
    auto in_place = [&](int64_t t) { return !c.list && c.d % DEPTH == 0 && std::min(c.count - t, BLOCK) % SIDE == 0; };
    auto gathered = [&](int64_t t) { return room.rows + t / BLOCK % 2 * BLOCK * row_bytes(c.d); };
    Waiting before{};
    if (!in_place(0)) gather(c, 0, 0, std::min(c.count, BLOCK), gathered(0));
    float *sums = room.sums, *other = room.sums + BLOCK * BLOCK;
    float *gates = room.gates, *other_gates = room.gates + BLOCK * BLOCK;
    for (int64_t t = 0; t < c.count; t += BLOCK) {
        int64_t rows = std::min(c.count - t, BLOCK), next = std::min(c.count - t - BLOCK, BLOCK);
        const char* a = in_place(t) ? c.x + t * c.ld_x : gathered(t);
        int64_t stride = in_place(t) ? c.ld_x : row_bytes(c.d);
        for (int64_t n = 0; n < c.size; n += BLOCK) {
            int64_t cols = std::min(c.size - n, BLOCK);
            bool ahead = n + BLOCK >= c.size && next > 0 && !in_place(t + BLOCK);
            auto meanwhile = [&](int64_t k, int64_t deep) {
                finish(before, c.activation, before.rows * k / deep, before.rows * (k + 1) / deep);
                if (ahead) gather(c, t + BLOCK, next * k / deep, next * (k + 1) / deep, gathered(t + BLOCK));
            };
            block(a, stride, up.block(n), up.deep, rows, cols, sums, meanwhile);
            if (c.gate) block(a, stride, gate.block(n), gate.deep, rows, cols, gates);
            before = {sums, c.gate ? gates : nullptr, {}, {}, rows, cols, to, hidden + t * to + n / SIDE * 32};
            for (int v = 0; v < 2; v++) {
                if (up_bias) before.add[v] = load_some(up_bias + n + v * LANES, cols - v * LANES);
                if (gate_bias) before.add_gate[v] = load_some(gate_bias + n + v * LANES, cols - v * LANES);
            }
            std::swap(sums, other);
            std::swap(gates, other_gates);
        }
    }
    finish(before, c.activation, 0, before.rows);
}

// Adds BLOCK columns of sums to the rows of the output.
inline void add_sums(const float* sums, float* const* y, int64_t rows, int64_t column, bool two, vf less, vf less2) {
    for (int64_t r = 0; r < rows; r++) {
        float* to = y[r] + column;
        store(to, load(to) + (load(sums + r * BLOCK) - less));
        if (two) store(to + LANES, load(to + LANES) + (load(sums + r * BLOCK + LANES) - less2));
    }
}

// Adds columns `first` to `last` of one expert's output.
void outputs_of(const ExpertCall& c, const Room& room, const char* hidden, int64_t first, int64_t last) {
    int64_t stride = row_bytes(c.size);
    Right down = right(c.down, c.down_tiles, c.d_out, first, c.size, last - first, room.down);
    const bf16* constant = static_cast<const bf16*>(c.constant);
    float* y[BLOCK];
    for (int64_t t = 0; t < c.count; t += BLOCK) {
        int64_t rows = std::min(c.count - t, BLOCK);
        for (int64_t r = 0; r < rows; r++) y[r] = c.y + c.token(t + r) * c.ld_y;
        float *sums = room.sums, *before = room.sums + BLOCK * BLOCK;
        // Sums are added while the next tiles are being multiplied.
        for (int64_t n = first; n < last + BLOCK; n += BLOCK, std::swap(sums, before)) {
            if (n < last)
                block(hidden + t * stride, stride, down.block(n - first), down.deep, rows, last - n, sums);
            if (n == first) continue;
            int64_t column = n - BLOCK, cols = last - column;
            vf less = constant ? load_some(constant + column, cols) : vf{};
            vf less2 = constant && cols > SIDE ? load_some(constant + column + LANES, cols - LANES) : vf{};
            add_sums(before, y, rows, column, cols > SIDE, less, less2);
        }
    }
}

void experts(const ExpertCall* calls, int64_t n, int64_t tokens) {
    std::vector<const ExpertCall*> many;
    for (int64_t i = 0; i < n; i++) {
        if (calls[i].count < FEWEST)
            kernels_avx512bf16.expert_bf16(calls[i]);
        else
            many.push_back(calls + i);
    }
    if (many.empty()) return;
    const TileShapes shapes;
    _tile_loadconfig(&shapes);
    const ExpertCall &any = *many[0];
    int64_t d_out = any.d_out, width = std::max<int64_t>(BLOCK, OUTPUT / (tokens * 4) / BLOCK * BLOCK);
    const Room room = rooms(any.scratch, any.d, any.widest, d_out);
    for (size_t first = 0, last = 0; first < many.size(); first = last) {
        int64_t used = 0;
        for (; last < many.size(); last++) {
            int64_t bytes = hidden_bytes(many[last]->count, many[last]->size);
            if (used && used + bytes > HIDDEN) break;
            hidden_of(*many[last], room, room.hidden + used);
            used += bytes;
        }
        for (int64_t column = 0; column < d_out; column += width) {
            const char* hidden = room.hidden;
            for (size_t i = first; i < last; i++) {
                outputs_of(*many[i], room, hidden, column, std::min(column + width, d_out));
                hidden += hidden_bytes(many[i]->count, many[i]->size);
            }
        }
    }
    _tile_release();
}

void narrow_pairs(const float* x, int64_t n, bf16* out) {
    int64_t i = 0;
    for (; i + 32 <= n; i += 32)
        _mm512_storeu_si512(out + i, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + i + 16), _mm512_loadu_ps(x + i)));
    narrow(x + i, n - i, out + i);
}

// ---- router

constexpr int64_t CHUNK = 16;  // tiles of depth taken at once

// Up to BLOCK rows of weights, `depth` apart, as columns of right operands.
void turn(const bf16* w, int64_t depth, int64_t rows, int64_t deep, char* out) {
    const __m512i from = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                            _mm512_set1_epi32(int32_t(depth) * 2));
    for (int64_t r = 0; r < rows; r += SIDE)
        for (int64_t k = 0; k < deep; k++)
            for (int64_t i = 0; i < SIDE; i++)
                _mm512_store_si512(out + k * PAIR + r / SIDE * TILE + i * LINE,
                                   _mm512_i32gather_epi32(from, w + r * depth + k * DEPTH + 2 * i, 1));
}

template <int M, int N>
void add_products(const char* a, int64_t stride, const char* b, int64_t deep, bool first, float* out, int64_t ld_out) {
    no_sums();
    if (!first) {
        asm volatile("" ::: "memory");
        _tile_loadd(0, out, ld_out * 4);
        if (N > 1) _tile_loadd(1, out + SIDE, ld_out * 4);
        if (M > 1) _tile_loadd(2, out + SIDE * ld_out, ld_out * 4);
        if (M > 1 && N > 1) _tile_loadd(3, out + SIDE * ld_out + SIDE, ld_out * 4);
    }
    multiply<M, N>(a, stride, b, deep, Nothing{});
    store_sums<M, N>(out, ld_out);
}

// Whole tiles here, what is left over by single products.
void dots_bf16(const void* x, int64_t ld_x, int64_t tokens, const bf16* w, int64_t rows, int64_t depth, float* out,
               int64_t ld_out, int32_t end) {
    const char* start = static_cast<const char*>(x);
    auto rest = [&](int64_t token, int64_t count, int64_t row, int64_t n) {
        if (count && n)
            kernels_avx512bf16.dots_bf16(start + token * ld_x * 2, ld_x, count, w + row * depth, n, depth,
                                         out + token * ld_out + row, ld_out, end);
    };
    int64_t whole_tokens = depth % DEPTH ? 0 : tokens / SIDE * SIDE, whole_rows = rows / SIDE * SIDE;
    if (!whole_tokens || !whole_rows || depth > 1 << 24) return rest(0, tokens, 0, rows);
    rest(whole_tokens, tokens - whole_tokens, 0, rows);
    rest(0, whole_tokens, whole_rows, rows - whole_rows);
    alignas(64) char turned[CHUNK * PAIR];
    const TileShapes shapes;
    _tile_loadconfig(&shapes);
    for (int64_t r = 0; r < whole_rows; r += BLOCK)
        for (int64_t k = 0; k < depth; k += CHUNK * DEPTH) {
            int64_t deep = std::min(CHUNK, (depth - k) / DEPTH), cols = std::min(whole_rows - r, BLOCK);
            turn(w + r * depth + k, depth, cols, deep, turned);
            for (int64_t t = 0; t < whole_tokens; t += BLOCK) {
                by_size(whole_tokens - t, cols, [&](auto m, auto n) {
                    add_products<m, n>(start + (t * ld_x + k) * 2, ld_x * 2, turned, deep, k == 0, out + t * ld_out + r,
                                       ld_out);
                });
            }
        }
    _tile_release();
    for (int64_t t = 0; end != DOTS_PLAIN && t < whole_tokens; t++)
        for (int64_t r = 0; r < whole_rows; r += LANES) {
            float* value = out + t * ld_out + r;
            store(value, end == DOTS_RELU ? activate(load(value), RELU) : (vf)((vi)load(value) & 0x7fffffff));
        }
}

void dots_mixed(const float* x, int64_t ld_x, int64_t tokens, const bf16* w, int64_t rows, int64_t depth, float* out,
                int64_t ld_out, int32_t end) {
    kernels_avx512bf16.dots_mixed(x, ld_x, tokens, w, rows, depth, out, ld_out, end);
}

void add_rows(const float* x, int64_t ld_x, int64_t tokens, const bf16* w, int64_t ld_w, const int32_t* list, int64_t count,
              int64_t width, float* y, int64_t ld_y) {
    kernels_avx512bf16.add_rows_mixed(x, ld_x, tokens, w, ld_w, list, count, width, y, ld_y);
}

}  // namespace
}  // namespace amx

bool amx_usable() {
    static const bool usable = [] {
        unsigned a, b, c, d = 0;
        constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;
        constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (AMX_BF16 | AMX_TILE)) != (AMX_BF16 | AMX_TILE)) return false;
#if defined(__linux__)
        return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
        return false;
#endif
    }();
    return usable;
}

extern const Kernels kernels_amx;
const Kernels kernels_amx = {
    "amx", 16, true, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,
    amx::experts, amx::experts_scratch, nullptr,
    amx::dots_bf16, amx::dots_mixed, nullptr, nullptr, amx::add_rows, amx::keep, amx::choose, amx::narrow_pairs,
    amx::widen,
};

}  // namespace d2dmoe
