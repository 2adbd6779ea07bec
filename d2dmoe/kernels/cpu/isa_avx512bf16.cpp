// As isa_avx512.cpp, and the bf16 dot product.
#define D2DMOE_ISA avx512bf16
#define D2DMOE_LANES 16
#define D2DMOE_32_REGISTERS
#define D2DMOE_BF16_PAIRS
#include "microkernels.h"
