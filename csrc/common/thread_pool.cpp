#include "common/thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>

namespace genrec {
namespace {

thread_local bool inside_task = false;

// Helpers look for work this long before they sleep: a training step calls the pool several times in a row.
constexpr auto kSpin = std::chrono::microseconds(30);

}  // namespace

ThreadPool& ThreadPool::instance() {
  // Never destroyed: at exit other threads may still be inside a call. After fork() the child gets a new one: the old
  // one's helpers exist in the parent only, and its locks and conditions still wait for them.
  static std::atomic<ThreadPool*> pool{new ThreadPool()};
  static const int registered = pthread_atfork(nullptr, nullptr, [] { pool = new ThreadPool(); });
  (void)registered;
  return *pool;
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::start(int helpers) {
  while (static_cast<int>(helpers_.size()) < helpers) {
    helpers_.emplace_back(&ThreadPool::work, this, job_.load());
  }
}

void ThreadPool::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    quit_ = true;
  }
  wake_.notify_all();
  for (auto& helper : helpers_) helper.join();
}

void ThreadPool::drain() {
  inside_task = true;
  for (int64_t i; (i = next_.fetch_add(1)) < count_;) (*task_)(i);
  inside_task = false;
}

void ThreadPool::work(uint64_t seen) {
  while (true) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    while (job_.load(std::memory_order_acquire) == seen && !quit_ && std::chrono::steady_clock::now() < until) {
    }
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [&] { return quit_ || job_ != seen; });
    if (quit_) return;
    seen = job_;
    if (invited_ == 0) continue;
    --invited_;
    ++busy_;
    lock.unlock();
    drain();
    lock.lock();
    if (--busy_ == 0) done_.notify_one();
  }
}

void ThreadPool::run(int64_t count, int threads, const std::function<void(int64_t)>& task) {
  if (count <= 0) return;
  std::unique_lock<std::mutex> owner(owner_, std::defer_lock);
  const int helpers = static_cast<int>(std::min<int64_t>(threads, count)) - 1;
  if (helpers <= 0 || inside_task || !owner.try_lock()) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    start(helpers);
    task_ = &task;
    count_ = count;
    next_ = 0;
    invited_ = helpers;
    ++job_;
  }
  wake_.notify_all();
  drain();
  std::unique_lock<std::mutex> lock(mutex_);
  invited_ = 0;  // who has not come by now finds nothing left to do
  done_.wait(lock, [&] { return busy_ == 0; });
}

}  // namespace genrec
