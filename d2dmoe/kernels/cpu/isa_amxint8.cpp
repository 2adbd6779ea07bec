// Experts in int8 by tiles: from the left rows of up to 64 rounded values, from the right up to 16 quads of rows of weights,
// which lie in memory as a tile wants them (int8.h). A depth is taken in equal steps, so that no tile reaches beyond the
// weights.
//
// Experts are taken in groups as in isa_amx.cpp.
#define D2DMOE_ISA amxint8
#define D2DMOE_LANES 16
#define D2DMOE_32_REGISTERS
#define D2DMOE_VNNI
#define D2DMOE_OWN_TABLE
#include "microkernels.h"

#include <cpuid.h>

#include <cstdlib>
#include <vector>

namespace d2dmoe {
namespace amxint8 {
namespace {

#include "tiles.h"

constexpr int64_t DEEP = 64;
constexpr int64_t BEHIND = 3;  // blocks of sums that wait: what a tile has stored is not there at once

// Tile products that make up a depth, and the bytes of a row that each of them takes.
struct Steps {
    int64_t count, bytes;
    explicit Steps(int64_t depth) : count(tiles(depth, DEEP)), bytes(round_up(depth, 4) / count) {}
    bool even(int64_t depth) const { return bytes % 4 == 0 && bytes * count == round_up(depth, 4); }
};

void load_shapes(const Steps& steps) {
    TileShapes shapes;
    shapes.bytes[4] = shapes.bytes[5] = uint16_t(steps.bytes);
    shapes.rows[6] = shapes.rows[7] = uint8_t(steps.bytes / 4);
    _tile_loadconfig(&shapes);
}

// Left operands: the bytes of a rounded row begin a line, what comes before them ends the line before. An odd number of
// lines from row to row, so that rows fall into different sets.
constexpr int64_t HEAD = LINE - int64_t(sizeof(Rounded));
int64_t row_bytes(int64_t depth) { return ((1 + tiles(depth, LINE)) | 1) * LINE; }
int64_t hidden_bytes(int64_t count, int64_t size) { return round_up(count, BLOCK) * row_bytes(size); }
const Rounded* row_at(const char* rows, int64_t stride, int64_t r) {
    return reinterpret_cast<const Rounded*>(rows + r * stride + HEAD);
}

template <int M, int N>
inline void multiply(const char* a, int64_t stride, const char* b, int64_t ld_b, const Steps& steps) {
    asm volatile("" ::: "memory");  // the compiler does not know that tile loads read memory
    no_sums();
    for (int64_t k = 0; k < steps.count; k++, a += steps.bytes, b += steps.bytes / 4 * ld_b) {
        _tile_loadd(4, a, stride);
        _tile_loadd(6, b, ld_b);
        _tile_dpbsud(0, 4, 6);
        if (N > 1) {
            _tile_loadd(7, b + LINE, ld_b);
            _tile_dpbsud(1, 4, 7);
        }
        if (M > 1) {
            _tile_loadd(5, a + SIDE * stride, stride);
            _tile_dpbsud(2, 5, 6);
            if (N > 1) _tile_dpbsud(3, 5, 7);
        }
    }
}

// BLOCK x BLOCK sums, or fewer where there are fewer rows or columns, of rows as of `row_bytes` and columns of quads.
inline void block(const char* rows, int64_t stride, const uint8_t* quads, int64_t width, const Steps& steps, int64_t count,
                  int64_t cols, int32_t* sums) {
    const char *a = rows + LINE, *b = reinterpret_cast<const char*>(quads);
    by_size(count, cols, [&](auto m, auto n) {
        multiply<m, n>(a, stride, b, width * 4, steps);
        store_sums<m, n>(sums, BLOCK);
    });
}

inline vf value_of(const int32_t* sums, const Rounded* row) {
    __m512i whole = _mm512_sub_epi32(_mm512_loadu_si512(sums), _mm512_set1_epi32(row->offset));
    return (vf)_mm512_cvtepi32_ps(whole) * row->scale;
}

struct Room {
    int32_t *sums, *gates;
    char* rows;
    float* values;
    char* hidden;
};

int64_t padded(int64_t size) { return round_up(size, BLOCK); }

Room rooms(char* scratch, int64_t d, int64_t size) {
    Room r;
    r.sums = take<int32_t>(scratch, (BEHIND + 1) * BLOCK * BLOCK);
    r.gates = take<int32_t>(scratch, BLOCK * BLOCK);
    r.rows = take<char>(scratch, BLOCK * row_bytes(d));
    r.values = take<float>(scratch, BLOCK * padded(size));
    r.hidden = scratch;
    return r;
}

// Rounded rows of the tokens from `first` on of an expert, one after the other.
void gather(const ExpertCall& c, int64_t first, int64_t count, char* to) {
    int64_t stride = row_bytes(c.d), whole = round_up(c.d, 4);
    for (int64_t t = 0; t < count; t++, to += stride) {
        const char* from = c.rounded + c.token(first + t) * c.ld_rounded;
        std::memcpy(to + HEAD, from, sizeof(Rounded));
        for (int64_t i = 0; i < whole; i += LINE) {
            __mmask64 mask = whole - i >= LINE ? ~uint64_t(0) : (uint64_t(1) << (whole - i)) - 1;
            _mm512_store_si512(to + LINE + i, _mm512_maskz_loadu_epi8(mask, from + sizeof(Rounded) + i));
        }
    }
}

// Hidden values of one expert, rounded, as left operands of the down product.
void hidden_of(const ExpertCall& c, const Room& room, char* hidden) {
    const Steps steps(c.d);
    const auto *up = static_cast<const uint8_t*>(c.up), *gate = static_cast<const uint8_t*>(c.gate);
    const float *up_bias = static_cast<const float*>(c.up_bias), *gate_bias = static_cast<const float*>(c.gate_bias);
    int64_t stride = row_bytes(c.d), to = row_bytes(c.size), ld = padded(c.size);
    for (int64_t t = 0; t < c.count; t += BLOCK) {
        int64_t rows = std::min(c.count - t, BLOCK);
        gather(c, t, rows, room.rows);
        for (int64_t n = 0; n < c.size; n += BLOCK) {
            int64_t cols = std::min(c.size - n, BLOCK);
            block(room.rows, stride, up + n * 4, c.size, steps, rows, cols, room.sums);
            if (gate) block(room.rows, stride, gate + n * 4, c.size, steps, rows, cols, room.gates);
            for (int64_t v = 0; v < cols; v += LANES) {
                int64_t at = n + v, left = c.size - at;
                vf add = up_bias ? load_some(up_bias + at, left) : vf{};
                vf add_gate = gate_bias ? load_some(gate_bias + at, left) : vf{};
                vf scale = load_some(c.up_scale + at, left), after = load_some(c.down_scale + at, left);
                vf gate_scale = gate ? load_some(c.gate_scale + at, left) : vf{};
                for (int64_t r = 0; r < rows; r++) {
                    const Rounded* row = row_at(room.rows, stride, r);
                    vf h = value_of(room.sums + r * BLOCK + v, row) * scale + add;
                    if (gate) {
                        vf g = value_of(room.gates + r * BLOCK + v, row) * gate_scale + add_gate;
                        h *= activate_roughly(g, c.activation);
                    } else {
                        h = activate_roughly(h, c.activation);
                    }
                    store(room.values + r * ld + at, h * after);
                }
            }
        }
        for (int64_t r = 0; r < rows; r++) round_row(room.values + r * ld, c.size, hidden + (t + r) * to + HEAD);
    }
}

// Adds BLOCK columns of sums to the rows of the output.
inline void add_sums(const int32_t* sums, const char* hidden, int64_t stride, float* const* y, int64_t rows, int64_t column,
                     bool two, vf less, vf less2) {
    for (int64_t r = 0; r < rows; r++) {
        const Rounded* row = row_at(hidden, stride, r);
        float* to = y[r] + column;
        store(to, value_of(sums + r * BLOCK, row) + load(to) - less);
        if (two) store(to + LANES, value_of(sums + r * BLOCK + LANES, row) + load(to + LANES) - less2);
    }
}

// Adds columns `first` to `last` of one expert's output.
void outputs_of(const ExpertCall& c, const Room& room, const char* hidden, int64_t first, int64_t last) {
    const Steps steps(c.size);
    int64_t stride = row_bytes(c.size);
    const auto* down = static_cast<const uint8_t*>(c.down);
    const float* constant = static_cast<const float*>(c.constant);
    float* y[BLOCK];
    for (int64_t t = 0; t < c.count; t += BLOCK, hidden += BLOCK * stride) {
        int64_t rows = std::min(c.count - t, BLOCK);
        for (int64_t r = 0; r < rows; r++) y[r] = c.y + c.token(t + r) * c.ld_y;
        auto sums = [&](int64_t n) { return room.sums + n / BLOCK % (BEHIND + 1) * BLOCK * BLOCK; };
        for (int64_t n = first; n < last + BEHIND * BLOCK; n += BLOCK) {
            if (n < last) block(hidden, stride, down + n * 4, c.d_out, steps, rows, last - n, sums(n));
            int64_t column = n - BEHIND * BLOCK, cols = last - column;
            if (column < first || cols <= 0) continue;
            vf less = constant ? load_some(constant + column, cols) : vf{};
            vf less2 = constant && cols > SIDE ? load_some(constant + column + LANES, cols - LANES) : vf{};
            add_sums(sums(column), hidden, stride, y, rows, column, cols > SIDE, less, less2);
        }
    }
}

bool allowed() {
    static const bool allowed = [] {
        unsigned a, b, c, d = 0;
        constexpr unsigned AMX_INT8 = 1u << 25;
        const char* wanted = std::getenv("D2DMOE_AMX_INT8");
        return !(wanted && *wanted == '0') && __get_cpuid_count(7, 0, &a, &b, &c, &d) && d & AMX_INT8 && amx_usable();
    }();
    return allowed;
}

}  // namespace
}  // namespace amxint8

bool amx_int8_usable(int64_t d, int64_t size) {
    using amxint8::Steps;
    return amxint8::allowed() && Steps(d).even(d) && Steps(size).even(size);
}

int64_t experts_rounded_scratch(int64_t tokens, int64_t d, int64_t size) {
    using namespace amxint8;
    char* start = reinterpret_cast<char*>(LINE);  // only distances count
    return rooms(start, d, size).hidden - start + std::max(HIDDEN, hidden_bytes(tokens, size));
}

void experts_rounded_amx(const ExpertCall* calls, int64_t n, int64_t tokens) {
    using namespace amxint8;
    std::vector<const ExpertCall*> many;
    for (int64_t i = 0; i < n; i++) {
        if (calls[i].count < FEWEST)
            expert_rounded_vnni(calls[i]);
        else
            many.push_back(calls + i);
    }
    if (many.empty()) return;
    const ExpertCall& any = *many[0];
    int64_t width = std::max<int64_t>(BLOCK, OUTPUT / (tokens * 4) / BLOCK * BLOCK);
    const Room room = rooms(any.scratch, any.d, any.size);
    for (size_t first = 0, last = 0; first < many.size(); first = last) {
        int64_t used = 0;
        load_shapes(Steps(any.d));
        for (; last < many.size(); last++) {
            int64_t bytes = hidden_bytes(many[last]->count, any.size);
            if (used && used + bytes > HIDDEN) break;
            hidden_of(*many[last], room, room.hidden + used);
            used += bytes;
        }
        load_shapes(Steps(any.size));
        for (int64_t column = 0; column < any.d_out; column += width) {
            const char* hidden = room.hidden;
            for (size_t i = first; i < last; i++) {
                outputs_of(*many[i], room, hidden, column, std::min(column + width, any.d_out));
                hidden += hidden_bytes(many[i]->count, any.size);
            }
        }
    }
    _tile_release();
}

// Rows lie one after the other, their bytes at the beginning of a line, and up to whole blocks of them may be read.
void panel_rounded_amx(const char* const* rows, int64_t count, const uint8_t* w, int64_t depth, int64_t width,
                       float* const* out) {
    using namespace amxint8;
    if (count < FEWEST) return panel_rounded_vnni(rows, count, w, depth, width, out);
    const Steps steps(depth);
    load_shapes(steps);
    alignas(LINE) int32_t sums[2][BLOCK * BLOCK];
    int64_t stride = rows[1] - rows[0];
    auto give = [&](int64_t t, int64_t n, const int32_t* from) {
        for (int64_t r = 0, most = std::min(count - t, BLOCK); r < most; r++) {
            auto* row = reinterpret_cast<const Rounded*>(rows[t + r]);
            for (int64_t v = 0; v < std::min(width - n, BLOCK); v += LANES)
                store(out[t + r] + n + v, value_of(from + r * BLOCK + v, row));
        }
    };
    int64_t columns = tiles(width, BLOCK), blocks = tiles(count, BLOCK) * columns;
    for (int64_t b = 0; b <= blocks; b++) {  // what a tile has stored is not there at once
        int64_t t = b / columns * BLOCK, n = b % columns * BLOCK;
        if (b < blocks)
            block(rows[0] + t * stride - HEAD, stride, w + n * 4, width, steps, count - t, width - n, sums[b % 2]);
        if (b) give((b - 1) / columns * BLOCK, (b - 1) % columns * BLOCK, sums[(b - 1) % 2]);
    }
    _tile_release();
}

}  // namespace d2dmoe
