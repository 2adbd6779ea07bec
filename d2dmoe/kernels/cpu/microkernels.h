// The arithmetic, once for every instruction set: the including file names it (D2DMOE_ISA), gives the width of its
// vectors (D2DMOE_LANES floats) and is compiled with its flags. Everything is written in GCC's vector extensions; only
// the bf16 dot product (D2DMOE_BF16_PAIRS) needs intrinsics.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels.h"
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace d2dmoe {
namespace D2DMOE_ISA {

constexpr int64_t LANES = D2DMOE_LANES;
typedef float vf __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

// Loads and stores go through typed pointers: through memcpy GCC 12 takes a detour over the stack.
inline vf load(const float* p) { return *reinterpret_cast<const vf*>(p); }
inline vf load(const bf16* p) {
    return (vf)(__builtin_convertvector(*reinterpret_cast<const vh*>(p), vu) << 16);
}
inline void store(float* p, vf v) { *reinterpret_cast<vf*>(p) = v; }

#if defined(__AVX512F__)
inline __mmask16 first_lanes(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : __mmask16((1u << n) - 1); }
inline vf load_some(const float* p, int64_t valid) { return (vf)_mm512_maskz_loadu_ps(first_lanes(valid), p); }
inline vf load_some(const bf16* p, int64_t valid) {
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(valid), p)), 16);
}
#else
template <class T>
inline vf load_some(const T* p, int64_t valid) {
    if (valid >= LANES) return load(p);
    T values[LANES] = {};
    for (int64_t i = 0; i < valid; i++) values[i] = p[i];
    return load(values);
}
#endif

inline float total(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float sum = 0;
    for (int64_t i = 0; i < LANES; i++) sum += v[i];
    return sum;
#endif
}

inline vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }

inline bf16 to_bf16(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    if ((u & 0x7fffffff) > 0x7f800000) return {uint16_t((u >> 16) | 64)};  // NaN stays NaN
    return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}

// ---- activations

// e^x, relative error below 2e-7: x = n ln 2 + r, polynomial in r.
inline vf exp(vf given) {
    const vf zero = {};
    vf x = select(given < -87.0f, zero - 87.0f, select(given > 88.0f, zero + 88.0f, given));
    vf shifted = x * 1.44269504f + 12582912.0f;  // rounds to an integer in the low bits
    vf n = shifted - 12582912.0f;
    vf r = x - n * 0.693145752f - n * 1.42860677e-6f;
    vf p = zero + 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    vf power = (vf)((vi)p + (((vi)shifted - 0x4b400000) << 23));
    return select(given > 88.0f, zero + __builtin_inff(), power);
}

inline vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

// log P(u) on [0, 6], P the upper tail of the normal distribution; fitted so that u P(u) errs by less than 4e-8.
constexpr float LOG_TAIL[] = {1.21546009e-07f,   -2.92639515e-06f, 2.79201577e-05f, -0.000113773778f, -0.000156762952f,
                              0.00500170048f,    -0.0364784151f,   -0.318260491f,   -0.797892153f,    -0.693146884f};

// max(z, 0) - |z| P(|z|) which is z Phi(z) without cancellation.
inline vf gelu(vf z) {
    vf a = (vf)((vi)z & 0x7fffffff), positive = select(z > 0.0f, z, vf{});
    vf u = select(a > 6.0f, vf{} + 6.0f, a);
    vf p = vf{} + LOG_TAIL[0];
#pragma GCC unroll 16
    for (int i = 1; i < 10; i++) p = p * u + LOG_TAIL[i];
    vf result = positive - a * exp(p);
    return select(a < 1e30f, result, z * select(z < 0.0f, vf{}, vf{} + 1.0f));
}

// log P(u) takes an exponential. Where hidden values are rounded to int8 at once, P(u) as a polynomial of degree 9 in
// u / 2.25 - 1 on [0, 4.5] is enough: errors below 2e-5, and nothing at all from -4.5 down. Fitted by linear programming.
constexpr float TAIL[] = {-0.0194566622f, 0.029446058f, 0.0500539728f, -0.128997266f, 0.0371624418f,
    0.156406641f, -0.246419251f, 0.180931896f, -0.0713483766f, 0.0122205419f};
constexpr float TANH_TAIL[] = {-0.0170148257f, 0.0255419239f, 0.0466071703f, -0.120868944f, 0.0375292785f,
    0.15031904f, -0.245015472f, 0.182741776f, -0.071927309f, 0.0120873656f};

inline vf rough_gelu(vf z, const float* tail) {
    vf a = (vf)((vi)z & 0x7fffffff);
    vf u = select(a > 4.5f, vf{} + 4.5f, a), t = u * (2.0f / 4.5f) - 1.0f;
    vf p = vf{} + tail[0];
#pragma GCC unroll 16
    for (int i = 1; i < 10; i++) p = p * t + tail[i];
    return select(a < 4.5f, select(z > 0.0f, z, vf{}) - u * p, select(z < 0.0f, vf{}, z));
}

