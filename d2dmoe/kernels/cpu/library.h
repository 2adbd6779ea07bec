// What the calls of the C ABI share.
#pragma once
#include <cstdint>

#include "kernels.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

extern "C" {

// Memory that a derived tensor was made from.
struct D2dmoeSource {
    const void* start;
    int64_t bytes;
};

uint64_t d2dmoe_fingerprint(const D2dmoeSource* sources, int64_t count);

}

namespace d2dmoe {

const Kernels& kernels_number(int number);

inline bool stale(const D2dmoeSource* sources, int64_t count, uint64_t fingerprint) {
    return count && d2dmoe_fingerprint(sources, count) != fingerprint;
}

}  // namespace d2dmoe
