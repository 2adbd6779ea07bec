// A team of threads for one call: torch's own OpenMP threads where Python has handed them over, so that the two never
// compete for the cores; plain threads, started for the call, otherwise and in a forked child (whose OpenMP threads
// did not survive the fork).
#pragma once
#include <atomic>
#include <new>
#include <thread>

namespace d2dmoe {

// Everyone in the team waits here for the others; first with the processor, then giving it away.
class Barrier {
   public:
    explicit Barrier(int team) : team_(team) {}
    void wait();

   private:
    const int team_;
    std::atomic<int> arrived_{0}, round_{0};
};

// Where a team makes its barrier: it can turn out smaller than asked for. Thread 0 opens it, the others join it.
class Meeting {
   public:
    Barrier& open(int team) {
        Barrier* barrier = new (room_) Barrier(team);
        barrier_.store(barrier, std::memory_order_release);
        return *barrier;
    }
    Barrier& join() {
        Barrier* barrier;
        while (!(barrier = barrier_.load(std::memory_order_acquire))) std::this_thread::yield();
        return *barrier;
    }

   private:
    std::atomic<Barrier*> barrier_{nullptr};
    alignas(Barrier) char room_[sizeof(Barrier)];
};

using Body = void (*)(void* context, int id, int team);

// Runs `body` once in each thread of a team of at most `threads`; returns when all are done. Calls from several Python
// threads at once share the threads between them.
void run_team(int threads, Body body, void* context);

void use_openmp(void* parallel, void* thread_number, void* team_size);

}  // namespace d2dmoe