inline vf activate(vf z, int32_t kind) {
    switch (kind) {
        case RELU: return select(z < 0.0f, vf{}, z);
        case GELU: return gelu(z);
        case GELU_TANH: return z * sigmoid(1.59576912f * (z + 0.044715f * z * z * z));
        case QUICK_GELU: return z * sigmoid(1.702f * z);
        case SILU: return z * sigmoid(z);
        default: return z;
    }
}

// The same for values that will be rounded to int8.
inline vf activate_roughly(vf z, int32_t kind) {
    return kind == GELU ? rough_gelu(z, TAIL) : kind == GELU_TANH ? rough_gelu(z, TANH_TAIL) : activate(z, kind);
}

// ---- matrix products

// The end of a tile: KU partial sums of ROWS tokens and COLS vectors each.
template <class W, int KU, int ROWS, int COLS, bool ADD>
__attribute__((always_inline)) inline void write_sums(vf (&sum)[KU][ROWS][COLS], int64_t valid, const W* minus,
                                                      float* const* out, int64_t at) {
#pragma GCC unroll 16
    for (int t = 0; t < ROWS; t++) {
        float* y = out[t] + at;
#pragma GCC unroll 8
        for (int v = 0; v < COLS; v++) {
            vf result = sum[0][t][v];
#pragma GCC unroll 4
            for (int u = 1; u < KU; u++) result += sum[u][t][v];
            if (ADD) result += load(y + v * LANES);
            if (minus) result -= load_some(minus + v * LANES, valid - v * LANES);
            store(y + v * LANES, result);
        }
    }
}

// With few tokens the weights come from memory as fast as they can; that takes asking for them AHEAD vectors before.
// FEW_ROWS tokens are taken at once by what reads a matrix row after row. Experts of so few tokens read their down projection
// in that way; with more it takes more instructions than asking for all of it before it is needed, as a product.
constexpr int FEW_ROWS = 4, FEW_TOKENS = 7, AHEAD = 96, QUADS_AHEAD = 2;
constexpr int ROW_AFTER_ROW = 3, ROW_AFTER_ROW_BF16 = 2, ROW_AFTER_ROW_ROUNDED = 1;

inline void fetch(const void* start, int64_t bytes) {
    for (int64_t i = 0; start && i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(start) + i, 0, 2);
}

// out[t][v] (+)= sum over k of x[t][k] w[k * stride + v], for ROWS tokens and COLS vectors. In rows from `safe` on, a
// whole vector would reach beyond the weights; `valid` floats may be read there. KU rows of w are in flight at once.
template <class W, int ROWS, int COLS, bool ADD>
void tile(const float* const* x, const W* w, int64_t stride, int64_t depth, int64_t safe, int64_t valid, const W* minus,
          float* const* out, int64_t at) {
    constexpr int KU = ROWS * COLS >= 6 ? 1 : ROWS * COLS >= 3 ? 2 : 4;
    vf sum[KU][ROWS][COLS] = {};
    const float* row[ROWS];
#pragma GCC unroll 16
    for (int t = 0; t < ROWS; t++) row[t] = x[t];
    int64_t k = 0;
    for (; k + KU <= safe; k += KU) {
#pragma GCC unroll 4
        for (int u = 0; u < KU; u++) {
            vf weights[COLS];
#pragma GCC unroll 8
            for (int v = 0; v < COLS; v++) {
                weights[v] = load(w + (k + u) * stride + v * LANES);
                if (ROWS <= FEW_TOKENS) __builtin_prefetch(w + (k + u + AHEAD / COLS) * stride + v * LANES, 0, 2);
            }
#pragma GCC unroll 16
            for (int t = 0; t < ROWS; t++) {
                float value = row[t][k + u];
#pragma GCC unroll 8
                for (int v = 0; v < COLS; v++) sum[u][t][v] += value * weights[v];
            }
        }
    }
    for (; k < depth; k++) {
        int64_t left = k < safe ? COLS * LANES : valid;
        for (int v = 0; v < COLS; v++) {
            vf weights = load_some(w + k * stride + v * LANES, left - v * LANES);
            for (int t = 0; t < ROWS; t++) sum[0][t][v] += row[t][k] * weights;
        }
    }
    write_sums<W, KU, ROWS, COLS, ADD>(sum, valid, minus, out, at);
}

#if defined(D2DMOE_BF16_PAIRS)
inline __m512bh two_rows(__m256i first, __m256i second) {  // (a0 b0 a1 b1 ...)
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
    return (__m512bh)_mm512_permutexvar_epi16(order, both);
}

inline __m256i some_bf16(const bf16* p, int64_t valid) {
    return _mm256_maskz_loadu_epi16(first_lanes(valid), p);
}

