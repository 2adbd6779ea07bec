// Experts in int8, part of microkernels.h. Tokens stay in fp32, and a weight is widened in a register; or tokens and hidden
// values are rounded as well, row by row, and D2DMOE_VNNI has an instruction for four such products.
//
// Weights lie in quads of rows, (ceil(depth / 4), width, 4) bytes, each of them 128 + weight; quads.py makes them. So a
// vector holds 4 rows of LANES columns. A whole vector may be read beyond the last column: there is room for it.

inline vu quad(const uint8_t* p) { return *reinterpret_cast<const vu*>(p) ^ 0x80808080u; }

// One of the four rows, as integers in fp32.
template <int ROW>
inline vf row_of(vu quad) {
    return __builtin_convertvector((vi)(quad << (24 - 8 * ROW)) >> 24, vf);
}

// A rounded row: its scale, 128 times its sum, and its bytes, with zeros up to a whole quad.
struct Rounded {
    float scale;
    int32_t offset;
    int8_t bytes[];
};

#if defined(__AVX512F__)
inline int32_t largest_of(vi v) { return _mm512_reduce_max_epi32((__m512i)v); }
inline int32_t sum_of(vi v) { return _mm512_reduce_add_epi32((__m512i)v); }
inline void store_bytes(int8_t* p, vi v, int64_t n) { _mm512_mask_cvtepi32_storeu_epi8(p, first_lanes(n), (__m512i)v); }
#else
inline int32_t largest_of(vi v) {
    int32_t most = 0;
    for (int64_t i = 0; i < LANES; i++) most = std::max(most, v[i]);
    return most;
}
inline int32_t sum_of(vi v) {
    int32_t all = 0;
    for (int64_t i = 0; i < LANES; i++) all += v[i];
    return all;
}
inline void store_bytes(int8_t* p, vi v, int64_t n) {
    for (int64_t i = 0; i < std::min(LANES, n); i++) p[i] = int8_t(v[i]);
}
#endif

// x / by. A division of vectors takes longer than a product whose error is taken back: where products and sums are fused, that
// is exact but for denormal numbers.
inline vf quotient(vf x, float by) {
#if defined(__FMA__)
    if (by > 1e-30f) {
        vf inverse = vf{} + 1.0f / by, first = x * inverse;
        return first + (x - first * by) * inverse;
    }
#endif
    return x / by;
}

// The largest of a row's values without their signs: as integers, whose order is that of the values, and above them what is not
// finite.
struct Spread {
    vi largest = {};
    void see(vf v) {
        vi size = (vi)v & 0x7fffffff;
        largest = size > largest ? size : largest;
    }
};

// To the largest value 127; a row with a value that is not finite gets the scale NaN and zeros.
class Rounding {
public:
    Rounding(const Spread& spread, int64_t n, char* out) : row_(reinterpret_cast<Rounded*>(out)) {
        int32_t size = largest_of(spread.largest);
        bool finite = size < 0x7f800000;
        float most;
        std::memcpy(&most, &size, 4);
        row_->scale = finite ? most / 127.0f : __builtin_nanf("");
        some_ = finite && row_->scale > 0;
        if (!some_) std::memset(row_->bytes, 0, size_t(n));
        std::memset(row_->bytes + n, 0, size_t(-n & 3));
    }
    // Values `first` to `first + n`, where `first` is a multiple of LANES.
    void add(const float* x, int64_t first, int64_t n) {
        float scale = row_->scale;  // what is written may be what is read, for all the compiler knows
        int8_t* to = row_->bytes + first;
        vi sum = sum_;
        for (int64_t i = 0; some_ && i < n; i += LANES) {
            vf v = quotient(load_some(x + i, n - i), scale);
            vi whole = (vi)(v + 12582912.0f) - 0x4b400000;  // rounds to an integer in the low bits
            sum += whole;
            store_bytes(to + i, whole, n - i);
        }
        sum_ = sum;
    }
    void end() { row_->offset = 128 * sum_of(sum_); }

private:
    Rounded* row_;
    bool some_;
    vi sum_ = {};
};

