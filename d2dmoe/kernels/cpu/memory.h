// Memory for a call.
#pragma once
#include <atomic>
#include <cstdlib>
#include <new>

#include "kernels.h"

namespace d2dmoe {

// For tests: after so many more requests there is no memory; negative, the rule, for no such limit.
extern std::atomic<int> allocations_left;

// Memory of one thread, kept between calls.
class Buffer {
   public:
    ~Buffer() { std::free(start_); }
    char* at_least(size_t bytes) {
        if (allocations_left.load(std::memory_order_relaxed) >= 0 && allocations_left.fetch_sub(1) <= 0) {
            allocations_left.store(0);
            throw std::bad_alloc();
        }
        if (bytes > size_) {
            std::free(start_);
            size_ = round_up(int64_t(bytes), 4096);
            start_ = static_cast<char*>(std::aligned_alloc(4096, size_));
            if (!start_) {
                size_ = 0;
                throw std::bad_alloc();
            }
        }
        return start_;
    }

   private:
    char* start_ = nullptr;
    size_t size_ = 0;
};

// Hands out aligned pieces of a buffer whose size is found by a first pass without memory.
class Pieces {
   public:
    explicit Pieces(char* start) : start_(start) {}
    template <class T>
    T* take(int64_t n) {
        T* piece = start_ ? reinterpret_cast<T*>(start_ + used_) : nullptr;
        used_ += round_up(n * int64_t(sizeof(T)), 64);
        return piece;
    }
    int64_t used() const { return used_; }

   private:
    char* start_;
    int64_t used_ = 0;
};

template <class Layout>
Layout lay_out(Buffer& buffer, Layout layout) {
    Pieces measure(nullptr);
    layout.take(measure);
    Pieces pieces(buffer.at_least(size_t(measure.used())));
    layout.take(pieces);
    return layout;
}

}  // namespace d2dmoe
