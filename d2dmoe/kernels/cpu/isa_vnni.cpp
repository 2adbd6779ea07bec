// As isa_avx512.cpp, and the product of four pairs of bytes; of all this only the products in int8 that gain by it.
#define D2DMOE_ISA vnni
#define D2DMOE_LANES 16
#define D2DMOE_32_REGISTERS
#define D2DMOE_VNNI
#define D2DMOE_OWN_TABLE
#include "microkernels.h"

namespace d2dmoe {
void expert_rounded_vnni(const ExpertCall& call) { vnni::expert_int8<vnni::Rounded>(call); }
void panel_rounded_vnni(const char* const* rows, int64_t count, const uint8_t* w, int64_t depth, int64_t width,
                        float* const* out) {
    vnni::panel<vnni::Rounded>(rows, count, w, depth, width, out);
}
void columns_rounded_vnni(const char* rounded, int64_t ld, int64_t tokens, const uint8_t* w, const float* scale, int64_t depth,
                          int64_t width, int64_t first, int64_t last, float* out, int64_t ld_out) {
    vnni::columns_rounded(rounded, ld, tokens, w, scale, depth, width, first, last, out, ld_out);
}
}  // namespace d2dmoe