inline void round_by(const Spread& spread, const float* x, int64_t n, char* out) {
    Rounding rounding(spread, n, out);
    rounding.add(x, 0, n);
    rounding.end();
}

inline void round_row(const float* x, int64_t n, char* out) {
    Spread spread;
    for (int64_t i = 0; i < n; i += LANES) spread.see(load_some(x + i, n - i));
    round_by(spread, x, n, out);
}

// The signs of `quads.rotated` over the length of its matrix.
template <int BLOCK>
struct Signs {
    float at[BLOCK];
    constexpr Signs() : at() {
        constexpr float LENGTH = BLOCK == 64 ? 8 : 4;
        static_assert(LENGTH * LENGTH == BLOCK);
        for (int i = 0; i < BLOCK; i++) {
            int pairs = i & i >> 1;
            at[i] = ((pairs ^ pairs >> 2 ^ pairs >> 4) & 1 ? -1 : 1) / LENGTH;
        }
    }
};

#if defined(__AVX512F__)
// The sum in every first place, the difference in every second one.
inline __m512 pairs(__m512 own, __m512 other, __mmask16 second) {
    return _mm512_fmadd_ps(own, _mm512_mask_blend_ps(second, _mm512_set1_ps(1), _mm512_set1_ps(-1)), other);
}
#endif

// BLOCK values as `quads.rotated` has them, by sums and differences of pairs that are ever farther apart; seen on the way.
template <int BLOCK>
inline void rotate(const float* x, float* out, Spread& spread) {
    static constexpr Signs<BLOCK> SIGNS;
#if defined(__AVX512F__)
    constexpr int COUNT = BLOCK / 16;
    __m512 v[COUNT];
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; i++) {
        v[i] = _mm512_mul_ps(_mm512_loadu_ps(x + 16 * i), _mm512_loadu_ps(SIGNS.at + 16 * i));
        v[i] = pairs(v[i], _mm512_permute_ps(v[i], 0xb1), 0xaaaa);
        v[i] = pairs(v[i], _mm512_permute_ps(v[i], 0x4e), 0xcccc);
        v[i] = pairs(v[i], _mm512_shuffle_f32x4(v[i], v[i], 0xb1), 0xf0f0);
        v[i] = pairs(v[i], _mm512_shuffle_f32x4(v[i], v[i], 0x4e), 0xff00);
    }
#pragma GCC unroll 2
    for (int step = 1; step < COUNT; step *= 2)
#pragma GCC unroll 4
        for (int i = 0; i < COUNT; i++)
            if (!(i & step)) {
                __m512 first = v[i], second = v[i + step];
                v[i] = _mm512_add_ps(first, second), v[i + step] = _mm512_sub_ps(first, second);
            }
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; i++) spread.see((vf)v[i]), _mm512_storeu_ps(out + 16 * i, v[i]);
#else
    for (int64_t i = 0; i < BLOCK; i++) out[i] = x[i] * SIGNS.at[i];
    for (int64_t step = 1; step < BLOCK; step *= 2)
        for (int64_t start = 0; start < BLOCK; start += 2 * step)
            for (int64_t i = start; i < start + step; i++) {
                float first = out[i], second = out[i + step];
                out[i] = first + second, out[i + step] = first - second;
            }
    for (int64_t i = 0; i < BLOCK; i += LANES) spread.see(load(out + i));
#endif
}

inline Spread rotate_row(const float* x, int64_t n, float* out, Spread spread) {
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) rotate<64>(x + i, out + i, spread);
    for (; i + 16 <= n; i += 16) rotate<16>(x + i, out + i, spread);
    std::memcpy(out + i, x + i, size_t(n - i) * sizeof(float));
    for (; i < n; i += LANES) spread.see(load_some(x + i, n - i));
    return spread;
}

// A token in the coordinates of `quads.rotated`, rounded. Of a long one parts are rotated twice rather than kept.
inline void round_token(const float* x, int64_t n, char* out) {
    constexpr int64_t PART = 2048;
    float values[PART];
    Spread spread;
    for (int64_t first = 0; first < n; first += PART)
        spread = rotate_row(x + first, std::min(PART, n - first), values, spread);
    Rounding rounding(spread, n, out);
    for (int64_t first = 0; first < n; first += PART) {
        int64_t count = std::min(PART, n - first);
        if (n > PART) rotate_row(x + first, count, values, {});
        rounding.add(values, first, count);
    }
    rounding.end();
}

