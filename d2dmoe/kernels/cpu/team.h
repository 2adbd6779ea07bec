// A team of threads for one call: torch's own OpenMP threads where Python has handed them over, so that the two never
// compete for the cores; plain threads, started for the call, otherwise and in a forked child (whose OpenMP threads
// did not survive the fork).
#pragma once
#include <atomic>

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

using Body = void (*)(void* context, int id, int team);

// Runs `body` once in each thread of a team of at most `threads`; returns when all are done. Calls from several Python
// threads at once share the threads between them.
void run_team(int threads, Body body, void* context);

void use_openmp(void* parallel, void* thread_number, void* team_size);

}  // namespace d2dmoe