// The same on pairs of bf16 rows, two products an instruction, sums in fp32.
template <class W, int ROWS, int COLS, bool ADD>
void tile(const bf16* const* x, const W* w, int64_t stride, int64_t depth, int64_t safe, int64_t valid, const W* minus,
          float* const* out, int64_t at) {
    constexpr int KU = ROWS * COLS >= 6 ? 1 : ROWS * COLS >= 3 ? 2 : 4;
    typedef int32_t pair __attribute__((aligned(2), may_alias));
    vf sum[KU][ROWS][COLS] = {};
    const bf16* row[ROWS];
#pragma GCC unroll 16
    for (int t = 0; t < ROWS; t++) row[t] = x[t];
    int64_t k = 0;
    for (; k + 2 * KU <= safe; k += 2 * KU) {
#pragma GCC unroll 4
        for (int u = 0; u < KU; u++) {
            __m512bh weights[COLS];
            const bf16* here = w + (k + 2 * u) * stride;
            if (ROWS <= FEW_TOKENS) {  // a line holds two vectors
                const bf16* ahead = here + 2 * AHEAD / COLS * stride;
#pragma GCC unroll 8
                for (int v = 0; v < COLS; v += 2) {
                    __builtin_prefetch(ahead + v * 16, 0, 2);
                    __builtin_prefetch(ahead + stride + v * 16, 0, 2);
                }
            }
#pragma GCC unroll 8
            for (int v = 0; v < COLS; v++)
                weights[v] = two_rows(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(here + v * 16)),
                                      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(here + stride + v * 16)));
#pragma GCC unroll 16
            for (int t = 0; t < ROWS; t++) {
                auto value = (__m512bh)_mm512_set1_epi32(*reinterpret_cast<const pair*>(row[t] + k + 2 * u));
#pragma GCC unroll 8
                for (int v = 0; v < COLS; v++) sum[u][t][v] = (vf)_mm512_dpbf16_ps((__m512)sum[u][t][v], value, weights[v]);
            }
        }
    }
    for (; k < depth; k += 2) {
        bool odd = k + 1 == depth;
        for (int v = 0; v < COLS; v++) {
            int64_t first = (k < safe ? COLS * 16 : valid) - v * 16;
            int64_t second = odd ? 0 : (k + 1 < safe ? COLS * 16 : valid) - v * 16;
            __m512bh weights = two_rows(some_bf16(w + k * stride + v * 16, first),
                                        some_bf16(w + (k + 1) * stride + v * 16, second));
            for (int t = 0; t < ROWS; t++) {
                int32_t value = row[t][k].bits | (odd ? 0 : int32_t(uint32_t(row[t][k + 1].bits) << 16));
                sum[0][t][v] = (vf)_mm512_dpbf16_ps((__m512)sum[0][t][v], (__m512bh)_mm512_set1_epi32(value), weights);
            }
        }
    }
    write_sums<W, KU, ROWS, COLS, ADD>(sum, valid, minus, out, at);
}
#endif

// The most tokens that fit into the registers beside COLS vectors of weights.
constexpr int most_rows(int cols) {
#if defined(D2DMOE_32_REGISTERS)
    return cols <= 1 ? 12 : cols == 2 ? 10 : cols == 3 ? 7 : 6;
#else
    return cols <= 1 ? 8 : cols == 2 ? 5 : 3;
#endif
}
#if defined(D2DMOE_32_REGISTERS)
constexpr int MOST_COLS = 4;
#else
constexpr int MOST_COLS = 3;
#endif

template <class X, class W>
using Tile = void (*)(const X* const*, const W*, int64_t, int64_t, int64_t, int64_t, const W*, float* const*, int64_t);

template <class X, class W, int COLS, bool ADD>
Tile<X, W> pick_rows(int64_t rows) {
    static const Tile<X, W> tiles[] = {
        tile<W, 1, COLS, ADD>, tile<W, 2, COLS, ADD>, tile<W, 3, COLS, ADD>,
        tile<W, most_rows(COLS) >= 4 ? 4 : 1, COLS, ADD>, tile<W, most_rows(COLS) >= 5 ? 5 : 1, COLS, ADD>,
        tile<W, most_rows(COLS) >= 6 ? 6 : 1, COLS, ADD>, tile<W, most_rows(COLS) >= 7 ? 7 : 1, COLS, ADD>,
        tile<W, most_rows(COLS) >= 8 ? 8 : 1, COLS, ADD>, tile<W, most_rows(COLS) >= 9 ? 9 : 1, COLS, ADD>,
        tile<W, most_rows(COLS) >= 10 ? 10 : 1, COLS, ADD>, tile<W, most_rows(COLS) >= 11 ? 11 : 1, COLS, ADD>,
        tile<W, most_rows(COLS) >= 12 ? 12 : 1, COLS, ADD>,
    };
    return tiles[rows - 1];
}

template <class X, class W, bool ADD>
Tile<X, W> pick(int64_t cols, int64_t rows) {
    switch (cols) {
        case 1: return pick_rows<X, W, 1, ADD>(rows);
        case 2: return pick_rows<X, W, 2, ADD>(rows);
        case 3: return pick_rows<X, W, 3, ADD>(rows);
        default: return pick_rows<X, W, MOST_COLS, ADD>(rows);
    }
}