inline float value_at(const float* x, int64_t k) { return x[k]; }
inline float value_at(const Rounded* x, int64_t k) { return x->bytes[k]; }

template <int ROW, class X, int KU, int ROWS, int COLS>
__attribute__((always_inline)) inline void add_row(vf (&sum)[KU][ROWS][COLS], const vu (&quads)[COLS],
                                                   const X* const* x, int64_t k) {
    vf weights[COLS];
#pragma GCC unroll 8
    for (int v = 0; v < COLS; v++) weights[v] = row_of<ROW>(quads[v]);
#pragma GCC unroll 16
    for (int t = 0; t < ROWS; t++) {
        float value = value_at(x[t], k + ROW);
#pragma GCC unroll 8
        for (int v = 0; v < COLS; v++) sum[ROW % KU][t][v] += value * weights[v];
    }
}

// Sums over the whole depth of one tile, fp32.
template <class X, int KU, int ROWS, int COLS>
__attribute__((always_inline)) inline void sum_quads(vf (&sum)[KU][ROWS][COLS], const X* const* x, const uint8_t* w,
                                                     int64_t width, int64_t depth) {
    const X* row[ROWS];
#pragma GCC unroll 16
    for (int t = 0; t < ROWS; t++) row[t] = x[t];
    int64_t k = 0;
    vu quads[COLS];
    for (; k + 4 <= depth; k += 4) {
        const uint8_t* here = w + k * width;
#pragma GCC unroll 8
        for (int v = 0; v < COLS; v++) {
            quads[v] = quad(here + v * LANES * 4);
            if (ROWS <= FEW_TOKENS) __builtin_prefetch(here + AHEAD / COLS * 4 * width + v * LANES * 4, 0, 2);
        }
        add_row<0>(sum, quads, row, k);
        add_row<1>(sum, quads, row, k);
        add_row<2>(sum, quads, row, k);
        add_row<3>(sum, quads, row, k);
    }
    if (k < depth) {
#pragma GCC unroll 8
        for (int v = 0; v < COLS; v++) quads[v] = quad(w + k * width + v * LANES * 4);
        add_row<0>(sum, quads, row, k);
        if (k + 1 < depth) add_row<1>(sum, quads, row, k);
        if (k + 2 < depth) add_row<2>(sum, quads, row, k);
    }
}

#if defined(D2DMOE_VNNI)
// Unsigned bytes times signed ones: the weights as they lie there, 128 too large, which `offset` takes back.
template <int KU, int ROWS, int COLS>
__attribute__((always_inline)) inline void sum_quads(vf (&sum)[KU][ROWS][COLS], const Rounded* const* x, const uint8_t* w,
                                                     int64_t width, int64_t depth) {
    typedef int32_t four __attribute__((aligned(1), may_alias));
    __m512i whole[KU][ROWS][COLS];
#pragma GCC unroll 4
    for (int u = 0; u < KU; u++)
#pragma GCC unroll 16
        for (int t = 0; t < ROWS; t++)
#pragma GCC unroll 8
            for (int v = 0; v < COLS; v++) whole[u][t][v] = _mm512_setzero_si512();
    const int8_t* row[ROWS];
#pragma GCC unroll 16
    for (int t = 0; t < ROWS; t++) row[t] = x[t]->bytes;
    auto step = [&](int64_t k, int u) __attribute__((always_inline)) {
        __m512i weights[COLS];
        const uint8_t* here = w + k * width;
#pragma GCC unroll 8
        for (int v = 0; v < COLS; v++) {
            weights[v] = _mm512_loadu_si512(here + v * 64);
            if (ROWS <= FEW_TOKENS) __builtin_prefetch(here + AHEAD / COLS * 4 * width + v * 64, 0, 2);
        }
#pragma GCC unroll 16
        for (int t = 0; t < ROWS; t++) {
            __m512i value = _mm512_set1_epi32(*reinterpret_cast<const four*>(row[t] + k));
#pragma GCC unroll 8
            for (int v = 0; v < COLS; v++) whole[u][t][v] = _mm512_dpbusd_epi32(whole[u][t][v], weights[v], value);
        }
    };
    int64_t k = 0;
    for (; k + 4 * KU <= depth; k += 4 * KU) {
#pragma GCC unroll 4
        for (int u = 0; u < KU; u++) step(k + 4 * u, u);
    }
    for (; k < depth; k += 4) step(k, 0);
#pragma GCC unroll 16
    for (int t = 0; t < ROWS; t++) {
        __m512i offset = _mm512_set1_epi32(x[t]->offset);
#pragma GCC unroll 8
        for (int v = 0; v < COLS; v++) {
            __m512i all = whole[0][t][v];
#pragma GCC unroll 4
            for (int u = 1; u < KU; u++) all = _mm512_add_epi32(all, whole[u][t][v]);
            sum[0][t][v] = (vf)_mm512_cvtepi32_ps(_mm512_sub_epi32(all, offset));
        }
    }
}
#endif

