// Four floats at a time: SSE2 on x86, NEON on ARM, whatever the compiler makes of it elsewhere.
#define D2DMOE_ISA portable
#define D2DMOE_LANES 4
#if defined(__aarch64__)
#define D2DMOE_32_REGISTERS
#endif
#include "microkernels.h"
