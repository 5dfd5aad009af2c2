#include "large_pages.h"

#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <new>

namespace wicore {
namespace {

constexpr int64_t kPage = int64_t{1} << 21;
constexpr int64_t kMapping = 32 * kPage;  // untouched pages of it cost nothing
constexpr int64_t kAlignment = 64;

int64_t rounded(int64_t bytes, int64_t unit) { return (bytes + unit - 1) / unit * unit; }

// A mapping that begins at a page's boundary.
std::shared_ptr<uint8_t> map_pages(int64_t bytes) {
  const size_t size = static_cast<size_t>(bytes + kPage);
  void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  madvise(memory, size, MADV_HUGEPAGE);
  const std::shared_ptr<void> owner(memory, [size](void* mapped) { munmap(mapped, size); });
  const auto first = rounded(reinterpret_cast<intptr_t>(memory), kPage);
  return std::shared_ptr<uint8_t>(owner, reinterpret_cast<uint8_t*>(first));
}

}  // namespace

std::shared_ptr<uint8_t> large_pages(int64_t bytes) {
  static std::mutex mutex;
  static std::weak_ptr<uint8_t> current;
  static int64_t used = 0;
  const std::lock_guard<std::mutex> lock(mutex);
  const int64_t wanted = rounded(bytes, kAlignment);
  std::shared_ptr<uint8_t> mapping = current.lock();
  if (!mapping || used + wanted > kMapping) {
    mapping = map_pages(std::max(wanted, kMapping));
    current = mapping;
    used = 0;
  }
  std::shared_ptr<uint8_t> piece(mapping, mapping.get() + used);
  used += wanted;
  return piece;
}

}  // namespace wicore