// y + sum, of sums over a row of values, or of a rounded row.
inline vf added(vf y, vf sum, const float*) { return y + sum; }
inline vf added(vf y, vf sum, const Rounded* x) { return y + sum * x->scale; }

// As `tile` in microkernels.h. `width` is that of the whole matrix, `valid` what is left of it from this column on.
template <class X, int ROWS, int COLS, bool ADD>
void tile_quads(const X* const* x, const uint8_t* w, int64_t width, int64_t depth, int64_t valid, const float* minus,
                float* const* out, int64_t at) {
    constexpr int KU = ROWS * COLS >= 6 ? 1 : ROWS * COLS >= 3 ? 2 : 4;
    vf sum[KU][ROWS][COLS] = {};
    sum_quads(sum, x, w, width, depth);
#pragma GCC unroll 16
    for (int t = 0; t < ROWS; t++) {
        float* to = out[t] + at;
#pragma GCC unroll 8
        for (int v = 0; v < COLS; v++) {
            vf all = sum[0][t][v], y = {};
#pragma GCC unroll 4
            for (int u = 1; u < KU; u++) all += sum[u][t][v];
            if (ADD) y = load(to + v * LANES);
            if (minus) y -= load_some(minus + v * LANES, valid - v * LANES);
            store(to + v * LANES, added(y, all, x[t]));
        }
    }
}

template <class X>
using TileQuads = void (*)(const X* const*, const uint8_t*, int64_t, int64_t, int64_t, const float*, float* const*,
                           int64_t);

template <class X, int COLS, bool ADD, int ROWS = most_rows(COLS)>
TileQuads<X> pick_quads(int64_t rows) {
    if constexpr (ROWS > 1)
        if (rows < ROWS) return pick_quads<X, COLS, ADD, ROWS - 1>(rows);
    return tile_quads<X, ROWS, COLS, ADD>;
}

// As `product` in microkernels.h.
template <bool ADD, class X>
void product_quads(const X* const* x, int64_t count, const uint8_t* w, int64_t depth, int64_t width, const float* minus,
                   float* const* out, int64_t first, int64_t last) {
    int64_t vectors = (last - first + LANES - 1) / LANES, blocks = (vectors + MOST_COLS - 1) / MOST_COLS;
    for (int64_t b = 0, at = first; b < blocks; b++) {
        int cols = int(vectors / blocks + (b < vectors % blocks));
        auto pick = cols == 1 ? pick_quads<X, 1, ADD> : cols == 2 ? pick_quads<X, 2, ADD>
                    : cols == 3 ? pick_quads<X, 3, ADD> : pick_quads<X, MOST_COLS, ADD>;
        int64_t most = most_rows(cols), parts = (count + most - 1) / most;
        for (int64_t p = 0, t = 0; p < parts; p++) {
            int64_t rows = count / parts + (p < count % parts);
            pick(rows)(x + t, w + at * 4, width, depth, width - at, minus ? minus + at : nullptr, out + t, at);
            t += rows;
        }
        at += cols * LANES;
    }
}

