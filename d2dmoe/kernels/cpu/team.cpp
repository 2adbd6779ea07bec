#include "team.h"

#include <unistd.h>

#include <algorithm>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace d2dmoe {
namespace {

void (*omp_parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
int (*omp_thread_number)() = nullptr;
int (*omp_team_size)() = nullptr;
pid_t omp_owner = 0;
std::atomic<int> calls_running{0};

struct Work {
    Body body;
    void* context;
};

void enter(void* data) {
    auto* work = static_cast<Work*>(data);
    work->body(work->context, omp_thread_number(), omp_team_size());
}

void pause_briefly() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

// Threads that could not be started leave a smaller team: the body is told its size only when all are there.
void run_plain(int threads, Body body, void* context) {
    std::vector<std::thread> team;
    std::atomic<int> size{0};
    auto member = [&](int id) {
        while (size.load(std::memory_order_acquire) == 0) std::this_thread::yield();
        if (id < size.load()) body(context, id, size.load());
    };
    try {
        for (int id = 1; id < threads; id++) team.emplace_back(member, id);
    } catch (const std::system_error&) {
    }
    size.store(int(team.size()) + 1, std::memory_order_release);
    member(0);
    for (auto& thread : team) thread.join();
}

}  // namespace

void Barrier::wait() {
    int round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == team_) {
        arrived_.store(0, std::memory_order_relaxed);
        round_.store(round + 1, std::memory_order_release);
        return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; spins++)
        spins < 2000 ? pause_briefly() : std::this_thread::yield();
}

void use_openmp(void* parallel, void* thread_number, void* team_size) {
    omp_parallel = reinterpret_cast<decltype(omp_parallel)>(parallel);
    omp_thread_number = reinterpret_cast<decltype(omp_thread_number)>(thread_number);
    omp_team_size = reinterpret_cast<decltype(omp_team_size)>(team_size);
    omp_owner = getpid();
}

void run_team(int threads, Body body, void* context) {
    int others = calls_running.fetch_add(1);
    threads = std::max(1, threads / (std::max(others, 0) + 1));
    if (threads == 1) {
        body(context, 0, 1);
    } else if (omp_parallel && omp_owner == getpid()) {
        Work work{body, context};
        omp_parallel(enter, &work, unsigned(threads), 0);
    } else {
        run_plain(threads, body, context);
    }
    calls_running.fetch_sub(1);
}

}  // namespace d2dmoe