// out[t] (+)= x[t] w, less `minus`, for all tokens of an expert and columns `first` to `last`; w is one contiguous
// (depth, width) piece. Blocks of columns outside, tokens inside, both cut into parts of nearly the same size.
template <class X, class W, bool ADD>
void product(const X* const* x, int64_t count, const W* w, int64_t depth, int64_t width, const W* minus,
             float* const* out, int64_t first, int64_t last) {
    int64_t vectors = (last - first + LANES - 1) / LANES, blocks = (vectors + MOST_COLS - 1) / MOST_COLS;
    for (int64_t b = 0, v = 0; b < blocks; b++) {
        int64_t cols = vectors / blocks + (b < vectors % blocks), at = first + v * LANES;
        int64_t beyond = at + cols * LANES - width;  // how far a vector reaches into the next row
        int64_t safe = beyond <= 0 ? depth : std::max<int64_t>(0, depth - (beyond + width - 1) / width);
        int64_t most = most_rows(int(cols)), parts = (count + most - 1) / most;
        for (int64_t p = 0, t = 0; p < parts; p++) {
            int64_t rows = count / parts + (p < count % parts);
            pick<X, W, ADD>(cols, rows)(x + t, w + at, width, depth, safe, width - at, minus ? minus + at : nullptr,
                                        out + t, at);
            t += rows;
        }
        v += cols;
    }
}

template <class X, class W, bool ADD>
void product(const X* const* x, int64_t count, const W* w, int64_t depth, int64_t width, const W* minus, float* const* out) {
    product<X, W, ADD>(x, count, w, depth, width, minus, out, 0, width);
}

// The same for rows at equal distances, and what `end` says (`Dots`).
template <class W>
void product_of_rows(const float* x, int64_t ld_x, int64_t tokens, const W* w, int64_t depth, int64_t width, int64_t first,
                     int64_t last, float* out, int64_t ld_out, int32_t end) {
    constexpr int64_t AT_ONCE = 64;
    for (int64_t from = 0; from < tokens; from += AT_ONCE) {
        int64_t count = std::min(AT_ONCE, tokens - from);
        const float* inputs[AT_ONCE];
        float* outputs[AT_ONCE];
        for (int64_t t = 0; t < count; t++) inputs[t] = x + (from + t) * ld_x, outputs[t] = out + (from + t) * ld_out;
        product<float, W, false>(inputs, count, w, depth, width, nullptr, outputs, first, last);
        for (int64_t t = 0; t < count && end != DOTS_PLAIN; t++)
            for (int64_t i = first; i < last; i += LANES) {
                vf value = load(outputs[t] + i);
                store(outputs[t] + i, end == DOTS_ABS ? (vf)((vi)value & 0x7fffffff) : select(value < 0.0f, vf{}, value));
            }
    }
}

// ---- rows of a matrix that run, times what a token has for them

inline float tail_product(const float* x, const float* w) { return *x * *w; }
inline float to_float(bf16 v) {
    uint32_t u = uint32_t(v.bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
inline float tail_product(const float* x, const bf16* w) { return *x * to_float(*w); }
inline float tail_product(const bf16* x, const bf16* w) { return to_float(*x) * to_float(*w); }
// y[t][at + i] += sum over c of x[t][c] rows[c][i] for a GROUP of rows, each read from beginning to end while `next` is
// fetched.
template <class W, int TOKENS, int GROUP>
void add_group(const float* x, int64_t ld_x, const W* const* rows, const W* const* next, int64_t width, float* const* y,
               int64_t at) {
    vf value[TOKENS][GROUP];
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 8
        for (int g = 0; g < GROUP; g++) value[t][g] = vf{} + x[t * ld_x + g];
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
        vf weights[GROUP];
#pragma GCC unroll 8
        for (int g = 0; g < GROUP; g++) {
            weights[g] = load(rows[g] + i);
            __builtin_prefetch(next[g] + i, 0, 2);
        }
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; t++) {
            vf sum = load(y[t] + at + i);
#pragma GCC unroll 8
            for (int g = 0; g < GROUP; g++) sum += value[t][g] * weights[g];
            store(y[t] + at + i, sum);
        }
    }
    for (; i < width; i++)
        for (int t = 0; t < TOKENS; t++)
            for (int g = 0; g < GROUP; g++) y[t][at + i] += tail_product(x + t * ld_x + g, rows[g] + i);
}

