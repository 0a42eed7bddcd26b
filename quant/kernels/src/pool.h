// Pool: the threads that the kernels run on. Knows nothing of matrices.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace localmimo {

// The calling thread always takes part, so n threads need n - 1 workers. Units are taken one ahead:
// a thread that the system holds back delays at most the two units it holds. Workers spin briefly after a
// job, because a layer's two phases and the next layer's call follow within microseconds, then sleep.
class Pool {
 public:
  // `next` is the unit that the same thread does after this one, or -1: something to prefetch for.
  using Unit = std::function<void(int64_t unit, int64_t next, int thread)>;

  static Pool& instance();
  ~Pool();

  void set_threads(int n);
  int threads() const { return n_threads_; }
  // Binds worker i to cpus[i % size]; empty: the system decides. Returns false where not supported.
  bool pin(const std::vector<int>& cpus);

  // Runs units 0 .. n - 1 and returns when all are done; `alone`: on the calling thread. One call at a time.
  void run(int64_t n, const Unit& unit, bool alone = false);
  // Scratch of a thread, 64-byte aligned, at least `bytes` long; call outside of run().
  void reserve(size_t bytes);
  void* scratch(int thread) const { return scratch_[static_cast<size_t>(thread)]; }
  // Held by one kernel call from reserve() to its last run().
  std::mutex& turn() { return turn_; }

 private:
  void start();
  void stop();
  void work(int thread);
  void take(int thread);
  bool wait_for_job(uint64_t seen);
  void bind(int worker);

  std::mutex turn_;
  int n_threads_ = 1;
  int owner_pid_ = 0;
  std::vector<std::thread> workers_;
  std::vector<int> cpus_;
  std::vector<void*> scratch_;
  std::vector<std::unique_ptr<char[]>> memory_;
  size_t scratch_bytes_ = 0;

  struct Sleep {
    std::mutex mutex;
    std::condition_variable wake;
  };
  std::unique_ptr<Sleep> sleep_{new Sleep};  // replaced after a fork, where it would count threads that no longer exist
  std::atomic<uint64_t> job_{0};  // counts jobs; a change is the signal
  std::atomic<bool> open_{false};
  std::atomic<bool> stopping_{false};
  std::atomic<int> sleepers_{0};
  std::atomic<int> inside_{0};  // workers that may still look at the job
  std::atomic<int64_t> next_{0};
  int64_t n_units_ = 0;
  const Unit* unit_ = nullptr;
};

}  // namespace localmimo
