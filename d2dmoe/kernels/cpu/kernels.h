// What the schedule (forward.cpp) and the kernels of each instruction set (microkernels.h) share.
#pragma once
#include <cstdint>

namespace d2dmoe {

struct bf16 {
    uint16_t bits;
};

enum Activation : int32_t { RELU, GELU, GELU_TANH, QUICK_GELU, SILU, IDENTITY };
enum Dots : int32_t { DOTS_PLAIN, DOTS_RELU, DOTS_ABS };
enum Gate : int32_t { GATE_MAX, GATE_SHARE, GATE_TOPK, GATE_TOPP, GATE_ABSOLUTE };

// One expert and the tokens it runs for. Weights are (d, size) and (size, d_out), each one contiguous piece.
struct ExpertCall {
    const void *up, *up_bias, *gate, *gate_bias, *down;
    const void *up_tiles, *gate_tiles, *down_tiles;  // the same weights once more for experts_bf16, or null
    const float *up_scale, *gate_scale, *down_scale;  // (size,), of weights in int8, or null
    const void* constant;  // (d_out,), taken off the output, or null
    const void* next;      // `up` of the expert that comes after this one, or null
    int64_t d, size, d_out;
    int64_t widest;        // the largest size among the layer's experts
    int32_t activation;
    const char* x;         // rows of d values, ld_x bytes apart
    int64_t ld_x;
    const char* rounded;   // the same rows, rounded for `expert_rounded`, or null
    int64_t ld_rounded;
    float* y;              // rows of d_out values, padded to whole vectors, ld_y floats apart; added to
    int64_t ld_y;
    const int32_t* list;   // which rows of x and y, or null for the first `count`
    int64_t count;         // tokens
    char* scratch;         // expert_scratch(count, size) bytes, or experts_scratch() of the table
    int64_t token(int64_t i) const { return list ? list[i] : i; }
};

struct GateCall {
    int32_t kind;
    float tau;
    int64_t top;           // experts that topk runs, beside the shared ones
    int64_t min_experts, max_experts, shared;
};

// out[t][i] = sum over k of rows[t][k] w[k][i], with w in int8 as int8.h has it and rows in fp32, or as `round_token` makes
// them: then all of them one after the other, see `rounded_rows`.
using Panel = void (*)(const char* const* rows, int64_t count, const uint8_t* w, int64_t depth, int64_t width,
                       float* const* out);

// out[t * ld_out + i] = max(0, scale[i] * the product) for columns `first` to `last` of w and rounded rows, `ld` bytes apart.
// Rows of `out` are padded to whole vectors, and `first` begins one.
using Columns = void (*)(const char* rounded, int64_t ld, int64_t tokens, const uint8_t* w, const float* scale, int64_t depth,
                         int64_t width, int64_t first, int64_t last, float* out, int64_t ld_out);

struct Kernels {
    const char* name;
    int64_t lanes;         // floats of a vector
    bool bf16_inputs;      // bf16 layers take x in bf16; otherwise x has to be widened to fp32 first
    // Null where another table does fp32 as well.
    void (*expert_f32)(const ExpertCall&);
    void (*expert_bf16)(const ExpertCall&);
    // Weights as int8.h has them; x, biases and constant in fp32. The second one reads `rounded`, as `round_token` makes it.
    void (*expert_int8)(const ExpertCall&);
    void (*expert_rounded)(const ExpertCall&);
    void (*round_token)(const float* x, int64_t n, char* out);
    Panel panel_int8, panel_rounded;  // of rows in fp32, and of rounded ones
    Columns columns_rounded;
    void (*unpack)(const uint8_t* w, int64_t depth, int64_t width, float* out);  // to integers in fp32; whole vectors
    // out[i] = x[i] scale[i] + bias[i], where there is one
    void (*scale)(const float* x, const float* scale, const float* bias, int64_t n, float* out);
    // Several experts on rows of the same `tokens`, for a table that gains by seeing them all; null elsewhere.
    void (*experts_bf16)(const ExpertCall* calls, int64_t n, int64_t tokens);
    int64_t (*experts_scratch)(int64_t tokens, int64_t d, int64_t size, int64_t d_out);
    // out[t * ld_out + r] = sum over k of x[t * ld_x + k] w[r * depth + k], then what `end` says (`Dots`)
    void (*dots_f32)(const float* x, int64_t ld_x, int64_t tokens, const float* w, int64_t rows, int64_t depth, float* out,
                     int64_t ld_out, int32_t end);
    void (*dots_bf16)(const void* x, int64_t ld_x, int64_t tokens, const bf16* w, int64_t rows, int64_t depth, float* out,
                      int64_t ld_out, int32_t end);
    void (*dots_mixed)(const float* x, int64_t ld_x, int64_t tokens, const bf16* w, int64_t rows, int64_t depth, float* out,
                       int64_t ld_out, int32_t end);
    // out[t * ld_out + i] = sum over k of x[t * ld_x + k] w[k * width + i] for columns `first` to `last`, then what `end`
    // says. Rows of `out` are padded to whole vectors, and `first` begins one. For many tokens: w is read once for all.
    void (*product_f32)(const float* x, int64_t ld_x, int64_t tokens, const float* w, int64_t depth, int64_t width,
                        int64_t first, int64_t last, float* out, int64_t ld_out, int32_t end);
    // y[t * ld_y + i] += sum over c of x[t * ld_x + c] w[list[c] * ld_w + i], for `tokens` tokens and `width` columns
    void (*add_rows_f32)(const float* x, int64_t ld_x, int64_t tokens, const float* w, int64_t ld_w, const int32_t* list,
                         int64_t count, int64_t width, float* y, int64_t ld_y);
    void (*add_rows_mixed)(const float* x, int64_t ld_x, int64_t tokens, const bf16* w, int64_t ld_w, const int32_t* list,
                           int64_t count, int64_t width, float* y, int64_t ld_y);
    // The channels of a token that run: those whose |x| norm, rounded to bf16 if `rounded`, reaches the threshold.
    void (*keep)(const float* x, const float* norms, float threshold, int64_t channels, bool rounded, uint8_t* run);
    void (*choose)(const GateCall&, const float* scores, int64_t experts, uint8_t* run, char* scratch);
    void (*narrow)(const float* x, int64_t n, bf16* out);
    void (*widen)(const bf16* x, int64_t n, float* out);
};

constexpr int64_t MAX_LANES = 16;

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Two hidden rows (GLU), one of them again in bf16, and four pointers for every token.
inline int64_t expert_scratch(int64_t count, int64_t size) {
    return count * (round_up(size, 2 * MAX_LANES) * 10 + 64) + 512;
}

// Bytes from one rounded row of n values to the next.
inline int64_t rounded_bytes(int64_t n) { return round_up(8 + round_up(n, 4), 64); }

// Rounded rows of n values for a `Panel`: bytes from row to row, an odd number of lines, so that rows fall into different sets;
// where the first one begins, so that what comes after scale and offset begins a line; and the rows that there is to be room for.
struct RoundedRows {
    int64_t stride, start, rows;
    RoundedRows(int64_t n, int64_t count) : stride((((n + 63) / 64 + 1) | 1) * 64), start(64 - 8), rows(round_up(count, 32)) {}
};

extern const Kernels kernels_portable;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512bf16, kernels_amx;
void expert_rounded_vnni(const ExpertCall&);  // expert_rounded of kernels_avx512, with the VNNI instructions
void panel_rounded_vnni(const char* const*, int64_t, const uint8_t*, int64_t, int64_t, float* const*);
void columns_rounded_vnni(const char*, int64_t, int64_t, const uint8_t*, const float*, int64_t, int64_t, int64_t, int64_t,
                          float*, int64_t);
bool amx_usable();  // asks the system for the tiles, once
// The same for several experts of one size, by tiles, where the processor has them and the widths suit them.
bool amx_int8_usable(int64_t d, int64_t size);
void experts_rounded_amx(const ExpertCall* calls, int64_t n, int64_t tokens);
void panel_rounded_amx(const char* const*, int64_t, const uint8_t*, int64_t, int64_t, float* const*);
int64_t experts_rounded_scratch(int64_t tokens, int64_t d, int64_t size);
#endif

}  // namespace d2dmoe