// The same for the rows of w that `list` names, or the first `count`.
template <class W, int TOKENS>
void add_rows_to(const float* x, int64_t ld_x, const W* w, int64_t ld_w, const int32_t* list, int64_t count, int64_t width,
                 float* const* y, int64_t at) {
    constexpr int GROUP = 4;
    const W *rows[GROUP], *next[GROUP];
    auto row = [&](int64_t c) { return w + (list ? list[c] : c) * ld_w; };
    int64_t c = 0;
    for (; c + GROUP <= count; c += GROUP) {
        for (int g = 0; g < GROUP; g++) rows[g] = row(c + g), next[g] = row(std::min(c + GROUP + g, count - 1));
        add_group<W, TOKENS, GROUP>(x + c, ld_x, rows, next, width, y, at);
    }
    for (; c < count; c++) {
        rows[0] = row(c);
        add_group<W, TOKENS, 1>(x + c, ld_x, rows, rows, width, y, at);
    }
}

template <class W>
void add_rows_few(const float* x, int64_t ld_x, int64_t tokens, const W* w, int64_t ld_w, const int32_t* list, int64_t count,
                  int64_t width, float* const* y, int64_t at) {
    static_assert(FEW_ROWS == 4);
    auto add = tokens == 4 ? add_rows_to<W, 4> : tokens == 3 ? add_rows_to<W, 3> : tokens == 2 ? add_rows_to<W, 2>
                                                                                               : add_rows_to<W, 1>;
    add(x, ld_x, w, ld_w, list, count, width, y, at);
}

template <class W>
void add_rows(const float* x, int64_t ld_x, int64_t tokens, const W* w, int64_t ld_w, const int32_t* list, int64_t count,
              int64_t width, float* y, int64_t ld_y) {
    constexpr int64_t PART = 1024;  // columns: with a group of rows they stay in the first cache from token to token
    int64_t part = tokens > FEW_ROWS ? PART : width;
    for (int64_t i = 0; i < width; i += part)
        for (int64_t t = 0; t < tokens; t += FEW_ROWS) {
            float* rows[FEW_ROWS];
            int64_t n = std::min<int64_t>(FEW_ROWS, tokens - t);
            for (int64_t r = 0; r < n; r++) rows[r] = y + (t + r) * ld_y;
            add_rows_few(x + t * ld_x, ld_x, n, w + i, ld_w, list, count, std::min(part, width - i), rows, i);
        }
}

// ---- one expert

template <class T>
inline T* take(char*& scratch, int64_t n) {
    char* start = scratch;
    scratch += round_up(n * int64_t(sizeof(T)), 64);
    return reinterpret_cast<T*>(start);
}

// The down projection on few tokens, row after row.
template <class W>
void add_down(const ExpertCall& c, const float* hidden, int64_t ld_hidden, float* const* y) {
    const W *down = static_cast<const W*>(c.down), *constant = static_cast<const W*>(c.constant);
    for (int64_t t = 0; t < c.count; t++) {
        for (int64_t i = 0; constant && i < c.d_out; i += LANES)
            store(y[t] + i, load(y[t] + i) - load_some(constant + i, c.d_out - i));
    }
    for (int64_t t = 0; t < c.count; t += FEW_ROWS) {
        int64_t n = std::min<int64_t>(FEW_ROWS, c.count - t);
        add_rows_few(hidden + t * ld_hidden, ld_hidden, n, down, c.d_out, nullptr, c.size, c.d_out, y + t, 0);
    }
}

template <class X, class W>
void expert(const ExpertCall& c) {
    constexpr bool narrow = sizeof(X) == 2;
    int64_t padded = round_up(c.size, 2 * LANES), n = c.count;
    char* scratch = c.scratch;
    float* hidden = take<float>(scratch, n * padded);
    float* gates = c.gate ? take<float>(scratch, n * padded) : nullptr;
    bf16* narrowed = narrow ? take<bf16>(scratch, n * padded) : nullptr;
    float** rows = take<float*>(scratch, n);
    const X** inputs = take<const X*>(scratch, n);
    float** outputs = take<float*>(scratch, n);
    const X** x = take<const X*>(scratch, n);
    for (int64_t t = 0; t < n; t++) {
        x[t] = reinterpret_cast<const X*>(c.x + c.token(t) * c.ld_x);
        outputs[t] = c.y + c.token(t) * c.ld_y;
    }
    const bool few = n <= (narrow ? ROW_AFTER_ROW_BF16 : ROW_AFTER_ROW);
    if (n <= FEW_TOKENS) {  // the beginnings of what the loops below ask for too late
        fetch(c.gate, AHEAD * LANES * int64_t(sizeof(W)));
        fetch(c.down, (few ? 4 : c.size) * c.d_out * int64_t(sizeof(W)));
    }
    for (int64_t t = 0; t < n; t++) rows[t] = hidden + t * padded;
    product<X, W, false>(x, n, static_cast<const W*>(c.up), c.d, c.size, nullptr, rows);
    if (c.gate) {
        for (int64_t t = 0; t < n; t++) rows[t] = gates + t * padded;
        product<X, W, false>(x, n, static_cast<const W*>(c.gate), c.d, c.size, nullptr, rows);
    }
    const W *up_bias = static_cast<const W*>(c.up_bias), *gate_bias = static_cast<const W*>(c.gate_bias);
    for (int64_t v = 0; v < c.size; v += LANES) {
        vf add = up_bias ? load_some(up_bias + v, c.size - v) : vf{};
        vf add_gate = gate_bias ? load_some(gate_bias + v, c.size - v) : vf{};
        for (int64_t t = 0; t < n; t++) {
            vf h = load(hidden + t * padded + v) + add;
            h = gates ? activate(load(gates + t * padded + v) + add_gate, c.activation) * h : activate(h, c.activation);
            store(hidden + t * padded + v, h);
        }
    }
    for (int64_t i = 0; narrow && few && i < n * padded; i++) hidden[i] = to_float(to_bf16(hidden[i]));
    if (n <= FEW_TOKENS) fetch(c.next, AHEAD * LANES * int64_t(sizeof(W)));
    if (few) return add_down<W>(c, hidden, padded, outputs);
    for (int64_t t = 0; t < n; t++) {
        if (narrow) {
            for (int64_t i = 0; i < c.size; i++) narrowed[t * padded + i] = to_bf16(hidden[t * padded + i]);
            inputs[t] = reinterpret_cast<const X*>(narrowed + t * padded);
        } else {
            inputs[t] = reinterpret_cast<const X*>(hidden + t * padded);
        }
    }
    product<X, W, true>(inputs, n, static_cast<const W*>(c.down), c.size, c.d_out, static_cast<const W*>(c.constant),
                     outputs);
}