template <bool ADD, class X>
void product_quads(const X* const* x, int64_t count, const uint8_t* w, int64_t depth, int64_t width, const float* minus,
                   float* const* out) {
    product_quads<ADD>(x, count, w, depth, width, minus, out, 0, width);
}

// As `Columns` in kernels.h.
inline void columns_rounded(const char* rounded, int64_t ld, int64_t tokens, const uint8_t* w, const float* scale,
                            int64_t depth, int64_t width, int64_t first, int64_t last, float* out, int64_t ld_out) {
    constexpr int64_t AT_ONCE = 60;  // a whole number of tiles, whichever most_rows() gives
    for (int64_t from = 0; from < tokens; from += AT_ONCE) {
        int64_t count = std::min(AT_ONCE, tokens - from);
        const Rounded* rows[AT_ONCE];
        float* outs[AT_ONCE];
        for (int64_t t = 0; t < count; t++)
            rows[t] = reinterpret_cast<const Rounded*>(rounded + (from + t) * ld), outs[t] = out + (from + t) * ld_out;
        product_quads<false>(rows, count, w, depth, width, nullptr, outs, first, last);
        for (int64_t i = first; i < last; i += LANES) {
            vf by = load_some(scale + i, last - i);
            for (int64_t t = 0; t < count; t++) {
                vf value = load(outs[t] + i) * by;
                store(outs[t] + i, select(value < 0.0f, vf{}, value));
            }
        }
    }
}

template <class X>
void panel(const char* const* rows, int64_t count, const uint8_t* w, int64_t depth, int64_t width, float* const* out) {
    product_quads<false>(reinterpret_cast<const X* const*>(rows), count, w, depth, width, nullptr, out);
}

// Weights as integers in fp32, (depth, width).
inline void unpack(const uint8_t* w, int64_t depth, int64_t width, float* out) {
    for (int64_t k = 0; k < depth; k += 4)
        for (int64_t v = 0; v < width; v += LANES) {
            vu rows = quad(w + k * width + v * 4);
            float* to = out + k * width + v;
            store(to, row_of<0>(rows));
            if (k + 1 < depth) store(to + width, row_of<1>(rows));
            if (k + 2 < depth) store(to + 2 * width, row_of<2>(rows));
            if (k + 3 < depth) store(to + 3 * width, row_of<3>(rows));
        }
}

inline void scale(const float* x, const float* by, const float* bias, int64_t n, float* out) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        vf v = load(x + i) * load(by + i);
        store(out + i, bias ? v + load(bias + i) : v);
    }
    for (; i < n; i++) out[i] = x[i] * by[i] + (bias ? bias[i] : 0.0f);
}

// y[t][i] += sum over c of x[t][c] w[c][i] on few tokens, one quad after the other from beginning to end.
template <int TOKENS>
void add_quads(const float* x, int64_t ld_x, const uint8_t* w, int64_t depth, int64_t width, float* const* y) {
    for (int64_t c = 0; c < depth; c += 4, w += 4 * width) {
        vf value[TOKENS][4] = {};
        for (int t = 0; t < TOKENS; t++)
            for (int g = 0; g < 4; g++) value[t][g] += c + g < depth ? x[t * ld_x + c + g] : 0;
        for (int64_t i = 0; i < width; i += LANES) {
            vu rows = quad(w + 4 * i);
            __builtin_prefetch(w + 4 * (QUADS_AHEAD * width + i), 0, 2);
            vf first = row_of<0>(rows), second = row_of<1>(rows), third = row_of<2>(rows), fourth = row_of<3>(rows);
#pragma GCC unroll 8
            for (int t = 0; t < TOKENS; t++) {
                vf sum = load(y[t] + i) + value[t][0] * first + value[t][1] * second;
                store(y[t] + i, sum + (value[t][2] * third + value[t][3] * fourth));
            }
        }
    }
}

inline void add_down_quads(const ExpertCall& c, const float* hidden, int64_t ld_hidden, float* const* y) {
    const float* constant = static_cast<const float*>(c.constant);
    for (int64_t t = 0; t < c.count; t++)
        for (int64_t i = 0; constant && i < c.d_out; i += LANES)
            store(y[t] + i, load(y[t] + i) - load_some(constant + i, c.d_out - i));
    for (int64_t t = 0; t < c.count; t += FEW_ROWS) {
        int64_t n = std::min<int64_t>(FEW_ROWS, c.count - t);
        auto add = n == 4 ? add_quads<4> : n == 3 ? add_quads<3> : n == 2 ? add_quads<2> : add_quads<1>;
        add(hidden + t * ld_hidden, ld_hidden, static_cast<const uint8_t*>(c.down), c.size, c.d_out, y + t);
    }
}

