// Compiled with -mavx2 -mfma.
#define D2DMOE_ISA avx2
#define D2DMOE_LANES 8
#include "microkernels.h"
