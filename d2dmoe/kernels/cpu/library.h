// What the calls of the C ABI share.
#pragma once
#include <cstdint>

#include "kernels.h"
#include "layer.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

extern "C" {

uint64_t d2dmoe_fingerprint(const D2dmoeSample* samples, int64_t count);

}

namespace d2dmoe {

const Kernels& kernels_number(int number);
Panel panel_rounded(const Kernels& kernels, int64_t depth);  // the best there is for rounded rows

inline bool stale(const D2dmoeSample* samples, int64_t count, uint64_t fingerprint) {
    return count && d2dmoe_fingerprint(samples, count) != fingerprint;
}

// Far apart in memory, they take long to read: asked for before a product, they are there after it.
inline void fetch_samples(const D2dmoeSample* samples, int64_t count) {
    for (int64_t i = 0; i < count; i++) __builtin_prefetch(samples[i].at);
}

}  // namespace d2dmoe