// Bytes of a rounded row.
inline int64_t rounded_row(int64_t n) { return round_up(int64_t(sizeof(Rounded)) + round_up(n, 4), 8); }

// As `expert` in microkernels.h. A neuron has one scale for each of its weight vectors, by which its sums and then its
// hidden value are multiplied; biases and constant are fp32. X is float, or Rounded for rounded tokens and hidden values.
template <class X>
void expert_int8(const ExpertCall& c) {
    constexpr bool rounds = !std::is_same_v<X, float>;
    int64_t padded = round_up(c.size, 2 * LANES), n = c.count, stride = rounded_row(c.size);
    char* scratch = c.scratch;
    float* hidden = take<float>(scratch, n * padded);
    float* gates = c.gate ? take<float>(scratch, n * padded) : nullptr;
    char* again = rounds ? take<char>(scratch, n * stride) : nullptr;
    float** rows = take<float*>(scratch, n);
    float** outputs = take<float*>(scratch, n);
    const X** x = take<const X*>(scratch, n);
    const char* start = rounds ? c.rounded : c.x;
    for (int64_t t = 0; t < n; t++) {
        x[t] = reinterpret_cast<const X*>(start + c.token(t) * (rounds ? c.ld_rounded : c.ld_x));
        outputs[t] = c.y + c.token(t) * c.ld_y;
        rows[t] = hidden + t * padded;
    }
    const auto *up = static_cast<const uint8_t*>(c.up), *gate = static_cast<const uint8_t*>(c.gate);
    const bool few = n <= (rounds ? ROW_AFTER_ROW_ROUNDED : FEW_TOKENS);
    if (n <= FEW_TOKENS) {
        fetch(gate, AHEAD * LANES * 4);
        fetch(c.down, few ? QUADS_AHEAD * 4 * c.d_out : c.size * c.d_out);
    }
    product_quads<false>(x, n, up, c.d, c.size, nullptr, rows);
    if (gate) {
        for (int64_t t = 0; t < n; t++) rows[t] = gates + t * padded;
        product_quads<false>(x, n, gate, c.d, c.size, nullptr, rows);
    }
    const float *up_bias = static_cast<const float*>(c.up_bias), *gate_bias = static_cast<const float*>(c.gate_bias);
    if (n <= FEW_TOKENS) fetch(c.next, AHEAD * LANES * 4);
    auto act = [&](vf z) { return rounds ? activate_roughly(z, c.activation) : activate(z, c.activation); };
    for (int64_t t = 0; t < n; t++) {
        float* row = hidden + t * padded;
        Spread spread;
        for (int64_t v = 0; v < c.size; v += LANES) {
            int64_t left = c.size - v;
            vf h = load(row + v) * load_some(c.up_scale + v, left);
            if (up_bias) h += load_some(up_bias + v, left);
            if (gate) {
                vf g = load(gates + t * padded + v) * load_some(c.gate_scale + v, left);
                if (gate_bias) g += load_some(gate_bias + v, left);
                h *= act(g);
            } else {
                h = act(h);
            }
            h *= load_some(c.down_scale + v, left);
            if (rounds) spread.see(h);
            store(row + v, h);
        }
        if constexpr (rounds) {
            round_by(spread, row, c.size, again + t * stride);
            x[t] = reinterpret_cast<Rounded*>(again + t * stride);
            for (int64_t i = 0; few && i < c.size; i++) row[i] = x[t]->bytes[i] * x[t]->scale;
        } else {
            x[t] = row;
        }
    }
    if (few) return add_down_quads(c, hidden, padded, outputs);
    product_quads<true>(x, n, static_cast<const uint8_t*>(c.down), c.size, c.d_out, static_cast<const float*>(c.constant),
                        outputs);
}