// ---- the same with weights in int8

#include "int8.h"

// ---- router: many dot products along contiguous rows

inline void pair_product(vf& sum, const float* x, const float* w) { sum += load(x) * load(w); }
inline void pair_product(vf& sum, const float* x, const bf16* w) { sum += load(x) * load(w); }
#if defined(D2DMOE_BF16_PAIRS)
inline void pair_product(vf& sum, const bf16* x, const bf16* w) {
    sum = (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(x), (__m512bh)_mm512_loadu_si512(w));
}
#endif

template <class X, class W, int TOKENS, int ROWS>
void dot_tile(const X* x, int64_t ld_x, const W* w, int64_t depth, float* out, int64_t ld_out, int32_t end) {
    constexpr int64_t STEP = sizeof(X) == 2 ? 2 * LANES : LANES;
    vf sum[TOKENS][ROWS] = {};
    int64_t k = 0;
    for (; k + STEP <= depth; k += STEP) {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) __builtin_prefetch(w + (r + ROWS) * depth + k, 0, 2);
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) pair_product(sum[t][r], x + t * ld_x + k, w + r * depth + k);
    }
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            if constexpr (STEP == LANES)
                if (k < depth) sum[t][r] += load_some(x + t * ld_x + k, depth - k) * load_some(w + r * depth + k, depth - k);
            float value = total(sum[t][r]);
            for (int64_t i = STEP == LANES ? depth : k; i < depth; i++) value += tail_product(x + t * ld_x + i, w + r * depth + i);
            out[t * ld_out + r] = end == DOTS_PLAIN ? value : end == DOTS_ABS ? std::fabs(value) : value < 0 ? 0 : value;
        }
}

#if defined(__AVX512F__)
// Lane 4 i + j is the sum of all lanes of v[i][j].
inline vf totals(const vf (&v)[4][4]) {
    vf four[4];
    for (int i = 0; i < 4; i++) {
        vf ab = (vf)_mm512_unpacklo_ps((__m512)v[i][0], (__m512)v[i][1]) + (vf)_mm512_unpackhi_ps((__m512)v[i][0], (__m512)v[i][1]);
        vf cd = (vf)_mm512_unpacklo_ps((__m512)v[i][2], (__m512)v[i][3]) + (vf)_mm512_unpackhi_ps((__m512)v[i][2], (__m512)v[i][3]);
        four[i] = (vf)_mm512_unpacklo_pd((__m512d)ab, (__m512d)cd) + (vf)_mm512_unpackhi_pd((__m512d)ab, (__m512d)cd);
    }
    auto halves = [](vf a, vf b) {
        return (vf)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x88) + (vf)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xdd);
    };
    return halves(halves(four[0], four[1]), halves(four[2], four[3]));
}

// dot_tile for four tokens and rows: sixteen sums are added up in a tree. `depth` is a whole number of steps in bf16.
template <class X, class W>
void dot_square(const X* x, int64_t ld_x, const W* w, int64_t depth, float* out, int64_t ld_out, int32_t end) {
    constexpr int64_t STEP = sizeof(X) == 2 ? 2 * LANES : LANES;
    vf sum[4][4] = {};
    int64_t k = 0;
    for (; k + STEP <= depth; k += STEP) {
#pragma GCC unroll 4
        for (int t = 0; t < 4; t++)
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) pair_product(sum[t][r], x + t * ld_x + k, w + r * depth + k);
    }
    if constexpr (STEP == LANES)
        if (k < depth) {
#pragma GCC unroll 4
            for (int t = 0; t < 4; t++)
#pragma GCC unroll 4
                for (int r = 0; r < 4; r++)
                    sum[t][r] += load_some(x + t * ld_x + k, depth - k) * load_some(w + r * depth + k, depth - k);
        }
    vf all = totals(sum);
    if (end == DOTS_ABS) all = (vf)((vi)all & 0x7fffffff);
    if (end == DOTS_RELU) all = select(all < 0.0f, vf{}, all);
    float values[16];
    store(values, all);
    for (int t = 0; t < 4; t++) std::memcpy(out + t * ld_out, values + 4 * t, 16);
}
#endif

