// The C interface to one layer: what native.py fills through ctypes, and what an OpenVINO operation fills from its inputs.
#pragma once
#include <cstdint>

extern "C" {

// A word of a tensor that a derived one was made from: four bytes, or two where the tensor has no more.
struct D2dmoeSample {
    const uint16_t* at;
    int64_t halves;
};

// Mirrored in native.py. Null pointers stand for what a layer does not have.
struct D2dmoeLayer {
    int32_t bf16, activation, gate, kernels;
    // Are tokens and hidden values rounded to int8 as well? Then the linear term and the router's hidden layer are in int8, too.
    int32_t rounds;
    int64_t d, size, d_out, experts, router_width, linear_rank, top, min_experts, max_experts, shared;
    float tau;
    int32_t few;  // at most so many tokens are handled by sharing out the experts
    const void *router_hidden, *router_score;                           // (width, d), (experts, width)
    const void *up, *up_bias, *gate_weight, *gate_bias, *down;          // packed
    const void *constants;                                              // (experts, d_out)
    const float* base;                                                  // (d_out,): what a token gets without any expert
    const void *linear_in, *linear_out;                                 // (d, rank), (rank, d_out)
    const void *up_tiles, *gate_tiles, *down_tiles;                     // as of in_tiles in native.py
    const float *up_scale, *gate_scale, *down_scale;                    // (experts, size): weights are in int8, or null
    const float *router_scale, *linear_in_scale, *linear_out_scale;     // (width,), (rank,), (rank,), with `rounds`
    const void *router_up, *router_down;                                // (d, width), (width, experts): once more, or null
    const D2dmoeSample* samples;
    int64_t sample_count;
    uint64_t fingerprint;                                               // of the samples when the layer was prepared
};

int d2dmoe_abi();
int d2dmoe_kernels();
const char* d2dmoe_kernels_name(int number);
int d2dmoe_kernels_supported(int number);
int d2dmoe_kernels_bf16(int number);

// One layer call: y (tokens, d_out) from x (tokens, d), rows `ld_x` elements apart. `run` (tokens, experts) takes the
// place of router and gate where it is given. Returns 0, 1 if there is no memory, or 2, having computed nothing, if a
// source has changed.
int d2dmoe_forward(const D2dmoeLayer* layer, const void* x, int64_t ld_x, const uint8_t* run, int64_t tokens, void* y,
                   int threads);

// Calls `part` with the context, each number below `parts`, and `parts`; in any order, at once or one after the other.
typedef void (*D2dmoeParts)(int parts, void (*part)(void* context, int number, int parts), void* context);

// The same by threads of the caller's.
int d2dmoe_forward_by(const D2dmoeLayer* layer, const void* x, int64_t ld_x, const uint8_t* run, int64_t tokens, void* y,
                      int threads, D2dmoeParts parts);

}
