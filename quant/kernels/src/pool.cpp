#include "pool.h"

#include <chrono>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif
#if !defined(_WIN32)
#include <unistd.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace localmimo {
namespace {

// Calls follow each other within a millisecond while tokens are made, and waking a sleeper takes some
// 100 us in a virtual machine. After kSpin a waiting thread yields its core to others.
constexpr auto kSpin = std::chrono::microseconds(50);
constexpr auto kYield = std::chrono::microseconds(1000);

void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

int process() {
#if defined(_WIN32)
  return 0;
#else
  return static_cast<int>(getpid());
#endif
}

}  // namespace

Pool& Pool::instance() {
  static Pool* pool = new Pool;  // never destroyed: workers may outlive static destructors
  return *pool;
}

Pool::~Pool() { stop(); }

void Pool::set_threads(int n) {
  std::lock_guard<std::mutex> turn(turn_);
  n = n < 1 ? 1 : n;
  if (n == n_threads_) return;
  stop();
  n_threads_ = n;
  scratch_bytes_ = 0;
}

bool Pool::pin(const std::vector<int>& cpus) {
#if defined(__linux__)
  std::lock_guard<std::mutex> turn(turn_);
  stop();
  cpus_ = cpus;
  return true;
#else
  return cpus.empty();
#endif
}

void Pool::bind(int worker) {
#if defined(__linux__)
  if (cpus_.empty()) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpus_[static_cast<size_t>(worker) % cpus_.size()], &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);
#else
  (void)worker;
#endif
}

void Pool::start() {
  if (static_cast<int>(workers_.size()) == n_threads_ - 1 && owner_pid_ == process()) return;
  if (owner_pid_ != process()) {
    // After a fork the workers are gone: forget their handles and counters instead of joining them.
    new std::vector<std::thread>(std::move(workers_));
    workers_.clear();
    sleep_.release();
    sleep_.reset(new Sleep);
    sleepers_ = 0;
    inside_ = 0;
  }
  owner_pid_ = process();
  for (int i = static_cast<int>(workers_.size()); i < n_threads_ - 1; ++i)
    workers_.emplace_back([this, i] { bind(i); work(i + 1); });
}

void Pool::stop() {
  if (owner_pid_ != process()) return;
  {
    std::lock_guard<std::mutex> lock(sleep_->mutex);
    stopping_ = true;
  }
  sleep_->wake.notify_all();
  for (auto& worker : workers_) worker.join();
  workers_.clear();
  stopping_ = false;
}

void Pool::reserve(size_t bytes) {
  if (bytes <= scratch_bytes_ && static_cast<int>(scratch_.size()) == n_threads_) return;
  memory_.clear();
  scratch_.clear();
  for (int i = 0; i < n_threads_; ++i) {
    memory_.emplace_back(new char[bytes + 64]);
    const auto address = reinterpret_cast<uintptr_t>(memory_.back().get());
    scratch_.push_back(reinterpret_cast<void*>((address + 63) & ~uintptr_t{63}));
  }
  scratch_bytes_ = bytes;
}

void Pool::take(int thread) {
  const auto take_next = [this] { return next_.fetch_add(1, std::memory_order_relaxed); };
  for (int64_t unit = take_next(); unit < n_units_;) {
    const int64_t next = take_next();
    (*unit_)(unit, next < n_units_ ? next : -1, thread);
    unit = next;
  }
}

bool Pool::wait_for_job(uint64_t seen) {
  const auto began = std::chrono::steady_clock::now();
  while (job_.load() == seen && !stopping_.load()) {
    for (int i = 0; i < 64 && job_.load(std::memory_order_relaxed) == seen; ++i) relax();
    const auto waited = std::chrono::steady_clock::now() - began;
    if (waited < kSpin) continue;
    if (waited < kYield) {
      std::this_thread::yield();
      continue;
    }
    std::unique_lock<std::mutex> lock(sleep_->mutex);
    ++sleepers_;
    sleep_->wake.wait(lock, [&] { return job_.load() != seen || stopping_.load(); });
    --sleepers_;
  }
  return !stopping_.load();
}

void Pool::work(int thread) {
  uint64_t seen = 0;
  while (wait_for_job(seen)) {
    seen = job_.load();
    inside_.fetch_add(1);
    // A job may be over before this thread got here; its fields are valid only while it is open.
    if (open_.load()) take(thread);
    inside_.fetch_sub(1);
  }
}

void Pool::run(int64_t n, const Unit& unit, bool alone) {
  if (alone || n_threads_ == 1 || n <= 1) {
    for (int64_t i = 0; i < n; ++i) unit(i, i + 1 < n ? i + 1 : -1, 0);
    return;
  }
  start();
  n_units_ = n;
  unit_ = &unit;
  next_.store(0);
  open_.store(true);
  job_.fetch_add(1);
  if (sleepers_.load() > 0) {
    { std::lock_guard<std::mutex> lock(sleep_->mutex); }
    sleep_->wake.notify_all();
  }
  take(0);
  open_.store(false);
  // Every unit is taken; those of other threads are done when no thread is inside any more.
  for (int i = 0; inside_.load() != 0; ++i) {
    if (i < 4096) relax();
    else std::this_thread::yield();
  }
}

}  // namespace localmimo