template <class X, class W, int TOKENS, int ROWS>
void dots_from(int64_t first, const X* x, int64_t ld_x, int64_t tokens, const W* w, int64_t rows, int64_t depth, float* out,
               int64_t ld_out, int32_t end) {
    int64_t r = first;
    for (; r + ROWS <= rows; r += ROWS) {
        int64_t t = 0;
        for (; t + TOKENS <= tokens; t += TOKENS)
            dot_tile<X, W, TOKENS, ROWS>(x + t * ld_x, ld_x, w + r * depth, depth, out + t * ld_out + r, ld_out, end);
        for (; t < tokens; t++)
            dot_tile<X, W, 1, ROWS>(x + t * ld_x, ld_x, w + r * depth, depth, out + t * ld_out + r, ld_out, end);
    }
    if constexpr (ROWS > 1)
        if (r < rows) dots_from<X, W, TOKENS, 1>(r, x, ld_x, tokens, w, rows, depth, out, ld_out, end);
}

template <class X, class W>
void dots(const X* x, int64_t ld_x, int64_t tokens, const W* w, int64_t rows, int64_t depth, float* out, int64_t ld_out,
          int32_t end) {
#if defined(__AVX512F__)
    if (tokens < 4 || (sizeof(X) == 2 && depth % (2 * LANES)))
        return dots_from<X, W, 4, 5>(0, x, ld_x, tokens, w, rows, depth, out, ld_out, end);
    int64_t r = 0, whole = tokens / 4 * 4;
    for (; r + 4 <= rows; r += 4)
        for (int64_t t = 0; t < whole; t += 4)
            dot_square<X, W>(x + t * ld_x, ld_x, w + r * depth, depth, out + t * ld_out + r, ld_out, end);
    dots_from<X, W, 4, 1>(r, x, ld_x, whole, w, rows, depth, out, ld_out, end);
    dots_from<X, W, 1, 4>(0, x + whole * ld_x, ld_x, tokens - whole, w, rows, depth, out + whole * ld_out, ld_out, end);
#elif defined(D2DMOE_32_REGISTERS)
    dots_from<X, W, 4, 5>(0, x, ld_x, tokens, w, rows, depth, out, ld_out, end);
#else
    dots_from<X, W, 3, 3>(0, x, ld_x, tokens, w, rows, depth, out, ld_out, end);
#endif
}

// ---- channels

// A score that is not a number counts as reached by nothing less: the caller sees it by the product with `x`.
inline void keep(const float* x, const float* norms, float threshold, int64_t channels, bool rounded, uint8_t* run) {
    if (rounded)
        for (int64_t j = 0; j < channels; j++) run[j] = to_float(to_bf16(std::fabs(x[j]) * norms[j])) >= threshold;
    else
        for (int64_t j = 0; j < channels; j++) run[j] = std::fabs(x[j]) * norms[j] >= threshold;
}

// ---- gates, as gates.py defines them

inline uint32_t order_of(float score) {  // scores are not negative: their bits order like they do
    uint32_t u;
    std::memcpy(&u, &score, 4);
    return u;
}

// Marks the `top` best; ties go to the lower number. The threshold is found by bisection on the bits.
inline void best(const float* scores, int64_t experts, int64_t top, uint8_t* marks) {
    typedef uint32_t word __attribute__((may_alias));
    const word* bits = reinterpret_cast<const word*>(scores);
    if (top <= 0 || top >= experts) {
        for (int64_t e = 0; e < experts; e++) marks[e] = top > 0;
        return;
    }
    uint32_t low = 0, high = 0;
    for (int64_t e = 0; e < experts; e++) high = std::max<uint32_t>(high, bits[e]);
    high++;
    int64_t reached = experts;
    while (high - low > 1 && reached != top) {  // at least `top` reach low, fewer reach high
        uint32_t middle = low + (high - low) / 2;
        uint32_t count = 0;
        for (int64_t e = 0; e < experts; e++) count += bits[e] >= middle;
        if (count >= top) {
            low = middle;
            reached = count;
        } else {
            high = middle;
        }
    }
    int64_t ties = 0;
    for (int64_t e = 0; e < experts; e++) marks[e] = bits[e] >= low;
    for (int64_t e = 0; e < experts && reached > top; e++) ties += bits[e] == low;
    for (int64_t e = experts - 1; reached > top && ties > 0; e--)
        if (bits[e] == low) marks[e] = 0, reached--, ties--;
}

