#include "hkv/storage.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace genrec {
namespace hkv {

Arena::Arena(size_t bytes, const std::string& directory) : bytes_(bytes) {
  if (bytes == 0) return;
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  if (!directory.empty()) {
    std::string path = directory + "/genrec_rows_XXXXXX";
    file_ = mkstemp(&path[0]);
    if (file_ < 0) {
      throw std::runtime_error("can't create a file for table rows in " + directory + ": " + strerror(errno));
    }
    unlink(path.c_str());
    // All of it at once: a file with holes would kill the process when a full disk can't fill one.
    const int error = posix_fallocate(file_, 0, static_cast<off_t>(bytes));
    if (error != 0) {
      close(file_);
      throw std::runtime_error("can't get " + std::to_string(bytes) + " bytes for a file of table rows in " + directory +
                               ": " + strerror(error));
    }
    flags = MAP_SHARED;
  }
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, file_, 0);
  if (memory == MAP_FAILED) {
    const int error = errno;
    if (file_ >= 0) close(file_);
    throw std::runtime_error("can't map " + std::to_string(bytes) + " bytes for table rows: " + strerror(error));
  }
  data_ = static_cast<uint8_t*>(memory);
  // Rows are visited at random: large pages save most of the address translation.
  if (file_ < 0) advise_large_pages(memory, bytes);
}

Arena::~Arena() {
  if (data_ != nullptr) munmap(data_, bytes_);
  if (file_ >= 0) close(file_);
}

void Arena::swap(Arena& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(file_, other.file_);
}

void Arena::zero() {
  if (data_ == nullptr) return;
  if (file_ < 0) {
    madvise(data_, bytes_, MADV_DONTNEED);  // private anonymous pages read as zero afterwards
  } else {
    memset(data_, 0, bytes_);
  }
}

void advise_large_pages(void* memory, size_t bytes) {
  constexpr uintptr_t kLarge = uintptr_t{2} << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + kLarge - 1) / kLarge * kLarge;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(memory) + bytes) / kLarge * kLarge;
#if defined(MADV_HUGEPAGE)
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

RowStore::RowStore(uint64_t num_buckets, const StoreView& shape, const std::string& directory) : view_(shape) {
  for (int tier = 0; tier < shape.tiers; ++tier) {
    const size_t rows = num_buckets * static_cast<size_t>(shape.first[tier + 1] - shape.first[tier]);
    const std::string where = tier + 1 == shape.tiers ? directory : "";
    weights_[tier] = Arena(rows * shape.weights.row_bytes, where);
    state_[tier] = Arena(rows * shape.state.row_bytes, where);
    view_.weights.base[tier] = weights_[tier].data();
    view_.state.base[tier] = state_[tier].data();
  }
}

void RowStore::copy_row(int64_t to, const RowStore& from_store, int64_t from) {
  const StoreView& source = from_store.view_;
  memcpy(view_.row(view_.weights, to), source.row(source.weights, from), view_.weights.row_bytes);
  if (view_.state.row_bytes != 0) {
    memcpy(view_.row(view_.state, to), source.row(source.state, from), view_.state.row_bytes);
  }
}

void RowStore::swap_rows(int64_t a, int64_t b) {
  for (const Plane* plane : {&view_.weights, &view_.state}) {
    if (plane->row_bytes == 0) continue;
    uint8_t* first = view_.row(*plane, a);
    std::swap_ranges(first, first + plane->row_bytes, view_.row(*plane, b));
  }
}

void RowStore::zero() {
  for (int tier = 0; tier < kMaxTiers; ++tier) {
    weights_[tier].zero();
    state_[tier].zero();
  }
}

}  // namespace hkv
}  // namespace genrec
