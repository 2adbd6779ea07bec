// Compiled with AVX-512 F, BW, DQ and VL.
#define D2DMOE_ISA avx512
#define D2DMOE_LANES 16
#define D2DMOE_32_REGISTERS
#include "microkernels.h"