inline void choose(const GateCall& g, const float* scores, int64_t experts, uint8_t* run, char* scratch) {
    for (int64_t e = 0; e < g.shared; e++) run[e] = 1;
    scores += g.shared, run += g.shared, experts -= g.shared;
    const float tiny = 1.17549435e-38f;
    if (g.kind == GATE_MAX || g.kind == GATE_SHARE) {
        float scale = 0;
        if (g.kind == GATE_MAX) {
            for (int64_t e = 0; e < experts; e++) scale = std::max(scale, scores[e]);
        } else {
            for (int64_t e = 0; e < experts; e++) scale += scores[e] * scores[e];
            scale = std::sqrt(scale);
        }
        scale = std::max(scale, tiny);
        for (int64_t e = 0; e < experts; e++) run[e] = scores[e] / scale >= g.tau;
    } else if (g.kind == GATE_ABSOLUTE) {
        for (int64_t e = 0; e < experts; e++) run[e] = scores[e] >= g.tau;
    } else if (g.kind == GATE_TOPK) {
        best(scores, experts, g.top, run);
    } else {
        int32_t* order = reinterpret_cast<int32_t*>(scratch);
        double sum = 0, before = 0;
        for (int64_t e = 0; e < experts; e++) order[e] = int32_t(e), sum += scores[e];
        std::sort(order, order + experts, [&](int32_t a, int32_t b) {
            return order_of(scores[a]) != order_of(scores[b]) ? order_of(scores[a]) > order_of(scores[b]) : a < b;
        });
        for (int64_t i = 0; i < experts; i++) {
            run[order[i]] = 1 - float(before) / std::max(float(sum), tiny) >= g.tau;
            before += scores[order[i]];
        }
    }
    for (int64_t e = 0; e < experts; e++) run[e] &= scores[e] > 0;
    uint8_t* marks = reinterpret_cast<uint8_t*>(scratch);
    if (g.min_experts > 0) {
        best(scores, experts, g.min_experts, marks);
        for (int64_t e = 0; e < experts; e++) run[e] |= marks[e];
    }
    if (g.max_experts > 0) {
        best(scores, experts, g.max_experts, marks);
        for (int64_t e = 0; e < experts; e++) run[e] &= marks[e];
    }
}

inline void narrow(const float* x, int64_t n, bf16* out) {
    for (int64_t i = 0; i < n; i++) out[i] = to_bf16(x[i]);
}

inline void widen(const bf16* x, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i++) out[i] = to_float(x[i]);
}

}  // namespace D2DMOE_ISA

#if !defined(D2DMOE_OWN_TABLE)
#define D2DMOE_TABLE_NAME_(isa) kernels_##isa
#define D2DMOE_TABLE_NAME(isa) D2DMOE_TABLE_NAME_(isa)
#define D2DMOE_STRING_(isa) #isa
#define D2DMOE_STRING(isa) D2DMOE_STRING_(isa)
namespace isa = D2DMOE_ISA;
#if defined(D2DMOE_BF16_PAIRS)
typedef bf16 Wide;
#define D2DMOE_FP32(function) nullptr  // kernels_avx512 does fp32
#else
typedef float Wide;
#define D2DMOE_FP32(function) function
#endif
extern const Kernels D2DMOE_TABLE_NAME(D2DMOE_ISA);
const Kernels D2DMOE_TABLE_NAME(D2DMOE_ISA) = {
    D2DMOE_STRING(D2DMOE_ISA),
    D2DMOE_LANES,
    sizeof(Wide) == 2,
    D2DMOE_FP32((isa::expert<float, float>)),
    isa::expert<Wide, bf16>,
    D2DMOE_FP32(isa::expert_int8<float>),
    D2DMOE_FP32(isa::expert_int8<isa::Rounded>),
    D2DMOE_FP32(isa::round_token),
    D2DMOE_FP32(isa::panel<float>),
    D2DMOE_FP32(isa::panel<isa::Rounded>),
    D2DMOE_FP32(isa::columns_rounded),
    D2DMOE_FP32(isa::unpack),
    D2DMOE_FP32(isa::scale),
    nullptr,
    nullptr,
    D2DMOE_FP32((isa::dots<float, float>)),
    [](const void* x, int64_t ld_x, int64_t tokens, const bf16* w, int64_t rows, int64_t depth, float* out, int64_t ld_out,
       int32_t end) { isa::dots(static_cast<const Wide*>(x), ld_x, tokens, w, rows, depth, out, ld_out, end); },
    isa::dots<float, bf16>,
    D2DMOE_FP32(isa::product_of_rows<float>),
    D2DMOE_FP32(isa::add_rows<float>),
    isa::add_rows<bf16>,
    isa::keep,
    isa::choose,
    isa::narrow,
    isa::widen,
};
#endif

}  // namespace d2dmoe
