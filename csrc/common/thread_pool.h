// A small thread pool for the host engines. Not OpenMP: PyTorch ships an OpenMP runtime of its own, and two runtimes in
// one process spin against each other.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace genrec {

// Runs numbered tasks on the calling thread and helpers. Which thread runs a task is not fixed, so a task's result must
// depend on its number alone; then results are equal for any number of threads.
class ThreadPool {
 public:
  static ThreadPool& instance();

  // Calls task(i) once for each i in [0, count) and returns when all are done. A call from inside a task, or while
  // another caller holds the pool, runs on the caller alone.
  void run(int64_t count, int threads, const std::function<void(int64_t)>& task);

  ~ThreadPool();

 private:
  void start(int helpers);
  void stop();
  void work(uint64_t seen);
  void drain();

  std::mutex owner_;             // held by the caller whose job runs
  std::mutex mutex_;             // guards what follows
  std::condition_variable wake_, done_;
  std::vector<std::thread> helpers_;
  const std::function<void(int64_t)>* task_ = nullptr;
  std::atomic<int64_t> next_{0};
  int64_t count_ = 0;
  std::atomic<uint64_t> job_{0};
  int invited_ = 0;              // helpers that may still join the job
  std::atomic<int> busy_{0};     // helpers inside the job
  std::atomic<bool> quit_{false};
};

}  // namespace genrec
